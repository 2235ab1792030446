//! From the boot loader's jump to the hand-over to `run`, in the one order that works.
//!
//! Serial line and log first, so that everything after can speak; memory; this processor's own
//! tables, so that faults are reported; then what the firmware knows; clocks; the other
//! processors.

use bootloader_api::{
    BootInfo, BootloaderConfig,
    config::{Mapping, Mappings},
    entry_point,
};
use drivers::firmware::{self, Firmware, Window};
use manage::bundle::{self, Bundle};

use crate::{
    calibrate::{self, Mhz},
    console, cpu, debug, error, idt, info, interrupts, memory, operator,
    percpu::{self, PerCpu},
    power,
    preflight::{self, Vendor},
    run, screen, smp, symbols, time, warn,
};

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

/// The machine as it is once the host is up.
pub struct Machine {
    /// What the firmware's tables say.
    pub firmware: Firmware,
    /// The boot image's files: configuration, kernels, initial ramdisks.
    pub bundle: Bundle<'static>,
    /// Whose virtualization the processors have; the pre-flight check was passed.
    pub vendor: Vendor,
}

fn entry(boot_info: &'static mut BootInfo) -> ! {
    time::start();
    let serial = console::init();
    info!("Plinth {} starting", env!("CARGO_PKG_VERSION"));
    cpu::protect();
    memory::init(boot_info);
    let screen = screen::init(boot_info.framebuffer.take());
    own_tables();
    // SAFETY: own tables are in force, so nothing of the lower half is used; this is the only processor.
    let seal = unsafe { memory::seal() };
    debug!("serial port: {serial}, screen: {screen:?}, {seal:?}");
    if seal.fixed > 0 {
        warn!(
            "{} pages were writable and executable, and no longer are",
            seal.fixed
        );
    }
    let bundle = read_bundle(boot_info);
    let firmware = read_firmware(boot_info);
    power::init(&firmware);
    interrupts::init(&firmware);
    calibrate::run(&firmware);
    let processors = smp::start(&firmware);
    operator::start_keyboard(&firmware);
    if !console::start_interrupts(&firmware) && serial {
        warn!("the serial port has no interrupt: it is polled");
    }
    info!(
        "Plinth {}: {} of {} processors online, {} MiB memory, TSC {}",
        env!("CARGO_PKG_VERSION"),
        processors.online,
        processors.listed,
        memory::total_bytes() >> 20,
        Mhz(time::hz())
    );
    let machine = Machine {
        firmware,
        bundle,
        vendor: preflight::check(),
    };
    #[cfg(feature = "selftest")]
    let machine = crate::selftest::run(machine);
    run::start(machine)
}

/// Gives this processor its own descriptor tables, stacks for faults, and per-processor data.
fn own_tables() {
    idt::init();
    // The real APIC ID is known to CPUID before the APIC is set up.
    let apic_id = cpu::cpuid()
        .get_feature_info()
        .map_or(0, |f| u32::from(f.initial_local_apic_id()));
    let cpu = percpu::new(0, apic_id).expect("memory for the first processor's tables");
    cpu.load();
    cpu.list();
    idt::load();
}

/// The files of the boot image. The kernel's symbols among them are put to use at once.
fn read_bundle(boot_info: &BootInfo) -> Bundle<'static> {
    let Some(start) = boot_info.ramdisk_addr.as_ref().copied() else {
        warn!("the boot image has no ramdisk, so there is no configuration");
        return Bundle::default();
    };
    // SAFETY: the boot loader mapped the ramdisk there, for ever, and nobody writes to it.
    let archive =
        unsafe { core::slice::from_raw_parts(start as *const u8, boot_info.ramdisk_len as usize) };
    let bundle = Bundle::parse(archive).unwrap_or_else(|error| {
        error!("ramdisk: {error}");
        Bundle::default()
    });
    if let Some(file) = bundle.file(bundle::SYMBOLS) {
        symbols::init(file);
    }
    bundle
}

/// Reads the ACPI tables. Without them the host knows itself only: one processor, PIC-less, no power-off.
fn read_firmware(boot_info: &BootInfo) -> Firmware {
    let firmware = boot_info.rsdp_addr.as_ref().copied().and_then(|rsdp| {
        // SAFETY: the boot loader maps all of physical memory at this offset, and found the root pointer.
        unsafe { firmware::read(Window::new(memory::window_offset()), rsdp) }
    });
    let firmware = firmware.unwrap_or_else(|| {
        warn!("no valid ACPI tables: one processor, and no power-off");
        Firmware::default()
    });
    debug!(
        "firmware: {} processors, I/O APICs {:x?}, overrides {:?}",
        firmware.processors.len(),
        firmware.io_apics,
        firmware.overrides
    );
    debug!(
        "firmware: HPET {:x?}, {:x?}, PCIe {:x?}",
        firmware.hpet, firmware.pm_timer, firmware.pcie
    );
    debug!("firmware: {:x?}", firmware.power);
    firmware
}

/// Where every processor but the first arrives once it is set up, and the first when `run` has started.
pub fn cpu_loop(cpu: &'static PerCpu) -> ! {
    run::cpu_main(cpu)
}
