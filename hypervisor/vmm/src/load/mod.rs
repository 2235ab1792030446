//! Boot loaders: from a kernel file to a VM's first instruction.
//!
//! [`load`] finds out what the file is, places it, its modules, the command line and the tables
//! of its boot protocol in guest memory, and gives the boot processor's first state. Protocols:
//! Linux' 64-bit and 32-bit ones ([`bzimage`]), PVH ([`pvh`]) and multiboot 1 ([`multiboot`]).
//!
//! Files are hostile: every number in them is checked before use, work and allocation are bounded
//! by the sizes of the file and of guest memory, and an error says by name what is wrong. What is
//! placed never overlaps, and never lies in page 0 or in a reserved range.

pub mod bzimage;
mod elf;
pub mod multiboot;
pub mod pvh;
mod space;

use alloc::vec::Vec;
use core::fmt;

use mem::{Gpa, GuestMemory, GuestRange, NotRam, PAGE_SIZE};
use virt::{AccessRights, CpuState, DescriptorTable, Gpr, Segment, SegmentName};
use zerocopy::{Immutable, IntoBytes};

use space::Space;

/// What a range of guest-physical addresses is, with the numbers of ACPI 6.5, table 15.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// RAM that the guest's system uses as it likes.
    Ram = 1,
    /// Not to be touched: devices, firmware.
    Reserved = 2,
    /// ACPI tables.
    AcpiReclaimable = 3,
    /// Memory that the firmware keeps across sleep states.
    AcpiNvs = 4,
}

/// One line of the memory map that the guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Where.
    pub range: GuestRange,
    /// What.
    pub kind: MapKind,
}

/// The machine around the kernel, as far as boot protocols tell of it.
#[derive(Clone, Copy, Debug)]
pub struct BootLayout<'a> {
    /// Ranges that are not plain RAM, ascending and not overlapping; RAM may lie beneath.
    pub reserved: &'a [MapEntry],
    /// The ACPI root pointer (RSDP), where there is one.
    pub rsdp: Option<Gpa>,
    /// There is a VGA adapter, with a screen of 80 columns and 25 rows of text.
    pub text_screen: bool,
}

impl BootLayout<'_> {
    /// The memory map: the VM's RAM but for what is reserved, and the reserved ranges.
    pub fn map(&self, memory: &GuestMemory) -> Vec<MapEntry> {
        let mut map: Vec<MapEntry> = self.reserved.to_vec();
        map.extend(Space::new(memory, self).ranges().map(|range| MapEntry {
            range,
            kind: MapKind::Ram,
        }));
        map.sort_by_key(|entry| entry.range.start);
        map
    }
}

/// The protocol by which a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux' 64-bit boot protocol.
    Linux64,
    /// Linux' 32-bit boot protocol.
    Linux32,
    /// Xen's PVH entry.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Linux64 => "bzImage (64-bit entry)",
            Protocol::Linux32 => "bzImage (32-bit entry)",
            Protocol::Pvh => "PVH ELF",
            Protocol::Multiboot => "multiboot",
        })
    }
}

/// A file that a kernel is given: an initial RAM disk, or one of a multiboot kernel's modules.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Its content.
    pub data: &'a [u8],
    /// What a multiboot or PVH kernel is told of it: its name, perhaps with arguments.
    pub text: &'a str,
}

/// What a VM boots.
#[derive(Clone, Copy, Debug)]
pub struct BootFiles<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// Its name, which a multiboot kernel finds before its command line.
    pub kernel_name: &'a str,
    /// The initial RAM disk, or a multiboot kernel's modules.
    pub modules: &'a [Module<'a>],
    /// The kernel's command line.
    pub command_line: &'a str,
}

impl BootFiles<'_> {
    /// The modules but for empty ones.
    fn filled_modules(&self) -> impl Iterator<Item = &Module<'_>> {
        self.modules.iter().filter(|module| !module.data.is_empty())
    }
}

/// A loaded kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// How it was loaded.
    pub protocol: Protocol,
    /// State of the boot processor at the kernel's first instruction.
    pub state: CpuState,
}

