//! Guest memory that is not plain RAM: ROM, shadowed ROM, flash.
//!
//! It has frames like RAM, but what the guest may do with it directly is a property of the
//! moment: a chip set register locks shadowed ROM, a command takes flash out of its array
//! mode. What the guest may not do exits, and is answered by the device behind it.
//!
//! Invariants: stretches are made before the guest runs, don't overlap each other or RAM, and
//! stay where they are; only [`Access`] changes. A change here is not yet one of the nested
//! page tables: [`GuestMemory::map_special`] brings it there.

use core::sync::atomic::{AtomicU8, Ordering};

use super::{AllocateError, GuestMemory, GuestRange, Region};
use crate::addr::PAGE_SIZE;
use crate::nested::{EntryFormat, MemoryType, NestedError, NestedTable, Rights};
use crate::{Gpa, Hpa};

/// What a guest may do with special memory without an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// Nothing: a device answers reads and writes.
    Device = 0,
    /// Read and execute; writes exit.
    ReadOnly = 1,
    /// All, as RAM.
    ReadWrite = 2,
}

impl Access {
    fn rights(self) -> Option<Rights> {
        match self {
            Access::Device => None,
            Access::ReadOnly => Some(Rights::READ_EXECUTE),
            Access::ReadWrite => Some(Rights::ALL),
        }
    }

    fn allows(self, wanted: Access) -> bool {
        self as u8 >= wanted as u8
    }
}

/// A run of frames and what the guest may do with it now.
#[derive(Debug)]
pub(super) struct Special {
    pub(super) region: Region,
    access: AtomicU8,
}

impl Special {
    fn access(&self) -> Access {
        match self.access.load(Ordering::Acquire) {
            2 => Access::ReadWrite,
            1 => Access::ReadOnly,
            _ => Access::Device,
        }
    }

    fn lies_in(&self, range: GuestRange) -> bool {
        self.region.gpa >= range.start && self.region.end() <= range.end().0
    }
}

impl GuestMemory {
    /// Takes zeroed frames for `range` (whole pages, no RAM in it) and places them there. What the guest may do
    /// with them can later be changed for the range as a whole, or for ranges made of several such.
    ///
    /// # Errors
    /// A range that is bad or taken, or not enough free memory; nothing is kept then.
    pub fn add_special(&mut self, range: GuestRange, access: Access) -> Result<(), AllocateError> {
        let end = range.start.checked_add(range.bytes);
        let overlaps = |region: &Region| region.gpa < range.end() && region.end() > range.start.0;
        let Some(end) = end.filter(|end| {
            range.bytes > 0
                && range.start.is_aligned(PAGE_SIZE)
                && end.is_aligned(PAGE_SIZE)
                && !self.regions.iter().any(overlaps)
                && !self.special.iter().any(|s| overlaps(&s.region))
        }) else {
            return Err(AllocateError::Layout(range));
        };
        let before = self.regions.len();
        let made = self.allocate_range(range.start, end);
        let pieces = self.regions.split_off(before);
        if let Err(error) = made {
            for piece in pieces {
                self.memory
                    .free(piece.hpa, piece.bytes / PAGE_SIZE, self.owner);
            }
            return Err(AllocateError::OutOfFrames(error));
        }
        self.special
            .extend(pieces.into_iter().map(|region| Special {
                region,
                access: AtomicU8::new(access as u8),
            }));
        self.special.sort_by_key(|s| s.region.gpa);
        Ok(())
    }

    /// What the guest may do at `gpa`, if that is special memory.
    pub fn special_access(&self, gpa: Gpa) -> Option<Access> {
        self.special_at(gpa).map(Special::access)
    }

    /// Whether the guest may write all of these bytes: RAM, or special memory that is writable now.
    pub fn is_writable(&self, gpa: Gpa, bytes: u64) -> bool {
        self.contains(gpa, bytes)
            || usize::try_from(bytes).is_ok_and(|bytes| {
                self.special_pieces(gpa, bytes, Access::ReadWrite, |_, _| {})
                    .is_ok()
            })
    }

