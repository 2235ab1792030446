//! Exceptions: the right vector, error code and RIP, also next to instructions that exit.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::apic::{self, ASSERT, DELIVER_NMI};
use crate::cpu::{self, Cr0, Dr6, PageFaultCode, Rflags, msr};
use crate::interrupts::{
    self, ABSENT_DATA, Frame, USER_CODE_32, USER_CODE_64, count, hook, last_interrupt_rip, vector,
};
use crate::machine::{Host, Machine};
use crate::memory::PAGE;
use crate::paging::{self, Entry};
use crate::{checks, ensure, ensure_eq, probe, skip_if, user};

use super::{Verdict, expect_fault, scratch, trapped};

checks![
    divide_error,
    breakpoint,
    invalid_opcode,
    general_protection,
    absent_segment,
    page_fault,
    page_fault_from_ring3,
    device_not_available,
    x87_error,
    simd_error,
    overflow,
    alignment,
    software_interrupt,
    privileged_in_ring3,
    double_fault,
    nmi,
    nmi_blocks_nmi,
    single_step,
    single_step_exiting,
    single_step_mov_ss,
    code_breakpoint,
    data_breakpoint,
    sti_shadow,
    sti_shadow_exiting,
    flags_survive_exits,
    registers_survive_exits,
];

/// A vector for interrupts to oneself.
const SELF_VECTOR: u8 = 0x51;
/// Selector beyond the end of the GDT.
const BEYOND_GDT: u16 = 0x1F8;

fn divide_error(_: &Machine) -> Verdict {
    // SAFETY: the exception is caught.
    let trap = unsafe {
        probe!("div {zero:e}"; zero = in(reg) 0_u32, inout("eax") 1 => _, inout("edx") 0 => _)
    };
    expect_fault(trap, vector::DIVIDE_ERROR, 0, "division by zero")?;
    // SAFETY: the exception is caught.
    let trap = unsafe {
        probe!("div {one:e}"; one = in(reg) 1_u32, inout("eax") 1 => _, inout("edx") 5 => _)
    };
    expect_fault(trap, vector::DIVIDE_ERROR, 0, "quotient too large")
}

fn breakpoint(_: &Machine) -> Verdict {
    // SAFETY: the exception is caught.
    let trap = trapped(unsafe { probe!("int3") }, "INT3")?;
    ensure!(
        trap.vector == vector::BREAKPOINT && trap.at_end,
        "INT3: {trap}"
    );
    Ok(())
}

fn invalid_opcode(_: &Machine) -> Verdict {
    // SAFETY: the exception is caught.
    let trap = unsafe { probe!("ud2") };
    expect_fault(trap, vector::INVALID_OPCODE, 0, "UD2")?;
    // SAFETY: LOCK does not go with NOP; the exception is caught.
    let trap = unsafe { probe!(".byte 0xF0, 0x90") };
    expect_fault(trap, vector::INVALID_OPCODE, 0, "LOCK NOP")
}

fn general_protection(machine: &Machine) -> Verdict {
    // SAFETY: loading a bad selector faults and leaves DS as it is.
    let trap = unsafe { probe!("mov ds, {0:e}"; in(reg) u32::from(BEYOND_GDT)) };
    let error = u64::from(BEYOND_GDT & !3);
    expect_fault(
        trap,
        vector::GENERAL_PROTECTION,
        error,
        "MOV DS beyond the GDT",
    )?;
    // SAFETY: not canonical: faults.
    let trap = unsafe { probe!("mov {0}, [{0}]"; inout(reg) 0x8000_0000_0000_0000_u64 => _) };
    expect_fault(
        trap,
        vector::GENERAL_PROTECTION,
        0,
        "address that is not canonical",
    )?;
    // QEMU TCG (7.2) executes this instruction over and over, without an exception.
    if machine.host == Host::Tcg {
        return Ok(());
    }
    // SAFETY: reserved bits of CR4 fault.
    let trap = unsafe { probe!("mov cr4, {0}"; in(reg) cpu::cr4() | 1 << 31) };
    expect_fault(trap, vector::GENERAL_PROTECTION, 0, "reserved bit of CR4")
}

