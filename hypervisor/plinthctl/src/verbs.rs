//! What the program does for each verb.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use clap::ArgMatches;
use manage::{
    command::{Answer, HostStats, Request, VmDetails, VmState},
    follow::{self, Follow},
    shell::{self, Command, VerbId},
    table,
    top::{PERIOD_NS, Sort, Top},
};

use crate::{
    Error, Exit, Terminal,
    address::Address,
    cli,
    client::{Client, refused},
    completion, trace,
};

/// How often `--wait` looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Clears the terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Does what the arguments say.
///
/// # Errors
/// With the status with which the program ends.
pub fn execute(matches: &ArgMatches, terminal: &mut Terminal<'_>) -> Result<(), Error> {
    match matches.subcommand() {
        Some(("completions", own)) => return completions(own, terminal),
        Some((cli::COMPLETE_NAMES, own)) => return complete_names(own, terminal),
        _ => {}
    }
    let Some((verb, own)) = cli::asked(matches) else {
        let Some(("trace", own)) = matches.subcommand() else {
            return Err(Error::new(Exit::Usage, "there is no such verb"));
        };
        return trace::write(&mut connect(matches)?, own, terminal);
    };
    let command = match own.try_get_one::<String>("file").ok().flatten() {
        Some(path) => Command::Request(Request::VmCreate {
            config: fs::read_to_string(path)
                .map_err(|e| Error::new(Exit::File, format!("{path}: {e}")))?,
        }),
        None => parse(&cli::words(verb, own))?,
    };
    let mut client = connect(matches)?;
    let json = matches.get_flag("json");
    match command {
        Command::Top(sort) => {
            let count = own.get_one::<u32>("count").copied();
            top(&mut client, sort, count, json, terminal)
        }
        Command::Request(request) => {
            show(&mut client, &request, json, terminal)?;
            let wait = own.try_get_one::<u32>("wait").ok().flatten();
            match (wait, &request) {
                (Some(&seconds), Request::VmStart { vm } | Request::VmStop { vm, .. }) => {
                    let runs = verb.id == VerbId::VmStart;
                    wait_for(&mut client, vm, runs, Duration::from_secs(seconds.into()))
                }
                _ => Ok(()),
            }
        }
        Command::Follow(lines) => follow(&mut client, lines, json, terminal),
        Command::Nothing | Command::Console(_) | Command::Help(_) | Command::Exit => {
            Err(Error::new(Exit::Usage, "this is for the host's own shell"))
        }
    }
}

fn completions(matches: &ArgMatches, terminal: &mut Terminal<'_>) -> Result<(), Error> {
    let Some(&shell) = matches.get_one::<clap_complete::Shell>("shell") else {
        return Err(Error::new(Exit::Usage, "which shell?"));
    };
    let text = completion::script(shell);
    terminal.out.write_all(&text).map_err(|e| Error::output(&e))
}

/// What a shell's script asks for: see [`completion::names`].
fn complete_names(matches: &ArgMatches, terminal: &mut Terminal<'_>) -> Result<(), Error> {
    let line = matches.get_one::<String>("line");
    let names = line.map_or_else(Vec::new, |line| completion::names(line));
    let lines = names.into_iter().map(|name| name + "\n");
    print(terminal, &lines.collect::<String>())
}

/// Words as the shell understands them.
fn parse(words: &[String]) -> Result<Command, Error> {
    let (line, words) = shell::joined(words);
    let parsed = shell::parse_words(&words, line.chars().count())
        .map_err(|error| Error::new(Exit::Usage, error.to_string()))?;
    Ok(parsed.command)
}

/// Where the host is, if the arguments say this of it.
///
/// # Errors
/// It is no address.
pub fn address(given: Option<String>) -> Result<Address, Error> {
    given
        .or_else(|| std::env::var(cli::ADDRESS_VARIABLE).ok())
        .unwrap_or_else(|| format!("unix:{}", cli::DEFAULT_ADDRESS))
        .parse()
}

fn connect(matches: &ArgMatches) -> Result<Client, Error> {
    let address = address(matches.get_one::<String>("connect").cloned())?;
    let seconds = matches.get_one::<u32>("timeout-answer").copied();
    let timeout = Duration::from_secs(seconds.unwrap_or(10).into());
    Client::connect(&address, timeout).map(|(client, _)| client)
}

/// Asks; a refusal is an error.
///
/// # Errors
/// There is no answer, or it is a refusal.
pub fn ask(client: &mut Client, request: &Request) -> Result<Answer, Error> {
    client.ask(request)?.map_err(refused)
}

