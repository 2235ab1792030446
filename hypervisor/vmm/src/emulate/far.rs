//! Far transfers of control: JMP, CALL, RET and IRET to another code segment.
//!
//! Their pointer or their stack is in device memory, or the code itself is. Between code segments of one privilege
//! level, by a return also to an outer one; in real, virtual-8086, protected and long mode (SDM vol. 2A, CALL,
//! IRET, JMP; vol. 2B, RET). Gates and tasks are in `gate`.

use iced_x86::{Code, OpKind};
use mem::Width;
use virt::{CpuMode, Gpr, Segment, SegmentName, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Step, Stop},
    segment::{is_code, is_conforming, segment_8086},
    system::{Entry, GENERAL, NOT_PRESENT, fault},
};
use crate::walk::Access;

const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_IOPL: u64 = 3 << 12;
const RFLAGS_NT: u64 = 1 << 14;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_VIF: u64 = 1 << 19;
const RFLAGS_VIP: u64 = 1 << 20;
/// The flags that IRET can load: all but the fixed ones and VM.
const RFLAGS_LOADED: u64 = 0x003d_7fd5;
const RFLAGS_FIXED: u64 = 1 << 1;

/// A far transfer and its operand size.
#[derive(Clone, Copy)]
enum Far {
    Jump(Width),
    Call(Width),
    Return(Width),
    InterruptReturn(Width),
}

