//! What an emulated instruction reaches beyond RAM: the local APIC, the buses, control registers.

use devices::lapic::ApicEffect;
use mem::{Gpa, Width};
use virt::VirtualCpu;

use super::Rest;
use crate::{
    control,
    emulate::{Aftermath, Exception, Platform},
    vm::Vm,
};

/// A threshold that no priority class is: what the hardware has is not known.
const UNKNOWN_THRESHOLD: u8 = u8::MAX;

impl Rest {
    pub(super) fn apic_effect(&mut self, effect: ApicEffect) {
        match effect {
            ApicEffect::None => {}
            ApicEffect::EoiBroadcast(vector) => self.vm.ioapic.eoi(vector),
            // The APIC page is never mapped, so every mode change takes effect by itself.
            ApicEffect::BaseChanged => {}
        }
    }

    /// Takes over what the guest has done to its task priority without an exit. Before anything that reads or
    /// writes the local APIC's, and before interrupts are looked at.
    #[inline]
    pub(super) fn fetch_task_priority<V: VirtualCpu>(&mut self, cpu: &V) {
        if let Some(tpr) = cpu.task_priority()
            && tpr != self.shown_priority.0
        {
            // The change may have been the one that takes the threshold back.
            self.shown_priority = (tpr, UNKNOWN_THRESHOLD);
            self.apic.set_tpr(tpr);
        }
    }

    /// Gives the task priority to the vCPU, with the class below which an interrupt waits.
    #[inline]
    pub(super) fn show_task_priority<V: VirtualCpu>(&mut self, cpu: &mut V) {
        let now = (self.apic.tpr(), self.apic.withheld());
        if now != self.shown_priority {
            self.shown_priority = now;
            cpu.set_task_priority(now.0, now.1);
        }
    }

    /// Offset in the xAPIC page, if the address lies there and the APIC answers there.
    fn xapic_offset(&self, gpa: Gpa) -> Option<u64> {
        let page = self.apic.xapic_page()?;
        (gpa.0 & !0xfff == page).then_some(gpa.0 & 0xfff)
    }
}

impl<V: VirtualCpu> Platform<V> for Rest {
    fn mmio_read(&mut self, cpu: &mut V, gpa: Gpa, width: Width) -> u64 {
        match self.xapic_offset(gpa) {
            Some(offset) => {
                self.fetch_task_priority(cpu);
                let value = self.apic.read_mmio(offset, width);
                // A reserved register raises an APIC error.
                self.reach.interrupts |= self.apic.has_new_errors();
                value.map_or(width.mask(), u64::from)
            }
            None => {
                self.device_accesses += 1;
                self.vm.mmio.read(gpa.0, width)
            }
        }
    }

    fn mmio_write(&mut self, cpu: &mut V, gpa: Gpa, width: Width, value: u64) {
        match self.xapic_offset(gpa) {
            Some(offset) => {
                self.fetch_task_priority(cpu);
                self.reach.interrupts = true;
                if let Ok(effect) = self.apic.write_mmio(offset, width, value as u32) {
                    self.apic_effect(effect);
                }
            }
            None => {
                self.device_accesses += 1;
                self.reach.timers |= Vm::is_timer_memory(gpa);
                self.vm.mmio.write(gpa.0, width, value);
            }
        }
    }

    fn port_read(&mut self, port: u16, width: Width) -> u32 {
        self.device_accesses += 1;
        self.vm.ports.read(port, width)
    }

    fn port_write(&mut self, port: u16, width: Width, value: u32) {
        self.device_accesses += 1;
        self.reach.timers = true;
        self.vm.ports.write(port, width, value);
    }

    fn control_read(&mut self, cpu: &mut V, cr: u8) -> u64 {
        match cr {
            0 => cpu.cr0(),
            2 => cpu.cr2(),
            3 => cpu.cr3(),
            4 => cpu.cr4(),
            _ => {
                self.fetch_task_priority(cpu);
                self.apic.cr8()
            }
        }
    }

    fn control_write(&mut self, cpu: &mut V, cr: u8, value: u64) -> Result<(), Exception> {
        self.reach.interrupts = true;
        match cr {
            0 => control::write_cr0(cpu, self.vm.control_context(), value),
            2 => {
                cpu.set_cr2(value);
                Ok(())
            }
            3 => control::write_cr3(cpu, self.vm.control_context(), value),
            4 => control::write_cr4(cpu, self.vm.control_context(), value),
            8 => {
                self.fetch_task_priority(cpu);
                self.apic
                    .set_cr8(value)
                    .map_err(|_| Exception::GENERAL_PROTECTION)
            }
            _ => Err(Exception::UNDEFINED_OPCODE),
        }
    }

    fn physical_bits(&self) -> u8 {
        self.vm.cpuid.physical_bits()
    }

    fn aftermath(&mut self, aftermath: Aftermath) {
        self.reach.aftermath = aftermath;
    }
}
