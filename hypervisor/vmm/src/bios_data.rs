//! What a PC's firmware leaves in low memory for systems that are booted without one.
//!
//! The BIOS data area at 0x400 (IBM PC technical reference) tells where the first serial port is, how
//! much conventional memory there is, and where it ends for the extended data area, in which systems look for
//! ACPI's root pointer, too. A firmware of the guest's own writes its own.

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

/// Equipment: a floating-point unit.
const HAS_FPU: u16 = 1 << 1;
/// Equipment: the number of serial ports begins at this bit.
const SERIAL_PORTS_SHIFT: u16 = 9;

/// Writes it. `com1`: port of the first serial port, the only one.
///
/// # Errors
/// The VM has no RAM there.
pub fn write(memory: &GuestMemory, com1: u16) -> Result<(), NotRam> {
    let extended = EXTENDED_AREA.start;
    memory.write_u16(SERIAL_PORT, com1)?;
    memory.write_u16(EXTENDED_SEGMENT, (extended.0 >> 4) as u16)?;
    memory.write_u16(EQUIPMENT, HAS_FPU | 1 << SERIAL_PORTS_SHIFT)?;
    memory.write_u16(CONVENTIONAL_KIB, (extended.0 >> 10) as u16)?;
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
        write(&memory, 0x3f8).unwrap();
        let word = |at| memory.read_u16(Gpa(at)).unwrap();
        assert_eq!((word(0x400), word(0x413)), (0x3f8, 639));
        assert_eq!(u64::from(word(0x40e)) << 4, EXTENDED_AREA.start.0);
        assert_eq!(memory.read_u8(EXTENDED_AREA.start), Ok(1));
    }
}
