//! The processor model where a hypervisor has to complete what the processor began.
//!
//! Instructions on device memory: the address is one that nothing answers at, so loads give ones and
//! stores go nowhere; that is enough to see operands, results, flags, faults and traps.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::cpu::{self, Dr6, PageFaultCode, Rflags};
use crate::interrupts::{Frame, hook, probe_rdmsr, probe_wrmsr, vector};
use crate::legacy;
use crate::machine::{Host, Machine};
use crate::memory::PAGE;
use crate::paging::{self, Entry};
use crate::{checks, ensure, ensure_eq, fail, probe, skip_if};

use super::{Verdict, expect_fault, scratch, trapped};

checks![
    stack_on_device,
    vectors_on_device,
    arithmetic_on_device,
    strings_on_device,
    faults_on_device,
    steps_on_device,
    data_breakpoint_on_device,
    port_breakpoint,
    code_outside_ram,
    hypercalls,
    misc_enable,
    reserved_control_bits,
    task_switches,
    bad_pdptes,
    five_level_paging,
    virtual_8086,
];

/// A physical address at which nothing answers, mapped one to one.
const NOTHING: u64 = 0xFD00_0000;
/// Why a check cannot be made on bare QEMU.
const ZEROS: &str = "QEMU itself reads zeros where nothing is";

fn stack_on_device(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, ZEROS);
    let (pushed, rsp_before, rsp_after): (u64, u64, u64);
    // SAFETY: the stack is balanced; loads from the address have no effect.
    let trap = unsafe {
        probe!("mov {before}, rsp", "push qword ptr [{at}]", "pop {value}", "push 5",
            "pop qword ptr [{at}]", "mov {after}, rsp";
            at = in(reg) NOTHING, value = out(reg) pushed,
            before = out(reg) rsp_before, after = out(reg) rsp_after)
    };
    ensure!(trap.is_none(), "PUSH and POP of device memory trap");
    ensure_eq!(pushed, u64::MAX, "PUSH of what is not there");
    ensure_eq!(rsp_after, rsp_before, "RSP");
    // CALL and JMP to where nothing is mapped: the target faults, not the branch.
    // SAFETY: the handler puts RSP back.
    let trap = trapped(
        unsafe { probe!("call qword ptr [{}]"; in(reg) NOTHING) },
        "CALL through device memory",
    )?;
    ensure!(
        trap.vector == vector::PAGE_FAULT && trap.rip == u64::MAX,
        "CALL through device memory: {trap}"
    );
    Ok(())
}

fn vectors_on_device(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, ZEROS);
    let mut got = [[0_u64; 2]; 3];
    let seed = [0x1111_2222_3333_4444_u64, 0x5555_6666_7777_8888];
    // SAFETY: this program's own code does not use SSE; loads from the address have no effect.
    let trap = unsafe {
        probe!("movups xmm1, [{seed}]", "movaps [{at}], xmm1", "movups [{got}], xmm1",
            "movdqu xmm1, [{at}]", "movups [{got} + 16], xmm1",
            "movss xmm1, dword ptr [{at}]", "movups [{got} + 32], xmm1", "movntdq [{at}], xmm1",
            "movq mm1, qword ptr [{at}]", "movq qword ptr [{at}], mm1", "emms";
            at = in(reg) NOTHING, seed = in(reg) &seed, got = in(reg) &mut got)
    };
    ensure!(trap.is_none(), "moves of SSE registers trap");
    let wanted = [seed, [u64::MAX; 2], [0xFFFF_FFFF, 0]];
    ensure!(got == wanted, "SSE registers: {got:x?}");
    // SAFETY: not aligned: faults.
    let trap = unsafe { probe!("movaps xmm1, [{}]"; in(reg) NOTHING + 8) };
    expect_fault(trap, vector::GENERAL_PROTECTION, 0, "MOVAPS, not aligned")
}

