//! One terminal, many consoles: what is shown, what goes out next, and what the escape key does.
//!
//! The terminal shows one console (a guest's, or the operator's shell), or all guests' consoles line by line. What is
//! written to a console is kept in a ring of its own, [`HISTORY_BYTES`] long. The terminal takes from the rings of
//! what is shown as fast as its line is; a console whose ring holds nothing but what was not shown yet is told that
//! nothing more fits, and later that there is room again ([`ConsoleMux::pop_resumable`]). The rings of the others
//! forget their oldest bytes instead; what is left is shown when the terminal switches to them. Bytes that are
//! typed go to the console in focus, except after the escape key (Ctrl-] unless configured): then one key is a
//! command to Plinth.
//!
//! Where all consoles are shown, they take turns by whole lines, each after its name in brackets and without control
//! sequences ([`filter`]). A line without an end goes out after [`PATIENCE_US`] without a further byte, or when it is
//! long. All are held up to the line's speed then, and none is cut.
//!
//! Lines of the host wait for the end of the guest's line, or for [`LINE_PATIENCE_US`] in which the guest says no more;
//! what a guest wrote before such a line goes out before it. Answers to commands do not wait.
//!
//! Invariants: memory is bounded, and none is taken but by [`Prepared::new`] and [`ConsoleMux::begin`];
//! nobody waits; a host line never stands inside a guest's line. This module neither reads nor writes a device.

mod filter;
mod ring;
mod store;
mod text;

use alloc::{collections::VecDeque, vec::Vec};
use core::fmt;

use crate::{config::MAX_VMS, journal::Door};
use filter::{Filter, Plain};
use store::Console;
pub use store::Prepared;
pub use text::Text;

/// Bytes of output kept per console.
pub const HISTORY_BYTES: usize = 16 * 1024;
/// A guest whose output did not fit goes on when there is room for so many bytes: a UART's FIFO.
const RESUME_BYTES: usize = 16;
/// Bytes of host lines that wait. Further lines are left out, and counted.
const LINE_BYTES: usize = 64 * 1024;
/// Host lines that wait, at most.
const LINES: usize = 1024;
/// How long an unfinished line of a guest that is silent holds up another guest's line.
pub const PATIENCE_US: u64 = 100_000;
/// How long an unfinished line of a guest that is silent holds up a host line: longer than a guest that is writing may have to wait
/// for a processor.
pub const LINE_PATIENCE_US: u64 = 1_000_000;
/// Bytes of a guest's line without an end that hold up a host line, or another guest's.
const LONGEST_LINE: usize = 1024;
/// Bytes that a replay shows again.
const REPLAY_BYTES: u64 = 2048;
/// What a host line begins with.
const PREFIX: &[u8] = b"[plinth] ";
/// Ends what a guest may have done to the terminal: an open string (ST), then modes, attributes and character sets (soft
/// reset, DECSTR), mouse reports and bracketed paste.
const CALM: &[u8] = b"\x1b\\\x1b[!p\x1b[?1000;1002;1003;1006;2004l";
/// Room for what goes out before anything else: a name in brackets, or [`CALM`], and the end of a line.
const PIECE_BYTES: usize = 128;

/// Ctrl-], the escape key by default.
pub const DEFAULT_ESCAPE: u8 = 0x1d;

/// A console's number, as people write it: guests' from 1 on, in the order in which they were attached; a number that
/// is free again is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleId(pub usize);

impl ConsoleId {
    /// The operator's shell.
    pub const SHELL: ConsoleId = ConsoleId(0);
}

/// Where typed input goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// This byte is for this guest's serial port.
    Guest(ConsoleId, u8),
    /// This byte is for the shell.
    Shell(u8),
    /// The terminal now shows something else, or told the person something.
    Handled,
    /// The person asked for the host's own screen instead of the guest's display, or for that again.
    ToggleDisplay,
    /// The person asked to power the host off, by this door.
    PowerOff(Door),
}

