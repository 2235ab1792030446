//! The guest's hardware breakpoints, for accesses that the processor did not finish itself.
//!
//! An instruction that exits in the middle of an access, to a device or a port, is completed by the VMM, so
//! that the processor has no chance to compare the address (SDM vol. 3B, section 18.2).

use mem::Width;
use virt::VirtualCpu;

/// DR7.L0 to G3.
const ENABLED: u64 = 0xff;
const CR4_DE: u64 = 1 << 3;

/// What a breakpoint watches, as DR7 encodes it.
const WRITES: u64 = 1;
const PORTS: u64 = 2;
const READS_AND_WRITES: u64 = 3;

/// The breakpoints in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoints {
    addresses: [u64; 4],
    dr7: u64,
    ports: bool,
}

impl Breakpoints {
    /// Those of a vCPU; `None`: it has set none.
    #[inline]
    pub fn of<V: VirtualCpu>(cpu: &V) -> Option<Self> {
        let dr7 = cpu.dr7();
        (dr7 & ENABLED != 0).then(|| Breakpoints {
            addresses: cpu.breakpoints(),
            dr7,
            ports: cpu.cr4() & CR4_DE != 0,
        })
    }

    /// Whether a vCPU has set none.
    #[inline]
    pub fn none<V: VirtualCpu>(cpu: &V) -> bool {
        cpu.dr7() & ENABLED == 0
    }

    /// Bits of DR6 that a load or store at a linear address sets.
    pub fn data(&self, at: u64, width: Width, write: bool) -> u64 {
        self.hits(at, width, |kind| {
            kind == READS_AND_WRITES || kind == WRITES && write
        })
    }

    /// Bits of DR6 that an access to a port sets.
    pub fn port(&self, port: u16, width: Width) -> u64 {
        let ports = self.ports;
        self.hits(port.into(), width, |kind| kind == PORTS && ports)
    }

    fn hits(&self, at: u64, width: Width, watches: impl Fn(u64) -> bool) -> u64 {
        let mut hits = 0;
        for (number, &address) in self.addresses.iter().enumerate() {
            let enabled = self.dr7 >> (2 * number) & 0b11 != 0;
            let control = self.dr7 >> (16 + 4 * number);
            let bytes: u64 = match control >> 2 & 0b11 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = address & !(bytes - 1);
            let apart =
                at.wrapping_sub(start) >= bytes && start.wrapping_sub(at) >= width.bytes() as u64;
            if enabled && watches(control & 0b11) && !apart {
                hits |= 1 << number;
            }
        }
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeCpu;

    fn set(dr7: u64) -> Breakpoints {
        let mut cpu = FakeCpu::default();
        cpu.state.dr = [0x1000, 0x2002, 0x3f8, 0xfee0_0020];
        cpu.state.dr7 = dr7;
        cpu.state.cr4 = CR4_DE;
        Breakpoints::of(&cpu).expect("some are set")
    }

    #[test]
    fn accesses_that_touch_the_range_hit() {
        // DR0: 4 bytes, writes. DR1: 2 bytes, reads and writes. DR2: a port of one byte.
        let b = set(0b01_10_01 | 0b1101 << 16 | 0b0111 << 20 | 0b0010 << 24);
        assert_eq!(b.data(0x1003, Width::Byte, true), 1);
        assert_eq!(b.data(0xffd, Width::Dword, true), 1);
        assert_eq!(b.data(0x1000, Width::Dword, false), 0, "a read");
        assert_eq!(b.data(0x1004, Width::Dword, true), 0, "behind");
        assert_eq!(b.data(0xffc, Width::Dword, true), 0, "before");
        assert_eq!(b.data(0x2000, Width::Qword, false), 2);
        assert_eq!(b.data(0x3f8, Width::Byte, true), 0, "not memory");
        assert_eq!(b.port(0x3f8, Width::Byte), 4);
        assert_eq!(b.port(0x3f9, Width::Byte), 0);
        assert_eq!(b.port(0x3f7, Width::Word), 4);
        let none = FakeCpu::default();
        assert_eq!(Breakpoints::of(&none), None);
    }

    #[test]
    fn ports_need_debug_extensions() {
        let mut b = set(0b10_00_00 | 0b0010 << 24);
        assert_eq!(b.port(0x3f8, Width::Byte), 4);
        b.ports = false;
        assert_eq!(b.port(0x3f8, Width::Byte), 0);
    }
}
