//! What is told of the figures: which operations there are, tables, and the file for programs.

use std::{collections::BTreeMap, fmt::Write};

use sched::PolicyKind;

use super::figures::{Figures, Place, Unit};
use crate::table::{grouped, markdown};

/// One operation that is reported.
pub struct Operation {
    /// Its key in the figures.
    pub key: &'static str,
    /// In words.
    pub title: &'static str,
    /// What KVM on Linux 6.1 takes on the same emulated AMD-V machine, by its guest's TSC.
    pub kvm: Option<u64>,
    /// The most that Plinth is to take on AMD-V; on VT-x, half as much again.
    pub bar: Option<u64>,
}

const fn operation(
    key: &'static str,
    title: &'static str,
    kvm: Option<u64>,
    bar: Option<u64>,
) -> Operation {
    Operation {
        key,
        title,
        kvm,
        bar,
    }
}

/// All operations, in the order of the tables. Figures that are not listed follow.
pub const OPERATIONS: [Operation; 33] = [
    operation("floor", "nothing (the measurement itself)", Some(4), None),
    operation("cpuid", "CPUID", Some(2835), Some(250)),
    operation("hypercall", "hypercall", Some(3070), Some(250)),
    operation("rdmsr", "RDMSR of APIC_BASE", Some(2900), Some(250)),
    operation("wrmsr", "WRMSR of APIC_BASE", Some(3066), Some(300)),
    operation("wbinvd", "WBINVD", Some(2736), None),
    operation("pic-in", "port read, PIC", Some(1507), Some(300)),
    operation("pic-out", "port write, PIC", Some(2231), Some(400)),
    operation("pit-in", "port read, PIT counter", Some(1537), Some(400)),
    operation("pit-out", "port write, PIT", Some(1527), None),
    operation(
        "unclaimed-in",
        "port read, nobody's (KVM: user space)",
        Some(3149),
        None,
    ),
    operation(
        "unclaimed-out",
        "port write, nobody's (KVM: user space)",
        Some(3121),
        None,
    ),
    operation("uart-in", "port read, UART", None, None),
    operation("pm-timer-in", "port read, ACPI timer", None, None),
    operation("lapic-read", "LAPIC read, MMIO", Some(3727), Some(900)),
    operation("lapic-write", "LAPIC write, MMIO", None, None),
    operation("ioapic-read", "IOAPIC read, MMIO", Some(3885), Some(900)),
    operation(
        "mmio-read",
        "MMIO read, PCI configuration (KVM: user space)",
        Some(5613),
        Some(900),
    ),
    operation(
        "mmio-write",
        "MMIO write, PCI configuration (KVM: user space)",
        Some(5244),
        None,
    ),
    operation("cr3-write", "CR3 write", Some(4), None),
    operation("cr8-write", "CR8 write", Some(4), None),
    operation(
        "self-ipi",
        "self-IPI by x2APIC to its handler",
        Some(7783),
        Some(900),
    ),
    operation(
        "self-ipi-xapic",
        "self-IPI by MMIO to its handler",
        None,
        None,
    ),
    operation(
        "hlt-timer",
        "timer's expiry during HLT to its handler",
        None,
        None,
    ),
    operation(
        "virtio-kick",
        "virtio-blk, notification to interrupt, one sector",
        None,
        None,
    ),
    operation(
        "vcpu-wake",
        "IPI to a halted vCPU's handler, one processor for both",
        None,
        None,
    ),
    operation(
        "vcpu-switch",
        "of that, from HLT to the other vCPU's handler",
        None,
        None,
    ),
    operation(
        "fault-4k",
        "first write to a fresh 4 KiB page",
        Some(9647),
        Some(1500),
    ),
    operation(
        "kernel-to-entry",
        "kernel's first instruction to first VM entry",
        None,
        None,
    ),
    operation(
        "vm-start",
        "begin of a VM's making to its first instruction",
        None,
        None,
    ),
    operation(
        "linux-boot",
        "Linux 6.1, first instruction to /init",
        None,
        None,
    ),
    operation("image-bytes", "kernel image, without symbols", None, None),
    operation(
        "vm-overhead-bytes",
        "memory of a VM beyond RAM and nested tables",
        None,
        Some(256 << 10),
    ),
];

/// How much more Linux may take to boot than on the bare emulator.
pub const BOOT_BAR: f64 = 1.05;

