//! RDMSR and WRMSR: which register is whose, and what a write sets in motion.

use alloc::format;

use devices::{
    lapic::{ApicEffect, LocalApic},
    time::Clock,
};
use mem::Gpa;
use virt::{Gpr, VirtualCpu};

use super::{Next, Rest, Vcpu, steal::StealTime};
use crate::{
    clock, control,
    emulate::Exception,
    host::Host,
    msr::{self, Mtrrs, number},
};

/// Lines that one vCPU may have written to the host's log about unknown MSRs.
pub(super) const MAX_MSR_NOTES: u32 = 16;
/// Bit 0 of the paravirtual clock MSR: enable.
const TIME_INFO_ENABLE: u64 = 1;

/// MSRs that live with the vCPU.
#[derive(Debug)]
pub(super) struct Msrs {
    mtrrs: Mtrrs,
    /// Guest TSC minus the VM's clock, wrapping: IA32_TSC_ADJUST.
    tsc_adjust: u64,
    system_time: u64,
    wall_clock: u64,
    pub(super) steal_time: StealTime,
    misc_enable: u64,
    notes: u32,
}

impl Default for Msrs {
    fn default() -> Self {
        Msrs {
            mtrrs: Mtrrs::default(),
            tsc_adjust: 0,
            system_time: 0,
            wall_clock: 0,
            steal_time: StealTime::default(),
            misc_enable: msr::MISC_ENABLE_RESET,
            notes: 0,
        }
    }
}

impl Msrs {
    /// Guest TSC minus the VM's clock, wrapping.
    pub(super) fn tsc_adjust(&self) -> u64 {
        self.tsc_adjust
    }
}

impl<V: VirtualCpu> Vcpu<V> {
    pub(super) fn edx_eax(&self) -> u64 {
        (self.hw.gpr(Gpr::Rdx) << 32) | (self.hw.gpr(Gpr::Rax) & 0xffff_ffff)
    }

    pub(super) fn rdmsr<H: Host>(&mut self, host: &mut H) -> Next {
        let msr = self.hw.gpr(Gpr::Rcx) as u32;
        match self.read_msr(msr) {
            Some(value) => {
                self.hw.set_gpr(Gpr::Rax, value & 0xffff_ffff);
                self.hw.set_gpr(Gpr::Rdx, value >> 32);
                self.step_over()
            }
            None => {
                self.rest.note_msr(host, "read of", msr);
                self.raise(Exception::GENERAL_PROTECTION);
                Next::Check
            }
        }
    }

    pub(super) fn wrmsr<H: Host>(&mut self, host: &mut H) -> Next {
        let msr = self.hw.gpr(Gpr::Rcx) as u32;
        match self.write_msr(msr, self.edx_eax()) {
            Ok(next) => match self.step_over() {
                Next::Enter => next,
                other => other,
            },
            Err(exception) => {
                if !LocalApic::owns_msr(msr) && self.read_msr(msr).is_none() {
                    self.rest.note_msr(host, "write to", msr);
                }
                self.raise(exception);
                Next::Check
            }
        }
    }

    #[inline(always)]
    pub(super) fn read_msr(&mut self, msr: u32) -> Option<u64> {
        let Vcpu { hw, rest, .. } = self;
        if LocalApic::owns_msr(msr) {
            rest.fetch_task_priority(hw);
            return rest.apic.read_msr(msr).ok();
        }
        match msr {
            number::TSC => Some(rest.vm.clock.now().wrapping_add(rest.msrs.tsc_adjust)),
            number::TSC_ADJUST => Some(rest.msrs.tsc_adjust),
            number::EFER => Some(hw.efer()),
            number::KVM_SYSTEM_TIME | number::KVM_SYSTEM_TIME_OLD => Some(rest.msrs.system_time),
            number::KVM_WALL_CLOCK | number::KVM_WALL_CLOCK_OLD => Some(rest.msrs.wall_clock),
            number::KVM_STEAL_TIME => Some(rest.msrs.steal_time.msr()),
            number::MISC_ENABLE => Some(rest.msrs.misc_enable),
            number::PLATFORM_INFO => Some(msr::platform_info(rest.vm.clock.hz())),
            number::SPEC_CTRL if !rest.vm.cpuid.has_spec_ctrl() => None,
            number::TSC_AUX if !rest.vm.cpuid.has_tsc_aux() => None,
            _ => hw
                .msr(msr)
                .or_else(|| rest.msrs.mtrrs.read(msr))
                .or_else(|| msr::constant(rest.vm.cpuid.vendor(), msr))
                .or_else(|| msr::announced(&rest.vm.cpuid, msr)),
        }
    }

