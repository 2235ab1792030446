//! Addresses as types: host-physical, guest-physical and guest-virtual never mix.
//!
//! An address is a plain `u64` in a newtype. Arithmetic is byte-wise. Nothing here
//! reads memory; `HostMemory` (host side) and `GuestMemory` (guest side) do.

use core::fmt;

/// Bytes in the smallest page, on both sides (SDM vol. 3A, section 4.5).
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a 2 MiB page.
pub const PAGE_SIZE_2M: u64 = 2 << 20;
/// Bytes in a 1 GiB page.
pub const PAGE_SIZE_1G: u64 = 1 << 30;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $short:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The raw address.
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// Whether the address is a multiple of `align`, a power of two in bytes.
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }

            /// The address rounded down to a multiple of `align`, a power of two in bytes.
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }

            /// Bytes from the start of the 4 KiB page.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The address `bytes` further, or `None` past the end of the address space.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(a) => Some(Self(a)),
                    None => None,
                }
            }
        }

        impl core::ops::Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl core::ops::Sub<$name> for $name {
            type Output = u64;
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($short, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// Host-physical address: what the machine's memory bus sees.
    Hpa,
    "hpa"
);
address!(
    /// Guest-physical address: what a guest believes is physical.
    Gpa,
    "gpa"
);
address!(
    /// Guest-virtual (linear) address, before the guest's own paging.
    Gva,
    "gva"
);
