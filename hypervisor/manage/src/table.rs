//! Answers as text for people: aligned tables and short lists.
//!
//! Shared by the shell and `plinthctl`, so that both show the same. Text that came from elsewhere (names,
//! command lines, the log) is shown without control characters. Every line ends with `\n`.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};

use crate::{config::time, trace::Kind};

use crate::command::{
    Answer, Failure, FailureCode, Figures, HostDetails, HostStats, LogLine, PoolDetails,
    SchedDetails, SchedParameters, TraceChunk, TraceDetails, VcpuStats, VmDetails, VmState,
    VmSummary,
};

/// How a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Figures.
    Right,
}

/// Rows below headings; each column is as wide as its widest cell.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Table {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row: a cell for each column. Missing cells are empty, further ones are left out.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| printable(&cell));
        self.rows.push(cells.take(self.columns.len()).collect());
    }

    /// The text, headings first.
    pub fn render(&self) -> String {
        let cell = |row: &[String], n: usize| row.get(n).cloned().unwrap_or_default();
        let width = |n: usize| {
            let cells = self.rows.iter().map(|row| cell(row, n).chars().count());
            cells.chain([self.columns[n].0.len()]).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.columns.len()).map(width).collect();
        let headings: Vec<_> = self.columns.iter().map(|(h, _)| (*h).to_owned()).collect();
        let mut text = String::new();
        for row in core::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for (n, (_, align)) in self.columns.iter().enumerate() {
                let (cell, width) = (cell(row, n), widths[n]);
                line += &match align {
                    Align::Left => format!("{cell:<width$}  "),
                    Align::Right => format!("{cell:>width$}  "),
                };
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

/// Names and values, one pair a line.
struct List(Vec<(&'static str, String)>);

impl List {
    fn render(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let line = |(name, value): &(&str, String)| {
            let line = format!("{name:<width$}  {}", printable(value));
            line.trim_end().to_owned() + "\n"
        };
        self.0.iter().map(line).collect()
    }
}

/// A text without control characters: each shows as `?`.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(shown).collect()
}

/// An answer as text.
pub fn answer(answer: &Answer) -> String {
    match answer {
        Answer::Done { text } => printable(text) + "\n",
        Answer::Vms { vms } => vm_list(vms),
        Answer::Vm { vm } => vm_details(vm),
        Answer::Host { host } => host_details(host),
        Answer::Sched { sched } => sched_details(sched),
        Answer::Stats { stats } => host_stats(stats),
        Answer::Log { lines } => lines.iter().map(log_line).collect(),
        Answer::Trace { trace } => trace_details(trace),
        Answer::TraceRecords { chunk } => trace_chunk(chunk),
    }
}

/// A failure as text.
pub fn failure(failure: &Failure) -> String {
    let kind = match failure.code {
        FailureCode::BadRequest => "bad request",
        FailureCode::BadVersion => "another version",
        FailureCode::NotFound => "not found",
        FailureCode::Exists => "exists already",
        FailureCode::WrongState => "not in this state",
        FailureCode::NoRoom => "no room",
        FailureCode::Busy => "busy",
        FailureCode::Internal => "the host failed",
    };
    // Several problems are a line each.
    let mut lines = failure.message.lines().map(printable);
    let first = lines.next().unwrap_or_default();
    let more: String = lines.map(|line| format!("  {line}\n")).collect();
    format!("error: {kind}: {first}\n{more}")
}

/// What a state is called.
pub const fn state(state: VmState) -> &'static str {
    match state {
        VmState::Off => "off",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopping => "stopping",
        VmState::Ending => "ending",
        VmState::Waiting => "waiting",
    }
}

/// Bytes in the largest unit that suits, with one decimal where it is not whole.
pub fn size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, unit)) = UNITS.iter().find(|(shift, _)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    match tenths % 10 {
        0 => format!("{} {unit}", tenths / 10),
        rest => format!("{}.{rest} {unit}", tenths / 10),
    }
}

