//! Checks the examples of docs/CONTROL.md, and that none is missing.

use alloc::{collections::BTreeSet, string::String};

use super::{Asked, Outcome, Outgoing, Reply, parse};
use crate::command::{Answer, FailureCode, Request};

const MANUAL: &str = include_str!("../../../../docs/CONTROL.md");

/// The lines of the manual's blocks of this kind.
fn examples(kind: &str) -> Vec<&'static str> {
    let mut lines = MANUAL.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        if line.strip_prefix("```") == Some(kind) {
            found.extend(lines.by_ref().take_while(|line| *line != "```"));
        }
    }
    found
}

/// The number of a kind of request. What is new here has to be new in the manual.
fn kind_of_request(request: &Request) -> usize {
    match request {
        Request::VmList {} => 0,
        Request::VmShow { .. } => 1,
        Request::VmCreate { .. } => 2,
        Request::VmStart { .. } => 3,
        Request::VmStop { .. } => 4,
        Request::VmPause { .. } => 5,
        Request::VmResume { .. } => 6,
        Request::VmReset { .. } => 7,
        Request::VmDestroy { .. } => 8,
        Request::InjectNmi { .. } => 9,
        Request::HostShow {} => 10,
        Request::HostPowerOff {} => 11,
        Request::SchedShow {} => 12,
        Request::SchedSet { .. } => 13,
        Request::Stats { .. } => 14,
        Request::Log { .. } => 15,
        Request::TraceStart { .. } => 16,
        Request::TraceStop {} => 17,
        Request::TraceShow {} => 18,
        Request::TraceRead { .. } => 19,
        Request::PoolSet { .. } => 20,
    }
}

/// The same for answers.
fn kind_of_answer(answer: &Answer) -> usize {
    match answer {
        Answer::Done { .. } => 0,
        Answer::Vms { .. } => 1,
        Answer::Vm { .. } => 2,
        Answer::Host { .. } => 3,
        Answer::Sched { .. } => 4,
        Answer::Stats { .. } => 5,
        Answer::Log { .. } => 6,
        Answer::Trace { .. } => 7,
        Answer::TraceRecords { .. } => 8,
    }
}

/// A failure's code as the manual has it.
fn word(code: FailureCode) -> &'static str {
    match code {
        FailureCode::BadRequest => "bad-request",
        FailureCode::BadVersion => "bad-version",
        FailureCode::NotFound => "not-found",
        FailureCode::Exists => "exists",
        FailureCode::WrongState => "wrong-state",
        FailureCode::NoRoom => "no-room",
        FailureCode::Busy => "busy",
        FailureCode::Internal => "internal",
    }
}

#[test]
fn the_manual_is_right() {
    let mut kinds = BTreeSet::new();
    let mut hello = false;
    for line in examples("request") {
        let (id, asked) = parse(line.as_bytes());
        let id = id.unwrap_or_else(|| panic!("no id: {line}"));
        let written = match asked.unwrap_or_else(|e| panic!("{}: {line}", e.message)) {
            Asked::Hello => {
                hello = true;
                Outgoing::hello(id).line()
            }
            Asked::Request(request) => {
                kinds.insert(kind_of_request(&request));
                // Keys that are written although they could be left out differ; what they say does not.
                let again = Outgoing::request(id, &request).line().unwrap();
                assert_eq!(
                    parse(again.trim_end().as_bytes()).1,
                    Ok(Asked::Request(request))
                );
                continue;
            }
        };
        assert_eq!(written.unwrap().trim_end(), line);
    }
    assert!(hello);
    assert_eq!(kinds, (0..21).collect());

    let mut kinds = BTreeSet::new();
    for line in examples("answer") {
        let reply: Reply = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        // Every key is there, in the order in which a host writes them.
        assert_eq!(serde_json::to_string(&reply).unwrap(), line);
        match reply.outcome {
            Outcome::Ok(answer) => {
                kinds.insert(kind_of_answer(&answer));
            }
            Outcome::Failure(_) | Outcome::Hello(_) => {}
        }
    }
    assert_eq!(kinds, (0..9).collect());
}

#[test]
fn the_manual_has_every_failure() {
    let table = MANUAL.split("## Failures").nth(1).unwrap_or_default();
    for code in [
        FailureCode::BadRequest,
        FailureCode::BadVersion,
        FailureCode::NotFound,
        FailureCode::Exists,
        FailureCode::WrongState,
        FailureCode::NoRoom,
        FailureCode::Busy,
        FailureCode::Internal,
    ] {
        let written: String = serde_json::to_string(&code).unwrap();
        assert_eq!(written.trim_matches('"'), word(code));
        assert!(table.contains(&alloc::format!("| `{}` |", word(code))));
    }
}
