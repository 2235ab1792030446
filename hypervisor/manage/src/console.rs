//! One terminal, many consoles: which guest is shown, and what the escape key does.
//!
//! The terminal shows one guest (the one in focus). Output of the others is kept, the last
//! [`HISTORY_BYTES`] of each, and shown when the terminal switches to them. Bytes that are
//! typed go to the guest in focus, except after the escape key (Ctrl-] unless configured):
//! then one key is a command to Plinth.
//!
//! Invariants: memory is bounded; a line of the host never stands inside a guest's line.
//! This module neither reads nor writes a device: the caller hands in bytes and a writer.

use alloc::{
    collections::VecDeque,
    format,
    string::{String, ToString},
    vec::Vec,
};

/// Bytes of output kept per console that is not shown.
pub const HISTORY_BYTES: usize = 16 * 1024;

/// Ctrl-], the escape key by default.
pub const DEFAULT_ESCAPE: u8 = 0x1d;

/// A console's number: the order in which consoles were attached, from 0. People count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleId(pub usize);

/// Where typed input goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// This byte is for this guest's serial port.
    Guest(ConsoleId, u8),
    /// The terminal now shows another guest, or told the person something.
    Handled,
    /// The person asked to power the host off.
    PowerOff,
}

#[derive(Debug)]
struct Console {
    name: String,
    missed: VecDeque<u8>,
    /// Bytes that did not fit in `missed`.
    dropped: u64,
}

/// The terminal and the consoles behind it.
#[derive(Debug)]
pub struct ConsoleMux {
    consoles: Vec<Console>,
    focus: usize,
    escape: u8,
    escaped: bool,
    at_line_start: bool,
}

impl ConsoleMux {
    /// A terminal without consoles. `escape`: the byte that the escape key sends.
    pub const fn new(escape: u8) -> Self {
        ConsoleMux {
            consoles: Vec::new(),
            focus: 0,
            escape,
            escaped: false,
            at_line_start: true,
        }
    }

    /// Adds a guest's console.
    pub fn attach(&mut self, name: &str) -> ConsoleId {
        let console = Console {
            name: name.to_string(),
            missed: VecDeque::new(),
            dropped: 0,
        };
        self.consoles.push(console);
        ConsoleId(self.consoles.len() - 1)
    }

    /// Shows this console from the start, without a word.
    pub fn show_first(&mut self, console: ConsoleId) {
        self.focus = console.0;
    }

    /// The console that is shown.
    pub fn focus(&self) -> ConsoleId {
        ConsoleId(self.focus)
    }

    /// Shows another console: says which, and replays what was missed.
    pub fn switch(&mut self, to: ConsoleId, write: &mut dyn FnMut(&[u8])) {
        let Some(console) = self.consoles.get_mut(to.0) else {
            let line = format!("no console {}; there are {}", to.0 + 1, self.consoles.len());
            self.host_line(&line, write);
            return;
        };
        let missed = core::mem::take(&mut console.missed);
        let dropped = core::mem::take(&mut console.dropped);
        let mut line = format!("console {}: {}", to.0 + 1, console.name);
        if dropped > 0 {
            line += &format!(" ({dropped} earlier bytes are gone)");
        }
        self.focus = to.0;
        self.host_line(&line, write);
        let (first, second) = missed.as_slices();
        self.show(first, write);
        self.show(second, write);
    }

    /// Output of a guest: shown if it is in focus, kept if not.
    pub fn output(&mut self, from: ConsoleId, bytes: &[u8], write: &mut dyn FnMut(&[u8])) {
        if from.0 == self.focus {
            self.show(bytes, write);
            return;
        }
        let Some(console) = self.consoles.get_mut(from.0) else {
            return;
        };
        for &byte in bytes {
            if console.missed.len() == HISTORY_BYTES {
                console.missed.pop_front();
                console.dropped += 1;
            }
            console.missed.push_back(byte);
        }
    }

    fn show(&mut self, bytes: &[u8], write: &mut dyn FnMut(&[u8])) {
        if let Some(&last) = bytes.last() {
            write(bytes);
            self.at_line_start = last == b'\n';
        }
    }

    /// A line of the host's own, on a line by itself.
    pub fn host_line(&mut self, text: &str, write: &mut dyn FnMut(&[u8])) {
        if !self.at_line_start {
            write(b"\r\n");
        }
        write(b"[plinth] ");
        write(text.as_bytes());
        write(b"\r\n");
        self.at_line_start = true;
    }

