//! Intel VT-x: turning it on, and the pieces that all pCPUs and vCPUs share.
//!
//! - [`capability`]: what the processor can do, and the control words that follow.
//! - [`vmcs`]: fields and the VMX instructions.
//! - [`vcpu`]: one virtual processor.
//! - [`entry`]: the assembly into the guest and back.
//! - [`decode`]: exit reasons and qualifications into `Exit`.
//! - [`mitigation`]: what is done against leaks by speculation.
//! - [`check`]: the manual's VM-entry checks in software, to explain a refused entry.
//!
//! Not used here: APIC virtualization beyond the TPR shadow, PML, VMCS shadowing.
//!
//! Unsafe: writes control registers and MSRs, and runs VMX instructions.

pub mod capability;
pub mod check;
pub mod decode;
pub mod entry;
pub mod mitigation;
pub mod vcpu;
pub mod vmcs;

use alloc::sync::Arc;
use core::arch::x86_64::CpuidResult;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mem::nested::Ept;
use mem::{HostMemory, Hpa, Owner, PAGE_SIZE};
use x86_64::registers::control::{Cr0, Cr4, Cr4Flags};

use crate::cpu::{FpuFeatures, GuestDebug, msr, rdmsr, wrmsr};
use crate::preflight::{Feature, Need, Preflight, Status};
use crate::{Backend, TscScaling, VcpuSetup, VirtError};

use capability::{Capabilities, Controls, EptVpid, FeatureControl, Found, Proc2};
use mitigation::{ArchCapabilities, Mitigations};
pub use vcpu::VtxVcpu;
use vmcs::{Scope, invept, invvpid, vmxon};

/// pCPUs that `Backend::enable` can tell apart.
const MAX_CPUS: usize = 256;

/// Not a VM number.
const NO_VM: u32 = u32::MAX;

/// What vCPUs need of the backend.
struct Shared {
    memory: &'static dyn HostMemory,
    capabilities: Capabilities,
    controls: Controls,
    fpu: FpuFeatures,
    /// One bitmap for all: which MSRs exit does not depend on the vCPU.
    msr_bitmap: Hpa,
    /// The processor has the indirect-branch barrier of IA32_PRED_CMD.
    ibpb: bool,
    mitigations: Mitigations,
    arch_capabilities: ArchCapabilities,
    /// VM of the vCPU that was loaded last on each pCPU; [`NO_VM`] before the first.
    last_vm: [AtomicU32; MAX_CPUS],
}

impl Shared {
    /// Keeps branch predictions of one VM from the next on the calling pCPU, `cpu`.
    fn separate_predictions(&self, cpu: usize, vm: u16) {
        let vm = u32::from(vm);
        let other = self
            .last_vm
            .get(cpu)
            .is_none_or(|last| last.swap(vm, Ordering::Relaxed) != vm);
        if other && self.ibpb {
            // SAFETY: CPUID reports the register; bit 0 is the barrier, all others are 0.
            unsafe { wrmsr(msr::PRED_CMD, 1) };
        }
    }

    /// Drops cached translations of one EPT pointer, or of all where the processor can't do one.
    ///
    /// # Safety
    /// In VMX operation.
    unsafe fn flush_ept(&self, root: Hpa) {
        let single = self.capabilities.ept_vpid.contains(EptVpid::INVEPT_SINGLE);
        let pointer = self.capabilities.ept().pointer(root);
        // SAFETY: in VMX operation (caller); `Controls::choose` demands INVEPT.
        let done = single && unsafe { invept(Scope::Single, pointer) };
        if !done {
            // SAFETY: as above. It can fail only where this scope is not offered.
            let _ = unsafe { invept(Scope::All, 0) };
        }
    }

    /// Drops cached translations of one VPID, or of all where the processor can't do one.
    ///
    /// # Safety
    /// In VMX operation, on a processor for which `Controls::choose` turned VPID on.
    unsafe fn flush_vpid(&self, vpid: u16) {
        let single = self.capabilities.ept_vpid.contains(EptVpid::INVVPID_SINGLE);
        // SAFETY: in VMX operation, and INVVPID is there (caller).
        let done = single && unsafe { invvpid(Scope::Single, vpid) };
        if !done {
            // SAFETY: as above. It can fail only where this scope is not offered.
            let _ = unsafe { invvpid(Scope::All, 0) };
        }
    }
}

/// VT-x of this machine.
pub struct Vtx {
    shared: Arc<Shared>,
    /// VMXON region of each pCPU; 0: none yet.
    vmxon_regions: [AtomicU64; MAX_CPUS],
}

