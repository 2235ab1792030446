//! The VMCS: its fields by name, and VMREAD, VMWRITE, VMCLEAR, VMPTRLD.
//!
//! A [`Field`]'s value is its encoding (SDM vol. 3D, appendix B). Only fields that Plinth
//! uses or dumps are listed. An access that the processor refuses is an error for the
//! caller to keep, never a panic.
//!
//! Unsafe: the instructions raise #UD outside VMX operation.

use core::arch::asm;

use mem::Hpa;

use crate::SegmentName;

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $encoding:literal,)*) => {
        /// A field of the VMCS, by its encoding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u32)]
        #[expect(missing_docs, reason = "the names are the manual's")]
        pub enum Field {
            $($(#[$doc])* $name = $encoding,)*
        }

        impl Field {
            /// Every field, by encoding.
            pub const ALL: &[Field] = &[$(Field::$name,)*];
        }
    };
}

fields! {
    // 16-bit
    Vpid = 0x0000,
    GuestEsSelector = 0x0800,
    GuestCsSelector = 0x0802,
    GuestSsSelector = 0x0804,
    GuestDsSelector = 0x0806,
    GuestFsSelector = 0x0808,
    GuestGsSelector = 0x080a,
    GuestLdtrSelector = 0x080c,
    GuestTrSelector = 0x080e,
    HostEsSelector = 0x0c00,
    HostCsSelector = 0x0c02,
    HostSsSelector = 0x0c04,
    HostDsSelector = 0x0c06,
    HostFsSelector = 0x0c08,
    HostGsSelector = 0x0c0a,
    HostTrSelector = 0x0c0c,
    // 64-bit
    MsrBitmap = 0x2004,
    TscOffset = 0x2010,
    EptPointer = 0x201a,
    GuestPhysicalAddress = 0x2400,
    VmcsLinkPointer = 0x2800,
    GuestDebugctl = 0x2802,
    GuestPat = 0x2804,
    GuestEfer = 0x2806,
    GuestPdpte0 = 0x280a,
    GuestPdpte1 = 0x280c,
    GuestPdpte2 = 0x280e,
    GuestPdpte3 = 0x2810,
    HostPat = 0x2c00,
    HostEfer = 0x2c02,
    // 32-bit
    PinControls = 0x4000,
    ProcessorControls = 0x4002,
    ExceptionBitmap = 0x4004,
    PageFaultErrorMask = 0x4006,
    PageFaultErrorMatch = 0x4008,
    Cr3TargetCount = 0x400a,
    ExitControls = 0x400c,
    ExitMsrStoreCount = 0x400e,
    ExitMsrLoadCount = 0x4010,
    EntryControls = 0x4012,
    EntryMsrLoadCount = 0x4014,
    EntryInterruptionInfo = 0x4016,
    EntryExceptionErrorCode = 0x4018,
    EntryInstructionLength = 0x401a,
    SecondaryControls = 0x401e,
    PleGap = 0x4020,
    PleWindow = 0x4022,
    InstructionError = 0x4400,
    ExitReason = 0x4402,
    ExitInterruptionInfo = 0x4404,
    ExitInterruptionErrorCode = 0x4406,
    IdtVectoringInfo = 0x4408,
    IdtVectoringErrorCode = 0x440a,
    ExitInstructionLength = 0x440c,
    GuestEsLimit = 0x4800,
    GuestCsLimit = 0x4802,
    GuestSsLimit = 0x4804,
    GuestDsLimit = 0x4806,
    GuestFsLimit = 0x4808,
    GuestGsLimit = 0x480a,
    GuestLdtrLimit = 0x480c,
    GuestTrLimit = 0x480e,
    GuestGdtrLimit = 0x4810,
    GuestIdtrLimit = 0x4812,
    GuestEsRights = 0x4814,
    GuestCsRights = 0x4816,
    GuestSsRights = 0x4818,
    GuestDsRights = 0x481a,
    GuestFsRights = 0x481c,
    GuestGsRights = 0x481e,
    GuestLdtrRights = 0x4820,
    GuestTrRights = 0x4822,
    GuestInterruptibility = 0x4824,
    GuestActivity = 0x4826,
    GuestSysenterCs = 0x482a,
    PreemptionTimer = 0x482e,
    HostSysenterCs = 0x4c00,
    // natural width
    Cr0Mask = 0x6000,
    Cr4Mask = 0x6002,
    Cr0Shadow = 0x6004,
    Cr4Shadow = 0x6006,
    ExitQualification = 0x6400,
    GuestLinearAddress = 0x640a,
    GuestCr0 = 0x6800,
    GuestCr3 = 0x6802,
    GuestCr4 = 0x6804,
    GuestEsBase = 0x6806,
    GuestCsBase = 0x6808,
    GuestSsBase = 0x680a,
    GuestDsBase = 0x680c,
    GuestFsBase = 0x680e,
    GuestGsBase = 0x6810,
    GuestLdtrBase = 0x6812,
    GuestTrBase = 0x6814,
    GuestGdtrBase = 0x6816,
    GuestIdtrBase = 0x6818,
    GuestDr7 = 0x681a,
    GuestRsp = 0x681c,
    GuestRip = 0x681e,
    GuestRflags = 0x6820,
    GuestPendingDebug = 0x6822,
    GuestSysenterEsp = 0x6824,
    GuestSysenterEip = 0x6826,
    HostCr0 = 0x6c00,
    HostCr3 = 0x6c02,
    HostCr4 = 0x6c04,
    HostFsBase = 0x6c06,
    HostGsBase = 0x6c08,
    HostTrBase = 0x6c0a,
    HostGdtrBase = 0x6c0c,
    HostIdtrBase = 0x6c0e,
    HostSysenterEsp = 0x6c10,
    HostSysenterEip = 0x6c12,
    HostRsp = 0x6c14,
    HostRip = 0x6c16,
}

impl Field {
    /// Whether every processor with VT-x has the field, so that VMREAD and VMWRITE of it can't
    /// fail while a VMCS is current (SDM vol. 3D, appendix B; fields without a footnote there).
    #[inline(always)]
    pub const fn is_universal(self) -> bool {
        !matches!(
            self,
            Field::Vpid
                | Field::MsrBitmap
                | Field::EptPointer
                | Field::GuestPhysicalAddress
                | Field::GuestPat
                | Field::GuestEfer
                | Field::GuestPdpte0
                | Field::GuestPdpte1
                | Field::GuestPdpte2
                | Field::GuestPdpte3
                | Field::HostPat
                | Field::HostEfer
                | Field::SecondaryControls
                | Field::PleGap
                | Field::PleWindow
                | Field::PreemptionTimer
        )
    }
}

/// The four fields of a guest segment register.
#[derive(Clone, Copy, Debug)]
pub struct SegmentFields {
    /// Visible selector.
    pub selector: Field,
    /// Linear base.
    pub base: Field,
    /// Limit in bytes.
    pub limit: Field,
    /// Access rights.
    pub rights: Field,
}

macro_rules! segment_fields {
    ($($name:ident: $selector:ident, $base:ident, $limit:ident, $rights:ident;)*) => {
        impl SegmentFields {
            /// The fields of one segment register.
            #[inline]
            pub const fn of(name: SegmentName) -> Self {
                match name {
                    $(SegmentName::$name => SegmentFields {
                        selector: Field::$selector,
                        base: Field::$base,
                        limit: Field::$limit,
                        rights: Field::$rights,
                    },)*
                }
            }
        }
    };
}

segment_fields! {
    Es: GuestEsSelector, GuestEsBase, GuestEsLimit, GuestEsRights;
    Cs: GuestCsSelector, GuestCsBase, GuestCsLimit, GuestCsRights;
    Ss: GuestSsSelector, GuestSsBase, GuestSsLimit, GuestSsRights;
    Ds: GuestDsSelector, GuestDsBase, GuestDsLimit, GuestDsRights;
    Fs: GuestFsSelector, GuestFsBase, GuestFsLimit, GuestFsRights;
    Gs: GuestGsSelector, GuestGsBase, GuestGsLimit, GuestGsRights;
    Ldtr: GuestLdtrSelector, GuestLdtrBase, GuestLdtrLimit, GuestLdtrRights;
    Tr: GuestTrSelector, GuestTrBase, GuestTrLimit, GuestTrRights;
}

/// VMREAD. `None`: no current VMCS, or this processor lacks the field.
///
/// # Safety
/// The calling pCPU is in VMX operation.
#[inline(always)]
pub unsafe fn vmread(field: Field) -> Option<u64> {
    let value: u64;
    let failed: u8;
    // SAFETY: in VMX operation (caller) VMREAD touches nothing but its destination.
    unsafe {
        asm!("vmread {value}, {field}", "setbe {failed}",
             value = out(reg) value, field = in(reg) u64::from(field as u32), failed = out(reg_byte) failed,
             options(nomem, nostack));
    }
    if failed == 0 { Some(value) } else { None }
}

/// VMREAD of a field that is there; 0 when there is no current VMCS.
///
/// # Safety
/// The calling pCPU is in VMX operation.
#[inline(always)]
pub unsafe fn vmread_universal(field: Field) -> u64 {
    let mut value = 0_u64;
    // SAFETY: in VMX operation (caller) VMREAD touches nothing but its destination, and not
    // even that when it fails.
    unsafe {
        asm!("vmread {value}, {field}", value = inout(reg) value, field = in(reg) u64::from(field as u32),
             options(nomem, nostack));
    }
    value
}

/// VMWRITE. `false`: no current VMCS, or this processor lacks the field.
///
/// # Safety
/// The calling pCPU is in VMX operation, and host-state fields get values that leave the
/// hypervisor intact after the next exit.
#[inline(always)]
#[must_use]
pub unsafe fn vmwrite(field: Field, value: u64) -> bool {
    // SAFETY: in VMX operation (caller) VMWRITE changes the current VMCS only.
    unsafe {
        asm!("vmwrite {field}, {value}", "jbe {failed}",
             value = in(reg) value, field = in(reg) u64::from(field as u32), failed = label { return false },
             options(nomem, nostack));
    }
    true
}

/// Runs a VMX instruction that takes one address in memory; whether it succeeded.
macro_rules! address_instruction {
    ($(#[$doc:meta])* $name:ident, $mnemonic:literal) => {
        $(#[$doc])*
        #[must_use]
        pub unsafe fn $name(region: Hpa) -> bool {
            let operand = region.as_u64();
            let failed: u8;
            // SAFETY: the caller vouches for the processor's mode and for the region.
            unsafe {
                asm!(concat!($mnemonic, " [{operand}]"), "setbe {failed}",
                     operand = in(reg) &raw const operand, failed = out(reg_byte) failed, options(nostack));
            }
            failed == 0
        }
    };
}

address_instruction!(
    /// VMXON (SDM vol. 3D, section 31.3).
    ///
    /// # Safety
    /// CR4.VMXE is set, IA32_FEATURE_CONTROL allows VMX, and the region is a frame of ours that holds the VMCS revision.
    vmxon,
    "vmxon"
);
address_instruction!(
    /// VMCLEAR.
    ///
    /// # Safety
    /// In VMX operation; the region is a VMCS frame that no other pCPU has active.
    vmclear,
    "vmclear"
);
address_instruction!(
    /// VMPTRLD.
    ///
    /// # Safety
    /// In VMX operation; the region is a VMCS frame that no other pCPU has active.
    vmptrld,
    "vmptrld"
);

/// Operand of INVEPT and INVVPID (SDM vol. 3D, section 31.3).
#[repr(C)]
struct InvalidateDescriptor {
    context: u64,
    address: u64,
}

const _: () = assert!(size_of::<InvalidateDescriptor>() == 16);

/// How much INVEPT and INVVPID drop; both number these the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Scope {
    /// One EPT pointer, or one VPID.
    Single = 1,
    /// All of them.
    All = 2,
}

/// INVEPT: drops translations of one EPT pointer, or all. Whether it succeeded.
///
/// # Safety
/// In VMX operation, on a processor that has INVEPT.
pub unsafe fn invept(scope: Scope, pointer: u64) -> bool {
    let descriptor = InvalidateDescriptor {
        context: pointer,
        address: 0,
    };
    let failed: u8;
    // SAFETY: in VMX operation (caller); dropping cached translations is always harmless.
    unsafe {
        asm!("invept {scope}, [{descriptor}]", "setbe {failed}", scope = in(reg) scope as u64,
             descriptor = in(reg) &raw const descriptor, failed = out(reg_byte) failed, options(nostack));
    }
    failed == 0
}

/// INVVPID: drops translations of one VPID, or all. Whether it succeeded.
///
/// # Safety
/// In VMX operation, on a processor that has INVVPID.
pub unsafe fn invvpid(scope: Scope, vpid: u16) -> bool {
    let descriptor = InvalidateDescriptor {
        context: u64::from(vpid),
        address: 0,
    };
    let failed: u8;
    // SAFETY: in VMX operation (caller); dropping cached translations is always harmless.
    unsafe {
        asm!("invvpid {scope}, [{descriptor}]", "setbe {failed}", scope = in(reg) scope as u64,
             descriptor = in(reg) &raw const descriptor, failed = out(reg_byte) failed, options(nostack));
    }
    failed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_fields_follow_the_encoding_rule() {
        use SegmentName::*;
        for (i, name) in [Es, Cs, Ss, Ds, Fs, Gs, Ldtr, Tr].into_iter().enumerate() {
            let f = SegmentFields::of(name);
            let step = 2 * i as u32;
            assert_eq!(f.selector as u32, 0x0800 + step);
            assert_eq!(f.limit as u32, 0x4800 + step);
            assert_eq!(f.rights as u32, 0x4814 + step);
            assert_eq!(f.base as u32, 0x6806 + step);
        }
    }

    #[test]
    fn exit_information_and_guest_registers_are_on_every_processor() {
        for field in [
            Field::ExitReason,
            Field::ExitQualification,
            Field::GuestRip,
            Field::HostRsp,
        ] {
            assert!(field.is_universal());
        }
        assert!(!Field::GuestEfer.is_universal() && !Field::PreemptionTimer.is_universal());
    }

    #[test]
    fn fields_are_listed_once_and_full_width() {
        assert!(Field::ALL.is_sorted_by(|a, b| a < b));
        // Bit 0 selects the high half of a 64-bit field; all of ours are full accesses.
        assert!(Field::ALL.iter().all(|&f| f as u32 & 1 == 0));
    }
}
