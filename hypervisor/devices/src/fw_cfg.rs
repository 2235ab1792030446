//! `fw_cfg`: the configuration device by which QEMU tells firmware and test kernels of the machine.
//!
//! Purpose: numbered items of bytes (memory size, processor count, kernel, command line) and
//! named files, read through a selector and a data port or by DMA. After QEMU's
//! docs/specs/fw_cfg.rst. Items are collected in [`FwCfgItems`] while a VM is made; the
//! [`FwCfg`] device then only hands them out, and tells a [`WriteListener`] of files that the
//! guest may write.
//!
//! Invariants: DMA addresses are the guest's and are checked before a byte moves; one command
//! moves no more than an item's bytes, and zeroes no more than [`MAX_ZEROED`] beyond them, so an
//! exit is bounded.

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use bitfield_struct::bitfield;
use mem::{Gpa, GuestMemory, Width};
use spin::Mutex;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::bus::{IoError, PortDevice};

/// First port of the device on a PC.
pub const FW_CFG_PORT: u16 = 0x510;
/// Ports of the device.
pub const FW_CFG_PORTS: u16 = 12;
/// Most files.
pub const MAX_FILES: usize = 64;
/// Longest name of a file, in bytes.
pub const MAX_FILE_NAME: usize = 55;
/// Most bytes of a file that the guest may write.
pub const MAX_WRITABLE: usize = 4096;
/// Most bytes that a DMA read beyond an item's end zeroes.
pub const MAX_ZEROED: u32 = 1 << 20;

/// Offset of the selector, two bytes, written.
const SELECTOR: u16 = 0;
/// Offset of the data port, one byte, read.
const DATA: u16 = 1;
/// Offset of the DMA address' upper half, big-endian.
const DMA_HIGH: u16 = 4;
/// Offset of the DMA address' lower half, big-endian; writing it starts the command.
const DMA_LOW: u16 = 8;

/// What the DMA register reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// First key of the files.
const FILE_FIRST: u16 = 0x20;
/// Key bit that asked for writing through the data port; it selects nothing.
const WRITE_CHANNEL: u16 = 0x4000;

/// Numbers of the items that are no files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Key {
    /// "QEMU".
    Signature = 0x00,
    /// Interfaces, a bit each: 0 ports, 1 DMA. Four bytes.
    Id = 0x01,
    /// The machine's UUID, 16 bytes.
    Uuid = 0x02,
    /// RAM in bytes, eight bytes.
    RamSize = 0x03,
    /// Whether there is no screen, two bytes.
    NoGraphic = 0x04,
    /// Processors that run, two bytes.
    CpuCount = 0x05,
    /// Where the kernel is to be loaded, four bytes.
    KernelAddress = 0x07,
    /// Bytes of the kernel, four bytes.
    KernelSize = 0x08,
    /// Where the initrd is to be loaded, four bytes.
    InitrdAddress = 0x0a,
    /// Bytes of the initrd, four bytes.
    InitrdSize = 0x0b,
    /// Letter of the device to boot from, two bytes.
    BootDevice = 0x0c,
    /// NUMA nodes and what belongs to them, eight bytes each.
    Numa = 0x0d,
    /// Whether to show the boot menu, two bytes.
    BootMenu = 0x0e,
    /// One more than the highest APIC ID that there may be, two bytes.
    MaxCpus = 0x0f,
    /// Where a kernel is entered, four bytes.
    KernelEntry = 0x10,
    /// The kernel without its setup part.
    KernelData = 0x11,
    /// The initrd.
    InitrdData = 0x12,
    /// Where the command line is to be put, four bytes.
    CommandLineAddress = 0x13,
    /// Bytes of the command line with its zero, four bytes.
    CommandLineSize = 0x14,
    /// The command line with its zero.
    CommandLineData = 0x15,
    /// Where a Linux kernel's setup part is to be put, four bytes.
    SetupAddress = 0x16,
    /// Bytes of a Linux kernel's setup part, four bytes.
    SetupSize = 0x17,
    /// A Linux kernel's setup part.
    SetupData = 0x18,
    /// The list of files.
    FileDirectory = 0x19,
    /// Whether IRQ 0 is wired to pin 2 of the I/O APIC, one byte.
    Irq0Override = 0x8002,
    /// Where HPETs are.
    Hpet = 0x8004,
}

/// Is told when the guest has written a file.
pub trait WriteListener: Send + Sync {
    /// The file's content now. Called from a vCPU's exit, without the device's lock.
    fn written(&self, content: &[u8]);
}

