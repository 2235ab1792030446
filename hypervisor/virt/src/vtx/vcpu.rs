//! One virtual processor on VT-x: its VMCS, what the VMCS leaves out, and its exits.
//!
//! Where a register lives while the vCPU is loaded: most in the VMCS (read on demand);
//! general-purpose registers and CR2 in [`GuestRegisters`]; FPU, DR0-DR3, DR6, XCR0 and the
//! MSRs of [`MSRS_SWITCHED`] in the processor itself.
//!
//! Invariants:
//! - The VMCS is active on a pCPU only from `load` to `unload`, which clears it.
//! - A VMREAD or VMWRITE that fails makes the vCPU unenterable ([`State::Broken`]): the VM
//!   ends with an entry failure that names the field. It can't hurt the host.
//! - Control words are cached, and written only when they change.
//!
//! Unsafe: VMX instructions, and the assembly of [`super::entry`].

use alloc::{format, string::String, sync::Arc};
use core::arch::asm;
use core::cell::Cell;
use core::ptr::NonNull;

use bitflags::bitflags;
use mem::nested::EntryFormat;
use mem::{Gpa, Hpa, Owner, PAGE_SIZE};
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment as _};
use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr3, Cr4};

use super::Shared;
use super::capability::{Capabilities, EntryControls, Pin, Proc, Proc2};
use super::check::{VmcsFields, check};
use super::decode::{
    ENTRY_FAILED, InterruptionInfo, NMI_UNBLOCKED_BY_IRET, cr_access, dr6_after_debug_exception,
    nested_page_fault, port_io, reason, task_switch,
};
use super::entry::{GuestRegisters, Outcome, enter, exit_landing, exit_landing_filling};
use super::mitigation;
use super::vmcs::{Field, SegmentFields, vmclear, vmptrld, vmread, vmread_universal, vmwrite};
use crate::cpu::{GuestDebug, GuestFpu, GuestSpecCtrl, PAT_RESET, is_canonical, is_pat};
use crate::cpu::{msr, raise_machine_check, rdmsr, rdtsc, wrmsr};
use crate::state::{
    AccessRights, CpuState, DescriptorTable, Event, Gpr, Segment, SegmentName, Shadow,
    pdpte_is_valid,
};
use crate::{Exit, TaskSource, TaskSwitch, TscScale, VcpuSetup, VirtError, VirtualCpu};

/// Guest MSRs that are VMCS fields.
pub(super) const MSRS_IN_VMCS: [u32; 7] = [
    msr::FS_BASE,
    msr::GS_BASE,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::PAT,
    msr::DEBUGCTL,
];

/// Guest MSRs that stay in the processor while the vCPU is loaded: the hypervisor uses none of them.
pub(super) const MSRS_SWITCHED: [u32; 6] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
];

/// Page-directory-pointer entries of a PAE guest.
pub(super) const PDPTES: [Field; 4] = [
    Field::GuestPdpte0,
    Field::GuestPdpte1,
    Field::GuestPdpte2,
    Field::GuestPdpte3,
];

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// CR0 bits that a guest changes without an exit. PG must exit (IA-32e mode follows it), CD
/// and NW too (an entry never loads them), NE because it is fixed in VMX operation.
const CR0_GUEST_OWNED: u64 = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_WP | CR0_AM;

const CR4_VME: u64 = 1 << 0;
const CR4_PVI: u64 = 1 << 1;
const CR4_TSD: u64 = 1 << 2;
const CR4_DE: u64 = 1 << 3;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_MCE: u64 = 1 << 6;
const CR4_PGE: u64 = 1 << 7;
const CR4_PCE: u64 = 1 << 8;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_SMEP: u64 = 1 << 20;
/// CR4 bits that a guest changes without an exit: every processor with VT-x has them all, and
/// nothing in the hypervisor depends on them. The processor itself flushes for PGE.
const CR4_GUEST_OWNED: u64 =
    CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT;

/// Bits whose change loads the page-directory-pointer entries of a PAE guest (SDM vol. 3A, section 4.4.1).
const CR0_LOADS_PDPTES: u64 = CR0_PG | CR0_CD | CR0_NW;
const CR4_LOADS_PDPTES: u64 = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP;

const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
/// The one bit of IA32_DEBUGCTL that a guest may set. Branch records would show it the host's.
const DEBUGCTL_BTF: u64 = 1 << 1;
/// Offset of the task priority in the virtual-APIC page.
const VIRTUAL_TPR: u64 = 0x80;
const DR7_GD: u64 = 1 << 13;
const PENDING_DEBUG_BS: u64 = 1 << 14;
/// BD in the exit qualification of #DB: an access to a debug register, with DR7.GD.
const QUALIFICATION_BD: u64 = 1 << 13;

/// PAUSE-loop exiting: at most this many ticks between two PAUSEs of a loop, and this many
/// ticks of looping until it exits (SDM vol. 3C, section 26.1.3).
const PLE_GAP: u64 = 128;
const PLE_WINDOW: u64 = 4096;

bitflags! {
    /// Guest interruptibility state (SDM vol. 3C, table 25-3).
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Interruptibility: u32 {
        const STI = 1 << 0;
        const MOV_SS = 1 << 1;
        const NMI = 1 << 3;
        const SHADOW = Self::STI.bits() | Self::MOV_SS.bits();
    }

    /// What must be done before the next entry.
    #[derive(Clone, Copy, PartialEq, Eq)]
    struct Due: u8 {
        /// Put the queued event into the VMCS.
        const INJECT = 1 << 0;
        /// Drop the guest's cached translations.
        const FLUSH = 1 << 1;
        /// Read the page-directory-pointer entries of a PAE guest.
        const PDPTES = 1 << 2;
        /// Clear the processor's data buffers; always due where it is needed at all.
        const BUFFERS = 1 << 3;
        /// Flush the level-1 data cache.
        const L1D = 1 << 4;
    }
}

/// Exceptions that exit: #DB and #AC, with which a guest could keep the processor busy in
/// endless delivery where no interrupt gets through, #UD, for the other vendor's hypercall, and #MC,
/// which is the host's.
const EXCEPTION_BITMAP: u64 =
    1 << DEBUG_EXCEPTION | 1 << UNDEFINED_OPCODE | 1 << ALIGNMENT_CHECK | 1 << MACHINE_CHECK;
const UNDEFINED_OPCODE: u8 = 6;
const DEBUG_EXCEPTION: u8 = 1;
const DOUBLE_FAULT: u8 = 8;
const ALIGNMENT_CHECK: u8 = 17;
const MACHINE_CHECK: u8 = 18;

/// How far the vCPU is from its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// On a pCPU; the VMCS is clear.
    Launch,
    /// On a pCPU; the VMCS is launched.
    Resume,
    /// On a pCPU; the processor refused an access to the VMCS ([`VtxVcpu::broken`]).
    Broken,
    /// Not on any pCPU.
    Unloaded,
}

