//! The local APIC: xAPIC and x2APIC, its timer, and messages between processors.
//!
//! Three parts, after who may touch them (SDM vol. 3A, chapter 11):
//! - [`LocalApic`] is the register file. Its vCPU owns it; no lock, no sharing.
//! - [`ApicInbox`] is what others may do to it: post interrupts and signals, and match its
//!   identity. Atomics only.
//! - [`ApicBus`] routes a [`Message`] to the inboxes it names and kicks their vCPUs.
//!
//! The vCPU's run loop, before an entry: [`LocalApic::poll`] the timer, call
//! [`LocalApic::take_signals`] for NMI, INIT and start-up, ask [`LocalApic::interrupt`] for
//! the vector to inject, and once injected, [`LocalApic::accept`] it. This may be left out
//! if nothing was written to the APIC since the last time, no deadline has passed and
//! [`ApicInbox::has_pending`] says no: posting and writing make work, reading does not.

mod bus;
mod inbox;
mod local;
mod message;
mod registers;
#[cfg(test)]
mod tests;

pub use bus::{ApicBus, IntrPin, MessageSink, VcpuKick};
pub use inbox::{ApicInbox, Identity, Signals};
pub use local::{ApicEffect, LocalApic, LocalApicConfig, MsrFault};
pub use message::{DeliveryMode, Destination, Message, Trigger};
pub use registers::{
    ApicBase, MSR_APIC_BASE, MSR_TSC_DEADLINE, X2APIC_MSRS, XAPIC_BASE, XAPIC_LEN,
};
