//! The host's CMOS clock, read once at boot: what time it is.
//!
//! Registers as in the MC146818A data sheet. The clock is read twice around an update so
//! that no half-changed time is taken, with a bounded wait.

use x86_64::instructions::port::Port;

/// Tries before a clock that never settles is given up.
const TRIES: usize = 1_000_000;
/// Register A, update in progress.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register B: binary, 24-hour.
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Bit of the hours register in 12-hour mode.
const AFTERNOON: u8 = 1 << 7;

/// The time registers as they stand in the chip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Registers {
    second: u8,
    minute: u8,
    hour: u8,
    day: u8,
    month: u8,
    year: u8,
    status_b: u8,
}

impl Registers {
    /// Seconds since 1970-01-01, the clock taken as UTC in the years 2000 to 2099; `None`: not a date.
    fn epoch(self) -> Option<u64> {
        let decode = |value: u8| {
            if self.status_b & BINARY != 0 {
                Some(u64::from(value))
            } else {
                let (high, low) = (value >> 4, value & 0xf);
                (high <= 9 && low <= 9).then(|| u64::from(high * 10 + low))
            }
        };
        let mut hour = decode(
            self.hour
                & if self.status_b & HOURS_24 != 0 {
                    0xff
                } else {
                    !AFTERNOON
                },
        )?;
        if self.status_b & HOURS_24 == 0 {
            hour %= 12;
            if self.hour & AFTERNOON != 0 {
                hour += 12;
            }
        }
        let (second, minute) = (decode(self.second)?, decode(self.minute)?);
        let (day, month, year) = (decode(self.day)?, decode(self.month)?, decode(self.year)?);
        if !(1..=12).contains(&month)
            || !(1..=31).contains(&day)
            || hour > 23
            || minute > 59
            || second > 60
            || year > 99
        {
            return None;
        }
        // Days since 1970-01-01 of a proleptic Gregorian date, with years that begin in March.
        let (y, m) = if month > 2 {
            (2000 + year, month - 3)
        } else {
            (1999 + year, month + 9)
        };
        let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
        Some(((days * 24 + hour) * 60 + minute) * 60 + second)
    }
}

fn register(number: u8) -> u8 {
    // SAFETY: the CMOS index and data ports; reading time registers changes nothing, and the
    // kernel reads the clock only at boot, on one processor. Bit 7 of the index keeps NMIs on.
    unsafe {
        Port::<u8>::new(0x70).write(number);
        Port::<u8>::new(0x71).read()
    }
}

fn snapshot() -> Registers {
    Registers {
        second: register(0),
        minute: register(2),
        hour: register(4),
        day: register(7),
        month: register(8),
        year: register(9),
        status_b: register(0xb),
    }
}

/// Seconds since 1970-01-01 by the CMOS clock; `None` where there is no clock that shows a date.
pub fn read_epoch() -> Option<u64> {
    for _ in 0..TRIES {
        if register(0xa) & UPDATE_IN_PROGRESS != 0 {
            continue;
        }
        let first = snapshot();
        if register(0xa) & UPDATE_IN_PROGRESS == 0 && first == snapshot() {
            return first.epoch();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const BCD: Registers = Registers {
        second: 0x56,
        minute: 0x34,
        hour: 0x12,
        day: 0x29,
        month: 0x02,
        year: 0x24,
        status_b: HOURS_24,
    };

    #[test]
    fn decodes_every_format() {
        let expected = Some(1_709_210_096); // 2024-02-29 12:34:56 UTC
        assert_eq!(BCD.epoch(), expected);
        let binary = Registers {
            second: 56,
            minute: 34,
            hour: 12,
            day: 29,
            month: 2,
            year: 24,
            status_b: HOURS_24 | BINARY,
        };
        assert_eq!(binary.epoch(), expected);
        assert_eq!(
            Registers {
                hour: 0x12 | AFTERNOON,
                status_b: 0,
                ..BCD
            }
            .epoch(),
            expected
        );
        let midnight = Registers {
            hour: 0x12,
            status_b: 0,
            ..BCD
        };
        assert_eq!(midnight.epoch(), expected.map(|e| e - 12 * 3600));
    }

    #[test]
    fn refuses_what_is_no_date() {
        assert_eq!(Registers { month: 0x13, ..BCD }.epoch(), None);
        assert_eq!(
            Registers {
                second: 0xff,
                ..BCD
            }
            .epoch(),
            None
        );
    }
}
