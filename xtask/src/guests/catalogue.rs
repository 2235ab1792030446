//! The guests that can be run by name, and what shows that each is up.
//!
//! `cargo xtask run --guest NAME` boots one as the only guest; `--list-guests` prints the
//! table. Scenarios of `cargo xtask test` use the same entries, so that what they show can be seen by hand.

use std::{
    fmt::{self, Write},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;

use crate::{
    emulator::Emulator,
    exit::{Code, Stop},
};

/// How a guest's first instruction is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    /// A Linux boot image, by its 64-bit entry, or its 32-bit one where it has no other.
    BzImage,
    /// An ELF file with a PVH entry.
    Pvh,
    /// An ELF file with a multiboot header, version 1.
    Multiboot,
    /// PC firmware, at the reset vector.
    Firmware,
    /// OVMF, which starts a Linux boot image by its EFI stub.
    EfiStub,
}

impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::BzImage => "bzImage",
            Self::Pvh => "PVH",
            Self::Multiboot => "multiboot",
            Self::Firmware => "firmware",
            Self::EfiStub => "EFI stub",
        })
    }
}

/// What a guest draws on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Display {
    /// It has no display, and speaks by its serial port.
    None,
    /// A VGA adapter's text screen, which is its console; it has a keyboard.
    Console,
    /// A frame buffer, which is shown on the screen of its host; it speaks by its serial port, too.
    Ramfb,
}

/// About how many seconds of a quiet workstation pass until a guest's proof, by emulator.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// In QEMU.
    pub qemu_s: u32,
    /// In Bochs; `None` where the guest takes longer than anybody waits, with the reason in its
    /// description.
    pub bochs_s: Option<u32>,
}

/// A guest to run by name.
#[derive(Debug)]
pub struct Guest {
    /// What to call it.
    pub name: &'static str,
    /// One line for people.
    pub description: &'static str,
    /// How it is booted.
    pub boot: Boot,
    /// Its kernel, or its firmware, as a configuration names it.
    kernel: &'static str,
    /// Its disks, as a configuration names them.
    disks: &'static [&'static str],
    /// Its initrd, as a configuration names it.
    initrd: Option<&'static str>,
    /// For the kernel.
    command_line: &'static str,
    /// Whether it has the devices that test kernels written for QEMU expect.
    test_devices: bool,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub vcpus: u32,
    /// A regular expression that only its output matches, and only when it is up.
    pub proof: &'static str,
    /// What to type, each after its regular expression was seen, for it to come up.
    pub keys: &'static [Keys],
    /// What `uname -r` starts with, for a Linux with the usual shell.
    pub release: Option<&'static str>,
    /// Logarithm of the nanoseconds per instruction, for a guest that mostly waits: an emulated
    /// machine whose time passes quickly. `None`: as the machine is anyway.
    pub shift: Option<u8>,
    /// What it draws on.
    pub display: Display,
    /// How long it takes.
    pub seconds: Places,
}

/// What is typed.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    /// A regular expression that the guest's output matches first.
    pub after: &'static str,
    /// Up to 15 keys: a BIOS remembers no more.
    pub text: &'static str,
}

/// What busybox's start script prints, see [`crate::initramfs`].
const SHELL: &str = r"plinth guest: linux \S+ ready";

/// What memtest86+ shows after a pass by all of two processors.
const MEMTEST_PASS: &str = r"SMP: 2T[\s\S]*Pass:\s+1\s+Errors: 0\b";

/// A Linux with the usual shell.
const fn linux(
    name: &'static str,
    description: &'static str,
    kernel: &'static str,
    release: Option<&'static str>,
    seconds: Places,
) -> Guest {
    Guest {
        name,
        description,
        boot: Boot::BzImage,
        kernel,
        disks: &[],
        initrd: Some("@initramfs"),
        command_line: "console=ttyS0",
        test_devices: false,
        memory_mib: 256,
        vcpus: 1,
        proof: SHELL,
        keys: &[],
        release,
        shift: None,
        display: Display::None,
        seconds,
    }
}

