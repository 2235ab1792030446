//! `cargo xtask clean`: removes what xtask and cargo built.

use std::{fs, io};

use anyhow::Context;

use crate::{exit::Code, paths};

/// Remove what was built. Caches that take long to make again stay, unless --all is given.
#[derive(clap::Args)]
pub struct Args {
    /// Also remove target/cache: toolchain, image builder, guest kernels.
    #[arg(long)]
    all: bool,
}

/// Removes everything in `target/` but the caches, or those too.
///
/// # Errors
/// A file could not be removed.
pub fn run(args: &Args) -> anyhow::Result<Code> {
    let entries = match fs::read_dir(paths::target()) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Code::Success),
        entries => entries.with_context(|| paths::shown(&paths::target()))?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if path == paths::cache() && !args.all {
            continue;
        }
        // A link is removed, not what it leads to.
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        }
        .with_context(|| paths::shown(&path))?;
    }
    Ok(Code::Success)
}
