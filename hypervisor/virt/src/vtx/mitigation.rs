//! What a guest could read or steer across the border of VMX operation, and what is done about it.
//!
//! Chosen once, from what the processor enumerates (SDM vol. 2A, CPUID leaf 7; vol. 4,
//! IA32_ARCH_CAPABILITIES). A processor that is not affected pays nothing: the measures hang on work
//! that is due at times anyway, or on another landing place after an exit.
//!
//! - Data buffers (MDS; TAA where there is TSX; RFDS): VERW before each entry. Stale data of device memory (FBSDP and
//!   others) is for those who reach such memory, which guests do not.
//! - Level-1 data cache (L1TF): flushed before the first entry after a vCPU is loaded, when other VMs' data may
//!   be in it. What the host itself touches between two entries of one vCPU is that VM's.
//! - Return predictions: filled after each exit where enhanced IBRS does not separate them, or not from a RET that
//!   comes too early (PBRSB).
//! - Branch predictions: a barrier between VMs (`Shared::separate_predictions`), and IBRS always on where it is
//!   enhanced. On older processors the host's own indirect branches are not protected.

use core::arch::asm;

use bitflags::bitflags;

use crate::cpu::{msr, wrmsr};

bitflags! {
    /// Leaf 7, sub-leaf 0, EDX.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Leaf7Edx: u32 {
        /// VERW clears data buffers.
        const MD_CLEAR = 1 << 10;
        /// IA32_SPEC_CTRL.IBRS and IA32_PRED_CMD.
        const IBRS = 1 << 26;
        /// IA32_FLUSH_CMD.
        const L1D_FLUSH = 1 << 28;
        /// IA32_ARCH_CAPABILITIES.
        const ARCH_CAPABILITIES = 1 << 29;
    }

    /// Leaf 7, sub-leaf 0, EBX.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Leaf7Ebx: u32 {
        /// TSX: guests can begin transactions, though CPUID hides that.
        const RTM = 1 << 11;
    }

    /// IA32_ARCH_CAPABILITIES (SDM vol. 4, table 2-2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ArchCapabilities: u64 {
        /// Not affected by L1TF.
        const RDCL_NO = 1 << 0;
        /// IBRS is enhanced: set once, it stays.
        const IBRS_ALL = 1 << 1;
        /// A hypervisor need not flush the cache.
        const SKIP_L1D_FLUSH = 1 << 3;
        /// Not affected by MDS.
        const MDS_NO = 1 << 5;
        /// Not affected by TAA.
        const TAA_NO = 1 << 8;
        /// Not affected by PBRSB.
        const PBRSB_NO = 1 << 24;
        /// Not affected by RFDS.
        const RFDS_NO = 1 << 27;
        /// Affected by RFDS, and VERW clears those registers, too.
        const RFDS_CLEAR = 1 << 28;
    }
}

/// What a processor says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enumerated {
    /// Leaf 7, sub-leaf 0, EBX.
    pub ebx: Leaf7Ebx,
    /// Leaf 7, sub-leaf 0, EDX.
    pub edx: Leaf7Edx,
    /// IA32_ARCH_CAPABILITIES; empty where there is none.
    pub capabilities: ArchCapabilities,
}

/// IA32_ARCH_CAPABILITIES.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_FLUSH_CMD, and its only command.
const FLUSH_CMD: u32 = 0x10b;
const FLUSH_L1D: u64 = 1;
/// IA32_SPEC_CTRL.IBRS.
const IBRS: u64 = 1;

/// The measures in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mitigations {
    /// VERW before each entry.
    pub clear_buffers: bool,
    /// The level-1 data cache is flushed after a load.
    pub flush_l1d: bool,
    /// Return predictions are filled after each exit.
    pub fill_returns: bool,
    /// IA32_SPEC_CTRL.IBRS stays set, for host and guests.
    pub ibrs_always: bool,
}

impl Mitigations {
    /// What a processor with these features needs.
    pub fn choose(processor: Enumerated) -> Self {
        let Enumerated {
            ebx,
            edx: features,
            capabilities,
        } = processor;
        let ibrs = features.contains(Leaf7Edx::IBRS);
        let ibrs_always = ibrs && capabilities.contains(ArchCapabilities::IBRS_ALL);
        let no_l1tf = ArchCapabilities::RDCL_NO | ArchCapabilities::SKIP_L1D_FLUSH;
        let lacks = |bit| !capabilities.contains(bit);
        let mds = lacks(ArchCapabilities::MDS_NO);
        let taa = ebx.contains(Leaf7Ebx::RTM) && lacks(ArchCapabilities::TAA_NO);
        let rfds =
            capabilities.contains(ArchCapabilities::RFDS_CLEAR) && lacks(ArchCapabilities::RFDS_NO);
        Mitigations {
            clear_buffers: features.contains(Leaf7Edx::MD_CLEAR) && (mds || taa || rfds),
            flush_l1d: features.contains(Leaf7Edx::L1D_FLUSH) && !capabilities.intersects(no_l1tf),
            // Only processors with the microcode of these measures: others leave more open than this.
            fill_returns: ibrs
                && !(ibrs_always && capabilities.contains(ArchCapabilities::PBRSB_NO)),
            ibrs_always,
        }
    }

