//! A door that talks to itself: every verb for VMs, what must be refused, and a thousand VMs that come and go.
//!
//! The self-test's word is `lifecycle`. The configuration has the VM `button`, which shuts down when its power
//! button is pressed, the VM `deaf`, which listens to nothing, the VMs `unfed`, `held`, `cut`, `shocked` and `noted`,
//! which stop feeding their watchdogs, each of which does something else, and the file `stub`. None starts with the host.
//! Each step is one line, `selftest ok NAME: ..` or `selftest FAILED NAME: REASON`; the last one powers off.

mod memory;

use alloc::{
    boxed::Box,
    collections::VecDeque,
    format,
    string::{String, ToString},
};
use core::sync::atomic::{AtomicBool, Ordering};

use manage::{
    command::{
        Answer, Failure, FailureCode, MAX_STOP_TIMEOUT_S, Operate, Request, VmDetails, VmState,
    },
    config::MAX_VMS,
};

use crate::{console, doors, info, percpu, sync::Lock, time};

/// How long a VM may take to come to a state, in seconds of the host's clock. Emulators are slow.
const PATIENCE_S: u64 = 120;

/// How often the script looks whether it can go on, in microseconds.
const LOOK_EVERY_US: u64 = 1_000;

static ON: AtomicBool = AtomicBool::new(false);
static SCRIPT: Lock<Option<Script>> = Lock::new(None);

/// What a step did.
enum Outcome {
    /// It is not over: do it again.
    Wait,
    /// It is over, with a remark.
    Done(String),
    /// It is over, and nobody need know.
    Silent,
}

type Step = Box<dyn FnMut(&dyn Operate) -> Result<Outcome, String> + Send>;

struct Script {
    steps: VecDeque<(String, Step)>,
    /// Since when the first step is tried, in nanoseconds.
    since: u64,
}

/// Has the door talk once the VMs run.
pub fn prepare() {
    *SCRIPT.lock() = Some(Script {
        steps: script(),
        since: 0,
    });
    ON.store(true, Ordering::Release);
    doors::ring();
}

/// Does a piece of the script.
pub fn serve(operate: &dyn Operate) {
    if !ON.load(Ordering::Acquire) {
        return;
    }
    let mut script = SCRIPT.lock().take();
    if let Some(script) = &mut script {
        script.go_on(operate);
    }
    *SCRIPT.lock() = script;
    // Halted meanwhile, so that an emulator that runs one processor at a time gets to the others.
    doors::ring_at(time::now_tsc() + time::us_to_ticks(LOOK_EVERY_US));
}

impl Script {
    fn go_on(&mut self, operate: &dyn Operate) {
        let Some((name, step)) = self.steps.front_mut() else {
            return;
        };
        let now = time::ns();
        if self.since == 0 {
            self.since = now;
        }
        let line = match step(operate) {
            Ok(Outcome::Wait) if now - self.since < PATIENCE_S * 1_000_000_000 => return,
            Ok(Outcome::Wait) => format!("selftest FAILED {name}: it took too long"),
            Ok(Outcome::Silent) => String::new(),
            Ok(Outcome::Done(remark)) => format!("selftest ok {name}: {remark}"),
            Err(why) => format!("selftest FAILED {name}: {why}"),
        };
        if !line.is_empty() {
            info!("{line}");
            console::host_line(line.as_bytes());
        }
        self.steps.pop_front();
        self.since = 0;
    }
}

/// A VM that halts for good.
fn vm_config(name: &str, memory: &str) -> Request {
    vm_that(name, memory, "halt")
}

/// A VM whose guest ends so, at once.
fn vm_that(name: &str, memory: &str, end: &str) -> Request {
    Request::VmCreate {
        config: format!(
            "[[vm]]\nname = \"{name}\"\nmemory = \"{memory}\"\nconsole = false\n\
             boot = {{ kernel = \"stub\", cmdline = \"checks=none facts=off end={end}\" }}\n"
        ),
    }
}

fn start(vm: &str) -> Request {
    Request::VmStart { vm: vm.to_string() }
}

fn stop(vm: &str, timeout_s: u32) -> Request {
    Request::VmStop {
        vm: vm.to_string(),
        timeout_s: Some(timeout_s),
    }
}

fn destroy(vm: &str, force: bool) -> Request {
    Request::VmDestroy {
        vm: vm.to_string(),
        force,
    }
}

fn look(operate: &dyn Operate, vm: &str) -> Result<VmDetails, Failure> {
    match operate.operate(&Request::VmShow { vm: vm.to_string() })? {
        Answer::Vm { vm } => Ok(vm),
        other => Err(Failure::new(FailureCode::Internal, format!("{other:?}"))),
    }
}

