//! What a guest sees: buses, interrupt controllers, timers and devices of a small PC.
//!
//! Devices are hardware-free state machines behind small traits ([`bus::PortDevice`],
//! [`bus::MmioDevice`], [`line::InterruptSink`]). They see offsets, never absolute
//! addresses; the bus owns placement. Interrupt lines and system effects are objects
//! handed in at construction. Time is read from [`time::Clock`], never counted: each
//! timer says when it is due next (`deadline`), and `poll` delivers what is due.
//!
//! Invariants:
//! - No guest input panics, loops without bound or allocates without bound.
//! - Lock order: a device's lock, then the PIC's or IOAPIC's lock, then the atomics of
//!   [`lapic::ApicInbox`] and the kick. A sink never calls back into a device, so a
//!   device may drive its line while it holds its own lock; the kick callback must not
//!   take any of these locks. [`system::SystemControl`] is called without any lock held.
//! - The PCI bus's BAR tables are locked before a function's lock, and never while a function is called
//!   for an access.
//! - A [`lapic::LocalApic`] belongs to its vCPU and has no lock.
//!
//! Devices are called from vCPU exits and from the host's run loop, never from a host
//! interrupt handler, which could meet a lock that the code it interrupted holds. Devices have
//! no reset: a VM that restarts gets new ones.
//!
//! What this crate does not do: guest memory, instruction emulation, scheduling.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod acpi;
pub mod bus;
pub mod chipset;
pub mod debug_exit;
pub mod debug_port;
pub mod flash;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod keyboard;
pub mod lapic;
pub mod line;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod platform;
pub mod pm;
pub mod ramfb;
pub mod rtc;
pub mod system;
pub mod test_device;
pub mod time;
pub mod uart;
pub mod vga;
pub mod virtio;
pub mod watchdog;
pub mod work;

#[cfg(test)]
mod testing;

pub use mem::{Gpa, Width};

/// A virtual processor's number within its VM: 0 is the bootstrap processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u32);
