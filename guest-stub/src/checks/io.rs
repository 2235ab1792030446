//! Ports and memory-mapped registers, by all the instructions that may touch them.

use core::arch::asm;

use crate::apic::{self, Register};
use crate::console::{self, COM1, register};
use crate::cpu::{PageFaultCode, port};
use crate::interrupts::vector;
use crate::machine::{Host, Machine};
use crate::memory::{self, PAGE};
use crate::paging::{self, Entry};
use crate::{checks, ensure, ensure_eq, probe, skip, skip_if};

use super::{Verdict, scratch, trapped};

checks![
    diagnostic_port,
    unclaimed_ports,
    scratch_register,
    wide_access,
    string_out,
    string_in,
    string_fault,
    uart_loopback,
    pci_configuration,
    mmio_moves,
    mmio_addressing,
    mmio_arithmetic,
    mmio_strings,
    ioapic_access,
];

const DIAGNOSTIC: u16 = 0x80;
const SCRATCH: u16 = COM1 + register::SCRATCH;

/// Writes to port 0x80 pass at all widths.
fn diagnostic_port(_: &Machine) -> Verdict {
    for value in 0..=255 {
        port::write8(DIAGNOSTIC, value);
    }
    // SAFETY: the port is for diagnostics; the immediate form is another opcode.
    unsafe { asm!("out 0x80, al", "out 0x80, ax", "out 0x80, eax", in("eax") 0) };
    Ok(())
}

/// Ports of no device read as ones, and ignore writes.
fn unclaimed_ports(_: &Machine) -> Verdict {
    for number in [0x0240, 0x0F50, 0x2F50] {
        port::write8(number, 0);
        port::write16(number, 0);
        port::write32(number, 0);
        ensure_eq!(port::read8(number), u8::MAX, "8 bits of port {number:#x}");
        ensure_eq!(
            port::read16(number),
            u16::MAX,
            "16 bits of port {number:#x}"
        );
        ensure_eq!(
            port::read32(number),
            u32::MAX,
            "32 bits of port {number:#x}"
        );
    }
    // The upper part of RAX: kept by 8 and 16 bits, cleared by 32.
    let (byte, word, double): (u64, u64, u64);
    // SAFETY: no device is there.
    unsafe {
        asm!("in al, dx", "xchg rax, rsi", "in ax, dx", "xchg rax, rdi", "in eax, dx",
            in("dx") 0x240_u16,
            inout("rax") 0x1111_1111_1111_1111_u64 => double,
            inout("rsi") 0x2222_2222_2222_2222_u64 => byte,
            inout("rdi") 0x3333_3333_3333_3333_u64 => word);
    }
    ensure_eq!(byte, 0x1111_1111_1111_11FF, "RAX after IN AL");
    ensure_eq!(word, 0x2222_2222_2222_FFFF, "RAX after IN AX");
    ensure_eq!(double, 0x0000_0000_FFFF_FFFF, "RAX after IN EAX");
    Ok(())
}

/// The UART's scratch register keeps every value.
fn scratch_register(_: &Machine) -> Verdict {
    for value in 0..=255 {
        port::write8(SCRATCH, value);
        ensure_eq!(port::read8(SCRATCH), value, "scratch register");
    }
    Ok(())
}

/// A wide access to byte registers is made of byte accesses.
fn wide_access(machine: &Machine) -> Verdict {
    port::write8(SCRATCH, 0x5A);
    let word = port::read16(COM1 + register::MODEM_STATUS);
    ensure_eq!(
        word >> 8,
        0x5A,
        "scratch register as the high byte of 16 bits"
    );
    // Bochs (2.7) does not split 32 bits.
    if machine.host == Host::Bochs {
        return Ok(());
    }
    // Line control, modem control, line status, modem status.
    let control = port::read8(COM1 + register::LINE_CONTROL);
    let double = port::read32(COM1 + register::LINE_CONTROL);
    ensure_eq!(
        double as u8,
        control,
        "line control as the low byte of 32 bits"
    );
    Ok(())
}

