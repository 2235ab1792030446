//! Layouts of the static tables (ACPI 6.5, section 5.2).

use bitflags::bitflags;
use mem::Gpa;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::checksum;

const OEM_ID: [u8; 6] = *b"PLINTH";
const OEM_TABLE_ID: [u8; 8] = *b"PLINTHPC";
const CREATOR_ID: [u8; 4] = *b"PLTH";

/// Table header (section 5.2.6).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Header {
    signature: [u8; 4],
    length: U32,
    revision: u8,
    checksum: u8,
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: U32,
    creator_id: [u8; 4],
    creator_revision: U32,
}
const _: () = assert!(size_of::<Header>() == 36);
const _: () = assert!(core::mem::offset_of!(Header, checksum) == Header::CHECKSUM);

impl Header {
    /// Offset of the checksum.
    pub(super) const CHECKSUM: usize = 9;

    pub(super) fn new(signature: [u8; 4], length: u32, revision: u8) -> Self {
        Header {
            signature,
            length: U32::new(length),
            revision,
            checksum: 0,
            oem_id: OEM_ID,
            oem_table_id: OEM_TABLE_ID,
            oem_revision: U32::new(1),
            creator_id: CREATOR_ID,
            creator_revision: U32::new(1),
        }
    }
}

/// Root system description pointer (section 5.2.5.3).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Rsdp {
    signature: [u8; 8],
    checksum: u8,
    oem_id: [u8; 6],
    revision: u8,
    rsdt: U32,
    length: U32,
    xsdt: U64,
    extended_checksum: u8,
    reserved: [u8; 3],
}
const _: () = assert!(size_of::<Rsdp>() == 36);

impl Rsdp {
    /// Bytes that the first checksum covers.
    pub(super) const ACPI_1_LEN: usize = 20;

    pub(super) fn new(rsdt: Gpa, xsdt: Gpa) -> Self {
        let mut rsdp = Rsdp {
            signature: *b"RSD PTR ",
            checksum: 0,
            oem_id: OEM_ID,
            revision: 2,
            rsdt: U32::new(rsdt.0 as u32),
            length: U32::new(size_of::<Rsdp>() as u32),
            xsdt: U64::new(xsdt.0),
            extended_checksum: 0,
            reserved: [0; 3],
        };
        rsdp.checksum = checksum(&rsdp.as_bytes()[..Self::ACPI_1_LEN]);
        rsdp.extended_checksum = checksum(rsdp.as_bytes());
        rsdp
    }
}

/// Generic address structure (section 5.2.3.2).
#[derive(Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct GenericAddress {
    space: u8,
    bits: u8,
    bit_offset: u8,
    access: u8,
    address: U64,
}
const _: () = assert!(size_of::<GenericAddress>() == 12);

impl GenericAddress {
    /// A register of 8, 16 or 32 bits at a port.
    pub(super) fn port(port: u16, bits: u8) -> Self {
        GenericAddress {
            space: 1,
            bits,
            bit_offset: 0,
            // 1 is byte, 2 word, 3 dword. The 32-bit event block is two 16-bit registers, which an
            // operating system takes apart by itself.
            access: match bits {
                8 => 1,
                16 => 2,
                _ => 3,
            },
            address: U64::new(u64::from(port)),
        }
    }

    /// A register of `bits` bits in memory; the size of an access is left to the device.
    pub(super) fn memory(address: u64, bits: u8) -> Self {
        GenericAddress {
            space: 0,
            bits,
            bit_offset: 0,
            access: 0,
            address: U64::new(address),
        }
    }
}

bitflags! {
    /// IA-PC boot architecture flags (table 5.11).
    #[derive(Clone, Copy)]
    pub(super) struct BootFlags: u16 {
        const LEGACY_DEVICES = 1 << 0;
        const I8042 = 1 << 1;
        const NO_VGA = 1 << 2;
        const NO_ASPM = 1 << 4;
    }

    /// Fixed feature flags (table 5.10).
    #[derive(Clone, Copy)]
    pub(super) struct FadtFlags: u32 {
        const WBINVD = 1 << 0;
        const C1_ON_ALL = 1 << 2;
        const NO_SLEEP_BUTTON = 1 << 5;
        const NO_FIXED_RTC = 1 << 6;
        const TIMER_32_BITS = 1 << 8;
        const RESET_REGISTER = 1 << 10;
    }
}

