//! Several processors: start-up, interrupts between them in every mode, shared memory, TLBs.
//!
//! Nothing here measures time: with more processors than the host has, any of them may stand still
//! for long.

use core::hint::spin_loop;
use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
};

use crate::apic::{self, ApicBase, DELIVER_NMI, Register};
use crate::cpu;
use crate::interrupts::{count, end_at_apic, hook, only_count, vector};
use crate::machine::{Host, Machine};
use crate::memory;
use crate::paging::{self, Entry};
use crate::smp::{self, HOOKED, Others, PROCESSORS};
use crate::time::{self, PIT_HZ};
use crate::{checks, ensure, ensure_eq, skip_if};

use super::{Verdict, scratch};

checks![
    startup,
    physical,
    shorthands,
    logical_flat,
    logical_cluster,
    lowest_priority,
    nmi,
    init_and_restart,
    device_interrupt,
    shared_counter,
    ordered_clock,
    ticket_lock,
    tlb_shootdown,
    cross_storm,
    x2apic,
];

const VECTOR: u8 = 0x71;
const LOGICAL: u32 = 1 << 11;
const ALL_WITH_SELF: u32 = 2 << 18;
const ALL_BUT_SELF: u32 = 3 << 18;
const LOWEST_PRIORITY: u32 = 1 << 8;
const CLUSTER_MODEL: u32 = 0x0FFF_FFFF;

/// Each of the others came up once, in the state that start-up IPIs give.
fn startup(machine: &Machine) -> Verdict {
    let others = smp::others(machine)?;
    for number in others.numbers() {
        let processor = &PROCESSORS[number];
        ensure_eq!(processor.starts.load(SeqCst), 1, "starts of {number}");
        ensure_eq!(processor.id.load(SeqCst), number as u32, "its APIC id");
        let base = ApicBase::from_bits_retain(processor.base.load(SeqCst));
        ensure!(
            base.contains(ApicBase::ENABLE) && !base.contains(ApicBase::BSP),
            "APIC base of {number}: {base:?}"
        );
        ensure_eq!(
            processor.spurious.load(SeqCst),
            0xFF,
            "spurious register of {number}"
        );
    }
    Ok(())
}

/// Sends, and waits until exactly the processors of the mask (bits by APIC id) have it.
fn expect_receivers(others: &Others, low: u32, destination: u32, wanted: u32) -> Verdict {
    smp::reset_counts();
    apic::local().command(low | apic::ASSERT | u32::from(VECTOR), destination);
    let received = || {
        cpu::take_interrupts();
        let mut mask = 0;
        for number in others.numbers() {
            if PROCESSORS[number].count(VECTOR) != 0 {
                mask |= 1 << number;
            }
        }
        mask | u32::from(count(VECTOR) != 0) << others.first
    };
    let came = others.wait("interrupts to others", || received() & wanted == wanted);
    // Who should not have it may have it all the same, and takes it before more work.
    others.run(|_| {})?;
    ensure_eq!(
        received(),
        wanted,
        "receivers of {low:#x} to {destination:#x}"
    );
    came?;
    for number in others.numbers().filter(|number| wanted & 1 << number != 0) {
        ensure_eq!(PROCESSORS[number].count(VECTOR), 1, "times at {number}");
    }
    Ok(())
}

fn mask_of(others: &Others) -> u32 {
    others.numbers().fold(0, |mask, number| mask | 1 << number)
}

/// By APIC id: that processor and no other. The broadcast id: all.
fn physical(machine: &Machine) -> Verdict {
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    for number in others.numbers() {
        expect_receivers(&others, 0, number as u32, 1 << number)?;
    }
    expect_receivers(&others, 0, others.first as u32, 1 << others.first)?;
    expect_receivers(&others, 0, 0xFF, mask_of(&others) | 1 << others.first)
}

fn shorthands(machine: &Machine) -> Verdict {
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    let (all, first) = (mask_of(&others), 1 << others.first);
    expect_receivers(&others, ALL_BUT_SELF, 0, all)?;
    expect_receivers(&others, ALL_WITH_SELF, 0, all | first)?;
    expect_receivers(&others, apic::SELF_SHORTHAND, 0, first)
}

