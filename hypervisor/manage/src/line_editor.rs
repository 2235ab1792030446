//! One line that is typed on a VT100-like terminal: editing, history, search.
//!
//! [`Keys`] turns bytes into keys; [`LineEditor`] turns keys into a line, and writes what the terminal has to show.
//! The line is shown in one row: a long one is shown in part, around the cursor, so that nothing depends on how a
//! terminal wraps. Of escape sequences only those of the cursor keys and their neighbours mean anything; others are
//! read to their end and forgotten.
//!
//! Invariants: memory is bounded (a line of [`MAX_LINE`] bytes, a history of [`MAX_HISTORY`] lines); the line is
//! printable ASCII; the cursor stands within it or at its end.

use alloc::{borrow::ToOwned, collections::VecDeque, format, string::String};

/// Longest line, in bytes.
pub const MAX_LINE: usize = 1024;
/// Lines that the history keeps.
pub const MAX_HISTORY: usize = 64;
/// Columns of the terminal, of which the last stays free.
const COLUMNS: usize = 80;
/// Columns by which a long line jumps when the cursor leaves what is shown.
const JUMP: usize = 20;

const BELL: &str = "\x07";

/// A key, or what stands for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the keys'")]
pub enum Key {
    /// Printable ASCII.
    Char(char),
    /// Ctrl with this lower-case letter.
    Ctrl(char),
    Enter,
    Tab,
    Backspace,
    Delete,
    Left,
    Right,
    Up,
    Down,
    Home,
    End,
    /// Bytes that mean nothing here.
    Unknown,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    /// ESC has come.
    Escape,
    /// ESC [ has come, and this first parameter.
    Csi(u8),
    /// ESC O has come.
    Ss3,
}

/// Turns a terminal's bytes into keys.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys {
    sequence: Sequence,
    /// The last byte was a carriage return: a line feed after it belongs to it.
    after_return: bool,
}

impl Keys {
    /// The next byte. `None`: more has to come.
    pub fn feed(&mut self, byte: u8) -> Option<Key> {
        let after_return = core::mem::replace(&mut self.after_return, byte == b'\r');
        match (self.sequence, byte) {
            // A new sequence, or a line's end, ends one that was cut.
            (_, 0x1b) => {
                self.sequence = Sequence::Escape;
                None
            }
            (_, b'\r' | b'\n') => {
                self.sequence = Sequence::None;
                (byte == b'\r' || !after_return).then_some(Key::Enter)
            }
            (Sequence::Escape, b'[') => {
                self.sequence = Sequence::Csi(0);
                None
            }
            (Sequence::Escape, b'O') => {
                self.sequence = Sequence::Ss3;
                None
            }
            (Sequence::Csi(first), b'0'..=b'9') => {
                let first = first.saturating_mul(10).saturating_add(byte - b'0');
                self.sequence = Sequence::Csi(first);
                None
            }
            // ECMA-48 5.4: parameters and intermediates up to a final byte.
            (Sequence::Csi(_), 0x20..=0x3f) => None,
            (Sequence::Csi(first), _) => {
                self.sequence = Sequence::None;
                Some(Self::last_of_csi(first, byte))
            }
            (Sequence::Ss3, _) => {
                self.sequence = Sequence::None;
                Some(Self::last_of_csi(0, byte))
            }
            (Sequence::Escape, _) => {
                self.sequence = Sequence::None;
                Some(Key::Unknown)
            }
            (Sequence::None, _) => Some(Self::plain(byte)),
        }
    }

    fn plain(byte: u8) -> Key {
        match byte {
            b' '..=b'~' => Key::Char(char::from(byte)),
            b'\t' => Key::Tab,
            0x08 | 0x7f => Key::Backspace,
            1..=26 => Key::Ctrl(char::from(byte - 1 + b'a')),
            _ => Key::Unknown,
        }
    }

    fn last_of_csi(first: u8, last: u8) -> Key {
        match (last, first) {
            (b'A', _) => Key::Up,
            (b'B', _) => Key::Down,
            (b'C', _) => Key::Right,
            (b'D', _) => Key::Left,
            (b'H', _) | (b'~', 1 | 7) => Key::Home,
            (b'F', _) | (b'~', 4 | 8) => Key::End,
            (b'~', 3) => Key::Delete,
            _ => Key::Unknown,
        }
    }
}

