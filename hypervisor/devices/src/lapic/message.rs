//! An interrupt message: what an ICR write, an IOAPIC pin or an MSI puts on the bus.

/// How an interrupt is delivered (SDM vol. 3A, sections 11.5.1 and 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    /// To every destination, at the given vector.
    Fixed = 0,
    /// To one of the destinations, the one with the lowest priority.
    LowestPriority = 1,
    /// System management interrupt; no guest of ours has SMM, so it is dropped.
    Smi = 2,
    /// Reserved encoding.
    Reserved = 3,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// Processor initialisation.
    Init = 5,
    /// Start-up IPI: the vector is the page to start at. In an LVT or IOAPIC: reserved.
    StartUp = 6,
    /// The vector comes from the 8259A.
    ExtInt = 7,
}

impl DeliveryMode {
    /// The mode of a 3-bit field; higher bits are ignored.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }

    /// The 3-bit field.
    pub const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// Trigger mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The request is an event.
    Edge,
    /// The request is a level: the EOI is broadcast to the IOAPICs.
    Level,
}

/// Whom a message is for (SDM vol. 3A, section 11.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The processor with this APIC ID.
    Physical(u32),
    /// The processors whose logical ID matches: 8 bits for xAPIC, 32 for x2APIC receivers.
    Logical(u32),
    /// All processors.
    All,
    /// All but the sender.
    AllButSender,
}

impl Destination {
    /// An 8-bit destination (xAPIC ICR, IOAPIC, MSI): 0xff is everyone, in either mode.
    pub const fn narrow(id: u8, logical: bool) -> Self {
        match (id, logical) {
            (0xff, _) => Self::All,
            (id, true) => Self::Logical(id as u32),
            (id, false) => Self::Physical(id as u32),
        }
    }

    /// A 32-bit destination (x2APIC ICR): 0xffff_ffff is everyone, in either mode (section 11.12.9).
    pub const fn wide(id: u32, logical: bool) -> Self {
        match (id, logical) {
            (u32::MAX, _) => Self::All,
            (id, true) => Self::Logical(id),
            (id, false) => Self::Physical(id),
        }
    }
}

/// A message on the APIC bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// For whom.
    pub destination: Destination,
    /// How.
    pub mode: DeliveryMode,
    /// Which vector; meaningless for NMI, SMI and INIT.
    pub vector: u8,
    /// Edge or level.
    pub trigger: Trigger,
    /// Asserted. Only an INIT de-assert is not; receivers ignore it (section 11.6.1).
    pub assert: bool,
}

impl Message {
    /// The message of an MSI write (SDM vol. 3A, section 11.11).
    ///
    /// `address` is the guest-physical address written, `data` the 32 bits written there.
    /// `None` if the address is not in the interrupt range 0xFEEx_xxxx.
    pub const fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let logical = address & (1 << 2) != 0;
        let level = data & (1 << 15) != 0;
        Some(Message {
            // The redirection hint (bit 3) adds nothing: the delivery mode says whether one or all
            // of the destinations get it, and systems set the destination mode without the hint.
            destination: Destination::narrow((address >> 12) as u8, logical),
            mode: DeliveryMode::from_bits((data >> 8) as u8),
            vector: data as u8,
            trigger: if level { Trigger::Level } else { Trigger::Edge },
            assert: !level || data & (1 << 14) != 0,
        })
    }
}
