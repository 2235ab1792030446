//! The scenario about as many guests as there may be, all of which run at once on two processors.
//!
//! Half of them compute on all their vCPUs as long as they are told to, a known piece of work at least, say what came of it and power off; the
//! other half compute for ever. One more, which waits for its terminal, is there from the beginning. They are made by the control
//! channel, each while those before it compute. Judged by what guests say, which is known, and by the host's own figures between two
//! moments of the machine's time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use manage::{
    command::{Answer, HostStats, Request, VcpuStats, VmState, VmSummary},
    config::MAX_VMS,
};
use regex::Regex;

use super::{
    rig::{Rig, Start},
    shell::{Operator, PROMPT, key},
    soak::{self, Program},
    terminal::Terminal,
};
use crate::emulator::{Emulator, Time};

/// All that there may be beside the one that is there from the beginning.
const GUESTS: usize = MAX_VMS - 1;
/// The host's processors.
const PCPUS: u32 = 2;
/// Steps of the known work: a tenth of a second of each vCPU or more.
const STEPS: u64 = 3_000_000;
/// Length of a time slice, in microseconds.
const SLICE_US: u64 = 2_000;
/// Slices that each vCPU is due between two looks at the figures.
const DUE_SLICES: u64 = 20;
/// What a vCPU may get of its part while all compute, in percent. They are made one after the other, so that the first have had more,
/// which is made up for then. What comes of the scheduler alone is within narrower bounds: `sched::moves`.
const ON_BOCHS: RangeInclusive<f64> = 40.0..=200.0;
/// In QEMU a processor's time goes on while the other works: a turn may be stretched to many slices, for which others are due.
const ON_QEMU: RangeInclusive<f64> = 5.0..=300.0;
/// What each vCPU of those that go on gets of its part at least from then on, in percent: that is some hundred turns.
const LEAST_LATER: f64 = 25.0;
/// Processor time that may be charged to nobody, in percent.
const MOST_FOR_NOBODY: f64 = 15.0;
/// A vCPU that has run so long does not begin any more: to start another one takes less.
const BEGUN_NS: u64 = 20_000_000;

/// What a guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Does {
    /// Computes for ever.
    Spins,
    /// Computes from an NMI to the next one, [`STEPS`] on each vCPU at least; tells what came of these, and powers off.
    Works,
}

impl Does {
    fn word(self) -> &'static str {
        match self {
            Does::Spins => "spin",
            Does::Works => "work",
        }
    }

    fn command_line(self) -> String {
        let how = match self {
            Does::Spins => "nuisance=spin-all".to_owned(),
            Does::Works => format!("mode=work iterations={STEPS} end=poweroff"),
        };
        format!("checks=none facts=off {how}")
    }
}

/// Number `n` of the guests: two, three or four vCPUs.
fn vcpus(n: usize) -> usize {
    2 + n % 3
}

fn name(n: usize, does: Does) -> String {
    format!("{}-{n:02}", does.word())
}

fn config(n: usize, does: Does) -> String {
    format!(
        "[[vm]]\nname = \"{}\"\nvcpus = {}\nmemory = \"8M\"\nboot.kernel = \"stub\"\nboot.cmdline = \"{}\"\n",
        name(n, does),
        vcpus(n),
        does.command_line()
    )
}

/// What processor `number` of a guest that works comes to.
fn result(number: u64, steps: u64) -> u64 {
    (0..steps).fold(number, |x, _| {
        x.wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407)
    })
}

/// Asks for what may not be refused.
fn done(program: &mut Program, request: &Request) -> Result<Answer> {
    program
        .ask(request)?
        .with_context(|| format!("{request:?} was refused"))
}

fn stats(program: &mut Program) -> Result<HostStats> {
    match done(program, &Request::Stats { vm: None })? {
        Answer::Stats { stats } => Ok(stats),
        other => bail!("stats: {other:?}"),
    }
}

