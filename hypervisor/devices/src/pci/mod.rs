//! PCI bus 0: configuration access, function framework, BAR windows.
//!
//! Configuration mechanism #1 (PCI Local Bus 3.0, section 3.2.2.3.2) and ECAM (PCI Express
//! Base, section 7.2.2) reach the same functions. Memory and I/O BARs decode only within
//! the windows of [`PciLayout`], so no guest can lay a BAR over memory or another device.

mod assign;
mod config;
mod host_bridge;
mod intx;
mod msix;

use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

use bitfield_struct::bitfield;
use mem::Width;
use spin::RwLock;

pub use config::{
    BARS, BarError, BarKind, BarRange, CapabilityError, Command, ConfigSpace, FunctionId, Space,
};
pub use host_bridge::HostBridge;
pub use intx::{Intx, PciLines};
pub use msix::{ENTRY_LEN, MAX_VECTORS, MSIX_CAPABILITY, MessageControl, Msix};

use crate::bus::{IoError, MmioBus, MmioDevice, Overlap, PortBus, PortDevice};
use crate::platform;

/// Devices of a bus.
pub const DEVICES: u8 = 32;
/// Functions of a device.
pub const FUNCTIONS: u8 = 8;
/// Bytes of ECAM per bus.
pub const ECAM_BUS_LEN: u64 = 1 << 20;

/// One PCI function. It has its own lock; the bus holds none while it calls.
pub trait PciFunction: Send + Sync {
    /// Reads `width` (1, 2 or 4 bytes) at the naturally aligned `offset` of configuration space.
    fn config_read(&self, offset: u16, width: Width) -> u32;
    /// Writes there.
    fn config_write(&self, offset: u16, width: Width, value: u32);
    /// The ranges that the BARs decode now (see [`ConfigSpace::bars`]); none unless there are BARs.
    fn bars(&self) -> [Option<BarRange>; BARS] {
        [None; BARS]
    }
    /// Reads `width` bytes at `offset` of a BAR.
    #[must_use = "an error must become all-ones"]
    fn bar_read(&self, _bar: usize, _offset: u64, _width: Width) -> Result<u64, IoError> {
        Err(IoError::InvalidRegister)
    }
    /// Writes the low `width` bytes of `value` at `offset` of a BAR.
    #[must_use = "an error must be counted"]
    fn bar_write(
        &self,
        _bar: usize,
        _offset: u64,
        _width: Width,
        _value: u64,
    ) -> Result<(), IoError> {
        Err(IoError::InvalidRegister)
    }
}

/// The parts of the guest's address spaces that belong to PCI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciLayout {
    /// ECAM of bus 0, where the chip set has one.
    pub ecam: Option<u64>,
    /// Window for memory BARs below 4 GiB.
    pub mmio32: Range<u64>,
    /// Window for 64-bit memory BARs.
    pub mmio64: Option<Range<u64>>,
    /// Window for I/O BARs.
    pub io: Range<u32>,
}

impl Default for PciLayout {
    fn default() -> Self {
        PciLayout {
            ecam: Some(platform::ECAM_BASE),
            mmio32: platform::PCI_MMIO32,
            mmio64: None,
            io: platform::PCI_IO,
        }
    }
}

/// The address register of configuration mechanism #1.
#[bitfield(u32)]
struct ConfigAddress {
    #[bits(2)]
    __: u8,
    #[bits(6)]
    register: u8,
    #[bits(3)]
    function: u8,
    #[bits(5)]
    device: u8,
    bus: u8,
    #[bits(7)]
    __: u8,
    enabled: bool,
}

/// A BAR that decodes: `range.base` to `last`.
#[derive(Clone, Copy)]
struct Decoded {
    range: BarRange,
    last: u64,
    slot: u8,
    bar: usize,
}

/// Bus 0.
pub struct PciBus {
    slots: Box<[Option<Arc<dyn PciFunction>>; 256]>,
    address: AtomicU32,
    /// BARs that decode, by address: memory and I/O.
    memory: RwLock<Vec<Decoded>>,
    io: RwLock<Vec<Decoded>>,
}

impl PciBus {
    /// A bus without functions.
    pub fn new() -> Self {
        PciBus {
            slots: Box::new([const { None }; 256]),
            address: AtomicU32::new(0),
            memory: RwLock::new(Vec::new()),
            io: RwLock::new(Vec::new()),
        }
    }

