//! What all scenarios share: the hypervisor, the guests' files, and the way to boot them.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use anyhow::{Context, Result, bail, ensure};

use super::{place::Place, scenarios::Scenario, session::Session};
use crate::{
    deps,
    emulator::{Machine, Time, kvm, newer},
    guests::{self, Guest},
    image::{self, Configuration},
    initramfs, paths, stub,
    toolchain::Profile,
};

/// A disk for machines that boot without one, in [`Rig::files`].
const EMPTY_DISK: &str = "empty.img";

/// The kernels that most scenarios boot.
const KERNELS: [&str; 2] = ["linux-6.1-cloud", "linux-5.10-cloud"];

/// The image of the guests' disks, in [`Rig::files`]: 1 MiB in which every 64-bit number depends on its place, as
/// the stub's checks of a disk know it.
pub const DISK_IMAGE: &str = "pattern.img";

/// An initramfs with the modules for a disk and a power button, and a copy of [`DISK_IMAGE`], in [`Rig::files`].
pub const DISK_INITRAMFS: &str = "initramfs-disk";

/// The content of [`DISK_IMAGE`].
fn disk_image() -> Vec<u8> {
    let numbers = (0u64..(1 << 20) / 8).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    numbers.flat_map(u64::to_le_bytes).collect()
}

/// The content of [`DISK_INITRAMFS`].
fn disk_initramfs(cache: &Path) -> Result<Vec<u8>> {
    let mut files = vec![(DISK_IMAGE, disk_image())];
    for name in initramfs::DISK_MODULES
        .iter()
        .chain(&initramfs::BUTTON_MODULES)
    {
        files.push((name, content(cache, name)?));
    }
    initramfs::with_files(cache, &files)
}

/// A file of a package.
fn content(cache: &Path, name: &str) -> Result<Vec<u8>> {
    let path = guests::file(cache, name)?.path;
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// What one run of a scenario uses.
pub struct Start {
    /// For the names of files.
    pub name: String,
    /// Where its machine is.
    pub place: Place,
    /// The log of the machine's serial line.
    pub log: PathBuf,
}

/// A guest, as a configuration says it.
pub struct Vm<'t> {
    /// Its name.
    pub name: &'static str,
    /// Virtual processors.
    pub vcpus: u32,
    /// In MiB.
    pub memory_mib: u32,
    /// A file of the rig.
    pub kernel: &'static str,
    /// A file of the rig.
    pub initrd: Option<&'static str>,
    /// For the kernel.
    pub command_line: &'t str,
    /// Its disks, not on the bare emulator.
    pub disks: &'static [Disk],
    /// More lines of its section.
    pub more: &'static str,
}

/// A disk of a guest.
#[derive(Clone, Copy, Debug)]
pub enum Disk {
    /// [`DISK_IMAGE`], to be written to.
    Writable,
    /// The same, read-only.
    ReadOnly,
}

impl<'t> Vm<'t> {
    /// A Linux guest called `linux`, with the memory of the default configuration.
    pub fn linux(guest: &Guest) -> Self {
        Self {
            name: "linux",
            vcpus: 1,
            memory_mib: 256,
            kernel: guest.name,
            initrd: Some("initramfs"),
            command_line: "console=ttyS0",
            disks: &[],
            more: "",
        }
    }

    /// A guest stub.
    pub fn stub(name: &'static str, command_line: &'t str) -> Self {
        Self {
            name,
            vcpus: 1,
            memory_mib: 32,
            kernel: "stub",
            initrd: None,
            command_line,
            disks: &[],
            more: "",
        }
    }

    /// Its section of a configuration.
    pub fn section(&self) -> String {
        let mut text = format!(
            "[[vm]]\nname = \"{}\"\nvcpus = {}\nmemory = \"{}M\"\n",
            self.name, self.vcpus, self.memory_mib
        );
        let disks = self.disks.iter().map(|disk| {
            let readonly = matches!(disk, Disk::ReadOnly);
            format!("{{ image = \"{DISK_IMAGE}\", readonly = {readonly} }}")
        });
        let disks = disks.collect::<Vec<_>>().join(", ");
        write!(
            text,
            "disks = [{disks}]\n{}[vm.boot]\nkernel = \"{}\"\n",
            self.more, self.kernel
        )
        .expect("a String takes any text");
        if let Some(initrd) = self.initrd {
            writeln!(text, "initrd = \"{initrd}\"").expect("a String takes any text");
        }
        writeln!(text, "cmdline = \"{}\"", self.command_line).expect("a String takes any text");
        text
    }
}

