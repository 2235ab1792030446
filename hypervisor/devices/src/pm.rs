//! ACPI fixed hardware: PM1a event and control blocks, the PM timer, the reset register.
//!
//! After the ACPI specification, section 4.8. The platform is always in ACPI mode (the FADT
//! gives no SMI command port). The power button can be pressed from outside; entering S3 or S5
//! and writing the reset register become requests to [`SystemControl`].

use alloc::sync::Arc;

use bitfield_struct::bitfield;
use bitflags::bitflags;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, PortDevice, byte_only};
use crate::line::Line;
use crate::system::{ResetSource, SystemControl, SystemRequest};
use crate::time::{Clock, Rate};

/// PM timer frequency in Hz (ACPI 6.5, section 4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// Ports of the block, from its base.
pub const PM_PORTS: u16 = 12;
/// Offset of the PM1a event block: status, then enable, two bytes each.
pub const PM1_EVENT: u16 = 0;
/// Offset of the PM1a control block, two bytes.
pub const PM1_CONTROL: u16 = 4;
/// Offset of the PM timer, four bytes.
pub const PM_TIMER: u16 = 8;
/// SLP_TYP value of the soft-off state, as in the DSDT's `\_S5`. It is the machine's own choice; this is the
/// PIIX4's, which small systems write without a look at the tables.
pub const SLEEP_TYPE_S5: u8 = 0;
/// SLP_TYP value of S3, suspend to RAM: the PIIX4's, too.
pub const SLEEP_TYPE_S3: u8 = 1;
/// Value to write to the reset register, as in the FADT.
pub const RESET_VALUE: u8 = 0x06;

bitflags! {
    /// PM1 status register (ACPI 6.5, table 4.14).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Pm1Status: u16 {
        /// The PM timer's top bit changed.
        const TIMER = 1 << 0;
        const BUS_MASTER = 1 << 4;
        const GLOBAL = 1 << 5;
        const POWER_BUTTON = 1 << 8;
        const SLEEP_BUTTON = 1 << 9;
        const RTC = 1 << 10;
        const WAKE = 1 << 15;
    }
}

impl Pm1Status {
    /// The events that the enable register has bits for (table 4.15).
    const EVENTS: Pm1Status = Pm1Status::TIMER
        .union(Pm1Status::GLOBAL)
        .union(Pm1Status::POWER_BUTTON)
        .union(Pm1Status::SLEEP_BUTTON)
        .union(Pm1Status::RTC);
}

/// PM1 control register (ACPI 6.5, table 4.16).
#[bitfield(u16)]
struct Pm1Control {
    sci_enable: bool,
    bus_master_reload: bool,
    global_release: bool,
    #[bits(7)]
    __: u8,
    #[bits(3)]
    sleep_type: u8,
    sleep_enable: bool,
    #[bits(2)]
    __: u8,
}

struct State {
    status: Pm1Status,
    enable: Pm1Status,
    sleep_type: u8,
    bus_master_reload: bool,
    /// Half-turns of the timer (changes of its top bit) already noted in `status`.
    half_turns: u64,
}

/// The PM1a block and PM timer, twelve ports from the base in the FADT.
pub struct PowerManagement {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    rate: Rate,
    sci: Line,
    system: Arc<dyn SystemControl>,
}

impl PowerManagement {
    /// Nothing enabled. `sci` is the level-triggered system control interrupt.
    pub fn new(clock: Arc<dyn Clock>, sci: Line, system: Arc<dyn SystemControl>) -> Arc<Self> {
        Arc::new(PowerManagement {
            state: Mutex::new(State {
                status: Pm1Status::empty(),
                enable: Pm1Status::empty(),
                sleep_type: 0,
                bus_master_reload: false,
                half_turns: 0,
            }),
            rate: Rate::new(clock.hz(), PM_TIMER_HZ),
            clock,
            sci,
            system,
        })
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        let mut state = self.state.lock();
        state.status |= Pm1Status::POWER_BUTTON;
        self.update_sci(&state);
    }

