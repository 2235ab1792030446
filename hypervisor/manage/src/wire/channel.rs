//! The host's end of the control channel: lines in, one request at a time, answers out.

use alloc::{boxed::Box, vec::Vec};
use core::mem;

use super::{Asked, GAP, Hello, MAX_ANSWER, MAX_LINE, Outcome, Reply, bad, failure, parse};
use crate::command::{Answer, Failure, FailureCode, Request};

/// Why a line is not even looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    TooLong,
    Gap,
}

/// The line that is being read.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    damage: Option<Damage>,
    /// Its newline has come: it waits to be served.
    complete: bool,
}

/// The host's end.
pub struct Channel {
    hello: Hello,
    line: Incoming,
    output: Vec<u8>,
    /// Bytes of the output that are gone.
    sent: usize,
    /// A line may not have been sent to its end, which has to come before the next one.
    cut: bool,
}

impl Channel {
    /// A channel that begins with the line that announces the host. It takes its memory for input here.
    pub fn new(hello: Hello) -> Self {
        let mut channel = Channel {
            line: Incoming::default(),
            output: Vec::new(),
            sent: 0,
            cut: false,
            hello,
        };
        channel.line.bytes.reserve_exact(MAX_LINE);
        channel.answer(&Reply {
            id: None,
            outcome: Outcome::Hello(channel.hello.clone()),
        });
        channel
    }

    /// Takes input, up to the end of a line. Returns how many bytes it took: none while a line
    /// waits to be served.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        for &byte in bytes {
            if self.line.complete {
                break;
            }
            taken += 1;
            self.line.push(byte);
        }
        taken
    }

    /// Whether a line waits to be served: no more input is taken.
    pub fn is_full(&self) -> bool {
        self.line.complete
    }

    /// Whether a line waits to be served, and the answer before it is gone.
    pub fn has_request(&self) -> bool {
        self.line.complete && self.output().is_empty()
    }

    /// Serves the line that waits, if [`Channel::has_request`]: its answer is output then.
    pub fn serve(&mut self, operate: impl FnOnce(&Request) -> Result<Answer, Failure>) {
        if !self.has_request() {
            return;
        }
        let line = mem::take(&mut self.line);
        let (id, asked) = match line.damage {
            None => parse(line.text()),
            Some(Damage::Gap) => (None, Err(bad("bytes of this line were lost"))),
            Some(Damage::TooLong) => {
                let text = alloc::format!("the line is longer than {MAX_LINE} bytes");
                (None, Err(bad(text)))
            }
        };
        let outcome = match asked {
            Ok(Asked::Hello) => Outcome::Hello(self.hello.clone()),
            Ok(Asked::Request(request)) => match operate(&request) {
                Ok(answer) => Outcome::Ok(Box::new(answer)),
                Err(failure) => Outcome::Failure(failure),
            },
            Err(failure) => Outcome::Failure(failure),
        };
        self.answer(&Reply { id, outcome });
        // Its memory is kept for the next line.
        self.line = line.emptied();
    }

    /// What is to be sent.
    pub fn output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// So many bytes of the output are gone.
    pub fn sent(&mut self, count: usize) {
        self.sent = self.sent.saturating_add(count).min(self.output.len());
        if self.sent == self.output.len() {
            self.forget_output();
        }
    }

    /// Nobody takes the output: drops what is left of it. The next line begins with a newline, for the one that
    /// may have been cut.
    pub fn drop_output(&mut self) {
        self.cut = true;
        self.forget_output();
    }

    fn forget_output(&mut self) {
        self.sent = 0;
        // With its memory: what a host has in use does not depend on what it was asked for before.
        self.output = Vec::new();
    }

    /// Puts out a line, or in its place one that says that it is too long.
    fn answer(&mut self, reply: &Reply) {
        if mem::take(&mut self.cut) {
            self.output.push(b'\n');
        }
        if !self.write(reply) {
            let text = "the answer is too long, or there is no memory for it";
            let refusal = Reply {
                id: reply.id,
                outcome: Outcome::Failure(failure(FailureCode::NoRoom, text)),
            };
            // If there is no memory for this either, the line stays empty.
            let _ = self.write(&refusal);
        }
        self.output.push(b'\n');
    }

    /// Appends a line without its newline. `false`: it is too long, or there is no memory for it.
    fn write(&mut self, reply: &Reply) -> bool {
        // A serializer cannot be told that there is no memory: that there is room for the longest answer
        // while it grows is tried before.
        if Vec::<u8>::new().try_reserve_exact(2 * MAX_ANSWER).is_err() {
            return false;
        }
        match serde_json::to_vec(reply) {
            Ok(text) if text.len() <= MAX_ANSWER => {
                self.output.reserve_exact(text.len() + 1);
                self.output.extend(text);
                true
            }
            Ok(_) | Err(_) => false,
        }
    }
}

impl Incoming {
    fn push(&mut self, byte: u8) {
        match byte {
            b'\n' => self.complete = !self.is_blank(),
            GAP => self.damage = self.damage.or(Some(Damage::Gap)),
            _ if self.damage.is_some() => {}
            _ if self.bytes.len() == MAX_LINE => self.damage = Some(Damage::TooLong),
            _ => self.bytes.push(byte),
        }
        if byte == b'\n' && !self.complete {
            self.bytes.clear();
        }
    }