fn far(code: Code) -> Option<Far> {
    use Width::{Dword, Qword, Word};
    Some(match code {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 => Far::Jump(Word),
        Code::Jmp_ptr1632 | Code::Jmp_m1632 => Far::Jump(Dword),
        Code::Jmp_m1664 => Far::Jump(Qword),
        Code::Call_ptr1616 | Code::Call_m1616 => Far::Call(Word),
        Code::Call_ptr1632 | Code::Call_m1632 => Far::Call(Dword),
        Code::Call_m1664 => Far::Call(Qword),
        Code::Retfw | Code::Retfw_imm16 => Far::Return(Word),
        Code::Retfd | Code::Retfd_imm16 => Far::Return(Dword),
        Code::Retfq | Code::Retfq_imm16 => Far::Return(Qword),
        Code::Iretw => Far::InterruptReturn(Word),
        Code::Iretd => Far::InterruptReturn(Dword),
        Code::Iretq => Far::InterruptReturn(Qword),
        _ => return None,
    })
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes a far transfer; `None`: another instruction.
    pub(super) fn far_transfer(&mut self) -> Result<Option<Step>, Stop> {
        let Some(kind) = far(self.instruction.code()) else {
            return Ok(None);
        };
        Ok(Some(match kind {
            Far::Jump(width) | Far::Call(width) => {
                let (offset, selector) = self.far_target(width)?;
                self.forward(kind, selector, offset)?
            }
            Far::Return(width) => Step::Jump(self.far_return(width)?),
            Far::InterruptReturn(width) => self.interrupt_return(width)?,
        }))
    }

    /// A jump or call: to code, or through what else the selector names.
    fn forward(&mut self, kind: Far, selector: u16, offset: u64) -> Result<Step, Stop> {
        let cs = if self.has_tables() {
            if selector & !3 == 0 {
                return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
            }
            let entry = self.entry(selector, false)?;
            if !entry.rights().code_or_data() {
                return self.through_gate(selector, &entry);
            }
            self.forward_segment(&entry, selector, offset)?
        } else {
            self.plain_segment(selector, offset)?
        };
        if let Far::Call(width) = kind {
            let back = self.cpu.segment(SegmentName::Cs).selector;
            self.push_all(&[back.into(), self.instruction.next_ip()], width)?;
        }
        self.cpu.set_segment(SegmentName::Cs, cs);
        Ok(Step::Jump(offset))
    }

    fn has_tables(&self) -> bool {
        !matches!(self.mode, CpuMode::Real | CpuMode::Virtual8086)
    }

    /// Offset and selector that a jump or call names, in the instruction or in memory.
    fn far_target(&mut self, width: Width) -> Result<(u64, u16), Stop> {
        let selector = self.instruction.far_branch_selector();
        match self.instruction.op0_kind() {
            OpKind::FarBranch16 => Ok((self.instruction.far_branch16().into(), selector)),
            OpKind::FarBranch32 => Ok((self.instruction.far_branch32().into(), selector)),
            _ => self.far_pointer(0, width),
        }
    }

    /// CS in a mode without descriptors.
    fn plain_segment(&self, selector: u16, offset: u64) -> Result<Segment, Stop> {
        let old = self.cpu.segment(SegmentName::Cs);
        if offset > u64::from(old.limit) {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        Ok(Segment {
            selector,
            base: u64::from(selector) << 4,
            ..old
        })
    }

    /// What CS becomes by a jump or call: code of this privilege level, or conforming.
    fn forward_segment(
        &mut self,
        entry: &Entry,
        selector: u16,
        offset: u64,
    ) -> Result<Segment, Stop> {
        let rights = entry.rights();
        let (cpl, rpl) = (self.paging.cpl, selector as u8 & 3);
        let privilege = if is_conforming(rights) {
            rights.dpl() <= cpl
        } else {
            rpl <= cpl && rights.dpl() == cpl
        };
        if !is_code(rights) || !privilege {
            return Err(fault(GENERAL, selector));
        }
        self.code_segment(entry, selector & !3 | u16::from(cpl), offset)
    }

    /// The last checks of a code segment: presence, contradicting sizes, and the place where it goes on.
    pub(super) fn code_segment(
        &mut self,
        entry: &Entry,
        selector: u16,
        offset: u64,
    ) -> Result<Segment, Stop> {
        let rights = entry.rights();
        if self.in_long_mode() && rights.long() && rights.default_big() {
            return Err(fault(GENERAL, selector));
        }
        if !rights.present() {
            return Err(fault(NOT_PRESENT, selector));
        }
        let to_64_bit = self.in_long_mode() && rights.long();
        let good = if to_64_bit {
            self.is_canonical(offset)
        } else {
            offset <= u64::from(entry.segment(selector).limit)
        };
        if !good {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        let mut cs = self.accessed(entry, selector)?;
        cs.rights.set_long(to_64_bit);
        Ok(cs)
    }

    /// Pushes values, or none of them if one cannot be.
    pub(super) fn push_all(&mut self, values: &[u64], width: Width) -> Result<(), Stop> {
        self.target = None;
        let bytes = width.bytes() as u64;
        let top = self.cpu.gpr(Gpr::Rsp);
        let place = |run: &Self, n: usize| {
            let pointer = top.wrapping_sub(bytes * (n as u64 + 1));
            let offset = pointer & run.stack_mask();
            run.address(SegmentName::Ss, offset, bytes, Access::Write)
        };
        for n in 0..values.len() {
            let at = place(self, n)?;
            self.probe(at, width, Access::Write)?;
        }
        for (n, &value) in values.iter().enumerate() {
            let at = place(self, n)?;
            self.store(at, width, value & width.mask())?;
        }
        self.set_stack_pointer(top.wrapping_sub(bytes * values.len() as u64));
        Ok(())
    }

    /// The `n`th item on the stack, from its top, `above` bytes up.
    pub(super) fn stacked(&mut self, n: u64, width: Width, above: u64) -> Result<u64, Stop> {
        self.target = None;
        let bytes = width.bytes() as u64;
        let pointer = self.cpu.gpr(Gpr::Rsp).wrapping_add(n * bytes + above);
        let offset = pointer & self.stack_mask();
        let at = self.address(SegmentName::Ss, offset, bytes, Access::Read)?;
        self.load(at, width)
    }

    /// Takes `n` items and `more` bytes off the stack.
    fn release(&mut self, n: u64, width: Width, more: u64) {
        let pointer = self.cpu.gpr(Gpr::Rsp);
        self.set_stack_pointer(pointer.wrapping_add(n * width.bytes() as u64 + more));
    }

    /// RETF: its items are the offset and CS, then, to an outer level, RSP and SS.
    fn far_return(&mut self, width: Width) -> Result<u64, Stop> {
        let more = match self.instruction.op0_kind() {
            OpKind::Immediate16 => u64::from(self.instruction.immediate16()),
            _ => 0,
        };
        let offset = self.stacked(0, width, 0)?;
        let selector = self.stacked(1, width, 0)? as u16;
        if !self.has_tables() {
            let cs = self.plain_segment(selector, offset)?;
            self.release(2, width, more);
            self.cpu.set_segment(SegmentName::Cs, cs);
            return Ok(offset);
        }
        let cs = self.backward_segment(selector, offset)?;
        if selector as u8 & 3 == self.paging.cpl {
            self.release(2, width, more);
            self.cpu.set_segment(SegmentName::Cs, cs);
            return Ok(offset);
        }
        let pointer = self.stacked(2, width, more)?;
        let stack = self.stacked(3, width, more)? as u16;
        self.return_outwards(cs, stack)?;
        self.set_stack_pointer(pointer.wrapping_add(more));
        Ok(offset)
    }

    /// What CS becomes by a return: code of this privilege level or of an outer one.
    fn backward_segment(&mut self, selector: u16, offset: u64) -> Result<Segment, Stop> {
        if selector & !3 == 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        let rpl = selector as u8 & 3;
        let entry = self.entry(selector, false)?;
        let rights = entry.rights();
        let privilege = if is_conforming(rights) {
            rights.dpl() <= rpl
        } else {
            rights.dpl() == rpl
        };
        if !is_code(rights) || rpl < self.paging.cpl || !privilege {
            return Err(fault(GENERAL, selector));
        }
        self.code_segment(&entry, selector, offset)
    }

    /// The part of a return to an outer level that segments have in it.
    fn return_outwards(&mut self, cs: Segment, stack: u16) -> Result<(), Stop> {
        let cpl = cs.selector as u8 & 3;
        let ss = self.stack_segment(stack, cpl, cs.rights.long())?;
        self.cpu.set_segment(SegmentName::Cs, cs);
        self.cpu.set_segment(SegmentName::Ss, ss);
        self.drop_privileged_segments(cpl);
        self.mode = self.cpu.mode();
        Ok(())
    }

    /// IRET: its items are the offset, CS and the flags, then, to an outer level and in 64-bit mode always, RSP and SS.
    fn interrupt_return(&mut self, width: Width) -> Result<Step, Stop> {
        // Also if it faults (SDM vol. 3A, section 6.7.1).
        self.aftermath.interrupt_return = true;
        let old = self.cpu.rflags();
        let is_virtual = width == Width::Word && self.has_virtual_interrupts();
        if self.mode == CpuMode::Virtual8086 && old & RFLAGS_IOPL != RFLAGS_IOPL && !is_virtual {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        if self.has_tables() && old & RFLAGS_NT != 0 {
            return if self.in_long_mode() {
                Err(Stop::Fault(Exception::GENERAL_PROTECTION))
            } else {
                self.switch_to_linked_task()
            };
        }
        let offset = self.stacked(0, width, 0)?;
        let selector = self.stacked(1, width, 0)? as u16;
        let flags = self.stacked(2, width, 0)?;
        if !self.has_tables() {
            let cs = self.plain_segment(selector, offset)?;
            let mut kept = match self.mode {
                CpuMode::Virtual8086 => RFLAGS_IOPL | RFLAGS_VIF | RFLAGS_VIP,
                _ => 0,
            };
            if is_virtual {
                self.check_virtual_flags(flags)?;
                self.set_virtual_interrupt_flag(flags & RFLAGS_IF != 0)?;
                kept |= RFLAGS_IF;
            }
            self.release(3, width, 0);
            self.cpu.set_segment(SegmentName::Cs, cs);
            self.load_flags(flags, width, kept);
            return Ok(Step::Jump(offset));
        }
        let cpl = self.paging.cpl;
        let to_8086 = flags & RFLAGS_VM != 0 && width == Width::Dword;
        if to_8086 && cpl == 0 && !self.in_long_mode() {
            return self.return_to_8086(offset, selector, flags).map(Step::Jump);
        }
        let cs = self.backward_segment(selector, offset)?;
        let outwards = selector as u8 & 3 != cpl;
        if outwards || self.mode == CpuMode::Long64 {
            let pointer = self.stacked(3, width, 0)?;
            let stack = self.stacked(4, width, 0)? as u16;
            self.return_outwards(cs, stack)?;
            self.set_stack_pointer(pointer);
        } else {
            self.release(3, width, 0);
            self.cpu.set_segment(SegmentName::Cs, cs);
        }
        let mut kept = 0;
        if cpl != 0 {
            kept |= RFLAGS_IOPL | RFLAGS_VIF | RFLAGS_VIP;
        }
        if u64::from(cpl) > (old & RFLAGS_IOPL) >> 12 {
            kept |= RFLAGS_IF;
        }
        self.load_flags(flags, width, kept);
        Ok(Step::Jump(offset))
    }

    /// Loads the flags that an operand of this width holds, but for those `kept`.
    fn load_flags(&mut self, flags: u64, width: Width, kept: u64) {
        let loaded = RFLAGS_LOADED & width.mask() & !kept;
        let old = self.cpu.rflags();
        self.cpu
            .set_rflags(old & !loaded | flags & loaded | RFLAGS_FIXED);
    }

    /// IRET to virtual-8086 mode, whose segments are on the stack, too.
    fn return_to_8086(&mut self, offset: u64, selector: u16, flags: u64) -> Result<u64, Stop> {
        const ORDER: [SegmentName; 5] = [
            SegmentName::Ss,
            SegmentName::Es,
            SegmentName::Ds,
            SegmentName::Fs,
            SegmentName::Gs,
        ];
        if offset > 0xffff {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        let pointer = self.stacked(3, Width::Dword, 0)?;
        let mut selectors = [0; ORDER.len()];
        for (n, slot) in (4..).zip(&mut selectors) {
            *slot = self.stacked(n, Width::Dword, 0)? as u16;
        }
        let loaded = RFLAGS_LOADED | RFLAGS_VM;
        self.cpu.set_rflags(flags & loaded | RFLAGS_FIXED);
        self.cpu
            .set_segment(SegmentName::Cs, segment_8086(selector));
        for (name, selector) in ORDER.into_iter().zip(selectors) {
            self.cpu.set_segment(name, segment_8086(selector));
        }
        self.cpu.set_gpr(Gpr::Rsp, pointer);
        Ok(offset)
    }
}
