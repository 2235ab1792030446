//! The registers that test kernels of hypervisors expect, as QEMU's `pc-testdev`.
//!
//! Purpose: something harmless to read and write by every width, and interrupt lines to drive.
//!
//! | where | what |
//! | --- | --- |
//! | ports 0xE0 to 0xE3 | four bytes that keep what is written, by any width |
//! | ports 0xE4 to 0xE7 | takes a guest-physical address whose page the host should map anew |
//! | ports 0xE8 to 0xEB | the same four bytes again |
//! | ports 0x2000 to 0x2017 | a byte each: level of the interrupt line of that number |
//! | memory at 0xFF00_0000 | 64 KiB that keep what is written, but are device memory |
//!
//! The debug port 0xE9 lies in the third group and is the debug port's; an access from 0xE8 on that is wider
//! than a byte is this device's as a whole. Only VMs that ask for test devices have it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, MmioBus, MmioDevice, Overlap, PortBus, PortDevice, byte_only};
use crate::line::{InterruptSink, Line};

/// First of the ports that echo any width.
const ECHO_PORT: u16 = 0xe0;
/// First of the ports that ask for a page to be mapped anew.
const FLUSH_PORT: u16 = 0xe4;
/// The ports at which the echo is seen again, but for the debug port: first port, count, offset.
const ECHO_AGAIN: [(u16, u16, u16); 2] = [(0xe8, 1, 0), (0xea, 2, 2)];
/// First of the ports that drive interrupt lines.
const LINES_PORT: u16 = 0x2000;
/// Interrupt lines, a port each.
const LINES: u16 = 24;
/// Guest-physical address of the device memory.
const MEMORY: u64 = 0xff00_0000;
/// Bytes of the device memory.
const MEMORY_BYTES: usize = 64 << 10;

/// Places the test device on a VM's buses. `lines`: its interrupt lines, by number.
///
/// # Errors
/// Another device is in its place.
pub fn attach(
    ports: &mut PortBus,
    mmio: &mut MmioBus,
    lines: &Arc<dyn InterruptSink>,
) -> Result<(), Overlap> {
    let echo = Arc::new(Echo(Mutex::new([0; 4])));
    ports.insert("test-echo", ECHO_PORT, 4, echo.clone())?;
    ports.insert("test-flush", FLUSH_PORT, 4, Arc::new(Flush))?;
    for (port, count, first) in ECHO_AGAIN {
        let echo = echo.clone();
        let again = Arc::new(EchoFrom { echo, first });
        ports.insert("test-echo-again", port, count, again)?;
    }
    let lines: Vec<Line> = (0..LINES)
        .map(|n| Line::new(lines.clone(), u32::from(n)))
        .collect();
    ports.insert("test-lines", LINES_PORT, LINES, Arc::new(Lines(lines)))?;
    let memory = Mutex::new(alloc::vec![0; MEMORY_BYTES].into_boxed_slice());
    mmio.insert(
        "test-memory",
        MEMORY,
        MEMORY_BYTES as u64,
        Arc::new(Memory(memory)),
    )
}

/// Four bytes that keep what is written.
struct Echo(Mutex<[u8; 4]>);

impl PortDevice for Echo {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        let mut value = [0; 4];
        let bytes = self.0.lock();
        let from = bytes.get(usize::from(offset)..).unwrap_or_default();
        for (to, from) in value.iter_mut().zip(from).take(width.bytes()) {
            *to = *from;
        }
        Ok(u32::from_le_bytes(value))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        let mut bytes = self.0.lock();
        let to = bytes.get_mut(usize::from(offset)..).unwrap_or_default();
        for (to, from) in to.iter_mut().zip(value.to_le_bytes()).take(width.bytes()) {
            *to = from;
        }
        Ok(())
    }
}

/// The same bytes, from one of them on.
struct EchoFrom {
    echo: Arc<Echo>,
    first: u16,
}

impl PortDevice for EchoFrom {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        self.echo.read(self.first + offset, width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        self.echo.write(self.first + offset, width, value)
    }
}

