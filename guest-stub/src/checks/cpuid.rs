//! CPUID: well-formed, steady, and true: what it shows works.

use core::arch::asm;

use crate::apic::{self, ApicBase};
use crate::cpu::{
    self, Cr4, Efer, ExtendedEcx, ExtendedEdx, Leaf1Ecx, Leaf1Edx, Leaf7Ebx, cpuid, msr,
};
use crate::interrupts::{probe_rdmsr, probe_wrmsr, vector};
use crate::machine::{Host, Machine, signatures};
use crate::{checks, ensure, ensure_eq, fail, probe, skip_if};

use super::Verdict;

checks![
    vendor,
    baseline,
    addresses,
    hypervisor,
    no_nested_virtualization,
    steady,
    upper_halves_cleared,
    apic_id,
    topology,
    osxsave_follows_cr4,
    xsave_sizes,
    advertised_instructions,
    rdtscp,
    fsgsbase,
];

/// The vendor is text, and the ranges of leaves are plausible.
fn vendor(_: &Machine) -> Verdict {
    let name = cpu::vendor();
    ensure!(name.iter().all(u8::is_ascii_graphic), "vendor {name:x?}");
    let (basic, extended) = (cpu::max_basic_leaf(), cpu::max_extended_leaf());
    ensure!((1..0x100).contains(&basic), "highest basic leaf {basic:#x}");
    ensure!(
        (0x8000_0001..0x8000_0100).contains(&extended),
        "highest extended leaf {extended:#x}"
    );
    Ok(())
}

/// What every 64-bit processor has.
fn baseline(_: &Machine) -> Verdict {
    let needed = Leaf1Edx::all() - Leaf1Edx::DE - Leaf1Edx::MTRR;
    let missing = needed - cpu::leaf1_edx();
    ensure!(missing.is_empty(), "missing in leaf 1: {missing:?}");
    let needed = ExtendedEdx::SYSCALL | ExtendedEdx::NX | ExtendedEdx::LONG_MODE;
    let missing = needed - cpu::extended_edx();
    ensure!(
        missing.is_empty(),
        "missing in leaf 0x80000001: {missing:?}"
    );
    Ok(())
}

/// Address widths.
fn addresses(_: &Machine) -> Verdict {
    skip_if!(cpu::max_extended_leaf() < 0x8000_0008, "no leaf 0x80000008");
    let leaf = cpuid(0x8000_0008, 0).eax;
    let (physical, linear) = (leaf & 0xFF, leaf >> 8 & 0xFF);
    ensure!((32..=52).contains(&physical), "{physical} physical bits");
    ensure!(linear == 48 || linear == 57, "{linear} linear bits");
    Ok(())
}

/// A hypervisor that shows itself has a well-formed leaf group.
fn hypervisor(machine: &Machine) -> Verdict {
    let bit = cpu::leaf1_ecx().contains(Leaf1Ecx::HYPERVISOR);
    ensure!(bit || machine.host != Host::Plinth, "no hypervisor bit");
    skip_if!(!bit, "no hypervisor bit");
    let mut groups = 0;
    for (base, signature) in signatures() {
        groups += 1;
        let printable = signature
            .iter()
            .all(|&byte| byte == 0 || byte.is_ascii_graphic());
        ensure!(printable, "signature of {base:#x}: {signature:x?}");
    }
    ensure!(
        groups > 0,
        "the hypervisor bit is set, and there is no leaf 0x40000000"
    );
    Ok(())
}

