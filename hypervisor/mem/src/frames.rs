//! The machine's frames: who owns each, and the window through which the host touches them.
//!
//! [`Frames`] implements [`HostMemory`] on real hardware. It takes the boot loader's list of
//! usable regions, keeps its own bookkeeping in the first that is big enough, and hands out zeroed
//! runs. Physical memory is mapped at a fixed virtual offset, the window. Memory below
//! 1 MiB is kept out, but for what [`Frames::take_low`] is asked for (the APs start there).
//!
//! Unsafe: this module turns physical addresses into pointers and uses them. The argument:
//! `init`'s caller promises that the window maps every region it names and that nobody else
//! uses them; every access is checked to lie within one region; the bookkeeping is not in
//! any region that accesses are checked against, so no access can reach it.
//! Guests change their RAM while the host copies it: no reference into a frame is ever made,
//! and a naturally aligned access of up to 8 bytes is one atomic access.
//!
//! Locking: one spin lock, held for the bookkeeping only, not while zeroing. It is not to
//! be taken from an interrupt handler that may interrupt its holder.
#![expect(
    unsafe_code,
    reason = "the one module of this crate that touches physical memory"
)]

use core::fmt;
use core::ops::Range;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use spin::{Mutex, Once};

use crate::addr::PAGE_SIZE;
use crate::buddy::{Buddy, Frame, Run, Runs};
use crate::{HostMemory, Hpa, MemoryRegion, OutOfFrames, Owner};

/// Frames below 1 MiB.
const LOW_FRAMES: u64 = (1 << 20) / PAGE_SIZE;

/// How much is zeroed in one piece.
pub const PIECE_BYTES: usize = 64 * 1024;

/// Why the frame allocator could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitError {
    /// `init` was called before.
    Twice,
    /// No usable region has room for the bookkeeping.
    NoRoom {
        /// Bytes that it needs.
        bytes: u64,
    },
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InitError::Twice => write!(f, "the frame allocator is set up already"),
            InitError::NoRoom { bytes } => write!(
                f,
                "no usable memory region above 1 MiB has room for {bytes} bytes of bookkeeping"
            ),
        }
    }
}

/// Counts of frames, 4 KiB each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames that can be handed out, taken or not.
    pub total: u64,
    /// Of these, free.
    pub free: u64,
    /// Frames in the largest free block.
    pub largest: u64,
    /// Frames that the bookkeeping takes, not in `total`.
    pub bookkeeping: u64,
    /// Usable frames given up, since the firmware's map has too many pieces; not in `total`.
    pub lost: u64,
}

/// Who has how many frames at one moment ([`Frames::counts`]).
pub struct Counts<'p> {
    /// Nothing before [`Frames::init`].
    buddy: Option<&'p Buddy<'static>>,
}

impl Counts<'_> {
    /// Frames that nobody has, 4 KiB each.
    pub fn free(&self) -> u64 {
        self.buddy.map_or(0, Buddy::free_frames)
    }

    /// Frames that `owner` has, 4 KiB each.
    pub fn used(&self, owner: Owner) -> u64 {
        self.buddy.map_or(0, |buddy| buddy.used(owner))
    }
}

/// Where physical address 0 is mapped. The memory behind it is shared by all pCPUs.
struct Window(*mut u8);

// SAFETY: the pointer is only an address; what is behind it is reached by the checked
// accesses below, which suit memory that others change at the same time.
unsafe impl Send for Window {}
// SAFETY: as for Send.
unsafe impl Sync for Window {}

/// What every access needs; never changes after `init`.
struct Access {
    window: Window,
    /// All usable memory from 1 MiB up but the bookkeeping.
    runs: Runs,
    /// First byte and length of the largest of `runs`: where nearly every access goes.
    main: (u64, u64),
    /// Usable frames below 1 MiB.
    low: [bool; LOW_FRAMES as usize],
}

impl Access {
    /// Whether all of these bytes are usable RAM.
    fn contains_bytes(&self, hpa: Hpa, bytes: usize) -> bool {
        let first = hpa.0 / PAGE_SIZE;
        hpa.0.checked_add(bytes.max(1) as u64).is_some_and(|end| {
            let count = end.div_ceil(PAGE_SIZE) - first;
            self.contains(Run { first, count })
        })
    }

