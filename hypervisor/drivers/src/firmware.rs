//! What the host's firmware says in its ACPI tables, copied out and checked.
//!
//! The tables are found, and their checksums verified, by the `acpi` crate; lists inside them
//! are read here from bytes, so that a damaged length can neither loop nor read past a table.
//! AML is not interpreted: of the DSDT and SSDTs only the `_S5_` package is searched.

use alloc::vec::Vec;
use core::{ops::RangeInclusive, ptr::NonNull, slice};

use acpi::{
    AcpiHandler, AcpiTable, AcpiTables, PhysicalMapping,
    address::{AddressSpace, GenericAddress},
    fadt::Fadt,
    sdt::{SdtHeader, Signature},
};

/// Bytes of the header that every table begins with (ACPI 6.5, table 5.4).
const HEADER: usize = size_of::<SdtHeader>();

/// A processor in the MADT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// APIC or x2APIC ID.
    pub apic_id: u32,
    /// Whether it may be started: enabled, not merely a socket for later.
    pub enabled: bool,
}

/// An I/O APIC in the MADT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicInfo {
    /// Physical address of its registers.
    pub address: u32,
    /// Global number of its first line.
    pub first_gsi: u32,
}

/// Which level means "asserted".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polarity {
    /// High, or rising.
    ActiveHigh,
    /// Low, or falling.
    ActiveLow,
}

/// What raises the interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A change.
    Edge,
    /// A state.
    Level,
}

/// How an ISA interrupt is wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsaInterrupt {
    /// ISA number, 0 to 15.
    pub irq: u8,
    /// Global number of the line.
    pub gsi: u32,
    /// Polarity of the line.
    pub polarity: Polarity,
    /// Trigger mode of the line.
    pub trigger: Trigger,
}

/// A range of PCI Express configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcieRange {
    /// Physical address of bus 0's space.
    pub base: u64,
    /// PCI segment group.
    pub segment: u16,
    /// Buses in the range.
    pub buses: RangeInclusive<u8>,
}

/// The ACPI power-management timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmTimerInfo {
    /// I/O port of the counter.
    pub port: u16,
    /// Whether it counts in 32 bits rather than 24.
    pub wide: bool,
}

/// A register that the firmware names by its address (ACPI 6.5, section 5.2.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterAddress {
    /// An I/O port.
    Port(u16),
    /// A physical address.
    Memory(u64),
}

/// SLP_TYP values of the soft-off state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftOff {
    /// For PM1a.
    pub a: u8,
    /// For PM1b.
    pub b: u8,
}

/// What power-off and reset need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowerInfo {
    /// The `_S5_` package, if it was found.
    pub soft_off: Option<SoftOff>,
    /// PM1a control register.
    pub pm1a_control: Option<u16>,
    /// PM1b control register.
    pub pm1b_control: Option<u16>,
    /// Port and value that turn ACPI mode on.
    pub acpi_enable: Option<(u16, u8)>,
    /// Sleep control register of hardware-reduced machines.
    pub sleep_control: Option<RegisterAddress>,
    /// Reset register and the value to write.
    pub reset: Option<(RegisterAddress, u8)>,
}

/// All that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firmware {
    /// OEM of the root table.
    pub oem: [u8; 6],
    /// Processors, in the firmware's order.
    pub processors: Vec<Processor>,
    /// Physical address of the local APICs.
    pub local_apic: Option<u64>,
    /// I/O APICs.
    pub io_apics: Vec<IoApicInfo>,
    /// ISA interrupts that are not wired one to one.
    pub overrides: Vec<IsaInterrupt>,
    /// PCI Express configuration space.
    pub pcie: Vec<PcieRange>,
    /// Physical address of the HPET.
    pub hpet: Option<u64>,
    /// The power-management timer.
    pub pm_timer: Option<PmTimerInfo>,
    /// Power-off and reset.
    pub power: PowerInfo,
}

