//! Scenarios in which Plinth has to refuse something, in words that help.

use std::{
    fmt::Write,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use super::{
    rig::{Rig, Start, Vm},
    running::{STUB_GREETING, stub_to_power_off},
    terminal::Terminal,
    test_kernels::interrupted,
};
use crate::guests;

/// A guest without a fault beside the faulty ones; short, and it powers off.
const SOUND: Vm<'static> = Vm {
    name: "stub",
    vcpus: 1,
    memory_mib: 32,
    kernel: "stub",
    initrd: None,
    command_line: "checks=cpuid end=poweroff",
    disks: &[],
    more: "",
};

/// A processor of AMD's without AMD-V.
pub fn no_amd_v(rig: &Rig, start: &Start) -> Result<String> {
    no_virtualization(
        rig,
        start,
        "qemu64,-svm",
        "AMD-V: not passed",
        r"SVM\s+required\s+missing",
    )
}

/// A processor of Intel's without VT-x; QEMU cannot emulate any other.
pub fn no_vt_x(rig: &Rig, start: &Start) -> Result<String> {
    no_virtualization(
        rig,
        start,
        "Nehalem",
        "VT-x: not passed",
        r"VMX\s+required\s+missing",
    )
}

/// Plinth says what is missing, and neither crashes nor starts a guest.
fn no_virtualization(
    rig: &Rig,
    start: &Start,
    cpu_model: &str,
    verdict: &str,
    reason: &str,
) -> Result<String> {
    let limits = start.place.limits();
    let mut session = rig.boot_text(start, &SOUND.section(), |machine| {
        machine.cpu_model = Some(cpu_model.to_owned());
    })?;
    for line in [verdict, reason, "Plinth cannot run guests on this machine"] {
        session
            .expect(&Regex::new(line)?, limits.boot)
            .context("waiting for the pre-flight check")?;
    }
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    let crash = Regex::new(r"(?i)panic|page fault|general protection|double fault")?;
    if let Some(found) = crash.find(&text) {
        bail!("Plinth crashed: {}", found.as_str());
    }
    ensure!(
        !text.contains(STUB_GREETING),
        "a guest ran without virtualization"
    );
    Ok(String::new())
}

/// A VM with a mistake, and what has to be said of it.
struct Mistake {
    vm: &'static str,
    keys: &'static str,
    complaint: &'static str,
}

/// Mistakes that can be seen without the machine.
const MISTAKES: [Mistake; 4] = [
    Mistake {
        vm: "typo",
        keys: "memory = \"32M\"\nvcpu = 1\nboot = { kernel = \"stub\" }",
        complaint: "vm.vcpu: unknown key",
    },
    Mistake {
        vm: "many",
        keys: "memory = \"32M\"\nvcpus = 1000\nboot = { kernel = \"stub\" }",
        complaint: "vm.vcpus: 1000",
    },
    Mistake {
        vm: "small",
        keys: "memory = \"1M\"\nboot = { kernel = \"stub\" }",
        complaint: "vm.memory: \"1M\"",
    },
    Mistake {
        vm: "lost",
        keys: "memory = \"32M\"\nboot = { kernel = \"nowhere\" }",
        complaint: "vm.boot.kernel: nowhere",
    },
];

/// More memory than any machine of the tests has, which only the machine can know.
const GREEDY: Mistake = Mistake {
    vm: "greedy",
    keys: "memory = \"512G\"\nboot = { kernel = \"stub\" }",
    complaint: "vm.memory: 512 GiB",
};

/// The configuration with all these mistakes, and the sound guest last.
fn configuration<'m>(mistakes: impl Iterator<Item = &'m Mistake>) -> String {
    let mut text = String::new();
    for Mistake { vm, keys, .. } in mistakes {
        write!(text, "[[vm]]\nname = \"{vm}\"\n{keys}\n").expect("a String takes any text");
    }
    text + &SOUND.section()
}

/// Each mistake is reported with file, line, column, VM and key; none is forgotten.
fn reported<'m>(text: &str, mistakes: impl Iterator<Item = &'m Mistake>) -> Result<()> {
    for Mistake { vm, complaint, .. } in mistakes {
        let complaint = regex::escape(complaint);
        let pattern = format!(r"plinth\.toml:\d+:\d+: error: VM {vm}: {complaint}");
        let said = Regex::new(&pattern)?.is_match(text);
        ensure!(said, "nothing said like /{pattern}/");
    }
    Ok(())
}

