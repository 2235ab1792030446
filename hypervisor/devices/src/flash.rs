//! Parallel NOR flash with Intel's command set: where firmware keeps its variables.
//!
//! An eight-bit part (JEDEC JEP137, Common Flash Interface, command set 0001). While it is in read-array mode the guest
//! reads and runs its content as memory, and only writes come here; the first command takes the content
//! out of the guest's sight until the next read-array command. A program operation only clears bits and an erase sets
//! those of one block; both are done when the write returns.
//!
//! As firmware expects of virtual flash, clearing the status register also clears its ready bit,
//! and goes back to read-array mode.
//!
//! The content belongs to a [`FlashArray`], which keeps it longer than the device lives.

use alloc::sync::Arc;

use bitflags::bitflags;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, MmioDevice};

/// Bytes of an erase block.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of the write buffer.
const BUFFER_BYTES: usize = 32;
/// What an erased byte reads as.
const ERASED: u8 = 0xff;

/// The cells of a flash part.
pub trait FlashArray: Send + Sync {
    /// Copies bytes out.
    fn read(&self, offset: u64, to: &mut [u8]);
    /// Copies bytes in, also to where they are kept for the next start.
    fn write(&self, offset: u64, from: &[u8]);
    /// Whether the guest reads the cells as memory from now on; else its reads come to the device.
    fn set_visible(&self, visible: bool);
}

bitflags! {
    /// The status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Status: u8 {
        const READY = 1 << 7;
        const ERASE_FAILED = 1 << 5;
        const PROGRAM_FAILED = 1 << 4;
    }
}

impl Status {
    /// Both failures at once: the command sequence was wrong.
    const BAD_SEQUENCE: Status = Status::ERASE_FAILED.union(Status::PROGRAM_FAILED);
}

/// What reads give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Array,
    Status,
    Identifier,
    Query,
}

/// What the next write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Command,
    /// The byte to program.
    Program,
    /// The confirmation of an erase.
    EraseConfirm,
    /// The second half of a lock command: blocks have no locks, so it does nothing.
    Lock,
    /// The number of buffered bytes, less one.
    Count,
    /// So many more buffered bytes.
    Buffer(u8),
    /// The confirmation of a buffered program.
    BufferConfirm,
}

/// First bytes of commands.
mod command {
    pub(super) const PROGRAM: u8 = 0x10;
    pub(super) const PROGRAM_ALTERNATE: u8 = 0x40;
    pub(super) const ERASE: u8 = 0x20;
    pub(super) const CLEAR_STATUS: u8 = 0x50;
    pub(super) const LOCK: u8 = 0x60;
    pub(super) const READ_STATUS: u8 = 0x70;
    pub(super) const READ_IDENTIFIER: u8 = 0x90;
    pub(super) const QUERY: u8 = 0x98;
    pub(super) const WRITE_BUFFER: u8 = 0xe8;
    pub(super) const CONFIRM: u8 = 0xd0;
    pub(super) const READ_ARRAY: u8 = 0xff;
}

/// Identifier codes: manufacturer Intel, a part of this family.
const IDENTIFIER: [u8; 2] = [0x89, 0x18];
/// Where the query answer begins.
const QUERY_START: u64 = 0x10;

struct State {
    view: View,
    expect: Expect,
    status: Status,
    /// Where the buffer will be programmed, a multiple of its size.
    buffer_at: Option<u64>,
    buffer: [u8; BUFFER_BYTES],
}

/// The part.
pub struct Flash {
    state: Mutex<State>,
    array: Arc<dyn FlashArray>,
    /// A multiple of [`BLOCK_BYTES`].
    bytes: u64,
    query: [u8; 0x21],
}