fn arithmetic_on_device(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, ZEROS);
    let (low, high, flags): (u64, u64, u64);
    // SAFETY: loads from the address have no effect.
    let trap = unsafe {
        probe!("mul qword ptr [{at}]", "pushfq", "pop {flags}";
            at = in(reg) NOTHING, flags = out(reg) flags,
            inout("rax") 3_u64 => low, out("rdx") high)
    };
    ensure!(trap.is_none(), "MUL by device memory traps");
    ensure!(
        (low, high) == (3_u64.wrapping_neg(), 2),
        "3 * (2^64 - 1) = {high:#x}:{low:#x}"
    );
    let carry = Rflags::CF | Rflags::OF;
    ensure!(
        Rflags::from_bits_truncate(flags).contains(carry),
        "flags of MUL: {flags:#x}"
    );
    // SAFETY: the quotient is too large: faults.
    let trap = unsafe {
        probe!("div dword ptr [{at}]"; at = in(reg) NOTHING, inout("eax") 1 => _, inout("edx") !0 => _)
    };
    expect_fault(trap, vector::DIVIDE_ERROR, 0, "DIV by device memory")?;
    let (equal, accumulator): (u8, u64);
    // SAFETY: RBX is put back; the comparison holds and the store goes nowhere.
    let trap = unsafe {
        probe!("mov rsi, rbx", "mov rbx, 7", "lock cmpxchg8b [{at}]", "sete {equal}", "mov rbx, rsi";
            at = in(reg) NOTHING, equal = out(reg_byte) equal, out("rsi") _,
            inout("rax") 0xFFFF_FFFF_u64 => accumulator, inout("rdx") 0xFFFF_FFFF_u64 => _,
            in("rcx") 9)
    };
    ensure!(trap.is_none(), "CMPXCHG8B traps");
    ensure!(
        equal == 1 && accumulator == 0xFFFF_FFFF,
        "CMPXCHG8B: {accumulator:#x}"
    );
    let (shifted, bit): (u32, u8);
    // SAFETY: the stores go nowhere.
    let trap = unsafe {
        probe!("shl dword ptr [{at}], 4", "setc {bit}", "lock bts dword ptr [{at}], 3",
            "lock xadd dword ptr [{at}], {sum:e}";
            at = in(reg) NOTHING, bit = out(reg_byte) bit, sum = inout(reg) 1_u32 => shifted)
    };
    ensure!(trap.is_none(), "SHL, BTS, XADD trap");
    ensure!(
        bit == 1 && shifted == u32::MAX,
        "SHL: {bit}, XADD: {shifted:#x}"
    );
    Ok(())
}

fn strings_on_device(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, ZEROS);
    let scratch = scratch(machine)?;
    crate::memory::write_bytes(scratch, &[0; 32]);
    let (count, destination): (u64, u64);
    // SAFETY: writes free RAM.
    let trap = unsafe {
        probe!("rep movsw"; inout("rsi") NOTHING => _, inout("rdi") scratch => destination,
            inout("rcx") 5_u64 => count)
    };
    ensure!(trap.is_none(), "REP MOVS from a device traps");
    ensure!(
        (count, destination) == (0, scratch + 10),
        "RCX {count}, RDI {destination:#x}"
    );
    let (count, source): (u64, u64);
    // SAFETY: backwards from the device; DF is put back.
    let trap = unsafe {
        probe!("std", "repe cmpsb", "cld"; inout("rsi") scratch + 11 => source,
            inout("rdi") NOTHING + 11 => _, inout("rcx") 8_u64 => count)
    };
    ensure!(trap.is_none(), "REPE CMPS with a device traps");
    // Bytes 11 and below are zero there: the first differs.
    ensure!(
        (count, source) == (7, scratch + 10),
        "RCX {count}, RSI {source:#x}"
    );
    // The second page is missing: what came before it has been done.
    let page = paging::map(0, scratch, Entry::PRESENT | Entry::WRITABLE);
    let next = paging::unmap(1);
    let (count, destination): (u64, u64);
    // SAFETY: writes free RAM, then faults.
    let trap = unsafe {
        probe!("rep movsb"; inout("rsi") NOTHING => _, inout("rdi") page + PAGE - 3 => destination,
            inout("rcx") 8_u64 => count)
    };
    let code = PageFaultCode::WRITE.bits();
    expect_fault(trap, vector::PAGE_FAULT, code, "REP MOVS into no page")?;
    ensure_eq!(trapped(trap, "REP MOVS")?.address, next, "CR2");
    ensure!(
        (count, destination) == (5, next),
        "RCX {count}, RDI {destination:#x} at the fault"
    );
    paging::unmap(0);
    Ok(())
}

