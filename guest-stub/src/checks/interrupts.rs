//! Interrupts and clocks: PICs, PIT, IOAPIC, local APIC, x2APIC, RTC, PM timer.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::apic::{self, IoApic, Register, SPURIOUS_VECTOR, pic};
use crate::console::{COM1, register};
use crate::cpu::{self, Leaf1Ecx, msr, port};
use crate::interrupts::{
    Frame, arrived, count, end_at_apic, hook, probe_rdmsr, probe_wrmsr, reset_counts, vector,
};
use crate::machine::{Host, Machine, PIC_VECTORS};
use crate::time::{self, PIT_HZ, PM_TIMER_HZ, PitStopwatch, bracket, rtc, wait_ms};
use crate::{checks, ensure, ensure_eq, fail, skip, skip_if};

use super::{Verdict, Why};

checks![
    pic_masks,
    pic_timer,
    pic_end_of_interrupt,
    ioapic_timer,
    ioapic_mask,
    ioapic_level,
    self_ipi,
    ipi_by_id,
    priorities,
    task_priority,
    cr8,
    nested,
    spurious_register,
    halt_wakes,
    timer_one_shot,
    timer_periodic,
    timer_masked,
    timer_deadline,
    pit_modes,
    clocks_agree,
    rtc_time,
    uart_transmit,
    x2apic,
];

/// Vectors used here: the higher, the more urgent.
const LOW: u8 = 0x41;
const MIDDLE: u8 = 0x61;
const HIGH: u8 = 0x81;
const TIMER: u8 = 0x55;

/// A tenth of a second is plenty for what takes a millisecond, even on a busy emulator.
pub(super) const PATIENCE_MS: u64 = 1000;

/// Waits with interrupts on, spinning, until a vector came so often.
pub(super) fn await_count(machine: &Machine, index: u8, wanted: u32) -> Verdict {
    cpu::sti();
    let came = wait_ms(machine.tsc_hz, PATIENCE_MS, || count(index) >= wanted);
    cpu::cli();
    ensure!(
        came,
        "vector {index:#x} came {} times in a second, not {wanted}",
        count(index)
    );
    Ok(())
}

/// Waits in HLT until the condition holds, looked at every millisecond or so; says whether it came to
/// hold. For what takes long: a halted processor costs its host nothing.
pub(super) fn wait_halting(
    machine: &Machine,
    milliseconds: u64,
    mut condition: impl FnMut() -> bool,
) -> bool {
    const TICK: u8 = 0x33;
    let local = apic::local();
    hook(TICK, end_at_apic);
    local.write(Register::Timer, apic::PERIODIC | u32::from(TICK));
    local.write(Register::InitialCount, 1_000_000);
    let mut limit = time::Limit::after_ms(machine.tsc_hz, milliseconds);
    let mut holds = condition();
    while !holds && limit.open() {
        cpu::wait_for_interrupt();
        holds = condition();
    }
    local.write(Register::InitialCount, 0);
    local.write(Register::Timer, apic::MASKED | u32::from(TICK));
    cpu::take_interrupts();
    holds
}

fn pic_masks(_: &Machine) -> Verdict {
    for masks in [0xFFFF, 0x0000, 0xA55A, 0xFFFF] {
        pic::set_masks(masks);
        ensure_eq!(pic::masks(), masks, "masks");
    }
    Ok(())
}

fn end_at_pic(_: &mut Frame) {
    pic::end();
}

/// The PIC's interrupts pass LINT0 of the local APIC as ExtINT.
fn route_pic_to_processor() {
    const EXTERNAL: u32 = 7 << 8;
    apic::local().write(Register::Lint0, EXTERNAL);
}

/// PIT to PIC: IRQ 0 comes at the vector set by the PIC's initialization, again after each EOI.
fn pic_timer(machine: &Machine) -> Verdict {
    route_pic_to_processor();
    hook(PIC_VECTORS, end_at_pic);
    time::pit_periodic((PIT_HZ / 1000) as u16);
    pic::set_masks(!1);
    await_count(machine, PIC_VECTORS, 5)?;
    pic::set_masks(0xFFFF);
    ensure_eq!(pic::in_service(), 0, "in service at the end");
    Ok(())
}

