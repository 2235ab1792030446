//! What others may do to a local APIC: post to it and match its identity. Atomics only.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use bitfield_struct::bitfield;
use bitflags::bitflags;

use super::message::Trigger;
use crate::VcpuId;

/// Words of 64 bits that have a bit for each vector.
pub(super) const VECTOR_WORDS: usize = 4;

bitflags! {
    /// Why a vCPU must look at its inbox.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Pending: u32 {
        /// `irr` has bits.
        const INTERRUPT = 1 << 0;
        const NMI = 1 << 1;
        const INIT = 1 << 2;
        /// A start-up IPI; its vector is in bits 15:8.
        const STARTUP = 1 << 3;
        /// The 8259A's INTR output went high.
        const INTR = 1 << 4;
        /// A message with a vector below 16 came in.
        const ILLEGAL_VECTOR = 1 << 5;
        /// An ExtINT message came in.
        const EXTINT = 1 << 6;
        /// A second NMI came.
        const NMI_AGAIN = 1 << 7;
        /// The vector of STARTUP.
        const STARTUP_VECTOR = 0xff << 8;
    }
}

/// What senders must know of a receiver to match a destination; one word, read at once.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Identity {
    /// APIC ID: 8 bits in xAPIC mode.
    pub id: u32,
    /// xAPIC logical ID (LDR bits 31:24).
    pub logical: u8,
    /// xAPIC destination model is flat, not cluster (DFR).
    pub flat: bool,
    /// On in IA32_APIC_BASE.
    pub enabled: bool,
    /// In x2APIC mode.
    pub x2apic: bool,
    /// On in SVR: takes fixed and lowest-priority interrupts.
    pub software_enabled: bool,
    #[bits(20)]
    __: u32,
}

impl Identity {
    /// Whether an 8-bit (xAPIC receiver) or 32-bit (x2APIC receiver) logical destination names this
    /// processor (SDM vol. 3A, sections 11.6.2.2 and 11.12.10).
    pub fn matches_logical(self, destination: u32) -> bool {
        if self.x2apic() {
            let logical = x2apic_logical_id(self.id());
            logical >> 16 == destination >> 16 && logical & destination & 0xffff != 0
        } else if destination > 0xff {
            false
        } else if self.flat() {
            destination as u8 & self.logical() != 0
        } else {
            let (cluster, members) = (destination as u8 >> 4, destination as u8 & 0xf);
            (cluster == 0xf || cluster == self.logical() >> 4) && members & self.logical() != 0
        }
    }

    /// Whether a physical destination names this processor.
    pub fn matches_physical(self, destination: u32) -> bool {
        self.id() == destination
    }
}

/// The x2APIC's logical ID, a function of its APIC ID (SDM vol. 3A, section 11.12.10.2).
pub(super) const fn x2apic_logical_id(id: u32) -> u32 {
    ((id & 0xf_fff0) << 12) | (1 << (id & 0xf))
}

/// Signals other than vectored interrupts, taken from an inbox in one go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "signals are lost if not acted on"]
pub struct Signals {
    /// Non-maskable interrupts: 2 stands for any more, since a processor keeps one while it handles another.
    pub nmis: u8,
    /// INIT; comes before `startup`.
    pub init: bool,
    /// Start-up IPI with its vector. Ignored unless the processor waits for one.
    pub startup: Option<u8>,
}

impl Signals {
    pub(super) fn add_nmis(&mut self, nmis: u8) {
        self.nmis = self.nmis.saturating_add(nmis).min(2);
    }

    /// Whether nothing came.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// Posted work for one local APIC, and the identity by which senders find it.
///
/// Posting writes the detail first, then the flag (release); draining takes the flag first
/// (acquire), then the detail. So a flag that is set means detail may be there, and detail
/// posted is never left without a flag.
pub struct ApicInbox {
    vcpu: VcpuId,
    pending: AtomicU32,
    irr: [AtomicU64; VECTOR_WORDS],
    /// Trigger mode of the bits in `irr`: 1 is level.
    tmr: [AtomicU64; VECTOR_WORDS],
    identity: AtomicU64,
    /// Task priority, for lowest-priority arbitration.
    priority: AtomicU8,
}

impl ApicInbox {
    pub(super) fn new(vcpu: VcpuId, apic_id: u32) -> Self {
        ApicInbox {
            vcpu,
            pending: AtomicU32::new(0),
            irr: Default::default(),
            tmr: Default::default(),
            identity: AtomicU64::new(
                Identity::new()
                    .with_id(apic_id & 0xff)
                    .with_flat(true)
                    .with_enabled(true)
                    .into_bits(),
            ),
            priority: AtomicU8::new(0),
        }
    }

    /// Whose inbox this is.
    pub fn vcpu(&self) -> VcpuId {
        self.vcpu
    }

    /// The identity as last published by the owner.
    pub fn identity(&self) -> Identity {
        Identity::from_bits(self.identity.load(Ordering::Relaxed))
    }

