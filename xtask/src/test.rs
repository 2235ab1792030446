//! `cargo xtask test`: unit tests of the hardware-free crates.

use std::process::Command;

use anyhow::Context;

use crate::{exit::Code, paths};

/// Run the tests.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo test` on the crates that build on the workstation.
///
/// # Errors
/// cargo could not be started.
pub fn run(_args: &Args) -> anyhow::Result<Code> {
    let status = Command::new("cargo")
        .arg("test")
        .current_dir(paths::workspace())
        .status()
        .context("cargo could not be started")?;
    Ok(if status.success() {
        Code::Success
    } else {
        Code::Failure
    })
}