    /// Whether all of `run` is usable RAM.
    fn contains(&self, run: Run) -> bool {
        if run.first < LOW_FRAMES {
            self.low
                .get(run.first as usize..run.end() as usize)
                .is_some_and(|frames| frames.iter().all(|usable| *usable))
        } else {
            self.runs.position(run).is_some()
        }
    }
}

/// What allocation needs.
struct Pool {
    buddy: Buddy<'static>,
    /// Frames below 1 MiB that are usable and not taken.
    low_free: [bool; LOW_FRAMES as usize],
    bookkeeping: u64,
    lost: u64,
}

/// The machine's frames. A static; `init` once, before anything else.
pub struct Frames {
    access: Once<Access>,
    pool: Mutex<Option<Pool>>,
    /// Called between pieces of long work.
    long_work: Once<fn()>,
}

impl Default for Frames {
    fn default() -> Self {
        Self::new()
    }
}

impl Frames {
    /// No frames yet.
    pub const fn new() -> Self {
        Self {
            access: Once::new(),
            pool: Mutex::new(None),
            long_work: Once::new(),
        }
    }

    /// From now on `breathe` is called between pieces of [`PIECE_BYTES`] of zeroing memory for guests.
    pub fn on_long_work(&self, breathe: fn()) {
        self.long_work.call_once(|| breathe);
    }

    /// Takes over the usable `regions` (in any order, overlaps and odd bounds are fine).
    ///
    /// # Errors
    /// Called twice, or no region has room for the bookkeeping (12 bytes per frame).
    ///
    /// # Safety
    /// For every physical address p in a region, `window.add(p)` is mapped, writable and write-back
    /// cached for ever, at a multiple of 4096; and nobody but this object uses this memory from now on.
    pub unsafe fn init(
        &self,
        regions: impl IntoIterator<Item = MemoryRegion>,
        window: *mut u8,
    ) -> Result<(), InitError> {
        let mut pool = self.pool.lock();
        if pool.is_some() {
            return Err(InitError::Twice);
        }
        let mut runs = Runs::new();
        let mut low_free = [false; LOW_FRAMES as usize];
        for region in regions {
            let run = Run::of(region);
            // Frame 0 holds the BIOS data area, whatever the map says.
            let low = run.first.clamp(1, LOW_FRAMES)..run.end().clamp(1, LOW_FRAMES);
            low_free[low.start as usize..low.end as usize].fill(true);
            let first = run.first.max(LOW_FRAMES);
            runs.insert(Run {
                first,
                count: run.end().saturating_sub(first),
            });
        }
        let frames = runs.frames();
        let bytes = frames * size_of::<Frame>() as u64;
        let home = runs
            .take_front(bytes.div_ceil(PAGE_SIZE))
            .ok_or(InitError::NoRoom { bytes })?;
        let table = window
            .wrapping_add((home.first * PAGE_SIZE) as usize)
            .cast::<Frame>();
        for i in 0..frames as usize {
            // SAFETY: the caller vouches for `home`, part of a region; it has room for
            // `frames` entries, and page alignment suits `Frame`.
            unsafe { table.add(i).write(Frame::NEW) };
        }
        // SAFETY: all entries were written just now. `home` is in none of the runs from
        // here on, so this slice is the only way to it, for ever.
        let table = unsafe { slice::from_raw_parts_mut(table, frames as usize) };

        self.access.call_once(|| Access {
            window: Window(window),
            main: runs
                .as_slice()
                .iter()
                .max_by_key(|run| run.count)
                .map_or((0, 0), |run| (run.first * PAGE_SIZE, run.count * PAGE_SIZE)),
            runs: runs.clone(),
            low: low_free,
        });
        *pool = Some(Pool {
            lost: runs.lost,
            bookkeeping: home.count,
            buddy: Buddy::new(runs, table),
            low_free,
        });
        Ok(())
    }

