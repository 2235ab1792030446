//! VT-x and AMD-V behind one pair of traits.
//!
//! [`Backend`] is a processor's virtualization hardware: check it, turn it on, make vCPUs.
//! [`VirtualCpu`] is one vCPU: load it on a pCPU, enter it, read why it came back; [`Registers`] are its registers. Above
//! this crate nobody knows which vendor it is.
//!
//! Unsafe: this crate runs the virtualization instructions and switches the processor's
//! state between host and guest; that cannot be done in safe Rust.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod cpu;
pub mod exit;
pub mod preflight;
pub mod registers;
#[cfg(feature = "selftest")]
pub mod selftest;
pub mod state;
pub mod svm;
pub mod tsc;
pub mod vtx;

use alloc::string::String;
use core::{arch::x86_64::CpuidResult, fmt};

use mem::{HostMemory, Hpa, OutOfFrames, nested::EntryFormat};

pub use exit::{CrAccess, Exit, NestedPageFault, PortIo, TaskSource, TaskSwitch};
pub use preflight::{Feature, Need, Preflight, Status};
pub use registers::Registers;
pub use state::{
    AccessRights, CpuMode, CpuState, DescriptorTable, Event, Gpr, Segment, SegmentName, Shadow,
    SoftwareEvent, pdpte_is_valid,
};
pub use tsc::{TscScale, TscScaling};

/// Why virtualization could not be turned on for this pCPU, or a vCPU not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VirtError {
    /// A required feature is not usable: see the pre-flight text.
    Preflight(Preflight),
    /// No frames for a hardware structure.
    OutOfFrames(OutOfFrames),
    /// A virtualization instruction failed; which one, and the processor's error number.
    Instruction {
        /// Mnemonic.
        name: &'static str,
        /// VM-instruction error number, or 0 where there is none.
        error: u32,
    },
}

impl From<OutOfFrames> for VirtError {
    fn from(e: OutOfFrames) -> Self {
        VirtError::OutOfFrames(e)
    }
}

impl fmt::Display for VirtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VirtError::Preflight(p) => {
                write!(f, "a required processor feature is not usable:\n{p}")
            }
            VirtError::OutOfFrames(e) => write!(f, "no {} contiguous free frames left", e.frames),
            VirtError::Instruction { name, error } => write!(f, "{name} failed with error {error}"),
        }
    }
}

/// What a vCPU is made for.
#[derive(Clone, Copy, Debug)]
pub struct VcpuSetup {
    /// VM number: owner of the frames taken (`Owner::VmTables`), basis of the ASID / VPID.
    pub vm: u16,
    /// vCPU number within its VM.
    pub vcpu: u16,
    /// Address-space tag (VPID / ASID), unique per vCPU, from 1. The backend falls back to flushing when it exceeds what the processor has.
    pub tag: u32,
    /// Root of the VM's nested page tables.
    pub nested_root: Hpa,
}

/// One vendor's virtualization hardware. One value per machine, shared by its pCPUs.
pub trait Backend: Sized + Send + Sync + 'static {
    /// The vCPU of this vendor.
    type Vcpu: VirtualCpu;
    /// The nested-paging entries of this vendor.
    type Format: EntryFormat;
    /// "VT-x" or "AMD-V".
    const NAME: &'static str;

    /// Examines this pCPU. Changes nothing.
    fn preflight() -> Preflight;

    /// Reads the capabilities of this pCPU and prepares what all pCPUs share.
    ///
    /// # Errors
    /// [`VirtError::Preflight`] when a required feature is not usable, or no frames.
    fn new(memory: &'static dyn HostMemory) -> Result<Self, VirtError>;

    /// Turns virtualization on for the pCPU that calls (VMXON / EFER.SVME), once per pCPU.
    /// The backend finds this pCPU's private areas again by `cpu`, the pCPU number below 256.
    ///
    /// # Errors
    /// As `new`; also when this pCPU lacks what the first one had.
    fn enable(&self, cpu: usize) -> Result<(), VirtError>;

    /// Nested-paging entry format with this processor's capabilities.
    fn format(&self) -> Self::Format;

    /// What this processor's TSC scaling can do, where it has it.
    fn tsc_scaling(&self) -> Option<TscScaling>;

    /// IA32_ARCH_CAPABILITIES of this processor (SDM vol. 4, table 2-2): what does not leak from it; 0 where there is none.
    fn arch_capabilities(&self) -> u64;

    /// Takes out of an answer of this processor's CPUID the instructions that do not work in its guests.
    fn limit_cpuid(&self, leaf: u32, subleaf: u32, answer: &mut CpuidResult);

    /// Makes a vCPU in the reset state, not loaded anywhere.
    ///
    /// # Errors
    /// No frames, or a virtualization instruction failed.
    fn create_vcpu(&self, setup: VcpuSetup) -> Result<Self::Vcpu, VirtError>;

    /// Drops cached translations of these nested page tables on the calling pCPU, after a mapping was taken away or narrowed.
    fn flush_nested(&self, root: Hpa);
}

