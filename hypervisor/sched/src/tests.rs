//! Invariants of queues and scheduler, whatever the order of calls; and small worlds in which guests run.

use std::{vec, vec::Vec};

use proptest::{prelude::*, test_runner::RngSeed};

use super::*;

mod changes;
mod histories;
mod long_uptimes;
mod moves;
mod reservations;
mod threads;
mod yielding;

/// So many cases, the same each time, unless the environment asks for others (`PROPTEST_CASES`, `PROPTEST_RNG_SEED`).
fn draw(cases: u32) -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig {
        cases: std::env::var_os("PROPTEST_CASES").map_or(cases, |_| asked.cases),
        rng_seed: match asked.rng_seed {
            RngSeed::Random => RngSeed::Fixed(5),
            fixed => fixed,
        },
        failure_persistence: None,
        ..asked
    }
}

/// A millisecond, in the ticks of these tests.
const MS: u64 = 1_000_000;
const SLICE: u64 = 10 * MS;

const NOTHING: Wake = Wake {
    outcome: Outcome::Nothing,
    kick: None,
};

fn scheduler(pcpus: usize, policy: PolicyKind) -> Scheduler {
    let pool = Pool {
        cpus: CpuSet::first(pcpus),
        policy,
        slice: SLICE,
    };
    Scheduler::new(pcpus, 64, &[pool])
}

fn weighing(weight: u32) -> Params {
    Params {
        weight,
        ..Params::default()
    }
}

/// What a guest of the small world does whenever it runs.
#[derive(Clone, Copy, Debug)]
enum Guest {
    /// Runs for ever.
    Spins,
    /// Runs for so long, then sleeps for so long, again and again.
    Works { run: u64, sleep: u64 },
    /// Yields whenever it has run for so long.
    Yields { run: u64 },
}

/// Runs the guests on all pCPUs until the end; in each of them, time passes from event to event.
fn simulate(s: &Scheduler, guests: &[(EntityId, Guest)], end: u64) {
    let mut now = 0;
    let mut left: Vec<u64> = guests
        .iter()
        .map(|(_, guest)| match guest {
            Guest::Spins => u64::MAX,
            Guest::Works { run, .. } | Guest::Yields { run } => *run,
        })
        .collect();
    let mut on: Vec<Option<(EntityId, u64)>> = vec![None; s.pcpus()];
    for (id, _) in guests {
        s.wake(*id, 0);
    }
    let index = |id: EntityId| guests.iter().position(|(other, _)| *other == id).unwrap();
    while now < end {
        for (pcpu, runs) in on.iter_mut().enumerate() {
            if runs.is_none() {
                let pick = s.pick(pcpu, now);
                *runs = pick.run.map(|run| (run.id, now));
            }
        }
        // Nobody idles while somebody waits.
        for (pcpu, runs) in on.iter().enumerate() {
            if runs.is_none() {
                for (id, _) in guests {
                    let allowed = s.params(*id).unwrap().affinity.contains(pcpu);
                    let reserved = s.params(*id).unwrap().reservation.is_some();
                    assert!(
                        !allowed || reserved || s.state(*id) != Some(State::Waiting),
                        "{id:?} waits while {pcpu} idles"
                    );
                }
            }
        }
        let mut next = end;
        for (pcpu, runs) in on.iter().enumerate() {
            next = next.min(match runs {
                Some((id, since)) => s
                    .run_until(pcpu)
                    .min(since.saturating_add(left[index(*id)])),
                None => s.next_deadline(pcpu).unwrap_or(u64::MAX),
            });
        }
        now = next.max(now);
        for (pcpu, runs) in on.iter_mut().enumerate() {
            let Some((id, since)) = *runs else {
                continue;
            };
            let n = index(id);
            let ran = now - since;
            let done = ran >= left[n];
            if !done && now < s.run_until(pcpu) {
                continue;
            }
            *runs = None;
            left[n] = left[n].saturating_sub(ran);
            let stop = match guests[n].1 {
                Guest::Works { run, sleep } if done => {
                    left[n] = run;
                    let until = Some(now + sleep);
                    Stop::Blocked { until }
                }
                Guest::Yields { run } if done => {
                    left[n] = run;
                    Stop::Yielded
                }
                _ => Stop::Interrupted,
            };
            s.stop(pcpu, stop, now);
        }
    }
}

