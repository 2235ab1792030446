//! A VM's time: guest TSC ticks since it started, and the paravirtual clock page.
//!
//! The VM's clock is the host's TSC less its value when the VM was made, and less the time for which the VM
//! was paused: a paused VM's clock stands still. Devices read it through `devices::time::Clock`. A guest
//! that speaks Linux' KVM clock gets the same time in nanoseconds, by a page that it reads without an exit
//! (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).

use core::sync::atomic::{AtomicU64, Ordering};

use devices::time::Clock;
use mem::{Gpa, guest::GuestMemory};

/// The host's TSC.
#[derive(Clone, Copy, Debug)]
pub struct TimeSource {
    /// Reads it, in ticks.
    pub read: fn() -> u64,
    /// Ticks per second.
    pub hz: u64,
    /// It never changes its rate, and shows the same on every processor.
    pub stable: bool,
}

/// The clock of one VM.
#[derive(Debug)]
pub struct VmClock {
    source: TimeSource,
    /// Host TSC at which it showed zero, later by all that it has skipped.
    start: AtomicU64,
    /// Ticks that it has skipped.
    skipped: AtomicU64,
}

impl VmClock {
    /// A clock that shows zero now.
    pub fn start(source: TimeSource) -> Self {
        VmClock {
            source,
            start: AtomicU64::new((source.read)()),
            skipped: AtomicU64::new(0),
        }
    }

    #[inline]
    fn start_tsc(&self) -> u64 {
        self.start.load(Ordering::Relaxed)
    }

    /// Host TSC now.
    pub fn host_now(&self) -> u64 {
        (self.source.read)()
    }

    /// Takes `ticks` of the past out of the VM's time. The VM's vCPUs must be at rest; each takes the new
    /// [`VmClock::tsc_offset`] before it runs again.
    pub fn skip(&self, ticks: u64) {
        self.skipped.fetch_add(ticks, Ordering::Relaxed);
        self.start.fetch_add(ticks, Ordering::Relaxed);
    }

    /// Seconds that it has skipped.
    pub fn skipped_seconds(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed) / self.source.hz.max(1)
    }

    /// Guest TSC of an unadjusted vCPU minus host TSC, wrapping.
    pub fn tsc_offset(&self) -> u64 {
        self.start_tsc().wrapping_neg()
    }

    /// Whether a guest may read it on any vCPU and find it never going back.
    pub fn stable(&self) -> bool {
        self.source.stable
    }

    /// Host TSC at which this clock shows `ticks`.
    pub fn to_host(&self, ticks: u64) -> u64 {
        self.start_tsc().saturating_add(ticks)
    }
}

impl Clock for VmClock {
    fn now(&self) -> u64 {
        (self.source.read)().wrapping_sub(self.start_tsc())
    }

    fn hz(&self) -> u64 {
        self.source.hz
    }
}

/// Factor and shift that turn TSC ticks into nanoseconds:
/// `ns = ((ticks << shift) * multiplier) >> 32`, with a right shift for a negative `shift`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TickScale {
    /// Fixed-point factor with 32 fractional bits.
    pub multiplier: u32,
    /// Power of two applied first.
    pub shift: i8,
}

impl TickScale {
    /// The most precise scale for a TSC of `hz` ticks per second.
    pub fn new(hz: u64) -> Self {
        const NS: u64 = 1_000_000_000;
        let mut ticks = hz.max(1);
        let mut shift = 0i8;
        // Bring the rate to (NS, 2 * NS], so that the factor uses its top bit.
        while ticks > 2 * NS {
            ticks >>= 1;
            shift -= 1;
        }
        while ticks <= NS {
            ticks <<= 1;
            shift += 1;
        }
        let multiplier = ((u128::from(NS) << 32) / u128::from(ticks)) as u32;
        TickScale { multiplier, shift }
    }

    /// Nanoseconds in `ticks`.
    pub fn to_ns(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 {
            u128::from(ticks) << self.shift
        } else {
            u128::from(ticks >> -self.shift)
        };
        ((shifted * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// Bytes of `struct pvclock_vcpu_time_info`.
const TIME_INFO_BYTES: usize = 32;
/// `flags` bit 0: the clock is the same on all vCPUs.
const TSC_STABLE: u8 = 1;

/// Writes the time page of a vCPU whose TSC runs `adjust` ticks ahead of the VM's clock.
/// The clock's rate is taken as constant, so that the page is written once; that it is, and the same on
/// all vCPUs, is said only where the host's TSC is known to be.
///
/// Returns `false` when the page is not in the guest's RAM.
#[must_use]
pub fn write_time_info(memory: &GuestMemory, at: Gpa, clock: &VmClock, adjust: u64) -> bool {
    let scale = TickScale::new(clock.hz());
    let mut info = [0u8; TIME_INFO_BYTES];
    // version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags, pad.
    info[0..4].copy_from_slice(&2u32.to_le_bytes());
    info[8..16].copy_from_slice(&adjust.to_le_bytes());
    info[16..24].copy_from_slice(&0u64.to_le_bytes());
    info[24..28].copy_from_slice(&scale.multiplier.to_le_bytes());
    info[28..29].copy_from_slice(&scale.shift.to_le_bytes());
    info[29] = if clock.stable() { TSC_STABLE } else { 0 };
    memory.write(at, &info).is_ok()
}

/// Writes the wall-clock page: the Unix time, in seconds, at which the VM's clock showed zero.
///
/// Returns `false` when the page is not in the guest's RAM.
#[must_use]
pub fn write_wall_clock(memory: &GuestMemory, at: Gpa, epoch: u64) -> bool {
    let mut page = [0u8; 12];
    page[0..4].copy_from_slice(&2u32.to_le_bytes());
    page[4..8].copy_from_slice(&(epoch as u32).to_le_bytes());
    memory.write(at, &page).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn scale_is_exact_to_a_part_in_ten_million(
            hz in 10_000_000u64..6_000_000_000, seconds in 1u64..100_000) {
            let ns = TickScale::new(hz).to_ns(hz * seconds);
            let expected = seconds * 1_000_000_000;
            prop_assert!(ns.abs_diff(expected) <= expected / 10_000_000, "{ns} {expected}");
        }
    }

    #[test]
    fn multiplier_uses_its_top_bit() {
        for hz in [100_000_000, 1_000_000_000, 2_000_000_000, 4_200_000_000] {
            assert!(TickScale::new(hz).multiplier >= 1 << 31, "{hz}");
        }
    }
}
