//! The ELF file inside a packed kernel: what a PVH or multiboot loader takes.
//!
//! A kernel for multiboot is packed as a whole, by gzip; GRUB would unpack it. Linux packs itself into a bzImage. The boot protocol's header tells where the packed kernel lies
//! (`payload_offset`, `payload_length`: Linux, Documentation/arch/x86/boot.rst); its first bytes tell the
//! format. Those of Debian's kernels are read: legacy LZ4 (5.10 and 6.1 for virtual
//! machines), XZ (6.1 for PCs), Zstandard (6.12 and later).
//!
//! Invariant: what comes out of a bzImage has the length that the kernel's build noted behind the payload.

use std::io::{Cursor, Read};

use anyhow::{Context, Result, bail, ensure};

use super::is_bzimage;

/// Longest kernel that is unpacked, in bytes: a limit to what a broken file can ask for.
const MAX_BYTES: usize = 1 << 30;

/// Offsets in a bzImage's header: `setup_sects`, and the two fields of the payload.
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// First bytes of the formats.
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTANDARD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const GZIP: &[u8] = &[0x1f, 0x8b];

/// Unpacks the ELF file of a kernel: a bzImage, or one packed by gzip (RFC 1952).
///
/// # Errors
/// It is neither, is cut short, is packed in another way, or is damaged.
pub fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let elf = match image.starts_with(GZIP) {
        true => gunzip(image)?,
        false => from_bzimage(image)?,
    };
    ensure!(elf.starts_with(b"\x7fELF"), "the kernel holds no ELF file");
    Ok(elf)
}

/// What gzip packed; its own checksum tells damage.
fn gunzip(packed: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = flate2::read::GzDecoder::new(packed)
        .take(u64::try_from(MAX_BYTES)?)
        .read_to_end(&mut bytes);
    read.context("the gzip file is damaged")?;
    Ok(bytes)
}

fn from_bzimage(image: &[u8]) -> Result<Vec<u8>> {
    ensure!(is_bzimage(image), "this is no bzImage");
    let payload = payload(image).context("the bzImage is cut short")?;
    // The build appends the length of the unpacked kernel.
    let (packed, length) = payload
        .split_last_chunk()
        .context("the bzImage's payload is too short")?;
    let length = usize::try_from(u32::from_le_bytes(*length))?;
    ensure!(length <= MAX_BYTES, "a kernel of {length} bytes");
    let mut elf = Vec::with_capacity(length);
    let limit = u64::try_from(length)? + 1;
    unpacker(packed)?
        .take(limit)
        .read_to_end(&mut elf)
        .context("the bzImage's payload is damaged")?;
    ensure!(
        elf.len() == length,
        "the bzImage's payload is damaged: not {length} bytes"
    );
    Ok(elf)
}

/// The payload with the length behind it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    // Protected-mode code begins behind the boot sector and `setup_sects` more; 0 means 4.
    let sectors = match image.get(SETUP_SECTORS)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let start = ((sectors + 1) * 512).checked_add(field(PAYLOAD_OFFSET)?)?;
    image.get(start..start.checked_add(field(PAYLOAD_LENGTH)?)?)
}

/// A reader of what is packed.
fn unpacker(packed: &[u8]) -> Result<Box<dyn Read + '_>> {
    let input = Cursor::new(packed);
    if packed.starts_with(LZ4_LEGACY) {
        Ok(Box::new(lz4_flex::frame::FrameDecoder::new(input)))
    } else if packed.starts_with(XZ) {
        Ok(Box::new(lzma_rust2::XzReader::new(input, false)))
    } else if packed.starts_with(ZSTANDARD) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(input);
        Ok(Box::new(decoder.context("the bzImage's payload")?))
    } else {
        let head: Vec<_> = packed.iter().take(6).map(|b| format!("{b:02x}")).collect();
        bail!(
            "the bzImage is packed in a way that is not known here ({})",
            head.join(" ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with this payload and, behind it, this length.
    fn image(packed: &[u8], length: usize) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        let packed_length = u32::try_from(packed.len() + 4).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&packed_length.to_le_bytes());
        image.extend_from_slice(packed);
        image.extend_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
        image
    }

    /// Twelve bytes of an ELF file, packed by hand: a block of literals.
    const ELF: &[u8] = b"\x7fELF\x02\x01\x01abcde";

    fn lz4() -> Vec<u8> {
        let mut packed = LZ4_LEGACY.to_vec();
        // The block's length; its one sequence: twelve literals and no match.
        packed.extend_from_slice(&13u32.to_le_bytes());
        packed.push(12 << 4);
        packed.extend_from_slice(ELF);
        packed
    }

    fn zstandard() -> Vec<u8> {
        let mut packed = ZSTANDARD.to_vec();
        // RFC 8878: a single segment whose size is in one byte; a raw block, the last.
        packed.extend_from_slice(&[0x20, 12]);
        packed.extend_from_slice(&[12 << 3 | 1, 0, 0]);
        packed.extend_from_slice(ELF);
        packed
    }

    /// What `xz --check=crc32 --x86 --lzma2=preset=0` makes of it: the filters of Linux' builds.
    const PACKED_BY_XZ: [u8; 64] = [
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04,
        0x00, 0x21, 0x01, 0x0c, 0x00, 0xd6, 0x7c, 0x18, 0xaf, 0x01, 0x00, 0x0b, 0x7f, 0x45, 0x4c,
        0x46, 0x02, 0x01, 0x01, 0x61, 0x62, 0x63, 0x64, 0x65, 0x00, 0xf0, 0x00, 0xb1, 0xcf, 0x00,
        0x01, 0x20, 0x0c, 0xa2, 0xdd, 0xb4, 0xbc, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00,
        0x00, 0x01, 0x59, 0x5a,
    ];

    #[test]
    fn packed_kernels_are_unpacked() {
        for packed in [lz4(), zstandard(), PACKED_BY_XZ.to_vec()] {
            assert_eq!(extract(&image(&packed, ELF.len())).unwrap(), ELF);
        }
    }

    /// What `gzip -n` makes of it.
    const PACKED_BY_GZIP: [u8; 32] = [
        0x1f, 0x8b, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0xab, 0x77, 0xf5, 0x71, 0x63,
        0x62, 0x64, 0x4c, 0x4c, 0x4a, 0x4e, 0x49, 0x05, 0x00, 0xf0, 0x00, 0xb1, 0xcf, 0x0c, 0x00,
        0x00, 0x00,
    ];

    #[test]
    fn a_kernel_packed_by_gzip_is_unpacked() {
        assert_eq!(extract(&PACKED_BY_GZIP).unwrap(), ELF);
        for length in 0..PACKED_BY_GZIP.len() {
            assert!(
                extract(&PACKED_BY_GZIP[..length]).is_err(),
                "{length} bytes"
            );
        }
        let mut damaged = PACKED_BY_GZIP;
        damaged[16] ^= 1;
        assert!(extract(&damaged).is_err());
    }

    #[test]
    fn a_wrong_length_is_damage() {
        for length in [ELF.len() - 1, ELF.len() + 1] {
            let error = extract(&image(&lz4(), length)).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{error}");
        }
        assert!(extract(&image(&lz4(), usize::try_from(u32::MAX).unwrap())).is_err());
    }

    #[test]
    fn cut_images_are_refused() {
        let whole = image(&lz4(), ELF.len());
        for length in 0..whole.len() {
            assert!(extract(&whole[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn an_unknown_packing_is_named() {
        let error = extract(&image(b"BZh91", 5)).unwrap_err().to_string();
        assert!(error.contains("42 5a 68"), "{error}");
    }
}
