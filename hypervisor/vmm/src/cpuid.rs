//! The CPU model: a computed set of CPUID leaves, never the host's own.
//!
//! A [`CpuidPolicy`] is computed once per VM from what the host's processor answers. Each
//! feature word is the host's masked by a list of what Plinth virtualizes, plus what it
//! emulates whatever the host has. A guest's CPUID is then a table look-up; only the few
//! fields that depend on the vCPU's state (APIC ID, OSXSAVE, XCR0) are filled in on the way.
//!
//! Source: SDM vol. 2A, CPUID; APM vol. 3, appendix E. The paravirtual leaves follow Linux'
//! Documentation/virt/kvm/x86/cpuid.rst.

use alloc::vec::Vec;

use bitflags::bitflags;

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

bitflags! {
    /// Leaf 1 ECX: what Plinth passes on from the host.
    #[derive(Clone, Copy, Debug)]
    struct Leaf1Ecx: u32 {
        const SSE3 = 1 << 0;
        const PCLMULQDQ = 1 << 1;
        const SSSE3 = 1 << 9;
        const FMA = 1 << 12;
        const CX16 = 1 << 13;
        const PCID = 1 << 17;
        const SSE4_1 = 1 << 19;
        const SSE4_2 = 1 << 20;
        const X2APIC = 1 << 21;
        const MOVBE = 1 << 22;
        const POPCNT = 1 << 23;
        const TSC_DEADLINE = 1 << 24;
        const AES = 1 << 25;
        const XSAVE = 1 << 26;
        const OSXSAVE = 1 << 27;
        const AVX = 1 << 28;
        const F16C = 1 << 29;
        const RDRAND = 1 << 30;
        const HYPERVISOR = 1 << 31;
    }

    /// Leaf 1 EDX.
    #[derive(Clone, Copy, Debug)]
    struct Leaf1Edx: u32 {
        const FPU = 1 << 0;
        const VME = 1 << 1;
        const DE = 1 << 2;
        const PSE = 1 << 3;
        const TSC = 1 << 4;
        const MSR = 1 << 5;
        const PAE = 1 << 6;
        const MCE = 1 << 7;
        const CX8 = 1 << 8;
        const APIC = 1 << 9;
        const SEP = 1 << 11;
        const MTRR = 1 << 12;
        const PGE = 1 << 13;
        const MCA = 1 << 14;
        const CMOV = 1 << 15;
        const PAT = 1 << 16;
        const PSE36 = 1 << 17;
        const CLFSH = 1 << 19;
        const MMX = 1 << 23;
        const FXSR = 1 << 24;
        const SSE = 1 << 25;
        const SSE2 = 1 << 26;
        const HTT = 1 << 28;
    }

    /// Leaf 7, sub-leaf 0, EBX.
    #[derive(Clone, Copy, Debug)]
    struct Leaf7Ebx: u32 {
        const FSGSBASE = 1 << 0;
        const TSC_ADJUST = 1 << 1;
        const BMI1 = 1 << 3;
        const AVX2 = 1 << 5;
        const SMEP = 1 << 7;
        const BMI2 = 1 << 8;
        const ERMS = 1 << 9;
        const INVPCID = 1 << 10;
        const RDSEED = 1 << 18;
        const ADX = 1 << 19;
        const SMAP = 1 << 20;
        const CLFLUSHOPT = 1 << 23;
        const CLWB = 1 << 24;
        const SHA = 1 << 29;
    }

    /// Leaf 7, sub-leaf 0, ECX.
    #[derive(Clone, Copy, Debug)]
    struct Leaf7Ecx: u32 {
        const UMIP = 1 << 2;
        const PKU = 1 << 3;
        const OSPKE = 1 << 4;
        const VAES = 1 << 9;
        const VPCLMULQDQ = 1 << 10;
        const RDPID = 1 << 22;
    }

    /// Leaf 7, sub-leaf 0, EDX.
    #[derive(Clone, Copy, Debug)]
    struct Leaf7Edx: u32 {
        const FSRM = 1 << 4;
        const MD_CLEAR = 1 << 10;
        const SERIALIZE = 1 << 14;
    }

    /// Leaf 0xD, sub-leaf 1, EAX. XSAVES is left out: no guest state lives in IA32_XSS.
    #[derive(Clone, Copy, Debug)]
    struct XsaveEax: u32 {
        const XSAVEOPT = 1 << 0;
        const XSAVEC = 1 << 1;
        const XGETBV1 = 1 << 2;
    }

    /// Leaf 0x8000_0001 ECX.
    #[derive(Clone, Copy, Debug)]
    struct Ext1Ecx: u32 {
        const LAHF_SAHF = 1 << 0;
        const CR8_LEGACY = 1 << 4;
        const ABM = 1 << 5;
        const SSE4A = 1 << 6;
        const MISALIGN_SSE = 1 << 7;
        const PREFETCHW = 1 << 8;
    }

    /// Leaf 0x8000_0001 EDX.
    #[derive(Clone, Copy, Debug)]
    struct Ext1Edx: u32 {
        const SYSCALL = 1 << 11;
        const NX = 1 << 20;
        const MMXEXT = 1 << 22;
        const FFXSR = 1 << 25;
        const PAGE_1G = 1 << 26;
        const RDTSCP = 1 << 27;
        const LM = 1 << 29;
    }

    /// State components that a guest may enable in XCR0 (SDM vol. 1, section 13.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct XsaveComponents: u64 {
        /// x87 state.
        const X87 = 1 << 0;
        /// XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// Upper halves of the YMM registers.
        const AVX = 1 << 2;
        /// PKRU.
        const PKRU = 1 << 9;
    }

    /// Leaf 0x4000_0001 EAX: the paravirtual features of Linux' KVM interface that Plinth offers.
    #[derive(Clone, Copy, Debug)]
    struct ParavirtFeatures: u32 {
        const NOP_IO_DELAY = 1 << 1;
        const CLOCKSOURCE2 = 1 << 3;
        const CLOCKSOURCE_STABLE = 1 << 24;
    }
}

