//! A workload from a recorded trace: what `plinthctl trace` writes, played again.
//!
//! The file is JSON trace events for Perfetto (`manage::trace::perfetto`). Read are, on the tracks of vCPUs, the slices `on pCPU N`, with
//! why the vCPU left in `args.why`, the instants `wake`, and the VMs' names; all else is passed over.
//! Of each vCPU the processor time from wake-up to block is kept, and the time until its next wake-up: the guest's
//! own behaviour, without what the scheduler that was recorded added.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use sched::Params;
use serde::Deserialize;

use crate::{
    Ns,
    workload::{Burst, Program, Vm, Workload},
};

/// Nanoseconds of a microsecond.
const MICROSECOND: f64 = 1_000.0;

/// Why a file is no trace to play.
#[derive(Debug, PartialEq, Eq)]
pub enum TraceError {
    /// It is not JSON of that form: what is wrong, with line and column.
    NotATrace(String),
    /// A time is negative, or not a time.
    BadTime,
    /// There is no vCPU that ran in it.
    NothingRan,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TraceError::NotATrace(why) => write!(f, "it is no Chrome trace: {why}"),
            TraceError::BadTime => f.write_str("an event has no time that can be"),
            TraceError::NothingRan => f.write_str(
                "no vCPU runs in it (`plinthctl trace` writes slices `on pCPU N`, with the time for each)",
            ),
        }
    }
}

impl std::error::Error for TraceError {}

#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Object {
        #[serde(rename = "traceEvents")]
        events: Vec<Event>,
    },
    List(Vec<Event>),
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    ph: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    tid: u32,
    #[serde(default)]
    args: Args,
}

#[derive(Default, Deserialize)]
struct Args {
    why: Option<String>,
    name: Option<String>,
}

impl Event {
    /// Begin and end.
    fn times(&self) -> Result<(Ns, Ns), TraceError> {
        let sane = |us: f64| (0.0..1e12).contains(&us);
        if !sane(self.ts) || !sane(self.dur) {
            return Err(TraceError::BadTime);
        }
        let ns = |us: f64| (us * MICROSECOND).round() as Ns;
        let begin = ns(self.ts);
        Ok((begin, begin + ns(self.dur)))
    }
}

/// What a vCPU is doing, as far as the trace has told.
#[derive(Clone, Copy, Debug)]
enum Doing {
    Unknown,
    Blocked(Ns),
    Ready,
    Running(Ns),
    Ended,
}

/// A vCPU whose history is being put together.
struct History {
    doing: Doing,
    first: Option<Ns>,
    bursts: Vec<Burst>,
    /// Processor time since its last wake-up.
    work: Ns,
}

impl History {
    fn ready(&mut self, at: Ns) {
        if let (Doing::Blocked(since), Some(last)) = (self.doing, self.bursts.last_mut()) {
            last.pause = at - since;
        }
        self.first.get_or_insert(at);
    }

    fn leave(&mut self, at: Ns) {
        if let Doing::Running(since) = self.doing {
            self.work += at - since;
        }
    }

    fn end_burst(&mut self) {
        let work = std::mem::take(&mut self.work);
        if work > 0 {
            self.bursts.push(Burst { work, pause: 0 });
        }
    }

