//! Nested page tables: one walker, generic over the entry format (EPT or NPT).
//!
//! [`NestedTable`] translates a VM's guest-physical addresses to host-physical ones. It is
//! four levels deep (48 bits), takes its tables from a [`HostMemory`] and gives them all back
//! when dropped. The vendors differ only in how an entry is encoded: [`Ept`] and [`Npt`].
//!
//! Invariants:
//! - An operation that fails leaves every translation as it was.
//! - A table that `unmap` empties stays linked, since processors may still hold it in their
//!   paging-structure caches; [`NestedTable::reclaim`] frees such tables after a flush.
//! - A 64-bit entry changes in one access, so a processor that walks at the same time sees
//!   the old or the new entry.
//!
//! Not done here: flushing cached translations (`Backend::flush_nested`), and locking.

use bitflags::bitflags;
use core::fmt;

use crate::addr::{PAGE_SIZE, PAGE_SIZE_1G, PAGE_SIZE_2M};
use crate::{Gpa, HostMemory, Hpa, OutOfFrames, Owner};

/// Size of a nested mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PageSize {
    /// 4 KiB, level 1.
    Size4K,
    /// 2 MiB, level 2.
    Size2M,
    /// 1 GiB, level 3.
    Size1G,
}

impl PageSize {
    /// Bytes in a page of this size.
    pub const fn bytes(self) -> u64 {
        match self {
            PageSize::Size4K => PAGE_SIZE,
            PageSize::Size2M => PAGE_SIZE_2M,
            PageSize::Size1G => PAGE_SIZE_1G,
        }
    }

    /// Size of a leaf in a table of `level`, where there are leaves.
    const fn of_level(level: u8) -> Option<Self> {
        match level {
            1 => Some(PageSize::Size4K),
            2 => Some(PageSize::Size2M),
            3 => Some(PageSize::Size1G),
            _ => None,
        }
    }
}

/// What a guest may do to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Loads.
    pub read: bool,
    /// Stores.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
}

impl Rights {
    /// Loads, stores and fetches: RAM.
    pub const ALL: Rights = Rights {
        read: true,
        write: true,
        execute: true,
    };
    /// Loads and fetches: ROM.
    pub const READ_EXECUTE: Rights = Rights {
        read: true,
        write: false,
        execute: true,
    };
    /// Loads only.
    pub const READ: Rights = Rights {
        read: true,
        write: false,
        execute: false,
    };
    /// Loads and stores.
    pub const READ_WRITE: Rights = Rights {
        read: true,
        write: true,
        execute: false,
    };
}

/// Memory type of a nested mapping, combined by the processor with the guest's PAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryType {
    /// Write-back: RAM.
    WriteBack,
    /// Uncacheable: device memory that is passed through.
    Uncacheable,
}

/// How one vendor encodes nested page-table entries. The value carries what the processor supports.
pub trait EntryFormat: Copy + Send + Sync + 'static {
    /// Whether the processor has leaves of this size.
    fn supports(&self, size: PageSize) -> bool;
    /// Whether a leaf can carry these rights. No rights at all can't be: such a page is unmapped.
    fn can_express(&self, rights: Rights) -> bool;
    /// Entry that points to the next lower table.
    fn table(&self, next: Hpa) -> u64;
    /// Leaf entry.
    fn leaf(&self, page: Hpa, size: PageSize, rights: Rights, memory_type: MemoryType) -> u64;
    /// Whether the entry maps or points to anything.
    fn is_present(&self, entry: u64) -> bool;
    /// Whether the entry, found in a table of `level` (1 to 4), is a leaf.
    fn is_leaf(&self, entry: u64, level: u8) -> bool;
    /// The physical address in the entry: next table, or page.
    fn address(&self, entry: u64) -> Hpa;
    /// Rights of a leaf.
    fn rights(&self, entry: u64) -> Rights;
    /// Memory type of a leaf.
    fn memory_type(&self, entry: u64) -> MemoryType;
}

/// Bits 51:12 of an entry of either vendor.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