    /// Changes what the guest may do with the special memory that lies wholly in `range`. The guest meets
    /// it after [`Self::map_special`].
    pub fn set_special_access(&self, range: GuestRange, access: Access) {
        for special in self.special.iter().filter(|s| s.lies_in(range)) {
            special.access.store(access as u8, Ordering::Release);
        }
    }

    /// Brings the nested page tables up to date with [`Self::set_special_access`] for the special memory in
    /// `range`. The caller flushes cached translations.
    ///
    /// # Errors
    /// As [`NestedTable::map`] and [`NestedTable::unmap`].
    pub fn map_special<F: EntryFormat>(
        &self,
        table: &mut NestedTable<F>,
        range: GuestRange,
    ) -> Result<(), NestedError> {
        for special in self.special.iter().filter(|s| s.lies_in(range)) {
            let Region {
                gpa, bytes, hpa, ..
            } = special.region;
            table.unmap(gpa, bytes)?;
            if let Some(rights) = special.access().rights() {
                table.map(gpa, hpa, bytes, rights, MemoryType::WriteBack)?;
            }
        }
        Ok(())
    }

    /// Copies special memory out, whatever the guest may do with it: the host's own view.
    ///
    /// # Errors
    /// Not all of it is special memory; `to` may have changed.
    pub fn read_special(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), super::NotRam> {
        self.special_pieces(gpa, to.len(), Access::Device, |hpa, range| {
            self.memory.read(hpa, &mut to[range]);
        })
    }

    /// Copies into special memory, whatever the guest may do with it: the host's own view.
    ///
    /// # Errors
    /// Not all of it is special memory; a part may have been written.
    pub fn write_special(&self, gpa: Gpa, from: &[u8]) -> Result<(), super::NotRam> {
        self.special_pieces(gpa, from.len(), Access::Device, |hpa, range| {
            self.memory.write(hpa, &from[range]);
        })
    }

    fn special_at(&self, gpa: Gpa) -> Option<&Special> {
        let at = self.special.partition_point(|s| s.region.end() <= gpa.0);
        self.special.get(at).filter(|s| s.region.gpa <= gpa)
    }

    /// Calls `copy` for each piece of the range, all of which is memory that allows `wanted`: RAM or special.
    #[cold]
    pub(super) fn special_pieces(
        &self,
        gpa: Gpa,
        bytes: usize,
        wanted: Access,
        mut copy: impl FnMut(Hpa, core::ops::Range<usize>),
    ) -> Result<(), super::NotRam> {
        let refused = super::NotRam {
            gpa,
            bytes: bytes as u64,
        };
        let piece_at = |done: usize| {
            let at = gpa.checked_add(done as u64)?;
            let region = match self.special_at(at) {
                Some(special) => special.access().allows(wanted).then_some(special.region)?,
                None => *self.regions_from(at).first()?,
            };
            let offset = at.0 - region.gpa.0;
            let length = (region.bytes - offset).min((bytes - done) as u64) as usize;
            Some((region.hpa + offset, length))
        };
        // All of it is checked before anything is copied.
        let mut done = 0;
        while done < bytes {
            done += piece_at(done).ok_or(refused)?.1;
        }
        done = 0;
        while done < bytes {
            let (hpa, length) = piece_at(done).ok_or(refused)?;
            copy(hpa, done..done + length);
            done += length;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Owner;
    use crate::fake::FakeMemory;
    use crate::guest::pc_layout;
    use crate::nested::Npt;

    const SHADOW: GuestRange = GuestRange {
        start: Gpa(0xc_0000),
        bytes: 0x4000,
    };
    const NEXT: GuestRange = GuestRange {
        start: Gpa(0xc_4000),
        bytes: 0x4000,
    };

    fn memory() -> (&'static FakeMemory, GuestMemory) {
        let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(4 << 20)));
        let mut memory = GuestMemory::allocate(host, 1, &pc_layout(0xa_0000)).unwrap();
        memory.add_special(SHADOW, Access::ReadOnly).unwrap();
        memory.add_special(NEXT, Access::ReadWrite).unwrap();
        (host, memory)
    }

