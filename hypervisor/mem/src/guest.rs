//! A VM's RAM: runs of host frames placed in guest-physical space, read and written by copy.
//!
//! Guest memory is hostile and changes at any time, so nobody ever gets a reference into it:
//! callers copy bytes out once and check the copy. Every access is checked against the VM's
//! ranges before a byte moves. The frames belong to the VM (`Owner::VmRam`); on drop they
//! are zeroed and given back.
//!
//! Beside RAM there may be memory that the guest can only read, or only at times: ROM and flash
//! ([`special`]). It comes after RAM in every look-up, so it costs RAM nothing.
//!
//! Not here: nested page tables (`nested`) and devices' memory.

mod special;

use alloc::vec::Vec;
use core::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::addr::{PAGE_SIZE, PAGE_SIZE_1G};
use crate::frames::FrameView;
use crate::nested::{EntryFormat, MemoryType, NestedError, NestedTable, Rights};
pub use special::Access;
use special::Special;

use crate::{Gpa, HostMemory, Hpa, OutOfFrames, Owner};

/// Where a PC's low RAM ends at most: devices' memory lies between 3 GiB and 4 GiB.
pub const LOW_RAM_END: Gpa = Gpa(0xc000_0000);
/// Where RAM goes on above the devices' memory.
pub const HIGH_RAM_START: Gpa = Gpa(1 << 32);

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte.
    pub start: Gpa,
    /// Length in bytes.
    pub bytes: u64,
}

impl GuestRange {
    /// One past the last byte.
    pub const fn end(&self) -> Gpa {
        Gpa(self.start.0 + self.bytes)
    }
}

/// Where a PC has `bytes` bytes of RAM: from 0 up to 3 GiB, the rest from 4 GiB.
pub fn pc_layout(bytes: u64) -> Vec<GuestRange> {
    let low = bytes.min(LOW_RAM_END.0);
    let ranges = [(Gpa(0), low), (HIGH_RAM_START, bytes - low)];
    ranges
        .into_iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(start, bytes)| GuestRange { start, bytes })
        .collect()
}

/// An access that is not wholly within the VM's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotRam {
    /// First address of the access.
    pub gpa: Gpa,
    /// Its length in bytes.
    pub bytes: u64,
}

impl fmt::Display for NotRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes at guest address {} are not all RAM",
            self.bytes, self.gpa
        )
    }
}

/// Why a VM's RAM could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocateError {
    /// A range of the layout is empty, not made of 4 KiB pages, not above its predecessor, or too high.
    Layout(GuestRange),
    /// The host has not that much free memory.
    OutOfFrames(OutOfFrames),
}

impl fmt::Display for AllocateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AllocateError::Layout(range) => write!(
                f,
                "bad range in the memory layout: {:#x} bytes at {}",
                range.bytes, range.start
            ),
            AllocateError::OutOfFrames(e) => {
                write!(f, "not enough free host memory for the VM's RAM: {e}")
            }
        }
    }
}

/// A run of host frames and where the guest sees it.
#[derive(Clone, Copy, Debug)]
struct Region {
    gpa: Gpa,
    bytes: u64,
    hpa: Hpa,
    view: Option<FrameView>,
}

impl Region {
    const fn end(&self) -> u64 {
        self.gpa.0 + self.bytes
    }
}

/// A VM's RAM.
pub struct GuestMemory {
    memory: &'static dyn HostMemory,
    owner: Owner,
    /// Sorted by address, not overlapping.
    regions: Vec<Region>,
    /// Index of the region that was used last: accesses come in runs. Only a hint.
    last: AtomicUsize,
    /// ROM and the like, sorted by address.
    special: Vec<Special>,
}

macro_rules! scalar {
    ($type:ident, $read:ident, $write:ident) => {
        /// Reads a little-endian number; in one access if naturally aligned.
        ///
        /// # Errors
        /// Not all of it is RAM.
        pub fn $read(&self, gpa: Gpa) -> Result<$type, NotRam> {
            let mut bytes = [0; size_of::<$type>()];
            self.read(gpa, &mut bytes)?;
            Ok($type::from_le_bytes(bytes))
        }

        /// Writes a little-endian number; in one access if naturally aligned.
        ///
        /// # Errors
        /// Not all of it is RAM; nothing was written.
        pub fn $write(&self, gpa: Gpa, value: $type) -> Result<(), NotRam> {
            self.write(gpa, &value.to_le_bytes())
        }
    };
}

