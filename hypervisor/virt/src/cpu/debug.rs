//! DR0 to DR3 and DR6, which neither vendor switches.
//!
//! Unsafe: reads and writes debug registers.

use core::arch::asm;

/// DR0 to DR3 and DR6 of a guest while its vCPU is not loaded; DR7 is switched by the hardware.
///
/// The hypervisor itself sets no breakpoints, and both vendors clear DR7 on an exit, so a
/// guest's addresses may stay in the registers while the host runs.
///
/// Writing them serializes, and few guests use them. So while no vCPU is loaded they hold what they hold after reset
/// ([`GuestDebug::prepare`], [`GuestDebug::save`]), and `load` writes only what differs from that.
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

    /// Brings the registers of the calling pCPU into the state after reset, before a vCPU is loaded on it.
    pub fn prepare() {
        Self::new().write();
    }

    fn is_as_after_reset(&self) -> bool {
        let [dr0, dr1, dr2, dr3] = self.dr;
        dr0 | dr1 | dr2 | dr3 | (self.dr6 ^ Self::DR6_RESET) == 0
    }

    /// Puts the values into the registers, which are as after reset.
    pub fn load(&self) {
        if !self.is_as_after_reset() {
            self.write();
        }
    }

    /// Writes the registers.
    #[inline(never)]
    pub fn write(&self) {
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
    #[inline(always)]
    pub fn read() -> Self {
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

    /// Takes the values out of the registers, and leaves those as after reset.
    #[inline(always)]
    pub fn save(&mut self) {
        *self = Self::read();
        if !self.is_as_after_reset() {
            Self::new().write();
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
