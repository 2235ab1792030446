//! The CPU model: a computed set of CPUID leaves, never the host's own.
//!
//! A [`CpuidPolicy`] is computed once per VM from what the host's processor answers. Each
//! feature word is the host's masked by a list of what Plinth virtualizes, plus what it
//! emulates whatever the host has. A guest's CPUID is then a table look-up; only the few
//! fields that depend on the vCPU's state (APIC ID, OSXSAVE, XCR0) are filled in on the way.
//!
//! [`CpuModel`] chooses how much of it: all, or a baseline that is the same on every host, with single
//! features switched. A feature that is not shown has its CR4, EFER and XCR0 bits refused.
//!
//! Source: SDM vol. 2A, CPUID; APM vol. 3, appendix E. The paravirtual leaves follow Linux'
//! Documentation/virt/kvm/x86/cpuid.rst.

mod features;

use alloc::{string::String, vec::Vec};

pub use features::XsaveComponents;
use features::{
    ArchCapabilities, Ext1Edx, Ext8Ebx, Leaf1Ecx, Leaf1Edx, Leaf7Ebx, Leaf7Ecx, Leaf7Edx,
    ParavirtFeatures, SWITCHES, Switch, Word, XsaveEax, baseline,
};

/// The four result registers of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "register names say it all")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// How to ask the host's processor: leaf (EAX) and sub-leaf (ECX).
pub type HostCpuid<'a> = &'a dyn Fn(u32, u32) -> CpuidResult;

/// Bits of leaf 1 EDX that also stand in leaf 0x8000_0001 EDX on AMD processors.
const AMD_SHARED_EDX: u32 = 0x0183_f3ff;
/// First leaf of the hypervisor range.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// Leaf of the rates, as VMware defined it and QEMU shows it beside KVM's leaves; the highest of the range.
const HYPERVISOR_RATES: u32 = 0x4000_0010;
/// First leaf of the extended range.
const EXTENDED_BASE: u32 = 0x8000_0000;
/// Highest basic leaf shown.
const MAX_BASIC: u32 = 0xd;
/// Highest extended leaf shown.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// Sub-leaves kept of leaves 4 and 0xD.
const CACHE_SUBLEAVES: u32 = 8;

/// Family 15, model 107, stepping 1: what the baseline calls itself, as QEMU's own least processor does.
const BASELINE_SIGNATURE: u32 = 0x0006_0fb1;
/// Bits of a linear address: five-level paging is hidden.
const LINEAR_BITS: u32 = 48;
/// Most physical address bits of the baseline.
const BASELINE_PHYSICAL_BITS: u32 = 40;
/// Brand string of the baseline, three leaves of four words.
const BASELINE_BRAND: &[u8; 48] =
    b"Plinth baseline processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// How much of the host's processor a guest is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModelBase {
    /// All that Plinth virtualizes.
    #[default]
    Host,
    /// The same on every host of this vendor.
    Baseline,
}

/// The processor that a VM is given.
#[derive(Clone, Debug, Default)]
pub struct CpuModel {
    /// Where to start from.
    pub base: ModelBase,
    /// Features by name: shown (`true`) or hidden.
    pub features: Vec<(String, bool)>,
}

/// Names of the features that have a switch.
pub fn feature_names() -> impl Iterator<Item = &'static str> {
    SWITCHES.iter().map(|switch| switch.name)
}

/// Why a processor model cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelError {
    /// There is no such feature.
    Unknown(String),
    /// The host's processor lacks the feature.
    Missing(&'static str),
    /// A feature is asked for that needs another one that is not shown.
    Needs(&'static str, &'static str),
}

impl core::fmt::Display for ModelError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            ModelError::Unknown(name) => write!(f, "there is no processor feature {name:?}"),
            ModelError::Missing(name) => {
                write!(f, "this host's processor does not have the feature {name}")
            }
            ModelError::Needs(name, needed) => {
                write!(
                    f,
                    "the processor feature {name} needs {needed}, which is not shown"
                )
            }
        }
    }
}

/// Which bits of each feature word the model lets through, of those that Plinth virtualizes.
struct Shown {
    base: ModelBase,
    added: [u32; Word::COUNT],
    hidden: [u32; Word::COUNT],
}

