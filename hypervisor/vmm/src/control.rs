//! Control registers, EFER and XCR0: the checks of MOV to CRn, WRMSR and XSETBV.
//!
//! What the processor would refuse is refused here with #GP(0), and so is every bit of a
//! feature that the guest is not shown. Sources: SDM vol. 3A, sections 2.5 and 4.1, vol. 2B
//! (MOV to control registers), vol. 3A section 13.3 (XCR0); APM vol. 2, sections 3.1 and 11.5.2.

use mem::{Gpa, guest::GuestMemory};
use virt::{SegmentName, VirtualCpu, pdpte_is_valid};

use crate::cpuid::{CpuidPolicy, XsaveComponents};
use crate::emulate::Exception;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// PE, MP, EM, TS, NE, WP, AM, NW, CD, PG: the bits of CR0 that can be written.
const CR0_WRITABLE: u64 = 0xe005_002f;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_SMEP: u64 = 1 << 20;
const CR4_PCIDE: u64 = 1 << 17;
const CR3_NO_FLUSH: u64 = 1 << 63;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const GP: Exception = Exception::GENERAL_PROTECTION;

/// What the checks look at beyond the register: the guest's processor model and its memory.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// What the guest is shown.
    pub policy: &'a CpuidPolicy,
    /// Where page tables are.
    pub memory: &'a GuestMemory,
}

impl Context<'_> {
    /// Loads the page-directory-pointer entries at `cr3`, as a change of PAE paging does (SDM vol. 3A,
    /// section 4.4.1), where the processor does. Outside RAM there are only ones.
    fn check_pdptes<V: VirtualCpu>(self, cr3: u64) -> Result<(), Exception> {
        if !V::LOADS_PDPTES {
            return Ok(());
        }
        let table = cr3 & 0xffff_ffe0;
        for number in 0..4 {
            let entry = self.memory.read_entry(Gpa(table + 8 * number));
            if !pdpte_is_valid(entry.unwrap_or(u64::MAX), self.policy.physical_bits()) {
                return Err(GP);
            }
        }
        Ok(())
    }
}

/// MOV to CR0.
///
/// # Errors
/// #GP(0) as the processor.
pub fn write_cr0<V: VirtualCpu>(
    cpu: &mut V,
    context: Context<'_>,
    value: u64,
) -> Result<(), Exception> {
    let old = cpu.cr0();
    let (efer, cr4) = (cpu.efer(), cpu.cr4());
    let (pg, pe) = (value & CR0_PG != 0, value & CR0_PE != 0);
    let long_code = cpu.segment(SegmentName::Cs).rights.long();
    if value >> 32 != 0 || (pg && !pe) || (value & CR0_NW != 0 && value & CR0_CD == 0) {
        return Err(GP);
    }
    let enters_paging = pg && old & CR0_PG == 0;
    if enters_paging && efer & EFER_LME != 0 {
        // A 16-bit TSS has no place in IA-32e mode (SDM vol. 3A, section 10.8.5.1).
        let tss = cpu.segment(SegmentName::Tr).rights;
        let small_tss = !tss.unusable() && matches!(tss.kind(), 1 | 3);
        if cr4 & CR4_PAE == 0 || long_code || small_tss {
            return Err(GP);
        }
    }
    let loads_pdptes = (old ^ value) & (CR0_PG | CR0_CD | CR0_NW) != 0;
    if loads_pdptes && pg && cr4 & CR4_PAE != 0 && efer & EFER_LME == 0 {
        context.check_pdptes::<V>(cpu.cr3())?;
    }
    if !pg && old & CR0_PG != 0 {
        let in_64_bit = efer & EFER_LMA != 0 && long_code;
        if in_64_bit || cr4 & CR4_PCIDE != 0 {
            return Err(GP);
        }
    }
    cpu.set_cr0((value & CR0_WRITABLE) | CR0_ET);
    if (old ^ value) & CR0_PG != 0 {
        cpu.flush_guest_tlb();
    }
    Ok(())
}

