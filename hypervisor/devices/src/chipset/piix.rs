//! PIIX3 as ISA bridge, and the power management function of PIIX4.
//!
//! The ISA bridge routes the four PCI interrupt lines to ISA interrupts (82371SB data sheet,
//! section 2.3.5, PIRQRC), for systems without an I/O APIC. The power management function says at which
//! ports the ACPI block is (82371AB data sheet, section 7.2): the block always answers where the ACPI tables
//! say it is, and also at the other base that firmware is known to choose, while chosen.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use mem::Width;
use spin::Mutex;

use super::{SUBSYSTEM, SUBSYSTEM_VENDOR};
use crate::bus::{IoError, PortDevice};
use crate::line::{ISA_IRQS, InterruptSink};
use crate::pci::{ConfigSpace, FunctionId, PciFunction};
use crate::platform::{PCI_GSI_BASE, PCI_GSIS, PIRQ_IRQS, SCI_IRQ};
use crate::pm::PowerManagement;

/// Header type: the device has several functions.
const HEADER_TYPE: u16 = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;
const INTERRUPT_LINE: u16 = 0x3c;

/// PIRQ route control registers A to D.
const PIRQ: u16 = 0x60;
const PIRQS: usize = 4;
/// A PIRQ register: routed nowhere.
const PIRQ_OFF: u8 = 0x80;
/// A PIRQ register: the ISA interrupt.
const PIRQ_IRQ: u8 = 0x0f;

/// Sends PCI interrupts also where the ISA bridge routes them.
///
/// The inputs from [`PCI_GSI_BASE`] on reach the I/O APIC as they are; four PIRQ lines that the inputs share reach
/// the ISA interrupt of their route register.
pub struct PciInterruptRouter {
    below: Arc<dyn InterruptSink>,
    routes: Mutex<Routes>,
}

struct Routes {
    registers: [u8; PIRQS],
    /// PCI inputs that are high, a bit each from [`PCI_GSI_BASE`].
    high: u32,
    /// ISA interrupts that this router drives high, a bit each.
    driven: u16,
}

impl Routes {
    /// The ISA interrupts that the PIRQ lines drive now.
    fn wanted(&self) -> u16 {
        (0..PCI_GSIS)
            .filter(|input| self.high & 1 << input != 0)
            // As firmware counts: device 1's INTA# is PIRQA, device 2's PIRQB.
            .map(|input| self.registers[(input as usize + PIRQS - 1) % PIRQS])
            .filter(|register| register & PIRQ_OFF == 0)
            .fold(0, |irqs, register| irqs | 1 << (register & PIRQ_IRQ))
    }
}

impl PciInterruptRouter {
    /// A router in front of the machine's other wiring.
    pub fn new(below: Arc<dyn InterruptSink>) -> Arc<Self> {
        Arc::new(PciInterruptRouter {
            below,
            routes: Mutex::new(Routes {
                registers: [PIRQ_OFF; PIRQS],
                high: 0,
                driven: 0,
            }),
        })
    }

    /// As `new`, but routed as firmware does it, for a machine without an ISA bridge to set up.
    pub fn fixed(below: Arc<dyn InterruptSink>) -> Arc<Self> {
        let router = Self::new(below);
        router.set_registers(PIRQ_IRQS);
        router
    }

    fn set_registers(&self, registers: [u8; PIRQS]) {
        let mut routes = self.routes.lock();
        routes.registers = registers;
        self.drive(&mut routes);
    }

    /// Brings the ISA lines to what they should be.
    fn drive(&self, routes: &mut Routes) {
        let wanted = routes.wanted();
        let changed = wanted ^ routes.driven;
        routes.driven = wanted;
        for irq in (0..ISA_IRQS).filter(|irq| changed & 1 << irq != 0) {
            self.below.set_level(irq, wanted & 1 << irq != 0);
        }
    }
}

impl InterruptSink for PciInterruptRouter {
    fn set_level(&self, input: u32, high: bool) {
        self.below.set_level(input, high);
        let Some(pci) = input.checked_sub(PCI_GSI_BASE).filter(|&n| n < PCI_GSIS) else {
            return;
        };
        let mut routes = self.routes.lock();
        if high {
            routes.high |= 1 << pci;
        } else {
            routes.high &= !(1 << pci);
        }
        self.drive(&mut routes);
    }
}

