//! The serial line for a program that runs Plinth: one guest's console alone, and how the guest ended.
//!
//! With `console-frame = "WORD"` in the configuration, the serial line carries Plinth's own lines up to a
//! line `WORD begin`, from there on the guests' output and not a byte more, and then, on a line of its own,
//! `WORD end OUTCOME` and Plinth's lines again. The reader chooses a word that no guest knows, so no guest's
//! output can be taken for the second line. A fault of Plinth's own ends the frame, too.

use alloc::{borrow::ToOwned, format, string::String};
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Once;
use vmm::vm::EndReason;

use crate::console;

static WORD: Once<String> = Once::new();
/// Between the two lines.
static OPEN: AtomicBool = AtomicBool::new(false);

/// Opens the frame: from now on nobody but guests writes to the serial line.
pub fn begin(word: &str) {
    let word = WORD.call_once(|| word.to_owned());
    console::write_line(format!("{word} begin").as_bytes());
    OPEN.store(true, Ordering::SeqCst);
}

/// Whether the serial line belongs to the guests alone.
pub fn is_open() -> bool {
    OPEN.load(Ordering::Relaxed)
}

/// Whether there is a frame in this run, open or not: its first VM that ends is the last.
pub fn is_used() -> bool {
    WORD.get().is_some()
}

/// Closes the frame, if it is open, with what became of the guest.
pub fn end(outcome: Outcome) {
    if !OPEN.swap(false, Ordering::SeqCst) {
        return;
    }
    let Some(word) = WORD.get() else { return };
    let write = match outcome {
        Outcome::HostFault => console::report,
        _ => {
            console::flush();
            console::write_all
        }
    };
    // In pieces, since a fault report must not ask for memory. The line's writers are at rest then.
    for piece in [
        b"\r\n",
        word.as_bytes(),
        b" end ",
        outcome.name().as_bytes(),
    ] {
        write(piece);
    }
    if let Outcome::TestExit(value) = outcome {
        write(format!(" {value}").as_bytes());
    }
    write(b"\r\n");
}

/// What became of the guest in the frame.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// It ended its test with this value.
    TestExit(u32),
    /// Its processor shut down.
    TripleFault,
    /// Plinth stopped it.
    Stopped,
    /// It could not be started.
    NotStarted,
    /// Plinth itself failed.
    HostFault,
}

impl Outcome {
    /// The outcome of a VM that ended so.
    pub fn of(reason: Option<&EndReason>) -> Self {
        match reason {
            Some(EndReason::PowerOff | EndReason::WatchdogPowerOff) => Outcome::PowerOff,
            Some(EndReason::Reset | EndReason::WatchdogReset) => Outcome::Reset,
            Some(EndReason::TestExit(value)) => Outcome::TestExit(*value),
            Some(EndReason::TripleFault(_)) => Outcome::TripleFault,
            Some(EndReason::Forced | EndReason::Failure { .. }) | None => Outcome::Stopped,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Outcome::PowerOff => "power-off",
            Outcome::Reset => "reset",
            Outcome::TestExit(_) => "test-exit",
            Outcome::TripleFault => "triple-fault",
            Outcome::Stopped => "stopped",
            Outcome::NotStarted => "not-started",
            Outcome::HostFault => "host-fault",
        }
    }
}
