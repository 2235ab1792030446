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

mod exits;
mod registers;
mod setup;

use alloc::{string::String, sync::Arc};
use core::cell::Cell;
use core::ptr::NonNull;

use bitflags::bitflags;
use mem::nested::EntryFormat;
use mem::{Gpa, Hpa, Owner, PAGE_SIZE};
use x86_64::registers::control::Cr4;

use super::Shared;
use super::capability::{EntryControls, Pin, Proc, Proc2};
use super::decode::{ENTRY_FAILED, InterruptionInfo};
use super::entry::{GuestRegisters, Outcome, enter};
use super::mitigation;
use super::vmcs::{Field, vmclear, vmptrld, vmread, vmread_universal, vmwrite};
use crate::cpu::{GuestDebug, GuestFpu, GuestSpecCtrl, is_canonical};
use crate::cpu::{msr, rdmsr, rdtsc, wrmsr};
use crate::state::{AccessRights, Event, Shadow, pdpte_is_valid};
use crate::{Exit, TscScale, VcpuSetup, VirtError, VirtualCpu};

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
        self.due
            .set(Due::BUFFERS, self.shared.mitigations.clear_buffers);
        self.due.set(Due::L1D, self.shared.mitigations.flush_l1d);
        if self.last_cpu != Some(cpu) {
            self.last_cpu = Some(cpu);
            // The VMCS keeps it, and it does not change while this pCPU runs guests.
            self.write_host_state();
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
        self.debug.save();
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
        self.explain_refusal()
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
