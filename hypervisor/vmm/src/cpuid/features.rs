//! Feature bits that Plinth can show, the baseline among them, and the names of those with a switch.

use bitflags::bitflags;

bitflags! {
    /// Leaf 1 ECX: what Plinth passes on from the host.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf1Ecx: u32 {
        const SSE3 = 1 << 0;
        const PCLMULQDQ = 1 << 1;
        const SSSE3 = 1 << 9;
        const FMA = 1 << 12;
        const CX16 = 1 << 13;
        const PCID = 1 << 17;
        const SSE4_1 = 1 << 19;
        const SSE4_2 = 1 << 20;
        const X2APIC = 1 << 21;
        const MOVBE = 1 << 22;
        const POPCNT = 1 << 23;
        const TSC_DEADLINE = 1 << 24;
        const AES = 1 << 25;
        const XSAVE = 1 << 26;
        const OSXSAVE = 1 << 27;
        const AVX = 1 << 28;
        const F16C = 1 << 29;
        const RDRAND = 1 << 30;
        const HYPERVISOR = 1 << 31;
    }

    /// Leaf 1 EDX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf1Edx: u32 {
        const FPU = 1 << 0;
        const VME = 1 << 1;
        const DE = 1 << 2;
        const PSE = 1 << 3;
        const TSC = 1 << 4;
        const MSR = 1 << 5;
        const PAE = 1 << 6;
        const MCE = 1 << 7;
        const CX8 = 1 << 8;
        const APIC = 1 << 9;
        const SEP = 1 << 11;
        const MTRR = 1 << 12;
        const PGE = 1 << 13;
        const MCA = 1 << 14;
        const CMOV = 1 << 15;
        const PAT = 1 << 16;
        const PSE36 = 1 << 17;
        const CLFSH = 1 << 19;
        const MMX = 1 << 23;
        const FXSR = 1 << 24;
        const SSE = 1 << 25;
        const SSE2 = 1 << 26;
        const HTT = 1 << 28;
    }

    /// Leaf 7, sub-leaf 0, EBX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Ebx: u32 {
        const FSGSBASE = 1 << 0;
        const TSC_ADJUST = 1 << 1;
        const BMI1 = 1 << 3;
        const AVX2 = 1 << 5;
        const SMEP = 1 << 7;
        const BMI2 = 1 << 8;
        const ERMS = 1 << 9;
        const INVPCID = 1 << 10;
        const RDSEED = 1 << 18;
        const ADX = 1 << 19;
        const SMAP = 1 << 20;
        /// Withdrawn before any processor had it, but emulated by QEMU.
        const PCOMMIT = 1 << 22;
        const CLFLUSHOPT = 1 << 23;
        const CLWB = 1 << 24;
        const SHA = 1 << 29;
    }

    /// Leaf 7, sub-leaf 0, ECX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Ecx: u32 {
        const UMIP = 1 << 2;
        const PKU = 1 << 3;
        const OSPKE = 1 << 4;
        const VAES = 1 << 9;
        const VPCLMULQDQ = 1 << 10;
        const RDPID = 1 << 22;
    }

    /// Leaf 7, sub-leaf 0, EDX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Leaf7Edx: u32 {
        const FSRM = 1 << 4;
        const MD_CLEAR = 1 << 10;
        const SERIALIZE = 1 << 14;
        /// IA32_SPEC_CTRL with IBRS, and IA32_PRED_CMD.
        const IBRS = 1 << 26;
        const STIBP = 1 << 27;
        const SSBD = 1 << 31;
    }

    /// IA32_ARCH_CAPABILITIES (SDM vol. 4, table 2-2): what a guest may be told of the host's. Left out are the bits
    /// of registers that it does not have.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct ArchCapabilities: u64 {
        const RDCL_NO = 1 << 0;
        /// Of use with [`Leaf7Edx::IBRS`] only.
        const IBRS_ALL = 1 << 1;
        const RSBA = 1 << 2;
        /// A hypervisor need not flush the level-1 data cache: Plinth does it, where it is needed.
        const SKIP_L1DFL_VMENTRY = 1 << 3;
        const SSB_NO = 1 << 4;
        const MDS_NO = 1 << 5;
        const IF_PSCHANGE_MC_NO = 1 << 6;
        const TAA_NO = 1 << 8;
        const SBDR_SSDP_NO = 1 << 13;
        const FBSDP_NO = 1 << 14;
        const PSDP_NO = 1 << 15;
        const FB_CLEAR = 1 << 17;
        const RRSBA = 1 << 19;
        const BHI_NO = 1 << 20;
        const PBRSB_NO = 1 << 24;
        const GDS_NO = 1 << 26;
        const RFDS_NO = 1 << 27;
        const RFDS_CLEAR = 1 << 28;
        const ITS_NO = 1 << 62;
    }

    /// Leaf 0xD, sub-leaf 1, EAX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct XsaveEax: u32 {
        const XSAVEOPT = 1 << 0;
        const XSAVEC = 1 << 1;
        const XGETBV1 = 1 << 2;
        /// With IA32_XSS, in which a guest can enable nothing: no component of its is a supervisor's.
        const XSAVES = 1 << 3;
    }

    /// Leaf 0x8000_0001 ECX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Ext1Ecx: u32 {
        const LAHF_SAHF = 1 << 0;
        const CR8_LEGACY = 1 << 4;
        const ABM = 1 << 5;
        const SSE4A = 1 << 6;
        const MISALIGN_SSE = 1 << 7;
        const PREFETCHW = 1 << 8;
    }

    /// Leaf 0x8000_0001 EDX.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Ext1Edx: u32 {
        const SYSCALL = 1 << 11;
        const NX = 1 << 20;
        const MMXEXT = 1 << 22;
        const FFXSR = 1 << 25;
        const PAGE_1G = 1 << 26;
        const RDTSCP = 1 << 27;
        const LM = 1 << 29;
    }

    /// Leaf 0x8000_0008 EBX (AMD).
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Ext8Ebx: u32 {
        const CLZERO = 1 << 0;
        const XSAVE_ERROR_POINTERS = 1 << 2;
        const IBPB = 1 << 12;
        const IBRS = 1 << 14;
        const STIBP = 1 << 15;
        const STIBP_ALWAYS_ON = 1 << 17;
        const IBRS_PREFERRED = 1 << 18;
        const SSBD = 1 << 24;
        const MITIGATIONS = Self::IBPB.bits()
            | Self::IBRS.bits()
            | Self::STIBP.bits()
            | Self::STIBP_ALWAYS_ON.bits()
            | Self::IBRS_PREFERRED.bits()
            | Self::SSBD.bits();
    }

    /// State components that a guest may enable in XCR0 (SDM vol. 1, section 13.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct XsaveComponents: u64 {
        /// x87 state.
        const X87 = 1 << 0;
        /// XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// Upper halves of the YMM registers.
        const AVX = 1 << 2;
        /// PKRU.
        const PKRU = 1 << 9;
    }

    /// Leaf 0x4000_0001 EAX: the paravirtual features of Linux' KVM interface that Plinth offers.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct ParavirtFeatures: u32 {
        const CLOCKSOURCE = 1 << 0;
        const NOP_IO_DELAY = 1 << 1;
        const CLOCKSOURCE2 = 1 << 3;
        const STEAL_TIME = 1 << 5;
        const SEND_IPI = 1 << 11;
        const CLOCKSOURCE_STABLE = 1 << 24;
    }
}