bitflags! {
    /// Bits of an EPT entry (SDM vol. 3C, section 29.3.2, tables 29-1 to 29-7).
    #[derive(Clone, Copy)]
    struct EptBits: u64 {
        const READ = 1 << 0;
        const WRITE = 1 << 1;
        const EXECUTE = 1 << 2;
        /// Memory type field, bits 5:3, in a leaf: 6 is write-back, 0 uncacheable.
        const WRITE_BACK = 6 << 3;
        /// The guest's PAT has no say in the memory type.
        const IGNORE_PAT = 1 << 6;
        /// Leaf, in a table of level 2 or 3.
        const LARGE = 1 << 7;
        const ANY_RIGHT = Self::READ.bits() | Self::WRITE.bits() | Self::EXECUTE.bits();
        const MEMORY_TYPE = 7 << 3;
    }
}

/// EPT entries (SDM vol. 3C, section 29.3). What the processor has is in IA32_VMX_EPT_VPID_CAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ept {
    /// 2 MiB leaves (capability bit 16).
    pub pages_2m: bool,
    /// 1 GiB leaves (capability bit 17).
    pub pages_1g: bool,
    /// Leaves that can be fetched from but not read (capability bit 0).
    pub execute_only: bool,
    /// Accessed and dirty flags, to be turned on in the EPT pointer (capability bit 21).
    pub accessed_dirty: bool,
}

impl Ept {
    /// The EPT pointer for the VMCS: write-back tables, four levels, accessed and dirty flags
    /// where the processor has them (SDM vol. 3C, table 25-9).
    pub const fn pointer(&self, root: Hpa) -> u64 {
        const WRITE_BACK: u64 = 6;
        const WALK_LENGTH_4: u64 = 3 << 3;
        root.0 | WRITE_BACK | WALK_LENGTH_4 | ((self.accessed_dirty as u64) << 6)
    }
}

impl EntryFormat for Ept {
    fn supports(&self, size: PageSize) -> bool {
        match size {
            PageSize::Size4K => true,
            PageSize::Size2M => self.pages_2m,
            PageSize::Size1G => self.pages_1g,
        }
    }

    fn can_express(&self, rights: Rights) -> bool {
        // Write without read is a misconfiguration on every processor (SDM vol. 3C, 29.3.3.1).
        rights.read || (rights.execute && !rights.write && self.execute_only)
    }

    fn table(&self, next: Hpa) -> u64 {
        next.0 | EptBits::ANY_RIGHT.bits()
    }

    fn leaf(&self, page: Hpa, size: PageSize, rights: Rights, memory_type: MemoryType) -> u64 {
        let mut bits = EptBits::empty();
        bits.set(EptBits::READ, rights.read);
        bits.set(EptBits::WRITE, rights.write);
        bits.set(EptBits::EXECUTE, rights.execute);
        bits.set(EptBits::LARGE, size != PageSize::Size4K);
        match memory_type {
            MemoryType::WriteBack => bits |= EptBits::WRITE_BACK,
            // The guest must not make device memory cacheable by its PAT.
            MemoryType::Uncacheable => bits |= EptBits::IGNORE_PAT,
        }
        page.0 | bits.bits()
    }

    fn is_present(&self, entry: u64) -> bool {
        entry & EptBits::ANY_RIGHT.bits() != 0
    }

    fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || (level < 4 && entry & EptBits::LARGE.bits() != 0)
    }

    fn address(&self, entry: u64) -> Hpa {
        Hpa(entry & ADDRESS_MASK)
    }

    fn rights(&self, entry: u64) -> Rights {
        let bits = EptBits::from_bits_truncate(entry);
        Rights {
            read: bits.contains(EptBits::READ),
            write: bits.contains(EptBits::WRITE),
            execute: bits.contains(EptBits::EXECUTE),
        }
    }

    fn memory_type(&self, entry: u64) -> MemoryType {
        if entry & EptBits::MEMORY_TYPE.bits() == EptBits::WRITE_BACK.bits() {
            MemoryType::WriteBack
        } else {
            MemoryType::Uncacheable
        }
    }
}

