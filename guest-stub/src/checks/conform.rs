//! What public test suites for hypervisors look at beyond the other groups.
//!
//! Where values have to come from a device, it is the memory of the test device; those checks are skipped where
//! there is none.

use core::arch::{asm, global_asm};

use crate::apic::{self, Register};
use crate::cpu::{self, Cr4, Leaf1Ecx, Leaf7Ebx, Rflags, port};
use crate::interrupts::{count, gdt, hook, only_count, probe_rdmsr, vector};
use crate::machine::{Host, Machine};
use crate::memory::{self, PAGE, physical_bits};
use crate::paging::{self, Entry};
use crate::smp;
use crate::{checks, ensure, ensure_eq, fail, probe, skip_if};

use super::emulator::{DEVICE, NO_DEVICE, no_device};
use super::{Verdict, expect_fault, scratch, trapped};

checks![
    segments_from_device,
    code_in_device,
    fpu_to_device,
    page_table_flags,
    reserved_page_table_bits,
    xsetbv_switched_off,
    general_detect,
    invpcid_misuse,
    deadline_by_any_tsc,
    no_nmi_by_shorthand,
    interrupts_by_hypercall,
    platform_info,
    sleep_and_wake,
    resume_flag,
    last_canonical_bytes,
];

/// The processor's checks of a selector, with the register as it was after a fault.
fn segments_from_device(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    let data: u16;
    // SAFETY: reads a selector.
    unsafe { asm!("mov {0:x}, ss", out(reg) data, options(nomem, nostack, preserves_flags)) };
    memory::write32(DEVICE, data.into());
    let got: u16;
    // SAFETY: FS is not used, and null again in the end.
    let trap = unsafe {
        probe!("mov fs, [{at}]", "mov {got:x}, fs", "mov fs, {none:x}";
            at = in(reg) DEVICE, got = out(reg) got, none = in(reg) 0_u32)
    };
    ensure!(trap.is_none(), "MOV FS traps");
    ensure_eq!(got, data, "FS");
    let (_, limit) = gdt();
    let beyond = u32::from(limit | 7) + 1;
    memory::write32(DEVICE, beyond);
    // SAFETY: faults.
    let trap = unsafe { probe!("mov fs, [{}]"; in(reg) DEVICE) };
    let selector = u64::from(beyond);
    expect_fault(
        trap,
        vector::GENERAL_PROTECTION,
        selector,
        "a selector beyond the table",
    )?;
    memory::write32(DEVICE, 3);
    // SAFETY: faults.
    let trap = unsafe { probe!("mov ss, [{}]"; in(reg) DEVICE) };
    expect_fault(
        trap,
        vector::GENERAL_PROTECTION,
        0,
        "null in SS, of another level",
    )?;
    memory::write32(DEVICE, 0);
    let got: u16;
    // SAFETY: in 64-bit code at level 0 SS may be null; it is put back at once.
    let trap = unsafe {
        probe!("mov ss, [{at}]", "mov {got:x}, ss", "mov ss, {data:x}";
            at = in(reg) DEVICE, got = out(reg) got, data = in(reg) u32::from(data))
    };
    ensure!(trap.is_none(), "null in SS traps");
    ensure_eq!(got, 0, "SS");
    let rsp = DEVICE + 0x800;
    memory::write64(rsp, data.into());
    let (got, after): (u16, u64);
    // SAFETY: interrupts are off, and the stack is back when the probe ends.
    let trap = unsafe {
        probe!("mov {after}, rsp", "mov rsp, {at}", ".byte 0x0f, 0xa9", "xchg {after}, rsp", "mov {got:x}, gs",
            "mov gs, {none:x}";
            at = in(reg) rsp, after = out(reg) after, got = out(reg) got, none = in(reg) 0_u32)
    };
    ensure!(trap.is_none(), "POP GS traps");
    ensure_eq!(
        (u64::from(got) << 32) + (after - rsp),
        (u64::from(data) << 32) + 8,
        "GS and the stack"
    );
    Ok(())
}

