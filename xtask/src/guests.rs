//! Finds or fetches guest kernels and the busybox of their initramfs.
//!
//! Purpose: `cargo xtask run` and `test` need real guest systems. They come, in this
//! order, from the cache, from Debian's packages (downloaded and unpacked, never
//! installed), or from the workstation's own `/boot`.
//!
//! Invariants: apt works on a private state below the cache directory, so neither the
//! sources nor the package lists of the machine are touched; packages are verified
//! against Debian's own archive keys; a file appears in the cache only when it is whole.
//!
//! The mirror is the one that the machine's apt already uses. `PLINTH_DEBIAN_MIRROR`
//! names another (an URI such as `http://host/debian`), for machines of another
//! distribution or without sources.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::progress::Step;

/// Names the Debian mirror to use in place of the configured one.
const MIRROR_VARIABLE: &str = "PLINTH_DEBIAN_MIRROR";

/// Where Debian's archive keys are installed; the second name is newer Debian's.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// Which of Debian's archives a suite is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Archive {
    Main,
    Security,
}

/// A suite to look for a package in.
#[derive(Clone, Copy, Debug)]
struct Suite {
    archive: Archive,
    name: &'static str,
}

/// A kernel that guests can be booted with.
#[derive(Debug)]
pub struct Guest {
    /// The name of its directory in the cache, and of `@name` in a configuration.
    pub name: &'static str,
    /// One line for people.
    pub description: &'static str,
    /// What its kernel release starts with, `uname -r` in the guest.
    pub release: &'static str,
    /// The package that depends on the newest kernel package.
    metapackage: &'static str,
    /// Where to look, best first.
    suites: &'static [Suite],
    /// The member of the package to take, a `tar` wildcard.
    member: &'static str,
}

/// The guests that can be fetched; the first is what `@linux` means.
pub const CATALOGUE: [Guest; 2] = [
    Guest {
        name: "linux-6.1-cloud",
        description: "Debian 12's kernel 6.1 for virtual machines",
        release: "6.1.",
        metapackage: "linux-image-cloud-amd64",
        suites: &[
            Suite {
                archive: Archive::Security,
                name: "bookworm-security",
            },
            Suite {
                archive: Archive::Main,
                name: "bookworm",
            },
        ],
        member: "./boot/vmlinuz-*",
    },
    Guest {
        name: "linux-5.10-cloud",
        description: "Debian 11's kernel 5.10 for virtual machines",
        release: "5.10.",
        metapackage: "linux-image-cloud-amd64",
        suites: &[
            Suite {
                archive: Archive::Security,
                name: "bullseye-security",
            },
            Suite {
                archive: Archive::Main,
                name: "bullseye",
            },
        ],
        member: "./boot/vmlinuz-*",
    },
];

/// The suites to take busybox-static from, when it is not installed.
const BUSYBOX_SUITES: [Suite; 2] = [
    Suite {
        archive: Archive::Main,
        name: "bookworm",
    },
    Suite {
        archive: Archive::Main,
        name: "trixie",
    },
];

/// A kernel file and where it is from.
#[derive(Debug)]
pub struct Kernel {
    /// The bzImage.
    pub path: PathBuf,
    /// One line for people: the package, or the file.
    pub origin: String,
}

/// The guest of that name in the [`CATALOGUE`].
///
/// # Errors
/// There is none; the error lists the names.
pub fn by_name(name: &str) -> Result<&'static Guest> {
    CATALOGUE
        .iter()
        .find(|guest| guest.name == name)
        .with_context(|| {
            let names: Vec<_> = CATALOGUE.iter().map(|guest| guest.name).collect();
            format!(
                "no guest kernel is called {name}; known are: {}",
                names.join(", ")
            )
        })
}

/// The kernel of `guest`, from the cache or fetched into it.
///
/// # Errors
/// It is in no suite that this machine reaches; the error lists what was tried.
pub fn ensure_kernel(cache: &Path, guest: &Guest) -> Result<Kernel> {
    let directory = cache.join("guests").join(guest.name);
    let path = directory.join("vmlinuz");
    let origin = directory.join("origin");
    if path.is_file() {
        let origin = fs::read_to_string(origin).unwrap_or_else(|_| guest.description.to_owned());
        return Ok(Kernel {
            path,
            origin: origin.trim().to_owned(),
        });
    }
    let step = Step::start(format!("Fetching {}", guest.description));
    let package = fetch(cache, guest.suites, |apt| {
        let answer = apt.cache(&["depends", guest.metapackage])?;
        dependency(&answer).with_context(|| format!("{} names no kernel", guest.metapackage))
    })
    .with_context(|| format!("cannot fetch {}", guest.description))?;
    let kernel = package.member(guest.member)?;
    ensure!(is_bzimage(&kernel), "{} holds no bzImage", package.name);
    write_whole(&path, &kernel)?;
    write_whole(&origin, format!("{}\n", package.name).as_bytes())?;
    step.done();
    Ok(Kernel {
        path,
        origin: package.name.clone(),
    })
}

