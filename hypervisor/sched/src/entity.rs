//! What is scheduled: an entity, its parameters, its budget, and what a policy remembers of it.

use core::fmt;

use crate::{
    cpus::CpuSet,
    metrics::Metrics,
    policy::{
        Moment, PolicyKind,
        fair::{self, Virtual},
    },
};

/// Handle of a schedulable entity. Handles of removed entities are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntityId(pub u32);

impl EntityId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Number of a CPU pool, in the order in which the scheduler was given them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub u8);

/// Weights that an entity may have.
pub const WEIGHTS: core::ops::RangeInclusive<u32> = 1..=10_000;
/// Priorities that an entity may have; greater is more urgent.
pub const PRIORITIES: core::ops::RangeInclusive<u8> = 0..=31;
/// Caps that an entity may have, in percent of a pCPU.
pub const CAPS: core::ops::RangeInclusive<u8> = 1..=100;

/// CPU time that is kept for an entity: `budget` in each `period`. Both in ticks, 0 < budget <= period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// CPU time, in ticks.
    pub budget: u64,
    /// Length of a period, in ticks; also the relative deadline.
    pub period: u64,
}

/// A million parts: utilizations and shares are counted in them.
pub const MILLION: u64 = 1_000_000;

impl Reservation {
    /// The part of a pCPU that it takes, in millionths, rounded up.
    pub fn utilization(self) -> u64 {
        let parts = u128::from(self.budget) * u128::from(MILLION);
        parts.div_ceil(u128::from(self.period.max(1))) as u64
    }
}

/// What the entity's VM holds of the host, in millionths of what the host has. What it takes of CPU time and asks for of input
/// and output is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Part of the host's memory.
    pub memory: u32,
    /// Part of the host's processors that were given to it: its vCPUs by all pCPUs.
    pub processors: u32,
}

/// How an entity is to be scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Share beside the others, in [`WEIGHTS`].
    pub weight: u32,
    /// Most CPU time, in percent of a pCPU, in [`CAPS`]; `None`: no limit.
    pub cap: Option<u8>,
    /// For the policy `priority`, in [`PRIORITIES`].
    pub priority: u8,
    /// pCPUs that it may run on, of those of its pool.
    pub affinity: CpuSet,
    /// Its CPU pool.
    pub pool: PoolId,
    /// For the policy `reservation`.
    pub reservation: Option<Reservation>,
    /// For the policies `allocation` and `requirement`.
    pub demand: Demand,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            weight: 100,
            cap: None,
            priority: 16,
            affinity: CpuSet::ALL,
            pool: PoolId(0),
            reservation: None,
            demand: Demand::default(),
        }
    }
}

/// What an entity is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting for an event, or until the deadline, in ticks.
    Blocked {
        /// `None`: no deadline.
        until: Option<u64>,
    },
    /// In a run queue.
    Waiting,
    /// Its budget is used up; it waits for the next one, at this tick.
    Throttled {
        /// Tick of the replenishment.
        until: u64,
    },
    /// Ready, but paused.
    Held,
    /// On this pCPU.
    Running {
        /// pCPU number.
        pcpu: usize,
    },
    /// It has run for the last time and waits to be removed.
    Retired,
}

impl State {
    /// Whether the entity would run if it had a pCPU to itself.
    pub fn is_ready(self) -> bool {
        matches!(
            self,
            State::Waiting | State::Throttled { .. } | State::Running { .. }
        )
    }
}

