//! Where the instructions of one operation go: the kernel's functions, from QEMU's execution log.
//!
//! The measuring guest waits for a key. Then the log is switched on by QEMU's human monitor,
//! one translation block per instruction, and the key is sent. What the kernel executes
//! between a guest's instruction and the next one is an exit; those that happen exactly once in
//! each sample belong to the operation.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use super::{Guest, Guests, LIMIT, figures::Place, machine};
use crate::{emulator::Regex, image::Builder, paths, progress::Step};

/// Samples that are taken; few, since each instruction is a line in the log, and no operation takes fewer.
const ITERATIONS: u64 = 97;
/// What the guest runs before the first sample.
const WARM_UP: u64 = 16;

/// Addresses from here on are the kernel's.
const UPPER_HALF: u64 = 1 << 63;
/// Where the boot loader puts the kernel's image.
const KERNEL_BASE: u64 = 0xffff_8000_0000_0000;

/// The longest to wait for an answer of the monitor.
const ANSWER: Duration = Duration::from_secs(30);

/// Prints the kernel's functions in one round trip of an operation, the costliest first.
///
/// # Errors
/// The operation does not exist or does not exit, or the machine does not start.
pub fn run(builder: &Builder, guests: &Guests, operation: &str) -> anyhow::Result<()> {
    ensure!(
        operation
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-'),
        "--profile takes an operation's name, as in bench/results.json"
    );
    let step = Step::start(format!("Tracing {operation}"));
    let guest = if Guest::PAIR_OPERATIONS.contains(&operation) {
        Guest::Pair
    } else {
        Guest::Stub
    };
    let command_line =
        format!("mode=bench facts=off start=key only={operation} iterations={ITERATIONS} end=halt");
    let image = paths::target().join("bench-profile.img");
    let configuration = guest.configuration_with(guests, &command_line);
    builder.write_unchecked(&configuration, &image)?;
    let log = trace(&image, operation)?;
    let symbols = Symbols::parse(builder.symbols());
    let counted = count(BufReader::new(File::open(&log)?))?;
    std::fs::remove_file(&log)?;
    step.done();
    let mut functions: BTreeMap<String, f64> = BTreeMap::new();
    let mut exits = 0;
    // The compiler may have made one loop of warm-up and samples, or two.
    let per_trip = |exit: &&Exit| [ITERATIONS, ITERATIONS + WARM_UP].contains(&exit.count);
    for exit in counted.values().filter(per_trip) {
        exits += 1;
        for (&pc, &count) in &exit.executed {
            *functions.entry(symbols.name(pc)).or_default() += count as f64 / exit.count as f64;
        }
    }
    if exits == 0 {
        bail!("{operation}: no exit happens once in each sample, or there is no such operation");
    }
    let mut functions: Vec<(String, f64)> = functions.into_iter().collect();
    functions.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let sum: f64 = functions.iter().map(|(_, count)| count).sum();
    println!(
        "{operation}: the kernel's instructions per round trip, by function ({exits} exits each)\n"
    );
    for (name, count) in functions {
        println!("{count:>9.1}  {name}");
    }
    println!("{sum:>9.1}  in all");
    Ok(())
}

/// Runs the guest with the log switched on while it measures; the log's file.
fn trace(image: &Path, operation: &str) -> anyhow::Result<PathBuf> {
    let log = paths::target().join("bench-profile.log");
    // Short: a socket's name has 107 bytes at most.
    let socket = std::env::temp_dir().join(format!("plinth-{}", std::process::id()));
    let mut machine = machine(Place::QemuAmdv, image);
    machine.extra = vec![
        "-singlestep".into(),
        "-d".into(),
        "nochain".into(),
        "-D".into(),
        log.display().to_string(),
        "-monitor".into(),
        format!("unix:{},server=on,wait=off", socket.display()),
    ];
    let mut running = machine.start_watched(None)?;
    let result = (|| {
        running.read_until(&Regex::new("bench: press a key")?, LIMIT)?;
        let mut monitor = Monitor::connect(&socket)?;
        monitor.command("log exec,nochain")?;
        running.send("\n");
        running.read_until(&Regex::new("bench: done")?, LIMIT)?;
        anyhow::Ok(())
    })();
    running.kill();
    // QEMU may have removed it.
    let _ = std::fs::remove_file(&socket);
    result.with_context(|| format!("tracing {operation}"))?;
    Ok(log)
}

