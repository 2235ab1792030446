//! Nested page tables: one walker, generic over the entry format (EPT or NPT).

use crate::Hpa;

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
}
