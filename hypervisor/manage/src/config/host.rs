//! The `[host]` section: how the host behaves.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};

use toml::de::DeValue;

use super::{Location, Parser, Pools, Section, values::quote};
use crate::console::DEFAULT_ESCAPE;

/// Most files of `[host]`.
const MAX_FILES: usize = 64;
/// Length of the word that marks a console's frame: hard to guess.
const FRAME_WORD: core::ops::RangeInclusive<usize> = 16..=64;

/// What the host does after a fault of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFault {
    /// Stops, with the report on the screen.
    #[default]
    Halt,
    /// Restarts the machine.
    Reset,
}

/// What the host does when the last VM has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AfterLastVm {
    /// Powers the machine off.
    #[default]
    PowerOff,
    /// Stops and leaves the screen as it is.
    Halt,
    /// Stays up, for the operator to start others.
    Stay,
}

/// Least important messages that are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are the levels'")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

/// `[host]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// `on-fault`.
    pub on_fault: OnFault,
    /// `after-last-vm`.
    pub after_last_vm: AfterLastVm,
    /// `log-level`.
    pub log_level: LogLevel,
    /// `console-escape`: the byte that the escape key sends.
    pub console_escape: u8,
    /// `figures`: says at each VM's end what its start took, what memory it used and its exits by kind.
    pub figures: bool,
    /// `console-frame`: the word between two lines with which the serial port shows guests' output alone.
    pub console_frame: Option<String>,
    /// `scheduler`, `slice` and the `[[pool]]` sections.
    pub pools: Pools,
    /// `control`: the second serial port is a channel for programs that operate the host.
    pub control: bool,
    /// `files`: what the image carries for VMs that are created while the host runs.
    pub files: Vec<HostFile>,
}

/// A file of `[host]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFile {
    /// As written, relative to the configuration file.
    pub path: String,
    pub(super) place: Location,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            on_fault: OnFault::default(),
            after_last_vm: AfterLastVm::default(),
            log_level: LogLevel::default(),
            console_escape: DEFAULT_ESCAPE,
            figures: false,
            console_frame: None,
            pools: Pools::default(),
            files: Vec::new(),
            control: true,
        }
    }
}

impl Parser<'_> {
    /// Reads the section into [`super::Config::host`].
    pub(super) fn host(&mut self, s: &Section<'_>) {
        self.check_keys(
            s,
            &[
                "on-fault",
                "after-last-vm",
                "log-level",
                "console-escape",
                "figures",
                "console-frame",
                "files",
                "scheduler",
                "slice",
                "control",
            ],
        );
        let default = HostConfig::default();
        self.config.host = HostConfig {
            on_fault: self
                .choice(
                    s,
                    "on-fault",
                    &[("halt", OnFault::Halt), ("reset", OnFault::Reset)],
                )
                .unwrap_or(default.on_fault),
            after_last_vm: self
                .choice(
                    s,
                    "after-last-vm",
                    &[
                        ("power-off", AfterLastVm::PowerOff),
                        ("halt", AfterLastVm::Halt),
                        ("stay", AfterLastVm::Stay),
                    ],
                )
                .unwrap_or(default.after_last_vm),
            log_level: self
                .choice(
                    s,
                    "log-level",
                    &[
                        ("error", LogLevel::Error),
                        ("warn", LogLevel::Warn),
                        ("info", LogLevel::Info),
                        ("debug", LogLevel::Debug),
                    ],
                )
                .unwrap_or(default.log_level),
            console_escape: self.escape(s).unwrap_or(default.console_escape),
            figures: self
                .boolean(s, "figures")
                .map_or(default.figures, |(value, _)| value),
            console_frame: self.console_frame(s),
            files: self.host_files(s),
            pools: Pools::default(),
            control: self
                .boolean(s, "control")
                .map_or(default.control, |(value, _)| value),
        };
        self.default_pool(s);
    }

    fn host_files(&mut self, s: &Section<'_>) -> Vec<HostFile> {
        let (list, at) = match self.value(s, "files") {
            None => return Vec::new(),
            Some((DeValue::Array(list), at)) => (list, at),
            Some((other, at)) => {
                self.wrong_type(s, at, "files", "a list of paths", other);
                return Vec::new();
            }
        };
        if list.len() > MAX_FILES {
            let text = format!("there are {} files; allowed: up to {MAX_FILES}", list.len());
            self.bad(s, at, "files", text);
            return Vec::new();
        }
        list.iter()
            .filter_map(|value| {
                let at = self.location(value.span().start);
                match value.get_ref() {
                    DeValue::String(text) => {
                        let (path, place) = self.path(s, "files", text, at)?;
                        Some(HostFile { path, place })
                    }
                    other => {
                        self.wrong_type(s, at, "files", "a list of paths", other);
                        None
                    }
                }
            })
            .collect()
    }

    fn console_frame(&mut self, s: &Section<'_>) -> Option<String> {
        let (text, at) = self.string(s, "console-frame")?;
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric());
        if !plain || !FRAME_WORD.contains(&text.len()) {
            let message = format!(
                "{} can't mark a frame; allowed: {} to {} letters and digits",
                quote(text),
                FRAME_WORD.start(),
                FRAME_WORD.end()
            );
            self.bad(s, at, "console-frame", message);
            return None;
        }
        Some(text.to_owned())
    }

    fn escape(&mut self, s: &Section<'_>) -> Option<u8> {
        let (text, at) = self.string(s, "console-escape")?;
        let key = match text.strip_prefix("ctrl-").map(str::as_bytes) {
            // Ctrl-I, -J and -M are Tab and Enter; Ctrl-[ is Esc.
            Some([key @ (b'a'..=b'z' | b'\\' | b']' | b'^' | b'_')]) => {
                (!matches!(key, b'i' | b'j' | b'm')).then_some(*key)
            }
            _ => None,
        };
        let Some(key) = key else {
            let message = format!(
                "{} is not a key that can be used; allowed: \"ctrl-a\" to \"ctrl-z\" but i, j and m, \"ctrl-\\\", \
                 \"ctrl-]\", \"ctrl-^\", \"ctrl-_\"",
                quote(text)
            );
            self.bad(s, at, "console-escape", message);
            return None;
        };
        Some(key.to_ascii_uppercase() & 0x1f)
    }
}
