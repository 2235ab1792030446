//! Interrupt controllers: local APIC (xAPIC and x2APIC), IOAPIC, and the two 8259 PICs.

use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bitflags::bitflags;

use crate::cpu::{self, msr, port};

/// Where the local APIC's registers are after reset, and where this program leaves them.
pub const LOCAL_APIC_ADDRESS: u64 = 0xFEE0_0000;

bitflags! {
    /// IA32_APIC_BASE.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct ApicBase: u64 {
        const BSP = 1 << 8;
        const EXTD = 1 << 10;
        const ENABLE = 1 << 11;
    }
}

/// Registers of the local APIC, by their offset in the xAPIC page (SDM vol. 3, table 12-1).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Register {
    Id = 0x20,
    Version = 0x30,
    TaskPriority = 0x80,
    ProcessorPriority = 0xA0,
    EndOfInterrupt = 0xB0,
    LogicalDestination = 0xD0,
    DestinationFormat = 0xE0,
    Spurious = 0xF0,
    InService = 0x100,
    TriggerMode = 0x180,
    Request = 0x200,
    ErrorStatus = 0x280,
    Command = 0x300,
    CommandHigh = 0x310,
    Timer = 0x320,
    Lint0 = 0x350,
    Lint1 = 0x360,
    Error = 0x370,
    InitialCount = 0x380,
    CurrentCount = 0x390,
    Divide = 0x3E0,
}

/// LVT and RTE: the entry delivers nothing.
pub const MASKED: u32 = 1 << 16;
/// LVT timer: reload after expiry.
pub const PERIODIC: u32 = 1 << 17;
/// LVT timer: expire when the TSC reaches IA32_TSC_DEADLINE.
pub const DEADLINE: u32 = 2 << 17;
/// Divide configuration: by 1.
pub const DIVIDE_BY_1: u32 = 0b1011;
/// Spurious vector register: APIC on.
pub const SOFTWARE_ENABLE: u32 = 1 << 8;
/// ICR: to this processor, fixed delivery.
pub const SELF_SHORTHAND: u32 = 1 << 18;
/// ICR: non-maskable interrupt.
pub const DELIVER_NMI: u32 = 4 << 8;
/// ICR: assert; needed by all but INIT de-assert.
pub const ASSERT: u32 = 1 << 14;
/// ICR: not yet delivered.
pub const PENDING: u32 = 1 << 12;
/// Vector for interrupts that went away before they were taken.
pub const SPURIOUS_VECTOR: u8 = 0xFF;

static X2APIC_MODE: AtomicBool = AtomicBool::new(false);

/// This processor's local APIC, in whichever mode it is.
#[derive(Clone, Copy)]
pub struct LocalApic {
    x2apic: bool,
}

/// The local APIC, in the mode last set by [`LocalApic::enter_x2apic`] and [`LocalApic::enter_xapic`].
pub fn local() -> LocalApic {
    LocalApic {
        x2apic: X2APIC_MODE.load(Relaxed),
    }
}

impl LocalApic {
    /// Reads a register. In x2APIC mode a register that it lacks is #GP.
    pub fn read(self, register: Register) -> u32 {
        self.read_at(register as u16)
    }

    /// Reads the register at an xAPIC offset.
    pub fn read_at(self, offset: u16) -> u32 {
        if self.x2apic {
            cpu::rdmsr(msr::X2APIC + u32::from(offset >> 4)) as u32
        } else {
            // SAFETY: the page is mapped and holds nothing but the APIC's registers.
            unsafe { ptr::read_volatile(self.address_at(offset)) }
        }
    }

    /// Writes a register.
    pub fn write(self, register: Register, value: u32) {
        if self.x2apic {
            // SAFETY: APIC registers reach no memory.
            unsafe { cpu::wrmsr(msr::X2APIC + u32::from(register as u16 >> 4), value.into()) };
        } else {
            // SAFETY: the page is mapped and holds nothing but the APIC's registers.
            unsafe { ptr::write_volatile(self.address_at(register as u16), value) };
        }
    }

    /// The xAPIC address of a register.
    pub fn address(self, register: Register) -> *mut u32 {
        self.address_at(register as u16)
    }