/// All entities want to run all the time from one tick to another; who has stopped at the end can go on.
fn all_spin(s: &Scheduler, from: u64, end: u64) {
    let mut now = from;
    let mut on: Vec<bool> = vec![false; s.pcpus()];
    loop {
        for (pcpu, runs) in on.iter_mut().enumerate() {
            if !*runs {
                *runs = s.pick(pcpu, now).run.is_some();
            }
        }
        if now >= end {
            break;
        }
        let next = |(pcpu, runs): (usize, &bool)| match runs {
            true => s.run_until(pcpu),
            false => s.next_deadline(pcpu).unwrap_or(u64::MAX),
        };
        let next = on.iter().enumerate().map(next).min().unwrap_or(end);
        now = next.clamp(now, end);
        for (pcpu, runs) in on.iter_mut().enumerate() {
            if *runs && (now >= s.run_until(pcpu) || now >= end) {
                s.stop(pcpu, Stop::Interrupted, now);
                *runs = false;
            }
        }
        if now >= end {
            break;
        }
    }
}

fn ran(s: &Scheduler, id: EntityId, now: u64) -> u64 {
    s.metrics(id, now).unwrap().run
}

fn run_times(s: &Scheduler, guests: &[(EntityId, Guest)], end: u64) -> Vec<u64> {
    let times = guests
        .iter()
        .map(|(id, _)| s.metrics(*id, end).unwrap().run);
    times.collect()
}

fn spinners(s: &Scheduler, weights: &[u32]) -> Vec<(EntityId, Guest)> {
    let add = |&weight: &u32| (s.add(weighing(weight), 0).unwrap(), Guest::Spins);
    weights.iter().map(add).collect()
}

#[test]
fn round_robin_gives_everyone_a_turn() {
    let s = scheduler(1, PolicyKind::RoundRobin);
    let ids: [EntityId; 3] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    for id in ids {
        assert_eq!(s.wake(id, 0).outcome, Outcome::Waiting);
    }
    let mut now = 0;
    for turn in 0..9 {
        let run = s.pick(0, now).run.unwrap();
        assert_eq!(run.id, ids[turn % 3]);
        assert_eq!(run.until, now + SLICE);
        now = run.until;
        s.stop(0, Stop::Interrupted, now);
    }
}

#[test]
fn who_is_interrupted_within_its_slice_goes_on_with_the_rest() {
    let s = scheduler(1, PolicyKind::RoundRobin);
    let ids: [EntityId; 2] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    ids.iter().for_each(|&id| _ = s.wake(id, 0));
    assert_eq!(s.pick(0, 0).run.unwrap().id, ids[0]);
    s.stop(0, Stop::Interrupted, 3 * MS);
    let run = s.pick(0, 3 * MS).run.unwrap();
    assert_eq!((run.id, run.until), (ids[0], SLICE));
    s.stop(0, Stop::Interrupted, SLICE);
    assert_eq!(s.pick(0, SLICE).run.unwrap().id, ids[1]);
}

#[test]
fn a_wake_up_while_running_is_not_lost() {
    for policy in PolicyKind::ALL {
        let s = scheduler(2, policy);
        let id = s.add(Params::default(), 0).unwrap();
        s.wake(id, 0);
        assert_eq!(s.pick(1, 0).run.unwrap().id, id);
        let wake = s.wake(id, 1);
        assert_eq!(wake.outcome, Outcome::Running { pcpu: 1 });
        assert_eq!(wake.kick, Some(1));
        s.stop(1, Stop::Blocked { until: None }, 2);
        assert_eq!(s.state(id), Some(State::Waiting));
        assert_eq!(s.pick(1, 2).run.unwrap().id, id);
        s.stop(1, Stop::Blocked { until: Some(10) }, 3);
        assert_eq!(s.next_deadline(1), Some(10));
        assert_eq!(s.pick(1, 9).run, None);
        assert_eq!(s.pick(1, 10).run.unwrap().id, id);
    }
}