/// Every mistake disables its VM only.
pub fn bad_config(rig: &Rig, start: &Start) -> Result<String> {
    let mistakes = || MISTAKES.iter().chain([&GREEDY]);
    let mut session = rig.boot_text(start, &configuration(mistakes()), |_| {})?;
    stub_to_power_off(&mut session, start.place.limits())?;
    reported(&session.text(), mistakes())?;
    Ok(format!("{} mistakes", mistakes().count()))
}

/// A kernel that is none is refused by name, and so is one cut short; and a TSC that the processor cannot give. Beside them
/// runs a VM with the least memory.
pub fn bad_kernel(rig: &Rig, start: &Start) -> Result<String> {
    let bad = |name: &'static str| Vm {
        name,
        kernel: name,
        ..SOUND
    };
    let fast = Vm {
        name: "fast",
        more: "tsc-khz = 9999999\n",
        ..SOUND
    };
    // The least that a VM may have is enough for a kernel that fits.
    let tiny = Vm {
        memory_mib: 4,
        command_line: "checks=memory end=poweroff",
        ..SOUND
    };
    let vms = [tiny, bad("letter"), bad("cut-short"), fast];
    let mut session = rig.boot(start, &vms)?;
    stub_to_power_off(&mut session, start.place.limits())?;
    let text = session.text();
    for pattern in [
        r"VM letter: .*letter: is not a bzImage, ELF or multiboot kernel",
        r"cut-short.*(cut short|truncated|ends)",
        r"fast: cannot start: its TSC cannot run at 9999999 kHz: this host's runs at \d+ kHz, and the processor has no TSC scaling",
    ] {
        let said = Regex::new(pattern)?.is_match(&text);
        ensure!(said, "nothing said like /{pattern}/");
    }
    Ok(String::new())
}

/// A file that is no TOML: the place of the error, and the machine goes off again.
pub fn unparsable(rig: &Rig, start: &Start) -> Result<String> {
    let limits = start.place.limits();
    let text = "[[vm]]\nname = \"linux\nmemory = 1\n";
    let mut session = rig.boot_text(start, text, |_| {})?;
    session.expect(&Regex::new(r"plinth\.toml:2:\d+: error: ")?, limits.boot)?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// `cargo xtask check-config` says the same on the workstation, and exits with 2.
pub fn check_config(rig: &Rig, log: &Path) -> Result<String> {
    let file = rig.files.join("plinth.toml");
    guests::write_whole(&file, configuration(MISTAKES.iter()).as_bytes())?;
    let output = Command::new(std::env::current_exe()?)
        .arg("check-config")
        .arg(&file)
        .output()?;
    fs::write(log, [output.stdout.as_slice(), &output.stderr].concat())?;
    ensure!(
        output.status.code() == Some(2),
        "it ended with {}",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    reported(&text, MISTAKES.iter())?;
    ensure!(
        text.contains("1 VM can start"),
        "the VM without a mistake is lost"
    );
    Ok(format!("{} mistakes", MISTAKES.len()))
}

/// The exit codes of a run that takes too long, and of one that is interrupted; nothing runs on after them.
pub fn exit_codes(rig: &Rig, log: &Path) -> Result<String> {
    let run = |last: [&str; 4]| {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["run", "--headless", "--accel", "tcg", "--firmware", "bios"])
            .args(["--append", "checks=none facts=off end=halt"])
            .arg("--kernel")
            .arg(rig.files.join("stub"))
            .args(last)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        Ok::<_, anyhow::Error>(command)
    };
    let late = run(["--until", "no such words", "--timeout", "1"])?.output()?;
    ensure!(
        late.status.code() == Some(124),
        "the time limit passed, and it ended with {}",
        late.status
    );
    // The machine runs once anything is on its serial line; its end closes the pipe only if the emulator has ended, too.
    let (status, said) = interrupted(
        run(["--until", "no such words", "--timeout", "300"])?,
        |said| String::from_utf8_lossy(said).contains("Plinth"),
    )?;
    fs::write(log, [late.stdout, said].concat())?;
    ensure!(
        status.code() == Some(130),
        "interrupted, it ended with {status}"
    );
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_that_nobody_mentions_is_missed() {
        let said = "plinth.toml:4:1: error: VM typo: vm.vcpu: unknown key; did you mean vcpus?\n";
        assert!(reported(said, MISTAKES[..1].iter()).is_ok());
        assert!(reported(said, MISTAKES[..2].iter()).is_err());
    }

    #[test]
    fn the_parser_says_what_is_expected_of_it() {
        let text = configuration(MISTAKES.iter());
        let report = manage::config::parse("plinth.toml", text.as_bytes()).report();
        // The last one is about a file, which parsing does not look at.
        reported(&report, MISTAKES[..3].iter()).unwrap();
    }
}
