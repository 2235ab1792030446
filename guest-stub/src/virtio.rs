//! A driver for one virtio block device (VIRTIO 1.2, sections 3.1, 4.1 and 5.2), without mercy for either side.
//!
//! It can do everything right, one request at a time, and leaves its rings open to checks that do it wrong. Rings and
//! buffers lie in scratch memory.

use crate::memory::{read8, read16, read32, read64, write8, write16, write32, write64};
use crate::pci::{BUS_MASTER, COMMAND, Function, MEMORY};

/// Vendor 1AF4, device 1042: a block device of version 1.
const BLOCK: u32 = 0x1042_1AF4;
/// PCI capabilities: vendor-specific, MSI-X.
const VENDOR_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;
/// Feature VIRTIO_F_VERSION_1, in the second 32.
const VERSION_1: u32 = 1;

/// Device status bits (section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// Registers of the common configuration (section 4.1.4.3).
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0C;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1A;
    pub const QUEUE_ENABLE: u64 = 0x1C;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 0x1E;
    pub const DESCRIPTORS: u64 = 0x20;
    pub const AVAILABLE: u64 = 0x28;
    pub const USED: u64 = 0x30;
}

/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xFFFF;
/// Entries of the queue that this driver uses.
pub const QUEUE_SIZE: u16 = 16;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Requests (section 5.2.6).
pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const IDENTITY: u32 = 8;

/// Descriptor flags (section 2.7.5).
pub const NEXT: u16 = 1;
pub const DEVICE_WRITES: u16 = 2;

/// Places in scratch memory, from its beginning.
const DESCRIPTORS: u64 = 0x0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x3800;
/// Data of requests, up to the end.
const DATA: u64 = 0x1_0000;
/// What the status byte is before the device has written it.
const NO_STATUS: u8 = 0xEE;

/// Where a structure of the device is.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Structure {
    pub bar: u8,
    pub offset: u32,
    pub length: u32,
}

/// The structures that a device has (section 4.1.4).
#[derive(Clone, Copy, Default, Debug)]
pub struct Structures {
    pub common: Structure,
    pub notify: Structure,
    pub isr: Structure,
    pub device: Structure,
    /// Bytes from one queue's notification address to the next.
    pub notify_step: u32,
    /// Capability with a window to the others.
    pub window: u8,
    /// MSI-X capability.
    pub msix: u8,
}

/// A block device.
#[derive(Clone, Copy)]
pub struct Disk {
    pub function: Function,
    pub structures: Structures,
    scratch: u64,
    /// Index of the next entry of the available ring.
    next: u16,
}

impl Disk {
    /// The first block device, if there is one. Its BARs must have addresses.
    pub fn find(scratch: u64) -> Option<Self> {
        let function = Function::find(BLOCK)?;
        let mut structures = Structures::default();
        for (at, number) in function.capabilities() {
            if number == MSIX_CAPABILITY {
                structures.msix = at;
            }
            if number != VENDOR_CAPABILITY {
                continue;
            }
            let structure = Structure {
                bar: function.read8(at + 4),
                offset: function.read32(at + 8),
                length: function.read32(at + 12),
            };
            match function.read8(at + 3) {
                1 => structures.common = structure,
                2 => {
                    structures.notify = structure;
                    structures.notify_step = function.read32(at + 16);
                }
                3 => structures.isr = structure,
                4 => structures.device = structure,
                5 => structures.window = at,
                _ => {}
            }
        }
        Some(Self {
            function,
            structures,
            scratch,
            next: 0,
        })
    }

    /// Address of a byte of a structure.
    pub fn address(&self, structure: Structure, offset: u64) -> u64 {
        self.bar(structure.bar) + u64::from(structure.offset) + offset
    }

    /// Address of a memory BAR.
    pub fn bar(&self, number: u8) -> u64 {
        u64::from(self.function.read32(0x10 + 4 * number) & !0xF)
    }

    /// Address of an MSI-X table entry.
    pub fn msix_entry(&self, vector: u16) -> u64 {
        self.msix_place(4) + 16 * u64::from(vector)
    }

    /// Address of the MSI-X pending bits.
    pub fn msix_pending(&self) -> u64 {
        self.msix_place(8)
    }

    fn msix_place(&self, field: u8) -> u64 {
        let place = self.function.read32(self.structures.msix + field);
        self.bar(place as u8 & 7) + u64::from(place & !7)
    }

    /// Turns MSI-X on, with all vectors masked, or off; or masks the whole function.
    pub fn set_msix(&self, enabled: bool, masked: bool) {
        let control = u16::from(enabled) << 15 | u16::from(masked) << 14;
        self.function.write16(self.structures.msix + 2, control);
    }

    /// Lets an MSI-X vector send `vector` to the processor with APIC ID `destination`.
    pub fn set_vector(&self, number: u16, vector: u8, destination: u32) {
        let entry = self.msix_entry(number);
        write32(entry, 0xFEE0_0000 | destination << 12);
        write32(entry + 4, 0);
        write32(entry + 8, vector.into());
        write32(entry + 12, 0);
    }

    fn common(&self, register: u64) -> u64 {
        self.address(self.structures.common, register)
    }

    /// Reads a 16-bit register of the common configuration.
    pub fn read(&self, register: u64) -> u16 {
        read16(self.common(register))
    }

