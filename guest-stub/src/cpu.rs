//! The processor's own instructions: CPUID, MSRs, control registers, ports, TSC.
//!
//! This guest owns its whole machine: no device is ever programmed for DMA and nothing else
//! runs, so a port access cannot reach Rust's memory and is a safe function here. Writes to
//! registers that can (paging, descriptor tables, most MSRs) are `unsafe`.

use core::arch::asm;
pub use core::arch::x86_64::CpuidResult;

use bitflags::bitflags;

/// Model-specific registers by their architectural names (SDM vol. 4, APM vol. 2 appendix A).
pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1B;
    pub const TSC_ADJUST: u32 = 0x3B;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const MTRR_CAP: u32 = 0xFE;
    pub const ARCH_CAPABILITIES: u32 = 0x10A;
    pub const FLUSH_CMD: u32 = 0x10B;
    pub const MCG_CAP: u32 = 0x179;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MTRR_PHYS_BASE0: u32 = 0x200;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    /// x2APIC registers start here: one MSR per 16 bytes of the xAPIC page.
    pub const X2APIC: u32 = 0x800;
    pub const XSS: u32 = 0xDA0;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
    /// AMD's SVM control; of no use to a guest that sees no SVM.
    pub const VM_CR: u32 = 0xC001_0114;
}

bitflags! {
    /// Extended feature enable register.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Efer: u64 {
        const SCE = 1 << 0;
        const LME = 1 << 8;
        const LMA = 1 << 10;
        const NXE = 1 << 11;
        const SVME = 1 << 12;
    }

    /// RFLAGS.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Rflags: u64 {
        const CF = 1 << 0;
        const FIXED = 1 << 1;
        const PF = 1 << 2;
        const AF = 1 << 4;
        const ZF = 1 << 6;
        const SF = 1 << 7;
        const TF = 1 << 8;
        const IF = 1 << 9;
        const DF = 1 << 10;
        const OF = 1 << 11;
        const RF = 1 << 16;
        const AC = 1 << 18;
        const ID = 1 << 21;
    }

    /// Control register 0, the bits used here.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Cr0: u64 {
        const MP = 1 << 1;
        const EM = 1 << 2;
        const TS = 1 << 3;
        const NE = 1 << 5;
        const WP = 1 << 16;
        const AM = 1 << 18;
    }

    /// Control register 4, the bits used here.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Cr4: u64 {
        const DE = 1 << 3;
        const PGE = 1 << 7;
        const OSFXSR = 1 << 9;
        const OSXMMEXCPT = 1 << 10;
        const FSGSBASE = 1 << 16;
        const OSXSAVE = 1 << 18;
    }

    /// Debug status register.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Dr6: u64 {
        const B0 = 1 << 0;
        const B1 = 1 << 1;
        const B2 = 1 << 2;
        const B3 = 1 << 3;
        const BD = 1 << 13;
        const BS = 1 << 14;
    }

    /// Error code of a page fault.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct PageFaultCode: u64 {
        const PRESENT = 1 << 0;
        const WRITE = 1 << 1;
        const USER = 1 << 2;
        const RESERVED = 1 << 3;
        const FETCH = 1 << 4;
    }

    /// CPUID leaf 1, ECX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Leaf1Ecx: u32 {
        const VMX = 1 << 5;
        const CX16 = 1 << 13;
        const SSE4_2 = 1 << 20;
        const X2APIC = 1 << 21;
        const MOVBE = 1 << 22;
        const POPCNT = 1 << 23;
        const TSC_DEADLINE = 1 << 24;
        const AES = 1 << 25;
        const XSAVE = 1 << 26;
        const OSXSAVE = 1 << 27;
        const AVX = 1 << 28;
        const RDRAND = 1 << 30;
        const HYPERVISOR = 1 << 31;
    }

    /// CPUID leaf 1, EDX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Leaf1Edx: u32 {
        const FPU = 1 << 0;
        const DE = 1 << 2;
        const TSC = 1 << 4;
        const MSR = 1 << 5;
        const PAE = 1 << 6;
        const CX8 = 1 << 8;
        const APIC = 1 << 9;
        const SEP = 1 << 11;
        const MTRR = 1 << 12;
        const PGE = 1 << 13;
        const CMOV = 1 << 15;
        const PAT = 1 << 16;
        const CLFLUSH = 1 << 19;
        const MMX = 1 << 23;
        const FXSR = 1 << 24;
        const SSE = 1 << 25;
        const SSE2 = 1 << 26;
    }

    /// CPUID leaf 7, EBX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Leaf7Ebx: u32 {
        const FSGSBASE = 1 << 0;
        const TSC_ADJUST = 1 << 1;
        const BMI1 = 1 << 3;
        const BMI2 = 1 << 8;
        const INVPCID = 1 << 10;
        const ADX = 1 << 19;
    }

    /// CPUID leaf 0x8000_0001, ECX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct ExtendedEcx: u32 {
        const SVM = 1 << 2;
        const LZCNT = 1 << 5;
    }

    /// CPUID leaf 0x8000_0001, EDX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct ExtendedEdx: u32 {
        const SYSCALL = 1 << 11;
        const NX = 1 << 20;
        const RDTSCP = 1 << 27;
        const LONG_MODE = 1 << 29;
    }
}

