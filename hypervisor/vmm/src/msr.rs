//! Model-specific registers that a vCPU keeps in software, and what every MSR access gets.
//!
//! Three kinds: MSRs that the processor switches (`VirtualCpu::msr`), MSRs with a model here,
//! and all others, which fault with #GP(0) as on a processor that lacks them. A fixed few
//! read as a constant because operating systems read them without asking first.
//!
//! Source of numbers and layouts: SDM vol. 4; APM vol. 2, appendix A; AMD's PPRs.

/// Architectural and vendor MSR numbers used by the VMM.
#[expect(missing_docs, reason = "the names are the manuals'")]
pub mod number {
    pub const TSC: u32 = 0x10;
    /// Its number before [`KVM_WALL_CLOCK`], as CLOCKSOURCE in CPUID announces.
    pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
    /// Likewise of [`KVM_SYSTEM_TIME`].
    pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_PHYS_BASE0: u32 = 0x200;
    pub const MTRR_PHYS_LAST: u32 = MTRR_PHYS_BASE0 + 2 * super::VARIABLE_MTRRS as u32 - 1;
    pub const MTRR_FIX_64K: u32 = 0x250;
    pub const MTRR_FIX_16K_A: u32 = 0x258;
    pub const MTRR_FIX_16K_B: u32 = 0x259;
    pub const MTRR_FIX_4K_FIRST: u32 = 0x268;
    pub const MTRR_FIX_4K_LAST: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const XSS: u32 = 0xda0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
    pub const EFER: u32 = 0xc000_0080;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const SMI_COUNT: u32 = 0x34;
    pub const AMD_PERF_FIRST: u32 = 0xc001_0000;
    pub const AMD_PERF_LAST: u32 = 0xc001_0007;
    pub const AMD_SYSCFG: u32 = 0xc001_0010;
    pub const AMD_HWCR: u32 = 0xc001_0015;
    pub const AMD_TOP_MEM2: u32 = 0xc001_001d;
    pub const AMD_NB_CFG: u32 = 0xc001_001f;
    pub const AMD_PATCH_LOADER: u32 = 0xc001_0020;
    pub const AMD_INT_PENDING: u32 = 0xc001_0055;
    pub const AMD_TSEG_ADDR: u32 = 0xc001_0112;
    pub const AMD_TSEG_MASK: u32 = 0xc001_0113;
    pub const AMD_BU_CFG: u32 = 0xc001_1023;
    pub const AMD_DE_CFG: u32 = 0xc001_1029;
}

use number::*;

use crate::cpuid::{CpuidPolicy, Vendor};

/// Variable-range MTRR pairs shown.
pub const VARIABLE_MTRRS: usize = 8;

/// MTRRs of one vCPU. They are kept for the guest to read back; the memory type in effect
/// comes from the nested page tables and the guest's PAT.
#[derive(Clone, Debug)]
pub struct Mtrrs {
    variable: [u64; 2 * VARIABLE_MTRRS],
    fixed: [u64; 11],
    default_type: u64,
}

impl Default for Mtrrs {
    /// As PC firmware leaves them: enabled, write-back, with the area below 1 MiB's VGA hole and
    /// everything else left to the default type.
    fn default() -> Self {
        Mtrrs {
            variable: [0; 2 * VARIABLE_MTRRS],
            fixed: [0x0606_0606_0606_0606; 11],
            default_type: DEF_TYPE_ENABLE | u64::from(WRITE_BACK),
        }
    }
}

