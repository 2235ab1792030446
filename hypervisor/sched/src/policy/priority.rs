//! Preemptive priority with ageing: the most urgent first, and who waits for long becomes more urgent.
//!
//! A level of priority is worth [`SLICES_PER_LEVEL`] slices of waiting. Since all who wait age alike, their order
//! does not change while they wait, and a key that is fixed at arrival expresses it: the tick of arrival,
//! later by so much for each level below the highest. So nobody starves: the least urgent waits
//! for (31 x 10) slices at most before it comes before a most urgent one that arrives then.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::{Entity, PRIORITIES};

/// Slices of waiting that make up for one level.
pub const SLICES_PER_LEVEL: u64 = 10;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct Priority {
    waiting: Ordered,
    slice: u64,
}

impl Priority {
    pub(crate) fn new(slice: u64, capacity: usize) -> Self {
        Priority {
            waiting: Ordered::new(capacity),
            slice,
        }
    }

    /// Its place: when it began to wait, later by so much for each level below the highest.
    fn rank(&self, entity: &Entity) -> u64 {
        let below = u64::from(PRIORITIES.end().saturating_sub(entity.params.priority));
        let delay = below * SLICES_PER_LEVEL * self.slice;
        entity.waits_since.saturating_add(delay)
    }
}

impl Policy for Priority {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Priority
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, _now: u64) {
        // Who was interrupted has not had its turn: it keeps its place.
        if why != Ready::Preempted {
            entity.rank = self.rank(entity);
        }
        self.waiting.push(entity.id, entity.rank);
    }

    fn join(&mut self, entity: &mut Entity) {
        // Its place was another policy's, or that of another level.
        entity.rank = self.rank(entity);
    }

    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64> {
        let urgent = waiting.params.priority > running.params.priority;
        (urgent && waiting.rank < running.rank).then_some(0)
    }
}
