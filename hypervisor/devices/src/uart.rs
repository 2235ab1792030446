//! A 16550A UART with FIFOs, as on a PC's COM ports.
//!
//! After National's PC16550D data sheet. The line is as fast as the sink takes bytes. While it
//! takes none, the guest sees a transmitter at work: what it writes waits in the transmit FIFO, as
//! on a PC with a slow line, until the sink's owner calls [`Uart::resume`]. What the host sends
//! waits in a bounded queue and enters the receive FIFO as the guest makes room, so the receiver
//! overruns in loopback only. As on a PC, MCR.OUT2 connects the interrupt to its line.

use alloc::collections::VecDeque;
use alloc::sync::Arc;

use bitfield_struct::bitfield;
use bitflags::bitflags;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, PortDevice, byte_only};
use crate::line::Line;

/// Ports of a UART.
pub const UART_PORTS: u16 = 8;
/// Bytes the receive FIFO holds.
const FIFO_DEPTH: usize = 16;
/// Bytes of host input that wait for room in the FIFO.
const BACKLOG: usize = 4096;

/// Where a UART's output goes.
pub trait ConsoleSink: Send + Sync {
    /// Takes output bytes, in order, without waiting. Returns how many: when not all, the owner of the
    /// sink has the rest offered again as soon as there is room. Called with the device locked: must
    /// not call back into it.
    #[must_use = "what was not taken is to be offered again"]
    fn write(&self, bytes: &[u8]) -> usize;
}

bitflags! {
    /// Interrupt enable register.
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Ier: u8 {
        const RECEIVED = 1 << 0;
        const TRANSMITTER_EMPTY = 1 << 1;
        const LINE_STATUS = 1 << 2;
        const MODEM_STATUS = 1 << 3;
    }

    /// Modem control register.
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Mcr: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        const OUT2 = 1 << 3;
        const LOOPBACK = 1 << 4;
    }

    /// Line status register.
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Lsr: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const HOLDING_EMPTY = 1 << 5;
        const TRANSMITTER_EMPTY = 1 << 6;
    }

    /// Modem status register.
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Msr: u8 {
        const DELTA_CTS = 1 << 0;
        const DELTA_DSR = 1 << 1;
        const TRAILING_RI = 1 << 2;
        const DELTA_DCD = 1 << 3;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

impl Msr {
    const DELTAS: Msr = Msr::DELTA_CTS
        .union(Msr::DELTA_DSR)
        .union(Msr::TRAILING_RI)
        .union(Msr::DELTA_DCD);
    /// A terminal that is there and ready.
    const CONNECTED: Msr = Msr::CTS.union(Msr::DSR).union(Msr::DCD);
}

/// FIFO control register.
#[bitfield(u8)]
struct Fcr {
    enable: bool,
    clear_receiver: bool,
    clear_transmitter: bool,
    dma: bool,
    #[bits(2)]
    __: u8,
    #[bits(2)]
    trigger: u8,
}

/// Line control register.
#[bitfield(u8)]
struct Lcr {
    #[bits(7)]
    format: u8,
    divisor_access: bool,
}

/// What the interrupt identification register says; in the order of priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Cause {
    LineStatus = 0x06,
    Received = 0x04,
    ReceiveTimeout = 0x0c,
    TransmitterEmpty = 0x02,
    ModemStatus = 0x00,
}

/// IIR: no interrupt pending.
const IIR_NONE: u8 = 0x01;
/// IIR: FIFOs are on.
const IIR_FIFOS: u8 = 0xc0;

struct State {
    fifo: VecDeque<u8>,
    backlog: VecDeque<u8>,
    /// The transmit FIFO: what the sink has not taken yet.
    sending: VecDeque<u8>,
    ier: Ier,
    fcr: Fcr,
    lcr: Lcr,
    mcr: Mcr,
    msr: Msr,
    scratch: u8,
    divisor: [u8; 2],
    overrun: bool,
    /// The transmitter became empty and nobody was told yet.
    empty_pending: bool,
}

impl State {
    fn depth(&self) -> usize {
        if self.fcr.enable() { FIFO_DEPTH } else { 1 }
    }

    fn refill(&mut self) {
        // The host's input is disconnected in loopback.
        while !self.mcr.contains(Mcr::LOOPBACK)
            && self.fifo.len() < self.depth()
            && let Some(byte) = self.backlog.pop_front()
        {
            self.fifo.push_back(byte);
        }
    }