fn absent_segment(_: &Machine) -> Verdict {
    // SAFETY: a segment that is not present faults and leaves FS as it is.
    let trap = unsafe { probe!("mov fs, {0:e}"; in(reg) u32::from(ABSENT_DATA)) };
    expect_fault(
        trap,
        vector::NOT_PRESENT,
        ABSENT_DATA.into(),
        "MOV FS, not present",
    )?;
    // SAFETY: the same for SS.
    let trap = unsafe { probe!("mov ss, {0:e}"; in(reg) u32::from(ABSENT_DATA)) };
    expect_fault(
        trap,
        vector::STACK,
        ABSENT_DATA.into(),
        "MOV SS, not present",
    )
}

fn page_fault(machine: &Machine) -> Verdict {
    let scratch = scratch(machine)?;
    let page = paging::unmap(0) + 0x123;
    // SAFETY: not mapped: faults.
    let trap = unsafe { probe!("mov al, [{}]"; in(reg) page, out("al") _) };
    expect_fault(trap, vector::PAGE_FAULT, 0, "read of no page")?;
    ensure_eq!(trapped(trap, "read")?.address, page, "CR2");
    // SAFETY: not mapped: faults.
    let trap = unsafe { probe!("mov byte ptr [{}], 1"; in(reg) page) };
    expect_fault(
        trap,
        vector::PAGE_FAULT,
        PageFaultCode::WRITE.bits(),
        "write to no page",
    )?;
    // SAFETY: not mapped: faults.
    let trap = trapped(unsafe { probe!("call {}"; in(reg) page) }, "call")?;
    ensure!(
        trap.vector == vector::PAGE_FAULT && trap.rip == page,
        "call of no page: {trap}"
    );

    paging::map(0, scratch, Entry::PRESENT);
    // SAFETY: read-only: faults.
    let trap = unsafe { probe!("mov byte ptr [{}], 1"; in(reg) page) };
    let error = (PageFaultCode::PRESENT | PageFaultCode::WRITE).bits();
    expect_fault(trap, vector::PAGE_FAULT, error, "write to a read-only page")?;

    // An access across two pages faults on the second, with its address.
    paging::map(0, scratch, Entry::PRESENT | Entry::WRITABLE);
    let next = paging::unmap(1);
    // SAFETY: the second page is not mapped: faults.
    let trap = unsafe { probe!("mov [{0}], {0}"; in(reg) next - 3) };
    expect_fault(
        trap,
        vector::PAGE_FAULT,
        PageFaultCode::WRITE.bits(),
        "write across pages",
    )?;
    ensure_eq!(trapped(trap, "write")?.address, next, "CR2 across pages");

    // After the page comes, the same instruction works.
    paging::map(1, scratch + PAGE, Entry::PRESENT | Entry::WRITABLE);
    // SAFETY: free RAM on both sides.
    let trap = unsafe { probe!("mov [{0}], {0}"; in(reg) next - 3) };
    ensure!(trap.is_none(), "write across mapped pages");
    paging::unmap(0);
    paging::unmap(1);
    Ok(())
}

fn page_fault_from_ring3(machine: &Machine) -> Verdict {
    let scratch = scratch(machine)?;
    // mov al, [rdi]
    let read = user::run(scratch, user::Mode::Long, &[0x8A, 0x07], 0x10_0000, 0);
    let read = trapped(read, "ring 3 reads ring 0's page")?;
    let wanted = PageFaultCode::PRESENT | PageFaultCode::USER;
    ensure!(
        read.vector == vector::PAGE_FAULT && read.page_fault_code() == wanted,
        "{read}"
    );
    ensure_eq!(read.address, 0x10_0000, "CR2");
    ensure_eq!(read.cs, USER_CODE_64, "CS");
    ensure_eq!(read.rip, user::code_address(), "RIP");
    // mov [rdi], al
    let address = paging::unmap(3);
    let write = user::run(scratch, user::Mode::Long, &[0x88, 0x07], address, 0);
    let write = trapped(write, "ring 3 writes no page")?;
    let wanted = PageFaultCode::WRITE | PageFaultCode::USER;
    ensure!(
        write.vector == vector::PAGE_FAULT && write.page_fault_code() == wanted,
        "{write}"
    );
    Ok(())
}

