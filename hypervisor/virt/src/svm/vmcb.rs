//! The VMCB: what VMRUN reads and #VMEXIT writes (APM vol. 2, appendix B).
//!
//! One page of plain memory: a control area of 1 KiB and a state-save area behind it. The
//! layouts are asserted below. Nothing here runs an instruction; all of it is tested on the host.

use bitfield_struct::bitfield;
use bitflags::bitflags;

use crate::state::{AccessRights, Segment};

bitflags! {
    /// Exceptions to intercept, by vector (offset 008h).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct ExceptionIntercepts: u32 {
        /// #DB.
        const DEBUG = 1 << 1;
        /// #UD.
        const UNDEFINED_OPCODE = 1 << 6;
        /// #AC.
        const ALIGNMENT_CHECK = 1 << 17;
        /// #MC.
        const MACHINE_CHECK = 1 << 18;
    }

    /// Control registers to intercept, reads or writes, by number (offsets 000h and 002h).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct CrIntercepts: u16 {
        /// CR4.
        const CR4 = 1 << 4;
        /// CR8.
        const CR8 = 1 << 8;
    }

    /// Intercepts at offset 00Ch. Those that Plinth never uses are left out.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Intercepts1: u32 {
        /// Physical maskable interrupts.
        const INTR = 1 << 0;
        /// Physical NMIs.
        const NMI = 1 << 1;
        /// Physical SMIs.
        const SMI = 1 << 2;
        /// INIT signals.
        const INIT = 1 << 3;
        /// Virtual interrupts, just before delivery.
        const VINTR = 1 << 4;
        /// RDPMC.
        const RDPMC = 1 << 15;
        /// CPUID.
        const CPUID = 1 << 18;
        /// RSM.
        const RSM = 1 << 19;
        /// IRET, before it executes.
        const IRET = 1 << 20;
        /// INVD.
        const INVD = 1 << 22;
        /// PAUSE, as the pause filter lets through.
        const PAUSE = 1 << 23;
        /// HLT.
        const HLT = 1 << 24;
        /// INVLPGA.
        const INVLPGA = 1 << 26;
        /// Ports, as the I/O permission map says.
        const IOIO = 1 << 27;
        /// MSRs, as the MSR permission map says.
        const MSR = 1 << 28;
        /// Freezing for a legacy x87 error.
        const FERR_FREEZE = 1 << 30;
        /// Shutdown: a triple fault.
        const SHUTDOWN = 1 << 31;
    }

    /// Intercepts at offset 010h. Those that Plinth never uses are left out.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Intercepts2: u32 {
        /// VMRUN; must be on.
        const VMRUN = 1 << 0;
        /// VMMCALL.
        const VMMCALL = 1 << 1;
        /// VMLOAD.
        const VMLOAD = 1 << 2;
        /// VMSAVE.
        const VMSAVE = 1 << 3;
        /// STGI.
        const STGI = 1 << 4;
        /// CLGI.
        const CLGI = 1 << 5;
        /// SKINIT.
        const SKINIT = 1 << 6;
        /// WBINVD and WBNOINVD.
        const WBINVD = 1 << 9;
        /// MONITOR and MONITORX.
        const MONITOR = 1 << 10;
        /// MWAIT and MWAITX.
        const MWAIT = 1 << 11;
        /// MWAIT with the monitor armed.
        const MWAIT_ARMED = 1 << 12;
        /// XSETBV.
        const XSETBV = 1 << 13;
        /// RDPRU.
        const RDPRU = 1 << 14;
    }

    /// Parts of the VMCB that the processor need not read again (offset 0C0h, section 15.15.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Clean: u32 {
        /// Intercepts, TSC offset, pause filter.
        const INTERCEPTS = 1 << 0;
        /// Addresses of the permission maps.
        const PERMISSION_MAPS = 1 << 1;
        /// ASID.
        const ASID = 1 << 2;
        /// Virtual interrupts and TPR.
        const INTERRUPTS = 1 << 3;
        /// Nested paging: root, PAT.
        const NESTED_PAGING = 1 << 4;
        /// CR0, CR3, CR4, EFER.
        const CONTROL_REGISTERS = 1 << 5;
        /// DR6 and DR7.
        const DEBUG_REGISTERS = 1 << 6;
        /// GDTR and IDTR.
        const DESCRIPTOR_TABLES = 1 << 7;
        /// CS, DS, SS, ES, CPL.
        const SEGMENTS = 1 << 8;
        /// CR2.
        const CR2 = 1 << 9;
        /// DEBUGCTL and the last-branch records.
        const LAST_BRANCH = 1 << 10;
    }

    /// Nested-paging control (offset 090h).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct NestedControl: u64 {
        /// Nested paging is on.
        const ENABLE = 1 << 0;
    }

    /// Virtualization extensions (offset 0B8h).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Extensions: u64 {
        /// DEBUGCTL and last-branch records are switched by the hardware.
        const LAST_BRANCH = 1 << 0;
    }
}