impl Firmware {
    /// How ISA interrupt `irq` is wired: as the MADT says, or one to one, edge triggered, active high.
    pub fn isa_interrupt(&self, irq: u8) -> IsaInterrupt {
        self.overrides
            .iter()
            .copied()
            .find(|o| o.irq == irq)
            .unwrap_or(IsaInterrupt {
                irq,
                gsi: u32::from(irq),
                polarity: Polarity::ActiveHigh,
                trigger: Trigger::Edge,
            })
    }
}

/// All of physical memory mapped at one offset.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    offset: usize,
}

impl Window {
    /// Physical address `p` is at virtual address `offset + p`.
    ///
    /// # Safety
    /// That must hold, for reading, for all of RAM and every firmware table, for ever.
    pub unsafe fn new(offset: u64) -> Self {
        Window {
            offset: offset as usize,
        }
    }

    fn at(&self, physical: usize) -> NonNull<u8> {
        NonNull::new(self.offset.wrapping_add(physical) as *mut u8).unwrap_or(NonNull::dangling())
    }
}

impl AcpiHandler for Window {
    unsafe fn map_physical_region<T>(
        &self,
        physical_address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        // SAFETY: the window maps every table (constructor's contract).
        unsafe {
            PhysicalMapping::new(
                physical_address,
                self.at(physical_address).cast(),
                size,
                size,
                *self,
            )
        }
    }

    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}
}

macro_rules! raw_table {
    ($name:ident, $signature:ident) => {
        #[repr(transparent)]
        struct $name(SdtHeader);

        // SAFETY: only the header is described, and every table has one.
        unsafe impl AcpiTable for $name {
            const SIGNATURE: Signature = Signature::$signature;
            fn header(&self) -> &SdtHeader {
                &self.0
            }
        }
    };
}

raw_table!(Madt, MADT);
raw_table!(Mcfg, MCFG);
raw_table!(Hpet, HPET);

/// The bytes of a table after its header; empty when the table is missing or fails its checksum.
fn body<T: AcpiTable>(tables: &AcpiTables<Window>) -> Vec<u8> {
    let Ok(table) = tables.find_table::<T>() else {
        return Vec::new();
    };
    let length = table.get().header().length as usize;
    // SAFETY: `find_table` checked the checksum over `length` bytes, which are mapped by the window.
    let bytes = unsafe {
        slice::from_raw_parts(
            table.virtual_start().as_ptr().cast_const().cast::<u8>(),
            length,
        )
    };
    bytes.get(HEADER..).unwrap_or_default().to_vec()
}

/// The AML of a table at `physical`, after its header.
///
/// # Safety
/// A table must be there.
unsafe fn aml(window: Window, physical: usize) -> Vec<u8> {
    let start = window.at(physical).as_ptr();
    // SAFETY: the caller vouches for the table; its header is mapped by the window.
    let header = unsafe { start.cast::<SdtHeader>().read_unaligned() };
    let length = (header.length as usize).max(HEADER);
    // SAFETY: the table has that many bytes.
    unsafe { slice::from_raw_parts(start.add(HEADER), length - HEADER) }.to_vec()
}

/// Reads the tables. `None`: there is no valid root table at `rsdp`.
///
/// # Safety
/// `rsdp` must be the physical address that the firmware gave for its root pointer.
pub unsafe fn read(window: Window, rsdp: u64) -> Option<Firmware> {
    // SAFETY: the caller vouches for the address.
    let tables = unsafe { AcpiTables::from_rsdp(window, rsdp as usize) }.ok()?;
    let mut firmware = Firmware::default();
    parse_madt(&body::<Madt>(&tables), &mut firmware);
    firmware.pcie = parse_mcfg(&body::<Mcfg>(&tables));
    firmware.hpet = parse_hpet(&body::<Hpet>(&tables));
    if let Ok(fadt) = tables.find_table::<Fadt>() {
        firmware.oem = fadt.header().oem_id;
        read_fadt(&fadt, &mut firmware);
        firmware.power.soft_off = fadt
            .dsdt_address()
            .ok()
            // SAFETY: the FADT, whose checksum is right, says that the DSDT is there.
            .and_then(|dsdt| find_soft_off(&unsafe { aml(window, dsdt) }))
            .or_else(|| {
                tables.ssdts().find_map(|ssdt| {
                    // SAFETY: the root table says that an SSDT is there; `ssdt.address` is past its header.
                    find_soft_off(&unsafe { aml(window, ssdt.address - HEADER) })
                })
            });
    }
    Some(firmware)
}

