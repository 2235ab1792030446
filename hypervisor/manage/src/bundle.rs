//! What travels with the hypervisor: configuration, symbols, kernels and initrds in one archive.
//!
//! The archive is an ustar file (POSIX.1-2017, pax: "ustar Interchange Format"), handed to the kernel as
//! the boot loader's RAM disk. xtask writes it with [`Writer`], the kernel reads it with [`Bundle`];
//! any `tar` lists it. Its entries:
//!
//! | name | what |
//! | --- | --- |
//! | `plinth.toml` | the configuration |
//! | `symbols.txt` | the kernel's symbols, for fault reports |
//! | `files/..` | the files that the configuration names, by [`entry_name`] |
//!
//! Invariants: every slice handed out lies within the archive; a damaged archive is refused as
//! a whole, with what and where. Only plain files are read; directories are skipped.

use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::config::{Environment, FileFacts, FileKind, Pools};

/// Entry name of the configuration.
pub const CONFIG: &str = "plinth.toml";
/// Entry name of the kernel's symbols.
pub const SYMBOLS: &str = "symbols.txt";

/// Bytes in a record: headers and data come in multiples of this.
const BLOCK: usize = 512;

/// Header of an entry. Numbers are octal digits, ended by a space or a zero.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct Header {
    name: [u8; 100],
    mode: [u8; 8],
    uid: [u8; 8],
    gid: [u8; 8],
    size: [u8; 12],
    mtime: [u8; 12],
    checksum: [u8; 8],
    kind: u8,
    link: [u8; 100],
    magic: [u8; 6],
    version: [u8; 2],
    user: [u8; 32],
    group: [u8; 32],
    device_major: [u8; 8],
    device_minor: [u8; 8],
    prefix: [u8; 155],
    padding: [u8; 12],
}

const _: () = assert!(size_of::<Header>() == BLOCK);
const _: () = assert!(core::mem::offset_of!(Header, checksum) == 148);
const _: () = assert!(core::mem::offset_of!(Header, prefix) == 345);

/// A plain file, as POSIX has it and as old archives have it.
const FILE: [u8; 2] = *b"0\0";
/// A directory.
const DIRECTORY: u8 = b'5';

impl Header {
    /// Sum of the header's bytes, with spaces in place of the sum itself.
    fn sum(&self) -> u64 {
        let mut blank = self.clone();
        blank.checksum = [b' '; 8];
        blank.as_bytes().iter().map(|b| u64::from(*b)).sum()
    }
}

/// Why an archive can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// It ends before its end marker, or in the middle of an entry's data.
    Truncated {
        /// Bytes that should be there at least.
        needs: u64,
        /// Bytes that are there.
        has: u64,
    },
    /// The bytes at this offset are no ustar header, or one with a wrong checksum.
    NotAHeader {
        /// Byte offset.
        offset: usize,
    },
    /// The entry at this offset is no plain file.
    NotAFile {
        /// Byte offset.
        offset: usize,
        /// The type letter.
        kind: u8,
    },
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BundleError::Truncated { needs, has } => write!(
                f,
                "the archive is cut short: it has {has} bytes and needs at least {needs}"
            ),
            BundleError::NotAHeader { offset } => {
                write!(
                    f,
                    "the archive is damaged: no ustar header at byte {offset}"
                )
            }
            BundleError::NotAFile { offset, kind } => write!(
                f,
                "the archive's entry at byte {offset} is no plain file (type '{}')",
                kind.escape_ascii()
            ),
        }
    }
}

/// An archive, read.
#[derive(Clone, Debug, Default)]
pub struct Bundle<'a> {
    files: Vec<(String, &'a [u8])>,
}