bitflags! {
    /// Bits of a nested page-table entry, the same as in ordinary long-mode tables
    /// (APM vol. 2, sections 5.3.3 and 15.25.5).
    #[derive(Clone, Copy)]
    struct NptBits: u64 {
        const PRESENT = 1 << 0;
        const WRITE = 1 << 1;
        /// Every guest access counts as a user access in the nested walk (15.25.5).
        const USER = 1 << 2;
        const WRITE_THROUGH = 1 << 3;
        const CACHE_DISABLE = 1 << 4;
        /// Leaf, in a table of level 2 or 3.
        const LARGE = 1 << 7;
        const NO_EXECUTE = 1 << 63;
    }
}

/// NPT entries (APM vol. 2, section 15.25). NX must be on in the host's EFER.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Npt {
    /// 1 GiB leaves (CPUID Fn8000_0001 EDX bit 26, Page1GB). 2 MiB leaves are always there.
    pub pages_1g: bool,
}

impl EntryFormat for Npt {
    fn supports(&self, size: PageSize) -> bool {
        match size {
            PageSize::Size4K | PageSize::Size2M => true,
            PageSize::Size1G => self.pages_1g,
        }
    }

    fn can_express(&self, rights: Rights) -> bool {
        rights.read
    }

    fn table(&self, next: Hpa) -> u64 {
        next.0 | (NptBits::PRESENT | NptBits::WRITE | NptBits::USER).bits()
    }

    fn leaf(&self, page: Hpa, size: PageSize, rights: Rights, memory_type: MemoryType) -> u64 {
        let mut bits = NptBits::PRESENT | NptBits::USER;
        bits.set(NptBits::WRITE, rights.write);
        bits.set(NptBits::NO_EXECUTE, !rights.execute);
        bits.set(NptBits::LARGE, size != PageSize::Size4K);
        if memory_type == MemoryType::Uncacheable {
            // PAT entry 3, UC after reset and as the host keeps it (APM vol. 2, 7.8.2).
            bits |= NptBits::CACHE_DISABLE | NptBits::WRITE_THROUGH;
        }
        page.0 | bits.bits()
    }

    fn is_present(&self, entry: u64) -> bool {
        entry & NptBits::PRESENT.bits() != 0
    }

    fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || (level < 4 && entry & NptBits::LARGE.bits() != 0)
    }

    fn address(&self, entry: u64) -> Hpa {
        Hpa(entry & ADDRESS_MASK)
    }

    fn rights(&self, entry: u64) -> Rights {
        let bits = NptBits::from_bits_truncate(entry);
        Rights {
            read: bits.contains(NptBits::PRESENT),
            write: bits.contains(NptBits::WRITE),
            execute: !bits.contains(NptBits::NO_EXECUTE),
        }
    }

    fn memory_type(&self, entry: u64) -> MemoryType {
        if entry & NptBits::CACHE_DISABLE.bits() == 0 {
            MemoryType::WriteBack
        } else {
            MemoryType::Uncacheable
        }
    }
}

/// Why a mapping could not be made or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedError {
    /// Something is mapped at this address already (the first such in the range).
    AlreadyMapped {
        /// First mapped address of the range.
        gpa: Gpa,
    },
    /// Nothing is mapped at this address (the first such in the range).
    NotMapped {
        /// First unmapped address of the range.
        gpa: Gpa,
    },
    /// An address or the length is no multiple of 4 KiB.
    Unaligned {
        /// Guest-physical start.
        gpa: Gpa,
        /// Length in bytes.
        bytes: u64,
    },
    /// The range reaches beyond 48 bits of guest-physical or 52 bits of host-physical address.
    BeyondLimit {
        /// Guest-physical start.
        gpa: Gpa,
        /// Length in bytes.
        bytes: u64,
    },
    /// This processor's entries can't carry these rights: write without read, execute without read, or none.
    RightsNotSupported(Rights),
    /// No frame left for a table.
    OutOfFrames(OutOfFrames),
}

impl From<OutOfFrames> for NestedError {
    fn from(e: OutOfFrames) -> Self {
        NestedError::OutOfFrames(e)
    }
}

impl fmt::Display for NestedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NestedError::AlreadyMapped { gpa } => {
                write!(f, "guest address {gpa} is mapped already")
            }
            NestedError::NotMapped { gpa } => write!(f, "guest address {gpa} is not mapped"),
            NestedError::Unaligned { gpa, bytes } => write!(
                f,
                "{bytes:#x} bytes at guest address {gpa}: not a multiple of 4 KiB"
            ),
            NestedError::BeyondLimit { gpa, bytes } => write!(
                f,
                "{bytes:#x} bytes at guest address {gpa}: beyond what the page tables reach"
            ),
            NestedError::RightsNotSupported(r) => {
                write!(f, "the processor's nested page tables can't express {r:?}")
            }
            NestedError::OutOfFrames(e) => e.fmt(f),
        }
    }
}

