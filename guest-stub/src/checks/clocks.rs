//! Timers beyond the local APIC's: HPET, the PIT's other channel, alarms of the real-time clock.

use core::ptr;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use crate::apic;
use crate::cpu::{self, port};
use crate::interrupts::{Frame, count, end_at_apic, hook, reset_counts};
use crate::machine::{Host, Machine};
use crate::memory::read64;
use crate::time::{self, PIT_HZ, rtc, wait_ms};
use crate::{checks, ensure, ensure_eq, skip_if};

use super::interrupts::{PATIENCE_MS, await_count, ioapic, isa_route, wait_halting};
use super::{Verdict, Why};

checks![
    hpet_counter,
    hpet_one_shot,
    hpet_level,
    hpet_message,
    hpet_legacy,
    pit_gate,
    pit_status,
    rtc_alarm,
    rtc_periodic,
    rtc_update,
    rates_as_told,
];

const VECTOR: u8 = 0x65;

/// An HPET's registers.
#[derive(Clone, Copy)]
struct Hpet(u64);

const ID: u64 = 0x00;
const GENERAL: u64 = 0x10;
const STATUS: u64 = 0x20;
const COUNTER: u64 = 0xF0;
const ENABLE: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

/// Comparator configuration.
const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const MESSAGE: u64 = 1 << 14;
const MESSAGE_CAPABLE: u64 = 1 << 15;

impl Hpet {
    fn find(machine: &Machine) -> Result<Self, Why> {
        let table = machine.acpi.and_then(|acpi| acpi.table(b"HPET"));
        let Some(table) = table else {
            return Err(Why::Skipped("no HPET"));
        };
        Ok(Self(read64(table.address + 44)))
    }

    fn read(self, offset: u64) -> u64 {
        let address = ptr::with_exposed_provenance::<u64>((self.0 + offset) as usize);
        // SAFETY: the ACPI table says that the registers are there; all below 4 GiB is mapped.
        unsafe { address.read_volatile() }
    }

    fn write(self, offset: u64, value: u64) {
        let address = ptr::with_exposed_provenance_mut::<u64>((self.0 + offset) as usize);
        // SAFETY: as in `read`; these registers reach no memory.
        unsafe { address.write_volatile(value) };
    }

    fn config(timer: u64) -> u64 {
        0x100 + 0x20 * timer
    }

    fn comparator(timer: u64) -> u64 {
        0x108 + 0x20 * timer
    }

    /// Counts in so many microseconds.
    fn counts(self, microseconds: u64) -> u64 {
        let femtoseconds = (self.read(ID) >> 32).max(1);
        microseconds * 1_000_000_000 / femtoseconds
    }

    /// Halted, at zero, no comparator enabled.
    fn quiet(self) {
        self.write(GENERAL, 0);
        for timer in 0..=(self.read(ID) >> 8 & 0x1F) {
            self.write(Self::config(timer), 0);
        }
        self.write(STATUS, u64::MAX);
        self.write(COUNTER, 0);
    }

    /// An interrupt input that a comparator may have.
    fn route(self, timer: u64) -> Option<u8> {
        let routes = self.read(Self::config(timer)) >> 32;
        (routes != 0).then(|| routes.trailing_zeros() as u8)
    }
}

/// Runs a check with the HPET, which begins and ends halted.
fn with_hpet(machine: &Machine, check: impl FnOnce(Hpet) -> Verdict) -> Verdict {
    let hpet = Hpet::find(machine)?;
    hpet.quiet();
    let outcome = check(hpet);
    hpet.quiet();
    outcome
}

