//! `cargo xtask run`: builds Plinth, boots it in an emulator, puts its console on the terminal.

mod framed;
mod typist;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use manage::config::{self, FileKind};

use typist::Typist;

use crate::{
    ctl,
    emulator::{
        self, Cursor, Emulator, End, Firmware, Keyboard, Machine, Missed, Regex, Running, Time,
        Watch,
        kvm::{self, Accel},
    },
    exit::{Code, Stop},
    guests::{self, Guest},
    image::{Builder, Configuration, ProfileArgs},
    paths, terminal,
};

/// A line that begins the report of a fault of Plinth's own, and the one that ends it.
const FAULT: &str = r"(?m)^(?:\[[^\]\r\n]*\] ?)?HOST FAULT: ([^\r\n]*)";
const FAULT_END: &str = r"(?m)^(?:\[[^\]\r\n]*\] ?)?Plinth stopped: ";

/// A line that says that Plinth found nothing to run, before it powers off.
const NOTHING_RUNS: &str = r"(?m)^\[ *\d+\.\d+\] error: (no VM runs[^\r\n]*)";

/// Where the boot loader puts the kernel's image: the first address of the range that the kernel
/// leaves to it.
const KERNEL_BASE: u64 = 0xffff_8000_0000_0000;

/// Time for a fault's report to come out in full.
const FAULT_REPORT: Duration = Duration::from_secs(10);

/// How often to look for the line waited for, a fault, and the person's wish to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Host memory beside a guest's and its files, in MiB: Plinth's own.
const OWN_MIB: u64 = 256;

/// Ctrl-], which begins a command to Plinth; followed by [`QUIT`], one to xtask.
const ESCAPE: u8 = 0x1d;
const QUIT: u8 = b'x';

/// Build Plinth and boot it in an emulator, with its console on this terminal.
///
/// Every key goes to Plinth, and from there to the guest that is shown; Ctrl-C too. After Ctrl-]
/// a digit shows another guest's console, q powers Plinth off, any other key explains itself. Ctrl-] x ends the
/// emulator at once, like pulling the plug.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask run                                 Linux and a test guest, as plinth.toml says
  cargo xtask run --emulator bochs                the same on VT-x instead of AMD-V (slower)
  cargo xtask run --kernel vmlinuz --initrd initrd.img --memory 512M
                                                  a system of yours instead of plinth.toml's
  cargo xtask run --guest memtest86+ --headless   a system from the catalogue, until it is up
  cargo xtask run --headless --until 'login: ' --timeout 120
                                                  for scripts: what was seen, by exit code
  cargo xtask run --headless --test-devices --kernel test.elf --vcpus 2 --timeout 60
                                                  a test kernel written for QEMU: its console on
                                                  standard output, its exit status
  cargo xtask run --gdb                           wait for a debugger

