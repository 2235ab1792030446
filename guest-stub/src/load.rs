//! Loads for the host's scheduler: a guest that only spins, and one that has work to do in each period.
//!
//! A guest sees that it did not run by its TSC: between two readings in a loop more time passed than the loop and an exit
//! take. What is told is in microseconds of that TSC:
//!
//! - `load share: ran R of W us`: of a window, the time in which it ran;
//! - `load periodic: N jobs, M missed, latest start S us, latest end E us`: jobs are due to begin at each period's start and have
//!   to end before its end.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::apic::{self, Register};
use crate::interrupts::{end_at_apic, hook};
use crate::machine::Machine;
use crate::{cpu, println, time};

/// Between two readings of the TSC no more than this passes while the guest runs, in microseconds.
const GAP_US: u64 = 100;
/// When the spinning guest begins to look, by its TSC, which began with its VM: when all guests have found out about their machine.
const BEGIN_US: u64 = 2_000_000;
/// How long it looks.
const WINDOW_US: u64 = 1_500_000;
/// How often the periodic guest works, how long each time, and how many times: until all windows are over, which begin
/// one after the other as the guests are made, or who looks last would have more.
const PERIOD_US: u64 = 10_000;
const WORK_US: u64 = 1_000;
const JOBS: u64 = 400;

const VECTOR: u8 = 0x72;

/// Runs for so many ticks of its own, or until the TSC shows `end`; the ticks that it ran.
fn run(gap: u64, ticks: u64, end: u64) -> u64 {
    let mut ran = 0;
    let mut before = cpu::tsc();
    while ran < ticks && before < end {
        let now = cpu::tsc();
        let passed = now.wrapping_sub(before);
        if passed <= gap {
            ran += passed;
        }
        before = now;
    }
    ran
}

/// Spins, and tells how much of a window it had.
pub fn share(machine: &Machine) {
    let us = machine.tsc_hz / 1_000_000;
    let begin = BEGIN_US * us;
    run(0, u64::MAX, begin);
    let end = begin.max(cpu::tsc()) + WINDOW_US * us;
    let ran = run(GAP_US * us, u64::MAX, end);
    println!("load share: ran {} of {WINDOW_US} us", ran / us);
}

/// Ticks of the APIC timer in 2^32 ticks of the TSC.
fn timer_ratio(machine: &Machine) -> u64 {
    let local = apic::local();
    local.write(Register::Timer, apic::MASKED);
    local.write(Register::InitialCount, u32::MAX);
    let (count, tsc) = (local.read(Register::CurrentCount), cpu::tsc());
    time::spin_us(machine.tsc_hz, 20_000);
    let counted = count.saturating_sub(local.read(Register::CurrentCount));
    let passed = cpu::tsc().wrapping_sub(tsc).max(1);
    local.write(Register::InitialCount, 0);
    (u64::from(counted) << 32) / passed
}

/// Interrupts that have come.
static WOKEN: AtomicU64 = AtomicU64::new(0);

/// Works in each period, sleeps for the rest of it, and tells whether it was in time.
pub fn periodic(machine: &Machine) {
    let us = machine.tsc_hz / 1_000_000;
    let ratio = timer_ratio(machine);
    let local = apic::local();
    hook(VECTOR, |frame| {
        WOKEN.fetch_add(1, Relaxed);
        end_at_apic(frame);
    });
    local.write(Register::Timer, VECTOR.into());
    let (mut missed, mut latest_start, mut latest_end) = (0, 0, 0);
    let first = cpu::tsc() + PERIOD_US * us;
    for job in 0..JOBS {
        let due = first + job * PERIOD_US * us;
        loop {
            let left = due.saturating_sub(cpu::tsc());
            if left == 0 {
                break;
            }
            let count = (u128::from(left) * u128::from(ratio)) >> 32;
            local.write(Register::InitialCount, (count as u32).max(1));
            cpu::wait_for_interrupt();
        }
        let start = cpu::tsc() - due;
        run(GAP_US * us, WORK_US * us, u64::MAX);
        let end = cpu::tsc() - due;
        latest_start = latest_start.max(start / us);
        latest_end = latest_end.max(end / us);
        missed += u64::from(end > PERIOD_US * us);
    }
    local.quiet();
    println!(
        "load periodic: {JOBS} jobs, {missed} missed, latest start {latest_start} us, latest end {latest_end} us, {} wake-ups",
        WOKEN.load(Relaxed)
    );
}
