//! The host bridge of the 440FX, with the registers that make shadowed ROM writable.
//!
//! The programmable attribute map (82441FX data sheet, section 3.2.18, PAM0 to PAM6) says for
//! each of 13 segments from 0xC0000 to 0xFFFFF whether reads and writes go to RAM or to the
//! bus, where the ROM is: each apart from the other.

use alloc::sync::Arc;

use mem::{Gpa, GuestRange, Width};
use spin::Mutex;

use super::{SUBSYSTEM, SUBSYSTEM_VENDOR, ShadowAccess, ShadowControl};
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
    /// The bridge after reset: the ROM is read, and writes go nowhere.
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
        for segment in 0..SHADOW_SEGMENTS.len() {
            let access = access(&after, segment);
            if access != self::access(&before, segment) {
                self.memory.set_access(segment, access);
            }
        }
    }
}

/// What the PAM registers say of a segment.
fn access(pam: &[u8; PAM_REGISTERS], segment: usize) -> ShadowAccess {
    let (register, shift) = attribute(segment);
    ShadowAccess::from_bits_truncate(pam[register] >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    #[derive(Default)]
    struct View(Mutex<Vec<(usize, ShadowAccess)>>);

    impl ShadowControl for View {
        fn set_access(&self, number: usize, access: ShadowAccess) {
            self.0.lock().push((number, access));
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
    fn each_register_governs_its_segments() {
        const READ: ShadowAccess = ShadowAccess::READ;
        const WRITE: ShadowAccess = ShadowAccess::WRITE;
        let both = READ | WRITE;
        let (view, bridge) = bridge();
        let told = |offset, width, value| {
            bridge.config_write(offset, width, value);
            view.0.lock().split_off(0)
        };
        assert_eq!(told(0x59, Width::Byte, 0x30), [(12, both)]);
        assert_eq!(told(0x5a, Width::Byte, 0x20), [(1, WRITE)]);
        assert_eq!(told(0x5a, Width::Byte, 0x12), [(0, WRITE), (1, READ)]);
        assert_eq!(
            told(0x5e, Width::Word, 0x3303),
            [(8, both), (10, both), (11, both)]
        );
        assert_eq!(told(0x59, Width::Byte, 0x10), [(12, READ)]);
        assert_eq!(told(0x59, Width::Byte, 0xdf), [], "only defined bits stay");
        assert_eq!(bridge.config_read(0x59, Width::Byte), 0x10);
        assert_eq!(SHADOW_SEGMENTS[12].start, Gpa(0xf_0000));
        assert_eq!(SHADOW_SEGMENTS[8].start, Gpa(0xe_0000));
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
            for n in 0..SHADOW_SEGMENTS.len() {
                let (register, shift) = attribute(n);
                let bits = bridge.config_read(PAM0 + register as u16, Width::Byte) as u8 >> shift;
                let told = view.0.lock().iter().rev().find(|told| told.0 == n).map(|told| told.1);
                let told = told.unwrap_or(ShadowAccess::empty());
                prop_assert_eq!(bits & 3, told.bits());
            }
        }
    }
}
