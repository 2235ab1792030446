//! Tests of the 8254 PIT.

use super::*;
use crate::testing::{FakeClock, RecordingSink};
use proptest::prelude::*;

/// One tick per PIT count, so that numbers read as in the data sheet.
const HZ: u64 = PIT_HZ;

struct Setup {
    pit: Arc<Pit>,
    ports: PortBus,
    clock: Arc<FakeClock>,
    irq: Arc<RecordingSink>,
}

fn setup() -> Setup {
    let clock = FakeClock::new(HZ);
    let irq = Arc::new(RecordingSink::default());
    let pit = Pit::new(clock.clone(), Line::new(irq.clone(), 0));
    let mut ports = PortBus::new();
    pit.attach(&mut ports).unwrap();
    Setup {
        pit,
        ports,
        clock,
        irq,
    }
}

impl Setup {
    fn out(&self, port: u16, value: u8) {
        self.ports.write(port, Width::Byte, u32::from(value));
    }

    fn inb(&self, port: u16) -> u8 {
        self.ports.read(port, Width::Byte) as u8
    }

    fn program(&self, channel: u8, mode: u8, count: u16) {
        self.out(0x43, channel << 6 | 0x30 | mode << 1);
        let [low, high] = count.to_le_bytes();
        self.out(0x40 + u16::from(channel), low);
        self.out(0x40 + u16::from(channel), high);
    }

    fn latched(&self, channel: u8) -> u16 {
        self.out(0x43, channel << 6);
        let port = 0x40 + u16::from(channel);
        u16::from_le_bytes([self.inb(port), self.inb(port)])
    }

    /// Runs to tick `end`, polling at each deadline; the number of interrupts.
    fn run(&self, end: u64) -> usize {
        let mut polls = 0;
        while let Some(due) = self.pit.deadline().filter(|&d| d <= end) {
            self.clock.set(due);
            self.pit.poll(due);
            polls += 1;
            assert!(polls < 1_000_000);
        }
        self.clock.set(end);
        self.irq.take().len() / 2
    }
}

/// Linux' pit_calibrate_tsc: channel 2, mode 0, output at port 0x61.
#[test]
fn calibration_through_channel_2() {
    let s = setup();
    s.out(0x61, (s.inb(0x61) & !2) | 1);
    s.program(2, 0, 59659); // 50 ms
    assert_eq!(s.inb(0x61) & 0x20, 0);
    s.clock.set(59658);
    assert_eq!(s.inb(0x61) & 0x20, 0);
    s.clock.set(59659);
    assert_eq!(s.inb(0x61) & 0x21, 0x21);
}

/// Linux' quick_pit_calibrate reads the running counter's two bytes again and again.
#[test]
fn quick_calibration_reads_live_bytes() {
    let s = setup();
    s.out(0x61, 1);
    s.program(2, 0, 0xffff);
    for elapsed in [0u64, 0x100, 0x1ff, 0x8000] {
        s.clock.set(elapsed);
        let value = u16::from_le_bytes([s.inb(0x42), s.inb(0x42)]);
        assert_eq!(u64::from(value), 0xffff - elapsed);
    }
}

