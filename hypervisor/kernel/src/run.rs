//! The VMs of this host: made from the configuration, run on every pCPU, restarted or buried.
//!
//! [`start`] reads the bundle, makes the VMs and leaves a [`World`] behind, in which every
//! pCPU then runs its loop. That loop lets host interrupts in, asks `sched` for a vCPU, runs it
//! until it pauses, and halts when there is none. The vendor is chosen once, here.
//!
//! Lock order: one vCPU, then `slots`, then `entities`, then a device's, then `sched` (a kick comes
//! from under a device's lock), then the console's (guest output comes from under the serial port's). All
//! locks of the host are in one table in docs/ARCHITECTURE.md. No lock is held while a guest runs, but for
//! the vCPU's own, which nobody else waits for.

mod tables;

use alloc::{boxed::Box, format, string::String, sync::Arc, vec::Vec};
use core::{
    convert::Infallible,
    sync::atomic::{AtomicU64, Ordering},
};

use devices::{VcpuId, lapic::VcpuKick, uart::ConsoleSink};
use drivers::wall_clock;
use manage::{
    bundle::{self, Bundle, BundleEnvironment},
    config::{self, AfterLastVm, Config, DiskConfig, VmConfig},
    console::{ConsoleId, Input},
    restart::{Decision, Ending, MAX_QUICK_FAILURES, Restarts},
};
use mem::Owner;
use sched::{EntityId, RunQueue, Wake};
use spin::Once;
use storage::{Disk, ImageDisk};
use virt::{Backend, Exit, VcpuSetup, svm::Svm, vtx::Vtx};
use vmm::{
    clock::TimeSource,
    firmware::{Firmware, Variables},
    host::Host,
    load::{BootFiles, Module},
    vcpu::{Pause, Vcpu},
    vm::{EndReason, Environment, Vm, VmSpec},
};

use tables::GuestTables;

use crate::{
    boot::Machine,
    console, cpu, error, fault, frame, info, interrupts, log, memory,
    percpu::{self, PerCpu},
    power,
    preflight::Vendor,
    sync::Lock,
    time, warn,
};

/// Length of a time slice, in microseconds.
const SLICE_US: u64 = 10_000;
const NS_PER_SECOND: u64 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;

/// What the parts of the kernel that don't know the vendor see of the world.
trait Runner: Sync {
    fn wake(&self, entity: EntityId);
    fn run(&'static self, cpu: &'static PerCpu) -> !;
}

static WORLD: Once<&'static dyn Runner> = Once::new();

/// A VM that exists.
struct Live<B: Backend> {
    vm: Arc<Vm>,
    entities: Vec<EntityId>,
    /// vCPUs that have not come to rest since the VM ended.
    running: usize,
    begun: Beginning,
    tables: Arc<GuestTables<B>>,
}

/// What there was when the making of a VM began, for its figures.
#[derive(Clone, Copy)]
struct Beginning {
    tsc: u64,
    heap_bytes: usize,
}

impl Beginning {
    fn now() -> Self {
        Beginning {
            tsc: time::now_tsc(),
            heap_bytes: memory::heap_used(),
        }
    }
}

/// A file that a VM's kernel is given.
struct BootModule {
    data: &'static [u8],
    /// What the kernel is told of it.
    text: String,
}

/// A VM of the configuration: what it is made of, each time.
struct Plan {
    config: VmConfig,
    /// Empty where firmware finds its system itself.
    kernel: &'static [u8],
    modules: Vec<BootModule>,
    firmware: Option<Firmware<'static>>,
    /// They outlive the VM: a guest that restarts finds what it has written.
    disks: Vec<Arc<dyn Disk>>,
    /// Its console on the terminal, if it is configured to have one.
    console: Option<ConsoleId>,
    /// Bytes typed that it had no room for.
    lost_input: AtomicU64,
}

/// What there is of a VM of the configuration.
enum Phase<B: Backend> {
    /// Nothing, and nobody is about to make it.
    Off,
    /// One processor makes it or takes it down.
    Changing,
    /// Nothing; it starts again at this host TSC.
    Waiting(u64),
    Live(Live<B>),
}

