//! Power-off and reset, by every way a PC knows, in the order of their manners.
//!
//! Each function returns only when nothing it tried worked.

use x86_64::{
    VirtAddr,
    instructions::{port::Port, tables::lidt},
    structures::DescriptorTablePointer,
};

use crate::firmware::{PowerInfo, RegisterAddress};

/// SCI_EN in PM1 control: the machine is in ACPI mode (ACPI 6.5, table 4.13).
const SCI_EN: u16 = 1;
/// SLP_EN in PM1 control.
const SLP_EN: u16 = 1 << 13;
/// SLP_TYP and SLP_EN in PM1 control.
const SLP_FIELDS: u16 = 0xf << 10;
/// SLP_EN in the sleep control register of hardware-reduced machines; SLP_TYP begins at bit 2 (ACPI 6.5, table 4.18).
const SLEEP_CONTROL_EN: u8 = 1 << 5;

/// Port reads, of about a microsecond each, to wait before a way counts as failed.
const PATIENCE: u32 = 300_000;

/// A register, mapped where it needs to be.
#[derive(Clone, Copy, Debug)]
enum Register {
    Port(u16),
    Memory(*mut u8),
}

impl Register {
    /// # Safety
    /// Writing `value` must be what the caller wants of this machine.
    unsafe fn write(self, value: u8) {
        match self {
            // SAFETY: the firmware names the port for this use.
            Register::Port(port) => unsafe { Port::new(port).write(value) },
            // SAFETY: the kernel mapped the register.
            Register::Memory(at) => unsafe { at.write_volatile(value) },
        }
    }
}

/// The emulator that this machine is, where it gives itself away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// QEMU (any accelerator): the hypervisor leaf or the ACPI tables name it.
    Qemu,
    /// Bochs: its ACPI tables name it, and there is no hypervisor bit.
    Bochs,
}

impl Emulator {
    /// Tells by the firmware's OEM and by the hypervisor that CPUID names, if it does.
    pub fn detect(acpi_oem: [u8; 6], hypervisor_present: bool) -> Option<Self> {
        // QEMU's tables carry Bochs' name too, since its firmware began as Bochs'.
        match (&acpi_oem, hypervisor_present) {
            (b"BOCHS ", true) => Some(Emulator::Qemu),
            (b"BOCHS ", false) => Some(Emulator::Bochs),
            _ => None,
        }
    }
}

/// How this machine is turned off and restarted.
#[derive(Clone, Copy, Debug)]
pub struct PowerControl {
    info: PowerInfo,
    sleep_control: Option<Register>,
    reset: Option<(Register, u8)>,
    emulator: Option<Emulator>,
}

// SAFETY: the pointers are to device registers that stay mapped and that any processor may write.
unsafe impl Send for PowerControl {}
// SAFETY: as above.
unsafe impl Sync for PowerControl {}

fn pause() {
    for _ in 0..PATIENCE {
        // SAFETY: port 0x80 takes firmware's progress codes; reading it has no effect.
        unsafe { Port::<u8>::new(0x80).read() };
    }
}

impl PowerControl {
    /// Prepares. `map` gives a lasting uncached mapping of the register at a physical address.
    pub fn new(
        info: PowerInfo,
        emulator: Option<Emulator>,
        mut map: impl FnMut(u64) -> *mut u8,
    ) -> Self {
        let mut place = |address| match address {
            RegisterAddress::Port(port) => Register::Port(port),
            RegisterAddress::Memory(physical) => Register::Memory(map(physical)),
        };
        PowerControl {
            info,
            sleep_control: info.sleep_control.map(&mut place),
            reset: info.reset.map(|(register, value)| (place(register), value)),
            emulator,
        }
    }

    /// The emulator that this machine is, if it is a known one.
    pub fn emulator(&self) -> Option<Emulator> {
        self.emulator
    }