/// VMX and SVM: hidden, and refused when tried all the same.
fn no_nested_virtualization(machine: &Machine) -> Verdict {
    skip_if!(machine.host != Host::Plinth, "not under Plinth");
    ensure!(!cpu::leaf1_ecx().contains(Leaf1Ecx::VMX), "VMX shows");
    ensure!(!cpu::extended_ecx().contains(ExtendedEcx::SVM), "SVM shows");
    let efer = cpu::rdmsr(msr::EFER);
    // SAFETY: without SVM this is refused; with it, it changes nothing for this program.
    let outcome = unsafe { probe_wrmsr(msr::EFER, efer | Efer::SVME.bits()) };
    let trap = outcome.err();
    ensure!(trap.is_some(), "EFER.SVME can be set");
    // SAFETY: SVM is off: #UD, or #GP where the hypervisor chooses so.
    let trap = unsafe { probe!("vmrun rax"; in("rax") 0) };
    ensure!(
        trap.is_some_and(|trap| trap.vector == vector::INVALID_OPCODE),
        "VMRUN is not #UD"
    );
    // SAFETY: CR4.VMXE is clear: #UD.
    let trap = unsafe { probe!("vmcall"; inout("rax") u64::MAX => _, in("rcx") 0, in("rdx") 0) };
    if let Some(trap) = trap {
        // A hypercall instruction of the other vendor is #UD; one of the right vendor returns.
        ensure_eq!(trap.vector, vector::INVALID_OPCODE, "VMCALL");
    }
    let memory = [0_u64; 1];
    // SAFETY: CR4.VMXE is clear: #UD.
    let trap = unsafe { probe!("vmxon [{}]"; in(reg) &memory) };
    ensure!(
        trap.is_some_and(|trap| trap.vector == vector::INVALID_OPCODE),
        "VMXON is not #UD"
    );
    Ok(())
}

/// Two readings of every leaf are the same.
fn steady(_: &Machine) -> Verdict {
    for (first, last) in [
        (0, cpu::max_basic_leaf()),
        (0x8000_0000, cpu::max_extended_leaf()),
    ] {
        for leaf in first..=last.min(first + 0x40) {
            for subleaf in 0..2 {
                let (one, two) = (cpuid(leaf, subleaf), cpuid(leaf, subleaf));
                ensure!(
                    one == two,
                    "leaf {leaf:#x}.{subleaf}: {one:x?}, then {two:x?}"
                );
            }
        }
    }
    Ok(())
}

/// CPUID clears the upper halves of its four registers.
fn upper_halves_cleared(_: &Machine) -> Verdict {
    let (rax, rbx, rcx, rdx): (u64, u64, u64, u64);
    // SAFETY: RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!("mov {keep}, rbx", "mov rbx, -1", "cpuid", "xchg rbx, {keep}",
            keep = out(reg) rbx,
            inout("rax") 0xFFFF_FFFF_0000_0001_u64 => rax,
            inout("rcx") 0xFFFF_FFFF_0000_0000_u64 => rcx,
            inout("rdx") u64::MAX => rdx);
    }
    ensure_eq!((rax | rbx | rcx | rdx) >> 32, 0, "upper halves after CPUID");
    Ok(())
}

/// The initial APIC id is that of the local APIC, and the APIC bit follows its enable bit.
fn apic_id(_: &Machine) -> Verdict {
    ensure_eq!(
        cpuid(1, 0).ebx >> 24,
        apic::local().id(),
        "APIC id of leaf 1"
    );
    let base = ApicBase::from_bits_retain(cpu::rdmsr(msr::APIC_BASE));
    ensure!(
        base.contains(ApicBase::ENABLE),
        "the local APIC is disabled: {base:?}"
    );
    ensure!(
        base.contains(ApicBase::BSP),
        "not the bootstrap processor: {base:?}"
    );
    Ok(())
}

