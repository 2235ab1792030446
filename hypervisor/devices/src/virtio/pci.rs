//! Virtio over PCI (VIRTIO 1.2, section 4.1): a device type as a PCI function.
//!
//! One memory BAR holds all structures, each in a page of its own: common configuration,
//! interrupt status, the device's configuration, notifications, MSI-X table and pending bits. Vendor
//! capabilities say where; one more is a window to all of it through configuration space (section 4.1.4.9).
//!
//! A notification sets a bit and returns; the queue is worked on by [`Worker::work`]. While the function is
//! no bus master nothing is read from the guest's memory, and the bit waits.
//!
//! Lock order: `common`, then a queue's, then the device type's, then MSI-X and INTx; the configuration space
//! comes before these two. A driver that breaks a rule sets DEVICE_NEEDS_RESET, with a line in the log, of
//! which there are at most [`MAX_NOTES`] per device.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bitflags::bitflags;
use mem::{Gpa, GuestMemory, Width};
use spin::Mutex;

use super::queue::{Queue, QueueError, QueueLayout, RingFeatures};
use super::{CommonFeatures, DeviceType, Progress, VirtioDevice};
use crate::bus::IoError;
use crate::lapic::MessageSink;
use crate::line::Line;
use crate::pci::{
    BARS, BarError, BarKind, BarRange, CapabilityError, ConfigSpace, FunctionId, Intx,
    MSIX_CAPABILITY, MessageControl, Msix, PciFunction,
};
use crate::work::{Budget, Outcome, WorkSignal, Worker};

/// Lines that one device may have written to the host's log.
pub const MAX_NOTES: u32 = 16;

/// The BAR with all structures.
const BAR: u8 = 0;
const BAR_LEN: u64 = 0x8000;
const PAGE: u64 = 0x1000;
/// Pages of the BAR.
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;
/// Bytes of the common configuration: up to the fields of features that are not offered.
const COMMON_LEN: u32 = 0x38;

/// Vendor-specific PCI capability.
const VENDOR_CAPABILITY: u8 = 0x09;
/// Vendor of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// A device's PCI number is its type's and this.
const DEVICE_BASE: u16 = 0x1040;
/// Revision of a non-transitional device.
const REVISION: u8 = 1;
/// Subsystem number above which no driver takes it for a transitional device.
const SUBSYSTEM: u16 = 0x1100;

/// No MSI-X vector (section 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// Kinds of structures (section 4.1.4).
#[derive(Clone, Copy)]
#[repr(u8)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciAccess = 5,
}

bitflags! {
    /// Device status (section 2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Status: u8 {
        const ACKNOWLEDGE = 1;
        const DRIVER = 2;
        const DRIVER_OK = 4;
        const FEATURES_OK = 8;
        const NEEDS_RESET = 64;
        const FAILED = 128;
    }
}

bitflags! {
    /// Interrupt status (section 4.1.4.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Isr: u8 {
        const QUEUE = 1;
        const CONFIG = 2;
    }
}

/// What a driver sets up for a queue.
#[derive(Clone, Copy)]
struct QueueSetup {
    layout: QueueLayout,
    enabled: bool,
}

/// The registers of the common configuration that are no more than that.
struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Box<[QueueSetup]>,
}

/// A queue of the function.
struct Slot {
    /// `None`: not in use. An error: its driver set it up wrongly, which is told when it is first worked on.
    ring: Mutex<Option<Result<Queue, QueueError>>>,
    vector: AtomicU16,
}

/// Why a function could not be made: a defect of the device type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadDevice {
    /// More queues than [`crate::pci::MAX_VECTORS`] less one.
    TooManyQueues,
    /// Configuration space has no room for it.
    Config,
}

impl From<BarError> for BadDevice {
    fn from(_: BarError) -> Self {
        BadDevice::Config
    }
}

impl From<CapabilityError> for BadDevice {
    fn from(_: CapabilityError) -> Self {
        BadDevice::Config
    }
}