    fn take(&mut self, what: What, at: Ns) {
        match (what, self.doing) {
            (_, Doing::Ended) | (What::Wake, Doing::Ready | Doing::Running(_)) => {}
            (What::Wake, Doing::Unknown | Doing::Blocked(_)) => {
                self.ready(at);
                self.doing = Doing::Ready;
            }
            (What::In, doing) => {
                if matches!(doing, Doing::Unknown | Doing::Blocked(_)) {
                    self.ready(at);
                }
                // A switch-out that the ring has lost happened at some time before.
                self.leave(at);
                self.doing = Doing::Running(at);
            }
            (What::Out(why), Doing::Running(_)) => {
                self.leave(at);
                self.doing = match why {
                    Why::Ready => Doing::Ready,
                    Why::Blocked => Doing::Blocked(at),
                    Why::Ended => Doing::Ended,
                };
                if why != Why::Ready {
                    self.end_burst();
                }
            }
            // It ran when the recording began.
            (What::Out(Why::Ready), _) => self.doing = Doing::Ready,
            (What::Out(Why::Blocked), _) => self.doing = Doing::Unknown,
            (What::Out(Why::Ended), _) => self.doing = Doing::Ended,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Ready,
    Blocked,
    Ended,
}

#[derive(Clone, Copy, Debug)]
enum What {
    In,
    Out(Why),
    Wake,
}

/// The workload that a trace tells of.
///
/// # Errors
/// See [`TraceError`].
pub fn import(name: &str, text: &str) -> Result<Workload, TraceError> {
    let file: File =
        serde_json::from_str(text).map_err(|e| TraceError::NotATrace(e.to_string()))?;
    let (File::Object { events } | File::List(events)) = file;
    let mut happened = Vec::new();
    let mut pcpus = BTreeSet::new();
    let mut names = BTreeMap::new();
    for event in &events {
        let vcpu = (event.pid, event.tid);
        if event.ph == "X"
            && let Some(pcpu) = event.name.strip_prefix("on pCPU ")
        {
            let (begin, end) = event.times()?;
            let why = match event.args.why.as_deref() {
                Some("idle") => Why::Blocked,
                Some("ended") => Why::Ended,
                _ => Why::Ready,
            };
            pcpus.insert(pcpu);
            happened.push((begin, What::In, vcpu));
            happened.push((end, What::Out(why), vcpu));
        } else if event.ph == "i" && event.name == "wake" {
            happened.push((event.times()?.0, What::Wake, vcpu));
        } else if event.ph == "M" && event.name == "process_name" {
            let name = event.args.name.as_deref().unwrap_or_default();
            names.insert(event.pid, name.strip_prefix("VM ").unwrap_or(name));
        }
    }
    // At one time an end comes before what follows it.
    happened.sort_by_key(|&(at, what, _)| (at, !matches!(what, What::Out(_))));
    let begin = happened.first().map_or(0, |&(at, ..)| at);
    let duration = happened.last().map_or(0, |&(at, ..)| at) - begin;
    let mut histories: BTreeMap<(u32, u32), History> = BTreeMap::new();
    for (at, what, vcpu) in happened {
        let history = histories.entry(vcpu).or_insert(History {
            doing: Doing::Unknown,
            first: None,
            bursts: Vec::new(),
            work: 0,
        });
        history.take(what, at - begin);
    }
    let mut vms: BTreeMap<u32, Vm> = BTreeMap::new();
    for ((vm, _), mut history) in histories {
        history.end_burst();
        let Some(first) = history.first.filter(|_| !history.bursts.is_empty()) else {
            continue;
        };
        let name = names
            .get(&vm)
            .map_or_else(|| vm.to_string(), |&name| name.into());
        let entry = vms.entry(vm).or_insert(Vm {
            name,
            params: Params::default(),
            measured: true,
            vcpus: Vec::new(),
        });
        let bursts = history.bursts.into();
        entry.vcpus.push(Program::Replay { first, bursts });
    }
    let vms: Vec<Vm> = vms.into_values().collect();
    if vms.is_empty() {
        return Err(TraceError::NothingRan);
    }
    Ok(Workload {
        pools: Vec::new(),
        name: name.into(),
        about: format!(
            "Recorded: {} vCPUs of {} VMs on {} processors, played again with the same bursts and pauses.",
            vms.iter().map(|vm| vm.vcpus.len()).sum::<usize>(),
            vms.len(),
            pcpus.len()
        ),
        pcpus: pcpus.len(),
        duration,
        vms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use manage::{
        command::TraceDetails,
        trace::{
            self, Kind, Record,
            perfetto::{self, Recorded},
        },
    };
    use proptest::prelude::*;

    const SLICE: u16 = trace::Why::SliceOver as u16;
    const IDLE: u16 = trace::Why::Idle as u16;
    const ENDED: u16 = trace::Why::Ended as u16;

    /// Time, kind, VM and vCPU, detail of a record.
    type Entry = (u64, Kind, (u16, u8), u16);

    /// What `plinthctl trace` makes of records of two processors. A tick is a nanosecond.
    fn file(rings: [&[Entry]; 2]) -> String {
        let details = TraceDetails {
            on: false,
            tsc_hz: 1_000_000_000,
            started_tsc: 0,
            capacity: 100,
            rings: Vec::new(),
            exits: vec!["cpuid".into()],
            vms: vec![(1, "a".into()), (2, "b".into())],
        };
        let recorded: Vec<_> = rings
            .iter()
            .enumerate()
            .map(|(pcpu, records)| Recorded {
                pcpu: pcpu as u32,
                pieces: vec![(
                    0,
                    records
                        .iter()
                        .map(|&(at, kind, vcpu, detail)| Record::new(at, kind, vcpu, detail))
                        .collect(),
                )],
            })
            .collect();
        let mut text = String::new();
        perfetto::write(&mut text, &details, &recorded).unwrap();
        text
    }

    #[test]
    fn bursts_and_pauses_are_the_guests_own() {
        let (a, b) = ((1, 0), (2, 1));
        let text = file([
            &[
                (100, Kind::Wake, a, 0),
                (110, Kind::SwitchIn, a, 0),
                (112, Kind::Exit, a, 0),
                (113, Kind::Entry, a, 0),
                (120, Kind::SwitchOut, a, SLICE),
                (160, Kind::Wake, a, 0),
                (161, Kind::SwitchIn, a, 0),
                (165, Kind::SwitchOut, a, ENDED),
            ],
            &[
                (102, Kind::SwitchIn, b, 0),
                (145, Kind::SwitchOut, b, SLICE),
                (150, Kind::SwitchIn, a, 0),
                (155, Kind::SwitchOut, a, IDLE),
            ],
        ]);
        let workload = import("t", &text).unwrap();
        assert_eq!((workload.pcpus, workload.duration), (2, 65));
        let [vm_a, vm_b] = &workload.vms[..] else {
            panic!("{workload:?}")
        };
        assert_eq!((vm_a.name.as_str(), vm_b.name.as_str()), ("a", "b"));
        let Program::Replay { first, bursts } = &vm_a.vcpus[0] else {
            panic!("{vm_a:?}")
        };
        let burst = |work, pause| Burst { work, pause };
        assert_eq!(*first, 0);
        assert_eq!(bursts, &[burst(15, 5), burst(4, 0)]);
        let Program::Replay { first, bursts } = &vm_b.vcpus[0] else {
            panic!("{vm_b:?}")
        };
        assert_eq!((*first, bursts), (2, &[burst(43, 0)].into()));
    }

    #[test]
    fn a_bare_list_is_read() {
        let text = r#"[{"ph":"X","pid":9,"tid":1,"ts":2,"dur":4,"name":"on pCPU 0","args":{"why":"idle"}}]"#;
        let workload = import("t", text).unwrap();
        assert_eq!(workload.vms[0].name, "9");
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        assert!(matches!(import("t", "{"), Err(TraceError::NotATrace(_))));
        assert!(matches!(import("t", "{}"), Err(TraceError::NotATrace(_))));
        assert_eq!(import("t", "[]").unwrap_err(), TraceError::NothingRan);
        let negative = r#"[{"ph":"X","ts":-1,"dur":4,"name":"on pCPU 0"}]"#;
        assert_eq!(import("t", negative).unwrap_err(), TraceError::BadTime);
    }

    proptest! {
        /// Whatever was recorded: no panic, and not more time than there was.
        #[test]
        fn any_order_of_events_is_survived(
            events in proptest::collection::vec((0usize..5, 0u64..1_000_000, 1u16..4, 0u8..2), 0..60)
        ) {
            let kinds = [
                (Kind::SwitchIn, 0), (Kind::SwitchOut, IDLE), (Kind::SwitchOut, SLICE),
                (Kind::SwitchOut, ENDED), (Kind::Wake, 0),
            ];
            let mut records: Vec<_> = events.into_iter().map(|(kind, at, vm, vcpu)| {
                (at, kinds[kind].0, (vm, vcpu), kinds[kind].1)
            }).collect();
            records.sort_by_key(|record| record.0);
            if let Ok(workload) = import("t", &file([&records, &[]])) {
                for program in workload.vms.iter().flat_map(|vm| &vm.vcpus) {
                    let Program::Replay { first, bursts } = program else { panic!("{program:?}") };
                    let all: Ns = bursts.iter().map(|b| b.work + b.pause).sum();
                    prop_assert!(first + all <= workload.duration);
                }
            }
        }
    }
}
