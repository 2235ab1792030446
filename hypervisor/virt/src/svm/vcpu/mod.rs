//! One vCPU on AMD-V: its VMCB, what the VMCB does not hold, and the way in and out.
//!
//! Invariants:
//! - The VMCB's frame belongs to this value from `new` to `drop`. No reference into it lives
//!   across `switch::enter_guest`, during which the processor writes it.
//! - A setter that changes a part which the processor may cache clears the part's clean bit.
//! - EVENTINJ is the one queue of events: filled by `inject`, or with EXITINTINFO after an exit.
//! - NMIs without virtual-NMI hardware: masked from injection until IRET has retired. The IRET
//!   intercept finds the IRET, a single step finds its end.
//!
//! Not here: policy. What a guest may see or set is checked by the VMM before it gets here.
//!
//! Unsafe: points into the VMCB's frame and runs the world switch.

mod exits;
mod registers;
mod step;

use alloc::{string::String, sync::Arc};
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use mem::{Hpa, OutOfFrames, Owner, PAGE_SIZE};

use super::decode;
use super::switch::{self, Frame};
use super::vmcb::{
    ATTRIBUTE_LONG, Clean, ControlArea, CrIntercepts, EventField, EventType, ExceptionIntercepts,
    Extensions, Intercepts1, Intercepts2, InterruptControl, InterruptState, NestedControl,
    SaveArea, TlbControl, Vmcb, VmcbSegment, exit_code,
};
use super::{Shared, TSC_RATIO, TSC_RATIO_ONE, checks, features::SvmFeatures};
use crate::cpu::{GuestDebug, GuestFpu, GuestSpecCtrl, PAT_RESET, msr, rdmsr, wrmsr};
use crate::exit::Exit;
use crate::state::{CpuState, Event, SegmentName, Shadow};
use crate::{Registers, TscScale, VcpuSetup, VirtualCpu};
use step::{Step, StepOver};

const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_SVME: u64 = 1 << 12;
const CR0_PG: u64 = 1 << 31;
/// CR0 bits on which cached translations depend: PE, WP, PG.
const CR0_PAGING: u64 = 1 | 1 << 16 | CR0_PG;
/// CR4 bits on which cached translations depend: PSE, PAE, PGE, LA57, PCIDE, SMEP, SMAP, PKE.
const CR4_PAGING: u64 = 0b111 << 4 & !(1 << 6) | 1 << 7 | 1 << 12 | 1 << 17 | 0b111 << 20;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_VM: u64 = 1 << 17;
/// DR6: breakpoint hits, BD and BT, the causes of #DB other than the single step itself.
const DR6_OTHER_CAUSES: u64 = 0xf | 1 << 13 | 1 << 15;
/// DEBUGCTL: LBR and BTF.
const DEBUGCTL_BITS: u64 = 0b11;
/// PAUSE instructions within `PAUSE_WINDOW` ticks of each other before one exits.
const PAUSE_COUNT: u16 = 3000;
const PAUSE_WINDOW: u16 = 128;

/// An AMD-V vCPU.
pub struct SvmVcpu {
    frame: Frame,
    vmcb: NonNull<Vmcb>,
    /// Value of `Shared::flushes` that this vCPU has acted on.
    flushes_seen: u64,
    /// What to write to the clean field after an exit.
    clean: Clean,
    flush: TlbControl,
    step: Option<Step>,
    nmi_masked: bool,
    nmi_window: bool,
    fills_returns: bool,
    loaded: bool,
    /// pCPU number of the last `load`.
    last_cpu: Option<usize>,
    /// Unique among all vCPUs ever made.
    serial: u64,
    asid_is_shared: bool,
    /// Low half of the task priority, which V_TPR lacks: 0, or writes to CR8 exit.
    sub_priority: u8,
    /// An interrupt waits for a lower task priority: writes to CR8 exit.
    priority_wanted: bool,
    vm: u16,
    fpu: GuestFpu,
    debug: GuestDebug,
    spec_ctrl: GuestSpecCtrl,
    tsc_aux: u64,
    /// TSC_RATIO while the vCPU is loaded; `None`: as it is otherwise.
    tsc_ratio: Option<u64>,
    shared: Arc<Shared>,
}