/// The ISA bridge, 00:01.0.
pub struct IsaBridge {
    config: Mutex<ConfigSpace>,
    router: Arc<PciInterruptRouter>,
}

impl IsaBridge {
    /// The bridge after reset: PCI interrupts are routed nowhere.
    pub fn new(router: Arc<PciInterruptRouter>) -> Arc<Self> {
        let mut config = ConfigSpace::new(&FunctionId {
            vendor: 0x8086,
            device: 0x7000,
            class: 0x06,
            subclass: 0x01,
            interface: 0,
            revision: 0,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.set_registers(HEADER_TYPE, &[MULTI_FUNCTION], &[0]);
        config.set_registers(PIRQ, &[PIRQ_OFF; PIRQS], &[PIRQ_OFF | PIRQ_IRQ; PIRQS]);
        Arc::new(IsaBridge {
            config: Mutex::new(config),
            router,
        })
    }
}

impl PciFunction for IsaBridge {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        self.config.lock().read(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        // Held over the change, so that of two writes the later one has the last word.
        let mut config = self.config.lock();
        config.write(offset, width, value);
        let registers = core::array::from_fn(|n| config.read(PIRQ + n as u16, Width::Byte) as u8);
        self.router.set_registers(registers);
    }
}

/// Base of the ACPI block: bits 15:6, bit 0 reads as one.
const PM_BASE: u16 = 0x40;
const PM_BASE_BITS: u32 = 0xffc0;
/// Bit 0: the base decodes.
const PM_MISC: u16 = 0x80;
/// The byte of DEVACTB whose bit 1 lets writes to port 0xB2 raise SMIs.
const SMI_ENABLE: u16 = 0x5b;
const SMI_ENABLED: u8 = 1 << 1;

/// The base beside that of the ACPI tables at which the block can be: OVMF's choice.
pub const MOVED_PM_BASE: u16 = 0xb000;

/// The power management function, 00:01.3.
pub struct PowerFunction {
    config: Mutex<ConfigSpace>,
    /// The base that decodes, 0 if none.
    base: AtomicU32,
}

impl PowerFunction {
    /// The function after reset: it decodes nothing.
    pub fn new() -> Arc<Self> {
        let mut config = ConfigSpace::new(&FunctionId {
            vendor: 0x8086,
            device: 0x7113,
            class: 0x06,
            subclass: 0x80,
            interface: 0,
            revision: 3,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.set_registers(PM_BASE, &[1, 0, 0, 0], &[0xc0, 0xff, 0, 0]);
        config.set_registers(PM_MISC, &[0], &[1]);
        // Firmware takes this for a sign that somebody has set up system management mode before.
        config.set_registers(SMI_ENABLE, &[SMI_ENABLED], &[0]);
        config.set_registers(INTERRUPT_LINE, &[SCI_IRQ], &[0]);
        config.set_interrupt_pin(1);
        Arc::new(PowerFunction {
            config: Mutex::new(config),
            base: AtomicU32::new(0),
        })
    }
}

impl PciFunction for PowerFunction {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        self.config.lock().read(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        let mut config = self.config.lock();
        config.write(offset, width, value);
        let enabled = config.read(PM_MISC, Width::Byte) & 1 != 0;
        let base = config.read(PM_BASE, Width::Dword) & PM_BASE_BITS;
        self.base
            .store(if enabled { base } else { 0 }, Ordering::Relaxed);
    }
}

/// The ACPI block at [`MOVED_PM_BASE`]: it answers while the block is there.
pub struct PmAlias {
    function: Arc<PowerFunction>,
    block: Arc<PowerManagement>,
}

impl PmAlias {
    /// The block's second place.
    pub fn new(function: Arc<PowerFunction>, block: Arc<PowerManagement>) -> Arc<Self> {
        Arc::new(PmAlias { function, block })
    }

    fn chosen(&self) -> Result<&PowerManagement, IoError> {
        let chosen = self.function.base.load(Ordering::Relaxed) == u32::from(MOVED_PM_BASE);
        chosen
            .then_some(&*self.block)
            .ok_or(IoError::InvalidRegister)
    }
}

impl PortDevice for PmAlias {
    fn read(&self, offset: u16, width: Width) -> Result<u32, IoError> {
        self.chosen()?.read(offset, width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) -> Result<(), IoError> {
        self.chosen()?.write(offset, width, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line::Line;
    use crate::platform::{pci_gsi, pci_irq};
    use crate::testing::{FakeClock, RecordingSink, Requests};
    use proptest::prelude::*;

    fn bridge() -> (Arc<RecordingSink>, Arc<PciInterruptRouter>, Arc<IsaBridge>) {
        let sink = Arc::new(RecordingSink::default());
        let router = PciInterruptRouter::new(sink.clone());
        let bridge = IsaBridge::new(router.clone());
        (sink, router, bridge)
    }

    #[test]
    fn fixed_routes_are_where_the_platform_says() {
        let sink = Arc::new(RecordingSink::default());
        let router = PciInterruptRouter::fixed(sink.clone());
        for device in 0..8 {
            let gsi = pci_gsi(device, 0);
            router.set_level(gsi, true);
            let irq = u32::from(pci_irq(device, 0));
            assert_eq!(sink.take(), [(gsi, true), (irq, true)]);
            router.set_level(gsi, false);
            assert_eq!(sink.take(), [(gsi, false), (irq, false)]);
        }
    }

    #[test]
    fn pci_interrupts_follow_their_routes() {
        let (sink, router, bridge) = bridge();
        assert_eq!(bridge.config_read(0, Width::Dword), 0x7000_8086);
        assert_eq!(
            bridge.config_read(0x0e, Width::Byte),
            0x80,
            "more functions"
        );
        assert_eq!(bridge.config_read(0x60, Width::Dword), 0x8080_8080);
        // Device 3's INTA#: GSI 19, PIRQC.
        router.set_level(19, true);
        assert_eq!(sink.take(), [(19, true)], "not routed");
        bridge.config_write(0x60, Width::Dword, 0x0b0b_0a0a);
        assert_eq!(sink.take(), [(11, true)]);
        router.set_level(20, true);
        assert_eq!(sink.take(), [(20, true)], "PIRQD shares interrupt 11");
        router.set_level(19, false);
        assert_eq!(sink.take(), [(19, false)]);
        router.set_level(17, true);
        assert_eq!(sink.take(), [(17, true), (10, true)]);
        bridge.config_write(0x63, Width::Byte, 0x80);
        assert_eq!(sink.take(), [(11, false)]);
        router.set_level(4, true);
        assert_eq!(sink.take(), [(4, true)], "others pass");
    }

    #[test]
    fn the_acpi_block_moves() {
        let clock = FakeClock::new(crate::pm::PM_TIMER_HZ);
        let line = Line::disconnected();
        let pm = PowerManagement::new(clock.clone(), line, Arc::new(Requests::default()));
        let function = PowerFunction::new();
        let alias = PmAlias::new(function.clone(), pm);
        clock.set(1234);
        assert!(alias.read(8, Width::Dword).is_err());
        function.config_write(0x40, Width::Dword, 0xb001);
        assert!(alias.read(8, Width::Dword).is_err(), "not enabled");
        function.config_write(0x80, Width::Byte, 1);
        assert_eq!(alias.read(8, Width::Dword), Ok(1234));
        function.config_write(0x40, Width::Word, 0xe400);
        assert_eq!(function.config_read(0x40, Width::Dword), 0xe401);
        assert!(alias.read(8, Width::Dword).is_err());
        assert_eq!(
            function.config_read(0x5b, Width::Byte),
            2,
            "no SMM to set up"
        );
        function.config_write(0x58, Width::Dword, 0);
        assert_eq!(function.config_read(0x5b, Width::Byte), 2);
    }

    proptest! {
        #[test]
        fn isa_lines_are_what_the_registers_say(
            steps in proptest::collection::vec((0u32..40, any::<bool>(), 0u16..0x100, any::<u32>()), 0..100),
        ) {
            let (sink, router, bridge) = bridge();
            for (input, high, offset, value) in steps {
                if offset.is_multiple_of(2) {
                    bridge.config_write(offset & !3, Width::Dword, value);
                } else {
                    // Only PCI inputs: an ISA line of its own would mix with the router's.
                    router.set_level(PCI_GSI_BASE + input, high);
                }
                let wanted = router.routes.lock().wanted();
                for irq in 0..16 {
                    prop_assert_eq!(sink.is_high(irq), wanted & 1 << irq != 0);
                }
            }
        }
    }
}
