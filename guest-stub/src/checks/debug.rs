//! Single steps, breakpoints and INT1 next to the shadows of MOV SS and STI, as public test suites look at them.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::apic::{self, Register};
use crate::cpu::{self, Cr4};
use crate::interrupts::{Frame, KERNEL_DATA, count, end_at_apic, hook, vector};
use crate::machine::{Host, Machine};
use crate::{checks, ensure_eq, probe, skip_if};

use super::{Verdict, expect_fault};

checks![
    old_names,
    status_stays,
    int1,
    int1_after_mov_ss,
    access_after_mov_ss,
    halt_after_sti,
    watched_mov_ss,
];

/// DR6 without any cause.
const NONE: u64 = 0xffff_0ff0;
const STEP: u64 = NONE | 1 << 14;
const ACCESS: u64 = NONE | 1 << 13;
/// DR7 without any breakpoint.
const OFF: u64 = 0x400;
const NO_INT1: &str = "QEMU's processor has no INT1";

struct Stop {
    rip: AtomicU64,
    dr6: AtomicU64,
}

static STOPS: [Stop; 8] = [const {
    Stop {
        rip: AtomicU64::new(0),
        dr6: AtomicU64::new(0),
    }
}; 8];
static STOP_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Notes where each #DB comes and why; DR6 is as it was without any cause then.
fn watch() {
    STOP_COUNT.store(0, Relaxed);
    // SAFETY: only status bits.
    unsafe { cpu::set_dr6(NONE) };
    hook(vector::DEBUG, |frame: &mut Frame| {
        if let Some(stop) = STOPS.get(STOP_COUNT.fetch_add(1, Relaxed)) {
            stop.rip.store(frame.rip, Relaxed);
            stop.dr6.store(cpu::dr6(), Relaxed);
        }
        // SAFETY: only status bits.
        unsafe { cpu::set_dr6(NONE) };
    });
}

/// The stops must have been these: distances from `first`, and DR6.
fn expect_stops(first: u64, wanted: &[(u64, u64)]) -> Verdict {
    for (index, (stop, &(offset, dr6))) in STOPS.iter().zip(wanted).enumerate() {
        let distance = stop.rip.load(Relaxed).wrapping_sub(first);
        ensure_eq!(distance, offset, "place of stop {index}");
        ensure_eq!(stop.dr6.load(Relaxed), dr6, "DR6 at stop {index}");
    }
    ensure_eq!(STOP_COUNT.load(Relaxed), wanted.len(), "number of stops");
    Ok(())
}

/// Whether the processor is QEMU's, itself or beneath a hypervisor.
fn is_qemu(machine: &Machine) -> bool {
    machine.host == Host::Tcg || cpu::vendor() != *b"GenuineIntel"
}

/// DR4 and DR5 are DR6 and DR7, unless CR4.DE is set.
fn old_names(_: &Machine) -> Verdict {
    let cr4 = cpu::cr4();
    let got: u64;
    // SAFETY: DE matters for breakpoints on ports only, and there are none.
    unsafe { cpu::set_cr4(cr4 & !Cr4::DE.bits()) };
    // SAFETY: only status bits.
    unsafe { cpu::set_dr6(STEP | 2) };
    // SAFETY: reads a register: mov rax, dr4.
    let trap = unsafe { probe!(".byte 0x0f, 0x21, 0xe0"; out("rax") got) };
    // SAFETY: as above.
    unsafe { cpu::set_cr4(cr4 | Cr4::DE.bits()) };
    // SAFETY: faults.
    let fault = unsafe { probe!(".byte 0x0f, 0x21, 0xe0"; out("rax") _) };
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cr4) };
    // SAFETY: only status bits.
    unsafe { cpu::set_dr6(NONE) };
    crate::ensure!(trap.is_none(), "DR4 without DE traps");
    ensure_eq!(got, STEP | 2, "DR4");
    expect_fault(fault, vector::INVALID_OPCODE, 0, "DR4 with DE")
}

/// A breakpoint leaves DR6.BS as it is.
fn status_stays(_: &Machine) -> Verdict {
    /// G0, break on writes, four bytes.
    const WRITES: u64 = 0x402 | 0b1101 << 16;
    let mut word = 0_u64;
    for before in [NONE, STEP] {
        watch();
        let after: u64;
        // SAFETY: the handler only notes; writes a local.
        unsafe {
            cpu::set_dr6(before);
            asm!("mov dr0, {at}", "mov dr7, {on}", "mov dword ptr [{at}], 1", "2: mov dr7, {off}",
                "lea {after}, [rip + 2b]",
                at = in(reg) &raw mut word, on = in(reg) WRITES, off = in(reg) OFF, after = out(reg) after);
        }
        expect_stops(after, &[(0, before | 1)])?;
    }
    Ok(())
}

