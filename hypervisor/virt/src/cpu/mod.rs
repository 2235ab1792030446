//! Processor state that both backends switch by hand: FPU, debug registers, MSRs.
//!
//! VT-x and AMD-V switch most of a guest's state in hardware. What they leave out (FPU and
//! extended state, DR0-DR3 and DR6, the MSRs of SYSCALL, XCR0, SPEC_CTRL) is switched here,
//! only in `VirtualCpu::load` and `unload`: the hypervisor is compiled without SSE and uses
//! none of these registers, so a guest's values stay in the processor across its exits.
//!
//! Invariants: values that reach a privileged register are checked or masked here first,
//! so that no guest value can raise #GP in the host.
//!
//! Unsafe: reads and writes control registers, debug registers and MSRs.

mod debug;
mod fpu;
mod spec_ctrl;

use core::arch::asm;

pub use debug::GuestDebug;
pub use fpu::{FpuFeatures, GuestFpu};
pub use spec_ctrl::GuestSpecCtrl;

/// Model-specific registers that the backends touch (SDM vol. 4, chapter 2).
#[expect(missing_docs, reason = "the names are the manuals'")]
pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const PAT: u32 = 0x277;
    pub const XSS: u32 = 0xda0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// IA32_PAT after reset (SDM vol. 3A, section 12.12.4).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Reads a model-specific register.
///
/// # Safety
/// This processor must have the register (reading another raises #GP in the host), and
/// reading it must have no side effect.
#[inline]
pub unsafe fn rdmsr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller vouches for the register; RDMSR touches no memory.
    unsafe {
        asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high,
             options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// This processor must have the register and accept the value, and the value must not
/// break what the hypervisor relies on.
#[inline]
pub unsafe fn wrmsr(number: u32, value: u64) {
    // SAFETY: the caller vouches for register and value. Not `nomem`: a write may order memory.
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// The time-stamp counter.
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no side effect; CR4.TSD does not matter at privilege level 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Hands a machine check that came while a guest ran to the host's own handler, where it
/// would have gone a moment later.
#[cold]
pub fn raise_machine_check() {
    // SAFETY: INT enters the host's handler for the vector, which pushes no error code either way.
    unsafe { asm!("int 18") };
}

/// Whether a linear address is canonical for 48-bit addresses (SDM vol. 1, section 3.3.7.1).
#[inline]
pub const fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// Whether WRMSR of IA32_PAT takes this value: each byte one of the memory types
/// 0, 1, 4, 5, 6, 7 (SDM vol. 3A, table 12-10).
pub fn is_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|t| matches!(t, 0 | 1 | 4..=7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses() {
        for a in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(is_canonical(a));
        }
        for a in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert!(!is_canonical(a));
        }
    }

    #[test]
    fn pat_values() {
        assert!(is_pat(PAT_RESET));
        assert!(!is_pat(2) && !is_pat(3 << 8) && !is_pat(8 << 56));
    }
}
