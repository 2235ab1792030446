//! A driver's side of a virtqueue, and a disk, for tests.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

use mem::fake::FakeMemory;
use mem::guest::pc_layout;
use mem::{Gpa, GuestMemory};
use spin::Mutex;
use storage::{Disk, DiskError, SECTOR};

use super::queue::QueueLayout;

/// Bytes of guest RAM.
pub(crate) const RAM: u64 = 2 << 20;

/// A VM's memory.
pub(crate) fn memory() -> Arc<GuestMemory> {
    let host = Box::leak(Box::new(FakeMemory::new(RAM)));
    Arc::new(GuestMemory::allocate(host, 1, &pc_layout(RAM)).unwrap())
}

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A driver with one queue.
pub(crate) struct Driver {
    pub memory: Arc<GuestMemory>,
    pub layout: QueueLayout,
    offered: u16,
    seen: u16,
    next: u16,
}

impl Driver {
    pub fn new(memory: Arc<GuestMemory>, size: u16, base: u64) -> Self {
        Driver {
            memory,
            layout: QueueLayout {
                size,
                descriptors: Gpa(base),
                available: Gpa(base + 0x2000),
                used: Gpa(base + 0x3000),
            },
            offered: 0,
            seen: 0,
            next: 0,
        }
    }

    /// Writes a descriptor of a table.
    pub fn describe(&self, table: Gpa, index: u16, d: (u64, u32, u16, u16)) {
        let at = table + 16 * u64::from(index);
        self.memory.write_u64(at, d.0).unwrap();
        self.memory.write_u32(at + 8, d.1).unwrap();
        self.memory.write_u16(at + 12, d.2).unwrap();
        self.memory.write_u16(at + 14, d.3).unwrap();
    }

    /// Writes a descriptor of the queue.
    pub fn set(&self, index: u16, d: (u64, u32, u16, u16)) {
        self.describe(self.layout.descriptors, index, d);
    }

    /// Offers the chain that begins at `head`.
    pub fn offer(&mut self, head: u16) {
        let slot = self.layout.available + 4 + 2 * u64::from(self.offered % self.layout.size);
        self.memory.write_u16(slot, head).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.set_index(self.offered);
    }

    /// Sets the index of the available ring.
    pub fn set_index(&self, index: u16) {
        let at = self.layout.available + 2;
        self.memory.write_u16(at, index).unwrap();
    }

    /// Offers a chain of buffers: address, bytes, whether the device writes.
    pub fn request(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next;
        for (n, &(start, bytes, write)) in buffers.iter().enumerate() {
            let index = self.next;
            self.next = (self.next + 1) % self.layout.size;
            let next = if n + 1 < buffers.len() { NEXT } else { 0 };
            let flags = next | if write { WRITE } else { 0 };
            self.set(index, (start, bytes, flags, self.next));
        }
        self.offer(head);
        head
    }

    /// Next used entry: head and bytes written.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        let index = self.memory.read_u16(self.layout.used + 2).unwrap();
        if index == self.seen {
            return None;
        }
        let at = self.layout.used + 4 + 8 * u64::from(self.seen % self.layout.size);
        self.seen = self.seen.wrapping_add(1);
        let head = self.memory.read_u32(at).unwrap();
        Some((head, self.memory.read_u32(at + 4).unwrap()))
    }
}

/// A disk in a vector that fails where it is told to.
pub(crate) struct FakeDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub read_only: bool,
    /// Sector at which everything fails.
    pub bad: Option<u64>,
    pub flushes: AtomicU32,
}

impl FakeDisk {
    pub fn new(sectors: u64) -> Self {
        let bytes = (0..sectors * SECTOR).map(|i| (i / 3) as u8).collect();
        FakeDisk {
            bytes: Mutex::new(bytes),
            read_only: false,
            bad: None,
            flushes: AtomicU32::new(0),
        }
    }

    fn range(&self, offset: u64, bytes: u64) -> Result<Range<usize>, DiskError> {
        let hit = |bad: u64| (offset..offset + bytes).contains(&(bad * SECTOR));
        if self.bad.is_some_and(hit) {
            return Err(DiskError::NoSpace);
        }
        // The device checks before: a test that leaves the disk fails here.
        Ok(offset as usize..(offset + bytes) as usize)
    }
}

impl Disk for FakeDisk {
    fn sectors(&self) -> u64 {
        self.bytes.lock().len() as u64 / SECTOR
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), DiskError> {
        let range = self.range(offset, to.len() as u64)?;
        to.copy_from_slice(&self.bytes.lock()[range]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), DiskError> {
        let range = self.range(offset, from.len() as u64)?;
        self.bytes.lock()[range].copy_from_slice(from);
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        let range = self.range(offset, bytes)?;
        self.bytes.lock()[range].fill(0);
        Ok(())
    }
    fn discard(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        let range = self.range(offset, bytes)?;
        self.bytes.lock()[range].fill(0xdd);
        Ok(())
    }
}
