//! A watchdog: the timer of Intel's 6300ESB, as a PCI function.
//!
//! After the 6300ESB data sheet (300641, chapter on the watchdog timer). It counts down in two stages; a driver
//! reloads it before the second is over, or else [`SystemRequest::Watchdog`] is made. The first stage's end
//! sets a status bit and raises no interrupt. As in QEMU, which drivers were written against as well, the timer
//! is off after it has fired, and the register that reads the time left is kept.
//!
//! A write to a register behind the BAR takes effect only after 80h and 86h were written to the reload
//! register, and only once. The lock bit keeps the timer from being turned off until a reset.

use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use bitfield_struct::bitfield;
use mem::Width;
use spin::Mutex;

use crate::bus::IoError;
use crate::pci::{BARS, BarError, BarKind, BarRange, ConfigSpace, FunctionId, PciFunction};
use crate::system::{SystemControl, SystemRequest};
use crate::time::{Clock, Rate};
use crate::work::{Budget, Outcome, WorkSignal, Worker};

/// The 6300ESB's watchdog function.
const ID: FunctionId = FunctionId {
    vendor: 0x8086,
    device: 0x25ab,
    // System peripheral, other.
    class: 0x08,
    subclass: 0x80,
    interface: 0,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// PCI clock in Hz: what the timer is divided from.
const PCI_HZ: u64 = 33_000_000;
/// Shortest stage, in PCI clocks: a millisecond. The counters would allow none at all.
const SHORTEST: u64 = PCI_HZ / 1000;
/// Bytes of the BAR.
const BAR_LEN: u64 = 16;
/// Bits of a counter.
const COUNTER: u32 = 0xf_ffff;

/// Registers in configuration space.
mod config {
    pub(super) const CONFIG: u16 = 0x60;
    pub(super) const DOWN_COUNT: u16 = 0x64;
    pub(super) const LOCK: u16 = 0x68;
}

/// Registers behind the BAR.
mod register {
    pub(super) const PRELOAD_1: u64 = 0x0;
    pub(super) const PRELOAD_2: u64 = 0x4;
    pub(super) const INTERRUPT_STATUS: u64 = 0x8;
    pub(super) const RELOAD: u64 = 0xc;
}

/// Written to the reload register, one after the other, they unlock the next write.
const UNLOCK: [u64; 2] = [0x80, 0x86];

/// WDT configuration register.
#[bitfield(u16)]
struct Config {
    /// 0: interrupt, 2: SMI, 3: none. Kept only.
    #[bits(2)]
    interrupt_type: u8,
    /// Counts at 1 MHz, not 1 kHz.
    fast: bool,
    #[bits(2)]
    __: u8,
    /// The second stage's end does nothing.
    output_off: bool,
    #[bits(10)]
    __: u16,
}

impl Config {
    const WRITABLE: u16 = 0x27;
}

/// WDT lock register.
#[bitfield(u8)]
struct Lock {
    locked: bool,
    enabled: bool,
    /// It starts again after the second stage.
    free_running: bool,
    #[bits(5)]
    __: u8,
}

/// Reload register.
#[bitfield(u16)]
struct Reload {
    __: u8,
    /// Starts the first stage anew.
    reload: bool,
    /// The watchdog has fired; writing one clears it. Linux looked at bit 12 for years.
    fired: bool,
    #[bits(2)]
    __: u8,
    fired_too: bool,
    #[bits(3)]
    __: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    First,
    Second,
}

struct State {
    space: ConfigSpace,
    config: Config,
    lock: Lock,
    preload: [u32; 2],
    /// Writes of [`UNLOCK`] so far.
    unlocked: usize,
    interrupt: bool,
    fired: bool,
    stage: Stage,
    /// PCI clock at which the stage ends.
    due: Option<u64>,
}

impl State {
    /// Begins a stage at this PCI clock, if the timer is on.
    fn begin(&mut self, stage: Stage, at: u64) {
        self.stage = stage;
        let count = u64::from(self.preload[stage as usize]);
        let shift = if self.config.fast() { 5 } else { 15 };
        let length = (count << shift).max(SHORTEST);
        self.due = self.lock.enabled().then(|| at.saturating_add(length));
    }

    /// As after a reset, but for the bit that says that it has fired.
    fn reset(&mut self) {
        self.config = Config::new();
        self.lock = Lock::new();
        self.preload = [COUNTER; 2];
        self.unlocked = 0;
        self.stage = Stage::First;
        self.due = None;
    }

    /// What is over at this PCI clock. Whether the watchdog fires.
    fn expire(&mut self, now: u64) -> bool {
        while let Some(due) = self.due.filter(|&due| due <= now) {
            match self.stage {
                Stage::First => {
                    self.interrupt |= self.config.interrupt_type() == 0;
                    self.begin(Stage::Second, due);
                }
                Stage::Second if !self.config.output_off() => {
                    self.reset();
                    self.fired = true;
                    return true;
                }
                Stage::Second => {
                    self.due = None;
                    if self.lock.free_running() {
                        self.begin(Stage::First, now);
                    }
                }
            }
        }
        false
    }

    /// Counts left of the stage.
    fn down_count(&self, now: u64) -> u32 {
        let left = self.due.map_or(0, |due| due.saturating_sub(now));
        let shift = if self.config.fast() { 5 } else { 15 };
        (left >> shift) as u32 & COUNTER
    }

    fn read_byte(&self, offset: u16, now: u64) -> u8 {
        let of = |value: u32, first: u16| value.to_le_bytes()[usize::from(offset - first)];
        match offset {
            config::CONFIG..=0x61 => of(u32::from(self.config.into_bits()), config::CONFIG),
            config::DOWN_COUNT..=0x67 => of(self.down_count(now), config::DOWN_COUNT),
            config::LOCK => self.lock.into_bits(),
            _ => self.space.read(offset, Width::Byte) as u8,
        }
    }

    fn write_byte(&mut self, offset: u16, value: u8, now: u64) {
        match offset {
            config::CONFIG..=0x61 => {
                let mut bytes = self.config.into_bits().to_le_bytes();
                bytes[usize::from(offset - config::CONFIG)] = value;
                self.config = Config::from_bits(u16::from_le_bytes(bytes) & Config::WRITABLE);
            }
            config::LOCK if !self.lock.locked() => {
                let was = self.lock.enabled();
                self.lock = Lock::from_bits(value & 7);
                if !self.lock.enabled() {
                    self.due = None;
                } else if !was {
                    self.begin(Stage::First, now);
                }
            }
            config::LOCK => {}
            _ => self.space.write(offset, Width::Byte, u32::from(value)),
        }
    }
}

/// The watchdog.
pub struct Watchdog {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    rate: Rate,
    system: Arc<dyn SystemControl>,
    work: WorkSignal,
    /// Its deadline is another one since somebody last asked.
    moved: AtomicBool,
}

impl Watchdog {
    /// The timer after a reset, off. `fired`: it has caused the reset. `work` is raised when its deadline changes;
    /// then [`Watchdog::take_moved`].
    ///
    /// # Errors
    /// A defect of Plinth: the register block is no BAR.
    pub fn new(
        clock: Arc<dyn Clock>,
        system: Arc<dyn SystemControl>,
        work: WorkSignal,
        fired: bool,
    ) -> Result<Arc<Self>, BarError> {
        let mut space = ConfigSpace::new(&ID);
        space.add_bar(0, BarKind::Memory32, BAR_LEN)?;
        let mut state = State {
            space,
            config: Config::new(),
            lock: Lock::new(),
            preload: [0; 2],
            unlocked: 0,
            interrupt: false,
            fired,
            stage: Stage::First,
            due: None,
        };
        state.reset();
        Ok(Arc::new(Watchdog {
            state: Mutex::new(state),
            rate: Rate::new(clock.hz(), PCI_HZ),
            clock,
            system,
            work,
            moved: AtomicBool::new(false),
        }))
    }

    /// The tick at which a stage ends.
    pub fn deadline(&self) -> Option<u64> {
        let due = self.state.lock().due?;
        Some(self.rate.tick_of(due))
    }

    /// Ends what is over at tick `now`.
    pub fn poll(&self, now: u64) {
        let fires = self.state.lock().expire(self.rate.count_at(now));
        if fires {
            self.system.request(SystemRequest::Watchdog);
        }
    }

    /// Whether the deadline may have changed since this was last asked.
    pub fn take_moved(&self) -> bool {
        self.moved.swap(false, Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        self.rate.count_at(self.clock.now())
    }

    /// Lets `change` change the state; tells of a new deadline.
    fn change(&self, change: impl FnOnce(&mut State, u64)) {
        let now = self.now();
        let mut state = self.state.lock();
        let before = state.due;
        change(&mut state, now);
        if state.due != before {
            self.moved.store(true, Ordering::Relaxed);
            self.work.raise();
        }
    }
}

impl PciFunction for Watchdog {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        let now = self.now();
        let state = self.state.lock();
        let bytes = (offset..).take(width.bytes().min(4));
        let bytes = bytes.map(|at| u32::from(state.read_byte(at, now)));
        bytes
            .enumerate()
            .fold(0, |value, (n, byte)| value | byte << (8 * n))
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        self.change(|state, now| {
            for (at, byte) in (offset..).zip(value.to_le_bytes()).take(width.bytes()) {
                state.write_byte(at, byte, now);
            }
        });
    }

    fn bars(&self) -> [Option<BarRange>; BARS] {
        self.state.lock().space.bars()
    }

    fn bar_read(&self, _bar: usize, offset: u64, width: Width) -> Result<u64, IoError> {
        let state = self.state.lock();
        let fired = Reload::new()
            .with_fired(state.fired)
            .with_fired_too(state.fired);
        let value = match offset {
            register::PRELOAD_1 => state.preload[0],
            register::PRELOAD_2 => state.preload[1],
            register::INTERRUPT_STATUS => u32::from(state.interrupt),
            register::RELOAD => u32::from(fired.into_bits()),
            _ => return Err(IoError::InvalidRegister),
        };
        Ok(u64::from(value) & width.mask())
    }

    fn bar_write(&self, _bar: usize, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        if !matches!(
            offset,
            register::PRELOAD_1
                | register::PRELOAD_2
                | register::INTERRUPT_STATUS
                | register::RELOAD
        ) {
            return Err(IoError::InvalidRegister);
        }
        let value = value & width.mask();
        self.change(|state, now| {
            let step = state.unlocked;
            if offset == register::RELOAD && value == UNLOCK[0] {
                state.unlocked = 1;
            } else if offset == register::RELOAD && step == 1 && value == UNLOCK[1] {
                state.unlocked = 2;
            } else if core::mem::take(&mut state.unlocked) == 2 {
                match offset {
                    register::PRELOAD_1 => state.preload[0] = value as u32 & COUNTER,
                    register::PRELOAD_2 => state.preload[1] = value as u32 & COUNTER,
                    register::INTERRUPT_STATUS => state.interrupt &= value & 1 == 0,
                    _ => {
                        let reload = Reload::from_bits(value as u16);
                        if reload.fired() || reload.fired_too() {
                            state.fired = false;
                        }
                        if reload.reload() {
                            state.begin(Stage::First, now);
                        }
                    }
                }
            }
        });
        Ok(())
    }
}

impl Worker for Watchdog {
    /// There is nothing to do but to look at the deadline, which the VM does after all work.
    fn work(&self, _budget: &mut Budget) -> Outcome {
        Outcome {
            more: false,
            note: None::<String>,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeClock, Requests};
    use crate::work::WorkList;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    struct Setup {
        dog: Arc<Watchdog>,
        clock: Arc<FakeClock>,
        requests: Arc<Requests>,
        work: WorkList,
    }

    /// A clock as fast as the PCI clock: ticks are counts.
    fn setup() -> Setup {
        let clock = FakeClock::new(PCI_HZ);
        let requests = Arc::new(Requests::default());
        let mut work = WorkList::new();
        let dog = work
            .add(|signal| Watchdog::new(clock.clone(), requests.clone(), signal, false).ok())
            .unwrap();
        Setup {
            dog,
            clock,
            requests,
            work,
        }
    }

    impl Setup {
        fn unlocked(&self, offset: u64, width: Width, value: u64) {
            self.dog.bar_write(0, 0xc, Width::Byte, 0x80).unwrap();
            self.dog.bar_write(0, 0xc, Width::Byte, 0x86).unwrap();
            self.dog.bar_write(0, offset, width, value).unwrap();
        }

        fn feed(&self) {
            self.unlocked(0xc, Width::Word, 0x100);
        }

        /// As Linux' driver starts it: two stages of `count` milliseconds or so.
        fn start(&self, count: u64) {
            self.dog.config_write(0x60, Width::Word, 0x3);
            self.dog.config_write(0x68, Width::Byte, 0);
            self.unlocked(0, Width::Dword, count);
            self.unlocked(4, Width::Dword, count);
            self.feed();
            self.dog.config_write(0x68, Width::Byte, 2);
        }

        /// Goes to this time, polling at each deadline as the VM does.
        fn go_to(&self, tick: u64) {
            while let Some(due) = self.dog.deadline().filter(|&due| due <= tick) {
                self.clock.set(due);
                self.dog.poll(due);
            }
            self.clock.set(tick);
        }
    }

    const COUNT: u64 = 1 << 15;

    #[test]
    fn is_found_as_the_drivers_look_for_it() {
        let s = setup();
        assert_eq!(s.dog.config_read(0, Width::Dword), 0x25ab_8086);
        assert_eq!(s.dog.config_read(0xa, Width::Word), 0x0880);
        s.dog.config_write(0x10, Width::Dword, 0xffff_ffff);
        assert_eq!(s.dog.config_read(0x10, Width::Dword), 0xffff_fff0);
        assert_eq!(s.dog.config_read(0x60, Width::Word), 0);
        assert_eq!(s.dog.config_read(0x68, Width::Byte), 0);
        assert_eq!(s.dog.deadline(), None);
    }

    #[test]
    fn fires_when_it_is_not_fed() {
        let s = setup();
        s.start(512);
        assert_eq!(s.dog.deadline(), Some(512 * COUNT));
        assert!(s.dog.take_moved() && s.work.is_pending());
        s.go_to(1024 * COUNT - 1);
        assert_eq!(s.requests.take(), []);
        s.go_to(1024 * COUNT);
        assert_eq!(s.requests.take(), [SystemRequest::Watchdog]);
        assert_eq!(s.dog.deadline(), None, "it is off then");
        assert_eq!(s.dog.bar_read(0, 0xc, Width::Word), Ok(0x1200));
        s.unlocked(0xc, Width::Word, 0x200);
        assert_eq!(s.dog.bar_read(0, 0xc, Width::Word), Ok(0));
    }

    #[test]
    fn does_not_fire_while_it_is_fed() {
        let s = setup();
        s.start(512);
        for n in 1..20 {
            s.go_to(n * 1000 * COUNT);
            s.feed();
        }
        assert_eq!(s.requests.take(), []);
        assert_eq!(s.dog.deadline(), Some((19_000 + 512) * COUNT));
        // Of the first stage.
        s.go_to(19_100 * COUNT);
        assert_eq!(s.dog.config_read(0x64, Width::Dword), 412);
    }

    #[test]
    fn is_turned_off_unless_it_is_locked() {
        let s = setup();
        s.start(512);
        s.dog.config_write(0x68, Width::Byte, 0);
        assert_eq!(s.dog.deadline(), None);
        s.dog.config_write(0x68, Width::Byte, 3);
        s.dog.config_write(0x68, Width::Byte, 0);
        assert_eq!(s.dog.config_read(0x68, Width::Byte), 3);
        s.go_to(2000 * COUNT);
        assert_eq!(s.requests.take(), [SystemRequest::Watchdog]);
    }

    #[test]
    fn registers_are_written_once_after_they_are_unlocked() {
        let s = setup();
        s.dog.bar_write(0, 0, Width::Dword, 7).unwrap();
        assert_eq!(s.dog.bar_read(0, 0, Width::Dword), Ok(0xf_ffff));
        s.unlocked(0, Width::Dword, 7);
        s.dog.bar_write(0, 4, Width::Dword, 8).unwrap();
        assert_eq!(s.dog.bar_read(0, 0, Width::Dword), Ok(7));
        assert_eq!(s.dog.bar_read(0, 4, Width::Dword), Ok(0xf_ffff));
        s.dog.bar_write(0, 0xc, Width::Byte, 0x86).unwrap();
        s.dog.bar_write(0, 0, Width::Dword, 9).unwrap();
        assert_eq!(s.dog.bar_read(0, 0, Width::Dword), Ok(7));
        assert!(s.dog.bar_read(0, 1, Width::Byte).is_err());
        assert!(s.dog.bar_write(0, 0x10, Width::Byte, 0).is_err());
    }

    #[test]
    fn without_its_output_it_runs_on_only_if_it_is_free_running() {
        let s = setup();
        s.start(512);
        s.dog.config_write(0x60, Width::Word, 0x20);
        s.go_to(5_000 * COUNT);
        assert_eq!(s.requests.take(), []);
        assert_eq!(s.dog.deadline(), None);
        assert_eq!(
            s.dog.bar_read(0, 8, Width::Byte),
            Ok(1),
            "the first stage's end"
        );
        s.unlocked(8, Width::Byte, 1);
        assert_eq!(s.dog.bar_read(0, 8, Width::Byte), Ok(0));
        s.dog.config_write(0x68, Width::Byte, 0);
        s.dog.config_write(0x68, Width::Byte, 6);
        s.go_to(9_000 * COUNT);
        assert!(s.dog.deadline().is_some());
        assert_eq!(s.requests.take(), []);
    }

    proptest! {
        /// Nothing panics, deadlines are never in the past after a poll, and never denser than a millisecond.
        #[test]
        fn random_accesses(
            steps in prop::collection::vec((0..4u8, 0u16..256, 0..3usize, any::<u32>()), 0..300),
        ) {
            let s = setup();
            let mut now = 0u64;
            let special: Vec<u32> = Vec::from([0x80, 0x86, 0x100, 2, 6, 0]);
            for (kind, offset, width, value) in steps {
                let width = [Width::Byte, Width::Word, Width::Dword][width];
                let value = if value % 3 == 0 { special[value as usize % special.len()] } else { value };
                match kind {
                    0 => s.dog.config_write(offset, width, value),
                    1 => { s.dog.config_read(offset, width); }
                    2 => { let _ = s.dog.bar_write(0, u64::from(offset & 0xc), width, u64::from(value)); }
                    _ => { let _ = s.dog.bar_read(0, u64::from(offset & 0x1f), width); }
                }
                now += u64::from(value) >> (offset % 32);
                s.clock.set(now);
                s.dog.poll(now);
                prop_assert!(s.dog.deadline().is_none_or(|due| due > now));
            }
        }
    }
}