/// What a function needs of its machine.
pub struct Wiring {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Takes MSI-X messages.
    pub messages: Arc<dyn MessageSink>,
    /// Its INTA# pin.
    pub line: Line,
    /// Says that there is work.
    pub work: WorkSignal,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    config: Mutex<ConfigSpace>,
    /// Offset of the MSI-X capability.
    msix_at: u16,
    /// Offset of the window's capability.
    window_at: u16,
    msix: Msix,
    intx: Intx,
    isr: AtomicU8,
    status: AtomicU8,
    bus_master: AtomicBool,
    config_vector: AtomicU16,
    common: Mutex<Common>,
    slots: Box<[Slot]>,
    /// A bit per queue that was notified.
    kicked: AtomicU64,
    work: WorkSignal,
    notes: AtomicU32,
}

impl VirtioPci {
    /// The function after reset.
    ///
    /// # Errors
    /// The device type has too many queues.
    pub fn new(device: Box<dyn VirtioDevice>, wiring: Wiring) -> Result<Arc<Self>, BadDevice> {
        let sizes = device.queue_sizes();
        let vectors = sizes.len() + 1;
        if vectors > usize::from(crate::pci::MAX_VECTORS) {
            return Err(BadDevice::TooManyQueues);
        }
        let (class, subclass) = match device.device_type() {
            DeviceType::Block => (0x01, 0x00),
        };
        let number = device.device_type() as u16;
        let mut config = ConfigSpace::new(&FunctionId {
            vendor: VENDOR,
            device: DEVICE_BASE + number,
            class,
            subclass,
            interface: 0,
            revision: REVISION,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM + number,
        });
        config.add_bar(usize::from(BAR), BarKind::Memory32, BAR_LEN)?;
        config.set_interrupt_pin(1);
        let msix = Msix::new(vectors as u16, wiring.messages);
        let (body, mask) = msix.capability(BAR, MSIX_TABLE, MSIX_PENDING);
        let msix_at = config.add_capability(MSIX_CAPABILITY, &body, &mask)?;
        let notify_len = NOTIFY_STEP * sizes.len() as u32;
        let step = NOTIFY_STEP.to_le_bytes();
        for (kind, at, len, extra) in [
            (Structure::Common, COMMON, COMMON_LEN, &[][..]),
            (Structure::Notify, NOTIFY, notify_len, &step),
            (Structure::Isr, ISR, 1, &[]),
            (Structure::Device, DEVICE, PAGE as u32, &[]),
        ] {
            let (body, len) = vendor_capability(kind, at, len, extra);
            config.add_capability(VENDOR_CAPABILITY, &body[..len], &[0; 18][..len])?;
        }
        // The window: BAR, offset and length are the driver's to write, and then four bytes of data.
        let (body, len) = vendor_capability(Structure::PciAccess, 0, 0, &[0; 4]);
        let mut mask = [0; 18];
        mask[2] = 0xff;
        mask[6..len].fill(0xff);
        let window_at = config.add_capability(VENDOR_CAPABILITY, &body[..len], &mask[..len])?;
        let queues = sizes.iter().map(|&size| QueueSetup {
            layout: QueueLayout {
                size,
                ..QueueLayout::default()
            },
            enabled: false,
        });
        let common = Common {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queues.collect(),
        };
        let slots = sizes.iter().map(|_| Slot {
            ring: Mutex::new(None),
            vector: AtomicU16::new(NO_VECTOR),
        });
        Ok(Arc::new(VirtioPci {
            slots: slots.collect(),
            device,
            memory: wiring.memory,
            config: Mutex::new(config),
            msix_at: u16::from(msix_at),
            window_at: u16::from(window_at),
            msix,
            intx: Intx::new(wiring.line),
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            bus_master: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            common: Mutex::new(common),
            kicked: AtomicU64::new(0),
            work: wiring.work,
            notes: AtomicU32::new(0),
        }))
    }

    fn status(&self) -> Status {
        Status::from_bits_retain(self.status.load(Ordering::Acquire))
    }

    /// Whether queues are worked on.
    fn is_running(&self) -> bool {
        let status = self.status();
        status.contains(Status::DRIVER_OK) && !status.contains(Status::NEEDS_RESET)
    }

    fn offered(&self) -> u64 {
        self.device.features() | CommonFeatures::all().bits()
    }

    /// Interrupts for `cause`, by `vector` where MSI-X is on.
    fn interrupt(&self, cause: Isr, vector: u16) {
        if self.msix.enabled() {
            self.msix.raise(vector);
        } else {
            self.isr.fetch_or(cause.bits(), Ordering::AcqRel);
            self.intx.set(true);
        }
    }