/// CPUID, one leaf and sub-leaf.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    core::arch::x86_64::__cpuid_count(leaf, subleaf)
}

/// Highest basic leaf.
pub fn max_basic_leaf() -> u32 {
    cpuid(0, 0).eax
}

/// Highest extended leaf, 0 when there are none.
pub fn max_extended_leaf() -> u32 {
    let max = cpuid(0x8000_0000, 0).eax;
    if max >= 0x8000_0000 { max } else { 0 }
}

/// Feature bits of leaf 1, ECX.
pub fn leaf1_ecx() -> Leaf1Ecx {
    Leaf1Ecx::from_bits_retain(cpuid(1, 0).ecx)
}

/// Feature bits of leaf 1, EDX.
pub fn leaf1_edx() -> Leaf1Edx {
    Leaf1Edx::from_bits_retain(cpuid(1, 0).edx)
}

/// Feature bits of leaf 7, EBX; none when there is no such leaf.
pub fn leaf7_ebx() -> Leaf7Ebx {
    let bits = if max_basic_leaf() >= 7 {
        cpuid(7, 0).ebx
    } else {
        0
    };
    Leaf7Ebx::from_bits_retain(bits)
}

/// Feature bits of leaf 0x8000_0001, ECX; none when there is no such leaf.
pub fn extended_ecx() -> ExtendedEcx {
    let bits = if max_extended_leaf() > 0x8000_0000 {
        cpuid(0x8000_0001, 0).ecx
    } else {
        0
    };
    ExtendedEcx::from_bits_retain(bits)
}

/// Feature bits of leaf 0x8000_0001, EDX; none when there is no such leaf.
pub fn extended_edx() -> ExtendedEdx {
    let bits = if max_extended_leaf() > 0x8000_0000 {
        cpuid(0x8000_0001, 0).edx
    } else {
        0
    };
    ExtendedEdx::from_bits_retain(bits)
}

/// The twelve bytes that a CPUID leaf spells in EBX, EDX, ECX (basic leaf 0).
pub fn vendor() -> [u8; 12] {
    let leaf = cpuid(0, 0);
    spell([leaf.ebx, leaf.edx, leaf.ecx])
}

/// The hypervisor's signature of the leaf group at `base`, in EBX, ECX, EDX.
pub fn hypervisor_signature(base: u32) -> [u8; 12] {
    let leaf = cpuid(base, 0);
    spell([leaf.ebx, leaf.ecx, leaf.edx])
}

