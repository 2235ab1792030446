//! Takes the boot loader apart: `boot-parts FOLDER` writes its stages as files.
//!
//! The `bootloader` crate can only make whole disk images, one that boots by BIOS and another
//! that boots by UEFI. xtask wants one image for both, so this program lets the crate make its
//! own and pulls the pieces out: `boot-sector` and `stage-2` (raw sectors), `boot-stage-3` and
//! `boot-stage-4` (files of the FAT partition), and `bootx64.efi`.

use std::{
    error::Error,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    process::ExitCode,
};

use bootloader::DiskImageBuilder;

const SECTOR: u64 = 512;

/// Offset of a partition's entry in the boot sector.
const fn entry(partition: usize) -> usize {
    446 + 16 * partition
}

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: boot-parts FOLDER");
        return ExitCode::from(2);
    };
    match write_parts(Path::new(&folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_parts(folder: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let image = folder.join("bios.img");
    let builder = DiskImageBuilder::empty();
    builder.create_bios_image(&image)?;
    take_bios_parts(&image, folder)?;
    fs::remove_file(&image)?;

    // The folder for network boot holds the UEFI loader as a file.
    let network = folder.join("network");
    builder.create_uefi_tftp_folder(&network)?;
    fs::rename(network.join("bootloader"), folder.join("bootx64.efi"))?;
    fs::remove_dir_all(&network)?;
    Ok(())
}

/// The image: boot sector, second stage as first partition, FAT as second partition.
fn take_bios_parts(image: &Path, folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut disk = File::open(image)?;
    let mut boot_sector = [0; SECTOR as usize];
    disk.read_exact(&mut boot_sector)?;
    fs::write(folder.join("boot-sector"), boot_sector)?;

    let field = |offset: usize| -> Result<u64, Box<dyn Error>> {
        let bytes = boot_sector[offset..offset + 4].try_into()?;
        Ok(u32::from_le_bytes(bytes).into())
    };
    let (start, sectors) = (field(entry(0) + 8)?, field(entry(0) + 12)?);
    let mut stage_2 = vec![0; usize::try_from(sectors * SECTOR)?];
    disk.seek(SeekFrom::Start(start * SECTOR))?;
    // The image may end before the last sector's end.
    let mut filled = 0;
    while filled < stage_2.len() {
        match disk.read(&mut stage_2[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    fs::write(folder.join("stage-2"), stage_2)?;

    let mut partition = Vec::new();
    disk.seek(SeekFrom::Start(field(entry(1) + 8)? * SECTOR))?;
    disk.read_to_end(&mut partition)?;
    let fat = fatfs::FileSystem::new(std::io::Cursor::new(partition), fatfs::FsOptions::new())?;
    for name in ["boot-stage-3", "boot-stage-4"] {
        let mut contents = Vec::new();
        fat.root_dir().open_file(name)?.read_to_end(&mut contents)?;
        File::create(folder.join(name))?.write_all(&contents)?;
    }
    Ok(())
}
