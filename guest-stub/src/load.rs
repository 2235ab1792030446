//! Loads for the host's scheduler: a guest that only spins, and one that has work to do in each period.
//!
//! A guest sees that it did not run by its TSC: between two readings in a loop more time passed than the loop and an exit
//! take. What is told is in microseconds of that TSC:
//!
//! - `load share: ran R of W us`: of a window, the time in which it ran;
//! - `load periodic: N jobs, M missed, latest start S us, latest end E us`: jobs are due to begin at each period's start and have
//!   to end before its end;
//! - `load waits: N jobs, mean start A us, latest start S us, latest end E us`: the same of short jobs, in a window that begins with a key;
//! - `load counts: T turns in W us`: how often a loop without an exit ran in such a window.
//!
//! Then there is work whose result is known: after `load work: ready on N processors` and two NMIs,
//! `load work: S steps on N processors: R0 R1 ..`, the results by processor.

use core::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use crate::apic::{self, LocalApic, Register};
use crate::interrupts::{self, end_at_apic, hook, only_count, vector};
use crate::machine::Machine;
use crate::smp::{self, PROCESSORS};
use crate::{checks::Why, console, cpu, print, println, time};

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

/// How often the guest that waits works, how long each time, and how many times in a window.
const SHORT_PERIOD_US: u64 = 7_000;
const SHORT_WORK_US: u64 = 100;
const SHORT_JOBS: u64 = 50;
/// How long the guest that counts does so, and after how many turns it looks at its clock.
const COUNT_US: u64 = SHORT_PERIOD_US * SHORT_JOBS;
const TURNS: u64 = 10_000;

/// Steps of each processor's work, unless the command line says how many.
const STEPS: u64 = 1_000_000;

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

