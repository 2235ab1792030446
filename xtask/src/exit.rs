//! How `cargo xtask` ends: exit codes that scripts can rely on.

use std::{fmt, process::ExitCode};

/// Exit code of the whole command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Done, or what was waited for was seen.
    Success = 0,
    /// It ran and failed: a build, a test, a host fault, an end without the line waited for.
    Failure = 1,
    /// Wrong arguments or configuration. (clap uses the same number.)
    Usage = 2,
    /// A program is missing and may not be installed from here.
    MissingProgram = 3,
    /// The time limit passed.
    Timeout = 124,
    /// Stopped by Ctrl-C or another signal.
    Interrupted = 130,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        ExitCode::from(code as u8)
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
