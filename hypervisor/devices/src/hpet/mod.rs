//! The HPET: a main counter and three comparators, memory-mapped.
//!
//! After Intel's IA-PC HPET specification 1.0a. The counter is computed from the clock: what
//! is stored is its difference to the counts elapsed. Each comparator keeps the elapsed count at which
//! it next matches; missed periods coalesce, and a periodic one interrupts at most once per
//! [`MIN_INTERRUPT_PERIOD_US`]. Interrupts go to an interrupt input, as a message (FSB delivery), or, with
//! legacy replacement, to the inputs of PIT and RTC, which are cut off meanwhile ([`LegacyGate`]).
//!
//! Invariant: [`Hpet::deadline`] is one load, so that those who set other timers pay nothing for this one.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use bitfield_struct::bitfield;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, MmioDevice};
use crate::lapic::MessageSink;
use crate::line::{InterruptSink, Line};
use crate::time::{Clock, MIN_INTERRUPT_PERIOD_US, Rate, scale};

/// Guest-physical address of the registers on a PC.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Bytes of the register page.
pub const HPET_LEN: u64 = 0x1000;
/// Frequency of the main counter in Hz.
pub const HPET_HZ: u64 = 100_000_000;
/// Comparators.
pub const TIMERS: usize = 3;
/// Low half of the capability register: revision 1, three 64-bit timers, legacy replacement.
pub const HPET_ID: u32 = Capabilities::VALUE.into_bits() as u32;

/// Interrupt inputs that a comparator may be routed to: ISA lines of devices that this PC lacks.
const ROUTES: u32 = 1 << 5 | 1 << 6 | 1 << 7;
/// No comparator interrupts.
const NEVER: u64 = u64::MAX;

/// General capabilities and ID register (section 2.3.4).
#[bitfield(u64)]
struct Capabilities {
    revision: u8,
    #[bits(5)]
    last_timer: u8,
    counter_64_bits: bool,
    __: bool,
    legacy_replacement: bool,
    vendor: u16,
    /// Femtoseconds per count.
    period: u32,
}

impl Capabilities {
    const VALUE: Capabilities = Capabilities::new()
        .with_revision(1)
        .with_last_timer(TIMERS as u8 - 1)
        .with_counter_64_bits(true)
        .with_legacy_replacement(true)
        .with_vendor(0x8086)
        .with_period((1_000_000_000_000_000 / HPET_HZ) as u32);
}

/// General configuration register (section 2.3.5).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct General {
    enabled: bool,
    legacy_replacement: bool,
    #[bits(62)]
    __: u64,
}

/// Configuration and capability register of a comparator (section 2.3.8).
#[bitfield(u64)]
struct TimerConfig {
    __: bool,
    level: bool,
    interrupt_enabled: bool,
    periodic: bool,
    periodic_capable: bool,
    wide_capable: bool,
    value_set: bool,
    __: bool,
    force_32_bits: bool,
    #[bits(5)]
    route: u8,
    message: bool,
    message_capable: bool,
    __: u16,
    routes: u32,
}

impl TimerConfig {
    const RESET: TimerConfig = TimerConfig::new()
        .with_periodic_capable(true)
        .with_wide_capable(true)
        .with_message_capable(true)
        .with_routes(ROUTES);
    const WRITABLE: TimerConfig = TimerConfig::new()
        .with_level(true)
        .with_interrupt_enabled(true)
        .with_periodic(true)
        .with_value_set(true)
        .with_force_32_bits(true)
        .with_route(0x1f)
        .with_message(true);

    /// The largest value of counter and comparator.
    fn mask(self) -> u64 {
        if self.force_32_bits() {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        }
    }
}

/// Where an interrupt of a comparator goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    /// Nowhere: the route is none of those offered.
    None,
    /// The input that PIT (0) or RTC (1) had.
    Legacy(usize),
    /// An interrupt input by number.
    Input(u32),
    Message,
}

#[derive(Clone, Copy)]
struct Timer {
    config: TimerConfig,
    comparator: u64,
    /// Added to the comparator at each match, in periodic mode.
    period: u64,
    /// FSB route: value in the low half, address in the high half.
    message: u64,
    /// Elapsed count at the next match; `None`: none is to come.
    due: Option<u64>,
    /// A match has not been delivered yet.
    owed: bool,
    /// Periodic matches are not delivered before this tick.
    not_before: u64,
    /// The line that this timer holds high.
    asserted: Output,
}