/// One virtual processor.
pub struct VtxVcpu {
    registers: GuestRegisters,
    state: Cell<State>,
    /// The field that could not be accessed; `None`: the VMCS as a whole.
    broken: Cell<Option<Field>>,
    due: Due,
    has_timer: bool,
    timer_shift: u8,
    /// Host TSC of the next `Exit::Deadline`, in periods of the timer, rounded up: an early
    /// exit would find the deadline still ahead.
    deadline: u64,
    /// For the next entry: by `inject`, or interrupted by the last exit.
    queued: Option<Event>,
    cr0_shadow: u64,
    cr4_shadow: u64,
    proc: Proc,
    entry: EntryControls,
    vpid: u16,
    /// pCPU of the last `load`; elsewhere this vCPU's tag may have stale translations.
    last_cpu: Option<usize>,
    initialized: bool,
    refusal: Option<Refusal>,
    fpu: GuestFpu,
    debug: GuestDebug,
    spec_ctrl: GuestSpecCtrl,
    switched: [u64; MSRS_SWITCHED.len()],
    setup: VcpuSetup,
    vmcs: Hpa,
    /// The virtual-APIC page, and the TPR shadow in it.
    virtual_apic: Option<(Hpa, NonNull<u8>)>,
    shared: Arc<Shared>,
}

// SAFETY: the pointer is into a frame that only this value uses, so it may move with the value to
// another thread; the rest is `Send`.
unsafe impl Send for VtxVcpu {}

/// How the last entry was refused.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// By the instruction: VM-instruction error.
    Instruction(u32),
    /// After it: exit reason with bit 31, and the exit qualification.
    Late(u32, u64),
}

impl VtxVcpu {
    pub(super) fn new(shared: Arc<Shared>, setup: VcpuSetup) -> Result<Self, VirtError> {
        let owner = Owner::VmTables(setup.vm);
        let vmcs = shared.memory.allocate(1, PAGE_SIZE, owner)?;
        shared
            .memory
            .write(vmcs, &shared.capabilities.revision.to_le_bytes());
        let shadow = shared.controls.proc.contains(Proc::TPR_SHADOW);
        let virtual_apic = match shadow.then(|| shared.memory.allocate(1, PAGE_SIZE, owner)) {
            Some(Ok(page)) => {
                NonNull::new(shared.memory.pointer(page + VIRTUAL_TPR)).map(|tpr| (page, tpr))
            }
            None => None,
            Some(Err(none_left)) => {
                shared.memory.free(vmcs, 1, owner);
                return Err(none_left.into());
            }
        };
        let has_vpid = shared.controls.proc2.contains(Proc2::VPID);
        let vpid = u16::try_from(setup.tag).ok().filter(|_| has_vpid);
        let spec_ctrl = GuestSpecCtrl::detect(shared.mitigations.ibrs_always);
        Ok(VtxVcpu {
            registers: GuestRegisters {
                gprs: [0; 16],
                cr2: 0,
                host_rsp: 0,
            },
            state: Cell::new(State::Unloaded),
            broken: Cell::new(None),
            due: Due::empty(),
            has_timer: shared.controls.pin.contains(Pin::PREEMPTION_TIMER),
            timer_shift: shared.capabilities.timer_shift,
            deadline: u64::MAX,
            queued: None,
            cr0_shadow: 0,
            cr4_shadow: 0,
            proc: shared.controls.proc,
            entry: shared.controls.entry,
            vpid: vpid.unwrap_or(0),
            last_cpu: None,
            initialized: false,
            refusal: None,
            fpu: GuestFpu::new(shared.fpu),
            debug: GuestDebug::new(),
            spec_ctrl,
            switched: [0; MSRS_SWITCHED.len()],
            setup,
            vmcs,
            virtual_apic,
            shared,
        })
    }

    /// Whether the guest's DR0-DR3, DR6, FPU state and switched MSRs are in the processor.
    fn is_loaded(&self) -> bool {
        self.state.get() != State::Unloaded
    }

    /// A field of this vCPU's VMCS; 0 and [`State::Broken`] when the processor refuses.
    #[inline(always)]
    fn read(&self, field: Field) -> u64 {
        if field.is_universal() {
            // SAFETY: accessors run only while loaded (`VirtualCpu`), so in VMX operation.
            return unsafe { vmread_universal(field) };
        }
        // SAFETY: as above.
        match unsafe { vmread(field) } {
            Some(value) => value,
            None => {
                self.break_down(field);
                0
            }
        }
    }

    /// Sets a field of this vCPU's VMCS; [`State::Broken`] when the processor refuses.
    #[inline(always)]
    fn write(&self, field: Field, value: u64) {
        // SAFETY: as for `read`. Host fields are written by `write_host_state` only, with the
        // values that this pCPU runs with.
        if !unsafe { vmwrite(field, value) } {
            self.break_down(field);
        }
    }

    #[cold]
    #[inline(never)]
    fn break_down(&self, field: Field) {
        if self.state.get() != State::Broken {
            self.state.set(State::Broken);
            self.broken.set(Some(field));
        }
    }

    fn interruptibility(&self) -> Interruptibility {
        Interruptibility::from_bits_retain(self.read(Field::GuestInterruptibility) as u32)
    }

    fn set_interruptibility(&self, value: Interruptibility) {
        self.write(Field::GuestInterruptibility, value.bits().into());
    }

    fn set_proc(&mut self, proc: Proc) {
        if proc != self.proc {
            self.proc = proc;
            self.write(Field::ProcessorControls, proc.bits().into());
        }
    }

    /// Writes all that does not change while this VMCS lives.
    fn initialize(&mut self) {
        let controls = self.shared.controls;
        let mut proc2 = controls.proc2;
        if self.vpid == 0 {
            proc2.remove(Proc2::VPID);
        }
        self.write(Field::PinControls, controls.pin.bits().into());
        self.write(Field::ProcessorControls, self.proc.bits().into());
        self.write(Field::SecondaryControls, proc2.bits().into());
        self.write(Field::ExitControls, controls.exit.bits().into());
        self.write(Field::EntryControls, self.entry.bits().into());
        if self.vpid != 0 {
            self.write(Field::Vpid, self.vpid.into());
        }
        if let Some((page, _)) = self.virtual_apic {
            self.write(Field::VirtualApicAddress, page.as_u64());
            self.write(Field::TprThreshold, 0);
        }
        if proc2.contains(Proc2::XSAVES) {
            // IA32_XSS is 0 (`FpuFeatures::prepare`, and no guest changes it), so neither exits.
            self.write(Field::XssExitingBitmap, 0);
        }
        if proc2.contains(Proc2::PAUSE_LOOP) {
            self.write(Field::PleGap, PLE_GAP);
            self.write(Field::PleWindow, PLE_WINDOW);
        }
        self.write(Field::ExceptionBitmap, EXCEPTION_BITMAP);
        self.write(Field::MsrBitmap, self.shared.msr_bitmap.as_u64());
        let ept = self.shared.capabilities.ept();
        self.write(Field::EptPointer, ept.pointer(self.setup.nested_root));
        self.write(Field::VmcsLinkPointer, u64::MAX);
        self.write(Field::Cr0Mask, !CR0_GUEST_OWNED);
        self.write(Field::Cr4Mask, !CR4_GUEST_OWNED);
        self.write(Field::GuestPat, PAT_RESET);
        for field in [
            Field::TscOffset,
            Field::PageFaultErrorMask,
            Field::PageFaultErrorMatch,
            Field::Cr3TargetCount,
            Field::ExitMsrStoreCount,
            Field::ExitMsrLoadCount,
            Field::EntryMsrLoadCount,
            Field::EntryInterruptionInfo,
            Field::GuestDebugctl,
            Field::GuestSysenterCs,
            Field::GuestSysenterEsp,
            Field::GuestSysenterEip,
        ] {
            self.write(field, 0);
        }
        self.set_state(&CpuState::reset());
    }

