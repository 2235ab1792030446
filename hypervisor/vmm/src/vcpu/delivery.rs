//! Events whose delivery reached outside RAM.
//!
//! The processor was delivering an interrupt or exception when it read or wrote where no RAM is: page tables, the IDT, a
//! stack. The instruction at RIP has nothing to do with it. Reads give ones there, so that a page walk ends in reserved
//! bits and a gate is no gate: exceptions in the delivery of the event, which become a double fault and a shutdown as
//! they do in a processor (SDM vol. 3A, table 7-5). Where nothing would fault, as when a stack takes what is
//! pushed nowhere, the VM ends by name.

use mem::{Gva, Width};
use virt::{CpuMode, Event, Gpr, NestedPageFault, SegmentName, VirtualCpu};

use super::{EndKind, Next, Vcpu};
use crate::{
    emulate::{Exception, Platform},
    task,
    walk::{Access, Paging},
};

const DOUBLE_FAULT: u8 = 8;
const GENERAL_PROTECTION: u8 = 13;
/// Of byte 5 of a gate: it is no system descriptor, so no gate.
const CODE_OR_DATA: u64 = 1 << 4;

impl<V: VirtualCpu> Vcpu<V> {
    /// What becomes of `event`, whose delivery ended in `fault`.
    #[cold]
    pub(super) fn delivery_outside_ram(&mut self, fault: NestedPageFault, event: Event) -> Next {
        let paging = task::system_paging(&self.hw, self.rest.vm.cpuid.physical_bits());
        if fault.page_walk {
            if let Some(exception) = self.fault_in_delivery(&paging, fault, event) {
                return match task::after(Some(event), exception) {
                    task::Outcome::TripleFault => self.end(EndKind::TripleFault),
                    task::Outcome::Fault(exception) => {
                        self.raise(exception);
                        Next::Check
                    }
                    task::Outcome::Done | task::Outcome::Trap => Next::Check,
                };
            }
        } else if [vector_of(event), GENERAL_PROTECTION, DOUBLE_FAULT]
            .into_iter()
            .all(|vector| self.is_no_gate(&paging, vector))
        {
            // #GP for the gate, #GP for that of #GP, which is a double fault, and #GP for its own.
            return self.end(EndKind::TripleFault);
        }
        self.end(EndKind::Unsupported(
            "an event whose stack or tables are outside RAM",
        ))
    }

    /// Linear address of a vector's gate; `None`: real mode, where there are none.
    fn gate(&self, vector: u8) -> Option<Gva> {
        let bytes = match self.hw.mode() {
            CpuMode::Real => return None,
            CpuMode::Long64 | CpuMode::Compatibility32 | CpuMode::Compatibility16 => 16,
            CpuMode::Virtual8086 | CpuMode::Protected32 | CpuMode::Protected16 => 8,
        };
        let offset = u64::from(vector) * bytes;
        Some(Gva(self.hw.idtr().base.wrapping_add(offset)))
    }

    /// The page fault that the processor's own accesses would have ended in, had it read ones.
    fn fault_in_delivery(
        &self,
        paging: &Paging,
        fault: NestedPageFault,
        event: Event,
    ) -> Option<Exception> {
        let stack = self.hw.segment(SegmentName::Ss).base;
        let top = stack.wrapping_add(self.hw.gpr(Gpr::Rsp).wrapping_sub(8));
        let accesses = [
            (self.gate(vector_of(event)), Access::Read),
            (Some(Gva(self.hw.gdtr().base)), Access::Read),
            (
                Some(Gva(self.hw.segment(SegmentName::Tr).base)),
                Access::Read,
            ),
            (fault.gva, Access::Write),
            (Some(Gva(top)), Access::Write),
        ];
        let memory = &self.rest.vm.memory;
        accesses.into_iter().find_map(|(at, access)| {
            let wrong = paging.translate(memory, at?, access).err()?;
            Some(Exception::from(wrong))
        })
    }

    /// Whether a vector's gate lies outside RAM and is not one.
    fn is_no_gate(&mut self, paging: &Paging, vector: u8) -> bool {
        let Some(at) = self.gate(vector) else {
            return false;
        };
        let Self { hw, rest, .. } = self;
        let memory = &rest.vm.memory;
        let Ok(gpa) = paging.translate(memory, at, Access::Read) else {
            return false;
        };
        !memory.is_ram(gpa) && rest.mmio_read(hw, gpa + 5, Width::Byte) & CODE_OR_DATA != 0
    }
}

fn vector_of(event: Event) -> u8 {
    const NMI: u8 = 2;
    match event {
        Event::Interrupt(vector)
        | Event::Exception { vector, .. }
        | Event::Software { vector, .. } => vector,
        Event::Nmi => NMI,
    }
}