fn device_not_available(_: &Machine) -> Verdict {
    // SAFETY: this program's own code does not use the FPU.
    let trap = unsafe {
        cpu::set_cr0(cpu::cr0() | Cr0::TS.bits());
        let trap = probe!("fninit");
        asm!("clts", options(nostack));
        trap
    };
    expect_fault(trap, vector::DEVICE_NOT_AVAILABLE, 0, "FNINIT with CR0.TS")?;
    ensure_eq!(cpu::cr0() & Cr0::TS.bits(), 0, "CR0.TS after CLTS");
    Ok(())
}

fn x87_error(_: &Machine) -> Verdict {
    let unmasked = [0x0300_u16];
    // SAFETY: this program's own code does not use the FPU.
    let trap = unsafe {
        asm!("fninit", "fldcw [{}]", in(reg) &unmasked, options(nostack));
        let trap = probe!("fldz", "fld1", "fdivrp", "fwait");
        asm!("fnclex", "fninit", options(nostack));
        trap
    };
    let trap = trapped(trap, "unmasked division by zero")?;
    ensure_eq!(trap.vector, vector::X87, "exception of an x87 error");
    Ok(())
}

fn simd_error(_: &Machine) -> Verdict {
    // Invalid operation unmasked, which 0 / 0 is.
    let (unmasked, masked) = ([0x1F00_u32], [0x1F80_u32]);
    // SAFETY: this program's own code does not use SSE.
    let trap = unsafe {
        asm!("ldmxcsr [{}]", "xorps xmm0, xmm0", in(reg) &unmasked, options(nostack));
        let trap = probe!("divps xmm0, xmm0");
        asm!("ldmxcsr [{}]", in(reg) &masked, options(nostack));
        trap
    };
    // QEMU TCG (7.2) never raises #XM; under Plinth on TCG it shows as well.
    skip_if!(trap.is_none(), "the processor raises no SIMD exceptions");
    expect_fault(trap, vector::SIMD, 0, "unmasked SIMD error")
}

/// INTO exists in 32-bit code only.
fn overflow(machine: &Machine) -> Verdict {
    // mov eax, 0x7FFFFFFF; add eax, 1; into
    let code = [0xB8, 0xFF, 0xFF, 0xFF, 0x7F, 0x83, 0xC0, 0x01, 0xCE];
    let trap = user::run(scratch(machine)?, user::Mode::Compatibility, &code, 0, 0);
    let trap = trapped(trap, "INTO")?;
    ensure_eq!(trap.vector, vector::OVERFLOW, "exception of INTO");
    ensure_eq!(
        trap.rip,
        user::code_address() + code.len() as u64,
        "RIP after INTO"
    );
    ensure_eq!(trap.cs, USER_CODE_32, "CS");
    Ok(())
}

fn alignment(machine: &Machine) -> Verdict {
    let cr0 = cpu::cr0();
    let scratch = scratch(machine)?;
    // SAFETY: alignment checks apply to ring 3 only.
    unsafe { cpu::set_cr0(cr0 | Cr0::AM.bits()) };
    // mov eax, [rdi]
    let address = user::stack_address() + 1;
    let trap = user::run(
        scratch,
        user::Mode::Long,
        &[0x8B, 0x07],
        address,
        Rflags::AC.bits(),
    );
    // SAFETY: its own value.
    unsafe { cpu::set_cr0(cr0) };
    let trap = trapped(trap, "ring 3")?;
    // QEMU TCG (7.2 and 10.0) does not check alignment; under Plinth on TCG it shows as well.
    skip_if!(
        trap.vector == vector::INVALID_OPCODE,
        "the processor does not check alignment"
    );
    let got = (trap.vector, trap.error, trap.rip);
    ensure!(
        got == (vector::ALIGNMENT, 0, user::code_address()),
        "unaligned read: {trap}"
    );
    Ok(())
}

