//! The other processors: started on request, they run what they are given and halt in between.
//!
//! They share the first processor's page tables and GDT, and have an IDT of their own: their
//! traps come to [`on_trap`], which counts interrupts per processor and parks a processor that
//! meets an exception. A processor is known by its APIC id here, 0 to [`MAX`] - 1.
//!
//! Everything shared is atomic. What runs on another processor touches nothing else of this program.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};

use crate::apic::{self, Register, SPURIOUS_VECTOR};
use crate::checks::{Verdict, Why};
use crate::cpu::{self, msr};
use crate::interrupts::{self, Frame, vector};
use crate::machine::Machine;
use crate::memory;
use crate::time::wait_ms;
use crate::{ensure, skip_if};

/// Most processors that are started.
pub const MAX: usize = 16;
/// Sixteen of them may share one processor of a busy workstation.
pub const PATIENCE_MS: u64 = 30_000;
/// Wakes a processor for its work.
const WAKE: u8 = 0xF1;
/// Interrupts of this vector run what [`set_hook`] says.
pub const HOOKED: u8 = 0xB1;
/// Where the others start, in real mode.
const START_PAGE: u64 = 0x8000;
const STACK_BYTES: usize = 16 * 1024;

#[repr(align(16))]
struct Stacks(UnsafeCell<[[u8; STACK_BYTES]; MAX]>);

// SAFETY: each processor uses its own stack, and nobody refers to another's.
unsafe impl Sync for Stacks {}

static STACKS: Stacks = Stacks(UnsafeCell::new([[0; STACK_BYTES]; MAX]));

global_asm!(
    include_str!("smp.s"),
    max = const MAX,
    stack_bytes = const STACK_BYTES,
    stacks = sym STACKS,
    main = sym main,
);

unsafe extern "C" {
    static smp_start: u8;
    static smp_start_end: u8;
}

/// What a processor does for a check; it is given its number.
pub type Work = fn(usize);

/// What is known of one processor.
pub struct Processor {
    /// How often it has come from its start-up IPI to Rust.
    pub starts: AtomicU32,
    /// APIC_BASE, as it was then.
    pub base: AtomicU64,
    /// Spurious-interrupt register, as it was then.
    pub spurious: AtomicU32,
    /// APIC id register, as it was then.
    pub id: AtomicU32,
    work: AtomicUsize,
    done: AtomicU32,
    asked: AtomicU32,
    /// For checks: anything.
    pub note: AtomicU64,
    /// An exception that it met: vector plus one.
    exception: AtomicU32,
    counts: [AtomicU32; 256],
}

impl Processor {
    const fn new() -> Self {
        Self {
            starts: AtomicU32::new(0),
            base: AtomicU64::new(0),
            spurious: AtomicU32::new(0),
            id: AtomicU32::new(0),
            work: AtomicUsize::new(0),
            done: AtomicU32::new(0),
            asked: AtomicU32::new(0),
            note: AtomicU64::new(0),
            exception: AtomicU32::new(0),
            counts: [const { AtomicU32::new(0) }; 256],
        }
    }

    /// Times that a vector came there since [`reset_counts`].
    pub fn count(&self, index: u8) -> u32 {
        self.counts[usize::from(index)].load(SeqCst)
    }
}

/// All processors, by APIC id. The first one's entry is used for its `note` only.
pub static PROCESSORS: [Processor; MAX] = [const { Processor::new() }; MAX];

static STARTED: AtomicBool = AtomicBool::new(false);
static HOOK: AtomicUsize = AtomicUsize::new(0);

/// Sets what every other processor runs when it gets [`HOOKED`].
pub fn set_hook(hook: Work) {
    HOOK.store(hook as usize, SeqCst);
}

/// Forgets what was counted on all processors.
pub fn reset_counts() {
    for count in PROCESSORS.iter().flat_map(|processor| &processor.counts) {
        count.store(0, SeqCst);
    }
    interrupts::reset_counts();
}

/// This machine's processors but the first, and all of them started.
pub struct Others<'a> {
    machine: &'a Machine,
    ids: [u32; MAX],
    count: usize,
    /// APIC id of the first.
    pub first: usize,
}