// SAFETY: `vmcb` points to a frame that only this value uses, so it may move with the value to
// another thread; the rest is `Send`.
unsafe impl Send for SvmVcpu {}

impl SvmVcpu {
    pub(super) fn new(
        shared: &Arc<Shared>,
        setup: VcpuSetup,
        serial: u64,
    ) -> Result<Self, OutOfFrames> {
        let page = shared
            .memory
            .allocate(1, PAGE_SIZE, Owner::VmTables(setup.vm))?;
        let vmcb = NonNull::new(shared.memory.pointer(page).cast::<Vmcb>())
            .ok_or(OutOfFrames { frames: 1 })?;
        let capabilities = &shared.capabilities;
        let has = |feature| capabilities.svm.contains(feature);
        let (asid, asid_is_shared) = assign_asid(setup.tag, capabilities.asids);
        let mut vcpu = SvmVcpu {
            frame: Frame {
                gprs: [0; 16],
                guest_vmcb: page.0,
                host_vmcb: 0,
            },
            vmcb,
            flushes_seen: 0,
            clean: if has(SvmFeatures::VMCB_CLEAN) {
                Clean::all()
            } else {
                Clean::empty()
            },
            flush: if has(SvmFeatures::FLUSH_BY_ASID) {
                TlbControl::FlushGuest
            } else {
                TlbControl::FlushAll
            },
            step: None,
            nmi_masked: false,
            nmi_window: false,
            fills_returns: capabilities.fills_returns(),
            loaded: false,
            last_cpu: None,
            serial,
            asid_is_shared,
            sub_priority: 0,
            priority_wanted: false,
            vm: setup.vm,
            fpu: GuestFpu::new(shared.fpu),
            debug: GuestDebug::new(),
            spec_ctrl: GuestSpecCtrl::detect(false),
            tsc_aux: 0,
            tsc_ratio: None,
            shared: shared.clone(),
        };
        vcpu.set_up_control(asid, setup.nested_root);
        vcpu.save_mut().pat = PAT_RESET;
        vcpu.set_state(&CpuState::reset());
        Ok(vcpu)
    }

    /// What exits, and where the tables are. Constant for the vCPU's life but for the windows.
    ///
    /// Not intercepted: CR0, CR3 and debug registers, which the VMCB or `load` switch and which
    /// can't turn on what CPUID hides; INVLPG and INVPCID, which the ASID confines; task
    /// switches, which the processor does itself in a guest. CR4 writes are, for that a guest
    /// can't turn on hidden features. #DB and #AC are because a guest can make either recur in
    /// its own delivery without end, and no interrupt of the host's gets in between. #UD is for
    /// VMCALL, the other vendor's hypercall.
    fn set_up_control(&mut self, asid: u32, nested_root: Hpa) {
        let shared = self.shared.clone();
        let has = |feature| shared.capabilities.svm.contains(feature);
        let control = self.control_mut();
        control.cr_writes = CrIntercepts::CR4;
        control.exceptions = ExceptionIntercepts::all();
        control.intercepts1 =
            Intercepts1::all() - Intercepts1::VINTR - Intercepts1::IRET - Intercepts1::PAUSE;
        control.intercepts2 = Intercepts2::all();
        if has(SvmFeatures::PAUSE_FILTER) {
            control.intercepts1 |= Intercepts1::PAUSE;
            control.pause_filter_count = PAUSE_COUNT;
            if has(SvmFeatures::PAUSE_FILTER_THRESHOLD) {
                control.pause_filter_threshold = PAUSE_WINDOW;
            }
        }
        control.iopm_base = shared.iopm.0;
        control.msrpm_base = shared.msrpm.0;
        control.asid = asid;
        control.interrupts = InterruptControl::new()
            .with_masking(true)
            .with_nmi_enable(has(SvmFeatures::VIRTUAL_NMI));
        control.nested_control = NestedControl::ENABLE;
        control.nested_root = nested_root.0;
    }

