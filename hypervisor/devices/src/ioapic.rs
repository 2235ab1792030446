//! The IOAPIC: 24 pins, each with an entry that says which message it sends.
//!
//! After Intel's 82093AA data sheet, with the EOI register of its successors (version 0x20).
//! A level-triggered pin sends once and then waits (remote IRR) for the EOI of its vector.

use alloc::sync::Arc;

use bitfield_struct::bitfield;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, MmioDevice};
use crate::lapic::{DeliveryMode, Destination, Message, MessageSink, Trigger};
use crate::line::InterruptSink;

/// Guest-physical address of the registers on a PC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of the register page.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Interrupt inputs.
pub const PINS: usize = 24;

const VERSION: u32 = 0x20;

/// A redirection table entry (82093AA, section 3.2.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Entry {
    vector: u8,
    #[bits(3)]
    mode_bits: u8,
    logical: bool,
    delivery_pending: bool,
    active_low: bool,
    remote_irr: bool,
    level: bool,
    masked: bool,
    #[bits(39)]
    __: u64,
    destination: u8,
}

impl Entry {
    const RESET: Entry = Entry::new().with_masked(true);
    const WRITABLE: Entry = Entry::new()
        .with_vector(0xff)
        .with_mode_bits(7)
        .with_logical(true)
        .with_active_low(true)
        .with_level(true)
        .with_masked(true)
        .with_destination(0xff);

    fn message(self) -> Message {
        Message {
            destination: Destination::narrow(self.destination(), self.logical()),
            mode: DeliveryMode::from_bits(self.mode_bits()),
            vector: self.vector(),
            trigger: if self.level() {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            assert: true,
        }
    }
}

/// A register by its index.
enum Register {
    Id,
    Version,
    Arbitration,
    /// Pin, and whether the high half is meant.
    Entry(usize, bool),
}

impl Register {
    fn from_index(index: u8) -> Option<Self> {
        match index {
            0 => Some(Self::Id),
            1 => Some(Self::Version),
            2 => Some(Self::Arbitration),
            0x10..=0x3f => {
                let at = usize::from(index - 0x10);
                Some(Self::Entry(at / 2, at % 2 == 1))
            }
            _ => None,
        }
    }
}

struct State {
    index: u8,
    id: u8,
    entries: [Entry; PINS],
    /// Asserted pins.
    levels: u32,
}

/// The IOAPIC of a VM.
pub struct IoApic {
    state: Mutex<State>,
    sink: Arc<dyn MessageSink>,
}

impl IoApic {
    /// After reset: all pins masked. Messages go to `sink`; `id` is the APIC ID register's first
    /// value, 0 to 15.
    pub fn new(id: u8, sink: Arc<dyn MessageSink>) -> Arc<Self> {
        Arc::new(IoApic {
            state: Mutex::new(State {
                index: 0,
                id: id & 0xf,
                entries: [Entry::RESET; PINS],
                levels: 0,
            }),
            sink,
        })
    }

    /// A processor ended the level-triggered interrupt `vector`: pins that wait for it may send
    /// again, and do if they are still asserted.
    pub fn eoi(&self, vector: u8) {
        let mut state = self.state.lock();
        for pin in 0..PINS {
            let entry = &mut state.entries[pin];
            if entry.level() && entry.remote_irr() && entry.vector() == vector {
                entry.set_remote_irr(false);
                self.service_level(&mut state, pin);
            }
        }
    }

    /// Sends for a level-triggered pin that is asserted, open and not waiting for an EOI.
    fn service_level(&self, state: &mut State, pin: usize) {
        let asserted = state.levels & (1 << pin) != 0;
        let entry = &mut state.entries[pin];
        if asserted && entry.level() && !entry.masked() && !entry.remote_irr() {
            // Set when a local APIC accepts it (section 3.2.4, bit 14): what nobody takes, nobody ends.
            // Only vectored messages are ended by an EOI.
            let accepted = self.sink.deliver(&entry.message());
            let mode = DeliveryMode::from_bits(entry.mode_bits());
            let vectored = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
            entry.set_remote_irr(accepted && vectored);
        }
    }

    fn read_register(state: &State) -> u32 {
        match Register::from_index(state.index) {
            Some(Register::Id | Register::Arbitration) => u32::from(state.id) << 24,
            Some(Register::Version) => VERSION | (PINS as u32 - 1) << 16,
            Some(Register::Entry(pin, high)) => {
                let bits = state.entries[pin].into_bits();
                if high {
                    (bits >> 32) as u32
                } else {
                    bits as u32
                }
            }
            None => 0,
        }
    }

