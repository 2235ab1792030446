//! What a hypervisor that executes an instruction in the processor's place owes beyond its result.
//!
//! Operands and code lie in the memory of the test device; where there is none, the checks are skipped.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::apic::{self, ASSERT, DELIVER_NMI};
use crate::cpu::{self, Rflags};
use crate::interrupts::{
    self, Frame, KERNEL_DATA, count, end_at_apic, hook, last_interrupt_rip, vector,
};
use crate::machine::{Host, Machine};
use crate::{checks, ensure, ensure_eq, fail, legacy, memory, paging, probe, skip_if};

use super::{Verdict, expect_fault, scratch, trapped};

checks![
    shadow_of_mov_ss,
    step_over_mov_ss,
    steps_by_old_flags,
    resume_flag_of_faults,
    nmi_after_iret,
    call_gate,
    task_switches_by_device,
    page_tables_outside_ram,
];

/// Device memory that keeps what is written.
pub const DEVICE: u64 = 0xff00_0000;
pub const NO_DEVICE: &str = "there is no test device";

pub fn no_device(machine: &Machine) -> bool {
    if machine.host != Host::Plinth {
        return true;
    }
    const PATTERN: u32 = 0x5a3c_96e1;
    memory::write32(DEVICE, PATTERN);
    memory::read32(DEVICE) != PATTERN
}

/// The first places at which #DB came.
static STOPS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static STOP_COUNT: AtomicUsize = AtomicUsize::new(0);

fn watch_stops() {
    STOP_COUNT.store(0, Relaxed);
    hook(vector::DEBUG, |frame: &mut Frame| {
        if let Some(slot) = STOPS.get(STOP_COUNT.fetch_add(1, Relaxed)) {
            slot.store(frame.rip, Relaxed);
        }
    });
}

fn stop(index: usize) -> u64 {
    STOPS.get(index).map_or(0, |stop| stop.load(Relaxed))
}

/// STI holds an interrupt back over MOV SS, and that over the next instruction.
fn shadow_of_mov_ss(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    skip_if!(
        cpu::vendor() != *b"GenuineIntel",
        "QEMU's VMRUN forgets the shadow"
    );
    const VECTOR: u8 = 0x51;
    memory::write32(DEVICE, KERNEL_DATA.into());
    hook(VECTOR, end_at_apic);
    apic::local().send_self(VECTOR);
    let after: u64;
    // SAFETY: the handler only counts; SS gets the value it has.
    unsafe {
        asm!("sti", "mov ss, [{at}]", "nop", "2: nop", "cli", "lea {after}, [rip + 2b]",
            at = in(reg) DEVICE, after = out(reg) after);
    }
    ensure_eq!(count(VECTOR), 1, "interrupts taken");
    ensure_eq!(
        last_interrupt_rip(),
        after,
        "RIP of the interrupt after STI, MOV SS, NOP"
    );
    Ok(())
}

/// The trap of a single step over MOV SS comes behind the next instruction.
fn step_over_mov_ss(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    memory::write32(DEVICE, KERNEL_DATA.into());
    watch_stops();
    let first: u64;
    // SAFETY: the handler only notes; SS gets the value it has.
    unsafe {
        asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "mov ss, [{at}]", "nop", "2: nop",
            "pushfq", "and qword ptr [rsp], -0x101", "popfq", "lea {first}, [rip + 2b]",
            at = in(reg) DEVICE, first = out(reg) first);
    }
    ensure_eq!(stop(0), first, "RIP of the first step");
    ensure_eq!(stop(1), first + 1, "RIP of the second step");
    Ok(())
}

/// POPF that sets TF does not trap, the instruction behind it does; one that clears it does.
fn steps_by_old_flags(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    // popfq; nop; popfq; nop; ret
    memory::write_bytes(DEVICE, &[0x9d, 0x90, 0x9d, 0x90, 0xc3]);
    watch_stops();
    // SAFETY: the handler only notes; the code in the device leaves the stack as it was.
    unsafe {
        asm!("lea {scratch}, [rip + 2f]", "push {scratch}", "pushfq", "pushfq",
            "or qword ptr [rsp], 0x100", "jmp {at}", "2:",
            at = in(reg) DEVICE, scratch = out(reg) _);
    }
    ensure_eq!(STOP_COUNT.load(Relaxed), 2, "single steps");
    ensure_eq!(stop(0), DEVICE + 2, "RIP of the first step");
    ensure_eq!(stop(1), DEVICE + 3, "RIP of the second step");
    Ok(())
}

/// The flags that a fault pushes have RF, those of a trap have not, but between iterations.
fn resume_flag_of_faults(machine: &Machine) -> Verdict {
    static PUSHED: AtomicU64 = AtomicU64::new(0);
    skip_if!(no_device(machine), NO_DEVICE);
    let (_, limit) = interrupts::gdt();
    let beyond = u32::from(limit | 7) + 1;
    memory::write32(DEVICE, beyond);
    // SAFETY: faults.
    let trap = unsafe { probe!("mov es, [{}]"; in(reg) DEVICE) };
    expect_fault(
        trap,
        vector::GENERAL_PROTECTION,
        beyond.into(),
        "a bad selector",
    )?;
    let flags = Rflags::from_bits_truncate(trapped(trap, "a bad selector")?.rflags);
    ensure!(flags.contains(Rflags::RF), "a fault pushes {flags:?}");
    // Of three steps over iterations the first two have iterations left.
    PUSHED.store(0, Relaxed);
    hook(vector::DEBUG, |frame: &mut Frame| {
        let rf = u64::from(frame.rflags & Rflags::RF.bits() != 0);
        PUSHED.store(PUSHED.load(Relaxed) << 1 | rf, Relaxed);
    });
    // SAFETY: the handler only notes; the device keeps what is written.
    unsafe {
        asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "rep stosb",
            "pushfq", "and qword ptr [rsp], -0x101", "popfq",
            inout("rdi") DEVICE => _, inout("rcx") 3_u64 => _, in("al") 0_u8);
    }
    ensure_eq!(
        PUSHED.load(Relaxed),
        0b110_000,
        "RF in the flags of six traps"
    );
    Ok(())
}

