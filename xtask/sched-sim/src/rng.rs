//! Random numbers that are the same on every machine.
//!
//! A workload is drawn from a seed, and its results are kept under version control and
//! compared to the digit. So neither the generator nor the logarithm comes from a library whose
//! next version may give another last bit: both are made here of plain arithmetic.

use crate::Ns;

/// A generator: xorshift64*, started through splitmix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed. Neighbouring seeds give unrelated numbers.
    pub fn new(seed: u64) -> Self {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Rng((z ^ (z >> 31)).max(1))
    }

    /// The generator of a part of the whole, such as one vCPU: parts don't disturb each other.
    pub fn part(seed: u64, number: u64) -> Self {
        Rng::new(Rng::new(seed).next().wrapping_add(number))
    }

    /// 64 random bits.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number above 0 and up to 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// Natural logarithm of a positive number, by basic arithmetic only.
pub fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as f64 - 1023.0;
    // The significand, from 1 to below 2.
    let m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    let z = (m - 1.0) / (m + 1.0);
    let square = z * z;
    let (mut term, mut sum) = (z, 0.0);
    let mut odd = 1.0;
    while odd < 40.0 {
        sum += term / odd;
        term *= square;
        odd += 2.0;
    }
    exponent * std::f64::consts::LN_2 + 2.0 * sum
}

/// How long something takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Always this.
    Exactly(Ns),
    /// Anything between, each as likely.
    Between(Ns, Ns),
    /// Exponential with this mean, cut at ten times of it.
    Around(Ns),
    /// Mostly short, now and then long: exponential with the mean `short`, one in `every` with
    /// the mean `long`.
    Mostly {
        /// Mean of the short ones.
        short: Ns,
        /// Mean of the long ones.
        long: Ns,
        /// One in so many is long; at least 1.
        every: u64,
    },
}

impl Span {
    /// One draw, in nanoseconds; at least 1.
    pub fn draw(self, rng: &mut Rng) -> Ns {
        let drawn = match self {
            Span::Exactly(ns) => ns,
            Span::Between(low, high) => low + rng.below(high.saturating_sub(low) + 1),
            Span::Around(mean) => {
                let factor = (-ln(rng.unit())).min(10.0);
                (mean as f64 * factor) as Ns
            }
            Span::Mostly { short, long, every } => {
                let mean = if rng.below(every) == 0 { long } else { short };
                Span::Around(mean).draw(rng)
            }
        };
        drawn.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_one() {
        for x in [1e-9, 0.3, 0.999, 1.0, 1.5, 2.0, 10.0, 12345.678, 1e12] {
            assert!(
                (ln(x) - x.ln()).abs() < 1e-12 * x.ln().abs().max(1.0),
                "{x}"
            );
        }
    }

    #[test]
    fn draws_have_their_means_and_repeat() {
        let mean = |span: Span| {
            let mut rng = Rng::part(7, 3);
            (0..100_000).map(|_| span.draw(&mut rng)).sum::<u64>() / 100_000
        };
        assert_eq!(mean(Span::Exactly(5)), 5);
        for (span, expected) in [
            (Span::Between(1_000, 3_000), 2_000),
            (Span::Around(10_000), 10_000),
            (
                Span::Mostly {
                    short: 1_000,
                    long: 100_000,
                    every: 10,
                },
                10_900,
            ),
        ] {
            let found = mean(span);
            assert!(
                found.abs_diff(expected) * 50 < expected,
                "{span:?}: {found}"
            );
            assert_eq!(found, mean(span));
        }
    }

    #[test]
    fn parts_differ() {
        assert_ne!(Rng::part(1, 0).next(), Rng::part(1, 1).next());
        assert_ne!(Rng::part(1, 0).next(), Rng::part(2, 0).next());
        assert_eq!(Rng::new(1).below(0), 0);
    }
}
