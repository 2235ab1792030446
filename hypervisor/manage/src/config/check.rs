//! Whether what a configuration asks for is there: memory, processors, files.

use alloc::{
    format,
    string::{String, ToString},
};

use super::{Config, Location, Pools, Severity, VmConfig, size};

/// What the checks need to know of the place where they run.
pub trait Environment {
    /// Bytes of host memory that VMs can have. `None`: not known here (a workstation).
    fn memory_bytes(&self) -> Option<u64>;
    /// Host processors that run VMs. `None`: not known here.
    fn processors(&self) -> Option<usize>;
    /// Looks at a file, by its path as written in the configuration.
    ///
    /// # Errors
    /// Why it can't be read, in words: "no such file".
    fn file(&self, path: &str) -> Result<FileFacts, String>;
    /// The CPU pools of the host that runs; `None`: those of the configuration.
    fn pools(&self) -> Option<&Pools> {
        None
    }
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// Length in bytes.
    pub bytes: u64,
    /// What it looks like.
    pub kind: FileKind,
}

/// What a file looks like from its beginning. The loaders look closer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A Linux kernel with a setup header.
    BzImage,
    /// An ELF file.
    Elf,
    /// A multiboot kernel that is no ELF file.
    Multiboot,
    /// Compressed by this program.
    Compressed(&'static str),
    /// A PE executable without Linux' setup header: an EFI application.
    EfiApplication,
    /// Something else.
    Other,
}

impl FileKind {
    /// Bytes of a file's beginning that [`FileKind::sniff`] wants, if it has that many.
    pub const SNIFF_BYTES: usize = 8192;

    /// Judges by the first bytes of a file.
    pub fn sniff(head: &[u8]) -> Self {
        // Linux' setup header (Documentation/arch/x86/boot.rst): "HdrS" at 0x202, boot flag 0xAA55 at 0x1fe.
        if head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS")
        {
            return FileKind::BzImage;
        }
        const MAGIC: [(&[u8], FileKind); 7] = [
            (b"\x7fELF", FileKind::Elf),
            (b"MZ", FileKind::EfiApplication),
            (b"\x1f\x8b", FileKind::Compressed("gzip")),
            (b"\xfd7zXZ\0", FileKind::Compressed("xz")),
            (b"\x28\xb5\x2f\xfd", FileKind::Compressed("zstd")),
            (b"\x02\x21\x4c\x18", FileKind::Compressed("lz4")),
            (b"BZh", FileKind::Compressed("bzip2")),
        ];
        let known = MAGIC.iter().find(|(magic, _)| head.starts_with(magic));
        match known {
            Some((_, kind)) => *kind,
            None if has_multiboot_header(head) => FileKind::Multiboot,
            None => FileKind::Other,
        }
    }
}

