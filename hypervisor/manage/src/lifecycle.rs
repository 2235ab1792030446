//! The life of one VM as a state machine: what a verb does in each state, and what follows an end.
//!
//! A [`Life`] is a plain value. [`Life::ask`] takes a verb and says which [`Step`] whoever runs the VM has to
//! take, or refuses it and changes nothing. The other calls are what happens by itself: the VM was made, its
//! vCPUs came to rest, it is down, a wait or a timeout is over. None of them waits; none can fail.
//!
//! ```text
//!            start                    made                  pause
//!   Off ──────────────▶ Starting ──────────────▶ Running ◀────────▶ Paused
//!    ▲                    ▲   ▲                   │    │    resume    │
//!    │           start,   │   │ again        stop │    │ ends, reset, │ reset,
//!    │           wait over│   │                   ▼    │ stop at once │ stop at once
//!    │                  Waiting │            Stopping  │              │
//!    │                    ▲     │                 │    ▼              │
//!    └────────────────────┴─────┴───── down ──── Ending ◀─────────────┘
//! ```
//!
//! A VM that its watchdog pauses while it shuts down is `Paused`, and `Stopping` again when it is resumed; the time that it has
//! for shutting down passes meanwhile.
//!
//! Invariants: a VM that an operator stopped or destroyed does not start again by itself; what
//! an operator asked for last decides what follows an end; a VM is made only when there is nothing left of it.

use crate::{
    command::VmState,
    config::Restart,
    restart::{Decision, Ending, Restarts},
};

/// What an operator asks of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Starts it.
    Start,
    /// Presses its power button, or forces it off at once.
    Stop {
        /// Force it.
        at_once: bool,
    },
    /// Keeps it from running.
    Pause,
    /// Lets it run on.
    Resume,
    /// Presses its reset button.
    Reset,
    /// Removes it.
    Destroy {
        /// Even if it is not off.
        force: bool,
    },
    /// Sends it an NMI.
    Nmi,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: it was noted for later.
    Noted,
    /// Make it; then [`Life::made`] or [`Life::not_made`].
    Make,
    /// Press the power button; after the timeout, [`Life::timed_out`].
    PressButton,
    /// End it: forced off.
    Force,
    /// End it: reset.
    Reset,
    /// Keep its vCPUs from running.
    Pause,
    /// Let them run.
    Resume,
    /// Send the NMI.
    Nmi,
    /// Remove it: there is nothing but its definition and its disks.
    Remove,
}

/// What becomes of a VM that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// It runs.
    Run,
    /// It is not wanted any more: take it down without having run it; then [`Life::down`].
    Discard,
}

/// What becomes of a VM of which nothing is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Make it again.
    Make,
    /// Make it again after a pause; then [`Life::wait_over`].
    Wait {
        /// In milliseconds.
        ms: u64,
    },
    /// It stays off.
    Off(Off),
    /// Remove it.
    Remove,
}

/// Why a VM stays off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Off {
    /// It ended by itself, and does not start again.
    Itself,
    /// It failed too often.
    GaveUp,
    /// An operator wanted it so, or wanted it started and it could not be.
    Operator,
}

/// What follows when the VM is down, or made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// What its configuration says of ends.
    Policy,
    /// It stays off.
    Off,
    /// It starts again at once.
    Again,
    /// It is removed.
    Gone,
}

/// The life of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    state: VmState,
    next: Next,
    restarts: Restarts,
    starts: u64,
    /// An operator asked for the start that is going on.
    asked: bool,
}

impl Life {
    /// A VM that is off.
    pub const fn off() -> Self {
        Life {
            state: VmState::Off,
            next: Next::Policy,
            restarts: Restarts::new(),
            starts: 0,
            asked: false,
        }
    }

    /// A VM that is made now, since the host starts.
    pub const fn starting() -> Self {
        Life {
            state: VmState::Starting,
            ..Self::off()
        }
    }

    /// How it is.
    pub fn state(&self) -> VmState {
        self.state
    }

    /// Starts so far.
    pub fn starts(&self) -> u64 {
        self.starts
    }

    /// Whether there are vCPUs.
    pub fn is_live(&self) -> bool {
        use VmState::{Paused, Running, Stopping};
        matches!(self.state, Running | Paused | Stopping)
    }

    /// Whether it is being destroyed.
    pub fn is_going(&self) -> bool {
        self.next == Next::Gone
    }

    /// Whether its power button was pressed, and it has not ended yet: it shuts down, or is paused while it does.
    pub fn shuts_down(&self) -> bool {
        match self.state {
            VmState::Stopping => true,
            // A VM that nobody has stopped does as its configuration says.
            VmState::Paused => self.next == Next::Off,
            _ => false,
        }
    }