/// The state of a VM of the configuration.
struct Slot<B: Backend> {
    phase: Phase<B>,
    /// Host time of its last start, in nanoseconds.
    started_ns: u64,
    restarts: Restarts,
}

impl<B: Backend> Slot<B> {
    fn live(&self) -> Option<&Live<B>> {
        match &self.phase {
            Phase::Live(live) => Some(live),
            Phase::Off | Phase::Changing | Phase::Waiting(_) => None,
        }
    }

    /// A vCPU has come to rest. After the last one the VM is handed out, to be taken down.
    fn vcpu_at_rest(&mut self) -> Option<Live<B>> {
        let Phase::Live(live) = &mut self.phase else {
            return None;
        };
        live.running = live.running.saturating_sub(1);
        if live.running > 0 {
            return None;
        }
        match core::mem::replace(&mut self.phase, Phase::Changing) {
            Phase::Live(live) => Some(live),
            Phase::Off | Phase::Changing | Phase::Waiting(_) => None,
        }
    }
}

/// What kind of end this is.
fn ending(reason: Option<&EndReason>) -> Ending {
    match reason {
        Some(EndReason::Reset) => Ending::Reset,
        Some(EndReason::PowerOff | EndReason::TestExit(_)) | None => Ending::Done,
        Some(EndReason::TripleFault(_) | EndReason::Failure { .. }) => Ending::Failed,
    }
}

/// One vCPU and where it belongs.
struct Entity<B: Backend> {
    slot: usize,
    /// Host TSC when it first ran, 0 before; noted only for figures.
    first_run: AtomicU64,
    vcpu: Lock<Vcpu<B::Vcpu>>,
}

/// Everything that runs on this host.
struct World<B: Backend> {
    backend: &'static B,
    /// Unix time at which this host's kernel was entered, in seconds.
    boot_epoch: u64,
    after_last_vm: AfterLastVm,
    /// Whether figures are wanted at a VM's end.
    figures: bool,
    sched: Lock<RunQueue>,
    entities: Lock<Vec<Option<Arc<Entity<B>>>>>,
    plans: Vec<Plan>,
    /// One for each plan.
    slots: Lock<Vec<Slot<B>>>,
    /// Host TSC at which the first of the VMs that wait starts again; `u64::MAX` if none waits.
    next_start: AtomicU64,
    /// Losses of input by the host's port that were told.
    told_lost_input: AtomicU64,
    /// A bit per pCPU that halts for want of work.
    idle: AtomicU64,
}

/// Wakes the vCPUs of one VM.
struct Kick {
    entities: Once<Vec<EntityId>>,
}

impl VcpuKick for Kick {
    fn kick(&self, vcpu: VcpuId) {
        let entity = self.entities.get().and_then(|all| all.get(vcpu.0 as usize));
        if let (Some(&entity), Some(world)) = (entity, WORLD.get()) {
            world.wake(entity);
        }
    }
}

/// The terminal end of a guest's serial port.
struct GuestConsole(ConsoleId);

impl ConsoleSink for GuestConsole {
    fn write(&self, bytes: &[u8]) -> usize {
        console::guest_output(self.0, bytes)
    }
}

/// A console of a VM that is configured to have none.
struct NoConsole;

