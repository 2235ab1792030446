//! Checks of nested paging, and of entries that are refused.

use alloc::format;

use mem::nested::Rights;
use mem::{Gpa, PAGE_SIZE};

use super::code::{cpuid_loop_code, faults_code, flush_code, jump_code};
use super::guest::*;
use crate::state::Gpr;
use crate::{Backend, Exit, Registers, VirtualCpu};

pub(super) fn nested_faults<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    g.start(&long_state(), faults_code);
    g.expect_fault(UNMAPPED + 0x120, false)?;
    g.memory.write_u64(g.spare + 0x120, 41);
    g.map_spare(Rights::READ)?;
    g.expect_fault(UNMAPPED + 0x128, true)?;
    g.gpr("RBX", Gpr::Rbx, 42)?;
    g.tables
        .protect(Gpa(UNMAPPED), PAGE_SIZE, Rights::READ_WRITE)
        .map_err(|e| format!("{e:?}"))?;
    backend.flush_nested(g.tables.root());
    g.expect(Exit::Halt)?;
    equal("memory", g.memory.read_u64(g.spare + 0x128), 42)
}

pub(super) fn flushes<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    g.start(&long_state(), flush_code);
    g.write_u64(0, 0x11);
    g.memory.write_u64(g.spare, 0x22);
    g.map_spare(Rights::READ)?;
    let flags = PAGE_PRESENT_WRITE | PAGE_LARGE;
    g.write_u64(PD + 8, flags);
    g.expect_and_skip(Exit::Halt)?;
    g.gpr("first read", Gpr::Rax, 0x11)?;
    g.write_u64(PD + 8, UNMAPPED | flags);
    g.vcpu.flush_guest_tlb();
    g.expect_and_skip(Exit::Halt)?;
    g.gpr("after the guest's flush", Gpr::Rbx, 0x22)?;
    g.tables
        .unmap(Gpa(UNMAPPED), PAGE_SIZE)
        .map_err(|e| format!("{e:?}"))?;
    backend.flush_nested(g.tables.root());
    g.expect_fault(UNMAPPED, false)
}

pub(super) fn refused_entry<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.cr4 &= !CR4_PAE;
    g.start(&state, cpuid_loop_code);
    let exit = g.vcpu.enter();
    if !matches!(exit, Exit::EntryFailure { .. }) {
        return Err(format!("{exit:x?}, not a refusal"));
    }
    let why = g.vcpu.explain_entry_failure();
    if why.contains("PAE") {
        Ok(())
    } else {
        Err(format!("the explanation does not name CR4.PAE: {why}"))
    }
}

/// Fetching from a page without execute rights, and a walk of page tables that are not there.
pub(super) fn other_nested_faults<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), jump_code);
    g.vcpu.set_gpr(Gpr::Rsi, UNMAPPED + 0x10);
    g.map_spare(Rights::READ_WRITE)?;
    match g.next()? {
        Exit::NestedPageFault(f) if f.gpa == Gpa(UNMAPPED + 0x10) => {
            equal(
                "(write, fetch, walk)",
                (f.write, f.fetch, f.page_walk),
                (false, true, false),
            )?;
        }
        other => return Err(format!("{other:x?}, not a nested fetch fault")),
    }
    let beyond = UNMAPPED + PAGE_SIZE;
    g.vcpu.set_cr3(beyond);
    match g.next()? {
        Exit::NestedPageFault(f) if f.gpa.align_down(PAGE_SIZE) == Gpa(beyond) => {
            equal("page walk", f.page_walk, true)
        }
        other => Err(format!("{other:x?}, not a fault in a page walk")),
    }
}

/// Two VMs read their own memory at the same address, also when both have tags beyond what
/// the processor has.
pub(super) fn two_vms<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    const MANY: u32 = 1 << 20;
    let host = g.host;
    g.vcpu.unload();
    let result = [[1, 2], [MANY, MANY + 1]].into_iter().try_for_each(|tags| {
        let mut vms = alloc::vec![];
        for tag in tags {
            let mut vm = Guest::new(backend, host, tag)?;
            vm.start(&long_state(), faults_code);
            vm.map_spare(Rights::READ_WRITE)?;
            vm.memory.write_u64(vm.spare + 0x120, 100 * u64::from(tag));
            vm.vcpu.unload();
            vms.push((tag, vm));
        }
        let result = (0..3).try_for_each(|_| {
            vms.iter_mut().try_for_each(|(tag, vm)| {
                vm.vcpu.load(0);
                vm.vcpu.set_rip(CODE);
                let seen = vm.expect(Exit::Halt);
                vm.vcpu.unload();
                seen?;
                vm.vcpu.load(0);
                let seen = vm.gpr("RBX", Gpr::Rbx, 100 * u64::from(*tag) + 1);
                vm.vcpu.unload();
                seen
            })
        });
        for (_, mut vm) in vms {
            vm.vcpu.load(0);
            vm.end();
        }
        result
    });
    g.vcpu.load(0);
    result
}
