//! Clocks of a PC: PIT, ACPI PM timer, RTC, and the TSC measured against them.

use crate::cpu::{self, port};

/// Input clock of the PIT.
pub const PIT_HZ: u64 = 1_193_182;
/// Clock of the ACPI power-management timer.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const PIT_CHANNEL0: u16 = 0x40;
const PIT_CHANNEL2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Gate and output of PIT channel 2, and the speaker.
const SYSTEM_CONTROL: u16 = 0x61;
/// In it: the output of channel 2.
const CHANNEL2_OUTPUT: u8 = 1 << 5;

/// Starts PIT channel 0 as a rate generator (mode 2) with a period in PIT ticks.
pub fn pit_periodic(ticks: u16) {
    port::write8(PIT_COMMAND, 0x34);
    port::write8(PIT_CHANNEL0, ticks as u8);
    port::write8(PIT_CHANNEL0, (ticks >> 8) as u8);
}

/// Lets PIT channel 0 count down once (mode 0): its output, IRQ 0, rises at the end.
pub fn pit_one_shot(ticks: u16) {
    port::write8(PIT_COMMAND, 0x30);
    port::write8(PIT_CHANNEL0, ticks as u8);
    port::write8(PIT_CHANNEL0, (ticks >> 8) as u8);
}

/// Stops channel 0: mode 0 without a count.
pub fn pit_stop() {
    port::write8(PIT_COMMAND, 0x30);
}

/// The latched count of channel 0.
pub fn pit_count() -> u16 {
    port::write8(PIT_COMMAND, 0x00);
    u16::from(port::read8(PIT_CHANNEL0)) | u16::from(port::read8(PIT_CHANNEL0)) << 8
}

/// PIT channel 2, counting down from 65535 since this was made. It wraps after 55 ms.
pub struct PitStopwatch {
    /// The output, low since the mode was set, rises at the wrap and is seen. Looked at before the count begins:
    /// later it may have risen already.
    output_is_shown: bool,
}

impl PitStopwatch {
    /// Starts it: mode 0, gate on, speaker off.
    pub fn start() -> Self {
        let control = port::read8(SYSTEM_CONTROL);
        port::write8(SYSTEM_CONTROL, control & !2 | 1);
        port::write8(PIT_COMMAND, 0xB0);
        let output_is_shown = port::read8(SYSTEM_CONTROL) & CHANNEL2_OUTPUT == 0;
        port::write8(PIT_CHANNEL2, 0xFF);
        port::write8(PIT_CHANNEL2, 0xFF);
        Self { output_is_shown }
    }

    /// PIT ticks since the start, and the TSC when they were latched. Under a hypervisor each
    /// port access takes long: only the latch counts, not the two reads after it.
    pub fn read(&self) -> (u64, u64) {
        port::write8(PIT_COMMAND, 0x80);
        let tsc = cpu::tsc();
        let low = port::read8(PIT_CHANNEL2);
        let high = port::read8(PIT_CHANNEL2);
        let ticks = u16::MAX.wrapping_sub(u16::from_le_bytes([low, high]));
        (ticks.into(), tsc)
    }

    /// Whether more time has passed than it can tell: its output rose at the end of the count. Always false where the
    /// output is not shown.
    pub fn wrapped(&self) -> bool {
        self.output_is_shown && port::read8(SYSTEM_CONTROL) & CHANNEL2_OUTPUT != 0
    }
}

/// The ACPI power-management timer.
#[derive(Clone, Copy, Debug)]
pub struct PmTimer {
    pub port: u16,
    /// 32 bits wide, else 24.
    pub extended: bool,
}

impl PmTimer {
    /// The counter now.
    pub fn read(self) -> u32 {
        port::read32(self.port)
    }

    /// Ticks from one reading to another, at most one wrap apart.
    pub fn elapsed(self, from: u32, to: u32) -> u64 {
        let mask = if self.extended { u32::MAX } else { 0xFF_FFFF };
        u64::from(to.wrapping_sub(from) & mask)
    }
}

