//! Fair shares by weight: eligible when it has had no more than its due, then the earliest virtual deadline.
//!
//! After "earliest eligible virtual deadline first" (Stoica and Abdel-Wahab, 1995). Each entity has a *virtual time*:
//! what it has run, divided by its weight. The mean of these over the attached entities, by weight, is the queue's virtual
//! time, what each would have in an ideal division. Who is not ahead of it is *eligible*; of these the one with the earliest
//! *virtual deadline* runs, which is its virtual time at the begin of a request plus a slice divided by its weight. So over any time nobody
//! is further from its share than about a slice, and who wants little, or has a great weight, waits little.
//!
//! A request is a slice long, after a wake-up as long as the entity's last bursts were: so short work comes before long work, and none
//! gets more than its share by that. Who sleeps neither collects a claim nor loses a debt: it comes back with its own virtual time, but no more than half a slice behind
//! the queue's. Once eligible, an entity stays so until it runs; so both orders are plain heaps.
//!
//! Units: virtual time is in ticks of an entity of weight 100.

use super::{Moment, Ordered, Policy, PolicyKind, Ready};
use crate::{
    entity::{Entity, EntityId},
    heap::KeyedHeap,
};

/// The weight for which virtual time is time.
const UNIT_WEIGHT: u64 = 100;
/// Fraction bits of a rate.
const RATE_BITS: u32 = 20;
/// Part of a slice that one may run before it gives way.
const LEAST_RUN: u64 = 8;

/// How fast virtual time passes for this weight, in units of 2^-20.
pub(crate) fn rate(weight: u32) -> u64 {
    (UNIT_WEIGHT << RATE_BITS) / u64::from(weight.max(1))
}

/// What the policy keeps in an entity.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Virtual {
    /// Virtual time; unless `placed`, relative to the queue's.
    time: Moment,
    /// Virtual deadline of its request.
    deadline: Moment,
    rate: u64,
    /// `time` is in a queue's virtual time.
    placed: bool,
}

impl Virtual {
    /// Sets how fast its virtual time passes. What it owes or is owed while it has no place in a queue remains the same time.
    pub(crate) fn set_rate(&mut self, rate: u64) {
        if !self.placed && self.rate > 0 {
            let before = i128::from(self.time.since(Moment::ZERO));
            let after = before * i128::from(rate) / i128::from(self.rate);
            self.time = Moment::ZERO + after as i64;
        }
        self.rate = rate;
    }

    /// Time in virtual time.
    fn of(&self, ticks: u64) -> i64 {
        ((u128::from(ticks) * u128::from(self.rate)) >> RATE_BITS) as i64
    }
}

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct Fair {
    /// By virtual deadline.
    eligible: Ordered,
    /// Those ahead of the queue's virtual time when they came, by virtual time.
    ahead: KeyedHeap<(Moment, EntityId)>,
    /// Deadlines of those in `ahead` are in the entities; their key when they become eligible, by entity.
    deadlines: alloc::vec::Vec<Moment>,
    slice: u64,
    /// Virtual time from which `lag` counts.
    base: Moment,
    /// Sum of weights of the attached.
    weight: i64,
    /// Sum over the attached of weight times virtual time since `base`.
    lag: i64,
}

impl Fair {
    pub(crate) fn new(slice: u64, capacity: usize) -> Self {
        Fair {
            eligible: Ordered::new(capacity),
            ahead: KeyedHeap::new(capacity),
            deadlines: alloc::vec![Moment::ZERO; capacity],
            slice,
            base: Moment::ZERO,
            weight: 0,
            lag: 0,
        }
    }

    /// The queue's virtual time; becomes the base, so that sums stay small.
    fn now(&mut self) -> Moment {
        if self.weight > 0 {
            let ahead = self.lag / self.weight;
            self.base = self.base + ahead;
            self.lag -= ahead * self.weight;
        }
        self.base
    }

    fn attach(&mut self, entity: &Entity) {
        let weight = i64::from(entity.params.weight);
        self.weight += weight;
        self.lag += weight * entity.virt.time.since(self.base);
    }

