//! A VM's display: what it draws on, and how the host looks at it.
//!
//! A guest draws on memory of its own, text at 0xB8000 or pixels where it likes, without exits, and nobody is
//! told. Whoever shows the display asks [`Vm::picture`](crate::vm::Vm::picture) when it suits them, and copies as much as
//! they have time for: how often a guest redraws costs the host nothing.

use alloc::{boxed::Box, sync::Arc};

use devices::{
    bus::{Overlap, PortBus},
    fw_cfg::{FileError, FwCfgItems},
    ramfb::{FrameBuffer, Ramfb},
    time::Clock,
    vga::{MAX_COLUMNS, MAX_ROWS, Scan, TEXT_MEMORY, Vga},
};
use mem::{
    GuestMemory,
    guest::{Access, AllocateError},
};

/// Most bytes of a video ROM: from 0xC0000 to where other cards' may begin.
pub const MAX_ROM: usize = 64 << 10;
/// The file in which firmware looks for a video ROM.
const ROM_FILE: &str = "vgaroms/vgabios.bin";

/// What a VM draws on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DisplayKind {
    /// It has none.
    #[default]
    None,
    /// A VGA adapter's text screen.
    VgaText,
    /// A frame buffer that its firmware sets up.
    Ramfb,
}

/// The display that a VM is to have.
#[derive(Clone, Copy, Debug, Default)]
pub struct DisplaySpec<'a> {
    /// What it draws on.
    pub kind: DisplayKind,
    /// The ROM by which its firmware draws, up to [`MAX_ROM`] bytes.
    pub rom: Option<&'a [u8]>,
    /// It is the VM's console, too: typed keys come by a keyboard, and firmware leaves the serial port alone.
    pub is_console: bool,
}

/// What a VM shows now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Picture {
    /// It has no display, or has not set it up.
    None,
    /// A dark screen.
    Dark,
    /// A graphics mode of the VGA adapter, which is not shown.
    Graphics,
    /// Text, which is now in the [`Text`] that was given.
    Text,
    /// Pixels.
    Pixels(FrameBuffer),
}

/// A copy of a screen of text.
pub struct Text {
    /// Up to [`MAX_COLUMNS`].
    pub columns: usize,
    /// Up to [`MAX_ROWS`].
    pub rows: usize,
    cells: Box<[[u8; 2]]>,
    /// Row and column of the cursor, if it is shown.
    pub cursor: Option<(usize, usize)>,
    /// The 16 colours, as 0xRRGGBB.
    pub palette: [u32; 16],
    /// The bits of an attribute's upper half that choose the background.
    pub background_mask: u8,
}

impl Text {
    /// An empty screen, with memory for the largest.
    pub fn new() -> Self {
        Text {
            columns: 0,
            rows: 0,
            cells: alloc::vec![[0; 2]; MAX_COLUMNS * MAX_ROWS].into(),
            cursor: None,
            palette: [0; 16],
            background_mask: 0,
        }
    }

    /// The cells, row by row: character and attribute.
    pub fn cells(&self) -> &[[u8; 2]] {
        &self.cells[..self.columns * self.rows]
    }
}

impl Default for Text {
    fn default() -> Self {
        Self::new()
    }
}

/// The devices of a display.
pub(crate) enum Display {
    None,
    Vga(Arc<Vga>),
    Ramfb(Arc<Ramfb>),
}

/// Gives a VM the memory that its display needs beside RAM.
///
/// # Errors
/// There is none.
pub(crate) fn place(kind: DisplayKind, memory: &mut GuestMemory) -> Result<(), AllocateError> {
    match kind {
        DisplayKind::VgaText => memory.add_special(TEXT_MEMORY, Access::ReadWrite),
        DisplayKind::None | DisplayKind::Ramfb => Ok(()),
    }
}

impl Display {
    /// Makes the devices.
    ///
    /// # Errors
    /// Ports that are taken: a defect.
    pub(crate) fn new(
        kind: DisplayKind,
        memory: &Arc<GuestMemory>,
        clock: &Arc<dyn Clock>,
        ports: &mut PortBus,
    ) -> Result<Self, Overlap> {
        Ok(match kind {
            DisplayKind::None => Display::None,
            DisplayKind::VgaText => {
                let vga = Vga::new(clock.clone());
                vga.attach(ports)?;
                Display::Vga(vga)
            }
            DisplayKind::Ramfb => Display::Ramfb(Ramfb::new(memory.clone())),
        })
    }

    /// Tells firmware of it.
    ///
    /// # Errors
    /// Defects only.
    pub(crate) fn offer(
        &self,
        rom: Option<&[u8]>,
        items: &mut FwCfgItems,
    ) -> Result<(), FileError> {
        if let Display::Ramfb(ramfb) = self {
            ramfb.offer(items)?;
        }
        match rom {
            Some(rom) => items.add_file(ROM_FILE, rom[..rom.len().min(MAX_ROM)].to_vec()),
            None => Ok(()),
        }
    }

    /// What it shows; text is copied.
    pub(crate) fn picture(&self, memory: &GuestMemory, text: &mut Text) -> Picture {
        match self {
            Display::None => Picture::None,
            Display::Ramfb(ramfb) => ramfb.frame_buffer().map_or(Picture::None, Picture::Pixels),
            Display::Vga(vga) => match vga.scan() {
                Scan::Dark => Picture::Dark,
                Scan::Graphics => Picture::Graphics,
                Scan::Text(mode) => {
                    text.columns = mode.columns;
                    text.rows = mode.rows;
                    text.cursor = mode.cursor();
                    text.palette = mode.palette;
                    text.background_mask = mode.background_mask;
                    let rows = text.cells.chunks_exact_mut(mode.columns);
                    for (row, cells) in rows.take(mode.rows).enumerate() {
                        read_wrapping(memory, mode.row_offset(row), cells.as_flattened_mut());
                    }
                    Picture::Text
                }
            },
        }
    }

    /// Copies pixels of a row, from the first on. Whether they could be had.
    pub(crate) fn read_row(&self, buffer: &FrameBuffer, row: usize, to: &mut [u8]) -> bool {
        match self {
            Display::Ramfb(ramfb) => ramfb.read_row(buffer, row, to),
            Display::None | Display::Vga(_) => false,
        }
    }
}

/// Copies text memory out, going on at its start when its end is reached.
fn read_wrapping(memory: &GuestMemory, offset: usize, to: &mut [u8]) {
    let left = TEXT_MEMORY.bytes as usize - offset;
    let (first, second) = to.split_at_mut(to.len().min(left));
    for (offset, piece) in [(offset, first), (0, second)] {
        let read = memory.read_special(TEXT_MEMORY.start + offset as u64, piece);
        debug_assert!(read.is_ok(), "the range was added for the display");
    }
}