/// What VMRUN does to the TLB before it enters the guest (offset 05Ch, table 15-9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TlbControl {
    /// Nothing.
    Keep = 0,
    /// Drops everything, of all guests and the host.
    FlushAll = 1,
    /// Drops this guest's translations (needs flush-by-ASID).
    FlushGuest = 3,
}

/// Virtual interrupts (offset 060h).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct InterruptControl {
    /// V_TPR.
    pub tpr: u8,
    /// V_IRQ: a virtual interrupt is pending.
    pub irq: bool,
    /// VGIF.
    pub gif: bool,
    __: bool,
    /// V_NMI: a virtual NMI is pending.
    pub nmi: bool,
    /// V_NMI_MASK: NMIs are masked in the guest.
    pub nmi_mask: bool,
    #[bits(3)]
    __: u8,
    /// V_INTR_PRIO.
    #[bits(4)]
    pub priority: u8,
    /// V_IGN_TPR: the virtual interrupt is taken whatever the TPR.
    pub ignore_tpr: bool,
    #[bits(3)]
    __: u8,
    /// V_INTR_MASKING: RFLAGS.IF and TPR of the guest mask only virtual interrupts.
    pub masking: bool,
    /// Virtual GIF enable.
    pub gif_enable: bool,
    /// V_NMI_ENABLE.
    pub nmi_enable: bool,
    #[bits(5)]
    __: u8,
    /// V_INTR_VECTOR.
    pub vector: u8,
    #[bits(24)]
    __: u32,
}

/// Interrupt shadow (offset 068h).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct InterruptState {
    /// The guest is in the shadow of STI, MOV SS or POP SS.
    pub shadow: bool,
    /// GUEST_INTERRUPT_MASK.
    pub guest_mask: bool,
    #[bits(62)]
    __: u64,
}

/// TYPE of an event (sections 15.7.2 and 15.20).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// External or virtual interrupt.
    Interrupt,
    /// NMI.
    Nmi,
    /// Exception, also of INT3 and INTO.
    Exception,
    /// INTn.
    Software,
    /// A value that the manual does not define.
    Reserved(u8),
}

impl EventType {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => EventType::Interrupt,
            2 => EventType::Nmi,
            3 => EventType::Exception,
            4 => EventType::Software,
            other => EventType::Reserved(other),
        }
    }

    const fn into_bits(self) -> u8 {
        match self {
            EventType::Interrupt => 0,
            EventType::Nmi => 2,
            EventType::Exception => 3,
            EventType::Software => 4,
            EventType::Reserved(other) => other & 7,
        }
    }
}

/// EVENTINJ and EXITINTINFO (sections 15.20 and 15.7.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EventField {
    /// IDT vector.
    pub vector: u8,
    /// TYPE.
    #[bits(3)]
    pub kind: EventType,
    /// EV: the error code is pushed.
    pub has_error_code: bool,
    /// Must be zero.
    #[bits(19)]
    pub reserved: u32,
    /// V.
    pub valid: bool,
    /// ERRORCODE.
    pub error_code: u32,
}

