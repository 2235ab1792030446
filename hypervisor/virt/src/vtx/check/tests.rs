//! Tests of the checks that an entry makes.

use super::super::capability::Controls;
use super::super::capability::tests::haswell;
use super::*;

/// A 64-bit guest that passes all checks.
fn long_mode() -> VmcsFields {
    let c = haswell();
    let chosen = Controls::choose(&c).expect("a usable processor");
    let mut fields = VmcsFields::default();
    let mut set = |field, value: u64| fields.0.insert(field, value);
    set(Field::PinControls, chosen.pin.bits().into());
    set(Field::ProcessorControls, chosen.proc.bits().into());
    set(Field::SecondaryControls, chosen.proc2.bits().into());
    set(Field::ExitControls, chosen.exit.bits().into());
    let entry = chosen.entry | EntryControls::IA32E_GUEST;
    set(Field::EntryControls, entry.bits().into());
    set(Field::Vpid, 1);
    set(Field::MsrBitmap, 0x5000);
    set(Field::EptPointer, 0x8000 | 3 << 3 | 6);
    set(Field::VmcsLinkPointer, u64::MAX);
    for (efer, pat) in [
        (Field::HostEfer, Field::HostPat),
        (Field::GuestEfer, Field::GuestPat),
    ] {
        set(efer, 0xd01);
        set(pat, crate::cpu::PAT_RESET);
    }
    set(Field::HostCr0, 0x8001_0033);
    set(Field::HostCr3, 0x1000);
    set(Field::HostCr4, 0x2620);
    set(Field::HostCsSelector, 8);
    set(Field::HostTrSelector, 0x18);
    set(Field::HostRip, 0xffff_8000_0000_1000);
    set(Field::GuestCr0, 0x8000_0031);
    set(Field::GuestCr3, 0x9000);
    set(Field::GuestCr4, 0x2020);
    set(Field::GuestDr7, 0x400);
    set(Field::GuestRflags, 2);
    set(Field::GuestRip, 0xffff_ffff_8100_0000);
    set(Field::GuestCsSelector, 0x10);
    for name in [
        SegmentName::Es,
        SegmentName::Ss,
        SegmentName::Ds,
        SegmentName::Fs,
        SegmentName::Gs,
    ] {
        let f = SegmentFields::of(name);
        set(f.limit, 0xffff_ffff);
        set(f.rights, 0xc093);
    }
    set(Field::GuestCsLimit, 0xffff_ffff);
    set(Field::GuestCsRights, 0xa09b);
    set(Field::GuestLdtrRights, 0x1_0000);
    set(Field::GuestTrLimit, 0x67);
    set(Field::GuestTrRights, 0x8b);
    fields
}

/// A guest as after reset.
fn real_mode() -> VmcsFields {
    let mut fields = long_mode();
    let entry = fields.get(Field::EntryControls) & !u64::from(EntryControls::IA32E_GUEST.bits());
    let mut set = |field, value: u64| fields.0.insert(field, value);
    set(Field::EntryControls, entry);
    set(Field::GuestEfer, 0);
    set(Field::GuestCr0, 0x6000_0030);
    set(Field::GuestCr3, 0);
    set(Field::GuestCr4, 0x2000);
    set(Field::GuestRip, 0xfff0);
    set(Field::GuestCsSelector, 0xf000);
    set(Field::GuestCsBase, 0xffff_0000);
    for name in [
        SegmentName::Es,
        SegmentName::Cs,
        SegmentName::Ss,
        SegmentName::Ds,
        SegmentName::Fs,
        SegmentName::Gs,
    ] {
        let f = SegmentFields::of(name);
        set(f.limit, 0xffff);
        set(f.rights, if name == SegmentName::Cs { 0x9b } else { 0x93 });
    }
    fields
}

#[test]
fn good_states_pass() {
    for fields in [long_mode(), real_mode()] {
        assert_eq!(check(&fields, &haswell()), Vec::<String>::new());
    }
}