/// Flat logical ids: a bit each, for the first eight.
fn logical_flat(machine: &Machine) -> Verdict {
    fn set(number: usize) {
        let id = if number < 8 { 1 << number } else { 0 };
        apic::local().write(Register::DestinationFormat, u32::MAX);
        apic::local().write(Register::LogicalDestination, id << 24);
    }
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    others.run(set)?;
    set(others.first);
    let present = (mask_of(&others) | 1 << others.first) & 0xFF;
    for mask in [0x01, 0x02, 0x03, 0x55, 0xAA, 0xFE] {
        if mask & present != 0 {
            expect_receivers(&others, LOGICAL, mask, mask & present)?;
        }
    }
    Ok(())
}

/// Cluster logical ids: four processors a cluster.
fn logical_cluster(machine: &Machine) -> Verdict {
    fn set(number: usize) {
        let id = (number as u32 / 4) << 4 | 1 << (number % 4);
        apic::local().write(Register::DestinationFormat, CLUSTER_MODEL);
        apic::local().write(Register::LogicalDestination, id << 24);
    }
    fn unset(_: usize) {
        apic::local().write(Register::DestinationFormat, u32::MAX);
        apic::local().write(Register::LogicalDestination, 0);
    }
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    others.run(set)?;
    set(others.first);
    let present = mask_of(&others) | 1 << others.first;
    let mut outcome = Ok(());
    for cluster in 0..4 {
        for members in [0x1, 0x6, 0xF] {
            let wanted = (members << (4 * cluster)) & present;
            if wanted != 0 && outcome.is_ok() {
                outcome = expect_receivers(&others, LOGICAL, cluster << 4 | members, wanted);
            }
        }
    }
    // Cluster 15 is every cluster.
    let second = 0x2222 & present;
    // QEMU (7.2) knows no such cluster.
    if outcome.is_ok() && second != 0 && machine.host != Host::Tcg {
        outcome = expect_receivers(&others, LOGICAL, 0xF2, second);
    }
    unset(others.first);
    others.run(unset)?;
    outcome
}

/// Of several receivers one gets it: that with the lowest task priority.
fn lowest_priority(machine: &Machine) -> Verdict {
    /// Who has no priority; all others have a high one.
    static LAZY: AtomicUsize = AtomicUsize::new(0);
    fn set(number: usize) {
        let lazy = LAZY.load(SeqCst) == number;
        let id = if number < 8 { 1 << number } else { 0 };
        apic::local().write(Register::DestinationFormat, u32::MAX);
        apic::local().write(Register::LogicalDestination, id << 24);
        // Above the vector's class, below that of the vector that wakes.
        apic::local().write(Register::TaskPriority, if lazy { 0 } else { 0x80 });
    }
    fn unset(_: usize) {
        apic::local().write(Register::TaskPriority, 0);
    }
    // QEMU (7.2) sends it to the first processor.
    skip_if!(machine.host == Host::Tcg, "QEMU arbitrates otherwise");
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    for lazy in others.numbers().filter(|&number| number < 8) {
        LAZY.store(lazy, SeqCst);
        others.run(set)?;
        set(others.first);
        smp::reset_counts();
        apic::local().command(
            LOGICAL | LOWEST_PRIORITY | apic::ASSERT | u32::from(VECTOR),
            0xFE,
        );
        let outcome = others.wait("a lowest-priority interrupt", || {
            others
                .numbers()
                .any(|number| PROCESSORS[number].count(VECTOR) != 0)
        });
        unset(others.first);
        others.run(unset)?;
        cpu::take_interrupts();
        let total: u32 = others
            .numbers()
            .map(|number| PROCESSORS[number].count(VECTOR))
            .sum();
        outcome?;
        ensure_eq!(total + count(VECTOR), 1, "receivers");
        ensure_eq!(
            PROCESSORS[lazy].count(VECTOR),
            1,
            "interrupts at {lazy}, with the lowest priority"
        );
    }
    Ok(())
}