/// REP OUTS, forwards, backwards, and not at all.
fn string_out(_: &Machine) -> Verdict {
    let bytes = *b"string output";
    let (left, end): (u64, *const u8);
    // SAFETY: reads a local; the register keeps what it gets.
    unsafe {
        asm!("rep outsb", in("dx") SCRATCH, inout("rcx") bytes.len() as u64 => left,
            inout("rsi") bytes.as_ptr() => end);
    }
    ensure_eq!(left, 0, "RCX after REP OUTSB");
    ensure_eq!(
        end as u64,
        bytes.as_ptr() as u64 + bytes.len() as u64,
        "RSI after REP OUTSB"
    );
    ensure_eq!(port::read8(SCRATCH), b't', "last byte of REP OUTSB");

    let last = bytes.as_ptr().wrapping_add(bytes.len() - 1);
    // SAFETY: reads a local backwards; DF is cleared again.
    unsafe {
        asm!("std", "rep outsb", "cld", in("dx") SCRATCH,
            inout("rcx") bytes.len() as u64 => _, inout("rsi") last => _);
    }
    ensure_eq!(
        port::read8(SCRATCH),
        b's',
        "last byte of REP OUTSB backwards"
    );

    port::write8(SCRATCH, 0x77);
    // SAFETY: a count of zero reads nothing.
    unsafe { asm!("rep outsb", in("dx") SCRATCH, inout("rcx") 0_u64 => _, inout("rsi") last => _) };
    ensure_eq!(
        port::read8(SCRATCH),
        0x77,
        "scratch register after REP OUTSB of nothing"
    );

    let words = [1_u32, 2, 3, 4];
    let end: *const u32;
    // SAFETY: reads a local; the port is for diagnostics.
    unsafe {
        asm!("rep outsd", "rep outsw", "outsb", in("dx") DIAGNOSTIC,
            inout("rcx") 3_u64 => _, inout("rsi") words.as_ptr() => end);
    }
    ensure_eq!(
        end as u64,
        words.as_ptr() as u64 + 13,
        "RSI after OUTSD, OUTSW, OUTSB"
    );
    Ok(())
}

/// REP INS, forwards, backwards, across a page boundary.
fn string_in(machine: &Machine) -> Verdict {
    port::write8(SCRATCH, 0x3C);
    let mut bytes = [0_u8; 24];
    let end: *mut u8;
    // SAFETY: writes a local, sixteen bytes of it.
    unsafe {
        asm!("rep insb", in("dx") SCRATCH, inout("rcx") 16_u64 => _,
            inout("rdi") bytes.as_mut_ptr() => end);
    }
    ensure_eq!(end as u64, bytes.as_ptr() as u64 + 16, "RDI after REP INSB");
    ensure!(
        bytes[..16].iter().all(|&byte| byte == 0x3C),
        "REP INSB: {:x?}",
        &bytes[..16]
    );
    ensure!(
        bytes[16..].iter().all(|&byte| byte == 0),
        "beyond: {:x?}",
        &bytes[16..]
    );

    let boundary = scratch(machine)? + PAGE;
    memory::write64(boundary - 8, 0);
    memory::write64(boundary, 0);
    // SAFETY: free RAM; DF is cleared again.
    unsafe {
        asm!("std", "rep insb", "cld", in("dx") SCRATCH, inout("rcx") 6_u64 => _,
            inout("rdi") boundary + 2 => _);
    }
    ensure_eq!(
        memory::read64(boundary - 8),
        0x3C3C_3C00_0000_0000,
        "before the boundary"
    );
    ensure_eq!(memory::read64(boundary), 0x003C_3C3C, "after the boundary");

    let mut words = [0_u16; 4];
    // SAFETY: writes a local. No device is there.
    unsafe {
        asm!("rep insw", in("dx") 0x240_u16, inout("rcx") 3_u64 => _,
            inout("rdi") words.as_mut_ptr() => _);
    }
    ensure!(words == [0xFFFF, 0xFFFF, 0xFFFF, 0], "REP INSW: {words:x?}");
    Ok(())
}