/// The next tick is requested meanwhile, and waits for the end of the one in service.
fn pic_end_of_interrupt(machine: &Machine) -> Verdict {
    route_pic_to_processor();
    hook(PIC_VECTORS, crate::interrupts::only_count);
    time::pit_periodic((PIT_HZ / 2000) as u16);
    pic::set_masks(!1);
    await_count(machine, PIC_VECTORS, 1)?;
    ensure_eq!(pic::in_service() & 1, 1, "IRQ 0 in service");
    let again = wait_ms(machine.tsc_hz, PATIENCE_MS, || pic::requested() & 1 != 0);
    ensure!(again, "the second tick is not requested");
    cpu::take_interrupts();
    ensure_eq!(count(PIC_VECTORS), 1, "interrupts before EOI");
    pic::end();
    cpu::take_interrupts();
    ensure!(count(PIC_VECTORS) >= 2, "no interrupt after EOI");
    pic::set_masks(0xFFFF);
    pic::end();
    Ok(())
}

pub(super) fn ioapic(machine: &Machine) -> Result<IoApic, Why> {
    machine.ioapic.ok_or(Why::Skipped("no IOAPIC"))
}

/// Flags of a redirection entry for an ISA interrupt, and its pin, by the MADT.
pub(super) fn isa_route(machine: &Machine, irq: u8, vector: u8) -> (u8, u32) {
    let madt = machine.acpi.and_then(|acpi| acpi.madt).unwrap_or_default();
    let (pin, active_low, level) = madt.isa_pin(irq);
    let mut flags = u32::from(vector);
    if active_low {
        flags |= apic::ACTIVE_LOW;
    }
    if level {
        flags |= apic::LEVEL;
    }
    (pin, flags)
}

/// PIT to IOAPIC, at the pin that the MADT says.
fn ioapic_timer(machine: &Machine) -> Verdict {
    let ioapic = ioapic(machine)?;
    let (pin, flags) = isa_route(machine, 0, TIMER);
    hook(TIMER, end_at_apic);
    ioapic.route(pin, flags, apic::local().id());
    time::pit_periodic((PIT_HZ / 1000) as u16);
    await_count(machine, TIMER, 5)
}

/// A masked entry delivers nothing.
fn ioapic_mask(machine: &Machine) -> Verdict {
    let ioapic = ioapic(machine)?;
    let (pin, flags) = isa_route(machine, 0, TIMER);
    hook(TIMER, end_at_apic);
    ioapic.route(pin, flags | apic::MASKED, apic::local().id());
    time::pit_periodic((PIT_HZ / 1000) as u16);
    cpu::sti();
    time::spin_us(machine.tsc_hz, 5_000);
    cpu::cli();
    ensure_eq!(count(TIMER), 0, "interrupts through a masked entry");
    Ok(())
}

/// Interrupt enable of the UART: transmitter empty.
pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 1;

pub(super) fn set_uart_interrupts(enable: u8) {
    port::write8(COM1 + register::INTERRUPT_ENABLE, enable);
}

/// Ends the interrupt; only at the third does it take the cause away.
fn end_level(_: &mut Frame) {
    if count(TIMER) >= 3 {
        set_uart_interrupts(0);
    }
    apic::local().end_of_interrupt();
}

/// A level-triggered interrupt comes again after EOI as long as its line is up, and has remote
/// IRR set meanwhile.
fn ioapic_level(machine: &Machine) -> Verdict {
    static REMOTE_IRR: AtomicU32 = AtomicU32::new(0);
    // Bochs (2.7) delivers a level once.
    skip_if!(machine.host == Host::Bochs, "Bochs has no remote IRR");
    let ioapic = ioapic(machine)?;
    let (pin, _) = isa_route(machine, 4, TIMER);
    crate::console::drain();
    hook(TIMER, end_level);
    ioapic.route(pin, apic::LEVEL | u32::from(TIMER), apic::local().id());
    set_uart_interrupts(TRANSMITTER_EMPTY);
    // Accepted by the local APIC, not taken by the processor yet.
    let accepted = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
        apic::local().vector_bit(Register::Request, TIMER)
    });
    REMOTE_IRR.store(ioapic.entry(pin), Relaxed);
    let level = apic::local().vector_bit(Register::TriggerMode, TIMER);
    let outcome = await_count(machine, TIMER, 3);
    cpu::sti();
    time::spin_us(machine.tsc_hz, 2_000);
    cpu::cli();
    set_uart_interrupts(0);
    ensure!(accepted, "the interrupt is not requested");
    outcome?;
    ensure!(
        REMOTE_IRR.load(Relaxed) & apic::REMOTE_IRR != 0,
        "remote IRR is clear while pending"
    );
    ensure!(level, "the trigger mode register says edge");
    ensure_eq!(
        count(TIMER),
        3,
        "interrupts, the third of which took the cause away"
    );
    ensure_eq!(
        ioapic.entry(pin) & apic::REMOTE_IRR,
        0,
        "remote IRR after EOI"
    );
    Ok(())
}

