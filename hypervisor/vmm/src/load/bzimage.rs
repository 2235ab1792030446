//! Linux' bzImage by the 64-bit boot protocol, or by the 32-bit one.
//!
//! Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst. The protected-mode part goes to
//! the address that the kernel prefers, or, if it is relocatable, to the lowest that suits;
//! the initrd as high as the kernel allows. A kernel with a 64-bit entry is entered in 64-bit mode with the first
//! 4 GiB mapped one to one; a 32-bit one, or one older than that entry, in flat 32-bit mode without paging.
//! In both, RSI points to the zero page.

use core::mem::offset_of;

use mem::{Gpa, PAGE_SIZE, PAGE_SIZE_2M};
use virt::{CpuState, Gpr};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BELOW_4G, CR0_PE, Entry, Job, LoadError, Mode, Protocol, set};

/// The setup header, from 0x1f1 in the file and in the zero page.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
pub(super) struct SetupHeader {
    setup_sects: u8,
    root_flags: U16,
    syssize: U32,
    ram_size: U16,
    vid_mode: U16,
    root_dev: U16,
    boot_flag: U16,
    jump: [u8; 2],
    header: [u8; 4],
    version: U16,
    realmode_swtch: U32,
    start_sys_seg: U16,
    kernel_version: U16,
    type_of_loader: u8,
    loadflags: u8,
    setup_move_size: U16,
    code32_start: U32,
    ramdisk_image: U32,
    ramdisk_size: U32,
    bootsect_kludge: U32,
    heap_end_ptr: U16,
    ext_loader_ver: u8,
    ext_loader_type: u8,
    cmd_line_ptr: U32,
    initrd_addr_max: U32,
    kernel_alignment: U32,
    relocatable_kernel: u8,
    min_alignment: u8,
    xloadflags: U16,
    cmdline_size: U32,
    hardware_subarch: U32,
    hardware_subarch_data: U64,
    payload_offset: U32,
    payload_length: U32,
    setup_data: U64,
    pref_address: U64,
    init_size: U32,
    handover_offset: U32,
    kernel_info_offset: U32,
}

impl SetupHeader {
    /// `xloadflags`, where there is such a field.
    fn flags(&self) -> u16 {
        if self.version.get() < WITH_XLOADFLAGS {
            return 0;
        }
        self.xloadflags.get()
    }

    /// How the kernel is entered: in 64-bit mode where it can be.
    fn protocol(&self) -> Protocol {
        match self.flags() & XLF_KERNEL_64 {
            0 => Protocol::Linux32,
            _ => Protocol::Linux64,
        }
    }

    /// Where the entry lies in the protected-mode part.
    fn entry_offset(&self) -> u64 {
        match self.protocol() {
            Protocol::Linux64 => ENTRY_64,
            _ => 0,
        }
    }
}

/// Where the setup header starts.
const HEADER: usize = 0x1f1;
/// Where the jump's target is counted from: the header ends there plus the byte at 0x201.
const JUMP_BASE: usize = 0x202;

const _: () = assert!(HEADER + offset_of!(SetupHeader, boot_flag) == 0x1fe);
const _: () = assert!(HEADER + offset_of!(SetupHeader, header) == JUMP_BASE);
const _: () = assert!(HEADER + offset_of!(SetupHeader, cmd_line_ptr) == 0x228);
const _: () = assert!(HEADER + offset_of!(SetupHeader, xloadflags) == 0x236);
const _: () = assert!(HEADER + offset_of!(SetupHeader, pref_address) == 0x258);
const _: () = assert!(HEADER + size_of::<SetupHeader>() == 0x26c);

/// A line of the memory map.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct E820Entry {
    start: U64,
    bytes: U64,
    kind: U32,
}

/// Lines that the zero page has room for.
const E820_MAX: usize = 128;

/// The screen as the firmware left it, `struct screen_info`. What has no name here stays zero.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ScreenInfo {
    cursor: [u8; 2],
    before_mode: [u8; 4],
    mode: u8,
    columns: u8,
    before_rows: [u8; 6],
    rows: u8,
    is_vga: u8,
    points: U16,
    rest: [u8; 0x2e],
}

const _: () = assert!(offset_of!(ScreenInfo, rows) == 0x0e);
const _: () = assert!(size_of::<ScreenInfo>() == 0x40);

impl ScreenInfo {
    /// 80 columns and 25 rows of text on a VGA adapter.
    fn text() -> Self {
        let mut info = Self::new_zeroed();
        (info.mode, info.is_vga) = (3, 1);
        (info.columns, info.rows) = (80, 25);
        info.points = 16.into();
        info
    }
}

