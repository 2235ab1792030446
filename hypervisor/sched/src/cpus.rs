//! Sets of pCPUs.

use core::fmt;

/// Most pCPUs that a scheduler serves.
pub const MAX_PCPUS: usize = 64;

/// A set of pCPUs, by number.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CpuSet(u64);

impl CpuSet {
    /// None.
    pub const EMPTY: Self = CpuSet(0);
    /// All that there can be.
    pub const ALL: Self = CpuSet(u64::MAX);

    /// The set of one pCPU; empty if the number is [`MAX_PCPUS`] or more.
    pub const fn of(pcpu: usize) -> Self {
        CpuSet(if pcpu < MAX_PCPUS { 1 << pcpu } else { 0 })
    }

    /// The pCPUs below `count`.
    pub const fn first(count: usize) -> Self {
        CpuSet(if count < MAX_PCPUS {
            (1 << count) - 1
        } else {
            u64::MAX
        })
    }

    /// The set whose numbers are the bits of this.
    pub const fn from_bits(bits: u64) -> Self {
        CpuSet(bits)
    }

    /// A bit for each pCPU.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether a pCPU is in it.
    pub const fn contains(self, pcpu: usize) -> bool {
        self.0 & Self::of(pcpu).0 != 0
    }

    /// Those that are in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        CpuSet(self.0 & other.0)
    }

    /// Those that are in either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        CpuSet(self.0 | other.0)
    }

    /// Those that are not in the other.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        CpuSet(self.0 & !other.0)
    }

    /// How many.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The least number.
    pub const fn lowest(self) -> Option<usize> {
        if self.0 == 0 {
            None
        } else {
            Some(self.0.trailing_zeros() as usize)
        }
    }

    /// The numbers, ascending.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        let mut rest = self.0;
        core::iter::from_fn(move || {
            let next = CpuSet(rest).lowest()?;
            rest &= rest - 1;
            Some(next)
        })
    }
}

impl FromIterator<usize> for CpuSet {
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        numbers
            .into_iter()
            .fold(Self::EMPTY, |set, pcpu| set.or(Self::of(pcpu)))
    }
}

/// As a list with ranges: `0-2, 5`.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut separator = "";
        while let Some(first) = rest.lowest() {
            let count = (rest.0 >> first).trailing_ones() as usize;
            let last = first + count - 1;
            match count {
                1 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ", ";
            rest = rest.without(Self::first(last + 1));
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn a_set_is_shown_as_ranges() {
        let shown = |numbers: &[usize]| format!("{}", numbers.iter().copied().collect::<CpuSet>());
        assert_eq!(shown(&[]), "");
        assert_eq!(shown(&[5, 0, 2, 1, 62, 63]), "0-2, 5, 62-63");
        assert_eq!(format!("{}", CpuSet::ALL), "0-63");
    }

    #[test]
    fn numbers_go_in_and_come_out() {
        let set: CpuSet = [0, 5, 63, 64].into_iter().collect();
        assert!(set.iter().eq([0, 5, 63]));
        assert_eq!(set.len(), 3);
        assert!(set.contains(5) && !set.contains(6) && !set.contains(64));
        assert_eq!(set.without(CpuSet::of(0)).lowest(), Some(5));
        assert_eq!(CpuSet::first(64), CpuSet::ALL);
        assert!(CpuSet::first(3).iter().eq(0..3));
        assert!(CpuSet::first(0).is_empty());
    }
}