/// What the terminal shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    /// The console in focus.
    Focus,
    /// All guests' consoles, line by line.
    All,
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
    /// The shell's, then the guests'.
    consoles: Vec<Option<Console>>,
    view: View,
    /// What typed bytes go to.
    focus: ConsoleId,
    /// The guest that was in focus last.
    guest: ConsoleId,
    /// With all consoles shown: whose line is in the terminal's row, and how many of its bytes.
    row: Option<(usize, usize)>,
    /// With all consoles shown: who had the last row.
    turn: usize,
    /// What goes out before anything else.
    piece: VecDeque<u8>,
    escape: u8,
    escaped: bool,
    /// There is no line: nothing is shown.
    absent: bool,
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
    /// The shell has to show its line anew.
    shell_disturbed: bool,
}

impl ConsoleMux {
    /// A terminal without consoles. `escape`: the byte that the escape key sends.
    pub const fn new(escape: u8) -> Self {
        ConsoleMux {
            consoles: Vec::new(),
            view: View::Focus,
            focus: ConsoleId(1),
            guest: ConsoleId(1),
            row: None,
            turn: 0,
            piece: VecDeque::new(),
            escape,
            escaped: false,
            absent: false,
            at_line_start: true,
            lines: VecDeque::new(),
            text: VecDeque::new(),
            left_out: 0,
            in_line: 0,
            silent_since: None,
            overdue: 0,
            hurried: false,
            any_refused: false,
            shell_disturbed: false,
        }
    }

    /// Takes the memory that does not depend on guests: the shell's console, and room for lines. Once is enough.
    pub fn begin(&mut self) {
        if self.consoles.is_empty() {
            self.consoles.reserve_exact(MAX_VMS + 1);
            self.consoles.push(Some(Prepared::new("shell").0));
            self.piece.reserve_exact(PIECE_BYTES);
            self.reserve_lines();
        }
    }

    /// Adds a guest's console. `None`: there are as many as there may be.
    pub fn attach(&mut self, console: Prepared) -> Option<ConsoleId> {
        self.begin();
        let free = self.consoles.iter().position(Option::is_none);
        match free {
            Some(free) => {
                self.consoles[free] = Some(console.0);
                Some(ConsoleId(free))
            }
            None if self.consoles.len() <= MAX_VMS => {
                self.consoles.push(Some(console.0));
                Some(ConsoleId(self.consoles.len() - 1))
            }
            None => None,
        }
    }

    /// Takes a guest's console away, and hands out its memory. If it was shown, the shell is shown.
    pub fn detach(&mut self, id: ConsoleId) -> Option<Prepared> {
        if id == ConsoleId::SHELL {
            return None;
        }
        let console = self.consoles.get_mut(id.0)?.take()?;
        self.row = self.row.filter(|(owner, _)| *owner != id.0);
        let others = self.guests();
        let first = others.into_iter().next();
        if self.guest == id {
            self.guest = first.unwrap_or(ConsoleId(1));
        }
        if self.focus == id {
            if console.marked {
                self.piece.extend(CALM);
            }
            self.answer(format_args!("console {}: {} is gone", id.0, console.name));
            self.switch(ConsoleId::SHELL);
        }
        Some(Prepared(console))
    }

    /// Takes the memory of host lines, so that none is taken when one comes.
    pub fn reserve_lines(&mut self) {
        self.lines.reserve_exact(LINES - self.lines.len());
        // And the end of a guest's line.
        self.text.reserve_exact(LINE_BYTES + 2 - self.text.len());
    }

    fn console(&self, id: ConsoleId) -> Option<&Console> {
        self.consoles.get(id.0)?.as_ref()
    }

    fn console_mut(&mut self, id: ConsoleId) -> Option<&mut Console> {
        self.consoles.get_mut(id.0)?.as_mut()
    }

