//! One guest's console alone on standard output, and an exit status that tells how it ended.
//!
//! For test kernels: `cargo xtask run --headless --test-devices`. Plinth puts the guest's output between
//! two lines with a word that only it and xtask know (`console-frame`, docs/CONFIGURATION.md), so that
//! whatever a guest prints, it cannot pass for the line that says how it ended.
//!
//! Exit statuses are those that QEMU has for the same kernel where it has one; those of xtask's own are
//! even, as no test kernel's can be.

use std::{
    fmt, fs,
    io::{self, Read, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::{
    emulator::{Machine, Watch},
    exit::Code,
    process::last_lines,
};

/// How often to look whether the machine has ended, or the time is over.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Time for Plinth's own last words, and for the machine's end after them.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Lines of Plinth's own that are shown when something went wrong.
const TAIL_LINES: usize = 60;

/// A word that no guest can know.
///
/// # Errors
/// The system has no random numbers.
pub fn new_word() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context("/dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// How a guest ended, as Plinth says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its processor shut down.
    TripleFault,
    /// It ended its test with this value.
    TestExit(u32),
    /// Plinth stopped it.
    Stopped,
    /// It could not be started.
    NotStarted,
    /// Plinth itself failed.
    HostFault,
}

impl Outcome {
    /// Reads what stands in the closing line.
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "power-off" => Outcome::PowerOff,
            "reset" => Outcome::Reset,
            "triple-fault" => Outcome::TripleFault,
            "stopped" => Outcome::Stopped,
            "not-started" => Outcome::NotStarted,
            "host-fault" => Outcome::HostFault,
            _ => Outcome::TestExit(text.strip_prefix("test-exit ")?.parse().ok()?),
        })
    }

    /// The exit status. A reset and a shutdown end QEMU like a power-off, where it is told not to reboot.
    fn code(self) -> Code {
        match self {
            // As `isa-debug-exit` makes it: always odd.
            Outcome::TestExit(value) => Code::Guest((value << 1 | 1) as u8),
            Outcome::PowerOff | Outcome::Reset | Outcome::TripleFault => Code::Success,
            Outcome::Stopped | Outcome::HostFault => Code::GuestStopped,
            Outcome::NotStarted => Code::NotRun,
        }
    }

    /// Whether Plinth has more to say of it than its name.
    fn needs_words(self) -> bool {
        !matches!(
            self,
            Outcome::TestExit(_) | Outcome::PowerOff | Outcome::Reset
        )
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PowerOff => f.write_str("the guest powered off"),
            Outcome::Reset => f.write_str("the guest asked for a reset"),
            Outcome::TripleFault => f.write_str("the guest's processor shut down (triple fault)"),
            Outcome::TestExit(value) => write!(f, "the test ended with value {value:#x}"),
            Outcome::Stopped => f.write_str("Plinth stopped the guest"),
            Outcome::NotStarted => f.write_str("the guest could not be started"),
            Outcome::HostFault => f.write_str("a fault of Plinth"),
        }
    }
}

/// Takes the serial line's bytes apart as they come.
struct Splitter {
    opening: Vec<u8>,
    closing: Vec<u8>,
    stage: Stage,
    /// What may be the beginning of the line waited for.
    pending: Vec<u8>,
}

/// Where in the serial line's output we are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Before,
    Within,
    /// In the closing line, behind the word.
    Closing,
    After,
}

