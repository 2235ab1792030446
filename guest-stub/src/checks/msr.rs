//! Model-specific registers: what is written comes back, what is not there is #GP.

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::apic::{ApicBase, LOCAL_APIC_ADDRESS};
use crate::cpu::{self, Efer, ExtendedEdx, Leaf1Ecx, Leaf1Edx, Leaf7Ebx, Rflags, msr};
use crate::interrupts::{
    KERNEL_CODE, USER_CODE_32, USER_CODE_64, probe_rdmsr, probe_wrmsr, vector,
};
use crate::machine::{Host, Machine};
use crate::{checks, ensure, ensure_eq, skip_if, user};

use super::Verdict;

checks![
    segment_bases,
    swapgs,
    syscall_registers,
    syscall_round_trip,
    sysenter_registers,
    pat,
    efer,
    efer_reserved_bits,
    apic_base,
    tsc,
    tsc_adjust,
    mtrrs,
    unknown_registers,
    supervisor_state,
    arch_capabilities,
    branch_control,
    nx_follows_efer,
    steal_time,
];

/// Values that a 64-bit address register must keep: canonical, both halves busy.
const ADDRESSES: [u64; 4] = [
    0,
    0x0000_7FFF_FFFF_F000,
    0xFFFF_8000_0000_0000,
    0xFFFF_FFFF_1234_5678,
];

/// Writes each value, reads it back, and puts the old one back.
///
/// # Safety
///
/// None of the values may disturb this program while it is in the register.
unsafe fn round_trip(index: u32, values: &[u64]) -> Verdict {
    let before = cpu::rdmsr(index);
    for &value in values {
        // SAFETY: the caller vouches for the values.
        unsafe { cpu::wrmsr(index, value) };
        ensure_eq!(cpu::rdmsr(index), value, "MSR {index:#x}");
    }
    // SAFETY: its own value.
    unsafe { cpu::wrmsr(index, before) };
    Ok(())
}

fn segment_bases(_: &Machine) -> Verdict {
    for index in [msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE] {
        // SAFETY: this program's own code uses neither FS nor GS.
        unsafe { round_trip(index, &ADDRESSES)? };
    }
    // The base takes effect.
    let words = [0x1111_u64, 0x2222];
    let (first, second): (u64, u64);
    // SAFETY: reads a local through FS.
    unsafe {
        cpu::wrmsr(msr::FS_BASE, words.as_ptr() as u64);
        asm!("mov {}, fs:[0]", "mov {}, fs:[8]", out(reg) first, out(reg) second);
    }
    ensure!(
        (first, second) == (0x1111, 0x2222),
        "FS:[0], FS:[8] = {first:#x}, {second:#x}"
    );
    Ok(())
}

fn swapgs(_: &Machine) -> Verdict {
    // SAFETY: this program's own code does not use GS.
    unsafe {
        cpu::wrmsr(msr::GS_BASE, 0x1111_0000);
        cpu::wrmsr(msr::KERNEL_GS_BASE, 0xFFFF_FFFF_2222_0000);
        asm!("swapgs", options(nostack));
    }
    ensure_eq!(cpu::rdmsr(msr::GS_BASE), 0xFFFF_FFFF_2222_0000, "GS.base");
    ensure_eq!(
        cpu::rdmsr(msr::KERNEL_GS_BASE),
        0x1111_0000,
        "kernel GS.base"
    );
    Ok(())
}

fn syscall_registers(_: &Machine) -> Verdict {
    // SAFETY: nothing executes SYSCALL while these values stand.
    unsafe {
        round_trip(msr::LSTAR, &ADDRESSES)?;
        round_trip(msr::CSTAR, &ADDRESSES)?;
        round_trip(msr::STAR, &[0x0018_0008_0000_0000, 0x0033_0010_1234_5678])?;
        round_trip(msr::SFMASK, &[0, 0x0004_7700, 0xFFFF_FFFF])?;
    }
    Ok(())
}

static SYSCALL_RCX: AtomicU64 = AtomicU64::new(0);
static SYSCALL_R11: AtomicU64 = AtomicU64::new(0);
static SYSCALL_RFLAGS: AtomicU64 = AtomicU64::new(0);
static SYSCALL_SEGMENTS: AtomicU64 = AtomicU64::new(0);
static SYSCALL_RSP: AtomicU64 = AtomicU64::new(0);