/// What a key means to whoever reads lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// The line changed, or nothing did.
    Going,
    /// A line is finished.
    Line(String),
    /// Completion is asked for at the cursor.
    Complete,
    /// The line was thrown away.
    Interrupted,
    /// The end of input, on an empty line.
    EndOfInput,
    /// A clear screen is asked for; the prompt is to be shown again.
    Clear,
}

/// Where one is in the history.
#[derive(Clone, Debug, Default)]
enum Browsing {
    /// At the line that is being typed.
    #[default]
    No,
    /// At an entry, by its index; found by what was typed, kept here.
    At(usize, String),
    /// Searching backwards for this text; at an entry if one has it.
    Search(String, Option<usize>),
}

/// A line under edit.
#[derive(Clone, Debug)]
pub struct LineEditor {
    prompt: String,
    line: String,
    cursor: usize,
    /// First byte of the line that is shown.
    left: usize,
    history: VecDeque<String>,
    browsing: Browsing,
}

impl LineEditor {
    /// An empty line after `prompt`, which is short and printable ASCII.
    pub fn new(prompt: &str) -> Self {
        Self {
            prompt: prompt.into(),
            line: String::new(),
            cursor: 0,
            left: 0,
            history: VecDeque::new(),
            browsing: Browsing::No,
        }
    }

    /// The line as it is.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// The line before the cursor.
    pub fn before_cursor(&self) -> &str {
        &self.line[..self.cursor]
    }

    /// Shows prompt and line, at the beginning of the terminal's row.
    pub fn redraw(&mut self, out: &mut String) {
        let searching = match &self.browsing {
            Browsing::Search(text, found) => {
                let failed = if found.is_none() && !text.is_empty() {
                    "no "
                } else {
                    ""
                };
                // Only its end counts when it is long.
                let tail = &text[text.len().saturating_sub(COLUMNS / 4)..];
                Some(format!("({failed}search \"{tail}\") "))
            }
            _ => None,
        };
        let prompt = searching.as_deref().unwrap_or(&self.prompt);
        let room = COLUMNS.saturating_sub(prompt.len() + 1).max(JUMP + 1);
        if self.line.len() <= room {
            self.left = 0;
        } else if self.cursor < self.left {
            self.left = self.cursor.saturating_sub(JUMP);
        } else if self.cursor - self.left > room {
            self.left = self.cursor - room + JUMP.min(room);
        }
        let shown = &self.line[self.left..self.line.len().min(self.left + room)];
        *out += "\r";
        *out += prompt;
        *out += shown;
        *out += "\x1b[K";
        let back = shown.len() - (self.cursor - self.left).min(shown.len());
        if back > 0 {
            *out += &format!("\x1b[{back}D");
        }
    }

    /// One key. Writes what the terminal has to show.
    pub fn key(&mut self, key: Key, out: &mut String) -> Edit {
        if let Browsing::Search(..) = self.browsing {
            let ended = self.search_key(key);
            self.redraw(out);
            if !ended {
                return Edit::Going;
            }
        }
        match key {
            Key::Enter => return self.finish(out),
            Key::Tab => return Edit::Complete,
            Key::Ctrl('c') => {
                self.show_end(out);
                let column = self.prompt.len() + self.cursor - self.left;
                if column + 2 >= COLUMNS {
                    // The row is full: over its end.
                    *out += "\x1b[2D";
                }
                *out += "^C\r\n";
                self.set("");
                self.browsing = Browsing::No;
                return Edit::Interrupted;
            }
            Key::Ctrl('d') if self.line.is_empty() => return Edit::EndOfInput,
            Key::Ctrl('l') => return Edit::Clear,
            Key::Char(c) => return self.typed(c, out),
            _ => {}
        }
        if self.edit(key) {
            self.redraw(out);
        } else {
            *out += BELL;
        }
        Edit::Going
    }

