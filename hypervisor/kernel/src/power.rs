//! Power-off and reset of the machine.

use drivers::{
    firmware::Firmware,
    power::{Emulator, PowerControl},
};
use mem::Hpa;
use spin::Once;

use crate::{console, cpu, memory, time};

/// How long the machine may take to turn itself off.
const POWER_OFF_SECONDS: u64 = 5;

static CONTROL: Once<PowerControl> = Once::new();

/// The emulator that this machine is, if it is a known one.
pub fn emulator() -> Option<Emulator> {
    CONTROL.get()?.emulator()
}

/// Learns from the firmware how this machine is turned off and restarted.
pub fn init(firmware: &Firmware) {
    let hypervisor = cpu::cpuid()
        .get_feature_info()
        .is_some_and(|f| f.has_hypervisor());
    let emulator = Emulator::detect(firmware.oem, hypervisor);
    CONTROL.call_once(|| {
        PowerControl::new(firmware.power, emulator, |register| {
            memory::map_device(Hpa(register), 1)
        })
    });
}

/// Powers the machine off; halts, and says so, where that does not work. Guests must be stopped.
pub fn off() -> ! {
    console::flush();
    if let Some(control) = CONTROL.get() {
        // SAFETY: output is flushed and, by this function's contract, nothing is left to do.
        unsafe { control.power_off() };
        // The chipset takes its time, and an emulator on a busy workstation more.
        let patience = time::now_tsc() + POWER_OFF_SECONDS * time::hz();
        while time::now_tsc() < patience {
            core::hint::spin_loop();
        }
    }
    crate::error!("the machine does not power off by ACPI: turn it off by hand");
    console::flush();
    cpu::halt_forever()
}

/// Restarts the machine. Guests must be stopped.
pub fn reset() -> ! {
    console::flush();
    match CONTROL.get() {
        // SAFETY: output is flushed and, by this function's contract, nothing is left to do.
        Some(control) => unsafe { control.reset() },
        None => {
            let control = PowerControl::new(Default::default(), None, |_| core::ptr::null_mut());
            // SAFETY: as above. The empty description names no register, so none was mapped.
            unsafe { control.reset() }
        }
    }
}