/// The answer to a query, from [`QUERY_START`] on (JEP137; geometry for `bytes` of flash).
fn query(bytes: u64) -> [u8; 0x21] {
    let mut answer = [0; 0x21];
    answer[..3].copy_from_slice(b"QRY");
    // Command set 0001, no extended table.
    answer[3] = 1;
    // 2.7 to 3.6 V; typical and most times of program, buffer program and erase: 2^n of their units.
    answer[0x0b..0x0d].copy_from_slice(&[0x27, 0x36]);
    answer[0x0f..0x17].copy_from_slice(&[7, 7, 10, 0, 4, 4, 4, 0]);
    // Size, as the next power of two; an eight-bit part; buffer size.
    answer[0x17] = bytes.next_power_of_two().trailing_zeros() as u8;
    answer[0x1a] = BUFFER_BYTES.trailing_zeros() as u8;
    // One region: number of blocks less one, and block size in units of 256 bytes.
    answer[0x1c] = 1;
    let blocks = (bytes / BLOCK_BYTES).saturating_sub(1) as u16;
    answer[0x1d..0x1f].copy_from_slice(&blocks.to_le_bytes());
    answer[0x1f..].copy_from_slice(&((BLOCK_BYTES / 256) as u16).to_le_bytes());
    answer
}

impl Flash {
    /// A part of `bytes` bytes, a multiple of [`BLOCK_BYTES`], in read-array mode; `array` is visible.
    pub fn new(array: Arc<dyn FlashArray>, bytes: u64) -> Arc<Self> {
        Arc::new(Flash {
            state: Mutex::new(State {
                view: View::Array,
                expect: Expect::Command,
                status: Status::READY,
                buffer_at: None,
                buffer: [ERASED; BUFFER_BYTES],
            }),
            array,
            bytes,
            query: query(bytes),
        })
    }

    /// Changes what reads give, and whether they come here.
    fn show(&self, state: &mut State, view: View) {
        if (state.view == View::Array) != (view == View::Array) {
            self.array.set_visible(view == View::Array);
        }
        state.view = view;
    }

    fn command(&self, state: &mut State, byte: u8) {
        let (view, expect) = match byte {
            command::PROGRAM | command::PROGRAM_ALTERNATE => (View::Status, Expect::Program),
            command::ERASE => (View::Status, Expect::EraseConfirm),
            command::LOCK => (View::Status, Expect::Lock),
            command::WRITE_BUFFER => {
                state.status |= Status::READY;
                (View::Status, Expect::Count)
            }
            command::READ_STATUS => (View::Status, Expect::Command),
            command::READ_IDENTIFIER => (View::Identifier, Expect::Command),
            command::QUERY => (View::Query, Expect::Command),
            command::CLEAR_STATUS => {
                state.status = Status::empty();
                (View::Array, Expect::Command)
            }
            command::READ_ARRAY => (View::Array, Expect::Command),
            // Unknown commands do as read array.
            _ => (View::Array, Expect::Command),
        };
        state.expect = expect;
        self.show(state, view);
    }

    /// Programs bytes: bits only go from one to zero.
    fn program(&self, at: u64, bytes: &[u8]) {
        let mut cells = [0; BUFFER_BYTES];
        let Some(cells) = cells.get_mut(..bytes.len()) else {
            return;
        };
        self.array.read(at, cells);
        for (cell, byte) in cells.iter_mut().zip(bytes) {
            *cell &= byte;
        }
        self.array.write(at, cells);
    }

    fn erase(&self, at: u64) {
        const BLANK: [u8; BLOCK_BYTES as usize] = [ERASED; BLOCK_BYTES as usize];
        self.array.write(at & !(BLOCK_BYTES - 1), &BLANK);
    }

