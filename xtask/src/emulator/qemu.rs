//! QEMU: arguments, its machine monitor, and why it ended.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::Context;

use super::{Acceleration, End, EndSource, Firmware, Machine, Time, newer::firmware_folders};
use crate::{
    deps::{self, Program},
    process::{Guarded, dies_with_us, last_lines},
};

/// QEMU's own emulation, all processors in one thread.
///
/// QEMU 7.2 and 10.0.2: with a thread per processor, each load of the x87 status word (FXRSTOR, XRSTOR, FLDENV) on any
/// processor writes the first one's internal flags, without a lock. When that one is at a world switch just then, it
/// goes on with nested paging on in the host, or off in the guest: a triple fault, in 6 of 61 boots of two guests.
const TCG: &str = "tcg,thread=single";
/// Date of a machine whose runs repeat exactly.
const FIXED_DATE: &str = "2024-01-01T00:00:00";

/// Starts QEMU on a machine whose files go to `folder`, with its first serial port on `device`.
///
/// Its own emulation (7.2 and 10.0.2) gets one of the workstation's processors for all its threads. VMRUN and #VMEXIT change the
/// emulated processor's pending requests (`CPUState.interrupt_request`) by one instruction without a lock, while
/// timers and serial ports add to them from another thread. With a processor for each thread either change can be lost: the
/// machine's timer interrupt, or the virtual interrupt that VMRUN was to deliver. A guest then hung, in 3 of 56 boots.
pub fn start(
    machine: &Machine,
    folder: &Path,
    device: &Path,
) -> anyhow::Result<(Guarded, EndSource)> {
    let program = match &machine.qemu {
        Some(program) => program.as_os_str(),
        None => {
            deps::require(&[Program::Qemu])?;
            OsStr::new("qemu-system-x86_64")
        }
    };
    let firmware = match machine.firmware {
        Firmware::Bios => None,
        Firmware::Uefi => {
            deps::require(&[Program::Ovmf])?;
            let files = deps::ovmf_files().context("OVMF's files were not found")?;
            // The firmware writes its settings; each machine has its own.
            let variables = folder.join("variables.fd");
            fs::copy(&files.variables, &variables)?;
            Some((files.code, variables))
        }
    };
    let errors = folder.join("errors");
    let mut command = dies_with_us(program);
    command
        .args(arguments(machine, firmware.as_ref(), device))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(File::create(&errors)?);
    let mut child = match machine.acceleration {
        Acceleration::Emulated => Guarded::spawn_on_one_processor(command)?,
        Acceleration::Kvm => Guarded::spawn(command)?,
    };
    let to = child.child().stdin.take().expect("stdin is piped");
    let to = Monitor(Arc::new(Mutex::new(to)));
    let from = child.child().stdout.take().expect("stdout is piped");
    let reason = Arc::new(Mutex::new(None));
    let follower = follow_monitor(to.clone(), from, Arc::clone(&reason));
    let source = EndSource::Monitor {
        monitor: to,
        reason,
        follower,
        errors,
    };
    Ok((child, source))
}

/// QEMU's arguments for a machine. `firmware`: code and variables of the UEFI firmware.
fn arguments(
    machine: &Machine,
    firmware: Option<&(PathBuf, PathBuf)>,
    device: &Path,
) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |parts: &[&str]| args.extend(parts.iter().map(ToString::to_string));
    add(&["-nodefaults", "-no-user-config", "-display", "none"]);
    for folder in machine
        .qemu
        .iter()
        .flat_map(|program| firmware_folders(program))
    {
        add(&["-L", &folder.display().to_string()]);
    }
    add(&["-machine", "q35", "-no-reboot"]);
    add(&["-smp", &machine.cpus.to_string()]);
    add(&["-m", &format!("{}M", machine.memory_mib)]);
    let (accelerator, model) = match machine.acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        Acceleration::Emulated => (TCG, "max"),
    };
    add(&["-accel", accelerator]);
    let model = machine.cpu_model.as_deref().unwrap_or(model);
    if let (Time::Instructions { shift }, Acceleration::Emulated) =
        (machine.time, machine.acceleration)
    {
        // No random numbers from outside, and time that passes with instructions only.
        add(&["-cpu", &format!("{model},-rdrand,-rdseed")]);
        add(&["-icount", &format!("shift={shift},sleep=off"), "-seed", "1"]);
        add(&["-rtc", &format!("base={FIXED_DATE},clock=vm")]);
    } else {
        add(&["-cpu", model]);
    }
    if let Some((code, variables)) = firmware {
        let drive =
            |path: &Path, more: &str| format!("if=pflash,format=raw,{more}file={}", escaped(path));
        add(&["-drive", &drive(code, "readonly=on,")]);
        add(&["-drive", &drive(variables, "")]);
    }
    let image = escaped(&machine.image);
    add(&[
        "-drive",
        &format!("if=none,id=boot,format=raw,snapshot=on,file={image}"),
    ]);
    add(&["-device", "ide-hd,drive=boot,bootindex=1"]);
    // The boot loader needs a screen to draw on.
    add(&["-device", "VGA"]);
    add(&[
        "-chardev",
        &format!("serial,id=com1,path={}", escaped(device)),
    ]);
    add(&["-serial", "chardev:com1"]);
    if let Some(path) = &machine.control {
        let socket = format!("socket,id=com2,path={},server=on,wait=off", escaped(path));
        add(&["-chardev", &socket, "-serial", "chardev:com2"]);
    }
    add(&["-chardev", "stdio,id=monitor,signal=off"]);
    add(&["-mon", "chardev=monitor,mode=control"]);
    add(&["-nic", "none"]);
    if let Some(trace) = &machine.trace {
        add(&[
            "-d",
            "int,cpu_reset,guest_errors",
            "-D",
            &trace.display().to_string(),
        ]);
    }
    if let Some(port) = machine.debugger_port {
        add(&["-S", "-gdb", &format!("tcp:127.0.0.1:{port}")]);
    }
    args.extend(machine.extra.iter().cloned());
    args
}

