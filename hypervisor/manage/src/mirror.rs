//! A guest's screen of text on a terminal: what changed, row by row.
//!
//! The terminal is sent whole rows, each with its place (ECMA-48 CUP, EL and SGR), so that a person sees the
//! guest's screen, and a program that reads the output finds each line of text in one piece. Text is
//! ASCII; what stands out on the screen (a dark letter on a bright ground) is sent inverse.
//!
//! Invariants: memory is bounded and there from the start; one call sends at most [`ROWS_AT_ONCE`] rows, however
//! often the guest changes them; what the terminal has no room for is sent later, and no row is sent in part.

use alloc::{vec, vec::Vec};
use core::fmt::Write;

/// Most columns of a screen.
pub const MAX_COLUMNS: usize = 132;
/// Most rows of a screen.
pub const MAX_ROWS: usize = 60;
/// Rows sent by one call.
pub const ROWS_AT_ONCE: usize = 8;

/// Clears the terminal's screen, plain letters.
const CLEAR: &str = "\x1b[0m\x1b[H\x1b[2J";
/// From inverse letters to plain ones.
const PLAIN: &str = "\x1b[0m";
const INVERSE: &str = "\x1b[7m";
/// Erases the rest of a row.
const ERASE: &str = "\x1b[K";

/// A character of a guest's screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Letter {
    /// Printable ASCII.
    pub ascii: u8,
    /// It stands out.
    pub inverse: bool,
}

const BLANK: Letter = Letter {
    ascii: b' ',
    inverse: false,
};

/// A guest's screen.
#[derive(Clone, Copy, Debug)]
pub struct Screen<'a> {
    /// 1 to [`MAX_COLUMNS`].
    pub columns: usize,
    /// The rows, up to [`MAX_ROWS`] of so many columns.
    pub letters: &'a [Letter],
    /// Row and column of the cursor, if it is shown.
    pub cursor: Option<(usize, usize)>,
}

/// What the terminal shows of a screen.
#[derive(Debug)]
pub struct Mirror {
    columns: usize,
    rows: usize,
    /// As the terminal shows them, [`MAX_COLUMNS`] for each row.
    shown: Vec<Letter>,
    cursor: Option<(usize, usize)>,
    /// The terminal shows something else.
    fresh: bool,
    /// What the terminal had no room for.
    waiting: Text,
    /// Where the next call looks first, so that a row that changes all the time does not hold up the others.
    next: usize,
}

/// Text for the terminal, with room for the longest row.
#[derive(Debug)]
struct Text(Vec<u8>);

impl Text {
    /// Where it stands, each letter with a change to inverse and one back, and the erasing.
    const CAPACITY: usize = MAX_COLUMNS * (1 + INVERSE.len() + PLAIN.len()) + 64;

    fn new() -> Self {
        Text(Vec::with_capacity(Self::CAPACITY))
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = Self::CAPACITY - self.0.len();
        let text = text.as_bytes().get(..text.len().min(room));
        self.0.extend_from_slice(text.unwrap_or_default());
        Ok(())
    }
}

impl Mirror {
    /// A mirror of nothing yet.
    pub fn new() -> Self {
        Mirror {
            columns: 0,
            rows: 0,
            shown: vec![BLANK; MAX_COLUMNS * MAX_ROWS],
            cursor: None,
            fresh: true,
            waiting: Text::new(),
            next: 0,
        }
    }

    /// The terminal has shown something else: all is sent again.
    pub fn forget(&mut self) {
        self.fresh = true;
        self.waiting.0.clear();
    }

    /// Sends what has changed, as far as `send` takes it: that gets bytes and returns how many it took.
    pub fn update(&mut self, screen: &Screen<'_>, mut send: impl FnMut(&[u8]) -> usize) {
        if screen.columns == 0 || !self.send_waiting(&mut send) {
            return;
        }
        let columns = screen.columns.min(MAX_COLUMNS);
        let rows = (screen.letters.len() / screen.columns).min(MAX_ROWS);
        if self.fresh || (self.columns, self.rows) != (columns, rows) {
            (self.columns, self.rows) = (columns, rows);
            self.fresh = false;
            self.cursor = None;
            self.shown.fill(BLANK);
            self.next = 0;
            self.say(format_args!("{CLEAR}"));
            if !self.send_waiting(&mut send) {
                return;
            }
        }
        let mut left = ROWS_AT_ONCE;
        let first = self.next;
        for row in (first..rows).chain(0..first.min(rows)) {
            let letters = &screen.letters[row * screen.columns..][..columns];
            let shown = &mut self.shown[row * MAX_COLUMNS..][..columns];
            if shown == letters {
                continue;
            }
            if left == 0 {
                self.next = row;
                return;
            }
            left -= 1;
            shown.copy_from_slice(letters);
            self.cursor = None;
            self.put_row(row, letters);
            if !self.send_waiting(&mut send) {
                self.next = row + 1;
                return;
            }
        }
        self.next = 0;
        if let Some((row, column)) = screen.cursor
            && self.cursor != screen.cursor
        {
            self.cursor = screen.cursor;
            self.say(format_args!("\x1b[{};{}H", row + 1, column + 1));
            self.send_waiting(&mut send);
        }
    }

