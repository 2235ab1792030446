//! A door that talks to itself: every verb for VMs, what must be refused, and a thousand VMs that come and go.
//!
//! The self-test's word is `lifecycle`. The configuration has the VM `button`, which shuts down when its power
//! button is pressed, the VM `deaf`, which listens to nothing, the VMs `unfed`, `held`, `cut`, `shocked` and `noted`,
//! which stop feeding their watchdogs, each of which does something else, and the file `stub`. None starts with the host.
//! Each step is one line, `selftest ok NAME: ..` or `selftest FAILED NAME: REASON`; the last one powers off.

use alloc::{
    boxed::Box,
    collections::VecDeque,
    format,
    string::{String, ToString},
};
use core::sync::atomic::{AtomicBool, Ordering};

use drivers::power::Emulator;
use manage::{
    command::{
        Answer, Failure, FailureCode, MAX_STOP_TIMEOUT_S, Operate, Request, VmDetails, VmState,
    },
    config::MAX_VMS,
};
use mem::Owner;

use crate::{console, doors, info, memory, percpu, power, sync::Lock, time};

/// Rounds that bring the host's own structures to the size that they keep, and rounds that must change nothing.
const WARM_UP: u32 = 8;
const ROUNDS: u32 = 1_000;
/// In Bochs, where a round takes five times as long.
const ROUNDS_IN_BOCHS: u32 = 250;
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

/// What the host has given away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    free_frames: u64,
    host_frames: u64,
    vm_frames: u64,
    heap_bytes: usize,
}

