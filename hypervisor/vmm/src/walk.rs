//! The guest's own page tables, walked in software: guest-virtual to guest-physical.
//!
//! Used only to emulate an instruction: to fetch its bytes and to reach its operands. Covers
//! no paging, 32-bit, PAE, 4-level and 5-level paging with the access checks of SDM vol. 3A,
//! section 4.6, protection keys, and reserved bits among them. Entries are read once each; a table outside
//! the guest's RAM reads as ones, whose reserved bits fault. A walk that ends well marks its entries as accessed, and the
//! page as dirty if it is to be written, as the processor does.

use mem::{
    Gpa, Gva,
    guest::{GuestMemory, Recent},
};
use virt::VirtualCpu;

const CR0_PG: u64 = 1 << 31;
const CR0_WP: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITE: u64 = 1 << 1;
const PTE_USER: u64 = 1 << 2;
const PTE_ACCESSED: u64 = 1 << 5;
const PTE_DIRTY: u64 = 1 << 6;
const PTE_LARGE: u64 = 1 << 7;
const PTE_NX: u64 = 1 << 63;
const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page fault's error code (SDM vol. 3A, section 4.7).
const CODE_RESERVED: u32 = 1 << 3;
const CODE_KEY: u32 = 1 << 5;
/// How often a walk starts anew because another processor changes the tables under it.
const MAX_WALKS: u32 = 8;

/// What the access is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data load.
    Read,
    /// Data store.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// A page fault that the guest must see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// For CR2.
    pub address: Gva,
    /// Error code (SDM vol. 3A, section 4.7).
    pub error_code: u32,
}

/// Where the instruction at `rip` lies, under four-level paging: [`Paging::translate`] for the one case that
/// is frequent, in few instructions. `None`: not this case, or a fault; ask `translate`.
#[inline]
pub fn translate_code_64<V: VirtualCpu>(
    cpu: &V,
    cpl: u8,
    rip: Gva,
    ram: Recent<'_>,
) -> Option<Gpa> {
    let cr4 = cpu.cr4();
    if cr4 & CR4_LA57 != 0 {
        return None;
    }
    let (mut granted, mut any) = (PTE_USER, 0);
    let mut table = cpu.cr3() & PTE_ADDRESS;
    let mut shift = 39;
    let base = loop {
        let index = (rip.0 >> shift) & 0x1ff;
        let entry = ram.read_entry(Gpa(table + index * 8)).ok()?;
        if entry & PTE_PRESENT == 0 {
            return None;
        }
        granted &= entry;
        any |= entry;
        let large = entry & PTE_LARGE != 0;
        if shift == 12 || (large && shift <= 30) {
            break entry & PTE_ADDRESS;
        }
        table = entry & PTE_ADDRESS;
        shift -= 9;
    };
    let user_page = granted & PTE_USER != 0;
    let permitted = any & PTE_NX == 0
        && if cpl == 3 {
            user_page
        } else {
            !user_page || cr4 & CR4_SMEP == 0
        };
    let offset = (1u64 << shift) - 1;
    permitted.then_some(Gpa((base & !offset) | (rip.0 & offset)))
}

/// The paging state of a vCPU at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// PKRU, if protection keys are on.
    pub pkru: u32,
    /// Physical address bits of the guest's processor: address bits of an entry above them are reserved.
    pub physical_bits: u8,
}

/// Why a walk has no result.
enum Broken {
    Fault(PageFault),
    /// An entry is not what it was any more.
    Changed,
}

impl Paging {
    /// Reads it off a vCPU that has so many physical address bits.
    pub fn of<V: VirtualCpu>(cpu: &V, physical_bits: u8) -> Self {
        let cr4 = cpu.cr4();
        Paging {
            cr0: cpu.cr0(),
            cr3: cpu.cr3(),
            cr4,
            efer: cpu.efer(),
            rflags: cpu.rflags(),
            cpl: cpu.cpl(),
            pkru: if cr4 & CR4_PKE != 0 { cpu.pkru() } else { 0 },
            physical_bits,
        }
    }