    /// Takes `frames` contiguous zeroed frames below 1 MiB within `range`, for ever: real-mode code for
    /// the APs. Frame 0 is never among them.
    ///
    /// # Errors
    /// No such run is usable and free.
    pub fn take_low(&self, range: Range<Hpa>, frames: u64) -> Result<Hpa, OutOfFrames> {
        let count = frames as usize;
        let first = {
            let mut pool = self.pool.lock();
            let pool = pool.as_mut().ok_or(OutOfFrames { frames })?;
            let from = range.start.0.div_ceil(PAGE_SIZE).min(LOW_FRAMES) as usize;
            let to = (range.end.0 / PAGE_SIZE).min(LOW_FRAMES) as usize;
            let candidates = pool.low_free.get(from..to).unwrap_or_default();
            let at = candidates
                .windows(count.max(1))
                .position(|run| run.iter().all(|free| *free))
                .ok_or(OutOfFrames { frames })?;
            pool.low_free[from + at..from + at + count].fill(false);
            from + at
        };
        let base = Hpa(first as u64 * PAGE_SIZE);
        self.zero(base, frames, || {});
        Ok(base)
    }

    /// Frames that `owner` has, 4 KiB each.
    pub fn used(&self, owner: Owner) -> u64 {
        self.pool
            .lock()
            .as_ref()
            .map_or(0, |pool| pool.buddy.used(owner))
    }

    /// Looks at free frames and at what owners have as they are at one moment: what is taken or given back meanwhile by
    /// others shows on both sides, or on neither. `look` must not take memory.
    pub fn counts<R>(&self, look: impl FnOnce(Counts<'_>) -> R) -> R {
        let pool = self.pool.lock();
        look(Counts {
            buddy: pool.as_ref().map(|pool| &pool.buddy),
        })
    }

    /// The totals.
    pub fn statistics(&self) -> Statistics {
        self.pool
            .lock()
            .as_ref()
            .map_or(Statistics::default(), |pool| Statistics {
                total: pool.buddy.total_frames(),
                free: pool.buddy.free_frames(),
                largest: pool.buddy.largest_block(),
                bookkeeping: pool.bookkeeping,
                lost: pool.lost,
            })
    }

    /// A pointer to `bytes` bytes of RAM, all in one region.
    ///
    /// # Panics
    /// When they are not: the caller made up an address.
    fn checked(&self, hpa: Hpa, bytes: usize) -> *mut u8 {
        if let Some(access) = self.access.get() {
            let (start, length) = access.main;
            let offset = hpa.0.wrapping_sub(start);
            let in_main = offset < length && bytes as u64 <= length - offset;
            if in_main || access.contains_bytes(hpa, bytes) {
                return access.window.0.wrapping_add(hpa.0 as usize);
            }
        }
        panic!("{bytes} bytes at {hpa:?} are not usable RAM")
    }

    /// Zeroes frames that the caller has just taken. `between` is called between pieces.
    fn zero(&self, base: Hpa, frames: u64, between: impl Fn()) {
        let bytes = (frames * PAGE_SIZE) as usize;
        let start = self.checked(base, bytes);
        for offset in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - offset);
            // SAFETY: `checked` saw that the bytes are RAM behind the window, and this piece is among them; the
            // caller just took them, so nobody else uses them.
            unsafe { ptr::write_bytes(start.add(offset), 0, piece) };
            if offset + piece < bytes {
                between();
            }
        }
    }
}

/// Bytes of one region, checked once, for reads that are too frequent to be checked anew each time.
///
/// Invariant: `bytes` bytes from `start` on are RAM behind the window for ever. Whose they are is the
/// business of whoever has the view, as with every access by address.
#[derive(Clone, Copy)]
pub struct FrameView {
    start: *const u8,
    bytes: u64,
}

// SAFETY: the view is an address that is valid on every processor; all reads through it are atomic or
// copies of which any mix of old and new bytes is a valid result.
unsafe impl Send for FrameView {}
// SAFETY: as above.
unsafe impl Sync for FrameView {}

impl FrameView {
    /// Reads the aligned 64-bit word at `offset` in one access; `None` if it is not aligned or not inside.
    #[inline]
    pub fn read_u64(&self, offset: u64) -> Option<u64> {
        if !offset.is_multiple_of(8) || offset >= self.bytes || self.bytes - offset < 8 {
            return None;
        }
        let word = self.start.wrapping_add(offset as usize).cast_mut();
        // SAFETY: the word lies within the view's bytes, which are RAM behind the window, and is
        // aligned, since views begin with a frame.
        Some(unsafe { AtomicU64::from_ptr(word.cast()) }.load(Ordering::Relaxed))
    }

