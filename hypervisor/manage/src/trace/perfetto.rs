//! A trace as a file that Perfetto and chrome://tracing open: JSON trace events.
//!
//! One process stands for the host, with a track per host processor that shows which vCPU it ran; one for
//! each VM, with a track per vCPU that shows where it ran, and in that its exits by name. Injections, wake-ups, device
//! work and timers are instants; busy processors and exits per millisecond are counters.
//!
//! Slices of a vCPU on a processor and wake-ups have the category `sched` and say in their arguments `vm`, `vcpu` and
//! `pcpu`, and for a slice `why` it ended: `cargo xtask sched-sim` reads these.
//!
//! The format: "Trace Event Format", the JSON object form. Times there are microseconds; here they
//! are those since the trace's start, to the nanosecond.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    string::{String, ToString},
    vec::Vec,
};
use core::fmt::{self, Write};

use super::{INJECTED_NMI, Kind, OWN_TIMER, Record, Why};
use crate::command::TraceDetails;

/// Process number of the host.
const HOST: u32 = 1;
/// Process number of a VM, less the VM's own number.
const VMS: u32 = 10;
/// Width of the buckets of the counter of exits.
const BUCKET_NS: u64 = 1_000_000;

/// All that was read of one host processor.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Host processor.
    pub pcpu: u32,
    /// Pieces in which no record is missing, with how many are missing before each.
    pub pieces: Vec<(u64, Vec<Record>)>,
}

/// A track: process and thread.
type Track = (u32, u32);

fn host_track(pcpu: u32) -> Track {
    (HOST, pcpu + 1)
}

fn vcpu_track((vm, vcpu): (u16, u8)) -> Track {
    (VMS + u32::from(vm), u32::from(vcpu) + 1)
}

/// Writes the whole file.
///
/// # Errors
/// `out` fails.
pub fn write(
    out: &mut impl Write,
    details: &TraceDetails,
    recorded: &[Recorded],
) -> Result<(), fmt::Error> {
    out.write_str("{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n")?;
    let mut writer = Writer {
        out,
        details,
        tracks: BTreeSet::new(),
        exits: BTreeMap::new(),
        busy: Vec::new(),
        first: true,
    };
    for ring in recorded {
        writer.ring(ring)?;
    }
    writer.counters()?;
    writer.names()?;
    out.write_str("\n]}\n")
}

/// A vCPU on a processor.
#[derive(Clone, Copy)]
struct Running {
    vcpu: (u16, u8),
    since: u64,
    /// The exit that is being handled: when it came, its number and extra.
    exit: Option<(u64, u16, u16)>,
}

struct Writer<'a, W> {
    out: &'a mut W,
    details: &'a TraceDetails,
    tracks: BTreeSet<Track>,
    /// Exits by VM and bucket of time.
    exits: BTreeMap<(u16, u64), u64>,
    /// When a processor came to run a vCPU (+1) or ceased to (-1).
    busy: Vec<(u64, i32)>,
    first: bool,
}

