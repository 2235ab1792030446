//! The window: all of physical memory, mapped by the boot loader at one offset.

use core::sync::atomic::{AtomicU64, Ordering};

use mem::Hpa;

static OFFSET: AtomicU64 = AtomicU64::new(0);

/// Sets where the window begins.
pub fn init(offset: u64) {
    OFFSET.store(offset, Ordering::Relaxed);
}

/// Where `hpa` appears in the window.
pub fn pointer(hpa: Hpa) -> *mut u8 {
    (OFFSET.load(Ordering::Relaxed) + hpa.as_u64()) as *mut u8
}
