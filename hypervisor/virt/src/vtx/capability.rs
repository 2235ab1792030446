//! What this processor's VT-x can do, and the control settings that follow from it.
//!
//! [`Capabilities`] holds the capability MSRs (SDM vol. 3D, appendix A). [`Controls::choose`]
//! and [`preflight`] are pure functions of it, so they are tested on the host with made-up
//! processors.

use alloc::vec::Vec;
use core::arch::x86_64::CpuidResult;

use bitflags::bitflags;
use mem::nested::Ept;

use super::mitigation::{self, ArchCapabilities, Enumerated, Leaf7Ebx, Leaf7Edx, Mitigations};
use crate::cpu::{msr, rdmsr};
use crate::preflight::{Feature, Need, Preflight, Status};

bitflags! {
    /// Pin-based VM-execution controls (SDM vol. 3C, table 25-5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Pin: u32 {
        /// Host interrupts exit.
        const EXTERNAL_INTERRUPT = 1 << 0;
        /// Host NMIs exit.
        const NMI = 1 << 3;
        /// NMI blocking is tracked for the guest.
        const VIRTUAL_NMIS = 1 << 5;
        /// The timer that ends a time slice.
        const PREEMPTION_TIMER = 1 << 6;
    }

    /// Primary processor-based VM-execution controls (SDM vol. 3C, table 25-6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Proc: u32 {
        /// Exit as soon as an interrupt could be taken.
        const INTERRUPT_WINDOW = 1 << 2;
        /// The guest's TSC is the host's plus an offset.
        const TSC_OFFSET = 1 << 3;
        /// HLT exits.
        const HLT = 1 << 7;
        /// INVLPG exits.
        const INVLPG = 1 << 9;
        /// MWAIT exits.
        const MWAIT = 1 << 10;
        /// RDPMC exits.
        const RDPMC = 1 << 11;
        /// RDTSC exits.
        const RDTSC = 1 << 12;
        /// MOV to CR3 exits.
        const CR3_LOAD = 1 << 15;
        /// MOV from CR3 exits.
        const CR3_STORE = 1 << 16;
        /// MOV to CR8 exits.
        const CR8_LOAD = 1 << 19;
        /// MOV from CR8 exits.
        const CR8_STORE = 1 << 20;
        /// CR8 is the task priority in the virtual-APIC page.
        const TPR_SHADOW = 1 << 21;
        /// Exit as soon as an NMI could be taken.
        const NMI_WINDOW = 1 << 22;
        /// MOV DR exits.
        const MOV_DR = 1 << 23;
        /// All port I/O exits.
        const UNCONDITIONAL_IO = 1 << 24;
        /// Exit after each instruction.
        const MONITOR_TRAP = 1 << 27;
        /// RDMSR and WRMSR exit by bitmap.
        const MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR = 1 << 29;
        /// PAUSE exits.
        const PAUSE = 1 << 30;
        /// The secondary controls are in use.
        const SECONDARY = 1 << 31;
    }

    /// Secondary processor-based VM-execution controls (SDM vol. 3C, table 25-7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Proc2: u32 {
        /// Nested paging.
        const EPT = 1 << 1;
        /// RDTSCP works.
        const RDTSCP = 1 << 3;
        /// Cached translations are tagged.
        const VPID = 1 << 5;
        /// WBINVD exits.
        const WBINVD = 1 << 6;
        /// Real mode and unpaged protected mode run.
        const UNRESTRICTED_GUEST = 1 << 7;
        /// A loop of PAUSE exits.
        const PAUSE_LOOP = 1 << 10;
        /// INVPCID works.
        const INVPCID = 1 << 12;
        /// XSAVES and XRSTORS work.
        const XSAVES = 1 << 20;
        /// The guest's TSC is the host's times a factor, plus the offset.
        const TSC_SCALING = 1 << 25;
    }

    /// Primary VM-exit controls (SDM vol. 3C, table 25-13).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ExitControls: u32 {
        /// DR7 and IA32_DEBUGCTL are saved.
        const SAVE_DEBUG = 1 << 2;
        /// The host is in 64-bit mode.
        const HOST_64 = 1 << 9;
        /// IA32_PAT is saved.
        const SAVE_PAT = 1 << 18;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 19;
        /// IA32_EFER is saved.
        const SAVE_EFER = 1 << 20;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 21;
    }

    /// VM-entry controls (SDM vol. 3C, table 25-15).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EntryControls: u32 {
        /// DR7 and IA32_DEBUGCTL are loaded.
        const LOAD_DEBUG = 1 << 2;
        /// The guest is in IA-32e mode.
        const IA32E_GUEST = 1 << 9;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 14;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 15;
    }

    /// IA32_VMX_EPT_VPID_CAP (SDM vol. 3D, appendix A.10).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EptVpid: u64 {
        /// Pages that can be fetched from but not read.
        const EXECUTE_ONLY = 1 << 0;
        /// Four-level tables.
        const WALK_4 = 1 << 6;
        /// Tables in write-back memory.
        const WRITE_BACK = 1 << 14;
        /// 2 MiB pages.
        const PAGES_2M = 1 << 16;
        /// 1 GiB pages.
        const PAGES_1G = 1 << 17;
        /// INVEPT.
        const INVEPT = 1 << 20;
        /// INVEPT of one EPT pointer.
        const INVEPT_SINGLE = 1 << 25;
        /// INVEPT of all.
        const INVEPT_ALL = 1 << 26;
        /// INVVPID.
        const INVVPID = 1 << 32;
        /// INVVPID of one VPID.
        const INVVPID_SINGLE = 1 << 41;
        /// INVVPID of all.
        const INVVPID_ALL = 1 << 42;
    }
}

