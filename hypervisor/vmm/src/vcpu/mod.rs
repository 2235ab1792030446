//! One vCPU: its run loop, and what happens on every exit.
//!
//! A [`Vcpu`] belongs to the pCPU that runs it and takes no lock of its own; other
//! processors reach it through its APIC's inbox and through [`Vm::stop`]. Each turn of the
//! loop delivers what is due, enters the guest, and handles the exit.
//!
//! Invariants: whatever the guest does, an exit is handled in bounded time; what cannot be
//! handled ends this VM with a named reason and a register dump, and only this VM.

mod delivery;
mod end;
mod finish;
mod hypercall;
mod msrs;
mod platform;
mod service;
mod steal;
mod wake;

use alloc::{boxed::Box, sync::Arc};

use devices::{
    VcpuId,
    lapic::{LocalApic, LocalApicConfig},
    system::RunState,
    time::{Clock, earliest},
};
use mem::{Direction, Width, guest::Access};
use virt::{
    CpuState, CrAccess, Event, Exit, Gpr, NestedPageFault, PortIo, SegmentName, TaskSource,
    TaskSwitch, VirtualCpu,
};

use crate::{
    breakpoint::Breakpoints,
    control,
    cpuid::CpuidState,
    emulate::{self, Aftermath, DecodeCache, Exception, Outcome, Platform, SimpleMove, Target},
    host::{Attention, Host, Traced},
    task,
    vm::Vm,
};

pub use end::Dump;
use end::EndKind;
use finish::Executed;
use msrs::Msrs;

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Its time on the pCPU is over.
    SliceOver,
    /// It waits for somebody else: the pCPU had better run another one first.
    Yielded,
    /// Nothing to do before a kick, or before this host TSC.
    Idle {
        /// Host TSC of the next timer, if one is armed.
        until: Option<u64>,
    },
    /// The VM has ended; [`Vm::take_end_reason`] says why.
    Ended,
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    Running,
    /// In HLT, until an interrupt, an NMI or INIT.
    Halted,
    /// An application processor before its start-up IPI.
    WaitForStartup,
}

/// What a handled exit asks of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Enter again at once: no interrupt or timer state can have changed.
    Enter,
    /// Look at interrupts and timers first.
    Check,
    /// The guest waits for somebody else: let others run.
    Yield,
    /// The pCPU is needed for something else.
    GiveWay,
}

/// CR0.NW and CR0.CD.
const CR0_CACHE: u64 = 3 << 29;
/// How often a second a guest that runs is interrupted for what its devices have left to do.
const WORK_PAUSES_PER_SECOND: u64 = 10_000;
/// Vector of #DB.
const DEBUG: u8 = 1;
/// DR6.BT: a task switch to a TSS with its T flag set.
const DR6_TASK_SWITCH: u64 = 1 << 15;
/// RFLAGS.IF.
const RFLAGS_IF: u64 = 1 << 9;

/// What an access to a device counts as, in bytes: a request to a disk costs as much beside its data.
const ACCESS_BYTES: u64 = 512;

/// Number of exits by kind.
pub type ExitCounters = [u64; Exit::KINDS];

/// A virtual processor.
pub struct Vcpu<V> {
    hw: V,
    rest: Rest,
    cache: Box<DecodeCache>,
    activity: Activity,
    counters: ExitCounters,
}

/// All but the hardware half, so that both can be borrowed at once.
struct Rest {
    id: VcpuId,
    vm: Arc<Vm>,
    apic: LocalApic,
    msrs: Msrs,
    /// NMIs that came and were not injected: two at most.
    nmi_pending: u8,
    /// Task priority and threshold as the vCPU's hardware was last given them.
    shown_priority: (u8, u8),
    /// What the instruction that is being emulated has reached.
    reach: Reach,
    /// The change of ROM or flash up to which cached translations were dropped.
    special_seen: u32,
    /// Offset of the VM's clock that the hardware was last given.
    clock_seen: u64,
    /// The last pause in which this vCPU came to rest.
    pause_seen: u32,
    /// Bytes of devices' work that it has done.
    device_bytes: u64,
    /// Accesses of emulated instructions to devices.
    device_accesses: u64,
    /// What [`Vcpu::take_io_bytes`] has told of, in bytes.
    io_told: u64,
}

