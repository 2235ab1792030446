//! The life of a VM: made from its plan, started, taken down when its last vCPU has come to rest, started again, removed.
//!
//! What is to be done when is decided by [`manage::lifecycle::Life`], which every slot has. Making, taking down
//! and removing are long work: memory is zeroed. They are done with interrupts on and no lock held, by the
//! one processor that has claimed the slot, or taken [`Live`] out of it.

use alloc::{format, string::String, sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicU64, Ordering};

use devices::{VcpuId, uart::ConsoleSink};
use manage::{
    command::VmState,
    config::{self, AfterLastVm, ConsoleKind},
    lifecycle::{After, Made, Off},
    restart::{Ending, MAX_QUICK_FAILURES},
};
use mem::{Hpa, Owner};
use sched::EntityId;
use spin::Once;
use virt::{Backend, CpuState, Exit, VcpuSetup};
use vmm::{
    clock::TimeSource,
    display::{DisplayKind, DisplaySpec},
    host::Alarm,
    load::{BootFiles, Module},
    vcpu::Vcpu,
    vm::{EndReason, Environment, Vm, VmSpec, WatchdogAction, WatchdogSpec},
};

use super::scheduling::decision_costs;
use super::{
    GuestConsole, Kick, NS_PER_SECOND, NoConsole, Runner, WORLD, World,
    slots::{Plan, Slot, VmNumber},
    tables::GuestTables,
    turn::Entity,
    verbs::Published,
};
use crate::{
    console, cpu, doors, frame, info, interrupts, memory,
    percpu::{self, PerCpu},
    power,
    sync::Lock,
    time,
};

const NS_PER_MS: u64 = 1_000_000;

/// Why a VM is not made.
pub(super) const NO_HEAP: &str =
    "the host has no memory left for its own work: stop another VM first";

/// A VM that exists.
pub(super) struct Live<B: Backend> {
    pub(super) vm: Arc<Vm>,
    pub(super) entities: Vec<EntityId>,
    /// vCPUs that have not come to rest since the VM ended.
    running: usize,
    /// Host TSC at which its making began.
    begun_tsc: u64,
    tables: Arc<GuestTables<B>>,
}

/// What `cargo xtask bench` reads of a VM (docs/MEASURING.md).
struct VmFigures {
    /// TSC ticks up to its boot vCPU's first run: from the kernel's first instruction, from the first of its making, and since its clock
    /// showed zero.
    kernel_to_entry: u64,
    vm_start: u64,
    guest_tsc_at_entry: u64,
    /// Frames that it had beside its RAM and its nested page tables.
    bytes_beside_tables: u64,
    table_bytes: u64,
}

/// Long work on a VM, for one processor.
enum Job<B: Backend> {
    Make(VmNumber),
    Remove(Slot<B>),
}

/// What kind of end this is.
fn ending(reason: Option<&EndReason>) -> Ending {
    match reason {
        Some(EndReason::Reset | EndReason::WatchdogReset) => Ending::Reset,
        Some(EndReason::PowerOff | EndReason::TestExit(_) | EndReason::Forced) | None => {
            Ending::Done
        }
        Some(
            EndReason::TripleFault(_) | EndReason::Failure { .. } | EndReason::WatchdogPowerOff,
        ) => Ending::Failed,
    }
}

/// What a watchdog does, as the VM knows it.
fn watchdog_action(watchdog: config::Watchdog) -> WatchdogAction {
    match watchdog {
        config::Watchdog::Reset => WatchdogAction::Reset,
        config::Watchdog::PowerOff => WatchdogAction::PowerOff,
        config::Watchdog::Pause => WatchdogAction::Pause,
        config::Watchdog::Nmi => WatchdogAction::Nmi,
        config::Watchdog::Log => WatchdogAction::Log,
    }
}

/// Tells the first processor of a VM's watchdog.
struct VmAlarm(VmNumber);