    /// Writes what an exit loads: the state of this pCPU as it is now.
    fn write_host_state(&self) {
        let (frame, flags) = Cr3::read_raw();
        self.write(Field::HostCr0, Cr0::read_raw());
        self.write(
            Field::HostCr3,
            frame.start_address().as_u64() | u64::from(flags),
        );
        self.write(Field::HostCr4, Cr4::read_raw());
        for (field, selector) in [
            (Field::HostCsSelector, CS::get_reg()),
            (Field::HostSsSelector, SS::get_reg()),
            (Field::HostDsSelector, DS::get_reg()),
            (Field::HostEsSelector, ES::get_reg()),
            (Field::HostFsSelector, FS::get_reg()),
            (Field::HostGsSelector, GS::get_reg()),
        ] {
            self.write(field, u64::from(selector.0) & !7);
        }
        let gdtr = sgdt();
        let tr = task_register();
        self.write(Field::HostTrSelector, tr.into());
        self.write(
            Field::HostTrBase,
            task_state_base(task_state_descriptor(gdtr.base.as_u64(), tr)),
        );
        self.write(Field::HostGdtrBase, gdtr.base.as_u64());
        self.write(Field::HostIdtrBase, sidt().base.as_u64());
        for (field, number) in [
            (Field::HostFsBase, msr::FS_BASE),
            (Field::HostGsBase, msr::GS_BASE),
            (Field::HostEfer, msr::EFER),
            (Field::HostPat, msr::PAT),
            (Field::HostSysenterCs, msr::SYSENTER_CS),
            (Field::HostSysenterEsp, msr::SYSENTER_ESP),
            (Field::HostSysenterEip, msr::SYSENTER_EIP),
        ] {
            // SAFETY: every processor with VT-x in 64-bit mode has these registers.
            self.write(field, unsafe { rdmsr(number) });
        }
        let landing = if self.shared.mitigations.fill_returns {
            exit_landing_filling as *const ()
        } else {
            exit_landing as *const ()
        };
        self.write(Field::HostRip, landing as u64);
    }

    /// Numbers and values of the MSRs that this processor has among [`MSRS_SWITCHED`].
    fn switched_msrs(&self) -> impl Iterator<Item = (usize, u32)> + use<> {
        let rdtscp = self.shared.controls.proc2.contains(Proc2::RDTSCP);
        MSRS_SWITCHED
            .into_iter()
            .enumerate()
            .filter(move |&(_, number)| number != msr::TSC_AUX || rdtscp)
    }

    /// IA-32e mode follows EFER.LME and CR0.PG (SDM vol. 3A, section 10.8.5).
    fn update_long_mode(&mut self, cr0: u64, efer: u64) {
        let active = efer & EFER_LME != 0 && cr0 & CR0_PG != 0;
        let efer = if active {
            efer | EFER_LMA
        } else {
            efer & !EFER_LMA
        };
        self.write(Field::GuestEfer, efer);
        let mut entry = self.entry;
        entry.set(EntryControls::IA32E_GUEST, active);
        if entry != self.entry {
            self.entry = entry;
            self.write(Field::EntryControls, entry.bits().into());
        }
    }

    /// The things that are due before an entry; rarely any.
    #[cold]
    #[inline(never)]
    fn before_entry(&mut self) {
        let due = core::mem::replace(&mut self.due, Due::empty());
        if due.contains(Due::L1D) {
            // SAFETY: `Mitigations::choose` found the register.
            unsafe { mitigation::flush_l1d() };
        }
        // Without a VPID each entry drops all translations anyway.
        if due.contains(Due::FLUSH) && self.vpid != 0 {
            // SAFETY: loaded, so in VMX operation, and VPIDs are on.
            unsafe { self.shared.flush_vpid(self.vpid) };
        }
        if due.contains(Due::PDPTES) {
            self.load_pdptes();
        }
        if due.contains(Due::INJECT)
            && let Some(event) = self.queued.take()
        {
            self.write_injection(event);
        }
        if due.contains(Due::BUFFERS) {
            self.due |= Due::BUFFERS;
            // Last, for that nothing but the entry itself comes after it.
            // SAFETY: the kernel's DS is that of its data.
            unsafe { mitigation::clear_buffers() };
        }
    }

    fn write_injection(&self, event: Event) {
        let (mut info, error_code, length) = InterruptionInfo::encode(event);
        if info.has_error_code() {
            // Real mode pushes none (SDM vol. 3C, section 27.2.1.3).
            if self.read(Field::GuestCr0) & CR0_PE == 0 {
                info = info.without_error_code();
            } else {
                self.write(Field::EntryExceptionErrorCode, error_code.into());
            }
        }
        if info.is_software() {
            self.write(Field::EntryInstructionLength, length.into());
        }
        self.write(Field::EntryInterruptionInfo, info.0.into());
    }

    /// Reads the four page-directory-pointer entries that CR3 points to, for a guest in PAE
    /// paging: an entry takes them from the VMCS (SDM vol. 3C, section 27.3.2.4).
    /// An entry in memory that is not there counts as not present, and so does one that the VM entry
    /// would refuse: the VMM has checked them, but another vCPU may have changed one since.
    fn load_pdptes(&self) {
        let paging = self.read(Field::GuestCr0) & CR0_PG != 0;
        let pae = self.read(Field::GuestCr4) & CR4_PAE != 0;
        if !paging || !pae || self.entry.contains(EntryControls::IA32E_GUEST) {
            return;
        }
        let table = Gpa(self.read(Field::GuestCr3) & 0xffff_ffe0);
        for (i, field) in PDPTES.into_iter().enumerate() {
            let entry = self
                .translate(table + 8 * i as u64)
                .map_or(0, |hpa| self.shared.memory.read_u64(hpa));
            let valid = pdpte_is_valid(entry, self.shared.capabilities.physical_bits);
            self.write(field, if valid { entry } else { 0 });
        }
    }

