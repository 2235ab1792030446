//! `scheduler` and `slice` of the host, `[[pool]]`, and a VM's `weight`, `cap`, `priority`, `affinity`, `pool` and
//! `reservation`.
//!
//! The first pool is called `default`: it has the processors that are in no other one, and the VMs that name no pool.
//! What depends on the host's processors is compared by `check`: processors that there are, and that no pool keeps more
//! time for reservations than it has.

use alloc::{borrow::ToOwned, format, string::String, vec::Vec};

use sched::{CpuSet, MAX_PCPUS, PRIORITIES, PolicyKind, RESERVABLE, Reservation, WEIGHTS};
use toml::de::DeValue;

use super::{
    Config, Environment, Location, Parser, Section, Severity, is_vm_name, kind, quote, shown,
};

/// Most CPU pools, the default one included.
pub const MAX_POOLS: usize = 16;
/// Name of the pool of all that is in no other.
pub const DEFAULT_POOL: &str = "default";
/// Length of a time slice unless the configuration says otherwise, in microseconds.
pub const DEFAULT_SLICE_US: u64 = 10_000;
/// Lengths that a time slice may have, in microseconds.
pub const SLICES_US: core::ops::RangeInclusive<u64> = 500..=100_000;
/// Least budget of a reservation, in microseconds.
pub const MIN_BUDGET_US: u64 = 100;
/// Lengths that the period of a reservation may have, in microseconds.
pub const PERIODS_US: core::ops::RangeInclusive<u64> = 1_000..=10_000_000;

/// A CPU pool: processors that share a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// `name`.
    pub name: String,
    /// `cpus`; empty for the default pool, which has the rest.
    pub cpus: CpuSet,
    /// `scheduler`.
    pub policy: PolicyKind,
    /// `slice`, in microseconds.
    pub slice_us: u64,
    pub(super) place: Location,
}

impl PoolConfig {
    /// The default pool as it is without a configuration.
    fn all() -> Self {
        PoolConfig {
            name: DEFAULT_POOL.to_owned(),
            cpus: CpuSet::EMPTY,
            policy: PolicyKind::default(),
            slice_us: DEFAULT_SLICE_US,
            place: Location::default(),
        }
    }
}

/// The CPU pools, the default one first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pools(Vec<PoolConfig>);

impl Default for Pools {
    fn default() -> Self {
        Pools(alloc::vec![PoolConfig::all()])
    }
}

impl Pools {
    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &PoolConfig> {
        self.0.iter()
    }

    /// The same with other policies, those that are in force now, in their order.
    #[must_use]
    pub fn with_policies(&self, policies: impl Iterator<Item = PolicyKind>) -> Self {
        let mut pools = self.clone();
        for (pool, policy) in pools.0.iter_mut().zip(policies) {
            pool.policy = policy;
        }
        pools
    }

    /// Number of the pool of this name, in their order.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|pool| pool.name == name)
    }

    /// The processors of a pool on a host that has so many.
    pub fn cpus(&self, index: usize, processors: usize) -> CpuSet {
        let there = CpuSet::first(processors);
        let named = |pool: &PoolConfig| pool.cpus;
        match index {
            0 => there.without(self.0.iter().map(named).fold(CpuSet::EMPTY, CpuSet::or)),
            _ => self.0.get(index).map_or(CpuSet::EMPTY, named).and(there),
        }
    }
}

/// How a VM is scheduled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSched {
    /// `pool`: its name.
    pub pool: String,
    /// `weight`, of each vCPU.
    pub weight: u32,
    /// `cap`: percent of one processor, for all vCPUs together; `None`: no limit.
    pub cap: Option<u32>,
    /// `priority`.
    pub priority: u8,
    /// `affinity`.
    pub affinity: CpuSet,
    /// `reservation`, of each vCPU, in microseconds.
    pub reservation: Option<Reservation>,
    pub(super) places: SchedPlaces,
}

impl Default for VmSched {
    fn default() -> Self {
        let params = sched::Params::default();
        VmSched {
            pool: DEFAULT_POOL.to_owned(),
            weight: params.weight,
            cap: None,
            priority: params.priority,
            affinity: CpuSet::ALL,
            reservation: None,
            places: SchedPlaces::default(),
        }
    }
}

/// Where the values stand in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SchedPlaces {
    pool: Location,
    affinity: Location,
    reservation: Location,
}

