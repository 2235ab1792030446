//! From words to a command, or to an error that says what, where, and what to do.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::{fmt, ops::Range};

use super::{
    verbs::{Argument, Form, Kind, SORT_KEYS, VERBS, Verb, VerbId, beginning_with},
    words::{self, Word},
};
use crate::{
    command::{Request, SchedChange},
    config::{self, distance},
    table,
    top::Sort,
};

/// Characters of a line that an error shows.
const SHOWN: usize = 72;
/// Log lines that are asked for unless it says.
const DEFAULT_LOG_LINES: u32 = 20;

/// What a line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The line is empty.
    Nothing,
    /// Something of the host.
    Request(Request),
    /// Show this VM's console.
    Console(String),
    /// Show the live view, sorted so.
    Top(Sort),
    /// Show so many of the newest log lines, and then those that come.
    Follow(u32),
    /// Explain this: the words of a verb, or nothing for all.
    Help(Vec<String>),
    /// Leave.
    Exit,
}

/// A line that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// What it asks for.
    pub command: Command,
    /// The word that names a VM, if one has to exist for it.
    pub vm: Option<Word>,
}

/// Why a line was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// The characters of the line that it is about, from 0; empty at the line's end: something is missing.
    pub at: Range<usize>,
    /// What is wrong.
    pub message: String,
    /// What to do. May be empty.
    pub hint: String,
}

impl ParseError {
    pub(super) fn new(at: Range<usize>, message: String, hint: String) -> Self {
        Self { at, message, hint }
    }

    /// The line, a mark under what is wrong, and what to do. Of a long line the part around the mark is shown.
    pub fn render(&self, line: &str) -> String {
        let first = match line.chars().count() {
            0..SHOWN => 0,
            _ => self.at.start.saturating_sub(SHOWN / 4),
        };
        let shown: String = table::printable(line)
            .chars()
            .skip(first)
            .take(SHOWN)
            .collect();
        let indent = self.at.start - first;
        let marks = "^".repeat(self.at.len().clamp(1, (SHOWN - indent).max(1)));
        format!("  {shown}\n  {:indent$}{marks}\n{self}\n", "")
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match self.hint.as_str() {
            "" => Ok(()),
            hint => write!(f, ": {hint}"),
        }
    }
}

/// Understands a line.
///
/// # Errors
/// It is no command.
pub fn parse(line: &str) -> Result<Parsed, ParseError> {
    parse_words(&words::split(line)?, line.chars().count())
}

/// Understands words. `end`: the length of their line, in characters.
///
/// # Errors
/// They are no command.
pub fn parse_words(words: &[Word], end: usize) -> Result<Parsed, ParseError> {
    if words.is_empty() {
        return Ok(Parsed {
            command: Command::Nothing,
            vm: None,
        });
    }
    let verb = find_verb(words, end)?;
    let values = Values::collect(verb, &words[verb.words.len()..], end)?;
    let vm = match verb.id {
        VerbId::VmCreate => None,
        _ => values.by_place.iter().find(|(a, _)| a.kind == Kind::Vm),
    };
    Ok(Parsed {
        vm: vm.map(|(_, word)| (*word).clone()),
        command: command(verb, &values, end)?,
    })
}

/// The candidate nearest to a word, if it is near enough to be meant.
pub fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    candidates
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len().min(word.len()) / 3)
        .map(|(_, candidate)| candidate)
}

/// "did you mean", or else what there is.
fn meant<'c>(word: &str, candidates: impl Iterator<Item = &'c str> + Clone) -> String {
    match nearest(word, candidates.clone()) {
        Some(candidate) => format!("did you mean \"{candidate}\"?"),
        None => {
            let mut all: Vec<_> = candidates.collect();
            all.dedup();
            format!("one of {}", all.join(", "))
        }
    }
}

/// A word as it stands in an error: cut, since the mark shows all of it.
fn shown(text: &str) -> String {
    const LONGEST: usize = 32;
    let mut cut: String = text.chars().take(LONGEST).collect();
    if cut.len() < text.len() {
        cut += "..";
    }
    format!("\"{}\"", table::printable(&cut))
}

