//! What this processor's AMD-V can do, and the pre-flight lines about it.
//!
//! CPUID is read into plain numbers first; everything decided from them is tested on the host.
//! AVIC, virtual GIF and virtual VMLOAD/VMSAVE are not used and hence not listed: the last two
//! serve guests that run guests, and Plinth's guests are not offered SVM.

use alloc::vec::Vec;
use core::arch::x86_64::{__cpuid, __cpuid_count};

use bitflags::bitflags;

use crate::cpu::rdmsr;
use crate::preflight::{Feature, Need, Preflight, Status};

bitflags! {
    /// CPUID Fn8000_000A EDX (APM vol. 3, appendix E.4.9), as far as Plinth uses it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SvmFeatures: u32 {
        /// NP.
        const NESTED_PAGING = 1 << 0;
        /// LbrVirt.
        const LBR_VIRTUALIZATION = 1 << 1;
        /// SVML.
        const SVM_LOCK = 1 << 2;
        /// NRIPS.
        const NRIP_SAVE = 1 << 3;
        /// TscRateMsr.
        const TSC_RATE_MSR = 1 << 4;
        /// VmcbClean.
        const VMCB_CLEAN = 1 << 5;
        /// FlushByAsid.
        const FLUSH_BY_ASID = 1 << 6;
        /// DecodeAssists.
        const DECODE_ASSISTS = 1 << 7;
        /// PauseFilter.
        const PAUSE_FILTER = 1 << 10;
        /// PauseFilterThreshold.
        const PAUSE_FILTER_THRESHOLD = 1 << 12;
        /// SpecCtrl: virtual SPEC_CTRL.
        const SPEC_CTRL = 1 << 20;
        /// VNMI.
        const VIRTUAL_NMI = 1 << 25;
    }
}

/// VM_CR (APM vol. 2, section 15.30.1).
pub const VM_CR: u32 = 0xc001_0114;

bitflags! {
    /// Bits of VM_CR.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct VmCr: u64 {
        /// LOCK: LOCK and SVMDIS are read-only.
        const LOCK = 1 << 3;
        /// SVMDIS: EFER.SVME can't be set.
        const SVM_DISABLED = 1 << 4;
    }
}

/// The CPUID words that matter here, 0 where a leaf is missing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Leaves {
    /// Fn0000_0001 ECX.
    pub basic_ecx: u32,
    /// Fn0000_0001 EDX.
    pub basic_edx: u32,
    /// Fn0000_0007_0 EBX.
    pub structured_ebx: u32,
    /// Fn0000_0007_0 ECX.
    pub structured_ecx: u32,
    /// Fn8000_0001 ECX.
    pub extended_ecx: u32,
    /// Fn8000_0001 EDX.
    pub extended_edx: u32,
    /// Fn8000_0008 EAX: address widths.
    pub address_widths: u32,
    /// Fn8000_0008 EBX.
    pub extended_features: u32,
    /// Fn8000_0021 EAX.
    pub more_features: u32,
    /// Fn8000_000A EBX: number of ASIDs.
    pub asids: u32,
    /// Fn8000_000A EDX.
    pub svm_edx: u32,
    /// Fn4000_0000 EBX, ECX, EDX: the name of a hypervisor below this one.
    pub below: [u32; 3],
}

impl Leaves {
    const SVM: u32 = 1 << 2;
    /// ECX bit 31 of function 1: Fn4000_0000 is there (APM vol. 3, section E.3.9).
    const HYPERVISOR: u32 = 1 << 31;
    /// What QEMU calls its own emulation of a processor: "TCGTCGTCGTCG".
    const TCG: [u32; 3] = [
        u32::from_le_bytes(*b"TCGT"),
        u32::from_le_bytes(*b"CGTC"),
        u32::from_le_bytes(*b"GTCG"),
    ];

    /// Executes CPUID.
    pub fn read() -> Self {
        let mut leaves = Leaves::default();
        let basic = __cpuid(1);
        (leaves.basic_ecx, leaves.basic_edx) = (basic.ecx, basic.edx);
        if __cpuid(0).eax >= 7 {
            let structured = __cpuid_count(7, 0);
            (leaves.structured_ebx, leaves.structured_ecx) = (structured.ebx, structured.ecx);
        }
        let last = __cpuid(0x8000_0000).eax;
        if last >= 0x8000_0001 {
            let extended = __cpuid(0x8000_0001);
            (leaves.extended_ecx, leaves.extended_edx) = (extended.ecx, extended.edx);
        }
        if last >= 0x8000_0008 {
            let sizes = __cpuid(0x8000_0008);
            (leaves.address_widths, leaves.extended_features) = (sizes.eax, sizes.ebx);
        }
        if last >= 0x8000_0021 {
            leaves.more_features = __cpuid(0x8000_0021).eax;
        }
        if leaves.has_svm() && last >= 0x8000_000a {
            let svm = __cpuid(0x8000_000a);
            (leaves.asids, leaves.svm_edx) = (svm.ebx, svm.edx);
        }
        if leaves.basic_ecx & Self::HYPERVISOR != 0 {
            let below = __cpuid(0x4000_0000);
            leaves.below = [below.ebx, below.ecx, below.edx];
        }
        leaves
    }