const WRITE_BACK: u8 = 6;
const DEF_TYPE_ENABLE: u64 = 1 << 11;
/// Type, FE and E.
const DEF_TYPE_BITS: u64 = 0xcff;
/// VCNT, FIX and WC.
const MTRR_CAPABILITIES: u64 = VARIABLE_MTRRS as u64 | (1 << 8) | (1 << 10);
/// IA32_MISC_ENABLE after reset: fast strings on; branch trace and PEBS unavailable.
pub const MISC_ENABLE_RESET: u64 = 1 | (1 << 11) | (1 << 12);
/// What a guest may change in it (SDM vol. 4, table 2-2): fast strings, automatic thermal control, performance
/// monitoring, SpeedStep and its lock, MONITOR, the limit of CPUID, xTPR messages, execute-disable. Kept to be read
/// back, without effect. AMD processors lack the register; systems read it there under other hypervisors.
pub const MISC_ENABLE_WRITABLE: u64 =
    1 | (1 << 3) | (1 << 7) | (1 << 16) | (1 << 18) | (1 << 20) | (1 << 22) | (1 << 23) | (1 << 34);

/// MSR_PLATFORM_INFO of a processor whose TSC runs at `tsc_hz` (SDM vol. 4, table 2-20): its ratio to the bus of
/// 100 MHz, 255 at most, and no other feature. AMD processors lack it; systems read it there, too, under other hypervisors.
pub fn platform_info(tsc_hz: u64) -> u64 {
    const BUS_HZ: u64 = 100_000_000;
    (tsc_hz / BUS_HZ).clamp(1, 255) << 8
}

/// Whether a byte is a memory type that MTRRs may hold (SDM vol. 3A, table 12-8).
fn valid_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

impl Mtrrs {
    fn fixed_index(msr: u32) -> Option<usize> {
        match msr {
            MTRR_FIX_64K => Some(0),
            MTRR_FIX_16K_A => Some(1),
            MTRR_FIX_16K_B => Some(2),
            MTRR_FIX_4K_FIRST..=MTRR_FIX_4K_LAST => Some(3 + (msr - MTRR_FIX_4K_FIRST) as usize),
            _ => None,
        }
    }

    /// Reads one; `None`: not an MTRR.
    pub fn read(&self, msr: u32) -> Option<u64> {
        match msr {
            MTRR_CAP => Some(MTRR_CAPABILITIES),
            MTRR_DEF_TYPE => Some(self.default_type),
            MTRR_PHYS_BASE0..=MTRR_PHYS_LAST => {
                Some(self.variable[(msr - MTRR_PHYS_BASE0) as usize])
            }
            _ => Self::fixed_index(msr).map(|n| self.fixed[n]),
        }
    }

    /// Writes one; `Some(false)`: reserved bits or a bad type, #GP. `None`: not a writable MTRR.
    pub fn write(&mut self, msr: u32, value: u64, physical_bits: u8) -> Option<bool> {
        let reserved_high = !0 << physical_bits.min(63);
        match msr {
            MTRR_DEF_TYPE => {
                let good = value & !DEF_TYPE_BITS == 0 && valid_type(value as u8);
                if good {
                    self.default_type = value;
                }
                Some(good)
            }
            MTRR_PHYS_BASE0..=MTRR_PHYS_LAST => {
                let is_mask = msr & 1 == 1;
                let good = value & reserved_high == 0
                    && if is_mask {
                        value & 0x7ff == 0
                    } else {
                        value & 0xf00 == 0 && valid_type(value as u8)
                    };
                if good {
                    self.variable[(msr - MTRR_PHYS_BASE0) as usize] = value;
                }
                Some(good)
            }
            _ => {
                let n = Self::fixed_index(msr)?;
                let good = value.to_le_bytes().into_iter().all(valid_type);
                if good {
                    self.fixed[n] = value;
                }
                Some(good)
            }
        }
    }
}