/// Where SYSCALL leads: notes what it sees, on its own stack, and returns.
#[unsafe(naked)]
extern "C" fn syscall_entry() {
    naked_asm!(
        "mov [rip + {rcx_slot}], rcx",
        "mov [rip + {r11_slot}], r11",
        "mov [rip + {rsp_slot}], rsp",
        "lea rsp, [rip + {stack} + 256]",
        "pushfq",
        "pop qword ptr [rip + {rflags_slot}]",
        "mov eax, cs",
        "shl eax, 16",
        "mov dx, ss",
        "mov ax, dx",
        "mov [rip + {segments_slot}], rax",
        "mov rsp, [rip + {rsp_slot}]",
        "sysretq",
        rcx_slot = sym SYSCALL_RCX,
        r11_slot = sym SYSCALL_R11,
        rsp_slot = sym SYSCALL_RSP,
        rflags_slot = sym SYSCALL_RFLAGS,
        segments_slot = sym SYSCALL_SEGMENTS,
        stack = sym SYSCALL_STACK,
    )
}

static SYSCALL_STACK: [AtomicU64; 32] = [const { AtomicU64::new(0) }; 32];

/// Ring 3 calls ring 0 and comes back, with RCX, R11, RFLAGS and segments as specified.
fn syscall_round_trip(machine: &Machine) -> Verdict {
    let scratch = super::scratch(machine)?;
    let star = u64::from(USER_CODE_32) << 48 | u64::from(KERNEL_CODE) << 32;
    // SAFETY: the entry is valid code that returns by SYSRET, and the selectors are the GDT's.
    unsafe {
        cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) | Efer::SCE.bits());
        cpu::wrmsr(msr::STAR, star);
        cpu::wrmsr(msr::LSTAR, syscall_entry as *const () as u64);
        cpu::wrmsr(msr::SFMASK, (Rflags::IF | Rflags::DF | Rflags::CF).bits());
    }
    // stc; syscall; ud2
    let trap = user::run(
        scratch,
        user::Mode::Long,
        &[0xF9, 0x0F, 0x05, 0x0F, 0x0B],
        0,
        0,
    );
    // SAFETY: SYSCALL off again.
    unsafe { cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) & !Efer::SCE.bits()) };
    let trap = super::trapped(trap, "ring 3")?;
    ensure_eq!(
        trap.vector,
        vector::INVALID_OPCODE,
        "exception at the end of ring 3"
    );
    ensure_eq!(trap.rip, user::code_address() + 3, "RIP after SYSRET");
    ensure_eq!(trap.cs, USER_CODE_64, "CS after SYSRET");
    ensure_eq!(trap.rflags & Rflags::CF.bits(), 1, "CF after SYSRET");
    ensure_eq!(
        SYSCALL_RCX.load(Relaxed),
        user::code_address() + 3,
        "RCX in SYSCALL"
    );
    ensure_eq!(SYSCALL_R11.load(Relaxed) & 1, 1, "R11.CF in SYSCALL");
    ensure_eq!(SYSCALL_RFLAGS.load(Relaxed) & 1, 0, "CF, masked by SFMASK");
    ensure_eq!(
        SYSCALL_SEGMENTS.load(Relaxed),
        0x0008_0010,
        "CS and SS in SYSCALL"
    );

    let trap = user::run(scratch, user::Mode::Long, &[0x0F, 0x05], 0, 0);
    let vector = trap.map(|trap| trap.vector);
    ensure!(
        vector == Some(vector::INVALID_OPCODE),
        "SYSCALL with EFER.SCE clear: {vector:?}"
    );
    Ok(())
}

fn sysenter_registers(_: &Machine) -> Verdict {
    skip_if!(!cpu::leaf1_edx().contains(Leaf1Edx::SEP), "no SYSENTER");
    // SAFETY: nothing executes SYSENTER.
    unsafe {
        round_trip(msr::SYSENTER_CS, &[0, 0x08, 0xFFFC])?;
        // AMD keeps the low 32 bits only.
        round_trip(msr::SYSENTER_ESP, &[0, 0x7FFF_F000])?;
        round_trip(msr::SYSENTER_EIP, &[0, 0x7FFF_F000])?;
    }
    Ok(())
}

