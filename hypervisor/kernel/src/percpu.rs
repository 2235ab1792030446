//! Per-processor data, reached through GS in one instruction.
//!
//! A [`PerCpu`] is made once for each processor and lives for ever. Its owner finds it with
//! [`current`]; others find it with [`get`] and may touch atomics only.

use alloc::boxed::Box;
use core::{
    arch::asm,
    ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering},
};

use mem::OutOfFrames;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use crate::{gdt, run::LongWork};

/// Processors that Plinth uses at most.
pub const MAX_CPUS: usize = 64;

/// One processor's data.
#[repr(C)]
pub struct PerCpu {
    /// Address of this value; at GS:0, so that [`current`] is one load.
    this: *const PerCpu,
    /// Processor number, from 0 in order of their start; below [`MAX_CPUS`].
    pub number: usize,
    /// Local APIC ID.
    pub apic_id: u32,
    /// Descriptor tables.
    pub tables: &'static gdt::Tables,
    /// A kick has arrived since this was last cleared, or this processor would have sent one to itself.
    pub kicked: AtomicBool,
    /// The host timer has come due since this was last cleared.
    pub timer_due: AtomicBool,
    /// TSC for which the timer is armed; 0 when it is not.
    pub timer_armed: AtomicU64,
    /// Interrupts taken on vectors that nobody uses.
    pub unexpected: AtomicU64,
    /// Long work that this processor is at.
    pub long_work: LongWork,
}

// SAFETY: `this` is only an address; everything that changes is atomic.
unsafe impl Sync for PerCpu {}
// SAFETY: as above.
unsafe impl Send for PerCpu {}

static CPUS: [AtomicPtr<PerCpu>; MAX_CPUS] = [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CPUS];
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Makes the data of processor `number`, below [`MAX_CPUS`], with its tables and fault stacks. It is not listed yet.
///
/// # Errors
/// No frames for the stacks.
pub fn new(number: usize, apic_id: u32) -> Result<&'static PerCpu, OutOfFrames> {
    assert!(number < MAX_CPUS);
    let mut cpu = Box::new(PerCpu {
        this: ptr::null(),
        number,
        apic_id,
        tables: gdt::Tables::new()?,
        kicked: AtomicBool::new(false),
        timer_due: AtomicBool::new(false),
        timer_armed: AtomicU64::new(0),
        unexpected: AtomicU64::new(0),
        long_work: LongWork::new(),
    });
    cpu.this = &raw const *cpu;
    Ok(Box::leak(cpu))
}

impl PerCpu {
    /// Makes this the calling processor's own. Loads its descriptor tables first, since that resets GS.
    pub fn load(&'static self) {
        self.tables.load();
        let base = VirtAddr::from_ptr(self);
        GsBase::write(base);
        // The kernel never swaps GS; a stray SWAPGS would at least not lose this.
        KernelGsBase::write(base);
    }

    /// Lists the processor as running: others find it from now on.
    pub fn list(&'static self) {
        CPUS[self.number].store(ptr::from_ref(self).cast_mut(), Ordering::Release);
        COUNT.fetch_max(self.number as u32 + 1, Ordering::Release);
    }
}

/// The calling processor's data. Only after its [`PerCpu::load`].
pub fn current() -> &'static PerCpu {
    let this: *const PerCpu;
    // SAFETY: GS points to the loaded `PerCpu`, whose first word is its own address. A guest's GS
    // is never in force while host code runs.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) this, options(nostack, preserves_flags, pure, readonly));
        &*this
    }
}

/// Number of the calling processor, or `None` while none is installed: for fault reports.
pub fn try_number() -> Option<usize> {
    let base = GsBase::read().as_u64();
    CPUS.iter()
        .position(|cpu| base != 0 && cpu.load(Ordering::Acquire) as u64 == base)
}

/// Processor `number`, if it is running.
pub fn get(number: usize) -> Option<&'static PerCpu> {
    let cpu = CPUS.get(number)?.load(Ordering::Acquire);
    // SAFETY: only leaked boxes are listed.
    unsafe { cpu.as_ref() }
}

/// Processors that are running; their numbers are `0..count()`.
pub fn count() -> usize {
    COUNT.load(Ordering::Acquire) as usize
}