    fn detach(&mut self, entity: &Entity) {
        let weight = i64::from(entity.params.weight);
        self.weight -= weight;
        if self.weight == 0 {
            // The last one's time is the queue's.
            self.base = entity.virt.time;
            self.lag = 0;
        } else {
            self.lag -= weight * entity.virt.time.since(self.base);
        }
    }

    /// Gives an entity that comes from elsewhere its place in this queue's virtual time.
    fn place(&mut self, entity: &mut Entity) {
        if !entity.virt.placed {
            entity.virt.placed = true;
            entity.virt.time = self.now() + entity.virt.time.since(Moment::ZERO);
            entity.virt.deadline = entity.virt.time + entity.virt.of(self.slice);
        }
    }
}

impl Policy for Fair {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Fair
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.eligible
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, _now: u64) {
        self.place(entity);
        let now = self.now();
        let slice = entity.virt.of(self.slice);
        match why {
            Ready::Woken | Ready::Replenished | Ready::Arrived => {
                let credit = slice / 2;
                entity.virt.time = entity.virt.time.max(now + -credit);
                // It asks for as much as it has needed of late.
                let request = match why {
                    Ready::Woken => entity.virt.of(entity.expected_burst),
                    _ => slice,
                };
                entity.virt.deadline = entity.virt.time + request.clamp(slice / 8, slice);
                self.attach(entity);
            }
            Ready::Yielded => {
                // It gives up what it had to come, and begins another request.
                let time = entity.virt.time.max(now);
                self.lag += i64::from(entity.params.weight) * time.since(entity.virt.time);
                entity.virt.time = time;
                entity.virt.deadline = time + slice;
            }
            Ready::SliceOver | Ready::Preempted => {}
        }
        entity.rank = entity.virt.deadline.rank();
        if entity.virt.time <= now {
            self.eligible.push(entity.id, entity.rank);
        } else {
            let index = entity.id.index();
            if self.deadlines.len() <= index {
                self.deadlines.resize(index + 1, Moment::ZERO);
            }
            self.deadlines[index] = entity.virt.deadline;
            self.ahead.push(entity.id, (entity.virt.time, entity.id));
        }
    }

    fn take(&mut self, _now: u64) -> Option<EntityId> {
        if self.eligible.is_empty()
            && let Some(only) = self.ahead.pop_only()
        {
            return Some(only);
        }
        if self.ahead.peek().is_some() {
            let now = self.now();
            while let Some(((time, _), id)) = self.ahead.peek()
                && time <= now
            {
                self.ahead.pop();
                self.eligible.push(id, self.deadlines[id.index()].rank());
            }
        }
        // Rounding, or those who are attached and run, may leave nobody behind the mean.
        self.eligible
            .pop()
            .or_else(|| self.ahead.pop().map(|(_, id)| id))
    }

    fn take_this(&mut self, id: EntityId) -> bool {
        self.eligible.remove(id) || self.ahead.remove(id).is_some()
    }

    fn remove(&mut self, entity: &mut Entity) {
        self.take_this(entity.id);
        self.detach(entity);
    }

    fn charge(&mut self, entity: &mut Entity, ran: u64) {
        let passed = entity.virt.of(ran);
        entity.virt.time = entity.virt.time + passed;
        self.lag += i64::from(entity.params.weight) * passed;
        if entity.virt.time >= entity.virt.deadline {
            entity.virt.deadline = entity.virt.time + entity.virt.of(self.slice);
        }
    }

    fn join(&mut self, entity: &mut Entity) {
        self.place(entity);
        self.attach(entity);
    }

    fn leave(&mut self, entity: &mut Entity) {
        self.detach(entity);
    }

    fn forget(&mut self, entity: &mut Entity) {
        if entity.virt.placed {
            entity.virt.placed = false;
            // Within a slice, either way: what a queue owes or is owed, another should not pay in full.
            let slice = entity.virt.of(self.slice);
            let behind = entity.virt.time.since(self.now());
            entity.virt.time = Moment::ZERO + behind.clamp(-slice, slice);
        }
    }

    fn share(&self, entity: &Entity) -> u64 {
        u64::from(entity.params.weight)
    }

    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64> {
        (waiting.virt.deadline < running.virt.deadline).then_some(self.slice / LEAST_RUN)
    }
}
