//! The scenarios: which VMs boot where, and what is said to them.
//!
//! Every scenario of the same kind runs the same code in each place; only time limits
//! differ. Each has its own configuration and its own disk image, made from files that all
//! share (the [`Rig`]).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;

use super::{
    linux::{self, Given, Limits, Shell},
    report::Outcome,
    session::Session,
    terminal::{Terminal, plain},
};
use crate::{
    deps::{self, Program},
    emulator::{Acceleration, Emulator, Firmware, Machine, kvm},
    guests::{self, Guest},
    image::{self, Configuration},
    initramfs, paths, stub,
    toolchain::Profile,
};

/// Where a scenario runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// QEMU's emulation of AMD-V.
    Qemu(Firmware),
    /// Bochs' emulation of VT-x.
    Bochs,
    /// The workstation's own virtualization, nested.
    Kvm,
}

impl Place {
    const QEMU_BIOS: Self = Self::Qemu(Firmware::Bios);
    const QEMU_UEFI: Self = Self::Qemu(Firmware::Uefi);

    /// The beginning of the names of its scenarios.
    fn name(self) -> &'static str {
        match self {
            Self::Qemu(Firmware::Bios) => "qemu-amdv/bios",
            Self::Qemu(Firmware::Uefi) => "qemu-amdv/uefi",
            Self::Bochs => "bochs-vtx/bios",
            Self::Kvm => "kvm/uefi",
        }
    }

    fn emulator(self) -> Emulator {
        match self {
            Self::Bochs => Emulator::Bochs,
            Self::Qemu(_) | Self::Kvm => Emulator::Qemu,
        }
    }

    /// The programs that it needs.
    fn programs(self) -> &'static [Program] {
        match self {
            Self::Qemu(Firmware::Bios) => &[Program::Qemu],
            Self::Qemu(Firmware::Uefi) | Self::Kvm => &[Program::Qemu, Program::Ovmf],
            Self::Bochs => &[Program::Bochs],
        }
    }

    /// The machine that boots `image` there.
    fn machine(self, image: &Path) -> Machine {
        let mut machine = Machine::new(self.emulator(), image);
        match self {
            Self::Qemu(firmware) => {
                machine.firmware = firmware;
                // Independent of how busy the workstation is.
                machine.count_instructions = true;
            }
            // A second processor costs Bochs as much as the first.
            Self::Bochs => machine.cpus = 1,
            Self::Kvm => machine.acceleration = Acceleration::Kvm,
        }
        machine
    }

    /// Generous: the workstation may have slow processors, and something else to do.
    fn limits(self) -> Limits {
        let (boot, command) = match self {
            Self::Qemu(_) => (240, 90),
            Self::Bochs => (480, 180),
            Self::Kvm => (120, 60),
        };
        Limits {
            boot: Duration::from_secs(boot),
            command: Duration::from_secs(command),
        }
    }

    /// How many times as long as on QEMU something takes, about.
    fn slowness(self) -> u32 {
        match self {
            Self::Qemu(_) => 1,
            Self::Bochs => 4,
            Self::Kvm => 0,
        }
    }
}

/// What a scenario does; its result is a remark for people.
type Body = Box<dyn Fn(&Rig, &Start) -> Result<String> + Send + Sync>;

/// One scenario.
pub struct Scenario {
    /// `place/firmware/what`.
    pub name: String,
    /// The emulator that it needs; none if it runs on the workstation itself.
    pub emulator: Option<Emulator>,
    /// About how many seconds it takes, to start the long ones first.
    pub cost_s: u32,
    /// Whether it is among the few of `--quick`.
    pub quick: bool,
    /// It looks at what others found, and runs after all of them.
    pub last: bool,
    place: Option<Place>,
    body: Body,
}