    fn address_at(self, offset: u16) -> *mut u32 {
        ptr::with_exposed_provenance_mut((LOCAL_APIC_ADDRESS + u64::from(offset)) as usize)
    }

    /// This processor's APIC id.
    pub fn id(self) -> u32 {
        let id = self.read(Register::Id);
        if self.x2apic { id } else { id >> 24 }
    }

    /// Ends the interrupt in service with the highest priority.
    pub fn end_of_interrupt(self) {
        self.write(Register::EndOfInterrupt, 0);
    }

    /// Sends a fixed interrupt to this processor by shorthand.
    pub fn send_self(self, vector: u8) {
        self.command(SELF_SHORTHAND | ASSERT | u32::from(vector), 0);
    }

    /// Writes the interrupt command register and waits until the command is on its way.
    pub fn command(self, low: u32, destination: u32) {
        if self.x2apic {
            let value = u64::from(destination) << 32 | u64::from(low);
            // SAFETY: the only receiver is this processor, every vector of which has a gate.
            unsafe { cpu::wrmsr(msr::X2APIC + 0x30, value) };
        } else {
            self.write(Register::CommandHigh, destination << 24);
            self.write(Register::Command, low);
            for _ in 0..100_000 {
                if self.read(Register::Command) & PENDING == 0 {
                    break;
                }
            }
        }
    }

    /// Whether a vector's bit is set in one of the three 256-bit registers.
    pub fn vector_bit(self, first: Register, vector: u8) -> bool {
        let word = self.read_at(first as u16 + u16::from(vector / 32) * 0x10);
        word & 1 << (vector % 32) != 0
    }

    /// Turns the APIC on with everything masked: the state in which a check starts.
    pub fn quiet(self) {
        self.write(
            Register::Spurious,
            SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR),
        );
        self.write(Register::TaskPriority, 0);
        for entry in [
            Register::Timer,
            Register::Lint0,
            Register::Lint1,
            Register::Error,
        ] {
            self.write(entry, MASKED | u32::from(SPURIOUS_VECTOR));
        }
        self.write(Register::InitialCount, 0);
        self.write(Register::Divide, DIVIDE_BY_1);
    }

    /// Switches to x2APIC mode.
    pub fn enter_x2apic(self) {
        set_mode(true);
        X2APIC_MODE.store(true, Relaxed);
    }

    /// Switches back to xAPIC mode, which leads through "off" and so resets the APIC.
    pub fn enter_xapic(self) {
        set_mode(false);
        X2APIC_MODE.store(false, Relaxed);
    }
}

/// Brings this processor's APIC to a mode, without telling [`local`].
pub fn set_mode(x2apic: bool) {
    if x2apic {
        set_base(ApicBase::ENABLE | ApicBase::EXTD);
    } else {
        set_base(ApicBase::empty());
        set_base(ApicBase::ENABLE);
    }
}

fn set_base(mode: ApicBase) {
    let keep = cpu::rdmsr(msr::APIC_BASE) & !(ApicBase::ENABLE | ApicBase::EXTD).bits();
    // SAFETY: the address stays where it was, outside of RAM.
    unsafe { cpu::wrmsr(msr::APIC_BASE, keep | mode.bits()) };
}

/// RTE: level-triggered.
pub const LEVEL: u32 = 1 << 15;
/// RTE: active low.
pub const ACTIVE_LOW: u32 = 1 << 13;
/// RTE: taken by a local APIC, no end-of-interrupt yet.
pub const REMOTE_IRR: u32 = 1 << 14;

/// An IOAPIC at a physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    address: u64,
}

/// IOAPIC register: identification.
pub const IOAPIC_ID: u8 = 0;
/// IOAPIC register: version and number of entries.
pub const IOAPIC_VERSION: u8 = 1;
const REDIRECTION: u8 = 0x10;

impl IoApic {
    /// The IOAPIC that the MADT names.
    ///
    /// # Safety
    ///
    /// An IOAPIC's registers must be at `address`, identity-mapped.
    pub const unsafe fn new(address: u64) -> Self {
        Self { address }
    }

    /// The index register.
    pub fn select(self) -> *mut u32 {
        ptr::with_exposed_provenance_mut(self.address as usize)
    }