/// Capability MSRs (SDM vol. 3D, appendix A).
mod number {
    pub(super) const BASIC: u32 = 0x480;
    pub(super) const PIN: u32 = 0x481;
    pub(super) const PROC: u32 = 0x482;
    pub(super) const EXIT: u32 = 0x483;
    pub(super) const ENTRY: u32 = 0x484;
    pub(super) const MISC: u32 = 0x485;
    pub(super) const CR0_FIXED0: u32 = 0x486;
    pub(super) const CR0_FIXED1: u32 = 0x487;
    pub(super) const CR4_FIXED0: u32 = 0x488;
    pub(super) const CR4_FIXED1: u32 = 0x489;
    pub(super) const PROC2: u32 = 0x48b;
    pub(super) const EPT_VPID: u32 = 0x48c;
    pub(super) const TRUE_PIN: u32 = 0x48d;
    pub(super) const TRUE_PROC: u32 = 0x48e;
    pub(super) const TRUE_EXIT: u32 = 0x48f;
    pub(super) const TRUE_ENTRY: u32 = 0x490;
}

/// Which bits of a control word may be 0 and which may be 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Bits that must be 1 (the "allowed 0-settings" that are not).
    pub must: u32,
    /// Bits that may be 1.
    pub may: u32,
}

impl Allowed {
    /// From a capability MSR: the low half says what must be 1, the high half what may be.
    pub const fn from_msr(value: u64) -> Self {
        Allowed {
            must: value as u32,
            may: (value >> 32) as u32,
        }
    }

    /// Whether all of `bits` may be 1.
    pub const fn offers(self, bits: u32) -> bool {
        self.may & bits == bits
    }

    /// Whether the processor takes this value of the control word.
    pub const fn accepts(self, value: u32) -> bool {
        value & self.must == self.must && value & !self.may == 0
    }
}

/// Bits of a control register that are fixed in VMX operation (SDM vol. 3D, appendices A.7, A.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// Bits that must be 1.
    pub ones: u64,
    /// Bits that may be 1.
    pub may: u64,
}