/// Why parameters are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A value outside its range.
    OutOfRange,
    /// There is no such pool.
    NoSuchPool,
    /// No pCPU of the pool may run it.
    NoPcpu {
        /// Those of the pool.
        pool: CpuSet,
    },
    /// The pool's policy, this one, keeps no time for anybody.
    NoReservations(PolicyKind),
    /// The pool keeps time for somebody, which the policy that is wanted does not.
    HasReservations,
    /// No room for another entity.
    Full,
    /// There is no such entity.
    Unknown,
    /// No pCPU has so much left to reserve. All in millionths of a pCPU.
    Overcommitted {
        /// What was asked for, for each entity.
        wanted: u64,
        /// The most that one pCPU has left, beside those for which there was room.
        left: u64,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |parts: &u64| (parts / 10_000, parts / 1000 % 10);
        match self {
            Refusal::OutOfRange => f.write_str("a scheduling value is out of range"),
            Refusal::NoSuchPool => f.write_str("there is no such CPU pool"),
            Refusal::NoPcpu { pool } => {
                write!(
                    f,
                    "it may run on no processor of its pool, which has: {pool}"
                )
            }
            Refusal::NoReservations(policy) => write!(
                f,
                "the pool's policy is \"{policy}\", which keeps no time for reservations; it has to be \"{}\"",
                PolicyKind::Reservation
            ),
            Refusal::HasReservations => f.write_str(
                "there are reservations in the pool, which no other policy keeps: take them back first",
            ),
            Refusal::Full => f.write_str("there is no room for another vCPU"),
            Refusal::Unknown => f.write_str("there is no such vCPU"),
            Refusal::Overcommitted { wanted, left } => {
                let (wanted, left) = (percent(wanted), percent(left));
                write!(
                    f,
                    "a reservation of {}.{} % of a processor is more than any has left ({}.{} % at most)",
                    wanted.0, wanted.1, left.0, left.1
                )
            }
        }
    }
}

impl core::error::Error for Refusal {}

/// CPU time that is given out by the period: a cap's, or a reservation's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bandwidth {
    /// In ticks.
    budget: u64,
    /// In ticks.
    period: u64,
    /// Ticks left; negative when it ran for longer than it should have.
    left: i64,
    /// Tick at which the next budget comes.
    refill_at: u64,
    /// Tick of its first budget: until then it makes up for what its predecessor used ahead of time.
    starts: u64,
    /// Whether an early wake-up begins a new period, as the constant bandwidth server does.
    reserved: bool,
}

impl Bandwidth {
    /// Half a slice at a time, so that no window of any length sees more than the cap and one slice.
    pub(crate) fn capped(percent: u8, slice: u64, now: u64) -> Self {
        let budget = (slice / 2).max(1);
        let period = budget * 100 / u64::from(percent.max(1));
        Bandwidth {
            budget,
            period,
            left: budget as i64,
            refill_at: now + period,
            starts: now,
            reserved: false,
        }
    }

    pub(crate) fn reserved(reservation: Reservation, now: u64) -> Self {
        Bandwidth {
            budget: reservation.budget,
            period: reservation.period,
            left: reservation.budget as i64,
            refill_at: now + reservation.period,
            starts: now,
            reserved: true,
        }
    }

    /// The deadline of what is left, as a tick.
    pub(crate) fn deadline(&self) -> u64 {
        self.refill_at
    }

    /// Ticks that it may still run.
    pub(crate) fn left(&self) -> u64 {
        self.left.max(0) as u64
    }

    /// Takes over from another one at this tick: as it is, if budget and period are the same. Else what was used of the other one ahead of
    /// time is taken off the first budget; if it is more than that, the first budget comes when the other one's share has made up for it, which
    /// is before its next budget would have come. So changes do not add up to more than was ever due.
    fn succeed(mut self, before: Option<Self>, now: u64) -> Self {
        let Some(before) = before else { return self };
        let same = |b: &Self| (b.budget, b.period, b.reserved);
        if same(&before) == same(&self) {
            return before;
        }
        let (budget, period) = (i128::from(before.budget), i128::from(before.period));
        let rest = before.refill_at.saturating_sub(now).min(before.period);
        let due = budget * (period - i128::from(rest)) / period;
        let ahead = budget - i128::from(before.left) - due;
        let starts = match before.starts > now {
            true => before.starts,
            false if ahead <= i128::from(self.left) => {
                self.left -= ahead.max(0) as i64;
                return self;
            }
            false => now + ((ahead * period / budget) as u64).min(rest),
        };
        self.left = 0;
        self.starts = starts;
        self.refill_at = starts;
        self
    }

    /// Has it pay for what it ran.
    pub(crate) fn charge(&mut self, ran: u64) {
        self.left -= ran as i64;
    }

