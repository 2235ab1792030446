//! The host's serial console: the one port that log and guests' consoles share.

use drivers::serial::{COM1, Serial};

use crate::sync::Lock;

static PORT: Lock<Option<Serial>> = Lock::new(None);

/// Finds the serial port. Returns whether there is one.
pub fn init() -> bool {
    // SAFETY: the kernel calls this once, before anything else drives the port; on a machine without
    // COM1 the ports are unused.
    let serial = unsafe { Serial::probe(COM1) };
    let found = serial.is_some();
    *PORT.lock() = serial;
    found
}

/// Writes bytes and waits for them to be taken, with the driver's bound.
pub fn write_all(bytes: &[u8]) {
    if let Some(port) = PORT.lock().as_mut() {
        port.send(bytes);
    }
}

/// Waits, bounded, until everything written is on the line.
pub fn flush() {
    if let Some(port) = PORT.lock().as_mut() {
        port.flush();
    }
}

/// Writes one line of text and ends it, as one piece.
pub fn write_line(line: &[u8]) {
    if let Some(port) = PORT.lock().as_mut() {
        port.send(line);
        port.send(b"\r\n");
    }
}
