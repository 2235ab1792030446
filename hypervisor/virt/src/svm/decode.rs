//! From exit codes to `Exit`: the one place that knows what AMD-V reports.
//!
//! Pure functions over the control area, tested on the host. Guest-controlled values only
//! select an arm; none of them can fail.

use bitfield_struct::bitfield;
use mem::{Direction, Gpa, Width};

use super::vmcb::{ControlArea, exit_code as code};
use crate::exit::{CrAccess, Exit, NestedPageFault, PortIo};
use crate::state::Gpr;

/// EXITINFO1 of a port access (APM vol. 2, section 15.10.2).
#[bitfield(u64)]
struct IoInfo {
    /// TYPE: IN.
    input: bool,
    __: bool,
    /// STR: INS or OUTS.
    string: bool,
    /// REP prefix.
    repeat: bool,
    /// SZ8, SZ16, SZ32: operand size in bytes as a one-hot field, 1, 2 or 4.
    #[bits(3)]
    bytes: u8,
    /// A16, A32, A64: address size.
    #[bits(3)]
    address_size: u8,
    /// SEG: effective segment.
    #[bits(3)]
    segment: u8,
    #[bits(3)]
    __: u8,
    /// PORT.
    port: u16,
    __: u32,
}

/// EXITINFO1 of a nested page fault (sections 15.25.6 and 8.4.2).
#[bitfield(u64)]
struct NestedFaultInfo {
    present: bool,
    write: bool,
    user: bool,
    /// A reserved bit was set in an entry.
    reserved_bit: bool,
    fetch: bool,
    #[bits(27)]
    __: u32,
    /// The fault is in the translation of the final guest-physical address.
    final_address: bool,
    /// The fault is in the walk of the guest's page tables.
    page_walk: bool,
    #[bits(30)]
    __: u32,
}

/// EXITINFO1 of a move to or from a control register, with decode assists (section 15.8.1).
#[bitfield(u64)]
struct CrInfo {
    /// Register operand.
    #[bits(4)]
    gpr: u8,
    #[bits(59)]
    __: u64,
    /// It was MOV CR, not LMSW, CLTS or SMSW.
    mov: bool,
}

/// Vectors whose exception pushes an error code (section 8.2, table 8-1; #CP, #VC, #SX among them).
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// The exits that a running system makes all the time; [`Exit::Unknown`] for any other. Not an `Option`,
/// which would be copied on the way.
#[inline(always)]
pub fn frequent_exit(control: &ControlArea) -> Exit {
    match control.exit_code as u32 {
        code::CPUID => Exit::Cpuid,
        // EXITINFO1 is 1 for WRMSR (section 15.11).
        code::MSR if control.exit_info1 & 1 == 0 => Exit::MsrRead,
        code::MSR => Exit::MsrWrite,
        code::IOIO => port_io(control),
        code::NESTED_PAGE_FAULT => nested_page_fault(control),
        code::INTR => Exit::ExternalInterrupt,
        code::HLT => Exit::Halt,
        code::VMMCALL => Exit::Hypercall,
        _ => unknown(control),
    }
}

/// Why the guest was left.
///
/// IRET, and #DB while single-stepping, are the vCPU's own business and don't get here.
pub fn exit(control: &ControlArea, decode_assists: bool) -> Exit {
    let frequent = frequent_exit(control);
    if !matches!(frequent, Exit::Unknown { .. }) {
        return frequent;
    }
    match control.exit_code as u32 {
        // The host takes an SMI as soon as it opens the global interrupt flag.
        code::SMI => Exit::ExternalInterrupt,
        code::VINTR => Exit::InterruptWindow,
        code::NMI => Exit::Nmi,
        code::READ_CR8 => cr_access(control, decode_assists, |gpr| CrAccess::MovFrom {
            cr: 8,
            gpr,
        }),
        code::WRITE_CR8 => cr_access(control, decode_assists, |gpr| CrAccess::MovTo {
            cr: 8,
            gpr,
        }),
        code::WRITE_CR4 => cr_access(control, decode_assists, |gpr| CrAccess::MovTo {
            cr: 4,
            gpr,
        }),
        code::PAUSE => Exit::Pause,
        code::XSETBV => Exit::Xsetbv,
        code::WBINVD => Exit::Wbinvd,
        code::INVD => Exit::Invd,
        code::MONITOR => Exit::Monitor,
        code::MWAIT | code::MWAIT_ARMED => Exit::Mwait,
        code::RDPMC => Exit::Rdpmc,
        code::VMRUN
        | code::VMLOAD
        | code::VMSAVE
        | code::STGI
        | code::CLGI
        | code::SKINIT
        | code::INVLPGA
        | code::RSM
        | code::RDPRU => Exit::VirtualizationInstruction,
        // The processor would wait for the external IRQ 13 circuit (section 15.13.4): to the VMM it is #MF.
        code::FERR_FREEZE => Exit::Exception {
            vector: 16,
            error_code: None,
        },
        n @ code::EXCEPTION_FIRST..=code::EXCEPTION_LAST => {
            let vector = (n - code::EXCEPTION_FIRST) as u8;
            Exit::Exception {
                vector,
                error_code: has_error_code(vector).then_some(control.exit_info1 as u32),
            }
        }
        code::INIT => Exit::Init,
        code::SHUTDOWN => Exit::TripleFault,
        code::INVALID | code::BUSY => Exit::EntryFailure {
            code: control.exit_code,
        },
        _ => unknown(control),
    }
}

