//! The end of emulated instructions: shadows, single steps, RF.

use super::*;
use crate::emulate::Aftermath;
use virt::Shadow;

const DB: Event = Event::Exception {
    vector: 1,
    error_code: None,
};

fn finish(b: &mut Bench, executed: Executed, before: u64, aftermath: Aftermath) -> Next {
    b.vcpu.hw.queued = None;
    b.vcpu.finish_emulated(executed, before, aftermath)
}

#[test]
fn a_shadow_holds_the_trap_of_mov_ss_back_but_not_that_of_sti() {
    let whole = Executed::Whole { length: 3 };
    for (shadow, before, trap, shaded) in [
        (Shadow::MovSs, 2, None, true),
        (Shadow::MovSs, 2 | RFLAGS_TF, None, true),
        (Shadow::Sti, 2, None, true),
        (Shadow::Sti, 2 | RFLAGS_TF, Some(DB), false),
    ] {
        let mut b = Bench::new();
        let rip = b.rip();
        b.vcpu.hw.state.rflags = before;
        let aftermath = Aftermath {
            shadow: Some(shadow),
            ..Aftermath::default()
        };
        let next = finish(&mut b, whole, before, aftermath);
        assert_eq!(next, Next::Check);
        assert_eq!(b.rip(), rip + 3);
        let got = (b.vcpu.hw.queued, b.vcpu.hw.shadow);
        assert_eq!(got, (trap, shaded), "{shadow:?} {before:#x}");
    }
}

#[test]
fn the_flags_at_the_beginning_decide_about_the_single_step() {
    // POPF that sets TF, and one that clears it.
    let mut b = Bench::new();
    let whole = Executed::Whole { length: 1 };
    b.vcpu.hw.state.rflags = 2 | RFLAGS_TF;
    finish(&mut b, whole, 2, Aftermath::default());
    assert_eq!(b.vcpu.hw.queued, None);
    b.vcpu.hw.state.rflags = 2;
    finish(&mut b, whole, 2 | RFLAGS_TF, Aftermath::default());
    assert_eq!(b.vcpu.hw.queued, Some(DB));
}

#[test]
fn rf_ends_with_the_instruction_is_set_between_iterations_and_stays_as_iret_loads_it() {
    let mut b = Bench::new();
    let iret = Aftermath {
        interrupt_return: true,
        ..Aftermath::default()
    };
    let nothing = Aftermath::default();
    for (executed, aftermath, before, after) in [
        (Executed::Whole { length: 1 }, nothing, true, false),
        (Executed::Branch, nothing, true, false),
        (Executed::Branch, iret, true, true),
        (Executed::Branch, iret, false, false),
        (Executed::Iteration, nothing, false, true),
    ] {
        b.vcpu.hw.state.rflags = if before { 2 | RFLAGS_RF } else { 2 };
        finish(&mut b, executed, 2, aftermath);
        let rf = b.vcpu.hw.state.rflags & RFLAGS_RF != 0;
        assert_eq!(rf, after, "{executed:?} {aftermath:?}");
    }
    // A fault's flags let the instruction past a breakpoint, those of a trap do not.
    b.vcpu.hw.state.rflags = 2;
    b.vcpu.raise(Exception::GENERAL_PROTECTION);
    assert_eq!(b.vcpu.hw.state.rflags, 2 | RFLAGS_RF);
    b.vcpu.hw.state.rflags = 2;
    b.vcpu.debug_trap(1);
    assert_eq!(b.vcpu.hw.state.rflags, 2);
}
