//! The keyboard controller's ports 0x60/0x64 and system control port A at 0x92.
//!
//! A controller with or without a [`Keyboard`], and without a mouse: self-test, configuration byte and
//! output port work, and the reset line it drives does. Without a keyboard a byte sent to it gets
//! the controller's own time-out answer, as on a PC with nothing plugged in. A keyboard's bytes are
//! translated to scan code set 1 when the configuration says so. There is no
//! second (mouse) port: its commands are ignored. A20 is stored but never masks an address.

use alloc::sync::Arc;

use bitfield_struct::bitfield;
use bitflags::bitflags;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, Overlap, PortBus, PortDevice, byte_only};
use crate::keyboard::{Keyboard, Translation};
use crate::line::Line;
use crate::system::{ResetSource, SystemControl, SystemRequest};

bitflags! {
    /// Status register (port 0x64, read).
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Status: u8 {
        const OUTPUT_FULL = 1 << 0;
        /// The self-test passed.
        const SYSTEM_FLAG = 1 << 2;
        /// The last write was to the command port.
        const COMMAND = 1 << 3;
        /// The keyboard is not locked.
        const UNLOCKED = 1 << 4;
        /// The keyboard did not answer.
        const TIMEOUT = 1 << 6;
    }
}

/// The configuration ("command") byte, as the guest stores it.
#[bitfield(u8)]
struct Configuration {
    keyboard_interrupt: bool,
    mouse_interrupt: bool,
    system_flag: bool,
    __: bool,
    keyboard_off: bool,
    mouse_off: bool,
    translate: bool,
    __: bool,
}

/// Commands (port 0x64, write) that mean something without a mouse port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    ReadConfiguration,
    WriteConfiguration,
    SelfTest,
    TestKeyboardPort,
    DisableKeyboard,
    EnableKeyboard,
    ReadInputPort,
    ReadOutputPort,
    WriteOutputPort,
    WriteOutputBuffer,
    /// Pulses output-port lines low: a 0 bit of the low nibble pulses, bit 0 is reset.
    Pulse(u8),
}

impl Command {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0x20 => Self::ReadConfiguration,
            0x60 => Self::WriteConfiguration,
            0xaa => Self::SelfTest,
            0xab => Self::TestKeyboardPort,
            0xad => Self::DisableKeyboard,
            0xae => Self::EnableKeyboard,
            0xc0 => Self::ReadInputPort,
            0xd0 => Self::ReadOutputPort,
            0xd1 => Self::WriteOutputPort,
            0xd2 => Self::WriteOutputBuffer,
            0xf0..=0xff => Self::Pulse(byte & 0xf),
            _ => return None,
        })
    }
}

/// What a self-test that passed answers.
const SELF_TEST_PASSED: u8 = 0x55;
/// What the controller puts in the buffer when the keyboard does not take a byte.
const KEYBOARD_TIMEOUT: u8 = 0xfe;

/// Output port: reset line (active low) and A20 gate.
#[bitfield(u8)]
struct OutputPort {
    not_reset: bool,
    a20: bool,
    #[bits(6)]
    __: u8,
}

struct State {
    status: Status,
    configuration: Configuration,
    output: u8,
    /// The command that takes the next data byte.
    awaiting: Option<Command>,
    a20: bool,
    keyboard: Option<Keyboard>,
    translation: Translation,
}

/// The controller, with port A beside it as both drive A20 and reset.
pub struct KeyboardController {
    state: Mutex<State>,
    irq: Line,
    system: Arc<dyn SystemControl>,
}

impl KeyboardController {
    /// A controller that passed its power-on test. `irq` is ISA IRQ 1.
    pub fn new(irq: Line, system: Arc<dyn SystemControl>, keyboard: Option<Keyboard>) -> Arc<Self> {
        Arc::new(KeyboardController {
            state: Mutex::new(State {
                status: Status::SYSTEM_FLAG | Status::UNLOCKED | Status::COMMAND,
                configuration: Configuration::new()
                    .with_system_flag(true)
                    .with_mouse_off(true)
                    .with_translate(true),
                output: 0,
                awaiting: None,
                a20: true,
                keyboard,
                translation: Translation::default(),
            }),
            irq,
            system,
        })
    }

