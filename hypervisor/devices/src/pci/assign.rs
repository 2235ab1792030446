//! What firmware does with a bus before it starts a system: gives the BARs addresses, and says which interrupts.
//!
//! For guests that are started without firmware. Every BAR is sized and placed as firmware does it, through
//! configuration space (PCI Local Bus 3.0, section 6.2.5.1), within the windows of the layout.

use mem::Width;

use super::{BARS, PciBus, PciFunction, PciLayout};

const VENDOR: u16 = 0x00;
const COMMAND: u16 = 0x04;
const BAR0: u16 = 0x10;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
/// Command: I/O and memory BARs decode.
const DECODE: u32 = 0b11;
/// An I/O BAR.
const BAR_IO: u32 = 1;
/// Bits 2:1 of a memory BAR, and their value when it takes two registers.
const BAR_TYPE: u32 = 0b110;
const BAR_64: u32 = 0b100;

/// Hands out addresses of a window, from the bottom.
struct Window {
    next: u64,
    end: u64,
}

impl Window {
    /// The next `size` bytes, aligned to their size. `None`: no room.
    fn take(&mut self, size: u64) -> Option<u64> {
        let base = self.next.checked_next_multiple_of(size)?;
        let next = base.checked_add(size).filter(|next| *next <= self.end)?;
        self.next = next;
        Some(base)
    }
}

impl PciBus {
    /// Places the BARs of all functions and has them decode; one for which a window has no room stays off. A function with
    /// an interrupt pin gets the line number that `irq` gives for its device and pin (0 is INTA#).
    pub fn assign(&self, layout: &PciLayout, irq: impl Fn(u8, u8) -> u8) {
        let mut memory = Window {
            next: layout.mmio32.start,
            end: layout.mmio32.end,
        };
        let mut io = Window {
            next: u64::from(layout.io.start),
            end: u64::from(layout.io.end),
        };
        for (slot, function) in (0u8..=255).zip(self.slots.iter()) {
            let Some(function) = function else { continue };
            if function.config_read(VENDOR, Width::Word) == 0xffff {
                continue;
            }
            let complete = assign_bars(&**function, &mut memory, &mut io);
            if complete {
                let command = function.config_read(COMMAND, Width::Word);
                function.config_write(COMMAND, Width::Word, command | DECODE);
            }
            let pin = function.config_read(INTERRUPT_PIN, Width::Byte) as u8;
            if let Some(pin @ 0..=3) = pin.checked_sub(1) {
                let line = u32::from(irq(slot >> 3, pin));
                function.config_write(INTERRUPT_LINE, Width::Byte, line);
            }
        }
        self.refresh();
    }
}

/// Whether all BARs of the function have a place.
fn assign_bars(function: &dyn PciFunction, memory: &mut Window, io: &mut Window) -> bool {
    let mut complete = true;
    let mut index = 0;
    while index < BARS {
        let at = BAR0 + 4 * index as u16;
        function.config_write(at, Width::Dword, u32::MAX);
        let bits = function.config_read(at, Width::Dword);
        let is_io = bits & BAR_IO != 0;
        let wide = !is_io && bits & BAR_TYPE == BAR_64;
        index += 1 + usize::from(wide);
        let address = if is_io { bits & !0b11 } else { bits & !0b1111 };
        if address == 0 {
            // No BAR, or one of 4 GiB or more, for which there is no room below 4 GiB.
            complete &= bits == 0;
            continue;
        }
        let size = 1 << address.trailing_zeros();
        let base = if is_io {
            io.take(size)
        } else {
            memory.take(size)
        };
        complete &= base.is_some();
        function.config_write(at, Width::Dword, base.unwrap_or(0) as u32);
        if wide {
            function.config_write(at + 4, Width::Dword, 0);
        }
    }
    complete
}