impl Shown {
    /// # Errors
    /// An unknown feature, or one that the host or the model cannot give.
    fn new(host: HostCpuid<'_>, model: &CpuModel) -> Result<Self, ModelError> {
        let mut shown = Shown {
            base: model.base,
            added: [0; Word::COUNT],
            hidden: [0; Word::COUNT],
        };
        for (name, on) in &model.features {
            let switch = SWITCHES
                .iter()
                .find(|switch| switch.name == name)
                .ok_or_else(|| ModelError::Unknown(name.clone()))?;
            if *on && host_word(host, switch.word) & switch.bit == 0 {
                return Err(ModelError::Missing(switch.name));
            }
            let words = if *on {
                &mut shown.added
            } else {
                &mut shown.hidden
            };
            words[switch.word as usize] |= switch.bit;
        }
        // What needs a feature that is not shown goes with it, unless it was asked for.
        for switch in &SWITCHES {
            let lacks = |needed: &&str| {
                let needed = SWITCHES.iter().find(|other| other.name == *needed);
                needed.is_some_and(|needed| !shown.shows(host, needed))
            };
            if let Some(needed) = switch.needs.filter(lacks) {
                if shown.added[switch.word as usize] & switch.bit != 0 {
                    return Err(ModelError::Needs(switch.name, needed));
                }
                shown.hidden[switch.word as usize] |= switch.bit;
            }
        }
        Ok(shown)
    }

    fn shows(&self, host: HostCpuid<'_>, switch: &Switch) -> bool {
        host_word(host, switch.word) & self.mask(switch.word) & switch.bit != 0
    }

    /// The bits of a word that may be shown.
    fn mask(&self, word: Word) -> u32 {
        let base = match self.base {
            ModelBase::Host => u32::MAX,
            ModelBase::Baseline => baseline(word),
        };
        (base | self.added[word as usize]) & !self.hidden[word as usize] & word.virtualized()
    }
}

/// A feature word as the host has it; 0 where it has no such leaf.
fn host_word(host: HostCpuid<'_>, word: Word) -> u32 {
    let (leaf, subleaf) = match word {
        Word::Leaf1Ecx | Word::Leaf1Edx => (1, 0),
        Word::Leaf7Ebx | Word::Leaf7Ecx | Word::Leaf7Edx => (7, 0),
        Word::XsaveEax => (0xd, 1),
        Word::Ext1Ecx | Word::Ext1Edx => (EXTENDED_BASE + 1, 0),
    };
    let base = leaf & EXTENDED_BASE;
    if leaf > host(base, 0).eax {
        return 0;
    }
    let result = host(leaf, subleaf);
    match word {
        Word::Leaf1Ecx | Word::Leaf7Ecx | Word::Ext1Ecx => result.ecx,
        Word::Leaf1Edx | Word::Leaf7Edx | Word::Ext1Edx => result.edx,
        Word::Leaf7Ebx => result.ebx,
        Word::XsaveEax => result.eax,
    }
}

/// Whose processor it is: decides the layout of some leaves and which MSRs exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel" and those that follow it.
    Intel,
    /// "AuthenticAMD" and "HygonGenuine".
    Amd,
}

/// State of the asking vCPU that shows in CPUID.
#[derive(Clone, Copy, Debug)]
pub struct CpuidState {
    /// Local APIC ID.
    pub apic_id: u32,
    /// Whether IA32_APIC_BASE.EN is set.
    pub apic_enabled: bool,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
}

/// A VM's CPUID table.
#[derive(Clone, Debug)]
pub struct CpuidPolicy {
    vendor: Vendor,
    vcpus: u32,
    basic: Vec<CpuidResult>,
    cache: Vec<CpuidResult>,
    xsave: Vec<CpuidResult>,
    hypervisor: [CpuidResult; 2],
    /// Leaf 0x4000_0010: rates of TSC and APIC timer in kHz.
    rates: CpuidResult,
    extended: Vec<CpuidResult>,
    /// IA32_ARCH_CAPABILITIES, if the guest has it.
    arch_capabilities: Option<ArchCapabilities>,
    components: XsaveComponents,
}

