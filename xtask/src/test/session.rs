//! One machine under test: its serial line, its log file and its time.
//!
//! Invariants: the machine does not outlive the session; all that it sent is in the log
//! file; no wait goes beyond the session's deadline, which moves only where a scenario asks for it.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use super::terminal::Terminal;
use crate::emulator::picture::Picture;
use crate::emulator::{self, End, Machine, Missed, Running};

/// Between two looks at the screen.
const LOOK_AGAIN: Duration = Duration::from_millis(300);

/// A running machine.
pub struct Session {
    running: Running,
    started: Instant,
    deadline: Instant,
}

impl Session {
    /// Starts the machine; its serial line is logged to the file `log`.
    ///
    /// # Errors
    /// It cannot be started, or the log cannot be written.
    pub fn start(machine: &Machine, log: &Path, limit: Duration) -> Result<Self> {
        let mut file =
            File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let watch = move |bytes: &[u8]| {
            if let Err(error) = file.write_all(bytes) {
                eprintln!("a log is incomplete: {error}");
            }
        };
        let started = Instant::now();
        let running = machine.start_watched(Some(Box::new(watch)))?;
        Ok(Self {
            running,
            started,
            deadline: started + limit,
        })
    }

    /// Since when the machine runs.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Gives the scenario at least so much time from now on: for one that goes round after round, each with a limit of its own.
    pub fn allow(&mut self, time: Duration) {
        self.deadline = self.deadline.max(Instant::now() + time);
    }

    /// All that the machine has sent, as lines.
    pub fn text(&self) -> String {
        self.running.log()
    }

    /// `limit`, or what is left of the scenario's time if that is less.
    fn limited(&self, limit: Duration) -> Duration {
        limit.min(self.deadline.saturating_duration_since(Instant::now()))
    }

    /// Types on the machine's own keyboard: see [`Running::type_on_keyboard`].
    ///
    /// # Errors
    /// The emulator does not take it within the time.
    pub fn type_on_keyboard(&self, text: &str, limit: Duration) -> Result<()> {
        self.running
            .type_on_keyboard(text, self.limited(limit))
            .with_context(|| format!("typing {text:?} on the keyboard"))
    }

    /// Waits until what the machine's screen shows is `right`. QEMU only.
    ///
    /// # Errors
    /// It did not become so in time; `what` says what was waited for.
    pub fn wait_for_screen(
        &mut self,
        what: &str,
        limit: Duration,
        right: impl Fn(&Picture) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + self.limited(limit);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let picture = self.running.screen(left).context(what.to_owned())?;
            if right(&picture) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the screen does not show {what}");
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Keeps the machine's screen when it powers itself off: see [`Running::keep_when_off`].
    pub fn keep_when_off(&self) {
        self.running.keep_when_off();
    }

    /// Ends a machine that was kept: see [`Running::let_go`].
    ///
    /// # Errors
    /// It does not power itself off within the time.
    pub fn let_go(&self, limit: Duration) -> Result<()> {
        self.running.let_go(self.limited(limit))
    }

    /// Waits until the machine has powered itself off.
    ///
    /// # Errors
    /// It did not in time, or it ended in another way.
    pub fn wait_for_power_off(&mut self, limit: Duration) -> Result<()> {
        self.wait_for(&End::PoweredOff, limit)
    }

    /// Waits until the machine has ended in this way.
    ///
    /// # Errors
    /// It did not in time, or it ended in another way.
    pub fn wait_for(&mut self, wanted: &End, limit: Duration) -> Result<()> {
        let end = self
            .running
            .wait_exit(self.limited(limit))
            .context("waiting for the machine's end")?;
        ensure!(end == *wanted, "{end}; wanted: {wanted}");
        Ok(())
    }
}

impl Terminal for Session {
    fn expect(&mut self, pattern: &Regex, limit: Duration) -> Result<String> {
        // Everything from where the last search ended belongs to the match.
        let everything = emulator::Regex::new(&format!("(?s-u:.)*?(?:{pattern})"))?;
        let limit = self.limited(limit);
        match self.running.read_until(&everything, limit) {
            Ok(found) => Ok(found.groups.into_iter().next().unwrap_or_default()),
            Err(Missed::Timeout) => bail!("/{pattern}/ did not come in {} s", limit.as_secs()),
            Err(Missed::Ended(end)) => bail!("{end} before /{pattern}/ came"),
        }
    }

    fn send(&mut self, text: &str) -> Result<()> {
        self.running.send(text);
        Ok(())
    }
}