/// Why a file cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileError {
    /// The name is empty, too long or not plain ASCII.
    Name,
    /// There is a file of that name.
    Exists,
    /// There are [`MAX_FILES`] files, or the content exceeds what its kind may have.
    TooMany,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileError::Name => "not a name for a fw_cfg file",
            FileError::Exists => "a fw_cfg file of that name is there already",
            FileError::TooMany => "too many fw_cfg files, or too large a one",
        })
    }
}

impl core::error::Error for FileError {}

struct File {
    name: String,
    item: Item,
}

struct Item {
    content: Cow<'static, [u8]>,
    /// There is one if the guest may write.
    listener: Option<Arc<dyn WriteListener>>,
}

impl Item {
    fn constant(content: impl Into<Cow<'static, [u8]>>) -> Self {
        Item {
            content: content.into(),
            listener: None,
        }
    }
}

/// What a device will hand out.
pub struct FwCfgItems {
    items: Vec<(u16, Item)>,
    files: Vec<File>,
}

impl FwCfgItems {
    /// The items that say what the device is.
    pub fn new() -> Self {
        const PORTS_AND_DMA: u32 = 0b11;
        let mut new = FwCfgItems {
            items: Vec::new(),
            files: Vec::new(),
        };
        new.set(Key::Signature, b"QEMU".as_slice());
        new.set(Key::Id, PORTS_AND_DMA.to_le_bytes().to_vec());
        new
    }

    /// Gives an item its bytes; numbers are little-endian. An earlier content is replaced.
    pub fn set(&mut self, key: Key, content: impl Into<Cow<'static, [u8]>>) {
        let key = key as u16;
        self.items.retain(|(other, _)| *other != key);
        self.items.push((key, Item::constant(content)));
    }

    /// Adds a file that the guest reads.
    ///
    /// # Errors
    /// The name cannot be, or there are too many.
    pub fn add_file(
        &mut self,
        name: &str,
        content: impl Into<Cow<'static, [u8]>>,
    ) -> Result<(), FileError> {
        self.add(name, Item::constant(content))
    }

    /// Adds a file that the guest may also write; `listener` is told of each write.
    ///
    /// # Errors
    /// The name cannot be, there are too many, or the content is longer than [`MAX_WRITABLE`].
    pub fn add_writable_file(
        &mut self,
        name: &str,
        content: Vec<u8>,
        listener: Arc<dyn WriteListener>,
    ) -> Result<(), FileError> {
        if content.len() > MAX_WRITABLE {
            return Err(FileError::TooMany);
        }
        let item = Item {
            content: content.into(),
            listener: Some(listener),
        };
        self.add(name, item)
    }

    fn add(&mut self, name: &str, item: Item) -> Result<(), FileError> {
        let plain = name.bytes().all(|b| b.is_ascii_graphic());
        if name.is_empty() || name.len() > MAX_FILE_NAME || !plain {
            return Err(FileError::Name);
        }
        if self.files.iter().any(|file| file.name == name) {
            return Err(FileError::Exists);
        }
        if self.files.len() >= MAX_FILES {
            return Err(FileError::TooMany);
        }
        self.files.push(File {
            name: name.into(),
            item,
        });
        Ok(())
    }

    /// All items by ascending key: files follow the order of their names, and the directory lists them.
    fn finish(mut self) -> Vec<(u16, Item)> {
        self.files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, file) in (FILE_FIRST..).zip(self.files) {
            let mut name = [0; MAX_FILE_NAME + 1];
            name[..file.name.len()].copy_from_slice(file.name.as_bytes());
            let entry = DirectoryEntry {
                size: (file.item.content.len() as u32).into(),
                select: key.into(),
                reserved: 0.into(),
                name,
            };
            directory.extend_from_slice(entry.as_bytes());
            self.items.push((key, file.item));
        }
        let directory = Item::constant(directory);
        self.items.push((Key::FileDirectory as u16, directory));
        self.items.sort_by_key(|(key, _)| *key);
        self.items
    }
}

impl Default for FwCfgItems {
    fn default() -> Self {
        Self::new()
    }
}

/// One file in the directory.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct DirectoryEntry {
    size: U32,
    select: U16,
    reserved: U16,
    name: [u8; MAX_FILE_NAME + 1],
}

/// A DMA command in guest memory. The device clears `control` but for the error bit when it is done.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Command {
    control: U32,
    length: U32,
    address: U64,
}

const _: () = assert!(size_of::<DirectoryEntry>() == 64);
const _: () = assert!(size_of::<Command>() == 16);

/// What a DMA command asks for, first of its bits first.
#[bitfield(u32)]
struct Control {
    error: bool,
    read: bool,
    skip: bool,
    select: bool,
    write: bool,
    #[bits(11)]
    __: u16,
    key: u16,
}

