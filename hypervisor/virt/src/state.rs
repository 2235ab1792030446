//! Guest register state in vendor-neutral form.

use bitfield_struct::bitfield;

/// General-purpose registers by their encoding (SDM vol. 2A, table 3-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "register names say it all")]
pub enum Gpr {
    Rax = 0,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// All registers, by encoding.
    pub const ALL: [Gpr; 16] = [
        Gpr::Rax,
        Gpr::Rcx,
        Gpr::Rdx,
        Gpr::Rbx,
        Gpr::Rsp,
        Gpr::Rbp,
        Gpr::Rsi,
        Gpr::Rdi,
        Gpr::R8,
        Gpr::R9,
        Gpr::R10,
        Gpr::R11,
        Gpr::R12,
        Gpr::R13,
        Gpr::R14,
        Gpr::R15,
    ];
}

/// Segment registers and the two system segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(missing_docs, reason = "register names say it all")]
pub enum SegmentName {
    Es = 0,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
    Ldtr,
    Tr,
}

impl SegmentName {
    /// All of them, in the order of [`CpuState::segments`].
    pub const ALL: [SegmentName; 8] = [
        SegmentName::Es,
        SegmentName::Cs,
        SegmentName::Ss,
        SegmentName::Ds,
        SegmentName::Fs,
        SegmentName::Gs,
        SegmentName::Ldtr,
        SegmentName::Tr,
    ];
}

/// Access rights of a segment, in the layout of the VMCS (SDM vol. 3C, table 25-2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AccessRights {
    /// Type field of the descriptor.
    #[bits(4)]
    pub kind: u8,
    /// S: code or data (1), system (0).
    pub code_or_data: bool,
    /// DPL.
    #[bits(2)]
    pub dpl: u8,
    /// P.
    pub present: bool,
    #[bits(4)]
    __: u8,
    /// AVL.
    pub available: bool,
    /// L: 64-bit code segment.
    pub long: bool,
    /// D/B: default operation size.
    pub default_big: bool,
    /// G: limit in 4 KiB units.
    pub granularity: bool,
    /// The segment is unusable (null).
    pub unusable: bool,
    #[bits(15)]
    __: u32,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (already scaled by G).
    pub limit: u32,
    /// Access rights.
    pub rights: AccessRights,
}

impl Segment {
    /// A code or data segment from 0 to 4 GiB with this type field; `long`: for 64-bit code.
    pub fn flat(selector: u16, kind: u8, long: bool) -> Self {
        Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            rights: AccessRights::new()
                .with_kind(kind)
                .with_code_or_data(true)
                .with_present(true)
                .with_long(long)
                .with_default_big(!long)
                .with_granularity(true),
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Processor mode, from CR0.PE, EFER.LMA, RFLAGS.VM and CS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the manuals'")]
pub enum CpuMode {
    Real,
    Virtual8086,
    Protected16,
    Protected32,
    Compatibility16,
    Compatibility32,
    Long64,
}

/// All of a vCPU's architectural state that lives in hardware structures, for set-up and dumps.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuState {
    /// General-purpose registers by encoding.
    pub gprs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Control registers as the guest sees them.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// As the guest sees it.
    pub cr4: u64,
    /// IA32_EFER as the guest sees it.
    pub efer: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR by [`SegmentName`].
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
}

impl CpuState {
    /// State after power-up or RESET (SDM vol. 3A, table 10-1): real mode at F000:FFF0.
    pub fn reset() -> Self {
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            rights: AccessRights::new()
                .with_kind(3)
                .with_code_or_data(true)
                .with_present(true),
        };
        let mut segments = [data; 8];
        segments[SegmentName::Cs as usize] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            rights: data.rights.with_kind(0xb),
        };
        segments[SegmentName::Ldtr as usize].rights =
            AccessRights::new().with_kind(2).with_present(true);
        segments[SegmentName::Tr as usize].rights =
            AccessRights::new().with_kind(0xb).with_present(true);
        CpuState {
            gprs: [0; 16],
            rip: 0xfff0,
            rflags: 2,
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            segments,
            gdtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
        }
    }
}

/// Whether a page-directory-pointer entry of PAE paging can be loaded: not present, or without
/// reserved bits (SDM vol. 3A, table 4-8). `physical_bits`: width of physical addresses.
pub const fn pdpte_is_valid(entry: u64, physical_bits: u8) -> bool {
    const PRESENT: u64 = 1 << 0;
    const RESERVED: u64 = 0b11 << 1 | 0b1111 << 5;
    let beyond = if physical_bits < 64 {
        u64::MAX << physical_bits
    } else {
        0
    };
    entry & PRESENT == 0 || entry & (RESERVED | beyond) == 0
}

/// Which instruction raised a software event (SDM vol. 3C, table 25-16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftwareEvent {
    /// INT n.
    Interrupt,
    /// INT1.
    Int1,
    /// INT3 or INTO.
    Exception,
}

/// An event to deliver at the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A maskable interrupt from the local APIC or the PIC.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// A hardware exception; for #PF set CR2 first.
    Exception {
        /// Vector, 0 to 31.
        vector: u8,
        /// Error code, where the vector pushes one.
        error_code: Option<u32>,
    },
    /// An INT instruction whose delivery an exit interrupted. Only the backend makes these;
    /// when one is cancelled, the guest executes the instruction again.
    Software {
        /// Vector.
        vector: u8,
        /// The instruction.
        kind: SoftwareEvent,
        /// Bytes of the instruction, 1 to 15: the guest returns behind it.
        length: u8,
    },
}

/// What holds interrupts back until the next instruction has been executed (SDM vol. 3A, section 6.8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shadow {
    /// STI that has set IF.
    Sti,
    /// MOV or POP to SS: holds back debug traps, too.
    MovSs,
}

#[cfg(test)]
mod tests {
    use super::pdpte_is_valid;

    #[test]
    fn reserved_bits_make_a_present_pdpte_invalid() {
        assert!(pdpte_is_valid(0x1000 | 0b1_1001 | 0xe00, 40));
        assert!(pdpte_is_valid(u64::MAX - 1, 40), "not present: all ignored");
        for bit in [1, 2, 5, 8, 40, 63] {
            assert!(!pdpte_is_valid(1 | 1 << bit, 40), "bit {bit}");
        }
        assert!(pdpte_is_valid(1 | 1 << 40, 46));
    }
}
