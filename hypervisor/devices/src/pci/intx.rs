//! INTx: the level-triggered pins of PCI functions, and the lines that they share.
//!
//! A function drives its pin while it wants service, unless its driver has disabled INTx (PCI Local Bus
//! 3.0, section 6.2.2, command bit 10); status bit 3 shows the want either way. The pins of all functions are wired to
//! [`PCI_GSIS`] inputs of the machine's interrupt controllers, as [`pci_gsi`] says.

use alloc::sync::Arc;

use spin::Mutex;

use super::config::Command;
use crate::line::{InterruptSink, Line, WiredOr};
use crate::platform::{PCI_GSI_BASE, PCI_GSIS, pci_gsi};

#[derive(Clone, Copy)]
struct State {
    wanted: bool,
    disabled: bool,
}

/// A function's interrupt pin. Its lock comes after the device's and before the line's.
pub struct Intx {
    line: Line,
    state: Mutex<State>,
}

impl Intx {
    /// A pin that drives `line`, low.
    pub fn new(line: Line) -> Self {
        Intx {
            line,
            state: Mutex::new(State {
                wanted: false,
                disabled: false,
            }),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        let before = *state;
        change(&mut state);
        let level = |s: State| s.wanted && !s.disabled;
        if level(before) != level(*state) {
            self.line.set(level(*state));
        }
    }

    /// Whether the function wants service.
    pub fn set(&self, wanted: bool) {
        self.change(|state| state.wanted = wanted);
    }

    /// The guest wrote the command register.
    pub fn configure(&self, command: Command) {
        self.change(|state| state.disabled = command.interrupt_disable());
    }

    /// The interrupt status bit.
    pub fn status(&self) -> bool {
        self.state.lock().wanted
    }
}

/// Hands out the lines of a machine's PCI slots.
pub struct PciLines {
    shared: [Arc<WiredOr>; PCI_GSIS as usize],
    /// Next free input of each.
    next: [u32; PCI_GSIS as usize],
}

impl PciLines {
    /// The lines end at the inputs from [`PCI_GSI_BASE`] on of `router`.
    pub fn new(router: &Arc<dyn InterruptSink>) -> Self {
        let shared = |n: usize| {
            let input = PCI_GSI_BASE + n as u32;
            WiredOr::new(Line::new(router.clone(), input))
        };
        PciLines {
            shared: core::array::from_fn(shared),
            next: [0; PCI_GSIS as usize],
        }
    }

    /// A line for a function of `device` that uses INTA# (`pin` 0) to INTD# (3). At most 64 functions share one.
    pub fn line(&mut self, device: u8, pin: u8) -> Line {
        let n = ((pci_gsi(device, pin) - PCI_GSI_BASE) % PCI_GSIS) as usize;
        let input = self.next[n];
        self.next[n] += 1;
        Line::new(self.shared[n].clone(), input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingSink;

    #[test]
    fn a_shared_line_is_high_while_anyone_wants_and_may() {
        let sink = Arc::new(RecordingSink::default());
        let router: Arc<dyn InterruptSink> = sink.clone();
        let mut lines = PciLines::new(&router);
        // Eight lines: devices 1 and 9 share one.
        let (a, b) = (Intx::new(lines.line(1, 0)), Intx::new(lines.line(9, 0)));
        let other = Intx::new(lines.line(1, 1));
        a.set(true);
        a.set(true);
        b.set(true);
        other.set(true);
        assert_eq!(sink.take(), [(17, true), (18, true)]);
        a.set(false);
        assert_eq!(sink.take(), []);
        b.configure(Command::new().with_interrupt_disable(true));
        assert!(b.status());
        assert_eq!(sink.take(), [(17, false)]);
        b.configure(Command::new());
        assert_eq!(sink.take(), [(17, true)]);
        b.set(false);
        assert!(!b.status());
        assert_eq!(sink.take(), [(17, false)]);
    }
}