    /// Puts the controller at its ports of a PC: 0x60, 0x64 and 0x92.
    pub fn attach(self: &Arc<Self>, ports: &mut PortBus) -> Result<(), Overlap> {
        for (name, base, register) in [
            ("i8042-data", 0x60, Register::Data),
            ("i8042-command", 0x64, Register::Command),
            ("port-a", 0x92, Register::PortA),
        ] {
            let controller = self.clone();
            ports.insert(
                name,
                base,
                1,
                Arc::new(ControllerPort {
                    controller,
                    register,
                }),
            )?;
        }
        Ok(())
    }

    fn reset(&self, source: ResetSource) {
        self.system.request(SystemRequest::Reset(source));
    }

    fn update_irq(&self, state: &State) {
        self.irq.set(
            state.status.contains(Status::OUTPUT_FULL) && state.configuration.keyboard_interrupt(),
        );
    }

    /// Bytes that a terminal sent, as keys of the keyboard. Returns how many were taken.
    pub fn type_bytes(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        let Some(keyboard) = &mut state.keyboard else {
            return 0;
        };
        let taken = bytes.iter().take_while(|&&byte| keyboard.type_byte(byte));
        let taken = taken.count();
        self.fetch(&mut state);
        taken
    }

    /// Takes the next byte from the keyboard, if the buffer is empty.
    fn fetch(&self, state: &mut State) {
        while !state.status.contains(Status::OUTPUT_FULL) {
            let codes = !state.configuration.keyboard_off();
            let next = state.keyboard.as_mut().and_then(|k| k.pop(codes));
            let Some(byte) = next else { return };
            let byte = match state.configuration.translate() {
                true => state.translation.translate(byte),
                false => Some(byte),
            };
            if let Some(byte) = byte {
                self.answer(state, byte);
            }
        }
    }

    fn answer(&self, state: &mut State, byte: u8) {
        state.output = byte;
        state.status |= Status::OUTPUT_FULL;
        state.status -= Status::TIMEOUT;
        self.update_irq(state);
    }

    fn read_data(&self) -> u8 {
        let mut state = self.state.lock();
        state.status -= Status::OUTPUT_FULL | Status::TIMEOUT;
        self.update_irq(&state);
        let byte = state.output;
        self.fetch(&mut state);
        byte
    }

    fn write_command(&self, byte: u8) {
        let mut state = self.state.lock();
        state.status |= Status::COMMAND;
        state.awaiting = None;
        // An unknown command is ignored, as are those of the mouse port.
        let Some(command) = Command::from_byte(byte) else {
            return;
        };
        match command {
            Command::ReadConfiguration => {
                let byte = state.configuration.into_bits();
                self.answer(&mut state, byte);
            }
            Command::SelfTest => {
                state.status |= Status::SYSTEM_FLAG;
                state.configuration.set_keyboard_off(true);
                self.answer(&mut state, SELF_TEST_PASSED);
            }
            // No fault on the lines.
            Command::TestKeyboardPort => self.answer(&mut state, 0),
            Command::DisableKeyboard => state.configuration.set_keyboard_off(true),
            Command::EnableKeyboard => {
                state.configuration.set_keyboard_off(false);
                self.fetch(&mut state);
            }
            // Keyboard not locked.
            Command::ReadInputPort => self.answer(&mut state, 0x80),
            Command::ReadOutputPort => {
                let port = OutputPort::new().with_not_reset(true).with_a20(state.a20);
                self.answer(&mut state, port.into_bits());
            }
            Command::WriteConfiguration | Command::WriteOutputPort | Command::WriteOutputBuffer => {
                state.awaiting = Some(command);
            }
            Command::Pulse(high) => {
                if !OutputPort::from_bits(high).not_reset() {
                    drop(state);
                    self.reset(ResetSource::KeyboardController);
                }
            }
        }
    }

