//! Reservations: admission, what they give, and what happens when they change while guests run.

use super::*;

fn reserving(budget: u64, period: u64) -> Params {
    Params {
        reservation: Some(Reservation { budget, period }),
        ..Params::default()
    }
}

#[test]
fn a_reservation_is_kept_beside_spinners_and_not_exceeded() {
    let s = scheduler(1, PolicyKind::Reservation);
    let reservation = Reservation {
        budget: 2 * MS,
        period: 10 * MS,
    };
    let reserved = Params {
        reservation: Some(reservation),
        ..Params::default()
    };
    let real_time = s.add(reserved, 0).unwrap();
    let greedy = s.add(reserved, 0).unwrap();
    let mut guests = spinners(&s, &[100, 100, 100]);
    guests.push((greedy, Guest::Spins));
    guests.push((
        real_time,
        Guest::Works {
            run: 3 * MS / 2,
            sleep: 17 * MS / 2,
        },
    ));
    let end = 10_000 * MS;
    simulate(&s, &guests, end);
    let m = s.metrics(real_time, end).unwrap();
    assert!(m.bursts >= 900, "{} jobs", m.bursts);
    assert!(m.response_max <= 2 * MS, "{}", m.response_max);
    let greedy = s.metrics(greedy, end).unwrap().run;
    assert!(greedy.abs_diff(end / 5) <= SLICE, "{greedy}");
    let rest: u64 = run_times(&s, &guests[..3], end).iter().sum();
    assert!(rest >= end / 2, "{rest}");
}

#[test]
fn more_than_there_is_cannot_be_reserved() {
    let s = scheduler(2, PolicyKind::Reservation);
    let of = |percent: u64| Params {
        reservation: Some(Reservation {
            budget: percent * MS,
            period: 100 * MS,
        }),
        ..Params::default()
    };
    let first = s.add(of(60), 0).unwrap();
    s.add(of(60), 0).unwrap();
    let refused = Refusal::Overcommitted {
        wanted: 400_000,
        left: 350_000,
    };
    assert_eq!(s.add(of(40), 0), Err(refused));
    s.add(of(35), 0).unwrap();
    assert_eq!(
        s.pcpu_metrics(0, 0).unwrap().reserved + s.pcpu_metrics(1, 0).unwrap().reserved,
        1_550_000
    );
    // A change counts without what it had; one that does not fit changes nothing.
    assert!(s.set_params(&[first], of(96), 0).is_err());
    assert_eq!(s.params(first), Some(of(60)));
    assert!(s.remove(first, 0));
    assert!(s.add(of(60), 0).is_ok());
    let fair = scheduler(1, PolicyKind::Fair);
    assert_eq!(
        fair.add(of(10), 0),
        Err(Refusal::NoReservations(PolicyKind::Fair))
    );
}

/// A host of one pCPU with a spinner, and another one in this state at a millisecond past the start.
fn in_state(wanted: fn(State) -> bool) -> (Scheduler, EntityId) {
    let s = scheduler(1, PolicyKind::Reservation);
    let id = s.add(reserving(MS / 2, 1000 * MS), 0).unwrap();
    let other = s.add(Params::default(), 0).unwrap();
    s.wake(other, 0);
    let is = || wanted(s.state(id).unwrap());
    if is() {
        return (s, id);
    }
    s.wake(id, 0);
    if is() {
        return (s, id);
    }
    assert_eq!(s.pick(0, 0).run.unwrap().id, id, "its deadline is earlier");
    if is() {
        return (s, id);
    }
    s.stop(0, Stop::Interrupted, MS);
    if !is() {
        s.pause(id, MS);
    }
    assert!(is());
    (s, id)
}

#[test]
fn a_change_holds_at_once_whatever_the_entity_does() {
    let states: [fn(State) -> bool; 5] = [
        |state| matches!(state, State::Blocked { .. }),
        |state| state == State::Waiting,
        |state| matches!(state, State::Running { .. }),
        |state| matches!(state, State::Throttled { .. }),
        |state| state == State::Held,
    ];
    for (n, state) in states.into_iter().enumerate() {
        for wanted in [reserving(5 * MS, 10 * MS), Params::default()] {
            let (s, id) = in_state(state);
            let kicks = s.set_params(&[id], wanted, MS).unwrap();
            assert!(kicks.contains(0), "{n}: what runs is to be stopped");
            assert_eq!(s.params(id), Some(wanted));
            s.stop(0, Stop::Interrupted, MS);
            s.resume(id, MS);
            s.wake(id, MS);
            let before = ran(&s, id, MS);
            all_spin(&s, MS, 101 * MS);
            // Half of the time, by its reservation or by its weight; its first budget may be in part used up.
            let ran = ran(&s, id, 101 * MS) - before;
            assert!(ran.abs_diff(50 * MS) <= 5 * MS, "{n}: ran {ran} ns");
        }
    }
}

