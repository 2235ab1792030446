//! Runs the checks of the virtualization backend (`virt::selftest`).
//!
//! Each check is one line, `selftest ok NAME` or
//! `selftest FAILED NAME: REASON`; the last line counts them.

use alloc::string::String;

use virt::{Backend, selftest, svm::Svm, vtx::Vtx};

use crate::{error, info, interrupts, memory};

/// Checks the backend of this processor.
pub fn run() {
    if Vtx::preflight().passed() {
        check::<Vtx>();
    } else if Svm::preflight().passed() {
        check::<Svm>();
    } else {
        error!(
            "selftest FAILED: no virtualization\nVT-x:\n{}AMD-V:\n{}",
            Vtx::preflight(),
            Svm::preflight()
        );
    }
}

fn check<B: Backend>() {
    info!("selftest of {}\n{}", B::NAME, B::preflight());
    let backend = B::new(&memory::HOST).and_then(|backend| {
        backend.enable(0)?;
        Ok(backend)
    });
    let backend = match backend {
        Ok(backend) => backend,
        Err(e) => {
            error!("selftest FAILED: {e}");
            return;
        }
    };
    let (mut passed, mut failed) = (0, 0);
    let mut report = |name: &str, result: Result<(), String>| match result {
        Ok(()) => {
            passed += 1;
            info!("selftest ok {name}");
        }
        Err(e) => {
            failed += 1;
            error!("selftest FAILED {name}: {e}");
        }
    };
    let host = selftest::Host {
        memory: &memory::HOST,
        arm_timer: interrupts::arm_timer,
    };
    selftest::run(&backend, host, &mut report);
    info!("selftest done: {passed} passed, {failed} failed");
}