/// The UART says why it interrupts, once.
fn uart_transmit(machine: &Machine) -> Verdict {
    const REASON: u8 = 0xF;
    const HOLDING_EMPTY: u8 = 0b0010;
    const NONE: u8 = 0b0001;
    let ioapic = ioapic(machine)?;
    let (pin, flags) = isa_route(machine, 4, TIMER);
    crate::console::drain();
    hook(TIMER, end_at_apic);
    ioapic.route(pin, flags, apic::local().id());
    set_uart_interrupts(TRANSMITTER_EMPTY);
    let outcome = await_count(machine, TIMER, 1);
    let first = port::read8(COM1 + register::INTERRUPT_ID) & REASON;
    let second = port::read8(COM1 + register::INTERRUPT_ID) & REASON;
    set_uart_interrupts(0);
    outcome?;
    ensure_eq!(first, HOLDING_EMPTY, "interrupt identification");
    ensure_eq!(second, NONE, "interrupt identification, read again");
    Ok(())
}

/// Interrupts to oneself, one by one, each in service while its handler runs.
fn self_ipi(_: &Machine) -> Verdict {
    static IN_SERVICE: AtomicU32 = AtomicU32::new(0);
    fn look(_: &mut Frame) {
        let local = apic::local();
        let yes = local.vector_bit(Register::InService, MIDDLE);
        IN_SERVICE.fetch_add(yes.into(), Relaxed);
        local.end_of_interrupt();
    }
    IN_SERVICE.store(0, Relaxed);
    hook(MIDDLE, look);
    let local = apic::local();
    for turn in 1..=10 {
        local.send_self(MIDDLE);
        ensure!(
            local.vector_bit(Register::Request, MIDDLE),
            "not requested in turn {turn}"
        );
        ensure_eq!(count(MIDDLE), turn - 1, "interrupts taken with IF clear");
        cpu::take_interrupts();
        ensure_eq!(count(MIDDLE), turn, "interrupts taken");
        ensure!(
            !local.vector_bit(Register::InService, MIDDLE),
            "in service after EOI"
        );
    }
    ensure_eq!(
        IN_SERVICE.load(Relaxed),
        10,
        "handlers that saw themselves in service"
    );
    Ok(())
}

/// By APIC id, and by logical id.
fn ipi_by_id(_: &Machine) -> Verdict {
    const LOGICAL: u32 = 1 << 11;
    let local = apic::local();
    hook(MIDDLE, end_at_apic);
    local.command(apic::ASSERT | u32::from(MIDDLE), local.id());
    cpu::take_interrupts();
    ensure_eq!(count(MIDDLE), 1, "interrupts by APIC id");
    local.write(Register::DestinationFormat, u32::MAX);
    local.write(Register::LogicalDestination, 0x04 << 24);
    local.command(apic::ASSERT | LOGICAL | u32::from(MIDDLE), 0x06);
    cpu::take_interrupts();
    ensure_eq!(count(MIDDLE), 2, "interrupts by logical id");
    local.command(apic::ASSERT | LOGICAL | u32::from(MIDDLE), 0x02);
    cpu::take_interrupts();
    ensure_eq!(count(MIDDLE), 2, "interrupts for another logical id");
    Ok(())
}

/// Of several pending interrupts the highest vector comes first.
fn priorities(_: &Machine) -> Verdict {
    for vector in [MIDDLE, LOW, HIGH] {
        hook(vector, end_at_apic);
        apic::local().send_self(vector);
    }
    cpu::take_interrupts();
    let order = [arrived(0), arrived(1), arrived(2)];
    ensure!(
        order == [Some(HIGH), Some(MIDDLE), Some(LOW)],
        "order {order:x?}"
    );
    Ok(())
}

