//! x87, SSE and AVX state: stays what it is across exits, halts and faults.
//!
//! This program is compiled without SSE, so nothing of its own touches these registers.

use core::arch::asm;

use crate::apic::{self, Register};
use crate::cpu::{self, Cr4, Leaf1Ecx, msr, port};
use crate::interrupts::{self, count, hook, vector};
use crate::machine::Machine;
use crate::{checks, ensure, ensure_eq, paging, probe, skip_if};

use super::Verdict;

checks![
    xmm_registers,
    ymm_registers,
    mxcsr,
    x87_registers,
    xsave_round_trip,
    xsaves_round_trip
];

const WAKE_VECTOR: u8 = 0x52;

/// All that makes a hypervisor run other code: exits of several kinds, a halt, a fault.
fn disturb() {
    cpu::cpuid(0, 0);
    cpu::rdmsr(msr::APIC_BASE);
    port::write8(0x80, 1);
    port::read8(0x21);
    apic::local().read(Register::Version);
    let page = paging::unmap(0);
    // SAFETY: not mapped: faults, which is caught.
    let _ = unsafe { probe!("mov al, [{}]"; in(reg) page, out("al") _) };
    interrupts::reset_counts();
    hook(WAKE_VECTOR, interrupts::end_at_apic);
    let local = apic::local();
    local.write(Register::Timer, WAKE_VECTOR.into());
    local.write(Register::InitialCount, 100_000);
    while count(WAKE_VECTOR) == 0 {
        cpu::wait_for_interrupt();
    }
}

/// Sixteen registers of 32 bytes, of which XMM uses the first 16.
#[repr(C, align(64))]
struct Vectors([[u64; 4]; 16]);

impl Vectors {
    fn distinct() -> Self {
        let mut vectors = Self([[0; 4]; 16]);
        for (index, word) in (1..).zip(vectors.0.iter_mut().flatten()) {
            *word = u64::wrapping_mul(index, 0x0123_4567_89AB_CDEF);
        }
        vectors
    }
}

/// Repeats an instruction for registers 0 to 15, `\i`, with memory at RDI.
macro_rules! for_all_registers {
    ($text:literal, $pointer:expr) => {
        asm!(
            ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            $text,
            ".endr",
            in("rdi") $pointer,
            options(nostack)
        )
    };
}

fn xmm_registers(_: &Machine) -> Verdict {
    let wanted = Vectors::distinct();
    let mut got = Vectors([[0; 4]; 16]);
    // SAFETY: reads the first half of each local row into registers that nothing else uses.
    unsafe { for_all_registers!("movups xmm\\i, [rdi + 32 * \\i]", &raw const wanted) };
    disturb();
    // SAFETY: writes the first half of each local row.
    unsafe { for_all_registers!("movups [rdi + 32 * \\i], xmm\\i", &mut got) };
    for (index, (got, wanted)) in got.0.iter().zip(&wanted.0).enumerate() {
        ensure!(
            got[..2] == wanted[..2],
            "XMM{index}: {:x?}, not {:x?}",
            &got[..2],
            &wanted[..2]
        );
    }
    Ok(())
}

/// Turns XSAVE on, with AVX if `avx`; false if that is not there.
fn enable_xsave(avx: bool) -> bool {
    const X87_SSE: u64 = 3;
    const AVX: u64 = 4;
    let features = cpu::leaf1_ecx();
    if !features.contains(Leaf1Ecx::XSAVE) || avx && !features.contains(Leaf1Ecx::AVX) {
        return false;
    }
    // SAFETY: only permits XSAVE, which this program's own code does not use.
    unsafe { cpu::set_cr4(cpu::cr4() | Cr4::OSXSAVE.bits()) };
    cpu::set_xcr0(if avx { X87_SSE | AVX } else { X87_SSE });
    true
}

fn ymm_registers(_: &Machine) -> Verdict {
    skip_if!(!enable_xsave(true), "no AVX");
    let wanted = Vectors::distinct();
    let mut got = Vectors([[0; 4]; 16]);
    // SAFETY: reads a local into registers that nothing else uses.
    unsafe { for_all_registers!("vmovups ymm\\i, [rdi + 32 * \\i]", &wanted) };
    disturb();
    // SAFETY: writes a local.
    unsafe { for_all_registers!("vmovups [rdi + 32 * \\i], ymm\\i", &mut got) };
    for (index, (got, wanted)) in got.0.iter().zip(&wanted.0).enumerate() {
        ensure!(got == wanted, "YMM{index}: {got:x?}, not {wanted:x?}");
    }
    ensure_eq!(cpu::xcr0(), 7, "XCR0");
    Ok(())
}

fn mxcsr(_: &Machine) -> Verdict {
    const DEFAULT: u32 = 0x1F80;
    /// Round to zero, flush to zero, two sticky flags.
    const BUSY: u32 = DEFAULT | 3 << 13 | 1 << 15 | 0x21;
    let values = [BUSY, DEFAULT];
    let mut got = [0_u32];
    // SAFETY: this program's own code does not use SSE.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &values[0], options(nostack)) };
    disturb();
    // SAFETY: writes a local and puts the default back.
    unsafe {
        asm!("stmxcsr [{}]", "ldmxcsr [{}]", in(reg) &mut got, in(reg) &values[1], options(nostack));
    }
    ensure_eq!(got[0], BUSY, "MXCSR");
    Ok(())
}

