//! A serial line with queues: what has arrived waits to be read, what is written waits for the line.
//!
//! The owner calls [`Line::receive`] and [`Line::transmit`] whenever the port may have something to say: at
//! its interrupt, after queueing, from time to time where it has no interrupt. Both return at once.
//! [`Line::settle`] then asks for the interrupts that the queues need. Queues are of fixed size.
//!
//! Invariant: bytes are read in the order in which they arrived and sent in the order in which they
//! were queued. What is lost is counted, and where it was can be marked.

use crate::{queue::ByteQueue, serial::Serial};

/// FIFOs filled in one go, where the line takes them. In emulators it is infinitely fast.
const FIFOS_AT_ONCE: usize = 4;

/// What a line asks of its port.
pub trait Port {
    /// See [`Serial::receive`].
    fn receive(&mut self) -> Option<u8>;
    /// See [`Serial::try_send`].
    fn try_send(&mut self, bytes: &[u8]) -> usize;
    /// See [`Serial::send`].
    fn send(&mut self, bytes: &[u8], received: &mut dyn FnMut(u8)) -> usize;
    /// See [`Serial::set_receive_interrupt`].
    fn set_receive_interrupt(&mut self, on: bool);
    /// See [`Serial::set_transmit_interrupt`].
    fn set_transmit_interrupt(&mut self, on: bool);
    /// See [`Serial::overruns`].
    fn overruns(&self) -> u64;
}

impl Port for Serial {
    fn receive(&mut self) -> Option<u8> {
        Serial::receive(self)
    }

    fn try_send(&mut self, bytes: &[u8]) -> usize {
        Serial::try_send(self, bytes)
    }

    fn send(&mut self, bytes: &[u8], received: &mut dyn FnMut(u8)) -> usize {
        Serial::send(self, bytes, received)
    }

    fn set_receive_interrupt(&mut self, on: bool) {
        Serial::set_receive_interrupt(self, on);
    }

    fn set_transmit_interrupt(&mut self, on: bool) {
        Serial::set_transmit_interrupt(self, on);
    }

    fn overruns(&self) -> u64 {
        Serial::overruns(self)
    }
}

/// What happens to input for which there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// It is read and dropped, so that the newest input's loss is known exactly.
    Drop,
    /// It stays in the port, which holds the sender up where it can (an emulator's) and otherwise overruns. What
    /// was in the port when it overran is dropped, and this byte stands where something is missing.
    Leave {
        /// The mark.
        gap: u8,
    },
}

/// A port and its queues of `IN` and `OUT` bytes.
pub struct Line<P, const IN: usize, const OUT: usize> {
    /// The port, if there is one.
    pub port: Option<P>,
    /// What has arrived.
    pub input: ByteQueue<IN>,
    /// What is to be sent.
    pub output: ByteQueue<OUT>,
    when_full: WhenFull,
    /// Input that came while the queue was full.
    dropped: u64,
    /// The port interrupts: it may be asked to.
    interrupts: bool,
    /// The interrupts that are asked for: input, and room for output.
    asked: (bool, bool),
    /// The last byte sent ended a text line.
    fresh: bool,
    /// Bytes that the port took.
    sent: u64,
    /// Overruns of the port that are marked.
    marked_overruns: u64,
    /// Until the port runs dry: what it gives may be followed by what was lost.
    lossy: bool,
}

impl<P: Port, const IN: usize, const OUT: usize> Line<P, IN, OUT> {
    /// A line without a port.
    pub const fn new(when_full: WhenFull) -> Self {
        Self {
            port: None,
            input: ByteQueue::new(),
            output: ByteQueue::new(),
            when_full,
            dropped: 0,
            interrupts: false,
            asked: (false, false),
            fresh: true,
            sent: 0,
            marked_overruns: 0,
            lossy: false,
        }
    }

    /// The port's interrupt reaches the owner: from now on it is used.
    pub fn use_interrupts(&mut self) {
        self.interrupts = self.port.is_some();
        self.settle();
    }

    /// Whether the port's interrupt is used.
    pub fn has_interrupts(&self) -> bool {
        self.interrupts
    }

    /// Whether the port will interrupt when it takes more output.
    pub fn is_draining(&self) -> bool {
        self.asked.1
    }

    /// Whether the last byte sent ended a text line.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Bytes that the port has taken since the line was made.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// What input was lost, in bytes: for want of room, and (a lower bound) because the port was not
    /// emptied in time.
    pub fn lost(&self) -> (u64, u64) {
        (self.dropped, self.port.as_ref().map_or(0, P::overruns))
    }