/// Who wrote some bytes.
enum From<'b> {
    Plinth(&'b [u8]),
    Guest(&'b [u8]),
    /// The closing line.
    End(Option<Outcome>),
}

impl Splitter {
    fn new(word: &str) -> Self {
        Splitter {
            opening: format!("{word} begin\r\n").into_bytes(),
            closing: format!("\r\n{word} end ").into_bytes(),
            stage: Stage::Before,
            pending: Vec::new(),
        }
    }

    /// Takes the next bytes in.
    fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(From<'_>)) {
        self.pending.extend_from_slice(bytes);
        loop {
            let mark: &[u8] = match self.stage {
                Stage::Before => &self.opening,
                Stage::Within => &self.closing,
                Stage::Closing => b"\r\n",
                Stage::After => {
                    each(From::Plinth(&self.pending));
                    self.pending.clear();
                    return;
                }
            };
            let found = find(&self.pending, mark);
            // What cannot be a part of the mark may go on.
            let certain =
                found.unwrap_or_else(|| self.pending.len() - overlap(&self.pending, mark));
            let consumed = found.map_or(certain, |at| at + mark.len());
            let text = &self.pending[..certain];
            match self.stage {
                Stage::Before => each(From::Plinth(text)),
                Stage::Within => each(From::Guest(text)),
                Stage::Closing if found.is_some() => {
                    each(From::End(Outcome::parse(&String::from_utf8_lossy(text))));
                }
                Stage::Closing => return,
                Stage::After => unreachable!("left above"),
            }
            self.pending.drain(..consumed);
            if found.is_none() {
                return;
            }
            self.stage = match self.stage {
                Stage::Before => Stage::Within,
                Stage::Within => Stage::Closing,
                Stage::Closing | Stage::After => Stage::After,
            };
        }
    }

    /// No more will come: what was held back is what it looks like.
    fn finish(&mut self, mut each: impl FnMut(From<'_>)) {
        let rest = std::mem::take(&mut self.pending);
        match self.stage {
            Stage::Within => each(From::Guest(&rest)),
            Stage::Before | Stage::Closing | Stage::After => each(From::Plinth(&rest)),
        }
    }
}

/// Where `mark` first stands in `bytes`.
fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}

/// Length of the longest end of `bytes` with which `mark` begins.
fn overlap(bytes: &[u8], mark: &[u8]) -> usize {
    (1..mark.len().min(bytes.len() + 1))
        .rev()
        .find(|&length| bytes.ends_with(&mark[..length]))
        .unwrap_or(0)
}

/// What the reader of the serial line and the waiting thread share.
struct Sorter {
    splitter: Splitter,
    /// Plinth's own lines.
    log: Vec<u8>,
    verbose: bool,
    ended: mpsc::Sender<Option<Outcome>>,
}

impl Sorter {
    fn take(&mut self, bytes: Option<&[u8]>) {
        let Sorter {
            splitter,
            log,
            verbose,
            ended,
        } = self;
        let each = |from: From<'_>| match from {
            From::Guest(bytes) => {
                let mut out = io::stdout().lock();
                // Nobody may be listening any more; the machine runs on to its end.
                let _ = out.write_all(bytes).and_then(|()| out.flush());
            }
            From::Plinth(bytes) => {
                log.extend_from_slice(bytes);
                if *verbose {
                    // As above.
                    let _ = io::stderr().write_all(bytes);
                }
            }
            // The receiver waits for this, or has given up.
            From::End(outcome) => drop(ended.send(outcome)),
        };
        match bytes {
            Some(bytes) => splitter.feed(bytes, each),
            None => splitter.finish(each),
        }
    }
}

fn lock(sorter: &Mutex<Sorter>) -> MutexGuard<'_, Sorter> {
    sorter.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the machine to the end of its guest. `word`: the one in its configuration.