fn faults_on_device(_: &Machine) -> Verdict {
    let page = paging::map(2, NOTHING, Entry::PRESENT);
    // SAFETY: read-only: each faults, as a write.
    let traps = unsafe {
        [
            ("MOV", probe!("mov dword ptr [{}], 1"; in(reg) page)),
            ("ADD", probe!("add dword ptr [{}], 1"; in(reg) page)),
            ("XCHG", probe!("xchg [{}], eax"; in(reg) page, out("eax") _)),
            ("MOVUPS", probe!("movups [{}], xmm1"; in(reg) page)),
            ("POP", probe!("push 1", "pop qword ptr [{}]"; in(reg) page)),
        ]
    };
    let wanted = PageFaultCode::PRESENT | PageFaultCode::WRITE;
    for (what, trap) in traps {
        let trap = trapped(trap, what)?;
        let right = trap.vector == vector::PAGE_FAULT
            && trap.page_fault_code() == wanted
            && trap.address == page;
        ensure!(right, "{what} to a read-only device page: {trap}");
    }
    // Across the end of a mapped device page into none.
    paging::map(2, NOTHING, Entry::PRESENT | Entry::WRITABLE);
    let next = paging::unmap(3);
    // SAFETY: faults.
    let trap = unsafe { probe!("mov [{}], rax"; in(reg) next - 4) };
    let trap = trapped(trap, "MOV across device pages")?;
    ensure!(
        trap.vector == vector::PAGE_FAULT && trap.address == next,
        "MOV across device pages: {trap}"
    );
    paging::unmap(2);
    Ok(())
}

/// How often a debug exception came, its last RIP and causes.
static STOPS: AtomicU64 = AtomicU64::new(0);
static STOP_RIP: AtomicU64 = AtomicU64::new(0);
static STOP_DR6: AtomicU64 = AtomicU64::new(0);

fn watch() {
    STOPS.store(0, Relaxed);
    // SAFETY: only status bits.
    unsafe { cpu::set_dr6(0) };
    hook(vector::DEBUG, |frame: &mut Frame| {
        STOPS.fetch_add(1, Relaxed);
        STOP_RIP.store(frame.rip, Relaxed);
        STOP_DR6.store(cpu::dr6(), Relaxed);
    });
}

fn stops() -> (u64, u64, Dr6) {
    let causes = Dr6::from_bits_truncate(STOP_DR6.load(Relaxed));
    (STOPS.load(Relaxed), STOP_RIP.load(Relaxed), causes)
}

/// With TF, each iteration of a string instruction traps, and so does what a device is asked by.
fn steps_on_device(machine: &Machine) -> Verdict {
    let scratch = scratch(machine)?;
    watch();
    let count: u64;
    // SAFETY: the handler only notes; writes free RAM.
    unsafe {
        asm!(
            "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "rep movsb",
            "pushfq", "and qword ptr [rsp], -0x101", "popfq",
            inout("rsi") NOTHING => _, inout("rdi") scratch => _, inout("rcx") 3_u64 => count,
        );
    }
    ensure_eq!(count, 0, "RCX");
    // Three iterations, PUSHFQ, AND, POPFQ (SDM vol. 3B, section 18.3.1.4). With -icount, QEMU (7.2, 10.0) itself steps
    // once more, over finding that RCX is 0.
    let steps = stops().0;
    let extra = machine.host == Host::Tcg && steps == 7;
    ensure!(steps == 6 || extra, "{steps} single steps");
    watch();
    // SAFETY: the handler only notes.
    unsafe {
        asm!(
            "pushfq", "pop {old}", "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "mov eax, [{at}]",
            "push {old}", "popfq",
            at = in(reg) NOTHING, old = out(reg) _, out("eax") _,
        );
    }
    let (stops, _, causes) = stops();
    ensure_eq!(stops, 3, "single steps of MOV, PUSH, POPFQ");
    ensure!(causes == Dr6::BS, "DR6 has {causes:?}");
    Ok(())
}