/// What was measured at one revision.
#[derive(Default)]
pub struct Results {
    /// Figures by place.
    pub places: BTreeMap<Place, Figures>,
    /// Operations by place that differ between the runs, if there were several.
    pub unsteady: BTreeMap<Place, Vec<String>>,
    /// Instructions of the same Linux boot on the bare emulator.
    pub bare_boot: Option<u64>,
    /// Runs at each place.
    pub runs: u32,
}

impl Results {
    /// The median at a place.
    pub fn median(&self, place: Place, key: &str) -> Option<u64> {
        Some(self.places.get(&place)?.get(key)?.median)
    }

    /// Keys and titles of all that was measured, in the order of the tables.
    pub fn rows(&self) -> Vec<(String, String)> {
        let measured = |key: &str| {
            self.places
                .values()
                .any(|figures| figures.contains_key(key))
        };
        let listed = OPERATIONS
            .iter()
            .filter(|operation| measured(operation.key))
            .map(|operation| (operation.key.to_owned(), operation.title.to_owned()));
        let mut more: Vec<&String> = self
            .places
            .values()
            .flat_map(Figures::keys)
            .filter(|key| find(key).is_none())
            .collect();
        more.sort_unstable();
        more.dedup();
        let more = more.into_iter().map(|key| (key.clone(), key.clone()));
        listed.chain(more).collect()
    }
}

/// The listed operation of that key.
pub fn find(key: &str) -> Option<&'static Operation> {
    OPERATIONS.iter().find(|operation| operation.key == key)
}

fn or_dash(number: Option<u64>) -> String {
    number.map_or_else(|| "-".into(), grouped)
}

/// Whether the bar is met: on AMD-V, and on VT-x where half as much again is allowed.
fn judge(results: &Results, key: &str, bar: u64) -> String {
    let mut words = Vec::new();
    for place in results.places.keys() {
        let Some(median) = results.median(*place, key) else {
            continue;
        };
        let is_memory = results.places[place][key].unit == Unit::Bytes;
        let allowed = match place {
            Place::BochsVtx if !is_memory => bar * 3 / 2,
            _ => bar,
        };
        let short = match place {
            Place::QemuAmdv => "AMD-V",
            Place::BochsVtx => "VT-x",
        };
        if median > allowed {
            words.push(format!("**{short} not met**"));
        } else {
            words.push(format!("{short} met"));
        }
    }
    words.join(", ")
}