/// A page fault in the middle of string I/O: what was done counts, the rest can be resumed.
fn string_fault(machine: &Machine) -> Verdict {
    let base = scratch(machine)?;
    port::write8(SCRATCH, 0xC3);
    let page = paging::map(0, base, Entry::PRESENT | Entry::WRITABLE);
    paging::unmap(1);
    let (mut count, mut target) = (10_u64, page + PAGE - 4);
    // SAFETY: free RAM, then a fault, which is caught.
    let trap =
        unsafe { probe!("rep insb"; in("dx") SCRATCH, inout("rcx") count, inout("rdi") target) };
    let trap = trapped(trap, "REP INSB into no page")?;
    let right = trap.vector == vector::PAGE_FAULT
        && trap.page_fault_code() == PageFaultCode::WRITE
        && trap.offset == 0;
    ensure!(right, "REP INSB into no page: {trap}");
    ensure_eq!(trap.address, page + PAGE, "CR2");
    ensure_eq!(count, 6, "RCX at the fault");
    ensure_eq!(target, page + PAGE, "RDI at the fault");
    ensure_eq!(
        memory::read32(base + PAGE - 4),
        0xC3C3_C3C3,
        "bytes before the fault"
    );

    paging::map(1, base + PAGE, Entry::PRESENT | Entry::WRITABLE);
    // SAFETY: free RAM.
    let trap =
        unsafe { probe!("rep insb"; in("dx") SCRATCH, inout("rcx") count, inout("rdi") target) };
    ensure!(
        trap.is_none() && (count, target) == (0, page + PAGE + 6),
        "the rest of REP INSB"
    );
    ensure_eq!(
        memory::read32(base + PAGE),
        0xC3C3_C3C3,
        "bytes after the fault"
    );

    // Reading from no page: nothing goes out.
    paging::unmap(1);
    let (mut count, mut source) = (3_u64, page + PAGE);
    // SAFETY: faults at once, which is caught.
    let trap =
        unsafe { probe!("rep outsb"; in("dx") SCRATCH, inout("rcx") count, inout("rsi") source) };
    let trap = trapped(trap, "REP OUTSB from no page")?;
    ensure!(
        trap.vector == vector::PAGE_FAULT && trap.error == 0,
        "REP OUTSB: {trap}"
    );
    ensure!(
        (count, source) == (3, page + PAGE),
        "REP OUTSB moved: {count}, {source:#x}"
    );
    paging::unmap(0);
    Ok(())
}

/// The UART's loop: bytes come back, and modem controls show as modem status.
fn uart_loopback(_: &Machine) -> Verdict {
    const LOOP: u8 = 1 << 4;
    const OUT2_OUT1_RTS_DTR: u8 = 0xF;
    console::drain();
    let control = port::read8(COM1 + register::MODEM_CONTROL);
    port::write8(COM1 + register::MODEM_CONTROL, LOOP | OUT2_OUT1_RTS_DTR);
    let all = port::read8(COM1 + register::MODEM_STATUS) >> 4;
    port::write8(COM1 + register::MODEM_CONTROL, LOOP | 0b1010);
    let some = port::read8(COM1 + register::MODEM_STATUS) >> 4;
    let text = *b"looped";
    // SAFETY: reads a local; in the loop nothing leaves.
    unsafe {
        asm!("rep outsb", in("dx") COM1, inout("rcx") text.len() as u64 => _,
            inout("rsi") text.as_ptr() => _);
    }
    let mut back = [0_u8; 6];
    for slot in &mut back {
        // A byte takes its time on the line.
        for _ in 0..1_000_000 {
            if let Some(byte) = console::try_receive() {
                *slot = byte;
                break;
            }
        }
    }
    console::drain();
    port::write8(COM1 + register::MODEM_CONTROL, control);
    ensure_eq!(all, 0xF, "modem status, all on");
    // RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
    ensure_eq!(some, 0b1001, "modem status with RTS and OUT2");
    ensure!(back == text, "bytes from the loop: {back:x?}");
    Ok(())
}