/// What firmware boots from disks; no disks: the firmware alone.
const fn firmware(
    name: &'static str,
    description: &'static str,
    firmware: &'static str,
    disks: &'static [&'static str],
    proof: &'static str,
    qemu_s: u32,
    bochs_s: Option<u32>,
) -> Guest {
    Guest {
        name,
        description,
        boot: Boot::Firmware,
        kernel: firmware,
        disks,
        initrd: None,
        command_line: "",
        test_devices: false,
        memory_mib: 256,
        vcpus: 1,
        proof,
        keys: &[],
        release: None,
        // Firmware waits for time by asking for it again and again.
        shift: Some(5),
        display: Display::None,
        seconds: Places { qemu_s, bochs_s },
    }
}

/// A test kernel of QEMU's own; it ends by powering its machine off.
const fn qemu_test(
    name: &'static str,
    description: &'static str,
    kernel: &'static str,
    proof: &'static str,
) -> Guest {
    Guest {
        boot: Boot::Pvh,
        initrd: None,
        command_line: "",
        test_devices: true,
        memory_mib: 64,
        proof,
        ..linux(name, description, kernel, None, seconds(3, 10))
    }
}

/// Leaves the rescue disk's menu.
const GRUB_MENU: Keys = Keys {
    after: "executed automatically",
    text: "c",
};
const GRUB_PROMPT: &str = "grub> ";

/// The same guest, after these keys.
const fn typing(keys: &'static [Keys], guest: Guest) -> Guest {
    Guest { keys, ..guest }
}

/// The same guest with a display.
const fn drawing(display: Display, guest: Guest) -> Guest {
    Guest { display, ..guest }
}

/// The same guest, booted in another way.
const fn by(boot: Boot, guest: Guest) -> Guest {
    Guest { boot, ..guest }
}

/// Seconds in QEMU and in Bochs.
const fn seconds(qemu_s: u32, bochs_s: u32) -> Places {
    Places {
        qemu_s,
        bochs_s: Some(bochs_s),
    }
}