/// Keys of a VM that are read here.
pub(super) const VM_KEYS: [&str; 6] = [
    "pool",
    "weight",
    "cap",
    "priority",
    "affinity",
    "reservation",
];

/// "10ms", "500us", "2s": microseconds, saturating. `None`: not of this form.
pub(crate) fn duration_us(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at(split);
    let factor = match unit {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        _ => return None,
    };
    if digits.is_empty() {
        return None;
    }
    let number: u64 = digits.parse().unwrap_or(u64::MAX);
    Some(number.saturating_mul(factor))
}

/// Whether these microseconds may be reserved.
pub fn is_reservation(budget_us: u64, period_us: u64) -> bool {
    PERIODS_US.contains(&period_us) && (MIN_BUDGET_US..=period_us).contains(&budget_us)
}

/// Microseconds in the largest unit that suits.
pub fn time(us: u64) -> String {
    match us {
        us if us >= 1_000_000 && us.is_multiple_of(1_000_000) => format!("{} s", us / 1_000_000),
        us if us >= 1_000 && us.is_multiple_of(1_000) => format!("{} ms", us / 1_000),
        us => format!("{us} us"),
    }
}

/// Millionths of a processor in percent.
pub fn percent(parts: u64) -> String {
    format!("{}.{} %", parts / 10_000, parts / 1_000 % 10)
}

impl<'t> Parser<'t> {
    /// The policy by its name.
    fn policy(&mut self, s: &Section<'_>) -> Option<PolicyKind> {
        let all = PolicyKind::ALL.map(|policy| (policy.name(), policy));
        self.choice(s, "scheduler", &all)
    }

    /// `scheduler` and `slice` of the host: its default pool.
    pub(super) fn default_pool(&mut self, s: &Section<'_>) {
        let policy = self.policy(s);
        let slice_us = self.time_us(s, "slice", SLICES_US);
        let pool = &mut self.config.host.pools.0[0];
        pool.policy = policy.unwrap_or(pool.policy);
        pool.slice_us = slice_us.unwrap_or(pool.slice_us);
    }

    /// All `[[pool]]` sections; after `[host]`. One with an error is left out.
    pub(super) fn pools(&mut self, root: &Section<'_>) {
        let Some((value, at)) = self.value(root, "pool") else {
            return;
        };
        let DeValue::Array(list) = value else {
            let text = format!("must be [[pool]] sections; found {}", kind(value));
            return self.bad(root, at, "pool", text);
        };
        for value in list.iter() {
            let at = self.location(value.span().start);
            let DeValue::Table(table) = value.get_ref() else {
                let text = format!(
                    "must be a [[pool]] section; found {}",
                    kind(value.get_ref())
                );
                self.bad(root, at, "pool", text);
                continue;
            };
            if self.config.host.pools.0.len() == MAX_POOLS {
                let text = format!("there are too many pools; allowed: up to {}", MAX_POOLS - 1);
                return self.bad(root, at, "pool", text);
            }
            let section = Section {
                table,
                path: "pool",
                at,
                vm: None,
            };
            if let Some(pool) = self.pool(&section) {
                self.config.host.pools.0.push(pool);
            }
        }
    }

    fn pool(&mut self, s: &Section<'_>) -> Option<PoolConfig> {
        self.check_keys(s, &["name", "cpus", "scheduler", "slice"]);
        let (name, at) = self.required(s, "name")?;
        let problem = if !is_vm_name(name) {
            Some("is not a name; allowed: 1 to 32 of a to z, 0 to 9 and -")
        } else if self.config.host.pools.find(name).is_some() {
            Some("is the name of another pool")
        } else {
            None
        };
        if let Some(problem) = problem {
            self.bad(s, at, "name", format!("{} {problem}", quote(name)));
            return None;
        }
        if self.value(s, "cpus").is_none() {
            self.bad(
                s,
                s.at,
                "cpus",
                "missing; write for example cpus = [1]".to_owned(),
            );
        }
        let (cpus, at) = self.cpu_list(s, "cpus")?;
        let pools = &self.config.host.pools.0;
        let taken = pools.iter().find(|pool| !pool.cpus.and(cpus).is_empty());
        if let Some(taken) = taken {
            let text = format!(
                "processor {} is in the pool {} already",
                taken.cpus.and(cpus).lowest().unwrap_or_default(),
                quote(&taken.name)
            );
            self.bad(s, at, "cpus", text);
            return None;
        }
        let host = &self.config.host.pools.0[0];
        let (policy, slice_us) = (host.policy, host.slice_us);
        Some(PoolConfig {
            name: name.to_owned(),
            cpus,
            policy: self.policy(s).unwrap_or(policy),
            slice_us: self.time_us(s, "slice", SLICES_US).unwrap_or(slice_us),
            place: at,
        })
    }