/// Fixed ACPI description table after its header (table 5.9).
#[derive(Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Fadt {
    pub facs: U32,
    pub dsdt: U32,
    pub reserved_44: u8,
    pub profile: u8,
    pub sci: U16,
    pub smi_command: U32,
    pub acpi_enable: u8,
    pub acpi_disable: u8,
    pub s4bios: u8,
    pub pstate_control: u8,
    pub pm1a_event: U32,
    pub pm1b_event: U32,
    pub pm1a_control: U32,
    pub pm1b_control: U32,
    pub pm2_control: U32,
    pub pm_timer: U32,
    pub gpe0: U32,
    pub gpe1: U32,
    pub pm1_event_len: u8,
    pub pm1_control_len: u8,
    pub pm2_control_len: u8,
    pub pm_timer_len: u8,
    pub gpe0_len: u8,
    pub gpe1_len: u8,
    pub gpe1_base: u8,
    pub cst_control: u8,
    pub c2_latency: U16,
    pub c3_latency: U16,
    pub flush_size: U16,
    pub flush_stride: U16,
    pub duty_offset: u8,
    pub duty_width: u8,
    pub day_alarm: u8,
    pub month_alarm: u8,
    pub century: u8,
    pub boot_flags: U16,
    pub reserved_111: u8,
    pub flags: U32,
    pub reset_register: GenericAddress,
    pub reset_value: u8,
    pub arm_flags: U16,
    pub minor_version: u8,
    pub x_facs: U64,
    pub x_dsdt: U64,
    pub x_pm1a_event: GenericAddress,
    pub x_pm1b_event: GenericAddress,
    pub x_pm1a_control: GenericAddress,
    pub x_pm1b_control: GenericAddress,
    pub x_pm2_control: GenericAddress,
    pub x_pm_timer: GenericAddress,
    pub x_gpe0: GenericAddress,
    pub x_gpe1: GenericAddress,
    pub sleep_control: GenericAddress,
    pub sleep_status: GenericAddress,
    pub hypervisor: [u8; 8],
}
const _: () = assert!(size_of::<Header>() + size_of::<Fadt>() == 276);
const _: () = assert!(36 + core::mem::offset_of!(Fadt, pm_timer) == 76);
const _: () = assert!(36 + core::mem::offset_of!(Fadt, century) == 108);
const _: () = assert!(36 + core::mem::offset_of!(Fadt, reset_register) == 116);
const _: () = assert!(36 + core::mem::offset_of!(Fadt, x_dsdt) == 140);

/// Firmware ACPI control structure (section 5.2.10).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Facs {
    signature: [u8; 4],
    length: U32,
    hardware_signature: U32,
    waking_vector: U32,
    global_lock: U32,
    flags: U32,
    x_waking_vector: U64,
    version: u8,
    reserved_33: [u8; 3],
    ospm_flags: U32,
    reserved_40: [u8; 24],
}
const _: () = assert!(size_of::<Facs>() == 64);

impl Facs {
    pub(super) fn new() -> Self {
        Facs {
            signature: *b"FACS",
            length: U32::new(64),
            hardware_signature: U32::ZERO,
            waking_vector: U32::ZERO,
            global_lock: U32::ZERO,
            flags: U32::ZERO,
            x_waking_vector: U64::ZERO,
            version: 2,
            reserved_33: [0; 3],
            ospm_flags: U32::ZERO,
            reserved_40: [0; 24],
        }
    }
}

/// MADT fields after its header (section 5.2.12).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct MadtFixed {
    pub local_apic: U32,
    pub flags: U32,
}

const ENABLED: U32 = U32::from_bytes([1, 0, 0, 0]);
/// LINT input that carries NMI.
const LINT1: u8 = 1;

/// Processor local APIC (section 5.2.12.2).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LocalApicEntry {
    kind: u8,
    length: u8,
    uid: u8,
    id: u8,
    flags: U32,
}
const _: () = assert!(size_of::<LocalApicEntry>() == 8);

