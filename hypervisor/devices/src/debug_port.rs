//! A port whose bytes are console output, as QEMU's `isa-debugcon` and Bochs' port 0xE9.
//!
//! Reading gives [`READ_BACK`], by which software finds out that somebody listens. Only VMs
//! that ask for test devices have it.
//!
//! The port has no way to say that it is busy. What the console has no room for is kept, and
//! [`RunState::OUTPUT_WAITS`] makes the VM's vCPUs pause until it is gone.

use alloc::collections::VecDeque;
use alloc::sync::Arc;

use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, PortDevice, byte_only};
use crate::system::RunState;
use crate::uart::ConsoleSink;

/// Bytes that are kept. Out of reach: a vCPU writes 1 KiB at most before it pauses.
const WAITING_BYTES: usize = 64 * 1024;

/// Where test kernels expect the port.
pub const DEBUG_PORT: u16 = 0xe9;
/// Where firmware expects it.
pub const FIRMWARE_DEBUG_PORT: u16 = 0x402;
/// What the port reads as.
pub const READ_BACK: u8 = 0xe9;

/// One such port.
pub struct DebugPort {
    console: Arc<dyn ConsoleSink>,
    waiting: Mutex<VecDeque<u8>>,
    state: Arc<RunState>,
}

impl DebugPort {
    /// A port whose output goes to `console`, of a VM with this state.
    pub fn new(console: Arc<dyn ConsoleSink>, state: Arc<RunState>) -> Arc<Self> {
        Arc::new(DebugPort {
            console,
            waiting: Mutex::default(),
            state,
        })
    }

    /// The console may have room again: offers it what waits.
    pub fn resume(&self) {
        self.send(&mut self.waiting.lock());
    }

    fn send(&self, waiting: &mut VecDeque<u8>) {
        let taken = self.console.write(waiting.make_contiguous());
        waiting.drain(..taken.min(waiting.len()));
        self.state.set(RunState::OUTPUT_WAITS, !waiting.is_empty());
    }
}

impl PortDevice for DebugPort {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        Ok(u32::from(READ_BACK))
    }

    fn write(&self, _offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let mut waiting = self.waiting.lock();
        if waiting.len() < WAITING_BYTES {
            waiting.push_back(value as u8);
        }
        self.send(&mut waiting);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::PortBus;
    use alloc::vec::Vec;
    use core::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Written(Mutex<Vec<u8>>, AtomicBool);

    impl ConsoleSink for Written {
        fn write(&self, bytes: &[u8]) -> usize {
            if self.1.load(Ordering::Relaxed) {
                return 0;
            }
            self.0.lock().extend_from_slice(bytes);
            bytes.len()
        }
    }

    #[test]
    fn what_the_console_does_not_take_waits_and_the_vm_with_it() {
        let console = Arc::new(Written::default());
        let state = Arc::new(RunState::default());
        let port = DebugPort::new(console.clone(), state.clone());
        console.1.store(true, Ordering::Relaxed);
        for byte in b"ab" {
            port.write(0, Width::Byte, u32::from(*byte)).unwrap();
        }
        assert!(state.has(RunState::OUTPUT_WAITS));
        port.resume();
        assert!(state.has(RunState::OUTPUT_WAITS), "it is still full");
        console.1.store(false, Ordering::Relaxed);
        port.resume();
        assert!(!state.has(RunState::OUTPUT_WAITS));
        port.write(0, Width::Byte, u32::from(b'c')).unwrap();
        assert_eq!(*console.0.lock(), b"abc");
    }

    #[test]
    fn bytes_go_to_the_console_and_the_port_gives_itself_away() {
        let console = Arc::new(Written::default());
        let mut bus = PortBus::new();
        let port = DebugPort::new(console.clone(), Arc::default());
        bus.insert("debug", DEBUG_PORT, 1, port).unwrap();
        bus.write(DEBUG_PORT, Width::Byte, u32::from(b'h'));
        bus.write(DEBUG_PORT, Width::Word, 0x4169);
        assert_eq!(*console.0.lock(), b"hi");
        assert_eq!(bus.read(DEBUG_PORT, Width::Byte), 0xe9);
    }
}
