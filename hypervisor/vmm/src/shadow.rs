//! Shadow RAM: the RAM behind the ROM from 0xC0000 to 0xFFFFF, and which of the two the guest meets.
//!
//! For each segment the host bridge says apart whether reads, and whether writes, go to RAM. The
//! segment's frames hold what the guest reads: its RAM, or a copy of the ROM (the image's last 128 KiB below 1 MiB,
//! all-ones below those). The RAM of a segment whose reads go to the ROM is kept here meanwhile; the
//! guest's writes to it exit, and reach it by [`MmioDevice`].
//!
//! Cost: a segment that changes from RAM to ROM or back is copied, 64 KiB at most.

use alloc::{boxed::Box, sync::Arc};

use devices::{
    bus::{IoError, MmioDevice},
    chipset::{SHADOW, SHADOW_SEGMENTS, ShadowAccess, ShadowControl},
};
use mem::{Gpa, GuestMemory, GuestRange, Width, guest::Access};
use spin::Mutex;

use crate::firmware::{ROM_ALIAS, ROM_TOP, SpecialMemory};

/// Bytes copied at a time.
const PIECE: usize = 0x1000;

/// What of a segment is not in its frames.
struct Hidden {
    access: [ShadowAccess; SHADOW_SEGMENTS.len()],
    /// The RAM of all segments, in the order of their addresses; of use where reads go to the ROM.
    ram: Box<[u8]>,
}

/// A VM's shadow RAM.
pub(crate) struct Shadow {
    special: Arc<SpecialMemory>,
    hidden: Mutex<Hidden>,
}

/// Where an address is in [`Hidden::ram`].
fn offset(at: Gpa) -> usize {
    (at.0 - SHADOW.start.0) as usize
}

/// Puts what the ROM has at the addresses of `segment` into its frames.
fn show_rom(memory: &GuestMemory, segment: GuestRange) {
    let mut piece = [0; PIECE];
    for at in (segment.start.0..segment.end().0).step_by(PIECE) {
        // Where the image shows below 1 MiB.
        let source = (ROM_TOP - SHADOW.end().0) + at;
        if source < ROM_TOP - ROM_ALIAS || memory.read_special(Gpa(source), &mut piece).is_err() {
            piece.fill(0xff);
        }
        let written = memory.write_special(Gpa(at), &piece);
        debug_assert!(written.is_ok(), "a segment is special memory");
    }
}

impl Shadow {
    /// Shadow RAM after reset: reads go to the ROM, which is in its place in `special`; writes go nowhere.
    pub(crate) fn new(special: Arc<SpecialMemory>) -> Arc<Self> {
        for segment in SHADOW_SEGMENTS {
            show_rom(special.memory(), segment);
        }
        Arc::new(Shadow {
            special,
            hidden: Mutex::new(Hidden {
                access: [ShadowAccess::empty(); SHADOW_SEGMENTS.len()],
                ram: alloc::vec![0; SHADOW.bytes as usize].into(),
            }),
        })
    }
}

impl ShadowControl for Shadow {
    fn set_access(&self, number: usize, access: ShadowAccess) {
        let mut hidden = self.hidden.lock();
        let Hidden { access: all, ram } = &mut *hidden;
        let (Some(current), Some(&segment)) = (all.get_mut(number), SHADOW_SEGMENTS.get(number))
        else {
            return;
        };
        let before = core::mem::replace(current, access);
        let is_plain = |access: ShadowAccess| access == ShadowAccess::all();
        if is_plain(before) && !is_plain(access) {
            self.special.set_access(segment, Access::ReadOnly);
        }
        let memory = self.special.memory();
        let place = offset(segment.start)..offset(segment.end());
        let reads_ram = |access: ShadowAccess| access.contains(ShadowAccess::READ);
        if let Some(ram) = ram.get_mut(place)
            && reads_ram(before) != reads_ram(access)
        {
            let moved = match reads_ram(access) {
                true => memory.write_special(segment.start, ram),
                false => memory.read_special(segment.start, ram),
            };
            debug_assert!(moved.is_ok(), "a segment is special memory");
            if !reads_ram(access) {
                show_rom(memory, segment);
            }
        }
        if is_plain(access) && !is_plain(before) {
            self.special.set_access(segment, Access::ReadWrite);
        }
    }
}

/// Writes that the frames do not take.
impl MmioDevice for Shadow {
    fn read(&self, _offset: u64, _width: Width) -> Result<u64, IoError> {
        // Reads are the frames' business.
        Err(IoError::InvalidRegister)
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), IoError> {
        let mut hidden = self.hidden.lock();
        let Hidden { access, ram } = &mut *hidden;
        for (at, byte) in (SHADOW.start.0 + offset..).zip(&value.to_le_bytes()[..width.bytes()]) {
            let segment = SHADOW_SEGMENTS.iter().position(|s| Gpa(at) < s.end());
            let access = segment.and_then(|n| access.get(n).copied());
            if access == Some(ShadowAccess::WRITE)
                && let Some(place) = ram.get_mut(self::offset(Gpa(at)))
            {
                *place = *byte;
            }
        }
        Ok(())
    }
}
