//! A terminal's screen of text: what a VT100-like terminal would show of a stream of bytes.
//!
//! For consoles on the host's own screen. It knows what shells, boot loaders, installers and full-screen programs use
//! most: cursor movements, erasing, inserting and deleting, a scrolling region, colours, a hidden cursor (ECMA-48; VT102).
//! What it does not know it takes in and forgets. Answers that a terminal would give are not given.
//!
//! Invariants: memory is taken once, by [`Grid::new`]; each byte is bounded work (a screen of cells at most); the cursor
//! stands in the grid.

use alloc::{vec, vec::Vec};

use vte::{Params, Parser, Perform};

/// Columns between tabulator stops.
const TAB: usize = 8;
/// The colour of text unless it says otherwise, of the 16 of a PC's text mode in ANSI order: light grey on black.
const PLAIN: Colors = Colors {
    foreground: 7,
    background: 0,
};

/// Colours of a cell, 0 to 15 each: black, red, green, yellow, blue, magenta, cyan, white, and the same bright.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Colors {
    /// Of the character.
    pub foreground: u8,
    /// Behind it.
    pub background: u8,
}

/// A place for a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// What stands there.
    pub character: char,
    /// Its colours.
    pub colors: Colors,
    /// The cursor is here, and is to be seen.
    pub cursor: bool,
}

const BLANK: Cell = Cell {
    character: ' ',
    colors: PLAIN,
    cursor: false,
};

/// Attributes of what is written next.
#[derive(Clone, Copy, Debug)]
struct Pen {
    colors: Colors,
    bold: bool,
    reverse: bool,
}

impl Pen {
    const PLAIN: Pen = Pen {
        colors: PLAIN,
        bold: false,
        reverse: false,
    };

    fn colors(self) -> Colors {
        let Colors {
            mut foreground,
            background,
        } = self.colors;
        if self.bold && foreground < 8 {
            foreground += 8;
        }
        match self.reverse {
            true => Colors {
                foreground: background,
                background: foreground,
            },
            false => Colors {
                foreground,
                background,
            },
        }
    }

    /// SGR (ECMA-48 8.3.117), with the bright colours of later terminals.
    fn select(&mut self, params: &Params) {
        let mut params = params.iter().map(|p| p.first().copied().unwrap_or(0));
        while let Some(param) = params.next() {
            match param {
                0 => *self = Pen::PLAIN,
                1 => self.bold = true,
                22 => self.bold = false,
                7 => self.reverse = true,
                27 => self.reverse = false,
                30..=37 => self.colors.foreground = (param - 30) as u8,
                39 => self.colors.foreground = PLAIN.foreground,
                40..=47 => self.colors.background = (param - 40) as u8,
                49 => self.colors.background = PLAIN.background,
                90..=97 => self.colors.foreground = (param - 90 + 8) as u8,
                100..=107 => self.colors.background = (param - 100 + 8) as u8,
                // Of 256 colours the first 16 are these; others stay as they are.
                38 | 48 => match params.next() {
                    Some(5) => {
                        let color = params.next().filter(|&color| color < 16);
                        match (color, param) {
                            (Some(color), 38) => self.colors.foreground = color as u8,
                            (Some(color), _) => self.colors.background = color as u8,
                            (None, _) => {}
                        }
                    }
                    Some(2) => {
                        params.nth(2);
                    }
                    _ => {}
                },
                _ => {}
            }
        }
    }
}

struct State {
    columns: usize,
    rows: usize,
    cells: Vec<Cell>,
    row: usize,
    /// May be `columns`: the next character goes to the next row.
    column: usize,
    pen: Pen,
    saved: (usize, usize, Pen),
    /// First and last row that scroll.
    region: (usize, usize),
    hidden: bool,
}

/// A screen and the parser of what is written to it.
pub struct Grid {
    parser: Parser,
    state: State,
}

impl Grid {
    /// A blank screen; neither number is 0.
    pub fn new(columns: usize, rows: usize) -> Self {
        let (columns, rows) = (columns.max(1), rows.max(1));
        Grid {
            parser: Parser::new(),
            state: State {
                columns,
                rows,
                cells: vec![BLANK; columns * rows],
                row: 0,
                column: 0,
                pen: Pen::PLAIN,
                saved: (0, 0, Pen::PLAIN),
                region: (0, rows - 1),
                hidden: false,
            },
        }
    }