    /// Copies the 16 bytes at `offset` out; `None` if they are not all inside.
    #[inline]
    pub fn read_16(&self, offset: u64) -> Option<[u8; 16]> {
        if offset >= self.bytes || self.bytes - offset < 16 {
            return None;
        }
        let start = self.start.wrapping_add(offset as usize);
        // SAFETY: the bytes lie within the view's, which are RAM behind the window. A guest may change
        // them meanwhile; any mix of old and new bytes is a valid result, as in `HostMemory::read`.
        Some(unsafe { start.cast::<[u8; 16]>().read_volatile() })
    }
}

impl fmt::Debug for FrameView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} bytes at {:p}", self.bytes, self.start)
    }
}

impl HostMemory for Frames {
    fn allocate(&self, frames: u64, align: u64, owner: Owner) -> Result<Hpa, OutOfFrames> {
        assert!(align.is_power_of_two(), "alignment {align:#x}");
        let align = (align / PAGE_SIZE).max(1);
        let first = self
            .pool
            .lock()
            .as_mut()
            .and_then(|pool| pool.buddy.allocate(frames, align, owner))
            .ok_or(OutOfFrames { frames })?;
        let base = Hpa(first * PAGE_SIZE);
        self.zero(base, frames, || {
            // Others may be zeroed under a lock of the caller's.
            if matches!(owner, Owner::VmRam(_)) {
                self.breathe();
            }
        });
        Ok(base)
    }

    fn breathe(&self) {
        if let Some(breathe) = self.long_work.get() {
            breathe();
        }
    }

    fn free(&self, base: Hpa, frames: u64, owner: Owner) {
        let run = Run {
            first: base.0 / PAGE_SIZE,
            count: frames,
        };
        let freed = base.is_aligned(PAGE_SIZE)
            && base
                .0
                .checked_add(frames.saturating_mul(PAGE_SIZE))
                .is_some()
            && self
                .pool
                .lock()
                .as_mut()
                .is_some_and(|pool| pool.buddy.free(run, owner));
        assert!(
            freed,
            "{frames} frames at {base:?} are not all owned by {owner:?}"
        );
    }

    fn pointer(&self, hpa: Hpa) -> *mut u8 {
        self.checked(hpa, 1)
    }

    fn read(&self, from: Hpa, to: &mut [u8]) {
        let start = self.checked(from, to.len());
        match *to {
            [ref mut byte] => {
                // SAFETY: `checked` saw that the byte is RAM behind the window.
                *byte = unsafe { AtomicU8::from_ptr(start) }.load(Ordering::Relaxed);
            }
            [_, _] if from.is_aligned(2) => {
                // SAFETY: as above; the window is page-aligned, so the address is aligned.
                let word = unsafe { AtomicU16::from_ptr(start.cast()) }.load(Ordering::Relaxed);
                to.copy_from_slice(&word.to_le_bytes());
            }
            [_, _, _, _] if from.is_aligned(4) => {
                // SAFETY: as above.
                let word = unsafe { AtomicU32::from_ptr(start.cast()) }.load(Ordering::Relaxed);
                to.copy_from_slice(&word.to_le_bytes());
            }
            [_, _, _, _, _, _, _, _] if from.is_aligned(8) => {
                to.copy_from_slice(&self.read_u64(from).to_le_bytes());
            }
            _ => {
                // SAFETY: `checked` saw that all bytes are RAM behind the window; `to` is a Rust
                // object, so no frame that can be accessed lies in it. A guest may change the bytes
                // meanwhile; any mix of old and new bytes is a valid result.
                unsafe { ptr::copy_nonoverlapping(start, to.as_mut_ptr(), to.len()) }
            }
        }
    }

