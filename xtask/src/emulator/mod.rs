//! A PC in an emulator: one description for QEMU and Bochs, its first serial port as text.
//!
//! A [`Machine`] says what to start; [`Machine::start_watched`] gives a [`Running`] one, which ends
//! with its value, at the latest. The serial port is a pseudo-terminal in both emulators.
//! QEMU tells by its monitor why it ended, Bochs by its log.
//!
//! Start a machine on the thread that keeps it: where the system kills children with their
//! parent it goes by the parent's thread.

mod bochs;
mod bridge;
pub mod kvm;
pub mod newer;
pub mod picture;
mod pty;
mod qemu;
mod serial;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
pub use regex::bytes::Regex;

use crate::{
    exit::{Code, Stop},
    paths,
    process::Guarded,
};
pub use bochs::MAX_MEMORY_MIB as BOCHS_MAX_MEMORY_MIB;
use bridge::Bridge;
use picture::Picture;
use serial::Serial;
pub use serial::{Cursor, Keyboard, Watch};

/// Longest path of a Unix socket, in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// Which emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Emulator {
    /// QEMU: AMD-V, emulated or the workstation's own.
    Qemu,
    /// Bochs: VT-x, emulated.
    Bochs,
}

/// What the emulated PC starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Firmware {
    /// UEFI firmware (OVMF).
    Uefi,
    /// A legacy BIOS.
    Bios,
}

/// How instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceleration {
    /// By the emulator.
    Emulated,
    /// By the workstation's processor (KVM), with virtualization for the guest.
    Kvm,
}

/// What makes time pass in an emulated PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// The workstation's clock. In Bochs: its instructions, at a speed of its own.
    Workstation,
    /// Its own instructions, of 2^`shift` ns each; an idle machine skips to its next event.
    /// Runs repeat exactly, however busy the workstation is. With a shift of 0 the time-stamp
    /// counter counts instructions; the higher it is, the sooner waiting loops are through.
    Instructions {
        /// Logarithm of the nanoseconds.
        shift: u8,
    },
}

/// A PC to emulate.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Which emulator.
    pub emulator: Emulator,
    /// What it starts with. Bochs: BIOS only.
    pub firmware: Firmware,
    /// How instructions are run. Bochs: emulated only.
    pub acceleration: Acceleration,
    /// The boot disk. It is not changed.
    pub image: PathBuf,
    /// Processors.
    pub cpus: u32,
    /// Memory, in MiB. Bochs: at most 2048.
    pub memory_mib: u32,
    /// Processor model in the emulator's words; `None`: all that it can do.
    pub cpu_model: Option<String>,
    /// What makes the machine's time pass.
    pub time: Time,
    /// A detailed log of what the processor does goes here.
    pub trace: Option<PathBuf>,
    /// QEMU: wait for a debugger on this TCP port of the workstation before the first instruction.
    pub debugger_port: Option<u16>,
    /// The QEMU to use instead of the installed one.
    pub qemu: Option<PathBuf>,
    /// The machine's second serial port is here, as a Unix socket that takes one program at a time.
    pub control: Option<PathBuf>,
    /// More arguments for QEMU, or lines for Bochs' configuration.
    pub extra: Vec<String>,
}

impl Machine {
    /// A PC with 1 GiB that boots this image, emulated: 2 processors and UEFI in QEMU, 1
    /// processor and BIOS in Bochs.
    pub fn new(emulator: Emulator, image: &Path) -> Self {
        Machine {
            emulator,
            firmware: match emulator {
                Emulator::Qemu => Firmware::Uefi,
                Emulator::Bochs => Firmware::Bios,
            },
            acceleration: Acceleration::Emulated,
            image: image.to_owned(),
            cpus: match emulator {
                Emulator::Qemu => 2,
                // Each further one takes nearly as much of the workstation's time as the first.
                Emulator::Bochs => 1,
            },
            memory_mib: 1024,
            cpu_model: None,
            time: Time::Workstation,
            trace: None,
            debugger_port: None,
            qemu: None,
            control: None,
            extra: Vec::new(),
        }
    }