    /// Blank again, as at first.
    pub fn reset(&mut self) {
        self.parser = Parser::new();
        self.state.reset();
    }

    /// Takes in what is written.
    pub fn write(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.state, bytes);
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.state.columns
    }

    /// All cells, row by row.
    pub fn cells(&self) -> impl Iterator<Item = Cell> {
        let state = &self.state;
        let column = state.column.min(state.columns - 1);
        let cursor = (!state.hidden).then_some(state.row * state.columns + column);
        let seen = move |(n, cell): (usize, &Cell)| Cell {
            cursor: cursor == Some(n),
            ..*cell
        };
        state.cells.iter().enumerate().map(seen)
    }
}

impl State {
    fn reset(&mut self) {
        self.cells.fill(BLANK);
        (self.row, self.column, self.pen) = (0, 0, Pen::PLAIN);
        self.saved = (0, 0, Pen::PLAIN);
        self.region = (0, self.rows - 1);
        self.hidden = false;
    }

    fn blank(&self) -> Cell {
        Cell {
            colors: Colors {
                background: self.pen.colors().background,
                ..PLAIN
            },
            ..BLANK
        }
    }

    fn erase(&mut self, cells: core::ops::Range<usize>) {
        let blank = self.blank();
        let end = cells.end.min(self.cells.len());
        if let Some(cells) = self.cells.get_mut(cells.start..end) {
            cells.fill(blank);
        }
    }

    /// Moves rows `top` to `bottom` up, or down.
    fn scroll(&mut self, top: usize, bottom: usize, by: usize, up: bool) {
        let by = by.min(bottom + 1 - top);
        let (first, last) = (top * self.columns, (bottom + 1) * self.columns);
        let moved = by * self.columns;
        if up {
            self.cells.copy_within(first + moved..last, first);
            self.erase(last - moved..last);
        } else {
            self.cells.copy_within(first..last - moved, first + moved);
            self.erase(first..first + moved);
        }
    }

    fn line_feed(&mut self) {
        if self.row == self.region.1 {
            self.scroll(self.region.0, self.region.1, 1, true);
        } else if self.row + 1 < self.rows {
            self.row += 1;
        }
    }

    fn reverse_line_feed(&mut self) {
        if self.row == self.region.0 {
            self.scroll(self.region.0, self.region.1, 1, false);
        } else {
            self.row = self.row.saturating_sub(1);
        }
    }

    fn go_to(&mut self, row: usize, column: usize) {
        self.row = row.min(self.rows - 1);
        self.column = column.min(self.columns - 1);
    }

    /// Moves the characters from the cursor on to the right, or to the left.
    fn shift(&mut self, by: usize, right: bool) {
        let column = self.column.min(self.columns - 1);
        let (here, end) = (
            self.row * self.columns + column,
            (self.row + 1) * self.columns,
        );
        let by = by.min(end - here);
        if right {
            self.cells.copy_within(here..end - by, here + by);
            self.erase(here..here + by);
        } else {
            self.cells.copy_within(here + by..end, here);
            self.erase(end - by..end);
        }
    }

    fn erase_display(&mut self, mode: u16) {
        let here = self.row * self.columns + self.column.min(self.columns - 1);
        match mode {
            0 => self.erase(here..self.cells.len()),
            1 => self.erase(0..here + 1),
            _ => self.erase(0..self.cells.len()),
        }
    }

    fn erase_line(&mut self, mode: u16) {
        let start = self.row * self.columns;
        let here = start + self.column.min(self.columns - 1);
        match mode {
            0 => self.erase(here..start + self.columns),
            1 => self.erase(start..here + 1),
            _ => self.erase(start..start + self.columns),
        }
    }
}

