//! The finer points of local APIC and IOAPIC: errors, modes, bases, who may send what where.

use core::ptr;

use crate::apic::{self, ApicBase, LOCAL_APIC_ADDRESS, Register, SPURIOUS_VECTOR, pic};
use crate::console::{COM1, register};
use crate::cpu::{self, Leaf1Edx, msr, port};
use crate::interrupts::{
    Frame, count, end_at_apic, hook, only_count, probe_rdmsr, probe_wrmsr, vector,
};
use crate::machine::{Host, Machine, PIC_VECTORS};
use crate::memory::physical_bits;
use crate::time::{self, PIT_HZ, wait_ms};
use crate::{checks, ensure, ensure_eq, skip_if};

use super::Verdict;
use super::interrupts::{
    PATIENCE_MS, TRANSMITTER_EMPTY, await_count, ioapic, isa_route, set_uart_interrupts,
};

checks![
    errors,
    id_register,
    base_moves,
    off_and_on,
    transitions,
    x2apic_refusals,
    nmi_to_self,
    interrupt_pin,
    ioapic_extint,
    ioapic_logical,
    ioapic_level_unmasked,
    eoi_suppression,
];

const VECTOR: u8 = 0x63;
const ERROR_VECTOR: u8 = 0x93;
const LOGICAL: u32 = 1 << 11;
const EXTERNAL: u32 = 7 << 8;
const SEND_ILLEGAL: u32 = 1 << 5;
const RECEIVE_ILLEGAL: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;

/// Number of the LVT entry for corrected machine checks.
const CMCI: u32 = 0x2F;

/// Whether the machine-check banks signal corrected errors, and the local APIC has an entry for that.
fn has_cmci() -> bool {
    probe_rdmsr(msr::MCG_CAP).is_ok_and(|capabilities| capabilities & 1 << 10 != 0)
}

/// The error register: what was wrong shows after a write, and interrupts once until then.
fn errors(machine: &Machine) -> Verdict {
    skip_if!(
        matches!(machine.host, Host::Tcg | Host::Bochs),
        "emulated in part only"
    );
    let local = apic::local();
    let take = || {
        local.write(Register::ErrorStatus, 0);
        local.read(Register::ErrorStatus)
    };
    hook(ERROR_VECTOR, end_at_apic);
    take();
    take();
    local.write(Register::Error, ERROR_VECTOR.into());
    local.send_self(5);
    cpu::take_interrupts();
    ensure_eq!(
        local.read(Register::ErrorStatus),
        0,
        "errors before a write"
    );
    let errors = take();
    ensure!(errors & SEND_ILLEGAL != 0, "a bad vector sent: {errors:#x}");
    ensure_eq!(take(), 0, "errors after another write");
    ensure_eq!(count(ERROR_VECTOR), 1, "error interrupts");
    // A register that is none.
    local.read_at(0x40);
    cpu::take_interrupts();
    ensure_eq!(take(), ILLEGAL_REGISTER, "no such register");
    ensure_eq!(count(ERROR_VECTOR), 2, "error interrupts");
    if !has_cmci() {
        local.read_at((CMCI << 4) as u16);
        cpu::take_interrupts();
        ensure_eq!(take(), ILLEGAL_REGISTER, "a CMCI entry without CMCI");
    }
    // A timer with a bad vector.
    local.write(Register::Timer, 3);
    local.write(Register::InitialCount, 1);
    let seen = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
        take() & RECEIVE_ILLEGAL != 0
    });
    ensure!(seen, "a bad vector in the LVT goes unnoticed");
    cpu::take_interrupts();
    Ok(())
}

