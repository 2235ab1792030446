//! The host's PS/2 keyboard: the i8042 controller, and scan codes as the bytes of a terminal.
//!
//! The controller translates to scan code set 1. Its absence, and a keyboard's, cost a bounded number of port reads.
//! [`Decoder`] knows the US layout, shift, control, alt, caps lock and the keys for moving; what it makes of a key is
//! what a VT100-like terminal sends. Keys of the number pad are digits.
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, keyboard and auxiliary device controller; Intel 8042.

use bitfield_struct::bitfield;
use bitflags::bitflags;
use x86_64::instructions::port::Port;

/// Data port.
const DATA: u16 = 0x60;
/// Status when read, command when written.
const COMMAND: u16 = 0x64;
/// What the status reads as where no controller is.
const FLOATING_BUS: u8 = 0xff;
/// Status reads before the controller, or the keyboard, is taken to be silent: some 20 ms on a PC.
const ATTEMPTS: u32 = 20_000;
/// Bytes that a controller may hold at most; one that has more is broken.
const MOST_BYTES: u32 = 64;

bitflags! {
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Status: u8 {
        /// A byte can be read.
        const OUTPUT_FULL = 1 << 0;
        /// What was written has not been taken yet.
        const INPUT_FULL = 1 << 1;
        /// The byte to be read is the mouse's.
        const MOUSE = 1 << 5;
    }
}

/// Commands to the controller.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Command {
    ReadConfiguration = 0x20,
    WriteConfiguration = 0x60,
    DisableMouse = 0xa7,
    SelfTest = 0xaa,
    DisableKeyboard = 0xad,
    EnableKeyboard = 0xae,
}

/// The controller's answer to a self-test that went well.
const SELF_TEST_PASSED: u8 = 0x55;

/// Commands to the keyboard.
#[derive(Clone, Copy)]
#[repr(u8)]
enum KeyboardCommand {
    SetDefaults = 0xf6,
    EnableScanning = 0xf4,
}

/// The keyboard's answer to a command.
const ACKNOWLEDGED: u8 = 0xfa;

#[bitfield(u8)]
struct Configuration {
    keyboard_interrupt: bool,
    mouse_interrupt: bool,
    #[bits(2)]
    __: u8,
    keyboard_off: bool,
    mouse_off: bool,
    translate: bool,
    __: bool,
}

/// The controller's two ports.
pub trait Ports {
    /// Reads the status.
    fn status(&mut self) -> u8;
    /// Reads the data port.
    fn data(&mut self) -> u8;
    /// Writes a command.
    fn command(&mut self, byte: u8);
    /// Writes the data port.
    fn write(&mut self, byte: u8);
}

/// The ports of a PC.
pub struct PcPorts(());

impl PcPorts {
    /// # Safety
    /// Ports 0x60 and 0x64 must be a keyboard controller that nobody else drives, or unused.
    pub unsafe fn new() -> Self {
        PcPorts(())
    }
}

impl Ports for PcPorts {
    fn status(&mut self) -> u8 {
        // SAFETY: the constructor's caller vouches for the ports.
        unsafe { Port::new(COMMAND).read() }
    }

    fn data(&mut self) -> u8 {
        // SAFETY: as above.
        unsafe { Port::new(DATA).read() }
    }

    fn command(&mut self, byte: u8) {
        // SAFETY: as above.
        unsafe { Port::new(COMMAND).write(byte) }
    }

    fn write(&mut self, byte: u8) {
        // SAFETY: as above.
        unsafe { Port::new(DATA).write(byte) }
    }
}

/// A keyboard behind a controller that answers.
pub struct Keyboard<P> {
    ports: P,
}