/// The capability MSRs of one processor, and what else its VMCSs depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the manual's")]
pub struct Capabilities {
    /// VMCS revision identifier.
    pub revision: u32,
    pub pin: Allowed,
    pub proc: Allowed,
    pub proc2: Allowed,
    pub exit: Allowed,
    pub entry: Allowed,
    pub ept_vpid: EptVpid,
    pub cr0: Fixed,
    pub cr4: Fixed,
    /// The preemption timer counts down when this bit of the TSC changes.
    pub timer_shift: u8,
    /// A software event may be injected with an instruction length of 0.
    pub zero_length_injection: bool,
    /// Width of physical addresses in bits.
    pub physical_bits: u8,
}

impl Capabilities {
    /// CR0.PE and CR0.PG: free for an unrestricted guest, whatever the fixed bits say.
    pub const CR0_UNRESTRICTED: u64 = 1 << 0 | 1 << 31;

    /// From the MSRs, each asked for by its number. Asked for are only those that a processor with
    /// VMX has (which of the optional ones is told by bit 55 of BASIC, then by the controls that
    /// these describe).
    fn from_msrs(read: &impl Fn(u32) -> u64) -> Self {
        let basic = read(number::BASIC);
        let (pin, proc, exit, entry) = if basic & (1 << 55) != 0 {
            (
                number::TRUE_PIN,
                number::TRUE_PROC,
                number::TRUE_EXIT,
                number::TRUE_ENTRY,
            )
        } else {
            (number::PIN, number::PROC, number::EXIT, number::ENTRY)
        };
        let proc = Allowed::from_msr(read(proc));
        let proc2 = if proc.offers(Proc::SECONDARY.bits()) {
            Allowed::from_msr(read(number::PROC2))
        } else {
            Allowed::default()
        };
        let ept_vpid = if proc2.may & (Proc2::EPT | Proc2::VPID).bits() != 0 {
            EptVpid::from_bits_retain(read(number::EPT_VPID))
        } else {
            EptVpid::empty()
        };
        let misc = read(number::MISC);
        let physical_bits = if core::arch::x86_64::__cpuid(0x8000_0000).eax >= 0x8000_0008 {
            core::arch::x86_64::__cpuid(0x8000_0008).eax as u8
        } else {
            36
        };
        Capabilities {
            revision: basic as u32 & 0x7fff_ffff,
            pin: Allowed::from_msr(read(pin)),
            proc,
            proc2,
            exit: Allowed::from_msr(read(exit)),
            entry: Allowed::from_msr(read(entry)),
            ept_vpid,
            cr0: Fixed {
                ones: read(number::CR0_FIXED0),
                may: read(number::CR0_FIXED1),
            },
            cr4: Fixed {
                ones: read(number::CR4_FIXED0),
                may: read(number::CR4_FIXED1),
            },
            timer_shift: misc as u8 & 0x1f,
            zero_length_injection: misc & (1 << 30) != 0,
            physical_bits,
        }
    }

    /// The format of EPT entries. Accessed and dirty flags stay off: nothing reads them.
    pub const fn ept(&self) -> Ept {
        Ept {
            pages_2m: self.ept_vpid.contains(EptVpid::PAGES_2M),
            pages_1g: self.ept_vpid.contains(EptVpid::PAGES_1G),
            execute_only: self.ept_vpid.contains(EptVpid::EXECUTE_ONLY),
            accessed_dirty: false,
        }
    }

    /// VPIDs can be used: they are there, and can be flushed.
    const fn has_vpid(&self) -> bool {
        self.proc2.offers(Proc2::VPID.bits())
            && self.ept_vpid.contains(EptVpid::INVVPID)
            && (self.ept_vpid.contains(EptVpid::INVVPID_SINGLE)
                || self.ept_vpid.contains(EptVpid::INVVPID_ALL))
    }

    /// Cached EPT translations can be dropped.
    const fn has_invept(&self) -> bool {
        self.ept_vpid.contains(EptVpid::INVEPT)
            && (self.ept_vpid.contains(EptVpid::INVEPT_SINGLE)
                || self.ept_vpid.contains(EptVpid::INVEPT_ALL))
    }
}

