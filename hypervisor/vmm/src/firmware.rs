//! A VM that boots PC firmware: ROM, shadowed ROM, variable store, and what `fw_cfg` tells.
//!
//! The firmware's image ends at 4 GiB, and the boot processor starts in it at the reset vector. Its
//! last 128 KiB show also below 1 MiB, until the firmware turns to the RAM behind them ([`shadow`](crate::shadow)). A variable store is
//! flash right below the image; its content outlives the VM's restarts.
//!
//! Invariant: what the guest may do with ROM, shadow and flash changes first in
//! [`GuestMemory`], then in the nested page tables, then every vCPU drops its cached translations before
//! it enters the guest again ([`SpecialMemory::drop_stale`]).

use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use core::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
};

use devices::{
    VcpuId,
    acpi::{self, AcpiConfig, BadBase},
    chipset::SHADOW_SEGMENTS,
    flash::{BLOCK_BYTES, Flash, FlashArray},
    fw_cfg::{FileError, FwCfgItems},
    lapic::VcpuKick,
    pci::PciLayout,
    platform,
};
use mem::{
    Gpa, GuestMemory, GuestRange, PAGE_SIZE,
    guest::{Access, AllocateError, HIGH_RAM_START, LOW_RAM_END},
};
use spin::{Mutex, Once};

/// Least bytes of a firmware image: the segment of the first PCs' BIOS. Test ROMs are that small.
pub const MIN_IMAGE: u64 = 0x1_0000;
/// Most bytes of a firmware image and its variable store together: what lies above the APICs.
pub const MAX_IMAGE: u64 = 16 << 20;
/// Bytes of the image's end that show below 1 MiB, too, if it has so many.
pub(crate) const ROM_ALIAS: u64 = 0x2_0000;
/// Where the image ends.
pub(crate) const ROM_TOP: u64 = 1 << 32;
/// PCI memory below 4 GiB ends here; RAM may reach up to 3 GiB, and firmware counts on PCI from 2 GiB.
const PCI_END: u64 = 0xfec0_0000;
const PCI_START: u64 = 0x8000_0000;
/// Size and alignment of the window for 64-bit BARs that firmware chooses.
const PCI_HIGH_BYTES: u64 = 32 << 30;

/// What a VM boots.
#[derive(Clone, Debug)]
pub struct Firmware<'a> {
    /// The firmware's image, whole pages.
    pub image: &'a [u8],
    /// Its variable store, if it has one.
    pub variables: Option<Arc<Variables>>,
}

/// The content of a variable store, kept while VMs come and go.
pub struct Variables(Mutex<Box<[u8]>>);

impl Variables {
    /// A store with this content: the firmware's template.
    pub fn new(content: &[u8]) -> Arc<Self> {
        Arc::new(Variables(Mutex::new(content.into())))
    }

    fn bytes(&self) -> u64 {
        self.0.lock().len() as u64
    }
}

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Variables({} bytes)", self.bytes())
    }
}

/// Why firmware cannot be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirmwareError {
    /// The image has a size that no ROM has.
    ImageSize {
        /// Its bytes.
        bytes: u64,
    },
    /// The variable store has a size that no flash has.
    VariablesSize {
        /// Its bytes.
        bytes: u64,
    },
    /// Both together are too large.
    TooLarge {
        /// Their bytes.
        bytes: u64,
    },
    /// No memory for it.
    Memory(AllocateError),
    /// A file for the firmware could not be offered: a defect of Plinth.
    File(FileError),
    /// The ACPI tables are too large: a defect of Plinth.
    Acpi(BadBase),
}

impl fmt::Display for FirmwareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FirmwareError::ImageSize { bytes } => write!(
                f,
                "{bytes} bytes are no size of a firmware image; allowed: {} KiB to {} MiB in steps of 4 KiB",
                MIN_IMAGE >> 10,
                MAX_IMAGE >> 20
            ),
            FirmwareError::VariablesSize { bytes } => write!(
                f,
                "{bytes} bytes are no size of a variable store; allowed: multiples of 4 KiB"
            ),
            FirmwareError::TooLarge { bytes } => write!(
                f,
                "image and variable store have {bytes} bytes; allowed: up to {} MiB together",
                MAX_IMAGE >> 20
            ),
            FirmwareError::Memory(e) => e.fmt(f),
            FirmwareError::File(e) => e.fmt(f),
            FirmwareError::Acpi(e) => e.fmt(f),
        }
    }
}