    /// Whether nothing waits any more.
    fn send_waiting(&mut self, send: &mut impl FnMut(&[u8]) -> usize) -> bool {
        let bytes = &mut self.waiting.0;
        if !bytes.is_empty() {
            let taken = send(bytes).min(bytes.len());
            bytes.drain(..taken);
        }
        bytes.is_empty()
    }

    fn say(&mut self, words: core::fmt::Arguments<'_>) {
        // It has room for the longest row, and never fails.
        let _ = self.waiting.write_fmt(words);
    }

    fn put_row(&mut self, row: usize, letters: &[Letter]) {
        let last = letters.iter().rposition(|&letter| letter != BLANK);
        let letters = &letters[..last.map_or(0, |last| last + 1)];
        self.say(format_args!("\x1b[{};1H", row + 1));
        let mut inverse = false;
        for letter in letters {
            if letter.inverse != inverse {
                inverse = letter.inverse;
                self.say(format_args!("{}", if inverse { INVERSE } else { PLAIN }));
            }
            self.waiting.0.push(letter.ascii);
        }
        if inverse {
            self.say(format_args!("{PLAIN}"));
        }
        self.say(format_args!("{ERASE}"));
    }
}

impl Default for Mirror {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    fn letters(rows: &[&str]) -> Vec<Letter> {
        let columns = 20;
        rows.iter()
            .flat_map(|row| {
                let mut bytes = row.as_bytes().to_vec();
                bytes.resize(columns, b' ');
                bytes
            })
            .map(|byte| Letter {
                ascii: byte.to_ascii_lowercase(),
                // Capitals stand out.
                inverse: byte.is_ascii_uppercase(),
            })
            .collect()
    }

    fn update(mirror: &mut Mirror, rows: &[&str], cursor: Option<(usize, usize)>) -> String {
        let letters = letters(rows);
        let screen = Screen {
            columns: 20,
            letters: &letters,
            cursor,
        };
        let mut sent = Vec::new();
        mirror.update(&screen, |bytes| {
            sent.extend_from_slice(bytes);
            bytes.len()
        });
        String::from_utf8(sent).unwrap()
    }

    #[test]
    fn only_changed_rows_are_sent_each_in_one_piece() {
        let mut mirror = Mirror::new();
        let first = update(&mut mirror, &["hello", "", "there"], Some((2, 5)));
        assert_eq!(
            first,
            "\x1b[0m\x1b[H\x1b[2J\x1b[1;1Hhello\x1b[K\x1b[3;1Hthere\x1b[K\x1b[3;6H"
        );
        let rows = ["hello", "", "there"];
        assert_eq!(update(&mut mirror, &rows, Some((2, 5))), "");
        assert_eq!(update(&mut mirror, &rows, Some((0, 0))), "\x1b[1;1H");
        let second = update(&mut mirror, &["hello", "", "thERe"], None);
        assert_eq!(second, "\x1b[3;1Hth\x1b[7mer\x1b[0me\x1b[K");
        assert_eq!(
            update(&mut mirror, &["hello", "", ""], None),
            "\x1b[3;1H\x1b[K"
        );
        mirror.forget();
        assert!(update(&mut mirror, &["hello", "", ""], None).ends_with("2J\x1b[1;1Hhello\x1b[K"));
    }

    #[test]
    fn many_rows_take_several_calls_and_none_is_forgotten() {
        let mut mirror = Mirror::new();
        let names: Vec<String> = (0..25).map(|n| alloc::format!("row {n} ")).collect();
        let mut rows: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut all = String::new();
        for turn in 0..4 {
            // The first row changes each time.
            rows[0] = ["a", "b", "c", "d"][turn];
            all += &update(&mut mirror, &rows, None);
        }
        for name in &names[1..] {
            assert!(all.contains(name.trim_end()), "{name}");
        }
        assert!(all.ends_with("\x1b[1;1Hd\x1b[K"), "{all}");
        assert_eq!(update(&mut mirror, &rows, None), "");
    }

    proptest! {
        /// However little is taken at a time, the terminal ends up with the screen.
        #[test]
        fn what_does_not_fit_comes_later(
            rooms in prop::collection::vec(0usize..40, 200..300),
            texts in prop::collection::vec("[a-z]{1,20}", 1..12),
        ) {
            let mut mirror = Mirror::new();
            let rows: Vec<&str> = texts.iter().map(String::as_str).collect();
            let letters = letters(&rows);
            let screen = Screen { columns: 20, letters: &letters, cursor: None };
            let mut sent = Vec::new();
            for room in rooms {
                let mut room = room + 1;
                mirror.update(&screen, |bytes| {
                    let taken = bytes.len().min(room);
                    room -= taken;
                    sent.extend_from_slice(&bytes[..taken]);
                    taken
                });
            }
            let sent = String::from_utf8(sent).unwrap();
            for (n, text) in texts.iter().enumerate() {
                let row = alloc::format!("\x1b[{};1H{text}\x1b[K", n + 1);
                prop_assert_eq!(sent.matches(&row).count(), 1);
            }
        }
    }
}
