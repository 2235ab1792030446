//! Tests of the split virtqueue: the driver's rights, and its crimes.

use super::super::testing::{Driver, INDIRECT, NEXT, RAM, WRITE, memory};
use super::*;
use proptest::prelude::*;

const SIZE: u16 = 8;
const BASE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;

fn setup(features: RingFeatures) -> (Driver, Queue, Chain) {
    let driver = Driver::new(memory(), SIZE, BASE);
    let queue = Queue::new(driver.layout, features).unwrap();
    (driver, queue, Chain::default())
}

fn plain() -> (Driver, Queue, Chain) {
    setup(RingFeatures::default())
}

#[test]
fn chains_are_taken_in_order_and_given_back() {
    let (mut driver, mut queue, mut chain) = plain();
    let memory = driver.memory.clone();
    assert_eq!(queue.take(&memory, &mut chain), Ok(false));
    // More rounds than entries: indices wrap.
    for round in 0..20u32 {
        memory.write(Gpa(DATA), b"abcdef").unwrap();
        driver.request(&[
            (DATA, 4, false),
            (DATA + 4, 0, false),
            (DATA + 4, 2, false),
            (DATA + 16, 3, true),
            (DATA + 32, 3, true),
        ]);
        assert_eq!(queue.take(&memory, &mut chain), Ok(true));
        assert_eq!((chain.readable(), chain.writable()), (6, 6));
        let mut at = chain.reader();
        let mut to = [0; 5];
        chain.read(&mut at, &memory, &mut to).unwrap();
        assert_eq!(&to, b"abcde");
        assert_eq!(
            chain.read(&mut at, &memory, &mut to),
            Err(QueueError::BadRequest)
        );
        let mut at = chain.writer();
        chain.skip(&mut at, 1).unwrap();
        chain.write(&mut at, &memory, &[1, 2, 3, 4, 5]).unwrap();
        assert_eq!(
            chain.write(&mut at, &memory, &[6]),
            Err(QueueError::BadRequest)
        );
        assert_eq!(memory.read_u16(Gpa(DATA + 17)), Ok(0x0201));
        assert_eq!(memory.read_u16(Gpa(DATA + 33)), Ok(0x0504));
        queue.give_back(&memory, &chain, round).unwrap();
        let head = (round * 5 % u32::from(SIZE), round);
        assert_eq!(driver.used(), Some(head));
        assert_eq!(driver.used(), None);
    }
}

#[test]
fn indirect_tables() {
    let (mut driver, mut queue, mut chain) = setup(RingFeatures {
        indirect: true,
        event_index: false,
    });
    let memory = driver.memory.clone();
    let table = Gpa(DATA);
    driver.describe(table, 0, (0x3_0000, 16, NEXT, 2));
    driver.describe(table, 2, (0x3_0010, 512, WRITE, 0));
    driver.set(0, (0x3_1000, 4, NEXT, 1));
    driver.set(1, (table.0, 48, INDIRECT, 0));
    driver.offer(0);
    assert_eq!(queue.take(&memory, &mut chain), Ok(true));
    assert_eq!((chain.readable(), chain.writable()), (20, 512));
    // What is not allowed: each in a queue of its own.
    for (bytes, flags, inner) in [
        (0, INDIRECT, 0),
        (47, INDIRECT, 0),
        (16 * 9, INDIRECT, 0),
        (48, INDIRECT | NEXT, 0),
        (48, INDIRECT, INDIRECT),
    ] {
        let (mut driver, mut queue, mut chain) = setup(queue.features);
        driver.describe(table, 0, (0x3_0000, 16, inner, 0));
        driver.set(0, (table.0, bytes, flags, 1));
        driver.offer(0);
        let taken = queue.take(&driver.memory, &mut chain);
        assert_eq!(
            taken,
            Err(QueueError::BadIndirect),
            "{bytes} {flags} {inner}"
        );
    }
    let (mut driver, mut queue, mut chain) = plain();
    driver.set(0, (table.0, 48, INDIRECT, 0));
    driver.offer(0);
    let taken = queue.take(&driver.memory, &mut chain);
    assert_eq!(taken, Err(QueueError::BadIndirect), "not agreed on");
}