/// A length of time, in the unit in which it has few digits: `850 ns`, `12.3 us`, `4.0 ms`, `7.5 s`.
pub fn duration(ns: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us")];
    match UNITS.iter().find(|(unit, _)| ns >= *unit) {
        None => format!("{ns} ns"),
        Some((unit, name)) => {
            format!("{}.{} {name}", ns / unit, ns % unit * 10 / unit)
        }
    }
}

/// A length of time as a clock shows it: `0:01:07`, `3d 4:05:06`.
pub fn clock(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let rest = format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60);
    match days {
        0 => rest,
        days => format!("{days}d {rest}"),
    }
}

fn vm_list(vms: &[VmSummary]) -> String {
    if vms.is_empty() {
        return "no VMs\n".to_owned();
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("VCPUS", Align::Right),
        ("MEMORY", Align::Right),
        ("UPTIME", Align::Right),
        ("CPU TIME", Align::Right),
        ("STARTS", Align::Right),
        ("LAST END", Align::Left),
    ]);
    for vm in vms {
        table.row([
            vm.name.clone(),
            state(vm.state).to_owned(),
            vm.vcpus.to_string(),
            size(vm.memory_bytes),
            uptime(vm),
            duration(vm.run_ns),
            vm.starts.to_string(),
            or_dash(vm.last_end.as_deref().unwrap_or_default()),
        ]);
    }
    table.render()
}