/// One vCPU's hardware state. Owned by the pCPU on which it is loaded.
///
/// Order of calls: `load`, then any number of accessors and `enter`, then `unload`.
/// Accessors other than `load` may be called only while loaded. Host interrupts are
/// disabled from `load` to `unload`, but for the windows that the kernel opens between entries.
pub trait VirtualCpu: Registers + Send + 'static {
    /// Whether the processor takes the page-directory-pointer entries of PAE paging in when CR0, CR3 or CR4 is
    /// written, and refuses bad ones then (SDM vol. 3A, section 4.4.1). With nested paging AMD's processors
    /// read them as they walk, instead (APM vol. 2, section 15.25.10).
    const LOADS_PDPTES: bool;

    /// Makes this vCPU current on pCPU `cpu`: VMPTRLD, guest's FPU/XCR0, debug registers and the MSRs that
    /// are not switched at each entry. Host values that the hypervisor needs are kept aside.
    fn load(&mut self, cpu: usize);

    /// Takes the vCPU off its pCPU, saving all that `load` loaded.
    fn unload(&mut self);

    /// Runs the guest until it exits. An event that an exit interrupted in delivery is
    /// delivered again at the next `enter` by the backend itself, unless `cancel_injection` is called.
    fn enter(&mut self) -> Exit;
    /// Has the guest's TSC count at another rate than the host's, by a factor made for [`Backend::tsc_scaling`]. Once,
    /// at first: a new vCPU has the host's rate.
    fn set_tsc_scale(&mut self, scale: TscScale);
    /// Guest TSC minus host TSC times the scale, in ticks, wrapping.
    fn set_tsc_offset(&mut self, offset: u64);

    /// Steps over the instruction that caused this exit and clears the interrupt shadow.
    /// `length`: bytes, where the VMM decoded it; `None`: the backend knows (hardware-reported
    /// length or next RIP; on AMD-V without NRIP save, the architectural length of the exit's one encoding).
    fn skip_instruction(&mut self, length: Option<u8>);

    /// Holds interrupts back for one instruction: the one just stepped over was executed in software and asks for
    /// it. With RFLAGS.TF set, [`Shadow::MovSs`] lets the single-step trap come behind the next instruction.
    fn begin_shadow(&mut self, shadow: Shadow);
    /// Ends the blocking of NMIs: an IRET was executed in software.
    fn unblock_nmis(&mut self);

    /// Instruction bytes that the hardware fetched with a nested page fault (AMD decode assists); empty where it does not.
    fn instruction_bytes(&self) -> &[u8];

    /// Whether a maskable interrupt would be taken now: RFLAGS.IF, no shadow, nothing queued.
    fn interrupt_ready(&self) -> bool;
    /// Whether an NMI would be taken now.
    fn nmi_ready(&self) -> bool;
    /// Queues an event for the next `enter`. At most one; a queued exception replaces a queued interrupt only as the caller decides.
    fn inject(&mut self, event: Event);
    /// The event queued for the next entry: by `inject`, or one whose delivery the last exit interrupted.
    fn queued(&self) -> Option<Event>;
    /// Takes back what is queued.
    fn cancel_injection(&mut self);
    /// Asks for `Exit::InterruptWindow` as soon as an interrupt could be taken. One-shot: that exit takes the request back.
    fn request_interrupt_window(&mut self, on: bool);
    /// The guest's task-priority register, which it may have changed by CR8 without an exit; `None` where
    /// every access to CR8 exits.
    fn task_priority(&self) -> Option<u8>;
    /// Sets the task-priority register that CR8 shows, and asks for an exit when the guest writes a class
    /// below `threshold`, which is not above the class of `tpr`; 0: never. That exit is
    /// `Exit::InterruptWindow` behind the write, and takes the threshold back, or `Exit::CrAccess`
    /// before it. Does nothing where every access to CR8 exits.
    fn set_task_priority(&mut self, tpr: u8, threshold: u8);
    /// Asks for `Exit::NmiWindow` as soon as an NMI could be taken. One-shot, like the interrupt window.
    fn request_nmi_window(&mut self, on: bool);

    /// Host TSC at which the guest must exit at the latest. `true`: the backend sees to it (preemption
    /// timer, `Exit::Deadline`); `false`: the caller must program a host timer interrupt.
    fn set_deadline(&mut self, host_tsc: u64) -> bool;

    /// Drops the guest's own cached translations (its CR3 space) at the next entry.
    fn flush_guest_tlb(&mut self);

    /// After `Exit::EntryFailure`: which checks of the manual the state fails, in words.
    fn explain_entry_failure(&self) -> String;
}
