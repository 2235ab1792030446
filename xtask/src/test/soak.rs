//! Verbs at random, from two doors at once, against guests that misbehave: no answer is lost, and nothing is left behind.
//!
//! A round has a door of the shell and one of the control channel, each with dice of its own, that ask whatever comes for the
//! same few VMs, in whatever state these are: most answers are refusals, and all of them are good ones. Meanwhile
//! the guests flood consoles, storm each other with interrupts, reset themselves and crash, and switch between consoles goes on. Then all are
//! destroyed, and the host has to be where it was before the round: frames and heap, to the byte. A guest that nobody touches answers after
//! each round, and its clock has gone as the host's.
//!
//! Which verbs a door asks for depends on the seed only; how the doors' verbs meet does not.

use std::{
    fmt::Write as _,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use manage::command::{Answer, FailureCode, HostDetails, Request, SchedChange, VmState, VmSummary};
use plinthctl::{Address, Client};
use regex::Regex;

use super::{
    rig::{DISK_IMAGE, Rig, Start, Vm},
    session::Session,
    shell::{Operator, PROMPT, TALKS, key},
    terminal::Terminal,
};
use crate::emulator::{Emulator, Machine};

/// The guest that nobody touches.
const UNTOUCHED: &str = "anchor";
/// The VMs for which the doors ask.
const NAMES: [&str; 6] = ["g0", "g1", "g2", "g3", "g4", "g5"];
/// Lines that the shell's history keeps.
const HISTORY: usize = manage::line_editor::MAX_HISTORY;
/// The clock of a guest may have begun so long before its host says that it was started.
const MADE_NS: u64 = 2_000_000_000;

/// How much there is to do.
#[derive(Clone, Copy)]
struct Amount {
    /// Rounds after the first.
    rounds: usize,
    /// Verbs of each door in a round.
    verbs: usize,
    /// Whether some of the guests are Linux.
    linux: bool,
    /// The host's processors.
    cpus: u32,
}

const SHORT: Amount = Amount {
    rounds: 2,
    verbs: 60,
    linux: false,
    cpus: 2,
};
/// In Bochs, where the second processor costs as much as the first.
const SHORTER: Amount = Amount {
    rounds: 1,
    verbs: 50,
    linux: false,
    cpus: 2,
};
const LONG: Amount = Amount {
    rounds: 30,
    verbs: 120,
    linux: true,
    cpus: 2,
};

/// What a VM is made of.
struct Recipe {
    vcpus: u32,
    /// What is not as for a stub.
    boot: Option<&'static str>,
    cmdline: &'static str,
    /// Further keys and their values, as in the configuration.
    more: &'static [(&'static str, &'static str)],
}

impl Recipe {
    const fn new(
        vcpus: u32,
        cmdline: &'static str,
        more: &'static [(&'static str, &'static str)],
    ) -> Self {
        Recipe {
            vcpus,
            boot: None,
            cmdline,
            more,
        }
    }

    /// Its section, a key in each line.
    fn config(&self, name: &str) -> String {
        let stub = "boot.kernel = \"stub\"\nmemory = \"16M\"";
        let mut text = format!(
            "[[vm]]\nname = \"{name}\"\nvcpus = {}\nboot.cmdline = \"{}\"\n{}\n",
            self.vcpus,
            self.cmdline,
            self.boot.unwrap_or(stub)
        );
        for (key, value) in self.more {
            writeln!(text, "{key} = {value}").expect("a String takes any text");
        }
        text
    }
}

/// Linux on two processors, with a disk; it comes as far as it is let.
static LINUX: Recipe = Recipe {
    boot: Some(
        "boot.kernel = \"linux-6.1-cloud\"\nboot.initrd = \"initramfs-disk\"\nmemory = \"128M\"",
    ),
    ..Recipe::new(2, "console=ttyS0", &[("disks", DISKS)])
};

/// What is there to be met: guests that do nothing, and guests that do all they can.
static RECIPES: [Recipe; 16] = [
    Recipe::new(1, "checks=none facts=off end=halt", &[]),
    Recipe::new(2, "checks=none facts=off end=spin", &[("weight", "300")]),
    Recipe::new(
        4,
        "checks=none facts=off abuse=ipi-storm,bad-ipi end=reset",
        &[],
    ),
    Recipe::new(
        3,
        "checks=none facts=off abuse=timer-flood,level-storm end=spin",
        &[],
    ),
    Recipe::new(
        1,
        "checks=none facts=off abuse=console-flood end=reset",
        &[],
    ),
    Recipe::new(
        2,
        "checks=none facts=off abuse=console-flood end=triple-fault",
        &[("restart", "\"always\"")],
    ),
    Recipe::new(
        1,
        "checks=none facts=off end=triple-fault",
        &[("restart", "\"on-failure\"")],
    ),
    Recipe::new(1, "checks=none facts=off end=button", &[]),
    Recipe::new(
        2,
        "checks=none facts=off end=unfed",
        &[("watchdog", "\"reset\"")],
    ),
    Recipe::new(
        1,
        "checks=none facts=off end=unfed",
        &[("watchdog", "\"pause\"")],
    ),
    Recipe::new(
        2,
        "checks=none facts=off end=watched-by-nmi",
        &[("watchdog", "\"nmi\"")],
    ),
    Recipe::new(
        1,
        "checks=none facts=off end=unfed",
        &[("watchdog", "\"power-off\""), ("restart", "\"on-failure\"")],
    ),
    Recipe::new(
        1,
        "checks=none facts=off abuse=disk-storm end=reset",
        &[("disks", DISKS), ("cap", "40")],
    ),
    Recipe::new(1, "checks=none facts=off abuse=task-loop end=spin", &[]),
    Recipe::new(
        2,
        "checks=none facts=off abuse=endless-string,mmio-storm end=poweroff",
        &[],
    ),
    Recipe::new(16, "checks=none facts=off abuse=ipi-storm end=halt", &[]),
];
/// A disk of [`DISK_IMAGE`].
const DISKS: &str = "[{ image = \"pattern.img\", changes = \"2M\" }]";

/// Numbers without pattern, the same for the same seed.
struct Dice {
    state: u64,
    amount: Amount,
}

impl Dice {
    /// `door` tells dice of the same seed apart.
    fn new(seed: u64, door: u64, amount: Amount) -> Self {
        // SplitMix64's increment, so that near seeds are far from each other. Never 0, from which xorshift would not come away.
        let state = (seed ^ door << 56).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Self { state, amount }
    }

    fn below(&mut self, end: usize) -> usize {
        // Xorshift64.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 16) as usize % end
    }

    fn pick<'t, T>(&mut self, from: &'t [T]) -> &'t T {
        &from[self.below(from.len())]
    }

    fn recipe(&mut self) -> &'static Recipe {
        match self.amount.linux && self.below(6) == 0 {
            true => &LINUX,
            false => self.pick(&RECIPES),
        }
    }

    /// Whatever comes, for one of the VMs.
    fn request(&mut self) -> Request {
        let vm = (*self.pick(&NAMES)).to_owned();
        match self.below(40) {
            0..=6 => Request::VmCreate {
                config: self.recipe().config(&vm),
            },
            7..=13 => Request::VmStart { vm },
            14..=16 => Request::VmStop {
                vm,
                timeout_s: Some(self.below(3) as u32),
            },
            17..=19 => Request::VmPause { vm },
            20..=22 => Request::VmResume { vm },
            23..=24 => Request::VmReset { vm },
            25..=26 => Request::VmDestroy { vm, force: true },
            27 => Request::VmDestroy { vm, force: false },
            28..=30 => Request::InjectNmi {
                vm,
                vcpu: Some(self.below(4) as u16),
            },
            31..=34 => Request::SchedSet {
                vm,
                change: self.change(),
            },
            35 => Request::TraceStart {
                exits: (self.below(2) == 0).then_some(false),
            },
            36 => Request::TraceStop {},
            37 => Request::VmShow { vm },
            38 => Request::Stats { vm: None },
            _ => Request::VmList {},
        }
    }

    fn change(&mut self) -> SchedChange {
        let mut change = SchedChange::default();
        match self.below(4) {
            0 => change.weight = Some(10 << self.below(6)),
            1 => change.cap = Some(10 * self.below(10) as u32),
            2 => change.priority = Some(self.below(8) as u8),
            _ => {
                let (all, last) = ((0..self.amount.cpus).collect(), self.amount.cpus - 1);
                change.affinity = Some(self.pick(&[vec![], vec![0], vec![last], all]).clone());
            }
        }
        change
    }
}

