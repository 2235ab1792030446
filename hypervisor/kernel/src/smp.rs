//! Starts the other processors, one after the other, and brings each to its loop.
//!
//! A processor that was sent the start-up messages begins in real mode, in a page below 640 KiB that
//! holds [`TRAMPOLINE`]. With page tables of its own, below 4 GiB, it goes straight to long mode, then to
//! the kernel's page tables and [`ap_main`]. One that does not arrive in time is put back
//! to sleep, named, and left out.

use core::{
    arch::{global_asm, naked_asm},
    ptr,
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
};

use drivers::firmware::Firmware;
use mem::{HostMemory, Hpa, PAGE_SIZE};
use x86_64::registers::control::Cr3;

use crate::{
    boot, cpu, debug, idt, interrupts, memory,
    percpu::{self, MAX_CPUS, PerCpu},
    time, warn,
};

/// Bytes of stack of each processor but the first.
const STACK_BYTES: u64 = 128 * 1024;
/// Time for a processor to arrive after its start-up message.
const PATIENCE_US: u64 = 500_000;
/// Time between INIT and the start-up message (SDM vol. 3A, section 9.4.4.1).
const INIT_WAIT_US: u64 = 10_000;
/// Time after which a processor that is not on its way gets the second start-up message.
const STARTUP_WAIT_US: u64 = 300;

/// Frames of real-mode memory: code, and page tables of four levels down to 2 MiB pages.
const LOW_FRAMES: u64 = 4;
/// Present, writable (tables).
const TABLE: u64 = 0b11;
/// Present, 2 MiB, read-only, executable: the page that the code runs in until it leaves for the kernel.
const CODE_PAGE: u64 = 0b1000_0001;

// Real-mode code, at offset 0 of a page. It takes what it needs from the words at its end.
global_asm!(
    ".pushsection .rodata.trampoline, \"a\"",
    ".balign 8",
    "trampoline_start:",
    ".code16",
    "cli",
    "cld",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl trampoline_gdtr - trampoline_start",
    "movl $0x20, %eax", // CR4.PAE
    "movl %eax, %cr4",
    "movl trampoline_tables - trampoline_start, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx", // EFER: NXE, LME
    "xorl %edx, %edx",
    "movl $0x900, %eax",
    "wrmsr",
    "movl $0x80010033, %eax", // CR0: PG, WP, NE, ET, MP, PE
    "movl %eax, %cr0",
    "ljmpl *(trampoline_far - trampoline_start)",
    ".code64",
    "trampoline_long:",
    "movl $0x10, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movq trampoline_cr3(%rip), %rax",
    "movq trampoline_stack(%rip), %rdx",
    "movq trampoline_cpu(%rip), %rdi",
    "movq trampoline_entry(%rip), %rcx",
    "jmpq *%rcx",
    ".balign 8",
    "trampoline_gdt:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "trampoline_gdtr:",
    ".word 23",
    ".long 0",
    "trampoline_far:",
    ".long 0",
    ".word 8",
    ".balign 8",
    "trampoline_tables: .quad 0",
    "trampoline_cr3: .quad 0",
    "trampoline_stack: .quad 0",
    "trampoline_cpu: .quad 0",
    "trampoline_entry: .quad 0",
    "trampoline_end:",
    ".popsection",
    options(att_syntax),
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_long: u8;
    static trampoline_gdt: u8;
    static trampoline_gdtr: u8;
    static trampoline_far: u8;
    static trampoline_tables: u8;
    static trampoline_cr3: u8;
    static trampoline_stack: u8;
    static trampoline_cpu: u8;
    static trampoline_entry: u8;
    static trampoline_end: u8;
}

/// How far the processor that is being started has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    /// Not seen yet.
    Sent,
    /// It runs kernel code.
    Arrived,
    /// It is asked for its TSC.
    Asked,
    /// It has written its TSC to [`THEIR_TSC`].
    Answered,
}

