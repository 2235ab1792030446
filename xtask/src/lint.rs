//! `cargo xtask lint`: formatting and clippy, for the workstation and for bare metal.
//!
//! Two passes of clippy, since the two bare-metal programs build for another target with
//! another toolchain than the rest. Any warning is an error here.

use std::process::Command;

use crate::{
    exit::{Code, Stop},
    paths,
    process::status_of,
    toolchain::{BARE_METAL, Toolchain},
};

/// The packages that build for bare metal only.
const BARE_METAL_PACKAGES: [&str; 2] = ["kernel", "guest-stub"];

/// Check formatting and lints, as CI does; warnings are errors.
#[derive(clap::Args)]
pub struct Args {}

/// Runs all checks, and fails after the first that finds something.
///
/// # Errors
/// A check found something, or its program is missing.
pub fn run(_args: &Args) -> anyhow::Result<Code> {
    let toolchain = Toolchain::find()?;
    let here = || {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(paths::workspace());
        cargo
    };
    let mut format = here();
    format.args(["fmt", "--all", "--check"]);
    check("formatting (repair it with `cargo fmt --all`)", format)?;

    let mut format = here();
    format.args([
        "fmt",
        "--check",
        "--manifest-path",
        "xtask/image-builder/Cargo.toml",
    ]);
    check("formatting of the image builder", format)?;

    let mut clippy = here();
    clippy.args(["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"]);
    check("clippy for the workstation", clippy)?;

    let mut clippy = toolchain.cargo();
    clippy.args(["clippy", "--quiet", "--target", BARE_METAL]);
    for package in BARE_METAL_PACKAGES {
        clippy.args(["--package", package]);
    }
    clippy.args(["--", "-D", "warnings"]);
    check("clippy for bare metal", clippy)?;
    Ok(Code::Success)
}

fn check(what: &str, mut command: Command) -> anyhow::Result<()> {
    eprintln!("Checking {what}");
    if status_of(&mut command)?.success() {
        return Ok(());
    }
    Err(Stop::with(
        Code::Failure,
        format!("the check of {what} found something"),
    ))
}
