//! A VM: RAM, buses, devices, and the cell that says how it ended.
//!
//! [`Vm::new`] builds the small PC that a guest sees and loads its boot image. The vCPUs
//! hold the VM by `Arc`; nested page tables and hardware vCPUs belong to the caller, who
//! knows the vendor. There is no lock per VM: each device has its own.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use devices::{
    VcpuId,
    acpi::{self, AcpiConfig},
    bus::{MmioBus, Overlap, PortBus, Swallow},
    chipset::{
        I440Fx, IsaBridge, MOVED_PM_BASE, PciInterruptRouter, PmAlias, PowerFunction, SHADOW,
    },
    debug_exit::{DEBUG_EXIT_PORT, DEBUG_EXIT_PORTS, DebugExit},
    debug_port::{DEBUG_PORT, DebugPort, FIRMWARE_DEBUG_PORT},
    fw_cfg::{FW_CFG_PORT, FW_CFG_PORTS, FwCfg, FwCfgItems, Key},
    hpet::{HPET_BASE, HPET_LEN, Hpet, LegacyGate},
    i8042::KeyboardController,
    ioapic::{IOAPIC_BASE, IOAPIC_LEN, IoApic},
    keyboard::Keyboard,
    lapic::{ApicBus, IntrPin, VcpuKick},
    line::{GsiRouter, InterruptSink, Line},
    pci::{ECAM_BUS_LEN, HostBridge, PciBus, PciLayout, PciLines},
    pic::Pic,
    pit::Pit,
    platform,
    pm::{PM_PORTS, PowerManagement, RESET_PORT, ResetControl},
    ramfb::FrameBuffer,
    rtc::{Rtc, RtcConfig},
    system::{RunState, SystemControl},
    test_device,
    time::{Clock, earliest},
    uart::{ConsoleSink, UART_PORTS, Uart},
    watchdog::Watchdog,
    work::{Budget, WorkList},
};
use mem::{
    Gpa, HostMemory, Width,
    guest::{AllocateError, GuestMemory, GuestRange, LOW_RAM_END, pc_layout},
};
use spin::Mutex;
use storage::Disk;
use virt::{CpuState, TscScaling};

use crate::{
    bios_data,
    clock::{GuestRate, RateError, TimeSource, VmClock},
    control,
    cpuid::{CpuModel, CpuidPolicy, HostCpuid, ModelError},
    disks::{self, Board},
    display::{self, Display, DisplayKind, DisplaySpec, Picture, Text},
    firmware::{self, Firmware, FirmwareError, NestedControl, SpecialMemory},
    host::Alarm,
    load::{self, BootFiles, BootLayout, LoadError, MapEntry, MapKind},
    pause::PauseControl,
    shadow::Shadow,
    warm::WarmStart,
};

use crate::end::{EndCell, EndConfig};
pub use crate::end::{EndReason, WatchdogAction, WatchdogSpec};

/// The VGA hole below 1 MiB: device memory, not RAM.
const VGA_HOLE: GuestRange = GuestRange {
    start: Gpa(0xa_0000),
    bytes: 0x2_0000,
};
/// Above it a PC has the firmware of its cards. RAM here, but systems do not expect it to be theirs.
const CARD_FIRMWARE: GuestRange = GuestRange {
    start: Gpa(0xc_0000),
    bytes: 0x2_0000,
};
/// Below 1 MiB, where a PC has its firmware: here, the ACPI tables.
const FIRMWARE_AREA: GuestRange = GuestRange {
    start: Gpa(0xe_0000),
    bytes: 0x2_0000,
};
/// ISA interrupt of the PIT.
const TIMER_IRQ: u8 = 0;
/// APIC ID register of the IOAPIC.
const IOAPIC_ID: u8 = 0;
/// The vCPU that looks after the devices' timers.
const TIMER_VCPU: VcpuId = VcpuId(0);
/// The 8259A pair's edge/level registers.
const PIC_LEVELS: u16 = 0x4d0;
/// Bytes of disk that one look at the devices' work moves.
const WORK_BYTES: u64 = 128 << 10;
/// No timer is armed.
const NEVER: u64 = u64::MAX;