#[test]
fn who_runs_goes_where_there_is_room_for_its_reservation() {
    let s = scheduler(2, PolicyKind::Reservation);
    let first = s.add(reserving(8 * MS, 10 * MS), 0).unwrap();
    let pinned = Params {
        affinity: CpuSet::of(0),
        ..Params::default()
    };
    let id = s.add(pinned, 0).unwrap();
    assert_eq!(s.home_of(first), Some(0));
    s.wake(id, 0);
    assert_eq!(s.pick(0, 0).run.unwrap().id, id);
    assert_eq!(s.pick(1, 0).run, None);
    let half = reserving(5 * MS, 10 * MS);
    let stays = Params {
        affinity: CpuSet::of(0),
        ..half
    };
    let refused = Refusal::Overcommitted {
        wanted: 500_000,
        left: 150_000,
    };
    assert_eq!(s.set_params(&[id], stays, 1), Err(refused));
    assert_eq!((s.params(id), s.reserved(0)), (Some(pinned), 800_000));
    assert_eq!(s.set_params(&[id], half, 1), Ok(CpuSet::of(0)));
    assert_eq!((s.reserved(0), s.reserved(1)), (800_000, 500_000));
    assert_eq!(s.state(id), Some(State::Running { pcpu: 0 }));
    // It takes its deadline with it, which the pCPU there has to look at.
    let kick = s.stop(0, Stop::Blocked { until: Some(MS) }, 2);
    assert_eq!((kick, s.home_of(id)), (Some(1), Some(1)));
    assert_eq!(s.next_deadline(1), Some(MS));
    assert_eq!(s.pick(1, MS).run.unwrap().id, id);
    // What it has is counted where it is.
    assert_eq!(
        s.set_params(&[id], Params::default(), MS),
        Ok(CpuSet::of(1))
    );
    assert_eq!((s.reserved(0), s.reserved(1)), (800_000, 0));
}

#[test]
fn all_vcpus_of_a_vm_are_admitted_or_none() {
    let s = scheduler(2, PolicyKind::Reservation);
    let ids: [EntityId; 3] = core::array::from_fn(|_| s.add(Params::default(), 0).unwrap());
    let wanted = reserving(6 * MS, 10 * MS);
    let refused = Refusal::Overcommitted {
        wanted: 600_000,
        left: 350_000,
    };
    assert_eq!(s.set_params(&ids, wanted, 0), Err(refused));
    assert!(
        ids.iter()
            .all(|&id| s.params(id) == Some(Params::default()))
    );
    assert_eq!((s.reserved(0), s.reserved(1)), (0, 0));
    s.set_params(&ids[..2], wanted, 0).unwrap();
    assert_eq!((s.reserved(0), s.reserved(1)), (600_000, 600_000));
    // Each gives back what it had before it asks.
    s.set_params(&ids[..2], reserving(9 * MS, 10 * MS), 0)
        .unwrap();
    assert!(s.set_params(&ids, reserving(4 * MS, 10 * MS), 0).is_ok());
    assert_eq!(s.reserved(0) + s.reserved(1), 1_200_000);
    assert!(s.remove(ids[2], 0));
    assert_eq!((s.reserved(0), s.reserved(1)), (400_000, 400_000));
}

#[test]
fn a_pool_with_reservations_keeps_its_policy() {
    let s = scheduler(1, PolicyKind::Reservation);
    let id = s.add(reserving(1, 2), 0).unwrap();
    let fair = || s.set_policy(PoolId(0), PolicyKind::Fair, SLICE, 0);
    assert_eq!(fair(), Err(Refusal::HasReservations));
    assert_eq!(s.policy(0), Some(PolicyKind::Reservation));
    let slice = s.set_policy(PoolId(0), PolicyKind::Reservation, MS, 0);
    assert!(slice.is_ok());
    s.set_params(&[id], Params::default(), 0).unwrap();
    assert!(fair().is_ok());
    let refused = Refusal::NoReservations(PolicyKind::Fair);
    assert_eq!(s.set_params(&[id], reserving(1, 2), 0), Err(refused));
}

