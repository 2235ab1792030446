//! Tests of the block device: requests in every cut, errors, and what a driver must not do.

use super::super::queue::RingFeatures;
use super::super::testing::{Driver, FakeDisk, memory};
use super::*;
use mem::Gpa;
use proptest::prelude::*;

const HEADER: u64 = 0x2_0000;
const DATA: u64 = 0x3_0000;
const STATUS: u64 = 0x2_1000;
const READ: u32 = 0;
const WRITE: u32 = 1;
const SECTORS: u64 = 64;
const ALL: Features = Features::all();

struct Setup {
    driver: Driver,
    queue: Queue,
    disk: Arc<FakeDisk>,
    block: Block,
}

fn setup_with(change: impl FnOnce(&mut FakeDisk)) -> Setup {
    let mut disk = FakeDisk::new(SECTORS);
    change(&mut disk);
    let disk = Arc::new(disk);
    let driver = Driver::new(memory(), QUEUE_SIZE, 0x1_0000);
    let queue = Queue::new(driver.layout, RingFeatures::default()).unwrap();
    let block = Block::new("disk".into(), disk.clone(), "serial", 1);
    block.start(ALL.bits());
    Setup {
        driver,
        queue,
        disk,
        block,
    }
}

fn setup() -> Setup {
    setup_with(|_| {})
}

impl Setup {
    fn header(&self, at: u64, kind: u32, sector: u64) {
        let memory = &self.driver.memory;
        memory.write_u32(Gpa(at), kind).unwrap();
        memory.write_u64(Gpa(at + 8), sector).unwrap();
    }

    fn run(&mut self, budget: u64) -> Result<Progress, QueueError> {
        let memory = self.driver.memory.clone();
        let budget = &mut Budget::new(budget);
        self.block.run(0, &mut self.queue, &memory, budget)
    }

    /// A request of three buffers; its status, and how many bytes were written.
    fn request(&mut self, kind: u32, sector: u64, bytes: u32) -> (u8, u32) {
        self.header(HEADER, kind, sector);
        self.driver.memory.write_u8(Gpa(STATUS), 0xff).unwrap();
        let to_driver = matches!(kind, READ | 8);
        let buffers = [
            (HEADER, 16, false),
            (DATA, bytes, to_driver),
            (STATUS, 1, true),
        ];
        let head = self.driver.request(&buffers);
        assert_eq!(self.run(1 << 20), Ok(Progress::Idle));
        let (used, written) = self.driver.used().expect("given back");
        assert_eq!(used, u32::from(head));
        (self.driver.memory.read_u8(Gpa(STATUS)).unwrap(), written)
    }

    fn data(&self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.driver.memory.read(Gpa(DATA), &mut data).unwrap();
        data
    }

    /// Puts an entry of a request to discard or zero into the data.
    fn sweep(&self, sector: u64, sectors: u32, flags: u32) {
        let memory = &self.driver.memory;
        memory.write_u64(Gpa(DATA), sector).unwrap();
        memory.write_u32(Gpa(DATA + 8), sectors).unwrap();
        memory.write_u32(Gpa(DATA + 12), flags).unwrap();
    }
}

#[test]
fn what_is_written_is_read() {
    let mut s = setup();
    assert_eq!(s.request(READ, 3, 10 * 512), (0, 10 * 512 + 1));
    assert_eq!(s.data(5120), s.disk.bytes.lock()[1536..][..5120]);
    s.driver.memory.write(Gpa(DATA), &[7; 8192]).unwrap();
    assert_eq!(s.request(WRITE, 48, 8192), (0, 1));
    assert_eq!(s.disk.bytes.lock()[48 * 512..], [7; 8192]);
    assert_eq!(s.request(4, 0, 0), (0, 1));
    assert_eq!(s.disk.flushes.load(Ordering::Relaxed), 1);
    assert_eq!(
        s.request(READ, SECTORS, 0),
        (0, 1),
        "nothing, at the very end"
    );
}

#[test]
fn identity_is_cut_to_what_there_is_room_for() {
    let mut s = setup();
    assert_eq!(s.request(8, 0, 20), (0, 21));
    assert_eq!(&s.data(7), b"serial\0");
    assert_eq!(s.request(8, 0, 3), (0, 4));
    // More room than identity: what lies between it and the status was not written.
    assert_eq!(s.request(8, 0, 512), (0, 20));
}