// Runs wherever it is copied to. Gives 0x1234 in EAX if all went well.
global_asm!(
    ".section .text.device_code, \"ax\"",
    "device_code:",
    "pushfq",
    "popfq",
    "std",
    "cld",
    "stc",
    "clc",
    "cmc",
    "lahf",
    "sahf",
    "mov ecx, 3",
    "xor edx, edx",
    "2: inc edx",
    "loop 2b",
    "jrcxz 3f",
    "ud2",
    "3: cmp edx, 3",
    "jne 9f",
    "mov eax, cs",
    "push rax",
    "lea rax, [rip + 4f]",
    "push rax",
    "retfq",
    "ud2",
    "4: mov rdx, rsp",
    "mov eax, ss",
    "push rax",
    "push rdx",
    "pushfq",
    "mov eax, cs",
    "push rax",
    "lea rax, [rip + 5f]",
    "push rax",
    "iretq",
    "ud2",
    "5: cmp rdx, rsp",
    "jne 9f",
    "mov eax, 0x80000000",
    "cdq",
    "cmp edx, -1",
    "jne 9f",
    "in al, 0x61",
    "out 0x80, al",
    "sub rsp, 16",
    "mov word ptr [rsp + 8], cs",
    "lea rax, [rip + 6f]",
    "mov [rsp], rax",
    ".byte 0x48, 0xff, 0x2c, 0x24", // jmp far m16:64 at [rsp]
    "ud2",
    "6: add rsp, 16",
    "mov ecx, 0x1b",
    "rdmsr",
    "test eax, 0x100",
    "jz 9f",
    "wrmsr",
    "rdtsc",
    "shl rdx, 32",
    "or rdx, rax",
    "jz 9f",
    "xor eax, eax",
    "mov r8, rbx",
    "cpuid",
    "xchg r8, rbx",
    "test eax, eax",
    "jz 9f",
    "mov rax, dr7",
    "test eax, 0x400",
    "jz 9f",
    "mov rcx, dr3",
    "mov eax, 0x7777",
    "mov dr3, rax",
    "xor eax, eax",
    "mov rax, dr3",
    "mov dr3, rcx",
    "cmp eax, 0x7777",
    "jne 9f",
    "pause",
    "mfence",
    "wbinvd",
    "invlpg [rsp]",
    "mov eax, cs",
    "verr ax",
    "jnz 9f",
    "verw ax",
    "jz 9f",
    "lsl ecx, eax",
    "jnz 9f",
    "lar ecx, eax",
    "jnz 9f",
    "mov eax, 0x1234",
    "ret",
    "9: xor eax, eax",
    "ret",
    "device_code_end:",
    ".text",
);

unsafe extern "C" {
    static device_code: u8;
    static device_code_end: u8;
}

/// Far returns, flags, loops, ports, and what else exits or never would, in code that is in device memory.
fn code_in_device(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    copy_device_code();
    run_device_code()
}

fn copy_device_code() {
    let from = &raw const device_code;
    let bytes = &raw const device_code_end as usize - from as usize;
    // SAFETY: the code lies between its two labels and never changes.
    let code = unsafe { core::slice::from_raw_parts(from, bytes) };
    memory::write_bytes(DEVICE + 0x1000, code);
}

fn run_device_code() -> Verdict {
    let result: u64;
    // SAFETY: the code keeps to its stack and changes only the registers named.
    let trap = unsafe {
        probe!("call {at}"; at = in(reg) DEVICE + 0x1000, out("rax") result, out("rcx") _, out("rdx") _, out("r8") _)
    };
    if let Some(trap) = trap {
        fail!("code in device memory: {trap}");
    }
    ensure_eq!(result, 0x1234, "what the code found");
    Ok(())
}