fn int1(machine: &Machine) -> Verdict {
    skip_if!(is_qemu(machine), NO_INT1);
    watch();
    let after: u64;
    // SAFETY: the handler only notes.
    unsafe { asm!(".byte 0xf1", "2: lea {after}, [rip + 2b]", after = out(reg) after) };
    expect_stops(after, &[(0, NONE)])
}

/// The single step that MOV SS holds back is not added to the INT1 that follows.
fn int1_after_mov_ss(machine: &Machine) -> Verdict {
    skip_if!(is_qemu(machine), NO_INT1);
    watch();
    let first: u64;
    // SAFETY: the handler only notes; SS gets the value it has.
    unsafe {
        asm!("pushfq", "pop rax", "or rax, 0x100", "push rax", "popfq",
            "mov ss, {data:e}", ".byte 0xf1", "2: .byte 0xf1",
            "xor rax, 0x100", "push rax", "popfq", "lea {first}, [rip + 2b]",
            out("rax") _, first = out(reg) first, data = in(reg) u32::from(KERNEL_DATA));
    }
    expect_stops(
        first,
        &[(0, NONE), (1, NONE), (7, STEP), (8, STEP), (9, STEP)],
    )
}

/// DR7.GD in the shadow of MOV SS: the access faults before it, and then steps.
fn access_after_mov_ss(machine: &Machine) -> Verdict {
    const GD: u64 = 1 << 13;
    skip_if!(is_qemu(machine), "QEMU's processor has no such bit");
    watch();
    let first: u64;
    // SAFETY: the handler only notes and gives DR6 back; SS gets the value it has.
    unsafe {
        asm!("pushfq", "pop rax", "or rax, 0x100", "mov dr7, {gd}", "push rax", "popfq",
            "mov ss, {data:e}", "2: mov dr6, rdx",
            "xor rax, 0x100", "push rax", "popfq", "lea {first}, [rip + 2b]",
            out("rax") _, first = out(reg) first, gd = in(reg) OFF | GD, in("rdx") NONE,
            data = in(reg) u32::from(KERNEL_DATA));
    }
    expect_stops(
        first,
        &[(0, ACCESS), (3, STEP), (9, STEP), (10, STEP), (11, STEP)],
    )
}

/// A step over STI comes before HLT, and one over HLT when an interrupt has ended it, or at once.
fn halt_after_sti(machine: &Machine) -> Verdict {
    skip_if!(is_qemu(machine), "QEMU's processor does not step over STI");
    const VECTOR: u8 = 0x51;
    hook(VECTOR, end_at_apic);
    watch();
    let local = apic::local();
    local.write(Register::Divide, 0xb);
    local.write(Register::Timer, VECTOR.into());
    local.write(Register::InitialCount, 100_000);
    let first: u64;
    // SAFETY: the handlers only note.
    unsafe {
        asm!("pushfq", "pop rax", "or rax, 0x100", "push rax", "popfq",
            "sti", "2: hlt", "xor rax, 0x100", "push rax", "popfq", "lea {first}, [rip + 2b]",
            out("rax") _, first = out(reg) first);
    }
    cpu::take_interrupts();
    while count(VECTOR) == 0 {
        cpu::take_interrupts();
    }
    expect_stops(
        first,
        &[(0, STEP), (1, STEP), (7, STEP), (8, STEP), (9, STEP)],
    )
}

/// A watched operand of MOV SS: its trap comes together with that of INT1, and after an INT.
fn watched_mov_ss(machine: &Machine) -> Verdict {
    /// G1, reads and writes, four bytes.
    const ALL: u64 = 0x408 | 0b1111 << 20;
    skip_if!(is_qemu(machine), NO_INT1);
    let data = u64::from(KERNEL_DATA);
    watch();
    let after: u64;
    // SAFETY: the handler only notes; SS gets the value it has.
    unsafe {
        asm!("mov dr1, {at}", "mov dr7, {on}", "mov ss, [{at}]", ".byte 0x2e, 0x2e, 0xf1", "2: mov dr7, {off}",
            "lea {after}, [rip + 2b]",
            at = in(reg) &raw const data, on = in(reg) ALL, off = in(reg) OFF, after = out(reg) after);
    }
    let stops = STOP_COUNT.load(Relaxed);
    ensure_eq!(stops, 1, "stops at MOV SS and INT1");
    ensure_eq!(STOPS[0].rip.load(Relaxed), after, "RIP behind INT1");
    Ok(())
}