    /// Host address of guest memory, from the nested tables; `None` where nothing is mapped.
    fn translate(&self, gpa: Gpa) -> Option<Hpa> {
        let format = self.shared.capabilities.ept();
        let mut table = self.setup.nested_root;
        for level in (1..=4_u8).rev() {
            let shift = 12 + 9 * (u32::from(level) - 1);
            let index = gpa.as_u64() >> shift & 0x1ff;
            let entry = self.shared.memory.read_u64(table + 8 * index);
            if !format.is_present(entry) {
                return None;
            }
            if format.is_leaf(entry, level) {
                let offset = gpa.as_u64() & ((1 << shift) - 1);
                return Some(Hpa(format.address(entry).as_u64() | offset));
            }
            table = format.address(entry);
        }
        None
    }

    /// The instruction failed, or there was nothing to enter.
    #[cold]
    #[inline(never)]
    fn refused(&mut self, outcome: Outcome) -> Exit {
        let error = match outcome {
            Outcome::FailValid => self.read(Field::InstructionError) as u32,
            Outcome::FailInvalid | Outcome::Exit => 0,
        };
        self.refusal = Some(Refusal::Instruction(error));
        Exit::EntryFailure { code: error.into() }
    }

    /// The processor left the guest state unloaded. `None`: mended, to be entered again.
    #[cold]
    #[inline(never)]
    fn refused_late(&mut self, reason: u32) -> Option<Exit> {
        if reason as u16 == reason::INVALID_GUEST_STATE && self.mend_for_bochs() {
            return None;
        }
        self.refusal = Some(Refusal::Late(reason, self.read(Field::ExitQualification)));
        Some(Exit::EntryFailure {
            code: reason.into(),
        })
    }

    /// Bochs 2.7 demands that CS.RPL equals CS.DPL also of unrestricted guests, where a
    /// real-mode CS has any low bits; its check looks at code segments only. A data segment
    /// in CS is what the manual allows there (type 3), and the guest can't tell. Whether
    /// anything changed. Processors never refuse such a state, so they never get here.
    fn mend_for_bochs(&self) -> bool {
        const READ_WRITE_ACCESSED: u8 = 3;
        let rights = AccessRights::from(self.read(Field::GuestCsRights) as u32);
        let rpl = self.read(Field::GuestCsSelector) & 3;
        let mend = rpl != 0 && rights.dpl() == 0 && matches!(rights.kind(), 9 | 11);
        if mend {
            let rights = rights.with_kind(READ_WRITE_ACCESSED);
            self.write(Field::GuestCsRights, u32::from(rights).into());
        }
        mend
    }

    /// Decodes an exit. Reads only the fields that this reason defines.
    #[inline(always)]
    fn decode(&mut self, basic_reason: u16) -> Exit {
        match basic_reason {
            reason::CPUID => Exit::Cpuid,
            reason::VMCALL => Exit::Hypercall,
            reason::IO => match port_io(self.read(Field::ExitQualification)) {
                Some(io) => Exit::PortIo(io),
                None => self.unknown(basic_reason),
            },
            reason::RDMSR => Exit::MsrRead,
            reason::WRMSR => Exit::MsrWrite,
            reason::EXTERNAL_INTERRUPT => Exit::ExternalInterrupt,
            reason::PREEMPTION_TIMER => Exit::Deadline,
            reason::HLT => Exit::Halt,
            reason::EPT_VIOLATION => {
                let qualification = self.read(Field::ExitQualification);
                self.interrupted_delivery(qualification & NMI_UNBLOCKED_BY_IRET != 0);
                Exit::NestedPageFault(nested_page_fault(
                    qualification,
                    self.read(Field::GuestPhysicalAddress),
                    self.read(Field::GuestLinearAddress),
                ))
            }
            reason::EPT_MISCONFIGURATION => {
                self.interrupted_delivery(false);
                Exit::NestedMisconfiguration(Gpa(self.read(Field::GuestPhysicalAddress)))
            }
            reason::TPR_BELOW_THRESHOLD => {
                // Above the priority as it is now, it would make the next entry fail.
                self.write(Field::TprThreshold, 0);
                Exit::InterruptWindow
            }
            reason::INTERRUPT_WINDOW => {
                self.set_proc(self.proc - Proc::INTERRUPT_WINDOW);
                Exit::InterruptWindow
            }
            reason::NMI_WINDOW => {
                self.set_proc(self.proc - Proc::NMI_WINDOW);
                Exit::NmiWindow
            }
            reason::CONTROL_REGISTER => {
                Exit::CrAccess(Some(cr_access(self.read(Field::ExitQualification))))
            }
            reason::EXCEPTION_OR_NMI => self.exception(),
            reason::PAUSE => Exit::Pause,
            reason::XSETBV => Exit::Xsetbv,
            reason::WBINVD => Exit::Wbinvd,
            reason::INVD => Exit::Invd,
            reason::MONITOR => Exit::Monitor,
            reason::MWAIT => Exit::Mwait,
            reason::RDPMC => Exit::Rdpmc,
            reason::RDRAND | reason::RDSEED => Exit::Random,
            reason::TRIPLE_FAULT => Exit::TripleFault,
            reason::INIT => Exit::Init,
            reason::TASK_SWITCH => self.task_switch(),
            reason::GETSEC
            | reason::VMCLEAR..=reason::VMXON
            | reason::INVEPT
            | reason::INVVPID
            | reason::VMFUNC => Exit::VirtualizationInstruction,
            _ => self.unknown(basic_reason),
        }
    }

    #[cold]
    #[inline(never)]
    fn unknown(&self, basic_reason: u16) -> Exit {
        Exit::Unknown {
            code: basic_reason.into(),
            info: self.read(Field::ExitQualification),
        }
    }

    /// An exit by an exception of [`EXCEPTION_BITMAP`], or by an NMI of the host.
    #[inline(never)]
    fn exception(&mut self) -> Exit {
        let info = InterruptionInfo(self.read(Field::ExitInterruptionInfo) as u32);
        let vector = info.vector();
        let unblocked = u64::from(info.0) & NMI_UNBLOCKED_BY_IRET != 0 && vector != DOUBLE_FAULT;
        self.interrupted_delivery(unblocked && !info.is_nmi());
        if info.is_nmi() {
            return Exit::Nmi;
        }
        if vector == MACHINE_CHECK {
            raise_machine_check();
            return Exit::ExternalInterrupt;
        }
        if vector == DEBUG_EXCEPTION {
            self.debug_exception(info);
        }
        Exit::Exception {
            vector,
            error_code: info
                .has_error_code()
                .then(|| self.read(Field::ExitInterruptionErrorCode) as u32),
        }
    }