/// PCI configuration mechanism 1: a host bridge, nothing where nothing is, all widths.
fn pci_configuration(_: &Machine) -> Verdict {
    const ADDRESS: u16 = 0xCF8;
    const DATA: u16 = 0xCFC;
    const ENABLE: u32 = 1 << 31;
    port::write32(ADDRESS, ENABLE);
    ensure_eq!(port::read32(ADDRESS), ENABLE, "address register");
    let identity = port::read32(DATA);
    skip_if!(identity == u32::MAX, "no PCI");
    ensure!(identity != 0, "host bridge without an identity");
    let words = [port::read16(DATA), port::read16(DATA + 2)];
    let bytes = [0, 1, 2, 3].map(|offset| port::read8(DATA + offset));
    ensure_eq!(
        u32::from(words[1]) << 16 | u32::from(words[0]),
        identity,
        "by 16 bits"
    );
    ensure_eq!(u32::from_le_bytes(bytes), identity, "by 8 bits");
    port::write32(ADDRESS, ENABLE | 8);
    ensure_eq!(port::read32(DATA) >> 16, 0x0600, "class of the host bridge");
    port::write32(ADDRESS, ENABLE | 31 << 11);
    let last = port::read32(DATA);
    // A q35 has its LPC bridge in slot 31; bus 0xEE is empty everywhere.
    ensure!(
        last == u32::MAX || last & 0xFFFF == 0x8086,
        "slot 31: {last:#x}"
    );
    port::write32(ADDRESS, ENABLE | 0xEE << 16);
    ensure_eq!(port::read32(DATA), u32::MAX, "bus 0xEE");
    port::write32(ADDRESS, 0);
    ensure_eq!(
        port::read32(DATA),
        u32::MAX,
        "configuration space while disabled"
    );
    Ok(())
}

/// A register of the local APIC that keeps 32 bits and does nothing while its LVT is masked.
fn memory_register() -> *mut u32 {
    apic::local().address(Register::InitialCount)
}

/// Checks the register after an instruction.
fn holds(value: u32, instruction: &str) -> Verdict {
    ensure_eq!(
        apic::local().read(Register::InitialCount),
        value,
        "{instruction}"
    );
    Ok(())
}

/// All kinds of plain moves.
fn mmio_moves(_: &Machine) -> Verdict {
    let register = memory_register();
    let got: u64;
    // SAFETY: the register does nothing (above); so for the blocks below.
    unsafe { asm!("mov [{}], {:e}", in(reg) register, in(reg) 0x8765_4321_u32) };
    holds(0x8765_4321, "MOV m, r")?;
    // SAFETY: as above.
    unsafe { asm!("mov dword ptr [{}], 0x1A2B3C4D", in(reg) register) };
    holds(0x1A2B_3C4D, "MOV m, imm")?;
    // SAFETY: as above.
    unsafe {
        asm!("movabs [{}], eax", const 0xFEE0_0380_u64, in("eax") 0x99AA_BBCC_u32);
    }
    holds(0x99AA_BBCC, "MOV moffs, EAX")?;
    // SAFETY: as above.
    unsafe { asm!("mov rax, -1", "movabs eax, [{}]", const 0xFEE0_0380_u64, out("rax") got) };
    ensure_eq!(got, 0x99AA_BBCC, "MOV EAX, moffs");
    let got: u64;
    // SAFETY: as above.
    unsafe { asm!("mov {0}, -1", "mov {0:e}, [{1}]", out(reg) got, in(reg) register) };
    ensure_eq!(got, 0x99AA_BBCC, "MOV r, m clears the upper half");
    let got: u64;
    // SAFETY: as above.
    unsafe { asm!("movsxd {}, dword ptr [{}]", out(reg) got, in(reg) register) };
    ensure_eq!(got, 0xFFFF_FFFF_99AA_BBCC, "MOVSXD r, m");
    // SAFETY: as above.
    unsafe { asm!("movnti [{}], {:e}", in(reg) register, in(reg) 0x0102_0304_u32) };
    holds(0x0102_0304, "MOVNTI m, r")
}

