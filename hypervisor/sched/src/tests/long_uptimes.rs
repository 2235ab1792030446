//! Counts that wrap: what lower weights pay passes the end of 64 bits within months.

use super::*;

/// So long that a hundred slices of a low weight are more than 63 bits of virtual time.
const LONG: u64 = 1 << 50;

/// Both spin on one pCPU for 2,000 slices; how much CPU time each had.
fn share(policy: PolicyKind, params: [Params; 2]) -> [u64; 2] {
    let pool = Pool {
        cpus: CpuSet::of(0),
        policy,
        slice: LONG,
    };
    let s = Scheduler::new(1, 2, &[pool]);
    let ids = params.map(|params| s.add(params, 0).unwrap());
    ids.iter().for_each(|&id| _ = s.wake(id, 0));
    let mut now = 0;
    for _ in 0..2_000 {
        now = s.pick(0, now).run.unwrap().until;
        s.stop(0, Stop::Interrupted, now);
    }
    ids.map(|id| s.metrics(id, now).unwrap().run)
}

#[test]
fn weights_hold_when_virtual_time_wraps() {
    let [one, three] = share(PolicyKind::Fair, [weighing(1), weighing(3)]);
    assert!(three.abs_diff(3 * one) <= one / 50, "{one}, {three}");
}

#[test]
fn allocations_hold_when_what_is_paid_wraps() {
    let holding = |memory| Params {
        demand: Demand {
            memory,
            processors: 0,
        },
        ..Params::default()
    };
    let [one, three] = share(PolicyKind::Allocation, [holding(1000), holding(3000)]);
    assert!(three.abs_diff(3 * one) <= one / 50, "{one}, {three}");
}
