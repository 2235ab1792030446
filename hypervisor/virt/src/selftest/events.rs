//! Checks of exceptions, interrupts and NMIs, of the guest's and the host's.

use alloc::format;

use mem::nested::Rights;
use mem::{Gpa, PAGE_SIZE, Width};
use x86_64::instructions::interrupts;

use super::code::{
    arm_code, breakpoint_code, endless_code, exception_code, interrupt_code, priority_code,
    software_code, step_code, undefined_code,
};
use super::guest::*;
use crate::cpu::rdtsc;
use crate::state::{Event, Gpr};
use crate::{Backend, CrAccess, Exit, Registers, VirtualCpu};

pub(super) fn exception_injection<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), exception_code);
    let event = Event::Exception {
        vector: 13,
        error_code: Some(0x18),
    };
    g.vcpu.inject(event);
    equal("queued event", g.vcpu.queued(), Some(event))?;
    g.expect(Exit::Halt)?;
    g.gpr("error code", Gpr::Rdx, 0x18)?;
    g.gpr("return address", Gpr::Rsi, CODE)?;
    equal("queued event", g.vcpu.queued(), None)
}

pub(super) fn interrupt_window<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), interrupt_code);
    equal("interrupt_ready", g.vcpu.interrupt_ready(), false)?;
    g.vcpu.request_interrupt_window(true);
    g.expect(Exit::InterruptWindow)?;
    equal("interrupt_ready", g.vcpu.interrupt_ready(), true)?;
    g.vcpu.inject(Event::Interrupt(0x41));
    equal("interrupt_ready", g.vcpu.interrupt_ready(), false)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    g.expect(Exit::Halt)?;
    g.gpr("interrupts taken", Gpr::Rbx, 1)
}

/// The stack is not there when the interrupt comes; when it is, the interrupt comes again.
pub(super) fn interrupted_interrupt<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.rflags |= RFLAGS_IF;
    state.gprs[Gpr::Rsp as usize] = UNMAPPED + 0x800;
    g.start(&state, interrupt_code);
    g.vcpu.inject(Event::Interrupt(0x41));
    g.expect_stack_fault()?;
    equal(
        "queued event",
        g.vcpu.queued(),
        Some(Event::Interrupt(0x41)),
    )?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    equal("queued event", g.vcpu.queued(), None)?;
    g.expect(Exit::Halt)?;
    g.gpr("interrupts taken", Gpr::Rbx, 1)
}

/// The same with INT n: taken once, and the guest returns behind it.
pub(super) fn interrupted_int_instruction<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.gprs[Gpr::Rsp as usize] = UNMAPPED + 0x800;
    g.start(&state, software_code);
    g.expect_stack_fault()?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    g.expect(Exit::Halt)?;
    equal("RIP", g.vcpu.rip(), CODE + 2)?;
    g.gpr("interrupts taken", Gpr::Rbx, 1)
}

impl<B: Backend> Guest<B> {
    /// A push onto the unmapped stack: which of its words comes first is the processor's choice.
    fn expect_stack_fault(&mut self) -> Check {
        match self.next()? {
            Exit::NestedPageFault(f) if f.gpa.align_down(PAGE_SIZE) == Gpa(UNMAPPED) && f.write => {
                Ok(())
            }
            other => Err(format!("{other:x?}, not a push onto the unmapped stack")),
        }
    }
}

pub(super) fn nmi<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), interrupt_code);
    equal("nmi_ready", g.vcpu.nmi_ready(), true)?;
    g.vcpu.inject(Event::Nmi);
    g.expect(out(0x41, Width::Byte))?;
    equal("nmi_ready in the handler", g.vcpu.nmi_ready(), false)?;
    g.vcpu.request_nmi_window(true);
    g.vcpu.skip_instruction(None);
    g.expect(Exit::NmiWindow)?;
    equal("nmi_ready after IRET", g.vcpu.nmi_ready(), true)?;
    g.expect(Exit::Halt)?;
    g.gpr("NMIs taken", Gpr::Rbx, 1)
}

/// Only where the backend has a timer of its own; elsewhere the kernel's does this.
pub(super) fn deadline<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), endless_code);
    let at = rdtsc() + 1_000_000;
    if !g.vcpu.set_deadline(at) {
        return Ok(());
    }
    g.expect(Exit::Deadline)?;
    let now = rdtsc();
    if now < at {
        return Err(format!("{} ticks early", at - now));
    }
    Ok(())
}

pub(super) fn triple_fault<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.idtr.limit = 0;
    g.start(&state, undefined_code);
    g.expect(Exit::TripleFault)
}

pub(super) fn single_step<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.rflags |= RFLAGS_TF;
    g.start(&state, step_code);
    g.expect(Exit::Halt)?;
    g.gpr("return address", Gpr::Rsi, CODE + 1)?;
    let dr6 = g.vcpu.gpr(Gpr::Rax);
    equal("DR6.BS", dr6 & DR6_BS, DR6_BS)
}