    /// Writes one.
    pub fn write(&self, register: u64, value: u16) {
        write16(self.common(register), value);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        read8(self.common(common::STATUS))
    }

    /// Writes the device status.
    pub fn set_status(&self, value: u8) {
        write8(self.common(common::STATUS), value);
    }

    /// What the device offers, 32 features at a time.
    pub fn features(&self, select: u32) -> u32 {
        write32(self.common(common::DEVICE_FEATURE_SELECT), select);
        read32(self.common(common::DEVICE_FEATURE))
    }

    /// Tells the device what the driver takes.
    pub fn take_features(&self, select: u32, features: u32) {
        write32(self.common(common::DRIVER_FEATURE_SELECT), select);
        write32(self.common(common::DRIVER_FEATURE), features);
    }

    /// Reads the interrupt status, which acknowledges it.
    pub fn interrupt_status(&self) -> u8 {
        read8(self.address(self.structures.isr, 0))
    }

    /// Sectors.
    pub fn capacity(&self) -> u64 {
        read64(self.address(self.structures.device, 0))
    }

    /// Resets the device and sets it up anew with one queue that interrupts by `vector`. `false`: it does not agree.
    pub fn start(&mut self, vector: u16) -> bool {
        self.function.write16(COMMAND, MEMORY | BUS_MASTER);
        self.set_status(0);
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.take_features(0, 0);
        self.take_features(1, VERSION_1);
        let agreed = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set_status(agreed);
        if self.status() != agreed {
            return false;
        }
        for at in (0..HEADER).step_by(8) {
            write64(self.scratch + at, 0);
        }
        self.next = 0;
        self.write(common::QUEUE_SELECT, 0);
        self.write(common::QUEUE_SIZE, QUEUE_SIZE);
        for (register, place) in [
            (common::DESCRIPTORS, DESCRIPTORS),
            (common::AVAILABLE, AVAILABLE),
            (common::USED, USED),
        ] {
            self.set_area(register, self.scratch + place);
        }
        self.write(common::QUEUE_VECTOR, vector);
        self.write(common::QUEUE_ENABLE, 1);
        self.set_status(agreed | status::DRIVER_OK);
        self.status() == agreed | status::DRIVER_OK
    }

    /// Says where an area of the queue is.
    pub fn set_area(&self, register: u64, address: u64) {
        write32(self.common(register), address as u32);
        write32(self.common(register + 4), (address >> 32) as u32);
    }

    /// Writes a descriptor.
    pub fn describe(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let at = self.scratch + DESCRIPTORS + 16 * u64::from(index);
        write64(at, address);
        write32(at + 8, bytes);
        write16(at + 12, flags);
        write16(at + 14, next);
    }

    /// Offers the chain that begins with a descriptor.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next % QUEUE_SIZE);
        write16(self.scratch + AVAILABLE + 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        self.set_offered(self.next);
    }

    /// Sets the index of the available ring.
    pub fn set_offered(&self, index: u16) {
        write16(self.scratch + AVAILABLE + 2, index);
    }

    /// Requests that came back.
    pub fn returned(&self) -> u16 {
        read16(self.scratch + USED + 2)
    }

    /// Bytes that the device says it wrote to the last request.
    pub fn written(&self) -> u32 {
        let slot = u64::from(self.returned().wrapping_sub(1) % QUEUE_SIZE);
        read32(self.scratch + USED + 4 + 8 * slot + 4)
    }

    /// Where a write of the queue's number, 0, notifies the device.
    pub fn notify_address(&self) -> u64 {
        let offset = self.read(common::QUEUE_NOTIFY_OFFSET);
        let offset = u64::from(offset) * u64::from(self.structures.notify_step);
        self.address(self.structures.notify, offset)
    }

    /// Notifies the device.
    pub fn notify(&self) {
        write16(self.notify_address(), 0);
    }

    /// Address of the data of requests.
    pub fn data(&self) -> u64 {
        self.scratch + DATA
    }

    /// Puts the header of a request in place, and forgets the status of the last one.
    pub fn prepare(&self, kind: u32, sector: u64) {
        let header = self.scratch + HEADER;
        write32(header, kind);
        write32(header + 4, 0);
        write64(header + 8, sector);
        write8(self.scratch + STATUS, NO_STATUS);
    }

    /// Offers a request of `bytes` bytes of data and notifies.
    pub fn submit(&mut self, kind: u32, sector: u64, bytes: u32) {
        self.queue(kind, sector, bytes);
        self.notify();
    }

    /// Offers a request of `bytes` bytes of data, and leaves the notification to the caller.
    pub fn queue(&mut self, kind: u32, sector: u64, bytes: u32) {
        self.prepare(kind, sector);
        let direction = if kind == WRITE { 0 } else { DEVICE_WRITES };
        self.describe(
            0,
            self.scratch + HEADER,
            16,
            NEXT,
            if bytes > 0 { 1 } else { 2 },
        );
        self.describe(1, self.data(), bytes, NEXT | direction, 2);
        self.describe(2, self.scratch + STATUS, 1, DEVICE_WRITES, 0);
        self.offer(0);
    }

    /// The status of the last request; `None` while it is not there.
    pub fn outcome(&self) -> Option<u8> {
        (self.returned() == self.next).then(|| read8(self.scratch + STATUS))
    }
}
