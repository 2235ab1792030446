//! Bochs: its configuration, a screen for it to draw on, and why it ended.
//!
//! Distributions build Bochs with its debugger, which waits at a prompt unless a file of
//! commands says `c`. It exits with 1 whatever happened, so its log tells the end.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::{
    End, EndSource, Machine, Time,
    pty::{Pty, Screen, open_slave},
};
use crate::{
    deps::{self, Program},
    process::{Guarded, dies_with_us, last_lines},
};

/// Beyond this Bochs takes long to start, or shows less than asked for.
pub const MAX_MEMORY_MIB: u32 = 2048;

/// The processor with VT-x, EPT, VPID, unrestricted guest and APIC virtualization.
const MODEL: &str = "corei7_haswell_4770";

/// Instructions per second that emulated time assumes, unless the machine says otherwise.
const INSTRUCTIONS_PER_SECOND: u32 = 50_000_000;

/// Seconds since 1970 that the emulated clock starts with.
const START_TIME: u32 = 1_700_000_000;

/// Starts Bochs on a machine whose files go to `folder`, with COM1 on `device` and COM2 on `control`.
pub fn start(
    machine: &Machine,
    folder: &Path,
    device: &Path,
    control: Option<&Path>,
) -> anyhow::Result<(Guarded, EndSource)> {
    deps::require(&[Program::Bochs])?;
    let log = machine
        .trace
        .clone()
        .unwrap_or_else(|| folder.join("bochs.log"));
    let configuration = folder.join("bochsrc");
    fs::write(
        &configuration,
        configure(machine, folder, (device, control), &log),
    )?;
    let commands = folder.join("commands");
    fs::write(&commands, "c\n")?;
    // Its screen is text on a terminal that somebody must read, or it stands still.
    let terminal = Pty::open()?;
    let mut command = dies_with_us("bochs");
    command
        .args(["-q", "-unlock", "-f"])
        .arg(&configuration)
        .arg("-rc")
        .arg(&commands)
        .env("TERM", "xterm")
        .env("LINES", "25")
        .env("COLUMNS", "80")
        .stdin(terminal.slave.try_clone()?)
        .stdout(terminal.slave.try_clone()?)
        .stderr(terminal.slave);
    let child = Guarded::spawn(command)?;
    let screen = Screen::drain(terminal.master);
    Ok((child, EndSource::Log { log, screen }))
}

/// The text of Bochs' configuration file.
fn configure(
    machine: &Machine,
    folder: &Path,
    (device, control): (&Path, Option<&Path>),
    log: &Path,
) -> String {
    let (cpus, memory) = (machine.cpus, machine.memory_mib);
    let model = machine.cpu_model.as_deref().unwrap_or(MODEL);
    let ips = match machine.time {
        Time::Workstation => INSTRUCTIONS_PER_SECOND,
        Time::Instructions { shift } => 1_000_000_000u32.checked_shr(shift.into()).unwrap_or(0),
    };
    let chatter = if machine.trace.is_some() {
        "report"
    } else {
        "ignore"
    };
    let (image, folder) = (machine.image.display(), folder.display());
    let (device, log) = (device.display(), log.display());
    let mut text = format!(
        "config_interface: textconfig\n\
         display_library: term\n\
         cpu: model={model}, count={cpus}, ips={ips}, \
         reset_on_triple_fault=0, ignore_bad_msrs=0\n\
         memory: guest={memory}, host={memory}\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
         vga: extension=vbe, update_freq=1\n\
         pci: enabled=1, chipset=i440fx\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata1: enabled=0\n\
         ata0-master: type=disk, path=\"{image}\", mode=volatile, journal=\"{folder}/journal\"\n\
         boot: disk\n\
         clock: sync=none, time0={START_TIME}\n\
         com1: enabled=1, mode=term, dev={device}\n\
         port_e9_hack: enabled=0\n\
         log: {log}\n\
         logprefix: %t%e%d\n\
         panic: action=fatal, term=report\n\
         error: action=report\n\
         info: action={chatter}\n\
         debug: action=ignore, term=report, keyboard=report\n"
    );
    if let Some(control) = control {
        writeln!(
            text,
            "com2: enabled=1, mode=term, dev={}",
            control.display()
        )
        .expect("a String takes any text");
    }
    for line in &machine.extra {
        writeln!(text, "{line}").expect("a String takes any text");
    }
    text
}

/// Between two looks at Bochs' log.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What Bochs' log says of its keyboard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Keys {
    /// Bytes that the display took.
    taken: usize,
    /// Scan codes that they became.
    made: usize,
    /// Bytes that the machine has read.
    read: usize,
}

impl Keys {
    fn count(log: &str) -> Self {
        Self {
            taken: log.matches("] scancode(").count(),
            made: log.matches("putting scancode").count(),
            read: log.matches("] READ(60)").count(),
        }
    }

    /// Whether a byte was typed since and the machine has read all of it.
    fn are_read_since(self, before: Self) -> bool {
        let made = self.made - before.made;
        self.taken > before.taken && made > 0 && self.read - before.read >= made
    }
}

