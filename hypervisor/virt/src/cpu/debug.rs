//! DR0 to DR3 and DR6, which neither vendor switches.
//!
//! Unsafe: reads and writes debug registers.

use core::arch::asm;

/// DR0 to DR3 and DR6 of a guest while its vCPU is not loaded; DR7 is switched by the hardware.
///
/// The hypervisor itself sets no breakpoints, and both vendors clear DR7 on an exit, so a
/// guest's addresses may stay in the registers while the host runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestDebug {
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
}

impl GuestDebug {
    /// DR6 after reset: also its bits that always read as one (SDM vol. 3B, section 18.2.3).
    pub const DR6_RESET: u64 = 0xffff_0ff0;

    /// State after reset.
    pub const fn new() -> Self {
        GuestDebug {
            dr: [0; 4],
            dr6: Self::DR6_RESET,
        }
    }

    /// Puts the values into the registers.
    pub fn load(&self) {
        let [dr0, dr1, dr2, dr3] = self.dr;
        // SAFETY: breakpoints are off while the host runs (DR7), so any address is harmless.
        // DR0-DR3 take any value; the upper half of DR6 is cleared as MOV to DR6 demands.
        unsafe {
            asm!("mov dr0, {}", in(reg) dr0, options(nomem, nostack, preserves_flags));
            asm!("mov dr1, {}", in(reg) dr1, options(nomem, nostack, preserves_flags));
            asm!("mov dr2, {}", in(reg) dr2, options(nomem, nostack, preserves_flags));
            asm!("mov dr3, {}", in(reg) dr3, options(nomem, nostack, preserves_flags));
        }
        Self::write_dr6(self.dr6);
    }

    /// Reads the registers.
    pub fn save() -> Self {
        let (dr0, dr1, dr2, dr3): (u64, u64, u64, u64);
        // SAFETY: reading debug registers at privilege level 0 has no side effect; DR7.GD is
        // clear while the host runs.
        unsafe {
            asm!("mov {}, dr0", out(reg) dr0, options(nomem, nostack, preserves_flags));
            asm!("mov {}, dr1", out(reg) dr1, options(nomem, nostack, preserves_flags));
            asm!("mov {}, dr2", out(reg) dr2, options(nomem, nostack, preserves_flags));
            asm!("mov {}, dr3", out(reg) dr3, options(nomem, nostack, preserves_flags));
        }
        GuestDebug {
            dr: [dr0, dr1, dr2, dr3],
            dr6: Self::read_dr6(),
        }
    }

    /// The DR6 register.
    pub fn read_dr6() -> u64 {
        x86_64::registers::debug::Dr6::read_raw()
    }

    /// Writes the DR6 register; bits 63:32 are dropped.
    pub fn write_dr6(value: u64) {
        // SAFETY: DR6 only reports; its upper half is cleared as the instruction demands.
        unsafe {
            asm!("mov dr6, {}", in(reg) value & 0xffff_ffff, options(nomem, nostack, preserves_flags));
        }
    }
}

impl Default for GuestDebug {
    fn default() -> Self {
        Self::new()
    }
}
