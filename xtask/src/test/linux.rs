//! The conversation that every Linux guest has to hold.
//!
//! Purpose: commands typed into the guest's own shell, and what a sound machine answers
//! to them. The same conversation runs in a guest of Plinth, on every emulator, and on
//! the bare emulator for comparison (`cargo xtask test --reference`).
//!
//! Invariants: answers are judged by content, never by how long the workstation took for
//! them; time is judged by two clocks of the guest against each other.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use super::terminal::{Terminal, plain, without_host_lines};
use crate::initramfs;

/// What the guest was given, and so has to find.
#[derive(Clone, Debug)]
pub struct Given {
    /// What `uname -r` starts with.
    pub release: &'static str,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its processors.
    pub cpus: u32,
}

/// Time limits of the workstation's clock, by how fast the place is.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the start of the machine to the guest's shell.
    pub boot: Duration,
    /// For one command.
    pub command: Duration,
}

/// MiB of the given memory that the kernel may keep for itself (image, page structures,
/// initramfs) and so leave out of `MemTotal`, and the share that grows with the memory.
const KERNEL_MIB: u32 = 64;
const KERNEL_SHARE: u32 = 32;

/// Kernel messages of the error level that say nothing about the machine we give.
///
/// Each has the reason why it is harmless. Seen on the bare emulator, too, or on PCs.
const HARMLESS: [(&str, &str); 0] = [];

/// What never belongs into a guest's log, whatever level it has there.
const ALARMING: &str = "Firmware Bug|BUG:|WARNING:|Call Trace|Oops|Kernel panic|unchecked MSR\
    |nobody cared|lost interrupt|marked (as )?unstable|doesn't work|soft lockup|self-detected stall\
    |ACPI (BIOS )?(Error|Warning|Exception)|Unable to calibrate|[Cc]lock skew|[Tt]imed out|too slow";

/// A shell on a terminal.
pub struct Shell<'t> {
    terminal: &'t mut dyn Terminal,
    limits: Limits,
}

/// What a command printed, and its exit status.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Without control sequences, carriage returns, and lines of the host.
    pub text: String,
    /// As in `$?`.
    pub status: u32,
}

impl<'t> Shell<'t> {
    /// Waits until the guest has booted to its prompt; returns the kernel's release, too.
    ///
    /// # Errors
    /// The guest panicked, or did not come up in time.
    pub fn wait_for(terminal: &'t mut dyn Terminal, limits: Limits) -> Result<(Self, String)> {
        let banner = pattern(&format!(
            r"{}(\S+) ready|Kernel panic - ([^\r\n]*)",
            regex::escape(initramfs::BANNER)
        ))?;
        let text = terminal
            .expect(&banner, limits.boot)
            .context("waiting for the guest to boot")?;
        let found = banner
            .captures(&text)
            .context("what was waited for is in the text")?;
        if let Some(panic) = found.get(2) {
            bail!("the guest's kernel panicked: {}", panic.as_str());
        }
        let release = found
            .get(1)
            .map_or("", |release| release.as_str())
            .to_owned();
        let mut shell = Self { terminal, limits };
        shell
            .prompt()
            .context("waiting for the guest's first prompt")?;
        Ok((shell, release))
    }

    fn prompt(&mut self) -> Result<()> {
        self.terminal
            .expect(&pattern("~ # ")?, self.limits.command)
            .map(drop)
    }

    /// Runs one command line and gives all that it printed.
    ///
    /// Marks before and after the output keep the echo of the typed line and the prompt
    /// apart from it, however the shell wraps them.
    ///
    /// # Errors
    /// There was no answer in time.
    pub fn run(&mut self, command: &str) -> Result<Answer> {
        let end = pattern(r"@-(\d+)\r?\n")?;
        let waiting = || format!("waiting for the answer to `{command}`");
        self.terminal
            .send(&format!("echo @+$((1)); {command}; echo @-$?\r"))?;
        self.terminal
            .expect(&pattern(r"@\+1\r?\n")?, self.limits.command)
            .with_context(waiting)?;
        let text = self
            .terminal
            .expect(&end, self.limits.command)
            .with_context(waiting)?;
        let found = end
            .captures(&text)
            .context("what was waited for is in the text")?;
        let status = found[1]
            .parse()
            .with_context(|| format!("an exit status in {text:?}"))?;
        let printed = found.get(0).map_or("", |mark| &text[..mark.start()]);
        let answer = Answer {
            text: without_host_lines(&plain(printed)),
            status,
        };
        self.prompt().with_context(waiting)?;
        Ok(answer)
    }