fn data_breakpoint_on_device(_: &Machine) -> Verdict {
    /// G1, reads and writes, four bytes.
    const ALL_4_BYTES: u64 = 0x408 | 0b1111 << 20;
    watch();
    let after: u64;
    // SAFETY: the handler only notes.
    unsafe {
        asm!(
            "mov dr1, {watched}",
            "mov dr7, {enable}",
            "mov eax, [{at}]",
            "mov eax, [{at} + 4]",
            "2: nop",
            "lea {after}, [rip + 2b]",
            "mov dr7, {disable}",
            watched = in(reg) NOTHING + 4, at = in(reg) NOTHING, after = out(reg) after,
            enable = in(reg) ALL_4_BYTES, disable = in(reg) 0x400_u64, out("eax") _,
        );
    }
    let (stops, rip, causes) = stops();
    ensure_eq!(stops, 1, "stops at the breakpoint");
    ensure_eq!(rip, after, "RIP behind the access");
    ensure!(causes == Dr6::from_bits_retain(2), "DR6 has {causes:?}");
    Ok(())
}

fn port_breakpoint(_: &Machine) -> Verdict {
    /// G0, ports, one byte.
    const PORT: u64 = 0x402 | 0b0010 << 16;
    watch();
    let after: u64;
    // SAFETY: the handler only notes; the port is for diagnostics.
    unsafe {
        asm!(
            "mov dr0, {watched}",
            "mov dr7, {enable}",
            "in al, 0x81",
            "out 0x80, al",
            "2: nop",
            "lea {after}, [rip + 2b]",
            "mov dr7, {disable}",
            watched = in(reg) 0x80_u64, after = out(reg) after,
            enable = in(reg) PORT, disable = in(reg) 0x400_u64, out("al") _,
        );
    }
    let (stops, rip, causes) = stops();
    ensure_eq!(stops, 1, "stops at the breakpoint");
    ensure_eq!(rip, after, "RIP behind the access");
    ensure!(causes == Dr6::B0, "DR6 has {causes:?}");
    Ok(())
}

/// Where nothing answers the bus gives ones, which are no instruction.
fn code_outside_ram(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, "QEMU stops itself there");
    // SAFETY: the handler puts RSP back.
    let trap = trapped(unsafe { probe!("call {}"; in(reg) NOTHING) }, "CALL")?;
    ensure!(
        trap.vector == vector::INVALID_OPCODE && trap.rip == NOTHING,
        "code where nothing is: {trap}"
    );
    Ok(())
}

/// Both vendors' instructions, whichever the processor has.
fn hypercalls(machine: &Machine) -> Verdict {
    skip_if!(machine.host != Host::Plinth, "for Plinth only");
    let (intel, amd): (u64, u64);
    // SAFETY: no such call: changes RAX only.
    let trap = unsafe { probe!("vmcall"; inout("rax") 77_u64 => intel) };
    ensure!(trap.is_none(), "VMCALL traps");
    // SAFETY: as above.
    let trap = unsafe { probe!("vmmcall"; inout("rax") 77_u64 => amd) };
    ensure!(trap.is_none(), "VMMCALL traps");
    let unknown = (-1000_i64).cast_unsigned();
    ensure!(
        (intel, amd) == (unknown, unknown),
        "results {intel:#x}, {amd:#x}"
    );
    Ok(())
}

