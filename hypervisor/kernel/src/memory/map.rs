//! Own mappings, added to the boot loader's page tables: stacks, device registers, heap.
//!
//! Once several processors run, mappings are only ever added, so none holds a stale translation of one.

use mem::{HostMemory, Hpa, OutOfFrames, Owner, PAGE_SIZE, PAGE_SIZE_2M};
use x86_64::{
    PhysAddr, VirtAddr,
    registers::control::Cr3,
    structures::paging::{
        FrameAllocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame,
        Size2MiB, Size4KiB, Translate, mapper::MapToError,
    },
};

use super::{DEVICES, HOST, STACKS, window};
use crate::sync::Lock;

/// Next free addresses.
struct Next {
    stack: u64,
    device: u64,
}

static NEXT: Lock<Next> = Lock::new(Next {
    stack: STACKS.start,
    device: DEVICES.start,
});

/// Readable and writable data.
const DATA: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::NO_EXECUTE);
/// Device registers: uncached.
const DEVICE: PageTableFlags = DATA
    .union(PageTableFlags::NO_CACHE)
    .union(PageTableFlags::WRITE_THROUGH);

/// Frames for page tables.
struct TableFrames;

// SAFETY: `HOST` hands each frame out once.
unsafe impl FrameAllocator<Size4KiB> for TableFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame<Size4KiB>> {
        let frame = HOST.allocate(1, PAGE_SIZE, Owner::Host).ok()?;
        Some(PhysFrame::containing_address(PhysAddr::new(frame.as_u64())))
    }
}

/// The page tables in force.
///
/// # Safety
/// No other value of this may be used at the same time.
unsafe fn tables() -> OffsetPageTable<'static> {
    let offset = VirtAddr::new(window::offset());
    let root = offset + Cr3::read().0.start_address().as_u64();
    // SAFETY: CR3 holds the root table's address and the window maps all tables; the caller sees to it that
    // the reference is the only one.
    unsafe { OffsetPageTable::new(&mut *root.as_mut_ptr::<PageTable>(), offset) }
}

/// Maps one page; page tables are made as needed.
fn map_page<S>(
    tables: &mut OffsetPageTable<'static>,
    address: u64,
    frame: u64,
    flags: PageTableFlags,
) -> Result<(), OutOfFrames>
where
    S: x86_64::structures::paging::PageSize + core::fmt::Debug,
    OffsetPageTable<'static>: Mapper<S>,
{
    let page = Page::<S>::containing_address(VirtAddr::new(address));
    let frame = PhysFrame::<S>::containing_address(PhysAddr::new(frame));
    // SAFETY: the address lies in one of our ranges and was never mapped; the frame is ours alone, or a
    // device's registers, which its driver alone touches.
    match unsafe { tables.map_to(page, frame, flags, &mut TableFrames) } {
        Ok(flush) => {
            flush.flush();
            Ok(())
        }
        Err(MapToError::FrameAllocationFailed) => Err(OutOfFrames { frames: 1 }),
        Err(error) => panic!("mapping {address:#x}: {error:?}"),
    }
}

/// Maps a fresh 2 MiB page of data at `address`.
///
/// # Errors
/// No such frame left.
pub(super) fn map_large_page(address: u64) -> Result<(), OutOfFrames> {
    let frame = HOST.allocate(PAGE_SIZE_2M / PAGE_SIZE, PAGE_SIZE_2M, Owner::Host)?;
    let _next = NEXT.lock();
    // SAFETY: `NEXT` is held, and every user of `tables` holds it.
    let mut tables = unsafe { tables() };
    map_page::<Size2MiB>(&mut tables, address, frame.as_u64(), DATA)
}

/// Makes a stack of `bytes`, a multiple of 4096, with an unmapped page below. Returns its top, where RSP starts.
///
/// # Errors
/// No frames left.
pub fn new_stack(bytes: u64) -> Result<u64, OutOfFrames> {
    let mut next = NEXT.lock();
    let bottom = next.stack + PAGE_SIZE;
    let top = bottom + bytes;
    assert!(top <= STACKS.end, "no address space left for stacks");
    next.stack = top;
    for address in (bottom..top).step_by(PAGE_SIZE as usize) {
        let frame = HOST.allocate(1, PAGE_SIZE, Owner::Host)?;
        // SAFETY: `NEXT` is held, and every user of `tables` holds it.
        let mut tables = unsafe { tables() };
        map_page::<Size4KiB>(&mut tables, address, frame.as_u64(), DATA)?;
    }
    Ok(top)
}

/// Maps `bytes` of device registers at physical address `registers`, uncached, for ever.
pub fn map_device(registers: Hpa, bytes: u64) -> *mut u8 {
    let mut next = NEXT.lock();
    let first = registers.align_down(PAGE_SIZE);
    let pages = (registers.page_offset() + bytes).div_ceil(PAGE_SIZE);
    let start = next.device;
    assert!(
        start + pages * PAGE_SIZE <= DEVICES.end,
        "no address space left for devices"
    );
    next.device += pages * PAGE_SIZE;
    for page in 0..pages {
        let offset = page * PAGE_SIZE;
        // SAFETY: `NEXT` is held, and every user of `tables` holds it.
        let mut tables = unsafe { tables() };
        let mapped =
            map_page::<Size4KiB>(&mut tables, start + offset, first.as_u64() + offset, DEVICE);
        assert!(mapped.is_ok(), "no memory left for page tables");
    }
    (start + registers.page_offset()) as *mut u8
}

/// Makes the boot loader's mapping of a frame buffer write-combining (by `cpu::protect`'s PAT): many small
/// writes become few large ones. For the time before other processors run.
pub fn combine_writes(start: u64, bytes: u64) {
    let _next = NEXT.lock();
    let first = Page::<Size4KiB>::containing_address(VirtAddr::new(start));
    let pages = (start % PAGE_SIZE + bytes).div_ceil(PAGE_SIZE);
    for page in 0..pages {
        // SAFETY: `NEXT` is held, and every user of `tables` holds it.
        let mut tables = unsafe { tables() };
        // SAFETY: the type of memory changes, not what is reached.
        let updated =
            unsafe { tables.update_flags(first + page, DATA | PageTableFlags::WRITE_THROUGH) };
        if let Ok(flush) = updated {
            flush.flush();
        }
    }
    // Lines that were cached under the old type must not be written back later.
    // SAFETY: WBINVD changes no memory that is seen through caches.
    unsafe { core::arch::asm!("wbinvd", options(nostack, preserves_flags)) };
}

/// Whether `address` is mapped. Takes no lock: for fault reports too.
pub fn is_mapped(address: u64) -> bool {
    let Ok(address) = VirtAddr::try_new(address) else {
        return false;
    };
    // SAFETY: the tables are only read, word by word, and mappings are only ever added.
    unsafe { tables() }.translate_addr(address).is_some()
}
