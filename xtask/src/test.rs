//! `cargo xtask test`: unit tests, and scenarios in emulated machines.
//!
//! Purpose: shows that Plinth does what it promises, on any workstation. A scenario is a
//! set of VMs, the firmware and the emulator to boot them on, and a conversation with
//! them; it passes only if the machine also powers itself off at the end.
//!
//! Invariants: a scenario that cannot run here is *skipped* with the reason, never passed;
//! each has a time limit of its own; at most as many emulators run at once as there are
//! processors, the longest first; the last line is the count.

mod consoles;
mod control;
mod host;
mod isolation;
mod linux;
mod many;
mod place;
mod policies;
mod qemu_tests;
mod refusals;
mod report;
mod rig;
mod running;
mod scenarios;
mod sched;
mod screen;
mod selftests;
mod session;
mod shell;
mod soak;
mod terminal;
mod test_kernels;

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context, Result};

use crate::{
    emulator::Emulator,
    exit::{Code, Stop},
    paths, process,
};
use report::{Counts, Outcome};
use scenarios::Scenario;

/// Lines of a failed scenario's log that are shown.
const TAIL_LINES: usize = 40;

/// Why a slow scenario is skipped.
const SLOW: &str = "takes minutes or a large download; --all runs it";

/// The name under which all unit tests run.
const UNIT: &str = "unit";

/// Run the tests: unit tests of the hardware-free crates, then scenarios in emulators.
///
/// Each scenario boots Plinth with its own set of guests, talks to them over the serial
/// line and powers off. Logs are left in target/test-logs/.
#[derive(clap::Args)]
pub struct Args {
    /// Run only tests with this text in their name; "unit" names the unit tests.
    filter: Option<String>,
    /// Print the names and run nothing.
    #[arg(long)]
    list: bool,
    /// Run scenarios only on this emulator.
    #[arg(long, value_enum)]
    emulator: Option<Emulator>,
    /// Run the unit tests and a few short scenarios only.
    #[arg(long)]
    quick: bool,
    /// Run the slow scenarios, too, which are skipped otherwise.
    #[arg(long)]
    all: bool,
    /// What the verbs of the soak are chosen by; its own if absent: that of the short one is always the same.
    #[arg(long)]
    seed: Option<u64>,
    /// Hold the same conversations with the same guests on the bare emulator, without
    /// Plinth: shows what is the emulator's or the guest's own doing.
    #[arg(long)]
    reference: bool,
}

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.filter
            .as_deref()
            .is_none_or(|filter| name.contains(filter))
    }

    fn scenarios(&self) -> Vec<Scenario> {
        let all = if self.reference {
            scenarios::reference()
        } else {
            scenarios::all()
        };
        all.into_iter()
            .filter(|scenario| self.wants(&scenario.name))
            .filter(|scenario| self.emulator.is_none_or(|only| scenario.needs_only(only)))
            .filter(|scenario| scenario.quick || !self.quick)
            .collect()
    }
}

/// Runs what the arguments select; the closing line counts it.
///
/// # Errors
/// Nothing has the name that was asked for, or the logs cannot be written.
pub fn run(args: &Args) -> Result<Code> {
    let units = !args.reference && args.emulator.is_none() && args.wants(UNIT);
    let scenarios = args.scenarios();
    if args.list {
        if units {
            println!("{UNIT}");
        }
        for scenario in &scenarios {
            println!("{}", scenario.name);
        }
        return Ok(Code::Success);
    }
    if !units && scenarios.is_empty() {
        return Err(Stop::with(
            Code::Usage,
            "no test has that name; `cargo xtask test --list` prints all names",
        ));
    }
    fs::create_dir_all(logs()).with_context(|| format!("cannot make {}", logs().display()))?;
    let mut counts = Counts::default();
    if units {
        run_units(&mut counts)?;
    }
    let (slow, scenarios): (Vec<_>, Vec<_>) = scenarios
        .into_iter()
        .partition(|scenario| scenario.slow && !args.all);
    for scenario in &slow {
        let outcome = Outcome::Skipped(SLOW.to_owned());
        tell(&scenario.name, &outcome, Instant::now());
        counts.add(&outcome);
    }
    if !scenarios.is_empty() {
        run_scenarios(scenarios, args.seed, &mut counts);
    }
    println!("{}", counts.closing_line());
    Ok(if counts.failed == 0 {
        Code::Success
    } else {
        Code::Failure
    })
}

/// Where the logs are.
fn logs() -> PathBuf {
    paths::target().join("test-logs")
}

/// Runs the unit tests of all crates that build on the workstation.
fn run_units(counts: &mut Counts) -> Result<()> {
    let path = logs().join("unit.log");
    let log =
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let started = Instant::now();
    let mut command = Command::new("cargo");
    command
        .args(["test", "--no-fail-fast"])
        .current_dir(paths::workspace())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let status = process::status_of(&mut command)?;
    let bytes = fs::read(&path)?;
    let mut unit = Counts::default();
    unit.add_cargo_test(&String::from_utf8_lossy(&bytes));
    if !status.success() && unit.failed == 0 {
        // It did not even compile, or a test program died.
        unit.failed = 1;
    }
    let outcome = if unit.failed == 0 {
        Outcome::Passed(format!("{} tests", unit.passed))
    } else {
        Outcome::Failed(unit.closing_line())
    };
    tell(UNIT, &outcome, started);
    counts.passed += unit.passed;
    counts.failed += unit.failed;
    counts.skipped += unit.skipped;
    Ok(())
}

/// Prints how one test ended, and for a failure all that helps to find out why.
fn tell(name: &str, outcome: &Outcome, started: Instant) {
    let mut text = report::line(name, outcome, started.elapsed());
    if let Outcome::Failed(why) = outcome {
        let path = log_of(name);
        text += &format!("\n    {}\n", why.replace('\n', "\n    "));
        if let Ok(log) = fs::read(&path) {
            text += &report::tail(&log, TAIL_LINES);
            text += &format!("    all of it: {}", paths::shown(&path));
        }
    }
    println!("{}", text.trim_end());
}

/// The log of one test: its name with the slashes replaced.
fn log_of(name: &str) -> PathBuf {
    logs().join(format!("{}.log", name.replace('/', "-")))
}

/// Runs scenarios side by side, the longest first; those that look at the others' results
/// come last.
fn run_scenarios(scenarios: Vec<Scenario>, seed: Option<u64>, counts: &mut Counts) {
    let rig = match rig::Rig::prepare(&scenarios, seed) {
        Ok(rig) => rig,
        Err(error) => {
            println!("no scenario can run: {error:#}");
            counts.failed += u32::try_from(scenarios.len()).unwrap_or(u32::MAX);
            return;
        }
    };
    let (last, mut first): (Vec<_>, Vec<_>) =
        scenarios.into_iter().partition(Scenario::is_afterwards);
    first.sort_by_key(|scenario| std::cmp::Reverse(scenario.cost_s));
    let next = AtomicUsize::new(0);
    let shared = Mutex::new(counts);
    let run_one = |scenario: &Scenario| {
        let started = Instant::now();
        let outcome = scenario.run(&rig, &log_of(&scenario.name));
        let mut counts = shared.lock().unwrap_or_else(PoisonError::into_inner);
        tell(&scenario.name, &outcome, started);
        counts.add(&outcome);
    };
    let at_once = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(first.len());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(scenario) = first.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run_one(scenario);
                }
            });
        }
    });
    last.iter().for_each(run_one);
}
