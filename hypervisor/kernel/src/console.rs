//! The host's serial console: the one port that log and guests' consoles share.
//!
//! Input waits in a queue of fixed size, filled by the port's interrupt or by [`poll`]. Output goes to
//! a queue that the port's interrupt drains, so that a slow line does not hold up a
//! processor; before [`start_interrupts`], and in a fault report, it is sent while the caller waits.

use core::sync::atomic::{AtomicBool, Ordering};

use drivers::{
    firmware::Firmware,
    power::Emulator,
    queue::ByteQueue,
    serial::{COM1, Serial},
};

use crate::{
    interrupts::{self, vector},
    power,
    sync::Lock,
    time,
};

/// ISA interrupt of COM1.
const COM1_IRQ: u8 = 4;
/// Bytes of input that wait; more are dropped.
const INPUT_BYTES: usize = 4096;
/// How long the port is left alone where it has to be looked at, in microseconds. Its 16 bytes of memory are
/// full after 1.4 ms at 115,200 baud, in Bochs after 1.1.
const LOOK_EVERY_US: u64 = 500;
/// Bytes of output that wait. At 115,200 baud this is a second and a half.
const OUTPUT_BYTES: usize = 16 * 1024;

struct Console {
    port: Option<Serial>,
    input: ByteQueue<INPUT_BYTES>,
    output: ByteQueue<OUTPUT_BYTES>,
    /// Input that came while the queue was full.
    dropped: u64,
    /// The port's interrupt drains the output.
    interrupts: bool,
    /// The transmitter's interrupt is asked for.
    draining: bool,
}

/// A guest must be made to exit for the port's sake.
static MUST_LOOK: AtomicBool = AtomicBool::new(true);

static CONSOLE: Lock<Console> = Lock::new(Console {
    port: None,
    input: ByteQueue::new(),
    output: ByteQueue::new(),
    dropped: 0,
    interrupts: false,
    draining: false,
});

/// Finds the serial port. Returns whether there is one.
pub fn init() -> bool {
    // SAFETY: the kernel calls this once, before anything else drives the port; on a machine without
    // COM1 the ports are unused.
    let port = unsafe { Serial::probe(COM1) };
    let found = port.is_some();
    CONSOLE.lock().port = port;
    found
}

/// Lets the port interrupt the calling processor. `false`: it cannot, and [`poll`] must do.
pub fn start_interrupts(firmware: &Firmware) -> bool {
    let mut console = CONSOLE.lock();
    let Some(port) = console.port.as_mut() else {
        return false;
    };
    if !interrupts::route_isa(firmware, COM1_IRQ, vector::SERIAL) {
        return false;
    }
    port.enable_receive_interrupt();
    console.interrupts = true;
    // Bochs 2.7 does not let a host interrupt end a guest's run that was entered with IF = 0 before IF changes.
    let late = power::emulator() == Some(Emulator::Bochs);
    MUST_LOOK.store(late, Ordering::Relaxed);
    true
}

/// Host TSC at which a processor that runs a guest has to look at the port again, `u64::MAX` if the port's
/// interrupt makes the guest exit.
pub fn look_again_at() -> u64 {
    match MUST_LOOK.load(Ordering::Relaxed) {
        true => time::now_tsc().saturating_add(time::us_to_ticks(LOOK_EVERY_US)),
        false => u64::MAX,
    }
}

/// Whether there is a port that has to be polled, since it cannot interrupt.
pub fn is_polled() -> bool {
    let console = CONSOLE.lock();
    console.port.is_some() && !console.interrupts
}

impl Console {
    /// Moves what has arrived into the input queue, and queued output to the port as far as it takes it.
    fn pump(&mut self) {
        let Some(port) = self.port.as_mut() else {
            self.output = ByteQueue::new();
            return;
        };
        // A port that never runs dry is broken: no more than a queue's worth at a time.
        for _ in 0..INPUT_BYTES {
            match port.receive() {
                Some(byte) if self.input.push(byte) => {}
                Some(_) => self.dropped += 1,
                None => break,
            }
        }
        while !self.output.is_empty() {
            match port.try_send(self.output.front()) {
                0 => break,
                sent => self.output.consume(sent),
            }
        }
        let draining = self.interrupts && !self.output.is_empty();
        if draining != self.draining {
            port.set_transmit_interrupt(draining);
            self.draining = draining;
        }
    }

    /// Sends queued output while the caller waits, within the driver's bound. Input is taken meanwhile.
    fn drain(&mut self) {
        let Some(port) = self.port.as_mut() else {
            return;
        };
        let mut taken = |byte| {
            if !self.input.push(byte) {
                self.dropped += 1;
            }
        };
        while !self.output.is_empty() {
            match port.send(self.output.front(), &mut taken) {
                0 => {
                    // The line is stuck. Dropping the rest is better than trying again for each byte.
                    self.output = ByteQueue::new();
                }
                sent => self.output.consume(sent),
            }
        }
    }

    fn write_waiting(&mut self, mut bytes: &[u8]) {
        loop {
            let taken = self.output.extend(bytes);
            bytes = &bytes[taken..];
            self.pump();
            if !self.interrupts {
                self.drain();
            }
            if bytes.is_empty() {
                return;
            }
            self.drain();
        }
    }
}

/// The port's interrupt.
pub fn on_interrupt() {
    let mut console = CONSOLE.lock();
    if let Some(port) = console.port.as_mut() {
        port.acknowledge();
    }
    console.pump();
}

/// Does the interrupt's work without one. Cheap when there is nothing to do.
pub fn poll() {
    CONSOLE.lock().pump();
}

/// The oldest byte that was typed, if any.
pub fn read() -> Option<u8> {
    CONSOLE.lock().input.pop()
}

/// Queues output, as much as fits. Returns how many bytes that were; never waits for the line.
pub fn write(bytes: &[u8]) -> usize {
    let mut console = CONSOLE.lock();
    let taken = console.output.extend(bytes);
    console.pump();
    if taken < bytes.len() {
        // The transmitter may have made room just now.
        return taken + console.output.extend(&bytes[taken..]);
    }
    taken
}

/// Writes all of `bytes` as one piece, waiting for the line, within the driver's bound, when the queue is full.
pub fn write_all(bytes: &[u8]) {
    CONSOLE.lock().write_waiting(bytes);
}

/// Writes one line of text and ends it, as one piece.
pub fn write_line(line: &[u8]) {
    let mut console = CONSOLE.lock();
    console.write_waiting(line);
    console.write_waiting(b"\r\n");
}

/// Waits, bounded, until everything written is on the line.
pub fn flush() {
    let mut console = CONSOLE.lock();
    console.drain();
    if let Some(port) = console.port.as_mut() {
        port.flush();
    }
}