#[test]
fn a_retired_entity_never_runs_again() {
    let s = scheduler(1, PolicyKind::Fair);
    let id = s.add(Params::default(), 0).unwrap();
    s.wake(id, 0);
    s.pick(0, 0);
    s.wake(id, 0);
    assert!(!s.remove(id, 0), "it runs");
    s.stop(0, Stop::Retired, 1);
    assert_eq!(s.state(id), Some(State::Retired));
    assert_eq!(s.wake(id, 1), NOTHING);
    assert_eq!(s.pick(0, 1).run, None);
    assert!(s.remove(id, 1));
    assert_eq!(s.state(id), None);
    assert_eq!(s.wake(id, 1), NOTHING);
    assert_eq!(
        s.add(Params::default(), 2),
        Ok(id),
        "numbers are used again"
    );
}

#[test]
fn pinned_entities_stay_on_their_pcpu() {
    let s = scheduler(2, PolicyKind::Fair);
    let pinned = Params {
        affinity: CpuSet::of(1),
        ..Params::default()
    };
    let ids: [EntityId; 3] = core::array::from_fn(|_| s.add(pinned, 0).unwrap());
    for id in ids {
        s.wake(id, 0);
    }
    assert_eq!(s.pick(0, 0).run, None);
    assert!(s.pick(1, 0).run.is_some());
    assert_eq!(s.pick(0, 1).run, None);
    // Given another place while it runs, it goes there when it stops.
    let moved = Params {
        affinity: CpuSet::of(0),
        ..pinned
    };
    assert_eq!(s.set_params(&ids[..1], moved, 2), Ok(CpuSet::of(1)));
    assert!(s.run_until(1) <= 2);
    assert_eq!(s.stop(1, Stop::Interrupted, 3), Some(0), "pCPU 0 idles");
    assert_eq!(s.pick(0, 3).run.unwrap().id, ids[0]);
    assert_eq!(s.params(ids[0]), Some(moved));
    // So does one that waits, and has nobody interrupted who goes on there; both have been moved once.
    assert_eq!(s.set_params(&ids[1..2], moved, 4), Ok(CpuSet::EMPTY));
    let migrations = ids.map(|id| s.metrics(id, 4).unwrap().migrations);
    assert_eq!(migrations, [1, 1, 0]);
}

#[test]
fn an_idle_pcpu_is_told_of_work_and_takes_it() {
    let s = scheduler(3, PolicyKind::Fair);
    let ids: [EntityId; 4] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    for pcpu in 0..3 {
        assert_eq!(s.pick(pcpu, 0).run, None);
    }
    let mut busy = CpuSet::EMPTY;
    for id in ids.into_iter().take(3) {
        let kick = s.wake(id, 1).kick.unwrap();
        assert!(!busy.contains(kick), "that one is busy");
        assert_eq!(s.pick(kick, 1).run.unwrap().id, id);
        busy = busy.or(CpuSet::of(kick));
    }
    // Now all are busy; who becomes idle takes the fourth.
    s.wake(ids[3], 2);
    s.stop(2, Stop::Blocked { until: None }, 3);
    assert_eq!(s.pick(2, 3).run.unwrap().id, ids[3]);
}