#[test]
fn each_defect_is_named_and_nothing_else() {
    for (field, value, text) in [
        (Field::PinControls, 0, "pin-based controls"),
        (Field::MsrBitmap, 0x123, "MSR bitmap"),
        (Field::Vpid, 0, "VPID 0"),
        (Field::EptPointer, 0x8006, "EPT pointer"),
        (Field::EptPointer, 1 << 50 | 0x801e, "EPT pointer"),
        (Field::HostCr4, 0x20, "host CR4"),
        (Field::HostTrSelector, 0, "host TR selector is null"),
        (Field::HostCsSelector, 0xb, "RPL or TI"),
        (Field::HostGsBase, 1 << 63, "host GS base"),
        (Field::HostEfer, 0x101, "host EFER"),
        (Field::GuestCr0, 0x8000_0011, "guest CR0"),
        (Field::GuestCr4, 0x20, "guest CR4"),
        (Field::GuestCr3, 1 << 45, "guest CR3"),
        (Field::GuestEfer, 0xd03, "reserved bits"),
        (Field::GuestEfer, 0x001, "EFER.LMA differs from the IA-32e"),
        (Field::GuestDr7, 1 << 33, "DR7"),
        (Field::GuestDebugctl, 1 << 4, "DEBUGCTL"),
        (Field::GuestPat, 2, "guest PAT"),
        (Field::GuestSysenterEip, 1 << 60, "SYSENTER_EIP"),
        (Field::GuestRip, 1 << 50, "RIP"),
        (Field::GuestRflags, 0, "RFLAGS"),
        (Field::GuestRflags, 0x8002, "RFLAGS"),
        (Field::GuestFsBase, 1 << 50, "Fs base"),
        (Field::GuestDsBase, 1 << 33, "Ds base"),
        (Field::GuestDsRights, 0xc092, "Ds: type 2"),
        (Field::GuestSsRights, 0xc09b, "Ss: type 11"),
        (Field::GuestCsRights, 0xe09b, "both L and D"),
        (Field::GuestCsRights, 0xa0fb, "CS: type 11 with DPL 3"),
        (Field::GuestEsRights, 0xc013, "not present"),
        (Field::GuestEsLimit, 0xffff_0000, "can't have G = 1"),
        (Field::GuestEsRights, 0x93, "can't have G = 0"),
        (Field::GuestTrRights, 0x83, "Tr: access rights"),
        (Field::GuestTrRights, 0x1_0000, "TR is unusable"),
        (Field::GuestTrSelector, 4, "TI set"),
        (Field::GuestGdtrLimit, 0x1_0000, "GDTR limit"),
        (Field::GuestIdtrBase, 1 << 47, "IDTR base"),
        (Field::GuestActivity, 4, "activity state 4"),
        (Field::GuestInterruptibility, 1, "STI with RFLAGS.IF = 0"),
        (Field::GuestInterruptibility, 0x20, "reserved bits"),
        (Field::GuestPendingDebug, 0x10, "pending debug"),
        (Field::VmcsLinkPointer, 0, "link pointer"),
        (Field::EntryInterruptionInfo, 0x8000_0030, "RFLAGS.IF = 0"),
        (
            Field::EntryInterruptionInfo,
            0x8000_0203,
            "NMI injected with vector 3",
        ),
        (
            Field::EntryInterruptionInfo,
            0x8000_030d,
            "without its error code",
        ),
        (
            Field::EntryInterruptionInfo,
            0x8000_0b06,
            "with an error code",
        ),
        (
            Field::EntryInterruptionInfo,
            0x8000_0480,
            "instruction length 0",
        ),
    ] {
        let mut fields = long_mode();
        fields.0.insert(field, value);
        let failures = check(&fields, &haswell());
        assert!(
            failures.len() == 1 && failures[0].contains(text),
            "{field:?} = {value:#x}: {failures:?}"
        );
    }
}

#[test]
fn real_mode_has_its_own_rules() {
    for (field, value, text) in [
        (Field::GuestSsRights, 0xf3, "SS: DPL 3 in real mode"),
        (Field::GuestRflags, 2 | RFLAGS_VM, "RFLAGS.VM"),
        (Field::GuestRip, 1 << 32, "RIP"),
        (
            Field::EntryInterruptionInfo,
            0x8000_0b0d,
            "with an error code",
        ),
    ] {
        let mut fields = real_mode();
        fields.0.insert(field, value);
        let failures = check(&fields, &haswell());
        assert!(
            failures.iter().any(|f| f.contains(text)),
            "{field:?} = {value:#x}: {failures:?}"
        );
    }
    let mut data_in_cs = real_mode();
    data_in_cs.0.insert(Field::GuestCsRights, 0x93);
    assert!(check(&data_in_cs, &haswell()).is_empty());
}

#[test]
fn pdptes_are_checked_only_in_pae_mode() {
    let mut fields = real_mode();
    fields.0.insert(Field::GuestPdpte2, 0x1003);
    assert!(check(&fields, &haswell()).is_empty());
    fields.0.insert(Field::GuestCr0, 0x8000_0031);
    fields.0.insert(Field::GuestCr4, 0x2020);
    let failures = check(&fields, &haswell());
    assert!(
        failures.len() == 1 && failures[0].contains("PDPTE2"),
        "{failures:?}"
    );
}

#[test]
fn single_step_in_a_shadow_needs_bs() {
    let mut fields = long_mode();
    fields
        .0
        .insert(Field::GuestRflags, 2 | RFLAGS_TF | RFLAGS_IF);
    fields.0.insert(Field::GuestInterruptibility, 1);
    assert!(check(&fields, &haswell())[0].contains("BS does not match"));
    fields.0.insert(Field::GuestPendingDebug, PENDING_DEBUG_BS);
    assert!(check(&fields, &haswell()).is_empty());
}
