//! When to look at a device by the clock.
//!
//! For a device whose interrupt does not come, or does not end a guest's run. The time counts from the last look, not
//! from the last question: who asks all the time, as a guest that exits all the time has the host do, puts nothing off.

use core::sync::atomic::{AtomicU64, Ordering};

/// When to look. Off until it is started. Times are host TSC ticks.
#[derive(Debug)]
pub struct ByClock {
    /// Between two looks; 0: off.
    every: AtomicU64,
    /// The last look.
    looked: AtomicU64,
}

impl ByClock {
    /// Never.
    pub const fn off() -> Self {
        ByClock {
            every: AtomicU64::new(0),
            looked: AtomicU64::new(0),
        }
    }

    /// From now on, with so many ticks between two looks.
    pub fn start(&self, every: u64) {
        self.every.store(every, Ordering::Relaxed);
    }

    /// The caller comes by at `now`: whether it has to look, which it does then.
    #[inline]
    pub fn look(&self, now: u64) -> bool {
        let every = self.every.load(Ordering::Relaxed);
        let due = every != 0 && now.wrapping_sub(self.looked.load(Ordering::Relaxed)) >= every;
        if due {
            self.looked.store(now, Ordering::Relaxed);
        }
        due
    }

    /// When to look again at the latest; `None`: never.
    pub fn again_at(&self) -> Option<u64> {
        match self.every.load(Ordering::Relaxed) {
            0 => None,
            every => Some(self.looked.load(Ordering::Relaxed).saturating_add(every)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_put_nothing_off() {
        let clock = ByClock::off();
        assert!(!clock.look(10));
        assert_eq!(clock.again_at(), None);
        clock.start(500);
        assert!(clock.look(1000));
        for _ in 0..3 {
            assert_eq!(clock.again_at(), Some(1500));
        }
        assert!(!clock.look(1499), "who comes by early costs nothing");
        assert_eq!(clock.again_at(), Some(1500));
        assert!(clock.look(1600));
        assert_eq!(clock.again_at(), Some(2100));
    }
}
