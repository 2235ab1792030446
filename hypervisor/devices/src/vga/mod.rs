//! A VGA adapter as far as text is concerned: its registers, and what they say of the screen.
//!
//! Purpose: firmware, boot loaders and test programs that draw text at 0xB8000 find the registers
//! that they set and read back (IBM VGA technical reference; the FreeVGA project's register list): sequencer,
//! graphics controller, attribute controller with its flip-flop, colour map, CRT controller with
//! start address and cursor, and a status register whose retrace bits follow the VM's time.
//!
//! The text itself is plain memory of the guest, [`TEXT_MEMORY`], which it writes without exits; nobody is told.
//! Whoever shows the screen asks [`Vga::scan`] where in that memory the picture is, and copies it.
//!
//! Not here: graphics. The modes can be set and are recognised, but there is no memory at
//! 0xA0000; fonts that a guest loads there are lost, and the host draws with its own. No monochrome
//! adapter: nothing answers at 0x3B4, and the bit that would move the registers there is stuck.

mod text;

use alloc::sync::Arc;

use bitfield_struct::bitfield;
use mem::{Gpa, GuestRange, Width};
use spin::Mutex;

use crate::bus::{IoError, Overlap, PortBus, PortDevice, byte_only};
use crate::time::{Clock, Rate};

pub use text::{MAX_COLUMNS, MAX_ROWS, Scan, TextMode, ascii};

/// The memory in which text is: 16 Ki cells of a character and an attribute.
pub const TEXT_MEMORY: GuestRange = GuestRange {
    start: Gpa(0xb_8000),
    bytes: 0x8000,
};

const ATTRIBUTE: u16 = 0x3c0;
const ATTRIBUTE_DATA: u16 = 0x3c1;
/// Written: miscellaneous output. Read: input status 0.
const MISC_WRITE: u16 = 0x3c2;
const SUBSYSTEM_ENABLE: u16 = 0x3c3;
const SEQUENCER: u16 = 0x3c4;
const SEQUENCER_DATA: u16 = 0x3c5;
const PIXEL_MASK: u16 = 0x3c6;
/// Written: index to read colours from. Read: whether colours are being read or written.
const COLOUR_READ: u16 = 0x3c7;
const COLOUR_WRITE: u16 = 0x3c8;
const COLOUR_DATA: u16 = 0x3c9;
const FEATURE_READ: u16 = 0x3ca;
const MISC_READ: u16 = 0x3cc;
const GRAPHICS: u16 = 0x3ce;
const GRAPHICS_DATA: u16 = 0x3cf;
const CRTC: u16 = 0x3d4;
const CRTC_DATA: u16 = 0x3d5;
/// Read: input status 1. Written: feature control.
const STATUS: u16 = 0x3da;

/// Where the adapter is: first port, number of ports.
const PORTS: [(u16, u16); 3] = [(ATTRIBUTE, 16), (CRTC, 2), (STATUS, 1)];

/// What can be set in each register.
const SEQUENCER_BITS: [u8; 5] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e];
const GRAPHICS_BITS: [u8; 9] = [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff];
const ATTRIBUTE_BITS: [u8; 21] = {
    let mut bits = [0x3f; 21];
    (bits[0x10], bits[0x11], bits[0x12]) = (0xef, 0xff, 0x3f);
    (bits[0x13], bits[0x14]) = (0x0f, 0x0f);
    bits
};
const CRTC_REGISTERS: usize = 25;

/// What a PC's firmware sets for 80 columns and 25 rows of text, mode 3 (IBM VGA technical reference).
mod mode_3 {
    pub const MISC: u8 = 0x67;
    pub const SEQUENCER: [u8; 5] = [0x03, 0x00, 0x03, 0x00, 0x02];
    pub const CRTC: [u8; 25] = [
        0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00,
        0x00, 0x9c, 0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
    ];
    pub const GRAPHICS: [u8; 9] = [0, 0, 0, 0, 0, 0x10, 0x0e, 0, 0xff];
    pub const ATTRIBUTE: [u8; 21] = [
        0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e,
        0x3f, 0x0c, 0x00, 0x0f, 0x08, 0x00,
    ];
}

