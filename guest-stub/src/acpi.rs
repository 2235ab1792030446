//! ACPI tables, as far as a guest of this size needs them: find, checksum, FADT, MADT, \_S5.

use crate::memory::{byte_sum, read_bytes, read8, read16, read32, read64};
use crate::time::PmTimer;

/// A table's place and name.
#[derive(Clone, Copy, Default)]
pub struct Table {
    pub signature: [u8; 4],
    pub address: u64,
    pub length: u32,
}

impl Table {
    fn at(address: u64) -> Self {
        let mut signature = [0; 4];
        read_bytes(address, &mut signature);
        Self {
            signature,
            address,
            length: read32(address + 4),
        }
    }

    /// All bytes sum up to zero.
    pub fn checksum_ok(&self) -> bool {
        (HEADER..=LENGTH_LIMIT).contains(&u64::from(self.length))
            && byte_sum(self.address, self.length.into()) == 0
    }

    /// Who made it: six characters.
    pub fn oem_id(&self) -> [u8; 6] {
        let mut id = [0; 6];
        read_bytes(self.address + 10, &mut id);
        id
    }
}

/// Bytes of the header that all tables share.
const HEADER: u64 = 36;
/// No table of a guest is larger; a longer length is taken for damage.
const LENGTH_LIMIT: u64 = 1 << 20;

/// Redirection of an ISA interrupt.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Override {
    pub irq: u8,
    pub gsi: u32,
    pub flags: u16,
}

/// What the MADT says.
#[derive(Clone, Copy, Default)]
pub struct Madt {
    pub local_apic: u64,
    /// An 8259 pair is there too.
    pub pic: bool,
    pub processors: u32,
    ids: [u32; 32],
    /// Address and first interrupt of the first IOAPIC.
    pub ioapic: Option<(u64, u32)>,
    pub overrides: [Override; 8],
    pub override_count: usize,
}

impl Madt {
    /// Redirections of ISA interrupts.
    pub fn overrides(&self) -> &[Override] {
        self.overrides
            .get(..self.override_count)
            .unwrap_or_default()
    }

    /// APIC ids of the enabled processors, the first few of them.
    pub fn ids(&self) -> &[u32] {
        let count = self.ids.len().min(self.processors as usize);
        &self.ids[..count]
    }

    fn add_processor(&mut self, id: u32) {
        if let Some(slot) = self.ids.get_mut(self.processors as usize) {
            *slot = id;
        }
        self.processors += 1;
    }

    /// The IOAPIC pin, polarity and trigger of an ISA interrupt: (pin, active low, level).
    pub fn isa_pin(&self, irq: u8) -> (u8, bool, bool) {
        match self.overrides().iter().find(|entry| entry.irq == irq) {
            Some(entry) => (
                entry.gsi as u8,
                entry.flags & 3 == 3,
                entry.flags >> 2 & 3 == 3,
            ),
            None => (irq, false, false),
        }
    }
}

/// What the FADT says.
#[derive(Clone, Copy, Default)]
pub struct Fadt {
    pub sci: u16,
    pub smi_command: u16,
    pub acpi_enable: u8,
    pub pm1a_event: u16,
    pub pm1a_control: u16,
    pub pm1b_control: u16,
    pub pm_timer: u16,
    pub flags: u32,
    pub dsdt: u64,
    pub boot_flags: u16,
    /// Reset register port and value, when the flags say that it works.
    pub reset: Option<(u16, u8)>,
}

impl Fadt {
    /// The PM timer is 32 bits wide.
    const TIMER_EXTENDED: u32 = 1 << 8;
    /// The reset register is supported.
    const RESET_SUPPORTED: u32 = 1 << 10;
    /// Generic address: in I/O space.
    const IO_SPACE: u8 = 1;