/// The Linux that `@linux` stands for: the newest of the catalogue's first, or, where
/// it cannot be fetched, the workstation's own kernel.
///
/// # Errors
/// Neither is to be had; the error says what to do.
pub fn default_linux(cache: &Path) -> Result<Kernel> {
    let fetched = ensure_kernel(cache, &CATALOGUE[0]);
    let Err(error) = fetched else { return fetched };
    if let Some(path) = newest_kernel(Path::new("/boot")) {
        eprintln!("{error:#}; using {} instead", path.display());
        return Ok(Kernel {
            origin: path.display().to_string(),
            path,
        });
    }
    Err(error.context(format!(
        "no guest Linux found: there is no readable /boot/vmlinuz-*. Name one with --kernel FILE, \
         or set {MIRROR_VARIABLE} to a Debian mirror"
    )))
}

/// The static busybox of the initramfs: the installed one, else Debian's, fetched.
///
/// # Errors
/// None is installed and none can be fetched.
pub fn busybox(cache: &Path) -> Result<PathBuf> {
    let cached = cache.join("guests/busybox");
    let installed = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    for path in installed.into_iter().chain([cached.clone()]) {
        if fs::read(&path).is_ok_and(|bytes| is_static_x86_64_elf(&bytes)) {
            return Ok(path);
        }
    }
    let step = Step::start("Fetching busybox-static for the guests' initramfs");
    let package = fetch(cache, &BUSYBOX_SUITES, |_| Ok("busybox-static".to_owned()))
        .context("cannot fetch busybox-static (`apt-get install busybox-static` would do, too)")?;
    let bytes = package.member("*/bin/busybox")?;
    ensure!(
        is_static_x86_64_elf(&bytes),
        "{} holds no static busybox",
        package.name
    );
    write_whole(&cached, &bytes)?;
    step.done();
    Ok(cached)
}

/// Writes a file so that nobody ever sees a part of it; makes its directory.
///
/// # Errors
/// The directory cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().context("a file has a directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let mut name = path.file_name().context("a file has a name")?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = directory.join(name);
    fs::write(&part, bytes).with_context(|| format!("cannot write {}", part.display()))?;
    fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display()))
}

/// True when `bytes` begin like a Linux bzImage: the boot protocol's signature and
/// version (Linux, Documentation/arch/x86/boot.rst).
fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && bytes.get(0x202..0x206) == Some(b"HdrS")
}

/// True when `bytes` are an x86-64 ELF program that asks for no dynamic loader.
pub fn is_static_x86_64_elf(bytes: &[u8]) -> bool {
    /// `e_machine` of x86-64, and the program header type that names a loader.
    const EM_X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| {
        bytes
            .get(at..at + 2)
            .and_then(|field| field.try_into().ok())
            .map(u16::from_le_bytes)
    };
    // 64-bit, little-endian; the header fields of the ELF-64 specification, figure 2.
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") || u16_at(18) != Some(EM_X86_64) {
        return false;
    }
    let table = bytes
        .get(32..40)
        .and_then(|field| field.try_into().ok())
        .map(u64::from_le_bytes);
    let (Some(table), Some(size), Some(count)) = (table, u16_at(54), u16_at(56)) else {
        return false;
    };
    let mut types = (0..u64::from(count)).map(|index| {
        let at = usize::try_from(index.checked_mul(size.into())?.checked_add(table)?).ok()?;
        let field = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(u32::from_le_bytes(field))
    });
    count > 0 && types.all(|kind| kind.is_some_and(|kind| kind != PT_INTERP))
}

/// The readable kernel of `directory` with the highest version in its name.
fn newest_kernel(directory: &Path) -> Option<PathBuf> {
    let mut kernels: Vec<_> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let named = path.file_name().and_then(|name| name.to_str());
            named.is_some_and(|name| name.starts_with("vmlinuz-"))
                && fs::read(path).is_ok_and(|bytes| is_bzimage(&bytes))
        })
        .collect();
    kernels.sort_by_key(|path| version_key(&path.to_string_lossy()));
    kernels.pop()
}

