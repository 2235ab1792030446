//! The scenario about the control channel: every verb by plinthctl, and what a bad client does to a host.
//!
//! plinthctl is called as the library that the program is. All with guest stubs, which boot at once.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use manage::command::{Answer, HostStats};
use regex::Regex;

use super::{
    rig::{Rig, Start, Vm},
    session::Session,
    terminal::Terminal,
};
use crate::{emulator::Emulator, paths};

/// A stub that talks until it is told to end.
const TALKS: &str = "checks=none facts=off end=shell";

/// Bytes of the kernel's heap that may be in use at one time and not at another.
const HEAP_SLACK: u64 = 16 * 1024;

/// Requests of a flood.
const FLOOD: usize = 10_000;

/// What plinthctl ends with (docs/CONTROL.md).
mod exit {
    pub(super) const DONE: u8 = 0;
    pub(super) const REFUSED: u8 = 1;
    pub(super) const USAGE: u8 = 2;
    pub(super) const NO_CONNECTION: u8 = 3;
}

/// The host, as a program sees it.
pub(super) struct Host {
    socket: PathBuf,
    limit: Duration,
}

impl Host {
    /// For a host whose second serial port is at `socket`; an answer may take that long.
    pub(super) fn new(socket: PathBuf, limit: Duration) -> Self {
        Self { socket, limit }
    }

    /// A place for the socket of this run's machine. The path of a socket has to be short.
    pub(super) fn socket(start: &Start) -> PathBuf {
        let name = format!("plinth-{}-{}.sock", std::process::id(), start.name);
        std::env::temp_dir().join(name)
    }

    /// The figures of all VMs and processors.
    pub(super) fn stats(&self) -> Result<HostStats> {
        let text = self.done(&["--json", "stats"], "stats")?;
        match serde_json::from_str(&text)? {
            Answer::Stats { stats } => Ok(stats),
            other => bail!("not figures: {other:?}"),
        }
    }

    /// Runs plinthctl: its status, and what it printed.
    fn plinthctl(&self, words: &[&str]) -> (u8, String) {
        let seconds = self.limit.as_secs().to_string();
        let address = format!("--connect=unix:{}", self.socket.display());
        let own = ["plinthctl", &address, "--answer-timeout", &seconds];
        let args = own.iter().chain(words).map(OsString::from);
        let mut text = Vec::new();
        let mut errors = Vec::new();
        let terminal = plinthctl::Terminal {
            out: &mut text,
            errors: &mut errors,
            is_terminal: false,
        };
        let status = plinthctl::run(args, terminal).status();
        text.extend(errors);
        (status, String::from_utf8_lossy(&text).into_owned())
    }

    /// As [`Host::plinthctl`], which has to end so and to print this among others.
    fn expect(&self, words: &[&str], wanted: u8, printed: &str) -> Result<String> {
        let (status, text) = self.plinthctl(words);
        ensure!(
            status == wanted && text.contains(printed),
            "plinthctl {} ended with {status} instead of {wanted}, and printed, instead of {printed:?}: {text}",
            words.join(" ")
        );
        Ok(text)
    }

    pub(super) fn done(&self, words: &[&str], printed: &str) -> Result<String> {
        self.expect(words, exit::DONE, printed)
    }