fn pat(_: &Machine) -> Verdict {
    const RESET: u64 = 0x0007_0406_0007_0406;
    ensure_eq!(cpu::rdmsr(msr::PAT), RESET, "PAT after reset");
    // SAFETY: entries 4 to 7, which no page table here selects, get other valid types.
    unsafe { round_trip(msr::PAT, &[0x0105_0406_0007_0406, RESET]) }
}

fn efer(_: &Machine) -> Verdict {
    let efer = Efer::from_bits_retain(cpu::rdmsr(msr::EFER));
    ensure!(
        efer.contains(Efer::LME | Efer::LMA),
        "EFER in long mode: {efer:?}"
    );
    // SAFETY: neither changes how this program runs: it has no NX pages mapped now.
    unsafe {
        round_trip(
            msr::EFER,
            &[(efer | Efer::SCE).bits(), (efer - Efer::SCE).bits()],
        )?;
        if cpu::extended_edx().contains(ExtendedEdx::NX) {
            round_trip(
                msr::EFER,
                &[(efer | Efer::NXE).bits(), (efer - Efer::NXE).bits()],
            )?;
        }
    }
    // LMA is the processor's: writing it as 0 changes nothing.
    // SAFETY: as said.
    let outcome = unsafe { probe_wrmsr(msr::EFER, (efer - Efer::LMA).bits()) };
    ensure!(outcome.is_ok(), "writing EFER without LMA is an exception");
    ensure_eq!(
        cpu::rdmsr(msr::EFER),
        efer.bits(),
        "EFER after writing LMA as 0"
    );
    Ok(())
}

fn efer_reserved_bits(machine: &Machine) -> Verdict {
    // QEMU TCG (7.2) keeps what it knows and drops the rest in silence.
    skip_if!(machine.host == Host::Tcg, "QEMU TCG ignores them");
    let efer = cpu::rdmsr(msr::EFER);
    for bit in [1, 9, 20, 40] {
        // SAFETY: refused, or without meaning.
        let outcome = unsafe { probe_wrmsr(msr::EFER, efer | 1 << bit) };
        let vector = outcome.err().map(|trap| trap.vector);
        ensure!(
            vector == Some(vector::GENERAL_PROTECTION),
            "EFER bit {bit}: {vector:?}"
        );
        ensure_eq!(cpu::rdmsr(msr::EFER), efer, "EFER after a refused write");
    }
    // Paging is on: long mode cannot be turned off.
    // SAFETY: refused, or this guest dies, which is as good a sign.
    let outcome = unsafe { probe_wrmsr(msr::EFER, efer & !Efer::LME.bits()) };
    let vector = outcome.err().map(|trap| trap.vector);
    ensure!(
        vector == Some(vector::GENERAL_PROTECTION),
        "EFER.LME cleared: {vector:?}"
    );
    Ok(())
}

fn apic_base(_: &Machine) -> Verdict {
    let base = cpu::rdmsr(msr::APIC_BASE);
    ensure_eq!(base & !0xFFF, LOCAL_APIC_ADDRESS, "APIC address");
    ensure!(
        base & ApicBase::ENABLE.bits() != 0,
        "the APIC is off: {base:#x}"
    );
    // SAFETY: its own value.
    let outcome = unsafe { probe_wrmsr(msr::APIC_BASE, base) };
    ensure!(
        outcome.is_ok(),
        "writing APIC_BASE its own value is an exception"
    );
    ensure_eq!(cpu::rdmsr(msr::APIC_BASE), base, "APIC_BASE");
    Ok(())
}

/// RDTSC and the MSR agree, and time does not run backwards.
fn tsc(machine: &Machine) -> Verdict {
    // QEMU TCG (7.2) does not know the MSR.
    let by_msr = machine.host != Host::Tcg;
    let mut last = cpu::tsc();
    for turn in 0..1000 {
        let now = if by_msr && turn % 8 == 0 {
            cpu::rdmsr(msr::TSC)
        } else {
            cpu::tsc()
        };
        ensure!(now >= last, "turn {turn}: {now:#x} after {last:#x}");
        last = now;
    }
    ensure!(last > 0, "the TSC stands still");
    Ok(())
}

