//! Moves between device memory and MMX, XMM or YMM registers.
//!
//! Wide accesses reach a device as consecutive ones of up to 8 bytes, lowest first. That the
//! registers may be used at all (CR0, CR4, XCR0) the processor has checked before it touched memory.

use iced_x86::{Mnemonic, OpKind, Register};
use mem::{Gva, Width};
use virt::VirtualCpu;

use super::{
    Exception, Platform,
    execute::{Run, Stop},
};
use crate::walk::Access;

/// How a move treats the register and the memory.
#[derive(Clone, Copy)]
struct Move {
    /// Memory must be aligned to the operand, or #GP(0).
    aligned: bool,
    /// First byte of the register that takes part.
    offset: usize,
    /// A load keeps the bytes of the register's low half that it does not load.
    merges: bool,
}

const PLAIN: Move = Move {
    aligned: false,
    offset: 0,
    merges: false,
};
const ALIGNED: Move = Move {
    aligned: true,
    ..PLAIN
};
const LOW_HALF: Move = Move {
    merges: true,
    ..PLAIN
};
const HIGH_HALF: Move = Move {
    offset: 8,
    ..LOW_HALF
};

fn kind(mnemonic: Mnemonic) -> Option<(Move, bool)> {
    use Mnemonic::*;
    Some(match mnemonic {
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa => (ALIGNED, false),
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => (ALIGNED, true),
        Movups | Movupd | Movdqu | Lddqu | Movss | Movsd | Movq | Movd | Movntq => (PLAIN, false),
        Vmovups | Vmovupd | Vmovdqu | Vlddqu | Vmovss | Vmovsd | Vmovq | Vmovd => (PLAIN, true),
        Movlps | Movlpd => (LOW_HALF, false),
        Movhps | Movhpd => (HIGH_HALF, false),
        _ => return None,
    })
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes such a move; `false`: another instruction.
    pub(super) fn vector_move(&mut self) -> Result<bool, Stop> {
        let Some((how, vex)) = kind(self.instruction.mnemonic()) else {
            return Ok(false);
        };
        if self.instruction.op_count() != 2 {
            return Ok(false);
        }
        let loads = self.instruction.op1_kind() == OpKind::Memory;
        let (register, memory) = if loads { (0, 1) } else { (1, 0) };
        if self.instruction.op_kind(memory) != OpKind::Memory
            || self.instruction.op_kind(register) != OpKind::Register
        {
            return Ok(false);
        }
        let name = self.instruction.op_register(register);
        let bytes = self.instruction.memory_size().size();
        if !matches!(bytes, 4 | 8 | 16 | 32) {
            return Ok(false);
        }
        let access = if loads { Access::Read } else { Access::Write };
        let at = self.operand_address_for(memory, access)?;
        if how.aligned && !at.0.is_multiple_of(bytes as u64) {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        if name.is_mm() {
            return self.mmx_move(name, at, bytes, loads);
        }
        if !(name.is_xmm() || name.is_ymm()) {
            return Ok(false);
        }
        let number = name.number() as u8 & 15;
        let mut value = self.cpu.vector(number);
        let range = how.offset..how.offset + bytes;
        let part = value.get_mut(range).ok_or(Stop::Unsupported)?;
        if loads {
            let mut loaded = [0; 32];
            let loaded = loaded.get_mut(..bytes).ok_or(Stop::Unsupported)?;
            self.load_wide(at, loaded)?;
            part.copy_from_slice(loaded);
            if !how.merges {
                // Narrow loads clear the rest of the 16 bytes; those with VEX also what is above.
                let end = if vex { 32 } else { 16 };
                if let Some(rest) = value.get_mut(bytes..end) {
                    rest.fill(0);
                }
            }
            self.cpu.set_vector(number, &value);
        } else {
            let mut stored = [0; 32];
            let stored = stored.get_mut(..bytes).ok_or(Stop::Unsupported)?;
            stored.copy_from_slice(part);
            self.store_wide(at, stored)?;
        }
        Ok(true)
    }

    fn mmx_move(
        &mut self,
        name: Register,
        at: Gva,
        bytes: usize,
        loads: bool,
    ) -> Result<bool, Stop> {
        let width = Width::from_bytes(bytes).ok_or(Stop::Unsupported)?;
        let number = name.number() as u8 & 7;
        let old = self.cpu.mmx(number);
        if loads {
            let value = self.load(at, width)?;
            self.cpu.set_mmx(number, value);
        } else {
            self.store(at, width, old)?;
            // Also a store leaves the registers in MMX state.
            self.cpu.set_mmx(number, old);
        }
        Ok(true)
    }

    /// Parts of a wide access, each of a width that a bus carries.
    fn parts(at: Gva, bytes: usize) -> impl Iterator<Item = (usize, Gva, Width)> {
        let width = if bytes < 8 {
            Width::Dword
        } else {
            Width::Qword
        };
        let step = width.bytes();
        (0..bytes).step_by(step).map(move |offset| {
            let part = Gva(at.0.wrapping_add(offset as u64));
            (offset, part, width)
        })
    }

    fn probe_wide(&self, at: Gva, bytes: usize, access: Access) -> Result<(), Stop> {
        let last = Gva(at.0.wrapping_add(bytes as u64 - 1));
        self.probe(at, Width::Byte, access)?;
        if last.0 - last.page_offset() != at.0 - at.page_offset() {
            self.probe(Gva(last.0 - last.page_offset()), Width::Byte, access)?;
        }
        Ok(())
    }

    pub(super) fn load_wide(&mut self, at: Gva, to: &mut [u8]) -> Result<(), Stop> {
        if to.len() > 8 {
            self.probe_wide(at, to.len(), Access::Read)?;
        }
        for (offset, part, width) in Self::parts(at, to.len()) {
            let value = self.load(part, width)?.to_le_bytes();
            if let Some(slot) = to.get_mut(offset..offset + width.bytes()) {
                slot.copy_from_slice(&value[..width.bytes()]);
            }
        }
        Ok(())
    }

    pub(super) fn store_wide(&mut self, at: Gva, from: &[u8]) -> Result<(), Stop> {
        if from.len() > 8 {
            self.probe_wide(at, from.len(), Access::Write)?;
        }
        for (offset, part, width) in Self::parts(at, from.len()) {
            let mut value = [0; 8];
            if let (Some(slot), Some(bytes)) = (
                value.get_mut(..width.bytes()),
                from.get(offset..offset + width.bytes()),
            ) {
                slot.copy_from_slice(bytes);
            }
            self.store(part, width, u64::from_le_bytes(value))?;
        }
        Ok(())
    }
}
