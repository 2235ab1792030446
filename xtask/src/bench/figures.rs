//! What was measured: read from what the guest and the host print, and compared.

use std::collections::BTreeMap;

use anyhow::{Context, bail};

/// Where something was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// AMD-V, as QEMU emulates it.
    QemuAmdv,
    /// VT-x, as Bochs emulates it.
    BochsVtx,
}

impl Place {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::QemuAmdv => "qemu-amdv",
            Self::BochsVtx => "bochs-vtx",
        }
    }

    /// Its name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::QemuAmdv => "Plinth, AMD-V",
            Self::BochsVtx => "Plinth, VT-x",
        }
    }
}

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Ticks of a TSC that counts instructions.
    Instructions,
    /// Bytes of memory or of a file.
    Bytes,
    /// Exits of a guest.
    Exits,
}

impl Unit {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Instructions => "instructions",
            Self::Bytes => "bytes",
            Self::Exits => "exits",
        }
    }
}

/// One operation's figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figure {
    /// The least sample.
    pub min: u64,
    /// The one in the middle.
    pub median: u64,
    /// The greatest.
    pub max: u64,
    /// What they count.
    pub unit: Unit,
}

impl Figure {
    /// Something that was counted once.
    pub fn once(value: u64, unit: Unit) -> Self {
        Figure {
            min: value,
            median: value,
            max: value,
            unit,
        }
    }
}

/// Figures by operation.
pub type Figures = BTreeMap<String, Figure>;

/// A number, decimal or hexadecimal with 0x.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The measuring guest's lines, `bench NAME iterations=N min=T median=T max=T`.
///
/// # Errors
/// It did not come to its last line, or a line is damaged.
pub fn parse_stub(log: &str) -> anyhow::Result<Figures> {
    if !log.lines().any(|line| line.trim_end() == "bench: done") {
        bail!("the measuring guest did not finish");
    }
    let mut figures = Figures::new();
    for line in log.lines() {
        let Some((name, rest)) = line
            .trim()
            .strip_prefix("bench ")
            .and_then(|line| line.split_once(' '))
        else {
            continue;
        };
        if !rest.starts_with("iterations=") {
            // What cannot be measured there, and the clock's rate.
            continue;
        }
        let value = |key: &str| {
            rest.split(' ')
                .filter_map(|word| word.split_once('='))
                .find(|(name, _)| *name == key)
                .and_then(|(_, value)| number(value))
                .with_context(|| format!("no {key} in: {line}"))
        };
        let figure = Figure {
            min: value("min")?,
            median: value("median")?,
            max: value("max")?,
            unit: Unit::Instructions,
        };
        figures.insert(name.to_owned(), figure);
    }
    Ok(figures)
}

/// What the host says of a VM at its end, with `figures = true`: pairs of name and number.
/// Empty for a Plinth that does not say it.
pub fn parse_host(log: &str, vm: &str) -> BTreeMap<String, u64> {
    after(log, &format!("{vm}: figures: "))
}

/// What a decision of the scheduler costs: `POLICY-VCPUS` and instructions.
/// Empty for a Plinth that does not say it.
pub fn parse_decisions(log: &str, vm: &str) -> BTreeMap<String, u64> {
    after(log, &format!("{vm}: decisions: "))
}

/// Exits of the VM's first vCPU by kind.
pub fn parse_exits(log: &str, vm: &str) -> BTreeMap<String, u64> {
    after(log, &format!("{vm}: vCPU 0 exits: "))
}

/// Pairs `name number ..` behind the beginning of a line of the host's.
fn after(log: &str, beginning: &str) -> BTreeMap<String, u64> {
    let Some(rest) = log
        .lines()
        .find_map(|line| line.trim_start_matches("[plinth] ").strip_prefix(beginning))
    else {
        return BTreeMap::new();
    };
    let words: Vec<&str> = rest.split_whitespace().collect();
    words
        .chunks_exact(2)
        .filter_map(|pair| Some((pair[0].to_owned(), number(pair[1])?)))
        .collect()
}

/// The operations whose figures differ between two runs.
pub fn differing(a: &Figures, b: &Figures) -> Vec<String> {
    a.keys()
        .chain(b.keys().filter(|name| !a.contains_key(*name)))
        .filter(|name| a.get(*name) != b.get(*name))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
bench tsc-khz 1000000
bench floor iterations=1000 min=4 median=4 max=4
bench cpuid iterations=1000 min=247 median=247 max=250
bench self-ipi skipped: no x2APIC
bench: done
[plinth] bench: vCPU 0 exits: cpuid 1016 port-io 12
[plinth] bench: figures: kernel-to-entry 5000 vm-start 40
";

    #[test]
    fn lines_of_the_guest_and_of_the_host_are_read() {
        let figures = parse_stub(LOG).unwrap();
        assert_eq!(figures.len(), 2);
        assert_eq!((figures["cpuid"].min, figures["cpuid"].max), (247, 250));
        assert_eq!(parse_host(LOG, "bench")["kernel-to-entry"], 5000);
        assert_eq!(parse_exits(LOG, "bench")["port-io"], 12);
        assert!(parse_exits(LOG, "other").is_empty());
    }

    #[test]
    fn a_guest_that_did_not_finish_is_no_measurement() {
        assert!(parse_stub("bench floor iterations=1 min=4 median=4 max=4\n").is_err());
        assert!(parse_stub("bench floor iterations=1 min=4 max=4\nbench: done\n").is_err());
    }

    #[test]
    fn runs_differ_by_value_and_by_what_is_there() {
        let a = parse_stub(LOG).unwrap();
        let mut b = a.clone();
        assert!(differing(&a, &b).is_empty());
        b.get_mut("cpuid").unwrap().max = 251;
        b.remove("floor");
        assert_eq!(differing(&a, &b), ["cpuid", "floor"]);
    }
}
