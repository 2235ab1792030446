//! AMD-V (SVM): VMCB, nested paging, ASIDs (APM vol. 2, chapter 15).
//!
//! `features` says what the processor has, `vmcb` is the control block, `permissions` the two
//! bitmaps, `switch` the way into the guest and back, `decode` turns exit codes into `Exit`,
//! `checks` explains a refused entry, `vcpu` ties them together. This module is the machine's
//! side: turning SVM on per pCPU, and what pCPUs and vCPUs share.
//!
//! Translations: a vCPU has an ASID of its own while its tag is small enough, else a shared
//! one. They are dropped at the next entry when the vCPU comes to another pCPU than last time,
//! when another vCPU used the shared ASID, and when `flush_nested` ran since its last entry.
//!
//! Unsafe: writes the MSRs that turn SVM on, and runs VMRUN (in `switch`).

pub mod checks;
pub mod decode;
pub mod features;
pub mod permissions;
pub mod switch;
mod vcpu;
pub mod vmcb;

use alloc::{sync::Arc, vec::Vec};
use core::arch::x86_64::CpuidResult;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mem::nested::Npt;
use mem::{HostMemory, Hpa, Owner, PAGE_SIZE};

use self::features::{Capabilities, Leaves, SvmFeatures, VM_CR, VmCr};
use self::permissions::{IOPM_BYTES, MSRPM_BYTES};
use crate::cpu::{FpuFeatures, GuestDebug, msr, rdmsr, wrmsr};
use crate::preflight::Preflight;
use crate::{Backend, TscScaling, VcpuSetup, VirtError};

pub use vcpu::SvmVcpu;

/// Physical address of the page in which VMRUN keeps the host's state.
const VM_HSAVE_PA: u32 = 0xc001_0117;
/// TSC_RATIO: guest ticks per host tick, 8.32 fixed point.
const TSC_RATIO: u32 = 0xc000_0104;
/// As it is after reset, and while no guest with a rate of its own is loaded.
const TSC_RATIO_ONE: u64 = 1 << 32;
const EFER_NXE: u64 = 1 << 11;
const EFER_SVME: u64 = 1 << 12;
/// Automatic IBRS: guests do not steer the host's branch predictions, nor its return predictions.
const EFER_AIBRSE: u64 = 1 << 21;

/// pCPUs that can be enabled.
const PCPUS: usize = 256;

/// What belongs to one pCPU, and is touched by that pCPU only.
#[derive(Default)]
struct PerCpu {
    /// Page for VMSAVE of the host; 0 until `enable`.
    host_vmcb: AtomicU64,
    /// Serial number of the vCPU that last used the shared ASID here; 0: none.
    shared_asid_user: AtomicU64,
    /// VM whose vCPU was here last, `u32::MAX` at first.
    last_vm: AtomicU32,
}

/// What all vCPUs refer to.
struct Shared {
    memory: &'static dyn HostMemory,
    capabilities: Capabilities,
    fpu: FpuFeatures,
    iopm: Hpa,
    msrpm: Hpa,
    /// By pCPU number.
    pcpus: Vec<PerCpu>,
    /// Counts calls of `flush_nested` on any pCPU. Each vCPU drops its translations when it has
    /// changed: a few flushes more than needed, for one plain load on the way into the guest.
    flushes: AtomicU64,
}

/// The machine's AMD-V. Lives as long as the machine runs; its pages are never given back.
pub struct Svm {
    shared: Arc<Shared>,
    /// Serial number of the next vCPU, from 1.
    next_serial: AtomicU64,
}

impl Svm {
    fn with_capabilities(
        memory: &'static dyn HostMemory,
        capabilities: Capabilities,
    ) -> Result<Self, VirtError> {
        let frames = |bytes: usize| (bytes as u64).div_ceil(PAGE_SIZE);
        let iopm = memory.allocate(frames(IOPM_BYTES), PAGE_SIZE, Owner::Host)?;
        memory.write(iopm, &[0xff; IOPM_BYTES]);
        let msrpm = memory.allocate(frames(MSRPM_BYTES), PAGE_SIZE, Owner::Host)?;
        memory.write(msrpm, &permissions::msr_map(&capabilities));
        let pcpus = (0..PCPUS)
            .map(|_| PerCpu {
                last_vm: AtomicU32::new(u32::MAX),
                ..PerCpu::default()
            })
            .collect();
        Ok(Svm {
            shared: Arc::new(Shared {
                memory,
                capabilities,
                fpu: FpuFeatures::detect(),
                iopm,
                msrpm,
                pcpus,
                flushes: AtomicU64::new(0),
            }),
            next_serial: AtomicU64::new(1),
        })
    }

