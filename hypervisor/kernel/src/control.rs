//! The control channel: the host's second serial port, where programs operate the host.
//!
//! The port's interrupt, or whoever looks at it in place of one, moves bytes between the port and two queues of fixed
//! size. [`serve`] moves them between the queues and the [`Channel`], which makes lines of them, and serves at
//! most one request each time. It is one of the [`doors`]. A guest on the first processor gives way to what comes, but
//! no sooner than [`RING_EVERY_US`] after the last time: a flood of requests costs it one request's time in
//! each of these times, and no more.
//!
//! Input that finds no room stays in the port. An emulator's holds the sender up; of another what is lost is marked,
//! and its line refused. Output that nobody takes for [`PATIENCE_NS`] is dropped. The lock of the queues
//! comes after all others but the log's (docs/ARCHITECTURE.md), and no memory is asked for under it.

use core::sync::atomic::{AtomicU64, Ordering};

use drivers::{
    by_clock::ByClock,
    firmware::Firmware,
    line::{Line, WhenFull},
    queue::ByteQueue,
    serial::{COM2, Serial},
};
use manage::{
    command::Operate,
    journal::Door,
    wire::{self, Channel, Hello},
};

use crate::{
    console, doors, info,
    interrupts::{self, vector},
    journal::Noted,
    sync::Lock,
    time, warn,
};

/// ISA interrupt of COM2.
const COM2_IRQ: u8 = 3;
/// Bytes of input that wait outside the channel.
const INPUT_BYTES: usize = 4096;
/// Bytes of output that wait outside the channel: at 115,200 baud the third of a second.
const OUTPUT_BYTES: usize = 4096;
/// How long output may wait without a byte of it being taken, in nanoseconds.
const PATIENCE_NS: u64 = 10_000_000_000;

/// How long a guest may run on after this door was served, whatever comes, in microseconds.
const RING_EVERY_US: u64 = 2_000;

/// Port and queues.
struct Port {
    line: Line<Serial, INPUT_BYTES, OUTPUT_BYTES>,
}

/// What the first processor has beside.
struct Served {
    channel: Channel,
    /// Bytes that the port had taken when it was last looked at.
    sent: u64,
    /// Host time since when it has taken none though some waited.
    since_ns: u64,
}

static PORT: Lock<Port> = Lock::new(Port {
    line: Line::new(WhenFull::Leave { gap: wire::GAP }),
});

/// Gone while it is served.
static SERVED: Lock<Option<Served>> = Lock::new(None);

/// How long a guest may run before it must be made to exit for the port's sake.
static BY_CLOCK: ByClock = ByClock::off();
/// Host TSC at which [`serve`] has something to do though no interrupt comes.
static NEXT_SERVE: AtomicU64 = AtomicU64::new(u64::MAX);

/// Host TSC from which on a guest gives way to what comes.
static RING_FROM: AtomicU64 = AtomicU64::new(0);

/// Finds the port, takes its interrupt to the calling processor, the first one, and begins the channel.
pub fn start(firmware: &Firmware) {
    // SAFETY: the kernel calls this once, and nobody else drives the port; on a machine without COM2 the
    // ports are unused.
    let Some(port) = (unsafe { Serial::probe(COM2) }) else {
        info!("no control channel: there is no second serial port");
        return;
    };
    let channel = Channel::new(Hello::new(env!("CARGO_PKG_VERSION")));
    *SERVED.lock() = Some(Served {
        channel,
        sent: 0,
        since_ns: time::ns(),
    });
    PORT.lock().line.port = Some(port);
    let routed = interrupts::route_isa(firmware, COM2_IRQ, vector::CONTROL);
    console::look_by_clock_if_needed(&BY_CLOCK, routed);
    if routed {
        PORT.lock().line.use_interrupts();
        info!("control channel: the second serial port");
    } else {
        warn!("control channel: the second serial port; it has no interrupt and is polled");
    }
    NEXT_SERVE.store(0, Ordering::Relaxed);
}

/// Host TSC at which the first processor, when it runs a guest, has to [`attend`] again; `None` if the
/// port's interrupt makes the guest exit.
pub fn look_again_at() -> Option<u64> {
    BY_CLOCK.again_at()
}

