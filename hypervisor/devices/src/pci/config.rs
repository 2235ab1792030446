//! The configuration space of a type 0 function: identity, BARs, capabilities.
//!
//! A store of 256 bytes with a mask of writable bits (PCI Local Bus 3.0, chapter 6). A
//! device model keeps one behind its lock and asks it what the guest decided.

use bitfield_struct::bitfield;
use mem::Width;

/// Base address registers of a function.
pub const BARS: usize = 6;
const SPACE: usize = 256;
/// First byte for capabilities.
const CAPABILITIES_START: u8 = 0x40;

mod offset {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const INTERFACE: usize = 0x09;
    pub(super) const SUBCLASS: usize = 0x0a;
    pub(super) const CLASS: usize = 0x0b;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const BARS_END: usize = 0x28;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
}

/// Status register: the function wants its INTx pin asserted.
const STATUS_INTERRUPT: u8 = 1 << 3;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Whether a write at `offset` may change which addresses the function decodes.
pub(super) fn moves_bars(offset: u16) -> bool {
    let offset = usize::from(offset);
    (offset::COMMAND..offset::STATUS).contains(&offset)
        || (offset::BAR0..offset::BARS_END).contains(&offset)
}

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the registers' own names")]
pub struct FunctionId {
    pub vendor: u16,
    pub device: u16,
    pub class: u8,
    pub subclass: u8,
    pub interface: u8,
    pub revision: u8,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// Command register (PCI Local Bus 3.0, figure 6-2).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Command {
    /// I/O BARs decode.
    pub io: bool,
    /// Memory BARs decode.
    pub memory: bool,
    /// The function may access memory and send MSIs.
    pub bus_master: bool,
    #[bits(3)]
    __: u8,
    /// Parity error response.
    pub parity: bool,
    __: bool,
    /// SERR# enable.
    pub serr: bool,
    __: bool,
    /// INTx is off.
    pub interrupt_disable: bool,
    #[bits(5)]
    __: u8,
}

impl Command {
    const WRITABLE: Command = Command::new()
        .with_io(true)
        .with_memory(true)
        .with_bus_master(true)
        .with_parity(true)
        .with_serr(true)
        .with_interrupt_disable(true);
}

/// Kind of a base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// An address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Guest-physical memory addresses.
    Memory,
    /// Ports.
    Io,
}

/// A range that a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Memory or ports.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Bytes or ports, a power of two.
    pub size: u64,
}

/// Why a BAR could not be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarError {
    /// There is no such register, or it (or the second half) is in use.
    NoRegister,
    /// The size is not a power of two, too small for the kind, or too large for it.
    BadSize,
}

/// Why a capability could not be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityError {
    /// Configuration space is full.
    Full,
    /// Body and mask differ in length.
    BadMask,
}