    fn parse(table: &Table) -> Self {
        let base = table.address;
        let flags = read32(base + 112);
        let has_reset = u64::from(table.length) > 128
            && flags & Self::RESET_SUPPORTED != 0
            && read8(base + 116) == Self::IO_SPACE;
        let extended_dsdt = if table.length >= 148 {
            read64(base + 140)
        } else {
            0
        };
        Self {
            sci: read16(base + 46),
            smi_command: read32(base + 48) as u16,
            acpi_enable: read8(base + 52),
            pm1a_event: read32(base + 56) as u16,
            pm1a_control: read32(base + 64) as u16,
            pm1b_control: read32(base + 68) as u16,
            pm_timer: read32(base + 76) as u16,
            flags,
            dsdt: if extended_dsdt == 0 {
                read32(base + 40).into()
            } else {
                extended_dsdt
            },
            boot_flags: read16(base + 109),
            reset: has_reset.then(|| (read64(base + 120) as u16, read8(base + 128))),
        }
    }

    /// The power-management timer, if there is one.
    pub fn timer(&self) -> Option<PmTimer> {
        (self.pm_timer != 0).then_some(PmTimer {
            port: self.pm_timer,
            extended: self.flags & Self::TIMER_EXTENDED != 0,
        })
    }
}

/// Everything found.
#[derive(Clone, Copy)]
pub struct Acpi {
    pub rsdp: u64,
    /// 0 is ACPI 1.0 (RSDT), 2 and up have an XSDT.
    pub revision: u8,
    pub root: u64,
    tables: [Table; 16],
    table_count: usize,
    pub fadt: Option<Fadt>,
    pub madt: Option<Madt>,
    /// SLP_TYP values of \_S5 for PM1a and PM1b.
    pub s5: Option<(u8, u8)>,
}

impl Acpi {
    /// Finds the tables; `rsdp` is where the loader says they start, if it does.
    pub fn find(rsdp: Option<u64>) -> Option<Self> {
        let rsdp = rsdp
            .filter(|&address| is_rsdp(address))
            .or_else(scan_for_rsdp)?;
        let revision = read8(rsdp + 15);
        let xsdt = if revision >= 2 { read64(rsdp + 24) } else { 0 };
        let root = if xsdt != 0 {
            xsdt
        } else {
            read32(rsdp + 16).into()
        };
        let mut acpi = Self {
            rsdp,
            revision,
            root,
            tables: [Table::default(); 16],
            table_count: 0,
            fadt: None,
            madt: None,
            s5: None,
        };
        let width = if xsdt != 0 { 8 } else { 4 };
        let length = u64::from(read32(root + 4)).min(LENGTH_LIMIT);
        let count = length.saturating_sub(HEADER) / width;
        for index in 0..count.min(15) {
            let slot = root + HEADER + index * width;
            let address = if width == 8 {
                read64(slot)
            } else {
                read32(slot).into()
            };
            acpi.add(Table::at(address));
        }
        acpi.fadt = acpi.table(b"FACP").map(|table| Fadt::parse(&table));
        acpi.madt = acpi.table(b"APIC").map(|table| parse_madt(&table));
        if let Some(fadt) = acpi.fadt {
            let dsdt = Table::at(fadt.dsdt);
            acpi.add(dsdt);
            acpi.s5 = acpi
                .tables()
                .iter()
                .filter(|table| matches!(&table.signature, b"DSDT" | b"SSDT"))
                .find_map(find_s5);
        }
        Some(acpi)
    }

    fn add(&mut self, table: Table) {
        if let Some(slot) = self.tables.get_mut(self.table_count) {
            *slot = table;
            self.table_count += 1;
        }
    }

    /// The tables in the order of the root table, the DSDT last.
    pub fn tables(&self) -> &[Table] {
        self.tables.get(..self.table_count).unwrap_or_default()
    }

    /// The first table of a name.
    pub fn table(&self, signature: &[u8; 4]) -> Option<Table> {
        self.tables()
            .iter()
            .find(|table| &table.signature == signature)
            .copied()
    }

    /// The root table itself.
    pub fn root_table(&self) -> Table {
        Table::at(self.root)
    }
}

fn is_rsdp(address: u64) -> bool {
    let mut signature = [0; 8];
    read_bytes(address, &mut signature);
    &signature == b"RSD PTR " && byte_sum(address, 20) == 0
}

