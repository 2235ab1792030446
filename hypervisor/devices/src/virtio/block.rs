//! virtio-blk: a disk (VIRTIO 1.2, section 5.2).
//!
//! A request is a header of 16 bytes, data, and a status byte; how they are cut into buffers is the driver's
//! choice. Each queue works on one request at a time, in pieces of at most [`PIECE`] bytes through a buffer of
//! its own, and may stop between any two when its budget is spent. A request that cannot be carried out
//! ends with an error status; one without header or status byte breaks the rules of the queue.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::mem::take;
use core::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;
use mem::GuestMemory;
use spin::Mutex;
use storage::{Disk, DiskError, SECTOR};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::queue::{Chain, Cursor, Queue, QueueError};
use super::{DeviceType, Progress, VirtioDevice};
use crate::work::Budget;

/// Entries of a queue. Firmware takes no more.
pub const QUEUE_SIZE: u16 = 128;
/// Most queues.
pub const MAX_QUEUES: u16 = 8;
/// Length of a disk's identity, in bytes (section 5.2.6).
pub const ID_LEN: usize = 20;
/// Most bytes moved at once.
const PIECE: usize = 4096;
/// What a request and each of its buffers cost beside the bytes that are moved, in bytes.
const REQUEST_COST: u64 = 512;
const BUFFER_COST: u64 = 64;
/// Most bytes zeroed or discarded at once, and what part of that they cost.
const SWEEP: u64 = 64 << 10;
const SWEEP_COST: u64 = 16;
/// Most sectors in a request to discard or zero.
const MAX_SWEEP_SECTORS: u32 = 1 << 22;
/// The request's header, and an entry of the data of a request to discard or zero.
const HEADER_LEN: usize = 16;

bitflags! {
    /// Features (section 5.2.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Features: u64 {
        const SEG_MAX = 1 << 2;
        const READ_ONLY = 1 << 5;
        const BLOCK_SIZE = 1 << 6;
        const FLUSH = 1 << 9;
        const TOPOLOGY = 1 << 10;
        const MULTI_QUEUE = 1 << 12;
        const DISCARD = 1 << 13;
        const WRITE_ZEROES = 1 << 14;
    }
}

/// The configuration (section 5.2.4).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    segments_max: U32,
    geometry: U32,
    block_size: U32,
    physical_block_exponent: u8,
    alignment_offset: u8,
    min_io_blocks: U16,
    optimal_io_blocks: U32,
    write_back: u8,
    unused0: u8,
    queues: U16,
    max_discard_sectors: U32,
    max_discard_segments: U32,
    discard_alignment: U32,
    max_zeroes_sectors: U32,
    max_zeroes_segments: U32,
    zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = assert!(size_of::<Config>() == 60);
const _: () = assert!(core::mem::offset_of!(Config, queues) == 34);

/// Status of a request (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<Result<(), DiskError>> for Status {
    fn from(result: Result<(), DiskError>) -> Self {
        match result {
            Ok(()) => Status::Ok,
            Err(_) => Status::IoError,
        }
    }
}

/// What a request asks for (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Identity,
    Discard,
    WriteZeroes,
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Kind::Read),
            1 => Some(Kind::Write),
            4 => Some(Kind::Flush),
            8 => Some(Kind::Identity),
            11 => Some(Kind::Discard),
            13 => Some(Kind::WriteZeroes),
            _ => None,
        }
    }
}

/// A request to discard or zero: sector, sectors, flags.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Sweep {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// The one flag of a [`Sweep`]: zeroed sectors may be unmapped.
const SWEEP_UNMAP: u32 = 1;

/// A request that is being worked on.
struct Request {
    chain: Chain,
    kind: Kind,
    reader: Cursor,
    writer: Cursor,
    /// Next byte of the disk.
    offset: u64,
    /// Bytes of the disk left to do.
    left: u64,
    /// Bytes written to the chain so far.
    written: u32,
    /// Cursor to the status byte, the last of the chain.
    status_at: Cursor,
}

/// What one queue has at hand.
struct Worker {
    request: Option<Request>,
    /// For the next request, to keep its memory.
    spare: Chain,
    piece: Box<[u8]>,
}

/// A disk as a virtio device.
pub struct Block {
    name: String,
    disk: Arc<dyn Disk>,
    identity: [u8; ID_LEN],
    sizes: Vec<u16>,
    /// A queue's, by its number.
    workers: Box<[Mutex<Worker>]>,
    agreed: AtomicU64,
}

impl Block {
    /// A device with `queues` queues, 1 to [`MAX_QUEUES`]. `name` is for messages; `identity` is what the guest is told
    /// when it asks for the disk's serial number, cut to [`ID_LEN`] bytes.
    pub fn new(name: String, disk: Arc<dyn Disk>, identity: &str, queues: u16) -> Self {
        let queues = usize::from(queues.clamp(1, MAX_QUEUES));
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(identity.bytes()) {
            *to = from;
        }
        let worker = || {
            Mutex::new(Worker {
                request: None,
                spare: Chain::default(),
                piece: vec![0; PIECE].into(),
            })
        };
        Block {
            name,
            disk,
            identity: id,
            sizes: vec![QUEUE_SIZE; queues],
            workers: core::iter::repeat_with(worker).take(queues).collect(),
            agreed: AtomicU64::new(0),
        }
    }

