//! What an operator asks for: [`Operate`] for the [`World`].
//!
//! All of it is short and waits for nobody. It runs in the first pCPU's loop, with no vCPU loaded and no lock
//! held. A verb for a VM is decided by its [`Life`](manage::lifecycle::Life) and begun under the lock of the slots, so that
//! no other processor takes the VM down meanwhile.

use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::sync::atomic::{AtomicU64, Ordering};

use devices::VcpuId;
use manage::{
    bundle::BundleEnvironment,
    command::{
        Answer, DEFAULT_STOP_TIMEOUT_S, Failure, FailureCode, HostDetails, MAX_STOP_TIMEOUT_S,
        Operate, Request, VERSION, VcpuStats, VmDetails, VmState, VmSummary,
    },
    config::{self, AddError, DiskConfig, MAX_VMS, Restart, VmConfig},
    lifecycle::{Life, Step, Verb},
};
use mem::{Owner, PAGE_SIZE};
use virt::{Backend, Exit};
use vmm::{vcpu::ExitCounters, vm::EndReason};

use super::{
    World,
    life::NO_HEAP,
    scheduling::{Shows, parameters},
    slots::{Plan, Slot, Slots},
};
use crate::{cpu, log, memory, percpu, sync::Lock, time, trace};

/// How old the exit counters of a vCPU that runs may be, in microseconds.
const PUBLISH_EVERY_US: u64 = 100_000;
/// Lines of the log that are told unless the request says how many, and at most.
const LOG_LINES: u32 = 200;
const MAX_LOG_LINES: u32 = 2_000;

/// A vCPU's exit counters, for others than the pCPU that runs it.
pub(super) struct Published {
    /// Host TSC from which on they are to be published again.
    due: AtomicU64,
    counters: Lock<ExitCounters>,
}

impl Default for Published {
    fn default() -> Self {
        Published {
            due: AtomicU64::new(0),
            counters: Lock::new([0; Exit::KINDS]),
        }
    }
}

impl Published {
    /// Publishes them, from time to time; the host TSC is `now`.
    pub(super) fn publish(&self, counters: &ExitCounters, now: u64) {
        if now >= self.due.load(Ordering::Relaxed) {
            let next = now + time::us_to_ticks(PUBLISH_EVERY_US);
            self.due.store(next, Ordering::Relaxed);
            *self.counters.lock() = *counters;
        }
    }

    /// As they were when they were published last.
    pub(super) fn counters(&self) -> ExitCounters {
        *self.counters.lock()
    }
}

/// Bytes of frames that a VM takes beside its RAM, at most: nested page tables, and what the processor keeps of each vCPU.
fn tables_bytes(config: &VmConfig) -> u64 {
    const FIXED: u64 = 64 << 10;
    const OF_VCPU: u64 = 4 * PAGE_SIZE;
    // Eight bytes for each page, where none is large.
    config.memory / 512 + u64::from(config.vcpus) * OF_VCPU + FIXED
}

fn failure<T>(code: FailureCode, message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::new(code, message))
}

fn done(text: String) -> Result<Answer, Failure> {
    Ok(Answer::Done { text })
}

pub(super) fn no_such_vm(name: &str) -> Failure {
    let message = format!("there is no VM {name:?}: the list of VMs has the names");
    Failure::new(FailureCode::NotFound, message)
}

impl<B: Backend> World<B> {
    /// Asks a VM's life, and takes the step that it wants. `timeout_s`: of [`Verb::Stop`]. `vcpu`: of [`Verb::Nmi`].
    fn ask(&self, name: &str, verb: Verb, timeout_s: u32, vcpu: VcpuId) -> Result<Answer, Failure> {
        let mut slots = self.slots.lock();
        let mut left = self.memory_left(&slots);
        let slot = slots.named(name).ok_or_else(|| no_such_vm(name))?;
        if slot.life.state() == VmState::Waiting {
            // It was promised to this very VM.
            left = left.saturating_add(slot.plan.config.memory);
        }
        if verb == Verb::Nmi && vcpu.0 >= u32::from(slot.plan.config.vcpus) {
            let count = slot.plan.config.vcpus;
            let message = format!("{name}: there is no vCPU {}; it has {count}", vcpu.0);
            return failure(FailureCode::NotFound, message);
        }
        slot.sync();
        let mut life = slot.life;
        let (step, text) = life
            .ask(verb)
            .map_err(|why| Failure::new(FailureCode::WrongState, format!("{name}: {why}")))?;
        let config = &slot.plan.config;
        let needed = config.memory;
        if step == Step::Make && needed + tables_bytes(config) > left {
            let message = format!(
                "{name}: needs {} of memory, and the host has {} left: stop another VM first",
                config::size(needed),
                config::size(left)
            );
            return failure(FailureCode::NoRoom, message);
        }
        if step == Step::Make && !memory::has_heap_for(slot.plan.heap_bytes()) {
            return failure(FailureCode::NoRoom, format!("{name}: {NO_HEAP}"));
        }
        slot.life = life;
        let mut text = format!("{name}: {text}");
        let vm = slot.live.as_ref().map(|live| &*live.vm);
        let mut any_job = false;
        match (step, vm) {
            (Step::Make | Step::Remove, _) => any_job = true,
            (Step::PressButton, Some(vm)) => {
                vm.press_power_button();
                let ticks = time::us_to_ticks(u64::from(timeout_s) * 1_000_000);
                self.look_at(slot, time::now_tsc() + ticks);
                text += &format!("; forced off after {timeout_s} s");
            }
            (Step::Force, Some(vm)) => vm.end(EndReason::Forced),
            (Step::Reset, Some(vm)) => vm.end(EndReason::Reset),
            (Step::Pause, Some(vm)) => {
                vm.pause();
            }
            (Step::Resume, Some(vm)) => {
                vm.resume();
            }
            (Step::Nmi, Some(vm)) => {
                vm.inject_nmi(vcpu);
            }
            // It has ended in this very moment: what was asked for decides what follows.
            (_, None) | (Step::Noted, _) => {}
        }
        drop(slots);
        if any_job {
            self.has_job();
        }
        done(text)
    }

