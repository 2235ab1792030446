//! Entities that come to another pCPU: whom they interrupt there, and that they owe nothing for what they had elsewhere.

use super::*;

fn on(pcpu: usize, priority: u8) -> Params {
    Params {
        affinity: CpuSet::of(pcpu),
        priority,
        ..Params::default()
    }
}

#[test]
fn an_urgent_one_that_is_moved_interrupts_whom_it_comes_before() {
    let s = scheduler(2, PolicyKind::Priority);
    let [first, urgent] = [(); 2].map(|()| s.add(on(0, 31), 0).unwrap());
    let least = s.add(on(1, 0), 0).unwrap();
    for id in [first, urgent, least] {
        s.wake(id, 0);
    }
    assert_eq!(s.pick(0, 0).run.unwrap().id, first);
    assert_eq!(s.pick(1, 0).run.unwrap().id, least);
    // Behind one as urgent as it is, it is sent where the least urgent runs.
    assert_eq!(s.set_params(&[urgent], on(1, 31), MS), Ok(CpuSet::of(1)));
    assert!(s.run_until(1) <= MS, "{}", s.run_until(1));
    s.stop(1, Stop::Interrupted, MS);
    assert_eq!(s.pick(1, MS).run.unwrap().id, urgent);
    // And back, when it has stopped there: where one runs that it does not come before.
    assert_eq!(
        s.set_params(&[urgent], on(0, 31), 2 * MS),
        Ok(CpuSet::of(1))
    );
    assert_eq!(s.stop(1, Stop::Interrupted, 2 * MS), None);
    assert!(s.run_until(0) > 2 * MS);
    assert_eq!(s.pick(1, 2 * MS).run.unwrap().id, least);
}

#[test]
fn who_has_paid_elsewhere_owes_nothing_where_it_comes_to() {
    let s = scheduler(2, PolicyKind::Allocation);
    let here = s.add(on(1, 0), 0).unwrap();
    let comes = s.add(on(0, 0), 0).unwrap();
    s.wake(comes, 0);
    let mut now = 0;
    for _ in 0..1_000 {
        now = s.pick(0, now).run.unwrap().until;
        s.stop(0, Stop::Interrupted, now);
    }
    s.pick(0, now);
    s.stop(0, Stop::Blocked { until: None }, now);
    // It is moved while it sleeps.
    assert_eq!(s.set_params(&[comes], on(1, 0), now), Ok(CpuSet::EMPTY));
    s.wake(here, now);
    s.wake(comes, now);
    let begin = now;
    for _ in 0..10 {
        now = s.pick(1, now).run.unwrap().until;
        s.stop(1, Stop::Interrupted, now);
    }
    let had = s.metrics(comes, now).unwrap().run - begin;
    assert!(had.abs_diff(5 * SLICE) <= SLICE, "{had}");
}

/// The least and the most that these entities, all alike, get of their part, in percent, while each is due 20 slices.
fn parts(s: &Scheduler, ids: &[EntityId], now: &mut u64) -> (u64, u64) {
    let due = 20 * SLICE;
    let before: Vec<_> = ids.iter().map(|id| ran(s, *id, *now)).collect();
    let end = *now + due * ids.len() as u64 / s.pcpus() as u64;
    all_spin(s, *now, end);
    *now = end;
    let after = ids.iter().map(|id| ran(s, *id, end));
    let parts = after
        .zip(before)
        .map(|(after, before)| (after - before) * 100 / due);
    let parts: Vec<_> = parts.collect();
    (*parts.iter().min().unwrap(), *parts.iter().max().unwrap())
}

#[test]
fn where_many_more_want_to_run_than_there_are_pcpus_all_do() {
    let pool = Pool {
        cpus: CpuSet::first(2),
        policy: PolicyKind::Fair,
        slice: SLICE,
    };
    let s = Scheduler::new(2, 256, &[pool]);
    let ids: Vec<_> = (0..189)
        .map(|_| s.add(Params::default(), 0).unwrap())
        .collect();
    // They come one after the other, so that the first have more to begin with.
    let mut now = 0;
    for id in &ids {
        s.wake(*id, now);
        let next = now + 2 * SLICE;
        all_spin(&s, now, next);
        now = next;
    }
    // That is made up for, and nobody pays with more than half of its part.
    for _ in 0..2 {
        let (least, most) = parts(&s, &ids, &mut now);
        assert!(least >= 50 && most <= 200, "{least} to {most} %");
    }
    for _ in 0..4 {
        let (least, most) = parts(&s, &ids, &mut now);
        assert!(least >= 75 && most <= 125, "{least} to {most} %");
    }
    // Half of them go.
    let (stay, go) = ids.split_at(96);
    for id in go {
        s.pause(*id, now);
        assert!(s.remove(*id, now));
    }
    for _ in 0..4 {
        let (least, most) = parts(&s, stay, &mut now);
        assert!(least >= 75 && most <= 125, "{least} to {most} %");
    }
}