/// NMIs reach processors that halt, and those that run with interrupts off.
fn nmi(machine: &Machine) -> Verdict {
    static STOP: AtomicBool = AtomicBool::new(false);
    fn deaf(number: usize) {
        cpu::cli();
        PROCESSORS[number].note.store(1, SeqCst);
        while !STOP.load(SeqCst) {
            spin_loop();
        }
    }
    let others = smp::others(machine)?;
    hook(vector::NMI, only_count);
    let all_have = |times| {
        let had = |number: usize| PROCESSORS[number].count(vector::NMI) == times;
        others.numbers().all(had)
    };
    smp::reset_counts();
    for number in others.numbers() {
        apic::local().command(DELIVER_NMI | apic::ASSERT, number as u32);
    }
    others.wait("NMIs in HLT", || all_have(1))?;
    STOP.store(false, SeqCst);
    for number in others.numbers() {
        PROCESSORS[number].note.store(0, SeqCst);
    }
    others.begin(deaf);
    let deaf_now = others.wait("the others' loops", || {
        others
            .numbers()
            .all(|number| PROCESSORS[number].note.load(SeqCst) == 1)
    });
    let came = deaf_now.and_then(|()| {
        apic::local().command(ALL_BUT_SELF | DELIVER_NMI | apic::ASSERT, 0);
        others.wait("NMIs with interrupts off", || all_have(2))
    });
    STOP.store(true, SeqCst);
    others.join()?;
    came?;
    ensure_eq!(count(vector::NMI), 0, "NMIs at the sender");
    // Two at once: one is handled, one waits meanwhile. QEMU (7.2) and Bochs keep one.
    if machine.host == Host::Plinth {
        for number in others.numbers() {
            for _ in 0..2 {
                apic::local().command(DELIVER_NMI | apic::ASSERT, number as u32);
            }
        }
        others.wait("two NMIs at once", || all_have(4))?;
    }
    Ok(())
}

/// INIT stops a processor wherever it is; a start-up IPI starts it anew, with its local APIC reset.
fn init_and_restart(machine: &Machine) -> Verdict {
    fn busy(number: usize) {
        cpu::cli();
        loop {
            PROCESSORS[number].note.fetch_add(1, SeqCst);
        }
    }
    let others = smp::others(machine)?;
    for (turn, number) in others.numbers().take(3).enumerate() {
        let processor = &PROCESSORS[number];
        processor.note.store(0, SeqCst);
        if turn != 1 {
            others.give(number, busy);
            others.wait("a busy processor", || processor.note.load(SeqCst) > 1000)?;
        }
        let starts = processor.starts.load(SeqCst);
        others.restart(number)?;
        ensure_eq!(processor.starts.load(SeqCst), starts + 1, "starts");
        ensure_eq!(
            processor.spurious.load(SeqCst),
            0xFF,
            "spurious register after INIT"
        );
        // A start-up IPI is nothing to a processor that runs.
        apic::local().command(6 << 8 | apic::ASSERT | 0xFF, number as u32);
        others.run(|_| {})?;
        ensure_eq!(processor.starts.load(SeqCst), starts + 1, "starts");
    }
    Ok(())
}

/// A device's interrupt at another processor than the first.
fn device_interrupt(machine: &Machine) -> Verdict {
    let others = smp::others(machine)?;
    let Some(ioapic) = machine.ioapic else {
        crate::skip!("no IOAPIC");
    };
    let madt = machine.acpi.and_then(|acpi| acpi.madt).unwrap_or_default();
    let (pin, _, _) = madt.isa_pin(0);
    for number in others.numbers().take(2) {
        smp::reset_counts();
        ioapic.route(pin, VECTOR.into(), number as u32);
        time::pit_periodic((PIT_HZ / 1000) as u16);
        let came = others.wait("the PIT's interrupts", || {
            PROCESSORS[number].count(VECTOR) >= 3
        });
        time::pit_stop();
        ioapic.quiet();
        came?;
        ensure_eq!(count(VECTOR), 0, "interrupts at the first processor");
    }
    Ok(())
}