/// Starts the others, once, and says which they are.
///
/// # Errors
/// There are none, there are too many, or one does not start.
pub fn others(machine: &Machine) -> Result<Others<'_>, Why> {
    let madt = machine.acpi.and_then(|acpi| acpi.madt).unwrap_or_default();
    skip_if!(madt.processors < 2, "one processor");
    let first = apic::local().id();
    let mut others = Others {
        machine,
        ids: [0; MAX],
        count: 0,
        first: first as usize,
    };
    for &id in madt.ids().iter().filter(|&&id| id != first) {
        ensure!((id as usize) < MAX, "APIC id {id:#x} is too large");
        others.ids[others.count] = id;
        others.count += 1;
    }
    ensure!(others.first < MAX, "APIC id {first:#x} is too large");
    if !STARTED.swap(true, SeqCst) {
        for other in others.numbers() {
            others.start(other)?;
        }
    }
    Ok(others)
}

impl Others<'_> {
    /// Their numbers.
    pub fn numbers(&self) -> impl Iterator<Item = usize> + use<> {
        let (ids, count) = (self.ids, self.count);
        (0..count).map(move |index| ids[index] as usize)
    }

    /// How many they are, without the first.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Waits until the condition holds.
    ///
    /// # Errors
    /// It takes too long, or a processor met an exception.
    pub fn wait(&self, what: &str, condition: impl FnMut() -> bool) -> Verdict {
        let came = wait_ms(self.machine.tsc_hz, PATIENCE_MS, condition);
        for number in self.numbers() {
            let exception = PROCESSORS[number].exception.load(SeqCst);
            ensure!(
                exception == 0,
                "{what}: exception {} on processor {number}",
                exception.wrapping_sub(1)
            );
        }
        ensure!(came, "{what}: not within {PATIENCE_MS} ms");
        Ok(())
    }

    /// INIT, start-up, start-up (SDM vol. 3, 9.4.4.1), and waits until the processor is there.
    ///
    /// # Errors
    /// It does not come.
    pub fn start(&self, number: usize) -> Verdict {
        const INIT: u32 = 5 << 8;
        const START_UP: u32 = 6 << 8;
        const LEVEL: u32 = 1 << 15;
        write_start_page(START_PAGE, None);
        let processor = &PROCESSORS[number];
        let before = processor.starts.load(SeqCst);
        let (local, id) = (apic::local(), number as u32);
        local.command(INIT | LEVEL | apic::ASSERT, id);
        local.command(INIT | LEVEL, id);
        crate::time::spin_us(self.machine.tsc_hz, 200);
        for _ in 0..2 {
            local.command(START_UP | apic::ASSERT | (START_PAGE >> 12) as u32, id);
            crate::time::spin_us(self.machine.tsc_hz, 200);
        }
        let started = || processor.starts.load(SeqCst) != before;
        let came = wait_ms(self.machine.tsc_hz, PATIENCE_MS, started);
        ensure!(came, "processor {number} does not start");
        Ok(())
    }

    /// Gives work to one processor; [`Others::join`] waits for it.
    pub fn give(&self, number: usize, work: Work) {
        let processor = &PROCESSORS[number];
        processor.asked.fetch_add(1, SeqCst);
        processor.work.store(work as usize, SeqCst);
        apic::local().command(apic::ASSERT | u32::from(WAKE), number as u32);
    }

    /// Waits until all have done what they were given.
    ///
    /// # Errors
    /// One has not.
    pub fn join(&self) -> Verdict {
        self.wait("work of the others", || {
            self.numbers().all(|number| {
                let processor = &PROCESSORS[number];
                processor.done.load(SeqCst) == processor.asked.load(SeqCst)
            })
        })
    }

    /// Gives all the others the same work, and waits for it.
    ///
    /// # Errors
    /// One has not done it.
    pub fn run(&self, work: Work) -> Verdict {
        self.begin(work);
        self.join()
    }

    /// Gives all the others the same work.
    pub fn begin(&self, work: Work) {
        for number in self.numbers() {
            self.give(number, work);
        }
    }

    /// Stops a processor by INIT and starts it anew; whatever it was given is forgotten.
    ///
    /// # Errors
    /// It does not come.
    pub fn restart(&self, number: usize) -> Verdict {
        let processor = &PROCESSORS[number];
        processor.work.store(0, SeqCst);
        self.start(number)?;
        processor.done.store(0, SeqCst);
        processor.asked.store(0, SeqCst);
        Ok(())
    }

    /// Brings the local APICs of all processors to x2APIC mode, or back to xAPIC mode.
    ///
    /// Nobody may be sent an interrupt meanwhile, and nobody takes one: those who come first wait with
    /// interrupts off.
    ///
    /// # Errors
    /// One does not come.
    pub fn switch_apics(&self, x2apic: bool) -> Verdict {
        fn switch(_: usize) {
            cpu::cli();
            apic::set_mode(TO_X2APIC.load(SeqCst));
            SWITCHED.fetch_add(1, SeqCst);
            while !GO_ON.load(SeqCst) {
                spin_loop();
            }
            apic::local().quiet();
        }
        static TO_X2APIC: AtomicBool = AtomicBool::new(false);
        static SWITCHED: AtomicUsize = AtomicUsize::new(0);
        static GO_ON: AtomicBool = AtomicBool::new(false);
        TO_X2APIC.store(x2apic, SeqCst);
        SWITCHED.store(0, SeqCst);
        GO_ON.store(false, SeqCst);
        self.begin(switch);
        self.wait("the others' local APICs", || {
            SWITCHED.load(SeqCst) == self.count
        })?;
        if x2apic {
            apic::local().enter_x2apic();
        } else {
            apic::local().enter_xapic();
        }
        apic::local().quiet();
        GO_ON.store(true, SeqCst);
        self.join()
    }
}

