//! Scenarios about consoles, and about what the `[host]` section and `restart` say.
//!
//! All with guest stubs, which boot at once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use regex::Regex;

use super::{
    rig::{Rig, Start, Vm},
    session::Session,
    terminal::Terminal,
};
use crate::emulator::End;

/// Lines that the stub's `console-flood` prints.
const FLOOD_LINES: u32 = 500;

/// A stub that ends in this way at once.
fn brief(name: &'static str, command_line: &'static str) -> Vm<'static> {
    Vm::stub(name, command_line)
}

/// What is typed while a guest takes no interrupts and reads nothing waits for it, all of it.
pub fn input(rig: &Rig, start: &Start) -> Result<String> {
    const BYTES: usize = 2000;
    const ROUNDS: u32 = 5;
    let limits = start.place.limits();
    let mut session = rig.boot(start, &[brief("stub", "checks=none facts=off end=shell")])?;
    session.expect(&Regex::new("stub> ")?, limits.boot)?;
    let typed: String = ('0'..='9').cycle().take(BYTES).collect();
    let report = Regex::new(r"deaf: .*\n")?;
    for _ in 0..ROUNDS {
        session.send(&format!("deaf\r{typed}\r"))?;
        let said = session.expect(&report, limits.command)?;
        let wanted = format!("deaf: {BYTES} bytes waited, 0 of them out of order");
        ensure!(said.contains(&wanted), "the guest says: {}", said.trim());
    }
    session.send("poweroff\r")?;
    session.wait_for_power_off(limits.command)?;
    Ok(format!("{ROUNDS} times {BYTES} bytes"))
}

/// A guest in focus that floods its console loses nothing; another ends meanwhile, and what Plinth says
/// of it stands within no line. Then, the console can be switched in the midst of a flood.
pub fn flood(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let flood = "checks=none facts=off abuse=console-flood end=shell";
    let text = format!(
        "{}{}",
        brief("flood", flood).section(),
        brief("other", "checks=cpuid facts=off end=poweroff").section()
    );
    let mut session = rig.boot_text(start, &text, |_| {})?;
    session.expect(&Regex::new("stub> ")?, limits.boot)?;
    session.send("\x1d2")?;
    session.expect(&Regex::new("console 2: other")?, limits.command)?;
    session.send("\x1d1poweroff\r")?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    flood_is_whole(&text)?;
    ensure!(
        text.lines()
            .any(|line| line == "[plinth] other: powered off"),
        "the other guest's end does not stand on a line by itself"
    );
    Ok(format!("{FLOOD_LINES} lines"))
}

/// The flood, each line whole and in its place.
fn flood_is_whole(text: &str) -> Result<()> {
    let mut numbers = 0..FLOOD_LINES;
    for line in text.lines().filter(|line| line.contains("flood 0")) {
        let number = numbers
            .next()
            .context("there are more lines than were sent")?;
        let wanted = format!("flood {number:04} {:-<48}", "");
        ensure!(line == wanted, "{line:?} came instead of {wanted:?}");
    }
    let missing = numbers.count();
    ensure!(missing == 0, "{missing} lines are missing");
    Ok(())
}

/// VMs start again as `restart` says, not too often and not too soon.
pub fn restarts(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let policy = |vm: Vm, policy: &str| {
        let restart = format!("restart = \"{policy}\"\n[vm.boot]");
        vm.section().replace("[vm.boot]", &restart)
    };
    let quick = "checks=none facts=off end=";
    let lines = ["poweroff", "triple-fault", "reset", "shell"].map(|end| format!("{quick}{end}"));
    let [off, fault, reset, shell] = &lines;
    let text = [
        policy(Vm::stub("always", off), "always"),
        policy(Vm::stub("failure", fault), "on-failure"),
        policy(Vm::stub("off", off), "on-failure"),
        policy(Vm::stub("never", fault), "never"),
        Vm::stub("reset", reset).section(),
        Vm::stub("shell", shell).section(),
    ]
    .concat();
    let mut session = rig.boot_text(start, &text, |_| {})?;
    // In any order: each of them has its own pace.
    for line in [
        "always: ended soon after its start, again: starts in 1 s",
        "reset: ended soon after its start, again: starts in 1 s",
        "failure: failed 5 times soon after its start: not restarted any more",
    ] {
        wait_for_line(&mut session, line, limits.boot)?;
    }
    session.send("\x1dq")?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    let count = |line: &str| text.lines().filter(|other| *other == line).count();
    for (line, times) in [
        ("[plinth] failure: triple fault", 5),
        ("[plinth] never: triple fault", 1),
        ("[plinth] off: powered off", 1),
    ] {
        let found = count(line);
        ensure!(found == times, "{line:?} came {found} times");
    }
    for (vm, end) in [("always", "powered off"), ("reset", "reset")] {
        spaced(&text, vm, end)?;
    }
    Ok(String::new())
}

