//! What every policy promises, tried with random workloads in the simulator.
//!
//! The cases are drawn from a fixed seed, so that a run of these tests is like any other; `PROPTEST_RNG_SEED` and
//! `PROPTEST_CASES` try others. Slices are 1 ms and costs are 0, so that promises can be checked exactly.

mod common;

use common::{config, draw, params, plain, run_between, spin, spinners, vm, workload};
use proptest::prelude::*;
use sched::{
    CpuSet, Demand, Params, PolicyKind, PoolId, RESERVABLE, Reservation, SLICES_PER_LEVEL,
};
use sched_sim::{
    MS, Ns, US,
    engine::{Config, simulate},
    rng::Span,
    stats::{Interval, Outcome, entitlements},
    workload::{Arrival, Program, Step, VcpuRef, Vm, Waker, Workload},
};

const SLICE: Ns = MS;

/// The policies under which nobody starves.
fn starving_nobody() -> impl Iterator<Item = PolicyKind> {
    let all = PolicyKind::ALL.into_iter();
    all.filter(|policy| policy.never_starves())
}

proptest! {
    #![proptest_config(draw(32))]

    /// No processor idles while somebody waits that it may run.
    #[test]
    fn no_work_waits_while_a_processor_idles(workload in workload()) {
        for policy in PolicyKind::ALL {
            let outcome = simulate(&workload, policy, &config(SLICE));
            prop_assert_eq!(outcome.idle_while_waiting, 0, "{}", policy);
        }
    }

    /// Nobody is lost, runs twice at a time, or shares a processor with another; the scheduler's own account
    /// of it is right.
    #[test]
    fn everybody_is_in_one_place(workload in workload()) {
        for policy in PolicyKind::ALL {
            let outcome = simulate(&workload, policy, &config(SLICE));
            let mut by_pcpu = outcome.timeline.clone();
            by_pcpu.sort_by_key(|i| (i.pcpu, i.from));
            prop_assert!(by_pcpu.windows(2).all(|w| w[0].pcpu != w[1].pcpu || w[0].to <= w[1].from));
            let mut by_vcpu = outcome.timeline.clone();
            by_vcpu.sort_by_key(|i| (i.vcpu, i.from));
            prop_assert!(by_vcpu.windows(2).all(|w| w[0].vcpu != w[1].vcpu || w[0].to <= w[1].from));
            prop_assert_eq!(outcome.vcpus.len() + outcome.refused.len(), workload.vcpus());
            for vcpu in &outcome.vcpus {
                prop_assert_eq!(run_between(&outcome, vcpu.vcpu, 0, outcome.duration), vcpu.totals.run);
                prop_assert_eq!(vcpu.metrics.run, vcpu.totals.run, "{} {:?}", policy, vcpu);
                prop_assert_eq!(vcpu.metrics.steal(), vcpu.totals.wait, "{} {:?}", policy, vcpu);
                // One that was moved away and back without a run elsewhere is put in its place again.
                let moved = vcpu.totals.switches + vcpu.metrics.migrations;
                let switches = vcpu.totals.switches..=moved;
                prop_assert!(switches.contains(&vcpu.metrics.switches), "{} {:?}", policy, vcpu);
            }
            for job in outcome.jobs.iter().filter(|job| !job.done) {
                prop_assert_eq!(job.end, outcome.duration);
            }
        }
    }

    /// Where the policy promises it, everybody that is ready runs within a bound, whatever the others do.
    #[test]
    fn nobody_starves_where_it_is_promised(mut workload in workload()) {
        workload.duration = 1_500 * MS;
        let vcpus = || workload.vms.iter().flat_map(|vm| vm.vcpus.iter().map(|_| &vm.params));
        let count = workload.vcpus() as u64;
        let ratio = |of: fn(&Params) -> u64| {
            let sum: u64 = vcpus().map(of).sum();
            sum.div_ceil(vcpus().map(of).min().unwrap())
        };
        for policy in starving_nobody() {
            let outcome = simulate(&workload, policy, &config(SLICE));
            let slices = match policy {
                PolicyKind::Fair | PolicyKind::Reservation => 2 * ratio(|p| p.weight.into()),
                PolicyKind::Allocation => {
                    2 * ratio(|p| p.demand.processors.max(p.demand.memory).max(1_000).into())
                }
                PolicyKind::Priority => 31 * SLICES_PER_LEVEL,
                PolicyKind::Requirement => 32,
                _ => 0,
            };
            let bound = (slices + 2 * count) * SLICE;
            for vcpu in &outcome.vcpus {
                prop_assert!(
                    vcpu.totals.longest_wait <= bound,
                    "{}: {:?} waited {} us, bound {} us",
                    policy, vcpu.vcpu, vcpu.totals.longest_wait / US, bound / US
                );
            }
        }
    }

    /// Over any time a capped vCPU gets its cap and a slice at most, under every policy.
    #[test]
    fn a_cap_is_kept_within_a_slice(cap in 1u8..=99, mut others in spinners(0..4), length in 1u64..40) {
        others.vms.push(vm("capped", Params { cap: Some(cap), ..params() }, vec![Program::Spin]));
        let capped = VcpuRef { vm: others.vms.len() - 1, vcpu: 0 };
        let length = length * 10 * MS;
        for policy in PolicyKind::ALL {
            let outcome = simulate(&others, policy, &config(SLICE));
            let most = length * u64::from(cap) / 100 + SLICE;
            for interval in outcome.timeline.iter().filter(|i| i.vcpu == capped) {
                let ran = run_between(&outcome, capped, interval.from, interval.from + length);
                prop_assert!(ran <= most, "{}: {} us of {} us", policy, ran / US, most / US);
            }
            // Alone, or beside fewer than there are processors, it gets its cap.
            if others.vcpus() <= others.pcpus {
                let ran = run_between(&outcome, capped, 0, outcome.duration);
                let due = outcome.duration * u64::from(cap) / 100;
                prop_assert!(ran + 2 * SLICE >= due, "{}: {} us of {} us", policy, ran / US, due / US);
            }
        }
    }

    /// A vCPU with a reservation gets it in each of its periods, and not more than it.
    #[test]
    fn a_reservation_is_kept(parts in 10u64..=90, period in 4u64..40, mut others in spinners(0..6)) {
        let period = period * MS;
        let budget = period * parts / 100;
        let reservation = Some(Reservation { budget, period });
        others.vms.push(vm("reserved", Params { reservation, ..params() }, vec![Program::Spin]));
        let reserved = VcpuRef { vm: others.vms.len() - 1, vcpu: 0 };
        let outcome = simulate(&others, PolicyKind::Reservation, &config(SLICE));
        prop_assert!(outcome.refused.is_empty());
        for number in 0..outcome.duration / period {
            let ran = run_between(&outcome, reserved, number * period, (number + 1) * period);
            prop_assert_eq!(ran, budget, "in period {}", number);
        }
    }

    /// What is admitted meets its deadlines, and what is refused had no room.
    #[test]
    fn admitted_sets_meet_all_deadlines(
        tasks in proptest::collection::vec((2u64..40, 5u64..=70, 0u64..20), 1..8),
        pcpus in 1usize..=3,
        mut busy in spinners(0..4),
    ) {
        busy.pcpus = pcpus;
        busy.duration = 400 * MS;
        let first_task = busy.vms.len();
        for &(period, parts, first) in &tasks {
            let period = period * MS;
            let budget = period * parts / 100;
            let reservation = Some(Reservation { budget, period });
            let program = Program::Periodic {
                first: first * MS,
                period,
                work: Span::Between(budget / 2, budget),
            };
            busy.vms.push(vm("task", Params { reservation, ..params() }, vec![program]));
        }
        let outcome = simulate(&busy, PolicyKind::Reservation, &config(SLICE));
        let missed = outcome.jobs.iter().find(|job| job.missed());
        prop_assert!(missed.is_none(), "{:?}", missed);
        let utilization = |vcpu: VcpuRef| busy.vms[vcpu.vm].params.reservation.unwrap().utilization();
        let admitted = outcome.vcpus.iter().map(|vcpu| vcpu.vcpu).filter(|vcpu| vcpu.vm >= first_task);
        let sum: u64 = admitted.map(utilization).sum();
        prop_assert!(sum <= RESERVABLE * pcpus as u64);
        for &(refused, why) in &outcome.refused {
            let overcommitted = matches!(why, sched::Refusal::Overcommitted { .. });
            prop_assert!(overcommitted);
            if pcpus == 1 {
                prop_assert!(sum + utilization(refused) > RESERVABLE);
            }
        }
    }

    /// On one processor weights give time by them within 2 %.
    #[test]
    fn weights_are_honoured_on_one_processor(weights in proptest::collection::vec(20u32..=400, 2..9)) {
        check_weights(&weights, 1)?;
    }

    /// Also on several: what a vCPU cannot use, since it has one processor at most, the others share.
    #[test]
    fn weights_are_honoured_on_several_processors(
        weights in proptest::collection::vec(50u32..=400, 3..10), pcpus in 2usize..=4,
    ) {
        check_weights(&weights, pcpus)?;
    }

    /// First come, first served: who runs goes on until it is done, and on one processor jobs end in the order in which
    /// they came.
    #[test]
    fn first_come_is_first_served(jobs in proptest::collection::vec((0u64..300, 1u64..20_000), 1..12), pcpus in 1usize..=3) {
        let vcpus = jobs.iter().map(|&(at, work)| {
            Program::Jobs([Arrival { at: at * MS, work: work * US }].into())
        });
        let workload = plain(pcpus, 1_000 * MS, vec![vm("jobs", params(), vcpus.collect())]);
        let outcome = simulate(&workload, PolicyKind::Fcfs, &config(SLICE));
        let mut ended = outcome.jobs.clone();
        ended.sort_by_key(|job| job.end);
        prop_assert_eq!(ended.len(), jobs.len());
        prop_assert!(ended.iter().all(|job| job.done));
        prop_assert!(pcpus > 1 || ended.windows(2).all(|two| two[0].release <= two[1].release));
        prop_assert!(ended.iter().all(|job| job.end - job.start.unwrap() == job.work));
    }

    /// Shortest job first: whoever begins to run, no other waits whose jobs are known to be shorter.
    #[test]
    fn the_shortest_job_is_first(works in proptest::collection::vec(1u64..60, 2..7)) {
        let looping = |(number, &work): (usize, &u64)| Program::Loop {
            first: number as u64 * 100 * US,
            pause: Span::Around(2 * work * MS),
            by: Waker::Device,
            steps: vec![Step::Compute(Span::Exactly(work * MS))],
        };
        let vcpus: Vec<_> = works.iter().enumerate().map(looping).collect();
        let workload = plain(1, 6_000 * MS, vec![vm("jobs", params(), vcpus)]);
        let outcome = simulate(&workload, PolicyKind::Sjf, &config(SLICE));
        // The estimate halves its error with each job: after three it is within an eighth.
        let known = |vcpu: VcpuRef, at: Ns| {
            let jobs = outcome.jobs.iter();
            jobs.filter(|job| job.vcpu == vcpu && job.done && job.end <= at).count() >= 3
        };
        for interval in &outcome.timeline {
            for job in outcome.jobs.iter().filter(|job| job.vcpu != interval.vcpu) {
                let waits = job.release < interval.from && job.start.is_none_or(|at| at > interval.from);
                if waits && known(job.vcpu, interval.from) && known(interval.vcpu, interval.from) {
                    let (waiting, running) = (works[job.vcpu.vcpu], works[interval.vcpu.vcpu]);
                    prop_assert!(waiting * 8 >= running * 7, "{} ms waits at {:?}", waiting, interval);
                }
            }
        }
    }

    /// The most urgent runs at once, and the least urgent in the end.
    #[test]
    fn the_urgent_come_first_and_the_others_age(urgent in 1u8..=31, below in 1u8..=31, many in 1usize..6) {
        let low = urgent.saturating_sub(below);
        let level = |priority| Params { priority, ..params() };
        let pressing = Program::Loop {
            first: 0,
            pause: Span::Around(5 * MS),
            by: Waker::Device,
            steps: vec![Step::Compute(Span::Around(500 * US))],
        };
        let vms = vec![
            vm("urgent", level(urgent), vec![pressing]),
            vm("hog", level(urgent), vec![]),
            vm("low", level(low), spin(many)),
        ];
        let mut workload = plain(1, 1_000 * MS, vms);
        let outcome = simulate(&workload, PolicyKind::Priority, &config(SLICE));
        // Those below keep it waiting for what is left of a slice at most, and only if they have aged.
        let ageing = u64::from(urgent - low) * SLICES_PER_LEVEL;
        let allowed = if 2 * (many as u64) + 10 < ageing { 0 } else { SLICE };
        let longest = outcome.vcpus[0].totals.longest_wait;
        prop_assert!(longest <= allowed, "{} us", longest / US);
        // Beside one that is as urgent and never stops, they wait for their age and not more.
        workload.vms[1].vcpus = spin(1);
        workload.duration = 2_000 * MS;
        let outcome = simulate(&workload, PolicyKind::Priority, &config(SLICE));
        for vcpu in &outcome.vcpus {
            prop_assert!(vcpu.totals.longest_wait <= (ageing + many as u64 + 2) * SLICE, "{:?}", vcpu);
        }
    }

    /// By allocation: processor time in proportion to what was allocated.
    #[test]
    fn allocations_are_shares(parts in proptest::collection::vec(10u32..=100, 2..6)) {
        let vms = parts.iter().map(|&percent| {
            let demand = Demand { processors: percent * 10_000, ..Demand::default() };
            vm("vm", Params { demand, ..params() }, spin(1))
        });
        let workload = plain(1, 2_000 * MS, vms.collect());
        let outcome = simulate(&workload, PolicyKind::Allocation, &config(SLICE));
        let sum: u32 = parts.iter().sum();
        for (vcpu, part) in outcome.vcpus.iter().zip(&parts) {
            let due = outcome.duration as f64 * f64::from(*part) / f64::from(sum);
            let off = (vcpu.totals.run as f64 - due).abs();
            prop_assert!(off <= 0.02 * due + SLICE as f64, "{:?} {}", vcpu, due);
        }
    }

    /// Who spins, floods and sleeps cleverly gets no more than its share, and its neighbours wait little.
    #[test]
    fn an_abuser_gets_its_share_only(
        spins in 1usize..6, flood in 1u64..50, nap in 1u64..2_000, pcpus in 1usize..=2,
    ) {
        let neighbours = desks();
        let own = neighbours.len();
        let calm = plain(pcpus, 400 * MS, neighbours.clone());
        let calm = simulate(&calm, PolicyKind::Fair, &config(SLICE));
        let abuser = abuser(own, spins, flood * US, nap * US);
        let count = (abuser.vcpus.len() + own) as u64;
        let mut vms = neighbours;
        vms.push(abuser);
        let workload = plain(pcpus, 400 * MS, vms);
        for policy in starving_nobody() {
            let outcome = simulate(&workload, policy, &config(SLICE));
            for desk in outcome.vcpus.iter().filter(|vcpu| vcpu.vcpu.vm < own) {
                // Two slices of each other vCPU between a wake-up and the next run, at the very most.
                let longest = desk.totals.longest_wait;
                prop_assert!(longest <= 2 * count * SLICE, "{}: {:?}", policy, desk);
            }
            if policy == PolicyKind::Fair {
                let work = |outcome: &Outcome| (0..own).map(|vm| outcome.run_of(vm)).sum::<Ns>();
                prop_assert!(work(&outcome) * 100 >= work(&calm) * 80, "{} {}", work(&outcome), work(&calm));
                let awt = outcome.summary().awt.unwrap() - calm.summary().awt.unwrap();
                prop_assert!(awt <= 2.0 * SLICE as f64, "neighbours wait {} ns longer", awt);
            }
        }
    }

    /// In a pool of its own it touches nobody: all others run, wait and are done as they would be without it, to the nanosecond.
    #[test]
    fn an_abuser_in_another_pool_touches_nobody(
        spins in 1usize..6, flood in 1u64..50, nap in 1u64..2_000, pcpus in 1usize..=2, others in spinners(0..3),
    ) {
        let mut neighbours = desks();
        neighbours.extend(others.vms);
        let own = neighbours.len();
        let calm = plain(pcpus, 200 * MS, neighbours.clone());
        let mut abuser = abuser(own, spins, flood * US, nap * US);
        abuser.params.pool = PoolId(1);
        let mut vms = neighbours;
        vms.push(abuser);
        let apart = Workload {
            pools: vec![CpuSet::first(pcpus), CpuSet::of(pcpus)],
            ..plain(pcpus + 1, 200 * MS, vms)
        };
        for policy in PolicyKind::ALL {
            let [calm, apart] = [&calm, &apart].map(|w| simulate(w, policy, &Config { slice: SLICE, timeline: Ns::MAX, ..Config::default() }));
            prop_assert_eq!(&calm.jobs, &apart.jobs, "{}", policy);
            for (one, other) in calm.vcpus.iter().zip(&apart.vcpus) {
                prop_assert_eq!(one.totals, other.totals, "{}", policy);
                prop_assert_eq!(one.metrics, other.metrics, "{}", policy);
            }
            let (theirs, its): (Vec<&Interval>, Vec<&Interval>) = apart.timeline.iter().partition(|i| i.vcpu.vm < own);
            prop_assert!(calm.timeline.iter().eq(theirs));
            prop_assert!(!its.is_empty() && its.iter().all(|i| i.pcpu == pcpus));
            prop_assert!(apart.run_of(own) * 10 >= apart.duration * 9, "it is busy");
        }
    }
}