fn tsc_adjust(machine: &Machine) -> Verdict {
    skip_if!(
        !cpu::leaf7_ebx().contains(Leaf7Ebx::TSC_ADJUST),
        "no TSC_ADJUST"
    );
    let before = cpu::rdmsr(msr::TSC_ADJUST);
    let step = machine.tsc_hz.saturating_mul(1000);
    let start = cpu::tsc();
    // SAFETY: shifts the TSC, which nothing counts on here.
    unsafe { cpu::wrmsr(msr::TSC_ADJUST, before.wrapping_add(step)) };
    let shifted = cpu::tsc();
    let kept = cpu::rdmsr(msr::TSC_ADJUST);
    // SAFETY: its own value.
    unsafe { cpu::wrmsr(msr::TSC_ADJUST, before) };
    ensure_eq!(kept, before.wrapping_add(step), "TSC_ADJUST");
    let moved = shifted.wrapping_sub(start);
    // A thousand seconds forward; the writing itself takes less than a hundred.
    ensure!(
        moved >= step && moved < step + step / 10,
        "the TSC moved by {moved}, not {step}"
    );
    ensure!(cpu::tsc() < shifted, "the TSC did not come back");
    Ok(())
}

fn mtrrs(_: &Machine) -> Verdict {
    skip_if!(!cpu::leaf1_edx().contains(Leaf1Edx::MTRR), "no MTRRs");
    let count = cpu::rdmsr(msr::MTRR_CAP) & 0xFF;
    ensure!(count <= 32, "{count} variable ranges");
    for index in 0..2 * count as u32 {
        let register = msr::MTRR_PHYS_BASE0 + index;
        ensure!(
            probe_rdmsr(register).is_ok(),
            "MSR {register:#x} of {count} ranges is an exception"
        );
    }
    for register in [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26F) {
        ensure!(
            probe_rdmsr(register).is_ok(),
            "fixed range {register:#x} is an exception"
        );
    }
    let default = cpu::rdmsr(msr::MTRR_DEF_TYPE);
    ensure_eq!(default & !0xCFF, 0, "reserved bits of the default type");
    Ok(())
}

fn unknown_registers(machine: &Machine) -> Verdict {
    // QEMU TCG (7.2) reads unknown registers as zero and ignores writes.
    skip_if!(machine.host == Host::Tcg, "QEMU TCG has no unknown MSRs");
    for index in [
        0x0000_1234,
        0x3FFF_FFFF,
        0xC000_1FFF,
        0xC100_0000,
        0xFFFF_FFFF,
    ] {
        let vector = probe_rdmsr(index)
            .err()
            .map(|trap| (trap.vector, trap.error, trap.offset));
        let wanted = Some((vector::GENERAL_PROTECTION, 0, 0));
        ensure!(vector == wanted, "RDMSR {index:#x}: {vector:?}");
        // SAFETY: no such register.
        let outcome = unsafe { probe_wrmsr(index, 0) };
        let vector = outcome
            .err()
            .map(|trap| (trap.vector, trap.error, trap.offset));
        ensure!(vector == wanted, "WRMSR {index:#x}: {vector:?}");
    }
    if machine.host == Host::Plinth {
        // SAFETY: SVM's own registers; without SVM they are not there.
        let outcome = unsafe { probe_wrmsr(msr::VM_CR, 1 << 4) };
        // Linux reads VM_CR on AMD; a hypervisor may let it, but not let SVM be turned on.
        if outcome.is_ok() {
            ensure!(
                !cpu::extended_ecx().contains(cpu::ExtendedEcx::SVM),
                "SVM shows"
            );
        }
    }
    Ok(())
}

/// Whether reading and writing `value` pass: a write is of a value that must do no harm.
///
/// # Safety
/// The value may be written to the register.
unsafe fn passes(index: u32, value: u64) -> (bool, bool) {
    let read = probe_rdmsr(index).is_ok();
    // SAFETY: the caller vouches for it.
    let written = unsafe { probe_wrmsr(index, value) }.is_ok();
    (read, written)
}