    /// One byte that was typed.
    pub fn input(&mut self, byte: u8, write: &mut dyn FnMut(&[u8])) -> Input {
        if !core::mem::take(&mut self.escaped) {
            if byte == self.escape {
                self.escaped = true;
                return Input::Handled;
            }
            return Input::Guest(self.focus(), byte);
        }
        let count = self.consoles.len().max(1);
        match byte {
            b if b == self.escape => return Input::Guest(self.focus(), byte),
            b'1'..=b'9' => self.switch(ConsoleId(usize::from(byte - b'1')), write),
            b'n' | b'\t' => self.switch(ConsoleId((self.focus + 1) % count), write),
            b'p' => self.switch(ConsoleId((self.focus + count - 1) % count), write),
            b'l' => self.list(write),
            b'q' => return Input::PowerOff,
            _ => self.help(write),
        }
        Input::Handled
    }

    fn list(&mut self, write: &mut dyn FnMut(&[u8])) {
        for n in 0..self.consoles.len() {
            let console = &self.consoles[n];
            let mark = if n == self.focus { '*' } else { ' ' };
            let waiting = console.missed.len();
            let line = format!(
                "{mark} {}  {}  ({waiting} bytes not seen yet)",
                n + 1,
                console.name
            );
            self.host_line(&line, write);
        }
    }

    fn help(&mut self, write: &mut dyn FnMut(&[u8])) {
        for line in [
            "keys after the escape key:",
            "  1..9  show that console      n, p  next, previous console",
            "  l     list the consoles      q     power the host off",
            "  escape key again: send it to the guest",
        ] {
            self.host_line(line, write);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(mux: &mut ConsoleMux, keys: &[u8]) -> (Vec<Input>, String) {
        let mut out = Vec::new();
        let inputs = keys
            .iter()
            .map(|&k| mux.input(k, &mut |b| out.extend_from_slice(b)))
            .collect();
        (inputs, String::from_utf8(out).unwrap())
    }

    fn mux() -> ConsoleMux {
        let mut mux = ConsoleMux::new(DEFAULT_ESCAPE);
        mux.attach("linux");
        mux.attach("stub");
        mux
    }

    #[test]
    fn bytes_go_to_the_guest_in_focus() {
        let mut m = mux();
        let (inputs, _) = typed(&mut m, b"a\x1dnb");
        assert_eq!(inputs[0], Input::Guest(ConsoleId(0), b'a'));
        assert_eq!(inputs[3], Input::Guest(ConsoleId(1), b'b'));
    }

    #[test]
    fn missed_output_is_replayed_on_a_line_of_its_own() {
        let mut m = mux();
        let mut out = Vec::new();
        m.output(ConsoleId(0), b"~ # ", &mut |b| out.extend_from_slice(b));
        m.output(ConsoleId(1), b"hello\r\n", &mut |b| {
            out.extend_from_slice(b)
        });
        assert_eq!(out, b"~ # ");
        let (_, text) = typed(&mut m, b"\x1d2");
        assert_eq!(text, "\r\n[plinth] console 2: stub\r\nhello\r\n");
        let (_, text) = typed(&mut m, b"\x1dp\x1dn");
        assert!(!text.contains("hello"), "replayed once only: {text}");
    }

    #[test]
    fn history_is_bounded_and_says_what_is_gone() {
        let mut m = mux();
        m.output(ConsoleId(1), &[b'x'; HISTORY_BYTES + 5], &mut |_| {
            panic!("not in focus")
        });
        let (_, text) = typed(&mut m, b"\x1dn");
        assert!(text.contains("(5 earlier bytes are gone)"), "{text}");
        assert_eq!(text.matches('x').count(), HISTORY_BYTES);
    }

    #[test]
    fn escape_commands() {
        let mut m = mux();
        assert_eq!(
            typed(&mut m, b"\x1d\x1d").0[1],
            Input::Guest(ConsoleId(0), 0x1d)
        );
        assert_eq!(typed(&mut m, b"\x1dq").0[1], Input::PowerOff);
        assert!(
            typed(&mut m, b"\x1d9")
                .1
                .contains("no console 9; there are 2")
        );
        assert!(typed(&mut m, b"\x1dl").1.contains("* 1  linux"));
        assert!(typed(&mut m, b"\x1d?").1.contains("power the host off"));
    }
}
