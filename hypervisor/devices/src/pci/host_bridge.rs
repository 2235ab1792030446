//! The host bridge at 00:00.0: an identity and nothing to configure.

use alloc::sync::Arc;

use mem::Width;
use spin::Mutex;

use super::PciFunction;
use super::config::{ConfigSpace, FunctionId};

/// Intel's virtual PCI host bridge, which no driver and no quirk takes for a real chip set.
const ID: FunctionId = FunctionId {
    vendor: 0x8086,
    device: 0x0d57,
    class: 0x06,
    subclass: 0x00,
    interface: 0,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The host bridge.
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// The bridge after reset.
    pub fn new() -> Arc<Self> {
        Arc::new(HostBridge(Mutex::new(ConfigSpace::new(&ID))))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        self.0.lock().read(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        self.0.lock().write(offset, width, value);
    }
}
