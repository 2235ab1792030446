//! Whether, and how soon, a VM that has ended starts again.
//!
//! A reset always starts it again; other ends as its `restart` says. Failures that come quickly, five in a
//! row, end that. Starts that follow each other quickly, whatever their reason, are spaced: the first three
//! come at once, then each waits twice as long as the one before. So a guest that resets in a loop costs
//! the host a start every half minute, not all of a processor. Pure: the caller reads the clock.

use crate::config::Restart;

/// A VM that fails sooner than this after its start has failed quickly.
const QUICK_FAILURE_MS: u64 = 60_000;
/// Quick failures in a row after which a VM is not started again.
pub const MAX_QUICK_FAILURES: u32 = 5;
/// A VM that ends sooner than this after its start has ended quickly.
const QUICK_END_MS: u64 = 10_000;
/// Quick ends in a row after which a VM starts again at once.
const FREE_QUICK_ENDS: u32 = 3;
/// The first wait, and the longest.
const FIRST_WAIT_MS: u64 = 1_000;
const LONGEST_WAIT_MS: u64 = 32_000;

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest reset its machine.
    Reset,
    /// The guest is done: it powered off, or its test ended.
    Done,
    /// Plinth stopped it for what it did.
    Failed,
}

/// What becomes of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It stays ended.
    Stay,
    /// It stays ended, since it failed too often.
    GiveUp,
    /// It starts again, after so many milliseconds.
    Again {
        /// 0: at once.
        wait_ms: u64,
    },
}

/// What is remembered of a VM's ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restarts {
    quick_failures: u32,
    quick_ends: u32,
}

impl Restarts {
    /// Nothing is remembered.
    pub const fn new() -> Self {
        Restarts {
            quick_failures: 0,
            quick_ends: 0,
        }
    }

    /// The VM, with this policy, has ended so, `ran_ms` milliseconds after its start.
    pub fn decide(&mut self, policy: Restart, ending: Ending, ran_ms: u64) -> Decision {
        let wanted = match ending {
            Ending::Reset => true,
            Ending::Done => policy == Restart::Always,
            Ending::Failed => policy != Restart::Never,
        };
        self.quick_failures = match ending {
            Ending::Failed if ran_ms < QUICK_FAILURE_MS => self.quick_failures.saturating_add(1),
            Ending::Failed => 1,
            // A VM that was useful in between has not failed in a row; a reset says nothing.
            Ending::Done => 0,
            Ending::Reset => self.quick_failures,
        };
        self.quick_ends = match ran_ms {
            0..QUICK_END_MS => self.quick_ends.saturating_add(1),
            _ => 0,
        };
        if !wanted {
            return Decision::Stay;
        }
        if ending == Ending::Failed && self.quick_failures >= MAX_QUICK_FAILURES {
            return Decision::GiveUp;
        }
        let wait_ms = match self.quick_ends.checked_sub(FREE_QUICK_ENDS + 1) {
            None => 0,
            Some(doublings) => (FIRST_WAIT_MS << doublings.min(16)).min(LONGEST_WAIT_MS),
        };
        Decision::Again { wait_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const AT_ONCE: Decision = Decision::Again { wait_ms: 0 };

    #[test]
    fn each_policy_restarts_what_it_says() {
        for (policy, reset, done, failed) in [
            (Restart::Never, AT_ONCE, Decision::Stay, Decision::Stay),
            (Restart::OnFailure, AT_ONCE, Decision::Stay, AT_ONCE),
            (Restart::Always, AT_ONCE, AT_ONCE, AT_ONCE),
        ] {
            for (ending, expected) in [
                (Ending::Reset, reset),
                (Ending::Done, done),
                (Ending::Failed, failed),
            ] {
                let decision = Restarts::default().decide(policy, ending, 100_000);
                assert_eq!(decision, expected, "{policy:?} {ending:?}");
            }
        }
    }

    #[test]
    fn five_quick_failures_in_a_row_are_enough() {
        let mut restarts = Restarts::default();
        for _ in 0..4 {
            let decision = restarts.decide(Restart::OnFailure, Ending::Failed, 30_000);
            assert_eq!(decision, AT_ONCE);
        }
        let decision = restarts.decide(Restart::OnFailure, Ending::Failed, 30_000);
        assert_eq!(decision, Decision::GiveUp);
    }

    #[test]
    fn a_failure_after_a_while_begins_a_new_row() {
        let mut restarts = Restarts::default();
        for n in 1..20 {
            let ran_ms = if n % 4 == 0 { 60_000 } else { 20_000 };
            let decision = restarts.decide(Restart::OnFailure, Ending::Failed, ran_ms);
            assert_eq!(decision, AT_ONCE, "failure {n}");
        }
    }

    #[test]
    fn a_guest_that_resets_in_a_loop_waits_longer_and_longer() {
        let mut restarts = Restarts::default();
        let waits: Vec<u64> = (0..12)
            .map(
                |_| match restarts.decide(Restart::Never, Ending::Reset, 50) {
                    Decision::Again { wait_ms } => wait_ms,
                    other => panic!("{other:?}"),
                },
            )
            .collect();
        assert_eq!(
            waits,
            [
                0, 0, 0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 32_000, 32_000, 32_000
            ]
        );
        // One that ran for a while is as new.
        let decision = restarts.decide(Restart::Never, Ending::Reset, 10_000);
        assert_eq!(decision, AT_ONCE);
        for _ in 0..100_000 {
            restarts.decide(Restart::Never, Ending::Reset, 0);
        }
    }
}
