//! A PS/2 keyboard, on which a person at a terminal types.
//!
//! Two parts. [`Keyboard`] is the device at the end of the keyboard controller's line: it answers commands and sends
//! scan codes (IBM PS/2 technical reference, "Keyboard"; sets 1 and 2). [`Typist`] turns the bytes that a terminal
//! sends into keys of a keyboard for the United States: letters with shift, control characters, and the escape
//! sequences of arrows and function keys (ECMA-48, and what xterm sends). Esc itself begins such a sequence, so it is
//! the key only when something else follows, such as a second Esc.
//!
//! Invariant: what waits is bounded; what finds no room is refused as a whole, so no key stays pressed.

use alloc::collections::VecDeque;

/// Bytes of scan codes that wait.
const WAITING: usize = 512;
/// Most bytes that one byte of a terminal becomes: two keys with shift, pressed and released.
const LONGEST: usize = 16;

/// What it is: an MF II keyboard.
const IDENTITY: [u8; 2] = [0xab, 0x83];
const ACKNOWLEDGE: u8 = 0xfa;
const SELF_TEST_PASSED: u8 = 0xaa;
const RESEND: u8 = 0xfe;
const ECHO: u8 = 0xee;
/// Before the code of a key of the middle block.
const EXTENDED: u8 = 0xe0;
/// Before the code of a key that is released, in set 2.
const RELEASED: u8 = 0xf0;
/// Added to the code of a key that is released, in set 1.
const RELEASED_1: u8 = 0x80;

/// The codes of set 2, by those of set 1; 0: no such key.
const SET_2: [u8; 0x59] = [
    0x00, 0x76, 0x16, 0x1e, 0x26, 0x25, 0x2e, 0x36, 0x3d, 0x3e, 0x46, 0x45, 0x4e, 0x55, 0x66, 0x0d,
    0x15, 0x1d, 0x24, 0x2d, 0x2c, 0x35, 0x3c, 0x43, 0x44, 0x4d, 0x54, 0x5b, 0x5a, 0x14, 0x1c, 0x1b,
    0x23, 0x2b, 0x34, 0x33, 0x3b, 0x42, 0x4b, 0x4c, 0x52, 0x0e, 0x12, 0x5d, 0x1a, 0x22, 0x21, 0x2a,
    0x32, 0x31, 0x3a, 0x41, 0x49, 0x4a, 0x59, 0x7c, 0x11, 0x29, 0x58, 0x05, 0x06, 0x04, 0x0c, 0x03,
    0x0b, 0x83, 0x0a, 0x01, 0x09, 0x77, 0x7e, 0x6c, 0x75, 0x7d, 0x7b, 0x6b, 0x73, 0x74, 0x79, 0x69,
    0x72, 0x7a, 0x70, 0x71, 0x00, 0x00, 0x00, 0x78, 0x07,
];

/// What the letters' keys give alone and with shift, by their codes of set 1 from 1 on. A zero is another key.
const PLAIN: &[u8; 0x39] =
    b"\x1b1234567890-=\x08\tqwertyuiop[]\r\0asdfghjkl;'`\0\\zxcvbnm,./\0\0\0 ";
const SHIFTED: &[u8; 0x39] =
    b"\0!@#$%^&*()_+\0\0QWERTYUIOP{}\0\0ASDFGHJKL:\"~\0|ZXCVBNM<>?\0\0\0\0";

/// Codes of set 1.
const CONTROL: u8 = 0x1d;
const SHIFT: u8 = 0x2a;
const BACKSPACE: u8 = 0x0e;
const ESCAPE: u8 = 0x01;

/// A byte of set 2 as set 1 has it: what the keyboard controller does to bytes on their way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Translation {
    released: bool,
}

impl Translation {
    /// The byte to hand on, if there is one.
    pub fn translate(&mut self, byte: u8) -> Option<u8> {
        if byte == RELEASED {
            self.released = true;
            return None;
        }
        let released = core::mem::take(&mut self.released);
        // Bytes that are no codes stay as they are.
        let code = SET_2.iter().position(|&known| known == byte && byte != 0);
        let code = code.map_or(byte, |code| code as u8);
        Some(if released { code | RELEASED_1 } else { code })
    }
}

/// A command that waits for its parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    Ignored,
    ScanCodeSet,
}

