//! Instructions that the processor cannot finish by itself, executed in software.
//!
//! An access to device memory, a string port instruction, and on AMD processors without
//! decode assists a control-register move, leave the processor with only "it happened
//! here". The instruction's bytes are fetched through the guest's own page tables, decoded
//! (`iced-x86`) and executed against the vCPU's registers and the VM's buses.
//!
//! Invariants: a fault leaves registers as they were, apart from what completed iterations
//! of a REP string instruction did; one call executes at most one instruction and at most
//! [`MAX_ITERATIONS`] iterations; guest memory is copied, never referenced.

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register,
};
use mem::{Gpa, Gva, Width, guest::GuestMemory};
use virt::{CpuMode, Gpr, SegmentName, VirtualCpu};

use crate::walk::{Access, PageFault, Paging};

/// Iterations of a REP instruction in one go; then the guest may take an interrupt, and goes on.
pub const MAX_ITERATIONS: u32 = 256;

const RFLAGS_CF: u64 = 1 << 0;
const RFLAGS_PF: u64 = 1 << 2;
const RFLAGS_AF: u64 = 1 << 4;
const RFLAGS_ZF: u64 = 1 << 6;
const RFLAGS_SF: u64 = 1 << 7;
const RFLAGS_DF: u64 = 1 << 10;
const RFLAGS_OF: u64 = 1 << 11;
const ARITHMETIC: u64 = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;

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
}

/// Decoded instructions by address, so that a driver's access to its device is decoded once.
///
/// An entry is used only if the bytes at RIP are still the same, so stale code is never run.
pub struct DecodeCache {
    entries: [CachedInstruction; DECODE_ENTRIES],
}

/// Entries of a [`DecodeCache`], a power of two.
const DECODE_ENTRIES: usize = 32;

#[derive(Clone, Copy)]
struct CachedInstruction {
    rip: u64,
    bitness: u32,
    /// Bytes of the instruction; 0 in an empty entry.
    length: u8,
    /// Them, the first one lowest, and ones where they are.
    bytes: u128,
    mask: u128,
    instruction: Instruction,
}

impl Default for DecodeCache {
    fn default() -> Self {
        let nothing = CachedInstruction {
            rip: 0,
            bitness: 0,
            length: 0,
            bytes: 0,
            mask: 0,
            instruction: Instruction::default(),
        };
        DecodeCache {
            entries: [nothing; DECODE_ENTRIES],
        }
    }
}