#[test]
fn errors_are_statuses() {
    let mut s = setup_with(|disk| disk.bad = Some(20));
    let (error, unsupported) = (Status::IoError as u8, Status::Unsupported as u8);
    for (kind, sector, bytes) in [
        (READ, SECTORS - 1, 1024),
        (WRITE, SECTORS, 512),
        (READ, u64::MAX, 512),
        (READ, u64::MAX / 512, 512),
        (READ, 0, 100),
        (READ, 20, 512),
        (WRITE, 16, 4096),
    ] {
        assert_eq!(
            s.request(kind, sector, bytes).0,
            error,
            "{kind} {sector} {bytes}"
        );
    }
    for kind in [2, 3, 5, 10, 14, u32::MAX] {
        assert_eq!(s.request(kind, 0, 512).0, unsupported);
    }
    let mut s = setup_with(|disk| disk.read_only = true);
    let before = s.disk.bytes.lock().clone();
    assert_eq!(s.request(WRITE, 0, 512).0, error);
    s.sweep(0, 8, 0);
    assert_eq!(s.request(13, 0, 16).0, error);
    assert_eq!(s.request(READ, 0, 512).0, 0);
    assert_eq!(*s.disk.bytes.lock(), before);
    let features = Features::from_bits_retain(s.block.features());
    assert!(features.contains(Features::READ_ONLY) && !features.contains(Features::DISCARD));
}

#[test]
fn discard_and_zeroes() {
    let mut s = setup();
    let (error, unsupported) = (Status::IoError as u8, Status::Unsupported as u8);
    s.sweep(8, 16, 1);
    assert_eq!(s.request(13, 0, 16), (0, 1));
    assert_eq!(s.disk.bytes.lock()[4096..12288], [0; 8192]);
    assert_eq!(s.request(11, 0, 16).0, unsupported, "discard has no flags");
    s.sweep(8, 16, 0);
    assert_eq!(s.request(11, 0, 16), (0, 1));
    assert_eq!(s.disk.bytes.lock()[4096..12288], [0xdd; 8192]);
    assert_eq!(s.request(11, 0, 32).0, error, "two entries");
    assert_eq!(s.request(11, 0, 15).0, error);
    for (sector, sectors) in [(SECTORS, 1), (0, u32::MAX), (u64::MAX, 1)] {
        s.sweep(sector, sectors, 0);
        assert_eq!(s.request(13, 0, 16).0, error);
    }
    s.sweep(0, 8, 2);
    assert_eq!(s.request(13, 0, 16).0, unsupported, "an unknown flag");
    s.block.start(0);
    s.sweep(0, 8, 0);
    assert_eq!(s.request(13, 0, 16).0, unsupported, "not agreed on");
}