fn find_verb(words: &[Word], end: usize) -> Result<&'static Verb, ParseError> {
    let mut known: Vec<&str> = Vec::new();
    loop {
        let found = VERBS.iter().find(|verb| verb.words == known);
        if let Some(verb) = found {
            return Ok(verb);
        }
        let depth = known.len();
        let next = beginning_with(&known).filter_map(|verb| verb.words.get(depth).copied());
        let next: Vec<_> = next.collect();
        let Some(word) = words.get(depth) else {
            let message = format!("{} needs another word", known.join(" "));
            let hint = format!("one of {}", next.join(", "));
            return Err(ParseError::new(end..end, message, hint));
        };
        match next.iter().find(|candidate| **candidate == word.text) {
            Some(candidate) => known.push(candidate),
            None => {
                let message = match depth {
                    0 => format!("there is no verb {}", shown(&word.text)),
                    _ => format!("{} has no {}", known.join(" "), shown(&word.text)),
                };
                let mut hint = meant(&word.text, next.iter().copied());
                // Somebody may have left out the first word.
                if depth == 0
                    && let Some(verb) = VERBS.iter().find(|v| v.words.last() == Some(&&*word.text))
                {
                    hint = format!("did you mean \"{}\"?", verb.name());
                }
                return Err(ParseError::new(word.at.clone(), message, hint));
            }
        }
    }
}

/// An option and its value.
#[derive(Debug)]
struct Given {
    argument: &'static Argument,
    text: String,
}

/// What was given to a verb.
#[derive(Debug, Default)]
struct Values<'w> {
    by_place: Vec<(&'static Argument, &'w Word)>,
    options: Vec<Given>,
}

impl<'w> Values<'w> {
    fn collect(
        verb: &'static Verb,
        words: &'w [Word],
        end: usize,
    ) -> Result<Values<'w>, ParseError> {
        let mut values = Values::default();
        let places: Vec<_> = verb.positional().collect();
        let mut words = words.iter();
        let mut place = 0;
        while let Some(word) = words.next() {
            if word.text.starts_with("--") && !word.quoted {
                values.option(verb, word, &mut words, end)?;
                continue;
            }
            let Some(argument) = places.get(place) else {
                let message = format!("{} is too much here", shown(&word.text));
                let hint = format!("it is written: {}", verb.usage());
                return Err(ParseError::new(word.at.clone(), message, hint));
            };
            if argument.form != Form::Repeated {
                place += 1;
            }
            check(argument, &word.text, &word.at)?;
            values.by_place.push((argument, word));
        }
        match places.get(place).filter(|a| a.form == Form::Required) {
            None => Ok(values),
            Some(argument) => {
                let message = format!("{} needs {}", verb.name(), article(argument));
                let hint = format!("it is written: {}", verb.usage());
                Err(ParseError::new(end..end, message, hint))
            }
        }
    }

    fn option(
        &mut self,
        verb: &'static Verb,
        word: &Word,
        more: &mut impl Iterator<Item = &'w Word>,
        end: usize,
    ) -> Result<(), ParseError> {
        let (name, value) = match word.text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word.text.as_str(), None),
        };
        let Some(argument) = verb.option(name) else {
            let known = verb.arguments.iter().filter(|a| !a.is_by_place());
            let known = known.map(|a| a.name);
            let hint = match known.clone().next() {
                None => "it takes none".to_owned(),
                Some(_) => meant(name, known),
            };
            let message = format!("{} has no option {}", verb.name(), shown(name));
            return Err(ParseError::new(word.at.clone(), message, hint));
        };
        if self.options.iter().any(|g| g.argument.name == name) {
            let message = format!("{name} is there already");
            return Err(ParseError::new(
                word.at.clone(),
                message,
                "give it once".to_owned(),
            ));
        }
        let (text, at) = match (argument.form, value) {
            (Form::Flag, None) => (String::new(), word.at.clone()),
            (Form::Flag, Some(_)) => {
                let message = format!("{name} takes no value");
                let hint = format!("write {name} alone");
                return Err(ParseError::new(word.at.clone(), message, hint));
            }
            (_, Some(value)) => {
                let start = word.at.start + name.chars().count() + 1;
                let start = start.min(word.at.end);
                (value.to_owned(), start..word.at.end)
            }
            (_, None) => match more.next() {
                Some(next) => (next.text.clone(), next.at.clone()),
                None => {
                    let message = format!("{name} needs a value");
                    return Err(ParseError::new(
                        end..end,
                        message,
                        argument.about.to_owned(),
                    ));
                }
            },
        };
        if argument.form == Form::Option {
            check(argument, &text, &at)?;
        }
        self.options.push(Given { argument, text });
        Ok(())
    }

    fn vm(&self) -> String {
        let named = self.by_place.iter().find(|(a, _)| a.kind == Kind::Vm);
        named.map(|(_, word)| word.text.clone()).unwrap_or_default()
    }

    fn given(&self, name: &str) -> Option<&Given> {
        self.options.iter().find(|g| g.argument.name == name)
    }

    fn number(&self, name: &str) -> Option<u32> {
        self.given(name)?.text.parse().ok()
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(self.given(name)?.text.clone())
    }
}