impl Scenario {
    /// A scenario called `what` in `place`, about `cost_s` seconds long on QEMU.
    fn new(
        place: Place,
        what: &str,
        cost_s: u32,
        body: impl Fn(&Rig, &Start) -> Result<String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: format!("{}/{what}", place.name()),
            emulator: Some(place.emulator()),
            cost_s: cost_s * place.slowness(),
            quick: false,
            last: false,
            place: Some(place),
            body: Box::new(body),
        }
    }

    /// Makes it one of `--quick`.
    fn quick(mut self) -> Self {
        self.quick = true;
        self
    }

    /// Runs it to its end, its time limit, or its first failure. The serial line's output
    /// goes to the file `log`.
    pub fn run(&self, rig: &Rig, log: &Path) -> Outcome {
        if let Some(place) = self.place
            && let Some(why) = rig.obstacle(place)
        {
            return Outcome::Skipped(why);
        }
        let start = Start {
            name: self.name.replace('/', "-"),
            log: log.to_owned(),
        };
        match (self.body)(rig, &start) {
            Ok(remark) => Outcome::Passed(remark),
            Err(error) => match error.downcast::<CannotTell>() {
                Ok(CannotTell(why)) => Outcome::Skipped(why.to_owned()),
                Err(error) => Outcome::Failed(format!("{error:#}")),
            },
        }
    }
}