/// All kinds of address forms and registers.
fn mmio_addressing(_: &Machine) -> Verdict {
    let register = memory_register() as u64;
    // SAFETY: the register does nothing; RBX and RBP are not used.
    unsafe {
        asm!("mov dword ptr [rsi + 4 * rdi - 0x40], 0x11111111", in("rsi") register, in("rdi") 16_u64);
    }
    holds(0x1111_1111, "base, index, disp8")?;
    // SAFETY: as above.
    unsafe {
        asm!("mov [r12 + 0x12345], r15d", in("r12") register - 0x12345, in("r15") 0x2222_2222)
    };
    holds(0x2222_2222, "R12, disp32, R15")?;
    // SAFETY: as above.
    unsafe { asm!("mov [r13], r8d", in("r13") register, in("r8") 0x3333_3333) };
    holds(0x3333_3333, "R13")?;
    // SAFETY: as above.
    unsafe { asm!("mov [8 * r9], r10d", in("r9") register / 8, in("r10") 0x4444_4444) };
    holds(0x4444_4444, "index only")?;
    // SAFETY: as above. The base of DS is not used in long mode.
    unsafe { asm!("mov ds:[edi], r11d", in("rdi") register | 0xFFFF << 32, in("r11") 0x5555_5555) };
    holds(0x5555_5555, "32-bit address")?;
    // SAFETY: FS is not used otherwise.
    unsafe {
        crate::cpu::wrmsr(crate::cpu::msr::FS_BASE, register - 0x100);
        asm!("mov fs:[rdi], r11d", in("rdi") 0x100_u64, in("r11") 0x6666_6666);
    }
    holds(0x6666_6666, "FS base")
}

/// Instructions that read and write memory in one.
fn mmio_arithmetic(_: &Machine) -> Verdict {
    let register = memory_register();
    let local = apic::local();
    macro_rules! modify {
        ($before:expr, $after:expr, $text:literal $(, $operand:expr)?) => {
            local.write(Register::InitialCount, $before);
            // SAFETY: the register does nothing.
            unsafe { asm!($text, in("rdi") register $(, in("esi") $operand)?) };
            holds($after, $text)?;
        };
    }
    modify!(0xFF00_FF00, 0x0F00_0F00, "and [rdi], esi", 0x0F0F_0F0F_u32);
    modify!(0xF000_0000, 0xF000_00FF, "or dword ptr [rdi], 0xFF");
    modify!(0x0000_0001, 0x8000_0001, "or dword ptr [rdi], 0x80000000");
    modify!(0xFFFF_0000, 0x0000_FFFF, "xor dword ptr [rdi], -1");
    modify!(0x0000_0010, 0x0000_0031, "add [rdi], esi", 0x21_u32);
    modify!(0x0000_0010, 0x0000_000F, "sub dword ptr [rdi], 1");
    modify!(0x0000_0010, 0x0000_0011, "inc dword ptr [rdi]");
    modify!(0x0000_0010, 0x0000_000F, "dec dword ptr [rdi]");
    modify!(0x0000_00FF, 0xFFFF_FF00, "not dword ptr [rdi]");
    modify!(0x0000_0001, 0xFFFF_FFFF, "neg dword ptr [rdi]");
    modify!(0x0000_0001, 0x0000_0011, "bts dword ptr [rdi], 4");
    modify!(0x0000_0011, 0x0000_0001, "btr dword ptr [rdi], 4");

    local.write(Register::InitialCount, 0x1234);
    let old: u32;
    // SAFETY: the register does nothing; so for the blocks below.
    unsafe { asm!("xchg [{}], {:e}", in(reg) register, inout(reg) 0x5678_u32 => old) };
    ensure_eq!(old, 0x1234, "XCHG's register");
    holds(0x5678, "XCHG")?;
    let old: u32;
    // SAFETY: as above.
    unsafe { asm!("lock xadd [{}], {:e}", in(reg) register, inout(reg) 8_u32 => old) };
    ensure_eq!(old, 0x5678, "XADD's register");
    holds(0x5680, "XADD")?;
    let equal: u8;
    // SAFETY: as above.
    unsafe {
        asm!("lock cmpxchg [{}], {:e}", "sete {}", in(reg) register, in(reg) 0x77_u32,
            out(reg_byte) equal, inout("eax") 0x5680 => _);
    }
    ensure_eq!(equal, 1, "ZF after CMPXCHG");
    holds(0x77, "CMPXCHG")?;

    let (equal, test, below): (u8, u8, u8);
    // SAFETY: as above.
    unsafe {
        asm!("cmp dword ptr [{0}], 0x77", "sete {1}", "test dword ptr [{0}], 0x88", "setz {2}",
            "mov {4:e}, 0x78", "cmp [{0}], {4:e}", "setb {3}",
            in(reg) register, out(reg_byte) equal, out(reg_byte) test, out(reg_byte) below,
            out(reg) _);
    }
    ensure!(
        (equal, test, below) == (1, 1, 1),
        "flags of CMP, TEST, CMP: {equal}{test}{below}"
    );
    let sum: u32;
    // SAFETY: as above.
    unsafe { asm!("add {:e}, [{}]", inout(reg) 0x100_u32 => sum, in(reg) register) };
    ensure_eq!(sum, 0x177, "ADD r, m");
    Ok(())
}

