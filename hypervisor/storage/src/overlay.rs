//! Changed blocks of a disk, in host frames.
//!
//! A disk is cut into blocks of 4 KiB. A table of two levels says for each block whether it
//! was changed: the root lists table frames, a table frame has 512 entries, an entry is [`BASE`],
//! [`ZEROES`] or the frame with the block's content. Table frames and blocks count against
//! a limit, so that a guest takes no more host memory than its configuration says.

use alloc::{boxed::Box, vec};

use mem::{HostMemory, Hpa, Owner, PAGE_SIZE};

use crate::DiskError;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = PAGE_SIZE;
/// Entries of a table frame.
const ENTRIES: u64 = PAGE_SIZE / 8;
/// Entry: the block is unchanged.
const BASE: u64 = 0;
/// Entry: the block is all zeroes and has no frame. No frame has this address.
const ZEROES: u64 = 1;

/// Where a block's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the image.
    Base,
    /// Nowhere: it reads as zeroes.
    Zeroes,
    /// In this frame.
    Frame(Hpa),
}

impl Place {
    fn from_entry(entry: u64) -> Self {
        match entry {
            BASE => Place::Base,
            ZEROES => Place::Zeroes,
            frame => Place::Frame(Hpa(frame)),
        }
    }

    fn into_entry(self) -> u64 {
        match self {
            Place::Base => BASE,
            Place::Zeroes => ZEROES,
            Place::Frame(frame) => frame.0,
        }
    }
}

/// The changed blocks of one disk.
pub(crate) struct Overlay {
    memory: &'static dyn HostMemory,
    owner: Owner,
    /// Table frames, one per 512 blocks.
    root: Box<[Option<Hpa>]>,
    /// Frames taken, and most that may be.
    used: u64,
    limit: u64,
}

impl Overlay {
    /// No block of `blocks` is changed. Takes at most `limit_bytes` of frames, as `owner`.
    pub(crate) fn new(
        memory: &'static dyn HostMemory,
        owner: Owner,
        blocks: u64,
        limit_bytes: u64,
    ) -> Self {
        Overlay {
            memory,
            owner,
            root: vec![None; blocks.div_ceil(ENTRIES) as usize].into(),
            used: 0,
            limit: limit_bytes / PAGE_SIZE,
        }
    }

    /// Bytes of host memory taken, without the root.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used * PAGE_SIZE
    }

    fn allocate(&mut self) -> Result<Hpa, DiskError> {
        if self.used >= self.limit {
            return Err(DiskError::NoSpace);
        }
        let frame = self.memory.allocate(1, PAGE_SIZE, self.owner);
        let frame = frame.map_err(|_| DiskError::NoSpace)?;
        self.used += 1;
        Ok(frame)
    }

    /// Gives a frame back, without what the guest wrote.
    fn free(&mut self, frame: Hpa) {
        self.memory.write(frame, &[0; PAGE_SIZE as usize]);
        self.memory.free(frame, 1, self.owner);
        self.used -= 1;
    }

    /// Address of a block's entry; `None`: it has no table, and so is unchanged.
    fn entry(&self, block: u64) -> Option<Hpa> {
        let table = self
            .root
            .get((block / ENTRIES) as usize)
            .copied()
            .flatten()?;
        Some(table + block % ENTRIES * 8)
    }

    /// Where a block is.
    pub(crate) fn place(&self, block: u64) -> Place {
        self.entry(block).map_or(Place::Base, |entry| {
            Place::from_entry(self.memory.read_u64(entry))
        })
    }

    /// The address of a block's entry, in a table that is made if there is none.
    fn entry_or_new(&mut self, block: u64) -> Result<Hpa, DiskError> {
        let index = (block / ENTRIES) as usize;
        let table = match self.root.get(index) {
            Some(Some(table)) => *table,
            Some(None) => {
                let table = self.allocate()?;
                self.root[index] = Some(table);
                table
            }
            None => return Err(DiskError::OutOfRange),
        };
        Ok(table + block % ENTRIES * 8)
    }

    /// A frame for a block that has none yet, zeroed; the caller fills it.
    pub(crate) fn add_frame(&mut self, block: u64) -> Result<Hpa, DiskError> {
        let entry = self.entry_or_new(block)?;
        let frame = self.allocate()?;
        self.memory
            .write_u64(entry, Place::Frame(frame).into_entry());
        Ok(frame)
    }

    /// Makes a block read as zeroes, and frees its frame if it has one.
    pub(crate) fn set_zeroes(&mut self, block: u64) -> Result<(), DiskError> {
        let entry = self.entry_or_new(block)?;
        if let Place::Frame(frame) = Place::from_entry(self.memory.read_u64(entry)) {
            self.free(frame);
        }
        self.memory.write_u64(entry, Place::Zeroes.into_entry());
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        for table in core::mem::take(&mut self.root).into_iter().flatten() {
            for index in 0..ENTRIES {
                let entry = self.memory.read_u64(table + index * 8);
                if let Place::Frame(frame) = Place::from_entry(entry) {
                    self.free(frame);
                }
            }
            self.free(table);
            self.memory.breathe();
        }
    }
}
