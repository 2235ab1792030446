//! The shape of an access: how wide, and in which direction.

/// Width of a port or memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Width {
    /// 8 bits.
    Byte = 1,
    /// 16 bits.
    Word = 2,
    /// 32 bits.
    Dword = 4,
    /// 64 bits (memory only).
    Qword = 8,
}

impl Width {
    /// Bytes: 1, 2, 4 or 8.
    pub const fn bytes(self) -> usize {
        self as usize
    }

    /// All-ones value of this width.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }

    /// The width of `bytes` bytes, if there is one.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Width::Byte),
            2 => Some(Width::Word),
            4 => Some(Width::Dword),
            8 => Some(Width::Qword),
            _ => None,
        }
    }
}

/// Direction of an access, from the guest's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads (IN, load).
    Read,
    /// The guest writes (OUT, store).
    Write,
}