/// All processors at once on one word, without a pause: no step is lost.
fn shared_counter(machine: &Machine) -> Verdict {
    const STEPS: u64 = 20_000;
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    static EXCHANGED: AtomicU64 = AtomicU64::new(0);
    fn step(_: usize) {
        for _ in 0..STEPS {
            COUNTER.fetch_add(1, SeqCst);
            let mut seen = EXCHANGED.load(Relaxed);
            while let Err(now) = EXCHANGED.compare_exchange_weak(seen, seen + 1, SeqCst, Relaxed) {
                seen = now;
            }
        }
    }
    let others = smp::others(machine)?;
    COUNTER.store(0, SeqCst);
    EXCHANGED.store(0, SeqCst);
    others.begin(step);
    step(others.first);
    others.join()?;
    let wanted = STEPS * (others.count() as u64 + 1);
    ensure_eq!(COUNTER.load(SeqCst), wanted, "steps by XADD");
    ensure_eq!(EXCHANGED.load(SeqCst), wanted, "steps by CMPXCHG");
    Ok(())
}

/// A lock that whoever comes takes.
struct SpinLock(AtomicBool);

impl SpinLock {
    fn with(&self, work: impl FnOnce()) {
        while self.0.swap(true, Acquire) {
            spin_loop();
        }
        work();
        self.0.store(false, Release);
    }
}

/// The time-stamp counter never goes back from one processor to the next.
fn ordered_clock(machine: &Machine) -> Verdict {
    static LOCK: SpinLock = SpinLock(AtomicBool::new(false));
    static LAST: AtomicU64 = AtomicU64::new(0);
    static BACKWARDS: AtomicU64 = AtomicU64::new(0);
    fn look(_: usize) {
        for _ in 0..500 {
            LOCK.with(|| {
                let now = cpu::tsc();
                let last = LAST.swap(now, Relaxed);
                if now < last {
                    BACKWARDS.fetch_max(last - now, Relaxed);
                }
            });
        }
    }
    let others = smp::others(machine)?;
    LAST.store(0, SeqCst);
    BACKWARDS.store(0, SeqCst);
    others.begin(look);
    look(others.first);
    others.join()?;
    // Bochs (2.7) steps its processors one after the other.
    let slack = if machine.host == Host::Bochs { 1000 } else { 0 };
    let backwards = BACKWARDS.load(SeqCst);
    ensure!(backwards <= slack, "the TSC goes back by {backwards}");
    Ok(())
}

/// A lock whose turn goes round: each waits for one certain other, which may not be running.
fn ticket_lock(machine: &Machine) -> Verdict {
    const TURNS: u32 = 10;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    static SERVED: AtomicU32 = AtomicU32::new(0);
    static INSIDE: AtomicU32 = AtomicU32::new(0);
    static TOGETHER: AtomicU32 = AtomicU32::new(0);
    fn take_turns(_: usize) {
        for _ in 0..TURNS {
            let ticket = NEXT.fetch_add(1, SeqCst);
            while SERVED.load(Acquire) != ticket {
                spin_loop();
            }
            if INSIDE.swap(1, Relaxed) != 0 {
                TOGETHER.fetch_add(1, Relaxed);
            }
            INSIDE.store(0, Relaxed);
            SERVED.store(ticket + 1, Release);
        }
    }
    let others = smp::others(machine)?;
    for word in [&NEXT, &SERVED, &INSIDE, &TOGETHER] {
        word.store(0, SeqCst);
    }
    others.begin(take_turns);
    take_turns(others.first);
    others.join()?;
    ensure_eq!(
        SERVED.load(SeqCst),
        TURNS * (others.count() as u32 + 1),
        "turns"
    );
    ensure_eq!(TOGETHER.load(SeqCst), 0, "times two were inside");
    Ok(())
}

