//! Processor-wide settings and the two instructions that stop a processor.

use raw_cpuid::{CpuId, CpuIdReaderNative};
use x86_64::registers::{
    control::{Cr0, Cr0Flags, Cr4, Cr4Flags},
    model_specific::{Efer, EferFlags, Msr},
};

/// IA32_PAT.
const PAT: u32 = 0x277;
/// The PAT of a reset (SDM vol. 3A, table 13-12), but for entry 1, which pages marked "write-through" use:
/// it is write-combining, for the frame buffer. Entry 3 (write-through and cache-disable) stays uncached.
const PAT_VALUE: u64 = 0x0007_0406_0007_0106;

/// CPUID of the calling processor.
pub fn cpuid() -> CpuId<CpuIdReaderNative> {
    CpuId::with_cpuid_reader(CpuIdReaderNative)
}

/// Turns the processor's own protections on: write protection also for the kernel, no-execute,
/// and SMEP, SMAP and UMIP where they are there (SDM vol. 3A, section 2.5). Also makes CR0 the same on all
/// processors, whatever firmware left: caches on (Bochs 2.7's firmware leaves them off), native x87 errors,
/// no emulation.
pub fn protect() {
    let cpuid = cpuid();
    let extended = cpuid.get_extended_feature_info();
    let mut cr4 = Cr4::read();
    // A machine check is reported instead of resetting the machine.
    let machine_check = cpuid.get_feature_info().is_some_and(|f| f.has_mce());
    cr4.set(Cr4Flags::MACHINE_CHECK_EXCEPTION, machine_check);
    if let Some(features) = extended {
        cr4.set(
            Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION,
            features.has_smep(),
        );
        cr4.set(
            Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION,
            features.has_smap(),
        );
        cr4.set(
            Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION,
            features.has_umip(),
        );
    }
    // SAFETY: no page is mapped for user mode, so SMEP, SMAP and UMIP take nothing away from the
    // kernel; with write protection only writes to read-only pages fault, and the kernel makes none; machine
    // checks have a handler by the time that anything is worth reporting.
    unsafe {
        Efer::update(|efer| efer.insert(EferFlags::NO_EXECUTE_ENABLE));
        Cr0::update(|cr0| {
            cr0.insert(
                Cr0Flags::WRITE_PROTECT | Cr0Flags::NUMERIC_ERROR | Cr0Flags::MONITOR_COPROCESSOR,
            );
            cr0.remove(
                Cr0Flags::CACHE_DISABLE
                    | Cr0Flags::NOT_WRITE_THROUGH
                    | Cr0Flags::EMULATE_COPROCESSOR
                    | Cr0Flags::TASK_SWITCHED,
            );
        });
        Cr4::write(cr4);
    }
    // SAFETY: every 64-bit processor has a PAT, and no page is marked write-through alone before this.
    unsafe { Msr::new(PAT).write(PAT_VALUE) };
}

/// Stops the calling processor for good.
pub fn halt_forever() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}
