//! The verbs: one table, from which parser, completion, help and docs/SHELL.md are made.

use alloc::{borrow::ToOwned, format, string::String};

use sched::{PRIORITIES, PolicyKind, WEIGHTS};

use crate::{
    config::{MAX_VCPUS, SLICES_US, time},
    table::{Align, Table},
};

/// Which verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the verbs")]
pub enum VerbId {
    VmList,
    VmShow,
    VmCreate,
    VmStart,
    VmStop,
    VmPause,
    VmResume,
    VmReset,
    VmDestroy,
    VmConsole,
    InjectNmi,
    HostShow,
    HostPowerOff,
    SchedShow,
    SchedSet,
    PoolSet,
    Stats,
    Top,
    Log,
    TraceStart,
    TraceStop,
    TraceShow,
    Help,
    Exit,
}

/// What kind of value an argument takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The name of a VM.
    Vm,
    /// A whole number within these bounds.
    Number(u32, u32),
    /// Numbers and ranges: `0-2,5`. Empty: none.
    Numbers,
    /// The name of a CPU pool.
    Pool,
    /// A length of time within these bounds, in microseconds: `500us`, `10ms`, `2s`.
    Time(u64, u64),
    /// A budget and a period: `2ms/10ms`; or `none`.
    Reservation,
    /// `KEY=VALUE` of `[[vm]]`, any number of them.
    Settings,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Words of a verb, any number of them.
    Verb,
}

/// How an argument is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// By its place; it may not be missing.
    Required,
    /// By its place; it may be missing.
    Optional,
    /// By its place; any number of them.
    Repeated,
    /// `--name VALUE` or `--name=VALUE`.
    Option,
    /// `--name`.
    Flag,
}

/// An argument of a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name: of an option with its dashes; else what stands for it in texts.
    pub name: &'static str,
    /// How it is written.
    pub form: Form,
    /// What it takes. Of no meaning for a flag.
    pub kind: Kind,
    /// What it is, in a few words.
    pub about: &'static str,
}

/// A verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verb {
    /// Which.
    pub id: VerbId,
    /// Its words.
    pub words: &'static [&'static str],
    /// Its arguments; those by place in their order.
    pub arguments: &'static [Argument],
    /// What it does, in a line.
    pub summary: &'static str,
    /// What else is to be known, in sentences. May be empty.
    pub details: &'static str,
}

const VM: Argument = Argument {
    name: "VM",
    form: Form::Required,
    kind: Kind::Vm,
    about: "name of a VM",
};

const fn option(name: &'static str, kind: Kind, about: &'static str) -> Argument {
    Argument {
        name,
        form: Form::Option,
        kind,
        about,
    }
}

const fn verb(
    id: VerbId,
    words: &'static [&'static str],
    arguments: &'static [Argument],
    summary: &'static str,
    details: &'static str,
) -> Verb {
    Verb {
        id,
        words,
        arguments,
        summary,
        details,
    }
}

/// The names of all policies.
pub const POLICIES: &[&str] = &{
    let mut names = [""; PolicyKind::ALL.len()];
    let mut n = 0;
    while n < names.len() {
        names[n] = PolicyKind::ALL[n].name();
        n += 1;
    }
    names
};

/// By what `top` sorts.
pub const SORT_KEYS: &[&str] = &["cpu", "wait", "response", "exits", "name"];

const FOLLOW: Argument = Argument {
    name: "--follow",
    form: Form::Flag,
    kind: Kind::Verb,
    about: "and then what is new, until q or Ctrl-C ends it",
};

const WEIGHT: Kind = Kind::Number(*WEIGHTS.start(), *WEIGHTS.end());
const PRIORITY: Kind = Kind::Number(*PRIORITIES.start() as u32, *PRIORITIES.end() as u32);
const SLICE: Kind = Kind::Time(*SLICES_US.start(), *SLICES_US.end());

/// Most log lines that are asked for at once.
pub const MAX_LOG_LINES: u32 = 1000;