fn words(failure: &Failure) -> String {
    format!("{:?}: {}", failure.code, failure.message)
}

/// Whether a VM that was started runs.
fn runs(operate: &dyn Operate, vm: &str) -> Result<bool, String> {
    let vm = look(operate, vm).map_err(|failure| words(&failure))?;
    match vm.summary.state {
        VmState::Running => Ok(true),
        VmState::Starting => Ok(false),
        state => Err(format!("{state:?} {:?}", vm.summary.last_end)),
    }
}

/// It is done.
fn fine(request: Request) -> Step {
    Box::new(move |operate| match operate.operate(&request) {
        Ok(Answer::Done { text }) => Ok(Outcome::Done(text)),
        Ok(other) => Err(format!("{other:?}")),
        Err(failure) => Err(words(&failure)),
    })
}

/// It is refused for this reason.
fn refused(request: Request, code: FailureCode) -> Step {
    Box::new(move |operate| match operate.operate(&request) {
        Err(failure) if failure.code == code => Ok(Outcome::Done(words(&failure))),
        Err(failure) => Err(words(&failure)),
        Ok(answer) => Err(format!("{answer:?}")),
    })
}

/// The VM comes to this state.
fn comes_to(vm: &'static str, state: VmState) -> Step {
    Box::new(move |operate| match look(operate, vm) {
        Ok(details) if details.summary.state == state => {
            let end = details.summary.last_end.unwrap_or_default();
            Ok(Outcome::Done(format!("{state:?} {end}")))
        }
        Ok(_) => Ok(Outcome::Wait),
        Err(failure) => Err(words(&failure)),
    })
}

/// A VM that ignores its power button, and will not feed its watchdog for long, is told to stop before that pauses it. Where this
/// script comes too late it is reset.
fn stops_before_its_watchdog(vm: &'static str) -> Step {
    Box::new(move |operate| {
        let reset = Request::VmReset { vm: vm.to_string() };
        let request = match look(operate, vm).map(|vm| vm.summary.state) {
            Ok(VmState::Running) => stop(vm, MAX_STOP_TIMEOUT_S),
            Ok(VmState::Paused) => reset,
            Ok(VmState::Starting | VmState::Ending) => return Ok(Outcome::Wait),
            Ok(other) => return Err(format!("{other:?}")),
            Err(failure) => return Err(words(&failure)),
        };
        match (operate.operate(&request), &request) {
            (Ok(Answer::Done { text }), Request::VmStop { .. }) => Ok(Outcome::Done(text)),
            (Ok(_), _) => Ok(Outcome::Wait),
            // It was paused between the two.
            (Err(failure), _) if failure.code == FailureCode::WrongState => Ok(Outcome::Wait),
            (Err(failure), _) => Err(words(&failure)),
        }
    })
}

/// The VM's first vCPU exits so often for this reason.
fn exits(vm: &'static str, kind: &'static str) -> Step {
    Box::new(move |operate| {
        let details = look(operate, vm).map_err(|failure| words(&failure))?;
        let exits = details.vcpu.first().map(|vcpu| &vcpu.exits);
        let count = exits.and_then(|exits| exits.iter().find(|(name, _)| name == kind));
        Ok(match count {
            Some((_, count)) => Outcome::Done(format!("{count} exits by {kind}")),
            None => Outcome::Wait,
        })
    })
}

/// Nothing of the VM runs for a while: its exits stay as they are.
fn stands_still(vm: &'static str) -> Step {
    const WHILE_NS: u64 = 300_000_000;
    let mut seen = None;
    let mut since = 0;
    Box::new(move |operate| {
        let details = look(operate, vm).map_err(|failure| words(&failure))?;
        let exits = details.vcpu.first().map(|vcpu| vcpu.exits.clone());
        let now = time::ns();
        // What it did before it came to rest may show for a while.
        if seen != exits {
            (seen, since) = (exits, now);
        }
        Ok(match now - since > WHILE_NS {
            true => Outcome::Done(String::from("its exits stay as they are")),
            false => Outcome::Wait,
        })
    })
}

/// The VM has been started so often.
fn starts(vm: &'static str, wanted: u64) -> Step {
    Box::new(move |operate| match look(operate, vm) {
        Ok(details) if details.summary.starts == wanted => {
            Ok(Outcome::Done(format!("{wanted} starts")))
        }
        Ok(_) => Ok(Outcome::Wait),
        Err(failure) => Err(words(&failure)),
    })
}

