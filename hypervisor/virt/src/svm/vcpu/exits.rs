//! Why the guest exited, and what an exit interrupted.

use super::{StepOver, SvmVcpu};
use crate::cpu::raise_machine_check;
use crate::svm::decode;
use crate::svm::features::SvmFeatures;
use crate::svm::vmcb::{EventField, EventType, TlbControl, exit_code};
use crate::{Exit, VirtualCpu};

impl SvmVcpu {
    /// After #VMEXIT: why it came, if that is one of the frequent exits and needs nothing more;
    /// else [`Exit::Unknown`].
    #[inline(always)]
    pub(super) fn frequent_exit(&mut self) -> Exit {
        let clean = self.clean;
        let control = self.control_mut();
        control.clean = clean;
        control.tlb_control = TlbControl::Keep;
        if control.exit_interrupt_info.valid() {
            return Exit::Unknown { code: 0, info: 0 };
        }
        let exit = decode::frequent_exit(control);
        if !matches!(exit, Exit::Unknown { .. }) {
            // EVENTINJ was delivered; the processor clears V, the rest of the field may linger.
            control.event_injection = EventField::NONE;
        }
        exit
    }

    /// Any other exit. Those that are for us alone lead back into the guest: at most three
    /// rounds, because IRET is intercepted once per NMI and its step ends once.
    #[cold]
    #[inline(never)]
    pub(super) fn other_exits(&mut self) -> Exit {
        loop {
            if let Some(exit) = self.other_exit() {
                return exit;
            }
            self.run_guest();
            let exit = self.frequent_exit();
            if !matches!(exit, Exit::Unknown { .. }) {
                return exit;
            }
        }
    }

    /// An exit that is rare, or that came in the delivery of an event; `None` when it was for us alone.
    pub(super) fn other_exit(&mut self) -> Option<Exit> {
        let decode_assists = self.has(SvmFeatures::DECODE_ASSISTS);
        let control = self.control();
        let interrupted = control.exit_interrupt_info;
        match control.exit_code as u32 {
            // The VMCB stays as it was refused, for `explain_entry_failure`.
            exit_code::INVALID | exit_code::BUSY => {}
            exit_code::EXCEPTION_FIRST..=exit_code::EXCEPTION_LAST => return self.exception(),
            exit_code::IRET => {
                self.requeue(interrupted);
                self.begin_step(StepOver::Iret);
                return None;
            }
            exit_code::VINTR => {
                self.requeue(interrupted);
                self.request_interrupt_window(false);
            }
            _ => self.requeue(interrupted),
        }
        Some(decode::exit(self.control(), decode_assists))
    }

    /// Queues again what an exit interrupted in delivery (section 15.7.2). Where an
    /// instruction raised it (INTn, INT3, INTO), RIP is still there and the guest executes it again.
    pub(super) fn requeue(&mut self, event: EventField) {
        let again = match event.kind() {
            EventType::Interrupt | EventType::Nmi => true,
            EventType::Exception => !matches!(event.vector(), 3 | 4),
            EventType::Software | EventType::Reserved(_) => false,
        };
        self.control_mut().event_injection = if event.valid() && again {
            event
        } else {
            EventField::NONE
        };
    }

    /// An intercepted exception, which the VMM injects. DR6 and DR7 are already as the guest's
    /// handler expects them (section 15.12.2). A machine check is the host's.
    pub(super) fn exception(&mut self) -> Option<Exit> {
        let code = self.control().exit_code as u32;
        if code == exit_code::MACHINE_CHECK {
            self.requeue(self.control().exit_interrupt_info);
            raise_machine_check();
            return Some(Exit::ExternalInterrupt);
        }
        let debug = code == exit_code::DEBUG_EXCEPTION;
        // Like the processor: a benign exception in the delivery of an event takes its place.
        self.control_mut().event_injection = EventField::NONE;
        if debug && let Some(step) = self.step.take() {
            let genuine = self.end_step(step);
            if !genuine {
                if self.nmi_window && self.nmi_ready() {
                    self.nmi_window = false;
                    return Some(Exit::NmiWindow);
                }
                return None;
            }
        }
        Some(decode::exit(self.control(), false))
    }
}
