//! The host's serial console: the one port that log and guests' consoles share.
//!
//! Everything here takes as long as a few register accesses; nobody waits for the line once the VMs run.
//! Input waits in a queue of fixed size, filled by the port's interrupt, by whoever writes, and by
//! [`attend`]. What was typed takes effect in its order: a byte for the shell stays until the shell takes it
//! ([`read_for_shell`]), and what was typed behind it waits, the escape key as well. Output waits in the queues of the [`ConsoleMux`], one per guest; the port's interrupt takes
//! from them what the line takes. A guest in focus whose queue is full is told so, and told to go on when
//! there is room again ([`pop_resumable`]): it is slowed down to the line's speed, and nobody else is.
//!
//! The log's lines before the VMs run, and those of [`write_all`], go straight to the line, and the caller waits
//! where it must. A fault report does so past all queues: [`report`].
//!
//! Under this lock no memory is asked for once the VMs run, since an interrupt handler takes it.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use drivers::{
    by_clock::ByClock,
    firmware::Firmware,
    line::{Line, WhenFull},
    power::Emulator,
    queue::ByteQueue,
    serial::{COM1, Serial},
};
use manage::console::{ConsoleId, ConsoleMux, DEFAULT_ESCAPE, Input, Prepared};

use crate::{
    doors,
    interrupts::{self, vector},
    operator, percpu, power,
    sync::Lock,
    time,
};

/// ISA interrupt of COM1.
const COM1_IRQ: u8 = 4;
/// Bytes of input that wait; more are dropped.
const INPUT_BYTES: usize = 4096;
/// How long the port is left alone where it has to be looked at, in microseconds. Its 16 bytes of memory are
/// full after 1.4 ms at 115,200 baud, in Bochs after 1.1.
pub const LOOK_EVERY_US: u64 = 500;
/// While output waits the port is looked at so often even if no interrupt comes, in microseconds.
pub const LOOK_AT_OUTPUT_US: u64 = 10_000;
/// Bytes of output that wait on their way past the guests' queues. At 115,200 baud this is a second and a half.
const OUTPUT_BYTES: usize = 16 * 1024;
/// Bytes moved from the guests' queues at a time: the FIFO of a UART.
const FIFO_BYTES: usize = 16;
/// How often a stuck line is given another chance before the machine stops; each takes about 50 ms.
const LAST_CHANCES: u32 = 40;

struct Console {
    line: Line<Serial, INPUT_BYTES, OUTPUT_BYTES>,
    mux: ConsoleMux,
    /// A fault report has begun: nothing else is sent any more.
    reporting: bool,
    /// The shell's door rang for the oldest byte of input, and the shell has not come for it.
    rang_for_shell: bool,
}

/// How long a guest may run before it must be made to exit for the port's sake.
static BY_CLOCK: ByClock = ByClock::off();
/// [`LOOK_AT_OUTPUT_US`] in TSC ticks.
static OUTPUT_TICKS: AtomicU64 = AtomicU64::new(0);
/// Input has come, or a guest can go on writing.
static WORK: AtomicBool = AtomicBool::new(false);
/// Host TSC at which the port has to be looked at though it did not interrupt.
static NEXT_LOOK: AtomicU64 = AtomicU64::new(u64::MAX);

static CONSOLE: Lock<Console> = Lock::new(Console {
    line: Line::new(WhenFull::Drop),
    mux: ConsoleMux::new(DEFAULT_ESCAPE),
    reporting: false,
    rang_for_shell: false,
});

/// Finds the serial port. Returns whether there is one.
pub fn init() -> bool {
    // SAFETY: the kernel calls this once, before anything else drives the port; on a machine without
    // COM1 the ports are unused.
    let port = unsafe { Serial::probe(COM1) };
    let found = port.is_some();
    let mut console = CONSOLE.lock();
    console.line.port = port;
    if !found {
        console.mux.disconnect();
    }
    found
}

/// Lets the port interrupt the calling processor, the first one. `false`: it cannot, and is looked at instead.
/// After the clock's calibration.
pub fn start_interrupts(firmware: &Firmware) -> bool {
    let mut console = CONSOLE.lock();
    OUTPUT_TICKS.store(time::us_to_ticks(LOOK_AT_OUTPUT_US), Ordering::Relaxed);
    if console.line.port.is_none() {
        return false;
    }
    let routed = interrupts::route_isa(firmware, COM1_IRQ, vector::SERIAL);
    look_by_clock_if_needed(&BY_CLOCK, routed);
    if routed {
        console.line.use_interrupts();
    }
    routed
}

