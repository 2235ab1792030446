//! Long work in pieces: a pCPU that zeroes a VM's memory does its other work in between.
//!
//! Making and removing a VM zeroes its memory, which takes long where there is much. Whoever zeroes calls
//! [`breathe`] between small pieces ([`mem::HostMemory::breathe`]); once a millisecond this pCPU then does what
//! its loop would do next: the operator's requests, due clocks, and one slice of a vCPU.
//!
//! Invariants: this happens in [`World::in_pieces`] only, where no lock is held and no vCPU is loaded; and never within itself:
//! what becomes long work meanwhile, such as the end of the VM that ran, is done in one piece, so the stack is bounded.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::*;

/// How long work goes on before the pCPU does something else, in microseconds.
const PIECE_US: u64 = 1_000;

/// What a pCPU is at. Only itself changes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Doing {
    /// Its loop, or the host's start.
    Loop,
    /// Long work.
    LongWork,
    /// Something else between two pieces of long work.
    Between,
}

/// A pCPU's long work.
#[derive(Debug)]
pub struct LongWork {
    doing: AtomicU8,
    /// Host TSC at which the next break is due.
    due: AtomicU64,
    /// It runs VMs: there is something else to do.
    in_loop: AtomicBool,
}

impl LongWork {
    /// For a pCPU that is not in its loop yet.
    pub const fn new() -> Self {
        LongWork {
            doing: AtomicU8::new(Doing::Loop as u8),
            due: AtomicU64::new(0),
            in_loop: AtomicBool::new(false),
        }
    }

    /// The pCPU runs VMs from now on.
    pub(super) fn enter_loop(&self) {
        self.in_loop.store(true, Ordering::Relaxed);
    }

    fn is(&self, doing: Doing) -> bool {
        self.doing.load(Ordering::Relaxed) == doing as u8
    }

    fn set(&self, doing: Doing) {
        self.doing.store(doing as u8, Ordering::Relaxed);
    }

    /// Whether the pCPU does something else between two pieces: long work that comes up has to wait.
    pub(super) fn is_between(&self) -> bool {
        self.is(Doing::Between)
    }

    /// The next piece begins.
    fn begin_piece(&self) {
        self.set(Doing::LongWork);
        let due = time::now_tsc() + time::us_to_ticks(PIECE_US);
        self.due.store(due, Ordering::Relaxed);
    }
}

/// Called between pieces of zeroing, by whoever zeroes: does other work if this pCPU is at long work, and it is time.
pub fn breathe() {
    let cpu = percpu::current();
    let work = &cpu.long_work;
    if work.is(Doing::LongWork)
        && time::now_tsc() >= work.due.load(Ordering::Relaxed)
        && let Some(world) = WORLD.get()
    {
        x86_64::instructions::interrupts::disable();
        work.set(Doing::Between);
        world.give_way(cpu);
        work.begin_piece();
        x86_64::instructions::interrupts::enable();
    }
}

impl<B: Backend> World<B> {
    /// Does long work, in pieces if this pCPU runs VMs: see [`interrupts::open`]. The caller holds no lock.
    pub(super) fn in_pieces<R>(&self, work: impl FnOnce() -> R) -> R {
        let this = &percpu::current().long_work;
        if !this.in_loop.load(Ordering::Relaxed) || !this.is(Doing::Loop) {
            return interrupts::open(work);
        }
        this.begin_piece();
        let result = interrupts::open(work);
        this.set(Doing::Loop);
        result
    }
}
