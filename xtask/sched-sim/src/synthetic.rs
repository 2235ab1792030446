//! The workloads that are made up: each shows one question that a scheduler has to answer.

use sched::{CpuSet, Demand, Params, PoolId, Reservation};

use crate::{
    MS, Ns, US,
    rng::Span,
    workload::{Program, Step, VcpuRef, Vm, Waker, Workload},
};

/// Makes a workload.
type Make = fn() -> Workload;

/// All of them, in the order in which they are shown.
pub const ALL: [Make; 11] = [
    shares,
    interactive,
    real_time,
    io,
    web,
    batch,
    locks,
    resources,
    calm,
    abuse,
    apart,
];

/// A VM of equal vCPUs.
fn vm(name: &str, params: Params, vcpus: usize, program: Program) -> Vm {
    Vm {
        name: name.into(),
        params,
        measured: true,
        vcpus: vec![program; vcpus],
    }
}

/// A VM whose vCPUs compute for ever.
fn spinner(name: &str, vcpus: usize) -> Vm {
    vm(name, Params::default(), vcpus, Program::Spin)
}

/// The same terms with another priority.
fn priority(priority: u8) -> Params {
    Params {
        priority,
        ..Params::default()
    }
}

/// The same terms with a reservation, and urgent for policies that know priorities only.
fn reserved(budget: Ns, period: Ns) -> Params {
    Params {
        priority: 28,
        reservation: Some(Reservation { budget, period }),
        ..Params::default()
    }
}

/// Somebody who types now and then.
fn desk(first: Ns) -> Program {
    Program::Loop {
        first,
        pause: Span::Around(20 * MS),
        by: Waker::Device,
        steps: vec![Step::Compute(Span::Around(MS))],
    }
}

/// Requests that come in bursts; one in twenty takes long.
fn requests(gap: Ns) -> Program {
    Program::Bursts {
        on: Span::Around(40 * MS),
        off: Span::Around(60 * MS),
        gap: Span::Around(gap),
        steps: vec![Step::Compute(Span::Mostly {
            short: 500 * US,
            long: 6 * MS,
            every: 20,
        })],
    }
}

/// What one read of a disk asks for, in bytes.
const READ_BYTES: u64 = 64 << 10;

/// Reads, computes a little, reads again.
fn reader(first: Ns) -> Program {
    Program::Loop {
        first,
        pause: Span::Around(400 * US),
        by: Waker::Device,
        steps: vec![Step::Compute(Span::Around(60 * US)), Step::Io(READ_BYTES)],
    }
}

/// Jobs of one length, and twice as long a pause after each.
fn batches(first: Ns, work: Ns) -> Program {
    Program::Loop {
        first,
        pause: Span::Around(2 * work),
        by: Waker::Device,
        steps: vec![Step::Compute(Span::Exactly(work))],
    }
}

fn workload(name: &str, pcpus: usize, duration: Ns, about: &str, vms: Vec<Vm>) -> Workload {
    Workload {
        name: name.into(),
        about: about.into(),
        pcpus,
        pools: Vec::new(),
        duration,
        vms,
    }
}

fn shares() -> Workload {
    let weighted = |name: &str, weight| {
        let params = Params {
            weight,
            ..Params::default()
        };
        vm(name, params, 2, Program::Spin)
    };
    workload(
        "shares",
        2,
        2_000 * MS,
        "Three VMs of two vCPUs each compute for ever, with weights 1:2:4. \
         Policies that know weights give processor time by them; Jain's index tells how exactly.",
        vec![
            weighted("one", 100),
            weighted("two", 200),
            weighted("four", 400),
        ],
    )
}

fn interactive() -> Workload {
    let mut vms: Vec<_> = (1..=4)
        .map(|n| vm(&format!("desk{n}"), priority(20), 1, desk(n * 3 * MS)))
        .collect();
    vms.push(spinner("busy", 3));
    workload(
        "interactive",
        2,
        3_000 * MS,
        "Four VMs answer to people (1 ms of work every 20 ms or so) beside three vCPUs that compute for ever. \
         How long does a keystroke wait?",
        vms,
    )
}

fn real_time() -> Workload {
    let periodic = |first, period, low, high| Program::Periodic {
        first,
        period,
        work: Span::Between(low, high),
    };
    workload(
        "real-time",
        2,
        2_000 * MS,
        "Two VMs have work in each period, to be done by its end: 5 to 6 ms of 10 ms, and 0.5 to 1 ms of 4 ms. Three \
         spinning vCPUs beside them. Deadlines are kept by reservation, or by luck.",
        vec![
            vm(
                "control",
                reserved(6 * MS + 100 * US, 10 * MS),
                1,
                periodic(MS, 10 * MS, 5 * MS, 6 * MS),
            ),
            vm(
                "audio",
                reserved(MS + 100 * US, 4 * MS),
                1,
                periodic(2 * MS, 4 * MS, 500 * US, MS),
            ),
            spinner("busy", 3),
        ],
    )
}

fn io() -> Workload {
    let mut vms: Vec<_> = (1..=4)
        .map(|n| vm(&format!("disk{n}"), priority(20), 1, reader(n * 100 * US)))
        .collect();
    vms.push(spinner("busy", 2));
    workload(
        "io",
        2,
        1_000 * MS,
        "Four VMs wait for a disk nearly all the time and compute for 60 µs between, beside two spinning vCPUs. What \
         matters is how soon they run after a wake-up: throughput tells.",
        vms,
    )
}