/// Why a kernel can't be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// Neither Linux' setup header, nor an ELF file, nor a multiboot header.
    NotAKernel,
    /// An ELF file without a PVH note or a multiboot header.
    NoProtocol,
    /// The file is shorter than its own headers say.
    CutShort {
        /// Bytes that the headers speak of.
        needs: u64,
        /// Bytes in the file.
        has: u64,
    },
    /// A bzImage older than protocol 2.10 (Linux 2.6.31).
    OldProtocol {
        /// Version, 0x020a being 2.10.
        version: u16,
    },
    /// A header field with a value that can't be.
    BadField {
        /// Its name in the format's documentation.
        name: &'static str,
        /// Its value.
        value: u64,
    },
    /// Not a usable ELF file.
    BadElf(&'static str),
    /// A multiboot kernel demands something that isn't offered.
    MultibootDemands {
        /// The demanded flags that aren't known.
        flags: u32,
    },
    /// Linux takes one initial RAM disk only.
    ManyModules {
        /// How many there are.
        count: usize,
    },
    /// The command line is too long for the kernel.
    CmdlineTooLong {
        /// Its bytes.
        bytes: usize,
        /// Bytes that the kernel takes.
        max: usize,
    },
    /// The kernel wants to be in a place that is not free RAM.
    PlaceTaken {
        /// Start of the place.
        start: Gpa,
        /// Its bytes.
        bytes: u64,
    },
    /// Something does not fit in the VM's memory.
    NoRoom {
        /// What.
        what: &'static str,
        /// Its bytes.
        bytes: u64,
    },
    /// The VM's memory ends before what its layout says.
    NotRam(NotRam),
}

impl From<NotRam> for LoadError {
    fn from(e: NotRam) -> Self {
        LoadError::NotRam(e)
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoadError::NotAKernel => write!(f, "not a bzImage, ELF or multiboot kernel"),
            LoadError::NoProtocol => {
                write!(f, "an ELF file without a PVH note or a multiboot header")
            }
            LoadError::CutShort { needs, has } => {
                write!(f, "cut short: header says {needs} bytes, file has {has}")
            }
            LoadError::OldProtocol { version } => write!(
                f,
                "boot protocol {}.{:02} is too old; needs 2.10 (Linux 2.6.31) or later",
                version >> 8,
                version & 0xff
            ),
            LoadError::BadField { name, value } => {
                write!(f, "damaged: {name} can't be {value:#x}")
            }
            LoadError::BadElf(what) => write!(f, "not a usable ELF file: {what}"),
            LoadError::MultibootDemands { flags } => write!(
                f,
                "the multiboot header demands what Plinth doesn't offer (flags {flags:#x})"
            ),
            LoadError::ManyModules { count } => write!(
                f,
                "{count} modules are for a multiboot kernel; a bzImage takes one initrd"
            ),
            LoadError::CmdlineTooLong { bytes, max } => write!(
                f,
                "command line too long: {bytes} bytes, the kernel takes {max}"
            ),
            LoadError::PlaceTaken { start, bytes } => write!(
                f,
                "the kernel wants {bytes:#x} bytes at {start}, which is not free RAM; give the VM more memory"
            ),
            LoadError::NoRoom { what, bytes } => write!(
                f,
                "{what} ({bytes} bytes) does not fit; give the VM more memory"
            ),
            LoadError::NotRam(e) => e.fmt(f),
        }
    }
}

impl core::error::Error for LoadError {}

/// What is to be loaded, and where it may go.
struct Job<'a> {
    memory: &'a GuestMemory,
    space: Space,
    image: &'a [u8],
    files: &'a BootFiles<'a>,
    layout: &'a BootLayout<'a>,
}

/// Loads a kernel into zeroed guest memory, by the protocol that the file calls for.
///
/// Where a file has both a multiboot header and a PVH note, multiboot is taken, as QEMU does; but not
/// if it is a 64-bit ELF file that gives no addresses in its header, which multiboot 1 does not know.
///
/// # Errors
/// What is wrong with the file, or does not fit. Guest memory may have been written then.
pub fn load(
    memory: &GuestMemory,
    files: &BootFiles<'_>,
    layout: &BootLayout<'_>,
) -> Result<Entry, LoadError> {
    let image = files.kernel;
    let job = Job {
        memory,
        space: Space::new(memory, layout),
        image,
        files,
        layout,
    };
    if bzimage::is_bzimage(image) {
        return bzimage::load(job);
    }
    let header = multiboot::find_header(image);
    let first_choice = |h: &&multiboot::Header| h.has_addresses() || !elf::is_elf64(image);
    if let Some(header) = header.as_ref().filter(first_choice) {
        return multiboot::load(job, header);
    }
    if !elf::is_elf(image) {
        return Err(LoadError::NotAKernel);
    }
    match (pvh::find_entry(image)?, header) {
        (Some(entry), _) => pvh::load(job, entry),
        (None, Some(header)) => multiboot::load(job, &header),
        (None, None) => Err(LoadError::NoProtocol),
    }
}

/// Where tables of a boot protocol go: conventional memory from here on, as in QEMU. Small systems put
/// code for their other processors and for real mode below, before they have read the tables.
const TABLES_FROM: u64 = 0x9000;
/// Conventional memory ends here at the latest (640 KiB).
const TABLES_BELOW: u64 = 0xa_0000;
/// What 32-bit registers reach.
const BELOW_4G: u64 = 1 << 32;

