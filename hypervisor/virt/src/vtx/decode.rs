//! Exit reasons and qualifications, and what they mean (SDM vol. 3C, chapter 28 and appendix C).
//!
//! Pure functions over raw values; `vcpu` reads the fields and calls them.

use mem::{Direction, Gpa, Gva, Width};

use crate::exit::{CrAccess, NestedPageFault, PortIo, TaskSource};
use crate::state::{Event, Gpr, SoftwareEvent};

/// Basic exit reasons (SDM vol. 3D, appendix C) that Plinth knows what to do with.
#[expect(missing_docs, reason = "the names are the manual's")]
pub mod reason {
    pub const EXCEPTION_OR_NMI: u16 = 0;
    pub const EXTERNAL_INTERRUPT: u16 = 1;
    pub const TRIPLE_FAULT: u16 = 2;
    pub const INIT: u16 = 3;
    pub const INTERRUPT_WINDOW: u16 = 7;
    pub const NMI_WINDOW: u16 = 8;
    pub const TASK_SWITCH: u16 = 9;
    pub const CPUID: u16 = 10;
    pub const GETSEC: u16 = 11;
    pub const HLT: u16 = 12;
    pub const INVD: u16 = 13;
    pub const RDPMC: u16 = 15;
    pub const VMCALL: u16 = 18;
    pub const VMCLEAR: u16 = 19;
    pub const VMXON: u16 = 27;
    pub const CONTROL_REGISTER: u16 = 28;
    pub const IO: u16 = 30;
    pub const RDMSR: u16 = 31;
    pub const WRMSR: u16 = 32;
    pub const INVALID_GUEST_STATE: u16 = 33;
    pub const MWAIT: u16 = 36;
    pub const MONITOR: u16 = 39;
    pub const TPR_BELOW_THRESHOLD: u16 = 43;
    pub const PAUSE: u16 = 40;
    pub const EPT_VIOLATION: u16 = 48;
    pub const EPT_MISCONFIGURATION: u16 = 49;
    pub const INVEPT: u16 = 50;
    pub const PREEMPTION_TIMER: u16 = 52;
    pub const INVVPID: u16 = 53;
    pub const WBINVD: u16 = 54;
    pub const XSETBV: u16 = 55;
    pub const RDRAND: u16 = 57;
    pub const VMFUNC: u16 = 59;
    pub const RDSEED: u16 = 61;
}

/// Bit 31 of the exit reason: the VM entry itself failed.
pub const ENTRY_FAILED: u32 = 1 << 31;

/// Bit 12 of an EPT violation's qualification, and of the exit interruption information: the
/// exit came from an IRET that had already ended NMI blocking (SDM vol. 3C, section 28.2.3).
pub const NMI_UNBLOCKED_BY_IRET: u64 = 1 << 12;