/// The FPU's control words and its whole state.
fn fpu_to_device(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    // Fewer components than there may be: they are the guest's choice whatever the hypervisor does to reach a register.
    const X87_SSE: u64 = 3;
    let components = cpu::leaf1_ecx().contains(Leaf1Ecx::XSAVE).then(|| {
        // SAFETY: it turns on XSAVE and its kin, which nobody uses by chance.
        unsafe { cpu::set_cr4(cpu::cr4() | Cr4::OSXSAVE.bits()) };
        let before = cpu::xcr0();
        cpu::set_xcr0(X87_SSE);
        before
    });
    let seed = 0x1122_3344_5566_7788_u64;
    let got: u64;
    // SAFETY: this program's own code does not use the FPU.
    let trap = unsafe {
        probe!("fninit", "movq xmm3, {seed}", "stmxcsr [{at} + 0x400]", "fnstcw [{at} + 0x404]",
            "fxsave64 [{at}]", "pxor xmm3, xmm3", "fxrstor64 [{at}]", "movq {got}, xmm3",
            "ldmxcsr [{at} + 0x400]";
            at = in(reg) DEVICE + 0x2000, seed = in(reg) seed, got = out(reg) got)
    };
    if let Some(before) = components {
        let after = cpu::xcr0();
        cpu::set_xcr0(before);
        ensure_eq!(after, X87_SSE, "XCR0");
    }
    ensure!(trap.is_none(), "the FPU and a device trap");
    ensure_eq!(got, seed, "XMM3 after FXRSTOR");
    ensure_eq!(
        memory::read64(DEVICE + 0x2000 + 160 + 48),
        seed,
        "XMM3 in the image"
    );
    ensure_eq!(
        memory::read64(DEVICE + 0x2400) & 0xffff_ffff_ffff,
        0x037f_0000_1f80,
        "control words"
    );
    memory::write32(DEVICE + 0x2400, 1 << 31);
    // SAFETY: faults.
    let trap = unsafe { probe!("ldmxcsr [{}]"; in(reg) DEVICE + 0x2400) };
    expect_fault(
        trap,
        vector::GENERAL_PROTECTION,
        0,
        "a reserved bit of MXCSR",
    )
}

/// A page that the hypervisor's own walk is the first to reach.
fn page_table_flags(machine: &Machine) -> Verdict {
    let scratch = scratch(machine)?;
    let page = paging::map(0, scratch, Entry::PRESENT | Entry::WRITABLE);
    // SAFETY: writes free RAM, with what comes from a device.
    let trap =
        unsafe { probe!("movsb"; inout("rsi") 0xfec0_0000_u64 => _, inout("rdi") page => _) };
    let flags = paging::flags(0);
    paging::unmap(0);
    ensure!(trap.is_none(), "MOVS from a device traps");
    let wanted = Entry::ACCESSED | Entry::DIRTY;
    ensure!(flags.contains(wanted), "the page has {flags:?}");
    Ok(())
}

fn reserved_page_table_bits(machine: &Machine) -> Verdict {
    let bits = physical_bits();
    skip_if!(bits >= 52, "there is no reserved bit");
    skip_if!(machine.host == Host::Tcg, "QEMU's own");
    let scratch = scratch(machine)?;
    let reserved = Entry::from_bits_retain(1 << bits);
    let page = paging::map(0, scratch, Entry::PRESENT | Entry::WRITABLE | reserved);
    // SAFETY: faults.
    let trap = unsafe {
        probe!("movsb"; inout("rsi") 0xfec0_0000_u64 => _, inout("rdi") page + PAGE / 2 => _)
    };
    paging::unmap(0);
    expect_fault(trap, vector::PAGE_FAULT, 0b1011, "a reserved bit")
}

/// Without OSXSAVE the instruction is not there.
fn xsetbv_switched_off(_: &Machine) -> Verdict {
    skip_if!(!cpu::leaf1_ecx().contains(Leaf1Ecx::XSAVE), "no XSAVE");
    let cr4 = cpu::cr4();
    // SAFETY: nothing here uses XSAVE, and the bit is put back.
    unsafe { cpu::set_cr4(cr4 & !Cr4::OSXSAVE.bits()) };
    // SAFETY: faults.
    let trap = unsafe { probe!("xsetbv"; in("ecx") 0, in("eax") 1, in("edx") 0) };
    // SAFETY: as it was.
    unsafe { cpu::set_cr4(cr4) };
    expect_fault(trap, vector::INVALID_OPCODE, 0, "XSETBV")
}