    /// A key that moves, deletes or browses. `false`: it could not.
    fn edit(&mut self, key: Key) -> bool {
        let (cursor, length) = (self.cursor, self.line.len());
        match key {
            Key::Left | Key::Ctrl('b') if cursor > 0 => self.cursor -= 1,
            Key::Right | Key::Ctrl('f') if cursor < length => self.cursor += 1,
            Key::Home | Key::Ctrl('a') => self.cursor = 0,
            Key::End | Key::Ctrl('e') => self.cursor = length,
            Key::Backspace if cursor > 0 => self.remove(cursor - 1..cursor),
            Key::Delete | Key::Ctrl('d') if cursor < length => self.remove(cursor..cursor + 1),
            Key::Ctrl('k') => self.remove(cursor..length),
            Key::Ctrl('u') => self.remove(0..cursor),
            Key::Ctrl('w') => {
                let before = self.before_cursor().trim_end();
                let start = before.rfind(' ').map_or(0, |blank| blank + 1);
                self.remove(start..cursor);
            }
            Key::Up | Key::Ctrl('p') => return self.older(),
            Key::Down | Key::Ctrl('n') => return self.newer(),
            Key::Ctrl('r') => self.browsing = Browsing::Search(String::new(), None),
            _ => return false,
        }
        true
    }

    fn remove(&mut self, range: core::ops::Range<usize>) {
        self.cursor = range.start;
        self.line.replace_range(range, "");
    }

    fn typed(&mut self, c: char, out: &mut String) -> Edit {
        if !self.insert_char(c) {
            *out += BELL;
            return Edit::Going;
        }
        let column = self.prompt.len() + self.cursor - self.left;
        if self.cursor == self.line.len() && column < COLUMNS - 1 {
            out.push(c);
        } else {
            self.redraw(out);
        }
        Edit::Going
    }

    fn insert_char(&mut self, c: char) -> bool {
        let fits = self.line.len() < MAX_LINE && matches!(c, ' '..='~');
        if fits {
            self.line.insert(self.cursor, c);
            self.cursor += 1;
        }
        fits
    }

    /// Inserts at the cursor what fits, and shows it.
    pub fn insert(&mut self, text: &str, out: &mut String) {
        let all = text.chars().all(|c| self.insert_char(c));
        self.redraw(out);
        if !all {
            *out += BELL;
        }
    }

    /// Moves the terminal's cursor behind the line.
    fn show_end(&mut self, out: &mut String) {
        self.cursor = self.line.len();
        self.redraw(out);
    }

    fn set(&mut self, line: &str) {
        line.clone_into(&mut self.line);
        self.cursor = self.line.len();
        self.left = 0;
    }

    fn finish(&mut self, out: &mut String) -> Edit {
        self.browsing = Browsing::No;
        self.show_end(out);
        *out += "\r\n";
        let line = core::mem::take(&mut self.line);
        self.set("");
        self.remember(&line);
        Edit::Line(line)
    }

    fn remember(&mut self, line: &str) {
        if line.trim().is_empty() || self.history.back().is_some_and(|last| last == line) {
            return;
        }
        if self.history.len() == MAX_HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(line.into());
    }

    /// The entry before `before` that begins with `prefix` and is another line than the one shown.
    fn older(&mut self) -> bool {
        let (before, typed) = match &self.browsing {
            Browsing::At(at, typed) => (*at, typed.clone()),
            _ => (self.history.len(), self.line.clone()),
        };
        let fits = |line: &&String| line.starts_with(&typed) && **line != self.line;
        let found = (0..before)
            .rev()
            .find(|&n| self.history.get(n).as_ref().is_some_and(fits));
        let Some(found) = found else { return false };
        self.go_to(found, typed);
        true
    }

    fn newer(&mut self) -> bool {
        let Browsing::At(at, typed) = core::mem::take(&mut self.browsing) else {
            return false;
        };
        let fits = |line: &&String| line.starts_with(&typed) && **line != self.line;
        let mut later = at + 1..self.history.len();
        match later.find(|&n| self.history.get(n).as_ref().is_some_and(fits)) {
            Some(found) => self.go_to(found, typed),
            None => self.set(&typed),
        }
        true
    }

    fn go_to(&mut self, entry: usize, typed: String) {
        let line = self.history.get(entry).cloned().unwrap_or_default();
        self.set(&line);
        self.browsing = Browsing::At(entry, typed);
    }