/// Writing the xAPIC ID either changes it, and then it is what interrupts find, or does nothing.
fn id_register(machine: &Machine) -> Verdict {
    let local = apic::local();
    let id = local.id();
    let other = 0x7D;
    local.write(Register::Id, other << 24);
    let now = local.id();
    hook(VECTOR, end_at_apic);
    local.command(apic::ASSERT | u32::from(VECTOR), now);
    cpu::take_interrupts();
    local.write(Register::Id, id << 24);
    ensure!(now == id || now == other, "id {now:#x}");
    ensure!(
        machine.host != Host::Plinth || now == other,
        "the id does not change"
    );
    ensure_eq!(count(VECTOR), 1, "interrupts by that id");
    ensure_eq!(local.id(), id, "the id at the end");
    Ok(())
}

fn read_page(base: u64, register: Register) -> u32 {
    let address = ptr::with_exposed_provenance::<u32>((base + register as u64) as usize);
    // SAFETY: device space, mapped one to one, with nothing behind it but an APIC.
    unsafe { address.read_volatile() }
}

fn write_page(base: u64, register: Register, value: u32) {
    let address = ptr::with_exposed_provenance_mut::<u32>((base + register as u64) as usize);
    // SAFETY: device space, mapped one to one, with nothing behind it but an APIC.
    unsafe { address.write_volatile(value) };
}

/// The registers are where APIC_BASE says, and nowhere else.
fn base_moves(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, "QEMU's APIC stays");
    let old = LOCAL_APIC_ADDRESS;
    let new = old + 0x3000;
    let version = apic::local().read(Register::Version);
    let flags = cpu::rdmsr(msr::APIC_BASE) & 0xFFF;
    hook(VECTOR, end_at_apic);
    // SAFETY: nothing else is at the new place.
    unsafe { cpu::wrmsr(msr::APIC_BASE, new | flags) };
    let (there, here) = (
        read_page(new, Register::Version),
        read_page(old, Register::Version),
    );
    let icr = apic::SELF_SHORTHAND | apic::ASSERT | u32::from(VECTOR);
    write_page(new, Register::Command, icr);
    let requested = read_page(new, Register::Request) != u32::MAX;
    // SAFETY: back to where it was.
    unsafe { cpu::wrmsr(msr::APIC_BASE, old | flags) };
    cpu::take_interrupts();
    ensure_eq!(there, version, "version at the new place");
    ensure!(here != version, "the old place answers");
    ensure!(requested, "no request register at the new place");
    ensure_eq!(count(VECTOR), 1, "interrupts sent at the new place");
    ensure_eq!(
        apic::local().read(Register::Version),
        version,
        "version at the old place"
    );
    Ok(())
}

fn write_base(mode: ApicBase) -> Result<(), Option<u8>> {
    let keep = cpu::rdmsr(msr::APIC_BASE) & !(ApicBase::ENABLE | ApicBase::EXTD).bits();
    // SAFETY: the address stays; a refusal is caught.
    let outcome = unsafe { probe_wrmsr(msr::APIC_BASE, keep | mode.bits()) };
    outcome.map_err(|trap| Some(trap.vector))
}

/// Off, the APIC is not there: not for CPUID, not in memory. CR8 is. On again, it is as after reset.
fn off_and_on(machine: &Machine) -> Verdict {
    // Bochs (2.7) keeps it off.
    skip_if!(machine.host == Host::Bochs, "Bochs' APIC stays off");
    skip_if!(machine.host == Host::Tcg, "QEMU's APIC stays on");
    let version = apic::local().read(Register::Version);
    apic::local().write(Register::LogicalDestination, 0x55 << 24);
    let _ = write_base(ApicBase::empty());
    let shown = cpu::leaf1_edx().contains(Leaf1Edx::APIC);
    let read = read_page(LOCAL_APIC_ADDRESS, Register::Version);
    write_page(LOCAL_APIC_ADDRESS, Register::TaskPriority, 0x70);
    // SAFETY: only holds interrupts back.
    unsafe { cpu::set_cr8(9) };
    let class = cpu::cr8();
    // SAFETY: as before.
    unsafe { cpu::set_cr8(0) };
    let _ = write_base(ApicBase::ENABLE);
    ensure!(!shown, "CPUID shows an APIC that is off");
    ensure!(read != version, "an APIC that is off answers");
    ensure_eq!(class, 9, "CR8 while off");
    ensure!(
        cpu::leaf1_edx().contains(Leaf1Edx::APIC),
        "CPUID shows no APIC"
    );
    let local = apic::local();
    ensure_eq!(local.read(Register::Spurious), 0xFF, "spurious register");
    ensure_eq!(
        local.read(Register::LogicalDestination),
        0,
        "logical destination"
    );
    ensure_eq!(local.read(Register::Lint0), apic::MASKED, "LINT0");
    Ok(())
}