/// Types on the keyboard of Bochs' machine. A key is typed when the machine has read the one before: the keyboard
/// has room for a few only, and its time goes by the instructions that were run.
///
/// # Errors
/// The machine does not read a key within the time, or Bochs has not begun.
pub fn type_text(text: &str, log: &Path, screen: &Screen, timeout: Duration) -> anyhow::Result<()> {
    // Its debugger keeps the terminal on which it was started, and its display makes one of its own.
    let said = screen.text();
    let terminal = said
        .split_once("connected to screen \"")
        .and_then(|(_, after)| after.split_once('"'))
        .map(|(path, _)| PathBuf::from(path))
        .context("Bochs has not said where its screen is")?;
    let mut terminal = open_slave(&terminal)?;
    let keys = || -> anyhow::Result<Keys> { Ok(Keys::count(&fs::read_to_string(log)?)) };
    for byte in text.bytes() {
        let before = keys()?;
        // The display takes a newline for the Enter key.
        terminal.write_all(&[if byte == b'\r' { b'\n' } else { byte }])?;
        let deadline = Instant::now() + timeout;
        while !keys()?.are_read_since(before) {
            ensure!(
                Instant::now() < deadline,
                "the machine did not read key {byte:#x}"
            );
            thread::sleep(LOOK_AGAIN);
        }
    }
    Ok(())
}

/// Why Bochs ended: by its log, or, when it did not get that far, by its screen.
pub fn end(log: &str, screen: &str) -> End {
    // The text display complains of graphics modes that it cannot show, and goes on.
    let panic = log
        .lines()
        .filter(|line| !line.contains("[TERM"))
        .find_map(|line| line.split_once(">>PANIC<<").map(|(_, words)| words.trim()));
    match panic {
        Some(words) if words.contains("soft power off") || words.contains("shutdown requested") => {
            End::PoweredOff
        }
        Some(words) => End::Emulator(words.to_owned()),
        None => End::Emulator(format!(
            "no reason in its log; on its screen: {}",
            last_lines(&without_controls(screen), 5).trim()
        )),
    }
}

/// A terminal's output without control sequences.
fn without_controls(text: &str) -> String {
    let sequences =
        regex::Regex::new(r"\x1b(\[[0-9;?]*[A-Za-z]|[()].|[=>78])|[\x00-\x09\x0b-\x1f]")
            .expect("the pattern is well-formed");
    sequences.replace_all(text, "").into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::Emulator;

    #[test]
    fn the_configuration_says_what_the_machine_is() {
        let mut machine = Machine::new(Emulator::Bochs, Path::new("/x/plinth.img"));
        machine.cpus = 4;
        machine.memory_mib = 512;
        machine.extra.push("port_e9_hack: enabled=1".into());
        let text = configure(
            &machine,
            Path::new("/r"),
            (Path::new("/dev/pts/3"), Some(Path::new("/dev/pts/4"))),
            Path::new("/r/log"),
        );
        let has = |line: &str| text.lines().any(|l| l.starts_with(line));
        assert!(has("cpu: model=corei7_haswell_4770, count=4,"), "{text}");
        assert!(has("memory: guest=512, host=512"));
        assert!(has(
            "ata0-master: type=disk, path=\"/x/plinth.img\", mode=volatile"
        ));
        assert!(has("com1: enabled=1, mode=term, dev=/dev/pts/3"));
        assert!(has("com2: enabled=1, mode=term, dev=/dev/pts/4"));
        assert!(has("port_e9_hack: enabled=1"));
    }

    #[test]
    fn time_may_pass_quicker() {
        let mut machine = Machine::new(Emulator::Bochs, Path::new("x"));
        let text = |machine: &Machine| {
            configure(
                machine,
                Path::new("r"),
                (Path::new("d"), None),
                Path::new("l"),
            )
        };
        assert!(text(&machine).contains("ips=50000000,"));
        machine.time = Time::Instructions { shift: 6 };
        assert!(text(&machine).contains("ips=15625000,"));
    }

    #[test]
    fn a_key_is_read_when_all_its_codes_are() {
        let begin = "000d[KBD   ] READ(60) = fa\n";
        let taken = "000d[TERM  ] scancode(0x76)\n";
        let made = "000d[KBD   ] kbd_enQ: putting scancode 0x2f in internal buffer\n";
        let read = "000d[KBD   ] READ(60) = 2f\n";
        let before = Keys::count(begin);
        let done = |more: &str| Keys::count(&format!("{begin}{more}")).are_read_since(before);
        assert!(!done("") && !done(taken));
        assert!(!done(&[taken, made, made, read].concat()));
        assert!(done(&[taken, made, read, made, read].concat()));
    }

    #[test]
    fn a_power_off_is_no_failure() {
        let log = "000p[ACPI  ] >>PANIC<< ACPI control: soft power off\n";
        assert_eq!(end(log, ""), End::PoweredOff);
        let log = "000p[CPU0  ] >>PANIC<< exception(): 3rd (8) exception with no resolution\n";
        assert_eq!(
            end(log, ""),
            End::Emulator("exception(): 3rd (8) exception with no resolution".into())
        );
    }

    #[test]
    fn a_bad_start_is_told_by_the_screen() {
        let End::Emulator(words) = end("", "\x1b[2Jno such model\r\n") else {
            panic!("not the emulator's end");
        };
        assert!(words.ends_with("no such model"), "{words}");
    }
}
