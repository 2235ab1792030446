//! Child processes: run to an end with their output at hand, and none left behind.
//!
//! Every child that may run for long is listed here while it lives, so that a signal to xtask
//! (Ctrl-C, SIGTERM, SIGHUP) ends them all. Emulators lead process groups of their own and
//! also die with xtask where `setpriv` is there to ask the system for it.

use std::{
    ffi::OsStr,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{exit::Code, terminal};

/// What lives, and how to end it.
static LIVING: Mutex<Vec<Living>> = Mutex::new(Vec::new());

/// Set once xtask is ending: nothing new may start.
static ENDING: AtomicBool = AtomicBool::new(false);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Living {
    Process(Pid),
    Group(Pid),
}

impl Living {
    fn end(self) {
        // One that has ended already is what we want.
        let _ = match self {
            Living::Process(pid) => kill(pid, Signal::SIGTERM),
            Living::Group(pid) => killpg(pid, Signal::SIGKILL),
        };
    }
}

/// Takes a child off the list when dropped. Drop it only after the child was waited for:
/// until then its number cannot belong to another process.
struct Listed(Living);

impl Listed {
    fn new(living: Living) -> Self {
        let mut list = LIVING.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(living);
        if ENDING.load(Ordering::SeqCst) {
            living.end();
        }
        Listed(living)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut list = LIVING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = list.iter().position(|l| *l == self.0) {
            list.swap_remove(index);
        }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP end the listed children, restore the terminal and
/// end xtask.
///
/// # Errors
/// The handlers could not be installed.
pub fn end_children_on_signals() -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            ENDING.store(true, Ordering::SeqCst);
            let list = LIVING.lock().unwrap_or_else(PoisonError::into_inner);
            for living in list.iter() {
                living.end();
            }
            terminal::restore();
            eprintln!("\ninterrupted");
            std::process::exit(Code::Interrupted.status().into());
        }
    });
    Ok(())
}

/// The program's file, looked for in PATH as a shell does, then in the folders of system
/// programs, which users' PATH may leave out.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// It could not be started, or failed: then the error carries the end of what it wrote.
pub fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{name} could not be started"))?;
    let listed = Listed::new(Living::Process(pid_of(&child)));
    let mut errors = child.stderr.take().expect("stderr is piped");
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        // A broken pipe ends the text; the exit status tells the rest.
        let _ = errors.read_to_end(&mut text);
        text
    });
    let mut output = Vec::new();
    child
        .stdout
        .take()
        .expect("stdout is piped")
        .read_to_end(&mut output)?;
    let status = child.wait()?;
    drop(listed);
    let errors = errors.join().map_err(|_| anyhow!("reader panicked"))?;
    let output = String::from_utf8_lossy(&output).into_owned();
    if !status.success() {
        let errors = String::from_utf8_lossy(&errors);
        bail!(
            "{name}: {status}\n{}{}",
            last_lines(&output, 15),
            last_lines(&errors, 30)
        );
    }
    Ok(output)
}

/// Runs a command with our terminal as its own.
///
/// # Errors
/// It could not be started.
pub fn status_of(command: &mut Command) -> anyhow::Result<ExitStatus> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .spawn()
        .with_context(|| format!("{name} could not be started"))?;
    let _listed = Listed::new(Living::Process(pid_of(&child)));
    Ok(child.wait()?)
}

/// The workstation's processors that each have a child to themselves, once for each of these.
static TAKEN: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// One of the workstation's processors, for all threads of a child. Another child gets another one while
/// there are enough.
struct Processor(usize);

impl Processor {
    /// One of those that `allowed` has; `None`: it has none. Among equals the one that we run on, to which the system
    /// has not given other work just now: children of other programs are not known here.
    fn take(allowed: &CpuSet) -> Option<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let children = |cpu| taken.iter().filter(|other| **other == cpu).count();
        let here = sched_getcpu().ok();
        let cpu = (0..CpuSet::count())
            .filter(|&cpu| allowed.is_set(cpu).unwrap_or(false))
            .min_by_key(|&cpu| (children(cpu), Some(cpu) != here))?;
        taken.push(cpu);
        Some(Processor(cpu))
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = taken.iter().position(|cpu| *cpu == self.0) {
            taken.swap_remove(index);
        }
    }
}

