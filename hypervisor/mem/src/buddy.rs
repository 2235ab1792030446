//! The frame allocator's bookkeeping: a buddy system that knows every frame's owner.
//!
//! Free frames form blocks of 2^n frames at multiples of 2^n, in one list per n. Taking a run
//! splits the smallest block that will do; giving it back joins blocks with their free buddies.
//! Both cost O(log frames), plus one word per frame for the owner.
//!
//! Pure logic over frame numbers: `frames` does the touching of memory.

use crate::addr::PAGE_SIZE;
use crate::host::{MemoryRegion, Owner};

/// Regions kept apart. Firmware maps merge to a few dozen; the smallest ones go when there are more.
const MAX_REGIONS: usize = 128;
/// Largest block: 2^24 frames, 64 GiB.
const MAX_ORDER: u8 = 24;
/// Frame numbers are below this (16 TiB), so that an index fits 32 bits with `NONE` to spare.
const FRAME_LIMIT: u64 = u32::MAX as u64;
/// No frame: end of a list.
const NONE: u32 = u32::MAX;
/// Owners that are counted: the host, and three kinds for each VM.
const OWNERS: usize = 1 + 3 * Owner::MAX_VMS as usize;

/// A run of frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    /// Number of the first frame: its address divided by 4096.
    pub first: u64,
    /// Frames.
    pub count: u64,
}

impl Run {
    /// One past the last frame number.
    pub(crate) const fn end(self) -> u64 {
        self.first + self.count
    }

    /// The whole frames of a region, below [`FRAME_LIMIT`].
    pub(crate) fn of(region: MemoryRegion) -> Self {
        let first = region.start.0.div_ceil(PAGE_SIZE).min(FRAME_LIMIT);
        let end = (region.start.0.saturating_add(region.bytes) / PAGE_SIZE).min(FRAME_LIMIT);
        Run {
            first,
            count: end.saturating_sub(first),
        }
    }
}

/// Sorted runs of frames that neither overlap nor touch.
#[derive(Clone)]
pub(crate) struct Runs {
    runs: [Run; MAX_REGIONS],
    len: usize,
    /// Frames of runs that found no place.
    pub lost: u64,
}

impl Runs {
    pub(crate) const fn new() -> Self {
        Self {
            runs: [Run { first: 0, count: 0 }; MAX_REGIONS],
            len: 0,
            lost: 0,
        }
    }

    pub(crate) fn as_slice(&self) -> &[Run] {
        &self.runs[..self.len]
    }

    /// Frames in all runs.
    pub(crate) fn frames(&self) -> u64 {
        self.as_slice().iter().map(|r| r.count).sum()
    }

    /// Adds a run, joined with all that it overlaps or touches. When the table is full, the
    /// smallest run is given up.
    pub(crate) fn insert(&mut self, mut run: Run) {
        if run.count == 0 {
            return;
        }
        let from = self.as_slice().partition_point(|r| r.end() < run.first);
        let to = self.as_slice().partition_point(|r| r.first <= run.end());
        if from < to {
            let first = run.first.min(self.runs[from].first);
            let end = run.end().max(self.runs[to - 1].end());
            run = Run {
                first,
                count: end - first,
            };
            self.runs.copy_within(to..self.len, from + 1);
            self.len -= to - from - 1;
            self.runs[from] = run;
            return;
        }
        let mut at = from;
        if self.len == MAX_REGIONS {
            let Some((smallest, count)) = self
                .as_slice()
                .iter()
                .map(|r| r.count)
                .enumerate()
                .min_by_key(|(_, count)| *count)
            else {
                return;
            };
            if count >= run.count {
                self.lost += run.count;
                return;
            }
            self.lost += count;
            self.runs.copy_within(smallest + 1..self.len, smallest);
            self.len -= 1;
            if smallest < at {
                at -= 1;
            }
        }
        self.runs.copy_within(at..self.len, at + 1);
        self.runs[at] = run;
        self.len += 1;
    }

    /// Takes `count` frames off the front of the first run that has more than that.
    pub(crate) fn take_front(&mut self, count: u64) -> Option<Run> {
        let run = self.runs[..self.len].iter_mut().find(|r| r.count > count)?;
        let taken = Run {
            first: run.first,
            count,
        };
        run.first += count;
        run.count -= count;
        Some(taken)
    }

    /// Index of the run that has all of `run`.
    pub(crate) fn position(&self, run: Run) -> Option<usize> {
        let after = self.as_slice().partition_point(|r| r.first <= run.first);
        let at = after.checked_sub(1)?;
        (run.end() <= self.runs[at].end()).then_some(at)
    }
}

/// What a frame is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Free, and not the first of its block.
    Free,
    /// First frame of a free block of 2^order frames.
    FreeBlock(u8),
    /// Somebody's.
    Used(Owner),
}