#[test]
fn loops_and_wild_numbers_are_found() {
    let crime = |prepare: &dyn Fn(&mut Driver)| {
        let (mut driver, mut queue, mut chain) = plain();
        prepare(&mut driver);
        queue.take(&driver.memory, &mut chain).unwrap_err()
    };
    let self_loop = crime(&|d| {
        d.set(3, (DATA, 1, NEXT, 3));
        d.offer(3);
    });
    assert_eq!(self_loop, QueueError::TooLong);
    let pair = crime(&|d| {
        d.set(0, (DATA, 1, NEXT, 1));
        d.set(1, (DATA, 1, NEXT, 0));
        d.offer(0);
    });
    assert_eq!(pair, QueueError::TooLong);
    let head = crime(&|d| d.offer(8));
    assert_eq!(head, QueueError::NoSuchDescriptor { index: 8 });
    let next = crime(&|d| {
        d.set(0, (DATA, 1, NEXT, 0xffff));
        d.offer(0);
    });
    assert_eq!(next, QueueError::NoSuchDescriptor { index: 0xffff });
    let jump = crime(&|d| d.set_index(9));
    assert_eq!(jump, QueueError::IndexJump { from: 0, to: 9 });
    let back = crime(&|d| d.set_index(0xffff));
    assert_eq!(
        back,
        QueueError::IndexJump {
            from: 0,
            to: 0xffff
        }
    );
    let order = crime(&|d| {
        d.request(&[(DATA, 1, true), (DATA, 1, false)]);
    });
    assert_eq!(order, QueueError::WrongOrder);
    let large = crime(&|d| {
        d.request(&[(DATA, u32::MAX, false), (DATA, 2, false)]);
    });
    assert_eq!(large, QueueError::TooLarge);
}

#[test]
fn what_is_not_ram_is_an_error_when_touched() {
    let (mut driver, mut queue, mut chain) = plain();
    let memory = driver.memory.clone();
    for start in [RAM - 1, RAM, 0xfee0_0000, u64::MAX - 1, u64::MAX] {
        driver.request(&[(start, 4, false), (start, 4, true)]);
        assert_eq!(queue.take(&memory, &mut chain), Ok(true));
        let read = chain.read(&mut chain.reader(), &memory, &mut [0; 4]);
        assert!(matches!(read, Err(QueueError::NotRam(_))), "{start:#x}");
        let write = chain.write(&mut chain.writer(), &memory, &[0; 4]);
        assert!(matches!(write, Err(QueueError::NotRam(_))), "{start:#x}");
    }
    // The end of the address space within a buffer.
    driver.request(&[(u64::MAX, 4, false)]);
    assert_eq!(queue.take(&memory, &mut chain), Ok(true));
    let mut at = chain.reader();
    chain.skip(&mut at, 2).unwrap();
    assert!(chain.read(&mut at, &memory, &mut [0; 1]).is_err());
    for area in 0..3 {
        let mut layout = driver.layout;
        *[
            &mut layout.descriptors,
            &mut layout.available,
            &mut layout.used,
        ][area] = Gpa(!0xf);
        let mut queue = Queue::new(layout, RingFeatures::default()).unwrap();
        let result = queue
            .take(&memory, &mut chain)
            .and_then(|_| queue.give_back(&memory, &chain, 0));
        assert!(matches!(result, Err(QueueError::NotRam(_))), "area {area}");
    }
}

#[test]
fn bad_layouts_are_refused() {
    let good = Driver::new(memory(), SIZE, BASE).layout;
    let check = |layout| Queue::new(layout, RingFeatures::default()).is_ok();
    assert!(check(good));
    assert!(!check(QueueLayout { size: 0, ..good }));
    assert!(!check(QueueLayout { size: 6, ..good }));
    assert!(!check(QueueLayout {
        descriptors: Gpa(8),
        ..good
    }));
    assert!(!check(QueueLayout {
        available: Gpa(1),
        ..good
    }));
    assert!(!check(QueueLayout {
        used: Gpa(2),
        ..good
    }));
}