    /// A list of processor numbers that is not empty.
    fn cpu_list(&mut self, s: &Section<'_>, key: &'static str) -> Option<(CpuSet, Location)> {
        const WANT: &str = "a list of processor numbers like [0, 1]";
        let (value, at) = self.value(s, key)?;
        let DeValue::Array(list) = value else {
            self.wrong_type(s, at, key, WANT, value);
            return None;
        };
        let mut cpus = CpuSet::EMPTY;
        for item in list.iter() {
            let at = self.location(item.span().start);
            let DeValue::Integer(n) = item.get_ref() else {
                self.wrong_type(s, at, key, WANT, item.get_ref());
                return None;
            };
            let number = usize::from_str_radix(n.as_str(), n.radix()).ok();
            let Some(number) = number.filter(|&number| number < MAX_PCPUS) else {
                let text = format!(
                    "{} is no processor; allowed: 0 to {}",
                    shown(item.get_ref()),
                    MAX_PCPUS - 1
                );
                self.bad(s, at, key, text);
                return None;
            };
            cpus = cpus.or(CpuSet::of(number));
        }
        if cpus.is_empty() {
            self.bad(s, at, key, format!("is empty; write {WANT}"));
            return None;
        }
        Some((cpus, at))
    }

    /// A time in microseconds. A plain number counts milliseconds.
    fn time_us(
        &mut self,
        s: &Section<'_>,
        key: &'static str,
        range: core::ops::RangeInclusive<u64>,
    ) -> Option<u64> {
        let (value, at) = self.value(s, key)?;
        let allowed = format!(
            "allowed: {} to {}",
            time(*range.start()),
            time(*range.end())
        );
        let us = match value {
            DeValue::Integer(n) if n.as_str().starts_with('-') => Some(0),
            DeValue::Integer(n) => Some(
                u64::from_str_radix(n.as_str(), n.radix())
                    .unwrap_or(u64::MAX)
                    .saturating_mul(1_000),
            ),
            DeValue::String(text) => duration_us(text),
            other => {
                let want = "a time like \"10ms\", or a number of milliseconds";
                self.wrong_type(s, at, key, want, other);
                return None;
            }
        };
        let text = match us {
            Some(us) if range.contains(&us) => return Some(us),
            Some(_) => format!("{} is out of range; {allowed}", shown(value)),
            None => format!(
                "{} is not a time: write a number with us, ms or s, like \"10ms\"; {allowed}",
                shown(value)
            ),
        };
        self.bad(s, at, key, text);
        None
    }

    /// A whole number of a range.
    fn number(
        &mut self,
        s: &Section<'_>,
        key: &'static str,
        range: core::ops::RangeInclusive<u32>,
    ) -> Option<u32> {
        let (value, at) = self.value(s, key)?;
        let number = match value {
            DeValue::Integer(n) => u32::from_str_radix(n.as_str(), n.radix()).ok(),
            other => {
                self.wrong_type(s, at, key, "a whole number", other);
                return None;
            }
        };
        let good = number.filter(|number| range.contains(number));
        if good.is_none() {
            let text = format!(
                "{} is out of range; allowed: {} to {}",
                shown(value),
                range.start(),
                range.end()
            );
            self.bad(s, at, key, text);
        }
        good
    }

    /// How a VM with so many vCPUs is scheduled.
    pub(super) fn vm_sched(&mut self, s: &Section<'_>, vcpus: u16) -> VmSched {
        let default = VmSched::default();
        let place = |at: Option<Location>| at.unwrap_or(s.at);
        let pool = self.string(s, "pool").map(|(name, _)| name.to_owned());
        let pool_at = self.value(s, "pool").map(|(_, at)| at);
        let affinity = self.cpu_list(s, "affinity");
        let reservation_at = self.value(s, "reservation").map(|(_, at)| at);
        let priorities = u32::from(*PRIORITIES.start())..=u32::from(*PRIORITIES.end());
        VmSched {
            pool: pool.unwrap_or(default.pool),
            weight: self.number(s, "weight", WEIGHTS).unwrap_or(default.weight),
            cap: self.number(s, "cap", 1..=100 * u32::from(vcpus)),
            priority: self
                .number(s, "priority", priorities)
                .map_or(default.priority, |priority| priority as u8),
            affinity: affinity.map_or(default.affinity, |(cpus, _)| cpus),
            reservation: self.reservation(s),
            places: SchedPlaces {
                pool: place(pool_at),
                affinity: place(affinity.map(|(_, at)| at)),
                reservation: place(reservation_at),
            },
        }
    }

