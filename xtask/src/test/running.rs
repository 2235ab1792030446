//! Scenarios in which guests run, and what they and Plinth have to do.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::PoisonError,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use regex::Regex;

use super::{
    host::newer_processor,
    linux::{self, Given, Limits, Shell},
    place::Place,
    rig::{DISK_IMAGE, DISK_INITRAMFS, Disk, Rig, Start, Vm},
    scenarios::CannotTell,
    session::Session,
    terminal::{Terminal, plain},
};
use crate::{
    emulator::{Emulator, picture::Picture},
    guests::{self, Display, Guest},
    initramfs, paths,
};

/// Seconds that the workstation has for a run by default.
const RUN_LIMIT_S: u64 = 420;

/// The stub's first line.
pub const STUB_GREETING: &str = "plinth guest-stub: hello";

/// Linux boots, holds its conversation, and powers off; the remark says when the shell was
/// there.
pub fn linux(rig: &Rig, start: &Start, guest: &Guest, vcpus: u32) -> Result<String> {
    let limits = start.place.limits();
    let vm = Vm {
        vcpus,
        ..Vm::linux(guest)
    };
    let given = Given {
        release: guest.release.context("a Linux of a known release")?,
        memory_mib: vm.memory_mib,
        cpus: vcpus,
    };
    let mut session = rig.boot(start, &[vm])?;
    let started = session.started();
    let (mut shell, release) = Shell::wait_for(&mut session, limits)?;
    let booted = started.elapsed().as_secs_f64();
    linux::converse(&mut shell, &release, &given)?;
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(format!("shell after {booted:.1} s"))
}

/// A guest of the catalogue comes up; the remark says when.
pub fn catalogued(rig: &Rig, start: &Start, guest: &Guest, vcpus: u32) -> Result<String> {
    let mut session = rig.boot_guest(start, guest, vcpus)?;
    let started = session.started();
    let limit = start.place.limits().boot + guest.patience(start.place.emulator());
    bring_up(&mut session, guest, limit)?;
    if guest.display == Display::Ramfb && start.place.emulator() == Emulator::Qemu {
        display_is_on_the_screen(&mut session, limit)?;
    }
    Ok(format!("up after {:.1} s", started.elapsed().as_secs_f64()))
}

/// The guest's frame buffer, smaller than the screen, is in its middle; the escape key brings the log to the screen's
/// edge, and the guest back.
fn display_is_on_the_screen(session: &mut Session, limit: Duration) -> Result<()> {
    /// Pixels of a few words.
    const TEXT: usize = 500;
    const MIDDLE: std::ops::Range<usize> = 400..800;
    // Both kinds of firmware choose 1024 columns or less; the machine has 1280.
    let edge = |picture: &Picture| picture.lit(0..100);
    let is_guest = |picture: &Picture| edge(picture) == 0 && picture.lit(MIDDLE) >= TEXT;
    let is_log = |picture: &Picture| edge(picture) >= TEXT;
    session.wait_for_screen("the guest's picture", limit, is_guest)?;
    session.send("\x1dd")?;
    session.wait_for_screen("the log", limit, is_log)?;
    session.send("\x1dd")?;
    session.wait_for_screen("the guest's picture again", limit, is_guest)
}

/// Types what the guest needs and waits until it is up.
///
/// # Errors
/// It did not come up; the limit holds for each step.
pub fn bring_up(session: &mut Session, guest: &Guest, limit: Duration) -> Result<()> {
    for keys in guest.keys {
        session
            .expect(&Regex::new(keys.after)?, limit)
            .with_context(|| format!("before {:?} is typed", keys.text))?;
        session.send(keys.text)?;
    }
    session
        .expect(&Regex::new(guest.proof)?, limit)
        .with_context(|| format!("waiting for {} to be up", guest.name))
        .map(drop)
}

