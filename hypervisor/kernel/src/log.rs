//! The host's log: levels, time stamps, a ring that remembers, serial line and screen.
//!
//! A line is put together on the caller's stack and then shown whole, so lines of several
//! processors never mix. Formatting happens outside every lock: a `Display` that faults or
//! logs cannot deadlock. Works from the first instruction of the kernel, without a heap.

use alloc::{string::String, vec::Vec};
use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
};

use drivers::ring::LogRing;
use manage::{command::LogLine, console::Text, limit::Limit};

use crate::{console, fault, frame, screen, sync::Lock, time};

/// Bytes of log that are remembered.
const RING_BYTES: usize = 64 * 1024;
/// Longest line shown in one piece, time stamp included; the rest continues on the next line.
const LINE_BYTES: usize = 320;

/// Warnings and errors that the serial line shows at once while VMs run, and the time for one more.
const WARNINGS_AT_ONCE: u32 = 32;
const WARNING_EVERY_US: u64 = 500_000;

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Something that was asked for cannot be done.
    Error = 0,
    /// Something works, but not as it should.
    Warn,
    /// What a person wants to see while booting.
    Info,
    /// What a developer wants to see; kept in the ring only, unless asked for.
    Debug,
}

static RING: Lock<LogRing<RING_BYTES>> = Lock::new(LogRing::new());
/// Warnings on the serial line while VMs run.
static LIMIT: Lock<Limit> = Lock::new(Limit::new(WARNINGS_AT_ONCE, WARNING_EVERY_US));
static QUIET_SERIAL: AtomicBool = AtomicBool::new(false);
static SHOWN: AtomicU8 = AtomicU8::new(Level::Info as u8);

/// Keeps lines below `Warn` off the serial line, once guests' consoles own it, and the others from standing within
/// a guest's line. Screen and ring still get all.
pub fn quiet_serial(on: bool) {
    QUIET_SERIAL.store(on, Ordering::Relaxed);
}

/// Shows lines up to `level`; the others are only remembered.
pub fn show_up_to(level: Level) {
    SHOWN.store(level as u8, Ordering::Relaxed);
}

/// Logs one message, of one or several lines. Use the macros.
pub fn print(level: Level, message: fmt::Arguments<'_>) {
    let mut writer = LineWriter::new(level);
    // The writer itself never fails; a `Display` that does has written what it could.
    let _ = writer.write_fmt(message);
    writer.finish();
}

/// Shows a line of a fault report, at once and everywhere. It is not remembered.
pub fn report(message: fmt::Arguments<'_>) {
    let mut writer = LineWriter::new(Level::Info);
    writer.report = true;
    // As in `print`.
    let _ = writer.write_fmt(message);
    writer.finish();
}

/// Calls `each` with the last `count` lines of the log in pieces; the flag marks the last piece of a line.
pub fn last_lines(count: usize, each: impl FnMut(&[u8], bool)) {
    RING.lock().last_lines(count, each);
}

/// The last lines that are remembered, `most` at most, and only those after number `after`. Lines count from 0.
pub fn lines_after(after: Option<u64>, most: usize) -> Vec<LogLine> {
    // Taken before the lock.
    let mut text = Vec::with_capacity(RING_BYTES);
    let count = {
        let ring = RING.lock();
        let count = ring.lines();
        let wanted = count.saturating_sub(after.map_or(0, |after| after.saturating_add(1)));
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(most);
        ring.last_lines(wanted, |piece, ends| {
            text.extend_from_slice(piece);
            if ends {
                text.push(b'\n');
            }
        });
        count
    };
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().count() as u64;
    (count - lines..)
        .zip(text.lines())
        .map(|(number, line)| log_line(number, line))
        .collect()
}

