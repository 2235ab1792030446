//! What is told of the simulations: tables, the page under version control, and JSON.

use std::fmt::Write;

use sched::PolicyKind;
use sched_sim::{
    stats::{Outcome, Summary},
    workload::Workload,
};
use serde::Serialize;

use crate::table::{grouped, markdown};

/// Nanoseconds as milliseconds, with as many digits as mean something.
pub fn milliseconds(ns: f64) -> String {
    let ms = ns / 1e6;
    // Halves of the last digit are rounded by arithmetic that is the same everywhere.
    let digits = match ms {
        ms if ms == ms.trunc() => 0,
        ms if ms < 1.0 => 3,
        ms if ms < 10.0 => 2,
        ms if ms < 100.0 => 1,
        _ => 0,
    };
    format!("{ms:.digits$}")
}

fn or_dash<T>(value: Option<T>, write: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".into(), write)
}

/// The heads of the table's columns.
const HEADS: [&str; 11] = [
    "policy",
    "AWT ms",
    "ART ms",
    "p99 ms",
    "jobs/s",
    "Jain",
    "switches/s",
    "moves/s",
    "missed",
    "longest wait ms",
    "busy %",
];

/// A row for each policy.
pub fn table(outcomes: &[Outcome]) -> Vec<Vec<String>> {
    let mut rows = vec![HEADS.map(String::from).to_vec()];
    for outcome in outcomes {
        let s = outcome.summary();
        let whole = |value: f64| grouped(value.round() as u64);
        rows.push(vec![
            outcome.policy.name().into(),
            or_dash(s.awt, milliseconds),
            or_dash(s.art, milliseconds),
            or_dash(s.p99.map(|ns| ns as f64), milliseconds),
            or_dash((s.jobs > 0).then_some(s.throughput), |v| format!("{v:.1}")),
            format!("{:.3}", s.jain),
            whole(s.switches),
            whole(s.migrations),
            if s.deadlines > 0 {
                format!("{} of {}", s.misses, s.deadlines)
            } else {
                "-".into()
            },
            milliseconds(s.longest_wait as f64),
            format!("{:.1}", s.used * 100.0),
        ]);
    }
    rows
}

/// Processor time of each VM under each policy, in percent of one processor.
pub fn shares(outcomes: &[Outcome]) -> Vec<Vec<String>> {
    let Some(first) = outcomes.first() else {
        return Vec::new();
    };
    let mut head = vec!["CPU % of".to_owned()];
    head.extend(first.vms.iter().cloned());
    let mut rows = vec![head];
    for outcome in outcomes {
        let mut row = vec![outcome.policy.name().to_owned()];
        row.extend((0..outcome.vms.len()).map(|vm| {
            let part = outcome.run_of(vm) as f64 / outcome.duration as f64;
            format!("{:.1}", part * 100.0)
        }));
        rows.push(row);
    }
    rows
}

/// vCPUs that a policy refused, in words; empty if there are none.
pub fn refusals(workload: &Workload, outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for outcome in outcomes {
        for (vcpu, why) in &outcome.refused {
            let vm = &workload.vms[vcpu.vm].name;
            let policy = outcome.policy.name();
            writeln!(text, "{policy}: {vm}, vCPU {} refused: {why}", vcpu.vcpu)
                .expect("a String takes any text");
        }
    }
    text
}

/// One workload in words and tables, as Markdown.
pub fn section(workload: &Workload, outcomes: &[Outcome]) -> String {
    let refusals = match refusals(workload, outcomes) {
        none if none.is_empty() => none,
        some => format!("\n{some}"),
    };
    format!(
        "## {}\n\n{} ({} vCPUs on {} processors, {} ms.)\n\n{}{refusals}\n{}\n",
        workload.name,
        workload.about,
        workload.vcpus(),
        workload.pcpus,
        milliseconds(workload.duration as f64),
        markdown(&table(outcomes)),
        markdown(&shares(outcomes)),
    )
}

/// `bench/sched-sim.md`.
///
/// `plots`: names of the plots that are kept beside it.
pub fn whole(results: &[(Workload, Vec<Outcome>)], plots: &[&str]) -> String {
    let mut text = String::from(
        "# What each scheduling policy makes of each workload\n\n\
         Written by `cargo xtask sched-sim --write`; [SCHEDULING.md](../docs/SCHEDULING.md) says what the policies and \
         the columns are. Simulated: the hypervisor's own scheduler, slices of 10 ms, costs of a switch and of an interrupt as \
         [measured](results.md). A test makes this page again and compares.\n\n",
    );
    for (workload, outcomes) in results {
        text += &section(workload, outcomes);
        let of_it = |plot: &&&str| {
            plot.rsplit_once('-')
                .is_some_and(|(of, _)| of == workload.name)
        };
        for plot in plots.iter().filter(of_it) {
            writeln!(text, "![{plot}](sched-sim/{plot})\n").expect("a String takes any text");
        }
    }
    text += "## What an abuser costs its neighbours\n\n\
             Waiting time of the neighbours' jobs without an abuser (`calm`), with it in their pool (`abuse`), and with it in another \
             (`apart`); and the longest that one of their vCPUs waited without a break. In milliseconds. Fair policies let it have what nobody \
             else wants, and its part of the rest; in another pool it takes nothing.\n\n";
    text += &markdown(&comparison(results, ["calm", "abuse", "apart"]));
    text
}

/// Writes a figure, if there is one.
type Column = (&'static str, &'static str, fn(&Summary) -> String);

