//! Directed yields: a waiting sibling comes first, but not at the expense of everybody else.

use super::*;

#[test]
fn a_waiting_sibling_is_given_the_pcpu() {
    for policy in PolicyKind::ALL {
        let s = scheduler(1, policy);
        let ids: [EntityId; 5] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
        ids.iter().for_each(|&id| _ = s.wake(id, 0));
        let first = s.pick(0, 0).run.unwrap().id;
        let sibling = *ids.iter().rev().find(|&&id| id != first).unwrap();
        s.yield_to(0, 0, [first, sibling].into_iter(), MS);
        assert_eq!(s.pick(0, MS).run.unwrap().id, sibling);
        s.stop(0, Stop::Interrupted, 2 * MS);
        // A favoured one that is paused before it runs is not picked.
        let next = s.pick(0, 2 * MS).run.unwrap().id;
        let other = *ids.iter().find(|&&id| id != next).unwrap();
        s.yield_to(0, 0, [other].into_iter(), 3 * MS);
        s.pause(other, 3 * MS);
        assert_ne!(s.pick(0, 3 * MS).run.unwrap().id, other);
    }
}

/// vCPUs of one VM that do nothing but wait for each other, and others.
struct Pair {
    scheduler: Scheduler,
    pair: [EntityId; 2],
    now: u64,
}

impl Pair {
    /// Beside a spinning one each; those wait now.
    fn new(policy: PolicyKind, others: &[Params]) -> (Self, Vec<EntityId>) {
        let scheduler = scheduler(1, policy);
        let pair = [(); 2].map(|()| scheduler.add(Params::default(), 0).unwrap());
        let add = |&params: &Params| scheduler.add(params, 0).unwrap();
        let others: Vec<EntityId> = others.iter().map(add).collect();
        for id in others.iter().chain(&pair) {
            scheduler.wake(*id, 0);
        }
        let pair = Pair {
            scheduler,
            pair,
            now: 0,
        };
        (pair, others)
    }

    /// Runs until a tick: those of the pair yield to each other whenever they have run for so long.
    fn run(&mut self, until: u64, patience: u64) {
        while self.now < until {
            let s = &self.scheduler;
            let Some(run) = s.pick(0, self.now).run else {
                self.now = s.next_deadline(0).unwrap_or(until).max(self.now);
                continue;
            };
            let stop = run.until.min(s.run_until(0)).min(until);
            if self.pair.contains(&run.id) && self.now + patience < stop {
                self.now += patience;
                s.yield_to(0, 0, self.pair.into_iter(), self.now);
            } else {
                self.now = stop.max(self.now);
                s.stop(0, Stop::Interrupted, self.now);
            }
        }
    }

    fn metrics(&self, id: EntityId) -> Metrics {
        self.scheduler.metrics(id, self.now).unwrap()
    }
}

/// Two vCPUs that yield to each other all the time do not keep a third from running.
#[test]
fn who_yield_to_each_other_get_no_more_than_their_share() {
    const SLICES: u64 = 300;
    for policy in PolicyKind::ALL {
        for patience in [MS / 100, MS / 3, 2 * MS] {
            let (mut pair, others) = Pair::new(policy, &[Params::default()]);
            pair.run(SLICES * SLICE, patience);
            let ran = pair.metrics(others[0]).run;
            // Those that yield give something up, so that it may be more.
            let due = SLICES * SLICE / 3;
            if policy.never_starves() {
                assert!(
                    ran * 100 >= due * 95,
                    "{policy}, {patience}: {ran} of {due}"
                );
            }
        }
    }
}

/// A reservation is kept beside them.
#[test]
fn who_yield_to_each_other_delay_no_reservation() {
    let reserved = Params {
        reservation: Some(Reservation {
            budget: 2 * MS,
            period: SLICE,
        }),
        ..Params::default()
    };
    for patience in [MS / 100, MS, 3 * MS] {
        let (mut pair, others) = Pair::new(PolicyKind::Reservation, &[reserved]);
        for period in 1..200 {
            pair.run(period * SLICE, patience);
            let ran = pair.metrics(others[0]).run;
            assert!(ran >= 2 * MS * period, "{patience}, period {period}: {ran}");
        }
    }
}

/// One that wakes up waits behind them for a part of a slice at most, where it comes first.
#[test]
fn who_yield_to_each_other_hold_up_who_wants_little() {
    for patience in [MS / 100, MS / 3, 2 * MS] {
        let (mut pair, others) = Pair::new(PolicyKind::Fair, &[Params::default()]);
        let wants_little = others[0];
        let s = &pair.scheduler;
        while s.pick(0, pair.now).run.unwrap().id != wants_little {
            pair.now += SLICE;
            s.stop(0, Stop::Interrupted, pair.now);
        }
        s.stop(0, Stop::Blocked { until: None }, pair.now + MS);
        pair.now += MS;
        for _ in 0..100 {
            pair.run(pair.now + 7 * SLICE, patience);
            pair.scheduler.wake(wants_little, pair.now);
            let before = pair.metrics(wants_little);
            while pair.metrics(wants_little).run == before.run {
                assert!(pair.now < 10_000 * SLICE);
                pair.run(pair.now + MS / 10, patience);
            }
            let waited = pair.metrics(wants_little).wait - before.wait;
            assert!(waited <= SLICE / 4, "{patience}: {waited}");
            // It has run a little by now, and sleeps again.
            let s = &pair.scheduler;
            while s.pick(0, pair.now).run.unwrap().id != wants_little {
                pair.now += MS / 10;
                s.stop(0, Stop::Interrupted, pair.now);
            }
            pair.now += MS / 10;
            s.stop(0, Stop::Blocked { until: None }, pair.now);
        }
    }
}