fn software_interrupt(machine: &Machine) -> Verdict {
    // SAFETY: the trap is caught.
    let trap = trapped(unsafe { probe!("int 0x80") }, "INT 0x80")?;
    ensure!(
        trap.vector == 0x80 && trap.at_end && trap.error == 0,
        "INT 0x80: {trap}"
    );
    let scratch = scratch(machine)?;
    // int 0x80, allowed in ring 3 by its gate; int 0x81 is not.
    let trap = trapped(
        user::run(scratch, user::Mode::Long, &[0xCD, 0x80], 0, 0),
        "INT 0x80",
    )?;
    ensure!(
        trap.vector == 0x80 && trap.cs == USER_CODE_64,
        "INT 0x80 in ring 3: {trap}"
    );
    let trap = trapped(
        user::run(scratch, user::Mode::Long, &[0xCD, 0x81], 0, 0),
        "INT 0x81",
    )?;
    let got = (trap.vector, trap.rip);
    ensure!(
        got == (vector::GENERAL_PROTECTION, user::code_address()),
        "INT 0x81: {trap}"
    );
    ensure!(names_gate(trap.error, 0x81), "INT 0x81: {trap}");
    Ok(())
}

/// Whether an error code names a gate of the IDT: the vector times 8, and the IDT bit. The
/// lowest bit tells where the event came from, and processors differ in that.
fn names_gate(error: u64, vector: u8) -> bool {
    let vector = u64::from(vector);
    // QEMU TCG (7.2) takes the vector times 16, for guests of a hypervisor too.
    matches!(error & !1, code if code == vector * 8 + 2 || code == vector * 16 + 2)
}

/// Instructions that exit under a hypervisor are refused in ring 3 first.
fn privileged_in_ring3(machine: &Machine) -> Verdict {
    let scratch = scratch(machine)?;
    let instructions: [(&str, &[u8]); 9] = [
        ("HLT", &[0xF4]),
        ("CLI", &[0xFA]),
        ("RDMSR", &[0x0F, 0x32]),
        ("WRMSR", &[0x0F, 0x30]),
        ("IN AL, 0x80", &[0xE4, 0x80]),
        ("OUT 0x80, AL", &[0xE6, 0x80]),
        ("MOV RAX, CR0", &[0x0F, 0x20, 0xC0]),
        ("INVLPG", &[0x0F, 0x01, 0x3F]),
        ("WBINVD", &[0x0F, 0x09]),
    ];
    for (name, code) in instructions {
        let trap = trapped(user::run(scratch, user::Mode::Long, code, 0, 0), name)?;
        let got = (trap.vector, trap.error, trap.rip);
        let wanted = (vector::GENERAL_PROTECTION, 0, user::code_address());
        ensure!(got == wanted, "{name} in ring 3: {trap}");
    }
    // CPUID exits too, and is allowed: mov rsi, rbx; cpuid; mov rbx, rsi.
    let code = [0x48, 0x89, 0xDE, 0x0F, 0xA2, 0x48, 0x89, 0xF3];
    let trap = trapped(user::run(scratch, user::Mode::Long, &code, 0, 0), "CPUID")?;
    ensure!(
        trap.vector == vector::INVALID_OPCODE,
        "CPUID in ring 3: {trap}"
    );
    ensure_eq!(
        trap.rip,
        user::code_address() + 8,
        "RIP after CPUID in ring 3"
    );
    Ok(())
}

