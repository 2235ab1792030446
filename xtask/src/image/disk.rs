//! The disk image: one that a BIOS and a UEFI firmware both boot.
//!
//! Sector 0 has the boot loader's first stage and a partition table of two entries: the second
//! stage, raw, and a FAT file system. A BIOS runs the first stage, which loads the second,
//! which reads the kernel and the ramdisk from the FAT. A UEFI firmware looks into the same
//! FAT for `efi/boot/bootx64.efi`, the place for removable media (UEFI, section 3.5.1.1), and
//! that program reads the same two files.
//!
//! What the boot loader's second stage (bootloader 0.11.15) asks of the FAT: no FAT32; 16 KiB
//! are read per cluster or part of it, so clusters of that size load fastest; and beyond 65535
//! sectors it takes the field after the sector count for a FAT size, so that is zero here (the
//! drive number and the volume's serial number, which nobody needs; a boot signature of 0
//! says that they are not there).

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions, ReadWriteSeek};

const SECTOR: u64 = 512;

/// The FAT begins here, in sectors: 1 MiB, which suits the blocks of flash memory.
const FAT_START: u64 = 2048;

/// Bytes per cluster: what the second stage reads at a time.
const CLUSTER: u64 = 16 * 1024;

/// Bytes per cluster where the file system would have too many of the others.
const LARGE_CLUSTER: u64 = 32 * 1024;

/// Cluster counts at which the FAT's type changes (Microsoft's FAT specification 1.03, page 14).
const FAT16_MIN_CLUSTERS: u64 = 4085;
const FAT16_MAX_CLUSTERS: u64 = 65524;

/// A file system with about so many clusters could be taken for either type.
const DOUBTFUL: u64 = 16;

/// Sectors for the FATs, the root folder and the reserved ones, at most.
const OVERHEAD_SECTORS: u64 = 1024;

/// The image's length is a multiple of this, in bytes: a cylinder of the geometry that Bochs
/// assumes for a disk of 16 heads and 63 sectors.
const CYLINDER: u64 = 16 * 63 * SECTOR;

/// Offsets in the boot sector and in an entry of its partition table.
const PARTITION_TABLE: usize = 446;
const PARTITION_ENTRY: usize = 16;

/// Partition type of the second stage, and of FAT addressed by sector number.
const TYPE_SECOND_STAGE: u8 = 0x20;
const TYPE_FAT_LBA: u8 = 0x0e;

/// Offsets of FAT fields: total sectors in 16 bits, and drive number to the first byte of the serial number.
const BPB_TOTAL_SECTORS_16: u64 = 19;
const BPB_DRIVE_NUMBER: u64 = 36;

/// The boot loader's parts, as files.
#[derive(Debug)]
pub struct BootParts {
    /// First stage with an empty partition table, one sector.
    pub boot_sector: PathBuf,
    /// Second stage, whole sectors.
    pub stage_2: PathBuf,
    /// Third stage.
    pub stage_3: PathBuf,
    /// Fourth stage.
    pub stage_4: PathBuf,
    /// The UEFI program.
    pub uefi: PathBuf,
}

impl BootParts {
    /// The parts in a folder.
    pub fn within(folder: &Path) -> Self {
        BootParts {
            boot_sector: folder.join("boot-sector"),
            stage_2: folder.join("stage-2"),
            stage_3: folder.join("boot-stage-3"),
            stage_4: folder.join("boot-stage-4"),
            uefi: folder.join("bootx64.efi"),
        }
    }

    /// Whether all are there.
    pub fn exist(&self) -> bool {
        [
            &self.boot_sector,
            &self.stage_2,
            &self.stage_3,
            &self.stage_4,
            &self.uefi,
        ]
        .iter()
        .all(|part| part.is_file())
    }
}