#[test]
fn a_paused_entity_waits_to_be_resumed() {
    for policy in PolicyKind::ALL {
        let s = scheduler(1, policy);
        let ids: [EntityId; 2] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
        // Blocked: the wake-up is remembered.
        assert_eq!(s.pause(ids[0], 0), None);
        assert_eq!(s.wake(ids[0], 1), NOTHING);
        assert_eq!(s.state(ids[0]), Some(State::Held));
        assert_eq!(s.pick(0, 1).run, None);
        assert_eq!(s.resume(ids[0], 2).kick, Some(0));
        // Waiting.
        assert_eq!(s.pause(ids[0], 3), None);
        assert_eq!(s.pick(0, 3).run, None);
        s.resume(ids[0], 4);
        assert_eq!(s.pick(0, 4).run.unwrap().id, ids[0]);
        // Running: it is stopped.
        assert_eq!(s.pause(ids[0], 5), Some(0));
        assert_eq!(s.run_until(0), 0);
        s.stop(0, Stop::Interrupted, 6);
        assert_eq!(s.state(ids[0]), Some(State::Held));
        assert_eq!(s.pick(0, 6).run, None);
        s.resume(ids[0], 7);
        assert_eq!(s.pick(0, 7).run.unwrap().id, ids[0]);
        s.stop(0, Stop::Blocked { until: Some(20) }, 8);
        // A deadline that passes while it is paused counts when it is resumed.
        s.pause(ids[0], 9);
        assert_eq!(s.pick(0, 21).run, None);
        s.resume(ids[0], 22);
        assert_eq!(s.pick(0, 22).run.unwrap().id, ids[0]);
    }
}

#[test]
fn weights_are_shares_within_two_percent() {
    for weights in [&[100, 200, 400][..], &[1, 10_000], &[7, 100, 100, 1000]] {
        let s = scheduler(1, PolicyKind::Fair);
        let guests = spinners(&s, weights);
        let end = if weights[0] == 1 { 500_000 } else { 10_000 } * MS;
        simulate(&s, &guests, end);
        let sum: u64 = weights.iter().map(|&w| u64::from(w)).sum();
        for (time, &weight) in run_times(&s, &guests, end).iter().zip(weights) {
            let due = end * u64::from(weight) / sum;
            assert!(
                time.abs_diff(due) <= due / 50 + SLICE,
                "{weight} of {weights:?}: {time} is not {due}"
            );
        }
    }
}

#[test]
fn three_equal_guests_share_two_pcpus() {
    for policy in [PolicyKind::Fair, PolicyKind::RoundRobin] {
        let s = scheduler(2, policy);
        let guests = spinners(&s, &[100, 100, 100]);
        let end = 20_000 * MS;
        simulate(&s, &guests, end);
        let times = run_times(&s, &guests, end);
        for &time in &times {
            let due = end * 2 / 3;
            assert!(
                time.abs_diff(due) <= due / 50,
                "{policy}: {times:?}, not {due}"
            );
        }
    }
}

#[test]
fn weights_hold_over_two_pcpus() {
    let s = scheduler(2, PolicyKind::Fair);
    let guests = spinners(&s, &[100, 200, 400, 100, 200, 400]);
    let end = 20_000 * MS;
    simulate(&s, &guests, end);
    for (time, weight) in run_times(&s, &guests, end).iter().zip([1, 2, 4, 1, 2, 4]) {
        let due = end * 2 * weight / 14;
        assert!(time.abs_diff(due) <= due / 50, "{time} is not {due}");
    }
}

#[test]
fn yielding_and_sleeping_gain_nothing() {
    let s = scheduler(1, PolicyKind::Fair);
    let add = |guest| (s.add(Params::default(), 0).unwrap(), guest);
    let guests = [
        add(Guest::Spins),
        add(Guest::Yields { run: MS / 10 }),
        add(Guest::Works {
            run: 3 * MS,
            sleep: MS / 100,
        }),
    ];
    let end = 10_000 * MS;
    simulate(&s, &guests, end);
    let times = run_times(&s, &guests, end);
    assert!(times[0] >= end / 3, "the spinner got {}", times[0]);
    assert!(
        times[1] <= times[0] && times[2] <= times[0] + SLICE,
        "{times:?}"
    );
}