    fn lsr(&self) -> Lsr {
        let mut lsr = Lsr::empty();
        lsr.set(
            Lsr::HOLDING_EMPTY | Lsr::TRANSMITTER_EMPTY,
            self.sending.is_empty(),
        );
        lsr.set(Lsr::DATA_READY, !self.fifo.is_empty());
        lsr.set(Lsr::OVERRUN, self.overrun);
        lsr
    }

    fn cause(&self) -> Option<Cause> {
        let trigger = match (self.fcr.enable(), self.fcr.trigger()) {
            (false, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        };
        if self.ier.contains(Ier::LINE_STATUS) && self.overrun {
            Some(Cause::LineStatus)
        } else if self.ier.contains(Ier::RECEIVED) && self.fifo.len() >= trigger {
            Some(Cause::Received)
        } else if self.ier.contains(Ier::RECEIVED) && !self.fifo.is_empty() {
            // The line is idle at once, so the time-out is immediate.
            Some(Cause::ReceiveTimeout)
        } else if self.ier.contains(Ier::TRANSMITTER_EMPTY) && self.empty_pending {
            Some(Cause::TransmitterEmpty)
        } else if self.ier.contains(Ier::MODEM_STATUS) && self.msr.intersects(Msr::DELTAS) {
            Some(Cause::ModemStatus)
        } else {
            None
        }
    }

    /// The modem inputs: the terminal's, or in loopback our own outputs.
    fn modem_inputs(&self) -> Msr {
        if !self.mcr.contains(Mcr::LOOPBACK) {
            return Msr::CONNECTED;
        }
        let mut inputs = Msr::empty();
        inputs.set(Msr::CTS, self.mcr.contains(Mcr::RTS));
        inputs.set(Msr::DSR, self.mcr.contains(Mcr::DTR));
        inputs.set(Msr::RI, self.mcr.contains(Mcr::OUT1));
        inputs.set(Msr::DCD, self.mcr.contains(Mcr::OUT2));
        inputs
    }

    fn update_modem(&mut self) {
        let (old, new) = (self.msr, self.modem_inputs());
        let changed = |bit: Msr| old.contains(bit) != new.contains(bit);
        let mut msr = new | (old & Msr::DELTAS);
        for (input, delta) in [
            (Msr::CTS, Msr::DELTA_CTS),
            (Msr::DSR, Msr::DELTA_DSR),
            (Msr::DCD, Msr::DELTA_DCD),
        ] {
            msr.set(delta, msr.contains(delta) || changed(input));
        }
        // RI reports its trailing edge only.
        let trailing = old.contains(Msr::RI) && changed(Msr::RI);
        msr.set(Msr::TRAILING_RI, msr.contains(Msr::TRAILING_RI) || trailing);
        self.msr = msr;
    }
}

/// One UART.
pub struct Uart {
    state: Mutex<State>,
    line: Line,
    sink: Arc<dyn ConsoleSink>,
}

impl Uart {
    /// A UART after master reset. Interrupts go to `line`, output to `sink`.
    pub fn new(line: Line, sink: Arc<dyn ConsoleSink>) -> Arc<Self> {
        Arc::new(Uart {
            state: Mutex::new(State {
                fifo: VecDeque::with_capacity(FIFO_DEPTH),
                backlog: VecDeque::new(),
                sending: VecDeque::with_capacity(FIFO_DEPTH),
                ier: Ier::empty(),
                fcr: Fcr::new(),
                lcr: Lcr::new(),
                mcr: Mcr::empty(),
                msr: Msr::CONNECTED,
                scratch: 0,
                // 9600 baud of 1.8432 MHz / 16.
                divisor: [12, 0],
                overrun: false,
                empty_pending: false,
            }),
            line,
            sink,
        })
    }

    /// Gives the guest input. Returns how many bytes were taken; the rest is to be offered again.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        let taken = bytes.len().min(BACKLOG - state.backlog.len());
        state.backlog.extend(&bytes[..taken]);
        state.refill();
        self.update_line(&state);
        taken
    }

    /// The sink may have room again: offers it what waits.
    pub fn resume(&self) {
        let mut state = self.state.lock();
        self.send_waiting(&mut state);
        self.update_line(&state);
    }