impl LocalApicEntry {
    pub(super) fn new(uid: u8, id: u8) -> Self {
        LocalApicEntry {
            kind: 0,
            length: 8,
            uid,
            id,
            flags: ENABLED,
        }
    }
}

/// Processor local x2APIC (section 5.2.12.12).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LocalX2ApicEntry {
    kind: u8,
    length: u8,
    reserved: U16,
    id: U32,
    flags: U32,
    uid: U32,
}
const _: () = assert!(size_of::<LocalX2ApicEntry>() == 16);

impl LocalX2ApicEntry {
    pub(super) fn new(uid: u32, id: u32) -> Self {
        LocalX2ApicEntry {
            kind: 9,
            length: 16,
            reserved: U16::ZERO,
            id: U32::new(id),
            flags: ENABLED,
            uid: U32::new(uid),
        }
    }
}

/// IOAPIC (section 5.2.12.3).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct IoApicEntry {
    kind: u8,
    length: u8,
    id: u8,
    reserved: u8,
    address: U32,
    gsi_base: U32,
}
const _: () = assert!(size_of::<IoApicEntry>() == 12);

impl IoApicEntry {
    pub(super) fn new(id: u8, address: u32, gsi_base: u32) -> Self {
        IoApicEntry {
            kind: 1,
            length: 12,
            id,
            reserved: 0,
            address: U32::new(address),
            gsi_base: U32::new(gsi_base),
        }
    }
}

/// Interrupt source override (section 5.2.12.5).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Override {
    kind: u8,
    length: u8,
    bus: u8,
    irq: u8,
    gsi: U32,
    flags: U16,
}
const _: () = assert!(size_of::<Override>() == 10);

impl Override {
    /// Flags: polarity and trigger mode of the ISA bus.
    pub(super) const AS_BUS: u16 = 0;
    /// Flags: level-triggered, active high.
    pub(super) const LEVEL_ACTIVE_HIGH: u16 = 0b1101;

    pub(super) fn new(irq: u8, gsi: u32, flags: u16) -> Self {
        Override {
            kind: 2,
            length: 10,
            bus: 0,
            irq,
            gsi: U32::new(gsi),
            flags: U16::new(flags),
        }
    }
}

/// Local APIC NMI (section 5.2.12.7).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LocalApicNmi {
    kind: u8,
    length: u8,
    uid: u8,
    flags: U16,
    lint: u8,
}
const _: () = assert!(size_of::<LocalApicNmi>() == 6);

impl LocalApicNmi {
    pub(super) fn all_on_lint1() -> Self {
        LocalApicNmi {
            kind: 4,
            length: 6,
            uid: 0xff,
            flags: U16::ZERO,
            lint: LINT1,
        }
    }
}

/// Local x2APIC NMI (section 5.2.12.13).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LocalX2ApicNmi {
    kind: u8,
    length: u8,
    flags: U16,
    uid: U32,
    lint: u8,
    reserved: [u8; 3],
}
const _: () = assert!(size_of::<LocalX2ApicNmi>() == 12);

impl LocalX2ApicNmi {
    pub(super) fn all_on_lint1() -> Self {
        LocalX2ApicNmi {
            kind: 10,
            length: 12,
            flags: U16::ZERO,
            uid: U32::new(u32::MAX),
            lint: LINT1,
            reserved: [0; 3],
        }
    }
}

/// MCFG allocation (PCI Firmware Specification 3.3, table 4-3).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct McfgEntry {
    pub base: U64,
    pub segment: U16,
    pub start_bus: u8,
    pub end_bus: u8,
    pub reserved: U32,
}
const _: () = assert!(size_of::<McfgEntry>() == 16);

/// Body of the HPET description table (IA-PC HPET specification 1.0a, section 3.2.4).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct HpetFixed {
    /// Low half of the capability register.
    pub id: U32,
    pub address: GenericAddress,
    pub number: u8,
    /// Smallest count of a periodic comparator at which no interrupt is lost.
    pub min_tick: U16,
    pub protection: u8,
}
const _: () = assert!(size_of::<HpetFixed>() == 20);
