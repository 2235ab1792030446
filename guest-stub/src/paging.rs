//! Page tables beyond the boot map: RAM above 4 GiB, and a window for tests.
//!
//! The window is 2 MiB of virtual addresses in the PCI hole that nothing else here uses; its
//! 512 pages are mapped one by one, to physical pages outside of this program.

use core::cell::UnsafeCell;

use bitflags::bitflags;

use crate::cpu;
use crate::memory::{self, LARGE_PAGE, PAGE};

bitflags! {
    /// Bits of a page-table entry.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Entry: u64 {
        const PRESENT = 1 << 0;
        const WRITABLE = 1 << 1;
        const USER = 1 << 2;
        const NO_CACHE = 1 << 4;
        const ACCESSED = 1 << 5;
        const DIRTY = 1 << 6;
        const LARGE = 1 << 7;
        const NO_EXECUTE = 1 << 63;
    }
}

/// First address of the window.
pub const WINDOW: u64 = 0xF000_0000;
/// Large pages that can be mapped above 4 GiB: 60 GiB.
const HIGH_DIRECTORIES: usize = 60;

/// A page table; the processor writes accessed and dirty bits.
#[repr(C, align(4096))]
struct Table(UnsafeCell<[u64; 512]>);

// SAFETY: the first processor alone changes them, and no reference into a table is ever kept.
unsafe impl Sync for Table {}

impl Table {
    const fn new() -> Self {
        Self(UnsafeCell::new([0; 512]))
    }

    fn get(&self, index: usize) -> u64 {
        assert!(index < 512);
        // SAFETY: in bounds; volatile, for the processor writes here too.
        unsafe { self.0.get().cast::<u64>().add(index).read_volatile() }
    }

    /// # Safety
    ///
    /// The mapping must not take memory of this program away or let tests write to it.
    unsafe fn set(&self, index: usize, entry: u64) {
        assert!(index < 512);
        // SAFETY: in bounds; the caller vouches for what the entry means.
        unsafe { self.0.get().cast::<u64>().add(index).write_volatile(entry) };
    }

    fn address(&self) -> u64 {
        self.0.get() as u64
    }
}

static WINDOW_TABLE: Table = Table::new();
static HIGH: [Table; HIGH_DIRECTORIES] = [const { Table::new() }; HIGH_DIRECTORIES];

unsafe extern "C" {
    #[link_name = "boot_pml4"]
    static BOOT_PML4: Table;
    #[link_name = "boot_page_directories"]
    static BOOT_DIRECTORIES: [Table; 4];
}

fn directory_entry(address: u64) -> (usize, usize) {
    ((address >> 30) as usize, (address >> 21) as usize & 511)
}

/// Sets up the window and maps RAM up to `top` one to one. Returns the first address that is
/// not mapped.
pub fn init(top: u64) -> u64 {
    let flags = Entry::PRESENT | Entry::WRITABLE | Entry::USER;
    let (directory, index) = directory_entry(WINDOW);
    let (apic_directory, ioapic_index) = directory_entry(0xFEC0_0000);
    let (_, local_apic_index) = directory_entry(0xFEE0_0000);
    let high = (top.saturating_sub(1) >> 30)
        .saturating_sub(3)
        .min(HIGH_DIRECTORIES as u64);
    // SAFETY: the boot tables are ours and live forever; the window is in the PCI hole, the
    // device pages stay where they are, and what is above 4 GiB maps one to one.
    unsafe {
        BOOT_DIRECTORIES[directory].set(index, WINDOW_TABLE.address() | flags.bits());
        for index in [ioapic_index, local_apic_index] {
            let entry = BOOT_DIRECTORIES[apic_directory].get(index);
            BOOT_DIRECTORIES[apic_directory].set(index, entry | Entry::NO_CACHE.bits());
        }
        // Ring 3 reaches only what the window's own entries allow.
        let top_level = BOOT_PML4.get(0);
        BOOT_PML4.set(0, top_level | Entry::USER.bits());
        let pointers = &*core::ptr::with_exposed_provenance::<Table>((top_level & !0xFFF) as usize);
        pointers.set(directory, pointers.get(directory) | Entry::USER.bits());
        for (gigabyte, table) in (4..).zip(HIGH.iter().take(high as usize)) {
            for slot in 0..512 {
                let address = (gigabyte as u64) << 30 | (slot as u64) << 21;
                table.set(
                    slot,
                    address | (Entry::PRESENT | Entry::WRITABLE | Entry::LARGE).bits(),
                );
            }
            pointers.set(
                gigabyte,
                table.address() | (Entry::PRESENT | Entry::WRITABLE).bits(),
            );
        }
        cpu::set_cr3(cpu::cr3());
    }
    (4 + high) << 30
}

