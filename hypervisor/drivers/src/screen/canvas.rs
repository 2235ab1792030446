//! A guest's picture on the frame buffer, drawn piece by piece.
//!
//! Each call draws no more than [`STEP_BYTES`], whatever the guest does: it redraws as quickly as it is
//! asked to, not as quickly as the guest changes its picture or its mode. Of text only cells that
//! changed are drawn. A picture of another size first has the old one wiped off, piece by piece, too.
//!
//! Invariant: pixels outside the frame buffer are never written, whatever sizes are given.

use alloc::{vec, vec::Vec};

use super::{COLUMN_PIXELS, Geometry, PixelLayout, ROW_PIXELS, glyph, put_rgb};

/// Most bytes of the frame buffer that one call writes: 0.1 ms or less on a PC.
pub const STEP_BYTES: usize = 128 * 1024;

/// Rows of the cursor, at the foot of a character.
pub const CURSOR_ROWS: core::ops::Range<usize> = ROW_PIXELS - 3..ROW_PIXELS - 1;

/// A character of a guest's screen of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// In the PC's own character set.
    pub code: u8,
    /// What to draw where the font lacks it: printable ASCII.
    pub letter: u8,
    /// Colour, as 0xRRGGBB.
    pub foreground: u32,
    /// Colour, as 0xRRGGBB.
    pub background: u32,
    /// The cursor is here.
    pub cursor: bool,
}

/// What is being drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Nothing,
    /// Columns.
    Text(usize),
    /// Width and height.
    Pixels(usize, usize),
}

/// A picture and how far it is drawn.
pub(super) struct Canvas {
    geometry: Geometry,
    layout: Layout,
    /// Rows of pixels that were wiped since the layout changed.
    wiped: usize,
    /// What the cells show.
    drawn: Vec<Option<Cell>>,
    /// Where the next piece begins: a row of pixels.
    next: usize,
    /// A row of the guest's picture.
    row: Vec<u8>,
}

impl Canvas {
    /// Nothing, on a frame buffer that shows something else.
    pub(super) fn new(geometry: &Geometry) -> Self {
        Canvas {
            geometry: *geometry,
            layout: Layout::Nothing,
            wiped: 0,
            drawn: Vec::new(),
            next: 0,
            row: Vec::new(),
        }
    }

    /// Wipes on, if there is something to wipe. Whether nothing is left of the old picture.
    fn wipe(&mut self, pixels: &mut [u8], layout: Layout) -> bool {
        if self.layout != layout {
            self.layout = layout;
            (self.wiped, self.next) = (0, 0);
        }
        let bytes = self.geometry.stride * self.geometry.bytes_per_pixel;
        let from = self.wiped;
        self.wiped = self.geometry.height.min(from + rows_per_step(bytes));
        if let Some(rows) = pixels.get_mut(from * bytes..self.wiped * bytes) {
            rows.fill(0);
        }
        from == self.geometry.height
    }

    pub(super) fn paint_text(
        &mut self,
        pixels: &mut [u8],
        columns: usize,
        cells: impl Iterator<Item = Cell>,
    ) {
        let geometry = self.geometry;
        let grid = (geometry.width / COLUMN_PIXELS, geometry.height / ROW_PIXELS);
        if columns == 0 || !self.wipe(pixels, Layout::Text(columns)) {
            self.drawn.clear();
            return;
        }
        if self.drawn.is_empty() {
            self.drawn = vec![None; grid.0 * grid.1];
        }
        let left = grid.0.saturating_sub(columns) / 2;
        let bytes = ROW_PIXELS * COLUMN_PIXELS * geometry.bytes_per_pixel;
        let mut budget = STEP_BYTES / bytes;
        for (n, cell) in cells.enumerate() {
            let (row, column) = (n / columns, n % columns + left);
            if row >= grid.1 || budget == 0 {
                break;
            }
            if column >= grid.0 {
                continue;
            }
            let Some(drawn) = self.drawn.get_mut(row * grid.0 + column) else {
                break;
            };
            if *drawn != Some(cell) {
                *drawn = Some(cell);
                budget -= 1;
                draw_cell(pixels, &geometry, (row, column), &cell);
            }
        }
    }

