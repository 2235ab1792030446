//! The 8259A pair: sixteen ISA interrupt inputs, two chips, one INTR output.
//!
//! After Intel's 8259A data sheet (ICW1-4, OCW1-3) with the edge/level control registers of
//! PC chip sets (ports 0x4D0/0x4D1). An edge is latched until it is acknowledged, also when
//! the line falls earlier, so a device may pulse its line.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use bitfield_struct::bitfield;
use mem::Width;
use spin::Mutex;

use crate::bus::{IoError, Overlap, PortBus, PortDevice, byte_only};
use crate::line::{InterruptSink, Line};

/// Master's input that the slave's output is wired to.
const CASCADE: u8 = 2;
/// Input number delivered when a request vanished before it was acknowledged.
const SPURIOUS: u8 = 7;

/// First initialization command word.
#[bitfield(u8)]
struct Icw1 {
    needs_icw4: bool,
    single: bool,
    #[bits(6)]
    __: u8,
}

/// Fourth initialization command word.
#[bitfield(u8)]
struct Icw4 {
    x86_mode: bool,
    auto_eoi: bool,
    #[bits(2)]
    __: u8,
    special_fully_nested: bool,
    #[bits(3)]
    __: u8,
}

/// Second operation command word.
#[bitfield(u8)]
struct Ocw2 {
    #[bits(3)]
    level: u8,
    #[bits(2)]
    __: u8,
    eoi: bool,
    specific: bool,
    rotate: bool,
}

/// Third operation command word.
#[bitfield(u8)]
struct Ocw3 {
    read_isr: bool,
    read_register: bool,
    poll: bool,
    #[bits(2)]
    __: u8,
    special_mask: bool,
    change_special_mask: bool,
    __: bool,
}

/// Which initialization word the next write to the data port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// Initialized: OCW1, the mask.
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Copy)]
struct Chip {
    /// Inputs that edge/level control may make level-triggered.
    level_capable: u8,
    is_master: bool,

    levels: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    elcr: u8,
    vector_base: u8,
    expect: Expect,
    icw1: Icw1,
    icw4: Icw4,
    /// The input with the highest priority.
    top: u8,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    read_isr: bool,
    poll: bool,
}

impl Chip {
    fn new(is_master: bool) -> Self {
        Chip {
            // The timer, keyboard, cascade, RTC and FPU inputs stay edge-triggered.
            level_capable: if is_master { 0xf8 } else { 0xde },
            is_master,
            levels: 0,
            irr: 0,
            isr: 0,
            imr: 0xff,
            elcr: 0,
            vector_base: 0,
            expect: Expect::Mask,
            icw1: Icw1::new(),
            icw4: Icw4::new(),
            top: 0,
            rotate_on_auto_eoi: false,
            special_mask: false,
            read_isr: false,
            poll: false,
        }
    }

    fn set_level(&mut self, input: u8, high: bool) {
        let bit = 1 << (input & 7);
        let was = self.levels & bit != 0;
        if high {
            self.levels |= bit;
        } else {
            self.levels &= !bit;
        }
        if self.elcr & bit != 0 {
            self.irr = (self.irr & !bit) | (self.levels & bit);
        } else if high && !was {
            self.irr |= bit;
        }
    }

    /// Distance of the highest-priority set bit from the top priority, 0 to 7.
    fn priority(&self, set: u8) -> Option<u8> {
        (set != 0).then(|| set.rotate_right(u32::from(self.top)).trailing_zeros() as u8)
    }