    /// The driver broke a rule: it has to reset the device. A line for the log.
    fn fail(&self, queue: usize, why: QueueError) -> Option<String> {
        self.status
            .fetch_or(Status::NEEDS_RESET.bits(), Ordering::AcqRel);
        self.interrupt(Isr::CONFIG, self.config_vector.load(Ordering::Relaxed));
        let note = self.notes.fetch_add(1, Ordering::Relaxed);
        let last = if note + 1 == MAX_NOTES {
            "; no more such lines"
        } else {
            ""
        };
        let name = self.device.name();
        (note < MAX_NOTES)
            .then(|| format!("{name}: queue {queue}: {why}: the device needs a reset{last}"))
    }

    /// The driver writes the status register (section 3.1.1).
    fn write_status(&self, value: u8) {
        let mut common = self.common.lock();
        let wanted = Status::from_bits_retain(value) & !Status::NEEDS_RESET;
        if value == 0 {
            self.reset(&mut common);
            return;
        }
        let before = self.status();
        // Bits are only ever added, but for the reset.
        let mut added = wanted & !before;
        if added.contains(Status::FEATURES_OK) && !self.accepts(common.driver_features) {
            added.remove(Status::FEATURES_OK);
        }
        let ready = (before | added).contains(Status::FEATURES_OK);
        let starts = added.contains(Status::DRIVER_OK) && ready;
        added.set(Status::DRIVER_OK, starts);
        if starts {
            self.start(&common);
        }
        self.status.fetch_or(added.bits(), Ordering::AcqRel);
        if starts {
            // Each queue is looked at once: a driver may have notified before.
            let all = self.slots.iter().enumerate();
            let all = all.fold(0, |bits, (index, _)| bits | 1 << index);
            self.kicked.fetch_or(all, Ordering::AcqRel);
            self.work.raise();
        }
    }

    /// Whether the device can work with these features.
    fn accepts(&self, features: u64) -> bool {
        let version_1 = CommonFeatures::VERSION_1.bits();
        features & !self.offered() == 0 && features & version_1 != 0
    }

    fn start(&self, common: &Common) {
        let agreed = CommonFeatures::from_bits_retain(common.driver_features);
        let features = RingFeatures {
            indirect: agreed.contains(CommonFeatures::INDIRECT_DESC),
            event_index: agreed.contains(CommonFeatures::EVENT_IDX),
        };
        self.device.start(common.driver_features);
        for (slot, setup) in self.slots.iter().zip(&common.queues) {
            let queue = || Queue::new(setup.layout, features);
            *slot.ring.lock() = setup.enabled.then(queue);
        }
    }