/// Three VMs that answer to people.
fn desks() -> Vec<Vm> {
    let desk = |first| Program::Loop {
        first,
        pause: Span::Around(10 * MS),
        by: Waker::Device,
        steps: vec![Step::Compute(Span::Around(500 * US))],
    };
    (0..3)
        .map(|n| vm("desk", params(), vec![desk(n * MS)]))
        .collect()
}

/// One that spins, floods itself with interrupts, each answered for so long, and naps for so long just before its slices end; it
/// is VM number `own`.
fn abuser(own: usize, spins: usize, flood: Ns, nap: Ns) -> Vm {
    let mut vcpus = spin(spins);
    let target = VcpuRef {
        vm: own,
        vcpu: spins,
    };
    vcpus.push(Program::Served(vec![Step::Compute(Span::Exactly(flood))]));
    vcpus.push(Program::Loop {
        first: 0,
        pause: Span::Exactly(1),
        by: Waker::Timer,
        steps: vec![Step::Wake(target), Step::Compute(Span::Exactly(flood))],
    });
    // It blocks just before its slice is over, to come back as one that was idle.
    vcpus.push(Program::Loop {
        first: 0,
        pause: Span::Exactly(nap),
        by: Waker::Timer,
        steps: vec![Step::Compute(Span::Exactly(SLICE - 50 * US))],
    });
    Vm {
        measured: false,
        ..vm("abuser", params(), vcpus)
    }
}

