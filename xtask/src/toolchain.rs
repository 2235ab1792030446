//! A Rust toolchain that builds for bare metal, found or made.
//!
//! The kernel needs three things beyond an ordinary toolchain: `core` and `alloc` built for
//! [`BARE_METAL`], the library source (the boot loader builds `core` for its own stages), and
//! LLVM's objcopy. Where rustup may fetch them they are simply there (`rust-toolchain.toml`
//! names them). Elsewhere, on Debian, the library source of the very same compiler version
//! comes from the distribution's `rust-src` package; a private copy of the toolchain made of
//! hard links gets it, and `core` and `alloc` are compiled from it once. The installed
//! toolchain is never changed, nor is the system's package state.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::{
    apt::{self, Archive, Suite},
    exit::{Code, Stop},
    paths,
    process::{find_program, output_of},
    progress::Step,
};

/// The target that the kernel and the guest stub are compiled for.
pub const BARE_METAL: &str = "x86_64-unknown-none";

/// Where the private toolchain lies in the cache. The name says that its `core` can be optimized at
/// link time, as rustup's can; one without that is of no use.
const PRIVATE: &str = "toolchain/lto";

/// Debian suites that may carry the library source, in the order to ask them.
const SUITES: [Suite; 2] = [
    Suite {
        archive: Archive::Main,
        name: "trixie-backports",
    },
    Suite {
        archive: Archive::Main,
        name: "sid",
    },
];

/// How a program is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Optimized.
    Release,
    /// Not optimized, with overflow checks.
    Debug,
}

/// A complete toolchain.
#[derive(Clone, Debug)]
pub struct Toolchain {
    sysroot: PathBuf,
    objcopy: PathBuf,
}

impl Toolchain {
    /// Finds a complete toolchain, or makes one (about a minute, once).
    ///
    /// # Errors
    /// None is there and none can be made here; the text says what to do.
    pub fn find() -> anyhow::Result<Self> {
        let version = Version::installed()?;
        if let Some(found) = Self::complete(&version.sysroot) {
            return Ok(found);
        }
        let private = paths::cache().join(PRIVATE);
        if let Some(made) = Self::made_before(&private, &version) {
            return Ok(made);
        }
        if let Some(fetched) = Self::from_rustup(&version) {
            return Ok(fetched);
        }
        let _lock = paths::lock("toolchain")?;
        if let Some(made) = Self::made_before(&private, &version) {
            return Ok(made);
        }
        make(&version, &private).with_context(|| {
            format!(
                "no toolchain for {BARE_METAL}: with rustup, run `rustup target add {BARE_METAL}` \
                 and `rustup component add rust-src llvm-tools`; making one from Debian's \
                 packages failed"
            )
        })?;
        Self::complete(&private).context("the toolchain just made is not complete")
    }

