//! Memory: addresses as types, frames with owners, nested page tables, guest memory.
//!
//! Unsafe code lives only in the module that touches frames.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod access;
pub mod addr;
mod buddy;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod frames;
pub mod guest;
pub mod host;
pub mod nested;

pub use access::{Direction, Width};
pub use addr::{Gpa, Gva, Hpa, PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M};
pub use guest::{GuestMemory, GuestRange, NotRam};
pub use host::{HostMemory, MemoryRegion, OutOfFrames, Owner};
pub use nested::{EntryFormat, Ept, MemoryType, NestedError, NestedTable, Npt, PageSize, Rights};
