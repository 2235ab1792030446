//! The host's memory: frames, the window onto them, own mappings, stacks, heap.
//!
//! Address space, upper half only: the boot loader's part ([`LOADER_RANGE`]: kernel image, window
//! onto all physical memory, first stack, ramdisk, frame buffer), then ours, a 512 GiB slot
//! each for stacks, device registers and heap. The lower half is empty once [`seal`] has run:
//! a null pointer faults. No page is writable and executable, ever.

mod heap;
mod map;
mod seal;
mod window;

use core::ops::Range;

use bootloader_api::{BootInfo, info::MemoryRegionKind};
use mem::{Hpa, MemoryRegion, OutOfFrames, frames::Frames};
use spin::Once;

pub use heap::{has_room_for as has_heap_for, used as heap_used};
pub use map::{combine_writes, is_mapped, map_device, new_stack};
pub use seal::seal;
pub use window::offset as window_offset;

/// Where the boot loader places kernel, window, stack, ramdisk and frame buffer.
pub const LOADER_RANGE: Range<u64> = 0xffff_8000_0000_0000..0xffff_c000_0000_0000;
/// Stacks, each above an unmapped guard page.
const STACKS: Range<u64> = 0xffff_c000_0000_0000..0xffff_c080_0000_0000;
/// Device registers, uncached.
const DEVICES: Range<u64> = 0xffff_c080_0000_0000..0xffff_c100_0000_0000;
/// The heap.
const HEAP: Range<u64> = 0xffff_c100_0000_0000..0xffff_c180_0000_0000;

/// Physical addresses where a processor can begin: above the BIOS data area, below the video memory.
const REAL_MODE: Range<Hpa> = Hpa(0x1000)..Hpa(0xa_0000);

/// The machine's frames, for every layer above.
pub static HOST: Frames = Frames::new();

/// The guard page below the boot loader's stack.
static BOOT_STACK_GUARD: Once<u64> = Once::new();

/// Takes over what the boot loader found. Call once, first thing.
pub fn init(boot_info: &BootInfo) {
    let offset = boot_info
        .physical_memory_offset
        .as_ref()
        .copied()
        .expect("the boot loader was told to map physical memory");
    window::init(offset);
    BOOT_STACK_GUARD.call_once(|| boot_info.kernel_stack_bottom - mem::PAGE_SIZE);
    let usable = boot_info
        .memory_regions
        .iter()
        .filter(|region| region.kind == MemoryRegionKind::Usable)
        .map(|region| MemoryRegion {
            start: Hpa(region.start),
            bytes: region.end.saturating_sub(region.start),
        });
    // SAFETY: the boot loader maps all physical memory at `offset`, writable, and hands regions
    // marked usable to us; nothing of ours lies in them yet.
    if let Err(error) = unsafe { HOST.init(usable, offset as *mut u8) } {
        panic!("memory: {error}");
    }
    heap::init();
}

/// Bytes of RAM that can be handed out.
pub fn total_bytes() -> u64 {
    HOST.statistics().total * mem::PAGE_SIZE
}

/// Takes `frames` contiguous zeroed frames below 640 KiB, for ever.
///
/// # Errors
/// The firmware left none free.
pub fn take_real_mode(frames: u64) -> Result<Hpa, OutOfFrames> {
    HOST.take_low(REAL_MODE, frames)
}

/// Whether `address` is where a stack runs into when it overflows.
pub fn is_stack_guard(address: u64) -> bool {
    let page = address & !(mem::PAGE_SIZE - 1);
    BOOT_STACK_GUARD.get() == Some(&page) || (STACKS.contains(&address) && !is_mapped(address))
}
