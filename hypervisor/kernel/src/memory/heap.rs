//! The kernel's heap: grows by 2 MiB pages as it is used, never shrinks.

use core::{
    alloc::{GlobalAlloc, Layout},
    ptr::{self, NonNull},
};

use linked_list_allocator::Heap;
use mem::PAGE_SIZE_2M;

use super::{HEAP, map};
use crate::sync::Lock;

/// Bytes that stay free when a VM is made: for consoles and plans of VMs that are off, answers to operators, and the like.
const SPARE_BYTES: u64 = 4 << 20;
/// Bytes mapped to begin with.
const INITIAL_BYTES: u64 = 4 * PAGE_SIZE_2M;

struct KernelHeap(Lock<State>);

struct State {
    heap: Heap,
    /// End of what is mapped.
    end: u64,
}

#[global_allocator]
static KERNEL_HEAP: KernelHeap = KernelHeap(Lock::new(State {
    heap: Heap::empty(),
    end: HEAP.start,
}));

/// Gives the heap its first memory. Call once.
pub fn init() {
    let mut state = KERNEL_HEAP.0.lock();
    let bytes = state.map_more(INITIAL_BYTES);
    assert!(bytes > 0, "not enough memory for the hypervisor's heap");
    // SAFETY: the bytes were just mapped for the heap, for ever, and the heap is empty.
    unsafe { state.heap.init(HEAP.start as *mut u8, bytes as usize) };
}

/// Bytes of the heap that are handed out.
pub fn used() -> usize {
    KERNEL_HEAP.0.lock().heap.used()
}

/// Whether this many bytes can be taken from the heap, and it has room left for what else the host does; makes it larger if need be,
/// before guests get the memory.
pub fn has_room_for(bytes: u64) -> bool {
    let mut state = KERNEL_HEAP.0.lock();
    let wanted = bytes + SPARE_BYTES;
    let missing = wanted.saturating_sub(state.heap.free() as u64);
    if missing > 0 {
        state.grow(missing);
    }
    state.heap.free() as u64 >= wanted
}

impl State {
    /// Maps up to `bytes` more, in whole 2 MiB pages. Returns how many bytes that were.
    fn map_more(&mut self, bytes: u64) -> u64 {
        let start = self.end;
        let wanted = bytes.next_multiple_of(PAGE_SIZE_2M);
        while self.end - start < wanted && self.end < HEAP.end {
            if map::map_large_page(self.end).is_err() {
                break;
            }
            self.end += PAGE_SIZE_2M;
        }
        self.end - start
    }

    /// Makes the heap larger by up to `bytes`, in whole 2 MiB pages.
    fn grow(&mut self, bytes: u64) {
        let grown = self.map_more(bytes);
        // SAFETY: the bytes were just mapped right behind the heap's end, for the heap, for ever.
        unsafe { self.heap.extend(grown as usize) };
    }

    fn allocate(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        if let Ok(block) = self.heap.allocate_first_fit(layout) {
            return Some(block);
        }
        // Room for the block at any alignment, and for the allocator's own bookkeeping.
        let bytes = layout.size().checked_add(layout.align())?.checked_add(64)?;
        self.grow(bytes as u64);
        self.heap.allocate_first_fit(layout).ok()
    }
}

// SAFETY: the linked-list allocator hands out disjoint, aligned blocks of its memory; the lock serialises it.
unsafe impl GlobalAlloc for KernelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .allocate(layout)
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(block) = NonNull::new(block) else {
            return;
        };
        // SAFETY: by the trait's contract the block came from `alloc` with this layout.
        unsafe { self.0.lock().heap.deallocate(block, layout) };
    }
}
