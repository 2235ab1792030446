//! Tests of the transport: a driver that sets a disk up by PCI, and one that misbehaves.

use super::super::block::{Block, QUEUE_SIZE};
use super::super::testing::{Driver, FakeDisk, memory};
use super::*;
use crate::line::InterruptSink;
use crate::testing::{Messages, RecordingSink};
use crate::work::WorkList;
use alloc::vec::Vec;
use proptest::prelude::*;

const QUEUES: u16 = 2;
const GSI: u32 = 20;
const VERSION_1: u64 = 1 << 32;

struct Setup {
    function: Arc<VirtioPci>,
    memory: Arc<GuestMemory>,
    work: WorkList,
    messages: Arc<Messages>,
    pins: Arc<RecordingSink>,
    disk: Arc<FakeDisk>,
    notes: Vec<String>,
}

fn setup() -> Setup {
    let (memory, disk) = (memory(), Arc::new(FakeDisk::new(64)));
    let (messages, pins) = (
        Arc::new(Messages::default()),
        Arc::new(RecordingSink::default()),
    );
    let router: Arc<dyn InterruptSink> = pins.clone();
    let mut work = WorkList::new();
    let block = Block::new("vm: disk 0".into(), disk.clone(), "serial", QUEUES);
    let function = work.add(|signal| {
        let wiring = Wiring {
            memory: memory.clone(),
            messages: messages.clone(),
            line: Line::new(router, GSI),
            work: signal,
        };
        VirtioPci::new(Box::new(block), wiring).ok()
    });
    let s = Setup {
        function: function.unwrap(),
        memory,
        work,
        messages,
        pins,
        disk,
        notes: Vec::new(),
    };
    // Memory and bus master.
    s.function.config_write(4, Width::Word, 6);
    s
}

impl Setup {
    fn write(&self, offset: u64, width: Width, value: u64) {
        let _refused = self.function.bar_write(0, offset, width, value);
    }

    fn read(&self, offset: u64, width: Width) -> u64 {
        self.function.bar_read(0, offset, width).unwrap()
    }

    fn status(&self) -> u64 {
        self.read(0x14, Width::Byte)
    }

    fn set_status(&self, status: u64) {
        self.write(0x14, Width::Byte, status);
    }

    fn features(&self, features: u64) {
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(8, Width::Dword, select);
            self.write(12, Width::Dword, half);
        }
    }

    /// Places queue `index` at `base`, with a vector.
    fn set_queue(&self, index: u64, base: u64, vector: u64) -> Driver {
        self.write(0x16, Width::Word, index);
        let driver = Driver::new(self.memory.clone(), QUEUE_SIZE, base);
        let layout = driver.layout;
        for (at, area) in [
            (0x20, layout.descriptors),
            (0x28, layout.available),
            (0x30, layout.used),
        ] {
            self.write(at, Width::Dword, area.0 & 0xffff_ffff);
            self.write(at + 4, Width::Dword, area.0 >> 32);
        }
        self.write(0x1a, Width::Word, vector);
        self.write(0x1c, Width::Word, 1);
        driver
    }

    /// The whole of section 3.1.1, with queue 0.
    fn start(&self, features: u64) -> Driver {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.features(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
        let driver = self.set_queue(0, 0x1_0000, 1);
        self.set_status(15);
        driver
    }

    fn enable_msix(&self) {
        for vector in 0..u64::from(QUEUES) + 1 {
            let at = u64::from(MSIX_TABLE) + 16 * vector;
            self.write(at, Width::Qword, 0xfee0_0000);
            self.write(at + 8, Width::Qword, 0x40 + vector);
        }
        let at = self.function.msix_at + 2;
        self.function.config_write(at, Width::Word, 0x8000);
    }

    fn notify(&self, queue: u64) {
        self.write(u64::from(NOTIFY) + 4 * queue, Width::Word, queue);
    }

    fn work(&mut self) {
        let notes = &mut self.notes;
        self.work
            .run(&mut Budget::new(1 << 20), |line| notes.push(line));
    }

    /// Offers a read of the first sector.
    fn offer_read(&self, driver: &mut Driver) {
        self.memory.write(Gpa(0x8000), &[0; 16]).unwrap();
        driver.request(&[(0x8000, 16, false), (0x9000, 512, true), (0xa000, 1, true)]);
    }
}