/// MOV to CR3.
///
/// # Errors
/// #GP(0) for bits beyond the guest's physical address width, and in PAE paging for bad
/// page-directory-pointer entries.
pub fn write_cr3<V: VirtualCpu>(
    cpu: &mut V,
    context: Context<'_>,
    value: u64,
) -> Result<(), Exception> {
    let mut value = value;
    if cpu.cr4() & CR4_PCIDE != 0 {
        value &= !CR3_NO_FLUSH;
    }
    let long = cpu.efer() & EFER_LMA != 0;
    if long && value >> context.policy.physical_bits().min(63) != 0 {
        return Err(GP);
    }
    if !long && cpu.cr0() & CR0_PG != 0 && cpu.cr4() & CR4_PAE != 0 {
        context.check_pdptes::<V>(value)?;
    }
    cpu.set_cr3(value);
    Ok(())
}

/// MOV to CR4.
///
/// # Errors
/// #GP(0) as the processor, and for features that the guest is not shown.
pub fn write_cr4<V: VirtualCpu>(
    cpu: &mut V,
    context: Context<'_>,
    value: u64,
) -> Result<(), Exception> {
    let old = cpu.cr4();
    let long = cpu.efer() & EFER_LMA != 0;
    if value & !context.policy.cr4_allowed() != 0 || (long && value & CR4_PAE == 0) {
        return Err(GP);
    }
    let sets_pcide = value & CR4_PCIDE != 0 && old & CR4_PCIDE == 0;
    if sets_pcide && (!long || cpu.cr3() & 0xfff != 0) {
        return Err(GP);
    }
    const LOADS_PDPTES: u64 = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP;
    let pae_paging = cpu.cr0() & CR0_PG != 0 && !long && value & CR4_PAE != 0;
    if pae_paging && (old ^ value) & LOADS_PDPTES != 0 {
        context.check_pdptes::<V>(cpu.cr3())?;
    }
    cpu.set_cr4(value);
    // PSE, PAE, PGE, PCIDE, SMEP, SMAP, PKE change how translations are formed (SDM vol. 3A, 4.10.4.1).
    const TRANSLATION: u64 =
        (1 << 4) | (1 << 5) | (1 << 7) | (1 << 17) | (1 << 20) | (1 << 21) | (1 << 22);
    if (old ^ value) & TRANSLATION != 0 {
        cpu.flush_guest_tlb();
    }
    Ok(())
}

/// WRMSR to IA32_EFER.
///
/// # Errors
/// #GP(0) for reserved bits and for LME changed while paging is on.
pub fn write_efer<V: VirtualCpu>(
    cpu: &mut V,
    policy: &CpuidPolicy,
    value: u64,
) -> Result<(), Exception> {
    let old = cpu.efer();
    if value & !policy.efer_allowed() != 0 {
        return Err(GP);
    }
    if (old ^ value) & EFER_LME != 0 && cpu.cr0() & CR0_PG != 0 {
        return Err(GP);
    }
    // LMA is the processor's.
    cpu.set_efer((value & !EFER_LMA) | (old & EFER_LMA));
    if old ^ value != 0 {
        cpu.flush_guest_tlb();
    }
    Ok(())
}

/// XSETBV with ECX = 0.
///
/// # Errors
/// #GP(0) for components that the guest is not shown, or not in the order that they build on each other.
pub fn write_xcr0<V: VirtualCpu>(
    cpu: &mut V,
    policy: &CpuidPolicy,
    value: u64,
) -> Result<(), Exception> {
    let wanted = XsaveComponents::from_bits_retain(value);
    let legal = policy.xsave_components().contains(wanted)
        && wanted.contains(XsaveComponents::X87)
        && (!wanted.contains(XsaveComponents::AVX) || wanted.contains(XsaveComponents::SSE));
    if !legal {
        return Err(GP);
    }
    cpu.set_xcr0(value);
    Ok(())
}