/// What a VM is made from.
#[derive(Clone)]
pub struct VmSpec<'a> {
    /// Number of the VM on this host, from 1; owner of its frames.
    pub id: u16,
    /// Its name in the configuration.
    pub name: String,
    /// Processors, 1 to 255.
    pub vcpus: u16,
    /// RAM in bytes, whole 4 KiB pages.
    pub memory_bytes: u64,
    /// Firmware to boot; `None`: the kernel.
    pub firmware: Option<Firmware<'a>>,
    /// What it boots: a bzImage, multiboot or PVH kernel, and what comes with it. Without a kernel where firmware
    /// finds its system itself.
    pub boot: BootFiles<'a>,
    /// Its disks, in the order in which it finds them.
    pub disks: &'a [Arc<dyn Disk>],
    /// Its watchdog, if it has one.
    pub watchdog: Option<WatchdogSpec>,
    /// Whether it has the devices that test kernels expect.
    pub test_devices: bool,
    /// Its processor model.
    pub cpu: CpuModel,
    /// Ticks per second of its TSC; `None`: as the host's.
    pub tsc_hz: Option<u64>,
    /// What it draws on.
    pub display: DisplaySpec<'a>,
}

/// What a VM needs of its host.
pub struct Environment<'a> {
    /// The host's memory.
    pub memory: &'static dyn HostMemory,
    /// The host's CPUID.
    pub cpuid: HostCpuid<'a>,
    /// The host's IA32_ARCH_CAPABILITIES, or 0.
    pub arch_capabilities: u64,
    /// The host's TSC.
    pub time: TimeSource,
    /// How the host's processor can scale it for a guest, if it can.
    pub tsc_scaling: Option<TscScaling>,
    /// Unix time now, in seconds.
    pub epoch: u64,
    /// Where the first serial port's output goes.
    pub console: Arc<dyn ConsoleSink>,
    /// Wakes vCPUs.
    pub kick: Arc<dyn VcpuKick>,
    /// Is told when the watchdog has paused the VM, or done less.
    pub alarm: Arc<dyn Alarm>,
}

/// Why a VM could not be made.
#[derive(Debug)]
pub enum VmError {
    /// Its RAM could not be had.
    Memory(AllocateError),
    /// Its boot image is no good.
    Load(LoadError),
    /// Its firmware cannot be booted.
    Firmware(FirmwareError),
    /// Two devices claim the same address: a defect of Plinth.
    Overlap(Overlap),
    /// Its processor model cannot be had here.
    Processor(ModelError),
    /// Its TSC cannot have the rate asked for.
    Rate(RateError),
    /// It has more devices than a PC has room for.
    Devices,
    /// The ACPI tables do not fit below 1 MiB (too many vCPUs), or the VM has no RAM there.
    AcpiTables,
}

impl From<AllocateError> for VmError {
    fn from(e: AllocateError) -> Self {
        VmError::Memory(e)
    }
}

impl From<LoadError> for VmError {
    fn from(e: LoadError) -> Self {
        VmError::Load(e)
    }
}

impl From<ModelError> for VmError {
    fn from(e: ModelError) -> Self {
        VmError::Processor(e)
    }
}

impl From<RateError> for VmError {
    fn from(e: RateError) -> Self {
        VmError::Rate(e)
    }
}

impl From<FirmwareError> for VmError {
    fn from(e: FirmwareError) -> Self {
        VmError::Firmware(e)
    }
}

impl From<Overlap> for VmError {
    fn from(e: Overlap) -> Self {
        VmError::Overlap(e)
    }
}

impl VmError {
    /// Whether it is about the file that the VM boots.
    pub fn is_of_file(&self) -> bool {
        matches!(self, VmError::Load(_) | VmError::Firmware(_))
    }
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmError::Memory(e) => e.fmt(f),
            VmError::Load(e) => e.fmt(f),
            VmError::Firmware(e) => e.fmt(f),
            VmError::Overlap(e) => e.fmt(f),
            VmError::Devices => f.write_str("more devices than there is room for"),
            VmError::Processor(e) => e.fmt(f),
            VmError::Rate(e) => e.fmt(f),
            VmError::AcpiTables => {
                f.write_str("the ACPI tables do not fit into the guest's memory below 1 MiB")
            }
        }
    }
}