/// Bookkeeping for one frame. The links are meaningful in the first frame of a free block only.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    next: u32,
    prev: u32,
    state: State,
}

/// 12 bytes for 4096: 0.3 % of the memory.
const _: () = assert!(size_of::<Frame>() == 12);

impl Frame {
    /// A frame that nobody has and no list knows.
    pub(crate) const NEW: Frame = Frame {
        next: NONE,
        prev: NONE,
        state: State::Free,
    };
}

/// The frames, their blocks and their owners.
pub(crate) struct Buddy<'a> {
    /// One entry for each frame of each run, in order of address.
    frames: &'a mut [Frame],
    runs: Runs,
    /// Index in `frames` of the first frame of each run.
    starts: [u32; MAX_REGIONS],
    /// First block of each order.
    heads: [u32; MAX_ORDER as usize + 1],
    free: u64,
    used: [u64; OWNERS],
}

impl<'a> Buddy<'a> {
    /// All frames of `runs` free. `frames`: at least as many as the runs have, all `Frame::NEW`.
    pub(crate) fn new(runs: Runs, frames: &'a mut [Frame]) -> Self {
        let mut buddy = Self {
            frames,
            runs: Runs::new(),
            starts: [0; MAX_REGIONS],
            heads: [NONE; MAX_ORDER as usize + 1],
            free: 0,
            used: [0; OWNERS],
        };
        let mut start = 0;
        for (slot, run) in buddy.starts.iter_mut().zip(runs.as_slice()) {
            *slot = start as u32;
            start += run.count;
        }
        buddy.runs = runs;
        // From the last run down, so that low addresses come first off the lists.
        for i in (0..buddy.runs.as_slice().len()).rev() {
            buddy.insert_run(buddy.runs.as_slice()[i]);
        }
        buddy
    }

    /// Takes `count` frames, the first at a multiple of `align` frames (a power of two).
    pub(crate) fn allocate(&mut self, count: u64, align: u64, owner: Owner) -> Option<u64> {
        let block = count.checked_next_power_of_two()?.max(align);
        let order = block.trailing_zeros() as u8;
        if count == 0 || order > MAX_ORDER {
            return None;
        }
        let mut got = (order..=MAX_ORDER).find(|o| self.heads[usize::from(*o)] != NONE)?;
        let first = self.frame_number(self.heads[usize::from(got)]);
        self.remove_block(first, got);
        while got > order {
            got -= 1;
            self.insert_block(first + (1 << got), got);
        }
        self.insert_run(Run {
            first: first + count,
            count: block - count,
        });
        let at = self.index(first);
        for frame in &mut self.frames[at..at + count as usize] {
            frame.state = State::Used(owner);
        }
        self.used[slot(owner)] += count;
        Some(first)
    }

    /// Gives back a run. `false`, and nothing done: not all of it is `owner`'s.
    #[must_use]
    pub(crate) fn free(&mut self, run: Run, owner: Owner) -> bool {
        if self.runs.position(run).is_none() {
            return false;
        }
        let at = self.index(run.first);
        let frames = &mut self.frames[at..at + run.count as usize];
        if frames.iter().any(|f| f.state != State::Used(owner)) {
            return false;
        }
        frames.fill(Frame::NEW);
        self.used[slot(owner)] -= run.count;
        self.insert_run(run);
        true
    }

    /// Frames that nobody has.
    pub(crate) fn free_frames(&self) -> u64 {
        self.free
    }

    /// Frames in all runs.
    pub(crate) fn total_frames(&self) -> u64 {
        self.runs.frames()
    }

    /// Frames that `owner` has.
    pub(crate) fn used(&self, owner: Owner) -> u64 {
        self.used[slot(owner)]
    }

    /// Frames in the largest free block, 0 when nothing is free.
    pub(crate) fn largest_block(&self) -> u64 {
        self.heads
            .iter()
            .rposition(|head| *head != NONE)
            .map_or(0, |order| 1 << order)
    }

    /// Index in `frames` of a frame that is in one of the runs.
    fn index(&self, frame: u64) -> usize {
        let at = self
            .runs
            .as_slice()
            .partition_point(|r| r.first <= frame)
            .saturating_sub(1);
        self.starts[at] as usize + (frame - self.runs.runs[at].first) as usize
    }

    /// Number of the frame with this index.
    fn frame_number(&self, index: u32) -> u64 {
        let starts = &self.starts[..self.runs.as_slice().len()];
        let at = starts
            .partition_point(|start| *start <= index)
            .saturating_sub(1);
        self.runs.runs[at].first + u64::from(index - self.starts[at])
    }