/// DR7.GD: an access to a debug register traps before it, and the bit is clear in the handler.
fn general_detect(machine: &Machine) -> Verdict {
    const GD: u64 = 1 << 13;
    const BD: u64 = 1 << 13;
    skip_if!(
        machine.host == Host::Tcg || cpu::vendor() != *b"GenuineIntel",
        "QEMU's processor has no such bit"
    );
    // SAFETY: only status bits.
    unsafe { cpu::set_dr6(0) };
    // SAFETY: traps before the second instruction; no breakpoint is set.
    let trap = unsafe { probe!("mov dr7, {gd}", "mov {gd}, dr0"; gd = inout(reg) 0x400 | GD => _) };
    let trap = trapped(trap, "an access with DR7.GD")?;
    ensure!(
        trap.vector == vector::DEBUG,
        "an access with DR7.GD: {trap}"
    );
    ensure_eq!(cpu::dr6() & BD, BD, "DR6.BD");
    // SAFETY: only status bits.
    unsafe { cpu::set_dr6(0) };
    Ok(())
}

fn invpcid_misuse(_: &Machine) -> Verdict {
    skip_if!(!cpu::leaf7_ebx().contains(Leaf7Ebx::INVPCID), "no INVPCID");
    for (what, kind, descriptor) in [
        ("type 4", 4_u64, [0_u64, 0]),
        ("reserved bits", 0, [1 << 12, 0]),
        ("a PCID without PCIDE", 1, [1, 0]),
        ("an address that is not canonical", 0, [0, 1 << 47]),
    ] {
        // SAFETY: faults.
        let trap = unsafe { probe!("invpcid {}, [{}]"; in(reg) kind, in(reg) &descriptor) };
        expect_fault(trap, vector::GENERAL_PROTECTION, 0, what)?;
    }
    let descriptor = [0_u64, 0];
    // SAFETY: drops cached translations.
    let trap = unsafe { probe!("invpcid {}, [{}]"; in(reg) 2_u64, in(reg) &descriptor) };
    ensure!(trap.is_none(), "INVPCID of everything traps");
    Ok(())
}

/// A deadline is in the past if it is the smaller number, wherever the TSC is.
fn deadline_by_any_tsc(_: &Machine) -> Verdict {
    const TSC_ADJUST: u32 = 0x3b;
    const TSC_DEADLINE: u32 = 0x6e0;
    const DEADLINE_MODE: u32 = 2 << 17;
    skip_if!(
        !cpu::leaf1_ecx().contains(Leaf1Ecx::TSC_DEADLINE),
        "no TSC deadline"
    );
    skip_if!(
        !cpu::leaf7_ebx().contains(Leaf7Ebx::TSC_ADJUST),
        "no TSC_ADJUST"
    );
    const VECTOR: u8 = 0x51;
    hook(VECTOR, crate::interrupts::end_at_apic);
    let local = apic::local();
    local.write(Register::Timer, DEADLINE_MODE | u32::from(VECTOR));
    let before = cpu::rdmsr(TSC_ADJUST);
    let (mut left, mut came) = (0, 0);
    for (n, tsc) in [0x1337_1337_u64, 0xf0_0000_0000, 0xf000_0000_0000_0000]
        .into_iter()
        .enumerate()
    {
        // SAFETY: nothing measures time meanwhile, and the TSC is put back.
        unsafe {
            cpu::wrmsr(
                TSC_ADJUST,
                before.wrapping_add(tsc.wrapping_sub(cpu::tsc())),
            );
            cpu::wrmsr(TSC_DEADLINE, tsc.wrapping_sub(1));
        }
        left |= cpu::rdmsr(TSC_DEADLINE);
        cpu::take_interrupts();
        came = count(VECTOR);
        // SAFETY: as it was.
        unsafe { cpu::wrmsr(TSC_ADJUST, before) };
        if left != 0 || came != n as u32 + 1 {
            break;
        }
    }
    ensure_eq!(left, 0, "a deadline in the past");
    ensure_eq!(came, 3, "interrupts");
    Ok(())
}

