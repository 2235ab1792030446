//! The 8254 interval timer, its IRQ 0, and the speaker port 0x61.
//!
//! After Intel's 8254 data sheet. Counters are computed from the clock: a channel stores the
//! count at which it was loaded, and everything else follows. Channel 0's output drives the
//! interrupt line, as a pulse per rising edge. Channel 2's gate and output are at port 0x61,
//! with the refresh toggle that delay loops watch.
//!
//! Simplification: the one-clock load delay is left out.

use alloc::sync::Arc;

use bitfield_struct::bitfield;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, Overlap, PortBus, PortDevice, byte_only};
use crate::line::Line;
use crate::time::{Clock, MIN_INTERRUPT_PERIOD_US, Rate, scale};

/// Frequency of the counters' clock in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Counts between two changes of the refresh toggle: one refresh cycle, 15 us.
const REFRESH_COUNTS: u64 = 18;

/// Operating mode of a channel (data sheet, "Mode definitions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    InterruptOnTerminalCount = 0,
    OneShot = 1,
    RateGenerator = 2,
    SquareWave = 3,
    SoftwareStrobe = 4,
    HardwareStrobe = 5,
}

impl Mode {
    const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::InterruptOnTerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::RateGenerator,
            3 | 7 => Self::SquareWave,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    /// Counting starts with the gate's rising edge, not with the count.
    const fn is_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }

    const fn is_periodic(self) -> bool {
        matches!(self, Self::RateGenerator | Self::SquareWave)
    }
}

/// Which bytes of the counter a port access means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    LowThenHigh = 3,
}

/// Control word (data sheet, figure 7).
#[bitfield(u8)]
struct Control {
    bcd: bool,
    #[bits(3)]
    mode: u8,
    /// 0: latch the count.
    #[bits(2)]
    access: u8,
    /// 3: read-back command.
    #[bits(2)]
    channel: u8,
}

/// Read-back command (data sheet, figure 10).
#[bitfield(u8)]
struct ReadBack {
    __: bool,
    #[bits(3)]
    channels: u8,
    no_status: bool,
    no_count: bool,
    #[bits(2)]
    __: u8,
}

/// Status byte (data sheet, figure 11).
#[bitfield(u8)]
struct Status {
    bcd: bool,
    #[bits(3)]
    mode: u8,
    #[bits(2)]
    access: u8,
    null_count: bool,
    output: bool,
}

/// A count that was written to a channel that counts periodically: it waits for the end of what is being counted.
#[derive(Clone, Copy)]
struct Pending {
    load: u64,
    /// PIT count at which it takes effect.
    at: u64,
    /// That is the middle of a square wave: the low half is the first with the new count.
    low_half: bool,
}

#[derive(Clone, Copy)]
struct Channel {
    mode: Mode,
    access: Access,
    bcd: bool,
    /// The initial count, 1 to 0x10000 (or 10000 in BCD).
    load: u64,
    /// The count register holds a new count that is not complete or not started.
    null_count: bool,
    gate: bool,
    /// PIT count at which counting began; `None`: not counting.
    start: Option<u64>,
    /// Counts done when the gate stopped the channel.
    paused: Option<u64>,
    pending: Option<Pending>,
    /// The low byte written, while the high byte is awaited.
    written_low: Option<u8>,
    /// The next live read is of the high byte.
    read_high: bool,
    latched_status: Option<u8>,
    /// Latched count and how many of its bytes are still to be read.
    latched_count: Option<(u16, u8)>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Channel {
            mode: Mode::SquareWave,
            access: Access::LowThenHigh,
            bcd: false,
            load: 0x1_0000,
            null_count: true,
            gate,
            start: None,
            paused: None,
            pending: None,
            written_low: None,
            read_high: false,
            latched_status: None,
            latched_count: None,
        }
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Counts since the start, `None` if there was none.
    fn elapsed(&self, count: u64) -> Option<u64> {
        self.paused
            .or_else(|| self.start.map(|s| count.saturating_sub(s)))
    }

