//! The scenario about the host's own keyboard and screen: the shell there, a guest's console, and the way back.
//!
//! Keys go through the emulator's PS/2 keyboard. What the screen shows is read off its pixels in QEMU; Bochs' display has
//! text only and shows nothing of ours, so there the effects of what was typed are looked at.

use std::{cell::RefCell, time::Duration};

use anyhow::{Context, Result};
use regex::Regex;

use super::{
    rig::{Rig, Start, Vm},
    session::Session,
    terminal::Terminal,
};
use crate::emulator::Emulator;

/// A stub that talks until it is told to end.
const TALKS: &str = "checks=none facts=off end=shell";

/// Whether lines match, one after the other, other lines between them or not.
fn shows(lines: &[String], wanted: &[Regex]) -> bool {
    let mut rest = lines.iter();
    wanted
        .iter()
        .all(|wanted| rest.any(|line| wanted.is_match(line)))
}

/// Somebody in front of the machine.
struct Operator {
    session: Session,
    limit: Duration,
    /// Whether what the screen shows can be read.
    sees: bool,
}

impl Operator {
    fn types(&self, keys: &str) -> Result<()> {
        self.session.type_on_keyboard(keys, self.limit)
    }

    /// Waits until lines of the screen match these patterns, one after the other, other lines between them or not.
    fn sees(&mut self, patterns: &[&str]) -> Result<()> {
        if !self.sees {
            return Ok(());
        }
        let wanted = patterns
            .iter()
            .map(|pattern| Regex::new(pattern))
            .collect::<Result<Vec<_>, _>>()?;
        let last = RefCell::new(Vec::new());
        let shown = self
            .session
            .wait_for_screen(&format!("{patterns:?}"), self.limit, |picture| {
                *last.borrow_mut() = picture.text();
                shows(&last.borrow(), &wanted)
            });
        shown.with_context(|| last.borrow().join("\n"))
    }

    /// Waits for this on the serial terminal.
    fn hears(&mut self, pattern: &str) -> Result<()> {
        let pattern = Regex::new(pattern)?;
        self.session.expect(&pattern, self.limit).map(drop)
    }
}

/// The shell by keyboard and screen, beside the serial terminal, which shows a guest all the time.
pub fn keyboard_and_screen(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let vms = ["one", "two"].map(|name| Vm::stub(name, TALKS).section());
    let text = format!(
        "[host]\nafter-last-vm = \"stay\"\nconsole-escape = \"ctrl-a\"\n{}",
        vms.concat()
    );
    let mut session = rig.boot_text(start, &text, |_| {})?;
    session.expect(&Regex::new("stub> ")?, limits.boot)?;
    let mut operator = Operator {
        session,
        limit: limits.command,
        sees: start.place.emulator() == Emulator::Qemu,
    };
    operator.sees(&["two: starting"])?;
    // The first key brings the shell; the line is completed.
    operator.types("vm li\t\r")?;
    operator.sees(&[
        "^ *plinth> vm list$",
        "NAME +STATE",
        "^ *one +running",
        "^ *two +running",
    ])?;
    operator.types("vm strt two\r")?;
    operator.sees(&[
        "plinth> vm strt two$",
        r"^ *\^\^\^\^",
        "did you mean \"start\"",
        "plinth>$",
    ])?;
    operator.types("vm stop two --timeout 0\r")?;
    operator.hears(r"\[plinth\] two: forced off\r?\n")?;
    operator.sees(&["plinth> vm stop two --timeout 0$", "plinth>$"])?;
    // A guest's console, with what it said before; what is typed goes to it.
    operator.types("\x011")?;
    operator.sees(&["plinth guest-stub: hello", "stub>$"])?;
    operator.types("echo by hand\r")?;
    operator.hears(r"\nby hand\r")?;
    operator.sees(&["stub> echo by hand$", "^ *by hand$", "stub>$"])?;
    // The log, and the shell as it was left.
    operator.types("\x01g")?;
    operator.sees(&["two: starting", "two: forced off"])?;
    operator.types("\x010vm start two\r")?;
    operator.sees(&[
        "plinth> vm stop two --timeout 0$",
        "plinth> vm start two$",
        "plinth>$",
    ])?;
    if start.place.emulator() == Emulator::Bochs {
        operator.types("host power-off\r")?;
    } else {
        // The escape key powers the host off, and that is the last line of the log but one.
        operator.session.keep_when_off();
        operator.types("\x01g")?;
        operator.sees(&["two: forced off", "two: starting"])?;
        operator.types("\x01q")?;
        operator.sees(&[
            r"operator \(screen escape key\): host power-off: done, powering off$",
            "powering off$",
        ])?;
        operator.session.let_go(limits.command)?;
    }
    operator.session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}