impl EventField {
    /// No event.
    pub const NONE: Self = Self::new();
}

impl InterruptState {
    /// No shadow.
    pub const NONE: Self = Self::new();
}

/// A segment register in the state-save area (table B-2); the attributes are bits 55:52 and
/// 47:40 of the descriptor, packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VmcbSegment {
    /// Selector.
    pub selector: u16,
    /// Packed attributes.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
}

/// L in the packed attributes of a code segment.
pub const ATTRIBUTE_LONG: u16 = 1 << 9;
/// D/B in the packed attributes of a segment.
pub const ATTRIBUTE_BIG: u16 = 1 << 10;

impl VmcbSegment {
    /// In the layout that both vendors share. A segment that is not present is unusable.
    pub fn to_segment(self) -> Segment {
        let attributes = u32::from(self.attributes);
        let rights = AccessRights::from_bits((attributes & 0xff) | (attributes & 0xf00) << 4);
        Segment {
            selector: self.selector,
            base: self.base,
            limit: self.limit,
            rights: rights.with_unusable(!rights.present()),
        }
    }

    /// From the shared layout. An unusable segment is not present.
    pub fn from_segment(segment: &Segment) -> Self {
        let rights = segment.rights;
        let rights = rights
            .with_present(rights.present() && !rights.unusable())
            .into_bits();
        VmcbSegment {
            selector: segment.selector,
            attributes: ((rights & 0xff) | (rights >> 4 & 0xf00)) as u16,
            limit: segment.limit,
            base: segment.base,
        }
    }
}

/// Control area (table B-1).
#[derive(Clone)]
#[repr(C)]
#[expect(missing_docs, reason = "the names are the manual's")]
pub struct ControlArea {
    pub cr_reads: CrIntercepts,
    pub cr_writes: CrIntercepts,
    pub dr_reads: u16,
    pub dr_writes: u16,
    pub exceptions: ExceptionIntercepts,
    pub intercepts1: Intercepts1,
    pub intercepts2: Intercepts2,
    pub intercepts3: u32,
    reserved_018: [u8; 0x24],
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base: u64,
    pub msrpm_base: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: TlbControl,
    reserved_05d: [u8; 3],
    pub interrupts: InterruptControl,
    pub interrupt_state: InterruptState,
    pub exit_code: u64,
    pub exit_info1: u64,
    pub exit_info2: u64,
    pub exit_interrupt_info: EventField,
    pub nested_control: NestedControl,
    reserved_098: [u8; 0x10],
    pub event_injection: EventField,
    pub nested_root: u64,
    pub extensions: Extensions,
    pub clean: Clean,
    reserved_0c4: u32,
    pub next_rip: u64,
    /// Bytes fetched, then the bytes (15 at most).
    pub fetched: u8,
    pub instruction_bytes: [u8; 15],
    reserved_0e0: [u8; 0x320],
}

/// State-save area (table B-2).
#[derive(Clone)]
#[repr(C)]
#[expect(missing_docs, reason = "the names are the manual's")]
pub struct SaveArea {
    pub es: VmcbSegment,
    pub cs: VmcbSegment,
    pub ss: VmcbSegment,
    pub ds: VmcbSegment,
    pub fs: VmcbSegment,
    pub gs: VmcbSegment,
    pub gdtr: VmcbSegment,
    pub ldtr: VmcbSegment,
    pub idtr: VmcbSegment,
    pub tr: VmcbSegment,
    reserved_0a0: [u8; 0x2b],
    pub cpl: u8,
    reserved_0cc: u32,
    pub efer: u64,
    reserved_0d8: [u8; 0x70],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    reserved_180: [u8; 0x58],
    pub rsp: u64,
    reserved_1e0: [u8; 0x18],
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    reserved_248: [u8; 0x20],
    pub pat: u64,
    pub debug_control: u64,
    pub last_branch: [u64; 4],
    reserved_298: [u8; 0x48],
    pub spec_ctrl: u64,
    reserved_2e8: [u8; 0x918],
}