    fn write_byte(&self, at: u64, byte: u8) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.expect = match state.expect {
            Expect::Command => return self.command(state, byte),
            Expect::Program => {
                self.program(at, &[byte]);
                state.status |= Status::READY;
                Expect::Command
            }
            Expect::EraseConfirm => {
                state.status |= Status::READY;
                if byte == command::CONFIRM {
                    self.erase(at);
                } else {
                    state.status |= Status::BAD_SEQUENCE;
                }
                Expect::Command
            }
            Expect::Lock => {
                state.status |= Status::READY;
                Expect::Command
            }
            Expect::Count if usize::from(byte) < BUFFER_BYTES => {
                state.buffer_at = None;
                state.buffer = [ERASED; BUFFER_BYTES];
                Expect::Buffer(byte + 1)
            }
            Expect::Count => {
                state.status |= Status::BAD_SEQUENCE;
                Expect::Command
            }
            Expect::Buffer(left) => {
                let page = at & !(BUFFER_BYTES as u64 - 1);
                if *state.buffer_at.get_or_insert(page) == page {
                    state.buffer[at as usize % BUFFER_BYTES] = byte;
                    match left {
                        0 | 1 => Expect::BufferConfirm,
                        left => Expect::Buffer(left - 1),
                    }
                } else {
                    state.status |= Status::BAD_SEQUENCE;
                    Expect::Command
                }
            }
            Expect::BufferConfirm => {
                state.status |= Status::READY;
                match state.buffer_at {
                    Some(page) if byte == command::CONFIRM => self.program(page, &state.buffer),
                    _ => state.status |= Status::BAD_SEQUENCE,
                }
                Expect::Command
            }
        };
    }

    fn read_byte(&self, at: u64) -> u8 {
        let state = self.state.lock();
        match state.view {
            View::Array => {
                let mut byte = [ERASED];
                self.array.read(at, &mut byte);
                byte[0]
            }
            View::Status => state.status.bits(),
            View::Identifier => IDENTIFIER.get((at & 0xff) as usize).copied().unwrap_or(0),
            View::Query => (at & 0xff)
                .checked_sub(QUERY_START)
                .and_then(|index| self.query.get(index as usize))
                .copied()
                .unwrap_or(0),
        }
    }
}