/// Whether the first 8192 bytes hold a multiboot 1 header, whose first three words sum to 0 (Multiboot
/// Specification 0.6.96, section 3.1).
pub fn has_multiboot_header(head: &[u8]) -> bool {
    const MAGIC: u32 = 0x1bad_b002;
    let word = |at: usize| {
        let bytes = head.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    (0..head.len().min(8192)).step_by(4).any(|at| {
        let header = [word(at), word(at + 4), word(at + 8)];
        matches!(header, [Some(MAGIC), Some(flags), Some(sum)]
            if MAGIC.wrapping_add(flags).wrapping_add(sum) == 0)
    })
}

/// Compares a configuration with what is there. A VM that asks for what isn't is disabled; host
/// memory is given out in the order of the file, to the VMs that start with the host.
pub fn check(config: &mut Config, environment: &dyn Environment) {
    super::sched::check(config, environment);
    let total = environment.memory_bytes();
    let processors = environment.processors();
    for file in core::mem::take(&mut config.host.files) {
        match environment.file(&file.path) {
            Ok(_) => config.host.files.push(file),
            Err(why) => {
                let text = format!("{}: {why}", file.path);
                config.note(Severity::Error, file.place, None, "host.files", text);
            }
        }
    }
    let mut given = 0;
    for mut vm in core::mem::take(&mut config.vms) {
        let mut fine = check_files(config, &vm, environment);
        fine &= check_disks(config, &mut vm, environment);
        let changes = vm.disks.iter().map(|disk| disk.changes);
        let needed = changes.fold(vm.memory, u64::saturating_add);
        // One that does not start with the host gets what is left when it does.
        let given_before = if vm.autostart { given } else { 0 };
        if let Some(total) = total
            && needed > total.saturating_sub(given_before)
        {
            let what = if needed == vm.memory {
                size(needed)
            } else {
                format!(
                    "{} and {} for changes on its disks",
                    size(vm.memory),
                    size(needed - vm.memory)
                )
            };
            let text = if given_before == 0 {
                format!(
                    "{what} is more than the host has for VMs; allowed: up to {}",
                    size(total)
                )
            } else {
                format!(
                    "{what} is more than the {} that the VMs before it leave of the host's {}",
                    size(total.saturating_sub(given)),
                    size(total)
                )
            };
            fine = false;
            error(config, &vm, vm.places.memory, "vm.memory", text);
        }
        if let Some(count) = processors
            && usize::from(vm.vcpus) > count
        {
            let text = format!("{} virtual processors share {count} of the host", vm.vcpus);
            let (at, name) = (vm.places.vcpus, Some(vm.name.as_str()));
            config.note(Severity::Warning, at, name, "vm.vcpus", text);
        }
        if fine {
            given += if vm.autostart { needed } else { 0 };
            config.vms.push(vm);
        }
    }
}

fn error(config: &mut Config, vm: &VmConfig, at: Location, key: &str, text: String) {
    config.note(Severity::Error, at, Some(&vm.name), key, text);
}

/// Whether the disks' images are there. No disk keeps more changed data than it has.
fn check_disks(config: &mut Config, vm: &mut VmConfig, environment: &dyn Environment) -> bool {
    let mut disks = core::mem::take(&mut vm.disks);
    let mut fine = true;
    for disk in &mut disks {
        let why = match environment.file(&disk.image) {
            Ok(facts) if facts.bytes > 0 => {
                disk.changes = disk.changes.min(changes_of_all(facts.bytes));
                continue;
            }
            Ok(_) => "is empty".to_string(),
            Err(why) => why,
        };
        fine = false;
        let text = format!("{}: {why}", disk.image);
        error(config, vm, disk.place, "vm.disks.image", text);
    }
    vm.disks = disks;
    fine
}

/// Bytes that a disk of this size takes when every block of it is changed: blocks of 4 KiB, and a table of
/// 4 KiB per 512 of them.
fn changes_of_all(bytes: u64) -> u64 {
    let blocks = bytes.div_ceil(4096);
    blocks
        .saturating_add(blocks.div_ceil(512))
        .saturating_mul(4096)
}

/// Whether a kernel file can be one. Returns its size.
fn check_kernel(facts: FileFacts, with_firmware: bool) -> Result<u64, String> {
    let what = match facts.kind {
        _ if facts.bytes == 0 => "is empty",
        FileKind::BzImage => return Ok(facts.bytes),
        _ if with_firmware => "is not a bzImage, and firmware loads no other kernel",
        FileKind::Elf | FileKind::Multiboot => return Ok(facts.bytes),
        FileKind::Compressed(how) => {
            return Err(format!(
                "is compressed with {how}; give it unpacked (a bzImage unpacks itself)"
            ));
        }
        FileKind::EfiApplication => "is an EFI application, not a bzImage, ELF or multiboot kernel",
        FileKind::Other => "is not a bzImage, ELF or multiboot kernel",
    };
    Err(what.to_string())
}

/// Least and most bytes of a firmware image, and the step.
const FIRMWARE_BYTES: (u64, u64, u64) = (64 << 10, 16 << 20, 4 << 10);

/// Whether a firmware image can be one.
fn check_firmware(facts: FileFacts) -> Result<u64, String> {
    let (least, most, step) = FIRMWARE_BYTES;
    if (least..=most).contains(&facts.bytes) && facts.bytes.is_multiple_of(step) {
        return Ok(facts.bytes);
    }
    Err(format!(
        "has {} bytes; a firmware image has {} to {}, in steps of {}",
        facts.bytes,
        size(least),
        size(most),
        size(step)
    ))
}

/// Whether a variable store can be one. It lies beside the image, so the larger that is, the smaller it must be.
fn check_variables(facts: FileFacts, image: u64) -> Result<u64, String> {
    let (_, most, step) = FIRMWARE_BYTES;
    let most = most.saturating_sub(image);
    if (1..=most).contains(&facts.bytes) && facts.bytes.is_multiple_of(step) {
        return Ok(facts.bytes);
    }
    Err(format!(
        "has {} bytes; a variable store has up to {}, in steps of {}",
        facts.bytes,
        size(most),
        size(step)
    ))
}

/// Most bytes of a video ROM.
const VGA_ROM_BYTES: u64 = 64 << 10;

/// Whether a video ROM can be one.
fn check_vga_rom(facts: FileFacts) -> Result<u64, String> {
    if (1..=VGA_ROM_BYTES).contains(&facts.bytes) {
        return Ok(facts.bytes);
    }
    let (bytes, most) = (facts.bytes, size(VGA_ROM_BYTES));
    Err(format!("has {bytes} bytes; a video ROM has up to {most}"))
}

/// Whether what the VM boots is there and can be what it should.
fn check_files(config: &mut Config, vm: &VmConfig, environment: &dyn Environment) -> bool {
    let boot = &vm.boot;
    let mut fine = true;
    // The size of a file that is there and good; 0 for none.
    let mut bytes = |path: Option<&str>,
                     at: Location,
                     key: &str,
                     check: &dyn Fn(FileFacts) -> Result<u64, String>| {
        let Some(path) = path else { return 0 };
        environment
            .file(path)
            .and_then(check)
            .unwrap_or_else(|why| {
                fine = false;
                error(config, vm, at, key, format!("{path}: {why}"));
                0
            })
    };
    let places = boot.places;
    let firmware = boot.firmware.as_ref();
    let image = bytes(
        firmware.map(|f| f.image.as_str()),
        places.firmware,
        "vm.boot.firmware",
        &check_firmware,
    );
    bytes(
        firmware.and_then(|f| f.variables.as_deref()),
        places.variables,
        "vm.boot.variables",
        &|facts| check_variables(facts, image),
    );
    bytes(
        firmware.and_then(|f| f.vga_rom.as_deref()),
        places.vga_rom,
        "vm.boot.vga-rom",
        &check_vga_rom,
    );
    let kernel = bytes(
        boot.kernel.as_deref(),
        places.kernel,
        "vm.boot.kernel",
        &|facts| check_kernel(facts, firmware.is_some()),
    );
    let any = |facts: FileFacts| match facts.bytes {
        0 => Err("is empty".to_string()),
        bytes => Ok(bytes),
    };
    let initrd = boot.initrd.as_deref();
    let mut with_kernel = bytes(initrd, places.initrd, "vm.boot.initrd", &any);
    for module in &boot.modules {
        let size = bytes(Some(module.path()), module.place, "vm.boot.modules", &any);
        with_kernel = with_kernel.saturating_add(size);
    }
    if !fine {
        return false;
    }
    if kernel.saturating_add(with_kernel) > vm.memory {
        let what = if boot.modules.is_empty() {
            "initrd"
        } else {
            "modules"
        };
        let text = format!(
            "{} is too little for the kernel ({}) and the {what} ({})",
            size(vm.memory),
            size(kernel),
            size(with_kernel)
        );
        error(config, vm, vm.places.memory, "vm.memory", text);
        return false;
    }
    true
}
