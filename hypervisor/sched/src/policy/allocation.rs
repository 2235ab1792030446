//! By allocation: CPU time in proportion to what was allocated to the VM of the host's processors and memory.
//!
//! An entity's allocation is the greater of both parts (`Demand`). Each pays for what it runs, divided by its
//! allocation; the one that has paid least is next. Who sleeps comes back no more than a slice behind.

use super::{Moment, Ordered, Policy, PolicyKind, Ready};
use crate::entity::{Entity, MILLION};

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct ByAllocation {
    waiting: Ordered,
    slice: u64,
    /// What the one that ran last had paid when it was taken.
    paid: Moment,
}

impl ByAllocation {
    pub(crate) fn new(slice: u64, capacity: usize) -> Self {
        ByAllocation {
            waiting: Ordered::new(capacity),
            slice,
            paid: Moment::ZERO,
        }
    }
}

/// The greater part of what its VM was given, in millionths of the host's.
fn allocation(entity: &Entity) -> u64 {
    let demand = entity.params.demand;
    u64::from(demand.processors.max(demand.memory)).clamp(1000, MILLION)
}

/// What it costs an entity to run for so long.
fn price(entity: &Entity, ticks: u64) -> i64 {
    (ticks.saturating_mul(1000) / (allocation(entity) / 1000)) as i64
}

impl Policy for ByAllocation {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Allocation
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, _now: u64) {
        // Who comes from elsewhere has paid nothing here.
        let paid = entity.paid.unwrap_or(self.paid);
        let paid = match why {
            Ready::Woken | Ready::Replenished => paid.max(self.paid + -price(entity, self.slice)),
            Ready::Arrived => self.paid,
            Ready::Yielded => paid.max(self.paid) + price(entity, self.slice),
            Ready::SliceOver | Ready::Preempted => paid,
        };
        entity.paid = Some(paid);
        entity.rank = paid.rank();
        self.waiting.push(entity.id, entity.rank);
    }

    fn take(&mut self, _now: u64) -> Option<crate::EntityId> {
        let (paid, _) = self.waiting.peek()?;
        self.paid = self.paid.max(paid);
        self.waiting.pop()
    }

    fn charge(&mut self, entity: &mut Entity, ran: u64) {
        entity.paid = entity.paid.map(|paid| paid + price(entity, ran));
    }

    fn join(&mut self, entity: &mut Entity) {
        entity.paid = entity.paid.or(Some(self.paid));
    }

    fn forget(&mut self, entity: &mut Entity) {
        entity.paid = None;
    }

    fn share(&self, entity: &Entity) -> u64 {
        allocation(entity) / 1000
    }

    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64> {
        let behind = waiting.paid? + price(waiting, self.slice);
        (behind < running.paid?).then_some(self.slice / 8)
    }
}