    fn send_waiting(&self, state: &mut State) {
        if state.sending.is_empty() {
            return;
        }
        let taken = self.sink.write(state.sending.make_contiguous());
        state.sending.drain(..taken.min(state.sending.len()));
        state.empty_pending |= state.sending.is_empty();
    }

    fn update_line(&self, state: &State) {
        // OUT2's pin is inactive in loopback.
        let connected = state.mcr.contains(Mcr::OUT2) && !state.mcr.contains(Mcr::LOOPBACK);
        self.line.set(connected && state.cause().is_some());
    }

    fn transmit(&self, state: &mut State, byte: u8) {
        // Writing takes back the old "empty" before the new one, so that the line shows an edge.
        state.empty_pending = false;
        self.update_line(state);
        if !state.mcr.contains(Mcr::LOOPBACK) {
            if state.sending.len() == state.depth() {
                // With FIFOs the new byte is lost, without them the old one.
                if state.fcr.enable() {
                    return;
                }
                state.sending.clear();
            }
            state.sending.push_back(byte);
            self.send_waiting(state);
            return;
        }
        if state.fifo.len() < state.depth() {
            state.fifo.push_back(byte);
        } else {
            // With FIFOs the new byte is lost, without them the old one.
            if !state.fcr.enable() {
                state.fifo.clear();
                state.fifo.push_back(byte);
            }
            state.overrun = true;
        }
        state.empty_pending = true;
    }
}

impl PortDevice for Uart {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        let mut state = self.state.lock();
        let divisor = state.lcr.divisor_access();
        let value = match offset {
            0 if divisor => state.divisor[0],
            1 if divisor => state.divisor[1],
            0 => {
                let byte = state.fifo.pop_front().unwrap_or(0);
                state.refill();
                byte
            }
            1 => state.ier.bits(),
            2 => {
                let cause = state.cause();
                if cause == Some(Cause::TransmitterEmpty) {
                    state.empty_pending = false;
                }
                let fifos = if state.fcr.enable() { IIR_FIFOS } else { 0 };
                cause.map_or(IIR_NONE, |c| c as u8) | fifos
            }
            3 => state.lcr.into_bits(),
            4 => state.mcr.bits(),
            5 => {
                self.send_waiting(&mut state);
                let lsr = state.lsr();
                state.overrun = false;
                lsr.bits()
            }
            6 => {
                let msr = state.msr;
                state.msr -= Msr::DELTAS;
                msr.bits()
            }
            7 => state.scratch,
            _ => return Err(IoError::InvalidRegister),
        };
        self.update_line(&state);
        Ok(u32::from(value))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let value = value as u8;
        let mut state = self.state.lock();
        let divisor = state.lcr.divisor_access();
        match offset {
            0 if divisor => state.divisor[0] = value,
            1 if divisor => state.divisor[1] = value,
            0 => self.transmit(&mut state, value),
            1 => {
                let was = state.ier.contains(Ier::TRANSMITTER_EMPTY);
                state.ier = Ier::from_bits_truncate(value);
                if !was && state.ier.contains(Ier::TRANSMITTER_EMPTY) {
                    // Enabling while empty interrupts at once; drivers rely on it to start sending.
                    state.empty_pending = state.sending.is_empty();
                }
            }
            2 => {
                let fcr = Fcr::from_bits(value);
                let switched = fcr.enable() != state.fcr.enable();
                if switched || fcr.clear_receiver() {
                    state.fifo.clear();
                }
                if (switched || fcr.clear_transmitter()) && !state.sending.is_empty() {
                    state.sending.clear();
                    state.empty_pending = true;
                }
                // The other bits are writable only together with the enable bit.
                state.fcr = if fcr.enable() {
                    fcr.with_clear_receiver(false).with_clear_transmitter(false)
                } else {
                    Fcr::new()
                };
                state.refill();
            }
            3 => state.lcr = Lcr::from_bits(value),
            4 => {
                state.mcr = Mcr::from_bits_truncate(value);
                state.update_modem();
                state.refill();
            }
            // The status registers are read-only outside factory tests.
            5 | 6 => {}
            7 => state.scratch = value,
            _ => return Err(IoError::InvalidRegister),
        }
        self.update_line(&state);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingSink;
    use alloc::vec::Vec;
    use core::sync::atomic::{AtomicUsize, Ordering};
    use proptest::prelude::*;