/// What an emulated instruction reached, beyond devices that speak up by themselves.
#[derive(Clone, Copy, Debug, Default)]
struct Reach {
    /// The local APIC or a control register: interrupts may be deliverable now.
    interrupts: bool,
    /// A port or a timer's register was written: a timer may be set anew.
    timers: bool,
    aftermath: Aftermath,
}

impl<V: VirtualCpu> Vcpu<V> {
    /// A vCPU of `vm` in the state `start`; `None` (an application processor): it waits for a
    /// start-up IPI. `hw` must not be loaded.
    ///
    /// Returns `None` if the VM has no vCPU of this number.
    pub fn new(
        vm: Arc<Vm>,
        id: VcpuId,
        mut hw: V,
        start: Option<&CpuState>,
        pcpu: usize,
    ) -> Option<Self> {
        let config = LocalApicConfig {
            physical_bits: vm.cpuid.physical_bits(),
            timer_hz: vm.clock.apic_timer_hz(),
            ..LocalApicConfig::new(id.0)
        };
        let clock: Arc<dyn Clock> = vm.clock.clone();
        let mut apic = LocalApic::new(id, config, vm.apic_bus.clone(), clock)?;
        if id == VcpuId(0) {
            apic.set_virtual_wire();
        }
        hw.load(pcpu);
        let clock_seen = vm.clock.tsc_offset();
        hw.set_tsc_scale(vm.clock.scale());
        hw.set_tsc_offset(clock_seen);
        hw.set_state(start.unwrap_or(&CpuState::reset()));
        hw.unload();
        let activity = if start.is_some() {
            Activity::Running
        } else {
            Activity::WaitForStartup
        };
        let rest = Rest {
            id,
            vm,
            apic,
            msrs: Msrs::default(),
            nmi_pending: 0,
            shown_priority: (0, 0),
            reach: Reach::default(),
            special_seen: 0,
            clock_seen,
            pause_seen: 0,
            device_bytes: 0,
            device_accesses: 0,
            io_told: 0,
        };
        Some(Vcpu {
            hw,
            rest,
            cache: Box::default(),
            activity,
            counters: [0; Exit::KINDS],
        })
    }

    /// Its number within the VM.
    pub fn id(&self) -> VcpuId {
        self.rest.id
    }

