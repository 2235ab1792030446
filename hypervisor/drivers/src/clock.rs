//! Reference clocks, and how fast the TSC and the APIC timer run against them.
//!
//! A reference has a frequency that is fixed by its specification or that it tells itself:
//! HPET, ACPI power-management timer, PIT. Two of them are read over the same stretch of
//! time, so a wrong one shows. CPUID's own figures (leaves 15H and 16H) are not trusted:
//! emulators, Bochs 2.7 among them, give figures that their TSC does not keep.

use core::arch::x86_64::_rdtsc;

use x86_64::instructions::port::Port;

/// Frequency of the power-management timer (ACPI 6.5, section 4.8.3.3).
const PM_TIMER_HZ: u64 = 3_579_545;
/// Frequency of the PIT.
const PIT_HZ: u64 = 1_193_182;
/// Length of a measurement: 20 ms, well within the 54 ms after which the PIT's counter repeats.
const MEASUREMENT_US: u64 = 20_000;
/// Reads, of about a microsecond each on a PC, after which a reference that shows the same count stands still.
const SAME_READS: u32 = 100_000;
/// Readings of which the quickest is taken, so that an interruption (SMI, host of an emulator) does not count.
const ATTEMPTS: u32 = 5;
/// Femtoseconds in a second.
const FS_PER_S: u64 = 1_000_000_000_000_000;
/// Longest period that an HPET may have, in femtoseconds (IA-PC HPET 1.0a, section 2.3.4).
const HPET_LONGEST_PERIOD: u64 = 100_000_000;

/// A counter of known frequency.
#[derive(Debug)]
enum Counter {
    Hpet(*mut u64),
    PmTimer(u16),
    Pit,
}

/// A reference clock.
#[derive(Debug)]
pub struct Reference {
    /// "HPET", "PM timer" or "PIT".
    pub name: &'static str,
    hz: u64,
    /// Highest value of the counter; the one after it is 0.
    mask: u64,
    counter: Counter,
}

impl Reference {
    /// The HPET, set running. `None`: what is there is no HPET.
    ///
    /// # Safety
    /// `registers` must be the uncached mapping of an HPET that nobody else drives.
    pub unsafe fn hpet(registers: *mut u64) -> Option<Self> {
        /// Offsets in 64-bit words: capabilities 0x00, configuration 0x10, main counter 0xf0.
        const CONFIGURATION: usize = 2;
        const MAIN_COUNTER: usize = 30;
        const COUNT_SIZE_64: u64 = 1 << 13;
        const ENABLE: u64 = 1;
        // SAFETY: the caller vouches for the device; the offsets are its registers.
        let capabilities = unsafe {
            let configuration = registers.add(CONFIGURATION);
            configuration.write_volatile(configuration.read_volatile() | ENABLE);
            registers.read_volatile()
        };
        let period = capabilities >> 32;
        if period == 0 || period > HPET_LONGEST_PERIOD {
            return None;
        }
        Some(Reference {
            name: "HPET",
            hz: FS_PER_S / period,
            mask: match capabilities & COUNT_SIZE_64 {
                0 => u64::from(u32::MAX),
                _ => u64::MAX,
            },
            // SAFETY: the main counter lies in the same page.
            counter: Counter::Hpet(unsafe { registers.add(MAIN_COUNTER) }),
        })
    }

    /// The ACPI power-management timer.
    ///
    /// # Safety
    /// `port` must be the counter's.
    pub unsafe fn pm_timer(port: u16, wide: bool) -> Self {
        Reference {
            name: "PM timer",
            hz: PM_TIMER_HZ,
            mask: if wide { u64::from(u32::MAX) } else { 0xff_ffff },
            counter: Counter::PmTimer(port),
        }
    }

    /// Channel 2 of the PIT, set running through its whole range with the speaker off.
    ///
    /// # Safety
    /// Nobody else may drive the PIT; on a machine without one the ports must be unused.
    pub unsafe fn pit() -> Self {
        let mut gate = Port::<u8>::new(0x61);
        // SAFETY: the caller vouches for the ports: gate on and speaker off, mode 0, count 0xffff.
        unsafe {
            let old = gate.read();
            gate.write(old & !0b10 | 0b01);
            Port::<u8>::new(0x43).write(0b1011_0000);
            Port::<u8>::new(0x42).write(0xff);
            Port::<u8>::new(0x42).write(0xff);
        }
        Reference {
            name: "PIT",
            hz: PIT_HZ,
            mask: 0xffff,
            counter: Counter::Pit,
        }
    }

    fn read(&mut self) -> u64 {
        match self.counter {
            // SAFETY: the constructor's caller vouched for the device.
            Counter::Hpet(main) => unsafe { main.read_volatile() & self.mask },
            // SAFETY: as above; reading has no side effect.
            Counter::PmTimer(port) => unsafe {
                u64::from(Port::<u32>::new(port).read()) & self.mask
            },
            // SAFETY: as above: latch channel 2, read low and high byte; it counts down.
            Counter::Pit => unsafe {
                Port::<u8>::new(0x43).write(0b1000_0000);
                let mut data = Port::<u8>::new(0x42);
                let (low, high) = (data.read(), data.read());
                self.mask - u64::from(u16::from_le_bytes([low, high]))
            },
        }
    }