    struct Output(Mutex<Vec<u8>>, AtomicUsize);

    impl Default for Output {
        fn default() -> Self {
            Output(Mutex::default(), AtomicUsize::new(usize::MAX))
        }
    }

    impl ConsoleSink for Output {
        fn write(&self, bytes: &[u8]) -> usize {
            let room = self.1.load(Ordering::Relaxed);
            let taken = bytes.len().min(room);
            self.1.store(room - taken, Ordering::Relaxed);
            self.0.lock().extend(&bytes[..taken]);
            taken
        }
    }

    struct Setup {
        uart: Arc<Uart>,
        irq: Arc<RecordingSink>,
        output: Arc<Output>,
    }

    fn setup() -> Setup {
        let irq = Arc::new(RecordingSink::default());
        let output = Arc::new(Output::default());
        Setup {
            uart: Uart::new(Line::new(irq.clone(), 4), output.clone()),
            irq,
            output,
        }
    }

    impl Setup {
        fn read(&self, offset: u16) -> u8 {
            self.uart.read(offset, Width::Byte).unwrap() as u8
        }

        fn write(&self, offset: u16, value: u8) {
            self.uart
                .write(offset, Width::Byte, u32::from(value))
                .unwrap();
        }
    }

    const RBR: u16 = 0;
    const IER: u16 = 1;
    const IIR: u16 = 2;
    const FCR: u16 = 2;
    const LCR: u16 = 3;
    const MCR: u16 = 4;
    const LSR: u16 = 5;
    const MSR: u16 = 6;
    const SCR: u16 = 7;

    /// Linux drivers/tty/serial/8250: autoconfig() finds a 16550A and nothing better.
    #[test]
    fn linux_autoconfig_finds_a_16550a() {
        let s = setup();
        s.write(IER, 0);
        assert_eq!(s.read(IER) & 0x0f, 0);
        s.write(IER, 0x0f);
        assert_eq!(s.read(IER), 0x0f);
        s.write(IER, 0);
        // Loopback test.
        s.write(MCR, 0x10 | 0x0a);
        assert_eq!(s.read(MSR) & 0xf0, 0x90);
        s.write(MCR, 0);
        assert_eq!(s.read(MSR) & 0xf0, 0xb0);
        // FIFO test, then the probes for better chips.
        s.write(LCR, 0xbf);
        s.write(2, 0);
        s.write(LCR, 0);
        s.write(FCR, 1);
        assert_eq!(s.read(IIR) >> 6, 3);
        s.write(LCR, 0x80);
        assert_ne!(s.read(2), 0, "no 16C850 EFR");
        s.write(LCR, 0xbf);
        assert_ne!(s.read(2), 0, "no 16650 EFR");
        s.write(LCR, 0);
        let mcr = s.read(MCR);
        s.write(LCR, 0xe0);
        let excr1 = s.read(2);
        s.write(LCR, 0);
        s.write(MCR, mcr ^ 0x10);
        s.write(LCR, 0xe0);
        assert_eq!((s.read(2) ^ excr1) & 0x10, 0, "no NS16550 super I/O");
        s.write(LCR, 0);
        s.write(MCR, mcr);
        s.write(FCR, 0x01);
        assert_eq!(s.read(IIR) & 0x20, 0);
        s.write(LCR, 0x80);
        s.write(FCR, 0x21);
        assert_eq!(s.read(IIR) & 0x20, 0, "no 64-byte FIFO");
        s.write(LCR, 0);
        s.write(IER, 0x40);
        assert_eq!(s.read(IER), 0, "no XScale unit");
        s.write(SCR, 0xa5);
        assert_eq!(s.read(SCR), 0xa5);
    }

    /// serial8250_do_startup(): the tests for chips that lose the "transmitter empty" interrupt.
    #[test]
    fn enabling_the_empty_interrupt_raises_it_each_time() {
        let s = setup();
        s.write(MCR, 0x08);
        for _ in 0..2 {
            s.write(IER, 0x02);
            assert!(s.irq.is_high(4));
            assert_eq!(s.read(LSR) & 0x60, 0x60);
            assert_eq!(s.read(IIR) & 0x0f, 0x02);
            assert_eq!(s.read(IIR) & 0x0f, 0x01, "reading acknowledged it");
            assert!(!s.irq.is_high(4));
            s.write(IER, 0);
        }
        s.write(IER, 0x02);
        s.write(IER, 0x02);
        assert_eq!(s.read(IIR) & 0x0f, 0x02);
    }