    /// Puts a function at `device` (0 to 31), `function` (0 to 7).
    pub fn insert(
        &mut self,
        device: u8,
        function: u8,
        handler: Arc<dyn PciFunction>,
    ) -> Result<(), Overlap> {
        let name = || format!("pci 00:{device:02x}.{function}");
        if device >= DEVICES || function >= FUNCTIONS {
            return Err(Overlap::OutOfSpace { newcomer: name() });
        }
        let slot = device << 3 | function;
        let entry = &mut self.slots[usize::from(slot)];
        if entry.is_some() {
            return Err(Overlap::Taken {
                newcomer: name(),
                owner: name(),
                address: u64::from(slot),
            });
        }
        *entry = Some(handler);
        self.refresh();
        Ok(())
    }

    /// Puts the bus in the guest's address spaces: ports 0xCF8 and 0xCFC, ECAM and the windows.
    pub fn attach(
        self: &Arc<Self>,
        ports: &mut PortBus,
        mmio: &mut MmioBus,
        layout: &PciLayout,
    ) -> Result<(), Overlap> {
        // One port wide: 0xCF9 to 0xCFB belong to others, an access is by its first port.
        ports.insert("pci-address", 0xcf8, 1, Arc::new(AddressPort(self.clone())))?;
        ports.insert("pci-data", 0xcfc, 4, Arc::new(DataPort(self.clone())))?;
        let io = u16::try_from(layout.io.start).ok().zip(
            u16::try_from(layout.io.end.saturating_sub(layout.io.start))
                .ok()
                .filter(|&len| len > 0),
        );
        let (base, len) = io.ok_or_else(|| Overlap::OutOfSpace {
            newcomer: "pci-io".into(),
        })?;
        let bus = self.clone();
        ports.insert("pci-io", base, len, Arc::new(IoWindow { bus, base }))?;
        if let Some(ecam) = layout.ecam {
            let device = Arc::new(Ecam(self.clone()));
            mmio.insert("pci-ecam", ecam, ECAM_BUS_LEN, device)?;
        }
        for (name, window) in [
            ("pci-mmio32", Some(&layout.mmio32)),
            ("pci-mmio64", layout.mmio64.as_ref()),
        ] {
            if let Some(window) = window {
                let bus = self.clone();
                let base = window.start;
                mmio.insert(
                    name,
                    base,
                    window.end.saturating_sub(base),
                    Arc::new(MemoryWindow { bus, base }),
                )?;
            }
        }
        Ok(())
    }

    fn config_read(&self, slot: u8, offset: u16, width: Width) -> Result<u32, IoError> {
        check_config_access(offset, width)?;
        Ok(match &self.slots[usize::from(slot)] {
            Some(function) => function.config_read(offset, width),
            // No device answers: master abort.
            None => width.mask() as u32,
        })
    }

    fn config_write(&self, slot: u8, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        check_config_access(offset, width)?;
        if let Some(function) = &self.slots[usize::from(slot)] {
            function.config_write(offset, width, value);
            if config::moves_bars(offset) {
                self.refresh();
            }
        }
        Ok(())
    }

    /// Rebuilds the tables of decoding BARs. At most 256 functions of six BARs, and rare.
    fn refresh(&self) {
        // Locked first: of two vCPUs that reconfigure at once, the later sees both changes.
        let mut memory = self.memory.write();
        let mut io = self.io.write();
        memory.clear();
        io.clear();
        for (slot, function) in (0u8..=255).zip(self.slots.iter()) {
            let Some(function) = function else { continue };
            for (bar, range) in function.bars().into_iter().enumerate() {
                let Some(range) = range else { continue };
                let Some(last) = range
                    .size
                    .checked_sub(1)
                    .and_then(|s| range.base.checked_add(s))
                else {
                    continue;
                };
                let decoded = Decoded {
                    range,
                    last,
                    slot,
                    bar,
                };
                match range.space {
                    Space::Memory => memory.push(decoded),
                    Space::Io => io.push(decoded),
                }
            }
        }
        memory.sort_unstable_by_key(|d| d.range.base);
        io.sort_unstable_by_key(|d| d.range.base);
    }