/// The keyboard.
#[derive(Debug)]
pub struct Keyboard {
    /// Bytes that answer commands; they go first.
    answers: VecDeque<u8>,
    codes: VecDeque<u8>,
    awaited: Option<Awaited>,
    /// 1 or 2.
    set: u8,
    scanning: bool,
    last: u8,
    typist: Typist,
}

impl Keyboard {
    /// A keyboard after power-on.
    pub fn new() -> Self {
        Keyboard {
            answers: VecDeque::with_capacity(LONGEST),
            codes: VecDeque::with_capacity(WAITING),
            awaited: None,
            set: 2,
            scanning: true,
            last: 0,
            typist: Typist::default(),
        }
    }

    /// The next byte on the line. With `codes`, a key's too; else answers only.
    pub fn pop(&mut self, codes: bool) -> Option<u8> {
        let byte = match self.answers.pop_front() {
            Some(answer) => answer,
            None if codes => self.codes.pop_front()?,
            None => return None,
        };
        self.last = byte;
        Some(byte)
    }

    /// A byte from the controller: a command, or a command's parameter.
    pub fn command(&mut self, byte: u8) {
        self.answers.clear();
        if let Some(awaited) = self.awaited.take().filter(|_| byte < 0xed) {
            self.answers.push_back(ACKNOWLEDGE);
            match (awaited, byte) {
                (Awaited::ScanCodeSet, 0) => self.answers.push_back(self.set),
                (Awaited::ScanCodeSet, 1 | 2) => self.set = byte,
                (Awaited::ScanCodeSet | Awaited::Ignored, _) => {}
            }
            return;
        }
        match byte {
            0xee => return self.answers.push_back(ECHO),
            0xfe => return self.answers.push_back(self.last),
            0xed | 0xf3 => self.awaited = Some(Awaited::Ignored),
            0xf0 => self.awaited = Some(Awaited::ScanCodeSet),
            0xf4 => self.scanning = true,
            0xf5 => self.defaults(false),
            0xf6 => self.defaults(true),
            0xff => self.defaults(true),
            0xf2 => {}
            _ => return self.answers.push_back(RESEND),
        }
        self.answers.push_back(ACKNOWLEDGE);
        match byte {
            0xf2 => self.answers.extend(IDENTITY),
            0xff => self.answers.push_back(SELF_TEST_PASSED),
            _ => {}
        }
    }

    fn defaults(&mut self, scanning: bool) {
        self.codes.clear();
        self.set = 2;
        self.scanning = scanning;
    }

    /// A byte that a terminal sent. `false`: there is no room for its keys. Keys typed while the guest has
    /// the keyboard off are lost, as on a PC.
    pub fn type_byte(&mut self, byte: u8) -> bool {
        if self.codes.len() + LONGEST > WAITING {
            return false;
        }
        let keys = self.typist.type_byte(byte);
        if self.scanning {
            for key in keys.into_iter().flatten() {
                self.strike(key);
            }
        }
        true
    }

    fn strike(&mut self, key: Key) {
        let with = |wanted: bool, code: u8| wanted.then_some((code, false));
        let modifiers = [with(key.control, CONTROL), with(key.shift, SHIFT)];
        for (code, extended) in modifiers.into_iter().flatten() {
            self.send(code, extended, false);
        }
        self.send(key.code, key.extended, false);
        self.send(key.code, key.extended, true);
        for (code, extended) in modifiers.into_iter().rev().flatten() {
            self.send(code, extended, true);
        }
    }

    fn send(&mut self, code: u8, extended: bool, released: bool) {
        if extended {
            self.codes.push_back(EXTENDED);
        }
        if self.set == 1 {
            let released = if released { RELEASED_1 } else { 0 };
            self.codes.push_back(code | released);
            return;
        }
        if released {
            self.codes.push_back(RELEASED);
        }
        let code = SET_2.get(usize::from(code)).copied();
        self.codes.push_back(code.unwrap_or_default());
    }
}

impl Default for Keyboard {
    fn default() -> Self {
        Self::new()
    }
}

/// A key, by its code of set 1, and what is held with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    code: u8,
    extended: bool,
    shift: bool,
    control: bool,
}

impl Key {
    const fn plain(code: u8) -> Self {
        Key {
            code,
            extended: false,
            shift: false,
            control: false,
        }
    }

