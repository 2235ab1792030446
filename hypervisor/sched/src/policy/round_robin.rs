//! Round robin: everybody in turn, a slice each.
//!
//! Who was interrupted within its slice stays first and has the rest of it. Nobody gives way.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::Entity;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct RoundRobin {
    waiting: Ordered,
    /// Grows with each one that comes to the end.
    turns: u64,
}

impl RoundRobin {
    pub(crate) fn new(capacity: usize) -> Self {
        RoundRobin {
            waiting: Ordered::new(capacity),
            turns: 0,
        }
    }
}

impl Policy for RoundRobin {
    fn kind(&self) -> PolicyKind {
        PolicyKind::RoundRobin
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, _now: u64) {
        // Who was interrupted has not had its turn: it keeps its place, which is the first one if it was its turn.
        if why != Ready::Preempted {
            self.turns += 1;
            entity.rank = self.turns;
        }
        self.waiting.push(entity.id, entity.rank);
    }

    fn join(&mut self, entity: &mut Entity) {
        // Its place was another policy's.
        entity.rank = 0;
    }

    fn gives_way(&self, _running: &Entity, _waiting: &Entity) -> Option<u64> {
        None
    }
}