    fn write_data(&self, byte: u8) {
        let mut state = self.state.lock();
        state.status -= Status::COMMAND;
        match state.awaiting.take() {
            Some(Command::WriteConfiguration) => {
                // The mouse port stays off: this is how its absence shows.
                state.configuration = Configuration::from_bits(byte).with_mouse_off(true);
                let flag = state.configuration.system_flag();
                state.status.set(Status::SYSTEM_FLAG, flag);
                self.update_irq(&state);
                self.fetch(&mut state);
            }
            Some(Command::WriteOutputPort) => {
                let port = OutputPort::from_bits(byte);
                state.a20 = port.a20();
                if !port.not_reset() {
                    drop(state);
                    self.reset(ResetSource::KeyboardController);
                }
            }
            Some(Command::WriteOutputBuffer) => self.answer(&mut state, byte),
            _ => {
                if let Some(keyboard) = &mut state.keyboard {
                    keyboard.command(byte);
                    return self.fetch(&mut state);
                }
                // Nobody takes it.
                self.answer(&mut state, KEYBOARD_TIMEOUT);
                state.status |= Status::TIMEOUT;
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Register {
    Data,
    Command,
    PortA,
}

/// System control port A.
#[bitfield(u8)]
struct PortA {
    fast_reset: bool,
    a20: bool,
    #[bits(6)]
    __: u8,
}

struct ControllerPort {
    controller: Arc<KeyboardController>,
    register: Register,
}

impl PortDevice for ControllerPort {
    fn read(&self, _offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        Ok(u32::from(match self.register {
            Register::Data => self.controller.read_data(),
            Register::Command => self.controller.state.lock().status.bits(),
            Register::PortA => PortA::new()
                .with_a20(self.controller.state.lock().a20)
                .into_bits(),
        }))
    }

    fn write(&self, _offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        match self.register {
            Register::Data => self.controller.write_data(value as u8),
            Register::Command => self.controller.write_command(value as u8),
            Register::PortA => {
                let value = PortA::from_bits(value as u8);
                self.controller.state.lock().a20 = value.a20();
                if value.fast_reset() {
                    self.controller.reset(ResetSource::SystemControlPortA);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RecordingSink, Requests};
    use proptest::prelude::*;

    struct Setup {
        controller: Arc<KeyboardController>,
        ports: PortBus,
        irq: Arc<RecordingSink>,
        requests: Arc<Requests>,
    }

    fn setup() -> Setup {
        with(None)
    }

    fn with(keyboard: Option<Keyboard>) -> Setup {
        let irq = Arc::new(RecordingSink::default());
        let requests = Arc::new(Requests::default());
        let mut ports = PortBus::new();
        let line = Line::new(irq.clone(), 1);
        let controller = KeyboardController::new(line, requests.clone(), keyboard);
        controller.attach(&mut ports).unwrap();
        Setup {
            controller,
            ports,
            irq,
            requests,
        }
    }

    impl Setup {
        fn out(&self, port: u16, value: u8) {
            self.ports.write(port, Width::Byte, u32::from(value));
        }

        fn inb(&self, port: u16) -> u8 {
            self.ports.read(port, Width::Byte) as u8
        }

        fn command(&self, command: u8) -> u8 {
            self.out(0x64, command);
            assert_eq!(self.inb(0x64) & 1, 1);
            self.inb(0x60)
        }
    }

    /// Linux' drivers/input/serio/i8042.c: flush, controller check, self-test, port tests.
    #[test]
    fn linux_probe() {
        let s = setup();
        assert_eq!(s.inb(0x64) & 1, 0, "nothing to flush");
        let configuration = s.command(0x20);
        s.out(0x64, 0x60);
        s.out(0x60, configuration & !1);
        assert_eq!(s.command(0x20), configuration & !1);
        assert_eq!(s.command(0xaa), 0x55);
        assert_eq!(s.command(0xab), 0x00);
        // No mouse port: its loopback gives nothing, its clock cannot be turned on.
        s.out(0x64, 0xd3);
        s.out(0x60, 0x5a);
        assert_eq!(s.inb(0x64) & 0x41, 0x41, "taken for a keyboard byte");
        assert_eq!(s.inb(0x60), 0xfe);
        s.out(0x64, 0xa8);
        assert_eq!(s.command(0x20) & 0x20, 0x20);
        // A keyboard reset command meets nobody.
        s.out(0x60, 0xff);
        assert_eq!(s.inb(0x64) & 0x41, 0x41);
        assert_eq!(s.inb(0x60), 0xfe);
        assert_eq!(s.inb(0x64) & 0x41, 0);
    }

    #[test]
    fn interrupt_follows_the_buffer() {
        let s = setup();
        s.out(0x64, 0x60);
        s.out(0x60, 0x45);
        s.out(0x64, 0xd2);
        s.out(0x60, 0x1c);
        assert!(s.irq.is_high(1));
        assert_eq!(s.inb(0x60), 0x1c);
        assert!(!s.irq.is_high(1));
    }

    /// SeaBIOS' src/hw/ps2port.c: self-test, reset, set 2, translation on, interrupt on; then a key.
    #[test]
    fn a_keyboard_is_set_up_and_typed_on() {
        let s = with(Some(Keyboard::new()));
        assert_eq!(s.command(0xaa), 0x55);
        assert_eq!(s.controller.type_bytes(b"x"), 1);
        assert_eq!(s.inb(0x64) & 1, 0, "the self-test turned it off");
        s.out(0x60, 0xff);
        assert_eq!([s.inb(0x60), s.inb(0x60)], [0xfa, 0xaa]);
        assert_eq!(s.inb(0x64) & 1, 0, "the reset forgot the key");
        s.out(0x64, 0x60);
        s.out(0x60, 0x61);
        assert_eq!(s.controller.type_bytes(b"a"), 1);
        assert!(s.irq.is_high(1));
        s.irq.take();
        assert_eq!(s.inb(0x60), 0x1e);
        assert_eq!(
            s.irq.take(),
            [(1, false), (1, true)],
            "an edge for each byte"
        );
        assert_eq!(s.inb(0x60), 0x9e);
        assert!(!s.irq.is_high(1));
        s.out(0x64, 0x60);
        s.out(0x60, 0x21);
        s.controller.type_bytes(b"a");
        let raw = [(); 3].map(|()| s.inb(0x60));
        assert_eq!(raw, [0x1c, 0xf0, 0x1c], "without translation");
        let nobody = setup();
        assert_eq!(nobody.controller.type_bytes(b"a"), 0);
    }

    #[test]
    fn resets() {
        let s = setup();
        s.out(0x64, 0xff);
        s.out(0x64, 0xf1);
        assert_eq!(s.requests.take(), []);
        s.out(0x64, 0xfe);
        s.out(0x64, 0xd1);
        s.out(0x60, 0xfe);
        let keyboard = SystemRequest::Reset(ResetSource::KeyboardController);
        assert_eq!(s.requests.take(), [keyboard, keyboard]);
        s.out(0x92, 0x03);
        assert_eq!(
            s.requests.take(),
            [SystemRequest::Reset(ResetSource::SystemControlPortA)]
        );
    }

    #[test]
    fn a20_is_one_bit_with_three_doors() {
        let s = setup();
        assert_eq!(s.inb(0x92), 2);
        s.out(0x92, 0);
        assert_eq!(s.command(0xd0), 1);
        s.out(0x64, 0xd1);
        s.out(0x60, 0xdf);
        assert_eq!(s.inb(0x92), 2);
        assert_eq!(s.requests.take(), []);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in proptest::collection::vec((any::<bool>(), 0usize..3, any::<u8>()), 0..200),
        ) {
            let s = setup();
            for (write, port, value) in steps {
                let port = [0x60, 0x64, 0x92][port];
                if write {
                    s.out(port, value);
                } else {
                    s.inb(port);
                }
            }
        }
    }
}
