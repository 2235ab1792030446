//! The operator's actions as lines of the host's log: by which door, what, and what came of it.
//!
//! Each request that changes something ([`Action::of`]) leaves one [`Entry`], done or refused; those that only look leave none.
//! A door's requests pass through [`Journal::admit`], which says whether there is to be a line. Pure: the caller reads the clock
//! and has the log.
//!
//! Invariants: an entry is one line of at most [`LONGEST`] characters, all of them printable ASCII, whatever a client sent. Words of
//! a client that could be taken for the entry's own stand in quotes. A flood leaves some lines at once and then one now and then,
//! with the number of those that were left out, so that the log's other lines stay for a while. Each door has lines of its
//! own, for what was done and for what was refused: neither a script that runs wild nor refusals hide what others do.

use core::fmt::{self, Write};

use crate::{
    command::{Answer, Failure, Request, SchedChange},
    config,
    limit::Limit,
};

/// Most characters of what was asked.
const LONGEST_ACTION: usize = 100;
/// Most characters of what came of it.
const LONGEST_OUTCOME: usize = 80;
/// Most characters of an entry.
pub const LONGEST: usize = 280;

/// Lines about what was done that a door may leave at once, and the time for one more, in microseconds.
const DONE: (u32, u64) = (60, 5_000_000);
/// The same about what was refused, which changed nothing.
const REFUSED: (u32, u64) = (16, 30_000_000);

/// By which way a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The shell on the serial terminal.
    Serial,
    /// The shell on the host's screen, with its keyboard.
    Screen,
    /// The control channel.
    Channel,
    /// The escape key on the serial terminal, whatever that shows.
    SerialKey,
    /// The escape key on the host's keyboard.
    ScreenKey,
}

impl Door {
    /// How many there are.
    const COUNT: usize = 5;

    /// What the log calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Door::Serial => "serial shell",
            Door::Screen => "screen shell",
            Door::Channel => "control channel",
            Door::SerialKey => "serial escape key",
            Door::ScreenKey => "screen escape key",
        }
    }
}

/// How many lines each door may leave.
#[derive(Debug)]
pub struct Journal {
    doors: [Limits; Door::COUNT],
}

/// Of one door.
#[derive(Debug)]
struct Limits {
    done: Limit,
    refused: Limit,
}

impl Limits {
    const NEW: Self = Limits {
        done: Limit::new(DONE.0, DONE.1),
        refused: Limit::new(REFUSED.0, REFUSED.1),
    };
}

impl Journal {
    /// A journal without entries.
    pub const fn new() -> Self {
        Journal {
            doors: [Limits::NEW; Door::COUNT],
        }
    }

    /// Whether an action of this door, which was `done` or refused, gets its line; if so, with how many of its kind got none since
    /// the last one. `now_us` is the host's time.
    pub fn admit(&mut self, door: Door, done: bool, now_us: u64) -> Option<u64> {
        let limits = &mut self.doors[door as usize];
        match done {
            true => limits.done.admit(now_us),
            false => limits.refused.admit(now_us),
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self::new()
    }
}

/// A request that changes something. Shown as the shell's line for it, but for a new VM, of which its section's keys are shown.
#[derive(Clone, Copy, Debug)]
pub struct Action<'a>(&'a Request);

impl<'a> Action<'a> {
    /// `None`: it only looks.
    pub fn of(request: &'a Request) -> Option<Self> {
        match request {
            Request::VmCreate { .. }
            | Request::VmStart { .. }
            | Request::VmStop { .. }
            | Request::VmPause { .. }
            | Request::VmResume { .. }
            | Request::VmReset { .. }
            | Request::VmDestroy { .. }
            | Request::InjectNmi { .. }
            | Request::HostPowerOff {}
            | Request::SchedSet { .. }
            | Request::PoolSet { .. }
            | Request::TraceStart { .. }
            | Request::TraceStop {} => Some(Action(request)),
            Request::VmList {}
            | Request::VmShow { .. }
            | Request::HostShow {}
            | Request::SchedShow {}
            | Request::Stats { .. }
            | Request::Log { .. }
            | Request::TraceShow {}
            | Request::TraceRead { .. } => None,
        }
    }

