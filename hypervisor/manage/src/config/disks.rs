//! The disks of a VM: the `disks` key.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};

use toml::de::DeValue;

use super::{Location, Parser, Section};

/// Most disks of a VM.
pub const MAX_DISKS: usize = 8;
/// What a disk may keep of changed data when the configuration says nothing, in bytes.
pub const DEFAULT_CHANGES: u64 = 64 << 20;
/// Least that a disk may keep of changed data, in bytes.
pub const MIN_CHANGES: u64 = 1 << 20;

/// An entry of `disks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// `image`: path as written.
    pub image: String,
    /// `readonly`.
    pub readonly: bool,
    /// `changes`: bytes of host memory for what the guest writes; 0 for a read-only disk.
    pub changes: u64,
    pub(super) place: Location,
}

impl Parser<'_> {
    /// `disks`, a list of tables. What is wrong is noted, and disables the VM.
    pub(super) fn disks(&mut self, vm: &Section<'_>) -> Vec<DiskConfig> {
        let (list, at) = match self.value(vm, "disks") {
            None => return Vec::new(),
            Some((DeValue::Array(list), at)) => (list, at),
            Some((other, at)) => {
                self.wrong_type(vm, at, "disks", "a list of tables", other);
                return Vec::new();
            }
        };
        if list.len() > MAX_DISKS {
            let text = format!("there are {} disks; allowed: up to {MAX_DISKS}", list.len());
            self.bad(vm, at, "disks", text);
            return Vec::new();
        }
        list.iter()
            .filter_map(|value| {
                let at = self.location(value.span().start);
                match value.get_ref() {
                    DeValue::Table(table) => self.disk(&Section {
                        table,
                        path: "vm.disks",
                        at,
                        vm: vm.vm.clone(),
                    }),
                    other => {
                        self.wrong_type(vm, at, "disks", "a list of tables", other);
                        None
                    }
                }
            })
            .collect()
    }

    fn disk(&mut self, s: &Section<'_>) -> Option<DiskConfig> {
        self.check_keys(s, &["image", "readonly", "changes"]);
        let image = self
            .required(s, "image")
            .and_then(|(text, at)| self.path(s, "image", text, at));
        let readonly = self.boolean(s, "readonly").is_some_and(|(value, _)| value);
        let changes = match self.value(s, "changes") {
            None => Some(DEFAULT_CHANGES),
            Some((_, at)) if readonly => {
                let text = "a read-only disk has none; remove one of the two".to_owned();
                self.bad(s, at, "changes", text);
                None
            }
            Some(_) => self.size(s, "changes", MIN_CHANGES, 1),
        };
        let (image, place) = image?;
        Some(DiskConfig {
            image,
            readonly,
            changes: if readonly { 0 } else { changes? },
            place,
        })
    }
}
