//! `plinth.toml`: which VMs there are, what each gets, and how the host behaves.
//!
//! The same code runs on the workstation (`cargo xtask check-config`, when an image is made)
//! and in the kernel at boot. [`parse`] reads the text; [`check`] compares the result
//! with what is there: host memory, files. Both note every problem with its file, line,
//! column and key, and what is allowed instead.
//!
//! Invariants: a VM in [`Config::vms`] has only valid values; a VM with an error is left out and
//! named in [`Config::disabled`], and the others are unaffected. A bad value for the host is
//! replaced by its default. A file that is no TOML yields one error and no VMs. The size of the
//! file, the number of VMs and the number of problems kept are limited, so that no file exhausts memory.

mod added;
mod boot;
mod check;
mod cpu;
mod disks;
mod display;
mod host;
mod sched;
mod values;

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};
use core::fmt;

use toml::de::{DeTable, DeValue};

pub(crate) use self::sched::duration_us;
pub use self::sched::{
    DEFAULT_POOL, DEFAULT_SLICE_US, MAX_POOLS, MIN_BUDGET_US, PERIODS_US, PoolConfig, Pools,
    SLICES_US, VmSched, is_reservation, percent, time,
};
pub use added::{AddError, parse_added};
pub use boot::{Boot, BootModule, FirmwareConfig};
pub use check::{Environment, FileFacts, FileKind, check, has_multiboot_header};
pub use cpu::{CPU_FEATURES, CpuBase, CpuConfig};
pub use disks::{DEFAULT_CHANGES, DiskConfig, MAX_DISKS, MIN_CHANGES};
pub use display::{ConsoleKind, DisplayKind};
pub use host::{AfterLastVm, HostConfig, HostFile, LogLevel, OnFault};
pub(crate) use values::distance;
use values::{find, kind, memory_size, quote, shown};

/// Largest configuration file, in bytes.
pub const MAX_FILE_BYTES: usize = 64 * 1024;
/// Most VMs in a file.
pub const MAX_VMS: usize = 64;
/// Most virtual processors of a VM.
pub const MAX_VCPUS: u16 = 16;
/// Least memory of a VM, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;
/// Most memory of a VM, in bytes.
pub const MAX_MEMORY: u64 = 1 << 40;
/// A VM's memory is a multiple of this, in bytes, so that large pages map all of it.
pub const MEMORY_STEP: u64 = 2 << 20;
/// Longest VM name, in characters.
pub const MAX_NAME: usize = 32;
/// Longest kernel command line, in bytes: what Linux has room for, less its terminator.
pub const MAX_CMDLINE: usize = 2047;
/// Most modules of a multiboot kernel.
pub const MAX_MODULES: usize = 32;
/// Longest path of a file, in bytes.
pub const MAX_PATH: usize = 180;
/// Problems kept; further ones are only counted.
const MAX_PROBLEMS: usize = 64;

/// Whether a VM starts again after it has ended. A guest that resets its machine always does;
/// this is for the other ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// It stays ended.
    #[default]
    Never,
    /// It starts again if it was stopped for something that it did: a triple fault, an exit
    /// that Plinth does not know. Not after it has powered itself off.
    OnFailure,
    /// It starts again, also after it has powered itself off.
    Always,
}

/// What a VM's watchdog does that was not fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watchdog {
    /// Resets the VM.
    Reset,
    /// Powers it off; that is a failure, for `restart`.
    PowerOff,
    /// Pauses it.
    Pause,
    /// Sends its vCPUs an NMI.
    Nmi,
    /// Says so, and no more.
    Log,
}

/// One `[[vm]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// `name`, unique.
    pub name: String,
    /// `vcpus`.
    pub vcpus: u16,
    /// `memory`, in bytes.
    pub memory: u64,
    /// `boot`.
    pub boot: Boot,
    /// `disks`, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// `cpu`, `features` and `tsc-khz`.
    pub cpu: CpuConfig,
    /// `pool`, `weight`, `cap`, `priority`, `affinity` and `reservation`.
    pub sched: VmSched,
    /// `restart`.
    pub restart: Restart,
    /// `display`: what it draws on.
    pub display: DisplayKind,
    /// `console`: what of the VM is a console on the host's terminal.
    pub console: ConsoleKind,
    /// `focus`: the terminal shows this VM first. At most one VM has it.
    pub focus: bool,
    /// `watchdog`: it has a watchdog, which does this.
    pub watchdog: Option<Watchdog>,
    /// `autostart`: it starts when the host does.
    pub autostart: bool,
    /// `test-devices`: it has what test kernels written for QEMU expect.
    pub test_devices: bool,
    places: Places,
}

/// Where a VM's values stand in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Places {
    vcpus: Location,
    memory: Location,
}

