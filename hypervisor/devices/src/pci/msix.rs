//! MSI-X: a table of messages in a BAR, one per vector (PCI Local Bus 3.0, section 6.8.2).
//!
//! A vector that is raised sends its entry's message, a write of the entry's data to its address, unless the
//! function may not send: the vector or the function is masked, or the function is no bus master. Then the
//! vector stays pending and is sent as soon as it may.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use core::sync::atomic::{AtomicBool, Ordering};

use bitfield_struct::bitfield;
use mem::Width;
use spin::Mutex;

use super::config::Command;
use crate::bus::IoError;
use crate::lapic::MessageSink;

/// Capability ID.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// Most vectors of a function here.
pub const MAX_VECTORS: u16 = 64;
/// Bytes of a table entry.
pub const ENTRY_LEN: u64 = 16;

/// Message control (figure 6-14).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct MessageControl {
    /// Number of the last vector.
    #[bits(11)]
    pub last: u16,
    #[bits(3)]
    __: u8,
    /// All vectors are masked.
    pub function_mask: bool,
    /// MSI-X is on, and INTx off.
    pub enabled: bool,
}

/// A table entry.
#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    /// Bit 0: masked. The rest is reserved.
    control: u32,
}

const ENTRY_MASKED: u32 = 1;

impl Entry {
    const RESET: Entry = Entry {
        address: 0,
        data: 0,
        control: ENTRY_MASKED,
    };
}

struct State {
    control: MessageControl,
    bus_master: bool,
    entries: Box<[Entry]>,
    /// A bit per vector.
    pending: u64,
}

impl State {
    /// Sends `vector`, or notes that it is to be sent.
    fn send(&mut self, vector: usize, sink: &dyn MessageSink) {
        let Some(entry) = self.entries.get(vector) else {
            return;
        };
        let masked = self.control.function_mask() || entry.control & ENTRY_MASKED != 0;
        if masked || !self.bus_master {
            self.pending |= 1 << vector;
        } else {
            self.pending &= !(1 << vector);
            sink.deliver_msi(entry.address, entry.data);
        }
    }

    /// Sends what is pending and may be sent now.
    fn service(&mut self, sink: &dyn MessageSink) {
        if self.control.enabled() {
            for vector in 0..self.entries.len() {
                if self.pending & 1 << vector != 0 {
                    self.send(vector, sink);
                }
            }
        }
    }
}

/// The MSI-X half of a function. Its lock comes after the device's and before the APIC's inboxes.
pub struct Msix {
    state: Mutex<State>,
    /// As in `state`, to be asked without the lock.
    enabled: AtomicBool,
    sink: Arc<dyn MessageSink>,
}

impl Msix {
    /// After reset: off, all vectors masked. `vectors` is 1 to [`MAX_VECTORS`], and is brought into that range.
    pub fn new(vectors: u16, sink: Arc<dyn MessageSink>) -> Self {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        Msix {
            state: Mutex::new(State {
                control: MessageControl::new().with_last(vectors - 1),
                bus_master: false,
                entries: vec![Entry::RESET; usize::from(vectors)].into(),
                pending: 0,
            }),
            enabled: AtomicBool::new(false),
            sink,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.state.lock().control.last() + 1
    }

    /// Body of the capability, and the mask of its writable bits, for
    /// [`ConfigSpace::add_capability`](super::ConfigSpace::add_capability). Table and pending bits are in
    /// BAR `bar` at these offsets, multiples of 8.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 10]) {
        let control = self.state.lock().control.into_bits().to_le_bytes();
        let place = |offset: u32| (offset & !7 | u32::from(bar & 7)).to_le_bytes();
        let writable = MessageControl::new()
            .with_function_mask(true)
            .with_enabled(true)
            .into_bits()
            .to_le_bytes();
        let (mut body, mut mask) = ([0; 10], [0; 10]);
        body[..2].copy_from_slice(&control);
        body[2..6].copy_from_slice(&place(table));
        body[6..].copy_from_slice(&place(pending));
        mask[..2].copy_from_slice(&writable);
        (body, mask)
    }