    #[inline]
    fn vmcb(&self) -> &Vmcb {
        // SAFETY: the frame is ours, aligned, and was zeroed or written by us and the processor
        // (every bit pattern that the processor stores is valid); the processor writes it only
        // within `enter`, which has `&mut self`.
        unsafe { self.vmcb.as_ref() }
    }

    #[inline]
    fn vmcb_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as in `vmcb`, and `&mut self` makes the reference the only one.
        unsafe { self.vmcb.as_mut() }
    }

    #[inline]
    fn control(&self) -> &ControlArea {
        &self.vmcb().control
    }

    #[inline]
    fn control_mut(&mut self) -> &mut ControlArea {
        &mut self.vmcb_mut().control
    }

    #[inline]
    fn save(&self) -> &SaveArea {
        &self.vmcb().save
    }

    #[inline]
    fn save_mut(&mut self) -> &mut SaveArea {
        &mut self.vmcb_mut().save
    }

    #[inline]
    fn has(&self, feature: SvmFeatures) -> bool {
        self.shared.capabilities.svm.contains(feature)
    }

    /// The processor must read these parts of the VMCB again.
    #[inline]
    fn changed(&mut self, parts: Clean) {
        self.control_mut().clean.remove(parts);
    }

    fn intercept1(&mut self, intercept: Intercepts1, on: bool) {
        self.control_mut().intercepts1.set(intercept, on);
        self.changed(Clean::INTERCEPTS);
    }

    /// Whether writes to CR8 exit. QEMU TCG (seen in 7.2) aborts when a guest writes CR8 while a virtual
    /// interrupt is pending, be it for the window only: there such a write exits.
    fn update_cr8_intercept(&mut self) {
        let aborts = self.shared.capabilities.repeats_injection && self.control().interrupts.irq();
        let intercept = self.priority_wanted || self.sub_priority != 0 || aborts;
        let control = self.control_mut();
        control.cr_writes.set(CrIntercepts::CR8, intercept);
        self.changed(Clean::INTERCEPTS);
    }

    fn segment_field(&self, name: SegmentName) -> &VmcbSegment {
        let save = self.save();
        match name {
            SegmentName::Es => &save.es,
            SegmentName::Cs => &save.cs,
            SegmentName::Ss => &save.ss,
            SegmentName::Ds => &save.ds,
            SegmentName::Fs => &save.fs,
            SegmentName::Gs => &save.gs,
            SegmentName::Ldtr => &save.ldtr,
            SegmentName::Tr => &save.tr,
        }
    }

    fn segment_field_mut(&mut self, name: SegmentName) -> &mut VmcbSegment {
        let save = self.save_mut();
        match name {
            SegmentName::Es => &mut save.es,
            SegmentName::Cs => &mut save.cs,
            SegmentName::Ss => &mut save.ss,
            SegmentName::Ds => &mut save.ds,
            SegmentName::Fs => &mut save.fs,
            SegmentName::Gs => &mut save.gs,
            SegmentName::Ldtr => &mut save.ldtr,
            SegmentName::Tr => &mut save.tr,
        }
    }

    /// Before VMRUN: drops translations that `flush_nested` called stale.
    #[inline]
    fn before_entry(&mut self) {
        let flushes = self.shared.flushes.load(Ordering::Relaxed);
        if flushes != self.flushes_seen {
            self.flushes_seen = flushes;
            self.flush_guest_tlb();
        }
    }

    /// Runs the guest to its next #VMEXIT.
    #[inline]
    fn run_guest(&mut self) {
        self.before_entry();
        let queued = self.control().event_injection.valid();
        let window = if queued {
            self.inject_virtually()
        } else {
            None
        };
        // SAFETY: the vCPU is loaded (`enter` checks it) on an enabled pCPU whose host state was
        // stored by `load`; the VMCB is ours, with the nested tables that the VM was set up with,
        // and with every intercept that protects the host; interrupts are disabled between
        // `load` and `unload`, and no reference into the VMCB is alive.
        unsafe {
            if self.fills_returns {
                switch::enter_guest_filling(&raw mut self.frame);
            } else {
                switch::enter_guest(&raw mut self.frame);
            }
        }
        if queued && let Some(window) = window {
            self.after_virtual_injection(window);
        }
    }

    /// Where EVENTINJ would deliver the interrupt in it twice, makes it a virtual interrupt for one
    /// entry. Returns then whether the interrupt window was asked for, which uses the same bits.
    ///
    /// QEMU TCG (7.2 to 10.0) delivers the interrupt within VMRUN, but remembers its vector as an
    /// exception still to be raised, which it does if anything stops its loop before the next #VMEXIT.
    #[inline(never)]
    fn inject_virtually(&mut self) -> Option<bool> {
        let event = self.control().event_injection;
        let is_interrupt = event.valid() && event.kind() == EventType::Interrupt;
        if !self.shared.capabilities.repeats_injection || !is_interrupt {
            return None;
        }
        let window = self.control().interrupts.irq();
        self.request_interrupt_window(true);
        self.intercept1(Intercepts1::VINTR, false);
        let control = self.control_mut();
        control.interrupts.set_vector(event.vector());
        control.event_injection = EventField::NONE;
        Some(window)
    }

    /// After #VMEXIT: an interrupt that was not taken to its end is one interrupted in delivery,
    /// which TCG reports as an exception. The window is as it was before; it had its chance behind the interrupt at the earliest, and the
    /// VMM looks again after each exit.
    fn after_virtual_injection(&mut self, window: bool) {
        let control = self.control_mut();
        let interrupts = control.interrupts;
        if interrupts.irq() {
            control.exit_interrupt_info = EventField::new()
                .with_valid(true)
                .with_kind(EventType::Interrupt)
                .with_vector(interrupts.vector());
        }
        control.interrupts = interrupts.with_irq(!window).with_vector(0);
        self.request_interrupt_window(window);
    }

    /// EFER.LMA as LME and CR0.PG make it (section 14.6.1).
    fn update_long_mode(&mut self) {
        let save = self.save_mut();
        if save.efer & EFER_LME != 0 && save.cr0 & CR0_PG != 0 {
            save.efer |= EFER_LMA;
        } else {
            save.efer &= !EFER_LMA;
        }
        self.changed(Clean::CONTROL_REGISTERS);
    }

    /// The address of the next instruction after an instruction exit.
    #[inline]
    fn next_rip(&self) -> u64 {
        let (control, save) = (self.control(), self.save());
        if control.exit_code as u32 == exit_code::IOIO {
            return control.exit_info2;
        }
        if self.has(SvmFeatures::NRIP_SAVE) && control.next_rip != 0 {
            return control.next_rip;
        }
        self.advance(save.rip, decode::architectural_length(control.exit_code))
    }

    /// `rip` and some bytes, wrapped as the code segment wraps it.
    #[inline]
    fn advance(&self, rip: u64, bytes: u8) -> u64 {
        let save = self.save();
        let next = rip.wrapping_add(u64::from(bytes));
        let long = save.efer & EFER_LMA != 0 && save.cs.attributes & ATTRIBUTE_LONG != 0;
        if long { next } else { next & 0xffff_ffff }
    }

    /// CPL of SS, or what the mode says.
    fn update_cpl(&mut self) {
        let save = self.save_mut();
        save.cpl = if save.cr0 & 1 == 0 {
            0
        } else if save.rflags & RFLAGS_VM != 0 {
            3
        } else {
            save.ss.to_segment().rights.dpl()
        };
        self.changed(Clean::SEGMENTS);
    }

    fn update_extensions(&mut self) {
        let on = self.save().debug_control != 0;
        self.control_mut()
            .extensions
            .set(Extensions::LAST_BRANCH, on);
        self.changed(Clean::LAST_BRANCH);
    }
}