    /// The BAR at `address`, and the offset in it.
    fn find(
        &self,
        table: &RwLock<Vec<Decoded>>,
        address: u64,
        width: Width,
    ) -> Result<(&Arc<dyn PciFunction>, usize, u64), IoError> {
        let decoded = {
            let table = table.read();
            let after = table.partition_point(|d| d.range.base <= address);
            after.checked_sub(1).and_then(|at| table.get(at).copied())
        };
        let last = width.bytes() as u64 - 1;
        decoded
            .filter(|d| address.checked_add(last).is_some_and(|end| end <= d.last))
            .and_then(|d| {
                let function = self.slots[usize::from(d.slot)].as_ref()?;
                Some((function, d.bar, address - d.range.base))
            })
            .ok_or(IoError::InvalidRegister)
    }
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

fn check_config_access(offset: u16, width: Width) -> Result<(), IoError> {
    if width == Width::Qword {
        Err(IoError::InvalidWidth)
    } else if !offset.is_multiple_of(width.bytes() as u16) {
        Err(IoError::Unaligned)
    } else {
        Ok(())
    }
}

/// Port 0xCF8.
struct AddressPort(Arc<PciBus>);

impl PortDevice for AddressPort {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        match width {
            Width::Dword => Ok(self.0.address.load(Ordering::Relaxed)),
            // Not InvalidWidth: a narrow access is not for this register and must not be split.
            _ => Err(IoError::InvalidRegister),
        }
    }

    fn write(&self, _offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        match width {
            Width::Dword => {
                let address = ConfigAddress::from_bits(value);
                let stored = ConfigAddress::new()
                    .with_register(address.register())
                    .with_function(address.function())
                    .with_device(address.device())
                    .with_bus(address.bus())
                    .with_enabled(address.enabled());
                self.0.address.store(stored.into_bits(), Ordering::Relaxed);
                Ok(())
            }
            _ => Err(IoError::InvalidRegister),
        }
    }
}

/// Ports 0xCFC to 0xCFF.
struct DataPort(Arc<PciBus>);

impl DataPort {
    /// Slot and register that the address register selects; `None`: nobody.
    fn target(&self, offset: u16) -> Option<(u8, u16)> {
        let address = ConfigAddress::from_bits(self.0.address.load(Ordering::Relaxed));
        (address.enabled() && address.bus() == 0).then(|| {
            (
                address.device() << 3 | address.function(),
                u16::from(address.register()) << 2 | (offset & 3),
            )
        })
    }
}

impl PortDevice for DataPort {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        match self.target(offset) {
            Some((slot, register)) => self.0.config_read(slot, register, width),
            None => Ok(width.mask() as u32),
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        match self.target(offset) {
            Some((slot, register)) => self.0.config_write(slot, register, width, value),
            None => Ok(()),
        }
    }
}

/// The ECAM of bus 0: bits 19:12 of the offset are the slot, 11:0 the register.
struct Ecam(Arc<PciBus>);

impl MmioDevice for Ecam {
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let (slot, register) = ((offset >> 12) as u8, offset as u16 & 0xfff);
        self.0.config_read(slot, register, width).map(u64::from)
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let (slot, register) = ((offset >> 12) as u8, offset as u16 & 0xfff);
        self.0.config_write(slot, register, width, value as u32)
    }
}

struct MemoryWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl MmioDevice for MemoryWindow {
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let address = self.base + offset;
        let (function, bar, offset) = self.bus.find(&self.bus.memory, address, width)?;
        function.bar_read(bar, offset, width)
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let address = self.base + offset;
        let (function, bar, offset) = self.bus.find(&self.bus.memory, address, width)?;
        function.bar_write(bar, offset, width, value)
    }
}

struct IoWindow {
    bus: Arc<PciBus>,
    base: u16,
}

impl PortDevice for IoWindow {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        let address = u64::from(self.base) + u64::from(offset);
        let (function, bar, offset) = self.bus.find(&self.bus.io, address, width)?;
        function.bar_read(bar, offset, width).map(|v| v as u32)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        let address = u64::from(self.base) + u64::from(offset);
        let (function, bar, offset) = self.bus.find(&self.bus.io, address, width)?;
        function.bar_write(bar, offset, width, u64::from(value))
    }
}

#[cfg(test)]
mod tests;