///
/// # Errors
/// The emulator could not be started.
pub fn run(
    machine: &Machine,
    word: &str,
    timeout: Option<Duration>,
    verbose: bool,
) -> anyhow::Result<Code> {
    let (sender, ended) = mpsc::channel();
    let sorter = Arc::new(Mutex::new(Sorter {
        splitter: Splitter::new(word),
        log: Vec::new(),
        verbose,
        ended: sender,
    }));
    let shared = Arc::clone(&sorter);
    let watch: Watch = Box::new(move |bytes| lock(&shared).take(Some(bytes)));
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut running = machine.start_watched(Some(watch))?;
    let (code, words) = loop {
        // The end of the machine is looked at before the guest's, so that the last words are not missed.
        let machine_ended = running.ended();
        match ended.recv_timeout(LOOK_EVERY) {
            Ok(Some(outcome)) => {
                if outcome.needs_words() {
                    // It goes off by itself, or stands still after a fault of its own.
                    let _ = running.wait_exit(LAST_WORDS);
                }
                break (outcome.code(), outcome.to_string());
            }
            Ok(None) => {
                break (
                    Code::GuestStopped,
                    "Plinth's closing line is damaged".into(),
                );
            }
            Err(_) => {}
        }
        if let Some(end) = machine_ended {
            break (Code::GuestStopped, format!("the guest did not end: {end}"));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break (Code::Timeout, "the time limit passed".into());
        }
    };
    running.kill();
    let mut sorter = lock(&sorter);
    sorter.take(None);
    let wanted = matches!(code, Code::Guest(_) | Code::Success | Code::Timeout);
    if !wanted && !verbose {
        let log = String::from_utf8_lossy(&sorter.log).replace('\r', "");
        eprint!("{}", last_lines(&log, TAIL_LINES));
    }
    if !matches!(code, Code::Guest(_)) || verbose {
        eprintln!("xtask: {words}");
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORD: &str = "0123456789abcdef";

    /// What comes of a line that arrives in pieces of `size`: Plinth's, the guest's, the end.
    fn split(line: &str, size: usize) -> (String, String, Option<Outcome>) {
        let mut splitter = Splitter::new(WORD);
        let (mut plinth, mut guest, mut end) = (Vec::new(), Vec::new(), None);
        let mut each = |from: From<'_>| match from {
            From::Plinth(bytes) => plinth.extend_from_slice(bytes),
            From::Guest(bytes) => guest.extend_from_slice(bytes),
            From::End(outcome) => end = outcome,
        };
        for piece in line.as_bytes().chunks(size) {
            splitter.feed(piece, &mut each);
        }
        splitter.finish(&mut each);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(plinth), text(guest), end)
    }

    #[test]
    fn the_guests_output_is_what_stands_in_the_frame_to_the_byte() {
        let line = format!(
            "[ 0.1] up\r\n{WORD} begin\r\nhello\r\n\r\n0123 end\nno newline\r\n{WORD} end test-exit 49\r\noff\r\n"
        );
        for size in 1..line.len() {
            let (plinth, guest, end) = split(&line, size);
            assert_eq!(plinth, "[ 0.1] up\r\noff\r\n");
            assert_eq!(guest, "hello\r\n\r\n0123 end\nno newline");
            assert_eq!(end, Some(Outcome::TestExit(49)));
        }
    }

    #[test]
    fn output_is_not_held_back_for_long_and_not_lost_without_an_end() {
        let mut splitter = Splitter::new(WORD);
        let mut guest = Vec::new();
        let mut feed = |bytes: &str| {
            splitter.feed(bytes.as_bytes(), |from| {
                if let From::Guest(bytes) = from {
                    guest.extend_from_slice(bytes);
                }
            });
            guest.len()
        };
        assert_eq!(feed(&format!("{WORD} begin\r\nabc\r\n")), 3);
        assert_eq!(feed("d"), 6);
        let line = format!("{WORD} begin\r\nabc\r\n{WORD} en");
        assert_eq!(split(&line, 5).1, format!("abc\r\n{WORD} en"));
    }

    #[test]
    fn a_guest_that_guesses_wrong_changes_nothing() {
        let line = format!("{WORD} begin\r\n\r\nfedcba9876543210 end test-exit 0\r\n");
        let (_, guest, end) = split(&line, 7);
        assert_eq!((guest.lines().count(), end), (2, None));
    }

    #[test]
    fn statuses_are_qemus_and_xtasks_own_are_even() {
        let status = |text: &str| Outcome::parse(text).unwrap().code().status();
        assert_eq!(status("test-exit 0"), 1);
        assert_eq!(status("test-exit 1"), 3);
        assert_eq!(status("test-exit 4294967295"), 255);
        for own in ["power-off", "reset", "triple-fault"] {
            assert_eq!(status(own), 0);
        }
        for own in ["stopped", "not-started", "host-fault"] {
            assert!(status(own).is_multiple_of(2) && status(own) > 0);
        }
        assert_eq!(Outcome::parse("test-exit x"), None);
        assert_eq!(Outcome::parse(""), None);
    }

    #[test]
    fn words_differ() {
        let (one, other) = (new_word().unwrap(), new_word().unwrap());
        assert!(one != other && one.len() == 32);
    }
}