#[cfg(test)]
impl SvmVcpu {
    /// TSC_RATIO while it is loaded, if it has a rate of its own.
    pub(super) fn tsc_ratio(&self) -> Option<u64> {
        self.tsc_ratio
    }

    /// An entry that exits at once with this code, after `hardware` did to the VMCB what a
    /// processor would.
    pub(super) fn pretend_exit(
        &mut self,
        exit_code: u32,
        hardware: impl FnOnce(&mut Vmcb),
    ) -> Option<Exit> {
        self.before_entry();
        let window = self.inject_virtually();
        let vmcb = self.vmcb_mut();
        vmcb.control.exit_code = u64::from(exit_code);
        vmcb.control.exit_interrupt_info = EventField::new();
        hardware(vmcb);
        if let Some(window) = window {
            self.after_virtual_injection(window);
        }
        match self.frequent_exit() {
            Exit::Unknown { .. } => self.other_exit(),
            exit => Some(exit),
        }
    }
}

/// ASID for a tag from 1, and whether vCPUs with other tags share it. The last ASID serves all
/// tags that have none of their own; such a vCPU flushes when another used the ASID in between.
pub(super) fn assign_asid(tag: u32, asids: u32) -> (u32, bool) {
    let last = asids.saturating_sub(1).max(1);
    match tag {
        1.. if tag < last => (tag, false),
        _ => (last, true),
    }
}

