//! `cargo xtask image`: the kernel, its configuration and all that it names, as one disk image.
//!
//! [`Builder::new`] makes what every image shares: the kernel, without its symbols, and the
//! boot loader's parts. [`Builder::write`] packs a configuration with the files that it names
//! and writes the image.

mod configuration;
pub mod disk;
mod symbols;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;
use manage::bundle::{self, Writer};

pub use configuration::Configuration;
use disk::BootParts;

use crate::{
    exit::{Code, Stop},
    guests::write_whole,
    paths,
    process::output_of,
    progress::Step,
    toolchain::{Profile, Toolchain},
};

/// Version of the boot loader that `image-builder` is made of.
const BOOT_LOADER: &str = "0.11.15";

/// What the boot loader prints: on screen and serial port, only what went wrong.
const BOOT_SETTINGS: &[u8] =
    br#"{"log_level":"Warn","frame_buffer_logging":true,"serial_logging":true}"#;

/// Make a disk image that boots a PC, by UEFI or BIOS.
#[derive(clap::Args)]
#[command(
    after_help = "Writing it to a USB stick erases the stick. Find the stick's name with \
    `lsblk -o NAME,SIZE,MODEL,TRAN` (TRAN is usb), then, with that name in place of sdX:\n\n  \
    sudo dd if=plinth.img of=/dev/sdX bs=4M conv=fsync oflag=direct status=progress\n\n\
    docs/BOOTING-A-PC.md tells the rest."
)]
pub struct Args {
    /// The image to write.
    #[arg(short, long, value_name = "FILE", default_value = "plinth.img")]
    output: PathBuf,
    /// The virtual machines.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    profile: ProfileArgs,
}

/// How the kernel is compiled.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct ProfileArgs {
    /// Compile the kernel without optimization, with overflow checks.
    #[arg(long)]
    debug: bool,
    /// Compile the kernel optimized (the default).
    #[arg(long, conflicts_with = "debug")]
    release: bool,
}

impl ProfileArgs {
    /// The profile asked for.
    pub fn profile(self) -> Profile {
        if self.debug {
            Profile::Debug
        } else {
            Profile::Release
        }
    }
}

/// `cargo xtask image`.
///
/// # Errors
/// The configuration has no usable VM, the kernel does not compile, or a file can't be written.
pub fn run(args: &Args) -> anyhow::Result<Code> {
    refuse_devices(&args.output)?;
    let configuration = Configuration::read(args.config.as_deref())?;
    let image = Builder::new(args.profile.profile())?.write(&configuration, &args.output)?;
    println!(
        "{}: {:.1} MiB ({} of kernel, {} of configuration and guests)",
        paths::shown(&args.output),
        image.bytes as f64 / f64::from(1 << 20),
        kib(image.kernel_bytes),
        kib(image.ramdisk_bytes),
    );
    println!("How to write it to a USB stick: cargo xtask image --help");
    Ok(Code::Success)
}

/// An image is made as a file: a device's name would be taken from it.
fn refuse_devices(output: &Path) -> anyhow::Result<()> {
    if output.exists() && !output.is_file() {
        let name = output.display();
        let why = format!("{name} is no file; write to a file, then see cargo xtask image --help");
        return Err(Stop::with(Code::Usage, why));
    }
    Ok(())
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

/// What an image takes up.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    /// The image.
    pub bytes: u64,
    /// The kernel without symbols.
    pub kernel_bytes: u64,
    /// Configuration, symbols and guests' files.
    pub ramdisk_bytes: u64,
}

/// Makes images with one kernel.
#[derive(Debug)]
pub struct Builder {
    /// The kernel as the boot loader loads it.
    kernel: PathBuf,
    /// The same with symbols and line numbers, for a debugger.
    pub debug_symbols: PathBuf,
    symbols: String,
    parts: BootParts,
}

impl Builder {
    /// Compiles the kernel and has the boot loader ready (some minutes, once).
    ///
    /// # Errors
    /// There is no toolchain, or something does not compile.
    pub fn new(profile: Profile) -> anyhow::Result<Self> {
        let name = match profile {
            Profile::Release => "plinth-release",
            Profile::Debug => "plinth-debug",
        };
        Self::compile(&paths::workspace(), profile, &[], name)
    }

    /// As `new`, with the optimized kernel of another checkout.
    ///
    /// # Errors
    /// As `new`.
    pub fn of_checkout(checkout: &Path) -> anyhow::Result<Self> {
        Self::compile(checkout, Profile::Release, &[], "plinth-compared")
    }

    /// As `new`, with the kernel that tries itself instead of running VMs (`selftest.rs`).
    ///
    /// # Errors
    /// As `new`.
    pub fn selftest() -> anyhow::Result<Self> {
        let features = &["selftest"];
        Self::compile(
            &paths::workspace(),
            Profile::Release,
            features,
            "plinth-selftest",
        )
    }