/// IA32_XSS: there with XSAVES, and takes no component that CPUID does not list.
fn supervisor_state(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, "QEMU TCG has no unknown MSRs");
    let has_leaf = cpu::leaf1_ecx().contains(Leaf1Ecx::XSAVE);
    let leaf = if has_leaf {
        cpu::cpuid(0xD, 1)
    } else {
        cpu::cpuid(0x8000_FFFF, 0)
    };
    let shown = has_leaf && leaf.eax & 1 << 3 != 0;
    // SAFETY: the value after reset.
    let passed = unsafe { passes(msr::XSS, 0) };
    ensure!(
        passed == (shown, shown),
        "XSAVES {shown}, IA32_XSS read, written: {passed:?}"
    );
    if shown {
        let supported = u64::from(leaf.edx) << 32 | u64::from(leaf.ecx);
        ensure_eq!(cpu::rdmsr(msr::XSS), 0, "IA32_XSS");
        for bit in (0..64).filter(|bit| supported >> bit & 1 == 0) {
            // SAFETY: refused, and caught.
            let outcome = unsafe { probe_wrmsr(msr::XSS, 1 << bit) };
            ensure!(outcome.is_err(), "IA32_XSS takes bit {bit}");
        }
        ensure_eq!(cpu::rdmsr(msr::XSS), 0, "IA32_XSS after refused writes");
    }
    Ok(())
}

/// IA32_ARCH_CAPABILITIES: there where CPUID says so, and read-only.
fn arch_capabilities(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, "QEMU TCG has no unknown MSRs");
    let shown = cpu::cpuid(0, 0).eax >= 7 && cpu::cpuid(7, 0).edx & 1 << 29 != 0;
    let value = probe_rdmsr(msr::ARCH_CAPABILITIES);
    ensure!(
        value.is_ok() == shown,
        "shown {shown}, read: {}",
        value.is_ok()
    );
    for value in [0, value.unwrap_or(0), u64::MAX] {
        // SAFETY: refused, and caught.
        let outcome = unsafe { probe_wrmsr(msr::ARCH_CAPABILITIES, value) };
        let vector = outcome.err().map(|trap| trap.vector);
        ensure!(
            vector == Some(vector::GENERAL_PROTECTION),
            "{value:#x} written: {vector:?}"
        );
    }
    ensure!(
        machine.host != Host::Plinth || shown == (cpu::vendor() == *b"GenuineIntel"),
        "shown {shown}"
    );
    Ok(())
}

/// IA32_SPEC_CTRL, IA32_PRED_CMD and IA32_FLUSH_CMD: there as far as CPUID says, commands to be written only.
fn branch_control(machine: &Machine) -> Verdict {
    skip_if!(machine.host == Host::Tcg, "QEMU TCG has no unknown MSRs");
    let edx7 = if cpu::cpuid(0, 0).eax >= 7 {
        cpu::cpuid(7, 0).edx
    } else {
        0
    };
    let has_sizes = cpu::cpuid(0x8000_0000, 0).eax >= 0x8000_0008;
    let ebx8 = if cpu::vendor() == *b"AuthenticAMD" && has_sizes {
        cpu::cpuid(0x8000_0008, 0).ebx
    } else {
        0
    };
    let control = edx7 & (1 << 26 | 1 << 27 | 1 << 31) | ebx8 & (1 << 14 | 1 << 15 | 1 << 24) != 0;
    let barrier = edx7 & 1 << 26 | ebx8 & 1 << 12 != 0;
    let flush = edx7 & 1 << 28 != 0;
    // SAFETY: the value after reset; a barrier; a flush of a cache.
    let passed = unsafe {
        [
            passes(msr::SPEC_CTRL, 0),
            passes(msr::PRED_CMD, 1),
            passes(msr::FLUSH_CMD, 1),
        ]
    };
    let wanted = [(control, control), (false, barrier), (false, flush)];
    ensure!(
        passed == wanted,
        "read, written: {passed:?}, not {wanted:?}"
    );
    if control {
        // SAFETY: refused, and caught.
        let outcome = unsafe { probe_wrmsr(msr::SPEC_CTRL, 1 << 63) };
        ensure!(
            outcome.is_err(),
            "a reserved bit of IA32_SPEC_CTRL is taken"
        );
    }
    Ok(())
}

