//! A disk that firmware boots Linux from, made of files that are fetched anyway.
//!
//! A FAT volume without a partition table: GRUB's EFI program where UEFI looks for it, Linux and its
//! initramfs, iPXE, and the scripts by which GRUB starts them. A BIOS cannot start it by itself; there GRUB
//! comes from Debian's rescue disk and is told to carry one of the scripts out.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use fatfs::FormatVolumeOptions;

use super::{packages, write_whole};
use crate::{image::disk::add_files, initramfs, paths};

/// Bytes beside the files: the FAT's own, and what its clusters waste.
const SPARE_BYTES: usize = 1 << 20;

/// What GRUB does to boot Linux. `(hd1)` has no meaning to the EFI program, which finds its own disk.
const LINUX: &str = "\
if [ \"$grub_platform\" = pc ]; then set root=(hd1); fi
linux /vmlinuz console=ttyS0
initrd /initrd.img
boot
";

/// What GRUB does to start iPXE, which needs a BIOS.
const IPXE: &str = "\
set root=(hd1)
linux16 /ipxe.lkrn
boot
";

/// The disk's image, from the cache or made there.
///
/// # Errors
/// One of its files cannot be fetched, or the image cannot be written.
pub fn ensure(cache: &Path) -> Result<PathBuf> {
    let linux = packages::ensure(cache, "linux-6.1-cloud")?;
    let grub = packages::ensure(cache, "grub-efi")?;
    let ipxe = packages::ensure(cache, "ipxe")?;
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    let image = volume(&[
        ("EFI/BOOT/BOOTX64.EFI", read(&grub.path)?),
        // By this file the EFI program knows its disk.
        (".disk/info", b"Plinth\n".to_vec()),
        ("boot/grub/grub.cfg", LINUX.into()),
        // Short names, since a BIOS remembers 15 keys.
        ("g", LINUX.into()),
        ("i", IPXE.into()),
        ("vmlinuz", read(&linux.path)?),
        ("initrd.img", read(&initramfs::ensure(cache)?)?),
        ("ipxe.lkrn", read(&ipxe.path)?),
    ])?;
    let path = cache.join("guests/boot-disk.img");
    let _lock = paths::lock("boot-disk")?;
    if fs::read(&path).ok().as_deref() != Some(image.as_slice()) {
        write_whole(&path, &image)?;
    }
    Ok(path)
}

/// A FAT volume with these files.
fn volume(files: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    const SECTOR: usize = 512;
    let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let mut image = vec![0; (bytes + SPARE_BYTES).next_multiple_of(SECTOR)];
    let options = FormatVolumeOptions::new()
        .volume_id(0x504c_494e)
        .volume_label(*b"PLINTH BOOT");
    fatfs::format_volume(Cursor::new(&mut image), options).context("formatting the FAT")?;
    add_files(Cursor::new(&mut image), files)?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use fatfs::{FileSystem, FsOptions};

    use super::*;

    #[test]
    fn files_are_on_the_volume() {
        let large = vec![7; 3 << 20];
        let files = [
            ("EFI/BOOT/BOOTX64.EFI", large.clone()),
            ("g", LINUX.as_bytes().to_vec()),
        ];
        let mut image = volume(&files).unwrap();
        let fat = FileSystem::new(Cursor::new(&mut image), FsOptions::new()).unwrap();
        let mut found = Vec::new();
        let mut file = fat.root_dir().open_file("EFI/BOOT/BOOTX64.EFI").unwrap();
        file.read_to_end(&mut found).unwrap();
        assert_eq!(found, large);
        assert!(fat.root_dir().open_file("g").is_ok());
    }
}
