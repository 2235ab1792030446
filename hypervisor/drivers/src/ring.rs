//! A log of fixed size that forgets its oldest lines.
//!
//! Lines are kept as bytes with a newline after each. What does not fit pushes out the
//! oldest bytes; a line that lost its beginning is not shown. Pure: no lock, no hardware.

/// Text ring of `N` bytes. `N` must not be 0.
pub struct LogRing<const N: usize> {
    bytes: [u8; N],
    /// Bytes ever written; the newest is at `(written - 1) % N`.
    written: u64,
    /// Lines ever written.
    lines: u64,
}

impl<const N: usize> LogRing<N> {
    /// An empty ring.
    pub const fn new() -> Self {
        const { assert!(N > 0) };
        LogRing {
            bytes: [0; N],
            written: 0,
            lines: 0,
        }
    }

    /// Appends a line. A newline is added; those within `line` become spaces.
    pub fn push(&mut self, line: &[u8]) {
        for &byte in line {
            self.put(if byte == b'\n' { b' ' } else { byte });
        }
        self.put(b'\n');
        self.lines += 1;
    }

    /// Lines ever appended.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    fn put(&mut self, byte: u8) {
        self.bytes[(self.written % N as u64) as usize] = byte;
        self.written += 1;
    }

    /// Calls `each` for the last `count` whole lines, oldest first, in at most two pieces per line
    /// (where the ring wraps); the second argument is true for a line's last piece.
    pub fn last_lines(&self, count: usize, mut each: impl FnMut(&[u8], bool)) {
        let oldest = self.written.saturating_sub(N as u64);
        let at = |position: u64| self.bytes[(position % N as u64) as usize];
        // Walk back over `count` newlines; a line counts as whole when the byte before it is a newline or nothing was lost.
        let mut start = self.written;
        let mut lines = 0;
        let mut position = self.written;
        while position > oldest && lines < count {
            position -= 1;
            let begins = position == 0 || (position > oldest && at(position - 1) == b'\n');
            if begins {
                start = position;
                lines += 1;
            }
        }
        while start < self.written {
            let mut end = start;
            while at(end) != b'\n' {
                end += 1;
            }
            let (from, to) = ((start % N as u64) as usize, (end % N as u64) as usize);
            if from <= to {
                each(&self.bytes[from..to], true);
            } else {
                each(&self.bytes[from..], false);
                each(&self.bytes[..to], true);
            }
            start = end + 1;
        }
    }
}

impl<const N: usize> Default for LogRing<N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines<const N: usize>(ring: &LogRing<N>, count: usize) -> Vec<String> {
        let mut out = Vec::new();
        let mut line = Vec::new();
        ring.last_lines(count, |piece, last| {
            line.extend_from_slice(piece);
            if last {
                out.push(String::from_utf8(core::mem::take(&mut line)).unwrap());
            }
        });
        out
    }

    #[test]
    fn keeps_the_last_lines_in_order() {
        let mut ring = LogRing::<64>::new();
        assert_eq!(lines(&ring, 5), Vec::<String>::new());
        for text in ["one", "two", "three"] {
            ring.push(text.as_bytes());
        }
        assert_eq!(ring.lines(), 3);
        assert_eq!(lines(&ring, 2), ["two", "three"]);
        assert_eq!(lines(&ring, 9), ["one", "two", "three"]);
    }

    #[test]
    fn a_line_that_lost_its_beginning_is_not_shown() {
        let mut ring = LogRing::<8>::new();
        ring.push(b"abcdef");
        ring.push(b"xy");
        assert_eq!(lines(&ring, 9), ["xy"]);
    }

    #[test]
    fn a_line_longer_than_the_ring_leaves_it_empty() {
        let mut ring = LogRing::<4>::new();
        ring.push(b"longer than four");
        assert_eq!(lines(&ring, 9), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn shows_exactly_the_newest_lines_that_fit(texts in prop::collection::vec("[a-z]{0,9}", 0..40)) {
            const N: usize = 32;
            let mut ring = LogRing::<N>::new();
            for text in &texts {
                ring.push(text.as_bytes());
            }
            let mut expected: Vec<String> = Vec::new();
            let mut used = 0;
            let mut dropped = false;
            for text in texts.iter().rev() {
                used += text.len() + 1;
                // The byte before a line must still be known, unless the line is the very first.
                let first = expected.len() + 1 == texts.len();
                if used > N || (used == N && !first) {
                    dropped = true;
                }
                if dropped { break; }
                expected.insert(0, text.clone());
            }
            prop_assert_eq!(lines(&ring, usize::MAX), expected);
        }
    }
}
