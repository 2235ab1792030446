//! Tests of the HPET.

use super::*;
use crate::lapic::Message;
use crate::testing::{FakeClock, RecordingSink};
use alloc::vec::Vec;
use proptest::prelude::*;

/// Ten ticks per count.
const HZ: u64 = 10 * HPET_HZ;

#[derive(Default)]
struct Messages(Mutex<Vec<u8>>);

impl MessageSink for Messages {
    fn deliver(&self, message: &Message) -> bool {
        self.0.lock().push(message.vector);
        true
    }
}

struct Setup {
    hpet: Arc<Hpet>,
    clock: Arc<FakeClock>,
    inputs: Arc<RecordingSink>,
    messages: Arc<Messages>,
    pit: Line,
}

fn setup() -> Setup {
    let clock = FakeClock::new(HZ);
    let inputs = Arc::new(RecordingSink::default());
    let messages = Arc::new(Messages::default());
    let gates = [0, 8].map(|input| LegacyGate::new(Line::new(inputs.clone(), input)));
    let pit = Line::new(gates[0].clone(), LegacyGate::DEVICE);
    let hpet = Hpet::new(clock.clone(), inputs.clone(), messages.clone(), gates);
    Setup {
        hpet,
        clock,
        inputs,
        messages,
        pit,
    }
}

impl Setup {
    fn read(&self, offset: u64) -> u64 {
        self.hpet.read(offset, Width::Qword).unwrap()
    }

    fn write(&self, offset: u64, value: u64) {
        self.hpet.write(offset, Width::Qword, value).unwrap();
    }

    /// Goes to a count and polls there.
    fn go(&self, count: u64) {
        self.clock.set(count * 10);
        self.hpet.poll(count * 10);
    }
}

#[test]
fn registers_after_reset() {
    let s = setup();
    assert_eq!(s.read(0), 0x0098_9680_8086_a201);
    assert_eq!(HPET_ID, 0x8086_a201);
    for offset in [0x10, 0x20, 0xf0, 0x110, 0x1e0] {
        assert_eq!(s.read(offset), 0, "{offset:#x}");
    }
    assert_eq!(s.read(0x108), u64::MAX);
    assert_eq!(s.read(0x140), 0x0000_00e0_0000_8030);
    assert_eq!(s.hpet.read(4, Width::Dword), Ok(0x0098_9680));
    assert_eq!(s.hpet.read(0, Width::Byte), Err(IoError::InvalidWidth));
    assert_eq!(s.hpet.read(4, Width::Qword), Err(IoError::Unaligned));
    assert_eq!(s.hpet.deadline(), None);
}

#[test]
fn the_counter_runs_only_while_enabled_and_is_set_only_while_halted() {
    let s = setup();
    s.go(1000);
    assert_eq!(s.read(0xf0), 0);
    s.write(0xf0, 0xffff_fff0);
    s.write(0x10, 1);
    s.go(1100);
    assert_eq!(s.read(0xf0), 0xffff_fff0 + 100);
    s.write(0xf0, 0);
    assert_eq!(s.read(0xf0), 0xffff_fff0 + 100);
    s.write(0x10, 0);
    s.go(5000);
    assert_eq!(s.read(0xf0), 0xffff_fff0 + 100);
    s.hpet.write(0xf4, Width::Dword, 7).unwrap();
    assert_eq!(s.read(0xf0), 7 << 32 | 0x54);
}

#[test]
fn one_shot_interrupts_once() {
    let s = setup();
    s.write(0x10, 1);
    // Edge to input 5.
    s.write(0x100, 5 << 9 | 1 << 2);
    s.write(0x108, 500);
    assert_eq!(s.hpet.deadline(), Some(5000));
    s.go(499);
    assert_eq!(s.inputs.take(), []);
    s.go(700);
    assert_eq!(s.inputs.take(), [(5, true), (5, false)]);
    assert_eq!(s.hpet.deadline(), None, "not for thousands of years");
    assert_eq!(s.read(0x108), 500);
    assert_eq!(s.read(0x20), 0, "an edge leaves no status");
    // With 32 bits it matches again after each turn.
    s.write(0x100, 5 << 9 | 1 << 8 | 1 << 2);
    let turn = 1 << 32;
    assert_eq!(s.hpet.deadline(), Some((turn + 500) * 10));
    s.go(3 * turn);
    assert_eq!(s.inputs.take(), [(5, true), (5, false)]);
    assert_eq!(s.hpet.deadline(), Some((3 * turn + 500) * 10));
}

#[test]
fn a_value_that_has_passed_is_not_matched() {
    let s = setup();
    s.write(0x10, 1);
    s.go(1000);
    s.write(0x120, 6 << 9 | 1 << 2);
    s.write(0x128, 999);
    assert_eq!(s.hpet.deadline(), None);
    s.write(0x128, 1000);
    assert_eq!(s.hpet.deadline(), Some(10_000));
}