/// The same for the shell.
fn line(request: &Request) -> String {
    let option = |name: &str, value: &Option<String>| match value {
        Some(value) => format!(" --{name} {value}"),
        None => String::new(),
    };
    match request {
        Request::VmCreate { config } => {
            let keys = config
                .lines()
                .skip(1)
                .map(|line| line.replacen(" = ", "=", 1));
            // Of lists the shell has none.
            let keys = keys.filter(|key| !key.contains('['));
            format!("vm create {}", keys.collect::<Vec<_>>().join(" "))
        }
        Request::VmStart { vm } => format!("vm start {vm}"),
        Request::VmStop { vm, timeout_s } => {
            let seconds = timeout_s.map(|seconds| seconds.to_string());
            format!("vm stop {vm}{}", option("timeout", &seconds))
        }
        Request::VmPause { vm } => format!("vm pause {vm}"),
        Request::VmResume { vm } => format!("vm resume {vm}"),
        Request::VmReset { vm } => format!("vm reset {vm}"),
        Request::VmDestroy { vm, force: true } => format!("vm destroy {vm} --force"),
        Request::VmDestroy { vm, force: false } => format!("vm destroy {vm}"),
        Request::InjectNmi { vm, vcpu } => {
            let vcpu = vcpu.map(|vcpu| vcpu.to_string());
            format!("inject nmi {vm}{}", option("vcpu", &vcpu))
        }
        Request::SchedSet { vm, change } => {
            let affinity = change.affinity.as_ref().map(|cpus| match &cpus[..] {
                [] => "all".to_owned(),
                some => some
                    .iter()
                    .map(u32::to_string)
                    .collect::<Vec<_>>()
                    .join(","),
            });
            format!(
                "sched set {vm}{}{}{}{}",
                option("weight", &change.weight.map(|n| n.to_string())),
                option("cap", &change.cap.map(|n| n.to_string())),
                option("priority", &change.priority.map(|n| n.to_string())),
                option("affinity", &affinity)
            )
        }
        Request::TraceStart { exits: Some(false) } => "trace start --no-exits".to_owned(),
        Request::TraceStart { .. } => "trace start".to_owned(),
        Request::TraceStop {} => "trace stop".to_owned(),
        Request::VmShow { vm } => format!("vm show {vm}"),
        Request::Stats { .. } => "stats".to_owned(),
        _ => "vm list".to_owned(),
    }
}