fn spell(registers: [u32; 3]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for (chunk, register) in bytes.chunks_exact_mut(4).zip(registers) {
        chunk.copy_from_slice(&register.to_le_bytes());
    }
    bytes
}

/// Reads an MSR that is known to exist; see [`crate::probe_rdmsr`] for others.
pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes nothing that Rust relies on.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
///
/// The value must leave paging, descriptor tables and the mode that this program needs intact.
pub unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: the caller vouches for the value.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// The time-stamp counter, read in program order.
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: both instructions only read.
    unsafe {
        asm!("lfence", "rdtsc", out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub fn $read() -> u64 {
            let value: u64;
            // SAFETY: reading a control register changes nothing.
            unsafe {
                asm!(concat!("mov {}, ", $name), out(reg) value,
                    options(nomem, nostack, preserves_flags));
            }
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        ///
        /// # Safety
        ///
        /// The value must leave the mode and the mappings that this program needs intact.
        pub unsafe fn $write(value: u64) {
            // SAFETY: the caller vouches for the value.
            unsafe {
                asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack));
            }
        }
    };
}
control_register!(cr0, set_cr0, "cr0");
control_register!(cr3, set_cr3, "cr3");
control_register!(cr4, set_cr4, "cr4");
control_register!(cr8, set_cr8, "cr8");
control_register!(dr6, set_dr6, "dr6");
control_register!(dr7, set_dr7, "dr7");

/// Address of the first breakpoint.
pub fn dr0() -> u64 {
    let value: u64;
    // SAFETY: reading a debug register changes nothing.
    unsafe { asm!("mov {}, dr0", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Page-fault address.
pub fn cr2() -> u64 {
    let value: u64;
    // SAFETY: reading a control register changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// XCR0, which must be there (CR4.OSXSAVE set).
pub fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing; without OSXSAVE it is #UD, which is caught.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes XCR0. A value that the processor refuses is #GP, which is caught.
pub fn set_xcr0(value: u64) {
    // SAFETY: this program is compiled without SSE and AVX and keeps no state there.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nomem, nostack, preserves_flags));
    }
}

/// Turns interrupts on; the next instruction is still in the shadow.
pub fn sti() {
    // SAFETY: every vector has a gate.
    unsafe { asm!("sti", options(nostack)) };
}

/// Turns interrupts off.
pub fn cli() {
    // SAFETY: only delays interrupts.
    unsafe { asm!("cli", options(nostack)) };
}

/// Waits for an interrupt, then turns interrupts off again.
pub fn wait_for_interrupt() {
    // SAFETY: every vector has a gate.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Lets pending interrupts in for a moment.
pub fn take_interrupts() {
    // SAFETY: every vector has a gate.
    unsafe { asm!("sti", "nop", "nop", "cli", options(nostack)) };
}

/// Stops this processor for good.
pub fn halt_forever() -> ! {
    loop {
        // SAFETY: with interrupts off nothing but an NMI returns from HLT.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Drops one address from the TLB.
pub fn flush_page(address: u64) {
    // SAFETY: a flush only makes the processor look again.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Port I/O.
pub mod port {
    use core::arch::asm;

    macro_rules! port_width {
        ($read:ident, $write:ident, $type:ty, $register:tt) => {
            /// Reads a port.
            pub fn $read(port: u16) -> $type {
                let value: $type;
                // SAFETY: no device here reaches memory on its own (module text).
                unsafe {
                    asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value,
                        options(nomem, nostack, preserves_flags));
                }
                value
            }

            /// Writes a port.
            pub fn $write(port: u16, value: $type) {
                // SAFETY: no device here reaches memory on its own (module text).
                unsafe {
                    asm!(concat!("out dx, ", $register), in("dx") port, in($register) value,
                        options(nomem, nostack, preserves_flags));
                }
            }
        };
    }
    port_width!(read8, write8, u8, "al");
    port_width!(read16, write16, u16, "ax");
    port_width!(read32, write32, u32, "eax");
}