/// All verbs, in the order in which help lists them.
pub const VERBS: &[Verb] = &[
    verb(VerbId::VmList, &["vm", "list"], &[], "list the VMs", ""),
    verb(
        VerbId::VmShow,
        &["vm", "show"],
        &[VM],
        "show a VM: what it is made of, its vCPUs, its exits",
        "",
    ),
    verb(
        VerbId::VmCreate,
        &["vm", "create"],
        &[Argument {
            name: "KEY=VALUE",
            form: Form::Repeated,
            kind: Kind::Settings,
            about: "keys of [[vm]] in plinth.toml; name, memory and boot.kernel at least",
        }],
        "add a VM, which is then off",
        "Example: vm create name=web memory=64M boot.kernel=stub boot.cmdline=\"checks=none end=shell\". \
         Files are ones that the image carries, under the names that plinth.toml uses.",
    ),
    verb(
        VerbId::VmStart,
        &["vm", "start"],
        &[VM],
        "start a VM that is off",
        "",
    ),
    verb(
        VerbId::VmStop,
        &["vm", "stop"],
        &[
            VM,
            option(
                "--timeout",
                Kind::Number(0, crate::command::MAX_STOP_TIMEOUT_S),
                "seconds until it is forced off; 30 if absent, 0: at once",
            ),
        ],
        "press a VM's power button, and force it off if it does not end",
        "",
    ),
    verb(
        VerbId::VmPause,
        &["vm", "pause"],
        &[VM],
        "keep a VM's vCPUs from running",
        "",
    ),
    verb(
        VerbId::VmResume,
        &["vm", "resume"],
        &[VM],
        "let a paused VM run again",
        "",
    ),
    verb(
        VerbId::VmReset,
        &["vm", "reset"],
        &[VM],
        "reset a VM's machine, as its reset button would",
        "",
    ),
    verb(
        VerbId::VmDestroy,
        &["vm", "destroy"],
        &[
            VM,
            Argument {
                name: "--force",
                form: Form::Flag,
                kind: Kind::Verb,
                about: "force it off first if it runs",
            },
        ],
        "remove a VM and all that it has",
        "Its changes to disks go, too. The VM has to be off.",
    ),
    verb(
        VerbId::VmConsole,
        &["vm", "console"],
        &[VM],
        "show a VM's console on this terminal",
        "The escape key, then 0, comes back to the shell.",
    ),
    verb(
        VerbId::InjectNmi,
        &["inject", "nmi"],
        &[
            VM,
            option(
                "--vcpu",
                Kind::Number(0, MAX_VCPUS as u32 - 1),
                "which vCPU; 0 if absent",
            ),
        ],
        "send a vCPU a non-maskable interrupt",
        "",
    ),
    verb(
        VerbId::HostShow,
        &["host", "show"],
        &[],
        "show the machine",
        "",
    ),
    verb(
        VerbId::HostPowerOff,
        &["host", "power-off"],
        &[],
        "power the host off; VMs that run are not asked",
        "",
    ),
    verb(
        VerbId::SchedShow,
        &["sched", "show"],
        &[],
        "show CPU pools and scheduling parameters",
        "",
    ),
    verb(
        VerbId::SchedSet,
        &["sched", "set"],
        &[
            VM,
            option("--weight", WEIGHT, "share beside the others'"),
            option(
                "--cap",
                Kind::Number(0, 100 * MAX_VCPUS as u32),
                "percent of one processor for all its vCPUs together; 0: none",
            ),
            option("--priority", PRIORITY, "higher is more urgent"),
            option(
                "--affinity",
                Kind::Numbers,
                "host processors, as 0-2,5; all: all of its pool",
            ),
            option("--pool", Kind::Pool, "CPU pool that it moves to"),
            option(
                "--reservation",
                Kind::Reservation,
                "processor time kept for each vCPU, as 2ms/10ms: 2 ms in each 10 ms; none: as the others",
            ),
        ],
        "change a VM's scheduling; what is absent stays",
        "A reservation needs a pool of the policy reservation that has so much left: sched show tells. All vCPUs get theirs, or \
         nothing changes. One of a VM that is off is admitted when it starts.",
    ),
    verb(
        VerbId::PoolSet,
        &["pool", "set"],
        &[
            Argument {
                name: "POOL",
                form: Form::Required,
                kind: Kind::Pool,
                about: "name of a CPU pool",
            },
            option(
                "--policy",
                Kind::Choice(POLICIES),
                "in what order its vCPUs run",
            ),
            option("--slice", SLICE, "how long one runs at a time, as 10ms"),
        ],
        "change a CPU pool; what is absent stays",
        "What plinth.toml says holds again after the host's next start.",
    ),
    verb(
        VerbId::Stats,
        &["stats"],
        &[Argument {
            form: Form::Optional,
            about: "of this VM alone",
            ..VM
        }],
        "figures of processors and vCPUs since their start",
        "",
    ),
    verb(
        VerbId::Top,
        &["top"],
        &[option(
            "--sort",
            Kind::Choice(SORT_KEYS),
            "by what; cpu if absent",
        )],
        "who uses the processors, once a second",
        "Keys: c, w, r, e, n sort by CPU, wait, response, exits, name; space shows it anew at once; q ends it.",
    ),
    verb(
        VerbId::Log,
        &["log"],
        &[
            option(
                "--lines",
                Kind::Number(1, MAX_LOG_LINES),
                "how many; 20 if absent",
            ),
            FOLLOW,
        ],
        "the newest lines of the host's log",
        "",
    ),
    verb(
        VerbId::TraceStart,
        &["trace", "start"],
        &[Argument {
            name: "--no-exits",
            form: Form::Flag,
            kind: Kind::Verb,
            about: "leave exits and entries out: a longer time fits",
        }],
        "record what the processors do, the newest of it",
        "plinthctl trace reads the records and makes a file for Perfetto of them.",
    ),
    verb(
        VerbId::TraceStop,
        &["trace", "stop"],
        &[],
        "record no more; what was recorded can still be read",
        "",
    ),
    verb(
        VerbId::TraceShow,
        &["trace", "show"],
        &[],
        "whether a trace is recorded, and how much there is of it",
        "",
    ),
    verb(
        VerbId::Help,
        &["help"],
        &[Argument {
            name: "VERB",
            form: Form::Repeated,
            kind: Kind::Verb,
            about: "a verb, or its first word",
        }],
        "list the verbs, or explain one",
        "",
    ),
    verb(VerbId::Exit, &["exit"], &[], "leave the shell", ""),
];