Exit codes: 0 Plinth powered off, or --until was seen; 1 a fault of Plinth, or the machine ended otherwise; 2 wrong
arguments or configuration; 3 a program is missing; 124 --timeout passed; 130 ended by Ctrl-] x or a signal.
With --headless --test-devices: the odd status that QEMU gives for what the kernel writes to its exit port; 0 it powered
off, asked for a reset or triple-faulted; 2, 124, 130 as above; 126 it could not be run; 134 Plinth stopped it.")]
pub struct Args {
    /// Emulator: QEMU has AMD-V (or the workstation's own, see --accel), Bochs has VT-x.
    #[arg(long, value_enum, default_value = "qemu")]
    emulator: Emulator,
    /// QEMU to use instead of the installed one: a program, or 10 for QEMU 10 of Debian 12's backports,
    /// which is fetched.
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
    /// What the machine starts with [default: uefi in QEMU, bios in Bochs].
    #[arg(long, value_enum)]
    firmware: Option<Firmware>,
    /// KVM or QEMU's own emulation [default: auto, but tcg with --headless --test-devices].
    #[arg(long, value_enum)]
    accel: Option<Accel>,
    /// The virtual machines [default: plinth.toml of this workspace].
    #[arg(long, value_name = "FILE", conflicts_with = "which")]
    config: Option<PathBuf>,
    /// A guest of the catalogue, instead of those in plinth.toml. With --headless: until it is up.
    #[arg(long, value_name = "NAME", group = "which", conflicts_with_all = ["kernel", "firmware_guest", "disk"])]
    guest: Option<String>,
    /// Print the catalogue of guests and run nothing.
    #[arg(long)]
    list_guests: bool,
    #[command(flatten)]
    own: GuestArgs,
    /// Memory of the emulated PC, in MiB [default: 1024, or what the guest needs].
    #[arg(long, value_name = "MIB")]
    host_memory: Option<u32>,
    /// Processors of the emulated PC [default: 2 in QEMU, 1 in Bochs].
    #[arg(long, value_name = "COUNT")]
    host_cpus: Option<u32>,
    /// Give the machine a second serial port, Plinth's control channel, as this socket
    /// [default: target/plinth-control.sock, but none with --headless].
    #[arg(long, value_name = "SOCKET")]
    control: Option<Option<PathBuf>>,
    /// Take no keys, only print what comes out.
    #[arg(long)]
    headless: bool,
    /// With --headless --test-devices: Plinth's own lines on standard error.
    #[arg(long)]
    verbose: bool,
    /// End well as soon as the output matches this regular expression.
    #[arg(long, value_name = "REGEX")]
    until: Option<String>,
    /// End after so many seconds [default with --guest and --headless: ten times what it takes].
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Log what the emulated processors do, to target/trace-EMULATOR.log (large).
    #[arg(long)]
    trace: bool,
    /// Wait for gdb before the first instruction (QEMU).
    #[arg(long)]
    gdb: bool,
    #[command(flatten)]
    profile: ProfileArgs,
}

/// A guest of the user's own.
#[derive(Default, clap::Args)]
#[command(group = clap::ArgGroup::new("which").multiple(true))]
struct GuestArgs {
    /// PC firmware that the guest starts with: seabios, ovmf, or an image file. It boots the guest's disks;
    /// OVMF also boots --kernel.
    #[arg(long, value_name = "FIRMWARE", group = "which")]
    firmware_guest: Option<String>,
    /// Kernel of a guest of yours (bzImage, or ELF with multiboot or PVH), instead of those in plinth.toml.
    #[arg(long, value_name = "FILE", group = "which")]
    kernel: Option<String>,
    /// Its initrd; for a multiboot kernel its modules, with their arguments behind a blank and separated by commas.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<String>,
    /// A disk of its, as an image file; may be given several times. What the guest writes is kept in
    /// memory and lost at the end. A name that ends with .iso is read-only.
    #[arg(long, value_name = "FILE", requires = "which")]
    disk: Vec<String>,
    /// Its command line [default: console=ttyS0, but nothing with --test-devices].
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    append: Option<String>,
    /// Its memory, in MiB or with a unit as 1G [default: 256M, but 128M with --test-devices, or what
    /// a guest of the catalogue has].
    #[arg(long, value_name = "SIZE", requires = "which")]
    memory: Option<String>,
    /// Its virtual processors [default: 1, or what a guest of the catalogue has].
    #[arg(long, value_name = "COUNT", requires = "which")]
    vcpus: Option<u32>,
    /// It has the devices that test kernels written for QEMU expect. With --headless, standard output is its
    /// console alone, and the exit status tells how it ended.
    #[arg(long, requires = "which", conflicts_with = "guest")]
    test_devices: bool,
}

