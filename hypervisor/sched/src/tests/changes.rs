//! What an operator changes while guests run, and what pCPUs do meanwhile: it holds at once, and nobody pays for it for long.

use super::*;

/// Two spinners alike on one pCPU, of which the second has just begun a turn at the tick that is returned.
fn second_runs(policy: PolicyKind, params: [Params; 2]) -> (Scheduler, [EntityId; 2], u64) {
    let s = scheduler(1, policy);
    let ids = params.map(|params| s.add(params, 0).unwrap());
    ids.iter().for_each(|&id| _ = s.wake(id, 0));
    let end = 100 * SLICE;
    all_spin(&s, 0, end);
    // Not all policies give it one in time.
    s.pause(ids[0], end);
    assert_eq!(s.pick(0, end).run.unwrap().id, ids[1]);
    s.resume(ids[0], end);
    (s, ids, end)
}

/// What stands in one policy's order means nothing in another's, also for the one that runs: the virtual time of low
/// weights is many times the time of the clock.
#[test]
fn a_new_policy_starves_nobody_who_runs() {
    for from in PolicyKind::ALL {
        for to in PolicyKind::ALL.into_iter().filter(|to| to.never_starves()) {
            let (s, ids, now) = second_runs(from, [weighing(1); 2]);
            s.set_policy(PoolId(0), to, SLICE, now + MS).unwrap();
            s.stop(0, Stop::Interrupted, now + MS);
            let before = ids.map(|id| ran(&s, id, now + MS));
            let end = now + MS + 400 * SLICE;
            all_spin(&s, now + MS, end);
            for (id, before) in ids.into_iter().zip(before) {
                let had = (ran(&s, id, end) - before) / SLICE;
                assert!(had >= 150, "{from} to {to}: {id:?} had {had} of 400 slices");
            }
        }
    }
}

#[test]
fn who_becomes_urgent_while_it_runs_is_so_at_once() {
    let level = |priority| Params {
        priority,
        ..Params::default()
    };
    let (s, ids, now) = second_runs(PolicyKind::Priority, [level(10), level(0)]);
    s.set_params(&ids[1..], level(31), now + 1).unwrap();
    s.stop(0, Stop::Interrupted, now + 1);
    assert_eq!(s.pick(0, now + 1).run.unwrap().id, ids[1]);
    // And the other way round.
    s.set_params(&ids[1..], level(0), now + 2).unwrap();
    s.stop(0, Stop::Interrupted, now + 2);
    assert_eq!(s.pick(0, now + 2).run.unwrap().id, ids[0]);
}

#[test]
fn who_holds_less_while_it_runs_comes_sooner_at_once() {
    let holding = |memory| Params {
        demand: Demand {
            memory,
            processors: 0,
        },
        ..Params::default()
    };
    let (s, ids, now) = second_runs(
        PolicyKind::Requirement,
        [holding(900_000), holding(950_000)],
    );
    s.set_params(&ids[1..], holding(0), now + 1).unwrap();
    s.stop(0, Stop::Interrupted, now + 1);
    assert_eq!(s.pick(0, now + 1).run.unwrap().id, ids[1]);
}

/// A turn is a hundred times as much virtual time for the least weight as for the usual one.
#[test]
fn who_gets_a_greater_weight_has_paid_for_its_turn_in_time() {
    let states: [fn(&Scheduler, EntityId, u64); 3] = [
        // It waits, it runs, it sleeps.
        |s, _, now| _ = s.stop(0, Stop::Interrupted, now),
        |_, _, _| (),
        |s, _, now| _ = s.stop(0, Stop::Blocked { until: None }, now),
    ];
    for (n, state) in states.into_iter().enumerate() {
        let (s, ids, begun) = second_runs(PolicyKind::Fair, [weighing(100), weighing(1)]);
        let now = begun + SLICE;
        state(&s, ids[1], now);
        s.set_params(&ids[1..], weighing(10_000), now).unwrap();
        s.stop(0, Stop::Interrupted, now);
        s.wake(ids[1], now);
        let before = ran(&s, ids[1], now);
        all_spin(&s, now, now + 10 * SLICE);
        let had = ran(&s, ids[1], now + 10 * SLICE) - before;
        assert!(had >= 8 * SLICE, "{n}: {had}");
    }
}

/// A cap's budget is half a slice: it follows the slice, so that a cap is kept within the slice that there is.
#[test]
fn caps_follow_the_slice() {
    for (before, after) in [(10 * SLICE, SLICE / 10), (SLICE / 10, SLICE)] {
        // It has its budget, or is held up, when the slice changes.
        for change in [2 * SLICE, 47 * SLICE + 3] {
            let s = scheduler(1, PolicyKind::Fair);
            let set_slice = |slice, now| {
                s.set_policy(PoolId(0), PolicyKind::Fair, slice, now)
                    .unwrap();
            };
            set_slice(before, 0);
            let capped = Params {
                cap: Some(20),
                ..Params::default()
            };
            let id = s.add(capped, 0).unwrap();
            s.wake(id, 0);
            all_spin(&s, 0, change);
            set_slice(after, change);
            // What it had ahead of time with the longer one is made up for by then.
            let mut now = change + 50 * SLICE;
            all_spin(&s, change, now);
            assert!(ran(&s, id, now) <= now / 5 + before.max(after));
            for _ in 0..50 {
                let had = ran(&s, id, now);
                all_spin(&s, now, now + 10 * after);
                now += 10 * after;
                let had = ran(&s, id, now) - had;
                assert!(had.abs_diff(2 * after) <= after, "{had} of {}", 10 * after);
            }
        }
    }
}

