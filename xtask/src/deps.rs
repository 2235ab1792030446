//! Programs that xtask needs from the system, installed where it may.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use crate::{
    exit::{Code, Stop},
    process::{find_program, output_of},
    progress::Step,
};

/// Something to have installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// QEMU for x86-64.
    Qemu,
    /// UEFI firmware for QEMU.
    Ovmf,
    /// Bochs with its text screen, BIOS and VGA BIOS.
    Bochs,
}

impl Program {
    /// Debian's packages.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Program::Qemu => &["qemu-system-x86"],
            Program::Ovmf => &["ovmf"],
            Program::Bochs => &["bochs", "bochs-term", "bochsbios", "vgabios"],
        }
    }

    fn is_installed(self) -> bool {
        match self {
            Program::Qemu => find_program("qemu-system-x86_64").is_some(),
            Program::Ovmf => ovmf_files().is_some(),
            Program::Bochs => {
                find_program("bochs").is_some()
                    && Path::new("/usr/share/bochs/BIOS-bochs-latest").is_file()
                    && Path::new("/usr/share/vgabios/vgabios.bin").is_file()
                    && bochs_has_text_screen()
            }
        }
    }
}

/// Whether Bochs' screen on a terminal, a plug-in of its own on Debian, is there.
fn bochs_has_text_screen() -> bool {
    [
        "/usr/lib/bochs/plugins",
        "/usr/lib/x86_64-linux-gnu/bochs/plugins",
        "/usr/lib64/bochs/plugins",
    ]
    .iter()
    .map(|folder| Path::new(folder).join("libbx_term_gui.so"))
    .any(|plugin| plugin.is_file())
}

/// UEFI firmware for QEMU.
pub struct OvmfFiles {
    /// Read-only code.
    pub code: PathBuf,
    /// Fresh variables, to be copied.
    pub variables: PathBuf,
}

/// Finds OVMF where distributions put it.
pub fn ovmf_files() -> Option<OvmfFiles> {
    const PLACES: [(&str, &str); 5] = [
        (
            "/usr/share/OVMF/OVMF_CODE_4M.fd",
            "/usr/share/OVMF/OVMF_VARS_4M.fd",
        ),
        (
            "/usr/share/OVMF/OVMF_CODE.fd",
            "/usr/share/OVMF/OVMF_VARS.fd",
        ),
        (
            "/usr/share/edk2/ovmf/OVMF_CODE.fd",
            "/usr/share/edk2/ovmf/OVMF_VARS.fd",
        ),
        (
            "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
            "/usr/share/edk2/x64/OVMF_VARS.4m.fd",
        ),
        (
            "/usr/share/qemu/ovmf-x86_64-code.bin",
            "/usr/share/qemu/ovmf-x86_64-vars.bin",
        ),
    ];
    PLACES
        .iter()
        .map(|(code, variables)| OvmfFiles {
            code: code.into(),
            variables: variables.into(),
        })
        .find(|files| files.code.is_file() && files.variables.is_file())
}

/// Sees to it that these are installed: installs them on Debian when run by root.
///
/// # Errors
/// [`Code::MissingProgram`], with the command to run, where it may not.
pub fn require(programs: &[Program]) -> anyhow::Result<()> {
    let packages: Vec<&str> = programs
        .iter()
        .filter(|program| !program.is_installed())
        .flat_map(|program| program.packages())
        .copied()
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    let has_apt = find_program("apt-get").is_some();
    may_install(&packages, has_apt, nix::unistd::geteuid().is_root())?;
    let step = Step::start(format!("Installing {}", packages.join(", ")));
    let install = || {
        output_of(
            Command::new("apt-get")
                .args(["-y", "-qq", "install", "--no-install-recommends"])
                .args(&packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    // A machine that never asked for its package lists has none, or old ones.
    if install().is_err() {
        step.detail("reading package lists");
        output_of(Command::new("apt-get").args(["-qq", "update"]))
            .and_then(|_| install())
            .with_context(|| how_to_install(&packages, true))?;
    }
    step.done();
    Ok(())
}

/// Only root may, and only where there is apt.
fn may_install(packages: &[&str], has_apt: bool, is_root: bool) -> anyhow::Result<()> {
    match has_apt && is_root {
        true => Ok(()),
        false => Err(Stop::with(
            Code::MissingProgram,
            how_to_install(packages, has_apt),
        )),
    }
}

fn how_to_install(packages: &[&str], has_apt: bool) -> String {
    let packages = packages.join(" ");
    if has_apt {
        format!("programs are missing; install them with: sudo apt-get install {packages}")
    } else {
        format!("programs are missing; install what Debian calls: {packages}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_may_not_be_installed_is_missing() {
        assert!(may_install(&["ovmf"], true, true).is_ok());
        for (has_apt, is_root) in [(true, false), (false, true), (false, false)] {
            let error = may_install(&["ovmf"], has_apt, is_root).unwrap_err();
            assert_eq!(Stop::code_of(&error).status(), 3);
            assert!(error.to_string().contains("ovmf"));
        }
    }

    #[test]
    fn the_command_to_install_is_exact() {
        assert_eq!(
            how_to_install(&["ovmf", "bochs"], true),
            "programs are missing; install them with: sudo apt-get install ovmf bochs"
        );
    }
}