impl GuestArgs {
    /// A configuration with this guest only; its paths are relative to the current folder. `word`: for a
    /// console in a frame.
    fn configuration(&self, word: Option<&str>) -> anyhow::Result<Option<Configuration>> {
        if self.kernel.is_none() && self.firmware_guest.is_none() {
            return Ok(None);
        }
        let mut names = Names::default();
        let disks: Vec<String> = self
            .disk
            .iter()
            .map(|disk| disk_table(disk, &names.of(disk)))
            .collect();
        let disks = disks.join(", ");
        let mut text = String::new();
        if let Some(word) = word {
            text += &format!("[host]\nconsole-frame = \"{word}\"\n\n");
        }
        text += &format!(
            "[[vm]]\nname = \"guest\"\nfocus = true\nvcpus = {}\nmemory = \"{}M\"\ntest-devices = {}\ndisks = [{disks}]\n\n[vm.boot]\n",
            self.vcpus.unwrap_or(1),
            self.memory_mib()?,
            self.test_devices,
        );
        match self.firmware_guest.as_deref() {
            Some("seabios") => text += "firmware = \"@seabios\"\n",
            Some("ovmf") => {
                text += "firmware = \"@ovmf\"\nvariables = \"@ovmf-variables\"\n";
            }
            Some(file) => text += &format!("firmware = {}\n", toml_string(&names.of(file))),
            None => {}
        }
        if let Some(kernel) = &self.kernel {
            self.add_kernel(kernel, &mut names, &mut text);
        }
        let here = std::env::current_dir().context("the current folder")?;
        let files = names.stand_ins.into_iter();
        let configuration = Configuration::new("(arguments)", text, here);
        Ok(Some(
            files.fold(configuration, |configuration, (name, path)| {
                configuration.with_file(&name, path)
            }),
        ))
    }

    /// The lines of a kernel, its initrd and its command line.
    fn add_kernel(&self, kernel: &str, names: &mut Names, text: &mut String) {
        *text += &format!("kernel = {}\n", toml_string(&names.of(kernel)));
        match &self.initrd {
            Some(modules) if is_multiboot(Path::new(kernel)) => {
                let modules: Vec<String> = split_modules(modules)
                    .iter()
                    .map(|module| toml_string(&names.of_module(module)))
                    .collect();
                *text += &format!("modules = [{}]\n", modules.join(", "));
            }
            Some(initrd) => *text += &format!("initrd = {}\n", toml_string(&names.of(initrd))),
            None => {}
        }
        let default = if self.test_devices {
            ""
        } else {
            "console=ttyS0"
        };
        let append = self.append.as_deref().unwrap_or(default);
        *text += &format!("cmdline = {}\n", toml_string(append));
    }

    /// A configuration with a guest of the catalogue only, with what was asked to be different.
    fn named(&self, guest: &Guest) -> anyhow::Result<Configuration> {
        let memory_mib = match self.memory {
            Some(_) => self.memory_mib()?,
            None => guest.memory_mib.into(),
        };
        let text = guest.configuration(memory_mib, self.vcpus.unwrap_or(guest.vcpus));
        Ok(Configuration::new("(catalogue)", text, paths::workspace()))
    }

    /// The guest's memory.
    fn memory_mib(&self) -> anyhow::Result<u64> {
        let default = if self.test_devices { "128M" } else { "256M" };
        let size = self.memory.as_deref().unwrap_or(default);
        memory_mib(size).ok_or_else(|| {
            let why =
                format!("--memory {size}: not a size; write for example 128 (MiB), 512M or 1G");
            Stop::with(Code::Usage, why)
        })
    }
}

/// What the files of the command line are called in a configuration: as written, if that can be.
#[derive(Default)]
struct Names {
    stand_ins: Vec<(String, PathBuf)>,
}

impl Names {
    /// The name for a path.
    fn of(&mut self, path: &str) -> String {
        if path.len() <= config::MAX_PATH {
            return path.to_owned();
        }
        let name = format!("file-{}", self.stand_ins.len() + 1);
        self.stand_ins.push((name.clone(), PathBuf::from(path)));
        name
    }

