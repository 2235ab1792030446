//! `cpu` and `features`: which processor a VM is given.
//!
//! Only names are checked here; whether the host's processor has a feature is found out when the VM is
//! made, by the crate that knows what the names stand for.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};

use toml::de::DeValue;

use super::{Parser, Section, quote, shown};

/// Names that `features` may switch.
pub const CPU_FEATURES: [&str; 43] = [
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
];

/// How much of the host's processor a VM is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuBase {
    /// All that can be virtualized.
    #[default]
    Host,
    /// The same on every host of the vendor.
    Baseline,
}

/// `cpu` and `features`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuConfig {
    /// `cpu`.
    pub base: CpuBase,
    /// `features`: names out of [`CPU_FEATURES`], each once, and whether it is shown or hidden.
    pub features: Vec<(String, bool)>,
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
        }
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
