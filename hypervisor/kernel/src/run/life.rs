//! The life of a VM: made from its plan, started, taken down when its last vCPU has come to rest, started again.
//!
//! Making and taking down are long work: memory is zeroed. They are done with interrupts on and no lock held, by the
//! one processor that put the VM's slot into [`Phase::Changing`].

use alloc::{format, string::String, sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicU64, Ordering};

use devices::{VcpuId, uart::ConsoleSink};
use manage::{
    config::{self, AfterLastVm, ConsoleKind, VmConfig},
    console::ConsoleId,
    restart::{Decision, Ending, MAX_QUICK_FAILURES, Restarts},
};
use mem::Owner;
use sched::EntityId;
use spin::Once;
use storage::Disk;
use virt::{Backend, Exit, VcpuSetup};
use vmm::{
    clock::TimeSource,
    display::{DisplayKind, DisplaySpec},
    firmware::Firmware,
    load::{BootFiles, Module},
    vcpu::Vcpu,
    vm::{EndReason, Environment, Vm, VmSpec},
};

use super::{
    Entity, GuestConsole, Kick, NS_PER_SECOND, NoConsole, Runner, World, tables::GuestTables,
    vm_number,
};
use crate::{console, cpu, frame, info, interrupts, memory, percpu, power, sync::Lock, time};

const NS_PER_MS: u64 = 1_000_000;

/// A VM that exists.
pub(super) struct Live<B: Backend> {
    pub(super) vm: Arc<Vm>,
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
pub(super) struct BootModule {
    pub(super) data: &'static [u8],
    /// What the kernel is told of it.
    pub(super) text: String,
}

/// A VM of the configuration: what it is made of, each time.
pub(super) struct Plan {
    pub(super) config: VmConfig,
    /// Empty where firmware finds its system itself.
    pub(super) kernel: &'static [u8],
    pub(super) modules: Vec<BootModule>,
    pub(super) firmware: Option<Firmware<'static>>,
    /// The ROM by which its firmware draws.
    pub(super) vga_rom: Option<&'static [u8]>,
    /// They outlive the VM: a guest that restarts finds what it has written.
    pub(super) disks: Vec<Arc<dyn Disk>>,
    /// Its console on the terminal, if it is configured to have one.
    pub(super) console: Option<ConsoleId>,
    /// Bytes typed that it had no room for.
    pub(super) lost_input: AtomicU64,
}

/// What there is of a VM of the configuration.
pub(super) enum Phase<B: Backend> {
    /// Nothing, and nobody is about to make it.
    Off,
    /// One processor makes it or takes it down.
    Changing,
    /// Nothing; it starts again at this host TSC.
    Waiting(u64),
    Live(Live<B>),
}

/// The state of a VM of the configuration.
pub(super) struct Slot<B: Backend> {
    pub(super) phase: Phase<B>,
    /// Host time of its last start, in nanoseconds.
    pub(super) started_ns: u64,
    pub(super) restarts: Restarts,
}

impl<B: Backend> Slot<B> {
    pub(super) fn live(&self) -> Option<&Live<B>> {
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
        Some(EndReason::PowerOff | EndReason::TestExit(_) | EndReason::Forced) | None => {
            Ending::Done
        }
        Some(EndReason::TripleFault(_) | EndReason::Failure { .. }) => Ending::Failed,
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
    /// Makes the VM of a slot that is `Changing`. Returns its boot vCPU, which is to be woken. Says so, or why not;
    /// then the slot is `Off`.
    pub(super) fn ready_vm(&self, index: usize) -> Option<EntityId> {
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
    pub(super) fn start_waiting(&self) {
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
            test_devices: config.test_devices,
            cpu: processor_model(&config.cpu),
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

    /// A vCPU of an ended VM has come to rest. After the last one the VM is taken down, and
    /// made anew if it is to run again.
    pub(super) fn at_rest(&self, index: usize) {
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
    pub(super) fn finish_if_none_is_left(&self) {
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
}
