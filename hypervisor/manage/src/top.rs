//! `top`: who uses the processors, from the differences of two [`HostStats`].
//!
//! Pure: the caller asks for the figures and shows the text. What began between the two figures counts from its
//! beginning; figures that went back (a VM that started again) count from 0. The first view is of the time since
//! the host's start.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};

use sched::Part;

use crate::{
    command::{HostStats, PcpuStats, VcpuStats, VmStats},
    table::{self, Align, Table},
};

/// Time from one view to the next, in nanoseconds.
pub const PERIOD_NS: u64 = 1_000_000_000;
/// Columns of a view.
const COLUMNS: usize = 79;
/// Rows of a view on a terminal of 24.
const ROWS: usize = 23;
/// Characters of a name that are shown at least.
const LEAST_NAME: usize = 8;
/// Processors that are shown, at most, so that VMs have room.
const MOST_PCPUS: usize = 8;

/// By what VMs are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// CPU time, most first.
    #[default]
    Cpu,
    /// Waiting time, most first.
    Wait,
    /// Response time, longest first.
    Response,
    /// Exits, most first.
    Exits,
    /// Name.
    Name,
}

impl Sort {
    /// The order of this name: one of [`SORT_KEYS`](crate::shell::SORT_KEYS).
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "cpu" => Sort::Cpu,
            "wait" => Sort::Wait,
            "response" => Sort::Response,
            "exits" => Sort::Exits,
            "name" => Sort::Name,
            _ => return None,
        })
    }

    /// The order that a key of the live view chooses.
    pub fn of_key(key: char) -> Option<Self> {
        Some(match key {
            'c' => Sort::Cpu,
            'w' => Sort::Wait,
            'r' => Sort::Response,
            'e' => Sort::Exits,
            'n' => Sort::Name,
            _ => return None,
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Sort::Cpu => "cpu",
            Sort::Wait => "wait",
            Sort::Response => "response",
            Sort::Exits => "exits",
            Sort::Name => "name",
        }
    }
}

/// A VM's line, before it is text.
#[derive(Debug, Default)]
struct Line {
    name: String,
    state: &'static str,
    vcpus: usize,
    run_ns: u64,
    wait_ns: u64,
    response_ns: u64,
    exits: u64,
    switches: u64,
}

/// The live view.
#[derive(Debug, Default)]
pub struct Top {
    /// By what it is sorted.
    pub sort: Sort,
    before: Option<HostStats>,
}

fn since(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

impl Top {
    /// A view that has not been shown yet.
    pub fn new(sort: Sort) -> Self {
        Top { sort, before: None }
    }

    /// The view of the time from the last figures to these: lines of at most 79 columns, at most 23 of them.
    pub fn update(&mut self, stats: HostStats) -> Vec<String> {
        let before = self.before.as_ref();
        let time_ns = since(stats.at_ns, before.map_or(0, |b| b.at_ns)).max(1);
        let mut lines = self.head(&stats, fairness(&stats, before));
        lines.extend(pcpus(&stats, before));
        lines.push(String::new());
        let mut vms: Vec<_> = stats.vms.iter().map(|vm| line_of(vm, before)).collect();
        vms.sort_by(|a, b| {
            let by = |key: fn(&Line) -> u64| key(b).cmp(&key(a));
            let order = match self.sort {
                Sort::Cpu => by(|l| l.run_ns),
                Sort::Wait => by(|l| l.wait_ns),
                Sort::Response => by(|l| l.response_ns),
                Sort::Exits => by(|l| l.exits),
                Sort::Name => core::cmp::Ordering::Equal,
            };
            order.then_with(|| a.name.cmp(&b.name))
        });
        lines.extend(table_of(&vms, time_ns, ROWS - lines.len()));
        for line in &mut lines {
            *line = line.chars().take(COLUMNS).collect();
        }
        self.before = Some(stats);
        lines
    }

    fn head(&self, stats: &HostStats, fairness: u32) -> Vec<String> {
        let title = format!(
            "plinth top  up {}  {}  {}  fairness {}  sort {}",
            table::clock(stats.at_ns),
            counted(stats.pcpus.len(), "processor"),
            counted(stats.vms.len(), "VM"),
            table::permille(fairness),
            self.sort.name(),
        );
        let span = match self.before {
            Some(_) => "keys: c w r e n sort, q ends",
            None => "since the start; keys: c w r e n sort, q ends",
        };
        Vec::from([title, span.to_owned(), String::new()])
    }
}

/// `1 VM`, `2 VMs`.
fn counted(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// The figures of the same run of a VM before, if there are any.
fn then<'b>(now: &VmStats, before: Option<&'b HostStats>) -> Option<&'b VmStats> {
    let same = |then: &&VmStats| {
        then.summary.name == now.summary.name && then.summary.starts == now.summary.starts
    };
    before?.vms.iter().find(same)
}