#[test]
fn capabilities_say_where_everything_is() {
    let s = setup();
    let read = |at: u16, width| s.function.config_read(at, width);
    assert_eq!(read(0, Width::Dword), 0x1042_1af4);
    assert_eq!(read(8, Width::Dword), 0x0100_0001);
    assert_eq!(read(0x3d, Width::Byte), 1);
    let mut found = Vec::new();
    let mut at = read(0x34, Width::Byte) as u16;
    while at != 0 {
        if read(at, Width::Byte) == 9 {
            let kind = read(at + 3, Width::Byte);
            let (offset, len) = (read(at + 8, Width::Dword), read(at + 12, Width::Dword));
            assert!(u64::from(offset + len) <= BAR_LEN);
            found.push((kind, read(at + 2, Width::Byte), offset, len));
        } else {
            assert_eq!((read(at, Width::Byte), at), (0x11, s.function.msix_at));
        }
        at = read(at + 1, Width::Byte) as u16;
    }
    let wanted = [
        (1, 16, COMMON, 0x38),
        (2, 20, NOTIFY, 8),
        (3, 16, ISR, 1),
        (4, 16, DEVICE, 0x1000),
        (5, 20, 0, 0),
    ];
    assert_eq!(found, wanted);
}

#[test]
fn a_disk_is_set_up_and_read_by_msix() {
    let mut s = setup();
    s.enable_msix();
    let mut driver = s.start(VERSION_1);
    assert_eq!(s.status(), 15);
    assert_eq!(s.read(0x12, Width::Word), u64::from(QUEUES));
    assert_eq!(s.read(u64::from(DEVICE), Width::Qword), 64);
    s.work();
    s.offer_read(&mut driver);
    assert!(!s.work.is_pending());
    s.notify(0);
    assert!(s.work.is_pending());
    assert_eq!(driver.used(), None, "nothing is done within the access");
    s.work();
    assert_eq!(driver.used(), Some((0, 513)));
    assert_eq!(s.messages.vectors(), [0x41]);
    assert_eq!(
        (s.read(u64::from(ISR), Width::Byte), s.pins.take()),
        (0, Vec::new())
    );
    assert!(s.notes.is_empty() && !s.work.is_pending());
    let mut sector = [0; 512];
    s.memory.read(Gpa(0x9000), &mut sector).unwrap();
    assert_eq!(sector[..], s.disk.bytes.lock()[..512]);
}

#[test]
fn without_msix_the_pin_is_driven_until_the_status_is_read() {
    let mut s = setup();
    let mut driver = s.start(VERSION_1);
    s.offer_read(&mut driver);
    s.notify(0);
    s.work();
    assert_eq!(s.pins.take(), [(GSI, true)]);
    assert_eq!(s.function.config_read(6, Width::Word) & 8, 8);
    assert_eq!(s.read(u64::from(ISR), Width::Byte), 1);
    assert_eq!(s.read(u64::from(ISR), Width::Byte), 0);
    assert_eq!(s.pins.take(), [(GSI, false)]);
    assert_eq!(s.function.config_read(6, Width::Word) & 8, 0);
    // Disabled in the command register; MSI-X on.
    s.function.config_write(4, Width::Word, 0x406);
    s.offer_read(&mut driver);
    s.notify(0);
    s.work();
    assert_eq!(s.pins.take(), []);
    assert_eq!(
        s.function.config_read(6, Width::Word) & 8,
        8,
        "the want is shown"
    );
    s.function.config_write(4, Width::Word, 6);
    assert_eq!(s.pins.take(), [(GSI, true)]);
    s.enable_msix();
    assert_eq!(s.pins.take(), [(GSI, false)]);
}

#[test]
fn features_are_checked() {
    let s = setup();
    s.write(0, Width::Dword, 1);
    assert_eq!(s.read(4, Width::Dword), 1, "VERSION_1");
    s.write(0, Width::Dword, 2);
    assert_eq!(s.read(4, Width::Dword), 0);
    for bad in [0, 1 << 28, VERSION_1 | 1 << 33, VERSION_1 | 1] {
        s.set_status(0);
        s.set_status(3);
        s.features(bad);
        s.set_status(11);
        assert_eq!(s.status(), 3, "{bad:#x}");
        s.set_status(15);
        assert_eq!(s.status(), 3, "no DRIVER_OK without FEATURES_OK");
    }
    s.features(VERSION_1 | 1 << 29);
    s.set_status(11);
    s.features(0);
    s.write(8, Width::Dword, 1);
    assert_eq!(s.read(12, Width::Dword), 1, "kept once they are agreed on");
    s.set_status(1);
    assert_eq!(s.status(), 11, "no bit goes but by reset");
    s.set_status(0);
    assert_eq!((s.status(), s.read(12, Width::Dword)), (0, 0));
}