/// Plinth never takes a page of RAM away from a guest, so there is nothing to map anew.
struct Flush;

impl PortDevice for Flush {
    fn read(&self, _offset: u16, _width: Width) -> Result<u32, IoError> {
        Ok(0)
    }

    fn write(&self, _offset: u16, _width: Width, _value: u32) -> Result<(), IoError> {
        Ok(())
    }
}

/// A port for each interrupt line.
struct Lines(Vec<Line>);

impl PortDevice for Lines {
    fn read(&self, _offset: u16, _width: Width) -> Result<u32, IoError> {
        Ok(0)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let line = self.0.get(usize::from(offset));
        line.ok_or(IoError::InvalidRegister)?.set(value != 0);
        Ok(())
    }
}

/// Device memory that keeps what is written.
struct Memory(Mutex<Box<[u8]>>);

impl Memory {
    fn range(offset: u64, width: Width) -> core::ops::Range<usize> {
        let start = (offset as usize).min(MEMORY_BYTES);
        start..start + width.bytes()
    }
}

impl MmioDevice for Memory {
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let memory = self.0.lock();
        let range = Memory::range(offset, width);
        let bytes = memory.get(range).ok_or(IoError::InvalidRegister)?;
        let value = bytes.iter().rev();
        Ok(value.fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let mut memory = self.0.lock();
        let range = Memory::range(offset, width);
        let bytes = memory.get_mut(range).ok_or(IoError::InvalidRegister)?;
        bytes.copy_from_slice(&value.to_le_bytes()[..width.bytes()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingSink;

    fn rig() -> (PortBus, MmioBus, Arc<RecordingSink>) {
        let (mut ports, mut mmio) = (PortBus::new(), MmioBus::new());
        let sink = Arc::new(RecordingSink::default());
        let lines: Arc<dyn InterruptSink> = sink.clone();
        attach(&mut ports, &mut mmio, &lines).unwrap();
        (ports, mmio, sink)
    }

    #[test]
    fn ports_echo_what_is_written_by_every_width() {
        let (ports, ..) = rig();
        ports.write(0xe0, Width::Dword, 0x1234_5678);
        assert_eq!(ports.read(0xe0, Width::Dword), 0x1234_5678);
        assert_eq!(ports.read(0xe1, Width::Word), 0x3456);
        ports.write(0xe3, Width::Byte, 0xab);
        assert_eq!(ports.read(0xe0, Width::Dword), 0xab34_5678);
        assert_eq!(ports.read(0xe2, Width::Dword), 0xab34);
        ports.write(0xe8, Width::Dword, 0x8765_4321);
        assert_eq!(ports.read(0xe0, Width::Dword), 0x8765_4321);
        ports.write(0xea, Width::Word, 0x1122);
        assert_eq!(ports.read(0xe8, Width::Dword), 0x1122_4321);
        assert_eq!(ports.read(0xeb, Width::Byte), 0x11);
        ports.write(0xe4, Width::Dword, 0x1000);
    }

    #[test]
    fn ports_drive_interrupt_lines() {
        let (ports, _, sink) = rig();
        ports.write(0x200e, Width::Byte, 1);
        ports.write(0x2017, Width::Byte, 0x80);
        ports.write(0x200e, Width::Byte, 0);
        ports.write(0x2018, Width::Byte, 1);
        assert_eq!(sink.take(), [(14, true), (23, true), (14, false)]);
    }

    #[test]
    fn device_memory_keeps_what_is_written_by_every_width() {
        let (_, mmio, _) = rig();
        mmio.write(MEMORY + 9, Width::Qword, 0x1122_3344_5566_7788);
        assert_eq!(mmio.read(MEMORY + 9, Width::Dword), 0x5566_7788);
        assert_eq!(mmio.read(MEMORY + 16, Width::Byte), 0x11);
        let last = MEMORY + MEMORY_BYTES as u64 - 1;
        mmio.write(last, Width::Word, 0x5555);
        assert_eq!(mmio.read(last, Width::Byte), 0);
        assert_eq!(mmio.read(last, Width::Word), 0xffff);
    }
}
