//! The list of scenarios, and what they share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::linux::{self, Given, Limits, Shell};
use super::report::Outcome;
use super::session::Session;
use crate::emulator::{Emulator, Firmware, Machine};
use crate::{guests, initramfs, paths};

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
    limit: Duration,
    body: Body,
}

impl Scenario {
    /// Runs it to its end, its time limit, or its first failure.
    pub fn run(&self, rig: &Rig, log: &Path) -> Outcome {
        let start = Start {
            log: log.to_owned(),
            limit: self.limit,
        };
        match (self.body)(rig, &start) {
            Ok(remark) => Outcome::Passed(remark),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        }
    }
}

/// What the machine of a scenario is started with.
pub struct Start {
    log: PathBuf,
    limit: Duration,
}

/// What all scenarios share: the guests' files.
pub struct Rig {
    initramfs: PathBuf,
    /// A disk for machines that boot without one.
    empty_disk: PathBuf,
}

impl Rig {
    /// Fetches and makes what the scenarios need.
    ///
    /// # Errors
    /// Something cannot be had.
    pub fn prepare(_scenarios: &[Scenario]) -> Result<Self> {
        for guest in &guests::CATALOGUE {
            guests::ensure_kernel(&paths::cache(), guest)?;
        }
        let empty_disk = paths::target().join("test-scenarios/empty.img");
        guests::write_whole(&empty_disk, &[0; 1 << 20])?;
        Ok(Self {
            initramfs: initramfs::ensure(&paths::cache())?,
            empty_disk,
        })
    }
}

/// The guests' memory, as in the default configuration.
const MEMORY_MIB: u32 = 256;

/// The Linux conversations on the bare emulator.
pub fn reference() -> Vec<Scenario> {
    let each = guests::CATALOGUE.iter().map(|guest| Scenario {
        name: format!("reference/qemu/{}", guest.name),
        emulator: Some(Emulator::Qemu),
        cost_s: 15,
        quick: true,
        limit: Duration::from_secs(180),
        body: Box::new(move |rig, start| reference_linux(rig, start, guest)),
    });
    each.collect()
}

fn reference_linux(rig: &Rig, start: &Start, guest: &guests::Guest) -> Result<String> {
    let kernel = guests::ensure_kernel(&paths::cache(), guest)?;
    let mut machine = Machine::new(Emulator::Qemu, &rig.empty_disk);
    machine.firmware = Firmware::Bios;
    machine.cpus = 1;
    machine.memory_mib = MEMORY_MIB;
    machine.count_instructions = true;
    machine.extra = ["-append", "console=ttyS0", "-kernel"]
        .map(String::from)
        .to_vec();
    machine.extra.push(kernel.path.display().to_string());
    machine.extra.push("-initrd".to_owned());
    machine.extra.push(rig.initramfs.display().to_string());
    let mut session = Session::start(&machine, &start.log, start.limit)?;
    let given = Given {
        release: guest.release,
        memory_mib: MEMORY_MIB,
        cpus: 1,
    };
    let limits = Limits {
        boot: Duration::from_secs(90),
        command: Duration::from_secs(30),
    };
    linux_to_power_off(&mut session, &given, limits)
}

/// Boots, converses, powers off; the remark says when the shell was there.
fn linux_to_power_off(session: &mut Session, given: &Given, limits: Limits) -> Result<String> {
    let started = session.started();
    let (mut shell, release) = Shell::wait_for(session, limits)?;
    let booted = started.elapsed().as_secs_f64();
    linux::converse(&mut shell, &release, given)?;
    shell.say("poweroff")?;
    session.wait_for_power_off(limits.command)?;
    Ok(format!("shell after {booted:.1} s"))
}

/// All scenarios.
pub fn all() -> Vec<Scenario> {
    Vec::new()
}
