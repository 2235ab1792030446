//! Counting, extracting and moving bits: LZCNT, TZCNT, POPCNT, BMI1, BMI2, ADX, CRC32.
//!
//! That the processor has them it has checked before it touched memory (SDM vol. 2, the instructions). Flags that an
//! instruction leaves undefined stay as they are.

use iced_x86::Mnemonic;
use mem::Width;
use virt::{Gpr, VirtualCpu};

use super::{
    Platform,
    alu::{ARITHMETIC, RFLAGS_CF, RFLAGS_OF, RFLAGS_SF, RFLAGS_ZF, result_flags},
    execute::{Run, Stop},
};

const RESULT: u64 = RFLAGS_ZF | RFLAGS_SF;

fn bits_of(width: Width) -> u32 {
    8 * width.bytes() as u32
}

/// The bits of `value` at the places of the set bits of `mask`, moved together at the low end.
fn extract(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut next) = (0, 0);
    while mask != 0 {
        let place = mask.trailing_zeros();
        result |= (value >> place & 1) << next;
        next += 1;
        mask &= mask - 1;
    }
    result
}

/// The inverse: the low bits of `value` at the places of the set bits of `mask`.
fn deposit(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut next) = (0, 0);
    while mask != 0 {
        let place = mask.trailing_zeros();
        result |= (value >> next & 1) << place;
        next += 1;
        mask &= mask - 1;
    }
    result
}