impl CpuidPolicy {
    /// Computes the table of a VM with `vcpus` processors of this model. `stable_clock`: the
    /// paravirtual clock is the same on all of them.
    ///
    /// # Errors
    /// The model asks for a feature that cannot be had.
    pub fn new(
        host: HostCpuid<'_>,
        vcpus: u16,
        model: &CpuModel,
        stable_clock: bool,
    ) -> Result<Self, ModelError> {
        let shown = Shown::new(host, model)?;
        let vendor_leaf = host(0, 0);
        // "Auth" (AuthenticAMD) and "Hygo" (HygonGenuine) in EBX.
        let vendor = match &vendor_leaf.ebx.to_le_bytes() {
            b"Auth" | b"Hygo" => Vendor::Amd,
            _ => Vendor::Intel,
        };
        let vcpus = u32::from(vcpus.max(1));
        let max_basic = vendor_leaf.eax.min(MAX_BASIC);
        let mut paravirt = ParavirtFeatures::CLOCKSOURCE
            | ParavirtFeatures::NOP_IO_DELAY
            | ParavirtFeatures::CLOCKSOURCE2
            | ParavirtFeatures::STEAL_TIME
            | ParavirtFeatures::SEND_IPI;
        paravirt.set(ParavirtFeatures::CLOCKSOURCE_STABLE, stable_clock);
        let mut policy = CpuidPolicy {
            vendor,
            vcpus,
            basic: (0..=max_basic).map(|leaf| host(leaf, 0)).collect(),
            cache: Vec::new(),
            xsave: Vec::new(),
            hypervisor: [
                CpuidResult {
                    eax: HYPERVISOR_RATES,
                    ebx: u32::from_le_bytes(*b"KVMK"),
                    ecx: u32::from_le_bytes(*b"VMKV"),
                    edx: u32::from_le_bytes(*b"M\0\0\0"),
                },
                CpuidResult {
                    eax: paravirt.bits(),
                    ..CpuidResult::default()
                },
            ],
            rates: CpuidResult::default(),
            extended: Vec::new(),
            arch_capabilities: None,
            components: XsaveComponents::X87 | XsaveComponents::SSE,
        };
        policy.basic[0].eax = max_basic;
        policy.mask_basic(host, &shown);
        policy.compute_extended(host, &shown);
        Ok(policy)
    }

