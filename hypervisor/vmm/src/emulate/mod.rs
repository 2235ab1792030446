//! Instructions that the processor cannot finish by itself, executed in software.
//!
//! An access to device memory, a string port instruction, code that is not in RAM, and on AMD
//! processors without decode assists a control-register move, leave the processor with only "it happened
//! here". The instruction's bytes are fetched through the guest's own page tables, decoded
//! (`iced-x86`) and executed against the vCPU's registers and the VM's buses.
//!
//! Invariants: a fault leaves registers as they were, apart from what completed iterations
//! of a REP string instruction did; one call executes at most one instruction and at most
//! [`MAX_ITERATIONS`] iterations; guest memory is copied, never referenced.

mod alu;
mod arithmetic;
mod bits;
mod cache;
mod execute;
mod far;
mod fetch;
mod fpu;
mod gate;
mod operand;
mod plain;
mod segment;
mod service;
mod simple;
mod stack;
mod string;
mod system;
mod vector;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Mnemonic};
use mem::{Gpa, Gva, Width, guest::GuestMemory};
use virt::{CpuMode, SegmentName, Shadow, TaskSwitch, VirtualCpu};

pub use cache::DecodeCache;
use execute::{Run, Step, Stop};
use fetch::{fetch, linear};
pub use service::Service;
pub use simple::{SimpleMove, Target};

use crate::{
    breakpoint::Breakpoints,
    walk::{Access, PageFault, Paging},
};

/// Iterations of a REP instruction in one go; then the guest may take an interrupt, and goes on.
pub const MAX_ITERATIONS: u32 = 32;

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, where the vector pushes one.
    pub error_code: Option<u32>,
    /// New CR2, for #PF.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #DE.
    pub const DIVIDE_ERROR: Self = Exception {
        vector: 0,
        error_code: None,
        cr2: None,
    };
    /// #NM.
    pub const NO_FPU: Self = Exception {
        vector: 7,
        error_code: None,
        cr2: None,
    };
    /// #AC(0).
    pub const ALIGNMENT_CHECK: Self = Exception {
        vector: 17,
        error_code: Some(0),
        cr2: None,
    };
    /// #UD.
    pub const UNDEFINED_OPCODE: Self = Exception {
        vector: 6,
        error_code: None,
        cr2: None,
    };
    /// #GP(0).
    pub const GENERAL_PROTECTION: Self = Exception {
        vector: 13,
        error_code: Some(0),
        cr2: None,
    };
    /// #SS(0).
    pub const STACK_FAULT: Self = Exception {
        vector: 12,
        error_code: Some(0),
        cr2: None,
    };
}

impl From<PageFault> for Exception {
    fn from(fault: PageFault) -> Self {
        Exception {
            vector: 14,
            error_code: Some(fault.error_code),
            cr2: Some(fault.address.0),
        }
    }
}

/// How the emulation of one instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Executed: step over this many bytes.
    Done(u8),
    /// Executed: go on at this offset in CS.
    Jump(u64),
    /// Executed up to the switch to this task, which is the caller's to make.
    Task(TaskSwitch),
    /// Checked: this is the caller's to do, and then to step over this many bytes.
    Service(Service, u8),
    /// A REP instruction with iterations left: run the guest again at the same RIP.
    Again,
    /// The guest gets this exception, at the same RIP.
    Fault(Exception),
    /// Not an instruction that this emulator knows.
    Unsupported(Bytes),
}

/// An instruction's bytes, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// Up to 15 bytes; zeroes behind them.
    bytes: [u8; 16],
    length: u8,
}

impl Bytes {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// What an emulated instruction reaches beyond registers and RAM.
pub trait Platform<V> {
    /// Device memory read; all-ones where nobody answers.
    fn mmio_read(&mut self, cpu: &mut V, gpa: Gpa, width: Width) -> u64;
    /// Device memory write.
    fn mmio_write(&mut self, cpu: &mut V, gpa: Gpa, width: Width, value: u64);
    /// Port read; all-ones where nobody answers.
    fn port_read(&mut self, port: u16, width: Width) -> u32;
    /// Port write.
    fn port_write(&mut self, port: u16, width: Width, value: u32);
    /// Control-register read, CR8 included.
    fn control_read(&mut self, cpu: &mut V, cr: u8) -> u64;
    /// Control-register write with the checks of MOV to CRn.
    ///
    /// # Errors
    /// The exception for the guest.
    fn control_write(&mut self, cpu: &mut V, cr: u8, value: u64) -> Result<(), Exception>;
    /// Physical address bits of the guest's processor.
    fn physical_bits(&self) -> u8;
    /// What the instruction leads to beyond its result; not called where that is nothing.
    fn aftermath(&mut self, aftermath: Aftermath);
}

/// What an executed instruction leads to beyond its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aftermath {
    /// Hardware breakpoints that it has hit, as bits of DR6.
    pub breakpoints: u64,
    /// It holds interrupts back for one more instruction.
    pub shadow: Option<Shadow>,
    /// It was IRET, or began as one: NMIs are not blocked any more, and RF is as it has loaded it.
    pub interrupt_return: bool,
}

