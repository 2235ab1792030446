//! Finds out how fast the TSC and the APIC timer run, and says how sure that is.

use alloc::vec::Vec;

use drivers::{
    clock::{Calibration, Frequency, Reference, calibrate},
    firmware::Firmware,
};
use mem::Hpa;

use crate::{cpu, info, interrupts, memory, time, warn};

/// Two references may differ by this much, in parts per million, before it is worth a warning.
/// An emulator's references are rounded to its own steps, a PC's crystals are within 100.
const TOLERANCE_PPM: u64 = 1000;

/// The references of this machine, best first.
fn references(firmware: &Firmware) -> Vec<Reference> {
    let hpet = firmware.hpet.and_then(|registers| {
        let registers = memory::map_device(Hpa(registers), mem::PAGE_SIZE);
        // SAFETY: the firmware names an HPET there; just mapped, uncached; nobody else drives it.
        unsafe { Reference::hpet(registers.cast()) }
    });
    // SAFETY: the firmware names the timer's port.
    let pm_timer = firmware
        .pm_timer
        .map(|timer| unsafe { Reference::pm_timer(timer.port, timer.wide) });
    // SAFETY: the kernel owns the PIT; where there is none its ports are unused.
    let pit = unsafe { Reference::pit() };
    hpet.into_iter().chain(pm_timer).chain([pit]).collect()
}

/// What CPUID says about the TSC (leaf 15H, else the base frequency of leaf 16H), in ticks per second.
fn by_cpuid() -> Option<u64> {
    let cpuid = cpu::cpuid();
    cpuid
        .get_tsc_info()
        .and_then(|info| info.tsc_frequency())
        .or_else(|| {
            let mhz = cpuid
                .get_processor_frequency_info()?
                .processor_base_frequency();
            Some(u64::from(mhz) * 1_000_000)
        })
        .filter(|&hz| hz > 0)
}

/// Calibrates, reports, and sets the clock and the timer's scale. After `interrupts::init`.
///
/// # Panics
/// No reference runs and CPUID gives no figure: without a clock no guest can run.
pub fn run(firmware: &Firmware) {
    let apic = interrupts::apic();
    apic.use_one_shot_timer(interrupts::vector::TIMER);
    apic.start_timer(u32::MAX);
    let result = calibrate(&mut references(firmware), || apic.timer_count());
    apic.start_timer(0);
    let result = result.unwrap_or_else(|| {
        let hz = by_cpuid()
            .expect("no working HPET, power-management timer or PIT, and CPUID gives no frequency");
        warn!("no reference clock runs: the processor's own figure for its TSC is used");
        Calibration {
            tsc: Frequency { hz, by: "CPUID" },
            check: None,
            // The APIC timer of processors with leaf 15H counts that leaf's crystal; a wrong figure makes timers early or late.
            apic_timer_hz: cpu::cpuid()
                .get_tsc_info()
                .map_or(hz, |info| u64::from(info.nominal_frequency())),
        }
    });
    time::set_hz(result.tsc.hz);
    interrupts::set_timer_hz(result.apic_timer_hz);
    interrupts::init_timer();
    report(&result);
}

fn report(result: &Calibration) {
    let Frequency { hz, by } = result.tsc;
    match (result.check, result.disagreement_ppm()) {
        (Some(check), Some(ppm)) => {
            info!(
                "TSC {} by {by}, {} by {}: {ppm} ppm apart",
                Mhz(hz),
                Mhz(check.hz),
                check.by
            );
            if ppm > TOLERANCE_PPM {
                warn!(
                    "the two clocks disagree: one of them is wrong, and guests' clocks may drift"
                );
            }
        }
        _ => info!("TSC {} by {by}, with no second clock to check", Mhz(hz)),
    }
    let invariant = cpu::cpuid()
        .get_advanced_power_mgmt_info()
        .is_some_and(|info| info.has_invariant_tsc());
    time::set_invariant(invariant);
    if !invariant {
        warn!(
            "the TSC is not invariant: guests' clocks drift if the processor changes its speed or sleeps"
        );
    }
}

/// A frequency in MHz with three decimals.
pub struct Mhz(pub u64);

impl core::fmt::Display for Mhz {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let khz = (self.0 + 500) / 1000;
        write!(f, "{}.{:03} MHz", khz / 1000, khz % 1000)
    }
}
