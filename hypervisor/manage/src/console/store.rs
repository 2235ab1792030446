//! One console: what was written to it, and how far that was shown.

use alloc::string::{String, ToString};

use super::{HISTORY_BYTES, LONGEST_LINE, PATIENCE_US, filter::Filter, ring::Ring};

/// A console that is not attached yet: all of its memory.
#[derive(Debug)]
pub struct Prepared(pub(super) Console);

impl Prepared {
    /// Takes a console's memory.
    pub fn new(name: &str) -> Self {
        Prepared(Console {
            name: name.to_string(),
            ring: Ring::new(),
            shown: 0,
            searched: 0,
            refused: false,
            marked: false,
            filter: Filter::default(),
            silent: None,
        })
    }
}

/// What was written to one console, and how far it was shown.
#[derive(Debug)]
pub(super) struct Console {
    pub(super) name: String,
    pub(super) ring: Ring<HISTORY_BYTES>,
    /// Position behind what was shown.
    pub(super) shown: u64,
    /// Position before which no line feed has not been shown.
    pub(super) searched: u64,
    /// Output was refused.
    pub(super) refused: bool,
    /// It wrote control sequences to the terminal.
    pub(super) marked: bool,
    pub(super) filter: Filter,
    /// Since when nothing was written behind this position, in microseconds.
    pub(super) silent: Option<(u64, u64)>,
}

impl Console {
    /// Bytes that were not shown and are kept.
    pub(super) fn waiting(&self) -> usize {
        (self.ring.end() - self.shown.max(self.ring.start())) as usize
    }

    /// Bytes that fit before something is forgotten that was not shown.
    pub(super) fn room(&self) -> usize {
        HISTORY_BYTES - self.waiting()
    }

    /// The next byte to show.
    pub(super) fn next(&self) -> Option<u8> {
        self.ring.get(self.shown.max(self.ring.start()))
    }

    /// The next byte has been shown.
    pub(super) fn advance(&mut self) {
        self.shown = self.shown.max(self.ring.start()) + 1;
    }

    /// Whether a whole line has not been shown yet.
    fn has_line(&mut self) -> bool {
        self.searched = self.searched.max(self.shown).max(self.ring.start());
        while let Some(byte) = self.ring.get(self.searched) {
            if byte == b'\n' {
                return true;
            }
            self.searched += 1;
        }
        false
    }

    /// Whether it may take the terminal's next row.
    pub(super) fn is_due(&mut self, now_us: u64) -> bool {
        if self.waiting() == 0 {
            self.silent = None;
            return false;
        }
        if self.waiting() >= LONGEST_LINE || self.has_line() {
            return true;
        }
        match self.silent {
            Some((end, since)) if end == self.ring.end() => {
                now_us.saturating_sub(since) >= PATIENCE_US
            }
            _ => {
                self.silent = Some((self.ring.end(), now_us));
                false
            }
        }
    }
}
