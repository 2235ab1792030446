//! Register layouts and numbers of the local APIC (SDM vol. 3A, table 11-1 and 11-6).

use core::ops::RangeInclusive;

use bitfield_struct::bitfield;

use super::message::DeliveryMode;

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The MSRs of the x2APIC; all that are not registers fault.
pub const X2APIC_MSRS: RangeInclusive<u32> = 0x800..=0x8ff;
/// Guest-physical address of the xAPIC registers after reset.
pub const XAPIC_BASE: u64 = 0xfee0_0000;
/// Bytes of the xAPIC register page.
pub const XAPIC_LEN: u64 = 0x1000;

/// IA32_APIC_BASE (SDM vol. 3A, figure 11-5 and section 11.12.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ApicBase {
    __: u8,
    /// This is the bootstrap processor.
    pub bsp: bool,
    __: bool,
    /// EXTD: x2APIC mode.
    pub x2apic: bool,
    /// EN: the APIC is on.
    pub enabled: bool,
    /// Page number of the xAPIC registers.
    #[bits(52)]
    pub page: u64,
}

impl ApicBase {
    /// Guest-physical address of the xAPIC registers.
    pub const fn address(self) -> u64 {
        self.page() << 12
    }
}

/// A register by its number: MMIO offset / 16, or MSR number - 0x800.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Id,
    Version,
    Tpr,
    Apr,
    Ppr,
    Eoi,
    Rrd,
    Ldr,
    Dfr,
    Svr,
    /// In-service, word 0 to 7.
    Isr(u8),
    /// Trigger mode, word 0 to 7.
    Tmr(u8),
    /// Interrupt request, word 0 to 7.
    Irr(u8),
    Esr,
    IcrLow,
    IcrHigh,
    Lvt(LvtEntry),
    TimerInitial,
    TimerCurrent,
    TimerDivide,
    SelfIpi,
}

impl Register {
    pub(super) const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0x02 => Self::Id,
            0x03 => Self::Version,
            0x08 => Self::Tpr,
            0x09 => Self::Apr,
            0x0a => Self::Ppr,
            0x0b => Self::Eoi,
            0x0c => Self::Rrd,
            0x0d => Self::Ldr,
            0x0e => Self::Dfr,
            0x0f => Self::Svr,
            0x10..=0x17 => Self::Isr(number - 0x10),
            0x18..=0x1f => Self::Tmr(number - 0x18),
            0x20..=0x27 => Self::Irr(number - 0x20),
            0x28 => Self::Esr,
            0x30 => Self::IcrLow,
            0x31 => Self::IcrHigh,
            0x32 => Self::Lvt(LvtEntry::Timer),
            0x33 => Self::Lvt(LvtEntry::Thermal),
            0x34 => Self::Lvt(LvtEntry::Performance),
            0x35 => Self::Lvt(LvtEntry::Lint0),
            0x36 => Self::Lvt(LvtEntry::Lint1),
            0x37 => Self::Lvt(LvtEntry::Error),
            0x38 => Self::TimerInitial,
            0x39 => Self::TimerCurrent,
            0x3e => Self::TimerDivide,
            0x3f => Self::SelfIpi,
            _ => return None,
        })
    }
}

/// The local vector table's entries, in register order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum LvtEntry {
    Timer = 0,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl LvtEntry {
    pub(super) const COUNT: usize = 6;

    /// The bits that software may write (SDM vol. 3A, figure 11-8).
    pub(super) const fn writable(self, tsc_deadline: bool) -> Lvt {
        let base = Lvt::new().with_vector(0xff).with_masked(true);
        match self {
            Self::Timer if tsc_deadline => base.with_timer_mode_bits(3),
            Self::Timer => base.with_timer_mode_bits(1),
            Self::Thermal | Self::Performance => base.with_mode_bits(7),
            Self::Lint0 | Self::Lint1 => base
                .with_mode_bits(7)
                .with_active_low(true)
                .with_level(true),
            Self::Error => base,
        }
    }
}

/// A local vector table entry (SDM vol. 3A, figure 11-8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Lvt {
    pub vector: u8,
    #[bits(3)]
    pub mode_bits: u8,
    __: bool,
    pub delivery_pending: bool,
    pub active_low: bool,
    pub remote_irr: bool,
    pub level: bool,
    pub masked: bool,
    #[bits(2)]
    pub timer_mode_bits: u8,
    #[bits(13)]
    __: u16,
}

/// Timer mode (SDM vol. 3A, table 11-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Lvt {
    pub(super) const fn mode(self) -> DeliveryMode {
        DeliveryMode::from_bits(self.mode_bits())
    }

    pub(super) const fn timer_mode(self) -> TimerMode {
        match self.timer_mode_bits() {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            // 3 is reserved; hardware behaves as TSC-deadline.
            _ => TimerMode::TscDeadline,
        }
    }
}

/// Interrupt command register (SDM vol. 3A, figures 11-12 and 11-28).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub(super) struct Icr {
    pub vector: u8,
    #[bits(3)]
    pub mode_bits: u8,
    pub logical: bool,
    pub delivery_pending: bool,
    __: bool,
    pub assert: bool,
    pub level: bool,
    #[bits(2)]
    __: u8,
    #[bits(2)]
    pub shorthand_bits: u8,
    #[bits(12)]
    __: u16,
    pub destination: u32,
}

impl Icr {
    /// The bits that software may write, destination included.
    pub(super) const WRITABLE: Icr = Icr::new()
        .with_vector(0xff)
        .with_mode_bits(7)
        .with_logical(true)
        .with_assert(true)
        .with_level(true)
        .with_shorthand_bits(3)
        .with_destination(u32::MAX);

    pub(super) const fn shorthand(self) -> Shorthand {
        match self.shorthand_bits() {
            0 => Shorthand::None,
            1 => Shorthand::Sender,
            2 => Shorthand::All,
            _ => Shorthand::AllButSender,
        }
    }
}

/// Destination shorthand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shorthand {
    None,
    Sender,
    All,
    AllButSender,
}

/// Spurious-interrupt vector register (SDM vol. 3A, figure 11-23).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Svr {
    pub vector: u8,
    pub enabled: bool,
    /// Focus processor checking off; without effect.
    pub no_focus_check: bool,
    #[bits(2)]
    __: u8,
    pub suppress_eoi_broadcast: bool,
    #[bits(19)]
    __: u32,
}

impl Svr {
    pub(super) const WRITABLE: Svr = Svr::new()
        .with_vector(0xff)
        .with_enabled(true)
        .with_no_focus_check(true)
        .with_suppress_eoi_broadcast(true);
}

/// Version register (SDM vol. 3A, figure 11-7).
#[bitfield(u32)]
pub(super) struct Version {
    pub version: u8,
    __: u8,
    pub max_lvt: u8,
    pub eoi_suppression: bool,
    #[bits(7)]
    __: u8,
}

bitflags::bitflags! {
    /// Error status register (SDM vol. 3A, figure 11-9).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Errors: u32 {
        /// A message sent had a vector below 16.
        const SEND_ILLEGAL_VECTOR = 1 << 5;
        /// A message received, or an LVT entry's own, had a vector below 16.
        const RECEIVE_ILLEGAL_VECTOR = 1 << 6;
        /// A reserved register of the xAPIC page was accessed.
        const ILLEGAL_REGISTER = 1 << 7;
    }
}