/// Guest-physical addresses are below this: four levels.
const GPA_LIMIT: u64 = 1 << 48;
/// Host-physical addresses are below this: bits 51:0.
const HPA_LIMIT: u64 = 1 << 52;
/// Level of the root.
const TOP: u8 = 4;
/// Entries in a table.
const ENTRIES: u64 = 512;

/// Bytes that one entry of a table of `level` covers.
const fn span(level: u8) -> u64 {
    1 << (12 + 9 * (level - 1))
}

/// Where the entry for `gpa` lies in `table`, a table of `level`.
const fn slot(table: Hpa, level: u8, gpa: u64) -> Hpa {
    Hpa(table.0 + (gpa / span(level)) % ENTRIES * 8)
}

/// What `map` writes into each leaf.
#[derive(Clone, Copy)]
struct Mapping {
    rights: Rights,
    memory_type: MemoryType,
    /// Host-physical minus guest-physical address, wrapping.
    offset: u64,
}

/// One VM's nested page tables.
pub struct NestedTable<F: EntryFormat> {
    format: F,
    memory: &'static dyn HostMemory,
    owner: Owner,
    root: Hpa,
    frames: u64,
}

impl<F: EntryFormat> NestedTable<F> {
    /// Makes empty tables, whose frames are taken under `owner` (a VM's `Owner::VmTables`).
    ///
    /// # Errors
    /// No frame for the root.
    pub fn new(
        format: F,
        memory: &'static dyn HostMemory,
        owner: Owner,
    ) -> Result<Self, OutOfFrames> {
        Ok(Self {
            format,
            memory,
            owner,
            root: memory.allocate(1, PAGE_SIZE, owner)?,
            frames: 1,
        })
    }

    /// The root table: the address for the EPT pointer or N_CR3.
    pub fn root(&self) -> Hpa {
        self.root
    }

    /// The entry format, with the processor's capabilities.
    pub fn format(&self) -> F {
        self.format
    }

    /// Frames that the tables take, 4 KiB each, the root included.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Maps `bytes` bytes at `gpa` to `hpa`, with the largest pages that the processor has and the
    /// alignment of both addresses allows.
    ///
    /// # Errors
    /// Every kind of [`NestedError`] but `NotMapped`. No translation has changed then.
    pub fn map(
        &mut self,
        gpa: Gpa,
        hpa: Hpa,
        bytes: u64,
        rights: Rights,
        memory_type: MemoryType,
    ) -> Result<(), NestedError> {
        let end = Self::check_range(gpa, bytes)?;
        if !hpa.is_aligned(PAGE_SIZE) {
            return Err(NestedError::Unaligned { gpa, bytes });
        }
        if hpa.checked_add(bytes).is_none_or(|end| end.0 > HPA_LIMIT) {
            return Err(NestedError::BeyondLimit { gpa, bytes });
        }
        if !self.format.can_express(rights) {
            return Err(NestedError::RightsNotSupported(rights));
        }
        let mapping = Mapping {
            rights,
            memory_type,
            offset: hpa.0.wrapping_sub(gpa.0),
        };
        self.map_in(self.root, TOP, gpa.0, end, mapping)
            .map_err(|(error, reached)| {
                // All of [gpa, reached) was unmapped before, and its leaves lie wholly within.
                self.clear_in(self.root, TOP, gpa.0, reached);
                error
            })
    }

    /// Takes away whatever is mapped in the range; holes in it are fine. Large pages that reach
    /// across an end of the range are split. Returns the number of bytes that were mapped.
    ///
    /// The caller flushes cached translations on every pCPU before it reuses the memory.
    ///
    /// # Errors
    /// `Unaligned`, `BeyondLimit`, or `OutOfFrames` for a split. No translation has changed then.
    pub fn unmap(&mut self, gpa: Gpa, bytes: u64) -> Result<u64, NestedError> {
        let end = Self::check_range(gpa, bytes)?;
        self.split_at(gpa.0)?;
        self.split_at(end)?;
        Ok(self.clear_in(self.root, TOP, gpa.0, end))
    }