/// Event descriptor: VM-entry and exit interruption information, IDT-vectoring information
/// (SDM vol. 3C, tables 25-16, 25-19 and 25-20).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    const VALID: u32 = 1 << 31;
    const ERROR_CODE: u32 = 1 << 11;
    const KIND_SHIFT: u32 = 8;

    const EXTERNAL_INTERRUPT: u32 = 0;
    const NMI: u32 = 2;
    const HARDWARE_EXCEPTION: u32 = 3;
    const SOFTWARE_INTERRUPT: u32 = 4;
    const INT1: u32 = 5;
    const SOFTWARE_EXCEPTION: u32 = 6;

    const fn new(kind: u32, vector: u8) -> Self {
        InterruptionInfo(Self::VALID | kind << Self::KIND_SHIFT | vector as u32)
    }

    /// Whether there is an event at all.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// Interruption type, bits 10:8.
    pub const fn kind(self) -> u32 {
        self.0 >> Self::KIND_SHIFT & 7
    }

    /// Vector.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Whether an error code goes with it.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// The same without its error code: in real mode none is pushed.
    pub const fn without_error_code(self) -> Self {
        InterruptionInfo(self.0 & !Self::ERROR_CODE)
    }

    /// Whether it is an NMI.
    pub const fn is_nmi(self) -> bool {
        self.kind() == Self::NMI
    }

    /// Whether an INT instruction raised it.
    pub const fn is_software(self) -> bool {
        self.kind() >= Self::SOFTWARE_INTERRUPT
    }

    /// Whether it is the #DB of an INT1 instruction.
    pub const fn is_int1(self) -> bool {
        self.kind() == Self::INT1
    }

    /// Descriptor for an entry, with the error code and instruction length that go with it.
    pub const fn encode(event: Event) -> (Self, u32, u8) {
        match event {
            Event::Interrupt(vector) => (Self::new(Self::EXTERNAL_INTERRUPT, vector), 0, 0),
            Event::Nmi => (Self::new(Self::NMI, 2), 0, 0),
            Event::Exception { vector, error_code } => {
                let info = Self::new(Self::HARDWARE_EXCEPTION, vector);
                match error_code {
                    Some(code) => (InterruptionInfo(info.0 | Self::ERROR_CODE), code, 0),
                    None => (info, 0, 0),
                }
            }
            Event::Software {
                vector,
                kind,
                length,
            } => {
                let kind = match kind {
                    SoftwareEvent::Interrupt => Self::SOFTWARE_INTERRUPT,
                    SoftwareEvent::Int1 => Self::INT1,
                    SoftwareEvent::Exception => Self::SOFTWARE_EXCEPTION,
                };
                (Self::new(kind, vector), 0, length)
            }
        }
    }

    /// The event whose delivery an exit interrupted, from the IDT-vectoring fields.
    /// `None`: there was none, or its type is one that the manual does not define there.
    pub fn decode(self, error_code: u32, length: u8) -> Option<Event> {
        if !self.is_valid() {
            return None;
        }
        let vector = self.vector();
        let software = |kind| Event::Software {
            vector,
            kind,
            length,
        };
        Some(match self.kind() {
            Self::EXTERNAL_INTERRUPT => Event::Interrupt(vector),
            Self::NMI => Event::Nmi,
            Self::HARDWARE_EXCEPTION => Event::Exception {
                vector,
                error_code: if self.has_error_code() {
                    Some(error_code)
                } else {
                    None
                },
            },
            Self::SOFTWARE_INTERRUPT => software(SoftwareEvent::Interrupt),
            Self::INT1 => software(SoftwareEvent::Int1),
            Self::SOFTWARE_EXCEPTION => software(SoftwareEvent::Exception),
            _ => return None,
        })
    }
}

/// Port I/O from the exit qualification (SDM vol. 3C, table 28-5).
pub fn port_io(qualification: u64) -> Option<PortIo> {
    Some(PortIo {
        port: (qualification >> 16) as u16,
        width: Width::from_bytes((qualification & 7) as usize + 1)
            .filter(|w| *w != Width::Qword)?,
        direction: if qualification & (1 << 3) != 0 {
            Direction::Read
        } else {
            Direction::Write
        },
        string: qualification & (1 << 4) != 0,
    })
}

/// Control-register access from the exit qualification (SDM vol. 3C, table 28-3).
pub fn cr_access(qualification: u64) -> CrAccess {
    let cr = qualification as u8 & 0xf;
    let gpr = Gpr::ALL[(qualification >> 8) as usize & 0xf];
    match qualification >> 4 & 3 {
        0 => CrAccess::MovTo { cr, gpr },
        1 => CrAccess::MovFrom { cr, gpr },
        2 => CrAccess::Clts,
        _ => CrAccess::Lmsw((qualification >> 16) as u16),
    }
}

/// New TSS and source of a task switch from the exit qualification (SDM vol. 3C, table 28-2).
pub fn task_switch(qualification: u64) -> (u16, TaskSource) {
    let source = match qualification >> 30 & 3 {
        0 => TaskSource::Call,
        1 => TaskSource::Iret,
        2 => TaskSource::Jump,
        _ => TaskSource::Gate,
    };
    (qualification as u16, source)
}

/// EPT violation from its qualification (SDM vol. 3C, table 28-7).
pub fn nested_page_fault(qualification: u64, gpa: u64, linear: u64) -> NestedPageFault {
    const LINEAR_VALID: u64 = 1 << 7;
    const FINAL_ACCESS: u64 = 1 << 8;
    let linear_valid = qualification & LINEAR_VALID != 0;
    NestedPageFault {
        gpa: Gpa(gpa),
        gva: linear_valid.then_some(Gva(linear)),
        write: qualification & (1 << 1) != 0,
        fetch: qualification & (1 << 2) != 0,
        page_walk: linear_valid && qualification & FINAL_ACCESS == 0,
    }
}