/// The levels of leaf 0xB are numbered, grow, and end.
fn topology(machine: &Machine) -> Verdict {
    skip_if!(cpu::max_basic_leaf() < 0xB, "no leaf 0xB");
    // Bochs (2.7) with one processor gives a number of processors and no levels.
    let no_levels = machine.host == Host::Bochs && cpuid(0xB, 0).ecx >> 8 & 0xFF == 0;
    skip_if!(cpuid(0xB, 0).ebx == 0 || no_levels, "leaf 0xB is empty");
    let (mut shift, mut processors) = (0, 0);
    for level in 0..8 {
        let leaf = cpuid(0xB, level);
        ensure_eq!(leaf.ecx & 0xFF, level, "level number");
        ensure_eq!(leaf.edx, apic::local().id(), "x2APIC id");
        if leaf.ecx >> 8 & 0xFF == 0 {
            ensure!(level > 0, "no levels");
            return Ok(());
        }
        ensure!(
            leaf.eax & 0x1F >= shift,
            "level {level}: shift {} after {shift}",
            leaf.eax & 0x1F
        );
        ensure!(
            leaf.ebx & 0xFFFF >= processors,
            "level {level}: fewer processors than below"
        );
        shift = leaf.eax & 0x1F;
        processors = leaf.ebx & 0xFFFF;
    }
    fail!("leaf 0xB has no end")
}

/// CPUID's OSXSAVE mirrors CR4.OSXSAVE, and XGETBV is #UD without it.
fn osxsave_follows_cr4(_: &Machine) -> Verdict {
    skip_if!(!cpu::leaf1_ecx().contains(Leaf1Ecx::XSAVE), "no XSAVE");
    let cr4 = cpu::cr4();
    for on in [false, true] {
        let bit = Cr4::OSXSAVE.bits();
        // SAFETY: only permits or forbids XSAVE, which this program's own code does not use.
        unsafe { cpu::set_cr4(if on { cr4 | bit } else { cr4 & !bit }) };
        let shown = cpu::leaf1_ecx().contains(Leaf1Ecx::OSXSAVE);
        ensure!(shown == on, "CR4.OSXSAVE {on}, CPUID {shown}");
        // SAFETY: XGETBV only reads.
        let trap = unsafe { probe!("xgetbv"; in("ecx") 0, out("eax") _, out("edx") _) };
        let vector = trap.map(|trap| trap.vector);
        let wanted = (!on).then_some(vector::INVALID_OPCODE);
        ensure!(
            vector == wanted,
            "XGETBV with CR4.OSXSAVE {on}: exception {vector:?}"
        );
    }
    Ok(())
}

/// Leaf 0xD: sizes follow XCR0, and XSETBV refuses what the leaf does not list.
fn xsave_sizes(_: &Machine) -> Verdict {
    const LEGACY: u32 = 512 + 64;
    const AVX: u64 = 1 << 2;
    skip_if!(!cpu::leaf1_ecx().contains(Leaf1Ecx::XSAVE), "no XSAVE");
    // SAFETY: only permits XSAVE, which this program's own code does not use.
    unsafe { cpu::set_cr4(cpu::cr4() | Cr4::OSXSAVE.bits()) };
    let leaf = cpuid(0xD, 0);
    let supported = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    ensure_eq!(supported & 3, 3, "x87 and SSE in leaf 0xD");
    let before = cpu::xcr0();
    cpu::set_xcr0(3);
    ensure_eq!(cpuid(0xD, 0).ebx, LEGACY, "size for XCR0 = 3");
    if supported & AVX != 0 {
        let component = cpuid(0xD, 2);
        ensure_eq!(component.eax, 256, "size of the AVX state");
        cpu::set_xcr0(3 | AVX);
        ensure_eq!(
            cpuid(0xD, 0).ebx,
            component.ebx + component.eax,
            "size for XCR0 = 7"
        );
    }
    let compact = cpuid(0xD, 1);
    if compact.eax & (1 << 1 | 1 << 3) != 0 {
        // Without supervisor's components: IA32_XSS is 0.
        let end = if supported & AVX != 0 {
            LEGACY + 256
        } else {
            LEGACY
        };
        ensure_eq!(compact.ebx, end, "compacted size for XCR0");
    }
    let largest = cpuid(0xD, 0).ecx;
    let mut end = LEGACY;
    for index in (2..63).filter(|index| supported & 1 << index != 0) {
        let component = cpuid(0xD, index);
        ensure!(component.eax != 0, "component {index} has no size");
        end = end.max(component.ebx + component.eax);
    }
    ensure_eq!(largest, end, "size for all components");
    cpu::set_xcr0(before);

    // x87 is not optional; bits that are not listed are refused.
    for value in [2, 0, supported | 1 << 62] {
        // SAFETY: refused, or else harmless (see `set_xcr0`).
        let trap = unsafe {
            probe!("xsetbv"; in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32)
        };
        let vector = trap.map(|trap| trap.vector);
        ensure!(
            vector == Some(vector::GENERAL_PROTECTION),
            "XCR0 = {value:#x}: {vector:?}"
        );
        ensure_eq!(cpu::xcr0(), before, "XCR0 after a refused write");
    }
    Ok(())
}