    /// Moves what has arrived into the input queue.
    pub fn receive(&mut self) {
        // A port that never runs dry is broken: no more than a queue's worth at a time.
        for _ in 0..IN {
            if matches!(self.when_full, WhenFull::Leave { .. }) && self.input.len() == IN {
                break;
            }
            let Some(port) = self.port.as_mut() else {
                break;
            };
            let byte = port.receive();
            let overruns = port.overruns();
            let kept = match self.when_full {
                WhenFull::Drop => byte,
                WhenFull::Leave { gap } => self.without_losses(byte, overruns, gap),
            };
            if kept.is_some_and(|byte| !self.input.push(byte)) {
                self.dropped += 1;
            }
            if byte.is_none() {
                break;
            }
        }
    }

    /// What to keep of a byte that was read. An overrun is seen before the oldest byte in the port is
    /// read, and what was lost came behind the newest.
    fn without_losses(&mut self, byte: Option<u8>, overruns: u64, gap: u8) -> Option<u8> {
        if overruns != self.marked_overruns {
            self.marked_overruns = overruns;
            self.lossy = true;
        }
        if !self.lossy {
            return byte;
        }
        self.lossy = byte.is_some();
        self.dropped += u64::from(byte.is_some());
        (!self.lossy).then_some(gap)
    }

    /// Hands the port what it takes now; `fetch` may refill the output queue before each piece.
    pub fn transmit(&mut self, mut fetch: impl FnMut(&mut ByteQueue<OUT>)) {
        for _ in 0..FIFOS_AT_ONCE {
            fetch(&mut self.output);
            let bytes = self.output.front();
            let Some(port) = self.port.as_mut().filter(|_| !bytes.is_empty()) else {
                return;
            };
            let sent = port.try_send(bytes);
            let Some(&last) = bytes[..sent].last() else {
                return;
            };
            self.fresh = last == b'\n';
            self.sent += sent as u64;
            self.output.consume(sent);
        }
        fetch(&mut self.output);
    }

    /// Asks for the interrupts that the queues need now.
    pub fn settle(&mut self) {
        let room = self.when_full == WhenFull::Drop || self.input.len() < IN;
        let wanted = (
            self.interrupts && room,
            self.interrupts && !self.output.is_empty(),
        );
        if let Some(port) = self.port.as_mut() {
            if wanted.0 != self.asked.0 {
                port.set_receive_interrupt(wanted.0);
            }
            if wanted.1 != self.asked.1 {
                port.set_transmit_interrupt(wanted.1);
            }
        }
        self.asked = wanted;
    }

    /// To be called last by the port's interrupt handler. An interrupt line that triggers by its edge may have stayed high
    /// all the while, because something came before all else was served (a byte arrived while the transmitter's interrupt was
    /// still pending): then nothing would raise it again. For a moment the port asks for nothing, so that it falls.
    pub fn rearm(&mut self) {
        let (input, room) = self.asked;
        let Some(port) = self.port.as_mut() else {
            return;
        };
        for on in [false, true] {
            if input {
                port.set_receive_interrupt(on);
            }
            if room {
                port.set_transmit_interrupt(on);
            }
        }
    }