const PIN_REQUIRED: Pin = Pin::EXTERNAL_INTERRUPT
    .union(Pin::NMI)
    .union(Pin::VIRTUAL_NMIS);
const PROC_REQUIRED: Proc = Proc::TSC_OFFSET
    .union(Proc::HLT)
    .union(Proc::MWAIT)
    .union(Proc::RDPMC)
    .union(Proc::CR8_LOAD)
    .union(Proc::CR8_STORE)
    .union(Proc::UNCONDITIONAL_IO)
    .union(Proc::MSR_BITMAPS)
    .union(Proc::MONITOR)
    .union(Proc::SECONDARY);
/// Set later, when asked for.
const PROC_WINDOWS: Proc = Proc::INTERRUPT_WINDOW.union(Proc::NMI_WINDOW);
/// Exits that nobody above could handle, or that would cost too much.
const PROC_UNWANTED: Proc = Proc::INVLPG
    .union(Proc::RDTSC)
    .union(Proc::CR3_LOAD)
    .union(Proc::CR3_STORE)
    .union(Proc::MOV_DR)
    .union(Proc::MONITOR_TRAP)
    .union(Proc::PAUSE);
const PROC2_REQUIRED: Proc2 = Proc2::EPT.union(Proc2::UNRESTRICTED_GUEST);
const PROC2_USED: Proc2 = Proc2::RDTSCP
    .union(Proc2::WBINVD)
    .union(Proc2::PAUSE_LOOP)
    .union(Proc2::INVPCID)
    .union(Proc2::XSAVES);
const EXIT_REQUIRED: ExitControls = ExitControls::SAVE_DEBUG
    .union(ExitControls::HOST_64)
    .union(ExitControls::SAVE_PAT)
    .union(ExitControls::LOAD_PAT)
    .union(ExitControls::SAVE_EFER)
    .union(ExitControls::LOAD_EFER);
const ENTRY_REQUIRED: EntryControls = EntryControls::LOAD_DEBUG
    .union(EntryControls::LOAD_PAT)
    .union(EntryControls::LOAD_EFER);

/// Initial control words of every VMCS, right for this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: Pin,
    /// Primary processor-based; the windows are off.
    pub proc: Proc,
    /// Secondary processor-based; VPID is on where usable.
    pub proc2: Proc2,
    /// VM exit.
    pub exit: ExitControls,
    /// VM entry; IA32E_GUEST is off.
    pub entry: EntryControls,
}

impl Controls {
    /// The control words, or `None` when something required is not there; [`preflight`] says what.
    pub fn choose(c: &Capabilities) -> Option<Self> {
        if preflight_controls(c).any(|f| f.need == Need::Required && f.status != Status::Ok) {
            return None;
        }
        let mut pin = PIN_REQUIRED.bits() | c.pin.must;
        pin |= Pin::PREEMPTION_TIMER.bits() & c.pin.may;
        let mut proc = PROC_REQUIRED;
        if c.proc.offers(Proc::TPR_SHADOW.bits()) {
            proc.insert(Proc::TPR_SHADOW);
            proc.remove(Proc::CR8_LOAD | Proc::CR8_STORE);
        }
        // TSC scaling is on for vCPUs that have a rate of their own only.
        let mut proc2 = PROC2_REQUIRED.bits() | c.proc2.must | (PROC2_USED.bits() & c.proc2.may);
        if c.has_vpid() {
            proc2 |= Proc2::VPID.bits();
        }
        Some(Controls {
            pin: Pin::from_bits_retain(pin),
            proc: Proc::from_bits_retain(proc.bits() | c.proc.must),
            proc2: Proc2::from_bits_retain(proc2),
            exit: ExitControls::from_bits_retain(EXIT_REQUIRED.bits() | c.exit.must),
            entry: EntryControls::from_bits_retain(ENTRY_REQUIRED.bits() | c.entry.must),
        })
    }
}

