//! From the boot loader's jump to the hand-over to `run`.

use bootloader_api::{
    BootInfo, BootloaderConfig,
    config::{Mapping, Mappings},
    entry_point,
};

use crate::{console, cpu, info, memory, power, time};

/// Bytes of stack of the first processor, with a guard page below.
const STACK_BYTES: u64 = 128 * 1024;

const CONFIG: BootloaderConfig = {
    let mut mappings = Mappings::new_default();
    mappings.physical_memory = Some(Mapping::Dynamic);
    mappings.dynamic_range_start = Some(memory::LOADER_RANGE.start);
    mappings.dynamic_range_end = Some(memory::LOADER_RANGE.end - 1);
    let mut config = BootloaderConfig::new_default();
    config.mappings = mappings;
    config.kernel_stack_size = STACK_BYTES;
    config
};

entry_point!(entry, config = &CONFIG);

fn entry(boot_info: &'static mut BootInfo) -> ! {
    time::start();
    console::init();
    info!("Plinth {} starting", env!("CARGO_PKG_VERSION"));
    cpu::protect();
    memory::init(boot_info);
    info!("{} MiB of memory", memory::usable_bytes() >> 20);
    info!("no VMs");
    power::off()
}