#[test]
fn a_new_count_waits_for_the_end_of_the_period() {
    let s = setup();
    s.program(0, 2, 1000);
    s.clock.set(300);
    s.out(0x40, 100);
    s.out(0x40, 0);
    s.out(0x43, 0b1110_0010); // status of channel 0
    assert_ne!(s.inb(0x40) & 0x40, 0, "null count");
    assert_eq!(s.latched(0), 700, "the old count goes on");
    assert_eq!(s.pit.deadline(), Some(1000));
    assert_eq!(s.run(1000), 1);
    s.clock.set(1030);
    assert_eq!(s.latched(0), 70);
    s.out(0x43, 0b1110_0010);
    assert_eq!(s.inb(0x40) & 0x40, 0);
    // A square wave changes at the end of its half: high until 500, then low for 50 counts of the new 100.
    let s = setup();
    s.program(0, 3, 1000);
    s.clock.set(300);
    s.out(0x40, 100);
    s.out(0x40, 0);
    assert_eq!(s.pit.deadline(), Some(550));
    s.clock.set(499);
    s.out(0x43, 0b1110_0010);
    assert_eq!(s.inb(0x40) & 0xc0, 0xc0, "high still");
    s.clock.set(501);
    s.out(0x43, 0b1110_0010);
    assert_eq!(s.inb(0x40) & 0xc0, 0, "low, with the new count");
    // Interrupts come half a millisecond apart at most, whatever the period.
    s.pit.poll(550);
    assert_eq!(s.irq.take().len(), 2);
    // In the low half it waits for the end of the period, and the gate starts anew with it.
    let s = setup();
    s.out(0x61, 1);
    s.program(2, 3, 1000);
    s.clock.set(700);
    s.out(0x42, 100);
    s.out(0x42, 0);
    s.clock.set(999);
    assert_eq!(s.inb(0x61) & 0x20, 0, "low");
    s.clock.set(1049);
    assert_eq!(s.inb(0x61) & 0x20, 0x20);
    s.clock.set(1051);
    assert_eq!(s.inb(0x61) & 0x20, 0);
    s.out(0x42, 60);
    s.out(0x42, 0);
    s.out(0x61, 0);
    s.out(0x61, 1);
    assert_eq!(s.latched(2), 60);
}

#[test]
fn rate_generator_interrupts_in_phase() {
    let s = setup();
    s.clock.set(17);
    s.program(0, 2, 4773);
    assert_eq!(s.pit.deadline(), Some(17 + 4773));
    assert_eq!(s.run(17 + 4773 * 10), 10);
    assert_eq!(s.latched(0), 4773);
    s.clock.set(17 + 4773 * 10 + 1);
    assert_eq!(s.latched(0), 4772);
    // A long absence: one interrupt, then in phase again.
    let late = 17 + 4773 * 1000 + 5;
    s.clock.set(late);
    s.pit.poll(late);
    assert_eq!(s.irq.take().len(), 2);
    assert_eq!(s.pit.deadline(), Some(17 + 4773 * 1001));
}

#[test]
fn one_shot_in_mode_0_fires_once() {
    let s = setup();
    s.program(0, 0, 1000);
    assert_eq!(s.run(1_000_000), 1);
    assert_eq!(s.pit.deadline(), None);
    s.program(0, 4, 1000);
    assert_eq!(s.pit.deadline(), Some(1_001_001));
    // Linux' shutdown: control word alone stops it.
    s.out(0x43, 0x30);
    assert_eq!(s.pit.deadline(), None);
}

#[test]
fn counts_go_on_below_zero_in_mode_0() {
    let s = setup();
    s.program(1, 0, 10);
    s.clock.set(10);
    assert_eq!(s.latched(1), 0);
    s.clock.set(11);
    assert_eq!(s.latched(1), 0xffff);
    s.program(1, 0, 0);
    assert_eq!(s.latched(1), 0, "0 stands for 65536");
    s.clock.set(12);
    assert_eq!(s.latched(1), 0xffff);
}

#[test]
fn square_wave() {
    let s = setup();
    s.out(0x61, 1);
    s.program(2, 3, 10);
    let wave: Vec<bool> = (0..20)
        .map(|t| {
            s.clock.set(t);
            s.inb(0x61) & 0x20 != 0
        })
        .collect();
    let period = [
        true, true, true, true, true, false, false, false, false, false,
    ];
    assert_eq!(wave, [period, period].concat());
    s.clock.set(22);
    assert_eq!(s.latched(2), 6);
    s.out(0x61, 0);
    assert_ne!(s.inb(0x61) & 0x20, 0, "the gate forces the output high");
}

