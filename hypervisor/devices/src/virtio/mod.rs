//! Virtio devices (VIRTIO 1.2): what they share, and each type in a module of its own.
//!
//! A device type implements [`VirtioDevice`]: its identity, its configuration, and what it does with the
//! chains of a queue. [`pci::VirtioPci`] makes a PCI function of it, with all that is alike: features,
//! status, queues, interrupts. [`queue`] is the rings in guest memory.
//!
//! Only what version 1 of the specification calls a non-transitional device is offered: no legacy interface.

pub mod block;
pub mod pci;
pub mod queue;
#[cfg(test)]
mod testing;

use bitflags::bitflags;
use mem::GuestMemory;

use crate::work::Budget;
use queue::{Queue, QueueError};

/// A device type's number (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// Block device.
    Block = 2,
}

bitflags! {
    /// Feature bits that are no device type's own (section 6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommonFeatures: u64 {
        /// Tables of indirect descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// Interrupts and notifications by event index.
        const EVENT_IDX = 1 << 29;
        /// The device follows version 1 of the specification.
        const VERSION_1 = 1 << 32;
    }
}

/// How far a device came with a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left to do until the driver notifies.
    Idle,
    /// The budget is spent before the work.
    More,
}

/// A device type.
///
/// The transport calls `run` with the queue's lock held, for one queue by one caller at a time, and
/// `reset` while no queue runs.
pub trait VirtioDevice: Send + Sync {
    /// Its type.
    fn device_type(&self) -> DeviceType;

    /// What messages call it.
    fn name(&self) -> &str;

    /// The feature bits of its type that it offers.
    fn features(&self) -> u64;

    /// Most entries of each of its queues, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Copies its configuration from byte `offset` on; zeroes beyond its end.
    fn read_config(&self, offset: usize, to: &mut [u8]);

    /// Its driver writes to its configuration.
    fn write_config(&self, offset: usize, from: &[u8]);

    /// A driver has set it up and agreed on these features.
    fn start(&self, features: u64);

    /// Its driver gives it up: forgets all requests.
    fn reset(&self);

    /// Works on queue `index` until it is empty or `budget` is spent.
    ///
    /// # Errors
    /// The driver broke a rule. The device needs a reset.
    fn run(
        &self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
        budget: &mut Budget,
    ) -> Result<Progress, QueueError>;
}