static STAGE: AtomicU8 = AtomicU8::new(Stage::Sent as u8);
static THEIR_TSC: AtomicU64 = AtomicU64::new(0);

fn at(stage: Stage) -> bool {
    STAGE.load(Ordering::SeqCst) == stage as u8
}

fn go(stage: Stage) {
    STAGE.store(stage as u8, Ordering::SeqCst);
}

/// What starting the processors came to.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Processors that run, this one included.
    pub online: usize,
    /// Processors that the firmware lists as usable, this one included.
    pub listed: usize,
}

/// Offset of a label in the trampoline.
fn offset(label: *const u8) -> u64 {
    label as u64 - (&raw const trampoline_start) as u64
}

/// The start-up page with its page tables.
struct Trampoline {
    page: Hpa,
}

impl Trampoline {
    /// Puts code and page tables into low memory. `None`: the firmware left none free.
    fn new() -> Option<Self> {
        let page = memory::take_real_mode(LOW_FRAMES).ok()?;
        let tables = [1, 2, 3].map(|frame| page + frame * PAGE_SIZE);
        let [root, level3, level2] = tables;
        // The upper half as in the kernel's tables, the lower half only the page itself.
        let (kernel_root, _) = Cr3::read();
        let kernel_root =
            (memory::window_offset() + kernel_root.start_address().as_u64()) as *const u64;
        for entry in 256..512 {
            // SAFETY: the window shows the kernel's root table, which has 512 entries.
            let value = unsafe { kernel_root.add(entry).read_volatile() };
            memory::HOST.write_u64(root + 8 * entry as u64, value);
        }
        memory::HOST.write_u64(root, level3.as_u64() | TABLE);
        memory::HOST.write_u64(level3, level2.as_u64() | TABLE);
        memory::HOST.write_u64(level2, CODE_PAGE);
        let length = offset(&raw const trampoline_end) as usize;
        // SAFETY: the labels enclose the code, which is part of the image's constants.
        let code = unsafe { core::slice::from_raw_parts(&raw const trampoline_start, length) };
        memory::HOST.write(page, code);
        let trampoline = Trampoline { page };
        let at = page.as_u64() as u32;
        let linear = |label| at + offset(label) as u32;
        let gdtr_base = offset(&raw const trampoline_gdtr) + 2;
        memory::HOST.write(
            page + gdtr_base,
            &linear(&raw const trampoline_gdt).to_le_bytes(),
        );
        let far = offset(&raw const trampoline_far);
        memory::HOST.write(
            page + far,
            &linear(&raw const trampoline_long).to_le_bytes(),
        );
        trampoline.set(&raw const trampoline_tables, root.as_u64());
        trampoline.set(
            &raw const trampoline_cr3,
            Cr3::read().0.start_address().as_u64(),
        );
        trampoline.set(&raw const trampoline_entry, ap_entry as *const () as u64);
        Some(trampoline)
    }

    fn set(&self, label: *const u8, value: u64) {
        memory::HOST.write_u64(self.page + offset(label), value);
    }

    /// Number of the page, as the start-up message carries it.
    fn number(&self) -> u8 {
        (self.page.as_u64() / PAGE_SIZE) as u8
    }
}