/// A virtual machine control block: one 4 KiB page.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Vmcb {
    /// What the hypervisor wants, and what the processor reports.
    pub control: ControlArea,
    /// Guest state.
    pub save: SaveArea,
}

impl Vmcb {
    /// All zero, as a fresh frame is.
    #[cfg(test)]
    pub fn zeroed() -> Self {
        // SAFETY: every field is an integer, a transparent wrapper of one, or an enum whose
        // value 0 exists.
        unsafe { core::mem::zeroed() }
    }
}

macro_rules! at {
    ($area:ident: $($field:ident = $offset:literal),+ $(,)?) => {
        $(const _: () = assert!(core::mem::offset_of!($area, $field) == $offset);)+
    };
}

at!(ControlArea: cr_reads = 0x00, cr_writes = 0x02, dr_reads = 0x04, dr_writes = 0x06, exceptions = 0x08,
    intercepts1 = 0x0c, intercepts2 = 0x10, intercepts3 = 0x14, pause_filter_threshold = 0x3c,
    pause_filter_count = 0x3e, iopm_base = 0x40, msrpm_base = 0x48, tsc_offset = 0x50, asid = 0x58,
    tlb_control = 0x5c, interrupts = 0x60, interrupt_state = 0x68, exit_code = 0x70,
    exit_info1 = 0x78, exit_info2 = 0x80, exit_interrupt_info = 0x88, nested_control = 0x90,
    event_injection = 0xa8, nested_root = 0xb0, extensions = 0xb8, clean = 0xc0, next_rip = 0xc8,
    fetched = 0xd0, instruction_bytes = 0xd1);
at!(SaveArea: es = 0x00, cs = 0x10, ss = 0x20, ds = 0x30, fs = 0x40, gs = 0x50, gdtr = 0x60,
    ldtr = 0x70, idtr = 0x80, tr = 0x90, cpl = 0xcb, efer = 0xd0, cr4 = 0x148, cr3 = 0x150,
    cr0 = 0x158, dr7 = 0x160, dr6 = 0x168, rflags = 0x170, rip = 0x178, rsp = 0x1d8, rax = 0x1f8,
    star = 0x200, lstar = 0x208, cstar = 0x210, sfmask = 0x218, kernel_gs_base = 0x220,
    sysenter_cs = 0x228, sysenter_esp = 0x230, sysenter_eip = 0x238, cr2 = 0x240, pat = 0x268,
    debug_control = 0x270, last_branch = 0x278, spec_ctrl = 0x2e0);
const _: () = assert!(size_of::<VmcbSegment>() == 16);
const _: () = assert!(size_of::<ControlArea>() == 0x400);
const _: () = assert!(size_of::<SaveArea>() == 0xc00);
const _: () = assert!(size_of::<Vmcb>() == 4096);
const _: () = assert!(core::mem::offset_of!(Vmcb, save) == 0x400);