/// From mode to mode (SDM vol. 3, figure 12-27), and what is refused on the way.
fn transitions(machine: &Machine) -> Verdict {
    skip_if!(!machine.x2apic(), "no x2APIC");
    skip_if!(machine.host == Host::Bochs, "Bochs' APIC stays off");
    const GP: Result<(), Option<u8>> = Err(Some(vector::GENERAL_PROTECTION));
    let (off, xapic, x2apic, none) = (
        ApicBase::empty(),
        ApicBase::ENABLE,
        ApicBase::ENABLE | ApicBase::EXTD,
        ApicBase::EXTD,
    );
    let base = cpu::rdmsr(msr::APIC_BASE);
    for bit in [0, 7, 9, physical_bits(), 63] {
        // SAFETY: refused, and caught.
        let outcome = unsafe { probe_wrmsr(msr::APIC_BASE, base | 1 << bit) };
        let vector = outcome.err().map(|trap| trap.vector);
        ensure!(
            vector == Some(vector::GENERAL_PROTECTION),
            "reserved bit {bit}: {vector:?}"
        );
    }
    let steps = [
        (xapic, none, GP),
        (xapic, xapic, Ok(())),
        (xapic, off, Ok(())),
        (off, x2apic, GP),
        (off, none, GP),
        (off, xapic, Ok(())),
        (xapic, x2apic, Ok(())),
        (x2apic, xapic, GP),
        (x2apic, none, GP),
        (x2apic, x2apic, Ok(())),
        (x2apic, off, Ok(())),
        (off, xapic, Ok(())),
    ];
    let mut wrong = None;
    for (from, to, wanted) in steps {
        let got = write_base(to);
        if got != wanted && wrong.is_none() {
            wrong = Some((from, to, got));
        }
    }
    ensure_eq!(cpu::rdmsr(msr::APIC_BASE), base, "APIC base at the end");
    ensure!(wrong.is_none(), "from, to, outcome: {wrong:?}");
    Ok(())
}

/// What x2APIC mode answers with #GP: reserved bits, read-only and reserved registers.
fn x2apic_refusals(machine: &Machine) -> Verdict {
    skip_if!(!machine.x2apic(), "no x2APIC");
    skip_if!(
        matches!(machine.host, Host::Tcg | Host::Bochs),
        "emulated in part only"
    );
    apic::local().enter_x2apic();
    let mut wrong = None;
    for (register, value) in [
        (0x08, 0x100_u64),
        (0x0D, 1),
        (0x0F, 0x1_01FF),
        (0x10, 0),
        (0x18, 0),
        (0x20, 0),
        (0x28, 1),
        (0x30, 1 << 12 | 0x4041),
        (0x30, 1 << 20 | 0x4041),
        (0x32, 1 << 19 | 1 << 16),
        (0x35, 1 << 11 | 1 << 16),
        (0x39, 0),
        (0x3E, 1 << 2),
        (0x3F, 0x141),
        (0x38, 1 << 32),
        (0x40, 0),
        (0xFF, 0),
    ] {
        // SAFETY: refused, and caught.
        let outcome = unsafe { probe_wrmsr(msr::X2APIC + register, value) };
        if outcome.err().map(|trap| trap.vector) != Some(vector::GENERAL_PROTECTION) {
            wrong.get_or_insert(("write", register));
        }
    }
    if !has_cmci() {
        // SAFETY: refused, and caught.
        let outcome = unsafe { probe_wrmsr(msr::X2APIC + CMCI, 1 << 16) };
        if outcome.is_ok() || probe_rdmsr(msr::X2APIC + CMCI).is_ok() {
            wrong.get_or_insert(("CMCI entry", CMCI));
        }
    }
    for register in [0x00, 0x04, 0x0B, 0x0E, 0x29, 0x31, 0x3A, 0x40, 0xFF] {
        let outcome = probe_rdmsr(msr::X2APIC + register);
        if outcome.err().map(|trap| trap.vector) != Some(vector::GENERAL_PROTECTION) {
            wrong.get_or_insert(("read", register));
        }
    }
    apic::local().enter_xapic();
    // In xAPIC mode there is none of them.
    if probe_rdmsr(msr::X2APIC + 2).is_ok() {
        wrong.get_or_insert(("read in xAPIC mode", 2));
    }
    ensure!(wrong.is_none(), "passes: {wrong:x?}");
    Ok(())
}