/// Spinning vCPUs of these weights get processor time by them, within 2 %.
fn check_weights(weights: &[u32], pcpus: usize) -> Result<(), TestCaseError> {
    let spinner = |&weight| vm("vm", Params { weight, ..params() }, spin(1));
    let vms = weights.iter().map(spinner).collect();
    let workload = plain(pcpus, 4_000 * MS, vms);
    let duration = workload.duration as f64;
    let claims: Vec<_> = weights
        .iter()
        .map(|&weight| (duration, f64::from(weight)))
        .collect();
    let due = entitlements(duration * pcpus as f64, &claims);
    for policy in [PolicyKind::Fair, PolicyKind::Reservation] {
        let outcome = simulate(&workload, policy, &config(SLICE));
        for (vcpu, due) in outcome.vcpus.iter().zip(&due) {
            let ran = vcpu.totals.run as f64;
            prop_assert!(
                (ran - due).abs() <= 0.02 * due,
                "{policy}: weight {} ran {:.1} ms of {:.1} ms",
                vcpu.weight,
                ran / 1e6,
                due / 1e6
            );
        }
    }
    Ok(())
}

/// By requirement: the greatest part that anybody has of anything becomes alike.
#[test]
fn dominant_shares_become_alike() {
    for (memory, expected) in [(0, 0.5), (600_000, 0.4), (800_000, 0.2)] {
        let demand = Demand {
            memory,
            ..Demand::default()
        };
        let holder = Params { demand, ..params() };
        let vms = vec![
            vm("holds memory", holder, spin(1)),
            vm("holds nothing", params(), spin(1)),
        ];
        let workload = plain(1, 60_000 * MS, vms);
        let outcome = simulate(&workload, PolicyKind::Requirement, &config(SLICE));
        let part = outcome.run_of(0) as f64 / outcome.duration as f64;
        assert!(
            (part - expected).abs() < 0.05,
            "{memory}: {part} of {expected}"
        );
    }
}