fn article(argument: &Argument) -> String {
    match argument.kind {
        Kind::Vm => "the name of a VM".to_owned(),
        Kind::Pool => "the name of a CPU pool".to_owned(),
        Kind::Number(..)
        | Kind::Numbers
        | Kind::Time(..)
        | Kind::Reservation
        | Kind::Settings
        | Kind::Choice(_)
        | Kind::Verb => argument.name.to_owned(),
    }
}

/// Whether a value is one that the argument takes.
fn check(argument: &Argument, text: &str, at: &Range<usize>) -> Result<(), ParseError> {
    let bad = |what: String, hint: &str| Err(ParseError::new(at.clone(), what, hint.to_owned()));
    let value = shown(text);
    match argument.kind {
        Kind::Vm if !config::is_vm_name(text) => bad(
            format!("{value} cannot be the name of a VM"),
            "names are 1 to 32 of a to z, 0 to 9 and -",
        ),
        Kind::Pool if !config::is_vm_name(text) => bad(
            format!("{value} cannot be the name of a CPU pool"),
            "sched show lists those that there are",
        ),
        Kind::Time(min, max) => match config::duration_us(text) {
            Some(us) if (min..=max).contains(&us) => Ok(()),
            _ => bad(
                format!("{value} does not fit {}", argument.name),
                &format!(
                    "a number with us, ms or s, as 10ms; from {} to {}",
                    config::time(min),
                    config::time(max)
                ),
            ),
        },
        Kind::Reservation if reservation_us(text).is_none() => bad(
            format!("{value} is no reservation"),
            &format!(
                "a budget of at least {} in a period of {} to {}, as 2ms/10ms, or none",
                config::time(config::MIN_BUDGET_US),
                config::time(*config::PERIODS_US.start()),
                config::time(*config::PERIODS_US.end())
            ),
        ),
        Kind::Number(min, max) => {
            let number = text.parse::<u32>().ok();
            if number.is_some_and(|n| (min..=max).contains(&n)) {
                return Ok(());
            }
            let allowed = match max {
                u32::MAX => format!("a whole number from {min} on"),
                max => format!("a whole number from {min} to {max}"),
            };
            bad(format!("{value} does not fit {}", argument.name), &allowed)
        }
        Kind::Numbers if numbers(text).is_none() => bad(
            format!("{value} is no list of processors"),
            "numbers below 1024 and ranges of them, as 0-2,5, or all",
        ),
        Kind::Settings => check_setting(text, at),
        Kind::Choice(words) if !words.contains(&text) => bad(
            format!("{value} does not fit {}", argument.name),
            &meant(text, words.iter().copied()),
        ),
        Kind::Vm
        | Kind::Pool
        | Kind::Numbers
        | Kind::Reservation
        | Kind::Choice(_)
        | Kind::Verb => Ok(()),
    }
}

fn check_setting(text: &str, at: &Range<usize>) -> Result<(), ParseError> {
    let key = text.split_once('=').map(|(key, _)| key);
    let fits = |key: &str| {
        let parts = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        key.split('.').all(parts)
    };
    match key {
        Some(key) if fits(key) => Ok(()),
        _ => Err(ParseError::new(
            at.clone(),
            format!("{} is no setting", shown(text)),
            "write KEY=VALUE, as memory=64M or boot.kernel=stub".to_owned(),
        )),
    }
}