impl Used {
    fn now() -> Self {
        let vms = 1..Owner::MAX_VMS;
        Used {
            free_frames: memory::HOST.statistics().free,
            host_frames: memory::HOST.used(Owner::Host),
            vm_frames: vms
                .flat_map(|n| [Owner::VmRam(n), Owner::VmTables(n), Owner::VmDisks(n)])
                .map(|owner| memory::HOST.used(owner))
                .sum(),
            heap_bytes: memory::heap_used(),
        }
    }
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

/// While a VM comes or goes another one runs on, where one processor has to do both. Where there are several nothing is
/// asked for: an emulator may run them in turn, for longer than it takes. Ends when the VM is running, or is there no more.
fn runs_meanwhile(comes_or_goes: &'static str, runs: &'static str) -> Step {
    /// So often it was seen to have run since the last look.
    const TIMES: u32 = 20;
    let mut times = 0;
    let mut seen = None;
    Box::new(move |operate| {
        let state = look(operate, comes_or_goes).map(|vm| vm.summary.state);
        match state {
            Ok(VmState::Starting | VmState::Ending) => {
                let vm = look(operate, runs).map_err(|failure| words(&failure))?;
                let run_ns = Some(vm.summary.run_ns);
                times += u32::from(seen.is_some() && seen != run_ns);
                seen = run_ns;
                Ok(Outcome::Wait)
            }
            Ok(VmState::Running) | Err(_) => {
                let remark = format!("{runs} was seen to run {times} times");
                match times >= TIMES || percpu::count() > 1 {
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

/// VMs come, start, and go while they run.
fn rounds() -> Step {
    #[derive(Clone, Copy)]
    enum At {
        Create,
        Start,
        Going,
    }
    let mut at = At::Create;
    let mut round = 0;
    let mut before = Used::default();
    let rounds = match power::emulator() {
        Some(Emulator::Bochs) => ROUNDS_IN_BOCHS,
        _ => ROUNDS,
    };
    Box::new(move |operate| {
        let ask = |request: &Request| {
            let answer = operate.operate(request);
            answer.map_err(|failure| format!("round {round}: {}", words(&failure)))
        };
        match at {
            At::Create if round == WARM_UP + rounds => {
                let after = Used::now();
                let remark = format!("{rounds} rounds: before {before:?}, after {after:?}");
                return match before == after && after.vm_frames == 0 {
                    true => Ok(Outcome::Done(remark)),
                    false => Err(remark),
                };
            }
            At::Create => {
                if round == WARM_UP {
                    before = Used::now();
                }
                ask(&vm_config("round", "4M"))?;
                ask(&start("round"))?;
                at = At::Start;
            }
            At::Start => {
                let vm = look(operate, "round").map_err(|failure| words(&failure))?;
                match vm.summary.state {
                    VmState::Starting => {}
                    VmState::Running => {
                        ask(&destroy("round", true))?;
                        at = At::Going;
                    }
                    state => {
                        return Err(format!(
                            "round {round}: {state:?} {:?}",
                            vm.summary.last_end
                        ));
                    }
                }
            }
            At::Going => {
                if look(operate, "round").is_err() {
                    round += 1;
                    at = At::Create;
                }
            }
        }
        Ok(Outcome::Wait)
    })
}

/// Nearly all memory is one VM's. Another one resets itself again and again: for a third one there is no room while that one is there,
/// is taken down, or waits for its next start. When it is stopped, the third one takes the rest, and the host goes on: as many VMs as
/// there may be are defined, and what is asked is answered. Then all go, and nothing is left of them.
fn memory_short() -> Step {
    /// Left at least, and less than 2 MiB more, since RAM comes in such steps: enough for one more VM of 4 MiB with what it needs beside
    /// its RAM, not for two, even though 384 KiB of each one's 4 MiB are a hole and take nothing.
    const LEFT: u64 = 5 << 20;
    /// So often it was seen to wait before it starts again.
    const WAITS: u32 = 2;
    const ON_ITS_WAY_NS: u64 = 20_000_000_000;
    #[derive(Clone, Copy)]
    enum At {
        Take,
        Made,
        Resets,
        Full,
        Going,
    }
    let mut at = At::Take;
    let mut seen = VmState::Off;
    let mut waits = 0;
    let mut before = Used::default();
    let mut names = 0;
    let mut gone_ns = u64::MAX;
    Box::new(move |operate| {
        let ask = |request: &Request| {
            let answer = operate.operate(request);
            answer.map_err(|failure| words(&failure))
        };
        let runs = |vm: &str| match look(operate, vm).map_err(|failure| words(&failure))? {
            vm if vm.summary.state == VmState::Running => Ok(true),
            vm if vm.summary.state == VmState::Starting => Ok(false),
            vm => Err(format!("{:?} {:?}", vm.summary.state, vm.summary.last_end)),
        };
        let has_no_memory = |vm: &str| match operate.operate(&start(vm)) {
            Err(failure)
                if failure.code == FailureCode::NoRoom
                    && failure.message.contains("of memory, and the host has") =>
            {
                Ok(())
            }
            other => Err(format!("{vm}: {other:?}")),
        };
        match at {
            At::Take => {
                before = Used::now();
                names = operate.vm_names().len();
                let mib = (before.free_frames * mem::PAGE_SIZE - LEFT) >> 20 & !1;
                ask(&vm_config("most", &format!("{mib}M")))?;
                ask(&start("most"))?;
                at = At::Made;
            }
            At::Made => {
                if runs("most")? {
                    ask(&vm_that("again", "4M", "reset"))?;
                    ask(&vm_config("late", "4M"))?;
                    ask(&start("again"))?;
                    at = At::Resets;
                }
            }
            // It has its memory, or is promised it.
            At::Resets => {
                let again = look(operate, "again").map_err(|failure| words(&failure))?;
                let state = again.summary.state;
                has_no_memory("late").map_err(|why| {
                    format!(
                        "{why}; again {state:?}; before {before:?}, now {:?}",
                        Used::now()
                    )
                })?;
                waits += u32::from(state == VmState::Waiting && seen != state);
                seen = state;
                if waits == WAITS {
                    ask(&stop("again", 0))?;
                    ask(&start("late"))?;
                    at = At::Full;
                }
            }
            At::Full => {
                if !runs("late")? {
                    return Ok(Outcome::Wait);
                }
                has_no_memory("again")?;
                // With consoles, which take more of the host's own memory.
                for n in operate.vm_names().len()..MAX_VMS {
                    let config = format!(
                        "[[vm]]\nname = \"many-{n}\"\nmemory = \"4M\"\nboot = {{ kernel = \"stub\" }}\n"
                    );
                    match operate.operate(&Request::VmCreate { config }) {
                        Ok(_) => {}
                        Err(failure) if failure.code == FailureCode::NoRoom => break,
                        Err(failure) => return Err(words(&failure)),
                    }
                }
                ask(&Request::Stats { vm: None })?;
                ask(&Request::SchedShow {})?;
                for name in operate.vm_names().into_iter().skip(names) {
                    ask(&destroy(&name, true))?;
                }
                at = At::Going;
            }
            At::Going => {
                let after = Used::now();
                let all = |used: &Used| used.free_frames + used.host_frames;
                if operate.vm_names().len() > names || after.vm_frames > 0 {
                    return Ok(Outcome::Wait);
                }
                let remark = format!("before {before:?}, after {after:?}");
                let same = all(&before) == all(&after) && before.heap_bytes == after.heap_bytes;
                let now = time::ns();
                gone_ns = gone_ns.min(now);
                return match same {
                    true => Ok(Outcome::Done(remark)),
                    // What is not listed any more may still be on its way.
                    false if now - gone_ns < ON_ITS_WAY_NS => Ok(Outcome::Wait),
                    false => Err(remark),
                };
            }
        }
        Ok(Outcome::Wait)
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
    let steps: [(&str, Step); 84] = [
        ("rounds", rounds()),
        ("memory-short", memory_short()),
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
