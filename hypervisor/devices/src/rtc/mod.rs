//! The MC146818 real-time clock and its CMOS memory, ports 0x70 and 0x71.
//!
//! After Motorola's MC146818A data sheet, with the PC/AT's memory map around it. The time
//! is computed: an offset to the VM clock, both in counts of the chip's 32.768 kHz crystal.
//! While the guest holds the clock (SET, or the divider in reset) the time registers are
//! plain memory; letting go computes a new offset. Flags are brought up to date on each
//! access and on `poll`; a flag that is already set makes no further deadline, so a guest
//! that does not read register C gets no interrupt storm.

use alloc::sync::Arc;

use bitfield_struct::bitfield;
use bitflags::bitflags;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, Overlap, PortBus, PortDevice, byte_only};
use crate::line::Line;
use crate::time::{Clock, Rate, earliest};

/// CMOS index of the century byte, as in the FADT.
pub const CENTURY_INDEX: u8 = 0x32;

/// The crystal, in Hz; a second is this many counts.
const CRYSTAL_HZ: u64 = 32_768;
const CRYSTAL_SHIFT: u32 = 15;
/// Counts before the change of the second in which UIP is set: 244 us.
const UPDATE_COUNTS: u64 = 8;
const CMOS_BYTES: usize = 128;
const SECONDS_PER_DAY: u64 = 86_400;

/// Indices of the clock's registers; those between and beyond are memory.
mod index {
    pub(super) const SECONDS: u8 = 0;
    pub(super) const SECONDS_ALARM: u8 = 1;
    pub(super) const MINUTES: u8 = 2;
    pub(super) const MINUTES_ALARM: u8 = 3;
    pub(super) const HOURS: u8 = 4;
    pub(super) const HOURS_ALARM: u8 = 5;
    pub(super) const WEEKDAY: u8 = 6;
    pub(super) const DAY: u8 = 7;
    pub(super) const MONTH: u8 = 8;
    pub(super) const YEAR: u8 = 9;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const EQUIPMENT: u8 = 0x14;
    pub(super) const BASE_MEMORY: u8 = 0x15;
    pub(super) const EXTENDED_MEMORY: u8 = 0x17;
    pub(super) const EXTENDED_MEMORY_ACTUAL: u8 = 0x30;
    pub(super) const MEMORY_ABOVE_16M: u8 = 0x34;
    pub(super) const MEMORY_ABOVE_4G: u8 = 0x5b;
    pub(super) const EXTRA_PROCESSORS: u8 = 0x5f;
}

/// The bytes that tell the time of day.
const TIME: [u8; 8] = [
    index::SECONDS,
    index::MINUTES,
    index::HOURS,
    index::WEEKDAY,
    index::DAY,
    index::MONTH,
    index::YEAR,
    CENTURY_INDEX,
];

/// Register A.
#[bitfield(u8)]
struct RegisterA {
    #[bits(4)]
    rate: u8,
    #[bits(3)]
    divider: u8,
    update_in_progress: bool,
}

impl RegisterA {
    /// Divider values 6 and 7 hold the clock in reset.
    fn divider_reset(self) -> bool {
        self.divider() >= 6
    }

    /// Counts between two periodic events (data sheet, table 5).
    fn period(self) -> Option<u64> {
        match self.rate() {
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }
}

/// Register B.
#[bitfield(u8)]
struct RegisterB {
    daylight_saving: bool,
    hours_24: bool,
    binary: bool,
    square_wave: bool,
    update_interrupt: bool,
    alarm_interrupt: bool,
    periodic_interrupt: bool,
    set: bool,
}

bitflags! {
    /// Register C.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Flags: u8 {
        const UPDATE = 1 << 4;
        const ALARM = 1 << 5;
        const PERIODIC = 1 << 6;
        const REQUEST = 1 << 7;
    }
}

/// Register D: the battery is good.
const VALID_RAM_AND_TIME: u8 = 0x80;