/// The task priority register holds back its class and those below.
fn task_priority(_: &Machine) -> Verdict {
    let local = apic::local();
    for vector in [LOW, MIDDLE, HIGH] {
        hook(vector, end_at_apic);
        local.send_self(vector);
    }
    local.write(Register::TaskPriority, MIDDLE.into());
    ensure_eq!(
        local.read(Register::ProcessorPriority),
        MIDDLE.into(),
        "processor priority"
    );
    cpu::take_interrupts();
    let taken = [count(LOW), count(MIDDLE), count(HIGH)];
    ensure!(
        taken == [0, 0, 1],
        "taken with the middle priority: {taken:?}"
    );
    local.write(Register::TaskPriority, 0);
    cpu::take_interrupts();
    let taken = [count(LOW), count(MIDDLE), count(HIGH)];
    ensure!(taken == [1, 1, 1], "taken with no priority: {taken:?}");
    Ok(())
}

/// CR8 is the upper half of the task priority.
fn cr8(_: &Machine) -> Verdict {
    let local = apic::local();
    hook(MIDDLE, end_at_apic);
    for class in 0..16 {
        // SAFETY: only holds interrupts back.
        unsafe { cpu::set_cr8(class) };
        ensure_eq!(
            u64::from(local.read(Register::TaskPriority)),
            class << 4,
            "TPR for CR8 {class}"
        );
        ensure_eq!(cpu::cr8(), class, "CR8");
    }
    local.write(Register::TaskPriority, 0x60);
    ensure_eq!(cpu::cr8(), 6, "CR8 for TPR 0x60");
    local.send_self(MIDDLE);
    cpu::take_interrupts();
    ensure_eq!(count(MIDDLE), 0, "interrupts held back by CR8");
    // Lowering CR8 with interrupts on lets it in at once.
    // SAFETY: the handler only counts.
    unsafe { asm!("sti", "nop", "mov cr8, {}", "nop", "cli", in(reg) 5_u64) };
    ensure_eq!(count(MIDDLE), 1, "interrupts after lowering CR8");
    // Lowered while nothing can be taken, and raised again: it waits on.
    local.write(Register::TaskPriority, 0x65);
    local.send_self(MIDDLE);
    // SAFETY: only holds interrupts back, or not.
    unsafe { cpu::set_cr8(6) };
    ensure_eq!(
        local.read(Register::TaskPriority),
        0x60,
        "TPR after CR8 = 6"
    );
    // SAFETY: as above.
    unsafe {
        cpu::set_cr8(5);
        cpu::set_cr8(9);
    };
    cpu::take_interrupts();
    ensure_eq!(count(MIDDLE), 1, "interrupts after raising CR8 again");
    // SAFETY: the handler only counts.
    unsafe { asm!("sti", "nop", "mov cr8, {}", "nop", "cli", in(reg) 0_u64) };
    ensure_eq!(count(MIDDLE), 2, "interrupts after lowering CR8 again");
    // SAFETY: its value before.
    unsafe { cpu::set_cr8(0) };
    Ok(())
}

/// A handler that turns interrupts on is interrupted by higher vectors, not by lower ones.
fn nested(_: &Machine) -> Verdict {
    fn open(_: &mut Frame) {
        let local = apic::local();
        local.send_self(LOW);
        local.send_self(HIGH);
        cpu::take_interrupts();
        INSIDE.store(count(LOW) << 8 | count(HIGH), Relaxed);
        local.end_of_interrupt();
    }
    static INSIDE: AtomicU32 = AtomicU32::new(0);
    hook(LOW, end_at_apic);
    hook(HIGH, end_at_apic);
    hook(MIDDLE, open);
    apic::local().send_self(MIDDLE);
    cpu::take_interrupts();
    ensure_eq!(
        INSIDE.load(Relaxed),
        0x0001,
        "low and high interrupts within the middle one"
    );
    ensure_eq!(count(LOW), 1, "low interrupts at the end");
    Ok(())
}