impl<'a> Bundle<'a> {
    /// Reads the directory of an archive. What follows the end marker is ignored.
    ///
    /// # Errors
    /// The archive is cut short, damaged, or has an entry that is no file.
    pub fn parse(archive: &'a [u8]) -> Result<Self, BundleError> {
        let mut bundle = Bundle::default();
        let mut offset = 0;
        loop {
            let truncated = |needs: u64| BundleError::Truncated {
                needs,
                has: archive.len() as u64,
            };
            let rest = archive.get(offset..).unwrap_or_default();
            let (header, data) =
                Header::ref_from_prefix(rest).map_err(|_| truncated((offset + BLOCK) as u64))?;
            if header.as_bytes().iter().all(|b| *b == 0) {
                return Ok(bundle);
            }
            let bad = BundleError::NotAHeader { offset };
            if !header.magic.starts_with(b"ustar") || octal(&header.checksum) != Some(header.sum())
            {
                return Err(bad);
            }
            let size = octal(&header.size).ok_or(bad)?;
            let name = match (text(&header.prefix), text(&header.name)) {
                (Some(""), Some(name)) => name.to_string(),
                (Some(prefix), Some(name)) => format!("{prefix}/{name}"),
                _ => return Err(bad),
            };
            let end = (offset + BLOCK) as u64 + size;
            // Octal digits hold at most 2^36, so neither the sum nor the rounding overflows.
            let content = usize::try_from(size)
                .ok()
                .and_then(|size| data.get(..size))
                .ok_or(truncated(end))?;
            match header.kind {
                kind if FILE.contains(&kind) => bundle.files.push((name, content)),
                DIRECTORY => {}
                kind => return Err(BundleError::NotAFile { offset, kind }),
            }
            offset += BLOCK + content.len().next_multiple_of(BLOCK);
        }
    }

    /// Content of the entry with this name; of the last one, if there are several.
    pub fn file(&self, name: &str) -> Option<&'a [u8]> {
        let mut files = self.files.iter().rev();
        files.find(|(n, _)| n == name).map(|(_, data)| *data)
    }

    /// Content of the file that the configuration calls `path`.
    pub fn guest_file(&self, path: &str) -> Option<&'a [u8]> {
        self.file(&entry_name(path))
    }

    /// Names and contents of all entries.
    pub fn files(&self) -> impl Iterator<Item = (&str, &'a [u8])> {
        self.files.iter().map(|(name, data)| (name.as_str(), *data))
    }
}

/// The kernel's view of a configuration's surroundings, for `config::check`.
pub struct BundleEnvironment<'b, 'a> {
    /// The archive with the files.
    pub bundle: &'b Bundle<'a>,
    /// Bytes of host memory that VMs can have.
    pub memory_bytes: u64,
    /// Host processors that run VMs.
    pub processors: usize,
    /// The CPU pools of the host that runs; `None`: those of the configuration.
    pub pools: Option<&'b Pools>,
}

impl Environment for BundleEnvironment<'_, '_> {
    fn memory_bytes(&self) -> Option<u64> {
        Some(self.memory_bytes)
    }

    fn processors(&self) -> Option<usize> {
        Some(self.processors)
    }

    fn pools(&self) -> Option<&Pools> {
        self.pools
    }

    fn file(&self, path: &str) -> Result<FileFacts, String> {
        match self.bundle.guest_file(path) {
            Some(data) => Ok(FileFacts {
                bytes: data.len() as u64,
                kind: FileKind::sniff(data),
            }),
            None => Err("is not in the image; name it under [host] files in plinth.toml, and make the image again".to_string()),
        }
    }
}

/// Entry name of the file that the configuration calls `path`: "files/" and the path, in which
/// components that archive programs refuse (empty ones, "." and "..") are spelled with percent signs.
pub fn entry_name(path: &str) -> String {
    let mut name = String::from("files");
    for component in path.split('/') {
        name.push('/');
        match component {
            "" => name += "%",
            "." => name += "%2E",
            ".." => name += "%2E%2E",
            other => name += &other.replace('%', "%25"),
        }
    }
    name
}

/// An entry's name is too long for the format: 100 bytes, or up to 255 if it can be cut at a slash into at
/// most 155 and 100.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameTooLong(pub String);

impl fmt::Display for NameTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: the name is too long for the archive", self.0)
    }
}

impl core::error::Error for NameTooLong {}

/// Writes an archive. The same entries give the same bytes: times and owners are zero.
#[derive(Debug, Default)]
pub struct Writer {
    archive: Vec<u8>,
}