/// Character clocks per second, in a line, and lines in a picture of mode 3: 31.5 kHz and 70 Hz.
const CHARACTER_HZ: u64 = 3_146_900;
const LINE_CHARACTERS: u64 = 100;
const LINES: u64 = 449;
/// What of these is shown.
const SHOWN_CHARACTERS: u64 = 80;
const SHOWN_LINES: u64 = 400;
/// Lines in which the beam goes back to the top.
const RETRACE: core::ops::Range<u64> = 412..414;

/// Input status 1.
#[bitfield(u8)]
struct Status {
    display_off: bool,
    #[bits(2)]
    __: u8,
    vertical_retrace: bool,
    #[bits(4)]
    __: u8,
}

/// Index register of the attribute controller.
#[bitfield(u8)]
struct AttributeIndex {
    #[bits(5)]
    index: u8,
    /// The palette belongs to the screen, not to the processor.
    shown: bool,
    #[bits(2)]
    __: u8,
}

/// CRT controller register 7 holds upper bits of others; this one can be set though it is protected.
const LINE_COMPARE_8: u8 = 1 << 4;
/// CRT controller register 11h: registers 0 to 7 are protected.
const PROTECT: u8 = 1 << 7;
/// Colour, not monochrome: registers at 0x3D4.
const COLOUR: u8 = 1 << 0;

/// The registers.
struct Registers {
    misc: u8,
    enabled: u8,
    sequencer_index: u8,
    sequencer: [u8; 5],
    graphics_index: u8,
    graphics: [u8; 9],
    attribute_index: AttributeIndex,
    /// The next write to the attribute controller's port is data.
    attribute_data_next: bool,
    attribute: [u8; 21],
    crtc_index: u8,
    crtc: [u8; CRTC_REGISTERS],
    pixel_mask: u8,
    colours: [[u8; 3]; 256],
    /// Colour to be read or written next, and which of its three parts.
    colour_read: (u8, u8),
    colour_write: (u8, u8),
    colours_are_read: bool,
}

impl Registers {
    fn mode_3() -> Self {
        Registers {
            misc: mode_3::MISC,
            enabled: 1,
            sequencer_index: 0,
            sequencer: mode_3::SEQUENCER,
            graphics_index: 0,
            graphics: mode_3::GRAPHICS,
            attribute_index: AttributeIndex::new().with_shown(true),
            attribute_data_next: false,
            attribute: mode_3::ATTRIBUTE,
            crtc_index: 0,
            crtc: mode_3::CRTC,
            pixel_mask: 0xff,
            colours: text::first_colours(),
            colour_read: (0, 0),
            colour_write: (0, 0),
            colours_are_read: false,
        }
    }

