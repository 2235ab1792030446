//! `cargo xtask check-config`: what the kernel would say of a configuration, said here.

use std::path::PathBuf;

use crate::{exit::Code, image::Configuration};

/// Check a plinth.toml: file, line, key and what is allowed.
///
/// The same code checks it again when an image is made and when Plinth boots; only there are
/// the memory and the processors of the machine known.
#[derive(clap::Args)]
pub struct Args {
    /// The file; without it, the plinth.toml of this workspace.
    file: Option<PathBuf>,
}

/// Prints the report; [`Code::Usage`] when there is an error.
///
/// # Errors
/// The file can't be read.
pub fn run(args: &Args) -> anyhow::Result<Code> {
    let checked = Configuration::read(args.file.as_deref())?.check();
    print!("{}", checked.report());
    Ok(if checked.has_errors() {
        Code::Usage
    } else {
        Code::Success
    })
}