fn x87_registers(_: &Machine) -> Verdict {
    /// Single precision, round down, all masked; the reserved bit 6 is always set.
    const CONTROL: u16 = 0x047F;
    let (mut got, mut control) = ([0_u64; 3], [CONTROL, 0]);
    // SAFETY: this program's own code does not use the FPU.
    unsafe {
        asm!("fninit", "fldcw [{}]", "fldpi", "fld1", "fldl2e", in(reg) &control[0], options(nostack));
    }
    disturb();
    // SAFETY: writes locals.
    unsafe {
        asm!("fnstcw [{0} + 2]", "fstp qword ptr [{1}]",
            "fstp qword ptr [{1} + 8]", "fstp qword ptr [{1} + 16]", "fninit",
            in(reg) &mut control, in(reg) &mut got, options(nostack));
    }
    ensure_eq!(control[1], CONTROL, "control word");
    // Rounded down from the constants' 64-bit significands, as the control word says.
    ensure_eq!(got[0], 0x3FF7_1547_652B_82FE, "log2(e)");
    ensure_eq!(got[1], 0x3FF0_0000_0000_0000, "1");
    ensure_eq!(got[2], 0x4009_21FB_5444_2D18, "pi");
    Ok(())
}

/// Memory for XSAVE and its kin.
#[repr(C, align(64))]
struct Area([u64; 512]);

/// XSAVES and XRSTORS: the compacted form, the supervisor's own. What is saved comes back. AVX is left off: Bochs (2.7)
/// saves its state in a place where it is not looked for.
fn xsaves_round_trip(_: &Machine) -> Verdict {
    const COMPACTED: u64 = 1 << 63;
    const MASK: u32 = 3;
    skip_if!(!enable_xsave(false), "no XSAVE");
    skip_if!(cpu::cpuid(0xD, 1).eax & 1 << 3 == 0, "no XSAVES");
    let mut area = Area([0; 512]);
    let (wanted, zero) = (Vectors::distinct(), Vectors([[0; 4]; 16]));
    let mut got = Vectors([[0; 4]; 16]);
    // SAFETY: the area is 4 KiB, more than x87 and SSE take.
    unsafe {
        for_all_registers!("movups xmm\\i, [rdi + 32 * \\i]", &raw const wanted);
        asm!("xsaves64 [{}]", in(reg) &mut area, in("eax") MASK, in("edx") 0, options(nostack));
        for_all_registers!("movups xmm\\i, [rdi + 32 * \\i]", &zero);
    }
    ensure_eq!(area.0[65], COMPACTED | u64::from(MASK), "XCOMP_BV");
    disturb();
    // SAFETY: as above.
    unsafe {
        asm!("xrstors64 [{}]", in(reg) &area, in("eax") MASK, in("edx") 0, options(nostack));
        for_all_registers!("movups [rdi + 32 * \\i], xmm\\i", &mut got);
    }
    for (index, (got, wanted)) in got.0.iter().zip(&wanted.0).enumerate() {
        ensure!(
            got[..2] == wanted[..2],
            "XMM{index} after XRSTORS: {:x?}",
            &got[..2]
        );
    }
    // A component that neither XCR0 nor IA32_XSS has on is reserved in what is restored.
    area.0[65] |= 1 << 8;
    // SAFETY: faults, and changes nothing.
    let trap = unsafe { probe!("xrstors64 [{}]"; in(reg) &area, in("eax") MASK, in("edx") 0) };
    let vector = trap.map(|trap| trap.vector);
    ensure!(
        vector == Some(vector::GENERAL_PROTECTION),
        "XRSTORS of a component that is off: {vector:?}"
    );
    Ok(())
}

/// XSAVE and XRSTOR: what is saved comes back, and the header says what is in use.
fn xsave_round_trip(_: &Machine) -> Verdict {
    let avx = enable_xsave(true);
    skip_if!(!avx && !enable_xsave(false), "no XSAVE");
    let mask: u32 = if avx { 7 } else { 3 };
    let mut area = Area([0; 512]);
    let (wanted, zero) = (Vectors::distinct(), Vectors([[0; 4]; 16]));
    let mut got = Vectors([[0; 4]; 16]);
    // SAFETY: the area is 4 KiB, more than x87, SSE and AVX take.
    unsafe {
        for_all_registers!("movups xmm\\i, [rdi + 32 * \\i]", &raw const wanted);
        asm!("xsave64 [{}]", in(reg) &mut area, in("eax") mask, in("edx") 0, options(nostack));
        for_all_registers!("movups xmm\\i, [rdi + 32 * \\i]", &zero);
    }
    disturb();
    // SAFETY: as above.
    unsafe {
        asm!("xrstor64 [{}]", in(reg) &area, in("eax") mask, in("edx") 0, options(nostack));
        for_all_registers!("movups [rdi + 32 * \\i], xmm\\i", &mut got);
    }
    ensure!(
        area.0[64] & 2 != 0,
        "XSTATE_BV {:#x} without SSE",
        area.0[64]
    );
    for (index, (got, wanted)) in got.0.iter().zip(&wanted.0).enumerate() {
        ensure!(
            got[..2] == wanted[..2],
            "XMM{index} after XRSTOR: {:x?}",
            &got[..2]
        );
    }
    Ok(())
}
