//! What firmware does when a PC that has run starts again with its memory as it was, for VMs without firmware.
//!
//! Two ways lead there: the boot processor is sent an INIT, and the machine wakes from S3. Firmware looks at the
//! shutdown code in CMOS memory, or at the waking vector in the FACS, and jumps to where the system has said.
//!
//! S3 is the PIIX4's sleep type, which small systems enter without a look at the tables. The tables do not offer it:
//! what each device keeps over a sleep is nowhere written.

use alloc::sync::Arc;

use devices::{pm::PowerManagement, rtc::Rtc, system::RunState};
use mem::{Gpa, guest::GuestMemory};
use virt::{CpuState, SegmentName};

/// Offset of the waking vector in the FACS (ACPI 6.5, table 5.12).
const WAKING_VECTOR: u64 = 12;
/// Where a system leaves the address to start at, segment and offset, for [`JUMP_CODES`].
const WARM_RESET_VECTOR: Gpa = Gpa(0x467);
/// Shutdown codes that mean: jump to the warm reset vector (with and without an EOI first).
const JUMP_CODES: [u8; 2] = [0x05, 0x0a];

/// The parts of a VM without firmware that matter then.
pub(crate) struct WarmStart {
    state: Arc<RunState>,
    power: Arc<PowerManagement>,
    rtc: Arc<Rtc>,
    facs: Gpa,
}

impl WarmStart {
    /// Of the VM with these devices, whose FACS is at `facs`.
    pub(crate) fn new(
        state: Arc<RunState>,
        power: Arc<PowerManagement>,
        rtc: Arc<Rtc>,
        facs: Gpa,
    ) -> Self {
        WarmStart {
            state,
            power,
            rtc,
            facs,
        }
    }

    /// Whether the VM sleeps.
    pub(crate) fn sleeps(&self) -> bool {
        self.state.has(RunState::ASLEEP)
    }

    /// Whether something has come that wakes it: then it sleeps no more.
    pub(crate) fn wakes(&self) -> bool {
        if self.rtc.has_alarm() {
            self.power.alarm();
        }
        let wakes = self.power.wake();
        if wakes {
            self.state.set(RunState::ASLEEP, false);
        }
        wakes
    }

    /// How the boot processor starts after a sleep; `None`: the system has not said where.
    pub(crate) fn waking_state(&self, memory: &GuestMemory) -> Option<CpuState> {
        let vector = memory.read_u32(self.facs + WAKING_VECTOR).ok()?;
        // In real mode: the segment is the address without its last digit (ACPI 6.5, section 5.2.10).
        (vector != 0 && vector < 1 << 20)
            .then(|| real_mode((vector >> 4) as u16, vector as u16 & 0xf))
    }

    /// How the boot processor starts after an INIT; `None`: from the beginning, as after a reset.
    pub(crate) fn warm_state(&self, memory: &GuestMemory) -> Option<CpuState> {
        if !JUMP_CODES.contains(&self.rtc.shutdown_code()) {
            return None;
        }
        let vector = memory.read_u32(WARM_RESET_VECTOR).ok()?;
        Some(real_mode((vector >> 16) as u16, vector as u16))
    }
}

/// A processor after reset that goes on at an address of real mode.
fn real_mode(segment: u16, offset: u16) -> CpuState {
    let mut state = CpuState::reset();
    let cs = &mut state.segments[SegmentName::Cs as usize];
    (cs.selector, cs.base) = (segment, u64::from(segment) << 4);
    state.rip = offset.into();
    state
}