    /// Gives the budgets that have come due. `woken`: it was not ready until now.
    pub(crate) fn refill(&mut self, now: u64, woken: bool) {
        if now >= self.refill_at {
            // Debts are paid, savings are not kept; time in which it was not ready is no period.
            let budget = self.budget as i64;
            self.left = self.left.min(0) + budget;
            self.refill_at += self.period;
            if self.refill_at <= now {
                if self.left < budget {
                    let more = (now - self.refill_at) / self.period + 1;
                    let paid = self.budget.saturating_mul(more).min(i64::MAX as u64);
                    self.left = self.left.saturating_add_unsigned(paid).min(budget);
                }
                self.refill_at = now + self.period;
            }
        } else if woken && self.reserved && self.left > 0 {
            // What is left until the deadline is more than its share: a new period begins
            // (constant bandwidth server, Abeni and Buttazzo 1998).
            let left = self.left as u128 * u128::from(self.period);
            let share = u128::from(self.refill_at - now) * u128::from(self.budget);
            if left > share {
                self.left = self.budget as i64;
                self.refill_at = now + self.period;
            }
        }
    }
}

/// CPU time or bytes of the recent past, halved every [`Recent::HALF_LIFE_BITS`]'s power of two of ticks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Recent {
    ticks: u64,
    epoch: u64,
}

impl Recent {
    /// About a second at a few gigahertz, and four in a simulator of nanoseconds.
    const HALF_LIFE_BITS: u32 = 32;

    pub(crate) fn add(&mut self, ran: u64, now: u64) {
        let epoch = now >> Self::HALF_LIFE_BITS;
        // Most often this is the same one; to another pCPU's clock it may be the one before.
        if epoch > self.epoch {
            self.ticks = self.at(now);
            self.epoch = epoch;
        }
        self.ticks += ran;
    }

    /// Takes so much away again.
    pub(crate) fn remove(&mut self, ticks: u64, now: u64) {
        self.ticks = self.at(now).saturating_sub(ticks);
        self.epoch = self.epoch.max(now >> Self::HALF_LIFE_BITS);
    }

    /// What is left of it at this tick.
    pub(crate) fn at(self, now: u64) -> u64 {
        let halvings = (now >> Self::HALF_LIFE_BITS).saturating_sub(self.epoch);
        self.ticks.checked_shr(halvings as u32).unwrap_or(0)
    }

    /// What adds up in the long run where each tick counts one.
    pub(crate) fn of_every_tick(now: u64) -> u64 {
        // One half-life when an epoch begins, and two when it ends.
        let half_life = 1 << Self::HALF_LIFE_BITS;
        half_life + (now & (half_life - 1))
    }

    /// As a part of what one pCPU can give, in millionths.
    pub(crate) fn share(self, now: u64) -> u64 {
        self.at(now).saturating_mul(MILLION) / Self::of_every_tick(now)
    }
}

/// An entity, as its pCPU's queue keeps it.
#[derive(Debug)]
pub(crate) struct Entity {
    pub(crate) id: EntityId,
    pub(crate) params: Params,
    /// Affinity within its pool; of one that has reserved, its seat ([`crate::scheduler::admission`]).
    pub(crate) allowed: CpuSet,
    pub(crate) state: State,
    /// A wake-up came while it ran.
    pub(crate) woken: bool,
    /// It is not to run until resumed.
    pub(crate) paused: bool,
    pub(crate) bandwidth: Option<Bandwidth>,
    /// Tick of the last change of its state, or of the last charge while it runs.
    pub(crate) since: u64,
    /// Tick of the wake-up after which it has not run yet.
    pub(crate) woken_at: Option<u64>,
    /// That was its own deadline, and no event.
    pub(crate) by_timer: bool,
    /// Tick at which it last became ready.
    pub(crate) ready_at: u64,
    /// Tick at which it began to wait for its present turn; a move to another queue changes nothing in that.
    pub(crate) waits_since: u64,
    /// CPU time since it last became ready, in ticks.
    pub(crate) burst: u64,
    /// Ticks of its slice that are left.
    pub(crate) slice_left: u64,
    /// The pCPU whose queue it is in, or was in last.
    pub(crate) home: Option<usize>,
    pub(crate) recent: Recent,
    /// What it asked devices for in the recent past, in bytes.
    pub(crate) io: Recent,
    pub(crate) metrics: Metrics,
    /// The policy `fair`'s.
    pub(crate) virt: Virtual,
    /// Running average of its bursts, one half to the last one, in ticks.
    pub(crate) expected_burst: u64,
    /// What it has paid for its CPU time, where it is known: the policy `allocation`'s.
    pub(crate) paid: Option<Moment>,
    /// Where it stands among those that wait: less is more urgent. Of the policy's making.
    pub(crate) rank: u64,
}