    /// A task switch: what it is for, and the event that it delivers. Such an event is not delivered again.
    #[cold]
    #[inline(never)]
    fn task_switch(&mut self) -> Exit {
        let (selector, source) = task_switch(self.read(Field::ExitQualification));
        let info = InterruptionInfo(self.read(Field::IdtVectoringInfo) as u32);
        let by_event = source == TaskSource::Gate;
        let length = if by_event && !info.is_software() {
            0
        } else {
            self.read(Field::ExitInstructionLength) as u8
        };
        let event = if by_event {
            let code = self.read(Field::IdtVectoringErrorCode) as u32;
            info.decode(code, length)
        } else {
            None
        };
        if event == Some(Event::Nmi) {
            self.set_interruptibility(self.interruptibility() | Interruptibility::NMI);
        }
        Exit::TaskSwitch(TaskSwitch {
            selector,
            source,
            length,
            event,
        })
    }

    /// Does what the processor would have done with #DB but for the exit, so that injecting
    /// it is all that is left (SDM vol. 3C, section 28.1).
    fn debug_exception(&mut self, info: InterruptionInfo) {
        let mut qualification = self.read(Field::ExitQualification);
        if info.is_int1() || qualification & QUALIFICATION_BD != 0 {
            // These tell of themselves only; Bochs 2.7 adds the step that MOV SS has held back.
            qualification &= !PENDING_DEBUG_BS;
        }
        let dr6 = dr6_after_debug_exception(GuestDebug::read_dr6(), qualification);
        GuestDebug::write_dr6(dr6);
        let dr7 = self.read(Field::GuestDr7);
        if dr7 & DR7_GD != 0 {
            self.write(Field::GuestDr7, dr7 & !DR7_GD);
        }
        if info.is_int1() {
            // A trap: the guest returns behind the instruction.
            self.skip_instruction(None);
        } else if self.read(Field::GuestRflags) & RFLAGS_TF != 0
            && self.interruptibility().intersects(Interruptibility::SHADOW)
        {
            // An entry demands this pairing (SDM vol. 3C, section 27.3.1.5).
            let pending = self.read(Field::GuestPendingDebug);
            self.write(Field::GuestPendingDebug, pending | PENDING_DEBUG_BS);
        }
    }

    /// Queues the event whose delivery this exit interrupted, if there was one, and restores
    /// NMI blocking that an interrupted IRET had already ended (SDM vol. 3C, section 28.2.3).
    fn interrupted_delivery(&mut self, nmi_unblocked: bool) {
        let info = InterruptionInfo(self.read(Field::IdtVectoringInfo) as u32);
        if !info.is_valid() {
            if nmi_unblocked {
                self.set_interruptibility(self.interruptibility() | Interruptibility::NMI);
            }
            return;
        }
        let error_code = if info.has_error_code() {
            self.read(Field::IdtVectoringErrorCode) as u32
        } else {
            0
        };
        let length = if info.is_software() {
            self.read(Field::ExitInstructionLength) as u8
        } else {
            0
        };
        if let Some(event) = info.decode(error_code, length) {
            if event == Event::Nmi {
                // Its delivery blocks NMIs again.
                self.set_interruptibility(self.interruptibility() - Interruptibility::NMI);
            }
            self.inject(event);
        }
    }
}

/// The task register's selector.
fn task_register() -> u16 {
    let selector: u16;
    // SAFETY: STR only reads.
    unsafe {
        asm!("str {0:x}", out(reg) selector, options(nomem, nostack, preserves_flags));
    }
    selector
}

/// The two words of the TSS descriptor that the task register's `selector` names.
fn task_state_descriptor(gdt: u64, selector: u16) -> [u64; 2] {
    let descriptor = (gdt + u64::from(selector & !7)) as *const [u64; 2];
    // SAFETY: the task register is loaded, so its 16-byte descriptor is in this pCPU's GDT.
    unsafe { descriptor.read_unaligned() }
}

/// Base address in a 64-bit TSS descriptor (SDM vol. 3A, figure 8-4).
const fn task_state_base([low, high]: [u64; 2]) -> u64 {
    (low >> 16 & 0xff_ffff) | (low >> 56 << 24) | high << 32
}

impl VirtualCpu for VtxVcpu {
    const LOADS_PDPTES: bool = true;

    fn load(&mut self, cpu: usize) {
        assert!(!self.is_loaded(), "vCPU loaded twice");
        self.state.set(State::Launch);
        self.shared.separate_predictions(cpu, self.setup.vm);
        // A fresh region must be cleared once before use; `unload` leaves it clear.
        // SAFETY: `Backend::enable` ran on this pCPU, and the frame is this vCPU's VMCS, which
        // is active nowhere: it is fresh or `unload` cleared it.
        let cleared = self.initialized || unsafe { vmclear(self.vmcs) };
        // SAFETY: as above.
        if !cleared || !unsafe { vmptrld(self.vmcs) } {
            self.state.set(State::Broken);
            self.broken.set(None);
        }
        if !self.initialized {
            self.initialized = true;
            self.initialize();
        }
        self.write_host_state();
        self.due
            .set(Due::BUFFERS, self.shared.mitigations.clear_buffers);
        self.due.set(Due::L1D, self.shared.mitigations.flush_l1d);
        if self.last_cpu != Some(cpu) {
            self.last_cpu = Some(cpu);
            self.due |= Due::FLUSH;
            // SAFETY: `Backend::enable` ran on this pCPU.
            unsafe { self.shared.flush_ept(self.setup.nested_root) };
        }
        for (i, number) in self.switched_msrs() {
            // SAFETY: the processor has the register, and the value was read from it or
            // checked by `set_msr`; the hypervisor uses none of these.
            unsafe { wrmsr(number, self.switched[i]) };
        }
        self.spec_ctrl.load();
        self.debug.load();
        // SAFETY: `Backend::enable` prepared the FPU, and whoever was loaded here before was
        // unloaded, which saved its state.
        unsafe { self.fpu.load() };
    }

    fn unload(&mut self) {
        if !self.is_loaded() {
            return;
        }
        // SAFETY: loaded on this pCPU.
        unsafe { self.fpu.save() };
        self.debug = GuestDebug::save();
        self.spec_ctrl.unload();
        for (i, number) in self.switched_msrs() {
            // SAFETY: the processor has the register.
            self.switched[i] = unsafe { rdmsr(number) };
        }
        // SAFETY: in VMX operation, and this VMCS is active on this pCPU only.
        self.initialized &= unsafe { vmclear(self.vmcs) };
        self.state.set(State::Unloaded);
    }