/// An NMI to oneself, by id; within its handler the next one waits.
fn nmi_to_self(_: &Machine) -> Verdict {
    fn again(_: &mut Frame) {
        if count(vector::NMI) == 1 {
            let local = apic::local();
            local.command(apic::DELIVER_NMI | apic::ASSERT, local.id());
            local.command(apic::DELIVER_NMI | apic::ASSERT, local.id());
        }
    }
    hook(vector::NMI, again);
    let local = apic::local();
    local.command(apic::DELIVER_NMI | apic::ASSERT, local.id());
    for _ in 0..100 {
        cpu::tsc();
    }
    // Of the two sent within the handler one is kept.
    ensure_eq!(count(vector::NMI), 2, "NMIs");
    hook(vector::NMI, only_count);
    Ok(())
}

/// The 8259's output as an interrupt of LINT0's own vector: an edge.
fn interrupt_pin(machine: &Machine) -> Verdict {
    skip_if!(
        matches!(machine.host, Host::Tcg | Host::Bochs),
        "emulated in part only"
    );
    hook(VECTOR, end_at_apic);
    apic::local().write(Register::Lint0, VECTOR.into());
    time::pit_periodic((PIT_HZ / 1000) as u16);
    pic::set_masks(!1);
    await_count(machine, VECTOR, 1)?;
    // The 8259's request stays: nobody acknowledges it.
    cpu::sti();
    time::spin_us(machine.tsc_hz, 3_000);
    cpu::cli();
    ensure_eq!(count(VECTOR), 1, "interrupts for one edge");
    pic::set_masks(0xFFFF);
    pic::set_masks(!1);
    await_count(machine, VECTOR, 2)
}

fn end_at_pic(_: &mut Frame) {
    pic::end();
}

/// The 8259's output at the IOAPIC's first pin: a message for the processor to ask the 8259.
fn ioapic_extint(machine: &Machine) -> Verdict {
    skip_if!(machine.host != Host::Plinth, "not wired so everywhere");
    let ioapic = ioapic(machine)?;
    hook(PIC_VECTORS, end_at_pic);
    ioapic.route(0, EXTERNAL, apic::local().id());
    time::pit_periodic((PIT_HZ / 1000) as u16);
    pic::set_masks(!1);
    let outcome = await_count(machine, PIC_VECTORS, 5);
    pic::set_masks(0xFFFF);
    outcome
}

/// Redirection by logical id, to all of them and to the one with the lowest priority.
fn ioapic_logical(machine: &Machine) -> Verdict {
    const LOWEST_PRIORITY: u32 = 1 << 8;
    let ioapic = ioapic(machine)?;
    let local = apic::local();
    local.write(Register::DestinationFormat, u32::MAX);
    local.write(Register::LogicalDestination, 0x01 << 24);
    let (pin, flags) = isa_route(machine, 0, VECTOR);
    hook(VECTOR, end_at_apic);
    let mut wanted = 0;
    for mode in [0, LOWEST_PRIORITY] {
        ioapic.route(pin, flags | LOGICAL | mode, 0x03);
        time::pit_periodic((PIT_HZ / 1000) as u16);
        wanted = count(VECTOR) + 3;
        await_count(machine, VECTOR, wanted)?;
    }
    time::pit_stop();
    cpu::take_interrupts();
    let before = count(VECTOR);
    ensure!(before >= wanted, "interrupts");
    ioapic.route(pin, flags | LOGICAL, 0x02);
    time::pit_periodic((PIT_HZ / 1000) as u16);
    cpu::sti();
    time::spin_us(machine.tsc_hz, 5_000);
    cpu::cli();
    ensure_eq!(count(VECTOR), before, "interrupts for another logical id");
    Ok(())
}