/// Instructions that CPUID shows run and give the right result.
fn advertised_instructions(_: &Machine) -> Verdict {
    let (ecx, ebx7) = (cpu::leaf1_ecx(), cpu::leaf7_ebx());
    let value = 0x00F0_0000_0000_0010_u64;
    let result: u64;
    if ecx.contains(Leaf1Ecx::POPCNT) {
        // SAFETY: register arithmetic.
        unsafe { asm!("popcnt {}, {}", out(reg) result, in(reg) value, options(nomem, nostack)) };
        ensure_eq!(result, 5, "POPCNT");
    }
    if ecx.contains(Leaf1Ecx::SSE4_2) {
        let result: u64;
        // SAFETY: register arithmetic.
        unsafe { asm!("crc32 {}, {}", inout(reg) 0_u64 => result, in(reg) 1_u64) };
        ensure_eq!(result, 0x493C_7D27, "CRC32");
    }
    if ecx.contains(Leaf1Ecx::MOVBE) {
        let (memory, result) = ([0x1122_3344_5566_7788_u64], &mut 0_u64);
        // SAFETY: reads a local.
        unsafe { asm!("movbe {}, [{}]", out(reg) *result, in(reg) &memory) };
        ensure_eq!(*result, 0x8877_6655_4433_2211, "MOVBE");
    }
    if ebx7.contains(Leaf7Ebx::BMI1) {
        let result: u64;
        // SAFETY: register arithmetic.
        unsafe { asm!("andn {}, {}, {}", out(reg) result, in(reg) 0xF0_u64, in(reg) 0xFF_u64) };
        ensure_eq!(result, 0x0F, "ANDN");
    }
    if ebx7.contains(Leaf7Ebx::BMI2) {
        let result: u64;
        // SAFETY: register arithmetic.
        unsafe { asm!("pext {}, {}, {}", out(reg) result, in(reg) 0xABCD_u64, in(reg) 0xF0F0_u64) };
        ensure_eq!(result, 0xAC, "PEXT");
    }
    if ebx7.contains(Leaf7Ebx::ADX) {
        let result: u64;
        // SAFETY: register arithmetic.
        unsafe { asm!("clc", "adcx {}, {}", inout(reg) 2_u64 => result, in(reg) 3_u64) };
        ensure_eq!(result, 5, "ADCX");
    }
    if cpu::extended_ecx().contains(ExtendedEcx::LZCNT) {
        let result: u64;
        // SAFETY: register arithmetic.
        unsafe { asm!("lzcnt {}, {}", out(reg) result, in(reg) value) };
        ensure_eq!(result, 8, "LZCNT");
    }
    if ecx.contains(Leaf1Ecx::CX16) {
        compare_exchange_16()?;
    }
    if ecx.contains(Leaf1Ecx::AES) {
        let result: u64;
        // SAFETY: this program's own code keeps nothing in XMM registers.
        unsafe {
            asm!("pxor xmm0, xmm0", "pxor xmm1, xmm1", "aesenc xmm0, xmm1", "movq {}, xmm0",
                out(reg) result, options(nomem, nostack));
        }
        ensure_eq!(result, 0x6363_6363_6363_6363, "AESENC");
    }
    if ecx.contains(Leaf1Ecx::RDRAND) {
        let (mut seen, mut value) = (0_u64, 0_u64);
        for _ in 0..64 {
            let (word, done): (u64, u8);
            // SAFETY: register arithmetic.
            unsafe { asm!("rdrand {}", "setc {}", out(reg) word, out(reg_byte) done) };
            if done != 0 {
                seen += 1;
                value |= word;
            }
        }
        ensure!(seen > 0 && value != 0, "RDRAND gave nothing in 64 tries");
    }
    Ok(())
}