impl Drop for SvmVcpu {
    fn drop(&mut self) {
        let page = Hpa(self.frame.guest_vmcb);
        self.shared.memory.free(page, 1, Owner::VmTables(self.vm));
    }
}

impl VirtualCpu for SvmVcpu {
    const LOADS_PDPTES: bool = false;

    #[inline(always)]
    fn load(&mut self, cpu: usize) {
        assert!(!self.loaded, "vCPU loaded twice");
        let host_vmcb = self.shared.pcpus[cpu].host_vmcb.load(Ordering::Relaxed);
        assert!(host_vmcb != 0, "AMD-V is not enabled on pCPU {cpu}");
        self.frame.host_vmcb = host_vmcb;
        // Another pCPU may still hold translations and VMCB parts of an earlier visit.
        if self.last_cpu != Some(cpu) {
            self.last_cpu = Some(cpu);
            self.control_mut().clean = Clean::empty();
            self.flush_guest_tlb();
        }
        if self.asid_is_shared
            && self.shared.pcpus[cpu]
                .shared_asid_user
                .swap(self.serial, Ordering::Relaxed)
                != self.serial
        {
            self.flush_guest_tlb();
        }
        let vm = u32::from(self.vm);
        let other_vm = self.shared.pcpus[cpu].last_vm.swap(vm, Ordering::Relaxed) != vm;
        if other_vm && self.shared.capabilities.ibpb {
            // SAFETY: CPUID reports the register; bit 0 is the barrier, all others are 0.
            unsafe { wrmsr(msr::PRED_CMD, 1) };
        }
        self.loaded = true;
        // SAFETY: `enable` ran on this pCPU (it allocated `host_vmcb`, which no other uses).
        unsafe { switch::save_host(host_vmcb) };
        self.debug.load();
        if !self.shared.capabilities.virtual_spec_ctrl() {
            self.spec_ctrl.load();
        }
        if self.shared.capabilities.tsc_aux {
            // SAFETY: CPUID reports the register, and the value was read from it or checked.
            unsafe { wrmsr(msr::TSC_AUX, self.tsc_aux) };
        }
        if let Some(ratio) = self.tsc_ratio {
            // SAFETY: `set_tsc_scale` found the register; it acts on guests only.
            unsafe { wrmsr(TSC_RATIO, ratio) };
        }
        // SAFETY: `enable` prepared the FPU on this pCPU, and `unload` saved the state of
        // whichever guest was here before.
        unsafe { self.fpu.load() };
    }