impl<P: Ports> Keyboard<P> {
    /// Finds the controller and sets it up: keyboard on, mouse off, no interrupts. `None`: no working one is there.
    pub fn probe(ports: P) -> Option<Self> {
        let mut keyboard = Keyboard { ports };
        if keyboard.ports.status() == FLOATING_BUS {
            return None;
        }
        keyboard.tell(Command::DisableKeyboard)?;
        keyboard.tell(Command::DisableMouse)?;
        keyboard.empty()?;
        let found = Configuration::from_bits(keyboard.ask(Command::ReadConfiguration)?);
        if keyboard.ask(Command::SelfTest)? != SELF_TEST_PASSED {
            return None;
        }
        // The test may have reset the configuration.
        let quiet = found
            .with_keyboard_interrupt(false)
            .with_mouse_interrupt(false)
            .with_mouse_off(true)
            .with_translate(true);
        keyboard.configure(quiet)?;
        keyboard.tell(Command::EnableKeyboard)?;
        for command in [
            KeyboardCommand::SetDefaults,
            KeyboardCommand::EnableScanning,
        ] {
            // A keyboard may be plugged in later: its silence is no reason to give up.
            if !keyboard.order(command) {
                break;
            }
        }
        keyboard.empty()?;
        Some(keyboard)
    }

    /// Lets the keyboard raise its interrupt. `false`: the controller does not answer.
    pub fn enable_interrupt(&mut self) -> bool {
        self.ask(Command::ReadConfiguration)
            .map(Configuration::from_bits)
            .and_then(|c| self.configure(c.with_keyboard_interrupt(true)))
            .is_some()
    }

    /// A scan code, if there is one. What a mouse says is dropped.
    pub fn read(&mut self) -> Option<u8> {
        for _ in 0..MOST_BYTES {
            let status = self.ports.status();
            if status == FLOATING_BUS {
                return None;
            }
            let status = Status::from_bits_truncate(status);
            if !status.contains(Status::OUTPUT_FULL) {
                return None;
            }
            let byte = self.ports.data();
            if !status.contains(Status::MOUSE) {
                return Some(byte);
            }
        }
        None
    }

    /// Reads what is there. `None`: it does not end.
    fn empty(&mut self) -> Option<()> {
        for _ in 0..MOST_BYTES {
            let status = Status::from_bits_truncate(self.ports.status());
            if !status.contains(Status::OUTPUT_FULL) {
                return Some(());
            }
            self.ports.data();
        }
        None
    }

    /// Waits until the controller takes a byte.
    fn ready(&mut self) -> Option<()> {
        let takes = |ports: &mut P| {
            let status = Status::from_bits_truncate(ports.status());
            !status.contains(Status::INPUT_FULL)
        };
        (0..ATTEMPTS).any(|_| takes(&mut self.ports)).then_some(())
    }

    fn tell(&mut self, command: Command) -> Option<()> {
        self.ready()?;
        self.ports.command(command as u8);
        Some(())
    }

    fn answer(&mut self) -> Option<u8> {
        let has = |ports: &mut P| {
            let status = Status::from_bits_truncate(ports.status());
            status.contains(Status::OUTPUT_FULL)
        };
        (0..ATTEMPTS)
            .any(|_| has(&mut self.ports))
            .then(|| self.ports.data())
    }

    fn ask(&mut self, command: Command) -> Option<u8> {
        self.tell(command)?;
        self.answer()
    }

    fn configure(&mut self, configuration: Configuration) -> Option<()> {
        self.tell(Command::WriteConfiguration)?;
        self.ready()?;
        self.ports.write(configuration.into_bits());
        Some(())
    }

    /// A command to the keyboard. Whether it answered.
    fn order(&mut self, command: KeyboardCommand) -> bool {
        if self.ready().is_none() {
            return false;
        }
        self.ports.write(command as u8);
        // Scan codes that were on their way come before the answer.
        (0..MOST_BYTES)
            .map_while(|_| self.answer())
            .any(|byte| byte == ACKNOWLEDGED)
    }
}

/// What a key sends: a few bytes, perhaps none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Typed {
    bytes: [u8; 5],
    length: usize,
}

impl Typed {
    const NOTHING: Typed = Typed {
        bytes: [0; 5],
        length: 0,
    };

