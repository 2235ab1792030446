//! Tests of the CPU model: made-up hosts, and what a guest is shown of them.

use super::*;

/// A host that has every feature bit set, so that only the policy decides.
fn all_ones(vendor: &[u8; 12], leaf: u32, subleaf: u32) -> CpuidResult {
    let word = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
    match (leaf, subleaf) {
        (0, _) => CpuidResult {
            eax: 0x20,
            ebx: word(0),
            ecx: word(8),
            edx: word(4),
        },
        (0x8000_0000, _) => CpuidResult {
            eax: 0x8000_0021,
            ..Default::default()
        },
        (0x8000_0008, _) => CpuidResult {
            eax: 0x3028,
            ..Default::default()
        },
        (0xd, 2) => CpuidResult {
            eax: 256,
            ebx: 576,
            ..Default::default()
        },
        (0xd, 9) => CpuidResult {
            eax: 8,
            ebx: 2688,
            ..Default::default()
        },
        _ => CpuidResult {
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
        },
    }
}

const STATE: CpuidState = CpuidState {
    apic_id: 3,
    apic_enabled: true,
    cr4: 0,
    xcr0: 1,
};

fn model(
    vendor: &'static [u8; 12],
    vcpus: u16,
    model: &CpuModel,
) -> Result<CpuidPolicy, ModelError> {
    CpuidPolicy::new(&|l, s| all_ones(vendor, l, s), vcpus, model, true)
}

fn switched(base: ModelBase, features: &[&str]) -> CpuModel {
    let features = features.iter().map(|switch| {
        let name = switch[1..].into();
        (name, switch.starts_with('+'))
    });
    CpuModel {
        base,
        features: features.collect(),
    }
}

fn policy(vendor: &'static [u8; 12], vcpus: u16) -> CpuidPolicy {
    model(vendor, vcpus, &CpuModel::default()).expect("the default model")
}

#[test]
fn virtualization_and_unbacked_features_are_hidden() {
    for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
        let p = policy(vendor, 1);
        let leaf1 = p.get(1, 0, STATE);
        assert_eq!(leaf1.ecx & (1 << 5), 0, "VMX");
        assert_eq!(leaf1.ecx & (1 << 3), 0, "MONITOR");
        assert_ne!(leaf1.ecx & (1 << 31), 0, "hypervisor");
        assert_eq!(p.get(0x8000_0001, 0, STATE).ecx & (1 << 2), 0, "SVM");
        assert_eq!(p.get(7, 0, STATE).ebx & (1 << 16), 0, "AVX-512F");
        assert_eq!(p.get(7, 0, STATE).ecx & (1 << 16), 0, "LA57");
        assert_eq!(p.cr4_allowed() & (1 << 12), 0, "CR4.LA57");
        assert_eq!(p.get(0x8000_0008, 0, STATE).eax >> 8, 48, "linear bits");
        assert_eq!(p.get(0xa, 0, STATE), CpuidResult::default(), "PMU");
    }
}

#[test]
fn dynamic_fields_follow_the_vcpu() {
    let p = policy(b"GenuineIntel", 4);
    let on = CpuidState {
        cr4: 1 << 18,
        ..STATE
    };
    assert_eq!(p.get(1, 0, STATE).ecx & (1 << 27), 0);
    assert_ne!(p.get(1, 0, on).ecx & (1 << 27), 0);
    assert_eq!(p.get(1, 0, STATE).ebx >> 24, 3);
    assert_eq!(p.get(1, 0, STATE).ebx >> 16 & 0xff, 4);
    assert_eq!(p.get(0xb, 1, STATE).ebx, 4);
    assert_eq!(p.get(0xb, 1, STATE).eax, 2);
    let off = CpuidState {
        apic_enabled: false,
        ..STATE
    };
    assert_eq!(p.get(1, 0, off).edx & (1 << 9), 0);
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let p = policy(b"GenuineIntel", 1);
    assert_eq!(p.get(0xd, 0, STATE).ebx, 576);
    assert_eq!(p.get(0xd, 0, CpuidState { xcr0: 7, ..STATE }).ebx, 832);
    assert_eq!(p.get(0xd, 0, STATE).ecx, 2696);
    assert_eq!(p.xsave_components().bits(), 0x207);
}

