//! Instructions that elsewhere exit by themselves or never leave the processor, in code that is in device memory.
//!
//! What they do beyond registers is the vCPU's affair: it is named by a [`Service`]. Privilege and control registers
//! are checked here, as the processor does before such an exit (SDM vol. 3C, section 26.1.1).

use iced_x86::{Mnemonic, Register};
use mem::Width;
use virt::{CpuMode, Gpr, SegmentName, VirtualCpu};

use super::{
    Exception, Platform,
    alu::RFLAGS_ZF,
    execute::{Run, Step, Stop},
    segment::{is_conforming, is_readable, is_writable},
};
use crate::msr::number;

const CR4_TSD: u64 = 1 << 2;
const CR4_DE: u64 = 1 << 3;
const CR4_UMIP: u64 = 1 << 11;
const CR4_OSXSAVE: u64 = 1 << 18;
const DR7_GD: u64 = 1 << 13;
/// What MOV to DR6 and DR7 leaves as it is: bits that are always one, and always zero (SDM vol. 3B, section 18.2).
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_FIXED: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xffff_2bff;

/// What a vCPU does for an instruction that the emulator has decoded and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// RDTSC, or RDTSCP where `aux` is set.
    ReadTsc {
        /// ECX gets IA32_TSC_AUX.
        aux: bool,
    },
    /// XSETBV.
    SetXcr,
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes one of these instructions; `None`: another one.
    pub(super) fn service(&mut self) -> Result<Option<Step>, Stop> {
        let service = match self.instruction.mnemonic() {
            Mnemonic::Cpuid => Service::Cpuid,
            Mnemonic::Vmcall | Mnemonic::Vmmcall => Service::Hypercall,
            Mnemonic::Hlt => {
                self.check_privileged()?;
                Service::Halt
            }
            Mnemonic::Rdmsr => {
                self.check_privileged()?;
                Service::ReadMsr
            }
            Mnemonic::Wrmsr => {
                self.check_privileged()?;
                Service::WriteMsr
            }
            Mnemonic::Rdtsc | Mnemonic::Rdtscp => {
                if self.paging.cr4 & CR4_TSD != 0 {
                    self.check_privileged()?;
                }
                let aux = self.instruction.mnemonic() == Mnemonic::Rdtscp;
                Service::ReadTsc { aux }
            }
            Mnemonic::Xsetbv => Service::SetXcr,
            _ => return Ok(self.without_service()?.then_some(Step::Done)),
        };
        Ok(Some(Step::Service(service)))
    }

    fn without_service(&mut self) -> Result<bool, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Pause
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Endbr32
            | Mnemonic::Endbr64 => {}
            // RAM is write-back for the guest, and what is not RAM is in no cache.
            Mnemonic::Wbinvd | Mnemonic::Wbnoinvd | Mnemonic::Invd => self.check_privileged()?,
            Mnemonic::Invlpg => {
                self.check_privileged()?;
                self.cpu.flush_guest_tlb();
            }
            Mnemonic::Swapgs => self.swap_gs()?,
            Mnemonic::Xgetbv => self.read_xcr()?,
            // Not shown to guests, and there is no PMU.
            Mnemonic::Monitor | Mnemonic::Mwait => {
                return Err(Stop::Fault(Exception::UNDEFINED_OPCODE));
            }
            Mnemonic::Rdpmc => return Err(Stop::Fault(Exception::GENERAL_PROTECTION)),
            Mnemonic::Mov if self.instruction.op0_register().is_dr() => {
                let value = self.read_register(self.instruction.op1_register())?;
                self.write_debug(self.instruction.op0_register(), value)?;
            }
            Mnemonic::Mov if self.instruction.op1_register().is_dr() => {
                let value = self.read_debug(self.instruction.op1_register())?;
                self.write_register(self.instruction.op0_register(), value)?;
            }
            Mnemonic::Verr | Mnemonic::Verw => {
                let selector = self.get(0)? as u16;
                let write = self.instruction.mnemonic() == Mnemonic::Verw;
                let good = self.is_accessible(selector, write)?;
                self.set_flags(RFLAGS_ZF, if good { RFLAGS_ZF } else { 0 });
            }
            Mnemonic::Lar | Mnemonic::Lsl => {
                let selector = self.get(1)? as u16;
                let found = self.descriptor_part(selector)?;
                if let Some(value) = found {
                    self.set(0, value)?;
                }
                self.set_flags(RFLAGS_ZF, found.map_or(0, |_| RFLAGS_ZF));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// #GP(0) outside privilege level 0.
    pub(super) fn check_privileged(&self) -> Result<(), Stop> {
        if self.paging.cpl != 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        Ok(())
    }

    /// #GP(0) for SGDT, SIDT, SLDT, SMSW and STR where CR4.UMIP keeps them from programs.
    pub(super) fn check_user_mode_prevention(&self) -> Result<(), Stop> {
        if self.paging.cr4 & CR4_UMIP != 0 {
            self.check_privileged()?;
        }
        Ok(())
    }

    fn swap_gs(&mut self) -> Result<(), Stop> {
        if self.mode != CpuMode::Long64 {
            return Err(Stop::Fault(Exception::UNDEFINED_OPCODE));
        }
        self.check_privileged()?;
        let mut gs = self.cpu.segment(SegmentName::Gs);
        let other = self
            .cpu
            .msr(number::KERNEL_GS_BASE)
            .ok_or(Stop::Unsupported)?;
        self.cpu.set_msr(number::KERNEL_GS_BASE, gs.base);
        gs.base = other;
        self.cpu.set_segment(SegmentName::Gs, gs);
        Ok(())
    }

    fn read_xcr(&mut self) -> Result<(), Stop> {
        if self.paging.cr4 & CR4_OSXSAVE == 0 {
            return Err(Stop::Fault(Exception::UNDEFINED_OPCODE));
        }
        match self.cpu.gpr(Gpr::Rcx) as u32 {
            0 => {
                let value = self.cpu.xcr0();
                self.write_gpr(Gpr::Rax, Width::Dword, value);
                self.write_gpr(Gpr::Rdx, Width::Dword, value >> 32);
                Ok(())
            }
            // Which components are in use only the processor itself can tell.
            1 => Err(Stop::Unsupported),
            _ => Err(Stop::Fault(Exception::GENERAL_PROTECTION)),
        }
    }

    /// The number of a debug register that may be reached now: 4 and 5 are other names of 6 and 7, or not there.
    fn debug_register(&self, register: Register) -> Result<usize, Stop> {
        let number = register.number();
        if matches!(number, 4 | 5) && self.paging.cr4 & CR4_DE != 0 || number > 7 {
            return Err(Stop::Fault(Exception::UNDEFINED_OPCODE));
        }
        self.check_privileged()?;
        // What is watched itself is not carried out.
        if self.cpu.dr7() & DR7_GD != 0 {
            return Err(Stop::Unsupported);
        }
        Ok(if number >= 4 { number | 2 } else { number })
    }

    fn read_debug(&self, register: Register) -> Result<u64, Stop> {
        Ok(match self.debug_register(register)? {
            6 => self.cpu.dr6(),
            7 => self.cpu.dr7(),
            number => self.cpu.breakpoints().get(number).copied().unwrap_or(0),
        })
    }

    fn write_debug(&mut self, register: Register, value: u64) -> Result<(), Stop> {
        let number = self.debug_register(register)?;
        if number >= 6 && value >> 32 != 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        match number {
            6 => self.cpu.set_dr6(value & DR6_WRITABLE | DR6_FIXED),
            7 => self.cpu.set_dr7(value & DR7_WRITABLE | DR7_FIXED),
            number => {
                let mut addresses = self.cpu.breakpoints();
                if let Some(address) = addresses.get_mut(number) {
                    *address = value;
                }
                self.cpu.set_breakpoints(addresses);
            }
        }
        Ok(())
    }

    /// VERR and VERW.
    fn is_accessible(&mut self, selector: u16, write: bool) -> Result<bool, Stop> {
        let Some(entry) = self.entry_to_look_at(selector)? else {
            return Ok(false);
        };
        let rights = entry.rights();
        let permitted = is_conforming(rights) || self.looks_at(selector) <= rights.dpl();
        let kind = if write {
            is_writable(rights)
        } else {
            is_readable(rights)
        };
        Ok(kind && permitted)
    }

    /// LAR and LSL: what they load; `None` if the selector names nothing that may be looked at.
    fn descriptor_part(&mut self, selector: u16) -> Result<Option<u64>, Stop> {
        /// System descriptors with a limit: TSSs and LDTs; with rights also call gates and the task gate.
        const WITH_LIMIT: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11;
        const WITH_RIGHTS: u16 = WITH_LIMIT | 1 << 4 | 1 << 5 | 1 << 12;
        const LONG_WITH_LIMIT: u16 = 1 << 2 | 1 << 9 | 1 << 11;
        const LONG_WITH_RIGHTS: u16 = LONG_WITH_LIMIT | 1 << 12;
        let limits = self.instruction.mnemonic() == Mnemonic::Lsl;
        let Some(entry) = self.entry_to_look_at(selector)? else {
            return Ok(None);
        };
        let rights = entry.rights();
        let kinds = match (self.in_long_mode(), limits) {
            (true, true) => LONG_WITH_LIMIT,
            (true, false) => LONG_WITH_RIGHTS,
            (false, true) => WITH_LIMIT,
            (false, false) => WITH_RIGHTS,
        };
        let known = rights.code_or_data() || kinds >> rights.kind() & 1 != 0;
        let permitted = is_conforming(rights) || self.looks_at(selector) <= rights.dpl();
        if !known || !permitted {
            return Ok(None);
        }
        Ok(Some(if limits {
            entry.segment(selector).limit.into()
        } else {
            entry.low >> 32 & 0x00f0_ff00
        }))
    }

    /// The privilege with which a selector is looked at.
    fn looks_at(&self, selector: u16) -> u8 {
        self.paging.cpl.max(selector as u8 & 3)
    }

    /// A descriptor, or `None` where its table has none. #UD in modes without descriptors.
    fn entry_to_look_at(&mut self, selector: u16) -> Result<Option<super::system::Entry>, Stop> {
        if matches!(self.mode, CpuMode::Real | CpuMode::Virtual8086) {
            return Err(Stop::Fault(Exception::UNDEFINED_OPCODE));
        }
        if selector & !3 == 0 {
            return Ok(None);
        }
        match self.entry(selector, false) {
            Ok(entry) => Ok(Some(entry)),
            Err(Stop::Fault(e)) if e.vector == super::system::GENERAL => Ok(None),
            Err(stop) => Err(stop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rare_tests::{CODE_32, DATA, USER_DATA, bench};
    use super::super::tests::{Bench, DONE};
    use super::*;
    use crate::emulate::Outcome;
    use virt::Registers;

    const GP: Outcome = Outcome::Fault(Exception::GENERAL_PROTECTION);
    const UD: Outcome = Outcome::Fault(Exception::UNDEFINED_OPCODE);

    fn in_ring_3() -> Bench {
        let mut b = bench();
        let ss = &mut b.cpu.state.segments[SegmentName::Ss as usize];
        ss.rights.set_dpl(3);
        b
    }

    #[test]
    fn what_the_vcpu_does_is_named_after_the_checks() {
        for (code, service, anybody) in [
            (&[0x0f, 0xa2][..], Service::Cpuid, true),
            (&[0xf4], Service::Halt, false),
            (&[0x0f, 0x01, 0xc1], Service::Hypercall, true),
            (&[0x0f, 0x32], Service::ReadMsr, false),
            (&[0x0f, 0x30], Service::WriteMsr, false),
            (&[0x0f, 0x31], Service::ReadTsc { aux: false }, true),
            (&[0x0f, 0x01, 0xf9], Service::ReadTsc { aux: true }, true),
            (&[0x0f, 0x01, 0xd1], Service::SetXcr, true),
        ] {
            let wanted = Outcome::Service(service, code.len() as u8);
            assert_eq!(bench().run(code), wanted);
            let outcome = in_ring_3().run(code);
            assert_eq!(outcome, if anybody { wanted } else { GP }, "{service:?}");
        }
        let mut b = in_ring_3();
        b.cpu.state.cr4 |= CR4_TSD;
        assert_eq!(b.run(&[0x0f, 0x31]), GP);
    }

    #[test]
    fn programs_may_not_do_what_the_system_does() {
        for code in [
            &[0x0f, 0x20, 0xc0][..], // mov rax, cr0
            &[0x0f, 0x22, 0xc0],     // mov cr0, rax
            &[0x0f, 0x06],           // clts
            &[0x0f, 0x01, 0xf0],     // lmsw ax
            &[0x0f, 0x01, 0x13],     // lgdt [rbx]
            &[0x0f, 0x01, 0x1b],     // lidt [rbx]
            &[0x0f, 0x00, 0xd0],     // lldt ax
            &[0x0f, 0x00, 0xd8],     // ltr ax
            &[0x0f, 0x01, 0x3b],     // invlpg [rbx]
            &[0x0f, 0x09],           // wbinvd
            &[0x0f, 0x01, 0xf8],     // swapgs
            &[0x0f, 0x21, 0xf8],     // mov rax, dr7
        ] {
            assert_eq!(in_ring_3().run(code), GP, "{code:02x?}");
        }
        for code in [
            &[0x0f, 0x01, 0xe0][..], // smsw eax
            &[0x0f, 0x01, 0x03],     // sgdt [rbx]
            &[0x0f, 0x00, 0xc8],     // str eax
        ] {
            let mut b = in_ring_3();
            assert_eq!(b.run(code), DONE(code), "{code:02x?}");
            let mut b = in_ring_3();
            b.cpu.state.cr4 |= CR4_UMIP;
            assert_eq!(b.run(code), GP, "{code:02x?}");
        }
    }

    #[test]
    fn debug_registers() {
        let mut b = bench();
        b.cpu.set_gpr(Gpr::Rax, 0x1234);
        for code in [[0x0f, 0x23, 0xd8], [0x0f, 0x21, 0xd9]] {
            assert_eq!(b.run(&code), DONE(&code));
        }
        assert_eq!(b.cpu.gpr(Gpr::Rcx), 0x1234, "DR3");
        b.cpu.set_gpr(Gpr::Rax, 0);
        for to in [[0x0f, 0x23, 0xe0], [0x0f, 0x23, 0xf8]] {
            assert_eq!(b.run(&to), DONE(&to));
        }
        assert_eq!((b.cpu.dr6(), b.cpu.dr7()), (DR6_FIXED, DR7_FIXED));
        b.cpu.set_gpr(Gpr::Rax, 1 << 32);
        assert_eq!(b.run(&[0x0f, 0x23, 0xf0]), GP, "the upper half of DR6");
        b.cpu.state.cr4 |= CR4_DE;
        assert_eq!(b.run(&[0x0f, 0x21, 0xe0]), UD, "DR4");
        b.cpu.state.dr7 |= DR7_GD;
        let watched = b.run(&[0x0f, 0x21, 0xf8]);
        assert!(matches!(watched, Outcome::Unsupported(_)));
    }

    /// LAR, LSL, VERR and VERW of a selector in device memory.
    #[test]
    fn descriptors_are_looked_at_without_faults() {
        const LAR: [u8; 3] = [0x0f, 0x02, 0x03];
        const LSL: [u8; 3] = [0x0f, 0x03, 0x03];
        const VERR: [u8; 3] = [0x0f, 0x00, 0x23];
        const VERW: [u8; 3] = [0x0f, 0x00, 0x2b];
        for (code, selector, found) in [
            (LAR, DATA, Some(0x00cf_9200 & 0x00f0_ff00)),
            (LSL, DATA, Some(0xffff_ffff)),
            (LAR, 0, None),
            (LSL, 0x48, None),
            (VERR, CODE_32, Some(7)),
            (VERW, CODE_32, None),
            (VERW, USER_DATA, Some(7)),
            (VERR, DATA | 3, None),
        ] {
            let mut b = bench();
            b.set_device(0, selector.into());
            b.cpu.set_gpr(Gpr::Rax, 7);
            assert_eq!(b.run(&code), DONE(&code));
            let zero = b.cpu.rflags() & RFLAGS_ZF != 0;
            assert_eq!(zero, found.is_some(), "{code:02x?} {selector:#x}");
            assert_eq!(b.cpu.gpr(Gpr::Rax), found.unwrap_or(7));
        }
        let mut b = bench();
        b.cpu.state.cr0 &= !1;
        b.cpu.state.efer = 0;
        assert_eq!(b.run(&[0x0f, 0x02, 0xc0]), UD, "in real mode");
    }
}
