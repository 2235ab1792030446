//! Scenarios about the scheduler: shares, deadlines, and more guests than processors.
//!
//! Shares and deadlines are judged by what guests count by their TSC, on machines whose clock does not depend on how
//! busy the workstation is.

use anyhow::{Context, Result, ensure};
use regex::Regex;

use super::{
    linux::{self, Shell},
    rig::{Rig, Start, Vm},
    terminal::Terminal,
};
use crate::guests;

/// How far a share may be from what the weights say, in percent.
const TOLERANCE: f64 = 5.0;

/// The section of a VM, with further keys.
fn section(vm: &Vm<'_>, keys: &str) -> String {
    vm.section()
        .replacen("[vm.boot]", &format!("{keys}\n[vm.boot]"), 1)
}

/// The numbers of a guest's report on console `number`.
fn report(
    session: &mut impl Terminal,
    number: usize,
    line: &str,
    start: &Start,
) -> Result<Vec<f64>> {
    session.send(&format!("\x1d{number}"))?;
    let said = session
        .expect(&Regex::new(line)?, start.place.limits().boot)
        .with_context(|| format!("the report on console {number}"))?;
    let caught = Regex::new(line)?;
    let numbers = caught.captures(&said).context("a report")?;
    let numbers = numbers.iter().skip(1).flatten();
    Ok(numbers
        .map(|n| n.as_str().parse())
        .collect::<Result<_, _>>()?)
}

/// Three guests spin with weights 1:2:4 on one processor, and get CPU time in that proportion; a fourth with a reservation works in
/// each of its periods, and is never late.
pub fn shares(rig: &Rig, start: &Start) -> Result<String> {
    const WEIGHTS: [u32; 3] = [100, 200, 400];
    const NAMES: [&str; 3] = ["one", "two", "four"];
    let spins = "mode=share checks=none facts=off end=spin";
    let mut text = "[host]\nscheduler = \"reservation\"\nslice = \"2ms\"\n\n".to_owned();
    for (name, weight) in NAMES.into_iter().zip(WEIGHTS) {
        text += &section(&Vm::stub(name, spins), &format!("weight = {weight}"));
    }
    let works = "mode=periodic checks=none facts=off end=halt";
    let reservation = "reservation = { budget = \"2ms\", period = \"10ms\" }";
    text += &section(&Vm::stub("real-time", works), reservation);
    let mut session = rig.boot_text(start, &text, |machine| machine.cpus = 1)?;
    // The first is shown from the beginning; keys that come before there are guests are nobody's.
    let mut ran = Vec::new();
    for number in 1..=NAMES.len() {
        let share = r"load share: ran (\d+) of (\d+) us";
        ran.push(report(&mut session, number, share, start)?[0]);
    }
    let jobs =
        r"load periodic: (\d+) jobs, (\d+) missed, latest start (\d+) us, latest end (\d+) us";
    let periodic = report(&mut session, NAMES.len() + 1, jobs, start)?;
    let sum: f64 = ran.iter().sum();
    let weights: u32 = WEIGHTS.iter().sum();
    for (ran, weight) in ran.iter().zip(WEIGHTS) {
        let due = sum * f64::from(weight) / f64::from(weights);
        let off = (ran - due).abs() / due * 100.0;
        ensure!(
            off <= TOLERANCE,
            "weight {weight}: ran {ran} us, which is {off:.1} % from {due:.0} us"
        );
    }
    ensure!(periodic[0] > 0.0, "no jobs");
    ensure!(
        periodic[1] == 0.0,
        "{} of {} jobs were late, the latest ended after {} us",
        periodic[1],
        periodic[0],
        periodic[3]
    );
    Ok(format!(
        "1 : {:.2} : {:.2}, {} jobs in time, the latest after {} us",
        ran[1] / ran[0],
        ran[2] / ran[0],
        periodic[0],
        periodic[3]
    ))
}

/// Eight Linux guests share two processors: each comes to its shell and answers.
pub fn eight_linux(rig: &Rig, start: &Start) -> Result<String> {
    const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let limits = start.place.limits();
    let guest = &guests::CATALOGUE[0];
    let text: String = NAMES
        .into_iter()
        .map(|name| {
            let vm = Vm {
                name,
                memory_mib: 128,
                ..Vm::linux(guest)
            };
            vm.section()
        })
        .collect();
    let mut session = rig.boot_text(start, &text, |machine| {
        machine.cpus = 2;
        machine.memory_mib = 2048;
    })?;
    let patient = linux::Limits {
        boot: 4 * limits.boot,
        command: 4 * limits.command,
    };
    let mut stolen = 0;
    for number in 1..=NAMES.len() {
        session.send(&format!("\x1d{number}"))?;
        // What came before the switch has been shown, or is kept; an empty line brings the prompt either way.
        let (mut shell, _) = Shell::wait_for(&mut session, patient)
            .with_context(|| format!("the Linux on console {number}"))?;
        let answer = shell.ask(&format!("echo $(({number} * 111))"))?;
        ensure!(answer == format!("{}", number * 111), "{answer}");
        stolen += linux::stolen(&mut shell)?;
        shell.say("poweroff")?;
    }
    ensure!(stolen > 0, "no steal time was told");
    session.wait_for_power_off(patient.command)?;
    Ok(format!("{} shells on 2 processors", NAMES.len()))
}
