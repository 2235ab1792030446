//! Tiny guests that exercise a backend on the processor it runs on.
//!
//! Each check makes a VM with 2 MiB of RAM and one vCPU, runs a few instructions in real,
//! 32-bit or 64-bit mode, and compares exits and registers with what the manuals promise.
//! The same checks run on both vendors. Built only with the feature `selftest`: the kernel
//! then runs them at boot and powers off.
//!
//! Unsafe: reads the guests' code, which is assembled into this program, as bytes.

mod code;
mod events;
mod guest;
mod memory;
mod modes;
mod registers;

use alloc::{format, string::String, vec::Vec};

use mem::HostMemory;
use x86_64::instructions::interrupts;

use crate::cpu::{msr, rdmsr, rdtsc};
use crate::{Backend, Exit, VirtualCpu};
use code::cpuid_loop_code;
use events::*;
use guest::{Check, Guest, TAGS, equal, long_state};
use memory::*;
use modes::*;
use registers::*;

/// Registers that the host relies on. Those of SYSCALL and SYSENTER it does not use, and VT-x
/// leaves a guest's values in them.
#[derive(Debug, PartialEq)]
struct HostRegisters {
    msrs: [u64; 4],
    dr7: u64,
    task_register: u16,
    cr0: u64,
    cr4: u64,
}

impl HostRegisters {
    const MSRS: [u32; 4] = [msr::FS_BASE, msr::GS_BASE, msr::EFER, msr::PAT];

    fn read() -> Self {
        HostRegisters {
            // SAFETY: every x86-64 processor has these registers; reading has no side effect.
            msrs: Self::MSRS.map(|number| unsafe { rdmsr(number) }),
            dr7: x86_64::registers::debug::Dr7::read_raw(),
            // SAFETY: STR at privilege level 0 has no side effect.
            task_register: unsafe { x86::task::tr() }.bits(),
            cr0: x86_64::registers::control::Cr0::read_raw(),
            cr4: x86_64::registers::control::Cr4::read_raw(),
        }
    }
}

/// What the checks need of the host.
#[derive(Clone, Copy)]
pub struct Host {
    /// Where guests' memory comes from.
    pub memory: &'static dyn HostMemory,
    /// Makes an interrupt arrive on this pCPU when its TSC has come to this value, or soon after.
    pub arm_timer: fn(u64),
}

/// One check: a name, and what it does with a fresh guest.
type Entry<B> = (&'static str, fn(&mut Guest<B>, &B) -> Check);

fn checks<B: Backend>() -> Vec<Entry<B>> {
    alloc::vec![
        ("real mode: CPUID, IN, OUT, HLT", real_mode),
        ("real mode: any CS selector", real_mode_odd_selector),
        ("32-bit mode: RDMSR, WRMSR", protected_mode),
        ("a guest's own way to 64-bit mode", way_to_long_mode),
        ("a guest's own way to PAE paging", pae_paging),
        ("nested page faults", nested_faults),
        ("exception with error code", exception_injection),
        ("interrupt window and interrupt", interrupt_window),
        ("interrupt, delivery interrupted", interrupted_interrupt),
        ("INT n, delivery interrupted", interrupted_int_instruction),
        ("NMI and NMI window", nmi),
        ("deadline", deadline),
        ("general-purpose registers", general_registers),
        ("XMM and debug registers across vCPUs", switched_registers),
        ("MSRs", msrs),
        ("triple fault", triple_fault),
        ("single step", single_step),
        ("TSC offset", tsc_offset),
        ("TSC scale, where the processor scales", tsc_scale),
        ("TLB flushes", flushes),
        ("port I/O forms", ports),
        ("other instructions that exit", other_instructions),
        ("task priority", task_priority),
        (
            "nested faults of fetches and page walks",
            other_nested_faults
        ),
        (
            "exception and NMI, delivery interrupted",
            interrupted_others
        ),
        ("host interrupts", host_interrupt),
        ("a guest's breakpoint", breakpoint),
        ("a guest's breakpoint on the host", breakpoint_in_host),
        ("two VMs at the same addresses", two_vms),
        ("refused entry is explained", refused_entry),
    ]
}

/// Runs all checks on the calling pCPU, which must have virtualization enabled as pCPU 0 and
/// an interrupt table that handles whatever is pending. Calls `report` with each check's
/// name and result, and at the end with the cost of an exit.
pub fn run<B: Backend>(backend: &B, host: Host, report: &mut dyn FnMut(&str, Result<(), String>)) {
    let before = HostRegisters::read();
    for (name, check) in checks::<B>() {
        let result = interrupts::without_interrupts(|| {
            let mut guest = Guest::new(backend, host, TAGS[0])?;
            let result = check(&mut guest, backend);
            guest.end();
            result
        });
        report(name, result);
    }
    let unchanged = equal("what guests left", HostRegisters::read(), before);
    report("the host's registers are its own", unchanged);
    let cost = interrupts::without_interrupts(|| cpuid_cost(backend, host));
    match cost {
        Ok(ticks) => report(
            &format!("CPUID: {ticks} ticks per exit, entry and skip"),
            Ok(()),
        ),
        Err(e) => report("CPUID: ticks per exit", Err(e)),
    }
}

/// Host TSC ticks of a loop of CPUID exits that are only stepped over.
fn cpuid_cost<B: Backend>(backend: &B, host: Host) -> Result<u64, String> {
    const ROUNDS: u64 = 1000;
    let mut guest = Guest::new(backend, host, TAGS[0])?;
    guest.start(&long_state(), cpuid_loop_code);
    let mut run = || {
        guest.expect_and_skip(Exit::Cpuid)?;
        let mut done = 0;
        let start = rdtsc();
        while done < ROUNDS {
            if guest.vcpu.enter() == Exit::Cpuid {
                guest.vcpu.skip_instruction(None);
                done += 1;
            } else {
                guest.expect(Exit::Cpuid)?;
            }
        }
        Ok((rdtsc() - start) / ROUNDS)
    };
    let result = run();
    guest.end();
    result
}