/// A point in time as the registers tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    /// 1 is Sunday.
    weekday: u64,
}

impl Calendar {
    /// The UTC calendar of `seconds` since 1970; proleptic Gregorian, in 400-year eras from March.
    fn from_seconds(seconds: u64) -> Self {
        let (days, rest) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        Calendar {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
            weekday: (days + 4) % 7 + 1,
        }
    }

    /// Seconds since 1970. Fields out of range are brought into it.
    fn to_seconds(self) -> u64 {
        let month = self.month.clamp(1, 12);
        let day = self.day.clamp(1, 31);
        let year = self.year.clamp(1970, 9999) - u64::from(month <= 2);
        let month_from_march = (month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
        let year_of_era = year % 400;
        let day_of_era = 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = (year / 400 * 146_097 + day_of_era).saturating_sub(719_468);
        days * SECONDS_PER_DAY
            + self.hour.min(23) * 3600
            + self.minute.min(59) * 60
            + self.second.min(59)
    }
}

/// What the CMOS memory says of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RtcConfig {
    /// Nanoseconds since 1970 (UTC) at tick 0 of the VM's clock.
    pub epoch_ns: u64,
    /// Bytes of memory below 4 GiB, from address 0.
    pub memory_below_4g: u64,
    /// Bytes of memory from 4 GiB up.
    pub memory_above_4g: u64,
    /// Processors.
    pub vcpus: u32,
}

struct State {
    selected: u8,
    cmos: [u8; CMOS_BYTES],
    a: RegisterA,
    b: RegisterB,
    flags: Flags,
    /// Crystal counts since 1970 at tick 0.
    offset: u64,
    /// Crystal counts since 1970 up to which the flags are right.
    synced: u64,
}

/// The clock and its memory.
pub struct Rtc {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    rate: Rate,
    irq: Line,
}

