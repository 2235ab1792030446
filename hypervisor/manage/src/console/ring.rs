//! The newest bytes of a console, by their position in all that was ever written to it.

use alloc::vec::Vec;

/// A ring of `N` bytes, a power of two. A position counts bytes from the first one written, from 0.
#[derive(Debug)]
pub(super) struct Ring<const N: usize> {
    /// `N` of them.
    bytes: Vec<u8>,
    written: u64,
}

impl<const N: usize> Ring<N> {
    /// An empty ring.
    pub(super) fn new() -> Self {
        const { assert!(N.is_power_of_two()) };
        Ring {
            bytes: alloc::vec![0; N],
            written: 0,
        }
    }

    /// The position behind the newest byte.
    pub(super) fn end(&self) -> u64 {
        self.written
    }

    /// The position of the oldest byte that is kept.
    pub(super) fn start(&self) -> u64 {
        self.written.saturating_sub(N as u64)
    }

    /// Appends bytes. The oldest make room.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let at = Self::index(self.written);
            self.bytes[at] = byte;
            self.written += 1;
        }
    }

    /// The byte at a position, if it is kept.
    pub(super) fn get(&self, position: u64) -> Option<u8> {
        let kept = (self.start()..self.written).contains(&position);
        kept.then(|| self.bytes[Self::index(position)])
    }

    fn index(position: u64) -> usize {
        position as usize % N
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_are_kept() {
        let mut ring = Ring::<4>::new();
        ring.push(b"abc");
        assert_eq!((ring.start(), ring.end(), ring.get(3)), (0, 3, None));
        ring.push(b"defg");
        assert_eq!((ring.start(), ring.end()), (3, 7));
        let kept: Vec<_> = (0..8).filter_map(|n| ring.get(n)).collect();
        assert_eq!(kept, b"defg");
    }
}