#[test]
fn who_wants_little_waits_little() {
    let s = scheduler(1, PolicyKind::Fair);
    let add = |guest| (s.add(Params::default(), 0).unwrap(), guest);
    let mut guests: Vec<_> = (0..4).map(|_| add(Guest::Spins)).collect();
    guests.push(add(Guest::Works {
        run: MS / 10,
        sleep: 20 * MS,
    }));
    let end = 10_000 * MS;
    simulate(&s, &guests, end);
    let m = s.metrics(guests[4].0, end).unwrap();
    assert!(m.bursts > 400, "{} bursts", m.bursts);
    assert!(m.average_response() < SLICE, "{}", m.average_response());
}

#[test]
fn a_cap_is_kept_in_every_window() {
    for policy in [PolicyKind::Fair, PolicyKind::RoundRobin, PolicyKind::Fcfs] {
        let s = scheduler(1, policy);
        let capped = Params {
            cap: Some(30),
            ..Params::default()
        };
        let id = s.add(capped, 0).unwrap();
        let guests = [(id, Guest::Spins)];
        let mut seen = vec![0];
        // It is alone: only the cap holds it.
        for second in 1..=20 {
            simulate(&s, &[], 0);
            let end = second * 500 * MS;
            let from = (second - 1) * 500 * MS;
            run_window(&s, &guests, from, end);
            seen.push(s.metrics(id, end).unwrap().run);
        }
        for window in seen.windows(2) {
            let ran = window[1] - window[0];
            let due = 150 * MS;
            assert!(ran.abs_diff(due) <= SLICE, "{policy}: {ran} in 500 ms");
        }
    }
}

/// One guest alone on pCPU 0, from tick to tick; it is taken off at the end.
fn run_window(s: &Scheduler, guests: &[(EntityId, Guest)], from: u64, end: u64) {
    let mut now = from;
    s.wake(guests[0].0, now);
    while now < end {
        match s.pick(0, now).run {
            Some(_) => {
                now = s.run_until(0).min(end);
                s.stop(0, Stop::Interrupted, now);
            }
            None => now = s.next_deadline(0).unwrap_or(end).min(end),
        }
    }
}

#[test]
fn parameters_out_of_range_are_refused() {
    let s = scheduler(1, PolicyKind::Fair);
    let base = Params::default();
    for (params, refusal) in [
        (weighing(0), Refusal::OutOfRange),
        (weighing(10_001), Refusal::OutOfRange),
        (
            Params {
                cap: Some(0),
                ..base
            },
            Refusal::OutOfRange,
        ),
        (
            Params {
                cap: Some(101),
                ..base
            },
            Refusal::OutOfRange,
        ),
        (
            Params {
                priority: 32,
                ..base
            },
            Refusal::OutOfRange,
        ),
        (
            Params {
                pool: PoolId(1),
                ..base
            },
            Refusal::NoSuchPool,
        ),
        (
            Params {
                affinity: CpuSet::of(1),
                ..base
            },
            Refusal::NoPcpu {
                pool: CpuSet::of(0),
            },
        ),
    ] {
        assert_eq!(s.add(params, 0), Err(refusal));
    }
    for n in 0..64 {
        assert_eq!(s.add(base, 0), Ok(EntityId(n)));
    }
    assert_eq!(s.add(base, 0), Err(Refusal::Full));
}

#[test]
fn the_urgent_run_at_once_and_the_others_in_the_end() {
    let s = scheduler(1, PolicyKind::Priority);
    let with = |priority| Params {
        priority,
        ..Params::default()
    };
    let low = s.add(with(0), 0).unwrap();
    let high = s.add(with(31), 0).unwrap();
    s.wake(low, 0);
    assert_eq!(s.pick(0, 0).run.unwrap().id, low);
    assert_eq!(s.wake(high, MS).kick, Some(0));
    assert_eq!(s.run_until(0), MS);
    s.stop(0, Stop::Interrupted, MS);
    let mut now = MS;
    let mut last_low = 0;
    // The low one starves for no longer than ageing takes.
    while now < 20_000 * MS {
        let run = s.pick(0, now).run.unwrap();
        if run.id == low {
            last_low = now;
        }
        assert!(now - last_low <= (31 * SLICES_PER_LEVEL + 2) * SLICE);
        now = run.until;
        s.stop(0, Stop::Interrupted, now);
    }
    assert!(s.metrics(high, now).unwrap().run > s.metrics(low, now).unwrap().run * 100);
}

