//! The VMs of this host: made from the configuration, run on every pCPU, restarted or buried.
//!
//! [`start`] reads the bundle, makes the VMs and leaves a [`World`] behind, in which every
//! pCPU then runs its loop. That loop lets host interrupts in, asks `sched` for a vCPU, runs it
//! until it pauses, and halts when there is none. The vendor is chosen once, here.
//!
//! What an operator asks for is done here, too ([`verbs`]): only in the first pCPU's loop, where no lock is held and no
//! vCPU is loaded. Nobody waits there for a guest, or for a VM to be made: that is a job for another pCPU, if there is one.
//!
//! Lock order: one vCPU, then `slots`, then `entities`, then a device's, then one of `sched`'s (a kick comes
//! from under a device's lock; `sched` has one for each pCPU and never holds two), then the console's (guest output comes
//! from under the serial port's). All
//! locks of the host are in one table in docs/ARCHITECTURE.md. No lock is held while a guest runs, but for
//! the vCPU's own, which nobody else waits for.

mod life;
mod long_work;
mod scheduling;
mod slots;
mod tables;
mod turn;
mod verbs;

use alloc::{boxed::Box, format, string::String, vec::Vec};
use core::{
    convert::Infallible,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use devices::{VcpuId, lapic::VcpuKick, uart::ConsoleSink};
use drivers::wall_clock;
use manage::{
    bundle::{self, Bundle, BundleEnvironment},
    command::{Answer, Request, VmState},
    config::{self, AfterLastVm, Config, ConsoleKind, Pools},
    console::{ConsoleId, Input},
    lifecycle::Life,
    trace::Kind,
};
use sched::{EntityId, Outcome, Scheduler};
use spin::Once;
use virt::{Backend, svm::Svm, vtx::Vtx};
use vmm::vm::Vm;

pub use long_work::LongWork;
use slots::{Plan, Slot, Slots, VmNumber};
use turn::Entities;

use crate::{
    boot::Machine,
    console, control, cpu, display, doors, error, fault, frame, info, interrupts, journal, log,
    memory,
    percpu::{self, PerCpu},
    power,
    preflight::Vendor,
    sync::Lock,
    time, trace, warn,
};

/// vCPUs that the host has at most.
const MAX_VCPUS: usize = config::MAX_VMS * config::MAX_VCPUS as usize;
const NS_PER_SECOND: u64 = 1_000_000_000;

/// What the parts of the kernel that don't know the vendor see of the world.
trait Runner: Sync {
    fn wake(&self, entity: EntityId) -> Outcome;
    fn alarm(&self, vm: VmNumber);
    fn run(&'static self, cpu: &'static PerCpu) -> !;
    /// Does one round of this pCPU's loop between two pieces of its long work.
    fn give_way(&'static self, cpu: &'static PerCpu);
}

static WORLD: Once<&'static dyn Runner> = Once::new();

/// Everything that runs on this host.
struct World<B: Backend> {
    backend: &'static B,
    bundle: Bundle<'static>,
    /// Unix time at which this host's kernel was entered, in seconds.
    boot_epoch: u64,
    after_last_vm: AfterLastVm,
    /// Whether figures are wanted at a VM's end.
    figures: bool,
    sched: Scheduler,
    pools: Pools,
    entities: Entities<B>,
    slots: Lock<Slots<B>>,
    /// Host TSC at which the first VM's wait, or its time to shut down, is over; `u64::MAX` if there is none.
    next_due: AtomicU64,
    /// There is a VM to be made or removed.
    jobs: AtomicBool,
    /// A bit per pCPU but the first that runs VMs.
    others: AtomicU64,
    /// VMs whose watchdog was not fed: a bit by number.
    alarms: Lock<u128>,
    /// The operator wants the machine off.
    power_off: AtomicBool,
    /// Losses of input by the host's port that were told.
    told_lost_input: AtomicU64,
}

/// Wakes the vCPUs of one VM.
struct Kick {
    vm: VmNumber,
    entities: Once<Vec<EntityId>>,
}

impl VcpuKick for Kick {
    fn kick(&self, vcpu: VcpuId) {
        let entity = self.entities.get().and_then(|all| all.get(vcpu.0 as usize));
        if let (Some(&entity), Some(world)) = (entity, WORLD.get()) {
            let outcome = world.wake(entity);
            if trace::is_on() && outcome == Outcome::Waiting {
                trace::record(Kind::Wake, (self.vm.0, vcpu.0 as u8), 0, 0);
            }
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

    console::begin(config.host.console_escape);
    if config.host.control {
        control::start(&machine.firmware);
    }
    let now = wall_clock::read_epoch().unwrap_or_else(|| {
        warn!("the CMOS clock shows no date: guests start in 1970");
        0
    });
    let slots: Vec<Slot<B>> = (1..)
        .map(VmNumber)
        .zip(config.vms)
        .map(|(number, vm)| {
            let life = match vm.autostart {
                true => Life::starting(),
                false => Life::off(),
            };
            let mut slot = Slot::new(number, Plan::new(vm, number, bundle), life);
            // This processor makes it, below.
            slot.claimed = life.state() == VmState::Starting;
            slot
        })
        .collect();
    let starting: Vec<VmNumber> = slots
        .iter()
        .filter(|slot| slot.claimed)
        .map(|slot| slot.number)
        .collect();
    let world: &'static World<B> = Box::leak(Box::new(World {
        backend,
        bundle: machine.bundle.clone(),
        boot_epoch: now.saturating_sub(time::ns() / NS_PER_SECOND),
        after_last_vm: config.host.after_last_vm,
        figures: config.host.figures,
        sched: scheduling::scheduler(&config.host.pools),
        pools: config.host.pools,
        // All at once: what a VM that comes and goes leaves behind must not depend on how many came before.
        entities: Entities::new(MAX_VCPUS),
        slots: Lock::new(Slots::new(slots)),
        next_due: AtomicU64::new(u64::MAX),
        jobs: AtomicBool::new(false),
        others: AtomicU64::new(0),
        alarms: Lock::new(0),
        power_off: AtomicBool::new(false),
        told_lost_input: AtomicU64::new(0),
    }));
    vmm::emulate::warm_up();
    if let Some(word) = &config.host.console_frame {
        frame::begin(word);
    }
    WORLD.call_once(|| world);
    memory::HOST.on_long_work(long_work::breathe);
    let wanted = starting.len();
    let made: Vec<_> = starting
        .into_iter()
        .filter_map(|vm| world.ready_vm(vm).ok())
        .collect();
    if made.is_empty() && wanted > 0 && world.after_last_vm != AfterLastVm::Stay {
        return Err(String::from("no VM could be started"));
    }
    // From here on the serial line is the guests'.
    log::quiet_serial(true);
    for boot in made {
        world.wake(boot);
    }
    // Those that started may have ended while the others were made.
    if wanted > 0 {
        world.finish_if_none_is_left();
    }
    for number in 0..percpu::count() {
        if let Some(other) = percpu::get(number).filter(|other| other.number != cpu.number) {
            interrupts::kick(other);
        }
    }
    world.run(cpu)
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
        pools: None,
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

/// The loop of every processor but the first: waits until there are VMs, then runs them.
pub fn cpu_main(cpu: &'static PerCpu) -> ! {
    loop {
        if let Some(world) = WORLD.get() {
            world.run(cpu)
        }
        interrupts::idle();
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

    /// This pCPU does long work, until it picks again: others run what waits here.
    fn begin_long_work(&self) {
        let kick = self.sched.go_away(percpu::current().number);
        self.kick(kick);
    }

    /// Has a pCPU look up: interrupts it, or notes it if it is this one, which looks before it halts or enters a guest.
    #[inline]
    fn kick(&self, pcpu: Option<usize>) {
        let Some(pcpu) = pcpu else { return };
        let this = percpu::current();
        if pcpu == this.number {
            this.kicked.store(true, Ordering::Relaxed);
        } else if let Some(cpu) = percpu::get(pcpu) {
            interrupts::kick(cpu);
        }
    }

    /// Does something with the VM behind a console, if it is made.
    fn with_vm_of<R>(&self, console: ConsoleId, act: impl FnOnce(&Plan, &Vm) -> R) -> Option<R> {
        let slots = self.slots.lock();
        let slot = slots
            .iter()
            .find(|slot| slot.plan.console == Some(console))?;
        Some(act(&slot.plan, &slot.live.as_ref()?.vm))
    }

    /// Shows a piece of the display of the VM whose console the terminal shows. The first processor's business.
    #[inline(never)]
    fn show_display(&self) {
        let console = console::focus();
        // Held meanwhile, so that the VM is not taken down here.
        let slots = self.slots.lock();
        let slot = slots.iter().find(|slot| slot.plan.console == Some(console));
        let live = slot.and_then(|slot| slot.live.as_ref());
        display::step(&display::Target {
            vm: live.map(|live| &*live.vm),
            console: slot
                .is_some_and(|slot| slot.plan.config.console == ConsoleKind::Display)
                .then_some(console),
        });
    }

    /// Gives what was typed to whom it is for.
    fn take_input(&self) {
        while let Some(input) = console::read() {
            match input {
                // The shell reads its own.
                Input::Handled | Input::Shell(_) => {}
                Input::ToggleDisplay => display::toggle(),
                Input::Guest(to, byte) => {
                    let lost = self.with_vm_of(to, |plan, vm| {
                        (vm.receive(&[byte]) == 0).then(|| {
                            let lost = plan.lost_input.fetch_add(1, Ordering::Relaxed) + 1;
                            (lost, plan.config.name.clone())
                        })
                    });
                    // So that the note does not become a flood.
                    if let Some(Some((lost, name))) = lost
                        && lost.is_power_of_two()
                    {
                        warn!("{name}: reads no input: {lost} typed bytes are lost");
                    }
                }
                Input::PowerOff(door) => {
                    let text = String::from("powering off");
                    let outcome = Ok(Answer::Done { text });
                    journal::note(door, &Request::HostPowerOff {}, &outcome);
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

    /// Host work between vCPUs and after each host interrupt. The host TSC behind the interrupts.
    #[inline(always)]
    fn host_work(&self, cpu: &PerCpu) -> u64 {
        interrupts::window();
        let now = time::now_tsc();
        if cpu.number == 0 {
            control::attend(now);
            if console::attend(now) {
                self.serve_console();
            }
        }
        now
    }

    /// Input has come, or a guest can go on writing.
    #[inline(never)]
    fn serve_console(&self) {
        self.take_input();
        while let Some(console) = console::pop_resumable() {
            self.with_vm_of(console, |_, vm| vm.resume_output());
        }
    }

    /// One round of this pCPU's loop: all that is due, and a turn of a vCPU. `false`: there was nothing to do but to sleep.
    fn round(&'static self, cpu: &'static PerCpu) -> bool {
        let now = self.other_work(cpu);
        self.do_jobs(cpu) || self.run_next(cpu, now)
    }

    /// What this pCPU does beside running vCPUs and making VMs. The host TSC behind it.
    #[inline(always)]
    fn other_work(&self, cpu: &PerCpu) -> u64 {
        let now = self.host_work(cpu);
        match cpu.number {
            0 => self.first_ones_work(cpu, now),
            _ => now,
        }
    }

    /// What only the first pCPU does. The host TSC behind it.
    #[inline(always)]
    fn first_ones_work(&self, cpu: &PerCpu, mut now: u64) -> u64 {
        let mut is_later = false;
        loop {
            is_later |= doors::serve(self);
            if self.power_off.load(Ordering::Relaxed) {
                control::flush();
                power::off();
            }
            // Behind what a door has taken there may be more, for others.
            if !console::has_work() {
                break;
            }
            now = self.host_work(cpu);
        }
        is_later |= self.look_at_clock(now);
        if display::is_due(now) {
            self.show_display();
            is_later = true;
        }
        match is_later {
            true => time::now_tsc(),
            false => now,
        }
    }

    /// Halts until there may be work, after `sched` had none. What makes some from then on interrupts this pCPU.
    fn sleep(&self, cpu: &PerCpu) {
        let first = cpu.number == 0;
        let console = first.then(console::wake_up_at).flatten();
        let due = first.then(|| self.next_due.load(Ordering::Relaxed));
        let display = first.then(display::wake_up_at).flatten();
        let doors = first.then(doors::wake_up_at).flatten();
        let deadline = self
            .sched
            .next_deadline(cpu.number)
            .into_iter()
            .chain(console)
            .chain(display)
            .chain(doors)
            .chain(due.filter(|&at| at != u64::MAX))
            .chain(first.then(control::wake_up_at).flatten())
            .min();
        if self.is_wanted(cpu) {
            return;
        }
        match deadline {
            Some(at) => interrupts::arm_timer(at),
            None => interrupts::disarm_timer(),
        }
        interrupts::idle();
    }
}

impl<B: Backend> Runner for World<B> {
    fn wake(&self, entity: EntityId) -> Outcome {
        let wake = self.sched.wake(entity, time::now_tsc());
        self.kick(wake.kick);
        wake.outcome
    }

    fn alarm(&self, vm: VmNumber) {
        self.note_alarm(vm);
    }

    fn run(&'static self, cpu: &'static PerCpu) -> ! {
        // The first pCPU turned virtualization on in `start`, to make the vCPUs.
        if cpu.number != 0
            && let Err(e) = self.backend.enable(cpu.number)
        {
            warn!("processor {} runs no VMs: {e}", cpu.number);
            for other in self.sched.take_offline(cpu.number, time::now_tsc()).iter() {
                self.kick(Some(other));
            }
            cpu::halt_forever();
        }
        if cpu.number != 0 {
            self.others.fetch_or(1 << cpu.number, Ordering::Relaxed);
        }
        cpu.long_work.enter_loop();
        loop {
            if !self.round(cpu) {
                self.sleep(cpu);
            }
        }
    }

    fn give_way(&'static self, cpu: &'static PerCpu) {
        self.round(cpu);
        self.begin_long_work();
    }
}