/// A place in the file. Both count from 1; a column is a character. Line 0: the file as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Something does not happen as written: a VM is disabled, a host value is replaced by its default.
    Error,
    /// Everything happens as written, but perhaps not as meant.
    Warning,
}

/// Something wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// Name of the file.
    pub file: String,
    /// Where in the file.
    pub location: Location,
    /// The VM concerned: its name, or "#2" for the second `[[vm]]` when that has no usable name.
    /// With [`Severity::Error`], that VM is disabled.
    pub vm: Option<String>,
    /// Key with its sections: `vm.boot.kernel`. Empty: the file, or a section as a whole.
    pub key: String,
    /// What is wrong, and what is allowed.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if self.location.line > 0 {
            write!(f, "{}:{}:", self.location.line, self.location.column)?;
        }
        match self.severity {
            Severity::Error => write!(f, " error: ")?,
            Severity::Warning => write!(f, " warning: ")?,
        }
        if let Some(vm) = &self.vm {
            write!(f, "VM {vm}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// The configuration as far as it is usable, and what is wrong with the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `[host]`.
    pub host: HostConfig,
    /// The VMs that can start, in the order of the file.
    pub vms: Vec<VmConfig>,
    /// The VMs that can't, by name, or "#2" for the second `[[vm]]` when that has no usable name.
    pub disabled: Vec<String>,
    /// Everything that is wrong, in the order found.
    pub problems: Vec<Problem>,
    file: String,
    /// Problems that found no room.
    dropped: usize,
}

impl Config {
    /// Whether there is any error. Warnings don't count.
    pub fn has_errors(&self) -> bool {
        self.dropped > 0 || self.problems.iter().any(|p| p.severity == Severity::Error)
    }

    /// All problems, one a line, and a last line with the outcome: what `check-config` prints.
    pub fn report(&self) -> String {
        let mut text = String::new();
        for problem in &self.problems {
            text += &format!("{problem}\n");
        }
        if self.dropped > 0 {
            text += &format!("{}: {} further problems\n", self.file, self.dropped);
        }
        text += &format!("{}: {} can start", self.file, vms(self.vms.len()));
        if !self.disabled.is_empty() {
            text += &format!(", disabled: {}", self.disabled.join(", "));
        }
        text.push('\n');
        text
    }

    /// Notes a problem; an error that names a VM disables it.
    fn note(
        &mut self,
        severity: Severity,
        at: Location,
        vm: Option<&str>,
        key: &str,
        text: String,
    ) {
        if let (Severity::Error, Some(vm)) = (severity, vm)
            && !self.disabled.iter().any(|d| d == vm)
        {
            self.disabled.push(vm.to_owned());
        }
        if self.problems.len() == MAX_PROBLEMS {
            self.dropped += 1;
            return;
        }
        self.problems.push(Problem {
            severity,
            file: self.file.clone(),
            location: at,
            vm: vm.map(ToOwned::to_owned),
            key: key.to_owned(),
            message: text,
        });
    }
}

fn vms(count: usize) -> String {
    match count {
        0 => "no VM".to_owned(),
        1 => "1 VM".to_owned(),
        n => format!("{n} VMs"),
    }
}

/// An amount of memory in the largest unit that suits, for people.
pub fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    let unit = UNITS.iter().find(|(unit, _)| bytes >= *unit);
    match unit {
        None => format!("{bytes} bytes"),
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => {
            // One decimal, rounded down.
            let tenths = bytes % unit * 10 / unit;
            format!("{}.{tenths} {name}", bytes / unit)
        }
    }
}

/// Reads a configuration. `file` is its name, for the problems.
pub fn parse(file: &str, text: &[u8]) -> Config {
    let mut parser = Parser {
        text: "",
        config: Config {
            file: file.to_owned(),
            ..Config::default()
        },
    };
    parser.parse(text);
    parser.config
}

/// A section of the file that is being read.
struct Section<'t> {
    table: &'t DeTable<'t>,
    /// `host`, `vm`, `vm.boot`.
    path: &'static str,
    at: Location,
    vm: Option<String>,
}

struct Parser<'t> {
    text: &'t str,
    config: Config,
}