#[test]
fn interrupts_as_the_driver_wishes() {
    let (mut driver, mut queue, mut chain) = plain();
    let memory = driver.memory.clone();
    let mut turn = |queue: &mut Queue, flags| {
        memory.write_u16(Gpa(BASE + 0x2000), flags).unwrap();
        driver.request(&[(DATA, 1, true)]);
        queue.take(&memory, &mut chain).unwrap();
        queue.give_back(&memory, &chain, 0).unwrap();
        queue.wants_interrupt(&memory).unwrap()
    };
    assert!(turn(&mut queue, 0));
    assert!(!turn(&mut queue, NO_INTERRUPT));
    assert_eq!(queue.wants_interrupt(&memory), Ok(false), "nothing new");
}

#[test]
fn interrupts_and_notifications_by_event_index() {
    let (mut driver, mut queue, mut chain) = setup(RingFeatures {
        indirect: false,
        event_index: true,
    });
    let memory = driver.memory.clone();
    let used_event = Gpa(BASE + 0x2000 + 4 + 2 * u64::from(SIZE));
    let available_event = Gpa(BASE + 0x3000 + 4 + 8 * u64::from(SIZE));
    let mut interrupts = Vec::new();
    // The driver wants to hear of the fourth, and then of the seventh: given back two at a time.
    memory.write_u16(used_event, 3).unwrap();
    for round in 0..4 {
        for _ in 0..2 {
            driver.request(&[(DATA, 1, true)]);
        }
        assert_eq!(
            queue.await_notification(&memory),
            Ok(true),
            "offered meanwhile"
        );
        for _ in 0..2 {
            queue.take(&memory, &mut chain).unwrap();
            queue.give_back(&memory, &chain, 0).unwrap();
        }
        if queue.wants_interrupt(&memory).unwrap() {
            interrupts.push(round);
            memory.write_u16(used_event, 6).unwrap();
        }
        assert_eq!(queue.await_notification(&memory), Ok(false));
        assert_eq!(memory.read_u16(available_event), Ok(2 * (round + 1)));
    }
    assert_eq!(interrupts, [1, 3]);
}

proptest! {
    /// Random bytes as rings and table: every chain that comes out is within bounds, and taking ends.
    #[test]
    fn garbage_is_harmless(
        bytes in proptest::collection::vec(any::<u8>(), 0x200),
        small in proptest::collection::vec((0u16..10, 0u16..8), SIZE as usize),
        features in (any::<bool>(), any::<bool>()),
    ) {
        let (driver, mut queue, mut chain) = setup(RingFeatures { indirect: features.0, event_index: features.1 });
        let memory = &driver.memory;
        memory.write(Gpa(BASE), &bytes).unwrap();
        memory.write(Gpa(BASE + 0x2000), &bytes[0x80..]).unwrap();
        // Mostly plausible links, else nearly all chains end at once.
        for (index, (next, flags)) in small.into_iter().enumerate() {
            let bytes = u32::from(bytes[index]) * 16 % 0x90;
            driver.set(index as u16, (BASE + 0x40, bytes, flags, next));
        }
        driver.set_index(u16::from(bytes[0] % 10));
        for _ in 0..=SIZE {
            match queue.take(memory, &mut chain) {
                Ok(true) => {
                    prop_assert!(chain.buffers.len() <= usize::from(SIZE));
                    prop_assert!(chain.readable() + chain.writable() <= MAX_CHAIN_BYTES);
                    let mut to = [0; 64];
                    let _ = chain.read(&mut chain.reader(), memory, &mut to);
                    let _ = chain.write(&mut chain.writer(), memory, &to);
                    let _ = queue.give_back(memory, &chain, 1);
                    let _ = queue.wants_interrupt(memory);
                }
                Ok(false) | Err(_) => return Ok(()),
            }
        }
        prop_assert!(false, "more chains than entries");
    }
}
