//! Why a vCPU left guest mode: one vendor-neutral enum, already decoded.
//!
//! Raw exit codes are known in exactly two places, `vtx` and `svm`. Where the hardware
//! gives no decode (AMD without decode assists), the variant says so and the VMM decodes
//! the instruction at the guest's RIP.

use mem::{Direction, Gpa, Gva, Width};

use crate::state::{Event, Gpr};

/// An IN, OUT, INS or OUTS (SDM vol. 3C, table 28-5; APM vol. 2, section 15.10.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortIo {
    /// Port number.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub width: Width,
    /// IN or OUT.
    pub direction: Direction,
    /// INS/OUTS: the VMM decodes the instruction for segment, address size and REP.
    pub string: bool,
}

/// What the guest did to memory that its nested page tables don't allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedPageFault {
    /// Guest-physical address of the access.
    pub gpa: Gpa,
    /// Guest-linear address, where the hardware reports it (VT-x).
    pub gva: Option<Gva>,
    /// A data write (also the processor's writes of accessed/dirty bits).
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// The fault came from the processor's own walk of the guest's page tables, not from the final access.
    pub page_walk: bool,
}

/// A move to or from a control register, or CLTS/LMSW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV CRn, reg.
    MovTo {
        /// 0, 3, 4 or 8.
        cr: u8,
        /// Source register.
        gpr: Gpr,
    },
    /// MOV reg, CRn.
    MovFrom {
        /// 0, 3, 4 or 8.
        cr: u8,
        /// Destination register.
        gpr: Gpr,
    },
    /// CLTS.
    Clts,
    /// LMSW with this source operand (low 16 bits).
    Lmsw(u16),
}

/// What asks for a task switch (SDM vol. 3C, table 28-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSource {
    /// Far CALL to a TSS or task gate.
    Call,
    /// IRET with EFLAGS.NT.
    Iret,
    /// Far JMP to a TSS or task gate.
    Jump,
    /// A task gate in the IDT.
    Gate,
}

/// A task switch that the processor left to the VMM, its gate and privilege already checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Selector of the new task's TSS.
    pub selector: u16,
    /// What asks for it.
    pub source: TaskSource,
    /// Bytes of the instruction that does; 0: an interrupt or exception.
    pub length: u8,
    /// The event that goes through the task gate.
    pub event: Option<Event>,
}

/// Why a vCPU left guest mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// CPUID. RIP still points at it, as for every instruction exit; `VirtualCpu::skip_instruction` steps over it.
    Cpuid,
    /// VMCALL / VMMCALL.
    Hypercall,
    /// Port I/O.
    PortIo(PortIo),
    /// RDMSR; the number is in ECX.
    MsrRead,
    /// WRMSR; the number is in ECX, the value in EDX:EAX.
    MsrWrite,
    /// EPT violation / #NPF.
    NestedPageFault(NestedPageFault),
    /// EPT misconfiguration or a reserved bit in the NPT: a defect of ours, fatal to the VM.
    NestedMisconfiguration(Gpa),
    /// Control-register access; `None`: the VMM must decode the instruction.
    CrAccess(Option<CrAccess>),
    /// HLT.
    Halt,
    /// PAUSE, or a PAUSE loop.
    Pause,
    /// XSETBV: index in ECX, value in EDX:EAX.
    Xsetbv,
    /// WBINVD or WBNOINVD.
    Wbinvd,
    /// INVD.
    Invd,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    Mwait,
    /// RDPMC.
    Rdpmc,
    /// RDRAND or RDSEED, where intercepted: the VMM decodes.
    Random,
    /// A virtualization instruction (VMXON.., VMRUN.., SKINIT, GETSEC, ..): the guest gets #UD.
    VirtualizationInstruction,
    /// A task switch that the processor does not make by itself.
    TaskSwitch(TaskSwitch),
    /// An intercepted exception (#DB, #AC). It was not delivered: the VMM injects it.
    Exception {
        /// Vector, 0 to 31.
        vector: u8,
        /// Error code, where the vector has one.
        error_code: Option<u32>,
    },
    /// A host interrupt is pending: the kernel lets it in.
    ExternalInterrupt,
    /// A host NMI arrived: the kernel handles it.
    Nmi,
    /// The guest can take an interrupt now (asked for by `request_interrupt_window`), or has lowered its
    /// task priority below the threshold of `set_task_priority`.
    InterruptWindow,
    /// The guest can take an NMI now (asked for by `request_nmi_window`).
    NmiWindow,
    /// The deadline given to `set_deadline` has come (VMX preemption timer).
    Deadline,
    /// Triple fault / shutdown.
    TripleFault,
    /// INIT signal received by the physical processor while in guest mode.
    Init,
    /// VM entry was refused; the text explanation comes from `VirtualCpu::explain_entry_failure`.
    EntryFailure {
        /// VT-x: VM-instruction error, or exit reason with bit 31 set. AMD-V: exit code.
        code: u64,
    },
    /// An exit nobody knows: fatal to the VM, never to the host.
    Unknown {
        /// Raw exit reason (VT-x) or exit code (AMD-V).
        code: u64,
        /// Exit qualification (VT-x) or EXITINFO1 (AMD-V).
        info: u64,
    },
}

impl Exit {
    /// Number of kinds, for counters indexed by [`Exit::index`].
    pub const KINDS: usize = Self::NAMES.len();

    /// Names by index, for tables of exit counters.
    pub const NAMES: [&'static str; 29] = [
        "cpuid",
        "hypercall",
        "port-io",
        "msr-read",
        "msr-write",
        "nested-page-fault",
        "nested-misconfiguration",
        "cr-access",
        "halt",
        "pause",
        "xsetbv",
        "wbinvd",
        "invd",
        "monitor",
        "mwait",
        "rdpmc",
        "random",
        "virtualization-instruction",
        "task-switch",
        "exception",
        "external-interrupt",
        "nmi",
        "interrupt-window",
        "nmi-window",
        "deadline",
        "triple-fault",
        "init",
        "entry-failure",
        "unknown",
    ];

    /// [`index`](Exit::index) of [`Exit::PortIo`].
    pub const PORT_IO: usize = 2;

    /// Counter index of this exit, below [`Exit::KINDS`].
    pub const fn index(&self) -> usize {
        match self {
            Exit::Cpuid => 0,
            Exit::Hypercall => 1,
            Exit::PortIo(_) => Self::PORT_IO,
            Exit::MsrRead => 3,
            Exit::MsrWrite => 4,
            Exit::NestedPageFault(_) => 5,
            Exit::NestedMisconfiguration(_) => 6,
            Exit::CrAccess(_) => 7,
            Exit::Halt => 8,
            Exit::Pause => 9,
            Exit::Xsetbv => 10,
            Exit::Wbinvd => 11,
            Exit::Invd => 12,
            Exit::Monitor => 13,
            Exit::Mwait => 14,
            Exit::Rdpmc => 15,
            Exit::Random => 16,
            Exit::VirtualizationInstruction => 17,
            Exit::TaskSwitch(_) => 18,
            Exit::Exception { .. } => 19,
            Exit::ExternalInterrupt => 20,
            Exit::Nmi => 21,
            Exit::InterruptWindow => 22,
            Exit::NmiWindow => 23,
            Exit::Deadline => 24,
            Exit::TripleFault => 25,
            Exit::Init => 26,
            Exit::EntryFailure { .. } => 27,
            Exit::Unknown { .. } => 28,
        }
    }
}