    /// A piece of work on a queue, and the interrupt for what was given back.
    fn run(
        &self,
        index: usize,
        queue: &mut Result<Queue, QueueError>,
        budget: &mut Budget,
    ) -> Result<Progress, QueueError> {
        let queue = queue.as_mut().map_err(|why| *why)?;
        let progress = self.device.run(index, queue, &self.memory, budget)?;
        if queue.wants_interrupt(&self.memory)? {
            let vector = self.slots.get(index).map(|slot| &slot.vector);
            let vector = vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed));
            self.interrupt(Isr::QUEUE, vector);
        }
        Ok(progress)
    }

    fn reset(&self, common: &mut Common) {
        // From here on nobody begins to work; whoever works is waited for below.
        self.status.store(0, Ordering::SeqCst);
        for slot in &self.slots {
            *slot.ring.lock() = None;
            slot.vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        // Whoever worked may have failed meanwhile.
        self.status.store(0, Ordering::Release);
        self.device.reset();
        self.kicked.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        self.isr.store(0, Ordering::Release);
        self.intx.set(false);
        self.msix.forget_pending();
        common.device_feature_select = 0;
        common.driver_feature_select = 0;
        common.driver_features = 0;
        common.queue_select = 0;
        for (setup, &size) in common.queues.iter_mut().zip(self.device.queue_sizes()) {
            *setup = QueueSetup {
                layout: QueueLayout {
                    size,
                    ..QueueLayout::default()
                },
                enabled: false,
            };
        }
    }

    fn read_common(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let register = Register::at(offset, width)?;
        let common = self.common.lock();
        let queue = common.queues.get(usize::from(common.queue_select));
        let slot = self.slots.get(usize::from(common.queue_select));
        let half = |value: u64, select: u32| match select {
            0 => value & 0xffff_ffff,
            1 => value >> 32,
            _ => 0,
        };
        Ok(match register {
            Register::DeviceFeatureSelect => u64::from(common.device_feature_select),
            Register::DeviceFeature => half(self.offered(), common.device_feature_select),
            Register::DriverFeatureSelect => u64::from(common.driver_feature_select),
            Register::DriverFeature => half(common.driver_features, common.driver_feature_select),
            Register::ConfigVector => u64::from(self.config_vector.load(Ordering::Relaxed)),
            Register::QueueCount => self.slots.len() as u64,
            Register::Status => u64::from(self.status().bits()),
            // No configuration here changes by itself.
            Register::ConfigGeneration => 0,
            Register::QueueSelect => u64::from(common.queue_select),
            Register::QueueSize => queue.map_or(0, |q| u64::from(q.layout.size)),
            Register::QueueVector => {
                u64::from(slot.map_or(NO_VECTOR, |slot| slot.vector.load(Ordering::Relaxed)))
            }
            Register::QueueEnable => queue.map_or(0, |q| u64::from(q.enabled)),
            Register::QueueNotifyOffset => u64::from(common.queue_select),
            Register::QueueArea(area, part) => {
                queue.map_or(0, |q| part.extract(area.of(q.layout).0))
            }
        })
    }

    fn write_common(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let register = Register::at(offset, width)?;
        if register == Register::Status {
            self.write_status(value as u8);
            return Ok(());
        }
        let mut common = self.common.lock();
        let common = &mut *common;
        let index = usize::from(common.queue_select);
        let status = self.status();
        // A queue is set up before the driver is ready, and only until it is enabled.
        let queue = common
            .queues
            .get_mut(index)
            .filter(|queue| !queue.enabled && !status.contains(Status::DRIVER_OK));
        match register {
            Register::DeviceFeatureSelect => common.device_feature_select = value as u32,
            Register::DriverFeatureSelect => common.driver_feature_select = value as u32,
            Register::DriverFeature => {
                if !status.contains(Status::FEATURES_OK) {
                    let (keep, shift) = match common.driver_feature_select {
                        0 => (0xffff_ffff << 32, 0),
                        1 => (0xffff_ffff, 32),
                        _ => return Ok(()),
                    };
                    let features = &mut common.driver_features;
                    *features = *features & keep | (value & 0xffff_ffff) << shift;
                }
            }
            Register::ConfigVector => {
                let vector = self.checked_vector(value);
                self.config_vector.store(vector, Ordering::Relaxed);
            }
            Register::QueueSelect => common.queue_select = value as u16,
            Register::QueueSize => {
                let size = value as u16;
                let most = self.device.queue_sizes().get(index).copied().unwrap_or(0);
                if let Some(queue) = queue
                    && size.is_power_of_two()
                    && size <= most
                {
                    queue.layout.size = size;
                }
            }
            Register::QueueVector => {
                if let Some(slot) = self.slots.get(index) {
                    let vector = self.checked_vector(value);
                    slot.vector.store(vector, Ordering::Relaxed);
                }
            }
            Register::QueueEnable => {
                if let Some(queue) = queue {
                    queue.enabled = value == 1;
                }
            }
            Register::QueueArea(area, part) => {
                if let Some(queue) = queue {
                    let address = area.of_mut(&mut queue.layout);
                    address.0 = part.insert(address.0, value);
                }
            }
            // Read-only. The status was written above.
            Register::DeviceFeature
            | Register::QueueCount
            | Register::Status
            | Register::ConfigGeneration
            | Register::QueueNotifyOffset => {}
        }
        Ok(())
    }

    /// A vector that the function has; for others "no vector", as the driver then reads back.
    fn checked_vector(&self, value: u64) -> u16 {
        let vector = value as u16;
        if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn read_isr(&self, offset: u64) -> Result<u64, IoError> {
        if offset != 0 {
            return Err(IoError::InvalidRegister);
        }
        let isr = self.isr.swap(0, Ordering::AcqRel);
        self.intx.set(false);
        // Raised between the two: the pin must not stay low.
        if self.isr.load(Ordering::Acquire) != 0 {
            self.intx.set(true);
        }
        Ok(u64::from(isr))
    }

    fn notify(&self, offset: u64) -> Result<(), IoError> {
        let queue = offset / u64::from(NOTIFY_STEP);
        if queue >= self.slots.len() as u64 {
            return Err(IoError::InvalidRegister);
        }
        self.kicked.fetch_or(1 << queue, Ordering::AcqRel);
        self.work.raise();
        Ok(())
    }

    /// The guest wrote to configuration space: what depends on it follows.
    fn configure(&self) {
        let config = self.config.lock();
        let command = config.command();
        let control = config.read(self.msix_at + 2, Width::Word) as u16;
        self.msix
            .configure(MessageControl::from_bits(control), command);
        self.intx.configure(if self.msix.enabled() {
            command.with_interrupt_disable(true)
        } else {
            command
        });
        self.bus_master
            .store(command.bus_master(), Ordering::Release);
        drop(config);
        if command.bus_master() && self.kicked.load(Ordering::Acquire) != 0 {
            self.work.raise();
        }
    }

    /// Where the window's data field leads: offset in the BAR, and width.
    fn window(&self, offset: u16) -> Option<(u64, Width)> {
        const BAR_FIELD: u16 = 4;
        const OFFSET: u16 = 8;
        const LENGTH: u16 = 12;
        const DATA: u16 = 16;
        if offset != self.window_at + DATA {
            return None;
        }
        let config = self.config.lock();
        let field = |at| config.read(self.window_at + at, Width::Dword);
        let at = u64::from(field(OFFSET));
        let width = match field(LENGTH) {
            1 => Width::Byte,
            2 => Width::Word,
            4 => Width::Dword,
            _ => return None,
        };
        let fine = config.read(self.window_at + BAR_FIELD, Width::Byte) == u32::from(BAR)
            && at.is_multiple_of(width.bytes() as u64)
            && at < BAR_LEN;
        fine.then_some((at, width))
    }
}

/// Body of a vendor capability after its first two bytes (section 4.1.4), and its length.
fn vendor_capability(kind: Structure, offset: u32, len: u32, extra: &[u8]) -> ([u8; 18], usize) {
    let mut body = [0; 18];
    let bytes = 14 + extra.len();
    // The length counts the two bytes before.
    body[0] = bytes as u8 + 2;
    body[1] = kind as u8;
    body[2] = BAR;
    body[6..10].copy_from_slice(&offset.to_le_bytes());
    body[10..14].copy_from_slice(&len.to_le_bytes());
    body[14..bytes].copy_from_slice(extra);
    (body, bytes)
}

/// An address of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Area {
    Descriptors,
    Available,
    Used,
}

