//! The operator's shell: one session at one terminal, from keys to answers.
//!
//! A [`Shell`] edits lines, completes them, understands them ([`parse`]), hands requests to whoever implements
//! [`Operate`] and shows the answers as text. It neither reads nor writes a device: its door gives it bytes
//! ([`Shell::input`]) and the time ([`Shell::tick`]), and takes what the terminal is to show ([`Shell::take_output`]).
//!
//! Invariants: no input makes it fail; memory is bounded by the longest line, the history, and one answer, since
//! the door gives no further input while output waits ([`Shell::is_ready`]).

mod complete;
mod parse;
mod verbs;
mod words;

pub use complete::{Completion, Names, complete, value_at};
pub use parse::{Command, ParseError, Parsed, nearest, parse, parse_words};
pub use verbs::{Argument, Form, Kind, POLICIES, SORT_KEYS, VERBS, Verb, VerbId, help, reference};
pub use words::{Word, joined, split};

use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};

use crate::{
    command::{Answer, Operate, Request},
    follow::{self, Follow},
    line_editor::{Edit, Key, Keys, LineEditor},
    table,
    top::{PERIOD_NS, Sort, Top},
};

/// What stands before the line.
pub const PROMPT: &str = "plinth> ";
/// Most candidates of a completion that are listed.
const MOST_CANDIDATES: usize = 60;
/// Columns of the terminal that lists use.
const COLUMNS: usize = 79;
/// Clears the terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// What the door has to do for the shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Show this VM's console. There is a VM of this name.
    Console(String),
    /// Show what was shown before the shell.
    Leave,
}

/// What the session does.
#[derive(Debug)]
enum Mode {
    /// Reads a line.
    Line,
    /// Shows the live view, the next time at this moment.
    Top(Top, u64),
    /// Shows new lines of the log, the next time at this moment.
    Follow(Follow, u64),
}

/// A session.
#[derive(Debug)]
pub struct Shell {
    keys: Keys,
    editor: LineEditor,
    mode: Mode,
    output: String,
    /// The last key asked for a completion that was not unique: the next one lists.
    asked_again: bool,
}

impl Default for Shell {
    fn default() -> Self {
        Self::new()
    }
}

impl Shell {
    /// A session that has not shown anything yet.
    pub fn new() -> Self {
        Shell {
            keys: Keys::default(),
            editor: LineEditor::new(PROMPT),
            mode: Mode::Line,
            output: String::new(),
            asked_again: false,
        }
    }

    /// Shows prompt and line anew, on a fresh row: the terminal comes from something else.
    pub fn redraw(&mut self) {
        match &mut self.mode {
            Mode::Line => self.editor.redraw(&mut self.output),
            Mode::Top(_, next) | Mode::Follow(_, next) => *next = 0,
        }
    }

    /// Says that what its door was to do was not possible, or anything else, before the prompt.
    pub fn complain(&mut self, text: &str) {
        self.output.push('\r');
        self.say(text);
        self.redraw();
    }

    /// Says who this is, and shows the prompt.
    pub fn greet(&mut self) {
        self.say("Plinth's shell. help lists the verbs, Tab completes.\n");
        self.redraw();
    }

    /// What the terminal is to show next; nothing is kept.
    pub fn take_output(&mut self) -> String {
        core::mem::take(&mut self.output)
    }

    /// Whether it takes input now: the door has taken its output.
    pub fn is_ready(&self) -> bool {
        self.output.is_empty()
    }

    /// Host time at which it wants [`Shell::tick`], in nanoseconds.
    pub fn wake_up_at(&self) -> Option<u64> {
        match self.mode {
            Mode::Line => None,
            Mode::Top(_, next) | Mode::Follow(_, next) => Some(next),
        }
    }

    /// The time, in nanoseconds: a live view may be due.
    pub fn tick(&mut self, now_ns: u64, operate: &dyn Operate) {
        let due = match &mut self.mode {
            Mode::Top(_, next) if *next <= now_ns => {
                *next = now_ns.saturating_add(PERIOD_NS);
                true
            }
            Mode::Follow(_, next) if *next <= now_ns => {
                *next = now_ns.saturating_add(follow::PERIOD_NS);
                true
            }
            _ => false,
        };
        // A terminal that is slower than the view misses some.
        if due && self.is_ready() {
            self.show_top(operate);
            self.show_log(operate);
        }
    }

    /// A byte that was typed.
    pub fn input(&mut self, byte: u8, operate: &dyn Operate) -> Option<Action> {
        let key = self.keys.feed(byte)?;
        let ends = matches!(key, Key::Char('q') | Key::Ctrl('c' | 'd') | Key::Enter);
        if ends && !matches!(self.mode, Mode::Line) {
            self.mode = Mode::Line;
            self.output += "\r\n";
            self.redraw();
            return None;
        }
        if matches!(self.mode, Mode::Follow(..)) {
            return None;
        }
        if let Mode::Top(top, next) = &mut self.mode {
            match key {
                Key::Char(' ') => *next = 0,
                Key::Char(c) => {
                    if let Some(sort) = Sort::of_key(c) {
                        top.sort = sort;
                        *next = 0;
                    }
                }
                _ => {}
            }
            return None;
        }
        let asked_again = core::mem::take(&mut self.asked_again);
        match self.editor.key(key, &mut self.output) {
            Edit::Going => None,
            Edit::Complete => {
                self.complete(asked_again, operate);
                None
            }
            Edit::Interrupted => {
                self.redraw();
                None
            }
            Edit::Clear => {
                self.output += CLEAR;
                self.redraw();
                None
            }
            Edit::EndOfInput => {
                self.output += "\r\n";
                Some(Action::Leave)
            }
            Edit::Line(line) => {
                let action = self.run(&line, operate);
                if matches!(self.mode, Mode::Line) && action.is_none() {
                    self.redraw();
                }
                action
            }
        }
    }