#[test]
fn periodic_keeps_its_phase_and_coalesces() {
    let s = setup();
    // As Linux sets it: the first match, then the period.
    s.write(0x100, 5 << 9 | 1 << 6 | 1 << 3 | 1 << 2);
    s.write(0x108, 20_000);
    s.write(0x108, 10_000);
    s.write(0x10, 1);
    assert_eq!(s.hpet.deadline(), Some(200_000));
    s.go(20_000);
    assert_eq!(s.inputs.take().len(), 2);
    assert_eq!(s.read(0x108), 30_000);
    s.go(52_500);
    assert_eq!(s.inputs.take().len(), 2, "three matches, one interrupt");
    assert_eq!(s.read(0x108), 60_000);
    assert_eq!(s.hpet.deadline(), Some(600_000));
    // Once armed, a new period goes on from the match that is due.
    s.write(0x108, 1000);
    assert_eq!(s.read(0x108), 60_000);
    s.go(60_000);
    assert_eq!(s.read(0x108), 61_000);
}

#[test]
fn a_tiny_period_does_not_flood() {
    let s = setup();
    s.write(0x10, 1);
    s.write(0x100, 5 << 9 | 1 << 6 | 1 << 3 | 1 << 2);
    s.write(0x108, 1);
    let mut count = 0;
    let end = HZ / 1000;
    while let Some(deadline) = s.hpet.deadline().filter(|&d| d < end) {
        s.clock.set(deadline);
        s.hpet.poll(deadline);
        count += s.inputs.take().len() / 2;
    }
    // A millisecond holds 20 times 50 us.
    assert!((19..=21).contains(&count), "{count}");
}

#[test]
fn a_level_stays_until_its_status_is_cleared() {
    let s = setup();
    s.write(0x10, 1);
    s.write(0x140, 7 << 9 | 1 << 2 | 1 << 1);
    s.write(0x148, 100);
    s.go(100);
    assert_eq!(s.inputs.take(), [(7, true)]);
    assert_eq!(s.read(0x20), 1 << 2);
    s.write(0x20, 1 << 1);
    assert_eq!(s.inputs.take(), []);
    s.write(0x20, 1 << 2);
    assert_eq!(s.inputs.take(), [(7, false)]);
    assert_eq!(s.read(0x20), 0);
    // Disabled, it sets its status but drives nothing.
    s.write(0x140, 7 << 9 | 1 << 1);
    s.write(0x148, 200);
    s.go(300);
    assert_eq!(s.read(0x20), 1 << 2);
    assert_eq!(s.inputs.take(), []);
    s.write(0x140, 7 << 9 | 1 << 2 | 1 << 1);
    assert_eq!(s.inputs.take(), [(7, true)]);
    // Another route takes the level along.
    s.write(0x140, 6 << 9 | 1 << 2 | 1 << 1);
    assert_eq!(s.inputs.take(), [(7, false), (6, true)]);
}

#[test]
fn messages_and_absent_routes() {
    let s = setup();
    s.write(0x10, 1);
    s.write(0x110, 0xfee0_0000_0000_0055);
    s.write(0x100, 1 << 14 | 1 << 2);
    s.write(0x108, 10);
    s.go(10);
    assert_eq!(*s.messages.0.lock(), [0x55]);
    assert_eq!(s.inputs.take(), []);
    // Input 4 is not offered.
    s.write(0x100, 4 << 9 | 1 << 2);
    s.write(0x108, 20);
    s.go(30);
    assert_eq!(s.inputs.take(), []);
}

#[test]
fn legacy_replacement_cuts_off_the_pit() {
    let s = setup();
    s.pit.pulse();
    assert_eq!(s.inputs.take(), [(0, true), (0, false)]);
    s.pit.raise();
    s.write(0x10, 3);
    assert_eq!(s.inputs.take(), [(0, true), (0, false)]);
    s.pit.pulse();
    assert_eq!(s.inputs.take(), []);
    for timer in [0, 1] {
        s.write(0x100 + 0x20 * timer, 1 << 2);
        s.write(0x108 + 0x20 * timer, 50);
    }
    s.go(50);
    assert_eq!(
        s.inputs.take(),
        [(0, true), (0, false), (8, true), (8, false)]
    );
    s.pit.raise();
    s.write(0x10, 1);
    assert_eq!(s.inputs.take(), [(0, true)], "the PIT's level is back");
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        steps in proptest::collection::vec((0u64..0x180, any::<u64>(), any::<u8>()), 0..200),
    ) {
        let s = setup();
        let mut now = 0u64;
        for (offset, value, kind) in steps {
            let width = [Width::Byte, Width::Word, Width::Dword, Width::Qword][usize::from(kind % 4)];
            match kind / 4 % 4 {
                0 => drop(s.hpet.read(offset, width)),
                1 => drop(s.hpet.write(offset, width, value)),
                2 => drop(s.hpet.write(offset & !7, Width::Qword, value)),
                _ => {
                    now = now.saturating_add(value >> (kind % 64));
                    s.clock.set(now);
                    s.hpet.poll(now);
                }
            }
            // One access or poll interrupts at most once per timer.
            prop_assert!(s.inputs.take().len() <= 4 * TIMERS);
        }
    }
}