/// A file's name inside an option, where a comma ends the value unless doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// QEMU's monitor, to give it commands.
#[derive(Clone)]
pub struct Monitor(Arc<Mutex<ChildStdin>>);

impl Monitor {
    /// Gives a command. Should QEMU be gone already, its error text tells why.
    fn say(&self, command: &str) {
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = to.write_all(format!("{command}\n").as_bytes());
    }

    /// Has it write what the machine's screen shows to a file, as a PPM; it is whole some time later.
    pub fn dump_screen(&self, file: &Path) {
        // A name with a quote would end the text; ours have none.
        let name = file.display();
        self.say(&format!(
            "{{\"execute\":\"screendump\",\"arguments\":{{\"filename\":\"{name}\"}}}}"
        ));
    }

    /// Has it keep the machine, its screen too, when that powers itself off, until [`Monitor::quit`].
    pub fn keep_when_off(&self) {
        self.say("{\"execute\":\"set-action\",\"arguments\":{\"shutdown\":\"pause\"}}");
    }

    /// Ends QEMU.
    pub fn quit(&self) {
        self.say("{\"execute\":\"quit\"}");
    }

    /// Presses the keys that make a character, one after the other, and releases them. What is typed at once QEMU
    /// keeps, and types in the machine's time.
    ///
    /// # Errors
    /// We do not know the keys.
    pub fn type_character(&self, character: char) -> anyhow::Result<()> {
        let keys = keys_of(character)
            .with_context(|| format!("no key is known that types {character:?}"))?;
        let keys: Vec<_> = keys
            .iter()
            .map(|key| format!("{{\"type\":\"qcode\",\"data\":\"{key}\"}}"))
            .collect();
        self.say(&format!(
            "{{\"execute\":\"send-key\",\"arguments\":{{\"hold-time\":{HOLD_MS},\"keys\":[{}]}}}}",
            keys.join(",")
        ));
        Ok(())
    }
}

/// How long a key is held, and how long none is held before the next one: milliseconds of the machine's time.
const HOLD_MS: u32 = 25;

/// QEMU's names of the keys that make a character on a US keyboard, modifiers first (QAPI, `QKeyCode`).
fn keys_of(character: char) -> Option<Vec<String>> {
    let plain = match character {
        'a'..='z' | '0'..='9' => return Some(vec![character.to_string()]),
        ' ' => "spc",
        '-' => "minus",
        '=' => "equal",
        '.' => "dot",
        '\r' => "ret",
        '\t' => "tab",
        '\x01' => return Some(vec!["ctrl".to_owned(), "a".to_owned()]),
        _ => return None,
    };
    Some(vec![plain.to_owned()])
}

/// Speaks to QEMU's monitor: notes why the machine ended, and ends QEMU when it would only
/// stand still after an error of its own.
fn follow_monitor(
    to: Monitor,
    from: ChildStdout,
    reason: Arc<Mutex<Option<String>>>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        to.say("{\"execute\":\"qmp_capabilities\"}");
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let found = match string_field(&line, "event") {
                Some("SHUTDOWN") => string_field(&line, "reason").map(str::to_owned),
                Some("STOP" | "GUEST_PANICKED") => {
                    to.say("{\"execute\":\"query-status\"}");
                    None
                }
                _ if string_field(&line, "status") == Some("internal-error") => {
                    to.quit();
                    Some("internal-error".to_owned())
                }
                _ => None,
            };
            if let Some(found) = found {
                reason
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(found);
            }
        }
    })
}