#[derive(Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// The 256 bytes of a function's configuration space.
pub struct ConfigSpace {
    bytes: [u8; SPACE],
    writable: [u8; SPACE],
    bars: [Option<Bar>; BARS],
    /// Where the next capability goes.
    free: u8,
    /// Offset of the byte that points to the next capability.
    last_link: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(id: &FunctionId) -> Self {
        let mut space = ConfigSpace {
            bytes: [0; SPACE],
            writable: [0; SPACE],
            bars: [None; BARS],
            free: CAPABILITIES_START,
            last_link: offset::CAPABILITIES,
        };
        space.set(offset::VENDOR, &id.vendor.to_le_bytes());
        space.set(offset::DEVICE, &id.device.to_le_bytes());
        space.set(offset::REVISION, &[id.revision]);
        space.set(offset::INTERFACE, &[id.interface]);
        space.set(offset::SUBCLASS, &[id.subclass]);
        space.set(offset::CLASS, &[id.class]);
        space.set(offset::SUBSYSTEM_VENDOR, &id.subsystem_vendor.to_le_bytes());
        space.set(offset::SUBSYSTEM, &id.subsystem.to_le_bytes());
        space.allow(
            offset::COMMAND,
            &Command::WRITABLE.into_bits().to_le_bytes(),
        );
        space.allow(offset::CACHE_LINE, &[0xff]);
        space.allow(offset::INTERRUPT_LINE, &[0xff]);
        space
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Adds BAR `index` (0 to 5) of `size` bytes or ports.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), BarError> {
        let two = matches!(kind, BarKind::Memory64 { .. });
        let registers = index..index.saturating_add(1 + usize::from(two));
        // The upper half of a 64-bit BAR is marked by its writable bits.
        let used = |i: usize| {
            self.bars.get(i).is_none_or(Option::is_some)
                || self.writable[offset::BAR0 + 4 * i..][..4] != [0; 4]
        };
        if registers.clone().any(used) {
            return Err(BarError::NoRegister);
        }
        let (min, max, flags): (u64, u64, u32) = match kind {
            BarKind::Io => (4, 256, 0b01),
            BarKind::Memory32 => (16, 1 << 31, 0b0000),
            BarKind::Memory64 {
                prefetchable: false,
            } => (16, 1 << 62, 0b0100),
            BarKind::Memory64 { prefetchable: true } => (16, 1 << 62, 0b1100),
        };
        if !size.is_power_of_two() || !(min..=max).contains(&size) {
            return Err(BarError::BadSize);
        }
        let mask = !(size - 1);
        let at = offset::BAR0 + 4 * index;
        self.set(at, &flags.to_le_bytes());
        self.allow(at, &mask.to_le_bytes()[..4 * registers.len()]);
        self.bars[index] = Some(Bar { kind, size });
        Ok(())
    }

