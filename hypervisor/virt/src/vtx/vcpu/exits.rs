//! Why the guest exited, or was not entered.

use alloc::format;
use alloc::string::String;

use mem::Gpa;

use super::{
    DEBUG_EXCEPTION, DOUBLE_FAULT, DR7_GD, Interruptibility, MACHINE_CHECK, PENDING_DEBUG_BS,
    QUALIFICATION_BD, RFLAGS_TF, Refusal, State, VtxVcpu,
};
use crate::cpu::{GuestDebug, raise_machine_check};
use crate::state::{AccessRights, Event};
use crate::vtx::capability::Proc;
use crate::vtx::check::{VmcsFields, check};
use crate::vtx::decode::{
    InterruptionInfo, NMI_UNBLOCKED_BY_IRET, cr_access, dr6_after_debug_exception,
    nested_page_fault, port_io, reason, task_switch,
};
use crate::vtx::entry::Outcome;
use crate::vtx::vmcs::{Field, vmread};
use crate::{Exit, TaskSource, TaskSwitch, VirtualCpu};

impl VtxVcpu {
    /// The instruction failed, or there was nothing to enter.
    #[cold]
    #[inline(never)]
    pub(super) fn refused(&mut self, outcome: Outcome) -> Exit {
        let error = match outcome {
            Outcome::FailValid => self.read(Field::InstructionError) as u32,
            Outcome::FailInvalid | Outcome::Exit => 0,
        };
        self.refusal = Some(Refusal::Instruction(error));
        Exit::EntryFailure { code: error.into() }
    }

    /// The processor left the guest state unloaded. `None`: mended, to be entered again.
    #[cold]
    #[inline(never)]
    pub(super) fn refused_late(&mut self, reason: u32) -> Option<Exit> {
        if reason as u16 == reason::INVALID_GUEST_STATE && self.mend_for_bochs() {
            return None;
        }
        self.refusal = Some(Refusal::Late(reason, self.read(Field::ExitQualification)));
        Some(Exit::EntryFailure {
            code: reason.into(),
        })
    }

    /// Bochs 2.7 demands that CS.RPL equals CS.DPL also of unrestricted guests, where a
    /// real-mode CS has any low bits; its check looks at code segments only. A data segment
    /// in CS is what the manual allows there (type 3), and the guest can't tell. Whether
    /// anything changed. Processors never refuse such a state, so they never get here.
    fn mend_for_bochs(&self) -> bool {
        const READ_WRITE_ACCESSED: u8 = 3;
        let rights = AccessRights::from(self.read(Field::GuestCsRights) as u32);
        let rpl = self.read(Field::GuestCsSelector) & 3;
        let mend = rpl != 0 && rights.dpl() == 0 && matches!(rights.kind(), 9 | 11);
        if mend {
            let rights = rights.with_kind(READ_WRITE_ACCESSED);
            self.write(Field::GuestCsRights, u32::from(rights).into());
        }
        mend
    }

