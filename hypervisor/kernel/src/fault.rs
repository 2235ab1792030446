//! What happens when the host itself fails: a report, then a halt.

use core::panic::PanicInfo;

use crate::{cpu, sync};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    sync::break_locks();
    crate::error!("{info}");
    cpu::halt_forever()
}