    /// Whether there is nothing to answer.
    fn is_blank(&self) -> bool {
        self.damage.is_none() && self.bytes.iter().all(u8::is_ascii_whitespace)
    }

    fn text(&self) -> &[u8] {
        self.bytes.trim_ascii_end()
    }

    fn emptied(mut self) -> Self {
        self.bytes.clear();
        Incoming {
            bytes: self.bytes,
            ..Incoming::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        command::{Figures, HostStats, PcpuStats, VcpuStats, VmState, VmStats, VmSummary},
        config::{MAX_NAME, MAX_VCPUS, MAX_VMS},
    };
    use proptest::prelude::*;

    const LIST: &[u8] = b"{\"id\":5,\"v\":1,\"verb\":\"vm-list\"}\n";

    fn operate(_: &Request) -> Result<Answer, Failure> {
        Ok(Answer::Vms { vms: Vec::new() })
    }

    /// A channel whose first line is gone.
    fn channel() -> Channel {
        let mut channel = Channel::new(Hello::new("0"));
        assert!(replies(&mut channel)[0].id.is_none());
        channel
    }

    /// Gives it all of this, serving what comes up. Returns the lines that came out.
    fn give(channel: &mut Channel, mut bytes: &[u8]) -> Vec<Reply> {
        let mut all = Vec::new();
        loop {
            let taken = channel.receive(bytes);
            bytes = &bytes[taken..];
            if channel.has_request() {
                channel.serve(operate);
                all.extend(replies(channel));
            } else if bytes.is_empty() {
                return all;
            }
        }
    }

    /// Takes all output.
    fn replies(channel: &mut Channel) -> Vec<Reply> {
        let text = String::from_utf8(channel.output().to_vec()).unwrap();
        channel.sent(text.len());
        assert!(channel.output().is_empty());
        let lines = text.split_terminator('\n').filter(|line| !line.is_empty());
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn refused(reply: &Reply) -> Option<(Option<u64>, FailureCode)> {
        match &reply.outcome {
            Outcome::Failure(failure) => Some((reply.id, failure.code)),
            _ => None,
        }
    }

    #[test]
    fn one_request_is_served_at_a_time() {
        let mut channel = channel();
        let two = [LIST, LIST].concat();
        assert_eq!(channel.receive(&two), LIST.len());
        assert_eq!(channel.receive(&two[LIST.len()..]), 0);
        assert!(channel.has_request());
        channel.serve(operate);
        let answer = channel.output().to_vec();
        // The next one may come in, and waits until the answer is gone.
        assert_eq!(channel.receive(&two[LIST.len()..]), LIST.len());
        assert!(!channel.has_request());
        channel.serve(operate);
        assert_eq!(channel.output(), answer);
        channel.sent(answer.len() - 1);
        assert!(!channel.has_request());
        channel.sent(1);
        assert!(channel.has_request());
    }

    #[test]
    fn blank_lines_are_not_answered() {
        let mut channel = channel();
        assert!(give(&mut channel, b"\n\r\n \t\n").is_empty());
        let mut line = LIST.to_vec();
        line.insert(line.len() - 1, b'\r');
        assert_eq!(give(&mut channel, &line)[0].id, Some(5));
    }

    #[test]
    fn the_longest_line_is_read_and_a_longer_one_is_refused_as_a_whole() {
        let padded = |length: usize| {
            let mut line = LIST[..LIST.len() - 1].to_vec();
            line.resize(length, b' ');
            line.push(b'\n');
            line
        };
        let mut channel = channel();
        assert_eq!(give(&mut channel, &padded(MAX_LINE))[0].id, Some(5));
        let mut long = padded(MAX_LINE + 1);
        // What stands behind the limit is no line of its own.
        long.extend(LIST);
        let replies = give(&mut channel, &long);
        assert_eq!(refused(&replies[0]), Some((None, FailureCode::BadRequest)));
        assert_eq!((replies[1].id, replies.len()), (Some(5), 2));
        assert_eq!(channel.line.bytes.capacity(), MAX_LINE);
    }

    #[test]
    fn a_line_that_lost_bytes_is_refused_though_the_rest_is_json() {
        let mut channel = channel();
        for at in 0..LIST.len() {
            let mut line = LIST.to_vec();
            line.insert(at, GAP);
            let replies = give(&mut channel, &line);
            assert_eq!(replies.len(), 1);
            assert_eq!(refused(&replies[0]), Some((None, FailureCode::BadRequest)));
        }
        assert_eq!(give(&mut channel, LIST)[0].id, Some(5));
    }

    #[test]
    fn an_answer_that_nobody_takes_is_cut_and_its_line_ended() {
        let mut channel = channel();
        channel.receive(LIST);
        channel.serve(operate);
        channel.sent(3);
        channel.drop_output();
        channel.receive(LIST);
        channel.serve(operate);
        assert_eq!(channel.output()[0], b'\n');
        assert_eq!(replies(&mut channel)[0].id, Some(5));
        channel.receive(LIST);
        channel.serve(operate);
        assert_eq!(channel.output()[0], b'{');
    }

    #[test]
    fn an_answer_beyond_all_bounds_is_refused() {
        let mut channel = channel();
        channel.receive(LIST);
        channel.serve(|_| {
            Ok(Answer::Done {
                text: "x".repeat(MAX_ANSWER),
            })
        });
        let replies = replies(&mut channel);
        assert_eq!(refused(&replies[0]), Some((Some(5), FailureCode::NoRoom)));
        assert_eq!(channel.output.capacity(), 0);
    }

    #[test]
    fn an_answer_keeps_no_more_memory_than_it_needs() {
        let mut channel = channel();
        channel.receive(LIST);
        let text = "x".repeat(3 * MAX_LINE);
        channel.serve(|_| Ok(Answer::Done { text }));
        assert!(channel.output.capacity() < 4 * MAX_LINE);
        replies(&mut channel);
        assert_eq!(channel.output.capacity(), 0);
    }

    #[test]
    fn the_figures_of_as_many_vcpus_as_there_may_be_fit() {
        // After a year, of Linux guests that are busy all the time, on as many processors as a host may have.
        const YEAR_NS: u64 = 365 * 24 * 3600 * 1_000_000_000;
        const COUNT: u64 = 99_999_999_999;
        let kinds = [
            "cpuid",
            "hypercall",
            "port-io",
            "msr-read",
            "msr-write",
            "nested-page-fault",
            "cr-access",
            "halt",
            "pause",
            "xsetbv",
            "wbinvd",
            "exception",
            "external-interrupt",
            "interrupt-window",
            "deadline",
            "init",
        ];
        let total = Figures {
            run_ns: YEAR_NS,
            wait_ns: YEAR_NS,
            throttled_ns: YEAR_NS,
            average_wait_ns: 1_000_000_000,
            wakeups: COUNT,
            response_ns: 1_000_000_000,
            response_p99_ns: 1_000_000_000,
            bursts: COUNT,
            switches: COUNT,
            io_bytes: YEAR_NS,
            latency_ns: (10..40).map(|bits| (1 << bits, COUNT)).collect(),
        };
        let vcpu = VcpuStats {
            vcpu: MAX_VCPUS - 1,
            pcpu: 63,
            state: "waiting".into(),
            migrations: COUNT,
            latency_ns: Vec::new(),
            exits: kinds.map(|kind| (kind.into(), COUNT)).to_vec(),
            ..VcpuStats::from(total.clone())
        };
        let vm = VmStats {
            summary: VmSummary {
                name: "n".repeat(MAX_NAME),
                state: VmState::Running,
                vcpus: MAX_VCPUS,
                memory_bytes: 1 << 40,
                uptime_ns: YEAR_NS,
                run_ns: YEAR_NS,
                starts: COUNT,
                last_end: Some("x".repeat(100)),
            },
            weight: 10_000,
            total: total.clone(),
            vcpu: vec![vcpu; MAX_VCPUS.into()],
        };
        let pcpu = PcpuStats {
            pcpu: 63,
            busy_ns: YEAR_NS,
            idle_ns: YEAR_NS,
            switches: COUNT,
            queued: 16,
        };
        let stats = HostStats {
            at_ns: YEAR_NS,
            pcpus: vec![pcpu; 64],
            vms: vec![vm; MAX_VMS],
            total,
            fairness_permille: 1000,
        };
        let mut channel = channel();
        channel.receive(LIST);
        channel.serve(|_| Ok(Answer::Stats { stats }));
        let replies = replies(&mut channel);
        assert!(matches!(&replies[0].outcome, Outcome::Ok(_)), "refused");
    }

    proptest! {
        #[test]
        fn whatever_comes_the_next_line_is_read(
            garbage in prop::collection::vec(
                prop_oneof![
                    any::<u8>(),
                    prop::sample::select(&b"{}[]\"\\:,\n\xff \tidverb0123456789"[..]),
                ],
                0..300,
            ),
            pieces in 1usize..40,
        ) {
            let mut channel = channel();
            let mut bytes = garbage;
            bytes.push(b'\n');
            bytes.extend(LIST);
            let mut all = Vec::new();
            for piece in bytes.chunks(pieces) {
                all.extend(give(&mut channel, piece));
            }
            prop_assert_eq!(all.last().map(|reply| reply.id), Some(Some(5)));
            let last = all.last().map(|reply| &reply.outcome);
            prop_assert_eq!(last, Some(&Outcome::Ok(Box::new(Answer::Vms { vms: Vec::new() }))));
            prop_assert!(channel.line.bytes.capacity() == MAX_LINE);
        }

        #[test]
        fn a_broken_request_is_refused_or_is_another_request(
            at in 0usize..LIST.len() - 1,
            byte: u8,
        ) {
            let mut line = LIST.to_vec();
            line[at] = byte;
            let replies = give(&mut channel(), &line);
            prop_assert!(replies.len() <= 2);
        }
    }
}
