//! Shortest job first: the one whose burst is expected to be the shortest.
//!
//! A burst is the CPU time between becoming ready and blocking. The next one is expected to be the mean of the last one and
//! of what was expected of that (exponential average, one half). A burst that is longer already is expected to be
//! as long as it is, so that one that spins falls behind. Nobody gives way within its slice. Long jobs may starve while short ones keep coming.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::Entity;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct Sjf {
    waiting: Ordered,
}

impl Sjf {
    pub(crate) fn new(capacity: usize) -> Self {
        Sjf {
            waiting: Ordered::new(capacity),
        }
    }
}

impl Policy for Sjf {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Sjf
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, _why: Ready, _now: u64) {
        entity.rank = entity.expected_burst.max(entity.burst);
        self.waiting.push(entity.id, entity.rank);
    }

    fn gives_way(&self, _running: &Entity, _waiting: &Entity) -> Option<u64> {
        None
    }
}