/// Only vectors can be sent to oneself by the shorthand.
fn no_nmi_by_shorthand(machine: &Machine) -> Verdict {
    skip_if!(
        matches!(machine.host, Host::Tcg | Host::Bochs),
        "emulators send it"
    );
    hook(vector::NMI, only_count);
    let local = apic::local();
    local.command(apic::SELF_SHORTHAND | apic::DELIVER_NMI | apic::ASSERT, 0);
    for _ in 0..100 {
        cpu::tsc();
    }
    ensure_eq!(count(vector::NMI), 0, "NMIs");
    Ok(())
}

/// The paravirtual way to send interrupts: no number is a broadcast there.
fn interrupts_by_hypercall(machine: &Machine) -> Verdict {
    skip_if!(machine.host != Host::Plinth, "for Plinth only");
    const SEND_IPI: u64 = 10;
    let result: u64;
    // SAFETY: RBX is put back; no processor has such an APIC ID.
    let trap = unsafe {
        probe!("mov rdi, rbx", "mov rbx, {bits}", "vmcall", "mov rbx, rdi";
            bits = in(reg) 0xffff_ffff_u64, out("rdi") _, inout("rax") SEND_IPI => result,
            in("rcx") 0_u64, in("rdx") 0xffff_ffff_u64, in("rsi") 0xf1_u64)
    };
    ensure!(trap.is_none(), "VMCALL traps");
    ensure_eq!(result, 0, "processors that took it");
    Ok(())
}

fn platform_info(machine: &Machine) -> Verdict {
    const PLATFORM_INFO: u32 = 0xce;
    skip_if!(machine.host != Host::Plinth, "for Plinth only");
    let Ok(info) = probe_rdmsr(PLATFORM_INFO) else {
        fail!("RDMSR faults");
    };
    // Measured here and by the host, each for itself: near a whole ratio they may differ by one.
    let (told, measured) = (info >> 8 & 0xff, machine.tsc_hz / 100_000_000);
    ensure!(
        told.abs_diff(measured.clamp(1, 255)) <= 1,
        "the ratio is {told}, and the TSC runs at {} Hz",
        machine.tsc_hz
    );
    Ok(())
}

global_asm!(
    ".section .text.sleep, \"ax\"",
    // sleep_until_woken(port: u16, value: u16): 1 if the machine slept, 0 if nothing came of it.
    "sleep_until_woken:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + sleeper], rsp",
    "mov edx, edi",
    "mov eax, esi",
    "out dx, ax",
    "mov ecx, 100000",
    "2: pause",
    "dec ecx",
    "jnz 2b",
    "xor eax, eax",
    "jmp 3f",
    "sleep_woken:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov rsp, [rip + sleeper]",
    "mov eax, 1",
    "3: pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".bss",
    ".balign 8",
    "sleeper: .quad 0",
    ".text",
);

unsafe extern "C" {
    fn sleep_until_woken(port: u16, value: u16) -> u64;
    static sleep_woken: u8;
}