/// DR6 after a debug exception that exited, when it was `dr6` before: the exit qualification
/// holds what the processor would have set (SDM vol. 3C, table 28-1).
pub const fn dr6_after_debug_exception(dr6: u64, qualification: u64) -> u64 {
    const BREAKPOINTS: u64 = 0xf;
    const DETECTED: u64 = 1 << 13;
    const SINGLE_STEP: u64 = 1 << 14;
    (dr6 & !BREAKPOINTS) | (qualification & (BREAKPOINTS | DETECTED | SINGLE_STEP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_survives_a_round_trip() {
        let mut events = vec![
            Event::Interrupt(0x30),
            Event::Nmi,
            Event::Exception {
                vector: 6,
                error_code: None,
            },
            Event::Exception {
                vector: 14,
                error_code: Some(7),
            },
        ];
        for (vector, kind, length) in [
            (0x80, SoftwareEvent::Interrupt, 2),
            (1, SoftwareEvent::Int1, 1),
            (3, SoftwareEvent::Exception, 1),
        ] {
            events.push(Event::Software {
                vector,
                kind,
                length,
            });
        }
        for event in events {
            let (info, code, length) = InterruptionInfo::encode(event);
            assert_eq!(info.decode(code, length), Some(event));
        }
    }

    #[test]
    fn descriptors_have_the_manuals_layout() {
        let encode = |e| InterruptionInfo::encode(e).0.0;
        assert_eq!(encode(Event::Interrupt(0x41)), 0x8000_0041);
        assert_eq!(encode(Event::Nmi), 0x8000_0202);
        let fault = |vector, error_code| Event::Exception { vector, error_code };
        assert_eq!(encode(fault(13, Some(0))), 0x8000_0b0d);
        assert_eq!(encode(fault(6, None)), 0x8000_0306);
        assert_eq!(InterruptionInfo(0x0000_0b0d).decode(0, 0), None);
        // Types 1 and 7 are reserved in IDT-vectoring information.
        assert_eq!(InterruptionInfo(0x8000_0100).decode(0, 0), None);
        assert_eq!(InterruptionInfo(0x8000_0700).decode(0, 0), None);
    }

    #[test]
    fn ports() {
        assert_eq!(
            port_io(0x03f8_0000),
            Some(PortIo {
                port: 0x3f8,
                width: Width::Byte,
                direction: Direction::Write,
                string: false,
            })
        );
        assert_eq!(
            port_io(0x0cfc_001b),
            Some(PortIo {
                port: 0xcfc,
                width: Width::Dword,
                direction: Direction::Read,
                string: true,
            })
        );
        assert_eq!(port_io(2), None);
        assert_eq!(port_io(7), None);
    }

    #[test]
    fn control_registers() {
        assert_eq!(
            cr_access(0x0300),
            CrAccess::MovTo {
                cr: 0,
                gpr: Gpr::Rbx
            }
        );
        assert_eq!(
            cr_access(0x0f18),
            CrAccess::MovFrom {
                cr: 8,
                gpr: Gpr::R15
            }
        );
        assert_eq!(cr_access(0x20), CrAccess::Clts);
        assert_eq!(cr_access(0x0011_0030), CrAccess::Lmsw(0x11));
    }

    #[test]
    fn task_switches() {
        assert_eq!(task_switch(0x0000_0018), (0x18, TaskSource::Call));
        assert_eq!(task_switch(0x4000_0020), (0x20, TaskSource::Iret));
        assert_eq!(task_switch(0x8000_0028), (0x28, TaskSource::Jump));
        assert_eq!(task_switch(0xc000_0030), (0x30, TaskSource::Gate));
    }

    #[test]
    fn nested_faults() {
        let data = nested_page_fault(0x182, 0xfee0_0080, 0xffff_8000_0000_0080);
        assert!(data.write && !data.fetch && !data.page_walk);
        assert_eq!(data.gva, Some(Gva(0xffff_8000_0000_0080)));
        let walk = nested_page_fault(0x081, 0x1000, 0x4000_0000);
        assert!(walk.page_walk && !walk.write);
        // A load of PDPTEs by MOV CR3: no linear address.
        let pdpte = nested_page_fault(0x001, 0x1000, 0);
        assert!(!pdpte.page_walk && pdpte.gva.is_none());
        assert!(nested_page_fault(0x184, 0, 0).fetch);
    }

    #[test]
    fn debug_exceptions_accumulate_in_dr6() {
        assert_eq!(
            dr6_after_debug_exception(0xffff_0ff1, 1 << 14 | 2),
            0xffff_4ff2
        );
    }
}