    /// Whether the guest's linear addresses are 64 bits wide.
    fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// Translates one linear address.
    ///
    /// # Errors
    /// The page fault that the processor would raise.
    pub fn translate(
        &self,
        memory: &GuestMemory,
        gva: Gva,
        access: Access,
    ) -> Result<Gpa, PageFault> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Gpa(gva.0 & 0xffff_ffff));
        }
        for _ in 1..MAX_WALKS {
            match self.walk(memory, gva, access, true) {
                Ok(gpa) => return Ok(gpa),
                Err(Broken::Fault(fault)) => return Err(fault),
                Err(Broken::Changed) => {}
            }
        }
        self.walk(memory, gva, access, false)
            .map_err(|broken| match broken {
                Broken::Fault(fault) => fault,
                Broken::Changed => self.fault(gva, access, 0),
            })
    }

    fn fault(&self, gva: Gva, access: Access, why: u32) -> PageFault {
        let nx = self.efer & EFER_NXE != 0;
        let mut error_code = why;
        error_code |= u32::from(access == Access::Write) << 1;
        error_code |= u32::from(self.cpl == 3) << 2;
        if access == Access::Fetch && (nx || self.cr4 & CR4_SMEP != 0) {
            error_code |= 1 << 4;
        }
        PageFault {
            address: gva,
            error_code,
        }
    }

    /// One walk. With `mark`, its entries are marked as accessed and dirty.
    fn walk(
        &self,
        memory: &GuestMemory,
        gva: Gva,
        access: Access,
        mark: bool,
    ) -> Result<Gpa, Broken> {
        const PRESENT: u32 = 1;
        let fault = |why| Err(Broken::Fault(self.fault(gva, access, why)));
        let user = self.cpl == 3;
        let nx = self.efer & EFER_NXE != 0;
        let long = self.long_mode();
        let wide = long || self.cr4 & CR4_PAE != 0;
        let (levels, index_bits, mut table) = match (long, wide) {
            (true, _) if self.cr4 & CR4_LA57 != 0 => (5, 9, self.cr3 & PTE_ADDRESS),
            (true, _) => (4, 9, self.cr3 & PTE_ADDRESS),
            (false, true) => (3, 9, self.cr3 & 0xffff_ffe0),
            (false, false) => (2, 10, self.cr3 & 0xffff_f000),
        };
        let linear = if long { gva.0 } else { gva.0 & 0xffff_ffff };
        // Rights that every entry grants, and bits that any entry has.
        let (mut granted, mut any) = (PTE_WRITE | PTE_USER, 0);
        let mut passed = [(Gpa(0), 0u64); 5];
        for level in (1..=levels).rev() {
            let shift = 12 + index_bits * (level - 1);
            let index = (linear >> shift) & ((1 << index_bits) - 1);
            let (at, entry) = if wide {
                let at = Gpa(table + index * 8);
                (at, memory.read_entry(at).unwrap_or(u64::MAX))
            } else {
                let at = Gpa(table + index * 4);
                (at, memory.read_u32(at).unwrap_or(u32::MAX).into())
            };
            if entry & PTE_PRESENT == 0 {
                return fault(0);
            }
            // The four PDPTEs of PAE paging have no R/W, U/S, XD or accessed bits; the processor has loaded them.
            let is_pdpte = level == 3 && levels == 3;
            let leaf = level == 1
                || entry & PTE_LARGE != 0
                    && match level {
                        2 => levels > 2 || self.cr4 & CR4_PSE != 0,
                        3 => levels > 3,
                        _ => false,
                    };
            if !is_pdpte {
                if entry & self.reserved(level, wide, leaf) != 0 {
                    return fault(PRESENT | CODE_RESERVED);
                }
                granted &= entry;
                any |= entry;
                if let Some(slot) = passed.get_mut(level - 1) {
                    *slot = (at, entry);
                }
            }
            if !leaf {
                table = entry & if wide { PTE_ADDRESS } else { 0xffff_f000 };
                continue;
            }
            let writable = granted & PTE_WRITE != 0;
            let user_page = granted & PTE_USER != 0;
            let no_execute = nx && any & PTE_NX != 0;
            if !self.permits(access, user, writable, user_page, no_execute) {
                return fault(PRESENT);
            }
            if long && user_page && !self.key_permits(access, user, entry) {
                return fault(PRESENT | CODE_KEY);
            }
            if mark && !Self::mark(memory, &passed[level - 1..], access) {
                return Err(Broken::Changed);
            }
            let page_mask = (1u64 << shift) - 1;
            let base = if !wide && level == 2 {
                // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
                (entry & 0xffc0_0000) | ((entry >> 13) & 0xff) << 32
            } else {
                entry & PTE_ADDRESS & !page_mask
            };
            return Ok(Gpa(base | (linear & page_mask)));
        }
        fault(0)
    }

    /// Bits that must be 0 in a present entry (SDM vol. 3A, sections 4.3 to 4.5).
    fn reserved(&self, level: usize, wide: bool, leaf: bool) -> u64 {
        if !wide {
            // Of a large page: bit 21, and the address bits that the processor has not.
            let high = u32::from(self.physical_bits.clamp(32, 40)) - 32;
            return if leaf && level == 2 {
                1 << 21 | (0xff & !((1 << high) - 1)) << 13
            } else {
                0
            };
        }
        let mut bits = PTE_ADDRESS & !0 << self.physical_bits.min(63);
        if self.efer & EFER_NXE == 0 {
            bits |= PTE_NX;
        }
        if !self.long_mode() {
            // What long mode ignores there, or uses for keys.
            bits |= 0x7ff << 52;
        }
        match (level, leaf) {
            (2, true) => bits |= 0xff << 13,
            (3, true) => bits |= 0x1_ffff << 13,
            (4 | 5, _) => bits |= PTE_LARGE,
            _ => {}
        }
        bits
    }

    /// Whether the page's protection key allows the access (SDM vol. 3A, section 4.6.2).
    fn key_permits(&self, access: Access, user: bool, leaf: u64) -> bool {
        if self.cr4 & CR4_PKE == 0 || access == Access::Fetch {
            return true;
        }
        let key = (leaf >> 59) & 0xf;
        let rights = self.pkru >> (2 * key);
        let (no_access, no_write) = (rights & 1 != 0, rights & 2 != 0);
        let write = access == Access::Write && (user || self.cr0 & CR0_WP != 0);
        !(no_access || no_write && write)
    }

    /// Marks the entries of a walk, the leaf first. `false`: one has changed meanwhile.
    fn mark(memory: &GuestMemory, passed: &[(Gpa, u64)], access: Access) -> bool {
        passed.iter().enumerate().all(|(n, &(at, entry))| {
            let dirty = if n == 0 && access == Access::Write {
                PTE_DIRTY
            } else {
                0
            };
            let wanted = PTE_ACCESSED | dirty;
            // A slot that no entry went through is all zeroes.
            entry & PTE_PRESENT == 0
                || entry & wanted == wanted
                || memory.replace_u8(at, entry as u8, (entry | wanted) as u8)
        })
    }

    /// The access rights of SDM vol. 3A, section 4.6.1, protection keys apart.
    fn permits(
        &self,
        access: Access,
        user: bool,
        writable: bool,
        user_page: bool,
        no_execute: bool,
    ) -> bool {
        if user {
            return user_page
                && match access {
                    Access::Read => true,
                    Access::Write => writable,
                    Access::Fetch => !no_execute,
                };
        }
        let smep = self.cr4 & CR4_SMEP != 0;
        let smap_blocks = user_page && self.cr4 & CR4_SMAP != 0 && self.rflags & RFLAGS_AC == 0;
        match access {
            Access::Read => !smap_blocks,
            Access::Write => (writable || self.cr0 & CR0_WP == 0) && !smap_blocks,
            Access::Fetch => !(no_execute || (smep && user_page)),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::boxed::Box;

    use super::*;
    use mem::{fake::FakeMemory, guest::pc_layout};

    const TABLES: u64 = 0x10_0000;
    const GVA: Gva = Gva(0x0000_7f12_3456_7abc);

    fn memory() -> GuestMemory {
        let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(16 << 20)));
        GuestMemory::allocate(host, 1, &pc_layout(4 << 20)).expect("RAM")
    }

    /// Four levels for [`GVA`], each entry with these flags, down to the page at `page`.
    fn four_levels(memory: &GuestMemory, page: u64, flags: u64) {
        for level in 1..=4u64 {
            let table = TABLES + (4 - level) * 0x1000;
            let index = (GVA.0 >> (12 + 9 * (level - 1))) & 0x1ff;
            let next = if level == 1 { page } else { table + 0x1000 };
            memory
                .write_u64(Gpa(table + index * 8), next | flags)
                .expect("RAM");
        }
    }

    fn long_mode(cpl: u8) -> Paging {
        Paging {
            cr0: CR0_PG | CR0_WP | 1,
            cr3: TABLES,
            cr4: CR4_PAE,
            efer: EFER_LMA | EFER_NXE,
            rflags: 2,
            cpl,
            pkru: 0,
            physical_bits: 40,
        }
    }

    const RW: u64 = PTE_PRESENT | PTE_WRITE;

    #[test]
    fn four_level_translation_and_rights() {
        let m = memory();
        four_levels(&m, 0x5000, RW | PTE_USER);
        for access in [Access::Read, Access::Write, Access::Fetch] {
            for cpl in [0, 3] {
                assert_eq!(long_mode(cpl).translate(&m, GVA, access), Ok(Gpa(0x5abc)));
            }
        }
        // (entry flags, CR4, RFLAGS.AC, CPL, access, error code)
        let ac = RFLAGS_AC;
        for (flags, cr4, rflags, cpl, access, code) in [
            (RW, 0, 0, 3, Access::Read, Some(0b101)),
            (RW, 0, 0, 0, Access::Read, None),
            (PTE_PRESENT | PTE_USER, 0, 0, 3, Access::Write, Some(0b111)),
            (PTE_PRESENT, 0, 0, 0, Access::Write, Some(0b011)),
            (RW | PTE_NX, 0, 0, 0, Access::Fetch, Some(0b1_0001)),
            (RW | PTE_USER, CR4_SMEP, 0, 0, Access::Fetch, Some(0b1_0001)),
            (RW | PTE_USER, CR4_SMAP, 0, 0, Access::Read, Some(0b001)),
            (RW | PTE_USER, CR4_SMAP, ac, 0, Access::Read, None),
            (0, 0, 0, 0, Access::Write, Some(0b010)),
        ] {
            four_levels(&m, 0x5000, flags);
            let mut paging = long_mode(cpl);
            paging.cr4 |= cr4;
            paging.rflags |= rflags;
            let expected = match code {
                None => Ok(Gpa(0x5abc)),
                Some(error_code) => Err(PageFault {
                    address: GVA,
                    error_code,
                }),
            };
            assert_eq!(
                paging.translate(&m, GVA, access),
                expected,
                "{flags:#x} {access:?}"
            );
        }
        // Without WP, a supervisor writes to a read-only page.
        four_levels(&m, 0x5000, PTE_PRESENT);
        let mut paging = long_mode(0);
        paging.cr0 &= !CR0_WP;
        assert_eq!(paging.translate(&m, GVA, Access::Write), Ok(Gpa(0x5abc)));
    }

    #[test]
    fn large_pages_and_older_paging_modes() {
        let m = memory();
        four_levels(&m, 0, RW);
        let pd = TABLES + 0x2000 + ((GVA.0 >> 21) & 0x1ff) * 8;
        m.write_u64(Gpa(pd), 0x4020_0000 | RW | PTE_LARGE)
            .expect("RAM");
        let expected = Gpa(0x4020_0000 | (GVA.0 & 0x1f_ffff));
        assert_eq!(long_mode(0).translate(&m, GVA, Access::Read), Ok(expected));

        // 32-bit paging, a 4 MiB page with bits 39:32 of its address (PSE-36), and a 4 KiB page.
        let mut paging = long_mode(0);
        (paging.cr4, paging.efer) = (CR4_PSE, 0);
        m.write_u32(Gpa(TABLES + 4), 0x0080_2000 | (RW | PTE_LARGE) as u32)
            .expect("RAM");
        assert_eq!(
            paging.translate(&m, Gva(0x40_1234), Access::Read),
            Ok(Gpa(0x1_0080_1234))
        );
        m.write_u32(Gpa(TABLES + 8), 0x10_4000 | RW as u32)
            .expect("RAM");
        m.write_u32(Gpa(0x10_4000), 0x7000 | RW as u32)
            .expect("RAM");
        assert_eq!(
            paging.translate(&m, Gva(0x80_0678), Access::Write),
            Ok(Gpa(0x7678))
        );

        // PAE: PDPTEs have no R/W bit, so the page is writable by its PTE alone.
        (paging.cr3, paging.cr4) = (0x10_8020, CR4_PAE);
        m.write_u64(Gpa(0x10_8020), 0x10_9000 | PTE_PRESENT)
            .expect("RAM");
        m.write_u64(Gpa(0x10_9000), 0x10_a000 | RW).expect("RAM");
        m.write_u64(Gpa(0x10_a008), 0x9000 | RW).expect("RAM");
        assert_eq!(
            paging.translate(&m, Gva(0x1008), Access::Write),
            Ok(Gpa(0x9008))
        );

        paging.cr0 = 1;
        assert_eq!(
            paging.translate(&m, Gva(0x1_2345_6789), Access::Read),
            Ok(Gpa(0x2345_6789))
        );
    }

    #[test]
    fn tables_outside_ram_are_ones() {
        let m = memory();
        let mut paging = long_mode(0);
        paging.cr3 = 0xfee0_0000;
        let fault = paging
            .translate(&m, GVA, Access::Read)
            .expect_err("a fault");
        assert_eq!(fault.error_code, 0b1001, "reserved bits");
        // Nothing is reserved in 32-bit paging without large pages: the last page below 4 GiB, wherever one looks.
        (paging.cr4, paging.efer) = (0, 0);
        assert_eq!(
            paging.translate(&m, Gva(0x1234), Access::Write),
            Ok(Gpa(0xffff_f234))
        );
    }

    #[test]
    fn reserved_bits_fault_as_such() {
        let m = memory();
        let code = |paging: &Paging| {
            let result = paging.translate(&m, GVA, Access::Write);
            result.err().map(|fault| fault.error_code)
        };
        four_levels(&m, 0x5000 | 1 << 40, RW);
        assert_eq!(code(&long_mode(0)), Some(0b1011));
        four_levels(&m, 0x5000, RW | 1 << 52 | 1 << 51);
        assert_eq!(code(&long_mode(3)), Some(0b1111));
        four_levels(&m, 0x5000, RW | 1 << 52 | 1 << 9);
        assert_eq!(code(&long_mode(0)), None, "ignored ones");
        four_levels(&m, 0x5000, RW | PTE_NX);
        let mut paging = long_mode(0);
        paging.efer &= !EFER_NXE;
        assert_eq!(code(&paging), Some(0b1011));
        // Between the flags and the address of a large page.
        four_levels(&m, 0, RW);
        let pd = TABLES + 0x2000 + ((GVA.0 >> 21) & 0x1ff) * 8;
        m.write_u64(Gpa(pd), 0x4020_2000 | RW | PTE_LARGE)
            .expect("RAM");
        assert_eq!(code(&long_mode(0)), Some(0b1011));
        // PSE-36 with 36 address bits.
        let mut paging = long_mode(0);
        (paging.cr4, paging.efer, paging.physical_bits) = (CR4_PSE, 0, 36);
        let at = Gpa(TABLES + 4);
        for (entry, expected) in [(0x0081_e000, None), (0x0082_0000, Some(0b1011))] {
            m.write_u32(at, entry | (RW | PTE_LARGE) as u32)
                .expect("RAM");
            let result = paging.translate(&m, Gva(0x40_1234), Access::Write);
            assert_eq!(result.err().map(|fault| fault.error_code), expected);
        }
    }

    #[test]
    fn protection_keys_guard_user_pages() {
        let m = memory();
        let key = |n: u64| n << 59;
        let mut paging = long_mode(0);
        paging.cr4 |= CR4_PKE;
        // Key 5 may not be written, key 6 not be used at all.
        paging.pkru = 0b10 << 10 | 0b01 << 12;
        for (page, cpl, access, code) in [
            (key(4), 3, Access::Write, None),
            (key(5), 3, Access::Read, None),
            (key(5), 3, Access::Write, Some(0b10_0111)),
            (key(5), 0, Access::Write, Some(0b10_0011)),
            (key(6), 0, Access::Read, Some(0b10_0001)),
            (key(6), 3, Access::Fetch, None),
        ] {
            four_levels(&m, 0x5000, RW | PTE_USER | page);
            paging.cpl = cpl;
            let result = paging.translate(&m, GVA, access);
            assert_eq!(
                result.err().map(|f| f.error_code),
                code,
                "{page:#x} {access:?}"
            );
        }
        // A supervisor page has none, and without WP the supervisor may write.
        four_levels(&m, 0x5000, RW | key(6));
        paging.cpl = 0;
        assert!(paging.translate(&m, GVA, Access::Write).is_ok());
        four_levels(&m, 0x5000, RW | PTE_USER | key(5));
        paging.cr0 &= !CR0_WP;
        assert!(paging.translate(&m, GVA, Access::Write).is_ok());
    }

    #[test]
    fn entries_are_marked_as_the_processor_does() {
        let m = memory();
        let entry = |level: u64| {
            let index = (GVA.0 >> (12 + 9 * (level - 1))) & 0x1ff;
            let at = TABLES + (4 - level) * 0x1000 + index * 8;
            m.read_entry(Gpa(at)).expect("RAM") & (PTE_ACCESSED | PTE_DIRTY)
        };
        four_levels(&m, 0x5000, PTE_PRESENT);
        assert!(long_mode(0).translate(&m, GVA, Access::Write).is_err());
        assert_eq!([1, 2, 3, 4].map(entry), [0; 4], "a fault marks nothing");
        assert!(long_mode(0).translate(&m, GVA, Access::Read).is_ok());
        assert_eq!([1, 2, 3, 4].map(entry), [PTE_ACCESSED; 4]);
        four_levels(&m, 0x5000, RW);
        assert!(long_mode(0).translate(&m, GVA, Access::Write).is_ok());
        assert_eq!(entry(1), PTE_ACCESSED | PTE_DIRTY);
        assert_eq!([2, 3, 4].map(entry), [PTE_ACCESSED; 3]);
        // In 32-bit paging, too, and only in the entry's own four bytes.
        let mut paging = long_mode(0);
        (paging.cr4, paging.efer) = (CR4_PSE, 0);
        m.write_u64(Gpa(TABLES), u64::from(u32::MAX) << 32 | RW | PTE_LARGE)
            .expect("RAM");
        assert!(paging.translate(&m, Gva(0x1234), Access::Write).is_ok());
        let marked = RW | PTE_LARGE | PTE_ACCESSED | PTE_DIRTY;
        assert_eq!(
            m.read_entry(Gpa(TABLES)),
            Ok(u64::from(u32::MAX) << 32 | marked)
        );
    }
}