struct State {
    items: Vec<(u16, Item)>,
    /// Index of the selected item, if there is such an item.
    selected: Option<usize>,
    offset: usize,
    dma_high: u32,
}

/// What is to be told once the lock is free.
type Told = Option<(Arc<dyn WriteListener>, Vec<u8>)>;

impl State {
    fn select(&mut self, key: u16) {
        let key = key & !WRITE_CHANNEL;
        self.selected = self.items.binary_search_by_key(&key, |(k, _)| *k).ok();
        self.offset = 0;
    }

    /// What is left of the selected item.
    fn rest(&self) -> &[u8] {
        self.selected
            .and_then(|index| self.items.get(index))
            .and_then(|(_, item)| item.content.get(self.offset..))
            .unwrap_or_default()
    }

    fn next_byte(&mut self) -> u8 {
        let Some(&byte) = self.rest().first() else {
            return 0;
        };
        self.offset += 1;
        byte
    }

    /// Carries out a DMA command. `Err`: its error bit is to be set.
    fn carry_out(&mut self, memory: &GuestMemory, command: &Command) -> Result<Told, ()> {
        let control = Control::from_bits(command.control.get());
        if control.select() {
            self.select(control.key());
        }
        let (address, length) = (Gpa(command.address.get()), command.length.get());
        let available = self.rest().len().min(length as usize);
        let mut told = None;
        if control.read() {
            let beyond = length - available as u32;
            if beyond > MAX_ZEROED || !memory.is_writable(address, u64::from(length)) {
                return Err(());
            }
            memory
                .write(address, &self.rest()[..available])
                .map_err(|_| ())?;
            zero(memory, address + available as u64, beyond).map_err(|_| ())?;
        } else if control.write() {
            told = self.overwrite(memory, address, length as usize)?;
        } else if !control.skip() {
            return Ok(None);
        }
        self.offset += available;
        Ok(told)
    }

    /// Takes bytes for the selected item from guest memory: all of them, or none.
    fn overwrite(&mut self, memory: &GuestMemory, from: Gpa, length: usize) -> Result<Told, ()> {
        let offset = self.offset;
        let (_, item) = self
            .selected
            .and_then(|index| self.items.get_mut(index))
            .ok_or(())?;
        let listener = item.listener.clone().ok_or(())?;
        let end = offset.checked_add(length).ok_or(())?;
        let place = item.content.to_mut().get_mut(offset..end).ok_or(())?;
        memory.read(from, place).map_err(|_| ())?;
        Ok(Some((listener, item.content.to_vec())))
    }
}

fn zero(memory: &GuestMemory, mut at: Gpa, bytes: u32) -> Result<(), mem::NotRam> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut left = bytes as usize;
    while left > 0 {
        let piece = left.min(ZEROES.len());
        memory.write(at, &ZEROES[..piece])?;
        at = at + piece as u64;
        left -= piece;
    }
    Ok(())
}

/// The device, twelve ports from [`FW_CFG_PORT`].
pub struct FwCfg {
    state: Mutex<State>,
    memory: Arc<GuestMemory>,
}

impl FwCfg {
    /// A device that hands out these items and reaches the guest's memory for DMA.
    pub fn new(items: FwCfgItems, memory: Arc<GuestMemory>) -> Arc<Self> {
        let mut state = State {
            items: items.finish(),
            selected: None,
            offset: 0,
            dma_high: 0,
        };
        state.select(Key::Signature as u16);
        Arc::new(FwCfg {
            state: Mutex::new(state),
            memory,
        })
    }

    /// Carries out the DMA command at `at`, and notes there how it went.
    fn dma(&self, at: Gpa) {
        let mut command = Command::new_zeroed();
        if self.memory.read(at, command.as_mut_bytes()).is_err() {
            return;
        }
        let done = self.state.lock().carry_out(&self.memory, &command);
        let control = Control::new().with_error(done.is_err());
        let control = U32::new(control.into_bits());
        // The command was read from there, and RAM does not go away.
        let _still_there = self.memory.write(at, control.as_bytes());
        if let Ok(Some((listener, content))) = done {
            listener.written(&content);
        }
    }
}

