//! The checks, by group, and what runs and reports them.
//!
//! Each check prints one line, its name before it runs, so that one that hangs shows which:
//! `check GROUP.NAME: ok`, `check GROUP.NAME: FAILED: why` or `check GROUP.NAME: skipped: why`.
//! A check starts with interrupts off and every source masked, and may leave a mess behind:
//! the runner settles the machine after each.

mod acpi;
mod apic;
mod clocks;
mod conform;
mod cpuid;
mod debug;
mod disk;
mod display;
mod emulator;
mod exceptions;
mod fpu;
mod interrupts;
mod io;
mod memory;
mod msr;
mod processor;
mod smp;
mod test_devices;
mod twins;

use core::cell::UnsafeCell;
use core::fmt;

use crate::console::Text;
use crate::cpu;
use crate::interrupts::{Trap, guarded, take_unexpected};
use crate::machine::Machine;
use crate::options::Value;
use crate::{print, println};

/// Why a check is not ok.
pub enum Why {
    /// What it checks is not there.
    Skipped(&'static str),
    /// The machine is wrong; [`reason`] says how.
    Failed,
}

impl Why {
    /// In words.
    pub fn text(&self) -> Text<240> {
        match self {
            Why::Skipped(why) => Text::format(format_args!("{why}")),
            Why::Failed => reason(),
        }
    }
}

/// Text of the last failure. Apart from [`Why`], to keep that small.
struct Reason(UnsafeCell<Text<240>>);

// SAFETY: the first processor alone, the handlers do not touch it, and no reference to it is ever kept.
unsafe impl Sync for Reason {}

static REASON: Reason = Reason(UnsafeCell::new(Text::new()));

/// A failure with its reason.
pub fn fail(reason: fmt::Arguments) -> Why {
    let reason = Text::format(reason);
    // SAFETY: see `Reason`.
    unsafe { *REASON.0.get() = reason };
    Why::Failed
}

/// The reason of the last failure.
fn reason() -> Text<240> {
    // SAFETY: see `Reason`.
    unsafe { *REASON.0.get() }
}

/// Outcome of a check.
pub type Verdict = Result<(), Why>;

/// A check.
pub struct Check {
    pub name: &'static str,
    pub run: fn(&Machine) -> Verdict,
}

/// Fails the check with a reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::checks::fail(format_args!($($reason)+)));
        }
    };
}

/// Fails the check unless what was got is what was wanted; both are shown in hexadecimal.
#[macro_export]
macro_rules! ensure_eq {
    ($got:expr, $wanted:expr, $($what:tt)+) => {{
        let (got, wanted) = ($got, $wanted);
        if got != wanted {
            return Err($crate::checks::fail(format_args!(
                "{}: {:#x}, not {:#x}",
                format_args!($($what)+),
                got,
                wanted
            )));
        }
    }};
}

/// Fails the check with a reason.
#[macro_export]
macro_rules! fail {
    ($($reason:tt)+) => {
        return Err($crate::checks::fail(format_args!($($reason)+)))
    };
}

/// Skips the check with a reason.
#[macro_export]
macro_rules! skip {
    ($reason:expr) => {
        return Err($crate::checks::Why::Skipped($reason))
    };
}

/// Skips the check with a reason if the condition holds.
#[macro_export]
macro_rules! skip_if {
    ($condition:expr, $reason:expr) => {
        if $condition {
            return Err($crate::checks::Why::Skipped($reason));
        }
    };
}

/// A check per function: `checks![vendor, leaf_limits]` names them `vendor` and `leaf_limits`.
#[macro_export]
macro_rules! checks {
    ($($check:ident),+ $(,)?) => {
        /// The checks of this group, in the order in which they run.
        pub const CHECKS: &[$crate::checks::Check] =
            &[$($crate::checks::Check { name: stringify!($check), run: $check }),+];
    };
}

/// All groups, in the order in which they run.
const GROUPS: &[(&str, &[Check])] = &[
    ("cpuid", cpuid::CHECKS),
    ("msr", msr::CHECKS),
    ("exceptions", exceptions::CHECKS),
    ("debug", debug::CHECKS),
    ("processor", processor::CHECKS),
    ("memory", memory::CHECKS),
    ("io", io::CHECKS),
    ("fpu", fpu::CHECKS),
    ("acpi", acpi::CHECKS),
    ("interrupts", interrupts::CHECKS),
    ("apic", apic::CHECKS),
    ("clocks", clocks::CHECKS),
    ("smp", smp::CHECKS),
    ("conform", conform::CHECKS),
    ("emulator", emulator::CHECKS),
    ("twins", twins::CHECKS),
    ("test", test_devices::CHECKS),
    ("disk", disk::CHECKS),
    ("display", display::CHECKS),
];

/// Whether a selection (comma-separated groups and `group.check`s, empty for all) holds a check.
fn selected(selection: &str, group: &str, check: &str) -> bool {
    selection.is_empty()
        || selection.split(',').any(|item| match item.split_once('.') {
            Some((item_group, item_check)) => item_group == group && item_check == check,
            None => item == group || item == "all",
        })
}

/// Runs the selected checks and prints the sum.
pub fn run(machine: &Machine, selection: &Value) {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for &(group, checks) in GROUPS {
        for check in checks
            .iter()
            .filter(|check| selected(selection.as_str(), group, check.name))
        {
            print!("check {group}.{}: ", check.name);
            match run_one(machine, check) {
                Ok(()) => {
                    passed += 1;
                    println!("ok");
                }
                Err(Why::Skipped(why)) => {
                    skipped += 1;
                    println!("skipped: {why}");
                }
                Err(Why::Failed) => {
                    failed += 1;
                    println!("FAILED: {}", reason());
                }
            }
        }
    }
    println!("stub: {passed} passed, {failed} failed, {skipped} skipped");
}

/// Free RAM for a check.
fn scratch(machine: &Machine) -> Result<u64, Why> {
    machine.scratch.ok_or(Why::Skipped("no free RAM for it"))
}

/// The trap that must have come.
fn trapped(trap: Option<Trap>, what: &str) -> Result<Trap, Why> {
    trap.ok_or_else(|| fail(format_args!("{what}: no exception")))
}

/// The trap must be that exception, at the first probed instruction, with that error code.
fn expect_fault(trap: Option<Trap>, vector: u8, error: u64, what: &str) -> Verdict {
    let trap = trapped(trap, what)?;
    let got = (trap.vector, trap.error, trap.offset);
    ensure!(got == (vector, error, 0), "{what}: {trap}");
    Ok(())
}

fn run_one(machine: &Machine, check: &Check) -> Verdict {
    let mut verdict = Ok(());
    let guard = guarded(|| verdict = (check.run)(machine));
    // Whatever is still pending belongs to this check.
    cpu::take_interrupts();
    let unexpected = take_unexpected();
    machine.settle();
    if let Err(trap) = guard {
        fail!("unexpected exception: {trap}");
    }
    verdict?;
    if let Some(vector) = unexpected {
        fail!("unexpected interrupt {vector:#x}");
    }
    Ok(())
}