    /// The clock's alarm has come: it can wake a machine that sleeps.
    pub fn alarm(&self) {
        let mut state = self.state.lock();
        state.status |= Pm1Status::RTC;
        self.update_sci(&state);
    }

    /// Whether an event has come that the guest wants to be woken by; then it is told that it was.
    pub fn wake(&self) -> bool {
        let mut state = self.state.lock();
        let wakes = state
            .status
            .intersection(state.enable)
            .intersects(Pm1Status::RTC | Pm1Status::POWER_BUTTON | Pm1Status::SLEEP_BUTTON);
        if wakes {
            state.status |= Pm1Status::WAKE;
            self.update_sci(&state);
        }
        wakes
    }

    /// The tick at which the timer's top bit next changes, if that interrupts.
    pub fn deadline(&self) -> Option<u64> {
        let state = self.state.lock();
        let waiting =
            state.enable.contains(Pm1Status::TIMER) && !state.status.contains(Pm1Status::TIMER);
        waiting.then(|| {
            self.rate
                .tick_of((state.half_turns + 1).saturating_mul(1 << 31))
        })
    }

    /// Notes a change of the timer's top bit up to tick `now`.
    pub fn poll(&self, now: u64) {
        let mut state = self.state.lock();
        self.sync(&mut state, now);
    }

    fn sync(&self, state: &mut State, now: u64) {
        let half_turns = self.rate.count_at(now) >> 31;
        if half_turns != state.half_turns {
            state.half_turns = half_turns;
            state.status |= Pm1Status::TIMER;
        }
        self.update_sci(state);
    }

    fn update_sci(&self, state: &State) {
        self.sci.set(state.status.intersects(state.enable));
    }

    /// Reads one 16-bit register.
    fn read_word(&self, offset: u16) -> u16 {
        let mut state = self.state.lock();
        self.sync(&mut state, self.clock.now());
        match offset {
            0 => state.status.bits(),
            2 => state.enable.bits(),
            _ => Pm1Control::new()
                .with_sci_enable(true)
                .with_bus_master_reload(state.bus_master_reload)
                .with_sleep_type(state.sleep_type)
                .into_bits(),
        }
    }

    /// Writes the bits of one 16-bit register that `mask` selects.
    fn write_word(&self, offset: u16, value: u16, mask: u16) {
        let mut state = self.state.lock();
        self.sync(&mut state, self.clock.now());
        let value = value & mask;
        match offset {
            // Write one to clear.
            0 => state.status -= Pm1Status::from_bits_truncate(value),
            2 => {
                let kept = state.enable.bits() & !mask;
                state.enable = Pm1Status::from_bits_truncate(kept | value) & Pm1Status::EVENTS;
            }
            _ => {
                let kept = Pm1Control::new()
                    .with_bus_master_reload(state.bus_master_reload)
                    .with_sleep_type(state.sleep_type)
                    .into_bits()
                    & !mask;
                let control = Pm1Control::from_bits(kept | value);
                state.sleep_type = control.sleep_type();
                state.bus_master_reload = control.bus_master_reload();
                let request = match control.sleep_type() {
                    SLEEP_TYPE_S5 => Some(SystemRequest::PowerOff),
                    SLEEP_TYPE_S3 => Some(SystemRequest::Sleep),
                    _ => None,
                };
                if let Some(request) = request.filter(|_| control.sleep_enable()) {
                    drop(state);
                    self.system.request(request);
                    return;
                }
            }
        }
        self.update_sci(&state);
    }
}

