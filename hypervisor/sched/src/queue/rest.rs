//! A queue but for its entities: what happens to one of them is done here, with the entity borrowed beside it.
//!
//! This is the way of every wake-up, dispatch and block, so each looks its entity up once, and what only pCPUs that
//! share their pool need is left out where there is no other.

use alloc::{boxed::Box, collections::BTreeSet};
use core::mem;

use super::{Dispatch, Stop, Woken};
use crate::{
    cpus::CpuSet,
    crowd::Crowd,
    entity::{Entity, EntityId, Recent, State},
    heap::KeyedHeap,
    metrics::PcpuMetrics,
    policy::{Policy, PolicyKind, Ready},
};

/// All but the entities.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) pcpu: usize,
    pub(super) policy: Box<dyn Policy>,
    /// Of those blocked and throttled, by tick.
    pub(super) timers: KeyedHeap<u64>,
    /// Those that wait and may run elsewhere: where, how urgent, which.
    pub(super) movable: BTreeSet<(CpuSet, u64, EntityId)>,
    pub(super) running: Option<EntityId>,
    picked_at: u64,
    /// Tick at which the running one has to stop.
    pub(super) run_until: u64,
    pub(super) last: Option<EntityId>,
    /// One of those that wait, to which the one before has yielded.
    pub(super) favoured: Option<EntityId>,
    /// Tick until which one may run out of its turn; `u64::MAX` where the policy has chosen who runs.
    pub(super) lent_until: u64,
    /// The pCPU that the running one is to go to when it stops here and could go on.
    pub(super) promised_to: Option<usize>,
    pub(super) waiting: u32,
    /// Those attached; not counted where nobody can come from or go to another pCPU.
    crowd: Option<Crowd>,
    pub(super) slice: u64,
    pub(super) metrics: PcpuMetrics,
}

impl Rest {
    /// For pCPU `pcpu`, alone in its pool or not.
    pub(super) fn new(
        pcpu: usize,
        kind: PolicyKind,
        slice: u64,
        capacity: usize,
        neighbours: Neighbours,
    ) -> Self {
        Rest {
            pcpu,
            policy: kind.make(slice, capacity),
            timers: KeyedHeap::new(capacity),
            movable: BTreeSet::new(),
            running: None,
            picked_at: 0,
            run_until: u64::MAX,
            last: None,
            favoured: None,
            lent_until: u64::MAX,
            promised_to: None,
            waiting: 0,
            crowd: match neighbours {
                Neighbours::Some => Some(Crowd::default()),
                Neighbours::None => None,
            },
            slice,
            metrics: PcpuMetrics::default(),
        }
    }

    /// Those who run or wait; nobody, where they are not counted.
    pub(super) fn crowd(&self) -> Crowd {
        self.crowd.unwrap_or_default()
    }

    /// One is attached: for the sums.
    #[inline(always)]
    pub(super) fn join_crowd(&mut self, entity: &Entity, now: u64) {
        if let Some(crowd) = &mut self.crowd {
            let (share, had) = in_crowd(&*self.policy, entity);
            crowd.join(share, had, now);
        }
    }

    /// One is no longer attached: for the sums.
    #[inline(always)]
    pub(super) fn leave_crowd(&mut self, entity: &Entity, now: u64) {
        if let Some(crowd) = &mut self.crowd {
            let (share, had) = in_crowd(&*self.policy, entity);
            crowd.leave(share, had, now);
        }
    }

    /// Takes one that waits out of those that wait; it keeps its state. `false`: it does not wait.
    pub(super) fn unqueue(&mut self, entity: &mut Entity, now: u64) -> bool {
        if entity.state != State::Waiting {
            return false;
        }
        entity.settle(now);
        self.movable
            .remove(&(entity.allowed, entity.rank, entity.id));
        if self.favoured == Some(entity.id) {
            self.favoured = None;
        }
        self.policy.remove(entity);
        self.waiting -= 1;
        self.leave_crowd(entity, now);
        true
    }

    /// One begins to wait: attaches it, unless it was.
    #[inline(always)]
    pub(super) fn enqueue(&mut self, entity: &mut Entity, why: Ready, now: u64) {
        entity.state = State::Waiting;
        if !matches!(why, Ready::Preempted | Ready::Arrived) {
            entity.waits_since = now;
        }
        self.policy.enqueue(entity, why, now);
        self.waiting += 1;
        if self.crowd.is_none() {
            return;
        }
        if entity.allowed.len() > 1 {
            self.movable
                .insert((entity.allowed, entity.rank, entity.id));
        }
        if !matches!(why, Ready::SliceOver | Ready::Preempted | Ready::Yielded) {
            self.join_crowd(entity, now);
        }
    }