    /// Whether the processor has SVM at all, turned on or not.
    pub const fn has_svm(&self) -> bool {
        self.extended_ecx & Self::SVM != 0
    }
}

/// What the backend goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// SVM features.
    pub svm: SvmFeatures,
    /// Number of ASIDs; 0 is the host's.
    pub asids: u32,
    /// 1 GiB pages, also in nested tables.
    pub pages_1g: bool,
    /// NX, which the host must turn on for nested tables to use it.
    pub nx: bool,
    /// TSC_AUX (RDTSCP or RDPID).
    pub tsc_aux: bool,
    /// The barrier for indirect branch prediction (PRED_CMD).
    pub ibpb: bool,
    /// Automatic IBRS: guests do not steer the host's branch predictions, and an exit clears return predictions.
    pub automatic_ibrs: bool,
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// Bits of CR4 that the processor has.
    pub cr4: u64,
    /// An interrupt in EVENTINJ may be delivered twice (QEMU TCG, 7.2 to 10.0).
    pub repeats_injection: bool,
}

impl Capabilities {
    /// From CPUID.
    pub fn from_leaves(leaves: &Leaves) -> Self {
        let bit = |word: u32, n: u32| word >> n & 1 == 1;
        Capabilities {
            svm: SvmFeatures::from_bits_truncate(leaves.svm_edx),
            asids: leaves.asids,
            pages_1g: bit(leaves.extended_edx, 26),
            nx: bit(leaves.extended_edx, 20),
            tsc_aux: bit(leaves.extended_edx, 27) || bit(leaves.structured_ecx, 22),
            ibpb: bit(leaves.extended_features, 12),
            automatic_ibrs: bit(leaves.more_features, 8),
            physical_bits: match leaves.address_widths & 0xff {
                0 => 36,
                bits => bits,
            },
            cr4: cr4_bits(leaves),
            repeats_injection: leaves.below == Leaves::TCG,
        }
    }

    /// A processor with nothing optional.
    #[cfg(test)]
    pub fn none() -> Self {
        Capabilities {
            svm: SvmFeatures::NESTED_PAGING,
            asids: 16,
            pages_1g: false,
            nx: true,
            tsc_aux: false,
            ibpb: false,
            automatic_ibrs: false,
            physical_bits: 40,
            cr4: cr4_bits(&Leaves {
                basic_edx: u32::MAX,
                ..Leaves::default()
            }),
            repeats_injection: false,
        }
    }

    /// Whether the hardware switches SPEC_CTRL at every entry and exit.
    pub const fn virtual_spec_ctrl(&self) -> bool {
        self.svm.contains(SvmFeatures::SPEC_CTRL)
    }

    /// Whether return predictions are to be filled after each exit: automatic IBRS clears them otherwise. Only where
    /// there is the microcode of these measures, as [`Capabilities::ibpb`] shows: others leave more open than this.
    pub const fn fills_returns(&self) -> bool {
        self.ibpb && !self.automatic_ibrs
    }

    /// Features that `self` has and `other` lacks; the two must agree for vCPUs to move between pCPUs.
    fn missing_in(&self, other: &Capabilities) -> Vec<Feature> {
        let svm = self.svm.difference(other.svm);
        let mut missing: Vec<&'static str> = LINES
            .iter()
            .filter(|(_, _, feature)| svm.intersects(*feature))
            .map(|(name, _, _)| *name)
            .collect();
        for (name, gone) in [
            ("1 GiB pages", self.pages_1g && !other.pages_1g),
            ("NX", self.nx && !other.nx),
            ("TSC_AUX", self.tsc_aux && !other.tsc_aux),
            ("IBPB", self.ibpb && !other.ibpb),
            (
                "automatic IBRS",
                self.automatic_ibrs && !other.automatic_ibrs,
            ),
            ("ASIDs", self.asids > other.asids),
        ] {
            if gone {
                missing.push(name);
            }
        }
        missing
            .into_iter()
            .map(|name| Feature {
                name,
                need: Need::Required,
                status: Status::Missing,
                remedy: "the first processor has it; all must be alike",
            })
            .collect()
    }