global_asm!(
    ".section .text.nmi, \"ax\"",
    "nmi_with_iret_elsewhere:",
    "inc qword ptr [rip + {count}]",
    "jmp [rip + {iret}]",
    ".text",
    count = sym NMIS,
    iret = sym IRET,
);

static NMIS: AtomicU64 = AtomicU64::new(0);
/// Where the NMI handler's IRETQ lies.
static IRET: AtomicU64 = AtomicU64::new(DEVICE);

unsafe extern "C" {
    safe fn nmi_with_iret_elsewhere();
}

/// The IRET that ends an NMI's handler lets the next NMI in, wherever it is executed.
fn nmi_after_iret(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    skip_if!(
        cpu::vendor() == *b"GenuineIntel",
        "Bochs 2.7 blocks NMIs on, whatever a VM entry says"
    );
    memory::write_bytes(DEVICE, &[0x48, 0xcf]);
    NMIS.store(0, Relaxed);
    interrupts::set_raw_handler(vector::NMI, nmi_with_iret_elsewhere);
    let local = apic::local();
    for _ in 0..3 {
        local.command(DELIVER_NMI | ASSERT, local.id());
        for _ in 0..100 {
            cpu::tsc();
        }
    }
    interrupts::restore_handler(vector::NMI);
    ensure_eq!(NMIS.load(Relaxed), 3, "NMIs");
    Ok(())
}

global_asm!(
    ".section .text.gate, \"ax\"",
    "gate_target:",
    "mov eax, 0x6a7e",
    "retfq",
    ".text",
);

unsafe extern "C" {
    static gate_target: u8;
}

/// A far call by a pointer in device memory, through a call gate.
fn call_gate(machine: &Machine) -> Verdict {
    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    skip_if!(no_device(machine), NO_DEVICE);
    let scratch = scratch(machine)?;
    let (base, limit) = interrupts::gdt();
    let gate = u64::from(limit) + 1;
    for (at, descriptor) in (scratch..).step_by(8).zip(interrupts::descriptors()) {
        memory::write64(at, descriptor);
    }
    let target = &raw const gate_target as u64;
    let present_call_gate = 0x8c00_u64 << 32;
    let low = target & 0xffff
        | u64::from(interrupts::KERNEL_CODE) << 16
        | present_call_gate
        | (target >> 16 & 0xffff) << 48;
    memory::write64(scratch + gate, low);
    memory::write64(scratch + gate + 8, target >> 32);
    memory::write64(DEVICE, 0);
    memory::write64(DEVICE + 8, gate);
    let own = Pointer { limit, base };
    let with_gate = Pointer {
        limit: limit + 16,
        base: scratch,
    };
    let result: u64;
    // SAFETY: the table holds the same descriptors, and the old one is put back; the target changes RAX only.
    let trap = unsafe {
        asm!("lgdt [{}]", in(reg) &with_gate, options(nostack));
        let trap = probe!(".byte 0x48, 0xff, 0x1f"; in("rdi") DEVICE, out("rax") result);
        asm!("lgdt [{}]", in(reg) &own, options(nostack));
        trap
    };
    if let Some(trap) = trap {
        fail!("a call through a gate: {trap}");
    }
    ensure_eq!(result, 0x6a7e, "what the gate led to");
    Ok(())
}

fn task_switches_by_device(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    let wrong = legacy::run(legacy::Code::DeviceTasks);
    ensure_eq!(wrong, 0, "what went wrong in task switches");
    Ok(())
}

/// Where no memory is page tables are ones, and so are their reserved bits.
fn page_tables_outside_ram(machine: &Machine) -> Verdict {
    const NOTHING: u64 = 0xfd00_0000;
    skip_if!(machine.host == Host::Tcg, "QEMU itself reads zeros there");
    let address = paging::set_spare(NOTHING | 7) + 0x123;
    // SAFETY: each faults.
    let traps = unsafe {
        [
            (
                0b1001,
                probe!("mov {got}, [{at}]"; at = in(reg) address, got = out(reg) _),
            ),
            (0b1011, probe!("mov [{at}], {at}"; at = in(reg) address)),
        ]
    };
    // SAFETY: only a jump there: faults.
    let fetched = unsafe { probe!("call {}"; in(reg) address) };
    paging::set_spare(0);
    for (code, trap) in traps {
        expect_fault(trap, vector::PAGE_FAULT, code, "a table of ones")?;
        ensure_eq!(trapped(trap, "a table of ones")?.address, address, "CR2");
    }
    let trap = trapped(fetched, "a fetch by a table of ones")?;
    ensure!(
        trap.vector == vector::PAGE_FAULT && trap.error & 0b1001 == 0b1001,
        "a fetch by a table of ones: {trap}"
    );
    Ok(())
}
