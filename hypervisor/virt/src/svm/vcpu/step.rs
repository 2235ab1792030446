//! Single steps of a guest that are the host's: over an IRET, and over a shadow.

use super::{DR6_OTHER_CAUSES, RFLAGS_TF, SvmVcpu};
use crate::svm::vmcb::{Clean, Intercepts1};

/// Why the guest runs one instruction under RFLAGS.TF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepOver {
    /// The IRET that ends an NMI handler.
    Iret,
    /// The instruction in the shadow of MOV SS or STI.
    Shadow,
}

/// A single step in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) over: StepOver,
    /// The guest itself had TF set.
    pub(super) guest_tf: bool,
    /// The guest's DR6 before the step.
    pub(super) dr6: u64,
}

impl SvmVcpu {
    /// Lets the guest execute one instruction and come back by #DB.
    pub(super) fn begin_step(&mut self, over: StepOver) {
        if over == StepOver::Iret {
            self.intercept1(Intercepts1::IRET, false);
        }
        let save = self.save_mut();
        let step = Step {
            over,
            guest_tf: save.rflags & RFLAGS_TF != 0,
            dr6: save.dr6,
        };
        save.rflags |= RFLAGS_TF;
        save.dr6 &= !DR6_OTHER_CAUSES;
        self.changed(Clean::DEBUG_REGISTERS);
        self.step = Some(step);
    }

    /// Takes a step back out of the guest's state. Whether the guest gets the #DB: it was
    /// stepping itself, or a breakpoint came due at the same time.
    pub(super) fn end_step(&mut self, step: Step) -> bool {
        if step.over == StepOver::Iret {
            self.nmi_masked = false;
        }
        let save = self.save_mut();
        // IRET has loaded the flags of the interrupted code; elsewhere TF is ours to clear.
        if step.over == StepOver::Shadow && !step.guest_tf {
            save.rflags &= !RFLAGS_TF;
        }
        let causes = save.dr6 & DR6_OTHER_CAUSES;
        let genuine = step.guest_tf || causes != 0;
        if !genuine {
            save.dr6 = step.dr6;
        } else if !step.guest_tf {
            save.dr6 = step.dr6 & !DR6_OTHER_CAUSES | causes;
        }
        self.changed(Clean::DEBUG_REGISTERS);
        genuine
    }

    /// Gives up a step, as when the whole state is replaced.
    pub(super) fn cancel_step(&mut self) {
        if let Some(step) = self.step.take() {
            let save = self.save_mut();
            save.dr6 = step.dr6;
            if !step.guest_tf {
                save.rflags &= !RFLAGS_TF;
            }
            self.changed(Clean::DEBUG_REGISTERS);
        }
    }
}