impl GuestMemory {
    /// Takes zeroed frames for the VM with number `vm` and places them as `layout` says (ascending
    /// ranges of whole pages), in as few and as aligned runs as the host has: a run is at most 1 GiB and
    /// aligned to its size on both sides.
    ///
    /// # Errors
    /// A bad layout, or not enough free memory; nothing is kept then.
    pub fn allocate(
        memory: &'static dyn HostMemory,
        vm: u16,
        layout: &[GuestRange],
    ) -> Result<Self, AllocateError> {
        let mut this = Self {
            memory,
            owner: Owner::VmRam(vm),
            regions: Vec::new(),
            last: AtomicUsize::new(0),
            special: Vec::new(),
        };
        let mut lowest = Gpa(0);
        for range in layout {
            let end = range.start.checked_add(range.bytes);
            let Some(end) = end.filter(|end| {
                range.bytes > 0
                    && range.start >= lowest
                    && range.start.is_aligned(PAGE_SIZE)
                    && end.is_aligned(PAGE_SIZE)
            }) else {
                return Err(AllocateError::Layout(*range));
            };
            lowest = end;
            this.allocate_range(range.start, end)
                .map_err(AllocateError::OutOfFrames)?;
        }
        Ok(this)
    }

    fn allocate_range(&mut self, start: Gpa, end: Gpa) -> Result<(), OutOfFrames> {
        let mut largest = PAGE_SIZE_1G;
        let mut at = start;
        while at < end {
            let left = 1 << (end - at).ilog2();
            let aligned = 1 << at.0.trailing_zeros().min(PAGE_SIZE_1G.ilog2());
            let bytes = largest.min(left).min(aligned);
            match self.memory.allocate(bytes / PAGE_SIZE, bytes, self.owner) {
                Ok(hpa) => {
                    self.regions.push(Region {
                        gpa: at,
                        bytes,
                        hpa,
                        view: self.memory.view(hpa, bytes),
                    });
                    at = at + bytes;
                }
                Err(_) if bytes > PAGE_SIZE => largest = bytes / 2,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.bytes).sum()
    }

    /// Where the guest sees RAM: ascending ranges that don't touch.
    pub fn ranges(&self) -> Vec<GuestRange> {
        let mut ranges: Vec<GuestRange> = Vec::new();
        for region in &self.regions {
            match ranges.last_mut() {
                Some(last) if last.end() == region.gpa => last.bytes += region.bytes,
                _ => ranges.push(GuestRange {
                    start: region.gpa,
                    bytes: region.bytes,
                }),
            }
        }
        ranges
    }

    /// Whether `bytes` bytes from `gpa` on are all RAM. No bytes are RAM anywhere.
    pub fn contains(&self, gpa: Gpa, bytes: u64) -> bool {
        let Some(end) = gpa.checked_add(bytes) else {
            return false;
        };
        let mut at = gpa.0;
        for region in self.regions_from(gpa) {
            if at >= end.0 || region.gpa.0 > at {
                break;
            }
            at = region.end();
        }
        at >= end.0
    }

    /// Whether there is RAM at this address.
    pub fn is_ram(&self, gpa: Gpa) -> bool {
        let end = self.regions.last().map_or(0, Region::end);
        gpa.0 < end && self.within_one(gpa, 1).is_some()
    }

    /// Copies guest memory out: RAM, and special memory that the guest may read.
    ///
    /// # Errors
    /// Not all of it is RAM; `to` is unchanged.
    pub fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), NotRam> {
        self.pieces(gpa, to.len(), Access::ReadOnly, |hpa, range| {
            self.memory.read(hpa, &mut to[range]);
        })
    }