/// By requirement: who asks devices for most of what is asked for comes after who only computes.
#[test]
fn io_that_is_asked_for_is_a_share() {
    let part = |bytes| {
        let asks = Program::Loop {
            first: 0,
            pause: Span::Exactly(US),
            by: Waker::Device,
            steps: vec![Step::Compute(Span::Exactly(MS)), Step::Io(bytes)],
        };
        let vms = vec![
            vm("asks", params(), vec![asks]),
            vm("computes", params(), spin(1)),
        ];
        let workload = plain(1, 20_000 * MS, vms);
        let outcome = simulate(&workload, PolicyKind::Requirement, &config(SLICE));
        outcome.run_of(0) as f64 / outcome.duration as f64
    };
    let (little, much) = (part(1_000), part(1_000_000));
    assert!((0.4..0.6).contains(&little), "{little}");
    assert!((0.05..0.3).contains(&much), "{much}");
}

/// The same seed, the same simulation.
#[test]
fn a_simulation_depends_on_its_seed_only() {
    let make = sched_sim::synthetic::ALL[1];
    let mut workload = make();
    workload.duration = 200 * MS;
    let run = |seed| {
        let config = Config {
            seed,
            ..config(SLICE)
        };
        simulate(&workload, PolicyKind::Fair, &config).timeline
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