#[test]
fn a_pcpu_is_told_when_one_without_budget_is_woken() {
    let s = scheduler(1, PolicyKind::Reservation);
    let id = s.add(reserving(MS, 10 * MS), 0).unwrap();
    s.wake(id, 0);
    s.pick(0, 0);
    // It has used its budget up and blocks in the same moment.
    s.stop(0, Stop::Blocked { until: None }, MS);
    assert_eq!(s.pick(0, MS).run, None);
    assert_eq!(s.next_deadline(0), None);
    let wake = s.wake(id, 2 * MS);
    assert_eq!((wake.outcome, wake.kick), (Outcome::Nothing, Some(0)));
    assert_eq!(s.next_deadline(0), Some(10 * MS));
    assert_eq!(s.pick(0, 10 * MS).run.unwrap().id, id);
    // Likewise beside one that runs: it is stopped in time.
    let other = s.add(Params::default(), 0).unwrap();
    s.wake(other, 10 * MS);
    s.stop(0, Stop::Blocked { until: None }, 11 * MS);
    assert_eq!(s.pick(0, 11 * MS).run.unwrap().id, other);
    assert_eq!(s.wake(id, 12 * MS).kick, Some(0));
    assert_eq!(s.run_until(0), 20 * MS);
}

#[test]
fn who_gives_its_reservation_back_is_owed_nothing() {
    let s = scheduler(1, PolicyKind::Reservation);
    let ids = [s.add(Params::default(), 0), s.add(Params::default(), 0)].map(Result::unwrap);
    ids.iter().for_each(|&id| _ = s.wake(id, 0));
    all_spin(&s, 0, 100 * MS);
    // It sleeps for long, or takes much: by its reservation.
    s.set_params(&ids[..1], reserving(MS, 100 * MS), 100 * MS)
        .unwrap();
    all_spin(&s, 100 * MS, 10_100 * MS);
    // One of them runs while it changes, and while it does not.
    for start in [10_100 * MS, 20_100 * MS] {
        if start > 10_100 * MS {
            s.set_params(&ids[..1], reserving(90 * MS, 100 * MS), start)
                .unwrap();
            all_spin(&s, start, start + 5_000 * MS);
        }
        let now = start + 5_000 * MS;
        s.pick(0, now);
        s.set_params(&ids[..1], Params::default(), now).unwrap();
        s.stop(0, Stop::Interrupted, now);
        let before = ids.map(|id| ran(&s, id, now));
        all_spin(&s, now, now + 1_000 * MS);
        for (id, before) in ids.into_iter().zip(before) {
            let ran = ran(&s, id, now + 1_000 * MS) - before;
            assert!(ran.abs_diff(500 * MS) <= 2 * SLICE, "{id:?} ran {ran} ns");
        }
    }
}

proptest! {
    #![proptest_config(draw(100))]

    /// However often an operator changes one reservation: another one gets its budget in each of its periods, and the changed
    /// one gets no more than the largest that it had would have given it, and a budget.
    #[test]
    fn changes_cost_nobody_what_is_kept_for_him(
        changes in prop::collection::vec((1u64..=60, 0u64..3, 0..30 * MS), 1..60),
    ) {
        const PERIOD: u64 = 10 * MS;
        const BUDGET: u64 = 3 * MS;
        let s = scheduler(1, PolicyKind::Reservation);
        let kept = s.add(reserving(BUDGET, PERIOD), 0).unwrap();
        let changed = s.add(reserving(MS, PERIOD), 0).unwrap();
        let spinner = s.add(Params::default(), 0).unwrap();
        for id in [kept, changed, spinner] {
            s.wake(id, 0);
        }
        let mut now = 0;
        let mut utilization = 100_000;
        let mut longest = MS;
        for (percent, length, passes) in changes {
            let end = now + passes;
            // From period to period, so that each can be looked at.
            while now < end {
                let next = end.min((now / PERIOD + 1) * PERIOD);
                all_spin(&s, now, next);
                now = next;
                if now % PERIOD == 0 {
                    let has = ran(&s, kept, now);
                    prop_assert!(has >= now / PERIOD * BUDGET, "{} at {}", has, now);
                }
            }
            let has = ran(&s, changed, now);
            let most = now as u128 * u128::from(utilization) / u128::from(MILLION);
            prop_assert!(u128::from(has) <= most + u128::from(longest), "{} at {}", has, now);
            let period = [2 * MS, 10 * MS, 50 * MS][length as usize];
            let params = reserving(percent * period / 100, period);
            utilization = utilization.max(params.reservation.unwrap().utilization());
            longest = longest.max(params.reservation.unwrap().budget);
            s.set_params(&[changed], params, now).unwrap();
        }
    }
}