#[test]
fn first_come_is_first_served_to_the_end() {
    let s = scheduler(1, PolicyKind::Fcfs);
    let ids: [EntityId; 2] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    s.wake(ids[1], 0);
    s.wake(ids[0], 1);
    let mut now = 1;
    for _ in 0..10 {
        let run = s.pick(0, now).run.unwrap();
        assert_eq!(run.id, ids[1]);
        now = run.until;
        s.stop(0, Stop::Interrupted, now);
    }
    s.pick(0, now);
    s.stop(0, Stop::Blocked { until: None }, now);
    assert_eq!(s.pick(0, now).run.unwrap().id, ids[0]);
}

#[test]
fn short_jobs_come_before_long_ones() {
    let s = scheduler(1, PolicyKind::Sjf);
    let add = |run| {
        let guest = Guest::Works { run, sleep: 5 * MS };
        (s.add(Params::default(), 0).unwrap(), guest)
    };
    let guests = [add(MS), add(8 * MS), add(9 * MS)];
    simulate(&s, &guests, 5_000 * MS);
    let response = |n: usize| {
        s.metrics(guests[n].0, 5_000 * MS)
            .unwrap()
            .average_response()
    };
    let all = [response(0), response(1), response(2)];
    assert!(10 * all[0] < all[2], "{all:?}");
}

#[test]
fn allocation_and_requirement_follow_what_is_held() {
    let demanding = |memory, processors| Params {
        demand: Demand { memory, processors },
        ..Params::default()
    };
    let s = scheduler(1, PolicyKind::Allocation);
    let guests: Vec<_> = [demanding(100_000, 50_000), demanding(50_000, 300_000)]
        .map(|params| (s.add(params, 0).unwrap(), Guest::Spins))
        .to_vec();
    simulate(&s, &guests, 4_000 * MS);
    let times = run_times(&s, &guests, 4_000 * MS);
    assert!(
        times[1].abs_diff(3 * times[0]) <= times[1] / 50,
        "{times:?}"
    );
    // Who holds most of the memory comes after who holds little.
    let s = scheduler(1, PolicyKind::Requirement);
    let large = s.add(demanding(900_000, 0), 0).unwrap();
    let small = s.add(demanding(10_000, 0), 0).unwrap();
    s.wake(large, 0);
    s.wake(small, MS);
    assert_eq!(s.pick(0, MS).run.unwrap().id, small);
    s.stop(0, Stop::Interrupted, MS + SLICE);
    let guests = [(large, Guest::Spins), (small, Guest::Spins)];
    simulate(&s, &guests, 4_000 * MS);
    assert!(
        run_times(&s, &guests, 4_000 * MS)[0] > 100 * MS,
        "nobody starves"
    );
}

#[test]
fn requirement_follows_the_io_that_is_asked_for() {
    let s = scheduler(1, PolicyKind::Requirement);
    let [asks, computes] = [0; 2].map(|_| s.add(Params::default(), 0).unwrap());
    let mut now = 0;
    let mut turns = |bytes: u64, count: u64| {
        let mut ran = 0;
        for _ in 0..count {
            let run = s.pick(0, now).run.unwrap();
            now = run.until;
            let asked = run.id == asks;
            ran += u64::from(asked);
            let turn = Turn {
                why: Stop::Interrupted,
                io: if asked { bytes } else { 0 },
            };
            s.stop(0, turn, now);
        }
        ran
    };
    s.wake(asks, 0);
    s.wake(computes, 0);
    // Less than a pCPU always has room for: both are alike. Then one asks for all that there is.
    let alike = turns(1000, 200);
    assert!((90..=110).contains(&alike), "{alike}");
    let first = turns(1 << 30, 200);
    assert!((1..=70).contains(&first), "{first} of 200 turns");
    let metrics = s.metrics(asks, now).unwrap();
    assert_eq!(metrics.io, alike * 1000 + (first << 30));
    assert_eq!(s.metrics(computes, now).unwrap().io, 0);
    // Nobody runs: it is nobody's.
    let turn = Turn {
        why: Stop::Interrupted,
        io: 1,
    };
    assert_eq!(s.stop(0, turn, now), None);
    assert_eq!(s.metrics(asks, now).unwrap(), metrics);
}

