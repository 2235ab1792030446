//! A ring of trace records: one writer, readers at any time, no lock.
//!
//! The writer never waits: it overwrites the oldest record. A reader copies what is there and then
//! drops what the writer may have overwritten meanwhile, so that a record is read whole or not at all.

use alloc::{boxed::Box, vec::Vec};
use core::sync::atomic::{AtomicU64, Ordering, fence};

use super::{Packed, Record};

/// Place for one record.
#[derive(Default)]
struct Slot {
    tsc: AtomicU64,
    rest: AtomicU64,
}

/// The newest records of one processor.
pub struct Ring {
    slots: Box<[Slot]>,
    /// Number of the next record.
    next: AtomicU64,
    /// Number of the first record of the trace that is recorded.
    start: AtomicU64,
}

impl Ring {
    /// An empty ring for `capacity` records, at least 2.
    ///
    /// Returns `None` if there is no memory for it.
    pub fn new(capacity: usize) -> Option<Self> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(capacity.max(2)).ok()?;
        slots.resize_with(capacity.max(2), Slot::default);
        Some(Ring {
            slots: slots.into_boxed_slice(),
            next: AtomicU64::new(0),
            start: AtomicU64::new(0),
        })
    }

    /// Records that it can keep: one less than it has room for, since one may be just being written.
    pub fn capacity(&self) -> u64 {
        self.slots.len() as u64 - 1
    }

    fn slot(&self, number: u64) -> &Slot {
        &self.slots[(number % self.slots.len() as u64) as usize]
    }

    /// Adds a record. Only one processor may do this, and not from within an interrupt of itself.
    pub fn push(&self, record: &Record) {
        let number = self.next.load(Ordering::Relaxed);
        // Whoever sees what is written below also sees `next` as it is now.
        fence(Ordering::Release);
        let slot = self.slot(number);
        slot.tsc.store(record.tsc, Ordering::Relaxed);
        let rest = Packed::of(record).into_bits();
        slot.rest.store(rest, Ordering::Relaxed);
        self.next.store(number + 1, Ordering::Release);
    }

    /// Forgets all records: numbers begin at 0 again. Anybody may do this.
    pub fn forget(&self) {
        self.start
            .store(self.next.load(Ordering::Acquire), Ordering::Release);
    }

    /// Numbers of the oldest record and of the one behind the newest.
    pub fn span(&self) -> (u64, u64) {
        let start = self.start.load(Ordering::Acquire);
        // Somebody may just have moved the start beyond what was written when it was looked at.
        let next = self.next.load(Ordering::Acquire).max(start);
        let oldest = next.saturating_sub(self.capacity()).max(start);
        (oldest - start, next - start)
    }

    /// Up to `count` records from number `from` on, or from the oldest if that is newer. Returns the
    /// number of the first one; the times are the host's TSC.
    pub fn read(&self, from: u64, count: usize) -> (u64, Vec<Record>) {
        let start = self.start.load(Ordering::Acquire);
        let (oldest, next) = self.span();
        let from = from.clamp(oldest, next);
        let count = (next - from).min(count as u64) as usize;
        let mut records = Vec::new();
        if records.try_reserve_exact(count).is_err() {
            return (from, records);
        }
        for number in from..from + count as u64 {
            let slot = self.slot(start + number);
            let rest = Packed::from_bits(slot.rest.load(Ordering::Relaxed));
            records.push(rest.at(slot.tsc.load(Ordering::Relaxed)));
        }
        fence(Ordering::Acquire);
        let next = self.next.load(Ordering::Relaxed);
        let whole = next.saturating_sub(self.capacity()).saturating_sub(start);
        let torn = whole.saturating_sub(from).min(count as u64);
        records.drain(..torn as usize);
        (from + torn, records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Kind;
    use proptest::prelude::*;
    use std::{
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    fn record(number: u64) -> Record {
        Record {
            tsc: number,
            detail: number as u16,
            extra: (number >> 16) as u16,
            ..Record::of_host(0, Kind::Timer)
        }
    }

    proptest! {
        #[test]
        fn keeps_the_newest(
            capacity in 2usize..9,
            pushes in prop::collection::vec(0usize..12, 1..6),
            from in 0u64..40,
            count in 0usize..12,
        ) {
            let ring = Ring::new(capacity).unwrap();
            for burst in pushes {
                ring.forget();
                prop_assert_eq!(ring.span(), (0, 0));
                for number in 0..burst as u64 {
                    ring.push(&record(number));
                }
                let (oldest, next) = ring.span();
                prop_assert_eq!(next, burst as u64);
                prop_assert_eq!(next - oldest, next.min(capacity as u64 - 1));
                let (first, records) = ring.read(from, count);
                prop_assert_eq!(first, from.clamp(oldest, next));
                prop_assert_eq!(records.len() as u64, (next - first).min(count as u64));
                for (number, read) in (first..).zip(records) {
                    prop_assert_eq!(read, record(number));
                }
            }
        }
    }

    #[test]
    fn what_is_overwritten_while_it_is_read_is_not_shown() {
        let ring = Arc::new(Ring::new(64).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (ring, stop) = (Arc::clone(&ring), Arc::clone(&stop));
            thread::spawn(move || {
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    ring.push(&record(number));
                    number += 1;
                }
            })
        };
        while ring.span().1 < 64 {
            thread::yield_now();
        }
        for _ in 0..20_000 {
            let (first, records) = ring.read(0, 64);
            for (number, read) in (first..).zip(&records) {
                assert_eq!(*read, record(number));
            }
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let (first, records) = ring.read(0, 64);
        assert_eq!(records.len(), 63);
        assert_eq!(records[0], record(first));
    }
}
