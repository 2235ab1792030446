//! Tests of the MC146818 RTC.

use super::*;
use crate::testing::{FakeClock, RecordingSink};
use proptest::prelude::*;

const HZ: u64 = 1_000_000_000;
/// 2024-02-29 23:59:50 UTC, a Thursday.
const START: u64 = 1_709_251_190;

struct Setup {
    rtc: Arc<Rtc>,
    clock: Arc<FakeClock>,
    irq: Arc<RecordingSink>,
}

fn setup() -> Setup {
    let clock = FakeClock::new(HZ);
    let irq = Arc::new(RecordingSink::default());
    let config = RtcConfig {
        epoch_ns: START * HZ,
        memory_below_4g: 3 << 30,
        memory_above_4g: 5 << 30,
        vcpus: 4,
    };
    Setup {
        rtc: Rtc::new(&config, clock.clone(), Line::new(irq.clone(), 8)),
        clock,
        irq,
    }
}

impl Setup {
    fn get(&self, at: u8) -> u8 {
        self.rtc.write(0, Width::Byte, u32::from(at)).unwrap();
        self.rtc.read(1, Width::Byte).unwrap() as u8
    }

    fn set(&self, at: u8, value: u8) {
        self.rtc.write(0, Width::Byte, u32::from(at)).unwrap();
        self.rtc.write(1, Width::Byte, u32::from(value)).unwrap();
    }

    /// Century, year, month, day, hour, minute, second as stored.
    fn time(&self) -> [u8; 7] {
        [0x32, 9, 8, 7, 4, 2, 0].map(|at| self.get(at))
    }

    fn seconds(&self, seconds: u64) {
        self.clock.set(self.clock.now() + seconds * HZ);
    }
}

#[test]
fn calendar_agrees_with_known_dates() {
    for (seconds, y, m, d, weekday) in [
        (0, 1970, 1, 1, 5),
        (951_782_400, 2000, 2, 29, 3),
        (START, 2024, 2, 29, 5),
        (4_102_444_800, 2100, 1, 1, 6),
        (4_107_542_400, 2100, 3, 1, 2),
    ] {
        let c = Calendar::from_seconds(seconds);
        assert_eq!((c.year, c.month, c.day, c.weekday), (y, m, d, weekday));
    }
}

proptest! {
    #[test]
    fn calendar_round_trips(seconds in 0u64..250_000_000_000) {
        prop_assert_eq!(Calendar::from_seconds(seconds).to_seconds(), seconds);
    }
}

#[test]
fn time_runs_through_a_leap_day() {
    let s = setup();
    assert_eq!(s.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x50]);
    assert_eq!(s.get(6), 5);
    s.seconds(15);
    assert_eq!(s.time(), [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x05]);
    assert_eq!(s.get(0x0d), 0x80);
    assert_eq!(s.rtc.read(0, Width::Byte), Ok(0xff));
}

#[test]
fn formats() {
    let s = setup();
    s.set(0x0b, 0x06);
    assert_eq!(s.time(), [20, 24, 2, 29, 23, 59, 50]);
    s.set(0x0b, 0x00);
    assert_eq!(s.get(4), 0x91, "11 PM in BCD");
    s.set(0x0b, 0x04);
    assert_eq!(s.get(4), 0x8b);
    s.seconds(60);
    assert_eq!(s.get(4), 12, "midnight is 12 AM");
    s.seconds(12 * 3600);
    assert_eq!(s.get(4), 0x8c, "noon is 12 PM");
}

#[test]
fn update_in_progress_warns_before_the_change() {
    let s = setup();
    assert_eq!(s.get(0x0a), 0x26);
    s.clock.set(HZ - 300_000);
    assert_eq!(s.get(0x0a), 0x26);
    s.clock.set(HZ - 200_000);
    assert_eq!(s.get(0x0a), 0xa6);
    s.clock.set(HZ);
    assert_eq!(s.get(0x0a), 0x26);
    s.set(0x0b, 0x82);
    s.clock.set(2 * HZ - 100_000);
    assert_eq!(s.get(0x0a), 0x26, "not while the guest holds the clock");
}

/// Linux' mc146818_set_time: SET, divider reset, the fields, and back.
#[test]
fn setting_the_time_as_linux_does() {
    let s = setup();
    let control = s.get(0x0b);
    s.set(0x0b, control | 0x80);
    let select = s.get(0x0a);
    s.set(0x0a, select | 0x70);
    for (at, value) in [
        (9, 0x31),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x58),
    ] {
        s.set(at, value);
    }
    s.set(0x32, 0x20);
    s.seconds(100);
    assert_eq!(s.get(0), 0x58, "held");
    s.set(0x0b, control);
    s.set(0x0a, select);
    assert_eq!(s.time(), [0x20, 0x31, 0x12, 0x31, 0x23, 0x59, 0x58]);
    s.clock.set(s.clock.now() + HZ / 2 + 1_000_000);
    assert_eq!(s.get(0), 0x59, "the first second is a half");
    s.seconds(1);
    assert_eq!(s.time(), [0x20, 0x32, 0x01, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn setting_without_hold_and_nonsense_is_survived() {
    let s = setup();
    s.set(2, 0x30);
    assert_eq!(s.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x30, 0x50]);
    for at in [0, 2, 4, 7, 8, 9, 0x32] {
        s.set(at, 0xff);
    }
    let [_, _, month, day, hour, minute, second] = s.time();
    assert!((0x01..=0x12).contains(&month) && (0x01..=0x31).contains(&day));
    assert!(hour <= 0x23 && minute <= 0x59 && second <= 0x59);
    // Before the VM's start, and before 1970.
    s.seconds(1000);
    s.set(0x32, 0x19);
    s.set(9, 0x70);
    assert_eq!(s.get(9), 0x70);
}

#[test]
fn periodic_interrupt() {
    let s = setup();
    s.set(0x0b, 0x42); // 1024 Hz
    let start = s.rtc.deadline().unwrap();
    assert_eq!(start, 976_563);
    s.clock.set(start);
    s.rtc.poll(start);
    assert!(s.irq.is_high(8));
    assert_eq!(s.rtc.deadline(), None, "until register C is read");
    assert_eq!(s.get(0x0c), 0xc0);
    assert!(!s.irq.is_high(8));
    assert_eq!(s.get(0x0c), 0);
    assert_eq!(s.rtc.deadline(), Some(1_953_125));
    for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (15, 2)] {
        s.set(0x0a, 0x20 | rate);
        s.get(0x0c);
        let now = s.clock.now();
        let due = s.rtc.deadline().unwrap();
        assert!(due > now && due - now <= HZ / hz + 1, "{rate}");
    }
    s.set(0x0a, 0x20);
    assert_eq!(s.rtc.deadline(), None);
}