impl PortDevice for PowerManagement {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        match (offset, width) {
            (PM_TIMER, Width::Dword) => Ok(self.rate.count_at(self.clock.now()) as u32),
            (8..=11, Width::Byte) => {
                let timer = self.rate.count_at(self.clock.now()) as u32;
                Ok(timer >> (8 * (offset - PM_TIMER)) & 0xff)
            }
            (0 | 2 | 4, Width::Word) => Ok(u32::from(self.read_word(offset))),
            (0..=5, Width::Byte) => {
                Ok(u32::from(self.read_word(offset & !1)) >> (8 * (offset & 1)) & 0xff)
            }
            // The two halves of the event block at once.
            (0, Width::Dword) => {
                Ok(u32::from(self.read_word(0)) | u32::from(self.read_word(2)) << 16)
            }
            (0..PM_PORTS, _) => Err(IoError::InvalidWidth),
            _ => Err(IoError::InvalidRegister),
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        match (offset, width) {
            (0 | 2 | 4, Width::Word) => self.write_word(offset, value as u16, 0xffff),
            (0..=5, Width::Byte) => {
                let shift = 8 * (offset & 1);
                self.write_word(offset & !1, (value as u16 & 0xff) << shift, 0xff << shift);
            }
            (0, Width::Dword) => {
                self.write_word(0, value as u16, 0xffff);
                self.write_word(2, (value >> 16) as u16, 0xffff);
            }
            // The timer is read-only.
            (8..=11, _) => {}
            (0..PM_PORTS, _) => return Err(IoError::InvalidWidth),
            _ => return Err(IoError::InvalidRegister),
        }
        Ok(())
    }
}

/// Port of the reset control register.
pub const RESET_PORT: u16 = 0xcf9;

/// Reset control register (Intel PCH data sheets, RST_CNT).
#[bitfield(u8)]
struct ResetControlBits {
    __: bool,
    system_reset: bool,
    reset_cpu: bool,
    full_reset: bool,
    #[bits(4)]
    __: u8,
}

/// The reset control register at port 0xCF9.
pub struct ResetControl {
    state: Mutex<ResetControlBits>,
    system: Arc<dyn SystemControl>,
}

impl ResetControl {
    /// The register after reset.
    pub fn new(system: Arc<dyn SystemControl>) -> Arc<Self> {
        Arc::new(ResetControl {
            state: Mutex::new(ResetControlBits::new()),
            system,
        })
    }
}

