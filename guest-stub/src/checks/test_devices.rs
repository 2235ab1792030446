//! What test kernels written for QEMU expect: `fw_cfg`, the exit port, debug ports, `pc-testdev`.
//!
//! Skipped where there is no `fw_cfg`: a VM has these devices if it asks for them, all or none.

use crate::apic::pic;
use crate::cpu::port;
use crate::machine::{Host, Machine};
use crate::memory::{self, USABLE, read32};
use crate::{checks, ensure, ensure_eq, skip_if};

use super::{Verdict, scratch};

checks![
    cpu_count,
    memory_size,
    command_line,
    file_directory,
    dma,
    debug_ports,
    exit_port,
    echo_ports,
    interrupt_lines,
    device_memory,
];

const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const DMA: u16 = 0x514;
/// Keys of items (QEMU, docs/specs/fw_cfg.rst).
const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const CPU_COUNT: u16 = 0x05;
const COMMAND_LINE_SIZE: u16 = 0x14;
const COMMAND_LINE: u16 = 0x15;
const FILE_DIRECTORY: u16 = 0x19;
/// Bit of the ID item: there is DMA.
const HAS_DMA: u64 = 1 << 1;

/// A little-endian number of an item's first bytes.
fn item(key: u16, bytes: u32) -> u64 {
    port::write16(SELECTOR, key);
    (0..bytes).fold(0, |value, n| {
        value | u64::from(port::read8(DATA)) << (8 * n)
    })
}

/// Whether there is `fw_cfg`.
fn absent() -> bool {
    item(SIGNATURE, 4) != u64::from(u32::from_le_bytes(*b"QEMU"))
}

const NO_FW_CFG: &str = "there is no fw_cfg";

/// As many processors as in ACPI's MADT.
fn cpu_count(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    let madt = machine.acpi.and_then(|acpi| acpi.madt);
    let processors = madt.map_or(1, |madt| madt.processors as u64);
    ensure_eq!(item(CPU_COUNT, 2), processors, "processors");
    Ok(())
}

/// As much RAM as the loader's map shows, but for what firmware keeps for itself.
fn memory_size(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    let regions = machine.handoff.map.regions().iter();
    let usable: u64 = regions
        .filter(|region| region.kind == USABLE)
        .map(|region| region.length)
        .sum();
    let size = item(RAM_SIZE, 8);
    ensure!(
        usable <= size && size - usable < 2 << 20,
        "{size:#x} bytes, but {usable:#x} in the map"
    );
    Ok(())
}

/// The command line, which is at the end of the one that the loader gave.
fn command_line(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    // QEMU has it there only for a loader in the guest.
    skip_if!(machine.host != Host::Plinth, "Plinth's own");
    let whole = machine.handoff.command_line;
    let bytes = whole.as_str().as_bytes();
    let length = item(COMMAND_LINE_SIZE, 4) as usize;
    ensure!(
        (1..=bytes.len() + 1).contains(&length),
        "{length} bytes, of {} in all",
        bytes.len()
    );
    port::write16(SELECTOR, COMMAND_LINE);
    for &wanted in &bytes[bytes.len() + 1 - length..] {
        ensure_eq!(port::read8(DATA), wanted, "a letter");
    }
    ensure_eq!(port::read8(DATA), 0, "its end");
    Ok(())
}

/// A directory of a plausible length, whose entries have names; beyond its end there are zeroes.
fn file_directory(_: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    let count = (item(FILE_DIRECTORY, 4) as u32).swap_bytes();
    ensure!(count < 0x1000, "{count} files");
    for file in 0..count {
        let mut first = 0;
        for at in 0..64 {
            let byte = port::read8(DATA);
            if at == 8 {
                first = byte;
            }
        }
        ensure!(first.is_ascii_graphic(), "file {file} has no name");
    }
    for _ in 0..8 {
        ensure_eq!(port::read8(DATA), 0, "a byte behind the directory");
    }
    Ok(())
}

/// The signature by DMA, and an error where there is no memory.
fn dma(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    skip_if!(item(ID, 4) & HAS_DMA == 0, "there is no DMA");
    ensure_eq!(
        port::read32(DMA),
        u32::from_le_bytes(*b"QEMU"),
        "the DMA register"
    );
    let command = scratch(machine)?;
    let target = command + 64;
    // Select the item and read it; all numbers are big-endian.
    let run = |address: u64| {
        memory::write32(command, (u32::from(SIGNATURE) << 16 | 0b1010).swap_bytes());
        memory::write32(command + 4, 6u32.swap_bytes());
        memory::write64(command + 8, address.swap_bytes());
        port::write32(DMA, ((command >> 32) as u32).swap_bytes());
        port::write32(DMA + 4, (command as u32).swap_bytes());
        read32(command).swap_bytes()
    };
    memory::write64(target, u64::MAX);
    ensure_eq!(run(target), 0, "the control word");
    let wanted = u64::from_le_bytes(*b"QEMU\0\0\xff\xff");
    ensure_eq!(memory::read64(target), wanted, "what was read");
    if machine.host == Host::Plinth {
        ensure_eq!(run(u64::MAX - 2), 1, "the control word of a bad address");
    }
    Ok(())
}

/// They give themselves away.
fn debug_ports(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    skip_if!(machine.host != Host::Plinth, "QEMU has them on demand");
    for port in [0xe9, 0x402] {
        ensure_eq!(port::read8(port), 0xe9, "port {port:#x}");
    }
    Ok(())
}

/// Reading the exit port ends nothing.
fn exit_port(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    skip_if!(machine.host != Host::Plinth, "QEMU has it on demand");
    ensure_eq!(port::read8(0xf4), 0, "8 bits");
    ensure_eq!(port::read32(0xf4), 0, "32 bits");
    Ok(())
}

/// Four bytes by every width, and the same ones four ports higher.
fn echo_ports(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    skip_if!(machine.host != Host::Plinth, "QEMU has them on demand");
    port::write32(0xe0, 0x4433_2211);
    ensure_eq!(port::read16(0xe1), 0x3322, "16 bits in the middle");
    port::write8(0xe3, 0x55);
    port::write16(0xe0, 0x7766);
    ensure_eq!(port::read32(0xe8), 0x5533_7766, "the upper ports");
    Ok(())
}

/// A line that is driven is a request at the interrupt controller.
fn interrupt_lines(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    skip_if!(machine.host != Host::Plinth, "QEMU has them on demand");
    const LINE: u16 = 7;
    ensure_eq!(pic::requested() >> LINE & 1, 0, "at first");
    port::write8(0x2000 + LINE, 1);
    let driven = pic::requested() >> LINE & 1;
    port::write8(0x2000 + LINE, 0);
    ensure_eq!(driven, 1, "driven");
    Ok(())
}

/// Device memory keeps what is written.
fn device_memory(machine: &Machine) -> Verdict {
    skip_if!(absent(), NO_FW_CFG);
    skip_if!(machine.host != Host::Plinth, "QEMU has it on demand");
    const BASE: u64 = 0xff00_0000;
    memory::write64(BASE + 0x108, 0x1122_3344_5566_7788);
    ensure_eq!(
        memory::read64(BASE + 0x108),
        0x1122_3344_5566_7788,
        "64 bits"
    );
    ensure_eq!(read32(BASE + 0x10a), 0x3344_5566, "32 bits in the middle");
    memory::write32(BASE + 0xfffc, 0xabcd_ef01);
    ensure_eq!(read32(BASE + 0xfffc), 0xabcd_ef01, "the last ones");
    Ok(())
}