/// A virtual machine, but for its hardware vCPUs and nested page tables.
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its RAM.
    pub memory: Arc<GuestMemory>,
    /// Its processor model.
    pub cpuid: CpuidPolicy,
    /// Its time.
    pub clock: Arc<VmClock>,
    /// Unix time at which its clock showed zero, in seconds.
    epoch: u64,
    pub(crate) ports: PortBus,
    pub(crate) mmio: MmioBus,
    pub(crate) apic_bus: Arc<ApicBus>,
    pub(crate) ioapic: Arc<IoApic>,
    pub(crate) pic: Arc<Pic>,
    uart: Arc<Uart>,
    /// What there is beside RAM, in a VM with firmware.
    pub(crate) special: Option<Arc<SpecialMemory>>,
    debug_port: Option<Arc<DebugPort>>,
    display: Display,
    /// The keyboard's controller, if typed input goes to a keyboard.
    keyboard: Option<Arc<KeyboardController>>,
    timers: Timers,
    /// Earliest deadline of `timers`, in ticks of `clock`; [`NEVER`] if none is armed.
    timer_deadline: AtomicU64,
    /// Held while `timer_deadline` is made anew. Devices' locks come after it.
    noting_deadline: Mutex<()>,
    /// What devices have left to do.
    work: WorkList,
    end: Arc<EndCell>,
    /// How it starts again with its memory as it was; firmware does that itself.
    pub(crate) warm: Option<WarmStart>,
}

/// Where a VM has RAM: as a PC, with a hole for VGA memory.
fn ram_layout(bytes: u64) -> Vec<GuestRange> {
    pc_layout(bytes)
        .into_iter()
        .flat_map(|range| {
            let below = VGA_HOLE.start.0.clamp(range.start.0, range.end().0);
            let above = VGA_HOLE.end().0.clamp(range.start.0, range.end().0);
            [(range.start.0, below), (above, range.end().0)]
        })
        .filter(|(start, end)| start < end)
        .map(|(start, end)| GuestRange {
            start: Gpa(start),
            bytes: end - start,
        })
        .collect()
}

/// The edge/level registers with the PCI interrupts as levels.
fn pic_levels() -> u32 {
    let irqs = platform::PIRQ_IRQS.into_iter();
    irqs.fold(0, |levels, irq| levels | 1 << irq)
}

/// What the CMOS memory says of the machine.
fn cmos(spec: &VmSpec<'_>, epoch: u64) -> RtcConfig {
    let below_4g = spec.memory_bytes.min(LOW_RAM_END.0);
    RtcConfig {
        epoch_ns: epoch.saturating_mul(1_000_000_000),
        memory_below_4g: below_4g,
        memory_above_4g: spec.memory_bytes - below_4g,
        vcpus: u32::from(spec.vcpus),
    }
}

/// Puts the ACPI tables into the firmware area. Returns where the RSDP and the FACS are.
fn place_acpi_tables(memory: &GuestMemory, config: &AcpiConfig<'_>) -> Result<(Gpa, Gpa), VmError> {
    let built = acpi::build(config, FIRMWARE_AREA.start).map_err(|_| VmError::AcpiTables)?;
    if built.end > FIRMWARE_AREA.end() {
        return Err(VmError::AcpiTables);
    }
    for (at, table) in &built.tables {
        memory.write(*at, table).map_err(|_| VmError::AcpiTables)?;
    }
    Ok((built.rsdp, built.facs))
}