impl Controls {
    /// Takes out of CPUID what is #UD in a guest without its control (SDM vol. 3C, section 26.3).
    pub fn limit_cpuid(&self, leaf: u32, subleaf: u32, answer: &mut CpuidResult) {
        const RDPID: u32 = 1 << 22;
        const RDTSCP: u32 = 1 << 27;
        const INVPCID: u32 = 1 << 10;
        const XSAVES: u32 = 1 << 3;
        let lacks = |control| !self.proc2.contains(control);
        match (leaf, subleaf) {
            (7, 0) => {
                if lacks(Proc2::INVPCID) {
                    answer.ebx &= !INVPCID;
                }
                if lacks(Proc2::RDTSCP) {
                    answer.ecx &= !RDPID;
                }
            }
            (0xd, 1) if lacks(Proc2::XSAVES) => answer.eax &= !XSAVES,
            (0x8000_0001, _) if lacks(Proc2::RDTSCP) => answer.edx &= !RDTSCP,
            _ => {}
        }
    }
}

fn line(name: &'static str, need: Need, present: bool) -> Feature {
    Feature {
        name,
        need,
        status: if present { Status::Ok } else { Status::Missing },
        remedy: "",
    }
}

/// Pre-flight lines that follow from the capability MSRs.
fn preflight_controls(c: &Capabilities) -> impl Iterator<Item = Feature> + use<> {
    use Need::{Required, Used};
    let c = *c;
    let ept = c.proc2.offers(Proc2::EPT.bits());
    [
        line(
            "interrupt and NMI exiting",
            Required,
            c.pin.offers((Pin::EXTERNAL_INTERRUPT | Pin::NMI).bits()),
        ),
        line(
            "virtual NMIs",
            Required,
            c.pin.offers(Pin::VIRTUAL_NMIS.bits()) && c.proc.offers(Proc::NMI_WINDOW.bits()),
        ),
        line(
            "instruction and I/O exiting",
            Required,
            c.proc
                .offers((PROC_REQUIRED | PROC_WINDOWS).bits() & !Proc::MSR_BITMAPS.bits()),
        ),
        line(
            "CR3, TSC and DR access without exits",
            Required,
            c.proc.must & PROC_UNWANTED.bits() == 0,
        ),
        line(
            "MSR bitmaps",
            Required,
            c.proc.offers(Proc::MSR_BITMAPS.bits()),
        ),
        line("EPT", Required, ept),
        line(
            "EPT four-level write-back tables",
            Required,
            c.ept_vpid.contains(EptVpid::WALK_4 | EptVpid::WRITE_BACK),
        ),
        line("INVEPT", Required, c.has_invept()),
        line(
            "unrestricted guest",
            Required,
            c.proc2.offers(Proc2::UNRESTRICTED_GUEST.bits()),
        ),
        line(
            "DEBUGCTL, PAT and EFER switching",
            Required,
            c.exit.offers(EXIT_REQUIRED.bits()) && c.entry.offers(ENTRY_REQUIRED.bits()),
        ),
        line(
            "64-bit guests",
            Required,
            c.entry.offers(EntryControls::IA32E_GUEST.bits()),
        ),
        line(
            "EPT 2 MiB pages",
            Used,
            c.ept_vpid.contains(EptVpid::PAGES_2M),
        ),
        line(
            "EPT 1 GiB pages",
            Used,
            c.ept_vpid.contains(EptVpid::PAGES_1G),
        ),
        line("VPID", Used, c.has_vpid()),
        line(
            "preemption timer",
            Used,
            c.pin.offers(Pin::PREEMPTION_TIMER.bits()),
        ),
        line("TPR shadow", Used, c.proc.offers(Proc::TPR_SHADOW.bits())),
        line("RDTSCP", Used, c.proc2.offers(Proc2::RDTSCP.bits())),
        line("INVPCID", Used, c.proc2.offers(Proc2::INVPCID.bits())),
        line("WBINVD exiting", Used, c.proc2.offers(Proc2::WBINVD.bits())),
        line(
            "PAUSE-loop exiting",
            Used,
            c.proc2.offers(Proc2::PAUSE_LOOP.bits()),
        ),
        line("XSAVES", Used, c.proc2.offers(Proc2::XSAVES.bits())),
        line(
            "TSC scaling",
            Used,
            c.proc2.offers(Proc2::TSC_SCALING.bits()),
        ),
    ]
    .into_iter()
}

