//! Entities change their pCPU: to one that idles, and where they had better be.
//!
//! *Balance.* Every few slices a busy pCPU looks whether one that waits elsewhere in its pool had better be here
//! ([`crate::crowd`]), and takes it over. Only pCPUs that share their pool come here.

use core::sync::atomic::Ordering;

use super::Scheduler;
use crate::{
    cpus::CpuSet,
    entity::{EntityId, PoolId, State},
    queue::Dispatch,
};

/// Slices between two comparisons of a pCPU's load.
const BALANCE_SLICES: u64 = 4;

impl Scheduler {
    /// A pCPU of a pool that idles although somebody waits in the pool whom it may run: several wake-ups in a row may have
    /// named the same pCPU, and it has taken but one.
    pub(super) fn idle_for_waiting(&self, pool: PoolId) -> Option<usize> {
        let cpus = self.pools[usize::from(pool.0)].cpus;
        let idle = || CpuSet::from_bits(self.idle.load(Ordering::SeqCst)).and(cpus);
        if idle().is_empty() {
            return None;
        }
        let crowded = |pcpu: &usize| self.pcpus[*pcpu].movable.load(Ordering::SeqCst) > 0;
        cpus.iter()
            .filter(crowded)
            .find_map(|pcpu| self.lock(pcpu)?.queue.place_among(idle()))
    }

    /// Takes one over from a busy pCPU of the pool, and runs it.
    pub(super) fn steal(&self, pcpu: usize, now: u64) -> Option<Dispatch> {
        let mut victims = self.pools[usize::from(self.pcpus[pcpu].pool.0)]
            .cpus
            .without(CpuSet::of(pcpu));
        loop {
            let crowded = |victim: &usize| {
                let victim = &self.pcpus[*victim];
                let movable = victim.movable.load(Ordering::SeqCst);
                (movable > 0, victim.load.load(Ordering::Relaxed))
            };
            let victim = victims.iter().max_by_key(crowded)?;
            if !crowded(&victim).0 {
                return None;
            }
            victims = victims.without(CpuSet::of(victim));
            let stolen = self.lock(victim).and_then(|mut locked| {
                let id = locked.queue.stealable(pcpu)?;
                self.take_out(&mut locked, id, now)
            });
            let Some(entity) = stolen else { continue };
            let mut locked = self.lock(pcpu)?;
            self.put_in(pcpu, &mut locked, entity, now);
            locked.queue.note_steal();
            let run = locked.queue.pick(now);
            let bit = CpuSet::of(pcpu).bits();
            self.idle.fetch_and(!bit, Ordering::SeqCst);
            return run;
        }
    }

    /// Takes one over from another pCPU of the pool, if that makes the two a better place: see [`crate::crowd`].
    pub(super) fn balance(&self, pcpu: usize, now: u64) {
        let this = &self.pcpus[pcpu];
        let Some(own) = self.lock(pcpu) else { return };
        let ahead = BALANCE_SLICES * own.queue.slice();
        let (crowd, reserved) = (own.queue.crowd(), self.reserved(pcpu));
        drop(own);
        let unrest = crowd.unrest(reserved, ahead, now);
        this.balance_at
            .store(now.saturating_add(ahead), Ordering::Relaxed);
        let mut best: Option<(u128, usize, EntityId)> = None;
        for other in self.pools[usize::from(this.pool.0)].cpus.iter() {
            if other == pcpu || self.pcpus[other].movable.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let Some(mut locked) = self.lock(other) else {
                continue;
            };
            locked.queue.settle_running(now);
            let (theirs, reserved_there) = (locked.queue.crowd(), self.reserved(other));
            let before = unrest + theirs.unrest(reserved_there, ahead, now);
            for (id, share, had) in locked.queue.candidates(pcpu) {
                let (mut here, mut there) = (crowd, theirs);
                here.join(share, had, now);
                there.leave(share, had, now);
                if there.share() == 0 {
                    // It has a pCPU for itself; that would have nothing to do.
                    continue;
                }
                let after =
                    here.unrest(reserved, ahead, now) + there.unrest(reserved_there, ahead, now);
                let gain = before.saturating_sub(after);
                if gain > best.map_or(0, |(gain, _, _)| gain) {
                    best = Some((gain, other, id));
                }
            }
        }
        let Some((_, other, id)) = best else { return };
        let Some(mut locked) = self.lock(other) else {
            return;
        };
        if locked.queue.promise(id, pcpu) {
            // It comes when it stops there.
            return;
        }
        // It may have gone since.
        if locked.queue.get(id).map(|entity| entity.state) != Some(State::Waiting) {
            return;
        }
        let Some(entity) = self.take_out(&mut locked, id, now) else {
            return;
        };
        drop(locked);
        if let Some(mut locked) = self.lock(pcpu) {
            self.put_in(pcpu, &mut locked, entity, now);
        }
    }
}