    /// Whether the emulator can be this machine.
    ///
    /// # Errors
    /// It cannot, with the reason.
    pub fn check(&self) -> anyhow::Result<()> {
        let refuse = |why: &str| Err(Stop::with(Code::Usage, why));
        if self.cpus == 0 {
            return refuse("a machine has at least one processor");
        }
        if let Some(path) = &self.control
            && path.as_os_str().len() > MAX_SOCKET_PATH
        {
            return refuse(&format!(
                "{}: the path of a socket has up to {MAX_SOCKET_PATH} bytes",
                path.display()
            ));
        }
        if self.emulator == Emulator::Bochs {
            if self.firmware == Firmware::Uefi {
                return refuse("Bochs has no UEFI firmware; use --firmware bios");
            }
            if self.acceleration == Acceleration::Kvm {
                return refuse("Bochs emulates every instruction; --accel kvm is for QEMU");
            }
            if self.memory_mib > bochs::MAX_MEMORY_MIB {
                return refuse("Bochs has at most 2048 MiB of memory here");
            }
            if self.debugger_port.is_some() {
                return refuse(
                    "the Bochs of distributions has no port for gdb; use --emulator qemu, or \
                     Bochs' own debugger in a terminal",
                );
            }
        }
        Ok(())
    }

    /// Starts it; `watch` is called with what the serial port puts out, on another thread.
    ///
    /// # Errors
    /// The emulator is missing or cannot be this machine.
    pub fn start_watched(&self, watch: Option<Watch>) -> anyhow::Result<Running> {
        self.check()?;
        let folder = Folder::new()?;
        let serial = Serial::open(watch)?;
        // QEMU has sockets of its own. Bochs' server waits for its client before it starts, and has only one.
        let bridge = match (&self.control, self.emulator) {
            (Some(path), Emulator::Bochs) => Some(Bridge::open(path)?),
            _ => None,
        };
        let (child, source) = match self.emulator {
            Emulator::Qemu => qemu::start(self, &folder.0, serial.device())?,
            Emulator::Bochs => {
                let control = bridge.as_ref().map(Bridge::device);
                bochs::start(self, &folder.0, serial.device(), control)?
            }
        };
        Ok(Running {
            child,
            serial,
            source,
            end: None,
            read: Cursor::default(),
            control: self.control.clone(),
            _bridge: bridge,
            folder,
        })
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was switched off by what ran on it.
    PoweredOff,
    /// What ran on it restarted it, or its processor shut down (triple fault); a machine is
    /// not started again.
    Reset,
    /// The emulator gave up or was ended from outside; in its words.
    Emulator(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::PoweredOff => f.write_str("the machine powered off"),
            End::Reset => f.write_str("the machine was reset"),
            End::Emulator(words) => write!(f, "the emulator ended: {words}"),
        }
    }
}

/// A line that was waited for and came.
#[derive(Clone, Debug)]
pub struct Found {
    /// The match, then its groups; empty where a group took no part.
    pub groups: Vec<String>,
}

/// Why what was waited for did not come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// The time limit passed.
    Timeout,
    /// The machine ended first.
    Ended(End),
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missed::Timeout => f.write_str("the time limit passed"),
            Missed::Ended(end) => end.fmt(f),
        }
    }
}

impl std::error::Error for Missed {}

/// How long to wait for what an emulator that has ended said last.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Where an emulator says why it ended.
enum EndSource {
    /// QEMU's monitor: the reason it gave, once it did.
    Monitor {
        monitor: qemu::Monitor,
        reason: Arc<Mutex<Option<String>>>,
        /// Reads the monitor, to its end.
        follower: JoinHandle<()>,
        errors: PathBuf,
    },
    /// Bochs' log, and its screen.
    Log { log: PathBuf, screen: pty::Screen },
}