    /// The pre-flight check of the calling pCPU and what it is made from.
    fn examine() -> (Preflight, Leaves, VmCr) {
        let leaves = Leaves::read();
        // SAFETY: the kernel, which alone calls this, runs at privilege level 0.
        let vm_cr = unsafe { features::read_vm_cr(&leaves) };
        (features::preflight(&leaves, vm_cr), leaves, vm_cr)
    }
}

impl Backend for Svm {
    type Vcpu = SvmVcpu;
    type Format = Npt;
    const NAME: &'static str = "AMD-V";

    fn preflight() -> Preflight {
        Self::examine().0
    }

    fn new(memory: &'static dyn HostMemory) -> Result<Self, VirtError> {
        let (preflight, leaves, _) = Self::examine();
        if !preflight.passed() {
            return Err(VirtError::Preflight(preflight));
        }
        Self::with_capabilities(memory, Capabilities::from_leaves(&leaves))
    }

    fn enable(&self, cpu: usize) -> Result<(), VirtError> {
        let (preflight, leaves, vm_cr) = Self::examine();
        if !preflight.passed() {
            return Err(VirtError::Preflight(preflight));
        }
        let shared = &self.shared;
        shared
            .capabilities
            .check_alike(&Capabilities::from_leaves(&leaves))
            .map_err(VirtError::Preflight)?;
        let memory = shared.memory;
        let host_save = memory.allocate(1, PAGE_SIZE, Owner::Host)?;
        let host_vmcb = memory.allocate(1, PAGE_SIZE, Owner::Host)?;
        if vm_cr.contains(VmCr::SVM_DISABLED) {
            // SAFETY: the pre-flight check passed, so LOCK is clear and the bit can be cleared.
            unsafe { wrmsr(VM_CR, (vm_cr - VmCr::SVM_DISABLED).bits()) };
        }
        // SAFETY: the processor has SVM and NX, both allowed (pre-flight); SVME changes nothing
        // until an SVM instruction runs, and NXE must be on for nested tables to use NX.
        unsafe {
            let efer = rdmsr(msr::EFER);
            wrmsr(msr::EFER, efer | EFER_SVME | EFER_NXE);
        }
        if shared.capabilities.automatic_ibrs {
            // SAFETY: the processor reports the bit, which acts on predictions only.
            unsafe { wrmsr(msr::EFER, rdmsr(msr::EFER) | EFER_AIBRSE) };
        }
        // SAFETY: SVM is on; the page is this pCPU's from now on, whatever becomes of its vCPUs.
        unsafe { wrmsr(VM_HSAVE_PA, host_save.0) };
        if shared.capabilities.svm.contains(SvmFeatures::TSC_RATE_MSR) {
            // SAFETY: CPUID reports the register, which acts on guests only.
            unsafe { wrmsr(TSC_RATIO, TSC_RATIO_ONE) };
        }
        // SAFETY: the kernel is compiled without SSE and relies on no fault of FPU instructions.
        unsafe { shared.fpu.prepare() };
        GuestDebug::prepare();
        shared.pcpus[cpu]
            .host_vmcb
            .store(host_vmcb.0, Ordering::Relaxed);
        Ok(())
    }

    fn format(&self) -> Npt {
        Npt {
            pages_1g: self.shared.capabilities.pages_1g,
        }
    }

    fn tsc_scaling(&self) -> Option<TscScaling> {
        let svm = self.shared.capabilities.svm;
        svm.contains(SvmFeatures::TSC_RATE_MSR)
            .then_some(TscScaling::AMD_V)
    }

    fn arch_capabilities(&self) -> u64 {
        0
    }

    fn limit_cpuid(&self, _leaf: u32, _subleaf: u32, _answer: &mut CpuidResult) {
        // What the processor executes, it executes in a guest, too.
    }

    fn create_vcpu(&self, setup: VcpuSetup) -> Result<SvmVcpu, VirtError> {
        let serial = self.next_serial.fetch_add(1, Ordering::Relaxed);
        Ok(SvmVcpu::new(&self.shared, setup, serial)?)
    }

