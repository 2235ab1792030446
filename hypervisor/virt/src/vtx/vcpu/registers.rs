//! The guest's registers: in the VMCS, in memory beside it, or in the processor itself.
//!
//! Unsafe: reads and writes the MSRs that stay in the processor.

use super::{
    CR0_CD, CR0_GUEST_OWNED, CR0_LOADS_PDPTES, CR0_NW, CR4_GUEST_OWNED, CR4_LOADS_PDPTES, CR4_MCE,
    Cr4, DEBUGCTL_BTF, Due, VtxVcpu,
};
use crate::cpu::{GuestDebug, is_canonical, is_pat, msr, rdmsr};
use crate::state::{AccessRights, CpuState, DescriptorTable, Gpr, Segment, SegmentName};
use crate::vtx::capability::{Capabilities, EntryControls};
use crate::vtx::vmcs::{Field, SegmentFields};
use crate::{Registers, VirtualCpu};

impl Registers for VtxVcpu {
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
            GuestDebug::read().dr
        } else {
            self.debug.dr
        }
    }

    fn set_breakpoints(&mut self, addresses: [u64; 4]) {
        if self.is_loaded() {
            self.debug = GuestDebug::read();
        }
        self.debug.dr = addresses;
        if self.is_loaded() {
            self.debug.write();
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
            GuestDebug::read()
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
            self.debug.write();
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

    #[inline]
    fn cpl_of_64_bit_code(&self) -> Option<u8> {
        let rights = |field| AccessRights::from(self.read(field) as u32);
        let long =
            self.entry.contains(EntryControls::IA32E_GUEST) && rights(Field::GuestCsRights).long();
        long.then(|| rights(Field::GuestSsRights).dpl())
    }
}
