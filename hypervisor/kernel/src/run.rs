//! What the processors do once the host is up.

use crate::{boot::Machine, info, interrupts, percpu::PerCpu, power};

/// The first processor goes on here when the host is up.
pub fn start(_machine: Machine) -> ! {
    info!("no VMs");
    power::off()
}

/// Each processor's loop.
pub fn cpu_main(_cpu: &'static PerCpu) -> ! {
    loop {
        interrupts::idle();
    }
}