    /// The guest wrote the capability's message control or the command register: these are their values now.
    pub fn configure(&self, control: MessageControl, command: Command) {
        let mut state = self.state.lock();
        let last = state.control.last();
        state.control = control.with_last(last);
        state.bus_master = command.bus_master();
        self.enabled.store(control.enabled(), Ordering::Release);
        state.service(&*self.sink);
    }

    /// Whether it is on: the function uses no INTx then.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Raises a vector, if MSI-X is on and there is such a vector.
    pub fn raise(&self, vector: u16) {
        let mut state = self.state.lock();
        if state.control.enabled() {
            state.send(usize::from(vector), &*self.sink);
        }
    }

    /// Drops what is pending: the device was reset by its driver.
    pub fn forget_pending(&self) {
        self.state.lock().pending = 0;
    }

    /// Reads 4 or 8 aligned bytes of the table.
    #[must_use = "an error must become all-ones"]
    pub fn read_table(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        check_access(offset, width)?;
        let state = self.state.lock();
        let index = usize::try_from(offset / ENTRY_LEN).unwrap_or(usize::MAX);
        let entry = state.entries.get(index).ok_or(IoError::InvalidRegister)?;
        let whole = match offset & 8 {
            0 => entry.address,
            _ => u64::from(entry.control) << 32 | u64::from(entry.data),
        };
        Ok(whole >> (8 * (offset & 4)))
    }

    /// Writes 4 or 8 aligned bytes of the table. A pending vector is sent if this unmasks it.
    #[must_use = "an error must be counted"]
    pub fn write_table(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        check_access(offset, width)?;
        let mut state = self.state.lock();
        let index = usize::try_from(offset / ENTRY_LEN).unwrap_or(usize::MAX);
        let entry = state
            .entries
            .get_mut(index)
            .ok_or(IoError::InvalidRegister)?;
        let halves = [
            (offset & 0xc, value as u32),
            ((offset & 0xc) + 4, (value >> 32) as u32),
        ];
        for (at, half) in halves.into_iter().take(width.bytes() / 4) {
            match at {
                0 => entry.address = entry.address >> 32 << 32 | u64::from(half & !3),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(half) << 32,
                8 => entry.data = half,
                _ => entry.control = half & ENTRY_MASKED,
            }
        }
        state.service(&*self.sink);
        Ok(())
    }

    /// Reads 4 or 8 aligned bytes of the pending bits.
    #[must_use = "an error must become all-ones"]
    pub fn read_pending(&self, offset: u64, width: Width) -> Result<u64, IoError> {
        check_access(offset, width)?;
        match offset {
            0 | 4 => Ok(self.state.lock().pending >> (8 * offset)),
            _ => Err(IoError::InvalidRegister),
        }
    }
}

