//! The command line: `key=value` words, separated by spaces.

use crate::boot::COMMAND_LINE;
use crate::console::Text;
use crate::power::End;
use crate::println;

/// A value of the command line, kept.
pub type Value = Text<160>;

/// What the run does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Check,
    Bench,
    /// A guest that only spins.
    Share,
    /// A guest that works in each period.
    Periodic,
    /// A guest that wants little, and tells how late it got it.
    Waits,
    /// A guest that computes, and tells how far it came.
    Counts,
    /// A guest whose processors do a known piece of work each.
    Work,
}

/// The command line, understood.
pub struct Options {
    /// Groups and checks to run, separated by commas; empty is all.
    pub checks: Value,
    pub abuse: Value,
    /// How to be a nuisance for ever; empty: not at all.
    pub nuisance: Value,
    pub end: End,
    pub mode: Mode,
    pub facts: bool,
    /// Repetitions of each measured operation, or steps of work; `None` is the operation's own.
    pub iterations: Option<u64>,
    /// Address of the emulated device register that the measurements touch.
    pub mmio: Option<u64>,
    /// The only operations to measure, separated by commas; empty is all.
    pub only: Value,
    /// The measurements wait for a key.
    pub wait_for_key: bool,
}

/// Parses a command line. What is not understood is reported and left out; words without `=`
/// are the loader's (QEMU puts the file name first).
pub fn parse(line: &Text<COMMAND_LINE>) -> Options {
    let mut options = Options {
        checks: Value::new(),
        abuse: Value::new(),
        nuisance: Value::new(),
        end: End::Halt,
        mode: Mode::Check,
        facts: true,
        iterations: None,
        mmio: None,
        only: Value::new(),
        wait_for_key: false,
    };
    for word in line.as_str().split_ascii_whitespace() {
        let Some((key, value)) = word.split_once('=') else {
            continue;
        };
        let understood = match key {
            "checks" => {
                options.checks = Value::format(format_args!("{value}"));
                true
            }
            "abuse" => {
                options.abuse = Value::format(format_args!("{value}"));
                true
            }
            "nuisance" => {
                options.nuisance = Value::format(format_args!("{value}"));
                true
            }
            "end" => End::named(value).map(|end| options.end = end).is_some(),
            "mode" => match value {
                "check" => true,
                other => {
                    let modes = [
                        ("bench", Mode::Bench),
                        ("share", Mode::Share),
                        ("periodic", Mode::Periodic),
                        ("waits", Mode::Waits),
                        ("counts", Mode::Counts),
                        ("work", Mode::Work),
                    ];
                    let mode = modes.iter().find(|(name, _)| *name == other);
                    mode.map(|&(_, mode)| options.mode = mode).is_some()
                }
            },
            "exit" => {
                let value = number(value).and_then(|value| u32::try_from(value).ok());
                value
                    .map(|value| options.end = End::TestExit(value))
                    .is_some()
            }
            "facts" => {
                options.facts = value != "off";
                matches!(value, "on" | "off")
            }
            "iterations" => {
                options.iterations = number(value).filter(|&count| count > 0);
                options.iterations.is_some()
            }
            "start" => {
                options.wait_for_key = value == "key";
                matches!(value, "key" | "at-once")
            }
            "only" => {
                options.only = Value::format(format_args!("{value}"));
                true
            }
            "mmio" => {
                options.mmio = number(value);
                options.mmio.is_some()
            }
            _ => false,
        };
        if !understood {
            println!("stub: option not understood: {word}");
        }
    }
    options
}

/// A number, decimal or with 0x.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