/// A child in a process group of its own, all of it ended when dropped.
pub struct Guarded {
    child: Child,
    _listed: Listed,
    _processor: Option<Processor>,
}

impl Guarded {
    /// Starts the command, best made by [`dies_with_us`].
    ///
    /// # Errors
    /// It could not be started.
    pub fn spawn(command: Command) -> anyhow::Result<Self> {
        Self::start(command, None)
    }

    fn start(mut command: Command, processor: Option<Processor>) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("{name} could not be started"))?;
        let group = Living::Group(pid_of(&child));
        Ok(Guarded {
            child,
            _listed: Listed::new(group),
            _processor: processor,
        })
    }

    /// As [`Guarded::spawn`], and all threads of the child share one of the workstation's processors.
    ///
    /// # Errors
    /// It could not be started, or the system does not let us choose processors.
    pub fn spawn_on_one_processor(command: Command) -> anyhow::Result<Self> {
        let this_thread = Pid::from_raw(0);
        let allowed = sched_getaffinity(this_thread).context("which processors are ours")?;
        let processor = Processor::take(&allowed).context("no processor is ours")?;
        let mut one = CpuSet::new();
        one.set(processor.0)?;
        // A child has the processors of the thread that starts it.
        sched_setaffinity(this_thread, &one).context("choosing a processor")?;
        let child = Self::start(command, Some(processor));
        sched_setaffinity(this_thread, &allowed).context("having all processors again")?;
        child
    }

    /// The child, to take its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its status if it has ended.
    ///
    /// # Errors
    /// The system refused to tell.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end, at most so long.
    ///
    /// # Errors
    /// The system refused to tell.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if started.elapsed() >= timeout {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it and all that it started.
    pub fn kill(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            Living::Group(pid_of(&self.child)).end();
            // It was just killed; waiting only collects it.
            let _ = self.child.wait();
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command that the system kills should xtask be killed, where `setpriv` is there to ask
/// for it. For [`Guarded::spawn`].
pub fn dies_with_us(program: impl AsRef<OsStr>) -> Command {
    let Some(setpriv) = find_program("setpriv") else {
        return Command::new(program);
    };
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// The last lines of a text, each ended.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .flat_map(|line| [line, "\n"])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_quoted() {
        let error = output_of(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }

    #[test]
    fn a_guarded_child_and_its_children_end_with_the_guard() {
        let mut command = dies_with_us("sh");
        command
            .args(["-c", "sleep 600 & echo $!; wait"])
            .stdout(Stdio::piped());
        let mut guarded = Guarded::spawn(command).unwrap();
        let mut line = [0; 16];
        let read = guarded
            .child()
            .stdout
            .as_mut()
            .unwrap()
            .read(&mut line)
            .unwrap();
        let grandchild: i32 = std::str::from_utf8(&line[..read])
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        drop(guarded);
        let deadline = Instant::now() + Duration::from_secs(5);
        // Once killed it is a zombie of whoever inherited it, or gone.
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{grandchild}/stat"));
            if stat.map_or(true, |s| s.contains(") Z ")) {
                break;
            }
            assert!(Instant::now() < deadline, "grandchild still runs");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn children_on_one_processor_each_have_their_own() {
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let ours = |set: &CpuSet| {
            (0..CpuSet::count())
                .filter(|&cpu| set.is_set(cpu).unwrap())
                .count()
        };
        let children: Vec<_> = (0..2)
            .map(|_| {
                let mut command = dies_with_us("sleep");
                command.arg("600");
                Guarded::spawn_on_one_processor(command).unwrap()
            })
            .collect();
        let theirs: Vec<_> = children
            .iter()
            .map(|child| sched_getaffinity(pid_of(&child.child)).unwrap())
            .collect();
        assert!(theirs.iter().all(|set| ours(set) == 1));
        assert_eq!(theirs[0] != theirs[1], ours(&before) > 1);
        assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), before);
        drop(children);
        assert!(TAKEN.lock().unwrap().is_empty());
    }

    #[test]
    fn last_lines_of_a_short_text_are_all() {
        assert_eq!(last_lines("a\nb", 5), "a\nb\n");
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc\n");
    }
}