    /// Bytes of memory that no VM has or may still ask for: a VM that starts, or comes back, takes its RAM, and any VM's disks may
    /// grow to their limits.
    fn memory_left(&self, slots: &Slots<B>) -> u64 {
        // At one moment: other processors take and give back memory meanwhile, which must not count as free and as taken.
        let (free, promised) = memory::HOST.counts(|frames| {
            let promised = slots.iter().map(|slot| {
                let config = &slot.plan.config;
                let changes = config.disks.iter().map(|disk| disk.changes);
                let changes = changes.fold(0, u64::saturating_add);
                let taken = frames.used(Owner::VmDisks(slot.number.0)) * PAGE_SIZE;
                let ram = match slot.live {
                    None if slot.life.comes_back() => config.memory,
                    _ => 0,
                };
                let ram_taken = frames.used(Owner::VmRam(slot.number.0)) * PAGE_SIZE;
                changes.saturating_sub(taken) + ram.saturating_sub(ram_taken)
            });
            let promised = promised.fold(0, u64::saturating_add);
            (frames.free() * PAGE_SIZE, promised)
        });
        free.saturating_sub(promised)
    }

    fn create(&self, text: &str) -> Result<Answer, Failure> {
        if !memory::has_heap_for(0) {
            return failure(FailureCode::NoRoom, NO_HEAP);
        }
        let left = self.memory_left(&self.slots.lock());
        let policies = self.sched.pools().map(|pool| pool.policy);
        let pools = self.pools.with_policies(policies);
        let surroundings = BundleEnvironment {
            bundle: &self.bundle,
            memory_bytes: left,
            processors: percpu::count(),
            pools: Some(&pools),
        };
        let config = config::parse_added(text, &surroundings).map_err(|e| match e {
            AddError::Bad(why) => Failure::new(FailureCode::BadRequest, why),
            AddError::NoMemory(why) => Failure::new(FailureCode::NoRoom, why),
        })?;
        let name = config.name.clone();
        let number = {
            let mut slots = self.slots.lock();
            if let Some(slot) = slots.named(&name) {
                return match slot.life.is_going() {
                    true => failure(
                        FailureCode::Busy,
                        format!("{name}: the VM of this name is being destroyed: try again"),
                    ),
                    false => failure(
                        FailureCode::Exists,
                        format!("{name}: there is a VM of this name already"),
                    ),
                };
            }
            slots.free_number()
        };
        let Some(number) = number else {
            let message = format!("there are {MAX_VMS} VMs already: destroy one first");
            return failure(FailureCode::NoRoom, message);
        };
        // Only this processor creates VMs, so number and name are still free.
        let plan = Plan::new(config, number, &self.bundle);
        let slot = Slot::new(number, plan, Life::off());
        self.slots.lock().push(slot);
        done(format!("{name}: created; it is off"))
    }

    pub(super) fn summary(&self, slot: &Slot<B>) -> VmSummary {
        let config = &slot.plan.config;
        let uptime_ns = match slot.live {
            Some(_) => time::ns().saturating_sub(slot.started_ns),
            None => 0,
        };
        VmSummary {
            name: config.name.clone(),
            state: slot.life.state(),
            vcpus: config.vcpus,
            memory_bytes: config.memory,
            uptime_ns,
            run_ns: self.run_ns(slot),
            starts: slot.life.starts(),
            last_end: slot.last_end.clone(),
        }
    }

    /// What a VM's vCPUs have run, together.
    fn run_ns(&self, slot: &Slot<B>) -> u64 {
        let now = time::now_tsc();
        let entities = slot.live.iter().flat_map(|live| &live.entities);
        entities
            .filter_map(|&id| self.sched.metrics(id, now))
            .map(|metrics| time::ticks_to_ns(metrics.run))
            .sum()
    }

    pub(super) fn vcpus(&self, slot: &Slot<B>, shows: Shows) -> Vec<VcpuStats> {
        let entities = slot.live.iter().flat_map(|live| &live.entities);
        (0..)
            .zip(entities)
            .map(|(number, &entity)| self.vcpu(slot, number, entity, shows))
            .collect()
    }

