//! Linux' own x86 self-tests, compiled and put beside the small system around busybox.
//!
//! They try what a kernel does with the processor's odd corners: segments, single steps, system
//! calls by every instruction, vsyscalls, signals. Some fail on emulated processors without
//! Plinth, too: the same programs on the bare emulator are the measure, not the number.
//!
//! The sources are those of Debian 12's kernel (`tools/testing/selftests/x86`); the 64-bit tests are
//! compiled with the workstation's C compiler, static, as their Makefile does it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{packages, write_whole};
use crate::{
    exit::{Code, Stop},
    initramfs, paths,
    process::{find_program, output_of},
    progress::Step,
};

/// Where they are in the guest.
const FOLDER: &str = "x86";

/// Where they are in the kernel's source.
const SOURCES: &str = "tools/testing/selftests/x86";

/// The tests for 64 bits, and what the compiler is told beside.
///
/// `sysret_ss_attrs` is not among them: on QEMU 7.2 it makes the guest's kernel fail, without Plinth as well.
pub const TESTS: [(&str, &[&str]); 20] = [
    ("amx", &[]),
    ("check_initial_reg_state", &["-Wl,-ereal_start"]),
    ("corrupt_xstate_header", &[]),
    ("fsgsbase", &[]),
    ("fsgsbase_restore", &[]),
    ("ioperm", &[]),
    ("iopl", &[]),
    ("ldt_gdt", &[]),
    ("mov_ss_trap", &[]),
    ("ptrace_syscall", &[]),
    ("sigaltstack", &[]),
    ("sigreturn", &[]),
    ("sigtrap_loop", &[]),
    ("single_step_syscall", &[]),
    ("syscall_arg_fault", &[]),
    ("syscall_nt", &[]),
    ("syscall_numbering", &[]),
    ("sysret_rip", &[]),
    ("test_mremap_vdso", &[]),
    ("test_vsyscall", &[]),
];

/// Runs each, says how it ended, and then the sum.
const RUN: &str = "#!/bin/busybox sh
cd /x86
passed=0
count=0
for test in *; do
    [ $test = run ] && continue
    count=$((count + 1))
    ./$test >/tmp/output 2>&1 </dev/null
    status=$?
    if [ $status = 0 ]; then
        passed=$((passed + 1))
        echo \"selftest $test: ok\"
    else
        echo \"selftest $test: status $status\"
        grep FAIL /tmp/output
    fi
done
echo \"selftests: $passed of $count ok\"
";

/// The small system with the tests, from the cache or made there.
///
/// # Errors
/// The source cannot be fetched, or there is no C compiler.
pub fn ensure(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join("guests/linux-selftests");
    let tests = folder.join("tests.cpio");
    let _lock = paths::lock("linux-selftests")?;
    if !tests.is_file() {
        let source = packages::ensure(cache, "linux-source-6.1")?;
        write_whole(&tests, &compile(&source.path, &folder)?)?;
    }
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    let mut bytes = read(&initramfs::ensure(cache)?)?;
    bytes.extend(read(&tests)?);
    let path = folder.join("initramfs.cpio");
    if !fs::read(&path).is_ok_and(|old| old == bytes) {
        write_whole(&path, &bytes)?;
    }
    Ok(path)
}

/// Unpacks what is needed of the source into a folder and compiles it; gives the archive of the tests.
fn compile(source: &Path, folder: &Path) -> Result<Vec<u8>> {
    let Some(compiler) = find_program("gcc") else {
        return Err(Stop::with(
            Code::MissingProgram,
            "the self-tests need a C compiler; install it with: sudo apt-get install gcc libc6-dev",
        ));
    };
    let step = Step::start("Compiling Linux' self-tests");
    let work = folder.join("source");
    fs::create_dir_all(&work)?;
    step.detail("unpacking the kernel's source");
    let wanted = [
        SOURCES,
        "tools/testing/selftests/kselftest.h",
        "arch/x86/include/asm",
    ];
    output_of(
        Command::new("tar")
            .args(["--extract", "--strip-components=1", "--file"])
            .arg(source)
            .arg("--directory")
            .arg(&work)
            .args(wanted.map(|path| format!("linux-source-6.1/{path}"))),
    )?;
    let mut programs = vec![("run".to_owned(), RUN.as_bytes().to_vec())];
    for (name, more) in TESTS {
        step.detail(name);
        let program = work.join(name);
        output_of(
            Command::new(&compiler)
                .current_dir(work.join(SOURCES))
                .args([
                    "-O2",
                    "-s",
                    "-std=gnu99",
                    "-pthread",
                    "-w",
                    "-no-pie",
                    "-static",
                ])
                .args(["-DCAN_BUILD_64", "-o"])
                .arg(&program)
                .arg(format!("{name}.c"))
                .args(more),
        )
        .with_context(|| format!("the self-test {name} does not compile"))?;
        let bytes = fs::read(&program).with_context(|| program.display().to_string())?;
        programs.push((name.to_owned(), bytes));
    }
    fs::remove_dir_all(&work)?;
    step.done();
    initramfs::programs(FOLDER, &programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_is_where_the_catalogue_types_it_and_prints_what_it_waits_for() {
        assert!(RUN.contains(&format!("cd /{FOLDER}\n")));
        let guest = super::super::by_name("linux-selftests").unwrap();
        assert_eq!(guest.keys[0].text, format!("/{FOLDER}/run\r"));
        let proof = regex::Regex::new(guest.proof).unwrap();
        assert!(proof.is_match("selftests: 18 of 20 ok"));
        // Not by the script's text, should it be shown.
        assert!(!proof.is_match(RUN));
    }
}