/// The zero page, `struct boot_params`. What has no name here stays zero.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BootParams {
    screen_info: ScreenInfo,
    before_rsdp: [u8; 0x30],
    acpi_rsdp_addr: U64,
    before_ramdisk: [u8; 0x48],
    ext_ramdisk_image: U32,
    ext_ramdisk_size: U32,
    ext_cmd_line_ptr: U32,
    before_e820: [u8; 0x11c],
    e820_entries: u8,
    before_header: [u8; 8],
    header: SetupHeader,
    before_table: [u8; 0x64],
    e820_table: [E820Entry; E820_MAX],
    rest: [u8; 0x330],
}

const _: () = assert!(offset_of!(BootParams, acpi_rsdp_addr) == 0x70);
const _: () = assert!(offset_of!(BootParams, ext_ramdisk_image) == 0xc0);
const _: () = assert!(offset_of!(BootParams, e820_entries) == 0x1e8);
const _: () = assert!(offset_of!(BootParams, header) == HEADER);
const _: () = assert!(offset_of!(BootParams, e820_table) == 0x2d0);
const _: () = assert!(size_of::<BootParams>() == 4096);

/// First protocol version with `pref_address` and `init_size`: 2.10.
const OLDEST: u16 = 0x020a;
/// First protocol version with `xloadflags`: 2.12. In older ones that field means nothing.
const WITH_XLOADFLAGS: u16 = 0x020c;
/// `loadflags`: the protected-mode part goes above 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: initrd, zero page and command line may be above 4 GiB.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// `type_of_loader`: none with a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
/// `vid_mode`: the mode that is on.
const NORMAL_VGA: u16 = 0xffff;
/// Where the 64-bit entry lies in the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Lowest address for the protected-mode part.
const HIGH_MEMORY: u64 = 1 << 20;
/// Bytes in a sector of the real-mode part.
const SECTOR: usize = 512;
/// Bytes in a paragraph, the unit of `syssize`.
const PARAGRAPH: u64 = 16;

/// Whether the file has Linux' setup header.
pub fn is_bzimage(image: &[u8]) -> bool {
    image.get(0x1fe..0x200) == Some(&[0x55, 0xaa])
        && image.get(JUMP_BASE..JUMP_BASE + 4) == Some(b"HdrS")
}

/// Reads the setup header, as much of it as the kernel has; the rest is zero.
fn read_header(image: &[u8]) -> Result<SetupHeader, LoadError> {
    let cut_short = |needs: usize| LoadError::CutShort {
        needs: needs as u64,
        has: image.len() as u64,
    };
    let jump = *image.get(0x201).ok_or(cut_short(JUMP_BASE))?;
    let end = (JUMP_BASE + usize::from(jump)).min(HEADER + size_of::<SetupHeader>());
    let bytes = image.get(HEADER..end).ok_or(cut_short(end))?;
    let mut header = SetupHeader::new_zeroed();
    header.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
    Ok(header)
}

/// Checks the header and finds the protected-mode part.
fn check<'a>(header: &SetupHeader, image: &'a [u8]) -> Result<&'a [u8], LoadError> {
    let bad = |name, value: u64| Err(LoadError::BadField { name, value });
    if header.version.get() < OLDEST {
        return Err(LoadError::OldProtocol {
            version: header.version.get(),
        });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return bad("loadflags", header.loadflags.into());
    }
    if !header.kernel_alignment.get().is_power_of_two() {
        return bad("kernel_alignment", header.kernel_alignment.get().into());
    }
    // Zero stands for four, since the oldest kernels had no such field.
    let sectors = match header.setup_sects {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * SECTOR;
    let size = u64::from(header.syssize.get()) * PARAGRAPH;
    let part = image.get(start..).unwrap_or_default();
    // The last paragraph need not be full.
    if (part.len() as u64).next_multiple_of(PARAGRAPH) < size || part.is_empty() {
        return Err(LoadError::CutShort {
            needs: start as u64 + size,
            has: image.len() as u64,
        });
    }
    if size <= header.entry_offset() {
        return bad("syssize", header.syssize.get().into());
    }
    if u64::from(header.init_size.get()) < size {
        return bad("init_size", header.init_size.get().into());
    }
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    Ok(&part[..part.len().min(size)])
}

