//! Multiboot 1 kernels: ELF files, or flat ones with the addresses in the header.
//!
//! Source: The Multiboot Specification, version 0.6.96. The kernel is entered in 32-bit protected
//! mode without paging, flat segments, EAX with the magic, EBX pointing to the information structure.
//! Where the specification leaves something open, it is as QEMU has it: the command line begins with the
//! kernel's name, and a module's string is what the configuration says of it; the module list and all texts
//! are on the first page behind the kernel, the modules on the next ones; the memory map is at 0x9000 and the
//! information at 0x9500.

use alloc::format;
use alloc::vec::Vec;

use mem::PAGE_SIZE;
use virt::Gpr;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::elf::{Elf, Placed, is_elf, place_at};
use super::{BELOW_4G, Entry, Job, LoadError, MapKind, Mode, Protocol, TABLES_BELOW, set};

/// The header in the file (section 3.1.1).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Debug)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    flags: U32,
    checksum: U32,
}

/// The addresses that follow the header when `FLAG_ADDRESSES` is set (section 3.1.3).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Debug)]
#[repr(C)]
struct Addresses {
    header_addr: U32,
    load_addr: U32,
    load_end_addr: U32,
    bss_end_addr: U32,
    entry_addr: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 12);
const _: () = assert!(size_of::<Addresses>() == 20);

/// The information structure (section 3.3), up to the boot loader's name.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default)]
#[repr(C)]
struct Information {
    flags: U32,
    mem_lower: U32,
    mem_upper: U32,
    boot_device: U32,
    cmdline: U32,
    mods_count: U32,
    mods_addr: U32,
    syms: [U32; 4],
    mmap_length: U32,
    mmap_addr: U32,
    drives_length: U32,
    drives_addr: U32,
    config_table: U32,
    boot_loader_name: U32,
    apm_table: U32,
}

const _: () = assert!(core::mem::offset_of!(Information, mmap_length) == 44);
const _: () = assert!(core::mem::offset_of!(Information, boot_loader_name) == 64);

/// A module.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Module {
    start: U32,
    end: U32,
    string: U32,
    reserved: U32,
}

/// A line of the memory map. `size` counts what follows it.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct MapLine {
    size: U32,
    start: U64,
    bytes: U64,
    kind: U32,
}

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry.
const BOOT_MAGIC: u64 = 0x2bad_b002;
/// The header lies within this many bytes of the file.
const SEARCHED: usize = 8192;

/// Header flag: modules page-aligned. They always are.
const FLAG_PAGE_ALIGN: u32 = 1 << 0;
/// Header flag: memory information wanted. It always is there.
const FLAG_MEMORY: u32 = 1 << 1;
/// Header flag: a video mode wanted. None is set, as in QEMU; the information says so.
const FLAG_VIDEO: u32 = 1 << 2;
/// Header flag: addresses in the header count, not the ELF headers.
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Header flags that a loader must know, or refuse the kernel.
const FLAGS_DEMANDED: u32 = 0xffff;

/// Information flags (section 3.3): which fields hold.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// `mem_lower` is at most this, in KiB.
const LOWER_MAX: u64 = 640;
/// What the boot loader calls itself.
const LOADER_NAME: &str = "Plinth";
/// The information is from here on, behind a memory map of up to 53 lines.
const INFORMATION_FROM: u64 = 0x9500;
/// Longest command line passed on; the specification sets no limit.
const CMDLINE_MAX: usize = 4095;

/// A multiboot header found in a file.
#[derive(Clone, Debug)]
pub struct Header {
    flags: u32,
    /// Where in the file.
    offset: usize,
    addresses: Option<Addresses>,
}

impl Header {
    /// Whether it says where the file's parts go, so that ELF headers don't count.
    pub fn has_addresses(&self) -> bool {
        self.addresses.is_some()
    }
}

/// Looks for a multiboot header: at a multiple of 4 in the first 8192 bytes, its three words summing to 0.
pub fn find_header(image: &[u8]) -> Option<Header> {
    let searched = &image[..image.len().min(SEARCHED)];
    (0..searched.len()).step_by(4).find_map(|offset| {
        let (header, _) = RawHeader::ref_from_prefix(&searched[offset..]).ok()?;
        let (magic, flags) = (header.magic.get(), header.flags.get());
        let sum = magic
            .wrapping_add(flags)
            .wrapping_add(header.checksum.get());
        if magic != HEADER_MAGIC || sum != 0 {
            return None;
        }
        let after = &image[offset + size_of::<RawHeader>()..];
        let addresses = (flags & FLAG_ADDRESSES != 0)
            .then(|| Addresses::read_from_prefix(after).ok())
            .flatten()
            .map(|(addresses, _)| addresses);
        Some(Header {
            flags,
            offset,
            addresses,
        })
    })
}

/// Places a kernel by the addresses in its header.
fn place_flat(
    job: &mut Job<'_>,
    header: &Header,
    addresses: &Addresses,
) -> Result<Placed, LoadError> {
    let at = |field: U32| u64::from(field.get());
    let bad = |name, value: U32| LoadError::BadField {
        name,
        value: value.get().into(),
    };
    let start = at(addresses.load_addr);
    // The header is at header_addr in memory, so the load address is that far before it in the file.
    let lead = at(addresses.header_addr)
        .checked_sub(start)
        .ok_or(bad("header_addr", addresses.header_addr))?;
    let offset = (header.offset as u64)
        .checked_sub(lead)
        .ok_or(bad("load_addr", addresses.load_addr))? as usize;
    let rest = job.image.get(offset..).unwrap_or_default();
    let data = match at(addresses.load_end_addr) {
        0 => rest,
        end => {
            let bytes =
                end.checked_sub(start)
                    .ok_or(bad("load_end_addr", addresses.load_end_addr))? as usize;
            rest.get(..bytes).ok_or(LoadError::CutShort {
                needs: (offset + bytes) as u64,
                has: job.image.len() as u64,
            })?
        }
    };
    let loaded_end = start + data.len() as u64;
    let end = match at(addresses.bss_end_addr) {
        0 => loaded_end,
        end if end < loaded_end => return Err(bad("bss_end_addr", addresses.bss_end_addr)),
        end => end,
    };
    place_at(job, start, data, end - start)?;
    Ok(Placed {
        entry: at(addresses.entry_addr),
        ranges: [(start, end)].into(),
    })
}

