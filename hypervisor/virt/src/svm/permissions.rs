//! The two permission maps: which MSRs and ports a guest reaches without an exit.
//!
//! One pair serves all vCPUs (APM vol. 2, sections 15.10 and 15.11). Everything exits but the
//! MSRs below, each of which the processor or `SvmVcpu::load` switches between guests.

use alloc::{boxed::Box, vec};

use super::features::Capabilities;
use crate::cpu::msr;

/// Bytes of the I/O permission map: a bit per port and three more for the last port's width.
pub const IOPM_BYTES: usize = 3 * 4096;
/// Bytes of the MSR permission map: two bits per MSR in four ranges of 8192.
pub const MSRPM_BYTES: usize = 2 * 4096;

/// MSRs that VMSAVE and VMLOAD switch.
const SWITCHED: [u32; 10] = [
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
];

/// Bit number of an MSR's read permission; the write permission is the next bit.
const fn msr_bit(number: u32) -> Option<usize> {
    let (range, first) = match number {
        0..=0x1fff => (0, 0),
        0xc000_0000..=0xc000_1fff => (1, 0xc000_0000),
        0xc001_0000..=0xc001_1fff => (2, 0xc001_0000),
        _ => return None,
    };
    Some(range * 2048 * 8 + (number - first) as usize * 2)
}

/// The MSR permission map for a processor: a set bit exits.
pub fn msr_map(capabilities: &Capabilities) -> Box<[u8]> {
    let mut map = vec![0xff_u8; MSRPM_BYTES].into_boxed_slice();
    let mut pass = |number: u32, read: bool, write: bool| {
        if let Some(bit) = msr_bit(number) {
            for (wanted, bit) in [(read, bit), (write, bit + 1)] {
                if wanted {
                    map[bit / 8] &= !(1 << (bit % 8));
                }
            }
        }
    };
    for number in SWITCHED {
        pass(number, true, true);
    }
    if capabilities.tsc_aux {
        pass(msr::TSC_AUX, true, true);
    }
    if capabilities.virtual_spec_ctrl() {
        pass(msr::SPEC_CTRL, true, true);
    }
    if capabilities.ibpb {
        // A command, which holds nothing.
        pass(msr::PRED_CMD, false, true);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(map: &[u8], number: u32) -> (bool, bool) {
        let bit = msr_bit(number).expect("covered");
        let at = |bit: usize| map[bit / 8] >> (bit % 8) & 1 == 1;
        (at(bit), at(bit + 1))
    }

    #[test]
    fn bits_are_where_the_manual_says() {
        assert_eq!(msr_bit(0), Some(0));
        assert_eq!(msr_bit(0x1fff), Some(0x7ff * 8 + 6));
        assert_eq!(msr_bit(0xc000_0080), Some(0x800 * 8 + 0x100));
        assert_eq!(msr_bit(0xc001_0114), Some(0x1000 * 8 + 0x228));
        for outside in [0x2000, 0x4000_0000, 0xbfff_ffff, 0xc000_2000, 0xc001_2000] {
            assert_eq!(msr_bit(outside), None);
        }
    }

    #[test]
    fn only_switched_msrs_pass() {
        let map = msr_map(&Capabilities::none());
        for number in SWITCHED {
            assert_eq!(exits(&map, number), (false, false), "{number:#x}");
        }
        let open: u32 = map.iter().map(|b| b.count_zeros()).sum();
        assert_eq!(open as usize, 2 * SWITCHED.len());
        // EFER shows SVME, PAT and APIC base belong to the VMM, HSAVE to the host.
        for number in [
            msr::EFER,
            msr::PAT,
            0x1b,
            0xc001_0117,
            msr::TSC,
            msr::TSC_AUX,
        ] {
            assert_eq!(exits(&map, number), (true, true), "{number:#x}");
        }
    }

    #[test]
    fn features_open_their_msrs() {
        let mut capabilities = Capabilities::none();
        capabilities.tsc_aux = true;
        capabilities.ibpb = true;
        let map = msr_map(&capabilities);
        assert_eq!(exits(&map, msr::TSC_AUX), (false, false));
        assert_eq!(exits(&map, msr::PRED_CMD), (true, false));
        assert_eq!(exits(&map, msr::SPEC_CTRL), (true, true));
    }
}
