//! The local APIC of the calling processor: x2APIC by MSR, or xAPIC by memory (SDM vol. 3A, chapter 12).
//!
//! One [`LocalApic`] value serves all processors, since each access reaches the APIC of the
//! processor that makes it. Interprocessor interrupts use physical destinations.

use bitfield_struct::bitfield;
use x86_64::registers::model_specific::Msr;

/// IA32_APIC_BASE.
const APIC_BASE: u32 = 0x1b;
/// First MSR of the x2APIC registers; register at memory offset `r` is MSR `0x800 + r / 16`.
const X2APIC_MSR: u32 = 0x800;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6e0;

/// Reads of the delivery status before an interrupt that does not leave is given up (xAPIC only).
const SEND_ATTEMPTS: u32 = 1_000_000;

/// IA32_APIC_BASE (SDM vol. 3A, figure 12-5).
#[bitfield(u64)]
pub struct ApicBase {
    #[bits(8)]
    __: u8,
    /// This is the bootstrap processor.
    pub bootstrap: bool,
    __: bool,
    /// x2APIC mode.
    pub x2apic: bool,
    /// The APIC is on.
    pub enabled: bool,
    /// Physical page of the registers, in xAPIC mode.
    #[bits(52)]
    pub page: u64,
}

/// Registers, by their offset in the xAPIC page (SDM vol. 3A, table 12-1).
#[derive(Clone, Copy)]
#[repr(u32)]
enum Register {
    Id = 0x20,
    TaskPriority = 0x80,
    Eoi = 0xb0,
    Spurious = 0xf0,
    ErrorStatus = 0x280,
    LvtMachineCheck = 0x2f0,
    CommandLow = 0x300,
    CommandHigh = 0x310,
    LvtTimer = 0x320,
    LvtThermal = 0x330,
    LvtPerformance = 0x340,
    LvtLint0 = 0x350,
    LvtLint1 = 0x360,
    LvtError = 0x370,
    InitialCount = 0x380,
    CurrentCount = 0x390,
    DivideConfiguration = 0x3e0,
    Version = 0x30,
}

/// How an interprocessor interrupt is delivered (SDM vol. 3A, section 12.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Delivery {
    Fixed = 0,
    Nmi = 4,
    Init = 5,
    StartUp = 6,
}

impl Delivery {
    const fn into_bits(self) -> u8 {
        self as u8
    }
    const fn from_bits(bits: u8) -> Self {
        match bits {
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            6 => Delivery::StartUp,
            _ => Delivery::Fixed,
        }
    }
}

/// The low half of the interrupt command register.
#[bitfield(u32)]
struct Command {
    vector: u8,
    #[bits(3)]
    delivery: Delivery,
    logical: bool,
    pending: bool,
    __: bool,
    assert: bool,
    level: bool,
    #[bits(2)]
    __: u8,
    #[bits(2)]
    shorthand: u8,
    #[bits(12)]
    __: u16,
}

/// Shorthand "all excluding self".
const ALL_BUT_SELF: u8 = 3;

/// How the timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum TimerMode {
    OneShot = 0,
    TscDeadline = 2,
}

impl TimerMode {
    const fn into_bits(self) -> u8 {
        self as u8
    }
    const fn from_bits(bits: u8) -> Self {
        match bits {
            2 => TimerMode::TscDeadline,
            _ => TimerMode::OneShot,
        }
    }
}

/// A local vector table entry, with the fields of the timer's (SDM vol. 3A, figure 12-8).
#[bitfield(u32)]
struct Lvt {
    vector: u8,
    #[bits(3)]
    delivery: Delivery,
    #[bits(5)]
    __: u8,
    masked: bool,
    #[bits(2)]
    timer_mode: TimerMode,
    #[bits(13)]
    __: u16,
}

/// The spurious-interrupt vector register.
#[bitfield(u32)]
struct Spurious {
    vector: u8,
    enabled: bool,
    #[bits(23)]
    __: u32,
}

/// Timer ticks once per bus clock (divide by 1).
const DIVIDE_BY_1: u32 = 0b1011;

/// How the registers are reached.
#[derive(Clone, Copy, Debug)]
enum Access {
    X2Apic,
    /// Virtual address of the register page, mapped uncached.
    XApic(*mut u32),
}

/// The local APIC of whichever processor calls.
#[derive(Clone, Copy, Debug)]
pub struct LocalApic {
    access: Access,
}

// SAFETY: the pointer is to a device page that stays mapped; each processor reaches its own registers through it.
unsafe impl Send for LocalApic {}
// SAFETY: as above.
unsafe impl Sync for LocalApic {}

