//! One terminal, many consoles: which guest is shown, what goes out next, and what the escape key does.
//!
//! The terminal shows one guest (the one in focus). What a guest writes is kept in a queue of its own,
//! [`HISTORY_BYTES`] long. The terminal takes from the queue of the guest in focus as fast as its line
//! is; when that queue is full, the guest is told that nothing more fits, and later that there is room
//! again ([`ConsoleMux::pop_resumable`]). The queues of the others forget their oldest bytes instead; what is
//! left is shown when the terminal switches to them. Bytes that are typed go to the guest in
//! focus, except after the escape key (Ctrl-] unless configured): then one key is a command to Plinth.
//!
//! Lines of the host wait for the end of the guest's line, or for [`PATIENCE_US`] in which the guest says no more;
//! what a guest wrote before such a line goes out before it. Answers to commands do not wait.
//!
//! Invariants: memory is bounded, and all of it is there once the last console is attached; nobody waits;
//! a host line never stands inside a guest's line. This module neither reads nor writes a device.

use alloc::{
    collections::VecDeque,
    string::{String, ToString},
    vec::Vec,
};
use core::fmt;

/// Bytes of output kept per console that have not been shown.
pub const HISTORY_BYTES: usize = 16 * 1024;
/// A guest whose output did not fit goes on when there is room for so many bytes: a UART's FIFO.
const RESUME_BYTES: usize = 16;
/// Bytes of host lines that wait. Further lines are left out, and counted.
const LINE_BYTES: usize = 64 * 1024;
/// Host lines that wait, at most.
const LINES: usize = 1024;
/// How long an unfinished line of a guest that is silent holds up a host line.
pub const PATIENCE_US: u64 = 100_000;
/// Bytes of a guest's line without an end that hold up a host line.
const LONGEST_LINE: usize = 1024;
/// What a host line begins with.
const PREFIX: &[u8] = b"[plinth] ";

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
    /// Not shown yet.
    kept: VecDeque<u8>,
    /// Bytes that did not fit in `kept` while the console was not shown.
    dropped: u64,
    /// Bytes that ever were in `kept`.
    written: u64,
    /// Output was refused.
    refused: bool,
}

impl Console {
    fn room(&self) -> usize {
        HISTORY_BYTES - self.kept.len()
    }

    /// Bytes that went out, or were dropped.
    fn passed(&self) -> u64 {
        self.written - self.kept.len() as u64
    }
}

/// A line put together without the heap; what does not fit is cut.
pub struct Text {
    bytes: [u8; 120],
    length: usize,
}

impl Text {
    /// The words, of which the first 120 bytes are kept.
    pub fn new(words: fmt::Arguments<'_>) -> Self {
        let mut text = Text {
            bytes: [0; 120],
            length: 0,
        };
        // It cuts, and never fails.
        let _ = fmt::write(&mut text, words);
        text
    }

    /// What was kept.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        Ok(())
    }
}

/// When a host line may go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// At once.
    Now,
    /// When so many bytes of this console's output have gone out, or it is not shown.
    After(ConsoleId, u64),
}

#[derive(Debug)]
struct Line {
    length: usize,
    when: When,
}

