//! The VMCS: its fields by name, and VMREAD, VMWRITE, VMCLEAR, VMPTRLD.
//!
//! A [`Field`]'s value is its encoding (SDM vol. 3D, appendix B), taken from the crate `x86`.
//! Only fields that Plinth uses or dumps are listed. An access that the processor refuses is
//! an error for the caller to keep, never a panic.
//!
//! Unsafe: the instructions raise #UD outside VMX operation.

use core::arch::asm;

use mem::Hpa;
use x86::vmx::vmcs::{control, guest, host, ro};

use crate::SegmentName;

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $encoding:path,)*) => {
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
    Vpid = control::VPID,
    GuestEsSelector = guest::ES_SELECTOR,
    GuestCsSelector = guest::CS_SELECTOR,
    GuestSsSelector = guest::SS_SELECTOR,
    GuestDsSelector = guest::DS_SELECTOR,
    GuestFsSelector = guest::FS_SELECTOR,
    GuestGsSelector = guest::GS_SELECTOR,
    GuestLdtrSelector = guest::LDTR_SELECTOR,
    GuestTrSelector = guest::TR_SELECTOR,
    HostEsSelector = host::ES_SELECTOR,
    HostCsSelector = host::CS_SELECTOR,
    HostSsSelector = host::SS_SELECTOR,
    HostDsSelector = host::DS_SELECTOR,
    HostFsSelector = host::FS_SELECTOR,
    HostGsSelector = host::GS_SELECTOR,
    HostTrSelector = host::TR_SELECTOR,
    // 64-bit
    MsrBitmap = control::MSR_BITMAPS_ADDR_FULL,
    TscOffset = control::TSC_OFFSET_FULL,
    VirtualApicAddress = control::VIRT_APIC_ADDR_FULL,
    EptPointer = control::EPTP_FULL,
    XssExitingBitmap = control::XSS_EXITING_BITMAP_FULL,
    TscMultiplier = control::TSC_MULTIPLIER_FULL,
    GuestPhysicalAddress = ro::GUEST_PHYSICAL_ADDR_FULL,
    VmcsLinkPointer = guest::LINK_PTR_FULL,
    GuestDebugctl = guest::IA32_DEBUGCTL_FULL,
    GuestPat = guest::IA32_PAT_FULL,
    GuestEfer = guest::IA32_EFER_FULL,
    GuestPdpte0 = guest::PDPTE0_FULL,
    GuestPdpte1 = guest::PDPTE1_FULL,
    GuestPdpte2 = guest::PDPTE2_FULL,
    GuestPdpte3 = guest::PDPTE3_FULL,
    HostPat = host::IA32_PAT_FULL,
    HostEfer = host::IA32_EFER_FULL,
    // 32-bit
    PinControls = control::PINBASED_EXEC_CONTROLS,
    ProcessorControls = control::PRIMARY_PROCBASED_EXEC_CONTROLS,
    ExceptionBitmap = control::EXCEPTION_BITMAP,
    PageFaultErrorMask = control::PAGE_FAULT_ERR_CODE_MASK,
    PageFaultErrorMatch = control::PAGE_FAULT_ERR_CODE_MATCH,
    Cr3TargetCount = control::CR3_TARGET_COUNT,
    ExitControls = control::VMEXIT_CONTROLS,
    ExitMsrStoreCount = control::VMEXIT_MSR_STORE_COUNT,
    ExitMsrLoadCount = control::VMEXIT_MSR_LOAD_COUNT,
    EntryControls = control::VMENTRY_CONTROLS,
    EntryMsrLoadCount = control::VMENTRY_MSR_LOAD_COUNT,
    EntryInterruptionInfo = control::VMENTRY_INTERRUPTION_INFO_FIELD,
    EntryExceptionErrorCode = control::VMENTRY_EXCEPTION_ERR_CODE,
    EntryInstructionLength = control::VMENTRY_INSTRUCTION_LEN,
    TprThreshold = control::TPR_THRESHOLD,
    SecondaryControls = control::SECONDARY_PROCBASED_EXEC_CONTROLS,
    PleGap = control::PLE_GAP,
    PleWindow = control::PLE_WINDOW,
    InstructionError = ro::VM_INSTRUCTION_ERROR,
    ExitReason = ro::EXIT_REASON,
    ExitInterruptionInfo = ro::VMEXIT_INTERRUPTION_INFO,
    ExitInterruptionErrorCode = ro::VMEXIT_INTERRUPTION_ERR_CODE,
    IdtVectoringInfo = ro::IDT_VECTORING_INFO,
    IdtVectoringErrorCode = ro::IDT_VECTORING_ERR_CODE,
    ExitInstructionLength = ro::VMEXIT_INSTRUCTION_LEN,
    GuestEsLimit = guest::ES_LIMIT,
    GuestCsLimit = guest::CS_LIMIT,
    GuestSsLimit = guest::SS_LIMIT,
    GuestDsLimit = guest::DS_LIMIT,
    GuestFsLimit = guest::FS_LIMIT,
    GuestGsLimit = guest::GS_LIMIT,
    GuestLdtrLimit = guest::LDTR_LIMIT,
    GuestTrLimit = guest::TR_LIMIT,
    GuestGdtrLimit = guest::GDTR_LIMIT,
    GuestIdtrLimit = guest::IDTR_LIMIT,
    GuestEsRights = guest::ES_ACCESS_RIGHTS,
    GuestCsRights = guest::CS_ACCESS_RIGHTS,
    GuestSsRights = guest::SS_ACCESS_RIGHTS,
    GuestDsRights = guest::DS_ACCESS_RIGHTS,
    GuestFsRights = guest::FS_ACCESS_RIGHTS,
    GuestGsRights = guest::GS_ACCESS_RIGHTS,
    GuestLdtrRights = guest::LDTR_ACCESS_RIGHTS,
    GuestTrRights = guest::TR_ACCESS_RIGHTS,
    GuestInterruptibility = guest::INTERRUPTIBILITY_STATE,
    GuestActivity = guest::ACTIVITY_STATE,
    GuestSysenterCs = guest::IA32_SYSENTER_CS,
    PreemptionTimer = guest::VMX_PREEMPTION_TIMER_VALUE,
    HostSysenterCs = host::IA32_SYSENTER_CS,
    // natural width
    Cr0Mask = control::CR0_GUEST_HOST_MASK,
    Cr4Mask = control::CR4_GUEST_HOST_MASK,
    Cr0Shadow = control::CR0_READ_SHADOW,
    Cr4Shadow = control::CR4_READ_SHADOW,
    ExitQualification = ro::EXIT_QUALIFICATION,
    GuestLinearAddress = ro::GUEST_LINEAR_ADDR,
    GuestCr0 = guest::CR0,
    GuestCr3 = guest::CR3,
    GuestCr4 = guest::CR4,
    GuestEsBase = guest::ES_BASE,
    GuestCsBase = guest::CS_BASE,
    GuestSsBase = guest::SS_BASE,
    GuestDsBase = guest::DS_BASE,
    GuestFsBase = guest::FS_BASE,
    GuestGsBase = guest::GS_BASE,
    GuestLdtrBase = guest::LDTR_BASE,
    GuestTrBase = guest::TR_BASE,
    GuestGdtrBase = guest::GDTR_BASE,
    GuestIdtrBase = guest::IDTR_BASE,
    GuestDr7 = guest::DR7,
    GuestRsp = guest::RSP,
    GuestRip = guest::RIP,
    GuestRflags = guest::RFLAGS,
    GuestPendingDebug = guest::PENDING_DBG_EXCEPTIONS,
    GuestSysenterEsp = guest::IA32_SYSENTER_ESP,
    GuestSysenterEip = guest::IA32_SYSENTER_EIP,
    HostCr0 = host::CR0,
    HostCr3 = host::CR3,
    HostCr4 = host::CR4,
    HostFsBase = host::FS_BASE,
    HostGsBase = host::GS_BASE,
    HostTrBase = host::TR_BASE,
    HostGdtrBase = host::GDTR_BASE,
    HostIdtrBase = host::IDTR_BASE,
    HostSysenterEsp = host::IA32_SYSENTER_ESP,
    HostSysenterEip = host::IA32_SYSENTER_EIP,
    HostRsp = host::RSP,
    HostRip = host::RIP,
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
                | Field::XssExitingBitmap
                | Field::TscMultiplier
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
