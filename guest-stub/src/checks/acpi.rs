//! ACPI tables: found, whole, and in agreement with the machine.

use crate::acpi::{Acpi, Table};
use crate::apic::{self, LOCAL_APIC_ADDRESS};
use crate::cpu::port;
use crate::machine::{Host, Machine};
use crate::memory::{byte_sum, read32};
use crate::{checks, ensure, ensure_eq, fail, skip};

use super::{Verdict, Why};

checks![rsdp, tables, fadt, madt, sleep_state, mcfg];

fn acpi(machine: &Machine) -> Result<&Acpi, Why> {
    machine.acpi.as_ref().ok_or(Why::Skipped("no ACPI tables"))
}

fn name(table: &Table) -> &str {
    core::str::from_utf8(&table.signature).unwrap_or("?")
}

/// Both checksums; under Plinth an XSDT.
fn rsdp(machine: &Machine) -> Verdict {
    ensure!(
        machine.host != Host::Plinth || machine.acpi.is_some(),
        "no RSDP found"
    );
    let acpi = acpi(machine)?;
    ensure_eq!(byte_sum(acpi.rsdp, 20), 0, "sum of the first 20 bytes");
    if acpi.revision >= 2 {
        let length = u64::from(read32(acpi.rsdp + 20));
        ensure_eq!(length, 36, "length");
        ensure_eq!(byte_sum(acpi.rsdp, length), 0, "sum of all bytes");
    }
    ensure!(
        machine.host != Host::Plinth || acpi.revision >= 2,
        "revision {}",
        acpi.revision
    );
    Ok(())
}

/// Names and checksums of all tables, the root included; those that a PC needs are there.
fn tables(machine: &Machine) -> Verdict {
    let acpi = acpi(machine)?;
    let root = acpi.root_table();
    ensure!(
        matches!(&root.signature, b"XSDT" | b"RSDT"),
        "root table {}",
        name(&root)
    );
    ensure!(root.checksum_ok(), "checksum of {}", name(&root));
    for table in acpi.tables() {
        ensure!(
            table.checksum_ok(),
            "checksum of {} at {:#x}",
            name(table),
            table.address
        );
    }
    for needed in [b"FACP", b"APIC", b"DSDT"] {
        let name = core::str::from_utf8(needed).unwrap_or("?");
        ensure!(acpi.table(needed).is_some(), "no {name}");
    }
    Ok(())
}

/// The PM registers are there, and ACPI mode can be on.
fn fadt(machine: &Machine) -> Verdict {
    const SCI_ENABLE: u16 = 1;
    let Some(fadt) = acpi(machine)?.fadt else {
        fail!("no FADT");
    };
    ensure!(
        fadt.pm1a_control != 0 && fadt.pm1a_event != 0,
        "no PM1a blocks"
    );
    let control = port::read16(fadt.pm1a_control);
    ensure!(
        control != u16::MAX,
        "nothing at the PM1a control port {:#x}",
        fadt.pm1a_control
    );
    if control & SCI_ENABLE == 0 {
        ensure!(
            fadt.smi_command != 0,
            "ACPI mode is off, and there is no SMI command port"
        );
        port::write8(fadt.smi_command, fadt.acpi_enable);
        let on = (0..100_000).any(|_| port::read16(fadt.pm1a_control) & SCI_ENABLE != 0);
        ensure!(on, "ACPI mode does not come on");
    }
    // The enable register keeps the power button's bit.
    let enable = fadt.pm1a_event + 2;
    let before = port::read16(enable);
    port::write16(enable, before | 1 << 8);
    let kept = port::read16(enable);
    port::write16(enable, before);
    ensure!(
        kept & 1 << 8 != 0,
        "PM1 enable does not keep PWRBTN_EN: {kept:#x}"
    );
    Ok(())
}

/// The MADT's processors, local APIC and IOAPIC are those of the machine.
fn madt(machine: &Machine) -> Verdict {
    let Some(madt) = acpi(machine)?.madt else {
        fail!("no MADT");
    };
    ensure_eq!(madt.local_apic, LOCAL_APIC_ADDRESS, "local APIC address");
    ensure!(madt.processors >= 1, "no processors");
    let Some((address, base)) = madt.ioapic else {
        fail!("no IOAPIC");
    };
    ensure!(
        (0xFEC0_0000..0xFEE0_0000).contains(&address),
        "IOAPIC at {address:#x}"
    );
    ensure_eq!(base, 0, "first interrupt of the IOAPIC");
    if let Some(ioapic) = machine.ioapic {
        let id = ioapic.read(apic::IOAPIC_ID);
        ensure!(
            id >> 28 == 0 && id & 0xFF_FFFF == 0,
            "IOAPIC id register {id:#x}"
        );
        for entry in madt.overrides() {
            ensure!(
                entry.gsi < ioapic.entries().into(),
                "{entry:?} is beyond the IOAPIC"
            );
        }
    }
    Ok(())
}

/// The DSDT has \_S5, by which `end=poweroff` works.
fn sleep_state(machine: &Machine) -> Verdict {
    let s5 = acpi(machine)?.s5;
    ensure!(s5.is_some_and(|(a, b)| a < 8 && b < 8), "\\_S5: {s5:?}");
    Ok(())
}

/// The memory-mapped PCI configuration space shows what the ports show.
fn mcfg(machine: &Machine) -> Verdict {
    const ADDRESS: u16 = 0xCF8;
    const DATA: u16 = 0xCFC;
    let Some(table) = acpi(machine)?.table(b"MCFG") else {
        skip!("no MCFG");
    };
    ensure!(table.length >= 60, "MCFG of {} bytes", table.length);
    let base = u64::from(read32(table.address + 44));
    ensure!(
        base != 0 && base < 1 << 32,
        "configuration space at {base:#x}"
    );
    for device in 0..32_u32 {
        port::write32(ADDRESS, 1 << 31 | device << 11);
        let by_port = port::read32(DATA);
        let by_memory = read32(base + u64::from(device) * 0x8000);
        ensure_eq!(by_memory, by_port, "identity of device {device}");
    }
    Ok(())
}
