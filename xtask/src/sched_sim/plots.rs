//! The plots: who ran when, how response times are spread, and the figures side by side.

use sched_sim::{
    MS, Ns,
    rng::ln,
    stats::{Outcome, Summary, percentile},
};

use super::page::milliseconds;
use crate::svg::{Anchor, COLOURS, GRID, Svg};

/// Pixels that all plots leave for names, and their scales' length.
const LEFT: f64 = 110.0;
const WIDTH: f64 = 760.0;
const RIGHT: f64 = 40.0;

/// Colour of a policy or of a VM, by number.
fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

/// A step of 1, 2 or 5 times a power of ten that divides a length into four to ten parts.
fn round_step(length: Ns) -> Ns {
    let mut power = 1;
    loop {
        for factor in [1, 2, 5] {
            if length <= 10 * factor * power {
                return factor * power;
            }
        }
        power *= 10;
    }
}

/// Who ran on which processor, a panel for each policy, from `from` on for `length`.
pub fn gantt(name: &str, outcomes: &[Outcome], from: Ns, length: Ns) -> String {
    const ROW: f64 = 16.0;
    const GAP: f64 = 12.0;
    let Some(first) = outcomes.first() else {
        return Svg::new(LEFT, GAP, name).finish();
    };
    let panel = first.pcpus as f64 * ROW + GAP;
    let top = 62.0;
    let bottom = top + panel * outcomes.len() as f64;
    let mut svg = Svg::new(
        LEFT + WIDTH + RIGHT,
        bottom + 24.0,
        &format!("{name}: who runs where, by policy"),
    );
    let names = first.vms.iter().enumerate();
    let step = (WIDTH / first.vms.len() as f64).min(120.0);
    svg.legend(
        LEFT,
        32.0,
        step,
        names.map(|(vm, name)| (colour(vm), name.as_str())),
    );
    let x = |at: Ns| LEFT + WIDTH * (at - from) as f64 / length as f64;
    let step = round_step(length);
    for tick in (0..=length / step).map(|n| n * step) {
        let x = x(from + tick);
        svg.line((x, top), (x, bottom), GRID);
        let label = format!("{} ms", milliseconds((from + tick) as f64));
        svg.text(x, bottom + 14.0, Anchor::Middle, &label);
    }
    for (index, outcome) in outcomes.iter().enumerate() {
        let y = top + panel * index as f64;
        let middle = y + first.pcpus as f64 * ROW / 2.0 + 4.0;
        svg.text(LEFT - 8.0, middle, Anchor::End, outcome.policy.name());
        for interval in joined(outcome, from, from + length) {
            svg.bar(
                x(interval.from),
                y + interval.pcpu as f64 * ROW,
                x(interval.to) - x(interval.from),
                ROW - 2.0,
                colour(interval.vm),
            );
        }
    }
    svg.finish()
}

/// A bar of a Gantt chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bar {
    pcpu: usize,
    vm: usize,
    from: Ns,
    to: Ns,
}

/// The intervals between two times; those of a VM that follow each other closely are one bar.
fn joined(outcome: &Outcome, from: Ns, to: Ns) -> Vec<Bar> {
    // Less than half a pixel.
    let gap = (to - from) / (2 * WIDTH as Ns);
    let mut last: Vec<Option<Bar>> = vec![None; outcome.pcpus];
    let mut bars = Vec::new();
    for interval in &outcome.timeline {
        if interval.to <= from || interval.from >= to {
            continue;
        }
        let bar = Bar {
            pcpu: interval.pcpu,
            vm: interval.vcpu.vm,
            from: interval.from.max(from),
            to: interval.to.min(to),
        };
        let last = &mut last[bar.pcpu];
        match last {
            Some(last) if last.vm == bar.vm && bar.from - last.to <= gap => last.to = bar.to,
            _ => bars.extend(last.replace(bar)),
        }
    }
    bars.extend(last.into_iter().flatten());
    bars
}

