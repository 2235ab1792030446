//! Routes interrupt messages to the inboxes of a VM's vCPUs.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use super::inbox::ApicInbox;
use super::message::{DeliveryMode, Destination, Message};
use crate::VcpuId;
use crate::line::{InterruptSink, Line};

/// Makes a vCPU look at its inbox soon: wakes it, or makes it leave guest mode.
pub trait VcpuKick: Send + Sync {
    /// Kicks `vcpu`. Takes no device lock; a kick of the vCPU that is exiting anyway costs nothing.
    fn kick(&self, vcpu: VcpuId);
}

/// Takes interrupt messages: from an IOAPIC, or from a device's MSI.
pub trait MessageSink: Send + Sync {
    /// Delivers `message`; from no processor, so [`Destination::AllButSender`] is everyone.
    ///
    /// Returns whether a processor took it: none does if the destination names none, or none that is on.
    fn deliver(&self, message: &Message) -> bool;

    /// Delivers an MSI: `data` written to guest-physical `address`. Other addresses are ignored.
    fn deliver_msi(&self, address: u64, data: u32) {
        if let Some(message) = Message::from_msi(address, data) {
            self.deliver(&message);
        }
    }
}

/// The interrupt bus of a VM.
pub struct ApicBus {
    inboxes: Box<[Arc<ApicInbox>]>,
    /// (APIC ID, index into `inboxes`), sorted.
    by_id: Box<[(u32, u32)]>,
    /// A processor has, or had, another xAPIC ID than in `by_id`.
    ids_changed: AtomicBool,
    kick: Arc<dyn VcpuKick>,
}

impl ApicBus {
    /// A bus for vCPUs 0, 1, .. with these APIC IDs.
    pub fn new(apic_ids: &[u32], kick: Arc<dyn VcpuKick>) -> Arc<Self> {
        let vcpus = || (0u32..).zip(apic_ids);
        let mut by_id: Vec<_> = vcpus().map(|(index, &id)| (id, index)).collect();
        by_id.sort_unstable();
        Arc::new(ApicBus {
            inboxes: vcpus()
                .map(|(index, &id)| Arc::new(ApicInbox::new(VcpuId(index), id)))
                .collect(),
            by_id: by_id.into(),
            ids_changed: AtomicBool::new(false),
            kick,
        })
    }

    /// The inbox of a vCPU.
    pub fn inbox(&self, vcpu: VcpuId) -> Option<&Arc<ApicInbox>> {
        self.inboxes.get(vcpu.0 as usize)
    }

    /// Sends `message`, from the APIC of `sender` or from a device. Returns whether anyone took it.
    ///
    /// The sender itself is not kicked: it is exiting and looks at its inbox before it enters.
    pub fn send(&self, message: &Message, sender: Option<VcpuId>) -> bool {
        if !message.assert {
            return false;
        }
        if message.mode == DeliveryMode::LowestPriority {
            return self
                .lowest_priority(message, sender)
                .is_some_and(|inbox| self.post(inbox, message, sender));
        }
        if let Destination::Physical(id) = message.destination
            && !self.ids_changed.load(Ordering::Relaxed)
        {
            // At most one receiver; no walk.
            return self
                .find(id)
                .filter(|inbox| inbox.identity().enabled())
                .is_some_and(|inbox| self.post(inbox, message, sender));
        }
        let mut taken = false;
        for inbox in &self.inboxes {
            if matches(inbox, message.destination, sender) {
                taken |= self.post(inbox, message, sender);
            }
        }
        taken
    }

    /// A processor gave itself another xAPIC ID: from now on all are asked for theirs.
    pub(super) fn ids_changed(&self) {
        self.ids_changed.store(true, Ordering::Relaxed);
    }

    fn find(&self, id: u32) -> Option<&Arc<ApicInbox>> {
        // IDs usually equal indices.
        if let Some(&(at_id, index)) = self.by_id.get(id as usize)
            && at_id == id
        {
            return self.inboxes.get(index as usize);
        }
        let at = self.by_id.binary_search_by_key(&id, |&(id, _)| id).ok()?;
        self.inboxes.get(self.by_id[at].1 as usize)
    }

    /// Of the receivers that match, one with the lowest task priority; among equals the vector
    /// decides, which spreads load and stays put for one vector.
    fn lowest_priority(
        &self,
        message: &Message,
        sender: Option<VcpuId>,
    ) -> Option<&Arc<ApicInbox>> {
        let candidates = || {
            self.inboxes.iter().filter(|i| {
                i.identity().software_enabled() && matches(i, message.destination, sender)
            })
        };
        let lowest = candidates().map(|i| i.priority() >> 4).min()?;
        // Priorities may change meanwhile; whoever is still lowest is taken, at worst the first.
        let equal = candidates().filter(|i| i.priority() >> 4 <= lowest).count();
        let nth = usize::from(message.vector).checked_rem(equal).unwrap_or(0);
        candidates()
            .filter(|i| i.priority() >> 4 <= lowest)
            .nth(nth)
            .or_else(|| candidates().next())
    }

    /// Posts to one receiver. Returns whether it takes such a message.
    #[inline(always)]
    fn post(&self, inbox: &ApicInbox, message: &Message, sender: Option<VcpuId>) -> bool {
        let kick = match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !inbox.identity().software_enabled() {
                    return false;
                } else if message.vector < 16 {
                    inbox.post_illegal_vector()
                } else {
                    inbox.post_interrupt(message.vector, message.trigger)
                }
            }
            DeliveryMode::Nmi => inbox.post_nmi(),
            DeliveryMode::Init => inbox.post_init(),
            DeliveryMode::StartUp => inbox.post_startup(message.vector),
            DeliveryMode::ExtInt => inbox.post_extint(),
            // No SMM to enter; a reserved mode is no message.
            DeliveryMode::Smi | DeliveryMode::Reserved => return false,
        };
        if kick && sender != Some(inbox.vcpu()) {
            self.kick.kick(inbox.vcpu());
        }
        true
    }
}

fn matches(inbox: &ApicInbox, destination: Destination, sender: Option<VcpuId>) -> bool {
    let identity = inbox.identity();
    identity.enabled()
        && match destination {
            Destination::Physical(id) => identity.matches_physical(id),
            Destination::Logical(id) => identity.matches_logical(id),
            Destination::All => true,
            Destination::AllButSender => sender != Some(inbox.vcpu()),
        }
}

impl MessageSink for ApicBus {
    fn deliver(&self, message: &Message) -> bool {
        self.send(message, None)
    }
}

/// The wire from the 8259A's INTR output to LINT0 of the bootstrap processor, and to a pin of the
/// IOAPIC (MP specification, section 3.6.2.2: virtual wire mode by either).
///
/// Input 0 going high posts to the inbox of vCPU 0, which then asks the PIC.
pub struct IntrPin {
    bus: Arc<ApicBus>,
    ioapic: Line,
}

impl IntrPin {
    /// The wire into `bus`, and to an input of the IOAPIC.
    pub fn new(bus: Arc<ApicBus>, ioapic: Line) -> Self {
        IntrPin { bus, ioapic }
    }
}

impl InterruptSink for IntrPin {
    fn set_level(&self, _input: u32, high: bool) {
        if let Some(inbox) = self.bus.inbox(VcpuId(0))
            && high
            && inbox.post_intr()
        {
            self.bus.kick.kick(inbox.vcpu());
        }
        self.ioapic.set(high);
    }
}
