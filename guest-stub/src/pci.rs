//! PCI functions of bus 0, by configuration mechanism 1.

use crate::cpu::port;

const ADDRESS: u16 = 0xCF8;
const DATA: u16 = 0xCFC;

/// Command register.
pub const COMMAND: u8 = 0x04;
/// Command: memory BARs decode.
pub const MEMORY: u16 = 1 << 1;
/// Command: the function may access memory.
pub const BUS_MASTER: u16 = 1 << 2;
/// Command: the interrupt pin is off.
pub const INTERRUPT_DISABLE: u16 = 1 << 10;
/// Status: the function wants its interrupt pin asserted.
pub const INTERRUPT_STATUS: u16 = 1 << 3;
const CAPABILITIES: u8 = 0x34;

/// A function of bus 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Function {
    pub device: u8,
}

impl Function {
    /// The first device with this vendor (low half) and device number.
    pub fn find(identity: u32) -> Option<Self> {
        (0..32)
            .map(|device| Self { device })
            .find(|function| function.read32(0) == identity)
    }

    fn select(self, register: u8) {
        let device = u32::from(self.device) << 11;
        port::write32(ADDRESS, 1 << 31 | device | u32::from(register & 0xFC));
    }

    /// Reads the four bytes at `register`, a multiple of 4.
    pub fn read32(self, register: u8) -> u32 {
        self.select(register);
        port::read32(DATA)
    }

    /// Reads two bytes at `register`, a multiple of 2.
    pub fn read16(self, register: u8) -> u16 {
        self.select(register);
        port::read16(DATA + u16::from(register & 2))
    }

    /// Reads a byte.
    pub fn read8(self, register: u8) -> u8 {
        self.select(register);
        port::read8(DATA + u16::from(register & 3))
    }

    /// Writes the four bytes at `register`, a multiple of 4.
    pub fn write32(self, register: u8, value: u32) {
        self.select(register);
        port::write32(DATA, value);
    }

    /// Writes two bytes at `register`, a multiple of 2.
    pub fn write16(self, register: u8, value: u16) {
        self.select(register);
        port::write16(DATA + u16::from(register & 2), value);
    }

    /// Its capabilities: where each is, and its number. A list that runs in a circle ends.
    pub fn capabilities(self) -> impl Iterator<Item = (u8, u8)> {
        let mut next = self.read8(CAPABILITIES) & 0xFC;
        (0..48).map_while(move |_| {
            let at = next;
            (at != 0).then(|| {
                next = self.read8(at + 1) & 0xFC;
                (at, self.read8(at))
            })
        })
    }
}
