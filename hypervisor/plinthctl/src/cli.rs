//! The command line, made from the shell's table of verbs.

use std::ops::RangeInclusive;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use clap_complete::Shell;
use manage::shell::{Argument, Form, Kind, VERBS, Verb, VerbId};

/// Environment variable with the address, where `--connect` does not say it.
pub const ADDRESS_VARIABLE: &str = "PLINTH_CONTROL";
/// The address where neither says it: where `cargo xtask run` puts the socket.
pub const DEFAULT_ADDRESS: &str = "target/plinth-control.sock";
/// What the scripts of shells call; not one of the verbs that people are shown.
pub const COMPLETE_NAMES: &str = "complete-names";
/// Seconds that `--wait` waits, unless it says.
const DEFAULT_WAIT_S: &str = "60";

const AFTER_HELP: &str = "\
Exit status: 0 done; 1 refused by the host, or --wait saw another end; 2 wrong arguments; 3 no connection;
4 time limit; 5 the other end is no Plinth of this version; 6 a file could not be read or written.

Examples:
  plinthctl vm list
  plinthctl --connect tty:/dev/ttyUSB0,115200 vm stop web --timeout 10 --wait
  plinthctl --connect tcp:console-server:7001 --json stats
  plinthctl trace -o trace.json --seconds 2";

/// Verbs that only a terminal at the host has.
fn is_remote(verb: &Verb) -> bool {
    !matches!(verb.id, VerbId::VmConsole | VerbId::Help | VerbId::Exit)
}

/// The verbs that can be asked for from here.
pub fn verbs() -> impl Iterator<Item = &'static Verb> {
    VERBS.iter().filter(|verb| is_remote(verb))
}

/// What reads the command line: [`command`], and what the scripts of shells call.
pub fn parser() -> Command {
    // The line may begin with a dash, or be anything.
    let line = Arg::new("line").required(true).allow_hyphen_values(true);
    let names = Command::new(COMPLETE_NAMES).hide(true).arg(line);
    command().subcommand(names)
}

/// The command line, as it is shown and completed.
pub fn command() -> Command {
    let mut command = Command::new("plinthctl")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Operates a Plinth host over its control channel")
        .after_help(AFTER_HELP)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .infer_subcommands(false)
        .arg(
            Arg::new("connect")
                .long("connect")
                .short('c')
                .global(true)
                .value_name("ADDRESS")
                .help(format!(
                    "unix:PATH, tty:PATH[,SPEED] or tcp:HOST:PORT [default: ${ADDRESS_VARIABLE}, \
                     or unix:{DEFAULT_ADDRESS}]"
                )),
        )
        .arg(
            Arg::new("timeout-answer")
                .long("answer-timeout")
                .global(true)
                .value_name("SECONDS")
                .value_parser(whole(1..=3600))
                .default_value("10")
                .help("How long to wait for an answer"),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .global(true)
                .action(ArgAction::SetTrue)
                .help("Print what the host sends, as JSON, instead of tables"),
        );
    let mut groups: Vec<&str> = Vec::new();
    for verb in verbs() {
        match verb.words {
            [single] => command = command.subcommand(of_verb(verb, single)),
            [group, ..] if !groups.contains(group) => {
                groups.push(group);
                command = command.subcommand(of_group(group));
            }
            _ => {}
        }
    }
    command.subcommand(
        Command::new("completions")
            .about("Print what makes a shell complete plinthctl's arguments")
            .arg(
                Arg::new("shell")
                    .value_name("SHELL")
                    .required(true)
                    .value_parser(value_parser!(Shell)),
            ),
    )
}

/// The verbs with the same first word.
fn of_group(group: &'static str) -> Command {
    let verbs = verbs().filter(|verb| verb.words[0] == group);
    let subcommands = verbs.map(|verb| of_verb(verb, verb.words[1]));
    let command = Command::new(group).subcommands(subcommands);
    if group == "trace" {
        return trace(command);
    }
    let about = match group {
        "vm" => "Virtual machines",
        "inject" => "Send a vCPU an event",
        "host" => "The machine",
        "sched" => "The scheduler",
        "pool" => "CPU pools",
        _ => "More verbs",
    };
    command
        .about(about)
        .subcommand_required(true)
        .arg_required_else_help(true)
}