/// TSC ticks per second, measured over up to 20 ms of the PIT: the middle one of five windows.
///
/// A window that others on the same processor stretch is still right, up to the 55 ms after which the
/// PIT wraps around. One that is stretched more is measured again, half as long, so that it fits
/// between two interruptions at last. One interrupted in the middle of a reading is an outlier.
pub fn measure_tsc_hz() -> u64 {
    const LONGEST: u64 = PIT_HZ / 50;
    const SHORTEST: u64 = PIT_HZ / 1000;
    let mut window = LONGEST;
    let mut windows = [(); 5].map(|()| {
        loop {
            if let Some(hz) = measure_tsc_window(window) {
                break hz;
            }
            window = (window / 2).max(SHORTEST);
        }
    });
    windows.sort_unstable();
    windows[2]
}

/// TSC ticks per second over `window` PIT ticks; `None` if the PIT wrapped around.
fn measure_tsc_window(window: u64) -> Option<u64> {
    let watch = PitStopwatch::start();
    // The first reading warms up what the others use.
    watch.read();
    let (start_ticks, start_tsc) = watch.read();
    let mut last = start_ticks;
    loop {
        let (ticks, tsc) = watch.read();
        // Where the output is not shown, a wrap is seen by what it does to the count.
        if watch.wrapped() || ticks < last {
            return None;
        }
        last = ticks;
        let elapsed = ticks - start_ticks;
        if elapsed >= window {
            let hz = tsc.saturating_sub(start_tsc).saturating_mul(PIT_HZ) / elapsed;
            return Some(hz.max(1));
        }
    }
}

/// Reads a clock with the TSC before and after: value, middle of the two, their distance.
pub fn bracket(read: impl FnOnce() -> u64) -> (u64, u64, u64) {
    let before = cpu::tsc();
    let value = read();
    let after = cpu::tsc();
    let distance = after.saturating_sub(before);
    (value, before + distance / 2, distance)
}

/// A limit on waiting, in TSC ticks, and in turns for a TSC that stands still.
pub struct Limit {
    until: u64,
    turns: u32,
}

impl Limit {
    /// A limit of so many milliseconds from now.
    pub fn after_ms(tsc_hz: u64, milliseconds: u64) -> Self {
        Self {
            until: cpu::tsc() + tsc_hz / 1000 * milliseconds,
            turns: 200_000_000,
        }
    }

    /// Whether waiting may go on.
    pub fn open(&mut self) -> bool {
        self.turns = self.turns.saturating_sub(1);
        self.turns > 0 && cpu::tsc() < self.until
    }
}

/// Spins until the condition holds or the time is over; says whether it came to hold.
pub fn wait_ms(tsc_hz: u64, milliseconds: u64, mut condition: impl FnMut() -> bool) -> bool {
    let mut limit = Limit::after_ms(tsc_hz, milliseconds);
    loop {
        if condition() {
            return true;
        }
        if !limit.open() {
            return condition();
        }
        core::hint::spin_loop();
    }
}

/// Spins for so many microseconds.
pub fn spin_us(tsc_hz: u64, microseconds: u64) {
    let until = cpu::tsc() + tsc_hz.saturating_mul(microseconds) / 1_000_000;
    while cpu::tsc() < until {
        core::hint::spin_loop();
    }
}

/// The RTC and the 128 bytes of CMOS memory behind it.
pub mod rtc {
    use super::port;

    pub const SECONDS: u8 = 0x00;
    pub const MINUTES: u8 = 0x02;
    pub const HOURS: u8 = 0x04;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const STATUS_A: u8 = 0x0A;
    pub const STATUS_B: u8 = 0x0B;
    pub const STATUS_C: u8 = 0x0C;
    pub const STATUS_D: u8 = 0x0D;
    /// Status A: the time is being updated.
    pub const UPDATING: u8 = 1 << 7;
    /// Status B: an update that ended interrupts.
    pub const UPDATE_INTERRUPT: u8 = 1 << 4;
    /// Status B: numbers are binary, not BCD.
    pub const BINARY: u8 = 1 << 2;
    /// Status B: hours run from 0 to 23.
    pub const HOURS_24: u8 = 1 << 1;

    /// Reads a register, with NMI left enabled.
    pub fn read(register: u8) -> u8 {
        port::write8(0x70, register);
        port::read8(0x71)
    }

    /// Writes a register.
    pub fn write(register: u8, value: u8) {
        port::write8(0x70, register);
        port::write8(0x71, value);
    }

    /// A number as status B says it is coded.
    pub fn decode(value: u8) -> u8 {
        if read(STATUS_B) & BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xF)
        }
    }
}