/// A level that came while masked is delivered when the mask goes; one that went is not.
fn ioapic_level_unmasked(machine: &Machine) -> Verdict {
    // Bochs (2.7) delivers a level once.
    skip_if!(machine.host == Host::Bochs, "Bochs has no remote IRR");
    fn stop(_: &mut Frame) {
        set_uart_interrupts(0);
        apic::local().end_of_interrupt();
    }
    let ioapic = ioapic(machine)?;
    let (pin, _) = isa_route(machine, 4, VECTOR);
    let flags = apic::LEVEL | u32::from(VECTOR);
    crate::console::drain();
    hook(VECTOR, stop);
    ioapic.route(pin, flags | apic::MASKED, apic::local().id());
    set_uart_interrupts(TRANSMITTER_EMPTY);
    cpu::take_interrupts();
    let masked = count(VECTOR);
    ioapic.route(pin, flags, apic::local().id());
    let outcome = await_count(machine, VECTOR, 1);
    ioapic.route(pin, flags | apic::MASKED, apic::local().id());
    set_uart_interrupts(TRANSMITTER_EMPTY);
    set_uart_interrupts(0);
    ioapic.route(pin, flags, apic::local().id());
    cpu::take_interrupts();
    set_uart_interrupts(0);
    outcome?;
    ensure_eq!(masked, 0, "interrupts while masked");
    ensure_eq!(count(VECTOR), 1, "interrupts at the end");
    Ok(())
}

/// With broadcasts suppressed, a level waits until the IOAPIC itself is told of the end.
fn eoi_suppression(machine: &Machine) -> Verdict {
    const SUPPRESS: u32 = 1 << 12;
    let local = apic::local();
    skip_if!(
        local.read(Register::Version) & 1 << 24 == 0,
        "no suppression of EOI broadcasts"
    );
    let ioapic = ioapic(machine)?;
    skip_if!(
        ioapic.read(apic::IOAPIC_VERSION) & 0xFF < 0x20,
        "no EOI register"
    );
    let (pin, _) = isa_route(machine, 4, VECTOR);
    crate::console::drain();
    hook(VECTOR, end_at_apic);
    local.write(
        Register::Spurious,
        SUPPRESS | apic::SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR),
    );
    ioapic.route(pin, apic::LEVEL | u32::from(VECTOR), local.id());
    set_uart_interrupts(TRANSMITTER_EMPTY);
    let first = await_count(machine, VECTOR, 1);
    let waiting = ioapic.entry(pin);
    // Reading says why, and the line falls; enabled anew, it rises.
    port::read8(COM1 + register::INTERRUPT_ID);
    set_uart_interrupts(0);
    set_uart_interrupts(TRANSMITTER_EMPTY);
    cpu::take_interrupts();
    let suppressed = count(VECTOR);
    ioapic.end(VECTOR);
    let second = await_count(machine, VECTOR, 2);
    set_uart_interrupts(0);
    ioapic.end(VECTOR);
    let done = ioapic.entry(pin);
    local.quiet();
    first?;
    ensure!(
        waiting & apic::REMOTE_IRR != 0,
        "remote IRR is clear after a suppressed EOI"
    );
    ensure_eq!(suppressed, 1, "interrupts before the IOAPIC's EOI");
    second?;
    ensure_eq!(done & apic::REMOTE_IRR, 0, "remote IRR at the end");
    Ok(())
}