    /// Decodes an exit. Reads only the fields that this reason defines.
    #[inline(always)]
    pub(super) fn decode(&mut self, basic_reason: u16) -> Exit {
        match basic_reason {
            reason::CPUID => Exit::Cpuid,
            reason::VMCALL => Exit::Hypercall,
            reason::IO => match port_io(self.read(Field::ExitQualification)) {
                Some(io) => Exit::PortIo(io),
                None => self.unknown(basic_reason),
            },
            reason::RDMSR => Exit::MsrRead,
            reason::WRMSR => Exit::MsrWrite,
            reason::EXTERNAL_INTERRUPT => Exit::ExternalInterrupt,
            reason::PREEMPTION_TIMER => Exit::Deadline,
            reason::HLT => Exit::Halt,
            reason::EPT_VIOLATION => {
                let qualification = self.read(Field::ExitQualification);
                self.interrupted_delivery(qualification & NMI_UNBLOCKED_BY_IRET != 0);
                Exit::NestedPageFault(nested_page_fault(
                    qualification,
                    self.read(Field::GuestPhysicalAddress),
                    self.read(Field::GuestLinearAddress),
                ))
            }
            reason::EPT_MISCONFIGURATION => {
                self.interrupted_delivery(false);
                Exit::NestedMisconfiguration(Gpa(self.read(Field::GuestPhysicalAddress)))
            }
            reason::TPR_BELOW_THRESHOLD => {
                // Above the priority as it is now, it would make the next entry fail.
                self.write(Field::TprThreshold, 0);
                Exit::InterruptWindow
            }
            reason::INTERRUPT_WINDOW => {
                self.set_proc(self.proc - Proc::INTERRUPT_WINDOW);
                Exit::InterruptWindow
            }
            reason::NMI_WINDOW => {
                self.set_proc(self.proc - Proc::NMI_WINDOW);
                Exit::NmiWindow
            }
            reason::CONTROL_REGISTER => {
                Exit::CrAccess(Some(cr_access(self.read(Field::ExitQualification))))
            }
            reason::EXCEPTION_OR_NMI => self.exception(),
            reason::PAUSE => Exit::Pause,
            reason::XSETBV => Exit::Xsetbv,
            reason::WBINVD => Exit::Wbinvd,
            reason::INVD => Exit::Invd,
            reason::MONITOR => Exit::Monitor,
            reason::MWAIT => Exit::Mwait,
            reason::RDPMC => Exit::Rdpmc,
            reason::RDRAND | reason::RDSEED => Exit::Random,
            reason::TRIPLE_FAULT => Exit::TripleFault,
            reason::INIT => Exit::Init,
            reason::TASK_SWITCH => self.task_switch(),
            reason::GETSEC
            | reason::VMCLEAR..=reason::VMXON
            | reason::INVEPT
            | reason::INVVPID
            | reason::VMFUNC => Exit::VirtualizationInstruction,
            _ => self.unknown(basic_reason),
        }
    }

    #[cold]
    #[inline(never)]
    fn unknown(&self, basic_reason: u16) -> Exit {
        Exit::Unknown {
            code: basic_reason.into(),
            info: self.read(Field::ExitQualification),
        }
    }

    /// An exit by an exception of [`EXCEPTION_BITMAP`], or by an NMI of the host.
    #[inline(never)]
    fn exception(&mut self) -> Exit {
        let info = InterruptionInfo(self.read(Field::ExitInterruptionInfo) as u32);
        let vector = info.vector();
        let unblocked = u64::from(info.0) & NMI_UNBLOCKED_BY_IRET != 0 && vector != DOUBLE_FAULT;
        self.interrupted_delivery(unblocked && !info.is_nmi());
        if info.is_nmi() {
            return Exit::Nmi;
        }
        if vector == MACHINE_CHECK {
            raise_machine_check();
            return Exit::ExternalInterrupt;
        }
        if vector == DEBUG_EXCEPTION {
            self.debug_exception(info);
        }
        Exit::Exception {
            vector,
            error_code: info
                .has_error_code()
                .then(|| self.read(Field::ExitInterruptionErrorCode) as u32),
        }
    }

    /// A task switch: what it is for, and the event that it delivers. Such an event is not delivered again.
    #[cold]
    #[inline(never)]
    fn task_switch(&mut self) -> Exit {
        let (selector, source) = task_switch(self.read(Field::ExitQualification));
        let info = InterruptionInfo(self.read(Field::IdtVectoringInfo) as u32);
        let by_event = source == TaskSource::Gate;
        let length = if by_event && !info.is_software() {
            0
        } else {
            self.read(Field::ExitInstructionLength) as u8
        };
        let event = if by_event {
            let code = self.read(Field::IdtVectoringErrorCode) as u32;
            info.decode(code, length)
        } else {
            None
        };
        if event == Some(Event::Nmi) {
            self.set_interruptibility(self.interruptibility() | Interruptibility::NMI);
        }
        Exit::TaskSwitch(TaskSwitch {
            selector,
            source,
            length,
            event,
        })
    }

