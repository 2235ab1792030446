//! The end of an instruction that an exit left unfinished: flags, single steps, breakpoints, faults.
//!
//! The processor would have ended it with what RFLAGS.TF, RFLAGS.RF, the debug registers and interrupt shadows ask
//! for. Invariant: of several reasons for #DB behind one instruction, one #DB tells all.

use virt::{Event, Shadow, VirtualCpu};

use super::{Next, Vcpu};
use crate::{
    emulate::{Aftermath, Exception},
    msr::number,
};

/// RFLAGS.TF.
pub(super) const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.RF.
pub(super) const RFLAGS_RF: u64 = 1 << 16;
/// IA32_DEBUGCTL.BTF.
const DEBUGCTL_BTF: u64 = 1 << 1;
/// DR6.B0 to B3.
pub(super) const DR6_BREAKPOINTS: u64 = 0xf;
/// DR6.BS.
pub(super) const DR6_SINGLE_STEP: u64 = 1 << 14;

/// What the emulator has executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Executed {
    /// An instruction of this many bytes.
    Whole { length: u8 },
    /// An instruction that went elsewhere.
    Branch,
    /// An iteration of a REP instruction that has more of them.
    Iteration,
}

impl<V: VirtualCpu> Vcpu<V> {
    /// Steps over the instruction of this exit; with RFLAGS.TF set the guest then traps.
    pub(super) fn step_over(&mut self) -> Next {
        self.finish_instruction(None, 0)
    }

    /// Steps over an instruction that hit these hardware breakpoints.
    pub(super) fn finish_instruction(&mut self, length: Option<u8>, breakpoints: u64) -> Next {
        let rflags = self.hw.rflags();
        self.hw.skip_instruction(length);
        if rflags & (RFLAGS_TF | RFLAGS_RF) != 0 || breakpoints != 0 {
            return self.end_of_traced(rflags, breakpoints);
        }
        Next::Enter
    }

    /// The end of an instruction that is single-stepped, that hit breakpoints, or that a debugger let pass one.
    #[cold]
    #[inline(never)]
    fn end_of_traced(&mut self, rflags: u64, breakpoints: u64) -> Next {
        if rflags & RFLAGS_RF != 0 {
            self.hw.set_rflags(rflags & !RFLAGS_RF);
        }
        // No instruction that exits is a branch.
        self.trap_behind(rflags, breakpoints, false)
    }

    /// #DB behind an instruction, if `before`, the flags with which it began, or breakpoints that it hit ask for it.
    fn trap_behind(&mut self, before: u64, breakpoints: u64, is_branch: bool) -> Next {
        let mut causes = breakpoints;
        if before & RFLAGS_TF != 0 && (is_branch || !self.steps_by_branches()) {
            causes |= DR6_SINGLE_STEP;
        }
        if causes == 0 {
            return Next::Enter;
        }
        self.debug_trap(causes);
        Next::Check
    }

    /// With BTF only branches trap under TF (SDM vol. 3B, section 18.4.2).
    fn steps_by_branches(&self) -> bool {
        let debugctl = self.hw.msr(number::DEBUGCTL);
        debugctl.is_some_and(|value| value & DEBUGCTL_BTF != 0)
    }

    /// Ends an instruction that the emulator has executed, or an iteration of one. `before`: the flags with
    /// which it began, which are those that count (SDM vol. 3B, sections 18.3.1.1 and 18.3.1.4).
    pub(super) fn finish_emulated(
        &mut self,
        executed: Executed,
        before: u64,
        aftermath: Aftermath,
    ) -> Next {
        let length = match executed {
            Executed::Whole { length } => length,
            Executed::Branch | Executed::Iteration => 0,
        };
        self.hw.skip_instruction(Some(length));
        let after = self.hw.rflags();
        let resume = match executed {
            // A breakpoint on the instruction has had its turn.
            Executed::Iteration => after | RFLAGS_RF,
            _ if aftermath.interrupt_return => after,
            _ => after & !RFLAGS_RF,
        };
        if resume != after {
            self.hw.set_rflags(resume);
        }
        match aftermath.shadow {
            // Its trap comes behind the next instruction.
            Some(Shadow::MovSs) if aftermath.breakpoints == 0 => {
                self.hw.begin_shadow(Shadow::MovSs);
                return Next::Check;
            }
            Some(Shadow::Sti) if (before & RFLAGS_TF) | aftermath.breakpoints == 0 => {
                self.hw.begin_shadow(Shadow::Sti);
                return Next::Check;
            }
            _ => {}
        }
        let is_branch = executed == Executed::Branch;
        let next = self.trap_behind(before, aftermath.breakpoints, is_branch);
        if aftermath.interrupt_return {
            Next::Check
        } else {
            next
        }
    }

    /// #DB for these causes, as bits of DR6.
    pub(super) fn debug_trap(&mut self, causes: u64) {
        let dr6 = self.hw.dr6() & !DR6_BREAKPOINTS;
        self.hw.set_dr6(dr6 | causes);
        self.hw.inject(Event::Exception {
            vector: 1,
            error_code: None,
        });
    }

    /// All but aborts: what the emulator and the checks of exits raise are faults.
    pub(super) fn raise(&mut self, exception: Exception) {
        if let Some(cr2) = exception.cr2 {
            self.hw.set_cr2(cr2);
        }
        self.resume_past_breakpoints();
        // Pushed error codes do not exist in real mode (SDM vol. 3A, section 21.1.4).
        let protected = self.hw.cr0() & 1 != 0;
        self.hw.inject(Event::Exception {
            vector: exception.vector,
            error_code: exception.error_code.filter(|_| protected),
        });
    }

    /// RF in the flags that a fault pushes, so that a breakpoint on its instruction does not come twice (SDM vol. 3B,
    /// section 18.3.1.1). An injected event pushes the flags as they are.
    pub(super) fn resume_past_breakpoints(&mut self) {
        let rflags = self.hw.rflags();
        if rflags & RFLAGS_RF == 0 {
            self.hw.set_rflags(rflags | RFLAGS_RF);
        }
    }
}