/// Everything placed is below 4 GiB.
fn address(at: u64) -> U32 {
    U32::new(at as u32)
}

/// Places, on the pages behind the kernel, the list of modules, all texts, and the modules themselves.
fn place_modules(
    job: &mut Job<'_>,
    kernel_end: u64,
    information: &mut Information,
) -> Result<(), LoadError> {
    let files = job.files;
    let modules: Vec<_> = files.filled_modules().collect();
    let command_line = format!("{} {}", files.kernel_name, files.command_line);
    let list_bytes = modules.len() * size_of::<Module>();
    let texts: Vec<&str> = modules
        .iter()
        .map(|module| module.text)
        .chain([&*command_line, LOADER_NAME])
        .collect();
    let text_bytes: usize = texts.iter().map(|text| text.len() + 1).sum();
    if command_line.len() > CMDLINE_MAX {
        return Err(LoadError::CmdlineTooLong {
            bytes: command_line.len(),
            max: CMDLINE_MAX,
        });
    }
    let what = "the module list";
    let bytes = (list_bytes + text_bytes) as u64;
    let start = job
        .space
        .take_first(bytes, PAGE_SIZE, kernel_end, BELOW_4G)
        .ok_or(LoadError::NoRoom { what, bytes })?;
    let placed = job.place_modules(start.0 + bytes)?;

    let mut block = Vec::with_capacity(list_bytes + text_bytes);
    let mut text_at = start.0 + list_bytes as u64;
    let mut next_text = |text: &str| {
        let at = text_at;
        text_at += text.len() as u64 + 1;
        address(at)
    };
    for (range, module) in placed.iter().zip(&modules) {
        let entry = Module {
            start: address(range.start.0),
            end: address(range.end().0),
            string: next_text(module.text),
            reserved: 0.into(),
        };
        block.extend_from_slice(entry.as_bytes());
    }
    information.cmdline = next_text(&command_line);
    information.boot_loader_name = next_text(LOADER_NAME);
    information.mods_addr = address(start.0);
    information.mods_count = (modules.len() as u32).into();
    for text in texts {
        block.extend_from_slice(text.as_bytes());
        block.push(0);
    }
    job.memory.write(start, &block)?;
    Ok(())
}

pub(super) fn load(mut job: Job<'_>, header: &Header) -> Result<Entry, LoadError> {
    let unknown = header.flags & FLAGS_DEMANDED & !(FLAG_PAGE_ALIGN | FLAG_MEMORY | FLAG_VIDEO);
    if unknown != 0 {
        return Err(LoadError::MultibootDemands { flags: unknown });
    }
    let kernel = match &header.addresses {
        Some(addresses) => place_flat(&mut job, header, addresses)?,
        None if is_elf(job.image) => Elf::parse(job.image)?.place(&mut job)?,
        None => return Err(LoadError::NotAKernel),
    };
    kernel.check_entry("the entry address", kernel.entry)?;

    let mut information = Information {
        flags: (INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MAP | INFO_LOADER_NAME).into(),
        ..Information::default()
    };
    place_modules(&mut job, kernel.end(), &mut information)?;

    let map = job.layout.map(job.memory);
    // KiB of RAM from an address on, without a hole.
    let ram_from = |start: u64| {
        let holds = |from: u64, to: u64| (from..to).contains(&start);
        map.iter()
            .filter(|e| e.kind == MapKind::Ram)
            .find(|e| holds(e.range.start.0, e.range.end().0))
            .map_or(0, |e| (e.range.end().0 - start) / 1024)
    };
    let clamped = |kib: u64| U32::new(u32::try_from(kib).unwrap_or(u32::MAX));
    information.mem_lower = clamped(ram_from(0).min(LOWER_MAX));
    information.mem_upper = clamped(ram_from(1 << 20));
    let lines: Vec<MapLine> = map
        .iter()
        .map(|entry| MapLine {
            size: (size_of::<MapLine>() as u32 - 4).into(),
            start: entry.range.start.0.into(),
            bytes: entry.range.bytes.into(),
            kind: (entry.kind as u32).into(),
        })
        .collect();
    information.mmap_addr = address(job.place_table("the memory map", &lines[..])?.0);
    information.mmap_length = (size_of_val(&lines[..]) as u32).into();
    let what = "the multiboot information";
    let bytes = size_of::<Information>() as u64;
    let at = job
        .space
        .take_first(bytes, 16, INFORMATION_FROM, TABLES_BELOW)
        .ok_or(LoadError::NoRoom { what, bytes })?;
    job.memory.write(at, information.as_bytes())?;

    let mut state = job.flat_state(Mode::Protected32)?;
    state.rip = kernel.entry;
    set(&mut state, Gpr::Rax, BOOT_MAGIC);
    set(&mut state, Gpr::Rbx, at.0);
    Ok(Entry {
        protocol: Protocol::Multiboot,
        state,
    })
}