impl ConsoleSink for NoConsole {
    fn write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

/// Runs the VMs of the boot image, on this machine. The first processor calls it when the host is up.
pub fn start(machine: Machine) -> ! {
    let stopped = match machine.vendor {
        Vendor::Vtx => launch::<Vtx>(&machine),
        Vendor::Svm => launch::<Svm>(&machine),
    };
    match stopped {
        Ok(never) => match never {},
        Err(why) => {
            frame::end(frame::Outcome::NotStarted);
            for line in why.lines() {
                error!("{line}");
            }
            error!("no VM runs: powering off");
            power::off()
        }
    }
}

/// Turns virtualization on, makes the VMs, and becomes the first processor's loop.
///
/// # Errors
/// A text for the screen: why no VM can run here.
fn launch<B: Backend>(machine: &Machine) -> Result<Infallible, String> {
    let backend: &'static B =
        Box::leak(Box::new(B::new(&memory::HOST).map_err(|e| format!("{e}"))?));
    let cpu = percpu::current();
    backend.enable(cpu.number).map_err(|e| format!("{e}"))?;
    let bundle = &machine.bundle;
    let config = read_config(bundle)?;

    console::set_escape(config.host.console_escape);
    let mut plans = Vec::new();
    for vm in config.vms {
        let file = |path: &Option<String>| path.as_deref().and_then(|path| bundle.guest_file(path));
        let kernel = file(&vm.boot.kernel).unwrap_or_default();
        let firmware = vm.boot.firmware.as_ref().map(|firmware| Firmware {
            image: bundle.guest_file(&firmware.image).unwrap_or_default(),
            variables: file(&firmware.variables).map(Variables::new),
        });
        let module = |path: &str, text: &str| BootModule {
            data: bundle.guest_file(path).unwrap_or_default(),
            text: String::from(text),
        };
        let initrd = vm.boot.initrd.iter().map(|path| module(path, path));
        let named = vm.boot.modules.iter();
        let modules = initrd
            .chain(named.map(|m| module(m.path(), &m.text)))
            .collect();
        let disks = disks(&vm, vm_number(plans.len()), bundle);
        let console = vm.console.then(|| console::attach(&vm.name, vm.focus));
        plans.push(Plan {
            config: vm,
            kernel,
            modules,
            firmware,
            disks,
            console,
            lost_input: AtomicU64::new(0),
        });
    }
    let now = wall_clock::read_epoch().unwrap_or_else(|| {
        warn!("the CMOS clock shows no date: guests start in 1970");
        0
    });
    let count = plans.len();
    let slots = (0..count).map(|_| Slot {
        // So that none that ends at once is taken for the last.
        phase: Phase::Changing,
        started_ns: 0,
        restarts: Restarts::default(),
    });
    let world: &'static World<B> = Box::leak(Box::new(World {
        backend,
        boot_epoch: now.saturating_sub(time::ns() / NS_PER_SECOND),
        after_last_vm: config.host.after_last_vm,
        figures: config.host.figures,
        sched: Lock::new(RunQueue::new()),
        entities: Lock::new(Vec::new()),
        slots: Lock::new(slots.collect()),
        plans,
        next_start: AtomicU64::new(u64::MAX),
        told_lost_input: AtomicU64::new(0),
        idle: AtomicU64::new(0),
    }));
    vmm::emulate::warm_up();
    if let Some(word) = &config.host.console_frame {
        frame::begin(word);
    }
    WORLD.call_once(|| world);
    let made: Vec<_> = (0..count).filter_map(|slot| world.ready_vm(slot)).collect();
    if made.is_empty() {
        return Err(String::from("no VM could be started"));
    }
    // From here on the serial line is the guests'.
    log::quiet_serial(true);
    for boot in made {
        world.wake(boot);
    }
    // Those that started may have ended while the others were made.
    world.finish_if_none_is_left();
    for number in 0..percpu::count() {
        if let Some(other) = percpu::get(number).filter(|other| other.number != cpu.number) {
            interrupts::kick(other);
        }
    }
    world.run(cpu)
}

/// The disks of a VM, with what was written to them: nothing yet.
fn disks(vm: &VmConfig, number: u16, bundle: &Bundle<'static>) -> Vec<Arc<dyn Disk>> {
    let disk = |disk: &DiskConfig| -> Arc<dyn Disk> {
        let image = bundle.guest_file(&disk.image).unwrap_or_default();
        Arc::new(if disk.readonly {
            ImageDisk::read_only(&memory::HOST, image)
        } else {
            ImageDisk::writable(&memory::HOST, Owner::VmDisks(number), image, disk.changes)
        })
    };
    vm.disks.iter().map(disk).collect()
}