/// What tells most of each workload: workload, head of the column, figure.
const TELLING: [Column; 8] = [
    ("shares", "weights 1:2:4, Jain", |s| {
        format!("{:.3}", s.jain)
    }),
    ("interactive", "keystroke, AWT ms", |s| {
        or_dash(s.awt, milliseconds)
    }),
    ("real-time", "deadlines missed", |s| {
        format!("{} of {}", s.misses, s.deadlines)
    }),
    ("io", "disk, jobs/s", |s| {
        grouped(s.throughput.round() as u64)
    }),
    ("web", "web, AWT ms", |s| or_dash(s.awt, milliseconds)),
    ("batch", "batch, AWT ms", |s| or_dash(s.awt, milliseconds)),
    ("abuse", "beside an abuser, AWT ms", |s| {
        or_dash(s.awt, milliseconds)
    }),
    ("apart", "it in another pool, AWT ms", |s| {
        or_dash(s.awt, milliseconds)
    }),
];

/// The figure that tells most of each workload, by policy.
pub fn overview(results: &[(Workload, Vec<Outcome>)]) -> String {
    let Some((_, first)) = results.first() else {
        return String::new();
    };
    let mut head = vec!["policy".to_owned()];
    head.extend(TELLING.map(|(_, title, _)| title.to_owned()));
    let mut rows = vec![head];
    for outcome in first {
        let mut row = vec![outcome.policy.name().to_owned()];
        for (name, _, figure) in TELLING {
            let found = results
                .iter()
                .find(|(workload, _)| workload.name == name)
                .and_then(|(_, outcomes)| outcomes.iter().find(|o| o.policy == outcome.policy));
            row.push(found.map_or_else(|| "-".into(), |outcome| figure(&outcome.summary())));
        }
        rows.push(row);
    }
    markdown(&rows)
}

/// A page with everything between two marks replaced; `None` if it does not have them, once each and in this order.
pub fn replaced(page: &str, [begin, end]: [&str; 2], text: &str) -> Option<String> {
    let (before, rest) = page.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{text}{end}{after}"))
}

/// A figure's name, and how it is written.
type Compared<'a> = (&'static str, &'a dyn Fn(&Workload, &Outcome) -> String);

/// Waiting times in some workloads, side by side, of VMs whose jobs count.
fn comparison(results: &[(Workload, Vec<Outcome>)], names: [&str; 3]) -> Vec<Vec<String>> {
    let of = |name: &str| results.iter().find(|(workload, _)| workload.name == name);
    let longest = |workload: &Workload, outcome: &Outcome| {
        let counts = outcome
            .vcpus
            .iter()
            .filter(|vcpu| workload.vms[vcpu.vcpu.vm].measured);
        let longest = counts.map(|vcpu| vcpu.totals.longest_wait).max();
        milliseconds(longest.unwrap_or(0) as f64)
    };
    let figures: [Compared<'_>; 3] = [
        ("AWT", &|_, outcome| {
            or_dash(outcome.summary().awt, milliseconds)
        }),
        ("p99", &|_, outcome| {
            or_dash(outcome.summary().p99.map(|ns| ns as f64), milliseconds)
        }),
        ("longest", &longest),
    ];
    let mut head = vec!["policy".to_owned()];
    for (figure, _) in figures {
        head.extend(names.map(|name| format!("{figure}, {name}")));
    }
    let mut rows = vec![head];
    for (index, policy) in PolicyKind::ALL.into_iter().enumerate() {
        let mut row = vec![policy.name().to_owned()];
        for (_, figure) in figures {
            row.extend(names.map(|name| {
                let found = of(name)
                    .and_then(|(workload, outcomes)| Some(figure(workload, outcomes.get(index)?)));
                or_dash(found, |text| text)
            }));
        }
        rows.push(row);
    }
    rows
}

/// A row of the JSON.
#[derive(Serialize)]
struct Row<'a> {
    workload: &'a str,
    policy: &'static str,
    #[serde(flatten)]
    summary: Summary,
    /// Nanoseconds on a processor, by VM.
    run: Vec<(&'a str, u64)>,
    refused: Vec<String>,
}

/// All figures, for programs: a list of objects; times are nanoseconds.
pub fn json(results: &[(Workload, Vec<Outcome>)]) -> String {
    let rows: Vec<_> = results
        .iter()
        .flat_map(|(workload, outcomes)| {
            outcomes.iter().map(|outcome| {
                let vms = outcome.vms.iter().enumerate();
                Row {
                    workload: &workload.name,
                    policy: outcome.policy.name(),
                    summary: outcome.summary(),
                    run: vms
                        .map(|(vm, name)| (name.as_str(), outcome.run_of(vm)))
                        .collect(),
                    refused: outcome
                        .refused
                        .iter()
                        .map(|(vcpu, why)| {
                            format!("{}/{}: {why}", workload.vms[vcpu.vm].name, vcpu.vcpu)
                        })
                        .collect(),
                }
            })
        })
        .collect();
    let mut text = serde_json::to_string_pretty(&rows).expect("figures are plain data");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_marks_is_replaced() {
        let page = "a <b>\nold <e> z";
        let new = replaced(page, ["<b>", "<e>"], "new\n").unwrap();
        assert_eq!(new, "a <b>\nnew\n<e> z");
        assert_eq!(replaced(&new, ["<b>", "<e>"], "new\n"), Some(new.clone()));
        assert_eq!(replaced("a <e> <b>", ["<b>", "<e>"], ""), None);
    }

    #[test]
    fn milliseconds_have_the_digits_that_mean_something() {
        for (ns, text) in [
            (0.0, "0"),
            (1e6, "1"),
            (5e3, "0.005"),
            (1.234e6, "1.23"),
            (12.34e6, "12.3"),
            (1234.5e6, "1234"),
        ] {
            assert_eq!(milliseconds(ns), text);
        }
    }
}
