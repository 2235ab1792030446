//! `ramfb`: a frame buffer in the guest's own memory, set up by one write to `fw_cfg`.
//!
//! Firmware without a driver for a display writes 28 bytes, big-endian, to the file `etc/ramfb`:
//! address, pixel format, flags, width, height and stride (QEMU, hw/display/ramfb.c). From then on whoever shows
//! the screen copies the pixels from there ([`Ramfb::frame_buffer`]); the guest draws without exits.
//!
//! Invariant: a [`FrameBuffer`] was checked as a whole when it was written, and RAM does not go away, so each
//! of its rows can be read. A write that does not describe one changes nothing.

use alloc::sync::Arc;

use mem::{Gpa, GuestMemory};
use spin::Mutex;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::fw_cfg::{FileError, FwCfgItems, WriteListener};

/// The file that the guest writes.
const FILE: &str = "etc/ramfb";
/// Most pixels in a row, and most rows.
pub const MAX_SIDE: u32 = 8192;
/// Most bytes of a frame buffer.
const MAX_BYTES: u64 = 64 << 20;
/// Bytes of a pixel.
const PIXEL_BYTES: u32 = 4;
/// Formats by their DRM codes: 8 bits each of blue, green, red from the lowest, and 8 that say nothing here.
const FORMATS: [[u8; 4]; 2] = [*b"XR24", *b"AR24"];

/// What the guest writes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Request {
    address: U64,
    format: U32,
    flags: U32,
    width: U32,
    height: U32,
    stride: U32,
}

const _: () = assert!(size_of::<Request>() == 28);

/// A frame buffer, all of it in the guest's RAM. Pixels are 0x..RRGGBB, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameBuffer {
    start: Gpa,
    /// Pixels per row, 1 to [`MAX_SIDE`].
    pub width: usize,
    /// Rows, 1 to [`MAX_SIDE`].
    pub height: usize,
    stride: u32,
}

impl FrameBuffer {
    fn new(request: &Request, memory: &GuestMemory) -> Option<Self> {
        let (width, height) = (request.width.get(), request.height.get());
        let sides = 1..=MAX_SIDE;
        let known = FORMATS
            .map(u32::from_le_bytes)
            .contains(&request.format.get());
        if !known || !sides.contains(&width) || !sides.contains(&height) {
            return None;
        }
        let row = width * PIXEL_BYTES;
        let stride = match request.stride.get() {
            0 => row,
            stride => stride,
        };
        let bytes = u64::from(stride) * u64::from(height - 1) + u64::from(row);
        let start = Gpa(request.address.get());
        if stride < row || bytes > MAX_BYTES || !memory.contains(start, bytes) {
            return None;
        }
        Some(FrameBuffer {
            start,
            width: width as usize,
            height: height as usize,
            stride,
        })
    }
}

/// The device.
pub struct Ramfb {
    memory: Arc<GuestMemory>,
    current: Mutex<Option<FrameBuffer>>,
}

impl Ramfb {
    /// A device that shows nothing yet. The frame buffer will be in `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Arc<Self> {
        Arc::new(Ramfb {
            memory,
            current: Mutex::new(None),
        })
    }

    /// Adds the file by which the guest sets it up.
    ///
    /// # Errors
    /// As [`FwCfgItems::add_writable_file`].
    pub fn offer(self: &Arc<Self>, items: &mut FwCfgItems) -> Result<(), FileError> {
        items.add_writable_file(FILE, alloc::vec![0; size_of::<Request>()], self.clone())
    }

    /// What the guest draws on, once it has said so.
    pub fn frame_buffer(&self) -> Option<FrameBuffer> {
        *self.current.lock()
    }

    /// Copies pixels of one row, from the first on; `to` has whole pixels, at most a row's. Whether they could be had.
    pub fn read_row(&self, buffer: &FrameBuffer, row: usize, to: &mut [u8]) -> bool {
        row < buffer.height
            && to.len() <= buffer.width * PIXEL_BYTES as usize
            && self
                .memory
                .read(buffer.start + row as u64 * u64::from(buffer.stride), to)
                .is_ok()
    }
}

impl WriteListener for Ramfb {
    fn written(&self, content: &[u8]) {
        let buffer = Request::read_from_bytes(content)
            .ok()
            .and_then(|request| FrameBuffer::new(&request, &self.memory));
        if buffer.is_some() {
            *self.current.lock() = buffer;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use mem::fake::FakeMemory;
    use mem::guest::pc_layout;
    use proptest::prelude::*;

    const RAM: u64 = 1 << 20;

    fn ramfb() -> Arc<Ramfb> {
        let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(2 << 20)));
        let memory = GuestMemory::allocate(host, 1, &pc_layout(RAM)).unwrap();
        Ramfb::new(Arc::new(memory))
    }

    fn request(address: u64, format: &[u8; 4], width: u32, height: u32, stride: u32) -> Vec<u8> {
        let mut bytes = address.to_be_bytes().to_vec();
        for word in [u32::from_le_bytes(*format), 0, width, height, stride] {
            bytes.extend_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn rows_are_read_where_the_guest_said() {
        let ramfb = ramfb();
        assert_eq!(ramfb.frame_buffer(), None);
        ramfb.written(&request(0x1000, b"XR24", 4, 3, 32));
        let buffer = ramfb.frame_buffer().expect("a frame buffer");
        assert_eq!((buffer.width, buffer.height), (4, 3));
        let pixel = [0x11, 0x22, 0x33, 0];
        ramfb
            .memory
            .write(Gpa(0x1000 + 2 * 32 + 4), &pixel)
            .unwrap();
        let mut row = [0xff; 16];
        assert!(ramfb.read_row(&buffer, 2, &mut row));
        assert_eq!(row[4..8], pixel);
        assert!(!ramfb.read_row(&buffer, 3, &mut row));
        assert!(!ramfb.read_row(&buffer, 0, &mut [0; 20]));
    }

    #[test]
    fn the_last_byte_must_be_ram() {
        let ramfb = ramfb();
        let rows = |height| ramfb.written(&request(RAM - 64, b"AR24", 4, height, 0));
        rows(5);
        assert_eq!(ramfb.frame_buffer(), None);
        rows(4);
        assert_eq!(ramfb.frame_buffer().map(|b| b.height), Some(4));
        rows(5);
        assert_eq!(ramfb.frame_buffer().map(|b| b.height), Some(4), "kept");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            request(0, b"RG16", 4, 4, 16),
            request(0, b"XR24", 0, 4, 16),
            request(0, b"XR24", 4, 0, 16),
            request(0, b"XR24", 4, 4, 15),
            request(0, b"XR24", MAX_SIDE + 1, 1, 0),
            request(0, b"XR24", MAX_SIDE, MAX_SIDE, u32::MAX),
            request(u64::MAX, b"XR24", 4, 4, 16),
            request(0, b"XR24", 4, 4, 16)[..27].to_vec(),
        ] {
            let ramfb = ramfb();
            ramfb.written(&bad);
            assert_eq!(ramfb.frame_buffer(), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_can_be_read(
            address in prop_oneof![0..2 * RAM, any::<u64>()],
            width in 0..1000u32, height in 0..1000u32,
            stride in prop_oneof![0..4000u32, any::<u32>()],
        ) {
            let ramfb = ramfb();
            ramfb.written(&request(address, b"XR24", width, height, stride));
            if let Some(buffer) = ramfb.frame_buffer() {
                for row in [0, buffer.height - 1] {
                    let mut pixels = vec![0; buffer.width * 4];
                    prop_assert!(ramfb.read_row(&buffer, row, &mut pixels));
                }
            }
        }
    }
}