    /// A cargo command that builds with this toolchain, in the workspace.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(self.sysroot.join("bin/cargo"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = [self.sysroot.join("bin")]
            .into_iter()
            .chain(std::env::split_paths(&path));
        command
            .current_dir(paths::workspace())
            // Programs that build scripts call by name: the same toolchain, rustup or not.
            .env("RUSTUP_TOOLCHAIN", &self.sysroot)
            .env(
                "PATH",
                std::env::join_paths(path).expect("folders of PATH have no colon"),
            );
        without_outer_cargo(&mut command);
        // LLVM's tools share their library with the compiler; build scripts call them.
        command.env("LD_LIBRARY_PATH", self.sysroot.join("lib"));
        command
    }

    /// Compiles a bare-metal program of the workspace with these features; returns the ELF
    /// file, which the next call for the same program replaces.
    ///
    /// # Errors
    /// It does not compile; the error has the compiler's words.
    pub fn build(
        &self,
        package: &str,
        features: &[&str],
        profile: Profile,
    ) -> anyhow::Result<PathBuf> {
        self.build_in(&paths::workspace(), package, features, profile)
    }

    /// As `build`, from the sources of another checkout; in place of this workspace's program.
    ///
    /// # Errors
    /// As `build`.
    pub fn build_in(
        &self,
        workspace: &Path,
        package: &str,
        features: &[&str],
        profile: Profile,
    ) -> anyhow::Result<PathBuf> {
        let (cargo_profile, folder) = match profile {
            // Older checkouts have no profile of the kernel's own.
            Profile::Release if has_profile(workspace, package)? => (package, package),
            Profile::Release => ("release", "release"),
            Profile::Debug => ("dev", "debug"),
        };
        output_of(
            self.cargo()
                .current_dir(workspace)
                .args(["build", "--package", package, "--target", BARE_METAL])
                .args(["--profile", cargo_profile])
                .args(features.iter().flat_map(|feature| ["--features", feature]))
                .env("CARGO_TARGET_DIR", paths::target()),
        )?;
        Ok(paths::target().join(BARE_METAL).join(folder).join(package))
    }

    /// Copies an ELF file without its symbols and debugging information.
    ///
    /// # Errors
    /// It is no ELF file, or can't be written.
    pub fn strip(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        // A running emulator may have the old file mapped: put a new one in its place.
        let new = to.with_extension(format!("{}.part", std::process::id()));
        output_of(
            Command::new(&self.objcopy)
                // Where LLVM's library is in toolchains that share it with the compiler.
                .env("LD_LIBRARY_PATH", self.sysroot.join("lib"))
                .arg("--strip-all")
                .args([from, &new]),
        )?;
        fs::rename(&new, to).with_context(|| to.display().to_string())
    }

    /// The toolchain at `sysroot`, if it has all that is needed.
    fn complete(sysroot: &Path) -> Option<Self> {
        let lib = sysroot.join("lib/rustlib");
        let has_core = fs::read_dir(lib.join(BARE_METAL).join("lib"))
            .ok()?
            .filter_map(Result::ok)
            .any(|e| e.file_name().to_string_lossy().starts_with("libcore-"));
        let has_source = lib.join("src/rust/library/core/src/lib.rs").is_file();
        let tools = lib.join(host()).join("bin");
        let objcopy = tools.join("llvm-objcopy");
        let has_tools = objcopy.is_file() && tools.join("llvm-objdump").is_file();
        (has_core && has_source && has_tools && sysroot.join("bin/cargo").is_file()).then(|| {
            Toolchain {
                sysroot: sysroot.to_owned(),
                objcopy,
            }
        })
    }

    /// The private toolchain, if it was made from the compiler that is installed now.
    fn made_before(private: &Path, version: &Version) -> Option<Self> {
        let made = Self::complete(private)?;
        let release = Version::of(&private.join("bin/rustc")).ok()?.release;
        (release == version.release).then_some(made)
    }

    /// Lets rustup fetch what is missing, where it may.
    fn from_rustup(version: &Version) -> Option<Self> {
        let auto_install = std::env::var_os("RUSTUP_AUTO_INSTALL").is_none_or(|v| v != "0");
        if !auto_install || find_program("rustup").is_none() {
            return None;
        }
        let step = Step::start("Fetching the bare-metal target with rustup");
        let added = [
            &["target", "add", BARE_METAL][..],
            &["component", "add", "rust-src", "llvm-tools"],
        ]
        .iter()
        .all(|args| {
            output_of(
                Command::new("rustup")
                    .args(*args)
                    .current_dir(paths::workspace()),
            )
            .is_ok()
        });
        if !added {
            step.detail("not reachable");
            step.skip();
            return None;
        }
        step.done();
        Self::complete(&version.sysroot)
    }
}

/// Whether a workspace has a compilation profile of this name.
fn has_profile(workspace: &Path, name: &str) -> anyhow::Result<bool> {
    let path = workspace.join("Cargo.toml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let header = format!("[profile.{name}]");
    Ok(text.lines().any(|line| line == header))
}

/// Forgets what the cargo that runs xtask left in the environment. Its LD_LIBRARY_PATH would
/// even make a compiler take the libraries, and so the sysroot, of another.
fn without_outer_cargo(command: &mut Command) {
    for inherited in [
        "CARGO",
        "RUSTC",
        "CARGO_MANIFEST_DIR",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "LD_LIBRARY_PATH",
    ] {
        command.env_remove(inherited);
    }
}

/// The target triple of this workstation.
fn host() -> &'static str {
    "x86_64-unknown-linux-gnu"
}

/// Which compiler is installed.
struct Version {
    /// "1.95.0".
    release: String,
    sysroot: PathBuf,
}

impl Version {
    /// The compiler that `rust-toolchain.toml` selects.
    fn installed() -> anyhow::Result<Self> {
        Self::of(Path::new("rustc"))
    }

    fn of(rustc: &Path) -> anyhow::Result<Self> {
        let ask = |args: &[&str]| {
            let mut command = Command::new(rustc);
            command.args(args).current_dir(paths::workspace());
            without_outer_cargo(&mut command);
            output_of(&mut command)
        };
        let verbose = ask(&["-vV"])?;
        let release = field(&verbose, "release: ").context("rustc -vV names no release")?;
        let triple = field(&verbose, "host: ").context("rustc -vV names no host")?;
        if triple != host() {
            bail!(
                "this workstation's rustc is for {triple}; xtask builds on {} only",
                host()
            );
        }
        Ok(Version {
            release: release.to_owned(),
            sysroot: ask(&["--print", "sysroot"])?.trim_end().into(),
        })
    }
}

/// The rest of the first line that begins with `name`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

