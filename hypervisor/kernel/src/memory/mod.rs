//! The host's memory: the window onto physical memory, frames, heap.

mod frames;
mod heap;
mod window;

use core::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use bootloader_api::{BootInfo, info::MemoryRegionKind};
use mem::{HostMemory, Hpa, Owner};

pub use frames::HOST;
pub use window::pointer;

/// Where the boot loader places kernel, window, stack, ramdisk and frame buffer.
pub const LOADER_RANGE: Range<u64> = 0xffff_8000_0000_0000..0xffff_c000_0000_0000;

/// Bytes of heap to begin with.
const HEAP_BYTES: u64 = 16 << 20;

static USABLE: AtomicU64 = AtomicU64::new(0);

/// Takes over what the boot loader found. Call once, first thing.
pub fn init(boot_info: &'static BootInfo) {
    let offset = boot_info
        .physical_memory_offset
        .as_ref()
        .copied()
        .expect("the boot loader was told to map physical memory");
    window::init(offset);
    let usable = boot_info
        .memory_regions
        .iter()
        .filter(|r| r.kind == MemoryRegionKind::Usable);
    USABLE.store(
        usable.clone().map(|r| r.end - r.start).sum(),
        Ordering::Relaxed,
    );
    frames::init(&boot_info.memory_regions);
    let heap = HOST
        .allocate(HEAP_BYTES / mem::PAGE_SIZE, mem::PAGE_SIZE, Owner::Host)
        .expect("not enough memory for the hypervisor's heap");
    // SAFETY: the frames were just allocated for this and stay mapped in the window for ever.
    unsafe { heap::init(pointer(heap), HEAP_BYTES as usize) };
}

/// Bytes of RAM that the firmware left to us.
pub fn usable_bytes() -> u64 {
    USABLE.load(Ordering::Relaxed)
}

/// A host-physical address as seen through the window.
pub fn virtual_of(hpa: Hpa) -> u64 {
    pointer(hpa) as u64
}
