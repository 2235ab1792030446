//! Arithmetic and its flags, on any width.
//!
//! Pure functions, as the processor computes (SDM vol. 1, appendix A). What an instruction leaves undefined
//! is what these compute.

use mem::Width;

pub(super) const RFLAGS_CF: u64 = 1 << 0;
pub(super) const RFLAGS_PF: u64 = 1 << 2;
pub(super) const RFLAGS_AF: u64 = 1 << 4;
pub(super) const RFLAGS_ZF: u64 = 1 << 6;
pub(super) const RFLAGS_SF: u64 = 1 << 7;
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
pub(super) fn result_flags(result: u64, width: Width) -> u64 {
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

/// Shifts and rotations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Left,
    Right,
    Arithmetic,
    RotateLeft,
    RotateRight,
    CarryLeft,
    CarryRight,
}

/// Shifts or rotates `value`. Returns the result, which flags change, and these. A count of 0 changes none.
pub(super) fn shift(
    kind: Shift,
    value: u64,
    count: u8,
    rflags: u64,
    width: Width,
) -> (u64, u64, u64) {
    let bits = 8 * width.bytes() as u32;
    let count = u32::from(count) & if width == Width::Qword { 63 } else { 31 };
    let mask = width.mask();
    let value = value & mask;
    if count == 0 {
        return (value, 0, 0);
    }
    let sign = sign_bit(width);
    let mut carry = rflags & RFLAGS_CF != 0;
    let mut result = value;
    // One bit at a time, at most 63: the carry then takes care of itself.
    for _ in 0..count {
        let (top, bottom) = (result & sign != 0, result & 1 != 0);
        result = match kind {
            Shift::Left => result << 1,
            Shift::Right => result >> 1,
            Shift::Arithmetic => result >> 1 | result & sign,
            Shift::RotateLeft => result << 1 | u64::from(top),
            Shift::RotateRight => result >> 1 | u64::from(bottom) << (bits - 1),
            Shift::CarryLeft => result << 1 | u64::from(carry),
            Shift::CarryRight => result >> 1 | u64::from(carry) << (bits - 1),
        } & mask;
        carry = match kind {
            Shift::Left | Shift::RotateLeft | Shift::CarryLeft => top,
            Shift::Right | Shift::Arithmetic | Shift::RotateRight | Shift::CarryRight => bottom,
        };
    }
    let top = result & sign != 0;
    // Defined for a count of 1, and computed alike for all.
    let overflow = match kind {
        Shift::Left | Shift::RotateLeft | Shift::CarryLeft => top != carry,
        Shift::Right => value & sign != 0,
        Shift::Arithmetic => false,
        Shift::RotateRight | Shift::CarryRight => top != (result & (sign >> 1) != 0),
    };
    let mut flags = 0;
    if carry {
        flags |= RFLAGS_CF;
    }
    if overflow {
        flags |= RFLAGS_OF;
    }
    let changed = match kind {
        Shift::Left | Shift::Right | Shift::Arithmetic => {
            flags |= result_flags(result, width);
            ARITHMETIC & !RFLAGS_AF
        }
        _ => RFLAGS_CF | RFLAGS_OF,
    };
    (result, changed, flags)
}

/// SHLD (`left`) and SHRD: shifts `value`, filled up from `filler`. As [`shift`].
pub(super) fn shift_double(
    left: bool,
    value: u64,
    filler: u64,
    count: u8,
    width: Width,
) -> (u64, u64, u64) {
    let bits = 8 * width.bytes() as u32;
    let mask = width.mask();
    let count = u32::from(count) & if width == Width::Qword { 63 } else { 31 };
    let (value, filler) = (value & mask, filler & mask);
    // With 16 bits the count can exceed the width, which leaves all undefined: nothing changes.
    if count == 0 || count > bits {
        return (value, 0, 0);
    }
    let (value, filler) = (u128::from(value), u128::from(filler));
    let (result, carry) = if left {
        let wide = value << bits | filler;
        (
            (wide << count >> bits) as u64 & mask,
            value >> (bits - count) & 1 != 0,
        )
    } else {
        let wide = filler << bits | value;
        ((wide >> count) as u64 & mask, value >> (count - 1) & 1 != 0)
    };
    let mut flags = result_flags(result, width);
    if carry {
        flags |= RFLAGS_CF;
    }
    if (result ^ value as u64) & sign_bit(width) != 0 {
        flags |= RFLAGS_OF;
    }
    (result, ARITHMETIC & !RFLAGS_AF, flags)
}