    fn mask_basic(&mut self, host: HostCpuid<'_>, shown: &Shown) {
        let is_baseline = shown.base == ModelBase::Baseline;
        for (leaf, entry) in (0u32..).zip(self.basic.iter_mut()) {
            match leaf {
                // Vendor, and cache descriptors (leaf 2), as the host has them.
                2 if is_baseline => *entry = CpuidResult::default(),
                0 | 2 => {}
                1 => {
                    if is_baseline {
                        entry.eax = BASELINE_SIGNATURE;
                    }
                    entry.ebx = (entry.ebx & 0x0000_ff00) | (self.vcpus.min(255) << 16);
                    entry.ecx = (entry.ecx & shown.mask(Word::Leaf1Ecx))
                        | (Leaf1Ecx::X2APIC | Leaf1Ecx::TSC_DEADLINE | Leaf1Ecx::HYPERVISOR).bits();
                    entry.edx = (entry.edx & shown.mask(Word::Leaf1Edx)) | Leaf1Edx::APIC.bits();
                    if self.vcpus > 1 {
                        entry.edx |= Leaf1Edx::HTT.bits();
                    } else {
                        entry.edx &= !Leaf1Edx::HTT.bits();
                    }
                }
                // EAX: ARAT, the APIC timer never stops.
                6 => {
                    *entry = CpuidResult {
                        eax: 1 << 2,
                        ..CpuidResult::default()
                    }
                }
                7 => {
                    entry.eax = 0;
                    entry.ebx =
                        (entry.ebx & shown.mask(Word::Leaf7Ebx)) | Leaf7Ebx::TSC_ADJUST.bits();
                    entry.ecx &= shown.mask(Word::Leaf7Ecx);
                    entry.edx &= shown.mask(Word::Leaf7Edx);
                }
                // 4, 0xB and 0xD are answered from their own tables.
                _ => *entry = CpuidResult::default(),
            }
        }
        let leaf1 = self.basic.get(1).copied().unwrap_or_default();
        let leaf7 = self.basic.get(7).copied().unwrap_or_default();
        if self.vendor == Vendor::Intel && self.basic.len() > 4 && !is_baseline {
            for subleaf in 0..CACHE_SUBLEAVES {
                let mut entry = host(4, subleaf);
                if entry.eax & 0x1f == 0 {
                    break;
                }
                // One thread per core: private caches below level 3, a shared one above.
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { self.vcpus - 1 } else { 0 };
                entry.eax =
                    (entry.eax & 0x3ff) | (sharing << 14) | ((self.vcpus - 1).min(63) << 26);
                self.cache.push(entry);
            }
        }
        let xsave = leaf1.ecx & Leaf1Ecx::XSAVE.bits() != 0 && self.basic.len() > 0xd;
        if !xsave {
            // Without XSAVE there is no way to keep AVX or PKRU state.
            self.basic[1].ecx &=
                !(Leaf1Ecx::XSAVE | Leaf1Ecx::AVX | Leaf1Ecx::FMA | Leaf1Ecx::F16C).bits();
            if let Some(leaf7) = self.basic.get_mut(7) {
                leaf7.ebx &= !Leaf7Ebx::AVX2.bits();
                leaf7.ecx &= !(Leaf7Ecx::PKU | Leaf7Ecx::VAES | Leaf7Ecx::VPCLMULQDQ).bits();
            }
            return;
        }
        if leaf1.ecx & Leaf1Ecx::AVX.bits() != 0 {
            self.components |= XsaveComponents::AVX;
        }
        if leaf7.ecx & Leaf7Ecx::PKU.bits() != 0 {
            self.components |= XsaveComponents::PKRU;
        }
        let main = host(0xd, 0);
        let supported =
            XsaveComponents::from_bits_truncate(u64::from(main.eax) | (u64::from(main.edx) << 32));
        self.components &= supported;
        self.xsave = (0..64)
            .map(|subleaf| match subleaf {
                0 => CpuidResult {
                    eax: self.components.bits() as u32,
                    ebx: 0,
                    ecx: 0,
                    edx: (self.components.bits() >> 32) as u32,
                },
                1 => CpuidResult {
                    eax: host(0xd, 1).eax & shown.mask(Word::XsaveEax),
                    ..CpuidResult::default()
                },
                n if self.components.bits() & (1 << n) != 0 => {
                    let entry = host(0xd, n);
                    CpuidResult {
                        ecx: entry.ecx & 2,
                        edx: 0,
                        ..entry
                    }
                }
                _ => CpuidResult::default(),
            })
            .collect();
        let maximum = self.xsave_bytes(self.components.bits(), false);
        self.xsave[0].ecx = maximum;
    }

