//! QEMU's own test kernels say the same under Plinth as on the bare emulator, and end with the same status;
//! those that QEMU refuses are refused.

use std::{
    fs::{self, File},
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    rig::{Rig, Start},
    test_kernels::Run,
};
use crate::{
    exit::Code,
    guests::qemu_tests,
    paths,
    process::{Guarded, dies_with_us},
};

/// Longest time of a test on the bare emulator: it takes a second.
const BARE: Duration = Duration::from_secs(120);

/// Each test, in both places.
///
/// # Errors
/// One of them is another under Plinth.
pub fn qemu_tests(_: &Rig, start: &Start) -> Result<String> {
    let _ = fs::remove_file(&start.log);
    let folder = qemu_tests::ensure(&paths::cache())?;
    let tests = qemu_tests::all(&folder)?;
    ensure!(!tests.is_empty(), "QEMU's source has no tests");
    let mut differences = Vec::new();
    for test in &tests {
        let name = test.file_name().unwrap_or_default().to_string_lossy();
        let run = Run {
            kernel: test,
            emulator: start.place.emulator(),
            log: &start.log,
        };
        let plinth = said(&run.with("", 300, &[])?);
        let bare = on_bare_emulator(test, &start.log.with_extension("bare.out"))
            .with_context(|| format!("{name} on the bare emulator"))?;
        if plinth != bare {
            differences.push(format!("{name}: {plinth:?}, not {bare:?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(format!("{} tests", tests.len()))
}

/// Exit status, and what was printed.
type Said = (Option<i32>, String);

/// What `cargo xtask run` says of a kernel that it refuses.
const REFUSED: i32 = Code::NotRun.status() as i32;

/// With which QEMU's complaints of a kernel begin.
const COMPLAINT: &str = "qemu-system-x86_64: ";

fn said(output: &Output) -> Said {
    let text = String::from_utf8_lossy(&output.stdout);
    (output.status.code(), text.replace('\r', ""))
}

/// Runs a test kernel on the installed QEMU; what it prints passes through the file `output`.
fn on_bare_emulator(test: &Path, output: &Path) -> Result<Said> {
    let errors = output.with_extension("err");
    let mut command = dies_with_us("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-cpu", "max", "-m", "128M", "-kernel"])
        .arg(test)
        .arg("-chardev")
        .arg(format!(
            "file,id=output,path={}",
            output.display().to_string().replace(',', ",,")
        ))
        .args(["-device", "isa-debugcon,chardev=output"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&errors)?);
    let status = Guarded::spawn(command)?.wait(BARE)?;
    let status = status.context("it did not end in time")?;
    if fs::read_to_string(&errors)?.contains(COMPLAINT) {
        return Ok((Some(REFUSED), String::new()));
    }
    let text = fs::read(output).with_context(|| output.display().to_string())?;
    Ok((
        status.code(),
        String::from_utf8_lossy(&text).replace('\r', ""),
    ))
}
