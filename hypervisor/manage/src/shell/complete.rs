//! What could stand at the cursor: verbs, names of VMs, options, and their values.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};

use super::{
    verbs::{Form, Kind, Verb, beginning_with},
    words,
};

/// Keys of `[[vm]]` that a VM can be created with, as far as they are short to write.
const SETTINGS: &[&str] = &[
    "name=",
    "memory=",
    "vcpus=",
    "boot.kernel=",
    "boot.initrd=",
    "boot.cmdline=",
    "boot.firmware=",
    "restart=",
    "console=",
    "cpu=",
];

/// What the word at the cursor can become.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Characters of the word that are there already.
    pub typed: usize,
    /// What the whole word can be, sorted.
    pub candidates: Vec<String>,
}

impl Completion {
    /// What all candidates begin with, beyond what is typed.
    pub fn common(&self) -> &str {
        let Some(first) = self.candidates.first() else {
            return "";
        };
        let shared = |other: &String| {
            let same = first.bytes().zip(other.bytes()).take_while(|(a, b)| a == b);
            same.count()
        };
        let length = self.candidates.iter().map(shared).min().unwrap_or(0);
        first.get(self.typed..length).unwrap_or_default()
    }
}

/// The names of what there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Of VMs.
    pub vms: Vec<String>,
    /// Of CPU pools.
    pub pools: Vec<String>,
}

/// Completes what stands before the cursor.
pub fn complete(before: &str, names: &Names) -> Completion {
    // Within quotes there is nothing to complete.
    let Ok(words) = words::split(before) else {
        return Completion::default();
    };
    let mut words: Vec<&str> = words.iter().map(|word| word.text.as_str()).collect();
    let typed = match before.ends_with([' ', '\t']) || before.is_empty() {
        true => "",
        false => words.pop().unwrap_or_default(),
    };
    let mut candidates = candidates(&words, typed, names);
    candidates.retain(|candidate| candidate.starts_with(typed));
    candidates.sort();
    candidates.dedup();
    Completion {
        typed: typed.len(),
        candidates,
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn next_words(words: &[&str]) -> Vec<String> {
    let next = beginning_with(words).filter_map(|verb| verb.words.get(words.len()));
    next.map(|word| (*word).to_owned()).collect()
}

/// What stands at a place of a line.
enum Place<'w> {
    /// The next word of a verb.
    Word,
    /// A value, of which this is typed already.
    Value(Kind, &'w str),
    /// An option's name.
    Option(&'static Verb),
}

/// What the word behind `words` is, of which `typed` is there.
fn place<'w>(words: &[&str], typed: &'w str) -> Place<'w> {
    let verb = beginning_with(&[]).find(|verb| words.starts_with(verb.words));
    let Some(verb) = verb else {
        return Place::Word;
    };
    let given = &words[verb.words.len()..];
    // After an option comes its value.
    if let Some(option) = given.last().and_then(|word| verb.option(word))
        && option.form == Form::Option
    {
        return Place::Value(option.kind, typed);
    }
    if let Some((name, value)) = typed.split_once('=')
        && let Some(option) = verb.option(name)
    {
        return Place::Value(option.kind, value);
    }
    if typed.starts_with("--") {
        return Place::Option(verb);
    }
    let place = places(verb, given);
    let mut by_place = verb.positional();
    let argument = by_place
        .clone()
        .nth(place)
        .or_else(|| by_place.find(|argument| argument.form == Form::Repeated));
    match argument {
        Some(argument) => Place::Value(argument.kind, typed),
        None => Place::Option(verb),
    }
}

/// The kind of value that the word behind `words` is, of which `typed` is there, and what is there of the value. `None`: it is no value.
pub fn value_at<'w>(words: &[&str], typed: &'w str) -> Option<(Kind, &'w str)> {
    match place(words, typed) {
        Place::Value(kind, value) => Some((kind, value)),
        Place::Word | Place::Option(_) => None,
    }
}

fn candidates(words: &[&str], typed: &str, names: &Names) -> Vec<String> {
    match place(words, typed) {
        Place::Word => next_words(words),
        Place::Option(verb) => options(verb, words),
        Place::Value(kind, value) => {
            // An option's name and = stand before its value.
            let before = &typed[..typed.len() - value.len()];
            let values = values(kind, words, names).into_iter();
            values.map(|value| format!("{before}{value}")).collect()
        }
    }
}

/// Arguments by place that are there already.
fn places(verb: &Verb, given: &[&str]) -> usize {
    let mut words = given.iter();
    let mut places = 0;
    while let Some(word) = words.next() {
        match verb.option(word) {
            Some(option) if option.form == Form::Option => {
                words.next();
            }
            _ if word.starts_with("--") => {}
            _ => places += 1,
        }
    }
    places
}

fn options(verb: &Verb, given: &[&str]) -> Vec<String> {
    let options = verb
        .arguments
        .iter()
        .filter(|a| !a.is_by_place() && !given.contains(&a.name));
    options.map(|a| a.name.to_owned()).collect()
}

fn values(kind: Kind, words: &[&str], names: &Names) -> Vec<String> {
    match kind {
        Kind::Vm => names.vms.clone(),
        Kind::Pool => names.pools.clone(),
        Kind::Reservation => owned(&["none"]),
        Kind::Choice(words) => owned(words),
        Kind::Settings => owned(SETTINGS),
        // The words behind "help".
        Kind::Verb => next_words(words.get(1..).unwrap_or_default()),
        Kind::Number(..) | Kind::Numbers | Kind::Time(..) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn completed(before: &str) -> Vec<String> {
        let names = Names {
            vms: ["web", "web-2", "db"].map(String::from).into(),
            pools: ["default", "rt"].map(String::from).into(),
        };
        complete(before, &names).candidates
    }

    #[test]
    fn verbs_names_and_options_are_completed() {
        for (before, wanted) in [
            ("v", "vm"),
            ("vm st", "start stop"),
            ("vm stop ", "db web web-2"),
            ("vm stop w", "web web-2"),
            ("stats d", "db"),
            ("stats db ", ""),
            ("vm stop web ", "--timeout"),
            ("vm stop web --", "--timeout"),
            ("vm stop --timeout 3 d", "db"),
            ("vm stop --timeout ", ""),
            ("vm list ", ""),
            ("top --sort r", "response"),
            ("top --sort=c", "--sort=cpu"),
            ("sched set web --weight 3 --p", "--pool --priority"),
            ("sched set web --pool ", "default rt"),
            ("sched set web --pool=d", "--pool=default"),
            ("sched set web --reservation ", "none"),
            ("pool set r", "rt"),
            (
                "pool set rt --policy r",
                "requirement reservation round-robin",
            ),
            ("help vm re", "reset resume"),
            ("vm create name=a mem", "memory="),
            ("vm show 'w", ""),
            ("frob", ""),
        ] {
            assert_eq!(completed(before).join(" "), wanted, "{before:?}");
        }
    }

    #[test]
    fn what_candidates_share_is_found() {
        let vms = Names {
            vms: ["web", "web-2"].map(String::from).into(),
            pools: Vec::new(),
        };
        assert_eq!(complete("vm show w", &vms).common(), "eb");
        assert_eq!(complete("vm show web", &vms).common(), "");
        assert_eq!(complete("vm sh", &vms).common(), "ow");
    }

    proptest! {
        #[test]
        fn any_beginning_can_be_asked_about(before in "\\PC{0,40}|(vm |show |help |top |--[a-z]*|=| |w){0,8}") {
            let completion = complete(&before, &Names::default());
            let _ = completion.common();
        }
    }
}
