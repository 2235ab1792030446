//! The operator's shells: one on the serial terminal, one on the host's screen with its keyboard.
//!
//! What is typed is collected in queues of fixed size, at any time; [`serve`], a door (see [`doors`]), hands it to
//! the shells from the first processor's loop, with no lock held. What a shell shows waits in it until the terminal
//! takes it, and no further input is taken meanwhile. What was typed on one terminal takes effect in its order,
//! whether it was for the shell, for a guest, or a command of the escape key.

mod keyboard;
mod on_screen;

use alloc::{boxed::Box, format, string::String};
use core::sync::atomic::{AtomicU64, Ordering};

use manage::{
    command::Operate,
    console::ConsoleId,
    journal::Door,
    shell::{Action, Shell},
};

pub use keyboard::{on_interrupt as on_key, start as start_keyboard};
pub use on_screen::{owns as owns_screen, read as read_local};

use crate::{console, doors, journal::Noted, sync::Lock, time};

/// Bytes that a shell is given at a time, so that guests run in between.
const BYTES_AT_ONCE: usize = 64;

/// The shell of the serial terminal, once it was used. It is taken out while it is served.
static SERIAL: Lock<Option<Box<Session>>> = Lock::new(None);
/// Host TSC at which a shell wants to show something though nobody types.
static NEXT: AtomicU64 = AtomicU64::new(u64::MAX);

/// A shell and what its terminal has not taken yet.
struct Session {
    shell: Shell,
    output: String,
    /// Bytes of `output` that were taken.
    taken: usize,
    greeted: bool,
}

/// A terminal, as its session sees it.
trait Terminal {
    /// The next byte that was typed.
    fn read(&mut self) -> Option<u8>;
    /// Takes output; how many bytes.
    fn write(&mut self, bytes: &[u8]) -> usize;
}

impl Session {
    fn new() -> Self {
        Session {
            shell: Shell::new(),
            output: String::new(),
            taken: 0,
            greeted: false,
        }
    }

    /// The terminal shows the shell again, or something else stands where its line was.
    fn show(&mut self) {
        match core::mem::replace(&mut self.greeted, true) {
            true => self.shell.redraw(),
            false => self.shell.greet(),
        }
    }

    /// Hands the terminal what it takes. Whether that was all.
    fn flush(&mut self, terminal: &mut impl Terminal) -> bool {
        if self.taken == self.output.len() {
            self.output = self.shell.take_output();
            self.taken = 0;
        }
        self.taken += terminal.write(&self.output.as_bytes()[self.taken..]);
        if self.taken < self.output.len() {
            return false;
        }
        // What was shown takes no memory.
        self.output = String::new();
        self.taken = 0;
        self.shell.is_ready()
    }

    /// Takes what was typed, as much as is due at a time. What the door has to do.
    fn serve(&mut self, terminal: &mut impl Terminal, operate: &dyn Operate) -> Option<Action> {
        for _ in 0..BYTES_AT_ONCE {
            if !self.flush(terminal) {
                return None;
            }
            let byte = terminal.read()?;
            let action = self.shell.input(byte, operate);
            if action.is_some() {
                self.flush(terminal);
                return action;
            }
        }
        self.flush(terminal);
        doors::ring();
        None
    }

    /// Host TSC at which it wants to be served though nobody types.
    fn wake_up_at(&self) -> u64 {
        let ns = self.shell.wake_up_at();
        ns.map_or(u64::MAX, |at| {
            let us = at.saturating_sub(time::ns()).div_ceil(1000);
            time::now_tsc().saturating_add(time::us_to_ticks(us))
        })
    }
}

/// The console of the multiplexer that is the shell's.
struct SerialTerminal;

impl Terminal for SerialTerminal {
    fn read(&mut self) -> Option<u8> {
        console::read_for_shell()
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        match bytes.is_empty() {
            true => 0,
            false => console::guest_output(ConsoleId::SHELL, bytes),
        }
    }
}

/// Rings when something is due without an interrupt at this host TSC, which is now. The first processor's business.
#[inline]
pub fn attend(now: u64) {
    keyboard::attend(now);
    if NEXT.load(Ordering::Relaxed) <= now {
        doors::ring();
    }
}

/// Host TSC at which the first processor, when it has nothing to do, has to [`attend`] again; `u64::MAX` if never.
pub fn wake_up_at() -> u64 {
    NEXT.load(Ordering::Relaxed).min(keyboard::wake_up_at())
}

/// Serves the shells. With no lock held.
pub fn serve(operate: &dyn Operate) {
    let by = |door| Noted { door, operate };
    let serial = serve_serial(&by(Door::Serial));
    let screen = on_screen::serve(&by(Door::Screen));
    NEXT.store(serial.min(screen), Ordering::Relaxed);
}

fn serve_serial(operate: &dyn Operate) -> u64 {
    let disturbed = console::take_shell_disturbed();
    let idle = !console::has_shell_input();
    let kept = SERIAL.lock().take();
    let mut session = match kept {
        Some(session) => session,
        None if idle && !disturbed => return u64::MAX,
        None => Box::new(Session::new()),
    };
    let shown = console::focus() == ConsoleId::SHELL;
    if shown && disturbed || !session.greeted {
        session.show();
    }
    if shown {
        session.shell.tick(time::ns(), operate);
    }
    let mut next = u64::MAX;
    match session.serve(&mut SerialTerminal, operate) {
        None if shown => next = session.wake_up_at(),
        None => {}
        // What was typed behind the command is for what it shows.
        Some(Action::Leave) => console::leave_shell(),
        Some(Action::Console(name)) => {
            let found = console::show(&name);
            if !found {
                session.shell.complain(&no_console(&name));
                session.flush(&mut SerialTerminal);
            }
        }
    }
    *SERIAL.lock() = Some(session);
    next
}

/// What is said of a VM whose console is asked for.
fn no_console(name: &str) -> String {
    format!("error: {name} has no console: its configuration says so\n")
}
