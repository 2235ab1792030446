//! The short way for what drivers do to their devices all day: one MOV between a register and memory.
//!
//! A nested page fault has told where the access goes, and the processor has made every check of the
//! access before it: segment, canonical form, page tables, privilege. What is left is to know which
//! instruction it was. Its bytes are fetched anew each time, through the guest's page tables as they are
//! now, and compared with those of the kept instruction; the operand's address must lie where the fault
//! says. Whatever does not fit takes the long way, which decides everything by itself.
//!
//! Only 64-bit code. Not here: operands across two pages, FS and GS, AH to BH, anything but MOV.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use mem::{Gpa, Gva, Width, guest::GuestMemory};
use virt::{Gpr, VirtualCpu};

use super::{DecodeCache, Platform, operand::general};
use crate::{breakpoint::Breakpoints, walk};

/// The access with which an instruction left the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where it goes.
    pub gpa: Gpa,
    /// It was a write, so that the guest's page tables allow one.
    pub write: bool,
}

/// What an instruction does between memory and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transfer {
    /// Loads a register.
    Load(Gpr, Rest),
    /// Stores a register.
    Store(Gpr),
    /// Stores a constant.
    StoreImmediate(u64),
}

/// What becomes of a register's bits that are not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// They stay: an 8- or 16-bit register.
    Kept,
    /// They are cleared: a 32-bit register, or MOVZX.
    Cleared,
    /// Copies of the sign up to bit 31; cleared from there.
    SignTo32,
    /// Copies of the sign.
    SignTo64,
}

/// A MOV with one operand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleMove {
    transfer: Transfer,
    width: Width,
    base: Option<Gpr>,
    index: Option<(Gpr, u8)>,
    /// The low bits of the displacement: all that is looked at.
    displacement: u16,
    length: u8,
}

impl SimpleMove {
    /// `instruction`, of 64-bit code, if it is one.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        let mnemonic = instruction.mnemonic();
        let moves = matches!(
            mnemonic,
            Mnemonic::Mov | Mnemonic::Movnti | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd
        );
        if !moves
            || instruction.op_count() != 2
            || matches!(instruction.memory_segment(), Register::FS | Register::GS)
        {
            return None;
        }
        let width = Width::from_bytes(instruction.memory_size().size())?;
        let transfer = match (instruction.op0_kind(), instruction.op1_kind()) {
            (OpKind::Register, OpKind::Memory) => {
                let register = instruction.op0_register();
                let sign = matches!(mnemonic, Mnemonic::Movsx | Mnemonic::Movsxd);
                let rest = match (register.size(), sign) {
                    (8, true) => Rest::SignTo64,
                    (4, true) => Rest::SignTo32,
                    (4 | 8, false) => Rest::Cleared,
                    (size, false) if size == width.bytes() => Rest::Kept,
                    _ => return None,
                };
                Transfer::Load(whole(register)?, rest)
            }
            (OpKind::Memory, OpKind::Register) => {
                Transfer::Store(whole(instruction.op1_register())?)
            }
            (OpKind::Memory, _) => Transfer::StoreImmediate(instruction.immediate(1)),
            _ => return None,
        };
        let address_register = |register: Register| match register {
            // The displacement already has the address of the next instruction in it.
            Register::None | Register::RIP => Some(None),
            _ if register.is_gpr64() => Some(whole(register)),
            _ => None,
        };
        let scale = instruction.memory_index_scale() as u8;
        Some(SimpleMove {
            transfer,
            width,
            base: address_register(instruction.memory_base())?,
            index: address_register(instruction.memory_index())?.map(|gpr| (gpr, scale)),
            displacement: instruction.memory_displacement64() as u16,
            length: instruction.len() as u8,
        })
    }

    /// The one at RIP, if this is what made the access to `target`.
    #[inline]
    pub fn find<V: VirtualCpu>(
        cpu: &V,
        memory: &GuestMemory,
        cache: &DecodeCache,
        target: Target,
    ) -> Option<Self> {
        let cpl = cpu.cpl_of_64_bit_code()?;
        let rip = cpu.rip();
        let assisted = cpu.instruction_bytes();
        let bytes = if assisted.is_empty() {
            let ram = memory.recent();
            let at = walk::translate_code_64(cpu, cpl, Gva(rip), ram)?;
            if at.page_offset() > mem::PAGE_SIZE - 16 {
                return None;
            }
            ram.read_16(at).ok()?
        } else {
            let mut bytes = [0; 16];
            bytes.get_mut(..assisted.len())?.copy_from_slice(assisted);
            bytes
        };
        let found = cache.simple(rip, bytes)?;
        // Accesses of a guest that has set breakpoints are compared with them on the long way.
        let plain = Breakpoints::none(cpu);
        (plain && found.reaches(cpu, target)).then_some(found)
    }

    /// Whether the operand's address lies where `target` does in its page, with all its bytes, and the access is of that kind.
    #[inline]
    fn reaches<V: VirtualCpu>(&self, cpu: &V, target: Target) -> bool {
        let mut address = u64::from(self.displacement);
        if let Some(base) = self.base {
            address = address.wrapping_add(cpu.gpr(base));
        }
        if let Some((index, scale)) = self.index {
            address = address.wrapping_add(cpu.gpr(index).wrapping_mul(u64::from(scale)));
        }
        let offset = Gva(address).page_offset();
        offset == target.gpa.page_offset()
            && offset + self.width.bytes() as u64 <= mem::PAGE_SIZE
            && (target.write || matches!(self.transfer, Transfer::Load(..)))
    }

    /// Executes it, all but the step to the next instruction. Returns its length in bytes.
    #[inline]
    pub fn execute<V: VirtualCpu, P: Platform<V>>(
        self,
        cpu: &mut V,
        platform: &mut P,
        gpa: Gpa,
    ) -> u8 {
        let SimpleMove {
            transfer, width, ..
        } = self;
        match transfer {
            Transfer::Load(gpr, rest) => {
                let value = platform.mmio_read(cpu, gpa, width) & width.mask();
                let shift = 64 - 8 * width.bytes() as u32;
                let sign = ((value << shift) as i64 >> shift) as u64;
                let value = match rest {
                    Rest::Cleared => value,
                    Rest::Kept => (cpu.gpr(gpr) & !width.mask()) | value,
                    Rest::SignTo32 => sign & 0xffff_ffff,
                    Rest::SignTo64 => sign,
                };
                cpu.set_gpr(gpr, value);
            }
            Transfer::Store(gpr) => {
                let value = cpu.gpr(gpr) & width.mask();
                platform.mmio_write(cpu, gpa, width, value);
            }
            Transfer::StoreImmediate(value) => {
                platform.mmio_write(cpu, gpa, width, value & width.mask());
            }
        }
        self.length
    }
}

/// A general register whose low part `register` is.
fn whole(register: Register) -> Option<Gpr> {
    match general(register)? {
        (gpr, 0) => Some(gpr),
        _ => None,
    }
}