/// How evenly vCPUs got what they were entitled to in the time between, in thousandths.
fn fairness(stats: &HostStats, before: Option<&HostStats>) -> u32 {
    let mut parts = Vec::new();
    for vm in &stats.vms {
        let mut then = then(vm, before).into_iter().flat_map(VmStats::parts);
        parts.extend(vm.parts().map(|now| match then.next() {
            None => now,
            Some(then) => Part {
                weight: now.weight,
                run: since(now.run, then.run),
                wait: since(now.wait, then.wait),
            },
        }));
    }
    sched::fairness(&mut parts)
}

fn pcpus(stats: &HostStats, before: Option<&HostStats>) -> Vec<String> {
    let mut shown = Table::new(&[
        ("PCPU", Align::Right),
        ("BUSY %", Align::Right),
        ("SWITCHES/S", Align::Right),
        ("QUEUED", Align::Right),
    ]);
    for now in stats.pcpus.iter().take(MOST_PCPUS) {
        let nothing = PcpuStats {
            busy_ns: 0,
            idle_ns: 0,
            switches: 0,
            ..*now
        };
        let then = before.and_then(|b| b.pcpus.iter().find(|p| p.pcpu == now.pcpu));
        let then = then.unwrap_or(&nothing);
        let busy = since(now.busy_ns, then.busy_ns);
        let whole = busy.saturating_add(since(now.idle_ns, then.idle_ns));
        shown.row([
            now.pcpu.to_string(),
            table::percent(busy, whole),
            per_second(since(now.switches, then.switches), whole),
            now.queued.to_string(),
        ]);
    }
    let mut lines: Vec<String> = shown.render().lines().map(str::to_owned).collect();
    let more = stats.pcpus.len().saturating_sub(MOST_PCPUS);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines
}

/// A rate, rounded.
fn per_second(count: u64, time_ns: u64) -> String {
    let time = u128::from(time_ns.max(1));
    ((u128::from(count) * 1_000_000_000 + time / 2) / time).to_string()
}

fn line_of(now: &VmStats, before: Option<&HostStats>) -> Line {
    let then = then(now, before);
    let mut line = Line {
        name: now.summary.name.clone(),
        state: table::state(now.summary.state),
        vcpus: now.vcpu.len(),
        ..Line::default()
    };
    let (mut wakeups, mut responses) = (0u64, 0u128);
    let nothing = VcpuStats::default();
    for vcpu in &now.vcpu {
        let then = then.and_then(|vm| vm.vcpu.iter().find(|v| v.vcpu == vcpu.vcpu));
        let then = then.unwrap_or(&nothing);
        let add = |sum: &mut u64, now: u64, then: u64| *sum = sum.saturating_add(since(now, then));
        add(&mut line.run_ns, vcpu.run_ns, then.run_ns);
        add(&mut line.wait_ns, vcpu.wait_ns, then.wait_ns);
        add(&mut line.switches, vcpu.switches, then.switches);
        add(
            &mut line.exits,
            table::exit_count(vcpu),
            table::exit_count(then),
        );
        add(&mut wakeups, vcpu.wakeups, then.wakeups);
        // The means of all wake-ups give the sum of those in between.
        let sum = |v: &VcpuStats| u128::from(v.wakeups) * u128::from(v.response_ns);
        responses = responses.saturating_add(sum(vcpu).saturating_sub(sum(then)));
    }
    if let Some(mean) = responses.checked_div(u128::from(wakeups)) {
        line.response_ns = u64::try_from(mean).unwrap_or(u64::MAX);
    }
    line
}