/// Takes a line apart again.
fn log_line(number: u64, line: &str) -> LogLine {
    let (stamp, rest) = line
        .strip_prefix('[')
        .and_then(|line| line.split_once("] "))
        .unwrap_or(("", line));
    let (seconds, micros) = stamp.trim_start().split_once('.').unwrap_or(("", ""));
    let seconds: u64 = seconds.parse().unwrap_or(0);
    let micros: u64 = micros.parse().unwrap_or(0);
    let names = [
        ("error: ", "error"),
        ("warning: ", "warn"),
        ("debug: ", "debug"),
    ];
    let named = names
        .into_iter()
        .find_map(|(prefix, name)| Some((name, rest.strip_prefix(prefix)?)));
    let (level, text) = named.unwrap_or(("info", rest));
    LogLine {
        number,
        at_ns: (seconds * 1_000_000 + micros) * 1_000,
        level: String::from(level),
        text: String::from(text),
    }
}

struct LineWriter {
    level: Level,
    line: [u8; LINE_BYTES],
    length: usize,
    /// Part of a fault report.
    report: bool,
    /// Bytes of `line` that are time stamp and level.
    prefix: usize,
    lines: usize,
}

impl LineWriter {
    fn new(level: Level) -> Self {
        let mut writer = LineWriter {
            level,
            line: [0; LINE_BYTES],
            length: 0,
            report: false,
            prefix: 0,
            lines: 0,
        };
        let us = time::ns() / 1000;
        // Both fit into the empty line.
        let _ = write!(
            Raw(&mut writer),
            "[{:4}.{:06}] ",
            us / 1_000_000,
            us % 1_000_000
        );
        writer.prefix = writer.length;
        writer.push_all(match level {
            Level::Error => b"error: ",
            Level::Warn => b"warning: ",
            Level::Info => b"",
            Level::Debug => b"debug: ",
        });
        writer
    }

    fn push_all(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.length == LINE_BYTES {
                self.emit();
            }
            self.line[self.length] = byte;
            self.length += 1;
        }
    }

    fn emit(&mut self) {
        let line = &self.line[..self.length];
        if self.report {
            fault::show(line);
        } else {
            show(self.level, line);
        }
        self.length = self.prefix;
        self.lines += 1;
    }

    fn finish(&mut self) {
        if self.length > self.prefix || self.lines == 0 {
            self.emit();
        }
    }
}

impl fmt::Write for LineWriter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            match byte {
                b'\n' => self.emit(),
                byte => self.push_all(&[byte]),
            }
        }
        Ok(())
    }
}

/// Appends without looking for newlines, for the prefix.
struct Raw<'a>(&'a mut LineWriter);

impl fmt::Write for Raw<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.push_all(text.as_bytes());
        Ok(())
    }
}

fn show(level: Level, line: &[u8]) {
    RING.lock().push(line);
    if level as u8 > SHOWN.load(Ordering::Relaxed) {
        return;
    }
    if !frame::is_open() {
        if !QUIET_SERIAL.load(Ordering::Relaxed) {
            console::write_line(line);
        } else if level <= Level::Warn {
            show_among_guests(line);
        }
    }
    screen::write_line(line);
}

/// Shows a line on the serial line while VMs run: between lines of the guest, and not more than a few.
fn show_among_guests(line: &[u8]) {
    let Some(left_out) = LIMIT.lock().admit(time::ns() / 1000) else {
        return;
    };
    if left_out > 0 {
        let note = Text::new(format_args!("{left_out} warnings were left out here"));
        console::host_line(note.as_bytes());
    }
    console::host_line(line);
}

/// Logs an error.
#[macro_export]
macro_rules! error {
    ($($part:tt)*) => { $crate::log::print($crate::log::Level::Error, format_args!($($part)*)) };
}

/// Logs a warning.
#[macro_export]
macro_rules! warn {
    ($($part:tt)*) => { $crate::log::print($crate::log::Level::Warn, format_args!($($part)*)) };
}

/// Logs what a person wants to see.
#[macro_export]
macro_rules! info {
    ($($part:tt)*) => { $crate::log::print($crate::log::Level::Info, format_args!($($part)*)) };
}

/// Logs what a developer wants to see.
#[macro_export]
macro_rules! debug {
    ($($part:tt)*) => { $crate::log::print($crate::log::Level::Debug, format_args!($($part)*)) };
}