impl Writer {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The name is too long or empty, or the file has 8 GiB or more; nothing is added.
    pub fn add(&mut self, name: &str, content: &[u8]) -> Result<(), NameTooLong> {
        let refused = || NameTooLong(name.to_string());
        let (prefix, rest) = split(name).ok_or_else(refused)?;
        let size = format!("{:011o}", content.len());
        if size.len() > 11 {
            return Err(refused());
        }
        let mut header = Header {
            name: field(rest),
            mode: field("0000644"),
            uid: field("0000000"),
            gid: field("0000000"),
            size: field(&size),
            mtime: field("00000000000"),
            checksum: [b' '; 8],
            kind: FILE[0],
            link: [0; 100],
            magic: *b"ustar\0",
            version: *b"00",
            user: [0; 32],
            group: [0; 32],
            device_major: field("0000000"),
            device_minor: field("0000000"),
            prefix: field(prefix),
            padding: [0; 12],
        };
        header.checksum = field(&format!("{:06o}\0 ", header.sum()));
        self.archive.extend_from_slice(header.as_bytes());
        self.archive.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// The archive with its end marker.
    pub fn finish(mut self) -> Vec<u8> {
        self.archive.extend_from_slice(&[0; 2 * BLOCK]);
        self.archive
    }

    fn pad(&mut self) {
        let padded = self.archive.len().next_multiple_of(BLOCK);
        self.archive.resize(padded, 0);
    }
}

/// Cuts a name into prefix and name field.
fn split(name: &str) -> Option<(&str, &str)> {
    if (1..=100).contains(&name.len()) {
        return Some(("", name));
    }
    name.match_indices('/')
        .map(|(at, _)| (&name[..at], &name[at + 1..]))
        .find(|(prefix, rest)| prefix.len() <= 155 && (1..=100).contains(&rest.len()))
}

/// A text that fits, padded with zeroes.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}

/// The text in a field, up to its first zero.
fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    core::str::from_utf8(&field[..end]).ok()
}