    /// The output of a command that must succeed, without surrounding space.
    ///
    /// # Errors
    /// It failed, or did not answer.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        let answer = self.run(command)?;
        ensure!(
            answer.status == 0,
            "`{command}` ended with {}: {}",
            answer.status,
            answer.text
        );
        Ok(answer.text.trim().to_owned())
    }

    /// Types a line and does not wait: for commands that end the shell.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn say(&mut self, line: &str) -> Result<()> {
        self.terminal.send(&format!("{line}\r"))
    }

    /// The terminal, to talk past the shell.
    pub fn terminal(&mut self) -> &mut dyn Terminal {
        self.terminal
    }

    /// Types an empty line and waits for the prompt: the shell is there and listens.
    ///
    /// # Errors
    /// It does not.
    pub fn still_there(&mut self) -> Result<()> {
        self.say("")?;
        self.prompt().context("the shell shows no prompt any more")
    }
}

/// What a guest says on its console when its power button is pressed, once it listens to it.
pub const BUTTON_PRESSED: &str = "shutting down by the power button";

/// Has the guest power itself off when its power button is pressed. It needs [`initramfs::BUTTON_MODULES`].
///
/// # Errors
/// Linux has no power button.
pub fn listen_to_button(shell: &mut Shell) -> Result<()> {
    for module in initramfs::BUTTON_MODULES {
        shell.ask(&format!("insmod /lib/{module}"))?;
    }
    shell.ask("grep 'Power Button' /proc/bus/input/devices")?;
    // Where busybox' acpid looks for what to do.
    shell.ask("mkdir -p /etc/acpi/PWRF")?;
    let script = "/etc/acpi/PWRF/00000080";
    shell.ask("echo '#!/bin/sh' >/tmp/off")?;
    shell.ask(&format!(
        "echo 'echo {BUTTON_PRESSED} >/dev/console; poweroff' >>/tmp/off"
    ))?;
    shell.ask(&format!("chmod +x /tmp/off && mv /tmp/off {script}"))?;
    shell.ask("acpid -p /run/acpid.pid -l /tmp/acpid.log")?;
    // It goes to the background at once, and hears only what comes when it has opened its devices.
    shell.ask(
        "until ls -l /proc/$(pidof acpid)/fd | grep -q /dev/input/event; do sleep 0.1; done",
    )?;
    Ok(())
}

/// Holds the whole conversation; the shell is at its prompt before and after.
///
/// # Errors
/// The first answer that is not what a sound machine gives.
pub fn converse(shell: &mut Shell, release: &str, given: &Given) -> Result<()> {
    ensure!(
        release.starts_with(given.release),
        "the guest runs {release}, not {}",
        given.release
    );
    processors(shell, given).context("processors")?;
    memory(shell, given).context("memory")?;
    log(shell).context("the kernel's log")?;
    interrupts(shell).context("interrupts")?;
    clocks(shell).context("clocks")?;
    floating_point(shell).context("floating point")?;
    terminal_input(shell).context("terminal")
}

fn processors(shell: &mut Shell, given: &Given) -> Result<()> {
    let cpus: u32 = shell
        .ask("nproc")?
        .parse()
        .context("nproc prints a number")?;
    ensure!(cpus == given.cpus, "{cpus} instead of {}", given.cpus);
    let hypervisor = shell.ask("grep -c '^flags.* hypervisor' /proc/cpuinfo")?;
    ensure!(
        hypervisor == cpus.to_string(),
        "only {hypervisor} of {cpus} know of a hypervisor"
    );
    Ok(())
}

