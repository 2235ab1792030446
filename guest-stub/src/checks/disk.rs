//! A disk: a virtio block device on PCI, by every interrupt it can send, and with drivers that break the rules.
//!
//! The disk must hold [`pattern`] when the machine starts. Without a block device all is skipped.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::apic::{self, pic};
use crate::cpu;
use crate::interrupts::{Frame, count, end_at_apic, hook, reset_counts};
use crate::machine::{Machine, PIC_VECTORS};
use crate::memory::{read8, read32, read64, write32, write64};
use crate::pci::{BUS_MASTER, COMMAND, INTERRUPT_DISABLE, INTERRUPT_STATUS, MEMORY};
use crate::time::wait_ms;
use crate::virtio::{
    DEVICE_WRITES, Disk, FLUSH, IDENTITY, NEXT, NO_VECTOR, QUEUE_SIZE, READ, SECTOR, WRITE, common,
    status,
};
use crate::{checks, ensure, ensure_eq, fail};

use super::{Verdict, Why, scratch};

checks![
    structures,
    bar_sizing,
    features,
    read_by_msix,
    masked_vector,
    read_by_ioapic,
    read_by_pic,
    pin_disabled,
    write_and_flush,
    large_request,
    errors,
    moved_bar,
    window,
    no_bus_master,
    broken_rules,
    repeated_reset,
];

/// Where interrupts of the disk go.
const VECTOR: u8 = 0x51;
/// A disk in memory answers at once, but this processor may have to wait for its turn.
const PATIENCE_MS: u64 = 5000;
/// Request statuses.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What the disk holds, as 64-bit numbers: of each, a number that depends on its place.
fn pattern(index: u64) -> u64 {
    index.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn disk(machine: &Machine) -> Result<Disk, Why> {
    let scratch = scratch(machine)?;
    Disk::find(scratch).ok_or(Why::Skipped("no virtio block device"))
}

/// A disk that is set up to interrupt by its first MSI-X vector, with a hook that counts.
fn started(machine: &Machine) -> Result<Disk, Why> {
    let mut disk = disk(machine)?;
    hook(VECTOR, end_at_apic);
    disk.set_msix(true, false);
    disk.set_vector(1, VECTOR, apic::local().id());
    ensure!(
        disk.start(1),
        "the device does not start: {:#x}",
        disk.status()
    );
    ensure_eq!(disk.read(common::QUEUE_VECTOR), 1, "vector of the queue");
    Ok(disk)
}

/// Waits for the request, with interrupts on, and for the interrupt if one is wanted; its status.
fn finish(machine: &Machine, disk: &Disk, vector: Option<u8>) -> Result<u8, Why> {
    cpu::sti();
    let came = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
        disk.outcome().is_some() && vector.is_none_or(|vector| count(vector) > 0)
    });
    cpu::cli();
    match disk.outcome() {
        Some(status) if came => Ok(status),
        Some(_) => fail!("the request came back without an interrupt"),
        None => fail!("the request did not come back; status {:#x}", disk.status()),
    }
}

/// The data must be the disk's from a sector on.
fn check_data(disk: &Disk, sector: u64, bytes: u64) -> Verdict {
    for index in 0..bytes / 8 {
        let wanted = pattern(sector * SECTOR / 8 + index);
        let got = read64(disk.data() + 8 * index);
        ensure_eq!(got, wanted, "number {index} from sector {sector}");
    }
    Ok(())
}

fn read_and_check(machine: &Machine, disk: &mut Disk, sector: u64, vector: Option<u8>) -> Verdict {
    reset_counts();
    disk.submit(READ, sector, 4096);
    let status = finish(machine, disk, vector)?;
    ensure_eq!(status, OK, "status of a read");
    ensure_eq!(disk.written(), 4097, "bytes written");
    check_data(disk, sector, 4096)
}

