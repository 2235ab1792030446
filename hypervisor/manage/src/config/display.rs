//! What a VM draws on, and what of it is on the terminal: the `display` and `console` keys.

use alloc::{borrow::ToOwned, format};

use toml::de::DeValue;

use super::{Parser, Section, quote};

/// What a VM draws on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DisplayKind {
    /// It has no display.
    #[default]
    None,
    /// A VGA adapter's text screen.
    VgaText,
    /// A frame buffer that its firmware sets up.
    Ramfb,
}

/// What of a VM is a console on the host's terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConsoleKind {
    /// Nothing.
    None,
    /// Its first serial port.
    #[default]
    Serial,
    /// Its text screen, and a keyboard.
    Display,
}

impl Parser<'_> {
    /// `display`. What is wrong is noted, and disables the VM.
    pub(super) fn display(&mut self, vm: &Section<'_>) -> DisplayKind {
        let kinds = [
            ("none", DisplayKind::None),
            ("vga-text", DisplayKind::VgaText),
            ("ramfb", DisplayKind::Ramfb),
        ];
        self.choice(vm, "display", &kinds).unwrap_or_default()
    }

    /// `console`: `true`, `false` or `"display"`. What is wrong is noted, and disables the VM.
    pub(super) fn console(&mut self, vm: &Section<'_>, display: DisplayKind) -> ConsoleKind {
        const KEY: &str = "console";
        match self.value(vm, KEY) {
            None | Some((DeValue::Boolean(true), _)) => ConsoleKind::Serial,
            Some((DeValue::Boolean(false), _)) => ConsoleKind::None,
            Some((DeValue::String(text), at)) if text == "display" => {
                if display != DisplayKind::VgaText {
                    let text = "only text can be shown; write display = \"vga-text\", too";
                    self.bad(vm, at, KEY, text.to_owned());
                }
                ConsoleKind::Display
            }
            Some((DeValue::String(text), at)) => {
                let text = quote(text);
                let text = format!("{text} is unknown; allowed: true, false, \"display\"");
                self.bad(vm, at, KEY, text);
                ConsoleKind::None
            }
            Some((other, at)) => {
                self.wrong_type(vm, at, KEY, "true, false or \"display\"", other);
                ConsoleKind::None
            }
        }
    }
}
