//! Scenarios in which no guest runs and the host tries itself, or fails on purpose.
//!
//! They boot a kernel with the feature `selftest`; see the kernel's `selftest.rs` for what it
//! prints.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use regex::Regex;

use super::{
    place::Place,
    rig::{Rig, Start},
    terminal::Terminal,
};
use crate::emulator::{End, Machine, Missed, Time};

/// A failure of the host, and what its report has to name.
pub struct Fault {
    /// The self-test's word.
    pub word: &'static str,
    /// What happened, where, and more: a pattern for each.
    shows: [&'static str; 3],
}

/// The stack pointer, for the registers as a whole.
const REGISTERS: &str = r"(?i)\brsp\b";

/// The failures that are tried.
pub const FAULTS: [Fault; 6] = [
    Fault {
        word: "page-fault",
        shows: ["page fault", "read_unmapped", REGISTERS],
    },
    Fault {
        word: "stack-overflow",
        shows: ["stack|double fault", "recurse", REGISTERS],
    },
    Fault {
        word: "write-code",
        shows: ["page fault", "write_code", REGISTERS],
    },
    Fault {
        word: "execute-data",
        shows: ["page fault", "execute_data", REGISTERS],
    },
    Fault {
        word: "invalid-opcode",
        shows: ["invalid opcode", "invalid_opcode", REGISTERS],
    },
    Fault {
        word: "panic",
        shows: ["on purpose", "selftest", "from 0x"],
    },
];

/// The machine's time is the workstation's: the host waits for us, or for nobody.
fn real_time(machine: &mut Machine) {
    machine.time = Time::Workstation;
}

/// Gives the machine the processor with the most to check.
pub fn newer_processor(start: &Start) -> impl FnOnce(&mut Machine) + use<> {
    let model = start.place.newer_model();
    move |machine| machine.cpu_model = model.map(str::to_owned).or(machine.cpu_model.take())
}

/// The checks of the virtualization backend, on the processor itself.
pub fn backend(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_selftest(start, "backend", newer_processor(start))?;
    let sum = Regex::new(r"selftest done: (\d+) passed, (\d+) failed|selftest FAILED: [^\r\n]*")?;
    session.expect(&sum, limits.boot)?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    succeeded(&text)?;
    let found = sum.captures(&text).context("it was there before")?;
    let passed = found.get(1).map_or("0", |number| number.as_str());
    ensure!(passed != "0", "no check ran");
    Ok(format!("{passed} checks"))
}

/// Timer, kicks between processors, and the serial line in both directions.
pub fn interrupts(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_selftest(start, "interrupts", real_time)?;
    session.expect(&Regex::new("selftest waits for a byte")?, limits.boot)?;
    session.send("x")?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    succeeded(&text)?;
    for name in ["timer", "early timer", "kick", "output", "input"] {
        let said = text.contains(&format!("selftest ok {name}:"));
        ensure!(said, "{name} was not tried");
    }
    Ok(String::new())
}

/// A processor that the firmware lists and that does not answer is left out.
pub fn absent_processor(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_selftest(start, "absent-processor", real_time)?;
    session.expect(&Regex::new("selftest ok absent processor")?, limits.boot)?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// The host can restart its machine.
pub fn reset(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_selftest(start, "reset", |_| {})?;
    session.expect(&Regex::new("selftest ok reset")?, limits.boot)?;
    session.wait_for(&End::Reset, limits.command)?;
    Ok(String::new())
}

/// The VMs of the `lifecycle` self-test.
const LIFECYCLE: &str = r#"
[host]
after-last-vm = "stay"
files = ["stub"]

[[vm]]
name = "button"
memory = "32M"
autostart = false
boot = { kernel = "stub", cmdline = "checks=none facts=off end=button" }

[[vm]]
name = "deaf"
vcpus = 2
memory = "32M"
autostart = false
boot = { kernel = "stub", cmdline = "checks=none facts=off end=halt" }

[[vm]]
name = "unfed"
vcpus = 2
memory = "32M"
autostart = false
watchdog = "reset"
boot = { kernel = "stub", cmdline = "checks=none facts=off end=unfed" }

[[vm]]
name = "held"
memory = "32M"
autostart = false
watchdog = "pause"
boot = { kernel = "stub", cmdline = "checks=none facts=off end=unfed" }

[[vm]]
name = "cut"
memory = "32M"
autostart = false
watchdog = "power-off"
boot = { kernel = "stub", cmdline = "checks=none facts=off end=unfed" }

[[vm]]
name = "shocked"
memory = "32M"
autostart = false
watchdog = "nmi"
boot = { kernel = "stub", cmdline = "checks=none facts=off end=watched-by-nmi" }

[[vm]]
name = "noted"
memory = "32M"
autostart = false
watchdog = "log"
boot = { kernel = "stub", cmdline = "checks=none facts=off end=watched" }
"#;

/// Every verb for VMs, what must be refused, and a thousand VMs that come and go and leave nothing behind.
pub fn lifecycle(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_selftest_with(start, "lifecycle", LIFECYCLE)?;
    let rounds = Regex::new(r"selftest (ok|FAILED) rounds: ([^\r\n]*)")?;
    session.expect(&rounds, 2 * limits.boot)?;
    // The steps that follow wait for watchdogs, while other guests spin.
    session.wait_for_power_off(2 * limits.boot)?;
    let text = session.text();
    succeeded(&text)?;
    let steps = text.matches("selftest ok ").count();
    ensure!(steps >= 50, "only {steps} steps were taken");
    for said in [
        "stub: an NMI came",
        "stub: the power button was pressed",
        "button: powered off",
        "deaf: does not shut down: forced off",
        "unfed: its watchdog was not fed: reset",
        "unfed: powered off",
        "held: its watchdog was not fed: paused while it shuts down",
        "cut: its watchdog was not fed: powered off",
        "shocked: its watchdog was not fed: NMI sent",
        "shocked: powered off",
        "noted: its watchdog was not fed: nothing is done",
        "noted: powered off",
    ] {
        ensure!(text.contains(said), "{said:?} was not said");
    }
    let paused = |line: &str| line.ends_with("held: its watchdog was not fed: paused");
    ensure!(text.lines().any(paused), "nothing was paused while it ran");
    if start.place == Place::Bochs {
        let said = "wide: cannot start: a reservation of 30.0 % of a processor is more than any has left (5.0 % at most)";
        let times = text.matches(said).count();
        ensure!(times == 3, "{said:?} was said {times} times");
        ensure!(text.contains("selftest ok start-fails:"), "no start failed");
    }
    let resets = text
        .matches("unfed: its watchdog was not fed: reset")
        .count();
    ensure!(resets == 1, "the watchdog reset its guest {resets} times");
    let rounds = rounds.captures(&text).and_then(|found| found.get(2));
    Ok(rounds.map_or_else(String::new, |rounds| rounds.as_str().to_owned()))
}

/// A failure of the host is reported: what, where by name, and the registers.
pub fn fault(rig: &Rig, start: &Start, fault: &Fault) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_selftest(start, fault.word, |_| {})?;
    session.expect(&Regex::new("HOST FAULT")?, limits.boot)?;
    session.expect(&Regex::new("Plinth stopped: powering off")?, limits.command)?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    let report = text
        .find("HOST FAULT")
        .map(|begin| &text[begin..])
        .context("no report")?;
    for pattern in fault.shows.into_iter().chain(["processors online"]) {
        let shown = Regex::new(pattern)?.is_match(report);
        ensure!(shown, "the report does not show /{pattern}/");
    }
    Ok(String::new())
}

/// After a fault the machine stands still, with the report on its screen, or restarts.
pub fn after_fault(rig: &Rig, start: &Start, reset: bool) -> Result<String> {
    let limits = start.place.limits();
    let (word, last) = match reset {
        true => ("panic-reset", r"Plinth stopped: restarting in \d+ seconds"),
        false => ("panic-halt", "Plinth stopped: the machine is halted"),
    };
    let mut session = rig.boot_selftest(start, word, |machine| {
        // The time to read the report passes sooner.
        machine.time = Time::Instructions { shift: 6 };
    })?;
    session.expect(&Regex::new(last)?, limits.boot)?;
    if reset {
        session.wait_for(&End::Reset, limits.command)?;
    } else {
        let end = session.wait_for(&End::PoweredOff, Duration::from_secs(2));
        let end = end.expect_err("a machine that halts does not power off");
        ensure!(end.root_cause().is::<Missed>(), "{end:#}");
    }
    Ok(String::new())
}

/// No line says that something failed.
fn succeeded(text: &str) -> Result<()> {
    let failed: Vec<_> = text
        .lines()
        .filter(|line| line.contains("selftest FAILED"))
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_quoted() {
        assert!(succeeded("selftest ok a\nselftest done: 1 passed, 0 failed\n").is_ok());
        let error = succeeded("selftest FAILED b: no\n").unwrap_err();
        assert!(error.to_string().contains("FAILED b: no"));
    }
}
