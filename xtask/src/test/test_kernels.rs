//! Scenarios in which `cargo xtask run --headless --test-devices` is what QEMU is to a test kernel.
//!
//! The whole command is run, as a person or a script would run it: what comes out of its standard output, and
//! its exit status. The test kernel is the stub.

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, ExitStatus, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{
    place::Place,
    rig::{Rig, Start},
};
use crate::{emulator::Emulator, exit::Code};

/// Longest time of one run, in seconds, but for those that are to last longer than they may.
const LIMIT_S: u64 = 300;

/// How to run a test kernel.
#[derive(Clone, Copy)]
pub struct Run<'r> {
    /// The test kernel.
    pub kernel: &'r Path,
    /// Where.
    pub emulator: Emulator,
    /// All that the command prints is added to this file.
    pub log: &'r Path,
}

impl Run<'_> {
    /// The command that runs it with this command line and these further arguments.
    fn command(self, append: &str, limit_s: u64, arguments: &[&str]) -> Result<Command> {
        let emulator = match self.emulator {
            Emulator::Qemu => "qemu",
            Emulator::Bochs => "bochs",
        };
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["run", "--headless", "--test-devices"])
            .args(["--emulator", emulator, "--timeout", &limit_s.to_string()])
            .arg("--kernel")
            .arg(self.kernel)
            .args(["--append", append])
            .args(arguments);
        Ok(command)
    }

    /// Runs it with this command line and these further arguments.
    ///
    /// # Errors
    /// The command did not start.
    pub fn with(self, append: &str, limit_s: u64, arguments: &[&str]) -> Result<Output> {
        let output = self
            .command(append, limit_s, arguments)?
            .output()
            .context("running this program")?;
        let mut text = fs::read(self.log).unwrap_or_default();
        text.extend_from_slice(&output.stdout);
        text.extend_from_slice(&output.stderr);
        fs::write(self.log, text)?;
        Ok(output)
    }

    /// Runs it to this exit status; its console.
    fn to_status(self, status: u8, append: &str, arguments: &[&str]) -> Result<String> {
        let output = self.with(append, LIMIT_S, arguments)?;
        let code = output.status.code();
        ensure!(
            code == Some(status.into()),
            "`{append}` ended with {code:?}, not {status}"
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// What the stub's fact of a module ends with: length, sum of its bytes times their places, and its text.
fn module_fact(content: &[u8], text: &str) -> String {
    let sum = (1u64..).zip(content).fold(0u64, |sum, (place, byte)| {
        sum.wrapping_add(u64::from(*byte).wrapping_mul(place))
    });
    format!(" = {} bytes, sum {sum:#x}, \"{text}\"\r\n", content.len())
}

/// The console to the byte, the devices, modules in order, both ways to enter; then the ends that a test kernel
/// can have.
pub fn test_kernels(rig: &Rig, start: &Start) -> Result<String> {
    let _ = fs::remove_file(&start.log);
    let kernel = rig.files.join("stub");
    let run = Run {
        kernel: &kernel,
        emulator: start.place.emulator(),
        log: &start.log,
    };
    let folder = rig.files.join(format!("modules-{}", start.name));
    fs::create_dir_all(&folder)?;
    let (first, second) = (folder.join("one"), folder.join("two"));
    let contents = [
        b"the first module".to_vec(),
        (0..=255).cycle().take(10_000).collect(),
    ];
    fs::write(&first, &contents[0])?;
    fs::write(&second, &contents[1])?;
    let texts = [
        format!("{} a=1 b", first.display()),
        second.display().to_string(),
    ];
    let initrd = texts.join(",");

    let console = run.to_status(
        0x63,
        "checks=test,acpi exit=0x31",
        &["--vcpus", "2", "--memory", "64", "--initrd", &initrd],
    )?;
    ensure!(
        console.starts_with("\r\nplinth guest-stub: hello\r\n"),
        "there is something before the guest's first byte"
    );
    ensure!(
        console.ends_with(" failed, 0 skipped\r\n") && console.contains(" passed, 0 failed"),
        "the stub's checks failed, or there is something behind the guest's last byte"
    );
    ensure!(!console.contains("[plinth]"), "Plinth speaks in between");
    let map = "fact memory.0x100000 = 0x3f00000 bytes, kind 1\r\n";
    ensure!(
        console.contains(map),
        "the memory map is not that of 64 MiB"
    );
    let mut rest = console.as_str();
    for (content, text) in contents.iter().zip(&texts) {
        let fact = module_fact(content, &shown(text));
        let at = rest
            .find(&fact)
            .with_context(|| format!("no module{fact}"))?;
        rest = &rest[at..];
    }

    let pvh = folder.join("pvh");
    fs::write(&pvh, without_multiboot(fs::read(&kernel)?)?)?;
    let by_pvh = Run {
        kernel: &pvh,
        ..run
    };
    let initrd = first.display().to_string();
    let console = by_pvh.to_status(5, "checks=acpi exit=2", &["--initrd", &initrd])?;
    ensure!(
        console.contains("fact entry.protocol = Pvh\r\n"),
        "the kernel without a multiboot header was not entered by PVH"
    );
    let fact = module_fact(&contents[0], &shown(&initrd));
    ensure!(console.contains(&fact), "by PVH there is no module{fact}");

    let console = run.to_status(1, "checks=conform,emulator,twins exit=0", &[])?;
    ensure!(
        console.contains(" passed, 0 failed"),
        "the stub's checks on device memory failed"
    );

    let quiet = "checks=none facts=off ";
    run.to_status(1, &format!("{quiet}exit=0"), &[])?;
    run.to_status(0, &format!("{quiet}end=triple-fault"), &[])?;
    if start.place == Place::QEMU_BIOS {
        run.to_status(0, &format!("{quiet}end=poweroff"), &[])?;
        run.to_status(0, &format!("{quiet}end=reset"), &[])?;
        let spins = format!("{quiet}end=spin");
        let code = run.with(&spins, 1, &[])?.status.code();
        ensure!(
            code == Some(Code::Timeout.status().into()),
            "a guest that never ends ended with {code:?}"
        );
        let said_all = |said: &[u8]| String::from_utf8_lossy(said).contains(" 0 skipped");
        let (status, said) = interrupted(run.command(&spins, LIMIT_S, &[])?, said_all)?;
        ensure!(
            said_all(&said) && status.code() == Some(Code::Interrupted.status().into()),
            "a guest that never ends was interrupted, and ended with {status}"
        );
    }
    fs::remove_dir_all(&folder)?;
    Ok(String::new())
}

/// Runs a command, sends it an interrupt when its output is `enough`, and waits for its end: its status and its output.
///
/// # Errors
/// It did not start.
pub fn interrupted(
    mut command: Command,
    enough: impl Fn(&[u8]) -> bool,
) -> Result<(ExitStatus, Vec<u8>)> {
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("running this program")?;
    let mut output = child.stdout.take().context("it is piped")?;
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    while !enough(&said) {
        match output.read(&mut buffer)? {
            0 => break,
            count => said.extend_from_slice(&buffer[..count]),
        }
    }
    let id = i32::try_from(child.id()).context("a process number")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), Signal::SIGINT)?;
    // The pipe is closed when all that write to it have ended, the emulator among them.
    output.read_to_end(&mut said)?;
    Ok((child.wait()?, said))
}

/// A kernel with both headers, robbed of its multiboot header.
fn without_multiboot(mut kernel: Vec<u8>) -> Result<Vec<u8>> {
    let magic = 0x1bad_b002u32.to_le_bytes();
    let at = kernel.windows(4).take(8192).position(|word| word == magic);
    let at = at.context("the stub has no multiboot header")?;
    kernel[at..at + 4].fill(0);
    Ok(kernel)
}

/// As much of a text as the stub keeps.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_known_by_length_sum_and_text() {
        assert_eq!(
            module_fact(&[1, 0, 3], "m"),
            " = 3 bytes, sum 0xa, \"m\"\r\n"
        );
    }
}