/// The capabilities name five structures, all inside BARs, and MSI-X.
fn structures(machine: &Machine) -> Verdict {
    let disk = disk(machine)?;
    let s = disk.structures;
    ensure!(
        s.msix != 0 && s.window != 0,
        "a capability is missing: {s:?}"
    );
    for (structure, least) in [(s.common, 0x38), (s.notify, 2), (s.isr, 1), (s.device, 60)] {
        ensure!(
            structure.length >= least,
            "a structure is short: {structure:?}"
        );
        ensure!(disk.bar(structure.bar) != 0, "the BAR has no address");
    }
    ensure!(disk.capacity() >= 128, "{} sectors", disk.capacity());
    let last = disk.function.read16(s.msix + 2) & 0x7FF;
    ensure!(last >= 1, "only {} MSI-X vectors", last + 1);
    Ok(())
}

/// Writing ones to a BAR shows its size; the address comes back, and the other BARs are not there.
fn bar_sizing(machine: &Machine) -> Verdict {
    let function = disk(machine)?.function;
    let number = disk(machine)?.structures.common.bar;
    function.write16(COMMAND, 0);
    for bar in 0..6 {
        let register = 0x10 + 4 * bar;
        let before = function.read32(register);
        function.write32(register, u32::MAX);
        let bits = function.read32(register) & !0xF;
        function.write32(register, before);
        ensure_eq!(function.read32(register), before, "BAR {bar} written back");
        if bar == number {
            let size = bits.wrapping_neg();
            ensure!(
                size.is_power_of_two() && size >= 4096,
                "BAR {bar}: {bits:#x}"
            );
        }
    }
    Ok(())
}

fn features(machine: &Machine) -> Verdict {
    const FLUSH: u32 = 1 << 9;
    let disk = disk(machine)?;
    disk.function.write16(COMMAND, MEMORY | BUS_MASTER);
    ensure_eq!(disk.features(1) & 1, 1, "VERSION_1");
    ensure_eq!(disk.features(0) & FLUSH, FLUSH, "FLUSH");
    ensure_eq!(disk.features(2), 0, "features from 64 on");
    disk.set_status(0);
    disk.set_status(status::ACKNOWLEDGE | status::DRIVER);
    disk.take_features(0, 0);
    disk.take_features(1, 0);
    disk.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    let got = disk.status() & status::FEATURES_OK;
    ensure_eq!(got, 0, "FEATURES_OK without VERSION_1");
    disk.set_status(0);
    ensure_eq!(disk.status(), 0, "status after reset");
    Ok(())
}

fn read_by_msix(machine: &Machine) -> Verdict {
    let mut disk = started(machine)?;
    // More requests than entries in the queue.
    for turn in 0..u64::from(QUEUE_SIZE) + 4 {
        read_and_check(machine, &mut disk, turn * 3, Some(VECTOR))?;
        ensure_eq!(count(VECTOR), 1, "interrupts for one request");
    }
    ensure_eq!(disk.interrupt_status(), 0, "interrupt status with MSI-X");
    Ok(())
}

/// A masked vector, and one of a masked function, waits in the pending bits.
fn masked_vector(machine: &Machine) -> Verdict {
    const MASKED: u32 = 1;
    let mut disk = started(machine)?;
    let control = disk.msix_entry(1) + 12;
    let mut turn = |what: &str, mask: &dyn Fn(&Disk), open: &dyn Fn(&Disk)| {
        reset_counts();
        mask(&disk);
        disk.submit(READ, 0, 512);
        finish(machine, &disk, None)?;
        cpu::take_interrupts();
        ensure_eq!(count(VECTOR), 0, "interrupts while {what} is masked");
        ensure_eq!(
            read32(disk.msix_pending()) & 0b10,
            0b10,
            "pending bit, {what}"
        );
        open(&disk);
        cpu::take_interrupts();
        ensure_eq!(count(VECTOR), 1, "interrupts once {what} is open");
        ensure_eq!(
            read32(disk.msix_pending()) & 0b10,
            0,
            "pending bit after, {what}"
        );
        Ok(())
    };
    turn("the vector", &|_| write32(control, MASKED), &|_| {
        write32(control, 0)
    })?;
    turn("the function", &|disk| disk.set_msix(true, true), &|disk| {
        disk.set_msix(true, false)
    })
}

/// Where the interrupt status is, for the handlers; and what they have seen in it.
static ISR: AtomicU64 = AtomicU64::new(0);
static SEEN: AtomicU64 = AtomicU64::new(0);

fn acknowledge() {
    SEEN.fetch_or(read8(ISR.load(Relaxed)).into(), Relaxed);
}