/// A scenario found that what it looks at was not there.
#[derive(Debug)]
struct CannotTell(&'static str);

impl std::fmt::Display for CannotTell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for CannotTell {}

/// What one run of a scenario uses.
pub struct Start {
    /// For the names of files.
    name: String,
    log: PathBuf,
}

/// What all scenarios share.
pub struct Rig {
    /// Makes the images; none if no scenario boots Plinth.
    builder: Option<image::Builder>,
    /// The folder of kernels and initrds that configurations name.
    files: PathBuf,
    /// Files that could not be made, and why.
    missing: Vec<(String, String)>,
    /// The folder of images and configurations.
    scratch: PathBuf,
    /// Places that cannot be used here, and why.
    obstacles: Vec<(Place, String)>,
    /// What the stub found, by place.
    stub_reports: Mutex<Vec<(Place, Vec<String>)>>,
}

/// A disk for machines that boot without one, in [`Rig::files`].
const EMPTY_DISK: &str = "empty.img";

impl Rig {
    /// Installs, fetches and makes what the scenarios need.
    ///
    /// # Errors
    /// The hypervisor does not compile, or a guest cannot be had.
    pub fn prepare(scenarios: &[Scenario]) -> Result<Self> {
        let mut places: Vec<Place> = Vec::new();
        for place in scenarios.iter().filter_map(|scenario| scenario.place) {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        let mut obstacles = Vec::new();
        for place in places {
            if let Err(error) = deps::require(place.programs()) {
                obstacles.push((place, format!("{error:#}")));
            } else if place == Place::Kvm
                && let Err(why) = kvm::trial()
            {
                obstacles.push((place, why));
            }
        }
        let boots_plinth = scenarios
            .iter()
            .any(|scenario| !scenario.name.starts_with(REFERENCE));
        let builder = boots_plinth
            .then(|| image::Builder::new(Profile::Release))
            .transpose()?;
        let scratch = paths::target().join("test-scenarios");
        let files = scratch.join("files");
        let missing = make_files(&files)?;
        Ok(Self {
            builder,
            files,
            missing,
            scratch,
            obstacles,
            stub_reports: Mutex::default(),
        })
    }

    /// Why a place cannot be used.
    fn obstacle(&self, place: Place) -> Option<String> {
        self.obstacles
            .iter()
            .find(|(known, _)| *known == place)
            .map(|(_, why)| why.clone())
    }

    /// The file that configurations call `name`.
    fn file(&self, name: &str) -> Result<PathBuf> {
        match self.missing.iter().find(|(missing, _)| missing == name) {
            Some((_, why)) => bail!("{name} is missing: {why}"),
            None => Ok(self.files.join(name)),
        }
    }

    /// Boots Plinth with this configuration, whatever is wrong with it.
    fn boot(&self, place: Place, start: &Start, vms: &str) -> Result<Session> {
        self.boot_on(place, start, vms, |_| {})
    }

    /// As `boot`, on a machine that `change` has changed.
    fn boot_on(
        &self,
        place: Place,
        start: &Start,
        vms: &str,
        change: impl FnOnce(&mut Machine),
    ) -> Result<Session> {
        let builder = self.builder.as_ref().context("this run boots no Plinth")?;
        for (name, _) in &self.missing {
            if vms.contains(&format!("\"{name}\"")) {
                self.file(name)?;
            }
        }
        let path = self.scratch.join(&start.name).with_extension("img");
        let configuration = Configuration::new("plinth.toml", vms, self.files.clone());
        builder.write_unchecked(&configuration, &path)?;
        let mut machine = place.machine(&path);
        change(&mut machine);
        // The machine has the image open; its name is not needed any more.
        let session = Session::start(&machine, &start.log, 2 * place.limits().boot)?;
        Ok(session)
    }
}

/// Makes the files that configurations name, and tells of those that could not be made.
fn make_files(folder: &Path) -> Result<Vec<(String, String)>> {
    let cache = paths::cache();
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut missing = Vec::new();
    let mut provide = |name: &str, file: Result<PathBuf>| {
        let copied = file.and_then(|from| {
            let bytes =
                fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            guests::write_whole(&folder.join(name), &bytes)
        });
        if let Err(error) = copied {
            missing.push((name.to_owned(), format!("{error:#}")));
        }
    };
    for guest in &guests::CATALOGUE {
        provide(
            guest.name,
            guests::ensure_kernel(&cache, guest).map(|kernel| kernel.path),
        );
    }
    provide("initramfs", initramfs::ensure(&cache));
    provide("stub", stub::ensure());
    guests::write_whole(&folder.join(EMPTY_DISK), &[0; 1 << 20])?;
    guests::write_whole(&folder.join("letter"), b"Dear kernel, ...\n")?;
    // The beginning of a real kernel.
    if let Ok(whole) = fs::read(folder.join(guests::CATALOGUE[0].name)) {
        let beginning = whole
            .get(..64 << 10)
            .context("a kernel is larger than 64 KiB")?;
        guests::write_whole(&folder.join("cut-short"), beginning)?;
    }
    Ok(missing)
}

/// The guests' memory in MiB, as in the default configuration.
const MEMORY_MIB: u32 = 256;

/// A Linux guest called `linux`.
fn linux_vm(guest: &Guest) -> String {
    format!(
        "[[vm]]\nname = \"linux\"\nmemory = \"{MEMORY_MIB}M\"\nfocus = true\n\
         boot = {{ kernel = \"{}\", initrd = \"initramfs\", cmdline = \"console=ttyS0\" }}\n",
        guest.name
    )
}

/// A guest stub with this command line.
fn stub_vm(name: &str, command_line: &str) -> String {
    format!(
        "[[vm]]\nname = \"{name}\"\nmemory = \"32M\"\n\
         boot = {{ kernel = \"stub\", cmdline = \"{command_line}\" }}\n"
    )
}

/// All scenarios.
pub fn all() -> Vec<Scenario> {
    let [newer, older] = &guests::CATALOGUE;
    let everywhere = [Place::QEMU_BIOS, Place::QEMU_UEFI, Place::Bochs, Place::Kvm];
    let emulated = [Place::QEMU_BIOS, Place::Bochs];
    let mut all = Vec::new();
    for place in everywhere {
        all.push(linux(place, newer));
        all.push(check_stub(place));
    }
    for place in emulated {
        all.push(linux(place, older));
        all.push(Scenario::new(place, "two-vms", 25, move |rig, start| {
            two_vms(rig, start, place)
        }));
        all.push(Scenario::new(
            place,
            "guest-triple-fault",
            20,
            move |rig, start| triple_fault(rig, start, place),
        ));
    }
    let place = Place::QEMU_BIOS;
    all.push(Scenario::new(
        place,
        "guest-reboot",
        25,
        move |rig, start| reboot(rig, start, place),
    ));
    all.push(
        Scenario::new(place, "no-virtualization", 3, move |rig, start| {
            no_virtualization(rig, start, place)
        })
        .quick(),
    );
    all.push(
        Scenario::new(place, "bad-config", 8, move |rig, start| {
            bad_config(rig, start, place)
        })
        .quick(),
    );
    all.push(
        Scenario::new(place, "bad-kernel", 8, move |rig, start| {
            bad_kernel(rig, start, place)
        })
        .quick(),
    );
    all.push(Scenario::new(
        place,
        "unparsable-config",
        3,
        move |rig, start| unparsable(rig, start, place),
    ));
    all.push(Scenario {
        name: "workstation/check-config".to_owned(),
        emulator: None,
        cost_s: 1,
        quick: true,
        last: false,
        place: None,
        body: Box::new(check_config),
    });
    all.push(Scenario {
        name: "both-backends/same-facts".to_owned(),
        emulator: None,
        cost_s: 0,
        quick: false,
        last: true,
        place: None,
        body: Box::new(|rig, _| same_facts(rig)),
    });
    all
}

/// What the names of the scenarios on bare emulators begin with.
const REFERENCE: &str = "reference/";

/// The guests' conversations on the bare emulator.
pub fn reference() -> Vec<Scenario> {
    let place = Place::QEMU_BIOS;
    let scenario = |name: &str, body: Body| Scenario {
        name: format!("{REFERENCE}qemu/{name}"),
        emulator: Some(Emulator::Qemu),
        cost_s: 15,
        quick: true,
        last: false,
        place: Some(place),
        body,
    };
    let linux = guests::CATALOGUE.iter().map(|guest| {
        let boot = move |rig: &Rig, start: &Start| {
            let initrd = rig.file("initramfs")?;
            let command_line = ["-append", "console=ttyS0", "-initrd"].map(String::from);
            let mut session = bare(rig, start, guest.name, MEMORY_MIB, |machine| {
                machine.extra.extend(command_line);
                machine.extra.push(initrd.display().to_string());
            })?;
            linux_to_power_off(&mut session, guest, place.limits())
        };
        scenario(guest.name, Box::new(boot))
    });
    let stub = scenario(
        "stub",
        Box::new(move |rig, start| {
            let mut session = bare(rig, start, "stub", 32, |machine| {
                machine
                    .extra
                    .extend(["-append", "end=poweroff"].map(String::from));
            })?;
            let report = stub_to_power_off(&mut session, place.limits())?;
            Ok(report.remark)
        }),
    );
    linux.chain([stub]).collect()
}

/// Starts QEMU with a kernel of its own, without Plinth.
fn bare(
    rig: &Rig,
    start: &Start,
    kernel: &str,
    memory_mib: u32,
    change: impl FnOnce(&mut Machine),
) -> Result<Session> {
    let mut machine = Place::QEMU_BIOS.machine(&rig.file(EMPTY_DISK)?);
    machine.cpus = 1;
    machine.memory_mib = memory_mib;
    machine.extra.extend([
        "-kernel".to_owned(),
        rig.file(kernel)?.display().to_string(),
    ]);
    change(&mut machine);
    Session::start(&machine, &start.log, 2 * Place::QEMU_BIOS.limits().boot)
}

/// Linux boots, converses, and powers off.
fn linux(place: Place, guest: &'static Guest) -> Scenario {
    let what = guest.name.trim_end_matches("-cloud");
    Scenario::new(place, what, 25, move |rig, start| {
        let mut session = rig.boot(place, start, &linux_vm(guest))?;
        linux_to_power_off(&mut session, guest, place.limits())
    })
}

/// Boots, converses, powers off; the remark says when the shell was there.
fn linux_to_power_off(session: &mut Session, guest: &Guest, limits: Limits) -> Result<String> {
    let given = Given {
        release: guest.release,
        memory_mib: MEMORY_MIB,
        cpus: 1,
    };
    let started = session.started();
    let (mut shell, release) = Shell::wait_for(session, limits)?;
    let booted = started.elapsed().as_secs_f64();
    linux::converse(&mut shell, &release, &given)?;
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(format!("shell after {booted:.1} s"))
}

/// The stub's checks, each `ok` or skipped.
fn check_stub(place: Place) -> Scenario {
    let scenario = Scenario::new(place, "stub", 8, move |rig, start| {
        let mut session = rig.boot(place, start, &stub_vm("stub", "end=poweroff"))?;
        let report = stub_to_power_off(&mut session, place.limits())?;
        let mut reports = rig
            .stub_reports
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        reports.push((place, report.facts));
        Ok(report.remark)
    });
    scenario.quick()
}

/// What the stub said.
struct StubReport {
    /// Lines about what it saw.
    facts: Vec<String>,
    remark: String,
}

/// Waits for the stub's sum; all of its checks must be right.
fn stub_to_power_off(session: &mut Session, limits: Limits) -> Result<StubReport> {
    let report = stub_report(session, limits)?;
    session.wait_for_power_off(limits.command)?;
    Ok(report)
}

/// Reads the stub's output from its greeting to its sum.
fn stub_report(terminal: &mut dyn Terminal, limits: Limits) -> Result<StubReport> {
    let sum = Regex::new(r"stub: (\d+) passed, (\d+) failed, (\d+) skipped\r?\n")?;
    let text = terminal.expect(&Regex::new(STUB_GREETING)?, limits.boot);
    text.context("waiting for the stub's greeting")?;
    let text = terminal
        .expect(&sum, limits.boot)
        .context("waiting for the stub's checks")?;
    let text = plain(&text);
    let lines = |with: &str| {
        text.lines()
            .filter(|line| line.contains(with))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let failed = lines(": FAILED");
    let found = sum
        .captures(&text)
        .context("what was waited for is in the text")?;
    ensure!(
        failed.is_empty() && &found[2] == "0",
        "{}",
        failed.join("\n")
    );
    ensure!(&found[1] != "0", "no check ran");
    let remark = match &found[3] {
        "0" => format!("{} checks", &found[1]),
        skipped => format!("{} checks, {skipped} not possible here", &found[1]),
    };
    let facts = text
        .lines()
        .filter(|line| line.starts_with("fact "))
        .map(str::to_owned);
    Ok(StubReport {
        facts: facts.collect(),
        remark,
    })
}

/// The stub's first line.
const STUB_GREETING: &str = "plinth guest-stub: hello";

/// Both backends show a guest the same machine.
fn same_facts(rig: &Rig) -> Result<String> {
    let reports = rig
        .stub_reports
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let of = |place| {
        reports
            .iter()
            .find(|(known, _)| *known == place)
            .map(|(_, facts)| facts)
    };
    let (Some(amd), Some(intel)) = (of(Place::QEMU_BIOS), of(Place::Bochs)) else {
        return Err(CannotTell("the stub's scenarios did not run on both").into());
    };
    ensure!(!amd.is_empty(), "the stub stated no facts");
    let only = |these: &[String], those: &[String]| {
        let only = these.iter().filter(|fact| !those.contains(fact));
        only.cloned().collect::<Vec<_>>().join("\n")
    };
    let (only_amd, only_intel) = (only(amd, intel), only(intel, amd));
    ensure!(
        only_amd.is_empty() && only_intel.is_empty(),
        "only on {}:\n{only_amd}\nonly on {}:\n{only_intel}",
        Place::QEMU_BIOS.name(),
        Place::Bochs.name()
    );
    Ok(format!("{} facts", amd.len()))
}

/// The default configuration as it is: Linux on the terminal, the stub beside it, and the
/// escape key between them.
fn two_vms(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let limits = place.limits();
    let mut vms = fs::read_to_string(paths::workspace().join("plinth.toml"))?;
    // The same files, under the names that they have here.
    for (name, file) in [
        ("@linux\"", "linux-6.1-cloud\""),
        ("@initramfs\"", "initramfs\""),
        ("@stub\"", "stub\""),
    ] {
        ensure!(vms.contains(name), "plinth.toml does not name {name}");
        vms = vms.replace(name, file);
    }
    let mut session = rig.boot(place, start, &vms)?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    let terminal = shell.terminal();
    terminal.send("\x1d2")?;
    terminal.expect(&Regex::new("console 2: stub")?, limits.command)?;
    let report = stub_report(terminal, limits)?;
    terminal.send("\x1dl")?;
    terminal.expect(&Regex::new(r"1\s+linux[\s\S]*2\s+stub")?, limits.command)?;
    terminal.send("\x1d1")?;
    terminal.expect(&Regex::new("console 1: linux")?, limits.command)?;
    shell.still_there()?;
    ensure!(shell.ask("nproc")? == "1", "the shell has changed");
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(report.remark)
}

/// A guest that restarts itself comes up again, as from power-on.
fn reboot(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let limits = place.limits();
    let mut session = rig.boot(place, start, &linux_vm(&guests::CATALOGUE[0]))?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    shell.ask("echo left >/tmp/from-before")?;
    shell.say("reboot")?;
    let (mut shell, release) =
        Shell::wait_for(&mut session, limits).context("after the guest's reboot")?;
    ensure!(
        release.starts_with(guests::CATALOGUE[0].release),
        "another kernel: {release}"
    );
    ensure!(
        shell.run("cat /tmp/from-before")?.status != 0,
        "a file outlived the reboot"
    );
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// A guest that destroys itself ends, with its registers shown; the other does not notice.
fn triple_fault(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let limits = place.limits();
    let vms = linux_vm(&guests::CATALOGUE[0])
        + &stub_vm("suicide", "checks=none facts=off end=triple-fault");
    let mut session = rig.boot(place, start, &vms)?;
    let (mut shell, _) = Shell::wait_for(&mut session, limits)?;
    ensure!(shell.ask("nproc")? == "1", "the other guest has changed");
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    for (what, pattern) in [
        (
            "the VM's end with its reason",
            r"suicide.*(?i:triple fault)",
        ),
        ("its registers", r"(?i:\brip\b)"),
    ] {
        ensure!(
            Regex::new(pattern)?.is_match(&text),
            "Plinth did not show {what}"
        );
    }
    Ok(String::new())
}

/// Plinth says what is missing, and neither crashes nor starts a guest.
fn no_virtualization(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let limits = place.limits();
    let vms = stub_vm("stub", "end=poweroff");
    let mut session = rig.boot_on(place, start, &vms, |machine| {
        machine.cpu_model = Some("qemu64,-svm".to_owned());
    })?;
    let verdict = Regex::new(r"(?i)(missing|absent|no VT-x|neither)[^\n]*\n")?;
    session
        .expect(&verdict, limits.boot)
        .context("waiting for the pre-flight check")?;
    session.wait_for_power_off(limits.command)?;
    let text = session.text();
    let crash = Regex::new(r"(?i)panic|page fault|general protection|double fault")?;
    if let Some(found) = crash.find(&text) {
        bail!("Plinth crashed: {}", found.as_str());
    }
    ensure!(
        !text.contains(STUB_GREETING),
        "a guest ran without virtualization"
    );
    Ok(String::new())
}

/// A configuration with one mistake per VM, and one VM without; and what has to be said of
/// the mistakes, apart from the place: file, line and column are looked for as well.
const MISTAKES: [(&str, &str); 4] = [
    (
        "name = \"typo\"\nmemory = \"32M\"\nvcpu = 1\nboot = { kernel = \"stub\" }",
        "vcpu: unknown key",
    ),
    (
        "name = \"many\"\nmemory = \"32M\"\nvcpus = 1000\nboot = { kernel = \"stub\" }",
        "vm.vcpus: 1000",
    ),
    (
        "name = \"lost\"\nmemory = \"32M\"\nboot = { kernel = \"nowhere\" }",
        "vm.boot.kernel: nowhere",
    ),
    (
        "name = \"small\"\nmemory = \"1M\"\nboot = { kernel = \"stub\" }",
        "vm.memory: \"1M\"",
    ),
];

/// A VM with more memory than any machine of the tests, which only the machine can know.
const GREEDY: (&str, &str) = (
    "name = \"greedy\"\nmemory = \"512G\"\nboot = { kernel = \"stub\" }",
    "vm.memory: 512 GiB",
);

fn vms_with_mistakes<'m>(mistakes: impl Iterator<Item = &'m (&'m str, &'m str)>) -> String {
    mistakes.map(|(vm, _)| format!("[[vm]]\n{vm}\n")).collect()
}

/// Each mistake is reported with the VM, key and place; none is forgotten.
fn reported(text: &str, mistakes: &[&(&str, &str)]) -> Result<()> {
    for (vm, complaint) in mistakes {
        let name = vm.split('"').nth(1).context("each VM has a name")?;
        let pattern = format!(
            r"plinth\.toml:\d+:\d+: error: VM {name}: .*{}",
            regex::escape(complaint)
        );
        ensure!(
            Regex::new(&pattern)?.is_match(text),
            "nothing said like /{pattern}/"
        );
    }
    Ok(())
}

/// Every mistake disables its VM only.
fn bad_config(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let mistakes: Vec<_> = MISTAKES.iter().chain([&GREEDY]).collect();
    let vms =
        vms_with_mistakes(mistakes.iter().copied()) + &stub_vm("stub", "checks=cpuid end=poweroff");
    let mut session = rig.boot(place, start, &vms)?;
    stub_to_power_off(&mut session, place.limits())?;
    reported(&session.text(), &mistakes)?;
    Ok(format!("{} mistakes", mistakes.len()))
}

/// A kernel that is none is refused by name, and so is one cut short.
fn bad_kernel(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let vms = "[[vm]]\nname = \"letter\"\nmemory = \"32M\"\nboot = { kernel = \"letter\" }\n\
               [[vm]]\nname = \"cut\"\nmemory = \"32M\"\nboot = { kernel = \"cut-short\" }\n";
    let vms = vms.to_owned() + &stub_vm("stub", "checks=cpuid end=poweroff");
    let mut session = rig.boot(place, start, &vms)?;
    stub_to_power_off(&mut session, place.limits())?;
    let text = session.text();
    for pattern in [
        r"VM letter: .*letter: is not a bzImage or ELF",
        r"cut.*cut-short.*(short|truncated)",
    ] {
        ensure!(
            Regex::new(pattern)?.is_match(&text),
            "nothing said like /{pattern}/"
        );
    }
    Ok(String::new())
}

/// A file that is no TOML: the place of the error, and the machine goes off again.
fn unparsable(rig: &Rig, start: &Start, place: Place) -> Result<String> {
    let limits = place.limits();
    let mut session = rig.boot(place, start, "[[vm]]\nname = \"linux\nmemory = 1\n")?;
    let complaint = Regex::new(r"plinth\.toml:2:\d+: error: ")?;
    session.expect(&complaint, limits.boot)?;
    session.wait_for_power_off(limits.command)?;
    Ok(String::new())
}

/// `cargo xtask check-config` says the same on the workstation, and exits with 2.
fn check_config(rig: &Rig, start: &Start) -> Result<String> {
    let file = rig.files.join("plinth.toml");
    let vms = vms_with_mistakes(MISTAKES.iter()) + &stub_vm("stub", "");
    guests::write_whole(&file, vms.as_bytes())?;
    let xtask = std::env::current_exe()?;
    let output = Command::new(xtask)
        .arg("check-config")
        .arg(&file)
        .output()?;
    fs::write(
        &start.log,
        [output.stdout.as_slice(), &output.stderr].concat(),
    )?;
    ensure!(
        output.status.code() == Some(2),
        "it ended with {}",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    reported(&text, &MISTAKES.iter().collect::<Vec<_>>())?;
    ensure!(
        text.contains("1 VM can start"),
        "the VM without a mistake is lost:\n{text}"
    );
    Ok(format!("{} mistakes", MISTAKES.len()))
}

#[cfg(test)]
mod tests {
    use super::super::terminal::fake::Script;
    use super::*;

    const LIMITS: Limits = Limits {
        boot: Duration::from_secs(1),
        command: Duration::from_secs(1),
    };

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

    #[test]
    fn configurations_without_mistakes_are_right() {
        let text = linux_vm(&guests::CATALOGUE[0]) + &stub_vm("stub", "end=poweroff");
        let config = manage::config::parse("plinth.toml", text.as_bytes());
        assert_eq!(config.report(), "plinth.toml: 2 VMs can start\n");
    }

    #[test]
    fn the_default_configuration_is_right() {
        let text = include_bytes!("../../../plinth.toml");
        let config = manage::config::parse("plinth.toml", text);
        assert_eq!(config.report(), "plinth.toml: 2 VMs can start\n");
        assert!(config.vms[0].focus && config.vms[0].name == "linux");
    }

    #[test]
    fn a_failed_check_of_the_stub_is_named() {
        let said = format!(
            "{STUB_GREETING}\r\nfact cpu: x\r\ncheck msr.pat: FAILED: 0, not 6\r\n\
             stub: 4 passed, 1 failed, 0 skipped\r\n"
        );
        let error = stub_report(&mut Script::new(&said, Vec::new()), LIMITS)
            .err()
            .unwrap();
        assert!(error.to_string().contains("msr.pat"), "{error}");
    }

    #[test]
    fn the_stubs_facts_and_skips_are_kept() {
        let said = format!(
            "{STUB_GREETING}\r\nfact cpu: x\r\ncheck fpu.avx: skipped: none\r\n\
             stub: 4 passed, 0 failed, 1 skipped\r\n"
        );
        let report = stub_report(&mut Script::new(&said, Vec::new()), LIMITS).unwrap();
        assert_eq!(report.facts, ["fact cpu: x"]);
        assert_eq!(report.remark, "4 checks, 1 not possible here");
    }

    #[test]
    fn a_mistake_that_nobody_mentions_is_missed() {
        let said = "plinth.toml:4:1: error: VM typo: vm.vcpu: unknown key; did you mean vcpus?\n";
        assert!(reported(said, &[&MISTAKES[0]]).is_ok());
        assert!(reported(said, &[&MISTAKES[0], &MISTAKES[1]]).is_err());
    }
}