/// Runs for so many microseconds of its own.
pub fn run_us(tsc_hz: u64, microseconds: u64) {
    let us = tsc_hz / 1_000_000;
    run(GAP_US * us, microseconds * us, u64::MAX);
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

/// A timer that wakes this guest up.
pub struct Alarm {
    local: LocalApic,
    ratio: u64,
}

impl Alarm {
    /// Makes it; the local APIC's timer is its own from then on.
    pub fn new(machine: &Machine) -> Self {
        let ratio = timer_ratio(machine);
        hook(VECTOR, |frame| {
            WOKEN.fetch_add(1, Relaxed);
            end_at_apic(frame);
        });
        let local = apic::local();
        local.write(Register::Timer, VECTOR.into());
        Self { local, ratio }
    }

    /// Sleeps until the TSC shows `due`; the ticks that have passed since.
    pub fn sleep_until(&self, due: u64) -> u64 {
        loop {
            let now = cpu::tsc();
            let Some(left) = due.checked_sub(now).filter(|&left| left > 0) else {
                return now - due;
            };
            self.start(left);
            cpu::wait_for_interrupt();
        }
    }

    /// Lets the timer count so many ticks of the TSC.
    fn start(&self, ticks: u64) {
        let count = (u128::from(ticks) * u128::from(self.ratio)) >> 32;
        self.local
            .write(Register::InitialCount, (count as u32).max(1));
    }

    /// Interrupts after so many ticks of the TSC, again and again.
    fn ring_every(&self, ticks: u64) {
        self.local
            .write(Register::Timer, apic::PERIODIC | u32::from(VECTOR));
        self.start(ticks);
    }
}

/// How late jobs were, in ticks.
#[derive(Default)]
struct Lateness {
    starts: u64,
    latest_start: u64,
    latest_end: u64,
    missed: u64,
}

impl Lateness {
    /// Does a job of so many ticks in each of these periods, from the TSC's `first` on.
    fn measure(alarm: &Alarm, first: u64, jobs: u64, period: u64, gap: u64, work: u64) -> Self {
        let mut late = Self::default();
        for job in 0..jobs {
            let due = first + job * period;
            let start = alarm.sleep_until(due);
            run(gap, work, u64::MAX);
            let end = cpu::tsc() - due;
            late.starts += start;
            late.latest_start = late.latest_start.max(start);
            late.latest_end = late.latest_end.max(end);
            late.missed += u64::from(end > period);
        }
        late
    }
}

/// Works in each period, sleeps for the rest of it, and tells whether it was in time.
pub fn periodic(machine: &Machine) {
    let us = machine.tsc_hz / 1_000_000;
    let alarm = Alarm::new(machine);
    let period = PERIOD_US * us;
    let first = cpu::tsc() + period;
    let late = Lateness::measure(&alarm, first, JOBS, period, GAP_US * us, WORK_US * us);
    alarm.local.quiet();
    println!(
        "load periodic: {JOBS} jobs, {} missed, latest start {} us, latest end {} us, {} wake-ups",
        late.missed,
        late.latest_start / us,
        late.latest_end / us,
        WOKEN.load(Relaxed)
    );
}

/// Wants little and soon: after each key, tells how long short jobs had to wait in a window.
pub fn waits(machine: &Machine) -> ! {
    let us = machine.tsc_hz / 1_000_000;
    let alarm = Alarm::new(machine);
    let (period, work) = (SHORT_PERIOD_US * us, SHORT_WORK_US * us);
    println!("load waits: ready");
    let mut next = cpu::tsc() + period;
    loop {
        // It works all the time, so that the host knows what it is like.
        if console::try_receive().is_none() {
            Lateness::measure(&alarm, next, 1, period, GAP_US * us, work);
            next += period;
            continue;
        }
        let late = Lateness::measure(&alarm, next, SHORT_JOBS, period, GAP_US * us, work);
        println!(
            "load waits: {SHORT_JOBS} jobs, mean start {} us, latest start {} us, latest end {} us",
            late.starts / SHORT_JOBS / us,
            late.latest_start / us,
            late.latest_end / us
        );
        next = cpu::tsc() + period;
    }
}

/// Computes for ever: after each key, tells how far it came in a window.
pub fn counts(machine: &Machine) -> ! {
    let us = machine.tsc_hz / 1_000_000;
    println!("load counts: ready");
    loop {
        if console::try_receive().is_none() {
            turn();
            continue;
        }
        let begin = cpu::tsc();
        let mut turns: u64 = 0;
        let passed = loop {
            turn();
            turns += 1;
            let passed = cpu::tsc() - begin;
            if passed >= COUNT_US * us {
                break passed;
            }
        };
        println!("load counts: {turns} turns in {} us", passed / us);
    }
}

/// A piece of work without an exit.
fn turn() {
    for turn in 0..TURNS {
        core::hint::black_box(turn);
    }
}

/// How often the guest that is to work looks whether it may begin, and is interrupted at it.
const LOOK_US: u64 = 20_000;

/// From an NMI to the next one every processor computes, each so many steps from its own number at least; what came of these is told:
/// who knows that knows that each did all of its steps.
pub fn work(machine: &Machine, steps: Option<u64>) {
    let steps = steps.unwrap_or(STEPS);
    match work_on_all(machine, steps) {
        Ok(count) => {
            print!("load work: {steps} steps on {count} processors:");
            for processor in &PROCESSORS[..count] {
                print!(" {:016x}", processor.note.load(SeqCst));
            }
            println!();
        }
        Err(why) => println!("load work: {}", why.text()),
    }
}

/// Leaves the results in the processors' notes; how many there are.
fn work_on_all(machine: &Machine, steps: u64) -> Result<usize, Why> {
    static GIVEN: AtomicU64 = AtomicU64::new(0);
    fn compute(number: usize) {
        // The generator of PCG: no step can be left out.
        let step = |x: u64, _| {
            x.wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407)
        };
        let result = (0..GIVEN.load(SeqCst)).fold(number as u64, step);
        PROCESSORS[number].note.store(result, SeqCst);
        while nmis() < 2 {
            turn();
        }
    }
    /// That came to the first processor.
    fn nmis() -> u32 {
        interrupts::count(vector::NMI)
    }
    GIVEN.store(steps, SeqCst);
    let others = smp::others(machine)?;
    let count = 1 + others.count();
    hook(vector::NMI, only_count);
    let alarm = Alarm::new(machine);
    println!("load work: ready on {count} processors");
    let look = LOOK_US * (machine.tsc_hz / 1_000_000);
    // An NMI may come between the look and the halt, which the timer ends then.
    while nmis() == 0 {
        alarm.sleep_until(cpu::tsc() + look);
    }
    // Bochs 2.7 keeps NMIs blocked where a guest was left in its NMI handler, also for those that run there next, until one of
    // their IRETs.
    alarm.ring_every(look);
    others.begin(compute);
    cpu::sti();
    compute(others.first);
    cpu::cli();
    alarm.local.quiet();
    others.join()?;
    Ok(count)
}
