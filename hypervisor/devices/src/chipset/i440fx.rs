//! The host bridge of the 440FX, with the registers that make shadowed ROM writable.
//!
//! The programmable attribute map (82441FX data sheet, section 3.2.18, PAM0 to PAM6) says for
//! each of 13 segments from 0xC0000 to 0xFFFFF whether reads and writes go to RAM or to the
//! bus. The RAM begins as a copy of the ROM, and is always what the guest reads: a guest that changes it and
//! then turns reads back to the ROM sees the change. Writes go to the RAM or nowhere.

use alloc::sync::Arc;

use mem::guest::Access;
use mem::{Gpa, GuestRange, Width};
use spin::Mutex;

use super::{SUBSYSTEM, SUBSYSTEM_VENDOR, ShadowControl};
use crate::pci::{ConfigSpace, FunctionId, PciFunction};

const ID: FunctionId = FunctionId {
    vendor: 0x8086,
    device: 0x1237,
    class: 0x06,
    subclass: 0x00,
    interface: 0,
    revision: 2,
    subsystem_vendor: SUBSYSTEM_VENDOR,
    subsystem: SUBSYSTEM,
};

/// The memory that the attribute map governs.
pub const SHADOW: GuestRange = GuestRange {
    start: Gpa(0xc_0000),
    bytes: 0x4_0000,
};

/// Register PAM0; six more follow.
const PAM0: u16 = 0x59;
const PAM_REGISTERS: usize = 7;
/// Write enable, in each half of a PAM register.
const WRITE_ENABLE: u8 = 1 << 1;
/// Read and write enable of both segments of a register.
const PAM_WRITABLE: u8 = 0x33;
/// PAM0 has the upper segment only.
const PAM0_WRITABLE: u8 = 0x30;

const SMALL: u64 = 0x4000;
/// The segments, in ascending order: twelve of 16 KiB, then one of 64 KiB.
pub const SHADOW_SEGMENTS: [GuestRange; 13] = {
    let mut segments = [GuestRange {
        start: SHADOW.start,
        bytes: SMALL,
    }; 13];
    let mut n = 0;
    while n < segments.len() {
        segments[n].start = Gpa(SHADOW.start.0 + SMALL * n as u64);
        n += 1;
    }
    segments[12].bytes = 0x1_0000;
    segments
};
const _: () = assert!(SHADOW_SEGMENTS[12].end().0 == SHADOW.end().0);

/// The four bits that govern a segment: its PAM register, counted from PAM0, and the shift in it.
const fn attribute(segment: usize) -> (usize, u32) {
    match segment {
        12 => (0, 4),
        n => (1 + n / 2, 4 * (n as u32 % 2)),
    }
}

/// The host bridge.
pub struct I440Fx {
    config: Mutex<ConfigSpace>,
    memory: Arc<dyn ShadowControl>,
}

impl I440Fx {
    /// The bridge after reset: all shadow RAM is locked.
    pub fn new(memory: Arc<dyn ShadowControl>) -> Arc<Self> {
        let mut config = ConfigSpace::new(&ID);
        let mut writable = [PAM_WRITABLE; PAM_REGISTERS];
        writable[0] = PAM0_WRITABLE;
        config.set_registers(PAM0, &[0; PAM_REGISTERS], &writable);
        Arc::new(I440Fx {
            config: Mutex::new(config),
            memory,
        })
    }
}

/// The PAM registers, lowest first.
fn pam(config: &ConfigSpace) -> [u8; PAM_REGISTERS] {
    core::array::from_fn(|n| config.read(PAM0 + n as u16, Width::Byte) as u8)
}

impl PciFunction for I440Fx {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        self.config.lock().read(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        // Held over the change, so that of two writes the later one has the last word.
        let mut config = self.config.lock();
        let before = pam(&config);
        config.write(offset, width, value);
        let after = pam(&config);
        if before == after {
            return;
        }
        for (n, segment) in SHADOW_SEGMENTS.into_iter().enumerate() {
            let (register, shift) = attribute(n);
            let writable = |pam: &[u8; PAM_REGISTERS]| pam[register] >> shift & WRITE_ENABLE != 0;
            if writable(&before) != writable(&after) {
                let access = if writable(&after) {
                    Access::ReadWrite
                } else {
                    Access::ReadOnly
                };
                self.memory.set_access(segment, access);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    #[derive(Default)]
    struct View(Mutex<Vec<(u64, u64, Access)>>);

    impl ShadowControl for View {
        fn set_access(&self, range: GuestRange, access: Access) {
            self.0.lock().push((range.start.0, range.bytes, access));
        }
    }

    fn bridge() -> (Arc<View>, Arc<I440Fx>) {
        let view = Arc::new(View::default());
        (view.clone(), I440Fx::new(view))
    }

    #[test]
    fn identity() {
        let (_, bridge) = bridge();
        assert_eq!(bridge.config_read(0, Width::Dword), 0x1237_8086);
        assert_eq!(bridge.config_read(0x2c, Width::Dword), 0x1100_1af4);
        assert_eq!(bridge.config_read(0x0a, Width::Word), 0x0600);
        for register in 0x59..0x60 {
            assert_eq!(bridge.config_read(register, Width::Byte), 0, "locked");
        }
    }

    #[test]
    fn each_register_unlocks_its_segments() {
        let (view, bridge) = bridge();
        bridge.config_write(0x59, Width::Byte, 0x30);
        assert_eq!(
            view.0.lock().split_off(0),
            [(0xf_0000, 0x1_0000, Access::ReadWrite)]
        );
        bridge.config_write(0x5a, Width::Byte, 0x20);
        assert_eq!(
            view.0.lock().split_off(0),
            [(0xc_4000, 0x4000, Access::ReadWrite)]
        );
        bridge.config_write(0x5e, Width::Word, 0x3303);
        assert_eq!(
            view.0.lock().split_off(0),
            [
                (0xe_0000, 0x4000, Access::ReadWrite),
                (0xe_8000, 0x4000, Access::ReadWrite),
                (0xe_c000, 0x4000, Access::ReadWrite),
            ]
        );
        bridge.config_write(0x59, Width::Byte, 0x10);
        assert_eq!(
            view.0.lock().split_off(0),
            [(0xf_0000, 0x1_0000, Access::ReadOnly)]
        );
        bridge.config_write(0x59, Width::Byte, 0xdf);
        assert!(view.0.lock().is_empty(), "only defined bits stay");
        assert_eq!(bridge.config_read(0x59, Width::Byte), 0x10);
    }

    proptest! {
        #[test]
        fn the_last_access_told_is_what_the_registers_say(
            writes in proptest::collection::vec((0u16..0x100, 0usize..3, any::<u32>()), 0..100),
        ) {
            let (view, bridge) = bridge();
            for (offset, width, value) in writes {
                let width = [Width::Byte, Width::Word, Width::Dword][width];
                bridge.config_write(offset & !(width.bytes() as u16 - 1), width, value);
            }
            for (n, segment) in SHADOW_SEGMENTS.into_iter().enumerate() {
                let (register, shift) = attribute(n);
                let bits = bridge.config_read(PAM0 + register as u16, Width::Byte) as u8 >> shift;
                let told = view.0.lock().iter().rev().find(|t| t.0 == segment.start.0).map(|t| t.2);
                let writable = told == Some(Access::ReadWrite);
                prop_assert_eq!(bits & WRITE_ENABLE != 0, writable);
            }
        }
    }
}
