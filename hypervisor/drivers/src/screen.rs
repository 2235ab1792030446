//! A text screen on the boot loader's frame buffer.
//!
//! Characters are kept in a grid beside the pixels, so scrolling never reads the slow frame
//! buffer and redraws only cells that change. When the last row is full the text jumps up
//! by a quarter of the screen: few redraws, and a page that can be read. Text is printable
//! ASCII; anything else shows as a box.
//!
//! A guest's picture can cover the text ([`Screen::cover`]): text that is written meanwhile goes to the grid, and is
//! drawn when the picture goes.

mod canvas;
mod glyph;

use alloc::{vec, vec::Vec};

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use canvas::Canvas;
pub use canvas::{CURSOR_ROWS, Cell, STEP_BYTES};
pub use glyph::draw as draw_glyph;

/// Pixels from one row of text to the next.
pub const ROW_PIXELS: usize = RasterHeight::Size16.val();
/// Pixels from one character to the next.
pub const COLUMN_PIXELS: usize = get_raster_width(FontWeight::Regular, RasterHeight::Size16);
/// What stands for a character that the font lacks.
const REPLACEMENT: char = '#';
/// Columns between tabulator stops.
const TAB: usize = 8;

/// Where the colours are in a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelLayout {
    /// Bit positions of red, green and blue, 8 bits each.
    Color {
        /// Lowest bit of red.
        red: u8,
        /// Lowest bit of green.
        green: u8,
        /// Lowest bit of blue.
        blue: u8,
    },
    /// One grey value, or a palette index of which 0 is dark and 255 light.
    Gray,
}

/// Shape of a frame buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Pixels per row.
    pub width: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Pixels from the start of a row to the start of the next.
    pub stride: usize,
    /// Bytes per pixel, 1 to 4.
    pub bytes_per_pixel: usize,
    /// Colour layout.
    pub layout: PixelLayout,
}

/// A text screen. Writes outside `pixels` never happen, whatever the geometry says.
pub struct Screen<P> {
    pixels: P,
    geometry: Geometry,
    cells: Vec<u8>,
    columns: usize,
    rows: usize,
    row: usize,
    column: usize,
    /// What covers the text.
    canvas: Option<Canvas>,
}

impl<P: AsMut<[u8]>> Screen<P> {
    /// Takes a frame buffer and clears it. `None`: too small for a character, or a pixel size that cannot be.
    pub fn new(mut pixels: P, geometry: Geometry) -> Option<Self> {
        let (columns, rows) = (geometry.width / COLUMN_PIXELS, geometry.height / ROW_PIXELS);
        if columns == 0 || rows == 0 || !(1..=4).contains(&geometry.bytes_per_pixel) {
            return None;
        }
        pixels.as_mut().fill(0);
        Some(Screen {
            pixels,
            geometry,
            cells: vec![b' '; columns * rows],
            columns,
            rows,
            row: 0,
            column: 0,
            canvas: None,
        })
    }

    /// From now on a guest's picture is shown, piece by piece. Text goes to the grid only.
    pub fn cover(&mut self) {
        if self.canvas.is_none() {
            self.canvas = Some(Canvas::new(&self.geometry));
        }
    }

    /// Whether a picture covers the text.
    pub fn is_covered(&self) -> bool {
        self.canvas.is_some()
    }

    /// Shows the text again: all of it is drawn.
    pub fn uncover(&mut self) {
        if self.canvas.take().is_none() {
            return;
        }
        self.pixels.as_mut().fill(0);
        for row in 0..self.rows {
            for column in 0..self.columns {
                let character = self.cells[row * self.columns + column];
                if character != b' ' {
                    self.draw(row, column, character);
                }
            }
        }
    }

    /// Draws a piece of a guest's screen of text, at most [`STEP_BYTES`] of pixels of it: `columns` cells for each row.
    /// To be called again and again. Nothing happens unless the text is covered.
    pub fn paint_text(&mut self, columns: usize, cells: impl Iterator<Item = Cell>) {
        if let Some(canvas) = &mut self.canvas {
            canvas.paint_text(self.pixels.as_mut(), columns, cells);
        }
    }