/// The terminal and the consoles behind it.
#[derive(Debug)]
pub struct ConsoleMux {
    consoles: Vec<Console>,
    focus: usize,
    escape: u8,
    escaped: bool,
    at_line_start: bool,
    /// Host lines that wait, oldest first; their text is in `text`.
    lines: VecDeque<Line>,
    text: VecDeque<u8>,
    left_out: u64,
    /// Bytes left of the host line that is going out.
    in_line: usize,
    /// Since when a host line waits for the end of a silent guest's line, in microseconds.
    silent_since: Option<u64>,
    /// Bytes of a guest's line that went out while a host line waited for its end.
    overdue: usize,
    hurried: bool,
    /// Of some console.
    any_refused: bool,
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
            lines: VecDeque::new(),
            text: VecDeque::new(),
            left_out: 0,
            in_line: 0,
            silent_since: None,
            overdue: 0,
            hurried: false,
            any_refused: false,
        }
    }

    /// Adds a guest's console, and takes its memory.
    pub fn attach(&mut self, name: &str) -> ConsoleId {
        let console = Console {
            name: name.to_string(),
            kept: VecDeque::with_capacity(HISTORY_BYTES),
            dropped: 0,
            written: 0,
            refused: false,
        };
        self.consoles.push(console);
        self.reserve_lines();
        ConsoleId(self.consoles.len() - 1)
    }

    /// Takes the memory of host lines, so that none is taken when one comes.
    pub fn reserve_lines(&mut self) {
        self.lines.reserve_exact(LINES - self.lines.len());
        // And the end of a guest's line.
        self.text.reserve_exact(LINE_BYTES + 2 - self.text.len());
    }

    /// Shows this console from the start, without a word.
    pub fn show_first(&mut self, console: ConsoleId) {
        self.focus = console.0;
    }

    /// The console that is shown.
    pub fn focus(&self) -> ConsoleId {
        ConsoleId(self.focus)
    }

    /// Shows another console: says which, and goes on with what was missed.
    pub fn switch(&mut self, to: ConsoleId) {
        let Some(console) = self.consoles.get_mut(to.0) else {
            let count = self.consoles.len();
            self.answer(format_args!("no console {}; there are {count}", to.0 + 1));
            return;
        };
        let dropped = core::mem::take(&mut console.dropped);
        let number = to.0 + 1;
        let line = match dropped {
            0 => Text::new(format_args!("console {number}: {}", console.name)),
            dropped => Text::new(format_args!(
                "console {number}: {} ({dropped} earlier bytes are gone)",
                console.name
            )),
        };
        self.focus = to.0;
        self.answer_line(line.as_bytes());
    }

    /// Output of a guest. Returns how many bytes were taken: fewer than all only of the guest in focus.
    #[must_use = "what was not taken is to be offered again"]
    pub fn output(&mut self, from: ConsoleId, bytes: &[u8]) -> usize {
        let shown = from.0 == self.focus;
        let Some(console) = self.consoles.get_mut(from.0) else {
            return bytes.len();
        };
        let mut taken = bytes;
        if shown {
            taken = &bytes[..bytes.len().min(console.room())];
            let refused = taken.len() < bytes.len();
            console.refused |= refused;
            self.any_refused |= refused;
        }
        for &byte in taken {
            if console.room() == 0 {
                console.kept.pop_front();
                console.dropped += 1;
            }
            console.kept.push_back(byte);
        }
        console.written += taken.len() as u64;
        taken.len()
    }

    /// Whether [`ConsoleMux::pop_resumable`] would find one.
    pub fn can_resume(&self) -> bool {
        self.any_refused && self.resumable().is_some()
    }

    fn resumable(&self) -> Option<usize> {
        self.consoles.iter().enumerate().position(|(n, console)| {
            console.refused && (n != self.focus || console.room() >= RESUME_BYTES)
        })
    }

    /// A console whose output was refused, and for which there is room now. To be asked until there is none.
    pub fn pop_resumable(&mut self) -> Option<ConsoleId> {
        if !self.any_refused {
            return None;
        }
        let found = self.resumable()?;
        self.consoles[found].refused = false;
        self.any_refused = self.consoles.iter().any(|console| console.refused);
        Some(ConsoleId(found))
    }

    /// A line of the host's own, on a line by itself, after what the guest in focus has written. Left out, and counted,
    /// when too many wait.
    pub fn host_line(&mut self, text: &[u8]) {
        let shown = self.consoles.get(self.focus);
        let when = shown.map_or(When::Now, |console| {
            When::After(self.focus(), console.written)
        });
        if self.left_out > 0 {
            let line = Text::new(format_args!("{} lines were left out here", self.left_out));
            if self.add_line(line.as_bytes(), when) {
                self.left_out = 0;
            }
        }
        if self.left_out > 0 || !self.add_line(text, when) {
            self.left_out += 1;
        }
    }

    /// A line for the person who typed a command.
    fn answer(&mut self, words: fmt::Arguments<'_>) {
        self.answer_line(Text::new(words).as_bytes());
    }

    fn answer_line(&mut self, text: &[u8]) {
        for line in &mut self.lines {
            line.when = When::Now;
        }
        // With so many lines waiting, one more or less does not matter.
        let _ = self.add_line(text, When::Now);
    }

    fn add_line(&mut self, text: &[u8], when: When) -> bool {
        let length = PREFIX.len() + text.len() + 2;
        let fits = self.lines.len() < LINES && self.text.len() + length <= LINE_BYTES;
        if fits {
            self.text.extend(PREFIX.iter().chain(text).chain(b"\r\n"));
            self.lines.push_back(Line { length, when });
        }
        fits
    }

    /// Whether a host line waits: then [`ConsoleMux::pull`] wants to know the time.
    pub fn has_lines(&self) -> bool {
        !self.lines.is_empty()
    }

    /// When to [`ConsoleMux::pull`] again though nobody wrote anything, in microseconds.
    pub fn look_again_at(&self) -> Option<u64> {
        Some(self.silent_since? + PATIENCE_US)
    }

    /// From now on no host line waits for the end of a silent guest's line: the machine stops.
    pub fn hurry(&mut self) {
        self.hurried = true;
    }

    /// What goes to the terminal next: fills `buffer` as far as there is something. Returns how many bytes.
    pub fn pull(&mut self, buffer: &mut [u8], now_us: u64) -> usize {
        let mut count = 0;
        while count < buffer.len() {
            let Some(byte) = self.next(now_us) else { break };
            buffer[count] = byte;
            count += 1;
        }
        count
    }

    fn next(&mut self, now_us: u64) -> Option<u8> {
        if self.in_line == 0 && self.line_is_due() {
            if !self.at_line_start {
                if !self.may_break_line(now_us) {
                    return self.next_of_guest();
                }
                // As if the guest had ended its line: CR here, LF the next time.
                self.in_line = 2;
                self.text.push_front(b'\n');
                self.text.push_front(b'\r');
            } else if let Some(line) = self.lines.pop_front() {
                self.in_line = line.length;
            }
            self.silent_since = None;
            self.overdue = 0;
        }
        if self.in_line > 0 {
            self.in_line -= 1;
            let byte = self.text.pop_front();
            self.at_line_start = byte == Some(b'\n');
            return byte;
        }
        self.next_of_guest()
    }

    fn next_of_guest(&mut self) -> Option<u8> {
        let byte = self.consoles.get_mut(self.focus)?.kept.pop_front()?;
        self.at_line_start = byte == b'\n';
        self.silent_since = None;
        self.overdue += 1;
        Some(byte)
    }

    /// Whether all that has to go out before the oldest host line has.
    fn line_is_due(&mut self) -> bool {
        let due = match self.lines.front() {
            None => false,
            Some(Line {
                when: When::After(console, written),
                ..
            }) if console.0 == self.focus => self
                .consoles
                .get(console.0)
                .is_none_or(|console| console.passed() >= *written),
            Some(_) => true,
        };
        if !due {
            self.overdue = 0;
        }
        due
    }

    /// Whether the guest's unfinished line has held up a host line for long enough.
    fn may_break_line(&mut self, now_us: u64) -> bool {
        let at_once = self
            .lines
            .front()
            .is_some_and(|line| line.when == When::Now);
        let silent = self
            .consoles
            .get(self.focus)
            .is_none_or(|console| console.kept.is_empty());
        if at_once || self.overdue >= LONGEST_LINE || silent && self.hurried {
            return true;
        }
        if !silent {
            return false;
        }
        let since = *self.silent_since.get_or_insert(now_us);
        now_us.saturating_sub(since) >= PATIENCE_US
    }

    /// One byte that was typed.
    pub fn input(&mut self, byte: u8) -> Input {
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
            b'1'..=b'9' => self.switch(ConsoleId(usize::from(byte - b'1'))),
            b'n' | b'\t' => self.switch(ConsoleId((self.focus + 1) % count)),
            b'p' => self.switch(ConsoleId((self.focus + count - 1) % count)),
            b'l' => self.list(),
            b'q' => return Input::PowerOff,
            _ => self.help(),
        }
        Input::Handled
    }

    fn list(&mut self) {
        for n in 0..self.consoles.len() {
            let console = &self.consoles[n];
            let mark = if n == self.focus { '*' } else { ' ' };
            let waiting = console.kept.len();
            let line = Text::new(format_args!(
                "{mark} {}  {}  ({waiting} bytes not seen yet)",
                n + 1,
                console.name
            ));
            self.answer_line(line.as_bytes());
        }
    }

    fn help(&mut self) {
        for line in [
            "keys after the escape key:",
            "  1..9  show that console      n, p  next, previous console",
            "  l     list the consoles      q     power the host off",
            "  escape key again: send it to the guest",
        ] {
            self.answer_line(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