    /// Powers the machine off. Returns when that failed.
    ///
    /// # Safety
    /// Nothing may be left to do: guests stopped, output flushed.
    pub unsafe fn power_off(&self) {
        // SAFETY: the caller wants the machine off.
        unsafe {
            self.acpi_soft_off();
            self.emulator_off();
        }
    }

    /// # Safety
    /// As `power_off`.
    unsafe fn acpi_soft_off(&self) {
        let Some(soft_off) = self.info.soft_off else {
            return;
        };
        if let Some(register) = self.sleep_control {
            // SAFETY: the caller wants the machine off.
            unsafe { register.write(soft_off.a << 2 | SLEEP_CONTROL_EN) };
            pause();
        }
        let Some(pm1a) = self.info.pm1a_control else {
            return;
        };
        let mut pm1a = Port::<u16>::new(pm1a);
        // SAFETY: PM1 control and the SMI command port are the firmware's for this use (ACPI 6.5, section 4.8.3.2).
        unsafe {
            if let Some((port, enable)) = self.info.acpi_enable
                && pm1a.read() & SCI_EN == 0
            {
                Port::new(port).write(enable);
                for _ in 0..PATIENCE {
                    if pm1a.read() & SCI_EN != 0 {
                        break;
                    }
                }
            }
            let value = |old: u16, kind: u8| old & !SLP_FIELDS | u16::from(kind) << 10 | SLP_EN;
            let old = pm1a.read();
            pm1a.write(value(old, soft_off.a));
            if let Some(pm1b) = self.info.pm1b_control {
                let mut pm1b = Port::<u16>::new(pm1b);
                let old = pm1b.read();
                pm1b.write(value(old, soft_off.b));
            }
        }
        pause();
    }

    /// Emulators' own ports, for a machine whose ACPI did not do it.
    ///
    /// # Safety
    /// As `power_off`.
    unsafe fn emulator_off(&self) {
        match self.emulator {
            Some(Emulator::Qemu) => {
                // QEMU 7.2: PM1a control of the i440FX (0x604) and Q35 (ICH9 at 0x604 too) machines.
                // SAFETY: QEMU alone is addressed; the caller wants the machine off.
                unsafe { Port::<u16>::new(0x604).write(SLP_EN) };
            }
            Some(Emulator::Bochs) => {
                // Bochs 2.7: its shutdown port takes this word, letter by letter.
                for letter in *b"Shutdown" {
                    // SAFETY: Bochs alone is addressed; the caller wants the machine off.
                    unsafe { Port::<u8>::new(0x8900).write(letter) };
                }
            }
            None => {}
        }
    }

    /// Restarts the machine.
    ///
    /// # Safety
    /// Nothing may be left to do: guests stopped, output flushed.
    pub unsafe fn reset(&self) -> ! {
        // SAFETY: the caller wants the machine restarted; each port is that of a PC's reset logic.
        unsafe {
            if let Some((register, value)) = self.reset {
                register.write(value);
                pause();
            }
            // PCI reset control (ICH and later): system reset, then with the reset-CPU bit.
            let mut control = Port::<u8>::new(0xcf9);
            control.write(0x02);
            control.write(0x06);
            pause();
            // i8042: pulse the reset line, once the input buffer is empty.
            let mut command = Port::<u8>::new(0x64);
            for _ in 0..PATIENCE {
                if command.read() & 2 == 0 {
                    break;
                }
            }
            command.write(0xfe);
            pause();
            // A triple fault: no interrupt can be delivered with an empty table.
            lidt(&DescriptorTablePointer {
                limit: 0,
                base: VirtAddr::zero(),
            });
            x86_64::instructions::interrupts::int3();
        }
        loop {
            x86_64::instructions::hlt();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_emulators_are_taken_for_emulators() {
        assert_eq!(Emulator::detect(*b"BOCHS ", true), Some(Emulator::Qemu));
        assert_eq!(Emulator::detect(*b"BOCHS ", false), Some(Emulator::Bochs));
        assert_eq!(Emulator::detect(*b"DELL  ", false), None);
        assert_eq!(Emulator::detect(*b"VBOX  ", true), None);
    }
}