/// A name that is longer than this without its middle.
fn shortened(name: &str, longest: usize) -> String {
    let length = name.chars().count();
    if length <= longest {
        return name.to_owned();
    }
    let kept = longest.saturating_sub(2);
    let (first, last) = (kept.div_ceil(2), kept / 2);
    let head = name.chars().take(first);
    let tail = name.chars().skip(length - last);
    head.chain("..".chars()).chain(tail).collect()
}

/// The VMs in at most `rows` lines, heading included. Long names are shortened so that all columns are seen.
fn table_of(vms: &[Line], time_ns: u64, rows: usize) -> Vec<String> {
    let fit = match vms.len() < rows {
        true => vms.len(),
        false => rows.saturating_sub(2),
    };
    let names = vms[..fit].iter().map(|vm| vm.name.chars().count());
    let longest = names.max().unwrap_or(0);
    let mut shown = rendered(&vms[..fit], time_ns, longest);
    let width = shown.lines().map(|line| line.chars().count()).max();
    let excess = width.unwrap_or(0).saturating_sub(COLUMNS);
    if excess > 0 {
        shown = rendered(
            &vms[..fit],
            time_ns,
            longest.saturating_sub(excess).max(LEAST_NAME),
        );
    }
    let mut lines: Vec<String> = shown.lines().map(str::to_owned).collect();
    if fit < vms.len() {
        lines.push(format!("and {} more", vms.len() - fit));
    }
    lines
}

