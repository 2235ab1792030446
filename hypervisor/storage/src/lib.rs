//! Disks for guests: what a disk can do, and disks made from an image in memory.
//!
//! [`Disk`] is what a disk controller (virtio-blk) serves its guest from. [`ImageDisk`] is one
//! whose first content is an image file carried in the boot image; what the guest writes is
//! kept beside it in host memory.
//!
//! Invariants: every access is checked against the disk's capacity before a byte moves; an
//! operation takes time in proportion to the bytes it is asked for and never waits; what a disk takes
//! of the host's memory is limited when it is made.
//!
//! Not here: partitions and file systems, which are the guest's affair, and controllers.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod image;
mod overlay;

use core::fmt;

pub use image::ImageDisk;

/// Bytes of a sector, in which a disk's capacity is counted.
pub const SECTOR: u64 = 512;

/// Why an operation on a disk failed. Nothing else of the disk was changed by it, but for the
/// bytes before the failing ones of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// Part of the range is beyond the disk's end.
    OutOfRange,
    /// The disk is read-only.
    ReadOnly,
    /// What the disk may take of the host's memory for changed data is used up, or the host has no more.
    NoSpace,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskError::OutOfRange => "beyond the end of the disk",
            DiskError::ReadOnly => "the disk is read-only",
            DiskError::NoSpace => "no host memory left for changed data",
        })
    }
}

impl core::error::Error for DiskError {}

/// A disk of a guest. Shared by all that serve it; each operation is atomic only within a 4 KiB block.
pub trait Disk: Send + Sync {
    /// Capacity in sectors of [`SECTOR`] bytes.
    fn sectors(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Copies `to.len()` bytes from byte `offset` of the disk.
    ///
    /// # Errors
    /// The range leaves the disk; `to` is unchanged.
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), DiskError>;

    /// Copies bytes to byte `offset` of the disk.
    ///
    /// # Errors
    /// The disk is read-only, the range leaves it, or there is no memory for the change.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), DiskError>;

    /// Makes everything written so far last, as far as this disk can.
    ///
    /// # Errors
    /// What was written could not be kept.
    fn flush(&self) -> Result<(), DiskError>;

    /// Makes `bytes` bytes from byte `offset` read as zeroes.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn write_zeroes(&self, offset: u64, bytes: u64) -> Result<(), DiskError>;

    /// The guest has no use any more for `bytes` bytes from byte `offset`: memory behind them may be freed,
    /// and what they read as afterwards is the disk's choice.
    ///
    /// # Errors
    /// The disk is read-only, or the range leaves it.
    fn discard(&self, offset: u64, bytes: u64) -> Result<(), DiskError>;
}

/// Whether `bytes` bytes from `offset` lie within `sectors` sectors.
fn check_range(sectors: u64, offset: u64, bytes: u64) -> Result<(), DiskError> {
    match offset.checked_add(bytes) {
        Some(end) if end.div_ceil(SECTOR) <= sectors => Ok(()),
        _ => Err(DiskError::OutOfRange),
    }
}
