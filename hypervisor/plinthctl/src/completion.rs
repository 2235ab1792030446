//! What makes a shell complete plinthctl's arguments: clap's script, and the names of what there is on the host.
//!
//! The script that [`script`] makes calls plinthctl back, with the line before the cursor, wherever the name of a VM or of a CPU pool
//! may stand ([`names`]); what knows where that is is the host's own shell. That call is silent: where nobody answers within
//! [`PATIENCE`], or nothing is to be named, it prints nothing, and the shell goes on with the rest.

use std::{sync::mpsc, thread, time::Duration};

use clap_complete::Shell;
use manage::{
    command::{Answer, Request},
    config,
    shell::{self, Kind},
};

use crate::{Error, address::Address, cli, client::Client, verbs};

/// How long somebody who presses Tab waits for the host, at most.
const PATIENCE: Duration = Duration::from_secs(2);

/// What follows clap's script for bash. `<VM>` and the like, which clap offers in places of values, are no values.
const BASH: &str = r#"
_plinthctl_with_names() {
    local kept=() word
    _plinthctl "$@"
    for word in "${COMPREPLY[@]}"; do
        [[ $word == [\<\[]* ]] || kept+=("$word")
    done
    while IFS= read -r word; do
        kept+=("$word")
    done < <("$1" complete-names "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
    COMPREPLY=("${kept[@]}")
}
complete -o bashdefault -o default -F _plinthctl_with_names plinthctl
"#;

/// What clap's script for zsh has in places of values, and what comes there instead.
const ZSH_VALUE: [&str; 2] = [":_default' \\\n", ":_plinthctl_value' \\\n"];

/// The first line of the function in clap's script for zsh, which completes the whole line.
const ZSH_BEGINS: &str = "\n_plinthctl() {\n";

/// What comes in place of that line. What it keeps is seen by the functions that it calls, which change the words.
const ZSH: &str = r#"
_plinthctl_value() {
    local -a names
    names=(${(f)"$("$plinthctl_words[1]" complete-names "${(j: :)plinthctl_words}" 2>/dev/null)"})
    if (( $#names )); then
        compadd "$@" -a names
    else
        _default "$@"
    fi
}

_plinthctl() {
    local -a plinthctl_words
    plinthctl_words=("${(@)words[1,CURRENT-1]}" "$QIPREFIX$IPREFIX$PREFIX")
"#;

/// What follows clap's script for fish.
const FISH: &str = r#"
complete -c plinthctl -a "(command plinthctl complete-names (commandline -cp) 2>/dev/null)"
"#;

/// The script for a shell.
pub fn script(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), "plinthctl", &mut text);
    match shell {
        Shell::Bash => text.extend_from_slice(BASH.as_bytes()),
        Shell::Fish => text.extend_from_slice(FISH.as_bytes()),
        Shell::Zsh => text = with_names_in_zsh(&text).into_bytes(),
        _ => {}
    }
    text
}

/// clap's script for zsh, with names where it has values. It can be sourced, and be a file that zsh loads, as before.
fn with_names_in_zsh(script: &[u8]) -> String {
    let [default, names] = ZSH_VALUE;
    String::from_utf8_lossy(script)
        .replace(default, names)
        .replacen(ZSH_BEGINS, ZSH, 1)
}

/// The names that the word at the end of `line`, a command line up to the cursor, can become. None if none are wanted there, or
/// nobody tells them in time.
pub fn names(line: &str) -> Vec<String> {
    let Some(wanted) = Wanted::of(line) else {
        return Vec::new();
    };
    let (sender, receiver) = mpsc::channel();
    let kind = wanted.kind;
    // To find a host's address, or to connect, may take longer than anybody waits; it ends with the program.
    thread::spawn(move || {
        let names = ask(kind, wanted.address);
        // Nobody may wait for it any more.
        let _ = sender.send(names.unwrap_or_default());
    });
    let mut names = receiver.recv_timeout(PATIENCE).unwrap_or_default();
    // A shell takes them as they are.
    names.retain(|name| config::is_vm_name(name) && name.starts_with(&wanted.typed));
    names
}

/// What is wanted at the cursor.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    /// Of what: [`Kind::Vm`] or [`Kind::Pool`].
    kind: Kind,
    /// What is there of the name already.
    typed: String,
    /// What the line says of the host's address.
    address: Option<String>,
}

impl Wanted {
    fn of(line: &str) -> Option<Self> {
        // Within quotes nothing is completed.
        let words = shell::split(line).ok()?;
        let mut words: Vec<String> = words.into_iter().map(|word| word.text).collect();
        let typed = match line.ends_with([' ', '\t']) {
            true => String::new(),
            false => words.pop()?,
        };
        // The first word is the program.
        let (words, address) = without_own_options(words.into_iter().skip(1))?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        cli::verbs().find(|verb| words.starts_with(verb.words))?;
        let (kind, typed) = shell::value_at(&words, &typed)?;
        matches!(kind, Kind::Vm | Kind::Pool).then(|| Wanted {
            kind,
            typed: typed.to_owned(),
            address,
        })
    }
}

/// The words without the options that the host's shell does not have, and the address that they give. `None`: the value of
/// one of them comes next.
fn without_own_options(
    mut words: impl Iterator<Item = String>,
) -> Option<(Vec<String>, Option<String>)> {
    let (mut rest, mut address) = (Vec::new(), None);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--connect" | "-c" => address = Some(words.next()?),
            "--answer-timeout" => drop(words.next()?),
            "--json" => {}
            other => match other
                .strip_prefix("--connect=")
                .or(other.strip_prefix("-c"))
            {
                Some(given) => address = Some(given.to_owned()),
                None => rest.push(word),
            },
        }
    }
    rest.retain(|word| !word.starts_with("--answer-timeout="));
    Some((rest, address))
}

