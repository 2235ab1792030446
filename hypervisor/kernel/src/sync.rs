//! The kernel's spinlock: keeps interrupts off, and gives way to a dying processor.
//!
//! Lock order, outermost first: log, console and screen, which are taken one after the other; heap; the
//! kernel's page tables (the heap grows under its lock); frames. The whole host's table is in docs/ARCHITECTURE.md.
//! Interrupt handlers may take any of them, since a holder cannot be interrupted.
//!
//! After [`break_locks`] (fault report), a lock that stays held is taken regardless: a
//! report with a damaged line is better than none.

use core::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicBool, Ordering},
};

use x86_64::instructions::interrupts;

/// Set once a fault report has begun.
static BROKEN: AtomicBool = AtomicBool::new(false);

/// Spins before a held lock is taken over, once locks are broken.
const PATIENCE: u32 = 1_000_000;

/// From now on no lock waits for ever. For the fault report only; there is no way back.
pub fn break_locks() {
    BROKEN.store(true, Ordering::SeqCst);
}

/// A value that one processor at a time may touch.
pub struct Lock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is handed out to one holder at a time, which may be on any processor.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// An unlocked value.
    pub const fn new(value: T) -> Self {
        Lock {
            held: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock and takes it, with interrupts off until the guard goes.
    pub fn lock(&self) -> Guard<'_, T> {
        let interrupts = interrupts::are_enabled();
        interrupts::disable();
        let mut spins = 0;
        while self.held.swap(true, Ordering::Acquire) {
            while self.held.load(Ordering::Relaxed) {
                core::hint::spin_loop();
                if BROKEN.load(Ordering::Relaxed) {
                    spins += 1;
                    if spins > PATIENCE {
                        // The holder was stopped or is the faulting code itself: it will not touch the value again.
                        return Guard {
                            lock: self,
                            interrupts,
                            forced: true,
                        };
                    }
                }
            }
        }
        Guard {
            lock: self,
            interrupts,
            forced: false,
        }
    }
}

impl<T> Lock<T> {
    /// Takes the lock, if nobody holds it.
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        let interrupts = interrupts::are_enabled();
        interrupts::disable();
        if self.held.swap(true, Ordering::Acquire) {
            if interrupts {
                interrupts::enable();
            }
            return None;
        }
        Some(Guard {
            lock: self,
            interrupts,
            forced: false,
        })
    }
}

/// The right to the value of a [`Lock`].
pub struct Guard<'a, T> {
    lock: &'a Lock<T>,
    interrupts: bool,
    forced: bool,
}

impl<T> Guard<'_, T> {
    /// Whether the lock was taken from a holder that was stopped: the value may be half changed.
    pub fn is_forced(&self) -> bool {
        self.forced
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard is the only one (or the only one still used, see `lock`).
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard is the only one (or the only one still used, see `lock`).
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.held.store(false, Ordering::Release);
        if self.interrupts {
            interrupts::enable();
        }
    }
}