impl<W: Write> Writer<'_, W> {
    /// Nanoseconds since the trace's start.
    fn ns(&self, tsc: u64) -> u64 {
        let ticks = tsc.saturating_sub(self.details.started_tsc);
        let hz = u128::from(self.details.tsc_hz.max(1));
        u64::try_from(u128::from(ticks) * 1_000_000_000 / hz).unwrap_or(u64::MAX)
    }

    fn vm_name(&self, vm: u16) -> String {
        let found = self.details.vms.iter().find(|(number, _)| *number == vm);
        found.map_or_else(|| format_text(format_args!("VM {vm}")), |(_, n)| n.clone())
    }

    fn exit_name(&self, number: u16) -> String {
        match self.details.exits.get(usize::from(number)) {
            Some(name) => name.clone(),
            None => format_text(format_args!("exit {number}")),
        }
    }

    fn separate(&mut self) -> fmt::Result {
        if !core::mem::replace(&mut self.first, false) {
            self.out.write_str(",\n")?;
        }
        Ok(())
    }

    fn slice(
        &mut self,
        track: Track,
        name: &str,
        (begin, end): (u64, u64),
        category: &str,
        args: &str,
    ) -> fmt::Result {
        self.tracks.insert(track);
        self.separate()?;
        let (begin, end) = (self.ns(begin), self.ns(end));
        write!(
            self.out,
            "{{\"ph\":\"X\",\"cat\":\"{category}\",\"pid\":{},\"tid\":{},\"ts\":{},\"dur\":{},\"name\":{},\"args\":{{{args}}}}}",
            track.0,
            track.1,
            Us(begin),
            Us(end.saturating_sub(begin)),
            quoted(name),
        )
    }

    fn instant(&mut self, track: Track, name: &str, at: u64) -> fmt::Result {
        self.instant_with(track, name, at, "vcpu", "")
    }

    fn instant_with(
        &mut self,
        track: Track,
        name: &str,
        at: u64,
        category: &str,
        args: &str,
    ) -> fmt::Result {
        self.tracks.insert(track);
        self.separate()?;
        let at = self.ns(at);
        write!(
            self.out,
            "{{\"ph\":\"i\",\"s\":\"t\",\"cat\":\"{category}\",\"pid\":{},\"tid\":{},\"ts\":{},\"name\":{},\"args\":{{{args}}}}}",
            track.0,
            track.1,
            Us(at),
            quoted(name),
        )
    }

    /// Whose vCPU, and on which processor, as arguments.
    fn whose(&self, (vm, vcpu): (u16, u8), pcpu: u32) -> String {
        let vm = quoted(&self.vm_name(vm));
        format_text(format_args!("\"vm\":{vm},\"vcpu\":{vcpu},\"pcpu\":{pcpu}"))
    }

    fn counter(&mut self, pid: u32, name: &str, at_ns: u64, value: u64) -> fmt::Result {
        self.separate()?;
        write!(
            self.out,
            "{{\"ph\":\"C\",\"pid\":{pid},\"tid\":0,\"ts\":{},\"name\":{},\"args\":{{\"value\":{value}}}}}",
            Us(at_ns),
            quoted(name),
        )
    }

    fn ring(&mut self, ring: &Recorded) -> fmt::Result {
        let host = host_track(ring.pcpu);
        self.tracks.insert(host);
        for (missing, records) in &ring.pieces {
            let Some(first) = records.first() else {
                continue;
            };
            if *missing > 0 {
                let name = format_text(format_args!("{missing} records are missing"));
                self.instant(host, &name, first.tsc)?;
            }
            let mut running: Option<Running> = None;
            for record in records {
                self.record(ring.pcpu, record, &mut running)?;
            }
            let last = records.last().map_or(0, |record| record.tsc);
            self.leave(ring.pcpu, &mut running, last, "unknown")?;
        }
        Ok(())
    }

    fn record(&mut self, pcpu: u32, r: &Record, running: &mut Option<Running>) -> fmt::Result {
        let vcpu = (r.vm, r.vcpu);
        let track = vcpu_track(vcpu);
        let Some(kind) = Kind::from_number(r.kind) else {
            let name = format_text(format_args!("kind {}", r.kind));
            return self.instant(host_track(pcpu), &name, r.tsc);
        };
        match kind {
            Kind::SwitchIn => {
                if r.detail == OWN_TIMER {
                    let ago = u64::from(r.extra) * (self.details.tsc_hz / 1_000_000);
                    let args = self.whose(vcpu, pcpu);
                    let at = r.tsc.saturating_sub(ago);
                    self.instant_with(track, "wake", at, "sched", &args)?;
                }
                self.leave(pcpu, running, r.tsc, "other")?;
                self.enter(vcpu, r.tsc, running);
            }
            Kind::SwitchOut => self.leave(pcpu, running, r.tsc, Why::name(r.detail))?,
            Kind::Entry | Kind::Exit => {
                // A piece may begin in the midst of a run.
                if running.is_none_or(|running| running.vcpu != vcpu) {
                    self.leave(pcpu, running, r.tsc, "other")?;
                    self.enter(vcpu, r.tsc, running);
                }
                self.end_exit(running, r.tsc)?;
                if let (Kind::Exit, Some(running)) = (kind, running) {
                    running.exit = Some((r.tsc, r.detail, r.extra));
                    let bucket = self.ns(r.tsc) / BUCKET_NS;
                    *self.exits.entry((r.vm, bucket)).or_default() += 1;
                }
            }
            Kind::Inject => {
                let name = match r.detail {
                    INJECTED_NMI => "inject NMI".to_string(),
                    vector => format_text(format_args!("inject vector {vector:#x}")),
                };
                self.instant(track, &name, r.tsc)?;
            }
            Kind::Wake => {
                let args = self.whose(vcpu, pcpu);
                self.instant_with(track, "wake", r.tsc, "sched", &args)?;
            }
            Kind::Device => self.instant(track, "device work", r.tsc)?,
            Kind::Timer => self.instant(host_track(pcpu), "timer", r.tsc)?,
        }
        Ok(())
    }

    fn enter(&mut self, vcpu: (u16, u8), since: u64, running: &mut Option<Running>) {
        self.busy.push((self.ns(since), 1));
        *running = Some(Running {
            vcpu,
            since,
            exit: None,
        });
    }

    /// The exit that was being handled is done.
    fn end_exit(&mut self, running: &mut Option<Running>, end: u64) -> fmt::Result {
        let Some(running) = running.as_mut() else {
            return Ok(());
        };
        let Some((begin, number, extra)) = running.exit.take() else {
            return Ok(());
        };
        let name = self.exit_name(number);
        let args = match name.as_str() {
            "port-io" => format_text(format_args!("\"port\":\"{extra:#x}\"")),
            _ => String::new(),
        };
        let track = vcpu_track(running.vcpu);
        self.slice(track, &name, (begin, end), "exit", &args)
    }

    /// What runs on this processor leaves it.
    fn leave(
        &mut self,
        pcpu: u32,
        running: &mut Option<Running>,
        end: u64,
        why: &str,
    ) -> fmt::Result {
        self.end_exit(running, end)?;
        let Some(Running { vcpu, since, .. }) = running.take() else {
            return Ok(());
        };
        self.busy.push((self.ns(end), -1));
        let name = format_text(format_args!("{} vCPU {}", self.vm_name(vcpu.0), vcpu.1));
        let whose = self.whose(vcpu, pcpu);
        let args = format_text(format_args!("{whose},\"why\":{}", quoted(why)));
        self.slice(host_track(pcpu), &name, (since, end), "sched", &args)?;
        let name = format_text(format_args!("on pCPU {pcpu}"));
        self.slice(vcpu_track(vcpu), &name, (since, end), "vcpu", &args)
    }

    fn counters(&mut self) -> fmt::Result {
        let mut busy = core::mem::take(&mut self.busy);
        busy.sort_unstable();
        let mut now = 0i64;
        for (index, (at, change)) in busy.iter().enumerate() {
            now += i64::from(*change);
            // One value for each moment.
            if busy.get(index + 1).is_none_or(|(next, _)| next != at) {
                let value = u64::try_from(now).unwrap_or(0);
                self.counter(HOST, "busy processors", *at, value)?;
            }
        }
        let exits = core::mem::take(&mut self.exits);
        for (&(vm, bucket), &count) in &exits {
            let pid = VMS + u32::from(vm);
            self.counter(pid, "exits per ms", bucket * BUCKET_NS, count)?;
            if !exits.contains_key(&(vm, bucket + 1)) {
                self.counter(pid, "exits per ms", (bucket + 1) * BUCKET_NS, 0)?;
            }
        }
        Ok(())
    }

    fn names(&mut self) -> fmt::Result {
        let tracks = core::mem::take(&mut self.tracks);
        let mut processes: Vec<u32> = tracks.iter().map(|track| track.0).collect();
        processes.dedup();
        for pid in processes {
            let name = match u16::try_from(pid.wrapping_sub(VMS)) {
                Err(_) => "host processors".to_string(),
                Ok(vm) => format_text(format_args!("VM {}", self.vm_name(vm))),
            };
            self.name("process_name", (pid, 0), &name)?;
        }
        for track in tracks {
            let name = match track {
                (HOST, tid) => format_text(format_args!("pCPU {}", tid - 1)),
                (_, tid) => format_text(format_args!("vCPU {}", tid - 1)),
            };
            self.name("thread_name", track, &name)?;
        }
        Ok(())
    }

    fn name(&mut self, what: &str, (pid, tid): Track, name: &str) -> fmt::Result {
        self.separate()?;
        let name = quoted(name);
        write!(
            self.out,
            "{{\"ph\":\"M\",\"pid\":{pid},\"tid\":{tid},\"ts\":0,\"name\":\"{what}\",\"args\":{{\"name\":{name}}}}}"
        )
    }
}