/// Makes the private toolchain at `private`, whose parent also gets the source.
fn make(version: &Version, private: &Path) -> anyhow::Result<()> {
    for program in ["apt-get", "dpkg-deb", "tar"] {
        if find_program(program).is_none() {
            return Err(Stop::with(
                Code::MissingProgram,
                format!("{program} is not installed"),
            ));
        }
    }
    let home = private
        .parent()
        .expect("the private toolchain has a parent");
    let step = Step::start("Making a bare-metal toolchain (about a minute, once)");
    step.detail("fetching the library source");
    let source = fetch_source(version, home)?;

    step.detail("linking the installed toolchain");
    // Made beside its place and moved there when complete, so a stopped run leaves no half one.
    let new = home.join("new");
    remove_tree(&new)?;
    for part in ["bin", "lib"] {
        link_tree(&version.sysroot.join(part), &new.join(part))?;
    }
    let rustlib = new.join("lib/rustlib");
    // rustup's records describe the toolchain that it installed, not this one.
    for entry in fs::read_dir(&rustlib)? {
        let path = entry?.path();
        if path.is_file() {
            fs::remove_file(path)?;
        }
    }
    remove_tree(&rustlib.join("src"))?;
    fs::create_dir_all(rustlib.join("src"))?;
    symlink(&source, rustlib.join("src/rust"))?;
    name_llvm_tools(&rustlib.join(host()).join("bin"))?;

    step.detail("compiling core and alloc");
    compile_core(&new, &home.join("seed"))?;
    remove_tree(private)?;
    fs::rename(&new, private)?;
    step.done();
    Ok(())
}

/// Fetches and unpacks the library source; returns the folder that has `library/`.
fn fetch_source(version: &Version, home: &Path) -> anyhow::Result<PathBuf> {
    let source = home
        .join("src/usr/src")
        .join(format!("rustc-{}", version.release));
    if source.join("library/core/src/lib.rs").is_file() {
        return Ok(source);
    }
    let package = apt::fetch(&paths::cache(), &SUITES, |apt| {
        let table = apt.cache(&["madison", "rust-src"])?;
        let full = madison_version(&table, &version.release)
            .with_context(|| format!("no rust-src {}", version.release))?;
        Ok(format!("rust-src={full}"))
    })
    .context("cannot fetch the library source")?;
    let folder = format!("./usr/src/rustc-{}", version.release);
    package.unpack(
        &home.join("src"),
        &[format!("{folder}/library"), format!("{folder}/Cargo.lock")],
    )?;
    Ok(source)
}

/// In a table `package | version | source` the first version that is `version` with a suffix.
fn madison_version<'a>(table: &'a str, version: &str) -> Option<&'a str> {
    table
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|full| {
            full.strip_prefix(version)
                .is_some_and(|suffix| suffix.starts_with(['+', '-', '~']))
        })
}

/// Gives LLVM's tools the names that the boot loader's build looks for.
fn name_llvm_tools(tools: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let objcopy = tools.join("llvm-objcopy");
    if !objcopy.exists() {
        link_or_copy(&tools.join("rust-objcopy"), &objcopy)
            .context("the installed toolchain has no rust-objcopy")?;
    }
    // The `llvm-tools` crate finds the folder by this program and does not run it.
    let objdump = tools.join("llvm-objdump");
    if !objdump.exists() {
        fs::write(
            &objdump,
            "#!/bin/sh\necho 'llvm-objdump is not part of this toolchain' >&2\nexit 1\n",
        )?;
        fs::set_permissions(&objdump, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Compiles core, alloc and compiler_builtins for the bare-metal target into `toolchain`.
fn compile_core(toolchain: &Path, seed: &Path) -> anyhow::Result<()> {
    remove_tree(seed)?;
    fs::create_dir_all(seed.join("src"))?;
    fs::write(
        seed.join("Cargo.toml"),
        "[package]\nname = \"seed\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n",
    )?;
    fs::write(seed.join("src/lib.rs"), "#![no_std]\n")?;
    let unfinished = Toolchain {
        sysroot: toolchain.to_owned(),
        objcopy: PathBuf::new(),
    };
    output_of(
        unfinished
            .cargo()
            .current_dir(seed)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", seed.join("target"))
            // Cargo leaves the bitcode away that link-time optimization of the kernel needs.
            .env("RUSTFLAGS", "-Cembed-bitcode=yes")
            .args(["build", "--release", "--target", BARE_METAL])
            .arg("-Zbuild-std=core,alloc,compiler_builtins")
            .arg("-Zbuild-std-features=compiler-builtins-mem"),
    )?;
    let lib = toolchain.join("lib/rustlib").join(BARE_METAL).join("lib");
    fs::create_dir_all(&lib)?;
    for entry in fs::read_dir(seed.join("target").join(BARE_METAL).join("release/deps"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let wanted = ["libcore-", "liballoc-", "libcompiler_builtins-"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if wanted && name.ends_with(".rlib") {
            fs::copy(entry.path(), lib.join(name))?;
        }
    }
    remove_tree(seed)
}

/// Copies a folder as hard links, or as copies where it lies on another file system.
fn link_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            link_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, target)?;
        } else {
            link_or_copy(&entry.path(), &target)?;
        }
    }
    Ok(())
}

fn link_or_copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to)?;
    }
    Ok(())
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_version_matches() {
        let table = " rust-src | 1.95.01-1 | x\n rust-src | 1.95.0+dfsg1-1~bpo13+1 | x\n";
        assert_eq!(
            madison_version(table, "1.95.0"),
            Some("1.95.0+dfsg1-1~bpo13+1")
        );
        assert_eq!(madison_version(table, "1.96.0"), None);
    }

    #[test]
    fn a_plain_toolchain_is_not_complete() {
        assert!(Toolchain::complete(Path::new("/nonexistent")).is_none());
    }
}