    #[inline(always)]
    fn enter(&mut self) -> Exit {
        loop {
            if !self.due.is_empty() {
                self.before_entry();
            }
            if self.has_timer {
                // Always armed, since Bochs 2.7 does not deliver a host interrupt to a guest
                // that was entered with IF = 0 before IF changes.
                // The timer counts when a bit of the TSC changes (SDM vol. 3C, section 26.5.1).
                let now = rdtsc() >> self.timer_shift;
                let left = self.deadline.saturating_sub(now);
                self.write(Field::PreemptionTimer, left.min(u32::MAX.into()));
            }
            let resume = match self.state.get() {
                State::Resume => true,
                State::Launch => false,
                State::Unloaded | State::Broken => return self.refused(Outcome::FailInvalid),
            };
            // SAFETY: loaded, so in VMX operation with the host state written, interrupts off
            // (`VirtualCpu`), and `registers` belongs to this VMCS.
            let outcome = unsafe { enter(&raw mut self.registers, resume) };
            if outcome != Outcome::Exit {
                return self.refused(outcome);
            }
            let reason = self.read(Field::ExitReason) as u32;
            if reason & ENTRY_FAILED != 0 {
                match self.refused_late(reason) {
                    Some(exit) => return exit,
                    None => continue,
                }
            }
            self.state.set(State::Resume);
            return self.decode(reason as u16);
        }
    }

    #[inline]
    fn gpr(&self, gpr: Gpr) -> u64 {
        match gpr {
            Gpr::Rsp => self.read(Field::GuestRsp),
            _ => self.registers.gprs[gpr as usize],
        }
    }