    /// The guests' consoles.
    fn guests(&self) -> impl Iterator<Item = ConsoleId> + Clone {
        let there =
            |(n, console): (usize, &Option<Console>)| console.is_some().then_some(ConsoleId(n));
        self.consoles.iter().enumerate().skip(1).filter_map(there)
    }

    /// Shows this console from the start, without a word.
    pub fn show_first(&mut self, console: ConsoleId) {
        self.focus = console;
        self.guest = console;
    }

    /// The console to which typed bytes go: the one that is shown, unless all are.
    pub fn focus(&self) -> ConsoleId {
        self.focus
    }

    /// The console that the terminal shows alone, as it comes; `None` while it shows all of them.
    pub fn shown_alone(&self) -> Option<ConsoleId> {
        (self.view == View::Focus).then_some(self.focus)
    }

    /// The guest's console of this name.
    pub fn find(&self, name: &str) -> Option<ConsoleId> {
        let named = |id: &ConsoleId| self.console(*id).is_some_and(|c| c.name == name);
        self.guests().find(named)
    }

    /// Copies what was written to a console from position `from` on, as far as it is kept and fits. Returns how many bytes,
    /// and the position behind them. A position counts all bytes ever written to the console. For another screen than
    /// the terminal; nobody is held up for it. `None`: there is no such console.
    pub fn copy(&self, id: ConsoleId, from: u64, buffer: &mut [u8]) -> Option<(usize, u64)> {
        let ring = &self.console(id)?.ring;
        let from = from.max(ring.start());
        let mut count = 0;
        for (to, position) in buffer.iter_mut().zip(from..ring.end()) {
            *to = ring.get(position)?;
            count += 1;
        }
        Some((count, from + count as u64))
    }

    /// The guest's console after this one, or the one before; around the end.
    pub fn neighbour(&self, of: ConsoleId, next: bool) -> Option<ConsoleId> {
        let mut guests = self.guests();
        let around = guests.clone();
        match next {
            true => guests
                .find(|id| id.0 > of.0)
                .or(around.min_by_key(|id| id.0)),
            false => guests.filter(|id| id.0 < of.0).last().or(around.last()),
        }
    }

    /// What a console is called.
    pub fn name(&self, id: ConsoleId) -> Option<&str> {
        Some(&self.console(id)?.name)
    }

    /// Whether the shell has to show its line anew, since it was not shown, or something stands behind it. Told once.
    pub fn take_shell_disturbed(&mut self) -> bool {
        core::mem::take(&mut self.shell_disturbed)
    }

    /// The byte that the escape key sends.
    pub fn escape(&self) -> u8 {
        self.escape
    }

    /// Whether [`ConsoleMux::take_shell_disturbed`] would tell so.
    pub fn is_shell_disturbed(&self) -> bool {
        self.shell_disturbed
    }

    /// Sets the byte that the escape key sends.
    pub fn set_escape(&mut self, escape: u8) {
        self.escape = escape;
    }

    /// There is no line to a terminal: nobody is held up for it.
    pub fn disconnect(&mut self) {
        self.absent = true;
    }

    /// Whether output of this console goes to the terminal.
    pub fn is_shown(&self, id: ConsoleId) -> bool {
        match self.view {
            _ if self.absent => false,
            View::Focus => id == self.focus,
            View::All => id != ConsoleId::SHELL,
        }
    }

    /// Shows another console: says which, and goes on with what was missed.
    pub fn switch(&mut self, to: ConsoleId) {
        let Some(console) = self.console_mut(to) else {
            let count = self.guests().count();
            self.answer(format_args!("no console {}; there are {count}", to.0));
            return;
        };
        let dropped = console.ring.start().saturating_sub(console.shown);
        console.shown += dropped;
        let number = to.0;
        let line = match dropped {
            0 => Text::new(format_args!("console {number}: {}", console.name)),
            dropped => Text::new(format_args!(
                "console {number}: {} ({dropped} earlier bytes are gone)",
                console.name
            )),
        };
        self.leave_view();
        self.view = View::Focus;
        self.focus = to;
        if to == ConsoleId::SHELL {
            self.shell_disturbed = true;
        } else {
            self.guest = to;
        }
        self.answer_line(line.as_bytes());
    }

