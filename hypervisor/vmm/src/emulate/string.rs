//! The string instructions, with and without REP.
//!
//! Each iteration is complete in itself: a fault leaves the registers as the last whole one left them.

use iced_x86::{Mnemonic, OpKind};
use mem::Width;
use virt::{Gpr, VirtualCpu};

use super::{
    MAX_ITERATIONS, Platform,
    alu::{ARITHMETIC, Alu, RFLAGS_DF, RFLAGS_TF, RFLAGS_ZF, compute},
    execute::{Run, Step, Stop},
};
use crate::walk::Access;

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, with or without REP.
    pub(super) fn string(&mut self) -> Result<Step, Stop> {
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
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Insb
                | Mnemonic::Insw
                | Mnemonic::Insd
                | Mnemonic::Outsb
                | Mnemonic::Outsw
                | Mnemonic::Outsd
        ) {
            self.check_port(self.cpu.gpr(Gpr::Rdx) as u16, width)?;
        }
        // A single step is one iteration (SDM vol. 3B, section 18.3.1.4).
        let iterations = if self.paging.rflags & RFLAGS_TF != 0 {
            1
        } else {
            MAX_ITERATIONS
        };
        for _ in 0..iterations {
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
            if count != 1 && self.aftermath.breakpoints != 0 {
                return Ok(Step::Again);
            }
            if count == 1 || compares && (repeat_unequal == equal) {
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
                let from = self.operand_address(1)?;
                let to = self.operand_address_for(0, Access::Write)?;
                // As for INS: a device is read once.
                self.probe(to, width, Access::Write)?;
                let value = self.load(from, width)?;
                self.store(to, width, value)?;
                (source, destination) = (true, true);
            }
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
                let value = self.cpu.gpr(Gpr::Rax);
                self.store(self.operand_address_for(0, Access::Write)?, width, value)?;
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
                let at = self.operand_address_for(0, Access::Write)?;
                // The store must not fault once the device has been read.
                self.probe(at, width, Access::Write)?;
                let port = self.cpu.gpr(Gpr::Rdx) as u16;
                self.watch_port(port, width);
                let value = self.platform.port_read(port, width);
                self.store(at, width, u64::from(value))?;
                destination = true;
            }
            M::Outsb | M::Outsw | M::Outsd => {
                let value = self.load(self.operand_address(1)?, width)?;
                let port = self.cpu.gpr(Gpr::Rdx) as u16;
                self.watch_port(port, width);
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

    pub(super) fn watch_port(&mut self, port: u16, width: Width) {
        if let Some(breakpoints) = &self.breakpoints {
            self.aftermath.breakpoints |= breakpoints.port(port, width);
        }
    }

    /// Writes RCX, RSI or RDI as a string instruction of this address size does.
    fn write_address_register(&mut self, gpr: Gpr, width: Width, value: u64) {
        self.write_gpr(gpr, width, value & width.mask());
    }
}
