//! `cpu`, `features` and `tsc-khz`: which processor a VM is given.
//!
//! Only names are checked here; whether the host's processor has a feature is found out when the VM is
//! made, by the crate that knows what the names stand for.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};
use core::ops::RangeInclusive;

use toml::de::DeValue;

use super::{Parser, Section, quote, shown};

/// Names that `features` may switch.
pub const CPU_FEATURES: [&str; 44] = [
    "abm",
    "adx",
    "aes",
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "clflushopt",
    "clwb",
    "cx16",
    "erms",
    "f16c",
    "fma",
    "fsgsbase",
    "fsrm",
    "invpcid",
    "movbe",
    "nx",
    "pcid",
    "pclmulqdq",
    "pdpe1gb",
    "pku",
    "popcnt",
    "prefetchw",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "sha",
    "smap",
    "smep",
    "sse3",
    "sse4.1",
    "sse4.2",
    "sse4a",
    "ssse3",
    "umip",
    "vaes",
    "vpclmulqdq",
    "xgetbv1",
    "xsave",
    "xsavec",
    "xsaveopt",
    "xsaves",
];

/// Rates that a guest's TSC may be given, in kHz: 100 MHz to 10 GHz.
pub const TSC_KHZ: RangeInclusive<u32> = 100_000..=10_000_000;

/// How much of the host's processor a VM is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuBase {
    /// All that can be virtualized.
    #[default]
    Host,
    /// The same on every host of the vendor.
    Baseline,
}

/// `cpu`, `features` and `tsc-khz`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuConfig {
    /// `cpu`.
    pub base: CpuBase,
    /// `features`: names out of [`CPU_FEATURES`], each once, and whether it is shown or hidden.
    pub features: Vec<(String, bool)>,
    /// `tsc-khz`: the rate of its TSC; `None`: the host's.
    pub tsc_khz: Option<u32>,
}

impl Parser<'_> {
    pub(super) fn cpu(&mut self, s: &Section<'_>) -> CpuConfig {
        let base = self.choice(
            s,
            "cpu",
            &[("host", CpuBase::Host), ("baseline", CpuBase::Baseline)],
        );
        CpuConfig {
            base: base.unwrap_or_default(),
            features: self.features(s),
            tsc_khz: self.tsc_khz(s),
        }
    }

    fn tsc_khz(&mut self, s: &Section<'_>) -> Option<u32> {
        let (value, at) = self.value(s, "tsc-khz")?;
        let DeValue::Integer(number) = value else {
            self.wrong_type(s, at, "tsc-khz", "a whole number", value);
            return None;
        };
        let khz = u32::from_str_radix(number.as_str(), number.radix()).ok();
        let khz = khz.filter(|khz| TSC_KHZ.contains(khz));
        if khz.is_none() {
            let (least, most) = (TSC_KHZ.start(), TSC_KHZ.end());
            let message = format!(
                "{} is out of range; allowed: {least} to {most}",
                shown(value)
            );
            self.bad(s, at, "tsc-khz", message);
        }
        khz
    }

    fn features(&mut self, s: &Section<'_>) -> Vec<(String, bool)> {
        let mut features: Vec<(String, bool)> = Vec::new();
        let Some((value, at)) = self.value(s, "features") else {
            return features;
        };
        let DeValue::Array(list) = value else {
            self.wrong_type(s, at, "features", "a list like [\"+avx\", \"-pku\"]", value);
            return features;
        };
        for item in list.iter() {
            let at = self.location(item.span().start);
            let text = match item.get_ref() {
                DeValue::String(text) => text,
                other => {
                    let what = "a feature like \"+avx\" or \"-pku\"";
                    self.wrong_type(s, at, "features", what, other);
                    continue;
                }
            };
            let switch = match text.split_at_checked(1) {
                Some(("+", name)) => Some((name, true)),
                Some(("-", name)) => Some((name, false)),
                _ => None,
            };
            let known = switch.filter(|(name, _)| CPU_FEATURES.contains(name));
            let Some((name, on)) = known else {
                let message = format!(
                    "{} switches no feature; allowed: + or - and one of {}",
                    quote(text),
                    CPU_FEATURES.join(", ")
                );
                self.bad(s, at, "features", message);
                continue;
            };
            if features.iter().any(|(other, _)| other == name) {
                let message = format!("{} is in the list twice", shown(item.get_ref()));
                self.bad(s, at, "features", message);
                continue;
            }
            features.push((name.to_owned(), on));
        }
        features
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, parse};
    use super::*;

    fn with(lines: &str) -> Config {
        let text = format!(
            "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nboot = {{ kernel = \"k\" }}\n{lines}\n"
        );
        parse("plinth.toml", text.as_bytes())
    }

    #[test]
    fn models_and_switches_are_read() {
        assert_eq!(with("").vms[0].cpu, CpuConfig::default());
        let config = with("cpu = \"baseline\"\nfeatures = [\"+avx\", \"-pku\"]");
        assert!(!config.has_errors(), "{}", config.report());
        let cpu = &config.vms[0].cpu;
        assert_eq!(cpu.base, CpuBase::Baseline);
        let wanted = [("avx".to_owned(), true), ("pku".to_owned(), false)];
        assert_eq!(cpu.features, wanted);
        assert_eq!(cpu.tsc_khz, None);
        assert_eq!(
            with("tsc-khz = 2_400_000").vms[0].cpu.tsc_khz,
            Some(2_400_000)
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (lines, key, words) in [
            ("cpu = \"fast\"", "vm.cpu", "baseline"),
            (
                "features = [\"+vmx\"]",
                "vm.features",
                "\"+vmx\" switches no feature",
            ),
            ("features = [\"avx\"]", "vm.features", "+ or -"),
            ("features = [\"\"]", "vm.features", "+ or -"),
            ("features = [\"+avx\", \"-avx\"]", "vm.features", "twice"),
            ("features = [1]", "vm.features", "a feature like"),
            ("features = \"+avx\"", "vm.features", "a list like"),
            ("tsc-khz = \"fast\"", "vm.tsc-khz", "a whole number"),
            ("tsc-khz = 99999", "vm.tsc-khz", "100000 to 10000000"),
            ("tsc-khz = 10000001", "vm.tsc-khz", "out of range"),
            ("tsc-khz = -1", "vm.tsc-khz", "out of range"),
        ] {
            let config = with(lines);
            let problem = config.problems.first().expect(lines);
            assert_eq!(problem.key, key, "{lines}");
            assert!(problem.message.contains(words), "{}", problem.message);
            assert!(config.vms.is_empty(), "{lines}");
        }
    }

    #[test]
    fn names_are_in_order() {
        assert!(CPU_FEATURES.is_sorted());
    }
}
