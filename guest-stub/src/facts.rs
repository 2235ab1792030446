//! Facts: what this machine looks like at entry, one `fact NAME = VALUE` a line.
//!
//! Only what must not depend on the processor's vendor, so that a test can compare the lines
//! of two backends word for word. Printed before any device is touched.

use core::sync::atomic::Ordering::Relaxed;

use crate::apic::{self, Register, pic};
use crate::boot::ENTRY;
use crate::console::{COM1, Text, register};
use crate::cpu::{self, ExtendedEdx, Leaf1Ecx, Leaf1Edx, cpuid, msr, port};
use crate::interrupts::{guarded, probe_rdmsr};
use crate::machine::{Machine, signatures};
use crate::println;

/// Prints all facts.
pub fn print(machine: &Machine) {
    for (section, print) in [
        ("entry", entry as fn(&Machine)),
        ("cpuid", processor),
        ("msr", registers),
        ("apic", interrupt_controllers),
        ("device", devices),
        ("memory", memory),
        ("acpi", tables),
    ] {
        if let Err(trap) = guarded(|| print(machine)) {
            println!("fact {section}.exception = {trap}");
        }
    }
}

fn entry(machine: &Machine) {
    println!("fact entry.protocol = {:?}", machine.handoff.protocol);
    for module in machine.handoff.modules.iter().flatten() {
        println!(
            "fact entry.module.{:#x} = {} bytes, sum {:#x}, \"{}\"",
            module.start,
            module.bytes,
            module.sum,
            module.text.as_str()
        );
    }
    println!("fact entry.cr0 = {:#x}", ENTRY.cr0.load(Relaxed));
    println!("fact entry.cr4 = {:#x}", ENTRY.cr4.load(Relaxed));
    println!("fact entry.efer = {:#x}", ENTRY.efer.load(Relaxed));
    println!("fact entry.eflags = {:#x}", ENTRY.eflags.load(Relaxed));
}

fn processor(_: &Machine) {
    let hypervisor = cpu::leaf1_ecx().contains(Leaf1Ecx::HYPERVISOR);
    println!("fact cpuid.hypervisor = {hypervisor}");
    for (base, signature) in signatures() {
        println!("fact cpuid.signature.{base:#x} = {}", printable(&signature));
    }
    println!(
        "fact cpuid.baseline = {:?}",
        cpu::leaf1_edx() & Leaf1Edx::all()
    );
    println!(
        "fact cpuid.extended = {:?}",
        cpu::extended_edx() & ExtendedEdx::all()
    );
    println!("fact cpuid.apic-id = {}", cpuid(1, 0).ebx >> 24);
}

fn registers(_: &Machine) {
    for (name, index) in [
        ("apic-base", msr::APIC_BASE),
        ("pat", msr::PAT),
        ("efer", msr::EFER),
        ("mtrr-default", msr::MTRR_DEF_TYPE),
        ("sysenter-cs", msr::SYSENTER_CS),
        ("star", msr::STAR),
        ("lstar", msr::LSTAR),
        ("sfmask", msr::SFMASK),
        ("fs-base", msr::FS_BASE),
        ("kernel-gs-base", msr::KERNEL_GS_BASE),
    ] {
        match probe_rdmsr(index) {
            Ok(value) => println!("fact msr.{name} = {value:#x}"),
            Err(trap) => println!("fact msr.{name} = exception {}", trap.vector),
        }
    }
    println!("fact register.dr6 = {:#x}", cpu::dr6());
    println!("fact register.dr7 = {:#x}", cpu::dr7());
}

fn interrupt_controllers(machine: &Machine) {
    let local = apic::local();
    for (name, register) in [
        ("id", Register::Id),
        ("version", Register::Version),
        ("task-priority", Register::TaskPriority),
        ("spurious", Register::Spurious),
        ("destination-format", Register::DestinationFormat),
        ("timer", Register::Timer),
        ("lint0", Register::Lint0),
        ("lint1", Register::Lint1),
        ("error", Register::Error),
        ("error-status", Register::ErrorStatus),
        ("divide", Register::Divide),
    ] {
        println!("fact apic.{name} = {:#x}", local.read(register));
    }
    if let Some(ioapic) = machine.ioapic {
        println!("fact ioapic.id = {:#x}", ioapic.read(apic::IOAPIC_ID));
        println!(
            "fact ioapic.version = {:#x}",
            ioapic.read(apic::IOAPIC_VERSION)
        );
        println!("fact ioapic.entry0 = {:#x}", ioapic.entry(0));
    }
    println!("fact pic.masks = {:#x}", pic::masks());
}

fn devices(_: &Machine) {
    const PCI_ADDRESS: u16 = 0xCF8;
    const PCI_DATA: u16 = 0xCFC;
    port::write32(PCI_ADDRESS, 1 << 31);
    println!("fact pci.0:0.0.id = {:#010x}", port::read32(PCI_DATA));
    port::write32(PCI_ADDRESS, 1 << 31 | 8);
    println!("fact pci.0:0.0.class = {:#010x}", port::read32(PCI_DATA));
    let count = (0..32).filter(|device| {
        port::write32(PCI_ADDRESS, 1 << 31 | device << 11);
        port::read32(PCI_DATA) != u32::MAX
    });
    println!("fact pci.devices = {}", count.count());
    for (name, offset) in [
        ("interrupt-enable", register::INTERRUPT_ENABLE),
        ("line-control", register::LINE_CONTROL),
        ("modem-status", register::MODEM_STATUS),
    ] {
        println!("fact uart.{name} = {:#x}", port::read8(COM1 + offset));
    }
    println!("fact i8042.status = {:#x}", port::read8(0x64));
}

fn memory(machine: &Machine) {
    for region in machine.handoff.map.regions() {
        println!(
            "fact memory.{:#x} = {:#x} bytes, kind {}",
            region.base, region.length, region.kind
        );
    }
}

fn tables(machine: &Machine) {
    let Some(acpi) = machine.acpi else {
        println!("fact acpi = absent");
        return;
    };
    println!("fact acpi.revision = {}", acpi.revision);
    for table in acpi.tables() {
        println!(
            "fact acpi.{} = {} bytes, by {}",
            printable(&table.signature),
            table.length,
            printable(&table.oem_id())
        );
    }
    if let Some(fadt) = acpi.fadt {
        println!("fact acpi.sci = {}", fadt.sci);
        println!("fact acpi.pm-timer = {:#x}", fadt.pm_timer);
        println!("fact acpi.pm1a-control = {:#x}", fadt.pm1a_control);
        println!("fact acpi.boot-flags = {:#x}", fadt.boot_flags);
        println!("fact acpi.flags = {:#x}", fadt.flags);
    }
    if let Some(madt) = acpi.madt {
        println!("fact acpi.processors = {}", madt.processors);
        println!("fact acpi.pic = {}", madt.pic);
        for entry in madt.overrides() {
            println!(
                "fact acpi.irq{} = gsi {}, flags {:#x}",
                entry.irq, entry.gsi, entry.flags
            );
        }
    }
}

/// Bytes as text, with dots for what cannot be printed and without trailing blanks.
fn printable(bytes: &[u8]) -> Text<16> {
    let mut text = Text::new();
    let end = bytes
        .iter()
        .rposition(|byte| !matches!(byte, 0 | b' '))
        .map_or(0, |last| last + 1);
    for &byte in &bytes[..end] {
        text.push(if byte.is_ascii_graphic() || byte == b' ' {
            byte
        } else {
            b'.'
        });
    }
    text
}