    fn agreed(&self) -> Features {
        Features::from_bits_retain(self.agreed.load(Ordering::Relaxed))
    }

    /// Begins the request in `worker.spare`. `None`: it has an error status already, and was given back.
    fn begin(
        &self,
        worker: &mut Worker,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Option<Request>, QueueError> {
        let chain = take(&mut worker.spare);
        let mut reader = chain.reader();
        let mut header = [0; HEADER_LEN];
        chain.read(&mut reader, memory, &mut header)?;
        let data_out = chain.readable() - HEADER_LEN as u64;
        let data_in = chain.writable().checked_sub(1);
        let data_in = data_in.ok_or(QueueError::BadRequest)?;
        let mut status_at = chain.writer();
        chain.skip(&mut status_at, data_in)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = Kind::from_number(u32::from_le_bytes([k0, k1, k2, k3]));
        let mut request = Request {
            kind: kind.unwrap_or(Kind::Flush),
            reader,
            writer: chain.writer(),
            chain,
            offset: u64::from_le_bytes(sector).saturating_mul(SECTOR),
            left: 0,
            written: 0,
            status_at,
        };
        let fine = match kind {
            None => Err(Status::Unsupported),
            Some(Kind::Read) => self.begin_transfer(&mut request, data_in, data_out == 0),
            Some(Kind::Write) => self.begin_transfer(&mut request, data_out, data_in == 0),
            Some(Kind::Flush) => Ok(()),
            Some(Kind::Identity) => {
                let room = usize::try_from(data_in).map_or(ID_LEN, |room| room.min(ID_LEN));
                let id = &self.identity[..room];
                let (chain, at) = (&request.chain, &mut request.writer);
                chain.write(at, memory, id)?;
                request.written = room as u32;
                Ok(())
            }
            Some(Kind::Discard) => {
                self.begin_sweep(&mut request, memory, data_out, Features::DISCARD)?
            }
            Some(Kind::WriteZeroes) => {
                self.begin_sweep(&mut request, memory, data_out, Features::WRITE_ZEROES)?
            }
        };
        match fine {
            Ok(()) => Ok(Some(request)),
            Err(status) => {
                Self::finish(worker, queue, memory, request, status)?;
                Ok(None)
            }
        }
    }

    fn begin_transfer(
        &self,
        request: &mut Request,
        bytes: u64,
        one_way: bool,
    ) -> Result<(), Status> {
        let end = request.offset.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= self.disk.sectors().saturating_mul(SECTOR));
        // Refused as a whole, before a byte moves.
        let refused = request.kind == Kind::Write && self.disk.read_only();
        if !inside || refused || !one_way || !bytes.is_multiple_of(SECTOR) {
            return Err(Status::IoError);
        }
        request.left = bytes;
        Ok(())
    }