#[test]
fn a_switch_is_one_of_the_pcpu_and_of_the_vcpu() {
    let s = scheduler(1, PolicyKind::RoundRobin);
    let ids = [0; 2].map(|_| s.add(Params::default(), 0).unwrap());
    let mut now = 0;
    let mut turn = || {
        let id = s.pick(0, now).run.unwrap().id;
        now += SLICE;
        s.stop(0, Stop::Interrupted, now);
        id
    };
    s.wake(ids[0], 0);
    // Alone it is dispatched again and again, in nobody's place.
    let mut order: std::vec::Vec<_> = (0..5).map(|_| turn()).collect();
    assert_eq!(order, [ids[0]; 5]);
    s.wake(ids[1], 5 * SLICE);
    order.extend((0..10).map(|_| turn()));
    let changes = 1 + order.windows(2).filter(|two| two[0] != two[1]).count() as u64;
    assert!(changes > 5);
    let of = |id| s.metrics(id, now).unwrap();
    assert_eq!(of(ids[0]).dispatches + of(ids[1]).dispatches, 15);
    assert_eq!(of(ids[0]).switches + of(ids[1]).switches, changes);
    assert_eq!(s.pcpu_metrics(0, now).unwrap().switches, changes);
}

#[test]
fn a_pool_can_change_its_policy() {
    let pools = [PolicyKind::Fair, PolicyKind::Fcfs].map(|policy| Pool {
        cpus: CpuSet::of(usize::from(policy == PolicyKind::Fcfs)),
        policy,
        slice: SLICE,
    });
    let s = Scheduler::new(2, 16, &pools);
    let ids: [EntityId; 6] = core::array::from_fn(|n| {
        let pool = PoolId(u8::from(n >= 4));
        s.add(
            Params {
                pool,
                ..Params::default()
            },
            0,
        )
        .unwrap()
    });
    ids.iter().for_each(|&id| _ = s.wake(id, 0));
    for kind in PolicyKind::ALL {
        let running = s.pick(0, 0).run.unwrap().id;
        assert_eq!(
            s.set_policy(PoolId(0), kind, 2 * SLICE, 1),
            Ok(CpuSet::of(0))
        );
        assert_eq!(
            (s.policy(0), s.policy(1)),
            (Some(kind), Some(PolicyKind::Fcfs))
        );
        assert!(s.run_until(0) <= 1);
        assert_eq!(s.state(running), Some(State::Running { pcpu: 0 }));
        s.stop(0, Stop::Interrupted, 2);
        let mut seen = Vec::new();
        for _ in 0..4 {
            let id = s.pick(0, 2).run.unwrap().id;
            assert!(ids[..4].contains(&id) && !seen.contains(&id));
            seen.push(id);
            s.stop(0, Stop::Blocked { until: None }, 2);
        }
        seen.iter().for_each(|&id| _ = s.wake(id, 3));
    }
    assert!(s.set_policy(PoolId(2), PolicyKind::Fair, 1, 0).is_err());
}