/// With the APIC off by software, LVTs are masked and stay so.
fn spurious_register(machine: &Machine) -> Verdict {
    let local = apic::local();
    local.write(Register::Spurious, SPURIOUS_VECTOR.into());
    local.write(Register::Timer, TIMER.into());
    let entry = local.read(Register::Timer);
    local.write(
        Register::Spurious,
        apic::SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR),
    );
    // QEMU (7.2) lets the mask be cleared.
    let masked = entry & apic::MASKED != 0 || machine.host == Host::Tcg;
    ensure!(masked, "timer entry with the APIC off: {entry:#x}");
    let spurious = local.read(Register::Spurious);
    ensure_eq!(
        spurious,
        apic::SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR),
        "spurious register"
    );
    Ok(())
}

/// HLT ends with a pending interrupt at once, and with a timer later.
fn halt_wakes(_: &Machine) -> Verdict {
    let local = apic::local();
    hook(MIDDLE, end_at_apic);
    local.send_self(MIDDLE);
    cpu::wait_for_interrupt();
    ensure_eq!(count(MIDDLE), 1, "interrupts that ended HLT");
    hook(TIMER, end_at_apic);
    local.write(Register::Timer, TIMER.into());
    for turn in 1..=5 {
        local.write(Register::InitialCount, 200_000);
        while count(TIMER) < turn {
            cpu::wait_for_interrupt();
        }
        ensure_eq!(count(TIMER), turn, "timer interrupts");
        ensure_eq!(local.read(Register::CurrentCount), 0, "count after expiry");
    }
    Ok(())
}

/// One interrupt per count written, and the count goes down to zero and stays there.
fn timer_one_shot(machine: &Machine) -> Verdict {
    let local = apic::local();
    hook(TIMER, end_at_apic);
    local.write(Register::Timer, TIMER.into());
    local.write(Register::InitialCount, u32::MAX);
    let first = local.read(Register::CurrentCount);
    time::spin_us(machine.tsc_hz, 100);
    let second = local.read(Register::CurrentCount);
    ensure!(
        second < first,
        "the count goes from {first:#x} to {second:#x}"
    );
    local.write(Register::InitialCount, 50_000);
    await_count(machine, TIMER, 1)?;
    cpu::sti();
    time::spin_us(machine.tsc_hz, 2_000);
    cpu::cli();
    ensure_eq!(count(TIMER), 1, "interrupts of a one-shot timer");
    ensure_eq!(local.read(Register::CurrentCount), 0, "count after expiry");
    // The divider slows it down. A busy emulator can spoil a measurement, not ten.
    const DIVIDE_BY_16: u32 = 0b0011;
    let (mut fast, mut slow) = (0, 0);
    for _ in 0..10 {
        fast = rate_with(machine, apic::DIVIDE_BY_1);
        slow = rate_with(machine, DIVIDE_BY_16);
        if (15 * slow..=17 * slow).contains(&fast) && slow > 0 {
            return Ok(());
        }
    }
    fail!("rates: {fast} divided by 1, {slow} divided by 16")
}

/// Ticks of the APIC timer per million of TSC ticks.
fn rate_with(machine: &Machine, divider: u32) -> u64 {
    let local = apic::local();
    let read = || local.read(Register::CurrentCount).into();
    local.write(Register::Divide, divider);
    local.write(Register::InitialCount, u32::MAX);
    let (start, start_tsc, _) = bracket(read);
    time::spin_us(machine.tsc_hz, 2_000);
    let (end, end_tsc, _) = bracket(read);
    local.write(Register::InitialCount, 0);
    local.write(Register::Divide, apic::DIVIDE_BY_1);
    start.saturating_sub(end) * 1_000_000 / (end_tsc - start_tsc).max(1)
}

/// A periodic timer goes on by itself.
fn timer_periodic(machine: &Machine) -> Verdict {
    let local = apic::local();
    hook(TIMER, end_at_apic);
    local.write(Register::Timer, apic::PERIODIC | u32::from(TIMER));
    // At 1 GHz or less: 1 ms or more.
    local.write(Register::InitialCount, 1_000_000);
    await_count(machine, TIMER, 5)?;
    local.write(Register::InitialCount, 0);
    cpu::take_interrupts();
    let at_stop = count(TIMER);
    cpu::sti();
    time::spin_us(machine.tsc_hz, 5_000);
    cpu::cli();
    ensure_eq!(
        count(TIMER),
        at_stop,
        "interrupts after the timer was stopped"
    );
    Ok(())
}