    pub(super) fn paint_pixels(
        &mut self,
        pixels: &mut [u8],
        (width, height): (usize, usize),
        mut read_row: impl FnMut(usize, &mut [u8]) -> bool,
    ) {
        let geometry = self.geometry;
        if !self.wipe(pixels, Layout::Pixels(width, height)) {
            return;
        }
        let shown = (width.min(geometry.width), height.min(geometry.height));
        let left = (geometry.width - shown.0) / 2;
        let top = (geometry.height - shown.1) / 2;
        self.row.resize(shown.0 * 4, 0);
        let size = geometry.bytes_per_pixel;
        for _ in 0..rows_per_step(shown.0 * size) {
            if self.next >= shown.1 {
                self.next = 0;
                break;
            }
            let first = ((top + self.next) * geometry.stride + left) * size;
            let Some(to) = pixels.get_mut(first..first + shown.0 * size) else {
                break;
            };
            if !read_row(self.next, &mut self.row) {
                break;
            }
            copy_row(to, &self.row, &geometry);
            self.next += 1;
        }
    }
}

/// Rows of so many bytes in one step: at least one.
fn rows_per_step(bytes: usize) -> usize {
    (STEP_BYTES / bytes.max(1)).max(1)
}

/// Copies a row of pixels, 0x..RRGGBB in four bytes each.
fn copy_row(to: &mut [u8], from: &[u8], geometry: &Geometry) {
    const SAME: PixelLayout = PixelLayout::Color {
        red: 16,
        green: 8,
        blue: 0,
    };
    if geometry.bytes_per_pixel == 4 && geometry.layout == SAME {
        to.copy_from_slice(from);
        return;
    }
    let from = from.chunks_exact(4);
    for (to, from) in to.chunks_exact_mut(geometry.bytes_per_pixel).zip(from) {
        put_rgb(to, [from[2], from[1], from[0]], geometry.layout);
    }
}

fn draw_cell(pixels: &mut [u8], geometry: &Geometry, (row, column): (usize, usize), cell: &Cell) {
    let parts = |rgb: u32| [(rgb >> 16) as u8, (rgb >> 8) as u8, rgb as u8];
    let (foreground, background) = (parts(cell.foreground), parts(cell.background));
    let size = geometry.bytes_per_pixel;
    glyph::draw(cell.code, cell.letter, |x, y, intensity| {
        let at = (row * ROW_PIXELS + y) * geometry.stride + column * COLUMN_PIXELS + x;
        let Some(pixel) = pixels.get_mut(at * size..(at + 1) * size) else {
            return;
        };
        let weight = match cell.cursor && CURSOR_ROWS.contains(&y) {
            true => 255,
            false => u32::from(intensity),
        };
        let mixed = core::array::from_fn(|n| {
            let (fore, back) = (u32::from(foreground[n]), u32::from(background[n]));
            ((fore * weight + back * (255 - weight)) / 255) as u8
        });
        put_rgb(pixel, mixed, geometry.layout);
    });
}

#[cfg(test)]
mod tests {
    use super::super::Screen;
    use super::*;
    use proptest::prelude::*;

    const BGR: PixelLayout = PixelLayout::Color {
        red: 16,
        green: 8,
        blue: 0,
    };

    fn screen(width: usize, height: usize) -> Screen<Vec<u8>> {
        let geometry = Geometry {
            width,
            height,
            stride: width + 5,
            bytes_per_pixel: 4,
            layout: BGR,
        };
        let bytes = geometry.stride * height * 4;
        Screen::new(vec![0xaa; bytes], geometry).unwrap()
    }

    fn cell(code: u8, background: u32) -> Cell {
        Cell {
            code,
            letter: code,
            foreground: 0xff_ffff,
            background,
            cursor: false,
        }
    }

    /// The pixels of a screen of 20 columns, painted until all of it must be there.
    fn painted(screen: &mut Screen<Vec<u8>>, cells: &[Cell]) -> Vec<u8> {
        for _ in 0..40 {
            screen.paint_text(20, cells.iter().copied());
        }
        screen.pixels.clone()
    }

