//! The chip set that PC firmware knows: Intel's 440FX with PIIX3 and PIIX4.
//!
//! Firmware does not ask ACPI what the machine is; it recognises the host bridge and knows from
//! its number where everything else is and how it is set up. A VM that boots firmware has
//! this chip set, at the places that a PC has it: host bridge 00:00.0, ISA bridge 00:01.0, power
//! management 00:01.3. Its subsystem numbers are those by which firmware tells a virtual machine
//! from an old PC, and looks for `fw_cfg`.
//!
//! There is no system management mode, so what belongs to it reads as already set up.

mod i440fx;
mod piix;

pub use i440fx::{I440Fx, SHADOW, SHADOW_SEGMENTS};
pub use piix::{IsaBridge, MOVED_PM_BASE, PciInterruptRouter, PmAlias, PowerFunction};

use bitflags::bitflags;

/// Subsystem numbers of virtual hardware, as firmware expects them.
const SUBSYSTEM_VENDOR: u16 = 0x1af4;
const SUBSYSTEM: u16 = 0x1100;

bitflags! {
    /// What the chip set sends to the RAM behind the ROM, not to the ROM: the bits of a PAM register's half.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ShadowAccess: u8 {
        /// Reads.
        const READ = 1 << 0;
        /// Writes; else they go nowhere.
        const WRITE = 1 << 1;
    }
}

/// Shadow RAM, as far as the chip set governs it.
pub trait ShadowControl: Send + Sync {
    /// From now on the guest meets RAM in segment `number` of [`SHADOW_SEGMENTS`] as `access` says. Called with the
    /// host bridge's lock held.
    fn set_access(&self, number: usize, access: ShadowAccess);
}
