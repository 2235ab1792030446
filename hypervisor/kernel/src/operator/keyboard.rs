//! The host's keyboard: scan codes on their way to the shell on the screen.
//!
//! The keyboard's interrupt collects them, or where it has none, or does not come in time, whoever looks.

use drivers::{
    by_clock::ByClock,
    firmware::Firmware,
    power::Emulator,
    ps2::{Keyboard, PcPorts},
    queue::ByteQueue,
};

use crate::{
    doors, info,
    interrupts::{self, vector},
    power,
    sync::Lock,
    time,
};

/// ISA interrupt of the keyboard.
const KEYBOARD_IRQ: u8 = 1;
/// Scan codes that wait; more are dropped.
const CODES: usize = 256;
/// Scan codes taken from the controller at a time.
const CODES_AT_ONCE: usize = 16;
/// Without an interrupt the keyboard is looked at so often, in microseconds.
const LOOK_EVERY_US: u64 = 20_000;

struct Keys {
    keyboard: Option<Keyboard<PcPorts>>,
    codes: ByteQueue<CODES>,
}

static KEYS: Lock<Keys> = Lock::new(Keys {
    keyboard: None,
    codes: ByteQueue::new(),
});
/// When it is looked at, whether or not it interrupts.
static BY_CLOCK: ByClock = ByClock::off();

/// Finds the keyboard, and lets it interrupt the calling processor, the first one.
pub fn start(firmware: &Firmware) {
    // SAFETY: the kernel calls this once, and nobody else drives the controller; where there is none its
    // ports are unused.
    let found = Keyboard::probe(unsafe { PcPorts::new() });
    let Some(mut keyboard) = found else {
        info!("no PS/2 keyboard controller");
        return;
    };
    let routed = interrupts::route_isa(firmware, KEYBOARD_IRQ, vector::KEYBOARD)
        && keyboard.enable_interrupt();
    // As for the serial port: Bochs 2.7 holds a host interrupt back from a guest that was entered with IF = 0.
    let polled = !routed || power::emulator() == Some(Emulator::Bochs);
    if polled {
        BY_CLOCK.start(time::us_to_ticks(LOOK_EVERY_US));
    }
    KEYS.lock().keyboard = Some(keyboard);
}

impl Keys {
    /// Takes what the controller has. Whether there was something.
    fn collect(&mut self) -> bool {
        let Some(keyboard) = self.keyboard.as_mut() else {
            return false;
        };
        let mut found = false;
        for _ in 0..CODES_AT_ONCE {
            let Some(code) = keyboard.read() else { break };
            // Who types so much that nobody looks in time types in vain.
            let _ = self.codes.push(code);
            found = true;
        }
        found
    }
}

/// The keyboard's interrupt.
pub fn on_interrupt() {
    if KEYS.lock().collect() {
        doors::ring();
    }
}

/// Looks at a keyboard that does not interrupt in time, at this host TSC.
#[inline]
pub(super) fn attend(now: u64) {
    if BY_CLOCK.look(now) {
        on_interrupt();
    }
}

/// Host TSC at which a halted processor has to [`attend`]; `u64::MAX` if never.
pub(super) fn wake_up_at() -> u64 {
    BY_CLOCK.again_at().unwrap_or(u64::MAX)
}

/// Whether no scan code waits.
pub(super) fn is_idle() -> bool {
    KEYS.lock().codes.is_empty()
}

/// The oldest scan code.
pub(super) fn pop() -> Option<u8> {
    KEYS.lock().codes.pop()
}