impl Area {
    fn of(self, layout: QueueLayout) -> Gpa {
        match self {
            Area::Descriptors => layout.descriptors,
            Area::Available => layout.available,
            Area::Used => layout.used,
        }
    }

    fn of_mut(self, layout: &mut QueueLayout) -> &mut Gpa {
        match self {
            Area::Descriptors => &mut layout.descriptors,
            Area::Available => &mut layout.available,
            Area::Used => &mut layout.used,
        }
    }
}

/// Which part of a 64-bit register is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Low,
    High,
    Whole,
}

impl Part {
    fn extract(self, value: u64) -> u64 {
        match self {
            Part::Low => value & 0xffff_ffff,
            Part::High => value >> 32,
            Part::Whole => value,
        }
    }

    fn insert(self, before: u64, value: u64) -> u64 {
        match self {
            Part::Low => before >> 32 << 32 | value & 0xffff_ffff,
            Part::High => before & 0xffff_ffff | value << 32,
            Part::Whole => value,
        }
    }
}

/// Registers of the common configuration (section 4.1.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    QueueCount,
    Status,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    QueueArea(Area, Part),
}

impl Register {
    /// The register at an offset. A driver accesses it by its own width, a 64-bit one also by halves
    /// (section 4.1.3.1).
    fn at(offset: u64, width: Width) -> Result<Self, IoError> {
        let area = |offset| match offset {
            0x20 => Some(Area::Descriptors),
            0x28 => Some(Area::Available),
            0x30 => Some(Area::Used),
            _ => None,
        };
        let (register, own) = match offset {
            0x00 => (Register::DeviceFeatureSelect, Width::Dword),
            0x04 => (Register::DeviceFeature, Width::Dword),
            0x08 => (Register::DriverFeatureSelect, Width::Dword),
            0x0c => (Register::DriverFeature, Width::Dword),
            0x10 => (Register::ConfigVector, Width::Word),
            0x12 => (Register::QueueCount, Width::Word),
            0x14 => (Register::Status, Width::Byte),
            0x15 => (Register::ConfigGeneration, Width::Byte),
            0x16 => (Register::QueueSelect, Width::Word),
            0x18 => (Register::QueueSize, Width::Word),
            0x1a => (Register::QueueVector, Width::Word),
            0x1c => (Register::QueueEnable, Width::Word),
            0x1e => (Register::QueueNotifyOffset, Width::Word),
            _ => match (area(offset), area(offset.wrapping_sub(4)), width) {
                (Some(area), _, Width::Qword) => {
                    (Register::QueueArea(area, Part::Whole), Width::Qword)
                }
                (Some(area), _, _) => (Register::QueueArea(area, Part::Low), Width::Dword),
                (_, Some(area), _) => (Register::QueueArea(area, Part::High), Width::Dword),
                _ => return Err(IoError::InvalidRegister),
            },
        };
        if width == own {
            Ok(register)
        } else {
            Err(IoError::InvalidWidth)
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        if let Some((at, window)) = self.window(offset) {
            let value = self.bar_read(usize::from(BAR), at, window);
            return value.unwrap_or(u64::MAX) as u32 & window.mask() as u32;
        }
        let mut config = self.config.lock();
        config.set_interrupt_status(self.intx.status());
        config.read(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        self.config.lock().write(offset, width, value);
        self.configure();
        if let Some((at, window)) = self.window(offset) {
            // As on the bus: a refused write is lost.
            let _lost = self.bar_write(usize::from(BAR), at, window, u64::from(value));
        }
    }

    fn bars(&self) -> [Option<BarRange>; BARS] {
        self.config.lock().bars()
    }

    fn bar_read(&self, bar: usize, offset: u64, width: Width) -> Result<u64, IoError> {
        if bar != usize::from(BAR) {
            return Err(IoError::InvalidRegister);
        }
        let at = offset % PAGE;
        match (offset - at) as u32 {
            COMMON => self.read_common(at, width),
            ISR => self.read_isr(at),
            DEVICE => {
                let mut bytes = [0; 8];
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                self.device.read_config(at, &mut bytes[..width.bytes()]);
                Ok(u64::from_le_bytes(bytes))
            }
            MSIX_TABLE => self.msix.read_table(at, width),
            MSIX_PENDING => self.msix.read_pending(at, width),
            _ => Err(IoError::InvalidRegister),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        if bar != usize::from(BAR) {
            return Err(IoError::InvalidRegister);
        }
        let at = offset % PAGE;
        match (offset - at) as u32 {
            NOTIFY => self.notify(at),
            COMMON => self.write_common(at, width, value),
            DEVICE => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                self.device
                    .write_config(at, &value.to_le_bytes()[..width.bytes()]);
                Ok(())
            }
            MSIX_TABLE => self.msix.write_table(at, width, value),
            _ => Err(IoError::InvalidRegister),
        }
    }
}

impl Worker for VirtioPci {
    fn work(&self, budget: &mut Budget) -> Outcome {
        let mut outcome = Outcome::default();
        if !self.bus_master.load(Ordering::Acquire) {
            return outcome;
        }
        let mut kicked = self.kicked.swap(0, Ordering::AcqRel);
        for (index, slot) in self.slots.iter().enumerate() {
            if kicked & 1 << index == 0 {
                continue;
            }
            // Another vCPU works on it: later, it may not see what this one was notified of.
            let Some(mut ring) = slot.ring.try_lock() else {
                outcome.more = true;
                continue;
            };
            kicked &= !(1 << index);
            if !self.is_running() {
                continue;
            }
            let Some(queue) = ring.as_mut() else { continue };
            match self.run(index, queue, budget) {
                Ok(Progress::Idle) => {}
                Ok(Progress::More) => {
                    kicked |= 1 << index;
                    outcome.more = true;
                }
                Err(why) => outcome.note = self.fail(index, why).or(outcome.note),
            }
        }
        self.kicked.fetch_or(kicked, Ordering::AcqRel);
        outcome
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