impl Rtc {
    /// A running clock in BCD and 24-hour mode, as firmware leaves it. `irq` is ISA IRQ 8.
    pub fn new(config: &RtcConfig, clock: Arc<dyn Clock>, irq: Line) -> Arc<Self> {
        let offset = crate::time::scale(config.epoch_ns, CRYSTAL_HZ, 1_000_000_000);
        let mut cmos = [0; CMOS_BYTES];
        let mut put = |at: u8, bytes: &[u8]| {
            let at = usize::from(at);
            cmos[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // Coprocessor present, no floppy drive, no display adapter.
        put(index::EQUIPMENT, &[0x02]);
        let units = |bytes: u64, unit: u64, max: u64| (bytes / unit).min(max);
        let below = config.memory_below_4g;
        let base = units(below, 1 << 10, 640) as u16;
        put(index::BASE_MEMORY, &base.to_le_bytes());
        let extended = units(below.saturating_sub(1 << 20), 1 << 10, 0xffff) as u16;
        put(index::EXTENDED_MEMORY, &extended.to_le_bytes());
        put(index::EXTENDED_MEMORY_ACTUAL, &extended.to_le_bytes());
        let above_16m = units(below.saturating_sub(16 << 20), 64 << 10, 0xffff) as u16;
        put(index::MEMORY_ABOVE_16M, &above_16m.to_le_bytes());
        let above_4g = units(config.memory_above_4g, 64 << 10, 0xff_ffff) as u32;
        put(index::MEMORY_ABOVE_4G, &above_4g.to_le_bytes()[..3]);
        let extra = config.vcpus.saturating_sub(1).min(255) as u8;
        put(index::EXTRA_PROCESSORS, &[extra]);

        let rate = Rate::new(clock.hz(), CRYSTAL_HZ);
        let synced = offset.saturating_add(rate.count_at(clock.now()));
        Arc::new(Rtc {
            state: Mutex::new(State {
                selected: 0,
                cmos,
                // 32.768 kHz time base, 1024 Hz periodic rate.
                a: RegisterA::new().with_rate(6).with_divider(2),
                b: RegisterB::new().with_hours_24(true),
                flags: Flags::empty(),
                offset,
                synced,
            }),
            clock,
            rate,
            irq,
        })
    }

    /// Puts the clock at its ports of a PC: 0x70 and 0x71.
    pub fn attach(self: &Arc<Self>, ports: &mut PortBus) -> Result<(), Overlap> {
        ports.insert("rtc", 0x70, 2, self.clone())
    }

    /// The VM's clock has stood still for `ticks`; the time of day has not. An alarm that was missed comes
    /// with the next [`Rtc::poll`].
    pub fn skip(&self, ticks: u64) {
        let mut state = self.state.lock();
        state.offset = state.offset.saturating_add(self.rate.count_at(ticks));
    }

    /// Whether the alarm has come since register C was last read, with its interrupt enabled.
    pub fn has_alarm(&self) -> bool {
        let state = self.state.lock();
        state.b.alarm_interrupt() && state.flags.contains(Flags::ALARM)
    }

    /// The byte of CMOS memory that tells firmware how to start again.
    pub fn shutdown_code(&self) -> u8 {
        const SHUTDOWN: usize = 0x0f;
        self.state.lock().cmos[SHUTDOWN]
    }

    /// The tick of the next event whose interrupt is enabled and not pending yet.
    pub fn deadline(&self) -> Option<u64> {
        let state = self.state.lock();
        let to_tick = |counts: u64| self.rate.tick_of(counts.saturating_sub(state.offset));
        let mut next = None;
        if state.b.periodic_interrupt()
            && !state.flags.contains(Flags::PERIODIC)
            && let Some(period) = state.a.period()
        {
            next = Some((state.synced / period + 1).saturating_mul(period));
        }
        if !state.held() {
            let second = state.synced >> CRYSTAL_SHIFT;
            if state.b.update_interrupt() && !state.flags.contains(Flags::UPDATE) {
                next = earliest(next, Some((second + 1) << CRYSTAL_SHIFT));
            }
            if state.b.alarm_interrupt() && !state.flags.contains(Flags::ALARM) {
                let alarm = state.next_alarm(second);
                next = earliest(next, alarm.map(|s| s << CRYSTAL_SHIFT));
            }
        }
        next.map(to_tick)
    }

    /// Brings the flags to tick `now` and drives the interrupt.
    pub fn poll(&self, now: u64) {
        let mut state = self.state.lock();
        self.sync(&mut state, now);
    }

    fn sync(&self, state: &mut State, now: u64) {
        let counts = self.rate.count_at(now).saturating_add(state.offset);
        if counts > state.synced {
            let before = core::mem::replace(&mut state.synced, counts);
            if let Some(period) = state.a.period()
                && counts / period != before / period
            {
                state.flags |= Flags::PERIODIC;
            }
            let (second, second_before) = (counts >> CRYSTAL_SHIFT, before >> CRYSTAL_SHIFT);
            if second != second_before && !state.held() {
                state.flags |= Flags::UPDATE;
                if state.next_alarm(second_before).is_some_and(|s| s <= second) {
                    state.flags |= Flags::ALARM;
                }
            }
        }
        self.update_irq(state);
    }

    fn update_irq(&self, state: &mut State) {
        let mut enabled = Flags::empty();
        enabled.set(Flags::PERIODIC, state.b.periodic_interrupt());
        enabled.set(Flags::ALARM, state.b.alarm_interrupt());
        enabled.set(Flags::UPDATE, state.b.update_interrupt());
        let request = state.flags.intersects(enabled);
        state.flags.set(Flags::REQUEST, request);
        self.irq.set(request);
    }

    fn read_register(&self, state: &mut State, at: u8) -> u8 {
        match at {
            _ if TIME.contains(&at) && !state.held() => {
                let calendar = state.calendar();
                state.encoded(at, &calendar)
            }
            index::A => {
                let phase = state.synced % CRYSTAL_HZ;
                let updating = !state.held() && phase >= CRYSTAL_HZ - UPDATE_COUNTS;
                state.a.with_update_in_progress(updating).into_bits()
            }
            index::B => state.b.into_bits(),
            index::C => {
                let flags = core::mem::replace(&mut state.flags, Flags::empty());
                self.update_irq(state);
                flags.bits()
            }
            index::D => VALID_RAM_AND_TIME,
            _ => state.cmos.get(usize::from(at)).copied().unwrap_or(0xff),
        }
    }

    fn write_register(&self, state: &mut State, at: u8, value: u8) {
        match at {
            _ if TIME.contains(&at) && !state.held() => {
                // Set on the fly: the other fields and the fraction of the second stay.
                state.store_time();
                state.cmos[usize::from(at)] = value;
                let phase = state.synced % CRYSTAL_HZ;
                state.load_time(phase);
            }
            index::A => {
                let value = RegisterA::from_bits(value).with_update_in_progress(false);
                let (was, from_reset) = (state.held(), state.a.divider_reset());
                if !was && value.divider_reset() {
                    state.store_time();
                }
                state.a = value;
                if was && !state.held() {
                    state.release(from_reset);
                }
            }
            index::B => {
                let value = RegisterB::from_bits(value);
                let was = state.held();
                if !was && value.set() {
                    state.store_time();
                }
                state.b = value;
                if was && !state.held() {
                    state.release(false);
                }
                if value.set() {
                    // SET clears the update interrupt's enable (data sheet, register B).
                    state.b.set_update_interrupt(false);
                }
                self.update_irq(state);
            }
            index::C | index::D => {}
            _ => {
                if let Some(byte) = state.cmos.get_mut(usize::from(at)) {
                    *byte = value;
                }
            }
        }
    }
}

impl State {
    /// The guest holds the clock: the time registers are memory.
    fn held(&self) -> bool {
        self.b.set() || self.a.divider_reset()
    }

    fn calendar(&self) -> Calendar {
        Calendar::from_seconds(self.synced >> CRYSTAL_SHIFT)
    }

    fn encode(&self, value: u64) -> u8 {
        let value = (value % 100) as u8;
        if self.b.binary() {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, byte: u8) -> u64 {
        if self.b.binary() {
            u64::from(byte)
        } else {
            u64::from(byte >> 4) * 10 + u64::from(byte & 0xf)
        }
    }

    fn encode_hour(&self, hour: u64) -> u8 {
        if self.b.hours_24() {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, byte: u8) -> u64 {
        if self.b.hours_24() {
            return self.decode(byte);
        }
        let hour = self.decode(byte & 0x7f) % 12;
        if byte & 0x80 != 0 { hour + 12 } else { hour }
    }

    fn encoded(&self, at: u8, calendar: &Calendar) -> u8 {
        match at {
            index::SECONDS => self.encode(calendar.second),
            index::MINUTES => self.encode(calendar.minute),
            index::HOURS => self.encode_hour(calendar.hour),
            index::WEEKDAY => self.encode(calendar.weekday),
            index::DAY => self.encode(calendar.day),
            index::MONTH => self.encode(calendar.month),
            index::YEAR => self.encode(calendar.year),
            _ => self.encode(calendar.year / 100),
        }
    }

    /// The running time into the registers.
    fn store_time(&mut self) {
        let calendar = self.calendar();
        for at in TIME {
            self.cmos[usize::from(at)] = self.encoded(at, &calendar);
        }
    }

    /// The registers into the running time, `phase` counts into the second.
    fn load_time(&mut self, phase: u64) {
        let field = |at: u8| self.cmos[usize::from(at)];
        let two_digits = self.decode(field(index::YEAR)) % 100;
        let calendar = Calendar {
            year: self.decode(field(CENTURY_INDEX)) * 100 + two_digits,
            month: self.decode(field(index::MONTH)),
            day: self.decode(field(index::DAY)),
            hour: self.decode_hour(field(index::HOURS)),
            minute: self.decode(field(index::MINUTES)),
            second: self.decode(field(index::SECONDS)),
            weekday: 0,
        };
        let counts = (calendar.to_seconds() << CRYSTAL_SHIFT) + phase;
        // A time so early that tick 0 would be before 1970 becomes the earliest possible.
        let elapsed = self.synced.wrapping_sub(self.offset);
        self.offset = counts.saturating_sub(elapsed);
        self.synced = self.offset.saturating_add(elapsed);
    }

    /// The guest lets go of the clock.
    fn release(&mut self, from_divider_reset: bool) {
        // Out of divider reset the first update comes half a second later (data sheet, register A).
        let phase = if from_divider_reset {
            CRYSTAL_HZ / 2
        } else {
            self.synced % CRYSTAL_HZ
        };
        self.load_time(phase);
    }

    /// The first second after `second` (since 1970) that the alarm matches, within a day.
    fn next_alarm(&self, second: u64) -> Option<u64> {
        /// 0xc0 to 0xff: any value.
        fn any(byte: u8) -> bool {
            byte >= 0xc0
        }
        let field = |at: u8| self.cmos[usize::from(at)];
        let want = |at: u8| (!any(field(at))).then(|| self.decode(field(at)));
        let want_second = want(index::SECONDS_ALARM);
        let want_minute = want(index::MINUTES_ALARM);
        let want_hour =
            (!any(field(index::HOURS_ALARM))).then(|| self.decode_hour(field(index::HOURS_ALARM)));
        let out_of_range = |want: Option<u64>, limit| want.is_some_and(|w| w >= limit);
        if out_of_range(want_second, 60)
            || out_of_range(want_minute, 60)
            || out_of_range(want_hour, 24)
        {
            return None;
        }
        let start = second + 1;
        let day = start / SECONDS_PER_DAY * SECONDS_PER_DAY;
        let at = start % SECONDS_PER_DAY;
        let (hour, minute, sec) = (at / 3600, at / 60 % 60, at % 60);
        let first = |want: Option<u64>| want.unwrap_or(0);
        let fits = |want: Option<u64>, value: u64| want.is_none_or(|w| w == value);
        // The first value from `from` on that fits, if the unit has one left.
        let next = |want: Option<u64>, from: u64, limit: u64| match want {
            Some(w) => (w >= from).then_some(w),
            None => (from < limit).then_some(from),
        };
        let time = |h: u64, m: u64, s: u64| day + h * 3600 + m * 60 + s;
        if fits(want_hour, hour) {
            if fits(want_minute, minute)
                && let Some(s) = next(want_second, sec, 60)
            {
                return Some(time(hour, minute, s));
            }
            if let Some(m) = next(want_minute, minute + 1, 60) {
                return Some(time(hour, m, first(want_second)));
            }
        }
        if let Some(h) = next(want_hour, hour + 1, 24) {
            return Some(time(h, first(want_minute), first(want_second)));
        }
        Some(time(first(want_hour), first(want_minute), first(want_second)) + SECONDS_PER_DAY)
    }
}

impl PortDevice for Rtc {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        match offset {
            // The index is write-only.
            0 => Ok(0xff),
            1 => {
                let mut state = self.state.lock();
                self.sync(&mut state, self.clock.now());
                let at = state.selected;
                Ok(u32::from(self.read_register(&mut state, at)))
            }
            _ => Err(IoError::InvalidRegister),
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let mut state = self.state.lock();
        match offset {
            // Bit 7 masks the NMI of parity errors, which this machine does not have.
            0 => state.selected = value as u8 & 0x7f,
            1 => {
                self.sync(&mut state, self.clock.now());
                let at = state.selected;
                self.write_register(&mut state, at, value as u8);
            }
            _ => return Err(IoError::InvalidRegister),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
