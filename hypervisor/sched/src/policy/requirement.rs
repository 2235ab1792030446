//! By requirement: CPU, memory and I/O demand in one dominant-share order.
//!
//! A VM's dominant share is the greatest of: its part of recent CPU time, of the host's memory, and of the I/O that is asked
//! for (after "dominant resource fairness", Ghodsi et al. 2011). The entity with the lowest one is next, so that
//! who holds or takes much of anything comes after who needs little of everything. The weight divides the
//! share. So that nobody starves, a share counts as a delay: all of the host is worth [`SLICES`] slices of waiting.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::{Entity, MILLION};

/// Slices that the largest dominant share waits behind one that asks for nothing.
pub const SLICES: u64 = 32;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct ByRequirement {
    waiting: Ordered,
    slice: u64,
}

impl ByRequirement {
    pub(crate) fn new(slice: u64, capacity: usize) -> Self {
        ByRequirement {
            waiting: Ordered::new(capacity),
            slice,
        }
    }
}

/// The greatest part of anything that it has, by its weight, in millionths.
fn dominant_share(entity: &Entity, now: u64) -> u64 {
    let demand = entity.params.demand;
    let held = u64::from(demand.memory.max(demand.io));
    let share = held.max(entity.recent.share(now)).min(MILLION);
    (share * 100 / u64::from(entity.params.weight)).min(MILLION)
}

impl Policy for ByRequirement {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Requirement
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, now: u64) {
        if why != Ready::Preempted {
            let delay = dominant_share(entity, now) * SLICES * self.slice / MILLION;
            entity.rank = entity.waits_since.saturating_add(delay);
        }
        self.waiting.push(entity.id, entity.rank);
    }

    fn share(&self, entity: &Entity) -> u64 {
        u64::from(entity.params.weight)
    }

    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64> {
        (waiting.rank < running.rank).then_some(self.slice / 8)
    }
}