#[test]
fn compacted_sizes_follow_xcr0_too() {
    let p = policy(b"AuthenticAMD", 1);
    assert!(p.has_xsaves());
    for (xcr0, bytes) in [(1, 576), (3, 576), (7, 832), (0x203, 584), (0x207, 840)] {
        let leaf = p.get(0xd, 1, CpuidState { xcr0, ..STATE });
        assert_eq!(leaf.ebx, bytes, "{xcr0:#x}");
        // IA32_XSS has no bit.
        assert_eq!((leaf.ecx, leaf.edx), (0, 0));
    }
    let hidden = model(
        b"AuthenticAMD",
        1,
        &switched(ModelBase::Host, &["-xsaves", "-xsavec"]),
    );
    let hidden = hidden.expect("a model");
    assert!(!hidden.has_xsaves());
    assert_eq!(hidden.get(0xd, 1, STATE).ebx, 0);
}

#[test]
fn what_does_not_leak_is_told_where_it_is_known() {
    let shown = |p: &CpuidPolicy| p.get(7, 0, STATE).edx >> 29 & 1 == 1;
    let mut p = policy(b"GenuineIntel", 1);
    assert!(!shown(&p) && p.arch_capabilities().is_none());
    // An old processor: all that is said is what Plinth does.
    p.set_arch_capabilities(0);
    assert_eq!((shown(&p), p.arch_capabilities()), (true, Some(1 << 3)));
    // RDCL_NO, IBRS_ALL, MDS_NO; not the registers behind TSX_CTRL, MCU_CONTROL and XAPIC_DISABLE_STATUS.
    p.set_arch_capabilities(0x23 | 1 << 7 | 1 << 9 | 1 << 21);
    assert_eq!(p.arch_capabilities(), Some(0x2b));
    // IBRS_ALL speaks of a register that must be there.
    let bare = |l: u32, s: u32| {
        let mut answer = all_ones(b"GenuineIntel", l, s);
        if l == 7 {
            answer.edx = 0;
        }
        answer
    };
    let mut p = CpuidPolicy::new(&bare, 1, &CpuModel::default(), true).expect("a model");
    p.set_arch_capabilities(0x23);
    assert_eq!(p.arch_capabilities(), Some(0x29));
    let mut amd = policy(b"AuthenticAMD", 1);
    amd.set_arch_capabilities(0);
    assert!(!shown(&amd) && amd.arch_capabilities().is_none());
}

#[test]
fn out_of_range_leaves_follow_the_vendor() {
    let intel = policy(b"GenuineIntel", 1);
    assert_eq!(intel.get(0x1234, 0, STATE), intel.get(0xd, 0, STATE));
    let amd = policy(b"AuthenticAMD", 1);
    assert_eq!(amd.get(0x1234, 0, STATE), CpuidResult::default());
    assert_eq!(amd.get(0x8000_1234, 0, STATE), CpuidResult::default());
}

#[test]
fn paravirtual_signature_is_linux_own() {
    let p = policy(b"AuthenticAMD", 1);
    let s = p.get(0x4000_0000, 0, STATE);
    assert_eq!(s.ebx.to_le_bytes(), *b"KVMK");
    assert_ne!(p.get(0x4000_0001, 0, STATE).eax & (1 << 3), 0);
}