fn pin_at_apic(_: &mut Frame) {
    acknowledge();
    apic::local().end_of_interrupt();
}

fn pin_at_pic(_: &mut Frame) {
    const SECONDARY: u16 = 0xA0;
    const END: u8 = 0x20;
    acknowledge();
    cpu::port::write8(SECONDARY, END);
    pic::end();
}

/// A disk that interrupts by its pin.
fn started_with_pin(machine: &Machine) -> Result<Disk, Why> {
    let mut disk = disk(machine)?;
    disk.set_msix(false, false);
    ensure!(disk.start(NO_VECTOR), "the device does not start");
    ISR.store(disk.address(disk.structures.isr, 0), Relaxed);
    SEEN.store(0, Relaxed);
    Ok(disk)
}

/// The I/O APIC pin of INTA# of a device, as `_PRT` says it.
fn ioapic_pin(disk: &Disk) -> u8 {
    16 + disk.function.device % 8
}

fn read_by_ioapic(machine: &Machine) -> Verdict {
    let ioapic = machine.ioapic.ok_or(Why::Skipped("no IOAPIC"))?;
    let mut disk = started_with_pin(machine)?;
    hook(VECTOR, pin_at_apic);
    let flags = apic::LEVEL | u32::from(VECTOR);
    ioapic.route(ioapic_pin(&disk), flags, apic::local().id());
    for turn in 0..4 {
        read_and_check(machine, &mut disk, turn * 8, Some(VECTOR))?;
        cpu::take_interrupts();
        ensure_eq!(count(VECTOR), 1, "interrupts for one request");
        ensure_eq!(SEEN.swap(0, Relaxed), 1, "interrupt status");
    }
    Ok(())
}

fn read_by_pic(machine: &Machine) -> Verdict {
    const EXTERNAL: u32 = 7 << 8;
    const INTERRUPT_LINE: u8 = 0x3C;
    let mut disk = started_with_pin(machine)?;
    let line = disk.function.read8(INTERRUPT_LINE);
    ensure!((8..16).contains(&line), "interrupt line {line}");
    let vector = PIC_VECTORS + line;
    hook(vector, pin_at_pic);
    apic::local().write(apic::Register::Lint0, EXTERNAL);
    pic::set_masks(!(1 << line | 1 << 2));
    for turn in 0..4 {
        read_and_check(machine, &mut disk, turn * 8, Some(vector))?;
        cpu::take_interrupts();
        ensure_eq!(count(vector), 1, "interrupts for one request");
        ensure_eq!(SEEN.swap(0, Relaxed), 1, "interrupt status");
    }
    pic::set_masks(0xFFFF);
    Ok(())
}

/// The command register turns the pin off; the status register shows the wish all the same.
fn pin_disabled(machine: &Machine) -> Verdict {
    const STATUS: u8 = 0x06;
    let ioapic = machine.ioapic.ok_or(Why::Skipped("no IOAPIC"))?;
    let mut disk = started_with_pin(machine)?;
    hook(VECTOR, pin_at_apic);
    let flags = apic::LEVEL | u32::from(VECTOR);
    ioapic.route(ioapic_pin(&disk), flags, apic::local().id());
    disk.function
        .write16(COMMAND, MEMORY | BUS_MASTER | INTERRUPT_DISABLE);
    read_and_check(machine, &mut disk, 0, None)?;
    cpu::take_interrupts();
    ensure_eq!(count(VECTOR), 0, "interrupts of a pin that is off");
    let wish = disk.function.read16(STATUS) & INTERRUPT_STATUS;
    ensure_eq!(wish, INTERRUPT_STATUS, "interrupt status");
    disk.function.write16(COMMAND, MEMORY | BUS_MASTER);
    cpu::take_interrupts();
    ensure_eq!(count(VECTOR), 1, "interrupts once it is on");
    let wish = disk.function.read16(STATUS) & INTERRUPT_STATUS;
    ensure_eq!(wish, 0, "interrupt status, acknowledged");
    Ok(())
}