/// `trace` by itself records and writes a file.
fn trace(command: Command) -> Command {
    command
        .about("Record what the host's processors do, as a file for Perfetto (ui.perfetto.dev)")
        .subcommand_negates_reqs(true)
        .args_conflicts_with_subcommands(true)
        .arg(
            Arg::new("output")
                .short('o')
                .long("output")
                .value_name("FILE")
                .required(true)
                .help("Write the trace to this file; - is the standard output"),
        )
        .arg(
            Arg::new("seconds")
                .long("seconds")
                .value_name("N")
                .default_value("1")
                .value_parser(whole(1..=3600))
                .help("Record for so long"),
        )
        .arg(
            Arg::new("no-exits")
                .long("no-exits")
                .action(ArgAction::SetTrue)
                .help("Leave exits and entries out: a longer time fits"),
        )
        .arg(
            Arg::new("recorded")
                .long("recorded")
                .action(ArgAction::SetTrue)
                .conflicts_with_all(["seconds", "no-exits"])
                .help("Start nothing: write what was recorded"),
        )
}

/// What the shell's option is called here.
fn id(argument: &Argument) -> &'static str {
    argument.name.trim_start_matches('-')
}

fn of_verb(verb: &'static Verb, name: &'static str) -> Command {
    let mut command = Command::new(name).about(verb.summary);
    if !verb.details.is_empty() {
        command = command.after_help(verb.details);
    }
    for argument in verb.arguments {
        // The words that there are to choose from are listed behind the help.
        let help = match argument.kind {
            Kind::Choice(_) => argument.about.to_owned(),
            _ => argument.explained(),
        };
        let arg = Arg::new(id(argument)).help(help);
        let arg = match argument.form {
            Form::Required => arg.value_name(argument.name).required(true),
            Form::Optional => arg.value_name(argument.name),
            Form::Repeated => arg
                .value_name(argument.name)
                .action(ArgAction::Append)
                .num_args(0..),
            Form::Option => arg.long(id(argument)).value_name(argument.value_name()),
            Form::Flag => arg.long(id(argument)).action(ArgAction::SetTrue),
        };
        let arg = match (argument.form, argument.kind) {
            (Form::Flag, _) => arg,
            (_, Kind::Choice(words)) => arg.value_parser(words.to_vec()),
            _ => arg,
        };
        command = command.arg(arg);
    }
    match verb.id {
        VerbId::VmStart => command.arg(wait("the VM runs")),
        VerbId::VmStop => command.arg(wait("the VM is off")),
        VerbId::VmCreate => command.arg(
            Arg::new("file")
                .long("file")
                .value_name("FILE")
                .conflicts_with("KEY=VALUE")
                .help("Take the [[vm]] section from this file instead"),
        ),
        VerbId::Top => command.arg(
            Arg::new("count")
                .long("count")
                .value_name("N")
                .value_parser(whole(1..=u32::MAX))
                .help("End after so many views"),
        ),
        _ => command,
    }
}

/// Reads a number of this range; the error says which that is.
fn whole(
    range: RangeInclusive<u32>,
) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| match (range.start(), range.end()) {
            (from, &u32::MAX) => format!("write a whole number from {from} on"),
            (from, to) => format!("write a whole number from {from} to {to}"),
        })
    }
}

fn wait(until: &str) -> Arg {
    Arg::new("wait")
        .long("wait")
        .value_name("SECONDS")
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value(DEFAULT_WAIT_S)
        .value_parser(whole(1..=86_400))
        .help(format!(
            "Wait until {until}, for so long at most [{DEFAULT_WAIT_S}]"
        ))
}

/// The verb that was asked for, and its own matches; `None`: it is not one of the shell's.
pub fn asked(matches: &ArgMatches) -> Option<(&'static Verb, &ArgMatches)> {
    let (first, group) = matches.subcommand()?;
    let words: Vec<&str> = match group.subcommand_name() {
        Some(second) => vec![first, second],
        None => vec![first],
    };
    let verb = verbs().find(|verb| verb.words == words)?;
    let own = group.subcommand().map_or(group, |(_, own)| own);
    Some((verb, own))
}