#[test]
fn a_request_without_its_parts_breaks_the_rules() {
    for buffers in [
        &[(HEADER, 15, false), (STATUS, 1, true)][..],
        &[(HEADER, 16, false), (DATA, 512, false)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
        &[(STATUS, 1, true)],
    ] {
        let mut s = setup();
        s.header(HEADER, READ, 0);
        s.driver.request(buffers);
        assert_eq!(s.run(1 << 20), Err(QueueError::BadRequest), "{buffers:?}");
    }
}

#[test]
fn a_large_request_is_done_in_pieces() {
    let mut s = setup();
    s.header(HEADER, READ, 0);
    let bytes = SECTORS as u32 * 512;
    s.driver
        .request(&[(HEADER, 16, false), (DATA, bytes, true), (STATUS, 1, true)]);
    s.driver
        .request(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    let mut turns = 0;
    while s.run(8192) == Ok(Progress::More) {
        turns += 1;
        assert!(turns < 10);
    }
    // 32 KiB and the costs of two requests, 8 KiB a turn.
    assert_eq!(turns, 4);
    assert_eq!(s.driver.used(), Some((0, bytes + 1)));
    assert_eq!(s.driver.used(), Some((3, 513)));
    assert_eq!(s.data(bytes as usize), *s.disk.bytes.lock());
    // Given up in the middle: the next request starts anew.
    s.driver
        .request(&[(HEADER, 16, false), (DATA, bytes, true), (STATUS, 1, true)]);
    assert_eq!(s.run(8192), Ok(Progress::More));
    s.block.reset();
    s.driver = Driver::new(s.driver.memory, QUEUE_SIZE, 0x1_0000);
    s.driver.set_index(0);
    s.driver.memory.write_u32(s.driver.layout.used, 0).unwrap();
    s.queue = Queue::new(s.driver.layout, RingFeatures::default()).unwrap();
    assert_eq!(s.request(READ, 1, 512), (0, 513));
}

#[test]
fn requests_without_data_cost_too() {
    let mut s = setup();
    for _ in 0..QUEUE_SIZE / 2 {
        s.driver.request(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    s.header(HEADER, 4, 0);
    let before = s.disk.flushes.load(Ordering::Relaxed);
    assert_eq!(s.run(8 * 640), Ok(Progress::More));
    assert_eq!(s.disk.flushes.load(Ordering::Relaxed) - before, 8);
}

#[test]
fn configuration() {
    let s = setup();
    let mut bytes = [0xee; 64];
    s.block.read_config(0, &mut bytes);
    assert_eq!(bytes[..8], SECTORS.to_le_bytes());
    assert_eq!(bytes[12..16], 126u32.to_le_bytes());
    assert_eq!(bytes[20..24], 512u32.to_le_bytes());
    assert_eq!(bytes[34..36], [1, 0]);
    assert_eq!(bytes[60..], [0; 4]);
    s.block.read_config(usize::MAX, &mut bytes[..4]);
    assert_eq!(bytes[..4], [0; 4]);
    let many = Block::new(
        "d".into(),
        s.disk.clone(),
        "a name of more than twenty bytes",
        99,
    );
    assert_eq!(many.queue_sizes().len(), usize::from(MAX_QUEUES));
    assert_ne!(many.features() & Features::MULTI_QUEUE.bits(), 0);
    assert_eq!(s.block.features() & Features::MULTI_QUEUE.bits(), 0);
}

proptest! {
    /// However header, data and status are cut into buffers, and whatever the budget of a turn, the
    /// disk gives and takes the same bytes.
    #[test]
    fn framing_does_not_matter(
        write in any::<bool>(),
        sector in 0..SECTORS - 20,
        sectors in 1u32..20,
        cuts in proptest::collection::vec(1u32..3000, 0..20),
        header_cut in 0u32..=16,
        together in any::<bool>(),
        budget in 1u64..20_000,
    ) {
        let mut s = setup();
        let bytes = sectors * 512;
        let pattern: Vec<u8> = (0..bytes).map(|i| (i * 7 / 5) as u8).collect();
        s.header(HEADER, u32::from(write), sector);
        let place = if write { HEADER + 16 } else { DATA };
        s.driver.memory.write(Gpa(place), &pattern).unwrap();
        let before = s.disk.bytes.lock().clone();
        // Where the readable and the writable bytes end, as (address, bytes, device writes).
        let mut streams = vec![(HEADER, 16 + if write { bytes } else { 0 }, false)];
        if write || !together {
            if !write { streams.push((DATA, bytes, true)); }
            streams.push((DATA + u64::from(bytes), 1, true));
        } else {
            streams.push((DATA, bytes + 1, true));
        }
        let mut buffers = Vec::new();
        let mut cuts = core::iter::once(header_cut).chain(cuts);
        for (mut at, mut left, writes) in streams {
            while left > 0 {
                let piece = cuts.next().map_or(left, |cut| cut.min(left));
                buffers.push((at, piece, writes));
                at += u64::from(piece);
                left -= piece;
            }
        }
        s.driver.request(&buffers);
        for _ in 0..40 {
            if s.run(budget).unwrap() == Progress::Idle { break; }
        }
        // A tiny budget needs more turns.
        while s.run(budget).unwrap() == Progress::More {}
        prop_assert_eq!(s.driver.memory.read_u8(Gpa(DATA + u64::from(bytes))), Ok(0));
        let range = (sector * 512) as usize..(sector * 512) as usize + bytes as usize;
        let now = s.disk.bytes.lock().clone();
        if write {
            prop_assert_eq!(&now[range.clone()], &pattern[..]);
            prop_assert_eq!(&now[..range.start], &before[..range.start]);
            prop_assert_eq!(&now[range.end..], &before[range.end..]);
            prop_assert_eq!(s.driver.used(), Some((0, 1)));
        } else {
            prop_assert_eq!(&now, &before);
            prop_assert_eq!(&s.data(bytes as usize)[..], &before[range]);
            prop_assert_eq!(s.driver.used(), Some((0, bytes + 1)));
        }
    }
}