    fn compile(
        workspace: &Path,
        profile: Profile,
        features: &[&str],
        name: &str,
    ) -> anyhow::Result<Self> {
        let toolchain = Toolchain::find()?;
        let parts = boot_parts(&toolchain)?;
        let step = Step::start("Compiling Plinth");
        let compiled = toolchain.build_in(workspace, "kernel", features, profile)?;
        let whole = fs::read(&compiled).with_context(|| compiled.display().to_string())?;
        let symbols = symbols::table(&whole)?;
        let kernel = paths::target().join(name);
        let debug_symbols = kernel.with_extension("debug");
        write_whole(&debug_symbols, &whole)?;
        toolchain.strip(&compiled, &kernel)?;
        step.done();
        Ok(Builder {
            kernel,
            debug_symbols,
            symbols,
            parts,
        })
    }

    /// The kernel's functions: lines of offset and mangled name, by offset.
    pub fn symbols(&self) -> &str {
        &self.symbols
    }

    /// Packs a configuration and writes the image. Prints what is wrong with it.
    ///
    /// # Errors
    /// [`Code::Usage`]: no VM of the configuration can start. Or a file can't be written.
    pub fn write(&self, configuration: &Configuration, image: &Path) -> anyhow::Result<Written> {
        let checked = configuration.check();
        if !checked.problems.is_empty() {
            eprint!("{}", checked.report());
        }
        for origin in configuration.origins() {
            eprintln!("{origin}");
        }
        if checked.vms.is_empty() {
            return Err(Stop::with(
                Code::Usage,
                "no VM of this configuration can start",
            ));
        }
        self.write_unchecked(configuration, image)
    }

    /// As `write`, whatever is wrong with the configuration: the kernel finds it, too. Files
    /// that can't be read are left out.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn write_unchecked(
        &self,
        configuration: &Configuration,
        image: &Path,
    ) -> anyhow::Result<Written> {
        let mut writer = Writer::new();
        self.add_configuration(&mut writer, configuration)?;
        self.finish(writer, image)
    }

    /// An image of the kernel that tries itself; `word` says what to try.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn write_selftest(&self, word: &str, image: &Path) -> anyhow::Result<Written> {
        let mut writer = Writer::new();
        writer.add("selftest", word.as_bytes())?;
        writer.add(bundle::SYMBOLS, self.symbols.as_bytes())?;
        self.finish(writer, image)
    }

    /// As `write_selftest`, with VMs for it to run.
    ///
    /// # Errors
    /// As `write_selftest`.
    pub fn write_selftest_with(
        &self,
        word: &str,
        configuration: &Configuration,
        image: &Path,
    ) -> anyhow::Result<Written> {
        let mut writer = Writer::new();
        writer.add("selftest", word.as_bytes())?;
        self.add_configuration(&mut writer, configuration)?;
        self.finish(writer, image)
    }

    /// Adds the configuration, the symbols, and the files that it names and that can be read.
    fn add_configuration(
        &self,
        writer: &mut Writer,
        configuration: &Configuration,
    ) -> anyhow::Result<()> {
        writer.add(bundle::CONFIG, &configuration.text)?;
        writer.add(bundle::SYMBOLS, self.symbols.as_bytes())?;
        for (name, file) in configuration.files() {
            // The check has told of a file that is not there, and the kernel will, too.
            if let Ok(bytes) = fs::read(&file) {
                writer.add(&bundle::entry_name(&name), &bytes)?;
            }
        }
        Ok(())
    }

    fn finish(&self, writer: Writer, image: &Path) -> anyhow::Result<Written> {
        let ramdisk = writer.finish();
        let bytes = disk::write(image, &self.parts, &self.kernel, &ramdisk, BOOT_SETTINGS)?;
        Ok(Written {
            bytes,
            kernel_bytes: fs::metadata(&self.kernel)?.len(),
            ramdisk_bytes: ramdisk.len() as u64,
        })
    }
}

/// The boot loader's parts, compiled once.
fn boot_parts(toolchain: &Toolchain) -> anyhow::Result<BootParts> {
    let folder = paths::cache().join(format!("boot-loader-{BOOT_LOADER}"));
    let parts = BootParts::within(&folder);
    if parts.exist() {
        return Ok(parts);
    }
    let _lock = paths::lock("boot-loader")?;
    if parts.exist() {
        return Ok(parts);
    }
    let step = Step::start("Compiling the boot loader (takes a few minutes, once)");
    let manifest = paths::workspace().join("xtask/image-builder/Cargo.toml");
    let target = paths::cache().join("image-builder");
    output_of(
        toolchain
            .cargo()
            .args(["build", "--release", "--locked", "--manifest-path"])
            .arg(manifest)
            // Not by the environment: the boot loader's build script runs further cargos, which
            // would wait for this one to leave the folder.
            .env_remove("CARGO_TARGET_DIR")
            .arg("--target-dir")
            .arg(&target)
            // The boot loader's own stages need unstable features of cargo.
            .env("RUSTC_BOOTSTRAP", "1"),
    )?;
    output_of(Command::new(target.join("release/boot-parts")).arg(&folder))?;
    step.done();
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_written() {
        let refused = refuse_devices(Path::new("/dev/null")).unwrap_err();
        assert_eq!(Stop::code_of(&refused), Code::Usage);
        assert!(refuse_devices(Path::new("/nonexistent/plinth.img")).is_ok());
    }
}
