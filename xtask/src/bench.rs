//! `cargo xtask bench`: what exits and starts cost, counted in instructions.
//!
//! Purpose: boots the measuring guest, then a Linux, each as the only VM, in QEMU (AMD-V) and in
//! Bochs (VT-x), whose time-stamp counters count instructions here, and tells and keeps the
//! figures.
//!
//! Invariants: every run has the same machine and the same guests, whatever revision of Plinth
//! is measured; files in `bench/` are written only from whole measurements of both emulators.

mod figures;
mod profile;
mod report;
mod svg;
mod ticks;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use crate::{
    emulator::{Emulator, End, Firmware, Machine, Time},
    exit::Code,
    guests::{self, write_whole},
    image::{Builder, Configuration},
    initramfs, paths,
    process::output_of,
    progress::Step,
    stub,
    table::markdown,
    toolchain::Profile,
};
use figures::{Figure, Figures, Place, Unit};
use report::Results;

/// The longest that one run may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Name of the measured VM.
const VM: &str = "bench";

/// Which emulators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    /// QEMU: AMD-V.
    Qemu,
    /// Bochs: VT-x.
    Bochs,
    /// Both.
    All,
}

/// Measure what exits and starts cost, in instructions.
///
/// Runs the measuring guest and a Linux as the only VM, each several times: on an emulator
/// whose clock counts instructions the runs agree to the digit. docs/MEASURING.md says what
/// the numbers mean.
#[derive(clap::Args)]
#[command(after_help = "\
With both emulators and without --compare the results are also written to
bench/results.md, .json and .svg, which are kept under version control.")]
pub struct Args {
    /// Emulator.
    #[arg(long, value_enum, default_value = "all")]
    emulator: Which,
    /// How often to measure; the runs are compared.
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=20))]
    runs: u32,
    /// Measure this revision of Plinth, too, and show both side by side.
    #[arg(long, value_name = "REV")]
    compare: Option<String>,
    /// Instead of measuring, show which functions of the kernel an operation's instructions are
    /// spent in (QEMU).
    #[arg(long, value_name = "OPERATION", conflicts_with_all = ["compare", "emulator", "runs"])]
    profile: Option<String>,
}

/// Measures and tells.
///
/// # Errors
/// Something does not compile, a program is missing, or a guest did not finish.
pub fn run(args: &Args) -> anyhow::Result<Code> {
    let places: &[Place] = match args.emulator {
        Which::Qemu => &[Place::QemuAmdv],
        Which::Bochs => &[Place::BochsVtx],
        Which::All => &[Place::QemuAmdv, Place::BochsVtx],
    };
    let guests = Guests::prepare()?;
    let builder = Builder::new(Profile::Release)?;
    if let Some(operation) = &args.profile {
        profile::run(&builder, &guests, operation)?;
        return Ok(Code::Success);
    }
    let results = measure(&builder, &guests, places, args.runs)?;
    println!("{}", markdown(&report::table(&results)));
    println!("The scheduler's decision:\n");
    println!("{}", markdown(&report::decisions(&results)));
    println!("Exits while Linux boots:\n");
    println!("{}", markdown(&report::exits(&results)));
    print!("{}", report::remarks(&results));
    if let Some(revision) = &args.compare {
        let checkout = Checkout::new(revision)?;
        let builder = Builder::of_checkout(&checkout.folder)?;
        let theirs = measure(&builder, &guests, places, args.runs)?;
        let rows = report::comparison(&results, &theirs, revision);
        println!("\n{}", markdown(&rows));
    } else if args.emulator == Which::All {
        let folder = paths::workspace().join("bench");
        for (name, text) in [
            ("results.md", report::page(&results)),
            ("results.json", report::json(&results)),
            ("results.svg", svg::draw(&results)),
        ] {
            write_whole(&folder.join(name), text.as_bytes())?;
        }
        println!("Written: {}", paths::shown(&folder));
    }
    let steady = results.unsteady.values().all(Vec::is_empty);
    Ok(if steady { Code::Success } else { Code::Failure })
}

/// Another revision's sources, below target/; removed when dropped.
struct Checkout {
    folder: PathBuf,
}

impl Checkout {
    fn new(revision: &str) -> anyhow::Result<Self> {
        let checkout = Checkout {
            folder: paths::target().join("bench-compare"),
        };
        checkout.remove();
        output_of(
            git()
                .args(["worktree", "add", "--quiet", "--force", "--detach"])
                .arg(&checkout.folder)
                .arg(revision),
        )
        .with_context(|| format!("--compare {revision}"))?;
        Ok(checkout)
    }

    /// Nothing may be there, which is well.
    fn remove(&self) {
        let _ = output_of(
            git()
                .args(["worktree", "remove", "--force"])
                .arg(&self.folder),
        );
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        self.remove();
    }
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(paths::workspace());
    command
}

/// The guests' files.
struct Guests {
    folder: PathBuf,
}

