//! What the registers say of a screen of text: where it begins, how large it is, its colours and cursor.

use super::{Registers, TEXT_MEMORY};

/// Most columns of text that are shown.
pub const MAX_COLUMNS: usize = 132;
/// Most rows of text that are shown.
pub const MAX_ROWS: usize = 60;

/// Cells in the text memory.
const CELLS: u16 = (TEXT_MEMORY.bytes / 2) as u16;

/// Sequencer register 1: the screen is dark.
const SCREEN_OFF: u8 = 1 << 5;
/// Attribute controller register 10h: graphics instead of text.
const GRAPHICS: u8 = 1 << 0;
/// The same: the attribute's highest bit is for blinking, not for a bright background.
const BLINK: u8 = 1 << 3;
/// The same: two bits of a colour come from register 14h.
const COLOUR_SELECT: u8 = 1 << 7;
/// CRT controller register 0Ah: no cursor.
const CURSOR_OFF: u8 = 1 << 5;

/// What is on the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Nothing: the guest has turned it off.
    Dark,
    /// A graphics mode, which is not shown.
    Graphics,
    /// Text.
    Text(TextMode),
}

/// A screen of text. All numbers are within the bounds given, whatever the guest has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextMode {
    /// 1 to [`MAX_COLUMNS`].
    pub columns: usize,
    /// 1 to [`MAX_ROWS`].
    pub rows: usize,
    /// First cell of the first row.
    start: u16,
    /// Cells from the start of a row to that of the next.
    pitch: u16,
    /// Cell of the cursor, if that is on.
    cursor: Option<u16>,
    /// The 16 colours, as 0xRRGGBB.
    pub palette: [u32; 16],
    /// The bits of an attribute's upper half that choose the background.
    pub background_mask: u8,
}

impl TextMode {
    /// Byte in the text memory at which a row begins. Rows wrap around at the end of the memory.
    pub fn row_offset(&self, row: usize) -> usize {
        let cell = usize::from(self.start) + row * usize::from(self.pitch);
        cell % usize::from(CELLS) * 2
    }

    /// Row and column of the cursor, if it is on and on the screen.
    pub fn cursor(&self) -> Option<(usize, usize)> {
        let from_start = self.cursor?.wrapping_sub(self.start) % CELLS;
        let (row, column) = match self.pitch {
            0 => (0, from_start),
            pitch => (from_start / pitch, from_start % pitch),
        };
        let (row, column) = (usize::from(row), usize::from(column));
        (row < self.rows && column < self.columns).then_some((row, column))
    }
}

/// Characters 0x80 to 0x9F of the adapter's set, without their accents, and so on.
const LETTERS_80: &[u8; 32] = b"CueaaaaceeeiiiAAEaAooouuyOUcLYPf";
const LETTERS_A0: &[u8; 16] = b"aiounNao?--/4!<>";
const LETTERS_E0: &[u8; 32] = b"aBGpSsutFTOd8fen=+><||/~o..vn2# ";

/// The printable ASCII character that is most like `character` of the adapter's own set (code page 437).
pub fn ascii(character: u8) -> u8 {
    let at = |letters: &[u8], first: u8| letters[usize::from(character - first)];
    match character {
        b' '..=b'~' => character,
        0x00 => b' ',
        0x04 | 0x07 | 0x09 | 0x0f => b'*',
        0x10 | 0x1a => b'>',
        0x11 | 0x1b => b'<',
        0x18 | 0x1e | 0x7f => b'^',
        0x19 | 0x1f => b'v',
        0x01..=0x1f => b'?',
        0x80..=0x9f => at(LETTERS_80, 0x80),
        0xa0..=0xaf => at(LETTERS_A0, 0xa0),
        0xb0..=0xb2 | 0xdb..=0xdf => b'#',
        0xb3 | 0xba => b'|',
        0xc4 | 0xcd => b'-',
        0xb4..=0xda => b'+',
        0xe0..=0xff => at(LETTERS_E0, 0xe0),
    }
}

/// The colours of a fresh adapter: the first 64 are those of its predecessor, two bits for each of red, green
/// and blue.
pub(super) fn first_colours() -> [[u8; 3]; 256] {
    core::array::from_fn(|n| {
        let part = |low: u32| {
            let (strong, weak) = (n >> low & 1, n >> (low + 3) & 1);
            (strong * 0x2a + weak * 0x15) as u8
        };
        match n {
            0..64 => [part(2), part(1), part(0)],
            _ => [0; 3],
        }
    })
}

pub(super) fn scan(registers: &Registers) -> Scan {
    let mode = registers.attribute[0x10];
    if registers.sequencer[1] & SCREEN_OFF != 0 || !registers.attribute_index.shown() {
        return Scan::Dark;
    }
    if mode & GRAPHICS != 0 {
        return Scan::Graphics;
    }
    let crtc = &registers.crtc;
    let pair = |high: usize| u16::from(crtc[high]) << 8 | u16::from(crtc[high + 1]);
    let overflow = u16::from(crtc[7]);
    let last_line = u16::from(crtc[0x12]) | (overflow & 2) << 7 | (overflow & 0x40) << 3;
    let row_lines = u16::from(crtc[9] & 0x1f) + 1;
    let rows = (last_line + 1) / row_lines;
    Scan::Text(TextMode {
        columns: (usize::from(crtc[1]) + 1).min(MAX_COLUMNS),
        rows: usize::from(rows).clamp(1, MAX_ROWS),
        start: pair(0x0c) % CELLS,
        // Counted in words of two cells.
        pitch: u16::from(crtc[0x13]) * 2,
        cursor: (crtc[0x0a] & CURSOR_OFF == 0).then(|| pair(0x0e) % CELLS),
        palette: core::array::from_fn(|colour| rgb(registers, colour)),
        background_mask: if mode & BLINK != 0 { 7 } else { 15 },
    })
}

/// The colour that an attribute's half chooses, as 0xRRGGBB.
fn rgb(registers: &Registers, colour: usize) -> u32 {
    let (mode, select) = (registers.attribute[0x10], registers.attribute[0x14]);
    let low = registers.attribute[colour];
    let low = match mode & COLOUR_SELECT {
        0 => low & 0x3f,
        _ => low & 0x0f | (select & 3) << 4,
    };
    let index = (low | (select & 0x0c) << 4) & registers.pixel_mask;
    let parts = registers.colours[usize::from(index)];
    parts.iter().fold(0, |rgb, &part| {
        // Six bits become eight so that full stays full.
        rgb << 8 | u32::from(part << 2 | part >> 4)
    })
}
