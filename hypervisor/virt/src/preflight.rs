//! What the processor offers, feature by feature, in words a person can act on.

use alloc::vec::Vec;
use core::fmt;

/// How much Plinth depends on a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Without it no guest runs.
    Required,
    /// Used where present, emulated or done without where not.
    Used,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Present and usable.
    Ok,
    /// The processor does not have it.
    Missing,
    /// The processor has it, firmware turned it off.
    DisabledInFirmware,
    /// Firmware locked the setting the wrong way; only a firmware change and a restart help.
    Locked,
}

/// One line of the pre-flight check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The manual's name: "VMX", "EPT 1 GiB pages", "NRIP save".
    pub name: &'static str,
    /// Required or used.
    pub need: Need,
    /// What was found.
    pub status: Status,
    /// What to do about it: the firmware setting to change. Empty when nothing can be done.
    pub remedy: &'static str,
}

/// The whole check, in the order to print.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preflight {
    /// Lines.
    pub features: Vec<Feature>,
}

impl Preflight {
    /// Whether every required feature is there.
    pub fn passed(&self) -> bool {
        self.features
            .iter()
            .all(|f| f.need == Need::Used || f.status == Status::Ok)
    }
}

impl fmt::Display for Preflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for feature in &self.features {
            let status = match feature.status {
                Status::Ok => "ok",
                Status::Missing => "missing",
                Status::DisabledInFirmware => "disabled in firmware",
                Status::Locked => "locked",
            };
            let need = match feature.need {
                Need::Required => "required",
                Need::Used => "used",
            };
            write!(f, "  {:<36} {:<8}  {}", feature.name, need, status)?;
            if feature.status != Status::Ok && !feature.remedy.is_empty() {
                write!(f, ": {}", feature.remedy)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