/// Most host processors that an affinity names.
const MAX_NUMBERS: u32 = 1024;

/// `0-2,5` as numbers; `all` is none.
fn numbers(text: &str) -> Option<Vec<u32>> {
    if text == "all" {
        return Some(Vec::new());
    }
    let mut all = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_NUMBERS {
            return None;
        }
        all.extend(first..=last);
    }
    all.sort_unstable();
    all.dedup();
    Some(all)
}

/// `2ms/10ms` as budget and period in microseconds; `none` is a budget of 0.
fn reservation_us(text: &str) -> Option<(u64, u64)> {
    if text == "none" {
        return Some((0, 0));
    }
    let (budget, period) = text.split_once('/')?;
    let (budget, period) = (config::duration_us(budget)?, config::duration_us(period)?);
    config::is_reservation(budget, period).then_some((budget, period))
}

fn command(verb: &Verb, values: &Values<'_>, end: usize) -> Result<Command, ParseError> {
    let vm = values.vm();
    let request = match verb.id {
        VerbId::VmList => Request::VmList {},
        VerbId::VmShow => Request::VmShow { vm },
        VerbId::VmCreate => Request::VmCreate {
            config: section(verb, values, end)?,
        },
        VerbId::VmStart => Request::VmStart { vm },
        VerbId::VmStop => Request::VmStop {
            vm,
            timeout_s: values.number("--timeout"),
        },
        VerbId::VmPause => Request::VmPause { vm },
        VerbId::VmResume => Request::VmResume { vm },
        VerbId::VmReset => Request::VmReset { vm },
        VerbId::VmDestroy => Request::VmDestroy {
            vm,
            force: values.given("--force").is_some(),
        },
        VerbId::VmConsole => return Ok(Command::Console(vm)),
        VerbId::InjectNmi => Request::InjectNmi {
            vm,
            vcpu: values.number("--vcpu").and_then(|n| n.try_into().ok()),
        },
        VerbId::HostShow => Request::HostShow {},
        VerbId::HostPowerOff => Request::HostPowerOff {},
        VerbId::SchedShow => Request::SchedShow {},
        VerbId::SchedSet => {
            let change = SchedChange {
                weight: values.number("--weight"),
                cap: values.number("--cap"),
                priority: values.number("--priority").and_then(|n| n.try_into().ok()),
                affinity: values.given("--affinity").and_then(|g| numbers(&g.text)),
                pool: values.text("--pool"),
                reservation_us: values
                    .given("--reservation")
                    .and_then(|g| reservation_us(&g.text)),
            };
            if change == SchedChange::default() {
                return Err(nothing_to_change(verb, end));
            }
            Request::SchedSet { vm, change }
        }
        VerbId::PoolSet => {
            let pool = values.by_place.first();
            let policy = values.text("--policy");
            let slice = values.text("--slice");
            if policy.is_none() && slice.is_none() {
                return Err(nothing_to_change(verb, end));
            }
            Request::PoolSet {
                pool: pool.map(|(_, word)| word.text.clone()).unwrap_or_default(),
                policy,
                slice_us: slice.and_then(|text| config::duration_us(&text)),
            }
        }
        VerbId::Stats => Request::Stats {
            vm: values.by_place.first().map(|(_, word)| word.text.clone()),
        },
        VerbId::Log => {
            let lines = values.number("--lines").unwrap_or(DEFAULT_LOG_LINES);
            if values.given("--follow").is_some() {
                return Ok(Command::Follow(lines));
            }
            Request::Log {
                after: None,
                lines: Some(lines),
            }
        }
        VerbId::TraceStart => Request::TraceStart {
            exits: values.given("--no-exits").map(|_| false),
        },
        VerbId::TraceStop => Request::TraceStop {},
        VerbId::TraceShow => Request::TraceShow {},
        VerbId::Top => {
            let key = values.given("--sort").map_or(SORT_KEYS[0], |g| &g.text);
            return Ok(Command::Top(Sort::named(key).unwrap_or_default()));
        }
        VerbId::Help => {
            let words: Vec<_> = values.by_place.iter().map(|(_, word)| *word).collect();
            return help(&words);
        }
        VerbId::Exit => return Ok(Command::Exit),
    };
    Ok(Command::Request(request))
}