/// #GP whose gate is not present: #NP while delivering it makes #DF, on its own stack.
fn double_fault(_: &Machine) -> Verdict {
    interrupts::set_gate_present(vector::GENERAL_PROTECTION, false);
    // SAFETY: not canonical: faults.
    let trap = unsafe { probe!("mov {0}, [{0}]"; inout(reg) 0x8000_0000_0000_0000_u64 => _) };
    interrupts::set_gate_present(vector::GENERAL_PROTECTION, true);
    let trap = trapped(trap, "#GP without a gate")?;
    ensure!(
        trap.vector == vector::DOUBLE_FAULT && trap.error == 0,
        "#GP without a gate: {trap}"
    );

    // A benign exception without a gate is #NP only, with the gate's number and the IDT bit.
    interrupts::set_gate_present(vector::INVALID_OPCODE, false);
    // SAFETY: the exception is caught.
    let trap = unsafe { probe!("ud2") };
    interrupts::set_gate_present(vector::INVALID_OPCODE, true);
    let trap = trapped(trap, "UD2 without a gate")?;
    let named = names_gate(trap.error, vector::INVALID_OPCODE);
    let good = trap.vector == vector::NOT_PRESENT && named && trap.offset == 0;
    ensure!(good, "UD2 without a gate: {trap}");
    Ok(())
}

fn nmi(_: &Machine) -> Verdict {
    hook(vector::NMI, interrupts::only_count);
    let local = apic::local();
    for turn in 1..=3 {
        local.command(DELIVER_NMI | ASSERT, local.id());
        settle_instructions();
        ensure_eq!(count(vector::NMI), turn, "NMIs taken with IF clear");
    }
    Ok(())
}

/// Executes a few instructions, for an interrupt to be taken.
fn settle_instructions() {
    for _ in 0..200 {
        core::hint::spin_loop();
    }
}

static NMI_DEPTH: AtomicU64 = AtomicU64::new(0);
static NMI_DEEPEST: AtomicU64 = AtomicU64::new(0);

/// An NMI sent from within the handler waits for its IRET; a second one merges with it.
fn nmi_blocks_nmi(_: &Machine) -> Verdict {
    fn send_two(_: &mut Frame) {
        let depth = NMI_DEPTH.fetch_add(1, Relaxed) + 1;
        NMI_DEEPEST.fetch_max(depth, Relaxed);
        if count(vector::NMI) == 1 {
            let local = apic::local();
            for _ in 0..2 {
                local.command(DELIVER_NMI | ASSERT, local.id());
                settle_instructions();
            }
        }
        NMI_DEPTH.fetch_sub(1, Relaxed);
    }
    NMI_DEPTH.store(0, Relaxed);
    NMI_DEEPEST.store(0, Relaxed);
    hook(vector::NMI, send_two);
    let local = apic::local();
    local.command(DELIVER_NMI | ASSERT, local.id());
    settle_instructions();
    ensure_eq!(NMI_DEEPEST.load(Relaxed), 1, "nesting of NMI handlers");
    ensure_eq!(count(vector::NMI), 2, "NMIs taken");
    Ok(())
}

/// Where single steps and breakpoints stopped, in order.
static STOPS: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];
static STOP_COUNT: AtomicUsize = AtomicUsize::new(0);
static STOP_DR6: AtomicU64 = AtomicU64::new(0);

/// Notes RIP and DR6, clears DR6, and goes on past a code breakpoint.
fn note_stop(frame: &mut Frame) {
    if let Some(slot) = STOPS.get(STOP_COUNT.fetch_add(1, Relaxed)) {
        slot.store(frame.rip, Relaxed);
    }
    STOP_DR6.fetch_or(cpu::dr6(), Relaxed);
    // SAFETY: only clears what is latched.
    unsafe { cpu::set_dr6(0xFFFF_0FF0) };
    frame.rflags |= Rflags::RF.bits();
}

fn watch_stops() {
    for stop in &STOPS {
        stop.store(0, Relaxed);
    }
    STOP_COUNT.store(0, Relaxed);
    STOP_DR6.store(0, Relaxed);
    // SAFETY: only clears what is latched.
    unsafe { cpu::set_dr6(0xFFFF_0FF0) };
    hook(vector::DEBUG, note_stop);
}