/// What is written is read back, and what lies beside it is as it was.
fn write_and_flush(machine: &Machine) -> Verdict {
    let mut disk = started(machine)?;
    let last = disk.capacity() - 16;
    for index in 0..SECTOR / 8 {
        write64(disk.data() + 8 * index, !pattern(index));
    }
    for (kind, bytes) in [(WRITE, 512), (FLUSH, 0)] {
        reset_counts();
        disk.submit(kind, if kind == WRITE { last + 3 } else { 0 }, bytes);
        ensure_eq!(
            finish(machine, &disk, Some(VECTOR))?,
            OK,
            "status of {kind}"
        );
        ensure_eq!(disk.written(), 1, "bytes written to the request");
    }
    disk.submit(READ, last, 4096);
    ensure_eq!(finish(machine, &disk, None)?, OK, "status of the read");
    for index in 0..4096 / 8 {
        let (sector, within) = (index / 64, index % 64);
        let wanted = if sector == 3 {
            !pattern(within)
        } else {
            pattern(last * 64 + index)
        };
        let got = read64(disk.data() + 8 * index);
        ensure_eq!(got, wanted, "number {index} of what was written");
    }
    // For whoever runs the checks again.
    for index in 0..SECTOR / 8 {
        write64(disk.data() + 8 * index, pattern((last + 3) * 64 + index));
    }
    disk.submit(WRITE, last + 3, 512);
    ensure_eq!(
        finish(machine, &disk, None)?,
        OK,
        "status of the last write"
    );
    Ok(())
}

/// More than one turn of the device's work: it comes back whole, and other interrupts are not kept waiting.
fn large_request(machine: &Machine) -> Verdict {
    let mut disk = started(machine)?;
    let bytes = 1 << 19;
    reset_counts();
    disk.submit(READ, 0, bytes);
    ensure_eq!(finish(machine, &disk, Some(VECTOR))?, OK, "status");
    ensure_eq!(disk.written(), bytes + 1, "bytes written");
    check_data(&disk, 0, bytes.into())
}

fn errors(machine: &Machine) -> Verdict {
    let mut disk = started(machine)?;
    let end = disk.capacity();
    for (kind, sector, bytes, wanted) in [
        (READ, end, 512, IO_ERROR),
        (WRITE, end - 1, 1024, IO_ERROR),
        (READ, u64::MAX, 512, IO_ERROR),
        (READ, 0, 100, IO_ERROR),
        (0x1234, 0, 512, UNSUPPORTED),
        (IDENTITY, 0, 20, OK),
        (READ, end - 1, 512, OK),
    ] {
        disk.submit(kind, sector, bytes);
        let got = finish(machine, &disk, None)?;
        ensure_eq!(got, wanted, "status of {kind} at {sector:#x}");
    }
    Ok(())
}

/// The BAR goes where the system puts it, and nowhere else; without decoding there is nothing.
fn moved_bar(machine: &Machine) -> Verdict {
    let mut disk = disk(machine)?;
    let register = 0x10 + 4 * disk.structures.common.bar;
    disk.function.write16(COMMAND, MEMORY);
    let before = disk.function.read32(register) & !0xF;
    let old = disk.address(disk.structures.common, common::QUEUES);
    let queues = crate::memory::read16(old);
    let moved = before + (64 << 20);
    disk.function.write32(register, moved);
    let new = disk.address(disk.structures.common, common::QUEUES);
    let seen = [crate::memory::read16(old), crate::memory::read16(new)];
    disk.function.write16(COMMAND, 0);
    let off = crate::memory::read16(new);
    disk.function.write16(COMMAND, MEMORY | BUS_MASTER);
    hook(VECTOR, end_at_apic);
    disk.set_msix(true, false);
    disk.set_vector(1, VECTOR, apic::local().id());
    let outcome = if disk.start(1) {
        read_and_check(machine, &mut disk, 8, Some(VECTOR))
    } else {
        Err(super::fail(format_args!(
            "it does not start where it was moved"
        )))
    };
    disk.function.write32(register, before);
    outcome?;
    let [at_old, at_new] = seen;
    ensure_eq!(at_old, 0xFFFF, "number of queues at the old place");
    ensure_eq!(at_new, queues, "number of queues at the new place");
    ensure_eq!(off, 0xFFFF, "number of queues without decoding");
    Ok(())
}

