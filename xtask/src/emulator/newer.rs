//! QEMU 10, beside the installed QEMU 7.2: another emulation of AMD-V, with x2APIC.
//!
//! It is unpacked from the backports of Debian 12, not installed. Its libraries are those that the installed
//! one has; its firmware is its own: with the older SeaBIOS it finds no disk on AHCI.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    apt::{Archive, Suite, fetch},
    deps::{self, Program},
    paths,
    process::output_of,
    progress::Step,
};

/// What `--qemu` calls it.
pub const NAME: &str = "10";

/// Where it is.
const SUITES: [Suite; 1] = [Suite {
    archive: Archive::Main,
    name: "bookworm-backports",
}];

/// The packages, and what a PC needs of each.
const PACKAGES: [(&str, &[&str]); 3] = [
    ("qemu-system-x86", &["./usr/bin/qemu-system-x86_64"]),
    ("qemu-system-data", &["./usr/share/qemu"]),
    ("seabios", &["./usr/share/seabios"]),
];

/// The folder in the cache; it is there when it is whole.
fn folder() -> PathBuf {
    paths::cache().join("qemu-10")
}

/// Its program; [`ensure`] sees to it that it is there.
pub fn program() -> PathBuf {
    folder().join("usr/bin/qemu-system-x86_64")
}

/// The folders beside an unpacked program in which it is to look for firmware; none for an installed one,
/// which knows.
pub fn firmware_folders(program: &Path) -> Vec<PathBuf> {
    let usr = program.ancestors().nth(2);
    let share = ["share/seabios", "share/qemu"].iter();
    usr.filter(|usr| *usr != Path::new("/usr"))
        .into_iter()
        .flat_map(|usr| share.clone().map(|folder| usr.join(folder)))
        .filter(|folder| folder.is_dir())
        .collect()
}

/// The program, from the cache or fetched into it.
///
/// # Errors
/// [`Unavailable`](crate::apt::Unavailable), or it does not run here.
pub fn ensure() -> Result<PathBuf> {
    // For its libraries.
    deps::require(&[Program::Qemu])?;
    let _lock = paths::lock("qemu-10")?;
    if !folder().is_dir() {
        let step = Step::start("Fetching QEMU 10 (14 MB)");
        let part = folder().with_extension("part");
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        for (package, members) in PACKAGES {
            let fetched = fetch(&paths::cache(), &SUITES, |_| Ok(package.to_owned()))
                .context("cannot fetch QEMU 10")?;
            let members = members.iter().map(|member| (*member).to_owned());
            fetched.unpack(&part, &members.collect::<Vec<_>>())?;
        }
        fs::rename(&part, folder())?;
        step.done();
    }
    let program = program();
    let words = version(&program).context("QEMU 10 does not run here")?;
    ensure!(is_ten(&words), "{} is {words}", paths::shown(&program));
    Ok(program)
}

/// The program that `--qemu` names.
///
/// # Errors
/// As [`ensure`].
pub fn named(name: &Path) -> Result<PathBuf> {
    if name == Path::new(NAME) {
        ensure()
    } else {
        Ok(name.to_owned())
    }
}

/// The first line of what it says of itself.
fn version(program: &Path) -> Result<String> {
    let text = output_of(Command::new(program).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn is_ten(words: &str) -> bool {
    words.contains(" version 10.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_version_is_known_from_others() {
        assert!(is_ten(
            "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"
        ));
        assert!(!is_ten("QEMU emulator version 7.2.10 (Debian 1:7.2)"));
        assert!(!is_ten(""));
    }

    #[test]
    fn an_installed_program_finds_its_firmware_by_itself() {
        assert!(firmware_folders(Path::new("/usr/bin/qemu-system-x86_64")).is_empty());
        assert!(firmware_folders(Path::new("qemu-system-x86_64")).is_empty());
        let root = std::env::temp_dir().join(format!("plinth-newer-{}", std::process::id()));
        let seabios = root.join("usr/share/seabios");
        fs::create_dir_all(&seabios).unwrap();
        let program = root.join("usr/bin/qemu-system-x86_64");
        assert_eq!(firmware_folders(&program), [seabios]);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn another_program_is_taken_as_it_is() {
        let other = Path::new("./10/qemu-system-x86_64");
        assert_eq!(named(other).unwrap(), other);
    }
}