    /// What it is about, if that has a name.
    fn object(self) -> Option<&'a str> {
        match self.0 {
            Request::VmStart { vm }
            | Request::VmStop { vm, .. }
            | Request::VmPause { vm }
            | Request::VmResume { vm }
            | Request::VmReset { vm }
            | Request::VmDestroy { vm, .. }
            | Request::InjectNmi { vm, .. }
            | Request::SchedSet { vm, .. } => Some(vm),
            Request::PoolSet { pool, .. } => Some(pool),
            Request::TraceStart { .. } | Request::TraceStop {} => Some("trace"),
            _ => None,
        }
    }
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Request::VmCreate { config } => {
                f.write_str("vm create \"")?;
                section(f, config)?;
                f.write_str("\"")
            }
            Request::VmStart { vm } => write!(f, "vm start {}", Word(vm)),
            Request::VmStop { vm, timeout_s } => {
                write!(f, "vm stop {}", Word(vm))?;
                option(f, "timeout", timeout_s.as_ref())
            }
            Request::VmPause { vm } => write!(f, "vm pause {}", Word(vm)),
            Request::VmResume { vm } => write!(f, "vm resume {}", Word(vm)),
            Request::VmReset { vm } => write!(f, "vm reset {}", Word(vm)),
            Request::VmDestroy { vm, force } => {
                write!(f, "vm destroy {}", Word(vm))?;
                f.write_str(if *force { " --force" } else { "" })
            }
            Request::InjectNmi { vm, vcpu } => {
                write!(f, "inject nmi {}", Word(vm))?;
                option(f, "vcpu", vcpu.as_ref())
            }
            Request::HostPowerOff {} => f.write_str("host power-off"),
            Request::SchedSet { vm, change } => {
                write!(f, "sched set {}", Word(vm))?;
                sched_change(f, change)
            }
            Request::PoolSet {
                pool,
                policy,
                slice_us,
            } => {
                write!(f, "pool set {}", Word(pool))?;
                option(f, "policy", policy.as_deref().map(Word).as_ref())?;
                option(f, "slice", slice_us.map(config::time).as_ref())
            }
            Request::TraceStart { exits } => {
                f.write_str("trace start")?;
                f.write_str(if *exits == Some(false) {
                    " --no-exits"
                } else {
                    ""
                })
            }
            Request::TraceStop {} => f.write_str("trace stop"),
            // No action is made of these.
            Request::VmList {}
            | Request::VmShow { .. }
            | Request::HostShow {}
            | Request::SchedShow {}
            | Request::Stats { .. }
            | Request::Log { .. }
            | Request::TraceShow {}
            | Request::TraceRead { .. } => Ok(()),
        }
    }
}

/// The lines of a section one behind the other. What is quoted there stands between single quotes, so that no word of it ends
/// the quotes around it all.
fn section(f: &mut fmt::Formatter<'_>, config: &str) -> fmt::Result {
    let lines = config.lines().map(str::trim);
    let keys = lines.filter(|line| !line.is_empty() && *line != "[[vm]]");
    for (n, key) in keys.enumerate() {
        f.write_str(if n == 0 { "" } else { "; " })?;
        for c in key.chars() {
            f.write_char(if c == '"' { '\'' } else { c })?;
        }
    }
    Ok(())
}

fn option(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    value: Option<&impl fmt::Display>,
) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(f, " --{name} {value}"))
}

fn sched_change(f: &mut fmt::Formatter<'_>, change: &SchedChange) -> fmt::Result {
    option(f, "weight", change.weight.as_ref())?;
    option(f, "cap", change.cap.as_ref())?;
    option(f, "priority", change.priority.as_ref())?;
    match change.affinity.as_deref() {
        None => {}
        Some([]) => f.write_str(" --affinity all")?,
        Some(cpus) => {
            for (n, cpu) in cpus.iter().enumerate() {
                let before = if n == 0 { " --affinity " } else { "," };
                write!(f, "{before}{cpu}")?;
            }
        }
    }
    option(f, "pool", change.pool.as_deref().map(Word).as_ref())?;
    match change.reservation_us {
        None => Ok(()),
        Some((0, _)) => f.write_str(" --reservation none"),
        Some((budget, period)) => {
            let (budget, period) = (config::time(budget), config::time(period));
            write!(f, " --reservation {budget}/{period}")
        }
    }
}

/// A client's word: as it is if it could be a name, else in quotes.
struct Word<'a>(&'a str);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match config::is_vm_name(self.0) {
            true => f.write_str(self.0),
            false => write!(f, "{:?}", self.0),
        }
    }
}

/// A line of the log about an action.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// By which door it was asked for.
    pub door: Door,
    /// What was asked for.
    pub action: Action<'a>,
    /// What came of it.
    pub outcome: &'a Result<Answer, Failure>,
    /// How many of this door's actions of this outcome got no line before it.
    pub left_out: u64,
}

