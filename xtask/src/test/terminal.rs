//! A serial line with a guest at its other end, as tests and people use it.
//!
//! Purpose: lets a conversation be written once and held with any machine: a guest of
//! Plinth, the same guest on a bare emulator, or a scripted fake.
//!
//! Invariants: text is consumed in order; what one [`Terminal::expect`] has returned, no
//! later one sees again.

use std::time::Duration;

use anyhow::Result;
use regex::Regex;

/// A line to wait on and to type into.
pub trait Terminal {
    /// Waits until `pattern` matches in what has not been consumed yet, and consumes
    /// everything up to the end of the match, which is returned as it came.
    ///
    /// # Errors
    /// `limit` passed, the scenario's own time is over, or the machine ended.
    fn expect(&mut self, pattern: &Regex, limit: Duration) -> Result<String>;

    /// Types `text`.
    ///
    /// # Errors
    /// The machine has ended.
    fn send(&mut self, text: &str) -> Result<()>;
}

/// `text` as lines a person would read: without carriage returns and terminal control
/// sequences.
pub fn plain(text: &str) -> String {
    // ECMA-48: a control sequence is ESC [, parameters, intermediates and a final byte.
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\r' => {}
            '\x1b' if characters.peek() == Some(&'[') => {
                characters.next();
                for parameter in characters.by_ref() {
                    if ('@'..='~').contains(&parameter) {
                        break;
                    }
                }
            }
            '\x1b' => {
                characters.next();
            }
            other => plain.push(other),
        }
    }
    plain
}

/// Lines without those that Plinth itself said among them.
pub fn without_host_lines(lines: &str) -> String {
    let others = lines.split_inclusive('\n');
    others
        .filter(|line| !line.starts_with("[plinth] "))
        .collect()
}

#[cfg(test)]
pub mod fake {
    //! A terminal that plays a script.

    use super::*;
    use anyhow::bail;

    /// Answers each typed line with the next reply of its script.
    pub struct Script {
        pending: String,
        replies: std::vec::IntoIter<String>,
        /// Everything that was typed.
        pub typed: String,
    }

    impl Script {
        /// `first` is there before anything is typed.
        pub fn new(first: &str, replies: Vec<String>) -> Self {
            Self {
                pending: first.to_owned(),
                replies: replies.into_iter(),
                typed: String::new(),
            }
        }
    }

    impl Terminal for Script {
        fn expect(&mut self, pattern: &Regex, _limit: Duration) -> Result<String> {
            let Some(found) = pattern.find(&self.pending) else {
                bail!("time limit: no {pattern} in {:?}", self.pending);
            };
            let rest = self.pending.split_off(found.end());
            Ok(std::mem::replace(&mut self.pending, rest))
        }

        fn send(&mut self, text: &str) -> Result<()> {
            self.typed.push_str(text);
            if let Some(reply) = self.replies.next() {
                self.pending.push_str(&reply);
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_host_go_away() {
        let said = "1\n[plinth] a: powered off\n2 [plinth] \n[plinth] b";
        assert_eq!(without_host_lines(said), "1\n2 [plinth] \n");
    }

    #[test]
    fn control_sequences_and_carriage_returns_go_away() {
        assert_eq!(
            plain("~ # \x1b[6nls\r\n\x1b[1;34mbin\x1b[m\r\n"),
            "~ # ls\nbin\n"
        );
        assert_eq!(plain("cut \x1b["), "cut ");
        assert_eq!(plain("\x1b7saved"), "saved");
    }
}