    /// Does what the processor would have done with #DB but for the exit, so that injecting
    /// it is all that is left (SDM vol. 3C, section 28.1).
    fn debug_exception(&mut self, info: InterruptionInfo) {
        let mut qualification = self.read(Field::ExitQualification);
        if info.is_int1() || qualification & QUALIFICATION_BD != 0 {
            // These tell of themselves only; Bochs 2.7 adds the step that MOV SS has held back.
            qualification &= !PENDING_DEBUG_BS;
        }
        let dr6 = dr6_after_debug_exception(GuestDebug::read_dr6(), qualification);
        GuestDebug::write_dr6(dr6);
        let dr7 = self.read(Field::GuestDr7);
        if dr7 & DR7_GD != 0 {
            self.write(Field::GuestDr7, dr7 & !DR7_GD);
        }
        if info.is_int1() {
            // A trap: the guest returns behind the instruction.
            self.skip_instruction(None);
        } else if self.read(Field::GuestRflags) & RFLAGS_TF != 0
            && self.interruptibility().intersects(Interruptibility::SHADOW)
        {
            // An entry demands this pairing (SDM vol. 3C, section 27.3.1.5).
            let pending = self.read(Field::GuestPendingDebug);
            self.write(Field::GuestPendingDebug, pending | PENDING_DEBUG_BS);
        }
    }

    /// Queues the event whose delivery this exit interrupted, if there was one, and restores
    /// NMI blocking that an interrupted IRET had already ended (SDM vol. 3C, section 28.2.3).
    fn interrupted_delivery(&mut self, nmi_unblocked: bool) {
        let info = InterruptionInfo(self.read(Field::IdtVectoringInfo) as u32);
        if !info.is_valid() {
            if nmi_unblocked {
                self.set_interruptibility(self.interruptibility() | Interruptibility::NMI);
            }
            return;
        }
        let error_code = if info.has_error_code() {
            self.read(Field::IdtVectoringErrorCode) as u32
        } else {
            0
        };
        let length = if info.is_software() {
            self.read(Field::ExitInstructionLength) as u8
        } else {
            0
        };
        if let Some(event) = info.decode(error_code, length) {
            if event == Event::Nmi {
                // Its delivery blocks NMIs again.
                self.set_interruptibility(self.interruptibility() - Interruptibility::NMI);
            }
            self.inject(event);
        }
    }

    /// What the last entry was refused for, and each rule of the manual that the VMCS breaks.
    pub(super) fn explain_refusal(&self) -> String {
        let mut text = match (self.state.get(), self.refusal) {
            (State::Unloaded, _) => String::from("the vCPU is not loaded\n"),
            (State::Broken, _) => match self.broken.get() {
                None => String::from("VMCLEAR or VMPTRLD of its VMCS failed\n"),
                Some(field) => format!(
                    "VMREAD or VMWRITE of field {field:?} ({:#x}) failed\n",
                    field as u32
                ),
            },
            (_, None) => String::from("no entry was refused\n"),
            (_, Some(Refusal::Instruction(error))) => format!(
                "VM-instruction error {error}: {}\n",
                instruction_error(error)
            ),
            (_, Some(Refusal::Late(reason, qualification))) => format!(
                "exit reason {:#x} ({}), qualification {qualification:#x}\n",
                reason,
                match reason as u16 {
                    reason::INVALID_GUEST_STATE => "invalid guest state",
                    34 => "MSR loading",
                    41 => "machine check during entry",
                    _ => "unknown",
                }
            ),
        };
        if matches!(self.state.get(), State::Launch | State::Resume) {
            // SAFETY: loaded, so in VMX operation.
            let fields = VmcsFields::collect(|field| unsafe { vmread(field) });
            for failure in check(&fields, &self.shared.capabilities) {
                text.push_str("  ");
                text.push_str(&failure);
                text.push('\n');
            }
        }
        text
    }
}

/// VM-instruction errors that an entry can give (SDM vol. 3D, table 31-1).
fn instruction_error(error: u32) -> &'static str {
    match error {
        0 => "no current VMCS",
        4 => "VMLAUNCH of a VMCS that is not clear",
        5 => "VMRESUME of a VMCS that is not launched",
        7 => "invalid control fields",
        8 => "invalid host state",
        26 => "events blocked by MOV SS",
        _ => "see the manual",
    }
}