impl DecodeCache {
    /// The instruction that `bytes` begin with, and the decoder's error where they are none.
    fn decode(
        &mut self,
        rip: u64,
        bitness: u32,
        bytes: &Bytes,
    ) -> Result<Instruction, DecoderError> {
        let entry = &mut self.entries[(rip as usize) % DECODE_ENTRIES];
        let found = u128::from_le_bytes(bytes.bytes);
        if entry.rip == rip
            && entry.bitness == bitness
            && (1..=bytes.length).contains(&entry.length)
            && (entry.bytes ^ found) & entry.mask == 0
        {
            return Ok(entry.instruction);
        }
        let mut decoder = Decoder::with_ip(bitness, bytes.as_slice(), rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.code() == Code::INVALID {
            return Err(decoder.last_error());
        }
        let length = instruction.len() as u8;
        *entry = CachedInstruction {
            rip,
            bitness,
            length,
            bytes: found,
            mask: (1u128 << (8 * length)) - 1,
            instruction,
        };
        Ok(instruction)
    }
}

/// Fetches and executes the instruction at the vCPU's RIP. `target`: the guest-physical address of
/// the access that brought the vCPU here, where the exit tells it.
pub fn emulate<V: VirtualCpu, P: Platform<V>>(
    cpu: &mut V,
    memory: &GuestMemory,
    platform: &mut P,
    cache: &mut DecodeCache,
    target: Option<Gpa>,
) -> Outcome {
    let paging = Paging::of(cpu);
    let mode = cpu.mode();
    let bytes = match fetch(cpu, memory, &paging, mode) {
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
    let mut run = Run {
        cpu,
        memory,
        platform,
        paging,
        mode,
        instruction: &instruction,
        target,
    };
    match run.execute() {
        Ok(Step::Done) => Outcome::Done(instruction.len() as u8),
        Ok(Step::Again) => Outcome::Again,
        Err(Stop::Fault(exception)) => Outcome::Fault(exception),
        Err(Stop::Unsupported) => Outcome::Unsupported(Bytes {
            length: instruction.len() as u8,
            ..bytes
        }),
    }
}

/// One decode, so that the tables that the decoder allocates on first use are there
/// before a guest runs. Call it once at boot.
pub fn warm_up() {
    let nop = Decoder::with_ip(64, &[0x90], 0, DecoderOptions::NONE).decode();
    debug_assert_eq!(nop.mnemonic(), Mnemonic::Nop);
}

fn linear(base: u64, mode: CpuMode, offset: u64) -> u64 {
    if mode == CpuMode::Long64 {
        base.wrapping_add(offset)
    } else {
        base.wrapping_add(offset) & 0xffff_ffff
    }
}

/// Copies up to 15 bytes at RIP, as far as they can be fetched.
fn fetch<V: VirtualCpu>(
    cpu: &V,
    memory: &GuestMemory,
    paging: &Paging,
    mode: CpuMode,
) -> Result<Bytes, Exception> {
    let mut out = Bytes {
        bytes: [0; 16],
        length: 0,
    };
    let assisted = cpu.instruction_bytes();
    if !assisted.is_empty() {
        let length = assisted.len().min(15);
        out.bytes[..length].copy_from_slice(&assisted[..length]);
        out.length = length as u8;
        return Ok(out);
    }
    let base = if mode == CpuMode::Long64 {
        0
    } else {
        cpu.segment(SegmentName::Cs).base
    };
    let start = linear(base, mode, cpu.rip());
    while out.length < 15 {
        let at = Gva(start.wrapping_add(u64::from(out.length)));
        let translated = paging.translate(memory, at, Access::Fetch);
        let gpa = match translated {
            Ok(gpa) => gpa,
            Err(fault) if out.length == 0 => return Err(fault.into()),
            Err(_) => break,
        };
        let rest = (mem::PAGE_SIZE - at.page_offset()).min(u64::from(15 - out.length)) as usize;
        let from = usize::from(out.length);
        if memory.read(gpa, &mut out.bytes[from..from + rest]).is_err() {
            // Code outside RAM: device memory reads as all-ones, which decodes to #UD.
            out.bytes[from..from + rest].fill(0xff);
        }
        out.length += rest as u8;
    }
    Ok(out)
}

enum Step {
    Done,
    Again,
}

enum Stop {
    Fault(Exception),
    Unsupported,
}

impl<E: Into<Exception>> From<E> for Stop {
    fn from(fault: E) -> Self {
        Stop::Fault(fault.into())
    }
}

/// A two-operand or one-operand computation on `width` bits: result and arithmetic flags.
#[derive(Clone, Copy)]
enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
}

fn sign_bit(width: Width) -> u64 {
    1 << (8 * width.bytes() - 1)
}

/// ZF, SF and PF of a result.
fn result_flags(result: u64, width: Width) -> u64 {
    let mut flags = 0;
    if result & width.mask() == 0 {
        flags |= RFLAGS_ZF;
    }
    if result & sign_bit(width) != 0 {
        flags |= RFLAGS_SF;
    }
    if (result as u8).count_ones().is_multiple_of(2) {
        flags |= RFLAGS_PF;
    }
    flags
}

fn compute(operation: Alu, a: u64, b: u64, carry: bool, width: Width) -> (u64, u64) {
    let mask = width.mask();
    let (a, b) = (a & mask, b & mask);
    let carry = u128::from(carry);
    let (result, mut flags) = match operation {
        Alu::And => (a & b, 0),
        Alu::Or => (a | b, 0),
        Alu::Xor => (a ^ b, 0),
        Alu::Add | Alu::Adc => {
            let carry = if matches!(operation, Alu::Adc) {
                carry
            } else {
                0
            };
            let wide = u128::from(a) + u128::from(b) + carry;
            let result = wide as u64 & mask;
            let mut flags = if wide > u128::from(mask) {
                RFLAGS_CF
            } else {
                0
            };
            if (a ^ result) & (b ^ result) & sign_bit(width) != 0 {
                flags |= RFLAGS_OF;
            }
            (result, flags | ((a ^ b ^ result) & RFLAGS_AF))
        }
        Alu::Sub | Alu::Sbb => {
            let borrow = if matches!(operation, Alu::Sbb) {
                carry
            } else {
                0
            };
            let result = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask;
            let mut flags = if u128::from(a) < u128::from(b) + borrow {
                RFLAGS_CF
            } else {
                0
            };
            if (a ^ b) & (a ^ result) & sign_bit(width) != 0 {
                flags |= RFLAGS_OF;
            }
            (result, flags | ((a ^ b ^ result) & RFLAGS_AF))
        }
    };
    flags |= result_flags(result, width);
    (result, flags)
}

struct Run<'a, V, P> {
    cpu: &'a mut V,
    memory: &'a GuestMemory,
    platform: &'a mut P,
    paging: Paging,
    mode: CpuMode,
    instruction: &'a Instruction,
    /// Where the processor found that an access of this instruction is not to RAM.
    target: Option<Gpa>,
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    fn execute(&mut self) -> Result<Step, Stop> {
        if self.move_whole_register()? {
            return Ok(Step::Done);
        }
        match self.instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movnti => self.mov()?,
            Mnemonic::Movbe => {
                let value = self.get(1)?;
                let width = self.width(0)?;
                self.set(0, value.swap_bytes() >> (64 - 8 * width.bytes()))?;
            }
            Mnemonic::Movzx => {
                let value = self.get(1)?;
                self.set(0, value)?;
            }
            Mnemonic::Movsx | Mnemonic::Movsxd => {
                let (value, width) = (self.get(1)?, self.width(1)?);
                let shift = 64 - 8 * width.bytes() as u32;
                self.set(0, (((value << shift) as i64) >> shift) as u64)?;
            }
            Mnemonic::Add => self.alu(Alu::Add, true)?,
            Mnemonic::Or => self.alu(Alu::Or, true)?,
            Mnemonic::Adc => self.alu(Alu::Adc, true)?,
            Mnemonic::Sbb => self.alu(Alu::Sbb, true)?,
            Mnemonic::And => self.alu(Alu::And, true)?,
            Mnemonic::Sub => self.alu(Alu::Sub, true)?,
            Mnemonic::Xor => self.alu(Alu::Xor, true)?,
            Mnemonic::Cmp => self.alu(Alu::Sub, false)?,
            Mnemonic::Test => self.alu(Alu::And, false)?,
            Mnemonic::Inc => self.step_by_one(Alu::Add)?,
            Mnemonic::Dec => self.step_by_one(Alu::Sub)?,
            Mnemonic::Not => {
                let value = !self.get(0)?;
                self.set(0, value)?;
            }
            Mnemonic::Neg => {
                let (value, width) = (self.get(0)?, self.width(0)?);
                let (result, flags) = compute(Alu::Sub, 0, value, false, width);
                self.set(0, result)?;
                self.set_flags(ARITHMETIC, flags);
            }
            Mnemonic::Xchg => {
                let (a, b) = (self.get(0)?, self.get(1)?);
                // The memory operand first: if it faults, no register has changed.
                let (first, second) = if self.is_memory(1) { (1, 0) } else { (0, 1) };
                self.set(first, if first == 0 { b } else { a })?;
                self.set(second, if second == 0 { b } else { a })?;
            }
            Mnemonic::Xadd => {
                let (a, b, width) = (self.get(0)?, self.get(1)?, self.width(0)?);
                let (sum, flags) = compute(Alu::Add, a, b, false, width);
                self.set(0, sum)?;
                self.set(1, a)?;
                self.set_flags(ARITHMETIC, flags);
            }
            Mnemonic::Cmpxchg => {
                let (old, new, width) = (self.get(0)?, self.get(1)?, self.width(0)?);
                let accumulator = self.cpu.gpr(Gpr::Rax) & width.mask();
                let (_, flags) = compute(Alu::Sub, accumulator, old, false, width);
                let equal = flags & RFLAGS_ZF != 0;
                self.set(0, if equal { new } else { old })?;
                if !equal {
                    self.write_gpr(Gpr::Rax, width, old);
                }
                self.set_flags(ARITHMETIC, flags);
            }
            Mnemonic::Bt => self.bit(|_, _| None)?,
            Mnemonic::Bts => self.bit(|value, bit| Some(value | bit))?,
            Mnemonic::Btr => self.bit(|value, bit| Some(value & !bit))?,
            Mnemonic::Btc => self.bit(|value, bit| Some(value ^ bit))?,
            Mnemonic::Movsb
            | Mnemonic::Movsw
            | Mnemonic::Movsd
            | Mnemonic::Movsq
            | Mnemonic::Stosb
            | Mnemonic::Stosw
            | Mnemonic::Stosd
            | Mnemonic::Stosq
            | Mnemonic::Lodsb
            | Mnemonic::Lodsw
            | Mnemonic::Lodsd
            | Mnemonic::Lodsq
            | Mnemonic::Scasb
            | Mnemonic::Scasw
            | Mnemonic::Scasd
            | Mnemonic::Scasq
            | Mnemonic::Cmpsb
            | Mnemonic::Cmpsw
            | Mnemonic::Cmpsd
            | Mnemonic::Cmpsq
            | Mnemonic::Insb
            | Mnemonic::Insw
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsw
            | Mnemonic::Outsd
                if self.instruction.is_string_instruction() =>
            {
                return self.string();
            }
            Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => {
                return Err(Stop::Fault(Exception::UNDEFINED_OPCODE));
            }
            Mnemonic::Clts => {
                let cr0 = self.platform.control_read(self.cpu, 0);
                self.platform.control_write(self.cpu, 0, cr0 & !(1 << 3))?;
            }
            Mnemonic::Lmsw => {
                let value = self.get(0)?;
                let cr0 = self.platform.control_read(self.cpu, 0);
                self.platform
                    .control_write(self.cpu, 0, load_msw(cr0, value as u16))?;
            }
            Mnemonic::Smsw => {
                let cr0 = self.platform.control_read(self.cpu, 0);
                self.set(0, cr0)?;
            }
            _ => return Err(Stop::Unsupported),
        }
        Ok(Step::Done)
    }

    /// The two instructions that drivers reach device registers with: MOV between memory and a whole
    /// 32- or 64-bit register. Returns whether this was one.
    fn move_whole_register(&mut self) -> Result<bool, Stop> {
        let (width, load) = match self.instruction.code() {
            Code::Mov_r32_rm32 => (Width::Dword, true),
            Code::Mov_r64_rm64 => (Width::Qword, true),
            Code::Mov_rm32_r32 => (Width::Dword, false),
            Code::Mov_rm64_r64 => (Width::Qword, false),
            _ => return Ok(false),
        };
        let (register, memory) = if load { (0, 1) } else { (1, 0) };
        if self.instruction.op_kind(memory) != OpKind::Memory {
            return Ok(false);
        }
        let first = if width == Width::Dword {
            Register::EAX
        } else {
            Register::RAX
        };
        let number = self.instruction.op_register(register) as usize - first as usize;
        let gpr = Gpr::ALL[number & 15];
        let at = self.operand_address(memory)?;
        if load {
            let value = self.load(at, width)?;
            self.cpu.set_gpr(gpr, value);
        } else {
            let value = self.cpu.gpr(gpr) & width.mask();
            self.store(at, width, value)?;
        }
        Ok(true)
    }

    fn mov(&mut self) -> Result<(), Stop> {
        let (to, from) = (
            self.instruction.op0_register(),
            self.instruction.op1_register(),
        );
        if to.is_cr() {
            let value = self.read_register(from)?;
            return Ok(self
                .platform
                .control_write(self.cpu, to.number() as u8, value)?);
        }
        if from.is_cr() {
            let value = self.platform.control_read(self.cpu, from.number() as u8);
            return self.write_register(to, value);
        }
        let value = self.get(1)?;
        self.set(0, value)
    }

    fn alu(&mut self, operation: Alu, store: bool) -> Result<(), Stop> {
        let (a, b, width) = (self.get(0)?, self.get(1)?, self.width(0)?);
        let carry = self.cpu.rflags() & RFLAGS_CF != 0;
        let (result, flags) = compute(operation, a, b, carry, width);
        if store {
            self.set(0, result)?;
        }
        self.set_flags(ARITHMETIC, flags);
        Ok(())
    }

    fn step_by_one(&mut self, operation: Alu) -> Result<(), Stop> {
        let (value, width) = (self.get(0)?, self.width(0)?);
        let (result, flags) = compute(operation, value, 1, false, width);
        self.set(0, result)?;
        self.set_flags(ARITHMETIC & !RFLAGS_CF, flags);
        Ok(())
    }

    /// BT and its kin. A register bit offset reaches beyond the operand (SDM vol. 2A, BT).
    fn bit(&mut self, change: impl Fn(u64, u64) -> Option<u64>) -> Result<(), Stop> {
        let width = self.width(0)?;
        let bits = 8 * width.bytes() as u64;
        let offset = self.get(1)?;
        let bit = 1 << (offset % bits);
        let old = if self.is_memory(0) && self.instruction.op1_kind() == OpKind::Register {
            let offset_width = self.width(1)?;
            let shift = 64 - 8 * offset_width.bytes() as u32;
            let signed = ((offset << shift) as i64) >> shift;
            let words = signed.div_euclid(bits as i64);
            let displacement = words.wrapping_mul(width.bytes() as i64) as u64;
            let at = Gva(self.operand_address(0)?.0.wrapping_add(displacement));
            let old = self.load(at, width)?;
            if let Some(new) = change(old, bit) {
                self.store(at, width, new)?;
            }
            old
        } else {
            let old = self.get(0)?;
            if let Some(new) = change(old, bit) {
                self.set(0, new)?;
            }
            old
        };
        self.set_flags(RFLAGS_CF, if old & bit != 0 { RFLAGS_CF } else { 0 });
        Ok(())
    }

    /// MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, with or without REP.
    fn string(&mut self) -> Result<Step, Stop> {
        let instruction = self.instruction;
        let width = match instruction.memory_size().size() {
            1 => Width::Byte,
            2 => Width::Word,
            4 => Width::Dword,
            8 => Width::Qword,
            _ => return Err(Stop::Unsupported),
        };
        let address_width = self.string_address_width();
        let repeat_equal = instruction.has_rep_prefix() || instruction.has_repe_prefix();
        let repeat_unequal = instruction.has_repne_prefix();
        let repeats = repeat_equal || repeat_unequal;
        for _ in 0..MAX_ITERATIONS {
            let count = self.cpu.gpr(Gpr::Rcx) & address_width.mask();
            if repeats && count == 0 {
                return Ok(Step::Done);
            }
            let compares = self.string_once(width, address_width)?;
            if !repeats {
                return Ok(Step::Done);
            }
            self.write_address_register(Gpr::Rcx, address_width, count.wrapping_sub(1));
            let equal = self.cpu.rflags() & RFLAGS_ZF != 0;
            if compares && (repeat_unequal == equal) {
                return Ok(Step::Done);
            }
        }
        Ok(Step::Again)
    }

    fn string_address_width(&self) -> Width {
        let explicit = [self.instruction.op0_kind(), self.instruction.op1_kind()];
        for kind in explicit {
            match kind {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => {
                    return Width::Word;
                }
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                    return Width::Dword;
                }
                _ => {}
            }
        }
        Width::Qword
    }

    /// One iteration. Returns whether the instruction compares (and so ends REP by ZF).
    fn string_once(&mut self, width: Width, address_width: Width) -> Result<bool, Stop> {
        use Mnemonic as M;
        let (mut source, mut destination, mut compares) = (false, false, false);
        match self.instruction.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
                let value = self.load(self.operand_address(1)?, width)?;
                self.store(self.operand_address(0)?, width, value)?;
                (source, destination) = (true, true);
            }
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
                let value = self.cpu.gpr(Gpr::Rax);
                self.store(self.operand_address(0)?, width, value)?;
                destination = true;
            }
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
                let value = self.load(self.operand_address(1)?, width)?;
                self.write_gpr(Gpr::Rax, width, value);
                source = true;
            }
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
                let value = self.load(self.operand_address(1)?, width)?;
                let (_, flags) = compute(Alu::Sub, self.cpu.gpr(Gpr::Rax), value, false, width);
                self.set_flags(ARITHMETIC, flags);
                (destination, compares) = (true, true);
            }
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
                let a = self.load(self.operand_address(0)?, width)?;
                let b = self.load(self.operand_address(1)?, width)?;
                let (_, flags) = compute(Alu::Sub, a, b, false, width);
                self.set_flags(ARITHMETIC, flags);
                (source, destination, compares) = (true, true, true);
            }
            M::Insb | M::Insw | M::Insd => {
                let at = self.operand_address(0)?;
                // The store must not fault once the device has been read.
                self.probe(at, width, Access::Write)?;
                let port = self.cpu.gpr(Gpr::Rdx) as u16;
                let value = self.platform.port_read(port, width);
                self.store(at, width, u64::from(value))?;
                destination = true;
            }
            M::Outsb | M::Outsw | M::Outsd => {
                let value = self.load(self.operand_address(1)?, width)?;
                let port = self.cpu.gpr(Gpr::Rdx) as u16;
                self.platform.port_write(port, width, value as u32);
                source = true;
            }
            _ => return Err(Stop::Unsupported),
        }
        let back = self.cpu.rflags() & RFLAGS_DF != 0;
        let step = width.bytes() as u64;
        for (used, gpr) in [(source, Gpr::Rsi), (destination, Gpr::Rdi)] {
            if used {
                let old = self.cpu.gpr(gpr);
                let new = if back {
                    old.wrapping_sub(step)
                } else {
                    old.wrapping_add(step)
                };
                self.write_address_register(gpr, address_width, new);
            }
        }
        Ok(compares)
    }

    /// Writes RCX, RSI or RDI as a string instruction of this address size does.
    fn write_address_register(&mut self, gpr: Gpr, width: Width, value: u64) {
        self.write_gpr(gpr, width, value & width.mask());
    }

    fn is_memory(&self, operand: u32) -> bool {
        !matches!(
            self.instruction.op_kind(operand),
            OpKind::Register
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64
        )
    }

    /// Width of an operand.
    fn width(&self, operand: u32) -> Result<Width, Stop> {
        let bytes = match self.instruction.op_kind(operand) {
            OpKind::Register => self.instruction.op_register(operand).size(),
            _ if self.is_memory(operand) => self.instruction.memory_size().size(),
            _ => return self.width(0),
        };
        Width::from_bytes(bytes).ok_or(Stop::Unsupported)
    }

    fn get(&mut self, operand: u32) -> Result<u64, Stop> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => self.read_register(self.instruction.op_register(operand)),
            _ if self.is_memory(operand) => {
                let width = self.width(operand)?;
                self.load(self.operand_address(operand)?, width)
            }
            _ => Ok(self.instruction.immediate(operand)),
        }
    }

    fn set(&mut self, operand: u32, value: u64) -> Result<(), Stop> {
        if self.instruction.op_kind(operand) == OpKind::Register {
            return self.write_register(self.instruction.op_register(operand), value);
        }
        let width = self.width(operand)?;
        self.store(self.operand_address(operand)?, width, value)
    }

    fn read_register(&self, register: Register) -> Result<u64, Stop> {
        if let Some(name) = segment_name(register) {
            return Ok(u64::from(self.cpu.segment(name).selector));
        }
        let (gpr, shift) = general(register).ok_or(Stop::Unsupported)?;
        let width = Width::from_bytes(register.size()).ok_or(Stop::Unsupported)?;
        Ok((self.cpu.gpr(gpr) >> shift) & width.mask())
    }

    fn write_register(&mut self, register: Register, value: u64) -> Result<(), Stop> {
        let (gpr, shift) = general(register).ok_or(Stop::Unsupported)?;
        if shift == 8 {
            let old = self.cpu.gpr(gpr);
            self.cpu
                .set_gpr(gpr, (old & !0xff00) | ((value & 0xff) << 8));
            return Ok(());
        }
        let width = Width::from_bytes(register.size()).ok_or(Stop::Unsupported)?;
        self.write_gpr(gpr, width, value);
        Ok(())
    }

    /// Writes the low part of a register: 32 bits clear the rest, 8 and 16 bits keep it.
    fn write_gpr(&mut self, gpr: Gpr, width: Width, value: u64) {
        let value = match width {
            Width::Qword => value,
            Width::Dword => value & 0xffff_ffff,
            _ => (self.cpu.gpr(gpr) & !width.mask()) | (value & width.mask()),
        };
        self.cpu.set_gpr(gpr, value);
    }

    fn set_flags(&mut self, mask: u64, flags: u64) {
        let old = self.cpu.rflags();
        self.cpu.set_rflags((old & !mask) | (flags & mask));
    }

    /// Offset of the most common operand, base register and displacement in 64-bit mode.
    fn plain_offset(&self, operand: u32) -> Option<u64> {
        let instruction = self.instruction;
        let base = instruction.memory_base();
        let plain = self.mode == CpuMode::Long64
            && instruction.op_kind(operand) == OpKind::Memory
            && instruction.memory_index() == Register::None
            && (Register::RAX..=Register::R15).contains(&base);
        plain.then(|| {
            let gpr = Gpr::ALL[base as usize - Register::RAX as usize];
            self.cpu
                .gpr(gpr)
                .wrapping_add(instruction.memory_displacement64())
        })
    }

    /// Offset of any memory operand.
    fn any_offset(&self, operand: u32) -> Result<u64, Stop> {
        let mut unreadable = false;
        self.instruction
            .virtual_address(operand, 0, |register, _, _| {
                if register.is_segment_register() {
                    return Some(0);
                }
                let value = if register == Register::RIP || register == Register::EIP {
                    Some(self.instruction.next_ip())
                } else {
                    self.read_register(register).ok()
                };
                unreadable |= value.is_none();
                value
            })
            .filter(|_| !unreadable)
            .ok_or(Stop::Unsupported)
    }

    /// Linear address of a memory operand, checked against its segment.
    fn operand_address(&self, operand: u32) -> Result<Gva, Stop> {
        let segment = match self.instruction.op_kind(operand) {
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => Register::ES,
            _ => self.instruction.memory_segment(),
        };
        let name = segment_name(segment).ok_or(Stop::Unsupported)?;
        let offset = match self.plain_offset(operand) {
            Some(offset) => offset,
            None => self.any_offset(operand)?,
        };
        let fault = if name == SegmentName::Ss {
            Exception::STACK_FAULT
        } else {
            Exception::GENERAL_PROTECTION
        };
        if self.mode == CpuMode::Long64 {
            let base = match name {
                SegmentName::Fs | SegmentName::Gs => self.cpu.segment(name).base,
                _ => 0,
            };
            let address = base.wrapping_add(offset);
            let top = if self.paging.cr4 & (1 << 12) != 0 {
                57
            } else {
                48
            };
            let canonical = ((address << (64 - top)) as i64 >> (64 - top)) as u64 == address;
            return if canonical {
                Ok(Gva(address))
            } else {
                Err(Stop::Fault(fault))
            };
        }
        let hidden = self.cpu.segment(name);
        let size = self.instruction.memory_size().size().max(1) as u64;
        let last = offset.wrapping_add(size - 1);
        let limit = u64::from(hidden.limit);
        // Expand-down data segments hold the offsets above the limit (SDM vol. 3A, 5.3).
        let expand_down = hidden.rights.kind() & 0b1100 == 0b0100;
        let upper = if hidden.rights.default_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        let inside = if expand_down {
            offset > limit && last <= upper
        } else {
            last <= limit && last >= offset
        };
        if hidden.rights.unusable() || !inside {
            return Err(Stop::Fault(fault));
        }
        Ok(Gva(hidden.base.wrapping_add(offset) & 0xffff_ffff))
    }

    /// Checks that an access will not fault.
    fn probe(&self, at: Gva, width: Width, access: Access) -> Result<(), Stop> {
        self.paging.translate(self.memory, at, access)?;
        let last = Gva(at.0.wrapping_add(width.bytes() as u64 - 1));
        self.paging.translate(self.memory, last, access)?;
        Ok(())
    }

    /// How many bytes of an access lie on the first of two pages.
    fn split(at: Gva, width: Width) -> Option<usize> {
        let first = (mem::PAGE_SIZE - at.page_offset()) as usize;
        (first < width.bytes()).then_some(first)
    }

    /// The device address behind `at`, if the exit told it: it has then passed the guest's own page
    /// tables in the processor, and is known not to be RAM.
    fn known_device(&self, at: Gva, width: Width) -> Option<Gpa> {
        self.target
            .filter(|gpa| gpa.page_offset() == at.page_offset() && Self::split(at, width).is_none())
    }

    fn load(&mut self, at: Gva, width: Width) -> Result<u64, Stop> {
        if let Some(gpa) = self.known_device(at, width) {
            return Ok(self.platform.mmio_read(self.cpu, gpa, width) & width.mask());
        }
        if Self::split(at, width).is_some() {
            self.probe(at, width, Access::Read)?;
            let mut value = 0;
            for n in 0..width.bytes() {
                let byte = self.load(Gva(at.0.wrapping_add(n as u64)), Width::Byte)?;
                value |= byte << (8 * n);
            }
            return Ok(value);
        }
        let gpa = self.paging.translate(self.memory, at, Access::Read)?;
        let mut buffer = [0; 8];
        let bytes = &mut buffer[..width.bytes()];
        if self.memory.read(gpa, bytes).is_ok() {
            return Ok(u64::from_le_bytes(buffer));
        }
        Ok(self.platform.mmio_read(self.cpu, gpa, width) & width.mask())
    }

    fn store(&mut self, at: Gva, width: Width, value: u64) -> Result<(), Stop> {
        if let Some(gpa) = self.known_device(at, width) {
            self.platform
                .mmio_write(self.cpu, gpa, width, value & width.mask());
            return Ok(());
        }
        if Self::split(at, width).is_some() {
            self.probe(at, width, Access::Write)?;
            for (n, byte) in value
                .to_le_bytes()
                .into_iter()
                .take(width.bytes())
                .enumerate()
            {
                self.store(
                    Gva(at.0.wrapping_add(n as u64)),
                    Width::Byte,
                    u64::from(byte),
                )?;
            }
            return Ok(());
        }
        let gpa = self.paging.translate(self.memory, at, Access::Write)?;
        let bytes = value.to_le_bytes();
        if self.memory.write(gpa, &bytes[..width.bytes()]).is_err() {
            self.platform
                .mmio_write(self.cpu, gpa, width, value & width.mask());
        }
        Ok(())
    }
}

/// CR0 after LMSW with this operand: the low four bits, but PE cannot be cleared (SDM vol. 2A, LMSW).
pub fn load_msw(cr0: u64, operand: u16) -> u64 {
    let low = u64::from(operand) & 0xf;
    (cr0 & !0xf) | low | (cr0 & 1)
}

fn segment_name(register: Register) -> Option<SegmentName> {
    Some(match register {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::DS => SegmentName::Ds,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => return None,
    })
}

/// The full register that holds `register`, and the bit that it starts at.
fn general(register: Register) -> Option<(Gpr, u32)> {
    if !register.is_gpr() {
        return None;
    }
    let shift = match register {
        Register::AH | Register::CH | Register::DH | Register::BH => 8,
        _ => 0,
    };
    Some((Gpr::ALL[register.full_register().number()], shift))
}

#[cfg(test)]
#[path = "emulate_tests.rs"]
mod tests;
