//! The ACPI tables that a guest finds: what hardware there is and where.
//!
//! [`build`] lays out RSDP, RSDT, XSDT, FADT, FACS, MADT, MCFG, HPET and DSDT one after
//! the other from a base address, RSDP first (ACPI 6.5, chapter 5); [`loader_files`] gives them to firmware,
//! which places them itself. Static tables are plain layouts
//! here; the DSDT's AML is in [`dsdt`](self). All tables lie below 4 GiB, so that 32-bit
//! pointers reach them.

mod dsdt;
mod layout;
mod loader;

use alloc::vec::Vec;
use core::fmt;

use mem::Gpa;
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use crate::hpet::{HPET_BASE, HPET_HZ, HPET_ID};
use crate::ioapic::IOAPIC_BASE;
use crate::lapic::XAPIC_BASE;
use crate::line::TIMER_GSI;
use crate::pci::PciLayout;
use crate::platform::{PM_BASE, SCI_IRQ, SerialPort};
use crate::time::MIN_INTERRUPT_PERIOD_US;
use crate::{pm, rtc};
pub use loader::{LoaderFiles, loader_files};

use layout::{
    BootFlags, Facs, Fadt, FadtFlags, GenericAddress, Header, HpetFixed, IoApicEntry,
    LocalApicEntry, LocalApicNmi, LocalX2ApicEntry, LocalX2ApicNmi, MadtFixed, McfgEntry, Override,
    Rsdp,
};

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct AcpiConfig<'a> {
    /// APIC ID of each vCPU; the first is the bootstrap processor.
    pub apic_ids: &'a [u32],
    /// ID of the IOAPIC.
    pub ioapic_id: u8,
    /// Serial ports that are there.
    pub serial_ports: &'a [SerialPort],
    /// Announce the keyboard controller and a keyboard. Without it a guest does not look for one;
    /// the controller's reset command works either way.
    pub keyboard: bool,
    /// PCI windows.
    pub pci: PciLayout,
}

/// The finished tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Where the RSDP is.
    pub rsdp: Gpa,
    /// Where the FACS is.
    pub facs: Gpa,
    /// Each table with its place, in ascending order.
    pub tables: Vec<(Gpa, Vec<u8>)>,
    /// First address after the last table.
    pub end: Gpa,
}

/// The tables would not lie below 4 GiB, or the base is not 64-byte aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadBase(pub Gpa);

impl fmt::Display for BadBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ACPI tables cannot be at {}: needed is a multiple of 64 with room below 4 GiB",
            self.0
        )
    }
}

impl core::error::Error for BadBase {}

/// Places tables one after the other.
struct Placer {
    next: Gpa,
    tables: Vec<(Gpa, Vec<u8>)>,
}

impl Placer {
    fn place(&mut self, table: Vec<u8>) -> Gpa {
        let at = self.next;
        self.next = Gpa((at.0 + table.len() as u64).next_multiple_of(64));
        self.tables.push((at, table));
        at
    }
}

/// Builds the tables from `base`, a multiple of 64.
pub fn build(config: &AcpiConfig<'_>, base: Gpa) -> Result<AcpiTables, BadBase> {
    const LIMIT: u64 = 1 << 32;
    if !base.is_aligned(64) || base.0 >= LIMIT {
        return Err(BadBase(base));
    }
    let mut placer = Placer {
        next: base,
        tables: Vec::new(),
    };
    // The RSDP comes first but points to what comes last: its place is known, its content not yet.
    let rsdp = placer.place(alloc::vec![0; size_of::<Rsdp>()]);
    let dsdt = placer.place(table(*b"DSDT", 2, &[&dsdt::aml(config)]));
    let facs = placer.place(Facs::new().as_bytes().to_vec());
    let fadt = placer.place(fadt(config, facs, dsdt));
    let madt = placer.place(madt(config));
    let mut listed = alloc::vec![fadt, madt, placer.place(hpet())];
    if let Some(ecam) = config.pci.ecam {
        listed.push(placer.place(mcfg(ecam)));
    }
    let narrow: Vec<U32> = listed.iter().map(|at| U32::new(at.0 as u32)).collect();
    let wide: Vec<U64> = listed.iter().map(|at| U64::new(at.0)).collect();
    let rsdt = placer.place(table(*b"RSDT", 1, &[narrow.as_bytes()]));
    let xsdt = placer.place(table(*b"XSDT", 1, &[wide.as_bytes()]));
    if placer.next.0 > LIMIT {
        return Err(BadBase(base));
    }
    placer.tables[0].1 = Rsdp::new(rsdt, xsdt).as_bytes().to_vec();
    Ok(AcpiTables {
        rsdp,
        facs,
        tables: placer.tables,
        end: placer.next,
    })
}

/// The byte that makes all bytes sum up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, &b| sum.wrapping_add(b))
        .wrapping_neg()
}