/// Exit codes (APM vol. 2, appendix C), as the low 32 bits of EXITCODE.
#[expect(missing_docs, reason = "the names are the manual's")]
pub mod exit_code {
    pub const READ_CR8: u32 = 0x08;
    pub const WRITE_CR4: u32 = 0x14;
    pub const WRITE_CR8: u32 = 0x18;
    pub const EXCEPTION_FIRST: u32 = 0x40;
    pub const EXCEPTION_LAST: u32 = 0x5f;
    pub const DEBUG_EXCEPTION: u32 = EXCEPTION_FIRST + 1;
    pub const MACHINE_CHECK: u32 = EXCEPTION_FIRST + 18;
    pub const INTR: u32 = 0x60;
    pub const NMI: u32 = 0x61;
    pub const SMI: u32 = 0x62;
    pub const INIT: u32 = 0x63;
    pub const VINTR: u32 = 0x64;
    pub const RDPMC: u32 = 0x6f;
    pub const CPUID: u32 = 0x72;
    pub const RSM: u32 = 0x73;
    pub const IRET: u32 = 0x74;
    pub const INVD: u32 = 0x76;
    pub const PAUSE: u32 = 0x77;
    pub const HLT: u32 = 0x78;
    pub const INVLPGA: u32 = 0x7a;
    pub const IOIO: u32 = 0x7b;
    pub const MSR: u32 = 0x7c;
    pub const FERR_FREEZE: u32 = 0x7e;
    pub const SHUTDOWN: u32 = 0x7f;
    pub const VMRUN: u32 = 0x80;
    pub const VMMCALL: u32 = 0x81;
    pub const VMLOAD: u32 = 0x82;
    pub const VMSAVE: u32 = 0x83;
    pub const STGI: u32 = 0x84;
    pub const CLGI: u32 = 0x85;
    pub const SKINIT: u32 = 0x86;
    pub const WBINVD: u32 = 0x89;
    pub const MONITOR: u32 = 0x8a;
    pub const MWAIT: u32 = 0x8b;
    pub const MWAIT_ARMED: u32 = 0x8c;
    pub const XSETBV: u32 = 0x8d;
    pub const RDPRU: u32 = 0x8e;
    pub const NESTED_PAGE_FAULT: u32 = 0x400;
    /// VMRUN refused the state. QEMU 7.2 TCG stores 0xffff_ffff, without the sign extension
    /// of the real thing, hence codes are compared by their low half.
    pub const INVALID: u32 = u32::MAX;
    /// The VMCB or its save area is in use elsewhere.
    pub const BUSY: u32 = u32::MAX - 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{CpuState, SegmentName};

    #[test]
    fn segments_survive_the_round_trip() {
        let state = CpuState::reset();
        for segment in &state.segments {
            assert_eq!(
                VmcbSegment::from_segment(segment).to_segment(),
                *segment,
                "{segment:x?}"
            );
        }
        // Descriptor attributes of a flat 64-bit code segment: P, S, type 0xb, G, L.
        let code = Segment {
            rights: AccessRights::new()
                .with_kind(0xb)
                .with_code_or_data(true)
                .with_present(true)
                .with_long(true)
                .with_granularity(true),
            limit: u32::MAX,
            ..state.segments[SegmentName::Cs as usize]
        };
        assert_eq!(VmcbSegment::from_segment(&code).attributes, 0xa9b);
    }

    #[test]
    fn an_unusable_segment_is_not_present() {
        let mut segment = CpuState::reset().segments[0];
        segment.rights = segment.rights.with_unusable(true);
        let packed = VmcbSegment::from_segment(&segment);
        assert_eq!(packed.attributes & 0x80, 0);
        assert!(packed.to_segment().rights.unusable());
    }

    #[test]
    fn event_fields_have_the_manuals_layout() {
        let gp = EventField::new()
            .with_vector(13)
            .with_kind(EventType::Exception)
            .with_has_error_code(true)
            .with_error_code(0x18)
            .with_valid(true);
        assert_eq!(gp.into_bits(), 0x18_8000_0b0d);
        assert_eq!(EventField::from_bits(0x8000_0202).kind(), EventType::Nmi);
        assert_eq!(
            EventField::from_bits(0x8000_0102).kind(),
            EventType::Reserved(1)
        );
    }

    #[test]
    fn interrupt_control_has_the_manuals_layout() {
        let control = InterruptControl::new()
            .with_irq(true)
            .with_priority(0xf)
            .with_ignore_tpr(true)
            .with_masking(true)
            .with_nmi_enable(true)
            .with_vector(0x40);
        assert_eq!(
            control.into_bits(),
            1 << 8 | 0xf << 16 | 1 << 20 | 1 << 24 | 1 << 26 | 0x40 << 32
        );
    }
}
