//! First come, first served: who runs goes on until it blocks.
//!
//! A guest that never blocks keeps its pCPU: this policy does not promise that nobody starves. The slice is only
//! how often the pCPU looks; its end changes nothing, since the order is that of becoming ready.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::Entity;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct Fcfs {
    waiting: Ordered,
}

impl Fcfs {
    pub(crate) fn new(capacity: usize) -> Self {
        Fcfs {
            waiting: Ordered::new(capacity),
        }
    }
}

impl Policy for Fcfs {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Fcfs
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, now: u64) {
        entity.rank = match why {
            Ready::SliceOver | Ready::Preempted | Ready::Arrived => entity.ready_at,
            Ready::Woken | Ready::Replenished | Ready::Yielded => now,
        };
        entity.ready_at = entity.rank;
        if why == Ready::Woken {
            self.waiting.push(entity.id, entity.rank);
        } else {
            // Among those that came in the same tick, it goes on.
            self.waiting.push_first(entity.id, entity.rank);
        }
    }

    fn divides_time(&self) -> bool {
        false
    }

    fn gives_way(&self, _running: &Entity, _waiting: &Entity) -> Option<u64> {
        None
    }
}