impl Timer {
    const RESET: Timer = Timer {
        config: TimerConfig::RESET,
        comparator: u64::MAX,
        period: 0,
        message: 0,
        due: None,
        owed: false,
        not_before: 0,
        asserted: Output::None,
    };

    fn is_periodic(&self) -> bool {
        self.config.periodic() && self.period != 0
    }

    /// Works out the next match: `counter` is the main counter at `elapsed`.
    fn arm(&mut self, counter: u64, elapsed: u64) {
        let mask = self.config.mask();
        let left = self.comparator.wrapping_sub(counter) & mask;
        self.due = elapsed.checked_add(left);
    }

    /// Moves past the matches up to `elapsed`. Returns whether there was one.
    fn advance(&mut self, elapsed: u64) -> bool {
        let Some(due) = self.due.filter(|&due| due <= elapsed) else {
            return false;
        };
        let mask = self.config.mask();
        self.due = if self.is_periodic() {
            let steps = (elapsed - due) / self.period + 1;
            let distance = steps.saturating_mul(self.period);
            self.comparator = self.comparator.wrapping_add(distance) & mask;
            due.checked_add(distance)
        } else {
            // Once more when the counter has wrapped; with 64 bits, in thousands of years.
            let turns = (elapsed - due)
                .checked_div(mask.wrapping_add(1))
                .unwrap_or(0)
                + 1;
            mask.checked_add(1)
                .and_then(|turn| due.checked_add(turn.saturating_mul(turns)))
        };
        true
    }
}

struct State {
    general: General,
    /// Bit per level-triggered timer that asserts its line.
    status: u64,
    /// The main counter while halted; while it runs, its value at elapsed count 0.
    base: u64,
    timers: [Timer; TIMERS],
}

/// The timer block.
pub struct Hpet {
    state: Mutex<State>,
    /// Tick of the next interrupt.
    deadline: AtomicU64,
    clock: Arc<dyn Clock>,
    rate: Rate,
    inputs: Arc<dyn InterruptSink>,
    messages: Arc<dyn MessageSink>,
    legacy: [Arc<LegacyGate>; 2],
}

impl Hpet {
    /// Halted, at zero. `inputs` are the mainboard's interrupt inputs; `legacy` the gates before
    /// those of PIT and RTC.
    pub fn new(
        clock: Arc<dyn Clock>,
        inputs: Arc<dyn InterruptSink>,
        messages: Arc<dyn MessageSink>,
        legacy: [Arc<LegacyGate>; 2],
    ) -> Arc<Self> {
        Arc::new(Hpet {
            state: Mutex::new(State {
                general: General::new(),
                status: 0,
                base: 0,
                timers: [Timer::RESET; TIMERS],
            }),
            deadline: AtomicU64::new(NEVER),
            rate: Rate::new(clock.hz(), HPET_HZ),
            clock,
            inputs,
            messages,
            legacy,
        })
    }

    /// The tick of the next interrupt.
    pub fn deadline(&self) -> Option<u64> {
        let deadline = self.deadline.load(Ordering::Relaxed);
        (deadline != NEVER).then_some(deadline)
    }

    /// Delivers what is due at tick `now`.
    pub fn poll(&self, now: u64) {
        if now >= self.deadline.load(Ordering::Relaxed) {
            let mut state = self.state.lock();
            self.sync(&mut state, now);
            self.note_deadline(&state);
        }
    }

    /// The main counter at tick `now`.
    fn counter(&self, state: &State, now: u64) -> u64 {
        if state.general.enabled() {
            state.base.wrapping_add(self.rate.count_at(now))
        } else {
            state.base
        }
    }

    fn output(&self, state: &State, index: usize) -> Output {
        let config = state.timers[index].config;
        if state.general.legacy_replacement() && index < self.legacy.len() {
            Output::Legacy(index)
        } else if config.message() {
            Output::Message
        } else if ROUTES & (1 << config.route()) != 0 {
            Output::Input(u32::from(config.route()))
        } else {
            Output::None
        }
    }

    fn drive(&self, output: Output, high: bool) {
        match output {
            Output::Legacy(index) => self.legacy[index].set_level(LegacyGate::HPET, high),
            Output::Input(input) => self.inputs.set_level(input, high),
            Output::Message | Output::None => {}
        }
    }