    /// Draws a piece of a guest's picture of `width` by `height` pixels, as [`Screen::paint_text`]. `read_row` copies the
    /// first pixels of a row, 0x..RRGGBB in four bytes each; whether it could.
    pub fn paint_pixels(
        &mut self,
        width: usize,
        height: usize,
        read_row: impl FnMut(usize, &mut [u8]) -> bool,
    ) {
        if let Some(canvas) = &mut self.canvas {
            canvas.paint_pixels(self.pixels.as_mut(), (width, height), read_row);
        }
    }

    /// Columns and rows of text.
    pub fn size(&self) -> (usize, usize) {
        (self.columns, self.rows)
    }

    /// Writes text. Understands newline, carriage return, backspace and tab; wraps at the right edge.
    pub fn write(&mut self, text: &[u8]) {
        for &byte in text {
            match byte {
                b'\n' => self.new_line(),
                b'\r' => self.column = 0,
                8 => self.column = self.column.saturating_sub(1),
                b'\t' => {
                    self.column = (self.column / TAB + 1) * TAB;
                    if self.column >= self.columns {
                        self.new_line();
                    }
                }
                byte => {
                    if self.column == self.columns {
                        self.new_line();
                    }
                    self.set(self.row, self.column, byte);
                    self.column += 1;
                }
            }
        }
    }

    fn new_line(&mut self) {
        self.column = 0;
        if self.row + 1 < self.rows {
            self.row += 1;
        } else {
            self.jump();
        }
    }

    /// Moves the text up by a quarter of the screen, at least a row.
    fn jump(&mut self) {
        let by = (self.rows / 4).max(1);
        for row in 0..self.rows {
            for column in 0..self.columns {
                let from = (row + by) * self.columns + column;
                let character = self.cells.get(from).copied().unwrap_or(b' ');
                self.set(row, column, character);
            }
        }
        self.row = self.rows - by;
    }

    fn set(&mut self, row: usize, column: usize, character: u8) {
        let cell = &mut self.cells[row * self.columns + column];
        if *cell != character {
            *cell = character;
            if self.canvas.is_none() {
                self.draw(row, column, character);
            }
        }
    }

    fn draw(&mut self, row: usize, column: usize, character: u8) {
        let raster = |c| get_raster(c, FontWeight::Regular, RasterHeight::Size16);
        let Some(raster) = raster(char::from(character)).or_else(|| raster(REPLACEMENT)) else {
            return;
        };
        let size = self.geometry.bytes_per_pixel;
        for (y, line) in raster.raster().iter().enumerate() {
            let first = (row * ROW_PIXELS + y) * self.geometry.stride + column * COLUMN_PIXELS;
            let Some(bytes) = self
                .pixels
                .as_mut()
                .get_mut(first * size..(first + line.len()) * size)
            else {
                return;
            };
            for (pixel, &intensity) in bytes.chunks_exact_mut(size).zip(*line) {
                put(pixel, intensity, self.geometry.layout);
            }
        }
    }
}

/// Stores a grey of `intensity` in a pixel of 1 to 4 bytes.
fn put(pixel: &mut [u8], intensity: u8, layout: PixelLayout) {
    put_rgb(pixel, [intensity; 3], layout);
}

/// Stores a colour, its red, green and blue, in a pixel of 1 to 4 bytes.
fn put_rgb(pixel: &mut [u8], rgb: [u8; 3], layout: PixelLayout) {
    let value = match layout {
        PixelLayout::Gray => gray(rgb),
        PixelLayout::Color { red, green, blue } => rgb
            .into_iter()
            .zip([red, green, blue])
            .map(|(part, bit)| u32::from(part).checked_shl(u32::from(bit)).unwrap_or(0))
            .fold(0, |a, b| a | b),
    };
    match pixel {
        // One store for the usual case: the frame buffer is slow.
        [_, _, _, _] => pixel.copy_from_slice(&value.to_le_bytes()),
        pixel => {
            for (byte, part) in pixel.iter_mut().zip(value.to_le_bytes()) {
                *byte = part;
            }
        }
    }
}