/// Linux finds two disks by virtio, reads both, makes a file system on one and finds its files again. Meanwhile it is paused for longer than
/// its own watchdogs wait.
pub fn linux_disks(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let vm = Vm {
        vcpus: 2,
        initrd: Some(DISK_INITRAMFS),
        disks: &[Disk::Writable, Disk::ReadOnly],
        ..Vm::linux(&guests::CATALOGUE[0])
    };
    let mut session = rig.boot(start, &[vm])?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    for module in initramfs::DISK_MODULES {
        shell.ask(&format!("insmod /lib/{module}"))?;
    }
    for (disk, readonly) in [("vda", "0"), ("vdb", "1")] {
        shell.ask(&format!("cmp /dev/{disk} /lib/{DISK_IMAGE}"))?;
        let ro = shell.ask(&format!("cat /sys/block/{disk}/ro"))?;
        ensure!(ro == readonly, "{disk}: read-only is {ro}");
    }
    shell.ask("mke2fs /dev/vda && mkdir /mnt && mount /dev/vda /mnt")?;
    shell.ask("head -c 700000 /dev/vdb > /mnt/file && sync && umount /mnt")?;
    shell.ask("echo 3 > /proc/sys/vm/drop_caches")?;
    shell.ask("mount -o ro /dev/vda /mnt")?;
    shell.ask("head -c 700000 /dev/vdb | cmp /mnt/file -")?;
    shell.ask("umount /mnt")?;
    long_pause(&mut shell, limits.command)?;
    let interrupts = shell.ask("grep 'PCI-MSI.*virtio0-req' /proc/interrupts")?;
    let errors = shell.run("dmesg | grep -iE 'I/O error|vd[ab].*error|nobody cared'")?;
    ensure!(errors.text.is_empty(), "the log says: {}", errors.text);
    linux::listen_to_button(&mut shell)?;
    stop_by_button(&mut session, limits)?;
    Ok(format!(
        "{} interrupt sources of a disk",
        interrupts.lines().count()
    ))
}

/// Linux works on both processors and on its disks, is paused for half a minute, and goes on: it has not noticed. No watchdog of the kernel barks,
/// and its clock, which all its processors share, has stood still.
fn long_pause(shell: &mut Shell, limit: Duration) -> Result<()> {
    /// Soft lockups are told after 20 s, stalls of RCU after 21 s.
    const PAUSE_S: f64 = 30.0;
    /// What the guest itself may take to be paused, and to answer afterwards.
    const AROUND_S: f64 = 20.0;
    for work in [
        "cat /dev/vdb >/dev/null; echo 1 >/proc/sys/vm/drop_caches",
        ":",
    ] {
        shell.ask(&format!("(while :; do {work}; done) & echo $! >>/tmp/busy"))?;
    }
    let before = linux::uptime(shell)?;
    let terminal = shell.terminal();
    terminal.send("\x1d0")?;
    terminal.expect(&Regex::new("plinth> ")?, limit)?;
    terminal.send("vm pause linux\r")?;
    terminal.expect(&Regex::new("linux: paused\r")?, limit)?;
    // The host's time goes on while somebody looks.
    terminal.send("top\r")?;
    let up = Regex::new(r"plinth top +up (\d+):(\d\d):(\d\d) ")?;
    let mut host_s = || -> Result<f64> {
        let text = terminal.expect(&up, limit)?;
        let found = up.captures(&text).context("the host's time")?;
        let part = |n: usize| found[n].parse::<f64>();
        Ok((part(1)? * 60.0 + part(2)?) * 60.0 + part(3)?)
    };
    let begin = host_s()?;
    while host_s()? < begin + PAUSE_S {}
    terminal.send("q")?;
    terminal.expect(&Regex::new("plinth> ")?, limit)?;
    terminal.send("vm resume linux\r")?;
    terminal.expect(&Regex::new("linux: runs on\r")?, limit)?;
    terminal.send("\x1d1")?;
    shell.still_there()?;
    let after = linux::uptime(shell)?;
    ensure!(
        after >= before && after < before + AROUND_S,
        "paused for {PAUSE_S} s, Linux' clock went from {before} s to {after} s"
    );
    // From one processor to the other and back.
    let times =
        "for n in 1 2 3 4 5; do taskset 1 cat /proc/uptime; taskset 2 cat /proc/uptime; done";
    let times = shell.ask(times)?;
    let times = times.lines().map(|line| {
        let first = line.split_whitespace().next().unwrap_or_default();
        first.parse::<f64>().with_context(|| times.clone())
    });
    let times = times.collect::<Result<Vec<_>>>()?;
    ensure!(times.len() == 10 && times.is_sorted(), "{times:?}");
    let clock =
        shell.ask("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    ensure!(
        clock.starts_with("tsc") || clock == "kvm-clock",
        "the clock source is {clock}"
    );
    let alarms = shell.run("dmesg | grep -iE 'lockup|stall|skew|hung|blocked for'")?;
    ensure!(alarms.text.is_empty(), "the log says: {}", alarms.text);
    shell.ask("kill $(cat /tmp/busy)").map(drop)
}

