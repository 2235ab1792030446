//! The Debian packages that guests are made of, and the files taken from them.
//!
//! A package is downloaded once, with apt's own checks, and its files are kept in the
//! cache under `guests/PACKAGE/`. Each file has a name of its own, by which a configuration
//! names it after an `@`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use super::{is_bzimage, write_whole};
use crate::{
    apt::{Apt, Architecture, Archive, Suite, fetch_for},
    paths,
    progress::Step,
};

/// Which package of a suite to take.
#[derive(Clone, Copy, Debug)]
enum Choice {
    /// The one of this name.
    Named(&'static str),
    /// The one of this name for 32-bit processors.
    Named32(&'static str),
    /// The kernel that this package depends on: always the suite's newest.
    Kernel(&'static str),
    /// The same for 32-bit processors.
    Kernel32(&'static str),
}

/// What a file has to begin like, so that a package that was rearranged is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looks {
    /// A Linux boot image.
    BzImage,
    /// gzip (RFC 1952).
    Gzip,
    /// XZ.
    Xz,
    /// Firmware: at its end, where a processor starts, is code that jumps away.
    Firmware,
    /// A ROM for firmware to run, such as that of a video adapter.
    OptionRom,
    /// The variable store of UEFI firmware.
    Variables,
    /// An EFI program.
    Efi,
    /// A disk's image with a boot sector.
    Disk,
    /// An ELF file: a kernel's module.
    Elf,
}

impl Looks {
    fn fit(self, bytes: &[u8]) -> bool {
        match self {
            Self::BzImage => is_bzimage(bytes),
            Self::Gzip => bytes.starts_with(&[0x1f, 0x8b]),
            Self::Xz => bytes.starts_with(b"\xfd7zXZ\0"),
            Self::Firmware => {
                // The reset vector: a jump, or what some firmware does before it (NOP, WBINVD,
                // CLI, CLD).
                let start = bytes.len().checked_sub(16).and_then(|at| bytes.get(at..));
                let is_code = |code: &[u8]| {
                    matches!(code, [0xea | 0xe9 | 0xeb | 0x90 | 0x0f | 0xfa | 0xfc, ..])
                };
                bytes.len().is_multiple_of(4096) && start.is_some_and(is_code)
            }
            Self::OptionRom => bytes.starts_with(&[0x55, 0xaa]),
            Self::Variables => bytes.get(0x28..0x2c) == Some(b"_FVH"),
            Self::Efi => bytes.starts_with(b"MZ"),
            Self::Disk => bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa]),
            Self::Elf => bytes.starts_with(b"\x7fELF"),
        }
    }
}

/// One file of a package.
#[derive(Debug)]
struct Member {
    /// What a configuration calls it, after the `@`.
    name: &'static str,
    /// Its name in the cache.
    file: &'static str,
    /// Where it is in the package, a `tar` wildcard.
    wildcard: &'static str,
    looks: Looks,
}

/// A package, and what is taken from it.
#[derive(Debug)]
pub struct Package {
    /// Its folder in the cache.
    name: &'static str,
    /// One line for people.
    description: &'static str,
    choice: Choice,
    /// Where to look, best first.
    suites: &'static [Suite],
    members: &'static [Member],
}

/// A suite of the main archive.
const fn main(name: &'static str) -> Suite {
    Suite {
        archive: Archive::Main,
        name,
    }
}

/// A suite of the security archive.
const fn security(name: &'static str) -> Suite {
    Suite {
        archive: Archive::Security,
        name,
    }
}

/// A kernel package has its image in `/boot`, or, since 2026, beside its modules.
const KERNEL: &str = "./*/vmlinuz*";

/// A module of a kernel.
const fn module(name: &'static str, wildcard: &'static str) -> Member {
    Member {
        name,
        file: name,
        wildcard,
        looks: Looks::Elf,
    }
}

/// The packages that are known.
static PACKAGES: [Package; 20] = [
    Package {
        name: "linux-6.1-cloud",
        description: "Debian 12's kernel 6.1 for virtual machines",
        choice: Choice::Kernel("linux-image-cloud-amd64"),
        suites: &[security("bookworm-security"), main("bookworm")],
        members: &[
            Member {
                name: "linux-6.1-cloud",
                file: "vmlinuz",
                wildcard: KERNEL,
                looks: Looks::BzImage,
            },
            module("virtio_ring.ko", "*/drivers/virtio/virtio_ring.ko"),
            module("virtio.ko", "*/drivers/virtio/virtio.ko"),
            module(
                "virtio_pci_legacy_dev.ko",
                "*/drivers/virtio/virtio_pci_legacy_dev.ko",
            ),
            module(
                "virtio_pci_modern_dev.ko",
                "*/drivers/virtio/virtio_pci_modern_dev.ko",
            ),
            module("virtio_pci.ko", "*/drivers/virtio/virtio_pci.ko"),
            module("virtio_blk.ko", "*/drivers/block/virtio_blk.ko"),
            module("button.ko", "*/drivers/acpi/button.ko"),
            module("evdev.ko", "*/drivers/input/evdev.ko"),
        ],
    },
    Package {
        name: "linux-5.10-cloud",
        description: "Debian 11's kernel 5.10 for virtual machines",
        choice: Choice::Kernel("linux-image-cloud-amd64"),
        suites: &[security("bullseye-security"), main("bullseye")],
        members: &[Member {
            name: "linux-5.10-cloud",
            file: "vmlinuz",
            wildcard: KERNEL,
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "linux-6.1",
        description: "Debian 12's kernel 6.1 for PCs",
        choice: Choice::Kernel("linux-image-amd64"),
        suites: &[security("bookworm-security"), main("bookworm")],
        members: &[
            Member {
                name: "linux-6.1",
                file: "vmlinuz",
                wildcard: KERNEL,
                looks: Looks::BzImage,
            },
            module("watchdog.ko", "*/drivers/watchdog/watchdog.ko"),
            module("i6300esb.ko", "*/drivers/watchdog/i6300esb.ko"),
        ],
    },
    Package {
        name: "linux-6.1-rt",
        description: "Debian 12's kernel 6.1 for real time",
        choice: Choice::Kernel("linux-image-rt-amd64"),
        suites: &[security("bookworm-security"), main("bookworm")],
        members: &[Member {
            name: "linux-6.1-rt",
            file: "vmlinuz",
            wildcard: KERNEL,
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "linux-6.1-686",
        description: "Debian 12's kernel 6.1 for 32-bit PCs",
        choice: Choice::Kernel32("linux-image-686-pae"),
        suites: &[security("bookworm-security"), main("bookworm")],
        members: &[Member {
            name: "linux-6.1-686",
            file: "vmlinuz",
            wildcard: KERNEL,
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "busybox-32",
        description: "busybox for 32-bit guests",
        choice: Choice::Named32("busybox-static"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "busybox-32",
            file: "busybox",
            wildcard: "./bin/busybox",
            looks: Looks::Elf,
        }],
    },
    Package {
        name: "linux-6.12-cloud",
        description: "Debian 13's kernel 6.12 for virtual machines",
        choice: Choice::Kernel("linux-image-cloud-amd64"),
        suites: &[main("bookworm-backports"), main("trixie")],
        members: &[Member {
            name: "linux-6.12-cloud",
            file: "vmlinuz",
            wildcard: KERNEL,
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "linux-newest-cloud",
        description: "the newest kernel in Debian's sid, for virtual machines",
        choice: Choice::Kernel("linux-image-cloud-amd64"),
        suites: &[main("sid"), main("testing")],
        members: &[Member {
            name: "linux-newest-cloud",
            file: "vmlinuz",
            wildcard: KERNEL,
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "memtest86+",
        description: "Debian 12's memtest86+ 6.10",
        choice: Choice::Named("memtest86+"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "memtest86+",
            file: "memtest86+x64.bin",
            wildcard: "./boot/memtest86+x64.bin",
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "memtest86+-8",
        description: "memtest86+ 8 of Debian's sid",
        choice: Choice::Named("memtest86+"),
        suites: &[main("sid"), main("testing")],
        members: &[Member {
            name: "memtest86+-8",
            file: "mt86+x64",
            wildcard: "./boot/mt86+x64",
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "debian-installer",
        description: "Debian 12's installer for the network",
        choice: Choice::Named("debian-installer-12-netboot-amd64"),
        suites: &[main("bookworm")],
        members: &[
            Member {
                name: "debian-installer",
                file: "linux",
                wildcard: "*/text/debian-installer/amd64/linux",
                looks: Looks::BzImage,
            },
            Member {
                name: "debian-installer-initrd",
                file: "initrd.gz",
                wildcard: "*/text/debian-installer/amd64/initrd.gz",
                looks: Looks::Gzip,
            },
        ],
    },
    Package {
        name: "seabios",
        description: "Debian 12's SeaBIOS",
        choice: Choice::Named("seabios"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "seabios",
            file: "bios-256k.bin",
            wildcard: "./usr/share/seabios/bios-256k.bin",
            looks: Looks::Firmware,
        }],
    },
    Package {
        name: "vgabios",
        description: "Debian 12's video ROMs for SeaBIOS",
        choice: Choice::Named("seabios"),
        suites: &[main("bookworm")],
        members: &[
            Member {
                name: "vgabios",
                file: "vgabios-isavga.bin",
                wildcard: "./usr/share/seabios/vgabios-isavga.bin",
                looks: Looks::OptionRom,
            },
            Member {
                name: "vgabios-ramfb",
                file: "vgabios-ramfb.bin",
                wildcard: "./usr/share/seabios/vgabios-ramfb.bin",
                looks: Looks::OptionRom,
            },
        ],
    },
    Package {
        name: "ovmf",
        description: "Debian 12's OVMF",
        choice: Choice::Named("ovmf"),
        suites: &[main("bookworm")],
        members: &[
            Member {
                name: "ovmf",
                file: "OVMF_CODE_4M.fd",
                wildcard: "./usr/share/OVMF/OVMF_CODE_4M.fd",
                looks: Looks::Firmware,
            },
            Member {
                name: "ovmf-variables",
                file: "OVMF_VARS_4M.fd",
                wildcard: "./usr/share/OVMF/OVMF_VARS_4M.fd",
                looks: Looks::Variables,
            },
        ],
    },
    Package {
        name: "u-boot",
        description: "Debian 12's U-Boot for PCs",
        choice: Choice::Named("u-boot-qemu"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "u-boot",
            file: "u-boot.rom",
            wildcard: "./usr/lib/u-boot/qemu-x86/u-boot.rom",
            looks: Looks::Firmware,
        }],
    },
    Package {
        name: "grub-rescue",
        description: "Debian 12's GRUB rescue disk for BIOS",
        choice: Choice::Named("grub-rescue-pc"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "grub-rescue",
            file: "grub-rescue-cdrom.iso",
            wildcard: "./usr/lib/grub-rescue/grub-rescue-cdrom.iso",
            looks: Looks::Disk,
        }],
    },
    Package {
        name: "grub-efi",
        description: "Debian 12's GRUB for UEFI",
        choice: Choice::Named("grub-efi-amd64-bin"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "grub-efi",
            file: "gcdx64.efi",
            wildcard: "./usr/lib/grub/x86_64-efi/monolithic/gcdx64.efi",
            looks: Looks::Efi,
        }],
    },
    Package {
        name: "ipxe",
        description: "Debian 12's iPXE",
        choice: Choice::Named("ipxe"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "ipxe",
            file: "ipxe.lkrn",
            wildcard: "./boot/ipxe.lkrn",
            looks: Looks::BzImage,
        }],
    },
    Package {
        name: "gnumach",
        description: "Debian 12's GNU Mach",
        choice: Choice::Named("gnumach-image-1.8-486"),
        suites: &[main("bookworm")],
        members: &[Member {
            name: "gnumach",
            file: "gnumach.gz",
            wildcard: "./boot/gnumach-1.8-486.gz",
            looks: Looks::Gzip,
        }],
    },
    Package {
        name: "linux-source-6.1",
        description: "the source of Debian 12's kernel (130 MB)",
        choice: Choice::Named("linux-source-6.1"),
        suites: &[security("bookworm-security"), main("bookworm")],
        members: &[Member {
            name: "linux-source-6.1",
            file: "linux-source-6.1.tar.xz",
            wildcard: "./usr/src/linux-source-6.1.tar.xz",
            looks: Looks::Xz,
        }],
    },
];

/// A file from a package.
#[derive(Debug)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// One line for people: the package's file name, or what the package is.
    pub origin: String,
}

/// All names of files, for messages.
pub fn names() -> Vec<&'static str> {
    let members = PACKAGES.iter().flat_map(|package| package.members);
    members.map(|member| member.name).collect()
}

/// The file of that name, from the cache or fetched into it.
///
/// # Errors
/// There is none of that name; the error lists them. Or its package is in no suite that this
/// machine reaches; the error lists what was tried.
pub fn ensure(cache: &Path, name: &str) -> Result<File> {
    let found = PACKAGES.iter().find_map(|package| {
        let member = package.members.iter().find(|member| member.name == name)?;
        Some((package, member))
    });
    let Some((package, member)) = found else {
        bail!(
            "no guest's file is called {name}; known are: {}",
            names().join(", ")
        );
    };
    let directory = cache.join("guests").join(package.name);
    let path = directory.join(member.file);
    // A file that an older recipe took from elsewhere is not this one.
    let cached = || {
        let origin = Origin::read(&directory)?;
        (path.is_file() && origin.members == wildcards(package)).then_some(origin.package)
    };
    if let Some(origin) = cached() {
        return Ok(File { path, origin });
    }
    let _lock = paths::lock(package.name)?;
    let origin = match cached() {
        Some(origin) => origin,
        None => download(cache, package, &directory)?,
    };
    Ok(File { path, origin })
}

/// Where the cached files of a package are from: what the file `origin` beside them says.
struct Origin {
    /// The package's file name.
    package: String,
    /// The members that were taken from it, one per line.
    members: String,
}

impl Origin {
    /// What stands in `directory`, if it is whole.
    fn read(directory: &Path) -> Option<Self> {
        let text = fs::read_to_string(directory.join("origin")).ok()?;
        let (package, members) = text.split_once('\n')?;
        Some(Self {
            package: package.to_owned(),
            members: members.to_owned(),
        })
    }
}

/// The package's members as [`Origin`] lists them.
fn wildcards(package: &Package) -> String {
    let lines = package.members.iter();
    lines
        .map(|member| format!("{} {}\n", member.file, member.wildcard))
        .collect()
}

/// Downloads the package, puts its files into `directory` and gives the package's file name.
fn download(cache: &Path, package: &Package, directory: &Path) -> Result<String> {
    let step = Step::start(format!("Fetching {}", package.description));
    let Package { suites, choice, .. } = package;
    let fetched = fetch_for(cache, suites, choice.architecture(), |apt| choice.name(apt))
        .with_context(|| format!("cannot fetch {}", package.description))?;
    for member in package.members {
        let bytes = fetched.member(member.wildcard)?;
        ensure!(
            member.looks.fit(&bytes),
            "{} in {} is not what it was: {:?} expected",
            member.wildcard,
            fetched.name,
            member.looks
        );
        write_whole(&directory.join(member.file), &bytes)?;
    }
    // Last, so that files without it are known to be incomplete.
    let origin = format!("{}\n{}", fetched.name, wildcards(package));
    write_whole(&directory.join("origin"), origin.as_bytes())?;
    step.done();
    Ok(fetched.name)
}

impl Choice {
    /// The processors that the package is for.
    fn architecture(self) -> Architecture {
        match self {
            Self::Named(_) | Self::Kernel(_) => Architecture::Amd64,
            Self::Named32(_) | Self::Kernel32(_) => Architecture::I386,
        }
    }

    /// The package's name in this suite.
    fn name(self, apt: &Apt) -> Result<String> {
        match self {
            Self::Named(name) | Self::Named32(name) => Ok(name.to_owned()),
            Self::Kernel(metapackage) | Self::Kernel32(metapackage) => {
                let depends = |name: &str| apt.cache(&["depends", "--important", name]);
                let image = dependency(&depends(metapackage)?, "linux-image-")
                    .with_context(|| format!("{metapackage} names no kernel"))?;
                // Newer packages have the image itself in another one yet.
                let binary = dependency(&depends(&image)?, "linux-binary-");
                Ok(binary.unwrap_or(image))
            }
        }
    }
}

/// The first package beginning with `prefix` that `apt-cache depends` names.
fn dependency(answer: &str, prefix: &str) -> Option<String> {
    answer
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::trim)
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_starts_16_bytes_before_its_end() {
        let firmware = |start: &[u8]| {
            let mut bytes = vec![0xff; 8192];
            bytes[8176..8176 + start.len()].copy_from_slice(start);
            bytes
        };
        // SeaBIOS, OVMF, U-Boot.
        for start in [
            &[0xea, 0x5b, 0xe0][..],
            &[0x90, 0x90, 0xe9],
            &[0xfa, 0xfc, 0xe9],
        ] {
            assert!(Looks::Firmware.fit(&firmware(start)), "{start:x?}");
        }
        assert!(!Looks::Firmware.fit(&firmware(&[])));
        assert!(!Looks::Firmware.fit(&[0xea; 16]));
    }

    #[test]
    fn what_another_recipe_cached_is_not_taken() {
        let directory = std::env::temp_dir().join(format!("plinth-origin-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let package = PACKAGES
            .iter()
            .find(|package| package.name == "u-boot")
            .unwrap();
        let members = |text: &str| {
            fs::write(directory.join("origin"), text).unwrap();
            Origin::read(&directory).map(|origin| origin.members == wildcards(package))
        };
        let now = format!("u-boot-qemu_1_all.deb\n{}", wildcards(package));
        assert_eq!(members(&now), Some(true));
        let before = now.replace("/qemu-x86/", "/qemu-x86_64/");
        assert_eq!(members(&before), Some(false));
        assert_eq!(members("u-boot-qemu_1_all.deb"), None);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_kernel_is_a_dependency() {
        let answer = "linux-image-cloud-amd64\n  Depends: linux-base-cloud-amd64\n  \
                      Depends: linux-image-6.1.0-44-cloud-amd64\n";
        assert_eq!(
            dependency(answer, "linux-image-").as_deref(),
            Some("linux-image-6.1.0-44-cloud-amd64")
        );
        assert_eq!(
            dependency("linux-image-cloud-amd64\n", "linux-image-"),
            None
        );
        assert_eq!(dependency("x\n  Depends: <virtual>\n", "linux-"), None);
    }

    #[test]
    fn names_are_unique() {
        let mut all = names();
        let mut folders: Vec<_> = PACKAGES.iter().map(|package| package.name).collect();
        for list in [&mut all, &mut folders] {
            let count = list.len();
            list.sort_unstable();
            list.dedup();
            assert_eq!(list.len(), count);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = ensure(Path::new("/nonexistent"), "nonesuch").unwrap_err();
        assert!(error.to_string().contains("memtest86+"), "{error}");
    }

    #[test]
    fn files_are_known_by_how_they_begin() {
        assert!(Looks::Gzip.fit(&[0x1f, 0x8b, 8]));
        assert!(!Looks::Gzip.fit(b"x"));
        assert!(!Looks::BzImage.fit(&[0x1f, 0x8b, 8]));
    }
}
