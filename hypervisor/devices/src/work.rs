//! Work that a device does apart from the access that asked for it, in bounded pieces.
//!
//! A guest's notification only sets a bit: [`WorkSignal::raise`]. The VM's vCPUs look at the bits after an
//! exit that may have set one, and then do a piece of the work, limited by a [`Budget`]; what is left is done
//! after a while of guest code, so a guest that asks for a lot keeps neither its own interrupts nor the
//! host waiting.
//!
//! Invariant: work that is wanted has its bit set, or is being done by somebody who sets it again unless
//! nothing is left.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// Most workers of a VM.
pub const MAX_WORKERS: usize = 64;

/// How much may still be done in this piece, in bytes moved; what moves none costs some, too.
#[derive(Clone, Copy, Debug)]
pub struct Budget(u64);

impl Budget {
    /// A piece of `bytes` bytes.
    pub fn new(bytes: u64) -> Self {
        Budget(bytes)
    }

    /// How much is left.
    pub fn left(&self) -> u64 {
        self.0
    }

    /// Nothing may be done any more.
    pub fn is_spent(&self) -> bool {
        self.0 == 0
    }

    /// Takes `cost`, as far as there is so much.
    pub fn spend(&mut self, cost: u64) {
        self.0 = self.0.saturating_sub(cost);
    }
}

/// Something that does work.
pub trait Worker: Send + Sync {
    /// Does what is wanted, until `budget` is spent. Whoever calls has no lock.
    fn work(&self, budget: &mut Budget) -> Outcome;
}

/// How a piece of work ended.
#[derive(Debug, Default)]
pub struct Outcome {
    /// There is more to do.
    pub more: bool,
    /// A line for the host's log: something the guest did wrong. The worker limits how often.
    pub note: Option<String>,
}

/// With this a worker says that there is something for it to do.
#[derive(Clone, Debug)]
pub struct WorkSignal {
    pending: Arc<AtomicU64>,
    bit: u64,
}

impl WorkSignal {
    /// A vCPU that calls this in an exit looks at the list before it enters its guest again.
    pub fn raise(&self) {
        self.pending.fetch_or(self.bit, Ordering::Release);
    }
}

/// The workers of a VM.
#[derive(Default)]
pub struct WorkList {
    pending: Arc<AtomicU64>,
    workers: Vec<Arc<dyn Worker>>,
}

impl WorkList {
    /// No workers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the worker that `make` makes with its signal. `None`: it makes none, or there are [`MAX_WORKERS`].
    pub fn add<W: Worker + 'static>(
        &mut self,
        make: impl FnOnce(WorkSignal) -> Option<Arc<W>>,
    ) -> Option<Arc<W>> {
        if self.workers.len() >= MAX_WORKERS {
            return None;
        }
        let worker = make(WorkSignal {
            pending: self.pending.clone(),
            bit: 1 << self.workers.len(),
        })?;
        self.workers.push(worker.clone());
        Some(worker)
    }

    /// Whether there is work.
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire) != 0
    }

    /// Does a piece of what is pending, each worker in turn, on one `budget`. Each line for the log goes to `note`.
    pub fn run(&self, budget: &mut Budget, mut note: impl FnMut(String)) {
        let pending = self.pending.load(Ordering::Acquire);
        for (index, worker) in self.workers.iter().enumerate() {
            let bit = 1 << index;
            // Whoever takes the bit does the work.
            if pending & bit == 0 || self.pending.fetch_and(!bit, Ordering::AcqRel) & bit == 0 {
                continue;
            }
            let outcome = worker.work(budget);
            if outcome.more {
                self.pending.fetch_or(bit, Ordering::Release);
            }
            if let Some(line) = outcome.note {
                note(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use core::sync::atomic::AtomicU32;

    /// Has so many units of work, at 10 a piece.
    struct Units(AtomicU32, WorkSignal);

    impl Worker for Units {
        fn work(&self, budget: &mut Budget) -> Outcome {
            let mut left = self.0.load(Ordering::Relaxed);
            while left > 0 && !budget.is_spent() {
                budget.spend(10);
                left -= 1;
            }
            self.0.store(left, Ordering::Relaxed);
            Outcome {
                more: left > 0,
                note: (left == 0).then(|| "done".into()),
            }
        }
    }

    #[test]
    fn work_is_done_in_pieces_until_nothing_is_left() {
        let mut list = WorkList::new();
        let mut make = |units: u32| list.add(|signal| Some(Arc::new(Units(units.into(), signal))));
        let (a, b) = (make(5).unwrap(), make(2).unwrap());
        let mut notes = vec![];
        let mut run = |list: &WorkList| {
            let mut budget = Budget::new(30);
            list.run(&mut budget, |line| notes.push(line));
            30 - budget.left()
        };
        assert!(!list.is_pending());
        assert_eq!(run(&list), 0);
        a.1.raise();
        assert_eq!(run(&list), 30);
        assert_eq!(a.0.load(Ordering::Relaxed), 2);
        b.1.raise();
        assert!(list.is_pending());
        run(&list);
        assert_eq!(
            (a.0.load(Ordering::Relaxed), b.0.load(Ordering::Relaxed)),
            (0, 1)
        );
        assert_eq!(run(&list), 10);
        assert!(!list.is_pending());
        assert_eq!(notes, ["done", "done"]);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let mut list = WorkList::new();
        let mut add = || {
            list.add(|signal| Some(Arc::new(Units(0.into(), signal))))
                .is_some()
        };
        assert!((0..MAX_WORKERS).all(|_| add()));
        assert!(!add());
    }
}