impl Guests {
    const STUB: &str = "stub";
    const LINUX: &str = "linux";
    const INITRD: &str = "initrd";
    const EMPTY_DISK: &str = "empty.img";

    fn prepare() -> anyhow::Result<Self> {
        let folder = paths::target().join("bench-guests");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let cache = paths::cache();
        let put = |name: &str, bytes: &[u8]| write_whole(&folder.join(name), bytes);
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        put(Self::STUB, &read(&stub::ensure()?)?)?;
        let linux = guests::file(&cache, "linux-6.1-cloud")?;
        put(Self::LINUX, &read(&linux.path)?)?;
        let mut initrd = read(&initramfs::ensure(&cache)?)?;
        initrd.extend(initramfs::program(ticks::PATH, &ticks::program())?);
        put(Self::INITRD, &initrd)?;
        put(Self::EMPTY_DISK, &[0; 1 << 20])?;
        Ok(Guests { folder })
    }
}

/// What runs in the measured VM.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// The measuring guest.
    Stub,
    /// It, with two processors and a disk, for what one processor does to another, and for requests.
    Pair,
    Linux,
}

impl Guest {
    /// What only [`Guest::Pair`] measures.
    const PAIR_OPERATIONS: [&str; 3] = ["virtio-kick", "vcpu-wake", "vcpu-switch"];

    fn memory_mib(self) -> u32 {
        match self {
            Self::Stub | Self::Pair => 64,
            Self::Linux => 256,
        }
    }

    fn vcpus(self) -> u32 {
        match self {
            Self::Stub | Self::Linux => 1,
            Self::Pair => 2,
        }
    }

    fn disk(self) -> Option<&'static str> {
        (self == Self::Pair).then_some(Guests::EMPTY_DISK)
    }

    /// Part of the image's file name.
    fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Stub | Self::Linux => self.kernel(),
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Self::Stub | Self::Pair => Guests::STUB,
            Self::Linux => Guests::LINUX,
        }
    }

    fn initrd(self) -> Option<&'static str> {
        (self == Self::Linux).then_some(Guests::INITRD)
    }

    fn command_line(self) -> String {
        match self {
            Self::Stub => "mode=bench end=poweroff".into(),
            Self::Pair => format!(
                "mode=bench only={} end=poweroff",
                Self::PAIR_OPERATIONS.join(",")
            ),
            // Nothing random, so that runs repeat: Bochs' RDRAND differs from run to run.
            Self::Linux => format!(
                "console=ttyS0 nokaslr norandmaps random.trust_cpu=off clearcpuid=rdrand rdinit=/{}",
                ticks::PATH
            ),
        }
    }

    /// The configuration with this guest only.
    fn configuration(self, guests: &Guests) -> Configuration {
        self.configuration_with(guests, &self.command_line())
    }

    /// As [`Guest::configuration`], with this command line.
    fn configuration_with(self, guests: &Guests, command_line: &str) -> Configuration {
        let mut text = format!(
            "[host]\nfigures = true\n\n[[vm]]\nname = \"{VM}\"\nfocus = true\nmemory = \"{}M\"\n\
             vcpus = {}\n\n[vm.boot]\nkernel = \"{}\"\ncmdline = \"{}\"\n",
            self.memory_mib(),
            self.vcpus(),
            self.kernel(),
            command_line
        );
        if let Some(disk) = self.disk() {
            let list = format!("disks = [{{ image = \"{disk}\" }}]\n\n[vm.boot]");
            text = text.replacen("\n[vm.boot]", &list, 1);
        }
        if let Some(initrd) = self.initrd() {
            text += &format!("initrd = \"{initrd}\"\n");
        }
        Configuration::new("(bench)", text, guests.folder.clone())
    }
}

/// The machine of all measurements at a place.
fn machine(place: Place, image: &Path) -> Machine {
    let emulator = match place {
        Place::QemuAmdv => Emulator::Qemu,
        Place::BochsVtx => Emulator::Bochs,
    };
    Machine {
        firmware: Firmware::Bios,
        cpus: 1,
        time: Time::Instructions { shift: 0 },
        ..Machine::new(emulator, image)
    }
}

/// Runs a machine until it powers off; its serial port's text.
fn console_of(machine: &Machine) -> anyhow::Result<String> {
    let mut running = machine.start_watched(None)?;
    let end = running.wait_exit(LIMIT);
    running.kill();
    let log = running.log();
    match end {
        Ok(End::PoweredOff) => Ok(log),
        Ok(end) => bail!("{end}\n{}", crate::process::last_lines(&log, 15)),
        Err(missed) => bail!("{missed}\n{}", crate::process::last_lines(&log, 15)),
    }
}

