//! Debian's packages, downloaded and unpacked without being installed.
//!
//! Purpose: guest kernels, busybox and the Rust library source come from packages.
//!
//! Invariants: apt works on a private state below the cache directory, so neither the
//! sources nor the package lists of the machine are touched; packages are verified
//! against Debian's own archive keys.
//!
//! The mirror is the one that the machine's apt already uses. `PLINTH_DEBIAN_MIRROR`
//! names another (an URI such as `http://host/debian`), for machines of another
//! distribution or without sources.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::process::output_of;

/// Names the Debian mirror to use in place of the configured one.
pub const MIRROR_VARIABLE: &str = "PLINTH_DEBIAN_MIRROR";

/// Where Debian's archive keys are installed; the second name is newer Debian's.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// How often a download is tried, and the pause before the next time: mirrors and proxies
/// refuse at times.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(5);

/// Which of Debian's archives a suite is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Archive {
    /// The main one.
    Main,
    /// Security updates.
    Security,
}

/// A suite to look for a package in.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Where it is.
    pub archive: Archive,
    /// "bookworm", "sid".
    pub name: &'static str,
}

/// A package that no suite has, or that none of them could be asked for: nothing that the program asking
/// for it has done.
#[derive(Debug, Default)]
pub struct Unavailable {
    /// What each suite said.
    reasons: Vec<String>,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tried {ATTEMPTS} times: {}", self.reasons.join("; "))
    }
}

impl std::error::Error for Unavailable {}

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
        let targets = output_of(&mut command)?;
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
pub struct Apt {
    directory: PathBuf,
    architecture: Architecture,
}

/// For which processors a package is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// 64 bits.
    Amd64,
    /// 32 bits.
    I386,
}

impl Architecture {
    /// Debian's name.
    const fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::I386 => "i386",
        }
    }
}

impl Apt {
    /// Makes the state for `suite` in an empty directory and reads the suite's lists of `what`.
    fn open(directory: &Path, mirrors: &Mirrors, suite: Suite, what: What) -> Result<Self> {
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
            "{} [signed-by={keyring}] {} {} main\n",
            match what {
                What::Program(_) => "deb",
                What::Source => "deb-src",
            },
            mirrors.of(suite.archive),
            suite.name
        );
        fs::write(directory.join("sources.list"), source)?;
        // Without a list of installed packages the suite's version is the only candidate.
        fs::write(directory.join("status"), "")?;
        let apt = Self {
            directory: directory.to_owned(),
            architecture: match what {
                What::Program(architecture) => architecture,
                What::Source => Architecture::Amd64,
            },
        };
        output_of(apt.command("apt-get").args([
            "-qq",
            "update",
            "-o",
            "APT::Update::Error-Mode=any",
        ]))?;
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
            format!("APT::Architecture={}", self.architecture.name()),
            format!("APT::Architectures={}", self.architecture.name()),
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
    ///
    /// # Errors
    /// It failed; the error has its last line.
    pub fn cache(&self, arguments: &[&str]) -> Result<String> {
        output_of(self.command("apt-cache").args(arguments))
    }

    /// Downloads the package; its file is in this state's directory.
    fn download(&self, package: &str, what: What) -> Result<PathBuf> {
        let mut command = self.command("apt-get");
        command.arg("-qq");
        let ending = match what {
            What::Program(_) => {
                command.arg("download");
                ".deb"
            }
            // As its authors published it, without Debian's changes.
            What::Source => {
                command.args(["source", "--download-only", "--tar-only"]);
                ".orig.tar.xz"
            }
        };
        output_of(command.arg(package))?;
        let files = fs::read_dir(&self.directory)?.filter_map(|entry| Some(entry.ok()?.path()));
        files
            .map(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let name = name.into_owned();
                (path, name)
            })
            .find(|(_, name)| {
                name.ends_with(ending) && name.split('_').next() == package.split('=').next()
            })
            .map(|(path, _)| path)
            .with_context(|| format!("apt-get downloaded no file for {package}"))
    }
}

/// Which form of a package.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    /// Compiled.
    Program(Architecture),
    /// Its source.
    Source,
}

/// A downloaded package.
pub struct Package {
    /// Its file's name, which holds the version.
    pub name: String,
    file: PathBuf,
    /// Held so that the file lives as long as this.
    _scratch: Scratch,
}

