//! Admission control: what of each pCPU is reserved, and where there is room for more.
//!
//! An entity with a reservation has a *seat*: the pCPU that keeps time for it, the only one that it is allowed on. One that is given a seat
//! elsewhere while it runs goes there when it stops. Each pCPU keeps up to [`RESERVABLE`] of its time; [`Pcpu::reserved`] is what it keeps.
//!
//! Invariant: seats and sums change only under the lock `admission`, which is taken before any other of this crate. Seats for several entities
//! are found as a whole before anything is changed: all of them fit, or nothing happens.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use super::{Pcpu, Scheduler};
use crate::{
    cpus::{CpuSet, MAX_PCPUS},
    entity::{Entity, EntityId, Params, Refusal},
};

/// The part of a pCPU that can be reserved, in millionths: the rest is for those who reserved nothing.
pub const RESERVABLE: u64 = 950_000;

/// What is kept for an entity, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    pcpu: usize,
    /// In millionths of the pCPU.
    parts: u64,
}

impl Seat {
    /// That of an entity which has reserved.
    pub(super) fn of(entity: &Entity) -> Option<Self> {
        Some(Seat {
            parts: entity.params.reservation?.utilization(),
            pcpu: entity.allowed.lowest()?,
        })
    }
}

/// What is reserved of each pCPU, to be changed as a whole. In millionths.
pub(super) struct Ledger([u64; MAX_PCPUS]);

impl Ledger {
    /// As it is now.
    pub(super) fn of(pcpus: &[Pcpu]) -> Self {
        let mut ledger = Ledger([0; MAX_PCPUS]);
        for (parts, pcpu) in ledger.0.iter_mut().zip(pcpus) {
            *parts = pcpu.reserved.load(Ordering::Relaxed);
        }
        ledger
    }

    /// A seat is given back.
    pub(super) fn release(&mut self, seat: Option<Seat>) {
        if let Some(seat) = seat {
            self.0[seat.pcpu] = self.0[seat.pcpu].saturating_sub(seat.parts);
        }
    }

    /// Puts it into force.
    pub(super) fn commit(&self, pcpus: &[Pcpu]) {
        for (parts, pcpu) in self.0.iter().zip(pcpus) {
            pcpu.reserved.store(*parts, Ordering::Relaxed);
        }
    }
}

impl Scheduler {
    /// Where one with these parameters may be, whose home is `home`: anywhere that is allowed, or its seat, which the ledger then has.
    /// The least reserved pCPU is taken, so that several of one VM have different ones.
    ///
    /// # Errors
    /// Nowhere is room for its reservation.
    pub(super) fn seat(
        &self,
        ledger: &mut Ledger,
        params: &Params,
        allowed: CpuSet,
        home: Option<usize>,
    ) -> Result<CpuSet, Refusal> {
        let Some(reservation) = params.reservation else {
            return Ok(allowed);
        };
        let wanted = reservation.utilization();
        let best = self.online(allowed).iter().min_by_key(|&pcpu| {
            let queue = self.pcpus[pcpu].queue.lock();
            let moves = home.is_some_and(|home| home != pcpu);
            let crowd = (queue.crowd().share(), queue.population());
            (ledger.0[pcpu], moves, crowd, pcpu)
        });
        let left = best.map_or(0, |pcpu| RESERVABLE.saturating_sub(ledger.0[pcpu]));
        match best.filter(|_| wanted <= left) {
            Some(pcpu) => {
                ledger.0[pcpu] += wanted;
                Ok(CpuSet::of(pcpu))
            }
            None => Err(Refusal::Overcommitted { wanted, left }),
        }
    }

    /// The part of a pCPU that is kept for reservations, in millionths; at most [`RESERVABLE`].
    pub fn reserved(&self, pcpu: usize) -> u64 {
        let pcpu = self.pcpus.get(pcpu);
        pcpu.map_or(0, |pcpu| pcpu.reserved.load(Ordering::Relaxed))
    }

    /// Gives entities, those of one VM, other parameters: all of them, or none. Those of one that runs hold from its next run on. Returns
    /// the pCPUs to interrupt.
    ///
    /// # Errors
    /// As [`Scheduler::add`]; nothing has changed then.
    pub fn set_params(
        &self,
        ids: &[EntityId],
        params: Params,
        now: u64,
    ) -> Result<CpuSet, Refusal> {
        let _admission = self.admission.lock();
        let allowed = self.check(&params)?;
        if self.online(allowed).is_empty() {
            return Err(self.no_pcpu(&params));
        }
        let mut ledger = Ledger::of(&self.pcpus);
        let mut homes = Vec::with_capacity(ids.len());
        for &id in ids {
            let (pcpu, locked) = self.home(id).ok_or(Refusal::Unknown)?;
            ledger.release(locked.queue.get(id).and_then(Seat::of));
            homes.push(pcpu);
        }
        let mut places = Vec::with_capacity(ids.len());
        for home in homes {
            places.push(self.seat(&mut ledger, &params, allowed, Some(home))?);
        }
        ledger.commit(&self.pcpus);
        let mut kicks = CpuSet::EMPTY;
        for (&id, place) in ids.iter().zip(places) {
            kicks = kicks.or(self.change(id, params, place, now));
        }
        Ok(kicks)
    }
}
