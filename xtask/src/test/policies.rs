//! Scenarios about what each policy promises, and about places: with guests that run, where the simulator only computes.
//!
//! Judged by what the host counts of its guests' time between two moments, in the machine's own time.

use anyhow::{Context, Result, ensure};
use manage::command::{HostStats, VcpuStats};
use regex::Regex;

use super::{
    control::Host,
    isolation::{numbers, run_ns},
    rig::{Rig, Start, Vm},
    session::Session,
    terminal::Terminal,
};
use crate::emulator::{Emulator, Machine, Time};

/// The guest on the first console: after each key it says something when 350 ms have passed.
const CLOCK: &str = "mode=counts checks=none facts=off";
/// A guest that takes what it can get.
const SPINS: &str = "checks=none facts=off nuisance=spin";
/// One that asks devices all the time.
const ASKS: &str = "checks=none facts=off nuisance=exits";
/// One that works for 300 us, and sleeps for 60.
const SHORT: &str = "checks=none facts=off nuisance=short-jobs";

/// A guest of a pool.
const fn guest(name: &'static str, command_line: &'static str, more: &'static str) -> Vm<'static> {
    Vm {
        name,
        vcpus: 1,
        memory_mib: 16,
        kernel: "stub",
        initrd: None,
        command_line,
        disks: &[],
        more,
    }
}

/// A part of the time that a pool's guests ran, which a guest is to get, in percent.
struct Promise {
    policy: &'static str,
    /// The guests of its pool, the one that is looked at first.
    guests: &'static [Vm<'static>],
    /// From, and to, on Bochs.
    on_bochs: (f64, f64),
    /// On QEMU.
    on_qemu: (f64, f64),
}

/// Each policy on a processor of its own, in this order. QEMU runs one processor after the other, and time goes on for all: turns are
/// stretched there, by pieces that are long beside the window, so that parts are less exact.
const PROMISES: [Promise; 8] = [
    // Time by weight.
    Promise {
        policy: "fair",
        guests: &[
            guest("clock", CLOCK, ""),
            guest("fair-three", SPINS, "weight = 300\n"),
        ],
        on_bochs: (23.0, 27.0),
        on_qemu: (20.0, 32.0),
    },
    // Whatever the weights are.
    Promise {
        policy: "round-robin",
        guests: &[
            guest("turn-a", SPINS, "weight = 1000\n"),
            guest("turn-b", SPINS, ""),
        ],
        on_bochs: (46.0, 54.0),
        on_qemu: (42.0, 58.0),
    },
    // Ten slices of waiting make up for a level: one turn in eleven.
    Promise {
        policy: "priority",
        guests: &[
            guest("less-urgent", SPINS, "priority = 15\n"),
            guest("more-urgent", SPINS, "priority = 16\n"),
        ],
        on_bochs: (6.0, 13.0),
        on_qemu: (5.0, 25.0),
    },
    // Who came first goes on.
    Promise {
        policy: "fcfs",
        guests: &[
            guest("came-first", SPINS, ""),
            guest("came-next", SPINS, ""),
        ],
        on_bochs: (100.0, 100.0),
        on_qemu: (100.0, 100.0),
    },
    // Two of short jobs leave little to the one that never ends.
    Promise {
        policy: "sjf",
        guests: &[
            guest("long-job", SPINS, ""),
            guest("short-a", SHORT, ""),
            guest("short-b", SHORT, ""),
        ],
        on_bochs: (0.0, 10.0),
        on_qemu: (0.0, 15.0),
    },
    // The budget, and not more.
    Promise {
        policy: "reservation",
        guests: &[
            guest(
                "reserved",
                SPINS,
                "reservation = { budget = \"2ms\", period = \"10ms\" }\n",
            ),
            guest("rest", SPINS, ""),
        ],
        on_bochs: (18.5, 21.5),
        on_qemu: (17.0, 23.0),
    },
    // Four of the host's eight processors, and one.
    Promise {
        policy: "allocation",
        guests: &[
            Vm {
                vcpus: 4,
                ..guest("large", SPINS, "")
            },
            guest("small", SPINS, ""),
        ],
        on_bochs: (76.0, 84.0),
        on_qemu: (72.0, 88.0),
    },
    // Most of all I/O is a share, too. QEMU's TSC runs faster than its processors work: by it, little is asked for there, and CPU
    // time is what decides.
    Promise {
        policy: "requirement",
        guests: &[guest("asks", ASKS, ""), guest("computes", SPINS, "")],
        on_bochs: (3.0, 40.0),
        on_qemu: (35.0, 65.0),
    },
];

