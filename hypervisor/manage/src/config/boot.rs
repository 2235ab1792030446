//! What a VM boots: the `boot` key.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};

use toml::de::DeValue;

use super::{Location, MAX_CMDLINE, MAX_MODULES, Parser, Section, find};

/// What a VM boots: a kernel file (bzImage, multiboot, or ELF with a PVH note; the loader finds out), or
/// firmware, to which the kernel is then offered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// Firmware, if the VM starts as a PC does.
    pub firmware: Option<FirmwareConfig>,
    /// Path as written, relative to the configuration file. There is one, or firmware.
    pub kernel: Option<String>,
    /// Path as written.
    pub initrd: Option<String>,
    /// Modules of a multiboot kernel, after `initrd` if there is one.
    pub modules: Vec<BootModule>,
    /// Kernel command line, may be empty.
    pub cmdline: String,
    pub(super) places: BootPlaces,
}

/// PC firmware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirmwareConfig {
    /// `firmware`: path of its image as written.
    pub image: String,
    /// `variables`: path of the template of its variable store as written.
    pub variables: Option<String>,
    /// `vga-rom`: path of the video ROM that it is given, as written.
    pub vga_rom: Option<String>,
}

/// A module of a multiboot kernel: a path, and what the kernel is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootModule {
    /// As written: a path, then perhaps a blank and arguments. The kernel is told all of it.
    pub text: String,
    pub(super) place: Location,
}

impl BootModule {
    /// Path as written.
    pub fn path(&self) -> &str {
        self.text.split(' ').next().unwrap_or_default()
    }
}

/// Where the values stand in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BootPlaces {
    pub(super) firmware: Location,
    pub(super) variables: Location,
    pub(super) vga_rom: Location,
    pub(super) kernel: Location,
    pub(super) initrd: Location,
}

impl Boot {
    /// The paths of all its files, as written; first of what it boots.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let firmware = self.firmware.iter();
        firmware
            .flat_map(|firmware| {
                let image = core::iter::once(&firmware.image);
                image.chain(&firmware.variables).chain(&firmware.vga_rom)
            })
            .chain(&self.kernel)
            .chain(&self.initrd)
            .map(String::as_str)
            .chain(self.modules.iter().map(BootModule::path))
    }
}

impl Parser<'_> {
    /// `boot`, a table. What is wrong is noted, and disables the VM.
    pub(super) fn boot(&mut self, vm: &Section<'_>) -> Option<Boot> {
        let Some((table, at)) = self.table(vm, "boot") else {
            if find(vm.table, "boot").is_none() {
                let text = "missing; write for example boot = { kernel = \"vmlinuz\" }".to_owned();
                self.bad(vm, vm.at, "boot", text);
            }
            return None;
        };
        let s = &Section {
            table,
            path: "vm.boot",
            at,
            vm: vm.vm.clone(),
        };
        self.check_keys(
            s,
            &[
                "firmware",
                "variables",
                "vga-rom",
                "kernel",
                "initrd",
                "modules",
                "cmdline",
            ],
        );
        if find(table, "firmware").is_none() && find(table, "kernel").is_none() {
            let text = "missing; a VM boots a kernel, or firmware".to_owned();
            self.bad(s, at, "kernel", text);
        }
        for (key, needed) in [
            ("variables", "firmware"),
            ("vga-rom", "firmware"),
            ("initrd", "kernel"),
            ("modules", "kernel"),
            ("cmdline", "kernel"),
        ] {
            if let Some((_, at)) = self.value(s, key)
                && find(table, needed).is_none()
            {
                let text = format!("is for a {needed}, and there is none");
                self.bad(s, at, key, text);
            }
        }
        let image = self.file(s, "firmware");
        let variables = self.file(s, "variables");
        let vga_rom = self.file(s, "vga-rom");
        let kernel = self.file(s, "kernel");
        let initrd = self.file(s, "initrd");
        let cmdline = match self.string(s, "cmdline") {
            Some((text, at)) if text.len() > MAX_CMDLINE => {
                let length = text.len();
                let text = format!("has {length} bytes; allowed: up to {MAX_CMDLINE}");
                self.bad(s, at, "cmdline", text);
                ""
            }
            Some((text, at)) if text.contains(char::is_control) => {
                let text = "has a control character; allowed: one line of text".to_owned();
                self.bad(s, at, "cmdline", text);
                ""
            }
            Some((text, _)) => text,
            None => "",
        };
        let place = |file: &Option<(String, Location)>| file.as_ref().map_or(at, |(_, at)| *at);
        let places = BootPlaces {
            firmware: place(&image),
            variables: place(&variables),
            vga_rom: place(&vga_rom),
            kernel: place(&kernel),
            initrd: place(&initrd),
        };
        let path = |file: Option<(String, Location)>| file.map(|(path, _)| path);
        let (variables, vga_rom) = (path(variables), path(vga_rom));
        Some(Boot {
            firmware: path(image).map(|image| FirmwareConfig {
                image,
                variables,
                vga_rom,
            }),
            kernel: path(kernel),
            initrd: path(initrd),
            modules: self.modules(s),
            cmdline: cmdline.to_owned(),
            places,
        })
    }

    /// `modules`: a list of texts, each a path with arguments.
    fn modules(&mut self, s: &Section<'_>) -> Vec<BootModule> {
        const KEY: &str = "modules";
        let list = match self.value(s, KEY) {
            None => return Vec::new(),
            Some((DeValue::Array(list), at)) if list.len() > MAX_MODULES => {
                let text = format!("has {} files; allowed: up to {MAX_MODULES}", list.len());
                self.bad(s, at, KEY, text);
                return Vec::new();
            }
            Some((DeValue::Array(list), _)) => list,
            Some((other, at)) => {
                self.wrong_type(s, at, KEY, "a list of strings", other);
                return Vec::new();
            }
        };
        let mut modules = Vec::new();
        for value in list {
            let at = self.location(value.span().start);
            match value.get_ref() {
                DeValue::String(text) if text.len() > MAX_CMDLINE => {
                    let text = format!("has {} bytes; allowed: up to {MAX_CMDLINE}", text.len());
                    self.bad(s, at, KEY, text);
                }
                DeValue::String(text) => {
                    let module = BootModule {
                        text: text.clone().into_owned(),
                        place: at,
                    };
                    let whole_is_fine = !text.contains(char::is_control);
                    let path = if whole_is_fine { module.path() } else { text };
                    if self.path(s, KEY, path, at).is_some() {
                        modules.push(module);
                    }
                }
                other => self.wrong_type(s, at, KEY, "a list of strings", other),
            }
        }
        modules
    }

    /// A key whose value is a file's path.
    fn file(&mut self, s: &Section<'_>, key: &'static str) -> Option<(String, Location)> {
        let (text, at) = self.string(s, key)?;
        self.path(s, key, text, at)
    }
}
