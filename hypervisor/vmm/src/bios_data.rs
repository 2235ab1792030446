//! What a PC's firmware leaves in low memory for systems that are booted without one.
//!
//! The BIOS data area at 0x400 (IBM PC technical reference) tells where the first serial port is, how
//! much conventional memory there is, and where it ends for the extended data area, in which systems look for
//! ACPI's root pointer, too. The vectors of real mode lead to code that does nothing, or says that it
//! cannot do what is asked of it: a system that calls the firmware from there goes on without. A firmware of the
//! guest's own writes its own.

use mem::{Gpa, GuestMemory, GuestRange, NotRam};

/// The extended BIOS data area: the last KiB of conventional memory, as on most PCs. Not the guest's.
pub const EXTENDED_AREA: GuestRange = GuestRange {
    start: Gpa(0x9_fc00),
    bytes: 0x400,
};

/// Port of the first serial port, a word.
const SERIAL_PORT: Gpa = Gpa(0x400);
/// Segment of the extended area, a word.
const EXTENDED_SEGMENT: Gpa = Gpa(0x40e);
/// Equipment, a word.
const EQUIPMENT: Gpa = Gpa(0x410);
/// KiB of conventional memory, a word.
const CONVENTIONAL_KIB: Gpa = Gpa(0x413);
/// Video mode, a byte; columns of text and bytes of a page, words.
const VIDEO_MODE: Gpa = Gpa(0x449);
const VIDEO_COLUMNS: Gpa = Gpa(0x44a);
const VIDEO_PAGE: Gpa = Gpa(0x44c);
/// First and last line of the cursor, a word; port of the CRT controller, a word.
const VIDEO_CURSOR: Gpa = Gpa(0x460);
const VIDEO_PORT: Gpa = Gpa(0x463);
/// The last row of text, a byte; lines of a character, a word.
const VIDEO_LAST_ROW: Gpa = Gpa(0x484);
const VIDEO_LINES: Gpa = Gpa(0x485);

/// Equipment: a floating-point unit, and one serial port (bits 9 to 11).
const EQUIPPED: u16 = 1 << 1 | 1 << 9;
/// Equipment, too: the screen begins as one of 80 columns, in colour.
const TEXT_SCREEN: u16 = 2 << 4;
/// Conventional memory: what is below the extended area.
const KIB: u16 = (EXTENDED_AREA.start.0 >> 10) as u16;

/// Where the code of the real-mode vectors is, in segment 0xF000.
const CODE: Gpa = Gpa(0xf_ff40);
/// The segment of the code.
const CODE_SEGMENT: u16 = 0xf000;
/// Vectors of real mode.
const VECTORS: u16 = 256;

/// Code for interrupts that want nothing but a return.
const RETURN: [u8; 1] = [0xcf]; // iret

/// Code for calls that fail: carry in the caller's flags, and 86h, "not there", in AH.
const FAIL: [u8; 11] = [
    0x55, // push bp
    0x89, 0xe5, // mov bp, sp
    0x80, 0x4e, 0x06, 0x01, // or byte [bp + 6], 1
    0xb4, 0x86, // mov ah, 0x86
    0x5d, // pop bp
    0xcf, // iret
];

/// Code for a call that gives AX.
const fn answer(ax: u16) -> [u8; 4] {
    let [low, high] = ax.to_le_bytes();
    [0xb8, low, high, 0xcf] // mov ax, imm16; iret
}

/// Which code a vector leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Service {
    Return,
    Fail,
    Equipment,
    MemorySize,
}

impl Service {
    const fn of(vector: u16) -> Self {
        match vector {
            0x11 => Service::Equipment,
            0x12 => Service::MemorySize,
            // Exceptions, and the hardware's interrupts where firmware puts them.
            0x00..=0x0f | 0x1b..=0x1f | 0x70..=0x77 => Service::Return,
            _ => Service::Fail,
        }
    }

    /// Its code's place behind [`CODE`].
    const fn offset(self) -> u16 {
        self as u16 * 16
    }
}

