//! Where things are in the guest's PC: one place for addresses, ports and lines.
//!
//! RAM below 4 GiB ends at 3 GiB (`mem::guest::LOW_RAM_END`); devices have the rest.

use core::ops::Range;

/// PCI configuration space (ECAM) of bus 0.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Window for 32-bit memory BARs.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// Window for I/O BARs.
pub const PCI_IO: Range<u32> = 0xc000..0x1_0000;
/// Base port of the ACPI PM block.
pub const PM_BASE: u16 = 0x600;
/// ISA IRQ and GSI of the ACPI system control interrupt.
pub const SCI_IRQ: u8 = 9;
/// ISA IRQ of the keyboard controller.
pub const KEYBOARD_IRQ: u8 = 1;
/// ISA IRQ of the real-time clock.
pub const RTC_IRQ: u8 = 8;
/// Port that firmware writes progress codes to, and drivers write for a delay.
pub const POST_PORT: u16 = 0x80;
/// First GSI of the PCI interrupt lines; there are [`PCI_GSIS`].
pub const PCI_GSI_BASE: u32 = 16;
/// Number of GSIs that the PCI interrupt lines share.
pub const PCI_GSIS: u32 = 8;

/// PCI device number of the watchdog.
pub const WATCHDOG_SLOT: u8 = 3;
/// First PCI device number of the disks; those before are the chip set's, and the watchdog's.
pub const FIRST_DISK_SLOT: u8 = 4;
/// ISA IRQs that the chip set's four PCI interrupt lines reach by the 8259A: as SeaBIOS and OVMF route them, and as they are
/// routed where there is no firmware.
pub const PIRQ_IRQS: [u8; 4] = [10, 10, 11, 11];

/// A serial port's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// Base port.
    pub port: u16,
    /// ISA IRQ.
    pub irq: u8,
}

/// COM1 to COM4.
pub const SERIAL_PORTS: [SerialPort; 4] = [
    SerialPort {
        port: 0x3f8,
        irq: 4,
    },
    SerialPort {
        port: 0x2f8,
        irq: 3,
    },
    SerialPort {
        port: 0x3e8,
        irq: 4,
    },
    SerialPort {
        port: 0x2e8,
        irq: 3,
    },
];

/// The GSI of interrupt pin `pin` (0 is INTA#) of PCI device `device` on bus 0.
///
/// The usual swizzle, so that devices with one pin each spread over the lines.
pub const fn pci_gsi(device: u8, pin: u8) -> u32 {
    PCI_GSI_BASE + (device as u32 + pin as u32) % PCI_GSIS
}

/// The ISA IRQ of interrupt pin `pin` (0 is INTA#) of PCI device `device` on bus 0: [`PIRQ_IRQS`], in which device 1 comes
/// first.
pub const fn pci_irq(device: u8, pin: u8) -> u8 {
    PIRQ_IRQS[(device as usize + pin as usize + 3) % PIRQ_IRQS.len()]
}
