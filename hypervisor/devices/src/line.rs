//! Interrupt lines: objects that a device is given and drives high or low.
//!
//! High means asserted. Whether the wire is active-high or active-low is the wiring's
//! affair and is not modelled, so the controllers store polarity bits but do not use them.
//!
//! A [`Line`] is one input of an [`InterruptSink`]. [`GsiRouter`] is the wiring of a PC's
//! mainboard: an ISA IRQ reaches both the PIC and the IOAPIC.

use alloc::sync::Arc;
use core::fmt;

use spin::Mutex;

/// Something with numbered interrupt inputs: PIC, IOAPIC, router.
pub trait InterruptSink: Send + Sync {
    /// Asserts (`high`) or releases `input`. Idempotent; inputs out of range are ignored.
    fn set_level(&self, input: u32, high: bool);
}

/// One interrupt input, as a device holds it.
#[derive(Clone)]
pub struct Line {
    sink: Arc<dyn InterruptSink>,
    input: u32,
}

impl Line {
    /// The line to `input` of `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>, input: u32) -> Self {
        Line { sink, input }
    }

    /// A line that leads nowhere.
    pub fn disconnected() -> Self {
        struct Nowhere;
        impl InterruptSink for Nowhere {
            fn set_level(&self, _input: u32, _high: bool) {}
        }
        Line::new(Arc::new(Nowhere), 0)
    }

    /// Drives the line high.
    pub fn raise(&self) {
        self.sink.set_level(self.input, true);
    }

    /// Drives the line low.
    pub fn lower(&self) {
        self.sink.set_level(self.input, false);
    }

    /// Drives the line to a level.
    pub fn set(&self, high: bool) {
        self.sink.set_level(self.input, high);
    }

    /// One edge: high, then low.
    pub fn pulse(&self) {
        self.raise();
        self.lower();
    }

    /// The input's number at its sink.
    pub fn input(&self) -> u32 {
        self.input
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Line({})", self.input)
    }
}

/// ISA IRQs of a PC: 0 to 15.
pub const ISA_IRQS: u32 = 16;
/// The IOAPIC pin that the PIT's IRQ 0 is wired to; the MADT announces it as an override.
pub const TIMER_GSI: u32 = 2;

/// Mainboard wiring: inputs 0 to 15 are ISA IRQs, inputs from 16 are IOAPIC pins alone.
///
/// ISA IRQ n drives PIC input n and IOAPIC pin n, but IRQ 0 drives pin 2 ([`TIMER_GSI`]),
/// and IRQ 2, the PIC's cascade, is no device's line and goes nowhere. Pin 0 is the PIC's output
/// ([`crate::lapic::IntrPin`]).
pub struct GsiRouter {
    pic: Arc<dyn InterruptSink>,
    ioapic: Arc<dyn InterruptSink>,
}

impl GsiRouter {
    /// Wires up the two controllers.
    pub fn new(pic: Arc<dyn InterruptSink>, ioapic: Arc<dyn InterruptSink>) -> Self {
        GsiRouter { pic, ioapic }
    }
}

impl InterruptSink for GsiRouter {
    fn set_level(&self, input: u32, high: bool) {
        match input {
            0 => {
                self.pic.set_level(0, high);
                self.ioapic.set_level(TIMER_GSI, high);
            }
            TIMER_GSI => {}
            1..ISA_IRQS => {
                self.pic.set_level(input, high);
                self.ioapic.set_level(input, high);
            }
            _ => self.ioapic.set_level(input, high),
        }
    }
}

/// Several devices on one interrupt input: it is asserted while any of them asserts it.
///
/// Inputs 0 to 63 are the devices'. The lock comes after a device's and before a controller's.
pub struct WiredOr {
    asserted: Mutex<u64>,
    target: Line,
}

impl WiredOr {
    /// Devices share `target`.
    pub fn new(target: Line) -> Arc<Self> {
        Arc::new(WiredOr {
            asserted: Mutex::new(0),
            target,
        })
    }
}

impl InterruptSink for WiredOr {
    fn set_level(&self, input: u32, high: bool) {
        let Some(bit) = 1u64.checked_shl(input) else {
            return;
        };
        let mut asserted = self.asserted.lock();
        if high {
            *asserted |= bit;
        } else {
            *asserted &= !bit;
        }
        self.target.set(*asserted != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingSink;

    #[test]
    fn a_shared_input_falls_with_the_last_device() {
        let sink = Arc::new(RecordingSink::default());
        let shared = WiredOr::new(Line::new(sink.clone(), 17));
        let (a, b) = (Line::new(shared.clone(), 0), Line::new(shared.clone(), 63));
        a.raise();
        b.raise();
        a.lower();
        assert_eq!(sink.take(), [(17, true)]);
        b.lower();
        Line::new(shared, 64).raise();
        assert_eq!(sink.take(), [(17, false)]);
    }

    #[test]
    fn isa_irqs_reach_both_controllers() {
        let pic = Arc::new(RecordingSink::default());
        let ioapic = Arc::new(RecordingSink::default());
        let router: Arc<dyn InterruptSink> = Arc::new(GsiRouter::new(pic.clone(), ioapic.clone()));
        Line::new(router.clone(), 0).raise();
        Line::new(router.clone(), 4).pulse();
        Line::new(router.clone(), 2).raise();
        Line::new(router, 17).raise();
        assert_eq!(pic.take(), [(0, true), (4, true), (4, false)]);
        assert_eq!(
            ioapic.take(),
            [(2, true), (4, true), (4, false), (17, true)]
        );
    }
}