    /// Turns on, on the calling pCPU, what stays on.
    ///
    /// # Safety
    /// The processor is one that these were chosen for.
    pub unsafe fn enable(self) {
        if self.ibrs_always {
            // SAFETY: the processor reports the register (`choose`).
            unsafe { wrmsr(msr::SPEC_CTRL, IBRS) };
        }
    }
}

/// Clears the processor's data buffers.
///
/// # Safety
/// The data segment register holds a writable segment's selector, as all of the kernel's do.
pub unsafe fn clear_buffers() {
    let selector: u16;
    // SAFETY: reads DS; VERW reads its descriptor and changes flags only.
    unsafe {
        asm!("mov {0:x}, ds", out(reg) selector, options(nomem, nostack, preserves_flags));
        // Only the form with a memory operand clears the buffers (SDM vol. 2B, VERW).
        asm!("verw word ptr [{}]", in(reg) &selector, options(nostack));
    }
}

/// Writes back and empties the level-1 data cache.
///
/// # Safety
/// The processor reports IA32_FLUSH_CMD.
pub unsafe fn flush_l1d() {
    // SAFETY: by the caller's promise the register is there.
    unsafe { wrmsr(FLUSH_CMD, FLUSH_L1D) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(ebx: Leaf7Ebx, edx: Leaf7Edx, capabilities: ArchCapabilities) -> Mitigations {
        Mitigations::choose(Enumerated {
            ebx,
            edx,
            capabilities,
        })
    }

    #[test]
    fn only_affected_processors_pay() {
        let none = Mitigations::default();
        let (no_tsx, all) = (Leaf7Ebx::empty(), Leaf7Edx::all());
        let caps = ArchCapabilities::empty();
        assert_eq!(choose(no_tsx, Leaf7Edx::empty(), caps), none);
        // Skylake: all of it.
        let skylake = choose(Leaf7Ebx::RTM, all, caps);
        assert!(skylake.clear_buffers && skylake.flush_l1d && skylake.fill_returns);
        assert!(!skylake.ibrs_always);
        // One that nothing is wrong with: nothing but enhanced IBRS.
        let sound = ArchCapabilities::RDCL_NO
            | ArchCapabilities::IBRS_ALL
            | ArchCapabilities::MDS_NO
            | ArchCapabilities::TAA_NO
            | ArchCapabilities::PBRSB_NO
            | ArchCapabilities::RFDS_NO;
        let enhanced = Mitigations {
            ibrs_always: true,
            ..none
        };
        assert_eq!(choose(Leaf7Ebx::RTM, all, sound), enhanced);
        // A hypervisor below that flushes by itself.
        let nested = choose(no_tsx, all, ArchCapabilities::SKIP_L1D_FLUSH);
        assert!(!nested.flush_l1d && nested.clear_buffers);
    }

    #[test]
    fn each_leak_has_its_measure() {
        let rest =
            ArchCapabilities::MDS_NO | ArchCapabilities::RDCL_NO | ArchCapabilities::IBRS_ALL;
        let (no_tsx, all) = (Leaf7Ebx::empty(), Leaf7Edx::all());
        // Cascade Lake: MDS is mended, TSX leaks the same buffers, if it is on.
        assert!(choose(Leaf7Ebx::RTM, all, rest).clear_buffers);
        assert!(!choose(no_tsx, all, rest).clear_buffers);
        // Gracemont.
        let atom = rest | ArchCapabilities::RFDS_CLEAR;
        assert!(choose(no_tsx, all, atom).clear_buffers);
        assert!(!choose(no_tsx, all, atom | ArchCapabilities::RFDS_NO).clear_buffers);
        // Enhanced IBRS, but for the first RET.
        assert!(choose(no_tsx, all, rest).fill_returns);
        assert!(!choose(no_tsx, all, rest | ArchCapabilities::PBRSB_NO).fill_returns);
    }
}
