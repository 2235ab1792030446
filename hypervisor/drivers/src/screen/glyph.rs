//! Characters of a PC's text screen: letters from the font, lines and blocks drawn by rule.
//!
//! Boxes and bars are characters 0xB0 to 0xDF of code page 437, which the font lacks.

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster};

use super::{COLUMN_PIXELS, REPLACEMENT, ROW_PIXELS};

/// How many lines lead from a character's middle up, right, down and left, for 0xB3 to 0xDA.
const ARMS: [[u8; 4]; 40] = [
    [1, 0, 1, 0],
    [1, 0, 1, 1],
    [1, 0, 1, 2],
    [2, 0, 2, 1],
    [0, 0, 2, 1],
    [0, 0, 1, 2],
    [2, 0, 2, 2],
    [2, 0, 2, 0],
    [0, 0, 2, 2],
    [2, 0, 0, 2],
    [2, 0, 0, 1],
    [1, 0, 0, 2],
    [0, 0, 1, 1],
    [1, 1, 0, 0],
    [1, 1, 0, 1],
    [0, 1, 1, 1],
    [1, 1, 1, 0],
    [0, 1, 0, 1],
    [1, 1, 1, 1],
    [1, 2, 1, 0],
    [2, 1, 2, 0],
    [2, 2, 0, 0],
    [0, 2, 2, 0],
    [2, 2, 0, 2],
    [0, 2, 2, 2],
    [2, 2, 2, 0],
    [0, 2, 0, 2],
    [2, 2, 2, 2],
    [1, 2, 0, 2],
    [2, 1, 0, 1],
    [0, 2, 1, 2],
    [0, 1, 2, 1],
    [2, 1, 0, 0],
    [1, 2, 0, 0],
    [0, 2, 1, 0],
    [0, 1, 2, 0],
    [2, 1, 2, 1],
    [1, 2, 1, 2],
    [1, 0, 0, 1],
    [0, 1, 1, 0],
];

/// The middle of a character.
const X: usize = COLUMN_PIXELS / 2;
const Y: usize = ROW_PIXELS / 2;

/// Draws a character: calls `put` with each pixel's column, row and intensity (0 to 255), row by row. `code` is the
/// character in the PC's set, `letter` the ASCII character to draw where the font lacks it.
pub fn draw(code: u8, letter: u8, mut put: impl FnMut(usize, usize, u8)) {
    if matches!(code, 0xb0..=0xdf) {
        for y in 0..ROW_PIXELS {
            for x in 0..COLUMN_PIXELS {
                put(x, y, ruled(code, x, y));
            }
        }
        return;
    }
    let raster = |c| get_raster(c, FontWeight::Regular, RasterHeight::Size16);
    let Some(raster) = raster(char::from(letter)).or_else(|| raster(REPLACEMENT)) else {
        return;
    };
    for (y, line) in raster.raster().iter().enumerate() {
        for (x, &intensity) in line.iter().enumerate() {
            put(x, y, intensity);
        }
    }
}

/// The intensity of a pixel of a line or block.
fn ruled(code: u8, x: usize, y: usize) -> u8 {
    let lit = match code {
        0xb0..=0xb2 => return 64 * (code - 0xaf),
        0xdb => true,
        0xdc => y >= Y,
        0xdd => x < X,
        0xde => x >= X,
        0xdf => y < Y,
        _ => match ARMS.get(usize::from(code.wrapping_sub(0xb3))) {
            Some([up, right, down, left]) => {
                let vertical = |lines: u8| on_line(lines, x, X);
                let horizontal = |lines: u8| on_line(lines, y, Y);
                vertical(*up) && y <= Y
                    || vertical(*down) && y >= Y
                    || horizontal(*left) && x <= X
                    || horizontal(*right) && x >= X
            }
            None => false,
        },
    };
    if lit { 255 } else { 0 }
}

/// Whether a coordinate is on one of so many parallel lines around the middle.
fn on_line(lines: u8, at: usize, middle: usize) -> bool {
    match lines {
        0 => false,
        1 => at == middle,
        _ => at.abs_diff(middle) == 1,
    }
}