    /// The same for a module: a path, and arguments behind a blank.
    fn of_module(&mut self, module: &str) -> String {
        match module.split_once(' ') {
            Some((path, arguments)) => format!("{} {arguments}", self.of(path)),
            None => self.of(module),
        }
    }
}

/// Whether a file looks like a multiboot kernel. One that is not there is none; that is told later.
fn is_multiboot(kernel: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(kernel).and_then(|file| {
        file.take(FileKind::SNIFF_BYTES as u64)
            .read_to_end(&mut head)
    });
    read.is_ok()
        && FileKind::sniff(&head) != FileKind::BzImage
        && config::has_multiboot_header(&head)
}

/// Modules as QEMU's `-initrd` has them: separated by commas; two commas stand for one in a name.
fn split_modules(text: &str) -> Vec<String> {
    let mut modules = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != ',' || letters.next_if_eq(&',').is_some() {
            modules.last_mut().expect("there is one").push(letter);
        } else {
            modules.push(String::new());
        }
    }
    modules
}

/// A memory size as QEMU's `-m` takes it, in MiB: a number, perhaps with a point, and a unit. What is no
/// multiple of a VM's step is rounded up to one.
fn memory_mib(text: &str) -> Option<u64> {
    const STEP_MIB: f64 = (config::MEMORY_STEP >> 20) as f64;
    let (number, mib) = match text.chars().last()?.to_ascii_lowercase() {
        'k' => (&text[..text.len() - 1], 1.0 / 1024.0),
        'm' => (&text[..text.len() - 1], 1.0),
        'g' => (&text[..text.len() - 1], 1024.0),
        't' => (&text[..text.len() - 1], 1024.0 * 1024.0),
        _ => (text, 1.0),
    };
    let plain = number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number: f64 = number.parse().ok().filter(|_| plain)?;
    Some(((number * mib / STEP_MIB).ceil() * STEP_MIB) as u64)
}

/// A disk, as an entry of `disks`.
fn disk_table(image: &str, name: &str) -> String {
    let readonly = image.to_ascii_lowercase().ends_with(".iso");
    let image = toml_string(name);
    format!("{{ image = {image}, readonly = {readonly} }}")
}