/// Physical address of the calling processor's xAPIC registers.
pub fn base_address() -> u64 {
    // SAFETY: every processor with long mode has this MSR.
    ApicBase::from_bits(unsafe { Msr::new(APIC_BASE).read() }).page() << 12
}

impl LocalApic {
    /// Uses x2APIC mode.
    ///
    /// # Safety
    /// The processors must have it (CPUID.01H:ECX bit 21), and nobody else may drive the APICs.
    pub unsafe fn x2apic() -> Self {
        LocalApic {
            access: Access::X2Apic,
        }
    }

    /// Uses xAPIC mode.
    ///
    /// # Safety
    /// `registers` must be the uncached mapping, for ever, of the page at [`base_address`]; nobody else may drive the APICs.
    pub unsafe fn xapic(registers: *mut u32) -> Self {
        LocalApic {
            access: Access::XApic(registers),
        }
    }

    /// Whether this is x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        matches!(self.access, Access::X2Apic)
    }

    fn read(&self, register: Register) -> u32 {
        match self.access {
            // SAFETY: x2APIC mode is on, and `Register` lists registers that exist in it.
            Access::X2Apic => unsafe { Msr::new(X2APIC_MSR + register as u32 / 16).read() as u32 },
            // SAFETY: the page is mapped (constructor's contract) and the offset lies in it, 16-byte aligned.
            Access::XApic(page) => unsafe { page.byte_add(register as usize).read_volatile() },
        }
    }

    fn write(&self, register: Register, value: u32) {
        match self.access {
            // SAFETY: as in `read`; the callers write only defined bits.
            Access::X2Apic => unsafe {
                Msr::new(X2APIC_MSR + register as u32 / 16).write(u64::from(value));
            },
            // SAFETY: as in `read`.
            Access::XApic(page) => unsafe {
                page.byte_add(register as usize).write_volatile(value);
            },
        }
    }

    /// Turns the calling processor's APIC on: every local source masked but NMI on LINT1, all priorities accepted.
    pub fn enable(&self, spurious_vector: u8) {
        let mut msr = Msr::new(APIC_BASE);
        // SAFETY: every processor with long mode has this MSR.
        let base = ApicBase::from_bits(unsafe { msr.read() });
        let wanted = base
            .with_enabled(true)
            .with_x2apic(base.x2apic() || self.is_x2apic());
        if base.into_bits() != wanted.into_bits() {
            // From off the APIC must go through xAPIC mode (SDM vol. 3A, section 12.12.5).
            // SAFETY: both steps are legal transitions, and the caller of the constructor owns the APIC.
            unsafe {
                msr.write(base.with_enabled(true).into_bits());
                msr.write(wanted.into_bits());
            }
        }
        let masked = Lvt::new().with_masked(true).into_bits();
        let highest_lvt = self.read(Register::Version) >> 16 & 0xff;
        self.write(Register::LvtTimer, masked);
        self.write(Register::LvtLint0, masked);
        self.write(Register::LvtError, masked);
        for (index, register) in [
            (4, Register::LvtPerformance),
            (5, Register::LvtThermal),
            (6, Register::LvtMachineCheck),
        ] {
            if highest_lvt >= index {
                self.write(register, masked);
            }
        }
        self.write(
            Register::LvtLint1,
            Lvt::new().with_delivery(Delivery::Nmi).into_bits(),
        );
        self.write(Register::TaskPriority, 0);
        self.write(
            Register::Spurious,
            Spurious::new()
                .with_vector(spurious_vector)
                .with_enabled(true)
                .into_bits(),
        );
        self.write(Register::ErrorStatus, 0);
        self.write(Register::Eoi, 0);
    }

    /// APIC ID of the calling processor.
    pub fn id(&self) -> u32 {
        match self.access {
            Access::X2Apic => self.read(Register::Id),
            Access::XApic(_) => self.read(Register::Id) >> 24,
        }
    }

    /// Ends the interrupt in service.
    pub fn eoi(&self) {
        self.write(Register::Eoi, 0);
    }

    fn send(&self, destination: u32, command: Command) {
        match self.access {
            Access::X2Apic => {
                // An x2APIC write does not wait for earlier stores (SDM vol. 3A, section 12.12.3).
                // SAFETY: fences, then the interrupt command register with defined bits.
                unsafe {
                    core::arch::x86_64::_mm_mfence();
                    core::arch::x86_64::_mm_lfence();
                    Msr::new(X2APIC_MSR + Register::CommandLow as u32 / 16)
                        .write(u64::from(destination) << 32 | u64::from(command.into_bits()));
                }
            }
            Access::XApic(_) => {
                self.write(Register::CommandHigh, destination << 24);
                self.write(Register::CommandLow, command.into_bits());
                for _ in 0..SEND_ATTEMPTS {
                    if !Command::from_bits(self.read(Register::CommandLow)).pending() {
                        break;
                    }
                    core::hint::spin_loop();
                }
            }
        }
    }

    /// Sends an interrupt to the processor with this APIC ID.
    pub fn send_interrupt(&self, apic_id: u32, vector: u8) {
        self.send(
            apic_id,
            Command::new().with_vector(vector).with_assert(true),
        );
    }

    /// Sends INIT to the processor with this APIC ID: it waits for a start-up message from then on.
    pub fn send_init(&self, apic_id: u32) {
        self.send(
            apic_id,
            Command::new()
                .with_delivery(Delivery::Init)
                .with_assert(true),
        );
    }

    /// Sends a start-up message: the processor begins in real mode at physical `page * 4096`.
    pub fn send_startup(&self, apic_id: u32, page: u8) {
        self.send(
            apic_id,
            Command::new()
                .with_vector(page)
                .with_delivery(Delivery::StartUp)
                .with_assert(true),
        );
    }

    /// Sends NMI to all other processors.
    pub fn send_nmi_to_others(&self) {
        self.send(
            0,
            Command::new()
                .with_delivery(Delivery::Nmi)
                .with_assert(true)
                .with_shorthand(ALL_BUT_SELF),
        );
    }

    /// Lets the timer count down once per [`LocalApic::start_timer`], raising `vector`.
    pub fn use_one_shot_timer(&self, vector: u8) {
        self.write(Register::DivideConfiguration, DIVIDE_BY_1);
        self.write(
            Register::LvtTimer,
            Lvt::new()
                .with_vector(vector)
                .with_timer_mode(TimerMode::OneShot)
                .into_bits(),
        );
    }

    /// Lets the timer raise `vector` at the TSC given to [`LocalApic::set_deadline`].
    ///
    /// # Safety
    /// The processor must have TSC-deadline mode (CPUID.01H:ECX bit 24).
    pub unsafe fn use_deadline_timer(&self, vector: u8) {
        self.write(
            Register::LvtTimer,
            Lvt::new()
                .with_vector(vector)
                .with_timer_mode(TimerMode::TscDeadline)
                .into_bits(),
        );
        // The mode must be in force before the first deadline (SDM vol. 3A, section 12.5.4.1).
        // SAFETY: a fence.
        unsafe { core::arch::x86_64::_mm_mfence() };
    }

    /// One-shot mode: the interrupt comes after `ticks` timer ticks; 0 stops the timer.
    pub fn start_timer(&self, ticks: u32) {
        self.write(Register::InitialCount, ticks);
    }

    /// Timer ticks left in one-shot mode.
    pub fn timer_count(&self) -> u32 {
        self.read(Register::CurrentCount)
    }

    /// Deadline mode: the interrupt comes when the TSC reaches `tsc`; 0 disarms.
    ///
    /// # Safety
    /// [`LocalApic::use_deadline_timer`] was called on this processor.
    pub unsafe fn set_deadline(&self, tsc: u64) {
        // SAFETY: the MSR exists with deadline mode.
        unsafe { Msr::new(TSC_DEADLINE).write(tsc) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_manuals_encoding() {
        // INIT assert and start-up, as in SDM vol. 3A, section 9.4.4.1 (000C4500H, 000C46xxH use the shorthand "all but self").
        let init = Command::new()
            .with_delivery(Delivery::Init)
            .with_assert(true);
        assert_eq!(init.with_shorthand(ALL_BUT_SELF).into_bits(), 0x000c_4500);
        let startup = Command::new()
            .with_vector(0x9f)
            .with_delivery(Delivery::StartUp)
            .with_assert(true);
        assert_eq!(
            startup.with_shorthand(ALL_BUT_SELF).into_bits(),
            0x000c_469f
        );
    }

    #[test]
    fn local_vector_entries_have_the_manuals_encoding() {
        assert_eq!(Lvt::new().with_masked(true).into_bits(), 1 << 16);
        let timer = Lvt::new()
            .with_vector(0xe0)
            .with_timer_mode(TimerMode::TscDeadline);
        assert_eq!(timer.into_bits(), 2 << 17 | 0xe0);
        assert_eq!(
            Spurious::new()
                .with_vector(0xff)
                .with_enabled(true)
                .into_bits(),
            0x1ff
        );
        assert_eq!(ApicBase::from_bits(0xfee0_0900).page() << 12, 0xfee0_0000);
    }
}