/// Nanoseconds, shown as microseconds.
struct Us(u64);

impl fmt::Display for Us {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

fn format_text(args: fmt::Arguments<'_>) -> String {
    alloc::fmt::format(args)
}

/// A JSON string.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_else(|_| "\"\"".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::TraceRing;
    use proptest::prelude::*;
    use serde_json::Value;

    fn details() -> TraceDetails {
        TraceDetails {
            on: false,
            tsc_hz: 2_000_000_000,
            started_tsc: 1000,
            capacity: 100,
            rings: vec![TraceRing {
                pcpu: 0,
                oldest: 0,
                next: 9,
            }],
            exits: vec!["cpuid".into(), "hypercall".into(), "port-io".into()],
            vms: vec![(1, "a \"quoted\" one".into())],
        }
    }

    fn file(recorded: &[Recorded]) -> Vec<Value> {
        let mut text = String::new();
        write(&mut text, &details(), recorded).unwrap();
        check_trace_events(&text)
    }

    /// Checks a file against the trace event format, and returns its events.
    fn check_trace_events(text: &str) -> Vec<Value> {
        let file: Value = serde_json::from_str(text).unwrap();
        assert_eq!(file["displayTimeUnit"], "ns");
        let events = file["traceEvents"].as_array().unwrap().clone();
        let mut named = BTreeSet::new();
        let mut used = BTreeSet::new();
        let mut slices: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let ns = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
        for event in &events {
            let pid = event["pid"].as_u64().unwrap();
            let tid = event["tid"].as_u64().unwrap();
            assert!(event["name"].is_string() && event["ts"].is_number());
            match event["ph"].as_str().unwrap() {
                "X" => {
                    used.insert((pid, tid));
                    assert!(event["args"].is_object());
                    let begin = ns(&event["ts"]);
                    let end = begin + ns(&event["dur"]);
                    slices.entry((pid, tid)).or_default().push((begin, end));
                }
                "i" => {
                    used.insert((pid, tid));
                    assert_eq!(event["s"], "t");
                }
                "C" => assert!(event["args"]["value"].is_u64()),
                "M" => {
                    assert!(event["args"]["name"].is_string());
                    let what = event["name"].as_str().unwrap();
                    assert!(matches!(what, "process_name" | "thread_name"));
                    assert!(named.insert((what.to_string(), pid, tid)));
                }
                other => panic!("unknown phase {other}"),
            }
        }
        for (pid, tid) in used {
            assert!(named.contains(&("thread_name".to_string(), pid, tid)));
            assert!(named.contains(&("process_name".to_string(), pid, 0)));
        }
        // Slices of a track lie one in the other or one after the other.
        for (_, mut slices) in slices {
            slices.sort_by_key(|&(begin, end)| (begin, core::cmp::Reverse(end)));
            let mut open: Vec<u64> = Vec::new();
            for (begin, end) in slices {
                while open.last().is_some_and(|&outer| outer <= begin) {
                    open.pop();
                }
                assert!(open.last().is_none_or(|&outer| end <= outer));
                open.push(end);
            }
        }
        events
    }