/// A host with a clock on its first console, and its channel.
struct Clocked<'r> {
    session: Session,
    host: Host,
    start: &'r Start,
}

impl<'r> Clocked<'r> {
    /// Boots this configuration on so many processors, of a machine that `change` may change; the clock goes.
    fn boot(
        rig: &Rig,
        start: &'r Start,
        text: &str,
        cpus: u32,
        change: impl FnOnce(&mut Machine),
    ) -> Result<Self> {
        let socket = Host::socket(start);
        let mut session = rig.boot_text(start, text, |machine| {
            machine.cpus = cpus;
            machine.control = Some(socket.clone());
            change(machine);
        })?;
        let limits = start.place.limits();
        session.expect(&Regex::new("load counts: ready")?, limits.boot)?;
        Ok(Self {
            session,
            host: Host::new(socket, limits.command),
            start,
        })
    }

    /// Lets the clock run for a while, so many times.
    fn wait(&mut self, times: usize) -> Result<()> {
        let report = Regex::new(r"load counts: \d+ turns")?;
        for _ in 0..times {
            self.session.send(".")?;
            self.session
                .expect(&report, self.start.place.limits().boot)
                .context("the clock")?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.host.done(&["host", "power-off"], "powering off")?;
        let limit = self.start.place.limits().command;
        self.session.wait_for_power_off(limit)
    }
}

/// Every policy, each with guests of its own on a processor of its own.
pub fn policies(rig: &Rig, start: &Start) -> Result<String> {
    let mut text = "[host]\nslice = \"2ms\"\nafter-last-vm = \"stay\"\n".to_owned();
    for (number, promise) in PROMISES.iter().enumerate().skip(1) {
        let policy = promise.policy;
        text += &format!(
            "[[pool]]\nname = \"{policy}\"\ncpus = [{number}]\nscheduler = \"{policy}\"\n"
        );
    }
    for (number, promise) in PROMISES.iter().enumerate() {
        for vm in promise.guests {
            let pool = match number {
                0 => String::new(),
                _ => format!("pool = \"{}\"\n", promise.policy),
            };
            text += &vm
                .section()
                .replacen("[vm.boot]", &format!("{pool}[vm.boot]"), 1);
        }
    }
    let cpus = PROMISES.len() as u32;
    let mut clocked = Clocked::boot(rig, start, &text, cpus, |machine| {
        if start.place.emulator() == Emulator::Bochs {
            // So many processors take long.
            machine.time = Time::Instructions { shift: 5 };
        }
    })?;
    // All have found out about their machines, and how long their jobs are.
    clocked.wait(2)?;
    let before = clocked.host.stats()?;
    clocked.wait(3)?;
    let after = clocked.host.stats()?;
    let mut seen = Vec::new();
    for promise in &PROMISES {
        let ran = |vm: &Vm<'_>| (run_ns(&after, vm.name) - run_ns(&before, vm.name)) as f64;
        let all: f64 = promise.guests.iter().map(ran).sum();
        let part = ran(&promise.guests[0]) / all * 100.0;
        seen.push((promise, part));
    }
    let told = seen
        .iter()
        .map(|(promise, part)| format!("{} {part:.1} %", promise.guests[0].name));
    let told = told.collect::<Vec<_>>().join(", ");
    for (promise, part) in seen {
        let (least, most) = match start.place.emulator() {
            Emulator::Qemu => promise.on_qemu,
            Emulator::Bochs => promise.on_bochs,
        };
        ensure!(
            (least..=most).contains(&part),
            "{}: {} had {part:.1} % instead of {least} to {most} %: {told}",
            promise.policy,
            promise.guests[0].name
        );
    }
    clocked.end()?;
    Ok(told)
}

/// A VM's first vCPU.
fn vcpu<'s>(stats: &'s HostStats, name: &str) -> Result<&'s VcpuStats> {
    let vm = stats.vms.iter().find(|vm| vm.summary.name == name);
    vm.and_then(|vm| vm.vcpu.first())
        .with_context(|| format!("{name} is not there"))
}