/// Reads `plinth.toml`, says what is wrong with it, and puts its `[host]` part into force.
///
/// # Errors
/// There is none, or no VM in it can start.
fn read_config(bundle: &Bundle<'_>) -> Result<Config, String> {
    let text = bundle
        .file(bundle::CONFIG)
        .ok_or_else(|| format!("the boot image carries no {}", bundle::CONFIG))?;
    let mut config = config::parse(bundle::CONFIG, text);
    let surroundings = BundleEnvironment {
        bundle,
        memory_bytes: memory::HOST.statistics().free * mem::PAGE_SIZE,
        processors: percpu::count(),
    };
    config::check(&mut config, &surroundings);
    for line in config.report().lines() {
        if config.problems.is_empty() {
            info!("{line}")
        } else {
            warn!("{line}")
        }
    }
    log::show_up_to(match config.host.log_level {
        config::LogLevel::Error => log::Level::Error,
        config::LogLevel::Warn => log::Level::Warn,
        config::LogLevel::Info => log::Level::Info,
        config::LogLevel::Debug => log::Level::Debug,
    });
    fault::set_on_fault(match config.host.on_fault {
        config::OnFault::Halt => fault::OnFault::Halt,
        config::OnFault::Reset => fault::OnFault::Restart,
    });
    if config.vms.is_empty() {
        return Err(format!("{} describes no VM that can start", bundle::CONFIG));
    }
    Ok(config)
}

/// The number of a slot's VM, with which its memory is marked.
fn vm_number(index: usize) -> u16 {
    index as u16 + 1
}

/// The loop of every processor but the first: waits until there are VMs, then runs them.
pub fn cpu_main(cpu: &'static PerCpu) -> ! {
    loop {
        if let Some(world) = WORLD.get() {
            world.run(cpu)
        }
        interrupts::idle();
    }
}

/// Asks the host's processor.
fn host_cpuid(leaf: u32, subleaf: u32) -> vmm::cpuid::CpuidResult {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    vmm::cpuid::CpuidResult {
        eax: r.eax,
        ebx: r.ebx,
        ecx: r.ecx,
        edx: r.edx,
    }
}

/// The processor model that a configuration asks for.
fn processor_model(cpu: &config::CpuConfig) -> vmm::cpuid::CpuModel {
    vmm::cpuid::CpuModel {
        base: match cpu.base {
            config::CpuBase::Host => vmm::cpuid::ModelBase::Host,
            config::CpuBase::Baseline => vmm::cpuid::ModelBase::Baseline,
        },
        features: cpu.features.clone(),
    }
}

impl<B: Backend> World<B> {
    /// A line about the VMs, for the person at the terminal and the log.
    fn say(&self, text: &str) {
        if !frame::is_open() {
            console::host_line(text.as_bytes());
        }
        info!("{text}");
    }

    /// Makes the VM of a slot that is `Changing`. Returns its boot vCPU, which is to be woken. Says so, or why not;
    /// then the slot is `Off`.
    fn ready_vm(&self, index: usize) -> Option<EntityId> {
        let plan = &self.plans[index];
        let name = &plan.config.name;
        match self.make_vm(index, plan) {
            Ok((live, boot)) => {
                let slot = &mut self.slots.lock()[index];
                slot.phase = Phase::Live(live);
                slot.started_ns = time::ns();
                info!("{name}: starting");
                Some(boot)
            }
            Err(why) => {
                self.say(&format!("{name}: cannot start: {why}"));
                self.slots.lock()[index].phase = Phase::Off;
                None
            }
        }
    }

    /// As [`World::ready_vm`], and wakes it; the host's work may end with it.
    fn start_again(&self, index: usize) {
        match self.ready_vm(index) {
            Some(boot) => self.wake(boot),
            None => self.finish_if_none_is_left(),
        }
    }