/// The time that others took from the guest's processors, as its kernel was told by the hypervisor: in hundredths of
/// a second.
///
/// # Errors
/// The kernel does not count it.
pub fn stolen(shell: &mut Shell) -> Result<u64> {
    let text = shell.ask("head -n 1 /proc/stat")?;
    // "cpu", user, nice, system, idle, iowait, irq, softirq, steal (Linux, Documentation/filesystems/proc.rst).
    let steal = text.split_whitespace().nth(8);
    steal
        .and_then(|steal| steal.parse().ok())
        .with_context(|| format!("no steal time in {text}"))
}

/// Seconds that the kernel has been up, by its own clock.
///
/// # Errors
/// It does not say.
pub fn uptime(shell: &mut Shell) -> Result<f64> {
    let text = shell.ask("cat /proc/uptime")?;
    let first = text.split_whitespace().next();
    first
        .and_then(|first| first.parse().ok())
        .with_context(|| format!("no time in {text}"))
}

fn memory(shell: &mut Shell, given: &Given) -> Result<()> {
    let text = shell.ask("cat /proc/meminfo")?;
    let line = Regex::new(r"(?m)^MemTotal:\s+(\d+) kB$")?;
    let found = line
        .captures(&text)
        .with_context(|| format!("no MemTotal in {text}"))?;
    let total = found[1].parse::<u32>()? / 1024;
    let most = given.memory_mib;
    let least = most - KERNEL_MIB - most / KERNEL_SHARE;
    ensure!(
        (least..=most).contains(&total),
        "{total} MiB, of {least} to {most} expected"
    );
    Ok(())
}

fn log(shell: &mut Shell) -> Result<()> {
    let text = shell.ask("dmesg -r")?;
    ensure!(text.lines().count() > 100, "it is cut short:\n{text}");
    let complaints = complaints(&text)?;
    ensure!(
        complaints.is_empty(),
        "it complains:\n{}",
        complaints.join("\n")
    );
    Ok(())
}

/// The lines of a raw kernel log (`<level>[time] text`) that nobody wants to see.
fn complaints(log: &str) -> Result<Vec<&str>> {
    let error = Regex::new(r"^<[0-3]>")?;
    let alarming = Regex::new(ALARMING)?;
    let harmless: Vec<_> = HARMLESS
        .iter()
        .map(|(pattern, _)| Regex::new(pattern))
        .collect::<Result<_, _>>()?;
    let lines = log
        .lines()
        .filter(|line| error.is_match(line) || alarming.is_match(line));
    Ok(lines
        .filter(|line| !harmless.iter().any(|known| known.is_match(line)))
        .collect())
}

/// Timer and serial interrupts arrive, by their counts.
fn interrupts(shell: &mut Shell) -> Result<()> {
    let before = shell.ask("cat /proc/interrupts")?;
    shell.ask("sleep 1")?;
    let after = shell.ask("cat /proc/interrupts")?;
    for (name, what) in [("LOC:", "the local timer"), ("ttyS0", "the serial port")] {
        let (before, after) = (
            interrupt_count(&before, name),
            interrupt_count(&after, name),
        );
        let (before, after) = (
            before.with_context(|| format!("{what} has no interrupt"))?,
            after.with_context(|| format!("{what} has no interrupt"))?,
        );
        ensure!(
            after > before,
            "{what} raised none in a second: {before} before and after"
        );
    }
    let errors = interrupt_count(&after, "ERR:").unwrap_or(0);
    ensure!(errors == 0, "{errors} spurious ones");
    Ok(())
}

/// The sum over all processors of the line in `/proc/interrupts` that has `name` in it.
fn interrupt_count(table: &str, name: &str) -> Option<u64> {
    let line = table
        .lines()
        .find(|line| line.split_whitespace().any(|word| word == name))?;
    let counts = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse::<u64>().ok());
    Some(counts.sum())
}

