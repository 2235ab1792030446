//! The window: all of physical memory, mapped by the boot loader at one offset.
//!
//! Frames that were handed out are reached through `HOST`. This is for the boot loader's own
//! frames, which it does not hand out: page tables.

use core::sync::atomic::{AtomicU64, Ordering};

static OFFSET: AtomicU64 = AtomicU64::new(0);

/// Sets where the window begins.
pub fn init(offset: u64) {
    OFFSET.store(offset, Ordering::Relaxed);
}

/// Virtual address of physical address 0.
pub fn offset() -> u64 {
    OFFSET.load(Ordering::Relaxed)
}