fn ask(kind: Kind, address: Option<String>) -> Result<Vec<String>, Error> {
    let address: Address = verbs::address(address)?;
    let (mut client, _) = Client::connect(&address, PATIENCE)?;
    let request = match kind {
        Kind::Pool => Request::SchedShow {},
        _ => Request::VmList {},
    };
    Ok(match verbs::ask(&mut client, &request)? {
        Answer::Vms { vms } => vms.into_iter().map(|vm| vm.name).collect(),
        Answer::Sched { sched } => sched.pools.into_iter().map(|pool| pool.name).collect(),
        _ => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_wanted_where_the_shell_takes_them() {
        let wanted = |line: &str| {
            let wanted = Wanted::of(line)?;
            Some((wanted.kind, wanted.typed, wanted.address))
        };
        let vm = |typed: &str, address: Option<&str>| {
            Some((Kind::Vm, typed.to_owned(), address.map(str::to_owned)))
        };
        for (line, found) in [
            ("plinthctl vm start ", vm("", None)),
            ("plinthctl vm start w", vm("w", None)),
            ("./plinthctl --json stats w", vm("w", None)),
            ("plinthctl vm stop --timeout 3 --wait=60 w", vm("w", None)),
            (
                "plinthctl -c unix:a.sock vm show ",
                vm("", Some("unix:a.sock")),
            ),
            ("plinthctl -cunix:a vm show ", vm("", Some("unix:a"))),
            (
                "plinthctl vm show --connect=tcp:h:1 ",
                vm("", Some("tcp:h:1")),
            ),
            ("plinthctl --answer-timeout 3 vm show 'we", None),
            ("plinthctl --answer-timeout=3 vm show we", vm("we", None)),
            ("plinthctl vm show web ", None),
            ("plinthctl vm console ", None),
            ("plinthctl vm stop web --timeout ", None),
            ("plinthctl vm show --connect ", None),
            ("plinthctl vm show --js", None),
            ("plinthctl vm ", None),
            ("plinthctl ", None),
            ("plinthctl", None),
            ("", None),
        ] {
            assert_eq!(wanted(line), found, "{line:?}");
        }
        let pool = Some((Kind::Pool, "r".to_owned(), None));
        for line in [
            "plinthctl pool set r",
            "plinthctl sched set web --pool r",
            "plinthctl sched set web --pool=r",
        ] {
            assert_eq!(wanted(line), pool, "{line:?}");
        }
    }

    #[test]
    fn scripts_call_what_there_is() {
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            let text = String::from_utf8(script(shell)).unwrap();
            let call = format!("{} ", cli::COMPLETE_NAMES);
            assert_eq!(text.matches(&call).count(), 1, "{shell}");
        }
    }

    #[test]
    fn the_script_for_zsh_calls_back_for_each_value() {
        let mut plain = Vec::new();
        clap_complete::generate(Shell::Zsh, &mut cli::command(), "plinthctl", &mut plain);
        let plain = String::from_utf8(plain).unwrap();
        let text = String::from_utf8(script(Shell::Zsh)).unwrap();
        // What clap names its function, and what it has for values.
        assert_eq!(plain.matches(ZSH_BEGINS).count(), 1);
        let values = plain.matches(ZSH_VALUE[0]).count();
        assert!(values > 20, "{values}");
        assert_eq!(text.matches(ZSH_VALUE[1]).count(), values);
        assert!(!text.contains(ZSH_VALUE[0]));
        assert!(text.starts_with("#compdef plinthctl\n"));
    }

    #[test]
    fn the_script_for_bash_calls_back() {
        let text = String::from_utf8(script(Shell::Bash)).unwrap();
        // What clap names its function, and what is registered in its place.
        assert!(text.contains("\n_plinthctl() {\n") || text.starts_with("_plinthctl() {\n"));
        assert!(text.ends_with("-F _plinthctl_with_names plinthctl\n"));
        // Nobody is shown what it calls.
        assert_eq!(text.matches(cli::COMPLETE_NAMES).count(), 1);
    }
}