/// A masked timer counts, and does not interrupt.
fn timer_masked(machine: &Machine) -> Verdict {
    let local = apic::local();
    hook(TIMER, end_at_apic);
    local.write(Register::Timer, apic::MASKED | u32::from(TIMER));
    local.write(Register::InitialCount, 1000);
    cpu::sti();
    let expired = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
        local.read(Register::CurrentCount) == 0
    });
    cpu::cli();
    ensure!(expired, "the count does not reach zero");
    ensure_eq!(count(TIMER), 0, "interrupts of a masked timer");
    Ok(())
}

/// The timer expires when the TSC gets there, not before, and its MSR is zero afterwards.
fn timer_deadline(machine: &Machine) -> Verdict {
    skip_if!(
        !cpu::leaf1_ecx().contains(Leaf1Ecx::TSC_DEADLINE),
        "no TSC deadline"
    );
    let local = apic::local();
    hook(TIMER, end_at_apic);
    local.write(Register::Timer, apic::DEADLINE | u32::from(TIMER));
    // SDM vol. 3, 12.5.4.1: the LVT's write must be done before the MSR's.
    // SAFETY: an ordering.
    unsafe { asm!("mfence", options(nostack)) };
    for turn in 1..=5 {
        let deadline = cpu::tsc() + machine.tsc_hz / 2000;
        // SAFETY: arms the timer, whose vector has a gate.
        unsafe { cpu::wrmsr(msr::TSC_DEADLINE, deadline) };
        if turn % 2 == 0 {
            while count(TIMER) < turn {
                cpu::wait_for_interrupt();
            }
        } else {
            await_count(machine, TIMER, turn)?;
        }
        ensure!(cpu::tsc() >= deadline, "before the deadline in turn {turn}");
        // Bochs (2.7) leaves the deadline.
        let left = cpu::rdmsr(msr::TSC_DEADLINE);
        ensure!(
            left == 0 || machine.host == Host::Bochs,
            "deadline after expiry: {left:#x}"
        );
    }
    // A deadline in the past expires at once; zero disarms.
    // SAFETY: as above.
    unsafe { cpu::wrmsr(msr::TSC_DEADLINE, 1) };
    await_count(machine, TIMER, 6)?;
    let mut expected = 6;
    for _ in 0..20 {
        let deadline = cpu::tsc() + machine.tsc_hz / 1000;
        // SAFETY: as above.
        unsafe {
            cpu::wrmsr(msr::TSC_DEADLINE, deadline);
            cpu::wrmsr(msr::TSC_DEADLINE, 0);
        }
        if cpu::tsc() < deadline {
            break;
        }
        // Others had the processor until after the deadline, so the interrupt was due. Try again.
        cpu::sti();
        time::spin_us(machine.tsc_hz, 100);
        cpu::cli();
        expected = count(TIMER);
    }
    cpu::sti();
    time::spin_us(machine.tsc_hz, 3_000);
    cpu::cli();
    ensure_eq!(
        count(TIMER),
        expected,
        "interrupts after the timer was disarmed"
    );
    Ok(())
}

/// Channel 0 counts within its period; a one-shot raises IRQ 0 once.
fn pit_modes(machine: &Machine) -> Verdict {
    time::pit_periodic(20_000);
    // The count is loaded by the next tick of the PIT's clock.
    time::spin_us(machine.tsc_hz, 50);
    for turn in 0..50 {
        let reading = time::pit_count();
        ensure!(
            (1..=20_000).contains(&reading),
            "count {reading} in turn {turn}"
        );
        time::spin_us(machine.tsc_hz, 500);
    }
    let ioapic = ioapic(machine)?;
    let (pin, flags) = isa_route(machine, 0, TIMER);
    time::pit_stop();
    time::spin_us(machine.tsc_hz, 100);
    ioapic.route(pin, flags, apic::local().id());
    hook(TIMER, end_at_apic);
    cpu::take_interrupts();
    reset_counts();
    time::pit_one_shot(2_000);
    await_count(machine, TIMER, 1)?;
    cpu::sti();
    time::spin_us(machine.tsc_hz, 5_000);
    cpu::cli();
    ensure_eq!(count(TIMER), 1, "interrupts of one shot");
    Ok(())
}