impl PortDevice for ResetControl {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        Ok(u32::from(self.state.lock().into_bits()))
    }

    fn write(&self, _offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let value = ResetControlBits::from_bits(value as u8);
        // The reset bit acts and does not stay.
        *self.state.lock() = ResetControlBits::new()
            .with_system_reset(value.system_reset())
            .with_full_reset(value.full_reset());
        if value.reset_cpu() {
            self.system
                .request(SystemRequest::Reset(ResetSource::ResetControl));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeClock, RecordingSink, Requests};
    use proptest::prelude::*;

    struct Setup {
        pm: Arc<PowerManagement>,
        clock: Arc<FakeClock>,
        sci: Arc<RecordingSink>,
        requests: Arc<Requests>,
    }

    fn setup() -> Setup {
        let clock = FakeClock::new(PM_TIMER_HZ * 2);
        let sci = Arc::new(RecordingSink::default());
        let requests = Arc::new(Requests::default());
        Setup {
            pm: PowerManagement::new(clock.clone(), Line::new(sci.clone(), 9), requests.clone()),
            clock,
            sci,
            requests,
        }
    }

    #[test]
    fn timer_counts_and_wraps_at_32_bits() {
        let s = setup();
        s.clock.set(2000);
        assert_eq!(s.pm.read(8, Width::Dword), Ok(1000));
        s.clock.set(((1 << 32) + 5) * 2);
        assert_eq!(s.pm.read(8, Width::Dword), Ok(5));
        assert_eq!(s.pm.read(8, Width::Byte), Ok(5));
        assert_eq!(s.pm.write(8, Width::Dword, 77), Ok(()));
        assert_eq!(s.pm.read(8, Width::Dword), Ok(5));
        assert_eq!(s.pm.read(8, Width::Word), Err(IoError::InvalidWidth));
    }

    #[test]
    fn the_top_bit_raises_the_sci_when_enabled() {
        let s = setup();
        assert_eq!(s.pm.deadline(), None);
        s.pm.write(2, Width::Word, 1).unwrap();
        let due = s.pm.deadline().unwrap();
        assert_eq!(due, 2 << 31);
        s.clock.set(due);
        s.pm.poll(due);
        assert!(s.sci.is_high(9));
        assert_eq!(s.pm.deadline(), None, "until acknowledged");
        s.pm.write(0, Width::Word, 1).unwrap();
        assert!(!s.sci.is_high(9));
        assert_eq!(s.pm.deadline(), Some(4 << 31));
    }

    #[test]
    fn power_button() {
        let s = setup();
        s.pm.press_power_button();
        assert!(!s.sci.is_high(9));
        assert_eq!(s.pm.read(0, Width::Word), Ok(0x100));
        s.pm.write(3, Width::Byte, 1).unwrap();
        assert_eq!(s.pm.read(2, Width::Word), Ok(0x100));
        assert!(s.sci.is_high(9));
        s.pm.write(1, Width::Byte, 1).unwrap();
        assert!(!s.sci.is_high(9));
    }

    #[test]
    fn soft_off() {
        let s = setup();
        assert_eq!(s.pm.read(4, Width::Word), Ok(1), "ACPI mode");
        s.pm.write(4, Width::Word, 5 << 10).unwrap();
        s.pm.write(4, Width::Word, 1 | 1 << 13 | 3 << 10).unwrap();
        assert_eq!(s.requests.take(), []);
        s.pm.write(4, Width::Word, 1 | 5 << 10).unwrap();
        assert_eq!(s.pm.read(4, Width::Word), Ok(1 | 5 << 10));
        s.pm.write(4, Width::Word, 1 | 1 << 13 | 5 << 10).unwrap();
        assert_eq!(s.requests.take(), [], "another sleep state");
        s.pm.write(4, Width::Word, 1 << 13).unwrap();
        assert_eq!(s.requests.take(), [SystemRequest::PowerOff]);
        s.pm.write(5, Width::Byte, 0x20).unwrap();
        assert_eq!(s.requests.take(), [SystemRequest::PowerOff]);
    }

    #[test]
    fn sleep_and_what_wakes() {
        let s = setup();
        s.pm.write(4, Width::Word, 1 << 13 | 1 << 10).unwrap();
        assert_eq!(s.requests.take(), [SystemRequest::Sleep]);
        s.pm.alarm();
        assert!(!s.pm.wake(), "not asked for");
        s.pm.write(2, Width::Word, 0x400).unwrap();
        assert!(s.pm.wake());
        assert_eq!(s.pm.read(0, Width::Word), Ok(0x8400));
        s.pm.write(0, Width::Word, 0x8400).unwrap();
        assert!(!s.pm.wake());
        s.pm.write(2, Width::Word, 0x100).unwrap();
        s.pm.press_power_button();
        assert!(s.pm.wake());
    }

    #[test]
    fn reset_register() {
        let requests = Arc::new(Requests::default());
        let reset = ResetControl::new(requests.clone());
        reset.write(0, Width::Byte, 0x02).unwrap();
        assert_eq!(requests.take(), []);
        assert_eq!(reset.read(0, Width::Byte), Ok(2));
        reset.write(0, Width::Byte, u32::from(RESET_VALUE)).unwrap();
        assert_eq!(
            requests.take(),
            [SystemRequest::Reset(ResetSource::ResetControl)]
        );
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in proptest::collection::vec((any::<bool>(), 0u16..16, 0usize..3, any::<u32>()), 0..200),
        ) {
            let s = setup();
            let mut now = 0u64;
            for (write, offset, width, value) in steps {
                let width = [Width::Byte, Width::Word, Width::Dword][width];
                if write {
                    let _ = s.pm.write(offset, width, value);
                } else {
                    let _ = s.pm.read(offset, width);
                }
                now = now.saturating_add(u64::from(value) << (offset * 4 % 40));
                s.clock.set(now);
                s.pm.poll(now);
                prop_assert!(s.pm.deadline().is_none_or(|d| d > now || now == u64::MAX));
            }
        }
    }
}