impl Perform for State {
    fn print(&mut self, character: char) {
        if self.column >= self.columns {
            self.column = 0;
            self.line_feed();
        }
        let at = self.row * self.columns + self.column;
        self.cells[at] = Cell {
            character,
            colors: self.pen.colors(),
            cursor: false,
        };
        self.column += 1;
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\r' => self.column = 0,
            b'\n' | 0x0b | 0x0c => self.line_feed(),
            0x08 => self.column = self.column.min(self.columns - 1).saturating_sub(1),
            b'\t' => self.column = ((self.column / TAB + 1) * TAB).min(self.columns - 1),
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, intermediates: &[u8], ignore: bool, action: char) {
        if ignore {
            return;
        }
        let nth = |n: usize| params.iter().nth(n).and_then(|p| p.first().copied());
        // Most have 1 as their default, and take 0 for it.
        let count = |n: usize| usize::from(nth(n).unwrap_or(0).max(1));
        let mode = nth(0).unwrap_or(0);
        match (intermediates, action) {
            ([], 'A') => self.row = self.row.saturating_sub(count(0)),
            ([], 'B' | 'e') => self.go_to(self.row + count(0), self.column),
            ([], 'C' | 'a') => self.go_to(self.row, self.column + count(0)),
            ([], 'D') => self.column = self.column.min(self.columns - 1).saturating_sub(count(0)),
            ([], 'E') => self.go_to(self.row + count(0), 0),
            ([], 'F') => self.go_to(self.row.saturating_sub(count(0)), 0),
            ([], 'G' | '`') => self.go_to(self.row, count(0) - 1),
            ([], 'H' | 'f') => self.go_to(count(0) - 1, count(1) - 1),
            ([], 'd') => self.go_to(count(0) - 1, self.column),
            ([], 'J') => self.erase_display(mode),
            ([], 'K') => self.erase_line(mode),
            ([], 'L' | 'M') if (self.region.0..=self.region.1).contains(&self.row) => {
                self.scroll(self.row, self.region.1, count(0), action == 'M');
            }
            ([], 'P') => self.shift(count(0), false),
            ([], '@') => self.shift(count(0), true),
            ([], 'X') => {
                let here = self.row * self.columns + self.column.min(self.columns - 1);
                self.erase(here..(here + count(0)).min((self.row + 1) * self.columns));
            }
            ([], 'S' | 'T') => self.scroll(self.region.0, self.region.1, count(0), action == 'S'),
            ([], 'm') => self.pen.select(params),
            ([], 'r') => {
                let bottom = nth(1)
                    .filter(|&bottom| bottom > 0)
                    .map_or(self.rows, usize::from);
                let region = (count(0) - 1, bottom.min(self.rows) - 1);
                if region.0 < region.1 {
                    self.region = region;
                    self.go_to(0, 0);
                }
            }
            ([], 's') => self.saved = (self.row, self.column, self.pen),
            ([], 'u') => (self.row, self.column, self.pen) = self.saved,
            ([b'?'], 'h' | 'l') if mode == 25 => self.hidden = action == 'l',
            // The alternate screen: no other one is kept, but programs begin with a blank one.
            ([b'?'], 'h' | 'l') if mode == 1049 => {
                self.erase_display(2);
                self.go_to(0, 0);
            }
            ([b'!'], 'p') => {
                self.pen = Pen::PLAIN;
                self.region = (0, self.rows - 1);
                self.hidden = false;
            }
            _ => {}
        }
    }

