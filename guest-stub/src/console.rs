//! COM1, the only way in and out: polled output, input by interrupt when there is one.

use core::fmt::{self, Write};

use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::FifoTriggerLevel;
use uart_16550::{BaudRate, Config, Uart16550};

use crate::cpu::port;

/// First port of COM1.
pub const COM1: u16 = 0x3F8;

/// Registers of a 16550, offsets from its first port.
pub mod register {
    /// Receive buffer, transmit holding, divisor low.
    pub const DATA: u16 = 0;
    /// Interrupt enable, divisor high.
    pub const INTERRUPT_ENABLE: u16 = 1;
    /// Interrupt identification (read).
    pub const INTERRUPT_ID: u16 = 2;
    /// Line control.
    pub const LINE_CONTROL: u16 = 3;
    /// Modem control.
    pub const MODEM_CONTROL: u16 = 4;
    /// Line status.
    pub const LINE_STATUS: u16 = 5;
    /// Modem status.
    pub const MODEM_STATUS: u16 = 6;
    /// Scratch: keeps what is written, means nothing.
    pub const SCRATCH: u16 = 7;
}

/// LSR: the transmitter is empty, holding register and shifter.
const TRANSMITTER_EMPTY: u8 = 1 << 6;
/// LSR: a byte waits to be read.
const DATA_READY: u8 = 1 << 0;

fn com1() -> Uart16550<PioBackend> {
    // SAFETY: COM1 is a fixed place on a PC, and this program is its only user.
    match unsafe { Uart16550::new_port(COM1) } {
        Ok(uart) => uart,
        Err(_) => unreachable!("the eight ports of COM1 are in range"),
    }
}

/// Sets 115200 8n1, FIFO on, interrupts off. A UART that fails its self-test is used anyway:
/// there is no other place to say so.
pub fn init() {
    let _ = com1().init(Config {
        baud_rate: BaudRate::Baud115200,
        fifo_trigger_level: Some(FifoTriggerLevel::One),
        ..Config::DEFAULT
    });
}

/// Sends bytes as they are.
pub fn send(bytes: &[u8]) {
    com1().send_bytes_exact(bytes);
}

/// Waits until the last byte has left.
pub fn drain() {
    while port::read8(COM1 + register::LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
        core::hint::spin_loop();
    }
}

/// A received byte, if there is one.
pub fn try_receive() -> Option<u8> {
    let ready = port::read8(COM1 + register::LINE_STATUS) & DATA_READY != 0;
    ready.then(|| port::read8(COM1 + register::DATA))
}

/// The console as a formatter; a line feed goes out as CR LF.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    send(line.as_bytes());
                    send(b"\r\n");
                }
                None => send(line.as_bytes()),
            }
        }
        Ok(())
    }
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // The console never refuses a byte.
        let _ = write!($crate::console::Console, $($argument)*);
    }};
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => {
        $crate::print!("\n")
    };
    ($($argument:tt)*) => {{
        $crate::print!($($argument)*);
        $crate::print!("\n");
    }};
}

/// A line of text without a heap; what does not fit is cut.
#[derive(Clone, Copy)]
pub struct Text<const CAPACITY: usize> {
    bytes: [u8; CAPACITY],
    length: usize,
}

impl<const CAPACITY: usize> Text<CAPACITY> {
    /// An empty text.
    pub const fn new() -> Self {
        Self {
            bytes: [0; CAPACITY],
            length: 0,
        }
    }

    /// The text of a format.
    pub fn format(arguments: fmt::Arguments) -> Self {
        let mut text = Self::new();
        // `write_str` below cuts, it never fails.
        let _ = text.write_fmt(arguments);
        text
    }

    /// Appends a byte if it fits.
    pub fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
            self.length += 1;
        }
    }

    /// Removes the last byte.
    pub fn pop(&mut self) -> Option<u8> {
        self.length = self.length.checked_sub(1)?;
        self.bytes.get(self.length).copied()
    }

    /// The text; bytes that are no UTF-8 end it.
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => bytes
                .get(..error.valid_up_to())
                .and_then(|valid| core::str::from_utf8(valid).ok())
                .unwrap_or_default(),
        }
    }
}

impl<const CAPACITY: usize> Write for Text<CAPACITY> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.push(byte);
        }
        Ok(())
    }
}

impl<const CAPACITY: usize> fmt::Display for Text<CAPACITY> {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}
