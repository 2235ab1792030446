//! IA32_SPEC_CTRL: what a guest may set of it, and what the host needs set.
//!
//! Unsafe: reads and writes the register, where CPUID has it.

use super::{msr, rdmsr, wrmsr};

/// IA32_SPEC_CTRL, which guests reach by exits only: the value is checked before it is written.
#[derive(Clone, Copy, Debug)]
pub struct GuestSpecCtrl {
    /// Bits that this processor has; 0: it has no such register.
    supported: u64,
    guest: u64,
    host: u64,
    /// Bits that stay set in the register, whatever the guest's value.
    floor: u64,
}

impl GuestSpecCtrl {
    const IBRS: u64 = 1 << 0;
    const STIBP: u64 = 1 << 1;
    const SSBD: u64 = 1 << 2;

    /// Reads CPUID; the guest's value is 0. `ibrs_always`: IBRS is enhanced, and protects the host
    /// from its guests only while it is set.
    pub fn detect(ibrs_always: bool) -> Self {
        let cpuid = raw_cpuid::CpuId::new();
        let vendor = cpuid.get_vendor_info();
        let amd = vendor
            .as_ref()
            .is_some_and(|v| matches!(v.as_str(), "AuthenticAMD" | "HygonGenuine"));
        let mut supported = 0;
        let mut add = |present: bool, bit| {
            if present {
                supported |= bit;
            }
        };
        if amd {
            // APM vol. 3, Fn8000_0008_EBX: IBRS, STIBP, SSBD in bits 14, 15, 24.
            if core::arch::x86_64::__cpuid(0x8000_0000).eax >= 0x8000_0008 {
                let ebx = core::arch::x86_64::__cpuid(0x8000_0008).ebx;
                add(ebx & (1 << 14) != 0, Self::IBRS);
                add(ebx & (1 << 15) != 0, Self::STIBP);
                add(ebx & (1 << 24) != 0, Self::SSBD);
            }
        } else if core::arch::x86_64::__cpuid(0).eax >= 7 {
            // SDM vol. 2A, CPUID leaf 7, EDX: IBRS and IBPB, STIBP, SSBD in bits 26, 27, 31.
            let edx = core::arch::x86_64::__cpuid_count(7, 0).edx;
            add(edx & (1 << 26) != 0, Self::IBRS);
            add(edx & (1 << 27) != 0, Self::STIBP);
            add(edx & (1 << 31) != 0, Self::SSBD);
        }
        GuestSpecCtrl {
            supported,
            guest: 0,
            host: 0,
            floor: if ibrs_always { Self::IBRS } else { 0 },
        }
    }

    /// What the register holds while the guest runs.
    const fn in_force(&self) -> u64 {
        self.guest | self.floor
    }

    /// The guest's value; `None` where the processor has no such register.
    pub const fn get(&self) -> Option<u64> {
        if self.supported == 0 {
            None
        } else {
            Some(self.guest)
        }
    }

    /// Sets the guest's value; while `loaded`, also the register. `false`: not there, or a bit that the processor lacks.
    pub fn set(&mut self, value: u64, loaded: bool) -> bool {
        if self.supported == 0 || value & !self.supported != 0 {
            return false;
        }
        self.guest = value;
        if loaded {
            // SAFETY: CPUID reports the register, and the value has only bits that it reports.
            unsafe { wrmsr(msr::SPEC_CTRL, self.in_force()) };
        }
        true
    }

    /// Keeps the host's value and writes the guest's.
    pub fn load(&mut self) {
        if self.supported != 0 {
            // SAFETY: CPUID reports the register.
            self.host = unsafe { rdmsr(msr::SPEC_CTRL) };
            if self.host != self.in_force() {
                // SAFETY: CPUID reports the register, and `set` checked the value.
                unsafe { wrmsr(msr::SPEC_CTRL, self.in_force()) };
            }
        }
    }

    /// Writes the host's value back.
    pub fn unload(&self) {
        if self.supported != 0 && self.host != self.in_force() {
            // SAFETY: the value was read from this register by `load`.
            unsafe { wrmsr(msr::SPEC_CTRL, self.host) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spec_ctrl_refuses_absent_bits() {
        let mut none = GuestSpecCtrl {
            supported: 0,
            guest: 0,
            host: 0,
            floor: 0,
        };
        assert!(none.get().is_none() && !none.set(0, false));
        let mut ibrs = GuestSpecCtrl {
            supported: 1,
            guest: 0,
            host: 0,
            floor: 1,
        };
        assert_eq!((ibrs.get(), ibrs.in_force()), (Some(0), 1));
        assert!(ibrs.set(1, false) && !ibrs.set(4, false));
        assert_eq!(ibrs.get(), Some(1));
    }
}
