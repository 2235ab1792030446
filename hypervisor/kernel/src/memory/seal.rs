//! Takes away what the boot loader mapped and nobody needs, and proves W^X page by page.

use x86_64::{
    PhysAddr,
    registers::control::Cr3,
    structures::paging::{PageTable, PageTableFlags, page_table::PageTableEntry},
};

use super::window;

/// Entries of a page table.
const ENTRIES: usize = 512;
/// Top-level entries of the lower half of the address space.
const LOWER_HALF: usize = ENTRIES / 2;

/// What [`seal`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seal {
    /// Mapped pages of any size that were looked at.
    pub pages: u64,
    /// Pages that were writable and executable, and are no longer executable.
    pub fixed: u64,
}

/// Unmaps the lower half (the boot loader's switch-over code and descriptor table) and walks
/// everything else: a page that is writable and executable loses the right to be executed.
///
/// # Safety
/// Nothing may use the lower half any more, and no other processor may run.
pub unsafe fn seal() -> Seal {
    let (root, flags) = Cr3::read();
    let mut result = Seal::default();
    // SAFETY: CR3 holds the root table's address, and only this processor runs.
    unsafe {
        let table = table(root.start_address());
        for entry in table.iter_mut().take(LOWER_HALF) {
            entry.set_unused();
        }
        walk(table, 4, true, true, &mut result);
        // Drops the translations of what was taken away (none of them is global).
        Cr3::write(root, flags);
    }
    result
}

/// # Safety
/// A page table must be at `physical`, and the reference the only one.
unsafe fn table(physical: PhysAddr) -> &'static mut PageTable {
    // SAFETY: the window maps all tables; the caller vouches for the rest.
    unsafe { &mut *((window::offset() + physical.as_u64()) as *mut PageTable) }
}

/// Looks at all pages under `table`, which the levels above allow to be written or executed as told.
///
/// # Safety
/// As [`table`], for this one and those below.
unsafe fn walk(table: &mut PageTable, level: u8, write: bool, execute: bool, result: &mut Seal) {
    for entry in table.iter_mut().filter(|entry| !entry.is_unused()) {
        let flags = entry.flags();
        if !flags.contains(PageTableFlags::PRESENT) {
            continue;
        }
        let write = write && flags.contains(PageTableFlags::WRITABLE);
        let execute = execute && !flags.contains(PageTableFlags::NO_EXECUTE);
        if level > 1 && !flags.contains(PageTableFlags::HUGE_PAGE) {
            // SAFETY: the entry points to a table of the next level.
            unsafe { walk(self::table(entry.addr()), level - 1, write, execute, result) };
            continue;
        }
        result.pages += 1;
        if write && execute {
            result.fixed += 1;
            forbid_execution(entry);
        }
    }
}

fn forbid_execution(entry: &mut PageTableEntry) {
    entry.set_flags(entry.flags() | PageTableFlags::NO_EXECUTE);
}
