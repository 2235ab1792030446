//! A small initial RAM file system for Linux guests, made from one static busybox.
//!
//! Purpose: give any Linux kernel a user space with a shell on its console, without a
//! distribution. The archive is the "newc" cpio format that the kernel unpacks itself
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Invariants: the bytes depend on nothing but the busybox binary and this file (fixed
//! times, owners and inode numbers), so images made from it repeat to the byte.
//!
//! It does not load modules and mounts no disk: what a guest's kernel has built in is
//! what the shell sees.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::guests;

/// What [`build`] names the line that tells a program (or a person) that the guest is up.
///
/// The kernel release follows it, and then ` ready`.
pub const BANNER: &str = "plinth guest: linux ";

/// First process' table: busybox `init` reads it.
///
/// `cttyhack` finds the terminal behind `/dev/console`, so that the shell has job control
/// and Ctrl-C on whichever console the kernel's command line names.
const INITTAB: &str = "\
::sysinit:/etc/init.d/rcS
::respawn:/bin/cttyhack /bin/sh -l
::ctrlaltdel:/bin/reboot
";

/// Runs once, before the shell.
///
/// From the moment the shell owns the terminal only kernel errors may interrupt it
/// (`dmesg -n 4`); everything stays in the kernel's log.
const RC: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
hostname plinth-guest
dmesg -n 4
echo
echo "plinth guest: linux $(uname -r) ready"
"#;

/// The login shell's settings; the prompt is `~ # ` in the home directory.
const PROFILE: &str = "\
export HOME=/root PATH=/bin PS1='\\w # '
cd
";

/// What one archive member is.
enum Node<'a> {
    Directory,
    Program(&'a [u8]),
    File(&'a [u8]),
    Symlink(&'a str),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
}

impl Node<'_> {
    /// The `st_mode` of the member: file type and permissions, octal as in stat(2).
    fn mode(&self) -> u32 {
        match self {
            Self::Directory => 0o040_755,
            Self::Program(_) => 0o100_755,
            Self::File(_) => 0o100_644,
            Self::Symlink(_) => 0o120_777,
            Self::CharDevice(..) => 0o020_600,
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            Self::Program(bytes) | Self::File(bytes) => bytes,
            Self::Symlink(target) => target.as_bytes(),
            Self::Directory | Self::CharDevice(..) => &[],
        }
    }
}

/// A cpio archive being written, "newc" format without checksums.
struct Archive {
    bytes: Vec<u8>,
    /// Inode numbers only have to differ from each other.
    next_inode: u32,
}

impl Archive {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            next_inode: 1,
        }
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Appends one member; `path` has no leading slash.
    ///
    /// # Errors
    /// A member of 4 GiB or more has no place in this format.
    fn add(&mut self, path: &str, node: &Node) -> Result<()> {
        let inode = self.next_inode;
        self.next_inode += 1;
        let links = if matches!(node, Node::Directory) {
            2
        } else {
            1
        };
        self.member(path, inode, node.mode(), links, node)
    }

    fn member(&mut self, path: &str, inode: u32, mode: u32, links: u32, node: &Node) -> Result<()> {
        let data = node.data();
        let size = u32::try_from(data.len()).context("a member of an initramfs is under 4 GiB")?;
        let name_size = u32::try_from(path.len() + 1).context("a path is short")?;
        let (major, minor) = match node {
            Node::CharDevice(major, minor) => (*major, *minor),
            _ => (0, 0),
        };
        // c_ino c_mode c_uid c_gid c_nlink c_mtime c_filesize c_devmajor c_devminor
        // c_rdevmajor c_rdevminor c_namesize c_chksum, eight hexadecimal digits each.
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Ends the archive and gives its bytes, whole 512-byte blocks.
    fn finish(mut self) -> Result<Vec<u8>> {
        self.member("TRAILER!!!", 0, 0, 1, &Node::File(&[]))?;
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }
}

/// Makes the archive around `busybox`, the bytes of a static x86-64 busybox.
///
/// # Errors
/// `busybox` needs a dynamic loader, or is no x86-64 ELF file.
pub fn build(busybox: &[u8]) -> Result<Vec<u8>> {
    if !guests::is_static_x86_64_elf(busybox) {
        bail!("busybox for the initramfs must be a static x86-64 program");
    }
    around(busybox)
}

/// Makes the archive around a busybox that the guest's kernel can run.
fn around(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in [
        "bin",
        "dev",
        "etc",
        "etc/init.d",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
    ] {
        archive.add(directory, &Node::Directory)?;
    }
    let members = [
        // The kernel opens /dev/console for the first process before anything is mounted.
        ("dev/console", Node::CharDevice(5, 1)),
        ("dev/null", Node::CharDevice(1, 3)),
        ("bin/busybox", Node::Program(busybox)),
        ("bin/sh", Node::Symlink("busybox")),
        ("init", Node::Symlink("bin/busybox")),
        ("etc/inittab", Node::File(INITTAB.as_bytes())),
        ("etc/init.d/rcS", Node::Program(RC.as_bytes())),
        ("etc/profile", Node::File(PROFILE.as_bytes())),
        ("etc/passwd", Node::File(b"root:x:0:0:root:/root:/bin/sh\n")),
        ("etc/group", Node::File(b"root:x:0:\n")),
    ];
    for (path, node) in &members {
        archive.add(path, node)?;
    }
    archive.finish()
}

/// The guests' initramfs, made when it is missing or when its making has changed.
///
/// `cache` is the tools' cache directory. Returns the archive's path.
///
/// # Errors
/// No static busybox is installed and none can be fetched; the cache cannot be written.
pub fn ensure(cache: &Path) -> Result<PathBuf> {
    let busybox = guests::busybox(cache)?;
    kept(cache.join("guests/initramfs.cpio"), &busybox, build)
}

/// The same for 32-bit guests.
///
/// # Errors
/// Its busybox cannot be fetched; the cache cannot be written.
pub fn ensure_32(cache: &Path) -> Result<PathBuf> {
    let busybox = guests::file(cache, "busybox-32")?.path;
    kept(cache.join("guests/initramfs-32.cpio"), &busybox, around)
}

/// Makes the archive of this busybox, if it is not what lies at `path`.
fn kept(path: PathBuf, busybox: &Path, make: impl Fn(&[u8]) -> Result<Vec<u8>>) -> Result<PathBuf> {
    let binary =
        std::fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let bytes = make(&binary)?;
    if !std::fs::read(&path).is_ok_and(|old| old == bytes) {
        guests::write_whole(&path, &bytes)?;
    }
    Ok(path)
}

/// An archive of one program, to be appended to another archive (the kernel unpacks both).
///
/// # Errors
/// The program is 4 GiB or larger.
pub fn program(path: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.add(path, &Node::Program(bytes))?;
    archive.finish()
}

/// Modules of `linux-6.1-cloud` with which it finds a virtio disk, in the order in which they are to be loaded.
pub const DISK_MODULES: [&str; 6] = [
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
];

/// Modules of `linux-6.1-cloud` with which it tells programs of its power button.
pub const BUTTON_MODULES: [&str; 2] = ["button.ko", "evdev.ko"];

/// Modules of `linux-6.1` with which it has a watchdog, in the order in which they are to be loaded.
pub const WATCHDOG_MODULES: [&str; 2] = ["watchdog.ko", "i6300esb.ko"];

/// The guests' initramfs with files added in `/lib`: the kernel unpacks one archive after the other.
///
/// # Errors
/// As [`ensure`], or a file is 4 GiB or larger.
pub fn with_files(cache: &Path, files: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    let base = ensure(cache)?;
    let mut bytes =
        std::fs::read(&base).with_context(|| format!("cannot read {}", base.display()))?;
    let mut archive = Archive::new();
    archive.add("lib", &Node::Directory)?;
    for (name, content) in files {
        archive.add(&format!("lib/{name}"), &Node::File(content))?;
    }
    bytes.extend(archive.finish()?);
    Ok(bytes)
}

/// An archive of programs in a new top folder, to be appended to another archive.
///
/// # Errors
/// A program is 4 GiB or larger.
pub fn programs(folder: &str, programs: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.add(folder, &Node::Directory)?;
    for (name, bytes) in programs {
        archive.add(&format!("{folder}/{name}"), &Node::Program(bytes))?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: (path, mode, data) of each member before the trailer.
    fn list(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut members = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let data_at = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert!(bytes[data_at..].iter().all(|byte| *byte == 0));
                return members;
            }
            members.push((name, mode, bytes[data_at..data_at + size].to_vec()));
            bytes = &bytes[(data_at + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn an_archive_reads_back_as_written() {
        let mut archive = Archive::new();
        archive.add("bin", &Node::Directory).unwrap();
        archive.add("bin/tool", &Node::Program(b"12345")).unwrap();
        archive.add("init", &Node::Symlink("bin/tool")).unwrap();
        archive.add("dev-console", &Node::CharDevice(5, 1)).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let members = list(&bytes);
        let expected = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/tool", 0o100_755, b"12345"),
            ("init", 0o120_777, b"bin/tool"),
            ("dev-console", 0o020_600, b""),
        ];
        assert_eq!(members.len(), expected.len());
        for (member, (path, mode, data)) in members.iter().zip(expected) {
            assert_eq!(
                (member.0.as_str(), member.1, member.2.as_slice()),
                (path, mode, data)
            );
        }
    }

    #[test]
    fn the_initramfs_has_what_the_kernel_starts_and_repeats_to_the_byte() {
        let busybox = guests::tests::static_elf();
        let bytes = build(&busybox).unwrap();
        assert_eq!(bytes, build(&busybox).unwrap());
        let members = list(&bytes);
        for path in [
            "init",
            "bin/sh",
            "dev/console",
            "etc/inittab",
            "etc/init.d/rcS",
        ] {
            assert!(
                members.iter().any(|member| member.0 == path),
                "{path} is missing"
            );
        }
        // Every member's directory comes before it: the kernel makes no parents.
        for (index, member) in members.iter().enumerate() {
            if let Some((parent, _)) = member.0.rsplit_once('/') {
                assert!(
                    members[..index].iter().any(|earlier| earlier.0 == parent),
                    "{parent}"
                );
            }
        }
    }

    #[test]
    fn the_start_script_prints_the_banner_that_tests_wait_for() {
        assert!(RC.contains(&format!("echo \"{BANNER}$(uname -r) ready\"")));
    }

    #[test]
    fn a_dynamic_busybox_is_refused() {
        assert!(build(b"#!/bin/sh\n").is_err());
    }
}
