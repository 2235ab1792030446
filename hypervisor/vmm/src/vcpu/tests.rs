//! Tests of the run loop: a whole VM over fake memory, with a scripted vCPU.

use alloc::{boxed::Box, collections::VecDeque, vec::Vec};
use core::{
    cell::Cell,
    sync::atomic::{AtomicU32, Ordering},
};

use devices::{lapic::VcpuKick, uart::ConsoleSink};
use mem::{Gpa, fake::FakeMemory};
use proptest::prelude::*;
use spin::Mutex;
use virt::{Registers, TaskSource};

mod delivery;
mod display;
mod finish;
mod firmware;
mod io;
mod pause;
mod rate;
mod steal;
mod warm;

use super::{
    finish::{DR6_SINGLE_STEP, RFLAGS_RF, RFLAGS_TF},
    msrs::MAX_MSR_NOTES,
    *,
};
use crate::{
    clock::TimeSource,
    cpuid::CpuidResult,
    display::DisplaySpec,
    fake::FakeCpu,
    firmware::Firmware,
    host::Alarm,
    load::BootFiles,
    msr::number,
    vm::{Environment, VmSpec, WatchdogAction, WatchdogSpec},
};

/// Ticks per second of the host's TSC: a tick is a nanosecond.
const HZ: u64 = 1_000_000_000;
/// Ticks of a slice: time for a few turns of the loop after a script has ended.
const SLICE: u64 = 50_000;

std::thread_local! {
    static NOW: Cell<u64> = const { Cell::new(1_000) };
}

/// Time goes on by a microsecond at each look.
fn now() -> u64 {
    NOW.set(NOW.get() + 1_000);
    NOW.get()
}

#[derive(Default)]
struct FakeHost {
    interrupts: u32,
    nmis: u32,
    armed: Option<u64>,
    patience: Option<u64>,
    /// Host TSC at which the vCPU's time is over; 0: never.
    until: u64,
    /// From this look on, of those before entries, somebody else is to run; 0: nobody.
    cut_at: u32,
    /// Looks before entries.
    looks: Cell<u32>,
    stolen_ns: u64,
    /// The pCPU is needed for something else.
    busy: bool,
    notes: Vec<String>,
}

impl FakeHost {
    fn is_cut(&self) -> bool {
        self.cut_at != 0 && self.looks.get() >= self.cut_at
    }
}

impl Host for FakeHost {
    fn now(&self) -> u64 {
        now()
    }
    fn run_until(&self) -> u64 {
        match self.until {
            _ if self.is_cut() => 0,
            0 => u64::MAX,
            until => until,
        }
    }
    fn has_less_time(&self) -> bool {
        self.looks.set(self.looks.get() + 1);
        self.is_cut()
    }
    fn stolen_ns(&self) -> u64 {
        self.stolen_ns
    }
    fn arm_timer(&mut self, host_tsc: u64) {
        self.armed = Some(host_tsc);
    }
    fn interrupts_wait_until(&self) -> u64 {
        self.patience.map_or(u64::MAX, |ns| NOW.get() + ns)
    }
    fn take_interrupts(&mut self) -> Attention {
        self.interrupts += 1;
        match self.busy {
            true => Attention::GiveWay,
            false => Attention::GoOn,
        }
    }
    fn take_nmi(&mut self) {
        self.nmis += 1;
    }
    fn note(&mut self, line: String) {
        self.notes.push(line);
    }
}

/// A host that wants to be told what the run loop does.
struct Watching<'h>(&'h mut FakeHost, Vec<Traced>);

impl Host for Watching<'_> {
    const TRACES: bool = true;

    fn trace(&mut self, what: Traced) {
        self.1.push(what);
    }
    fn now(&self) -> u64 {
        self.0.now()
    }
    fn run_until(&self) -> u64 {
        self.0.run_until()
    }
    fn has_less_time(&self) -> bool {
        self.0.has_less_time()
    }
    fn stolen_ns(&self) -> u64 {
        self.0.stolen_ns()
    }
    fn arm_timer(&mut self, host_tsc: u64) {
        self.0.arm_timer(host_tsc);
    }
    fn interrupts_wait_until(&self) -> u64 {
        self.0.interrupts_wait_until()
    }
    fn take_interrupts(&mut self) -> Attention {
        self.0.take_interrupts()
    }
    fn take_nmi(&mut self) {
        self.0.take_nmi();
    }
    fn note(&mut self, line: String) {
        self.0.note(line);
    }
}

