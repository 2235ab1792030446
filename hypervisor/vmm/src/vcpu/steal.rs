//! Steal time: the guest is told how long its vCPU was ready and did not run.
//!
//! Linux' KVM interface (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME): the guest gives the address of 64 bytes of RAM for each
//! vCPU. There the host keeps the time in nanoseconds, a version that is odd while it writes, and whether the vCPU was taken from its
//! processor while it could have gone on, so that others do not spin for a lock that it holds.
//!
//! Written only while the vCPU does not run in guest mode, by the pCPU that has it.

use mem::{Gpa, guest::GuestMemory};

/// MSR: the address is in use.
const ENABLE: u64 = 1 << 0;
/// MSR: bits that the address leaves free.
const RESERVED: u64 = 0x3e;
/// Offset of the version, 32 bits; the time is before it.
const VERSION: u64 = 8;
/// Length of time, version, flags and "preempted".
const USED_BYTES: usize = 20;
/// Offset of the byte that says whether the vCPU was taken from its processor.
const PREEMPTED: u64 = 16;

/// One vCPU's steal time.
#[derive(Debug, Default)]
pub(super) struct StealTime {
    msr: u64,
    version: u32,
    stolen_ns: u64,
    /// The guest is told that the vCPU does not run.
    preempted: bool,
}

impl StealTime {
    /// The MSR, as the guest wrote it.
    pub(super) fn msr(&self) -> u64 {
        self.msr
    }

    /// Whether the guest wants to be told.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.msr & ENABLE != 0
    }

    fn at(&self, offset: u64) -> Gpa {
        Gpa((self.msr & !(ENABLE | RESERVED)) + offset)
    }

    /// The guest writes the MSR. `false`: reserved bits are set, or there is no RAM; nothing has changed then.
    #[must_use]
    pub(super) fn set(&mut self, memory: &GuestMemory, value: u64) -> bool {
        if value & RESERVED != 0 {
            return false;
        }
        let before = self.msr;
        self.msr = value;
        if self.is_on() && !self.write(memory) {
            self.msr = before;
            return false;
        }
        true
    }

    /// Before the vCPU runs: what was stolen up to now.
    pub(super) fn begin_run(&mut self, memory: &GuestMemory, stolen_ns: u64) {
        if stolen_ns != self.stolen_ns || self.preempted {
            self.stolen_ns = stolen_ns;
            self.preempted = false;
            // It was there when the guest enabled it, and RAM does not go away.
            let _still_there = self.write(memory);
        }
    }

    /// The vCPU is taken from its pCPU and could have gone on.
    pub(super) fn end_run(&mut self, memory: &GuestMemory) {
        self.preempted = true;
        let _still_there = memory.write(self.at(PREEMPTED), &[1]);
    }

    /// Writes all of it. `false`: there is no RAM.
    fn write(&mut self, memory: &GuestMemory) -> bool {
        let mut record = [0; USED_BYTES];
        record[..8].copy_from_slice(&self.stolen_ns.to_le_bytes());
        record[8..12].copy_from_slice(&(self.version.wrapping_add(1)).to_le_bytes());
        record[16] = u8::from(self.preempted);
        self.version = self.version.wrapping_add(2);
        memory.write(self.at(0), &record).is_ok()
            && memory
                .write(self.at(VERSION), &self.version.to_le_bytes())
                .is_ok()
    }
}