/// MSRs that read as a constant. Operating systems read these without a CPUID bit that
/// announces them; the constant is what a processor without the feature behind it shows.
pub fn constant(vendor: Vendor, msr: u32) -> Option<u64> {
    match (vendor, msr) {
        (_, MCG_CAP | MCG_STATUS) => Some(0),
        // Microcode revision: old enough to claim nothing.
        (_, BIOS_SIGN_ID) => Some(match vendor {
            Vendor::Intel => 1 << 32,
            Vendor::Amd => 0x0100_0065,
        }),
        (Vendor::Intel, PLATFORM_ID | SMI_COUNT) => Some(0),
        // Locked with VMX off.
        (Vendor::Intel, FEATURE_CONTROL) => Some(1),
        (
            Vendor::Amd,
            AMD_SYSCFG | AMD_HWCR | AMD_NB_CFG | AMD_TOP_MEM2 | AMD_INT_PENDING | AMD_TSEG_ADDR
            | AMD_TSEG_MASK | AMD_BU_CFG,
        ) => Some(0),
        // Event selectors and counters, which no CPUID bit announces: nothing is counted.
        (Vendor::Amd, AMD_PERF_FIRST..=AMD_PERF_LAST) => Some(0),
        // LFENCE is serializing.
        (Vendor::Amd, AMD_DE_CFG) => Some(1 << 1),
        _ => None,
    }
}

/// A register that CPUID announces and in which a guest can change nothing.
pub fn announced(cpuid: &CpuidPolicy, msr: u32) -> Option<u64> {
    match msr {
        XSS if cpuid.has_xsaves() => Some(0),
        ARCH_CAPABILITIES => cpuid.arch_capabilities(),
        _ => None,
    }
}

/// Whether a write to a register of [`announced`] is taken: what it holds already, where it is not read-only.
pub fn accepts(cpuid: &CpuidPolicy, msr: u32, value: u64) -> bool {
    msr == XSS && announced(cpuid, msr) == Some(value)
}

/// Whether a write to a constant MSR is taken and dropped; all others fault.
pub fn write_ignored(vendor: Vendor, msr: u32) -> bool {
    matches!(
        (vendor, msr),
        (_, MCG_STATUS | BIOS_SIGN_ID)
            | (
                Vendor::Amd,
                AMD_PERF_FIRST
                    ..=AMD_PERF_LAST
                        | AMD_SYSCFG
                        | AMD_HWCR
                        | AMD_NB_CFG
                        | AMD_PATCH_LOADER
                        | AMD_BU_CFG
                        | AMD_DE_CFG,
            )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtrrs_read_back_and_refuse_reserved_bits() {
        let mut m = Mtrrs::default();
        assert_eq!(m.write(0x200, 0x8000_0006, 40), Some(true));
        assert_eq!(m.read(0x200), Some(0x8000_0006));
        assert_eq!(m.write(0x200, 0x8000_0002, 40), Some(false), "type 2");
        assert_eq!(
            m.write(0x201, 1 << 40, 40),
            Some(false),
            "beyond the address width"
        );
        assert_eq!(m.write(MTRR_DEF_TYPE, 0x1006, 40), Some(false));
        assert_eq!(m.write(0x250, 0x0606_0606_0606_0607, 40), Some(false));
        assert_eq!(m.write(MTRR_CAP, 0, 40), None, "read-only");
        assert_eq!(m.read(0x210), None, "a ninth pair");
    }

    #[test]
    fn the_ratio_is_that_of_the_tsc() {
        assert_eq!(platform_info(2_899_999_999), 28 << 8);
        assert_eq!(platform_info(1_000), 1 << 8, "never zero");
        assert_eq!(platform_info(u64::MAX), 255 << 8);
    }

    #[test]
    fn vendor_msrs_fault_on_the_other_vendor() {
        assert_eq!(constant(Vendor::Intel, AMD_HWCR), None);
        assert_eq!(constant(Vendor::Amd, FEATURE_CONTROL), None);
        assert!(!write_ignored(Vendor::Intel, FEATURE_CONTROL));
        assert_eq!(constant(Vendor::Amd, AMD_PERF_FIRST + 4), Some(0));
        assert_eq!(constant(Vendor::Intel, AMD_PERF_FIRST), None);
    }
}