/// The hypervisor's leaf of rates: the TSC's is the one measured, and the APIC timer's fits it.
fn rates_as_told(machine: &Machine) -> Verdict {
    const LEAF: u32 = 0x4000_0010;
    let leaves = &cpu::hypervisor_signature(0x4000_0000) == b"KVMKVMKVM\0\0\0"
        && cpu::cpuid(0x4000_0000, 0).eax >= LEAF;
    ensure!(leaves || machine.host != Host::Plinth, "it is not offered");
    skip_if!(!leaves, "it is not offered");
    let leaf = cpu::cpuid(LEAF, 0);
    let (tsc_hz, timer_hz) = (u64::from(leaf.eax) * 1000, u64::from(leaf.ebx) * 1000);
    ensure!(
        tsc_hz.abs_diff(machine.tsc_hz) <= machine.tsc_hz / 50,
        "TSC: {tsc_hz} Hz told, {} measured",
        machine.tsc_hz
    );
    let local = apic::local();
    local.quiet();
    local.write(apic::Register::InitialCount, u32::MAX);
    let read = || time::bracket(|| local.read(apic::Register::CurrentCount).into());
    let (first, begin, before) = read();
    time::spin_us(machine.tsc_hz, 10_000);
    let (last, end, after) = read();
    local.quiet();
    // Each reading took place somewhere within its bracket.
    let counted = first.saturating_sub(last);
    let ticks = end.saturating_sub(begin);
    let (told, off) = (
        counted * tsc_hz / timer_hz.max(1),
        (before + after) / 2 + 1 + ticks / 1000,
    );
    ensure!(
        told.abs_diff(ticks) <= off,
        "APIC timer at {timer_hz} Hz: {counted} in {ticks} ticks of a TSC at {tsc_hz} Hz"
    );
    Ok(())
}

/// The counter stands while halted, and else goes at the rate that it tells.
fn hpet_counter(machine: &Machine) -> Verdict {
    with_hpet(machine, |hpet| {
        let id = hpet.read(ID);
        ensure!(
            (1..=0x05F5_E100).contains(&(id >> 32)) && id >> 16 & 0xFFFF != 0,
            "capabilities {id:#x}"
        );
        hpet.write(COUNTER, 0x1234);
        ensure_eq!(hpet.read(COUNTER), 0x1234, "counter while halted");
        hpet.write(GENERAL, ENABLE);
        let mut last = (0, 0);
        // A busy emulator can spoil a measurement, not twenty.
        for _ in 0..20 {
            let (start, tsc) = (hpet.read(COUNTER), cpu::tsc());
            time::spin_us(machine.tsc_hz, 5_000);
            let (end, tsc_end) = (hpet.read(COUNTER), cpu::tsc());
            ensure!(end > start, "the counter goes from {start:#x} to {end:#x}");
            let passed = (tsc_end - tsc) * 1_000_000 / machine.tsc_hz;
            let counted = (end - start) * 5_000 / hpet.counts(5_000).max(1);
            last = (counted, passed);
            if counted.abs_diff(passed) * 20 <= passed {
                return Ok(());
            }
        }
        let (counted, passed) = last;
        crate::fail!("{counted} us by the counter, {passed} us by the TSC")
    })
}

/// One interrupt at the comparator's value, through the IOAPIC.
fn hpet_one_shot(machine: &Machine) -> Verdict {
    with_hpet(machine, |hpet| {
        let ioapic = ioapic(machine)?;
        let timer = hpet.read(ID) >> 8 & 0x1F;
        let Some(input) = hpet.route(timer) else {
            crate::skip!("no route");
        };
        ioapic.route(input, VECTOR.into(), apic::local().id());
        hook(VECTOR, end_at_apic);
        hpet.write(Hpet::config(timer), u64::from(input) << 9 | INTERRUPT);
        hpet.write(Hpet::comparator(timer), hpet.counts(1_000));
        hpet.write(GENERAL, ENABLE);
        await_count(machine, VECTOR, 1)?;
        ensure!(
            hpet.read(COUNTER) >= hpet.counts(1_000),
            "before the counter got there"
        );
        cpu::sti();
        time::spin_us(machine.tsc_hz, 3_000);
        cpu::cli();
        ensure_eq!(count(VECTOR), 1, "interrupts of one shot");
        Ok(())
    })
}

/// A level-triggered comparator holds its line until its status is cleared.
fn hpet_level(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Bochs, "Bochs delivers a level once");
    with_hpet(machine, |hpet| {
        static TIMES: AtomicU8 = AtomicU8::new(0);
        static BASE: AtomicU64 = AtomicU64::new(0);
        fn third_clears(_: &mut Frame) {
            if TIMES.fetch_add(1, Relaxed) == 2 {
                Hpet(BASE.load(Relaxed)).write(STATUS, u64::MAX);
            }
            apic::local().end_of_interrupt();
        }
        let ioapic = ioapic(machine)?;
        let Some(input) = hpet.route(0) else {
            crate::skip!("no route");
        };
        BASE.store(hpet.0, Relaxed);
        TIMES.store(0, Relaxed);
        hook(VECTOR, third_clears);
        ioapic.route(input, apic::LEVEL | u32::from(VECTOR), apic::local().id());
        hpet.write(Hpet::config(0), u64::from(input) << 9 | INTERRUPT | LEVEL);
        hpet.write(Hpet::comparator(0), hpet.counts(100));
        hpet.write(GENERAL, ENABLE);
        await_count(machine, VECTOR, 3)?;
        cpu::take_interrupts();
        ensure_eq!(count(VECTOR), 3, "interrupts, the third of which cleared");
        ensure_eq!(hpet.read(STATUS), 0, "status at the end");
        Ok(())
    })
}