    fn write_register(&self, state: &mut State, value: u32) {
        match Register::from_index(state.index) {
            Some(Register::Id) => state.id = (value >> 24) as u8 & 0xf,
            Some(Register::Entry(pin, high)) => {
                let old = state.entries[pin].into_bits();
                let merged = if high {
                    (old & u64::from(u32::MAX)) | u64::from(value) << 32
                } else {
                    (old & !u64::from(u32::MAX)) | u64::from(value)
                };
                let writable = Entry::WRITABLE.into_bits();
                let mut entry = Entry::from_bits((old & !writable) | (merged & writable));
                if !entry.level() {
                    // Switching to edge is how an EOI is forced where there is no EOI register.
                    entry.set_remote_irr(false);
                }
                state.entries[pin] = entry;
                self.service_level(state, pin);
            }
            // Read-only, or none.
            Some(Register::Version | Register::Arbitration) | None => {}
        }
    }
}

impl InterruptSink for IoApic {
    fn set_level(&self, input: u32, high: bool) {
        let pin = input as usize;
        if pin >= PINS {
            return;
        }
        let mut state = self.state.lock();
        let bit = 1 << pin;
        let rising = high && state.levels & bit == 0;
        if high {
            state.levels |= bit;
        } else {
            state.levels &= !bit;
        }
        let entry = state.entries[pin];
        if entry.level() {
            self.service_level(&mut state, pin);
        } else if rising && !entry.masked() {
            // An edge on a masked pin is lost (82093AA, section 3.2.4, bit 16).
            self.sink.deliver(&entry.message());
        }
    }
}

impl MmioDevice for IoApic {
    fn read(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        let state = self.state.lock();
        match (offset, width) {
            (0, Width::Byte | Width::Word | Width::Dword) => Ok(u64::from(state.index)),
            (0x10, Width::Dword) => Ok(u64::from(Self::read_register(&state))),
            (0 | 0x10, _) => Err(IoError::InvalidWidth),
            _ => Err(IoError::InvalidRegister),
        }
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        match (offset, width) {
            (0, Width::Byte | Width::Word | Width::Dword) => {
                self.state.lock().index = value as u8;
                Ok(())
            }
            (0x10, Width::Dword) => {
                self.write_register(&mut self.state.lock(), value as u32);
                Ok(())
            }
            (0x40, Width::Byte | Width::Word | Width::Dword) => {
                self.eoi(value as u8);
                Ok(())
            }
            (0 | 0x10 | 0x40, _) => Err(IoError::InvalidWidth),
            _ => Err(IoError::InvalidRegister),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// Takes what has a vector below 0xf0.
    #[derive(Default)]
    struct Messages(Mutex<Vec<Message>>);

    impl MessageSink for Messages {
        fn deliver(&self, message: &Message) -> bool {
            self.0.lock().push(*message);
            message.vector < 0xf0
        }
    }

    impl Messages {
        fn vectors(&self) -> Vec<u8> {
            core::mem::take(&mut *self.0.lock())
                .iter()
                .map(|m| m.vector)
                .collect()
        }
    }

    fn setup() -> (Arc<IoApic>, Arc<Messages>) {
        let sink = Arc::new(Messages::default());
        (IoApic::new(0, sink.clone()), sink)
    }

    fn read(ioapic: &IoApic, index: u8) -> u32 {
        ioapic.write(0, Width::Dword, u64::from(index)).unwrap();
        ioapic.read(0x10, Width::Dword).unwrap() as u32
    }

    fn write(ioapic: &IoApic, index: u8, value: u32) {
        ioapic.write(0, Width::Dword, u64::from(index)).unwrap();
        ioapic.write(0x10, Width::Dword, u64::from(value)).unwrap();
    }

    #[test]
    fn registers_after_reset() {
        let (ioapic, _) = setup();
        assert_eq!(read(&ioapic, 1), 0x0017_0020);
        for pin in 0..24 {
            assert_eq!(read(&ioapic, 0x10 + 2 * pin), 0x1_0000);
            assert_eq!(read(&ioapic, 0x11 + 2 * pin), 0);
        }
        write(&ioapic, 0, 0xff00_0000);
        assert_eq!(read(&ioapic, 0), 0x0f00_0000);
        write(&ioapic, 1, 0);
        assert_eq!(read(&ioapic, 1), 0x0017_0020);
        assert_eq!(read(&ioapic, 0x40), 0);
    }

    #[test]
    fn edges_are_sent_once_each_and_lost_while_masked() {
        let (ioapic, sink) = setup();
        ioapic.set_level(4, true);
        ioapic.set_level(4, false);
        write(&ioapic, 0x18, 0x34);
        assert_eq!(sink.vectors(), []);
        ioapic.set_level(4, true);
        ioapic.set_level(4, true);
        ioapic.set_level(4, false);
        ioapic.set_level(4, true);
        assert_eq!(sink.vectors(), [0x34, 0x34]);
        ioapic.set_level(24, true);
        ioapic.set_level(u32::MAX, true);
        assert_eq!(sink.vectors(), []);
    }

    #[test]
    fn entry_fields_become_the_message() {
        let (ioapic, sink) = setup();
        write(&ioapic, 0x15, 0x0300_0000);
        write(&ioapic, 0x14, 0x0930);
        ioapic.set_level(2, true);
        let message = sink.0.lock()[0];
        assert_eq!(
            message,
            Message {
                destination: Destination::Logical(3),
                mode: DeliveryMode::LowestPriority,
                vector: 0x30,
                trigger: Trigger::Edge,
                assert: true,
            }
        );
    }

    #[test]
    fn levels_wait_for_the_eoi() {
        let (ioapic, sink) = setup();
        ioapic.set_level(16, true);
        write(&ioapic, 0x30, 0xa041);
        assert_eq!(sink.vectors(), [0x41], "unmasked while asserted");
        assert_eq!(read(&ioapic, 0x30), 0xe041, "remote IRR");
        ioapic.set_level(16, false);
        ioapic.set_level(16, true);
        ioapic.eoi(0x42);
        assert_eq!(sink.vectors(), []);
        ioapic.eoi(0x41);
        assert_eq!(sink.vectors(), [0x41], "still asserted: sent again");
        ioapic.set_level(16, false);
        ioapic.write(0x40, Width::Dword, 0x41).unwrap();
        assert_eq!(read(&ioapic, 0x30), 0xa041);
        assert_eq!(sink.vectors(), []);
    }

    #[test]
    fn a_masked_level_is_sent_on_unmask_and_edge_mode_clears_remote_irr() {
        let (ioapic, sink) = setup();
        write(&ioapic, 0x30, 0x1_8041);
        ioapic.set_level(16, true);
        assert_eq!(sink.vectors(), []);
        write(&ioapic, 0x30, 0x8041);
        assert_eq!(sink.vectors(), [0x41]);
        // Linux's EOI without EOI register: mask, edge, then the entry again.
        write(&ioapic, 0x30, 0x1_0041);
        assert_eq!(read(&ioapic, 0x30) & 1 << 14, 0);
        write(&ioapic, 0x30, 0x8041);
        assert_eq!(sink.vectors(), [0x41]);
    }

    #[test]
    fn a_level_that_nobody_takes_waits_for_no_eoi() {
        let (ioapic, sink) = setup();
        ioapic.set_level(16, true);
        write(&ioapic, 0x30, 0x80f1);
        assert_eq!(sink.vectors(), [0xf1]);
        assert_eq!(read(&ioapic, 0x30), 0x80f1, "no remote IRR");
        // Where somebody takes it, it is delivered.
        write(&ioapic, 0x30, 0x8041);
        assert_eq!(sink.vectors(), [0x41]);
        assert_eq!(read(&ioapic, 0x30), 0xc041);
    }

    #[test]
    fn access_shapes() {
        let (ioapic, _) = setup();
        ioapic.write(0, Width::Dword, 0x1234).unwrap();
        assert_eq!(ioapic.read(0, Width::Byte), Ok(0x34));
        assert_eq!(ioapic.read(0x10, Width::Word), Err(IoError::InvalidWidth));
        assert_eq!(
            ioapic.read(0x20, Width::Dword),
            Err(IoError::InvalidRegister)
        );
        assert_eq!(
            ioapic.write(0x10, Width::Byte, 0),
            Err(IoError::InvalidWidth)
        );
        assert_eq!(
            ioapic.write(0x14, Width::Dword, 0),
            Err(IoError::InvalidRegister)
        );
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in proptest::collection::vec((0u8..4, any::<u8>(), any::<u32>()), 0..200),
        ) {
            let (ioapic, sink) = setup();
            for (kind, a, value) in steps {
                match kind {
                    0 => write(&ioapic, a % 0x44, value),
                    1 => { read(&ioapic, a); }
                    2 => ioapic.set_level(u32::from(a) % 32, value & 1 != 0),
                    _ => ioapic.eoi(a),
                }
                // One access sends at most once per pin.
                prop_assert!(sink.vectors().len() <= PINS);
            }
        }
    }
}