/// A page is mapped elsewhere under processors that read it in a loop: once they have been told,
/// none sees the old page.
fn tlb_shootdown(machine: &Machine) -> Verdict {
    const WINDOW_PAGE: usize = 40;
    const ROUNDS: u64 = 5;
    static STOP: AtomicBool = AtomicBool::new(false);
    /// The round whose page all must see, counted up after all were told.
    static ROUND: AtomicU64 = AtomicU64::new(0);
    static STALE: AtomicU64 = AtomicU64::new(0);
    static TOLD: AtomicUsize = AtomicUsize::new(0);
    fn flush(_: usize) {
        cpu::flush_page(paging::window_page(WINDOW_PAGE));
        TOLD.fetch_add(1, SeqCst);
    }
    fn read(number: usize) {
        while !STOP.load(SeqCst) {
            let round = ROUND.load(SeqCst);
            let seen = memory::read64(paging::window_page(WINDOW_PAGE));
            if seen < round {
                STALE.fetch_add(1, SeqCst);
            }
            PROCESSORS[number].note.store(seen, SeqCst);
            spin_loop();
        }
    }
    let others = smp::others(machine)?;
    let base = scratch(machine)?;
    let page = |round: u64| base + (round & 1) * memory::PAGE;
    let flags = Entry::PRESENT | Entry::WRITABLE;
    memory::write64(page(0), 0);
    paging::map(WINDOW_PAGE, page(0), flags);
    for number in others.numbers() {
        PROCESSORS[number].note.store(u64::MAX, SeqCst);
    }
    STOP.store(false, SeqCst);
    ROUND.store(0, SeqCst);
    STALE.store(0, SeqCst);
    smp::set_hook(flush);
    others.begin(read);
    let mut outcome = Ok(());
    for round in 0..=ROUNDS {
        if round != 0 {
            memory::write64(page(round), round);
            paging::map(WINDOW_PAGE, page(round), flags);
            TOLD.store(0, SeqCst);
            apic::local().command(ALL_BUT_SELF | apic::ASSERT | u32::from(HOOKED), 0);
            outcome = others.wait("flushes", || TOLD.load(SeqCst) == others.count());
            ROUND.store(round, SeqCst);
        }
        outcome = outcome.and_then(|()| {
            others.wait("the new page", || {
                others
                    .numbers()
                    .all(|number| PROCESSORS[number].note.load(SeqCst) == round)
            })
        });
        if outcome.is_err() {
            break;
        }
    }
    STOP.store(true, SeqCst);
    others.join()?;
    paging::unmap(WINDOW_PAGE);
    outcome?;
    ensure_eq!(STALE.load(SeqCst), 0, "reads of the old page");
    Ok(())
}

/// Everybody sends to everybody at once, and everybody is heard.
fn cross_storm(machine: &Machine) -> Verdict {
    fn send(number: usize) {
        for turn in 0..50 {
            let low = match turn % 3 {
                0 => ALL_BUT_SELF,
                1 => ALL_WITH_SELF,
                _ => 0,
            };
            let next = (number as u32 + 1) % smp::MAX as u32;
            apic::local().command(low | apic::ASSERT | u32::from(VECTOR), next);
        }
    }
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    smp::reset_counts();
    others.begin(send);
    cpu::sti();
    send(others.first);
    cpu::cli();
    others.join()?;
    cpu::take_interrupts();
    for number in others.numbers() {
        ensure!(
            PROCESSORS[number].count(VECTOR) != 0,
            "processor {number} was not heard"
        );
    }
    ensure!(count(VECTOR) != 0, "the first processor was not heard");
    Ok(())
}

/// x2APIC mode on all processors: ids, broadcast, clusters of sixteen, NMI.
fn x2apic(machine: &Machine) -> Verdict {
    skip_if!(!machine.x2apic(), "no x2APIC");
    // Bochs (2.7) keeps an APIC off that was turned off on the way back.
    skip_if!(machine.host == Host::Bochs, "Bochs' APIC stays off");
    let others = smp::others(machine)?;
    hook(VECTOR, end_at_apic);
    others.switch_apics(true)?;
    let outcome = in_x2apic_mode(&others);
    others.switch_apics(false)?;
    outcome
}

fn in_x2apic_mode(others: &Others) -> Verdict {
    let (all, first) = (mask_of(others), 1 << others.first);
    for number in others.numbers() {
        expect_receivers(others, 0, number as u32, 1 << number)?;
    }
    expect_receivers(others, 0, u32::MAX, all | first)?;
    expect_receivers(others, ALL_BUT_SELF, 0, all)?;
    expect_receivers(others, ALL_WITH_SELF, 0, all | first)?;
    for members in [0x0002, 0x5555, 0xAAAA, 0xFFFF] {
        let wanted = members & (all | first);
        expect_receivers(others, LOGICAL, members, wanted)?;
    }
    // INIT keeps the mode.
    let Some(number) = others.numbers().next() else {
        return Ok(());
    };
    others.restart(number)?;
    ensure!(
        ApicBase::from_bits_retain(PROCESSORS[number].base.load(SeqCst)).contains(ApicBase::EXTD),
        "INIT ended x2APIC mode"
    );
    Ok(())
}
