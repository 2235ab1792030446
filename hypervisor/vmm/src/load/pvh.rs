//! PVH kernels: ELF files with Xen's 32-bit physical entry point in a note.
//!
//! Source: Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h. The kernel is entered
//! in 32-bit protected mode without paging, flat segments, EBX pointing to the start information
//! (version 1, with a memory map).

use alloc::vec::Vec;

use virt::{Gpr, SegmentName};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::elf::Elf;
use super::{Entry, Job, LoadError, Mode, Protocol, set};
use mem::PAGE_SIZE;

/// `struct hvm_start_info`.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    nr_modules: U32,
    modlist_paddr: U64,
    cmdline_paddr: U64,
    rsdp_paddr: U64,
    memmap_paddr: U64,
    memmap_entries: U32,
    reserved: U32,
}

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Module {
    paddr: U64,
    size: U64,
    cmdline_paddr: U64,
    reserved: U64,
}

/// `struct hvm_memmap_table_entry`.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct MapLine {
    addr: U64,
    size: U64,
    kind: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);
const _: () = assert!(core::mem::offset_of!(StartInfo, memmap_paddr) == 40);
const _: () = assert!(size_of::<Module>() == 32);
const _: () = assert!(size_of::<MapLine>() == 24);

/// "xEn3" with bit 7 of the E set.
const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;
/// Note type XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u64 = 18;
/// Longest command line passed on; the interface sets no limit.
const CMDLINE_MAX: usize = 4095;
/// Limit of the smallest 32-bit TSS.
const TSS_LIMIT: u32 = 0x67;

/// The PVH entry point of an ELF file, if it has one.
///
/// # Errors
/// The file is no usable ELF file.
pub fn find_entry(image: &[u8]) -> Result<Option<u64>, LoadError> {
    let note = Elf::parse(image)?.note(b"Xen\0", PHYS32_ENTRY);
    // 4 bytes by the specification, 8 in 64-bit Linux.
    Ok(match note {
        Some(&[a, b, c, d]) => Some(u32::from_le_bytes([a, b, c, d]).into()),
        Some(&[a, b, c, d, e, f, g, h]) => Some(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => None,
    })
}

pub(super) fn load(mut job: Job<'_>, entry: u64) -> Result<Entry, LoadError> {
    let kernel = Elf::parse(job.image)?.place(&mut job)?;
    kernel.check_entry("the PVH entry address", entry)?;

    let placed = job.place_modules(kernel.end().next_multiple_of(PAGE_SIZE))?;
    let cmdline = job.place_cmdline(job.files.command_line, CMDLINE_MAX)?;
    let mut list = Vec::new();
    for (range, module) in placed.iter().zip(job.files.filled_modules()) {
        list.push(Module {
            paddr: range.start.0.into(),
            size: range.bytes.into(),
            cmdline_paddr: job.place_text("a module's name", module.text)?.0.into(),
            reserved: 0.into(),
        });
    }
    let modules = if list.is_empty() {
        None
    } else {
        Some(job.place_table("the module list", &list[..])?)
    };
    let lines: Vec<MapLine> = job
        .layout
        .map(job.memory)
        .iter()
        .map(|entry| MapLine {
            addr: entry.range.start.0.into(),
            size: entry.range.bytes.into(),
            kind: (entry.kind as u32).into(),
            reserved: 0.into(),
        })
        .collect();
    let map = job.place_table("the memory map", &lines[..])?;
    let info = StartInfo {
        magic: MAGIC.into(),
        version: VERSION.into(),
        flags: 0.into(),
        nr_modules: (list.len() as u32).into(),
        modlist_paddr: modules.map_or(0, |list| list.0).into(),
        cmdline_paddr: cmdline.0.into(),
        rsdp_paddr: job.layout.rsdp.map_or(0, |rsdp| rsdp.0).into(),
        memmap_paddr: map.0.into(),
        memmap_entries: (lines.len() as u32).into(),
        reserved: 0.into(),
    };
    let info = job.place_table("the start information", &info)?;

    let mut state = job.flat_state(Mode::Protected32)?;
    state.segments[SegmentName::Tr as usize].limit = TSS_LIMIT;
    state.rip = entry;
    set(&mut state, Gpr::Rbx, info.0);
    Ok(Entry {
        protocol: Protocol::Pvh,
        state,
    })
}