/// The value of a string field in a line of the monitor, which writes `"name": "value"`.
fn string_field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let after = line.split_once(&format!("\"{name}\": \""))?.1;
    after.split_once('"').map(|(value, _)| value)
}

/// Why QEMU ended: the monitor's reason, what it wrote as errors, its status.
pub fn end(reason: Option<&str>, errors: &str, status: ExitStatus) -> End {
    match reason {
        Some("guest-shutdown") => End::PoweredOff,
        Some("guest-reset") => End::Reset,
        Some(reason) => End::Emulator(format!("{reason} {}", last_lines(errors, 5)).trim().into()),
        None => End::Emulator(format!("{status} {}", last_lines(errors, 5)).trim().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::Emulator;
    use std::os::unix::process::ExitStatusExt;

    fn machine() -> Machine {
        Machine::new(Emulator::Qemu, Path::new("a,b.img"))
    }

    fn after<'a>(args: &'a [String], name: &str) -> Vec<&'a str> {
        let pairs = args.windows(2).filter(|pair| pair[0] == name);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn arguments_say_what_the_machine_is() {
        let args = arguments(&machine(), None, Path::new("/dev/pts/9"));
        assert_eq!(after(&args, "-smp"), ["2"]);
        assert_eq!(after(&args, "-m"), ["1024M"]);
        assert_eq!(after(&args, "-accel"), [TCG]);
        assert_eq!(after(&args, "-cpu"), ["max"]);
        assert!(after(&args, "-drive")[0].ends_with("file=a,,b.img"));
        assert!(after(&args, "-chardev")[0].ends_with("path=/dev/pts/9"));
        assert!(
            !args
                .iter()
                .any(|a| a == "-S" || a == "-icount" || a == "-d")
        );
    }

    #[test]
    fn characters_have_keys() {
        for character in (' '..='~').chain("\r\t\x01".chars()) {
            let keys = keys_of(character);
            let known = character.is_ascii_lowercase()
                || character.is_ascii_digit()
                || " -=.\r\t\x01".contains(character);
            assert_eq!(keys.is_some(), known, "{character:?}");
        }
        assert_eq!(keys_of('\x01').unwrap(), ["ctrl", "a"]);
    }

    #[test]
    fn counting_instructions_takes_randomness_away() {
        let counting = Machine {
            time: Time::Instructions { shift: 2 },
            ..machine()
        };
        let args = arguments(&counting, None, Path::new("x"));
        assert_eq!(after(&args, "-cpu"), ["max,-rdrand,-rdseed"]);
        assert_eq!(after(&args, "-icount"), ["shift=2,sleep=off"]);
    }

    #[test]
    fn the_second_serial_port_is_a_socket() {
        let with = Machine {
            control: Some("a,b".into()),
            ..machine()
        };
        let args = arguments(&with, None, Path::new("x"));
        assert_eq!(after(&args, "-serial"), ["chardev:com1", "chardev:com2"]);
        assert!(after(&args, "-chardev")[1].contains("path=a,,b,server=on,wait=off"));
    }

    #[test]
    fn the_firmware_comes_before_the_disk() {
        let firmware = (PathBuf::from("code.fd"), PathBuf::from("variables.fd"));
        let args = arguments(&machine(), Some(&firmware), Path::new("x"));
        let drives = after(&args, "-drive");
        assert_eq!(drives.len(), 3);
        assert!(drives[0].contains("readonly=on") && drives[0].ends_with("code.fd"));
        assert!(!drives[1].contains("readonly=on"));
    }

    #[test]
    fn the_end_is_told_by_the_monitor() {
        let line = r#"{"timestamp": {"seconds": 1}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#;
        assert_eq!(string_field(line, "event"), Some("SHUTDOWN"));
        let reason = string_field(line, "reason");
        let ok = ExitStatus::from_raw(0);
        assert_eq!(end(reason, "", ok), End::Reset);
        assert_eq!(end(Some("guest-shutdown"), "", ok), End::PoweredOff);
        let failed = end(None, "no such device\n", ExitStatus::from_raw(256));
        assert_eq!(
            failed,
            End::Emulator("exit status: 1 no such device".into())
        );
    }
}