impl Backend for Vtx {
    type Vcpu = VtxVcpu;
    type Format = Ept;
    const NAME: &'static str = "VT-x";

    fn preflight() -> Preflight {
        capability::preflight(&Found::read())
    }

    fn new(memory: &'static dyn HostMemory) -> Result<Self, VirtError> {
        let found = Found::read();
        let (capabilities, controls) = usable(&found)?;
        let fpu = FpuFeatures::detect();
        let msr_bitmap = memory.allocate(1, PAGE_SIZE, Owner::Host)?;
        let rdtscp = controls.proc2.contains(Proc2::RDTSCP);
        memory.write(msr_bitmap, &MsrBitmap::for_guests(rdtscp, found.ibpb).0);
        Ok(Vtx {
            shared: Arc::new(Shared {
                memory,
                capabilities,
                controls,
                fpu,
                msr_bitmap,
                ibpb: found.ibpb,
                mitigations: found.mitigations,
                arch_capabilities: found.arch_capabilities,
                last_vm: [const { AtomicU32::new(NO_VM) }; MAX_CPUS],
            }),
            vmxon_regions: [const { AtomicU64::new(0) }; MAX_CPUS],
        })
    }

    fn enable(&self, cpu: usize) -> Result<(), VirtError> {
        let shared = &*self.shared;
        let found = Found::read();
        let (here, _) = usable(&found)?;
        if here != shared.capabilities
            || found.ibpb != shared.ibpb
            || found.mitigations != shared.mitigations
            || found.arch_capabilities != shared.arch_capabilities
        {
            return Err(unequal());
        }
        let region = self
            .vmxon_regions
            .get(cpu)
            .ok_or(instruction("VMXON (pCPU number too large)"))?;
        let mut vmxon_region = Hpa(region.load(Ordering::Relaxed));
        if vmxon_region.0 == 0 {
            vmxon_region = shared.memory.allocate(1, PAGE_SIZE, Owner::Host)?;
            shared
                .memory
                .write(vmxon_region, &here.revision.to_le_bytes());
            region.store(vmxon_region.0, Ordering::Relaxed);
        }
        // Firmware often leaves the register unlocked and zero on other than the first processor.
        if let Some((control, _)) = found.vmx
            && !control.contains(FeatureControl::LOCKED)
        {
            let value = (control | FeatureControl::LOCKED | FeatureControl::VMX).bits();
            // SAFETY: CPUID reports VMX, so the register is there; it is not locked.
            let others = unsafe { rdmsr(msr::FEATURE_CONTROL) };
            // SAFETY: as above; the other bits stay as firmware set them.
            unsafe { wrmsr(msr::FEATURE_CONTROL, others | value) };
        }
        // SAFETY: adds the bits that VMX operation demands (SDM vol. 3D, appendices A.7 and
        // A.8): PE, PG, NE, VMXE, of which the first two are on in a 64-bit hypervisor.
        unsafe {
            Cr0::write_raw(Cr0::read_raw() | here.cr0.ones);
            Cr4::update(|f| f.insert(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS));
        }
        // SAFETY: CR4.VMXE is set, IA32_FEATURE_CONTROL allows VMX (`usable`, or just written),
        // and the region is a zeroed frame of ours with the revision in its first word.
        if !unsafe { vmxon(vmxon_region) } {
            return Err(instruction("VMXON"));
        }
        // SAFETY: this processor was just found to be like the one that they were chosen on.
        unsafe { shared.mitigations.enable() };
        // SAFETY: the hypervisor itself never relies on FPU faults.
        unsafe { shared.fpu.prepare() };
        GuestDebug::prepare();
        // Firmware or an earlier hypervisor may have left translations under our tags.
        let caps = shared.capabilities.ept_vpid;
        if caps.contains(EptVpid::INVEPT_ALL) {
            // SAFETY: in VMX operation now; INVEPT is required.
            if !unsafe { invept(Scope::All, 0) } {
                return Err(instruction("INVEPT"));
            }
        }
        if caps.contains(EptVpid::INVVPID | EptVpid::INVVPID_ALL) {
            // SAFETY: in VMX operation now; asked for INVVPID.
            if !unsafe { invvpid(Scope::All, 0) } {
                return Err(instruction("INVVPID"));
            }
        }
        Ok(())
    }

    fn format(&self) -> Ept {
        self.shared.capabilities.ept()
    }

    fn tsc_scaling(&self) -> Option<TscScaling> {
        let proc2 = self.shared.capabilities.proc2;
        proc2
            .offers(Proc2::TSC_SCALING.bits())
            .then_some(TscScaling::VTX)
    }

