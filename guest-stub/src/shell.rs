//! A line-based prompt, for a person who switches to this guest's console.

use crate::apic;
use crate::checks;
use crate::console::{self, COM1, Text, register};
use crate::cpu::{self, port};
use crate::interrupts::{end_at_apic, hook};
use crate::machine::Machine;
use crate::options::Value;
use crate::{facts, power, print, println, probe, time};

/// Vector of the console's interrupt.
const CONSOLE_VECTOR: u8 = 0x34;
/// UART interrupt enable: a byte was received.
const RECEIVED: u8 = 1 << 0;

const HELP: &str = "\
help              this text
checks [GROUP,..] run checks: cpuid, msr, exceptions, processor, memory, io, fpu, acpi, interrupts
facts             print the facts
echo TEXT         print the text
tsc               print the time-stamp counter and its frequency
fault             divide by zero, and survive it
deaf              hear nothing for a while, then read a line and say what is missing
poweroff          power off by ACPI
reset             reset the machine
halt              stop for good";

/// Reads and runs commands for ever.
pub fn run(machine: &Machine) -> ! {
    println!("Type `help` for the commands.");
    loop {
        listen(machine);
        print!("stub> ");
        let line = read_line(machine);
        // The line's last interrupt may still be pending: it is not for what comes next.
        cpu::take_interrupts();
        machine.settle();
        let line = line.as_str().trim();
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "" => {}
            "help" => println!("{HELP}"),
            "checks" => checks::run(machine, &Value::format(format_args!("{}", rest.trim()))),
            "facts" => facts::print(machine),
            "echo" => println!("{rest}"),
            "tsc" => println!("{} at {} kHz", cpu::tsc(), machine.tsc_hz / 1000),
            "fault" => fault(),
            "deaf" => deaf(machine),
            "poweroff" => power::power_off(machine.acpi.as_ref()),
            "reset" => power::reset(machine.acpi.as_ref()),
            "halt" => {
                println!("halted");
                console::drain();
                cpu::halt_forever()
            }
            unknown => println!("no such command: {unknown}"),
        }
    }
}

fn fault() {
    // SAFETY: the exception is caught.
    let trap = unsafe {
        probe!("div {zero:e}"; zero = in(reg) 0_u32, inout("eax") 1 => _, inout("edx") 0 => _)
    };
    match trap {
        Some(trap) => println!("caught {trap}"),
        None => println!("division by zero did not fault"),
    }
}

/// Takes no interrupt and reads no byte for a while, first without an exit, then with many that are short work, then with many that
/// are more, as a busy kernel may. Then reads the line that was typed meanwhile, which must count: 0 to 9 and again.
fn deaf(machine: &Machine) {
    /// Time in which 2,000 bytes arrive at 115,200 baud, and half as much again.
    const DEAF_MS: u64 = 260;
    let start = cpu::tsc();
    let end = start + machine.tsc_hz / 1000 * DEAF_MS;
    while cpu::tsc() < end {
        match 4 * (cpu::tsc() - start) / (end - start) {
            0 => {}
            1 => {
                port::read8(COM1 + register::SCRATCH);
            }
            _ => {
                time::pit_count();
            }
        }
    }
    let mut next = b'0';
    let (mut count, mut wrong) = (0, 0);
    loop {
        match read_byte(machine) {
            b'\r' => break,
            byte => {
                count += 1;
                wrong += u32::from(byte != next);
                next = if byte == b'9' {
                    b'0'
                } else {
                    byte.wrapping_add(1)
                };
            }
        }
    }
    println!("deaf: {count} bytes waited, {wrong} of them out of order");
}

/// Lets received bytes interrupt, so that waiting can halt. Without an IOAPIC input is polled.
fn listen(machine: &Machine) {
    let (Some(ioapic), Some(madt)) = (machine.ioapic, machine.acpi.and_then(|acpi| acpi.madt))
    else {
        return;
    };
    let (pin, active_low, level) = madt.isa_pin(4);
    let mut flags = u32::from(CONSOLE_VECTOR);
    if active_low {
        flags |= apic::ACTIVE_LOW;
    }
    if level {
        flags |= apic::LEVEL;
    }
    hook(CONSOLE_VECTOR, end_at_apic);
    ioapic.route(pin, flags, apic::local().id());
    port::write8(COM1 + register::INTERRUPT_ENABLE, RECEIVED);
}

fn read_byte(machine: &Machine) -> u8 {
    loop {
        // Interrupts are off here: a byte that comes after the look ends the halt.
        if let Some(byte) = console::try_receive() {
            return byte;
        }
        if machine.ioapic.is_some() {
            cpu::wait_for_interrupt();
        } else {
            core::hint::spin_loop();
        }
    }
}

/// Reads a line with echo and backspace. Interrupts of the UART are off afterwards.
fn read_line(machine: &Machine) -> Text<120> {
    const BACKSPACE: u8 = 0x08;
    const DELETE: u8 = 0x7F;
    let mut line = Text::new();
    loop {
        match read_byte(machine) {
            b'\r' | b'\n' => {
                println!();
                port::write8(COM1 + register::INTERRUPT_ENABLE, 0);
                return line;
            }
            BACKSPACE | DELETE if line.pop().is_some() => print!("\x08 \x08"),
            byte if byte.is_ascii_graphic() || byte == b' ' => {
                line.push(byte);
                console::send(&[byte]);
            }
            // Other control characters mean nothing here.
            _ => {}
        }
    }
}