impl Entity {
    pub(crate) fn new(id: EntityId, params: Params, allowed: CpuSet, slice: u64, now: u64) -> Self {
        let mut entity = Entity {
            id,
            params,
            allowed,
            state: State::Blocked { until: None },
            woken: false,
            paused: false,
            bandwidth: None,
            since: now,
            woken_at: None,
            by_timer: false,
            ready_at: now,
            waits_since: now,
            burst: 0,
            slice_left: 0,
            home: None,
            recent: Recent::default(),
            io: Recent::default(),
            metrics: Metrics::default(),
            virt: Virtual::default(),
            expected_burst: 0,
            paid: None,
            rank: 0,
        };
        entity.set_params(params, allowed, slice, now);
        entity
    }

    /// Puts parameters into force. It is in no queue.
    pub(crate) fn set_params(&mut self, params: Params, allowed: CpuSet, slice: u64, now: u64) {
        let bandwidth = match (params.reservation, params.cap) {
            (Some(reservation), _) => Some(Bandwidth::reserved(reservation, now)),
            (None, Some(percent)) if percent < 100 => Some(Bandwidth::capped(percent, slice, now)),
            (None, _) => None,
        };
        self.bandwidth = bandwidth.map(|new| new.succeed(self.bandwidth, now));
        self.params = params;
        self.allowed = allowed;
        self.virt.set_rate(fair::rate(params.weight));
    }

    /// Whether it must wait for its next budget; tick at which that comes.
    pub(crate) fn throttled_until(&self) -> Option<u64> {
        let bandwidth = self.bandwidth.as_ref()?;
        (bandwidth.left <= 0).then_some(bandwidth.refill_at)
    }

    /// The time since the last change of its state, which is now.
    pub(crate) fn lapse(&mut self, now: u64) -> u64 {
        let passed = now.saturating_sub(self.since);
        self.since += passed;
        passed
    }

    /// Counts the time since the last change of state of one that does not run.
    pub(crate) fn settle(&mut self, now: u64) {
        let passed = self.lapse(now);
        match self.state {
            State::Waiting => self.metrics.wait += passed,
            State::Throttled { .. } => self.metrics.throttled += passed,
            State::Blocked { .. } => self.metrics.blocked += passed,
            State::Running { .. } | State::Held | State::Retired => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A budget of 10 in each 100 ticks, of which 45 were used by tick 50.
    fn overdrawn() -> Bandwidth {
        let reservation = Reservation {
            budget: 10,
            period: 100,
        };
        let mut bandwidth = Bandwidth::reserved(reservation, 0);
        bandwidth.charge(45);
        bandwidth
    }

    #[test]
    fn debts_are_paid_also_by_who_sleeps() {
        // Period by period, or all at once: -35 at first.
        let mut ready = overdrawn();
        for (period, left) in [(1, -25), (2, -15), (3, -5), (4, 5), (5, 10)] {
            ready.refill(period * 100, false);
            assert_eq!(ready.left, left, "{period}");
            let mut sleeps = overdrawn();
            sleeps.refill(period * 100 + 7, true);
            assert_eq!(sleeps.left, left, "{period}");
            assert!(sleeps.refill_at > period * 100 + 7);
        }
        // Nothing is saved.
        let mut long = overdrawn();
        long.refill(u64::MAX / 2, true);
        assert_eq!(long.left, 10);
    }

    #[test]
    fn a_clock_that_runs_back_a_little_halves_nothing_twice() {
        let epoch = 1 << Recent::HALF_LIFE_BITS;
        let mut recent = Recent::default();
        recent.add(1000, epoch - 1);
        recent.add(0, epoch + 1);
        assert_eq!(recent.at(epoch + 1), 500);
        // Another pCPU's clock, and this one's again.
        recent.add(8, epoch - 1);
        recent.remove(8, epoch - 1);
        recent.add(0, epoch + 1);
        assert_eq!(recent.at(epoch + 1), 500);
        assert_eq!(recent.at(3 * epoch), 125);
    }
}
