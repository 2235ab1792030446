//! Real systems to run as guests: what there is, and where its files come from.
//!
//! Purpose: `cargo xtask run` and `test` need real guest systems. The [`CATALOGUE`] says which
//! there are and how each is booted; their files come, in this order, from the
//! cache, from Debian's packages (downloaded and unpacked, never installed), or, for
//! the default Linux, from the workstation's own `/boot`.
//!
//! Invariant: a file appears in the cache only when it is whole.

pub mod boot_disk;
mod catalogue;
mod packages;
pub mod qemu_tests;
pub mod selftests;
mod vmlinux;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::apt::{Archive, MIRROR_VARIABLE, Suite, fetch};
use crate::progress::Step;

pub use catalogue::{CATALOGUE, Display, Guest, Keys, by_name, table};
pub use packages::File;

/// Ends the name of a file that is the ELF file inside the packed kernel of that name.
const ELF_SUFFIX: &str = ".elf";

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

/// A guest's file by its name, from the cache or fetched into it. With [`ELF_SUFFIX`] it is the ELF file
/// inside the kernel of that name.
///
/// # Errors
/// There is none of that name, or it is in no suite that this machine reaches; the error lists
/// what was tried.
pub fn file(cache: &Path, name: &str) -> Result<File> {
    let Some(kernel) = name.strip_suffix(ELF_SUFFIX) else {
        return packages::ensure(cache, name);
    };
    let packed = packages::ensure(cache, kernel)?;
    let path = packed.path.with_file_name("vmlinux");
    if !path.is_file() {
        let bytes = fs::read(&packed.path)
            .with_context(|| format!("cannot read {}", packed.path.display()))?;
        let elf = vmlinux::extract(&bytes)
            .with_context(|| format!("cannot unpack {}", packed.path.display()))?;
        write_whole(&path, &elf)?;
    }
    Ok(File { path, ..packed })
}

/// The Linux that `@linux` stands for: the newest of the catalogue's first, or, where
/// it cannot be fetched, the workstation's own kernel.
///
/// # Errors
/// Neither is to be had; the error says what to do.
pub fn default_linux(cache: &Path) -> Result<File> {
    let fetched = file(cache, CATALOGUE[0].name);
    let Err(error) = fetched else { return fetched };
    if let Some(path) = newest_kernel(Path::new("/boot")) {
        eprintln!("{error:#}; using {} instead", path.display());
        return Ok(File {
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
}
