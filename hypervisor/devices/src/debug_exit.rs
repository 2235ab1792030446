//! The port by which a test kernel ends its machine with a value, as QEMU's `isa-debug-exit`.
//!
//! Whatever is written ends the VM; QEMU would make an exit status of it, see [`exit_status`].
//! Only VMs that ask for test devices have it.

use alloc::sync::Arc;

use mem::Width;

use crate::bus::{IoError, PortDevice};
use crate::system::{SystemControl, SystemRequest};

/// First port of the device, where test kernels expect it.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Ports of the device.
pub const DEBUG_EXIT_PORTS: u16 = 4;

/// The status with which QEMU exits when a guest has written `value`: never 0, always odd.
pub const fn exit_status(value: u32) -> u8 {
    (value << 1 | 1) as u8
}

/// The device, four ports from [`DEBUG_EXIT_PORT`].
pub struct DebugExit {
    system: Arc<dyn SystemControl>,
}

impl DebugExit {
    /// A device that tells `system`.
    pub fn new(system: Arc<dyn SystemControl>) -> Arc<Self> {
        Arc::new(DebugExit { system })
    }
}

impl PortDevice for DebugExit {
    fn read(&self, _offset: u16, _width: Width) -> Result<u32, IoError> {
        Ok(0)
    }

    fn write(&self, _offset: u16, _width: Width, value: u32) -> Result<(), IoError> {
        self.system.request(SystemRequest::TestExit(value));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Requests;

    #[test]
    fn every_write_ends_the_machine_with_its_value() {
        let requests = Arc::new(Requests::default());
        let device = DebugExit::new(requests.clone());
        assert_eq!(device.read(0, Width::Dword), Ok(0));
        device.write(0, Width::Dword, 0x1_0001).unwrap();
        device.write(3, Width::Byte, 5).unwrap();
        assert_eq!(
            requests.take(),
            [
                SystemRequest::TestExit(0x1_0001),
                SystemRequest::TestExit(5)
            ]
        );
    }

    #[test]
    fn the_status_is_qemus() {
        assert_eq!([0, 1, 0x10, 0x31].map(exit_status), [1, 3, 0x21, 0x63]);
        assert_eq!([0x7f, 0x80, u32::MAX].map(exit_status), [0xff, 1, 0xff]);
    }
}
