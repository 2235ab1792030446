//! Plinth's own test guest, compiled for bare metal.

use std::path::PathBuf;

use crate::{
    paths,
    progress::Step,
    toolchain::{Profile, Toolchain},
};

/// Compiles the guest stub, if it is not up to date; returns the ELF file, without symbols.
///
/// # Errors
/// There is no toolchain for bare metal, or it does not compile.
pub fn ensure() -> anyhow::Result<PathBuf> {
    let toolchain = Toolchain::find()?;
    let step = Step::start("Compiling the test guest");
    let compiled = toolchain.build("guest-stub", &[], Profile::Release)?;
    let stub = paths::target().join("guest-stub");
    toolchain.strip(&compiled, &stub)?;
    step.done();
    Ok(stub)
}