    /// The counting element's value as read by the guest.
    fn counter(&self, count: u64) -> u16 {
        let value = match self.elapsed(count) {
            None => self.load,
            Some(d) => match self.mode {
                Mode::RateGenerator => self.load - d % self.load,
                // Counts down by two, twice per period.
                Mode::SquareWave => {
                    let half = self.load.div_ceil(2);
                    let at = d % self.load;
                    let in_half = if at < half { at } else { at - half };
                    (self.load & !1).saturating_sub(2 * in_half)
                }
                _ => self.load + self.modulus() - d % self.modulus(),
            },
        } % self.modulus();
        if self.bcd {
            let digit = |power: u64| value / power % 10;
            (digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)) as u16
        } else {
            value as u16
        }
    }

    fn output(&self, count: u64) -> bool {
        let Some(d) = self.elapsed(count) else {
            // Set by the control word: low in mode 0, high in the others.
            return self.mode != Mode::InterruptOnTerminalCount;
        };
        match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => d >= self.load,
            // The gate forces the output high.
            Mode::RateGenerator => !self.gate || d % self.load != self.load - 1,
            Mode::SquareWave => !self.gate || d % self.load < self.load.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => d != self.load,
        }
    }

    /// The PIT count of the first rising edge of the output after `count`.
    fn next_edge(&self, count: u64) -> Option<u64> {
        if self.paused.is_some() {
            return None;
        }
        let start = self.start?;
        if let Some(pending) = self.pending.filter(|pending| pending.low_half) {
            let mut later = *self;
            later.settle(pending.at);
            return later.next_edge(pending.at.max(count));
        }
        let done = count.saturating_sub(start);
        let edge = match self.mode {
            Mode::RateGenerator | Mode::SquareWave => (done / self.load)
                .saturating_add(1)
                .saturating_mul(self.load),
            Mode::InterruptOnTerminalCount | Mode::OneShot => self.load,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => self.load + 1,
        };
        (edge > done).then(|| start.saturating_add(edge))
    }

    /// Puts a count that waited into effect, if its time has come.
    fn settle(&mut self, count: u64) {
        if let Some(Pending { load, at, low_half }) = self.pending
            && count >= at
            && self.paused.is_none()
        {
            self.pending = None;
            self.load = load;
            self.null_count = false;
            let counted = if low_half { load.div_ceil(2) } else { 0 };
            self.start = Some(at.saturating_sub(counted));
        }
    }

    /// When a new count takes effect: at the end of the period, of a square wave at that of its half
    /// (data sheet, modes 2 and 3). `None`: the channel is not counting periodically.
    fn wait_for_period(&self, load: u64, count: u64) -> Option<Pending> {
        let start = self.start.filter(|_| self.paused.is_none())?;
        if !self.mode.is_periodic() {
            return None;
        }
        let done = count.saturating_sub(start);
        let half = self.load.div_ceil(2);
        let low_half = self.mode == Mode::SquareWave && done % self.load < half;
        let left = if low_half { half } else { self.load } - done % self.load;
        Some(Pending {
            load,
            at: count.max(start).saturating_add(left),
            low_half,
        })
    }

    fn control(&mut self, control: Control, count: u64) {
        self.access = match control.access() {
            0 => {
                // Counter latch command; a latched count stays until read.
                self.latch_count(count);
                return;
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        self.mode = Mode::from_bits(control.mode());
        self.bcd = control.bcd();
        self.load = self.modulus();
        self.null_count = true;
        self.start = None;
        self.paused = None;
        self.pending = None;
        self.written_low = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn latch_count(&mut self, count: u64) {
        self.settle(count);
        if self.latched_count.is_none() {
            let bytes = if self.access == Access::LowThenHigh {
                2
            } else {
                1
            };
            self.latched_count = Some((self.counter(count), bytes));
        }
    }

    fn latch_status(&mut self, count: u64) {
        self.settle(count);
        if self.latched_status.is_none() {
            let status = Status::new()
                .with_bcd(self.bcd)
                .with_mode(self.mode as u8)
                .with_access(self.access as u8)
                .with_null_count(self.null_count)
                .with_output(self.output(count));
            self.latched_status = Some(status.into_bits());
        }
    }

    fn read(&mut self, count: u64) -> u8 {
        self.settle(count);
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let (value, latched) = match self.latched_count {
            Some((value, left)) => {
                self.latched_count = left.checked_sub(1).filter(|&l| l > 0).map(|l| (value, l));
                (value, Some(left))
            }
            None => (self.counter(count), None),
        };
        let [low, high] = value.to_le_bytes();
        match (self.access, latched) {
            (Access::Low, _) => low,
            (Access::High, _) => high,
            (Access::LowThenHigh, Some(left)) => {
                if left == 2 {
                    low
                } else {
                    high
                }
            }
            (Access::LowThenHigh, None) => {
                self.read_high = !self.read_high;
                if self.read_high { low } else { high }
            }
        }
    }

    fn write(&mut self, value: u8, count: u64) {
        self.settle(count);
        let raw = match (self.access, self.written_low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::LowThenHigh, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::LowThenHigh, None) => {
                self.written_low = Some(value);
                self.null_count = true;
                if self.mode == Mode::InterruptOnTerminalCount {
                    // The first byte stops the counting.
                    self.start = None;
                    self.paused = None;
                }
                return;
            }
        };
        self.written_low = None;
        let value = if self.bcd {
            (0..4).rev().fold(0, |value, digit| {
                value * 10 + u64::from((raw >> (4 * digit)) & 0xf)
            }) % 10_000
        } else {
            u64::from(raw)
        };
        let mut load = if value == 0 { self.modulus() } else { value };
        // A period of one count has no low phase; the data sheet forbids it.
        if self.mode.is_periodic() {
            load = load.max(2);
        }
        self.pending = self.wait_for_period(load, count);
        if self.pending.is_some() {
            self.null_count = true;
            return;
        }
        self.load = load;
        if self.mode.is_triggered() {
            // Takes effect with the next trigger.
            self.null_count = true;
        } else {
            self.begin(count);
            self.paused = (!self.gate).then_some(0);
        }
    }

    fn begin(&mut self, count: u64) {
        self.start = Some(count);
        self.paused = None;
        self.null_count = false;
    }

    fn set_gate(&mut self, gate: bool, count: u64) {
        if gate == self.gate {
            return;
        }
        self.settle(count);
        // Evaluated before the gate changes.
        let elapsed = self.elapsed(count);
        self.gate = gate;
        match self.mode {
            Mode::OneShot | Mode::HardwareStrobe => {
                if gate {
                    self.begin(count);
                }
            }
            Mode::RateGenerator | Mode::SquareWave if gate => {
                if let Some(pending) = self.pending.take() {
                    self.load = pending.load;
                }
                if self.start.is_some() {
                    self.begin(count);
                }
            }
            _ if gate => {
                if let Some(done) = self.paused.take() {
                    self.start = Some(count.saturating_sub(done));
                }
            }
            _ => {
                if self.start.is_some() {
                    self.paused = elapsed;
                }
            }
        }
    }
}

/// Port 0x61 (PC/AT system control port B).
#[bitfield(u8)]
struct PortB {
    gate2: bool,
    speaker: bool,
    parity_off: bool,
    channel_check_off: bool,
    refresh: bool,
    output2: bool,
    #[bits(2)]
    __: u8,
}

struct State {
    channels: [Channel; 3],
    port_b: PortB,
    /// PIT count of channel 0's next edge that has not been delivered.
    next_edge: Option<u64>,
    /// No edge is delivered before this tick.
    not_before: u64,
}

/// The timer.
pub struct Pit {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    rate: Rate,
    irq: Line,
}

impl Pit {
    /// No channel is counting. `irq` is channel 0's interrupt, ISA IRQ 0.
    pub fn new(clock: Arc<dyn Clock>, irq: Line) -> Arc<Self> {
        Arc::new(Pit {
            state: Mutex::new(State {
                // The gates of channels 0 and 1 are wired high.
                channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
                port_b: PortB::new(),
                next_edge: None,
                not_before: 0,
            }),
            rate: Rate::new(clock.hz(), PIT_HZ),
            clock,
            irq,
        })
    }

    /// Puts the timer at its ports of a PC: 0x40 to 0x43 and 0x61.
    pub fn attach(self: &Arc<Self>, ports: &mut PortBus) -> Result<(), Overlap> {
        ports.insert("pit", 0x40, 4, self.clone())?;
        ports.insert("port-b", 0x61, 1, Arc::new(SpeakerPort(self.clone())))
    }

    /// The tick of the next interrupt.
    pub fn deadline(&self) -> Option<u64> {
        let state = self.state.lock();
        Some(self.rate.tick_of(state.next_edge?).max(state.not_before))
    }

    /// Delivers the interrupt that is due at tick `now`; missed ones coalesce.
    pub fn poll(&self, now: u64) {
        let mut state = self.state.lock();
        let count = self.rate.count_at(now);
        if now < state.not_before || state.next_edge.is_none_or(|edge| edge > count) {
            return;
        }
        state.channels[0].settle(count);
        state.next_edge = state.channels[0].next_edge(count);
        let pause = scale(MIN_INTERRUPT_PERIOD_US, self.clock.hz(), 1_000_000);
        state.not_before = now.saturating_add(pause);
        self.irq.pulse();
    }

    fn count(&self) -> u64 {
        self.rate.count_at(self.clock.now())
    }

    fn read_port_b(&self) -> u8 {
        let count = self.count();
        let mut state = self.state.lock();
        state.channels[2].settle(count);
        state
            .port_b
            .with_refresh((count / REFRESH_COUNTS) % 2 == 1)
            .with_output2(state.channels[2].output(count))
            .into_bits()
    }

    fn write_port_b(&self, value: u8) {
        let count = self.count();
        let value = PortB::from_bits(value);
        let mut state = self.state.lock();
        state.port_b = PortB::new()
            .with_gate2(value.gate2())
            .with_speaker(value.speaker())
            .with_parity_off(value.parity_off())
            .with_channel_check_off(value.channel_check_off());
        state.channels[2].set_gate(value.gate2(), count);
    }
}

impl PortDevice for Pit {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        let count = self.count();
        let mut state = self.state.lock();
        match state.channels.get_mut(usize::from(offset)) {
            Some(channel) => Ok(u32::from(channel.read(count))),
            // The control register cannot be read.
            None => Err(IoError::InvalidRegister),
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let value = value as u8;
        let count = self.count();
        let mut state = self.state.lock();
        match offset {
            0..=2 => {
                state.channels[usize::from(offset)].write(value, count);
                if offset == 0 {
                    state.next_edge = state.channels[0].next_edge(count);
                }
            }
            3 => {
                let control = Control::from_bits(value);
                match control.channel() {
                    3 => {
                        let command = ReadBack::from_bits(value);
                        for (index, channel) in state.channels.iter_mut().enumerate() {
                            if command.channels() & (1 << index) != 0 {
                                if !command.no_count() {
                                    channel.latch_count(count);
                                }
                                if !command.no_status() {
                                    channel.latch_status(count);
                                }
                            }
                        }
                    }
                    index => {
                        state.channels[usize::from(index)].control(control, count);
                        if index == 0 && control.access() != 0 {
                            state.next_edge = None;
                        }
                    }
                }
            }
            _ => return Err(IoError::InvalidRegister),
        }
        Ok(())
    }
}

/// Port 0x61.
struct SpeakerPort(Arc<Pit>);

impl PortDevice for SpeakerPort {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        Ok(u32::from(self.0.read_port_b()))
    }

    fn write(&self, _offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        self.0.write_port_b(value as u8);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