/// CRC-32 of Castagnoli's polynomial, reflected, one more value.
fn crc32c(crc: u32, value: u64, width: Width) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let bytes = value.to_le_bytes();
    bytes.iter().take(width.bytes()).fold(crc, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            let carry = crc & 1 != 0;
            crc >> 1 ^ if carry { POLYNOMIAL } else { 0 }
        })
    })
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes one of these instructions; `false`: another one.
    pub(super) fn bits(&mut self) -> Result<bool, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Popcnt => {
                let value = self.get(1)?;
                self.set(0, value.count_ones().into())?;
                let zero = if value == 0 { RFLAGS_ZF } else { 0 };
                self.set_flags(ARITHMETIC, zero);
            }
            Mnemonic::Tzcnt => self.count_zeros(u64::trailing_zeros)?,
            Mnemonic::Lzcnt => {
                let unused = 64 - bits_of(self.width(0)?);
                self.count_zeros(|value| value.leading_zeros().saturating_sub(unused))?;
            }
            Mnemonic::Crc32 => {
                let (crc, value, width) = (self.get(0)?, self.get(1)?, self.width(1)?);
                let crc = crc32c(crc as u32, value, width);
                self.set(0, crc.into())?;
            }
            Mnemonic::Adcx => self.add_with(RFLAGS_CF)?,
            Mnemonic::Adox => self.add_with(RFLAGS_OF)?,
            Mnemonic::Andn => {
                let result = !self.get(1)? & self.get(2)?;
                self.set_result(result, 0)?;
            }
            Mnemonic::Blsi => {
                let value = self.get(1)?;
                self.set_result(value & value.wrapping_neg(), carry_if(value != 0))?;
            }
            Mnemonic::Blsmsk => {
                let value = self.get(1)?;
                self.set_result(value ^ value.wrapping_sub(1), carry_if(value == 0))?;
            }
            Mnemonic::Blsr => {
                let value = self.get(1)?;
                let rest = value & value.wrapping_sub(1);
                self.set_result(rest, carry_if(value == 0))?;
            }
            Mnemonic::Bextr => {
                let (value, control) = (self.get(1)?, self.get(2)?);
                let (start, length) = (control as u8, (control >> 8) as u8);
                let shifted = value.checked_shr(start.into()).unwrap_or(0);
                let result = shifted & low_bits(length.into());
                self.set(0, result)?;
                let zero = if result == 0 { RFLAGS_ZF } else { 0 };
                self.set_flags(RFLAGS_ZF | RFLAGS_CF | RFLAGS_OF, zero);
            }
            Mnemonic::Bzhi => {
                let (value, index) = (self.get(1)?, u32::from(self.get(2)? as u8));
                let beyond = index >= bits_of(self.width(0)?);
                self.set_result(value & low_bits(index), carry_if(beyond))?;
            }
            Mnemonic::Pext => {
                let result = extract(self.get(1)?, self.get(2)?);
                self.set(0, result)?;
            }
            Mnemonic::Pdep => {
                let result = deposit(self.get(1)?, self.get(2)?);
                self.set(0, result)?;
            }
            Mnemonic::Mulx => {
                let width = self.width(0)?;
                let factor = self.cpu.gpr(Gpr::Rdx) & width.mask();
                let product = u128::from(factor) * u128::from(self.get(2)?);
                // With one register for both it is the upper half that stays.
                self.set(1, product as u64 & width.mask())?;
                self.set(0, (product >> bits_of(width)) as u64 & width.mask())?;
            }
            Mnemonic::Rorx => {
                let (value, width) = (self.get(1)?, self.width(0)?);
                let count = self.get(2)? as u32;
                let result = if width == Width::Qword {
                    value.rotate_right(count & 63)
                } else {
                    (value as u32).rotate_right(count & 31).into()
                };
                self.set(0, result)?;
            }
            Mnemonic::Shlx => self.shift_by(|value, _, count| value << count)?,
            Mnemonic::Shrx => self.shift_by(|value, _, count| value >> count)?,
            Mnemonic::Sarx => self.shift_by(|value, unused, count| {
                ((value << unused) as i64 >> unused >> count) as u64
            })?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn count_zeros(&mut self, count: impl Fn(u64) -> u32) -> Result<(), Stop> {
        let (value, bits) = (self.get(1)?, bits_of(self.width(0)?));
        let count = count(value).min(bits);
        self.set(0, count.into())?;
        let zero = if count == 0 { RFLAGS_ZF } else { 0 };
        self.set_flags(RFLAGS_ZF | RFLAGS_CF, zero | carry_if(count == bits));
        Ok(())
    }

    /// ADCX and ADOX: an addition whose carry is in `flag` alone.
    fn add_with(&mut self, flag: u64) -> Result<(), Stop> {
        let (a, b, width) = (self.get(0)?, self.get(1)?, self.width(0)?);
        let carry = self.cpu.rflags() & flag != 0;
        let sum = u128::from(a) + u128::from(b) + u128::from(carry);
        self.set(0, sum as u64 & width.mask())?;
        let carries = sum >> bits_of(width) != 0;
        self.set_flags(flag, if carries { flag } else { 0 });
        Ok(())
    }

    /// The result of an instruction of BMI1 or BZHI, whose OF is clear.
    fn set_result(&mut self, result: u64, carry: u64) -> Result<(), Stop> {
        let width = self.width(0)?;
        let result = result & width.mask();
        self.set(0, result)?;
        let flags = result_flags(result, width) & RESULT | carry;
        self.set_flags(RESULT | RFLAGS_CF | RFLAGS_OF, flags);
        Ok(())
    }

    /// SHLX, SHRX, SARX: no flags. `shift` is given the value, how many bits of 64 it has not, and the count.
    fn shift_by(&mut self, shift: impl Fn(u64, u32, u32) -> u64) -> Result<(), Stop> {
        let (value, width) = (self.get(1)?, self.width(0)?);
        let bits = bits_of(width);
        let count = self.get(2)? as u32 & (bits - 1);
        self.set(0, shift(value, 64 - bits, count) & width.mask())
    }
}

fn carry_if(condition: bool) -> u64 {
    if condition { RFLAGS_CF } else { 0 }
}

