//! Physical memory: the map the loader gave, and access to what is not ours.

use core::arch::asm;

use crate::cpu;

/// A stretch of physical addresses as the loader described it.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Region {
    pub base: u64,
    pub length: u64,
    /// Kind by the E820 numbering: 1 is usable RAM.
    pub kind: u32,
}

/// E820: memory to use freely.
pub const USABLE: u32 = 1;
/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a large page.
pub const LARGE_PAGE: u64 = 2 << 20;

impl Region {
    /// First address after it.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.length)
    }
}

/// The memory map.
#[derive(Clone, Copy)]
pub struct Map {
    regions: [Region; Self::CAPACITY],
    length: usize,
}

impl Map {
    const CAPACITY: usize = 32;

    /// No memory.
    pub const fn new() -> Self {
        Self {
            regions: [Region {
                base: 0,
                length: 0,
                kind: 0,
            }; Self::CAPACITY],
            length: 0,
        }
    }

    /// Adds a region; those beyond the capacity are dropped.
    pub fn push(&mut self, region: Region) {
        if let Some(slot) = self.regions.get_mut(self.length) {
            *slot = region;
            self.length += 1;
        }
    }

    /// The regions in the loader's order.
    pub fn regions(&self) -> &[Region] {
        self.regions.get(..self.length).unwrap_or_default()
    }

    /// Usable page-aligned stretches outside of this program's image and of the first page,
    /// which holds what firmware left: (first address, first address after).
    pub fn free_ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let image = image();
        self.regions()
            .iter()
            .filter(|region| region.kind == USABLE)
            .flat_map(move |region| {
                let start = region.base.max(PAGE).next_multiple_of(PAGE);
                let end = region.end() & !(PAGE - 1);
                [(start, end.min(image.0)), (start.max(image.1), end)]
            })
            .filter(|(start, end)| start < end)
    }

    /// First address after the last usable region.
    pub fn top(&self) -> u64 {
        self.regions()
            .iter()
            .filter(|region| region.kind == USABLE)
            .map(Region::end)
            .max()
            .unwrap_or(0)
    }

    /// A free, large-page-aligned piece of RAM above 2 MiB, the last one below 4 GiB.
    pub fn scratch(&self, bytes: u64) -> Option<u64> {
        self.free_ranges()
            .filter_map(|(start, end)| {
                let base = end.min(1 << 32).checked_sub(bytes)? & !(LARGE_PAGE - 1);
                (base >= start.max(LARGE_PAGE)).then_some(base)
            })
            .max()
    }
}

unsafe extern "C" {
    static __image_start: u8;
    static __bss_end: u8;
}

/// First address of this program and first address after it, stack and tables included.
pub fn image() -> (u64, u64) {
    (&raw const __image_start as u64, &raw const __bss_end as u64)
}

fn outside_image(address: u64, bytes: u64) -> bool {
    let (start, end) = image();
    address.saturating_add(bytes) <= start || address >= end
}

macro_rules! physical {
    ($type:ty, $operand:literal, $class:ident, read $read:ident $(, write $write:ident)?) => {
        /// Reads physical memory outside of this program, whatever is there, by one MOV. The
        /// address must be identity-mapped or in the window, or it is a page fault.
        pub fn $read(address: u64) -> $type {
            assert!(outside_image(address, size_of::<$type>() as u64), "inside of the image");
            let value: $type;
            // SAFETY: not this program's memory, so no reference covers it, and any bytes are
            // a valid integer. MOV takes addresses of any alignment.
            unsafe {
                asm!(concat!("mov ", $operand, ", [{1}]"), out($class) value, in(reg) address,
                    options(nostack, preserves_flags));
            }
            value
        }
        $(
            /// Writes physical memory outside of this program, by one MOV.
            pub fn $write(address: u64, value: $type) {
                assert!(outside_image(address, size_of::<$type>() as u64), "inside of the image");
                // SAFETY: not this program's memory, so no reference covers it.
                unsafe {
                    asm!(concat!("mov [{1}], ", $operand), in($class) value, in(reg) address,
                        options(nostack, preserves_flags));
                }
            }
        )?
    };
}
physical!(u8, "{0}", reg_byte, read read8, write write8);
physical!(u16, "{0:x}", reg, read read16, write write16);
physical!(u32, "{0:e}", reg, read read32, write write32);
physical!(u64, "{0}", reg, read read64, write write64);

/// Copies physical memory outside of this program into a buffer.
pub fn read_bytes(address: u64, buffer: &mut [u8]) {
    for (offset, byte) in (0..).zip(buffer) {
        *byte = read8(address + offset);
    }
}

/// Copies bytes to physical memory outside of this program.
pub fn write_bytes(address: u64, bytes: &[u8]) {
    for (offset, byte) in (0..).zip(bytes) {
        write8(address + offset, *byte);
    }
}

/// Sum of all bytes of a stretch, as ACPI and others check it: 0 is right.
pub fn byte_sum(address: u64, length: u64) -> u8 {
    (0..length).fold(0, |sum: u8, offset| {
        sum.wrapping_add(read8(address + offset))
    })
}

/// Width of physical addresses in bits.
pub fn physical_bits() -> u32 {
    if cpu::max_extended_leaf() >= 0x8000_0008 {
        cpu::cpuid(0x8000_0008, 0).eax & 0xFF
    } else {
        36
    }
}
