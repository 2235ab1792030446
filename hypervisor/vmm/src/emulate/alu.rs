//! Arithmetic and its flags, on any width.
//!
//! Pure functions, as the processor computes (SDM vol. 1, appendix A). What an instruction leaves undefined
//! is what these compute.

use mem::Width;

pub(super) const RFLAGS_CF: u64 = 1 << 0;
const RFLAGS_PF: u64 = 1 << 2;
const RFLAGS_AF: u64 = 1 << 4;
pub(super) const RFLAGS_ZF: u64 = 1 << 6;
const RFLAGS_SF: u64 = 1 << 7;
pub(super) const RFLAGS_TF: u64 = 1 << 8;
pub(super) const RFLAGS_DF: u64 = 1 << 10;
pub(super) const RFLAGS_OF: u64 = 1 << 11;
pub(super) const ARITHMETIC: u64 =
    RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;

/// A two-operand or one-operand computation on `width` bits: result and arithmetic flags.
#[derive(Clone, Copy)]
pub(super) enum Alu {
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

pub(super) fn compute(operation: Alu, a: u64, b: u64, carry: bool, width: Width) -> (u64, u64) {
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