bitflags! {
    /// IA32_FEATURE_CONTROL (SDM vol. 4, table 2-2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FeatureControl: u64 {
        /// The register can't be written until the next reset.
        const LOCKED = 1 << 0;
        /// VMXON works outside SMX operation.
        const VMX = 1 << 2;
    }
}

/// What the pre-flight check looks at; `None` below VMX when CPUID does not report it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// IA32_FEATURE_CONTROL and the capability MSRs, when CPUID reports VMX.
    pub vmx: Option<(FeatureControl, Capabilities)>,
    /// CPUID reports XSAVE.
    pub xsave: bool,
    /// CPUID reports the indirect-branch barrier of IA32_PRED_CMD.
    pub ibpb: bool,
    /// IA32_ARCH_CAPABILITIES; empty where there is none.
    pub arch_capabilities: ArchCapabilities,
    /// What is to be done against leaks by speculation.
    pub mitigations: Mitigations,
}

impl Found {
    /// Examines the calling pCPU.
    pub fn read() -> Self {
        // SAFETY: `with` asks only for registers that CPUID says are there.
        Self::with(|number| unsafe { rdmsr(number) })
    }

    /// Examines the calling processor by CPUID and MSRs that `read` gives by their number: also
    /// where RDMSR is not allowed. None is asked for when CPUID does not report VMX.
    pub fn with(read: impl Fn(u32) -> u64) -> Self {
        let info = raw_cpuid::CpuId::new().get_feature_info();
        let vmx = info.as_ref().is_some_and(|f| f.has_vmx()).then(|| {
            let control = FeatureControl::from_bits_truncate(read(msr::FEATURE_CONTROL));
            (control, Capabilities::from_msrs(&read))
        });
        let (ebx, features) = if core::arch::x86_64::__cpuid(0).eax >= 7 {
            let leaf = core::arch::x86_64::__cpuid_count(7, 0);
            (
                Leaf7Ebx::from_bits_truncate(leaf.ebx),
                Leaf7Edx::from_bits_truncate(leaf.edx),
            )
        } else {
            (Leaf7Ebx::empty(), Leaf7Edx::empty())
        };
        let capabilities = if vmx.is_some() && features.contains(Leaf7Edx::ARCH_CAPABILITIES) {
            ArchCapabilities::from_bits_retain(read(mitigation::ARCH_CAPABILITIES))
        } else {
            ArchCapabilities::empty()
        };
        Found {
            vmx,
            xsave: info.as_ref().is_some_and(|f| f.has_xsave()),
            ibpb: features.contains(Leaf7Edx::IBRS),
            arch_capabilities: capabilities,
            mitigations: Mitigations::choose(Enumerated {
                ebx,
                edx: features,
                capabilities,
            }),
        }
    }
}