/// Bits of leaf 1 EDX that also stand in leaf 0x8000_0001 EDX on AMD processors.
const AMD_SHARED_EDX: u32 = 0x0183_f3ff;
/// First leaf of the hypervisor range.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// First leaf of the extended range.
const EXTENDED_BASE: u32 = 0x8000_0000;
/// Highest basic leaf shown.
const MAX_BASIC: u32 = 0xd;
/// Highest extended leaf shown.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// Sub-leaves kept of leaves 4 and 0xD.
const CACHE_SUBLEAVES: u32 = 8;

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
    extended: Vec<CpuidResult>,
    components: XsaveComponents,
}

impl CpuidPolicy {
    /// Computes the table of a VM with `vcpus` processors.
    pub fn new(host: HostCpuid<'_>, vcpus: u16) -> Self {
        let vendor_leaf = host(0, 0);
        // "Auth" (AuthenticAMD) and "Hygo" (HygonGenuine) in EBX.
        let vendor = match &vendor_leaf.ebx.to_le_bytes() {
            b"Auth" | b"Hygo" => Vendor::Amd,
            _ => Vendor::Intel,
        };
        let vcpus = u32::from(vcpus.max(1));
        let max_basic = vendor_leaf.eax.min(MAX_BASIC);
        let mut policy = CpuidPolicy {
            vendor,
            vcpus,
            basic: (0..=max_basic).map(|leaf| host(leaf, 0)).collect(),
            cache: Vec::new(),
            xsave: Vec::new(),
            hypervisor: [
                CpuidResult {
                    eax: HYPERVISOR_BASE + 1,
                    ebx: u32::from_le_bytes(*b"KVMK"),
                    ecx: u32::from_le_bytes(*b"VMKV"),
                    edx: u32::from_le_bytes(*b"M\0\0\0"),
                },
                CpuidResult {
                    eax: (ParavirtFeatures::NOP_IO_DELAY
                        | ParavirtFeatures::CLOCKSOURCE2
                        | ParavirtFeatures::CLOCKSOURCE_STABLE)
                        .bits(),
                    ..CpuidResult::default()
                },
            ],
            extended: Vec::new(),
            components: XsaveComponents::X87 | XsaveComponents::SSE,
        };
        policy.basic[0].eax = max_basic;
        policy.mask_basic(host);
        policy.compute_extended(host);
        policy
    }

