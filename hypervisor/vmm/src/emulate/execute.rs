//! What each instruction does, on operands of any kind.

use iced_x86::{Instruction, Mnemonic, OpKind};
use mem::{Gva, guest::GuestMemory};
use virt::{CpuMode, Gpr, TaskSwitch, VirtualCpu};

use super::{
    Aftermath, Exception, Platform, Service, Target,
    alu::{ARITHMETIC, Alu, RFLAGS_CF, RFLAGS_ZF, compute},
    load_msw,
};
use crate::{
    breakpoint::Breakpoints,
    walk::{Access, Paging},
};

pub(super) enum Step {
    Done,
    /// A REP instruction with iterations left.
    Again,
    /// Goes on at this offset in CS.
    Jump(u64),
    /// Left to the vCPU.
    Service(Service),
    /// Goes on in another task.
    Task(TaskSwitch),
}

pub(super) enum Stop {
    Fault(Exception),
    Unsupported,
}

impl<E: Into<Exception>> From<E> for Stop {
    fn from(fault: E) -> Self {
        Stop::Fault(fault.into())
    }
}

pub(super) struct Run<'a, V, P> {
    pub(super) cpu: &'a mut V,
    pub(super) memory: &'a GuestMemory,
    pub(super) platform: &'a mut P,
    pub(super) paging: Paging,
    pub(super) mode: CpuMode,
    pub(super) instruction: &'a Instruction,
    /// Where the processor found that an access of this instruction is not to RAM.
    pub(super) target: Option<Target>,
    /// The guest's breakpoints, if it has set any.
    pub(super) breakpoints: Option<Breakpoints>,
    pub(super) aftermath: Aftermath,
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    pub(super) fn execute(&mut self) -> Result<Step, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movnti if !self.reaches_debug_register() => self.mov()?,
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
                let value = !self.get_to_change(0)?;
                self.set(0, value)?;
            }
            Mnemonic::Neg => {
                let (value, width) = (self.get_to_change(0)?, self.width(0)?);
                let (result, flags) = compute(Alu::Sub, 0, value, false, width);
                self.set(0, result)?;
                self.set_flags(ARITHMETIC, flags);
            }
            Mnemonic::Xchg => {
                let (a, b) = if self.is_memory(1) {
                    (self.get(0)?, self.get_to_change(1)?)
                } else {
                    (self.get_to_change(0)?, self.get(1)?)
                };
                // The memory operand first: if it faults, no register has changed.
                let (first, second) = if self.is_memory(1) { (1, 0) } else { (0, 1) };
                self.set(first, if first == 0 { b } else { a })?;
                self.set(second, if second == 0 { b } else { a })?;
            }
            Mnemonic::Xadd => {
                let (a, b, width) = (self.get_to_change(0)?, self.get(1)?, self.width(0)?);
                let (sum, flags) = compute(Alu::Add, a, b, false, width);
                self.set(0, sum)?;
                self.set(1, a)?;
                self.set_flags(ARITHMETIC, flags);
            }
            Mnemonic::Cmpxchg => {
                let (old, new, width) = (self.get_to_change(0)?, self.get(1)?, self.width(0)?);
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
                self.check_privileged()?;
                let cr0 = self.platform.control_read(self.cpu, 0);
                self.platform.control_write(self.cpu, 0, cr0 & !(1 << 3))?;
            }
            Mnemonic::Lmsw => {
                self.check_privileged()?;
                let value = self.get(0)?;
                let cr0 = self.platform.control_read(self.cpu, 0);
                self.platform
                    .control_write(self.cpu, 0, load_msw(cr0, value as u16))?;
            }
            Mnemonic::Smsw => {
                self.check_user_mode_prevention()?;
                let cr0 = self.platform.control_read(self.cpu, 0);
                self.set(0, cr0)?;
            }
            Mnemonic::Xlatb => self.translate_byte()?,
            _ => return self.execute_rare(),
        }
        Ok(Step::Done)
    }

    /// What drivers hardly ever do to device memory.
    fn execute_rare(&mut self) -> Result<Step, Stop> {
        if self.arithmetic()? || self.bits()? || self.vector_move()? {
            return Ok(Step::Done);
        }
        if let Some(step) = self.stack_or_branch()? {
            return Ok(step);
        }
        if let Some(step) = self.far_transfer()? {
            return Ok(step);
        }
        if let Some(step) = self.plain()? {
            return Ok(step);
        }
        if let Some(step) = self.service()? {
            return Ok(step);
        }
        if self.load_far_pointer()? || self.system()? || self.fpu()? {
            return Ok(Step::Done);
        }
        Err(Stop::Unsupported)
    }

    fn reaches_debug_register(&self) -> bool {
        self.instruction.op0_register().is_dr() || self.instruction.op1_register().is_dr()
    }

    fn mov(&mut self) -> Result<(), Stop> {
        let (to, from) = (
            self.instruction.op0_register(),
            self.instruction.op1_register(),
        );
        if to.is_cr() || from.is_cr() {
            self.check_privileged()?;
        }
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
        let a = if store {
            self.get_to_change(0)?
        } else {
            self.get(0)?
        };
        let (b, width) = (self.get(1)?, self.width(0)?);
        let carry = self.cpu.rflags() & RFLAGS_CF != 0;
        let (result, flags) = compute(operation, a, b, carry, width);
        if store {
            self.set(0, result)?;
        }
        self.set_flags(ARITHMETIC, flags);
        Ok(())
    }

    fn step_by_one(&mut self, operation: Alu) -> Result<(), Stop> {
        let (value, width) = (self.get_to_change(0)?, self.width(0)?);
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
            let writes = change(0, bit).is_some();
            let access = if writes { Access::Write } else { Access::Read };
            let at = Gva(self
                .operand_address_for(0, access)?
                .0
                .wrapping_add(displacement));
            if writes && self.known_device(at, width, true).is_none() {
                self.probe(at, width, Access::Write)?;
            }
            let old = self.load(at, width)?;
            if let Some(new) = change(old, bit) {
                self.store(at, width, new)?;
            }
            old
        } else {
            let old = if change(0, bit).is_some() {
                self.get_to_change(0)?
            } else {
                self.get(0)?
            };
            if let Some(new) = change(old, bit) {
                self.set(0, new)?;
            }
            old
        };
        self.set_flags(RFLAGS_CF, if old & bit != 0 { RFLAGS_CF } else { 0 });
        Ok(())
    }
}
