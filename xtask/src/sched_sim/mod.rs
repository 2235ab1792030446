//! `cargo xtask sched-sim`: what each scheduling policy makes of a workload.
//!
//! Runs crate `sched` in the simulator of crate `sched-sim`, prints a table per workload, and draws plots.
//! The results of the workloads in the repository are kept in `bench/sched-sim.md` and `bench/sched-sim/`; a test
//! makes them again and compares.

mod page;
mod plots;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use sched::PolicyKind;
use sched_sim::{
    MS,
    engine::{self, Config},
    stats::Outcome,
    synthetic, trace,
    workload::Workload,
};

use crate::{
    exit::{Code, Stop},
    paths,
};

/// Compare the scheduling policies in a simulator.
///
/// Runs the scheduler of the hypervisor under workloads, made up and recorded, in simulated time, and tells for
/// each policy: average waiting time (AWT), average response time (ART), the response time that 99 % of the jobs
/// keep, jobs done per second, fairness (Jain's index), switches, moves to another processor, deadlines missed,
/// the longest that any ready vCPU waited, and how busy the processors were.
#[derive(clap::Args)]
#[command(after_help = "\
Plots and sched-sim.json go to target/sched-sim: for each workload NAME-figures.svg (the figures as bars),
NAME-response.svg (how response times are spread) and NAME-gantt.svg (who ran when, 100 ms of it).
The same seed gives the same results on every machine. docs/SCHEDULING.md tells what the policies are
and how to read the tables.")]
pub struct Args {
    /// Only these workloads (see --list).
    #[arg(long, short, value_name = "NAME")]
    workload: Vec<String>,
    /// Only these policies.
    #[arg(long, short, value_name = "NAME", value_parser = policy)]
    policy: Vec<PolicyKind>,
    /// A workload recorded by `plinthctl trace`, instead of those of this repository.
    #[arg(long, short, value_name = "FILE", conflicts_with = "workload")]
    trace: Vec<PathBuf>,
    /// Processors, instead of the workload's own number.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=64))]
    pcpus: Option<u16>,
    /// Simulated time, instead of the workload's own.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    duration: Option<u64>,
    /// Longest time that a vCPU runs before another has its turn.
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    slice: Option<u64>,
    /// What a switch to another vCPU costs.
    #[arg(long, value_name = "NS", value_parser = clap::value_parser!(u64).range(0..=10_000_000))]
    switch_cost: Option<u64>,
    /// What an interrupt from one processor to another costs, from sending to the answer.
    #[arg(long, value_name = "NS", value_parser = clap::value_parser!(u64).range(0..=10_000_000))]
    wake_cost: Option<u64>,
    /// Another draw of the random parts.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Where the plots go.
    #[arg(long, short, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Draw nothing.
    #[arg(long, conflicts_with = "out")]
    no_plots: bool,
    /// Print the workloads and policies that there are.
    #[arg(long)]
    list: bool,
    /// Write bench/sched-sim.md, its plots and the table in docs/SCHEDULING.md, which are kept under version control.
    #[arg(long, conflicts_with_all = ["workload", "policy", "trace", "pcpus", "duration", "slice", "switch_cost", "wake_cost", "seed", "out", "no_plots", "list"])]
    write: bool,
}

fn policy(name: &str) -> Result<PolicyKind, String> {
    PolicyKind::from_name(name).ok_or_else(|| {
        let names = PolicyKind::ALL.map(PolicyKind::name);
        format!("there are: {}", names.join(", "))
    })
}

/// A workload and what each policy made of it.
type Results = Vec<(Workload, Vec<Outcome>)>;

/// The workloads of this repository: those that are made up, then the recorded ones.
///
/// # Errors
/// A recorded one cannot be read.
fn repository() -> anyhow::Result<Vec<Workload>> {
    let mut all: Vec<_> = synthetic::ALL.iter().map(|make| make()).collect();
    let folder = traces();
    let mut files: Vec<_> = match fs::read_dir(&folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>()
            .with_context(|| format!("reading {}", paths::shown(&folder)))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e).with_context(|| format!("reading {}", paths::shown(&folder))),
    };
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "json")
    });
    files.sort();
    for file in files {
        all.push(recorded(&file)?);
    }
    Ok(all)
}

/// Where the recorded workloads of this repository are.
fn traces() -> PathBuf {
    paths::workspace().join("bench/sched-sim/traces")
}

fn recorded(file: &Path) -> anyhow::Result<Workload> {
    let shown = || paths::shown(file);
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", shown()))?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    trace::import(&name, &text).map_err(|e| Stop::with(Code::Usage, format!("{}: {e}", shown())))
}

