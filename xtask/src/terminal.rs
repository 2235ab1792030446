//! The terminal in raw mode while a guest's console is on it, and always back again.
//!
//! [`restore`] may be called at any time and from any thread: on a signal, from a panic, at
//! the end. It does nothing when the terminal is as it was.

use std::{
    io::{self, IsTerminal},
    sync::{Mutex, PoisonError},
};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The settings to go back to, while in raw mode.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode, until dropped.
pub struct Raw(());

impl Raw {
    /// Puts the terminal on standard input into raw mode: every key goes to the guest,
    /// Ctrl-C too. `None` when standard input is no terminal.
    ///
    /// # Errors
    /// The terminal refused.
    pub fn enter() -> anyhow::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        let default_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            default_hook(info);
        }));
        Ok(Some(Raw(())))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was.
pub fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // Should the terminal be gone there is nobody left to see it.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
    }
}
