//! Steps that count the host's memory: what comes must leave nothing behind when it has gone, nor when it could not come.

use alloc::{
    boxed::Box,
    format,
    string::{String, ToString},
    vec::Vec,
};

use drivers::power::Emulator;
use manage::{
    command::{Answer, FailureCode, Operate, PoolDetails, Request, SchedChange, VmState},
    config::{DEFAULT_POOL, MAX_VMS},
};
use mem::Owner;
use sched::PolicyKind;

use super::{
    Outcome, SeenToRun, Step, destroy, look, runs, start, stop, vm_config, vm_that, words,
};
use crate::{memory, percpu, power, time};

/// Rounds that bring the host's own structures to the size that they keep, and rounds that must change nothing.
const WARM_UP: u32 = 8;
const ROUNDS: u32 = 1_000;
/// In Bochs, where a round takes five times as long.
const ROUNDS_IN_BOCHS: u32 = 250;

/// What the host has given away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    free_frames: u64,
    host_frames: u64,
    vm_frames: u64,
    heap_bytes: usize,
}

impl Used {
    /// Whether it is the same, even if the heap, which never shrinks, has become larger.
    fn is_same_but_for_heap_size(&self, other: &Used) -> bool {
        let frames = |used: &Used| (used.free_frames + used.host_frames, used.vm_frames);
        frames(self) == frames(other) && self.heap_bytes == other.heap_bytes
    }

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

/// Looks until the host is at rest: what is not listed any more may still be on its way.
#[derive(Default)]
struct Rest {
    used: Used,
    looks: u32,
}

impl Rest {
    /// So often in a row the same was seen.
    const LOOKS: u32 = 20;

    /// What is given away, if that was the same for long enough.
    fn reached(&mut self) -> Option<Used> {
        let used = Used::now();
        self.looks = match used == self.used {
            true => self.looks + 1,
            false => 0,
        };
        self.used = used;
        (self.looks >= Self::LOOKS).then_some(used)
    }
}

/// Waits until what was given away is as before.
#[derive(Default)]
struct Return {
    since_ns: Option<u64>,
}

impl Return {
    /// How long something may be on its way.
    const ON_ITS_WAY_NS: u64 = 20_000_000_000;