    /// Sends the output queue while the caller waits, within the driver's bound. Input is taken meanwhile.
    /// `false`: the line is stuck.
    pub fn drain(&mut self) -> bool {
        let Some(port) = self.port.as_mut() else {
            self.output = ByteQueue::new();
            return true;
        };
        let mut taken = |byte| {
            if !self.input.push(byte) {
                self.dropped += 1;
            }
        };
        while !self.output.is_empty() {
            let bytes = self.output.front();
            let sent = port.send(bytes, &mut taken);
            let Some(&last) = bytes[..sent].last() else {
                return false;
            };
            self.fresh = last == b'\n';
            self.sent += sent as u64;
            self.output.consume(sent);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A port whose memory for input is given, and that takes so many bytes at a time.
    #[derive(Default)]
    struct Fake {
        arriving: VecDeque<u8>,
        sent: Vec<u8>,
        takes: usize,
        asks: (bool, bool),
        overruns: u64,
        /// Times when nothing was asked for.
        quiet: u32,
    }

    impl Port for Fake {
        fn receive(&mut self) -> Option<u8> {
            self.arriving.pop_front()
        }

        fn try_send(&mut self, bytes: &[u8]) -> usize {
            let count = bytes.len().min(self.takes);
            self.sent.extend(&bytes[..count]);
            count
        }

        fn send(&mut self, bytes: &[u8], received: &mut dyn FnMut(u8)) -> usize {
            while let Some(byte) = self.receive() {
                received(byte);
            }
            self.try_send(bytes)
        }

        fn set_receive_interrupt(&mut self, on: bool) {
            self.asks.0 = on;
            self.quiet += u32::from(self.asks == (false, false));
        }

        fn set_transmit_interrupt(&mut self, on: bool) {
            self.asks.1 = on;
            self.quiet += u32::from(self.asks == (false, false));
        }

        fn overruns(&self) -> u64 {
            self.overruns
        }
    }

    #[test]
    fn an_interrupt_line_that_stayed_high_falls_and_may_rise_again() {
        for takes in [0, 8] {
            let mut line = line(WhenFull::Drop, takes);
            line.output.extend(b"abc");
            line.transmit(|_| {});
            line.settle();
            let port = line.port.as_mut().unwrap();
            let (asks, quiet) = (port.asks, port.quiet);
            line.rearm();
            let port = line.port.as_ref().unwrap();
            assert_eq!((port.asks, port.quiet), (asks, quiet + 1));
        }
    }

    fn line(when_full: WhenFull, takes: usize) -> Line<Fake, 4, 8> {
        let mut line = Line::new(when_full);
        line.port = Some(Fake {
            takes,
            ..Fake::default()
        });
        line.use_interrupts();
        line
    }

    fn arrive(line: &mut Line<Fake, 4, 8>, bytes: &[u8]) {
        line.port.as_mut().unwrap().arriving.extend(bytes);
        line.receive();
        line.settle();
    }

    fn asks(line: &Line<Fake, 4, 8>) -> (bool, bool) {
        line.port.as_ref().unwrap().asks
    }

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let mut line = line(WhenFull::Drop, 0);
        arrive(&mut line, b"abcdef");
        // No more than a queue's worth is looked at in one go.
        assert_eq!((line.input.front(), line.lost()), (&b"abcd"[..], (0, 0)));
        arrive(&mut line, b"");
        assert_eq!(line.lost(), (2, 0));
        assert_eq!(asks(&line), (true, false));
    }

    #[test]
    fn what_finds_no_room_stays_where_it_is() {
        let mut line = line(WhenFull::Leave { gap: b'?' }, 0);
        arrive(&mut line, b"abcdef");
        arrive(&mut line, b"");
        assert_eq!(line.lost(), (0, 0));
        // It would go on interrupting for what nobody can take.
        assert_eq!(asks(&line), (false, false));
        line.input.consume(3);
        arrive(&mut line, b"");
        let all: Vec<u8> = std::iter::from_fn(|| line.input.pop()).collect();
        assert_eq!((&all[..], asks(&line).0), (&b"def"[..], true));
    }

    #[test]
    fn where_something_was_lost_there_is_a_mark() {
        let mut line = line(WhenFull::Leave { gap: b'?' }, 0);
        arrive(&mut line, b"a");
        line.port.as_mut().unwrap().overruns = 1;
        // Behind "c" something is missing; "d" came after that.
        arrive(&mut line, b"bcd");
        arrive(&mut line, b"ef");
        let all: Vec<u8> = std::iter::from_fn(|| line.input.pop()).collect();
        assert_eq!((&all[..], line.lost()), (&b"a?ef"[..], (3, 1)));
    }

    #[test]
    fn output_goes_out_in_order_and_interrupts_while_it_waits() {
        let mut line = line(WhenFull::Drop, 1);
        let mut more = VecDeque::from([b"abcdefg\n".to_vec()]);
        let mut fetch = |queue: &mut ByteQueue<8>| {
            if let Some(next) = more.pop_front().filter(|_| queue.is_empty()) {
                queue.extend(&next);
            }
        };
        line.transmit(&mut fetch);
        line.settle();
        assert!(line.is_draining() && asks(&line).1 && !line.is_fresh());
        line.transmit(&mut fetch);
        line.settle();
        assert!(!line.is_draining() && !asks(&line).1 && line.is_fresh());
        assert_eq!(line.sent(), 8);
        assert_eq!(line.port.as_ref().unwrap().sent, b"abcdefg\n");
    }

    #[test]
    fn a_stuck_line_is_told_and_loses_nothing() {
        let mut line = line(WhenFull::Drop, 0);
        line.output.extend(b"x");
        line.port.as_mut().unwrap().arriving.extend(b"in");
        assert!(!line.drain());
        assert_eq!((line.output.len(), line.input.front()), (1, &b"in"[..]));
        line.port.as_mut().unwrap().takes = 3;
        assert!(line.drain() && line.output.is_empty());
    }

    #[test]
    fn without_a_port_nothing_waits() {
        let mut line = Line::<Fake, 4, 8>::new(WhenFull::Drop);
        line.use_interrupts();
        line.output.extend(b"x");
        line.transmit(|_| {});
        assert!(!line.has_interrupts() && line.drain() && line.output.is_empty());
    }
}