    /// A key during a search. `true`: the search has ended, and the key has its usual meaning.
    fn search_key(&mut self, key: Key) -> bool {
        let Browsing::Search(mut text, found) = core::mem::take(&mut self.browsing) else {
            return true;
        };
        let newest = self.history.len().saturating_sub(1);
        let from = match key {
            Key::Char(c) if text.len() < MAX_LINE => {
                text.push(c);
                found.unwrap_or(newest)
            }
            Key::Backspace => {
                text.pop();
                newest
            }
            Key::Ctrl('r') => match found {
                Some(0) | None => newest,
                Some(at) => at - 1,
            },
            Key::Ctrl('g') | Key::Unknown => return false,
            _ => return true,
        };
        let has = |n: &usize| {
            self.history
                .get(*n)
                .is_some_and(|line| line.contains(&text))
        };
        let now = (0..=from).rev().find(has).filter(|_| !text.is_empty());
        if let Some(line) = now.and_then(|n| self.history.get(n)).cloned() {
            self.set(&line);
        }
        self.browsing = Browsing::Search(text, now);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{string::ToString, vec::Vec};
    use proptest::prelude::*;

    /// A row of a terminal, as far as the editor uses it.
    fn row(written: &str) -> (String, usize) {
        let (mut row, mut column) = (Vec::new(), 0usize);
        let mut chars = written.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '\r' => column = 0,
                '\n' => row.clear(),
                '\x07' => {}
                '\x1b' => {
                    assert_eq!(chars.next(), Some('['));
                    let mut number = String::new();
                    while chars.peek().is_some_and(char::is_ascii_digit) {
                        number.extend(chars.next());
                    }
                    match chars.next() {
                        Some('K') => row.truncate(column),
                        Some('D') => column -= number.parse::<usize>().unwrap(),
                        other => panic!("{other:?}"),
                    }
                }
                c => {
                    if row.len() <= column {
                        row.resize(column + 1, ' ');
                    }
                    row[column] = c;
                    column += 1;
                    assert!(column < COLUMNS, "the row is full");
                }
            }
        }
        (row.into_iter().collect(), column)
    }

    struct Typist {
        keys: Keys,
        editor: LineEditor,
        written: String,
    }

    impl Typist {
        fn new() -> Self {
            let mut typist = Typist {
                keys: Keys::default(),
                editor: LineEditor::new("> "),
                written: String::new(),
            };
            typist.editor.redraw(&mut typist.written);
            typist
        }

        /// Types, and returns what came of the last key.
        fn types(&mut self, bytes: impl AsRef<[u8]>) -> Edit {
            let mut last = Edit::Going;
            for &byte in bytes.as_ref() {
                if let Some(key) = self.keys.feed(byte) {
                    last = self.editor.key(key, &mut self.written);
                    if matches!(last, Edit::Line(_) | Edit::Interrupted) {
                        self.editor.redraw(&mut self.written);
                    }
                }
            }
            last
        }

        fn shows(&self) -> String {
            row(&self.written).0
        }
    }

    #[test]
    fn an_interrupt_of_a_full_row_stays_in_it() {
        for length in 70..90 {
            let mut typist = Typist::new();
            typist.types("x".repeat(length) + "\x03");
            assert_eq!(typist.shows(), "> ", "{length}");
        }
    }

    #[test]
    fn keys_edit_the_line() {
        for (typed, line) in [
            ("abc\x1b[D\x1b[DX", "aXbc"),
            ("abc\x1b[HX\x1b[FY", "XabcY"),
            ("abc\x1bOHX\x1bOFY", "XabcY"),
            ("abc\x1b[1~X\x1b[4~Y", "XabcY"),
            ("abc\x01X\x05Y", "XabcY"),
            ("abc\x1b[D\x7fX", "aXc"),
            ("abc\x1b[D\x1b[3~X", "abX"),
            ("abc\x01\x04X", "Xbc"),
            ("abc def\x01\x1b[C\x0b", "a"),
            ("abc def\x1b[D\x15", "f"),
            ("vm show  web \x17x", "vm show  x"),
            ("abc\x03de", "de"),
            ("a\x1b[1;5Zb\x1b]c\x1b[200~d\x00\u{7}e", "abcde"),
            ("a\u{e4}b", "ab"),
        ] {
            let mut typist = Typist::new();
            let finished = typist.types(format!("{typed}\r"));
            assert_eq!(finished, Edit::Line(line.to_string()), "{typed:?}");
        }
    }

    #[test]
    fn the_terminal_shows_the_line_and_the_cursor() {
        let mut typist = Typist::new();
        typist.types("abc\x1b[D\x1b[DX");
        assert_eq!(row(&typist.written), ("> aXbc".into(), 4));
    }

    #[test]
    fn a_long_line_is_shown_in_part() {
        let mut typist = Typist::new();
        typist.types("0123456789".repeat(20));
        let (shown, column) = row(&typist.written);
        assert!(shown.ends_with("6789") && column == shown.len() && column < COLUMNS);
        typist.types("\x01");
        assert!(typist.shows().starts_with("> 0123456789"));
        assert_eq!(row(&typist.written).1, 2);
        typist.types([b'x'; 2 * MAX_LINE]);
        assert_eq!(typist.editor.line().len(), MAX_LINE);
    }

    #[test]
    fn the_history_is_browsed_by_what_was_typed() {
        let mut typist = Typist::new();
        typist.types("vm list\rhost show\rvm show a\rvm show a\r\r");
        typist.types("\x1b[A");
        assert_eq!(typist.shows(), "> vm show a");
        typist.types("\x1b[A\x1b[A\x1b[A");
        assert_eq!(typist.shows(), "> vm list", "and no further");
        typist.types("\x1b[B\x1b[B\x1b[B");
        assert_eq!(typist.shows(), "> ");
        typist.types("vm\x1b[A\x1b[A");
        assert_eq!(typist.shows(), "> vm list");
        typist.types("\x1b[B\x1b[B");
        assert_eq!(typist.shows(), "> vm");
    }

    #[test]
    fn the_history_is_searched() {
        let mut typist = Typist::new();
        typist.types("vm list\rhost show\rvm show a\r\x12sho");
        assert_eq!(typist.shows(), "(search \"sho\") vm show a");
        typist.types("\x12");
        assert_eq!(typist.shows(), "(search \"sho\") host show");
        typist.types("x");
        assert_eq!(typist.shows(), "(no search \"shox\") host show");
        typist.types("\x7f\x7f\x7f");
        assert_eq!(typist.types("\r"), Edit::Line("vm show a".into()));
        typist.types("\x12list\x07");
        assert_eq!(typist.shows(), "> vm list", "found, and not run yet");
    }

    #[test]
    fn ends_and_interruptions() {
        let mut typist = Typist::new();
        assert_eq!(typist.types("\x04"), Edit::EndOfInput);
        assert_eq!(typist.types("a\x04"), Edit::Going);
        assert_eq!(typist.types("\x03"), Edit::Interrupted);
        assert_eq!(typist.types("\x0c"), Edit::Clear);
        assert_eq!(typist.types("\t"), Edit::Complete);
        assert_eq!(typist.types("a\r\n"), Edit::Line("a".into()));
        assert_eq!(
            typist.types("b\n"),
            Edit::Line("b".into()),
            "a line feed alone ends a line"
        );
    }

    #[test]
    fn a_cut_sequence_ends_with_the_line() {
        let mut typist = Typist::new();
        assert_eq!(typist.types("ab\x1b[12;\r"), Edit::Line("ab".into()));
    }

    proptest! {
        #[test]
        fn any_bytes_keep_the_line_sound(bytes in prop::collection::vec(
            prop_oneof![any::<u8>(), b' '..=b'~', Just(0x1b), Just(b'['), b'A'..=b'D', 1u8..=27], 0..400))
        {
            let mut typist = Typist::new();
            for byte in bytes {
                typist.types([byte]);
                let editor = &typist.editor;
                prop_assert!(editor.cursor <= editor.line.len() && editor.left <= editor.cursor);
                prop_assert!(editor.history.len() <= MAX_HISTORY);
                let (shown, column) = row(&typist.written);
                prop_assert!(column < COLUMNS);
                if !matches!(editor.browsing, Browsing::Search(..)) && editor.line.len() < 70 {
                    prop_assert_eq!(shown, format!("> {}", editor.line));
                    prop_assert_eq!(column, editor.cursor + 2);
                }
                if typist.written.len() > 400 {
                    typist.written.clear();
                    typist.editor.redraw(&mut typist.written);
                }
            }
        }
    }
}
