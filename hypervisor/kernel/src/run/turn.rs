//! A vCPU's turn on a pCPU: from what the scheduler picked to what it is told of the end.
//!
//! [`World::run_next`] picks a vCPU, loads it, runs it until it pauses, unloads it, and stops it. [`HostCpu`] is the
//! pCPU under it meanwhile.
//!
//! A switch from one vCPU to another comes this way, so it reads the clock once behind each part: a vCPU pays for what is done
//! between the end of the host's work and its unloading.

use alloc::{boxed::Box, string::String, sync::Arc};
use core::sync::atomic::{AtomicU64, Ordering};

use manage::trace::{INJECTED_NMI, Kind, OWN_TIMER, Why};
use sched::{Dispatch, EntityId, Stop, Turn};
use spin::Mutex;
use virt::Backend;
use vmm::{
    host::{Attention, Host, Traced},
    vcpu::{Pause, Vcpu},
};

use super::{Kick, World, slots::VmNumber, verbs::Published};
use crate::{console, control, fault, info, interrupts, percpu::PerCpu, sync::Lock, time, trace};

/// One vCPU and where it belongs.
pub(super) struct Entity<B: Backend> {
    pub(super) vm: VmNumber,
    /// Which of its VM's.
    pub(super) number: u8,
    /// Host TSC when it first ran, 0 before; noted only for figures.
    pub(super) first_run: AtomicU64,
    /// The vCPUs of its VM.
    pub(super) siblings: Arc<Kick>,
    pub(super) vcpu: Lock<Vcpu<B::Vcpu>>,
    pub(super) exits: Published,
}

/// The vCPUs of all VMs, by handle. Each has a lock of its own, so that pCPUs that look theirs up do not wait for each other;
/// no interrupt handler takes one.
pub(super) struct Entities<B: Backend>(Box<[Place<B>]>);

/// Where the vCPU of a handle is, if there is one.
type Place<B> = Mutex<Option<Arc<Entity<B>>>>;

impl<B: Backend> Entities<B> {
    /// Room for so many.
    pub(super) fn new(capacity: usize) -> Self {
        Entities((0..capacity).map(|_| Mutex::new(None)).collect())
    }

    /// The vCPU of this handle, if there is one.
    pub(super) fn get(&self, id: EntityId) -> Option<Arc<Entity<B>>> {
        self.0.get(id.0 as usize)?.lock().clone()
    }

    /// Puts a vCPU in the place of this handle, or takes it out.
    pub(super) fn put(&self, id: EntityId, entity: Option<Arc<Entity<B>>>) {
        if let Some(place) = self.0.get(id.0 as usize) {
            let before = core::mem::replace(&mut *place.lock(), entity);
            // Here, where the lock is not held.
            drop(before);
        }
    }
}

impl<B: Backend> World<B> {
    /// Picks a vCPU at this host TSC, and runs it until it pauses. `false`: there is none to run.
    #[inline(always)]
    pub(super) fn run_next(&'static self, cpu: &'static PerCpu, now: u64) -> bool {
        let pick = self.sched.pick(cpu.number, now);
        self.kick(pick.kick);
        if let Some(run) = pick.run {
            self.run_vcpu(cpu, run);
        }
        pick.run.is_some()
    }

    #[inline(always)]
    fn run_vcpu(&'static self, cpu: &'static PerCpu, run: Dispatch) {
        let id = run.id;
        let Some(entity) = self.entities.get(id) else {
            self.forget(cpu);
            return;
        };
        if self.figures && entity.first_run.load(Ordering::Relaxed) == 0 {
            entity.first_run.store(time::now_tsc(), Ordering::Relaxed);
        }
        let mut vcpu = entity.vcpu.lock();
        vcpu.load(cpu.number);
        let pause = match trace::is_on() {
            false => {
                let whose = (entity.vm.0, entity.number);
                vcpu.run(&mut HostCpu::<B, false>::new(self, cpu, run.stolen, whose))
            }
            true => self.run_traced(cpu, &run, &entity, &mut vcpu),
        };
        vcpu.unload();
        let io = vcpu.take_io_bytes();
        let now = time::now_tsc();
        entity.exits.publish(vcpu.counters(), now);
        drop(vcpu);
        let why = match pause {
            Pause::SliceOver => Stop::Interrupted,
            Pause::Idle { until } => Stop::Blocked { until },
            // The kick that ended the VM must not bring this vCPU to rest a second time.
            Pause::Ended => Stop::Retired,
            Pause::Yielded => {
                // Whom it waits for is one of its own VM, if anyone.
                let siblings = entity.siblings.entities.get().into_iter().flatten();
                let after = siblings.clone().skip_while(|&&other| other != id).skip(1);
                let in_turn = after.chain(siblings.take_while(|&&other| other != id));
                let kick = self.sched.yield_to(cpu.number, io, in_turn.copied(), now);
                self.kick(kick);
                return;
            }
        };
        let kick = self.sched.stop(cpu.number, Turn { why, io }, now);
        self.kick(kick);
        if pause == Pause::Ended {
            let vm = entity.vm;
            // Else this pCPU would hold the VM's memory while the VM is made anew.
            drop(entity);
            self.at_rest(vm);
        }
    }

