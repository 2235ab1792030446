//! A limit on how often something is said: a handful at once, then one now and then.
//!
//! A token bucket. What is not said is counted, so that the next one can say how many are missing.
//! Pure: the caller reads the clock.

/// Says when something may be said.
#[derive(Debug)]
pub struct Limit {
    /// At most so many at once.
    burst: u32,
    /// Time for which one more is allowed, in microseconds.
    period_us: u64,
    tokens: u32,
    /// When the last token was added.
    filled_us: u64,
    left_out: u64,
}

impl Limit {
    /// Allows `burst` at once, and one more every `period_us` microseconds.
    pub const fn new(burst: u32, period_us: u64) -> Self {
        Limit {
            burst,
            period_us,
            tokens: burst,
            filled_us: 0,
            left_out: 0,
        }
    }

    /// Whether it may be said now; if so, with how many were left out since the last time.
    pub fn admit(&mut self, now_us: u64) -> Option<u64> {
        let periods = now_us.saturating_sub(self.filled_us) / self.period_us.max(1);
        if periods > 0 {
            let more = u32::try_from(periods).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(more).min(self.burst);
            self.filled_us = now_us;
        }
        if self.tokens == 0 {
            self.left_out += 1;
            return None;
        }
        self.tokens -= 1;
        Some(core::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_per_period() {
        let mut limit = Limit::new(3, 1_000);
        let said = |limit: &mut Limit, now| limit.admit(now);
        assert_eq!(
            [0, 1, 2, 3].map(|now| said(&mut limit, now)),
            [Some(0), Some(0), Some(0), None]
        );
        assert_eq!(said(&mut limit, 999), None);
        assert_eq!(said(&mut limit, 1_000), Some(2), "with the number left out");
        assert_eq!(said(&mut limit, 1_001), None);
        // A long silence allows no more than a burst.
        let allowed = (0..100).filter(|n| said(&mut limit, 1_000_000 + n).is_some());
        assert_eq!(allowed.count(), 3);
    }

    #[test]
    fn a_flood_is_cut_to_its_rate() {
        let mut limit = Limit::new(5, 1_000);
        let (mut said, mut left_out) = (0, 0);
        for now in 0..100_000 {
            if let Some(before) = limit.admit(now) {
                said += 1;
                left_out += before;
            }
        }
        assert!((100..=105).contains(&said), "{said}");
        assert!(left_out > 99_000 - 1_000);
    }
}