fn unknown(control: &ControlArea) -> Exit {
    Exit::Unknown {
        code: control.exit_code,
        info: control.exit_info1,
    }
}

#[inline(always)]
fn port_io(control: &ControlArea) -> Exit {
    let info = IoInfo::from_bits(control.exit_info1);
    let Some(width) = Width::from_bytes(usize::from(info.bytes())) else {
        return unknown(control);
    };
    Exit::PortIo(PortIo {
        port: info.port(),
        width,
        direction: if info.input() {
            Direction::Read
        } else {
            Direction::Write
        },
        string: info.string(),
    })
}

/// QEMU 7.2 TCG leaves out the present bit of some faults, so nothing here looks at it: the
/// VMM's own tables say whether the page is mapped.
#[inline(never)]
fn nested_page_fault(control: &ControlArea) -> Exit {
    let info = NestedFaultInfo::from_bits(control.exit_info1);
    let gpa = Gpa(control.exit_info2);
    if info.reserved_bit() {
        return Exit::NestedMisconfiguration(gpa);
    }
    Exit::NestedPageFault(NestedPageFault {
        gpa,
        gva: None,
        write: info.write(),
        fetch: info.fetch(),
        page_walk: info.page_walk(),
    })
}

fn cr_access(
    control: &ControlArea,
    decode_assists: bool,
    access: impl FnOnce(Gpr) -> CrAccess,
) -> Exit {
    let info = CrInfo::from_bits(control.exit_info1);
    let known = decode_assists && info.mov();
    let gpr = Gpr::ALL.get(usize::from(info.gpr())).copied();
    Exit::CrAccess(gpr.filter(|_| known).map(access))
}

/// Bytes of the instruction that an exit stands for, where it has one encoding: the way past
/// it on processors without NRIP save. 0: the VMM must decode.
///
/// A guest that puts needless prefixes before such an instruction misleads only itself.
#[inline]
pub fn architectural_length(exit_code: u64) -> u8 {
    let index = (exit_code as u32).wrapping_sub(LENGTHS_FROM) as usize;
    LENGTHS.get(index).copied().unwrap_or(0)
}

/// First exit code of [`LENGTHS`].
const LENGTHS_FROM: u32 = code::RDPMC;