impl MmioDevice for Flash {
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let last = offset + (width.bytes() as u64 - 1);
        if last >= self.bytes {
            return Err(IoError::InvalidRegister);
        }
        // A wide access is one of each byte in turn.
        Ok((offset..=last)
            .rev()
            .fold(0, |value, at| value << 8 | u64::from(self.read_byte(at))))
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let last = offset + (width.bytes() as u64 - 1);
        if last >= self.bytes {
            return Err(IoError::InvalidRegister);
        }
        for (at, byte) in (offset..=last).zip(value.to_le_bytes()) {
            self.write_byte(at, byte);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    const BYTES: u64 = 4 * BLOCK_BYTES;

    struct Cells(Mutex<(Vec<u8>, bool)>);

    impl FlashArray for Cells {
        fn read(&self, offset: u64, to: &mut [u8]) {
            let at = offset as usize;
            to.copy_from_slice(&self.0.lock().0[at..at + to.len()]);
        }
        fn write(&self, offset: u64, from: &[u8]) {
            let at = offset as usize;
            self.0.lock().0[at..at + from.len()].copy_from_slice(from);
        }
        fn set_visible(&self, visible: bool) {
            let was = core::mem::replace(&mut self.0.lock().1, visible);
            assert_ne!(was, visible, "told of changes only");
        }
    }

    fn flash() -> (Arc<Cells>, Arc<Flash>) {
        let cells = Arc::new(Cells(Mutex::new((vec![0xa5; BYTES as usize], true))));
        (cells.clone(), Flash::new(cells, BYTES))
    }

    fn put(flash: &Flash, at: u64, bytes: &[u8]) {
        for &byte in bytes {
            flash.write(at, Width::Byte, u64::from(byte)).unwrap();
        }
    }

    /// How OVMF finds out that this is flash and not RAM or ROM.
    #[test]
    fn firmware_recognises_it() {
        let (cells, flash) = flash();
        put(&flash, 0, &[0x50]);
        assert!(cells.0.lock().1, "in read-array mode");
        assert_eq!(flash.read(0, Width::Byte), Ok(0xa5));
        put(&flash, 0, &[0x70]);
        assert!(!cells.0.lock().1);
        assert_eq!(flash.read(0, Width::Byte), Ok(0));
        put(&flash, 0, &[0xff]);
        assert!(cells.0.lock().1);
    }

    #[test]
    fn program_clears_bits_and_erase_sets_them() {
        let (cells, flash) = flash();
        put(&flash, 0x1005, &[0x10, 0x0f]);
        assert_eq!(flash.read(0x1000, Width::Byte), Ok(0x80), "ready");
        put(&flash, 0x1005, &[0xff]);
        assert_eq!(flash.read(0x1004, Width::Dword), Ok(0xa5a5_05a5));
        put(&flash, 0x1005, &[0x20, 0xd0, 0x70]);
        assert_eq!(flash.read(0x1000, Width::Word), Ok(0x8080));
        put(&flash, 0, &[0xff]);
        let cells = &cells.0.lock().0;
        assert!(cells[0x1000..0x2000].iter().all(|&b| b == 0xff));
        assert!(
            cells[..0x1000]
                .iter()
                .chain(&cells[0x2000..])
                .all(|&b| b == 0xa5)
        );
    }

    #[test]
    fn buffered_program() {
        let (cells, flash) = flash();
        put(&flash, 0x2000, &[0x20, 0xd0]);
        put(&flash, 0x2004, &[0xe8]);
        assert_eq!(flash.read(0x2004, Width::Byte), Ok(0x80));
        put(&flash, 0x2004, &[3]);
        flash.write(0x2004, Width::Dword, 0x0403_0201).unwrap();
        put(&flash, 0x2004, &[0xd0, 0xff]);
        let read = flash.read(0x2003, Width::Qword).unwrap();
        assert_eq!(read.to_le_bytes(), [0xff, 1, 2, 3, 4, 0xff, 0xff, 0xff]);
        // Bytes that leave the buffer's page, too many of them, or no confirmation: nothing changes.
        let before = cells.0.lock().0.clone();
        put(&flash, 0x2000, &[0xe8, 1, 0]);
        put(&flash, 0x2020, &[0]);
        assert_eq!(flash.read(0, Width::Byte), Ok(0xb0));
        put(&flash, 0x2000, &[0x50, 0xe8, 32]);
        put(&flash, 0x2000, &[0x50, 0xe8, 0, 0, 0x00]);
        assert_eq!(flash.read(0, Width::Byte), Ok(0xb0));
        put(&flash, 0x2000, &[0x50, 0x20, 0x00]);
        assert_eq!(flash.read(0, Width::Byte), Ok(0xb0));
        assert_eq!(cells.0.lock().0, before);
    }

    #[test]
    fn identifier_and_query() {
        let (_, flash) = flash();
        put(&flash, 0x55, &[0x90]);
        assert_eq!(flash.read(0, Width::Word), Ok(0x1889));
        put(&flash, 0x55, &[0x98]);
        let answer: Vec<u8> = (0x10..0x31)
            .map(|at| flash.read(at, Width::Byte).unwrap() as u8)
            .collect();
        assert_eq!(&answer[..5], b"QRY\x01\0");
        assert_eq!(1u64 << answer[0x17], BYTES, "device size");
        assert_eq!(answer[0x1c..], [1, 3, 0, 16, 0], "4 blocks of 4 KiB");
        assert_eq!(
            flash.read(BYTES - 1, Width::Word),
            Err(IoError::InvalidRegister)
        );
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic_and_the_view_is_told(
            steps in proptest::collection::vec((any::<bool>(), 0..BYTES + 8, 0usize..4, any::<u64>()), 0..300),
        ) {
            let (cells, flash) = flash();
            let commands = [0x10, 0x20, 0x50, 0x60, 0x70, 0x90, 0x98, 0xe8, 0xd0, 0xff];
            for (write, at, width, value) in steps {
                let width = [Width::Byte, Width::Word, Width::Dword, Width::Qword][width];
                if write {
                    let value = commands.get(value as usize % 16).copied().unwrap_or(value);
                    let _ = flash.write(at, width, value);
                } else {
                    let _ = flash.read(at, width);
                }
                prop_assert_eq!(cells.0.lock().1, flash.state.lock().view == View::Array);
            }
        }
    }
}