/// Writes an image. `settings` is the boot loader's `boot.json`. Returns the image's bytes.
///
/// # Errors
/// A file could not be read or written, or all is too large for the boot loader.
pub fn write(
    image: &Path,
    parts: &BootParts,
    kernel: &Path,
    ramdisk: &[u8],
    settings: &[u8],
) -> anyhow::Result<u64> {
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    let mut boot_sector = read(&parts.boot_sector)?;
    let stage_2 = read(&parts.stage_2)?;
    let stage_2_sectors = (stage_2.len() as u64).div_ceil(SECTOR);
    ensure!(
        boot_sector.len() as u64 == SECTOR && stage_2_sectors < FAT_START,
        "the boot loader's parts are not as expected"
    );
    let (stage_3, stage_4) = (read(&parts.stage_3)?, read(&parts.stage_4)?);
    let (uefi, kernel) = (read(&parts.uefi)?, read(kernel)?);
    // The second stage reads the first cluster of the root folder only so far: no more files.
    let files: [(&str, &[u8]); 6] = [
        ("boot-stage-3", &stage_3),
        ("boot-stage-4", &stage_4),
        ("kernel-x86_64", &kernel),
        ("ramdisk", ramdisk),
        ("boot.json", settings),
        ("efi/boot/bootx64.efi", &uefi),
    ];
    let shape = Shape::for_files(files.iter().map(|(_, bytes)| bytes.len() as u64))?;
    let bytes = (FAT_START * SECTOR + shape.sectors * SECTOR).next_multiple_of(CYLINDER);

    let entry = |active, kind, start, sectors| partition(active, kind, start, sectors);
    for (index, entry) in [
        entry(true, TYPE_SECOND_STAGE, 1, stage_2_sectors)?,
        entry(false, TYPE_FAT_LBA, FAT_START, shape.sectors)?,
    ]
    .iter()
    .enumerate()
    {
        let at = PARTITION_TABLE + index * PARTITION_ENTRY;
        boot_sector[at..at + PARTITION_ENTRY].copy_from_slice(entry);
    }
    // Written beside its place and moved there, so a running emulator keeps the one it has.
    let new = image.with_extension("part");
    let mut disk = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&new)
        .with_context(|| new.display().to_string())?;
    disk.set_len(bytes)?;
    disk.write_all(&boot_sector)?;
    disk.write_all(&stage_2)?;
    let volume = Volume {
        disk: &disk,
        start: FAT_START * SECTOR,
    };
    write_fat(volume, &shape, &files)?;
    fs::rename(&new, image).with_context(|| image.display().to_string())?;
    Ok(bytes)
}

/// An entry of the partition table. Sectors count from the disk's beginning; cylinders and
/// heads say "beyond what these fields hold", which is what sector numbers are for.
fn partition(active: bool, kind: u8, start: u64, sectors: u64) -> anyhow::Result<[u8; 16]> {
    const BEYOND: [u8; 3] = [0xfe, 0xff, 0xff];
    let mut entry = [0; PARTITION_ENTRY];
    entry[0] = if active { 0x80 } else { 0 };
    entry[1..4].copy_from_slice(&BEYOND);
    entry[4] = kind;
    entry[5..8].copy_from_slice(&BEYOND);
    entry[8..12].copy_from_slice(&u32::try_from(start)?.to_le_bytes());
    entry[12..16].copy_from_slice(&u32::try_from(sectors)?.to_le_bytes());
    Ok(entry)
}

/// Type and size of a FAT file system.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    fat_type: FatType,
    cluster: u64,
    sectors: u64,
}

impl Shape {
    /// The smallest that takes files of these lengths, and a few folders.
    fn for_files(lengths: impl Iterator<Item = u64> + Clone) -> anyhow::Result<Self> {
        const FOLDERS: u64 = 4;
        for cluster in [CLUSTER, LARGE_CLUSTER] {
            let needed: u64 = lengths.clone().map(|l| l.div_ceil(cluster)).sum::<u64>() + FOLDERS;
            let (fat_type, clusters) = if needed + DOUBTFUL < FAT16_MIN_CLUSTERS {
                (FatType::Fat12, needed)
            } else {
                (FatType::Fat16, needed.max(FAT16_MIN_CLUSTERS + DOUBTFUL))
            };
            if clusters + DOUBTFUL > FAT16_MAX_CLUSTERS {
                continue;
            }
            // What the overhead leaves over is a few clusters more than needed.
            let mut sectors = clusters * (cluster / SECTOR);
            sectors += match fat_type {
                FatType::Fat12 => OVERHEAD_SECTORS / 16,
                _ => OVERHEAD_SECTORS,
            };
            return Ok(Shape {
                fat_type,
                cluster,
                sectors,
            });
        }
        bail!(
            "kernels, initrds and files together are beyond 2 GiB, more than the boot loader takes"
        )
    }
}

fn write_fat(mut volume: Volume<'_>, shape: &Shape, files: &[(&str, &[u8])]) -> anyhow::Result<()> {
    let options = FormatVolumeOptions::new()
        .fat_type(shape.fat_type)
        .bytes_per_cluster(u32::try_from(shape.cluster)?)
        .total_sectors(u32::try_from(shape.sectors)?)
        .max_root_dir_entries(512)
        .volume_id(0x504c_494e)
        .volume_label(*b"PLINTH     ");
    fatfs::format_volume(Cursor::at(&mut volume), options).context("formatting the FAT")?;
    if volume.read_u16(BPB_TOTAL_SECTORS_16)? == 0 {
        volume.write_at(BPB_DRIVE_NUMBER, &[0; 4])?;
    }
    add_files(Cursor::at(&mut volume), files)
}

/// Writes files, given as path and content, into the FAT on `volume`, with the directories that they need.
pub fn add_files<V: ReadWriteSeek>(
    volume: V,
    files: &[(&str, impl AsRef<[u8]>)],
) -> anyhow::Result<()> {
    let fat = FileSystem::new(volume, FsOptions::new())?;
    let root = fat.root_dir();
    for (name, bytes) in files {
        for (index, _) in name.match_indices('/') {
            root.create_dir(&name[..index])?;
        }
        root.create_file(name)
            .and_then(|mut file| file.write_all(bytes.as_ref()))
            .with_context(|| format!("writing {name} into the FAT"))?;
    }
    drop(root);
    fat.unmount()?;
    Ok(())
}

