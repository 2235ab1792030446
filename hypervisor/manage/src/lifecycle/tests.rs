use super::*;
use alloc::vec::Vec;
use proptest::prelude::*;

const STOP: Verb = Verb::Stop { at_once: false };
const FORCE: Verb = Verb::Stop { at_once: true };
const DESTROY: Verb = Verb::Destroy { force: false };
const DESTROY_BY_FORCE: Verb = Verb::Destroy { force: true };

fn running() -> Life {
    let mut life = Life::starting();
    assert_eq!(life.made(), Made::Run);
    life
}

fn step(life: &mut Life, verb: Verb) -> Option<Step> {
    life.ask(verb).ok().map(|(step, _)| step)
}

const VERBS: [Verb; 9] = [
    Verb::Start,
    STOP,
    FORCE,
    Verb::Pause,
    Verb::Resume,
    Verb::Reset,
    DESTROY,
    DESTROY_BY_FORCE,
    Verb::Nmi,
];

#[test]
fn each_verb_is_done_or_refused_in_each_state() {
    use Step::{Force, Make, Nmi, Noted, Pause, PressButton, Remove, Reset, Resume};
    let in_state = |state| Life {
        state,
        ..Life::off()
    };
    #[rustfmt::skip]
    let table = [
        (VmState::Off,
            [Some(Make), None, None, None, None, None, Some(Remove), Some(Remove), None]),
        (VmState::Starting,
            [None, Some(Noted), Some(Noted), None, None, None, None, Some(Noted), None]),
        (VmState::Running,
            [None, Some(PressButton), Some(Force), Some(Pause), None, Some(Reset), None, Some(Force), Some(Nmi)]),
        (VmState::Paused,
            [None, None, Some(Force), None, Some(Resume), Some(Reset), None, Some(Force), Some(Nmi)]),
        (VmState::Stopping,
            [None, Some(PressButton), Some(Force), None, None, Some(Reset), None, Some(Force), Some(Nmi)]),
        (VmState::Ending,
            [Some(Noted), Some(Noted), Some(Noted), None, None, None, None, Some(Noted), None]),
        (VmState::Waiting,
            [Some(Make), Some(Noted), Some(Noted), None, None, None, None, Some(Remove), None]),
    ];
    for (state, expected) in table {
        for (verb, expected) in VERBS.into_iter().zip(expected) {
            let mut life = in_state(state);
            assert_eq!(step(&mut life, verb), expected, "{verb:?} in {state:?}");
            if expected.is_none() {
                assert_eq!(life, in_state(state), "a refused {verb:?} changes nothing");
            }
        }
    }
}

/// Its memory is kept for it while it is on its way down and back, and not when it is to stay off.
#[test]
fn a_vm_that_comes_back_takes_memory_anew() {
    let mut life = running();
    assert!(!life.comes_back(), "it has it");
    life.ask(Verb::Reset).unwrap();
    assert!(life.comes_back());
    life.ask(FORCE).unwrap();
    assert!(!life.comes_back(), "its start was called off");
    life.ask(Verb::Start).unwrap();
    assert!(life.comes_back());
    let after = life.down(Restart::Never, Ending::Reset, 100_000);
    assert_eq!((after, life.comes_back()), (After::Make, true));
    life.made();
    life.ask(DESTROY_BY_FORCE).unwrap();
    assert!(!life.comes_back());
    assert!(!Life::off().comes_back());
}

#[test]
fn a_stopped_vm_stays_off_whatever_its_policy_and_however_it_ends() {
    for ending in [Ending::Done, Ending::Reset, Ending::Failed] {
        for verb in [STOP, FORCE] {
            let mut life = running();
            life.ask(verb).unwrap();
            life.at_rest();
            let after = life.down(Restart::Always, ending, 100_000);
            assert_eq!(after, After::Off(Off::Operator), "{verb:?} {ending:?}");
        }
    }
}

#[test]
fn what_was_asked_last_decides() {
    let mut life = running();
    life.ask(FORCE).unwrap();
    assert_eq!(step(&mut life, Verb::Start), Some(Step::Noted));
    assert_eq!(
        life.ask(Verb::Start).unwrap_err(),
        "starts again already when it has been taken down"
    );
    life.at_rest();
    assert_eq!(life.down(Restart::Never, Ending::Done, 0), After::Make);
    assert_eq!(life.state(), VmState::Starting);
    // The start is called off, wanted again, and called off by destroying the VM.
    assert_eq!(step(&mut life, STOP), Some(Step::Noted));
    assert_eq!(step(&mut life, STOP), None);
    assert_eq!(step(&mut life, Verb::Start), Some(Step::Noted));
    assert_eq!(step(&mut life, DESTROY_BY_FORCE), Some(Step::Noted));
    for verb in [Verb::Start, STOP, DESTROY, DESTROY_BY_FORCE] {
        assert_eq!(life.ask(verb), Err("is being destroyed"));
    }
    assert_eq!(life.made(), Made::Discard);
    assert_eq!(life.down(Restart::Always, Ending::Done, 0), After::Remove);
}