    #[test]
    fn each_byte_sent_makes_an_edge() {
        let s = setup();
        s.write(MCR, 0x08);
        s.write(IER, 0x02);
        s.irq.take();
        s.write(RBR, b'a');
        assert_eq!(s.irq.take(), [(4, false), (4, true)]);
        assert_eq!(s.read(IIR) & 0x0f, 0x02);
        assert_eq!(s.irq.take(), [(4, false)]);
        s.write(RBR, b'b');
        assert_eq!(s.irq.take(), [(4, true)]);
        assert_eq!(*s.output.0.lock(), b"ab");
    }

    /// The terminal takes no more: the guest sees a busy transmitter, waits, and loses nothing.
    #[test]
    fn a_full_sink_makes_the_transmitter_busy() {
        let s = setup();
        s.write(FCR, 0x01);
        s.write(MCR, 0x08);
        s.write(IER, 0x02);
        s.read(IIR);
        s.output.1.store(1, Ordering::Relaxed);
        s.write(RBR, b'a');
        assert_eq!(s.read(LSR) & 0x60, 0x60, "there was room for one");
        assert_eq!(s.read(IIR) & 0x0f, 0x02);
        for byte in b"bcd" {
            s.write(RBR, *byte);
        }
        assert_eq!(s.read(LSR) & 0x60, 0);
        assert!(!s.irq.is_high(4), "nothing is empty");
        s.output.1.store(1, Ordering::Relaxed);
        s.uart.resume();
        assert_eq!(s.read(LSR) & 0x60, 0, "two are left");
        s.output.1.store(100, Ordering::Relaxed);
        s.uart.resume();
        assert!(s.irq.is_high(4));
        assert_eq!(s.read(IIR) & 0x0f, 0x02);
        assert_eq!(s.read(LSR) & 0x60, 0x60);
        assert_eq!(*s.output.0.lock(), b"abcd");
    }

    #[test]
    fn who_polls_the_status_needs_no_resume() {
        let s = setup();
        s.output.1.store(0, Ordering::Relaxed);
        s.write(RBR, b'a');
        assert_eq!(s.read(LSR) & 0x20, 0);
        s.output.1.store(9, Ordering::Relaxed);
        assert_eq!(s.read(LSR) & 0x20, 0x20);
        assert_eq!(*s.output.0.lock(), b"a");
    }

    #[test]
    fn the_transmit_fifo_overflows_and_is_cleared_as_the_data_sheet_says() {
        let s = setup();
        s.output.1.store(0, Ordering::Relaxed);
        s.write(RBR, b'a');
        s.write(RBR, b'b');
        s.output.1.store(9, Ordering::Relaxed);
        s.uart.resume();
        assert_eq!(
            *s.output.0.lock(),
            b"b",
            "without FIFOs the old byte is lost"
        );
        s.output.1.store(0, Ordering::Relaxed);
        s.write(FCR, 0x01);
        for byte in 0..20 {
            s.write(RBR, byte);
        }
        s.output.1.store(99, Ordering::Relaxed);
        s.uart.resume();
        assert_eq!(s.output.0.lock().split_off(1), (0..16).collect::<Vec<u8>>());
        s.output.1.store(0, Ordering::Relaxed);
        s.write(RBR, b'x');
        s.write(FCR, 0x05);
        assert_eq!(s.read(LSR) & 0x60, 0x60);
        s.output.1.store(99, Ordering::Relaxed);
        s.uart.resume();
        assert_eq!(*s.output.0.lock(), b"b");
    }

    #[test]
    fn receive_interrupts_until_drained() {
        let s = setup();
        s.write(FCR, 0x87); // trigger at 8
        s.write(MCR, 0x0b);
        s.write(IER, 0x05);
        assert_eq!(s.uart.receive(b"hello world, hello world"), 24);
        assert!(s.irq.is_high(4));
        assert_eq!(s.read(IIR), 0xc4);
        let mut got = Vec::new();
        while s.read(LSR) & 1 != 0 {
            got.push(s.read(RBR));
            if got.len() == 20 {
                assert_eq!(s.read(IIR), 0xcc, "time-out below the trigger level");
            }
        }
        assert_eq!(got, b"hello world, hello world");
        assert!(!s.irq.is_high(4));
        assert_eq!(s.read(IIR), 0xc1);
        assert_eq!(s.read(RBR), 0);
    }