/// The numbers in a name, in order: `vmlinuz-6.1.0-13` sorts after `vmlinuz-6.1.0-9`.
fn version_key(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// The package that `apt-cache depends` names first.
fn dependency(answer: &str) -> Option<String> {
    let line = answer
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))?;
    let name = line.trim();
    (!name.starts_with('<')).then(|| name.to_owned())
}

/// The mirrors of a machine, one per archive.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: String,
}

impl Mirrors {
    /// From the environment variable, else from what apt is configured with.
    fn find() -> Result<Self> {
        if let Ok(main) = env::var(MIRROR_VARIABLE) {
            return Ok(Self::beside(&main));
        }
        let format = "$(CODENAME) $(REPO_URI)";
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", format, "Created-By: Packages"]);
        let targets = text(&mut command)?;
        Self::parse(&targets).with_context(|| {
            format!("apt has no Debian mirror among its sources; name one with {MIRROR_VARIABLE}")
        })
    }

    /// Debian keeps its security archive beside the main one.
    fn beside(main: &str) -> Self {
        let main = main.trim_end_matches('/');
        Self {
            main: main.to_owned(),
            security: format!("{main}-security"),
        }
    }

    /// From lines of "codename URI".
    fn parse(targets: &str) -> Option<Self> {
        let uris = || {
            targets
                .lines()
                .filter_map(|line| line.split_once(' '))
                .map(|(codename, uri)| (codename, uri.trim().trim_end_matches('/')))
        };
        let main = uris().find(|(_, uri)| uri.ends_with("/debian"))?.1;
        let security = uris().find(|(codename, uri)| {
            codename.ends_with("-security") && uri.ends_with("debian-security")
        });
        let mut mirrors = Self::beside(main);
        if let Some((_, uri)) = security {
            uri.clone_into(&mut mirrors.security);
        }
        Some(mirrors)
    }

    fn of(&self, archive: Archive) -> &str {
        match archive {
            Archive::Main => &self.main,
            Archive::Security => &self.security,
        }
    }
}

/// A private apt state: one suite, its own lists and cache.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Makes the state for `suite` in an empty directory and reads the suite's lists.
    fn open(directory: &Path, mirrors: &Mirrors, suite: Suite) -> Result<Self> {
        let keyring = KEYRINGS
            .into_iter()
            .find(|path| Path::new(path).is_file())
            .context(
                "Debian's archive keys are missing: install the package debian-archive-keyring",
            )?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let source = format!(
            "deb [signed-by={keyring}] {} {} main\n",
            mirrors.of(suite.archive),
            suite.name
        );
        fs::write(directory.join("sources.list"), source)?;
        // Without a list of installed packages the suite's version is the only candidate.
        fs::write(directory.join("status"), "")?;
        let apt = Self {
            directory: directory.to_owned(),
        };
        text(
            apt.command("apt-get")
                .args(["-qq", "update", "-o", "APT::Update::Error-Mode=any"]),
        )?;
        Ok(apt)
    }

    /// Options on the command line win over the machine's configuration, which still
    /// supplies its proxy.
    fn command(&self, program: &str) -> Command {
        let at = |part: &str| self.directory.join(part).display().to_string();
        let options = [
            format!("Dir::Etc::SourceList={}", at("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("cache")),
            "APT::Sandbox::User=".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ];
        let mut command = Command::new(program);
        command.current_dir(&self.directory).env("LC_ALL", "C");
        for option in options {
            command.args(["-o", &option]);
        }
        command
    }

    /// What `apt-cache ARGUMENTS` prints.
    fn cache(&self, arguments: &[&str]) -> Result<String> {
        text(self.command("apt-cache").args(arguments))
    }

    /// Downloads the package; its file is in this state's directory.
    fn download(&self, package: &str) -> Result<PathBuf> {
        text(self.command("apt-get").args(["-qq", "download", package]))?;
        let files = fs::read_dir(&self.directory)?.filter_map(|entry| Some(entry.ok()?.path()));
        files
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .find(|path| path.to_string_lossy().contains(package))
            .with_context(|| format!("apt-get downloaded no file for {package}"))
    }
}

/// A downloaded package.
struct Package {
    /// Its file's name, which holds the version.
    name: String,
    file: PathBuf,
    /// Held so that the file lives as long as this.
    _scratch: Scratch,
}

impl Package {
    /// The bytes of the one member that matches a `tar` wildcard.
    fn member(&self, wildcard: &str) -> Result<Vec<u8>> {
        let mut unpack = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&self.file)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run dpkg-deb")?;
        let pipe = unpack.stdout.take().context("the pipe was asked for")?;
        let tar = Command::new("tar")
            .args(["--extract", "--to-stdout", "--wildcards", wildcard])
            .stdin(pipe)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run tar");
        let unpacked = unpack.wait()?;
        let tar = tar?;
        ensure!(
            unpacked.success() && tar.status.success() && !tar.stdout.is_empty(),
            "{} has no {wildcard}",
            self.name
        );
        Ok(tar.stdout)
    }
}