#[test]
fn a_guest_that_ignores_the_button_is_forced_off_once() {
    let mut life = running();
    life.ask(STOP).unwrap();
    assert_eq!(life.state(), VmState::Stopping);
    assert!(life.timed_out());
    assert!(!life.timed_out());
    life.at_rest();
    let after = life.down(Restart::OnFailure, Ending::Done, 0);
    assert_eq!(after, After::Off(Off::Operator));
}

/// A VM that its watchdog has paused while it shut down.
fn paused_while_it_shuts_down() -> Life {
    let mut life = running();
    life.ask(STOP).unwrap();
    assert!(life.paused_itself());
    life
}

#[test]
fn a_vm_that_is_paused_while_it_shuts_down_shows_it_and_goes_on_when_it_is_resumed() {
    let paused = paused_while_it_shuts_down();
    assert_eq!(paused.state(), VmState::Paused);
    assert!(paused.shuts_down());
    for verb in [Verb::Start, STOP, Verb::Pause, DESTROY] {
        let mut life = paused;
        assert!(life.ask(verb).is_err(), "{verb:?}");
        assert_eq!(life, paused, "a refused {verb:?} changes nothing");
    }

    let mut life = paused;
    assert!(!life.paused_itself(), "it is already");
    let resumed = life.ask(Verb::Resume).unwrap();
    assert_eq!(resumed, (Step::Resume, "goes on shutting down"));
    assert_eq!(life.state(), VmState::Stopping);
    life.at_rest();
    let after = life.down(Restart::Always, Ending::Done, 100_000);
    assert_eq!(after, After::Off(Off::Operator));

    let mut runs = running();
    runs.ask(Verb::Pause).unwrap();
    assert!(!runs.shuts_down());
    assert_eq!(runs.ask(Verb::Resume), Ok((Step::Resume, "runs on")));
    assert_eq!(runs.state(), VmState::Running);
}

#[test]
fn a_vm_that_is_paused_while_it_shuts_down_is_ended_by_its_time_or_by_force() {
    let mut late = paused_while_it_shuts_down();
    assert!(late.timed_out());
    assert!(!late.timed_out(), "once");
    late.at_rest();
    let after = late.down(Restart::Always, Ending::Done, 100_000);
    assert_eq!(after, After::Off(Off::Operator));

    let mut forced = paused_while_it_shuts_down();
    assert_eq!(step(&mut forced, FORCE), Some(Step::Force));
    assert!(!forced.timed_out(), "it has ended");

    let mut reset = paused_while_it_shuts_down();
    assert_eq!(step(&mut reset, Verb::Reset), Some(Step::Reset));
    reset.at_rest();
    assert_eq!(reset.down(Restart::Never, Ending::Reset, 0), After::Make);
    assert_eq!(reset.made(), Made::Run);
    assert!(!reset.shuts_down(), "nobody has stopped this one");

    let mut paused = running();
    paused.ask(Verb::Pause).unwrap();
    assert!(!paused.timed_out(), "nobody has stopped it");
}

#[test]
fn a_reset_by_the_operator_comes_at_once() {
    let mut life = running();
    for _ in 0..50 {
        life.ask(Verb::Reset).unwrap();
        life.at_rest();
        assert_eq!(life.down(Restart::Never, Ending::Reset, 0), After::Make);
        assert_eq!(life.made(), Made::Run);
    }
    assert_eq!(life.starts(), 51);
}

#[test]
fn an_operator_gives_a_vm_that_failed_too_often_a_new_chance() {
    let mut life = running();
    let after = loop {
        life.at_rest();
        match life.down(Restart::OnFailure, Ending::Failed, 20_000) {
            After::Make => assert_eq!(life.made(), Made::Run),
            other => break other,
        }
    };
    assert_eq!(after, After::Off(Off::GaveUp));
    life.ask(Verb::Start).unwrap();
    assert_eq!(life.made(), Made::Run);
    life.at_rest();
    let after = life.down(Restart::OnFailure, Ending::Failed, 20_000);
    assert_eq!(after, After::Make);
}

#[test]
fn a_start_that_fails_is_told_from_a_restart_that_fails() {
    let mut life = Life::off();
    life.ask(Verb::Start).unwrap();
    assert_eq!(life.not_made(), After::Off(Off::Operator));
    assert_eq!(life, Life::off());
    let mut life = running();
    life.at_rest();
    assert_eq!(life.down(Restart::Always, Ending::Done, 0), After::Make);
    assert_eq!(life.not_made(), After::Off(Off::Itself));
}

/// What whoever runs the VM has of it.
#[derive(Debug, Default, PartialEq)]
struct Machine {
    making: bool,
    exists: bool,
    paused: bool,
    /// Its power button was pressed, and it was not told to end since.
    pressed: bool,
    /// Its vCPUs are at rest.
    rests: bool,
    waiting: bool,
    removed: bool,
}