    /// Whether it takes memory anew when there is nothing left of it, unless somebody decides otherwise meanwhile.
    pub fn comes_back(&self) -> bool {
        match self.state {
            VmState::Starting | VmState::Waiting => true,
            VmState::Ending => matches!(self.next, Next::Policy | Next::Again),
            VmState::Off | VmState::Running | VmState::Paused | VmState::Stopping => false,
        }
    }

    /// Does what an operator asks. The text says what is done.
    ///
    /// # Errors
    /// Why it cannot be done, and what to do instead; nothing has changed. The texts go behind the VM's name.
    pub fn ask(&mut self, verb: Verb) -> Result<(Step, &'static str), &'static str> {
        if self.is_going() {
            return Err("is being destroyed");
        }
        match verb {
            Verb::Start => self.start(),
            Verb::Stop { at_once } => self.stop(at_once),
            Verb::Pause => match self.state {
                VmState::Running => {
                    self.state = VmState::Paused;
                    Ok((Step::Pause, "paused"))
                }
                VmState::Paused => Err("is paused already"),
                VmState::Stopping => {
                    Err("is shutting down: wait for it, or stop it with timeout 0")
                }
                _ => Err(self.does_not_run()),
            },
            Verb::Resume => match self.state {
                VmState::Paused if self.shuts_down() => {
                    self.state = VmState::Stopping;
                    Ok((Step::Resume, "goes on shutting down"))
                }
                VmState::Paused => {
                    self.state = VmState::Running;
                    Ok((Step::Resume, "runs on"))
                }
                VmState::Running | VmState::Stopping => Err("is not paused"),
                _ => Err(self.does_not_run()),
            },
            Verb::Reset if self.is_live() => {
                self.end_then(Next::Again);
                Ok((Step::Reset, "reset"))
            }
            Verb::Nmi if self.is_live() => match self.state {
                VmState::Paused => Ok((Step::Nmi, "NMI sent; it takes it when it is resumed")),
                _ => Ok((Step::Nmi, "NMI sent")),
            },
            Verb::Reset | Verb::Nmi => Err(self.does_not_run()),
            Verb::Destroy { force } => self.destroy(force),
        }
    }

    /// Why a verb for a VM that runs is refused.
    fn does_not_run(&self) -> &'static str {
        match self.state {
            VmState::Starting => "is starting: try again when it runs",
            VmState::Ending => "has ended and is being taken down: start it when it is off",
            VmState::Waiting => "has ended and starts again soon: start it to have that at once",
            _ => "is off: start it first",
        }
    }

    /// It is to be taken down, and then?
    fn end_then(&mut self, next: Next) {
        self.state = VmState::Ending;
        self.next = next;
    }

