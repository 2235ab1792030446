//! A workload from a recorded trace: what `plinthctl trace` writes, played again.
//!
//! Read are the scheduler's events of a Chrome trace (an object with `traceEvents`, or the list itself; times in
//! microseconds): `switch-in`, `switch-out` with `why`, and `wake`, each with `args.vm` and `args.vcpu`. All others are
//! passed over. Of each vCPU the processor time from wake-up to block is kept, and the time until its next
//! wake-up: the guest's own behaviour, without what the scheduler that was recorded added.

use std::{collections::BTreeMap, fmt};

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
                "there is no `switch-in` of a vCPU in it (`plinthctl trace` writes such events)",
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
    name: String,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    tid: serde_json::Value,
    #[serde(default)]
    args: Args,
}

#[derive(Default, Deserialize)]
struct Args {
    vm: Option<String>,
    vcpu: Option<u32>,
    why: Option<String>,
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
    let mut pcpus = Vec::new();
    for event in &events {
        let what = match (event.name.as_str(), event.args.why.as_deref()) {
            ("switch-in", _) => What::In,
            ("switch-out", Some("idle")) => What::Out(Why::Blocked),
            ("switch-out", Some("ended")) => What::Out(Why::Ended),
            ("switch-out", _) => What::Out(Why::Ready),
            ("wake", _) => What::Wake,
            _ => continue,
        };
        let (Some(vm), Some(vcpu)) = (&event.args.vm, event.args.vcpu) else {
            continue;
        };
        if !(0.0..1e15).contains(&event.ts) {
            return Err(TraceError::BadTime);
        }
        let at = (event.ts * MICROSECOND).round() as Ns;
        if matches!(what, What::In) && !pcpus.contains(&&event.tid) {
            pcpus.push(&event.tid);
        }
        happened.push((at, what, vm, vcpu));
    }
    happened.sort_by_key(|&(at, ..)| at);
    let begin = happened.first().map_or(0, |&(at, ..)| at);
    let duration = happened.last().map_or(0, |&(at, ..)| at) - begin;
    let mut histories: BTreeMap<(&String, u32), History> = BTreeMap::new();
    for (at, what, vm, vcpu) in happened {
        let history = histories.entry((vm, vcpu)).or_insert(History {
            doing: Doing::Unknown,
            first: None,
            bursts: Vec::new(),
            work: 0,
        });
        history.take(what, at - begin);
    }
    let mut vms: Vec<Vm> = Vec::new();
    for ((vm, _), mut history) in histories {
        // Those that still run have shown a part of their last burst.
        history.leave(duration);
        history.end_burst();
        let Some(first) = history.first.filter(|_| !history.bursts.is_empty()) else {
            continue;
        };
        let bursts = history.bursts.into();
        let program = Program::Replay { first, bursts };
        match vms.last_mut().filter(|last| last.name == *vm) {
            Some(last) => last.vcpus.push(program),
            None => vms.push(Vm {
                name: vm.clone(),
                params: Params::default(),
                measured: true,
                vcpus: vec![program],
            }),
        }
    }
    if vms.is_empty() {
        return Err(TraceError::NothingRan);
    }
    Ok(Workload {
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
    use proptest::prelude::*;

    fn event(name: &str, ts: f64, tid: u32, vm: &str, vcpu: u32, why: &str) -> String {
        format!(
            r#"{{"name":"{name}","cat":"sched","ph":"i","s":"t","ts":{ts},"pid":1,"tid":{tid},
               "args":{{"vm":"{vm}","vcpu":{vcpu},"why":"{why}"}}}}"#
        )
    }

    fn file(events: &[String]) -> String {
        format!(
            r#"{{"traceEvents":[{},{{"name":"exit","ph":"X","ts":1,"dur":2,"args":{{"reason":7}}}}],"displayTimeUnit":"ns"}}"#,
            events.join(",")
        )
    }