    fn of(bytes: &[u8]) -> Self {
        let mut typed = Typed::NOTHING;
        for (to, from) in typed.bytes.iter_mut().zip(bytes) {
            *to = *from;
            typed.length += 1;
        }
        typed
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// US layout by scan code of set 1, from 0x00 to 0x39; 0: no character.
const PLAIN: &[u8; 0x3a] =
    b"\0\x1b1234567890-=\x7f\tqwertyuiop[]\r\0asdfghjkl;'`\0\\zxcvbnm,./\0*\0 ";
/// The same with shift.
const SHIFTED: &[u8; 0x3a] =
    b"\0\x1b!@#$%^&*()_+\x7f\tQWERTYUIOP{}\r\0ASDFGHJKL:\"~\0|ZXCVBNM<>?\0*\0 ";
/// The number pad, from 0x47 on.
const PAD: &[u8; 13] = b"789-456+1230.";

/// Set in a scan code when the key is released.
const RELEASED: u8 = 0x80;

/// Scan codes with a meaning of their own.
mod code {
    pub(super) const CONTROL: u8 = 0x1d;
    pub(super) const LEFT_SHIFT: u8 = 0x2a;
    pub(super) const RIGHT_SHIFT: u8 = 0x36;
    pub(super) const ALT: u8 = 0x38;
    pub(super) const CAPS_LOCK: u8 = 0x3a;
    /// The next code is one of the keys that the AT keyboard had not.
    pub(super) const EXTENDED: u8 = 0xe0;
    /// Two codes follow, twice: Pause.
    pub(super) const PAUSE: u8 = 0xe1;
}

/// Turns scan codes into what a terminal sends.
#[derive(Clone, Copy, Debug, Default)]
pub struct Decoder {
    shift: bool,
    control: bool,
    alt: bool,
    caps: bool,
    extended: bool,
    /// Codes to come that mean nothing.
    skip: u8,
}

impl Decoder {
    /// The next scan code.
    pub fn feed(&mut self, scan: u8) -> Typed {
        if self.skip > 0 {
            self.skip -= 1;
            return Typed::NOTHING;
        }
        let extended = core::mem::take(&mut self.extended);
        match scan {
            code::EXTENDED => {
                self.extended = true;
                return Typed::NOTHING;
            }
            code::PAUSE => {
                self.skip = 2;
                return Typed::NOTHING;
            }
            _ => {}
        }
        let (key, pressed) = (scan & !RELEASED, scan & RELEASED == 0);
        match key {
            code::CONTROL => self.control = pressed,
            code::ALT => self.alt = pressed,
            // With E0 they are no shift keys, but part of what Print Screen and others send.
            code::LEFT_SHIFT | code::RIGHT_SHIFT if !extended => self.shift = pressed,
            code::CAPS_LOCK if pressed => self.caps = !self.caps,
            _ if !pressed => {}
            _ if extended => return Self::moving(key),
            _ => return self.character(key),
        }
        Typed::NOTHING
    }

    /// The keys between letters and number pad, and those of the pad that have E0.
    fn moving(key: u8) -> Typed {
        Typed::of(match key {
            0x48 => b"\x1b[A",
            0x50 => b"\x1b[B",
            0x4d => b"\x1b[C",
            0x4b => b"\x1b[D",
            0x47 => b"\x1b[H",
            0x4f => b"\x1b[F",
            0x52 => b"\x1b[2~",
            0x53 => b"\x1b[3~",
            0x49 => b"\x1b[5~",
            0x51 => b"\x1b[6~",
            0x1c => b"\r",
            0x35 => b"/",
            _ => b"",
        })
    }

    fn character(&self, key: u8) -> Typed {
        let at = usize::from(key);
        let plain = PLAIN.get(at).copied();
        let letter = plain.is_some_and(|c| c.is_ascii_lowercase());
        let table = match self.shift != (self.caps && letter) {
            true => SHIFTED,
            false => PLAIN,
        };
        let pad = || PAD.get(at.checked_sub(0x47)?).copied();
        let Some(byte) = table.get(at).copied().or_else(pad).filter(|&b| b != 0) else {
            return Typed::NOTHING;
        };
        let byte = match byte {
            b'@'..=b'_' | b'a'..=b'z' if self.control => byte & 0x1f,
            b' ' if self.control => 0,
            byte => byte,
        };
        match self.alt {
            true => Typed::of(&[0x1b, byte]),
            false => Typed::of(&[byte]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// A controller with a keyboard, or without.
    #[derive(Default)]
    struct Fake {
        output: VecDeque<u8>,
        configuration: u8,
        expects_configuration: bool,
        no_keyboard: bool,
        deaf: bool,
        mouse: bool,
        reads: u32,
    }

    impl Ports for Fake {
        fn status(&mut self) -> u8 {
            self.reads += 1;
            let full = u8::from(!self.output.is_empty());
            full | u8::from(self.deaf) << 1 | u8::from(self.mouse) << 5
        }

        fn data(&mut self) -> u8 {
            self.output.pop_front().unwrap_or(0)
        }

        fn command(&mut self, byte: u8) {
            match byte {
                0x20 => self.output.push_back(self.configuration),
                0x60 => self.expects_configuration = true,
                0xaa => self.output.push_back(0x55),
                _ => {}
            }
        }

        fn write(&mut self, byte: u8) {
            if core::mem::take(&mut self.expects_configuration) {
                self.configuration = byte;
            } else if !self.no_keyboard {
                self.output.push_back(0xfa);
            }
        }
    }

    #[test]
    fn a_controller_is_set_up() {
        let stale = Fake {
            output: [0x1e, 0x9e].into(),
            configuration: 0x03,
            ..Fake::default()
        };
        let mut keyboard = Keyboard::probe(stale).unwrap();
        assert_eq!(
            keyboard.ports.configuration, 0x60,
            "translation on, mouse off, quiet"
        );
        assert_eq!(keyboard.read(), None, "what was there before is gone");
        assert!(keyboard.enable_interrupt());
        assert_eq!(keyboard.ports.configuration, 0x61);
        keyboard.ports.output.push_back(0x1e);
        assert_eq!(keyboard.read(), Some(0x1e));
    }

    #[test]
    fn absence_costs_a_bounded_number_of_reads() {
        struct Floating;
        impl Ports for Floating {
            fn status(&mut self) -> u8 {
                0xff
            }
            fn data(&mut self) -> u8 {
                0xff
            }
            fn command(&mut self, _: u8) {}
            fn write(&mut self, _: u8) {}
        }
        assert!(Keyboard::probe(Floating).is_none());
        let deaf = Fake {
            deaf: true,
            ..Fake::default()
        };
        assert!(Keyboard::probe(deaf).is_none());
        let alone = Fake {
            no_keyboard: true,
            ..Fake::default()
        };
        let keyboard = Keyboard::probe(alone).unwrap();
        assert!(keyboard.ports.reads < 4 * ATTEMPTS);
    }

    #[test]
    fn a_mouse_is_not_heard() {
        let mut keyboard = Keyboard::probe(Fake::default()).unwrap();
        keyboard.ports.mouse = true;
        keyboard.ports.output.extend([1, 2, 3]);
        assert_eq!(keyboard.read(), None);
    }

    fn typed(codes: &[u8]) -> Vec<u8> {
        let mut decoder = Decoder::default();
        let bytes = codes.iter().map(|&code| decoder.feed(code));
        bytes.flat_map(|typed| typed.as_bytes().to_vec()).collect()
    }

    #[test]
    fn codes_become_what_a_terminal_sends() {
        let press = |key: u8| [key, key | RELEASED];
        assert_eq!(
            typed(&[press(0x1e), press(0x30), press(0x1c)].concat()),
            b"ab\r"
        );
        assert_eq!(typed(&[0x2a, 0x1e, 0x9e, 0x02, 0x82, 0xaa, 0x1e]), b"A!a");
        assert_eq!(
            typed(&[0x3a, 0xba, 0x1e, 0x02, 0x2a, 0x1e]),
            b"A1a",
            "caps lock"
        );
        assert_eq!(typed(&[0x1d, 0x1b, 0x9b, 0x9d, 0x1b]), b"\x1d]", "control");
        assert_eq!(typed(&[0x1d, 0x2a, 0x1e]), b"\x01");
        assert_eq!(typed(&[0x38, 0x1e]), b"\x1ba", "alt");
        assert_eq!(
            typed(&[0xe0, 0x48, 0xe0, 0xc8, 0xe0, 0x53]),
            b"\x1b[A\x1b[3~"
        );
        assert_eq!(typed(&[0xe0, 0x2a, 0xe0, 0x37, 0x1e]), b"a", "print screen");
        assert_eq!(
            typed(&[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5, 0x1e]),
            b"a",
            "pause"
        );
        assert_eq!(typed(&[0x0e, 0x0f, 0x39, 0x47, 0x53, 0x58]), b"\x7f\t 7.");
    }

    proptest! {
        #[test]
        fn any_codes_are_decoded(codes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(typed(&codes).len() <= 4 * codes.len());
        }
    }
}