/// What was asked for, as words of the shell.
pub fn words(verb: &Verb, matches: &ArgMatches) -> Vec<String> {
    let mut words: Vec<String> = verb.words.iter().map(ToString::to_string).collect();
    for argument in verb.arguments {
        let id = id(argument);
        match argument.form {
            Form::Flag => {
                if matches.get_flag(id) {
                    words.push(argument.name.to_owned());
                }
            }
            Form::Option => {
                if let Some(value) = matches.get_one::<String>(id) {
                    words.extend([argument.name.to_owned(), value.clone()]);
                }
            }
            Form::Required | Form::Optional | Form::Repeated => {
                let values = matches.get_many::<String>(id).into_iter().flatten();
                words.extend(values.cloned());
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use manage::{
        command::Request,
        shell::{self, parse_words},
    };

    fn request(line: &[&str]) -> Request {
        let args = ["plinthctl"].iter().chain(line);
        let matches = command().try_get_matches_from(args).unwrap();
        let (verb, own) = asked(&matches).unwrap();
        let (line, words) = shell::joined(&words(verb, own));
        match parse_words(&words, line.chars().count()).unwrap().command {
            shell::Command::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        parser().debug_assert();
        let help = parser().render_help().to_string();
        assert!(help.contains("completions") && !help.contains(COMPLETE_NAMES));
    }

    #[test]
    fn every_verb_of_the_shell_is_there() {
        for verb in VERBS.iter().filter(|verb| is_remote(verb)) {
            let mut all = command();
            let mut found = Some(&mut all);
            for word in verb.words {
                found = found.and_then(|command| command.find_subcommand_mut(word));
            }
            assert!(found.is_some(), "{}", verb.name());
        }
    }

    #[test]
    fn arguments_become_requests() {
        assert_eq!(
            request(&["vm", "stop", "web", "--timeout", "5", "--wait"]),
            Request::VmStop {
                vm: "web".into(),
                timeout_s: Some(5)
            }
        );
        assert_eq!(
            request(&["--json", "vm", "destroy", "--force", "web"]),
            Request::VmDestroy {
                vm: "web".into(),
                force: true
            }
        );
        assert_eq!(request(&["stats"]), Request::Stats { vm: None });
        let vm = Some("web".into());
        assert_eq!(request(&["--json", "stats", "web"]), Request::Stats { vm });
        assert_eq!(
            request(&["trace", "start", "--no-exits"]),
            Request::TraceStart { exits: Some(false) }
        );
        let Request::VmCreate { config } =
            request(&["vm", "create", "name=a", "memory=8M", "boot.cmdline=a b"])
        else {
            panic!("no request to create");
        };
        assert!(config.contains("boot.cmdline = \"a b\""), "{config}");
    }

    #[test]
    fn a_wrong_number_is_answered_with_its_range() {
        for (line, says) in [
            (
                &["top", "--count", "x"][..],
                "'x' for '--count <N>': write a whole number from 1 on",
            ),
            (
                &["vm", "stop", "web", "--wait=86401"],
                "write a whole number from 1 to 86400",
            ),
            (
                &["--answer-timeout", "0", "stats"],
                "write a whole number from 1 to 3600",
            ),
        ] {
            let args = ["plinthctl"].iter().chain(line);
            let error = command().try_get_matches_from(args).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for line in [
            &["vm"][..],
            &["vm", "lst"],
            &["vm", "show"],
            &["vm", "console", "web"],
            &["trace"],
            &["trace", "-o", "x", "start"],
            &["top", "--sort", "colour"],
            &["vm", "stop", "web", "--wait=0"],
            &["top", "--count", "0"],
            &["completions", "cobol"],
        ] {
            let args = ["plinthctl"].iter().chain(line);
            assert!(command().try_get_matches_from(args).is_err(), "{line:?}");
        }
    }
}
