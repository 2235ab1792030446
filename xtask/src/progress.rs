//! Progress on long steps: a spinner on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// One long step. Dropped without [`Step::done`] it counts as failed and says so.
pub struct Step {
    name: String,
    started: Instant,
    bar: Option<ProgressBar>,
    finished: bool,
}

impl Step {
    /// Shows that a step has begun: "Building the kernel".
    pub fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(name.clone());
            bar.set_style(
                ProgressStyle::with_template("{spinner:.cyan} {msg} {elapsed:.dim}")
                    .expect("the template is well-formed"),
            );
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("{name} ...");
        }
        Step {
            name,
            started: Instant::now(),
            bar,
            finished: false,
        }
    }

    /// Adds what the step is busy with.
    pub fn detail(&self, detail: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {detail}", self.name));
        }
    }

    /// Ends the step well.
    pub fn done(mut self) {
        self.finished = true;
        self.close("done");
    }

    /// Takes the step off the screen without a word: nothing had to be done.
    pub fn skip(mut self) {
        self.finished = true;
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn close(&self, how: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        eprintln!("{}: {how} in {seconds:.1} s", self.name);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.close("failed");
        }
    }
}