fn nothing_to_change(verb: &Verb, end: usize) -> ParseError {
    let message = "nothing is to be changed".to_owned();
    let hint = format!("it is written: {}", verb.usage());
    ParseError::new(end..end, message, hint)
}

/// Finds what help is wanted about.
fn help(words: &[&Word]) -> Result<Command, ParseError> {
    let mut known: Vec<&str> = Vec::new();
    for word in words {
        let depth = known.len();
        let next = beginning_with(&known).filter_map(|verb| verb.words.get(depth).copied());
        let next: Vec<_> = next.collect();
        match next.iter().find(|candidate| **candidate == word.text) {
            Some(candidate) => known.push(candidate),
            None => {
                let message = format!("there is no help about {}", shown(&word.text));
                let hint = match next.is_empty() {
                    true => format!("write: help {}", known.join(" ")),
                    false => meant(&word.text, next.iter().copied()),
                };
                return Err(ParseError::new(word.at.clone(), message, hint));
            }
        }
    }
    Ok(Command::Help(
        known.iter().map(ToString::to_string).collect(),
    ))
}

/// The `[[vm]]` section that settings describe.
fn section(verb: &Verb, values: &Values<'_>, end: usize) -> Result<String, ParseError> {
    let mut keys: Vec<&str> = Vec::new();
    let mut text = "[[vm]]\n".to_owned();
    for (_, word) in &values.by_place {
        let (key, value) = word.text.split_once('=').unwrap_or((&word.text, ""));
        if keys.contains(&key) {
            let message = format!("{key} is there already");
            let hint = "give it once".to_owned();
            return Err(ParseError::new(word.at.clone(), message, hint));
        }
        keys.push(key);
        text += &format!("{key} = {}\n", toml_value(key, value));
    }
    if !keys.contains(&"name") {
        let message = "the VM has no name".to_owned();
        let hint = format!("it is written: {}, one of them name=NAME", verb.usage());
        return Err(ParseError::new(end..end, message, hint));
    }
    Ok(text)
}