/// Looks where ACPI says: the first KiB of the EBDA, then the BIOS area (ACPI 5.2.5.1).
fn scan_for_rsdp() -> Option<u64> {
    let ebda = u64::from(read16(0x40E)) << 4;
    let ebda = (0x8_0000..0xA_0000)
        .contains(&ebda)
        .then_some((ebda, ebda + 1024));
    ebda.into_iter()
        .chain([(0xE_0000, 0x10_0000)])
        .flat_map(|(start, end)| (start..end).step_by(16))
        .find(|&address| is_rsdp(address))
}

fn parse_madt(table: &Table) -> Madt {
    const PROCESSOR: u8 = 0;
    const IOAPIC: u8 = 1;
    const INTERRUPT_OVERRIDE: u8 = 2;
    const PROCESSOR_X2APIC: u8 = 9;
    const ENABLED: u32 = 1;

    let base = table.address;
    let mut madt = Madt {
        local_apic: read32(base + 36).into(),
        pic: read32(base + 40) & 1 != 0,
        ..Madt::default()
    };
    let end = base + u64::from(table.length).min(LENGTH_LIMIT);
    let mut entry = base + 44;
    while entry + 2 <= end {
        let length = u64::from(read8(entry + 1));
        match read8(entry) {
            PROCESSOR if read32(entry + 4) & ENABLED != 0 => {
                madt.add_processor(read8(entry + 3).into());
            }
            PROCESSOR_X2APIC if read32(entry + 8) & ENABLED != 0 => {
                madt.add_processor(read32(entry + 4));
            }
            IOAPIC if madt.ioapic.is_none() => {
                madt.ioapic = Some((read32(entry + 4).into(), read32(entry + 8)));
            }
            INTERRUPT_OVERRIDE => {
                if let Some(slot) = madt.overrides.get_mut(madt.override_count) {
                    *slot = Override {
                        irq: read8(entry + 3),
                        gsi: read32(entry + 4),
                        flags: read16(entry + 8),
                    };
                    madt.override_count += 1;
                }
            }
            // NMI sources, disabled processors and kinds that came later: not needed here.
            _ => {}
        }
        if length < 2 {
            break;
        }
        entry += length;
    }
    madt
}

/// Finds `Name (_S5, Package () { a, b, .. })` in AML by its bytes; no interpreter is needed,
/// for compilers emit it literally.
fn find_s5(table: &Table) -> Option<(u8, u8)> {
    const NAME: u8 = 0x08;
    const PACKAGE: u8 = 0x12;
    const ROOT: u8 = b'\\';

    let start = table.address + HEADER;
    let end = table.address + u64::from(table.length).min(LENGTH_LIMIT);
    // The name may be the very first object: byte 0 is NAME then, and the name begins at byte 1.
    (start + 1..end.saturating_sub(8)).find_map(|address| {
        let name = read32(address).to_le_bytes();
        let before = (read8(address - 2), read8(address - 1));
        let named = before.1 == NAME || before == (NAME, ROOT);
        if &name != b"_S5_" || !named || read8(address + 4) != PACKAGE {
            return None;
        }
        // The package's length takes one to four bytes, then comes the number of elements.
        let mut at = address + 5;
        at += 1 + u64::from(read8(at) >> 6);
        at += 1;
        let (first, at) = aml_integer(at)?;
        let (second, _) = aml_integer(at).unwrap_or((first, at));
        Some((first, second))
    })
}

/// A small AML integer and the address after it.
fn aml_integer(address: u64) -> Option<(u8, u64)> {
    const ZERO: u8 = 0x00;
    const ONE: u8 = 0x01;
    const BYTE: u8 = 0x0A;
    const WORD: u8 = 0x0B;
    const DWORD: u8 = 0x0C;
    match read8(address) {
        value @ (ZERO | ONE) => Some((value, address + 1)),
        BYTE => Some((read8(address + 1), address + 2)),
        WORD => Some((read8(address + 1), address + 3)),
        DWORD => Some((read8(address + 1), address + 5)),
        _ => None,
    }
}