    /// Frees a run of one region as the fewest aligned blocks.
    fn insert_run(&mut self, run: Run) {
        let (mut at, end) = (run.first, run.end());
        while at < end {
            let fits = (end - at).ilog2() as u8;
            let aligned = at.trailing_zeros() as u8;
            let order = fits.min(aligned).min(MAX_ORDER);
            self.insert_block(at, order);
            at += 1 << order;
        }
    }

    /// Frees a block and joins it with its free buddies.
    fn insert_block(&mut self, mut first: u64, mut order: u8) {
        while order < MAX_ORDER {
            let buddy = first ^ (1 << order);
            let both = Run {
                first: first & buddy,
                count: 2 << order,
            };
            if self.runs.position(both).is_none()
                || self.frames[self.index(buddy)].state != State::FreeBlock(order)
            {
                break;
            }
            self.remove_block(buddy, order);
            first = both.first;
            order += 1;
        }
        let index = self.index(first);
        let next = self.heads[usize::from(order)];
        self.frames[index] = Frame {
            next,
            prev: NONE,
            state: State::FreeBlock(order),
        };
        if let Some(next) = self.frames.get_mut(next as usize) {
            next.prev = index as u32;
        }
        self.heads[usize::from(order)] = index as u32;
        self.free += 1 << order;
    }

    /// Takes a free block off its list.
    fn remove_block(&mut self, first: u64, order: u8) {
        let index = self.index(first);
        let Frame { next, prev, .. } = self.frames[index];
        match self.frames.get_mut(prev as usize) {
            Some(prev) => prev.next = next,
            None => self.heads[usize::from(order)] = next,
        }
        if let Some(next) = self.frames.get_mut(next as usize) {
            next.prev = prev;
        }
        self.frames[index] = Frame::NEW;
        self.free -= 1 << order;
    }
}