/// Asks, and prints what comes of it.
fn show(
    client: &mut Client,
    request: &Request,
    json: bool,
    terminal: &mut Terminal<'_>,
) -> Result<(), Error> {
    let outcome = client.ask(request)?;
    if !json {
        let answer = outcome.map_err(refused)?;
        return print(terminal, &table::answer(&answer));
    }
    // A program reads the refusal where it reads answers.
    let text = match &outcome {
        Ok(answer) => serde_json::to_string(answer),
        Err(failure) => serde_json::to_string(failure),
    };
    let text = text.map_err(|e| Error::new(Exit::Protocol, e.to_string()))?;
    print(terminal, &(text + "\n"))?;
    match outcome {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(Exit::Refused, "")),
    }
}

fn print(terminal: &mut Terminal<'_>, text: &str) -> Result<(), Error> {
    let written = terminal.out.write_all(text.as_bytes());
    written
        .and_then(|()| terminal.out.flush())
        .map_err(|e| Error::output(&e))
}

fn vm(client: &mut Client, name: &str) -> Result<VmDetails, Error> {
    match ask(
        client,
        &Request::VmShow {
            vm: name.to_owned(),
        },
    )? {
        Answer::Vm { vm } => Ok(vm),
        _ => Err(Error::new(
            Exit::Protocol,
            "the host answers something else",
        )),
    }
}

/// Waits until a VM runs, or until it is off.
fn wait_for(client: &mut Client, name: &str, runs: bool, limit: Duration) -> Result<(), Error> {
    let deadline = Instant::now() + limit;
    loop {
        let vm = vm(client, name)?;
        let another = match vm.summary.state {
            VmState::Running | VmState::Paused if runs => return Ok(()),
            VmState::Off if !runs => return Ok(()),
            VmState::Starting | VmState::Stopping | VmState::Ending => false,
            // It has ended already, or somebody else has started it.
            VmState::Off | VmState::Waiting => runs,
            VmState::Running | VmState::Paused => false,
        };
        let state = table::state(vm.summary.state);
        if another {
            let why = vm
                .summary
                .last_end
                .map_or(String::new(), |end| format!(": {end}"));
            let text = format!("{name} is {state}{why}");
            return Err(Error::new(Exit::Refused, table::printable(&text)));
        }
        if Instant::now() >= deadline {
            let text = format!("{name} is still {state} after {} s", limit.as_secs());
            return Err(Error::new(Exit::Timeout, text));
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The newest lines of the log, and then those that come, until the program is ended.
fn follow(
    client: &mut Client,
    lines: u32,
    json: bool,
    terminal: &mut Terminal<'_>,
) -> Result<(), Error> {
    let mut follow = Follow::new(lines);
    loop {
        let answer = ask(client, &follow.request())?;
        let lines = follow.new_lines(answer);
        let lines =
            lines.ok_or_else(|| Error::new(Exit::Protocol, "the host answers something else"))?;
        if !lines.is_empty() {
            let answer = Answer::Log { lines };
            let text = match json {
                false => table::answer(&answer),
                true => {
                    let text = serde_json::to_string(&answer);
                    text.map_err(|e| Error::new(Exit::Protocol, e.to_string()))? + "\n"
                }
            };
            print(terminal, &text)?;
        }
        thread::sleep(Duration::from_nanos(follow::PERIOD_NS));
    }
}

/// The live view, or its figures.
fn top(
    client: &mut Client,
    sort: Sort,
    count: Option<u32>,
    json: bool,
    terminal: &mut Terminal<'_>,
) -> Result<(), Error> {
    let mut view = Top::new(sort);
    let mut shown = 0;
    loop {
        let stats: HostStats = match ask(client, &Request::Stats { vm: None })? {
            Answer::Stats { stats } => stats,
            _ => {
                return Err(Error::new(
                    Exit::Protocol,
                    "the host answers something else",
                ));
            }
        };
        let text = if json {
            let text = serde_json::to_string(&stats);
            text.map_err(|e| Error::new(Exit::Protocol, e.to_string()))? + "\n"
        } else {
            let clear = if terminal.is_terminal { CLEAR } else { "" };
            format!("{clear}{}\n", view.update(stats).join("\n"))
        };
        print(terminal, &text)?;
        shown += 1;
        if count.is_some_and(|count| shown >= count) {
            return Ok(());
        }
        thread::sleep(Duration::from_nanos(PERIOD_NS));
    }
}