#[test]
fn update_ended_interrupt() {
    let s = setup();
    s.set(0x0b, 0x12);
    s.clock.set(HZ / 3);
    let due = s.rtc.deadline().unwrap();
    assert_eq!(due, HZ);
    s.clock.set(due);
    s.rtc.poll(due);
    // The periodic flag is set as well, though its interrupt is off.
    assert_eq!(s.get(0x0c), 0xd0);
    s.set(0x0b, 0x92);
    assert_eq!(s.get(0x0b), 0x82, "SET turns the enable off");
    assert_eq!(s.rtc.deadline(), None);
}

#[test]
fn alarm() {
    let s = setup();
    for (at, value) in [(5, 0x00), (3, 0x01), (1, 0x30)] {
        s.set(at, value);
    }
    s.set(0x0b, 0x22);
    // 23:59:50 to 00:01:30.
    assert_eq!(s.rtc.deadline(), Some(100 * HZ));
    s.clock.set(100 * HZ - 1);
    s.rtc.poll(100 * HZ - 1);
    assert_eq!(s.get(0x0c) & 0x20, 0);
    s.clock.set(100 * HZ);
    s.rtc.poll(100 * HZ);
    assert!(s.irq.is_high(8));
    assert_eq!(s.get(0x0c) & 0xa0, 0xa0);
    assert_eq!(s.rtc.deadline(), Some((100 + 86_400) * HZ));
    s.set(5, 0xff);
    assert_eq!(s.rtc.deadline(), Some((100 + 3600) * HZ));
    s.set(3, 0xc0);
    assert_eq!(s.rtc.deadline(), Some((100 + 60) * HZ));
    s.set(1, 0xff);
    assert_eq!(s.rtc.deadline(), Some(101 * HZ));
    s.set(1, 0x77);
    assert_eq!(s.rtc.deadline(), None, "no such second");
}

proptest! {
    #[test]
    fn next_alarm_agrees_with_counting(
        now in 0u64..86_400,
        hour in prop_oneof![0u8..24, Just(0xff)],
        minute in prop_oneof![0u8..60, Just(0xc0)],
        second in prop_oneof![0u8..60, Just(0xfe)],
    ) {
        let s = setup();
        s.set(0x0b, 0x06);
        for (at, value) in [(5, hour), (3, minute), (1, second)] {
            s.set(at, value);
        }
        let fits = |want: u8, value: u64| want >= 0xc0 || u64::from(want) == value;
        let want = (now + 1..=now + 86_400).find(|t| {
            fits(hour, t / 3600 % 24) && fits(minute, t / 60 % 60) && fits(second, t % 60)
        });
        prop_assert_eq!(s.rtc.state.lock().next_alarm(now), want);
    }

    #[test]
    fn random_accesses_never_panic(
        steps in proptest::collection::vec((0u8..3, any::<u8>(), any::<u8>(), any::<u64>()), 0..300),
    ) {
        let s = setup();
        let mut now = 0u64;
        for (kind, at, value, ticks) in steps {
            let at = if at & 0x80 != 0 { at & 0x0f } else { at };
            match kind {
                0 => { s.get(at); }
                1 => s.set(at, value),
                _ => {
                    now = now.saturating_add(ticks >> (value % 64));
                    s.clock.set(now);
                    s.rtc.poll(now);
                    let due = s.rtc.deadline();
                    prop_assert!(due.is_none_or(|d| d > now || now == u64::MAX));
                }
            }
        }
    }
}

#[test]
fn memory_sizes_and_nvram() {
    let s = setup();
    let word = |at: u8| u16::from_le_bytes([s.get(at), s.get(at + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x17), 0xffff);
    assert_eq!(word(0x30), 0xffff);
    assert_eq!(word(0x34), (((3u64 << 30) - (16 << 20)) >> 16) as u16);
    let above = u32::from_le_bytes([s.get(0x5b), s.get(0x5c), s.get(0x5d), 0]);
    assert_eq!(above, ((5u64 << 30) >> 16) as u32);
    assert_eq!(s.get(0x5f), 3);
    s.set(0x40, 0x5a);
    s.set(0xc0, 0xa5);
    assert_eq!(s.get(0x40), 0xa5, "bit 7 of the index is the NMI mask");
    s.set(0x0d, 0);
    assert_eq!(s.get(0x0d), 0x80);
}