/// A second is a second, by the kernel's clock and by the real-time clock.
fn clocks(shell: &mut Shell) -> Result<()> {
    /// How far two clocks of one machine may differ over [`SPAN_S`] seconds.
    const TOLERANCE_S: f64 = 0.1;
    const SPAN_S: f64 = 5.0;

    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = shell.ask(&format!("cat {source}"))?;
    ensure!(
        source.starts_with("tsc") || source == "kvm-clock",
        "the kernel settled for {source}"
    );

    let times = shell.ask("read a b </proc/uptime; sleep 1; read c d </proc/uptime; echo $a $c")?;
    let [start, end] = numbers(&times)?;
    let slept = end - start;
    ensure!(
        (1.0 - 0.011..1.0 + TOLERANCE_S).contains(&slept),
        "`sleep 1` took {slept:.2} s"
    );

    // Both readings are taken just when the real-time clock steps to its next second.
    shell.ask("f=/sys/class/rtc/rtc0/since_epoch")?;
    shell.ask("edge() { read o <$f; while read n <$f; [ $n = $o ]; do :; done; read u i </proc/uptime; echo $n $u; }")?;
    let times = shell.ask("edge; sleep 4; edge")?;
    let [rtc_start, start, rtc_end, end] = numbers(&times)?;
    let (rtc, uptime) = (rtc_end - rtc_start, end - start);
    ensure!(
        (SPAN_S..SPAN_S + 1.5).contains(&rtc),
        "four to five seconds are {rtc} in the RTC"
    );
    let off = (rtc - uptime).abs();
    ensure!(
        off <= TOLERANCE_S,
        "{rtc} s by the RTC are {uptime:.2} s by the kernel's clock"
    );
    // Machines of the emulators start at a set date, and none of them before this one.
    ensure!(
        rtc_start > 1_690_000_000.0,
        "the RTC says {rtc_start} s since 1970"
    );
    Ok(())
}

/// Exactly as many numbers as asked for, apart from each other by space.
fn numbers<const COUNT: usize>(text: &str) -> Result<[f64; COUNT]> {
    let numbers: Vec<f64> = text
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(|| format!("numbers in {text:?}"))?;
    numbers
        .try_into()
        .map_err(|_| anyhow::anyhow!("{COUNT} numbers in {text:?}"))
}

/// A sum whose last digits show any lost bit of the processor's floating-point state.
fn floating_point(shell: &mut Shell) -> Result<()> {
    let sum = shell.ask(
        "awk 'BEGIN { for (i = 1; i <= 20000; i++) s += 1 / (i * i); printf \"%.14f\", s }'; echo",
    )?;
    let expected: f64 = (1..=20_000).map(|i| 1.0 / f64::from(i * i)).sum();
    ensure!(
        sum == format!("{expected:.14}"),
        "a sum is {sum} instead of {expected:.14}"
    );
    Ok(())
}

/// Long lines arrive whole in both directions, and Ctrl-C interrupts.
fn terminal_input(shell: &mut Shell) -> Result<()> {
    let line: String = ('0'..='z')
        .filter(char::is_ascii_alphanumeric)
        .cycle()
        .take(500)
        .collect();
    let echoed = shell.ask(&format!("echo {line}"))?;
    ensure!(
        echoed == line,
        "a line of 500 characters came back as {echoed}"
    );
    let counted = shell.ask("seq 1000")?;
    let expected: Vec<_> = (1..=1000).map(|number| number.to_string()).collect();
    ensure!(
        counted.lines().eq(expected),
        "a thousand lines came as\n{counted}"
    );
    // Said by the program that Ctrl-C is to end, when it has the terminal.
    shell.say("sh -c 'echo going@$((1)); exec cat'")?;
    shell
        .terminal
        .expect(&pattern(r"going@1\r?\n")?, shell.limits.command)?;
    shell.terminal.send("\x03")?;
    shell
        .prompt()
        .context("Ctrl-C did not bring the prompt back")?;
    Ok(())
}

fn pattern(text: &str) -> Result<Regex> {
    Regex::new(text).with_context(|| format!("the pattern {text}"))
}

