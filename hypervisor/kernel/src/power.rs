//! Power-off and reset.

use x86_64::instructions::port::Port;

use crate::{console, cpu};

/// Powers the machine off, or halts where that fails.
pub fn off() -> ! {
    console::flush();
    // SAFETY: QEMU's i440FX power-management control port; SLP_EN with S5.
    unsafe { Port::<u16>::new(0x604).write(0x2000) };
    let mut port = Port::<u8>::new(0x8900);
    for byte in *b"Shutdown" {
        // SAFETY: Bochs' shutdown port, unused elsewhere.
        unsafe { port.write(byte) };
    }
    cpu::halt_forever()
}