    /// Shows text of whole lines.
    fn say(&mut self, text: &str) {
        for line in text.lines() {
            self.output += line;
            self.output += "\r\n";
        }
    }

    fn run(&mut self, line: &str, operate: &dyn Operate) -> Option<Action> {
        let understood = parse(line).and_then(|parsed| known_vm(parsed, operate));
        let command = match understood {
            Ok(parsed) => parsed.command,
            Err(error) => {
                self.say(&error.render(line));
                return None;
            }
        };
        match command {
            Command::Nothing => {}
            Command::Request(request) => {
                let text = match operate.operate(&request) {
                    Ok(answer) => table::answer(&answer),
                    Err(failure) => table::failure(&failure),
                };
                self.say(&text);
            }
            Command::Console(vm) => return Some(Action::Console(vm)),
            Command::Top(sort) => {
                self.output += CLEAR;
                self.mode = Mode::Top(Top::new(sort), 0);
            }
            Command::Follow(lines) => self.mode = Mode::Follow(Follow::new(lines), 0),
            Command::Help(words) => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                self.say(&help(&words).unwrap_or_default());
            }
            Command::Exit => return Some(Action::Leave),
        }
        None
    }

    fn show_top(&mut self, operate: &dyn Operate) {
        let Mode::Top(top, _) = &mut self.mode else {
            return;
        };
        match operate.operate(&Request::Stats { vm: None }) {
            Ok(Answer::Stats { stats }) => {
                self.output += "\x1b[H";
                for line in top.update(stats) {
                    self.output += &line;
                    self.output += "\x1b[K\r\n";
                }
                self.output += "\x1b[J";
            }
            Ok(_) => self.end_view("error: the host gave another answer than figures\n"),
            Err(failure) => self.end_view(&table::failure(&failure)),
        }
    }

    fn show_log(&mut self, operate: &dyn Operate) {
        let Mode::Follow(follow, _) = &mut self.mode else {
            return;
        };
        let answer = operate.operate(&follow.request());
        match answer.map(|answer| follow.new_lines(answer)) {
            Ok(Some(lines)) if lines.is_empty() => {}
            Ok(Some(lines)) => self.say(&table::answer(&Answer::Log { lines })),
            Ok(None) => self.end_view("error: the host gave another answer than its log\n"),
            Err(failure) => self.end_view(&table::failure(&failure)),
        }
    }

    fn end_view(&mut self, why: &str) {
        self.mode = Mode::Line;
        self.say(why);
        self.redraw();
    }

    fn complete(&mut self, list: bool, operate: &dyn Operate) {
        let before = self.editor.before_cursor();
        let names = Names {
            vms: operate.vm_names(),
            pools: operate.pool_names(),
        };
        let completion = complete(before, &names);
        let mut more = completion.common().to_string();
        match completion.candidates.as_slice() {
            [] => self.output.push('\x07'),
            [only] => {
                // A setting or an option with its value goes on after its =.
                if !only.ends_with('=') {
                    more.push(' ');
                }
                self.editor.insert(&more, &mut self.output);
            }
            _ if !more.is_empty() => self.editor.insert(&more, &mut self.output),
            candidates if list => {
                let text = columns(candidates);
                self.output += "\r\n";
                self.say(&text);
                self.redraw();
            }
            _ => {
                self.output.push('\x07');
                self.asked_again = true;
            }
        }
    }
}

/// Whether the VM that a command names is there.
fn known_vm(parsed: Parsed, operate: &dyn Operate) -> Result<Parsed, ParseError> {
    let Some(word) = &parsed.vm else {
        return Ok(parsed);
    };
    let names = operate.vm_names();
    if names.contains(&word.text) {
        return Ok(parsed);
    }
    let hint = match nearest(&word.text, names.iter().map(String::as_str)) {
        Some(name) => format!("did you mean \"{name}\"?"),
        None => String::from("vm list shows those that there are"),
    };
    Err(ParseError {
        at: word.at.clone(),
        message: format!("there is no VM \"{}\"", word.text),
        hint,
    })
}

/// Words in as many columns as fit.
fn columns(words: &[String]) -> String {
    let shown = &words[..words.len().min(MOST_CANDIDATES)];
    let width = shown.iter().map(String::len).max().unwrap_or(0) + 2;
    let mut text = String::new();
    for row in shown.chunks((COLUMNS / width).max(1)) {
        let line: String = row.iter().map(|word| format!("{word:<width$}")).collect();
        text += line.trim_end();
        text.push('\n');
    }
    if shown.len() < words.len() {
        text += &format!("and {} more\n", words.len() - shown.len());
    }
    text
}

#[cfg(test)]
mod tests;