    #[inline(always)]
    pub(super) fn write_msr(&mut self, msr: u32, value: u64) -> Result<Next, Exception> {
        const GP: Exception = Exception::GENERAL_PROTECTION;
        let Vcpu { hw, rest, .. } = self;
        if LocalApic::owns_msr(msr) {
            rest.fetch_task_priority(hw);
            let effect = rest.apic.write_msr(msr, value).map_err(|_| GP)?;
            rest.apic_effect(effect);
            let unchanged = msr == number::APIC_BASE && effect == ApicEffect::None;
            return Ok(if unchanged { Next::Enter } else { Next::Check });
        }
        match msr {
            number::TSC => {
                let adjust = value.wrapping_sub(rest.vm.clock.now());
                rest.set_tsc_adjust(hw, adjust);
                return Ok(Next::Check);
            }
            number::TSC_ADJUST => {
                rest.set_tsc_adjust(hw, value);
                return Ok(Next::Check);
            }
            number::EFER => control::write_efer(hw, &rest.vm.cpuid, value)?,
            number::KVM_SYSTEM_TIME | number::KVM_SYSTEM_TIME_OLD => {
                rest.msrs.system_time = value;
                rest.write_time_info()?;
            }
            number::KVM_WALL_CLOCK | number::KVM_WALL_CLOCK_OLD => {
                let epoch = rest.vm.epoch_now();
                if !clock::write_wall_clock(&rest.vm.memory, Gpa(value), epoch) {
                    return Err(GP);
                }
                rest.msrs.wall_clock = value;
            }
            number::KVM_STEAL_TIME => {
                if !rest.msrs.steal_time.set(&rest.vm.memory, value) {
                    return Err(GP);
                }
            }
            number::MISC_ENABLE => {
                let changed = rest.msrs.misc_enable ^ value;
                if changed & !msr::MISC_ENABLE_WRITABLE != 0 {
                    return Err(GP);
                }
                rest.msrs.misc_enable = value;
            }
            number::SPEC_CTRL if !rest.vm.cpuid.has_spec_ctrl() => return Err(GP),
            number::TSC_AUX if !rest.vm.cpuid.has_tsc_aux() => return Err(GP),
            _ => {
                let bits = rest.vm.cpuid.physical_bits();
                let taken = match rest.msrs.mtrrs.write(msr, value, bits) {
                    Some(good) => good,
                    None if hw.msr(msr).is_some() => hw.set_msr(msr, value),
                    None => {
                        let cpuid = &rest.vm.cpuid;
                        msr::write_ignored(cpuid.vendor(), msr) || msr::accepts(cpuid, msr, value)
                    }
                };
                if !taken {
                    return Err(GP);
                }
            }
        }
        Ok(Next::Enter)
    }
}

impl Rest {
    fn set_tsc_adjust<V: VirtualCpu>(&mut self, hw: &mut V, adjust: u64) {
        self.msrs.tsc_adjust = adjust;
        hw.set_tsc_offset(self.vm.clock.tsc_offset().wrapping_add(adjust));
        self.apic.set_tsc_adjust(adjust);
        // The page relates the TSC to time, so it changes with the TSC. The guest enabled it
        // at an address that was good then; RAM does not go away.
        let _still_there = self.write_time_info();
    }

    fn write_time_info(&mut self) -> Result<(), Exception> {
        if self.msrs.system_time & TIME_INFO_ENABLE == 0 {
            return Ok(());
        }
        let at = Gpa(self.msrs.system_time & !TIME_INFO_ENABLE);
        if clock::write_time_info(&self.vm.memory, at, &self.vm.clock, self.msrs.tsc_adjust) {
            Ok(())
        } else {
            self.msrs.system_time = 0;
            Err(Exception::GENERAL_PROTECTION)
        }
    }

    fn note_msr<H: Host>(&mut self, host: &mut H, what: &str, msr: u32) {
        if self.msrs.notes >= MAX_MSR_NOTES {
            return;
        }
        self.msrs.notes += 1;
        let last = if self.msrs.notes == MAX_MSR_NOTES {
            "; no more such lines"
        } else {
            ""
        };
        host.note(format!(
            "{}: {what} unknown MSR {msr:#x} gives #GP{last}",
            self.vm.name
        ));
    }
}