    const fn extended(code: u8) -> Self {
        Key {
            extended: true,
            ..Key::plain(code)
        }
    }

    /// The key that gives this byte.
    fn of(byte: u8) -> Option<Self> {
        let find = |keys: &[u8; 0x39]| {
            let at = keys.iter().position(|&key| key == byte && byte != 0)?;
            Some(Key::plain(at as u8 + 1))
        };
        match byte {
            b'\n' => find(PLAIN).or(Key::of(b'\r')),
            0x7f => Some(Key::plain(BACKSPACE)),
            _ => find(PLAIN)
                .or_else(|| find(SHIFTED).map(|key| Key { shift: true, ..key }))
                .or_else(|| {
                    // Ctrl-A is 1, and so on.
                    let letter = matches!(byte, 1..=26).then_some(byte | 0x60)?;
                    Key::of(letter).map(|key| Key {
                        control: true,
                        ..key
                    })
                }),
        }
    }
}

/// Where in an escape sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    /// After Esc.
    Escape,
    /// After Esc O.
    Single,
    /// After Esc [, with the number so far.
    Control(u8),
}

/// Turns a terminal's bytes into keys.
#[derive(Clone, Copy, Debug, Default)]
struct Typist {
    sequence: Sequence,
}

impl Typist {
    /// The keys that this byte completes, at most two.
    fn type_byte(&mut self, byte: u8) -> [Option<Key>; 2] {
        match (core::mem::take(&mut self.sequence), byte) {
            (Sequence::None, 0x1b) => self.sequence = Sequence::Escape,
            (Sequence::Escape, b'[') => self.sequence = Sequence::Control(0),
            (Sequence::Escape, b'O') => self.sequence = Sequence::Single,
            (Sequence::Escape, 0x1b) => return [Some(Key::plain(ESCAPE)), None],
            (Sequence::Escape, _) => return [Some(Key::plain(ESCAPE)), Key::of(byte)],
            (Sequence::Control(number), b'0'..=b'9') => {
                let number = number.saturating_mul(10).saturating_add(byte - b'0');
                self.sequence = Sequence::Control(number);
            }
            // Further numbers say what was held; the key is the same.
            (Sequence::Control(number), b';') => self.sequence = Sequence::Control(number),
            (Sequence::Control(number), b'~') => return [numbered(number), None],
            (Sequence::Control(_) | Sequence::Single, _) => return [named(byte), None],
            (Sequence::None, _) => return [Key::of(byte), None],
        }
        [None; 2]
    }
}

/// The key of a sequence that ends with this letter.
fn named(letter: u8) -> Option<Key> {
    Some(match letter {
        b'A' => Key::extended(0x48),
        b'B' => Key::extended(0x50),
        b'C' => Key::extended(0x4d),
        b'D' => Key::extended(0x4b),
        b'H' => Key::extended(0x47),
        b'F' => Key::extended(0x4f),
        b'P'..=b'S' => Key::plain(0x3b + letter - b'P'),
        _ => return None,
    })
}