#[test]
fn others_take_over_while_a_pcpu_does_something_else() {
    let s = scheduler(2, PolicyKind::Fair);
    let ids: [EntityId; 2] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    for pcpu in [0, 1] {
        assert_eq!(s.pick(pcpu, 0).run, None);
    }
    let home = s.home_of(ids[0]).unwrap();
    let other = 1 - home;
    assert_eq!(s.go_away(home), None);
    assert_eq!(s.wake(ids[0], 1).kick, Some(other));
    assert_eq!(s.pick(other, 1).run.unwrap().id, ids[0]);
    s.stop(other, Stop::Blocked { until: None }, 2);
    for pcpu in [home, other] {
        assert_eq!(s.pick(pcpu, 2).run, None);
    }
    assert_eq!(s.wake(ids[0], 3).kick, Some(other), "where it was last");
}

#[test]
fn a_pcpu_that_runs_nothing_gives_its_entities_away() {
    let s = scheduler(2, PolicyKind::Fair);
    let ids: [EntityId; 4] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    let pinned = Params {
        affinity: CpuSet::of(1),
        ..Params::default()
    };
    let stuck = s.add(pinned, 0).unwrap();
    assert_eq!(s.pick(0, 0).run, None, "it idles, and is told");
    assert_eq!(s.pick(1, 0).run, None, "this one is not");
    ids.iter().for_each(|&id| _ = s.wake(id, 0));
    assert_eq!(s.take_offline(1, 1), CpuSet::of(0));
    assert_eq!(s.idle(), CpuSet::of(0));
    for _ in ids {
        assert!(s.pick(0, 1).run.is_some());
        s.stop(0, Stop::Blocked { until: None }, 1);
    }
    assert_eq!(s.pcpu_metrics(1, 1).unwrap().entities, 1);
    assert_eq!(s.state(stuck), Some(State::Blocked { until: None }));
    assert!(s.add(pinned, 1).is_err());
}

#[test]
fn time_is_accounted_for() {
    let s = scheduler(1, PolicyKind::Fair);
    let add = |guest| {
        (
            s.add(
                Params {
                    cap: Some(50),
                    ..Params::default()
                },
                0,
            )
            .unwrap(),
            guest,
        )
    };
    let guests = [
        add(Guest::Spins),
        add(Guest::Works {
            run: MS,
            sleep: 3 * MS,
        }),
        add(Guest::Spins),
    ];
    let end = 3_000 * MS;
    simulate(&s, &guests, end);
    let mut host = Metrics::default();
    for (id, _) in guests {
        let m = s.metrics(id, end).unwrap();
        assert_eq!(m.run + m.wait + m.throttled + m.blocked, end);
        host.add(&m);
    }
    assert_eq!(host.run, s.pcpu_metrics(0, end).unwrap().busy);
    assert!(host.throttled > 0 && host.migrations == 0);
}

#[test]
fn who_is_readied_by_its_own_deadline_is_told_from_who_is_woken() {
    let s = scheduler(1, PolicyKind::Fair);
    let a = s.add(Params::default(), 0).unwrap();
    s.wake(a, 5);
    assert_eq!(s.pick(0, 9).run.unwrap().timer, None);
    s.stop(0, Stop::Blocked { until: Some(100) }, 20);
    // It is readied by the look that finds the deadline passed, and runs at once.
    assert_eq!(s.pick(0, 130).run.unwrap().timer, Some(0));
    // Interrupted, it has only gone on waiting.
    s.stop(0, Stop::Interrupted, 140);
    assert_eq!(s.pick(0, 141).run.unwrap().timer, None);
    s.stop(0, Stop::Blocked { until: Some(500) }, 150);
    // An event comes before its deadline.
    s.wake(a, 160);
    assert_eq!(s.pick(0, 161).run.unwrap().timer, None);
    // Behind another, that its deadline readied it is still known.
    let b = s.add(Params::default(), 161).unwrap();
    s.stop(0, Stop::Blocked { until: Some(200) }, 170);
    s.wake(b, 171);
    s.pick(0, 172);
    s.expire(0, 205);
    s.stop(0, Stop::Blocked { until: None }, 225);
    assert_eq!(s.pick(0, 225).run.unwrap().timer, Some(20));
}