impl Package {
    /// The bytes of the one member that matches a `tar` wildcard.
    ///
    /// # Errors
    /// There is none.
    pub fn member(&self, wildcard: &str) -> Result<Vec<u8>> {
        let bytes = self.tar(&["--to-stdout", "--wildcards", wildcard])?;
        ensure!(!bytes.is_empty(), "{} has no {wildcard}", self.name);
        Ok(bytes)
    }

    /// Unpacks members, each a path below `./`, into a folder.
    ///
    /// # Errors
    /// One is not there, or the folder cannot be written.
    pub fn unpack(&self, folder: &Path, members: &[String]) -> Result<()> {
        fs::create_dir_all(folder)?;
        let folder = folder.display().to_string();
        let mut arguments = vec!["--directory", &folder];
        arguments.extend(members.iter().map(String::as_str));
        self.tar(&arguments).map(drop)
    }

    /// What `tar --extract ARGUMENTS` prints, run on the package's files.
    fn tar(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut unpack = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&self.file)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run dpkg-deb")?;
        let pipe = unpack.stdout.take().context("the pipe was asked for")?;
        let tar = Command::new("tar")
            .arg("--extract")
            .args(arguments)
            .stdin(pipe)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run tar");
        let unpacked = unpack.wait()?;
        let tar = tar?;
        ensure!(
            unpacked.success() && tar.status.success(),
            "unpacking {} failed",
            self.name
        );
        Ok(tar.stdout)
    }
}

/// A directory that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(cache: &Path, name: &str) -> Result<Self> {
        // Several threads may fetch from one suite at once.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = cache.join(format!(".apt-{name}.{}.{number}", std::process::id()));
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

/// Downloads from the first suite that has it the package that `choose` names: a name, or
/// `name=version`.
///
/// # Errors
/// [`Unavailable`]: no suite has it, or none can be reached.
pub fn fetch(
    cache: &Path,
    suites: &[Suite],
    choose: impl Fn(&Apt) -> Result<String>,
) -> Result<Package> {
    fetch_for(cache, suites, Architecture::Amd64, choose)
}

/// The same for other processors.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_for(
    cache: &Path,
    suites: &[Suite],
    architecture: Architecture,
    choose: impl Fn(&Apt) -> Result<String>,
) -> Result<Package> {
    patiently(cache, suites, What::Program(architecture), choose)
}

/// Downloads a package's source, packed by XZ, from the first suite that has it.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_source(cache: &Path, suites: &[Suite], package: &str) -> Result<Source> {
    patiently(cache, suites, What::Source, |_| Ok(package.to_owned())).map(Source)
}

/// Tries all suites, several times.
fn patiently(
    cache: &Path,
    suites: &[Suite],
    what: What,
    choose: impl Fn(&Apt) -> Result<String>,
) -> Result<Package> {
    let mirrors = Mirrors::find()?;
    let mut attempt = 1;
    loop {
        let mut reasons = Vec::new();
        for suite in suites {
            match from_suite(cache, &mirrors, *suite, what, &choose) {
                Ok(package) => return Ok(package),
                Err(error) => reasons.push(format!("{}: {error:#}", suite.name)),
            }
        }
        if attempt == ATTEMPTS {
            return Err(Unavailable { reasons }.into());
        }
        attempt += 1;
        thread::sleep(PAUSE);
    }
}

/// Downloads from this suite.
fn from_suite(
    cache: &Path,
    mirrors: &Mirrors,
    suite: Suite,
    what: What,
    choose: impl Fn(&Apt) -> Result<String>,
) -> Result<Package> {
    let scratch = Scratch::new(cache, suite.name)?;
    let apt = Apt::open(&scratch.0, mirrors, suite, what)?;
    let file = apt.download(&choose(&apt)?, what)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    Ok(Package {
        name: name.into_owned(),
        file,
        _scratch: scratch,
    })
}

/// A downloaded source.
pub struct Source(Package);

impl Source {
    /// Unpacks the members that match these `tar` wildcards into a folder, without the topmost folder of
    /// their names.
    ///
    /// # Errors
    /// None matches one of them, or the folder cannot be written.
    pub fn unpack(&self, folder: &Path, wildcards: &[&str]) -> Result<()> {
        fs::create_dir_all(folder)?;
        output_of(
            Command::new("tar")
                .args(["--extract", "--strip-components=1", "--wildcards", "--file"])
                .arg(&self.0.file)
                .arg("--directory")
                .arg(folder)
                .args(wildcards),
        )
        .with_context(|| format!("unpacking {}", self.0.name))
        .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