/// The guests that can be run by name; the first is what `@linux` means.
pub static CATALOGUE: [Guest; 26] = [
    linux(
        "linux-6.1-cloud",
        "Debian 12's kernel for virtual machines, a busybox shell",
        "@linux-6.1-cloud",
        Some("6.1."),
        seconds(6, 40),
    ),
    linux(
        "linux-5.10-cloud",
        "Debian 11's kernel for virtual machines, a busybox shell",
        "@linux-5.10-cloud",
        Some("5.10."),
        seconds(6, 40),
    ),
    linux(
        "linux-6.1",
        "Debian 12's kernel for PCs, a busybox shell",
        "@linux-6.1",
        Some("6.1."),
        seconds(9, 100),
    ),
    linux(
        "linux-6.1-rt",
        "Debian 12's kernel for real time (PREEMPT_RT), a busybox shell",
        "@linux-6.1-rt",
        Some("6.1."),
        seconds(25, 150),
    ),
    Guest {
        initrd: Some("@initramfs-32"),
        ..linux(
            "linux-6.1-686",
            "Debian 12's kernel for 32-bit PCs, a busybox shell",
            "@linux-6.1-686",
            Some("6.1."),
            seconds(15, 120),
        )
    },
    linux(
        "linux-6.12-cloud",
        "Debian 13's kernel for virtual machines, a busybox shell",
        "@linux-6.12-cloud",
        Some("6.12."),
        seconds(8, 60),
    ),
    Guest {
        // Its watchdog of clock sources (7.2.13) waits with interrupts off for another processor, for a time that
        // jiffies measure, which stand still meanwhile. Where stop_machine() has turned that one's interrupts off and waits in
        // its turn, neither ends: seen in 2 of 85 boots of two vCPUs on one processor whose TSC is not invariant.
        command_line: "console=ttyS0 tsc=nowatchdog",
        ..linux(
            "linux-newest-cloud",
            "the newest kernel of Debian's sid for virtual machines, a busybox shell",
            "@linux-newest-cloud",
            None,
            seconds(8, 60),
        )
    },
    by(
        Boot::Pvh,
        linux(
            "linux-6.1-cloud-pvh",
            "the ELF file inside linux-6.1-cloud",
            "@linux-6.1-cloud.elf",
            Some("6.1."),
            seconds(6, 40),
        ),
    ),
    by(
        Boot::Pvh,
        linux(
            "linux-5.10-cloud-pvh",
            "the ELF file inside linux-5.10-cloud",
            "@linux-5.10-cloud.elf",
            Some("5.10."),
            seconds(6, 40),
        ),
    ),
    by(
        Boot::Pvh,
        linux(
            "linux-6.1-pvh",
            "the ELF file inside linux-6.1",
            "@linux-6.1.elf",
            Some("6.1."),
            seconds(8, 60),
        ),
    ),
    by(
        Boot::Pvh,
        linux(
            "linux-6.12-cloud-pvh",
            "the ELF file inside linux-6.12-cloud",
            "@linux-6.12-cloud.elf",
            Some("6.12."),
            seconds(8, 60),
        ),
    ),
    Guest {
        boot: Boot::EfiStub,
        // As for all firmware.
        shift: Some(5),
        ..linux(
            "linux-6.1-cloud-efi",
            "linux-6.1-cloud, started by OVMF",
            "@linux-6.1-cloud",
            Some("6.1."),
            Places {
                qemu_s: 25,
                bochs_s: None,
            },
        )
    },
    Guest {
        initrd: Some("@selftests"),
        keys: &[Keys {
            after: "~ # ",
            text: "/x86/run\r",
        }],
        proof: r"selftests: \d+ of \d+ ok",
        ..linux(
            "linux-selftests",
            "linux-6.1-cloud runs the x86 self-tests of its own source",
            "@linux-6.1-cloud",
            None,
            seconds(60, 900),
        )
    },
    qemu_test(
        "qemu-test-hello",
        "QEMU's own system test hello, compiled from its source",
        "@qemu-test-hello",
        "Hello World",
    ),
    qemu_test(
        "qemu-test-memory",
        "QEMU's own system test memory: accesses of all sizes and offsets",
        "@qemu-test-memory",
        "Test complete: PASSED",
    ),
    Guest {
        initrd: None,
        command_line: "console=com0",
        proof: "No bootstrap code loaded",
        ..by(
            Boot::Multiboot,
            linux(
                "gnumach",
                "Debian 12's GNU Mach, which finds no program to start",
                "@gnumach.elf",
                None,
                seconds(3, 10),
            ),
        )
    },
    Guest {
        name: "memtest86+",
        description: "Debian 12's 6.10: a pass of all its tests by two processors, no errors",
        boot: Boot::BzImage,
        kernel: "@memtest86+",
        disks: &[],
        initrd: None,
        command_line: "",
        test_devices: false,
        memory_mib: 16,
        vcpus: 2,
        proof: MEMTEST_PASS,
        keys: &[],
        release: None,
        // Its last test waits for minutes.
        shift: Some(6),
        display: Display::Console,
        seconds: seconds(100, 600),
    },
    Guest {
        name: "memtest86+-quick",
        description: "sid's 8.10: a pass of the first four tests by two processors, no errors",
        boot: Boot::BzImage,
        kernel: "@memtest86+-8",
        disks: &[],
        initrd: None,
        command_line: "testlist=0,1,2,3",
        test_devices: false,
        memory_mib: 16,
        vcpus: 2,
        proof: MEMTEST_PASS,
        keys: &[],
        release: None,
        shift: None,
        display: Display::Console,
        seconds: seconds(25, 60),
    },
    Guest {
        name: "debian-installer",
        description: "Debian 12's installer from the network, to its first question",
        boot: Boot::BzImage,
        kernel: "@debian-installer",
        disks: &[],
        initrd: Some("@debian-installer-initrd"),
        command_line: "console=ttyS0 TERM=vt102",
        test_devices: false,
        memory_mib: 1024,
        vcpus: 1,
        proof: "Select a language",
        keys: &[],
        release: None,
        shift: None,
        display: Display::None,
        seconds: seconds(50, 400),
    },
    firmware(
        "seabios",
        "Debian 12's SeaBIOS, which finds no disk",
        "@seabios",
        &[],
        "No bootable device",
        5,
        Some(10),
    ),
    typing(
        &[GRUB_MENU],
        drawing(
            Display::Console,
            firmware(
                "grub-rescue",
                "Debian 12's GRUB rescue disk, started by SeaBIOS from virtio-blk, on a VGA screen",
                "@seabios",
                &["@grub-rescue"],
                "grub>",
                8,
                Some(30),
            ),
        ),
    ),
    typing(
        &[
            GRUB_MENU,
            Keys {
                after: GRUB_PROMPT,
                text: ". (hd1)/g\r",
            },
        ],
        firmware(
            "grub-linux-bios",
            "Linux 6.1, loaded from a disk by GRUB under SeaBIOS",
            "@seabios",
            &["@grub-rescue", "@boot-disk"],
            SHELL,
            30,
            None,
        ),
    ),
    typing(
        &[
            GRUB_MENU,
            Keys {
                after: GRUB_PROMPT,
                text: ". (hd1)/i\r",
            },
        ],
        drawing(
            Display::Ramfb,
            firmware(
                "ipxe",
                "Debian 12's iPXE, started by GRUB under SeaBIOS, on a frame buffer",
                "@seabios",
                &["@grub-rescue", "@boot-disk"],
                "iPXE initialising devices",
                10,
                None,
            ),
        ),
    ),
    drawing(
        Display::Ramfb,
        firmware(
            "ovmf",
            "Debian 12's OVMF, to its shell, on a frame buffer",
            "@ovmf",
            &[],
            "Shell> ",
            20,
            None,
        ),
    ),
    firmware(
        "grub-linux-uefi",
        "Linux 6.1, loaded from a disk by GRUB under OVMF",
        "@ovmf",
        &["@boot-disk"],
        SHELL,
        30,
        None,
    ),
    typing(
        &[Keys {
            after: "Hit any key to stop autoboot",
            text: " ",
        }],
        firmware(
            "u-boot",
            "Debian 12's U-Boot, to its prompt",
            "@u-boot",
            &[],
            "=> ",
            8,
            Some(30),
        ),
    ),
];

