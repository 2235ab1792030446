//! Real-time reservations: earliest deadline first among those that reserved; the rest shares what is left, fairly.
//!
//! A reserved entity's budget and deadline are the queue's business (`Bandwidth`, a constant bandwidth server); the scheduler admits no more
//! than a pCPU can give. So each gets its budget within each of its periods, whatever the others do. Reserved entities
//! stay on the pCPU that admitted them. While an entity has a reservation it has no place in the virtual time of the rest: what that
//! lost or gained meanwhile is neither owed to it nor by it.

use super::{Ordered, Policy, PolicyKind, Ready, fair::Fair};
use crate::entity::{Entity, EntityId};

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct EarliestDeadline {
    /// By deadline.
    reserved: Ordered,
    rest: Fair,
}

impl EarliestDeadline {
    pub(crate) fn new(slice: u64, capacity: usize) -> Self {
        EarliestDeadline {
            reserved: Ordered::new(capacity),
            rest: Fair::new(slice, capacity),
        }
    }
}

/// Its deadline, if it has reserved.
fn deadline(entity: &Entity) -> Option<u64> {
    entity.params.reservation?;
    entity.bandwidth.map(|bandwidth| bandwidth.deadline())
}

impl Policy for EarliestDeadline {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Reservation
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.reserved
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, now: u64) {
        match deadline(entity) {
            Some(deadline) => {
                self.rest.forget(entity);
                entity.rank = deadline;
                self.reserved.push(entity.id, deadline);
            }
            None => self.rest.enqueue(entity, why, now),
        }
    }

    fn take(&mut self, now: u64) -> Option<EntityId> {
        self.reserved.pop().or_else(|| self.rest.take(now))
    }

    fn put_back(&mut self, entity: &mut Entity) {
        match deadline(entity) {
            Some(_) => self.reserved.push_first(entity.id, entity.rank),
            None => self.rest.put_back(entity),
        }
    }

    fn take_this(&mut self, id: EntityId) -> bool {
        self.reserved.remove(id) || self.rest.take_this(id)
    }

    fn remove(&mut self, entity: &mut Entity) {
        match deadline(entity) {
            Some(_) => {
                self.reserved.remove(entity.id);
            }
            None => self.rest.remove(entity),
        }
    }

    fn charge(&mut self, entity: &mut Entity, ran: u64) {
        if deadline(entity).is_none() {
            self.rest.charge(entity, ran);
        }
    }

    fn join(&mut self, entity: &mut Entity) {
        match deadline(entity) {
            Some(_) => self.rest.forget(entity),
            None => self.rest.join(entity),
        }
    }

    fn leave(&mut self, entity: &mut Entity) {
        if deadline(entity).is_none() {
            self.rest.leave(entity);
        }
    }

    fn forget(&mut self, entity: &mut Entity) {
        self.rest.forget(entity);
    }

    fn share(&self, entity: &Entity) -> u64 {
        match deadline(entity) {
            Some(_) => 0,
            None => self.rest.share(entity),
        }
    }

    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64> {
        match (deadline(waiting), deadline(running)) {
            (Some(waiting), Some(running)) => (waiting < running).then_some(0),
            (Some(_), None) => Some(0),
            (None, Some(_)) => None,
            (None, None) => self.rest.gives_way(running, waiting),
        }
    }
}
