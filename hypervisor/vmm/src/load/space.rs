//! Which guest memory is still free while a kernel is being placed.

use alloc::vec::Vec;

use mem::{Gpa, GuestMemory, GuestRange, PAGE_SIZE};

use super::BootLayout;

/// Free ranges of RAM, ascending.
#[derive(Clone, Debug)]
pub(super) struct Space {
    free: Vec<GuestRange>,
}

impl Space {
    /// The VM's RAM but for what the layout reserves.
    pub(super) fn new(memory: &GuestMemory, layout: &BootLayout<'_>) -> Self {
        let mut space = Space {
            free: memory.ranges(),
        };
        for entry in layout.reserved {
            let end = entry.range.start.0.saturating_add(entry.range.bytes);
            space.remove(entry.range.start.0, end);
        }
        space
    }

    pub(super) fn ranges(&self) -> impl Iterator<Item = GuestRange> {
        self.free.iter().copied()
    }

    /// Takes exactly this range. `false`: not all of it is free.
    pub(super) fn take_at(&mut self, start: u64, bytes: u64) -> bool {
        let Some(end) = start.checked_add(bytes) else {
            return false;
        };
        let free = self
            .usable()
            .any(|(from, to)| from <= start && end <= to && start < end);
        if free {
            self.remove(start, end);
        }
        free
    }

    /// Takes the lowest free place of `bytes` bytes in [from, below) at a multiple of `align`.
    pub(super) fn take_first(
        &mut self,
        bytes: u64,
        align: u64,
        from: u64,
        below: u64,
    ) -> Option<Gpa> {
        let (start, end) = self.usable().find_map(|(low, high)| {
            let start = low.max(from).checked_next_multiple_of(align)?;
            let end = start.checked_add(bytes)?;
            (end <= high.min(below)).then_some((start, end))
        })?;
        self.remove(start, end);
        Some(Gpa(start))
    }

    /// Takes the highest free place of `bytes` bytes below `below` at a multiple of `align`.
    pub(super) fn take_last(&mut self, bytes: u64, align: u64, below: u64) -> Option<Gpa> {
        let found = self.usable().filter_map(|(low, high)| {
            let start = high.min(below).checked_sub(bytes)? / align * align;
            (start >= low).then_some(start)
        });
        let start = found.last()?;
        self.remove(start, start + bytes);
        Some(Gpa(start))
    }

    /// Free ranges without page 0: some protocols take address 0 for "none".
    fn usable(&self) -> impl Iterator<Item = (u64, u64)> {
        self.free
            .iter()
            .map(|range| (range.start.0.max(PAGE_SIZE), range.end().0))
    }

    fn remove(&mut self, start: u64, end: u64) {
        let mut left = Vec::with_capacity(self.free.len() + 1);
        for range in &self.free {
            let (low, high) = (range.start.0, range.end().0);
            for (from, to) in [(low, high.min(start)), (low.max(end), high)] {
                if from < to {
                    left.push(GuestRange {
                        start: Gpa(from),
                        bytes: to - from,
                    });
                }
            }
        }
        self.free = left;
    }
}
