//! What a policy decides: which of a pCPU's waiting entities is next, for how long, and who gives way to whom.
//!
//! Each policy is a small file that implements [`Policy`]. A policy belongs to one pCPU's queue and sees the entities
//! whose home that is. Budgets (caps, reservations), pausing, deadlines, accounting and migration are the queue's and the
//! scheduler's business, the same for all policies.
//!
//! An entity is *attached* while it waits or runs, that is from `enqueue` or `join` to `remove` or `leave`.
//! Every operation costs at most the logarithm of the number of attached entities.

pub mod allocation;
pub mod fair;
pub mod fcfs;
pub mod priority;
pub mod requirement;
pub mod reservation;
pub mod round_robin;
pub mod sjf;

use alloc::boxed::Box;
use core::{cmp::Ordering, fmt, ops::Add};

use crate::{
    entity::{Entity, EntityId},
    heap::KeyedHeap,
};

/// The policies that there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    /// Shares by weight, by virtual deadlines.
    #[default]
    Fair,
    /// Everybody in turn, a slice each.
    RoundRobin,
    /// The most urgent first; who waits for long becomes more urgent.
    Priority,
    /// First come, first served: who runs goes on until it blocks.
    Fcfs,
    /// Shortest job first, by the bursts measured so far.
    Sjf,
    /// Earliest deadline first for what is reserved; the rest shares what is left, fairly.
    Reservation,
    /// CPU time in proportion to what was allocated of processors and memory.
    Allocation,
    /// The lowest dominant share of CPU, memory and I/O first.
    Requirement,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Fair,
        Self::RoundRobin,
        Self::Priority,
        Self::Fcfs,
        Self::Sjf,
        Self::Reservation,
        Self::Allocation,
        Self::Requirement,
    ];

    /// Its name in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fair => "fair",
            Self::RoundRobin => "round-robin",
            Self::Priority => "priority",
            Self::Fcfs => "fcfs",
            Self::Sjf => "sjf",
            Self::Reservation => "reservation",
            Self::Allocation => "allocation",
            Self::Requirement => "requirement",
        }
    }

    /// The policy of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether everybody that waits runs at some time, whatever the others do.
    pub const fn never_starves(self) -> bool {
        !matches!(self, Self::Fcfs | Self::Sjf)
    }

    /// A policy of this kind, for a queue of up to `capacity` entities with slices of this many ticks.
    pub(crate) fn make(self, slice: u64, capacity: usize) -> Box<dyn Policy> {
        match self {
            Self::Fair => Box::new(fair::Fair::new(slice, capacity)),
            Self::RoundRobin => Box::new(round_robin::RoundRobin::new(capacity)),
            Self::Priority => Box::new(priority::Priority::new(slice, capacity)),
            Self::Fcfs => Box::new(fcfs::Fcfs::new(capacity)),
            Self::Sjf => Box::new(sjf::Sjf::new(capacity)),
            Self::Reservation => Box::new(reservation::EarliestDeadline::new(slice, capacity)),
            Self::Allocation => Box::new(allocation::ByAllocation::new(slice, capacity)),
            Self::Requirement => Box::new(requirement::ByRequirement::new(slice, capacity)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an entity comes to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// It was blocked.
    Woken,
    /// It has a budget again.
    Replenished,
    /// It comes from another queue or policy, was resumed, or has new parameters.
    Arrived,
    /// It ran and has used its slice up.
    SliceOver,
    /// It ran and was interrupted within its slice.
    Preempted,
    /// It ran and let others go first.
    Yielded,
}

/// A point in a count that may wrap, as the virtual time of a low weight does after months: earlier is less. All that are
/// compared lie within half the range of each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moment(u64);

impl Moment {
    /// Where counting begins.
    pub(crate) const ZERO: Self = Moment(0);

    /// The time from another one to this one.
    pub(crate) fn since(self, other: Self) -> i64 {
        self.0.wrapping_sub(other.0) as i64
    }

    /// As a [`rank`](Entity::rank).
    pub(crate) fn rank(self) -> u64 {
        self.0
    }
}

impl Ord for Moment {
    fn cmp(&self, other: &Self) -> Ordering {
        self.since(*other).cmp(&0)
    }
}

impl PartialOrd for Moment {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Add<i64> for Moment {
    type Output = Self;
    fn add(self, time: i64) -> Self {
        Moment(self.0.wrapping_add_signed(time))
    }
}

/// Entities by key, and in order of arrival where keys are equal.
#[derive(Debug)]
pub(crate) struct Ordered {
    heap: KeyedHeap<(Moment, u64)>,
    arrivals: u64,
}

impl Ordered {
    pub(crate) fn new(capacity: usize) -> Self {
        Ordered {
            heap: KeyedHeap::new(capacity),
            arrivals: 0,
        }
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, id: EntityId, key: u64) {
        self.arrivals += 1;
        self.heap.push(id, (Moment(key), self.arrivals));
    }

    /// As `push`, but before all others of the same key.
    pub(crate) fn push_first(&mut self, id: EntityId, key: u64) {
        self.heap.push(id, (Moment(key), 0));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.heap.peek().is_none()
    }

    pub(crate) fn peek(&self) -> Option<(Moment, EntityId)> {
        self.heap.peek().map(|((key, _), id)| (key, id))
    }

    #[inline(always)]
    pub(crate) fn pop(&mut self) -> Option<EntityId> {
        self.heap.pop().map(|(_, id)| id)
    }

    pub(crate) fn remove(&mut self, id: EntityId) -> bool {
        self.heap.remove(id).is_some()
    }
}

/// The order in which one pCPU's entities run. Times are ticks.
pub(crate) trait Policy: fmt::Debug + Send {
    /// Which one it is.
    fn kind(&self) -> PolicyKind;

    /// Those that wait in order of their key, for policies that have nothing else.
    fn ordered(&mut self) -> &mut Ordered;

    /// An entity begins to wait. Sets its `rank`. After [`Ready::SliceOver`], [`Ready::Preempted`] and
    /// [`Ready::Yielded`] it was attached already.
    fn enqueue(&mut self, entity: &mut Entity, why: Ready, now: u64);

    /// Takes the next one to run out of those that wait.
    fn take(&mut self, _now: u64) -> Option<EntityId> {
        self.ordered().pop()
    }

    /// Takes this one out of those that wait, to be run; `false`: it does not wait.
    fn take_this(&mut self, id: EntityId) -> bool {
        self.ordered().remove(id)
    }

    /// The one that was just taken waits on, as before.
    fn put_back(&mut self, entity: &mut Entity) {
        self.ordered().push_first(entity.id, entity.rank);
    }

    /// One that waits is no longer attached.
    fn remove(&mut self, entity: &mut Entity) {
        self.ordered().remove(entity.id);
    }

    /// The one that runs has run for this long.
    fn charge(&mut self, _entity: &mut Entity, _ran: u64) {}

    /// The one that runs has asked devices for so many bytes.
    fn note_io(&mut self, _bytes: u64, _now: u64) {}

    /// One that runs is attached: it has new parameters, or the policy is new.
    fn join(&mut self, _entity: &mut Entity) {}

    /// The one that runs is no longer attached.
    fn leave(&mut self, _entity: &mut Entity) {}

    /// One that is not attached changes to another queue, or to another policy.
    fn forget(&mut self, _entity: &mut Entity) {}

    /// What it is due beside the others of its pool; 0: it is due nothing but what it has reserved.
    fn share(&self, _entity: &Entity) -> u64 {
        1
    }

    /// Whether all are to have CPU time by their share in the long run. Else pCPUs only share out those who wait.
    fn divides_time(&self) -> bool {
        true
    }

    /// Whether the one that runs, which has been charged up to now, should give way to one that began to wait: `Some` is
    /// how long it may go on, counted from the beginning of its run; that keeps switches rare.
    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64>;
}