/// A value as TOML: what is a number, a truth value, a list or a table stays, the rest is a string.
fn toml_value(key: &str, value: &str) -> String {
    let is_number = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    let is_other = matches!(value, "true" | "false") || value.starts_with(['[', '{']);
    if key != "name" && (is_number || is_other) {
        return value.to_owned();
    }
    let mut text = "\"".to_owned();
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => text += &format!("\\u{:04x}", u32::from(c)),
            c => text.push(c),
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(line: &str) -> Request {
        match parse(line).unwrap().command {
            Command::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lines_become_requests() {
        assert_eq!(request("vm list"), Request::VmList {});
        let vm = || "web".to_owned();
        assert_eq!(
            request("vm stop web --timeout 5"),
            Request::VmStop {
                vm: vm(),
                timeout_s: Some(5)
            }
        );
        assert_eq!(
            request("vm stop --timeout=5 web"),
            Request::VmStop {
                vm: vm(),
                timeout_s: Some(5)
            }
        );
        assert_eq!(
            request("vm destroy web --force"),
            Request::VmDestroy {
                vm: vm(),
                force: true
            }
        );
        assert_eq!(
            request("inject nmi web --vcpu 3"),
            Request::InjectNmi {
                vm: vm(),
                vcpu: Some(3)
            }
        );
        assert_eq!(
            request("sched set web --weight 7 --affinity 0-1,3"),
            Request::SchedSet {
                vm: vm(),
                change: SchedChange {
                    weight: Some(7),
                    affinity: Some(Vec::from([0, 1, 3])),
                    ..SchedChange::default()
                }
            }
        );
        let change = |line: &str| match request(line) {
            Request::SchedSet { change, .. } => (change.pool, change.reservation_us),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            change("sched set web --pool rt --reservation 2ms/1s"),
            (Some("rt".to_owned()), Some((2_000, 1_000_000)))
        );
        assert_eq!(
            change("sched set web --reservation none"),
            (None, Some((0, 0)))
        );
        assert_eq!(
            request("pool set default --slice=500us --policy fcfs"),
            Request::PoolSet {
                pool: "default".to_owned(),
                policy: Some("fcfs".to_owned()),
                slice_us: Some(500)
            }
        );
        assert_eq!(request("stats"), Request::Stats { vm: None });
        assert_eq!(request("stats web"), Request::Stats { vm: Some(vm()) });
        assert_eq!(parse("stats web").unwrap().vm.unwrap().at, 6..9);
        assert_eq!(
            request("log --lines 3"),
            Request::Log {
                after: None,
                lines: Some(3)
            }
        );
        assert_eq!(
            parse("vm console web").unwrap().command,
            Command::Console(vm())
        );
        assert_eq!(
            parse("top --sort wait").unwrap().command,
            Command::Top(Sort::Wait)
        );
        assert_eq!(
            parse("log --follow --lines 3").unwrap().command,
            Command::Follow(3)
        );
        assert_eq!(parse("  ").unwrap().command, Command::Nothing);
        assert_eq!(parse("exit").unwrap().command, Command::Exit);
        assert_eq!(parse("vm show web").unwrap().vm.unwrap().at, 8..11);
    }

    #[test]
    fn a_vm_is_described_by_settings() {
        let line = r#"vm create name=7 memory=64M vcpus=2 console=true boot.kernel=stub boot.cmdline="a \"b\"" "#;
        assert_eq!(
            request(line),
            Request::VmCreate {
                config: "[[vm]]\nname = \"7\"\nmemory = \"64M\"\nvcpus = 2\nconsole = true\n\
                         boot.kernel = \"stub\"\nboot.cmdline = \"a \\\"b\\\"\"\n"
                    .to_owned()
            }
        );
    }

    #[test]
    fn what_settings_say_is_what_the_configuration_reads() {
        let Request::VmCreate { config } =
            request("vm create name=web memory=64M vcpus=2 boot.kernel=stub boot.cmdline='x y'")
        else {
            panic!("no creation");
        };
        let config = config::parse("web", config.as_bytes());
        assert!(config.problems.is_empty(), "{}", config.report());
        assert_eq!((config.vms[0].vcpus, config.vms[0].memory), (2, 64 << 20));
        assert_eq!(config.vms[0].boot.cmdline, "x y");
    }

    /// A line, the characters that its error points at, and words of its text.
    #[test]
    fn errors_say_what_where_and_what_to_do() {
        for (line, at, words) in [
            (
                "vm strt web",
                3..7,
                "vm has no \"strt\": did you mean \"start\"?",
            ),
            ("wm list", 0..2, "no verb \"wm\": did you mean \"vm\"?"),
            ("start web", 0..5, "did you mean \"vm start\"?"),
            ("vm", 2..2, "vm needs another word: one of list, show,"),
            ("frobnicate", 0..10, "one of vm, inject, host,"),
            (
                "vm show",
                7..7,
                "needs the name of a VM: it is written: vm show VM",
            ),
            (
                "vm show a b",
                10..11,
                "\"b\" is too much here: it is written: vm show VM",
            ),
            (
                "stats a b",
                8..9,
                "\"b\" is too much here: it is written: stats [VM]",
            ),
            ("vm show Web", 8..11, "names are 1 to 32 of a to z"),
            ("vm stop web --timeout 3601", 22..26, "from 0 to 3600"),
            (
                "vm stop web --timeout=x",
                22..23,
                "\"x\" does not fit --timeout",
            ),
            ("vm stop web --timeout", 21..21, "--timeout needs a value"),
            (
                "vm stop web --tineout 1",
                12..21,
                "did you mean \"--timeout\"?",
            ),
            (
                "vm list --force",
                8..15,
                "no option \"--force\": it takes none",
            ),
            ("vm destroy web --force=1", 15..24, "--force takes no value"),
            (
                "vm stop a --timeout 1 --timeout 2",
                22..31,
                "is there already",
            ),
            ("sched set web", 13..13, "nothing is to be changed"),
            (
                "sched set web --affinity 2-1",
                25..28,
                "is no list of processors",
            ),
            ("sched set web --weight -1", 23..25, "from 1 to 10000"),
            (
                "sched set web --reservation 2ms",
                28..31,
                "a budget of at least 100 us in a period of 1 ms to 10 s, as 2ms/10ms, or none",
            ),
            (
                "sched set web --reservation=11ms/10ms",
                28..37,
                "\"11ms/10ms\" is no reservation",
            ),
            (
                "pool set default --slice 1",
                25..26,
                "a number with us, ms or s, as 10ms; from 500 us to 100 ms",
            ),
            ("pool set default", 16..16, "nothing is to be changed"),
            (
                "pool set default --policy round",
                26..31,
                "does not fit --policy: one of fair, round-robin,",
            ),
            (
                "pool set --slice 1ms",
                20..20,
                "needs the name of a CPU pool",
            ),
            ("top --sort cpi", 11..14, "did you mean \"cpu\"?"),
            ("help vm strat", 8..13, "did you mean \"start\"?"),
            ("help exit now", 10..13, "write: help exit"),
            ("vm create memory=64M", 20..20, "the VM has no name"),
            ("vm create name", 10..14, "write KEY=VALUE"),
            ("vm create name=a name=b", 17..23, "name is there already"),
            (
                "vm show 'web",
                8..9,
                "this quote is not closed: end it with '",
            ),
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.at, at, "{line}: {error}");
            assert!(error.to_string().contains(words), "{line}: {error}");
        }
    }

    #[test]
    fn the_mark_stands_under_the_word() {
        let error = parse("vm strt web").unwrap_err();
        assert_eq!(
            error.render("vm strt web"),
            "  vm strt web\n     ^^^^\nerror: vm has no \"strt\": did you mean \"start\"?\n"
        );
    }

    #[test]
    fn of_a_long_line_the_part_around_the_mark_is_shown() {
        let line = format!("vm create name=a {} oops", "k=v ".repeat(50));
        let error = parse(&line).unwrap_err();
        let text = error.render(&line);
        assert!(
            text.lines().all(|line| line.chars().count() <= 100),
            "{text}"
        );
        let endless = "x".repeat(1000);
        let text = parse(&endless).unwrap_err().render(&endless);
        let rows: Vec<_> = text.lines().map(str::len).collect();
        assert_eq!(rows[..2], [74, 74], "{text}");
    }

    #[test]
    fn every_verb_can_be_written() {
        for verb in VERBS {
            let mut line = verb.name();
            for argument in verb.arguments {
                line += &match (argument.form, argument.kind) {
                    (Form::Flag, _) => format!(" {}", argument.name),
                    (Form::Option, Kind::Number(min, _)) => format!(" {} {min}", argument.name),
                    (Form::Option, Kind::Choice(words)) => {
                        format!(" {} {}", argument.name, words[0])
                    }
                    (Form::Option, Kind::Time(..)) => format!(" {} 1ms", argument.name),
                    (Form::Option, Kind::Reservation) => format!(" {} 1ms/9ms", argument.name),
                    (Form::Option, _) => format!(" {} 0-1", argument.name),
                    (_, Kind::Settings) => " name=a".to_owned(),
                    (_, Kind::Verb) => String::new(),
                    _ => " a".to_owned(),
                };
            }
            assert!(parse(&line).is_ok(), "{line}: {:?}", parse(&line));
        }
    }

    proptest! {
        #[test]
        fn any_line_is_understood_or_refused(line in "\\PC{0,60}|(vm|sched|log|help|top|--[a-z]+|[a-z]+=|[\"' =0-9a-z-]){0,12}") {
            if let Err(error) = parse(&line) {
                prop_assert!(error.at.start <= error.at.end);
                prop_assert!(error.at.end <= line.chars().count());
                prop_assert!(error.render(&line).lines().count() >= 3);
            }
        }

        #[test]
        fn names_and_places_survive(name in "[a-z0-9-]{1,32}") {
            prop_assume!(!name.starts_with("--"));
            let parsed = parse(&format!("vm show {name}")).unwrap();
            prop_assert_eq!(parsed.command, Command::Request(Request::VmShow { vm: name }));
        }
    }
}
