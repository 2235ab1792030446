//! Port and MMIO buses: who owns which address, and what nobody's address reads as.
//!
//! The bus owns placement: it refuses overlaps, hands devices offsets from their base, and
//! supplies all-ones for what nobody claims or a device refuses. Buses are built once, then
//! only read, so look-ups take no lock.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use mem::Width;

/// Why a device refuses an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// No register at this offset, or not in this direction.
    InvalidRegister,
    /// The register exists but not at this width.
    InvalidWidth,
    /// The offset is not a multiple of the width.
    Unaligned,
}

/// A device behind I/O ports.
pub trait PortDevice: Send + Sync {
    /// Reads `width` (1, 2 or 4 bytes) at `offset` from the device's base.
    #[must_use = "an error must become all-ones"]
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError>;
    /// Writes the low `width` bytes of `value` at `offset` from the device's base.
    #[must_use = "an error must be counted"]
    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError>;
}

/// A device behind guest-physical addresses.
pub trait MmioDevice: Send + Sync {
    /// Reads `width` (1, 2, 4 or 8 bytes) at `offset` from the device's base.
    #[must_use = "an error must become all-ones"]
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError>;
    /// Writes the low `width` bytes of `value` at `offset` from the device's base.
    #[must_use = "an error must be counted"]
    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError>;
}

/// Why a device could not be placed on a bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlap {
    /// Another device already owns part of the range.
    Taken {
        /// Who wants the range.
        newcomer: String,
        /// Who has it.
        owner: String,
        /// First address that both claim.
        address: u64,
    },
    /// The range is empty or runs past the end of the address space.
    OutOfSpace {
        /// Who wants the range.
        newcomer: String,
    },
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Overlap::Taken {
                newcomer,
                owner,
                address,
            } => write!(
                f,
                "{newcomer} cannot have {address:#x}: it belongs to {owner}"
            ),
            Overlap::OutOfSpace { newcomer } => {
                write!(
                    f,
                    "the range of {newcomer} is empty or leaves the address space"
                )
            }
        }
    }
}

impl core::error::Error for Overlap {}

/// How often a bus had to answer by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusCounters {
    /// Accesses that no device claims.
    pub unclaimed: u64,
    /// Accesses that the owner refused.
    pub refused: u64,
}

