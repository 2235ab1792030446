//! The host's screen: the log, as text, on the boot loader's frame buffer, and a guest's picture over it.

use bootloader_api::info::{FrameBuffer, FrameBufferInfo, PixelFormat};
use drivers::screen::{Cell, Geometry, PixelLayout, Screen};

use crate::{log, memory, sync::Lock};

static SCREEN: Lock<Option<Screen<&'static mut [u8]>>> = Lock::new(None);

/// Lines of log that a fresh screen begins with.
const REPLAYED_LINES: usize = 20;

fn geometry(info: &FrameBufferInfo) -> Geometry {
    let layout = match info.pixel_format {
        PixelFormat::Rgb => PixelLayout::Color {
            red: 0,
            green: 8,
            blue: 16,
        },
        PixelFormat::Bgr => PixelLayout::Color {
            red: 16,
            green: 8,
            blue: 0,
        },
        PixelFormat::Unknown {
            red_position,
            green_position,
            blue_position,
        } => PixelLayout::Color {
            red: red_position,
            green: green_position,
            blue: blue_position,
        },
        // `U8`, and whatever else a later boot loader may know.
        _ => PixelLayout::Gray,
    };
    Geometry {
        width: info.width,
        height: info.height,
        stride: info.stride,
        bytes_per_pixel: info.bytes_per_pixel,
        layout,
    }
}

/// Takes the frame buffer, if there is one, and shows the log so far. Returns columns and rows.
pub fn init(frame_buffer: Option<FrameBuffer>) -> Option<(usize, usize)> {
    let frame_buffer = frame_buffer?;
    let geometry = geometry(&frame_buffer.info());
    let pixels = frame_buffer.into_buffer();
    memory::combine_writes(pixels.as_ptr() as u64, pixels.len() as u64);
    let mut screen = Screen::new(pixels, geometry)?;
    let size = screen.size();
    log::last_lines(REPLAYED_LINES, |piece, last| {
        screen.write(piece);
        if last {
            screen.write(b"\n");
        }
    });
    *SCREEN.lock() = Some(screen);
    Some(size)
}

/// Shows one line of text.
pub fn write_line(line: &[u8]) {
    if let Some(screen) = SCREEN.lock().as_mut() {
        screen.write(line);
        screen.write(b"\n");
    }
}

/// Draws a piece of a guest's screen of text, which covers the log.
pub fn paint_text(columns: usize, cells: impl Iterator<Item = Cell>) {
    if let Some(screen) = SCREEN.lock().as_mut() {
        screen.cover();
        screen.paint_text(columns, cells);
    }
}

/// Draws a piece of a guest's picture, which covers the log; see [`Screen::paint_pixels`].
pub fn paint_pixels(width: usize, height: usize, read_row: impl FnMut(usize, &mut [u8]) -> bool) {
    if let Some(screen) = SCREEN.lock().as_mut() {
        screen.cover();
        screen.paint_pixels(width, height, read_row);
    }
}

/// Whether something covers the log.
pub fn is_covered() -> bool {
    SCREEN.lock().as_ref().is_some_and(Screen::is_covered)
}

/// Shows the log again, if a guest's picture covers it.
pub fn uncover() {
    if let Some(screen) = SCREEN.lock().as_mut() {
        screen.uncover();
    }
}
