//! A guest's output as plain text: what is left when it stands among the lines of others.
//!
//! Lines are kept, and tabs; control sequences are taken out whole (ECMA-48: escape sequences, CSI, and the strings of
//! OSC, DCS, APC, PM and SOS), and so are all other control characters, those of the C1 set included, alone or
//! written in UTF-8. A carriage return that no line feed follows begins a new line, since it would write over what
//! stands before it. What is no UTF-8 shows as `?`.

/// What comes of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    /// Nothing to show.
    Nothing,
    /// These bytes, so many of them: one character.
    Character([u8; 4], usize),
    /// The line ends.
    LineEnd,
    /// The line ends before this byte, which is to be offered again.
    LineEndBefore,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Ground,
    /// After ESC, and perhaps intermediates.
    Escape,
    /// In a control sequence.
    Csi,
    /// In a string that ST ends.
    String,
    /// In a string, after ESC.
    StringEscape,
}

/// Makes plain text of what a console's guest writes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filter {
    state: State,
    /// Something stands in the line.
    begun: bool,
    returned: bool,
    /// Bytes of a character that has begun, and how many it is to have.
    part: [u8; 4],
    length: usize,
    wanted: usize,
}

/// What is shown for what is no character.
const UNKNOWN: Plain = Plain::Character([b'?', 0, 0, 0], 1);

impl Filter {
    /// The next byte.
    pub(super) fn feed(&mut self, byte: u8) -> Plain {
        if core::mem::take(&mut self.returned) && byte != b'\n' && core::mem::take(&mut self.begun)
        {
            return Plain::LineEndBefore;
        }
        // Line ends and a new ESC end whatever was going on: a cut sequence takes no further lines with it.
        match byte {
            b'\n' => {
                *self = Filter::default();
                return Plain::LineEnd;
            }
            b'\r' => {
                self.state = State::Ground;
                self.length = 0;
                self.returned = true;
                return Plain::Nothing;
            }
            0x1b => {
                self.length = 0;
                self.state = match self.state {
                    State::String => State::StringEscape,
                    _ => State::Escape,
                };
                return Plain::Nothing;
            }
            _ => {}
        }
        let shown = match self.state {
            State::Ground => self.text(byte),
            _ => {
                self.state = self.within(byte);
                Plain::Nothing
            }
        };
        self.begun |= shown != Plain::Nothing;
        shown
    }

    /// The state after a byte of a sequence.
    fn within(&self, byte: u8) -> State {
        match (self.state, byte) {
            (State::Escape, b'[') => State::Csi,
            (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => State::String,
            (State::Escape, 0x20..=0x2f) => State::Escape,
            (State::Csi, 0x20..=0x3f) => State::Csi,
            // BEL ends a string for xterm.
            (State::String, 0x07) => State::Ground,
            (State::String, _) => State::String,
            // ST is ESC and a backslash; ESC and something else begins a new sequence.
            (State::StringEscape, b'\\') => State::Ground,
            (State::StringEscape, b'[') => State::Csi,
            (State::StringEscape, _) => State::String,
            _ => State::Ground,
        }
    }

    fn text(&mut self, byte: u8) -> Plain {
        let continues = (0x80..0xc0).contains(&byte);
        if self.length > 0 && !continues {
            // The character before was cut; it shows as nothing, and this byte begins anew.
            self.length = 0;
        }
        match byte {
            b'\t' | b' '..=b'~' => Plain::Character([byte, 0, 0, 0], 1),
            0..=0x08 | 0x0a..=0x1f | 0x7f => Plain::Nothing,
            0xc2..=0xf4 => {
                self.part[0] = byte;
                self.length = 1;
                self.wanted = match byte {
                    0xc2..=0xdf => 2,
                    0xe0..=0xef => 3,
                    _ => 4,
                };
                Plain::Nothing
            }
            0xc0 | 0xc1 | 0xf5.. => UNKNOWN,
            0x80..=0xbf if self.length == 0 => UNKNOWN,
            0x80..=0xbf => {
                self.part[self.length] = byte;
                self.length += 1;
                if self.length < self.wanted {
                    return Plain::Nothing;
                }
                let length = core::mem::take(&mut self.length);
                match core::str::from_utf8(&self.part[..length]) {
                    Ok(text) if text.chars().any(char::is_control) => Plain::Nothing,
                    Ok(_) => Plain::Character(self.part, length),
                    Err(_) => UNKNOWN,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{string::String, vec::Vec};
    use proptest::prelude::*;

    fn plain(text: &[u8]) -> String {
        let mut filter = Filter::default();
        let mut out = Vec::new();
        for &byte in text {
            loop {
                match filter.feed(byte) {
                    Plain::Nothing => break,
                    Plain::Character(bytes, length) => {
                        out.extend_from_slice(&bytes[..length]);
                        break;
                    }
                    Plain::LineEnd => {
                        out.push(b'\n');
                        break;
                    }
                    Plain::LineEndBefore => out.push(b'\n'),
                }
            }
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn sequences_go_and_text_stays() {
        for (text, left) in [
            ("a\x1b[31;1mb\x1b[0m c\r\n", "ab c\n"),
            ("\x1b]0;title\x07x\x1b]0;title\x1b\\y", "xy"),
            ("\x1bPq#0\x1b\\x\x1b(By\x1bcz", "xyz"),
            ("10 %\r20 %\r\ndone", "10 %\n20 %\ndone"),
            ("one\n\rtwo\r\n", "one\ntwo\n"),
            ("a\tb\x07\x08\x0e", "a\tb"),
            (
                "\u{fc}ber \u{20ac} \u{1f600}",
                "\u{fc}ber \u{20ac} \u{1f600}",
            ),
            ("c1 \u{9b}31m", "c1 31m"),
            ("cut \x1b[12\r\nnext", "cut \nnext"),
        ] {
            assert_eq!(plain(text.as_bytes()), left, "{text:?}");
        }
        assert_eq!(plain(b"a\x9bb\xffc\xe2\x82d\xc0\x80"), "a?b?cd??");
    }

    proptest! {
        #[test]
        fn nothing_but_text_is_left(text in prop::collection::vec(
            prop_oneof![any::<u8>(), Just(0x1b), Just(0x9b), Just(b'\r'), Just(b'['), Just(0xc2), b'a'..=b'z'], 0..200))
        {
            let left = plain(&text);
            prop_assert!(left.chars().all(|c| matches!(c, '\n' | '\t') || !c.is_control()), "{:?}", left);
        }
    }
}