/// Loads the kernel, with ACPI tables and memory map as its boot protocol hands them over. Returns the
/// state in which it starts, and where the FACS is.
fn load_kernel(
    memory: &GuestMemory,
    spec: &VmSpec<'_>,
    acpi: &AcpiConfig<'_>,
) -> Result<(CpuState, Gpa), VmError> {
    let (rsdp, facs) = place_acpi_tables(memory, acpi)?;
    let ecam = acpi.pci.ecam.map(|ecam| GuestRange {
        start: Gpa(ecam),
        bytes: ECAM_BUS_LEN,
    });
    let low = [
        bios_data::EXTENDED_AREA,
        VGA_HOLE,
        CARD_FIRMWARE,
        FIRMWARE_AREA,
    ];
    let reserved: Vec<MapEntry> = low
        .into_iter()
        .chain(ecam)
        .map(|range| MapEntry {
            range,
            kind: MapKind::Reserved,
        })
        .collect();
    let layout = BootLayout {
        reserved: &reserved,
        rsdp: Some(rsdp),
        text_screen: spec.display.kind == DisplayKind::VgaText,
    };
    let [com1, ..] = platform::SERIAL_PORTS;
    bios_data::write(memory, com1.port, layout.text_screen).map_err(LoadError::from)?;
    let entry = load::load(memory, &spec.boot, &layout)?;
    Ok((entry.state, facs))
}