    fn arch_capabilities(&self) -> u64 {
        self.shared.arch_capabilities.bits()
    }

    fn limit_cpuid(&self, leaf: u32, subleaf: u32, answer: &mut CpuidResult) {
        self.shared.controls.limit_cpuid(leaf, subleaf, answer);
    }

    fn create_vcpu(&self, setup: VcpuSetup) -> Result<VtxVcpu, VirtError> {
        VtxVcpu::new(Arc::clone(&self.shared), setup)
    }

    fn flush_nested(&self, root: Hpa) {
        // SAFETY: the trait's callers run after `enable` on this pCPU.
        unsafe { self.shared.flush_ept(root) };
    }
}

/// Capabilities and controls, or the pre-flight text that says what is missing.
fn usable(found: &Found) -> Result<(Capabilities, Controls), VirtError> {
    let report = capability::preflight(found);
    match found.vmx {
        Some((_, capabilities)) if report.passed() => match Controls::choose(&capabilities) {
            Some(controls) => Ok((capabilities, controls)),
            None => Err(VirtError::Preflight(report)),
        },
        _ => Err(VirtError::Preflight(report)),
    }
}

/// The error of an instruction that gives no number.
fn instruction(name: &'static str) -> VirtError {
    VirtError::Instruction { name, error: 0 }
}

/// The error of a pCPU that differs from the first.
fn unequal() -> VirtError {
    VirtError::Preflight(Preflight {
        features: alloc::vec![Feature {
            name: "VT-x as on the first processor",
            need: Need::Required,
            status: Status::Missing,
            remedy: "update the firmware: processors of one machine must offer the same features",
        }],
    })
}

/// Which RDMSR and WRMSR exit: a 1 does (SDM vol. 3C, section 25.6.9).
struct MsrBitmap([u8; PAGE_SIZE as usize]);

impl MsrBitmap {
    const WRITES: usize = 2048;
    const HIGH: usize = 1024;

    /// All exit, but for those that the processor switches or that `load` and `unload` do.
    fn for_guests(rdtscp: bool, ibpb: bool) -> Self {
        let mut bitmap = MsrBitmap([0xff; PAGE_SIZE as usize]);
        for number in vcpu::MSRS_IN_VMCS.into_iter().chain(vcpu::MSRS_SWITCHED) {
            if number != msr::DEBUGCTL && (number != msr::TSC_AUX || rdtscp) {
                bitmap.pass(number, 0);
                bitmap.pass(number, Self::WRITES);
            }
        }
        // The processor adds the offset also here (SDM vol. 3C, section 26.3).
        bitmap.pass(msr::TSC, 0);
        if ibpb {
            // A command, which holds nothing.
            bitmap.pass(msr::PRED_CMD, Self::WRITES);
        }
        bitmap
    }

    fn pass(&mut self, number: u32, direction: usize) {
        let half = if number >= 0xc000_0000 { Self::HIGH } else { 0 };
        let index = (number & 0x1fff) as usize;
        self.0[direction + half + index / 8] &= !(1 << (index % 8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(bitmap: &MsrBitmap, number: u32, write: bool) -> bool {
        let base = if write { 2048 } else { 0 } + if number >> 30 == 3 { 1024 } else { 0 };
        let index = (number & 0x1fff) as usize;
        bitmap.0[base + index / 8] >> (index % 8) & 1 != 0
    }

    #[test]
    fn only_switched_msrs_pass() {
        let bitmap = MsrBitmap::for_guests(true, false);
        for number in [
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
            msr::PAT,
            msr::TSC_AUX,
        ] {
            assert!(!exits(&bitmap, number, false) && !exits(&bitmap, number, true));
        }
        assert!(!exits(&bitmap, msr::TSC, false) && exits(&bitmap, msr::TSC, true));
        for number in [
            msr::EFER,
            msr::DEBUGCTL,
            msr::SPEC_CTRL,
            msr::FEATURE_CONTROL,
            0x1b,
            0x6e0,
            0x802,
        ] {
            assert!(exits(&bitmap, number, false) && exits(&bitmap, number, true));
        }
        let passed: u32 = bitmap.0.iter().map(|b| b.count_zeros()).sum();
        assert_eq!(passed, 12 * 2 + 1);
        let other = MsrBitmap::for_guests(false, true);
        assert!(exits(&other, msr::TSC_AUX, false));
        assert!(exits(&other, msr::PRED_CMD, false) && !exits(&other, msr::PRED_CMD, true));
    }
}