/// Periodic interrupts as messages (MSI).
fn hpet_message(machine: &Machine) -> Verdict {
    with_hpet(machine, |hpet| {
        skip_if!(
            hpet.read(Hpet::config(1)) & MESSAGE_CAPABLE == 0,
            "no interrupts by message"
        );
        hook(VECTOR, end_at_apic);
        let address = 0xFEE0_0000 | u64::from(apic::local().id()) << 12;
        hpet.write(0x130, address << 32 | u64::from(VECTOR));
        hpet.write(Hpet::config(1), MESSAGE | INTERRUPT | PERIODIC | SET_VALUE);
        hpet.write(Hpet::comparator(1), hpet.counts(1_000));
        hpet.write(GENERAL, ENABLE);
        await_count(machine, VECTOR, 5)?;
        hpet.write(GENERAL, 0);
        cpu::take_interrupts();
        let at_stop = count(VECTOR);
        cpu::sti();
        time::spin_us(machine.tsc_hz, 5_000);
        cpu::cli();
        ensure_eq!(count(VECTOR), at_stop, "interrupts of a halted HPET");
        Ok(())
    })
}

/// Legacy replacement: the first comparator has the PIT's line, and the PIT has none.
fn hpet_legacy(machine: &Machine) -> Verdict {
    with_hpet(machine, |hpet| {
        let ioapic = ioapic(machine)?;
        let (pin, flags) = isa_route(machine, 0, VECTOR);
        ioapic.route(pin, flags, apic::local().id());
        hook(VECTOR, end_at_apic);
        time::pit_periodic((PIT_HZ / 1000) as u16);
        hpet.write(GENERAL, LEGACY);
        cpu::take_interrupts();
        reset_counts();
        cpu::sti();
        time::spin_us(machine.tsc_hz, 5_000);
        cpu::cli();
        ensure_eq!(count(VECTOR), 0, "the PIT's interrupts");
        hpet.write(Hpet::config(0), INTERRUPT | PERIODIC | SET_VALUE);
        hpet.write(Hpet::comparator(0), hpet.counts(1_000));
        hpet.write(GENERAL, LEGACY | ENABLE);
        await_count(machine, VECTOR, 5)?;
        hpet.write(GENERAL, 0);
        cpu::take_interrupts();
        reset_counts();
        await_count(machine, VECTOR, 2)
    })
}

const CHANNEL2: u16 = 0x42;
const COMMAND: u16 = 0x43;
const CONTROL_B: u16 = 0x61;
const OUTPUT2: u8 = 1 << 5;

fn set_gate2(open: bool) {
    let rest = port::read8(CONTROL_B) & 0x0C;
    port::write8(CONTROL_B, rest | u8::from(open));
}

fn load_channel2(mode: u8, value: u16) {
    port::write8(COMMAND, 0xB0 | mode << 1);
    port::write8(CHANNEL2, value as u8);
    port::write8(CHANNEL2, (value >> 8) as u8);
}

fn read_channel2() -> u16 {
    port::write8(COMMAND, 0x80);
    u16::from(port::read8(CHANNEL2)) | u16::from(port::read8(CHANNEL2)) << 8
}