    /// Asks until the VM is in this state and was started so often.
    fn wait_for(&self, vm: &str, state: &str, starts: u32) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        let wanted = Regex::new(&format!(
            r#""name":"{vm}","state":"{state}",[^{{}}]*"starts":{starts}\b"#
        ))?;
        loop {
            let text = self.done(&["--json", "vm", "list"], "")?;
            if wanted.is_match(&text) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{vm} did not come to be {state} after {starts} starts: {text}"
            );
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Destroys a VM, and waits until it has gone.
    pub(super) fn destroy(&self, vm: &str) -> Result<()> {
        self.done(&["vm", "destroy", vm, "--force"], vm)?;
        let deadline = Instant::now() + self.limit;
        let name = format!("\"name\":\"{vm}\"");
        while self.done(&["--json", "vm", "list"], "")?.contains(&name) {
            ensure!(Instant::now() < deadline, "{vm} does not go");
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Free memory and heap in use, in bytes.
    fn memory(&self) -> Result<(u64, u64)> {
        let text = self.done(&["--json", "host", "show"], "")?;
        let figure = |name: &str| -> Result<u64> {
            let pattern = Regex::new(&format!(r#""{name}":(\d+)"#))?;
            let found = pattern.captures(&text).with_context(|| text.clone())?;
            Ok(found[1].parse()?)
        };
        Ok((figure("memory_free_bytes")?, figure("heap_bytes")?))
    }

    /// Asks until as much memory is free as before, and about as much of the heap: what is left of a VM goes when
    /// a processor has the time.
    fn wait_for_memory(&self, before: (u64, u64)) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        loop {
            let now = self.memory()?;
            if now.0 == before.0 && now.1.abs_diff(before.1) <= HEAP_SLACK {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "free memory and heap were {before:?} and are {now:?}"
            );
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// A connection without plinthctl's manners.
    fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(self.limit))?;
        stream.set_write_timeout(Some(self.limit))?;
        Ok(stream)
    }
}

/// Every verb, then every abuse; the guest that is shown answers all the time.
pub fn control(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let two = Vm {
        vcpus: 2,
        ..Vm::stub("two", TALKS)
    };
    let text = format!(
        "[host]\nafter-last-vm = \"stay\"\nfiles = [\"stub\"]\n{}{}",
        Vm::stub("one", TALKS).section(),
        two.section()
    );
    let socket = Host::socket(start);
    let mut session = rig.boot_text(start, &text, |machine| {
        machine.control = Some(socket.clone());
    })?;
    session.expect(&Regex::new("stub> ")?, limits.boot)?;
    let host = Host::new(socket, limits.command);
    verbs(&host, &mut session, &start.name)?;
    let before = host.memory()?;
    let answers = abuse(&host, &mut session, start)?;
    host.wait_for_memory(before)?;
    host.done(&["host", "power-off"], "powering off")?;
    session.wait_for_power_off(limits.command)?;
    // With it goes what stands between the machine's port and programs.
    drop(session);
    let gone = host.plinthctl(&["vm", "list"]).0;
    ensure!(gone == exit::NO_CONNECTION, "without a machine: {gone}");
    Ok(format!("{answers} answers to a flood"))
}

/// The guest that is shown answers.
fn guest_answers(host: &Host, session: &mut Session, word: &str) -> Result<()> {
    session.send(&format!("echo {word}\r"))?;
    session
        .expect(&Regex::new(&format!(r"\n{word}\r"))?, host.limit)
        .context("the guest that is shown")?;
    Ok(())
}

fn verbs(host: &Host, session: &mut Session, name: &str) -> Result<()> {
    host.wait_for("one", "running", 1)?;
    host.wait_for("two", "running", 1)?;
    host.done(&["vm", "list"], "NAME")?;
    host.done(&["vm", "show", "two"], "two.1")?;
    host.done(&["host", "show"], "protocol")?;
    host.done(&["stats"], "one.0")?;
    alone(host)?;
    // It has written to its serial port.
    let stats = host.done(&["--json", "stats"], "\"name\":\"one\"")?;
    let asked = Regex::new(r#""name":"one"[^\]]*"io_bytes":[1-9]"#)?;
    ensure!(asked.is_match(&stats), "no I/O is told: {stats}");
    host.done(&["top", "--count", "1"], "plinth top")?;
    host.done(&["log", "--lines", "1000"], "control channel")?;
    host.done(&["sched", "set", "two", "--weight", "200"], "two")?;
    host.done(&["sched", "show"], "200")?;
    let absent = ["sched", "set", "two", "--affinity", "0,7"];
    host.expect(&absent, exit::REFUSED, "processor 7 is not in two's pool")?;
    let elsewhere = ["sched", "set", "two", "--pool", "elsewhere"];
    host.expect(&elsewhere, exit::REFUSED, "there are: default")?;
    host.done(&["vm", "pause", "two"], "two: ")?;
    host.wait_for("two", "paused", 1)?;
    host.done(&["vm", "resume", "two"], "two: ")?;
    host.wait_for("two", "running", 1)?;
    // One that has not been started yet ignores it.
    host.done(&["inject", "nmi", "two", "--vcpu", "1"], "NMI")?;
    host.done(&["vm", "reset", "two"], "two: ")?;
    host.wait_for("two", "running", 2)?;

    let create = [
        "vm",
        "create",
        "name=three",
        "memory=16M",
        "boot.kernel=stub",
        "boot.cmdline=checks=none facts=off end=spin",
    ];
    host.done(&create, "three: ")?;
    host.expect(&create, exit::REFUSED, "exists already")?;
    host.done(&["vm", "start", "three", "--wait=300"], "three: ")?;
    reservations(host)?;
    host.done(
        &["vm", "stop", "three", "--timeout", "1", "--wait=300"],
        "three: ",
    )?;
    host.done(&["vm", "destroy", "three"], "three: ")?;
    host.expect(&["vm", "show", "four"], exit::REFUSED, "not found")?;
    host.expect(&["vm", "start", "one"], exit::REFUSED, "not in this state")?;
    host.expect(&["vm", "dance"], exit::USAGE, "dance")?;
    let views = ["top", "--count", "x"];
    host.expect(&views, exit::USAGE, "write a whole number from 1 on")?;

    host.done(&["trace", "start"], "started")?;
    guest_answers(host, session, "traced")?;
    host.done(&["trace", "stop"], "stopped")?;
    host.done(&["trace", "show"], "is not recorded")?;
    let file = paths::target()
        .join("test-logs")
        .join(format!("{name}.trace.json"));
    let path = file.display().to_string();
    host.done(&["trace", "-o", &path, "--recorded"], "records")?;
    trace_is_whole(&file)?;
    noted(host, session)
}

/// Figures of one VM have nothing of the others.
fn alone(host: &Host) -> Result<()> {
    let text = host.done(&["stats", "two"], "two.1")?;
    let others = text.contains("one") || text.contains("BUSY %") || text.contains("\nall ");
    ensure!(!others, "not two's alone: {text}");
    let text = host.done(&["--json", "stats", "two"], "stats")?;
    let Answer::Stats { stats } = serde_json::from_str(&text)? else {
        bail!("not figures: {text}");
    };
    let [vm] = &stats.vms[..] else {
        bail!("not one VM: {text}");
    };
    ensure!(
        stats.pcpus.is_empty() && vm.summary.name == "two" && vm.vcpu.len() == 2,
        "not two's: {text}"
    );
    ensure!(
        stats.total == vm.total && vm.total.run_ns > 0,
        "not its sum: {text}"
    );
    host.expect(&["stats", "four"], exit::REFUSED, "not found")?;
    Ok(())
}

/// What was asked for stands in the host's log, and on nobody's console.
fn noted(host: &Host, session: &Session) -> Result<()> {
    let log = host.done(&["log", "--lines", "1000"], "")?;
    let mut lines = log.lines();
    for wanted in [
        "sched set two --weight 200: done, set",
        "sched set two --affinity 0,7: refused, affinity: processor 7 is not in two's pool",
        "vm pause two: done, paused",
        "vm create \"name = 'three'; memory = '16M'; boot.kernel = 'stub'; ",
        "pool set default --policy reservation --slice 2 ms: done, set",
        "vm stop three --timeout 1: done, ",
        "vm start one: refused, ",
        "trace stop: done, stopped",
    ] {
        let entry = format!("operator (control channel): {wanted}");
        ensure!(
            lines.any(|line| line.contains(&entry)),
            "the log has no {entry:?} in its place: {log}"
        );
    }
    ensure!(
        !log.contains("): vm show") && !log.contains("): vm list"),
        "a look is noted: {log}"
    );
    let console = session.text();
    ensure!(!console.contains("operator ("), "the console: {console}");
    Ok(())
}

/// Processor time is kept for running VMs, up to what there is, and given back. One of them, `three`, computes all the time.
fn reservations(host: &Host) -> Result<()> {
    const SOME: [&str; 5] = ["sched", "set", "three", "--reservation", "1ms/10ms"];
    let fair = ["pool", "set", "default", "--policy", "fair"];
    let keeps = "policy is \"fair\", which keeps no time";
    host.expect(&SOME, exit::REFUSED, keeps)?;
    let keeping = ["pool", "set", "default", "--policy", "reservation"];
    host.done(
        &[&keeping[..], &["--slice", "2ms"]].concat(),
        "default: set",
    )?;
    host.done(&SOME, "three: set")?;
    host.done(&["sched", "show"], "1 ms in each 10 ms")?;
    // It gets no more than that: it is held up again and again.
    let held_up = Regex::new(r#""name":"three"[^\]]*"throttled_ns":[1-9]"#)?;
    let deadline = Instant::now() + host.limit;
    loop {
        let stats = host.done(&["--json", "stats"], "three")?;
        if held_up.is_match(&stats) {
            break;
        }
        ensure!(Instant::now() < deadline, "three is not held up: {stats}");
        thread::sleep(Duration::from_millis(200));
    }
    // For one of its vCPUs there may be room, for two of them there is none: nothing changes.
    let before = host.done(&["--json", "sched", "show"], "reserved_permille")?;
    let much = ["sched", "set", "two", "--reservation", "940ms/1s"];
    host.expect(
        &much,
        exit::REFUSED,
        "no room: two: 940 ms in each 1 s is 94.0 %",
    )?;
    let after = host.done(&["--json", "sched", "show"], "reserved_permille")?;
    ensure!(before == after, "a refusal changed {before} to {after}");
    host.expect(&fair, exit::REFUSED, "there are reservations in the pool")?;
    host.done(
        &["sched", "set", "three", "--reservation", "none"],
        "three: set",
    )?;
    host.done(&fair, "default: set")?;
    host.done(&["sched", "show"], "fair")?;
    Ok(())
}

/// The file has what a guest that was typed at does.
fn trace_is_whole(file: &Path) -> Result<()> {
    let text = fs::read_to_string(file)?;
    for wanted in [
        "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[",
        "\"name\":\"one vCPU 0\"",
        "\"name\":\"on pCPU ",
        "\"name\":\"port-io\"",
        "\"name\":\"inject vector ",
        "\"name\":\"wake\"",
        "\"name\":\"process_name\",\"args\":{\"name\":\"VM one\"}",
    ] {
        ensure!(text.contains(wanted), "the trace has no {wanted}");
    }
    ensure!(text.ends_with("\n]}\n"), "the trace has no end");
    Ok(())
}

/// Everything that a bad client does. Returns how many answers a flood got.
fn abuse(host: &Host, session: &mut Session, start: &Start) -> Result<usize> {
    // Bochs' port has the speed of a real one.
    let long = match start.place.emulator() {
        Emulator::Qemu => 1 << 20,
        Emulator::Bochs => 40 << 10,
    };
    let mut garbage: Vec<u8> = (0..=255).collect();
    garbage.extend(b"\n{\"id\":1,\n[[[[\n\"\n");
    host.connect()?.write_all(&garbage)?;
    host.done(&["vm", "list"], "one")?;

    let mut line = vec![b'x'; long];
    line.push(b'\n');
    let mut client = host.connect()?;
    client.write_all(&line)?;
    client.write_all(b"{\"id\":77,\"v\":1,\"verb\":\"vm-list\"}\n")?;
    let text = read_until(&client, "{\"id\":77,\"ok\":")?;
    ensure!(text.contains("longer than"), "the long line: {text}");
    drop(client);

    // Half a line, and gone.
    host.connect()?
        .write_all(b"{\"id\":5,\"v\":1,\"verb\":\"vm-destroy\",\"vm\":\"one\",\"force\":tr")?;
    host.done(&["vm", "list"], "one")?;

    if start.place.emulator() == Emulator::Bochs {
        return too_fast(host, session);
    }
    // While nobody works this machine skips to its next event: answers that nobody takes for ten of its seconds are
    // dropped, and those would be over as soon as the reader here pauses. A guest that works keeps its time slow.
    let works = "boot.cmdline=checks=none facts=off end=spin";
    let create = ["name=works", "memory=16M", "boot.kernel=stub", works];
    host.done(&[&["vm", "create"], &create[..]].concat(), "works: ")?;
    host.done(&["vm", "start", "works", "--wait=300"], "works: ")?;
    let answers = flood(host, session)?;
    // The port takes one program at a time: those before have gone.
    never_reads(host, session)?;
    host.done(&["vm", "destroy", "works", "--force"], "works: ")?;
    Ok(answers)
}

/// Many requests, with somebody who reads: the port waits until it is read, so that nothing is lost.
fn flood(host: &Host, session: &mut Session) -> Result<usize> {
    let client = host.connect()?;
    let requests: String = (1..=FLOOD).map(request).collect();
    let mut sender = client.try_clone()?;
    let sending = thread::spawn(move || sender.write_all(requests.as_bytes()));
    let last = format!("{{\"id\":{FLOOD},\"ok\":");
    let reading = thread::spawn(move || read_until(&client, &last));
    guest_answers(host, session, "flooded")?;
    let text = reading.join().ok().context("the reader failed")??;
    sending_is_over(sending)?;
    let answered = text.lines().filter_map(|line| {
        let (id, _) = line.strip_prefix("{\"id\":")?.split_once(",\"ok\":")?;
        id.parse().ok()
    });
    let answered: BTreeSet<usize> = answered.collect();
    let missing: Vec<_> = (1..=FLOOD).filter(|id| !answered.contains(id)).collect();
    ensure!(
        missing.is_empty(),
        "{} of {FLOOD} requests have no answer: {missing:?}",
        missing.len()
    );
    Ok(FLOOD)
}

/// Many requests at once at a port that loses what comes too fast, as a PC's does: which of them are answered is chance.
/// Each answer is to a request that was made, in their order, or refuses a line; and then all is as before.
fn too_fast(host: &Host, session: &mut Session) -> Result<usize> {
    const REQUESTS: usize = 300;
    let client = host.connect()?;
    let requests: String = (1..=REQUESTS).map(request).collect();
    let mut sender = client.try_clone()?;
    let sending = thread::spawn(move || {
        sender.write_all(requests.as_bytes())?;
        // It ends when one that comes after all others is answered. They may be lost as well.
        for id in REQUESTS + 1.. {
            thread::sleep(Duration::from_millis(100));
            if sender
                .write_all(format!("\n{{\"id\":{id},\"verb\":\"hello\"}}\n").as_bytes())
                .is_err()
            {
                break;
            }
        }
        Ok(())
    });
    guest_answers(host, session, "flooded")?;
    let text = read_until_any(&client, |line| line.contains("\"hello\":"))?;
    client.shutdown(Shutdown::Both)?;
    sending_is_over(sending)?;
    let answer = Regex::new(r#"^\{"id":(\d+),"(ok|hello)":"#)?;
    let refusal = Regex::new(r#"^\{"id":(null|\d+),"failure":\{"code":"bad-request","#)?;
    let mut last = 0;
    // What the one before has left is ended first.
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(found) = answer.captures(line) {
            let id: usize = found[1].parse()?;
            ensure!(id > last, "{id} is answered after {last}");
            last = id;
        } else {
            ensure!(refusal.is_match(line), "{line:?} is no answer");
        }
    }
    host.done(&["vm", "list"], "one")?;
    Ok(text.matches("\"ok\":").count())
}

/// A request that changes nothing.
fn request(id: usize) -> String {
    format!("{{\"id\":{id},\"v\":1,\"verb\":\"sched-show\"}}\n")
}

fn sending_is_over(sending: thread::JoinHandle<std::io::Result<()>>) -> Result<()> {
    let sent = sending.join().ok().context("the sender failed")?;
    sent.context("sending a flood")
}

/// A client that sends and never reads; then all is as before.
fn never_reads(host: &Host, session: &mut Session) -> Result<()> {
    let mut client = host.connect()?;
    client.set_write_timeout(Some(Duration::from_millis(500)))?;
    let request = b"{\"id\":1,\"v\":1,\"verb\":\"host-show\"}\n".repeat(100);
    // More answers than sockets hold.
    for _ in 0..12 {
        match client.write_all(&request) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(e) => bail!("sending without reading: {e}"),
        }
    }
    guest_answers(host, session, "undisturbed")?;
    drop(client);
    host.done(&["vm", "show", "one"], "running")?;
    host.wait_for("two", "running", 2)
}

/// Reads lines until one begins so. Returns all.
fn read_until(client: &UnixStream, beginning: &str) -> Result<String> {
    read_until_any(client, |line| line.starts_with(beginning))
        .with_context(|| format!("waiting for {beginning}"))
}

/// Reads lines until one is wanted. Returns all.
fn read_until_any(client: &UnixStream, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let mut text = String::new();
    let mut reader = BufReader::new(client).take(64 << 20);
    loop {
        let mut line = Vec::new();
        let read = reader.read_until(b'\n', &mut line)?;
        ensure!(read > 0, "the connection ended");
        let line = String::from_utf8_lossy(&line);
        text += &line;
        if wanted(&line) {
            return Ok(text);
        }
    }
}