/// The operator stops Linux, which shuts down in its own way when its power button is pressed. Then the host powers off.
fn stop_by_button(session: &mut Session, limits: Limits) -> Result<()> {
    session.send("\x1d0")?;
    session.expect(&Regex::new("plinth> ")?, limits.command)?;
    session.send("vm stop linux\r")?;
    let ended = Regex::new(r"\[plinth\] linux: ([^\r\n]*)\r?\n")?;
    let text = session.expect(&ended, limits.command)?;
    let how = ended.captures(&text).map(|found| found[1].to_owned());
    ensure!(how.as_deref() == Some("powered off"), "Linux: {how:?}");
    // What it said meanwhile.
    session.send("\x1d1")?;
    let orderly = format!(r"{}\r?\n[\s\S]*reboot: Power down", linux::BUTTON_PRESSED);
    session.expect(&Regex::new(&orderly)?, limits.command)?;
    session.send("\x1dq")?;
    session.wait_for_power_off(limits.command)
}

/// Linux feeds its watchdog, and stops: it is reset, and sees why when it is up again.
pub fn linux_watchdog(rig: &Rig, start: &Start) -> Result<String> {
    const KERNEL: &str = "linux-6.1";
    const INITRD: &str = "initramfs-watchdog";
    /// WDIOF_CARDRESET (Linux, Documentation/watchdog/watchdog-api.rst).
    const RESET_BY_WATCHDOG: &str = "32";
    rig.provide(KERNEL, INITRD, &initramfs::WATCHDOG_MODULES)?;
    let limits = start.place.limits();
    let vm = Vm {
        name: "linux",
        vcpus: 1,
        memory_mib: 256,
        kernel: KERNEL,
        initrd: Some(INITRD),
        command_line: "console=ttyS0",
        disks: &[],
        more: "watchdog = \"reset\"\n",
    };
    let mut session = rig.boot_text(start, &vm.section(), |machine| machine.cpus = 1)?;
    let reset = Regex::new(r"\[plinth\] linux: its watchdog was not fed: reset\r?\n")?;
    for cause in ["0", RESET_BY_WATCHDOG] {
        let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
        for module in initramfs::WATCHDOG_MODULES {
            shell.ask(&format!("insmod /lib/{module}"))?;
        }
        let found = shell.ask("cat /sys/class/watchdog/watchdog0/bootstatus")?;
        ensure!(
            found == cause,
            "the watchdog says {found} instead of {cause}"
        );
        // Fed for longer than it waits; then nobody is left to feed it.
        shell.ask("watchdog -t 1 -T 4 /dev/watchdog && sleep 10")?;
        if cause == RESET_BY_WATCHDOG {
            shell.say("poweroff")?;
            break;
        }
        shell.say("killall -9 watchdog")?;
        session.expect(&reset, limits.command)?;
    }
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// The stub's checks, each `ok` or skipped.
pub fn stub(rig: &Rig, start: &Start) -> Result<String> {
    let vm = Vm {
        disks: &[Disk::Writable],
        ..Vm::stub("stub", "end=poweroff")
    };
    let mut session = rig.boot(start, &[vm])?;
    let report = stub_report_but(&mut session, start.place.limits(), start.place.faults())?;
    session.wait_for_power_off(start.place.limits().command)?;
    if start.place != Place::Bare {
        let matters = |check: &str| NEVER_SKIPPED.iter().any(|group| check.starts_with(group));
        report.ensure_none_skipped(matters)?;
    }
    let mut facts = rig
        .stub_facts
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    facts.push((start.place, report.facts));
    Ok(report.remark)
}

/// The stub's checks on a newer processor, with a TSC at twice the host's rate or nearly so: the emulator's host is slow.
pub fn stub_newer_processor(rig: &Rig, start: &Start) -> Result<String> {
    let vm = Vm {
        more: "tsc-khz = 100000\n",
        ..Vm::stub("stub", "facts=off end=poweroff")
    };
    let limits = start.place.limits();
    let mut session = rig.boot_text(start, &vm.section(), newer_processor(start))?;
    let report = stub_to_power_off(&mut session, limits)?;
    report.ensure_none_skipped(|check| {
        let newer = ["fpu.", "msr."]
            .iter()
            .any(|group| check.starts_with(group));
        newer || NEVER_SKIPPED.iter().any(|group| check.starts_with(group))
    })?;
    Ok(report.remark)
}

/// The stub's checks of several processors, with many more than the machine has; none may be skipped.
pub fn many_vcpus(rig: &Rig, start: &Start) -> Result<String> {
    let vm = Vm {
        vcpus: 16,
        ..Vm::stub("stub", "checks=smp facts=off end=poweroff")
    };
    let mut session = rig.boot(start, &[vm])?;
    let report = stub_to_power_off(&mut session, start.place.limits())?;
    report.ensure_none_skipped(|_| true)?;
    Ok(report.remark)
}

/// What the stub said.
pub struct StubReport {
    /// Lines about what it saw.
    facts: Vec<String>,
    /// The checks that found nothing to check, by name.
    skipped: Vec<String>,
    /// How many checks there were.
    remark: String,
}

impl StubReport {
    /// # Errors
    /// A check for which `matters` holds was skipped.
    fn ensure_none_skipped(&self, matters: impl Fn(&str) -> bool) -> Result<()> {
        let skipped: Vec<_> = self.skipped.iter().filter(|check| matters(check)).collect();
        ensure!(skipped.is_empty(), "skipped: {skipped:?}");
        Ok(())
    }
}

/// Groups of checks of what Plinth itself emulates: one that is skipped there has found a fault.
const NEVER_SKIPPED: [&str; 3] = ["interrupts.", "apic.", "clocks."];

/// Waits for the stub's sum, and for the end of the machine; all checks must be right.
///
/// # Errors
/// One was not, or something did not come.
pub fn stub_to_power_off(session: &mut Session, limits: Limits) -> Result<StubReport> {
    let report = stub_report(session, limits)?;
    session.wait_for_power_off(limits.command)?;
    Ok(report)
}

/// Reads the stub's output from its greeting to its sum; no check may fail.
fn stub_report(terminal: &mut dyn Terminal, limits: Limits) -> Result<StubReport> {
    stub_report_but(terminal, limits, &[])
}

/// The same where these checks fail for faults of the emulator.
fn stub_report_but(
    terminal: &mut dyn Terminal,
    limits: Limits,
    faults: &[&str],
) -> Result<StubReport> {
    let sum = Regex::new(r"stub: (\d+) passed, (\d+) failed, (\d+) skipped\r?\n")?;
    terminal
        .expect(&Regex::new(STUB_GREETING)?, limits.boot)
        .context("waiting for the stub's greeting")?;
    let text = terminal
        .expect(&sum, limits.boot)
        .context("waiting for the stub's checks")?;
    let text = plain(&text);
    let found = sum
        .captures(&text)
        .context("what was waited for is in the text")?;
    let (known, failed): (Vec<_>, Vec<_>) = text
        .lines()
        .filter(|line| line.contains(": FAILED"))
        .partition(|line| {
            let check = line
                .strip_prefix("check ")
                .and_then(|line| line.split(':').next());
            check.is_some_and(|check| faults.contains(&check))
        });
    ensure!(
        failed.is_empty() && found[2] == known.len().to_string(),
        "{}",
        failed.join("\n")
    );
    ensure!(&found[1] != "0", "no check ran");
    let remark = match &found[3] {
        "0" => format!("{} checks", &found[1]),
        skipped => format!("{} checks, {skipped} not possible here", &found[1]),
    };
    let facts = text.lines().filter(|line| line.starts_with("fact "));
    let skipped = text.lines().filter_map(|line| {
        let (check, _) = line.strip_prefix("check ")?.split_once(": skipped")?;
        Some(check.to_owned())
    });
    Ok(StubReport {
        facts: facts.map(str::to_owned).collect(),
        skipped: skipped.collect(),
        remark,
    })
}

/// Both backends show a guest the same machine.
pub fn same_facts(rig: &Rig) -> Result<String> {
    let facts = rig
        .stub_facts
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let of = |place| facts.iter().find(|(known, _)| *known == place);
    let (Some((_, amd)), Some((_, intel))) = (of(Place::QEMU_BIOS), of(Place::Bochs)) else {
        return Err(CannotTell("the stub's scenarios did not run on both").into());
    };
    ensure!(!amd.is_empty(), "the stub stated no facts");
    let only = |these: &[String], those: &[String]| {
        let only = these.iter().filter(|fact| !those.contains(fact));
        only.cloned().collect::<Vec<_>>().join("\n")
    };
    let (only_amd, only_intel) = (only(amd, intel), only(intel, amd));
    ensure!(
        only_amd.is_empty() && only_intel.is_empty(),
        "only on {}:\n{only_amd}\nonly on {}:\n{only_intel}",
        Place::QEMU_BIOS.name(),
        Place::Bochs.name()
    );
    Ok(format!("{} facts", amd.len()))
}

/// The default configuration as it is: Linux on the terminal, the stub beside it, and the
/// escape key between them.
pub fn two_vms(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let mut text = fs::read_to_string(paths::workspace().join("plinth.toml"))?;
    // The same files, under the names that they have here.
    for (name, file) in [
        ("\"@linux\"", guests::CATALOGUE[0].name),
        ("\"@initramfs\"", "initramfs"),
        ("\"@stub\"", "stub"),
    ] {
        ensure!(text.contains(name), "plinth.toml does not name {name}");
        text = text.replace(name, &format!("\"{file}\""));
    }
    let mut session = rig.boot_text(start, &text, |machine| {
        // Where time is instructions QEMU runs one processor for long and then the other. To
        // those of the stub's checks that measure time, a processor that stood still is a fault.
        machine.cpus = 1;
    })?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    let terminal = shell.terminal();
    terminal.send("\x1d2")?;
    terminal.expect(&Regex::new("console 2: stub")?, limits.command)?;
    let report = stub_report(terminal, limits)?;
    terminal.send("\x1dl")?;
    terminal.expect(&Regex::new(r"1\s+linux[\s\S]*2\s+stub")?, limits.command)?;
    terminal.send("\x1d1")?;
    terminal.expect(&Regex::new("console 1: linux")?, limits.command)?;
    shell.still_there()?;
    ensure!(shell.ask("nproc")? == "1", "the shell has changed");
    // The stub was busy beside it.
    ensure!(linux::stolen(&mut shell)? > 0, "no steal time was told");
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(report.remark)
}

/// A guest that restarts itself comes up again, as from power-on.
pub fn reboot(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let guest = &guests::CATALOGUE[0];
    let mut session = rig.boot(start, &[Vm::linux(guest)])?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    shell.ask("echo left >/tmp/from-before")?;
    shell.say("reboot")?;
    let (mut shell, _) =
        Shell::wait_for(&mut session, limits).context("after the guest's reboot")?;
    let left = shell.run("cat /tmp/from-before")?;
    ensure!(left.status != 0, "a file outlived the reboot");
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// A guest that destroys itself ends, with its registers shown; the other does not notice.
pub fn triple_fault(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let vms = [
        Vm::linux(&guests::CATALOGUE[0]),
        Vm::stub("faulty", "checks=none facts=off end=triple-fault"),
    ];
    let mut session = rig.boot(start, &vms)?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    ensure!(shell.ask("nproc")? == "1", "the other guest has changed");
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    for (what, pattern) in [
        ("the VM's end with its reason", r"faulty.*(?i:triple fault)"),
        ("its registers", r"(?i:\brip\b)"),
    ] {
        let shown = Regex::new(pattern)?.is_match(&text);
        ensure!(shown, "Plinth did not show {what}");
    }
    Ok(String::new())
}

/// The stub's ways to misbehave, and what is to be said of the end of such a guest.
const ABUSES: [(&str, &str); 21] = [
    ("triple-fault", "triple fault"),
    ("jump-nowhere", "powered off"),
    ("stack-nowhere", "stack or tables are outside RAM"),
    ("tables-nowhere", "triple fault"),
    ("idt-nowhere", "triple fault"),
    ("odd-mmio", "does not emulate"),
    ("endless-string", "powered off"),
    ("port-storm", "powered off"),
    ("msr-storm", "powered off"),
    ("mmio-storm", "powered off"),
    ("pci-storm", "powered off"),
    ("disk-storm", "powered off"),
    ("hypercall-storm", "powered off"),
    ("control-storm", "powered off"),
    ("timer-flood", "powered off"),
    ("bad-ipi", "powered off"),
    ("console-flood", "powered off"),
    ("task-loop", "powered off"),
    ("ipi-storm", "powered off"),
    ("level-storm", "powered off"),
    ("apic-base", "powered off"),
];

/// Guests that misbehave, each in its own way, end or power off; another beside them finds
/// its machine in order, and the host lives on.
pub fn abuse(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    // The checks that measure time would notice that others use the processors, too.
    let sound = "checks=cpuid,msr,exceptions,memory,io,fpu,acpi,display end=poweroff";
    let sound = Vm {
        more: "display = \"vga-text\"\n",
        ..Vm::stub("sound", sound)
    };
    let mut text = sound.section();
    for (name, _) in ABUSES {
        let line = format!("checks=none facts=off abuse={name} end=poweroff");
        let vm = Vm {
            disks: &[Disk::Writable],
            vcpus: if name == "ipi-storm" { 4 } else { 1 },
            ..Vm::stub(name, &line)
        };
        text += &vm.section();
    }
    let mut session = rig.boot_text(start, &text, |_| {})?;
    let report = stub_report(&mut session, limits)?;
    report.ensure_none_skipped(|check| check.starts_with("display."))?;
    session.wait_for_power_off(limits.boot)?;
    let text = session.text();
    for (name, end) in ABUSES {
        let line = Regex::new(&format!(r"(?m)^\[plinth\] {name}: .*{end}"))?;
        ensure!(line.is_match(&text), "nothing was said like /{line}/");
    }
    ensure!(!text.contains("HOST FAULT"), "the host failed");
    Ok(format!("{} misbehave", ABUSES.len()))
}

/// `cargo xtask run` as the README tells it, by UEFI, with the guests of `plinth.toml`: in the workstation's time, where
/// the processors run as they come, not by counted instructions.
pub fn by_default(_rig: &Rig, log: &Path) -> Result<String> {
    let banner = regex::escape(initramfs::BANNER);
    let output = Command::new(std::env::current_exe()?)
        .args(["run", "--headless", "--accel", "tcg"])
        .args(["--until", &format!(r"{banner}\S+ ready")])
        .args(["--timeout", &RUN_LIMIT_S.to_string()])
        .stderr(Stdio::null())
        .output()?;
    fs::write(log, &output.stdout)?;
    ensure!(
        output.status.success(),
        "the shell was not there in {RUN_LIMIT_S} s: {}",
        output.status
    );
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use super::super::terminal::fake::Script;
    use super::*;

    const LIMITS: Limits = Limits {
        boot: Duration::from_secs(1),
        command: Duration::from_secs(1),
    };

    #[test]
    fn a_failed_check_of_the_stub_is_named() {
        let said = format!(
            "{STUB_GREETING}\r\nfact cpu: x\r\ncheck msr.pat: FAILED: 0, not 6\r\n\
             stub: 4 passed, 1 failed, 0 skipped\r\n"
        );
        let report = stub_report(&mut Script::new(&said, Vec::new()), LIMITS);
        let error = report.err().unwrap().to_string();
        assert!(error.contains("msr.pat"), "{error}");
    }

    #[test]
    fn only_the_emulators_own_faults_are_let_pass() {
        let said = format!(
            "{STUB_GREETING}\r\ncheck a.b: FAILED: x\r\ncheck a.c: ok\r\n\
             stub: 1 passed, 1 failed, 0 skipped\r\n"
        );
        let report = |faults: &[&str]| {
            stub_report_but(&mut Script::new(&said, Vec::new()), LIMITS, faults).is_ok()
        };
        assert!(report(&["a.b"]));
        assert!(!report(&["a"]) && !report(&["a.c"]) && !report(&[]));
    }

    #[test]
    fn the_stubs_facts_and_skips_are_kept() {
        let said = format!(
            "{STUB_GREETING}\r\nfact cpu: x\r\ncheck fpu.avx: skipped: none\r\n\
             stub: 4 passed, 0 failed, 1 skipped\r\n"
        );
        let report = stub_report(&mut Script::new(&said, Vec::new()), LIMITS).unwrap();
        assert_eq!(report.facts, ["fact cpu: x"]);
        assert_eq!(report.remark, "4 checks, 1 not possible here");
        assert_eq!(report.skipped, ["fpu.avx"]);
        let apic = |check: &str| check.starts_with("apic.");
        assert!(report.ensure_none_skipped(apic).is_ok());
        assert!(report.ensure_none_skipped(|_| true).is_err());
    }

    #[test]
    fn a_stub_that_checks_nothing_fails() {
        let said = format!("{STUB_GREETING}\r\nstub: 0 passed, 0 failed, 0 skipped\r\n");
        assert!(stub_report(&mut Script::new(&said, Vec::new()), LIMITS).is_err());
    }

    #[test]
    fn no_way_to_misbehave_is_left_out() {
        let source = include_str!("../../../guest-stub/src/abuse.rs");
        let name = Regex::new(r#"(?m)^        name: "([a-z-]+)""#).unwrap();
        let known: Vec<_> = name
            .captures_iter(source)
            .map(|found| found[1].to_owned())
            .collect();
        assert_eq!(known, ABUSES.map(|(name, _)| name));
    }

    #[test]
    fn the_default_configuration_is_right() {
        let text = include_bytes!("../../../plinth.toml");
        let config = manage::config::parse("plinth.toml", text);
        assert_eq!(config.report(), "plinth.toml: 2 VMs can start\n");
        assert!(config.vms[0].focus && config.vms[0].name == "linux");
    }
}