/// Channel 2 counts while its gate, at port 0x61, is open, and shows its output there.
fn pit_gate(machine: &Machine) -> Verdict {
    set_gate2(true);
    load_channel2(0, 0xFFFF);
    ensure_eq!(port::read8(CONTROL_B) & OUTPUT2, 0, "output while counting");
    let first = read_channel2();
    let moved = wait_ms(machine.tsc_hz, PATIENCE_MS, || read_channel2() != first);
    ensure!(moved, "the count stands at {first}");
    set_gate2(false);
    let stopped = read_channel2();
    time::spin_us(machine.tsc_hz, 500);
    let later = read_channel2();
    set_gate2(true);
    load_channel2(0, 500);
    let ended = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
        port::read8(CONTROL_B) & OUTPUT2 != 0
    });
    // QEMU (7.2) counts on in this mode.
    ensure!(
        later == stopped || machine.host == Host::Tcg,
        "count with the gate shut: from {stopped:#x} to {later:#x}"
    );
    ensure!(ended, "the output does not rise at the end of the count");
    // A one-shot waits for the gate with its output up, and has it up again at the end.
    set_gate2(false);
    load_channel2(1, 0xFFFF);
    time::spin_us(machine.tsc_hz, 10);
    let before = port::read8(CONTROL_B) & OUTPUT2;
    set_gate2(true);
    let outcome = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
        port::read8(CONTROL_B) & OUTPUT2 != 0
    });
    set_gate2(false);
    ensure!(before != 0, "the output of a one-shot before its trigger");
    ensure!(outcome, "the output of a one-shot at its end");
    Ok(())
}

/// The read-back command latches status and count.
fn pit_status(machine: &Machine) -> Verdict {
    const STATUS_AND_COUNT_2: u8 = 0xC8;
    const NULL_COUNT: u8 = 1 << 6;
    set_gate2(true);
    load_channel2(3, 0x8000);
    time::spin_us(machine.tsc_hz, 50);
    port::write8(COMMAND, STATUS_AND_COUNT_2);
    let status = port::read8(CHANNEL2);
    let low = port::read8(CHANNEL2);
    let high = port::read8(CHANNEL2);
    port::write8(COMMAND, 0xB0);
    port::write8(COMMAND, 0xE8);
    let empty = port::read8(CHANNEL2);
    set_gate2(false);
    // Access by two bytes, square wave.
    ensure_eq!(status & 0x3F, 0x36, "status");
    ensure_eq!(status & NULL_COUNT, 0, "null count of a running channel");
    let reading = u16::from_le_bytes([low, high]);
    ensure!(reading <= 0x8000, "latched count {reading:#x}");
    // QEMU (7.2) has no such bit.
    ensure!(
        empty & NULL_COUNT != 0 || machine.host == Host::Tcg,
        "null count of a channel without a count: {empty:#x}"
    );
    Ok(())
}

const STATUS_C: u8 = rtc::STATUS_C;
static SOURCES: AtomicU8 = AtomicU8::new(0);

fn read_source(_: &mut Frame) {
    SOURCES.fetch_or(rtc::read(STATUS_C), Relaxed);
    apic::local().end_of_interrupt();
}

/// Enables one source of the clock's interrupt and waits until it came some times.
fn rtc_interrupt(machine: &Machine, source: u8, times: u32) -> Verdict {
    const REQUEST: u8 = 1 << 7;
    let ioapic = ioapic(machine)?;
    let (pin, flags) = isa_route(machine, 8, VECTOR);
    let status = rtc::read(rtc::STATUS_B);
    SOURCES.store(0, Relaxed);
    hook(VECTOR, read_source);
    ioapic.route(pin, flags, apic::local().id());
    rtc::read(STATUS_C);
    rtc::write(rtc::STATUS_B, status | source);
    let came = wait_halting(machine, 10 * PATIENCE_MS, || count(VECTOR) >= times);
    rtc::write(rtc::STATUS_B, status);
    rtc::read(STATUS_C);
    ensure!(came, "{} interrupts instead of {times}", count(VECTOR));
    let wanted = source | REQUEST;
    ensure_eq!(SOURCES.load(Relaxed) & wanted, wanted, "status C");
    Ok(())
}

/// An alarm at any time rings every second.
fn rtc_alarm(machine: &Machine) -> Verdict {
    const ALARM_INTERRUPT: u8 = 1 << 5;
    const ANY: u8 = 0xFF;
    for register in [0x01, 0x03, 0x05] {
        rtc::write(register, ANY);
    }
    rtc_interrupt(machine, ALARM_INTERRUPT, 2)
}

/// The periodic interrupt, here 1024 times a second.
fn rtc_periodic(machine: &Machine) -> Verdict {
    const PERIODIC_INTERRUPT: u8 = 1 << 6;
    rtc::write(rtc::STATUS_A, 0x26);
    rtc_interrupt(machine, PERIODIC_INTERRUPT, 10)
}

/// The end of an update interrupts every second.
fn rtc_update(machine: &Machine) -> Verdict {
    rtc_interrupt(machine, rtc::UPDATE_INTERRUPT, 2)
}
