//! Shifts, multiplication, division, bit scans, and the wide compare-and-exchange.

use iced_x86::{Mnemonic, OpKind, Register};
use mem::{Gva, Width};
use virt::{Gpr, VirtualCpu};

use super::{
    Exception, Platform,
    alu::{RFLAGS_CF, RFLAGS_OF, RFLAGS_ZF, Shift, shift, shift_double},
    execute::{Run, Stop},
};
use crate::walk::Access;

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes one of these instructions; `false`: another one.
    pub(super) fn arithmetic(&mut self) -> Result<bool, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Shl | Mnemonic::Sal => self.shift(Shift::Left)?,
            Mnemonic::Shr => self.shift(Shift::Right)?,
            Mnemonic::Sar => self.shift(Shift::Arithmetic)?,
            Mnemonic::Rol => self.shift(Shift::RotateLeft)?,
            Mnemonic::Ror => self.shift(Shift::RotateRight)?,
            Mnemonic::Rcl => self.shift(Shift::CarryLeft)?,
            Mnemonic::Rcr => self.shift(Shift::CarryRight)?,
            Mnemonic::Shld => self.shift_double(true)?,
            Mnemonic::Shrd => self.shift_double(false)?,
            Mnemonic::Mul => self.multiply(false)?,
            Mnemonic::Imul if self.instruction.op_count() == 1 => self.multiply(true)?,
            Mnemonic::Imul => self.multiply_into()?,
            Mnemonic::Div => self.divide(false)?,
            Mnemonic::Idiv => self.divide(true)?,
            Mnemonic::Bsf => self.scan(u64::trailing_zeros)?,
            Mnemonic::Bsr => self.scan(u64::ilog2)?,
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => self.exchange_pair()?,
            Mnemonic::Lea => {
                let offset = self.any_offset(1)?;
                self.set(0, offset)?;
            }
            Mnemonic::Bswap => {
                let (value, width) = (self.get(0)?, self.width(0)?);
                self.set(0, value.swap_bytes() >> (64 - 8 * width.bytes()))?;
            }
            mnemonic if is_set(mnemonic) => {
                let value = u64::from(self.condition());
                self.set(0, value)?;
            }
            mnemonic if is_conditional_move(mnemonic) => {
                // The operand is read whatever the condition says.
                let (value, old) = (self.get(1)?, self.get(0)?);
                let value = if self.condition() { value } else { old };
                self.set(0, value)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn shift(&mut self, kind: Shift) -> Result<(), Stop> {
        let count = if self.instruction.op_count() == 1 {
            1
        } else {
            self.get(1)? as u8
        };
        let (value, width) = (self.get_to_change(0)?, self.width(0)?);
        let (result, mask, flags) = shift(kind, value, count, self.cpu.rflags(), width);
        self.set(0, result)?;
        self.set_flags(mask, flags);
        Ok(())
    }

    fn shift_double(&mut self, left: bool) -> Result<(), Stop> {
        let (filler, count) = (self.get(1)?, self.get(2)? as u8);
        let (value, width) = (self.get_to_change(0)?, self.width(0)?);
        let (result, mask, flags) = shift_double(left, value, filler, count, width);
        self.set(0, result)?;
        self.set_flags(mask, flags);
        Ok(())
    }

    /// The double-width accumulator: AX, or DX:AX and wider.
    fn accumulator(&self, width: Width) -> u128 {
        let low = self.cpu.gpr(Gpr::Rax);
        if width == Width::Byte {
            return u128::from(low & 0xffff);
        }
        let bits = 8 * width.bytes();
        let high = self.cpu.gpr(Gpr::Rdx) & width.mask();
        u128::from(high) << bits | u128::from(low & width.mask())
    }

    fn set_accumulator(&mut self, width: Width, low: u64, high: u64) {
        if width == Width::Byte {
            let value = (high & 0xff) << 8 | low & 0xff;
            self.write_gpr(Gpr::Rax, Width::Word, value);
        } else {
            self.write_gpr(Gpr::Rax, width, low & width.mask());
            self.write_gpr(Gpr::Rdx, width, high & width.mask());
        }
    }

    fn multiply(&mut self, signed: bool) -> Result<(), Stop> {
        let (operand, width) = (self.get(0)?, self.width(0)?);
        let bits = 8 * width.bytes();
        let accumulator = self.cpu.gpr(Gpr::Rax) & width.mask();
        let product = if signed {
            (signed_of(accumulator, width) * signed_of(operand, width)) as u128
        } else {
            u128::from(accumulator) * u128::from(operand)
        };
        let (low, high) = (product as u64, (product >> bits) as u64 & width.mask());
        self.set_accumulator(width, low, high);
        let fits = if signed {
            signed_of(low & width.mask(), width) as u128 & mask_of(2 * bits)
                == product & mask_of(2 * bits)
        } else {
            high == 0
        };
        let flags = if fits { 0 } else { RFLAGS_CF | RFLAGS_OF };
        self.set_flags(RFLAGS_CF | RFLAGS_OF, flags);
        Ok(())
    }

    /// IMUL with two or three operands.
    fn multiply_into(&mut self) -> Result<(), Stop> {
        let width = self.width(0)?;
        let (a, b) = if self.instruction.op_count() == 3 {
            (self.get(1)?, self.get(2)?)
        } else {
            (self.get(0)?, self.get(1)?)
        };
        let product = signed_of(a & width.mask(), width) * signed_of(b & width.mask(), width);
        let low = product as u64 & width.mask();
        self.set(0, low)?;
        let fits = signed_of(low, width) == product;
        let flags = if fits { 0 } else { RFLAGS_CF | RFLAGS_OF };
        self.set_flags(RFLAGS_CF | RFLAGS_OF, flags);
        Ok(())
    }

    fn divide(&mut self, signed: bool) -> Result<(), Stop> {
        let (divisor, width) = (self.get(0)?, self.width(0)?);
        let dividend = self.accumulator(width);
        let bits = 8 * width.bytes();
        let error = Stop::Fault(Exception::DIVIDE_ERROR);
        let (quotient, remainder) = if signed {
            let shift = 128 - 2 * bits;
            let dividend = (dividend << shift) as i128 >> shift;
            let divisor = signed_of(divisor, width);
            let quotient = dividend.checked_div(divisor);
            let remainder = dividend.checked_rem(divisor);
            let (Some(quotient), Some(remainder)) = (quotient, remainder) else {
                return Err(error);
            };
            if signed_of(quotient as u64 & width.mask(), width) != quotient {
                return Err(error);
            }
            (quotient as u64, remainder as u64)
        } else {
            let divisor = u128::from(divisor);
            let Some(quotient) = dividend.checked_div(divisor) else {
                return Err(error);
            };
            if quotient > u128::from(width.mask()) {
                return Err(error);
            }
            (quotient as u64, (dividend % divisor) as u64)
        };
        self.set_accumulator(width, quotient, remainder);
        Ok(())
    }

    /// BSF and BSR: with a zero source the destination stays as it is.
    fn scan(&mut self, find: impl Fn(u64) -> u32) -> Result<(), Stop> {
        let value = self.get(1)?;
        if value != 0 {
            self.set(0, find(value).into())?;
        }
        let flags = if value == 0 { RFLAGS_ZF } else { 0 };
        self.set_flags(RFLAGS_ZF, flags);
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B.
    fn exchange_pair(&mut self) -> Result<(), Stop> {
        let width = match self.instruction.memory_size().size() {
            8 => Width::Dword,
            16 => Width::Qword,
            _ => return Err(Stop::Unsupported),
        };
        let bytes = width.bytes() as u64;
        let at = self.operand_address_for(0, Access::Write)?;
        if width == Width::Qword && !at.0.is_multiple_of(16) {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        let high_at = Gva(at.0.wrapping_add(bytes));
        self.probe(at, width, Access::Write)?;
        self.probe(high_at, width, Access::Write)?;
        // Two accesses: the exit's address is that of the first at best.
        self.target = None;
        let (low, high) = (self.load(at, width)?, self.load(high_at, width)?);
        let register = |cpu: &V, gpr| cpu.gpr(gpr) & width.mask();
        let equal = low == register(self.cpu, Gpr::Rax) && high == register(self.cpu, Gpr::Rdx);
        let (new_low, new_high) = if equal {
            (register(self.cpu, Gpr::Rbx), register(self.cpu, Gpr::Rcx))
        } else {
            (low, high)
        };
        self.store(at, width, new_low)?;
        self.store(high_at, width, new_high)?;
        if !equal {
            self.write_gpr(Gpr::Rax, width, low);
            self.write_gpr(Gpr::Rdx, width, high);
        }
        self.set_flags(RFLAGS_ZF, if equal { RFLAGS_ZF } else { 0 });
        Ok(())
    }

    /// XLAT: AL from the table at [rBX + AL].
    pub(super) fn translate_byte(&mut self) -> Result<(), Stop> {
        debug_assert_eq!(self.instruction.op0_kind(), OpKind::Memory);
        let at = self.operand_address_for(0, Access::Read)?;
        let value = self.load(at, Width::Byte)?;
        self.write_register(Register::AL, value)
    }
}

fn mask_of(bits: usize) -> u128 {
    if bits >= 128 {
        u128::MAX
    } else {
        (1 << bits) - 1
    }
}

fn signed_of(value: u64, width: Width) -> i128 {
    let shift = 64 - 8 * width.bytes() as u32;
    i128::from((value << shift) as i64 >> shift)
}

fn is_set(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Seto | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
    )
}

fn is_conditional_move(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
    )
}