    /// Its VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.rest.vm
    }

    /// Exits so far, by [`Exit::index`].
    pub fn counters(&self) -> &ExitCounters {
        &self.counters
    }

    /// What it has asked devices for since this was last called, in bytes: what their work moved and cost
    /// ([`Budget`](devices::work::Budget)), and [`ACCESS_BYTES`] for each access by a port or a register in memory. Its own local
    /// APIC is no device.
    pub fn take_io_bytes(&mut self) -> u64 {
        // Exits are counted anyway; the emulator counts beside that what a string instruction does in one.
        let accesses = self.counters[Exit::PORT_IO] + self.rest.device_accesses;
        let all = self.rest.device_bytes + accesses * ACCESS_BYTES;
        all - core::mem::replace(&mut self.rest.io_told, all)
    }

    /// Loads the vCPU on pCPU `pcpu`; before `run`.
    pub fn load(&mut self, pcpu: usize) {
        self.hw.load(pcpu);
    }

    /// Takes the vCPU off its pCPU; after `run`.
    pub fn unload(&mut self) {
        self.hw.unload();
    }

    /// Runs the vCPU until its time is over ([`Host::run_until`]), it idles or yields, or its VM ends.
    pub fn run<H: Host>(&mut self, host: &mut H) -> Pause {
        let Rest { msrs, vm, .. } = &mut self.rest;
        if msrs.steal_time.is_on() {
            msrs.steal_time.begin_run(&vm.memory, host.stolen_ns());
        }
        let pause = self.run_guest(host);
        let Rest { msrs, vm, .. } = &mut self.rest;
        if msrs.steal_time.is_on() && matches!(pause, Pause::SliceOver | Pause::Yielded) {
            msrs.steal_time.end_run(&vm.memory);
        }
        pause
    }

    fn run_guest<H: Host>(&mut self, host: &mut H) -> Pause {
        let mut next = Next::Check;
        if !self.rest.vm.run_state().runs()
            && let Some(pause) = self.held_up(host)
        {
            return pause;
        }
        // Only after the look: while the vCPU is kept from running, the clock may skip.
        self.follow_clock();
        loop {
            if !self.rest.vm.run_state().runs()
                && let Some(pause) = self.held_up(host)
            {
                return pause;
            }
            if matches!(next, Next::Yield | Next::GiveWay) {
                return match next {
                    Next::GiveWay => Pause::SliceOver,
                    _ => Pause::Yielded,
                };
            }
            // A device that the guest has reached may have readied one that comes first.
            let look = next == Next::Check || self.rest.apic.inbox().has_pending();
            if (look || host.has_less_time())
                && let Some(pause) = self.check(host)
            {
                return pause;
            }
            if H::TRACES {
                host.trace(Traced::Entry);
            }
            let exit = self.hw.enter();
            self.counters[exit.index()] += 1;
            if H::TRACES {
                let port = match &exit {
                    Exit::PortIo(io) => io.port,
                    _ => 0,
                };
                let kind = exit.index();
                host.trace(Traced::Exit { kind, port });
            }
            next = self.dispatch(exit, host);
        }
    }

    /// The VM has ended, or is paused, or its output has to go out first.
    #[cold]
    fn held_up<H: Host>(&mut self, host: &H) -> Option<Pause> {
        let vm = &self.rest.vm;
        if vm.is_ended() {
            return Some(Pause::Ended);
        }
        if vm.pauses().holds(&mut self.rest.pause_seen, host.now()) {
            return Some(Pause::Idle { until: None });
        }
        if let Some(warm) = &vm.warm
            && warm.sleeps()
        {
            return self.asleep();
        }
        vm.resume_output();
        vm.run_state()
            .has(RunState::OUTPUT_WAITS)
            .then_some(Pause::Yielded)
    }

    /// Has the guest's TSC skip what the VM's clock has skipped.
    fn follow_clock(&mut self) {
        let offset = self.rest.vm.clock.tsc_offset();
        if offset != self.rest.clock_seen {
            self.rest.clock_seen = offset;
            let adjusted = offset.wrapping_add(self.rest.msrs.tsc_adjust());
            self.hw.set_tsc_offset(adjusted);
        }
    }

    /// Everything that may have become due: timers, signals, interrupts. Says when to pause.
    fn check<H: Host>(&mut self, host: &mut H) -> Option<Pause> {
        let vm = &self.rest.vm;
        if vm.has_work() {
            let bytes = vm.work(self.rest.id, |line| host.note(line));
            self.rest.device_bytes += bytes;
            if H::TRACES {
                host.trace(Traced::DeviceWork);
            }
        }
        if let Some(special) = &vm.special {
            special.drop_stale(&mut self.rest.special_seen);
        }
        let now = vm.clock.now();
        self.rest.fetch_task_priority(&self.hw);
        self.rest.apic.poll(now);
        self.rest.vm.poll_timers(self.rest.id, now);
        if self.rest.apic.has_signals() {
            self.take_signals();
        }
        if self.activity != Activity::WaitForStartup {
            self.deliver(host);
        }
        let vm = &self.rest.vm;
        let timer = earliest(self.rest.apic.deadline(), vm.timer_deadline(self.rest.id))
            .map(|ticks| vm.clock.to_host(ticks));
        // Whoever sees work does some of it again soon, so that it comes to an end.
        let work = vm.has_work();
        if self.activity != Activity::Running && !work {
            return Some(Pause::Idle { until: timer });
        }
        if self.activity != Activity::Running {
            return Some(Pause::Yielded);
        }
        let slice_end = host.run_until();
        if host.now() >= slice_end {
            return Some(Pause::SliceOver);
        }
        let mut deadline = timer
            .map_or(slice_end, |t| t.min(slice_end))
            .min(host.interrupts_wait_until());
        if work {
            deadline = deadline.min(host.now() + vm.clock.host_hz() / WORK_PAUSES_PER_SECOND);
        }
        if !self.hw.set_deadline(deadline) {
            host.arm_timer(deadline);
        }
        None
    }

    /// Acts on NMI, INIT and start-up IPIs (SDM vol. 3A, section 9.4).
    #[inline(never)]
    fn take_signals(&mut self) {
        let signals = self.rest.apic.take_signals();
        if signals.init {
            self.rest.apic.init();
            self.rest.nmi_pending = 0;
            self.hw.cancel_injection();
            let is_boot_processor = self.rest.apic.base().bsp();
            // INIT keeps the FPU, MSRs such as the MTRRs, and the TSC; only the core state goes.
            let mut state = match &self.rest.vm.warm {
                Some(warm) if is_boot_processor => self.warm_state(warm),
                _ => CpuState::reset(),
            };
            state.xcr0 = self.hw.xcr0();
            // CD and NW stay (SDM vol. 3A, table 10-1).
            state.cr0 = (state.cr0 & !CR0_CACHE) | (self.hw.cr0() & CR0_CACHE);
            self.hw.set_state(&state);
            self.activity = if is_boot_processor {
                Activity::Running
            } else {
                Activity::WaitForStartup
            };
        }
        if let Some(page) = signals.startup
            && self.activity == Activity::WaitForStartup
        {
            let mut cs = self.hw.segment(SegmentName::Cs);
            cs.selector = u16::from(page) << 8;
            cs.base = u64::from(page) << 12;
            self.hw.set_segment(SegmentName::Cs, cs);
            self.hw.set_rip(0);
            self.activity = Activity::Running;
        }
        if signals.nmis != 0 {
            // A processor handles one while another waits. Of two that come together the first would have been
            // taken already if this one had run, so both wait here.
            let handling = self.hw.queued() == Some(Event::Nmi)
                || (self.hw.queued().is_none() && !self.hw.nmi_ready());
            let most = if handling { 1 } else { 2 };
            let came = self.rest.nmi_pending.saturating_add(signals.nmis);
            self.rest.nmi_pending = came.min(most);
        }
    }

    /// Injects the most urgent event that the vCPU can take, or asks to be told when it can.
    fn deliver<H: Host>(&mut self, host: &mut H) {
        let rest = &mut self.rest;
        if rest.nmi_pending != 0 && self.hw.queued().is_none() {
            if self.hw.nmi_ready() {
                rest.nmi_pending -= 1;
                self.hw.inject(Event::Nmi);
                if H::TRACES {
                    host.trace(Traced::Nmi);
                }
                self.activity = Activity::Running;
                if rest.nmi_pending != 0 {
                    self.hw.request_nmi_window(true);
                }
            } else {
                self.hw.request_nmi_window(true);
            }
        }
        let vector = rest.apic.interrupt();
        rest.show_task_priority(&mut self.hw);
        let external = rest.apic.wants_extint(|| rest.vm.pic.pending());
        if vector.is_none() && !external {
            return;
        }
        if !self.hw.interrupt_ready() {
            // In HLT with interrupts off nothing but an NMI or INIT helps: keep sleeping.
            if self.activity == Activity::Running || self.hw.rflags() & RFLAGS_IF != 0 {
                self.activity = Activity::Running;
                self.hw.request_interrupt_window(true);
            }
            return;
        }
        // The 8259A's interrupts come before the APIC's own (SDM vol. 3A, section 11.8.4).
        let (vector, more) = match vector {
            waiting if external => {
                rest.apic.accept_extint();
                (rest.vm.pic.acknowledge(), waiting.is_some())
            }
            // What else the APIC has is held back by this one's priority.
            Some(vector) => {
                rest.apic.accept(vector);
                (vector, false)
            }
            None => return,
        };
        self.hw.inject(Event::Interrupt(vector));
        if H::TRACES {
            host.trace(Traced::Interrupt(vector));
        }
        self.activity = Activity::Running;
        // The 8259A may have another one; where it had none, it has none.
        if more || external && rest.apic.wants_extint(|| rest.vm.pic.pending()) {
            self.hw.request_interrupt_window(true);
        }
    }

    fn dispatch<H: Host>(&mut self, exit: Exit, host: &mut H) -> Next {
        match exit {
            Exit::Cpuid => {
                self.cpuid();
                return self.step_over();
            }
            Exit::Hypercall => {
                self.hypercall();
                return self.step_over();
            }
            Exit::PortIo(io) if !io.string => return self.port_io(io),
            Exit::PortIo(_) | Exit::CrAccess(None) => return self.emulate(None),
            Exit::MsrRead => return self.rdmsr(host),
            Exit::MsrWrite => return self.wrmsr(host),
            Exit::NestedPageFault(fault) => return self.nested_page_fault(fault),
            Exit::CrAccess(Some(access)) => self.cr_access(access),
            Exit::Halt => {
                // A single-step trap behind HLT is taken at once.
                if self.step_over() == Next::Enter {
                    self.activity = Activity::Halted;
                }
            }
            Exit::Xsetbv => self.xsetbv(),
            // Nested page tables map RAM write-back and the guest has no device memory of
            // the host's: there is nothing that a flush could make visible.
            Exit::Wbinvd | Exit::Invd => return self.step_over(),
            Exit::Pause => {
                self.step_over();
                return Next::Yield;
            }
            // Not shown in CPUID.
            Exit::Monitor | Exit::Mwait | Exit::VirtualizationInstruction => {
                self.raise(Exception::UNDEFINED_OPCODE);
            }
            // There is no PMU: every counter number is out of range.
            Exit::Rdpmc => self.raise(Exception::GENERAL_PROTECTION),
            Exit::Exception { vector: 6, .. } => return self.undefined_opcode(),
            Exit::Exception { vector, error_code } => {
                if vector != DEBUG {
                    self.resume_past_breakpoints();
                }
                self.hw.inject(Event::Exception { vector, error_code });
            }
            Exit::ExternalInterrupt | Exit::Deadline => match host.take_interrupts() {
                Attention::GoOn => {}
                Attention::GiveWay => return Next::GiveWay,
            },
            Exit::Nmi => host.take_nmi(),
            Exit::InterruptWindow | Exit::NmiWindow | Exit::Init => {}
            Exit::TripleFault => return self.end(EndKind::TripleFault),
            Exit::TaskSwitch(request) => return self.task_switch(&request),
            Exit::Random => {
                return self.end(EndKind::Unsupported("an intercepted RDRAND or RDSEED"));
            }
            Exit::NestedMisconfiguration(gpa) => return self.end(EndKind::Misconfiguration(gpa)),
            Exit::EntryFailure { code } => {
                let why = self.hw.explain_entry_failure();
                return self.end(EndKind::EntryFailure { code, why });
            }
            Exit::Unknown { code, info } => return self.end(EndKind::UnknownExit { code, info }),
        }
        Next::Check
    }

    /// #UD. The other vendor's hypercall instruction raises it too: guests that were built for either use one of
    /// the two without asking, and elsewhere both work.
    fn undefined_opcode(&mut self) -> Next {
        let vm = self.rest.vm.clone();
        if emulate::is_hypercall(&mut self.hw, &vm.memory, &mut self.rest) {
            self.hypercall();
            return self.finish_instruction(Some(emulate::HYPERCALL_BYTES), 0);
        }
        self.raise(Exception::UNDEFINED_OPCODE);
        Next::Check
    }

    fn task_switch(&mut self, request: &TaskSwitch) -> Next {
        if request.source == TaskSource::Iret {
            self.hw.unblock_nmis();
        }
        match task::switch(&mut self.hw, self.rest.vm.control_context(), request) {
            task::Outcome::Done => {}
            task::Outcome::Trap => self.debug_trap(DR6_TASK_SWITCH),
            task::Outcome::Fault(exception) => self.raise(exception),
            task::Outcome::TripleFault => return self.end(EndKind::TripleFault),
        }
        // The new task's flags may allow interrupts.
        Next::Check
    }

    fn complete(&mut self, result: Result<(), Exception>) {
        match result {
            Ok(()) => {
                self.step_over();
            }
            Err(exception) => self.raise(exception),
        }
    }

    // On the way of common exits, from both kinds of run loop: a call would cost them dearly.
    #[inline(always)]
    fn cpuid(&mut self) {
        let leaf = self.hw.gpr(Gpr::Rax) as u32;
        let subleaf = self.hw.gpr(Gpr::Rcx) as u32;
        let state = CpuidState {
            apic_id: self.rest.id.0,
            apic_enabled: self.rest.apic.base().enabled(),
            cr4: self.hw.cr4(),
            // Asked for only where it shows: the sizes of the XSAVE area.
            xcr0: if leaf == 0xd { self.hw.xcr0() } else { 0 },
        };
        let result = self.rest.vm.cpuid.get(leaf, subleaf, state);
        self.hw.set_gpr(Gpr::Rax, u64::from(result.eax));
        self.hw.set_gpr(Gpr::Rbx, u64::from(result.ebx));
        self.hw.set_gpr(Gpr::Rcx, u64::from(result.ecx));
        self.hw.set_gpr(Gpr::Rdx, u64::from(result.edx));
    }

    #[inline(always)]
    fn port_io(&mut self, io: PortIo) -> Next {
        let vm = &self.rest.vm;
        let rax = self.hw.gpr(Gpr::Rax);
        let hits = Breakpoints::of(&self.hw).map_or(0, |b| b.port(io.port, io.width));
        match io.direction {
            Direction::Write => {
                vm.ports
                    .write(io.port, io.width, (rax & io.width.mask()) as u32);
                // A device that wants attention posts to an inbox, which the loop looks at.
                let next = self.finish_instruction(None, hits);
                if Vm::is_timer_port(io.port) {
                    self.rest.vm.timers_changed(self.rest.id);
                    return Next::Check;
                }
                if Vm::is_work_port(io.port) {
                    return Next::Check;
                }
                next
            }
            Direction::Read => {
                let value = u64::from(vm.ports.read(io.port, io.width));
                // A 32-bit IN clears the upper half of RAX, narrower ones keep the rest.
                let rax = match io.width {
                    Width::Byte => rax & !0xff | value & 0xff,
                    Width::Word => rax & !0xffff | value & 0xffff,
                    _ => value,
                };
                self.hw.set_gpr(Gpr::Rax, rax);
                // Reading may acknowledge an interrupt; that only ever lowers a line. The clock's
                // periodic sources go on from there.
                if Vm::is_rearmed_by_read(io.port) {
                    self.rest.vm.timers_changed(self.rest.id);
                    self.finish_instruction(None, hits);
                    return Next::Check;
                }
                self.finish_instruction(None, hits)
            }
        }
    }

    fn cr_access(&mut self, access: CrAccess) {
        let Vcpu { hw, rest, .. } = self;
        let result = match access {
            CrAccess::MovTo { cr, gpr } => {
                let long = hw.mode() == virt::CpuMode::Long64;
                let value = hw.gpr(gpr);
                rest.control_write(hw, cr, if long { value } else { value & 0xffff_ffff })
            }
            CrAccess::MovFrom { cr, gpr } => {
                let value = rest.control_read(hw, cr);
                hw.set_gpr(gpr, value);
                Ok(())
            }
            CrAccess::Clts => {
                let cr0 = hw.cr0();
                control::write_cr0(hw, rest.vm.control_context(), cr0 & !(1 << 3))
            }
            CrAccess::Lmsw(operand) => {
                let cr0 = hw.cr0();
                control::write_cr0(
                    hw,
                    rest.vm.control_context(),
                    emulate::load_msw(cr0, operand),
                )
            }
        };
        self.complete(result);
    }

    fn xsetbv(&mut self) {
        let result = self.write_xcr();
        self.complete(result);
    }

    /// What XSETBV asks for.
    fn write_xcr(&mut self) -> Result<(), Exception> {
        const CR4_OSXSAVE: u64 = 1 << 18;
        if self.hw.cr4() & CR4_OSXSAVE == 0 {
            return Err(Exception::UNDEFINED_OPCODE);
        }
        let index = self.hw.gpr(Gpr::Rcx) as u32;
        let value = self.edx_eax();
        if index != 0 || self.hw.cpl() != 0 {
            return Err(Exception::GENERAL_PROTECTION);
        }
        control::write_xcr0(&mut self.hw, &self.rest.vm.cpuid, value)
    }

    #[inline(always)]
    fn nested_page_fault(&mut self, fault: NestedPageFault) -> Next {
        if self.rest.vm.memory.is_ram(fault.gpa) {
            // RAM is mapped with all rights from the start, so this cannot be the guest's doing.
            return self.end(EndKind::Misconfiguration(fault.gpa));
        }
        let special = self.rest.vm.memory.special_access(fault.gpa);
        match special {
            // Another vCPU has unlocked it in the meantime.
            Some(Access::ReadWrite) => return Next::Check,
            Some(Access::ReadOnly) if !fault.write => return Next::Check,
            _ => {}
        }
        if let Some(event) = self.hw.queued() {
            return self.delivery_outside_ram(fault, event);
        }
        if special.is_some() || fault.fetch || fault.page_walk {
            // Page tables outside RAM are ones, for the emulator's walk as for a processor's.
            // Of ROM only writes come here: what else the instruction reads there, it finds in memory.
            // Code outside RAM is executed one instruction at a time: what a PC would fetch there.
            return self.emulate(None);
        }
        let target = Target {
            gpa: fault.gpa,
            write: fault.write,
        };
        let Vcpu {
            hw, rest, cache, ..
        } = self;
        match SimpleMove::find(hw, &rest.vm.memory, cache, target) {
            Some(found) => {
                rest.reach = Reach::default();
                let length = found.execute(hw, rest, fault.gpa);
                let Reach {
                    interrupts, timers, ..
                } = rest.reach;
                if timers {
                    rest.vm.timers_changed(rest.id);
                }
                // A device may have been notified.
                let work = rest.vm.has_work();
                let next = self.finish_instruction(Some(length), 0);
                if interrupts || timers || work {
                    Next::Check
                } else {
                    next
                }
            }
            None => self.emulate(Some(target)),
        }
    }

    fn emulate(&mut self, target: Option<Target>) -> Next {
        let Vcpu {
            hw, rest, cache, ..
        } = self;
        let vm = rest.vm.clone();
        let before = hw.rflags();
        rest.reach = Reach::default();
        let outcome = emulate::emulate(hw, &vm.memory, rest, cache, target);
        let Reach {
            interrupts,
            timers,
            aftermath,
        } = self.rest.reach;
        if timers {
            // A string instruction may have written to any port.
            vm.timers_changed(self.rest.id);
        }
        if aftermath.interrupt_return {
            self.hw.unblock_nmis();
        }
        let next = match outcome {
            Outcome::Done(length) => {
                self.finish_emulated(Executed::Whole { length }, before, aftermath)
            }
            Outcome::Jump(target) => {
                self.hw.set_rip(target);
                self.finish_emulated(Executed::Branch, before, aftermath)
            }
            // An iteration ends the shadow of STI or MOV SS, and traps when single-stepped, as an
            // instruction does: or no interrupt would ever stop a long one in such a shadow.
            Outcome::Again => {
                self.finish_emulated(Executed::Iteration, before, aftermath);
                Next::Check
            }
            Outcome::Task(request) => self.task_switch(&request),
            Outcome::Service(service, length) => self.serve(service, length),
            Outcome::Fault(exception) => {
                self.raise(exception);
                Next::Check
            }
            Outcome::Unsupported(bytes) => self.end(EndKind::Instruction(bytes)),
        };
        if interrupts || timers || vm.has_work() {
            Next::Check
        } else {
            next
        }
    }
}

#[cfg(test)]
mod tests;