/// A directory that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(cache: &Path, name: &str) -> Result<Self> {
        let directory = cache.join(format!("guests/.{name}.{}", std::process::id()));
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self(fs::canonicalize(directory)?))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Downloads from the first suite that has it the package that `choose` names.
fn fetch(
    cache: &Path,
    suites: &[Suite],
    choose: impl Fn(&Apt) -> Result<String>,
) -> Result<Package> {
    let mirrors = Mirrors::find()?;
    let mut failures = Vec::new();
    for suite in suites {
        let scratch = Scratch::new(cache, suite.name)?;
        let attempt =
            Apt::open(&scratch.0, &mirrors, *suite).and_then(|apt| apt.download(&choose(&apt)?));
        match attempt {
            Ok(file) => {
                let name = file
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                return Ok(Package {
                    name,
                    file,
                    _scratch: scratch,
                });
            }
            Err(error) => failures.push(format!("{}: {error:#}", suite.name)),
        }
    }
    bail!("{}", failures.join("; "))
}

/// Runs a command that must succeed and gives what it prints.
fn text(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();
        bail!("{program} failed: {last}");
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed no text"))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The least that counts as a static x86-64 program: one loadable segment.
    pub fn static_elf() -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes
    }

    #[test]
    fn a_program_with_a_loader_is_not_static() {
        let mut bytes = static_elf();
        assert!(is_static_x86_64_elf(&bytes));
        bytes[64] = 3;
        assert!(!is_static_x86_64_elf(&bytes));
    }

    #[test]
    fn cut_or_foreign_programs_are_not_static() {
        let whole = static_elf();
        for length in 0..64 {
            assert!(!is_static_x86_64_elf(&whole[..length]), "{length} bytes");
        }
        let mut arm = whole.clone();
        arm[18] = 183;
        assert!(!is_static_x86_64_elf(&arm));
        let mut far = whole;
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(!is_static_x86_64_elf(&far));
    }

    #[test]
    fn the_mirrors_are_those_that_apt_uses() {
        let targets = "bookworm http://mirror.example/debian/\n\
                       bookworm-security http://security.example/debian-security/\n";
        let mirrors = Mirrors::parse(targets).unwrap();
        assert_eq!(mirrors.main, "http://mirror.example/debian");
        assert_eq!(
            mirrors.of(Archive::Security),
            "http://security.example/debian-security"
        );
    }

    #[test]
    fn the_security_archive_is_beside_a_mirror_without_one() {
        let mirrors = Mirrors::parse("bookworm http://mirror.example/debian\n").unwrap();
        assert_eq!(mirrors.security, "http://mirror.example/debian-security");
        assert_eq!(Mirrors::parse("jammy http://mirror.example/ubuntu\n"), None);
    }

    #[test]
    fn the_kernel_is_the_first_dependency() {
        let answer = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-44-cloud-amd64\n";
        assert_eq!(
            dependency(answer).as_deref(),
            Some("linux-image-6.1.0-44-cloud-amd64")
        );
        assert_eq!(dependency("linux-image-cloud-amd64\n"), None);
        assert_eq!(dependency("x\n  Depends: <virtual>\n"), None);
    }

    #[test]
    fn versions_sort_by_number() {
        assert!(version_key("vmlinuz-6.1.0-13-amd64") > version_key("vmlinuz-6.1.0-9-amd64"));
        assert!(version_key("vmlinuz-6.12.1") > version_key("vmlinuz-6.1.99"));
    }

    #[test]
    fn a_bzimage_is_known_by_its_header() {
        let mut bytes = vec![0; 0x210];
        assert!(!is_bzimage(&bytes));
        bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(is_bzimage(&bytes));
        assert!(!is_bzimage(&bytes[..0x204]));
    }

    #[test]
    fn every_guest_is_found_by_its_name() {
        for guest in &CATALOGUE {
            assert_eq!(by_name(guest.name).unwrap().release, guest.release);
        }
        assert!(
            by_name("nonesuch")
                .unwrap_err()
                .to_string()
                .contains(CATALOGUE[0].name)
        );
    }
}
