//! The stack, and near transfers of control.
//!
//! Device memory is an operand here, or the code itself is in it: then every instruction comes this way.

use iced_x86::{Code, ConditionCode, Mnemonic, OpKind};
use mem::Width;
use virt::{CpuMode, Gpr, SegmentName, VirtualCpu};

use super::{
    Exception, Platform,
    alu::{RFLAGS_CF, RFLAGS_OF, RFLAGS_PF, RFLAGS_SF, RFLAGS_ZF},
    execute::{Run, Step, Stop},
};
use crate::walk::Access;

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// PUSH, POP, near CALL, JMP, RET and Jcc; `None`: another instruction.
    pub(super) fn stack_or_branch(&mut self) -> Result<Option<Step>, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Push => {
                let value = self.get(0)?;
                self.push(value)?;
            }
            Mnemonic::Pop => self.pop_operand()?,
            Mnemonic::Enter => self.enter()?,
            Mnemonic::Leave => self.leave()?,
            Mnemonic::Call if !self.is_far() => {
                let target = self.branch_target()?;
                let back = self.instruction.next_ip();
                self.push(back)?;
                return Ok(Some(Step::Jump(target)));
            }
            Mnemonic::Jmp if !self.is_far() => {
                return Ok(Some(Step::Jump(self.branch_target()?)));
            }
            Mnemonic::Ret => {
                let width = self.stack_item()?;
                let (value, pointer) = self.popped(width)?;
                let target = self.checked_target(value)?;
                let released = match self.instruction.op0_kind() {
                    OpKind::Immediate16 => u64::from(self.instruction.immediate16()),
                    _ => 0,
                };
                self.set_stack_pointer(pointer.wrapping_add(released));
                return Ok(Some(Step::Jump(target)));
            }
            _ if self.is_conditional_jump() => {
                return Ok(Some(if self.condition() {
                    Step::Jump(self.branch_target()?)
                } else {
                    Step::Done
                }));
            }
            _ => return Ok(None),
        }
        Ok(Some(Step::Done))
    }

    fn is_far(&self) -> bool {
        self.instruction.is_jmp_far()
            || self.instruction.is_jmp_far_indirect()
            || self.instruction.is_call_far()
            || self.instruction.is_call_far_indirect()
    }

    fn is_conditional_jump(&self) -> bool {
        self.instruction.is_jcc_short_or_near()
    }

    /// Whether the condition of a Jcc, SETcc or CMOVcc holds.
    pub(super) fn condition(&self) -> bool {
        let flags = self.cpu.rflags();
        let has = |flag| flags & flag != 0;
        let less = has(RFLAGS_SF) != has(RFLAGS_OF);
        match self.instruction.condition_code() {
            ConditionCode::None => true,
            ConditionCode::o => has(RFLAGS_OF),
            ConditionCode::no => !has(RFLAGS_OF),
            ConditionCode::b => has(RFLAGS_CF),
            ConditionCode::ae => !has(RFLAGS_CF),
            ConditionCode::e => has(RFLAGS_ZF),
            ConditionCode::ne => !has(RFLAGS_ZF),
            ConditionCode::be => has(RFLAGS_CF | RFLAGS_ZF),
            ConditionCode::a => !has(RFLAGS_CF | RFLAGS_ZF),
            ConditionCode::s => has(RFLAGS_SF),
            ConditionCode::ns => !has(RFLAGS_SF),
            ConditionCode::p => has(RFLAGS_PF),
            ConditionCode::np => !has(RFLAGS_PF),
            ConditionCode::l => less,
            ConditionCode::ge => !less,
            ConditionCode::le => less || has(RFLAGS_ZF),
            ConditionCode::g => !less && !has(RFLAGS_ZF),
        }
    }

    /// Where a near branch goes: its displacement, register or memory operand.
    pub(super) fn branch_target(&mut self) -> Result<u64, Stop> {
        let target = match self.instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                self.instruction.near_branch_target()
            }
            _ => self.get(0)?,
        };
        self.checked_target(target)
    }

    /// A branch to a place that cannot be executed faults at the branch (SDM vol. 2A, CALL and JMP).
    fn checked_target(&self, target: u64) -> Result<u64, Stop> {
        let good = if self.mode == CpuMode::Long64 {
            self.is_canonical(target)
        } else {
            target <= u64::from(self.cpu.segment(SegmentName::Cs).limit)
        };
        if good {
            Ok(target)
        } else {
            Err(Stop::Fault(Exception::GENERAL_PROTECTION))
        }
    }

    /// Width of what the instruction pushes or pops.
    pub(super) fn stack_item(&self) -> Result<Width, Stop> {
        let bytes = self.instruction.stack_pointer_increment().unsigned_abs();
        let released = match (self.instruction.mnemonic(), self.instruction.op0_kind()) {
            (Mnemonic::Ret, OpKind::Immediate16) => u32::from(self.instruction.immediate16()),
            _ => 0,
        };
        let bytes = bytes.checked_sub(released).ok_or(Stop::Unsupported)?;
        Width::from_bytes(bytes as usize).ok_or(Stop::Unsupported)
    }

    /// The bits of RSP that address the stack.
    pub(super) fn stack_mask(&self) -> u64 {
        if self.mode == CpuMode::Long64 {
            u64::MAX
        } else if self.cpu.segment(SegmentName::Ss).rights.default_big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    pub(super) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let value = match mask {
            0xffff => self.cpu.gpr(Gpr::Rsp) & !mask | value & mask,
            _ => value & mask,
        };
        self.cpu.set_gpr(Gpr::Rsp, value);
    }

    pub(super) fn push(&mut self, value: u64) -> Result<(), Stop> {
        let width = self.stack_item()?;
        self.push_item(value, width)
    }

    fn push_item(&mut self, value: u64, width: Width) -> Result<(), Stop> {
        let pointer = self.cpu.gpr(Gpr::Rsp).wrapping_sub(width.bytes() as u64);
        let offset = pointer & self.stack_mask();
        let at = self.address(SegmentName::Ss, offset, width.bytes() as u64, Access::Write)?;
        // The address of the exit is that of the other operand, if the two could be confused.
        self.target = None;
        self.store(at, width, value)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// What lies on top of the stack, and the stack pointer behind it.
    pub(super) fn popped(&mut self, width: Width) -> Result<(u64, u64), Stop> {
        let pointer = self.cpu.gpr(Gpr::Rsp);
        let offset = pointer & self.stack_mask();
        let at = self.address(SegmentName::Ss, offset, width.bytes() as u64, Access::Read)?;
        self.target = None;
        let value = self.load(at, width)?;
        Ok((value, pointer.wrapping_add(width.bytes() as u64)))
    }

    /// ENTER without nesting: levels of it hardly exist, and none has a frame in device memory.
    fn enter(&mut self) -> Result<(), Stop> {
        let width = match self.instruction.code() {
            Code::Enterw_imm16_imm8 => Width::Word,
            Code::Enterd_imm16_imm8 => Width::Dword,
            _ => Width::Qword,
        };
        if self.instruction.immediate8_2nd() & 0x1f != 0 {
            return Err(Stop::Unsupported);
        }
        let frame = self.cpu.gpr(Gpr::Rbp) & width.mask();
        self.push_item(frame, width)?;
        let pointer = self.cpu.gpr(Gpr::Rsp);
        self.write_gpr(Gpr::Rbp, width, pointer);
        let size = u64::from(self.instruction.immediate16());
        self.set_stack_pointer(pointer.wrapping_sub(size));
        Ok(())
    }

    fn leave(&mut self) -> Result<(), Stop> {
        let width = match self.instruction.code() {
            Code::Leavew => Width::Word,
            Code::Leaved => Width::Dword,
            _ => Width::Qword,
        };
        let before = self.cpu.gpr(Gpr::Rsp);
        let frame = self.cpu.gpr(Gpr::Rbp);
        self.set_stack_pointer(frame);
        match self.popped(width) {
            Ok((value, pointer)) => {
                self.set_stack_pointer(pointer);
                self.write_gpr(Gpr::Rbp, width, value);
                Ok(())
            }
            Err(stop) => {
                self.cpu.set_gpr(Gpr::Rsp, before);
                Err(stop)
            }
        }
    }

    /// POP to a register or memory. A memory operand based on RSP is addressed after the increment (SDM vol. 2B, POP).
    fn pop_operand(&mut self) -> Result<(), Stop> {
        let width = self.stack_item()?;
        let before = self.cpu.gpr(Gpr::Rsp);
        let (value, pointer) = self.popped(width)?;
        self.set_stack_pointer(pointer);
        let stored = self.set(0, value);
        if stored.is_err() {
            self.cpu.set_gpr(Gpr::Rsp, before);
        }
        stored
    }
}
