//! The kernel's heap.

use core::{
    alloc::{GlobalAlloc, Layout},
    ptr::{self, NonNull},
};

use linked_list_allocator::Heap;

use crate::sync::Lock;

struct KernelHeap(Lock<Heap>);

#[global_allocator]
static HEAP: KernelHeap = KernelHeap(Lock::new(Heap::empty()));

/// Gives the heap its memory.
///
/// # Safety
/// Call once; `bytes` at `start` must be writable, unused and mapped for ever.
pub unsafe fn init(start: *mut u8, bytes: usize) {
    // SAFETY: the caller vouches for the memory.
    unsafe { HEAP.0.lock().init(start, bytes) };
}

// SAFETY: the linked-list allocator hands out disjoint, aligned blocks of its memory; the lock serialises it.
unsafe impl GlobalAlloc for KernelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .allocate_first_fit(layout)
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(block) = NonNull::new(block) else {
            return;
        };
        // SAFETY: by the trait's contract the block came from `alloc` with this layout.
        unsafe { self.0.lock().deallocate(block, layout) };
    }
}