impl<'t> Parser<'t> {
    fn parse(&mut self, bytes: &'t [u8]) {
        if bytes.len() > MAX_FILE_BYTES {
            let text = format!(
                "the file has {} bytes; allowed: up to {MAX_FILE_BYTES}",
                bytes.len()
            );
            return self.file_error(Location::default(), text);
        }
        self.text = match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => {
                self.text = core::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or_default();
                let at = self.location(self.text.len());
                return self.file_error(at, "the file is not UTF-8 text from here on".to_owned());
            }
        };
        let document = match DeTable::parse(self.text) {
            Ok(document) => document,
            Err(e) => {
                let at = e.span().map_or(0, |span| span.start);
                return self.file_error(self.location(at), e.message().replace('\n', "; "));
            }
        };
        let root = Section {
            table: document.get_ref(),
            path: "",
            at: Location::default(),
            vm: None,
        };
        self.check_keys(&root, &["host", "pool", "vm"]);
        if let Some((table, at)) = self.table(&root, "host") {
            self.host(&Section {
                table,
                path: "host",
                at,
                vm: None,
            });
        }
        self.pools(&root);
        self.vms(&root);
    }

    fn file_error(&mut self, at: Location, text: String) {
        self.config.note(Severity::Error, at, None, "", text);
    }

    fn vms(&mut self, root: &Section<'_>) {
        let list = match find(root.table, "vm") {
            Some((_, value)) => match value.get_ref() {
                DeValue::Array(list) => Some(list),
                other => {
                    let text = format!("must be [[vm]] sections; found {}", kind(other));
                    let at = self.location(value.span().start);
                    self.bad(root, at, "vm", text);
                    return;
                }
            },
            None => None,
        };
        let Some(list) = list.filter(|list| !list.is_empty()) else {
            self.file_error(
                Location::default(),
                "no VM is defined; add a [[vm]] section with name, memory and boot".to_owned(),
            );
            return;
        };
        let mut names: Vec<(String, Location)> = Vec::new();
        for (number, value) in list.iter().enumerate() {
            let at = self.location(value.span().start);
            let label = format!("#{}", number + 1);
            if number >= MAX_VMS {
                let text = format!("there are {} VMs; allowed: up to {MAX_VMS}", list.len());
                let note = &mut self.config;
                note.note(Severity::Error, at, Some(&label), "vm", text);
                return;
            }
            let DeValue::Table(table) = value.get_ref() else {
                let text = format!("must be a [[vm]] section; found {}", kind(value.get_ref()));
                self.config
                    .note(Severity::Error, at, Some(&label), "vm", text);
                continue;
            };
            let section = Section {
                table,
                path: "vm",
                at,
                vm: Some(label),
            };
            self.vm(section, &mut names);
        }
    }

    fn vm(&mut self, mut s: Section<'_>, names: &mut Vec<(String, Location)>) {
        let name = self.name(&s, names);
        if let Some(name) = &name {
            s.vm = Some(name.clone());
        }
        const KEYS: [&str; 15] = [
            "name",
            "vcpus",
            "memory",
            "boot",
            "disks",
            "restart",
            "console",
            "focus",
            "autostart",
            "watchdog",
            "test-devices",
            "cpu",
            "features",
            "tsc-khz",
            "display",
        ];
        self.check_keys(&s, &[&KEYS[..], &self::sched::VM_KEYS].concat());
        let (vcpus, vcpus_at) = self.vcpus(&s);
        let memory = self.memory(&s);
        let boot = self.boot(&s);
        let disks = self.disks(&s);
        let cpu = self.cpu(&s);
        let sched = self.vm_sched(&s, vcpus);
        let restart = self.choice(
            &s,
            "restart",
            &[
                ("never", Restart::Never),
                ("on-failure", Restart::OnFailure),
                ("always", Restart::Always),
            ],
        );
        let display = self.display(&s);
        let console = self.console(&s, display);
        let focus = self.boolean(&s, "focus");
        let focus = match focus {
            Some((true, at)) if console == ConsoleKind::None => {
                let text = "a VM with console = false can't be shown; remove one of the two";
                self.bad(&s, at, "focus", text.to_owned());
                true
            }
            Some((true, at)) if self.config.vms.iter().any(|vm| vm.focus) => {
                let text = "another VM has it already; that one is shown first";
                let config = &mut self.config;
                let vm = s.vm.as_deref();
                config.note(Severity::Warning, at, vm, "vm.focus", text.to_owned());
                false
            }
            other => other.is_some_and(|(value, _)| value),
        };
        let watchdog = self.choice(
            &s,
            "watchdog",
            &[
                ("reset", Watchdog::Reset),
                ("power-off", Watchdog::PowerOff),
                ("pause", Watchdog::Pause),
                ("nmi", Watchdog::Nmi),
                ("log", Watchdog::Log),
            ],
        );
        let autostart = self.boolean(&s, "autostart");
        let test_devices = self.boolean(&s, "test-devices");
        let ok =
            s.vm.as_ref()
                .is_none_or(|vm| !self.config.disabled.contains(vm));
        if let (Some(name), Some((memory, memory_at)), Some(boot), true) = (name, memory, boot, ok)
        {
            self.config.vms.push(VmConfig {
                name,
                vcpus,
                memory,
                boot,
                disks,
                cpu,
                sched,
                restart: restart.unwrap_or_default(),
                display,
                console,
                focus,
                watchdog,
                autostart: autostart.is_none_or(|(value, _)| value),
                test_devices: test_devices.is_some_and(|(value, _)| value),
                places: Places {
                    vcpus: vcpus_at,
                    memory: memory_at,
                },
            });
        }
    }

    fn name(&mut self, s: &Section<'_>, names: &mut Vec<(String, Location)>) -> Option<String> {
        let (text, at) = self.required(s, "name")?;
        if !is_vm_name(text) {
            let message = format!(
                "{} is not a name; allowed: 1 to {MAX_NAME} of a to z, 0 to 9 and -",
                quote(text)
            );
            self.bad(s, at, "name", message);
            return None;
        }
        if let Some((_, first)) = names.iter().find(|(name, _)| name == text) {
            let message = format!(
                "\"{text}\" is the name of the VM at line {} already",
                first.line
            );
            self.bad(s, at, "name", message);
            return None;
        }
        names.push((text.to_owned(), at));
        Some(text.to_owned())
    }

    fn vcpus(&mut self, s: &Section<'_>) -> (u16, Location) {
        let Some((value, at)) = self.value(s, "vcpus") else {
            return (1, s.at);
        };
        let number = match value {
            DeValue::Integer(n) => u16::from_str_radix(n.as_str(), n.radix()).ok(),
            other => {
                self.wrong_type(s, at, "vcpus", "a whole number", other);
                return (1, at);
            }
        };
        match number {
            Some(n @ 1..=MAX_VCPUS) => (n, at),
            _ => {
                let text = format!(
                    "{} is out of range; allowed: 1 to {MAX_VCPUS}",
                    shown(value)
                );
                self.bad(s, at, "vcpus", text);
                (1, at)
            }
        }
    }

    fn memory(&mut self, s: &Section<'_>) -> Option<(u64, Location)> {
        let Some((_, at)) = self.value(s, "memory") else {
            let text = "missing; write for example memory = \"256M\"".to_owned();
            self.bad(s, s.at, "memory", text);
            return None;
        };
        let bytes = self.size(s, "memory", MIN_MEMORY, MEMORY_STEP)?;
        Some((bytes, at))
    }

    /// An amount of memory in bytes, from `min` to [`MAX_MEMORY`], a multiple of `step`.
    fn size(&mut self, s: &Section<'_>, key: &'static str, min: u64, step: u64) -> Option<u64> {
        let (value, at) = self.value(s, key)?;
        let mut allowed = format!("allowed: {} to {}", size(min), size(MAX_MEMORY));
        if step > 1 {
            allowed += &format!(", in steps of {}", size(step));
        }
        let bytes = match value {
            // A number too large for the type is too much memory, too.
            DeValue::Integer(n) if n.as_str().starts_with('-') => 0,
            DeValue::Integer(n) => u64::from_str_radix(n.as_str(), n.radix())
                .unwrap_or(u64::MAX)
                .saturating_mul(1 << 20),
            DeValue::String(text) => match memory_size(text) {
                Some(bytes) => bytes,
                None => {
                    let message = format!(
                        "{} is not a size: write a number with M, G or T, like \"256M\"; {allowed}",
                        quote(text)
                    );
                    self.bad(s, at, key, message);
                    return None;
                }
            },
            other => {
                let want = "a size like \"256M\", or a number of MiB";
                self.wrong_type(s, at, key, want, other);
                return None;
            }
        };
        let problem = match bytes {
            _ if bytes < min => "too little",
            _ if bytes > MAX_MEMORY => "too much",
            _ if !bytes.is_multiple_of(step) => "not a whole number of steps",
            _ => return Some(bytes),
        };
        let text = format!("{} is {problem}; {allowed}", shown(value));
        self.bad(s, at, key, text);
        None
    }

    fn path(
        &mut self,
        s: &Section<'_>,
        key: &'static str,
        text: &str,
        at: Location,
    ) -> Option<(String, Location)> {
        let fine = !text.is_empty() && text.len() <= MAX_PATH && !text.contains(char::is_control);
        if !fine || text.ends_with('/') {
            let message = format!(
                "{} is not a file's path; allowed: 1 to {MAX_PATH} bytes without control characters",
                quote(text)
            );
            self.bad(s, at, key, message);
            return None;
        }
        Some((text.to_owned(), at))
    }
}

/// Whether this can be the name of a VM: 1 to [`MAX_NAME`] of a to z, 0 to 9 and `-`.
pub fn is_vm_name(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(fits)
}

#[cfg(test)]
mod tests;
