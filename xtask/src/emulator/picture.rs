//! A picture of an emulated machine's screen, and the text that Plinth drew on it.
//!
//! Text is read back by the font that it was drawn with: a character is what has its very pixels, in one of the
//! terminal's colours on black. What is none, such as a cell in inverse video, reads as [`UNREADABLE`].

use std::{collections::HashMap, sync::OnceLock};

use drivers::screen::{COLUMN_PIXELS, CURSOR_ROWS, ROW_PIXELS, draw_glyph};

/// What stands for a cell in which no character is recognized.
pub const UNREADABLE: char = '\u{fffd}';

/// The brightest part of the colours that text has: the terminal's dark and bright ones, and the log's white.
const BRIGHTNESS: [u32; 3] = [0x55, 0xaa, 0xff];

/// The brightest part of each pixel of a cell, row by row.
type Pixels = Vec<u8>;

/// What each printable character looks like, with the cursor on it and without.
fn font() -> &'static HashMap<Pixels, char> {
    static FONT: OnceLock<HashMap<Pixels, char>> = OnceLock::new();
    FONT.get_or_init(|| {
        let mut font = HashMap::new();
        for cursor in [false, true] {
            for brightness in BRIGHTNESS {
                for letter in b' '..=b'~' {
                    let mut pixels = Pixels::new();
                    draw_glyph(letter, letter, |_, y, intensity| {
                        let lit = cursor && CURSOR_ROWS.contains(&y);
                        let weight = if lit { 255 } else { u32::from(intensity) };
                        pixels.push((brightness * weight / 255) as u8);
                    });
                    // Should two look the same, the one without the cursor is meant.
                    font.entry(pixels).or_insert(char::from(letter));
                }
            }
        }
        font
    })
}

/// Rows of pixels: red, green, blue.
pub struct Picture {
    /// Pixels in a row.
    width: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// Reads a binary PPM (Netpbm, ppm(5)) of 8 bits without comments. `None`: it is none, or not whole yet.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut parts = bytes.splitn(4, |byte| byte.is_ascii_whitespace());
        let mut text = || std::str::from_utf8(parts.next()?).ok();
        if text()? != "P6" {
            return None;
        }
        let width: usize = text()?.parse().ok()?;
        let height: usize = text()?.parse().ok()?;
        let pixels = parts.next()?.strip_prefix(b"255\n")?;
        let whole = width.checked_mul(height)?.checked_mul(3)? == pixels.len();
        whole.then(|| Picture {
            width,
            pixels: pixels.to_vec(),
        })
    }

    /// The text on it, by rows, without blanks at their ends.
    pub fn text(&self) -> Vec<String> {
        let font = font();
        let line = self.width * 3;
        let rows = self.pixels.chunks_exact((line * ROW_PIXELS).max(1));
        let row = |pixels: &[u8]| {
            let cell = |column: usize| -> char {
                let first = column * COLUMN_PIXELS * 3;
                let lines = pixels.chunks_exact(line);
                let lines =
                    lines.flat_map(|line| line[first..].chunks_exact(3).take(COLUMN_PIXELS));
                let brightest = lines.map(|pixel| pixel.iter().copied().max().unwrap_or(0));
                let found = font.get(&brightest.collect::<Pixels>());
                found.copied().unwrap_or(UNREADABLE)
            };
            let text: String = (0..self.width / COLUMN_PIXELS).map(cell).collect();
            text.trim_end().to_owned()
        };
        rows.map(row).collect()
    }

    /// How many pixels are not black in these columns.
    pub fn lit(&self, columns: std::ops::Range<usize>) -> usize {
        let rows = self.pixels.chunks_exact(self.width.max(1) * 3);
        let lit = |row: &[u8]| {
            let pixels = row.chunks_exact(3).skip(columns.start).take(columns.len());
            pixels
                .filter(|pixel| pixel.iter().any(|&part| part > 0))
                .count()
        };
        rows.map(lit).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_back() {
        const COLUMNS: usize = 100;
        let width = COLUMNS * COLUMN_PIXELS + 3;
        let mut pixels = vec![0; width * (2 * ROW_PIXELS + 5) * 3];
        let mut put = |row: usize, column: usize, letter: u8, brightness: usize, cursor: bool| {
            draw_glyph(letter, letter, |x, y, intensity| {
                let lit = cursor && CURSOR_ROWS.contains(&y);
                let weight = if lit { 255 } else { usize::from(intensity) };
                let at = (row * ROW_PIXELS + y) * width + column * COLUMN_PIXELS + x;
                pixels[at * 3 + 1] = (brightness * weight / 255) as u8;
            });
        };
        let all: Vec<u8> = (b' '..=b'~').collect();
        for (column, &letter) in all.iter().enumerate() {
            put(0, column, letter, 0xaa, false);
        }
        put(1, 2, b'x', 0xff, true);
        put(1, 4, b'y', 0x33, false);
        let picture = Picture { width, pixels };
        let rows = [String::from_utf8(all).unwrap(), format!("  x {UNREADABLE}")];
        assert_eq!(picture.text(), rows);
    }

    #[test]
    fn lit_pixels_are_counted_by_columns() {
        let mut file = b"P6\n3 2\n255\n".to_vec();
        file.extend([0, 0, 0, 1, 0, 0, 9, 9, 9]);
        file.extend([0, 0, 0, 0, 0, 0, 0, 0, 7]);
        let picture = Picture::parse(&file).unwrap();
        assert_eq!(picture.width, 3);
        assert_eq!(
            [0..1, 1..2, 2..3, 0..3].map(|c| picture.lit(c)),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn a_file_that_is_not_whole_is_no_picture() {
        let mut file = b"P6\n1 1\n255\n".to_vec();
        file.extend([1, 2, 3]);
        assert!(Picture::parse(&file).is_some());
        for length in 0..file.len() {
            assert!(Picture::parse(&file[..length]).is_none(), "{length}");
        }
        assert!(Picture::parse(b"P6\n1 1\n65535\n\0\x01\0\x02\0\x03").is_none());
    }
}