#[test]
fn queue_registers() {
    let s = setup();
    s.set_status(3);
    assert_eq!(s.read(0x18, Width::Word), u64::from(QUEUE_SIZE));
    for bad in [0, 3, 256, 0xffff] {
        s.write(0x18, Width::Word, bad);
        assert_eq!(s.read(0x18, Width::Word), u64::from(QUEUE_SIZE));
    }
    s.write(0x18, Width::Word, 16);
    s.write(0x20, Width::Qword, 0x12_3456_7890);
    assert_eq!(s.read(0x20, Width::Dword), 0x3456_7890);
    assert_eq!(s.read(0x24, Width::Dword), 0x12);
    s.write(0x1a, Width::Word, 2);
    assert_eq!(s.read(0x1a, Width::Word), 2);
    s.write(0x1a, Width::Word, 3);
    assert_eq!(s.read(0x1a, Width::Word), 0xffff, "there are three vectors");
    s.write(0x10, Width::Word, 0);
    assert_eq!(s.read(0x10, Width::Word), 0);
    s.write(0x1c, Width::Word, 1);
    s.write(0x18, Width::Word, 8);
    s.write(0x20, Width::Qword, 0);
    assert_eq!(s.read(0x18, Width::Word), 16, "enabled: set up for good");
    assert_eq!(s.read(0x20, Width::Qword), 0x12_3456_7890);
    s.write(0x16, Width::Word, 1);
    assert_eq!(
        (s.read(0x1c, Width::Word), s.read(0x1e, Width::Word)),
        (0, 1)
    );
    s.write(0x16, Width::Word, 2);
    assert_eq!(
        (s.read(0x18, Width::Word), s.read(0x1c, Width::Word)),
        (0, 0),
        "no such queue"
    );
    let refused = Err(IoError::InvalidWidth);
    assert_eq!(s.function.bar_read(0, 0x16, Width::Dword), refused);
    assert_eq!(
        s.function.bar_read(0, 0x38, Width::Word),
        Err(IoError::InvalidRegister)
    );
    assert_eq!(
        s.function.bar_read(1, 0, Width::Dword),
        Err(IoError::InvalidRegister)
    );
    assert!(
        s.function
            .bar_write(0, u64::from(NOTIFY) + 8, Width::Word, 0)
            .is_err()
    );
}

#[test]
fn a_driver_that_breaks_a_rule_has_to_reset() {
    let mut s = setup();
    s.enable_msix();
    let driver = s.start(VERSION_1);
    s.write(0x10, Width::Word, 2);
    s.work();
    driver.set_index(1000);
    s.notify(0);
    s.work();
    assert_eq!(s.status(), 15 | 64);
    assert_eq!(s.messages.vectors(), [0x42], "a change of configuration");
    let line =
        "vm: disk 0: queue 0: the driver's index jumped from 0 to 1000: the device needs a reset";
    assert_eq!(s.notes, [line]);
    s.notify(0);
    s.work();
    assert_eq!(s.notes.len(), 1, "it does nothing more");
    s.set_status(64);
    assert_eq!(s.status(), 15 | 64, "only a reset helps");
    s.memory.write_u32(driver.layout.available, 0).unwrap();
    let mut driver = s.start(VERSION_1);
    s.offer_read(&mut driver);
    s.notify(0);
    s.work();
    assert_eq!(driver.used(), Some((0, 513)));
    // A queue that is set up wrongly; and there are not so many lines.
    for _ in 0..2 * MAX_NOTES {
        s.set_status(0);
        s.set_status(3);
        s.features(VERSION_1);
        s.set_status(11);
        s.set_queue(0, 0x1_0001, 0);
        s.set_status(15);
        s.work();
        assert_eq!(s.status(), 15 | 64);
    }
    assert_eq!(s.notes.len(), MAX_NOTES as usize);
    let last = s.notes.last().unwrap();
    assert!(
        last.ends_with(
            "a queue of a bad size or alignment: the device needs a reset; no more such lines"
        ),
        "{last}"
    );
}