    /// Whether it is the same.
    ///
    /// # Errors
    /// It is not, and was not for as long as something may be on its way.
    fn is_complete(&mut self, before: &Used, after: &Used, same: bool) -> Result<bool, String> {
        let now = time::ns();
        let since = *self.since_ns.get_or_insert(now);
        match same || now - since < Self::ON_ITS_WAY_NS {
            true => Ok(same),
            false => Err(format!("before {before:?}, after {after:?}")),
        }
    }
}

/// VMs come, start, and go while they run.
pub(super) fn rounds() -> Step {
    #[derive(Clone, Copy)]
    enum At {
        Create,
        Start,
        Going,
    }
    let mut at = At::Create;
    let mut round = 0;
    let mut rest = Rest::default();
    let mut back = Return::default();
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
                let same = before == after && after.vm_frames == 0;
                if back.is_complete(&before, &after, same)? {
                    let remark = format!("{rounds} rounds: before {before:?}, after {after:?}");
                    return Ok(Outcome::Done(remark));
                }
            }
            At::Create => {
                if round == WARM_UP {
                    match rest.reached() {
                        Some(used) => before = used,
                        None => return Ok(Outcome::Wait),
                    }
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
pub(super) fn memory_short() -> Step {
    /// Left at least, and less than 2 MiB more, since RAM comes in such steps: enough for one more VM of 4 MiB with what it needs beside
    /// its RAM, not for two, even though 384 KiB of each one's 4 MiB are a hole and take nothing.
    const LEFT: u64 = 5 << 20;
    /// So often it was seen to wait before it starts again.
    const WAITS: u32 = 2;
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
    let mut back = Return::default();
    Box::new(move |operate| {
        let ask = |request: &Request| {
            let answer = operate.operate(request);
            answer.map_err(|failure| words(&failure))
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
                if runs(operate, "most")? {
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
                if !runs(operate, "late")? {
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
                if operate.vm_names().len() > names || after.vm_frames > 0 {
                    return Ok(Outcome::Wait);
                }
                let same = before.is_same_but_for_heap_size(&after);
                if back.is_complete(&before, &after, same)? {
                    let remark = format!("before {before:?}, after {after:?}");
                    return Ok(Outcome::Done(remark));
                }
            }
        }
        Ok(Outcome::Wait)
    })
}

/// The pool, of which all processors are.
fn pool(operate: &dyn Operate) -> Result<PoolDetails, String> {
    match operate.operate(&Request::SchedShow {}) {
        Ok(Answer::Sched { sched }) => sched
            .pools
            .into_iter()
            .next()
            .ok_or_else(|| String::from("there is no pool")),
        other => Err(format!("{other:?}")),
    }
}

fn set_policy(policy: &str) -> Request {
    Request::PoolSet {
        pool: DEFAULT_POOL.to_string(),
        policy: Some(policy.to_string()),
        slice_us: None,
    }
}

/// Whether a VM's first vCPU has halted.
fn has_halted(operate: &dyn Operate, vm: &str) -> Result<bool, String> {
    let vm = look(operate, vm).map_err(|failure| words(&failure))?;
    let mut exits = vm.vcpu.iter().take(1).flat_map(|vcpu| &vcpu.exits);
    Ok(exits.any(|(name, _)| name == "halt"))
}

/// So many percent of the first processor are reserved for each of a VM's vCPUs.
fn reserve(vm: &str, percent: u64) -> Request {
    const PERIOD_US: u64 = 100_000;
    Request::SchedSet {
        vm: vm.to_string(),
        change: SchedChange {
            affinity: Some(Vec::from([0])),
            reservation_us: Some((PERIOD_US / 100 * percent, PERIOD_US)),
            ..SchedChange::default()
        },
    }
}

/// A VM with two vCPUs cannot start when it has its memory, tables and the first of them: another VM's reservation leaves no room for the
/// second one's. Each time all that it had goes back, in pieces, while `beside` runs on the last processor: frames and heap are as they were
/// after the last such start, to the byte, and so is what is reserved. When the other one has gone, it starts. On a host with one processor, where nothing
/// else happens while the script looks; with several the step is left out.
pub(super) fn start_fails(beside: &'static str) -> Step {
    const HOLDER: &str = "holder";
    const WIDE: &str = "wide";
    const REASON: &str =
        "cannot start: a reservation of 30.0 % of a processor is more than any has left";
    /// Starts that fail, after a first one.
    const TIMES: u32 = 2;
    #[derive(Clone, Copy)]
    enum At {
        Pin,
        Rest,
        Held,
        Made,
        Down,
        Fails,
        Room,
        Works,
        Gone,
        Back,
    }
    let mut at = At::Pin;
    let mut rest = Rest::default();
    let mut back = Return::default();
    let mut seen = SeenToRun::default();
    let mut times_made = 0;
    let mut times_failed = 0;
    let mut fails = 0;
    // Before the step, before the first start that fails, and after it.
    let [mut before, mut off, mut failed] = [Used::default(); 3];
    let mut pool_before = None;
    let mut pool_held = None;
    Box::new(move |operate| {
        let ask = |request: &Request| {
            let answer = operate.operate(request);
            answer.map_err(|failure| words(&failure))
        };
        match at {
            At::Pin if percpu::count() > 1 => return Ok(Outcome::Silent),
            At::Pin => {
                // One that waits and could run elsewhere takes some of the heap for that.
                ask(&Request::SchedSet {
                    vm: beside.to_string(),
                    change: SchedChange {
                        affinity: Some(Vec::from([percpu::count() as u32 - 1])),
                        ..SchedChange::default()
                    },
                })?;
                at = At::Rest;
            }
            At::Rest => {
                let Some(used) = rest.reached() else {
                    return Ok(Outcome::Wait);
                };
                before = used;
                pool_before = Some(pool(operate)?);
                ask(&set_policy(PolicyKind::Reservation.name()))?;
                ask(&vm_config(HOLDER, "4M"))?;
                ask(&reserve(HOLDER, 60))?;
                ask(&start(HOLDER))?;
                at = At::Held;
            }
            At::Held => {
                // Until its guest has come to its end it would run instead of the other one.
                if runs(operate, HOLDER)? && has_halted(operate, HOLDER)? {
                    let config = format!(
                        "[[vm]]\nname = \"{WIDE}\"\nvcpus = 2\nmemory = \"32M\"\nconsole = false\n\
                         boot = {{ kernel = \"stub\", cmdline = \"checks=none facts=off end=halt\" }}\n"
                    );
                    ask(&Request::VmCreate { config })?;
                    ask(&start(WIDE))?;
                    at = At::Made;
                }
            }
            At::Made => {
                seen.look(operate, beside)?;
                if runs(operate, WIDE)? {
                    times_made = seen.times;
                    ask(&stop(WIDE, 0))?;
                    at = At::Down;
                }
            }
            At::Down => {
                let wide = look(operate, WIDE).map_err(|failure| words(&failure))?;
                if wide.summary.state != VmState::Off {
                    return Ok(Outcome::Wait);
                }
                if let Some(used) = rest.reached() {
                    off = used;
                    pool_held = Some(pool(operate)?);
                    ask(&reserve(WIDE, 30))?;
                    ask(&start(WIDE))?;
                    seen = SeenToRun::default();
                    at = At::Fails;
                }
            }
            At::Fails => {
                let wide = look(operate, WIDE).map_err(|failure| words(&failure))?;
                let end = wide.summary.last_end.unwrap_or_default();
                match wide.summary.state {
                    VmState::Starting => {
                        seen.look(operate, beside)?;
                        return Ok(Outcome::Wait);
                    }
                    VmState::Off if end.starts_with(REASON) => {}
                    state => return Err(format!("{state:?} {end}")),
                }
                if fails == 0 {
                    // Its last end has other words now, which are on the heap.
                    match rest.reached() {
                        Some(used) => failed = used,
                        None => return Ok(Outcome::Wait),
                    }
                    let frames = |used: Used| Used {
                        heap_bytes: 0,
                        ..used
                    };
                    if frames(off) != frames(failed) {
                        return Err(format!("before {off:?}, after {failed:?}"));
                    }
                } else {
                    let after = Used::now();
                    if !back.is_complete(&failed, &after, failed == after)? {
                        return Ok(Outcome::Wait);
                    }
                    back = Return::default();
                }
                let pool = pool(operate)?;
                if Some(&pool) != pool_held.as_ref() {
                    return Err(format!("before {pool_held:?}, after {pool:?}"));
                }
                times_failed = seen.times;
                // Its memory is zeroed twice, of which making it is the first time.
                if percpu::count() == 1 && times_failed * 2 < times_made * 3 {
                    return Err(format!(
                        "{beside} was seen to run {times_made} times while {WIDE} was made, and {times_failed} times while it could not be"
                    ));
                }
                fails += 1;
                seen = SeenToRun::default();
                if fails > TIMES {
                    ask(&destroy(HOLDER, true))?;
                    at = At::Room;
                } else {
                    ask(&start(WIDE))?;
                }
            }
            At::Room => {
                if look(operate, HOLDER).is_err() {
                    ask(&start(WIDE))?;
                    at = At::Works;
                }
            }
            At::Works => {
                if runs(operate, WIDE)? {
                    ask(&destroy(WIDE, true))?;
                    at = At::Gone;
                }
            }
            At::Gone => {
                if look(operate, WIDE).is_err() {
                    // They take memory, too.
                    let pools = (pool_before.take(), pool_held.take());
                    let policy = pools.0.map(|pool| pool.policy);
                    ask(&set_policy(&policy.unwrap_or_default()))?;
                    at = At::Back;
                }
            }
            At::Back => {
                let after = Used::now();
                let same = before.is_same_but_for_heap_size(&after);
                if back.is_complete(&before, &after, same)? {
                    return Ok(Outcome::Done(format!(
                        "{REASON}; {fails} times; {beside} was seen to run {times_made} times while {WIDE} was made, \
                         {times_failed} times while it could not be; before {before:?}, after {after:?}"
                    )));
                }
            }
        }
        Ok(Outcome::Wait)
    })
}