    /// Starts the VMs whose wait is over. The first processor's business.
    fn start_waiting(&self) {
        let now = time::now_tsc();
        if now < self.next_start.load(Ordering::Relaxed) {
            return;
        }
        let mut next = u64::MAX;
        let mut due = Vec::new();
        let mut slots = self.slots.lock();
        for (index, slot) in slots.iter_mut().enumerate() {
            match slot.phase {
                Phase::Waiting(at) if at <= now => {
                    slot.phase = Phase::Changing;
                    due.push(index);
                }
                Phase::Waiting(at) => next = next.min(at),
                Phase::Off | Phase::Changing | Phase::Live(_) => {}
            }
        }
        self.next_start.store(next, Ordering::Relaxed);
        drop(slots);
        for index in due {
            self.start_again(index);
        }
    }

    fn make_vm(&self, index: usize, plan: &Plan) -> Result<(Live<B>, EntityId), String> {
        let begun = Beginning::now();
        let id = vm_number(index);
        let config = &plan.config;
        let kick = Arc::new(Kick {
            entities: Once::new(),
        });
        let console: Arc<dyn ConsoleSink> = match plan.console {
            Some(console) => Arc::new(GuestConsole(console)),
            None => Arc::new(NoConsole),
        };
        let modules: Vec<Module<'_>> = plan
            .modules
            .iter()
            .map(|module| Module {
                data: module.data,
                text: &module.text,
            })
            .collect();
        let spec = VmSpec {
            id,
            name: config.name.clone(),
            vcpus: config.vcpus,
            memory_bytes: config.memory,
            firmware: plan.firmware.clone(),
            boot: BootFiles {
                kernel: plan.kernel,
                kernel_name: config.boot.kernel.as_deref().unwrap_or_default(),
                modules: &modules,
                command_line: &config.boot.cmdline,
            },
            disks: &plan.disks,
            test_devices: config.test_devices,
            cpu: processor_model(&config.cpu),
        };
        let environment = Environment {
            memory: &memory::HOST,
            cpuid: &host_cpuid,
            time: TimeSource {
                read: time::now_tsc,
                hz: time::hz(),
                stable: time::is_stable(),
            },
            epoch: self.boot_epoch + time::ns() / NS_PER_SECOND,
            console,
            kick: kick.clone(),
        };
        // Memory is zeroed and files are copied: long work.
        let (vm, entry) = interrupts::open(|| Vm::new(spec, environment)).map_err(|e| {
            // The first file is what the VM boots: its firmware, or its kernel.
            let file = config.boot.paths().next().unwrap_or_default();
            format!("{file}: {e}")
        })?;
        let tables = interrupts::open(|| GuestTables::new(self.backend, id, &vm.memory))
            .map_err(|e| format!("{e}"))?;
        vm.set_nested(tables.clone());

        let pcpu = percpu::current().number;
        let mut entities = Vec::new();
        for number in 0..config.vcpus {
            let entity = self.sched.lock().add(None);
            let made = self
                .backend
                .create_vcpu(VcpuSetup {
                    vm: id,
                    vcpu: number,
                    tag: entity.0 + 1,
                    nested_root: tables.root(),
                })
                .map_err(|e| format!("{e}"))
                .and_then(|hw| {
                    let start = (number == 0).then_some(&entry);
                    Vcpu::new(vm.clone(), VcpuId(u32::from(number)), hw, start, pcpu)
                        .ok_or_else(|| format!("there is no vCPU {number}"))
                });
            entities.push(entity);
            match made {
                Ok(vcpu) => self.place(
                    entity,
                    Entity {
                        slot: index,
                        first_run: AtomicU64::new(0),
                        vcpu: Lock::new(vcpu),
                    },
                ),
                Err(why) => {
                    for entity in entities {
                        self.bury(entity);
                    }
                    return Err(why);
                }
            }
        }
        kick.entities.call_once(|| entities.clone());
        let boot = entities[0];
        let running = entities.len();
        Ok((
            Live {
                vm,
                entities,
                running,
                begun,
                tables,
            },
            boot,
        ))
    }

    fn place(&self, id: EntityId, entity: Entity<B>) {
        let mut entities = self.entities.lock();
        let index = id.0 as usize;
        if entities.len() <= index {
            entities.resize_with(index + 1, || None);
        }
        entities[index] = Some(Arc::new(entity));
    }