/// Starts looking at a serial port by the clock, if its interrupt was not `routed`, or does not end a guest's run.
pub fn look_by_clock_if_needed(by_clock: &ByClock, routed: bool) {
    // Bochs 2.7 does not let a host interrupt end a guest's run that was entered with IF = 0 before IF changes.
    if !routed || power::emulator() == Some(Emulator::Bochs) {
        by_clock.start(time::us_to_ticks(LOOK_EVERY_US));
    }
}

/// Host TSC at which the first processor, when it runs a guest, has to [`attend`] again; `None` if the
/// port's interrupt makes the guest exit.
pub fn look_again_at() -> Option<u64> {
    BY_CLOCK.again_at()
}

/// Host TSC at which the first processor, when it has nothing to do, has to [`attend`] again.
pub fn wake_up_at() -> Option<u64> {
    if WORK.load(Ordering::Relaxed) {
        return Some(0);
    }
    let next = NEXT_LOOK.load(Ordering::Relaxed);
    // Where the port has an interrupt, that wakes a halted processor; in Bochs, too.
    let look = look_again_at().filter(|_| !CONSOLE.lock().line.has_interrupts());
    let next = next
        .min(look.unwrap_or(u64::MAX))
        .min(operator::wake_up_at());
    Some(next).filter(|&at| at != u64::MAX)
}

/// Does what is due without an interrupt at this host TSC, which is now. Whether there is input to [`read`], or a
/// guest to resume. The first processor's business.
#[inline]
pub fn attend(now: u64) -> bool {
    if BY_CLOCK.look(now) || NEXT_LOOK.load(Ordering::Relaxed) <= now {
        CONSOLE.lock().pump();
    }
    operator::attend(now);
    // Most often there is nothing, and the look is cheaper than the exchange.
    WORK.load(Ordering::Relaxed) && WORK.swap(false, Ordering::Relaxed)
}

impl Console {
    /// Moves what goes out next to the output queue, if that is empty.
    fn fetch(mux: &mut ConsoleMux, reporting: bool, output: &mut ByteQueue<OUTPUT_BYTES>) {
        if !output.is_empty() || reporting {
            return;
        }
        let now_us = match mux.wants_time() {
            true => time::ns() / 1000,
            false => 0,
        };
        let mut buffer = [0; FIFO_BYTES];
        let count = mux.pull(&mut buffer, now_us);
        // An empty queue has room for a FIFO.
        output.extend(&buffer[..count]);
    }

    /// Moves what has arrived into the input queue, and waiting output to the port as far as it takes it.
    fn pump(&mut self) {
        self.line.receive();
        let (mux, reporting) = (&mut self.mux, self.reporting);
        self.line
            .transmit(|output| Self::fetch(mux, reporting, output));
        self.line.settle();
        let waits = !self.line.output.is_empty();
        let draining = self.line.is_draining();
        // Soon enough for a line that waits for a silent guest, too.
        let look = waits || self.mux.look_again_at().is_some();
        let next = match look {
            true => time::now_tsc().saturating_add(OUTPUT_TICKS.load(Ordering::Relaxed)),
            false => u64::MAX,
        };
        let before = NEXT_LOOK.swap(next, Ordering::Relaxed);
        if self.mux.can_resume() {
            WORK.store(true, Ordering::Relaxed);
        }
        self.announce_input();
        if self.mux.is_shell_disturbed() {
            doors::ring();
        }
        // The first processor looks, and may be halted.
        if before == u64::MAX
            && next != u64::MAX
            && !draining
            && percpu::try_number().is_some_and(|number| number != 0)
            && let Some(first) = percpu::get(0)
        {
            interrupts::kick(first);
        }
    }

    /// Whether the oldest byte of input is the shell's.
    fn is_for_shell(&self) -> bool {
        let oldest = self.line.input.front().first();
        oldest.is_some_and(|&byte| self.mux.is_for_shell(byte))
    }