#[test]
fn a_hidden_feature_takes_with_it_what_needs_it() {
    let no_xsave = switched(ModelBase::Host, &["-xsave"]);
    let p = model(b"GenuineIntel", 1, &no_xsave).expect("a model");
    let (leaf1, leaf7) = (p.get(1, 0, STATE), p.get(7, 0, STATE));
    assert_eq!(
        leaf1.ecx & (1 << 26 | 1 << 28 | 1 << 12),
        0,
        "XSAVE, AVX, FMA"
    );
    assert_eq!(
        (leaf7.ebx & (1 << 5), leaf7.ecx & (1 << 3)),
        (0, 0),
        "AVX2, PKU"
    );
    assert_eq!(p.cr4_allowed() & (1 << 18 | 1 << 22), 0);
    assert_ne!(leaf7.ebx & (1 << 7), 0, "SMEP stays");
    let no_smep = model(b"GenuineIntel", 1, &switched(ModelBase::Host, &["-smep"]));
    assert_eq!(no_smep.expect("a model").cr4_allowed() & (1 << 20), 0);
}

#[test]
fn the_baseline_hides_all_but_itself_and_what_is_added() {
    for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
        let plain = model(vendor, 1, &switched(ModelBase::Baseline, &[])).expect("a model");
        let leaf1 = plain.get(1, 0, STATE);
        assert_eq!(leaf1.eax, BASELINE_SIGNATURE);
        assert_eq!(
            leaf1.ecx & (1 << 26 | 1 << 28 | 1 << 30),
            0,
            "XSAVE, AVX, RDRAND"
        );
        assert_ne!(leaf1.ecx & (1 << 20), 0, "SSE4.2");
        assert_eq!(plain.get(7, 0, STATE).ebx, 1 << 1, "TSC_ADJUST alone");
        assert_eq!(plain.get(0xd, 0, STATE), CpuidResult::default());
        assert_eq!(plain.get(0x8000_0002, 0, STATE).eax.to_le_bytes(), *b"Plin");
        let switches = switched(ModelBase::Baseline, &["+xsave", "+avx", "+smap", "-nx"]);
        let more = model(vendor, 1, &switches).expect("a model");
        assert_ne!(more.get(1, 0, STATE).ecx & (1 << 28), 0, "AVX");
        assert_eq!(more.xsave_components().bits(), 7);
        assert_eq!(more.get(7, 0, STATE).ebx, 1 << 1 | 1 << 20);
        assert_eq!(more.efer_allowed() & (1 << 11), 0, "NX");
    }
}

#[test]
fn a_feature_that_cannot_be_had_is_named() {
    let bare = |l: u32, s: u32| {
        let mut result = all_ones(b"GenuineIntel", l, s);
        if l == 1 {
            result.ecx &= !(1 << 28);
        }
        result
    };
    let ask = |features: &[&str]| {
        let model = switched(ModelBase::Host, features);
        CpuidPolicy::new(&bare, 1, &model, true).err()
    };
    assert_eq!(ask(&["+avx"]), Some(ModelError::Missing("avx")));
    assert_eq!(ask(&["+avx2"]), Some(ModelError::Needs("avx2", "avx")));
    assert_eq!(ask(&["-vmx"]), Some(ModelError::Unknown("vmx".into())));
    assert_eq!(ask(&["-avx", "+smep"]), None);
}

#[test]
fn every_switch_is_of_a_feature_that_is_virtualized() {
    for switch in &SWITCHES {
        assert_ne!(switch.word.virtualized() & switch.bit, 0, "{}", switch.name);
    }
    let mut names: Vec<_> = feature_names().collect();
    names.sort_unstable();
    // The configuration's check knows names only, and has them from nowhere else.
    assert_eq!(names, manage::config::CPU_FEATURES);
}

#[test]
fn the_clock_is_called_stable_only_where_it_is() {
    let at = |stable| {
        let policy = CpuidPolicy::new(
            &|l, s| all_ones(b"GenuineIntel", l, s),
            1,
            &CpuModel::default(),
            stable,
        );
        policy.expect("a model").get(0x4000_0001, 0, STATE).eax
    };
    assert_eq!((at(true) >> 24 & 1, at(false) >> 24 & 1), (1, 0));
}