impl Verb {
    /// Its words with blanks between.
    pub fn name(&self) -> String {
        self.words.join(" ")
    }

    /// How it is written: its words and arguments.
    pub fn usage(&self) -> String {
        let mut text = self.name();
        for argument in self.arguments {
            let name = argument.name;
            text += &match argument.form {
                Form::Required => format!(" {name}"),
                Form::Repeated => format!(" [{name}].."),
                Form::Optional | Form::Flag => format!(" [{name}]"),
                Form::Option => format!(" [{name} {}]", argument.value_name()),
            };
        }
        text
    }

    /// The arguments by place.
    pub fn positional(&self) -> impl Iterator<Item = &Argument> + Clone {
        self.arguments.iter().filter(|a| a.is_by_place())
    }

    /// The option or flag of this name, dashes included.
    pub fn option(&self, name: &str) -> Option<&'static Argument> {
        let named = |a: &&Argument| !a.is_by_place() && a.name == name;
        self.arguments.iter().find(named)
    }
}

impl Argument {
    /// Whether its place says which it is, and not its name.
    pub const fn is_by_place(&self) -> bool {
        match self.form {
            Form::Required | Form::Optional | Form::Repeated => true,
            Form::Option | Form::Flag => false,
        }
    }

    /// What stands for the value of an option in texts.
    pub fn value_name(&self) -> &'static str {
        match self.kind {
            Kind::Vm => "VM",
            Kind::Number(..) => "N",
            Kind::Numbers => "LIST",
            Kind::Pool => "POOL",
            Kind::Time(..) => "TIME",
            Kind::Reservation => "BUDGET/PERIOD",
            Kind::Settings => "KEY=VALUE",
            Kind::Choice(_) => "KEY",
            Kind::Verb => "VERB",
        }
    }

    /// What it is, and what values there are.
    pub fn explained(&self) -> String {
        let about = self.about;
        match self.kind {
            Kind::Choice(words) => format!("{about} ({})", words.join(", ")),
            Kind::Number(min, max) if max < u32::MAX && self.form != Form::Flag => {
                format!("{about} ({min} to {max})")
            }
            Kind::Time(min, max) => format!("{about} ({} to {})", time(min), time(max)),
            Kind::Number(..)
            | Kind::Numbers
            | Kind::Settings
            | Kind::Verb
            | Kind::Vm
            | Kind::Pool
            | Kind::Reservation => about.to_owned(),
        }
    }
}