/// Puts the start-up code into a page below 1 MiB, with this processor's control registers. `target`: where it goes on
/// in 64-bit code, without a stack; `None`: where the others begin.
pub fn write_start_page(page: u64, target: Option<u64>) {
    /// From the end of the code to the target of its far jump.
    const TARGET: u64 = 6;
    let start = &raw const smp_start;
    let length = (&raw const smp_start_end) as usize - start as usize;
    // SAFETY: the symbols enclose bytes of this image.
    let code = unsafe { core::slice::from_raw_parts(start, length) };
    memory::write_bytes(page, code);
    if let Some(target) = target {
        memory::write_bytes(
            page + length as u64 - TARGET,
            &(target as u32).to_le_bytes(),
        );
    }
    const LONG_MODE_ACTIVE: u64 = 1 << 10;
    let efer = cpu::rdmsr(msr::EFER) & !LONG_MODE_ACTIVE;
    for (offset, value) in [
        (0xF00, cpu::cr4()),
        (0xF04, cpu::cr3()),
        (0xF08, efer),
        (0xF0C, cpu::cr0()),
    ] {
        memory::write_bytes(page + offset, &(value as u32).to_le_bytes());
    }
    let (base, limit) = interrupts::gdt();
    memory::write_bytes(page + 0xF10, &limit.to_le_bytes());
    memory::write_bytes(page + 0xF12, &(base as u32).to_le_bytes());
}

/// Whether a stack address belongs to another processor than the first.
pub fn number_by_stack(address: u64) -> Option<usize> {
    let number = address.checked_sub(STACKS.0.get() as u64)? as usize / STACK_BYTES;
    (number < MAX).then_some(number)
}

/// Where the others enter Rust, in long mode, interrupts off.
extern "C" fn main(number: usize) -> ! {
    let processor = &PROCESSORS[number];
    interrupts::load_for_others();
    let local = apic::local();
    processor.base.store(cpu::rdmsr(msr::APIC_BASE), SeqCst);
    // After INIT the mode is what it was.
    processor
        .spurious
        .store(local.read(Register::Spurious), SeqCst);
    processor.id.store(local.id(), SeqCst);
    local.quiet();
    processor.exception.store(0, SeqCst);
    processor.starts.fetch_add(1, SeqCst);
    loop {
        cpu::cli();
        let work = processor.work.swap(0, SeqCst);
        if work == 0 {
            cpu::wait_for_interrupt();
            continue;
        }
        // SAFETY: only `give` stores here, and only values of this type.
        let work: Work = unsafe { core::mem::transmute::<usize, Work>(work) };
        cpu::sti();
        work(number);
        processor.done.fetch_add(1, SeqCst);
    }
}

/// An interrupt or exception on another processor.
pub fn on_trap(number: usize, frame: &Frame) {
    let processor = &PROCESSORS[number];
    let index = frame.vector as u8;
    processor.counts[usize::from(index)].fetch_add(1, SeqCst);
    match index {
        SPURIOUS_VECTOR | vector::NMI => {}
        vector::FIRST_INTERRUPT.. => {
            if index == HOOKED {
                let hook = HOOK.load(SeqCst);
                if hook != 0 {
                    // SAFETY: only `set_hook` stores here, and only values of this type.
                    let hook: Work = unsafe { core::mem::transmute::<usize, Work>(hook) };
                    hook(number);
                }
            }
            apic::local().end_of_interrupt();
        }
        _ => {
            processor.exception.store(u32::from(index) + 1, SeqCst);
            cpu::halt_forever();
        }
    }
}
