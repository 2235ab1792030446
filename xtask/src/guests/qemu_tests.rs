//! QEMU's own test kernels: its system tests for x86-64, and those of its multiboot loader.
//!
//! They are compiled from the source of Debian's package with the workstation's C compiler, as
//! their Makefiles do it. What they print goes to the debug port; they end by the exit port or by power-off.
//! A test that needs 32-bit libraries of the compiler is left out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    apt::{Archive, Suite, fetch_source},
    exit::{Code, Stop},
    paths,
    process::{find_program, output_of},
    progress::Step,
};

/// With which a configuration's name of one begins, after the `@`.
pub const PREFIX: &str = "qemu-test-";

/// Where the source is, best first: newer ones have more tests.
const SUITES: [Suite; 2] = [
    Suite {
        archive: Archive::Main,
        name: "bookworm-backports",
    },
    Suite {
        archive: Archive::Main,
        name: "bookworm",
    },
];

/// What is needed of the source.
const SOURCES: [&str; 5] = [
    "*/tests/tcg/minilib/*",
    "*/tests/tcg/multiarch/system/*.c",
    "*/tests/tcg/x86_64/system/*",
    "*/tests/multiboot/aout_kludge.S",
    "*/tests/multiboot/link.ld",
];

/// The ways in which a multiboot header tells where its kernel is to be loaded.
const LOAD_ADDRESSES: std::ops::RangeInclusive<u32> = 1..=9;

/// The folder of the compiled tests, from the cache or made there.
///
/// # Errors
/// The source cannot be fetched, or there is no C compiler.
pub fn ensure(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join("guests/qemu-tests");
    let _lock = paths::lock("qemu-tests")?;
    if !folder.is_dir() {
        let part = folder.with_extension("part");
        for old in [&part, &source_in(&part)] {
            if old.exists() {
                fs::remove_dir_all(old)?;
            }
        }
        compile(cache, &part)?;
        fs::rename(&part, &folder)?;
    }
    Ok(folder)
}

/// One test by its name, which begins with [`PREFIX`].
///
/// # Errors
/// As [`ensure`], or there is none of that name.
pub fn program(cache: &Path, name: &str) -> Result<PathBuf> {
    let path = ensure(cache)?.join(name.trim_start_matches(PREFIX));
    ensure!(path.is_file(), "QEMU's source has no test {name}");
    Ok(path)
}

/// The tests in a folder, by name.
///
/// # Errors
/// It cannot be read.
pub fn all(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut tests = entries.collect::<Result<Vec<_>>>()?;
    tests.sort();
    Ok(tests)
}

/// Where the source of tests in this folder lies while they are compiled.
fn source_in(folder: &Path) -> PathBuf {
    folder.with_extension("source")
}

/// Fetches the source and compiles the tests into a folder.
fn compile(cache: &Path, folder: &Path) -> Result<()> {
    let Some(compiler) = find_program("gcc") else {
        return Err(Stop::with(
            Code::MissingProgram,
            "QEMU's tests need a C compiler; install it with: sudo apt-get install gcc libc6-dev",
        ));
    };
    let step = Step::start("Fetching and compiling QEMU's own tests (40 MB)");
    let source = source_in(folder);
    let package = fetch_source(cache, &SUITES, "qemu").context("cannot fetch QEMU's source")?;
    package.unpack(&source, &SOURCES)?;
    fs::create_dir_all(folder)?;
    let folder = fs::canonicalize(folder)?;
    let gcc = |within: &str, arguments: &[&str], output: &str| {
        step.detail(output);
        let mut command = Command::new(&compiler);
        command
            .current_dir(source.join("tests").join(within))
            .args(["-nostdlib", "-static", "-fno-pie", "-no-pie", "-w"])
            .args(["-Wa,--noexecstack", "-Wl,--build-id=none", "-o"])
            .arg(folder.join(output))
            .args(arguments);
        output_of(&mut command).with_context(|| format!("QEMU's test {output}"))
    };
    let system = source.join("tests/tcg/multiarch/system");
    for test in all(&system)? {
        let name = test.file_stem().unwrap_or_default().to_string_lossy();
        let main = format!("multiarch/system/{name}.c");
        gcc(
            "tcg",
            &[
                "-m64",
                "-O0",
                "-fno-stack-protector",
                "-DCHECK_UNALIGNED=1",
                "-isystem",
                "minilib",
                "-Wl,-Tx86_64/system/kernel.ld",
                &main,
                "minilib/printf.c",
                "x86_64/system/boot.S",
            ],
            &name,
        )?;
    }
    for number in LOAD_ADDRESSES {
        gcc(
            "multiboot",
            &[
                "-m32",
                "-Wl,-T,link.ld",
                "-Wl,--oformat=binary",
                &format!("-DSCENARIO={number}"),
                "aout_kludge.S",
            ],
            &format!("aout-kludge-{number}"),
        )?;
    }
    fs::remove_dir_all(&source)?;
    step.done();
    Ok(())
}