    /// Forgets an entity that does not run.
    fn bury(&self, id: EntityId) {
        let removed = self.sched.lock().remove(id);
        debug_assert!(removed, "a running vCPU cannot be buried");
        if let Some(entity) = self.entities.lock().get_mut(id.0 as usize) {
            *entity = None;
        }
    }

    /// Runs one vCPU until it pauses.
    fn run_vcpu(&'static self, cpu: &'static PerCpu, id: EntityId) {
        let entity = self.entities.lock().get(id.0 as usize).cloned().flatten();
        let Some(entity) = entity else { return };
        if self.figures && entity.first_run.load(Ordering::Relaxed) == 0 {
            entity.first_run.store(time::now_tsc(), Ordering::Relaxed);
        }
        let pause = {
            let mut vcpu = entity.vcpu.lock();
            vcpu.load(cpu.number);
            let slice_end = time::now_tsc() + time::us_to_ticks(SLICE_US);
            let wake_up = self.sched.lock().next_deadline(cpu.number);
            let until = wake_up.map_or(slice_end, |at| at.min(slice_end));
            let pause = vcpu.run(&mut HostCpu { world: self, cpu }, until);
            vcpu.unload();
            pause
        };
        match pause {
            Pause::SliceOver => self.sched.lock().yield_now(id),
            Pause::Idle { until } => self.sched.lock().block(id, until),
            Pause::Ended => {
                // The kick that ended the VM must not bring this vCPU to rest a second time.
                self.sched.lock().retire(id);
                let slot = entity.slot;
                // Else this pCPU would hold the VM's memory while the VM is made anew.
                drop(entity);
                self.at_rest(slot);
            }
        }
    }

    /// A vCPU of an ended VM has come to rest. After the last one the VM is taken down, and
    /// made anew if it is to run again.
    fn at_rest(&self, index: usize) {
        let ended = self.slots.lock()[index].vcpu_at_rest();
        let Some(live) = ended else { return };
        let reason = live.vm.take_end_reason();
        // What its devices still hold: a FIFO at most, or as much as goes out while a reader waits for it.
        if frame::is_used() {
            console::flush();
        }
        live.vm.resume_output();
        frame::end(frame::Outcome::of(reason.as_ref()));
        let name = live.vm.name.clone();
        self.log_exits(&name, &live.entities);
        if self.figures {
            self.say_figures(&name, index, &live);
        }
        for &entity in &live.entities {
            self.bury(entity);
        }
        // Its memory is zeroed: long work.
        interrupts::open(|| drop(live));
        let text = match &reason {
            Some(reason) => format!("{reason}"),
            None => String::from("ended"),
        };
        for (n, line) in text.lines().enumerate() {
            if n == 0 {
                self.say(&format!("{name}: {line}"));
            } else {
                self.say(line);
            }
        }
        if frame::is_used() {
            self.slots.lock()[index].phase = Phase::Off;
        } else {
            self.after_end(index, ending(reason.as_ref()));
        }
        self.finish_if_none_is_left();
    }

    /// Starts a VM that was taken down again, now or later, or leaves it at that.
    fn after_end(&self, index: usize, ending: Ending) {
        let config = &self.plans[index].config;
        let name = &config.name;
        let decision = {
            let slot = &mut self.slots.lock()[index];
            let ran_ms = time::ns().saturating_sub(slot.started_ns) / NS_PER_MS;
            slot.restarts.decide(config.restart, ending, ran_ms)
        };
        match decision {
            Decision::Again { wait_ms: 0 } => return self.start_again(index),
            Decision::Again { wait_ms } => {
                self.say(&format!(
                    "{name}: ended soon after its start, again: starts in {} s",
                    wait_ms / 1000
                ));
                let at = time::now_tsc() + time::us_to_ticks(wait_ms * 1000);
                let mut slots = self.slots.lock();
                slots[index].phase = Phase::Waiting(at);
                self.next_start.fetch_min(at, Ordering::Relaxed);
                drop(slots);
                // The first processor starts it, and may be halted.
                if let Some(first) = percpu::get(0) {
                    interrupts::kick(first);
                }
                return;
            }
            Decision::GiveUp => self.say(&format!(
                "{name}: failed {MAX_QUICK_FAILURES} times soon after its start: not restarted any more"
            )),
            Decision::Stay => {}
        }
        self.slots.lock()[index].phase = Phase::Off;
    }

