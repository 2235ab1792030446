//! Whether this machine can run guests: the processor's features, in words, before anything relies on them.

use virt::{Backend, Preflight, svm::Svm, vtx::Vtx};

use crate::{cpu, error, info, power};

/// Whose virtualization a processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel's VT-x (also in processors of Zhaoxin).
    Vtx,
    /// AMD's AMD-V (also in processors of Hygon).
    Svm,
}

/// The last line when guests cannot run. Tests and people look for it.
const CLOSING: &str = "Plinth cannot run guests on this machine";

/// The vendor whose features are looked at: the one whose feature CPUID shows, else by the maker's name, so
/// that a hidden feature is reported as missing.
fn vendor() -> Option<Vendor> {
    let cpuid = cpu::cpuid();
    let vtx = cpuid.get_feature_info().is_some_and(|f| f.has_vmx());
    let svm = cpuid
        .get_extended_processor_and_feature_identifiers()
        .is_some_and(|f| f.has_svm());
    let maker = cpuid.get_vendor_info();
    match (vtx, svm, maker.as_ref().map(|maker| maker.as_str())) {
        (true, _, _) => Some(Vendor::Vtx),
        (_, true, _) => Some(Vendor::Svm),
        (_, _, Some("GenuineIntel" | "CentaurHauls" | "  Shanghai  ")) => Some(Vendor::Vtx),
        (_, _, Some("AuthenticAMD" | "HygonGenuine")) => Some(Vendor::Svm),
        _ => None,
    }
}

/// Prints the check of this processor. Returns only when guests can run on it; otherwise the text stays on
/// the screen of a real machine, and an emulator is powered off.
pub fn check() -> Vendor {
    let cpuid = cpu::cpuid();
    if let Some(brand) = cpuid.get_processor_brand_string() {
        info!("processor: {}", brand.as_str().trim());
    }
    let Some(vendor) = vendor() else {
        error!("this processor has neither VT-x nor AMD-V");
        stop();
    };
    let (name, preflight) = match vendor {
        Vendor::Vtx => (Vtx::NAME, Vtx::preflight()),
        Vendor::Svm => (Svm::NAME, Svm::preflight()),
    };
    print(name, &preflight);
    if !preflight.passed() {
        stop();
    }
    vendor
}

fn print(name: &str, preflight: &Preflight) {
    if preflight.passed() {
        info!("pre-flight check of {name}: passed\n{preflight}");
    } else {
        error!("pre-flight check of {name}: not passed\n{preflight}");
    }
}

fn stop() -> ! {
    error!("{CLOSING}");
    if power::emulator().is_some() {
        power::off();
    }
    cpu::halt_forever()
}