impl PortDevice for FwCfg {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        match (offset, width) {
            (SELECTOR | DATA, Width::Byte) => Ok(u32::from(self.state.lock().next_byte())),
            (DMA_HIGH..FW_CFG_PORTS, Width::Byte) => {
                let signature = DMA_SIGNATURE.get(usize::from(offset - DMA_HIGH));
                signature.map_or(Err(IoError::InvalidRegister), |&b| Ok(u32::from(b)))
            }
            (SELECTOR | DATA | DMA_HIGH..FW_CFG_PORTS, _) => Err(IoError::InvalidWidth),
            _ => Err(IoError::InvalidRegister),
        }
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        match (offset, width) {
            (SELECTOR, Width::Word) => self.state.lock().select(value as u16),
            (DMA_HIGH, Width::Dword) => self.state.lock().dma_high = value.swap_bytes(),
            (DMA_LOW, Width::Dword) => {
                let high = core::mem::take(&mut self.state.lock().dma_high);
                self.dma(Gpa(u64::from(high) << 32 | u64::from(value.swap_bytes())));
            }
            // Writing items through the data port is history.
            (SELECTOR | DATA, Width::Byte) => {}
            _ => return Err(IoError::InvalidRegister),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::fake::FakeMemory;
    use mem::guest::pc_layout;
    use proptest::prelude::*;

    const RAM: u64 = 64 << 10;

    #[derive(Default)]
    struct Heard(Mutex<Vec<Vec<u8>>>);

    impl WriteListener for Heard {
        fn written(&self, content: &[u8]) {
            self.0.lock().push(content.to_vec());
        }
    }

    struct Rig {
        device: Arc<FwCfg>,
        memory: Arc<GuestMemory>,
        heard: Arc<Heard>,
    }

    fn rig() -> Rig {
        let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(1 << 20)));
        let memory = Arc::new(GuestMemory::allocate(host, 1, &pc_layout(RAM)).unwrap());
        let heard = Arc::new(Heard::default());
        let mut items = FwCfgItems::new();
        items.set(Key::CpuCount, 3u16.to_le_bytes().to_vec());
        items.add_file("opt/b", b"bee".as_slice()).unwrap();
        items.add_file("etc/a", vec![7; 5000]).unwrap();
        items
            .add_writable_file("etc/w", vec![0; 4], heard.clone())
            .unwrap();
        Rig {
            device: FwCfg::new(items, memory.clone()),
            memory,
            heard,
        }
    }

    impl Rig {
        fn select(&self, key: u16) {
            self.device.write(0, Width::Word, key.into()).unwrap();
        }

        fn data(&self, bytes: usize) -> Vec<u8> {
            let byte = |_| self.device.read(1, Width::Byte).unwrap() as u8;
            (0..bytes).map(byte).collect()
        }

        /// Runs a command at 0x100; what is left in its control word.
        fn command(&self, control: u32, length: u32, address: u64) -> u32 {
            let command = Command {
                control: control.into(),
                length: length.into(),
                address: address.into(),
            };
            self.memory.write(Gpa(0x100), command.as_bytes()).unwrap();
            self.device.write(4, Width::Dword, 0).unwrap();
            let low = 0x100u32.swap_bytes();
            self.device.write(8, Width::Dword, low).unwrap();
            self.memory.read_u32(Gpa(0x100)).unwrap().swap_bytes()
        }

        /// The key of a file, from the directory.
        fn file(&self, name: &str) -> u16 {
            self.select(0x19);
            let count = u32::from_be_bytes(self.data(4).try_into().unwrap());
            let all: Vec<_> = (0..count).map(|_| self.data(64)).collect();
            let found = all
                .iter()
                .find(|e| e[8..8 + name.len()] == *name.as_bytes());
            let entry = found.expect("the file is listed");
            u16::from_be_bytes([entry[4], entry[5]])
        }
    }

    #[test]
    fn items_are_read_byte_by_byte_and_end_in_zeroes() {
        let r = rig();
        assert_eq!(r.data(4), b"QEMU", "selected from the start");
        r.select(Key::CpuCount as u16);
        assert_eq!(r.data(4), [3, 0, 0, 0]);
        r.select(Key::CpuCount as u16 | WRITE_CHANNEL);
        assert_eq!(r.data(1), [3]);
        r.select(0x7777);
        assert_eq!(r.data(2), [0, 0]);
        r.select(Key::Id as u16);
        assert_eq!(r.data(4), [3, 0, 0, 0]);
    }

    #[test]
    fn files_are_listed_by_name_and_read_by_their_keys() {
        let r = rig();
        r.select(Key::FileDirectory as u16);
        assert_eq!(r.data(4), [0, 0, 0, 3]);
        let first = r.data(64);
        assert_eq!(&first[..8], [0, 0, 0x13, 0x88, 0, 0x20, 0, 0]);
        assert_eq!(&first[8..14], b"etc/a\0");
        let key = r.file("opt/b");
        r.select(key);
        assert_eq!(r.data(4), b"bee\0");
    }

    #[test]
    fn dma_is_announced() {
        let r = rig();
        let byte = |offset| r.device.read(offset, Width::Byte).unwrap() as u8;
        let signature: Vec<u8> = (4..12).map(byte).collect();
        assert_eq!(signature, b"QEMU CFG");
        assert_eq!(
            r.device.read(4, Width::Dword),
            Err(IoError::InvalidWidth),
            "the bus puts bytes together"
        );
    }

    #[test]
    fn dma_selects_reads_skips_and_zeroes_beyond_the_end() {
        let r = rig();
        let select = |key: u16| u32::from(key) << 16 | 8;
        r.memory.write(Gpa(0x1000), &[0xaa; 16]).unwrap();
        assert_eq!(r.command(select(0) | 2, 6, 0x1000), 0);
        let mut got = [0; 8];
        r.memory.read(Gpa(0x1000), &mut got).unwrap();
        assert_eq!(&got, b"QEMU\0\0\xaa\xaa");
        let file = r.file("opt/b");
        assert_eq!(r.command(select(file) | 4, 2, 0), 0, "skip");
        assert_eq!(r.data(1), b"e");
        let file = r.file("etc/a");
        assert_eq!(r.command(select(file) | 2, 5000, 0x2000), 0);
        assert_eq!(r.memory.read_u8(Gpa(0x2000 + 4999)), Ok(7));
    }

    #[test]
    fn dma_to_nowhere_and_endless_dma_are_errors() {
        let r = rig();
        let read = |address, length| r.command(8 | 2, length, address);
        assert_eq!(read(RAM - 2, 4), 1);
        assert_eq!(read(u64::MAX, 4), 1);
        assert_eq!(read(0x1000, u32::MAX), 1);
        assert_eq!(read(0x1000, 4), 0);
        // A command that is not in RAM is no command.
        r.device.write(4, Width::Dword, u32::MAX).unwrap();
        r.device.write(8, Width::Dword, u32::MAX).unwrap();
    }

    #[test]
    fn only_writable_files_are_written_and_the_listener_hears_it() {
        let r = rig();
        let write = |key: u16, length| r.command(u32::from(key) << 16 | 8 | 16, length, 0x3000);
        r.memory.write(Gpa(0x3000), b"abcdef").unwrap();
        let (constant, writable) = (r.file("opt/b"), r.file("etc/w"));
        assert_eq!(write(constant, 3), 1);
        assert_eq!(write(0x7777, 1), 1);
        assert_eq!(write(writable, 5), 1, "longer than the file");
        assert!(r.heard.0.lock().is_empty());
        assert_eq!(write(writable, 2), 0);
        assert_eq!(*r.heard.0.lock(), [b"ab\0\0"]);
        r.select(writable);
        assert_eq!(r.data(4), b"ab\0\0");
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        let mut items = FwCfgItems::new();
        let empty = || Vec::new();
        assert_eq!(items.add_file("", empty()), Err(FileError::Name));
        assert_eq!(items.add_file("a b", empty()), Err(FileError::Name));
        let long = "x".repeat(MAX_FILE_NAME + 1);
        assert_eq!(items.add_file(&long, empty()), Err(FileError::Name));
        assert_eq!(items.add_file(&long[1..], empty()), Ok(()));
        assert_eq!(items.add_file(&long[1..], empty()), Err(FileError::Exists));
        for n in 1..MAX_FILES {
            items.add_file(&n.to_string(), empty()).unwrap();
        }
        assert_eq!(items.add_file("last", empty()), Err(FileError::TooMany));
    }

    proptest! {
        #[test]
        fn no_access_harms(accesses in proptest::collection::vec(
            (any::<bool>(), 0..FW_CFG_PORTS, 0..3usize, any::<u32>()), 0..200)) {
            let r = rig();
            for (write, offset, width, value) in accesses {
                let width = [Width::Byte, Width::Word, Width::Dword][width];
                if write {
                    let _ = r.device.write(offset, width, value);
                } else if let Ok(value) = r.device.read(offset, width) {
                    prop_assert!(u64::from(value) <= width.mask());
                }
            }
        }

        #[test]
        fn no_command_harms(control in any::<u32>(), key in 0..0x30u16, length in any::<u32>(),
                            address in prop_oneof![0..2 * RAM, any::<u64>()]) {
            let r = rig();
            let control = control & 0xffff | u32::from(key) << 16;
            prop_assert!(r.command(control, length, address) <= 1
                || (address..address.saturating_add(length.into())).contains(&0x100));
        }
    }
}