#[derive(Default)]
struct Terminal(Mutex<Vec<u8>>);

impl ConsoleSink for Terminal {
    fn write(&self, bytes: &[u8]) -> usize {
        self.0.lock().extend_from_slice(bytes);
        bytes.len()
    }
}

#[derive(Default)]
struct Kicks([AtomicU32; 2]);

impl VcpuKick for Kicks {
    fn kick(&self, vcpu: VcpuId) {
        self.0[vcpu.0 as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Alarms(AtomicU32);

impl Alarm for Alarms {
    fn watchdog(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A processor by "AuthenticAMD" or "GenuineIntel" with every feature bit.
fn cpuid(leaf: u32, _subleaf: u32) -> CpuidResult {
    match leaf {
        0 => CpuidResult {
            eax: 0x10,
            ebx: u32::from_le_bytes(*b"Auth"),
            ecx: u32::from_le_bytes(*b"cAMD"),
            edx: u32::from_le_bytes(*b"enti"),
        },
        0x8000_0000 => CpuidResult {
            eax: 0x8000_0008,
            ..Default::default()
        },
        0x8000_0008 => CpuidResult {
            eax: 0x3028,
            ..Default::default()
        },
        _ => CpuidResult {
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
        },
    }
}

/// A multiboot kernel by its address fields: 32 bytes of header, then HLT.
fn kernel() -> Vec<u8> {
    let (magic, flags, base) = (0x1bad_b002u32, 1u32 << 16, 0x10_0000u32);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let mut image: Vec<u8> = [magic, flags, checksum, base, base, 0, 0, base + 32]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    image.push(0xf4);
    image
}

struct Bench {
    vcpu: Vcpu<FakeCpu>,
    host: FakeHost,
    terminal: Arc<Terminal>,
    kicks: Arc<Kicks>,
    alarms: Arc<Alarms>,
}

impl Bench {
    fn new() -> Self {
        Self::with_vcpus(1, 0)
    }

    /// vCPU `id` of a VM with `vcpus`.
    fn with_vcpus(vcpus: u16, id: u32) -> Self {
        Self::make(vcpus, id, None, DisplaySpec::default()).expect("a VM")
    }

    /// vCPU 0 of a VM that boots firmware.
    fn with_firmware(firmware: Firmware<'_>) -> Result<Self, String> {
        Self::make(1, 0, Some(firmware), DisplaySpec::default())
    }

    fn make(
        vcpus: u16,
        id: u32,
        firmware: Option<Firmware<'_>>,
        display: DisplaySpec<'_>,
    ) -> Result<Self, String> {
        Self::make_at_rate((vcpus, id), firmware, display, None)
    }

    /// vCPU `id` of a VM with `vcpus`, whose TSC runs at `tsc_hz` by VT-x' scaling.
    fn make_at_rate(
        (vcpus, id): (u16, u32),
        firmware: Option<Firmware<'_>>,
        display: DisplaySpec<'_>,
        tsc_hz: Option<u64>,
    ) -> Result<Self, String> {
        let memory: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(64 << 20)));
        let terminal = Arc::new(Terminal::default());
        let kicks = Arc::new(Kicks::default());
        let alarms = Arc::new(Alarms::default());
        let kernel = kernel();
        let spec = VmSpec {
            id: 1,
            name: String::from("test"),
            vcpus,
            memory_bytes: 16 << 20,
            firmware,
            boot: BootFiles {
                kernel: &kernel,
                kernel_name: "kernel",
                modules: &[],
                command_line: "",
            },
            disks: &[],
            watchdog: Some(WatchdogSpec {
                action: WatchdogAction::Pause,
                fired: false,
            }),
            test_devices: false,
            cpu: crate::cpuid::CpuModel::default(),
            tsc_hz,
            display,
        };
        let environment = Environment {
            memory,
            cpuid: &cpuid,
            arch_capabilities: 0,
            time: TimeSource {
                read: now,
                hz: HZ,
                stable: true,
            },
            tsc_scaling: tsc_hz.map(|_| virt::TscScaling::VTX),
            epoch: 1_700_000_000,
            console: terminal.clone(),
            kick: kicks.clone(),
            alarm: alarms.clone(),
        };
        let (vm, entry) = Vm::new(spec, environment).map_err(|e| e.to_string())?;
        let start = (id == 0).then_some(&entry);
        let cpu = FakeCpu::default();
        let vcpu = Vcpu::new(vm, VcpuId(id), cpu, start, 0).expect("a vCPU");
        Ok(Bench {
            vcpu,
            host: FakeHost::default(),
            terminal,
            kicks,
            alarms,
        })
    }

    /// Runs through the exits, and on to the end of a slice.
    fn run(&mut self, exits: impl IntoIterator<Item = Exit>) -> Pause {
        self.vcpu.hw.exits = exits.into_iter().collect();
        loop {
            self.host.until = now() + SLICE;
            let pause = self.vcpu.run(&mut self.host);
            self.host.until = 0;
            let stays = matches!(pause, Pause::SliceOver | Pause::Yielded);
            if !stays || self.vcpu.hw.exits.is_empty() {
                return pause;
            }
        }
    }

    fn rip(&self) -> u64 {
        self.vcpu.hw.state.rip
    }

    fn set(&mut self, gpr: Gpr, value: u64) {
        self.vcpu.hw.state.gprs[gpr as usize] = value;
    }

    fn get(&self, gpr: Gpr) -> u64 {
        self.vcpu.hw.state.gprs[gpr as usize]
    }

    /// Executes exits until the script is empty; the loop then ends in a triple fault.
    fn execute(&mut self, exits: &[Exit]) {
        let mut script: VecDeque<Exit> = exits.iter().copied().collect();
        script.push_back(Exit::TripleFault);
        self.vcpu.hw.exits = script;
        let pause = self.vcpu.run(&mut self.host);
        assert_eq!(pause, Pause::Ended);
    }
}

fn out(port: u16) -> Exit {
    Exit::PortIo(PortIo {
        port,
        width: Width::Byte,
        direction: Direction::Write,
        string: false,
    })
}

#[test]
fn cpuid_answers_and_steps_over() {
    let mut b = Bench::new();
    let rip = b.rip();
    b.set(Gpr::Rax, 0x4000_0000);
    b.execute(&[Exit::Cpuid]);
    assert_eq!(b.get(Gpr::Rbx), u64::from(u32::from_le_bytes(*b"KVMK")));
    assert_eq!(b.rip(), rip + 2);
    assert_eq!(b.vcpu.counters()[Exit::Cpuid.index()], 1);
}

#[test]
fn a_host_that_wants_to_is_told_what_the_loop_does() {
    let mut b = Bench::new();
    b.vcpu.vm().inject_nmi(VcpuId(0));
    b.vcpu.hw.exits = [Exit::Cpuid, out(0x80), Exit::TripleFault].into();
    b.host.until = now() + SLICE;
    let mut host = Watching(&mut b.host, Vec::new());
    assert_eq!(b.vcpu.run(&mut host), Pause::Ended);
    let exit = |exit: &Exit, port| Traced::Exit {
        kind: exit.index(),
        port,
    };
    let told = [
        Traced::Nmi,
        Traced::Entry,
        exit(&Exit::Cpuid, 0),
        Traced::Entry,
        exit(&out(0x80), 0x80),
        Traced::Entry,
        exit(&Exit::TripleFault, 0),
    ];
    assert_eq!(host.1, told);
}

#[test]
fn single_step_traps_behind_an_exiting_instruction() {
    let mut b = Bench::new();
    b.vcpu.hw.state.rflags |= RFLAGS_TF;
    b.execute(&[Exit::Cpuid]);
    assert_eq!(
        b.vcpu.hw.injected,
        [Event::Exception {
            vector: 1,
            error_code: None
        }]
    );
    assert_ne!(b.vcpu.hw.state.dr6 & DR6_SINGLE_STEP, 0);
}

#[test]
fn serial_output_reaches_the_terminal() {
    let mut b = Bench::new();
    for byte in *b"hi" {
        b.set(Gpr::Rax, u64::from(byte));
        b.run([out(0x3f8)]);
    }
    assert_eq!(*b.terminal.0.lock(), b"hi");
    // An unclaimed port reads as all-ones and keeps the rest of RAX.
    b.set(Gpr::Rax, 0x1122_3344_5566_7788);
    let read = PortIo {
        port: 0x5658,
        width: Width::Word,
        direction: Direction::Read,
        string: false,
    };
    b.execute(&[Exit::PortIo(read)]);
    assert_eq!(b.get(Gpr::Rax), 0x1122_3344_5566_ffff);
}

#[test]
fn unknown_msrs_fault_and_are_noted_a_few_times() {
    let mut b = Bench::new();
    b.set(Gpr::Rcx, 0x1234_5678);
    let rip = b.rip();
    b.execute(&[Exit::MsrRead; 40]);
    assert_eq!(b.rip(), rip, "a fault does not step over");
    assert_eq!(b.host.notes.len(), MAX_MSR_NOTES as usize);
    let gp = Event::Exception {
        vector: 13,
        error_code: Some(0),
    };
    assert!(b.vcpu.hw.injected.iter().all(|event| *event == gp));
}

#[test]
fn no_supervisor_state_can_be_enabled() {
    for (value, taken) in [(0, true), (1, false), (1 << 8, false), (1 << 11, false)] {
        let mut b = Bench::new();
        b.set(Gpr::Rcx, u64::from(number::XSS));
        b.set(Gpr::Rax, value);
        b.execute(&[Exit::MsrWrite]);
        assert_eq!(b.vcpu.hw.injected.is_empty(), taken, "{value:#x}");
        assert!(b.host.notes.is_empty(), "it is known");
    }
    let mut b = Bench::new();
    b.set(Gpr::Rcx, u64::from(number::XSS));
    b.set(Gpr::Rax, 7);
    b.execute(&[Exit::MsrRead]);
    assert_eq!(b.get(Gpr::Rax), 0);
}

#[test]
fn arch_capabilities_are_read_only_and_intels() {
    // This bench's processor is AMD's: it has no such register.
    let mut b = Bench::new();
    b.set(Gpr::Rcx, u64::from(number::ARCH_CAPABILITIES));
    b.execute(&[Exit::MsrRead, Exit::MsrWrite]);
    assert_eq!(b.vcpu.hw.injected.len(), 2);
    let host = |leaf, subleaf| match leaf {
        0 => CpuidResult {
            ebx: u32::from_le_bytes(*b"Genu"),
            ..cpuid(leaf, subleaf)
        },
        _ => cpuid(leaf, subleaf),
    };
    let model = crate::cpuid::CpuModel::default();
    let mut policy = crate::cpuid::CpuidPolicy::new(&host, 1, &model, true).expect("a model");
    policy.set_arch_capabilities(1);
    let register = number::ARCH_CAPABILITIES;
    assert_eq!(crate::msr::announced(&policy, register), Some(9));
    assert!(!crate::msr::accepts(&policy, register, 9));
    assert!(!crate::msr::write_ignored(policy.vendor(), register));
}

#[test]
fn tsc_and_its_adjustment_move_together() {
    let mut b = Bench::new();
    let offset = b.vcpu.hw.tsc_offset;
    b.set(Gpr::Rcx, u64::from(number::TSC_ADJUST));
    b.set(Gpr::Rax, 5_000);
    b.execute(&[Exit::MsrWrite]);
    assert_eq!(b.vcpu.hw.tsc_offset, offset.wrapping_add(5_000));
}

#[test]
fn efer_refuses_what_the_guest_is_not_shown() {
    let mut b = Bench::new();
    b.set(Gpr::Rcx, u64::from(number::EFER));
    b.set(Gpr::Rax, 1 << 12); // SVME
    b.execute(&[Exit::MsrWrite]);
    assert_eq!(b.vcpu.hw.state.efer, 0);
    assert_eq!(b.vcpu.hw.injected.len(), 1);
}

#[test]
fn halt_with_interrupts_off_sleeps_on() {
    let mut b = Bench::new();
    let pause = b.run([Exit::Halt]);
    assert!(matches!(pause, Pause::Idle { .. }), "{pause:?}");
    assert_eq!(b.vcpu.hw.entries, 1, "not entered again");
}

#[test]
fn a_pause_loop_gives_the_processor_away() {
    let mut b = Bench::new();
    b.vcpu.hw.exits = [Exit::Pause, Exit::TripleFault].into_iter().collect();
    assert_eq!(b.vcpu.run(&mut b.host), Pause::Yielded);
    assert_eq!(b.vcpu.hw.entries, 1);
}

#[test]
fn single_step_over_halt_traps_at_once() {
    let mut b = Bench::new();
    b.vcpu.hw.state.rflags |= RFLAGS_TF;
    b.execute(&[Exit::Halt]);
    let trap = Event::Exception {
        vector: 1,
        error_code: None,
    };
    assert_eq!(b.vcpu.hw.injected, [trap]);
}

#[test]
fn a_timer_interrupt_wakes_a_halted_vcpu() {
    let mut b = Bench::new();
    // Local APIC on, timer one-shot on vector 0x40, IF set, then HLT.
    let write = |b: &mut Bench, offset: u64, value: u32| {
        let effect = b.vcpu.rest.apic.write_mmio(offset, Width::Dword, value);
        assert!(effect.is_ok());
    };
    write(&mut b, 0xf0, 0x1ff);
    write(&mut b, 0x320, 0x40);
    write(&mut b, 0x3e0, 0xb);
    write(&mut b, 0x380, 1_000_000);
    b.vcpu.hw.state.rflags |= RFLAGS_IF;
    let Pause::Idle { until: Some(until) } = b.run([Exit::Halt]) else {
        panic!("not idle")
    };
    assert!(until > NOW.get());
    NOW.set(until);
    b.run([]);
    assert_eq!(b.vcpu.hw.injected, [Event::Interrupt(0x40)]);
}

#[test]
fn an_interrupt_waits_for_its_window() {
    let mut b = Bench::new();
    let effect = b.vcpu.rest.apic.write_mmio(0xf0, Width::Dword, 0x1ff);
    assert!(effect.is_ok());
    assert!(
        b.vcpu
            .rest
            .apic
            .inbox()
            .post_interrupt(0x51, devices::lapic::Trigger::Edge)
    );
    b.run([]);
    assert!(b.vcpu.hw.window && b.vcpu.hw.injected.is_empty());
    b.vcpu.hw.state.rflags |= RFLAGS_IF;
    b.run([Exit::InterruptWindow]);
    assert_eq!(b.vcpu.hw.injected, [Event::Interrupt(0x51)]);
}

#[test]
fn task_priority_without_exits_holds_interrupts_back() {
    let mut b = Bench::new();
    b.vcpu.hw.priority = Some((0, 0));
    b.vcpu.hw.state.rflags |= RFLAGS_IF;
    let effect = b.vcpu.rest.apic.write_mmio(0xf0, Width::Dword, 0x1ff);
    assert!(effect.is_ok());
    // The guest writes CR8, and nobody is told.
    b.vcpu.hw.priority = Some((0x90, 0));
    let inbox = b.vcpu.rest.apic.inbox().clone();
    let _kick = inbox.post_interrupt(0x51, devices::lapic::Trigger::Edge);
    b.run([]);
    assert!(b.vcpu.hw.injected.is_empty() && !b.vcpu.hw.window);
    // It is to be told when the priority falls below that of what waits.
    assert_eq!(b.vcpu.hw.priority, Some((0x90, 5)));
    let tpr = b
        .vcpu
        .rest
        .mmio_read(&mut b.vcpu.hw, Gpa(0xfee0_0080), Width::Dword);
    assert_eq!(tpr, 0x90);
    // An exit of another kind with the priority still high, then the one that was asked for.
    b.run([Exit::Wbinvd]);
    assert!(b.vcpu.hw.injected.is_empty());
    // It cannot be taken yet, and the priority rises again: the threshold is asked for once more.
    b.vcpu.hw.state.rflags &= !RFLAGS_IF;
    b.vcpu.hw.priority = Some((0x40, 0));
    b.run([Exit::InterruptWindow]);
    assert!(b.vcpu.hw.window && b.vcpu.hw.injected.is_empty());
    b.vcpu.hw.priority = Some((0x90, 0));
    b.run([]);
    assert_eq!(b.vcpu.hw.priority, Some((0x90, 5)));
    b.vcpu.hw.state.rflags |= RFLAGS_IF;
    b.vcpu.hw.priority = Some((0x40, 0));
    b.run([Exit::InterruptWindow]);
    assert_eq!(b.vcpu.hw.injected, [Event::Interrupt(0x51)]);
    assert_eq!(b.vcpu.hw.priority.map(|(tpr, _)| tpr), Some(0x40));
    // Written by MMIO, it is CR8's too.
    b.vcpu
        .rest
        .mmio_write(&mut b.vcpu.hw, Gpa(0xfee0_0080), Width::Dword, 0x70);
    b.run([]);
    assert_eq!(b.vcpu.hw.priority, Some((0x70, 0)));
}

#[test]
fn application_processors_wait_for_their_start() {
    let mut b = Bench::with_vcpus(2, 1);
    assert_eq!(b.run([]), Pause::Idle { until: None });
    let inbox = b.vcpu.rest.apic.inbox().clone();
    let _kick = inbox.post_init();
    let _kick = inbox.post_startup(0x9a);
    b.run([]);
    assert_eq!(b.vcpu.activity, Activity::Running);
    let cs = b.vcpu.hw.segment(SegmentName::Cs);
    assert_eq!((cs.selector, cs.base, b.rip()), (0x9a00, 0x9_a000, 0));
}

#[test]
fn a_hypercall_interrupts_several_processors() {
    const NMI: u64 = 4 << 8;
    let mut b = Bench::with_vcpus(2, 0);
    let mut call = |number: u64, bits: u64, first: u64, command: u64| {
        b.set(Gpr::Rax, number);
        b.set(Gpr::Rbx, bits);
        b.set(Gpr::Rcx, 0);
        b.set(Gpr::Rdx, first);
        b.set(Gpr::Rsi, command);
        b.run([Exit::Hypercall]);
        b.get(Gpr::Rax).cast_signed()
    };
    assert_eq!(call(10, 0b11, 0, NMI), 2);
    assert_eq!(call(10, 0b110, 0, NMI), 1, "there is no third");
    assert_eq!(
        call(10, u64::MAX, u64::from(u32::MAX), NMI),
        0,
        "nor a last"
    );
    assert_eq!(call(10, 1, 0, 5 << 8), -22, "INIT");
    assert_eq!(call(11, 1, 0, NMI), -1000, "no such hypercall");
    let other = b.vcpu.rest.vm.apic_bus.inbox(VcpuId(1)).unwrap();
    assert!(other.has_pending());
    assert_eq!(b.kicks.0[1].load(Ordering::Relaxed), 1);
}

#[test]
fn power_off_and_reset_end_the_vm_and_wake_its_vcpus() {
    for (port, value, expected) in [(0x604u16, 0x2000u64, "powered off"), (0xcf9, 0x06, "reset")] {
        let mut b = Bench::with_vcpus(2, 0);
        b.set(Gpr::Rax, value);
        let width = if port == 0x604 {
            Width::Word
        } else {
            Width::Byte
        };
        let write = PortIo {
            port,
            width,
            direction: Direction::Write,
            string: false,
        };
        assert_eq!(b.run([Exit::PortIo(write)]), Pause::Ended, "{port:#x}");
        let reason = b.vcpu.vm().take_end_reason().expect("a reason");
        assert_eq!(alloc::format!("{reason}"), expected);
        assert_eq!(b.kicks.0[1].load(Ordering::Relaxed), 1);
    }
}

#[test]
fn what_cannot_be_handled_ends_the_vm_by_name() {
    for (exit, words) in [
        (Exit::TripleFault, "triple fault"),
        (
            Exit::Unknown {
                code: 0x77,
                info: 1,
            },
            "unknown exit (code 0x77, information 0x1)",
        ),
        (Exit::EntryFailure { code: 7 }, "a fake has no entry checks"),
    ] {
        let mut b = Bench::new();
        assert_eq!(b.run([exit]), Pause::Ended);
        let text = alloc::format!("{}", b.vcpu.vm().take_end_reason().expect("a reason"));
        assert!(text.contains(words) && text.contains("RIP"), "{text}");
    }
}

/// Output that no device register can hold back holds the vCPU back.
#[test]
fn a_vcpu_waits_while_output_does() {
    let mut b = Bench::new();
    b.vcpu.vm().run_state().set(RunState::OUTPUT_WAITS, true);
    assert_eq!(b.vcpu.run(&mut b.host), Pause::Yielded);
    assert_eq!(b.vcpu.hw.entries, 0);
    b.vcpu.vm().run_state().set(RunState::OUTPUT_WAITS, false);
    b.execute(&[Exit::Cpuid]);
    assert_eq!(b.vcpu.hw.entries, 2);
}

/// Where a host interrupt does not end a guest's run, the guest is made to exit in time for it.
#[test]
fn host_interrupts_do_not_wait_longer_than_they_may() {
    let mut b = Bench::new();
    b.host.patience = Some(500);
    let start = NOW.get();
    b.execute(&[Exit::Deadline, Exit::Deadline]);
    assert_eq!(b.host.interrupts, 2);
    assert!(b.vcpu.hw.deadline <= NOW.get() + 500 && b.vcpu.hw.deadline > start);
    let mut unhurried = Bench::new();
    unhurried.execute(&[Exit::Deadline]);
    assert!(unhurried.vcpu.hw.deadline > NOW.get() + SLICE);
}

#[test]
fn host_interrupts_and_nmis_go_to_the_host() {
    let mut b = Bench::new();
    b.execute(&[Exit::ExternalInterrupt, Exit::Nmi]);
    assert_eq!((b.host.interrupts, b.host.nmis), (1, 1));
}

fn any_exit() -> impl Strategy<Value = Exit> {
    let width = prop_oneof![Just(Width::Byte), Just(Width::Word), Just(Width::Dword)];
    let direction = prop_oneof![Just(Direction::Read), Just(Direction::Write)];
    prop_oneof![
        Just(Exit::Cpuid),
        Just(Exit::Hypercall),
        Just(Exit::MsrRead),
        Just(Exit::MsrWrite),
        Just(Exit::Xsetbv),
        Just(Exit::Wbinvd),
        Just(Exit::Rdpmc),
        Just(Exit::Monitor),
        Just(Exit::CrAccess(None)),
        (0u8..9, 0usize..16).prop_map(|(cr, gpr)| {
            Exit::CrAccess(Some(CrAccess::MovTo {
                cr,
                gpr: Gpr::ALL[gpr],
            }))
        }),
        any::<u16>().prop_map(|operand| Exit::CrAccess(Some(CrAccess::Lmsw(operand)))),
        (any::<u16>(), 0u8..3, any::<bool>()).prop_map(|(selector, vector, error)| {
            let source = if error {
                TaskSource::Gate
            } else {
                TaskSource::Jump
            };
            Exit::TaskSwitch(TaskSwitch {
                selector,
                source,
                length: 2,
                event: error.then_some(Event::Exception {
                    vector: vector * 4,
                    error_code: Some(1),
                }),
            })
        }),
        (any::<u16>(), width, direction, any::<bool>()).prop_map(
            |(port, width, direction, string)| {
                Exit::PortIo(PortIo {
                    port,
                    width,
                    direction,
                    string,
                })
            }
        ),
        (any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(gpa, write, fetch)| {
            Exit::NestedPageFault(NestedPageFault {
                gpa: Gpa(gpa >> 12),
                gva: None,
                write,
                fetch,
                page_walk: false,
            })
        }),
    ]
}

proptest! {
    /// Whatever exits come with whatever registers: no panic, and the loop comes to an end.
    #[test]
    fn any_exits_are_harmless(
        exits in proptest::collection::vec(any_exit(), 1..30),
        gprs in proptest::array::uniform16(prop_oneof![
            any::<u64>(), 0u64..0x1000, 0xc000_0080u64..0xc000_0110, 0x4b56_4d00u64..0x4b56_4d08,
            0xfee0_0000u64..0xfee0_0400,
        ]),
        code in proptest::collection::vec(any::<u8>(), 15),
    ) {
        let mut b = Bench::new();
        b.vcpu.hw.state.gprs = gprs;
        let rip = b.rip();
        b.vcpu.vm().memory.write(Gpa(rip), &code).unwrap();
        b.run(exits);
    }
}
