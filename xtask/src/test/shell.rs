//! Scenarios about the operator's shell and the views of the consoles.
//!
//! All with guest stubs, which boot at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use super::{
    rig::{Rig, Start, Vm},
    session::Session,
    terminal::{Terminal, plain},
};

/// A stub that talks until it is told to end.
pub(super) const TALKS: &str = "checks=none facts=off end=shell";

/// The escape key's keys, as they are typed.
pub(super) mod key {
    pub(in super::super) const SHELL: &str = "\x1d0";
    pub(in super::super) const ALL: &str = "\x1da";
}

/// The prompt of an empty line.
pub(super) const PROMPT: &str = r"\rplinth> \x1b\[K";

/// The operator at the serial terminal, with the shell shown.
pub(super) struct Operator<'s> {
    pub(super) session: &'s mut Session,
    pub(super) limit: Duration,
}

impl Operator<'_> {
    /// Types a line, and returns what the shell says before its next prompt.
    pub(super) fn says(&mut self, line: &str) -> Result<String> {
        self.finishes(line, line)
    }

    /// Types the rest of a line, as [`Operator::says`].
    pub(super) fn finishes(&mut self, rest: &str, line: &str) -> Result<String> {
        self.session.send(&format!("{rest}\r"))?;
        // The prompt also comes anew after a line of the host: what counts is the one after this line's end.
        // Of a long line its end is shown.
        let line: String = line
            .chars()
            .skip(line.chars().count().saturating_sub(20))
            .collect();
        let line = regex::escape(&line);
        let answer = format!(r"\rplinth> [^\r\n]*{line}\x1b\[K\r\n((?s:.*?)){PROMPT}");
        let answer = Regex::new(&answer)?;
        let text = self
            .session
            .expect(&answer, self.limit)
            .with_context(|| format!("after {line:?}"))?;
        let found = answer
            .captures(&text)
            .context("what was waited for is in the text")?;
        Ok(plain(&found[1]))
    }

    /// As [`Operator::says`]; these words have to be in the answer.
    fn asks(&mut self, line: &str, words: &[&str]) -> Result<String> {
        let text = self.says(line)?;
        for word in words {
            ensure!(
                text.contains(word),
                "{:?} was answered without {word:?}: {text}",
                line
            );
        }
        Ok(text)
    }

    /// Asks until the VM is in this state.
    fn waits_for(&mut self, vm: &str, state: &str) -> Result<()> {
        let row = Regex::new(&format!(r"(?m)^{vm} +{state}\b"))?;
        let until = Instant::now() + self.limit;
        loop {
            let text = self.says("vm list")?;
            if row.is_match(&text) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("{vm} did not come to be {state}: {text}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    pub(super) fn switches(&mut self, keys: &str, shown: &str) -> Result<()> {
        self.session.send(keys)?;
        self.session.expect(&Regex::new(shown)?, self.limit)?;
        Ok(())
    }
}

/// A host of this `[host]` section with two VMs, when the first one talks.
fn boot_two(rig: &Rig, start: &Start, host: &str) -> Result<Session> {
    let vms = ["one", "two"].map(|name| Vm::stub(name, TALKS).section());
    let mut session = rig.boot_text(start, &format!("{host}{}", vms.concat()), |_| {})?;
    session.expect(&Regex::new("stub> ")?, start.place.limits().boot)?;
    Ok(session)
}

/// Every verb of the shell, on a host with two VMs; a third one comes and goes.
pub fn verbs(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = boot_two(rig, start, "[host]\nafter-last-vm = \"stay\"\n")?;
    let mut operator = Operator {
        session: &mut session,
        limit: limits.command,
    };
    operator.switches(key::SHELL, PROMPT)?;

    operator.asks("help", &["vm list", "inject nmi", "help VERB explains one"])?;
    operator.asks("help vm stop", &["vm stop VM [--timeout N]"])?;
    operator.waits_for("one", "running")?;
    operator.waits_for("two", "running")?;
    operator.asks(
        "vm show one",
        &["memory    32 MiB", "boot      stub", "one.0"],
    )?;
    operator.asks("host show", &["version     Plinth", "free", "TSC"])?;
    operator.asks("sched show", &["POOL", "WEIGHT", "one", "two"])?;
    operator.asks("stats", &["PCPU", "one.0", "two.0"])?;
    let alone = operator.asks("stats two", &["two.0"])?;
    ensure!(!alone.contains("one.0"), "not two's alone: {alone}");
    operator.asks("log --lines 50", &["two: starting"])?;
    operator.switches("log --follow --lines 1000\r", r"two: starting[^\n]*\n")?;
    operator.switches("q", PROMPT)?;

    operator.says("vm pause two")?;
    operator.waits_for("two", "paused")?;
    operator.says("vm resume two")?;
    operator.waits_for("two", "running")?;
    operator.says("inject nmi one")?;
    operator.says("vm reset two")?;
    operator.waits_for("two", "running")?;
    operator.says("vm stop two --timeout 0")?;
    operator.waits_for("two", "off")?;
    operator.asks("vm list", &["LAST END", "forced off"])?;
    operator.asks("vm stop two", &["error: "])?;
    let noted = [
        "operator (serial shell): vm pause two: done, paused",
        "operator (serial shell): vm stop two --timeout 0: done, ",
        "operator (serial shell): vm stop two: refused, ",
    ];
    operator.asks("log --lines 50", &noted)?;
    operator.says("vm start two")?;
    operator.waits_for("two", "running")?;

    operator.says(&format!(
        "vm create name=three memory=32M boot.kernel=stub boot.cmdline=\"{TALKS}\""
    ))?;
    operator.waits_for("three", "off")?;
    operator.says("vm start three")?;
    operator.waits_for("three", "running")?;
    // Completion, the console, and back.
    operator.session.send("vm con\tth\t\r")?;
    operator
        .session
        .expect(&Regex::new(r"console 3: three")?, limits.command)?;
    operator
        .session
        .expect(&Regex::new("stub> ")?, limits.command)?;
    operator.session.send("echo from three\r")?;
    operator
        .session
        .expect(&Regex::new(r"\nfrom three\r")?, limits.command)?;
    operator.switches(key::SHELL, PROMPT)?;
    operator.asks("vm destroy three", &["error: "])?;
    operator.says("vm destroy three --force")?;
    let until = Instant::now() + limits.command;
    while operator.says("vm list")?.contains("three") {
        ensure!(Instant::now() < until, "three does not go");
    }
    operator.asks("vm show three", &["there is no VM \"three\"", "^^^^^"])?;

    top(&mut operator)?;
    operator.session.send("host power-off\r")?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// The live view goes on by itself, obeys its keys, and ends.
fn top(operator: &mut Operator<'_>) -> Result<()> {
    let session = &mut *operator.session;
    session.send("top\r")?;
    for shown in [
        "since the start",
        r"\d; keys|e n sort, q ends",
        "VM +STATE +VCPUS",
    ] {
        session.expect(&Regex::new(shown)?, operator.limit)?;
    }
    session.expect(
        &Regex::new(r"(?s)sort cpu.*\none +running")?,
        operator.limit,
    )?;
    session.send("n")?;
    session.expect(
        &Regex::new(r"(?s)sort name.*\none .*\ntwo ")?,
        operator.limit,
    )?;
    session.send("q")?;
    session.expect(&Regex::new(PROMPT)?, operator.limit)?;
    Ok(())
}

/// What is no command does no harm: to the shell, to the guests, to the terminal's other views.
pub fn bad_input(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut session = boot_two(rig, start, "")?;
    let mut operator = Operator {
        session: &mut session,
        limit: limits.command,
    };
    operator.switches(key::SHELL, PROMPT)?;
    for (line, words) in [
        ("frobnicate", &["^^^^^^^^^^", "there is no verb"][..]),
        ("vm strt one", &["   ^^^^", "did you mean \"start\"?"]),
        ("vm pause oen", &["^^^", "did you mean \"one\"?"]),
        ("vm stop one --timeout 99999", &["from 0 to 3600"]),
        ("vm stop one --timeout", &["needs a value"]),
        ("vm list now", &["is too much here"]),
        ("vm show \"one", &["this quote is not closed"]),
        (
            "vm create name=one memory=32M boot.kernel=stub",
            &["error: "],
        ),
        (
            "vm create name=four memory=9T boot.kernel=stub",
            &["error: "],
        ),
        (
            "vm create name=four memory=32M boot.kernel=nothing",
            &["error: "],
        ),
        ("vm console nobody", &["there is no VM \"nobody\""]),
    ] {
        operator.asks(line, words)?;
    }
    // Longer than a line may be: the rest is not taken, and the line is answered.
    operator.session.send(&format!("{}\r", "x".repeat(3000)))?;
    operator.switches("", "there is no verb \"xxxxx")?;
    let garbage: String = (0..600u32)
        .map(|n| char::from((n * 7 % 128) as u8))
        .filter(|c| !matches!(c, '\x1d' | '\r' | '\n'))
        .collect();
    operator.session.send(&garbage)?;
    // Whatever it was taken for, this throws it away.
    operator.switches("\x1b[\x03\x03", r"\^C\r\n")?;
    operator.asks("vm list", &["one", "two"])?;
    at_once(&mut operator)?;
    // A line is done though the terminal goes on to a guest at once.
    operator.switches(
        "vm reset two\r\x1d1",
        r"(?s)two: reset.*console 1: one|console 1: one.*two: reset",
    )?;
    operator.switches(key::SHELL, PROMPT)?;
    // Half a line waits where it is.
    operator.session.send("vm li")?;
    operator.switches("\x1d1", "console 1: one")?;
    operator.session.send("echo still here\r")?;
    operator
        .session
        .expect(&Regex::new(r"\nstill here\r")?, limits.command)?;
    operator.switches(key::SHELL, r"\rplinth> vm li\x1b\[K")?;
    let text = operator.finishes("st", "vm list")?;
    ensure!(text.contains("one") && text.contains("two"), "{text}");

    all_consoles(&mut operator)?;
    session.send("\x1dq")?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// What is typed for the shell, for guests and for the escape key, all at once, comes to each in its turn.
fn at_once(operator: &mut Operator<'_>) -> Result<()> {
    operator.switches("\x1d2", r"(?s)console 2: two.*stub> ")?;
    operator.switches(key::SHELL, PROMPT)?;
    let keys = "vm console two\recho ahead\r\x1d0vm show two\r\x1d1echo behind\r";
    operator.switches(keys, r"\nbehind\r")?;
    operator.switches("\x1d2", "console 2: two")?;
    operator.switches("echo done\r", r"\ndone\r")?;
    // The terminal may have gone on in the midst of a line: each whole, once more.
    operator.switches("\x1dr", r"(?s)once more: two.*\nahead\r.*\ndone\r")?;
    operator.switches(key::SHELL, PROMPT)?;
    operator.switches("\x1dr", r"(?s)once more: shell.*\nmemory +32 MiB")
}

/// All consoles line by line: each line has its guest's name, and what is typed goes to the one named.
fn all_consoles(operator: &mut Operator<'_>) -> Result<()> {
    operator.switches(key::ALL, "all consoles; what is typed goes to one")?;
    operator.session.send("echo together\r")?;
    operator
        .session
        .expect(&Regex::new(r"\n\[one\] together\r\n")?, operator.limit)?;
    operator.switches("\x1d2", "console 2: two")?;
    operator.switches(key::ALL, "all consoles; what is typed goes to two")?;
    operator.session.send("echo again\r")?;
    operator
        .session
        .expect(&Regex::new(r"\n\[two\] again\r\n")?, operator.limit)?;
    Ok(())
}
