//! The watchdog of Intel's 6300ESB: fed for a while, and then no more.

use crate::cpu;
use crate::interrupts::{self, hook, only_count, vector};
use crate::machine::Machine;
use crate::memory::{read16, write8, write16, write32};
use crate::pci::{COMMAND, Function, MEMORY};
use crate::time::wait_ms;
use crate::{console, power, println};

/// Vendor 8086, device 25AB.
const WATCHDOG: u32 = 0x25AB_8086;
/// Configuration space: BAR 0, configuration, lock.
const BAR0: u8 = 0x10;
const CONFIG: u8 = 0x60;
const LOCK: u8 = 0x68;
/// Configuration: no interrupt after the first stage, count milliseconds (2^15 PCI clocks, to be exact).
const NO_INTERRUPT: u16 = 3;
/// Lock: the timer runs.
const ENABLE: u16 = 2;
/// Behind the BAR: lengths of the stages, reload register.
const PRELOAD_1: u64 = 0;
const PRELOAD_2: u64 = 4;
const RELOAD: u64 = 0xC;
/// Reload register: begin anew; it has fired.
const FEED: u16 = 1 << 8;
const FIRED: u16 = 1 << 9;

/// Length of a stage, how often it is fed, and how often in all: longer than both stages take.
const STAGE_MS: u32 = 500;
const FEED_MS: u64 = 200;
const FEEDS: u32 = 8;

/// Unlocks the next write.
fn unlock(registers: u64) {
    write8(registers + RELOAD, 0x80);
    write8(registers + RELOAD, 0x86);
}

fn feed(registers: u64) {
    unlock(registers);
    write16(registers + RELOAD, FEED);
}

/// What is done once it is fed no more.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Halt for good, with interrupts off.
    Halt,
    /// Wait until it has fired, and power off if so many NMIs came; else triple-fault.
    Look { nmis: u32 },
}

/// How long an NMI may take after the watchdog has fired.
const NMI_MS: u64 = 200;

/// Turns the watchdog on, and feeds it for a while. If it has fired before: says so, and powers off.
pub fn stop_feeding(machine: &Machine, after: After) -> ! {
    let Some(function) = Function::find(WATCHDOG) else {
        println!("stub: no watchdog here; halting");
        cpu::halt_forever()
    };
    function.write16(COMMAND, function.read16(COMMAND) | MEMORY);
    let registers = u64::from(function.read32(BAR0) & !0xF);
    if read16(registers + RELOAD) & FIRED != 0 {
        unlock(registers);
        write16(registers + RELOAD, FIRED);
        let kept = read16(registers + RELOAD) & FIRED != 0;
        println!("stub: the watchdog had fired; still says so: {kept}");
        power::power_off(machine.acpi.as_ref())
    }
    hook(vector::NMI, only_count);
    let before = interrupts::count(vector::NMI);
    function.write16(CONFIG, NO_INTERRUPT);
    for stage in [PRELOAD_1, PRELOAD_2] {
        unlock(registers);
        write32(registers + stage, STAGE_MS);
    }
    feed(registers);
    function.write16(LOCK, ENABLE);
    for _ in 0..FEEDS {
        wait_ms(machine.tsc_hz, FEED_MS, || false);
        feed(registers);
    }
    println!("stub: fed the watchdog {FEEDS} times, and feeds it no more");
    console::drain();
    let After::Look { nmis } = after else {
        cpu::halt_forever()
    };
    while read16(registers + RELOAD) & FIRED == 0 {
        wait_ms(machine.tsc_hz, 1, || false);
    }
    // One more would come soon.
    wait_ms(machine.tsc_hz, NMI_MS, || false);
    let came = interrupts::count(vector::NMI) - before;
    println!("stub: the watchdog has fired, and {came} NMIs came");
    if came != nmis {
        console::drain();
        power::triple_fault()
    }
    power::power_off(machine.acpi.as_ref())
}
