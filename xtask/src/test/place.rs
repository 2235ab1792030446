//! Where scenarios run: which emulator, which firmware, and how patient to be there.

use std::{path::Path, time::Duration};

use super::linux::Limits;
use crate::{
    deps::Program,
    emulator::{Acceleration, Emulator, Firmware, Machine, Time, newer},
};

/// Where a scenario runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// QEMU's emulation of AMD-V.
    Qemu(Firmware),
    /// QEMU 10's emulation of AMD-V, booted by a BIOS, where time is instructions. Without x2APIC: there
    /// QEMU 10.0.2 ends with "Bad icount read" when the APIC timer's count is read.
    Qemu10,
    /// The same with x2APIC, and the workstation's time.
    Qemu10X2Apic,
    /// Bochs' emulation of VT-x.
    Bochs,
    /// The workstation's own virtualization, nested.
    Kvm,
    /// QEMU without Plinth: the guest is QEMU's own, for comparison.
    Bare,
}

impl Place {
    /// AMD-V, booted by a BIOS.
    pub const QEMU_BIOS: Self = Self::Qemu(Firmware::Bios);
    /// AMD-V, booted by UEFI.
    pub const QEMU_UEFI: Self = Self::Qemu(Firmware::Uefi);

    /// The beginning of the names of its scenarios.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu(Firmware::Bios) => "qemu-amdv/bios",
            Self::Qemu(Firmware::Uefi) => "qemu-amdv/uefi",
            Self::Qemu10 => "qemu10-amdv/bios",
            Self::Qemu10X2Apic => "qemu10-x2apic/bios",
            Self::Bochs => "bochs-vtx/bios",
            Self::Kvm => "kvm/uefi",
            Self::Bare => "reference/qemu",
        }
    }

    /// The emulator that is this place.
    pub fn emulator(self) -> Emulator {
        match self {
            Self::Bochs => Emulator::Bochs,
            Self::Qemu(_) | Self::Qemu10 | Self::Qemu10X2Apic | Self::Kvm | Self::Bare => {
                Emulator::Qemu
            }
        }
    }

    /// The programs that it needs.
    pub fn programs(self) -> &'static [Program] {
        match self {
            Self::Qemu(Firmware::Bios) | Self::Qemu10 | Self::Qemu10X2Apic | Self::Bare => {
                &[Program::Qemu]
            }
            Self::Qemu(Firmware::Uefi) | Self::Kvm => &[Program::Qemu, Program::Ovmf],
            Self::Bochs => &[Program::Bochs],
        }
    }

    /// Checks of the stub that fail there for faults of the emulator, without Plinth as well.
    pub fn faults(self) -> &'static [&'static str] {
        match self {
            // QEMU 10.0.2 takes VMXON and, in ring 3, WBINVD for instructions that do nothing.
            Self::Qemu10 | Self::Qemu10X2Apic => &[
                "cpuid.no_nested_virtualization",
                "exceptions.privileged_in_ring3",
            ],
            Self::Qemu(_) | Self::Bochs | Self::Kvm | Self::Bare => &[],
        }
    }

    /// A processor model with features for guests that the usual one lacks, if there is one: on Bochs, one with TSC
    /// scaling and XSAVES.
    pub fn newer_model(self) -> Option<&'static str> {
        (self == Self::Bochs).then_some("corei7_skylake_x")
    }

    /// The machine that boots `image` there.
    pub fn machine(self, image: &Path) -> Machine {
        let mut machine = Machine::new(self.emulator(), image);
        if matches!(self, Self::Qemu(_) | Self::Qemu10 | Self::Bare) {
            // Independent of how busy the workstation is; guests wait in loops at times.
            machine.time = Time::Instructions { shift: 2 };
        }
        match self {
            Self::Qemu(firmware) => machine.firmware = firmware,
            Self::Qemu10 | Self::Qemu10X2Apic => {
                machine.firmware = Firmware::Bios;
                machine.qemu = Some(newer::program());
                if self == Self::Qemu10 {
                    machine.cpu_model = Some("max,-x2apic".to_owned());
                }
            }
            // A second processor costs Bochs as much as the first.
            Self::Bochs => machine.cpus = 1,
            Self::Kvm => machine.acceleration = Acceleration::Kvm,
            Self::Bare => {
                machine.firmware = Firmware::Bios;
                machine.cpus = 1;
            }
        }
        machine
    }

    /// Generous: the workstation may have slow processors, and something else to do.
    pub fn limits(self) -> Limits {
        let (boot, command) = match self {
            Self::Qemu(_) | Self::Qemu10 | Self::Qemu10X2Apic | Self::Bare => (480, 180),
            Self::Bochs => (720, 240),
            Self::Kvm => (120, 60),
        };
        Limits {
            boot: Duration::from_secs(boot),
            command: Duration::from_secs(command),
        }
    }

    /// The longest that a whole scenario may take.
    pub fn patience(self) -> Duration {
        2 * self.limits().boot
    }
}