fn web() -> Workload {
    let vms = (1..=4)
        .map(|n| {
            vm(
                &format!("web{n}"),
                Params::default(),
                2,
                requests(1_600 * US),
            )
        })
        .collect();
    workload(
        "web",
        2,
        4_000 * MS,
        "Four VMs of two vCPUs serve requests that come in bursts, whether those before are done or not; one in twenty is \
         long. The processors are three quarters busy.",
        vms,
    )
}

fn batch() -> Workload {
    let vms = (0..6)
        .map(|n| {
            let work = (5 * MS) << n;
            let params = Params {
                priority: 20 - n as u8,
                ..Params::default()
            };
            vm(
                &format!("{}ms", work / MS),
                params,
                1,
                batches(n * MS, work),
            )
        })
        .collect();
    workload(
        "batch",
        1,
        20_000 * MS,
        "Six VMs, each with jobs of a length of its own (5 to 160 ms) and a pause twice as long after each: about twice what the \
         processor can do. Shortest job first is to have the shortest average waiting time.",
        vms,
    )
}

fn locks() -> Workload {
    let program = |first| Program::Loop {
        first,
        pause: Span::Around(2 * MS),
        by: Waker::Timer,
        steps: vec![
            Step::Compute(Span::Around(MS)),
            Step::Lock(0),
            Step::Compute(Span::Around(300 * US)),
            Step::Unlock(0),
            Step::Compute(Span::Around(500 * US)),
        ],
    };
    let pair = |name: &str, first| Vm {
        name: name.into(),
        params: Params::default(),
        measured: true,
        vcpus: vec![program(first), program(first + MS), program(first + 2 * MS)],
    };
    workload(
        "locks",
        2,
        2_000 * MS,
        "Two VMs of three vCPUs that share a spin lock, and a spinning vCPU. Who spins while the holder of the lock does not \
         run gets nothing done: the scheduler hears of it and lets a sibling go first.",
        vec![pair("left", 0), pair("right", 500 * US), spinner("busy", 1)],
    )
}

fn resources() -> Workload {
    // Parts of the host's memory and of its processors, in percent.
    let holding = |memory: u32, processors: u32| Params {
        demand: Demand {
            memory: memory * 10_000,
            processors: processors * 10_000,
        },
        ..Params::default()
    };
    workload(
        "resources",
        2,
        2_000 * MS,
        "Four VMs that hold much memory, much of the disk's time, many processors, or little of all. The resource-driven policies \
         give processor time so that everyone's greatest share, of whatever resource, is alike.",
        vec![
            vm("memory", holding(60, 25), 1, Program::Spin),
            vm("disk", holding(10, 25), 1, reader(0)),
            vm("cpus", holding(10, 100), 2, Program::Spin),
            vm("small", holding(5, 25), 1, Program::Spin),
        ],
    )
}

/// Those whom the abuser disturbs.
fn neighbours() -> Vec<Vm> {
    let mut vms: Vec<_> = (1..=3)
        .map(|n| vm(&format!("desk{n}"), priority(16), 1, desk(n * 3 * MS)))
        .collect();
    vms.push(vm("web", Params::default(), 1, requests(4 * MS)));
    vms
}

fn calm() -> Workload {
    workload(
        "calm",
        2,
        2_000 * MS,
        "The neighbours of `abuse` without the abuser, to compare with.",
        neighbours(),
    )
}

/// One that spins on two vCPUs and floods a third with interrupts from a fourth; it is VM number `own`.
fn abuser(own: usize, params: Params) -> Vm {
    let target = |vcpu| Step::Wake(VcpuRef { vm: own, vcpu });
    Vm {
        name: "abuser".into(),
        params,
        measured: false,
        vcpus: vec![
            Program::Spin,
            Program::Spin,
            // Interrupts its sibling as fast as it can, for ever.
            Program::Loop {
                first: 0,
                pause: Span::Exactly(1),
                by: Waker::Timer,
                steps: vec![
                    target(3),
                    Step::Compute(Span::Exactly(10 * US)),
                    target(3),
                    Step::Compute(Span::Exactly(10 * US)),
                ],
            },
            Program::Served(vec![Step::Compute(Span::Exactly(5 * US))]),
        ],
    }
}

fn abuse() -> Workload {
    let mut vms = neighbours();
    vms.push(abuser(vms.len(), Params::default()));
    workload(
        "abuse",
        2,
        2_000 * MS,
        "Three interactive VMs and a small web server beside a VM that spins on two vCPUs and floods a third with interrupts from \
         a fourth. The table counts the neighbours' jobs only: what do they wait more than in `calm`?",
        vms,
    )
}

fn apart() -> Workload {
    let mut vms = neighbours();
    let params = Params {
        pool: PoolId(1),
        ..Params::default()
    };
    vms.push(abuser(vms.len(), params));
    let workload = workload(
        "apart",
        3,
        2_000 * MS,
        "The same abuser in a CPU pool of its own, with a third processor. What do the neighbours wait more than in `calm`? Nothing.",
        vms,
    );
    Workload {
        pools: vec![CpuSet::first(2), CpuSet::of(2)],
        ..workload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_different_and_references_exist() {
        let all: Vec<_> = ALL.iter().map(|make| make()).collect();
        for (index, workload) in all.iter().enumerate() {
            assert!(all[..index].iter().all(|other| other.name != workload.name));
            assert!(workload.pcpus > 0 && workload.vcpus() > 0);
            for vm in &workload.vms {
                for program in &vm.vcpus {
                    let (Program::Loop { steps, .. } | Program::Bursts { steps, .. }) = program
                    else {
                        continue;
                    };
                    for step in steps {
                        if let Step::Wake(whom) = step {
                            let target = &workload.vms[whom.vm].vcpus[whom.vcpu];
                            assert!(matches!(target, Program::Served(_)));
                        }
                    }
                }
            }
        }
    }
}