/// Place of an owner among the counters.
///
/// # Panics
/// When the VM number is not below `Owner::MAX_VMS`: a defect of the host.
fn slot(owner: Owner) -> usize {
    let (vm, kind) = match owner {
        Owner::Host => return 0,
        Owner::VmRam(vm) => (vm, 0),
        Owner::VmTables(vm) => (vm, 1),
        Owner::VmDisks(vm) => (vm, 2),
    };
    assert!(vm < Owner::MAX_VMS, "VM number {vm} is out of range");
    1 + 3 * usize::from(vm) + kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn runs(list: &[(u64, u64)]) -> Runs {
        let mut runs = Runs::new();
        for (first, count) in list {
            runs.insert(Run {
                first: *first,
                count: *count,
            });
        }
        runs
    }

    fn storage(runs: &Runs) -> Vec<Frame> {
        vec![Frame::NEW; runs.frames() as usize]
    }

    #[test]
    fn regions_are_rounded_inwards() {
        let run = |start, bytes| {
            let r = Run::of(MemoryRegion {
                start: crate::Hpa(start),
                bytes,
            });
            (r.first, r.count)
        };
        assert_eq!(run(1, 0x2fff), (1, 2));
        assert_eq!(run(0x1001, 0xfff), (2, 0));
        assert_eq!(run(u64::MAX - 5000, u64::MAX), (FRAME_LIMIT, 0));
        assert_eq!(run(0, u64::MAX), (0, FRAME_LIMIT));
    }

    #[test]
    fn regions_merge_and_sort() {
        let merged = runs(&[(100, 10), (0, 50), (110, 5), (40, 20), (90, 10), (200, 0)]);
        let list: Vec<_> = merged
            .as_slice()
            .iter()
            .map(|r| (r.first, r.count))
            .collect();
        assert_eq!(list, [(0, 60), (90, 25)]);
    }

    #[test]
    fn the_smallest_regions_are_given_up_when_there_are_too_many() {
        let mut many = Runs::new();
        for i in 0..MAX_REGIONS as u64 {
            many.insert(Run {
                first: 1000 * i,
                count: 10 + i,
            });
        }
        many.insert(Run {
            first: 500,
            count: 5,
        });
        assert_eq!((many.lost, many.as_slice().len()), (5, MAX_REGIONS));
        many.insert(Run {
            first: 1_000_500,
            count: 100,
        });
        assert_eq!((many.lost, many.as_slice().len()), (15, MAX_REGIONS));
        assert_eq!(many.as_slice()[0].first, 1000);
        assert_eq!(many.as_slice()[MAX_REGIONS - 1].first, 1_000_500);
    }

    #[test]
    fn a_gigabyte_comes_back_whole() {
        const GIB: u64 = 1 << 18;
        let runs = runs(&[(256, 3 * GIB)]);
        let mut frames = storage(&runs);
        let mut buddy = Buddy::new(runs, &mut frames);
        let owner = Owner::VmRam(3);
        let first = buddy.allocate(GIB, GIB, owner).unwrap();
        assert!(first.is_multiple_of(GIB));
        let second = buddy.allocate(GIB, GIB, owner).unwrap();
        assert!(second.is_multiple_of(GIB) && second != first);
        assert_eq!(buddy.allocate(GIB, GIB, owner), None);
        assert_eq!(buddy.used(owner), 2 * GIB);
        for first in [first, second] {
            assert!(buddy.free(Run { first, count: GIB }, owner));
        }
        assert_eq!((buddy.free_frames(), buddy.largest_block()), (3 * GIB, GIB));
    }

    #[test]
    fn wrong_frees_are_refused() {
        let runs = runs(&[(16, 16), (64, 16)]);
        let mut frames = storage(&runs);
        let mut buddy = Buddy::new(runs, &mut frames);
        let first = buddy.allocate(4, 1, Owner::Host).unwrap();
        let run = |first, count| Run { first, count };
        assert!(!buddy.free(run(first, 4), Owner::VmRam(0)));
        assert!(!buddy.free(run(first, 5), Owner::Host));
        assert!(!buddy.free(run(0, 1), Owner::Host));
        assert!(!buddy.free(run(30, 4), Owner::Host));
        assert!(buddy.free(run(first, 1), Owner::Host));
        assert!(!buddy.free(run(first, 4), Owner::Host));
        assert!(buddy.free(run(first + 1, 3), Owner::Host));
        assert_eq!(buddy.free_frames(), 32);
    }

    #[test]
    fn impossible_requests_are_refused() {
        let runs = runs(&[(0, 100)]);
        let mut frames = storage(&runs);
        let mut buddy = Buddy::new(runs, &mut frames);
        assert_eq!(buddy.allocate(0, 1, Owner::Host), None);
        assert_eq!(buddy.allocate(65, 1, Owner::Host), None);
        assert_eq!(buddy.allocate(u64::MAX, 1, Owner::Host), None);
        assert_eq!(buddy.allocate(1, 1 << 40, Owner::Host), None);
        assert_eq!(buddy.free_frames(), 100);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Allocate { count: u64, align: u32, vm: u16 },
        Free { which: usize, part: u64 },
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (1..70u64, 0..7u32, 0..3u16).prop_map(|(count, align, vm)| Op::Allocate {
                count,
                align,
                vm
            }),
            (any::<usize>(), 0..4u64).prop_map(|(which, part)| Op::Free { which, part }),
        ]
    }

    proptest! {
        #[test]
        fn follows_the_model(
            regions in prop::collection::vec((0..2000u64, 1..400u64), 1..8),
            ops in prop::collection::vec(op(), 1..200),
        ) {
            let table = runs(&regions);
            let total = table.frames();
            let all = table.clone();
            let mut frames = storage(&table);
            let mut buddy = Buddy::new(table, &mut frames);
            let mut taken: BTreeMap<u64, (u64, Owner)> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Allocate { count, align, vm } => {
                        let (align, owner) = (1 << align, Owner::VmTables(vm));
                        let largest = buddy.largest_block();
                        match buddy.allocate(count, align, owner) {
                            Some(first) => {
                                prop_assert!(first.is_multiple_of(align));
                                let run = Run { first, count };
                                prop_assert!(all.position(run).is_some());
                                let before = taken.range(..first + count).next_back();
                                prop_assert!(before.is_none_or(|(f, (c, _))| f + c <= first));
                                taken.insert(first, (count, owner));
                            }
                            None => prop_assert!(largest < count.next_power_of_two().max(align)),
                        }
                    }
                    Op::Free { which, part } if !taken.is_empty() => {
                        let first = *taken.keys().nth(which % taken.len()).unwrap();
                        let (count, owner) = taken.remove(&first).unwrap();
                        // Sometimes only the head of the run goes.
                        let head = if part == 0 { count.div_ceil(2) } else { count };
                        let head_run = Run { first, count: head };
                        prop_assert!(buddy.free(head_run, owner));
                        if head < count {
                            taken.insert(first + head, (count - head, owner));
                        }
                        prop_assert!(!buddy.free(head_run, owner));
                    }
                    Op::Free { .. } => {}
                }
                let used: u64 = taken.values().map(|(count, _)| count).sum();
                prop_assert_eq!(buddy.free_frames(), total - used);
                for vm in 0..3 {
                    let owner = Owner::VmTables(vm);
                    let of_vm: u64 = taken.values().filter(|t| t.1 == owner).map(|t| t.0).sum();
                    prop_assert_eq!(buddy.used(owner), of_vm);
                }
            }
            // Everything given back joins up to the blocks of the start.
            let mut fresh_frames = storage(&all);
            let fresh = Buddy::new(all, &mut fresh_frames).largest_block();
            for (first, (count, owner)) in taken {
                let run = Run { first, count };
                prop_assert!(buddy.free(run, owner));
            }
            prop_assert_eq!((buddy.free_frames(), buddy.largest_block()), (total, fresh));
        }
    }
}