impl From<AllocateError> for FirmwareError {
    fn from(e: AllocateError) -> Self {
        FirmwareError::Memory(e)
    }
}

impl From<FileError> for FirmwareError {
    fn from(e: FileError) -> Self {
        FirmwareError::File(e)
    }
}

impl Firmware<'_> {
    /// Where image and variable store lie.
    ///
    /// # Errors
    /// Sizes that can't be.
    fn places(&self) -> Result<(GuestRange, Option<GuestRange>), FirmwareError> {
        let bytes = self.image.len() as u64;
        if !(MIN_IMAGE..=MAX_IMAGE).contains(&bytes) || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(FirmwareError::ImageSize { bytes });
        }
        let image = GuestRange {
            start: Gpa(ROM_TOP - bytes),
            bytes,
        };
        let Some(variables) = &self.variables else {
            return Ok((image, None));
        };
        let length = variables.bytes();
        if length == 0 || !length.is_multiple_of(BLOCK_BYTES) {
            return Err(FirmwareError::VariablesSize { bytes: length });
        }
        if bytes + length > MAX_IMAGE {
            let bytes = bytes + length;
            return Err(FirmwareError::TooLarge { bytes });
        }
        let store = GuestRange {
            start: Gpa(image.start.0 - length),
            bytes: length,
        };
        Ok((image, Some(store)))
    }

    /// Gives the VM its ROM, shadow RAM and variable store.
    ///
    /// # Errors
    /// Sizes that can't be, or no memory.
    pub(crate) fn place(&self, memory: &mut GuestMemory) -> Result<(), FirmwareError> {
        let (image, store) = self.places()?;
        memory.add_special(image, Access::ReadOnly)?;
        let written = memory.write_special(image.start, self.image);
        debug_assert!(written.is_ok(), "the range was just added");
        for segment in SHADOW_SEGMENTS {
            memory.add_special(segment, Access::ReadOnly)?;
        }
        if let (Some(store), Some(variables)) = (store, &self.variables) {
            memory.add_special(store, Access::ReadOnly)?;
            let written = memory.write_special(store.start, &variables.0.lock());
            debug_assert!(written.is_ok(), "the range was just added");
        }
        Ok(())
    }

    /// The flash device of the variable store, and where it is.
    ///
    /// # Errors
    /// Sizes that can't be.
    pub(crate) fn flash(
        &self,
        special: &Arc<SpecialMemory>,
    ) -> Result<Option<(GuestRange, Arc<Flash>)>, FirmwareError> {
        let (_, store) = self.places()?;
        Ok(store.zip(self.variables.clone()).map(|(range, kept)| {
            let array = Arc::new(VariableArray {
                special: special.clone(),
                range,
                kept,
            });
            (range, Flash::new(array, range.bytes))
        }))
    }
}

/// Where a VM with firmware has RAM: as a PC, without the area of VGA memory and ROM.
pub(crate) fn ram_layout(bytes: u64) -> Vec<GuestRange> {
    const HOLE: (u64, u64) = (0xa_0000, 0x10_0000);
    let low = bytes.min(LOW_RAM_END.0);
    [
        (0, low.min(HOLE.0)),
        (HOLE.1, low),
        (HIGH_RAM_START.0, HIGH_RAM_START.0 + (bytes - low)),
    ]
    .into_iter()
    .filter(|(start, end)| start < end)
    .map(|(start, end)| GuestRange {
        start: Gpa(start),
        bytes: end - start,
    })
    .collect()
}

/// Where firmware may place PCI devices: anywhere between RAM and the APICs, and behind RAM.
pub(crate) fn pci_layout(memory_bytes: u64) -> PciLayout {
    let low = memory_bytes.min(LOW_RAM_END.0);
    let high_end = HIGH_RAM_START.0 + (memory_bytes - low);
    let high = high_end.next_multiple_of(PCI_HIGH_BYTES);
    PciLayout {
        ecam: None,
        mmio32: low.max(PCI_START)..PCI_END,
        mmio64: Some(high..high + PCI_HIGH_BYTES),
        io: platform::PCI_IO,
    }
}