/// The part of the disk from `start` on.
struct Volume<'d> {
    disk: &'d File,
    start: u64,
}

impl Volume<'_> {
    fn read_u16(&self, offset: u64) -> io::Result<u16> {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 2];
        self.disk.read_exact_at(&mut bytes, self.start + offset)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        self.disk.write_all_at(bytes, self.start + offset)
    }
}

/// A position in a volume, for the file system's code.
struct Cursor<'v, 'd> {
    volume: &'v mut Volume<'d>,
    position: u64,
}

impl<'v, 'd> Cursor<'v, 'd> {
    fn at(volume: &'v mut Volume<'d>) -> Self {
        Cursor {
            volume,
            position: 0,
        }
    }
}

impl io::Read for Cursor<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let at = self.volume.start + self.position;
        let read = self.volume.disk.read_at(buffer, at)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Write for Cursor<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.volume.write_at(self.position, bytes)?;
        self.position += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Cursor<'_, '_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            // The disk's length is known, the volume's is not.
            SeekFrom::End(_) => None,
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("plinth-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn parts(folder: &Path) -> BootParts {
        let parts = BootParts::within(folder);
        fs::write(&parts.boot_sector, [0x11; 512]).unwrap();
        fs::write(&parts.stage_2, [0x22; 3000]).unwrap();
        fs::write(&parts.stage_3, b"three").unwrap();
        fs::write(&parts.stage_4, b"four").unwrap();
        fs::write(&parts.uefi, b"MZ").unwrap();
        fs::write(folder.join("kernel"), b"\x7fELF").unwrap();
        parts
    }

    /// What the boot loader's second stage computes from the boot parameters.
    fn second_stage_understands(bpb: &[u8]) -> bool {
        let u16_at = |at: usize| u16::from_le_bytes([bpb[at], bpb[at + 1]]);
        let fat_size_32 = u32::from_le_bytes(bpb[36..40].try_into().unwrap());
        let is_large = u16_at(19) == 0;
        u16_at(22) != 0 && (!is_large || fat_size_32 == 0)
    }

    #[test]
    fn every_firmware_finds_its_files() {
        let folder = folder("disk");
        let parts = parts(&folder);
        let image = folder.join("x.img");
        // The second is beyond 65535 sectors, the third beyond FAT12.
        for ramdisk in [100_000, 40 << 20, 80 << 20] {
            let ramdisk: Vec<u8> = (0..ramdisk).map(|i: u32| (i / 512) as u8).collect();
            let kernel = folder.join("kernel");
            let bytes = write(&image, &parts, &kernel, &ramdisk, b"{}").unwrap();
            let disk = fs::read(&image).unwrap();
            assert_eq!(disk.len() as u64, bytes);
            assert_eq!(bytes % CYLINDER, 0);
            assert_eq!(&disk[..446], &[0x11; 446]);
            assert_eq!(disk[446 + 4], TYPE_SECOND_STAGE);
            assert_eq!(disk[446 + 16 + 4], TYPE_FAT_LBA);
            assert_eq!(&disk[512..3512], &[0x22; 3000]);

            let fat = &disk[usize::try_from(FAT_START * SECTOR).unwrap()..];
            assert!(second_stage_understands(fat));
            let fat = FileSystem::new(io::Cursor::new(fat.to_vec()), FsOptions::new()).unwrap();
            assert_ne!(fat.fat_type(), FatType::Fat32);
            assert_eq!(u64::from(fat.cluster_size()), CLUSTER);
            let read = |name: &str| {
                let mut bytes = Vec::new();
                fat.root_dir()
                    .open_file(name)
                    .unwrap()
                    .read_to_end(&mut bytes)
                    .unwrap();
                bytes
            };
            assert_eq!(read("efi/boot/bootx64.efi"), b"MZ");
            assert_eq!(read("kernel-x86_64"), b"\x7fELF");
            assert!(read("ramdisk") == ramdisk);
            assert_eq!(read("boot-stage-4"), b"four");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn shapes_are_of_no_doubtful_type() {
        for mib in [1, 31, 32, 63, 64, 65, 200, 1000, 1030, 1500] {
            let shape = Shape::for_files([mib << 20].into_iter()).unwrap();
            let clusters = shape.sectors * SECTOR / shape.cluster;
            match shape.fat_type {
                FatType::Fat12 => assert!(clusters < FAT16_MIN_CLUSTERS, "{mib}"),
                FatType::Fat16 => {
                    assert!(
                        (FAT16_MIN_CLUSTERS + 8..=FAT16_MAX_CLUSTERS).contains(&clusters),
                        "{mib}"
                    );
                }
                FatType::Fat32 => panic!("{mib}: the boot loader reads no FAT32"),
            }
        }
        assert!(Shape::for_files([3 << 30].into_iter()).is_err());
    }
}