/// How response times are spread: for each policy the part of the jobs that took no longer.
pub fn distribution(name: &str, outcomes: &[Outcome]) -> String {
    const HEIGHT: f64 = 300.0;
    let top = 66.0;
    let bottom = top + HEIGHT;
    let mut svg = Svg::new(
        LEFT + WIDTH + RIGHT,
        bottom + 40.0,
        &format!("{name}: part of the jobs with no longer a response time (logarithmic)"),
    );
    let all: Vec<(usize, Vec<Ns>)> = outcomes
        .iter()
        .map(Outcome::responses)
        .enumerate()
        .filter(|(_, responses)| !responses.is_empty())
        .collect();
    let extreme = |pick: fn(&[Ns]) -> Option<&Ns>| all.iter().filter_map(move |(_, r)| pick(r));
    let least = extreme(<[Ns]>::first).min().copied().unwrap_or(1).max(1);
    let most = extreme(<[Ns]>::last).max().copied().unwrap_or(10);
    let (mut low, mut high) = (1, 10);
    while low * 10 <= least {
        low *= 10;
    }
    while high < most.max(low * 10) {
        high *= 10;
    }
    let decades = ln(high as f64 / low as f64);
    let x = |ns: Ns| LEFT + WIDTH * ln(ns.max(low) as f64 / low as f64) / decades;
    let y = |part: f64| bottom - HEIGHT * part;
    let step = WIDTH / outcomes.len().max(1) as f64;
    svg.legend(
        LEFT,
        34.0,
        step.min(110.0),
        outcomes
            .iter()
            .enumerate()
            .map(|(n, outcome)| (colour(n), outcome.policy.name())),
    );
    let mut decade = low;
    while decade <= high {
        svg.line((x(decade), top), (x(decade), bottom), GRID);
        let label = format!("{} ms", milliseconds(decade as f64));
        svg.text(x(decade), bottom + 16.0, Anchor::Middle, &label);
        decade *= 10;
    }
    for quarter in 0..=4 {
        let part = f64::from(quarter) / 4.0;
        svg.line((LEFT, y(part)), (LEFT + WIDTH, y(part)), GRID);
        let label = format!("{} %", quarter * 25);
        svg.text(LEFT - 8.0, y(part) + 4.0, Anchor::End, &label);
    }
    for (number, responses) in &all {
        // As many points as can be seen.
        let points: Vec<_> = (0..=200)
            .map(|n| f64::from(n) / 200.0)
            .filter_map(|part| Some((x(percentile(responses, part)?), y(part))))
            .collect();
        svg.curve(&points, colour(*number));
    }
    svg.finish()
}

/// A figure that is shown as bars: its title, its value, and how it is written.
struct Figure {
    title: &'static str,
    value: fn(&Summary) -> Option<f64>,
    written: fn(f64) -> String,
}

const FIGURES: [Figure; 6] = [
    Figure {
        title: "average waiting time, ms",
        value: |s| s.awt,
        written: milliseconds,
    },
    Figure {
        title: "average response time, ms",
        value: |s| s.art,
        written: milliseconds,
    },
    Figure {
        title: "response time of 99 %, ms",
        value: |s| s.p99.map(|ns| ns as f64),
        written: milliseconds,
    },
    Figure {
        title: "jobs per second",
        value: |s| (s.jobs > 0).then_some(s.throughput),
        written: |value| format!("{value:.0}"),
    },
    Figure {
        title: "fairness (Jain)",
        value: |s| Some(s.jain),
        written: |value| format!("{value:.3}"),
    },
    Figure {
        title: "deadlines missed",
        value: |s| (s.deadlines > 0).then_some(s.misses as f64),
        written: |value| format!("{value:.0}"),
    },
];

/// The figures of all policies, a panel for each figure that the workload has.
pub fn bars(name: &str, outcomes: &[Outcome]) -> String {
    const BAR: f64 = 14.0;
    const PANEL: f64 = 400.0;
    const LENGTH: f64 = 220.0;
    let summaries: Vec<_> = outcomes
        .iter()
        .map(|outcome| (outcome.policy, outcome.summary()))
        .collect();
    let figures: Vec<_> = FIGURES
        .iter()
        .filter(|figure| summaries.iter().any(|(_, s)| (figure.value)(s).is_some()))
        .collect();
    let height = BAR * summaries.len() as f64 + 40.0;
    let mut svg = Svg::new(
        2.0 * PANEL + RIGHT,
        40.0 + height * figures.len().div_ceil(2) as f64,
        &format!("{name}: figures by policy"),
    );
    for (index, figure) in figures.iter().enumerate() {
        let left = LEFT + PANEL * (index % 2) as f64;
        let top = 50.0 + height * (index / 2) as f64;
        svg.text(left, top, Anchor::Start, figure.title);
        let values = summaries.iter().filter_map(|(_, s)| (figure.value)(s));
        let most = values.fold(f64::MIN_POSITIVE, f64::max);
        for (number, (policy, summary)) in summaries.iter().enumerate() {
            let y = top + 6.0 + BAR * number as f64;
            svg.label(left - 6.0, y + 10.0, Anchor::End, 11, policy.name());
            let Some(value) = (figure.value)(summary) else {
                continue;
            };
            let length = LENGTH * value / most;
            svg.bar(left, y, length, BAR - 3.0, colour(number));
            let written = (figure.written)(value);
            svg.label(left + length + 4.0, y + 10.0, Anchor::Start, 10, &written);
        }
    }
    svg.finish()
}

/// Begin and length of the part that a Gantt chart shows.
pub fn window(duration: Ns) -> (Ns, Ns) {
    let length = (100 * MS).min(duration);
    (((duration - length) / 2).min(200 * MS), length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_have_round_steps() {
        for (length, step) in [(1, 1), (10, 1), (11, 2), (45, 5), (100 * MS, 10 * MS)] {
            assert_eq!(round_step(length), step, "{length}");
        }
    }

    #[test]
    fn windows_lie_within() {
        for duration in [1, 50 * MS, 100 * MS, 150 * MS, 5_000 * MS] {
            let (from, length) = window(duration);
            assert!(length > 0 && from + length <= duration);
        }
    }
}