    /// Counter and TSC at one moment.
    fn sample(&mut self) -> Sample {
        let mut best = None;
        for _ in 0..ATTEMPTS {
            let before = rdtsc();
            let count = self.read();
            let after = rdtsc();
            let cost = after.wrapping_sub(before);
            if best.is_none_or(|(_, least)| cost < least) {
                best = Some((
                    Sample {
                        count,
                        tsc: before.wrapping_add(cost / 2),
                    },
                    cost,
                ));
            }
        }
        best.map(|(sample, _)| sample).unwrap_or_default()
    }

    /// Waits until the counter is `wanted` ticks past `start`. `false`: it stands still.
    fn wait(&mut self, start: u64, wanted: u64) -> bool {
        let mut last = start;
        let mut same = 0;
        while self.ticks_between(start, last) < wanted {
            let now = self.read();
            same = if now == last { same + 1 } else { 0 };
            if same == SAME_READS {
                return false;
            }
            last = now;
        }
        true
    }

    fn ticks_between(&self, from: u64, to: u64) -> u64 {
        to.wrapping_sub(from) & self.mask
    }
}

fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no effect other than its result.
    unsafe { _rdtsc() }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    count: u64,
    tsc: u64,
}

/// A frequency by one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frequency {
    /// Ticks per second.
    pub hz: u64,
    /// The reference it was measured against.
    pub by: &'static str,
}

/// What a calibration found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// The TSC, by the first reference that worked.
    pub tsc: Frequency,
    /// The TSC by the second reference, where there is one.
    pub check: Option<Frequency>,
    /// Ticks per second of the local APIC's timer.
    pub apic_timer_hz: u64,
}

impl Calibration {
    /// How far the second reference is off the first, in parts per million.
    pub fn disagreement_ppm(&self) -> Option<u64> {
        self.check.map(|check| ppm(self.tsc.hz, check.hz))
    }
}

/// Distance of `b` from `a`, in parts per million of `a`.
fn ppm(a: u64, b: u64) -> u64 {
    if a == 0 {
        return u64::MAX;
    }
    (u128::from(a.abs_diff(b)) * 1_000_000 / u128::from(a))
        .try_into()
        .unwrap_or(u64::MAX)
}

/// `ticks` of something while a clock of `reference_hz` made `reference_ticks`: per second. 0 when the reference stood still.
fn frequency(ticks: u64, reference_ticks: u64, reference_hz: u64) -> u64 {
    if reference_ticks == 0 {
        return 0;
    }
    (u128::from(ticks) * u128::from(reference_hz) / u128::from(reference_ticks))
        .try_into()
        .unwrap_or(u64::MAX)
}

/// Measures the TSC and the APIC timer against the references, best first, for 20 ms.
/// `apic_count` reads the APIC timer, which must be counting down from its highest value.
/// `None`: no reference runs.
pub fn calibrate(
    references: &mut [Reference],
    mut apic_count: impl FnMut() -> u32,
) -> Option<Calibration> {
    let (first, others) = references.split_first_mut()?;
    let mut second = others.first_mut();
    let second_start = second.as_mut().map(|r| r.sample());
    let apic_start = apic_count();
    let start = first.sample();
    let wanted = first.hz * MEASUREMENT_US / 1_000_000;
    if !first.wait(start.count, wanted) {
        return calibrate(others, apic_count);
    }
    let end = first.sample();
    let apic_end = apic_count();
    let check = second.zip(second_start).and_then(|(reference, start)| {
        let end = reference.sample();
        let ticks = reference.ticks_between(start.count, end.count);
        let hz = frequency(end.tsc.wrapping_sub(start.tsc), ticks, reference.hz);
        (hz != 0).then_some(Frequency {
            hz,
            by: reference.name,
        })
    });
    let ticks = first.ticks_between(start.count, end.count);
    Some(Calibration {
        tsc: Frequency {
            hz: frequency(end.tsc.wrapping_sub(start.tsc), ticks, first.hz),
            by: first.name,
        },
        check,
        apic_timer_hz: frequency(
            u64::from(apic_start.wrapping_sub(apic_end)),
            ticks,
            first.hz,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_exact_and_total() {
        assert_eq!(frequency(60_000_000, 71_591, PM_TIMER_HZ), 2_999_995_809);
        assert_eq!(frequency(5, 0, PM_TIMER_HZ), 0);
        assert_eq!(frequency(u64::MAX, 1, u64::MAX), u64::MAX);
        assert_eq!(ppm(1_000_000, 1_000_005), 5);
        assert_eq!(ppm(1_000_000, 999_995), 5);
        assert_eq!(ppm(0, 7), u64::MAX);
    }

    #[test]
    fn counters_wrap_at_their_width() {
        let pit = Reference {
            name: "PIT",
            hz: PIT_HZ,
            mask: 0xffff,
            counter: Counter::Pit,
        };
        assert_eq!(pit.ticks_between(0xfff0, 0x10), 0x20);
        let wide = Reference {
            name: "HPET",
            hz: 1,
            mask: u64::MAX,
            counter: Counter::Pit,
        };
        assert_eq!(wide.ticks_between(u64::MAX, 4), 5);
    }

    #[test]
    fn disagreement_is_relative_to_the_first_reference() {
        let frequency = |hz, by| Frequency { hz, by };
        let mut calibration = Calibration {
            tsc: frequency(2_000_000_000, "HPET"),
            check: Some(frequency(2_000_100_000, "PM timer")),
            apic_timer_hz: 0,
        };
        assert_eq!(calibration.disagreement_ppm(), Some(50));
        calibration.check = None;
        assert_eq!(calibration.disagreement_ppm(), None);
    }
}