    /// Shows the guest that was shown before the shell.
    pub fn leave_shell(&mut self) {
        self.switch(self.guest);
    }

    /// Shows all guests' consoles.
    fn show_all(&mut self) {
        self.leave_view();
        self.view = View::All;
        self.focus = self.guest;
        let name = self.console(self.guest).map_or("nobody", |c| &c.name);
        let line = Text::new(format_args!("all consoles; what is typed goes to {name}"));
        self.answer_line(line.as_bytes());
    }

    /// Shows the last lines of the console in focus again.
    fn replay(&mut self) {
        let Some(console) = self.console_mut(self.focus) else {
            return;
        };
        let from = console
            .shown
            .saturating_sub(REPLAY_BYTES)
            .max(console.ring.start());
        // From the beginning of a line, if there is one.
        let feed = (from..console.shown).find(|&at| console.ring.get(at) == Some(b'\n'));
        console.shown = match feed {
            Some(at) if from > 0 => at + 1,
            _ => from,
        };
        let line = Text::new(format_args!("once more: {}", console.name));
        self.answer_line(line.as_bytes());
    }

    /// What is shown will not be any more.
    fn leave_view(&mut self) {
        self.row = None;
        for console in self.consoles.iter_mut().flatten() {
            console.filter = Filter::default();
        }
        let marked = self.console_mut(self.focus);
        if marked.is_some_and(|console| core::mem::take(&mut console.marked)) {
            self.piece.extend(CALM);
        }
    }

    /// Output to a console. Returns how many bytes were taken: fewer than all only of one that is shown.
    #[must_use = "what was not taken is to be offered again"]
    pub fn output(&mut self, from: ConsoleId, bytes: &[u8]) -> usize {
        let shown = self.is_shown(from);
        let Some(console) = self.console_mut(from) else {
            return bytes.len();
        };
        let mut taken = bytes;
        if shown {
            taken = &bytes[..bytes.len().min(console.room())];
        }
        console.ring.push(taken);
        if taken.len() < bytes.len() {
            console.refused = true;
            self.any_refused = true;
        }
        taken.len()
    }

    /// Whether [`ConsoleMux::pop_resumable`] would find one.
    pub fn can_resume(&self) -> bool {
        self.any_refused && self.resumable().is_some()
    }

    fn resumable(&self) -> Option<usize> {
        self.consoles.iter().enumerate().position(|(n, console)| {
            let shown = self.is_shown(ConsoleId(n));
            console
                .as_ref()
                .is_some_and(|c| c.refused && (!shown || c.room() >= RESUME_BYTES))
        })
    }

    /// A console whose output was refused, and for which there is room now. To be asked until there is none.
    pub fn pop_resumable(&mut self) -> Option<ConsoleId> {
        if !self.any_refused {
            return None;
        }
        let found = ConsoleId(self.resumable()?);
        self.console_mut(found)?.refused = false;
        self.any_refused = self
            .consoles
            .iter()
            .flatten()
            .any(|console| console.refused);
        Some(found)
    }