    /// Copies into guest memory: RAM, and special memory that the guest may write.
    ///
    /// # Errors
    /// Not all of it is RAM; nothing was written.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), NotRam> {
        self.pieces(gpa, from.len(), Access::ReadWrite, |hpa, range| {
            self.memory.write(hpa, &from[range]);
        })
    }

    scalar!(u8, read_u8, write_u8);
    scalar!(u16, read_u16, write_u16);
    scalar!(u32, read_u32, write_u32);
    scalar!(u64, read_u64, write_u64);

    /// Reads an aligned 64-bit number in one access: an entry of the guest's page tables.
    ///
    /// # Errors
    /// Not RAM, or not aligned.
    pub fn read_entry(&self, gpa: Gpa) -> Result<u64, NotRam> {
        match self.within_one(gpa, 8) {
            Some(hpa) if gpa.is_aligned(8) => Ok(self.memory.read_u64(hpa)),
            _ => Err(NotRam { gpa, bytes: 8 }),
        }
    }

    /// Replaces a byte of RAM if it is still `old`, in one access: flags in an entry of the guest's page tables.
    /// Returns whether it was; never is where there is no RAM.
    pub fn replace_u8(&self, gpa: Gpa, old: u8, new: u8) -> bool {
        self.within_one(gpa, 1)
            .is_some_and(|hpa| self.memory.replace_u8(hpa, old, new))
    }

    /// The RAM that was reached last, for a few reads of which all but the first are likely to hit it too.
    #[inline]
    pub fn recent(&self) -> Recent<'_> {
        let view = self.regions.get(self.last.load(Ordering::Relaxed));
        Recent {
            memory: self,
            region: view.and_then(|region| Some((region.gpa, region.view?))),
        }
    }

    /// Zeroes all RAM, as after power-up. The guest must not be running.
    pub fn scrub(&self) {
        const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        const PIECE_BYTES: u64 = crate::frames::PIECE_BYTES as u64;
        let special = self.special.iter().map(|s| &s.region);
        for region in self.regions.iter().chain(special) {
            for offset in (0..region.bytes).step_by(ZEROES.len()) {
                self.memory.write(region.hpa + offset, &ZEROES);
                if offset.is_multiple_of(PIECE_BYTES) {
                    self.memory.breathe();
                }
            }
        }
    }

    /// Maps all RAM into nested page tables, for every kind of access, and special memory as it is now.
    ///
    /// # Errors
    /// As [`NestedTable::map`]; earlier regions stay mapped.
    pub fn map_into<F: EntryFormat>(&self, table: &mut NestedTable<F>) -> Result<(), NestedError> {
        self.regions.iter().try_for_each(|r| {
            table.map(r.gpa, r.hpa, r.bytes, Rights::ALL, MemoryType::WriteBack)
        })?;
        let everything = GuestRange {
            start: Gpa(0),
            bytes: u64::MAX,
        };
        self.map_special(table, everything)
    }

    /// Where `bytes` bytes at `gpa` are in host memory, if one region holds them all.
    fn within_one(&self, gpa: Gpa, bytes: u64) -> Option<Hpa> {
        let inside = |region: &Region| {
            let offset = gpa.0.checked_sub(region.gpa.0)?;
            (offset < region.bytes && bytes <= region.bytes - offset).then(|| region.hpa + offset)
        };
        let last = self.regions.get(self.last.load(Ordering::Relaxed));
        if let Some(hpa) = last.and_then(inside) {
            return Some(hpa);
        }
        let at = self.regions.partition_point(|r| r.end() <= gpa.0);
        let hpa = self.regions.get(at).and_then(inside)?;
        self.last.store(at, Ordering::Relaxed);
        Some(hpa)
    }

    /// The regions from the one that holds `gpa` on; none when `gpa` is not RAM.
    fn regions_from(&self, gpa: Gpa) -> &[Region] {
        let at = self.regions.partition_point(|r| r.end() <= gpa.0);
        match self.regions.get(at) {
            Some(first) if first.gpa <= gpa => &self.regions[at..],
            _ => &[],
        }
    }

    /// Calls `copy` for each contiguous piece of host memory behind the range, with its part of the buffer.
    fn pieces(
        &self,
        gpa: Gpa,
        bytes: usize,
        wanted: Access,
        mut copy: impl FnMut(Hpa, core::ops::Range<usize>),
    ) -> Result<(), NotRam> {
        if let Some(hpa) = self.within_one(gpa, bytes as u64) {
            copy(hpa, 0..bytes);
            return Ok(());
        }
        if !self.contains(gpa, bytes as u64) {
            return self.special_pieces(gpa, bytes, wanted, copy);
        }
        let mut done = 0;
        for region in self.regions_from(gpa) {
            if done == bytes {
                break;
            }
            let offset = gpa.0 + done as u64 - region.gpa.0;
            let piece = ((bytes - done) as u64).min(region.bytes - offset) as usize;
            copy(region.hpa + offset, done..done + piece);
            done += piece;
        }
        Ok(())
    }
}

