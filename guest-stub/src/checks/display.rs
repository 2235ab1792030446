//! A VGA adapter's text screen: its memory, its registers, and its sense of time.
//!
//! Nothing is said by a machine without one: there the group is skipped.

use crate::cpu::{self, port};
use crate::machine::Machine;
use crate::memory::{read8, read16, read64, write8, write16, write64};
use crate::{checks, ensure, ensure_eq, skip_if};

use super::Verdict;

checks![
    text_memory,
    screen_as_firmware_leaves_it,
    cursor_and_start,
    indexed_registers,
    attribute_flip_flop,
    colours,
    retrace,
    redraw,
];

/// The text: 16 Ki cells of a character and an attribute.
const TEXT: u64 = 0xB_8000;
const TEXT_BYTES: u64 = 0x8000;

const ATTRIBUTE: u16 = 0x3C0;
const ATTRIBUTE_DATA: u16 = 0x3C1;
const SEQUENCER: u16 = 0x3C4;
const COLOUR_READ: u16 = 0x3C7;
const COLOUR_WRITE: u16 = 0x3C8;
const COLOUR_DATA: u16 = 0x3C9;
const MISC: u16 = 0x3CC;
const GRAPHICS: u16 = 0x3CE;
const CRTC: u16 = 0x3D4;
const STATUS: u16 = 0x3DA;

/// The beam is on its way back to the top.
const VERTICAL_RETRACE: u8 = 1 << 3;

/// Skips the check where there is no adapter in a mode of text.
fn adapter() -> Verdict {
    let misc = port::read8(MISC);
    skip_if!(misc == 0xFF, "no VGA adapter");
    skip_if!(misc & 1 == 0, "a monochrome adapter");
    skip_if!(attribute(0x10) & 1 != 0, "the adapter shows graphics");
    Ok(())
}

/// Reads a register of the CRT controller.
fn crtc(index: u8) -> u8 {
    port::write8(CRTC, index);
    port::read8(CRTC + 1)
}

/// Reads a register of the attribute controller. The screen stays on.
fn attribute(index: u8) -> u8 {
    const SHOWN: u8 = 1 << 5;
    port::read8(STATUS);
    port::write8(ATTRIBUTE, index | SHOWN);
    let value = port::read8(ATTRIBUTE_DATA);
    port::read8(STATUS);
    value
}

/// The text's memory is memory: each byte keeps what is written, by any width.
fn text_memory(_: &Machine) -> Verdict {
    adapter()?;
    for at in (TEXT..TEXT + TEXT_BYTES).step_by(8) {
        write64(at, at.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    }
    for at in (TEXT..TEXT + TEXT_BYTES).step_by(8) {
        let wanted = at.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ensure_eq!(read64(at), wanted, "at {at:#x}");
    }
    write16(TEXT + 1, 0x1234);
    ensure_eq!(read16(TEXT + 1), 0x1234, "16 bits at an odd address");
    write8(TEXT + TEXT_BYTES - 1, 0x55);
    ensure_eq!(read8(TEXT + TEXT_BYTES - 1), 0x55, "the last byte");
    clear();
    Ok(())
}

/// All cells: a blank, light grey on black.
fn clear() {
    for at in (TEXT..TEXT + TEXT_BYTES).step_by(8) {
        write64(at, 0x0720_0720_0720_0720);
    }
}

/// 80 columns, 25 rows, in colour.
fn screen_as_firmware_leaves_it(_: &Machine) -> Verdict {
    adapter()?;
    ensure_eq!(crtc(0x01), 79, "last column");
    ensure_eq!(crtc(0x13), 40, "words of two cells in a row");
    let overflow = u32::from(crtc(0x07));
    let last_line = u32::from(crtc(0x12)) | (overflow & 2) << 7 | (overflow & 0x40) << 3;
    let lines = u32::from(crtc(0x09) & 0x1F) + 1;
    ensure_eq!((last_line + 1) / lines, 25, "rows");
    Ok(())
}

/// Cursor and start address are kept, in both bytes.
fn cursor_and_start(_: &Machine) -> Verdict {
    adapter()?;
    for index in [0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F] {
        let before = crtc(index);
        for value in [0x15, 0x0A] {
            port::write16(CRTC, value << 8 | u16::from(index));
            ensure_eq!(u16::from(crtc(index)), value, "register {index:#x}");
        }
        port::write8(CRTC + 1, before);
    }
    Ok(())
}

/// Sequencer and graphics controller keep what is written, as far as they have bits for it.
fn indexed_registers(_: &Machine) -> Verdict {
    adapter()?;
    for (index_port, index, value) in [(SEQUENCER, 2, 0x0F), (GRAPHICS, 8, 0xA5)] {
        port::write8(index_port, index);
        ensure_eq!(port::read8(index_port), index, "index at {index_port:#x}");
        let before = port::read8(index_port + 1);
        port::write8(index_port + 1, value);
        ensure_eq!(
            port::read8(index_port + 1),
            value,
            "register {index:#x} at {index_port:#x}"
        );
        port::write8(index_port + 1, before);
    }
    Ok(())
}

/// The attribute controller takes index and value in turns by one port; reading the status begins anew.
fn attribute_flip_flop(_: &Machine) -> Verdict {
    adapter()?;
    const OVERSCAN: u8 = 0x11;
    let before = attribute(OVERSCAN);
    for value in [0x3F, 0x00, before] {
        port::read8(STATUS);
        port::write8(ATTRIBUTE, OVERSCAN);
        port::write8(ATTRIBUTE, value);
        port::read8(STATUS);
        port::write8(ATTRIBUTE, 0x20);
        ensure_eq!(attribute(OVERSCAN), value, "overscan");
    }
    Ok(())
}

/// The colour map is written and read in threes, and goes on by itself.
fn colours(_: &Machine) -> Verdict {
    adapter()?;
    const FIRST: u8 = 0xF0;
    let parts = [1, 2, 3, 0x3F, 0, 0x15];
    port::write8(COLOUR_WRITE, FIRST);
    for part in parts {
        port::write8(COLOUR_DATA, part);
    }
    port::write8(COLOUR_READ, FIRST);
    for part in parts {
        ensure_eq!(port::read8(COLOUR_DATA), part, "part of a colour");
    }
    Ok(())
}

/// The retrace begins and ends within some pictures.
fn retrace(machine: &Machine) -> Verdict {
    adapter()?;
    let second = machine.tsc_hz;
    for wanted in [VERTICAL_RETRACE, 0, VERTICAL_RETRACE] {
        let start = cpu::tsc();
        while port::read8(STATUS) & VERTICAL_RETRACE != wanted {
            ensure!(cpu::tsc() - start < second, "no change in a second");
        }
    }
    Ok(())
}

/// A screen that is redrawn all the time, and turned off and on, harms nobody.
fn redraw(_: &Machine) -> Verdict {
    const PICTURES: u16 = 300;
    adapter()?;
    for picture in 0..PICTURES {
        let cell = u64::from(picture | 0x0100) * 0x0001_0001_0001_0001;
        for at in (TEXT..TEXT + TEXT_BYTES).step_by(8) {
            write64(at, cell);
        }
        port::write16(SEQUENCER, 0x2001);
        port::write16(CRTC, picture << 8 | 0x0D);
        port::write16(SEQUENCER, 0x0001);
    }
    port::write16(CRTC, 0x000D);
    clear();
    Ok(())
}
