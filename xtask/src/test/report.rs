//! How a test ended, and the lines that tell so.

use std::time::Duration;

use super::terminal::plain;

/// The end of one scenario.
#[derive(Debug)]
pub enum Outcome {
    /// All was as it should be; with a remark for people, which may be empty.
    Passed(String),
    /// Something was not; with what it was.
    Failed(String),
    /// It cannot run here; with the reason.
    Skipped(String),
}

/// How many tests ended in which way.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Tests that ran and were right.
    pub passed: u32,
    /// Tests that ran and were not, or should have run and could not.
    pub failed: u32,
    /// Tests that cannot run on this machine.
    pub skipped: u32,
}

impl Counts {
    /// Counts one scenario.
    pub fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed(_) => self.passed += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }

    /// Adds the counts that a test runner of Rust's prints at its end, one line per crate:
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; ..`.
    pub fn add_cargo_test(&mut self, output: &str) {
        for line in output
            .lines()
            .filter_map(|line| line.trim().strip_prefix("test result: "))
        {
            let words: Vec<_> = line.split_whitespace().collect();
            for pair in words.windows(2) {
                let Ok(count) = pair[0].parse::<u32>() else {
                    continue;
                };
                match pair[1] {
                    "passed;" => self.passed += count,
                    "failed;" => self.failed += count,
                    "ignored;" => self.skipped += count,
                    _ => {}
                }
            }
        }
    }

    /// The closing line of a run, in the form that scripts look for.
    pub fn closing_line(self) -> String {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        if skipped == 0 {
            format!("{passed} passed, {failed} failed")
        } else {
            format!("{passed} passed, {failed} failed, {skipped} skipped")
        }
    }
}

/// One line about a scenario that has ended.
pub fn line(name: &str, outcome: &Outcome, took: Duration) -> String {
    let (word, remark) = match outcome {
        Outcome::Passed(remark) => ("ok", remark.as_str()),
        Outcome::Failed(_) => ("FAILED", ""),
        Outcome::Skipped(reason) => ("skipped", reason.as_str()),
    };
    let seconds = took.as_secs_f64();
    format!("{word:<8}{name:<40}{seconds:>7.1} s  {remark}")
        .trim_end()
        .to_owned()
}

/// Longest part of a line that is shown, in characters.
const LINE: usize = 160;

/// The last `count` lines of a log, as a person would read them; long ones are cut.
pub fn tail(log: &[u8], count: usize) -> String {
    let text = plain(&String::from_utf8_lossy(log));
    let lines: Vec<_> = text.lines().collect();
    let start = lines.len().saturating_sub(count);
    lines[start..]
        .iter()
        .map(|line| {
            let cut: String = line.chars().take(LINE).collect();
            format!("    | {cut}\n")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_count() {
        let mut counts = Counts::default();
        counts.add(&Outcome::Passed(String::new()));
        counts.add(&Outcome::Passed(String::new()));
        counts.add(&Outcome::Failed(String::new()));
        assert_eq!(counts.closing_line(), "2 passed, 1 failed");
        counts.add(&Outcome::Skipped(String::new()));
        assert_eq!(counts.closing_line(), "2 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn cargo_test_results_add_up() {
        let output = "running 3 tests\n\
            test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let mut counts = Counts::default();
        counts.add_cargo_test(output);
        assert_eq!(
            counts,
            Counts {
                passed: 13,
                failed: 2,
                skipped: 1
            }
        );
    }

    #[test]
    fn a_tail_is_short_and_plain() {
        assert_eq!(
            tail(b"one\r\ntwo\r\n\x1b[1mthree\x1b[m", 2),
            "    | two\n    | three\n"
        );
        assert_eq!(tail(b"", 2), "");
        assert_eq!(tail(&[b'.'; 1000], 1).trim_end().len(), 6 + LINE);
    }

    #[test]
    fn a_line_names_the_reason_of_a_skip() {
        let line = line(
            "kvm/linux",
            &Outcome::Skipped("no nested KVM".into()),
            Duration::ZERO,
        );
        assert!(
            line.starts_with("skipped") && line.ends_with("no nested KVM"),
            "{line}"
        );
    }
}
