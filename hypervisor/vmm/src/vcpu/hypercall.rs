//! Hypercalls: those of Linux' KVM interface that Plinth has.
//!
//! The number is in RAX, arguments in RBX, RCX, RDX and RSI, the result comes back in RAX
//! (Linux, Documentation/virt/kvm/x86/hypercalls.rst). There is one: interrupts to several processors
//! at once, which takes an exit each otherwise.

use devices::lapic::{DeliveryMode, Destination, Message, Trigger};
use virt::{CpuMode, Gpr, VirtualCpu};

use super::Vcpu;

/// Number of the hypercall that sends interrupts (Linux uapi kvm_para.h, KVM_HC_SEND_IPI).
const SEND_IPI: u64 = 10;
/// There is no such hypercall (KVM_ENOSYS).
const UNKNOWN: u64 = 1000u64.wrapping_neg();
/// Not from ring 3 (KVM_EPERM).
const NOT_PERMITTED: u64 = 1u64.wrapping_neg();
/// An argument is no good (KVM_EINVAL).
const INVALID: u64 = 22u64.wrapping_neg();

impl<V: VirtualCpu> Vcpu<V> {
    /// Carries a hypercall out, and leaves its result in RAX.
    #[inline(always)]
    pub(super) fn hypercall(&mut self) {
        let result = match self.hw.gpr(Gpr::Rax) {
            SEND_IPI => self.send_ipis(),
            _ => UNKNOWN,
        };
        self.hw.set_gpr(Gpr::Rax, result);
    }

    /// RBX and RCX: a bit for each processor, RDX the APIC ID of the first; RSI: as in the interrupt
    /// command register, fixed or NMI. The result is the number of those that took it.
    fn send_ipis(&mut self) -> u64 {
        if self.hw.cpl() != 0 {
            return NOT_PERMITTED;
        }
        let wide = self.hw.mode() == CpuMode::Long64;
        let (mask, shift) = if wide {
            (u64::MAX, 64)
        } else {
            (0xffff_ffff, 32)
        };
        let argument = |gpr| self.hw.gpr(gpr) & mask;
        let mut bits = u128::from(argument(Gpr::Rbx)) | u128::from(argument(Gpr::Rcx)) << shift;
        let (first, command) = (argument(Gpr::Rdx), argument(Gpr::Rsi));
        let mode = DeliveryMode::from_bits((command >> 8) as u8);
        if !matches!(mode, DeliveryMode::Fixed | DeliveryMode::Nmi) {
            return INVALID;
        }
        let mut taken = 0;
        while bits != 0 {
            let bit = u64::from(bits.trailing_zeros());
            bits &= bits - 1;
            let Some(id) = first.checked_add(bit).and_then(|id| u32::try_from(id).ok()) else {
                continue;
            };
            let message = Message {
                destination: Destination::Physical(id),
                mode,
                vector: command as u8,
                trigger: Trigger::Edge,
                assert: true,
            };
            taken += u64::from(self.rest.vm.apic_bus.send(&message, Some(self.rest.id)));
        }
        taken
    }
}