#[cfg(test)]
mod tests {
    use super::super::terminal::fake::Script;
    use super::*;

    const LIMITS: Limits = Limits {
        boot: Duration::from_secs(1),
        command: Duration::from_secs(1),
    };

    fn booted(replies: &[&str]) -> Script {
        let replies = replies.iter().map(|reply| (*reply).to_owned()).collect();
        Script::new(
            "plinth guest: linux 6.1.0-44-cloud-amd64 ready\r\n~ # \x1b[6n",
            replies,
        )
    }

    #[test]
    fn an_answer_is_told_from_the_echo_and_the_prompt() {
        let mut script =
            booted(&["echo @+$((1)); nproc; echo @-$?\r\n@+1\r\n4\r\n@-0\r\n~ # \x1b[6n"]);
        let (mut shell, release) = Shell::wait_for(&mut script, LIMITS).unwrap();
        assert_eq!(release, "6.1.0-44-cloud-amd64");
        assert_eq!(
            shell.run("nproc").unwrap(),
            Answer {
                text: "4\n".to_owned(),
                status: 0
            }
        );
        assert_eq!(script.typed, "echo @+$((1)); nproc; echo @-$?\r");
    }

    #[test]
    fn a_failing_command_is_an_error_with_its_output() {
        let mut script = booted(&["@+1\r\nsh: nproc: not found\r\n@-127\r\n~ # "]);
        let (mut shell, _) = Shell::wait_for(&mut script, LIMITS).unwrap();
        let error = shell.ask("nproc").unwrap_err().to_string();
        assert!(
            error.contains("127") && error.contains("not found"),
            "{error}"
        );
    }

    #[test]
    fn a_kernel_panic_ends_the_wait_for_the_shell() {
        let mut script = Script::new("Kernel panic - not syncing: no init\r\n", Vec::new());
        let error = Shell::wait_for(&mut script, LIMITS)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("no init"), "{error}");
    }

    #[test]
    fn errors_and_alarming_lines_are_complaints() {
        let log = "<6>[    0.000000] Linux version\n\
                   <3>[    0.100000] something failed\n\
                   <4>[    0.200000] [Firmware Bug]: TSC ADJUST\n\
                   <4>[    0.300000] fine\n";
        let complaints = complaints(log).unwrap();
        assert_eq!(complaints.len(), 2);
        assert!(complaints[0].contains("something failed"));
        assert!(complaints[1].contains("TSC ADJUST"));
    }

    #[test]
    fn interrupts_are_summed_over_processors() {
        let table = "           CPU0       CPU1\n  4:         10          5   IO-APIC   4-edge      ttyS0\n\
                     LOC:       1000       2000   Local timer interrupts\nERR:          0\n";
        assert_eq!(interrupt_count(table, "ttyS0"), Some(15));
        assert_eq!(interrupt_count(table, "LOC:"), Some(3000));
        assert_eq!(interrupt_count(table, "ERR:"), Some(0));
        assert_eq!(interrupt_count(table, "NMI:"), None);
    }

    #[test]
    fn numbers_are_counted() {
        assert_eq!(numbers::<2>("1.5 2\n").unwrap(), [1.5, 2.0]);
        assert!(numbers::<2>("1.5").is_err());
        assert!(numbers::<1>("soon").is_err());
    }

    #[test]
    fn memory_has_a_range_that_follows_what_was_given() {
        let given = Given {
            release: "6.1.",
            memory_mib: 256,
            cpus: 1,
        };
        for (kib, good) in [
            (215_000, true),
            (262_144, true),
            (131_072, false),
            (524_288, false),
        ] {
            let reply = format!("@+1\r\nMemTotal:  {kib} kB\r\nMemFree: 1 kB\r\n@-0\r\n~ # ");
            let mut script = booted(&[&reply]);
            let (mut shell, _) = Shell::wait_for(&mut script, LIMITS).unwrap();
            assert_eq!(memory(&mut shell, &given).is_ok(), good, "{kib} KiB");
        }
    }
}