fn read_fadt(fadt: &Fadt, firmware: &mut Firmware) {
    let port = |address: GenericAddress| match address.address_space {
        AddressSpace::SystemIo => u16::try_from(address.address).ok().filter(|&p| p != 0),
        _ => None,
    };
    let register = |address: GenericAddress| match address.address_space {
        _ if address.address == 0 => None,
        AddressSpace::SystemIo => u16::try_from(address.address)
            .ok()
            .map(RegisterAddress::Port),
        AddressSpace::SystemMemory => Some(RegisterAddress::Memory(address.address)),
        _ => None,
    };
    let flags = fadt.flags;
    firmware.pm_timer = fadt.pm_timer_block().ok().flatten().and_then(|block| {
        Some(PmTimerInfo {
            port: port(block)?,
            wide: flags.pm_timer_is_32_bit(),
        })
    });
    let power = &mut firmware.power;
    if flags.system_is_hw_reduced_acpi() {
        power.sleep_control = fadt
            .sleep_control_register()
            .ok()
            .flatten()
            .and_then(register);
    } else {
        power.pm1a_control = fadt.pm1a_control_block().ok().and_then(port);
        power.pm1b_control = fadt.pm1b_control_block().ok().flatten().and_then(port);
        let (command, enable) = (fadt.smi_cmd_port, fadt.acpi_enable);
        power.acpi_enable = u16::try_from(command)
            .ok()
            .filter(|&p| p != 0 && enable != 0)
            .map(|p| (p, enable));
    }
    if flags.supports_system_reset_via_fadt() {
        power.reset = fadt
            .reset_register()
            .ok()
            .and_then(register)
            .map(|r| (r, fadt.reset_value));
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// MADT body (ACPI 6.5, section 5.2.12): address, flags, then entries of type, length, data.
fn parse_madt(body: &[u8], firmware: &mut Firmware) {
    firmware.local_apic = u32_at(body, 0).map(u64::from);
    let mut rest = body.get(8..).unwrap_or_default();
    while let [kind, length, ..] = *rest {
        let Some((entry, next)) = rest.split_at_checked(usize::from(length).max(2)) else {
            break;
        };
        rest = next;
        // An entry shorter than its kind is skipped, like an unknown kind.
        let _ = parse_madt_entry(kind, entry, firmware);
    }
}

fn parse_madt_entry(kind: u8, entry: &[u8], firmware: &mut Firmware) -> Option<()> {
    const ENABLED: u32 = 1;
    match kind {
        // Processor local APIC.
        0 => {
            let (apic_id, flags) = (u32::from(*entry.get(3)?), u32_at(entry, 4)?);
            push_processor(firmware, apic_id, flags & ENABLED != 0);
        }
        // I/O APIC.
        1 => firmware.io_apics.push(IoApicInfo {
            address: u32_at(entry, 4)?,
            first_gsi: u32_at(entry, 8)?,
        }),
        // Interrupt source override.
        2 => {
            let flags = u16_at(entry, 8)?;
            firmware.overrides.push(IsaInterrupt {
                irq: *entry.get(3)?,
                gsi: u32_at(entry, 4)?,
                // MPS INTI flags: 0 is the bus' default, which is high and edge for ISA.
                polarity: match flags & 3 {
                    3 => Polarity::ActiveLow,
                    _ => Polarity::ActiveHigh,
                },
                trigger: match flags >> 2 & 3 {
                    3 => Trigger::Level,
                    _ => Trigger::Edge,
                },
            });
        }
        // Local APIC address override.
        5 => firmware.local_apic = Some(u64_at(entry, 4)?),
        // Processor local x2APIC.
        9 => {
            let (apic_id, flags) = (u32_at(entry, 4)?, u32_at(entry, 8)?);
            push_processor(firmware, apic_id, flags & ENABLED != 0);
        }
        _ => {}
    }
    Some(())
}

/// Firmware may list a processor both as APIC and as x2APIC; the first entry counts.
fn push_processor(firmware: &mut Firmware, apic_id: u32, enabled: bool) {
    if !firmware.processors.iter().any(|p| p.apic_id == apic_id) {
        firmware.processors.push(Processor { apic_id, enabled });
    }
}

/// MCFG body (PCI Firmware Specification 3.3, section 4.1.2): 8 reserved bytes, then entries of 16.
fn parse_mcfg(body: &[u8]) -> Vec<PcieRange> {
    body.get(8..)
        .unwrap_or_default()
        .chunks_exact(16)
        .filter_map(|entry| {
            Some(PcieRange {
                base: u64_at(entry, 0)?,
                segment: u16_at(entry, 8)?,
                buses: *entry.get(10)?..=*entry.get(11)?,
            })
        })
        .collect()
}

/// HPET body (IA-PC HPET 1.0a, section 3.2.4): event timer block ID, then a generic address.
fn parse_hpet(body: &[u8]) -> Option<u64> {
    const SYSTEM_MEMORY: u8 = 0;
    (*body.get(4)? == SYSTEM_MEMORY)
        .then(|| u64_at(body, 8))
        .flatten()
        .filter(|&address| address != 0)
}

/// Finds `Name (_S5_, Package () { a, b, .. })` in AML (ACPI 6.5, sections 7.4.2 and 20.2).
fn find_soft_off(aml: &[u8]) -> Option<SoftOff> {
    aml.windows(4)
        .enumerate()
        .filter(|(_, name)| name == b"_S5_")
        .find_map(|(at, _)| {
            // NameOp, perhaps with a root prefix, must come before: otherwise it is a use, not the definition.
            let before = aml.get(..at)?;
            if !(before.ends_with(&[0x08]) || before.ends_with(&[0x08, b'\\'])) {
                return None;
            }
            parse_package(aml.get(at + 4..)?)
        })
}

fn parse_package(aml: &[u8]) -> Option<SoftOff> {
    const PACKAGE_OP: u8 = 0x12;
    let [PACKAGE_OP, rest @ ..] = aml else {
        return None;
    };
    // The two top bits of PkgLength's first byte tell how many bytes of it follow.
    let following = usize::from(rest.first()? >> 6);
    let [elements, rest @ ..] = rest.get(1 + following..)? else {
        return None;
    };
    if *elements == 0 {
        return None;
    }
    let (a, rest) = parse_integer(rest)?;
    // A package with one element holds both values in one number.
    let b = match parse_integer(rest) {
        Some((b, _)) if *elements >= 2 => b,
        _ => a >> 8,
    };
    Some(SoftOff {
        a: (a & 7) as u8,
        b: (b & 7) as u8,
    })
}

fn parse_integer(aml: &[u8]) -> Option<(u32, &[u8])> {
    match *aml {
        [value @ (0x00 | 0x01), ref rest @ ..] => Some((u32::from(value), rest)),
        [0xff, ref rest @ ..] => Some((u32::MAX, rest)),
        [0x0a, byte, ref rest @ ..] => Some((u32::from(byte), rest)),
        [0x0b, a, b, ref rest @ ..] => Some((u32::from(u16::from_le_bytes([a, b])), rest)),
        [0x0c, a, b, c, d, ref rest @ ..] => Some((u32::from_le_bytes([a, b, c, d]), rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn soft_off_is_found_in_each_encoding() {
        // QEMU's and Bochs': Name (_S5, Package (4) { 0, 0, 0, 0 })
        let zeros = b"\x10\x20\x08_S5_\x12\x06\x04\x00\x00\x00\x00";
        assert_eq!(find_soft_off(zeros), Some(SoftOff { a: 0, b: 0 }));
        // A PC's: byte constants.
        let bytes = b"\x08\\_S5_\x12\x0a\x04\x0a\x07\x0a\x05\x00\x00";
        assert_eq!(find_soft_off(bytes), Some(SoftOff { a: 7, b: 5 }));
        // PkgLength of two bytes, a word constant.
        let long = b"\x08_S5_\x12\x40\x10\x02\x0b\x05\x00\x01";
        assert_eq!(find_soft_off(long), Some(SoftOff { a: 5, b: 1 }));
        // One element for both.
        let one = b"\x08_S5_\x12\x05\x01\x0b\x07\x05";
        assert_eq!(find_soft_off(one), Some(SoftOff { a: 7, b: 5 }));
    }

    #[test]
    fn a_use_of_the_name_is_not_its_definition() {
        let aml = b"\x70_S5_\x12\x04\x02\x00\x00 \x08_S5_\x12\x06\x02\x0a\x03\x0a\x04";
        assert_eq!(find_soft_off(aml), Some(SoftOff { a: 3, b: 4 }));
        assert_eq!(find_soft_off(b"\x08_S4_\x12\x04\x02\x00\x00"), None);
        assert_eq!(find_soft_off(b"\x08_S5_\x14\x04\x02\x00\x00"), None);
    }

    #[test]
    fn madt_entries_are_read() {
        let mut body = vec![0, 0, 0xe0, 0xfe, 1, 0, 0, 0];
        body.extend([0, 8, 0, 0, 1, 0, 0, 0]); // APIC 0, enabled
        body.extend([0, 8, 1, 5, 0, 0, 0, 0]); // APIC 5, not enabled
        body.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 24, 0, 0, 0]); // I/O APIC
        body.extend([2, 10, 0, 0, 2, 0, 0, 0, 0, 0]); // IRQ 0 is line 2
        body.extend([2, 10, 0, 9, 9, 0, 0, 0, 0xf, 0]); // IRQ 9 is low, level
        body.extend([9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]); // x2APIC 256
        body.extend([9, 16, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // APIC 0 again
        body.extend([0x7f, 3, 0]); // unknown
        body.extend([1, 12, 0]); // cut short
        let mut firmware = Firmware::default();
        parse_madt(&body, &mut firmware);
        assert_eq!(firmware.local_apic, Some(0xfee0_0000));
        let processor = |apic_id, enabled| Processor { apic_id, enabled };
        assert_eq!(
            firmware.processors,
            [
                processor(0, true),
                processor(5, false),
                processor(256, true)
            ]
        );
        assert_eq!(
            firmware.io_apics,
            [IoApicInfo {
                address: 0xfec0_0000,
                first_gsi: 24
            }]
        );
        assert_eq!(firmware.isa_interrupt(0).gsi, 2);
        let nine = firmware.isa_interrupt(9);
        assert_eq!(
            (nine.polarity, nine.trigger),
            (Polarity::ActiveLow, Trigger::Level)
        );
        let four = firmware.isa_interrupt(4);
        assert_eq!(
            (four.gsi, four.polarity, four.trigger),
            (4, Polarity::ActiveHigh, Trigger::Edge)
        );
    }

    #[test]
    fn mcfg_and_hpet_are_read() {
        let mut mcfg = vec![0; 8];
        mcfg.extend(0xb000_0000u64.to_le_bytes());
        mcfg.extend([0, 0, 0, 255, 0, 0, 0, 0, 1, 2]);
        let range = PcieRange {
            base: 0xb000_0000,
            segment: 0,
            buses: 0..=255,
        };
        assert_eq!(parse_mcfg(&mcfg), [range]);
        let mut hpet = vec![1, 0xa2, 0x86, 0x80, 0, 0, 0, 0];
        assert_eq!(parse_hpet(&hpet), None);
        hpet.extend(0xfed0_0000u64.to_le_bytes());
        assert_eq!(parse_hpet(&hpet), Some(0xfed0_0000));
        hpet[4] = 1;
        assert_eq!(parse_hpet(&hpet), None);
    }

    proptest! {
        #[test]
        fn damaged_tables_end_and_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            parse_madt(&bytes, &mut Firmware::default());
            let _ = parse_mcfg(&bytes);
            let _ = parse_hpet(&bytes);
            let mut aml = b"\x08_S5_\x12".to_vec();
            aml.extend(&bytes);
            let _ = find_soft_off(&aml);
        }
    }
}