impl Guest {
    /// A configuration with this guest only, its memory in MiB.
    pub fn configuration(&self, memory_mib: u64, vcpus: u32) -> String {
        let mut text = format!(
            "[[vm]]\nname = \"{}\"\nfocus = true\nvcpus = {vcpus}\nmemory = \"{memory_mib}M\"\n",
            self.vm_name(),
        );
        if !self.disks.is_empty() {
            let disks = self
                .disks
                .iter()
                .map(|disk| format!("{{ image = \"{disk}\", readonly = true }}"));
            let disks: Vec<_> = disks.collect();
            writeln!(text, "disks = [{}]", disks.join(", ")).expect("a String takes any text");
        }
        if self.test_devices {
            text += "test-devices = true\n";
        }
        text += match self.display {
            Display::None => "",
            Display::Console => "display = \"vga-text\"\nconsole = \"display\"\n",
            Display::Ramfb => "display = \"ramfb\"\n",
        };
        text += "\n[vm.boot]\n";
        if self.boot == Boot::Firmware {
            writeln!(text, "firmware = \"{}\"", self.kernel).expect("a String takes any text");
            if self.kernel == "@ovmf" {
                text += "variables = \"@ovmf-variables\"\n";
            }
            // Other firmware has what it draws by in itself.
            text += match (self.kernel, self.display) {
                ("@seabios", Display::Console) => "vga-rom = \"@vgabios\"\n",
                ("@seabios", Display::Ramfb) => "vga-rom = \"@vgabios-ramfb\"\n",
                _ => "",
            };
            return text;
        }
        if self.boot == Boot::EfiStub {
            text += "firmware = \"@ovmf\"\nvariables = \"@ovmf-variables\"\n";
        }
        writeln!(text, "kernel = \"{}\"", self.kernel).expect("a String takes any text");
        if let Some(initrd) = self.initrd {
            writeln!(text, "initrd = \"{initrd}\"").expect("a String takes any text");
        }
        writeln!(text, "cmdline = \"{}\"", self.command_line).expect("a String takes any text");
        text
    }

    /// The names of its files, as its configuration has them.
    pub fn files(&self) -> impl Iterator<Item = &'static str> {
        let boot = [Some(self.kernel), self.initrd].into_iter().flatten();
        boot.chain(self.disks.iter().copied())
    }

    /// The arguments by which QEMU starts it without Plinth; `file` finds its files.
    ///
    /// # Errors
    /// A file is not found, or it is none that QEMU starts by itself.
    pub fn qemu_arguments(
        &self,
        file: impl Fn(&str) -> anyhow::Result<PathBuf>,
    ) -> anyhow::Result<Vec<String>> {
        let direct = matches!(self.boot, Boot::BzImage | Boot::Pvh) && self.disks.is_empty();
        anyhow::ensure!(direct, "{} is not started by its kernel alone", self.name);
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        add("-kernel", file(self.kernel)?.display().to_string());
        if let Some(initrd) = self.initrd {
            add("-initrd", file(initrd)?.display().to_string());
        }
        add("-append", self.command_line.to_owned());
        Ok(arguments)
    }

    /// Memory of a PC that Plinth runs it on, in MiB: its image is in it twice, and Plinth.
    pub fn host_memory_mib(&self) -> u32 {
        self.memory_mib + 512
    }

    /// How long to wait for its proof, however busy the workstation is.
    pub fn patience(&self, emulator: Emulator) -> Duration {
        let seconds = self.seconds_in(emulator).unwrap_or(self.seconds.qemu_s);
        Duration::from_secs(u64::from(seconds) * 10)
    }

    /// Its name as that of a VM, which has no other characters than letters, digits and `-`.
    fn vm_name(&self) -> String {
        let allowed = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        self.name.chars().map(allowed).collect()
    }

    /// Seconds until its proof in this emulator, about.
    pub fn seconds_in(&self, emulator: Emulator) -> Option<u32> {
        match emulator {
            Emulator::Qemu => Some(self.seconds.qemu_s),
            Emulator::Bochs => self.seconds.bochs_s,
        }
    }
}