/// How often a VM was seen to have run since the last look.
#[derive(Default)]
struct SeenToRun {
    times: u32,
    /// What it had run at the last look.
    run_ns: Option<u64>,
}

impl SeenToRun {
    fn look(&mut self, operate: &dyn Operate, vm: &str) -> Result<(), String> {
        let vm = look(operate, vm).map_err(|failure| words(&failure))?;
        let run_ns = Some(vm.summary.run_ns);
        self.times += u32::from(self.run_ns.is_some() && self.run_ns != run_ns);
        self.run_ns = run_ns;
        Ok(())
    }
}

/// While a VM comes or goes another one runs on, where one processor has to do both. Where there are several nothing is
/// asked for: an emulator may run them in turn, for longer than it takes. Ends when the VM is running, or is there no more.
fn runs_meanwhile(comes_or_goes: &'static str, runs: &'static str) -> Step {
    /// So often it was seen to have run.
    const TIMES: u32 = 20;
    let mut seen = SeenToRun::default();
    Box::new(move |operate| {
        let state = look(operate, comes_or_goes).map(|vm| vm.summary.state);
        match state {
            Ok(VmState::Starting | VmState::Ending) => {
                seen.look(operate, runs)?;
                Ok(Outcome::Wait)
            }
            Ok(VmState::Running) | Err(_) => {
                let remark = format!("{runs} was seen to run {} times", seen.times);
                match seen.times >= TIMES || percpu::count() > 1 {
                    true => Ok(Outcome::Done(remark)),
                    false => Err(remark),
                }
            }
            Ok(other) => Err(format!("{other:?}")),
        }
    })
}

/// There is no such VM any more.
fn goes(vm: &'static str) -> Step {
    Box::new(move |operate| match look(operate, vm) {
        Err(failure) if failure.code == FailureCode::NotFound => Ok(Outcome::Done(failure.message)),
        Err(failure) => Err(words(&failure)),
        Ok(_) => Ok(Outcome::Wait),
    })
}

/// As many VMs as there can be, and one more; then the new ones go.
fn too_many() -> Step {
    Box::new(|operate| {
        let before = operate.vm_names();
        for n in before.len()..MAX_VMS {
            let request = vm_config(&format!("many-{n}"), "4M");
            operate
                .operate(&request)
                .map_err(|failure| words(&failure))?;
        }
        let one_more = operate.operate(&vm_config("one-more", "4M"));
        for name in operate.vm_names() {
            if !before.contains(&name) {
                let request = destroy(&name, false);
                operate
                    .operate(&request)
                    .map_err(|failure| words(&failure))?;
            }
        }
        match one_more {
            Err(failure) if failure.code == FailureCode::NoRoom => {
                Ok(Outcome::Done(words(&failure)))
            }
            other => Err(format!("{other:?}")),
        }
    })
}

/// So many VMs there are.
fn count(wanted: usize) -> Step {
    Box::new(move |operate| match operate.vm_names().len() {
        count if count == wanted => Ok(Outcome::Silent),
        _ => Ok(Outcome::Wait),
    })
}

