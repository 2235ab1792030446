//! `cargo xtask check-hw`: the pre-flight check of Plinth for this workstation's processor.
//!
//! The lines are the kernel's own, computed by the same code from the same numbers. CPUID can
//! be read by anybody; model-specific registers only by root through the `msr` module, and
//! without them some answers are missing, which is said.

use std::{
    cell::RefCell,
    fs::{self, File},
    os::unix::fs::FileExt,
};

use virt::{
    Preflight,
    svm::features::{self, VM_CR, VmCr},
    vtx::capability::{self, Found},
};

use crate::exit::Code;

/// Check whether this computer's processor can run Plinth.
///
/// Prints what Plinth prints when it boots: each feature as ok, missing, disabled in firmware or
/// locked, and the firmware setting to change. Exit code 0: Plinth runs here; 1: not, or not known.
#[derive(clap::Args)]
#[command(
    after_help = "Run it as root to see everything: sudo modprobe msr, then sudo -E cargo xtask check-hw"
)]
pub struct Args {}

/// The first processor's model-specific registers, as the `msr` module shows them.
const REGISTERS: &str = "/dev/cpu/0/msr";

/// Prints the check.
///
/// # Errors
/// None: what can't be read is said.
pub fn run(_args: &Args) -> anyhow::Result<Code> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = field(&cpuinfo, "model name").unwrap_or("an unknown processor");
    println!("{name}");
    let flags = field(&cpuinfo, "flags").unwrap_or_default();
    if has_flag(flags, "hypervisor") {
        println!("This is a virtual machine: what follows is what its hypervisor offers.");
    }
    let registers = Registers::open();
    let leaves = features::Leaves::read();
    let vendor = field(&cpuinfo, "vendor_id").unwrap_or_default();
    let findings = if matches!(vendor, "AuthenticAMD" | "HygonGenuine") {
        let vm_cr = if leaves.has_svm() {
            VmCr::from_bits_truncate(registers.read(VM_CR))
        } else {
            VmCr::empty()
        };
        Findings {
            name: "AMD-V",
            preflight: features::preflight(&leaves, vm_cr),
            // The rest is CPUID's, which is known.
            without_registers: features::preflight(&leaves, VmCr::empty()),
        }
    } else {
        Findings {
            name: "VT-x",
            preflight: capability::preflight(&Found::with(|number| registers.read(number))),
            without_registers: from_flags(&cpuinfo),
        }
    };
    let failure = registers.failure.into_inner();
    let preflight = match &failure {
        None => &findings.preflight,
        Some(_) => &findings.without_registers,
    };
    print!("{} pre-flight check:\n{preflight}", findings.name);
    if let Some(why) = failure {
        println!(
            "\nNot known: what the firmware allows, and what model-specific registers tell ({why})."
        );
        println!("As root, with the msr module loaded (sudo modprobe msr), all is shown.");
    }
    Ok(if preflight.passed() {
        println!("\nPlinth runs on this processor.");
        Code::Success
    } else {
        println!("\nPlinth does not run on this processor as it is set up now.");
        Code::Failure
    })
}

/// The check with and without model-specific registers.
struct Findings {
    name: &'static str,
    preflight: Preflight,
    without_registers: Preflight,
}

/// Model-specific registers, and why they could not be read, once one could not.
struct Registers {
    file: Result<File, String>,
    failure: RefCell<Option<String>>,
}

impl Registers {
    fn open() -> Self {
        Registers {
            file: File::open(REGISTERS).map_err(|e| format!("{REGISTERS}: {e}")),
            failure: RefCell::default(),
        }
    }

    /// A register's value; 0 where it can't be read, which is noted.
    fn read(&self, number: u32) -> u64 {
        let mut bytes = [0; 8];
        let read = self.file.as_ref().map_err(Clone::clone).and_then(|file| {
            file.read_exact_at(&mut bytes, number.into())
                .map_err(|e| format!("register {number:#x}: {e}"))
        });
        match read {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(why) => {
                self.failure.borrow_mut().get_or_insert(why);
                0
            }
        }
    }
}

/// What Linux tells of VT-x without registers: fewer lines. Linux takes "vmx" out of the flags when firmware
/// has locked it off.
fn from_flags(cpuinfo: &str) -> Preflight {
    use virt::{Feature, Need, Status};
    const LINES: [(&str, Need, &str); 5] = [
        ("EPT", Need::Required, "ept"),
        ("unrestricted guest", Need::Required, "unrestricted_guest"),
        ("EPT 1 GiB pages", Need::Used, "ept_1gb"),
        ("VPID", Need::Used, "vpid"),
        ("preemption timer", Need::Used, "preemption_timer"),
    ];
    let flags = field(cpuinfo, "flags").unwrap_or_default();
    let vmx_flags = field(cpuinfo, "vmx flags").unwrap_or_default();
    let mut preflight = Preflight::default();
    let mut line = |name, need, there: bool| {
        let status = if there { Status::Ok } else { Status::Missing };
        preflight.features.push(Feature {
            name,
            need,
            status,
            remedy: "",
        });
    };
    line("VMX", Need::Required, has_flag(flags, "vmx"));
    for (name, need, flag) in LINES {
        line(name, need, has_flag(vmx_flags, flag));
    }
    preflight
}

/// The value of the first line `name : value` of /proc/cpuinfo.
fn field<'t>(cpuinfo: &'t str, name: &str) -> Option<&'t str> {
    cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

fn has_flag(flags: &str, flag: &str) -> bool {
    flags.split_whitespace().any(|f| f == flag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt::Status;

    const CPUINFO: &str = "model name\t: A Processor\nflags\t\t: fpu vmx msr\n\
                           vmx flags\t: ept vpid unrestricted_guest preemption_timer\n";

    #[test]
    fn flags_are_whole_words_of_their_own_line() {
        assert_eq!(field(CPUINFO, "model name"), Some("A Processor"));
        assert!(has_flag(field(CPUINFO, "flags").unwrap(), "vmx"));
        assert!(!has_flag(field(CPUINFO, "flags").unwrap(), "ept"));
        assert!(!has_flag("ept_1gb", "ept"));
    }

    #[test]
    fn without_registers_linux_is_asked() {
        let preflight = from_flags(CPUINFO);
        assert!(preflight.passed());
        let status = |name: &str| {
            preflight
                .features
                .iter()
                .find(|f| f.name == name)
                .unwrap()
                .status
        };
        assert_eq!(status("EPT"), Status::Ok);
        assert_eq!(status("EPT 1 GiB pages"), Status::Missing);
        assert!(!from_flags("flags : fpu").passed());
    }

    #[test]
    fn an_unreadable_register_is_noted_once() {
        let registers = Registers {
            file: Err("not here".into()),
            failure: RefCell::default(),
        };
        assert_eq!(registers.read(0x480), 0);
        assert_eq!(registers.failure.into_inner().as_deref(), Some("not here"));
    }
}