    /// Whether anything was posted since the owner last drained. One load; poll it freely.
    pub fn has_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire) != 0
    }

    /// Posts a vectored interrupt. Returns whether the vCPU needs a kick (nothing was pending before).
    #[must_use = "a kick may be due"]
    pub fn post_interrupt(&self, vector: u8, trigger: Trigger) -> bool {
        let word = usize::from(vector / 64);
        let bit = 1 << (vector % 64);
        match trigger {
            Trigger::Edge => self.tmr[word].fetch_and(!bit, Ordering::Relaxed),
            Trigger::Level => self.tmr[word].fetch_or(bit, Ordering::Relaxed),
        };
        self.irr[word].fetch_or(bit, Ordering::Release);
        self.flag(Pending::INTERRUPT)
    }

    /// Posts an NMI.
    #[must_use = "a kick may be due"]
    pub fn post_nmi(&self) -> bool {
        self.update(|p| {
            if p.contains(Pending::NMI) {
                p | Pending::NMI_AGAIN
            } else {
                p | Pending::NMI
            }
        })
    }

    /// Posts an INIT. Takes back a start-up IPI that came before it.
    #[must_use = "a kick may be due"]
    pub fn post_init(&self) -> bool {
        self.update(|p| (p - Pending::STARTUP - Pending::STARTUP_VECTOR) | Pending::INIT)
    }

    /// Posts a start-up IPI. The first of several wins.
    #[must_use = "a kick may be due"]
    pub fn post_startup(&self, vector: u8) -> bool {
        self.update(|p| {
            if p.contains(Pending::STARTUP) {
                p
            } else {
                p | Pending::STARTUP | Pending::from_bits_retain(u32::from(vector) << 8)
            }
        })
    }

    /// Says that the 8259A's INTR output, wired to LINT0, went high.
    #[must_use = "a kick may be due"]
    pub fn post_intr(&self) -> bool {
        self.flag(Pending::INTR)
    }

    pub(super) fn post_extint(&self) -> bool {
        self.flag(Pending::EXTINT)
    }

    pub(super) fn post_illegal_vector(&self) -> bool {
        self.flag(Pending::ILLEGAL_VECTOR)
    }

    fn flag(&self, flag: Pending) -> bool {
        self.pending.fetch_or(flag.bits(), Ordering::AcqRel) == 0
    }

    fn update(&self, f: impl Fn(Pending) -> Pending) -> bool {
        let change = |p| Some(f(Pending::from_bits_retain(p)).bits());
        // The closure never says no, so both arms carry the previous value.
        match self
            .pending
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, change)
        {
            Ok(before) | Err(before) => before == 0,
        }
    }

    /// Takes all flags; for the owner.
    pub(super) fn take(&self) -> Taken {
        Taken(Pending::from_bits_retain(
            self.pending.swap(0, Ordering::AcqRel),
        ))
    }

    /// Takes word `word` of the posted interrupts: request bits, and their trigger modes.
    pub(super) fn take_word(&self, word: usize) -> (u64, u64) {
        if self.irr[word].load(Ordering::Relaxed) == 0 {
            return (0, 0);
        }
        let irr = self.irr[word].swap(0, Ordering::Acquire);
        (irr, self.tmr[word].load(Ordering::Relaxed) & irr)
    }

    /// Like `take_word`, without taking.
    pub(super) fn peek_word(&self, word: usize) -> (u64, u64) {
        let irr = self.irr[word].load(Ordering::Acquire);
        (irr, self.tmr[word].load(Ordering::Relaxed) & irr)
    }

    pub(super) fn publish(&self, identity: Identity) {
        self.identity.store(identity.into_bits(), Ordering::Release);
    }

    pub(super) fn publish_priority(&self, tpr: u8) {
        self.priority.store(tpr, Ordering::Relaxed);
    }

    pub(super) fn priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed)
    }
}

/// Flags taken from an inbox.
#[derive(Clone, Copy)]
pub(super) struct Taken(Pending);

impl Taken {
    /// There are posted interrupts.
    pub(super) fn has_interrupts(self) -> bool {
        self.0.contains(Pending::INTERRUPT)
    }

    /// There is something else, too.
    pub(super) fn has_more(self) -> bool {
        !(self.0 - Pending::INTERRUPT).is_empty()
    }

    pub(super) fn signals(self) -> Signals {
        Signals {
            nmis: u8::from(self.0.contains(Pending::NMI))
                + u8::from(self.0.contains(Pending::NMI_AGAIN)),
            init: self.0.contains(Pending::INIT),
            startup: self
                .0
                .contains(Pending::STARTUP)
                .then(|| (self.0.bits() >> 8) as u8),
        }
    }

    /// A message with a vector below 16 came in.
    pub(super) fn has_illegal_vector(self) -> bool {
        self.0.contains(Pending::ILLEGAL_VECTOR)
    }

    /// The 8259A's INTR output went high.
    pub(super) fn has_intr(self) -> bool {
        self.0.contains(Pending::INTR)
    }

    /// An ExtINT message came in.
    pub(super) fn has_extint(self) -> bool {
        self.0.contains(Pending::EXTINT)
    }
}