/// The key of a sequence with this number.
fn numbered(number: u8) -> Option<Key> {
    Some(match number {
        1 | 7 => Key::extended(0x47),
        2 => Key::extended(0x52),
        3 => Key::extended(0x53),
        4 | 8 => Key::extended(0x4f),
        5 => Key::extended(0x49),
        6 => Key::extended(0x51),
        11..=15 => Key::plain(0x3b + number - 11),
        17..=21 => Key::plain(0x40 + number - 17),
        23 | 24 => Key::plain(0x57 + number - 23),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn sent(keyboard: &mut Keyboard) -> Vec<u8> {
        core::iter::from_fn(|| keyboard.pop(true)).collect()
    }

    fn typed(text: &[u8]) -> Vec<u8> {
        let mut keyboard = Keyboard::new();
        assert!(text.iter().all(|&byte| keyboard.type_byte(byte)));
        let mut translation = Translation::default();
        let raw = sent(&mut keyboard);
        raw.iter()
            .filter_map(|&b| translation.translate(b))
            .collect()
    }

    #[test]
    fn letters_become_keys() {
        assert_eq!(typed(b"c"), [0x2e, 0xae]);
        assert_eq!(typed(b"C"), [0x2a, 0x2e, 0xae, 0xaa]);
        assert_eq!(typed(b"("), [0x2a, 0x0a, 0x8a, 0xaa]);
        assert_eq!(typed(b"\r"), typed(b"\n"));
        assert_eq!(typed(b"\x7f"), [0x0e, 0x8e]);
        assert_eq!(typed(b"\x03"), [0x1d, 0x2e, 0xae, 0x9d], "Ctrl-C");
        assert_eq!(typed(b"\xff\0"), [0; 0]);
        for byte in b' '..=b'~' {
            assert!(!typed(&[byte]).is_empty(), "{}", char::from(byte));
        }
    }

    #[test]
    fn escape_sequences_become_arrows_and_function_keys() {
        assert_eq!(typed(b"\x1b[A"), [0xe0, 0x48, 0xe0, 0xc8]);
        assert_eq!(typed(b"\x1bOP"), [0x3b, 0xbb], "F1");
        assert_eq!(typed(b"\x1b[21~"), [0x44, 0xc4], "F10");
        assert_eq!(typed(b"\x1b[24~"), [0x58, 0xd8], "F12");
        assert_eq!(typed(b"\x1b[3;5~"), [0; 0], "no key has the number 35");
        assert_eq!(typed(b"\x1b\x1b"), [0x01, 0x81]);
        assert_eq!(typed(b"\x1bx"), [0x01, 0x81, 0x2d, 0xad]);
        assert_eq!(typed(b"\x1b[99999999~a"), [0x1e, 0x9e]);
    }

    #[test]
    fn set_2_is_what_goes_over_the_line() {
        let mut keyboard = Keyboard::new();
        assert!(keyboard.type_byte(b'a'));
        assert_eq!(sent(&mut keyboard), [0x1c, 0xf0, 0x1c]);
        keyboard.command(0xf0);
        keyboard.command(1);
        assert!(keyboard.type_byte(b'a'));
        assert_eq!(
            sent(&mut keyboard),
            [0xfa, 0x1e, 0x9e],
            "the last answer first"
        );
    }

    #[test]
    fn commands_are_answered() {
        let mut keyboard = Keyboard::new();
        let mut ask = |byte| {
            keyboard.command(byte);
            sent(&mut keyboard)
        };
        assert_eq!(ask(0xff), [0xfa, 0xaa]);
        assert_eq!(ask(0xf2), [0xfa, 0xab, 0x83]);
        assert_eq!(ask(0xed), [0xfa]);
        assert_eq!(ask(0x07), [0xfa]);
        assert_eq!(ask(0xee), [0xee]);
        assert_eq!(ask(0xf0), [0xfa]);
        assert_eq!(ask(0x00), [0xfa, 0x02]);
        assert_eq!(ask(0xfe), [0x02], "again");
        assert_eq!(ask(0x55), [0xfe]);
        assert_eq!(ask(0xf5), [0xfa]);
        assert!(keyboard.type_byte(b'a'));
        assert_eq!(sent(&mut keyboard), [0; 0], "off");
        let mut translation = Translation::default();
        let identity = IDENTITY.map(|byte| translation.translate(byte));
        assert_eq!(identity, [Some(0xab), Some(0x41)]);
    }

    #[test]
    fn what_finds_no_room_is_refused_as_a_whole() {
        let mut keyboard = Keyboard::new();
        let taken = (0..1000).take_while(|_| keyboard.type_byte(b'A')).count();
        let codes = sent(&mut keyboard);
        assert_eq!(codes.len(), taken * 6);
        assert!(codes.len() <= WAITING);
        assert!(keyboard.type_byte(b'A'));
    }

    proptest! {
        #[test]
        fn every_key_that_is_pressed_is_released(
            bytes in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut keyboard = Keyboard::new();
            let mut translation = Translation::default();
            let mut held = Vec::new();
            for byte in bytes {
                prop_assert!(keyboard.type_byte(byte));
                let before = keyboard.codes.len();
                prop_assert!(before <= LONGEST);
                for byte in sent(&mut keyboard) {
                    match translation.translate(byte) {
                        None | Some(EXTENDED) => {}
                        Some(code) if code & RELEASED_1 == 0 => held.push(code),
                        Some(code) => held.retain(|&key| key != code & !RELEASED_1),
                    }
                }
                prop_assert!(held.is_empty());
            }
        }
    }
}
