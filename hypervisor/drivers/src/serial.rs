//! The host's serial port: a 16550 at a COM port, probed before it is trusted.
//!
//! Nothing here waits without a bound: a port that is absent, wedged or held by flow
//! control costs a fixed number of register reads and then loses bytes, never the host.
//! Interrupts are off until [`Serial::set_receive_interrupt`]. Sharing is the caller's business.

use uart_16550::{
    BaudRate, Config, Uart16550,
    backend::PioBackend,
    spec::registers::{FifoTriggerLevel, IER, LSR},
};

/// Port numbers of the first serial port of a PC.
pub const COM1: u16 = 0x3f8;
/// Port numbers of the second serial port of a PC.
pub const COM2: u16 = 0x2f8;

/// Register reads before a transmitter that stays full is given up. A read of a real UART takes about
/// a microsecond and a full FIFO drains in 1.4 ms at 115,200 baud, so this is about 35 FIFOs' time.
const TRANSMIT_ATTEMPTS: u32 = 50_000;

/// What LSR reads as when no device answers.
const FLOATING_BUS: u8 = 0xff;

/// A serial port that answered the probe: 115,200 baud, 8-N-1, FIFO on.
pub struct Serial {
    uart: Uart16550<PioBackend>,
    overruns: u64,
}

impl Serial {
    /// Probes and sets up the port at `base`. `None`: no working UART is there.
    ///
    /// # Safety
    /// Ports `base` to `base + 7` must be either a UART that nobody else drives, or unused.
    pub unsafe fn probe(base: u16) -> Option<Self> {
        // SAFETY: the caller vouches for the ports.
        let mut uart = unsafe { Uart16550::new_port(base) }.ok()?;
        if !uart.check_present() {
            return None;
        }
        // `init` waits for an empty transmitter for ever; a port that does not get there is broken.
        let drained = (0..TRANSMIT_ATTEMPTS).any(|_| {
            let lsr = uart.lsr();
            lsr.bits() != FLOATING_BUS && lsr.contains(LSR::TRANSMITTER_EMPTY)
        });
        if !drained {
            return None;
        }
        uart.init(Config {
            baud_rate: BaudRate::Baud115200,
            fifo_trigger_level: Some(FifoTriggerLevel::One),
            ..Config::DEFAULT
        })
        .ok()?;
        Some(Serial { uart, overruns: 0 })
    }

    /// Reads the line status, which clears its overrun flag: hence the count.
    fn status(&mut self) -> LSR {
        let lsr = self.uart.lsr();
        if lsr.contains(LSR::OVERRUN_ERROR) && lsr.bits() != FLOATING_BUS {
            self.overruns += 1;
        }
        lsr
    }

    /// How often bytes were lost since the port was not emptied in time; each time one or more.
    pub fn overruns(&self) -> u64 {
        self.overruns
    }

    /// Hands the transmitter as many bytes as it takes now. Returns how many; never waits.
    pub fn try_send(&mut self, bytes: &[u8]) -> usize {
        match self.status().contains(LSR::THR_EMPTY) {
            true => self.uart.send_bytes(bytes),
            false => 0,
        }
    }

    /// Sends all of `bytes`, waiting for the line, and hands over what arrives meanwhile: the line does not
    /// wait. Returns how many went out: fewer only when the transmitter stayed full for about 50 ms.
    pub fn send(&mut self, bytes: &[u8], mut received: impl FnMut(u8)) -> usize {
        let mut sent = 0;
        let mut attempts = TRANSMIT_ATTEMPTS;
        while sent < bytes.len() {
            match self.try_send(&bytes[sent..]) {
                0 if attempts == 0 => break,
                0 => {
                    attempts -= 1;
                    if let Some(byte) = self.receive() {
                        received(byte);
                    }
                    core::hint::spin_loop();
                }
                taken => {
                    sent += taken;
                    attempts = TRANSMIT_ATTEMPTS;
                }
            }
        }
        sent
    }

    /// Waits, with the bound of [`Serial::send`], until the last bit is on the line.
    pub fn flush(&mut self) {
        for _ in 0..TRANSMIT_ATTEMPTS {
            if self.uart.lsr().contains(LSR::TRANSMITTER_EMPTY) {
                return;
            }
            core::hint::spin_loop();
        }
    }

    /// A received byte, if there is one.
    pub fn receive(&mut self) -> Option<u8> {
        match self.status().contains(LSR::DATA_READY) {
            true => self.uart.try_receive_byte().ok(),
            false => None,
        }
    }

    /// Lets the port raise its interrupt for each received byte, or not.
    pub fn set_receive_interrupt(&mut self, on: bool) {
        if on {
            self.uart.enable_interrupts(IER::DATA_READY);
        } else {
            self.uart.disable_interrupts(IER::DATA_READY);
        }
    }

    /// Lets the port raise its interrupt when the transmitter has run empty, or not.
    pub fn set_transmit_interrupt(&mut self, on: bool) {
        if on {
            self.uart.enable_interrupts(IER::THR_EMPTY);
        } else {
            self.uart.disable_interrupts(IER::THR_EMPTY);
        }
    }

    /// Reads the interrupt-identification register, which clears a pending transmitter-empty interrupt.
    pub fn acknowledge(&mut self) {
        let _ = self.uart.isr();
    }
}