/// A mask of so many low bits; all from 64 on.
fn low_bits(count: u32) -> u64 {
    1u64.checked_shl(count).map_or(u64::MAX, |bit| bit - 1)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, DEVICE, DONE};
    use super::*;
    use virt::Registers;

    #[test]
    fn bits_go_where_the_mask_has_them() {
        assert_eq!(extract(0xabcd, 0xf0f0), 0xac);
        assert_eq!(deposit(0xac, 0xf0f0), 0xa0c0);
        assert_eq!((extract(5, 0), deposit(5, 0)), (0, 0));
        assert_eq!(extract(u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        // "123456789" gives E3069283H (RFC 3720's polynomial).
        let crc = crc32c(!0, u64::from_le_bytes(*b"12345678"), Width::Qword);
        assert_eq!(!crc32c(crc, u64::from(b'9'), Width::Byte), 0xe306_9283);
    }

    /// One instruction with its operand, at [RBX], and two registers; RAX after it and the flags of `defined`.
    #[test]
    fn each_instruction_on_a_device() {
        const CARRY: u64 = RFLAGS_CF;
        const ZERO: u64 = RFLAGS_ZF;
        for (code, operand, rax, rdx, result, flags) in [
            // popcnt, tzcnt, lzcnt eax, [rbx]
            (&[0xf3, 0x0f, 0xb8, 0x03][..], 0xf0f0, 0, 0, 8, 0),
            (&[0xf3, 0x0f, 0xbc, 0x03], 8, 0, 0, 3, 0),
            (&[0xf3, 0x0f, 0xbc, 0x03], 0, 0, 0, 32, CARRY),
            (&[0xf3, 0x0f, 0xbd, 0x03], 1, 0, 0, 31, 0),
            (&[0xf3, 0x0f, 0xbd, 0x03], 1 << 31, 0, 0, 0, ZERO),
            // tzcnt ax, [rbx]
            (&[0x66, 0xf3, 0x0f, 0xbc, 0x03], 0x1_0000, 0, 0, 16, CARRY),
            // crc32 eax, byte [rbx]
            (&[0xf2, 0x0f, 0x38, 0xf0, 0x03], 1, 0, 0, 0xf26b_8303, 0),
            // adcx eax, [rbx]: no carry in
            (&[0x66, 0x0f, 0x38, 0xf6, 0x03], 1, 0xffff_ffff, 0, 0, CARRY),
            // andn eax, edx, [rbx]
            (&[0xc4, 0xe2, 0x68, 0xf2, 0x03], 0xff, 0, 0x0f, 0xf0, 0),
            // blsi, blsmsk, blsr eax, [rbx]
            (&[0xc4, 0xe2, 0x78, 0xf3, 0x1b], 0x50, 0, 0, 0x10, CARRY),
            (&[0xc4, 0xe2, 0x78, 0xf3, 0x13], 0x50, 0, 0, 0x1f, 0),
            (&[0xc4, 0xe2, 0x78, 0xf3, 0x0b], 0x50, 0, 0, 0x40, 0),
            // bextr eax, [rbx], edx: 8 bits from 4 on
            (&[0xc4, 0xe2, 0x68, 0xf7, 0x03], 0xabcd, 0, 0x0804, 0xbc, 0),
            // bzhi eax, [rbx], edx
            (&[0xc4, 0xe2, 0x68, 0xf5, 0x03], 0xffff, 0, 4, 0xf, 0),
            // rorx eax, [rbx], 8
            (
                &[0xc4, 0xe3, 0x7b, 0xf0, 0x03, 8],
                0x12,
                0,
                0,
                0x1200_0000,
                0,
            ),
            // sarx, shlx, shrx eax, [rbx], edx
            (
                &[0xc4, 0xe2, 0x6a, 0xf7, 0x03],
                0x8000_0000,
                0,
                4,
                0xf800_0000,
                0,
            ),
            (&[0xc4, 0xe2, 0x69, 0xf7, 0x03], 0x8000_0001, 0, 36, 0x10, 0),
            (
                &[0xc4, 0xe2, 0x6b, 0xf7, 0x03],
                0x8000_0000,
                0,
                4,
                0x0800_0000,
                0,
            ),
            // mulx ecx, eax, [rbx]
            (&[0xc4, 0xe2, 0x7b, 0xf6, 0x0b], 0x8000_0001, 0, 4, 4, 0),
        ] {
            let mut b = Bench::new();
            b.cpu.set_gpr(Gpr::Rbx, DEVICE);
            b.set_device(0, operand);
            b.cpu.set_gpr(Gpr::Rax, rax);
            b.cpu.set_gpr(Gpr::Rdx, rdx);
            b.cpu.set_rflags(2);
            assert_eq!(b.run(code), DONE(code), "{code:02x?}");
            assert_eq!(b.cpu.gpr(Gpr::Rax), result, "{code:02x?} of {operand:#x}");
            let got = b.cpu.rflags() & (CARRY | ZERO);
            assert_eq!(got, flags, "flags of {code:02x?}");
        }
    }
}
