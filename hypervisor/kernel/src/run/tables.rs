//! The nested page tables of a running VM.
//!
//! They are made once, and change only for ROM and flash. The lock is a device's, in the order of
//! docs/ARCHITECTURE.md: held for one change, below the device that asked for it.

use alloc::{format, string::String, sync::Arc};

use mem::{
    GuestMemory, GuestRange, Hpa, Owner,
    nested::{NestedError, NestedTable},
};
use virt::Backend;
use vmm::firmware::NestedControl;

use crate::{memory, sync::Lock};

/// Nested page tables, shared by a VM's vCPUs and the devices that change them.
pub(super) struct GuestTables<B: Backend> {
    backend: &'static B,
    root: Hpa,
    table: Lock<NestedTable<B::Format>>,
}

impl<B: Backend> GuestTables<B> {
    /// Tables of VM number `vm` that map all of its memory.
    ///
    /// # Errors
    /// As [`NestedTable::new`] and [`GuestMemory::map_into`].
    pub(super) fn new(
        backend: &'static B,
        vm: u16,
        guest: &GuestMemory,
    ) -> Result<Arc<Self>, NestedError> {
        let mut table = NestedTable::new(backend.format(), &memory::HOST, Owner::VmTables(vm))?;
        guest.map_into(&mut table)?;
        Ok(Arc::new(GuestTables {
            backend,
            root: table.root(),
            table: Lock::new(table),
        }))
    }

    /// Where the hardware finds them.
    pub(super) fn root(&self) -> Hpa {
        self.root
    }

    /// Frames that they take.
    pub(super) fn frames(&self) -> u64 {
        self.table.lock().frames()
    }
}

impl<B: Backend> NestedControl for GuestTables<B> {
    fn refresh(&self, memory: &GuestMemory, range: GuestRange) -> Result<(), String> {
        let mut table = self.table.lock();
        memory
            .map_special(&mut table, range)
            .map_err(|e| format!("{e}"))
    }

    fn flush(&self) {
        self.backend.flush_nested(self.root);
    }
}