/// A TOML basic string.
fn toml_string(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted += &format!("\\u{:04X}", u32::from(c)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Builds and runs.
///
/// # Errors
/// See [`Code`].
pub fn run(args: &Args) -> anyhow::Result<Code> {
    if args.list_guests {
        print!("{}", guests::table());
        return Ok(Code::Success);
    }
    if !args.headless || !args.own.test_devices {
        return run_shown(args);
    }
    // Statuses of 1 and 3 are a test kernel's.
    run_framed(args).or_else(|error| match Stop::code_of(&error) {
        Code::Failure | Code::MissingProgram => {
            eprintln!("error: {error:#}");
            Ok(Code::NotRun)
        }
        _ => Err(error),
    })
}

/// Runs a test kernel: its console alone on standard output, its exit status.
fn run_framed(args: &Args) -> anyhow::Result<Code> {
    let word = framed::new_word()?;
    let configuration = args
        .own
        .configuration(Some(&word))?
        .context("--test-devices needs a guest")?;
    let folder = ImageFolder::new()?;
    let mut machine = describe(args, &folder)?;
    // A BIOS is through sooner, and one processor starts sooner than two.
    machine.firmware = args.firmware.unwrap_or(Firmware::Bios);
    let vcpus = args.own.vcpus.unwrap_or(1);
    machine.cpus = args.host_cpus.unwrap_or(machine.cpus.min(vcpus).max(1));
    let builder = Builder::new(args.profile.profile())?;
    let written = builder.write(&configuration, &machine.image)?;
    if args.host_memory.is_none() {
        // The boot loader has the files in memory once more.
        let files = 2 * written.ramdisk_bytes.div_ceil(1 << 20);
        let needed = args.own.memory_mib()?.saturating_add(files + OWN_MIB);
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        machine.memory_mib = machine.memory_mib.max(needed);
        if args.emulator == Emulator::Bochs {
            machine.memory_mib = machine.memory_mib.min(emulator::BOCHS_MAX_MEMORY_MIB);
        }
    }
    if args.emulator == Emulator::Qemu {
        machine.acceleration = kvm::choose(args.accel.unwrap_or(Accel::Tcg))?;
    }
    let timeout = args.timeout.map(Duration::from_secs);
    framed::run(&machine, &word, timeout, args.verbose)
}

/// Runs with all of Plinth's console on the terminal.
fn run_shown(args: &Args) -> anyhow::Result<Code> {
    let guest = args.guest.as_deref().map(guests::by_name).transpose()?;
    // A person decides when to end; a script wants to know whether the guest came up.
    let awaited = guest.filter(|_| args.headless && args.until.is_none());
    let until = args
        .until
        .as_deref()
        .or(awaited.map(|guest| guest.proof))
        .map(Regex::new)
        .transpose()
        .map_err(|e| Stop::with(Code::Usage, format!("--until: {e}")))?;
    let configuration = match (guest, args.own.configuration(None)?) {
        (Some(guest), _) => args.own.named(guest)?,
        (None, Some(configuration)) => configuration,
        (None, None) => Configuration::read(args.config.as_deref())?,
    };
    let folder = ImageFolder::new()?;
    let mut machine = describe(args, &folder)?;
    if let Some(guest) = guest.filter(|_| args.host_memory.is_none()) {
        machine.memory_mib = machine.memory_mib.max(guest.host_memory_mib());
    }
    if let Some(shift) = awaited.and_then(|guest| guest.shift) {
        machine.time = Time::Instructions { shift };
    }
    let builder = Builder::new(args.profile.profile())?;
    builder.write(&configuration, &machine.image)?;
    if args.emulator == Emulator::Qemu {
        machine.acceleration = kvm::choose(args.accel.unwrap_or(Accel::Auto))?;
    }
    if let Some(trace) = &machine.trace {
        eprintln!("Trace: {}", paths::shown(trace));
    }
    if let Some(control) = &machine.control {
        eprintln!(
            "Control channel: {}; cargo xtask ctl vm list",
            paths::shown(control)
        );
    }
    if let Some(port) = machine.debugger_port {
        eprintln!(
            "Waiting for a debugger; in another terminal:\n  gdb -ex 'add-symbol-file {} -o \
             {KERNEL_BASE:#x}' -ex 'target remote :{port}'",
            paths::shown(&builder.debug_symbols)
        );
    }
    let limit = args.timeout.map(Duration::from_secs);
    let deadline = limit
        .or(awaited.map(|guest| guest.patience(args.emulator)))
        .map(|limit| Instant::now() + limit);
    if !args.headless {
        eprintln!(
            "Plinth's console. Ctrl-] then ? for help, Ctrl-] q to power off, Ctrl-] x to end at once."
        );
    }
    let watch: Watch = Box::new(|bytes| {
        let mut out = io::stdout().lock();
        // Nobody may be listening any more; the machine runs on to its end.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    });
    let running = machine.start_watched(Some(watch))?;
    // At the terminal the person types.
    let keys = awaited.map_or(&[][..], |guest| guest.keys);
    let awaited = Awaited {
        until: until.as_ref(),
        typist: Typist::new(keys),
        deadline,
    };
    follow(running, awaited, !args.headless)
}

/// A folder for the image of one run, removed after it. What a killed run leaves, a later one removes.
struct ImageFolder(PathBuf);

impl ImageFolder {
    fn new() -> anyhow::Result<Self> {
        let name = format!("{}-image", std::process::id());
        let folder = paths::target().join("run").join(name);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(ImageFolder(folder))
    }
}

impl Drop for ImageFolder {
    fn drop(&mut self) {
        // What cannot be removed is below target/, and removed by a later run.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The machine that the arguments ask for.
fn describe(args: &Args, folder: &ImageFolder) -> anyhow::Result<Machine> {
    let mut machine = Machine::new(args.emulator, &folder.0.join("plinth.img"));
    machine.qemu = args
        .qemu
        .as_deref()
        .map(emulator::newer::named)
        .transpose()?;
    machine.firmware = args.firmware.unwrap_or(machine.firmware);
    machine.cpus = args.host_cpus.unwrap_or(machine.cpus);
    machine.memory_mib = args.host_memory.unwrap_or(machine.memory_mib);
    let name = match args.emulator {
        Emulator::Qemu => "qemu",
        Emulator::Bochs => {
            if args.accel == Some(Accel::Kvm) {
                return Err(Stop::with(Code::Usage, "--accel kvm is for QEMU"));
            }
            "bochs"
        }
    };
    machine.trace = args
        .trace
        .then(|| paths::target().join(format!("trace-{name}.log")));
    machine.debugger_port = args.gdb.then_some(1234);
    machine.control = control_socket(args)?;
    // Before anything is built.
    machine.check()?;
    Ok(machine)
}

/// The socket of the control channel, if there is to be one.
fn control_socket(args: &Args) -> anyhow::Result<Option<PathBuf>> {
    let path = match &args.control {
        Some(Some(path)) => path.clone(),
        Some(None) => ctl::default_socket(),
        None if args.headless => return Ok(None),
        None => ctl::default_socket(),
    };
    match (ctl::is_free(&path), args.control.is_some()) {
        (true, _) => Ok(Some(path)),
        (false, true) => {
            let text = format!("--control {}: another machine has it", path.display());
            Err(Stop::with(Code::Usage, text))
        }
        (false, false) => {
            eprintln!(
                "Another machine has the control channel; --control SOCKET gives this one its own."
            );
            Ok(None)
        }
    }
}

/// What a run waits for.
struct Awaited<'a> {
    /// The output that ends it well.
    until: Option<&'a Regex>,
    /// Types what has to be typed before.
    typist: Typist,
    deadline: Option<Instant>,
}

/// Passes keys and output on until there is a reason to end.
fn follow(mut running: Running, awaited: Awaited<'_>, interactive: bool) -> anyhow::Result<Code> {
    let raw = if interactive {
        terminal::Raw::enter()?
    } else {
        None
    };
    let quit = Arc::new(AtomicBool::new(false));
    if interactive {
        pass_keys(running.keyboard(), Arc::clone(&quit));
    }
    let outcome = wait(&mut running, awaited, &quit);
    running.kill();
    drop(raw);
    let (code, words) = outcome;
    eprintln!("\n{words}");
    Ok(code)
}

/// Waits for an end: exit code, and what to say.
fn wait(running: &mut Running, awaited: Awaited<'_>, quit: &AtomicBool) -> (Code, String) {
    let Awaited {
        until,
        mut typist,
        deadline,
    } = awaited;
    let fault = Regex::new(FAULT).expect("the pattern is well-formed");
    let fault_end = Regex::new(FAULT_END).expect("the pattern is well-formed");
    let nothing = Regex::new(NOTHING_RUNS).expect("the pattern is well-formed");
    let (mut seen, mut seen_fault) = (Cursor::default(), Cursor::default());
    loop {
        if quit.load(Ordering::Relaxed) {
            return (Code::Interrupted, "Ended.".into());
        }
        let ended = running.ended();
        // A fault counts even if the line waited for came before it, and the machine may end by it.
        if let Some(found) = running.search(&fault, &mut seen_fault) {
            // The report's end, the machine's end or the time shows that there is no more to come.
            let _ = running.read_until(&fault_end, FAULT_REPORT);
            return (
                Code::Failure,
                format!("A fault of Plinth: {}", found.groups[1]),
            );
        }
        if typist.is_done(running)
            && let Some(until) = until
            && running.search(until, &mut seen).is_some()
        {
            return (Code::Success, "Seen what was waited for.".into());
        }
        match ended {
            Some(End::PoweredOff) if until.is_none() => {
                if let Some(found) = running.search(&nothing, &mut Cursor::default()) {
                    return (Code::Failure, format!("Plinth: {}.", found.groups[1]));
                }
                return (Code::Success, "Plinth powered off.".into());
            }
            Some(end) => {
                let without = if until.is_some() {
                    " without what was waited for"
                } else {
                    ""
                };
                return (Code::Failure, format!("Ended{without}: {end}."));
            }
            None => {}
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return (Code::Timeout, Missed::Timeout.to_string());
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Sends what is typed to the machine, until Ctrl-] x.
fn pass_keys(keyboard: Keyboard, quit: Arc<AtomicBool>) {
    thread::spawn(move || {
        let mut filter = QuitKeys::default();
        let mut buffer = [0; 1024];
        // At the end of a file that stands for keys, the machine runs on.
        while let Ok(read @ 1..) = io::stdin().read(&mut buffer) {
            let (passed, wants_quit) = filter.pass(&buffer[..read]);
            keyboard.send(passed);
            if wants_quit {
                quit.store(true, Ordering::Relaxed);
                return;
            }
        }
    });
}

/// Finds Ctrl-] x in what is typed.
#[derive(Default)]
struct QuitKeys {
    escaped: bool,
}

impl QuitKeys {
    /// What is for the machine, up to the keys that end all; whether those were typed. Ctrl-] itself is
    /// for the machine, since Plinth has commands that begin with it; Ctrl-] twice is one for the guest.
    fn pass<'b>(&mut self, typed: &'b [u8]) -> (&'b [u8], bool) {
        for (index, &byte) in typed.iter().enumerate() {
            if self.escaped && byte == QUIT {
                return (&typed[..index], true);
            }
            self.escaped = byte == ESCAPE && !self.escaped;
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_to_quit_are_found_across_reads() {
        let mut keys = QuitKeys::default();
        assert_eq!(keys.pass(b"ls x\r"), (&b"ls x\r"[..], false));
        assert_eq!(keys.pass(b"\x1d"), (&b"\x1d"[..], false));
        assert_eq!(keys.pass(b"xyz"), (&b""[..], true));
    }

    #[test]
    fn the_control_channels_socket_may_be_left_out() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let control = |words: &[&str]| {
            let words = ["run"].iter().chain(words);
            <Line as clap::Parser>::try_parse_from(words).map(|line| line.args.control)
        };
        assert_eq!(control(&["--headless"]).unwrap(), None);
        let left_out = control(&["--control", "--headless"]);
        assert_eq!(left_out.unwrap(), Some(None));
        let named = control(&["--control", "a.sock"]);
        assert_eq!(named.unwrap(), Some(Some("a.sock".into())));
    }

    #[test]
    fn an_escaped_escape_is_for_the_guest() {
        let mut keys = QuitKeys::default();
        assert_eq!(keys.pass(b"\x1d\x1dx"), (&b"\x1d\x1dx"[..], false));
        assert_eq!(keys.pass(b"\x1d1\x1dx"), (&b"\x1d1\x1d"[..], true));
    }

    #[test]
    fn a_guest_of_ones_own_becomes_a_configuration() {
        let guest = GuestArgs {
            kernel: Some("a \"b\"\\c".into()),
            initrd: Some("i".into()),
            append: Some("console=ttyS0 quiet".into()),
            memory: Some("1G".into()),
            vcpus: Some(3),
            disk: vec!["a.img".into(), "b.ISO".into()],
            ..GuestArgs::default()
        };
        let configuration = guest.configuration(None).unwrap().unwrap();
        let parsed = manage::config::parse("x", &configuration.text);
        assert!(parsed.problems.is_empty(), "{}", parsed.report());
        let vm = &parsed.vms[0];
        assert_eq!(vm.boot.kernel.as_deref(), Some("a \"b\"\\c"));
        assert_eq!(vm.boot.initrd.as_deref(), Some("i"));
        assert_eq!(vm.boot.cmdline, "console=ttyS0 quiet");
        assert_eq!((vm.memory, vm.vcpus), (1 << 30, 3));
        let disks: Vec<_> = vm.disks.iter().map(|d| (&*d.image, d.readonly)).collect();
        assert_eq!(disks, [("a.img", false), ("b.ISO", true)]);
    }

    #[test]
    fn a_test_kernel_becomes_a_configuration() {
        let kernel = format!("/{}/kernel", "long".repeat(60));
        let guest = GuestArgs {
            kernel: Some(kernel.clone()),
            test_devices: true,
            ..GuestArgs::default()
        };
        let word = framed::new_word().unwrap();
        let configuration = guest.configuration(Some(&word)).unwrap().unwrap();
        let parsed = manage::config::parse("x", &configuration.text);
        assert!(parsed.problems.is_empty(), "{}", parsed.report());
        assert_eq!(parsed.host.console_frame, Some(word));
        let vm = &parsed.vms[0];
        assert_eq!(
            (vm.boot.kernel.as_deref(), &*vm.boot.cmdline),
            (Some("file-1"), "")
        );
        assert!(vm.test_devices && vm.memory == 128 << 20 && vm.vcpus == 1);
        assert_eq!(configuration.files(), [("file-1".into(), kernel.into())]);
    }

    #[test]
    fn firmware_becomes_a_configuration() {
        let boot = |firmware: &str, kernel: Option<&str>| {
            let guest = GuestArgs {
                firmware_guest: Some(firmware.into()),
                kernel: kernel.map(Into::into),
                ..GuestArgs::default()
            };
            let configuration = guest.configuration(None).unwrap().unwrap();
            let mut parsed = manage::config::parse("x", &configuration.text);
            assert!(parsed.problems.is_empty(), "{}", parsed.report());
            parsed.vms.remove(0).boot
        };
        let ovmf = boot("ovmf", Some("k"));
        let paths: Vec<&str> = ovmf.paths().collect();
        assert_eq!(paths, ["@ovmf", "@ovmf-variables", "k"]);
        let own = boot("rom.bin", None);
        assert_eq!(own.paths().collect::<Vec<_>>(), ["rom.bin"]);
    }

    #[test]
    fn modules_are_split_as_qemu_does() {
        assert_eq!(split_modules("a"), ["a"]);
        assert_eq!(split_modules("a b=c,d,,e"), ["a b=c", "d,e"]);
        assert_eq!(split_modules("a,"), ["a", ""]);
    }

    #[test]
    fn memory_sizes_are_qemus() {
        let sizes = ["128", "128M", "1g", "1.5G", "2048k", "33"].map(memory_mib);
        assert_eq!(sizes, [128, 128, 1024, 1536, 2, 34].map(Some));
        for bad in ["", "M", "-1", "1e3", "12x"] {
            assert_eq!(memory_mib(bad), None, "{bad}");
        }
    }

    #[test]
    fn nothing_to_run_is_no_success() {
        let nothing = Regex::new(NOTHING_RUNS).unwrap();
        let line = b"[    2.741321] error: no VM runs: powering off\r\n";
        assert_eq!(
            &nothing.captures(line).unwrap()[1],
            b"no VM runs: powering off"
        );
    }

    #[test]
    fn a_fault_is_told_from_a_guests_words() {
        let fault = Regex::new(FAULT).unwrap();
        let found = fault.captures(b"x\r\nHOST FAULT: page fault\r\n").unwrap();
        assert_eq!(&found[1], b"page fault");
        assert!(fault.is_match(b"[   1.234] HOST FAULT: panic"));
        assert!(!fault.is_match(b"no HOST FAULT: here"));
    }
}