/// The table of operations: its cells, the head first.
pub fn table(results: &Results) -> Vec<Vec<String>> {
    let places = [Place::QemuAmdv, Place::BochsVtx];
    let mut rows = vec![
        [
            "operation",
            places[0].title(),
            places[1].title(),
            "KVM, AMD-V",
            "KVM / Plinth",
            "bar",
            "",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for (key, title) in results.rows() {
        if key.starts_with(EXITS) || key.starts_with(DECISIONS) {
            continue;
        }
        let operation = find(&key);
        let ours = results.median(Place::QemuAmdv, &key);
        let kvm = operation.and_then(|operation| operation.kvm);
        let ratio = match (ours, kvm) {
            (Some(ours), Some(kvm)) if ours > 0 && kvm > 100 => {
                format!("{:.1}", kvm as f64 / ours as f64)
            }
            _ => "-".into(),
        };
        let ratio = match ours {
            // Hardly more than the measurement itself.
            Some(ours) if ours < 10 && kvm.is_some_and(|kvm| kvm > 100) => "no exit".into(),
            _ => ratio,
        };
        let bar = operation.and_then(|operation| operation.bar);
        rows.push(vec![
            title,
            or_dash(ours),
            or_dash(results.median(Place::BochsVtx, &key)),
            or_dash(kvm),
            ratio,
            or_dash(bar),
            bar.map_or_else(String::new, |bar| judge(results, &key, bar)),
        ]);
    }
    rows
}

/// The beginning of the keys of the scheduler's decisions, before `POLICY-VCPUS`.
pub const DECISIONS: &str = "sched-decision-";

/// Numbers of vCPUs among whom the scheduler's decision is measured.
const AMONG: [u64; 3] = [4, 64, 1024];

/// The scheduler's decision by policy: cells, the head first. The bar: from the least number of vCPUs to the greatest it grows by no
/// more than the logarithm does.
pub fn decisions(results: &Results) -> Vec<Vec<String>> {
    let mut head = vec!["policy".to_owned(), "where".to_owned()];
    head.extend(AMONG.map(|vcpus| format!("{} vCPUs", grouped(vcpus))));
    head.extend(["growth", "bar", ""].map(str::to_owned));
    let mut rows = vec![head];
    let [least, _, greatest] = AMONG;
    let bar = greatest.ilog2() / least.ilog2();
    for policy in PolicyKind::ALL {
        for place in results.places.keys() {
            let costs =
                AMONG.map(|vcpus| results.median(*place, &format!("{DECISIONS}{policy}-{vcpus}")));
            let [Some(few), _, Some(many)] = costs else {
                continue;
            };
            let met = many <= few * u64::from(bar);
            let mut row = vec![policy.to_string(), place.title().to_owned()];
            row.extend(costs.map(or_dash));
            row.extend([
                format!("{:.1}", many as f64 / few as f64),
                bar.to_string(),
                if met { "met" } else { "**not met**" }.to_owned(),
            ]);
            rows.push(row);
        }
    }
    rows
}

/// The beginning of the keys of exits during the Linux boot.
pub const EXITS: &str = "linux-exits-";

/// Exits by kind during the Linux boot: cells, the head first.
pub fn exits(results: &Results) -> Vec<Vec<String>> {
    let head = ["exit", Place::QemuAmdv.title(), Place::BochsVtx.title()];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut sums = [0; 2];
    let places = [Place::QemuAmdv, Place::BochsVtx];
    for (key, _) in results.rows() {
        if let Some(kind) = key.strip_prefix(EXITS) {
            let counts = places.map(|place| results.median(place, &key));
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count.unwrap_or(0);
            }
            rows.push(vec![
                kind.to_owned(),
                or_dash(counts[0]),
                or_dash(counts[1]),
            ]);
        }
    }
    rows.push(vec!["all".into(), grouped(sums[0]), grouped(sums[1])]);
    rows
}

/// Two revisions beside each other: cells, the head first. Only what both have.
pub fn comparison(ours: &Results, theirs: &Results, name: &str) -> Vec<Vec<String>> {
    let head = ["operation", "place", name, "here", "difference"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (key, title) in ours.rows() {
        for place in ours.places.keys() {
            let (Some(new), Some(old)) = (ours.median(*place, &key), theirs.median(*place, &key))
            else {
                continue;
            };
            let percent = if old == 0 {
                String::new()
            } else {
                let part = (new as f64 - old as f64) / old as f64 * 100.0;
                format!(" ({part:+.1} %)")
            };
            rows.push(vec![
                title.clone(),
                place.name().to_owned(),
                grouped(old),
                grouped(new),
                format!("{:+}{percent}", i128::from(new) - i128::from(old)),
            ]);
        }
    }
    rows
}

/// How Linux' boot compares to the bare emulator, and whether the runs agreed; a line each.
pub fn remarks(results: &Results) -> String {
    let mut text = String::new();
    let boot = results.median(Place::QemuAmdv, "linux-boot");
    if let (Some(boot), Some(bare)) = (boot, results.bare_boot) {
        let ratio = boot as f64 / bare as f64;
        let verdict = if ratio <= BOOT_BAR { "met" } else { "not met" };
        writeln!(
            text,
            "Linux to /init on AMD-V: {} under Plinth, {} on the bare emulator: {ratio:.3} times as \
             much (bar {BOOT_BAR}: {verdict}; as a KVM guest 1.17 times on a 6.1 host, 1.12 on 6.12).",
            grouped(boot),
            grouped(bare)
        )
        .expect("a String takes any text");
    }
    for (place, operations) in &results.unsteady {
        let words = if operations.is_empty() {
            format!("the {} runs agree to the digit", results.runs)
        } else {
            format!("the runs differ in: {}", operations.join(", "))
        };
        writeln!(text, "On {}, {words}.", place.name()).expect("a String takes any text");
    }
    text
}

/// `bench/results.md`.
pub fn page(results: &Results) -> String {
    format!(
        "# What exits and starts cost\n\n\
         Written by `cargo xtask bench`; [MEASURING.md](../docs/MEASURING.md) says what the numbers mean. \
         Medians, in instructions (bytes where the row says memory or image): whole round trips as the \
         guest's TSC shows them, AMD-V in QEMU, VT-x in Bochs. KVM: Linux 6.1 as the host on the same \
         emulated AMD-V machine. On VT-x half as much again as the bar is allowed.\n\n\
         {}\n{}\n![The same as bars](results.svg)\n\n\
         ## The scheduler's decision\n\n\
         From the end of a slice to the next vCPU picked, on one processor where all want to run. Growth: from the fewest to the most; \
         that of the logarithm is the bar.\n\n{}\n\
         ## Exits while Linux boots to /init and powers off\n\n{}",
        markdown(&table(results)),
        remarks(results).replace('\n', "\n\n"),
        markdown(&decisions(results)),
        markdown(&exits(results)),
    )
}

/// `bench/results.json`.
pub fn json(results: &Results) -> String {
    let mut entries = Vec::new();
    for (key, _) in results.rows() {
        for (place, figures) in &results.places {
            if let Some(figure) = figures.get(&key) {
                entries.push(format!(
                    "  {{\"operation\": \"{key}\", \"place\": \"{}\", \"min\": {}, \"median\": {}, \
                     \"max\": {}, \"unit\": \"{}\"}}",
                    place.name(),
                    figure.min,
                    figure.median,
                    figure.max,
                    figure.unit.name()
                ));
            }
        }
    }
    format!("[\n{}\n]\n", entries.join(",\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Figure;

    fn results(cpuid: u64) -> Results {
        let mut results = Results {
            runs: 2,
            bare_boot: Some(1000),
            ..Results::default()
        };
        let mut figures = Figures::new();
        for (key, value, unit) in [
            ("cpuid", cpuid, Unit::Instructions),
            ("linux-boot", 1049, Unit::Instructions),
            ("linux-exits-cpuid", 1234, Unit::Exits),
        ] {
            figures.insert(key.into(), Figure::once(value, unit));
        }
        results.places.insert(Place::QemuAmdv, figures.clone());
        results.places.insert(Place::BochsVtx, figures);
        results.unsteady.insert(Place::QemuAmdv, vec![]);
        results
    }

    #[test]
    fn the_table_has_ratio_and_verdict() {
        let rows = table(&results(250));
        assert_eq!(
            rows[1],
            [
                "CPUID",
                "250",
                "250",
                "2,835",
                "11.3",
                "250",
                "AMD-V met, VT-x met"
            ]
        );
        let rows = table(&results(251));
        assert_eq!(rows[1][6], "**AMD-V not met**, VT-x met");
        assert!(!rows.iter().any(|row| row[0].contains("exits")));
    }

    #[test]
    fn decisions_may_grow_as_the_logarithm() {
        let mut results = results(1);
        let figures = results.places.get_mut(&Place::QemuAmdv).unwrap();
        for (key, cost) in [
            ("fair-4", 100),
            ("fair-64", 300),
            ("fair-1024", 500),
            ("sjf-4", 100),
            ("sjf-64", 200),
            ("sjf-1024", 501),
        ] {
            let figure = Figure::once(cost, Unit::Instructions);
            figures.insert(format!("{DECISIONS}{key}"), figure);
        }
        let rows = decisions(&results);
        assert_eq!(rows.len(), 3, "{rows:?}");
        let fair = [
            "fair",
            "Plinth, AMD-V",
            "100",
            "300",
            "500",
            "5.0",
            "5",
            "met",
        ];
        assert_eq!(rows[1], fair);
        assert_eq!(rows[2][7], "**not met**");
        assert!(table(&results).iter().all(|row| !row[0].contains("sjf")));
        assert!(json(&results).contains("\"sched-decision-sjf-64\""));
    }

    #[test]
    fn remarks_tell_of_the_boot_and_of_agreement() {
        let text = remarks(&results(1));
        assert!(
            text.contains("1.049 times") && text.contains(": met"),
            "{text}"
        );
        assert!(text.contains("On qemu-amdv, the 2 runs agree to the digit."));
    }

    #[test]
    fn the_file_for_programs_is_a_list_of_objects() {
        let text = json(&results(250));
        let line = "  {\"operation\": \"cpuid\", \"place\": \"qemu-amdv\", \"min\": 250, \
                    \"median\": 250, \"max\": 250, \"unit\": \"instructions\"},";
        assert!(text.lines().any(|l| l == line), "{text}");
        assert_eq!(text.matches('{').count(), 6);
        assert!(text.ends_with("}\n]\n"));
    }

    #[test]
    fn revisions_are_compared_where_both_have_figures() {
        let rows = comparison(&results(200), &results(250), "v1");
        assert_eq!(rows[1][2..], ["250", "200", "-50 (-20.0 %)"]);
        assert_eq!(rows.len(), 7);
        let nothing = Results::default();
        assert_eq!(comparison(&results(1), &nothing, "v0").len(), 1);
    }
}