#[derive(Default)]
struct Counters {
    unclaimed: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    fn snapshot(&self) -> BusCounters {
        BusCounters {
            unclaimed: self.unclaimed.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

const PORTS_PER_PAGE: usize = 256;

struct PortEntry {
    name: String,
    base: u16,
    device: Arc<dyn PortDevice>,
}

/// The 64 Ki I/O ports of a guest.
///
/// A look-up is two array reads: the port's high byte selects a page of slots, the low byte
/// a slot in it. An access belongs to the device at its *first* port. Where a device refuses a
/// width, the bus splits the access into bytes, as an ISA bus does for 8-bit devices.
pub struct PortBus {
    /// Per high byte: the number of its page in `slots`. The first page is the empty one.
    pages: Box<[u16; 256]>,
    /// Per port: 1 + index into `entries`, or 0 for nobody.
    slots: Vec<u16>,
    entries: Vec<PortEntry>,
    counters: Counters,
}

impl PortBus {
    /// A bus without devices.
    pub fn new() -> Self {
        PortBus {
            pages: Box::new([0; 256]),
            slots: alloc::vec![0; PORTS_PER_PAGE],
            entries: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Gives `device` the `len` ports from `base`. The same device may be inserted several times.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        base: u16,
        len: u16,
        device: Arc<dyn PortDevice>,
    ) -> Result<(), Overlap> {
        let name = name.into();
        let range = u32::from(base)..u32::from(base) + u32::from(len);
        if range.is_empty() || range.end > 0x1_0000 || self.entries.len() >= usize::from(u16::MAX) {
            return Err(Overlap::OutOfSpace { newcomer: name });
        }
        for port in range.clone() {
            if let Some(owner) = self.entry(port as u16) {
                return Err(Overlap::Taken {
                    newcomer: name,
                    owner: owner.name.clone(),
                    address: u64::from(port),
                });
            }
        }
        self.entries.push(PortEntry { name, base, device });
        let slot = self.entries.len() as u16;
        for port in range {
            let [low, high, ..] = port.to_le_bytes();
            let page = &mut self.pages[usize::from(high)];
            if *page == 0 {
                *page = (self.slots.len() / PORTS_PER_PAGE) as u16;
                self.slots.resize(self.slots.len() + PORTS_PER_PAGE, 0);
            }
            self.slots[usize::from(*page) * PORTS_PER_PAGE + usize::from(low)] = slot;
        }
        Ok(())
    }

    #[inline]
    fn entry(&self, port: u16) -> Option<&PortEntry> {
        let [low, high] = port.to_le_bytes();
        let page = usize::from(self.pages[usize::from(high)]);
        let slot = *self.slots.get(page * PORTS_PER_PAGE + usize::from(low))?;
        self.entries.get(usize::from(slot).checked_sub(1)?)
    }

    /// Reads 1, 2 or 4 bytes at `port`; all-ones where nobody answers.
    #[inline]
    pub fn read(&self, port: u16, width: Width) -> u32 {
        let answer = match self.entry(port) {
            Some(entry) => entry.device.read(port - entry.base, width),
            None => return self.unclaimed() & width.mask() as u32,
        };
        match answer {
            Ok(value) => value & width.mask() as u32,
            Err(why) => self.refused_read(port, width, why),
        }
    }

    /// Writes 1, 2 or 4 bytes at `port`; lost where nobody listens.
    #[inline]
    pub fn write(&self, port: u16, width: Width, value: u32) {
        let value = value & width.mask() as u32;
        let answer = match self.entry(port) {
            Some(entry) => entry.device.write(port - entry.base, width, value),
            None => {
                self.unclaimed();
                return;
            }
        };
        if let Err(why) = answer {
            self.refused_write(port, width, value, why);
        }
    }

    /// Counts an access that nobody claims; what it reads as.
    fn unclaimed(&self) -> u32 {
        self.counters.unclaimed.fetch_add(1, Ordering::Relaxed);
        u32::MAX
    }

    /// What a read gives that the device refused: bytes from each port by itself, or all-ones.
    #[cold]
    #[inline(never)]
    fn refused_read(&self, port: u16, width: Width, why: IoError) -> u32 {
        if why == IoError::InvalidWidth && width != Width::Byte {
            return self.byte_ports(port, width).rev().fold(0, |value, port| {
                let byte = port.map_or(0xff, |p| self.read(p, Width::Byte));
                (value << 8) | byte
            });
        }
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        width.mask() as u32
    }

    /// Writes bytes to each port by itself where the device refused a wider access.
    #[cold]
    #[inline(never)]
    fn refused_write(&self, port: u16, width: Width, value: u32, why: IoError) {
        if why == IoError::InvalidWidth && width != Width::Byte {
            for (port, byte) in self.byte_ports(port, width).zip(value.to_le_bytes()) {
                if let Some(port) = port {
                    self.write(port, Width::Byte, u32::from(byte));
                }
            }
            return;
        }
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// The ports of a wide access, lowest first; `None` beyond the last port. At most four.
    fn byte_ports(
        &self,
        port: u16,
        width: Width,
    ) -> impl DoubleEndedIterator<Item = Option<u16>> + use<> {
        (0..width.bytes().min(4) as u16).map(move |i| port.checked_add(i))
    }

    /// Who owns `port`.
    pub fn owner(&self, port: u16) -> Option<&str> {
        self.entry(port).map(|e| e.name.as_str())
    }

    /// Accesses that the bus answered by itself.
    pub fn counters(&self) -> BusCounters {
        self.counters.snapshot()
    }
}

impl Default for PortBus {
    fn default() -> Self {
        Self::new()
    }
}

struct MmioEntry {
    name: String,
    base: u64,
    /// Last byte, so that a range may end at the top of the address space.
    last: u64,
    device: Arc<dyn MmioDevice>,
}

/// The guest-physical addresses that belong to devices.
///
/// Ranges are sorted; a look-up first tries the range of the last hit, then searches by halves.
#[derive(Default)]
pub struct MmioBus {
    entries: Vec<MmioEntry>,
    hint: AtomicUsize,
    counters: Counters,
}

impl MmioBus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `device` the `len` bytes from guest-physical `base`.
    pub fn insert(
        &mut self,
        name: impl Into<String>,
        base: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), Overlap> {
        let name = name.into();
        let Some(last) = len.checked_sub(1).and_then(|l| base.checked_add(l)) else {
            return Err(Overlap::OutOfSpace { newcomer: name });
        };
        let at = self.entries.partition_point(|e| e.last < base);
        if let Some(owner) = self.entries.get(at).filter(|e| e.base <= last) {
            return Err(Overlap::Taken {
                newcomer: name,
                owner: owner.name.clone(),
                address: base.max(owner.base),
            });
        }
        self.entries.insert(
            at,
            MmioEntry {
                name,
                base,
                last,
                device,
            },
        );
        Ok(())
    }

    fn entry(&self, address: u64) -> Option<&MmioEntry> {
        let hint = self.hint.load(Ordering::Relaxed);
        if let Some(entry) = self.entries.get(hint)
            && (entry.base..=entry.last).contains(&address)
        {
            return Some(entry);
        }
        let at = self.entries.partition_point(|e| e.last < address);
        let entry = self.entries.get(at).filter(|e| e.base <= address)?;
        self.hint.store(at, Ordering::Relaxed);
        Some(entry)
    }

    /// Whether a device owns `address`.
    pub fn claims(&self, address: u64) -> bool {
        self.entry(address).is_some()
    }

    /// Who owns `address`.
    pub fn owner(&self, address: u64) -> Option<&str> {
        self.entry(address).map(|e| e.name.as_str())
    }

    /// Reads `width` bytes at guest-physical `address`; all-ones where nobody answers.
    pub fn read(&self, address: u64, width: Width) -> u64 {
        let Some(entry) = self.entry(address) else {
            self.counters.unclaimed.fetch_add(1, Ordering::Relaxed);
            return width.mask();
        };
        let result = if entry.last - address < width.bytes() as u64 - 1 {
            Err(IoError::Unaligned)
        } else {
            entry.device.read(address - entry.base, width)
        };
        result.map_or_else(
            |_| {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                width.mask()
            },
            |value| value & width.mask(),
        )
    }

    /// Writes the low `width` bytes of `value` at guest-physical `address`; lost where nobody listens.
    pub fn write(&self, address: u64, width: Width, value: u64) {
        let Some(entry) = self.entry(address) else {
            self.counters.unclaimed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let result = if entry.last - address < width.bytes() as u64 - 1 {
            Err(IoError::Unaligned)
        } else {
            entry
                .device
                .write(address - entry.base, width, value & width.mask())
        };
        if result.is_err() {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Accesses that the bus answered by itself.
    pub fn counters(&self) -> BusCounters {
        self.counters.snapshot()
    }
}

/// Refuses all widths but one byte, for devices with 8-bit registers; the bus splits wider accesses.
pub(crate) fn byte_only(width: Width) -> Result<(), IoError> {
    if width == Width::Byte {
        Ok(())
    } else {
        Err(IoError::InvalidWidth)
    }
}

/// Accepts every access and answers all-ones: a port that software writes for delay or debugging.
///
/// For the POST code port 0x80 and the like.
pub struct Swallow;

impl PortDevice for Swallow {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        Ok(width.mask() as u32)
    }

    fn write(&self, _offset: u16, _width: Width, _value: u32) -> Result<(), IoError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use spin::Mutex;

    /// A byte-wide register file.
    struct Bytes(Mutex<[u8; 4]>);

    impl PortDevice for Bytes {
        fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
            if width != Width::Byte {
                return Err(IoError::InvalidWidth);
            }
            self.0
                .lock()
                .get(usize::from(offset))
                .map(|&b| u32::from(b))
                .ok_or(IoError::InvalidRegister)
        }

        fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
            if width != Width::Byte {
                return Err(IoError::InvalidWidth);
            }
            *self
                .0
                .lock()
                .get_mut(usize::from(offset))
                .ok_or(IoError::InvalidRegister)? = value as u8;
            Ok(())
        }
    }

    impl MmioDevice for Bytes {
        fn read(&self, offset: u64, _width: Width) -> Result<u64, IoError> {
            Ok(offset)
        }

        fn write(&self, offset: u64, _width: Width, value: u64) -> Result<(), IoError> {
            self.0.lock()[offset as usize % 4] = value as u8;
            Ok(())
        }
    }

    fn bytes() -> Arc<Bytes> {
        Arc::new(Bytes(Mutex::new([1, 2, 3, 4])))
    }

    #[test]
    fn unclaimed_ports_read_all_ones_and_are_counted() {
        let bus = PortBus::new();
        assert_eq!(bus.read(0x1234, Width::Word), 0xffff);
        bus.write(0x1234, Width::Byte, 0);
        assert_eq!(bus.counters().unclaimed, 2);
    }

    #[test]
    fn overlap_names_both_owners() {
        let mut bus = PortBus::new();
        bus.insert("first", 0x60, 1, bytes()).unwrap();
        bus.insert("neighbour", 0x61, 1, bytes()).unwrap();
        let error = bus.insert("second", 0x5f, 4, bytes()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "second cannot have 0x60: it belongs to first"
        );
        assert_eq!(bus.owner(0x5f), None);
        assert_eq!(bus.owner(0x61), Some("neighbour"));
    }

    #[test]
    fn ranges_past_the_end_are_refused() {
        let mut bus = PortBus::new();
        assert!(bus.insert("wrap", 0xfffe, 4, bytes()).is_err());
        assert!(bus.insert("empty", 0, 0, bytes()).is_err());
        bus.insert("edge", 0xfffe, 2, bytes()).unwrap();
        assert_eq!(bus.read(0xffff, Width::Dword), 0xffff_ff02);
        let mut mmio = MmioBus::new();
        assert!(mmio.insert("wrap", u64::MAX, 2, bytes()).is_err());
        mmio.insert("top", u64::MAX, 1, bytes()).unwrap();
        assert_eq!(mmio.read(u64::MAX, Width::Byte), 0);
        assert_eq!(mmio.read(u64::MAX, Width::Dword), 0xffff_ffff);
    }

    #[test]
    fn wide_accesses_to_byte_devices_are_split() {
        let mut bus = PortBus::new();
        bus.insert("bytes", 0x40, 4, bytes()).unwrap();
        assert_eq!(bus.read(0x40, Width::Dword), 0x0403_0201);
        assert_eq!(bus.read(0x43, Width::Word), 0xff04);
        bus.write(0x40, Width::Word, 0xabcd);
        assert_eq!(bus.read(0x40, Width::Byte), 0xcd);
        assert_eq!(bus.read(0x41, Width::Byte), 0xab);
    }

    #[test]
    fn every_page_of_ports_can_be_used() {
        let mut bus = PortBus::new();
        let mut placed = 0;
        for page in 0..=255u16 {
            if bus.insert("page", page << 8, 1, bytes()).is_ok() {
                placed += 1;
                assert_eq!(bus.read(page << 8, Width::Byte), 1);
            }
        }
        assert_eq!(placed, 256);
    }

    #[test]
    fn mmio_is_sorted_whatever_the_order_of_insertion() {
        let mut bus = MmioBus::new();
        for base in [0x3000, 0x1000, 0x2000] {
            bus.insert(format!("dev{base:x}"), base, 0x1000, bytes())
                .unwrap();
        }
        let error = bus.insert("late", 0x1fff, 2, bytes()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "late cannot have 0x1fff: it belongs to dev1000"
        );
        assert_eq!(bus.owner(0x2abc), Some("dev2000"));
        assert_eq!(bus.read(0x2abc, Width::Dword), 0xabc);
        assert_eq!(bus.read(0x2ffe, Width::Dword), 0xffff_ffff);
        assert_eq!(bus.read(0x4000, Width::Qword), u64::MAX);
        assert_eq!(
            bus.counters(),
            BusCounters {
                unclaimed: 1,
                refused: 1
            }
        );
    }

    proptest! {
        #[test]
        fn mmio_lookup_agrees_with_a_linear_search(
            ranges in proptest::collection::vec((0u64..1000, 1u64..50), 0..30),
            probes in proptest::collection::vec(0u64..1100, 1..100),
        ) {
            let mut bus = MmioBus::new();
            let mut model: Vec<(u64, u64)> = Vec::new();
            for (base, len) in ranges {
                let free = model.iter().all(|&(b, l)| base + len <= b || b + l <= base);
                prop_assert_eq!(bus.insert("r", base, len, bytes()).is_ok(), free);
                if free {
                    model.push((base, len));
                }
            }
            for probe in probes {
                let want = model.iter().find(|&&(b, l)| (b..b + l).contains(&probe));
                let got = bus.entry(probe).map(|e| (e.base, e.last - e.base + 1));
                prop_assert_eq!(got, want.copied());
            }
        }
    }
}