    fn details(&self, slot: &Slot<B>) -> VmDetails {
        let config = &slot.plan.config;
        let disk = |disk: &DiskConfig| match disk.readonly {
            true => format!("{}, read-only", disk.image),
            false => format!(
                "{}, up to {} of changes",
                disk.image,
                config::size(disk.changes)
            ),
        };
        VmDetails {
            summary: self.summary(slot),
            boot: config
                .boot
                .paths()
                .next()
                .map(String::from)
                .unwrap_or_default(),
            cmdline: config.boot.cmdline.clone(),
            restart: String::from(match config.restart {
                Restart::Never => "never",
                Restart::OnFailure => "on-failure",
                Restart::Always => "always",
            }),
            disks: config.disks.iter().map(disk).collect(),
            sched: parameters(&slot.plan.sched.lock()),
            vcpu: self.vcpus(slot, Shows::Histogram),
        }
    }

    fn host(&self) -> HostDetails {
        let statistics = memory::HOST.statistics();
        let processor = cpu::cpuid().get_processor_brand_string();
        HostDetails {
            version: env!("CARGO_PKG_VERSION").to_string(),
            protocol: VERSION,
            backend: String::from(B::NAME),
            processor: processor.map_or_else(String::new, |name| name.as_str().trim().to_string()),
            pcpus: percpu::count() as u32,
            tsc_hz: time::hz(),
            uptime_ns: time::ns(),
            memory_bytes: statistics.total * PAGE_SIZE,
            memory_free_bytes: statistics.free * PAGE_SIZE,
            heap_bytes: memory::heap_used() as u64,
        }
    }
}

impl<B: Backend> Operate for World<B> {
    fn operate(&self, request: &Request) -> Result<Answer, Failure> {
        let ask = |vm: &str, verb| self.ask(vm, verb, 0, VcpuId(0));
        match request {
            Request::VmList {} => {
                let slots = self.slots.lock();
                let vms = slots.iter().map(|slot| self.summary(slot)).collect();
                Ok(Answer::Vms { vms })
            }
            Request::VmShow { vm } => {
                let mut slots = self.slots.lock();
                let slot = slots.named(vm).ok_or_else(|| no_such_vm(vm))?;
                let vm = self.details(slot);
                Ok(Answer::Vm { vm })
            }
            Request::VmCreate { config } => self.create(config),
            Request::VmStart { vm } => ask(vm, Verb::Start),
            Request::VmStop { vm, timeout_s } => {
                let timeout_s = timeout_s.unwrap_or(DEFAULT_STOP_TIMEOUT_S);
                if timeout_s > MAX_STOP_TIMEOUT_S {
                    let message = format!(
                        "a timeout of {timeout_s} s is too long; allowed: up to {MAX_STOP_TIMEOUT_S} s"
                    );
                    return failure(FailureCode::BadRequest, message);
                }
                let verb = Verb::Stop {
                    at_once: timeout_s == 0,
                };
                self.ask(vm, verb, timeout_s, VcpuId(0))
            }
            Request::VmPause { vm } => ask(vm, Verb::Pause),
            Request::VmResume { vm } => ask(vm, Verb::Resume),
            Request::VmReset { vm } => ask(vm, Verb::Reset),
            Request::VmDestroy { vm, force } => ask(vm, Verb::Destroy { force: *force }),
            Request::InjectNmi { vm, vcpu } => {
                let vcpu = VcpuId(u32::from(vcpu.unwrap_or(0)));
                self.ask(vm, Verb::Nmi, 0, vcpu)
            }
            Request::HostShow {} => Ok(Answer::Host { host: self.host() }),
            Request::HostPowerOff {} => {
                self.power_off.store(true, Ordering::Relaxed);
                done(String::from("powering off"))
            }
            Request::SchedShow {} => Ok(Answer::Sched {
                sched: self.sched_details(),
            }),
            Request::SchedSet { vm, change } => self.set_sched(vm, change),
            Request::PoolSet {
                pool,
                policy,
                slice_us,
            } => self.set_pool(pool, policy.as_deref(), *slice_us),
            Request::TraceStart { .. }
            | Request::TraceStop {}
            | Request::TraceShow {}
            | Request::TraceRead { .. } => trace::operate(request, || {
                let slots = self.slots.lock();
                let name = |slot: &Slot<B>| (slot.number.0, slot.plan.config.name.clone());
                slots.iter().map(name).collect()
            }),
            Request::Stats { vm } => Ok(Answer::Stats {
                stats: self.stats(vm.as_deref())?,
            }),
            Request::Log { after, lines } => {
                let most = lines.unwrap_or(LOG_LINES).min(MAX_LOG_LINES);
                let lines = log::lines_after(*after, most as usize);
                Ok(Answer::Log { lines })
            }
        }
    }

    fn vm_names(&self) -> Vec<String> {
        let slots = self.slots.lock();
        slots
            .iter()
            .map(|slot| slot.plan.config.name.clone())
            .collect()
    }

    fn pool_names(&self) -> Vec<String> {
        self.pools.iter().map(|pool| pool.name.clone()).collect()
    }
}