    fn find<'e>(events: &'e [Value], pid: u64, name: &str) -> &'e Value {
        let found = events
            .iter()
            .find(|event| event["pid"] == pid && event["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {events:#?}"))
    }

    #[test]
    fn a_run_becomes_slices_on_both_tracks() {
        let vcpu = (1, 2);
        let mut port = Record::new(5000, Kind::Exit, vcpu, 2);
        port.extra = 0x60;
        let records = vec![
            Record::new(2000, Kind::Wake, vcpu, 0),
            Record::new(3000, Kind::SwitchIn, vcpu, 0),
            Record::new(3500, Kind::Inject, vcpu, 0x31),
            Record::new(4000, Kind::Entry, vcpu, 0),
            port,
            Record::new(5500, Kind::Device, vcpu, 0),
            Record::new(6000, Kind::Entry, vcpu, 0),
            Record::new(8000, Kind::Exit, vcpu, 77),
            Record::new(9000, Kind::SwitchOut, vcpu, Why::Idle as u16),
            Record::of_host(9500, Kind::Timer),
        ];
        let events = file(&[Recorded {
            pcpu: 3,
            pieces: vec![(0, records)],
        }]);
        let ran = find(&events, 1, "a \"quoted\" one vCPU 2");
        assert_eq!(
            (&ran["tid"], &ran["ts"], &ran["dur"]),
            (&4.into(), &1.0.into(), &3.0.into())
        );
        assert_eq!(ran["cat"], "sched");
        let args =
            serde_json::json!({"vm": "a \"quoted\" one", "vcpu": 2, "pcpu": 3, "why": "idle"});
        assert_eq!(ran["args"], args);
        let on = find(&events, 11, "on pCPU 3");
        assert_eq!((&on["tid"], &on["dur"]), (&3.into(), &3.0.into()));
        let exit = find(&events, 11, "port-io");
        assert_eq!((&exit["ts"], &exit["dur"]), (&2.0.into(), &0.5.into()));
        assert_eq!(exit["args"]["port"], "0x60");
        assert_eq!(find(&events, 11, "exit 77")["dur"], 0.5);
        for (pid, instant) in [(11, "inject vector 0x31"), (11, "wake"), (1, "timer")] {
            assert_eq!(find(&events, pid, instant)["ph"], "i");
        }
        assert_eq!(find(&events, 11, "exits per ms")["args"]["value"], 2);
        assert_eq!(
            find(&events, 11, "process_name")["args"]["name"],
            "VM a \"quoted\" one"
        );
        assert_eq!(find(&events, 1, "busy processors")["args"]["value"], 1);
    }

    #[test]
    fn who_is_woken_by_its_own_timer_is_woken_before_it_runs() {
        let mut begin = Record::new(9000, Kind::SwitchIn, (1, 0), OWN_TIMER);
        begin.extra = 2;
        let end = Record::new(9500, Kind::SwitchOut, (1, 0), Why::Idle as u16);
        let events = file(&[Recorded {
            pcpu: 0,
            pieces: vec![(0, vec![begin, end])],
        }]);
        let (woken, ran) = (find(&events, 11, "wake"), find(&events, 11, "on pCPU 0"));
        let time = |event: &Value| event["ts"].as_f64().unwrap();
        assert_eq!(time(ran) - time(woken), 2.0);
    }

    #[test]
    fn missing_records_are_told() {
        let piece = vec![Record::new(4000, Kind::Exit, (1, 0), 0)];
        let events = file(&[Recorded {
            pcpu: 0,
            pieces: vec![(17, piece)],
        }]);
        find(&events, 1, "17 records are missing");
        find(&events, 11, "on pCPU 0");
    }

    #[test]
    fn nothing_recorded_is_a_file_too() {
        assert!(file(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_was_recorded_the_file_is_valid(
            rings in prop::collection::vec(
                prop::collection::vec(
                    prop::collection::vec((0u64..3000, 0u8..11, 0u16..3, 0u8..3, 0u16..600, any::<u16>()), 0..20),
                    0..3,
                ),
                0..3,
            ),
        ) {
            // A vCPU runs on one processor at a time, so each ring here has VMs of its own.
            let recorded: Vec<Recorded> = rings.into_iter().zip(0..).map(|(pieces, pcpu)| {
                let mut now = 0;
                let pieces = pieces.into_iter().map(|piece| {
                    let records = piece.into_iter().map(|wire| {
                        let mut record = Record::from(wire);
                        now += record.tsc;
                        record.tsc = now;
                        record.vm += 10 * pcpu as u16;
                        record
                    });
                    (1, records.collect())
                });
                Recorded { pcpu, pieces: pieces.collect() }
            }).collect();
            file(&recorded);
        }
    }
}