    fn esc_dispatch(&mut self, intermediates: &[u8], ignore: bool, byte: u8) {
        match (intermediates, byte) {
            _ if ignore => {}
            ([], b'7') => self.saved = (self.row, self.column, self.pen),
            ([], b'8') => (self.row, self.column, self.pen) = self.saved,
            ([], b'D') => self.line_feed(),
            ([], b'E') => {
                self.column = 0;
                self.line_feed();
            }
            ([], b'M') => self.reverse_line_feed(),
            ([], b'c') => self.reset(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    fn shown(grid: &Grid) -> Vec<String> {
        let cells: Vec<char> = grid.cells().map(|cell| cell.character).collect();
        let rows = cells.chunks(grid.columns());
        rows.map(|row| row.iter().collect::<String>().trim_end().into())
            .collect()
    }

    fn after(text: &str) -> Vec<String> {
        let mut grid = Grid::new(10, 4);
        grid.write(text.as_bytes());
        shown(&grid)
    }

    #[test]
    fn text_wraps_and_scrolls() {
        assert_eq!(
            after("one\r\ntwo\r\n0123456789abc"),
            ["one", "two", "0123456789", "abc"]
        );
        assert_eq!(after("1\r\n2\r\n3\r\n4\r\n5"), ["2", "3", "4", "5"]);
        assert_eq!(
            after("0123456789\r\nx"),
            ["0123456789", "x", "", ""],
            "no row between"
        );
        assert_eq!(
            after("a\tb\x08c\u{20ac}"),
            ["a       c\u{20ac}", "", "", ""]
        );
    }

    #[test]
    fn sequences_move_and_erase() {
        for (text, rows) in [
            ("abc\x1b[2D\x1b[Kx", ["ax", "", "", ""]),
            ("abc\x1b[1;1Hx\x1b[3;2Hy", ["xbc", "", " y", ""]),
            ("a\r\nb\r\nc\x1b[2;1H\x1b[J", ["a", "", "", ""]),
            ("a\r\nb\x1b[2J\x1b[Hc", ["c", "", "", ""]),
            ("abcdef\x1b[3G\x1b[2P", ["abef", "", "", ""]),
            ("abcdef\x1b[3G\x1b[2@x", ["abx cdef", "", "", ""]),
            ("abcdef\x1b[3G\x1b[2X", ["ab  ef", "", "", ""]),
            ("1\r\n2\r\n3\r\n4\x1b[2;1H\x1b[L", ["1", "", "2", "3"]),
            ("1\r\n2\r\n3\r\n4\x1b[2;1H\x1b[M", ["1", "3", "4", ""]),
            (
                "1\r\n2\r\n3\r\n4\x1b[2;3r\x1b[3;1H\nx",
                ["1", "3", "x", "4"],
            ),
            ("1\r\n2\x1b[1;1H\x1bM0", ["0", "1", "2", ""]),
            ("a\x1b7bc\x1b8x", ["axc", "", "", ""]),
            ("a\x1b]0;title\x07b\x1b[>0q\x1b[99z", ["ab", "", "", ""]),
        ] {
            assert_eq!(after(text), rows, "{text:?}");
        }
    }

    #[test]
    fn colours_and_cursor_are_told() {
        let mut grid = Grid::new(10, 2);
        grid.write(b"\x1b[1;31ma\x1b[0;7mb\x1b[38;5;12;44mc\x1b[md");
        let cells: Vec<Cell> = grid.cells().take(5).collect();
        let colors: Vec<_> = cells
            .iter()
            .map(|c| (c.colors.foreground, c.colors.background))
            .collect();
        assert_eq!(colors[..4], [(9, 0), (0, 7), (4, 12), (7, 0)]);
        assert!(cells[4].cursor && !cells[3].cursor);
        grid.write(b"\x1b[?25l");
        assert!(!grid.cells().any(|cell| cell.cursor));
    }

    #[test]
    fn the_shells_row_is_drawn_anew() {
        let mut editor = crate::line_editor::LineEditor::new("> ");
        let mut written = String::new();
        editor.insert("vm lst", &mut written);
        editor.key(crate::line_editor::Key::Left, &mut written);
        editor.key(crate::line_editor::Key::Char('i'), &mut written);
        let mut grid = Grid::new(80, 25);
        grid.write(written.as_bytes());
        assert_eq!(shown(&grid)[0], "> vm lsit");
    }

    proptest! {
        #[test]
        fn any_bytes_keep_the_cursor_in_the_grid(
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), Just(0x1b), Just(b'['), b'0'..=b'9', Just(b';'), b'@'..=b'z'], 0..300),
            columns in 1usize..20, rows in 1usize..10,
        ) {
            let mut grid = Grid::new(columns, rows);
            for chunk in bytes.chunks(7) {
                grid.write(chunk);
                let state = &grid.state;
                prop_assert!(state.row < rows && state.column <= columns);
                prop_assert!(state.region.0 <= state.region.1 && state.region.1 < rows);
                prop_assert_eq!(grid.cells().count(), columns * rows);
            }
        }
    }
}
