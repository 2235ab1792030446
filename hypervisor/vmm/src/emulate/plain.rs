//! Instructions without an operand in memory, for code that is itself in device memory.
//!
//! There each instruction comes to the emulator, also those that elsewhere never leave the processor: flags, loops,
//! ports. What is privileged is checked here (SDM vol. 1, section 19.5; vol. 2, the instructions).

use iced_x86::{Code, Mnemonic, OpKind};
use mem::{Gva, Width};
use virt::{CpuMode, Gpr, SegmentName, Shadow, VirtualCpu};

use super::{
    Exception, Platform,
    alu::{RFLAGS_AF, RFLAGS_CF, RFLAGS_DF, RFLAGS_PF, RFLAGS_SF, RFLAGS_TF, RFLAGS_ZF},
    execute::{Run, Step, Stop},
};

const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_IOPL: u64 = 3 << 12;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_VIF: u64 = 1 << 19;
const RFLAGS_VIP: u64 = 1 << 20;
/// The flags that POPF can load: all but RF, VM, VIF, VIP and the fixed ones.
const RFLAGS_POPPED: u64 = 0x0024_7fd5;
/// The flags in AH of LAHF and SAHF; bit 1 is always set.
const RFLAGS_AH: u64 = RFLAGS_SF | RFLAGS_ZF | RFLAGS_AF | RFLAGS_PF | RFLAGS_CF;

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes one of these instructions; `None`: another one.
    pub(super) fn plain(&mut self) -> Result<Option<Step>, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Cld => self.set_flags(RFLAGS_DF, 0),
            Mnemonic::Std => self.set_flags(RFLAGS_DF, RFLAGS_DF),
            Mnemonic::Clc => self.set_flags(RFLAGS_CF, 0),
            Mnemonic::Stc => self.set_flags(RFLAGS_CF, RFLAGS_CF),
            Mnemonic::Cmc => {
                let flags = self.cpu.rflags();
                self.set_flags(RFLAGS_CF, !flags);
            }
            Mnemonic::Cli => self.set_interrupt_flag(0)?,
            Mnemonic::Sti => self.set_interrupt_flag(RFLAGS_IF)?,
            Mnemonic::Lahf => {
                let flags = self.cpu.rflags() & RFLAGS_AH | 2;
                let rax = self.cpu.gpr(Gpr::Rax);
                self.cpu.set_gpr(Gpr::Rax, rax & !0xff00 | flags << 8);
            }
            Mnemonic::Sahf => {
                let flags = self.cpu.gpr(Gpr::Rax) >> 8;
                self.set_flags(RFLAGS_AH, flags);
            }
            Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => self.push_flags()?,
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => self.pop_flags()?,
            Mnemonic::Cbw => self.extend(Width::Byte, Width::Word),
            Mnemonic::Cwde => self.extend(Width::Word, Width::Dword),
            Mnemonic::Cdqe => self.extend(Width::Dword, Width::Qword),
            Mnemonic::Cwd => self.extend_to_rdx(Width::Word),
            Mnemonic::Cdq => self.extend_to_rdx(Width::Dword),
            Mnemonic::Cqo => self.extend_to_rdx(Width::Qword),
            Mnemonic::In => self.port_in()?,
            Mnemonic::Out => self.port_out()?,
            _ if self.instruction.is_loop() || self.instruction.is_loopcc() => {
                return self.loops().map(Some);
            }
            _ if self.instruction.is_jcx_short() => {
                let width = self.counter_width();
                let zero = self.cpu.gpr(Gpr::Rcx) & width.mask() == 0;
                return self.branch_if(zero).map(Some);
            }
            _ => return Ok(None),
        }
        Ok(Some(Step::Done))
    }

    fn iopl(&self) -> u8 {
        ((self.cpu.rflags() & RFLAGS_IOPL) >> 12) as u8
    }

    /// Whether VIF stands for IF: programs of virtual-8086 mode and, for CLI and STI, of ring 3 see it where IOPL keeps
    /// them from the real one (SDM vol. 3A, sections 21.3.3.5 and 21.4).
    pub(super) fn has_virtual_interrupts(&self) -> bool {
        const CR4_VME: u64 = 1 << 0;
        self.mode == CpuMode::Virtual8086 && self.iopl() < 3 && self.paging.cr4 & CR4_VME != 0
    }

    /// Sets VIF as IF would be. #GP(0) where an interrupt waits for that.
    pub(super) fn set_virtual_interrupt_flag(&mut self, enable: bool) -> Result<(), Stop> {
        if enable && self.cpu.rflags() & RFLAGS_VIP != 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        self.set_flags(RFLAGS_VIF, if enable { RFLAGS_VIF } else { 0 });
        Ok(())
    }

    /// CLI and STI.
    fn set_interrupt_flag(&mut self, value: u64) -> Result<(), Stop> {
        const CR4_PVI: u64 = 1 << 1;
        if self.paging.cpl > self.iopl() {
            let by_program = self.mode != CpuMode::Virtual8086
                && self.paging.cpl == 3
                && self.paging.cr4 & CR4_PVI != 0;
            if by_program || self.has_virtual_interrupts() {
                return self.set_virtual_interrupt_flag(value != 0);
            }
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        if value & !self.cpu.rflags() & RFLAGS_IF != 0 {
            self.aftermath.shadow = Some(Shadow::Sti);
        }
        self.set_flags(RFLAGS_IF, value);
        Ok(())
    }

    /// In virtual-8086 mode, PUSHF and POPF need IOPL 3, or 16 bits and VIF.
    fn check_flags_access(&self, width: Width) -> Result<(), Stop> {
        let by_vif = width == Width::Word && self.has_virtual_interrupts();
        if self.mode == CpuMode::Virtual8086 && self.iopl() != 3 && !by_vif {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        Ok(())
    }

    fn push_flags(&mut self) -> Result<(), Stop> {
        self.check_flags_access(self.stack_item()?)?;
        let mut flags = self.cpu.rflags() & !(RFLAGS_RF | RFLAGS_VM);
        if self.has_virtual_interrupts() {
            let enabled = if flags & RFLAGS_VIF != 0 {
                RFLAGS_IF
            } else {
                0
            };
            flags = flags & !RFLAGS_IF | enabled | RFLAGS_IOPL;
        }
        self.push(flags)
    }

    fn pop_flags(&mut self) -> Result<(), Stop> {
        let width = self.stack_item()?;
        self.check_flags_access(width)?;
        let (flags, pointer) = self.popped(width)?;
        let is_virtual = self.has_virtual_interrupts();
        if is_virtual {
            self.check_virtual_flags(flags)?;
            self.set_virtual_interrupt_flag(flags & RFLAGS_IF != 0)?;
        }
        self.set_stack_pointer(pointer);
        let mut loaded = RFLAGS_POPPED & width.mask();
        if self.paging.cpl != 0 {
            loaded &= !RFLAGS_IOPL;
        }
        if self.paging.cpl > self.iopl() {
            loaded &= !RFLAGS_IF;
        }
        let kept_clear = if width == Width::Word {
            0
        } else {
            RFLAGS_RF | RFLAGS_VIF | RFLAGS_VIP
        };
        let kept = self.cpu.rflags() & !loaded & !kept_clear;
        self.cpu.set_rflags(kept | flags & loaded);
        Ok(())
    }

    /// POPF and IRET by VIF cannot turn single steps on.
    pub(super) fn check_virtual_flags(&self, flags: u64) -> Result<(), Stop> {
        if flags & RFLAGS_TF != 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        Ok(())
    }

    fn extend(&mut self, from: Width, to: Width) {
        let shift = 64 - 8 * from.bytes() as u32;
        let value = (self.cpu.gpr(Gpr::Rax) << shift) as i64 >> shift;
        self.write_gpr(Gpr::Rax, to, value as u64);
    }

    fn extend_to_rdx(&mut self, width: Width) {
        let sign = self.cpu.gpr(Gpr::Rax) >> (8 * width.bytes() - 1) & 1;
        self.write_gpr(Gpr::Rdx, width, sign.wrapping_neg());
    }

    /// Width of the counter of LOOP and JCXZ: that of addresses.
    fn counter_width(&self) -> Width {
        match self.instruction.code() {
            Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX
            | Code::Jcxz_rel8_16
            | Code::Jcxz_rel8_32 => Width::Word,
            Code::Loop_rel8_64_RCX
            | Code::Loope_rel8_64_RCX
            | Code::Loopne_rel8_64_RCX
            | Code::Jrcxz_rel8_16
            | Code::Jrcxz_rel8_64 => Width::Qword,
            _ => Width::Dword,
        }
    }

    fn loops(&mut self) -> Result<Step, Stop> {
        let width = self.counter_width();
        let count = (self.cpu.gpr(Gpr::Rcx) & width.mask()).wrapping_sub(1) & width.mask();
        let zero = self.cpu.rflags() & RFLAGS_ZF != 0;
        let condition = match self.instruction.mnemonic() {
            Mnemonic::Loope => zero,
            Mnemonic::Loopne => !zero,
            _ => true,
        };
        let step = self.branch_if(count != 0 && condition)?;
        self.write_gpr(Gpr::Rcx, width, count);
        Ok(step)
    }

    fn branch_if(&mut self, taken: bool) -> Result<Step, Stop> {
        Ok(if taken {
            Step::Jump(self.branch_target()?)
        } else {
            Step::Done
        })
    }

    /// Port and width of IN and OUT; `at`: which operand the port is.
    fn port(&mut self, at: u32) -> Result<(u16, Width), Stop> {
        let port = match self.instruction.op_kind(at) {
            OpKind::Register => self.cpu.gpr(Gpr::Rdx) as u16,
            _ => u16::from(self.instruction.immediate8()),
        };
        let bytes = self.instruction.op_register(1 - at).size();
        let width = Width::from_bytes(bytes).ok_or(Stop::Unsupported)?;
        self.check_port(port, width)?;
        self.watch_port(port, width);
        Ok((port, width))
    }

    fn port_in(&mut self) -> Result<(), Stop> {
        let (port, width) = self.port(1)?;
        let value = self.platform.port_read(port, width);
        self.write_gpr(Gpr::Rax, width, value.into());
        Ok(())
    }

    fn port_out(&mut self) -> Result<(), Stop> {
        let (port, width) = self.port(0)?;
        let value = (self.cpu.gpr(Gpr::Rax) & width.mask()) as u32;
        self.platform.port_write(port, width, value);
        Ok(())
    }

    /// The permission map in the TSS, for code that IOPL does not let through (SDM vol. 1, section 19.5.2).
    pub(super) fn check_port(&mut self, port: u16, width: Width) -> Result<(), Stop> {
        /// Offset of the map's own offset in a TSS.
        const MAP_BASE: u64 = 102;
        const LARGE_TSS: u8 = 9;
        const BUSY: u8 = 2;
        let denied = Stop::Fault(Exception::GENERAL_PROTECTION);
        let by_map = self.mode == CpuMode::Virtual8086 || self.paging.cpl > self.iopl();
        if self.mode == CpuMode::Real || !by_map {
            return Ok(());
        }
        let tss = self.cpu.segment(SegmentName::Tr);
        let limit = u64::from(tss.limit);
        if tss.rights.kind() & !BUSY != LARGE_TSS || limit < MAP_BASE + 1 {
            return Err(denied);
        }
        let place = |offset: u64| Gva(tss.base.wrapping_add(offset));
        let map = self.as_system(|run| run.load(place(MAP_BASE), Width::Word))?;
        let first = map + u64::from(port / 8);
        // Two bytes are always read, for an access that reaches over the end of the first.
        if first + 1 > limit {
            return Err(denied);
        }
        let bits = self.as_system(|run| run.load(place(first), Width::Word))?;
        let wanted = ((1 << width.bytes()) - 1) << (port % 8);
        if bits & wanted != 0 {
            return Err(denied);
        }
        Ok(())
    }
}
