//! Completion in a real bash, and in a real zsh if there is one, with the program and a pretended host.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_plinthctl");

/// Where a test's host listens.
fn socket(name: &str) -> PathBuf {
    let file = format!("plinthctl-completion-{}-{name}.sock", std::process::id());
    let path = std::env::temp_dir().join(file);
    let _ = std::fs::remove_file(&path);
    path
}

/// A host with VMs of these names and two pools. It serves whoever comes, one after the other.
fn host(path: &Path, vms: &'static [&'static str]) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            // Whoever goes in the midst of it is no matter.
            let _ = serve(&stream.unwrap(), vms);
        }
    });
}

fn serve(mut stream: &UnixStream, vms: &[&str]) -> std::io::Result<()> {
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?;
        let Ok(request) = serde_json::from_str::<serde_json::Value>(&line) else {
            continue;
        };
        let id = &request["id"];
        let answer = match request["verb"].as_str().unwrap_or_default() {
            "hello" => {
                r#""hello":{"name":"plinth","version":"9","v":1,"max_line":1,"max_answer":1}"#
                    .into()
            }
            "vm-list" => {
                let vm = |name: &&str| {
                    let name = serde_json::Value::from(*name);
                    format!(
                        r#"{{"name":{name},"state":"off","vcpus":1,"memory_bytes":0,"uptime_ns":0,"run_ns":0,"starts":0}}"#
                    )
                };
                let vms: Vec<String> = vms.iter().map(vm).collect();
                format!(r#""ok":{{"answer":"vms","vms":[{}]}}"#, vms.join(","))
            }
            "sched-show" => {
                let pool = |name: &str| {
                    format!(r#"{{"name":"{name}","policy":"fair","pcpus":[0],"slice_us":1}}"#)
                };
                let pools = [pool("default"), pool("rt")].join(",");
                format!(r#""ok":{{"answer":"sched","sched":{{"pools":[{pools}],"vms":[]}}}}"#)
            }
            other => panic!("completion asks for {other}"),
        };
        stream.write_all(format!("{{\"id\":{id},{answer}}}\n").as_bytes())?;
    }
    Ok(())
}

/// What bash would offer at the end of this line.
fn completed(path: &Path, line: &str) -> Vec<String> {
    // What readline does before it calls the function; the words are split at blanks, = and :.
    const DRIVER: &str = r#"
        source <("$PROGRAM" completions bash) || exit 9
        COMP_LINE=$LINE COMP_POINT=${#LINE} COMP_WORDS=() COMP_CWORD=-1
        rest=${LINE//=/ = } rest=${rest//:/ : }
        for word in $rest; do COMP_WORDS+=("$word"); done
        [[ $rest == *' ' ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        registered=$(complete -p plinthctl) || exit 8
        [[ $registered =~ \ -F\ ([^ ]+) ]] || exit 7
        plinthctl() { "$PROGRAM" "$@"; }
        "${BASH_REMATCH[1]}" plinthctl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let output: Output = Command::new("bash")
        .args(["--noprofile", "--norc", "-c", DRIVER])
        // Of the one who runs the test nothing is to be read or said.
        .env_remove("BASH_ENV")
        .env("LC_ALL", "C")
        .env("PROGRAM", PROGRAM)
        .env("LINE", line)
        .env("PLINTH_CONTROL", format!("unix:{}", path.display()))
        .output()
        .expect("bash is there");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.is_empty(), "{line:?}: {errors}");
    assert!(output.status.success(), "{line:?}: {}", output.status);
    offers(&String::from_utf8(output.stdout).unwrap())
}

/// What was offered, a line each.
fn offers(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| !line.is_empty())
        .map(String::from)
        .collect()
}

#[test]
fn names_of_vms_and_pools_are_offered() {
    let path = socket("names");
    host(&path, &["web", "web-2", "db", "$(reboot)", "\u{1b}[2J"]);
    for (line, wanted) in [
        ("plinthctl vm start w", &["web", "web-2"][..]),
        ("plinthctl stats d", &["db"]),
        ("plinthctl --json vm stop --timeout 3 we", &["web", "web-2"]),
        ("plinthctl sched set web --pool r", &["rt"]),
        ("plinthctl sched set web --pool=d", &["default"]),
        ("plinthctl pool set ", &["default", "rt"]),
        ("plinthctl vm st", &["start", "stop"]),
        ("plinthctl vm show x", &[]),
    ] {
        let offered = completed(&path, line);
        let names: Vec<&str> = offered
            .iter()
            .map(String::as_str)
            .filter(|word| !word.starts_with('-'))
            .collect();
        assert_eq!(names, wanted, "{line:?}");
    }
    // What a host calls a VM is no word for a shell, and the options are there as before.
    let all = completed(&path, "plinthctl vm show ");
    assert!(all.iter().any(|word| word == "--json"), "{all:?}");
    let names = all.iter().filter(|word| !word.starts_with('-'));
    assert_eq!(names.collect::<Vec<_>>(), ["web", "web-2", "db"]);
    std::fs::remove_file(path).unwrap();
}

/// A zsh with its completion and its pseudo-terminals. Without one the test that needs it is skipped, and says so.
struct Zsh {
    /// Of its start-up file and of what it offered.
    folder: PathBuf,
}

impl Zsh {
    /// `None`: it is not there, or lacks what is needed.
    fn find(name: &str) -> Option<Self> {
        // What it loads is written down, so that the inner ones begin sooner.
        const NEEDS: &str =
            "zmodload zsh/zpty && autoload -Uz +X compinit && compinit -u -d $ZDOTDIR/dump";
        let file = format!("plinthctl-completion-{}-{name}", std::process::id());
        let zsh = Zsh {
            folder: std::env::temp_dir().join(file),
        };
        std::fs::create_dir_all(&zsh.folder).unwrap();
        let checked = zsh.command(NEEDS).stderr(Stdio::null()).status();
        let missing = match checked {
            Ok(status) if status.success() => {
                std::fs::write(zsh.folder.join(".zshrc"), Self::START_UP).unwrap();
                return Some(zsh);
            }
            Ok(_) => "the zsh here lacks its completion or its module zsh/zpty",
            Err(_) => "there is no zsh here",
        };
        // Past what is kept of a test that passes.
        let _ = writeln!(std::io::stderr(), "skipped {name}: {missing}");
        None
    }

    /// What the inner zsh does: it completes the line as if Tab was pressed behind it, writes down what is offered, and ends. It
    /// waits for nobody: the line is there, and is completed, as soon as its editor begins.
    const START_UP: &str = r#"
        TMOUT=60 PS1= RPS1=
        autoload -Uz compinit && compinit -u -d $ZDOTDIR/dump
        plinthctl() { "$PROGRAM" "$@" }
        source <("$PROGRAM" completions zsh) 2>>$ZDOTDIR/errors
        # Whatever completes calls this to offer words; some calls only ask which of them would fit.
        compadd() {
            local -a fit
            if (( ! ${argv[(I)-[ADO]]} )); then
                builtin compadd -O fit "$@"
                print -rl -- $fit >>$ZDOTDIR/offered
            fi
            builtin compadd "$@"
        }
        complete-it() {
            { _main_complete } 2>>$ZDOTDIR/errors
            compstate[insert]= compstate[list]=
        }
        zle -C complete-it complete-word complete-it
        zle-line-init() {
            BUFFER=$LINE CURSOR=$#LINE
            zle complete-it
            BUFFER=exit
            zle accept-line
        }
        zle -N zle-line-init
    "#;

    /// This zsh with a script, and nothing of the one who runs the test.
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("zsh");
        command
            .args(["-d", "-f", "-c", script])
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .env("LC_ALL", "C")
            .env("TERM", "dumb")
            .env("HOME", &self.folder)
            .env("ZDOTDIR", &self.folder)
            .current_dir(&self.folder);
        command
    }

    /// What it would offer at the end of this line.
    fn completed(&self, path: &Path, line: &str) -> Vec<String> {
        // A terminal for the inner one, whose end is waited for.
        const DRIVER: &str = r#"
            zmodload zsh/zpty || exit 9
            zpty inner zsh -d -i || exit 8
            while zpty -r inner shown; do :; done
            zpty -d inner
        "#;
        let file = |name: &str| self.folder.join(name);
        for name in ["offered", "errors"] {
            std::fs::write(file(name), "").unwrap();
        }
        let output = self
            .command(DRIVER)
            .env("PROGRAM", PROGRAM)
            .env("LINE", line)
            .env("PLINTH_CONTROL", format!("unix:{}", path.display()))
            .output()
            .expect("zsh is there");
        let mut errors = String::from_utf8_lossy(&output.stderr).into_owned();
        errors += &std::fs::read_to_string(file("errors")).unwrap();
        assert!(errors.is_empty(), "{line:?}: {errors}");
        assert!(output.status.success(), "{line:?}: {}", output.status);
        offers(&std::fs::read_to_string(file("offered")).unwrap())
    }
}

impl Drop for Zsh {
    fn drop(&mut self) {
        // It may not have been made.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[test]
fn names_of_vms_and_pools_are_offered_in_zsh() {
    let Some(zsh) = Zsh::find("names_of_vms_and_pools_are_offered_in_zsh") else {
        return;
    };
    let path = socket("zsh");
    host(&path, &["web", "web-2", "db", "$(reboot)", "\u{1b}[2J"]);
    for (line, wanted) in [
        ("plinthctl vm show ", &["web", "web-2", "db"][..]),
        ("plinthctl vm start w", &["web", "web-2"]),
        ("true; plinthctl stats d", &["db"]),
        ("plinthctl --json vm stop --timeout 3 we", &["web", "web-2"]),
        ("plinthctl sched set web --pool r", &["rt"]),
        ("plinthctl sched set web --pool=d", &["default"]),
        ("plinthctl pool set ", &["default", "rt"]),
        ("plinthctl vm st", &["start", "stop"]),
        ("plinthctl vm show x", &[]),
    ] {
        assert_eq!(zsh.completed(&path, line), wanted, "{line:?}");
    }
    std::fs::remove_file(&path).unwrap();
    // Nobody listens there any more: what needs no names is offered, and nothing is said.
    assert_eq!(
        zsh.completed(&path, "plinthctl vm stop --ti"),
        ["--timeout"]
    );
    assert_eq!(zsh.completed(&path, "plinthctl vm stop we"), [""; 0]);
}

#[test]
fn without_a_host_the_rest_is_offered_in_silence() {
    let absent = socket("absent");
    let silent = socket("silent");
    // Connections wait here, and nobody takes them.
    let listener = UnixListener::bind(&silent).unwrap();
    for path in [&absent, &silent] {
        let offered = completed(path, "plinthctl vm stop ");
        assert!(
            offered.iter().any(|word| word == "--timeout"),
            "{offered:?}"
        );
        assert!(
            offered.iter().all(|word| word.starts_with('-')),
            "{offered:?}"
        );
        assert_eq!(completed(path, "plinthctl vm sta"), ["start"]);
    }
    drop(listener);
    std::fs::remove_file(silent).unwrap();
}