    /// Appends a capability: `body` follows its two-byte header, `writable` is the body's mask.
    ///
    /// Returns the capability's offset.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, CapabilityError> {
        if body.len() != writable.len() {
            return Err(CapabilityError::BadMask);
        }
        let at = usize::from(self.free);
        let end = (at + 2 + body.len()).next_multiple_of(4);
        // The space ends with the last byte that `free` can name.
        let free = u8::try_from(end).map_err(|_| CapabilityError::Full)?;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let offset = self.free;
        self.bytes[self.last_link] = offset;
        self.last_link = at + 1;
        self.bytes[offset::STATUS] |= STATUS_CAPABILITIES;
        self.free = free;
        Ok(offset)
    }

    /// Gives the registers from `at` on their reset values and the masks of their writable bits; what lies
    /// beyond the 256 bytes is left out.
    pub fn set_registers(&mut self, at: u16, values: &[u8], writable: &[u8]) {
        for (index, (&value, &mask)) in (usize::from(at)..SPACE).zip(values.iter().zip(writable)) {
            self.bytes[index] = value;
            self.writable[index] = mask;
        }
    }

    /// Says that the function uses INTA# (1) to INTD# (4), or none (0).
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.bytes[offset::INTERRUPT_PIN] = pin;
    }

    /// Shows in the status register whether the function wants its INTx pin asserted.
    pub fn set_interrupt_status(&mut self, wanted: bool) {
        let status = &mut self.bytes[offset::STATUS];
        *status = *status & !STATUS_INTERRUPT | if wanted { STATUS_INTERRUPT } else { 0 };
    }

    /// Reads 1, 2 or 4 bytes; 0 beyond the 256 bytes.
    pub fn read(&self, at: u16, width: Width) -> u32 {
        (0..width.bytes().min(4)).rev().fold(0, |value, i| {
            let byte = self.bytes.get(usize::from(at) + i).copied().unwrap_or(0);
            value << 8 | u32::from(byte)
        })
    }

    /// Writes 1, 2 or 4 bytes where the mask allows.
    pub fn write(&mut self, at: u16, width: Width, value: u32) {
        for (i, new) in value
            .to_le_bytes()
            .into_iter()
            .enumerate()
            .take(width.bytes())
        {
            let at = usize::from(at) + i;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    /// The command register.
    pub fn command(&self) -> Command {
        Command::from_bits(self.read(offset::COMMAND as u16, Width::Word) as u16)
    }

    /// The ranges that decode now: of enabled spaces, with a base that was set.
    pub fn bars(&self) -> [Option<BarRange>; BARS] {
        let command = self.command();
        core::array::from_fn(|index| {
            let bar = self.bars[index]?;
            let at = (offset::BAR0 + 4 * index) as u16;
            let low = u64::from(self.read(at, Width::Dword));
            let (space, enabled, raw) = match bar.kind {
                BarKind::Io => (Space::Io, command.io(), low),
                BarKind::Memory32 => (Space::Memory, command.memory(), low),
                BarKind::Memory64 { .. } => {
                    let high = u64::from(self.read(at + 4, Width::Dword));
                    (Space::Memory, command.memory(), high << 32 | low)
                }
            };
            let base = raw & !(bar.size - 1);
            (enabled && base != 0).then_some(BarRange {
                space,
                base,
                size: bar.size,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&FunctionId {
            vendor: 0x1234,
            device: 0x5678,
            class: 2,
            subclass: 1,
            interface: 3,
            revision: 4,
            subsystem_vendor: 0x9abc,
            subsystem: 0xdef0,
        })
    }

    #[test]
    fn identity_is_read_only() {
        let mut s = space();
        for at in (0..0x40).step_by(4) {
            s.write(at, Width::Dword, u32::MAX);
        }
        assert_eq!(s.read(0, Width::Dword), 0x5678_1234);
        assert_eq!(s.read(4, Width::Dword), 0x0547, "command, no status");
        assert_eq!(s.read(8, Width::Dword), 0x0201_0304);
        assert_eq!(s.read(0x0c, Width::Dword), 0xff);
        assert_eq!(s.read(0x2c, Width::Dword), 0xdef0_9abc);
        assert_eq!(s.read(0x3c, Width::Dword), 0xff);
        assert_eq!(s.read(0xfff, Width::Dword), 0);
    }

    #[test]
    fn bad_bars_are_refused() {
        let mut s = space();
        let wide = BarKind::Memory64 {
            prefetchable: false,
        };
        assert_eq!(s.add_bar(6, BarKind::Io, 32), Err(BarError::NoRegister));
        assert_eq!(s.add_bar(5, wide, 4096), Err(BarError::NoRegister));
        assert_eq!(s.add_bar(0, BarKind::Memory32, 48), Err(BarError::BadSize));
        assert_eq!(s.add_bar(0, BarKind::Memory32, 0), Err(BarError::BadSize));
        assert_eq!(s.add_bar(0, BarKind::Io, 512), Err(BarError::BadSize));
        assert_eq!(s.add_bar(0, wide, 1 << 33), Ok(()));
        assert_eq!(s.add_bar(1, BarKind::Io, 32), Err(BarError::NoRegister));
        assert_eq!(s.add_bar(2, BarKind::Io, 32), Ok(()));
    }

    #[test]
    fn capabilities_are_linked() {
        let mut s = space();
        assert_eq!(s.read(0x34, Width::Byte), 0);
        let first = s.add_capability(0x11, &[7; 10], &[0xff; 10]).unwrap();
        let second = s.add_capability(0x09, &[1, 2, 3], &[0; 3]).unwrap();
        assert_eq!((first, second), (0x40, 0x4c));
        assert_eq!(s.read(0x06, Width::Word), 0x10);
        assert_eq!(s.read(0x34, Width::Byte), 0x40);
        assert_eq!(s.read(0x40, Width::Word), 0x4c11);
        assert_eq!(s.read(0x4c, Width::Dword), 0x0201_0009);
        s.write(0x40, Width::Dword, 0);
        s.write(0x4c, Width::Dword, 0);
        assert_eq!(s.read(0x40, Width::Dword), 0x4c11);
        assert_eq!(s.read(0x4c, Width::Dword), 0x0201_0009);
        assert_eq!(
            s.add_capability(5, &[0; 4], &[]),
            Err(CapabilityError::BadMask)
        );
        let large = [0; 200];
        assert_eq!(
            s.add_capability(5, &large, &large),
            Err(CapabilityError::Full)
        );
        assert_eq!(s.add_capability(5, &[0; 2], &[0; 2]), Ok(0x54));
    }
}