/// Two processors, and guests that are sent from one to the other, are given less, and wait for each other's locks.
pub fn places(rig: &Rig, start: &Start) -> Result<String> {
    let locks = Vm {
        vcpus: 4,
        ..guest("locks", "checks=none facts=off nuisance=locks", "")
    };
    let text = format!(
        "[host]\nslice = \"2ms\"\nafter-last-vm = \"stay\"\n{}{}{}{}",
        guest("clock", CLOCK, "affinity = [0]\n").section(),
        guest("moves", SPINS, "affinity = [0]\n").section(),
        guest("stays", SPINS, "affinity = [1]\n").section(),
        locks.section()
    );
    let mut clocked = Clocked::boot(rig, start, &text, 2, |_| {})?;
    clocked.wait(1)?;

    let mut moves = vcpu(&clocked.host.stats()?, "moves")?.clone();
    for place in [1, 0] {
        let to = place.to_string();
        clocked
            .host
            .done(&["sched", "set", "moves", "--affinity", &to], "moves")?;
        clocked.wait(1)?;
        let now = vcpu(&clocked.host.stats()?, "moves")?.clone();
        ensure!(
            now.pcpu == place
                && now.migrations == moves.migrations + 1
                && now.run_ns > moves.run_ns,
            "sent to processor {place}: {now:?}, before: {moves:?}"
        );
        moves = now;
    }

    let part = |clocked: &mut Clocked<'_>, cap: &str| -> Result<f64> {
        clocked
            .host
            .done(&["sched", "set", "moves", "--cap", cap], "moves")?;
        let before = clocked.host.stats()?;
        clocked.wait(2)?;
        let after = clocked.host.stats()?;
        let ran = run_ns(&after, "moves") - run_ns(&before, "moves");
        Ok(ran as f64 / (after.at_ns - before.at_ns) as f64 * 100.0)
    };
    let capped = part(&mut clocked, "10")?;
    ensure!(
        (8.0..=11.0).contains(&capped),
        "10 % at most: had {capped:.1} %"
    );
    let free = part(&mut clocked, "0")?;
    ensure!(free > 15.0, "without a limit: had {free:.1} %");

    let sections = critical_sections(&mut clocked)?;
    clocked.end()?;
    Ok(format!(
        "{capped:.1} % of 10 %, then {free:.1} %; critical sections in {sections:.0} % of the time"
    ))
}

/// Part of the time in which somebody is in the critical section of the guest with locks, in percent. Its vCPUs, more than there are
/// processors and beside others, wait for each other: unless who waits lets the holder run, that is little.
fn critical_sections(clocked: &mut Clocked<'_>) -> Result<f64> {
    const REPORTS: usize = 5;
    const REPORT_NS: f64 = 200e6;
    // QEMU 7.2 has no pause filter: there, the holder has to wait for its turn.
    let (least, notices) = match clocked.start.place.emulator() {
        Emulator::Qemu => (8.0, false),
        Emulator::Bochs => (30.0, true),
    };
    let limits = clocked.start.place.limits();
    let line = Regex::new(r"locks: (\d+) sections of (\d+) ns")?;
    let before = pauses(&clocked.host.stats()?)?;
    clocked.session.send("\x1d4")?;
    let mut reports = Vec::new();
    // What was kept of earlier ones comes first.
    for _ in 0..=REPORTS {
        let said = clocked.session.expect(&line, limits.boot)?;
        reports.push(numbers(&said, &line)?);
    }
    let after = pauses(&clocked.host.stats()?)?;
    let (first, last) = (&reports[0], &reports[REPORTS]);
    let part = (last[0] - first[0]) * first[1] / (REPORTS as f64 * REPORT_NS) * 100.0;
    ensure!(
        part >= least,
        "critical sections in {part:.1} % of the time"
    );
    ensure!(!notices || after > before, "no loop of PAUSE was noticed");
    Ok(part)
}

/// Exits of the guest with locks because it waited.
fn pauses(stats: &HostStats) -> Result<u64> {
    let vm = stats.vms.iter().find(|vm| vm.summary.name == "locks");
    let vm = vm.context("the guest with locks")?;
    let exits = vm.vcpu.iter().flat_map(|vcpu| &vcpu.exits);
    Ok(exits
        .filter(|(kind, _)| kind == "pause")
        .map(|(_, count)| count)
        .sum())
}
