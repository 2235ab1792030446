//! Virtqueues, the device's side: takes chains of buffers that a driver offers, gives them back used.
//!
//! A split virtqueue (VIRTIO 1.2, section 2.7): descriptor table, available ring, used ring, all in guest memory
//! and all hostile. Each number is copied once and then checked; a chain is followed for at most as many
//! descriptors as the queue has, so a loop is found; a driver that breaks a rule gets a [`QueueError`], after
//! which the queue is not to be used until the device is reset. Packed virtqueues (section 2.8) are not
//! offered; devices see only [`Chain`]s, so they would not notice.

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{Ordering, fence};

use bitflags::bitflags;
use mem::{Gpa, GuestMemory, NotRam};

/// Bytes of a descriptor.
const DESCRIPTOR_LEN: u64 = 16;
/// Bytes before the entries of either ring: flags and index.
const RING_HEADER: u64 = 4;
/// Bytes of an entry of the available ring.
const AVAILABLE_LEN: u64 = 2;
/// Bytes of an entry of the used ring.
const USED_LEN: u64 = 8;
/// Most bytes of a chain (section 2.7.4).
const MAX_CHAIN_BYTES: u64 = 1 << 32;
/// Flag of the available ring: no interrupts (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

bitflags! {
    /// Flags of a descriptor (section 2.7.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct DescriptorFlags: u16 {
        /// Another one follows.
        const NEXT = 1;
        /// The device writes; else it reads.
        const WRITE = 2;
        /// The buffer is a table of descriptors.
        const INDIRECT = 4;
        const _ = !0;
    }
}

/// How a driver broke the rules of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueError {
    /// The queue's size is no power of two, or an area is not aligned (section 2.7).
    BadLayout,
    /// Ring, descriptor or buffer is not in RAM.
    NotRam(NotRam),
    /// The driver's index went further than there are entries.
    IndexJump {
        /// Where it stood.
        from: u16,
        /// Where it stands.
        to: u16,
    },
    /// The number of a descriptor is not below the size of its table.
    NoSuchDescriptor {
        /// The number.
        index: u16,
    },
    /// A chain has more descriptors than the queue: it is a loop, or too long.
    TooLong,
    /// A chain has more than 4 GiB.
    TooLarge,
    /// A buffer that the device reads comes after one that it writes.
    WrongOrder,
    /// An indirect table was not agreed on, is empty, is no whole number of descriptors, has more than the queue, or is
    /// itself in an indirect table.
    BadIndirect,
    /// A request has not the buffers that its device type demands.
    BadRequest,
}

impl From<NotRam> for QueueError {
    fn from(e: NotRam) -> Self {
        QueueError::NotRam(e)
    }
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QueueError::BadLayout => f.write_str("a queue of a bad size or alignment"),
            QueueError::NotRam(e) => e.fmt(f),
            QueueError::IndexJump { from, to } => {
                write!(f, "the driver's index jumped from {from} to {to}")
            }
            QueueError::NoSuchDescriptor { index } => write!(f, "there is no descriptor {index}"),
            QueueError::TooLong => f.write_str("a chain with more descriptors than the queue"),
            QueueError::TooLarge => f.write_str("a chain of more than 4 GiB"),
            QueueError::WrongOrder => {
                f.write_str("a buffer for the device to read after one for it to write")
            }
            QueueError::BadIndirect => f.write_str("a bad table of indirect descriptors"),
            QueueError::BadRequest => f.write_str("a request without the buffers that it needs"),
        }
    }
}

impl core::error::Error for QueueError {}

/// Where a driver has put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table; aligned to 16 bytes.
    pub descriptors: Gpa,
    /// Available ring ("driver area"); aligned to 2 bytes.
    pub available: Gpa,
    /// Used ring ("device area"); aligned to 4 bytes.
    pub used: Gpa,
}

/// What was agreed on for the queues of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
}

/// A buffer of a chain, in guest memory. Not yet known to be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Buffer {
    start: Gpa,
    bytes: u32,
}

/// A chain of buffers that a driver has offered: first those that the device reads, then those that it writes.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    buffers: Vec<Buffer>,
    /// Number of buffers that the device reads.
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
}

/// A place in the bytes of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    buffer: usize,
    offset: u32,
    end: usize,
}