#[test]
fn gate_pauses_mode_0_and_triggers_mode_1() {
    let s = setup();
    s.out(0x61, 1);
    s.program(2, 0, 100);
    s.clock.set(40);
    s.out(0x61, 0);
    s.clock.set(1000);
    assert_eq!(s.latched(2), 60);
    s.out(0x61, 1);
    s.clock.set(1059);
    assert_eq!(s.inb(0x61) & 0x20, 0);
    s.clock.set(1060);
    assert_eq!(s.inb(0x61) & 0x20, 0x20);
    s.out(0x61, 0);
    s.program(2, 1, 50);
    assert_eq!(s.inb(0x61) & 0x20, 0x20, "high until triggered");
    s.out(0x61, 1);
    assert_eq!(s.inb(0x61) & 0x20, 0);
    s.clock.set(1110);
    assert_eq!(s.inb(0x61) & 0x20, 0x20);
}

#[test]
fn latches_hold_until_read() {
    let s = setup();
    s.program(0, 2, 1000);
    s.clock.set(100);
    s.out(0x43, 0x00);
    s.clock.set(200);
    s.out(0x43, 0x00);
    assert_eq!(u16::from_le_bytes([s.inb(0x40), s.inb(0x40)]), 900);
    assert_eq!(u16::from_le_bytes([s.inb(0x40), s.inb(0x40)]), 800);
}

#[test]
fn read_back_gives_status_then_count() {
    let s = setup();
    s.out(0x43, 0x34);
    s.out(0x43, 0xe2);
    assert_eq!(
        s.inb(0x40),
        0xf4,
        "output high, null count, low/high, mode 2"
    );
    s.out(0x40, 100);
    s.out(0x40, 0);
    s.clock.set(30);
    s.out(0x43, 0xc2);
    assert_eq!(s.inb(0x40), 0xb4);
    assert_eq!(s.inb(0x40), 70);
    assert_eq!(s.inb(0x40), 0);
    assert_eq!(s.ports.read(0x43, Width::Byte), 0xff);
}

#[test]
fn bcd_counts() {
    let s = setup();
    s.out(0x43, 0x35);
    s.out(0x40, 0x34);
    s.out(0x40, 0x12);
    s.clock.set(35);
    assert_eq!(s.latched(0), 0x1199);
    assert_eq!(s.pit.deadline(), Some(1234));
}

#[test]
fn single_byte_access() {
    let s = setup();
    s.out(0x43, 0x14); // low byte only, mode 2
    s.out(0x40, 200);
    s.clock.set(50);
    assert_eq!(s.inb(0x40), 150);
    assert_eq!(s.inb(0x40), 150);
    s.out(0x43, 0x24); // high byte only
    s.out(0x40, 2);
    assert_eq!(s.inb(0x40), 2);
}

#[test]
fn refresh_toggles() {
    let s = setup();
    let mut last = s.inb(0x61) & 0x10;
    let mut toggles = 0;
    for t in 0..1800 {
        s.clock.set(t);
        let now = s.inb(0x61) & 0x10;
        toggles += u32::from(now != last);
        last = now;
    }
    assert_eq!(toggles, 99);
}

#[test]
fn a_tiny_period_does_not_flood() {
    let s = setup();
    s.program(0, 2, 1);
    let ticks = s.run(HZ / 1000);
    assert!((15..25).contains(&ticks), "{ticks} in 1 ms");
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        steps in proptest::collection::vec((0u8..3, any::<u8>(), any::<u8>(), any::<u64>()), 0..300),
    ) {
        let s = setup();
        let mut now = 0u64;
        for (kind, a, b, ticks) in steps {
            let port = [0x40, 0x41, 0x42, 0x43, 0x61][usize::from(a) % 5];
            match kind {
                0 => s.out(port, b),
                1 => { s.inb(port); }
                _ => {
                    now = now.saturating_add(ticks >> (b % 64));
                    s.clock.set(now);
                    s.pit.poll(now);
                    let due = s.pit.deadline();
                    prop_assert!(due.is_none_or(|d| d > now || now == u64::MAX));
                }
            }
        }
    }
}
