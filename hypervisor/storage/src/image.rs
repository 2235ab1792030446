//! A disk made from an image: read-only base bytes, and what was written kept beside them.
//!
//! The base stays as it is, so several disks may share one. A block that is written
//! is copied into a frame of host memory first (copy on write), up to a limit; then writes fail
//! as on a full disk. What was written lasts as long as the [`ImageDisk`]: over a restart of
//! the guest, not over one of the host.

use mem::{HostMemory, Owner};
use spin::Mutex;

use crate::overlay::{BLOCK, Overlay, Place};
use crate::{Disk, DiskError, SECTOR, check_range};

/// A disk made from an image.
pub struct ImageDisk {
    base: &'static [u8],
    sectors: u64,
    memory: &'static dyn HostMemory,
    /// `None`: read-only.
    overlay: Option<Mutex<Overlay>>,
}

/// A part of a range that lies in one block.
struct Piece {
    block: u64,
    /// First byte, in the block.
    from: usize,
    /// Bytes.
    len: usize,
    /// Bytes of the range before this part.
    done: usize,
}

fn pieces(offset: u64, bytes: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = offset + done as u64;
        let from = (at % BLOCK) as usize;
        let len = (BLOCK as usize - from).min(bytes - done);
        let piece = Piece {
            block: at / BLOCK,
            from,
            len,
            done,
        };
        done += len;
        (len > 0).then_some(piece)
    })
}

impl ImageDisk {
    /// A disk that refuses writes. An image that does not end with a sector is read as if zeroes followed.
    pub fn read_only(memory: &'static dyn HostMemory, image: &'static [u8]) -> Self {
        ImageDisk {
            base: image,
            sectors: (image.len() as u64).div_ceil(SECTOR),
            memory,
            overlay: None,
        }
    }

    /// A disk that keeps what is written in at most `limit_bytes` of frames, taken as `owner`.
    pub fn writable(
        memory: &'static dyn HostMemory,
        owner: Owner,
        image: &'static [u8],
        limit_bytes: u64,
    ) -> Self {
        let mut disk = Self::read_only(memory, image);
        let blocks = (disk.sectors * SECTOR).div_ceil(BLOCK);
        let overlay = Overlay::new(memory, owner, blocks, limit_bytes);
        disk.overlay = Some(Mutex::new(overlay));
        disk
    }

    /// Bytes of host memory that changed data takes.
    pub fn used_bytes(&self) -> u64 {
        self.overlay
            .as_ref()
            .map_or(0, |overlay| overlay.lock().used_bytes())
    }

    /// Copies from the image, and zeroes from beyond its end.
    fn read_base(&self, offset: u64, to: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = self.base.get(start..).unwrap_or_default();
        let len = there.len().min(to.len());
        to[..len].copy_from_slice(&there[..len]);
        to[len..].fill(0);
    }

    fn overlay(&self) -> Result<&Mutex<Overlay>, DiskError> {
        self.overlay.as_ref().ok_or(DiskError::ReadOnly)
    }

    /// Writes within one block. `from` has `piece.len` bytes.
    fn write_piece(
        &self,
        overlay: &mut Overlay,
        piece: &Piece,
        from: &[u8],
    ) -> Result<(), DiskError> {
        let frame = match overlay.place(piece.block) {
            Place::Frame(frame) => frame,
            before => {
                let frame = overlay.add_frame(piece.block)?;
                if before == Place::Base && piece.len < BLOCK as usize {
                    let mut whole = [0; BLOCK as usize];
                    self.read_base(piece.block * BLOCK, &mut whole);
                    self.memory.write(frame, &whole);
                }
                frame
            }
        };
        self.memory.write(frame + piece.from as u64, from);
        Ok(())
    }

    /// Calls `each` for the parts of a range, block by block, with the overlay locked for one at a time.
    fn change(
        &self,
        offset: u64,
        bytes: u64,
        mut each: impl FnMut(&mut Overlay, &Piece) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let overlay = self.overlay()?;
        check_range(self.sectors, offset, bytes)?;
        let bytes = usize::try_from(bytes).map_err(|_| DiskError::OutOfRange)?;
        pieces(offset, bytes).try_for_each(|piece| each(&mut overlay.lock(), &piece))
    }
}