/// The table of these VMs, with names of this length at most.
fn rendered(vms: &[Line], time_ns: u64, longest_name: usize) -> String {
    let mut shown = Table::new(&[
        ("VM", Align::Left),
        ("STATE", Align::Left),
        ("VCPUS", Align::Right),
        ("CPU %", Align::Right),
        ("WAIT %", Align::Right),
        ("RESPONSE", Align::Right),
        ("EXITS/S", Align::Right),
        ("SWITCHES/S", Align::Right),
    ]);
    for vm in vms {
        shown.row([
            shortened(&vm.name, longest_name),
            vm.state.to_owned(),
            vm.vcpus.to_string(),
            table::percent(vm.run_ns, time_ns),
            table::percent(vm.wait_ns, time_ns),
            table::duration(vm.response_ns),
            per_second(vm.exits, time_ns),
            per_second(vm.switches, time_ns),
        ]);
    }
    shown.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Figures, VmState, VmSummary};
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    fn vm(name: &str, starts: u64, vcpu: VcpuStats) -> VmStats {
        VmStats {
            summary: VmSummary {
                name: name.into(),
                state: VmState::Running,
                vcpus: 1,
                memory_bytes: 0,
                uptime_ns: 0,
                run_ns: vcpu.run_ns,
                starts,
                last_end: None,
            },
            weight: 100,
            total: Figures::default(),
            vcpu: Vec::from([vcpu]),
        }
    }

    fn stats(at_ns: u64, busy_ns: u64, vms: Vec<VmStats>) -> HostStats {
        HostStats {
            at_ns,
            pcpus: Vec::from([PcpuStats {
                pcpu: 0,
                busy_ns,
                idle_ns: at_ns - busy_ns,
                switches: at_ns / MS,
                queued: 2,
            }]),
            vms,
            total: Figures::default(),
            fairness_permille: 998,
        }
    }

    fn vcpu(run_ns: u64, wait_ns: u64, wakeups: u64, response_ns: u64, exits: u64) -> VcpuStats {
        VcpuStats {
            run_ns,
            wait_ns,
            wakeups,
            response_ns,
            exits: Vec::from([("cpuid".to_owned(), exits), ("port".to_owned(), exits)]),
            ..VcpuStats::default()
        }
    }

    #[test]
    fn figures_are_of_the_time_between() {
        let mut top = Top::new(Sort::Cpu);
        top.update(stats(
            10_000 * MS,
            10_000 * MS,
            Vec::from([
                vm("a", 1, vcpu(9_000 * MS, 0, 10, MS, 500)),
                vm("b", 1, vcpu(1_000 * MS, 9_000 * MS, 0, 0, 0)),
            ]),
        ));
        let lines = top.update(stats(
            11_000 * MS,
            10_500 * MS,
            Vec::from([
                vm("a", 1, vcpu(9_125 * MS, 0, 30, 2 * MS, 600)),
                vm("b", 1, vcpu(1_375 * MS, 9_250 * MS, 0, 0, 0)),
            ]),
        ));
        let text = lines.join("\n");
        assert_eq!(
            text,
            "plinth top  up 0:00:11  1 processor  2 VMs  fairness 1.000  sort cpu\n\
             keys: c w r e n sort, q ends\n\
             \n\
             PCPU  BUSY %  SWITCHES/S  QUEUED\n   \
                0    50.0        1000       2\n\
             \n\
             VM  STATE    VCPUS  CPU %  WAIT %  RESPONSE  EXITS/S  SWITCHES/S\n\
             b   running      1   37.5    25.0      0 ns        0           0\n\
             a   running      1   12.5     0.0    2.5 ms      200           0"
        );
    }

    #[test]
    fn what_started_again_counts_from_its_start() {
        let mut top = Top::new(Sort::Name);
        top.update(stats(
            1_000 * MS,
            0,
            Vec::from([vm("a", 1, vcpu(900 * MS, 0, 0, 0, 0))]),
        ));
        let lines = top.update(stats(
            2_000 * MS,
            0,
            Vec::from([vm("a", 2, vcpu(950 * MS, 0, 0, 0, 0))]),
        ));
        assert!(lines.join("\n").contains("95.0"), "{lines:?}");
    }

    #[test]
    fn fairness_is_of_the_time_between_without_reservations() {
        let shown = |top: &mut Top, a: VcpuStats, b: VcpuStats, kept: VcpuStats| {
            let mut kept = vm("kept", 1, kept);
            kept.weight = 0;
            let at = a.run_ns + a.wait_ns;
            let vms = Vec::from([vm("a", 1, a), vm("b", 1, b), kept]);
            top.update(stats(at, 0, vms))[0].clone()
        };
        let v = |run, wait| vcpu(run * MS, wait * MS, 0, 0, 0);
        let mut top = Top::new(Sort::Name);
        let first = shown(&mut top, v(900, 100), v(100, 900), v(0, 0));
        assert!(first.contains("fairness 0.609"), "{first}");
        let next = shown(&mut top, v(1300, 700), v(500, 1500), v(200, 800));
        assert!(next.contains("fairness 1.000"), "{next}");
    }

    #[test]
    fn many_vms_fit_the_terminal() {
        let vms = (0..64).map(|n| vm(&format!("vm-{n:02}"), 1, vcpu(n * MS, 0, 0, 0, 0)));
        let lines = Top::new(Sort::Name).update(stats(1_000 * MS, 0, vms.collect()));
        assert_eq!(lines.len(), ROWS);
        assert!(lines[ROWS - 1].starts_with("and "), "{lines:?}");
        assert!(lines[7].starts_with("vm-00"), "{lines:?}");
    }

    #[test]
    fn long_names_leave_room_for_the_figures() {
        let name = |n: u32| format!("web-server-in-production-no-{n:03}");
        let vms = (0..4).map(|n| vm(&name(n), 1, vcpu(MS, MS, 1, 999 * MS, 99_999)));
        let lines = Top::new(Sort::Name).update(stats(1_000 * MS, 0, vms.collect()));
        let heading = lines.iter().find(|line| line.starts_with("VM")).unwrap();
        assert!(heading.ends_with("SWITCHES/S"), "{heading}");
        for (n, line) in lines[lines.len() - 4..].iter().enumerate() {
            let tail = format!("-{n:03}  running");
            assert!(line.starts_with("web-") && line.contains(&tail), "{line}");
            assert_eq!(line.chars().count(), heading.chars().count());
        }
        assert_eq!(shortened("abcdefghij", 8), "abc..hij");
        assert_eq!(shortened("abcdefgh", 8), "abcdefgh");
    }

    proptest! {
        #[test]
        fn any_figures_can_be_shown(
            figures in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 1..40),
            at in any::<u64>(),
        ) {
            let mut top = Top::default();
            for half in figures.chunks(20) {
                let vms = half.iter().map(|&(a, b, c, d, e)| vm("x", c, vcpu(a, b, c, d, e)));
                let lines = top.update(stats(at, at / 2, vms.collect()));
                prop_assert!(lines.len() <= ROWS);
                prop_assert!(lines.iter().all(|line| line.chars().count() <= COLUMNS));
            }
        }
    }
}