    /// The inner result is the request's status.
    fn begin_sweep(
        &self,
        request: &mut Request,
        memory: &GuestMemory,
        data_out: u64,
        feature: Features,
    ) -> Result<Result<(), Status>, QueueError> {
        if !self.agreed().contains(feature) {
            return Ok(Err(Status::Unsupported));
        }
        // As many segments as the configuration allows: one.
        if data_out != size_of::<Sweep>() as u64 {
            return Ok(Err(Status::IoError));
        }
        let mut raw = [0; size_of::<Sweep>()];
        request.chain.read(&mut request.reader, memory, &mut raw)?;
        let sweep: Sweep = zerocopy::transmute!(raw);
        let known = match request.kind {
            Kind::WriteZeroes => SWEEP_UNMAP,
            _ => 0,
        };
        if sweep.flags.get() & !known != 0 {
            return Ok(Err(Status::Unsupported));
        }
        request.offset = sweep.sector.get().saturating_mul(SECTOR);
        let bytes = u64::from(sweep.sectors.get()) * SECTOR;
        let end = request.offset.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= self.disk.sectors().saturating_mul(SECTOR));
        if !inside || self.disk.read_only() || sweep.sectors.get() > MAX_SWEEP_SECTORS {
            return Ok(Err(Status::IoError));
        }
        request.left = bytes;
        Ok(Ok(()))
    }

    /// Does a piece of a request that has some left.
    fn step(
        &self,
        request: &mut Request,
        piece: &mut [u8],
        memory: &GuestMemory,
        budget: &mut Budget,
    ) -> Result<Result<(), DiskError>, QueueError> {
        let transfer = request.left.min(piece.len() as u64);
        let (chain, offset) = (&request.chain, request.offset);
        let (done, result) = match request.kind {
            Kind::Read => {
                let piece = &mut piece[..transfer as usize];
                let result = self.disk.read(offset, piece);
                if result.is_ok() {
                    chain.write(&mut request.writer, memory, piece)?;
                    request.written = request.written.saturating_add(piece.len() as u32);
                }
                (transfer, result)
            }
            Kind::Write => {
                let piece = &mut piece[..transfer as usize];
                chain.read(&mut request.reader, memory, piece)?;
                (transfer, self.disk.write(offset, piece))
            }
            Kind::Discard | Kind::WriteZeroes => {
                let bytes = request.left.min(SWEEP);
                let result = match request.kind {
                    Kind::Discard => self.disk.discard(offset, bytes),
                    _ => self.disk.write_zeroes(offset, bytes),
                };
                budget.spend(bytes / SWEEP_COST);
                (bytes, result)
            }
            // These move no bytes of the disk.
            Kind::Flush | Kind::Identity => (request.left, Ok(())),
        };
        if matches!(request.kind, Kind::Read | Kind::Write) {
            budget.spend(done);
        }
        request.offset += done;
        request.left -= done;
        Ok(result)
    }

    /// Writes the status and gives the request back.
    fn finish(
        worker: &mut Worker,
        queue: &mut Queue,
        memory: &GuestMemory,
        mut request: Request,
        status: Status,
    ) -> Result<(), QueueError> {
        let chain = &request.chain;
        chain.write(&mut request.status_at, memory, &[status as u8])?;
        // "Written" counts from the first byte without a gap, so the status only after all of the data.
        let whole = u64::from(request.written) + 1 == chain.writable();
        let written = request.written.saturating_add(u32::from(whole));
        queue.give_back(memory, chain, written)?;
        worker.spare = request.chain;
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let mut features = Features::SEG_MAX
            | Features::BLOCK_SIZE
            | Features::FLUSH
            | Features::TOPOLOGY
            | Features::DISCARD
            | Features::WRITE_ZEROES;
        features.set(Features::MULTI_QUEUE, self.sizes.len() > 1);
        if self.disk.read_only() {
            features |= Features::READ_ONLY;
            features -= Features::DISCARD | Features::WRITE_ZEROES;
        }
        features.bits()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        let config = Config {
            capacity: U64::new(self.disk.sectors()),
            // Header and status take a descriptor each.
            segments_max: U32::new(u32::from(QUEUE_SIZE) - 2),
            block_size: U32::new(SECTOR as u32),
            // Blocks of 4 KiB inside.
            physical_block_exponent: 3,
            min_io_blocks: U16::new(8),
            optimal_io_blocks: U32::ZERO,
            queues: U16::new(self.sizes.len() as u16),
            max_discard_sectors: U32::new(MAX_SWEEP_SECTORS),
            max_discard_segments: U32::new(1),
            discard_alignment: U32::new(8),
            max_zeroes_sectors: U32::new(MAX_SWEEP_SECTORS),
            max_zeroes_segments: U32::new(1),
            zeroes_may_unmap: 1,
            ..Config::default()
        };
        let there = config.as_bytes().get(offset..).unwrap_or_default();
        let len = there.len().min(to.len());
        to[..len].copy_from_slice(&there[..len]);
        to[len..].fill(0);
    }

    fn write_config(&self, _offset: usize, _from: &[u8]) {
        // Nothing in it is the driver's: the switch of the write cache is not offered.
    }

    fn start(&self, features: u64) {
        self.agreed.store(features, Ordering::Relaxed);
    }

    fn reset(&self) {
        for worker in &self.workers {
            worker.lock().request = None;
        }
    }

    fn run(
        &self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
        budget: &mut Budget,
    ) -> Result<Progress, QueueError> {
        let Some(worker) = self.workers.get(index) else {
            return Ok(Progress::Idle);
        };
        let worker = &mut *worker.lock();
        loop {
            if budget.is_spent() {
                return Ok(Progress::More);
            }
            let request = match worker.request.take() {
                Some(request) => Some(request),
                None if queue.take(memory, &mut worker.spare)? => {
                    let buffers = worker.spare.buffers() as u64;
                    budget.spend(REQUEST_COST + buffers * BUFFER_COST);
                    self.begin(worker, queue, memory)?
                }
                None if queue.await_notification(memory)? => {
                    // Costs too, or a driver that moves its index to and fro would keep this going.
                    budget.spend(REQUEST_COST);
                    continue;
                }
                None => return Ok(Progress::Idle),
            };
            let Some(mut request) = request else { continue };
            let mut result = Ok(());
            while request.left > 0 && result.is_ok() && !budget.is_spent() {
                result = self.step(&mut request, &mut worker.piece, memory, budget)?;
            }
            if request.left > 0 && result.is_ok() {
                worker.request = Some(request);
                return Ok(Progress::More);
            }
            if request.kind == Kind::Flush {
                result = self.disk.flush();
            }
            Self::finish(worker, queue, memory, request, result.into())?;
        }
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