pub(super) fn task_priority<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const MOV_CR8_BYTES: u8 = 4;
    g.start(&long_state(), priority_code);
    if g.vcpu.task_priority().is_some() {
        return virtual_task_priority(g);
    }
    let wanted = CrAccess::MovTo {
        cr: 8,
        gpr: Gpr::Rbx,
    };
    match g.vcpu.enter() {
        Exit::CrAccess(access) => equal("access", access.unwrap_or(wanted), wanted)?,
        other => return Err(format!("{other:x?}, not an access to CR8")),
    }
    g.vcpu.skip_instruction(Some(MOV_CR8_BYTES));
    g.expect(Exit::Halt)
}

/// CR8 without exits; one when an interrupt of class 5 waits for the class to be lower.
pub(super) fn virtual_task_priority<B: Backend>(g: &mut Guest<B>) -> Check {
    const MOV_CR8_BYTES: u8 = 4;
    g.vcpu.set_task_priority(0x35, 0);
    equal("task priority", g.vcpu.task_priority(), Some(0x35))?;
    g.vcpu.set_task_priority(0x30, 0);
    g.vcpu.set_gpr(Gpr::Rbx, 9);
    g.expect(Exit::Halt)?;
    equal("CR8 as read", g.vcpu.gpr(Gpr::Rdx), 9)?;
    equal("task priority", g.vcpu.task_priority(), Some(0x90))?;
    g.start(&long_state(), priority_code);
    g.vcpu.set_task_priority(0x90, 5);
    g.vcpu.set_gpr(Gpr::Rbx, 4);
    match g.vcpu.enter() {
        // Behind the write.
        Exit::InterruptWindow => equal("task priority", g.vcpu.task_priority(), Some(0x40))?,
        // Before it.
        Exit::CrAccess(_) => {
            g.vcpu.skip_instruction(Some(MOV_CR8_BYTES));
            g.vcpu.set_task_priority(0x40, 0);
        }
        other => return Err(format!("{other:x?}, not a lower task priority")),
    }
    g.expect(Exit::Halt)?;
    equal("CR8 as read", g.vcpu.gpr(Gpr::Rdx), 4)?;
    g.vcpu.set_task_priority(0, 0);
    Ok(())
}

/// As with interrupts: an exception's error code comes again, and an NMI masks only once.
pub(super) fn interrupted_others<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    let mut state = long_state();
    state.gprs[Gpr::Rsp as usize] = UNMAPPED + 0x800;
    g.start(&state, exception_code);
    let event = Event::Exception {
        vector: 13,
        error_code: Some(0x18),
    };
    g.vcpu.inject(event);
    g.expect_stack_fault()?;
    equal("queued event", g.vcpu.queued(), Some(event))?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect(Exit::Halt)?;
    g.gpr("error code", Gpr::Rdx, 0x18)?;

    g.tables
        .unmap(Gpa(UNMAPPED), PAGE_SIZE)
        .map_err(|e| format!("{e:?}"))?;
    backend.flush_nested(g.tables.root());
    g.start(&state, interrupt_code);
    g.vcpu.inject(Event::Nmi);
    g.expect_stack_fault()?;
    equal("queued event", g.vcpu.queued(), Some(Event::Nmi))?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    g.expect(Exit::Halt)?;
    equal("nmi_ready after IRET", g.vcpu.nmi_ready(), true)?;
    g.gpr("NMIs taken", Gpr::Rbx, 1)
}

/// An interrupt of the host's ends a guest that does nothing, with its interrupts on or off.
pub(super) fn host_interrupt<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const SOON: u64 = 1_000_000;
    const LATER: u64 = 50_000_000;
    for rflags in [2, 2 | RFLAGS_IF] {
        let mut state = long_state();
        state.rflags = rflags;
        g.start(&state, endless_code);
        let now = rdtsc();
        (g.host.arm_timer)(now + SOON);
        g.vcpu.set_deadline(now + LATER);
        let exit = g.vcpu.enter();
        interrupts::enable();
        x86_64::instructions::nop();
        interrupts::disable();
        // Bochs 2.7 keeps the interrupt from a guest that was entered with interrupts off.
        if !matches!(exit, Exit::ExternalInterrupt | Exit::Deadline) {
            return Err(format!("{exit:x?}, not a host interrupt"));
        }
        equal("RIP", g.vcpu.rip(), CODE)?;
    }
    Ok(())
}

pub(super) fn breakpoint<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), breakpoint_code);
    g.expect(Exit::Halt)?;
    let at = g.vcpu.state().dr[0];
    g.gpr("return address", Gpr::Rsi, at)?;
    let dr6 = g.vcpu.gpr(Gpr::Rax);
    equal("DR6.B0", dr6 & 1, 1)
}

/// A guest whose breakpoint is at an address of the host's does not stop the host there.
pub(super) fn breakpoint_in_host<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    #[inline(never)]
    fn of_the_host(value: u64) -> u64 {
        core::hint::black_box(value) + 1
    }
    g.start(&long_state(), arm_code);
    let address = core::hint::black_box(of_the_host as fn(u64) -> u64);
    g.vcpu.set_gpr(Gpr::Rbx, address as usize as u64);
    g.expect(Exit::Halt)?;
    equal("result", address(1), 2)?;
    // Off again in the guest, which TCG would otherwise keep.
    g.vcpu.set_rip(CODE);
    g.vcpu.set_gpr(Gpr::Rbx, 0);
    g.expect(Exit::Halt)
}
