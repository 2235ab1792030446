//! Instructions that are the VMM's to carry out, met where the processor did not exit for them: in device memory.

use virt::{Gpr, VirtualCpu};

use super::{Activity, Next, Vcpu};
use crate::{
    emulate::{Exception, Service},
    msr::number,
};

impl<V: VirtualCpu> Vcpu<V> {
    /// Does what such an instruction of `length` bytes asks for.
    #[cold]
    #[inline(never)]
    pub(super) fn serve(&mut self, service: Service, length: u8) -> Next {
        match service {
            Service::Cpuid => self.cpuid(),
            Service::Hypercall => self.hypercall(),
            Service::Halt => {
                if self.finish_instruction(Some(length), 0) == Next::Enter {
                    self.activity = Activity::Halted;
                }
                return Next::Check;
            }
            Service::ReadMsr => match self.read_msr(self.hw.gpr(Gpr::Rcx) as u32) {
                Some(value) => self.set_edx_eax(value),
                None => return self.refuse(Exception::GENERAL_PROTECTION),
            },
            Service::WriteMsr => {
                let msr = self.hw.gpr(Gpr::Rcx) as u32;
                if let Err(exception) = self.write_msr(msr, self.edx_eax()) {
                    return self.refuse(exception);
                }
            }
            Service::ReadTsc { aux } => {
                let aux = match aux.then(|| self.read_msr(number::TSC_AUX)) {
                    Some(None) => return self.refuse(Exception::UNDEFINED_OPCODE),
                    other => other.flatten(),
                };
                let tsc = self.read_msr(number::TSC).unwrap_or(0);
                self.set_edx_eax(tsc);
                if let Some(aux) = aux {
                    self.hw.set_gpr(Gpr::Rcx, aux & 0xffff_ffff);
                }
            }
            Service::SetXcr => {
                if let Err(exception) = self.write_xcr() {
                    return self.refuse(exception);
                }
            }
        }
        self.finish_instruction(Some(length), 0);
        Next::Check
    }

    fn refuse(&mut self, exception: Exception) -> Next {
        self.raise(exception);
        Next::Check
    }

    fn set_edx_eax(&mut self, value: u64) {
        self.hw.set_gpr(Gpr::Rax, value & 0xffff_ffff);
        self.hw.set_gpr(Gpr::Rdx, value >> 32);
    }
}
