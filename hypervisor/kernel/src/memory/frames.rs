//! Frames of host memory.

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use mem::{HostMemory, Hpa, OutOfFrames, Owner, PAGE_SIZE};

use super::window;
use crate::sync::Lock;

/// Frames below this stay unused: firmware data, and the start-up code of the other processors.
const LOW_MEMORY: u64 = 1 << 20;

/// The machine's memory.
pub struct Host(Lock<[(u64, u64); 64]>);

/// The machine's memory, for every layer above.
pub static HOST: Host = Host(Lock::new([(0, 0); 64]));

/// Takes over the usable regions.
pub fn init(regions: &[MemoryRegion]) {
    let mut table = HOST.0.lock();
    let usable = regions
        .iter()
        .filter(|r| r.kind == MemoryRegionKind::Usable)
        .map(|r| (r.start.max(LOW_MEMORY), r.end))
        .filter(|(start, end)| start < end);
    for (slot, region) in table.iter_mut().zip(usable) {
        *slot = region;
    }
}

impl HostMemory for Host {
    fn allocate(&self, frames: u64, align: u64, _owner: Owner) -> Result<Hpa, OutOfFrames> {
        let mut table = self.0.lock();
        let bytes = frames * PAGE_SIZE;
        for slot in table.iter_mut() {
            let base = slot.0.next_multiple_of(align);
            if base + bytes <= slot.1 {
                slot.0 = base + bytes;
                // SAFETY: the frames were free RAM and lie in the window.
                unsafe { window::pointer(Hpa(base)).write_bytes(0, bytes as usize) };
                return Ok(Hpa(base));
            }
        }
        Err(OutOfFrames { frames })
    }

    fn free(&self, _base: Hpa, _frames: u64, _owner: Owner) {}

    fn pointer(&self, hpa: Hpa) -> *mut u8 {
        window::pointer(hpa)
    }

    fn read(&self, from: Hpa, to: &mut [u8]) {
        // SAFETY: the window maps all of RAM.
        unsafe { window::pointer(from).copy_to(to.as_mut_ptr(), to.len()) };
    }

    fn write(&self, to: Hpa, from: &[u8]) {
        // SAFETY: the window maps all of RAM.
        unsafe { window::pointer(to).copy_from(from.as_ptr(), from.len()) };
    }

    fn read_u64(&self, from: Hpa) -> u64 {
        // SAFETY: aligned, in RAM, in the window.
        unsafe { window::pointer(from).cast::<u64>().read_volatile() }
    }

    fn write_u64(&self, to: Hpa, value: u64) {
        // SAFETY: aligned, in RAM, in the window.
        unsafe { window::pointer(to).cast::<u64>().write_volatile(value) };
    }
}