    fn mask_basic(&mut self, host: HostCpuid<'_>) {
        for (leaf, entry) in (0u32..).zip(self.basic.iter_mut()) {
            match leaf {
                // Vendor, and cache descriptors (leaf 2), as the host has them.
                0 | 2 => {}
                1 => {
                    entry.ebx = (entry.ebx & 0x0000_ff00) | (self.vcpus.min(255) << 16);
                    entry.ecx = (entry.ecx & Leaf1Ecx::all().bits())
                        | (Leaf1Ecx::X2APIC | Leaf1Ecx::TSC_DEADLINE | Leaf1Ecx::HYPERVISOR).bits();
                    entry.edx = (entry.edx & Leaf1Edx::all().bits()) | Leaf1Edx::APIC.bits();
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
                    entry.ebx = (entry.ebx & Leaf7Ebx::all().bits()) | Leaf7Ebx::TSC_ADJUST.bits();
                    entry.ecx &= Leaf7Ecx::all().bits();
                    entry.edx &= Leaf7Edx::all().bits();
                }
                // 4, 0xB and 0xD are answered from their own tables.
                _ => *entry = CpuidResult::default(),
            }
        }
        let leaf1 = self.basic.get(1).copied().unwrap_or_default();
        let leaf7 = self.basic.get(7).copied().unwrap_or_default();
        if self.vendor == Vendor::Intel && self.basic.len() > 4 {
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
                    eax: host(0xd, 1).eax & XsaveEax::all().bits(),
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

    fn compute_extended(&mut self, host: HostCpuid<'_>) {
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
                        entry.ecx &= Ext1Ecx::all().bits();
                        entry.edx &= Ext1Edx::all().bits();
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
                        entry.eax &= 0xffff;
                        entry.ebx = 0;
                        entry.ecx = if self.vendor == Vendor::Amd {
                            self.vcpus - 1
                        } else {
                            0
                        };
                        entry.edx = 0;
                    }
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

    /// The vendor whose processor this shows.
    pub fn vendor(&self) -> Vendor {
        self.vendor
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
                    1 if entry.eax & XsaveEax::XSAVEC.bits() != 0 => {
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
mod tests {
    use super::*;

    /// A host that has every feature bit set, so that only the policy decides.
    fn all_ones(vendor: &[u8; 12], leaf: u32, subleaf: u32) -> CpuidResult {
        let word = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
        match (leaf, subleaf) {
            (0, _) => CpuidResult {
                eax: 0x20,
                ebx: word(0),
                ecx: word(8),
                edx: word(4),
            },
            (0x8000_0000, _) => CpuidResult {
                eax: 0x8000_0021,
                ..Default::default()
            },
            (0x8000_0008, _) => CpuidResult {
                eax: 0x3028,
                ..Default::default()
            },
            (0xd, 2) => CpuidResult {
                eax: 256,
                ebx: 576,
                ..Default::default()
            },
            (0xd, 9) => CpuidResult {
                eax: 8,
                ebx: 2688,
                ..Default::default()
            },
            _ => CpuidResult {
                eax: !0,
                ebx: !0,
                ecx: !0,
                edx: !0,
            },
        }
    }

    const STATE: CpuidState = CpuidState {
        apic_id: 3,
        apic_enabled: true,
        cr4: 0,
        xcr0: 1,
    };

    fn policy(vendor: &'static [u8; 12], vcpus: u16) -> CpuidPolicy {
        CpuidPolicy::new(&|l, s| all_ones(vendor, l, s), vcpus)
    }

    #[test]
    fn virtualization_and_unbacked_features_are_hidden() {
        for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
            let p = policy(vendor, 1);
            let leaf1 = p.get(1, 0, STATE);
            assert_eq!(leaf1.ecx & (1 << 5), 0, "VMX");
            assert_eq!(leaf1.ecx & (1 << 3), 0, "MONITOR");
            assert_ne!(leaf1.ecx & (1 << 31), 0, "hypervisor");
            assert_eq!(p.get(0x8000_0001, 0, STATE).ecx & (1 << 2), 0, "SVM");
            assert_eq!(p.get(7, 0, STATE).ebx & (1 << 16), 0, "AVX-512F");
            assert_eq!(p.get(0xd, 1, STATE).eax & (1 << 3), 0, "XSAVES");
            assert_eq!(p.get(0xa, 0, STATE), CpuidResult::default(), "PMU");
        }
    }

    #[test]
    fn dynamic_fields_follow_the_vcpu() {
        let p = policy(b"GenuineIntel", 4);
        let on = CpuidState {
            cr4: 1 << 18,
            ..STATE
        };
        assert_eq!(p.get(1, 0, STATE).ecx & (1 << 27), 0);
        assert_ne!(p.get(1, 0, on).ecx & (1 << 27), 0);
        assert_eq!(p.get(1, 0, STATE).ebx >> 24, 3);
        assert_eq!(p.get(1, 0, STATE).ebx >> 16 & 0xff, 4);
        assert_eq!(p.get(0xb, 1, STATE).ebx, 4);
        assert_eq!(p.get(0xb, 1, STATE).eax, 2);
        let off = CpuidState {
            apic_enabled: false,
            ..STATE
        };
        assert_eq!(p.get(1, 0, off).edx & (1 << 9), 0);
    }

    #[test]
    fn xsave_sizes_follow_xcr0() {
        let p = policy(b"GenuineIntel", 1);
        assert_eq!(p.get(0xd, 0, STATE).ebx, 576);
        assert_eq!(p.get(0xd, 0, CpuidState { xcr0: 7, ..STATE }).ebx, 832);
        assert_eq!(p.get(0xd, 0, STATE).ecx, 2696);
        assert_eq!(p.xsave_components().bits(), 0x207);
    }

    #[test]
    fn out_of_range_leaves_follow_the_vendor() {
        let intel = policy(b"GenuineIntel", 1);
        assert_eq!(intel.get(0x1234, 0, STATE), intel.get(0xd, 0, STATE));
        let amd = policy(b"AuthenticAMD", 1);
        assert_eq!(amd.get(0x1234, 0, STATE), CpuidResult::default());
        assert_eq!(amd.get(0x8000_1234, 0, STATE), CpuidResult::default());
    }

    #[test]
    fn paravirtual_signature_is_linux_own() {
        let p = policy(b"AuthenticAMD", 1);
        let s = p.get(0x4000_0000, 0, STATE);
        assert_eq!(s.ebx.to_le_bytes(), *b"KVMK");
        assert_ne!(p.get(0x4000_0001, 0, STATE).eax & (1 << 3), 0);
    }
}