    /// Tells whoever has to read the oldest byte of input, if there is one. The shell is told once: while it waits for
    /// the terminal to take its output it does not read.
    fn announce_input(&mut self) {
        if self.is_for_shell() {
            if !core::mem::replace(&mut self.rang_for_shell, true) {
                doors::ring();
            }
        } else if !self.line.input.is_empty() {
            WORK.store(true, Ordering::Relaxed);
        }
    }

    /// As [`Console::pump`], unless the transmitter's interrupt will do it.
    fn pump_unless_draining(&mut self) {
        if !self.line.is_draining() {
            self.pump();
        }
    }

    /// As [`Line::drain`]. What a stuck line does not take is dropped: better than trying again for each byte.
    fn drain_or_drop(&mut self) {
        if !self.line.drain() {
            self.line.output = ByteQueue::new();
        }
    }

    fn write_waiting(&mut self, mut bytes: &[u8]) {
        loop {
            let taken = self.line.output.extend(bytes);
            bytes = &bytes[taken..];
            self.pump();
            if !self.line.has_interrupts() {
                self.drain_or_drop();
            }
            if bytes.is_empty() {
                return;
            }
            self.drain_or_drop();
        }
    }
}

/// The port's interrupt.
pub fn on_interrupt() {
    let mut console = CONSOLE.lock();
    if let Some(port) = console.line.port.as_mut() {
        port.acknowledge();
    }
    console.pump();
    console.line.rearm();
}

/// Makes the shell's console, and sets the byte that the escape key sends. Before guests' consoles are attached.
pub fn begin(escape: u8) {
    let mut console = CONSOLE.lock();
    console.mux.begin();
    console.mux.set_escape(escape);
}

/// Adds a guest's console. The first one is shown, until another one is to be `shown`. `None`: there are as
/// many as there may be. Memory is asked for outside the lock.
pub fn attach(name: &str, shown: bool) -> Option<ConsoleId> {
    let prepared = Prepared::new(name);
    let mut console = CONSOLE.lock();
    let id = console.mux.attach(prepared)?;
    if shown {
        console.mux.show_first(id);
    }
    Some(id)
}

/// Takes a guest's console away. If it was shown, the shell is shown. With no other lock held.
pub fn detach(id: ConsoleId) {
    let mut console = CONSOLE.lock();
    let prepared = console.mux.detach(id);
    console.announce_input();
    console.pump_unless_draining();
    drop(console);
    // Memory is given back outside the lock.
    drop(prepared);
}

/// The console that the terminal shows.
pub fn focus() -> ConsoleId {
    CONSOLE.lock().mux.focus()
}

/// The console that the terminal shows alone, as it comes; `None` while it shows all of them.
pub fn shown_alone() -> Option<ConsoleId> {
    CONSOLE.lock().mux.shown_alone()
}

/// Shows the console of this VM on the terminal. `false`: it has none.
pub fn show(name: &str) -> bool {
    let mut console = CONSOLE.lock();
    let found = console.mux.find(name);
    if let Some(id) = found {
        console.mux.switch(id);
        console.pump_unless_draining();
    }
    console.announce_input();
    found.is_some()
}

/// The console of this VM.
pub fn find(name: &str) -> Option<ConsoleId> {
    CONSOLE.lock().mux.find(name)
}

/// The guest's console after this one, or before.
pub fn neighbour(of: ConsoleId, next: bool) -> Option<ConsoleId> {
    CONSOLE.lock().mux.neighbour(of, next)
}

/// Shows on the terminal what was shown before the shell.
pub fn leave_shell() {
    let mut console = CONSOLE.lock();
    console.mux.leave_shell();
    console.announce_input();
    console.pump_unless_draining();
}

/// Whether the shell has to show its line anew; see [`ConsoleMux::take_shell_disturbed`].
pub fn take_shell_disturbed() -> bool {
    CONSOLE.lock().mux.take_shell_disturbed()
}

/// Reads along what a console shows; see [`ConsoleMux::copy`].
pub fn copy(id: ConsoleId, from: u64, buffer: &mut [u8]) -> Option<(usize, u64)> {
    CONSOLE.lock().mux.copy(id, from, buffer)
}

/// The byte that the escape key sends.
pub fn escape() -> u8 {
    CONSOLE.lock().mux.escape()
}

/// There is input to [`read`] that did not come by the port.
pub fn look_at_input() {
    WORK.store(true, Ordering::Relaxed);
}