/// What is done, in this order.
fn script() -> VecDeque<(String, Step)> {
    use FailureCode::{BadRequest, Exists, NoRoom, NotFound, WrongState};
    let named = |request: fn(String) -> Request, vm: &str| request(String::from(vm));
    let pause = |vm: &str| named(|vm| Request::VmPause { vm }, vm);
    let resume = |vm: &str| named(|vm| Request::VmResume { vm }, vm);
    let reset = |vm: &str| named(|vm| Request::VmReset { vm }, vm);
    let nmi = |vcpu| Request::InjectNmi {
        vm: String::from("button"),
        vcpu: Some(vcpu),
    };
    let steps: [(&str, Step); 85] = [
        ("rounds", memory::rounds()),
        ("memory-short", memory::memory_short()),
        ("create", fine(vm_config("new", "4M"))),
        ("create-again", refused(vm_config("new", "4M"), Exists)),
        (
            "create-nothing",
            refused(
                Request::VmCreate {
                    config: String::new(),
                },
                BadRequest,
            ),
        ),
        (
            "create-bad-name",
            refused(vm_config("no name", "4M"), BadRequest),
        ),
        ("create-huge", refused(vm_config("huge", "1T"), NoRoom)),
        ("too-many", too_many()),
        ("back-to-eight", count(8)),
        ("unknown", refused(start("nobody"), NotFound)),
        ("destroy", fine(destroy("new", false))),
        ("destroyed", goes("new")),
        ("destroy-again", refused(destroy("new", false), NotFound)),
        ("off-stop", refused(stop("button", 5), WrongState)),
        ("off-pause", refused(pause("button"), WrongState)),
        ("off-resume", refused(resume("button"), WrongState)),
        ("off-reset", refused(reset("button"), WrongState)),
        ("off-nmi", refused(nmi(0), WrongState)),
        ("start", fine(start("button"))),
        ("start-again", refused(start("button"), WrongState)),
        ("running", comes_to("button", VmState::Running)),
        ("waits", exits("button", "halt")),
        ("nmi", fine(nmi(0))),
        ("nmi-nobody", refused(nmi(7), NotFound)),
        ("running-resume", refused(resume("button"), WrongState)),
        (
            "running-destroy",
            refused(destroy("button", false), WrongState),
        ),
        ("pause", fine(pause("button"))),
        ("pause-again", refused(pause("button"), WrongState)),
        ("paused-stop", refused(stop("button", 5), WrongState)),
        ("resume", fine(resume("button"))),
        ("reset", fine(reset("button"))),
        ("running-again", comes_to("button", VmState::Running)),
        ("stop", fine(stop("button", 100))),
        ("stopping-pause", refused(pause("button"), WrongState)),
        ("shuts-down", comes_to("button", VmState::Off)),
        ("create-spinner", fine(vm_that("spinner", "32M", "spin"))),
        ("start-spinner", fine(start("spinner"))),
        ("spinner-runs", comes_to("spinner", VmState::Running)),
        ("create-large", fine(vm_config("large", "64M"))),
        ("start-large", fine(start("large"))),
        ("runs-while-made", runs_meanwhile("large", "spinner")),
        ("destroy-large", fine(destroy("large", true))),
        ("runs-while-zeroed", runs_meanwhile("large", "spinner")),
        ("start-fails", memory::start_fails("spinner")),
        ("pause-spinner", fine(pause("spinner"))),
        ("spinner-stands-still", stands_still("spinner")),
        ("resume-spinner", fine(resume("spinner"))),
        ("destroy-spinner", fine(destroy("spinner", true))),
        ("start-deaf", fine(start("deaf"))),
        ("deaf-runs", comes_to("deaf", VmState::Running)),
        ("stop-deaf", fine(stop("deaf", 1))),
        ("too-long", refused(stop("deaf", 4_000), BadRequest)),
        ("forced-off", comes_to("deaf", VmState::Off)),
        ("start-and-stop", fine(start("deaf"))),
        ("called-off", fine(stop("deaf", 0))),
        ("called-off-again", refused(stop("deaf", 0), WrongState)),
        ("wanted-again", fine(start("deaf"))),
        ("it-runs", comes_to("deaf", VmState::Running)),
        ("paused", fine(pause("deaf"))),
        ("force-paused", fine(stop("deaf", 0))),
        ("start-while-ending", fine(start("deaf"))),
        ("it-runs-again", comes_to("deaf", VmState::Running)),
        ("deaf-goes", fine(destroy("deaf", true))),
        ("start-unfed", fine(start("unfed"))),
        ("reset-by-watchdog", starts("unfed", 2)),
        ("saw-it-and-powered-off", comes_to("unfed", VmState::Off)),
        ("start-held", fine(start("held"))),
        ("paused-by-watchdog", comes_to("held", VmState::Paused)),
        ("held-pause", refused(pause("held"), WrongState)),
        ("held-resume", fine(resume("held"))),
        ("held-reset", fine(reset("held"))),
        ("held-stop", stops_before_its_watchdog("held")),
        (
            "paused-while-it-shuts-down",
            comes_to("held", VmState::Paused),
        ),
        ("held-stop-again", refused(stop("held", 5), WrongState)),
        ("held-resume-again", fine(resume("held"))),
        ("held-shuts-down", comes_to("held", VmState::Stopping)),
        ("held-force", fine(stop("held", 0))),
        ("held-off", comes_to("held", VmState::Off)),
        ("start-cut", fine(start("cut"))),
        ("cut-by-watchdog", comes_to("cut", VmState::Off)),
        ("start-shocked", fine(start("shocked"))),
        ("saw-an-nmi", comes_to("shocked", VmState::Off)),
        ("start-noted", fine(start("noted"))),
        ("saw-nothing", comes_to("noted", VmState::Off)),
        ("power-off", fine(Request::HostPowerOff {})),
    ];
    steps
        .into_iter()
        .map(|(name, step)| (String::from(name), step))
        .collect()
}