    /// Changes the rights of a range that is mapped throughout. Large pages that reach across an
    /// end of the range are split. The caller flushes cached translations if rights were taken away.
    ///
    /// # Errors
    /// `NotMapped` for the first hole, or as `map`. No translation has changed then.
    pub fn protect(&mut self, gpa: Gpa, bytes: u64, rights: Rights) -> Result<(), NestedError> {
        let end = Self::check_range(gpa, bytes)?;
        if !self.format.can_express(rights) {
            return Err(NestedError::RightsNotSupported(rights));
        }
        let mut at = gpa.0;
        while at < end {
            let (level, _, entry) = self.find(at);
            if !self.format.is_present(entry) {
                return Err(NestedError::NotMapped { gpa: Gpa(at) });
            }
            at = (at & !(span(level) - 1)) + span(level);
        }
        self.split_at(gpa.0)?;
        self.split_at(end)?;
        let mut at = gpa.0;
        while at < end {
            let (level, slot, entry) = self.find(at);
            if let Some(size) = PageSize::of_level(level) {
                let (page, kind) = (self.format.address(entry), self.format.memory_type(entry));
                self.memory
                    .write_u64(slot, self.format.leaf(page, size, rights, kind));
            }
            at += span(level);
        }
        Ok(())
    }

    /// Where `gpa` leads: host-physical address, rights, and size of the page that maps it.
    pub fn translate(&self, gpa: Gpa) -> Option<(Hpa, Rights, PageSize)> {
        if gpa.0 >= GPA_LIMIT {
            return None;
        }
        let (level, _, entry) = self.find(gpa.0);
        if !self.format.is_present(entry) {
            return None;
        }
        let size = PageSize::of_level(level)?;
        Some((
            self.format.address(entry) + (gpa.0 & (size.bytes() - 1)),
            self.format.rights(entry),
            size,
        ))
    }

    /// Memory type of the page that maps `gpa`.
    pub fn memory_type(&self, gpa: Gpa) -> Option<MemoryType> {
        if gpa.0 >= GPA_LIMIT {
            return None;
        }
        let (_, _, entry) = self.find(gpa.0);
        self.format
            .is_present(entry)
            .then(|| self.format.memory_type(entry))
    }

    /// Frees the tables that hold no mapping any more. Call it only after every pCPU that ran the
    /// VM has flushed its cached translations, or the VM is not running.
    pub fn reclaim(&mut self) {
        self.reclaim_in(self.root, TOP);
    }

    /// Alignment and limits of a guest-physical range; its end.
    fn check_range(gpa: Gpa, bytes: u64) -> Result<u64, NestedError> {
        match gpa.checked_add(bytes) {
            Some(end) if end.0 <= GPA_LIMIT => {
                if gpa.is_aligned(PAGE_SIZE) && end.is_aligned(PAGE_SIZE) {
                    Ok(end.0)
                } else {
                    Err(NestedError::Unaligned { gpa, bytes })
                }
            }
            _ => Err(NestedError::BeyondLimit { gpa, bytes }),
        }
    }

    /// The entry that ends the walk for `gpa`: a leaf, or one that is not present. With its level and place.
    fn find(&self, gpa: u64) -> (u8, Hpa, u64) {
        let (mut table, mut level) = (self.root, TOP);
        loop {
            let slot = slot(table, level, gpa);
            let entry = self.memory.read_u64(slot);
            if !self.format.is_present(entry) || self.format.is_leaf(entry, level) {
                return (level, slot, entry);
            }
            table = self.format.address(entry);
            level -= 1;
        }
    }

    fn new_table(&mut self) -> Result<Hpa, OutOfFrames> {
        let table = self.memory.allocate(1, PAGE_SIZE, self.owner)?;
        self.frames += 1;
        Ok(table)
    }

    fn free_table(&mut self, table: Hpa) {
        self.memory.free(table, 1, self.owner);
        self.frames -= 1;
    }