/// Spins for `us` microseconds, or until `done`. Returns whether it was done.
fn wait(us: u64, mut done: impl FnMut() -> bool) -> bool {
    let start = time::now_tsc();
    let ticks = time::us_to_ticks(us);
    loop {
        if done() {
            return true;
        }
        if time::now_tsc().wrapping_sub(start) >= ticks {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Starts all usable processors. Each goes on in `ap_main`.
pub fn start(firmware: &Firmware) -> Outcome {
    let own = interrupts::apic().id();
    let others = firmware
        .processors
        .iter()
        .filter(|p| p.enabled && p.apic_id != own);
    let mut outcome = Outcome {
        online: 1,
        listed: 1 + others.clone().count(),
    };
    if outcome.listed == 1 {
        return outcome;
    }
    let Some(trampoline) = Trampoline::new() else {
        warn!("no memory below 640 KiB is free: only one processor is used");
        return outcome;
    };
    for processor in others {
        if outcome.online == MAX_CPUS {
            warn!("only the first {MAX_CPUS} processors are used");
            break;
        }
        if !interrupts::apic().is_x2apic() && processor.apic_id >= 255 {
            warn!(
                "processor with APIC ID {} needs x2APIC mode and is left out",
                processor.apic_id
            );
            continue;
        }
        let made = percpu::new(outcome.online, processor.apic_id)
            .and_then(|cpu| Ok((cpu, memory::new_stack(STACK_BYTES)?)));
        let Ok((cpu, stack)) = made else {
            warn!("no memory left for more processors");
            break;
        };
        if start_one(&trampoline, cpu, stack) {
            outcome.online += 1;
        } else {
            warn!(
                "processor with APIC ID {} did not start within {} ms and is left out",
                processor.apic_id,
                PATIENCE_US / 1000
            );
        }
    }
    outcome
}

fn start_one(trampoline: &Trampoline, cpu: &'static PerCpu, stack: u64) -> bool {
    trampoline.set(&raw const trampoline_stack, stack);
    trampoline.set(&raw const trampoline_cpu, ptr::from_ref(cpu) as u64);
    go(Stage::Sent);
    let apic = interrupts::apic();
    apic.send_init(cpu.apic_id);
    wait(INIT_WAIT_US, || false);
    apic.send_startup(cpu.apic_id, trampoline.number());
    let mut online = wait(STARTUP_WAIT_US, || at(Stage::Arrived));
    if !online {
        apic.send_startup(cpu.apic_id, trampoline.number());
        online = wait(PATIENCE_US, || at(Stage::Arrived));
    }
    if online {
        let before = time::now_tsc();
        go(Stage::Asked);
        // It lists itself once it is ready for work; the next one's number depends on that.
        online = wait(PATIENCE_US, || at(Stage::Answered));
        let after = time::now_tsc();
        if online {
            check_skew(cpu, before, THEIR_TSC.load(Ordering::SeqCst), after);
        }
        online = online && wait(PATIENCE_US, || percpu::get(cpu.number).is_some());
    }
    if !online {
        // It must not wake up later, on a stack that is another's by then.
        apic.send_init(cpu.apic_id);
        return false;
    }
    debug!(
        "processor {} is online, APIC ID {}",
        cpu.number, cpu.apic_id
    );
    true
}

/// The other processor read its TSC between the moments when this one read `before` and `after`.
fn check_skew(cpu: &PerCpu, before: u64, theirs: u64, after: u64) {
    let skew = if theirs < before {
        before - theirs
    } else {
        theirs.saturating_sub(after)
    };
    if skew > 0 {
        time::note_skew();
        warn!(
            "the time-stamp counter of processor {} is off by at least {skew} ticks: guests' clocks may jump",
            cpu.number
        );
    }
}

/// First code of the kernel on another processor: page tables and stack, then Rust.
///
/// # Safety
/// Only the trampoline may go here: RAX holds CR3, RDX the stack's top, RDI the `PerCpu`.
#[unsafe(naked)]
unsafe extern "C" fn ap_entry() {
    naked_asm!(
        "mov cr3, rax",
        "mov rsp, rdx",
        "xor ebp, ebp",
        "push 0",
        "jmp {main}",
        main = sym ap_main,
    )
}

extern "C" fn ap_main(cpu: &'static PerCpu) -> ! {
    go(Stage::Arrived);
    while !at(Stage::Asked) {
        core::hint::spin_loop();
    }
    THEIR_TSC.store(time::now_tsc(), Ordering::SeqCst);
    go(Stage::Answered);
    cpu::protect();
    cpu.load();
    idt::load();
    interrupts::apic().enable(interrupts::vector::SPURIOUS);
    interrupts::init_timer();
    cpu.list();
    boot::cpu_loop(cpu)
}