impl Job<'_> {
    /// Places bytes in conventional memory.
    fn place(&mut self, what: &'static str, data: &[u8], align: u64) -> Result<Gpa, LoadError> {
        let bytes = data.len() as u64;
        let at = self
            .space
            .take_first(bytes, align, TABLES_FROM, TABLES_BELOW)
            .ok_or(LoadError::NoRoom { what, bytes })?;
        self.memory.write(at, data)?;
        Ok(at)
    }

    /// Places a structure or an array of them in conventional memory.
    fn place_table<T: IntoBytes + Immutable + ?Sized>(
        &mut self,
        what: &'static str,
        table: &T,
    ) -> Result<Gpa, LoadError> {
        self.place(what, table.as_bytes(), 16)
    }

    /// Places a text with its terminator.
    fn place_text(&mut self, what: &'static str, text: &str) -> Result<Gpa, LoadError> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.place(what, &bytes, 16)
    }

    /// Places a command line of at most `max` bytes.
    fn place_cmdline(&mut self, text: &str, max: usize) -> Result<Gpa, LoadError> {
        let bytes = text.len();
        if bytes > max {
            return Err(LoadError::CmdlineTooLong { bytes, max });
        }
        self.place_text("the command line", text)
    }

    /// Places the modules in their order, each on the next free page above `from`.
    fn place_modules(&mut self, mut from: u64) -> Result<Vec<GuestRange>, LoadError> {
        let mut placed = Vec::new();
        for module in self.files.filled_modules() {
            let bytes = module.data.len() as u64;
            let start = self
                .space
                .take_first(bytes, PAGE_SIZE, from, BELOW_4G)
                .ok_or(LoadError::NoRoom {
                    what: "the initrd",
                    bytes,
                })?;
            self.memory.write(start, module.data)?;
            from = start.0 + bytes;
            placed.push(GuestRange { start, bytes });
        }
        Ok(placed)
    }

    /// A state with flat segments, and a descriptor table in guest memory that agrees with it.
    fn flat_state(&mut self, mode: Mode) -> Result<CpuState, LoadError> {
        let (code_selector, data_selector) = mode.selectors();
        let code = Segment::flat(code_selector, CODE_KIND, mode == Mode::Long64);
        let data = Segment::flat(data_selector, DATA_KIND, false);
        let mut table = [0; 4];
        for segment in [code, data] {
            table[usize::from(segment.selector >> 3)] = descriptor(segment.rights);
        }
        let base = self.place_table("the descriptor table", &table)?;
        let mut state = CpuState::reset();
        for name in [
            SegmentName::Es,
            SegmentName::Ss,
            SegmentName::Ds,
            SegmentName::Fs,
            SegmentName::Gs,
        ] {
            state.segments[name as usize] = data;
        }
        state.segments[SegmentName::Cs as usize] = code;
        state.gdtr = DescriptorTable {
            base: base.0,
            limit: size_of_val(&table) as u16 - 1,
        };
        state.idtr = DescriptorTable::default();
        state.cr0 = CR0_PE | CR0_ET;
        Ok(state)
    }
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;

/// Width of the flat code segment, and whose it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Protected32,
    Linux32,
    Long64,
}

impl Mode {
    /// Selectors of code and data: Linux' protocol fixes them; the other protocols leave them open, and
    /// there they are QEMU's, on which small systems rely.
    const fn selectors(self) -> (u16, u16) {
        match self {
            Mode::Protected32 => (0x8, 0x10),
            Mode::Linux32 | Mode::Long64 => (0x10, 0x18),
        }
    }
}

/// Descriptor type: code, readable, accessed (SDM vol. 3A, table 3-1).
const CODE_KIND: u8 = 0xb;
/// Descriptor type: data, writable, accessed.
const DATA_KIND: u8 = 0x3;

/// The descriptor of a flat segment (SDM vol. 3A, figure 3-8).
fn descriptor(rights: AccessRights) -> u64 {
    const LIMIT: u64 = 0x000f_0000_0000_ffff;
    let rights = u64::from(u32::from(rights));
    LIMIT | (rights & 0xff) << 40 | (rights >> 12 & 0xf) << 52
}

/// Sets a register of a state.
fn set(state: &mut CpuState, gpr: Gpr, value: u64) {
    state.gprs[gpr as usize] = value;
}

/// Zeroes guest memory.
fn zero(memory: &GuestMemory, start: Gpa, bytes: u64) -> Result<(), NotRam> {
    const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let mut done = 0;
    while done < bytes {
        let piece = (bytes - done).min(PAGE_SIZE);
        memory.write(start + done, &ZEROES[..piece as usize])?;
        done += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
