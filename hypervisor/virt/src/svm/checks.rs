//! VMRUN's own checks once more in software, to say in words why it refused a state.
//!
//! The processor reports only "invalid" (APM vol. 2, section 15.5.1). A pure function over the
//! VMCB, tested on the host; it runs after a failure only, never on the fast path.

use alloc::{format, string::String, vec::Vec};

use bitflags::bitflags;

use super::features::Capabilities;
use super::permissions::{IOPM_BYTES, MSRPM_BYTES};
use super::vmcb::{
    ATTRIBUTE_BIG, ATTRIBUTE_LONG, EventField, EventType, Intercepts2, NestedControl, Vmcb,
};
use crate::cpu::is_pat;

bitflags! {
    /// Bits of CR0 and CR4 that the checks look at.
    struct Cr0: u64 {
        const PE = 1 << 0;
        const NW = 1 << 29;
        const CD = 1 << 30;
        const PG = 1 << 31;
    }

    /// Bits of EFER that exist (section 3.1.7).
    pub(super) struct Efer: u64 {
        const SCE = 1 << 0;
        const LME = 1 << 8;
        const LMA = 1 << 10;
        const NXE = 1 << 11;
        const SVME = 1 << 12;
        const LMSLE = 1 << 13;
        const FFXSR = 1 << 14;
        const TCE = 1 << 15;
        const MCOMMIT = 1 << 17;
        const INTWB = 1 << 18;
        const UAIE = 1 << 20;
        const AIBRSE = 1 << 21;
    }
}

const CR4_PAE: u64 = 1 << 5;

/// The checks of section 15.5.1 that this VMCB fails, one sentence each.
pub fn failures(vmcb: &Vmcb, capabilities: &Capabilities) -> Vec<String> {
    let (control, save) = (&vmcb.control, &vmcb.save);
    let mut found = Vec::new();
    let mut check = |failed: bool, text: &dyn Fn() -> String| {
        if failed {
            found.push(text());
        }
    };
    let cr0 = |bit: Cr0| save.cr0 & bit.bits() != 0;
    let efer = |bit: Efer| save.efer & bit.bits() != 0;
    let reserved_efer = save.efer & !Efer::all().bits();
    let reserved_cr4 = save.cr4 & !capabilities.cr4;
    let too_high = u64::MAX << capabilities.physical_bits.min(63);

    check(!efer(Efer::SVME), &|| {
        format!("EFER.SVME is clear (EFER {:#x})", save.efer)
    });
    check(reserved_efer != 0, &|| {
        format!("EFER has reserved bits {reserved_efer:#x}")
    });
    check(cr0(Cr0::NW) && !cr0(Cr0::CD), &|| {
        format!("CR0.NW is set and CR0.CD clear (CR0 {:#x})", save.cr0)
    });
    check(save.cr0 >> 32 != 0, &|| {
        format!("CR0 has reserved bits (CR0 {:#x})", save.cr0)
    });
    check(reserved_cr4 != 0, &|| {
        format!("CR4 has bits that this processor lacks: {reserved_cr4:#x}")
    });
    check(efer(Efer::LMA) && save.cr3 & too_high != 0, &|| {
        format!(
            "CR3 is beyond the physical address space (CR3 {:#x})",
            save.cr3
        )
    });
    check(save.dr6 >> 32 != 0, &|| {
        format!("DR6 has bits 63:32 set (DR6 {:#x})", save.dr6)
    });
    check(save.dr7 >> 32 != 0, &|| {
        format!("DR7 has bits 63:32 set (DR7 {:#x})", save.dr7)
    });
    let long_paging = efer(Efer::LME) && cr0(Cr0::PG);
    check(long_paging && save.cr4 & CR4_PAE == 0, &|| {
        "EFER.LME and CR0.PG are set and CR4.PAE is clear".into()
    });
    check(long_paging && !cr0(Cr0::PE), &|| {
        "EFER.LME and CR0.PG are set and CR0.PE is clear".into()
    });
    let code = save.cs.attributes;
    let both = ATTRIBUTE_LONG | ATTRIBUTE_BIG;
    check(
        long_paging && save.cr4 & CR4_PAE != 0 && code & both == both,
        &|| format!("CS has both L and D set in long mode (attributes {code:#x})"),
    );
    check(!control.intercepts2.contains(Intercepts2::VMRUN), &|| {
        "the VMRUN intercept is off".into()
    });
    check(control.asid == 0, &|| "the ASID is 0, the host's".into());
    check(control.asid >= capabilities.asids, &|| {
        format!("ASID {} is not below {}", control.asid, capabilities.asids)
    });
    for (name, base, bytes) in [
        ("I/O permission map", control.iopm_base, IOPM_BYTES),
        ("MSR permission map", control.msrpm_base, MSRPM_BYTES),
    ] {
        let end = base.saturating_add(bytes as u64 - 1);
        check(end & too_high != 0, &|| {
            format!("the {name} at {base:#x} is beyond the physical address space")
        });
    }
    if control.nested_control.contains(NestedControl::ENABLE) {
        let root = control.nested_root;
        check(root & (too_high | 0xfff) != 0, &|| {
            format!("the nested page-table root {root:#x} is unaligned or too high")
        });
        check(!is_pat(save.pat), &|| {
            format!("G_PAT has a reserved memory type ({:#x})", save.pat)
        });
    }
    // An exit moves the event from EVENTINJ to EXITINTINFO.
    let event = if control.event_injection.valid() {
        control.event_injection
    } else {
        control.exit_interrupt_info
    };
    if event.valid() {
        found.extend(event_failure(event));
    }
    found
}

