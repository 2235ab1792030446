//! The guest's registers: in the VMCB, in the frame of the world switch, or in the processor itself.
//!
//! Unsafe: reads and writes the MSRs that stay in the processor.

use super::{CR0_PAGING, CR4_PAGING, DEBUGCTL_BITS, EFER_LMA, EFER_SVME, RFLAGS_TF, SvmVcpu};
use crate::cpu::{GuestDebug, is_canonical, is_pat, msr, rdmsr, wrmsr};
use crate::state::{CpuState, DescriptorTable, Gpr, Segment, SegmentName};
use crate::svm::features::SvmFeatures;
use crate::svm::vmcb::{ATTRIBUTE_LONG, Clean, Intercepts1, InterruptState, VmcbSegment};
use crate::{Registers, VirtualCpu};

impl Registers for SvmVcpu {
    #[inline]
    fn gpr(&self, gpr: Gpr) -> u64 {
        match gpr {
            Gpr::Rax => self.save().rax,
            Gpr::Rsp => self.save().rsp,
            _ => self.frame.gprs[gpr as usize],
        }
    }

    #[inline]
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        match gpr {
            Gpr::Rax => self.save_mut().rax = value,
            Gpr::Rsp => self.save_mut().rsp = value,
            _ => self.frame.gprs[gpr as usize] = value,
        }
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.save().rip
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.save_mut().rip = rip;
    }

    fn rflags(&self) -> u64 {
        let rflags = self.save().rflags;
        match self.step {
            Some(step) if !step.guest_tf => rflags & !RFLAGS_TF,
            _ => rflags,
        }
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.save_mut().rflags = rflags;
        if let Some(step) = &mut self.step {
            step.guest_tf = rflags & RFLAGS_TF != 0;
            self.save_mut().rflags |= RFLAGS_TF;
        }
    }

    fn segment(&self, name: SegmentName) -> Segment {
        let segment = self.segment_field(name).to_segment();
        if name == SegmentName::Ss {
            // SYSRET leaves SS.DPL alone on AMD; CPL is what counts (section 6.1.1).
            let rights = segment.rights.with_dpl(self.save().cpl & 3);
            return Segment { rights, ..segment };
        }
        segment
    }

    fn set_segment(&mut self, name: SegmentName, segment: Segment) {
        *self.segment_field_mut(name) = VmcbSegment::from_segment(&segment);
        self.changed(Clean::SEGMENTS);
        if name == SegmentName::Ss {
            self.update_cpl();
        }
    }

    #[inline]
    fn cr0(&self) -> u64 {
        self.save().cr0
    }

    fn set_cr0(&mut self, value: u64) {
        let old = self.save().cr0;
        self.save_mut().cr0 = value;
        self.update_long_mode();
        if (old ^ value) & CR0_PAGING != 0 {
            self.update_cpl();
            self.flush_guest_tlb();
        }
    }

    fn cr2(&self) -> u64 {
        self.save().cr2
    }

    fn set_cr2(&mut self, value: u64) {
        self.save_mut().cr2 = value;
        self.changed(Clean::CR2);
    }

    fn cr3(&self) -> u64 {
        self.save().cr3
    }

    fn set_cr3(&mut self, value: u64) {
        self.save_mut().cr3 = value;
        self.changed(Clean::CONTROL_REGISTERS);
        self.flush_guest_tlb();
    }

    fn cr4(&self) -> u64 {
        self.save().cr4
    }

    fn set_cr4(&mut self, value: u64) {
        let old = self.save().cr4;
        self.save_mut().cr4 = value;
        self.changed(Clean::CONTROL_REGISTERS);
        if (old ^ value) & CR4_PAGING != 0 {
            self.flush_guest_tlb();
        }
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.save().efer & !EFER_SVME
    }

    fn set_efer(&mut self, value: u64) {
        // VMRUN demands SVME in the guest's EFER (section 15.5.1).
        self.save_mut().efer = value | EFER_SVME;
        self.update_long_mode();
        self.flush_guest_tlb();
    }

    fn dr6(&self) -> u64 {
        match self.step {
            Some(step) => step.dr6,
            None => self.save().dr6,
        }
    }

    fn set_dr6(&mut self, value: u64) {
        match &mut self.step {
            Some(step) => step.dr6 = value,
            None => {
                self.save_mut().dr6 = value;
                self.changed(Clean::DEBUG_REGISTERS);
            }
        }
    }

    #[inline]
    fn dr7(&self) -> u64 {
        self.save().dr7
    }

    fn set_dr7(&mut self, value: u64) {
        self.save_mut().dr7 = value & 0xffff_ffff;
        self.changed(Clean::DEBUG_REGISTERS);
    }

    fn breakpoints(&self) -> [u64; 4] {
        if self.loaded {
            GuestDebug::read().dr
        } else {
            self.debug.dr
        }
    }

    fn set_breakpoints(&mut self, addresses: [u64; 4]) {
        if self.loaded {
            self.debug = GuestDebug::read();
        }
        self.debug.dr = addresses;
        if self.loaded {
            self.debug.write();
        }
    }

    fn gdtr(&self) -> DescriptorTable {
        DescriptorTable {
            base: self.save().gdtr.base,
            limit: self.save().gdtr.limit as u16,
        }
    }

    fn idtr(&self) -> DescriptorTable {
        DescriptorTable {
            base: self.save().idtr.base,
            limit: self.save().idtr.limit as u16,
        }
    }

    fn set_gdtr(&mut self, table: DescriptorTable) {
        let field = &mut self.save_mut().gdtr;
        (field.base, field.limit) = (table.base, table.limit.into());
        self.changed(Clean::DESCRIPTOR_TABLES);
    }

    fn set_idtr(&mut self, table: DescriptorTable) {
        let field = &mut self.save_mut().idtr;
        (field.base, field.limit) = (table.base, table.limit.into());
        self.changed(Clean::DESCRIPTOR_TABLES);
    }

    fn vector(&mut self, number: u8) -> [u8; 32] {
        self.fpu.vector(number, self.loaded)
    }

    fn set_vector(&mut self, number: u8, value: &[u8; 32]) {
        self.fpu.set_vector(number, value, self.loaded);
    }

    fn mmx(&mut self, number: u8) -> u64 {
        self.fpu.mmx(number, self.loaded)
    }

    fn set_mmx(&mut self, number: u8, value: u64) {
        self.fpu.set_mmx(number, value, self.loaded);
    }

    fn legacy_fpu(&mut self) -> [u8; 512] {
        let loaded = self.loaded;
        self.fpu.legacy(loaded)
    }

    fn set_legacy_fpu(&mut self, image: &[u8; 512]) {
        let loaded = self.loaded;
        self.fpu.set_legacy(image, loaded);
    }

    fn pkru(&self) -> u32 {
        self.fpu.pkru(self.loaded)
    }

    fn xcr0(&self) -> u64 {
        self.fpu.xcr0(self.loaded)
    }

    fn set_xcr0(&mut self, value: u64) {
        self.fpu.set_xcr0(value, self.loaded);
    }

    fn state(&self) -> CpuState {
        let save = self.save();
        CpuState {
            gprs: Gpr::ALL.map(|gpr| self.gpr(gpr)),
            rip: save.rip,
            rflags: self.rflags(),
            cr0: save.cr0,
            cr2: save.cr2,
            cr3: save.cr3,
            cr4: save.cr4,
            efer: self.efer(),
            segments: [
                SegmentName::Es,
                SegmentName::Cs,
                SegmentName::Ss,
                SegmentName::Ds,
                SegmentName::Fs,
                SegmentName::Gs,
                SegmentName::Ldtr,
                SegmentName::Tr,
            ]
            .map(|name| self.segment(name)),
            gdtr: self.gdtr(),
            idtr: self.idtr(),
            dr: self.breakpoints(),
            dr6: self.dr6(),
            dr7: save.dr7,
            xcr0: self.fpu.xcr0(self.loaded),
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        self.cancel_step();
        self.cancel_injection();
        self.request_interrupt_window(false);
        self.nmi_window = false;
        if self.nmi_masked {
            self.nmi_masked = false;
            self.intercept1(Intercepts1::IRET, false);
        }
        for gpr in Gpr::ALL {
            self.set_gpr(gpr, state.gprs[gpr as usize]);
        }
        let table = |table: &DescriptorTable| VmcbSegment {
            base: table.base,
            limit: u32::from(table.limit),
            ..VmcbSegment::default()
        };
        let [es, cs, ss, ds, fs, gs, ldtr, tr] =
            state.segments.each_ref().map(VmcbSegment::from_segment);
        let save = self.save_mut();
        (save.es, save.cs, save.ss, save.ds) = (es, cs, ss, ds);
        (save.fs, save.gs, save.ldtr, save.tr) = (fs, gs, ldtr, tr);
        (save.gdtr, save.idtr) = (table(&state.gdtr), table(&state.idtr));
        (save.rip, save.rflags) = (state.rip, state.rflags);
        (save.cr0, save.cr2, save.cr3, save.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        save.efer = state.efer | EFER_SVME;
        (save.dr6, save.dr7) = (state.dr6 & 0xffff_ffff, state.dr7 & 0xffff_ffff);
        let control = self.control_mut();
        control.interrupt_state = InterruptState::NONE;
        control.interrupts = control.interrupts.with_nmi(false).with_nmi_mask(false);
        control.clean = Clean::empty();
        self.update_long_mode();
        self.update_cpl();
        self.debug.dr = state.dr;
        if self.loaded {
            self.debug.write();
        }
        self.fpu.set_xcr0(state.xcr0, self.loaded);
        self.flush_guest_tlb();
    }

    fn msr(&self, number: u32) -> Option<u64> {
        let save = self.save();
        Some(match number {
            msr::FS_BASE => save.fs.base,
            msr::GS_BASE => save.gs.base,
            msr::KERNEL_GS_BASE => save.kernel_gs_base,
            msr::STAR => save.star,
            msr::LSTAR => save.lstar,
            msr::CSTAR => save.cstar,
            msr::SFMASK => save.sfmask,
            msr::SYSENTER_CS => save.sysenter_cs,
            msr::SYSENTER_ESP => save.sysenter_esp,
            msr::SYSENTER_EIP => save.sysenter_eip,
            msr::PAT => save.pat,
            msr::DEBUGCTL => save.debug_control,
            msr::TSC_AUX if !self.shared.capabilities.tsc_aux => return None,
            // SAFETY: CPUID reports the register.
            msr::TSC_AUX if self.loaded => unsafe { rdmsr(msr::TSC_AUX) },
            msr::TSC_AUX => self.tsc_aux,
            msr::SPEC_CTRL if self.shared.capabilities.virtual_spec_ctrl() => save.spec_ctrl,
            msr::SPEC_CTRL => return self.spec_ctrl.get(),
            _ => return None,
        })
    }

    fn set_msr(&mut self, number: u32, value: u64) -> bool {
        let capabilities = self.shared.capabilities;
        let branch_records = capabilities.svm.contains(SvmFeatures::LBR_VIRTUALIZATION);
        let save = self.save_mut();
        match number {
            // VMLOAD would load something else.
            msr::FS_BASE | msr::GS_BASE | msr::KERNEL_GS_BASE | msr::LSTAR | msr::CSTAR
                if !is_canonical(value) =>
            {
                return false;
            }
            msr::FS_BASE => save.fs.base = value,
            msr::GS_BASE => save.gs.base = value,
            msr::KERNEL_GS_BASE => save.kernel_gs_base = value,
            msr::STAR => save.star = value,
            msr::LSTAR => save.lstar = value,
            msr::CSTAR => save.cstar = value,
            msr::SFMASK => save.sfmask = value,
            msr::SYSENTER_CS => save.sysenter_cs = value,
            msr::SYSENTER_ESP => save.sysenter_esp = value,
            msr::SYSENTER_EIP => save.sysenter_eip = value,
            msr::PAT => {
                // VMRUN refuses others (section 15.25.4).
                if !is_pat(value) {
                    return false;
                }
                save.pat = value;
                self.changed(Clean::NESTED_PAGING);
            }
            msr::DEBUGCTL => {
                // Without LBR virtualization the host would run under the guest's setting, so
                // the guest has none: the register reads 0.
                save.debug_control = if branch_records {
                    value & DEBUGCTL_BITS
                } else {
                    0
                };
                self.update_extensions();
            }
            msr::TSC_AUX => {
                if !capabilities.tsc_aux || value >> 32 != 0 {
                    return false;
                }
                self.tsc_aux = value;
                if self.loaded {
                    // SAFETY: CPUID reports the register, whose reserved upper half is 0 here.
                    unsafe { wrmsr(msr::TSC_AUX, value) };
                }
            }
            msr::SPEC_CTRL if capabilities.virtual_spec_ctrl() => {
                save.spec_ctrl = value;
            }
            msr::SPEC_CTRL => return self.spec_ctrl.set(value, self.loaded),
            _ => return false,
        }
        true
    }

    #[inline]
    fn cpl_of_64_bit_code(&self) -> Option<u8> {
        let save = self.save();
        let long = save.efer & EFER_LMA != 0 && save.cs.attributes & ATTRIBUTE_LONG != 0;
        long.then_some(save.cpl & 3)
    }

    fn cpl(&self) -> u8 {
        self.save().cpl & 3
    }
}