/// Fetches and executes the instruction at the vCPU's RIP. `target`: the access that brought the vCPU
/// here, where the exit tells it. [`SimpleMove::find`] is the short way, to be tried first.
pub fn emulate<V: VirtualCpu, P: Platform<V>>(
    cpu: &mut V,
    memory: &GuestMemory,
    platform: &mut P,
    cache: &mut DecodeCache,
    target: Option<Target>,
) -> Outcome {
    let paging = Paging::of(cpu, platform.physical_bits());
    let mode = cpu.mode();
    let bytes = match fetch(cpu, memory, platform, &paging, mode) {
        Ok(bytes) => bytes,
        Err(exception) => return Outcome::Fault(exception),
    };
    let bitness = match mode {
        CpuMode::Long64 => 64,
        CpuMode::Protected32 | CpuMode::Compatibility32 => 32,
        _ => 16,
    };
    let instruction = match cache.decode(cpu.rip(), bitness, &bytes) {
        Ok(instruction) => instruction,
        Err(why) => {
            // Bytes that ran out at a page that cannot be fetched fault there; all others are undefined.
            if bytes.length < 15 && why == DecoderError::NoMoreBytes {
                let next = linear(cpu.segment(SegmentName::Cs).base, mode, cpu.rip())
                    .wrapping_add(u64::from(bytes.length));
                if let Err(fault) = paging.translate(memory, Gva(next), Access::Fetch) {
                    return Outcome::Fault(fault.into());
                }
            }
            return Outcome::Fault(Exception::UNDEFINED_OPCODE);
        }
    };
    // A string instruction has two addresses; the exit told only one of them.
    let target = target.filter(|_| !instruction.is_string_instruction());
    let breakpoints = Breakpoints::of(cpu);
    let mut run = Run {
        cpu,
        memory,
        platform,
        paging,
        mode,
        instruction: &instruction,
        target,
        breakpoints,
        aftermath: Aftermath::default(),
    };
    let executed = run.execute();
    let mut aftermath = run.aftermath;
    if executed.is_err() {
        aftermath.breakpoints = 0;
    }
    if aftermath != Aftermath::default() {
        platform.aftermath(aftermath);
    }
    match executed {
        Ok(Step::Done) => Outcome::Done(instruction.len() as u8),
        Ok(Step::Jump(target)) => Outcome::Jump(target),
        Ok(Step::Task(request)) => Outcome::Task(request),
        Ok(Step::Service(service)) => Outcome::Service(service, instruction.len() as u8),
        Ok(Step::Again) => Outcome::Again,
        Err(Stop::Fault(exception)) => Outcome::Fault(exception),
        Err(Stop::Unsupported) => Outcome::Unsupported(Bytes {
            length: instruction.len() as u8,
            ..bytes
        }),
    }
}

/// Bytes of VMCALL and of VMMCALL.
pub const HYPERCALL_BYTES: u8 = 3;

/// Whether the instruction at the vCPU's RIP is VMCALL or VMMCALL.
pub fn is_hypercall<V: VirtualCpu, P: Platform<V>>(
    cpu: &mut V,
    memory: &GuestMemory,
    platform: &mut P,
) -> bool {
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    let paging = Paging::of(cpu, platform.physical_bits());
    let mode = cpu.mode();
    let bytes = fetch(cpu, memory, platform, &paging, mode);
    bytes.is_ok_and(|bytes| {
        let bytes = bytes.as_slice();
        bytes.starts_with(&VMCALL) || bytes.starts_with(&VMMCALL)
    })
}

/// One decode, so that the tables that the decoder allocates on first use are there
/// before a guest runs. Call it once at boot.
pub fn warm_up() {
    let nop = Decoder::with_ip(64, &[0x90], 0, DecoderOptions::NONE).decode();
    debug_assert_eq!(nop.mnemonic(), Mnemonic::Nop);
}

/// CR0 after LMSW with this operand: the low four bits, but PE cannot be cleared (SDM vol. 2A, LMSW).
pub fn load_msw(cr0: u64, operand: u16) -> u64 {
    let low = u64::from(operand) & 0xf;
    (cr0 & !0xf) | low | (cr0 & 1)
}

#[cfg(test)]
mod gate_tests;
#[cfg(test)]
mod rare_tests;
#[cfg(test)]
mod tests;