    #[inline]
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        match gpr {
            Gpr::Rsp => self.write(Field::GuestRsp, value),
            _ => self.registers.gprs[gpr as usize] = value,
        }
    }

    fn rip(&self) -> u64 {
        self.read(Field::GuestRip)
    }

    fn set_rip(&mut self, rip: u64) {
        self.write(Field::GuestRip, rip);
    }

    fn rflags(&self) -> u64 {
        self.read(Field::GuestRflags)
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.write(Field::GuestRflags, rflags);
    }

    fn segment(&self, name: SegmentName) -> Segment {
        let f = SegmentFields::of(name);
        Segment {
            selector: self.read(f.selector) as u16,
            base: self.read(f.base),
            limit: self.read(f.limit) as u32,
            rights: AccessRights::from(self.read(f.rights) as u32),
        }
    }

    fn set_segment(&mut self, name: SegmentName, segment: Segment) {
        let f = SegmentFields::of(name);
        self.write(f.selector, segment.selector.into());
        self.write(f.base, segment.base);
        self.write(f.limit, segment.limit.into());
        self.write(f.rights, u32::from(segment.rights).into());
    }

    fn cr0(&self) -> u64 {
        (self.read(Field::GuestCr0) & CR0_GUEST_OWNED) | (self.cr0_shadow & !CR0_GUEST_OWNED)
    }

    fn set_cr0(&mut self, value: u64) {
        let forced = self.shared.capabilities.cr0.ones & !Capabilities::CR0_UNRESTRICTED;
        let old = self.cr0_shadow;
        self.cr0_shadow = value;
        self.write(Field::Cr0Shadow, value);
        self.write(Field::GuestCr0, (value | forced) & !(CR0_CD | CR0_NW));
        self.update_long_mode(value, self.read(Field::GuestEfer));
        self.due |= Due::FLUSH;
        if (old ^ value) & CR0_LOADS_PDPTES != 0 {
            self.due |= Due::PDPTES;
        }
    }

    fn cr2(&self) -> u64 {
        self.registers.cr2
    }

    fn set_cr2(&mut self, value: u64) {
        self.registers.cr2 = value;
    }

    fn cr3(&self) -> u64 {
        self.read(Field::GuestCr3)
    }

    fn set_cr3(&mut self, value: u64) {
        self.write(Field::GuestCr3, value);
        self.due |= Due::FLUSH | Due::PDPTES;
    }

    fn cr4(&self) -> u64 {
        (self.read(Field::GuestCr4) & CR4_GUEST_OWNED) | (self.cr4_shadow & !CR4_GUEST_OWNED)
    }

    fn set_cr4(&mut self, value: u64) {
        let old = self.cr4();
        self.cr4_shadow = value;
        self.write(Field::Cr4Shadow, value);
        // With MCE off, a machine check while the guest runs would shut the whole machine down.
        let forced = self.shared.capabilities.cr4.ones | (Cr4::read_raw() & CR4_MCE);
        self.write(Field::GuestCr4, value | forced);
        self.due |= Due::FLUSH;
        if (old ^ value) & CR4_LOADS_PDPTES != 0 {
            self.due |= Due::PDPTES;
        }
    }

    fn efer(&self) -> u64 {
        self.read(Field::GuestEfer)
    }

    fn set_efer(&mut self, value: u64) {
        self.update_long_mode(self.cr0_shadow, value);
        self.due |= Due::FLUSH;
    }

    fn dr6(&self) -> u64 {
        GuestDebug::read_dr6()
    }

    fn set_dr6(&mut self, value: u64) {
        GuestDebug::write_dr6(value);
    }

    #[inline]
    fn dr7(&self) -> u64 {
        self.read(Field::GuestDr7)
    }

    fn set_dr7(&mut self, value: u64) {
        self.write(Field::GuestDr7, value);
    }

    fn breakpoints(&self) -> [u64; 4] {
        if self.is_loaded() {
            GuestDebug::save().dr
        } else {
            self.debug.dr
        }
    }

    fn set_breakpoints(&mut self, addresses: [u64; 4]) {
        if self.is_loaded() {
            self.debug = GuestDebug::save();
        }
        self.debug.dr = addresses;
        if self.is_loaded() {
            self.debug.load();
        }
    }

    fn gdtr(&self) -> DescriptorTable {
        DescriptorTable {
            base: self.read(Field::GuestGdtrBase),
            limit: self.read(Field::GuestGdtrLimit) as u16,
        }
    }

    fn idtr(&self) -> DescriptorTable {
        DescriptorTable {
            base: self.read(Field::GuestIdtrBase),
            limit: self.read(Field::GuestIdtrLimit) as u16,
        }
    }

    fn set_gdtr(&mut self, table: DescriptorTable) {
        self.write(Field::GuestGdtrBase, table.base);
        self.write(Field::GuestGdtrLimit, table.limit.into());
    }

    fn set_idtr(&mut self, table: DescriptorTable) {
        self.write(Field::GuestIdtrBase, table.base);
        self.write(Field::GuestIdtrLimit, table.limit.into());
    }

    fn vector(&mut self, number: u8) -> [u8; 32] {
        let loaded = self.is_loaded();
        self.fpu.vector(number, loaded)
    }

    fn set_vector(&mut self, number: u8, value: &[u8; 32]) {
        let loaded = self.is_loaded();
        self.fpu.set_vector(number, value, loaded);
    }

    fn mmx(&mut self, number: u8) -> u64 {
        let loaded = self.is_loaded();
        self.fpu.mmx(number, loaded)
    }

    fn set_mmx(&mut self, number: u8, value: u64) {
        let loaded = self.is_loaded();
        self.fpu.set_mmx(number, value, loaded);
    }

    fn legacy_fpu(&mut self) -> [u8; 512] {
        let loaded = self.is_loaded();
        self.fpu.legacy(loaded)
    }

    fn set_legacy_fpu(&mut self, image: &[u8; 512]) {
        let loaded = self.is_loaded();
        self.fpu.set_legacy(image, loaded);
    }

    fn pkru(&self) -> u32 {
        self.fpu.pkru(self.is_loaded())
    }

    fn xcr0(&self) -> u64 {
        // XSETBV always exits, so that the copy is good.
        self.fpu.xcr0(false)
    }

    fn set_xcr0(&mut self, value: u64) {
        let loaded = self.is_loaded();
        self.fpu.set_xcr0(value, loaded);
    }

    fn state(&self) -> CpuState {
        let mut state = CpuState::reset();
        for (gpr, slot) in Gpr::ALL.into_iter().zip(&mut state.gprs) {
            *slot = self.gpr(gpr);
        }
        state.rip = self.rip();
        state.rflags = self.rflags();
        state.cr0 = self.cr0();
        state.cr2 = self.cr2();
        state.cr3 = self.cr3();
        state.cr4 = self.cr4();
        state.efer = self.efer();
        for (name, slot) in SegmentName::ALL.into_iter().zip(&mut state.segments) {
            *slot = self.segment(name);
        }
        state.gdtr = self.gdtr();
        state.idtr = self.idtr();
        let debug = if self.is_loaded() {
            GuestDebug::save()
        } else {
            self.debug
        };
        state.dr = debug.dr;
        state.dr6 = debug.dr6;
        state.dr7 = self.read(Field::GuestDr7);
        state.xcr0 = self.xcr0();
        state
    }

    fn set_state(&mut self, state: &CpuState) {
        for (gpr, &value) in Gpr::ALL.into_iter().zip(&state.gprs) {
            self.set_gpr(gpr, value);
        }
        self.set_rip(state.rip);
        self.set_rflags(state.rflags);
        // EFER's LME first: LMA and the entry control follow when CR0.PG comes.
        self.write(Field::GuestEfer, state.efer);
        self.set_cr0(state.cr0);
        self.set_cr2(state.cr2);
        self.set_cr3(state.cr3);
        self.set_cr4(state.cr4);
        for (name, &segment) in SegmentName::ALL.into_iter().zip(&state.segments) {
            self.set_segment(name, segment);
        }
        self.set_gdtr(state.gdtr);
        self.set_idtr(state.idtr);
        self.write(Field::GuestDr7, state.dr7);
        self.debug = GuestDebug {
            dr: state.dr,
            dr6: state.dr6,
        };
        if self.is_loaded() {
            self.debug.load();
        }
        self.set_xcr0(state.xcr0);
        self.write(Field::GuestActivity, 0);
        self.write(Field::GuestInterruptibility, 0);
        self.write(Field::GuestPendingDebug, 0);
        self.cancel_injection();
        self.request_interrupt_window(false);
        self.request_nmi_window(false);
    }

    fn msr(&self, number: u32) -> Option<u64> {
        match number {
            msr::FS_BASE => Some(self.read(Field::GuestFsBase)),
            msr::GS_BASE => Some(self.read(Field::GuestGsBase)),
            msr::SYSENTER_CS => Some(self.read(Field::GuestSysenterCs)),
            msr::SYSENTER_ESP => Some(self.read(Field::GuestSysenterEsp)),
            msr::SYSENTER_EIP => Some(self.read(Field::GuestSysenterEip)),
            msr::PAT => Some(self.read(Field::GuestPat)),
            msr::DEBUGCTL => Some(self.read(Field::GuestDebugctl)),
            msr::SPEC_CTRL => self.spec_ctrl.get(),
            _ => {
                let (i, _) = self.switched_msrs().find(|&(_, n)| n == number)?;
                if self.is_loaded() {
                    // SAFETY: the processor has the register.
                    Some(unsafe { rdmsr(number) })
                } else {
                    self.switched.get(i).copied()
                }
            }
        }
    }

    fn set_msr(&mut self, number: u32, value: u64) -> bool {
        let (field, acceptable) = match number {
            msr::FS_BASE => (Field::GuestFsBase, is_canonical(value)),
            msr::GS_BASE => (Field::GuestGsBase, is_canonical(value)),
            msr::SYSENTER_CS => (Field::GuestSysenterCs, value >> 32 == 0),
            msr::SYSENTER_ESP => (Field::GuestSysenterEsp, is_canonical(value)),
            msr::SYSENTER_EIP => (Field::GuestSysenterEip, is_canonical(value)),
            msr::PAT => (Field::GuestPat, is_pat(value)),
            msr::DEBUGCTL => (Field::GuestDebugctl, value & !DEBUGCTL_BTF == 0),
            msr::SPEC_CTRL => {
                let loaded = self.is_loaded();
                return self.spec_ctrl.set(value, loaded);
            }
            _ => return self.set_switched_msr(number, value),
        };
        if acceptable {
            self.write(field, value);
        }
        acceptable
    }

    fn set_tsc_scale(&mut self, scale: TscScale) {
        let Some(multiplier) = scale.multiplier() else {
            return;
        };
        self.write(Field::TscMultiplier, multiplier);
        let proc2 = Proc2::from_bits_retain(self.read(Field::SecondaryControls) as u32);
        self.write(
            Field::SecondaryControls,
            (proc2 | Proc2::TSC_SCALING).bits().into(),
        );
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.write(Field::TscOffset, offset);
    }

    #[inline(always)]
    fn skip_instruction(&mut self, length: Option<u8>) {
        let length = match length {
            Some(bytes) => bytes.into(),
            None => self.read(Field::ExitInstructionLength),
        };
        let rip = self.read(Field::GuestRip);
        let mut next = rip.wrapping_add(length);
        // Only 64-bit code goes on past 4 GiB; elsewhere the offset wraps.
        if (rip ^ next) >> 32 != 0
            && !AccessRights::from(self.read(Field::GuestCsRights) as u32).long()
        {
            next &= 0xffff_ffff;
        }
        self.write(Field::GuestRip, next);
        let blocking = self.interruptibility();
        if blocking.intersects(Interruptibility::SHADOW) {
            self.set_interruptibility(blocking - Interruptibility::SHADOW);
        }
    }

    fn begin_shadow(&mut self, shadow: Shadow) {
        let blocking = match shadow {
            Shadow::Sti => Interruptibility::STI,
            Shadow::MovSs => Interruptibility::MOV_SS,
        };
        self.set_interruptibility((self.interruptibility() - Interruptibility::SHADOW) | blocking);
        let steps = self.read(Field::GuestRflags) & RFLAGS_TF != 0
            && self.read(Field::GuestDebugctl) & DEBUGCTL_BTF == 0;
        if steps {
            // An entry demands this pairing (SDM vol. 3C, section 27.3.1.5).
            let pending = self.read(Field::GuestPendingDebug);
            self.write(Field::GuestPendingDebug, pending | PENDING_DEBUG_BS);
        }
    }

    fn unblock_nmis(&mut self) {
        let blocking = self.interruptibility();
        if blocking.contains(Interruptibility::NMI) {
            self.set_interruptibility(blocking - Interruptibility::NMI);
        }
    }

    #[inline]
    fn cpl_of_64_bit_code(&self) -> Option<u8> {
        let rights = |field| AccessRights::from(self.read(field) as u32);
        let long =
            self.entry.contains(EntryControls::IA32E_GUEST) && rights(Field::GuestCsRights).long();
        long.then(|| rights(Field::GuestSsRights).dpl())
    }

    fn instruction_bytes(&self) -> &[u8] {
        &[]
    }

    fn interrupt_ready(&self) -> bool {
        self.queued.is_none()
            && self.read(Field::GuestRflags) & RFLAGS_IF != 0
            && !self.interruptibility().intersects(Interruptibility::SHADOW)
    }

    fn nmi_ready(&self) -> bool {
        self.queued.is_none()
            && !self
                .interruptibility()
                .intersects(Interruptibility::SHADOW | Interruptibility::NMI)
    }

    fn inject(&mut self, event: Event) {
        self.queued = Some(event);
        self.due |= Due::INJECT;
    }

    fn queued(&self) -> Option<Event> {
        self.queued
    }

    fn cancel_injection(&mut self) {
        self.queued = None;
        self.due -= Due::INJECT;
    }

    fn request_interrupt_window(&mut self, on: bool) {
        let mut proc = self.proc;
        proc.set(Proc::INTERRUPT_WINDOW, on);
        self.set_proc(proc);
    }

    #[inline]
    fn task_priority(&self) -> Option<u8> {
        let (_, tpr) = self.virtual_apic?;
        // SAFETY: the page is this vCPU's from `new` to `drop`; the processor writes it only during an entry.
        Some(unsafe { tpr.read_volatile() })
    }

    fn set_task_priority(&mut self, tpr: u8, threshold: u8) {
        if let Some((_, shadow)) = self.virtual_apic {
            // SAFETY: as in `task_priority`.
            unsafe { shadow.write_volatile(tpr) };
            // Above the class that it has, an entry would be refused (SDM vol. 3C, section 27.2.1.1).
            self.write(Field::TprThreshold, threshold.min(tpr >> 4).into());
        }
    }

    fn request_nmi_window(&mut self, on: bool) {
        let mut proc = self.proc;
        proc.set(Proc::NMI_WINDOW, on);
        self.set_proc(proc);
    }

    fn set_deadline(&mut self, host_tsc: u64) -> bool {
        let period = 1_u64 << self.timer_shift;
        self.deadline = host_tsc.saturating_add(period - 1) >> self.timer_shift;
        self.has_timer
    }

    fn flush_guest_tlb(&mut self) {
        self.due |= Due::FLUSH;
    }

    fn explain_entry_failure(&self) -> String {
        let mut text = match (self.state.get(), self.refusal) {
            (State::Unloaded, _) => String::from("the vCPU is not loaded\n"),
            (State::Broken, _) => match self.broken.get() {
                None => String::from("VMCLEAR or VMPTRLD of its VMCS failed\n"),
                Some(field) => format!(
                    "VMREAD or VMWRITE of field {field:?} ({:#x}) failed\n",
                    field as u32
                ),
            },
            (_, None) => String::from("no entry was refused\n"),
            (_, Some(Refusal::Instruction(error))) => format!(
                "VM-instruction error {error}: {}\n",
                instruction_error(error)
            ),
            (_, Some(Refusal::Late(reason, qualification))) => format!(
                "exit reason {:#x} ({}), qualification {qualification:#x}\n",
                reason,
                match reason as u16 {
                    reason::INVALID_GUEST_STATE => "invalid guest state",
                    34 => "MSR loading",
                    41 => "machine check during entry",
                    _ => "unknown",
                }
            ),
        };
        if matches!(self.state.get(), State::Launch | State::Resume) {
            // SAFETY: loaded, so in VMX operation.
            let fields = VmcsFields::collect(|field| unsafe { vmread(field) });
            for failure in check(&fields, &self.shared.capabilities) {
                text.push_str("  ");
                text.push_str(&failure);
                text.push('\n');
            }
        }
        text
    }
}