/// Whether there is something to [`attend`] to at once: input to [`read`], or a guest to resume.
pub fn has_work() -> bool {
    WORK.load(Ordering::Relaxed)
}

/// What was typed, if anything: the oldest key, unless it is the shell's, which is left to it.
pub fn read() -> Option<Input> {
    if let Some(input) = operator::read_local() {
        return Some(input);
    }
    let mut console = CONSOLE.lock();
    if console.is_for_shell() {
        console.announce_input();
        return None;
    }
    let byte = console.line.input.pop()?;
    let input = console.mux.input(byte);
    if input == Input::Handled {
        console.pump_unless_draining();
    }
    Some(input)
}

/// Whether there is something to [`read_for_shell`].
pub fn has_shell_input() -> bool {
    CONSOLE.lock().is_for_shell()
}

/// What was typed for the shell on the serial terminal, if that is the oldest key.
pub fn read_for_shell() -> Option<u8> {
    let mut console = CONSOLE.lock();
    console.rang_for_shell = false;
    if !console.is_for_shell() {
        // What stands behind what the shell has read.
        console.announce_input();
        return None;
    }
    let byte = console.line.input.pop()?;
    match console.mux.input(byte) {
        Input::Shell(byte) => Some(byte),
        _ => None,
    }
}

/// A guest's output. Returns how many bytes were taken; never waits for the line.
pub fn guest_output(from: ConsoleId, bytes: &[u8]) -> usize {
    let mut console = CONSOLE.lock();
    let taken = console.mux.output(from, bytes);
    if console.line.port.is_some() {
        console.pump_unless_draining();
    }
    taken
}

/// A guest whose output was not all taken, and that can go on. To be asked until there is none.
pub fn pop_resumable() -> Option<ConsoleId> {
    loop {
        let found = CONSOLE.lock().mux.pop_resumable()?;
        if found != ConsoleId::SHELL {
            return Some(found);
        }
        doors::ring();
    }
}

/// A line of the host's among the guests' lines, begun with `[plinth]`; never waits for the line.
pub fn host_line(text: &[u8]) {
    let mut console = CONSOLE.lock();
    if console.line.port.is_some() {
        console.mux.host_line(text);
        console.pump_unless_draining();
    }
}

/// What input was lost before it could be read, in bytes: for want of room in the queue, and (a lower
/// bound) because the port was not emptied in time.
pub fn lost_input() -> (u64, u64) {
    CONSOLE.lock().line.lost()
}

/// Writes all of `bytes` as one piece past the guests' queues, waiting for the line, within the driver's bound,
/// when the queue is full.
pub fn write_all(bytes: &[u8]) {
    CONSOLE.lock().write_waiting(bytes);
}

/// Writes one line of text and ends it, as [`write_all`].
pub fn write_line(line: &[u8]) {
    let mut console = CONSOLE.lock();
    console.write_waiting(line);
    console.write_waiting(b"\r\n");
}

/// A piece of a fault report: on the line when this returns, whatever else waits. The first piece begins a
/// line. From then on nothing else is sent.
pub fn report(bytes: &[u8]) {
    let mut console = CONSOLE.lock();
    if !console.reporting {
        console.reporting = true;
        // A lock that was taken by force may guard a queue that is just being changed.
        let begun = !console.is_forced() && console.line.drain();
        if !(begun && console.line.is_fresh()) {
            console.send_now(b"\r\n");
        }
    }
    console.send_now(bytes);
}

impl Console {
    fn fetch_next(&mut self) {
        Self::fetch(&mut self.mux, self.reporting, &mut self.line.output);
    }

    fn send_now(&mut self, bytes: &[u8]) {
        if let Some(port) = self.line.port.as_mut() {
            port.send(bytes, |_| {});
            port.flush();
        }
    }
}

/// Waits, bounded, until everything written is on the line: the shown guest's output and the host's lines, too.
pub fn flush() {
    let mut console = CONSOLE.lock();
    if !console.reporting {
        console.mux.hurry();
        let mut chances = LAST_CHANCES;
        loop {
            if console.line.drain() {
                console.fetch_next();
                if console.line.output.is_empty() {
                    break;
                }
            } else if chances == 0 {
                console.line.output = ByteQueue::new();
                break;
            } else {
                chances -= 1;
            }
        }
    }
    if let Some(port) = console.line.port.as_mut() {
        port.flush();
    }
}
