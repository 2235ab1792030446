//! Checks of the modes, and of instructions that exit in them.

use alloc::format;

use mem::{Direction, Width};

use super::code::{
    amd_instructions_code, intel_instructions_code, pae_code, ports_code, protected_code,
    real_code, to_long_code,
};
use super::guest::*;
use crate::state::{CpuMode, Gpr, SegmentName};
use crate::{Backend, Exit, PortIo, Registers, VirtualCpu};

pub(super) fn real_mode<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&real_state(), real_code);
    equal("mode", g.vcpu.mode(), CpuMode::Real)?;
    g.expect_and_skip(Exit::Cpuid)?;
    g.gpr("EAX at CPUID", Gpr::Rax, 0x1234_5678)?;
    g.expect_and_skip(out(0x80, Width::Byte))?;
    g.gpr("AL at OUT", Gpr::Rax, 0x1234_565a)?;
    g.expect(Exit::PortIo(PortIo {
        port: 0x81,
        width: Width::Word,
        direction: Direction::Read,
        string: false,
    }))?;
    g.vcpu.set_gpr(Gpr::Rax, 0xbeef);
    g.vcpu.skip_instruction(None);
    g.expect_and_skip(out(0x3f8, Width::Dword))?;
    g.gpr("EAX at the second OUT", Gpr::Rax, 0xbeef)?;
    g.expect(Exit::Halt)
}

/// Real-mode selectors are paragraph numbers: their low bits are no privilege level.
pub(super) fn real_mode_odd_selector<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = real_state();
    let cs = &mut state.segments[SegmentName::Cs as usize];
    cs.selector += 3;
    cs.base += 0x30;
    g.vcpu.set_state(&state);
    g.code(CODE + 0x30, real_code);
    g.expect_and_skip(Exit::Cpuid)?;
    g.expect_and_skip(out(0x80, Width::Byte))?;
    let cs = g.vcpu.segment(SegmentName::Cs);
    equal(
        "CS",
        cs.selector,
        state.segments[SegmentName::Cs as usize].selector,
    )
}

pub(super) fn protected_mode<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&protected_state(), protected_code);
    equal("mode", g.vcpu.mode(), CpuMode::Protected32)?;
    g.expect(Exit::MsrRead)?;
    g.gpr("ECX at RDMSR", Gpr::Rcx, 0x1b)?;
    g.vcpu.set_gpr(Gpr::Rax, 0xfee0_0900);
    g.vcpu.set_gpr(Gpr::Rdx, 0);
    g.vcpu.skip_instruction(None);
    g.expect_and_skip(Exit::MsrWrite)?;
    g.gpr("EBX, from RDMSR", Gpr::Rbx, 0xfee0_0900)?;
    g.gpr("EAX at WRMSR", Gpr::Rax, 0x8000_0001)?;
    g.gpr("EDX at WRMSR", Gpr::Rdx, 0x0203_0405)?;
    g.expect(Exit::Halt)
}

pub(super) fn way_to_long_mode<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&protected_state(), to_long_code);
    g.expect(Exit::Halt)?;
    equal("mode", g.vcpu.mode(), CpuMode::Long64)?;
    g.gpr("RBX", Gpr::Rbx, 0x1234_5678_9abc_def0)?;
    g.gpr("CR4 as the guest reads it", Gpr::Rcx, CR4_PAE)?;
    g.gpr("CR0 as the guest reads it", Gpr::Rdx, CR0_PG | 0x11)?;
    equal("CR4", g.vcpu.cr4(), CR4_PAE)?;
    equal("EFER", g.vcpu.efer(), EFER_LME | EFER_LMA)
}

pub(super) fn pae_paging<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&protected_state(), pae_code);
    g.write_u64(DATA, 0x600d_da7a);
    g.expect(Exit::Halt)?;
    g.gpr("EBX", Gpr::Rbx, 0x600d_da7a)
}

pub(super) fn ports<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let input = |port, width| {
        Exit::PortIo(PortIo {
            port,
            width,
            direction: Direction::Read,
            string: false,
        })
    };
    g.start(&long_state(), ports_code);
    g.expect_and_skip(out(0x10, Width::Byte))?;
    g.expect_and_skip(out(0x1234, Width::Word))?;
    g.expect_and_skip(out(0x1234, Width::Dword))?;
    g.expect_and_skip(input(0x1234, Width::Byte))?;
    g.expect_and_skip(input(0x60, Width::Dword))?;
    g.expect(Exit::PortIo(PortIo {
        port: 0x1234,
        width: Width::Byte,
        direction: Direction::Write,
        string: true,
    }))
}

pub(super) fn other_instructions<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const X87_AND_SSE: u64 = 3;
    let mut state = long_state();
    state.cr4 |= CR4_OSXSAVE;
    let code = if B::NAME == "AMD-V" {
        amd_instructions_code
    } else {
        intel_instructions_code
    };
    g.start(&state, code);
    g.expect_and_skip(Exit::Hypercall)?;
    g.expect_and_skip(Exit::Wbinvd)?;
    let exit = g.next()?;
    // QEMU 7.2 TCG reports INVD as WBINVD.
    if !matches!(exit, Exit::Invd | Exit::Wbinvd) {
        return Err(format!("{exit:x?}, not INVD"));
    }
    g.vcpu.skip_instruction(None);
    g.expect_and_skip(Exit::Rdpmc)?;
    let exit = g.next()?;
    if exit == Exit::Xsetbv {
        g.vcpu.set_xcr0(X87_AND_SSE);
        g.vcpu.skip_instruction(None);
        g.expect(Exit::VirtualizationInstruction)?;
    } else {
        // QEMU 7.2 TCG executes XSETBV without the exit.
        equal("exit", exit, Exit::VirtualizationInstruction)?;
    }
    equal("XCR0", g.vcpu.xcr0(), X87_AND_SSE)?;
    g.vcpu.unload();
    g.vcpu.load(0);
    equal("XCR0, loaded again", g.vcpu.xcr0(), X87_AND_SSE)
}