    /// A line of the host's own, on a line by itself, after what the guest in focus has written. Left out, and counted,
    /// when too many wait.
    pub fn host_line(&mut self, text: &[u8]) {
        let when = match (self.view, self.console(self.focus)) {
            (View::Focus, Some(console)) => When::After(self.focus, console.ring.end()),
            _ => When::Now,
        };
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

    /// Whether [`ConsoleMux::pull`] wants to know the time.
    pub fn wants_time(&self) -> bool {
        self.view == View::All || !self.lines.is_empty()
    }

    /// When to [`ConsoleMux::pull`] again though nobody wrote anything, in microseconds.
    pub fn look_again_at(&self) -> Option<u64> {
        let line = self.silent_since.map(|since| since + LINE_PATIENCE_US);
        let partial = match self.view {
            View::Focus => None,
            View::All => {
                let shown = self.consoles.iter().skip(1).flatten();
                let silent = shown.filter(|c| c.waiting() > 0).filter_map(|c| c.silent);
                silent.map(|(_, since)| since + PATIENCE_US).min()
            }
        };
        line.into_iter().chain(partial).min()
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
        if let Some(byte) = self.next_of_piece() {
            return Some(byte);
        }
        if self.in_line == 0 && self.line_is_due() {
            if !self.at_line_start {
                if !self.may_break_line(now_us) {
                    return self.next_of_consoles(now_us);
                }
                if self.view == View::Focus && self.focus == ConsoleId::SHELL {
                    self.shell_disturbed = true;
                }
                self.row = None;
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
        self.next_of_consoles(now_us)
    }

    fn next_of_piece(&mut self) -> Option<u8> {
        let byte = self.piece.pop_front()?;
        self.at_line_start = byte == b'\n';
        Some(byte)
    }

    fn next_of_consoles(&mut self, now_us: u64) -> Option<u8> {
        match self.view {
            View::Focus => self.next_of_focus(),
            View::All => self.next_of_all(now_us),
        }
    }

    fn next_of_focus(&mut self) -> Option<u8> {
        let is_guest = self.focus != ConsoleId::SHELL;
        let console = self.console_mut(self.focus)?;
        let byte = console.next()?;
        console.advance();
        // ESC, and its short form for CSI; SO and SI switch character sets.
        console.marked |= is_guest && matches!(byte, 0x0e | 0x0f | 0x1b | 0x9b);
        self.at_line_start = byte == b'\n';
        self.silent_since = None;
        self.overdue += 1;
        Some(byte)
    }

    /// With all consoles shown, each turn is a line.
    fn next_of_all(&mut self, now_us: u64) -> Option<u8> {
        loop {
            let (owner, length) = match self.row {
                Some(row) => row,
                None => {
                    let owner = self.next_turn(now_us)?;
                    if !self.at_line_start {
                        self.end_row();
                    }
                    self.turn = owner;
                    self.row = Some((owner, 0));
                    let name = self.consoles[owner].as_ref().map_or("", |c| &c.name);
                    self.piece.push_back(b'[');
                    self.piece.extend(name.bytes());
                    self.piece.extend(b"] ");
                    return self.next_of_piece();
                }
            };
            let console = self.consoles.get_mut(owner)?.as_mut()?;
            let Some(byte) = console.next() else {
                // The row stays its own until somebody else wants it.
                self.next_turn(now_us)?;
                self.row = None;
                continue;
            };
            self.silent_since = None;
            self.overdue += 1;
            let shown = console.filter.feed(byte);
            if shown != Plain::LineEndBefore {
                console.advance();
            }
            match shown {
                Plain::Nothing if length < LONGEST_LINE => self.row = Some((owner, length + 1)),
                Plain::Character(bytes, count) if length < LONGEST_LINE => {
                    self.row = Some((owner, length + 1));
                    self.piece.extend(&bytes[..count]);
                    return self.next_of_piece();
                }
                Plain::Character(bytes, count) => {
                    self.piece.extend(&bytes[..count]);
                    self.end_row();
                    return self.next_of_piece();
                }
                Plain::Nothing | Plain::LineEnd | Plain::LineEndBefore => {
                    self.end_row();
                    return self.next_of_piece();
                }
            }
        }
    }

    fn end_row(&mut self) {
        self.piece.extend(b"\r\n");
        self.row = None;
    }

    /// The guest whose turn is next and that has something to show.
    fn next_turn(&mut self, now_us: u64) -> Option<usize> {
        let count = self.consoles.len();
        let mut found = None;
        // All are looked at, so that each one's silence is noticed.
        for step in (1..=count).rev() {
            let n = (self.turn + step) % count;
            let due = n != ConsoleId::SHELL.0
                && self.consoles[n].as_mut().is_some_and(|c| c.is_due(now_us));
            found = if due { Some(n) } else { found };
        }
        found
    }

    /// Whether all that has to go out before the oldest host line has.
    fn line_is_due(&mut self) -> bool {
        let due = match self.lines.front() {
            None => false,
            Some(Line {
                when: When::After(console, written),
                ..
            }) if self.view == View::Focus && *console == self.focus => self
                .console(*console)
                .is_none_or(|console| console.shown >= *written),
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
            .is_some_and(|line| line.when == When::Now && self.view == View::Focus);
        let writer = match self.view {
            View::Focus => Some(self.focus),
            View::All => self.row.map(|(owner, _)| ConsoleId(owner)),
        };
        let silent = writer
            .and_then(|writer| self.console(writer))
            .is_none_or(|console| console.waiting() == 0);
        if at_once || self.overdue >= LONGEST_LINE || silent && self.hurried {
            return true;
        }
        if !silent {
            return false;
        }
        let since = *self.silent_since.get_or_insert(now_us);
        now_us.saturating_sub(since) >= LINE_PATIENCE_US
    }

    /// Whether this byte is the shell's if it is the next that was typed.
    pub fn is_for_shell(&self, byte: u8) -> bool {
        self.focus == ConsoleId::SHELL && self.escaped == (byte == self.escape)
    }

    /// One byte that was typed.
    pub fn input(&mut self, byte: u8) -> Input {
        if !core::mem::take(&mut self.escaped) {
            if byte == self.escape {
                self.escaped = true;
                return Input::Handled;
            }
            return self.to_focus(byte);
        }
        match byte {
            b if b == self.escape => return self.to_focus(byte),
            b'0'..=b'9' => self.switch(ConsoleId(usize::from(byte - b'0'))),
            b's' => self.switch(ConsoleId::SHELL),
            b'n' | b'\t' => self.switch_by(true),
            b'p' => self.switch_by(false),
            b'a' => self.show_all(),
            b'r' => self.replay(),
            b'l' => self.list(),
            b'd' => return Input::ToggleDisplay,
            b'q' => return Input::PowerOff(Door::SerialKey),
            _ => self.help(),
        }
        Input::Handled
    }

    fn to_focus(&self, byte: u8) -> Input {
        match self.focus {
            ConsoleId::SHELL => Input::Shell(byte),
            guest => Input::Guest(guest, byte),
        }
    }

    /// Shows the next guest's console, or the one before.
    fn switch_by(&mut self, next: bool) {
        let found = self.neighbour(self.focus, next);
        self.switch(found.unwrap_or(ConsoleId(1)));
    }

    fn list(&mut self) {
        for n in 0..self.consoles.len() {
            let Some(console) = self.console(ConsoleId(n)) else {
                continue;
            };
            let mark = if n == self.focus.0 { '*' } else { ' ' };
            let line = match n {
                0 => Text::new(format_args!("{mark} 0  {}", console.name)),
                n => Text::new(format_args!(
                    "{mark} {n}  {}  ({} bytes not seen yet)",
                    console.name,
                    console.waiting()
                )),
            };
            self.answer_line(line.as_bytes());
        }
    }

    fn help(&mut self) {
        for line in [
            "keys after the escape key:",
            "  0, s  show the shell         1..9  show that guest's console",
            "  n, p  next, previous guest   a     all guests, line by line",
            "  r     the last lines again   l     list the consoles",
            "  q     power the host off     d     on the screen: the guest's display, or the log",
            "  escape key again: send it to the guest",
        ] {
            self.answer_line(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