    /// The data register.
    pub fn window(self) -> *mut u32 {
        ptr::with_exposed_provenance_mut(self.address as usize + 0x10)
    }

    /// Reads a register.
    pub fn read(self, register: u8) -> u32 {
        // SAFETY: the constructor's caller vouched for the address.
        unsafe {
            ptr::write_volatile(self.select(), register.into());
            ptr::read_volatile(self.window())
        }
    }

    /// Writes a register.
    pub fn write(self, register: u8, value: u32) {
        // SAFETY: the constructor's caller vouched for the address.
        unsafe {
            ptr::write_volatile(self.select(), register.into());
            ptr::write_volatile(self.window(), value);
        }
    }

    /// Number of redirection entries.
    pub fn entries(self) -> u8 {
        ((self.read(IOAPIC_VERSION) >> 16) as u8).saturating_add(1)
    }

    /// Low half of a redirection entry.
    pub fn entry(self, pin: u8) -> u32 {
        self.read(REDIRECTION + 2 * pin)
    }

    /// Routes a pin to a local APIC; `flags` holds vector, trigger, polarity, mask.
    pub fn route(self, pin: u8, flags: u32, destination: u32) {
        self.write(REDIRECTION + 2 * pin, MASKED);
        self.write(REDIRECTION + 2 * pin + 1, destination << 24);
        self.write(REDIRECTION + 2 * pin, flags);
    }

    /// Ends a level-triggered interrupt (version 0x20 and later).
    pub fn end(self, vector: u8) {
        let register = ptr::with_exposed_provenance_mut::<u32>(self.address as usize + 0x40);
        // SAFETY: the constructor's caller vouched for the address.
        unsafe { register.write_volatile(vector.into()) };
    }

    /// Masks all pins.
    pub fn quiet(self) {
        for pin in 0..self.entries().min(120) {
            self.write(REDIRECTION + 2 * pin, MASKED);
        }
    }
}

/// The pair of 8259 interrupt controllers.
pub mod pic {
    use super::port;

    const PRIMARY: u16 = 0x20;
    const SECONDARY: u16 = 0xA0;
    /// ICW1: initialize, ICW4 follows.
    const INITIALIZE: u8 = 0x11;
    /// ICW4: 8086 mode.
    const MODE_8086: u8 = 0x01;
    /// OCW2: non-specific end of interrupt.
    const END: u8 = 0x20;
    /// OCW3: the next read gives the in-service register.
    const READ_IN_SERVICE: u8 = 0x0B;
    /// OCW3: the next read gives the request register.
    const READ_REQUEST: u8 = 0x0A;

    /// Initializes both to deliver at `base` and `base + 8`, with everything masked.
    pub fn remap(base: u8) {
        port::write8(PRIMARY, INITIALIZE);
        port::write8(SECONDARY, INITIALIZE);
        port::write8(PRIMARY + 1, base);
        port::write8(SECONDARY + 1, base + 8);
        port::write8(PRIMARY + 1, 1 << 2);
        port::write8(SECONDARY + 1, 2);
        port::write8(PRIMARY + 1, MODE_8086);
        port::write8(SECONDARY + 1, MODE_8086);
        set_masks(0xFFFF);
    }

    /// Interrupt masks, secondary in the high byte.
    pub fn masks() -> u16 {
        u16::from(port::read8(PRIMARY + 1)) | u16::from(port::read8(SECONDARY + 1)) << 8
    }

    /// Sets both masks.
    pub fn set_masks(masks: u16) {
        port::write8(PRIMARY + 1, masks as u8);
        port::write8(SECONDARY + 1, (masks >> 8) as u8);
    }

    /// Ends an interrupt of the primary.
    pub fn end() {
        port::write8(PRIMARY, END);
    }

    /// Interrupts in service at the primary.
    pub fn in_service() -> u8 {
        port::write8(PRIMARY, READ_IN_SERVICE);
        port::read8(PRIMARY)
    }

    /// Interrupts requested at the primary.
    pub fn requested() -> u8 {
        port::write8(PRIMARY, READ_REQUEST);
        port::read8(PRIMARY)
    }
}
