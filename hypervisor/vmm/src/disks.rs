//! A VM's disks: each a virtio block device on its PCI bus.

use alloc::{boxed::Box, format, sync::Arc};

use devices::{
    lapic::MessageSink,
    pci::{PciBus, PciLines},
    platform::FIRST_DISK_SLOT,
    virtio::{
        block::Block,
        pci::{VirtioPci, Wiring},
    },
    work::WorkList,
};
use mem::GuestMemory;
use storage::Disk;

use crate::vm::VmError;

/// Most queues of a disk: more than a few take turns at the same host memory.
const MAX_QUEUES: u16 = 4;

/// What the disks are connected to.
pub(crate) struct Board<'a> {
    pub pci: &'a mut PciBus,
    pub lines: &'a mut PciLines,
    pub work: &'a mut WorkList,
    pub memory: &'a Arc<GuestMemory>,
    pub messages: Arc<dyn MessageSink>,
    /// Processors, of which each may use a queue of its own.
    pub vcpus: u16,
}

/// Puts the disks into the PCI slots from [`FIRST_DISK_SLOT`] on, in their order.
///
/// # Errors
/// There are more than slots or workers.
pub(crate) fn attach(board: Board<'_>, vm: &str, disks: &[Arc<dyn Disk>]) -> Result<(), VmError> {
    for (number, disk) in disks.iter().enumerate() {
        let slot = u8::try_from(number).ok();
        let slot = slot.and_then(|n| n.checked_add(FIRST_DISK_SLOT));
        let slot = slot.ok_or(VmError::Devices)?;
        let block = Block::new(
            format!("{vm}: disk {number}"),
            disk.clone(),
            &format!("plinth-disk-{number}"),
            board.vcpus.min(MAX_QUEUES),
        );
        let line = board.lines.line(slot, 0);
        let (memory, messages) = (board.memory.clone(), board.messages.clone());
        let function = board.work.add(|work| {
            let wiring = Wiring {
                memory,
                messages,
                line,
                work,
            };
            VirtioPci::new(Box::new(block), wiring).ok()
        });
        let function = function.ok_or(VmError::Devices)?;
        board.pci.insert(slot, 0, function)?;
    }
    Ok(())
}