/// A short way into a VM's RAM; see [`GuestMemory::recent`].
#[derive(Clone, Copy)]
pub struct Recent<'a> {
    memory: &'a GuestMemory,
    region: Option<(Gpa, FrameView)>,
}

impl Recent<'_> {
    /// As [`GuestMemory::read_entry`].
    ///
    /// # Errors
    /// Not RAM, or not aligned.
    #[inline]
    pub fn read_entry(&self, gpa: Gpa) -> Result<u64, NotRam> {
        let near = self
            .region
            .and_then(|(start, view)| view.read_u64(gpa.0.wrapping_sub(start.0)));
        match near {
            Some(entry) => Ok(entry),
            None => self.memory.read_entry(gpa),
        }
    }

    /// Copies 16 bytes out.
    ///
    /// # Errors
    /// Not all of it is RAM.
    #[inline]
    pub fn read_16(&self, gpa: Gpa) -> Result<[u8; 16], NotRam> {
        let near = self
            .region
            .and_then(|(start, view)| view.read_16(gpa.0.wrapping_sub(start.0)));
        match near {
            Some(bytes) => Ok(bytes),
            None => {
                let mut bytes = [0; 16];
                self.memory.read(gpa, &mut bytes).map(|()| bytes)
            }
        }
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("owner", &self.owner)
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        self.scrub();
        let special = self.special.iter().map(|s| &s.region);
        for region in self.regions.iter().chain(special) {
            self.memory
                .free(region.hpa, region.bytes / PAGE_SIZE, self.owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSize;
    use crate::addr::PAGE_SIZE_2M;
    use crate::fake::FakeMemory;
    use crate::nested::Npt;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn host(bytes: u64) -> &'static FakeMemory {
        Box::leak(Box::new(FakeMemory::new(bytes)))
    }

    fn range(start: u64, bytes: u64) -> GuestRange {
        GuestRange {
            start: Gpa(start),
            bytes,
        }
    }

    #[test]
    fn a_pc_has_a_hole_below_4_gib() {
        assert_eq!(pc_layout(0), []);
        assert_eq!(pc_layout(256 * MIB), [range(0, 256 * MIB)]);
        assert_eq!(pc_layout(3 << 30), [range(0, 3 << 30)]);
        assert_eq!(
            pc_layout((3 << 30) + 4096),
            [range(0, 3 << 30), range(4 << 30, 4096)]
        );
    }

    #[test]
    fn ram_comes_in_few_aligned_runs() {
        let host = host(16 * MIB);
        let memory = GuestMemory::allocate(host, 1, &pc_layout(7 * MIB)).unwrap();
        let sizes: Vec<_> = memory.regions.iter().map(|r| r.bytes / MIB).collect();
        assert_eq!(sizes, [4, 2, 1]);
        assert_eq!(memory.ranges(), [range(0, 7 * MIB)]);
        assert_eq!(
            (memory.ram_bytes(), host.used(Owner::VmRam(1))),
            (7 * MIB, 1792)
        );
        let mut table = NestedTable::new(Npt::default(), host, Owner::VmTables(1)).unwrap();
        memory.map_into(&mut table).unwrap();
        let size = |gpa| table.translate(Gpa(gpa)).map(|t| t.2);
        assert_eq!(size(0), Some(PageSize::Size2M));
        assert_eq!(size(6 * MIB), Some(PageSize::Size4K));
        assert_eq!(size(7 * MIB), None);
    }

    #[test]
    fn fragmented_hosts_give_smaller_runs() {
        let host = host(8 * MIB);
        // One frame taken in the middle leaves no aligned 8 MiB and no 4 MiB at the top.
        let first = host.allocate(1024, 4 * MIB, Owner::Host).unwrap();
        host.allocate(1, PAGE_SIZE, Owner::Host).unwrap();
        host.free(first, 1024, Owner::Host);
        let memory = GuestMemory::allocate(host, 1, &pc_layout(6 * MIB)).unwrap();
        let sizes: Vec<_> = memory.regions.iter().map(|r| r.bytes / MIB).collect();
        assert_eq!(sizes, [4, 2]);
        drop(memory);
        assert!(matches!(
            GuestMemory::allocate(host, 1, &pc_layout(8 * MIB)),
            Err(AllocateError::OutOfFrames(_))
        ));
        assert_eq!(host.used(Owner::VmRam(1)), 0);
    }

    #[test]
    fn bad_layouts_are_refused() {
        let host = host(MIB);
        let bad = [
            vec![range(0, 0)],
            vec![range(0, 100)],
            vec![range(1, PAGE_SIZE)],
            vec![range(0, 2 * PAGE_SIZE), range(PAGE_SIZE, PAGE_SIZE)],
            vec![range(PAGE_SIZE, PAGE_SIZE), range(0, PAGE_SIZE)],
            vec![range(!4095, 2 * PAGE_SIZE)],
        ];
        for layout in bad {
            assert!(matches!(
                GuestMemory::allocate(host, 1, &layout),
                Err(AllocateError::Layout(_))
            ));
        }
    }

    #[test]
    fn ram_is_scrubbed_before_it_goes_back() {
        // The fake machine refuses a guest's frames that are not all zero.
        let host = host(MIB);
        let memory = GuestMemory::allocate(host, 1, &[range(0, 5 * PAGE_SIZE)]).unwrap();
        memory.write(Gpa(0), &[7; 5 * PAGE_SIZE as usize]).unwrap();
        drop(memory);
        assert_eq!(host.free_frames(), MIB / PAGE_SIZE);
    }

    proptest! {
        /// Two ranges with a hole, each of several runs: reads and writes anywhere agree with an array.
        #[test]
        fn accesses_follow_the_model(
            accesses in prop::collection::vec((0..12u64, 0..3usize, 0..9000usize, any::<u8>()), 1..40),
        ) {
            let host = host(4 * PAGE_SIZE_2M);
            let layout = [range(0, 3 * PAGE_SIZE), range(5 * PAGE_SIZE, 5 * PAGE_SIZE)];
            let memory = GuestMemory::allocate(host, 1, &layout).unwrap();
            let mut model = vec![0u8; 14 * PAGE_SIZE as usize];
            let is_ram = |at: u64| layout.iter().any(|r| at >= r.start.0 && at < r.end().0);
            for (page, before, len, value) in accesses {
                let at = (page * PAGE_SIZE).saturating_sub(before as u64);
                let ram = (at..at + len as u64).all(is_ram);
                prop_assert_eq!(memory.contains(Gpa(at), len as u64), ram);
                let data: Vec<u8> = (0..len).map(|i| value.wrapping_add(i as u8)).collect();
                let written = memory.write(Gpa(at), &data);
                prop_assert_eq!(written.is_ok(), ram);
                if ram {
                    model[at as usize..at as usize + len].copy_from_slice(&data);
                }
                for r in layout {
                    let mut all = vec![0; r.bytes as usize];
                    memory.read(r.start, &mut all).unwrap();
                    prop_assert_eq!(&all[..], &model[r.start.0 as usize..r.end().0 as usize]);
                }
                let mut word = [0; 8];
                word.copy_from_slice(&model[at as usize..at as usize + 8]);
                let expected = (at..at + 8).all(is_ram).then(|| u64::from_le_bytes(word));
                prop_assert_eq!(memory.read_u64(Gpa(at)).ok(), expected);
            }
            prop_assert_eq!(
                memory.read_u32(Gpa(u64::MAX)),
                Err(NotRam { gpa: Gpa(u64::MAX), bytes: 4 })
            );
        }
    }
}