/// S3 by the PIIX4's sleep type: the clock's alarm wakes the machine at the FACS's vector, with its memory as it was.
fn sleep_and_wake(machine: &Machine) -> Verdict {
    skip_if!(machine.host != Host::Plinth, "firmware's affair");
    let acpi = machine.acpi.as_ref();
    let (Some(fadt), Some(table)) = (
        acpi.and_then(|acpi| acpi.fadt),
        acpi.and_then(|acpi| acpi.table(b"FACP")),
    ) else {
        fail!("there is no FADT");
    };
    const START_PAGE: u64 = 0x9000;
    const WAKING_VECTOR: u64 = 12;
    const RTC_ENABLE: u16 = 1 << 10;
    const WOKEN: u16 = 1 << 15;
    const SLEEP_S3: u16 = 1 << 13 | 1 << 10;
    const ANY: u8 = 0xc0;
    let facs = u64::from(memory::read32(table.address + 36));
    ensure!(facs != 0, "there is no FACS");
    smp::write_start_page(START_PAGE, Some(&raw const sleep_woken as u64));
    memory::write32(facs + WAKING_VECTOR, START_PAGE as u32);
    // An alarm each second.
    let cmos = |at: u8, value: u8| {
        port::write8(0x70, at);
        port::write8(0x71, value);
    };
    for at in [1, 3, 5] {
        cmos(at, ANY);
    }
    port::write8(0x70, 0xc);
    port::read8(0x71);
    cmos(0xb, 0x22);
    let status = fadt.pm1a_event;
    port::write16(status, RTC_ENABLE | WOKEN);
    port::write16(status + 2, RTC_ENABLE);
    let xcr0 = cpu::leaf1_ecx().contains(Leaf1Ecx::OSXSAVE).then(cpu::xcr0);
    // SAFETY: interrupts are off. The code comes back with all that it may not change; what a reset changes beyond
    // that is put back next.
    let slept = unsafe { sleep_until_woken(fadt.pm1a_control, SLEEP_S3) };
    if slept != 0 {
        crate::interrupts::reload();
        if let Some(xcr0) = xcr0 {
            cpu::set_xcr0(xcr0);
        }
    }
    let woken = port::read16(status) & WOKEN;
    port::write16(status + 2, 0);
    port::write16(status, RTC_ENABLE | WOKEN);
    cmos(0xb, 2);
    memory::write32(facs + WAKING_VECTOR, 0);
    ensure_eq!(slept, 1, "whether it slept");
    ensure_eq!(woken, WOKEN, "WAK_STS");
    Ok(())
}

/// Faults push flags with RF, also those that a hypervisor makes of an exit.
fn resume_flag(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, "QEMU itself pushes none");
    let cr4 = cpu::cr4() | 1 << 31;
    // SAFETY: each faults, and changes nothing.
    let traps = unsafe {
        [
            ("MOV to CR4", probe!("mov cr4, {}"; in(reg) cr4)),
            ("UD2", probe!("ud2")),
            (
                "RDMSR",
                probe!("rdmsr"; in("ecx") 0x1234_u32, out("eax") _, out("edx") _),
            ),
        ]
    };
    for (what, trap) in traps {
        let flags = Rflags::from_bits_truncate(trapped(trap, what)?.rflags);
        ensure!(flags.contains(Rflags::RF), "{what} pushes {flags:?}");
    }
    Ok(())
}

/// What exits in the last bytes of the lower half is executed, and the next instruction faults where it would be.
fn last_canonical_bytes(machine: &Machine) -> Verdict {
    const BEHIND: u64 = 1 << 47;
    let page = scratch(machine)?;
    // SAFETY: the scratch pages are free RAM.
    let last = unsafe { paging::map_last_of_lower_half(page) };
    let mut verdict = Ok(());
    for (what, code) in [
        ("VMCALL", &[0x0f, 0x01, 0xc1][..]),
        ("VMMCALL", &[0x0f, 0x01, 0xd9]),
        ("WBINVD", &[0x0f, 0x09]),
        ("RDMSR", &[0x0f, 0x32]),
        ("OUT", &[0xe6, 0x80]),
        ("MOV from a device", &[0x8b, 0x02]),
    ] {
        if machine.host != Host::Plinth && what.ends_with("CALL") {
            continue;
        }
        let start = PAGE - code.len() as u64;
        memory::write_bytes(page + start, code);
        // SAFETY: the code changes RAX and RDX at most, and faults behind its instruction.
        let trap = unsafe {
            probe!("call {at}"; at = in(reg) last + start, in("rcx") 0x1b_u64,
                inout("rax") u64::from(u32::MAX) => _, inout("rdx") 0xfec0_0000_u64 => _)
        };
        verdict = behind(trap, what, BEHIND);
        if verdict.is_err() {
            break;
        }
    }
    paging::unmap_last_of_lower_half();
    verdict
}

fn behind(trap: Option<crate::interrupts::Trap>, what: &str, rip: u64) -> Verdict {
    let trap = trapped(trap, what)?;
    ensure!(
        (trap.vector, trap.error, trap.rip) == (vector::GENERAL_PROTECTION, 0, rip),
        "{what}: {trap}"
    );
    Ok(())
}