impl Chain {
    /// Number of buffers.
    pub fn buffers(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes that the device may read.
    pub fn readable(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes that the device may write.
    pub fn writable(&self) -> u64 {
        self.writable_bytes
    }

    /// The first byte that the device may read.
    pub fn reader(&self) -> Cursor {
        Cursor {
            buffer: 0,
            offset: 0,
            end: self.readable,
        }
    }

    /// The first byte that the device may write.
    pub fn writer(&self) -> Cursor {
        Cursor {
            buffer: self.readable,
            offset: 0,
            end: self.buffers.len(),
        }
    }

    /// Calls `copy` for each piece of memory of the next `bytes` bytes, with the part's range, and moves on.
    fn advance(
        &self,
        at: &mut Cursor,
        bytes: usize,
        mut copy: impl FnMut(Gpa, core::ops::Range<usize>) -> Result<(), NotRam>,
    ) -> Result<(), QueueError> {
        let mut done = 0;
        while done < bytes {
            let buffer = match self.buffers.get(at.buffer) {
                Some(buffer) if at.buffer < at.end => buffer,
                _ => return Err(QueueError::BadRequest),
            };
            let left = (buffer.bytes - at.offset) as usize;
            let piece = left.min(bytes - done);
            if piece > 0 {
                let start = buffer.start.checked_add(u64::from(at.offset));
                let start = start.ok_or(NotRam {
                    gpa: buffer.start,
                    bytes: u64::from(buffer.bytes),
                })?;
                copy(start, done..done + piece)?;
            }
            done += piece;
            at.offset += piece as u32;
            if at.offset == buffer.bytes {
                at.buffer += 1;
                at.offset = 0;
            }
        }
        Ok(())
    }

    /// Copies the next bytes out of the chain.
    ///
    /// # Errors
    /// There are fewer, or they are not in RAM.
    pub fn read(
        &self,
        at: &mut Cursor,
        memory: &GuestMemory,
        to: &mut [u8],
    ) -> Result<(), QueueError> {
        self.advance(at, to.len(), |gpa, range| memory.read(gpa, &mut to[range]))
    }

    /// Copies the next bytes into the chain.
    ///
    /// # Errors
    /// There is less room, or it is not in RAM.
    pub fn write(
        &self,
        at: &mut Cursor,
        memory: &GuestMemory,
        from: &[u8],
    ) -> Result<(), QueueError> {
        self.advance(at, from.len(), |gpa, range| memory.write(gpa, &from[range]))
    }

    /// Moves on without touching memory.
    ///
    /// # Errors
    /// There are fewer bytes.
    pub fn skip(&self, at: &mut Cursor, mut bytes: u64) -> Result<(), QueueError> {
        while bytes > 0 {
            let step = bytes.min(1 << 30) as usize;
            self.advance(at, step, |_, _| Ok(()))?;
            bytes -= step as u64;
        }
        Ok(())
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.buffers.clear();
        self.readable = 0;
        self.readable_bytes = 0;
        self.writable_bytes = 0;
    }

    fn add(&mut self, d: Descriptor) -> Result<(), QueueError> {
        let bytes = u64::from(d.bytes);
        if d.flags.contains(DescriptorFlags::WRITE) {
            self.writable_bytes += bytes;
        } else if self.readable < self.buffers.len() {
            return Err(QueueError::WrongOrder);
        } else {
            self.readable += 1;
            self.readable_bytes += bytes;
        }
        // At most 32 Ki buffers of 4 GiB: no overflow.
        if self.readable_bytes + self.writable_bytes > MAX_CHAIN_BYTES {
            return Err(QueueError::TooLarge);
        }
        self.buffers.push(Buffer {
            start: d.start,
            bytes: d.bytes,
        });
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Descriptor {
    start: Gpa,
    bytes: u32,
    flags: DescriptorFlags,
    next: u16,
}

/// Reads entry `index` of a table of `size` descriptors.
fn descriptor(
    memory: &GuestMemory,
    table: Gpa,
    size: u16,
    index: u16,
) -> Result<Descriptor, QueueError> {
    if index >= size {
        return Err(QueueError::NoSuchDescriptor { index });
    }
    let mut raw = [0; DESCRIPTOR_LEN as usize];
    memory.read(offset(table, u64::from(index) * DESCRIPTOR_LEN)?, &mut raw)?;
    let [
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        l0,
        l1,
        l2,
        l3,
        f0,
        f1,
        n0,
        n1,
    ] = raw;
    Ok(Descriptor {
        start: Gpa(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
        bytes: u32::from_le_bytes([l0, l1, l2, l3]),
        flags: DescriptorFlags::from_bits_retain(u16::from_le_bytes([f0, f1])),
        next: u16::from_le_bytes([n0, n1]),
    })
}

fn offset(base: Gpa, bytes: u64) -> Result<Gpa, NotRam> {
    base.checked_add(bytes).ok_or(NotRam { gpa: base, bytes })
}

/// A virtqueue in use.
#[derive(Debug)]
pub struct Queue {
    layout: QueueLayout,
    features: RingFeatures,
    /// Index of the next chain to take, and to give back; both count on past the size.
    next_available: u16,
    next_used: u16,
    /// `next_used` when it was last decided whether to interrupt.
    decided: u16,
}

impl Queue {
    /// The queue that a driver has set up, with nothing taken from it yet.
    ///
    /// # Errors
    /// [`QueueError::BadLayout`].
    pub fn new(layout: QueueLayout, features: RingFeatures) -> Result<Self, QueueError> {
        let fine = layout.size.is_power_of_two()
            && layout.descriptors.is_aligned(DESCRIPTOR_LEN)
            && layout.available.is_aligned(2)
            && layout.used.is_aligned(4);
        if !fine {
            return Err(QueueError::BadLayout);
        }
        Ok(Queue {
            layout,
            features,
            next_available: 0,
            next_used: 0,
            decided: 0,
        })
    }

    fn entry(ring: Gpa, index: u16, len: u64) -> Result<Gpa, NotRam> {
        offset(ring, RING_HEADER + u64::from(index) * len)
    }

    fn slot(&self, index: u16) -> u16 {
        index & (self.layout.size - 1)
    }

    /// Chains that the driver has offered and that were not taken yet.
    fn waiting(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let to = memory.read_u16(offset(self.layout.available, 2)?)?;
        let from = self.next_available;
        let count = to.wrapping_sub(from);
        if count > self.layout.size {
            return Err(QueueError::IndexJump { from, to });
        }
        // The entries are read after the index that covers them.
        fence(Ordering::Acquire);
        Ok(count)
    }

    /// Takes the next chain, into `chain`. `false`: there is none.
    ///
    /// # Errors
    /// The driver broke a rule; the queue is dead.
    pub fn take(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.waiting(memory)? == 0 {
            return Ok(false);
        }
        let slot = self.slot(self.next_available);
        let head = memory.read_u16(Self::entry(self.layout.available, slot, AVAILABLE_LEN)?)?;
        chain.clear(head);
        self.follow(memory, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    fn follow(&self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), QueueError> {
        let (mut table, mut size, mut index) =
            (self.layout.descriptors, self.layout.size, chain.head);
        let mut indirect = false;
        for _ in 0..self.layout.size {
            let mut d = descriptor(memory, table, size, index)?;
            if d.flags.contains(DescriptorFlags::INDIRECT) {
                // Section 2.7.5.3.1: not in a table, not with a next one; the write flag means nothing.
                let entries = d.bytes / DESCRIPTOR_LEN as u32;
                let fine = self.features.indirect
                    && !indirect
                    && !d.flags.contains(DescriptorFlags::NEXT)
                    && d.bytes.is_multiple_of(DESCRIPTOR_LEN as u32)
                    && (1..=u32::from(self.layout.size)).contains(&entries);
                if !fine {
                    return Err(QueueError::BadIndirect);
                }
                (table, size, indirect) = (d.start, entries as u16, true);
                d = descriptor(memory, table, size, 0)?;
                if d.flags.contains(DescriptorFlags::INDIRECT) {
                    return Err(QueueError::BadIndirect);
                }
            }
            chain.add(d)?;
            if !d.flags.contains(DescriptorFlags::NEXT) {
                return Ok(());
            }
            index = d.next;
        }
        Err(QueueError::TooLong)
    }

    /// Gives a chain back, with `written` bytes written to its beginning.
    ///
    /// # Errors
    /// The used ring is not in RAM.
    pub fn give_back(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        written: u32,
    ) -> Result<(), QueueError> {
        let slot = self.slot(self.next_used);
        let mut entry = [0; USED_LEN as usize];
        entry[..4].copy_from_slice(&u32::from(chain.head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        memory.write(Self::entry(self.layout.used, slot, USED_LEN)?, &entry)?;
        // The driver sees the entry, and what was written to the chain, before the index.
        fence(Ordering::Release);
        self.next_used = self.next_used.wrapping_add(1);
        memory.write_u16(offset(self.layout.used, 2)?, self.next_used)?;
        Ok(())
    }

    /// Whether the driver is to be interrupted for what was given back since the last call.
    ///
    /// # Errors
    /// The available ring is not in RAM.
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let before = core::mem::replace(&mut self.decided, self.next_used);
        let given = self.next_used.wrapping_sub(before);
        if given == 0 {
            return Ok(false);
        }
        // The driver looks at the used index after it has written its wish, and the device the other way round: one
        // of the two sees the other's.
        fence(Ordering::SeqCst);
        if self.features.event_index {
            let at = Self::entry(self.layout.available, self.layout.size, AVAILABLE_LEN)?;
            let event = memory.read_u16(at)?;
            // Section 2.7.10: entry `event` is among those given back.
            Ok(event.wrapping_sub(before) < given)
        } else {
            Ok(memory.read_u16(self.layout.available)? & NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver to notify when it offers the next chain. `true`: it has offered one meanwhile.
    ///
    /// # Errors
    /// A ring is not in RAM, or the driver broke a rule.
    pub fn await_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if self.features.event_index {
            let at = Self::entry(self.layout.used, self.layout.size, USED_LEN)?;
            memory.write_u16(at, self.next_available)?;
            fence(Ordering::SeqCst);
        }
        // Without event indices the driver always notifies: the flag that says otherwise is never set.
        Ok(self.waiting(memory)? > 0)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
