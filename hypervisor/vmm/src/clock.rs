//! A VM's time: guest TSC ticks since it started, and the paravirtual clock page.
//!
//! The VM's clock is the host's TSC at the guest's rate (`virt::TscScale`), less its value when the VM was made, and
//! less the time for which the VM was paused: a paused VM's clock stands still. Devices read it through
//! `devices::time::Clock`. All that is told of the guest's TSC, and every way between its ticks and the host's, is here. A guest
//! that speaks Linux' KVM clock gets the same time in nanoseconds, by a page that it reads without an exit
//! (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).

use core::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use devices::{lapic::LocalApicConfig, time::Clock};
use mem::{Gpa, guest::GuestMemory};
use virt::{TscScale, TscScaling};

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

/// A host without TSC scaling gives a guest its own rate for one that differs by less than this many parts per
/// million: clocks that follow the time of day make up for more.
const TOLERANCE_PPM: u64 = 250;

/// Why a guest's TSC cannot have the rate that it was to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateError {
    /// The rate asked for, in Hz.
    pub wanted: u64,
    /// The host's, in Hz.
    pub host: u64,
    /// The processor scales, but not so far.
    pub scales: bool,
}

impl fmt::Display for RateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (wanted, host) = (self.wanted / 1000, self.host / 1000);
        let why = if self.scales {
            "cannot scale it so far"
        } else {
            "has no TSC scaling"
        };
        write!(
            f,
            "its TSC cannot run at {wanted} kHz: this host's runs at {host} kHz, and the processor {why}"
        )
    }
}

/// The rate of a guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRate {
    /// From the host's ticks.
    pub scale: TscScale,
    /// Ticks per second.
    pub hz: u64,
}

impl GuestRate {
    /// The rate `wanted` in Hz, beside a host's TSC of `host` Hz; without a wish the host's.
    ///
    /// # Errors
    /// This hardware cannot give it.
    pub fn choose(
        host: u64,
        wanted: Option<u64>,
        scaling: Option<TscScaling>,
    ) -> Result<Self, RateError> {
        let same = GuestRate {
            scale: TscScale::SAME,
            hz: host,
        };
        let Some(wanted) = wanted.filter(|&hz| hz != host) else {
            return Ok(same);
        };
        let error = RateError {
            wanted,
            host,
            scales: scaling.is_some(),
        };
        match scaling {
            Some(scaling) => match scaling.scale(host, wanted) {
                Some(scale) => Ok(GuestRate { scale, hz: wanted }),
                None => Err(error),
            },
            None if host.abs_diff(wanted) <= host / 1_000_000 * TOLERANCE_PPM => Ok(same),
            None => Err(error),
        }
    }
}

/// The clock of one VM.
#[derive(Debug)]
pub struct VmClock {
    source: TimeSource,
    rate: GuestRate,
    /// What the guest's TSC without offset showed when the clock showed zero, more by all that it has skipped.
    start: AtomicU64,
    /// Guest ticks that it has skipped.
    skipped: AtomicU64,
}

impl VmClock {
    /// A clock of this rate that shows zero now.
    pub fn start(source: TimeSource, rate: GuestRate) -> Self {
        VmClock {
            source,
            rate,
            start: AtomicU64::new(rate.scale.to_guest((source.read)())),
            skipped: AtomicU64::new(0),
        }
    }

    /// What makes the guest's ticks of the host's.
    pub fn scale(&self) -> TscScale {
        self.rate.scale
    }

    #[inline]
    fn start_tick(&self) -> u64 {
        self.start.load(Ordering::Relaxed)
    }

    /// Host TSC now.
    pub fn host_now(&self) -> u64 {
        (self.source.read)()
    }

    /// Ticks per second of the local APICs' timers: a bus is no faster than its processor.
    pub fn apic_timer_hz(&self) -> u64 {
        LocalApicConfig::new(0).timer_hz.min(self.rate.hz)
    }

    /// Ticks of the host's TSC per second.
    pub fn host_hz(&self) -> u64 {
        self.source.hz
    }

    /// Takes `host_ticks` of the past out of the VM's time; says how many of its own these are. The VM's vCPUs must be
    /// at rest; each takes the new [`VmClock::tsc_offset`] before it runs again.
    pub fn skip(&self, host_ticks: u64) -> u64 {
        let ticks = self.rate.scale.to_guest(host_ticks);
        self.skipped.fetch_add(ticks, Ordering::Relaxed);
        self.start.fetch_add(ticks, Ordering::Relaxed);
        ticks
    }