    /// Maps [from, to) below `table`. On failure, also says up to where it got.
    fn map_in(
        &mut self,
        table: Hpa,
        level: u8,
        from: u64,
        to: u64,
        mapping: Mapping,
    ) -> Result<(), (NestedError, u64)> {
        let mut at = from;
        while at < to {
            let next = to.min((at & !(span(level) - 1)) + span(level));
            let slot = slot(table, level, at);
            let entry = self.memory.read_u64(slot);
            let page = Hpa(at.wrapping_add(mapping.offset));
            let leaf_size = PageSize::of_level(level).filter(|size| {
                self.format.supports(*size)
                    && next - at == size.bytes()
                    && page.is_aligned(size.bytes())
            });
            if self.format.is_present(entry) {
                if self.format.is_leaf(entry, level) {
                    return Err((NestedError::AlreadyMapped { gpa: Gpa(at) }, at));
                }
                self.map_in(self.format.address(entry), level - 1, at, next, mapping)?;
            } else if let Some(size) = leaf_size {
                let leaf = self
                    .format
                    .leaf(page, size, mapping.rights, mapping.memory_type);
                self.memory.write_u64(slot, leaf);
            } else {
                let lower = self.new_table().map_err(|e| (e.into(), at))?;
                self.memory.write_u64(slot, self.format.table(lower));
                self.map_in(lower, level - 1, at, next, mapping)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Clears every leaf in [from, to) below `table`; none reaches across an end. Bytes cleared.
    fn clear_in(&mut self, table: Hpa, level: u8, from: u64, to: u64) -> u64 {
        let mut cleared = 0;
        let mut at = from;
        while at < to {
            let next = to.min((at & !(span(level) - 1)) + span(level));
            let slot = slot(table, level, at);
            let entry = self.memory.read_u64(slot);
            if self.format.is_present(entry) {
                if self.format.is_leaf(entry, level) {
                    self.memory.write_u64(slot, 0);
                    cleared += next - at;
                } else {
                    cleared += self.clear_in(self.format.address(entry), level - 1, at, next);
                }
            }
            at = next;
        }
        cleared
    }

    /// Splits pages until none reaches across `boundary`. Translations stay the same.
    fn split_at(&mut self, boundary: u64) -> Result<(), OutOfFrames> {
        if boundary >= GPA_LIMIT {
            return Ok(());
        }
        loop {
            let (level, slot, entry) = self.find(boundary);
            let Some(lower_size) = PageSize::of_level(level.saturating_sub(1)) else {
                return Ok(());
            };
            if !self.format.is_present(entry) || boundary.is_multiple_of(span(level)) {
                return Ok(());
            }
            let table = self.new_table()?;
            let (rights, kind) = (self.format.rights(entry), self.format.memory_type(entry));
            for i in 0..ENTRIES {
                let page = self.format.address(entry) + i * lower_size.bytes();
                let leaf = self.format.leaf(page, lower_size, rights, kind);
                self.memory.write_u64(table + i * 8, leaf);
            }
            self.memory.write_u64(slot, self.format.table(table));
        }
    }

    /// Frees empty tables below `table`; whether `table` itself is empty then.
    fn reclaim_in(&mut self, table: Hpa, level: u8) -> bool {
        let mut empty = true;
        for i in 0..ENTRIES {
            let slot = table + i * 8;
            let entry = self.memory.read_u64(slot);
            if !self.format.is_present(entry) {
                continue;
            }
            let lower = self.format.address(entry);
            if !self.format.is_leaf(entry, level) && self.reclaim_in(lower, level - 1) {
                self.memory.write_u64(slot, 0);
                self.free_table(lower);
            } else {
                empty = false;
            }
        }
        empty
    }

    /// Frees `table` and all tables below it.
    fn free_in(&mut self, table: Hpa, level: u8) {
        if level > 1 {
            for i in 0..ENTRIES {
                let entry = self.memory.read_u64(table + i * 8);
                if self.format.is_present(entry) && !self.format.is_leaf(entry, level) {
                    self.free_in(self.format.address(entry), level - 1);
                }
            }
        }
        self.free_table(table);
    }
}

impl<F: EntryFormat> Drop for NestedTable<F> {
    fn drop(&mut self) {
        self.free_in(self.root, TOP);
    }
}

#[cfg(test)]
mod tests;
