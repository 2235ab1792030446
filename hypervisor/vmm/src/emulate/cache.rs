//! Decoded instructions, kept by address.
//!
//! Invariant: what is kept is used only while the bytes at RIP are the ones that it was decoded from.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};

use super::{Bytes, SimpleMove};

/// Decoded instructions by address, so that a driver's access to its device is decoded once.
///
/// An entry is used only if the bytes at RIP are still the same, so stale code is never run.
pub struct DecodeCache {
    entries: [CachedInstruction; DECODE_ENTRIES],
}

/// Entries of a [`DecodeCache`], a power of two.
const DECODE_ENTRIES: usize = 32;

#[derive(Clone, Copy)]
struct CachedInstruction {
    rip: u64,
    bitness: u32,
    /// Bytes of the instruction; 0 in an empty entry.
    length: u8,
    /// Them, the first one lowest, and ones where they are.
    bytes: u128,
    mask: u128,
    instruction: Instruction,
    /// It, if it is one of those.
    simple: Option<SimpleMove>,
}

impl Default for DecodeCache {
    fn default() -> Self {
        let nothing = CachedInstruction {
            rip: 0,
            bitness: 0,
            length: 0,
            bytes: 0,
            mask: 0,
            instruction: Instruction::default(),
            simple: None,
        };
        DecodeCache {
            entries: [nothing; DECODE_ENTRIES],
        }
    }
}

impl DecodeCache {
    /// The simple one that was found at `rip`, of 64-bit code, if the bytes there still begin with it.
    #[inline]
    pub(super) fn simple(&self, rip: u64, bytes: [u8; 16]) -> Option<SimpleMove> {
        let entry = &self.entries[(rip as usize) % DECODE_ENTRIES];
        let same = (entry.bytes ^ u128::from_le_bytes(bytes)) & entry.mask == 0;
        entry.simple.filter(|_| entry.rip == rip && same)
    }

    /// The instruction that `bytes` begin with, and the decoder's error where they are none.
    pub(super) fn decode(
        &mut self,
        rip: u64,
        bitness: u32,
        bytes: &Bytes,
    ) -> Result<Instruction, DecoderError> {
        let entry = &mut self.entries[(rip as usize) % DECODE_ENTRIES];
        let found = u128::from_le_bytes(bytes.bytes);
        if entry.rip == rip
            && entry.bitness == bitness
            && (1..=bytes.length).contains(&entry.length)
            && (entry.bytes ^ found) & entry.mask == 0
        {
            return Ok(entry.instruction);
        }
        let mut decoder = Decoder::with_ip(bitness, bytes.as_slice(), rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.code() == Code::INVALID {
            return Err(decoder.last_error());
        }
        let length = instruction.len() as u8;
        *entry = CachedInstruction {
            rip,
            bitness,
            length,
            bytes: found,
            mask: (1u128 << (8 * length)) - 1,
            instruction,
            simple: SimpleMove::of(&instruction).filter(|_| bitness == 64),
        };
        Ok(instruction)
    }
}