/// Measures a revision of Plinth.
fn measure(
    builder: &Builder,
    guests: &Guests,
    places: &[Place],
    runs: u32,
) -> anyhow::Result<Results> {
    let mut results = Results {
        runs,
        ..Results::default()
    };
    let image = |guest: Guest| {
        let path = paths::target().join(format!("bench-{}.img", guest.name()));
        let written = builder.write_unchecked(&guest.configuration(guests), &path)?;
        anyhow::Ok((path, written))
    };
    let (stub_image, written) = image(Guest::Stub)?;
    let (pair_image, _) = image(Guest::Pair)?;
    let (linux_image, _) = image(Guest::Linux)?;
    for &place in places {
        let mut first: Option<Figures> = None;
        for run in 1..=runs {
            let step = Step::start(format!("Measuring on {}, run {run}", place.name()));
            let mut found = measure_operations(&machine(place, &stub_image))?;
            found.extend(measure_pair(&machine(place, &pair_image))?);
            found.extend(measure_boot(&machine(place, &linux_image))?);
            let image_bytes = Figure::once(written.kernel_bytes, Unit::Bytes);
            found.insert("image-bytes".into(), image_bytes);
            step.done();
            if let Some(first) = &first {
                let differing = figures::differing(first, &found);
                let unsteady = results.unsteady.entry(place).or_default();
                unsteady.extend(differing);
                unsteady.sort_unstable();
                unsteady.dedup();
            } else {
                first = Some(found);
            }
        }
        results.places.insert(place, first.unwrap_or_default());
    }
    if places.contains(&Place::QemuAmdv) {
        results.bare_boot = Some(measure_bare_boot(guests)?);
    }
    Ok(results)
}

/// The measuring guest's figures, and the host's of it.
fn measure_operations(machine: &Machine) -> anyhow::Result<Figures> {
    let log = console_of(machine).context("the measuring guest")?;
    let mut found = figures::parse_stub(&log).with_context(|| log.clone())?;
    let host = figures::parse_host(&log, VM);
    for (key, unit) in [
        ("kernel-to-entry", Unit::Instructions),
        ("vm-start", Unit::Instructions),
        ("vm-overhead-bytes", Unit::Bytes),
    ] {
        if let Some(&value) = host.get(key) {
            found.insert(key.into(), Figure::once(value, unit));
        }
    }
    for (kind, cost) in figures::parse_decisions(&log, VM) {
        let key = format!("{}{kind}", report::DECISIONS);
        found.insert(key, Figure::once(cost, Unit::Instructions));
    }
    Ok(found)
}

/// What one virtual processor does to another, and requests of a disk, by the measuring guest.
fn measure_pair(machine: &Machine) -> anyhow::Result<Figures> {
    let log = console_of(machine).context("the measuring guest with two processors")?;
    figures::parse_stub(&log).with_context(|| log.clone())
}

/// Linux' boot under Plinth.
fn measure_boot(machine: &Machine) -> anyhow::Result<Figures> {
    let log = console_of(machine).context("Linux")?;
    let init = ticks::parse(&log).with_context(|| format!("no line of /init in:\n{log}"))?;
    let host = figures::parse_host(&log, VM);
    let mut found = Figures::new();
    // A revision that does not tell when the guest was entered cannot be measured by this.
    if let Some(&entry) = host.get("guest-tsc-at-entry") {
        let boot = Figure::once(init.saturating_sub(entry), Unit::Instructions);
        found.insert("linux-boot".into(), boot);
    }
    for (kind, count) in figures::parse_exits(&log, VM) {
        let key = format!("{}{kind}", report::EXITS);
        found.insert(key, Figure::once(count, Unit::Exits));
    }
    Ok(found)
}

/// Instructions of the same boot on QEMU without Plinth, from the kernel's first one: the
/// firmware's, which the measuring guest tells, taken away.
fn measure_bare_boot(guests: &Guests) -> anyhow::Result<u64> {
    let step = Step::start("Measuring Linux on the bare emulator");
    let start = |guest: Guest| {
        let mut machine = machine(Place::QemuAmdv, &guests.folder.join(Guests::EMPTY_DISK));
        machine.memory_mib = guest.memory_mib();
        let file = |name: &str| guests.folder.join(name).display().to_string();
        machine.extra = vec!["-kernel".into(), file(guest.kernel())];
        if let Some(initrd) = guest.initrd() {
            machine.extra.extend(["-initrd".into(), file(initrd)]);
        }
        machine
            .extra
            .extend(["-append".into(), guest.command_line()]);
        console_of(&machine)
    };
    let log = start(Guest::Stub).context("the measuring guest on the bare emulator")?;
    let firmware = log
        .lines()
        .find_map(|line| line.strip_prefix("bench tsc-at-entry "))
        .and_then(|value| figures::number(value.trim()))
        .context("the measuring guest did not say when it began")?;
    let log = start(Guest::Linux).context("Linux on the bare emulator")?;
    let init = ticks::parse(&log).with_context(|| format!("no line of /init in:\n{log}"))?;
    ensure!(
        init > firmware,
        "Linux came to /init before the firmware ended"
    );
    step.done();
    Ok(init - firmware)
}
