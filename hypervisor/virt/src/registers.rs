//! A guest's registers, as both vendors' processors have them.

use crate::state::{CpuMode, CpuState, DescriptorTable, Gpr, Segment, SegmentName};

/// The registers of a vCPU that is loaded.
///
/// A register that the guest could not have set itself (reserved bits) must be refused by
/// the caller before it gets here; the VMM does, with #GP.
pub trait Registers {
    /// A general-purpose register, RSP included.
    fn gpr(&self, gpr: Gpr) -> u64;
    /// Sets a general-purpose register, RSP included.
    fn set_gpr(&mut self, gpr: Gpr, value: u64);
    /// Instruction pointer (offset in CS).
    fn rip(&self) -> u64;
    /// Sets the instruction pointer.
    fn set_rip(&mut self, rip: u64);
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Sets RFLAGS.
    fn set_rflags(&mut self, rflags: u64);
    /// A segment register with its hidden part.
    fn segment(&self, name: SegmentName) -> Segment;
    /// Sets a segment register with its hidden part.
    fn set_segment(&mut self, name: SegmentName, segment: Segment);
    /// CR0 as the guest sees it.
    fn cr0(&self) -> u64;
    /// Sets CR0 as the guest sees it. EFER.LMA and the IA-32e entry control follow (SDM vol. 3A, section 10.8.5).
    fn set_cr0(&mut self, value: u64);
    /// CR2.
    fn cr2(&self) -> u64;
    /// Sets CR2.
    fn set_cr2(&mut self, value: u64);
    /// CR3.
    fn cr3(&self) -> u64;
    /// Sets CR3 and drops the guest's cached non-global translations.
    fn set_cr3(&mut self, value: u64);
    /// CR4 as the guest sees it.
    fn cr4(&self) -> u64;
    /// Sets CR4 as the guest sees it.
    fn set_cr4(&mut self, value: u64);
    /// IA32_EFER as the guest sees it (no SVME).
    fn efer(&self) -> u64;
    /// Sets IA32_EFER as the guest sees it; LMA follows from LME and CR0.PG.
    fn set_efer(&mut self, value: u64);
    /// DR6 as the guest sees it.
    fn dr6(&self) -> u64;
    /// Sets DR6 (the VMM sets BS when it steps over an instruction with RFLAGS.TF set).
    fn set_dr6(&mut self, value: u64);
    /// DR7.
    fn dr7(&self) -> u64;
    /// Sets DR7 (a hardware task switch clears its local breakpoints).
    fn set_dr7(&mut self, value: u64);
    /// DR0 to DR3: the breakpoints' addresses.
    fn breakpoints(&self) -> [u64; 4];
    /// Sets DR0 to DR3.
    fn set_breakpoints(&mut self, addresses: [u64; 4]);
    /// An XMM register, 0 to 15, and above it the upper half of its YMM register, or zeros where there is none.
    /// Slow: goes by way of memory.
    fn vector(&mut self, number: u8) -> [u8; 32];
    /// Sets an XMM register and, where there is one, the upper half of its YMM register. As slow.
    fn set_vector(&mut self, number: u8, value: &[u8; 32]);
    /// An MMX register, 0 to 7. As slow.
    fn mmx(&mut self, number: u8) -> u64;
    /// Sets an MMX register and, as MMX instructions do, marks all as in use. As slow.
    fn set_mmx(&mut self, number: u8, value: u64);
    /// The state of x87 and SSE as FXSAVE64 stores it (SDM vol. 1, table 10-3). As slow.
    fn legacy_fpu(&mut self) -> [u8; 512];
    /// Sets that state. MXCSR must have no bit that the stored mask has not; the mask itself and what is behind
    /// XMM15 are not taken. As slow.
    fn set_legacy_fpu(&mut self, image: &[u8; 512]);
    /// PKRU; 0 where there is none.
    fn pkru(&self) -> u32;
    /// XCR0.
    fn xcr0(&self) -> u64;
    /// Sets XCR0, already checked by the caller.
    fn set_xcr0(&mut self, value: u64);
    /// GDTR.
    fn gdtr(&self) -> DescriptorTable;
    /// IDTR.
    fn idtr(&self) -> DescriptorTable;
    /// Sets GDTR.
    fn set_gdtr(&mut self, table: DescriptorTable);
    /// Sets IDTR.
    fn set_idtr(&mut self, table: DescriptorTable);
    /// Everything, for a dump or to start from.
    fn state(&self) -> CpuState;
    /// Sets everything: reset, boot protocol entry, start-up IPI.
    fn set_state(&mut self, state: &CpuState);

    /// A guest MSR that the hardware switches (FS/GS/KERNEL_GS base, STAR, LSTAR, CSTAR, SFMASK,
    /// SYSENTER_*, PAT, TSC_AUX, SPEC_CTRL, DEBUGCTL); `None` for any other. Most of these don't exit.
    fn msr(&self, number: u32) -> Option<u64>;
    /// Sets such an MSR. `false`: not one of them.
    fn set_msr(&mut self, number: u32, value: u64) -> bool;

    /// Processor mode now.
    fn mode(&self) -> CpuMode {
        let cs = self.segment(SegmentName::Cs);
        if self.cr0() & 1 == 0 {
            CpuMode::Real
        } else if self.rflags() & (1 << 17) != 0 {
            CpuMode::Virtual8086
        } else if self.efer() & (1 << 10) != 0 {
            match (cs.rights.long(), cs.rights.default_big()) {
                (true, _) => CpuMode::Long64,
                (false, true) => CpuMode::Compatibility32,
                (false, false) => CpuMode::Compatibility16,
            }
        } else if cs.rights.default_big() {
            CpuMode::Protected32
        } else {
            CpuMode::Protected16
        }
    }

    /// The current privilege level if the vCPU executes 64-bit code, else `None`: `mode` and `cpl` in few
    /// instructions, for the exits that a driver makes all the time.
    fn cpl_of_64_bit_code(&self) -> Option<u8> {
        (self.mode() == CpuMode::Long64).then(|| self.cpl())
    }

    /// Current privilege level, 0 to 3 (SS.DPL).
    fn cpl(&self) -> u8 {
        match self.mode() {
            CpuMode::Real => 0,
            CpuMode::Virtual8086 => 3,
            _ => self.segment(SegmentName::Ss).rights.dpl(),
        }
    }
}