impl EndSource {
    fn read(&self, status: std::process::ExitStatus) -> End {
        match self {
            EndSource::Monitor {
                reason,
                follower,
                errors,
                ..
            } => {
                // QEMU is gone; what it said last may not have been read yet.
                let deadline = Instant::now() + LAST_WORDS;
                while !follower.is_finished() && Instant::now() < deadline {
                    thread::sleep(Duration::from_millis(1));
                }
                let reason = reason
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                qemu::end(reason.as_deref(), &read_lossy(errors), status)
            }
            EndSource::Log { log, screen } => bochs::end(&read_lossy(log), &screen.text()),
        }
    }
}

fn read_lossy(path: &Path) -> String {
    // A log that was never begun says as much as an empty one.
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// A machine that was started. Dropping it ends it.
pub struct Running {
    child: Guarded,
    serial: Serial,
    source: EndSource,
    end: Option<End>,
    /// How far [`Running::read_until`] has read.
    read: Cursor,
    /// The socket of its second serial port.
    control: Option<PathBuf>,
    _bridge: Option<Bridge>,
    folder: Folder,
}

impl Running {
    /// Waits until the serial port's output, from where the last wait left off, matches.
    /// Output is bytes as the guest sent them: lines end with `\r\n`.
    ///
    /// # Errors
    /// The time passed or the machine ended without it.
    pub fn read_until(&mut self, pattern: &Regex, timeout: Duration) -> Result<Found, Missed> {
        let deadline = Instant::now() + timeout;
        loop {
            // The end is looked at before the output, so that the last words are not missed.
            let ended = self.ended();
            if let Some(found) = self.serial.search(pattern, &mut self.read) {
                return Ok(found);
            }
            if let Some(end) = ended {
                return Err(Missed::Ended(end));
            }
            if Instant::now() >= deadline {
                return Err(Missed::Timeout);
            }
            self.serial.wait_for_more(deadline);
        }
    }

    /// Looks for a match in the output so far, from the cursor on, and sets the cursor behind
    /// it. Independent of [`Running::read_until`].
    pub fn search(&self, pattern: &Regex, cursor: &mut Cursor) -> Option<Found> {
        self.serial.search(pattern, cursor)
    }

    /// Types on the serial port. Never blocks.
    pub fn send(&self, bytes: impl Into<Vec<u8>>) {
        self.serial.keyboard().send(bytes);
    }

    /// A handle to type with from other threads.
    pub fn keyboard(&self) -> Keyboard {
        self.serial.keyboard()
    }

    /// Types on the machine's own keyboard, not its serial port: lower case, digits, a few signs (`qemu::keys_of`),
    /// Return (`\r`), Tab and Ctrl-A.
    ///
    /// # Errors
    /// We do not know the key, or the emulator did not take one within the time.
    pub fn type_on_keyboard(&self, text: &str, timeout: Duration) -> anyhow::Result<()> {
        match &self.source {
            EndSource::Monitor { monitor, .. } => text
                .chars()
                .try_for_each(|character| monitor.type_character(character)),
            EndSource::Log { log, screen } => bochs::type_text(text, log, screen, timeout),
        }
    }

    /// What the machine's screen shows now. QEMU only.
    ///
    /// # Errors
    /// The emulator gave no whole picture within the time.
    pub fn screen(&self, timeout: Duration) -> anyhow::Result<Picture> {
        let EndSource::Monitor { monitor, .. } = &self.source else {
            anyhow::bail!("only QEMU tells what its screen shows");
        };
        let file = self.folder.0.join("screen.ppm");
        // There is none the first time.
        let _ = fs::remove_file(&file);
        monitor.dump_screen(&file);
        let deadline = Instant::now() + timeout;
        loop {
            let picture = fs::read(&file)
                .ok()
                .and_then(|bytes| Picture::parse(&bytes));
            if let Some(picture) = picture {
                return Ok(picture);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "QEMU gave no picture of its screen"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the machine's screen shows last, once it has powered itself off, is kept for [`Running::screen`] until
    /// [`Running::let_go`]; the machine does not end before. QEMU only; others keep nothing.
    pub fn keep_when_off(&self) {
        if let EndSource::Monitor { monitor, .. } = &self.source {
            monitor.keep_when_off();
        }
    }

    /// Ends a machine that was kept, once it has powered itself off.
    ///
    /// # Errors
    /// It did not within the time.
    pub fn let_go(&self, timeout: Duration) -> anyhow::Result<()> {
        if let EndSource::Monitor {
            monitor, reason, ..
        } = &self.source
        {
            let deadline = Instant::now() + timeout;
            let is_off = || reason.lock().is_ok_and(|reason| reason.is_some());
            while !is_off() {
                anyhow::ensure!(Instant::now() < deadline, "it does not power off");
                thread::sleep(Duration::from_millis(50));
            }
            monitor.quit();
        }
        Ok(())
    }

    /// Waits for the machine's end.
    ///
    /// # Errors
    /// [`Missed::Timeout`].
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<End, Missed> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(end) = self.ended() {
                return Ok(end);
            }
            if Instant::now() >= deadline {
                return Err(Missed::Timeout);
            }
            self.serial.wait_for_more(deadline);
        }
    }

    /// How it ended, if it has. All output is in the log then.
    pub fn ended(&mut self) -> Option<End> {
        if self.end.is_none() {
            let status = match self.child.ended() {
                Ok(status) => status?,
                Err(error) => {
                    self.end = Some(End::Emulator(error.to_string()));
                    return self.end.clone();
                }
            };
            self.serial.finish();
            self.end = Some(self.source.read(status));
        }
        self.end.clone()
    }

    /// Ends it at once, like pulling the plug.
    pub fn kill(&mut self) {
        self.child.kill();
        self.serial.finish();
    }

    /// All that the serial port has put out, `\r` removed. The beginning is cut off beyond
    /// 32 MiB.
    pub fn log(&self) -> String {
        self.serial.text()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(path) = &self.control {
            self.child.kill();
            // Whoever made it may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

/// A folder for one machine's files, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let all = paths::target().join("run");
        remove_abandoned(&all);
        let folder = all.join(name);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Folder(folder))
    }
}

/// Removes what machines left whose xtask was killed.
fn remove_abandoned(all: &Path) {
    let Ok(entries) = fs::read_dir(all) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .split_once('-')
            .map(|(pid, _)| Path::new("/proc").join(pid));
        if owner.is_some_and(|process| !process.exists()) {
            // Another xtask may be doing the same.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is small, and below target/.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_dead_owners_are_removed() {
        let all = std::env::temp_dir().join(format!("plinth-run-{}", std::process::id()));
        // No process has a number beyond 2^22 (Linux, PID_MAX_LIMIT).
        let (dead, alive) = (
            all.join("9999999-0"),
            all.join(format!("{}-0", std::process::id())),
        );
        fs::create_dir_all(&dead).unwrap();
        fs::create_dir_all(&alive).unwrap();
        remove_abandoned(&all);
        assert!(!dead.exists() && alive.exists());
        fs::remove_dir_all(all).unwrap();
    }

    #[test]
    fn bochs_refuses_what_it_cannot_be() {
        let bochs = Machine::new(Emulator::Bochs, Path::new("x.img"));
        assert!(bochs.check().is_ok());
        for wrong in [
            Machine {
                firmware: Firmware::Uefi,
                ..bochs.clone()
            },
            Machine {
                acceleration: Acceleration::Kvm,
                ..bochs.clone()
            },
            Machine {
                memory_mib: 4096,
                ..bochs.clone()
            },
            Machine {
                debugger_port: Some(1234),
                ..bochs.clone()
            },
            Machine { cpus: 0, ..bochs },
        ] {
            assert_eq!(Stop::code_of(&wrong.check().unwrap_err()), Code::Usage);
        }
    }
}