fn stop(index: usize) -> u64 {
    STOPS.get(index).map_or(0, |stop| stop.load(Relaxed))
}

/// Runs instructions with TF set; evaluates to the distance from the first of them to each
/// numbered label. TF takes effect after the instruction that follows POPFQ.
macro_rules! step_over {
    ($($text:literal),+ $(; $($operands:tt)+)?) => {{
        let (first, last): (u64, u64);
        asm!(
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            "2:",
            $($text,)+
            "3:",
            "pushfq",
            "and qword ptr [rsp], ~0x100",
            "popfq",
            "lea {first}, [rip + 2b]",
            "lea {last}, [rip + 3b]",
            $($($operands)+,)?
            first = out(reg) first,
            last = out(reg) last,
        );
        (first, last)
    }};
}

fn single_step(_: &Machine) -> Verdict {
    watch_stops();
    // SAFETY: the handler only notes.
    let (first, last) = unsafe { step_over!("nop", "nop", "nop") };
    ensure_eq!(last - first, 3, "length of three NOPs");
    for index in 0..3 {
        ensure_eq!(stop(index), first + 1 + index as u64, "RIP of step {index}");
    }
    // PUSHFQ, AND, POPFQ follow; the last is stepped over as well.
    ensure_eq!(STOP_COUNT.load(Relaxed), 6, "number of steps");
    let dr6 = Dr6::from_bits_truncate(STOP_DR6.load(Relaxed));
    ensure!(dr6 == Dr6::BS, "DR6 has {dr6:?}");
    Ok(())
}

/// Instructions that exit are one step each, and the trap comes right after them.
fn single_step_exiting(_: &Machine) -> Verdict {
    watch_stops();
    // SAFETY: the handler only notes; RBX is put back.
    let (first, last) = unsafe {
        step_over!("mov rsi, rbx", "cpuid", "mov rbx, rsi", "nop";
            inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _, out("rsi") _)
    };
    ensure_eq!(last - first, 9, "length of MOV, CPUID, MOV, NOP");
    for (index, offset) in [3, 5, 8, 9].into_iter().enumerate() {
        ensure_eq!(
            stop(index),
            first + offset,
            "RIP of step {index} around CPUID"
        );
    }

    watch_stops();
    // SAFETY: the handler only notes; port 0x80 is for diagnostics.
    let (first, _) = unsafe { step_over!("in al, 0x80", "out 0x80, al", "nop"; out("eax") _) };
    for (index, offset) in [2, 4, 5].into_iter().enumerate() {
        ensure_eq!(
            stop(index),
            first + offset,
            "RIP of step {index} around IN and OUT"
        );
    }

    watch_stops();
    let apic = apic::local().address(apic::Register::Version);
    // SAFETY: the handler only notes; reading the version register changes nothing.
    let (first, _) = unsafe { step_over!("mov eax, [rdi]", "nop"; in("rdi") apic, out("eax") _) };
    for (index, offset) in [2, 3].into_iter().enumerate() {
        ensure_eq!(
            stop(index),
            first + offset,
            "RIP of step {index} around an APIC read"
        );
    }

    watch_stops();
    // SAFETY: the handler only notes; reading an MSR changes nothing.
    let (first, _) =
        unsafe { step_over!("rdmsr", "nop"; in("ecx") msr::APIC_BASE, out("eax") _, out("edx") _) };
    for (index, offset) in [2, 3].into_iter().enumerate() {
        ensure_eq!(
            stop(index),
            first + offset,
            "RIP of step {index} around RDMSR"
        );
    }
    let dr6 = Dr6::from_bits_truncate(STOP_DR6.load(Relaxed));
    ensure!(dr6 == Dr6::BS, "DR6 has {dr6:?}");
    Ok(())
}

/// MOV SS holds the trap back until after the next instruction.
fn single_step_mov_ss(_: &Machine) -> Verdict {
    watch_stops();
    // SAFETY: the handler only notes; SS gets the value it has.
    let (first, last) = unsafe {
        step_over!("mov ss, eax", "nop", "nop"; in("eax") u32::from(interrupts::KERNEL_DATA))
    };
    ensure_eq!(last - first, 4, "length of MOV SS, NOP, NOP");
    ensure_eq!(stop(0), first + 3, "RIP of the first step");
    ensure_eq!(stop(1), first + 4, "RIP of the second step");
    Ok(())
}

