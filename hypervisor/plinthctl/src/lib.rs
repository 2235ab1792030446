//! The program `plinthctl`: a Plinth host's verbs, over its control channel.
//!
//! The verbs and their arguments are those of the host's shell, from the same table; the answers are shown by the
//! same code, or as JSON. docs/CONTROL.md describes the channel, and what the exit status says.
#![forbid(unsafe_code)]

mod address;
mod cli;
mod client;
mod completion;
mod link;
mod trace;
mod verbs;

pub use address::Address;
pub use cli::ADDRESS_VARIABLE;
pub use client::Client;

use std::{ffi::OsString, fmt, io::Write};

/// Where the program writes to.
pub struct Terminal<'a> {
    /// Answers.
    pub out: &'a mut dyn Write,
    /// Why there is none.
    pub errors: &'a mut dyn Write,
    /// Somebody looks at the answers: a view is drawn anew in its place.
    pub is_terminal: bool,
}

/// How it ended. The numbers are published (docs/CONTROL.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// The host refused, or what was waited for went another way.
    Refused = 1,
    /// Wrong arguments.
    Usage = 2,
    /// There is no connection, or it ended.
    NoConnection = 3,
    /// The time passed.
    Timeout = 4,
    /// The other end is no Plinth, or one of another version.
    Protocol = 5,
    /// A file or the output could not be read or written.
    File = 6,
}

impl Exit {
    /// The status that the caller of the program sees.
    pub const fn status(self) -> u8 {
        self as u8
    }
}

/// Why something was not done.
#[derive(Debug)]
pub struct Error {
    /// With which status the program ends.
    pub exit: Exit,
    /// What happened, and what to do.
    pub message: String,
}

impl Error {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { exit, message }
    }

    /// The output could not be written.
    fn output(error: &std::io::Error) -> Self {
        Self::new(Exit::File, format!("the output: {error}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Runs the program with these arguments, the first of which is its own name.
pub fn run(args: impl IntoIterator<Item = OsString>, mut terminal: Terminal<'_>) -> Exit {
    let matches = match cli::parser().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            let is_help = !error.use_stderr();
            let text = error.render();
            // If nobody reads it any more, nobody misses it.
            let _ = match is_help {
                true => write!(terminal.out, "{text}"),
                false => write!(terminal.errors, "{text}"),
            };
            return if is_help { Exit::Done } else { Exit::Usage };
        }
    };
    match verbs::execute(&matches, &mut terminal) {
        Ok(()) => Exit::Done,
        Err(error) => {
            let text = error.message.trim_end();
            let text = text.strip_prefix("error: ").unwrap_or(text);
            // What a program reads was printed already.
            if !text.is_empty() {
                let _ = writeln!(terminal.errors, "error: {text}");
            }
            error.exit
        }
    }
}