/// A VM that ends again and again: after three ends it waits, each time twice as long, up to 32 s of the machine's time, however
/// much of that has passed here.
fn spaced(text: &str, vm: &str, end: &str) -> Result<()> {
    let wait = Regex::new(&format!(
        r"(?m)^\[plinth\] {vm}: ended soon after its start, again: starts in (\d+) s$"
    ))?;
    let waits = wait.captures_iter(text).map(|found| found[1].parse());
    let waits = waits.collect::<Result<Vec<u32>, _>>()?;
    let due = (0..waits.len()).map(|n| 1 << n.min(5));
    ensure!(due.eq(waits.iter().copied()), "{vm} waited {waits:?} s");
    let line = format!("[plinth] {vm}: {end}");
    let ends = text.lines().filter(|other| *other == line).count();
    // The last end may have been told, and the wait not.
    let wanted = waits.len() + 3..=waits.len() + 4;
    ensure!(
        !waits.is_empty() && wanted.contains(&ends),
        "{vm} ended {ends} times, and waited {waits:?} s"
    );
    Ok(())
}

/// Waits until Plinth has said this, now or before.
fn wait_for_line(session: &mut Session, line: &str, limit: Duration) -> Result<()> {
    let wanted = format!("[plinth] {line}");
    let said = |session: &Session| session.text().lines().any(|other| other == wanted);
    let any = Regex::new(r"\[plinth\] .*\n")?;
    while !said(session) {
        session
            .expect(&any, limit)
            .with_context(|| format!("waiting for {wanted:?}"))?;
    }
    Ok(())
}

/// The keys of `[host]`, and a VM without a console.
pub fn host_keys(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mute = brief("mute", "checks=cpuid facts=off end=poweroff")
        .section()
        .replace("[vm.boot]", "console = false\n[vm.boot]");
    let text = format!(
        "[host]\nafter-last-vm = \"halt\"\nconsole-escape = \"ctrl-a\"\nlog-level = \"error\"\n{mute}{}",
        brief("shell", "checks=none facts=off end=shell").section()
    );
    let mut session = rig.boot_text(start, &text, |_| {})?;
    session.expect(&Regex::new("stub> ")?, limits.boot)?;
    wait_for_line(&mut session, "mute: powered off", limits.command)?;
    // The default escape key means nothing here, neither to Plinth nor to the stub.
    session.send("\x1decho one\r")?;
    session.expect(&Regex::new(r"\none\r")?, limits.command)?;
    session.send("\x01l")?;
    session.expect(&Regex::new(r"\* 1  shell")?, limits.command)?;
    session.send("poweroff\r")?;
    let halted = "the last VM has ended: the machine can be switched off";
    wait_for_line(&mut session, halted, limits.command)?;
    ensure!(
        session
            .wait_for(&End::PoweredOff, Duration::from_secs(3))
            .is_err(),
        "the machine did not halt"
    );
    let text = session.text();
    for (line, why) in [
        ("check cpuid", "the VM without a console has one"),
        ("mute  (", "the VM without a console has one"),
        ("starting", "the log shows more than errors"),
    ] {
        let after = text.split("can start").last().unwrap_or_default();
        ensure!(!after.contains(line), "{why}");
    }
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flood() -> String {
        let line = |number| format!("flood {number:04} {:-<48}\n", "");
        (0..FLOOD_LINES).map(line).collect()
    }

    #[test]
    fn a_flood_with_a_host_line_between_is_whole() {
        let text = flood();
        assert!(flood_is_whole(&text).is_ok());
        let (first, second) = text.split_at(text.len() / 2);
        let text = format!("{first}[plinth] other: powered off\n{second}");
        assert!(flood_is_whole(&text).is_ok());
    }

    #[test]
    fn what_is_missing_or_broken_in_a_flood_is_seen() {
        let text = flood();
        let cut = text.replace("flood 0250 ", "flood 0250");
        assert!(flood_is_whole(&cut).is_err());
        let (whole, _) = text.split_at(text.len() - 60);
        assert!(flood_is_whole(whole).is_err());
        let broken = text.replacen("flood 0007 -", "flood 0007 \n[plinth] x\n-", 1);
        assert!(flood_is_whole(&broken).is_err());
    }
}