impl Disk for ImageDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn read_only(&self) -> bool {
        self.overlay.is_none()
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.sectors, offset, to.len() as u64)?;
        let Some(overlay) = &self.overlay else {
            self.read_base(offset, to);
            return Ok(());
        };
        for piece in pieces(offset, to.len()) {
            let part = &mut to[piece.done..piece.done + piece.len];
            let at = piece.from as u64;
            // Held while a frame is read: else a discard could free it.
            let overlay = overlay.lock();
            match overlay.place(piece.block) {
                Place::Base => self.read_base(piece.block * BLOCK + at, part),
                Place::Zeroes => part.fill(0),
                Place::Frame(frame) => self.memory.read(frame + at, part),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), DiskError> {
        self.change(offset, from.len() as u64, |overlay, piece| {
            self.write_piece(overlay, piece, &from[piece.done..piece.done + piece.len])
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        // Host memory lasts no longer for being asked.
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        const ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];
        self.change(offset, bytes, |overlay, piece| {
            if piece.len == BLOCK as usize {
                overlay.set_zeroes(piece.block)
            } else if overlay.place(piece.block) == Place::Zeroes {
                Ok(())
            } else {
                self.write_piece(overlay, piece, &ZEROES[..piece.len])
            }
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        self.change(offset, bytes, |overlay, piece| {
            // Blocks of the image cost nothing and stay.
            match overlay.place(piece.block) {
                Place::Frame(_) if piece.len == BLOCK as usize => overlay.set_zeroes(piece.block),
                _ => Ok(()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::PAGE_SIZE;
    use mem::fake::FakeMemory;
    use proptest::prelude::*;

    const OWNER: Owner = Owner::VmDisks(1);

    fn host() -> &'static FakeMemory {
        Box::leak(Box::new(FakeMemory::new(4 << 20)))
    }

    fn image(bytes: usize) -> &'static [u8] {
        let content: Vec<u8> = (0..bytes).map(|i| (i / 7 + i) as u8 | 1).collect();
        content.leak()
    }

    fn bytes(disk: &ImageDisk, offset: u64, len: usize) -> Vec<u8> {
        let mut to = vec![0xee; len];
        disk.read(offset, &mut to).unwrap();
        to
    }

    #[test]
    fn an_image_reads_as_it_is_and_ends_with_a_whole_sector() {
        let image = image(9000);
        let disk = ImageDisk::read_only(host(), image);
        assert_eq!((disk.sectors(), disk.read_only()), (18, true));
        assert_eq!(bytes(&disk, 0, 9000), image);
        assert_eq!(bytes(&disk, 8704, 512)[296..], [0; 216]);
        let mut to = [7; 2];
        assert_eq!(disk.read(18 * 512 - 1, &mut to), Err(DiskError::OutOfRange));
        assert_eq!(disk.read(u64::MAX, &mut to), Err(DiskError::OutOfRange));
        assert_eq!(to, [7; 2]);
        assert_eq!(disk.write(0, &[1]), Err(DiskError::ReadOnly));
        assert_eq!(disk.write_zeroes(0, 1), Err(DiskError::ReadOnly));
        assert_eq!(disk.discard(0, 1), Err(DiskError::ReadOnly));
    }

    #[test]
    fn writes_stay_off_the_image_and_give_their_memory_back() {
        let (host, image) = (host(), image(3 * 4096));
        let disk = ImageDisk::writable(host, OWNER, image, 1 << 20);
        let other = ImageDisk::writable(host, OWNER, image, 1 << 20);
        disk.write(4095, &[1, 2]).unwrap();
        assert_eq!(bytes(&disk, 4094, 4), [image[4094], 1, 2, image[4097]]);
        assert_eq!(bytes(&other, 0, image.len()), image);
        // Two blocks and a table.
        assert_eq!((disk.used_bytes(), host.used(OWNER)), (3 * PAGE_SIZE, 3));
        disk.write(4096, &[3; 4096]).unwrap();
        assert_eq!(disk.used_bytes(), 3 * PAGE_SIZE);
        disk.discard(4096, 4096).unwrap();
        disk.discard(8192, 4096).unwrap();
        disk.write_zeroes(0, 4096).unwrap();
        assert_eq!(bytes(&disk, 0, 8192), [0; 8192]);
        assert_eq!(bytes(&disk, 8192, 4096), image[8192..]);
        assert_eq!(disk.used_bytes(), PAGE_SIZE);
        disk.write(0, &[9; 4096]).unwrap();
        drop(disk);
        assert_eq!(host.used(OWNER), 0);
    }

    #[test]
    fn the_limit_is_kept() {
        let disk = ImageDisk::writable(host(), OWNER, image(8 << 12), 3 << 12);
        disk.write(0, &[1; 8192]).unwrap();
        assert_eq!(disk.write(8192, &[1]), Err(DiskError::NoSpace));
        assert_eq!(disk.write(100, &[2; 8000]), Ok(()), "no new memory");
        disk.discard(0, 4096).unwrap();
        assert_eq!(disk.write(8192, &[1]), Ok(()));
        // No limit, but a host without memory.
        let small = Box::leak(Box::new(FakeMemory::new(2 << 12)));
        let disk = ImageDisk::writable(small, OWNER, image(8 << 12), u64::MAX);
        assert_eq!(disk.write(0, &[1; 8192]), Err(DiskError::NoSpace));
        assert_eq!(bytes(&disk, 0, 4096), [1; 4096], "as far as it went");
    }

    fn agree(got: &[u8], want: &[Option<u8>]) -> bool {
        let mut pairs = got.iter().zip(want);
        pairs.all(|(got, want)| want.is_none_or(|want| want == *got))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Reads, writes, zeroes and discards anywhere agree with an array.
        #[test]
        fn a_disk_is_like_an_array(
            steps in prop::collection::vec((0u8..4, 0u64..24_000, 0usize..9000, any::<u8>()), 1..60),
        ) {
            let image = image(20_000);
            let disk = ImageDisk::writable(host(), OWNER, image, 1 << 20);
            let size = 20_480;
            // `None`: discarded, may be anything.
            let mut model: Vec<Option<u8>> = image.iter().map(|b| Some(*b)).collect();
            model.resize(size, Some(0));
            for (kind, offset, len, value) in steps {
                let inside = offset as usize + len <= size;
                let range = offset as usize..offset as usize + len;
                let mut read = vec![0; len];
                let result = match kind {
                    0 => disk.write(offset, &vec![value; len]),
                    1 => disk.write_zeroes(offset, len as u64),
                    2 => disk.discard(offset, len as u64),
                    _ => disk.read(offset, &mut read),
                };
                prop_assert_eq!(result.is_ok(), inside);
                if inside {
                    match kind {
                        0 => model[range].fill(Some(value)),
                        1 => model[range].fill(Some(0)),
                        2 => model[range].fill(None),
                        _ => prop_assert!(agree(&read, &model[range])),
                    }
                }
            }
            prop_assert!(agree(&bytes(&disk, 0, size), &model));
        }
    }
}