impl VtxVcpu {
    fn set_switched_msr(&mut self, number: u32, value: u64) -> bool {
        let Some((i, _)) = self.switched_msrs().find(|&(_, n)| n == number) else {
            return false;
        };
        let acceptable = match number {
            msr::LSTAR | msr::CSTAR | msr::KERNEL_GS_BASE => is_canonical(value),
            msr::SFMASK | msr::TSC_AUX => value >> 32 == 0,
            _ => true,
        };
        if acceptable {
            if let Some(slot) = self.switched.get_mut(i) {
                *slot = value;
            }
            if self.is_loaded() {
                // SAFETY: the processor has the register and takes the value, as just checked;
                // the hypervisor uses none of these.
                unsafe { wrmsr(number, value) };
            }
        }
        acceptable
    }
}

/// VM-instruction errors that an entry can give (SDM vol. 3D, table 31-1).
fn instruction_error(error: u32) -> &'static str {
    match error {
        0 => "no current VMCS",
        4 => "VMLAUNCH of a VMCS that is not clear",
        5 => "VMRESUME of a VMCS that is not launched",
        7 => "invalid control fields",
        8 => "invalid host state",
        26 => "events blocked by MOV SS",
        _ => "see the manual",
    }
}

impl Drop for VtxVcpu {
    fn drop(&mut self) {
        self.unload();
        let owner = Owner::VmTables(self.setup.vm);
        self.shared.memory.free(self.vmcs, 1, owner);
        if let Some((page, _)) = self.virtual_apic {
            self.shared.memory.free(page, 1, owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_state_base_is_gathered_from_three_places() {
        let descriptor = [0x1200_8b34_5678_0067, 0xffff_9abc];
        assert_eq!(task_state_base(descriptor), 0xffff_9abc_1234_5678);
    }

    #[test]
    fn bits_that_policy_watches_are_not_the_guests_own() {
        for bit in [CR0_PG, CR0_CD, CR0_NW, 1 << 5] {
            assert_eq!(CR0_GUEST_OWNED & bit, 0);
        }
        // VMXE, OSXSAVE (shown in CPUID), PAE and PCIDE (paging modes), MCE, SMXE.
        for bit in [1 << 13, 1 << 18, CR4_PAE, 1 << 17, CR4_MCE, 1 << 14] {
            assert_eq!(CR4_GUEST_OWNED & bit, 0);
        }
    }
}