    /// The pre-flight text when `other`, another pCPU, lacks what this one has.
    ///
    /// # Errors
    /// The features that are missing there.
    pub fn check_alike(&self, other: &Capabilities) -> Result<(), Preflight> {
        let features = self.missing_in(other);
        if features.is_empty() {
            Ok(())
        } else {
            Err(Preflight { features })
        }
    }
}

/// Bits of CR4 that exist on a processor with these leaves (APM vol. 2, section 3.1.3).
fn cr4_bits(leaves: &Leaves) -> u64 {
    let (edx, ecx) = (leaves.basic_edx, leaves.basic_ecx);
    let (ebx7, ecx7) = (leaves.structured_ebx, leaves.structured_ecx);
    // (bit of CR4, CPUID word, bit in that word)
    [
        (0, edx, 1),    // VME
        (1, edx, 1),    // PVI
        (2, edx, 4),    // TSD
        (3, edx, 2),    // DE
        (4, edx, 3),    // PSE
        (5, edx, 6),    // PAE
        (6, edx, 7),    // MCE
        (7, edx, 13),   // PGE
        (9, edx, 24),   // OSFXSR
        (10, edx, 25),  // OSXMMEXCPT
        (11, ecx7, 2),  // UMIP
        (12, ecx7, 16), // LA57
        (16, ebx7, 0),  // FSGSBASE
        (17, ecx, 17),  // PCIDE
        (18, ecx, 26),  // OSXSAVE
        (20, ebx7, 7),  // SMEP
        (21, ebx7, 20), // SMAP
        (22, ecx7, 3),  // PKE
        (23, ecx7, 7),  // CET
    ]
    .iter()
    .filter(|(_, word, bit)| word >> bit & 1 == 1)
    // PCE is on every processor that has SVM.
    .fold(1 << 8, |mask, (cr4, _, _)| mask | 1 << cr4)
}

/// Lines of the pre-flight check that are one bit of Fn8000_000A EDX each.
const LINES: [(&str, Need, SvmFeatures); 11] = [
    ("nested paging", Need::Required, SvmFeatures::NESTED_PAGING),
    ("NRIP save", Need::Used, SvmFeatures::NRIP_SAVE),
    ("decode assists", Need::Used, SvmFeatures::DECODE_ASSISTS),
    ("flush by ASID", Need::Used, SvmFeatures::FLUSH_BY_ASID),
    ("VMCB clean bits", Need::Used, SvmFeatures::VMCB_CLEAN),
    ("pause filter", Need::Used, SvmFeatures::PAUSE_FILTER),
    (
        "pause filter threshold",
        Need::Used,
        SvmFeatures::PAUSE_FILTER_THRESHOLD,
    ),
    ("virtual NMI", Need::Used, SvmFeatures::VIRTUAL_NMI),
    ("virtual SPEC_CTRL", Need::Used, SvmFeatures::SPEC_CTRL),
    (
        "LBR virtualization",
        Need::Used,
        SvmFeatures::LBR_VIRTUALIZATION,
    ),
    ("TSC scaling", Need::Used, SvmFeatures::TSC_RATE_MSR),
];

/// Reads VM_CR, where SVM and hence the register exist.
///
/// # Safety
/// Runs at privilege level 0.
pub unsafe fn read_vm_cr(leaves: &Leaves) -> VmCr {
    if !leaves.has_svm() {
        return VmCr::empty();
    }
    // SAFETY: a processor with SVM has VM_CR; the caller runs at privilege level 0.
    VmCr::from_bits_truncate(unsafe { rdmsr(VM_CR) })
}

