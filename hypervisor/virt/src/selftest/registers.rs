//! Checks of registers that are switched between guests, and of the TSC.

use alloc::format;

use super::code::{bytes_of, keep_code, msr_code, registers_code, tsc_code, tsc_twice_code};
use super::guest::*;
use crate::cpu::{msr, rdtsc};
use crate::state::Gpr;
use crate::{Backend, Exit, Registers, VcpuSetup, VirtualCpu};

pub(super) fn general_registers<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    for (i, gpr) in state.gprs.iter_mut().enumerate() {
        *gpr = 0x0123_4567_89ab_cdef_u64.rotate_left(4 * i as u32);
    }
    g.start(&state, registers_code);
    g.expect(Exit::Halt)?;
    let after = g.vcpu.state();
    for gpr in Gpr::ALL {
        let (found, before) = (after.gprs[gpr as usize], state.gprs[gpr as usize]);
        equal(&format!("{gpr:?}"), found, !before)?;
    }
    Ok(())
}

/// FPU and debug registers survive another vCPU on the same pCPU, and don't reach it.
pub(super) fn switched_registers<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    let values = [
        (Gpr::Rax, 0x1111_2222_3333_4444),
        (Gpr::Rbx, 0x5555_6666_7777_8888),
        (Gpr::Rcx, 0xffff_8000_0000_1000),
        (Gpr::Rdx, 0x0000_7fff_ffff_0000),
    ];
    g.start(&long_state(), keep_code);
    for (gpr, value) in values {
        g.vcpu.set_gpr(gpr, value);
    }
    g.expect(Exit::Halt)?;
    g.vcpu.unload();
    let setup = VcpuSetup {
        vm: VM,
        vcpu: 1,
        tag: TAGS[1],
        nested_root: g.tables.root(),
    };
    let mut other = backend.create_vcpu(setup).map_err(|e| format!("{e}"))?;
    other.load(0);
    let mut state = long_state();
    // The second half reads what is there.
    let halt = bytes_of(keep_code).iter().position(|&b| b == 0xf4);
    let second_half = CODE + halt.map_or(0, |at| at as u64 + 1);
    state.rip = second_half;
    other.set_state(&state);
    core::mem::swap(&mut g.vcpu, &mut other);
    let seen = g.expect(Exit::Halt).and_then(|()| {
        [Gpr::Rsi, Gpr::Rdi, Gpr::R8, Gpr::R9]
            .into_iter()
            .try_for_each(|gpr| g.gpr("what the other vCPU sees", gpr, 0))
    });
    // Now the first half, to overwrite.
    g.vcpu.set_rip(CODE);
    let overwritten = g.expect(Exit::Halt);
    core::mem::swap(&mut g.vcpu, &mut other);
    other.unload();
    drop(other);
    g.vcpu.load(0);
    seen?;
    overwritten?;
    g.vcpu.set_rip(second_half);
    g.expect(Exit::Halt)?;
    for (gpr, (_, value)) in [Gpr::Rsi, Gpr::Rdi, Gpr::R8, Gpr::R9]
        .into_iter()
        .zip(values)
    {
        g.gpr("what came back", gpr, value)?;
    }
    let state = g.vcpu.state();
    equal("DR0", state.dr[0], values[2].1)?;
    equal("DR3", state.dr[3], values[3].1)
}

pub(super) fn msrs<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), msr_code);
    equal(
        "set_msr",
        g.vcpu.set_msr(msr::KERNEL_GS_BASE, 0x1234_5678_9abc),
        true,
    )?;
    equal(
        "set_msr, not canonical",
        g.vcpu.set_msr(msr::LSTAR, 1 << 63),
        false,
    )?;
    equal("msr, unknown", g.vcpu.msr(0x1b), None)?;
    g.expect(Exit::Halt)?;
    g.gpr("KERNEL_GS_BASE, low", Gpr::Rax, 0x5678_9abc)?;
    g.gpr("KERNEL_GS_BASE, high", Gpr::Rdx, 0x1234)?;
    let wanted = Some(0xffff_8000_0000_1000);
    equal("LSTAR", g.vcpu.msr(msr::LSTAR), wanted)?;
    g.vcpu.unload();
    g.vcpu.load(0);
    equal("LSTAR, loaded again", g.vcpu.msr(msr::LSTAR), wanted)
}

pub(super) fn tsc_offset<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const OFFSET: u64 = 1 << 50;
    g.start(&long_state(), tsc_code);
    g.vcpu.set_tsc_offset(OFFSET);
    let before = rdtsc();
    g.expect(Exit::Halt)?;
    let after = rdtsc();
    let host = g.vcpu.gpr(Gpr::Rax).wrapping_sub(OFFSET);
    if (before..=after).contains(&host) {
        Ok(())
    } else {
        Err(format!("{host} is not in {before}..={after}"))
    }
}

/// A guest's TSC at a third of the host's rate, across a load on the way. Nothing to see where nothing is scaled.
pub(super) fn tsc_scale<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    const OFFSET: u64 = 1 << 50;
    let Some(scaling) = backend.tsc_scaling() else {
        return Ok(());
    };
    let scale = scaling.scale(3, 1).ok_or("no factor of a third")?;
    g.start(&long_state(), tsc_twice_code);
    g.vcpu.set_tsc_scale(scale);
    g.vcpu.set_tsc_offset(OFFSET);
    for what in ["RDTSC", "RDTSC after another load"] {
        let before = scale.to_guest(rdtsc());
        g.expect_and_skip(Exit::Halt)?;
        let after = scale.to_guest(rdtsc());
        let shown = g.vcpu.gpr(Gpr::Rax).wrapping_sub(OFFSET);
        if !(before..=after).contains(&shown) {
            return Err(format!("{what}: {shown} is not in {before}..={after}"));
        }
        g.vcpu.unload();
        g.vcpu.load(0);
    }
    Ok(())
}