/// The verbs whose first words are these; all if there are none.
pub fn beginning_with(words: &[&str]) -> impl Iterator<Item = &'static Verb> {
    VERBS.iter().filter(|verb| {
        words.len() <= verb.words.len() && words.iter().zip(verb.words).all(|(a, b)| a == b)
    })
}

/// Help: the list of verbs, or one explained. `None`: there is no such verb.
pub fn help(words: &[&str]) -> Option<String> {
    let mut verbs = beginning_with(words);
    match (verbs.next()?, verbs.next()) {
        (verb, None) => Some(explain(verb)),
        _ => {
            let mut table = Table::new(&[("VERB", Align::Left), ("WHAT IT DOES", Align::Left)]);
            for verb in beginning_with(words) {
                table.row([verb.name(), verb.summary.to_owned()]);
            }
            Some(table.render() + "help VERB explains one.\n")
        }
    }
}

fn explain(verb: &Verb) -> String {
    let mut text = format!("{}\n  {}\n", verb.usage(), verb.summary);
    let names = verb.arguments.iter().map(|a| a.name.len());
    let width = names.max().unwrap_or(0);
    for argument in verb.arguments {
        text += &format!("  {:<width$}  {}\n", argument.name, argument.explained());
    }
    if !verb.details.is_empty() {
        text += &wrapped(verb.details);
    }
    text
}

/// A text in lines of a terminal, each indented.
fn wrapped(text: &str) -> String {
    const COLUMNS: usize = 79;
    let mut lines = String::new();
    let mut line = " ".to_owned();
    for word in text.split(' ') {
        if line.chars().count() + word.chars().count() + 1 > COLUMNS {
            lines += &(line + "\n");
            line = " ".to_owned();
        }
        line += &format!(" {word}");
    }
    lines + &line + "\n"
}

/// The part of docs/SHELL.md that is made from the table.
pub fn reference() -> String {
    let cell = |text: &str| text.replace('|', "\\|");
    let mut text = "| verb | what it does |\n| --- | --- |\n".to_owned();
    for verb in VERBS {
        let mut about = verb.summary.to_owned();
        for argument in verb.arguments {
            if !matches!(argument.form, Form::Required) {
                about += &format!("; `{}`: {}", argument.name, argument.explained());
            }
        }
        about.push('.');
        if !verb.details.is_empty() {
            about += &format!(" {}", verb.details);
        }
        text += &format!("| `{}` | {} |\n", cell(&verb.usage()), cell(&about));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_has_the_table() {
        let manual = include_str!("../../../../docs/SHELL.md");
        let reference = reference();
        assert!(
            manual.contains(&reference),
            "docs/SHELL.md has to contain:\n{reference}"
        );
    }

    #[test]
    fn help_lists_groups_and_explains_verbs() {
        let all = help(&[]).unwrap();
        assert!(VERBS.iter().all(|verb| all.contains(&verb.name())));
        let group = help(&["vm"]).unwrap();
        assert!(group.contains("vm stop") && !group.contains("host show"));
        let one = help(&["vm", "stop"]).unwrap();
        assert!(one.starts_with("vm stop VM [--timeout N]\n"), "{one}");
        let long = help(&["vm", "create"]).unwrap();
        let example = long
            .lines()
            .position(|line| line.starts_with("  Example: "));
        assert!(
            long.lines()
                .skip(example.unwrap())
                .all(|line| line.len() <= 79),
            "{long}"
        );
        assert!(help(&["vm", "dance"]).is_none());
        assert!(help(&["vm", "stop", "web"]).is_none());
    }

    #[test]
    fn no_verb_begins_another_and_repeated_arguments_come_last() {
        for verb in VERBS {
            assert_eq!(beginning_with(verb.words).count(), 1, "{:?}", verb.words);
            let mut forms = verb.positional().map(|a| a.form);
            let repeated = forms.position(|form| form == Form::Repeated);
            assert!(repeated.is_none() || forms.next().is_none());
        }
    }
}