    fn reservation(&mut self, vm: &Section<'_>) -> Option<Reservation> {
        let (table, at) = self.table(vm, "reservation")?;
        let s = Section {
            table,
            path: "vm.reservation",
            at,
            vm: vm.vm.clone(),
        };
        self.check_keys(&s, &["budget", "period"]);
        for key in ["budget", "period"] {
            if self.value(&s, key).is_none() {
                let text = format!("missing; write for example {key} = \"10ms\"");
                self.bad(&s, at, key, text);
            }
        }
        let period = self.time_us(&s, "period", PERIODS_US)?;
        let budget = self.time_us(&s, "budget", MIN_BUDGET_US..=period)?;
        Some(Reservation { budget, period })
    }
}

/// Compares VMs and pools with each other and with the host's processors. VMs with an error are named in
/// `disabled`, and left out by the caller.
pub(super) fn check(config: &mut Config, environment: &dyn Environment) {
    let pools = match environment.pools() {
        Some(pools) => pools.clone(),
        None => config.host.pools.clone(),
    };
    let processors = environment.processors().map(|count| count.min(MAX_PCPUS));
    for pool in pools.iter().skip(1) {
        if let Some(count) = processors
            && let Some(absent) = pool.cpus.without(CpuSet::first(count)).lowest()
        {
            let text = format!(
                "there is no processor {absent}; the host has 0 to {}",
                count - 1
            );
            config.note(Severity::Warning, pool.place, None, "pool.cpus", text);
        }
    }
    // Millionths of a processor that the VMs before have reserved, by pool.
    let mut reserved = alloc::vec![0_u64; pools.0.len()];
    let mut problems: Vec<(usize, Location, &str, String)> = Vec::new();
    for (number, vm) in config.vms.iter().enumerate() {
        let sched = &vm.sched;
        let Some(index) = pools.find(&sched.pool) else {
            let names: Vec<_> = pools.iter().map(|pool| quote(&pool.name)).collect();
            let text = format!(
                "there is no pool {}; there are: {}",
                quote(&sched.pool),
                names.join(", ")
            );
            problems.push((number, sched.places.pool, "vm.pool", text));
            continue;
        };
        let pool = &pools.0[index];
        // A workstation does not know how many processors the default pool will have.
        let cpus = match (processors, index) {
            (Some(count), _) => Some(pools.cpus(index, count)),
            (None, 0) => None,
            (None, _) => Some(pool.cpus),
        };
        if let Some(cpus) = cpus
            && cpus.and(sched.affinity).is_empty()
        {
            let (at, key, text) = if cpus.is_empty() {
                let text = format!("no processor is left for the pool {}", quote(&pool.name));
                (sched.places.pool, "vm.pool", text)
            } else {
                let numbers: Vec<_> = cpus.iter().map(|cpu| format!("{cpu}")).collect();
                let text = format!(
                    "none of these processors is in the pool {}, which has: {}",
                    quote(&pool.name),
                    numbers.join(", ")
                );
                (sched.places.affinity, "vm.affinity", text)
            };
            problems.push((number, at, key, text));
            continue;
        }
        let Some(reservation) = sched.reservation else {
            continue;
        };
        let (at, key) = (sched.places.reservation, "vm.reservation");
        if pool.policy != PolicyKind::Reservation {
            let text = format!(
                "the scheduler of the pool {} is {}, which keeps no time; it has to be {}",
                quote(&pool.name),
                quote(pool.policy.name()),
                quote(PolicyKind::Reservation.name())
            );
            problems.push((number, at, key, text));
            continue;
        }
        let wanted = reservation.utilization() * u64::from(vm.vcpus);
        if let Some(cpus) = cpus {
            let all = cpus.len() as u64 * RESERVABLE;
            let left = all.saturating_sub(reserved[index]);
            if wanted > left {
                let text = format!(
                    "{} vCPU(s) x {} / {} = {} of a processor; the pool {} has {} x {} = {} to give, and {} is reserved",
                    vm.vcpus,
                    time(reservation.budget),
                    time(reservation.period),
                    percent(wanted),
                    quote(&pool.name),
                    cpus.len(),
                    percent(RESERVABLE),
                    percent(all),
                    percent(reserved[index])
                );
                problems.push((number, at, key, text));
                continue;
            }
        }
        reserved[index] += wanted;
    }
    let mut bad: Vec<usize> = Vec::new();
    for (number, at, key, text) in problems {
        let name = config.vms[number].name.clone();
        config.note(Severity::Error, at, Some(&name), key, text);
        bad.push(number);
    }
    let mut number = 0;
    config.vms.retain(|_| {
        number += 1;
        !bad.contains(&(number - 1))
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{FileFacts, FileKind, check, parse};

    struct Host(Option<usize>);

    impl Environment for Host {
        fn memory_bytes(&self) -> Option<u64> {
            None
        }
        fn processors(&self) -> Option<usize> {
            self.0
        }
        fn file(&self, _path: &str) -> Result<FileFacts, String> {
            let kind = FileKind::Elf;
            Ok(FileFacts { bytes: 1000, kind })
        }
    }

    fn vm(name: &str, lines: &str) -> String {
        format!(
            "[[vm]]\nname = \"{name}\"\nmemory = \"64M\"\nboot = {{ kernel = \"k\" }}\n{lines}\n"
        )
    }

    fn checked(text: &str, processors: Option<usize>) -> Config {
        let mut config = parse("p", text.as_bytes());
        check(&mut config, &Host(processors));
        config
    }

    #[test]
    fn without_a_word_there_is_one_fair_pool() {
        let config = checked(&vm("a", ""), Some(2));
        assert!(!config.has_errors(), "{}", config.report());
        assert_eq!(config.vms[0].sched.pool, DEFAULT_POOL);
        assert_eq!(config.vms[0].sched.weight, 100);
        let pools = &config.host.pools;
        assert_eq!(pools.iter().count(), 1);
        let pool = pools.iter().next().unwrap();
        assert_eq!((pool.policy, pool.slice_us), (PolicyKind::Fair, 10_000));
        assert_eq!(pools.cpus(0, 2), CpuSet::first(2));
    }

    #[test]
    fn all_of_it_is_read() {
        let text = "[host]\nscheduler = \"priority\"\nslice = 5\n\
             [[pool]]\nname = \"rt\"\ncpus = [1, 3]\nscheduler = \"reservation\"\nslice = \"500us\"\n"
            .to_owned()
            + &vm("a", "pool = \"rt\"\nweight = 400\ncap = 50\npriority = 31\naffinity = [3]\nreservation = { budget = \"2ms\", period = 10 }")
            + &vm("b", "vcpus = 2\ncap = 200");
        let config = checked(&text, Some(4));
        assert!(!config.has_errors(), "{}", config.report());
        let pools: Vec<_> = config.host.pools.iter().collect();
        assert_eq!(
            (pools[0].policy, pools[0].slice_us),
            (PolicyKind::Priority, 5_000)
        );
        assert_eq!(
            (pools[1].policy, pools[1].slice_us),
            (PolicyKind::Reservation, 500)
        );
        assert_eq!(config.host.pools.cpus(0, 4), CpuSet::from_bits(0b0101));
        assert_eq!(config.host.pools.cpus(1, 2), CpuSet::of(1));
        let a = &config.vms[0].sched;
        assert_eq!((a.weight, a.cap, a.priority), (400, Some(50), 31));
        assert_eq!((a.pool.as_str(), a.affinity), ("rt", CpuSet::of(3)));
        let reservation = Reservation {
            budget: 2_000,
            period: 10_000,
        };
        assert_eq!(a.reservation, Some(reservation));
        assert_eq!(config.vms[1].sched.cap, Some(200));
    }

    #[test]
    fn what_is_wrong_in_a_vm_is_named() {
        for (lines, key, words) in [
            (
                "weight = 0",
                "vm.weight",
                "0 is out of range; allowed: 1 to 10000",
            ),
            ("weight = \"1\"", "vm.weight", "a whole number"),
            ("cap = 101", "vm.cap", "allowed: 1 to 100"),
            ("priority = 32", "vm.priority", "allowed: 0 to 31"),
            ("affinity = []", "vm.affinity", "is empty"),
            ("affinity = [64]", "vm.affinity", "allowed: 0 to 63"),
            ("affinity = 1", "vm.affinity", "a list of"),
            ("affinity = [7]", "vm.affinity", "which has: 0, 1"),
            ("pool = \"rt\"", "vm.pool", "there are: \"default\""),
            (
                "reservation = { budget = 1, period = 9 }",
                "vm.reservation",
                "it has to be \"reservation\"",
            ),
            (
                "reservation = { budget = 1 }",
                "vm.reservation.period",
                "missing",
            ),
            (
                "reservation = { budget = 3, period = 2 }",
                "vm.reservation.budget",
                "allowed: 100 us to 2 ms",
            ),
            (
                "reservation = { budget = 1, period = \"1m\" }",
                "vm.reservation.period",
                "with us, ms or s",
            ),
        ] {
            let config = checked(&vm("a", lines), Some(2));
            let problem = config.problems.first().expect(lines);
            assert_eq!(problem.key, key, "{lines}: {problem}");
            assert!(problem.message.contains(words), "{lines}: {problem}");
            assert_eq!(config.disabled, ["a"], "{lines}");
            assert!(config.vms.is_empty(), "{lines}");
        }
    }

    #[test]
    fn what_is_wrong_in_a_pool_is_named() {
        let pool = "[[pool]]\nname = \"p\"\ncpus = [1]\n".to_owned();
        for (text, key, words) in [
            ("[[pool]]\ncpus = [1]\n".to_owned(), "pool.name", "missing"),
            (
                "[[pool]]\nname = \"p\"\n".to_owned(),
                "pool.cpus",
                "missing",
            ),
            (
                "[[pool]]\nname = \"P\"\ncpus = [1]\n".to_owned(),
                "pool.name",
                "not a name",
            ),
            (
                "[[pool]]\nname = \"default\"\ncpus = [1]\n".to_owned(),
                "pool.name",
                "another pool",
            ),
            (
                pool.clone() + &pool.replace("\"p\"", "\"q\""),
                "pool.cpus",
                "in the pool \"p\"",
            ),
            (
                pool.replace("1]", "1]\nscheduler = \"cfs\""),
                "pool.scheduler",
                "\"fair\", \"round-robin\"",
            ),
            (
                "[host]\nslice = \"1s\"\n".to_owned(),
                "host.slice",
                "allowed: 500 us to 100 ms",
            ),
            (
                pool.replace("[1]", "[5]"),
                "pool.cpus",
                "there is no processor 5",
            ),
            ("pool = 1\n".to_owned(), "pool", "must be [[pool]] sections"),
        ] {
            let config = checked(&(text.clone() + &vm("a", "")), Some(2));
            let problem = config.problems.first().expect(&text);
            assert_eq!(problem.key, key, "{text}: {problem}");
            assert!(problem.message.contains(words), "{text}: {problem}");
            assert_eq!(config.vms.len(), 1, "{text}");
        }
    }

    #[test]
    fn more_than_there_is_cannot_be_reserved() {
        let text = "[host]\nscheduler = \"reservation\"\n".to_owned()
            + &vm("a", "reservation = { budget = 6, period = 10 }")
            + &vm("b", "vcpus = 2\nreservation = { budget = 3, period = 10 }")
            + &vm("c", "reservation = { budget = 8, period = 10 }");
        let config = checked(&text, Some(2));
        let problem = &config.problems[0];
        assert_eq!(
            problem.message,
            "1 vCPU(s) x 8 ms / 10 ms = 80.0 % of a processor; the pool \"default\" has 2 x 95.0 % = 190.0 % to \
             give, and 120.0 % is reserved"
        );
        assert_eq!(config.disabled, ["c"]);
        assert_eq!(config.vms.len(), 2);
        // The workstation does not know the processors.
        assert!(!checked(&text, None).has_errors());
    }

    #[test]
    fn a_pool_that_took_all_leaves_none() {
        let text = "[[pool]]\nname = \"p\"\ncpus = [0, 1]\n".to_owned() + &vm("a", "");
        let config = checked(&text, Some(2));
        assert!(config.problems[0].message.contains("no processor is left"));
        assert!(checked(&text, Some(3)).problems.is_empty());
    }
}
