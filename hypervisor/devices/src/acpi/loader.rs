//! The ACPI tables for firmware, which places them by itself: files of `fw_cfg`, and a script.
//!
//! Firmware knows best where there is room. So it gets the tables in one file and the RSDP in
//! another, with every pointer an offset into the tables' file, and a script (QEMU's table loader
//! format) that says: allocate both, add the tables' address to the pointers, sum up.

use alloc::vec::Vec;

use mem::Gpa;
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::layout::Header;
use super::{AcpiConfig, BadBase, build};

/// Name of the RSDP's file.
const RSDP_FILE: &str = "etc/acpi/rsdp";
/// Name of the file with all other tables.
const TABLES_FILE: &str = "etc/acpi/tables";
/// Name of the script.
const SCRIPT_FILE: &str = "etc/table-loader";
/// Alignment of the tables in their file; the FACS needs it.
const ALIGNMENT: u32 = 64;
/// Where the first table comes to lie when they are built: behind the RSDP.
const TABLES_START: u64 = 64;

/// What goes into `fw_cfg`: names and contents.
pub type LoaderFiles = [(&'static str, Vec<u8>); 3];

/// What a step of the script does.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Command {
    Allocate = 1,
    AddPointer = 2,
    AddChecksum = 3,
}

/// Where a file is to be allocated.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Zone {
    /// Anywhere below 4 GiB.
    High = 1,
    /// Where an operating system looks for the RSDP.
    Firmware = 2,
}

const NAME_BYTES: usize = 56;
/// Bytes of a step.
const STEP_BYTES: usize = 128;

/// A file's name, padded with zeroes.
fn name(name: &str) -> [u8; NAME_BYTES] {
    let mut padded = [0; NAME_BYTES];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    padded
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Allocate {
    command: U32,
    file: [u8; NAME_BYTES],
    alignment: U32,
    zone: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct AddPointer {
    command: U32,
    pointer_file: [u8; NAME_BYTES],
    pointee_file: [u8; NAME_BYTES],
    offset: U32,
    size: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct AddChecksum {
    command: U32,
    file: [u8; NAME_BYTES],
    result: U32,
    start: U32,
    length: U32,
}
const _: () = assert!(size_of::<AddPointer>() <= STEP_BYTES);

/// The script as it grows.
#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn step(&mut self, step: &[u8]) {
        let end = self.0.len() + STEP_BYTES;
        self.0.extend_from_slice(step);
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: Zone) {
        let step = Allocate {
            command: U32::new(Command::Allocate as u32),
            file: name(file),
            alignment: U32::new(alignment),
            zone: zone as u8,
        };
        self.step(step.as_bytes());
    }

    /// Makes the number at `pointer` an offset into the tables' file, and has their address added.
    fn relocate(&mut self, file: &str, bytes: &mut [u8], pointer: Pointer) {
        let field = &mut bytes[pointer.at..pointer.at + pointer.size];
        let mut value = [0; 8];
        value[..pointer.size].copy_from_slice(field);
        let offset = u64::from_le_bytes(value) - TABLES_START;
        field.copy_from_slice(&offset.to_le_bytes()[..pointer.size]);
        let step = AddPointer {
            command: U32::new(Command::AddPointer as u32),
            pointer_file: name(file),
            pointee_file: name(TABLES_FILE),
            offset: U32::new(pointer.at as u32),
            size: pointer.size as u8,
        };
        self.step(step.as_bytes());
    }

    /// Has the byte at `result` made such that the range sums up to zero.
    fn sum(&mut self, file: &str, bytes: &mut [u8], result: usize, range: core::ops::Range<usize>) {
        bytes[result] = 0;
        let step = AddChecksum {
            command: U32::new(Command::AddChecksum as u32),
            file: name(file),
            result: U32::new(result as u32),
            start: U32::new(range.start as u32),
            length: U32::new(range.len() as u32),
        };
        self.step(step.as_bytes());
    }
}

/// A pointer in a table: offset and size in bytes.
#[derive(Clone, Copy)]
struct Pointer {
    at: usize,
    size: usize,
}

/// The pointers to other tables in a table.
fn pointers(table: &[u8]) -> Vec<Pointer> {
    let all = |start: usize, size: usize| {
        (start..table.len())
            .step_by(size)
            .map(move |at| Pointer { at, size })
            .collect()
    };
    let header = size_of::<Header>();
    match table.get(..4) {
        Some(b"RSDT") => all(header, 4),
        Some(b"XSDT") => all(header, 8),
        // FACS, DSDT, and both again in 64 bits (ACPI 6.5, table 5.9).
        Some(b"FACP") => [(36, 4), (40, 4), (132, 8), (140, 8)]
            .map(|(at, size)| Pointer { at, size })
            .to_vec(),
        _ => Vec::new(),
    }
}

/// The tables as firmware takes them.
///
/// # Errors
/// They are larger than 4 GiB.
pub fn loader_files(config: &AcpiConfig<'_>) -> Result<LoaderFiles, BadBase> {
    // At zero, so that each pointer is an offset.
    let built = build(config, Gpa(0))?.tables;
    let mut script = Script::default();
    script.allocate(RSDP_FILE, 16, Zone::Firmware);
    script.allocate(TABLES_FILE, ALIGNMENT, Zone::High);
    let mut rsdp = Vec::new();
    let mut tables = Vec::new();
    let mut ranges = Vec::new();
    for (at, table) in built {
        if at == Gpa(0) {
            rsdp = table;
        } else {
            let start = (at.0 - TABLES_START) as usize;
            tables.resize(start, 0);
            tables.extend_from_slice(&table);
            ranges.push(start..tables.len());
        }
    }
    for range in &ranges {
        for Pointer { at, size } in pointers(&tables[range.clone()]) {
            let at = range.start + at;
            script.relocate(TABLES_FILE, &mut tables, Pointer { at, size });
        }
    }
    for range in ranges {
        if !tables[range.clone()].starts_with(b"FACS") {
            let result = range.start + Header::CHECKSUM;
            script.sum(TABLES_FILE, &mut tables, result, range);
        }
    }
    // RSDT and XSDT, then the checksums of ACPI 1.0 and of all (ACPI 6.5, section 5.2.5.3).
    for (at, size) in [(16, 4), (24, 8)] {
        script.relocate(RSDP_FILE, &mut rsdp, Pointer { at, size });
    }
    rsdp[32] = 0;
    script.sum(RSDP_FILE, &mut rsdp, 8, 0..20);
    script.sum(RSDP_FILE, &mut rsdp, 32, 0..36);
    Ok([
        (RSDP_FILE, rsdp),
        (TABLES_FILE, tables),
        (SCRIPT_FILE, script.0),
    ])
}
