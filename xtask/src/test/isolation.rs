//! Scenarios about guests that take what they can get: the others keep their part.
//!
//! One guest computes and counts how far it comes; another wants little, and measures how late it gets it; a third is a
//! nuisance, each time in another way. Whatever the host does on a nuisance's account costs the others nothing only if it
//! is charged to the nuisance, so the work that gets done is what is judged, in the machine's time, not in the workstation's.

use anyhow::{Context, Result, ensure};
use manage::command::{HostStats, VmStats};
use regex::Regex;

use super::{
    control::Host,
    rig::{Rig, Start, Vm},
    session::Session,
    terminal::Terminal,
};
use crate::emulator::{Emulator, Time};

/// Length of a time slice, in microseconds.
const SLICE_US: f64 = 2000.0;
/// How much less than its part the computing guest may get, in percent: turns are cut off by a window's ends.
const TOLERANCE: f64 = 5.0;
/// Processor time that may be charged to nobody, in percent: what switches take, on emulators whose processors are slow.
const MOST_FOR_NOBODY: f64 = 10.0;

/// A way to be a nuisance.
struct Nuisance {
    /// As the stub knows it.
    name: &'static str,
    /// The vCPUs that do it.
    vcpus: u32,
    /// The terminal shows its console meanwhile.
    shown: bool,
}

const fn nuisance(name: &'static str, vcpus: u32) -> Nuisance {
    Nuisance {
        name,
        vcpus,
        shown: false,
    }
}

/// All that are tried.
const NUISANCES: [Nuisance; 12] = [
    nuisance("deaf", 1),
    nuisance("console", 1),
    Nuisance {
        shown: true,
        ..nuisance("console", 1)
    },
    nuisance("exits", 1),
    nuisance("strings", 1),
    nuisance("timers", 1),
    nuisance("deadlines", 1),
    nuisance("naps", 1),
    nuisance("late-naps", 1),
    nuisance("ipis", 3),
    nuisance("wake-ups", 3),
    nuisance("pauses", 2),
];

/// What was measured beside a nuisance.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Turns of the computing guest in a window.
    turns: f64,
    /// The greatest delay of short jobs, in microseconds.
    latest_start: f64,
    /// Part of the processor that the nuisance was charged for, in percent.
    part: f64,
    /// Part of it that was nobody's, in percent.
    nobodys: f64,
}

/// The machine, its first console and its channel.
struct Bench<'r> {
    session: Session,
    host: Host,
    start: &'r Start,
}

/// Numbers out of a line.
pub(super) fn numbers(line: &str, pattern: &Regex) -> Result<Vec<f64>> {
    let caught = pattern.captures(line).context("a report")?;
    let numbers = caught.iter().skip(1).flatten();
    Ok(numbers
        .map(|n| n.as_str().parse())
        .collect::<Result<_, _>>()?)
}

impl Bench<'_> {
    fn report(&mut self, console: usize, pattern: &str) -> Result<Vec<f64>> {
        let pattern = Regex::new(pattern)?;
        self.session.send(&format!("\x1d{console}"))?;
        let said = self
            .session
            .expect(&pattern, self.start.place.limits().boot)
            .with_context(|| format!("a report on console {console}"))?;
        numbers(&said, &pattern)
    }

    /// What the two guests see now, and the host of the third one, whose console may be shown.
    fn measure(&mut self, nuisance: Option<&Nuisance>) -> Result<Seen> {
        let before = self.host.stats()?;
        for console in [WAITS, COUNTS] {
            self.session.send(&format!("\x1d{console}."))?;
        }
        if nuisance.is_some_and(|nuisance| nuisance.shown) {
            let lines = Regex::new(&format!("(?:nuisance [0-9]{{8}} -+\\s+){{{SHOWN}}}"))?;
            self.session.send(&format!("\x1d{THIRD}"))?;
            self.session
                .expect(&lines, self.start.place.limits().command)
                .context("lines of the nuisance")?;
        }
        let turns = self.report(COUNTS, r"load counts: (\d+) turns in")?[0];
        let waits = r"load waits: \d+ jobs, mean start \d+ us, latest start (\d+) us";
        let waits = self.report(WAITS, waits)?;
        let after = self.host.stats()?;
        let passed = (after.at_ns - before.at_ns) as f64;
        let part = (run_ns(&after, ABUSER) - run_ns(&before, ABUSER)) as f64;
        let busy = (after.pcpus[0].busy_ns - before.pcpus[0].busy_ns) as f64;
        Ok(Seen {
            turns,
            latest_start: waits[0],
            part: part / passed * 100.0,
            nobodys: 100.0 - busy / passed * 100.0,
        })
    }

    /// Has a guest be a nuisance while the others are measured.
    fn beside(&mut self, nuisance: &Nuisance) -> Result<Seen> {
        let command_line = format!(
            "boot.cmdline=checks=none facts=off nuisance={}",
            nuisance.name
        );
        let vcpus = format!("vcpus={}", nuisance.vcpus);
        let name = format!("name={ABUSER}");
        let create = ["vm", "create", &name, "memory=16M", &vcpus];
        let boot = ["boot.kernel=stub", &command_line];
        self.host.done(&[&create[..], &boot].concat(), ABUSER)?;
        self.host
            .done(&["vm", "start", ABUSER, "--wait=300"], ABUSER)?;
        // What a flood said first may be gone already.
        let begins = format!(
            r"nuisance (?:{}: begins, on {} proc|[0-9]{{8}} -)",
            nuisance.name, nuisance.vcpus
        );
        self.report(THIRD, &begins)?;
        let seen = self.measure(Some(nuisance))?;
        self.host.destroy(ABUSER)?;
        Ok(seen)
    }
}