/// Three pCPUs: the one that is called may not run what waits.
#[test]
fn who_goes_away_has_one_told_that_may_run_what_waits() {
    let s = scheduler(3, PolicyKind::Fair);
    let params = Params {
        affinity: CpuSet::of(0).or(CpuSet::of(2)),
        ..Params::default()
    };
    let id = s.add(params, 0).unwrap();
    s.wake(id, 0);
    let runs_on = s.home_of(id).unwrap();
    assert_eq!((runs_on, s.pick(0, 0).run.unwrap().id), (0, id));
    for pcpu in [1, 2] {
        assert_eq!(s.pick(pcpu, 0).run, None);
    }
    assert_eq!(s.stop(0, Stop::Interrupted, 1), None, "it is about to pick");
    assert_eq!(s.go_away(0), Some(2));
    assert_eq!(s.pick(2, 1).run.unwrap().id, id);
}

/// Likewise if it was interrupted for somebody that waits elsewhere.
#[test]
fn who_goes_away_instead_of_taking_what_it_was_told_of_tells_another() {
    let s = scheduler(3, PolicyKind::Fair);
    let ids: [EntityId; 2] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    s.wake(ids[0], 0);
    let home = s.home_of(ids[0]).unwrap();
    s.pick(home, 0);
    let affine = Params {
        affinity: CpuSet::ALL,
        ..Params::default()
    };
    s.set_params(
        &ids[1..],
        Params {
            affinity: CpuSet::of(home),
            ..affine
        },
        0,
    )
    .unwrap();
    s.set_params(&ids[1..], affine, 0).unwrap();
    let others: Vec<usize> = (0..3).filter(|&pcpu| pcpu != home).collect();
    for &pcpu in &others {
        assert_eq!(s.pick(pcpu, 0).run, None);
    }
    assert_eq!(s.wake(ids[1], 1).kick, Some(others[0]));
    assert_eq!(s.go_away(others[0]), Some(others[1]));
    assert_eq!(s.pick(others[1], 1).run.unwrap().id, ids[1]);
}

/// Given a pCPU that then turns out to be none while it runs elsewhere, it does not stay where it may not be.
#[test]
fn who_is_sent_to_a_pcpu_that_is_none_does_not_run_elsewhere() {
    let s = scheduler(2, PolicyKind::Fair);
    let id = s.add(Params::default(), 0).unwrap();
    s.wake(id, 0);
    assert_eq!(s.pick(0, 0).run.unwrap().id, id);
    let there = Params {
        affinity: CpuSet::of(1),
        ..Params::default()
    };
    s.set_params(&[id], there, 1).unwrap();
    s.take_offline(1, 2);
    s.stop(0, Stop::Interrupted, 3);
    assert_eq!((s.pick(0, 3).run, s.home_of(id)), (None, Some(1)));
    // It runs again when it may be where there is one.
    s.set_params(&[id], Params::default(), 4).unwrap();
    assert_eq!(s.pick(0, 4).run.unwrap().id, id);
}

proptest! {
    #![proptest_config(draw(48))]

    /// Under policies that starve nobody, nobody starves for what was changed: other policies, slices, pools and parameters.
    #[test]
    fn changes_starve_nobody(
        changes in prop::collection::vec((0usize..5, 0u64..7, any::<u16>(), 1..5 * SLICE), 1..40),
    ) {
        let fair: Vec<_> = PolicyKind::ALL.into_iter().filter(|kind| kind.never_starves()).collect();
        let pools = [CpuSet::first(2), CpuSet::of(2)]
            .map(|cpus| Pool { cpus, policy: PolicyKind::Fair, slice: SLICE });
        let s = Scheduler::new(3, 8, &pools);
        let mut params = [weighing(1); 5];
        params.iter_mut().for_each(|params| params.demand.memory = 500_000);
        let ids = params.map(|params| s.add(params, 0).unwrap());
        ids.iter().for_each(|&id| _ = s.wake(id, 0));
        let mut now = 0;
        for (n, kind, value, passes) in changes {
            all_spin(&s, now, now + passes);
            now += passes;
            for pcpu in 0..3 {
                s.pick(pcpu, now);
            }
            let value = u32::from(value);
            let wanted = &mut params[n];
            match kind {
                0 => wanted.weight = 1 + value % 4,
                1 => wanted.priority = (value % 32) as u8,
                2 => wanted.pool = PoolId((value % 2) as u8),
                3 => wanted.cap = (value % 2 == 0).then_some(20 + (value % 80) as u8),
                4 => wanted.demand.memory = 500_000 + value * 2,
                _ => {
                    let policy = fair[value as usize % fair.len()];
                    let slice = SLICE >> (value / 16 % 3);
                    s.set_policy(PoolId((kind % 2) as u8), policy, slice, now).unwrap();
                }
            }
            s.set_params(&ids[n..=n], *wanted, now).unwrap();
            for pcpu in 0..3 {
                s.stop(pcpu, Stop::Interrupted, now);
            }
        }
        let before = ids.map(|id| ran(&s, id, now));
        let end = now + 400 * SLICE;
        all_spin(&s, now, end);
        for (n, id) in ids.into_iter().enumerate() {
            prop_assert!(ran(&s, id, end) > before[n], "{:?}", params[n]);
        }
    }
}