/// QEMU's human monitor.
struct Monitor(UnixStream);

impl Monitor {
    fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).context("QEMU's monitor")?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut monitor = Monitor(stream);
        monitor.prompt()?;
        Ok(monitor)
    }

    fn command(&mut self, line: &str) -> anyhow::Result<()> {
        self.0.write_all(format!("{line}\n").as_bytes())?;
        self.prompt()
    }

    /// Reads up to the prompt that follows an answer.
    fn prompt(&mut self) -> anyhow::Result<()> {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(b"(qemu) ") {
            self.0.read_exact(&mut byte).context("QEMU's monitor")?;
            seen.push(byte[0]);
        }
        Ok(())
    }
}

/// Exits at one instruction of the guest.
#[derive(Default)]
struct Exit {
    count: u64,
    /// How often the kernel's instructions were executed, by address.
    executed: BTreeMap<u64, u64>,
}

/// Exits by the guest's instruction, from the lines of a log.
fn count(log: impl BufRead) -> anyhow::Result<BTreeMap<u64, Exit>> {
    let mut exits: BTreeMap<u64, Exit> = BTreeMap::new();
    let mut guest = None;
    let mut in_kernel = false;
    for line in log.lines() {
        let Some(pc) = address(&line?) else { continue };
        if pc < UPPER_HALF {
            guest = Some(pc);
            in_kernel = false;
        } else if let Some(guest) = guest {
            let exit = exits.entry(guest).or_default();
            if !in_kernel {
                exit.count += 1;
            }
            in_kernel = true;
            *exit.executed.entry(pc).or_default() += 1;
        }
    }
    Ok(exits)
}

/// The address in a line `Trace 0: 0x7f.. [00000000/ffff8000.../..] name`.
fn address(line: &str) -> Option<u64> {
    let (_, inside) = line.strip_prefix("Trace ")?.split_once('[')?;
    u64::from_str_radix(inside.split('/').nth(1)?, 16).ok()
}

/// The kernel's functions.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// Reads lines `offset name`, by offset.
    fn parse(text: &str) -> Self {
        let functions = text.lines().filter_map(|line| {
            let (offset, name) = line.split_once(' ')?;
            let offset = u64::from_str_radix(offset, 16).ok()?;
            Some((offset, format!("{:#}", rustc_demangle::demangle(name))))
        });
        Symbols(functions.collect())
    }

    fn name(&self, pc: u64) -> String {
        let offset = pc.wrapping_sub(KERNEL_BASE);
        let after = self.0.partition_point(|(start, _)| *start <= offset);
        match after.checked_sub(1) {
            Some(index) => self.0[index].1.clone(),
            None => format!("{pc:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
Trace 0: 0x7f40 [00000000/0000000000100010/0040c0b3/ff000201] 
Trace 0: 0x7f41 [00000000/ffff800000000100/0040c0b3/ff000201] 
Trace 0: 0x7f42 [00000000/ffff800000000204/0040c0b3/ff000201] 
Trace 0: 0x7f43 [00000000/ffff800000000204/0040c0b3/ff000201] 
Stopped execution of TB chain before 0x7f43
Trace 0: 0x7f44 [00000000/0000000000100012/0040c0b3/ff000201] 
Trace 0: 0x7f44 [00000000/0000000000100010/0040c0b3/ff000201] 
Trace 0: 0x7f41 [00000000/ffff800000000100/0040c0b3/ff000201] 
";

    #[test]
    fn exits_are_told_apart_by_the_guests_instruction() {
        let exits = count(LOG.as_bytes()).unwrap();
        assert_eq!(exits.len(), 1);
        let exit = &exits[&0x10_0010];
        assert_eq!(exit.count, 2);
        assert_eq!(exit.executed[&0xffff_8000_0000_0204], 2);
        assert_eq!(exit.executed[&0xffff_8000_0000_0100], 2);
    }

    #[test]
    fn functions_are_found_by_where_they_begin() {
        let symbols = Symbols::parse("100 _ZN6kernel4exitE\n200 other\n");
        assert_eq!(symbols.name(KERNEL_BASE + 0x1ff), "kernel::exit");
        assert_eq!(symbols.name(KERNEL_BASE + 0x200), "other");
        assert_eq!(symbols.name(KERNEL_BASE), "0xffff800000000000");
    }
}