/// Makes and starts guests, one after the other.
fn make(program: &mut Program, guests: &[(usize, Does)]) -> Result<()> {
    for &(n, does) in guests {
        let config = config(n, does);
        done(program, &Request::VmCreate { config })?;
        let vm = name(n, does);
        done(program, &Request::VmStart { vm })?;
    }
    Ok(())
}

/// Looks at the figures until they are `right`.
fn wait(
    program: &mut Program,
    limit: Duration,
    what: &str,
    mut right: impl FnMut(&HostStats) -> Result<bool>,
) -> Result<HostStats> {
    let deadline = Instant::now() + limit;
    loop {
        let stats = stats(program)?;
        if right(&stats).with_context(|| what.to_owned())? {
            return Ok(stats);
        }
        ensure!(Instant::now() < deadline, "not in time: {what}: {stats:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Whether all these guests compute on all their vCPUs at this moment, and have begun to a while ago.
fn all_compute(stats: &HostStats, guests: &[(usize, Does)]) -> Result<bool> {
    for &(n, does) in guests {
        let name = name(n, does);
        let vm = stats.vms.iter().find(|vm| vm.summary.name == name);
        let vm = vm.with_context(|| format!("{name} is off"))?;
        ensure!(vm.summary.state != VmState::Off, "{name} is off");
        let computes = |vcpu: &&VcpuStats| {
            matches!(&*vcpu.state, "running" | "waiting") && vcpu.run_ns >= BEGUN_NS
        };
        let computing = vm.vcpu.iter().filter(computes).count();
        if vm.summary.state != VmState::Running || computing != vcpus(n) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reads what all consoles show until each of these guests has said what it is to say. Of a guest that comes to run seldom, a line
/// may be shown in pieces.
fn all_say(
    operator: &mut Operator<'_>,
    program: &mut Program,
    limit: Duration,
    wanted: &BTreeMap<String, String>,
) -> Result<()> {
    let line = Regex::new(r"\[([a-z0-9-]+)\] ([^\r\n]*)[\r\n]")?;
    let mut said: BTreeMap<&String, String> = BTreeMap::new();
    let mut silent: BTreeSet<_> = wanted.keys().collect();
    while let Some(&first) = silent.first() {
        let text = match operator.session.expect(&line, limit) {
            Ok(text) => text,
            Err(error) => {
                let vm = first.clone();
                let first = program.ask(&Request::VmShow { vm });
                bail!("{error}; silent are {silent:?}; the first of them: {first:?}");
            }
        };
        let found = line.captures(&text).context("a line")?;
        let Some((name, wanted)) = wanted.get_key_value(&found[1]) else {
            continue;
        };
        let said = said.entry(name).or_default();
        said.push_str(&found[2]);
        if said.contains(wanted) {
            silent.remove(name);
        }
    }
    Ok(())
}

/// What each vCPU of these guests has run since its VM's start, in nanoseconds.
fn ran(stats: &HostStats, guests: &[(usize, Does)]) -> Result<Vec<u64>> {
    let mut ran = Vec::new();
    for &(n, does) in guests {
        let name = name(n, does);
        let vm = stats.vms.iter().find(|vm| vm.summary.name == name);
        let vm = vm.with_context(|| format!("{name} is off"))?;
        ran.extend(vm.vcpu.iter().map(|vcpu| vcpu.run_ns));
    }
    Ok(ran)
}

/// The least and the most of what all have had, in percent of the mean.
fn extremes(ran: &[u64]) -> (f64, f64) {
    let mean = ran.iter().sum::<u64>() as f64 / ran.len() as f64;
    let percent = |ran: Option<&u64>| ran.map_or(0.0, |&ran| ran as f64 / mean * 100.0);
    (percent(ran.iter().min()), percent(ran.iter().max()))
}

/// What some guests had in a while in which all their vCPUs computed.
#[derive(Debug)]
struct While {
    /// What each vCPU ran, in nanoseconds.
    ran: Vec<u64>,
    /// Processor time that was not theirs, in percent.
    nobodys: f64,
    /// The figures at its end.
    last: HostStats,
}

/// Tells these guests, which work, to begin or to end.
fn nudge(program: &mut Program, guests: &[(usize, Does)]) -> Result<()> {
    for &(n, does) in guests {
        let (vm, vcpu) = (name(n, does), None);
        done(program, &Request::InjectNmi { vm, vcpu })?;
    }
    Ok(())
}

/// Lists the VMs until so many are in this state.
fn wait_for(
    program: &mut Program,
    limit: Duration,
    count: usize,
    state: VmState,
) -> Result<Vec<VmSummary>> {
    let deadline = Instant::now() + limit;
    loop {
        let vms = program.vms()?;
        if vms.iter().filter(|vm| vm.state == state).count() == count {
            return Ok(vms);
        }
        let late = Instant::now() >= deadline;
        ensure!(!late, "{count} do not come to be {state:?}: {vms:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until all these guests compute, and each of their vCPUs has been due some slices since.
fn look(program: &mut Program, limit: Duration, guests: &[(usize, Does)]) -> Result<While> {
    let first = wait(program, limit, "all compute", |stats| {
        all_compute(stats, guests)
    })?;
    let vcpus: usize = guests.iter().map(|&(n, _)| vcpus(n)).sum();
    let window = DUE_SLICES * SLICE_US * 1000 * vcpus as u64 / u64::from(PCPUS);
    let last = wait(program, limit, "time passes", |stats| {
        Ok(stats.at_ns >= first.at_ns + window)
    })?;
    ensure!(all_compute(&last, guests)?, "some stopped: {last:?}");
    let pairs = ran(&last, guests)?.into_iter().zip(ran(&first, guests)?);
    let ran: Vec<_> = pairs.map(|(last, first)| last - first).collect();
    ensure!(ran.len() == vcpus, "{} vCPUs instead of {vcpus}", ran.len());
    let passed = f64::from(PCPUS) * (last.at_ns - first.at_ns) as f64;
    let nobodys = 100.0 - ran.iter().sum::<u64>() as f64 / passed * 100.0;
    ensure!(
        nobodys <= MOST_FOR_NOBODY,
        "{nobodys:.1} % of the processors' time are nobody's"
    );
    Ok(While { ran, nobodys, last })
}

/// As many guests as there may be run at once, work and end; then all is as it was before.
pub fn running(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let (mut session, mut program) = soak::boot(rig, start, "", |machine| {
        machine.cpus = PCPUS;
        if start.place.emulator() == Emulator::Bochs {
            // Guests compute all the time while answers go over the line, at its speed.
            machine.time = Time::Instructions { shift: 6 };
        }
    })?;
    session.allow(2 * start.place.patience());
    let mut operator = Operator {
        session: &mut session,
        limit: limits.command,
    };
    operator.switches(key::SHELL, PROMPT)?;
    let request = Request::PoolSet {
        pool: "default".to_owned(),
        policy: None,
        slice_us: Some(SLICE_US),
    };
    done(&mut program, &request)?;
    let guests = (0..GUESTS).map(|n| (n, [Does::Spins, Does::Works][n % 2]));
    let all: Vec<_> = guests.collect();
    let (spin, work): (Vec<_>, Vec<_>) = all.iter().partition(|guest| guest.1 == Does::Spins);

    // The host's own structures come to the size that they keep.
    make(&mut program, &all)?;
    wait_for(&mut program, limits.boot, MAX_VMS, VmState::Running)?;
    program.destroy_all()?;
    soak::fill_history(&mut operator)?;
    soak::untouched_goes_on(&mut operator, &mut program)?;
    let before = program.memory()?;

    operator.session.send(key::ALL)?;
    make(&mut program, &all)?;
    let ready = all.iter().map(|&(n, does)| {
        let how = match does {
            Does::Works => "load work: ready",
            Does::Spins => "nuisance spin-all: begins,",
        };
        (name(n, does), format!("{how} on {} processors", vcpus(n)))
    });
    all_say(&mut operator, &mut program, limits.boot, &ready.collect())?;
    nudge(&mut program, &work)?;
    let at_once = look(&mut program, limits.boot, &all)?;
    let (least, most) = extremes(&at_once.ran);
    let parts = format!(
        "{} vCPUs at once had {least:.0} to {most:.0} % of their part",
        at_once.ran.len()
    );
    let bounds = match start.place.emulator() {
        Emulator::Qemu => ON_QEMU,
        Emulator::Bochs => ON_BOCHS,
    };
    ensure!(bounds.contains(&least) && bounds.contains(&most), "{parts}");

    // Meanwhile, the operator and a guest that wants little are answered.
    operator.switches(key::SHELL, PROMPT)?;
    let listed = operator.says("vm list")?;
    for &(n, does) in &all {
        let row = Regex::new(&format!(r"(?m)^{} +running\b", name(n, does)))?;
        ensure!(row.is_match(&listed), "/{row}/ is not there: {listed}");
    }
    operator.switches("top\r", "PCPU")?;
    operator.switches("q", PROMPT)?;
    soak::untouched_goes_on(&mut operator, &mut program)?;

    // Each of those that work says what is known, and powers off.
    operator.session.send(key::ALL)?;
    nudge(&mut program, &work)?;
    let results: Vec<u64> = (0..4).map(|number| result(number, STEPS)).collect();
    let wanted = work.iter().map(|&(n, does)| {
        let results = &results[..vcpus(n)];
        let count = results.len();
        let results: String = results.iter().map(|n| format!(" {n:016x}")).collect();
        let line = format!("load work: {STEPS} steps on {count} processors:{results}");
        (name(n, does), line)
    });
    all_say(&mut operator, &mut program, limits.boot, &wanted.collect())?;
    operator.switches(key::SHELL, PROMPT)?;
    let vms = wait_for(&mut program, limits.command, work.len(), VmState::Off)?;
    for &(n, does) in &work {
        let name = name(n, does);
        let vm = vms.iter().find(|vm| vm.name == name);
        let end = vm.and_then(|vm| vm.last_end.as_deref());
        ensure!(end == Some("powered off"), "{name}: {vm:?}");
    }

    // What they had is the others' now.
    let rest = look(&mut program, limits.boot, &spin)?;
    let pairs = ran(&rest.last, &spin)?
        .into_iter()
        .zip(ran(&at_once.last, &spin)?);
    let later: Vec<_> = pairs.map(|(last, first)| last - first).collect();
    let (least, most) = extremes(&later);
    let later = format!("{} that went on had {least:.0} to {most:.0} %", later.len());
    ensure!(least >= LEAST_LATER, "{later}");
    program.destroy_all()?;
    soak::fill_history(&mut operator)?;
    soak::untouched_goes_on(&mut operator, &mut program)?;
    program.nothing_is_left(before)?;
    operator.session.send("host power-off\r")?;
    session.wait_for_power_off(limits.command)?;
    Ok(format!(
        "{MAX_VMS} VMs, {parts}, {:.1} % were nobody's; {later}, {:.1} % were nobody's",
        at_once.nobodys, rest.nobodys
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_right() {
        for does in [Does::Spins, Does::Works] {
            let config = config(11, does);
            let parsed = manage::config::parse("p", config.as_bytes());
            assert_eq!(parsed.report(), "p: 1 VM can start\n", "{config}");
        }
    }

    #[test]
    fn a_result_depends_on_the_processor_and_on_each_step() {
        assert_eq!(result(1, 0), 1);
        assert_eq!(result(0, 1), 1_442_695_040_888_963_407);
        assert_ne!(result(0, 7), result(1, 7));
        assert_ne!(result(0, 7), result(0, 8));
    }
}
