//! How `cargo xtask` ends: exit codes that scripts can rely on.

use std::{fmt, process::ExitCode};

/// Exit code of the whole command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Done, or what was waited for was seen.
    Success,
    /// It ran and failed: a build, a test, a host fault, an end without the line waited for.
    Failure,
    /// Wrong arguments or configuration. (clap uses the same number.)
    Usage,
    /// A program is missing and may not be installed from here.
    MissingProgram,
    /// The time limit passed.
    Timeout,
    /// A test kernel could not be run at all.
    NotRun,
    /// Stopped by Ctrl-C or another signal.
    Interrupted,
    /// Plinth stopped a test kernel, or failed.
    GuestStopped,
    /// The status of a test kernel, as QEMU would give it.
    Guest(u8),
    /// The status of `plinthctl`.
    Control(u8),
}

impl Code {
    /// The number that the caller of the command sees.
    pub const fn status(self) -> u8 {
        match self {
            Code::Success => 0,
            Code::Failure => 1,
            Code::Usage => 2,
            Code::MissingProgram => 3,
            Code::Timeout => 124,
            Code::NotRun => 126,
            Code::Interrupted => 130,
            Code::GuestStopped => 134,
            Code::Guest(status) | Code::Control(status) => status,
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        ExitCode::from(code.status())
    }
}

/// An error that decides the exit code; any other error means [`Code::Failure`].
#[derive(Debug)]
pub struct Stop {
    code: Code,
    message: String,
}

impl Stop {
    /// An error with its exit code, to return with `?` or `Err`.
    pub fn with(code: Code, message: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Stop {
            code,
            message: message.into(),
        })
    }

    /// The exit code that an error asks for.
    pub fn code_of(error: &anyhow::Error) -> Code {
        error
            .downcast_ref::<Stop>()
            .map_or(Code::Failure, |stop| stop.code)
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Stop {}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_code_survives_added_context() {
        let error = Err::<(), _>(Stop::with(Code::Usage, "bad key"))
            .context("reading plinth.toml")
            .unwrap_err();
        assert_eq!(Stop::code_of(&error), Code::Usage);
        assert_eq!(format!("{error:#}"), "reading plinth.toml: bad key");
    }

    #[test]
    fn other_errors_are_failures() {
        assert_eq!(Stop::code_of(&anyhow::anyhow!("x")), Code::Failure);
    }
}
