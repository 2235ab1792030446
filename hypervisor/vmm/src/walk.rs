//! The guest's own page tables, walked in software: guest-virtual to guest-physical.
//!
//! Used only to emulate an instruction: to fetch its bytes and to reach its operands. Covers
//! no paging, 32-bit, PAE, 4-level and 5-level paging with the access checks of SDM vol. 3A,
//! section 4.6. Entries are read once each; a table outside the guest's RAM reads as zero
//! (not present). Accessed and dirty bits are not set: the processor's own walk has set
//! accessed bits before the exit that leads here, and MMIO pages need no dirty bit.

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
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITE: u64 = 1 << 1;
const PTE_USER: u64 = 1 << 2;
const PTE_LARGE: u64 = 1 << 7;
const PTE_NX: u64 = 1 << 63;
const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

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
}

impl Paging {
    /// Reads it off a vCPU.
    pub fn of<V: VirtualCpu>(cpu: &V) -> Self {
        Paging {
            cr0: cpu.cr0(),
            cr3: cpu.cr3(),
            cr4: cpu.cr4(),
            efer: cpu.efer(),
            rflags: cpu.rflags(),
            cpl: cpu.cpl(),
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
        let user = self.cpl == 3;
        let nx = self.efer & EFER_NXE != 0;
        let fault = |present: bool| {
            let mut code = u32::from(present);
            code |= u32::from(access == Access::Write) << 1;
            code |= u32::from(user) << 2;
            if access == Access::Fetch && (nx || self.cr4 & CR4_SMEP != 0) {
                code |= 1 << 4;
            }
            PageFault {
                address: gva,
                error_code: code,
            }
        };

        let wide = self.cr4 & CR4_PAE != 0;
        let (levels, index_bits, mut table) = match (self.long_mode(), wide) {
            (true, _) if self.cr4 & CR4_LA57 != 0 => (5, 9, self.cr3 & PTE_ADDRESS),
            (true, _) => (4, 9, self.cr3 & PTE_ADDRESS),
            (false, true) => (3, 9, self.cr3 & 0xffff_ffe0),
            (false, false) => (2, 10, self.cr3 & 0xffff_f000),
        };
        let linear = if self.long_mode() {
            gva.0
        } else {
            gva.0 & 0xffff_ffff
        };
        // Rights that every entry grants, and bits that any entry has.
        let (mut granted, mut any) = (PTE_WRITE | PTE_USER, 0);
        for level in (1..=levels).rev() {
            let shift = 12 + index_bits * (level - 1);
            let index = (linear >> shift) & ((1 << index_bits) - 1);
            let entry = if wide || self.long_mode() {
                memory.read_entry(Gpa(table + index * 8)).unwrap_or(0)
            } else {
                memory.read_u32(Gpa(table + index * 4)).map_or(0, u64::from)
            };
            if entry & PTE_PRESENT == 0 {
                return Err(fault(false));
            }
            // The four PDPTEs of PAE paging have no R/W, U/S or XD bits.
            if !(level == 3 && levels == 3) {
                granted &= entry;
                any |= entry;
            }
            let leaf = level == 1
                || entry & PTE_LARGE != 0
                    && match level {
                        2 => levels > 2 || self.cr4 & CR4_PSE != 0,
                        3 => levels > 3,
                        _ => false,
                    };
            if !leaf {
                table = entry
                    & if index_bits == 10 {
                        0xffff_f000
                    } else {
                        PTE_ADDRESS
                    };
                continue;
            }
            let writable = granted & PTE_WRITE != 0;
            let user_page = granted & PTE_USER != 0;
            let no_execute = nx && any & PTE_NX != 0;
            if !self.permits(access, user, writable, user_page, no_execute) {
                return Err(fault(true));
            }
            let page_mask = (1u64 << shift) - 1;
            let base = if index_bits == 10 && level == 2 {
                // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
                (entry & 0xffc0_0000) | ((entry >> 13) & 0xff) << 32
            } else {
                entry & PTE_ADDRESS & !page_mask
            };
            return Ok(Gpa(base | (linear & page_mask)));
        }
        Err(fault(false))
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
    fn tables_outside_ram_are_not_present() {
        let m = memory();
        let mut paging = long_mode(0);
        paging.cr3 = 0xfee0_0000;
        let fault = paging
            .translate(&m, GVA, Access::Read)
            .expect_err("a fault");
        assert_eq!(fault.error_code, 0);
    }
}