/// The number in a field: octal digits, with spaces before and spaces or zeroes after.
fn octal(field: &[u8]) -> Option<u64> {
    let digits = text(field)?.trim_matches(' ');
    if digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn archive() -> Vec<u8> {
        let mut writer = Writer::new();
        writer.add(CONFIG, b"# nothing\n").unwrap();
        writer.add(SYMBOLS, b"").unwrap();
        let kernel = vec![7; 1000];
        writer.add(&entry_name("vmlinuz"), &kernel).unwrap();
        writer.finish()
    }

    #[test]
    fn what_is_written_is_read() {
        let archive = archive();
        assert_eq!(archive.len(), 512 * (2 + 1 + 3 + 2));
        let bundle = Bundle::parse(&archive).unwrap();
        assert_eq!(bundle.file(CONFIG), Some(&b"# nothing\n"[..]));
        assert_eq!(bundle.file(SYMBOLS), Some(&b""[..]));
        assert_eq!(bundle.guest_file("vmlinuz"), Some(&[7; 1000][..]));
        assert_eq!(bundle.guest_file("initrd"), None);
        let names: Vec<_> = bundle.files().map(|(name, _)| name).collect();
        assert_eq!(names, [CONFIG, SYMBOLS, "files/vmlinuz"]);
    }

    #[test]
    fn paths_map_to_distinct_names() {
        let cases = [
            ("vmlinuz", "files/vmlinuz"),
            ("/boot/vmlinuz", "files/%/boot/vmlinuz"),
            ("../a", "files/%2E%2E/a"),
            ("./a", "files/%2E/a"),
            ("%2E/a", "files/%252E/a"),
            ("a//b", "files/a/%/b"),
        ];
        for (path, name) in cases {
            assert_eq!(entry_name(path), name);
        }
    }

    #[test]
    fn long_names_use_the_prefix() {
        let mut writer = Writer::new();
        let long = format!("{}/{}", "d".repeat(155), "f".repeat(100));
        writer.add(&long, b"x").unwrap();
        let flat = "f".repeat(101);
        assert_eq!(writer.add(&flat, b"x"), Err(NameTooLong(flat)));
        assert!(writer.add("", b"x").is_err());
        let archive = writer.finish();
        assert_eq!(
            Bundle::parse(&archive).unwrap().file(&long),
            Some(&b"x"[..])
        );
    }

    /// Cutting inside the headers or the data is noticed at every length.
    #[test]
    fn truncated_archives_are_refused() {
        let archive = archive();
        let end_of_files = archive.len() - 1024;
        for length in 0..end_of_files + 512 {
            assert!(
                matches!(
                    Bundle::parse(&archive[..length]),
                    Err(BundleError::Truncated { needs, has }) if has == length as u64 && needs > has
                ),
                "{length}"
            );
        }
        assert!(Bundle::parse(&archive[..end_of_files + 512]).is_ok());
    }

    #[test]
    fn damage_is_named() {
        let mut archive = archive();
        archive[1] ^= 1;
        let error = Bundle::parse(&archive).unwrap_err();
        assert_eq!(error, BundleError::NotAHeader { offset: 0 });
        assert_eq!(
            error.to_string(),
            "the archive is damaged: no ustar header at byte 0"
        );
        assert_eq!(
            Bundle::parse(&[b'x'; 600]).unwrap_err(),
            BundleError::NotAHeader { offset: 0 }
        );
    }

    #[test]
    fn links_are_refused_and_directories_skipped() {
        let with_kind = |kind: u8| {
            let mut archive = archive();
            let mut header = Header::read_from_bytes(&archive[1024..1536]).unwrap();
            header.kind = kind;
            header.checksum = field(&format!("{:06o}\0 ", header.sum()));
            archive[1024..1536].copy_from_slice(header.as_bytes());
            archive
        };
        assert_eq!(
            Bundle::parse(&with_kind(b'2')).unwrap_err(),
            BundleError::NotAFile {
                offset: 1024,
                kind: b'2'
            }
        );
        let archive = with_kind(DIRECTORY);
        let bundle = Bundle::parse(&archive).unwrap();
        assert_eq!((bundle.file(SYMBOLS), bundle.files.len()), (None, 2));
    }

    #[test]
    fn the_kernel_checks_a_configuration_against_the_bundle() {
        let archive = archive();
        let bundle = Bundle::parse(&archive).unwrap();
        let environment = BundleEnvironment {
            bundle: &bundle,
            memory_bytes: 1 << 30,
            processors: 1,
            pools: None,
        };
        assert_eq!(
            environment.file("vmlinuz"),
            Ok(FileFacts {
                bytes: 1000,
                kind: FileKind::Other
            })
        );
        assert!(environment.file("missing").is_err());
    }

    proptest! {
        #[test]
        fn damaged_archives_never_panic(
            edits in prop::collection::vec((0..4096usize, any::<u8>()), 1..8),
            fix_sums: bool,
            length in 0..4097usize,
        ) {
            let mut archive = archive();
            for (at, byte) in edits {
                archive[at] = byte;
            }
            if fix_sums {
                for at in [0, 1024, 1536] {
                    let mut header = Header::read_from_bytes(&archive[at..at + 512]).unwrap();
                    header.checksum = field(&format!("{:06o}\0 ", header.sum()));
                    archive[at..at + 512].copy_from_slice(header.as_bytes());
                }
            }
            if let Ok(bundle) = Bundle::parse(&archive[..length]) {
                let total: usize = bundle.files().map(|(_, data)| data.len()).sum();
                prop_assert!(total <= length);
            }
        }

        #[test]
        fn any_files_come_back(
            files in prop::collection::btree_map("[a-z]{1,20}(/[a-z]{1,20}){0,8}",
                prop::collection::vec(any::<u8>(), 0..1500), 0..6),
        ) {
            let mut writer = Writer::new();
            for (path, content) in &files {
                writer.add(&entry_name(path), content).unwrap();
            }
            let archive = writer.finish();
            let bundle = Bundle::parse(&archive).unwrap();
            for (path, content) in &files {
                prop_assert_eq!(bundle.guest_file(path), Some(&content[..]));
            }
            prop_assert_eq!(bundle.files().count(), files.len());
        }
    }
}