    #[test]
    fn text_is_drawn_in_its_colours_and_goes_away() {
        let mut screen = screen(20 * COLUMN_PIXELS, 5 * ROW_PIXELS);
        screen.write(b"log");
        let log = screen.pixels.clone();
        screen.cover();
        let mut cells = [cell(b' ', 0x00_0080); 100];
        let blank = painted(&mut screen, &cells);
        assert_eq!(blank[..4], [0x80, 0, 0, 0]);
        cells[99] = cell(0xdb, 0);
        let full = painted(&mut screen, &cells);
        let last = ((5 * ROW_PIXELS - 1) * (20 * COLUMN_PIXELS + 5) + 20 * COLUMN_PIXELS - 1) * 4;
        assert_eq!(full[last..last + 4], [0xff, 0xff, 0xff, 0]);
        // What is written meanwhile is seen afterwards, and not before.
        screen.write(b"!");
        assert_eq!(screen.pixels, full);
        screen.uncover();
        assert_ne!(screen.pixels, log);
        let mut fresh = self::screen(20 * COLUMN_PIXELS, 5 * ROW_PIXELS);
        fresh.write(b"log!");
        assert_eq!(screen.pixels, fresh.pixels);
    }

    #[test]
    fn the_cursor_is_a_line() {
        let mut screen = screen(20 * COLUMN_PIXELS, 2 * ROW_PIXELS);
        screen.cover();
        let mut cells = [cell(b' ', 0); 40];
        let without = painted(&mut screen, &cells);
        cells[0].cursor = true;
        let with = painted(&mut screen, &cells);
        let changed = without.iter().zip(&with).filter(|(a, b)| a != b).count();
        assert_eq!(changed, 2 * COLUMN_PIXELS * 3);
    }

    #[test]
    fn a_step_is_bounded_and_the_next_goes_on() {
        let mut screen = screen(300, 400);
        screen.cover();
        let mut touched = 0;
        let read = |_: usize, row: &mut [u8]| {
            row.fill(0x55);
            true
        };
        for _ in 0..20 {
            let before = screen.pixels.clone();
            screen.paint_pixels(300, 400, read);
            let changed = before.iter().zip(&screen.pixels).filter(|(a, b)| a != b);
            let changed = changed.count();
            assert!(changed <= STEP_BYTES, "{changed}");
            touched += changed;
        }
        assert!(touched >= 300 * 400 * 4, "all of it was reached");
        let picture = screen.pixels.chunks_exact(305 * 4);
        assert!(
            picture
                .into_iter()
                .all(|row| row[..1200].iter().all(|&b| b == 0x55))
        );
        // A smaller picture leaves nothing of the larger one.
        for _ in 0..20 {
            screen.paint_pixels(10, 10, read);
        }
        let lit = screen.pixels.iter().filter(|&&b| b != 0).count();
        assert_eq!(lit, 10 * 10 * 4);
    }

    #[test]
    fn lines_meet_at_the_edges() {
        let edge = |code, x, y| glyph_at(code, x, y) == 255;
        let (right, bottom) = (COLUMN_PIXELS - 1, ROW_PIXELS - 1);
        assert!(edge(0xc4, 0, ROW_PIXELS / 2) && edge(0xc4, right, ROW_PIXELS / 2));
        assert!(edge(0xb3, COLUMN_PIXELS / 2, 0) && edge(0xb3, COLUMN_PIXELS / 2, bottom));
        assert!(!edge(0xda, COLUMN_PIXELS / 2, 0) && edge(0xda, COLUMN_PIXELS / 2, bottom));
        assert!(edge(0xdf, 0, 0) && !edge(0xdf, 0, bottom));
        assert_eq!(glyph_at(0xb1, 3, 3), 128);
    }

    fn glyph_at(code: u8, x: usize, y: usize) -> u8 {
        let mut found = 0;
        glyph::draw(code, b'?', |at_x, at_y, intensity| {
            if (at_x, at_y) == (x, y) {
                found = intensity;
            }
        });
        found
    }

    proptest! {
        #[test]
        fn no_picture_leaves_the_frame_buffer(
            bytes in 0usize..60_000, width in 1usize..300, height in 1usize..200, size in 1usize..5,
            columns in 0usize..140, count in 0usize..500,
            picture in (0usize..500, 0usize..500), gray in any::<bool>(),
        ) {
            let layout = if gray { PixelLayout::Gray } else { BGR };
            let geometry = Geometry { width, height, stride: width, bytes_per_pixel: size, layout };
            if let Some(mut screen) = Screen::new(vec![0; bytes], geometry) {
                screen.cover();
                for _ in 0..4 {
                    screen.paint_text(columns, (0..count).map(|n| cell(n as u8, 0x12_3456)));
                }
                for _ in 0..4 {
                    screen.paint_pixels(picture.0, picture.1, |_, row| { row.fill(1); true });
                }
                screen.uncover();
            }
        }
    }
}