/// Simulates, tells and draws.
///
/// # Errors
/// A trace or the folder for the plots cannot be used, or there is no such workload.
pub fn run(args: &Args) -> anyhow::Result<Code> {
    if args.list {
        return list();
    }
    if args.write {
        let kept = kept()?;
        for (path, text) in &kept {
            write(path, text)?;
        }
        println!("Written: {} files in bench/ and docs/", kept.len());
        return Ok(Code::Success);
    }
    let mut workloads = if args.trace.is_empty() {
        repository()?
    } else {
        let files = args.trace.iter();
        files
            .map(|file| recorded(file))
            .collect::<anyhow::Result<_>>()?
    };
    if let Some(unknown) = args
        .workload
        .iter()
        .find(|name| workloads.iter().all(|workload| workload.name != **name))
    {
        return Err(Stop::with(
            Code::Usage,
            format!("there is no workload `{unknown}`: `cargo xtask sched-sim --list` prints them"),
        ));
    }
    workloads.retain(|workload| args.workload.is_empty() || args.workload.contains(&workload.name));
    let mut config = Config {
        seed: args.seed,
        ..Config::default()
    };
    if let Some(us) = args.slice {
        config.slice = us * sched_sim::US;
    }
    config.switch_cost = args.switch_cost.unwrap_or(config.switch_cost);
    config.wake_cost = args.wake_cost.unwrap_or(config.wake_cost);
    for workload in &mut workloads {
        workload.pcpus = args.pcpus.map_or(workload.pcpus, usize::from);
        workload.duration = args.duration.map_or(workload.duration, |ms| ms * MS);
    }
    let policies = match &args.policy[..] {
        [] => &PolicyKind::ALL[..],
        some => some,
    };
    let results = simulate(workloads, policies, &config);
    let text = page::json(&results);
    if args.json {
        print!("{text}");
    } else {
        for (workload, outcomes) in &results {
            println!("{}", page::section(workload, outcomes));
        }
    }
    if !args.no_plots {
        let default = || paths::target().join("sched-sim");
        let folder = args.out.clone().unwrap_or_else(default);
        write(&folder.join("sched-sim.json"), &text)?;
        for (workload, outcomes) in &results {
            for (name, text) in drawings(workload, outcomes) {
                write(&folder.join(name), &text)?;
            }
        }
        eprintln!("Plots: {}", paths::shown(&folder));
    }
    Ok(Code::Success)
}

fn simulate(workloads: Vec<Workload>, policies: &[PolicyKind], config: &Config) -> Results {
    workloads
        .into_iter()
        .map(|workload| {
            let outcomes = engine::simulate_all(&workload, policies, config);
            (workload, outcomes)
        })
        .collect()
}

fn list() -> anyhow::Result<Code> {
    for workload in repository()? {
        println!("{}\n    {}", workload.name, workload.about);
    }
    let names = PolicyKind::ALL.map(PolicyKind::name);
    println!("policies\n    {}", names.join(", "));
    Ok(Code::Success)
}

/// The plots of a workload, by file name. Bars and spread only where there are jobs.
fn drawings(workload: &Workload, outcomes: &[Outcome]) -> Vec<(String, String)> {
    let name = &workload.name;
    let (from, length) = plots::window(workload.duration);
    let mut drawings = vec![
        (format!("{name}-figures.svg"), plots::bars(name, outcomes)),
        (
            format!("{name}-gantt.svg"),
            plots::gantt(name, outcomes, from, length),
        ),
    ];
    if outcomes.iter().any(|outcome| !outcome.jobs.is_empty()) {
        let spread = plots::distribution(name, outcomes);
        drawings.push((format!("{name}-response.svg"), spread));
    }
    drawings
}

/// Which plots of which workloads are kept under version control.
const KEPT_PLOTS: [&str; 8] = [
    "shares-gantt.svg",
    "interactive-figures.svg",
    "interactive-gantt.svg",
    "real-time-figures.svg",
    "web-response.svg",
    "web-figures.svg",
    "batch-figures.svg",
    "abuse-response.svg",
];

/// The part of docs/SCHEDULING.md that is written by this command.
const MARKS: [&str; 2] = ["<!-- sched-sim: begin -->", "<!-- sched-sim: end -->"];

/// What is kept in `bench/` and `docs/` of the workloads of this repository: paths and contents.
///
/// # Errors
/// A recorded workload or the page in `docs/` cannot be read.
fn kept() -> anyhow::Result<Vec<(PathBuf, String)>> {
    let results = simulate(repository()?, &PolicyKind::ALL, &Config::default());
    let bench = paths::workspace().join("bench");
    let mut files = vec![(
        bench.join("sched-sim.md"),
        page::whole(&results, &KEPT_PLOTS),
    )];
    for (workload, outcomes) in &results {
        for (name, text) in drawings(workload, outcomes) {
            if KEPT_PLOTS.contains(&name.as_str()) {
                files.push((bench.join("sched-sim").join(name), text));
            }
        }
    }
    let page = paths::workspace().join("docs/SCHEDULING.md");
    let text =
        fs::read_to_string(&page).with_context(|| format!("reading {}", paths::shown(&page)))?;
    let overview = page::overview(&results);
    let text = page::replaced(&text, MARKS, &overview)
        .with_context(|| format!("{} has no place for the table", paths::shown(&page)))?;
    files.push((page, text));
    Ok(files)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("writing {}", paths::shown(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_what_comes_out() {
        let kept = kept().unwrap();
        assert_eq!(kept.len(), KEPT_PLOTS.len() + 2);
        let different: Vec<_> = kept
            .iter()
            .filter(|(path, text)| fs::read_to_string(path).ok().as_ref() != Some(text))
            .map(|(path, _)| paths::shown(path))
            .collect();
        assert!(
            different.is_empty(),
            "the scheduler's behaviour or the simulator has changed: look at what `cargo xtask sched-sim` \
             shows, then write it down with `cargo xtask sched-sim --write` and commit {different:?}"
        );
    }
}