fn misc_enable(machine: &Machine) -> Verdict {
    const MISC_ENABLE: u32 = 0x1A0;
    skip_if!(machine.host != Host::Plinth, "for Plinth only");
    let Ok(old) = probe_rdmsr(MISC_ENABLE) else {
        fail!("RDMSR faults");
    };
    let new = old ^ (1 << 18 | 1 << 22);
    // SAFETY: bits without effect here.
    let written = unsafe { probe_wrmsr(MISC_ENABLE, new) };
    ensure!(written.is_ok(), "WRMSR faults");
    ensure_eq!(cpu::rdmsr(MISC_ENABLE), new, "IA32_MISC_ENABLE");
    // SAFETY: back to what it was; then a reserved bit, which faults.
    let (back, reserved) = unsafe {
        (
            probe_wrmsr(MISC_ENABLE, old),
            probe_wrmsr(MISC_ENABLE, old | 1 << 63),
        )
    };
    ensure!(back.is_ok() && reserved.is_err(), "a reserved bit is taken");
    Ok(())
}

/// What the processor refuses, or Plinth in its place.
fn reserved_control_bits(machine: &Machine) -> Verdict {
    skip_if!(
        machine.host == Host::Tcg,
        "QEMU takes some of them or hangs"
    );
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    for (what, value) in [
        ("CR0 bit 32", cr0 | 1 << 32),
        ("NW without CD", cr0 & !(1 << 30) | 1 << 29),
        ("PG without PE", cr0 & !1),
        ("PG cleared in 64-bit code", cr0 & !(1 << 31)),
    ] {
        // QEMU's processor beneath Plinth makes its own mistakes where Plinth is not asked.
        if cpu::vendor() != *b"GenuineIntel" {
            break;
        }
        // SAFETY: faults, and changes nothing.
        let trap = unsafe { probe!("mov cr0, {}"; in(reg) value) };
        expect_fault(trap, vector::GENERAL_PROTECTION, 0, what)?;
    }
    for (what, value) in [
        ("PAE cleared in long mode", cr4 & !(1 << 5)),
        ("VMXE", cr4 | 1 << 13),
        ("CR4 bit 31", cr4 | 1 << 31),
        ("CR4 bit 40", cr4 | 1 << 40),
    ] {
        // SAFETY: faults, and changes nothing.
        let trap = unsafe { probe!("mov cr4, {}"; in(reg) value) };
        expect_fault(trap, vector::GENERAL_PROTECTION, 0, what)?;
    }
    Ok(())
}

fn task_switches(_: &Machine) -> Verdict {
    let wrong = legacy::run(legacy::Code::Tasks);
    ensure_eq!(wrong, 0, "what went wrong in task switches");
    Ok(())
}

/// Five-level paging is there as a whole, or CR4.LA57 is a reserved bit and addresses have 48 bits.
fn five_level_paging(_: &Machine) -> Verdict {
    const LA57: u32 = 1 << 16;
    let shown = cpu::cpuid(0, 0).eax >= 7 && cpu::cpuid(7, 0).ecx & LA57 != 0;
    let faults = legacy::run(legacy::Code::FiveLevels);
    ensure_eq!(faults, u32::from(!shown), "faults by CR4.LA57");
    let linear_bits = cpu::cpuid(0x8000_0008, 0).eax >> 8 & 0xFF;
    let wanted = if shown { 57 } else { 48 };
    ensure_eq!(linear_bits, wanted, "linear address bits");
    Ok(())
}

/// A VM entry would refuse such entries: the guest must get #GP.
fn bad_pdptes(machine: &Machine) -> Verdict {
    let native = cpu::vendor() != *b"GenuineIntel" || machine.host == Host::Tcg;
    skip_if!(
        native,
        "with nested paging AMD's processors check them later"
    );
    let faults = legacy::run(legacy::Code::BadPdptes);
    ensure_eq!(faults, 1, "faults");
    Ok(())
}

/// Ports by the TSS's map, and what needs IOPL: the processor's checks come before any exit.
fn virtual_8086(_: &Machine) -> Verdict {
    let faulted = legacy::run(legacy::Code::Virtual8086);
    // The places of the instructions, as `legacy.s` has them.
    let wanted = [0, 4, 9, 11, 12, 13, 14, 15, 16]
        .iter()
        .fold(0, |bits, place| bits | 1_u32 << place);
    ensure_eq!(faulted, wanted, "instructions that faulted");
    Ok(())
}