/// Consoles of the guests that measure.
const WAITS: usize = 1;
const COUNTS: usize = 2;
const THIRD: usize = 3;
/// Lines of a nuisance that is shown, within the time that the others measure.
const SHOWN: usize = 20;
/// The third guest's name.
const ABUSER: &str = "abuser";

/// Time on a processor of a VM, if there is one of that name.
pub(super) fn run_ns(stats: &HostStats, name: &str) -> u64 {
    let named = |vm: &&VmStats| vm.summary.name == name;
    stats.vms.iter().find(named).map_or(0, |vm| vm.total.run_ns)
}

/// Guests that take what they can get, one after the other, beside one that computes and one that wants little.
pub fn nuisances(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let text = format!(
        "[host]\nslice = \"{SLICE_US}us\"\nafter-last-vm = \"stay\"\nfiles = [\"stub\"]\n{}{}",
        Vm::stub("waits", "mode=waits checks=none facts=off").section(),
        Vm::stub("counts", "mode=counts checks=none facts=off").section(),
    );
    let socket = Host::socket(start);
    let session = rig.boot_text(start, &text, |machine| {
        machine.cpus = 1;
        machine.control = Some(socket.clone());
        if start.place.emulator() == Emulator::Qemu {
            machine.time = Time::Instructions { shift: 4 };
        }
    })?;
    let mut bench = Bench {
        session,
        host: Host::new(socket, limits.command),
        start,
    };
    bench.report(WAITS, "load waits: ready")?;
    bench.report(COUNTS, "load counts: ready")?;
    let alone = bench.measure(None)?;
    let mut worst = Worst::default();
    for nuisance in &NUISANCES {
        let seen = bench.beside(nuisance)?;
        worst
            .judge(nuisance, &alone, &seen)
            .with_context(|| format!("beside {}: {seen:?}; alone: {alone:?}", nuisance.name))?;
    }
    bench.host.done(&["host", "power-off"], "powering off")?;
    bench.session.wait_for_power_off(limits.command)?;
    Ok(format!(
        "who computes gets {:.1} % of its part at least, who wants little waits {} us at most, {:.1} % are nobody's at most",
        worst.part, worst.latest_start, worst.nobodys
    ))
}

/// The worst of all that was seen.
struct Worst {
    /// Work done, in percent of what was due.
    part: f64,
    /// In microseconds.
    latest_start: f64,
    /// Processor time that was charged to nobody, in percent.
    nobodys: f64,
}

impl Default for Worst {
    fn default() -> Self {
        Self {
            part: f64::INFINITY,
            latest_start: 0.0,
            nobodys: 0.0,
        }
    }
}

impl Worst {
    /// Whether the others got what is theirs.
    fn judge(&mut self, nuisance: &Nuisance, alone: &Seen, seen: &Seen) -> Result<()> {
        let vcpus = f64::from(nuisance.vcpus);
        let due = alone.turns / (1.0 + vcpus);
        let part = seen.turns / due * 100.0;
        ensure!(
            part >= 100.0 - TOLERANCE,
            "who computes got {part:.1} % of its part"
        );
        ensure!(
            seen.part <= vcpus / (1.0 + vcpus) * 100.0 + TOLERANCE,
            "the nuisance was given more than its part"
        );
        let longer = seen.latest_start - alone.latest_start;
        ensure!(longer <= SLICE_US, "who wants little waits for {longer} us");
        ensure!(
            seen.nobodys <= MOST_FOR_NOBODY,
            "too much is charged to nobody"
        );
        self.part = self.part.min(part);
        self.latest_start = self.latest_start.max(seen.latest_start);
        self.nobodys = self.nobodys.max(seen.nobodys);
        Ok(())
    }
}