/// How long a VM has run; nothing, if it is off.
fn uptime(vm: &VmSummary) -> String {
    match vm.uptime_ns {
        0 => "-".to_owned(),
        ns => clock(ns),
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

fn parameters(sched: &SchedParameters) -> String {
    let mut text = format!("pool {}, weight {}", sched.pool, sched.weight);
    if sched.cap > 0 {
        text += &format!(", cap {} %", sched.cap);
    }
    text += &format!(", priority {}", sched.priority);
    if !sched.affinity.is_empty() {
        text += &format!(", on processors {}", numbers(&sched.affinity));
    }
    if let Some((budget, period)) = sched.reservation_us {
        text += &format!(", {} in each {} per vCPU", time(budget), time(period));
    }
    text
}

/// Numbers as a list with ranges: `0-2,5`.
pub fn numbers(numbers: &[u32]) -> String {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for number in sorted {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let part = |&(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

fn vm_details(vm: &VmDetails) -> String {
    let summary = &vm.summary;
    let mut list = List(Vec::from([
        ("name", summary.name.clone()),
        ("state", state(summary.state).to_owned()),
        ("vcpus", summary.vcpus.to_string()),
        ("memory", size(summary.memory_bytes)),
        ("uptime", uptime(summary)),
        ("cpu time", duration(summary.run_ns)),
        ("starts", summary.starts.to_string()),
        ("boot", or_dash(&vm.boot)),
        ("cmdline", or_dash(&vm.cmdline)),
        ("restart", vm.restart.clone()),
        (
            "last end",
            or_dash(summary.last_end.as_deref().unwrap_or_default()),
        ),
        ("sched", parameters(&vm.sched)),
    ]));
    for disk in &vm.disks {
        list.0.push(("disk", disk.clone()));
    }
    let mut text = list.render();
    if !vm.vcpu.is_empty() {
        text += "\n";
        text += &vcpu_table([(summary.name.as_str(), vm.vcpu.as_slice())]);
        for vcpu in &vm.vcpu {
            text += &exits(vcpu);
            text += &latency(vcpu);
        }
    }
    text
}

fn exits(vcpu: &VcpuStats) -> String {
    let mut kinds = vcpu.exits.clone();
    kinds.sort_by_key(|(_, count)| core::cmp::Reverse(*count));
    let mut text = format!("vCPU {} exits:", vcpu.vcpu);
    for (kind, count) in &kinds {
        text += &format!(" {} {count}", printable(kind));
    }
    if kinds.is_empty() {
        text += " none";
    }
    text + "\n"
}

/// How soon a vCPU came to run after its wake-ups, by powers of two.
fn latency(vcpu: &VcpuStats) -> String {
    if vcpu.latency_ns.is_empty() {
        return String::new();
    }
    let classes = vcpu.latency_ns.iter();
    let classes = classes.map(|(most, count)| format!("{count} within {}", duration(*most)));
    let classes: Vec<_> = classes.collect();
    format!(
        "vCPU {} ran after wake-ups: {}\n",
        vcpu.vcpu,
        classes.join(", ")
    )
}

/// Figures of VMs, and of all together.
fn figures_table<'a>(rows: impl IntoIterator<Item = (&'a str, &'a Figures)>) -> String {
    let mut table = Table::new(&[
        ("VM", Align::Left),
        ("RUN", Align::Right),
        ("WAIT", Align::Right),
        ("AVG WAIT", Align::Right),
        ("THROTTLED", Align::Right),
        ("RESPONSE", Align::Right),
        ("P99", Align::Right),
        ("BURSTS", Align::Right),
        ("SWITCHES", Align::Right),
        ("I/O", Align::Right),
    ]);
    for (name, f) in rows {
        table.row([
            name.to_owned(),
            duration(f.run_ns),
            duration(f.wait_ns),
            duration(f.average_wait_ns),
            duration(f.throttled_ns),
            duration(f.response_ns),
            duration(f.response_p99_ns),
            f.bursts.to_string(),
            f.switches.to_string(),
            size(f.io_bytes),
        ]);
    }
    table.render()
}

fn vcpu_table<'a>(vms: impl IntoIterator<Item = (&'a str, &'a [VcpuStats])>) -> String {
    let mut table = Table::new(&[
        ("VCPU", Align::Left),
        ("STATE", Align::Left),
        ("PCPU", Align::Right),
        ("RUN", Align::Right),
        ("WAIT", Align::Right),
        ("RESPONSE", Align::Right),
        ("P99", Align::Right),
        ("WAKE-UPS", Align::Right),
        ("SWITCHES", Align::Right),
        ("MOVES", Align::Right),
        ("I/O", Align::Right),
        ("EXITS", Align::Right),
    ]);
    for (name, vcpus) in vms {
        for vcpu in vcpus {
            table.row([
                format!("{name}.{}", vcpu.vcpu),
                vcpu.state.clone(),
                vcpu.pcpu.to_string(),
                duration(vcpu.run_ns),
                duration(vcpu.wait_ns),
                duration(vcpu.response_ns),
                duration(vcpu.response_p99_ns),
                vcpu.wakeups.to_string(),
                vcpu.switches.to_string(),
                vcpu.migrations.to_string(),
                size(vcpu.io_bytes),
                exit_count(vcpu).to_string(),
            ]);
        }
    }
    table.render()
}

/// A vCPU's exits of all kinds.
pub fn exit_count(vcpu: &VcpuStats) -> u64 {
    let counts = vcpu.exits.iter().map(|(_, count)| *count);
    counts.fold(0, u64::saturating_add)
}

fn host_details(host: &HostDetails) -> String {
    List(Vec::from([
        ("version", format!("Plinth {}", host.version)),
        ("protocol", host.protocol.to_string()),
        ("backend", host.backend.clone()),
        ("processor", or_dash(host.processor.trim())),
        ("processors", host.pcpus.to_string()),
        (
            "TSC",
            format!(
                "{}.{:03} MHz",
                host.tsc_hz / 1_000_000,
                host.tsc_hz / 1000 % 1000
            ),
        ),
        ("uptime", clock(host.uptime_ns)),
        (
            "memory",
            format!(
                "{}, {} free",
                size(host.memory_bytes),
                size(host.memory_free_bytes)
            ),
        ),
        ("heap", format!("{} used", size(host.heap_bytes))),
    ]))
    .render()
}

/// What each processor of a pool keeps for reservations, and may keep.
fn reserved(pool: &PoolDetails) -> String {
    if pool.reservable_permille == 0 {
        return "-".to_owned();
    }
    let percent = |permille: &u32| percent(u64::from(*permille), 1000);
    let mut each: Vec<_> = pool.reserved_permille.iter().map(percent).collect();
    // One figure says it all if they are the same.
    if each.iter().all(|one| *one == each[0]) {
        each.truncate(1);
    }
    let most = percent(&pool.reservable_permille);
    format!("{} of {most} % each", each.join(", "))
}

fn sched_details(sched: &SchedDetails) -> String {
    let mut pools = Table::new(&[
        ("POOL", Align::Left),
        ("POLICY", Align::Left),
        ("PROCESSORS", Align::Left),
        ("SLICE", Align::Right),
        ("RESERVED", Align::Left),
    ]);
    for pool in &sched.pools {
        pools.row([
            pool.name.clone(),
            pool.policy.clone(),
            or_dash(&numbers(&pool.pcpus)),
            time(pool.slice_us),
            reserved(pool),
        ]);
    }
    let mut vms = Table::new(&[
        ("VM", Align::Left),
        ("POOL", Align::Left),
        ("WEIGHT", Align::Right),
        ("CAP", Align::Right),
        ("PRIORITY", Align::Right),
        ("AFFINITY", Align::Left),
        ("RESERVATION", Align::Left),
    ]);
    for (name, p) in &sched.vms {
        vms.row([
            name.clone(),
            p.pool.clone(),
            p.weight.to_string(),
            match p.cap {
                0 => "-".to_owned(),
                cap => format!("{cap} %"),
            },
            p.priority.to_string(),
            or_dash(&numbers(&p.affinity)),
            match p.reservation_us {
                None => "-".to_owned(),
                Some((budget, period)) => format!("{} in each {}", time(budget), time(period)),
            },
        ]);
    }
    pools.render() + "\n" + &vms.render()
}

/// Thousandths as a number with three decimals.
pub fn permille(value: u32) -> String {
    format!("{}.{:03}", value / 1000, value % 1000)
}

/// A share of a time in percent, with one decimal. Of no time it is 0.
pub fn percent(part_ns: u64, whole_ns: u64) -> String {
    let tenths = match whole_ns {
        0 => 0,
        whole => (u128::from(part_ns) * 1000 + u128::from(whole) / 2) / u128::from(whole),
    };
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn host_stats(stats: &HostStats) -> String {
    let mut pcpus = Table::new(&[
        ("PCPU", Align::Right),
        ("BUSY %", Align::Right),
        ("BUSY", Align::Right),
        ("IDLE", Align::Right),
        ("SWITCHES", Align::Right),
        ("QUEUED", Align::Right),
    ]);
    for pcpu in &stats.pcpus {
        pcpus.row([
            pcpu.pcpu.to_string(),
            percent(pcpu.busy_ns, pcpu.busy_ns.saturating_add(pcpu.idle_ns)),
            duration(pcpu.busy_ns),
            duration(pcpu.idle_ns),
            pcpu.switches.to_string(),
            pcpu.queued.to_string(),
        ]);
    }
    let totals = stats
        .vms
        .iter()
        .map(|vm| (vm.summary.name.as_str(), &vm.total));
    let vms = stats
        .vms
        .iter()
        .map(|vm| (vm.summary.name.as_str(), vm.vcpu.as_slice()));
    let head = format!(
        "at {}, fairness {}\n\n",
        clock(stats.at_ns),
        permille(stats.fairness_permille)
    );
    // Of one VM alone there are no processors, and its own figures are all.
    let (pcpus, all) = match stats.pcpus.is_empty() {
        true => (String::new(), None),
        false => (pcpus.render() + "\n", Some(("all", &stats.total))),
    };
    let (totals, vcpus) = (figures_table(totals.chain(all)), vcpu_table(vms));
    head + &pcpus + &totals + "\n" + &vcpus
}

fn log_line(line: &LogLine) -> String {
    let us = line.at_ns / 1000;
    let level = match line.level.as_str() {
        "error" => "error: ",
        "warn" => "warning: ",
        _ => "",
    };
    let text = printable(&line.text);
    format!(
        "[{:4}.{:06}] {level}{text}\n",
        us / 1_000_000,
        us % 1_000_000
    )
}

fn trace_details(trace: &TraceDetails) -> String {
    let is = if trace.on {
        "is recorded"
    } else {
        "is not recorded"
    };
    if trace.rings.is_empty() {
        return format!("a trace {is}, and none was\n");
    }
    let columns = [
        ("PCPU", Align::Right),
        ("RECORDS", Align::Right),
        ("OVERWRITTEN", Align::Right),
    ];
    let mut table = Table::new(&columns);
    for ring in &trace.rings {
        let kept = ring.next.saturating_sub(ring.oldest);
        table.row([
            ring.pcpu.to_string(),
            kept.to_string(),
            ring.oldest.to_string(),
        ]);
    }
    format!(
        "a trace {is}; a processor keeps {} records\n{}",
        trace.capacity,
        table.render()
    )
}

fn trace_chunk(chunk: &TraceChunk) -> String {
    let columns = ["RECORD", "TICKS", "KIND", "VM", "VCPU", "DETAIL", "EXTRA"];
    let mut table = Table::new(&columns.map(|name| (name, Align::Right)));
    for (number, r) in (chunk.first..).zip(&chunk.records) {
        let kind =
            Kind::from_number(r.kind).map_or_else(|| r.kind.to_string(), |k| format!("{k:?}"));
        let (vm, vcpu) = (r.vm.to_string(), r.vcpu.to_string());
        let (detail, extra) = (r.detail.to_string(), format!("{:#x}", r.extra));
        table.row([
            number.to_string(),
            r.tsc.to_string(),
            kind,
            vm,
            vcpu,
            detail,
            extra,
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{PcpuStats, VmStats};
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn units_suit_the_value() {
        let sizes = [
            0,
            1023,
            1024,
            1536,
            32 << 20,
            1 << 30,
            (1 << 40) + (1 << 39),
        ];
        let shown = [
            "0 B", "1023 B", "1 KiB", "1.5 KiB", "32 MiB", "1 GiB", "1.5 TiB",
        ];
        assert_eq!(sizes.map(size), shown);
        let times = [0, 999, 1_250, 4_000_000, 7_500_000_000];
        let shown = ["0 ns", "999 ns", "1.2 us", "4.0 ms", "7.5 s"];
        assert_eq!(times.map(duration), shown);
        let second = 1_000_000_000;
        assert_eq!(clock(67 * second), "0:01:07");
        assert_eq!(clock((3 * 86_400 + 4 * 3600 + 306) * second), "3d 4:05:06");
        assert_eq!(percent(1, 3), "33.3");
        assert_eq!(percent(5, 0), "0.0");
        assert_eq!(permille(998), "0.998");
        assert_eq!(numbers(&[5, 0, 2, 1, 2]), "0-2,5");
    }

    fn summary(name: &str) -> VmSummary {
        VmSummary {
            name: name.into(),
            state: VmState::Running,
            vcpus: 2,
            memory_bytes: 1 << 30,
            uptime_ns: 67_000_000_000,
            run_ns: 12_300_000_000,
            starts: 1,
            last_end: None,
        }
    }

    #[test]
    fn columns_are_aligned() {
        let vms = vec![summary("a"), summary("a-long-name")];
        assert_eq!(
            answer(&Answer::Vms { vms }),
            "NAME         STATE    VCPUS  MEMORY   UPTIME  CPU TIME  STARTS  LAST END\n\
             a            running      2   1 GiB  0:01:07    12.3 s       1  -\n\
             a-long-name  running      2   1 GiB  0:01:07    12.3 s       1  -\n"
        );
        assert_eq!(answer(&Answer::Vms { vms: vec![] }), "no VMs\n");
    }

    #[test]
    fn a_failure_says_which_kind() {
        let text = failure(&Failure::new(FailureCode::NotFound, "there is no VM \"x\""));
        assert_eq!(text, "error: not found: there is no VM \"x\"\n");
        let text = failure(&Failure::new(FailureCode::BadRequest, "one\x1b\ntwo"));
        assert_eq!(text, "error: bad request: one?\n  two\n");
    }

    #[test]
    fn log_lines_look_as_on_the_screen() {
        let line = |level: &str| LogLine {
            number: 7,
            at_ns: 1_500_000_000,
            level: level.into(),
            text: "disk\x1b[2Jfull".into(),
        };
        let lines = vec![line("info"), line("warn")];
        assert_eq!(
            answer(&Answer::Log { lines }),
            "[   1.500000] disk?[2Jfull\n[   1.500000] warning: disk?[2Jfull\n"
        );
    }

    #[test]
    fn details_show_parameters_and_exits() {
        let vm = VmDetails {
            summary: summary("web"),
            boot: "vmlinuz".into(),
            cmdline: String::new(),
            restart: "never".into(),
            disks: vec!["root.img".into()],
            sched: SchedParameters {
                pool: "default".into(),
                weight: 100,
                cap: 50,
                priority: 4,
                affinity: vec![0, 1],
                reservation_us: Some((2000, 10_000)),
            },
            vcpu: vec![VcpuStats {
                state: "running".into(),
                exits: vec![("port".into(), 3), ("cpuid".into(), 9)],
                latency_ns: vec![(512, 7), (4096, 1)],
                ..VcpuStats::default()
            }],
        };
        let text = answer(&Answer::Vm { vm });
        for part in [
            "disk      root.img\n",
            "sched     pool default, weight 100, cap 50 %, priority 4, on processors 0-1, \
             2 ms in each 10 ms per vCPU\n",
            "vCPU 0 exits: cpuid 9 port 3\n",
            "vCPU 0 ran after wake-ups: 7 within 512 ns, 1 within 4.0 us\n",
            "web.0  running",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn of_one_vm_its_own_figures_are_shown() {
        let figures = Figures {
            run_ns: 5_000_000,
            ..Figures::default()
        };
        let mut stats = HostStats {
            at_ns: 67_000_000_000,
            pcpus: vec![],
            vms: vec![VmStats {
                summary: summary("web"),
                weight: 100,
                total: figures.clone(),
                vcpu: vec![VcpuStats::from(figures.clone())],
            }],
            total: figures,
            fairness_permille: 1000,
        };
        let first = |text: &str| -> Vec<String> {
            let words = text.lines().map(|line| line.split_whitespace().next());
            words.flatten().map(String::from).collect()
        };
        let stats_text = |stats: &HostStats| {
            answer(&Answer::Stats {
                stats: stats.clone(),
            })
        };
        let text = stats_text(&stats);
        assert_eq!(first(&text), ["at", "VM", "web", "VCPU", "web.0"], "{text}");
        assert_eq!(text.matches("5.0 ms").count(), 2, "{text}");
        stats.pcpus.push(PcpuStats {
            pcpu: 0,
            busy_ns: 1,
            idle_ns: 1,
            switches: 0,
            queued: 0,
        });
        let text = stats_text(&stats);
        let all = ["at", "PCPU", "0", "VM", "web", "all", "VCPU", "web.0"];
        assert_eq!(first(&text), all, "{text}");
    }

    proptest! {
        #[test]
        fn no_control_character_is_shown(cells in prop::collection::vec(any::<String>(), 0..5)) {
            let mut table = Table::new(&[("A", Align::Left), ("B", Align::Right)]);
            table.row(cells);
            let text = table.render();
            prop_assert_eq!(text.lines().count(), 2);
            prop_assert!(!text.chars().any(|c| c != '\n' && c.is_control()));
        }

        #[test]
        fn any_figure_can_be_shown(n in any::<u64>(), m in any::<u64>()) {
            let _ = (size(n), duration(n), clock(n), percent(n, m));
        }
    }
}