/// A breakpoint on an instruction faults before it, once, when RF is set for the return.
fn code_breakpoint(_: &Machine) -> Verdict {
    const ENABLE_0: u64 = 0x402;
    watch_stops();
    let (target, done): (u64, u64);
    // SAFETY: the handler only notes; the breakpoint is on the NOP below.
    unsafe {
        asm!(
            "lea {target}, [rip + 2f]",
            "mov dr0, {target}",
            "mov dr7, {enable}",
            "xor {done:e}, {done:e}",
            "2: inc {done}",
            "mov dr7, {disable}",
            target = out(reg) target,
            done = out(reg) done,
            enable = in(reg) ENABLE_0,
            disable = in(reg) 0x400_u64,
        );
    }
    ensure_eq!(STOP_COUNT.load(Relaxed), 1, "stops at the breakpoint");
    ensure_eq!(stop(0), target, "RIP at the breakpoint");
    ensure_eq!(done, 1, "executions of the instruction");
    let dr6 = Dr6::from_bits_truncate(STOP_DR6.load(Relaxed));
    ensure!(dr6 == Dr6::B0, "DR6 has {dr6:?}");
    ensure_eq!(cpu::dr0(), target, "DR0");
    Ok(())
}

/// A breakpoint on data traps after the write; a read does not stop there.
fn data_breakpoint(_: &Machine) -> Verdict {
    /// G0, break on writes, four bytes.
    const WRITES_4_BYTES: u64 = 0x402 | 0b1101 << 16;
    let mut word = [0_u64; 2];
    let pointer = word.as_mut_ptr();
    watch_stops();
    let after: u64;
    // SAFETY: the handler only notes; writes a local.
    unsafe {
        asm!(
            "mov dr0, {pointer}",
            "mov dr7, {enable}",
            "mov {scratch:e}, [{pointer}]",
            "mov dword ptr [{pointer} + 8], 3",
            "mov dword ptr [{pointer}], 7",
            "2: nop",
            "lea {after}, [rip + 2b]",
            "mov dr7, {disable}",
            pointer = in(reg) pointer,
            scratch = out(reg) _,
            after = out(reg) after,
            enable = in(reg) WRITES_4_BYTES,
            disable = in(reg) 0x400_u64,
        );
    }
    ensure_eq!(STOP_COUNT.load(Relaxed), 1, "stops at the breakpoint");
    ensure_eq!(stop(0), after, "RIP after the write");
    ensure!(word == [7, 3], "memory: {word:?}");
    let dr6 = Dr6::from_bits_truncate(STOP_DR6.load(Relaxed));
    ensure!(dr6 == Dr6::B0, "DR6 has {dr6:?}");
    Ok(())
}

/// Makes an interrupt to this processor pending.
fn pend_interrupt() {
    hook(SELF_VECTOR, interrupts::end_at_apic);
    apic::local().send_self(SELF_VECTOR);
}

/// A pending interrupt waits for one instruction after STI.
fn sti_shadow(_: &Machine) -> Verdict {
    pend_interrupt();
    let after: u64;
    // SAFETY: the handler only counts.
    unsafe {
        asm!("sti", "nop", "2: nop", "cli", "lea {}, [rip + 2b]", out(reg) after);
    }
    ensure_eq!(count(SELF_VECTOR), 1, "interrupts taken");
    ensure_eq!(last_interrupt_rip(), after, "RIP of the interrupt");
    // CLI in the shadow: never taken.
    pend_interrupt();
    // SAFETY: the handler only counts.
    unsafe { asm!("sti", "cli", "nop") };
    ensure_eq!(
        count(SELF_VECTOR),
        1,
        "interrupts taken with CLI in the shadow of STI"
    );
    cpu::take_interrupts();
    ensure_eq!(count(SELF_VECTOR), 2, "interrupts taken at last");
    Ok(())
}