/// Host TSC at which the first processor, when it has nothing to do, has to [`serve`] again. Rings if that is now.
pub fn wake_up_at() -> Option<u64> {
    // Where the port has an interrupt, that wakes a halted processor; in Bochs, too.
    let look = look_again_at().filter(|_| !PORT.lock().line.has_interrupts());
    let next = NEXT_SERVE.load(Ordering::Relaxed);
    if next <= time::now_tsc() {
        // No guest has to give way.
        doors::ring();
    }
    Some(next.min(look.unwrap_or(u64::MAX))).filter(|&at| at != u64::MAX)
}

/// Does what is due without an interrupt at this host TSC, which is now. The first processor's business.
#[inline]
pub fn attend(now: u64) {
    if BY_CLOCK.look(now) {
        PORT.lock().pump_and_note();
    }
    if NEXT_SERVE.load(Ordering::Relaxed) <= now && RING_FROM.load(Ordering::Relaxed) <= now {
        doors::ring();
    }
}

/// The port's interrupt.
pub fn on_interrupt() {
    let mut port = PORT.lock();
    if let Some(uart) = port.line.port.as_mut() {
        uart.acknowledge();
    }
    port.pump_and_note();
    port.line.rearm();
}

impl Port {
    /// Moves bytes between port and queues.
    fn pump(&mut self) {
        self.line.receive();
        self.line.transmit(|_| {});
        self.line.settle();
    }

    /// As [`Port::pump`]; has the first processor's loop see to what came or went.
    fn pump_and_note(&mut self) {
        let sent = self.line.sent();
        self.pump();
        let room = self.line.output.is_empty() && self.line.sent() != sent;
        if room || !self.line.input.is_empty() {
            NEXT_SERVE.store(0, Ordering::Relaxed);
        }
    }

    /// Moves bytes between queues and channel. Returns how many bytes of output wait.
    fn exchange(&mut self, channel: &mut Channel) -> usize {
        self.pump();
        while !channel.is_full() {
            let taken = channel.receive(self.line.input.front());
            if taken == 0 {
                break;
            }
            self.line.input.consume(taken);
        }
        loop {
            let taken = self.line.output.extend(channel.output());
            if taken == 0 {
                break;
            }
            channel.sent(taken);
        }
        self.pump();
        self.line.output.len() + channel.output().len()
    }
}

impl Served {
    /// Serves a request, if one waits, and moves bytes. Returns the host TSC at which there is more to do.
    fn turn(&mut self, operate: &dyn Operate) -> u64 {
        let mut waiting = PORT.lock().exchange(&mut self.channel);
        if waiting == 0 {
            self.since_ns = time::ns();
        }
        if self.channel.has_request() {
            self.channel.serve(|request| operate.operate(request));
            waiting = PORT.lock().exchange(&mut self.channel);
        }
        let (now, sent) = (time::ns(), PORT.lock().line.sent());
        if sent != self.sent {
            self.sent = sent;
            self.since_ns = now;
        } else if now.saturating_sub(self.since_ns) > PATIENCE_NS {
            PORT.lock().line.output = ByteQueue::new();
            self.channel.drop_output();
            waiting = 0;
        }
        if self.channel.has_request() {
            0
        } else if waiting > 0 {
            let look = time::us_to_ticks(console::LOOK_AT_OUTPUT_US);
            time::now_tsc().saturating_add(look)
        } else {
            u64::MAX
        }
    }
}

/// Serves one request, if one waits, and moves what waits: a door's turn.
pub fn serve(operate: &dyn Operate) {
    // What an interrupt notes from here on is not lost.
    let due = NEXT_SERVE.swap(u64::MAX, Ordering::Relaxed);
    if due > time::now_tsc() {
        NEXT_SERVE.fetch_min(due, Ordering::Relaxed);
        return;
    }
    let Some(mut served) = SERVED.lock().take() else {
        return;
    };
    let door = Door::Channel;
    let next = served.turn(&Noted { door, operate });
    *SERVED.lock() = Some(served);
    NEXT_SERVE.fetch_min(next, Ordering::Relaxed);
    let pause = time::us_to_ticks(RING_EVERY_US);
    RING_FROM.store(time::now_tsc().saturating_add(pause), Ordering::Relaxed);
}

/// Waits, bounded, until what was answered is on the line, the last byte as well: the machine goes off.
pub fn flush() {
    let mut port = PORT.lock();
    port.line.drain();
    if let Some(uart) = port.line.port.as_mut() {
        uart.flush();
    }
}