pub(super) fn load(mut job: Job<'_>) -> Result<Entry, LoadError> {
    let mut header = read_header(job.image)?;
    let kernel = check(&header, job.image)?;

    let bytes = u64::from(header.init_size.get());
    let preferred = header.pref_address.get();
    let start = if preferred >= HIGH_MEMORY
        && preferred.saturating_add(bytes) <= BELOW_4G
        && job.space.take_at(preferred, bytes)
    {
        Gpa(preferred)
    } else if header.relocatable_kernel != 0 {
        let align = u64::from(header.kernel_alignment.get()).max(PAGE_SIZE);
        job.space
            .take_first(bytes, align, HIGH_MEMORY, BELOW_4G)
            .ok_or(LoadError::NoRoom {
                what: "the kernel",
                bytes,
            })?
    } else {
        return Err(LoadError::PlaceTaken {
            start: Gpa(preferred),
            bytes,
        });
    };
    job.memory.write(start, kernel)?;

    let mut params = BootParams::new_zeroed();
    header.type_of_loader = UNKNOWN_LOADER;
    header.vid_mode = NORMAL_VGA.into();
    // Checked to be below 4 GiB.
    header.code32_start = (start.0 as u32).into();

    let cmdline = job.place_cmdline(job.files.command_line, header.cmdline_size.get() as usize)?;
    header.cmd_line_ptr = (cmdline.0 as u32).into();

    let count = job.files.modules.len();
    if count > 1 {
        return Err(LoadError::ManyModules { count });
    }
    let initrd = job.files.modules.first().map(|initrd| initrd.data);
    if let Some(initrd) = initrd.filter(|data| !data.is_empty()) {
        let bytes = initrd.len() as u64;
        let highest = if header.flags() & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
            u64::MAX
        } else {
            u64::from(header.initrd_addr_max.get()) + 1
        };
        let at = job
            .space
            .take_last(bytes, PAGE_SIZE, highest)
            .ok_or(LoadError::NoRoom {
                what: "the initrd",
                bytes,
            })?;
        job.memory.write(at, initrd)?;
        let halves = |value: u64| (U32::new(value as u32), U32::new((value >> 32) as u32));
        (header.ramdisk_image, params.ext_ramdisk_image) = halves(at.0);
        (header.ramdisk_size, params.ext_ramdisk_size) = halves(bytes);
    }

    let map = job.layout.map(job.memory);
    if map.len() > E820_MAX {
        return Err(LoadError::NoRoom {
            what: "the memory map",
            bytes: (map.len() * size_of::<E820Entry>()) as u64,
        });
    }
    params.e820_entries = map.len() as u8;
    for (line, entry) in params.e820_table.iter_mut().zip(&map) {
        *line = E820Entry {
            start: entry.range.start.0.into(),
            bytes: entry.range.bytes.into(),
            kind: (entry.kind as u32).into(),
        };
    }
    if job.layout.text_screen {
        params.screen_info = ScreenInfo::text();
    }
    if let Some(rsdp) = job.layout.rsdp {
        params.acpi_rsdp_addr = rsdp.0.into();
    }
    let (protocol, entry_offset) = (header.protocol(), header.entry_offset());
    params.header = header;
    let zero_page = job.place("the zero page", params.as_bytes(), PAGE_SIZE)?;

    let mut state = if protocol == Protocol::Linux64 {
        long_mode_state(&mut job)?
    } else {
        job.flat_state(Mode::Linux32)?
    };
    state.rip = start.0 + entry_offset;
    set(&mut state, Gpr::Rsi, zero_page.0);
    Ok(Entry { protocol, state })
}

/// The state of the 64-bit entry but for RIP and RSI.
fn long_mode_state(job: &mut Job<'_>) -> Result<CpuState, LoadError> {
    let mut state = job.flat_state(Mode::Long64)?;
    state.cr3 = identity_map(job)?.0;
    state.cr4 = CR4_PAE;
    state.efer = EFER_LME | EFER_LMA;
    state.cr0 |= CR0_PE | CR0_PG;
    Ok(state)
}

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present, writable.
const TABLE: u64 = 0b11;
/// Present, writable, a 2 MiB page (SDM vol. 3A, table 4-18).
const PAGE_2M: u64 = 1 << 7 | 0b11;
/// Entries in a page table.
const ENTRIES: usize = 512;
/// GiB that are mapped: all that code32_start and the placed tables can name.
const MAPPED_GIB: usize = 4;

/// Page tables that map the first 4 GiB one to one; the root's address.
fn identity_map(job: &mut Job<'_>) -> Result<Gpa, LoadError> {
    let mut place =
        |table: &[u64; ENTRIES]| job.place("the page tables", table.as_bytes(), PAGE_SIZE);
    let mut pointers = [0; ENTRIES];
    let mut page = 0;
    for pointer in pointers.iter_mut().take(MAPPED_GIB) {
        let mut directory = [0; ENTRIES];
        for entry in &mut directory {
            *entry = page | PAGE_2M;
            page += PAGE_SIZE_2M;
        }
        *pointer = place(&directory)?.0 | TABLE;
    }
    let mut root = [0; ENTRIES];
    root[0] = place(&pointers)?.0 | TABLE;
    place(&root)
}