    /// The input to interrupt for, if any (data sheet, "Interrupt sequence" and "Fully nested mode").
    fn request(&self) -> Option<u8> {
        let wanted = self.priority(self.irr & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.is_master && self.icw4.special_fully_nested() {
            serving &= !(1 << CASCADE);
        }
        match self.priority(serving) {
            Some(current) if current <= wanted => None,
            _ => Some((wanted + self.top) & 7),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << (input & 7);
        if self.icw4.auto_eoi() {
            if self.rotate_on_auto_eoi {
                self.top = (input + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.icw1 = Icw1::from_bits(value);
            self.icw4 = Icw4::new();
            self.expect = Expect::Icw2;
            self.irr &= self.elcr;
            self.isr = 0;
            self.imr = 0;
            self.top = 0;
            self.rotate_on_auto_eoi = false;
            self.special_mask = false;
            self.read_isr = false;
            self.poll = false;
        } else if value & 8 != 0 {
            let ocw3 = Ocw3::from_bits(value);
            self.poll = ocw3.poll();
            if ocw3.read_register() {
                self.read_isr = ocw3.read_isr();
            }
            if ocw3.change_special_mask() {
                self.special_mask = ocw3.special_mask();
            }
        } else {
            let ocw2 = Ocw2::from_bits(value);
            let input = if ocw2.specific() {
                Some(ocw2.level())
            } else {
                // The highest in service; none in service, nothing to end.
                self.priority(self.isr).map(|p| (p + self.top) & 7)
            };
            match (ocw2.rotate(), ocw2.specific(), ocw2.eoi()) {
                (rotate, false, false) => self.rotate_on_auto_eoi = rotate,
                (false, true, false) => {}
                (true, true, false) => self.top = (ocw2.level() + 1) & 7,
                (rotate, _, true) => {
                    if let Some(input) = input {
                        self.isr &= !(1 << input);
                        if rotate {
                            self.top = (input + 1) & 7;
                        }
                    }
                }
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expect = match self.expect {
            Expect::Mask => {
                self.imr = value;
                Expect::Mask
            }
            Expect::Icw2 => {
                self.vector_base = value & 0xf8;
                match (self.icw1.single(), self.icw1.needs_icw4()) {
                    (false, _) => Expect::Icw3,
                    (true, true) => Expect::Icw4,
                    (true, false) => Expect::Mask,
                }
            }
            // The wiring is fixed; what the guest believes of it does not matter.
            Expect::Icw3 if self.icw1.needs_icw4() => Expect::Icw4,
            Expect::Icw3 => Expect::Mask,
            Expect::Icw4 => {
                self.icw4 = Icw4::from_bits(value);
                Expect::Mask
            }
        };
    }

    /// A read in poll mode acknowledges (data sheet, "Poll command").
    fn read_poll(&mut self) -> u8 {
        self.poll = false;
        match self.request() {
            Some(input) => {
                self.acknowledge(input);
                0x80 | input
            }
            None => 0,
        }
    }

    fn read(&mut self, data: bool) -> u8 {
        if self.poll {
            self.read_poll()
        } else if data {
            self.imr
        } else if self.read_isr {
            self.isr
        } else {
            self.irr
        }
    }
}

struct Pair {
    master: Chip,
    slave: Chip,
}

/// The two chips and their INTR output.
pub struct Pic {
    pair: Mutex<Pair>,
    output: AtomicBool,
    intr: Line,
}

impl Pic {
    /// Uninitialized chips, all inputs masked. `intr` is the output to the processor.
    pub fn new(intr: Line) -> Arc<Self> {
        Arc::new(Pic {
            pair: Mutex::new(Pair {
                master: Chip::new(true),
                slave: Chip::new(false),
            }),
            output: AtomicBool::new(false),
            intr,
        })
    }

    /// Puts the chips at their ports of a PC: 0x20, 0xA0 and 0x4D0, two each.
    pub fn attach(self: &Arc<Self>, ports: &mut PortBus) -> Result<(), Overlap> {
        for (name, base, block) in [
            ("pic-master", 0x20, Block::Master),
            ("pic-slave", 0xa0, Block::Slave),
            ("pic-elcr", 0x4d0, Block::EdgeLevel),
        ] {
            let pic = self.clone();
            ports.insert(name, base, 2, Arc::new(PicPorts { pic, block }))?;
        }
        Ok(())
    }

    /// Whether INTR is high. One load; poll it freely.
    pub fn pending(&self) -> bool {
        self.output.load(Ordering::Acquire)
    }

    /// The processor's interrupt acknowledge: the vector to take. Without a request it is that of
    /// the spurious input 7 (or 15).
    pub fn acknowledge(&self) -> u8 {
        let mut pair = self.pair.lock();
        let Pair { master, slave } = &mut *pair;
        let vector = match master.request() {
            None => master.vector_base | SPURIOUS,
            Some(input) => {
                master.acknowledge(input);
                if input != CASCADE {
                    master.vector_base | input
                } else if let Some(input) = slave.request() {
                    slave.acknowledge(input);
                    slave.vector_base | input
                } else {
                    slave.vector_base | SPURIOUS
                }
            }
        };
        // INTR falls with the acknowledge, so that what is still pending makes an edge of its own.
        if self.output.swap(false, Ordering::AcqRel) {
            self.intr.lower();
        }
        self.update(&mut pair);
        vector
    }

    /// Recomputes the cascade and INTR.
    fn update(&self, pair: &mut Pair) {
        let slave = pair.slave.request().is_some();
        let cascade = 1 << CASCADE;
        if slave {
            pair.master.irr |= cascade;
        } else {
            pair.master.irr &= !cascade;
        }
        let high = pair.master.request().is_some();
        if self.output.swap(high, Ordering::AcqRel) != high {
            self.intr.set(high);
        }
    }
}

impl InterruptSink for Pic {
    fn set_level(&self, input: u32, high: bool) {
        let mut pair = self.pair.lock();
        match input {
            0..=7 if input != u32::from(CASCADE) => pair.master.set_level(input as u8, high),
            8..=15 => pair.slave.set_level(input as u8 - 8, high),
            _ => return,
        }
        self.update(&mut pair);
    }
}

#[derive(Clone, Copy)]
enum Block {
    Master,
    Slave,
    EdgeLevel,
}

/// One group of ports.
struct PicPorts {
    pic: Arc<Pic>,
    block: Block,
}

impl PortDevice for PicPorts {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        byte_only(width)?;
        let mut pair = self.pic.pair.lock();
        let chip = match (self.block, offset) {
            (Block::Master, 0 | 1) => &mut pair.master,
            (Block::Slave, 0 | 1) => &mut pair.slave,
            (Block::EdgeLevel, 0) => return Ok(u32::from(pair.master.elcr)),
            (Block::EdgeLevel, 1) => return Ok(u32::from(pair.slave.elcr)),
            _ => return Err(IoError::InvalidRegister),
        };
        // Only a poll changes anything.
        let polls = chip.poll;
        let value = chip.read(offset == 1);
        if polls {
            self.pic.update(&mut pair);
        }
        Ok(u32::from(value))
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        byte_only(width)?;
        let value = value as u8;
        let mut pair = self.pic.pair.lock();
        let Pair { master, slave } = &mut *pair;
        match (self.block, offset) {
            (Block::Master, 0) => master.write_command(value),
            (Block::Master, 1) => master.write_data(value),
            (Block::Slave, 0) => slave.write_command(value),
            (Block::Slave, 1) => slave.write_data(value),
            (Block::EdgeLevel, 0) => master.elcr = value & master.level_capable,
            (Block::EdgeLevel, 1) => slave.elcr = value & slave.level_capable,
            _ => return Err(IoError::InvalidRegister),
        }
        self.pic.update(&mut pair);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingSink;
    use proptest::prelude::*;

    struct Setup {
        pic: Arc<Pic>,
        ports: PortBus,
        intr: Arc<RecordingSink>,
    }

    fn setup() -> Setup {
        let intr = Arc::new(RecordingSink::default());
        let pic = Pic::new(Line::new(intr.clone(), 0));
        let mut ports = PortBus::new();
        pic.attach(&mut ports).unwrap();
        Setup { pic, ports, intr }
    }

    impl Setup {
        fn out(&self, port: u16, value: u8) {
            self.ports.write(port, Width::Byte, u32::from(value));
        }

        fn inb(&self, port: u16) -> u8 {
            self.ports.read(port, Width::Byte) as u8
        }

        /// As Linux's init_8259A, then all inputs open.
        fn init(&self) {
            self.init_with(0x01);
        }

        fn init_with(&self, icw4: u8) {
            for (command, data, base, icw3) in [(0x20, 0x21, 0x30, 4), (0xa0, 0xa1, 0x38, 2)] {
                self.out(data, 0xff);
                self.out(command, 0x11);
                self.out(data, base);
                self.out(data, icw3);
                self.out(data, icw4);
                self.out(data, 0);
            }
        }

        fn pulse(&self, input: u32) {
            self.pic.set_level(input, true);
            self.pic.set_level(input, false);
        }
    }

    #[test]
    fn linux_probe_reads_back_the_mask() {
        let s = setup();
        s.out(0xa1, 0xff);
        s.out(0x21, 0xfb);
        assert_eq!(s.inb(0x21), 0xfb);
    }

    #[test]
    fn priorities_nest_and_eoi_releases() {
        let s = setup();
        s.init();
        s.pulse(4);
        assert!(s.pic.pending() && s.intr.is_high(0));
        assert_eq!(s.pic.acknowledge(), 0x34);
        assert!(!s.pic.pending());
        s.pulse(5);
        assert!(!s.pic.pending(), "lower priority waits");
        s.pulse(1);
        assert_eq!(s.pic.acknowledge(), 0x31);
        s.out(0x20, 0x0b);
        assert_eq!(s.inb(0x20), 0b0001_0010);
        s.out(0x20, 0x0a);
        assert_eq!(s.inb(0x20), 0b0010_0000);
        s.out(0x20, 0x20);
        assert!(!s.pic.pending(), "4 is still in service");
        s.out(0x20, 0x64);
        assert_eq!(s.pic.acknowledge(), 0x35);
    }

    #[test]
    fn slave_requests_arrive_through_the_cascade() {
        let s = setup();
        s.init();
        s.pulse(8);
        assert_eq!(s.pic.acknowledge(), 0x38);
        s.pulse(12);
        assert!(!s.pic.pending());
        // Linux ends the slave first, then the cascade input.
        s.out(0xa0, 0x60);
        s.out(0x20, 0x62);
        assert!(s.pic.pending());
        assert_eq!(s.pic.acknowledge(), 0x3c);
        s.out(0xa0, 0x20);
        s.out(0x20, 0x20);
        s.out(0xa0, 0x0b);
        assert_eq!(s.inb(0xa0), 0);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_nest() {
        let s = setup();
        s.init_with(0x11);
        s.pulse(12);
        assert_eq!(s.pic.acknowledge(), 0x3c);
        s.pulse(8);
        assert!(s.pic.pending());
        assert_eq!(s.pic.acknowledge(), 0x38);
    }

    #[test]
    fn level_inputs_ask_again_until_released() {
        let s = setup();
        s.init();
        s.out(0x4d1, 0xff);
        assert_eq!(s.inb(0x4d1), 0xde, "RTC and FPU stay edge-triggered");
        s.out(0x4d0, 0xff);
        assert_eq!(s.inb(0x4d0), 0xf8);
        s.pic.set_level(9, true);
        assert_eq!(s.pic.acknowledge(), 0x39);
        s.out(0xa0, 0x20);
        s.out(0x20, 0x20);
        assert_eq!(s.pic.acknowledge(), 0x39);
        s.pic.set_level(9, false);
        s.out(0xa0, 0x20);
        s.out(0x20, 0x20);
        assert!(!s.pic.pending());
    }

    #[test]
    fn vanished_requests_are_spurious() {
        let s = setup();
        s.init();
        s.out(0x4d0, 0x20);
        s.pic.set_level(5, true);
        s.pic.set_level(5, false);
        assert_eq!(s.pic.acknowledge(), 0x37);
        s.out(0x20, 0x0b);
        assert_eq!(s.inb(0x20), 0, "nothing in service");
    }

    #[test]
    fn masked_edges_wait() {
        let s = setup();
        s.init();
        s.out(0x21, 0xff);
        s.pulse(3);
        assert!(!s.pic.pending());
        s.out(0x21, 0xf7);
        assert_eq!(s.pic.acknowledge(), 0x33);
    }

    #[test]
    fn an_edge_needs_a_fall_first() {
        let s = setup();
        s.init();
        s.pic.set_level(3, true);
        assert_eq!(s.pic.acknowledge(), 0x33);
        s.out(0x20, 0x20);
        s.pic.set_level(3, true);
        assert!(!s.pic.pending());
        s.pic.set_level(3, false);
        s.pic.set_level(3, true);
        assert!(s.pic.pending());
    }

    #[test]
    fn auto_eoi_and_rotation() {
        let s = setup();
        s.init_with(0x03);
        s.out(0x20, 0x80); // rotate on automatic EOI
        s.pulse(3);
        assert_eq!(s.pic.acknowledge(), 0x33);
        s.pulse(3);
        s.pulse(4);
        assert_eq!(s.pic.acknowledge(), 0x34, "3 is now the lowest");
        assert_eq!(s.pic.acknowledge(), 0x33);
        s.out(0x20, 0xc6); // 6 lowest, so 7 is highest
        s.pulse(0);
        s.pulse(7);
        assert_eq!(s.pic.acknowledge(), 0x37);
        assert_eq!(s.pic.acknowledge(), 0x30);
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_in() {
        let s = setup();
        s.init();
        s.pulse(3);
        assert_eq!(s.pic.acknowledge(), 0x33);
        s.out(0x20, 0x68);
        s.out(0x21, 0x08);
        s.pulse(6);
        assert_eq!(s.pic.acknowledge(), 0x36);
        s.out(0x20, 0x48);
    }

    #[test]
    fn poll_mode_acknowledges_on_read() {
        let s = setup();
        s.init();
        s.out(0x20, 0x0c);
        assert_eq!(s.inb(0x20), 0);
        s.pulse(6);
        s.out(0x20, 0x0c);
        assert_eq!(s.inb(0x20), 0x86);
        assert!(!s.pic.pending());
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in proptest::collection::vec((0u8..4, any::<u8>(), any::<u8>()), 0..300),
        ) {
            let s = setup();
            for (kind, a, b) in steps {
                let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][usize::from(a) % 6];
                match kind {
                    0 => s.out(port, b),
                    1 => { s.inb(port); }
                    2 => s.pic.set_level(u32::from(a) % 18, b & 1 != 0),
                    _ => { s.pic.acknowledge(); }
                }
                prop_assert_eq!(s.pic.pending(), s.intr.is_high(0));
            }
        }
    }
}