/// Adds the files by which firmware learns of the machine: memory map and ACPI tables.
///
/// # Errors
/// Defects only.
pub(crate) fn add_files(
    items: &mut FwCfgItems,
    memory_bytes: u64,
    acpi: &AcpiConfig<'_>,
) -> Result<(), FirmwareError> {
    const RAM: u32 = 1;
    let low = memory_bytes.min(LOW_RAM_END.0);
    let mut map = Vec::new();
    for (start, bytes) in [(0, low), (HIGH_RAM_START.0, memory_bytes - low)] {
        if bytes > 0 {
            map.extend_from_slice(&start.to_le_bytes());
            map.extend_from_slice(&bytes.to_le_bytes());
            map.extend_from_slice(&RAM.to_le_bytes());
        }
    }
    items.add_file("etc/e820", map)?;
    for (name, content) in acpi::loader_files(acpi).map_err(FirmwareError::Acpi)? {
        items.add_file(name, content)?;
    }
    Ok(())
}

/// Has SeaBIOS talk to its user by the first serial port, whatever display there is.
///
/// # Errors
/// Defects only.
pub(crate) fn add_serial_console(items: &mut FwCfgItems) -> Result<(), FirmwareError> {
    let port = u64::from(platform::SERIAL_PORTS[0].port);
    Ok(items.add_file("etc/sercon-port", port.to_le_bytes().to_vec())?)
}

/// The nested page tables of a VM, for memory that changes while it runs.
pub trait NestedControl: Send + Sync {
    /// Brings the tables up to date with the special memory in `range` ([`GuestMemory::map_special`]).
    ///
    /// # Errors
    /// In words: why not. The range is then unmapped in part.
    fn refresh(&self, memory: &GuestMemory, range: GuestRange) -> Result<(), String>;
    /// Drops what this pCPU has cached of them.
    fn flush(&self);
}

/// The memory of a VM that is not plain RAM, and who must know when it changes.
pub(crate) struct SpecialMemory {
    memory: Arc<GuestMemory>,
    nested: Once<Arc<dyn NestedControl>>,
    /// Counts changes; each vCPU notes up to which it has dropped its translations.
    changes: AtomicU32,
    kick: Arc<dyn VcpuKick>,
    vcpus: u32,
}

impl SpecialMemory {
    pub(crate) fn new(memory: Arc<GuestMemory>, kick: Arc<dyn VcpuKick>, vcpus: u16) -> Arc<Self> {
        Arc::new(SpecialMemory {
            memory,
            nested: Once::new(),
            changes: AtomicU32::new(0),
            kick,
            vcpus: u32::from(vcpus),
        })
    }

    /// The tables to keep up to date, once they are there.
    pub(crate) fn set_nested(&self, nested: Arc<dyn NestedControl>) {
        self.nested.call_once(|| nested);
    }

    /// For a vCPU before it enters the guest: drops translations older than the last change. `seen`: the
    /// change up to which the vCPU has done so.
    pub(crate) fn drop_stale(&self, seen: &mut u32) {
        let changes = self.changes.load(Ordering::Acquire);
        if *seen != changes {
            *seen = changes;
            if let Some(nested) = self.nested.get() {
                nested.flush();
            }
        }
    }
}

impl SpecialMemory {
    /// The VM's memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// From now on the guest may do this, and no more, with the special memory in `range`.
    pub(crate) fn set_access(&self, range: GuestRange, access: Access) {
        self.memory.set_special_access(range, access);
        if let Some(nested) = self.nested.get()
            && nested.refresh(&self.memory, range).is_err()
        {
            // No page for the tables: the memory is gone for this guest, and reads as nobody's.
            self.memory.set_special_access(range, Access::Device);
        }
        self.changes.fetch_add(1, Ordering::Release);
        for vcpu in 0..self.vcpus {
            self.kick.kick(VcpuId(vcpu));
        }
    }
}

/// The cells of a variable store: in guest memory, and kept beside it.
struct VariableArray {
    special: Arc<SpecialMemory>,
    range: GuestRange,
    kept: Arc<Variables>,
}

impl FlashArray for VariableArray {
    fn read(&self, offset: u64, to: &mut [u8]) {
        let read = self
            .special
            .memory
            .read_special(self.range.start + offset, to);
        debug_assert!(read.is_ok(), "the part checks offsets");
    }

    fn write(&self, offset: u64, from: &[u8]) {
        let written = self
            .special
            .memory
            .write_special(self.range.start + offset, from);
        debug_assert!(written.is_ok(), "the part checks offsets");
        let at = offset as usize;
        if let Some(kept) = self.kept.0.lock().get_mut(at..at + from.len()) {
            kept.copy_from_slice(from);
        }
    }

    fn set_visible(&self, visible: bool) {
        let access = if visible {
            Access::ReadOnly
        } else {
            Access::Device
        };
        self.special.set_access(self.range, access);
    }
}