    fn log_exits(&self, name: &str, entities: &[EntityId]) {
        for id in entities {
            let entity = self.entities.lock().get(id.0 as usize).cloned().flatten();
            let Some(entity) = entity else { continue };
            let vcpu = entity.vcpu.lock();
            let mut line = format!("{name}: vCPU {} exits:", vcpu.id().0);
            for (kind, count) in Exit::NAMES
                .iter()
                .zip(vcpu.counters())
                .filter(|(_, n)| **n > 0)
            {
                line += &format!(" {kind} {count}");
            }
            if self.figures {
                self.say(&line);
            } else {
                info!("{line}");
            }
        }
    }

    /// What `cargo xtask bench` reads of a VM that has come to rest (docs/MEASURING.md).
    fn say_figures(&self, name: &str, index: usize, live: &Live<B>) {
        let boot = live.entities.first().and_then(|id| {
            let entities = self.entities.lock();
            entities.get(id.0 as usize).cloned().flatten()
        });
        let Some(boot) = boot else { return };
        let first_run = boot.first_run.load(Ordering::Relaxed);
        let since = |start: u64| first_run.wrapping_sub(start);
        let tables = memory::HOST.used(Owner::VmTables(vm_number(index)));
        let beside_tables = tables.saturating_sub(live.tables.frames()) * mem::PAGE_SIZE;
        let heap = memory::heap_used().saturating_sub(live.begun.heap_bytes) as u64;
        self.say(&format!(
            "{name}: figures: kernel-to-entry {} vm-start {} guest-tsc-at-entry {} \
             vm-overhead-bytes {} nested-table-bytes {}",
            since(time::ENTRY_TSC.load(Ordering::Relaxed)),
            since(live.begun.tsc),
            since(live.vm.clock.to_host(0)),
            beside_tables + heap,
            live.tables.frames() * mem::PAGE_SIZE,
        ));
    }

    /// Ends the host's work when all VMs have ended.
    fn finish_if_none_is_left(&self) {
        let is_off = |slot: &Slot<B>| matches!(slot.phase, Phase::Off);
        if !self.slots.lock().iter().all(is_off) {
            return;
        }
        match self.after_last_vm {
            AfterLastVm::PowerOff => {
                self.say("the last VM has ended: powering off");
                power::off()
            }
            AfterLastVm::Halt => {
                self.say("the last VM has ended: the machine can be switched off");
                console::flush();
                cpu::halt_forever()
            }
        }
    }

    /// The VM behind a console, if it exists, and what it is made of.
    fn vm_of(&self, console: ConsoleId) -> Option<(&Plan, Arc<Vm>)> {
        let index = self
            .plans
            .iter()
            .position(|plan| plan.console == Some(console))?;
        let slots = self.slots.lock();
        let vm = slots[index].live()?.vm.clone();
        Some((&self.plans[index], vm))
    }

    /// Gives what was typed to whom it is for.
    fn take_input(&self) {
        while let Some(input) = console::read() {
            match input {
                Input::Handled => {}
                Input::Guest(to, byte) => {
                    let Some((plan, vm)) = self.vm_of(to) else {
                        continue;
                    };
                    if vm.receive(&[byte]) == 0 {
                        let lost = plan.lost_input.fetch_add(1, Ordering::Relaxed) + 1;
                        // So that the note does not become a flood.
                        if lost.is_power_of_two() {
                            let name = &plan.config.name;
                            warn!("{name}: reads no input: {lost} typed bytes are lost");
                        }
                    }
                }
                Input::PowerOff => {
                    self.say("powering off");
                    power::off()
                }
            }
        }
        self.note_lost_input();
    }