/// The control channel, as a program has it.
pub(super) struct Program {
    client: Client,
    limit: Duration,
    /// Requests that were not refused.
    done: usize,
}

impl Program {
    /// Asks; a refusal has to be one that a sound host gives to a sound request in a state that does not allow it.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Option<Answer>> {
        let answer = self.client.ask(request);
        match answer.map_err(|error| anyhow::anyhow!("{request:?}: no answer: {error}"))? {
            Ok(answer) => {
                self.done += 1;
                Ok(Some(answer))
            }
            Err(failure) => {
                use FailureCode::{Busy, Exists, NoRoom, NotFound, WrongState};
                let expected = [Busy, Exists, NoRoom, NotFound, WrongState];
                ensure!(
                    expected.contains(&failure.code),
                    "{request:?}: {:?}: {}",
                    failure.code,
                    failure.message
                );
                Ok(None)
            }
        }
    }

    pub(super) fn vms(&mut self) -> Result<Vec<VmSummary>> {
        match self.ask(&Request::VmList {})? {
            Some(Answer::Vms { vms }) => Ok(vms),
            other => bail!("vm-list: {other:?}"),
        }
    }

    fn host(&mut self) -> Result<HostDetails> {
        match self.ask(&Request::HostShow {})? {
            Some(Answer::Host { host }) => Ok(host),
            other => bail!("host-show: {other:?}"),
        }
    }

    /// The untouched guest's time since its start.
    fn uptime_ns(&mut self) -> Result<u64> {
        let vms = self.vms()?;
        let untouched = vms.iter().find(|vm| vm.name == UNTOUCHED);
        let vm = untouched.context("there is no untouched guest any more")?;
        ensure!(
            (vm.state, vm.starts) == (VmState::Running, 1),
            "the untouched guest: {vm:?}"
        );
        Ok(vm.uptime_ns)
    }

    /// So many verbs. At the beginning there is a guest of each name; what was asked for before may have come first.
    fn round(&mut self, dice: &mut Dice, verbs: usize) -> Result<()> {
        for vm in NAMES {
            let config = dice.recipe().config(vm);
            self.ask(&Request::VmCreate { config })?;
            self.ask(&Request::VmStart { vm: vm.to_owned() })?;
        }
        for _ in 0..verbs {
            let request = dice.request();
            self.ask(&request)?;
            if let Request::TraceStart { .. } = request {
                let (pcpu, from, count) =
                    (dice.below(dice.amount.cpus as usize) as u32, 0, Some(16));
                self.ask(&Request::TraceRead { pcpu, from, count })?;
            }
        }
        Ok(())
    }

    /// Destroys all but the untouched one, whatever they are at, and waits until they are gone.
    pub(super) fn destroy_all(&mut self) -> Result<()> {
        self.ask(&Request::TraceStop {})?;
        let others = self.vms()?.into_iter().map(|vm| vm.name);
        for vm in others.filter(|vm| vm != UNTOUCHED) {
            self.ask(&Request::VmDestroy { vm, force: true })?;
        }
        let deadline = Instant::now() + self.limit;
        loop {
            let vms = self.vms()?;
            if vms.len() == 1 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "some do not go: {vms:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Free frames and heap in use, in bytes.
    pub(super) fn memory(&mut self) -> Result<(u64, u64)> {
        let host = self.host()?;
        Ok((host.memory_free_bytes, host.heap_bytes))
    }

    /// Waits until frames and heap are as before.
    pub(super) fn nothing_is_left(&mut self, before: (u64, u64)) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        loop {
            let now = self.memory()?;
            if now == before {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "free memory and heap in use were {before:?}, and are {now:?}"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Types a line, and returns what the shell says.
///
/// Bochs' serial port holds 16 bytes and forgets the rest, as a PC's does, and its processors are slow: while the host answers the other door, 16 bytes
/// come. So there the next few are typed when those before are shown.
fn says(operator: &mut Operator<'_>, line: &str, emulator: Emulator) -> Result<String> {
    const PIECE: usize = 8;
    if emulator == Emulator::Qemu {
        return operator.says(line);
    }
    let characters: Vec<char> = line.chars().collect();
    for piece in characters.chunks(PIECE) {
        operator.session.send(&String::from_iter(piece))?;
        // What is typed may be shown anew, with more before it.
        let shown = piece.iter().map(|c| regex::escape(&c.to_string()));
        let shown = shown.collect::<Vec<_>>().join("(?s:.*?)");
        operator.switches("", &shown)?;
    }
    operator.finishes("", line)
}

/// So many verbs at the shell, and looks at consoles in between.
fn shell_round(
    operator: &mut Operator<'_>,
    dice: &mut Dice,
    verbs: usize,
    emulator: Emulator,
) -> Result<()> {
    for _ in 0..verbs {
        match dice.below(8) {
            0 => {
                let keys = format!("\x1d{}", 1 + dice.below(NAMES.len() + 1));
                operator.session.send(&keys)?;
                operator.switches(key::SHELL, PROMPT)?;
            }
            1 => {
                operator.session.send(key::ALL)?;
                operator.switches(key::SHELL, PROMPT)?;
            }
            _ => {
                let line = line(&dice.request());
                let said = says(operator, &line, emulator)?;
                for wrong in ["the host failed", "bad request", "^"] {
                    ensure!(
                        !said.contains(wrong) || said.contains("there is no VM"),
                        "{line:?}: {said}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Brings the shell's own memory to where it is after any round: its history is bounded, and full of these lines.
pub(super) fn fill_history(operator: &mut Operator<'_>) -> Result<()> {
    for number in 0..HISTORY {
        operator.says(&format!("help {}", ["vm", "log"][number % 2]))?;
    }
    Ok(())
}

/// The untouched guest answers, and its clock has gone on as the host's.
pub(super) fn untouched_goes_on(operator: &mut Operator<'_>, program: &mut Program) -> Result<u64> {
    let before = program.uptime_ns()?;
    operator.switches("\x1d1\r", "stub> ")?;
    let line = r"\n(\d+) at (\d+) kHz\r";
    operator.session.send("tsc\r")?;
    let said = operator
        .session
        .expect(&Regex::new(line)?, operator.limit)?;
    let found = Regex::new(line)?;
    let found = found.captures(&said).context("a time")?;
    let (ticks, khz): (u128, u128) = (found[1].parse()?, found[2].parse()?);
    let shown = (ticks * 1_000_000 / khz) as u64;
    operator.switches(key::SHELL, PROMPT)?;
    let after = program.uptime_ns()?;
    // Its TSC's rate is what it measured.
    let slack = MADE_NS + after / 100;
    ensure!(
        shown + slack >= before && shown <= after + slack,
        "the untouched guest's clock shows {shown} ns between {before} ns and {after} ns"
    );
    Ok(shown)
}

/// A few rounds of verbs that are always the same.
pub fn short(rig: &Rig, start: &Start) -> Result<String> {
    let amount = match start.place.emulator() {
        Emulator::Qemu => SHORT,
        Emulator::Bochs => SHORTER,
    };
    soak(rig, start, amount, rig.seed.unwrap_or(1))
}

/// Many rounds, of other verbs each time; with an even seed on one processor.
pub fn long(rig: &Rig, start: &Start) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = rig.seed.unwrap_or(now.map_or(1, |now| now.as_secs()));
    // One processor does its long work in between.
    let cpus = 1 + (seed % 2) as u32;
    soak(rig, start, Amount { cpus, ..LONG }, seed)
}

/// Round after round.
fn soak(rig: &Rig, start: &Start, amount: Amount, seed: u64) -> Result<String> {
    rounds(rig, start, amount, seed).with_context(|| format!("with --seed {seed}"))
}

/// A host with the untouched guest, which talks, on a machine that `change` may change; and a program on its control channel. `files`: more than the stub's.
pub(super) fn boot(
    rig: &Rig,
    start: &Start,
    files: &str,
    change: impl FnOnce(&mut Machine),
) -> Result<(Session, Program)> {
    let limits = start.place.limits();
    let text = format!(
        "[host]\nafter-last-vm = \"stay\"\nfiles = [\"stub\", \"{DISK_IMAGE}\"{files}]\n{}",
        Vm::stub(UNTOUCHED, TALKS).section()
    );
    // The path of a socket has to be short.
    let name = format!("plinth-{}-{}.sock", std::process::id(), start.name);
    let socket = std::env::temp_dir().join(name);
    let mut session = rig.boot_text(start, &text, |machine| {
        machine.control = Some(socket.clone());
        change(machine);
    })?;
    session.expect(&Regex::new("stub> ")?, limits.boot)?;
    let connected = Client::connect(&Address::Unix(socket), limits.command);
    let (client, _) = connected.map_err(|error| anyhow::anyhow!("{error}"))?;
    let program = Program {
        client,
        limit: limits.command,
        done: 0,
    };
    Ok((session, program))
}

fn rounds(rig: &Rig, start: &Start, amount: Amount, seed: u64) -> Result<String> {
    let limits = start.place.limits();
    let emulator = start.place.emulator();
    let files = match amount.linux {
        true => ", \"linux-6.1-cloud\", \"initramfs-disk\"",
        false => "",
    };
    let (mut session, mut program) = boot(rig, start, files, |machine| {
        machine.cpus = amount.cpus;
    })?;
    let mut operator = Operator {
        session: &mut session,
        limit: limits.command,
    };
    operator.switches(key::SHELL, PROMPT)?;
    // The memory for a trace is kept.
    program.ask(&Request::TraceStart { exits: None })?;
    let mut dice = [1, 2].map(|door| Dice::new(seed, door, amount));
    let mut before = None;
    for round in 0..=amount.rounds {
        // Each may take as long as a whole scenario of another kind.
        operator.session.allow(start.place.patience());
        let [first, second] = &mut dice;
        thread::scope(|scope| {
            let door = scope.spawn(|| program.round(first, amount.verbs));
            let shell = shell_round(&mut operator, second, amount.verbs, emulator);
            let door = door.join().ok().context("the program failed")?;
            shell.context("at the shell")?;
            door.context("by the control channel")
        })
        .with_context(|| format!("round {round}"))?;
        program.destroy_all()?;
        fill_history(&mut operator)?;
        untouched_goes_on(&mut operator, &mut program)?;
        match before {
            // In the first round the host's own structures come to the size that they keep.
            None => before = Some(program.memory()?),
            Some(before) => program
                .nothing_is_left(before)
                .with_context(|| format!("round {round}"))?,
        }
    }
    operator.session.send("host power-off\r")?;
    session.wait_for_power_off(limits.command)?;
    Ok(format!(
        "seed {seed}, {} rounds, {} requests done, {} lines said again",
        amount.rounds + 1,
        program.done,
        program.client.made_again()
    ))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use manage::command::{Failure, Operate};

    use super::*;

    /// Notes what the shell asks for.
    #[derive(Default)]
    struct Asked(RefCell<Vec<Request>>);

    impl Operate for Asked {
        fn operate(&self, request: &Request) -> Result<Answer, Failure> {
            self.0.borrow_mut().push(request.clone());
            let text = String::new();
            Ok(Answer::Done { text })
        }

        fn vm_names(&self) -> Vec<String> {
            NAMES.map(String::from).to_vec()
        }

        fn pool_names(&self) -> Vec<String> {
            Vec::new()
        }
    }

    #[test]
    fn recipes_are_right() {
        assert!(DISKS.contains(DISK_IMAGE));
        for recipe in RECIPES.iter().chain([&LINUX]) {
            let config = recipe.config("g0");
            let parsed = manage::config::parse("p", config.as_bytes());
            assert_eq!(parsed.report(), "p: 1 VM can start\n", "{config}");
        }
    }

    #[test]
    fn the_shell_understands_what_is_typed() {
        let asked = Asked::default();
        let mut shell = manage::shell::Shell::new();
        let mut dice = Dice::new(7, 0, LONG);
        for _ in 0..2_000 {
            let request = dice.request();
            let line = line(&request);
            for byte in format!("{line}\r").bytes() {
                shell.input(byte, &asked);
            }
            let text = shell.take_output();
            let heard = asked.0.borrow_mut().drain(..).next();
            let heard = heard.unwrap_or_else(|| panic!("{line}: {text}"));
            match (&heard, &request) {
                (Request::VmCreate { config }, Request::VmCreate { .. }) => {
                    let parsed = manage::config::parse("p", config.as_bytes());
                    assert_eq!(parsed.report(), "p: 1 VM can start\n", "{line}");
                }
                _ => assert_eq!(heard, request, "{line}"),
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_verbs() {
        let verbs = |seed, door| {
            let mut dice = Dice::new(seed, door, SHORT);
            (0..100).map(|_| dice.request()).collect::<Vec<_>>()
        };
        assert_eq!(verbs(3, 1), verbs(3, 1));
        assert_ne!(verbs(3, 1), verbs(3, 2));
        assert_ne!(verbs(3, 1), verbs(4, 1));
    }
}