impl Alarm for VmAlarm {
    fn watchdog(&self) {
        if let Some(world) = WORLD.get() {
            world.alarm(self.0);
        }
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
    /// Asks the host's processor what of it works in a guest.
    fn usable_cpuid(&self, leaf: u32, subleaf: u32) -> vmm::cpuid::CpuidResult {
        let mut answer = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        self.backend.limit_cpuid(leaf, subleaf, &mut answer);
        vmm::cpuid::CpuidResult {
            eax: answer.eax,
            ebx: answer.ebx,
            ecx: answer.ecx,
            edx: answer.edx,
        }
    }

    /// Whether a pCPU is needed for something else than running vCPUs.
    #[inline]
    pub(super) fn is_wanted(&self, cpu: &PerCpu) -> bool {
        (cpu.number == 0 && doors::is_waiting()) || self.has_job_for(cpu)
    }

    /// Whether a VM is to be made or removed, by this pCPU: the first one, to which the operator talks, does that only where there is
    /// no other, and none does so between two pieces of other long work.
    #[inline]
    fn has_job_for(&self, cpu: &PerCpu) -> bool {
        self.jobs.load(Ordering::Relaxed)
            && (cpu.number != 0 || self.others.load(Ordering::Relaxed) == 0)
            && !cpu.long_work.is_between()
    }

    /// There is a VM to be made or removed: has a pCPU do it.
    pub(super) fn has_job(&self) {
        self.jobs.store(true, Ordering::Release);
        let others = self.others.load(Ordering::Relaxed);
        let idle = others & self.sched.idle().bits();
        let this = percpu::current();
        let takers = if idle != 0 { idle } else { others };
        let taker = percpu::get(takers.trailing_zeros() as usize).or(percpu::get(0));
        // This one comes by itself to its loop.
        if let Some(taker) = taker
            && taker.number != this.number
        {
            interrupts::kick(taker);
        }
    }

    /// Makes and removes VMs, if there are any to be and that is this pCPU's business; whether there were. In its
    /// loop, with no lock held.
    #[inline]
    pub(super) fn do_jobs(&self, cpu: &PerCpu) -> bool {
        let any = self.has_job_for(cpu);
        if any {
            self.do_all_jobs();
        }
        any
    }

    #[inline(never)]
    fn do_all_jobs(&self) {
        self.jobs.store(false, Ordering::Relaxed);
        self.begin_long_work();
        while let Some(job) = self.next_job() {
            match job {
                Job::Make(number) => match self.ready_vm(number) {
                    Ok(boot) => {
                        self.wake(boot);
                    }
                    Err(after) => self.follow(number, after),
                },
                Job::Remove(slot) => {
                    if let Some(console) = slot.plan.console {
                        console::detach(console);
                    }
                    let name = &slot.plan.config.name;
                    self.say(&format!("{name}: destroyed"));
                    // What its disks have kept is scrubbed.
                    self.in_pieces(|| drop(slot));
                }
            }
        }
    }

    /// Claims the next VM that is to be made, or takes out one that is to be removed.
    fn next_job(&self) -> Option<Job<B>> {
        let mut slots = self.slots.lock();
        let slot = slots.iter_mut().find(|slot| {
            let nothing_there = slot.live.is_none() && !slot.claimed;
            let starting = slot.life.state() == VmState::Starting;
            nothing_there && (starting || slot.life.is_going())
        })?;
        let number = slot.number;
        if slot.life.state() == VmState::Starting {
            slot.claimed = true;
            return Some(Job::Make(number));
        }
        slots.remove(number).map(Job::Remove)
    }

    /// Makes the VM of a slot that the caller has claimed. Returns its boot vCPU, which is to be woken. Says so,
    /// or why not.
    ///
    /// # Errors
    /// It was not made, or is not wanted any more: what is to become of it.
    pub(super) fn ready_vm(&self, number: VmNumber) -> Result<EntityId, After> {
        let gone = After::Off(Off::Operator);
        let (plan, fired) = {
            let mut slots = self.slots.lock();
            let slot = slots.get(number).ok_or(gone)?;
            if !slot.life.is_wanted() {
                slot.claimed = false;
                return Err(slot.life.not_made());
            }
            (slot.plan.clone(), slot.watchdog_fired)
        };
        let name = &plan.config.name;
        let mut made = self.make_vm(number, &plan, fired);
        let mut slots = self.slots.lock();
        if let Ok((live, boot)) = made {
            made = match self.schedule_anew(&plan, &live) {
                Ok(()) => Ok((live, boot)),
                Err(why) => {
                    drop(slots);
                    self.take_down(live);
                    slots = self.slots.lock();
                    Err(why)
                }
            };
        }
        let slot = slots.get(number).ok_or(gone)?;
        match made {
            Err(why) => {
                slot.claimed = false;
                slot.last_end = Some(format!("cannot start: {why}"));
                let after = slot.life.not_made();
                drop(slots);
                self.say(&format!("{name}: cannot start: {why}"));
                Err(after)
            }
            Ok((live, boot)) => match slot.life.made() {
                Made::Run => {
                    slot.claimed = false;
                    slot.live = Some(live);
                    slot.started_ns = time::ns();
                    drop(slots);
                    info!("{name}: starting");
                    Ok(boot)
                }
                Made::Discard => {
                    drop(slots);
                    self.take_down(live);
                    Err(self.down(number, Ending::Done))
                }
            },
        }
    }

    /// Looks whose wait, or time to shut down, is over at this host TSC, which is now; whether there was anything to do.
    /// The first processor's business.
    #[inline]
    pub(super) fn look_at_clock(&self, now: u64) -> bool {
        let due = now >= self.next_due.load(Ordering::Relaxed);
        if due {
            self.is_due(now);
        }
        due
    }

    /// Somebody's wait, or time to shut down, is over, or a watchdog was not fed.
    #[inline(never)]
    fn is_due(&self, now: u64) {
        let mut next = u64::MAX;
        let mut any_job = false;
        let mut forced = Vec::new();
        let mut alarmed = Vec::new();
        // Before the looks: whatever comes after them makes it earlier.
        self.next_due.store(u64::MAX, Ordering::Relaxed);
        let alarms = core::mem::take(&mut *self.alarms.lock());
        let mut slots = self.slots.lock();
        for slot in slots.iter_mut() {
            if alarms >> slot.number.0 & 1 != 0 {
                slot.sync();
                alarmed.push((slot.plan.clone(), slot.life.shuts_down()));
            }
            match slot.due {
                Some(at) if at <= now => {
                    slot.due = None;
                    any_job |= slot.life.wait_over();
                    if slot.life.timed_out()
                        && let Some(live) = &slot.live
                    {
                        live.vm.end(EndReason::Forced);
                        forced.push(slot.plan.clone());
                    }
                }
                Some(at) => next = next.min(at),
                None => {}
            }
        }
        self.next_due.fetch_min(next, Ordering::Relaxed);
        drop(slots);
        for (plan, shuts_down) in alarmed {
            let config = &plan.config;
            let what = match config.watchdog {
                Some(config::Watchdog::Pause) if shuts_down => "paused while it shuts down",
                Some(config::Watchdog::Pause) => "paused",
                Some(config::Watchdog::Nmi) => "NMI sent",
                _ => "nothing is done",
            };
            self.say(&format!(
                "{}: its watchdog was not fed: {what}",
                config.name
            ));
        }
        for plan in forced {
            let name = &plan.config.name;
            self.say(&format!("{name}: does not shut down: forced off"));
        }
        if any_job {
            self.has_job();
        }
    }

    /// A VM's watchdog was not fed, and has not ended the VM: the first processor is to say so.
    pub(super) fn note_alarm(&self, number: VmNumber) {
        *self.alarms.lock() |= 1 << number.0;
        self.next_due.store(0, Ordering::Relaxed);
        if percpu::current().number != 0
            && let Some(first) = percpu::get(0)
        {
            interrupts::kick(first);
        }
    }

    /// Has the first processor look at the clock at this host TSC.
    pub(super) fn look_at(&self, slot: &mut Slot<B>, at: u64) {
        slot.due = Some(at);
        self.next_due.fetch_min(at, Ordering::Relaxed);
        // It may be halted.
        if percpu::current().number != 0
            && let Some(first) = percpu::get(0)
        {
            interrupts::kick(first);
        }
    }

    /// `fired`: its watchdog ended its last run.
    fn make_vm(
        &self,
        number: VmNumber,
        plan: &Plan,
        fired: bool,
    ) -> Result<(Live<B>, EntityId), String> {
        let begun_tsc = time::now_tsc();
        let id = number.0;
        let config = &plan.config;
        if !memory::has_heap_for(plan.heap_bytes()) {
            return Err(String::from(NO_HEAP));
        }
        let kick = Arc::new(Kick {
            vm: number,
            entities: Once::new(),
        });
        let console: Arc<dyn ConsoleSink> = match plan.console {
            Some(console) if config.console == ConsoleKind::Serial => {
                Arc::new(GuestConsole(console))
            }
            _ => Arc::new(NoConsole),
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
            watchdog: config.watchdog.map(|watchdog| WatchdogSpec {
                action: watchdog_action(watchdog),
                fired,
            }),
            test_devices: config.test_devices,
            cpu: processor_model(&config.cpu),
            tsc_hz: config.cpu.tsc_khz.map(|khz| u64::from(khz) * 1000),
            display: DisplaySpec {
                kind: match config.display {
                    config::DisplayKind::None => DisplayKind::None,
                    config::DisplayKind::VgaText => DisplayKind::VgaText,
                    config::DisplayKind::Ramfb => DisplayKind::Ramfb,
                },
                rom: plan.vga_rom,
                is_console: config.console == ConsoleKind::Display,
            },
        };
        let environment = Environment {
            memory: &memory::HOST,
            cpuid: &|leaf, subleaf| self.usable_cpuid(leaf, subleaf),
            arch_capabilities: self.backend.arch_capabilities(),
            time: TimeSource {
                read: time::now_tsc,
                hz: time::hz(),
                stable: time::is_stable(),
            },
            tsc_scaling: self.backend.tsc_scaling(),
            epoch: self.boot_epoch + time::ns() / NS_PER_SECOND,
            console,
            kick: kick.clone(),
            alarm: Arc::new(VmAlarm(number)),
        };
        // Memory is zeroed and files are copied: long work.
        let (vm, entry) = self.in_pieces(|| Vm::new(spec, environment)).map_err(|e| {
            if e.is_of_file() {
                // The first file is what the VM boots: its firmware, or its kernel.
                let file = config.boot.paths().next().unwrap_or_default();
                format!("{file}: {e}")
            } else {
                format!("{e}")
            }
        })?;
        let made = interrupts::open(|| GuestTables::new(self.backend, id, &vm.memory))
            .map_err(|e| format!("{e}"))
            .and_then(|tables| {
                vm.set_nested(tables.clone());
                let entities = self.make_vcpus(number, plan, &vm, &entry, tables.root(), &kick)?;
                Ok((tables, entities))
            });
        let (tables, entities) = match made {
            Ok(made) => made,
            Err(why) => {
                // Its memory is zeroed once more.
                self.in_pieces(|| drop(vm));
                return Err(why);
            }
        };
        kick.entities.call_once(|| entities.clone());
        let boot = entities[0];
        let running = entities.len();
        Ok((
            Live {
                vm,
                entities,
                running,
                begun_tsc,
                tables,
            },
            boot,
        ))
    }

    /// Makes a VM's vCPUs, which do not run yet; the first one starts at `entry`.
    ///
    /// # Errors
    /// One could not be made, or cannot be scheduled as the plan says; then none is left.
    fn make_vcpus(
        &self,
        number: VmNumber,
        plan: &Plan,
        vm: &Arc<Vm>,
        entry: &CpuState,
        nested_root: Hpa,
        kick: &Arc<Kick>,
    ) -> Result<Vec<EntityId>, String> {
        let pcpu = percpu::current().number;
        let params = self.params(plan, &plan.sched.lock())?;
        let mut entities = Vec::new();
        let mut make = |vcpu: u16, vcpu_number: u8| {
            let added = self.sched.add(params, time::now_tsc());
            let entity = added.map_err(|why| format!("{why}"))?;
            entities.push(entity);
            let hw = self
                .backend
                .create_vcpu(VcpuSetup {
                    vm: number.0,
                    vcpu,
                    tag: entity.0 + 1,
                    nested_root,
                })
                .map_err(|e| format!("{e}"))?;
            let start = (vcpu == 0).then_some(entry);
            let vcpu = Vcpu::new(vm.clone(), VcpuId(u32::from(vcpu)), hw, start, pcpu)
                .ok_or_else(|| format!("there is no vCPU {vcpu}"))?;
            self.place(
                entity,
                Entity {
                    vm: number,
                    number: vcpu_number,
                    first_run: AtomicU64::new(0),
                    siblings: kick.clone(),
                    vcpu: Lock::new(vcpu),
                    exits: Published::default(),
                },
            );
            Ok(())
        };
        let mut all = (0..plan.config.vcpus).zip(0..);
        let made = all.try_for_each(|(vcpu, vcpu_number)| make(vcpu, vcpu_number));
        if made.is_err() {
            for &entity in &entities {
                self.bury(entity);
            }
        }
        made.map(|()| entities)
    }

    /// Has the vCPUs of a VM, which do not run yet, scheduled as its plan says by now: that may have changed while it was made.
    ///
    /// # Errors
    /// What it says cannot be had.
    fn schedule_anew(&self, plan: &Plan, live: &Live<B>) -> Result<(), String> {
        let params = self.params(plan, &plan.sched.lock())?;
        let same = |&entity: &EntityId| self.sched.params(entity) == Some(params);
        if live.entities.iter().all(same) {
            return Ok(());
        }
        let changed = self
            .sched
            .set_params(&live.entities, params, time::now_tsc());
        for pcpu in changed.map_err(|why| format!("{why}"))?.iter() {
            self.kick(Some(pcpu));
        }
        Ok(())
    }

    fn place(&self, id: EntityId, entity: Entity<B>) {
        self.entities.put(id, Some(Arc::new(entity)));
    }

    /// Forgets an entity that does not run.
    fn bury(&self, id: EntityId) {
        let removed = self.sched.remove(id, time::now_tsc());
        debug_assert!(removed, "a running vCPU cannot be buried");
        self.entities.put(id, None);
    }

    /// Takes a VM down that does not run: nothing is left of it.
    fn take_down(&self, live: Live<B>) {
        for &entity in &live.entities {
            self.bury(entity);
        }
        // Its memory is zeroed: long work.
        self.in_pieces(|| drop(live));
    }

    /// A vCPU of an ended VM has come to rest. After the last one the VM is handed out, to be taken down.
    fn take_ended(&self, number: VmNumber) -> Option<Live<B>> {
        let mut slots = self.slots.lock();
        let slot = slots.get(number)?;
        let live = slot.live.as_mut()?;
        live.running = live.running.saturating_sub(1);
        if live.running > 0 {
            return None;
        }
        slot.life.at_rest();
        slot.claimed = true;
        slot.due = None;
        slot.live.take()
    }

    /// A vCPU of an ended VM has come to rest. After the last one the VM is taken down, and
    /// made anew if it is to run again.
    pub(super) fn at_rest(&self, number: VmNumber) {
        let Some(live) = self.take_ended(number) else {
            return;
        };
        self.begin_long_work();
        let reason = live.vm.take_end_reason();
        // What its devices still hold: a FIFO at most, or as much as goes out while a reader waits for it.
        if frame::is_used() {
            console::flush();
        }
        live.vm.resume_output();
        frame::end(frame::Outcome::of(reason.as_ref()));
        let name = live.vm.name.clone();
        self.log_exits(&name, &live.entities);
        let figures = self.figures.then(|| self.figures_of(number, &live));
        let heap_bytes = memory::heap_used();
        self.take_down(live);
        if let Some(figures) = figures.flatten() {
            let heap_bytes = heap_bytes.saturating_sub(memory::heap_used());
            self.say_figures(&name, &figures, heap_bytes as u64);
        }
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
        if let Some(slot) = self.slots.lock().get(number) {
            slot.last_end = text.lines().next().map(String::from);
            slot.watchdog_fired = matches!(
                reason,
                Some(EndReason::WatchdogReset | EndReason::WatchdogPowerOff)
            );
        }
        let after = self.down(number, ending(reason.as_ref()));
        self.follow(number, after);
    }

    /// Nothing is left of a VM that ended so: what is to become of it.
    fn down(&self, number: VmNumber, ending: Ending) -> After {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get(number) else {
            return After::Off(Off::Operator);
        };
        slot.claimed = false;
        let ran_ms = time::ns().saturating_sub(slot.started_ns) / NS_PER_MS;
        // A frame is for one run.
        let (policy, ending) = match frame::is_used() {
            true => (config::Restart::Never, Ending::Done),
            false => (slot.plan.config.restart, ending),
        };
        slot.life.down(policy, ending, ran_ms)
    }

    /// Does what is to become of a VM of which nothing is left.
    fn follow(&self, number: VmNumber, after: After) {
        let name = {
            let mut slots = self.slots.lock();
            let Some(slot) = slots.get(number) else {
                return;
            };
            if let After::Wait { ms } = after {
                // An operator may have decided otherwise in this very moment.
                if slot.life.state() != VmState::Waiting {
                    return;
                }
                let at = time::now_tsc() + time::us_to_ticks(ms * 1000);
                self.look_at(slot, at);
            }
            slot.plan.config.name.clone()
        };
        match after {
            After::Make | After::Remove => self.has_job(),
            After::Wait { ms } => self.say(&format!(
                "{name}: ended soon after its start, again: starts in {} s",
                ms / 1000
            )),
            After::Off(Off::Operator) => {}
            After::Off(Off::Itself) => self.finish_if_none_is_left(),
            After::Off(Off::GaveUp) => {
                self.say(&format!(
                    "{name}: failed {MAX_QUICK_FAILURES} times soon after its start: not restarted any more"
                ));
                self.finish_if_none_is_left();
            }
        }
    }

    fn log_exits(&self, name: &str, entities: &[EntityId]) {
        for id in entities {
            let Some(entity) = self.entities.get(*id) else {
                continue;
            };
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

    /// The figures of a VM that has come to rest and is there yet. `None`: it has no vCPU.
    fn figures_of(&self, number: VmNumber, live: &Live<B>) -> Option<VmFigures> {
        let boot = live
            .entities
            .first()
            .and_then(|&id| self.entities.get(id))?;
        let first_run = boot.first_run.load(Ordering::Relaxed);
        let since = |start: u64| first_run.wrapping_sub(start);
        let tables = live.tables.frames();
        let frames = memory::HOST.used(Owner::VmTables(number.0));
        Some(VmFigures {
            kernel_to_entry: since(time::ENTRY_TSC.load(Ordering::Relaxed)),
            vm_start: since(live.begun_tsc),
            guest_tsc_at_entry: since(live.vm.clock.to_host(0)),
            bytes_beside_tables: frames.saturating_sub(tables) * mem::PAGE_SIZE,
            table_bytes: tables * mem::PAGE_SIZE,
        })
    }

    /// What `cargo xtask bench` reads of a VM, of which nothing is left; so many bytes of the heap it gave back (docs/MEASURING.md).
    fn say_figures(&self, name: &str, figures: &VmFigures, heap_bytes: u64) {
        self.say(&format!(
            "{name}: figures: kernel-to-entry {} vm-start {} guest-tsc-at-entry {} \
             vm-overhead-bytes {} nested-table-bytes {}",
            figures.kernel_to_entry,
            figures.vm_start,
            figures.guest_tsc_at_entry,
            figures.bytes_beside_tables + heap_bytes,
            figures.table_bytes,
        ));
        self.say(&format!("{name}: decisions:{}", decision_costs()));
    }

    /// Ends the host's work, as it is configured, when all VMs have ended.
    pub(super) fn finish_if_none_is_left(&self) {
        let is_off = |slot: &Slot<B>| slot.life.state() == VmState::Off;
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
            AfterLastVm::Stay => self.say("the last VM has ended"),
        }
    }
}