    fn compute_extended(&mut self, host: HostCpuid<'_>, shown: &Shown) {
        let is_baseline = shown.base == ModelBase::Baseline;
        let max = host(EXTENDED_BASE, 0)
            .eax
            .clamp(EXTENDED_BASE, MAX_EXTENDED);
        let leaf1 = self.basic.get(1).copied().unwrap_or_default();
        self.extended = (EXTENDED_BASE..=max)
            .map(|leaf| {
                let mut entry = host(leaf, 0);
                match leaf & 0xffff {
                    0 => {
                        entry.eax = max;
                        if self.vendor == Vendor::Intel {
                            entry = CpuidResult {
                                eax: max,
                                ..CpuidResult::default()
                            };
                        }
                    }
                    1 => {
                        if is_baseline && self.vendor == Vendor::Amd {
                            (entry.eax, entry.ebx) = (BASELINE_SIGNATURE, 0);
                        }
                        entry.ecx &= shown.mask(Word::Ext1Ecx);
                        entry.edx &= shown.mask(Word::Ext1Edx);
                        if self.vendor == Vendor::Amd {
                            entry.edx |= leaf1.edx & AMD_SHARED_EDX;
                        } else {
                            entry.ebx = 0;
                        }
                    }
                    // EDX bit 8: the TSC is invariant, which the host's must be for that.
                    7 => {
                        entry = CpuidResult {
                            edx: entry.edx & (1 << 8),
                            ..CpuidResult::default()
                        }
                    }
                    8 => {
                        // EAX: physical, linear address bits. ECX (AMD): core count less one.
                        let mut physical = entry.eax & 0xff;
                        if is_baseline {
                            physical = physical.min(BASELINE_PHYSICAL_BITS);
                        }
                        entry.eax = physical | LINEAR_BITS << 8;
                        entry.ebx &= match (self.vendor, shown.base) {
                            (Vendor::Intel, _) => 0,
                            (Vendor::Amd, ModelBase::Host) => Ext8Ebx::all().bits(),
                            (Vendor::Amd, ModelBase::Baseline) => Ext8Ebx::MITIGATIONS.bits(),
                        };
                        entry.ecx = if self.vendor == Vendor::Amd {
                            self.vcpus - 1
                        } else {
                            0
                        };
                        entry.edx = 0;
                    }
                    number @ 2..=4 if is_baseline => {
                        let start = (number as usize - 2) * 16;
                        let word = |n: usize| {
                            let at = start + 4 * n;
                            let bytes = BASELINE_BRAND.get(at..at + 4);
                            bytes
                                .and_then(|bytes| bytes.try_into().ok())
                                .map_or(0, u32::from_le_bytes)
                        };
                        entry = CpuidResult {
                            eax: word(0),
                            ebx: word(1),
                            ecx: word(2),
                            edx: word(3),
                        };
                    }
                    5 | 6 if is_baseline => entry = CpuidResult::default(),
                    // Brand string and caches, as the host has them.
                    _ => {}
                }
                entry
            })
            .collect();
    }

    /// Bytes of the XSAVE area for these components, in standard or compacted format
    /// (SDM vol. 1, sections 13.4.2 and 13.4.3).
    fn xsave_bytes(&self, components: u64, compacted: bool) -> u32 {
        const LEGACY_AND_HEADER: u32 = 576;
        let mut end = LEGACY_AND_HEADER;
        for (n, entry) in self.xsave.iter().enumerate().skip(2) {
            if components & (1 << n) == 0 {
                continue;
            }
            end = if compacted {
                let start = if entry.ecx & 2 != 0 {
                    end.next_multiple_of(64)
                } else {
                    end
                };
                start.saturating_add(entry.eax)
            } else {
                end.max(entry.ebx.saturating_add(entry.eax))
            };
        }
        end
    }

    /// Tells a guest with Intel's processor what does not leak from it: what `host`, the host's IA32_ARCH_CAPABILITIES,
    /// says (0: the host has none), and what Plinth does about it.
    pub fn set_arch_capabilities(&mut self, host: u64) {
        const SHOWN: u32 = 1 << 29;
        if self.vendor != Vendor::Intel {
            return;
        }
        if let Some(leaf7) = self.basic.get_mut(7) {
            leaf7.edx |= SHOWN;
            let mut told = ArchCapabilities::from_bits_truncate(host);
            if !Leaf7Edx::from_bits_truncate(leaf7.edx).contains(Leaf7Edx::IBRS) {
                told -= ArchCapabilities::IBRS_ALL;
            }
            self.arch_capabilities = Some(told | ArchCapabilities::SKIP_L1DFL_VMENTRY);
        }
    }

    /// IA32_ARCH_CAPABILITIES, if the guest has it.
    pub fn arch_capabilities(&self) -> Option<u64> {
        self.arch_capabilities.map(|told| told.bits())
    }

    /// Tells the guest at which rates, in Hz, its TSC and the timer of its local APIC run.
    pub fn set_rates(&mut self, tsc_hz: u64, apic_timer_hz: u64) {
        let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(u32::MAX);
        self.rates = CpuidResult {
            eax: khz(tsc_hz),
            ebx: khz(apic_timer_hz),
            ..CpuidResult::default()
        };
    }