/// The virtual address of a page of the window.
pub fn window_page(page: usize) -> u64 {
    assert!(page < 512);
    WINDOW + page as u64 * PAGE
}

/// Maps a page of the window to a physical page outside of this program; returns its address.
pub fn map(page: usize, physical: u64, flags: Entry) -> u64 {
    let (start, end) = crate::memory::image();
    assert!(
        physical + PAGE <= start || physical >= end,
        "a window onto the image"
    );
    // SAFETY: the physical page is not this program's.
    unsafe { WINDOW_TABLE.set(page, physical | flags.bits()) };
    let address = window_page(page);
    cpu::flush_page(address);
    address
}

/// Takes a page of the window away.
pub fn unmap(page: usize) -> u64 {
    // SAFETY: the window is not this program's memory.
    unsafe { WINDOW_TABLE.set(page, 0) };
    let address = window_page(page);
    cpu::flush_page(address);
    address
}

/// An entry of the uppermost table that this program does not use.
const SPARE: usize = 0x1f0;
/// The entry of the uppermost table for the last addresses below those that are not canonical.
const LAST_OF_LOWER_HALF: usize = 255;

/// Sets the uppermost table's spare entry; returns the first address below it.
pub fn set_spare(entry: u64) -> u64 {
    // SAFETY: nothing of this program is mapped there.
    unsafe {
        BOOT_PML4.set(SPARE, entry);
        cpu::set_cr3(cpu::cr3());
    }
    !0 << 48 | (SPARE as u64) << 39
}

/// Maps `page` as the last one of the lower half, by tables in the three pages behind it; returns its address.
/// [`unmap_last_of_lower_half`] takes it away.
///
/// # Safety
/// The four pages are free RAM, and stay that until then.
pub unsafe fn map_last_of_lower_half(page: u64) -> u64 {
    const LAST: u64 = 511;
    let flags = (Entry::PRESENT | Entry::WRITABLE).bits();
    for level in 1..=3 {
        let table = page + level * PAGE;
        memory::write_bytes(table, &[0; PAGE as usize]);
        memory::write64(table + 8 * LAST, (table - PAGE) | flags);
    }
    // SAFETY: nothing of this program is mapped there.
    unsafe {
        BOOT_PML4.set(LAST_OF_LOWER_HALF, (page + 3 * PAGE) | flags);
        cpu::set_cr3(cpu::cr3());
    }
    (1 << 47) - PAGE
}

/// Takes that page away.
pub fn unmap_last_of_lower_half() {
    // SAFETY: as for mapping it.
    unsafe {
        BOOT_PML4.set(LAST_OF_LOWER_HALF, 0);
        cpu::set_cr3(cpu::cr3());
    }
}

/// The flags of a page of the window.
pub fn flags(page: usize) -> Entry {
    Entry::from_bits_truncate(WINDOW_TABLE.get(page))
}

/// Flags of the boot map's large page that holds an address below 4 GiB.
pub fn large_page_flags(address: u64) -> Entry {
    let (directory, index) = directory_entry(address);
    // SAFETY: the boot tables live forever; `get` checks the index.
    Entry::from_bits_truncate(unsafe { BOOT_DIRECTORIES[directory].get(index) })
}

/// Clears the accessed and dirty bits of such a large page.
pub fn clear_large_page_flags(address: u64) {
    let (directory, index) = directory_entry(address);
    // SAFETY: only the two status bits change.
    unsafe {
        let entry = BOOT_DIRECTORIES[directory].get(index);
        let status = (Entry::ACCESSED | Entry::DIRTY).bits();
        BOOT_DIRECTORIES[directory].set(index, entry & !status);
    }
    cpu::flush_page(address & !(LARGE_PAGE - 1));
}
