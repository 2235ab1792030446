//! The host's clock: the time-stamp counter, and what it counts per second.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::percpu;

/// TSC at the kernel's first instruction.
pub static ENTRY_TSC: AtomicU64 = AtomicU64::new(0);

/// Ticks per second; 0 until calibrated.
static HZ: AtomicU64 = AtomicU64::new(0);

/// What is known of the TSC beyond its rate.
static INVARIANT: AtomicBool = AtomicBool::new(false);
static SKEWED: AtomicBool = AtomicBool::new(false);

/// The time-stamp counter now.
#[inline(always)]
pub fn now_tsc() -> u64 {
    // SAFETY: RDTSC has no effect other than its result.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Notes when the kernel was entered. First thing in `boot`.
pub fn start() {
    ENTRY_TSC.store(now_tsc(), Ordering::Relaxed);
}

/// TSC ticks per second; 0 until [`set_hz`].
pub fn hz() -> u64 {
    HZ.load(Ordering::Relaxed)
}

/// Sets what calibration found, in ticks per second.
pub fn set_hz(hz: u64) {
    HZ.store(hz, Ordering::Relaxed);
}

/// Notes whether CPUID calls the TSC invariant.
pub fn set_invariant(invariant: bool) {
    INVARIANT.store(invariant, Ordering::Relaxed);
}

/// Notes that two processors' TSCs were seen to differ.
pub fn note_skew() {
    SKEWED.store(true, Ordering::Relaxed);
}

/// Whether the TSC shows the same on every processor, as far as can be told: there is one, or all
/// have an invariant TSC and none was seen to be off.
pub fn is_stable() -> bool {
    percpu::count() == 1 || INVARIANT.load(Ordering::Relaxed) && !SKEWED.load(Ordering::Relaxed)
}

/// TSC ticks in microseconds; 0 before calibration.
#[cfg(feature = "selftest")]
pub fn ticks_to_us(ticks: u64) -> u64 {
    match hz() {
        0 => 0,
        hz => (u128::from(ticks) * 1_000_000 / u128::from(hz)) as u64,
    }
}

/// Microseconds in TSC ticks; 0 before calibration.
pub fn us_to_ticks(us: u64) -> u64 {
    (u128::from(us) * u128::from(hz()) / 1_000_000) as u64
}

/// TSC ticks in nanoseconds; 0 before calibration.
pub fn ticks_to_ns(ticks: u64) -> u64 {
    match hz() {
        0 => 0,
        hz => (u128::from(ticks) * 1_000_000_000 / u128::from(hz)) as u64,
    }
}

/// Nanoseconds since the kernel was entered; 0 before calibration.
pub fn ns() -> u64 {
    ticks_to_ns(now_tsc().wrapping_sub(ENTRY_TSC.load(Ordering::Relaxed)))
}