    #[inline(always)]
    fn unload(&mut self) {
        assert!(self.loaded, "vCPU not loaded");
        self.loaded = false;
        // SAFETY: `load` put this state into the registers of this pCPU, and the host uses none.
        unsafe { self.fpu.save() };
        self.debug.save();
        if !self.shared.capabilities.virtual_spec_ctrl() {
            self.spec_ctrl.unload();
        }
        if self.shared.capabilities.tsc_aux {
            // SAFETY: CPUID reports the register.
            self.tsc_aux = unsafe { rdmsr(msr::TSC_AUX) };
        }
        if self.tsc_ratio.is_some() {
            // SAFETY: as in `load`.
            unsafe { wrmsr(TSC_RATIO, TSC_RATIO_ONE) };
        }
    }

    #[inline(always)]
    fn enter(&mut self) -> Exit {
        assert!(self.loaded, "vCPU entered without being loaded");
        self.run_guest();
        match self.frequent_exit() {
            Exit::Unknown { .. } => self.other_exits(),
            exit => exit,
        }
    }

    fn set_tsc_scale(&mut self, scale: TscScale) {
        // Without the register nobody makes a factor; reserved bits are not in one for it (`TscScaling::AMD_V`).
        self.tsc_ratio = scale
            .multiplier()
            .filter(|ratio| self.has(SvmFeatures::TSC_RATE_MSR) && ratio >> 40 == 0);
        if let Some(ratio) = self.tsc_ratio
            && self.loaded
        {
            // SAFETY: CPUID reports the register, and the value has no reserved bit.
            unsafe { wrmsr(TSC_RATIO, ratio) };
        }
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.control_mut().tsc_offset = offset;
        self.changed(Clean::INTERCEPTS);
    }

    #[inline]
    fn skip_instruction(&mut self, length: Option<u8>) {
        let next = match length {
            Some(bytes) => self.advance(self.save().rip, bytes),
            None => self.next_rip(),
        };
        self.save_mut().rip = next;
        self.control_mut().interrupt_state = InterruptState::NONE;
    }

    fn begin_shadow(&mut self, _shadow: Shadow) {
        self.control_mut().interrupt_state = InterruptState::NONE.with_shadow(true);
    }

    fn unblock_nmis(&mut self) {
        if self.has(SvmFeatures::VIRTUAL_NMI) {
            self.control_mut().interrupts.set_nmi_mask(false);
            self.changed(Clean::INTERRUPTS);
        }
        if self.nmi_masked {
            self.nmi_masked = false;
            self.intercept1(Intercepts1::IRET, false);
        }
        // The processor has begun the IRET itself, and would trap behind the instruction that comes next.
        if self.step.is_some_and(|step| step.over == StepOver::Iret) {
            self.cancel_step();
        }
    }

    fn instruction_bytes(&self) -> &[u8] {
        let control = self.control();
        let count = usize::from(control.fetched & 0xf);
        match control.exit_code as u32 {
            exit_code::NESTED_PAGE_FAULT if self.has(SvmFeatures::DECODE_ASSISTS) => {
                control.instruction_bytes.get(..count).unwrap_or_default()
            }
            _ => &[],
        }
    }

    #[inline]
    fn interrupt_ready(&self) -> bool {
        let control = self.control();
        self.save().rflags & RFLAGS_IF != 0
            && !control.interrupt_state.shadow()
            && !control.event_injection.valid()
    }

    fn nmi_ready(&self) -> bool {
        // Hardware keeps one NMI pending while NMIs are masked, as it must.
        if self.has(SvmFeatures::VIRTUAL_NMI) {
            return true;
        }
        let control = self.control();
        !self.nmi_masked
            && self.step.is_none()
            && !control.interrupt_state.shadow()
            && !control.event_injection.valid()
    }

