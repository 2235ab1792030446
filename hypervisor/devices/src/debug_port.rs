//! A port whose bytes are console output, as QEMU's `isa-debugcon` and Bochs' port 0xE9.
//!
//! Reading gives [`READ_BACK`], by which software finds out that somebody listens. Only VMs
//! that ask for test devices have it.

use alloc::sync::Arc;

use mem::Width;

use crate::bus::{IoError, PortDevice, byte_only};
use crate::uart::ConsoleSink;

/// Where test kernels expect the port.
pub const DEBUG_PORT: u16 = 0xe9;
/// Where firmware expects it.
pub const FIRMWARE_DEBUG_PORT: u16 = 0x402;
/// What the port reads as.
pub const READ_BACK: u8 = 0xe9;

/// One such port.
pub struct DebugPort {
    console: Arc<dyn ConsoleSink>,
}

impl DebugPort {
    /// A port whose output goes to `console`.
    pub fn new(console: Arc<dyn ConsoleSink>) -> Arc<Self> {
        Arc::new(DebugPort { console })
    }
}

impl PortDevice for DebugPort {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        Ok(u32::from(READ_BACK))
    }

    fn write(&self, _offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        self.console.write(&[value as u8]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::PortBus;
    use alloc::vec::Vec;
    use spin::Mutex;

    #[derive(Default)]
    struct Written(Mutex<Vec<u8>>);

    impl ConsoleSink for Written {
        fn write(&self, bytes: &[u8]) {
            self.0.lock().extend_from_slice(bytes);
        }
    }

    #[test]
    fn bytes_go_to_the_console_and_the_port_gives_itself_away() {
        let console = Arc::new(Written::default());
        let mut bus = PortBus::new();
        let port = DebugPort::new(console.clone());
        bus.insert("debug", DEBUG_PORT, 1, port).unwrap();
        bus.write(DEBUG_PORT, Width::Byte, u32::from(b'h'));
        bus.write(DEBUG_PORT, Width::Word, 0x4169);
        assert_eq!(*console.0.lock(), b"hi");
        assert_eq!(bus.read(DEBUG_PORT, Width::Byte), 0xe9);
    }
}