    fn read(&mut self, port: u16, now: u64) -> u8 {
        let at = |registers: &[u8], index: u8| registers.get(usize::from(index)).copied();
        match port {
            ATTRIBUTE => self.attribute_index.into_bits(),
            ATTRIBUTE_DATA => at(&self.attribute, self.attribute_index.index()).unwrap_or(0),
            SUBSYSTEM_ENABLE => self.enabled,
            SEQUENCER => self.sequencer_index,
            SEQUENCER_DATA => at(&self.sequencer, self.sequencer_index).unwrap_or(0),
            PIXEL_MASK => self.pixel_mask,
            COLOUR_READ => 3 * u8::from(self.colours_are_read),
            COLOUR_WRITE => self.colour_write.0,
            COLOUR_DATA => {
                let (colour, part) = self.colour_read;
                self.colour_read = next_part(colour, part);
                self.colours[usize::from(colour)][usize::from(part)]
            }
            MISC_READ => self.misc,
            GRAPHICS => self.graphics_index,
            GRAPHICS_DATA => at(&self.graphics, self.graphics_index).unwrap_or(0),
            CRTC => self.crtc_index,
            CRTC_DATA => at(&self.crtc, self.crtc_index).unwrap_or(0xff),
            STATUS => {
                self.attribute_data_next = false;
                status(now).into_bits()
            }
            // No switches, no feature connector.
            MISC_WRITE | FEATURE_READ => 0,
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u16, value: u8) {
        match port {
            ATTRIBUTE if !self.attribute_data_next => {
                self.attribute_index = AttributeIndex::from_bits(value & 0x3f);
                self.attribute_data_next = true;
            }
            ATTRIBUTE => {
                let index = self.attribute_index.index();
                set(&mut self.attribute, index, &ATTRIBUTE_BITS, value);
                self.attribute_data_next = false;
            }
            MISC_WRITE => self.misc = value | COLOUR,
            SUBSYSTEM_ENABLE => self.enabled = value & 1,
            SEQUENCER => self.sequencer_index = value & 7,
            SEQUENCER_DATA => set(
                &mut self.sequencer,
                self.sequencer_index,
                &SEQUENCER_BITS,
                value,
            ),
            PIXEL_MASK => self.pixel_mask = value,
            COLOUR_READ => {
                self.colour_read = (value, 0);
                self.colours_are_read = true;
            }
            COLOUR_WRITE => {
                self.colour_write = (value, 0);
                self.colours_are_read = false;
            }
            COLOUR_DATA => {
                let (colour, part) = self.colour_write;
                self.colours[usize::from(colour)][usize::from(part)] = value & 0x3f;
                self.colour_write = next_part(colour, part);
            }
            GRAPHICS => self.graphics_index = value & 0xf,
            GRAPHICS_DATA => set(
                &mut self.graphics,
                self.graphics_index,
                &GRAPHICS_BITS,
                value,
            ),
            CRTC => self.crtc_index = value & 0x3f,
            CRTC_DATA => self.write_crtc(value),
            // Read-only, or nothing there.
            _ => {}
        }
    }

    fn write_crtc(&mut self, value: u8) {
        let protected = self.crtc[0x11] & PROTECT != 0;
        let Some(register) = self.crtc.get_mut(usize::from(self.crtc_index)) else {
            return;
        };
        match self.crtc_index {
            7 if protected => *register = *register & !LINE_COMPARE_8 | value & LINE_COMPARE_8,
            0..=7 if protected => {}
            _ => *register = value,
        }
    }
}

fn set(registers: &mut [u8], index: u8, bits: &[u8], value: u8) {
    let index = usize::from(index);
    if let (Some(register), Some(bits)) = (registers.get_mut(index), bits.get(index)) {
        *register = value & bits;
    }
}

fn next_part(colour: u8, part: u8) -> (u8, u8) {
    match part {
        2 => (colour.wrapping_add(1), 0),
        part => (colour, part + 1),
    }
}

/// Where the beam is, `now` character clocks after the start.
fn status(now: u64) -> Status {
    let (line, character) = (now / LINE_CHARACTERS % LINES, now % LINE_CHARACTERS);
    Status::new()
        .with_display_off(line >= SHOWN_LINES || character >= SHOWN_CHARACTERS)
        .with_vertical_retrace(RETRACE.contains(&line))
}

/// The adapter.
pub struct Vga {
    registers: Mutex<Registers>,
    clock: Arc<dyn Clock>,
    characters: Rate,
}

impl Vga {
    /// An adapter as a PC's firmware leaves it: 80 columns and 25 rows of text.
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Vga {
            registers: Mutex::new(Registers::mode_3()),
            characters: Rate::new(clock.hz(), CHARACTER_HZ),
            clock,
        })
    }

    /// Puts the registers where a PC has them.
    pub fn attach(self: &Arc<Self>, ports: &mut PortBus) -> Result<(), Overlap> {
        for (base, count) in PORTS {
            let vga = self.clone();
            ports.insert("vga", base, count, Arc::new(VgaPorts { vga, base }))?;
        }
        Ok(())
    }

    /// What is on the screen now, and where it is in [`TEXT_MEMORY`].
    pub fn scan(&self) -> Scan {
        text::scan(&self.registers.lock())
    }
}

/// The adapter's registers from `base` on.
struct VgaPorts {
    vga: Arc<Vga>,
    base: u16,
}

impl PortDevice for VgaPorts {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        let port = self.base + offset;
        let now = match port {
            STATUS => self.vga.characters.count_at(self.vga.clock.now()),
            _ => 0,
        };
        Ok(u32::from(self.vga.registers.lock().read(port, now)))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let mut registers = self.vga.registers.lock();
        registers.write(self.base + offset, value as u8);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
