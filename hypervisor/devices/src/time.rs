//! Virtual time: guest TSC ticks, and conversion to device clocks without drift.
//!
//! Every device timer is computed from [`Clock::now`]. A device clock is a [`Rate`]: its
//! count is a pure function of the tick, so reading it any number of times, or late, never
//! accumulates error.

/// The VM's time source.
pub trait Clock: Send + Sync {
    /// Guest TSC ticks since the VM started. Never goes back.
    fn now(&self) -> u64;
    /// Ticks per second, constant for the VM's life.
    fn hz(&self) -> u64;
}

/// `floor(value * numerator / denominator)`, saturating at `u64::MAX`; a zero denominator counts as 1.
pub const fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    let denominator = if denominator == 0 { 1 } else { denominator };
    // A product that fits saves the 128-bit division; it does for hours of a device clock.
    if let Some(product) = value.checked_mul(numerator) {
        return product / denominator;
    }
    saturate(value as u128 * numerator as u128 / denominator as u128)
}

/// `ceil(value * numerator / denominator)`, saturating at `u64::MAX`; a zero denominator counts as 1.
pub const fn scale_ceil(value: u64, numerator: u64, denominator: u64) -> u64 {
    let denominator = if denominator == 0 { 1 } else { denominator };
    saturate((value as u128 * numerator as u128).div_ceil(denominator as u128))
}

const fn saturate(value: u128) -> u64 {
    if value > u64::MAX as u128 {
        u64::MAX
    } else {
        value as u64
    }
}

/// A device clock that runs at a fixed ratio to the guest TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    clock_hz: u64,
    device_hz: u64,
}

impl Rate {
    /// A device clock of `device_hz` beside a guest TSC of `clock_hz`; zero counts as 1.
    pub const fn new(clock_hz: u64, device_hz: u64) -> Self {
        Rate {
            clock_hz: if clock_hz == 0 { 1 } else { clock_hz },
            device_hz: if device_hz == 0 { 1 } else { device_hz },
        }
    }

    /// Device counts elapsed at tick `ticks`.
    pub const fn count_at(self, ticks: u64) -> u64 {
        scale(ticks, self.device_hz, self.clock_hz)
    }

    /// The first tick at which [`Rate::count_at`] is at least `count`.
    pub const fn tick_of(self, count: u64) -> u64 {
        scale_ceil(count, self.clock_hz, self.device_hz)
    }

    /// The device clock's frequency in Hz.
    pub const fn device_hz(self) -> u64 {
        self.device_hz
    }
}

/// Shortest time between two interrupts of a periodic timer, in microseconds.
///
/// A guest that asks for a shorter period reads correct counts but gets its interrupts
/// coalesced, so that it cannot keep the host busy with nothing but timer exits.
pub const MIN_INTERRUPT_PERIOD_US: u64 = 50;

/// The earlier of two optional deadlines.
pub fn earliest(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn scale_rounds_down_and_saturates() {
        assert_eq!(scale(10, 3, 4), 7);
        assert_eq!(scale_ceil(10, 3, 4), 8);
        assert_eq!(scale(u64::MAX, 2, 1), u64::MAX);
        assert_eq!(scale(u64::MAX, u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(scale(5, 7, 0), 35);
    }

    #[test]
    fn earliest_ignores_absent_deadlines() {
        assert_eq!(earliest(None, None), None);
        assert_eq!(earliest(Some(3), None), Some(3));
        assert_eq!(earliest(Some(3), Some(2)), Some(2));
    }

    proptest! {
        #[test]
        fn tick_of_is_the_first_tick_with_the_count(
            clock_hz in 1_000_000u64..5_000_000_000,
            device_hz in 1u64..2_000_000_000,
            count in 1u64..1 << 40,
        ) {
            let rate = Rate::new(clock_hz, device_hz);
            let tick = rate.tick_of(count);
            prop_assert!(rate.count_at(tick) >= count);
            prop_assert!(rate.count_at(tick - 1) < count);
        }
    }
}