/// CMPXCHG16B exchanges when equal.
fn compare_exchange_16() -> Verdict {
    #[repr(align(16))]
    struct Pair([u64; 2]);
    let mut pair = Pair([1, 2]);
    let equal: u8;
    // SAFETY: writes a local; RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!("xchg rbx, {low}", "lock cmpxchg16b [{memory}]", "sete {equal}", "xchg rbx, {low}",
            low = inout(reg) 3_u64 => _, memory = in(reg) &raw mut pair, equal = out(reg_byte) equal,
            inout("rax") 1_u64 => _, inout("rdx") 2_u64 => _, in("rcx") 4_u64);
    }
    ensure!(equal == 1 && pair.0 == [3, 4], "CMPXCHG16B: {:?}", pair.0);
    Ok(())
}

/// RDTSCP gives TSC_AUX when CPUID shows it, and is #UD when it does not.
fn rdtscp(_: &Machine) -> Verdict {
    let shown = cpu::extended_edx().contains(ExtendedEdx::RDTSCP);
    if shown {
        // SAFETY: a register of no meaning to this program.
        unsafe { cpu::wrmsr(msr::TSC_AUX, 0x1234) };
    }
    let aux: u64;
    // SAFETY: only reads.
    let trap = unsafe { probe!("rdtscp"; out("eax") _, out("edx") _, inout("rcx") 0_u64 => aux) };
    let vector = trap.map(|trap| trap.vector);
    if shown {
        ensure!(vector.is_none(), "RDTSCP: exception {vector:?}");
        ensure_eq!(aux, 0x1234, "TSC_AUX by RDTSCP");
        ensure!(
            probe_rdmsr(msr::TSC_AUX).is_ok_and(|aux| aux == 0x1234),
            "TSC_AUX by RDMSR"
        );
    } else {
        ensure!(
            vector == Some(vector::INVALID_OPCODE),
            "hidden RDTSCP: exception {vector:?}"
        );
    }
    Ok(())
}

/// WRFSBASE and RDGSBASE work when shown and enabled, and agree with the MSRs.
fn fsgsbase(_: &Machine) -> Verdict {
    skip_if!(
        !cpu::leaf7_ebx().contains(Leaf7Ebx::FSGSBASE),
        "no FSGSBASE"
    );
    let (fs, gs): (u64, u64);
    // SAFETY: this program's own code uses neither FS nor GS.
    unsafe {
        cpu::set_cr4(cpu::cr4() | Cr4::FSGSBASE.bits());
        cpu::wrmsr(msr::GS_BASE, 0x7654_3210);
        asm!("wrfsbase {}", "rdfsbase {}", "rdgsbase {}",
            in(reg) 0x1234_5678_9ABC_u64, out(reg) fs, out(reg) gs);
        cpu::set_cr4(cpu::cr4() & !Cr4::FSGSBASE.bits());
    }
    ensure_eq!(fs, 0x1234_5678_9ABC, "RDFSBASE");
    ensure_eq!(cpu::rdmsr(msr::FS_BASE), fs, "FS.base by RDMSR");
    ensure_eq!(gs, 0x7654_3210, "RDGSBASE");
    Ok(())
}