/// Writes the vectors of real mode, and their code.
fn write_vectors(memory: &GuestMemory, equipped: u16) -> Result<(), NotRam> {
    let place = |service: Service| CODE + u64::from(service.offset());
    memory.write(place(Service::Return), &RETURN)?;
    memory.write(place(Service::Fail), &FAIL)?;
    memory.write(place(Service::Equipment), &answer(equipped))?;
    memory.write(place(Service::MemorySize), &answer(KIB))?;
    for vector in 0..VECTORS {
        let entry = Gpa(u64::from(vector) * 4);
        let offset = (CODE.0 & 0xffff) as u16 + Service::of(vector).offset();
        memory.write_u16(entry, offset)?;
        memory.write_u16(entry + 2, CODE_SEGMENT)?;
    }
    Ok(())
}

/// Writes what there is of a VGA adapter in mode 3: 80 columns and 25 rows of text.
fn write_video(memory: &GuestMemory) -> Result<(), NotRam> {
    memory.write_u8(VIDEO_MODE, 3)?;
    memory.write_u16(VIDEO_COLUMNS, 80)?;
    memory.write_u16(VIDEO_PAGE, 4096)?;
    memory.write_u16(VIDEO_CURSOR, 0x0d0e)?;
    memory.write_u16(VIDEO_PORT, 0x3d4)?;
    memory.write_u8(VIDEO_LAST_ROW, 24)?;
    memory.write_u16(VIDEO_LINES, 16)
}

/// Writes it. `com1`: port of the first serial port, the only one. `text_screen`: there is a VGA adapter.
///
/// # Errors
/// The VM has no RAM there.
pub fn write(memory: &GuestMemory, com1: u16, text_screen: bool) -> Result<(), NotRam> {
    let mut equipped = EQUIPPED;
    if text_screen {
        equipped |= TEXT_SCREEN;
        write_video(memory)?;
    }
    write_vectors(memory, equipped)?;
    let extended = EXTENDED_AREA.start;
    memory.write_u16(SERIAL_PORT, com1)?;
    memory.write_u16(EXTENDED_SEGMENT, (extended.0 >> 4) as u16)?;
    memory.write_u16(EQUIPMENT, equipped)?;
    memory.write_u16(CONVENTIONAL_KIB, KIB)?;
    // Its first byte is its length in KiB.
    memory.write_u8(extended, (EXTENDED_AREA.bytes >> 10) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::fake::FakeMemory;
    use std::boxed::Box;

    #[test]
    fn the_extended_area_is_found_as_systems_look_for_it() {
        let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(2 << 20)));
        let layout = mem::guest::pc_layout(1 << 20);
        let memory = GuestMemory::allocate(host, 1, &layout).unwrap();
        write(&memory, 0x3f8, false).unwrap();
        let word = |at| memory.read_u16(Gpa(at)).unwrap();
        assert_eq!((word(0x410), word(0x463)), (0x202, 0), "no screen");
        assert_eq!((word(0x400), word(0x413)), (0x3f8, 639));
        assert_eq!(u64::from(word(0x40e)) << 4, EXTENDED_AREA.start.0);
        assert_eq!(memory.read_u8(EXTENDED_AREA.start), Ok(1));
        let code = |vector: u64| {
            let (offset, segment) = (word(vector * 4), word(vector * 4 + 2));
            let mut bytes = [0; 4];
            let at = Gpa(u64::from(segment) * 16 + u64::from(offset));
            memory.read(at, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(code(8)[0], 0xcf);
        assert_eq!(code(0x12), [0xb8, 0x7f, 0x02, 0xcf]);
        assert_eq!(code(0x15), FAIL[..4]);
        assert_eq!(code(0xff), code(0x10));
        write(&memory, 0x3f8, true).unwrap();
        assert_eq!((word(0x410), word(0x44a), word(0x463)), (0x222, 80, 0x3d4));
        assert_eq!(code(0x11), [0xb8, 0x22, 0x02, 0xcf]);
    }
}