/// A feature word of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    XsaveEax,
    Ext1Ecx,
    Ext1Edx,
}

impl Word {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// The bits of this word that Plinth virtualizes.
    pub fn virtualized(self) -> u32 {
        match self {
            Word::Leaf1Ecx => Leaf1Ecx::all().bits(),
            Word::Leaf1Edx => Leaf1Edx::all().bits(),
            Word::Leaf7Ebx => Leaf7Ebx::all().bits(),
            Word::Leaf7Ecx => Leaf7Ecx::all().bits(),
            Word::Leaf7Edx => Leaf7Edx::all().bits(),
            Word::XsaveEax => XsaveEax::all().bits(),
            Word::Ext1Ecx => Ext1Ecx::all().bits(),
            Word::Ext1Edx => Ext1Edx::all().bits(),
        }
    }
}

/// A feature with a switch in the configuration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Switch {
    pub name: &'static str,
    pub word: Word,
    pub bit: u32,
    /// The feature that this one cannot be without.
    pub needs: Option<&'static str>,
}

const fn switch(name: &'static str, word: Word, bit: u32, needs: Option<&'static str>) -> Switch {
    Switch {
        name,
        word,
        bit,
        needs,
    }
}

/// All switches. One that others need stands before them.
pub(super) const SWITCHES: [Switch; 44] = {
    use Word::*;
    const XSAVE: Option<&str> = Some("xsave");
    const AVX: Option<&str> = Some("avx");
    [
        switch("sse3", Leaf1Ecx, self::Leaf1Ecx::SSE3.bits(), None),
        switch(
            "pclmulqdq",
            Leaf1Ecx,
            self::Leaf1Ecx::PCLMULQDQ.bits(),
            None,
        ),
        switch("ssse3", Leaf1Ecx, self::Leaf1Ecx::SSSE3.bits(), None),
        switch("cx16", Leaf1Ecx, self::Leaf1Ecx::CX16.bits(), None),
        switch("pcid", Leaf1Ecx, self::Leaf1Ecx::PCID.bits(), None),
        switch("sse4.1", Leaf1Ecx, self::Leaf1Ecx::SSE4_1.bits(), None),
        switch("sse4.2", Leaf1Ecx, self::Leaf1Ecx::SSE4_2.bits(), None),
        switch("movbe", Leaf1Ecx, self::Leaf1Ecx::MOVBE.bits(), None),
        switch("popcnt", Leaf1Ecx, self::Leaf1Ecx::POPCNT.bits(), None),
        switch("aes", Leaf1Ecx, self::Leaf1Ecx::AES.bits(), None),
        switch("rdrand", Leaf1Ecx, self::Leaf1Ecx::RDRAND.bits(), None),
        switch("xsave", Leaf1Ecx, self::Leaf1Ecx::XSAVE.bits(), None),
        switch("xsaveopt", XsaveEax, self::XsaveEax::XSAVEOPT.bits(), XSAVE),
        switch("xsavec", XsaveEax, self::XsaveEax::XSAVEC.bits(), XSAVE),
        switch("xsaves", XsaveEax, self::XsaveEax::XSAVES.bits(), XSAVE),
        switch("xgetbv1", XsaveEax, self::XsaveEax::XGETBV1.bits(), XSAVE),
        switch("avx", Leaf1Ecx, self::Leaf1Ecx::AVX.bits(), XSAVE),
        switch("fma", Leaf1Ecx, self::Leaf1Ecx::FMA.bits(), AVX),
        switch("f16c", Leaf1Ecx, self::Leaf1Ecx::F16C.bits(), AVX),
        switch("avx2", Leaf7Ebx, self::Leaf7Ebx::AVX2.bits(), AVX),
        switch("vaes", Leaf7Ecx, self::Leaf7Ecx::VAES.bits(), AVX),
        switch(
            "vpclmulqdq",
            Leaf7Ecx,
            self::Leaf7Ecx::VPCLMULQDQ.bits(),
            AVX,
        ),
        switch("pku", Leaf7Ecx, self::Leaf7Ecx::PKU.bits(), XSAVE),
        switch("fsgsbase", Leaf7Ebx, self::Leaf7Ebx::FSGSBASE.bits(), None),
        switch("bmi1", Leaf7Ebx, self::Leaf7Ebx::BMI1.bits(), None),
        switch("smep", Leaf7Ebx, self::Leaf7Ebx::SMEP.bits(), None),
        switch("bmi2", Leaf7Ebx, self::Leaf7Ebx::BMI2.bits(), None),
        switch("erms", Leaf7Ebx, self::Leaf7Ebx::ERMS.bits(), None),
        switch("invpcid", Leaf7Ebx, self::Leaf7Ebx::INVPCID.bits(), None),
        switch("rdseed", Leaf7Ebx, self::Leaf7Ebx::RDSEED.bits(), None),
        switch("adx", Leaf7Ebx, self::Leaf7Ebx::ADX.bits(), None),
        switch("smap", Leaf7Ebx, self::Leaf7Ebx::SMAP.bits(), None),
        switch(
            "clflushopt",
            Leaf7Ebx,
            self::Leaf7Ebx::CLFLUSHOPT.bits(),
            None,
        ),
        switch("clwb", Leaf7Ebx, self::Leaf7Ebx::CLWB.bits(), None),
        switch("sha", Leaf7Ebx, self::Leaf7Ebx::SHA.bits(), None),
        switch("umip", Leaf7Ecx, self::Leaf7Ecx::UMIP.bits(), None),
        switch("rdpid", Leaf7Ecx, self::Leaf7Ecx::RDPID.bits(), None),
        switch("fsrm", Leaf7Edx, self::Leaf7Edx::FSRM.bits(), None),
        switch("abm", Ext1Ecx, self::Ext1Ecx::ABM.bits(), None),
        switch("sse4a", Ext1Ecx, self::Ext1Ecx::SSE4A.bits(), None),
        switch("prefetchw", Ext1Ecx, self::Ext1Ecx::PREFETCHW.bits(), None),
        switch("nx", Ext1Edx, self::Ext1Edx::NX.bits(), None),
        switch("pdpe1gb", Ext1Edx, self::Ext1Edx::PAGE_1G.bits(), None),
        switch("rdtscp", Ext1Edx, self::Ext1Edx::RDTSCP.bits(), None),
    ]
};

/// What `cpu = "baseline"` shows of a word: x86-64-v2, and what every processor with nested paging has. The
/// mitigations' registers are shown wherever they are: a guest without them is not portable but unsafe.
pub(super) fn baseline(word: Word) -> u32 {
    match word {
        Word::Leaf1Ecx => (Leaf1Ecx::SSE3
            | Leaf1Ecx::SSSE3
            | Leaf1Ecx::CX16
            | Leaf1Ecx::SSE4_1
            | Leaf1Ecx::SSE4_2
            | Leaf1Ecx::POPCNT)
            .bits(),
        Word::Leaf1Edx => u32::MAX,
        Word::Leaf7Ebx | Word::Leaf7Ecx | Word::XsaveEax => 0,
        Word::Leaf7Edx => {
            (Leaf7Edx::MD_CLEAR | Leaf7Edx::IBRS | Leaf7Edx::STIBP | Leaf7Edx::SSBD).bits()
        }
        Word::Ext1Ecx => (Ext1Ecx::LAHF_SAHF | Ext1Ecx::CR8_LEGACY).bits(),
        Word::Ext1Edx => (Ext1Edx::SYSCALL | Ext1Edx::NX | Ext1Edx::LM).bits(),
    }
}
