//! Ways to end: power off, reset, halt, triple fault, spin.

use crate::acpi::Acpi;
use crate::apic;
use crate::cpu::{self, port};
use crate::interrupts::{end_at_apic, hook, only_count, vector};
use crate::machine::Machine;
use crate::{console, interrupts, println};

/// How a run ends, as the command line names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    PowerOff,
    Halt,
    Reset,
    TripleFault,
    Spin,
    Shell,
    /// Power off, when the power button is pressed.
    Button,
    /// By the watchdog.
    Unfed,
    /// Power off, when the watchdog has fired and done nothing.
    Watched,
    /// Power off, when the watchdog has fired and sent an NMI.
    WatchedByNmi,
    /// By the exit port of test kernels, with this value.
    TestExit(u32),
}

impl End {
    /// Those that have a name.
    pub const NAMES: [(&'static str, Self); 10] = [
        ("poweroff", Self::PowerOff),
        ("halt", Self::Halt),
        ("reset", Self::Reset),
        ("triple-fault", Self::TripleFault),
        ("spin", Self::Spin),
        ("shell", Self::Shell),
        ("button", Self::Button),
        ("unfed", Self::Unfed),
        ("watched", Self::Watched),
        ("watched-by-nmi", Self::WatchedByNmi),
    ];

    /// The end of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|&(_, end)| end)
    }
}

/// PM1 control: sleep now.
const SLEEP_ENABLE: u16 = 1 << 13;
/// PM1 control: ACPI mode is on.
const SCI_ENABLE: u16 = 1 << 0;

/// Powers the machine off by ACPI's \_S5 (ACPI 7.4.2, 16.1.7).
pub fn power_off(acpi: Option<&Acpi>) -> ! {
    console::drain();
    let fadt = acpi.and_then(|acpi| acpi.fadt);
    let s5 = acpi.and_then(|acpi| acpi.s5);
    let (Some(fadt), Some((type_a, type_b))) = (fadt, s5) else {
        println!("stub: no ACPI way to power off; halting");
        cpu::halt_forever()
    };
    if fadt.smi_command != 0 && port::read16(fadt.pm1a_control) & SCI_ENABLE == 0 {
        port::write8(fadt.smi_command, fadt.acpi_enable);
        for _ in 0..100_000 {
            if port::read16(fadt.pm1a_control) & SCI_ENABLE != 0 {
                break;
            }
        }
    }
    let keep = port::read16(fadt.pm1a_control) & 0x0203;
    port::write16(
        fadt.pm1a_control,
        keep | u16::from(type_a) << 10 | SLEEP_ENABLE,
    );
    if fadt.pm1b_control != 0 {
        port::write16(
            fadt.pm1b_control,
            keep | u16::from(type_b) << 10 | SLEEP_ENABLE,
        );
    }
    // Power goes away a moment later, or not at all.
    for _ in 0..1_000_000 {
        port::read8(0x80);
    }
    println!("stub: still here after power-off; halting");
    cpu::halt_forever()
}

/// Resets the machine: the port of ACPI's FADT or 0xCF9, then the keyboard controller, then a
/// triple fault.
pub fn reset(acpi: Option<&Acpi>) -> ! {
    const RESET_CONTROL: u16 = 0xCF9;
    const KEYBOARD_COMMAND: u16 = 0x64;
    const PULSE_RESET: u8 = 0xFE;

    console::drain();
    if let Some((port, value)) = acpi.and_then(|acpi| acpi.fadt).and_then(|fadt| fadt.reset) {
        port::write8(port, value);
    }
    port::write8(RESET_CONTROL, 0x02);
    port::write8(RESET_CONTROL, 0x06);
    for _ in 0..100_000 {
        port::read8(0x80);
    }
    port::write8(KEYBOARD_COMMAND, PULSE_RESET);
    for _ in 0..100_000 {
        port::read8(0x80);
    }
    triple_fault()
}

/// Writes to the port by which test kernels end their machine.
pub fn test_exit(value: u32) -> ! {
    const EXIT_PORT: u16 = 0xF4;
    console::drain();
    port::write32(EXIT_PORT, value);
    println!("stub: still here after the exit port; halting");
    cpu::halt_forever()
}

/// An exception that cannot be delivered, and so on: shutdown.
pub fn triple_fault() -> ! {
    console::drain();
    interrupts::forget_idt();
    loop {
        // SAFETY: the exception is the purpose.
        unsafe { core::arch::asm!("ud2", options(nomem, nostack)) };
    }
}

/// Vector of the system control interrupt.
const SCI_VECTOR: u8 = 0x35;
/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;

/// Halts until the power button is pressed, which the system control interrupt tells, and powers off. Says so
/// when an NMI comes.
pub fn wait_for_button(machine: &Machine) -> ! {
    let fadt = machine.acpi.as_ref().and_then(|acpi| acpi.fadt);
    let madt = machine.acpi.as_ref().and_then(|acpi| acpi.madt);
    let (Some(fadt), Some(madt), Some(ioapic)) = (fadt, madt, machine.ioapic) else {
        println!("stub: no ACPI button here; halting");
        cpu::halt_forever()
    };
    let (pin, active_low, level) = madt.isa_pin(fadt.sci as u8);
    let mut flags = u32::from(SCI_VECTOR);
    for (set, flag) in [(active_low, apic::ACTIVE_LOW), (level, apic::LEVEL)] {
        flags |= if set { flag } else { 0 };
    }
    // The interrupt stays until the status is cleared, which this program does not do before it goes on.
    hook(SCI_VECTOR, end_at_apic);
    hook(vector::NMI, only_count);
    port::write16(fadt.pm1a_event + 2, POWER_BUTTON);
    ioapic.route(pin, flags, apic::local().id());
    println!("stub: waits for the power button");
    let mut nmis = interrupts::count(vector::NMI);
    // Interrupts are off here: a press that comes after the look ends the halt.
    while port::read16(fadt.pm1a_event) & POWER_BUTTON == 0 {
        cpu::wait_for_interrupt();
        if interrupts::count(vector::NMI) != nmis {
            nmis = interrupts::count(vector::NMI);
            println!("stub: an NMI came");
        }
    }
    println!("stub: the power button was pressed");
    port::write16(fadt.pm1a_event, POWER_BUTTON);
    power_off(machine.acpi.as_ref())
}

/// Spins with interrupts off: such a guest can only be stopped from outside.
pub fn spin() -> ! {
    console::drain();
    cpu::cli();
    loop {
        core::hint::spin_loop();
    }
}