/// The window in configuration space leads to the same registers.
fn window(machine: &Machine) -> Verdict {
    let disk = disk(machine)?;
    let (function, at) = (disk.function, disk.structures.window);
    let place = disk.structures.common;
    function.write32(at + 4, u32::from(place.bar));
    let select = |register: u64, length| {
        function.write32(at + 8, place.offset + register as u32);
        function.write32(at + 12, length);
    };
    select(common::STATUS, 1);
    function.write32(at + 16, 0);
    function.write32(at + 16, u32::from(status::ACKNOWLEDGE));
    ensure_eq!(
        disk.status(),
        status::ACKNOWLEDGE,
        "status, written by the window"
    );
    select(common::QUEUES, 2);
    let queues = function.read16(at + 16);
    ensure_eq!(
        queues,
        disk.read(common::QUEUES),
        "queues, read by the window"
    );
    disk.set_status(0);
    Ok(())
}

/// Without bus mastering the device leaves memory alone, and does its work afterwards.
fn no_bus_master(machine: &Machine) -> Verdict {
    let mut disk = started(machine)?;
    disk.function.write16(COMMAND, MEMORY);
    reset_counts();
    disk.submit(READ, 0, 512);
    ensure!(
        disk.outcome().is_none(),
        "a request came back without bus mastering"
    );
    disk.function.write16(COMMAND, MEMORY | BUS_MASTER);
    ensure_eq!(finish(machine, &disk, Some(VECTOR))?, OK, "status");
    check_data(&disk, 0, 512)
}

/// Rings that break the rules: the device asks for a reset, and works again after it.
fn broken_rules(machine: &Machine) -> Verdict {
    const NOWHERE: u64 = 0xD000_0000;
    type Crime = (&'static str, fn(&mut Disk));
    const CRIMES: [Crime; 9] = [
        ("a descriptor that is its own next", |disk| {
            disk.describe(0, disk.data(), 16, NEXT, 0);
            disk.offer(0);
        }),
        ("a circle of two", |disk| {
            disk.describe(0, disk.data(), 16, NEXT, 1);
            disk.describe(1, disk.data(), 16, NEXT, 0);
            disk.offer(0);
        }),
        ("a head beyond the table", |disk| disk.offer(QUEUE_SIZE)),
        ("a next one beyond the table", |disk| {
            disk.describe(0, disk.data(), 16, NEXT, 0x8000);
            disk.offer(0);
        }),
        ("an index that jumps", |disk| disk.set_offered(0x8000)),
        ("a header outside RAM", |disk| {
            disk.describe(0, NOWHERE, 16, NEXT, 1);
            disk.describe(1, disk.data(), 1, DEVICE_WRITES, 0);
            disk.offer(0);
        }),
        ("a buffer at the end of the address space", |disk| {
            disk.describe(0, u64::MAX - 7, 16, NEXT, 1);
            disk.describe(1, disk.data(), 1, DEVICE_WRITES, 0);
            disk.offer(0);
        }),
        ("no status byte", |disk| {
            disk.describe(0, disk.data(), 16, 0, 0);
            disk.offer(0);
        }),
        ("a buffer to read after one to write", |disk| {
            disk.describe(0, disk.data(), 16, NEXT | DEVICE_WRITES, 1);
            disk.describe(1, disk.data(), 16, 0, 0);
            disk.offer(0);
        }),
    ];
    for (what, commit) in CRIMES {
        let mut disk = started(machine)?;
        commit(&mut disk);
        disk.notify();
        let noticed = wait_ms(machine.tsc_hz, PATIENCE_MS, || {
            disk.status() & status::NEEDS_RESET != 0
        });
        ensure!(noticed, "{what}: status {:#x}", disk.status());
        let mut disk = started(machine)?;
        read_and_check(machine, &mut disk, 0, Some(VECTOR))?;
    }
    Ok(())
}

/// A device that is reset while it works forgets its requests.
fn repeated_reset(machine: &Machine) -> Verdict {
    for _ in 0..8 {
        let mut disk = started(machine)?;
        disk.submit(READ, 0, 1 << 19);
        disk.set_status(0);
        ensure_eq!(disk.status(), 0, "status after reset");
    }
    let mut disk = started(machine)?;
    read_and_check(machine, &mut disk, 16, Some(VECTOR))
}
