//! I/O APIC: which interrupt line raises which vector on which processor, and the old PICs kept silent.
//!
//! (82093AA datasheet; ACPI 6.5, sections 5.2.12.3 and 5.2.12.5 for numbering and overrides.)

use bitfield_struct::bitfield;
use x86_64::instructions::port::Port;

use crate::firmware::{Polarity, Trigger};

/// Index of the version register.
const VERSION: u32 = 1;
/// Index of the first redirection entry; each takes two.
const REDIRECTION: u32 = 0x10;
/// Offset of the data window from the index register.
const WINDOW: usize = 0x10;

/// A redirection entry.
#[bitfield(u64)]
struct Redirection {
    vector: u8,
    #[bits(3)]
    delivery: u8,
    logical: bool,
    pending: bool,
    active_low: bool,
    remote_irr: bool,
    level: bool,
    masked: bool,
    #[bits(39)]
    __: u64,
    destination: u8,
}

/// One I/O APIC, all lines masked until routed.
#[derive(Debug)]
pub struct IoApic {
    registers: *mut u32,
    /// Global number of its first line.
    first_gsi: u32,
    lines: u32,
}

// SAFETY: the register page stays mapped and is reachable from every processor; `&mut self` serialises the index register.
unsafe impl Send for IoApic {}

impl IoApic {
    /// Takes over the I/O APIC whose lines begin at `first_gsi` and masks them all.
    ///
    /// # Safety
    /// `registers` must be the uncached mapping, for ever, of an I/O APIC that nobody else drives.
    pub unsafe fn new(registers: *mut u32, first_gsi: u32) -> Self {
        let mut io_apic = IoApic {
            registers,
            first_gsi,
            lines: 0,
        };
        io_apic.lines = (io_apic.read(VERSION) >> 16 & 0xff) + 1;
        for line in 0..io_apic.lines {
            io_apic.set(line, Redirection::new().with_masked(true));
        }
        io_apic
    }

    fn read(&mut self, index: u32) -> u32 {
        // SAFETY: the page is mapped (constructor's contract); index and window are its two registers.
        unsafe {
            self.registers.write_volatile(index);
            self.registers.byte_add(WINDOW).read_volatile()
        }
    }

    fn write(&mut self, index: u32, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            self.registers.write_volatile(index);
            self.registers.byte_add(WINDOW).write_volatile(value);
        }
    }

    fn set(&mut self, line: u32, entry: Redirection) {
        let bits = entry.into_bits();
        let index = REDIRECTION + 2 * line;
        // Masked first, so that a half-written entry never delivers.
        self.write(
            index,
            Redirection::new().with_masked(true).into_bits() as u32,
        );
        self.write(index + 1, (bits >> 32) as u32);
        self.write(index, bits as u32);
    }

    /// Lets line `gsi` raise `vector` on the processor `apic_id`. `false`: the line is not one of this I/O APIC's.
    #[must_use]
    pub fn route(
        &mut self,
        gsi: u32,
        vector: u8,
        apic_id: u8,
        polarity: Polarity,
        trigger: Trigger,
    ) -> bool {
        let Some(line) = gsi.checked_sub(self.first_gsi).filter(|&l| l < self.lines) else {
            return false;
        };
        self.set(
            line,
            Redirection::new()
                .with_vector(vector)
                .with_destination(apic_id)
                .with_active_low(polarity == Polarity::ActiveLow)
                .with_level(trigger == Trigger::Level),
        );
        true
    }

    /// Number of lines.
    pub fn lines(&self) -> u32 {
        self.lines
    }
}

/// Moves the two 8259 PICs to vectors `0x20` to `0x2f`, out of the exceptions' way, and masks all their lines.
///
/// # Safety
/// The kernel must own the PICs; on a machine without them the ports must be unused.
pub unsafe fn silence_pics() {
    let write = |port: u16, value: u8| {
        // SAFETY: the caller vouches for the PICs' ports; 0x80 is the port for harmless delays.
        unsafe {
            Port::<u8>::new(port).write(value);
            Port::<u8>::new(0x80).write(0);
        }
    };
    for (command, data, base, cascade) in [(0x20, 0x21, 0x20, 4), (0xa0, 0xa1, 0x28, 2)] {
        write(command, 0x11); // ICW1: edge triggered, cascaded, ICW4 follows
        write(data, base); // ICW2: first vector
        write(data, cascade); // ICW3: where the second one is attached
        write(data, 0x01); // ICW4: 8086 mode
        write(data, 0xff); // OCW1: all lines masked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirection_has_the_datasheets_encoding() {
        let entry = Redirection::new()
            .with_vector(0x40)
            .with_destination(3)
            .with_active_low(true)
            .with_level(true);
        assert_eq!(entry.into_bits(), 0x0300_0000_0000_a040);
        assert_eq!(Redirection::new().with_masked(true).into_bits(), 1 << 16);
    }
}