/// The pre-flight lines of VT-x.
pub fn preflight(found: &Found) -> Preflight {
    let mut features = Vec::new();
    let Some((control, capabilities)) = found.vmx else {
        features.push(Feature {
            name: "VMX",
            need: Need::Required,
            status: Status::Missing,
            remedy: "the processor has no VT-x, or a hypervisor below hides it",
        });
        return Preflight { features };
    };
    features.push(line("VMX", Need::Required, true));
    let locked_out =
        control & (FeatureControl::LOCKED | FeatureControl::VMX) == FeatureControl::LOCKED;
    features.push(Feature {
        name: "VMX allowed by firmware",
        need: Need::Required,
        status: if locked_out {
            Status::Locked
        } else {
            Status::Ok
        },
        remedy: "enable \"Intel Virtualization Technology\" (VT-x, VMX) in the firmware's processor settings and power-cycle",
    });
    features.extend(preflight_controls(&capabilities));
    features.push(line("XSAVE", Need::Used, found.xsave));
    features.push(line("IBPB", Need::Used, found.ibpb));
    Preflight { features }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A Haswell-like processor.
    pub(in crate::vtx) fn haswell() -> Capabilities {
        Capabilities {
            revision: 0x2b,
            pin: Allowed {
                must: 0x16,
                may: 0x7f,
            },
            proc: Allowed {
                must: 0x0400_6172,
                may: 0xf7f9_fffe,
            },
            proc2: Allowed {
                must: 0,
                may: 0x0007_7cff,
            },
            exit: Allowed {
                must: 0x0003_6dfb,
                may: 0x007f_ffff,
            },
            entry: Allowed {
                must: 0x11fb,
                may: 0xffff,
            },
            ept_vpid: EptVpid::from_bits_retain(0x0f01_0633_4141),
            cr0: Fixed {
                ones: 0x8000_0021,
                may: 0xffff_ffff,
            },
            cr4: Fixed {
                ones: 0x2000,
                may: 0x0017_27ff,
            },
            timer_shift: 5,
            zero_length_injection: false,
            physical_bits: 39,
        }
    }

    #[test]
    fn haswell_passes_and_its_controls_are_accepted() {
        let c = haswell();
        let chosen = Controls::choose(&c).expect("all required controls are there");
        assert!(c.pin.accepts(chosen.pin.bits()));
        assert!(c.proc.accepts(chosen.proc.bits()));
        assert!(c.proc.accepts((chosen.proc | PROC_WINDOWS).bits()));
        assert!(c.proc2.accepts(chosen.proc2.bits()));
        assert!(c.exit.accepts(chosen.exit.bits()));
        assert!(
            c.entry
                .accepts((chosen.entry | EntryControls::IA32E_GUEST).bits())
        );
        assert!(chosen.proc2.contains(Proc2::VPID | Proc2::INVPCID));
        assert!(chosen.pin.contains(Pin::PREEMPTION_TIMER));
        assert!(!chosen.proc.intersects(PROC_UNWANTED | PROC_WINDOWS));
        let found = Found {
            vmx: Some((FeatureControl::empty(), c)),
            xsave: true,
            ibpb: true,
            arch_capabilities: ArchCapabilities::empty(),
            mitigations: Mitigations::default(),
        };
        assert!(preflight(&found).passed());
    }

    #[test]
    fn a_missing_required_control_is_named() {
        for (name, spoil) in [
            (
                "EPT",
                (|c| c.proc2.may &= !Proc2::EPT.bits()) as fn(&mut Capabilities),
            ),
            ("unrestricted guest", |c| {
                c.proc2.may &= !Proc2::UNRESTRICTED_GUEST.bits();
            }),
            ("virtual NMIs", |c| c.pin.may &= !Pin::VIRTUAL_NMIS.bits()),
            ("MSR bitmaps", |c| c.proc.may &= !Proc::MSR_BITMAPS.bits()),
            ("CR3, TSC and DR access without exits", |c| {
                c.proc.must |= Proc::CR3_LOAD.bits();
            }),
            ("DEBUGCTL, PAT and EFER switching", |c| {
                c.exit.may &= !ExitControls::LOAD_EFER.bits();
            }),
            ("INVEPT", |c| c.ept_vpid.remove(EptVpid::INVEPT)),
        ] {
            let mut c = haswell();
            spoil(&mut c);
            assert!(Controls::choose(&c).is_none(), "{name}");
            let report = preflight(&Found {
                vmx: Some((FeatureControl::all(), c)),
                xsave: true,
                ibpb: true,
                arch_capabilities: ArchCapabilities::empty(),
                mitigations: Mitigations::default(),
            });
            assert!(!report.passed());
            let missing: Vec<_> = report
                .features
                .iter()
                .filter(|f| f.need == Need::Required && f.status != Status::Ok)
                .map(|f| f.name)
                .collect();
            assert_eq!(missing, [name]);
        }
    }

    #[test]
    fn optional_features_are_left_out_where_missing() {
        let mut c = haswell();
        c.pin.may &= !Pin::PREEMPTION_TIMER.bits();
        c.ept_vpid.remove(EptVpid::INVVPID);
        c.proc2.may &= !PROC2_USED.bits();
        c.proc.may &= !Proc::TPR_SHADOW.bits();
        let chosen = Controls::choose(&c).expect("nothing required is gone");
        assert!(!chosen.pin.contains(Pin::PREEMPTION_TIMER));
        assert!(!chosen.proc2.intersects(PROC2_USED | Proc2::VPID));
        // CR8 exits unless it has a shadow.
        let cr8_exits = Proc::CR8_LOAD | Proc::CR8_STORE;
        assert!(chosen.proc.contains(cr8_exits) && !chosen.proc.contains(Proc::TPR_SHADOW));
        let chosen = Controls::choose(&haswell()).expect("a Haswell has all that is required");
        assert!(!chosen.proc2.contains(Proc2::XSAVES));
        assert!(!chosen.proc.intersects(cr8_exits) && chosen.proc.contains(Proc::TPR_SHADOW));
    }

    #[test]
    fn a_newer_processor_has_xsaves_on_and_tsc_scaling_off() {
        let mut c = haswell();
        c.proc2.may |= (Proc2::XSAVES | Proc2::TSC_SCALING).bits();
        let chosen = Controls::choose(&c).expect("a Haswell with more");
        assert!(chosen.proc2.contains(Proc2::XSAVES));
        assert!(!chosen.proc2.contains(Proc2::TSC_SCALING));
        assert!(c.proc2.accepts((chosen.proc2 | Proc2::TSC_SCALING).bits()));
    }

    #[test]
    fn instructions_without_their_control_are_not_shown() {
        const ALL: CpuidResult = CpuidResult {
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
        };
        let answers = |c: &Capabilities| {
            let controls = Controls::choose(c).expect("nothing required is gone");
            [(7, 0), (7, 1), (0xd, 1), (0xd, 0), (0x8000_0001, 0)].map(|(leaf, subleaf)| {
                let mut answer = ALL;
                controls.limit_cpuid(leaf, subleaf, &mut answer);
                (!answer.eax, !answer.ebx, !answer.ecx, !answer.edx)
            })
        };
        let none = (0, 0, 0, 0);
        // A Haswell has no XSAVES.
        assert_eq!(answers(&haswell()), [none, none, (8, 0, 0, 0), none, none]);
        let mut c = haswell();
        c.proc2.may &= !PROC2_USED.bits();
        let hidden = [
            (0, 1 << 10, 1 << 22, 0),
            none,
            (8, 0, 0, 0),
            none,
            (0, 0, 0, 1 << 27),
        ];
        assert_eq!(answers(&c), hidden);
        c.proc2.may |= PROC2_USED.bits();
        assert_eq!(answers(&c), [none; 5]);
    }

    #[test]
    fn firmware_lock_and_absence_are_told_apart() {
        let report = |control| {
            preflight(&Found {
                vmx: Some((control, haswell())),
                xsave: true,
                ibpb: true,
                arch_capabilities: ArchCapabilities::empty(),
                mitigations: Mitigations::default(),
            })
        };
        assert_eq!(
            report(FeatureControl::LOCKED).features[1].status,
            Status::Locked
        );
        assert!(!report(FeatureControl::LOCKED).passed());
        assert!(report(FeatureControl::all()).passed());
        let none = preflight(&Found {
            vmx: None,
            xsave: true,
            ibpb: true,
            arch_capabilities: ArchCapabilities::empty(),
            mitigations: Mitigations::default(),
        });
        assert_eq!(none.features.len(), 1);
        assert_eq!(none.features[0].status, Status::Missing);
        assert!(!none.passed());
    }
}