impl fmt::Display for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operator ({}): ", self.door.name())?;
        Harmless::write(f, LONGEST_ACTION, format_args!("{}", self.action))?;
        let (word, text) = match self.outcome {
            Ok(Answer::Done { text }) => ("done", text.as_str()),
            Ok(_) => ("done", ""),
            Err(failure) => ("refused", failure.message.as_str()),
        };
        write!(f, ": {word}")?;
        // Its first line says what; the name stands in the action already.
        let text = text.lines().next().unwrap_or_default();
        let object = self.action.object();
        let short = object.and_then(|name| text.strip_prefix(name)?.strip_prefix(": "));
        match short.unwrap_or(text) {
            "" => {}
            text => {
                f.write_str(", ")?;
                Harmless::write(f, LONGEST_OUTCOME, format_args!("{text}"))?;
            }
        }
        match self.left_out {
            0 => Ok(()),
            count => write!(f, " ({count} {word} before were left out)"),
        }
    }
}

/// Passes text on up to a length, and of that printable ASCII only; `?` stands for the rest.
struct Harmless<'f, 'g> {
    to: &'f mut fmt::Formatter<'g>,
    left: usize,
}

impl<'f, 'g> Harmless<'f, 'g> {
    /// Writes `words`, of which the first `longest` characters are kept; two dots show that there were more.
    fn write(
        to: &'f mut fmt::Formatter<'g>,
        longest: usize,
        words: fmt::Arguments<'_>,
    ) -> fmt::Result {
        let mut harmless = Harmless { to, left: longest };
        match harmless.write_fmt(words) {
            // It stops at the end of its room.
            Err(_) if harmless.left == 0 => harmless.to.write_str(".."),
            result => result,
        }
    }
}