    /// One that is not attached may run: it waits, for the pCPU or for what hinders it.
    #[inline(always)]
    pub(super) fn make_ready(&mut self, entity: &mut Entity, why: Ready, now: u64) -> Woken {
        entity.settle(now);
        if entity.paused {
            entity.state = State::Held;
            return Woken::Nothing;
        }
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.refill(now, why == Ready::Woken);
        }
        if let Some(at) = entity.throttled_until() {
            entity.state = State::Throttled { until: at };
            self.set_timer(entity.id, at);
            return Woken::Throttled;
        }
        self.enqueue(entity, why, now);
        Woken::Waiting
    }

    /// One that does not run is to be looked at at this tick: the running one stops for that.
    pub(super) fn set_timer(&mut self, id: EntityId, at: u64) {
        self.timers.push(id, at);
        if self.running.is_some() {
            self.run_until = self.run_until.min(at);
        }
    }

    /// One that was blocked becomes ready. It has no timer any more.
    #[inline(always)]
    pub(super) fn unblock(&mut self, entity: &mut Entity, now: u64) -> Woken {
        entity.metrics.wakes += 1;
        entity.woken_at = Some(now);
        entity.ready_at = now;
        entity.burst = 0;
        self.make_ready(entity, Ready::Woken, now)
    }

    /// Has the running one pay for what it ran.
    #[inline(always)]
    pub(super) fn charge(&mut self, entity: &mut Entity, now: u64) {
        let ran = now.saturating_sub(entity.since);
        if ran == 0 {
            return;
        }
        entity.since = now;
        entity.metrics.run += ran;
        entity.burst += ran;
        entity.slice_left = entity.slice_left.saturating_sub(ran);
        entity.recent.add(ran, now);
        if let Some(crowd) = &mut self.crowd
            && self.policy.divides_time()
        {
            crowd.charge(self.policy.share(entity), ran, now);
        }
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.charge(ran);
        }
        self.metrics.busy += ran;
        self.policy.charge(entity, ran);
    }

    /// One has begun to wait: perhaps the running one, which is charged up to now, should give way to it.
    pub(super) fn consider(&mut self, running: &Entity, waiting: &Entity, now: u64) {
        if let Some(least) = self.policy.gives_way(running, waiting) {
            let at = now.max(self.picked_at.saturating_add(least));
            self.run_until = self.run_until.min(at);
        }
    }

    /// Runs one that was taken out of those that wait.
    #[inline(always)]
    pub(super) fn dispatch(&mut self, entity: &mut Entity, now: u64) -> Dispatch {
        let id = entity.id;
        entity.metrics.wait += entity.lapse(now);
        if !self.movable.is_empty() {
            self.movable.remove(&(entity.allowed, entity.rank, id));
        }
        self.waiting -= 1;
        entity.state = State::Running { pcpu: self.pcpu };
        entity.woken = false;
        entity.metrics.dispatches += 1;
        let mut timer = None;
        if let Some(at) = entity.woken_at.take() {
            let latency = now.saturating_sub(at);
            entity.metrics.respond(latency);
            if mem::take(&mut entity.by_timer) {
                timer = Some(latency);
            }
        }
        if entity.slice_left == 0 {
            entity.slice_left = self.slice;
        }
        let mut ticks = entity.slice_left;
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.refill(now, false);
            ticks = ticks.min(bandwidth.left().max(1));
        }
        let slice_end = now.saturating_add(ticks);
        let until = match self.timers.peek() {
            Some((at, _)) => at.min(slice_end),
            None => slice_end,
        };
        if self.last != Some(id) {
            self.last = Some(id);
            self.metrics.switches += 1;
            entity.metrics.switches += 1;
        }
        self.running = Some(id);
        self.picked_at = now;
        self.run_until = until;
        let stolen = entity.metrics.steal();
        Dispatch {
            id,
            until,
            stolen,
            timer,
        }
    }

    /// The running one has asked devices for so many bytes.
    pub(super) fn note_io(&mut self, entity: &mut Entity, bytes: u64, now: u64) {
        entity.metrics.io = entity.metrics.io.saturating_add(bytes);
        // So that no sum of a half-life overflows.
        let bytes = bytes.min(u64::from(u32::MAX));
        entity.io.add(bytes, now);
        self.policy.note_io(bytes, now);
    }

    /// The running one leaves the pCPU.
    #[inline(always)]
    pub(super) fn stop(&mut self, entity: &mut Entity, why: Stop, now: u64) {
        self.charge(entity, now);
        self.running = None;
        self.run_until = u64::MAX;
        let ready = match why {
            Stop::Blocked { until } if !entity.woken => {
                entity.metrics.bursts += 1;
                entity.expected_burst = entity.expected_burst.midpoint(entity.burst);
                entity.slice_left = 0;
                self.detach(entity, State::Blocked { until }, now);
                if let Some(at) = until {
                    self.timers.push(entity.id, at);
                }
                return;
            }
            Stop::Retired => return self.detach(entity, State::Retired, now),
            Stop::Interrupted if entity.slice_left == 0 => Ready::SliceOver,
            Stop::Interrupted | Stop::Blocked { .. } => Ready::Preempted,
            Stop::Yielded => Ready::Yielded,
        };
        match ready {
            Ready::Yielded => {
                entity.metrics.yields += 1;
                entity.slice_left = 0;
            }
            _ => entity.metrics.preemptions += 1,
        }
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.refill(now, false);
        }
        if entity.paused {
            self.detach(entity, State::Held, now);
        } else if let Some(at) = entity.throttled_until() {
            self.detach(entity, State::Throttled { until: at }, now);
            self.timers.push(entity.id, at);
        } else {
            self.enqueue(entity, ready, now);
        }
    }

    /// The one that ran changes to a state in which it is not attached.
    #[inline(always)]
    fn detach(&mut self, entity: &mut Entity, state: State, now: u64) {
        entity.state = state;
        self.policy.leave(entity);
        self.leave_crowd(entity, now);
    }
}

/// Whether a pCPU has others in its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Neighbours {
    /// It is alone.
    None,
    /// Entities may come from them, or go to them.
    Some,
}

/// What an entity is due beside the others of its pool, and has had of late.
#[inline(never)]
fn in_crowd(policy: &dyn Policy, entity: &Entity) -> (u64, Recent) {
    (policy.share(entity), had(policy, entity))
}

/// What an entity has had of late, as far as that matters to the policy.
pub(super) fn had(policy: &dyn Policy, entity: &Entity) -> Recent {
    if policy.divides_time() {
        entity.recent
    } else {
        Recent::default()
    }
}
