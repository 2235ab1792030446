//! Round robin: everybody in turn, a slice each.
//!
//! Who was interrupted within its slice stays first and has the rest of it. Nobody gives way.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::Entity;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct RoundRobin {
    waiting: Ordered,
    /// Grows with each one that comes to the end, so that those interrupted stand before all.
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
        entity.rank = match why {
            Ready::Preempted => 0,
            _ => {
                self.turns += 1;
                self.turns
            }
        };
        self.waiting.push(entity.id, entity.rank);
    }

    fn gives_way(&self, _running: &Entity, _waiting: &Entity) -> Option<u64> {
        None
    }
}
