//! The list of scenarios.
//!
//! Every scenario of the same kind runs the same code in each place; only time limits
//! differ. Each has its own configuration and its own disk image, made from files that all
//! share (the [`Rig`]).

use std::path::Path;

use anyhow::Result;

use super::{
    consoles, control, host, isolation, many,
    place::Place,
    policies, qemu_tests, refusals,
    report::Outcome,
    rig::{Rig, Start},
    running, sched, screen, selftests, shell, soak, test_kernels,
};
use crate::{
    apt::Unavailable,
    emulator::Emulator,
    exit::{Code, Stop},
    guests::{self, Guest},
};

/// A scenario on a machine.
type OnMachine = Box<dyn Fn(&Rig, &Start) -> Result<String> + Send + Sync>;

/// What a scenario does; its result is a remark for people.
enum Body {
    /// Starts a machine in that place, with this on it.
    Machine(Place, Boots, OnMachine),
    /// Uses the workstation alone. The path is its log's.
    Workstation(fn(&Rig, &Path) -> Result<String>),
    /// Looks at what the others have found, after all of them.
    Afterwards(fn(&Rig) -> Result<String>),
}

/// What the machine of a scenario boots.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Boots {
    /// Plinth.
    Plinth,
    /// The kernel that tries itself.
    Selftest,
    /// A guest, directly.
    Guest,
}

/// About how many seconds a scenario takes while another one runs on the same two processors: seen, not promised.
#[derive(Clone, Copy)]
struct Seconds {
    qemu: u32,
    bochs: u32,
}

impl Seconds {
    fn on(self, emulator: Emulator) -> u32 {
        match emulator {
            Emulator::Qemu => self.qemu,
            Emulator::Bochs => self.bochs,
        }
    }
}

/// The same on both, or on one only.
impl From<u32> for Seconds {
    fn from(seconds: u32) -> Self {
        Self::from((seconds, seconds))
    }
}

/// On QEMU, and on Bochs.
impl From<(u32, u32)> for Seconds {
    fn from((qemu, bochs): (u32, u32)) -> Self {
        Self { qemu, bochs }
    }
}

/// One scenario.
pub struct Scenario {
    /// `place/firmware/what`.
    pub name: String,
    /// About how many seconds it takes, to start the long ones first.
    pub cost_s: u32,
    /// Whether it is among the few of `--quick`.
    pub quick: bool,
    /// Whether it is left out unless `--all` asks for it: it takes minutes, or large downloads, to
    /// show little more than another.
    pub slow: bool,
    body: Body,
}

impl Scenario {
    /// A scenario called `what` in `place`, which takes about so long.
    fn new(
        place: Place,
        what: &str,
        takes: impl Into<Seconds>,
        body: impl Fn(&Rig, &Start) -> Result<String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: format!("{}/{what}", place.name()),
            cost_s: takes.into().on(place.emulator()),
            quick: false,
            slow: false,
            body: Body::Machine(
                place,
                match place {
                    Place::Bare => Boots::Guest,
                    _ => Boots::Plinth,
                },
                Box::new(body),
            ),
        }
    }

    /// Makes it one that boots the self-test.
    fn selftest(mut self) -> Self {
        if let Body::Machine(_, boots, _) = &mut self.body {
            *boots = Boots::Selftest;
        }
        self
    }

    /// Makes it one of `--quick`.
    fn quick(self) -> Self {
        Self {
            quick: true,
            ..self
        }
    }

    /// Where it starts its machine, if it does.
    pub fn place(&self) -> Option<Place> {
        match self.body {
            Body::Machine(place, ..) => Some(place),
            Body::Workstation(_) | Body::Afterwards(_) => None,
        }
    }

    /// Whether it has to wait for all others.
    pub fn is_afterwards(&self) -> bool {
        matches!(self.body, Body::Afterwards(_))
    }

    /// Whether it boots Plinth.
    pub fn boots_plinth(&self) -> bool {
        matches!(self.body, Body::Machine(_, Boots::Plinth, _))
    }

    /// Whether it boots the kernel that tries itself.
    pub fn boots_selftest(&self) -> bool {
        matches!(self.body, Body::Machine(_, Boots::Selftest, _))
    }

    /// Whether it can run with this emulator only.
    pub fn needs_only(&self, emulator: Emulator) -> bool {
        self.place()
            .is_some_and(|place| place.emulator() == emulator)
    }

    /// Runs it to its end, its time limit, or its first failure. The serial line's output
    /// goes to the file `log`.
    pub fn run(&self, rig: &Rig, log: &Path) -> Outcome {
        let result = match &self.body {
            Body::Machine(place, _, body) => {
                if let Some(why) = rig.obstacle(*place) {
                    return Outcome::Skipped(why);
                }
                let name = self.name.replace('/', "-");
                body(
                    rig,
                    &Start {
                        name,
                        place: *place,
                        log: log.to_owned(),
                    },
                )
            }
            Body::Workstation(body) => body(rig, log),
            Body::Afterwards(body) => body(rig),
        };
        match result {
            Ok(remark) => Outcome::Passed(remark),
            Err(error) => outcome(&error),
        }
    }
}