    /// Seconds that it has skipped.
    pub fn skipped_seconds(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed) / self.rate.hz.max(1)
    }

    /// Guest TSC of an unadjusted vCPU minus the scaled host TSC, wrapping.
    pub fn tsc_offset(&self) -> u64 {
        self.start_tick().wrapping_neg()
    }

    /// Whether a guest may read it on any vCPU and find it never going back.
    pub fn stable(&self) -> bool {
        self.source.stable
    }

    /// First host TSC at which this clock shows `ticks`.
    pub fn to_host(&self, ticks: u64) -> u64 {
        self.rate
            .scale
            .to_host(self.start_tick().saturating_add(ticks))
    }
}

impl Clock for VmClock {
    fn now(&self) -> u64 {
        let shown = self.rate.scale.to_guest((self.source.read)());
        shown.wrapping_sub(self.start_tick())
    }

    fn hz(&self) -> u64 {
        self.rate.hz
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

    const HOST_HZ: u64 = 2_000_000_000;

    std::thread_local! {
        static HOST_TSC: core::cell::Cell<u64> = const { core::cell::Cell::new(0) };
    }

    /// A clock at `hz` on a processor of either vendor, started when the host's TSC showed 5 s.
    fn clock(hz: u64, scaling: TscScaling) -> VmClock {
        HOST_TSC.set(5 * HOST_HZ);
        let source = TimeSource {
            read: || HOST_TSC.get(),
            hz: HOST_HZ,
            stable: true,
        };
        let rate = GuestRate::choose(HOST_HZ, Some(hz), Some(scaling)).expect("in range");
        VmClock::start(source, rate)
    }

    #[test]
    fn a_clock_of_its_own_rate_is_what_the_guest_reads() {
        for scaling in [TscScaling::VTX, TscScaling::AMD_V] {
            for hz in [HOST_HZ, 1_000_000_000, 3_333_333_000] {
                let clock = clock(hz, scaling);
                assert_eq!((clock.hz(), clock.now()), (hz, 0));
                HOST_TSC.set(17 * HOST_HZ + 12_345);
                // What the processor shows: the product and the offset.
                let shown = clock.scale().to_guest(HOST_TSC.get());
                assert_eq!(shown.wrapping_add(clock.tsc_offset()), clock.now());
                assert!(clock.now().abs_diff(12 * hz) < 12_345 * 2 + hz / 1_000_000_000);
                // A deadline is met at its host tick, and not one before.
                let due = clock.now() + 777;
                let at = clock.to_host(due);
                HOST_TSC.set(at);
                assert!(clock.now() >= due);
                HOST_TSC.set(at - 1);
                assert!(clock.now() < due);
            }
        }
    }

    #[test]
    fn a_pause_is_skipped_in_the_guests_ticks() {
        let clock = clock(500_000_000, TscScaling::AMD_V);
        HOST_TSC.set(6 * HOST_HZ);
        let before = clock.now();
        HOST_TSC.set(9 * HOST_HZ);
        assert_eq!(clock.skip(3 * HOST_HZ), 3 * 500_000_000);
        assert_eq!((clock.now(), clock.skipped_seconds()), (before, 3));
        let shown = clock.scale().to_guest(HOST_TSC.get());
        assert_eq!(shown.wrapping_add(clock.tsc_offset()), before);
    }

    #[test]
    fn without_scaling_only_the_hosts_own_rate_is_had() {
        let choose = |hz| GuestRate::choose(HOST_HZ, Some(hz), None);
        let same = GuestRate {
            scale: TscScale::SAME,
            hz: HOST_HZ,
        };
        assert_eq!(GuestRate::choose(HOST_HZ, None, None), Ok(same));
        // Within 250 ppm it gets the host's, and is told so.
        for hz in [HOST_HZ, HOST_HZ + 500_000, HOST_HZ - 500_000] {
            assert_eq!(choose(hz), Ok(same));
        }
        let text = |rate: Result<GuestRate, RateError>| rate.expect_err("refused").to_string();
        let words = text(choose(HOST_HZ + 500_001));
        assert!(words.contains("2000500 kHz"), "{words}");
        assert!(
            words.contains("2000000 kHz") && words.contains("no TSC scaling"),
            "{words}"
        );
        let scaling = Some(TscScaling::AMD_V);
        let far = GuestRate::choose(1_000_000, Some(900_000_000), scaling);
        assert!(text(far).contains("so far"));
    }

    #[test]
    fn multiplier_uses_its_top_bit() {
        for hz in [100_000_000, 1_000_000_000, 2_000_000_000, 4_200_000_000] {
            assert!(TickScale::new(hz).multiplier >= 1 << 31, "{hz}");
        }
    }
}