    fn flush_nested(&self, _root: Hpa) {
        self.shared.flushes.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::features::SvmFeatures;
    use super::vmcb::{EventField, EventType, exit_code};
    use super::*;
    use crate::state::{CpuMode, CpuState, Event, Gpr, SegmentName, Shadow};
    use crate::{Exit, Registers, TscScale, VirtualCpu};
    use mem::fake::FakeMemory;

    fn machine(features: SvmFeatures) -> (&'static FakeMemory, Svm) {
        let memory: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(1 << 20)));
        let capabilities = Capabilities {
            svm: features | SvmFeatures::NESTED_PAGING,
            ..Capabilities::none()
        };
        let svm = Svm::with_capabilities(memory, capabilities).expect("frames");
        (memory, svm)
    }

    fn vcpu(svm: &Svm, tag: u32) -> SvmVcpu {
        let setup = VcpuSetup {
            vm: 3,
            vcpu: 0,
            tag,
            nested_root: Hpa(0x7000),
        };
        svm.create_vcpu(setup).expect("frames")
    }

    fn plain() -> SvmVcpu {
        vcpu(&machine(SvmFeatures::empty()).1, 1)
    }

    #[test]
    fn a_new_vcpu_is_in_the_reset_state_and_vmrun_would_take_it() {
        let v = plain();
        assert_eq!(v.state(), CpuState::reset());
        assert_eq!(v.mode(), CpuMode::Real);
        let text = v.explain_entry_failure();
        assert!(text.contains("passes in software"), "{text}");
    }

    #[test]
    fn state_survives_the_round_trip() {
        let mut state = CpuState::reset();
        for (i, gpr) in state.gprs.iter_mut().enumerate() {
            *gpr = 0x1111_0000_0000 * (i as u64 + 1);
        }
        state.rip = 0xffff_8000_0000_1234;
        state.cr0 = 0x8001_0033;
        state.cr2 = 0xdead_b000;
        state.cr3 = 0x1000;
        state.cr4 = 0x20;
        state.efer = 0xd01;
        state.dr = [1, 2, 3, 4];
        state.dr7 = 0x455;
        state.gdtr.base = 0x5000;
        state.idtr.limit = 0xfff;
        let mut v = plain();
        v.set_state(&state);
        assert_eq!(v.state(), state);
    }

    #[test]
    fn frames_go_back_when_a_vcpu_is_dropped() {
        let (memory, svm) = machine(SvmFeatures::empty());
        let v = vcpu(&svm, 1);
        assert_eq!(memory.used(Owner::VmTables(3)), 1);
        drop(v);
        assert_eq!(memory.used(Owner::VmTables(3)), 0);
    }

    #[test]
    fn no_frames_is_an_error() {
        let memory: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(3 * 4096)));
        assert!(matches!(
            Svm::with_capabilities(memory, Capabilities::none()),
            Err(VirtError::OutOfFrames(_))
        ));
    }

    #[test]
    fn asids_are_own_while_they_last() {
        assert_eq!(vcpu::assign_asid(1, 16), (1, false));
        assert_eq!(vcpu::assign_asid(14, 16), (14, false));
        for tag in [0, 15, 16, u32::MAX] {
            assert_eq!(vcpu::assign_asid(tag, 16), (15, true));
        }
        assert_eq!(vcpu::assign_asid(1, 2), (1, true));
    }

    #[test]
    fn the_guest_never_sees_svme_and_lma_follows_paging() {
        let mut v = plain();
        v.set_efer(0x100);
        assert_eq!(v.efer(), 0x100);
        v.set_cr4(0x20);
        v.set_cr0(0x8000_0031);
        assert_eq!(v.efer(), 0x500);
        v.set_cr0(0x31);
        assert_eq!(v.efer(), 0x100);
        assert!(v.explain_entry_failure().contains("passes in software"));
    }

    #[test]
    fn a_refused_state_is_explained() {
        let mut v = plain();
        v.set_cr0(0x6000_0010 & !(1 << 30));
        assert!(v.explain_entry_failure().contains("CR0.NW"));
        v.set_cr4(1 << 13);
        assert!(v.explain_entry_failure().contains("; CR4"));
    }

    #[test]
    fn a_tsc_rate_of_its_own_is_had_where_the_processor_scales() {
        let half = TscScaling::AMD_V.scale(2, 1).expect("a factor");
        let (_, svm) = machine(SvmFeatures::TSC_RATE_MSR);
        assert_eq!(svm.tsc_scaling(), Some(TscScaling::AMD_V));
        let mut v = vcpu(&svm, 1);
        assert_eq!(v.tsc_ratio(), None, "the host's rate costs nothing");
        v.set_tsc_scale(half);
        assert_eq!(v.tsc_ratio(), Some(TSC_RATIO_ONE / 2));
        v.set_tsc_scale(TscScale::SAME);
        assert_eq!(v.tsc_ratio(), None);
        // A factor in VT-x' form would have reserved bits.
        v.set_tsc_scale(TscScaling::VTX.scale(2, 1).expect("a factor"));
        assert_eq!(v.tsc_ratio(), None);
        let (_, svm) = machine(SvmFeatures::empty());
        assert_eq!(svm.tsc_scaling(), None);
    }

    #[test]
    fn events_queue_and_cancel() {
        let mut v = plain();
        v.set_rflags(0x202);
        assert!(v.interrupt_ready() && v.nmi_ready() && v.queued().is_none());
        for event in [
            Event::Interrupt(0x31),
            Event::Exception {
                vector: 14,
                error_code: Some(2),
            },
            Event::Exception {
                vector: 6,
                error_code: None,
            },
            Event::Nmi,
        ] {
            v.inject(event);
            assert_eq!(v.queued(), Some(event));
            assert!(!v.interrupt_ready() && !v.nmi_ready());
            v.cancel_injection();
            assert_eq!(v.queued(), None);
            assert!(v.nmi_ready(), "{event:?}");
        }
        v.set_rflags(2);
        assert!(!v.interrupt_ready());
    }

    #[test]
    fn an_injected_nmi_masks_until_iret_has_retired() {
        let mut v = plain();
        v.inject(Event::Nmi);
        // Delivered; the handler runs to a CPUID.
        assert_eq!(v.pretend_exit(exit_code::CPUID, |_| ()), Some(Exit::Cpuid));
        assert!(v.queued().is_none() && !v.nmi_ready());
        v.request_nmi_window(true);
        // IRET: nothing for the VMM, one step; the guest's flags look as before.
        assert_eq!(v.pretend_exit(exit_code::IRET, |_| ()), None);
        assert_eq!(v.rflags() & 0x100, 0);
        assert!(!v.nmi_ready());
        let window = v.pretend_exit(exit_code::DEBUG_EXCEPTION, |vmcb| {
            // IRET loaded the interrupted code's flags, the step set BS.
            vmcb.save.rflags = 0x202;
            vmcb.save.dr6 |= 1 << 14;
        });
        assert_eq!(window, Some(Exit::NmiWindow));
        assert!(v.nmi_ready() && v.queued().is_none());
        assert_eq!(v.dr6(), CpuState::reset().dr6);
        assert_eq!(v.rflags(), 0x202);
    }

    #[test]
    fn an_iret_in_software_ends_the_masking_and_the_step() {
        let mut v = plain();
        v.inject(Event::Nmi);
        v.pretend_exit(exit_code::CPUID, |_| ());
        v.unblock_nmis();
        assert!(v.nmi_ready());
        v.inject(Event::Nmi);
        v.pretend_exit(exit_code::CPUID, |_| ());
        // The processor begins the IRET, and exits for its stack.
        v.pretend_exit(exit_code::IRET, |_| ());
        v.set_rflags(0x202);
        v.unblock_nmis();
        assert!(v.nmi_ready());
        let trap = v.pretend_exit(exit_code::DEBUG_EXCEPTION, |vmcb| {
            assert_eq!(vmcb.save.rflags, 0x202, "not stepped any more");
            vmcb.save.dr6 |= 1 << 14;
        });
        assert!(matches!(trap, Some(Exit::Exception { vector: 1, .. })));
    }

    #[test]
    fn a_shadow_in_software_is_over_when_the_guest_has_gone_on() {
        let mut v = plain();
        v.set_rflags(0x202);
        v.begin_shadow(Shadow::MovSs);
        assert!(!v.interrupt_ready() && !v.nmi_ready());
        v.skip_instruction(Some(1));
        assert!(v.interrupt_ready() && v.nmi_ready());
    }

    #[test]
    fn a_breakpoint_during_the_step_reaches_the_guest() {
        let mut v = plain();
        v.inject(Event::Nmi);
        v.pretend_exit(exit_code::CPUID, |_| ());
        v.pretend_exit(exit_code::IRET, |_| ());
        let exit = v.pretend_exit(exit_code::DEBUG_EXCEPTION, |vmcb| {
            vmcb.save.dr6 |= 1 << 14 | 1;
        });
        assert!(matches!(exit, Some(Exit::Exception { vector: 1, .. })));
        assert_eq!(v.dr6(), CpuState::reset().dr6 | 1);
    }

    #[test]
    fn an_nmi_in_a_shadow_waits_for_one_instruction() {
        let mut v = plain();
        v.pretend_exit(exit_code::INTR, |vmcb| {
            vmcb.control.interrupt_state.set_shadow(true);
        });
        assert!(!v.nmi_ready());
        v.request_nmi_window(true);
        let exit = v.pretend_exit(exit_code::DEBUG_EXCEPTION, |vmcb| {
            vmcb.control.interrupt_state.set_shadow(false);
            vmcb.save.dr6 |= 1 << 14;
        });
        assert_eq!(exit, Some(Exit::NmiWindow));
        assert!(v.nmi_ready() && v.rflags() & 0x100 == 0);
    }

    #[test]
    fn hardware_that_has_virtual_nmi_does_all_that_itself() {
        let (_, svm) = machine(SvmFeatures::VIRTUAL_NMI);
        let mut v = vcpu(&svm, 1);
        v.inject(Event::Nmi);
        assert_eq!(v.queued(), Some(Event::Nmi));
        assert!(v.nmi_ready() && v.interrupt_ready() == (v.rflags() & 0x200 != 0));
        // Delivered by the processor, which clears V_NMI.
        v.pretend_exit(exit_code::CPUID, |vmcb| {
            assert!(vmcb.control.interrupts.nmi() && vmcb.control.interrupts.nmi_enable());
            vmcb.control.interrupts.set_nmi(false);
        });
        assert_eq!(v.queued(), None);
    }

    #[test]
    fn an_interrupted_delivery_is_repeated() {
        let interrupted = |kind, vector: u8| {
            let mut v = plain();
            v.pretend_exit(exit_code::NESTED_PAGE_FAULT, |vmcb| {
                vmcb.control.exit_interrupt_info = EventField::new()
                    .with_valid(true)
                    .with_kind(kind)
                    .with_vector(vector);
            });
            v.queued()
        };
        assert_eq!(
            interrupted(EventType::Interrupt, 0x20),
            Some(Event::Interrupt(0x20))
        );
        assert_eq!(interrupted(EventType::Nmi, 2), Some(Event::Nmi));
        let ud = Event::Exception {
            vector: 6,
            error_code: None,
        };
        assert_eq!(interrupted(EventType::Exception, 6), Some(ud));
        // INT3, INTO, INTn: the guest executes the instruction again.
        assert_eq!(interrupted(EventType::Exception, 3), None);
        assert_eq!(interrupted(EventType::Exception, 4), None);
        assert_eq!(interrupted(EventType::Software, 0x80), None);
        assert_eq!(interrupted(EventType::Reserved(1), 0x80), None);
    }

    #[test]
    fn a_delivered_event_is_not_delivered_twice() {
        let mut v = plain();
        v.inject(Event::Interrupt(0x40));
        v.pretend_exit(exit_code::INTR, |_| ());
        assert_eq!(v.queued(), None);
    }

    fn on_tcg() -> SvmVcpu {
        let memory: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(1 << 20)));
        let capabilities = Capabilities {
            repeats_injection: true,
            ..Capabilities::none()
        };
        vcpu(
            &Svm::with_capabilities(memory, capabilities).expect("frames"),
            1,
        )
    }

    #[test]
    fn an_interrupt_is_virtual_where_injection_repeats() {
        for window in [false, true] {
            let mut v = on_tcg();
            v.request_interrupt_window(window);
            v.inject(Event::Interrupt(0x40));
            assert_eq!(v.queued(), Some(Event::Interrupt(0x40)));
            v.pretend_exit(exit_code::CPUID, |vmcb| {
                let interrupts = &mut vmcb.control.interrupts;
                assert!(interrupts.irq() && interrupts.ignore_tpr() && interrupts.vector() == 0x40);
                assert!(!vmcb.control.event_injection.valid());
                assert!(!vmcb.control.intercepts1.contains(vmcb::Intercepts1::VINTR));
                // Taken.
                interrupts.set_irq(false);
            });
            assert_eq!(v.queued(), None);
            v.pretend_exit(exit_code::CPUID, |vmcb| {
                assert_eq!(vmcb.control.interrupts.irq(), window);
                let intercepted = vmcb.control.intercepts1.contains(vmcb::Intercepts1::VINTR);
                assert_eq!(intercepted, window);
            });
        }
    }

    #[test]
    fn a_virtual_interrupt_that_was_not_taken_is_queued_again_once() {
        // As TCG reports it.
        let interrupted = EventField::new()
            .with_valid(true)
            .with_kind(EventType::Exception)
            .with_vector(0x40);
        for info in [EventField::new(), interrupted] {
            let mut v = on_tcg();
            v.inject(Event::Interrupt(0x40));
            let exit = v.pretend_exit(exit_code::INTR, |vmcb| {
                vmcb.control.exit_interrupt_info = info;
            });
            assert_eq!(exit, Some(Exit::ExternalInterrupt));
            assert_eq!(v.queued(), Some(Event::Interrupt(0x40)));
            v.pretend_exit(exit_code::INTR, |vmcb| {
                vmcb.control.interrupts.set_irq(false)
            });
            assert_eq!(v.queued(), None);
        }
    }

    #[test]
    fn other_events_are_injected_everywhere() {
        let mut v = on_tcg();
        let event = Event::Exception {
            vector: 14,
            error_code: Some(2),
        };
        v.inject(event);
        v.pretend_exit(exit_code::CPUID, |vmcb| {
            assert!(vmcb.control.event_injection.valid() && !vmcb.control.interrupts.irq());
        });
    }

    #[test]
    fn an_intercepted_exception_takes_the_place_of_the_event_in_delivery() {
        let mut v = plain();
        let exit = v.pretend_exit(exit_code::EXCEPTION_FIRST + 17, |vmcb| {
            vmcb.control.exit_interrupt_info = EventField::new()
                .with_valid(true)
                .with_kind(EventType::Interrupt)
                .with_vector(0x20);
        });
        let check = Exit::Exception {
            vector: 17,
            error_code: Some(0),
        };
        assert_eq!(exit, Some(check));
        assert_eq!(v.queued(), None);
    }

    #[test]
    fn the_interrupt_window_is_one_shot() {
        let mut v = plain();
        v.request_interrupt_window(true);
        let exit = v.pretend_exit(exit_code::VINTR, |vmcb| {
            assert!(vmcb.control.interrupts.irq() && vmcb.control.interrupts.ignore_tpr());
        });
        assert_eq!(exit, Some(Exit::InterruptWindow));
        v.pretend_exit(exit_code::CPUID, |vmcb| {
            assert!(!vmcb.control.interrupts.irq());
        });
    }

    #[test]
    fn instructions_are_skipped_by_next_rip_or_by_length() {
        let (_, svm) = machine(SvmFeatures::NRIP_SAVE);
        let mut with = vcpu(&svm, 1);
        with.set_rip(0x100);
        with.pretend_exit(exit_code::WBINVD, |vmcb| vmcb.control.next_rip = 0x103);
        with.skip_instruction(None);
        assert_eq!(with.rip(), 0x103);

        let mut without = plain();
        without.set_rip(0x100);
        without.pretend_exit(exit_code::CPUID, |vmcb| {
            vmcb.control.next_rip = 0x999;
            vmcb.control.interrupt_state.set_shadow(true);
        });
        without.skip_instruction(None);
        assert_eq!(without.rip(), 0x102);
        without.set_rflags(0x202);
        assert!(without.interrupt_ready(), "the shadow is over");
        without.pretend_exit(exit_code::IOIO, |vmcb| vmcb.control.exit_info2 = 0x104);
        without.skip_instruction(None);
        assert_eq!(without.rip(), 0x104);
        without.set_rip(0xffff_ffff);
        without.skip_instruction(Some(3));
        assert_eq!(without.rip(), 2, "wraps outside 64-bit mode");
    }

    #[test]
    fn instruction_bytes_come_with_decode_assists_only() {
        let fill = |vmcb: &mut vmcb::Vmcb| {
            vmcb.control.fetched = 3;
            vmcb.control.instruction_bytes[..3].copy_from_slice(&[0x89, 0x08, 0x90]);
        };
        let mut without = plain();
        without.pretend_exit(exit_code::NESTED_PAGE_FAULT, fill);
        assert!(without.instruction_bytes().is_empty());
        let (_, svm) = machine(SvmFeatures::DECODE_ASSISTS);
        let mut with = vcpu(&svm, 1);
        with.pretend_exit(exit_code::NESTED_PAGE_FAULT, fill);
        assert_eq!(with.instruction_bytes(), [0x89, 0x08, 0x90]);
        with.pretend_exit(exit_code::CPUID, |_| ());
        assert!(with.instruction_bytes().is_empty());
    }

    #[test]
    fn msrs_that_hardware_switches_read_back() {
        let mut v = plain();
        for (i, number) in [
            msr::FS_BASE,
            msr::GS_BASE,
            msr::KERNEL_GS_BASE,
            msr::STAR,
            msr::LSTAR,
            msr::CSTAR,
            msr::SFMASK,
            msr::SYSENTER_CS,
            msr::SYSENTER_ESP,
            msr::SYSENTER_EIP,
        ]
        .into_iter()
        .enumerate()
        {
            assert!(v.set_msr(number, 0x1000 + i as u64));
            assert_eq!(v.msr(number), Some(0x1000 + i as u64));
        }
        assert_eq!(v.segment(SegmentName::Fs).base, 0x1000);
        assert_eq!(v.msr(msr::PAT), Some(crate::cpu::PAT_RESET));
        assert!(!v.set_msr(msr::PAT, 2), "a reserved memory type");
        assert!(!v.set_msr(msr::LSTAR, 1 << 63), "not canonical");
        assert!(
            v.set_msr(msr::DEBUGCTL, 1),
            "without LBR virtualization: dropped"
        );
        assert_eq!(v.msr(msr::DEBUGCTL), Some(0));
        for other in [msr::EFER, msr::TSC, 0x1b, msr::TSC_AUX] {
            assert_eq!(v.msr(other), None);
            assert!(!v.set_msr(other, 0));
        }
    }

    #[test]
    fn clean_bits_follow_what_changes() {
        let (_, svm) = machine(SvmFeatures::VMCB_CLEAN);
        let mut v = vcpu(&svm, 1);
        v.pretend_exit(exit_code::CPUID, |_| ());
        let now = |v: &mut SvmVcpu| {
            let mut clean = vmcb::Clean::empty();
            v.pretend_exit(exit_code::CPUID, |vmcb| clean = vmcb.control.clean);
            clean
        };
        assert_eq!(now(&mut v), vmcb::Clean::all());
        v.set_gpr(Gpr::Rax, 1);
        v.set_rip(7);
        assert_eq!(now(&mut v), vmcb::Clean::all(), "never cached");
        v.set_cr3(0x1000);
        assert_eq!(
            now(&mut v),
            vmcb::Clean::all() - vmcb::Clean::CONTROL_REGISTERS
        );
        v.request_interrupt_window(true);
        assert_eq!(
            now(&mut v),
            vmcb::Clean::all() - vmcb::Clean::INTERRUPTS - vmcb::Clean::INTERCEPTS
        );
        v.set_cr2(5);
        v.set_dr6(0xffff_0ff1);
        v.set_tsc_offset(9);
        assert_eq!(
            now(&mut v),
            vmcb::Clean::all()
                - vmcb::Clean::CR2
                - vmcb::Clean::DEBUG_REGISTERS
                - vmcb::Clean::INTERCEPTS
        );
    }

    #[test]
    fn flushes_reach_the_next_entry_once() {
        use vmcb::TlbControl;
        for (features, command) in [
            (SvmFeatures::empty(), TlbControl::FlushAll),
            (SvmFeatures::FLUSH_BY_ASID, TlbControl::FlushGuest),
        ] {
            let (_, svm) = machine(features);
            let mut v = vcpu(&svm, 1);
            v.pretend_exit(exit_code::CPUID, |_| ());
            let now = |v: &mut SvmVcpu| {
                let mut control = TlbControl::Keep;
                v.pretend_exit(exit_code::CPUID, |vmcb| control = vmcb.control.tlb_control);
                control
            };
            assert_eq!(now(&mut v), TlbControl::Keep);
            svm.flush_nested(Hpa(0x7000));
            assert_eq!(now(&mut v), command);
            assert_eq!(now(&mut v), TlbControl::Keep);
            v.set_cr4(1 << 7);
            assert_eq!(now(&mut v), command);
            v.set_cr4(1 << 7 | 1 << 9);
            assert_eq!(now(&mut v), TlbControl::Keep, "OSFXSR maps nothing");
        }
    }
}