    /// Drives each level-triggered timer's line to what status and configuration say.
    fn drive_levels(&self, state: &mut State) {
        for index in 0..TIMERS {
            let config = state.timers[index].config;
            let high =
                config.level() && config.interrupt_enabled() && state.status & (1 << index) != 0;
            let wanted = if high {
                self.output(state, index)
            } else {
                Output::None
            };
            let held = core::mem::replace(&mut state.timers[index].asserted, wanted);
            if held != wanted {
                self.drive(held, false);
                self.drive(wanted, true);
            }
        }
    }

    /// Brings the comparators to tick `now` and delivers what they matched.
    fn sync(&self, state: &mut State, now: u64) {
        if !state.general.enabled() {
            return;
        }
        let elapsed = self.rate.count_at(now);
        for index in 0..TIMERS {
            let timer = &mut state.timers[index];
            timer.owed |= timer.advance(elapsed);
            if !timer.owed || now < timer.not_before {
                continue;
            }
            timer.owed = false;
            if timer.is_periodic() {
                let pause = scale(MIN_INTERRUPT_PERIOD_US, self.clock.hz(), 1_000_000);
                timer.not_before = now.saturating_add(pause);
            }
            let Timer {
                config, message, ..
            } = *timer;
            if config.level() {
                state.status |= 1 << index;
            } else if config.interrupt_enabled() {
                match self.output(state, index) {
                    Output::Message => {
                        self.messages.deliver_msi(message >> 32, message as u32);
                    }
                    output => {
                        self.drive(output, true);
                        self.drive(output, false);
                    }
                }
            }
        }
        self.drive_levels(state);
    }

    fn note_deadline(&self, state: &State) {
        let mut soonest = NEVER;
        if state.general.enabled() {
            for timer in state.timers.iter().filter(|t| t.config.interrupt_enabled()) {
                let due = match timer.due {
                    _ if timer.owed => 0,
                    Some(due) => self.rate.tick_of(due),
                    None => continue,
                };
                soonest = soonest.min(due.max(timer.not_before));
            }
        }
        self.deadline.store(soonest, Ordering::Relaxed);
    }

    fn arm(&self, state: &mut State, index: usize, now: u64) {
        let counter = self.counter(state, now);
        let timer = &mut state.timers[index];
        timer.owed = false;
        timer.not_before = 0;
        if state.general.enabled() {
            timer.arm(counter, self.rate.count_at(now));
        } else {
            timer.due = None;
        }
    }

    fn read_register(&self, state: &State, register: Register, now: u64) -> u64 {
        match register {
            Register::Capabilities => Capabilities::VALUE.into_bits(),
            Register::General => state.general.into_bits(),
            Register::Status => state.status,
            Register::Counter => self.counter(state, now),
            Register::Config(n) => state.timers[n].config.into_bits(),
            Register::Comparator(n) => state.timers[n].comparator,
            Register::Message(n) => state.timers[n].message,
        }
    }

    /// Writes the bits of `value` that `mask` selects; it is the low, the high, or both halves.
    fn write_register(
        &self,
        state: &mut State,
        register: Register,
        value: u64,
        mask: u64,
        now: u64,
    ) {
        let merge = |old: u64| (old & !mask) | (value & mask);
        match register {
            Register::Capabilities => {}
            Register::General => {
                let old = state.general;
                let new = General::from_bits(merge(old.into_bits()));
                let new = General::new()
                    .with_enabled(new.enabled())
                    .with_legacy_replacement(new.legacy_replacement());
                let counter = self.counter(state, now);
                state.general = new;
                if new.enabled() != old.enabled() {
                    state.base = if new.enabled() {
                        counter.wrapping_sub(self.rate.count_at(now))
                    } else {
                        counter
                    };
                    for index in 0..TIMERS {
                        self.arm(state, index, now);
                    }
                }
                for gate in &self.legacy {
                    gate.replace(new.legacy_replacement());
                }
            }
            Register::Status => state.status &= !(value & mask),
            // Only while halted (section 2.3.7).
            Register::Counter if state.general.enabled() => {}
            Register::Counter => state.base = merge(state.base),
            Register::Config(n) => {
                let timer = &mut state.timers[n];
                let writable = TimerConfig::WRITABLE.into_bits();
                let old = timer.config.into_bits();
                timer.config = TimerConfig::from_bits((old & !writable) | (merge(old) & writable));
                timer.comparator &= timer.config.mask();
                timer.period &= timer.config.mask();
                if !timer.config.level() {
                    state.status &= !(1 << n);
                }
                self.arm(state, n, now);
            }
            Register::Comparator(n) => {
                let timer = &mut state.timers[n];
                let limit = timer.config.mask();
                // In periodic mode the value is the period; the comparator itself follows only when
                // software asked for it (section 2.3.9.2.2).
                if !timer.config.periodic() || timer.config.value_set() {
                    timer.comparator = merge(timer.comparator) & limit;
                }
                if timer.config.periodic() {
                    timer.period = merge(timer.period) & limit;
                }
                timer.config.set_value_set(false);
                self.arm(state, n, now);
            }
            Register::Message(n) => state.timers[n].message = merge(state.timers[n].message),
        }
        self.drive_levels(state);
    }
}