/// How a scenario ended that could not go on.
fn outcome(error: &anyhow::Error) -> Outcome {
    if let Some(CannotTell(why)) = error.downcast_ref() {
        return Outcome::Skipped((*why).to_owned());
    }
    let why = format!("{error:#}");
    // Not there to be fetched: that says nothing of Plinth.
    let missing = Stop::code_of(error) == Code::MissingProgram;
    if missing || error.downcast_ref::<Unavailable>().is_some() {
        return Outcome::Skipped(why);
    }
    Outcome::Failed(why)
}

/// A scenario found that what it looks at was not there.
#[derive(Debug)]
pub struct CannotTell(pub &'static str);

impl std::fmt::Display for CannotTell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for CannotTell {}

/// All scenarios that show what Plinth does.
pub fn all() -> Vec<Scenario> {
    let [newer, older, ..] = &guests::CATALOGUE;
    let mut all = Vec::new();
    for place in [Place::QEMU_BIOS, Place::QEMU_UEFI, Place::Bochs, Place::Kvm] {
        all.push(linux(place, newer, 1));
        all.push(Scenario::new(place, "stub", 10, running::stub).quick());
    }
    for place in [Place::QEMU_BIOS, Place::Bochs] {
        all.push(linux(place, older, 1));
        all.push(linux(place, newer, 4));
        all.push(Scenario::new(
            place,
            "linux-disks",
            (25, 65),
            running::linux_disks,
        ));
        all.push(Scenario::new(
            place,
            "stub-16-vcpus",
            (17, 5),
            running::many_vcpus,
        ));
        all.push(Scenario::new(place, "two-vms", (15, 40), running::two_vms));
        all.push(Scenario::new(
            place,
            "guest-triple-fault",
            (12, 40),
            running::triple_fault,
        ));
        all.push(Scenario::new(
            place,
            "guest-abuse",
            (60, 50),
            running::abuse,
        ));
        all.push(Scenario::new(place, "sched-shares", (30, 6), sched::shares));
        let body = policies::policies;
        all.push(Scenario::new(place, "sched-policies", (25, 90), body));
        let body = policies::places;
        all.push(Scenario::new(place, "sched-places", (25, 35), body));
        let body = isolation::nuisances;
        all.push(Scenario::new(place, "sched-nuisances", (35, 80), body));
        let body = test_kernels::test_kernels;
        all.push(Scenario::new(place, "test-kernels", (30, 18), body));
        all.push(Scenario::new(place, "console-flood", 8, consoles::flood));
        all.push(Scenario::new(place, "control", (100, 65), control::control));
        all.push(Scenario::new(place, "shell", (9, 6), shell::verbs));
        all.push(Scenario::new(place, "shell-bad-input", 8, shell::bad_input));
        let body = screen::keyboard_and_screen;
        all.push(Scenario::new(place, "shell-on-screen", (9, 5), body));
        all.push(Scenario::new(place, "soak", (30, 60), soak::short));
        all.push(slow(Scenario::new(
            place,
            "soak-long",
            (180, 1000),
            soak::long,
        )));
        let running = Scenario::new(place, "many-running", (150, 500), many::running);
        all.push(slow(running));
    }
    for place in [Place::QEMU_BIOS, Place::Bochs] {
        all.push(Scenario::new(place, "host-backend", 4, host::backend).selftest());
        all.push(Scenario::new(place, "host-interrupts", 5, host::interrupts).selftest());
        all.push(Scenario::new(place, "lifecycle", (200, 55), host::lifecycle).selftest());
    }
    all.push(Scenario::new(Place::Qemu10, "stub", 8, running::stub));
    for place in [Place::Qemu10, Place::Qemu10X2Apic] {
        all.push(slow(
            Scenario::new(place, "host-backend", 4, host::backend).selftest(),
        ));
        all.push(slow(
            Scenario::new(place, "host-interrupts", 5, host::interrupts).selftest(),
        ));
        all.push(slow(linux(place, newer, 1)));
    }
    all.extend(catalogued());
    // QEMU's serial port waits until it is read; Bochs' forgets, as a PC's does.
    all.push(Scenario::new(
        Place::Bochs,
        "console-input",
        6,
        consoles::input,
    ));
    all.push(Scenario::new(
        Place::Bochs,
        "stub-newer-processor",
        8,
        running::stub_newer_processor,
    ));
    let place = Place::QEMU_BIOS;
    let tests = Scenario::new(place, "linux-selftests", 70, selftests::selftests);
    all.push(slow(tests));
    for place in [Place::QEMU_BIOS, Place::Bochs] {
        let tests = Scenario::new(place, "qemu-tests", 40, qemu_tests::qemu_tests);
        all.push(slow(tests));
    }
    let body = running::linux_watchdog;
    all.push(Scenario::new(place, "linux-watchdog", 80, body));
    all.push(Scenario::new(place, "eight-linux", 60, sched::eight_linux));
    let on_bochs = Scenario::new(Place::Bochs, "eight-linux", 420, sched::eight_linux);
    all.push(on_bochs);
    all.push(Scenario::new(place, "restarts", 15, consoles::restarts));
    all.push(Scenario::new(place, "host-keys", 8, consoles::host_keys));
    all.push(Scenario::new(place, "host-absent-processor", 3, host::absent_processor).selftest());
    all.push(Scenario::new(place, "host-reset", 3, host::reset).selftest());
    for (what, reset) in [("halt", false), ("reset", true)] {
        let body = move |rig: &Rig, start: &Start| host::after_fault(rig, start, reset);
        let what = format!("host-fault/then-{what}");
        all.push(Scenario::new(place, &what, 3, body).selftest());
    }
    for fault in &host::FAULTS {
        let what = format!("host-fault/{}", fault.word);
        let body = move |rig: &Rig, start: &Start| host::fault(rig, start, fault);
        all.push(Scenario::new(place, &what, 3, body).selftest());
    }
    all.extend([
        Scenario::new(place, "guest-reboot", 25, running::reboot),
        Scenario::new(place, "no-amd-v", 3, refusals::no_amd_v).quick(),
        Scenario::new(place, "no-vt-x", 3, refusals::no_vt_x),
        Scenario::new(place, "bad-config", 8, refusals::bad_config).quick(),
        Scenario::new(place, "bad-kernel", 8, refusals::bad_kernel).quick(),
        Scenario::new(place, "unparsable-config", 3, refusals::unparsable),
        Scenario {
            name: "workstation/check-config".to_owned(),
            cost_s: 1,
            quick: true,
            slow: false,
            body: Body::Workstation(refusals::check_config),
        },
        Scenario {
            name: "workstation/run".to_owned(),
            cost_s: 20,
            quick: false,
            slow: false,
            body: Body::Workstation(running::by_default),
        },
        Scenario {
            name: "workstation/exit-codes".to_owned(),
            cost_s: 8,
            quick: false,
            slow: false,
            body: Body::Workstation(refusals::exit_codes),
        },
        Scenario {
            name: "both-backends/same-facts".to_owned(),
            cost_s: 0,
            quick: false,
            slow: false,
            body: Body::Afterwards(running::same_facts),
        },
    ]);
    all
}

/// Leaves a scenario to `--all`.
fn slow(scenario: Scenario) -> Scenario {
    Scenario {
        slow: true,
        ..scenario
    }
}

/// Linux boots, converses, and powers off.
fn linux(place: Place, guest: &'static Guest, vcpus: u32) -> Scenario {
    let name = guest.name.trim_end_matches("-cloud");
    let what = match vcpus {
        1 => name.to_owned(),
        more => format!("{name}-{more}-vcpus"),
    };
    Scenario::new(place, &what, (25, 60), move |rig, start| {
        running::linux(rig, start, guest, vcpus)
    })
}

/// Guests of the catalogue, each where it shows most for the time that it takes.
fn catalogued() -> Vec<Scenario> {
    let wanted = [
        (Place::QEMU_BIOS, "linux-6.1-cloud-pvh", 4, false),
        (Place::Bochs, "linux-6.12-cloud-pvh", 1, false),
        (Place::QEMU_BIOS, "linux-6.1", 2, false),
        (Place::QEMU_BIOS, "linux-6.1-686", 2, false),
        (Place::QEMU_BIOS, "linux-6.1-rt", 4, true),
        (Place::QEMU_BIOS, "gnumach", 1, false),
        (Place::Bochs, "gnumach", 1, false),
        (Place::Bochs, "linux-6.1-686", 1, true),
        (Place::QEMU_BIOS, "linux-6.1-cloud-efi", 1, true),
        (Place::Bochs, "linux-6.1", 1, true),
        (Place::Bochs, "linux-newest-cloud", 2, true),
        (Place::QEMU_UEFI, "debian-installer", 1, false),
        (Place::QEMU_BIOS, "memtest86+-quick", 2, false),
        (Place::Bochs, "memtest86+-quick", 2, false),
        (Place::QEMU_BIOS, "grub-linux-bios", 1, false),
        (Place::QEMU_BIOS, "grub-linux-uefi", 1, false),
        (Place::QEMU_BIOS, "ovmf", 1, true),
        (Place::QEMU_BIOS, "ipxe", 1, false),
        (Place::QEMU_BIOS, "u-boot", 1, false),
        (Place::Bochs, "grub-rescue", 1, false),
        (Place::QEMU_BIOS, "memtest86+", 2, true),
        (Place::Qemu10X2Apic, "linux-6.12-cloud", 2, false),
        (Place::Qemu10X2Apic, "linux-newest-cloud", 2, true),
        (Place::Qemu10, "linux-newest-cloud", 2, true),
        (Place::Qemu10, "linux-6.12-cloud", 4, true),
    ];
    let named = wanted.into_iter().map(|(place, name, vcpus, slow)| {
        let guest = guests::by_name(name).expect("the catalogue has this guest");
        let what = format!("guest-{name}");
        // Beside another one.
        let takes = Seconds {
            qemu: 2 * guest.seconds.qemu_s,
            bochs: 2 * guest.seconds.bochs_s.unwrap_or_default(),
        };
        let mut scenario = Scenario::new(place, &what, takes, move |rig, start| {
            running::catalogued(rig, start, guest, vcpus)
        });
        scenario.slow = slow;
        scenario
    });
    named.collect()
}

/// The guests' conversations on the bare emulator.
pub fn reference() -> Vec<Scenario> {
    let mut all: Vec<_> = guests::CATALOGUE
        .iter()
        .take(2)
        .map(|guest| linux(Place::Bare, guest, 1))
        .collect();
    all.push(Scenario::new(Place::Bare, "stub", 5, running::stub));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_fetched_is_skipped_and_all_else_fails() {
        use crate::apt::Unavailable;
        let missing = anyhow::Error::new(Unavailable::default()).context("cannot fetch it");
        assert!(matches!(outcome(&missing), Outcome::Skipped(_)));
        let wrong = anyhow::anyhow!("x is not what it was").context("cannot fetch it");
        assert!(matches!(outcome(&wrong), Outcome::Failed(_)));
    }

    #[test]
    fn names_are_unique_and_places_have_theirs() {
        let mut names: Vec<_> = all()
            .into_iter()
            .chain(reference())
            .map(|s| s.name)
            .collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        for name in [
            "qemu-amdv/bios/linux-6.1",
            "bochs-vtx/bios/linux-5.10",
            "kvm/uefi/stub",
        ] {
            assert!(names.iter().any(|known| known == name), "{name}");
        }
    }
}