    /// There is no such vCPU any more as was picked for this pCPU.
    #[cold]
    fn forget(&self, cpu: &PerCpu) {
        let kick = self.sched.stop(cpu.number, Stop::Retired, time::now_tsc());
        self.kick(kick);
    }

    /// Runs a vCPU that is loaded, with records of its switches and of what it does.
    #[inline(never)]
    fn run_traced(
        &'static self,
        cpu: &'static PerCpu,
        run: &Dispatch,
        entity: &Entity<B>,
        vcpu: &mut Vcpu<B::Vcpu>,
    ) -> Pause {
        let whose = (entity.vm.0, entity.number);
        let (detail, extra) = match run.timer {
            Some(ticks) => (OWN_TIMER, time::ticks_to_ns(ticks) / 1000),
            None => (0, 0),
        };
        let extra = u16::try_from(extra).unwrap_or(u16::MAX);
        trace::record(Kind::SwitchIn, whose, detail, extra);
        let pause = vcpu.run(&mut HostCpu::<B, true>::new(self, cpu, run.stolen, whose));
        let why = match pause {
            Pause::SliceOver => Why::SliceOver,
            Pause::Yielded => Why::Yielded,
            Pause::Idle { .. } => Why::Idle,
            Pause::Ended => Why::Ended,
        };
        trace::record(Kind::SwitchOut, whose, why as u16, 0);
        pause
    }
}

/// The pCPU under a running vCPU. Its two kinds make two run loops: one has no code for traces.
struct HostCpu<B: Backend, const TRACED: bool> {
    world: &'static World<B>,
    cpu: &'static PerCpu,
    /// For records: the VM's number and the vCPU's.
    whose: (u16, u8),
    /// What was stolen from the vCPU, in ticks.
    stolen: u64,
}

impl<B: Backend, const TRACED: bool> HostCpu<B, TRACED> {
    fn new(world: &'static World<B>, cpu: &'static PerCpu, stolen: u64, whose: (u16, u8)) -> Self {
        HostCpu {
            world,
            cpu,
            whose,
            stolen,
        }
    }
}

impl<B: Backend, const TRACED: bool> Host for HostCpu<B, TRACED> {
    const TRACES: bool = TRACED;

    fn trace(&mut self, what: Traced) {
        let (kind, detail, extra) = match what {
            Traced::Entry | Traced::Exit { .. } if !trace::has_exits() => return,
            Traced::Entry => (Kind::Entry, 0, 0),
            Traced::Exit { kind, port } => (Kind::Exit, kind as u16, port),
            Traced::Interrupt(vector) => (Kind::Inject, u16::from(vector), 0),
            Traced::Nmi => (Kind::Inject, INJECTED_NMI, 0),
            Traced::DeviceWork => (Kind::Device, 0, 0),
        };
        trace::record(kind, self.whose, detail, extra);
    }

    fn now(&self) -> u64 {
        time::now_tsc()
    }

    fn run_until(&self) -> u64 {
        self.cpu.kicked.store(false, Ordering::Relaxed);
        self.world.sched.run_until(self.cpu.number)
    }

    fn has_less_time(&self) -> bool {
        self.cpu.kicked.load(Ordering::Relaxed)
    }

    fn stolen_ns(&self) -> u64 {
        time::ticks_to_ns(self.stolen)
    }

    fn arm_timer(&mut self, host_tsc: u64) {
        interrupts::arm_timer(host_tsc);
    }

    fn interrupts_wait_until(&self) -> u64 {
        match self.cpu.number {
            0 => console::look_again_at()
                .unwrap_or(u64::MAX)
                .min(control::look_again_at().unwrap_or(u64::MAX)),
            _ => u64::MAX,
        }
    }

    fn take_interrupts(&mut self) -> Attention {
        self.world.host_work(self.cpu);
        match self.world.is_wanted(self.cpu) {
            true => Attention::GiveWay,
            false => Attention::GoOn,
        }
    }

    fn take_nmi(&mut self) {
        fault::on_nmi();
    }

    fn note(&mut self, line: String) {
        info!("{line}");
    }
}