/// PIT, PM timer and TSC measure the same stretch alike.
///
/// All three are read close together at both ends of 20 ms, and the readings' own distance is
/// allowed for; a busy emulator then makes a window longer, not wrong.
fn clocks_agree(machine: &Machine) -> Verdict {
    let Some(timer) = machine
        .acpi
        .and_then(|acpi| acpi.fadt)
        .and_then(|fadt| fadt.timer())
    else {
        skip!("no PM timer");
    };
    let (mut last_pit, mut last_tsc) = (0, 0);
    let mut best = u64::MAX;
    for _ in 0..10 {
        let watch = PitStopwatch::start();
        let read_all = || {
            let (pm, pm_tsc, _) = bracket(|| timer.read().into());
            let (pit, pit_tsc) = watch.read();
            (pm as u32, pit, pit_tsc, pit_tsc.saturating_sub(pm_tsc))
        };
        // The first reading warms up what the others use.
        read_all();
        let (pm_start, pit_start, tsc_start, gap_start) = read_all();
        time::spin_us(machine.tsc_hz, 20_000);
        let (pm_end, pit_end, tsc_end, gap_end) = read_all();
        // Nanoseconds by each clock. Between the reading of one and of the next passes the same
        // at both ends, but for what is allowed here.
        let in_ns = |ticks: u64| ticks.saturating_mul(1_000_000_000) / machine.tsc_hz;
        let by_pm = timer.elapsed(pm_start, pm_end) * 1_000_000_000 / PM_TIMER_HZ;
        let by_pit = pit_end.wrapping_sub(pit_start) * 1_000_000_000 / PIT_HZ;
        let by_tsc = in_ns(tsc_end - tsc_start);
        let allowed = in_ns(gap_start.abs_diff(gap_end));
        let largest = by_pm.abs_diff(by_pit).max(by_pm.abs_diff(by_tsc));
        (last_pit, last_tsc) = (by_pit, by_tsc);
        best = best.min(largest.saturating_sub(allowed) * 1000 / by_pm.max(1));
        // One percent.
        if best <= 10 {
            return Ok(());
        }
    }
    fail!("apart by {best}/1000 of the PM timer; at last PIT {last_pit} ns, TSC {last_tsc} ns")
}

/// The date is one, and a second follows the other.
fn rtc_time(machine: &Machine) -> Verdict {
    const VALID: u8 = 1 << 7;
    const UPDATE_ENDED: u8 = 1 << 4;
    ensure!(
        rtc::read(rtc::STATUS_D) & VALID != 0,
        "status D says that the time is not valid"
    );
    let read = |register, hours: bool| {
        let raw = rtc::read(register);
        let twelve = hours && rtc::read(rtc::STATUS_B) & rtc::HOURS_24 == 0;
        rtc::decode(if twelve { raw & 0x7F } else { raw })
    };
    let ready = || rtc::read(rtc::STATUS_A) & rtc::UPDATING == 0;
    ensure!(
        wait_halting(machine, PATIENCE_MS, ready),
        "the update never ends"
    );
    let (day, month, hour) = (
        read(rtc::DAY, false),
        read(rtc::MONTH, false),
        read(rtc::HOURS, true),
    );
    ensure!(
        (1..=31).contains(&day) && (1..=12).contains(&month),
        "day {day}, month {month}"
    );
    ensure!(hour < 24 && read(rtc::YEAR, false) < 100, "hour {hour}");
    ensure!(read(rtc::MINUTES, false) < 60, "minutes");
    let first = read(rtc::SECONDS, false);
    ensure!(first < 60, "seconds {first}");
    let status = rtc::read(rtc::STATUS_B);
    rtc::write(rtc::STATUS_B, status | rtc::UPDATE_INTERRUPT);
    rtc::read(rtc::STATUS_C);
    let moved = wait_halting(machine, 5000, || {
        ready() && read(rtc::SECONDS, false) != first
    });
    ensure!(moved, "the seconds stand at {first}");
    let ended = wait_halting(machine, 3000, || {
        rtc::read(rtc::STATUS_C) & UPDATE_ENDED != 0
    });
    rtc::write(rtc::STATUS_B, status);
    ensure!(ended, "status C does not tell the end of an update");
    let start = cpu::tsc();
    let from = read(rtc::SECONDS, false);
    let moved = wait_halting(machine, 5000, || {
        ready() && read(rtc::SECONDS, false) != from
    });
    let milliseconds = (cpu::tsc() - start) / (machine.tsc_hz / 1000).max(1);
    ensure!(
        moved && milliseconds < 3000,
        "a second took {milliseconds} ms"
    );
    Ok(())
}