impl Write for Harmless<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            self.left = self.left.checked_sub(1).ok_or(fmt::Error)?;
            let printable = c.is_ascii_graphic() || c == ' ';
            self.to.write_char(if printable { c } else { '?' })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use alloc::{
        format,
        string::{String, ToString},
    };

    use super::*;
    use crate::{
        command::FailureCode,
        shell::{self, Command},
    };
    use proptest::prelude::*;

    fn line(request: &Request, outcome: &Result<Answer, Failure>, left_out: u64) -> String {
        Entry {
            door: Door::Channel,
            action: Action::of(request).expect("an action"),
            outcome,
            left_out,
        }
        .to_string()
    }

    fn done(text: &str) -> Result<Answer, Failure> {
        Ok(Answer::Done { text: text.into() })
    }

    fn refused(message: &str) -> Result<Answer, Failure> {
        Err(Failure::new(FailureCode::WrongState, message))
    }

    #[test]
    fn a_line_says_which_door_what_and_what_came_of_it() {
        let start = Request::VmStart { vm: "web".into() };
        for (outcome, left_out, wanted) in [
            (
                done("web: starting"),
                0,
                "operator (control channel): vm start web: done, starting",
            ),
            (
                refused("web: runs already"),
                3,
                "operator (control channel): vm start web: refused, runs already (3 refused before were left out)",
            ),
            (
                refused("no\n  more\n"),
                0,
                "operator (control channel): vm start web: refused, no",
            ),
        ] {
            assert_eq!(line(&start, &outcome, left_out), wanted);
        }
        let config = "[[vm]]\nname = \"web\"\nmemory = \"64M\"\n".into();
        assert_eq!(
            line(
                &Request::VmCreate { config },
                &done("web: created; it is off"),
                0
            ),
            "operator (control channel): vm create \"name = 'web'; memory = '64M'\": done, web: created; it is off"
        );
    }

    /// What the shell understands is shown as it was typed.
    #[test]
    fn actions_are_shown_as_the_shell_writes_them() {
        for typed in [
            "vm start web",
            "vm stop web",
            "vm stop web --timeout 5",
            "vm pause web",
            "vm resume web",
            "vm reset web",
            "vm destroy web",
            "vm destroy web --force",
            "inject nmi web",
            "inject nmi web --vcpu 1",
            "host power-off",
            "sched set web --weight 200 --cap 50 --priority 3 --affinity 0,2 --pool rt --reservation none",
            "sched set web --affinity all",
            "pool set default --policy round-robin",
            "trace start",
            "trace start --no-exits",
            "trace stop",
        ] {
            let Ok(Command::Request(request)) = shell::parse(typed).map(|p| p.command) else {
                panic!("{typed} is no request");
            };
            let action = Action::of(&request).expect(typed);
            assert_eq!(action.to_string(), typed);
        }
        for (typed, shown) in [
            (
                "sched set web --reservation 2ms/10ms",
                "sched set web --reservation 2 ms/10 ms",
            ),
            (
                "pool set default --slice 500us",
                "pool set default --slice 500 us",
            ),
        ] {
            let Ok(Command::Request(request)) = shell::parse(typed).map(|p| p.command) else {
                panic!("{typed} is no request");
            };
            assert_eq!(Action::of(&request).expect(typed).to_string(), shown);
        }
    }

    #[test]
    fn each_door_is_called_by_its_name_and_has_lines_of_its_own() {
        let doors = [
            (Door::Serial, "serial shell"),
            (Door::Screen, "screen shell"),
            (Door::Channel, "control channel"),
            (Door::SerialKey, "serial escape key"),
            (Door::ScreenKey, "screen escape key"),
        ];
        assert_eq!(doors.len(), Door::COUNT);
        let request = Request::HostPowerOff {};
        let mut journal = Journal::new();
        for (door, name) in doors {
            let outcome = done("powering off");
            let entry = Entry {
                door,
                action: Action::of(&request).expect("an action"),
                outcome: &outcome,
                left_out: 0,
            };
            let wanted = format!("operator ({name}): host power-off: done, powering off");
            assert_eq!(entry.to_string(), wanted);
            assert_eq!(journal.admit(door, true, 0), Some(0), "{name}");
            while journal.admit(door, true, 0).is_some() {}
        }
    }

    #[test]
    fn who_only_looks_leaves_no_line() {
        for request in [
            Request::VmList {},
            Request::VmShow { vm: "web".into() },
            Request::HostShow {},
            Request::SchedShow {},
            Request::Stats { vm: None },
            Request::Log {
                after: None,
                lines: None,
            },
            Request::TraceShow {},
        ] {
            assert!(Action::of(&request).is_none(), "{request:?}");
        }
    }

    #[test]
    fn a_name_cannot_pass_for_more() {
        let vm = "web: done, starting\u{1b}[2J\u{202e}".into();
        assert_eq!(
            line(&Request::VmStart { vm }, &refused("no"), 0),
            r#"operator (control channel): vm start "web: done, starting\u{1b}[2J\u{202e}": refused, no"#
        );
    }

    /// However many requests, done and refused, a door has: for ten minutes they leave less than what the log keeps, and each is
    /// counted; the other doors have their lines.
    #[test]
    fn a_flood_is_counted_and_silences_nobody() {
        const LOG_BYTES: usize = 64 * 1024;
        // A time stamp and a newline.
        const LINE_BYTES: usize = LONGEST + 16;
        const END_US: u64 = 600_000_000;
        let mut journal = Journal::new();
        let (mut asked, mut lines, mut left_out) = (0, 0, 0);
        for now in (0..=END_US).step_by(1_000) {
            for done in [true, false] {
                asked += 1;
                if let Some(before) = journal.admit(Door::Channel, done, now) {
                    lines += 1;
                    left_out += before;
                }
            }
        }
        assert!(lines * LINE_BYTES < LOG_BYTES, "{lines} lines");
        assert_eq!(journal.admit(Door::Serial, true, END_US), Some(0));
        assert_eq!(journal.admit(Door::Serial, false, END_US), Some(0));
        assert_eq!(journal.admit(Door::Screen, true, END_US), Some(0));
        let last = [true, false].map(|done| journal.admit(Door::Channel, done, 2 * END_US));
        let last: u64 = last.into_iter().flatten().sum();
        assert_eq!(lines as u64 + left_out + last, asked);
    }

    /// Refusals without end leave what is done its lines.
    #[test]
    fn refusals_do_not_hide_what_is_done() {
        let mut journal = Journal::new();
        let refusals =
            (0..100_000).filter(|now| journal.admit(Door::Channel, false, *now).is_some());
        assert_eq!(refusals.count(), REFUSED.0 as usize);
        assert_eq!(journal.admit(Door::Channel, true, 100_000), Some(0));
    }

    proptest! {
        #[test]
        fn a_line_is_short_and_harmless_whatever_was_sent(
            vm in any::<String>(),
            long in 0..400usize,
            message in any::<String>(),
            left_out in any::<u64>(),
            which in 0..5u8,
        ) {
            let text = vm.repeat(long);
            let request = match which {
                0 => Request::VmCreate { config: text },
                1 => Request::VmDestroy { vm: text, force: true },
                2 => Request::PoolSet { pool: text.clone(), policy: Some(text), slice_us: Some(u64::MAX) },
                3 => Request::SchedSet {
                    vm: text.clone(),
                    change: SchedChange {
                        pool: Some(text),
                        affinity: Some((0..long as u32).collect()),
                        reservation_us: Some((u64::MAX, u64::MAX)),
                        ..SchedChange::default()
                    },
                },
                _ => Request::InjectNmi { vm: text, vcpu: Some(u16::MAX) },
            };
            for outcome in [done(&message), refused(&message)] {
                let line = line(&request, &outcome, left_out);
                prop_assert!(line.len() <= LONGEST, "{}: {line}", line.len());
                prop_assert!(line.chars().all(|c| c.is_ascii_graphic() || c == ' '));
            }
        }
    }
}