    fn start(&mut self) -> Result<(Step, &'static str), &'static str> {
        match (self.state, self.next) {
            (VmState::Off | VmState::Waiting, _) => {
                self.state = VmState::Starting;
                self.restarts = Restarts::new();
                self.asked = true;
                Ok((Step::Make, "starting"))
            }
            // Its start was called off, and is not any more.
            (VmState::Starting, Next::Off) => {
                self.next = Next::Policy;
                Ok((Step::Noted, "starting"))
            }
            (VmState::Ending, Next::Off | Next::Policy) => {
                self.next = Next::Again;
                Ok((Step::Noted, "starts again when it has been taken down"))
            }
            (VmState::Starting, _) => Err("is starting already"),
            (VmState::Ending, _) => Err("starts again already when it has been taken down"),
            (VmState::Paused, Next::Off) => {
                Err("is paused while it shuts down: start it when it is off")
            }
            (VmState::Paused, _) => Err("is paused: resume it"),
            (VmState::Stopping, _) => Err("is shutting down: start it when it is off"),
            (VmState::Running, _) => Err("runs already"),
        }
    }

    fn stop(&mut self, at_once: bool) -> Result<(Step, &'static str), &'static str> {
        match (self.state, self.next) {
            (VmState::Running | VmState::Paused | VmState::Stopping, _) if at_once => {
                self.end_then(Next::Off);
                Ok((Step::Force, "forced off"))
            }
            (VmState::Running | VmState::Stopping, _) => {
                self.state = VmState::Stopping;
                self.next = Next::Off;
                Ok((Step::PressButton, "power button pressed"))
            }
            (VmState::Paused, _) => {
                Err("is paused and cannot shut down: resume it first, or stop it with timeout 0")
            }
            (VmState::Starting, Next::Policy) => {
                self.next = Next::Off;
                Ok((Step::Noted, "its start is called off"))
            }
            (VmState::Ending, Next::Policy | Next::Again) => {
                self.next = Next::Off;
                Ok((Step::Noted, "has ended, and stays off"))
            }
            (VmState::Waiting, _) => {
                self.state = VmState::Off;
                Ok((Step::Noted, "its restart is called off"))
            }
            (VmState::Starting, _) => Err("its start is called off already"),
            (VmState::Ending, _) => Err("is being taken down already"),
            (VmState::Off, _) => Err("is off already"),
        }
    }

    fn destroy(&mut self, force: bool) -> Result<(Step, &'static str), &'static str> {
        let stays_off = self.next == Next::Off;
        match self.state {
            VmState::Off => {}
            VmState::Waiting if force => {}
            VmState::Running | VmState::Paused | VmState::Stopping if force => {
                self.end_then(Next::Gone);
                return Ok((Step::Force, "forced off, and destroyed"));
            }
            VmState::Starting | VmState::Ending if force || stays_off => {
                self.next = Next::Gone;
                return Ok((Step::Noted, "destroyed when it has been taken down"));
            }
            VmState::Running | VmState::Paused => {
                return Err("is not off: stop it first, or destroy it by force");
            }
            VmState::Stopping => {
                return Err("is shutting down: wait until it is off, or destroy it by force");
            }
            VmState::Starting | VmState::Ending | VmState::Waiting => {
                return Err("is starting, now or soon: stop it first, or destroy it by force");
            }
        }
        self.end_then(Next::Gone);
        Ok((Step::Remove, "destroyed"))
    }

    /// Whether a VM that is starting is still wanted.
    pub fn is_wanted(&self) -> bool {
        self.next == Next::Policy
    }

    /// It was made.
    pub fn made(&mut self) -> Made {
        if self.is_wanted() {
            self.state = VmState::Running;
            self.starts += 1;
            self.asked = false;
            Made::Run
        } else {
            self.state = VmState::Ending;
            Made::Discard
        }
    }

    /// It could not be made, or was not, since nobody wants it any more.
    pub fn not_made(&mut self) -> After {
        let by_operator = self.asked || !self.is_wanted();
        self.asked = false;
        if self.is_going() {
            self.state = VmState::Ending;
            return After::Remove;
        }
        self.state = VmState::Off;
        self.next = Next::Policy;
        After::Off(match by_operator {
            true => Off::Operator,
            false => Off::Itself,
        })
    }

    /// The guest did not shut down in time. Whether it is to be forced off: it still shuts down, or is paused while it does.
    pub fn timed_out(&mut self) -> bool {
        let shuts_down = self.shuts_down();
        if shuts_down {
            self.state = VmState::Ending;
        }
        shuts_down
    }

    /// It was paused by its watchdog. Whether that is a change.
    pub fn paused_itself(&mut self) -> bool {
        let runs = matches!(self.state, VmState::Running | VmState::Stopping);
        if runs {
            self.state = VmState::Paused;
        }
        runs
    }

    /// Its vCPUs have come to rest for ever, for whatever reason.
    pub fn at_rest(&mut self) {
        self.state = VmState::Ending;
    }

    /// Nothing is left of it. It ended so, `ran_ms` milliseconds after its start.
    pub fn down(&mut self, policy: Restart, ending: Ending, ran_ms: u64) -> After {
        let wanted = core::mem::replace(&mut self.next, Next::Policy);
        let (state, after) = match wanted {
            Next::Gone => {
                self.next = Next::Gone;
                (VmState::Ending, After::Remove)
            }
            Next::Off => (VmState::Off, After::Off(Off::Operator)),
            Next::Again => {
                self.restarts = Restarts::new();
                self.asked = true;
                (VmState::Starting, After::Make)
            }
            Next::Policy => match self.restarts.decide(policy, ending, ran_ms) {
                Decision::Stay => (VmState::Off, After::Off(Off::Itself)),
                Decision::GiveUp => (VmState::Off, After::Off(Off::GaveUp)),
                Decision::Again { wait_ms: 0 } => (VmState::Starting, After::Make),
                Decision::Again { wait_ms } => (VmState::Waiting, After::Wait { ms: wait_ms }),
            },
        };
        self.state = state;
        after
    }

    /// The pause before its next start is over. Whether it is to be made now.
    pub fn wait_over(&mut self) -> bool {
        let waits = self.state == VmState::Waiting;
        if waits {
            self.state = VmState::Starting;
        }
        waits
    }
}

#[cfg(test)]
mod tests;