/// The same with an instruction that exits in the shadow.
fn sti_shadow_exiting(_: &Machine) -> Verdict {
    pend_interrupt();
    let after: u64;
    // SAFETY: the handler only counts; RBX is put back.
    unsafe {
        asm!("mov rsi, rbx", "sti", "cpuid", "2: nop", "cli", "mov rbx, rsi",
            "lea {}, [rip + 2b]", out(reg) after,
            inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _, out("rsi") _);
    }
    ensure_eq!(count(SELF_VECTOR), 1, "interrupts taken");
    ensure_eq!(
        last_interrupt_rip(),
        after,
        "RIP of the interrupt after STI, CPUID"
    );
    pend_interrupt();
    let after: u64;
    // SAFETY: the handler only counts; port 0x80 is for diagnostics.
    unsafe {
        asm!("sti", "out 0x80, al", "2: nop", "cli", "lea {}, [rip + 2b]", out(reg) after);
    }
    ensure_eq!(
        last_interrupt_rip(),
        after,
        "RIP of the interrupt after STI, OUT"
    );
    Ok(())
}

/// Exits change no flags.
fn flags_survive_exits(_: &Machine) -> Verdict {
    let flags = Rflags::CF | Rflags::PF | Rflags::AF | Rflags::ZF | Rflags::SF | Rflags::OF;
    let apic = apic::local().address(apic::Register::Version);
    for set in [flags | Rflags::DF, Rflags::empty()] {
        let after: u64;
        // SAFETY: flags are put back (DF by CLD), the devices read have no side effects.
        unsafe {
            asm!("mov rsi, rbx", "push {0}", "popfq", "cpuid", "in al, 0x80", "out 0x80, al",
                "mov ecx, 0x1B", "rdmsr", "mov eax, [{1}]", "pushfq", "pop {0}", "cld",
                "mov rbx, rsi",
                inout(reg) (set | Rflags::FIXED).bits() => after, in(reg) apic,
                inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _, out("rsi") _);
        }
        let after = Rflags::from_bits_truncate(after) & (flags | Rflags::DF);
        ensure!(after == set, "{after:?} after exits with {set:?}");
    }
    Ok(())
}

/// Exits change no registers but those of the instruction.
fn registers_survive_exits(_: &Machine) -> Verdict {
    let apic = apic::local().address(apic::Register::Version) as u64;
    let mut sum: u64 = apic;
    // SAFETY: RBX and RBP are put back; the rest is declared.
    unsafe {
        asm!(
            "push rbx", "push rbp",
            "mov rbp, 0x0101010101010101",
            "mov rsi, 0x0202020202020202",
            "mov r8, 0x0303030303030303",
            "mov r9, 0x0404040404040404",
            "mov r10, 0x0505050505050505",
            "mov r11, 0x0606060606060606",
            "mov r12, 0x0707070707070707",
            "mov r13, 0x0808080808080808",
            "mov r14, 0x0909090909090909",
            "mov r15, 0x0A0A0A0A0A0A0A0A",
            "xor eax, eax", "xor ecx, ecx",
            "cpuid",
            "in al, 0x80", "out 0x80, al",
            "mov ecx, 0x1B", "rdmsr",
            "mov eax, [rdi]",
            "xor rdi, rbp", "xor rdi, rsi", "xor rdi, r8", "xor rdi, r9", "xor rdi, r10",
            "xor rdi, r11", "xor rdi, r12", "xor rdi, r13", "xor rdi, r14", "xor rdi, r15",
            "pop rbp", "pop rbx",
            inout("rdi") sum, out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _,
            out("r14") _, out("r15") _,
        );
    }
    // 1^2^3^...^10 = 11, in each byte.
    sum ^= 0x0B0B_0B0B_0B0B_0B0B;
    ensure_eq!(sum, apic, "registers after exits, combined");
    Ok(())
}