/// Offers a kernel, and its initrd, by `fw_cfg`, for firmware to load.
fn offer_kernel(items: &mut FwCfgItems, spec: &VmSpec<'_>) {
    const SECTOR: usize = 512;
    let setup_sectors = match spec.boot.kernel.get(0x1f1) {
        None => return,
        Some(0) => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let setup = ((setup_sectors + 1) * SECTOR).min(spec.boot.kernel.len());
    let (setup, rest) = spec.boot.kernel.split_at(setup);
    let initrd = spec.boot.modules.first().map_or(&[][..], |m| m.data);
    for (size, data, content) in [
        (Key::SetupSize, Key::SetupData, setup),
        (Key::KernelSize, Key::KernelData, rest),
        (Key::InitrdSize, Key::InitrdData, initrd),
    ] {
        items.set(size, (content.len() as u32).to_le_bytes().to_vec());
        items.set(data, content.to_vec());
    }
}

/// What `fw_cfg` tells every system that asks: the machine's size, and the command line.
fn fw_cfg_items(spec: &VmSpec<'_>) -> FwCfgItems {
    let mut command_line = spec.boot.command_line.as_bytes().to_vec();
    command_line.push(0);
    let mut items = FwCfgItems::new();
    items.set(Key::RamSize, spec.memory_bytes.to_le_bytes().to_vec());
    let no_screen = u16::from(spec.display.kind == DisplayKind::None);
    items.set(Key::NoGraphic, no_screen.to_le_bytes().to_vec());
    items.set(Key::CpuCount, spec.vcpus.to_le_bytes().to_vec());
    items.set(Key::MaxCpus, spec.vcpus.to_le_bytes().to_vec());
    items.set(Key::BootMenu, 0u16.to_le_bytes().to_vec());
    let length = command_line.len() as u32;
    items.set(Key::CommandLineSize, length.to_le_bytes().to_vec());
    items.set(Key::CommandLineData, command_line);
    items
}

/// The devices whose timers the VM's vCPUs drive.
struct Timers {
    pit: Arc<Pit>,
    rtc: Arc<Rtc>,
    power: Arc<PowerManagement>,
    hpet: Arc<Hpet>,
    watchdog: Option<Arc<Watchdog>>,
}

impl Timers {
    fn deadline(&self) -> u64 {
        let soonest = earliest(self.pit.deadline(), self.rtc.deadline());
        let later = earliest(self.power.deadline(), self.hpet.deadline());
        let watchdog = self.watchdog.as_ref().and_then(|dog| dog.deadline());
        earliest(earliest(soonest, later), watchdog).unwrap_or(NEVER)
    }

    fn poll(&self, now: u64) {
        self.pit.poll(now);
        self.rtc.poll(now);
        self.power.poll(now);
        self.hpet.poll(now);
        if let Some(dog) = &self.watchdog {
            dog.poll(now);
        }
    }
}

impl Vm {
    /// Makes a VM and loads its boot image. The state is that of its boot processor at the
    /// image's first instruction: the kernel's, or the firmware's at the reset vector.
    ///
    /// # Errors
    /// No memory, or no usable boot image.
    pub fn new(spec: VmSpec<'_>, host: Environment<'_>) -> Result<(Arc<Self>, CpuState), VmError> {
        let layout = match spec.firmware {
            Some(_) => firmware::ram_layout(spec.memory_bytes),
            None => ram_layout(spec.memory_bytes),
        };
        let mut memory = GuestMemory::allocate(host.memory, spec.id, &layout)?;
        if let Some(firmware) = &spec.firmware {
            firmware.place(&mut memory)?;
        }
        display::place(spec.display.kind, &mut memory)?;
        let memory = Arc::new(memory);
        let special = spec
            .firmware
            .is_some()
            .then(|| SpecialMemory::new(memory.clone(), host.kick.clone(), spec.vcpus));
        let mut cpuid = CpuidPolicy::new(host.cpuid, spec.vcpus, &spec.cpu, host.time.stable)?;
        let end = Arc::new(EndCell::new(EndConfig {
            vcpus: spec.vcpus,
            kick: host.kick.clone(),
            action: spec.watchdog.map(|watchdog| watchdog.action),
            alarm: host.alarm,
            can_sleep: spec.firmware.is_none(),
        }));
        let rate = GuestRate::choose(host.time.hz, spec.tsc_hz, host.tsc_scaling)?;
        let clock = Arc::new(VmClock::start(host.time, rate));
        cpuid.set_arch_capabilities(host.arch_capabilities);
        cpuid.set_rates(clock.hz(), clock.apic_timer_hz());
        let time: Arc<dyn Clock> = clock.clone();
        let system: Arc<dyn SystemControl> = end.clone();

        let apic_ids: Vec<u32> = (0..u32::from(spec.vcpus)).collect();
        let apic_bus = ApicBus::new(&apic_ids, host.kick);
        end.set_apic_bus(apic_bus.clone());
        let ioapic = IoApic::new(IOAPIC_ID, apic_bus.clone());
        // As on a PC, the 8259A's output is also input 0 of the IOAPIC.
        let intr = IntrPin::new(apic_bus.clone(), Line::new(ioapic.clone(), 0));
        let pic = Pic::new(Line::new(Arc::new(intr), 0));
        let wiring: Arc<dyn InterruptSink> = Arc::new(GsiRouter::new(pic.clone(), ioapic.clone()));
        let pci_router = match special {
            Some(_) => PciInterruptRouter::new(wiring.clone()),
            None => PciInterruptRouter::fixed(wiring.clone()),
        };
        let router: Arc<dyn InterruptSink> = pci_router.clone();
        let irq = |number: u8| Line::new(router.clone(), u32::from(number));

        let mut ports = PortBus::new();
        let mut mmio = MmioBus::new();
        mmio.insert("ioapic", IOAPIC_BASE, IOAPIC_LEN, ioapic.clone())?;
        pic.attach(&mut ports)?;
        // The HPET may take the lines of these two over.
        let gates = [TIMER_IRQ, platform::RTC_IRQ].map(|number| LegacyGate::new(irq(number)));
        let [timer_line, rtc_line] = gates
            .clone()
            .map(|gate| Line::new(gate, LegacyGate::DEVICE));
        let hpet = Hpet::new(time.clone(), router.clone(), apic_bus.clone(), gates);
        mmio.insert("hpet", HPET_BASE, HPET_LEN, hpet.clone())?;
        let pit = Pit::new(time.clone(), timer_line);
        pit.attach(&mut ports)?;
        let rtc = Rtc::new(&cmos(&spec, host.epoch), time.clone(), rtc_line);
        rtc.attach(&mut ports)?;
        let [com1, ..] = platform::SERIAL_PORTS;
        let uart = Uart::new(irq(com1.irq), host.console.clone());
        ports.insert("com1", com1.port, UART_PORTS, uart.clone())?;
        let keyboard = spec.display.is_console.then(Keyboard::new);
        let i8042 = KeyboardController::new(irq(platform::KEYBOARD_IRQ), system.clone(), keyboard);
        i8042.attach(&mut ports)?;
        let display = Display::new(spec.display.kind, &memory, &time, &mut ports)?;
        let power = PowerManagement::new(time, irq(platform::SCI_IRQ), system.clone());
        ports.insert("acpi-pm", platform::PM_BASE, PM_PORTS, power.clone())?;
        ports.insert("reset", RESET_PORT, 1, ResetControl::new(system.clone()))?;
        ports.insert("post", platform::POST_PORT, 1, Arc::new(Swallow))?;
        let pci_layout = match special {
            Some(_) => firmware::pci_layout(spec.memory_bytes),
            None => PciLayout::default(),
        };
        let acpi = AcpiConfig {
            apic_ids: &apic_ids,
            ioapic_id: IOAPIC_ID,
            serial_ports: &[com1],
            keyboard: spec.display.is_console,
            pci: pci_layout.clone(),
        };
        let is_ramfb = spec.display.kind == DisplayKind::Ramfb;
        if spec.test_devices || spec.firmware.is_some() || is_ramfb {
            let mut items = fw_cfg_items(&spec);
            if spec.firmware.is_some() {
                offer_kernel(&mut items, &spec);
                firmware::add_files(&mut items, spec.memory_bytes, &acpi)?;
                if !spec.display.is_console {
                    firmware::add_serial_console(&mut items)?;
                }
            }
            display
                .offer(spec.display.rom, &mut items)
                .map_err(FirmwareError::from)?;
            let fw_cfg = FwCfg::new(items, memory.clone());
            ports.insert("fw_cfg", FW_CFG_PORT, FW_CFG_PORTS, fw_cfg)?;
        }
        let mut debug_port = None;
        if spec.test_devices {
            let exit = DebugExit::new(system);
            ports.insert("debug-exit", DEBUG_EXIT_PORT, DEBUG_EXIT_PORTS, exit)?;
            let debug = DebugPort::new(host.console, end.state().clone());
            ports.insert("debug", DEBUG_PORT, 1, debug.clone())?;
            ports.insert("firmware-debug", FIRMWARE_DEBUG_PORT, 1, debug.clone())?;
            debug_port = Some(debug);
            test_device::attach(&mut ports, &mut mmio, &router)?;
        }
        let mut pci = PciBus::new();
        match &special {
            None => pci.insert(0, 0, HostBridge::new())?,
            Some(special) => {
                let shadow = Shadow::new(special.clone());
                mmio.insert("shadow", SHADOW.start.0, SHADOW.bytes, shadow.clone())?;
                pci.insert(0, 0, I440Fx::new(shadow))?;
                pci.insert(1, 0, IsaBridge::new(pci_router))?;
                let function = PowerFunction::new();
                pci.insert(1, 3, function.clone())?;
                let alias = PmAlias::new(function, power.clone());
                ports.insert("acpi-pm", MOVED_PM_BASE, PM_PORTS, alias)?;
            }
        }
        if let (Some(firmware), Some(special)) = (&spec.firmware, &special)
            && let Some((range, flash)) = firmware.flash(special)?
        {
            mmio.insert("variables", range.start.0, range.bytes, flash)?;
        }
        let mut work = WorkList::new();
        let board = Board {
            pci: &mut pci,
            lines: &mut PciLines::new(&router),
            work: &mut work,
            memory: &memory,
            messages: apic_bus.clone(),
            vcpus: spec.vcpus,
        };
        disks::attach(board, &spec.name, spec.disks)?;
        let watchdog = match spec.watchdog {
            Some(WatchdogSpec { fired, .. }) => {
                let (time, system): (Arc<dyn Clock>, Arc<dyn SystemControl>) =
                    (clock.clone(), end.clone());
                let dog = work.add(|signal| Watchdog::new(time, system, signal, fired).ok());
                let dog = dog.ok_or(VmError::Devices)?;
                pci.insert(platform::WATCHDOG_SLOT, 0, dog.clone())?;
                Some(dog)
            }
            None => None,
        };
        let pci = Arc::new(pci);
        pci.attach(&mut ports, &mut mmio, &pci_layout)?;
        let (start, warm) = match special {
            Some(_) => (CpuState::reset(), None),
            None => {
                // Without firmware the bus is found as firmware leaves it.
                pci.assign(&pci_layout, platform::pci_irq);
                ports.write(PIC_LEVELS, Width::Word, pic_levels());
                let (start, facs) = load_kernel(&memory, &spec, &acpi)?;
                let state = end.state().clone();
                let warm = WarmStart::new(state, power.clone(), rtc.clone(), facs);
                (start, Some(warm))
            }
        };
        let timers = Timers {
            pit,
            rtc,
            power,
            hpet,
            watchdog,
        };
        let timer_deadline = AtomicU64::new(timers.deadline());
        let vm = Vm {
            name: spec.name,
            memory,
            cpuid,
            clock,
            epoch: host.epoch,
            ports,
            mmio,
            apic_bus,
            ioapic,
            pic,
            uart,
            special,
            debug_port,
            display,
            keyboard: spec.display.is_console.then_some(i8042),
            timers,
            timer_deadline,
            noting_deadline: Mutex::new(()),
            work,
            end,
            warm,
        };
        Ok((Arc::new(vm), start))
    }

    /// Says which nested page tables map its memory, so that they follow when what the guest may do with
    /// ROM and flash changes. Before it runs.
    pub fn set_nested(&self, nested: Arc<dyn NestedControl>) {
        if let Some(special) = &self.special {
            special.set_nested(nested);
        }
    }

    /// Input from the VM's console, for its first serial port or for its keyboard, as much as has room there. Returns how
    /// many bytes that were.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        match &self.keyboard {
            Some(keyboard) => keyboard.type_bytes(bytes),
            None => self.uart.receive(bytes),
        }
    }

    /// Ends the VM, unless it has ended already.
    pub fn end(&self, reason: EndReason) {
        self.end.end(reason);
    }

    /// Keeps its vCPUs from running; none waits. `false`: it is paused already, or has ended.
    pub fn pause(&self) -> bool {
        self.end.pause()
    }

    /// Lets a paused VM run on. Its clock, and with it TSC and timers, has stood still since the last vCPU came to
    /// rest; the real-time clock has not. `false`: it is not paused.
    pub fn resume(&self) -> bool {
        if !self.run_state().has(RunState::PAUSED) {
            return false;
        }
        let still = self.end.pauses().still_for(self.clock.host_now());
        let still = self.clock.skip(still);
        self.timers.rtc.skip(still);
        self.end.resume();
        true
    }

    /// Whether it is paused: by [`Vm::pause`], or by its watchdog.
    pub fn is_paused(&self) -> bool {
        self.run_state().has(RunState::PAUSED)
    }

    /// Its pauses.
    pub(crate) fn pauses(&self) -> &PauseControl {
        self.end.pauses()
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        self.timers.power.press_power_button();
        // One that sleeps wakes for it, whatever its interrupts.
        self.end.kick(TIMER_VCPU);
    }

    /// Sends a vCPU a non-maskable interrupt. `false`: there is no such vCPU.
    pub fn inject_nmi(&self, vcpu: VcpuId) -> bool {
        self.end.nmi(vcpu)
    }

    /// Unix time, in seconds, that makes the VM's clock show the time of day when it is added to it.
    pub(crate) fn epoch_now(&self) -> u64 {
        self.epoch.saturating_add(self.clock.skipped_seconds())
    }

    /// What the checks of control registers look at.
    pub(crate) fn control_context(&self) -> control::Context<'_> {
        control::Context {
            policy: &self.cpuid,
            memory: &self.memory,
        }
    }

    /// Whether it has ended: its vCPUs come to rest.
    pub fn is_ended(&self) -> bool {
        self.run_state().has(RunState::ENDED)
    }

    /// The terminal may have room again: offers it the output that waits.
    pub fn resume_output(&self) {
        self.uart.resume();
        if let Some(port) = &self.debug_port {
            port.resume();
        }
    }

    /// What its display shows. Text is copied to `text`.
    pub fn picture(&self, text: &mut Text) -> Picture {
        self.display.picture(&self.memory, text)
    }

    /// Copies pixels of one row of its frame buffer, from the first on; `to` has whole pixels, at most a row's. Whether
    /// they could be had.
    pub fn read_pixels(&self, buffer: &FrameBuffer, row: usize, to: &mut [u8]) -> bool {
        self.display.read_row(buffer, row, to)
    }

    /// What keeps its vCPUs from running.
    pub(crate) fn run_state(&self) -> &RunState {
        self.end.state()
    }

    /// Takes the reason for which it ended.
    pub fn take_end_reason(&self) -> Option<EndReason> {
        self.end.take_reason()
    }

    /// Delivers what is due of the devices' timers at tick `now`. They are vCPU 0's business.
    #[inline]
    pub(crate) fn poll_timers(&self, by: VcpuId, now: u64) {
        if by == TIMER_VCPU && now >= self.timer_deadline.load(Ordering::Relaxed) {
            self.deliver_timers(by, now);
        }
    }

    #[inline(never)]
    fn deliver_timers(&self, by: VcpuId, now: u64) {
        self.timers.poll(now);
        self.timers_changed(by);
    }

    /// The earliest deadline of the devices' timers, in ticks of the VM's clock, if vCPU `by` looks after them.
    pub(crate) fn timer_deadline(&self, by: VcpuId) -> Option<u64> {
        let deadline = self.timer_deadline.load(Ordering::Relaxed);
        (by == TIMER_VCPU && deadline != NEVER).then_some(deadline)
    }

    /// vCPU `by` may have set a device's timer anew: looks up the deadlines, and tells the vCPU that
    /// looks after them.
    pub(crate) fn timers_changed(&self, by: VcpuId) {
        // Looked up and noted as one, or an older answer of another vCPU could replace a newer one.
        let noting = self.noting_deadline.lock();
        let deadline = self.timers.deadline();
        let before = self.timer_deadline.swap(deadline, Ordering::Relaxed);
        drop(noting);
        if by != TIMER_VCPU && deadline < before {
            self.end.kick(TIMER_VCPU);
        }
    }

    /// Whether devices have work left.
    pub(crate) fn has_work(&self) -> bool {
        self.work.is_pending()
    }

    /// Has the devices do a piece of their work, on vCPU `by`. Each line for the host's log goes to `note`. How much that
    /// was, in bytes, as a [`Budget`] counts them.
    pub(crate) fn work(&self, by: VcpuId, note: impl FnMut(String)) -> u64 {
        let mut budget = Budget::new(WORK_BYTES);
        self.work.run(&mut budget, note);
        let watchdog = self.timers.watchdog.as_ref();
        if watchdog.is_some_and(|dog| dog.take_moved()) {
            self.timers_changed(by);
        }
        WORK_BYTES - budget.left()
    }

    /// Whether a write to this port may give a device work: PCI configuration space, which has a window to
    /// devices' registers, and I/O BARs.
    pub(crate) fn is_work_port(port: u16) -> bool {
        matches!(port, 0xcfc..=0xcff) || u32::from(port) >= platform::PCI_IO.start
    }

    /// Whether a read of this port may set a device's timer: register C of the real-time clock.
    pub(crate) fn is_rearmed_by_read(port: u16) -> bool {
        port == 0x71
    }

    /// Whether a write to this address may set a device's timer.
    pub(crate) fn is_timer_memory(gpa: Gpa) -> bool {
        (HPET_BASE..HPET_BASE + HPET_LEN).contains(&gpa.0)
    }

    /// Whether a write to this port may set a device's timer.
    pub(crate) fn is_timer_port(port: u16) -> bool {
        const PM_FIRST: u16 = platform::PM_BASE;
        const PM_LAST: u16 = PM_FIRST + PM_PORTS - 1;
        const MOVED_LAST: u16 = MOVED_PM_BASE + PM_PORTS - 1;
        matches!(
            port,
            0x40..=0x43 | 0x61 | 0x70..=0x71 | PM_FIRST..=PM_LAST | MOVED_PM_BASE..=MOVED_LAST
        )
    }
}