/// A table: header, then the parts.
fn table(signature: [u8; 4], revision: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length = size_of::<Header>() + parts.iter().map(|p| p.len()).sum::<usize>();
    let mut bytes = Header::new(signature, length as u32, revision)
        .as_bytes()
        .to_vec();
    for part in parts {
        bytes.extend_from_slice(part);
    }
    bytes[Header::CHECKSUM] = checksum(&bytes);
    bytes
}

fn fadt(config: &AcpiConfig<'_>, facs: Gpa, dsdt: Gpa) -> Vec<u8> {
    let mut boot = BootFlags::LEGACY_DEVICES | BootFlags::NO_VGA | BootFlags::NO_ASPM;
    boot.set(BootFlags::I8042, config.keyboard);
    // No fixed sleep button and no RTC wake-up; the power button is fixed hardware.
    let flags = FadtFlags::WBINVD
        | FadtFlags::C1_ON_ALL
        | FadtFlags::NO_SLEEP_BUTTON
        | FadtFlags::NO_FIXED_RTC
        | FadtFlags::TIMER_32_BITS
        | FadtFlags::RESET_REGISTER;
    let event = PM_BASE + pm::PM1_EVENT;
    let control = PM_BASE + pm::PM1_CONTROL;
    let timer = PM_BASE + pm::PM_TIMER;
    let body = Fadt {
        facs: U32::new(facs.0 as u32),
        dsdt: U32::new(dsdt.0 as u32),
        sci: U16::new(u16::from(SCI_IRQ)),
        pm1a_event: U32::new(u32::from(event)),
        pm1a_control: U32::new(u32::from(control)),
        pm_timer: U32::new(u32::from(timer)),
        pm1_event_len: 4,
        pm1_control_len: 2,
        pm_timer_len: 4,
        // More than 100 and 1000 microseconds: there is no C2 and no C3.
        c2_latency: U16::new(0xfff),
        c3_latency: U16::new(0xfff),
        century: rtc::CENTURY_INDEX,
        boot_flags: U16::new(boot.bits()),
        flags: U32::new(flags.bits()),
        reset_register: GenericAddress::port(crate::pm::RESET_PORT, 8),
        reset_value: pm::RESET_VALUE,
        x_facs: U64::new(facs.0),
        x_dsdt: U64::new(dsdt.0),
        x_pm1a_event: GenericAddress::port(event, 32),
        x_pm1a_control: GenericAddress::port(control, 16),
        x_pm_timer: GenericAddress::port(timer, 32),
        hypervisor: *b"PLINTH\0\0",
        ..Fadt::default()
    };
    table(*b"FACP", 6, &[body.as_bytes()])
}

fn mcfg(ecam: u64) -> Vec<u8> {
    let entry = McfgEntry {
        base: U64::new(ecam),
        segment: U16::ZERO,
        start_bus: 0,
        end_bus: 0,
        reserved: U32::ZERO,
    };
    table(*b"MCFG", 1, &[&[0; 8], entry.as_bytes()])
}

fn hpet() -> Vec<u8> {
    let body = HpetFixed {
        id: U32::new(HPET_ID),
        address: GenericAddress::memory(HPET_BASE, 64),
        number: 0,
        // No periodic interrupt is closer to the next.
        min_tick: U16::new((HPET_HZ / 1_000_000 * MIN_INTERRUPT_PERIOD_US) as u16),
        protection: 0,
    };
    table(*b"HPET", 1, &[body.as_bytes()])
}

fn madt(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    let mut put = |entry: &[u8]| body.extend_from_slice(entry);
    put(MadtFixed {
        local_apic: U32::new(XAPIC_BASE as u32),
        // PC/AT-compatible: there is an 8259A pair.
        flags: U32::new(1),
    }
    .as_bytes());
    let mut any_wide = false;
    for (uid, &id) in (0u32..).zip(config.apic_ids) {
        // 255 is the xAPIC's broadcast; from there on it takes x2APIC entries.
        match (u8::try_from(id), u8::try_from(uid)) {
            (Ok(id), Ok(uid)) if id < 255 && uid < 255 => {
                put(LocalApicEntry::new(uid, id).as_bytes());
            }
            _ => {
                any_wide = true;
                put(LocalX2ApicEntry::new(uid, id).as_bytes());
            }
        }
    }
    put(IoApicEntry::new(config.ioapic_id, IOAPIC_BASE as u32, 0).as_bytes());
    put(Override::new(0, TIMER_GSI, Override::AS_BUS).as_bytes());
    put(Override::new(SCI_IRQ, u32::from(SCI_IRQ), Override::LEVEL_ACTIVE_HIGH).as_bytes());
    put(LocalApicNmi::all_on_lint1().as_bytes());
    if any_wide {
        put(LocalX2ApicNmi::all_on_lint1().as_bytes());
    }
    table(*b"APIC", 5, &[&body])
}

#[cfg(test)]
mod tests;
