//! Completion in a real bash, with the program and a pretended host.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Output},
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
    let text = String::from_utf8(output.stdout).unwrap();
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