fn check_access(offset: u64, width: Width) -> Result<(), IoError> {
    if !matches!(width, Width::Dword | Width::Qword) {
        Err(IoError::InvalidWidth)
    } else if !offset.is_multiple_of(width.bytes() as u64) {
        Err(IoError::Unaligned)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Messages;
    use proptest::prelude::*;

    const ON: MessageControl = MessageControl::new().with_enabled(true);
    const MASTER: Command = Command::new().with_bus_master(true);

    fn setup() -> (Msix, Arc<Messages>) {
        let sink = Arc::new(Messages::default());
        let msix = Msix::new(3, sink.clone());
        for vector in 0..3 {
            let at = vector * 16;
            msix.write_table(at, Width::Qword, 0xfee0_0000).unwrap();
            // Data and, in the same write, unmasked.
            msix.write_table(at + 8, Width::Qword, 0x40 + vector)
                .unwrap();
        }
        (msix, sink)
    }

    #[test]
    fn a_vector_sends_its_message() {
        let (msix, sink) = setup();
        msix.raise(1);
        assert_eq!(sink.vectors(), [], "off");
        msix.configure(ON, MASTER);
        assert!(msix.enabled());
        assert_eq!(sink.vectors(), [], "nothing was kept while it was off");
        msix.raise(1);
        msix.raise(2);
        msix.raise(3);
        msix.raise(u16::MAX);
        assert_eq!(sink.vectors(), [0x41, 0x42]);
    }

    #[test]
    fn masked_vectors_stay_pending() {
        let (msix, sink) = setup();
        msix.configure(ON.with_function_mask(true), MASTER);
        msix.raise(0);
        msix.raise(0);
        msix.write_table(2 * 16 + 12, Width::Dword, u64::MAX)
            .unwrap();
        msix.raise(2);
        assert_eq!(msix.read_pending(0, Width::Qword), Ok(0b101));
        assert_eq!(msix.read_table(2 * 16 + 12, Width::Dword), Ok(1));
        assert_eq!(sink.vectors(), []);
        msix.configure(ON, MASTER);
        assert_eq!(sink.vectors(), [0x40], "once; vector 2 is masked itself");
        // A new message while masked: the one that is sent has the new data.
        msix.write_table(2 * 16 + 8, Width::Dword, 0x55).unwrap();
        assert_eq!(sink.vectors(), []);
        msix.write_table(2 * 16 + 12, Width::Dword, 0).unwrap();
        assert_eq!(sink.vectors(), [0x55]);
        assert_eq!(msix.read_pending(0, Width::Dword), Ok(0));
    }

    #[test]
    fn only_a_bus_master_sends() {
        let (msix, sink) = setup();
        msix.configure(ON, Command::new());
        msix.raise(0);
        msix.raise(1);
        assert_eq!(sink.vectors(), []);
        msix.configure(ON, MASTER);
        assert_eq!(sink.vectors(), [0x40, 0x41]);
        msix.configure(ON, Command::new());
        msix.raise(1);
        msix.forget_pending();
        msix.configure(ON, MASTER);
        assert_eq!(sink.vectors(), []);
    }

    #[test]
    fn table_shapes() {
        let (msix, _) = setup();
        assert_eq!(msix.vectors(), 3);
        msix.write_table(4, Width::Dword, 0x1234).unwrap();
        msix.write_table(0, Width::Dword, 0xfee0_1003).unwrap();
        assert_eq!(msix.read_table(0, Width::Qword), Ok(0x1234_fee0_1000));
        assert_eq!(msix.read_table(4, Width::Dword), Ok(0x1234));
        assert_eq!(msix.read_table(0, Width::Word), Err(IoError::InvalidWidth));
        assert_eq!(msix.read_table(4, Width::Qword), Err(IoError::Unaligned));
        let beyond = Err(IoError::InvalidRegister);
        assert_eq!(msix.read_table(48, Width::Dword), beyond);
        assert_eq!(msix.read_pending(8, Width::Dword), beyond);
        assert_eq!(
            msix.write_table(u64::MAX - 7, Width::Qword, 0),
            Err(IoError::InvalidRegister)
        );
        let (body, mask) = msix.capability(4, 0x2000, 0x3000);
        assert_eq!(body, [2, 0, 4, 0x20, 0, 0, 4, 0x30, 0, 0]);
        assert_eq!(mask, [0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        /// Whatever the guest does, one access or raise sends each vector at most once, and a vector that
        /// was raised while MSI-X is on is sent or pending.
        #[test]
        fn nothing_is_lost_or_doubled(
            steps in proptest::collection::vec((0u8..4, 0u64..64, any::<u64>()), 0..200),
        ) {
            let (msix, sink) = setup();
            for (kind, at, value) in steps {
                let control = MessageControl::from_bits(value as u16);
                match kind {
                    0 => {
                        let before = msix.read_pending(0, Width::Qword).unwrap();
                        msix.raise(at as u16 % 3);
                        let after = msix.read_pending(0, Width::Qword).unwrap();
                        let sent = sink.vectors().len();
                        let noted = after & 1 << (at % 3) != 0;
                        prop_assert!(!msix.enabled() || sent == 1 || noted);
                        prop_assert_eq!(before & !(1 << (at % 3)), after & !(1 << (at % 3)));
                    }
                    1 => msix.configure(control, Command::from_bits((value >> 16) as u16)),
                    // Data or mask: the address stays one that interrupts.
                    2 => { let _ = msix.write_table(at & !3 | 8, Width::Dword, value); }
                    _ => { let _ = msix.read_table(at, Width::Qword); }
                }
                prop_assert!(sink.vectors().len() <= 3);
            }
        }
    }
}