/// The pre-flight check from numbers. A workstation tool that can't read VM_CR passes it empty.
pub fn preflight(leaves: &Leaves, vm_cr: VmCr) -> Preflight {
    let capabilities = Capabilities::from_leaves(leaves);
    let present = |there: bool| {
        if there { Status::Ok } else { Status::Missing }
    };
    let mut features = Vec::with_capacity(LINES.len() + 5);
    let mut line = |name, need, status, remedy| {
        features.push(Feature {
            name,
            need,
            status,
            remedy,
        });
    };
    line("SVM", Need::Required, present(leaves.has_svm()), "");
    if leaves.has_svm() {
        let (status, remedy) = if !vm_cr.contains(VmCr::SVM_DISABLED | VmCr::LOCK) {
            // Disabled but not locked: `enable` turns it on.
            (Status::Ok, "")
        } else if capabilities.svm.contains(SvmFeatures::SVM_LOCK) {
            // Section 15.4: a key can unlock it, which firmware keeps.
            (
                Status::Locked,
                "turn on \"SVM Mode\" (or \"AMD-V\", \"Virtualization\") in the firmware's processor settings; the lock has a key that only firmware knows",
            )
        } else {
            (
                Status::DisabledInFirmware,
                "turn on \"SVM Mode\" (or \"AMD-V\", \"Virtualization\") in the firmware's processor settings, then power off and on",
            )
        };
        line("SVM allowed by VM_CR", Need::Required, status, remedy);
    }
    line(
        "NX",
        Need::Required,
        present(capabilities.nx),
        "turn on \"NX\" or \"No-Execute\" in the firmware's settings",
    );
    line(
        "ASIDs for guests",
        Need::Required,
        present(capabilities.asids >= 2),
        "",
    );
    for (name, need, feature) in LINES {
        line(name, need, present(capabilities.svm.contains(feature)), "");
    }
    line(
        "1 GiB pages",
        Need::Used,
        present(capabilities.pages_1g),
        "",
    );
    line("IBPB", Need::Used, present(capabilities.ibpb), "");
    Preflight { features }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Leaves {
        Leaves {
            extended_ecx: Leaves::SVM,
            extended_edx: 1 << 20 | 1 << 26 | 1 << 27,
            address_widths: 0x3028,
            asids: 16,
            svm_edx: SvmFeatures::NESTED_PAGING.bits(),
            ..Leaves::default()
        }
    }

    fn status(preflight: &Preflight, name: &str) -> Status {
        let line = preflight.features.iter().find(|f| f.name == name);
        line.unwrap_or_else(|| panic!("no line {name}")).status
    }

    #[test]
    fn the_minimum_passes() {
        let check = preflight(&good(), VmCr::empty());
        assert!(check.passed(), "\n{check}");
        assert_eq!(status(&check, "NRIP save"), Status::Missing);
        assert_eq!(status(&check, "1 GiB pages"), Status::Ok);
        let capabilities = Capabilities::from_leaves(&good());
        assert_eq!(capabilities.physical_bits, 40);
        assert!(capabilities.tsc_aux && capabilities.pages_1g && !capabilities.ibpb);
    }

    #[test]
    fn what_is_missing_is_named() {
        let intel = Leaves::default();
        let check = preflight(&intel, VmCr::empty());
        assert!(!check.passed());
        assert_eq!(status(&check, "SVM"), Status::Missing);

        let old = Leaves {
            svm_edx: 0,
            ..good()
        };
        let check = preflight(&old, VmCr::empty());
        assert!(!check.passed());
        assert_eq!(status(&check, "nested paging"), Status::Missing);

        let few = Leaves { asids: 1, ..good() };
        assert!(!preflight(&few, VmCr::empty()).passed());
    }

    #[test]
    fn firmware_settings_are_told_apart() {
        let name = "SVM allowed by VM_CR";
        let disabled = preflight(&good(), VmCr::SVM_DISABLED | VmCr::LOCK);
        assert_eq!(status(&disabled, name), Status::DisabledInFirmware);
        assert!(!disabled.passed());
        let keyed = Leaves {
            svm_edx: good().svm_edx | SvmFeatures::SVM_LOCK.bits(),
            ..good()
        };
        let locked = preflight(&keyed, VmCr::SVM_DISABLED | VmCr::LOCK);
        assert_eq!(status(&locked, name), Status::Locked);
        assert!(locked.to_string().contains("SVM Mode"));
        // Not locked: we clear it ourselves. Locked in the on position: fine.
        assert!(preflight(&good(), VmCr::SVM_DISABLED).passed());
        assert!(preflight(&good(), VmCr::LOCK).passed());
    }

    #[test]
    fn unlike_processors_are_refused_by_name() {
        let first = Capabilities {
            svm: SvmFeatures::all(),
            ..Capabilities::none()
        };
        assert_eq!(first.check_alike(&first), Ok(()));
        let second = Capabilities {
            svm: first.svm - SvmFeatures::NRIP_SAVE,
            ..first
        };
        let text = first.check_alike(&second).unwrap_err().to_string();
        assert!(
            text.contains("NRIP save") && !text.contains("decode"),
            "{text}"
        );
        // More than the first one has does no harm.
        assert_eq!(second.check_alike(&first), Ok(()));
    }

    #[test]
    fn return_predictions_are_filled_where_nothing_else_clears_them() {
        let fills = |extended_features, more_features| {
            let leaves = Leaves {
                extended_features,
                more_features,
                ..good()
            };
            Capabilities::from_leaves(&leaves).fills_returns()
        };
        assert!(!fills(0, 0), "no microcode for it");
        assert!(fills(1 << 12, 0));
        assert!(!fills(1 << 12, 1 << 8), "automatic IBRS");
    }

    #[test]
    fn cr4_bits_follow_cpuid() {
        assert_eq!(cr4_bits(&Leaves::default()), 1 << 8);
        let smep = Leaves {
            structured_ebx: 1 << 7,
            ..Leaves::default()
        };
        assert_eq!(cr4_bits(&smep), 1 << 8 | 1 << 20);
    }
}
