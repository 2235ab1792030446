//! The host's log as it grows: what to ask for, and what of the answers is new.
//!
//! Pure, as [`crate::top`]: the caller asks, waits, and shows the text.

use crate::command::{Answer, LogLine, Request};

/// Time from one look at the log to the next, in nanoseconds.
pub const PERIOD_NS: u64 = 1_000_000_000;
/// Most lines that are asked for at once. What is more within a [`PERIOD_NS`] is missed.
const MOST_LINES: u32 = 1000;

/// How far the log has been shown.
#[derive(Clone, Copy, Debug)]
pub struct Follow {
    /// Number of the last line that was shown.
    after: Option<u64>,
    /// Lines that are wanted at first.
    lines: u32,
}

impl Follow {
    /// Begins with so many of the newest lines.
    pub fn new(lines: u32) -> Self {
        Follow { after: None, lines }
    }

    /// What to ask next.
    pub fn request(&self) -> Request {
        Request::Log {
            after: self.after,
            lines: Some(match self.after {
                None => self.lines,
                Some(_) => MOST_LINES,
            }),
        }
    }

    /// The new lines of an answer; `None`: it is no answer to that.
    pub fn new_lines(&mut self, answer: Answer) -> Option<alloc::vec::Vec<LogLine>> {
        let Answer::Log { mut lines } = answer else {
            return None;
        };
        lines.retain(|line| self.after.is_none_or(|after| line.number > after));
        self.after = lines.last().map(|line| line.number).or(self.after);
        Some(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{string::String, vec::Vec};

    #[test]
    fn each_line_comes_once() {
        let line = |number: u64| LogLine {
            number,
            at_ns: number,
            level: String::from("info"),
            text: String::from("x"),
        };
        let answer = |numbers: core::ops::Range<u64>| Answer::Log {
            lines: numbers.map(line).collect(),
        };
        let mut follow = Follow::new(2);
        let asks = |follow: &Follow| match follow.request() {
            Request::Log { after, lines } => (after, lines),
            other => panic!("{other:?}"),
        };
        assert_eq!(asks(&follow), (None, Some(2)));
        let numbers = |lines: Option<Vec<LogLine>>| -> Vec<u64> {
            lines.unwrap().iter().map(|line| line.number).collect()
        };
        assert_eq!(numbers(follow.new_lines(answer(7..9))), [7, 8]);
        assert_eq!(asks(&follow), (Some(8), Some(MOST_LINES)));
        assert!(numbers(follow.new_lines(answer(9..9))).is_empty());
        assert_eq!(numbers(follow.new_lines(answer(8..10))), [9]);
        assert_eq!(asks(&follow).0, Some(9));
        assert!(follow.new_lines(Answer::Vms { vms: Vec::new() }).is_none());
    }
}