/// With EFER.NXE, a page marked so cannot be executed; without, the bit is reserved.
fn nx_follows_efer(machine: &Machine) -> Verdict {
    use crate::cpu::PageFaultCode;
    use crate::paging::{self, Entry};
    use crate::probe;

    skip_if!(!cpu::extended_edx().contains(ExtendedEdx::NX), "no NX");
    let scratch = super::scratch(machine)?;
    crate::memory::write_bytes(scratch, &[0xC3]);
    let efer = cpu::rdmsr(msr::EFER);
    for on in [true, false] {
        let value = if on {
            efer | Efer::NXE.bits()
        } else {
            efer & !Efer::NXE.bits()
        };
        // SAFETY: the only page with the NX bit is the one mapped next.
        unsafe { cpu::wrmsr(msr::EFER, value) };
        let page = paging::map(0, scratch, Entry::PRESENT | Entry::NO_EXECUTE);
        // SAFETY: the page holds RET, and a fault in it is caught.
        let fetch = unsafe { probe!("call {}"; in(reg) page) };
        // SAFETY: reads a mapped page, or faults.
        let read = unsafe { probe!("mov al, [{}]"; in(reg) page, out("al") _) };
        paging::unmap(0);
        let (fetch, read) = (
            fetch.map(|trap| trap.page_fault_code()),
            read.map(|trap| trap.page_fault_code()),
        );
        if on {
            let wanted = PageFaultCode::PRESENT | PageFaultCode::FETCH;
            ensure!(fetch == Some(wanted), "fetch with NXE: {fetch:?}");
            ensure!(read.is_none(), "read with NXE: {read:?}");
        } else {
            // QEMU TCG (7.2) leaves P out, for guests of a hypervisor too.
            let reserved = read.is_some_and(|code| code.contains(PageFaultCode::RESERVED));
            ensure!(reserved, "read without NXE: {read:?}");
        }
    }
    // SAFETY: its own value.
    unsafe { cpu::wrmsr(msr::EFER, efer) };
    Ok(())
}

/// Where the host counts the time that it took from this processor.
#[repr(C, align(64))]
struct StealTime {
    nanoseconds: AtomicU64,
    /// Odd while the host writes; flags above.
    version_and_flags: AtomicU64,
    /// In its lowest byte.
    preempted: AtomicU64,
    rest: [AtomicU64; 5],
}

static STEAL_TIME: StealTime = StealTime {
    nanoseconds: AtomicU64::new(0),
    version_and_flags: AtomicU64::new(u64::MAX),
    preempted: AtomicU64::new(0),
    rest: [const { AtomicU64::new(u64::MAX) }; 5],
};

/// Linux' KVM interface, MSR_KVM_STEAL_TIME: what is told is well-formed, never falls, and ends when it is switched off.
fn steal_time(machine: &Machine) -> Verdict {
    const MSR: u32 = 0x4b56_4d03;
    const FEATURE: u32 = 1 << 5;
    let offered = cpu::leaf1_ecx().contains(Leaf1Ecx::HYPERVISOR)
        && &cpu::hypervisor_signature(0x4000_0000) == b"KVMKVMKVM\0\0\0"
        && cpu::cpuid(0x4000_0001, 0).eax & FEATURE != 0;
    ensure!(offered || machine.host != Host::Plinth, "it is not offered");
    skip_if!(!offered, "it is not offered");
    let page = &raw const STEAL_TIME as u64;
    for reserved in [1 << 1, 1 << 5] {
        // SAFETY: it is refused; were it taken, the address would still be that of the static.
        let trap = unsafe { probe_wrmsr(MSR, page | reserved | 1) };
        ensure!(
            trap.is_err_and(|trap| trap.vector == vector::GENERAL_PROTECTION),
            "reserved bit {reserved:#x} is taken"
        );
    }
    // SAFETY: the static is 64 bytes long and aligned, and only atomics are in it.
    unsafe { cpu::wrmsr(MSR, page | 1) };
    ensure_eq!(cpu::rdmsr(MSR), page | 1, "the MSR");
    let mut last = 0;
    for _ in 0..100 {
        // An exit each, and often the end of a turn on the processor.
        for _ in 0..50 {
            core::hint::spin_loop();
        }
        cpu::cpuid(0, 0);
        let version = STEAL_TIME.version_and_flags.load(Relaxed);
        ensure!(
            version & 1 == 0 && version >> 32 == 0,
            "version and flags {version:#x}"
        );
        let now = STEAL_TIME.nanoseconds.load(Relaxed);
        ensure!(now >= last, "it fell from {last} to {now}");
        ensure_eq!(
            STEAL_TIME.preempted.load(Relaxed) & 0xff,
            0,
            "preempted while it runs"
        );
        last = now;
    }
    for word in &STEAL_TIME.rest {
        ensure_eq!(word.load(Relaxed), u64::MAX, "what is behind it");
    }
    // SAFETY: switches it off.
    unsafe { cpu::wrmsr(MSR, 0) };
    Ok(())
}