/// A 64-bit register.
#[derive(Clone, Copy)]
enum Register {
    Capabilities,
    General,
    Status,
    Counter,
    Config(usize),
    Comparator(usize),
    Message(usize),
}

impl Register {
    /// The register at an offset that is a multiple of 8.
    fn at(offset: u64) -> Option<Self> {
        let timer = |offset: u64| {
            usize::try_from(offset / 0x20)
                .ok()
                .filter(|&index| index < TIMERS)
        };
        match offset {
            0x00 => Some(Self::Capabilities),
            0x10 => Some(Self::General),
            0x20 => Some(Self::Status),
            0xf0 => Some(Self::Counter),
            0x100.. => {
                let index = timer(offset - 0x100)?;
                match offset % 0x20 {
                    0x00 => Some(Self::Config(index)),
                    0x08 => Some(Self::Comparator(index)),
                    0x10 => Some(Self::Message(index)),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// Bit position of an access within its register (section 2.3.1: 32 or 64 bits, aligned).
fn position(offset: u64, width: Width) -> Result<u32, IoError> {
    match (width, offset % 8) {
        (Width::Qword | Width::Dword, 0) => Ok(0),
        (Width::Dword, 4) => Ok(32),
        (Width::Qword | Width::Dword, _) => Err(IoError::Unaligned),
        _ => Err(IoError::InvalidWidth),
    }
}

impl MmioDevice for Hpet {
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let shift = position(offset, width)?;
        // A reserved register reads as zero.
        let Some(register) = Register::at(offset & !7) else {
            return Ok(0);
        };
        let now = self.clock.now();
        let mut state = self.state.lock();
        // Only these change with time, beside the counter.
        if matches!(register, Register::Status | Register::Comparator(_)) {
            self.sync(&mut state, now);
            self.note_deadline(&state);
        }
        Ok((self.read_register(&state, register, now) >> shift) & width.mask())
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let shift = position(offset, width)?;
        let Some(register) = Register::at(offset & !7) else {
            return Ok(());
        };
        let now = self.clock.now();
        let mut state = self.state.lock();
        self.sync(&mut state, now);
        let mask = width.mask() << shift;
        self.write_register(&mut state, register, value << shift, mask, now);
        self.note_deadline(&state);
        Ok(())
    }
}

/// The switch before the interrupt input of PIT or RTC: either that device drives it, or the HPET does
/// (legacy replacement, section 2.3.5).
pub struct LegacyGate {
    state: Mutex<GateState>,
    target: Line,
}

#[derive(Default)]
struct GateState {
    replaced: bool,
    levels: [bool; 2],
}

impl LegacyGate {
    /// Input number of the device that had the line.
    pub const DEVICE: u32 = 0;
    /// Input number of the HPET.
    const HPET: u32 = 1;

    /// A gate before `target`, open for the device.
    pub fn new(target: Line) -> Arc<Self> {
        Arc::new(LegacyGate {
            state: Mutex::default(),
            target,
        })
    }

    fn replace(&self, replaced: bool) {
        let mut state = self.state.lock();
        if state.replaced != replaced {
            state.replaced = replaced;
            self.target.set(state.levels[usize::from(replaced)]);
        }
    }
}

impl InterruptSink for LegacyGate {
    fn set_level(&self, input: u32, high: bool) {
        let mut state = self.state.lock();
        let Some(level) = state.levels.get_mut(input as usize) else {
            return;
        };
        *level = high;
        if input == u32::from(state.replaced) {
            self.target.set(high);
        }
    }
}

#[cfg(test)]
mod tests;