#[test]
fn only_a_bus_master_touches_memory() {
    let mut s = setup();
    let mut driver = s.start(VERSION_1);
    s.function.config_write(4, Width::Word, 2);
    s.offer_read(&mut driver);
    s.notify(0);
    s.work();
    assert_eq!(driver.used(), None);
    assert!(!s.work.is_pending(), "it waits");
    s.function.config_write(4, Width::Word, 6);
    s.work();
    assert_eq!(driver.used(), Some((0, 513)));
}

#[test]
fn two_queues_work_apart() {
    let mut s = setup();
    s.enable_msix();
    s.set_status(3);
    s.features(VERSION_1);
    s.set_status(11);
    let mut first = s.set_queue(0, 0x1_0000, 1);
    let mut second = s.set_queue(1, 0x1_4000, 2);
    s.set_status(15);
    s.work();
    s.offer_read(&mut second);
    s.offer_read(&mut first);
    s.notify(1);
    s.work();
    assert_eq!((first.used(), second.used()), (None, Some((0, 513))));
    // Another vCPU is in the first one: the work stays.
    let ring = s.function.slots[0].ring.try_lock();
    s.notify(0);
    s.work.run(&mut Budget::new(1 << 20), |_| {});
    assert!(s.work.is_pending());
    drop(ring);
    s.work();
    assert_eq!(first.used(), Some((0, 513)));
    assert_eq!(s.messages.vectors(), [0x42, 0x41]);
    assert!(!s.work.is_pending());
}

#[test]
fn the_window_in_configuration_space() {
    let s = setup();
    let at = s.function.window_at;
    let access = |offset: u32, len: u32| {
        s.function.config_write(at + 8, Width::Dword, offset);
        s.function.config_write(at + 12, Width::Dword, len);
    };
    access(0x14, 1);
    s.function.config_write(at + 16, Width::Byte, 3);
    assert_eq!(s.status(), 3);
    assert_eq!(s.function.config_read(at + 16, Width::Dword), 3);
    access(0x12, 2);
    assert_eq!(
        s.function.config_read(at + 16, Width::Dword),
        u32::from(QUEUES)
    );
    access(NOTIFY, 2);
    s.function.config_write(at + 16, Width::Word, 0);
    assert!(s.work.is_pending());
    // What leads nowhere is plain memory.
    for (offset, len) in [(0x8000, 4), (0x15, 2), (0, 3), (u32::MAX, 4)] {
        access(offset, len);
        s.function.config_write(at + 16, Width::Dword, 0x1234_5678);
        assert_eq!(s.function.config_read(at + 16, Width::Dword), 0x1234_5678);
    }
}

proptest! {
    /// Registers, notifications, configuration space and rings, written at random and out of order.
    #[test]
    fn random_drivers_do_no_harm(
        steps in proptest::collection::vec((0u8..8, any::<u16>(), any::<u64>()), 0..120),
    ) {
        let mut s = setup();
        let mut driver = s.start(VERSION_1 | 0x3000_0000);
        for (kind, at, value) in steps {
            let width = [Width::Byte, Width::Word, Width::Dword, Width::Qword][usize::from(at >> 14)];
            let small = u64::from(at % 0x40);
            match kind {
                0 => s.write(small & !(width.bytes() as u64 - 1), width, value),
                1 => s.write(u64::from(at) % BAR_LEN, width, value),
                2 => { let _ = s.function.bar_read(0, u64::from(at) % BAR_LEN, width); }
                3 => s.function.config_write((at % 0x100) & !3, Width::Dword, value as u32),
                4 => s.notify(u64::from(at % 3)),
                5 => driver.set(at % QUEUE_SIZE, (value % 0x30_0000, (value >> 32) as u32 % 0x2000, at % 8, value as u16 % QUEUE_SIZE)),
                6 => s.offer_read(&mut driver),
                _ => { let _ = s.memory.write_u16(driver.layout.available + u64::from(at % 64), value as u16 % 200); }
            }
            s.work();
        }
        prop_assert!(s.notes.len() <= MAX_NOTES as usize);
        // After a reset it works as at first.
        s.function.config_write(4, Width::Word, 6);
        s.set_status(0);
        s.memory.write(driver.layout.available, &[0; 512]).unwrap();
        s.memory.write(driver.layout.used, &[0; 16]).unwrap();
        let mut driver = s.start(VERSION_1);
        s.offer_read(&mut driver);
        s.notify(0);
        s.work();
        prop_assert_eq!(driver.used(), Some((0, 513)));
    }
}