    /// Says when the host itself has lost input.
    fn note_lost_input(&self) {
        let (dropped, overruns) = console::lost_input();
        let lost = dropped + overruns;
        // So that the note does not become a flood.
        if lost == 0 || lost < 2 * self.told_lost_input.load(Ordering::Relaxed) {
            return;
        }
        self.told_lost_input.store(lost, Ordering::Relaxed);
        warn!("the serial port lost input: {dropped} bytes for want of room, {overruns} overruns");
    }

    /// Host work between vCPUs and after each host interrupt.
    fn host_work(&self, cpu: &PerCpu) {
        interrupts::window();
        if cpu.number == 0 && console::attend() {
            self.take_input();
            while let Some(console) = console::pop_resumable() {
                if let Some((_, vm)) = self.vm_of(console) {
                    vm.resume_output();
                }
            }
        }
    }

    /// Halts until there may be work.
    fn sleep(&self, cpu: &PerCpu) {
        let bit = 1 << cpu.number;
        self.idle.fetch_or(bit, Ordering::AcqRel);
        let (work, deadline) = {
            let sched = self.sched.lock();
            (sched.has_work(cpu.number), sched.next_deadline(cpu.number))
        };
        let first = cpu.number == 0;
        let console = first.then(console::wake_up_at).flatten();
        let start = first.then(|| self.next_start.load(Ordering::Relaxed));
        let deadline = deadline
            .into_iter()
            .chain(console)
            .chain(start.filter(|&at| at != u64::MAX))
            .min();
        if !work {
            match deadline {
                Some(at) => interrupts::arm_timer(at),
                None => interrupts::disarm_timer(),
            }
            interrupts::idle();
        }
        self.idle.fetch_and(!bit, Ordering::AcqRel);
    }
}

impl<B: Backend> Runner for World<B> {
    fn wake(&self, entity: EntityId) {
        let wake = self.sched.lock().wake(entity);
        let this = percpu::current().number;
        match wake {
            Wake::Nothing => {}
            Wake::Kick { pcpu } => {
                if pcpu != this
                    && let Some(cpu) = percpu::get(pcpu)
                {
                    interrupts::kick(cpu);
                }
            }
            Wake::Queued => {
                // Whoever runs this code looks at the queue before it halts; another pCPU must be told.
                let others = self.idle.load(Ordering::Acquire) & !(1 << this);
                let first = others.trailing_zeros() as usize;
                if let Some(cpu) = percpu::get(first) {
                    interrupts::kick(cpu);
                }
            }
        }
    }

    fn run(&'static self, cpu: &'static PerCpu) -> ! {
        // The first pCPU turned virtualization on in `start`, to make the vCPUs.
        if cpu.number != 0
            && let Err(e) = self.backend.enable(cpu.number)
        {
            warn!("processor {} runs no VMs: {e}", cpu.number);
            cpu::halt_forever();
        }
        loop {
            self.host_work(cpu);
            if cpu.number == 0 {
                self.start_waiting();
            }
            let next = {
                let mut sched = self.sched.lock();
                sched.expire(time::now_tsc());
                sched.pick(cpu.number)
            };
            match next {
                Some(id) => self.run_vcpu(cpu, id),
                None => self.sleep(cpu),
            }
        }
    }
}

/// The pCPU under a running vCPU.
struct HostCpu<B: Backend> {
    world: &'static World<B>,
    cpu: &'static PerCpu,
}

impl<B: Backend> Host for HostCpu<B> {
    fn now(&self) -> u64 {
        time::now_tsc()
    }

    fn arm_timer(&mut self, host_tsc: u64) {
        interrupts::arm_timer(host_tsc);
    }

    fn interrupts_wait_until(&self) -> u64 {
        match self.cpu.number {
            0 => console::look_again_at(),
            _ => u64::MAX,
        }
    }

    fn take_interrupts(&mut self) {
        self.world.host_work(self.cpu);
    }

    fn take_nmi(&mut self) {
        fault::on_nmi();
    }

    fn note(&mut self, line: String) {
        info!("{line}");
    }
}