/// The guest of that name.
///
/// # Errors
/// There is none; the error lists the names.
pub fn by_name(name: &str) -> anyhow::Result<&'static Guest> {
    let names = || CATALOGUE.iter().map(|guest| guest.name);
    CATALOGUE
        .iter()
        .find(|guest| guest.name == name)
        .with_context(|| {
            let names: Vec<_> = names().collect();
            format!("no guest is called {name}; known are: {}", names.join(", "))
        })
        .map_err(|error| Stop::with(Code::Usage, format!("{error:#}")))
}

/// The catalogue as a table, a guest per line.
pub fn table() -> String {
    let width = CATALOGUE.iter().map(|guest| guest.name.len()).max();
    let width = width.unwrap_or(0);
    let mut text = format!(
        "{:width$}  {:9}  {:>7}  {:>5}  {:>6}  {:>6}  {}\n",
        "NAME", "BOOT", "MEMORY", "VCPUS", "QEMU", "BOCHS", "WHAT"
    );
    for guest in &CATALOGUE {
        let seconds = |emulator| match guest.seconds_in(emulator) {
            Some(seconds) => format!("{seconds} s"),
            None => "-".to_owned(),
        };
        writeln!(
            text,
            "{:width$}  {:9}  {:>7}  {:>5}  {:>6}  {:>6}  {}",
            guest.name,
            guest.boot,
            format!("{}M", guest.memory_mib),
            guest.vcpus,
            seconds(Emulator::Qemu),
            seconds(Emulator::Bochs),
            guest.description
        )
        .expect("a String takes any text");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_is_found_by_its_name() {
        for guest in &CATALOGUE {
            assert_eq!(by_name(guest.name).unwrap().kernel, guest.kernel);
        }
        let error = by_name("nonesuch").unwrap_err();
        assert_eq!(Stop::code_of(&error), Code::Usage);
        assert!(error.to_string().contains(CATALOGUE[0].name), "{error}");
    }

    #[test]
    fn every_guest_is_a_right_configuration_with_a_right_proof() {
        for guest in &CATALOGUE {
            let text = guest.configuration(guest.memory_mib.into(), 4);
            let config = manage::config::parse("x", text.as_bytes());
            assert!(config.problems.is_empty(), "{}", config.report());
            assert_eq!(config.vms[0].vcpus, 4);
            assert_eq!(config.vms[0].memory, u64::from(guest.memory_mib) << 20);
            assert!(regex::bytes::Regex::new(guest.proof).is_ok());
            for keys in guest.keys {
                assert!(regex::bytes::Regex::new(keys.after).is_ok());
                assert!((1..=15).contains(&keys.text.len()), "{}", keys.text);
            }
        }
    }

    #[test]
    fn every_file_of_a_guest_is_known() {
        let known = super::super::packages::names();
        for guest in &CATALOGUE {
            for name in guest.files() {
                let name = name.strip_prefix('@').unwrap();
                let name = name.strip_suffix(super::super::ELF_SUFFIX).unwrap_or(name);
                assert!(
                    known.contains(&name)
                        || name.starts_with(super::super::qemu_tests::PREFIX)
                        || ["initramfs", "initramfs-32", "boot-disk", "selftests"].contains(&name),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn the_table_has_a_line_per_guest() {
        let table = table();
        assert_eq!(table.lines().count(), CATALOGUE.len() + 1);
        assert!(table.contains("memtest86+ "), "{table}");
    }
}
