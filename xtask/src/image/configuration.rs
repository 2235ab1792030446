//! A configuration on the workstation, and the files that it names.
//!
//! A path is relative to the configuration's folder. A name that begins with `@` stands for
//! something that xtask makes or fetches:
//!
//! | name | file |
//! | --- | --- |
//! | `@linux` | Debian's kernel for virtual machines, or the workstation's own |
//! | `@linux-6.1-cloud`, `@memtest86+`, .. | that file from a Debian package (`guests::packages`) |
//! | `@linux-6.1-cloud.elf` | the ELF file inside that kernel |
//! | `@initramfs` | a small system around busybox |
//! | `@initramfs-32` | the same for 32-bit guests |
//! | `@stub` | Plinth's own test guest |
//! | `@selftests` | the small system, with Linux' x86 self-tests in `/x86` |
//! | `@qemu-test-memory`, .. | that test kernel of QEMU's own (`guests::qemu_tests`) |
//! | `@boot-disk` | a disk with Linux, and GRUB for UEFI |
//!
//! The image has the files under the very names that the configuration gives them, so the
//! kernel reads the same text.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::Context;
use manage::config::{self, Config, Environment, FileFacts, FileKind};

use crate::{
    exit::{Code, Stop},
    guests, initramfs, paths, stub,
};

/// The text of a `plinth.toml`, not yet judged.
#[derive(Debug)]
pub struct Configuration {
    /// What to call it in messages.
    pub name: String,
    /// The text.
    pub text: Vec<u8>,
    /// The folder that its paths are relative to.
    folder: PathBuf,
    /// Files found so far, or why they were not.
    found: RefCell<BTreeMap<String, Result<PathBuf, String>>>,
    /// Where kernels that were found by a special name are from.
    origins: RefCell<Vec<String>>,
}

impl Configuration {
    /// Reads a file; without a name, the workspace's `plinth.toml`.
    ///
    /// # Errors
    /// [`Code::Usage`]: it can't be read.
    pub fn read(file: Option<&Path>) -> anyhow::Result<Self> {
        let default = paths::workspace().join("plinth.toml");
        let file = file.unwrap_or(&default);
        let name = paths::shown(file);
        let text =
            fs::read(file).map_err(|e| Stop::with(Code::Usage, format!("{name}: error: {e}")))?;
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self::new(name, text, folder))
    }

    /// A configuration made up by xtask, whose paths are relative to `folder`.
    pub fn new(name: impl Into<String>, text: impl Into<Vec<u8>>, folder: PathBuf) -> Self {
        Configuration {
            name: name.into(),
            text: text.into(),
            folder,
            found: RefCell::default(),
            origins: RefCell::default(),
        }
    }

    /// Has `name` stand for a file wherever that is.
    pub fn with_file(self, name: &str, path: PathBuf) -> Self {
        self.found.borrow_mut().insert(name.to_owned(), Ok(path));
        self
    }

    /// Where kernels that were found by a special name are from, a line each.
    pub fn origins(&self) -> Vec<String> {
        self.origins.borrow().clone()
    }

    /// Parses it and looks at the files that it names.
    pub fn check(&self) -> Config {
        let mut config = config::parse(&self.name, &self.text);
        config::check(&mut config, self);
        config
    }

    /// The files that it names and that are there: name as written, and where. Also those of
    /// VMs that will not start: the kernel is to judge them by what they are.
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        let config = config::parse(&self.name, &self.text);
        let mut files = BTreeMap::new();
        let mut add = |name: &str| {
            if let Ok(path) = self.find(name) {
                files.insert(name.to_owned(), path);
            }
        };
        for file in &config.host.files {
            add(&file.path);
        }
        for vm in &config.vms {
            let disks = vm.disks.iter().map(|disk| disk.image.as_str());
            for name in vm.boot.paths().chain(disks) {
                add(name);
            }
        }
        files.into_iter().collect()
    }

    /// The file that a name stands for. What is made or fetched is so once.
    fn find(&self, name: &str) -> Result<PathBuf, String> {
        let known = self.found.borrow().get(name).cloned();
        known.unwrap_or_else(|| {
            let found = match name.strip_prefix('@') {
                Some(special) => self.special_file(special).map_err(|e| format!("{e:#}")),
                None => Ok(self.folder.join(name)),
            };
            self.found
                .borrow_mut()
                .insert(name.to_owned(), found.clone());
            found
        })
    }

    /// The file that a name stands for, made or fetched if need be.
    ///
    /// # Errors
    /// It cannot be had; [`Unavailable`](crate::apt::Unavailable) where a package cannot.
    pub fn obtain(&self, name: &str) -> anyhow::Result<PathBuf> {
        match name.strip_prefix('@') {
            Some(special) => {
                let path = self.special_file(special)?;
                let found = self
                    .found
                    .borrow_mut()
                    .insert(name.to_owned(), Ok(path.clone()));
                drop(found);
                Ok(path)
            }
            None => Ok(self.folder.join(name)),
        }
    }

    /// What `@name` stands for.
    fn special_file(&self, name: &str) -> anyhow::Result<PathBuf> {
        let cache = paths::cache();
        let kernel = match name {
            "initramfs" => return initramfs::ensure(&cache),
            "initramfs-32" => return initramfs::ensure_32(&cache),
            "stub" => return stub::ensure(),
            "boot-disk" => return guests::boot_disk::ensure(&cache),
            name if name.starts_with(guests::qemu_tests::PREFIX) => {
                return guests::qemu_tests::program(&cache, name);
            }
            "selftests" => return guests::selftests::ensure(&cache),
            "linux" => guests::default_linux(&cache)?,
            other => guests::file(&cache, other).context("after @: linux, initramfs, stub, or")?,
        };
        let origin = format!("@{name}: {}", kernel.origin);
        self.origins.borrow_mut().push(origin);
        Ok(kernel.path)
    }
}

impl Environment for Configuration {
    /// Where it will run is not known here.
    fn memory_bytes(&self) -> Option<u64> {
        None
    }

    fn processors(&self) -> Option<usize> {
        None
    }

    fn file(&self, name: &str) -> Result<FileFacts, String> {
        let path = self.find(name)?;
        let facts = || -> std::io::Result<FileFacts> {
            let mut file = File::open(&path)?;
            let bytes = file.metadata()?.len();
            let mut head = Vec::new();
            (&mut file)
                .take(FileKind::SNIFF_BYTES as u64)
                .read_to_end(&mut head)?;
            Ok(FileFacts {
                bytes,
                kind: FileKind::sniff(&head),
            })
        };
        facts().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => format!("no such file ({})", path.display()),
            _ => e.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(text: &str) -> Configuration {
        Configuration::new("test.toml", text, paths::workspace())
    }

    #[test]
    fn files_are_named_as_written() {
        let c = configuration(
            "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nboot = { kernel = \"Cargo.toml\", initrd = \"xtask/../Cargo.lock\" }\ndisks = [{ image = \"README.md\" }]\n",
        );
        let names: Vec<String> = c.files().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["Cargo.toml", "README.md", "xtask/../Cargo.lock"]);
        // A text file is no kernel: the VM is disabled, with the place in the text.
        let checked = c.check();
        assert!(checked.vms.is_empty());
        assert!(
            checked.report().contains("test.toml:4:"),
            "{}",
            checked.report()
        );
    }

    #[test]
    fn an_unknown_special_name_lists_the_known_ones() {
        let c = configuration("");
        let why = c.file("@windows").unwrap_err();
        assert!(
            why.contains("initramfs") && why.contains("linux-6.1-cloud"),
            "{why}"
        );
    }
}
