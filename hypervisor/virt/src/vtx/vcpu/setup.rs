//! What a VMCS holds from its first load on: the controls, and the state of the host.
//!
//! Unsafe: reads the task register, its descriptor, and MSRs of the host.

use core::arch::asm;

use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment as _};
use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr3, Cr4};

use super::{CR0_GUEST_OWNED, CR4_GUEST_OWNED, EXCEPTION_BITMAP, PLE_GAP, PLE_WINDOW, VtxVcpu};
use crate::Registers;
use crate::cpu::{PAT_RESET, msr, rdmsr};
use crate::state::CpuState;
use crate::vtx::capability::Proc2;
use crate::vtx::entry::{exit_landing, exit_landing_filling};
use crate::vtx::vmcs::Field;

impl VtxVcpu {
    /// Writes all that does not change while this VMCS lives.
    pub(super) fn initialize(&mut self) {
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
    pub(super) fn write_host_state(&self) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_state_base_is_gathered_from_three_places() {
        let descriptor = [0x1200_8b34_5678_0067, 0xffff_9abc];
        assert_eq!(task_state_base(descriptor), 0xffff_9abc_1234_5678);
    }
}
