//! Random workloads, and what is asked of their outcomes.

use std::ops::Range;

use proptest::{collection::vec, prelude::*, test_runner::RngSeed};
use sched::{CpuSet, Demand, Params};
use sched_sim::{
    MS, Ns, US,
    engine::Config,
    rng::Span,
    stats::Outcome,
    workload::{Program, Step, VcpuRef, Vm, Waker, Workload},
};

/// So many cases, the same each time, unless the environment asks for others.
pub fn draw(cases: u32) -> ProptestConfig {
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

/// A machine without costs, that keeps all of who ran when.
pub fn config(slice: Ns) -> Config {
    Config {
        slice,
        timeline: Ns::MAX,
        ..Config::ideal()
    }
}

/// The usual parameters.
pub fn params() -> Params {
    Params::default()
}

/// A VM of these vCPUs.
pub fn vm(name: &str, params: Params, vcpus: Vec<Program>) -> Vm {
    Vm {
        name: name.into(),
        params,
        measured: true,
        vcpus,
    }
}

/// vCPUs that compute for ever.
pub fn spin(count: usize) -> Vec<Program> {
    vec![Program::Spin; count]
}

/// Processor time of a vCPU between two times.
pub fn run_between(outcome: &Outcome, vcpu: VcpuRef, from: Ns, to: Ns) -> Ns {
    let intervals = outcome.timeline.iter().filter(|i| i.vcpu == vcpu);
    intervals
        .map(|i| i.to.min(to).saturating_sub(i.from.max(from)))
        .sum()
}

fn any_program() -> impl Strategy<Value = Program> {
    let pause = prop_oneof![
        (1u64..50).prop_map(|us| Span::Exactly(us * US)),
        (50u64..20_000).prop_map(|us| Span::Around(us * US)),
    ];
    let work = (1u64..5_000).prop_map(|us| Span::Around(us * US));
    let by = prop_oneof![Just(Waker::Timer), Just(Waker::Device)];
    prop_oneof![
        2 => Just(Program::Spin),
        4 => (0u64..20, pause, by, work.clone()).prop_map(|(first, pause, by, work)| Program::Loop {
            first: first * MS,
            pause,
            by,
            steps: vec![Step::Compute(work), Step::Io(100_000)],
        }),
        1 => (0u64..20, 2u64..40, work.clone()).prop_map(|(first, period, work)| Program::Periodic {
            first: first * MS,
            period: period * MS,
            work,
        }),
        1 => (1u64..30, 1u64..60, 200u64..4_000, work).prop_map(|(on, off, gap, work)| Program::Bursts {
            on: Span::Around(on * MS),
            off: Span::Around(off * MS),
            gap: Span::Around(gap * US),
            steps: vec![Step::Compute(work)],
        }),
    ]
}

fn any_params(pcpus: usize) -> impl Strategy<Value = Params> {
    let affinity = prop_oneof![
        3 => Just(CpuSet::first(pcpus)),
        1 => (0..pcpus).prop_map(CpuSet::of),
        1 => (0..pcpus, 0..pcpus).prop_map(|(a, b)| CpuSet::of(a).or(CpuSet::of(b))),
    ];
    let part = 10_000u32..=1_000_000;
    (50u32..=400, 0u8..=31, affinity, part.clone(), part).prop_map(
        |(weight, priority, affinity, memory, processors)| Params {
            weight,
            priority,
            affinity,
            demand: Demand { memory, processors },
            ..params()
        },
    )
}

/// Some VMs of some vCPUs on some processors, for 150 ms.
pub fn workload() -> impl Strategy<Value = Workload> {
    (1usize..=4).prop_flat_map(|pcpus| {
        vec((any_params(pcpus), vec(any_program(), 1..=3)), 1..=5).prop_map(move |vms| Workload {
            name: "random".into(),
            about: String::new(),
            pcpus,
            pools: Vec::new(),
            duration: 150 * MS,
            vms: vms
                .into_iter()
                .map(|(params, vcpus)| vm("vm", params, vcpus))
                .collect(),
        })
    })
}

/// Spinning vCPUs on one to three processors, for 500 ms.
pub fn spinners(count: Range<usize>) -> impl Strategy<Value = Workload> {
    (1usize..=3, vec(1u32..=10_000, count)).prop_map(|(pcpus, weights)| Workload {
        name: "spinners".into(),
        about: String::new(),
        pcpus,
        pools: Vec::new(),
        duration: 500 * MS,
        vms: weights
            .into_iter()
            .map(|weight| vm("busy", Params { weight, ..params() }, spin(1)))
            .collect(),
    })
}

/// A workload of these VMs.
pub fn plain(pcpus: usize, duration: Ns, vms: Vec<Vm>) -> Workload {
    Workload {
        name: "test".into(),
        about: String::new(),
        pcpus,
        pools: Vec::new(),
        duration,
        vms,
    }
}