/// Lengths by exit code, in bytes.
const LENGTHS: [u8; (code::XSETBV - LENGTHS_FROM) as usize + 1] = {
    let mut lengths = [0; (code::XSETBV - LENGTHS_FROM) as usize + 1];
    let of_one = [code::HLT];
    let of_two = [
        code::CPUID,
        code::MSR,
        code::RDPMC,
        code::INVD,
        code::WBINVD,
        code::PAUSE,
    ];
    let of_three = [
        code::VMMCALL,
        code::XSETBV,
        code::MONITOR,
        code::MWAIT,
        code::MWAIT_ARMED,
    ];
    let lists: [(u8, &[u32]); 3] = [(1, &of_one), (2, &of_two), (3, &of_three)];
    let mut list = 0;
    while list < lists.len() {
        let (length, codes) = lists[list];
        let mut i = 0;
        while i < codes.len() {
            lengths[(codes[i] - LENGTHS_FROM) as usize] = length;
            i += 1;
        }
        list += 1;
    }
    lengths
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svm::vmcb::Vmcb;

    fn decode(exit_code: u64, info1: u64, info2: u64, assists: bool) -> Exit {
        let mut vmcb = Vmcb::zeroed();
        vmcb.control.exit_code = exit_code;
        vmcb.control.exit_info1 = info1;
        vmcb.control.exit_info2 = info2;
        exit(&vmcb.control, assists)
    }

    #[test]
    fn port_accesses() {
        let out_byte = PortIo {
            port: 0x3f8,
            width: Width::Byte,
            direction: Direction::Write,
            string: false,
        };
        assert_eq!(
            decode(0x7b, 0x3f8 << 16 | 1 << 4, 0, false),
            Exit::PortIo(out_byte)
        );
        let insd = PortIo {
            port: 0xffff,
            width: Width::Dword,
            direction: Direction::Read,
            string: true,
        };
        assert_eq!(
            decode(0x7b, 0xffff << 16 | 1 << 6 | 1 << 3 | 1 << 2 | 1, 0, false),
            Exit::PortIo(insd)
        );
        // No size, or two: not a report that a processor makes.
        for bad in [0, 3 << 4] {
            assert!(matches!(
                decode(0x7b, bad, 0, false),
                Exit::Unknown { code: 0x7b, .. }
            ));
        }
    }

    #[test]
    fn nested_faults() {
        let fault = NestedPageFault {
            gpa: Gpa(0xfee0_0020),
            gva: None,
            write: true,
            fetch: false,
            page_walk: false,
        };
        assert_eq!(
            decode(0x400, 1 << 32 | 0b110, 0xfee0_0020, false),
            Exit::NestedPageFault(fault)
        );
        let walk = NestedPageFault {
            gpa: Gpa(0x5000),
            page_walk: true,
            ..fault
        };
        assert_eq!(
            decode(0x400, 1 << 33 | 0b110, 0x5000, false),
            Exit::NestedPageFault(walk)
        );
        let fetch = NestedPageFault {
            gpa: Gpa(0x5000),
            write: false,
            fetch: true,
            ..fault
        };
        assert_eq!(
            decode(0x400, 1 << 32 | 0b10100, 0x5000, false),
            Exit::NestedPageFault(fetch)
        );
        assert_eq!(
            decode(0x400, 1 << 32 | 0b1101, 0x5000, false),
            Exit::NestedMisconfiguration(Gpa(0x5000))
        );
    }

    #[test]
    fn control_registers_need_decode_assists() {
        let mov = 1 << 63 | 9;
        assert_eq!(decode(0x18, mov, 0, false), Exit::CrAccess(None));
        assert_eq!(
            decode(0x18, mov, 0, true),
            Exit::CrAccess(Some(CrAccess::MovTo {
                cr: 8,
                gpr: Gpr::R9
            }))
        );
        assert_eq!(
            decode(0x08, 1 << 63, 0, true),
            Exit::CrAccess(Some(CrAccess::MovFrom {
                cr: 8,
                gpr: Gpr::Rax
            }))
        );
        assert_eq!(
            decode(0x14, 1 << 63 | 3, 0, true),
            Exit::CrAccess(Some(CrAccess::MovTo {
                cr: 4,
                gpr: Gpr::Rbx
            }))
        );
        assert_eq!(decode(0x14, 3, 0, true), Exit::CrAccess(None));
    }

    #[test]
    fn an_entry_failure_is_known_with_and_without_sign_extension() {
        for stored in [u64::MAX, 0xffff_ffff, u64::MAX - 1] {
            assert_eq!(
                decode(stored, 0, 0, false),
                Exit::EntryFailure { code: stored }
            );
        }
    }

    #[test]
    fn exceptions_carry_their_error_code() {
        assert_eq!(
            decode(0x51, 0, 0, false),
            Exit::Exception {
                vector: 17,
                error_code: Some(0)
            }
        );
        assert_eq!(
            decode(0x41, 7, 0, false),
            Exit::Exception {
                vector: 1,
                error_code: None
            }
        );
    }

    #[test]
    fn msr_direction_is_in_the_info() {
        assert_eq!(decode(0x7c, 0, 0, false), Exit::MsrRead);
        assert_eq!(decode(0x7c, 1, 0, false), Exit::MsrWrite);
    }

    #[test]
    fn every_intercepted_instruction_has_a_length_or_a_decoder() {
        assert_eq!(architectural_length(0x72), 2);
        assert_eq!(architectural_length(0x78), 1);
        assert_eq!(architectural_length(0x81), 3);
        assert_eq!(architectural_length(0x400), 0);
        assert_eq!(architectural_length(0x18), 0);
    }

    #[test]
    fn all_other_codes_are_unknown_not_fatal() {
        for exit_code in [0x00, 0x25, 0x7d, 0x8f, 0x90, 0xa2, 0x401, 0x1000, 1 << 31] {
            assert_eq!(
                decode(exit_code, 5, 0, true),
                Exit::Unknown {
                    code: exit_code,
                    info: 5
                }
            );
        }
    }
}