    fn inject(&mut self, event: Event) {
        let virtual_nmi = self.has(SvmFeatures::VIRTUAL_NMI);
        if event == Event::Nmi && virtual_nmi {
            let control = self.control_mut();
            control.interrupts.set_nmi(true);
            self.changed(Clean::INTERRUPTS);
            return;
        }
        self.cancel_injection();
        let field = EventField::new().with_valid(true);
        let field = match event {
            Event::Interrupt(vector) => field.with_kind(EventType::Interrupt).with_vector(vector),
            Event::Nmi => {
                self.nmi_masked = true;
                self.intercept1(Intercepts1::IRET, true);
                field.with_kind(EventType::Nmi).with_vector(2)
            }
            Event::Exception { vector, error_code } => field
                .with_kind(EventType::Exception)
                .with_vector(vector)
                .with_has_error_code(error_code.is_some())
                .with_error_code(error_code.unwrap_or(0)),
            // Never made by this backend: the guest executes the instruction again.
            Event::Software { .. } => EventField::NONE,
        };
        self.control_mut().event_injection = field;
    }

    fn queued(&self) -> Option<Event> {
        let control = self.control();
        let field = control.event_injection;
        if !field.valid() {
            return control.interrupts.nmi().then_some(Event::Nmi);
        }
        match field.kind() {
            EventType::Interrupt => Some(Event::Interrupt(field.vector())),
            EventType::Nmi => Some(Event::Nmi),
            EventType::Exception => Some(Event::Exception {
                vector: field.vector(),
                error_code: field.has_error_code().then_some(field.error_code()),
            }),
            EventType::Software | EventType::Reserved(_) => None,
        }
    }

    fn cancel_injection(&mut self) {
        let field = self.control().event_injection;
        if !field.valid() {
            return;
        }
        self.control_mut().event_injection = EventField::NONE;
        if field.kind() == EventType::Nmi && self.nmi_masked {
            self.nmi_masked = false;
            self.intercept1(Intercepts1::IRET, false);
        }
    }

    fn request_interrupt_window(&mut self, on: bool) {
        if self.control().interrupts.irq() == on {
            return;
        }
        // A virtual interrupt of the highest priority whose delivery is intercepted (section 15.21.4).
        let control = self.control_mut();
        control.interrupts = control
            .interrupts
            .with_irq(on)
            .with_ignore_tpr(on)
            .with_priority(if on { 0xf } else { 0 });
        self.intercept1(Intercepts1::VINTR, on);
        self.update_cr8_intercept();
        self.changed(Clean::INTERRUPTS);
    }

    #[inline]
    fn task_priority(&self) -> Option<u8> {
        Some(self.control().interrupts.tpr() << 4 | self.sub_priority)
    }

    #[inline]
    fn set_task_priority(&mut self, tpr: u8, threshold: u8) {
        self.sub_priority = tpr & 0xf;
        self.priority_wanted = threshold != 0;
        self.control_mut().interrupts.set_tpr(tpr >> 4);
        self.changed(Clean::INTERRUPTS);
        self.update_cr8_intercept();
    }

    fn request_nmi_window(&mut self, on: bool) {
        self.nmi_window = on;
        // While masked, the IRET intercept leads to the window. An event in delivery comes
        // first; the VMM looks again at the next exit.
        let control = self.control();
        if on
            && !self.nmi_masked
            && self.step.is_none()
            && control.interrupt_state.shadow()
            && !control.event_injection.valid()
        {
            self.begin_step(StepOver::Shadow);
        }
    }

    fn set_deadline(&mut self, _host_tsc: u64) -> bool {
        false
    }

    fn flush_guest_tlb(&mut self) {
        self.control_mut().tlb_control = self.flush;
    }

    fn explain_entry_failure(&self) -> String {
        let found = checks::failures(self.vmcb(), &self.shared.capabilities);
        if found.is_empty() {
            return String::from(
                "VMRUN refused the state, but every check of APM vol. 2, section 15.5.1 passes in software",
            );
        }
        found.join("; ")
    }
}