/// String instructions to and from a register.
fn mmio_strings(_: &Machine) -> Verdict {
    let register = memory_register();
    let got: u32;
    // SAFETY: the register does nothing.
    unsafe { asm!("stosd", inout("rdi") register => _, in("eax") 0x1357_9BDF) };
    holds(0x1357_9BDF, "STOSD")?;
    // SAFETY: as above.
    unsafe { asm!("lodsd", inout("rsi") register => _, out("eax") got) };
    ensure_eq!(got, 0x1357_9BDF, "LODSD");
    let source = [0x0246_8ACE_u32];
    // SAFETY: as above; reads a local.
    unsafe { asm!("movsd", inout("rsi") source.as_ptr() => _, inout("rdi") register => _) };
    holds(0x0246_8ACE, "MOVSD to the register")?;
    let mut target = [0_u32; 1];
    // SAFETY: as above; writes a local.
    unsafe { asm!("movsd", inout("rsi") register => _, inout("rdi") target.as_mut_ptr() => _) };
    ensure_eq!(target[0], 0x0246_8ACE, "MOVSD from the register");
    Ok(())
}

/// The IOAPIC by index and data, and that its reserved bits stay clear.
fn ioapic_access(machine: &Machine) -> Verdict {
    let Some(ioapic) = machine.ioapic else {
        skip!("no IOAPIC");
    };
    ensure!(
        (16..=240).contains(&ioapic.entries()),
        "{} entries",
        ioapic.entries()
    );
    for pin in [3, 5, ioapic.entries() - 1] {
        let wanted = apic::MASKED | apic::LEVEL | apic::ACTIVE_LOW | 0x91;
        ioapic.route(pin, wanted, 0);
        ensure_eq!(ioapic.entry(pin), wanted, "entry of pin {pin}");
        ioapic.route(pin, apic::MASKED, 0);
    }
    // Delivery status and remote IRR cannot be written.
    ioapic.route(
        5,
        apic::MASKED | apic::LEVEL | apic::REMOTE_IRR | apic::PENDING,
        0,
    );
    ensure_eq!(
        ioapic.entry(5),
        apic::MASKED | apic::LEVEL,
        "entry with read-only bits"
    );
    Ok(())
}
