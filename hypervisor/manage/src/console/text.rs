//! Short lines without the heap.

use core::fmt;

/// A line put together without the heap; what does not fit is cut.
pub struct Text {
    bytes: [u8; 120],
    length: usize,
}

impl Text {
    /// The words, of which the first 120 bytes are kept.
    pub fn new(words: fmt::Arguments<'_>) -> Self {
        let mut text = Text {
            bytes: [0; 120],
            length: 0,
        };
        // It cuts, and never fails.
        let _ = fmt::write(&mut text, words);
        text
    }

    /// What was kept.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        Ok(())
    }
}