    #[test]
    fn bursts_and_pauses_are_the_guests_own() {
        let text = file(&[
            event("wake", 100.0, 0, "a", 0, ""),
            event("switch-in", 110.0, 0, "a", 0, ""),
            event("switch-in", 100.5, 1, "b", 1, ""),
            event("switch-out", 120.0, 0, "a", 0, "slice"),
            event("switch-in", 150.0, 1, "a", 0, ""),
            event("switch-out", 155.5, 1, "a", 0, "idle"),
            event("wake", 160.0, 0, "a", 0, ""),
            event("switch-in", 161.0, 0, "a", 0, ""),
            event("switch-out", 165.0, 0, "a", 0, "ended"),
            event("switch-out", 145.0, 1, "b", 1, "preempted"),
        ]);
        let workload = import("t", &text).unwrap();
        assert_eq!((workload.pcpus, workload.duration), (2, 65_000));
        let [a, b] = &workload.vms[..] else {
            panic!("{workload:?}")
        };
        assert_eq!((a.name.as_str(), b.name.as_str()), ("a", "b"));
        let Program::Replay { first, bursts } = &a.vcpus[0] else {
            panic!("{a:?}")
        };
        let burst = |work, pause| Burst { work, pause };
        assert_eq!(*first, 0);
        assert_eq!(bursts, &[burst(15_500, 4_500), burst(4_000, 0)]);
        let Program::Replay { first, bursts } = &b.vcpus[0] else {
            panic!("{b:?}")
        };
        assert_eq!(*first, 500);
        assert_eq!(bursts, &[burst(44_500, 0)]);
    }

    #[test]
    fn a_bare_list_is_read_and_lost_events_are_survived() {
        let events = [
            event("switch-out", 1.0, 0, "a", 0, "idle"),
            event("switch-in", 2.0, 0, "a", 0, ""),
            event("switch-in", 5.0, 0, "a", 0, ""),
            event("switch-out", 6.0, 0, "a", 0, "idle"),
        ];
        let workload = import("t", &format!("[{}]", events.join(","))).unwrap();
        let Program::Replay { first, bursts } = &workload.vms[0].vcpus[0] else {
            panic!("{workload:?}")
        };
        assert_eq!(*first, 1_000);
        assert_eq!(
            bursts,
            &[Burst {
                work: 4_000,
                pause: 0
            }]
        );
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        assert!(matches!(import("t", "{"), Err(TraceError::NotATrace(_))));
        assert!(matches!(import("t", "{}"), Err(TraceError::NotATrace(_))));
        assert_eq!(import("t", "[]").unwrap_err(), TraceError::NothingRan);
        let negative = format!("[{}]", event("switch-in", -1.0, 0, "a", 0, ""));
        assert_eq!(import("t", &negative).unwrap_err(), TraceError::BadTime);
    }

    proptest! {
        /// Whatever the order of events: no panic, and not more processor time than there was.
        #[test]
        fn any_order_of_events_is_survived(
            events in proptest::collection::vec((0usize..5, 0u32..1_000_000, 0u32..3, 0u32..2), 0..60)
        ) {
            let names = [("switch-in", ""), ("switch-out", "idle"), ("switch-out", "slice"), ("switch-out", "ended"), ("wake", "")];
            let events: Vec<_> = events.into_iter().map(|(kind, at, vm, vcpu)| {
                let (name, why) = names[kind];
                event(name, f64::from(at), 0, &vm.to_string(), vcpu, why)
            }).collect();
            if let Ok(workload) = import("t", &file(&events)) {
                for program in workload.vms.iter().flat_map(|vm| &vm.vcpus) {
                    let Program::Replay { first, bursts } = program else { panic!("{program:?}") };
                    let all: Ns = bursts.iter().map(|b| b.work + b.pause).sum();
                    prop_assert!(first + all <= workload.duration);
                }
            }
        }
    }
}