    #[test]
    fn input_is_bounded() {
        let s = setup();
        let flood = vec![b'x'; BACKLOG + 1000];
        let taken = s.uart.receive(&flood);
        assert_eq!(taken, BACKLOG);
        assert!(
            s.uart.receive(&flood) <= 1,
            "one byte moved on to the receiver"
        );
        assert_eq!(s.uart.receive(&flood), 0);
        s.read(RBR);
        assert_eq!(s.uart.receive(b"yz"), 1);
        assert_eq!(s.read(LSR) & 0x02, 0, "waiting input is no overrun");
    }

    #[test]
    fn interrupts_need_out2() {
        let s = setup();
        s.write(IER, 0x01);
        s.uart.receive(b"x");
        assert!(!s.irq.is_high(4));
        assert_eq!(s.read(IIR), 0x0c & !0x08);
        s.write(MCR, 0x08);
        assert!(s.irq.is_high(4));
        s.write(MCR, 0x18);
        assert!(!s.irq.is_high(4));
    }

    #[test]
    fn loopback_returns_bytes_and_overruns() {
        let s = setup();
        s.uart.receive(b"h");
        assert_eq!(s.read(RBR), b'h');
        s.write(MCR, 0x10);
        s.uart.receive(b"ost");
        s.write(RBR, 0xae);
        assert_eq!(s.read(LSR), 0x61);
        assert_eq!(s.read(RBR), 0xae);
        s.write(RBR, 1);
        s.write(RBR, 2);
        assert_eq!(s.read(LSR), 0x63);
        assert_eq!(s.read(LSR), 0x61, "reading clears the overrun");
        assert_eq!(s.read(RBR), 2);
        s.write(FCR, 1);
        s.write(IER, 0x04);
        for byte in 0..17 {
            s.write(RBR, byte);
        }
        assert_eq!(s.read(IIR), 0xc6);
        assert_eq!(s.read(RBR), 0);
        assert!(s.output.0.lock().is_empty());
        s.write(FCR, 0x03);
        s.write(MCR, 0);
        assert_eq!(s.read(RBR), b'o', "the host's input comes after loopback");
    }

    #[test]
    fn modem_deltas() {
        let s = setup();
        s.write(MCR, 0x10);
        assert_eq!(s.read(MSR), 0x0b, "CTS, DSR and DCD fell");
        s.write(IER, 0x08);
        s.write(MCR, 0x14);
        assert_eq!(s.read(MSR), 0x40, "a rising RI is no delta");
        s.write(MCR, 0x10);
        assert_eq!(s.read(IIR), 0x00);
        assert_eq!(s.read(MSR), 0x04);
        assert_eq!(s.read(IIR), 0x01);
    }

    #[test]
    fn divisor_latch() {
        let s = setup();
        s.write(LCR, 0x83);
        s.write(0, 1);
        s.write(1, 2);
        assert_eq!((s.read(0), s.read(1)), (1, 2));
        s.write(LCR, 0x03);
        assert_eq!((s.read(0), s.read(1)), (0, 0));
        assert!(s.output.0.lock().is_empty());
        assert_eq!(s.uart.read(8, Width::Byte), Err(IoError::InvalidRegister));
        assert_eq!(s.uart.read(0, Width::Word), Err(IoError::InvalidWidth));
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in proptest::collection::vec((0u8..3, 0u16..9, any::<u8>()), 0..300),
        ) {
            let s = setup();
            for (kind, offset, value) in steps {
                s.output.1.store(usize::from(value & 3), Ordering::Relaxed);
                match kind {
                    0 => { let _ = s.uart.read(offset, Width::Byte); }
                    1 => { let _ = s.uart.write(offset, Width::Byte, u32::from(value)); }
                    _ => { s.uart.receive(&vec![value; usize::from(offset) * 3]); }
                }
                let state = s.uart.state.lock();
                prop_assert!(state.fifo.len() <= state.depth());
                prop_assert!(state.sending.len() <= state.depth());
            }
        }
    }
}