    /// The vendor whose processor this shows.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Whether the guest has XSAVES, and with it IA32_XSS.
    pub fn has_xsaves(&self) -> bool {
        self.xsave
            .get(1)
            .is_some_and(|leaf| leaf.eax & XsaveEax::XSAVES.bits() != 0)
    }

    /// State components that the guest may enable in XCR0.
    pub fn xsave_components(&self) -> XsaveComponents {
        self.components
    }

    /// CR4 bits that the guest may set: those whose feature it is shown (SDM vol. 3A, section 2.5).
    pub fn cr4_allowed(&self) -> u64 {
        let leaf1 = self.basic.get(1).copied().unwrap_or_default();
        let leaf7 = self.basic.get(7).copied().unwrap_or_default();
        let edx = Leaf1Edx::from_bits_truncate(leaf1.edx);
        let ecx = Leaf1Ecx::from_bits_truncate(leaf1.ecx);
        let ebx7 = Leaf7Ebx::from_bits_truncate(leaf7.ebx);
        let ecx7 = Leaf7Ecx::from_bits_truncate(leaf7.ecx);
        let bits = [
            (edx.contains(Leaf1Edx::VME), 0b11),
            (edx.contains(Leaf1Edx::TSC), 1 << 2),
            (edx.contains(Leaf1Edx::DE), 1 << 3),
            (edx.contains(Leaf1Edx::PSE), 1 << 4),
            (edx.contains(Leaf1Edx::PAE), 1 << 5),
            (edx.contains(Leaf1Edx::MCE), 1 << 6),
            (edx.contains(Leaf1Edx::PGE), 1 << 7),
            // PCE may be set though there is no PMU: RDPMC faults all the same.
            (true, 1 << 8),
            (edx.contains(Leaf1Edx::FXSR), 1 << 9),
            (edx.contains(Leaf1Edx::SSE), 1 << 10),
            (ecx7.contains(Leaf7Ecx::UMIP), 1 << 11),
            (ebx7.contains(Leaf7Ebx::FSGSBASE), 1 << 16),
            (ecx.contains(Leaf1Ecx::PCID), 1 << 17),
            (ecx.contains(Leaf1Ecx::XSAVE), 1 << 18),
            (ebx7.contains(Leaf7Ebx::SMEP), 1 << 20),
            (ebx7.contains(Leaf7Ebx::SMAP), 1 << 21),
            (ecx7.contains(Leaf7Ecx::PKU), 1 << 22),
        ];
        bits.iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, bit)| all | bit)
    }

    /// EFER bits that the guest may set (SDM vol. 4, IA32_EFER; APM vol. 2, section 3.1.7).
    pub fn efer_allowed(&self) -> u64 {
        let edx =
            Ext1Edx::from_bits_truncate(self.extended.get(1).copied().unwrap_or_default().edx);
        let bits = [
            (edx.contains(Ext1Edx::SYSCALL), 1),
            (edx.contains(Ext1Edx::LM), (1 << 8) | (1 << 10)),
            (edx.contains(Ext1Edx::NX), 1 << 11),
            (edx.contains(Ext1Edx::FFXSR), 1 << 14),
        ];
        bits.iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, bit)| all | bit)
    }

    /// Physical address bits of the guest (leaf 0x8000_0008).
    pub fn physical_bits(&self) -> u8 {
        self.extended
            .get(8)
            .map_or(36, |leaf| (leaf.eax & 0xff) as u8)
    }

    /// Whether RDTSCP or RDPID, and with them IA32_TSC_AUX, are shown.
    pub fn has_tsc_aux(&self) -> bool {
        let rdtscp = self
            .extended
            .get(1)
            .is_some_and(|l| l.edx & Ext1Edx::RDTSCP.bits() != 0);
        let rdpid = self
            .basic
            .get(7)
            .is_some_and(|l| l.ecx & Leaf7Ecx::RDPID.bits() != 0);
        rdtscp || rdpid
    }

    /// Whether IA32_SPEC_CTRL is shown.
    pub fn has_spec_ctrl(&self) -> bool {
        let edx7 = self.basic.get(7).map_or(0, |leaf| leaf.edx);
        let ebx8 = self.extended.get(8).map_or(0, |leaf| leaf.ebx);
        Leaf7Edx::from_bits_truncate(edx7)
            .intersects(Leaf7Edx::IBRS | Leaf7Edx::STIBP | Leaf7Edx::SSBD)
            || Ext8Ebx::from_bits_truncate(ebx8)
                .intersects(Ext8Ebx::IBRS | Ext8Ebx::STIBP | Ext8Ebx::SSBD)
    }

    /// Answers CPUID for a vCPU in `state`.
    pub fn get(&self, leaf: u32, subleaf: u32, state: CpuidState) -> CpuidResult {
        match leaf {
            0..EXTENDED_BASE if leaf & 0xff00_0000 != HYPERVISOR_BASE => {
                // A leaf beyond the highest basic one reads as the highest (SDM vol. 2A, CPUID);
                // AMD processors give zeros (APM vol. 3, CPUID).
                let highest = self.basic.len() as u32 - 1;
                if leaf > highest && self.vendor == Vendor::Amd {
                    return CpuidResult::default();
                }
                self.basic_leaf(leaf.min(highest), subleaf, state)
            }
            HYPERVISOR_BASE => self.hypervisor[0],
            0x4000_0001 => self.hypervisor[1],
            HYPERVISOR_RATES => self.rates,
            EXTENDED_BASE.. => {
                let entry = self.extended.get((leaf - EXTENDED_BASE) as usize);
                let mut entry = entry.copied().unwrap_or_default();
                if leaf == EXTENDED_BASE + 1 && self.vendor == Vendor::Amd && !state.apic_enabled {
                    entry.edx &= !Leaf1Edx::APIC.bits();
                }
                entry
            }
            _ => CpuidResult::default(),
        }
    }

    fn basic_leaf(&self, leaf: u32, subleaf: u32, state: CpuidState) -> CpuidResult {
        let mut entry = self.basic[leaf as usize];
        match leaf {
            1 => {
                entry.ebx |= state.apic_id << 24;
                if state.cr4 & (1 << 18) != 0 {
                    entry.ecx |= Leaf1Ecx::OSXSAVE.bits();
                } else {
                    entry.ecx &= !Leaf1Ecx::OSXSAVE.bits();
                }
                if !state.apic_enabled {
                    entry.edx &= !Leaf1Edx::APIC.bits();
                }
            }
            4 => {
                entry = self
                    .cache
                    .get(subleaf as usize)
                    .copied()
                    .unwrap_or_default()
            }
            7 if subleaf != 0 => entry = CpuidResult::default(),
            7 => {
                if state.cr4 & (1 << 22) != 0 {
                    entry.ecx |= Leaf7Ecx::OSPKE.bits();
                } else {
                    entry.ecx &= !Leaf7Ecx::OSPKE.bits();
                }
            }
            0xb => {
                // Level 0: one thread per core. Level 1: all cores in one package.
                let core_bits = self.vcpus.next_power_of_two().trailing_zeros();
                entry = match subleaf {
                    0 => CpuidResult {
                        eax: 0,
                        ebx: 1,
                        ecx: 1 << 8,
                        edx: state.apic_id,
                    },
                    1 => CpuidResult {
                        eax: core_bits,
                        ebx: self.vcpus,
                        ecx: (2 << 8) | 1,
                        edx: state.apic_id,
                    },
                    n => CpuidResult {
                        ecx: n & 0xff,
                        edx: state.apic_id,
                        ..Default::default()
                    },
                };
            }
            0xd => {
                entry = self
                    .xsave
                    .get(subleaf as usize)
                    .copied()
                    .unwrap_or_default();
                match subleaf {
                    0 if !self.xsave.is_empty() => entry.ebx = self.xsave_bytes(state.xcr0, false),
                    // XCR0 and IA32_XSS, which is 0 (SDM vol. 2A, CPUID, leaf 0DH).
                    1 if entry.eax & (XsaveEax::XSAVEC | XsaveEax::XSAVES).bits() != 0 => {
                        entry.ebx = self.xsave_bytes(state.xcr0, true);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        entry
    }
}

#[cfg(test)]
mod tests;