impl Machine {
    fn step(&mut self, step: Step) {
        match step {
            Step::Noted => {}
            Step::Make => {
                assert!(!self.exists && !self.making, "made twice");
                (self.making, self.waiting) = (true, false);
            }
            Step::Pause => {
                assert!(self.exists && !self.rests && !self.paused);
                self.paused = true;
            }
            Step::Resume => {
                assert!(self.exists && !self.rests && self.paused);
                self.paused = false;
            }
            Step::PressButton => {
                assert!(self.exists && !self.rests && !self.paused);
                self.pressed = true;
            }
            Step::Force | Step::Reset => {
                assert!(self.exists && !self.rests);
                self.pressed = false;
            }
            Step::Nmi => assert!(self.exists && !self.rests),
            Step::Remove => self.remove(),
        }
    }

    fn remove(&mut self) {
        assert!(!self.exists && !self.making, "removed while it exists");
        *self = Machine {
            removed: true,
            ..Machine::default()
        };
    }

    fn after(&mut self, after: After) {
        match after {
            After::Make => self.step(Step::Make),
            After::Wait { .. } => self.waiting = true,
            After::Off(_) => {}
            After::Remove => self.remove(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Happens {
    Asked(Verb),
    Made(bool),
    Rest,
    Down(Restart, Ending, u64),
    WaitOver,
    TimedOut,
    WatchdogPauses,
}

fn happens() -> impl Strategy<Value = Happens> {
    // Twice as often what all else needs.
    let verb = prop_oneof![
        1 => Just(Verb::Start),
        9 => prop::sample::select(&VERBS[..]),
    ];
    let policy = prop::sample::select(Vec::from([
        Restart::Never,
        Restart::OnFailure,
        Restart::Always,
    ]));
    let ending = prop::sample::select(Vec::from([Ending::Reset, Ending::Done, Ending::Failed]));
    prop_oneof![
        4 => verb.prop_map(Happens::Asked),
        2 => any::<bool>().prop_map(Happens::Made),
        2 => Just(Happens::Rest),
        2 => (policy, ending, 0..70_000u64).prop_map(|(p, e, ms)| Happens::Down(p, e, ms)),
        1 => Just(Happens::WaitOver),
        1 => Just(Happens::TimedOut),
        1 => Just(Happens::WatchdogPauses),
    ]
}

proptest! {
    /// Whatever comes in whatever order, nothing is made twice, nothing is asked of what is not there,
    /// nothing goes while it exists, a VM is forced off when its time to shut down is over and not otherwise, and the
    /// state says how things are.
    #[test]
    fn steps_suit_the_machine(events in prop::collection::vec(happens(), 0..200)) {
        let mut life = Life::off();
        let mut machine = Machine::default();
        for event in events {
            match event {
                Happens::Asked(verb) => {
                    let before = life;
                    match life.ask(verb) {
                        Ok((step, _)) => machine.step(step),
                        Err(_) => prop_assert_eq!(life, before),
                    }
                }
                Happens::Made(true) if machine.making => {
                    machine.making = false;
                    machine.exists = true;
                    if life.made() == Made::Discard {
                        machine.rests = true;
                    }
                }
                Happens::Made(false) if machine.making => {
                    machine.making = false;
                    let after = life.not_made();
                    machine.after(after);
                }
                Happens::Rest if machine.exists && !machine.rests => {
                    (machine.rests, machine.pressed) = (true, false);
                    life.at_rest();
                }
                Happens::Down(policy, ending, ms) if machine.rests => {
                    (machine.exists, machine.rests, machine.paused) = (false, false, false);
                    let after = life.down(policy, ending, ms);
                    machine.after(after);
                }
                Happens::WaitOver => {
                    let make = life.wait_over();
                    prop_assert_eq!(make, machine.waiting);
                    if make {
                        machine.step(Step::Make);
                    }
                }
                Happens::TimedOut => {
                    let force = life.timed_out();
                    prop_assert_eq!(force, machine.pressed);
                    if force {
                        machine.step(Step::Force);
                    }
                }
                Happens::WatchdogPauses if machine.exists && !machine.rests => {
                    let runs = !machine.paused && life.state() != VmState::Ending;
                    prop_assert_eq!(life.paused_itself(), runs);
                    if runs {
                        machine.step(Step::Pause);
                    }
                }
                _ => {}
            }
            if machine.removed {
                prop_assert!(life.is_going());
                (life, machine) = (Life::off(), Machine::default());
            }
            if life.state() == VmState::Off {
                machine.waiting = false;
            }
            let live = machine.exists && !machine.rests;
            prop_assert_eq!(life.shuts_down(), machine.pressed);
            match life.state() {
                VmState::Off => prop_assert!(!machine.exists && !machine.making),
                VmState::Waiting => prop_assert!(machine.waiting && !machine.exists && !machine.making),
                VmState::Starting => prop_assert!(machine.making && !machine.exists),
                VmState::Paused => prop_assert!(live && machine.paused),
                VmState::Running => prop_assert!(live && !machine.paused && !machine.pressed),
                VmState::Stopping => prop_assert!(live && !machine.paused && machine.pressed),
                VmState::Ending => prop_assert!(machine.exists),
            }
        }
    }
}