    fn write(&self, to: Hpa, from: &[u8]) {
        let start = self.checked(to, from.len());
        match *from {
            [byte] => {
                // SAFETY: `checked` saw that the byte is RAM behind the window.
                unsafe { AtomicU8::from_ptr(start) }.store(byte, Ordering::Relaxed);
            }
            [a, b] if to.is_aligned(2) => {
                // SAFETY: as above; the window is page-aligned, so the address is aligned.
                unsafe { AtomicU16::from_ptr(start.cast()) }
                    .store(u16::from_le_bytes([a, b]), Ordering::Relaxed);
            }
            [a, b, c, d] if to.is_aligned(4) => {
                // SAFETY: as above.
                unsafe { AtomicU32::from_ptr(start.cast()) }
                    .store(u32::from_le_bytes([a, b, c, d]), Ordering::Relaxed);
            }
            [a, b, c, d, e, f, g, h] if to.is_aligned(8) => {
                self.write_u64(to, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => {
                // SAFETY: `checked` saw that all bytes are RAM behind the window; `from` is a Rust
                // object, so no frame that can be accessed lies in it.
                unsafe { ptr::copy_nonoverlapping(from.as_ptr(), start, from.len()) }
            }
        }
    }

    fn read_u64(&self, from: Hpa) -> u64 {
        assert!(from.is_aligned(8), "{from:?} is not aligned");
        let start = self.checked(from, 8);
        // SAFETY: `checked` saw that the word is RAM behind the window, and it is aligned.
        unsafe { AtomicU64::from_ptr(start.cast()) }.load(Ordering::Relaxed)
    }

    fn view(&self, base: Hpa, bytes: u64) -> Option<FrameView> {
        assert!(base.is_aligned(PAGE_SIZE), "{base:?} is not aligned");
        let start = self.checked(base, usize::try_from(bytes).ok()?);
        Some(FrameView { start, bytes })
    }

    fn write_u64(&self, to: Hpa, value: u64) {
        assert!(to.is_aligned(8), "{to:?} is not aligned");
        let start = self.checked(to, 8);
        // SAFETY: `checked` saw that the word is RAM behind the window, and it is aligned.
        // Release: what an entry points to is visible before the entry.
        unsafe { AtomicU64::from_ptr(start.cast()) }.store(value, Ordering::Release);
    }

    fn replace_u8(&self, at: Hpa, old: u8, new: u8) -> bool {
        let start = self.checked(at, 1);
        // SAFETY: `checked` saw that the byte is RAM behind the window.
        unsafe { AtomicU8::from_ptr(start) }
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::alloc::{Layout, alloc};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    const MIB: u64 = 1 << 20;

    fn region(start: u64, bytes: u64) -> MemoryRegion {
        MemoryRegion {
            start: Hpa(start),
            bytes,
        }
    }

    /// A machine with `mib` MiB of address space, filled with junk, and these usable regions.
    fn machine(mib: u64, regions: &[MemoryRegion]) -> &'static Frames {
        let bytes = (mib * MIB) as usize;
        let layout = Layout::from_size_align(bytes, PAGE_SIZE as usize).unwrap();
        // SAFETY: the size is not zero. The memory is never freed.
        let window = unsafe { alloc(layout) };
        // SAFETY: `bytes` bytes were allocated.
        unsafe { ptr::write_bytes(window, 0xa5, bytes) };
        let frames = Box::leak(Box::new(Frames::new()));
        // SAFETY: the tests' regions lie below `bytes`, and nobody else knows the allocation.
        unsafe { frames.init(regions.iter().copied(), window) }.unwrap();
        frames
    }

    fn panics(f: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(f)).is_err()
    }

    #[test]
    fn a_view_reads_what_is_there_and_nothing_beyond() {
        let frames = machine(4, &[region(MIB, 2 * MIB)]);
        let base = frames.allocate(2, PAGE_SIZE, Owner::VmRam(1)).unwrap();
        let bytes = 2 * PAGE_SIZE;
        let view = frames.view(base, bytes).expect("a view");
        frames.write_u64(base + 8, 0x1122_3344_5566_7788);
        frames.write(base + (bytes - 16), &[7; 16]);
        assert_eq!(view.read_u64(8), Some(0x1122_3344_5566_7788));
        assert_eq!(view.read_u64(bytes - 8), Some(0x0707_0707_0707_0707));
        assert_eq!(view.read_16(bytes - 16), Some([7; 16]));
        assert_eq!(view.read_16(9).map(|b| b[0]), Some(0x77));
        for beyond in [bytes - 4, bytes, u64::MAX - 7, u64::MAX] {
            assert_eq!(view.read_u64(beyond), None, "{beyond:#x}");
        }
        for beyond in [bytes - 15, bytes, u64::MAX - 15] {
            assert_eq!(view.read_16(beyond), None, "{beyond:#x}");
        }
        assert_eq!(view.read_u64(4), None);
    }

    #[test]
    fn bookkeeping_comes_out_of_the_first_region_with_room() {
        let frames = machine(16, &[region(8 * MIB, 8 * MIB), region(MIB, 2 * PAGE_SIZE)]);
        let stats = frames.statistics();
        // 2050 frames at 12 bytes take 7 of them, from the region at 8 MiB.
        assert_eq!((stats.bookkeeping, stats.total, stats.lost), (7, 2043, 0));
        assert_eq!(stats.free, stats.total);
        assert!(panics(|| frames.write(Hpa(8 * MIB), &[0])));
        frames.write(Hpa(8 * MIB + 7 * PAGE_SIZE), &[0]);
    }

    #[test]
    fn a_machine_without_room_is_refused_and_a_second_init_too() {
        let frames = Frames::new();
        let none: [MemoryRegion; 0] = [];
        // SAFETY: there is no memory in the list.
        let empty = unsafe { frames.init(none, ptr::null_mut()) };
        assert_eq!(empty, Err(InitError::NoRoom { bytes: 0 }));
        // SAFETY: a single frame has no room for bookkeeping, so none of it is touched.
        let tiny = unsafe { frames.init([region(MIB, PAGE_SIZE)], ptr::null_mut()) };
        assert_eq!(tiny, Err(InitError::NoRoom { bytes: 12 }));
        assert_eq!(
            frames.allocate(1, PAGE_SIZE, Owner::Host),
            Err(OutOfFrames { frames: 1 })
        );

        let frames = machine(2, &[region(MIB, MIB)]);
        // SAFETY: refused before anything is touched.
        let again = unsafe { frames.init(none, ptr::null_mut()) };
        assert_eq!(again, Err(InitError::Twice));
    }

    #[test]
    fn a_guests_memory_is_zeroed_in_pieces() {
        static PIECES: AtomicU32 = AtomicU32::new(0);
        let frames = machine(8, &[region(0, 8 * MIB)]);
        frames.on_long_work(|| {
            PIECES.fetch_add(1, Ordering::Relaxed);
        });
        let pieces = || PIECES.swap(0, Ordering::Relaxed) as usize;
        let bytes = 1 << 20;
        let count = bytes as u64 / PAGE_SIZE;
        frames.allocate(count, PAGE_SIZE, Owner::Host).unwrap();
        assert_eq!(pieces(), 0, "the host's own may be zeroed under a lock");
        frames.allocate(count, PAGE_SIZE, Owner::VmRam(1)).unwrap();
        assert_eq!(pieces(), bytes / PIECE_BYTES - 1);
    }

    #[test]
    fn frames_are_zeroed_and_counted() {
        let frames = machine(8, &[region(0, 8 * MIB)]);
        let vm = Owner::VmRam(7);
        let base = frames.allocate(512, 2 * MIB, vm).unwrap();
        assert!(base.is_aligned(2 * MIB));
        let mut page = [1; 4096];
        for i in 0..512 {
            frames.read(base + i * PAGE_SIZE, &mut page);
            assert_eq!(page, [0; 4096]);
        }
        frames.write(base, &[0xff; 4096]);
        assert_eq!((frames.used(vm), frames.used(Owner::Host)), (512, 0));
        frames.free(base, 512, vm);
        assert_eq!(frames.used(vm), 0);
        let again = frames.allocate(512, 2 * MIB, Owner::Host).unwrap();
        frames.read(again, &mut page);
        assert_eq!((again, page), (base, [0; 4096]));
    }

    #[test]
    fn counts_are_of_one_moment() {
        let frames = machine(8, &[region(MIB, 7 * MIB)]);
        let (vm, total) = (Owner::VmRam(3), frames.statistics().total);
        let over = AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    let base = frames.allocate(1, PAGE_SIZE, vm).unwrap();
                    frames.free(base, 1, vm);
                }
                over.store(1, Ordering::Release);
            });
            while over.load(Ordering::Acquire) == 0 {
                let all = frames.counts(|counts| counts.free() + counts.used(vm));
                assert_eq!(all, total);
            }
        });
    }

    #[test]
    fn frees_under_another_name_panic() {
        let frames = machine(4, &[region(MIB, 3 * MIB)]);
        let base = frames.allocate(2, PAGE_SIZE, Owner::VmTables(1)).unwrap();
        assert!(panics(|| frames.free(base, 2, Owner::VmTables(2))));
        assert!(panics(|| frames.free(base, 3, Owner::VmTables(1))));
        assert!(panics(|| frames.free(base + 1, 1, Owner::VmTables(1))));
        assert!(panics(|| frames.free(Hpa(!4095), 2, Owner::VmTables(1))));
        frames.free(base, 2, Owner::VmTables(1));
        assert!(panics(|| frames.free(base, 2, Owner::VmTables(1))));
    }

    #[test]
    fn low_memory_is_handed_out_on_request_only() {
        let frames = machine(4, &[region(0, 0x9_f000), region(MIB, 3 * MIB)]);
        let mut bases = Vec::new();
        while let Ok(base) = frames.allocate(1, PAGE_SIZE, Owner::Host) {
            assert!(base.0 >= MIB);
            bases.push(base);
        }
        assert_eq!(bases.len() as u64, frames.statistics().total);
        let trampoline = Hpa(0x1000)..Hpa(0xa_0000);
        assert_eq!(frames.take_low(trampoline.clone(), 1), Ok(Hpa(0x1000)));
        assert_eq!(frames.take_low(trampoline.clone(), 2), Ok(Hpa(0x2000)));
        assert_eq!(frames.read_u64(Hpa(0x2000)), 0);
        assert_eq!(
            frames.take_low(trampoline, 0x9f),
            Err(OutOfFrames { frames: 0x9f })
        );
        assert!(frames.take_low(Hpa(0)..Hpa(0x1000), 1).is_err());
        assert!(frames.take_low(Hpa(0x9_f000)..Hpa(u64::MAX), 1).is_err());
    }

    #[test]
    fn odd_low_ranges_are_refused() {
        let frames = machine(4, &[region(0, 4 * MIB)]);
        assert!(frames.take_low(Hpa(0x5000)..Hpa(0x4000), 1).is_err());
        assert!(frames.take_low(Hpa(0x5001)..Hpa(0x6fff), 1).is_err());
    }

    #[test]
    fn accesses_outside_ram_panic() {
        let frames = machine(4, &[region(MIB, MIB), region(3 * MIB, MIB)]);
        frames.write(Hpa(2 * MIB - 4), &[1; 4]);
        assert!(panics(|| frames.write(Hpa(2 * MIB - 4), &[1; 5])));
        assert!(panics(|| frames.read(Hpa(2 * MIB), &mut [0])));
        assert!(panics(|| frames.read(Hpa(u64::MAX), &mut [0; 2])));
        assert!(panics(|| {
            frames.read_u64(Hpa(3 * MIB + 4));
        }));
        assert!(panics(|| {
            frames.pointer(Hpa(0));
        }));
    }

    proptest! {
        /// Accesses of every size and alignment agree with a plain byte array.
        #[test]
        fn accesses_follow_the_model(
            accesses in prop::collection::vec((0..200u64, prop::collection::vec(any::<u8>(), 0..20)), 1..50)
        ) {
            let frames = machine(2, &[region(MIB, MIB)]);
            let base = frames.allocate(1, PAGE_SIZE, Owner::Host).unwrap();
            let mut model = [0u8; 256];
            for (at, bytes) in accesses {
                frames.write(base + at, &bytes);
                model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                for len in [1, 2, 4, 8, bytes.len()] {
                    let mut got = vec![0; len];
                    frames.read(base + at, &mut got);
                    prop_assert_eq!(&got[..], &model[at as usize..at as usize + len]);
                }
                let aligned = at & !7;
                let word: [u8; 8] = model[aligned as usize..aligned as usize + 8].try_into().unwrap();
                prop_assert_eq!(frames.read_u64(base + aligned), u64::from_le_bytes(word));
            }
        }
    }
}