/// What makes an event impossible to inject (section 15.20).
fn event_failure(event: EventField) -> Option<String> {
    let vector = event.vector();
    match event.kind() {
        EventType::Reserved(kind) => Some(format!("the injected event has reserved type {kind}")),
        EventType::Exception if vector == 2 || vector > 31 => Some(format!(
            "the injected event is an exception with vector {vector}"
        )),
        _ if event.reserved() != 0 => Some(format!(
            "the injected event has reserved bits ({:#x})",
            event.into_bits()
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svm::vmcb::VmcbSegment;

    fn capabilities() -> Capabilities {
        Capabilities::none()
    }

    /// 64-bit mode, paging on, all in order.
    fn good() -> Vmcb {
        let mut vmcb = Vmcb::zeroed();
        vmcb.control.intercepts2 = Intercepts2::VMRUN;
        vmcb.control.asid = 1;
        vmcb.control.iopm_base = 0x10_0000;
        vmcb.control.msrpm_base = 0x20_0000;
        vmcb.control.nested_control = NestedControl::ENABLE;
        vmcb.control.nested_root = 0x30_0000;
        vmcb.save.efer = (Efer::SVME | Efer::LME | Efer::LMA).bits();
        vmcb.save.cr0 = 0x8001_0033;
        vmcb.save.cr3 = 0x1000;
        vmcb.save.cr4 = CR4_PAE;
        vmcb.save.dr6 = 0xffff_0ff0;
        vmcb.save.dr7 = 0x400;
        vmcb.save.pat = crate::cpu::PAT_RESET;
        vmcb.save.cs = VmcbSegment {
            attributes: 0x29b,
            ..VmcbSegment::default()
        };
        vmcb
    }

    fn one_failure(change: impl FnOnce(&mut Vmcb), expected: &str) {
        let mut vmcb = good();
        change(&mut vmcb);
        let found = failures(&vmcb, &capabilities());
        assert_eq!(found.len(), 1, "expected `{expected}`, found {found:?}");
        assert!(
            found[0].contains(expected),
            "expected `{expected}`, found {found:?}"
        );
    }

    #[test]
    fn a_good_state_has_no_failures() {
        assert_eq!(failures(&good(), &capabilities()), Vec::<String>::new());
    }

    #[test]
    fn each_check_of_the_manual_is_made() {
        one_failure(|v| v.save.efer &= !Efer::SVME.bits(), "EFER.SVME");
        one_failure(|v| v.save.efer |= 1 << 9, "EFER has reserved bits 0x200");
        one_failure(|v| v.save.cr0 |= Cr0::NW.bits(), "CR0.NW");
        one_failure(|v| v.save.cr0 |= 1 << 32, "CR0 has reserved");
        one_failure(|v| v.save.cr4 |= 1 << 13, "lacks: 0x2000");
        one_failure(|v| v.save.cr3 = 1 << 40, "CR3");
        one_failure(|v| v.save.dr6 |= 1 << 32, "DR6");
        one_failure(|v| v.save.dr7 |= 1 << 63, "DR7");
        one_failure(|v| v.save.cr4 &= !CR4_PAE, "CR4.PAE is clear");
        one_failure(|v| v.save.cr0 &= !Cr0::PE.bits(), "CR0.PE is clear");
        one_failure(|v| v.save.cs.attributes |= ATTRIBUTE_BIG, "both L and D");
        one_failure(
            |v| v.control.intercepts2 = Intercepts2::empty(),
            "VMRUN intercept",
        );
        one_failure(|v| v.control.asid = 0, "ASID is 0");
        one_failure(|v| v.control.asid = 16, "ASID 16 is not below 16");
        one_failure(
            |v| v.control.iopm_base = (1 << 40) - 4096,
            "I/O permission map",
        );
        one_failure(|v| v.control.msrpm_base = u64::MAX, "MSR permission map");
        one_failure(
            |v| v.control.nested_root = 0x30_0008,
            "nested page-table root",
        );
        one_failure(|v| v.save.pat = 2, "G_PAT");
    }

    #[test]
    fn impossible_events_are_named() {
        let inject = |kind, vector: u8| {
            move |v: &mut Vmcb| {
                v.control.event_injection = EventField::new()
                    .with_kind(kind)
                    .with_vector(vector)
                    .with_valid(true);
            }
        };
        one_failure(inject(EventType::Reserved(5), 0), "reserved type 5");
        one_failure(inject(EventType::Exception, 2), "exception with vector 2");
        one_failure(inject(EventType::Exception, 32), "exception with vector 32");
        one_failure(
            |v| {
                v.control.exit_interrupt_info = EventField::new()
                    .with_kind(EventType::Reserved(7))
                    .with_valid(true);
            },
            "reserved type 7",
        );
        let mut vmcb = good();
        inject(EventType::Interrupt, 0x30)(&mut vmcb);
        assert!(failures(&vmcb, &capabilities()).is_empty());
    }

    #[test]
    fn several_failures_are_all_told() {
        let mut vmcb = good();
        vmcb.save.efer = 0;
        vmcb.control.asid = 0;
        assert_eq!(failures(&vmcb, &capabilities()).len(), 2);
    }
}
