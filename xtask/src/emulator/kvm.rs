//! Whether KVM can run Plinth here: decided by a trial, not by a file that exists.
//!
//! Plinth needs virtualization inside the virtual machine (nested). A boot sector of a few
//! instructions is run under KVM; it tells by its exit code whether its processor has VMX or
//! SVM. Where KVM only half works, the trial fails or takes too long, and that is the answer.

use std::{fs, path::Path, process::Stdio, time::Duration};

use super::Acceleration;
use crate::{
    deps::{self, Program},
    exit::{Code, Stop},
    paths,
    process::{Guarded, dies_with_us},
};

/// What the user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// KVM where it can run Plinth, emulation elsewhere.
    Auto,
    /// Emulation by QEMU: AMD-V on any workstation.
    Tcg,
    /// The workstation's own virtualization.
    Kvm,
}

/// Longest time for the trial. It takes half a second where KVM works.
const TRIAL: Duration = Duration::from_secs(5);

/// Exit codes of QEMU that the boot sector brings about: twice what it writes, plus one.
const HAS_VIRTUALIZATION: i32 = 0x20 << 1 | 1;
const LACKS_VIRTUALIZATION: i32 = 0x10 << 1 | 1;

/// Real-mode code: CPUID 8000_0001h ECX bit 2 (SVM, APM vol. 3) or CPUID 1 ECX bit 5 (VMX, SDM
/// vol. 3C, section 24.6), then the answer to the exit port.
const BOOT_SECTOR: [u8; 37] = [
    0x66, 0xb8, 0x01, 0x00, 0x00, 0x80, // mov eax, 0x80000001
    0x0f, 0xa2, // cpuid
    0xf6, 0xc1, 0x04, // test cl, 1 << 2
    0x75, 0x11, // jnz has
    0x66, 0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
    0x0f, 0xa2, // cpuid
    0xf6, 0xc1, 0x20, // test cl, 1 << 5
    0x75, 0x04, // jnz has
    0xb0, 0x10, // mov al, 0x10
    0xeb, 0x02, // jmp tell
    0xb0, 0x20, // has: mov al, 0x20
    0xe6, 0xf4, // tell: out 0xf4, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp back to hlt
];

/// How to run QEMU. Says in one line why not with KVM where the user left it open.
///
/// # Errors
/// KVM was asked for and cannot run Plinth here.
pub fn choose(wish: Accel) -> anyhow::Result<Acceleration> {
    if wish == Accel::Tcg {
        return Ok(Acceleration::Emulated);
    }
    match (trial(), wish) {
        (Ok(()), _) => Ok(Acceleration::Kvm),
        (Err(why), Accel::Kvm) => Err(Stop::with(
            Code::Failure,
            format!("KVM cannot run Plinth here: {why}"),
        )),
        (Err(why), _) => {
            eprintln!("Running without KVM (QEMU's own emulation): {why}");
            Ok(Acceleration::Emulated)
        }
    }
}

/// `Err`: why KVM cannot run Plinth.
pub fn trial() -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("this workstation has no /dev/kvm".into());
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm: {error}"));
    }
    for vendor in ["intel", "amd"] {
        let parameter = format!("/sys/module/kvm_{vendor}/parameters/nested");
        if fs::read_to_string(&parameter).is_ok_and(|v| matches!(v.trim(), "N" | "0")) {
            return Err(format!(
                "nested virtualization is off (load kvm_{vendor} with nested=1)"
            ));
        }
    }
    run_boot_sector().map_err(|e| format!("{e:#}"))?
}

fn run_boot_sector() -> anyhow::Result<Result<(), String>> {
    deps::require(&[Program::Qemu])?;
    let folder = paths::target().join("run");
    fs::create_dir_all(&folder)?;
    let disk = folder.join(format!("kvm-trial-{}", std::process::id()));
    fs::write(&disk, boot_sector())?;
    let mut command = dies_with_us("qemu-system-x86_64");
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-accel", "kvm", "-cpu", "host", "-m", "16M"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .arg("-drive")
        .arg(format!(
            "if=ide,format=raw,snapshot=on,file={}",
            disk.display().to_string().replace(',', ",,")
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let status = Guarded::spawn(command).and_then(|mut qemu| qemu.wait(TRIAL));
    fs::remove_file(&disk)?;
    Ok(verdict(status?.map(|status| status.code())))
}

/// `None`: it had to be ended.
fn verdict(ended: Option<Option<i32>>) -> Result<(), String> {
    match ended {
        Some(Some(HAS_VIRTUALIZATION)) => Ok(()),
        Some(Some(LACKS_VIRTUALIZATION)) => {
            Err("KVM's virtual processor has neither VT-x nor AMD-V".into())
        }
        Some(_) => Err("QEMU could not run a virtual machine with KVM".into()),
        None => Err(format!(
            "a trial machine did not start within {} s",
            TRIAL.as_secs()
        )),
    }
}

fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_of_the_boot_sector_land_on_instructions() {
        let target = |jump: usize| {
            let offset = BOOT_SECTOR[jump + 1].cast_signed();
            BOOT_SECTOR[(jump + 2).checked_add_signed(offset.into()).unwrap()]
        };
        let has = 0xb0;
        assert_eq!(target(11), has);
        assert_eq!(target(24), has);
        assert_eq!(BOOT_SECTOR[31], 0x20, "that jump sets the good answer");
        assert_eq!(target(28), 0xe6);
        assert_eq!(target(35), 0xf4);
    }

    #[test]
    fn only_the_good_answer_is_good() {
        assert!(verdict(Some(Some(HAS_VIRTUALIZATION))).is_ok());
        for ended in [
            None,
            Some(None),
            Some(Some(0)),
            Some(Some(1)),
            Some(Some(LACKS_VIRTUALIZATION)),
        ] {
            assert!(verdict(ended).is_err());
        }
    }
}