/// How bright a colour is (ITU-R BT.601, in 256ths).
fn gray([red, green, blue]: [u8; 3]) -> u32 {
    (77 * u32::from(red) + 150 * u32::from(green) + 29 * u32::from(blue)) >> 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RGB: PixelLayout = PixelLayout::Color {
        red: 0,
        green: 8,
        blue: 16,
    };

    fn screen(columns: usize, rows: usize, layout: PixelLayout, size: usize) -> Screen<Vec<u8>> {
        let geometry = Geometry {
            width: columns * COLUMN_PIXELS + 3,
            height: rows * ROW_PIXELS + 5,
            stride: columns * COLUMN_PIXELS + 7,
            bytes_per_pixel: size,
            layout,
        };
        let bytes = geometry.stride * geometry.height * size;
        Screen::new(vec![0xaa; bytes], geometry).unwrap()
    }

    fn row(screen: &Screen<Vec<u8>>, row: usize) -> String {
        let cells = &screen.cells[row * screen.columns..][..screen.columns];
        String::from_utf8(cells.to_vec()).unwrap().trim_end().into()
    }

    #[test]
    fn wraps_and_jumps() {
        let mut screen = screen(4, 4, RGB, 4);
        screen.write(b"abcdef\n1\n2");
        let rows: Vec<_> = (0..4).map(|r| row(&screen, r)).collect();
        assert_eq!(rows, ["abcd", "ef", "1", "2"]);
        screen.write(b"\n3");
        let rows: Vec<_> = (0..4).map(|r| row(&screen, r)).collect();
        assert_eq!(rows, ["ef", "1", "2", "3"]);
    }

    #[test]
    fn control_characters_move() {
        let mut screen = screen(20, 2, RGB, 4);
        screen.write(b"ab\rX\t|\x08!");
        assert_eq!(row(&screen, 0), "Xb      !");
    }

    #[test]
    fn a_full_row_wraps_only_when_more_comes() {
        let mut screen = screen(4, 2, RGB, 4);
        screen.write(b"abcd\nef");
        assert_eq!(
            (row(&screen, 0), row(&screen, 1)),
            ("abcd".into(), "ef".into())
        );
    }

    #[test]
    fn colours_go_where_the_layout_says() {
        let mut pixel = [0; 4];
        put(
            &mut pixel,
            0x5a,
            PixelLayout::Color {
                red: 16,
                green: 8,
                blue: 0,
            },
        );
        assert_eq!(pixel, [0x5a, 0x5a, 0x5a, 0]);
        let mut pixel = [0; 3];
        put(&mut pixel, 0x5a, RGB);
        assert_eq!(pixel, [0x5a; 3]);
        let mut pixel = [0; 4];
        put(
            &mut pixel,
            0x5a,
            PixelLayout::Color {
                red: 24,
                green: 16,
                blue: 8,
            },
        );
        assert_eq!(pixel, [0, 0x5a, 0x5a, 0x5a]);
        let mut pixel = [0];
        put(&mut pixel, 0x5a, PixelLayout::Gray);
        assert_eq!(pixel, [0x5a]);
    }

    #[test]
    fn what_scrolled_away_leaves_no_pixels() {
        for size in 1..=4 {
            let layout = if size == 1 { PixelLayout::Gray } else { RGB };
            let mut screen = screen(3, 3, layout, size);
            screen.write(b"@@@");
            assert!(screen.pixels.iter().any(|&b| b != 0));
            screen.write(b"\n\n\n\n\n\n");
            assert!(screen.pixels.iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn impossible_geometries_are_refused() {
        let geometry = |width, height, bytes_per_pixel| Geometry {
            width,
            height,
            stride: width,
            bytes_per_pixel,
            layout: RGB,
        };
        assert!(Screen::new(vec![0; 64], geometry(2, 2, 4)).is_none());
        assert!(Screen::new(vec![0; 64], geometry(640, 480, 5)).is_none());
        assert!(Screen::new(vec![0; 64], geometry(640, 480, 0)).is_none());
    }

    proptest! {
        #[test]
        fn any_text_on_any_buffer_stays_inside(
            text in prop::collection::vec(any::<u8>(), 0..300),
            bytes in 0usize..20_000, width in 1usize..200, height in 1usize..100, size in 1usize..5,
        ) {
            let geometry = Geometry { width, height, stride: width, bytes_per_pixel: size, layout: RGB };
            if let Some(mut screen) = Screen::new(vec![0; bytes], geometry) {
                screen.write(&text);
            }
        }
    }
}