/// What all scenarios share.
pub struct Rig {
    /// Makes the images; none if no scenario boots Plinth.
    builder: Option<image::Builder>,
    /// Makes the images of the self-test; none if no scenario boots them.
    selftest: Option<image::Builder>,
    /// The folder of kernels and initrds that configurations name.
    pub files: PathBuf,
    /// Files that could not be made, and why.
    missing: Vec<(String, String)>,
    /// The folder of images.
    images: PathBuf,
    /// Places that cannot be used here, and why.
    obstacles: Vec<(Place, String)>,
    /// What the verbs of the soak are to be chosen by.
    pub seed: Option<u64>,
    /// What the stub stated, by place.
    pub stub_facts: Mutex<Vec<(Place, Vec<String>)>>,
}

impl Rig {
    /// Installs, fetches and makes what the scenarios need.
    ///
    /// # Errors
    /// The hypervisor does not compile, or there is no place for files.
    pub fn prepare(scenarios: &[Scenario], seed: Option<u64>) -> Result<Self> {
        let mut places: Vec<Place> = Vec::new();
        for place in scenarios.iter().filter_map(Scenario::place) {
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
            } else if matches!(place, Place::Qemu10 | Place::Qemu10X2Apic)
                && let Err(error) = newer::ensure()
            {
                obstacles.push((place, format!("{error:#}")));
            }
        }
        let builder = scenarios
            .iter()
            .any(Scenario::boots_plinth)
            .then(|| image::Builder::new(Profile::Release))
            .transpose()?;
        let selftest = scenarios
            .iter()
            .any(Scenario::boots_selftest)
            .then(image::Builder::selftest)
            .transpose()?;
        let images = paths::target().join("test-scenarios");
        let files = images.join("files");
        let missing = make_files(&files)?;
        Ok(Self {
            builder,
            selftest,
            files,
            missing,
            images,
            obstacles,
            seed,
            stub_facts: Mutex::default(),
        })
    }

    /// Puts a kernel among the files, and an initramfs for it with modules in `/lib`, called `initrd`.
    ///
    /// # Errors
    /// One cannot be fetched, with what was tried.
    pub fn provide(&self, kernel: &str, initrd: &str, modules: &[&str]) -> Result<()> {
        let cache = paths::cache();
        guests::write_whole(&self.files.join(kernel), &content(&cache, kernel)?)?;
        let modules = modules
            .iter()
            .map(|&name| Ok((name, content(&cache, name)?)))
            .collect::<Result<Vec<_>>>()?;
        let bytes = initramfs::with_files(&cache, &modules)?;
        guests::write_whole(&self.files.join(initrd), &bytes)
    }

    /// Why a place cannot be used.
    pub fn obstacle(&self, place: Place) -> Option<String> {
        self.obstacles
            .iter()
            .find(|(known, _)| *known == place)
            .map(|(_, why)| why.clone())
    }

    /// Boots these guests: under Plinth, or one of them on the bare emulator.
    ///
    /// # Errors
    /// A file is missing, or the machine does not start.
    pub fn boot(&self, start: &Start, vms: &[Vm<'_>]) -> Result<Session> {
        if let (Place::Bare, [vm]) = (start.place, vms) {
            return self.boot_bare(start, vm);
        }
        let text: String = vms.iter().map(Vm::section).collect();
        self.boot_text(start, &text, |_| {})
    }

    /// Boots Plinth with this configuration, whatever is wrong with it, on a machine that
    /// `change` may change.
    ///
    /// # Errors
    /// A file is missing, or the machine does not start.
    pub fn boot_text(
        &self,
        start: &Start,
        configuration: &str,
        change: impl FnOnce(&mut Machine),
    ) -> Result<Session> {
        let builder = self
            .builder
            .as_ref()
            .context("this run prepared no Plinth")?;
        for (name, why) in &self.missing {
            if configuration.contains(&format!("\"{name}\"")) {
                bail!("{name} is missing: {why}");
            }
        }
        let vms = u32::try_from(configuration.matches("[[vm]]").count())?;
        let image = self.images.join(format!("{}.img", start.name));
        let configuration = Configuration::new("plinth.toml", configuration, self.files.clone());
        builder.write_unchecked(&configuration, &image)?;
        let mut machine = start.place.machine(&image);
        change(&mut machine);
        // Guests wait for each other.
        let patience = start.place.patience() * vms.div_ceil(4).max(1);
        Session::start(&machine, &start.log, patience)
    }

    /// Boots a guest of the catalogue under Plinth, as `cargo xtask run --guest` does, with so many
    /// virtual processors.
    ///
    /// # Errors
    /// A file cannot be fetched, with what was tried, or the machine does not start.
    pub fn boot_guest(&self, start: &Start, guest: &Guest, vcpus: u32) -> Result<Session> {
        let builder = self.builder.as_ref();
        let text = guest.configuration(guest.memory_mib.into(), vcpus);
        let configuration = Configuration::new("plinth.toml", text, self.files.clone());
        for name in guest.files() {
            configuration.obtain(name)?;
        }
        // The kernel would say it, too, but less of why.
        let checked = configuration.check();
        ensure!(checked.problems.is_empty(), "{}", checked.report());
        let image = self.images.join(format!("{}.img", start.name));
        builder
            .context("this run prepared no Plinth")?
            .write_unchecked(&configuration, &image)?;
        let mut machine = start.place.machine(&image);
        // A second processor would only wait for its turn where time is instructions.
        machine.cpus = 1;
        machine.memory_mib = machine.memory_mib.max(guest.host_memory_mib());
        if let Some(shift) = guest.shift {
            machine.time = Time::Instructions { shift };
        }
        let patience = start.place.patience() + guest.patience(start.place.emulator());
        Session::start(&machine, &start.log, patience)
    }

    /// Boots a guest of the catalogue on the bare emulator, the one and the processors that Plinth's guest has
    /// in this place; the log stands beside that of the scenario.
    ///
    /// # Errors
    /// A file cannot be fetched, or QEMU does not start, or cannot start such a guest.
    pub fn boot_guest_bare(&self, start: &Start, guest: &Guest) -> Result<Session> {
        let configuration = Configuration::new("plinth.toml", "", self.files.clone());
        let mut machine = Place::Bare.machine(&self.files.join(EMPTY_DISK));
        let place = start.place.machine(&machine.image);
        machine.qemu = place.qemu;
        machine.cpu_model = place.cpu_model;
        machine.memory_mib = guest.memory_mib;
        machine.cpus = guest.vcpus;
        machine.extra = guest.qemu_arguments(|name| configuration.obtain(name))?;
        let patience = start.place.patience() + guest.patience(start.place.emulator());
        Session::start(&machine, &start.log.with_extension("bare.log"), patience)
    }

    /// Boots the kernel that tries itself, on a machine that `change` may change; `word`
    /// says what to try.
    ///
    /// # Errors
    /// The machine does not start.
    pub fn boot_selftest(
        &self,
        start: &Start,
        word: &str,
        change: impl FnOnce(&mut Machine),
    ) -> Result<Session> {
        let builder = self.selftest.as_ref();
        let image = self.images.join(format!("{}.img", start.name));
        builder
            .context("this run prepared no self-test")?
            .write_selftest(word, &image)?;
        let mut machine = start.place.machine(&image);
        change(&mut machine);
        Session::start(&machine, &start.log, start.place.patience())
    }

    /// As [`Rig::boot_selftest`], with a configuration for the word.
    ///
    /// # Errors
    /// As [`Rig::boot_selftest`].
    pub fn boot_selftest_with(
        &self,
        start: &Start,
        word: &str,
        configuration: &str,
    ) -> Result<Session> {
        let builder = self.selftest.as_ref();
        let image = self.images.join(format!("{}.img", start.name));
        let configuration = Configuration::new("plinth.toml", configuration, self.files.clone());
        builder
            .context("this run prepared no self-test")?
            .write_selftest_with(word, &configuration, &image)?;
        let machine = start.place.machine(&image);
        // A long script.
        Session::start(&machine, &start.log, 2 * start.place.patience())
    }

    /// Starts QEMU with the guest's kernel and without Plinth.
    fn boot_bare(&self, start: &Start, vm: &Vm<'_>) -> Result<Session> {
        if let Some((name, why)) = self.missing.iter().find(|(name, _)| name == vm.kernel) {
            bail!("{name} is missing: {why}");
        }
        let mut machine = start.place.machine(&self.files.join(EMPTY_DISK));
        machine.cpus = vm.vcpus;
        machine.memory_mib = vm.memory_mib;
        let file = |name: &str| self.files.join(name).display().to_string();
        machine
            .extra
            .extend(["-kernel".to_owned(), file(vm.kernel)]);
        if let Some(initrd) = vm.initrd {
            machine.extra.extend(["-initrd".to_owned(), file(initrd)]);
        }
        machine
            .extra
            .extend(["-append", vm.command_line].map(str::to_owned));
        Session::start(&machine, &start.log, start.place.patience())
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
    for name in KERNELS {
        let kernel = guests::file(&cache, name);
        provide(name, kernel.map(|kernel| kernel.path));
    }
    provide("initramfs", initramfs::ensure(&cache));
    provide("stub", stub::ensure());
    let written = disk_initramfs(&cache)
        .and_then(|bytes| guests::write_whole(&folder.join(DISK_INITRAMFS), &bytes));
    if let Err(error) = written {
        missing.push((DISK_INITRAMFS.to_owned(), format!("{error:#}")));
    }
    guests::write_whole(&folder.join(DISK_IMAGE), &disk_image())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_make_a_right_configuration() {
        let vms = [
            Vm::linux(&guests::CATALOGUE[0]),
            Vm::stub("stub", "end=poweroff"),
        ];
        let text: String = vms.iter().map(Vm::section).collect();
        let config = manage::config::parse("plinth.toml", text.as_bytes());
        assert_eq!(config.report(), "plinth.toml: 2 VMs can start\n");
        assert_eq!(config.vms[0].boot.cmdline, "console=ttyS0");
        assert_eq!(config.vms[1].memory, 32 << 20);
    }
}