    #[test]
    fn access_decides_who_may_write_and_read() {
        let (_, memory) = memory();
        let mut byte = [0xaa];
        assert_eq!(memory.read(Gpa(0xc_0000), &mut byte), Ok(()));
        assert_eq!(byte, [0]);
        assert!(memory.write(Gpa(0xc_0000), &[1]).is_err(), "read-only");
        assert_eq!(memory.write(Gpa(0xc_4000), &[1]), Ok(()));
        assert!(memory.is_writable(Gpa(0xc_4000), 0x4000) && memory.is_writable(Gpa(0), 0x1000));
        assert!(
            !memory.is_writable(Gpa(0xc_3fff), 2) && !memory.is_writable(Gpa(0xc_4000), 0x4001)
        );
        assert!(
            memory.write(Gpa(0xc_3fff), &[1, 2]).is_err(),
            "half of it is read-only"
        );
        assert_eq!(memory.read_u8(Gpa(0xc_4000)), Ok(1), "nothing was written");
        memory.set_special_access(SHADOW, Access::ReadWrite);
        assert_eq!(memory.write(Gpa(0xc_3fff), &[3, 4]), Ok(()));
        assert_eq!(memory.read_u16(Gpa(0xc_3fff)), Ok(0x0403));
        memory.set_special_access(SHADOW, Access::Device);
        assert!(memory.read_u8(Gpa(0xc_3fff)).is_err());
        assert_eq!(memory.special_access(Gpa(0xc_3fff)), Some(Access::Device));
        assert_eq!(memory.special_access(Gpa(0x9_ffff)), None);
        let mut both = [0; 2];
        memory.read_special(Gpa(0xc_3fff), &mut both).unwrap();
        assert_eq!(both, [3, 4], "the host sees it all the same");
        assert!(memory.read_u8(Gpa(0xc_8000)).is_err(), "nothing there");
        assert!(
            !memory.is_ram(Gpa(0xc_4000)),
            "RAM is what lies in the layout"
        );
    }

    #[test]
    fn nested_tables_follow() {
        let (host, memory) = memory();
        let mut table = NestedTable::new(Npt::default(), host, Owner::VmTables(1)).unwrap();
        memory.map_into(&mut table).unwrap();
        let rights = |table: &NestedTable<Npt>, at| table.translate(Gpa(at)).map(|t| t.1);
        assert_eq!(rights(&table, 0xc_0000), Some(Rights::READ_EXECUTE));
        assert_eq!(rights(&table, 0xc_4000), Some(Rights::ALL));
        for (access, expected) in [
            (Access::ReadWrite, Some(Rights::ALL)),
            (Access::Device, None),
            (Access::ReadOnly, Some(Rights::READ_EXECUTE)),
        ] {
            memory.set_special_access(SHADOW, access);
            memory.map_special(&mut table, SHADOW).unwrap();
            assert_eq!(rights(&table, 0xc_3fff), expected);
            assert_eq!(rights(&table, 0xc_4000), Some(Rights::ALL), "its neighbour");
        }
    }

    #[test]
    fn overlaps_are_refused_and_frames_come_back() {
        let (host, mut memory) = memory();
        let ram = GuestRange {
            start: Gpa(0x9_f000),
            bytes: 0x2000,
        };
        for range in [
            ram,
            SHADOW,
            GuestRange {
                bytes: 0x800,
                ..ram
            },
        ] {
            assert_eq!(
                memory.add_special(range, Access::ReadOnly),
                Err(AllocateError::Layout(range))
            );
        }
        let huge = GuestRange {
            start: Gpa(1 << 32),
            bytes: 1 << 30,
        };
        let used = host.used(Owner::VmRam(1));
        assert!(memory.add_special(huge, Access::ReadOnly).is_err());
        assert_eq!(host.used(Owner::VmRam(1)), used);
        memory.write_special(Gpa(0xc_0000), &[7]).unwrap();
        drop(memory);
        assert_eq!(host.used(Owner::VmRam(1)), 0);
    }
}