/// x2APIC mode: registers by MSR, interrupts as before, transitions as specified.
fn x2apic(machine: &Machine) -> Verdict {
    skip_if!(!machine.x2apic(), "no x2APIC");
    let id = apic::local().id();
    apic::local().enter_x2apic();
    let outcome = x2apic_mode(machine, id);
    apic::local().enter_xapic();
    let off_and_on = cpu::rdmsr(msr::APIC_BASE);
    outcome?;
    // Bochs (2.7) keeps an APIC off that was turned off.
    if machine.host == Host::Bochs {
        return Ok(());
    }
    ensure!(
        off_and_on & 0xC00 == 0x800,
        "APIC_BASE back in xAPIC mode: {off_and_on:#x}"
    );
    ensure_eq!(
        apic::local().read(Register::Spurious),
        0xFF,
        "spurious register after off and on"
    );
    Ok(())
}

fn x2apic_mode(machine: &Machine, id: u32) -> Verdict {
    const SELF_IPI: u32 = msr::X2APIC + 0x3F;
    let local = apic::local();
    local.quiet();
    ensure_eq!(local.id(), id, "id");
    let logical = cpu::rdmsr(msr::X2APIC + 0x0D);
    let wanted = u64::from((id >> 4) << 16 | 1 << (id & 15));
    // Bochs (2.7) keeps the logical id of xAPIC mode.
    ensure!(
        logical == wanted || machine.host == Host::Bochs,
        "logical id {logical:#x}"
    );
    hook(MIDDLE, end_at_apic);
    // SAFETY: the vector has a gate.
    unsafe { cpu::wrmsr(SELF_IPI, MIDDLE.into()) };
    cpu::take_interrupts();
    local.send_self(MIDDLE);
    cpu::take_interrupts();
    local.command(apic::ASSERT | u32::from(MIDDLE), id);
    cpu::take_interrupts();
    ensure_eq!(count(MIDDLE), 3, "interrupts by SELF_IPI, shorthand, id");

    hook(TIMER, end_at_apic);
    local.write(Register::Timer, TIMER.into());
    local.write(Register::InitialCount, 100_000);
    await_count(machine, TIMER, 1)?;
    local.write(Register::TaskPriority, HIGH.into());
    ensure_eq!(
        cpu::cr8(),
        u64::from(HIGH >> 4),
        "CR8 for the task priority"
    );
    local.write(Register::TaskPriority, 0);

    // What x2APIC mode refuses: reserved registers, reserved bits, the way back but by off.
    // QEMU's TCG (10.0) lets some of these pass.
    if machine.host != Host::Tcg {
        // SAFETY: refused.
        let writes = unsafe {
            [
                ("EOI of 1", probe_wrmsr(msr::X2APIC + 0x0B, 1)),
                ("read-only id", probe_wrmsr(msr::X2APIC + 0x02, 0)),
                ("destination format", probe_wrmsr(msr::X2APIC + 0x0E, 0)),
                ("command, high half", probe_wrmsr(msr::X2APIC + 0x31, 0)),
                (
                    "xAPIC mode",
                    probe_wrmsr(msr::APIC_BASE, cpu::rdmsr(msr::APIC_BASE) & !0x400),
                ),
            ]
        };
        for (what, outcome) in writes {
            let vector = outcome.err().map(|trap| trap.vector);
            ensure!(
                vector == Some(vector::GENERAL_PROTECTION),
                "writing {what}: {vector:?}"
            );
        }
        for (what, index) in [
            ("SELF_IPI", 0x3F),
            ("EOI", 0x0B),
            ("a reserved register", 0x05),
        ] {
            let vector = probe_rdmsr(msr::X2APIC + index)
                .err()
                .map(|trap| trap.vector);
            ensure!(
                vector == Some(vector::GENERAL_PROTECTION),
                "reading {what}: {vector:?}"
            );
        }
    }
    Ok(())
}
