//! The scheduler's side of the configuration and of the operator's: pools, parameters of VMs, figures.
//!
//! A VM's parameters are its plan's, under a lock of their own since an operator may change them; what is made of the VM
//! and of each change is one set of `Params` for all its vCPUs.

use alloc::{format, string::String, vec::Vec};

use manage::{
    command::{
        Answer, Failure, FailureCode, Figures, HostStats, PcpuStats, PoolDetails, SchedChange,
        SchedDetails, SchedParameters, VcpuStats, VmState, VmStats,
    },
    config::{
        MIN_BUDGET_US, PERIODS_US, Pools, SLICES_US, VmSched, is_reservation, percent, time as us,
    },
};
use sched::{
    CAPS, CpuSet, Demand, EntityId, MILLION, Metrics, PRIORITIES, Params, Part, PolicyKind, Pool,
    PoolId, RESERVABLE, Refusal, Reservation, Scheduler, State, Stop, WEIGHTS,
};
use virt::{Backend, Exit};

use super::{
    MAX_VCPUS, World,
    slots::{Plan, Slot},
};
use crate::{memory, percpu, time};

/// The scheduler of this host's processors.
pub(super) fn scheduler(pools: &Pools) -> Scheduler {
    let processors = percpu::count();
    let pools: Vec<Pool> = (0..)
        .zip(pools.iter())
        .map(|(index, pool)| Pool {
            cpus: pools.cpus(index, processors),
            policy: pool.policy,
            slice: time::us_to_ticks(pool.slice_us),
        })
        .collect();
    Scheduler::new(processors, MAX_VCPUS, &pools)
}

/// What one decision costs under each policy, among 4, 64 and 1,024 vCPUs: pairs of a name and [`decision_cost`].
pub(super) fn decision_costs() -> String {
    let mut pairs = String::new();
    for policy in PolicyKind::ALL {
        for vcpus in [4, 64, 1024] {
            let cost = decision_cost(policy, vcpus);
            pairs += &format!(" {policy}-{vcpus} {cost}");
        }
    }
    pairs
}

/// TSC ticks that one decision takes among so many vCPUs that all want to run: to put one back and to pick the next. The
/// median of a round, on a scheduler of its own.
fn decision_cost(policy: PolicyKind, vcpus: usize) -> u64 {
    const DECISIONS: usize = 101;
    const SLICE: u64 = 1_000_000;
    let pool = Pool {
        cpus: CpuSet::of(0),
        policy,
        slice: SLICE,
    };
    let scheduler = Scheduler::new(1, vcpus, &[pool]);
    for number in 0..vcpus {
        let params = Params {
            weight: WEIGHTS.start() + number as u32 % WEIGHTS.end(),
            ..Params::default()
        };
        if let Ok(id) = scheduler.add(params, 0) {
            scheduler.wake(id, 0);
        }
    }
    let mut now = 0;
    scheduler.pick(0, now);
    let mut costs: Vec<u64> = (0..DECISIONS)
        .map(|_| {
            now += SLICE;
            let before = time::now_tsc();
            scheduler.stop(0, Stop::Interrupted, now);
            scheduler.pick(0, now);
            time::now_tsc().wrapping_sub(before)
        })
        .collect();
    costs.sort_unstable();
    costs[DECISIONS / 2]
}

/// A part of something in millionths.
fn part(of: u64, all: u64) -> u32 {
    (of.min(all) * MILLION / all.max(1)) as u32
}

impl<B: Backend> World<B> {
    /// The parameters of each vCPU of a VM that is scheduled like this.
    ///
    /// # Errors
    /// There is no such pool.
    pub(super) fn params(&self, plan: &Plan, sched: &VmSched) -> Result<Params, String> {
        let config = &plan.config;
        let pool = self.pools.find(&sched.pool);
        let pool = pool.ok_or_else(|| format!("there is no CPU pool \"{}\"", sched.pool))?;
        let vcpus = u32::from(config.vcpus).max(1);
        let cap = sched
            .cap
            .map(|cap| (cap / vcpus).max(u32::from(*CAPS.start())))
            .filter(|cap| *cap < u32::from(*CAPS.end()));
        let memory = memory::HOST.statistics().total * mem::PAGE_SIZE;
        Ok(Params {
            weight: sched.weight,
            cap: cap.map(|cap| cap as u8),
            priority: sched.priority,
            affinity: sched.affinity,
            pool: PoolId(pool as u8),
            reservation: sched.reservation.map(|reservation| Reservation {
                budget: time::us_to_ticks(reservation.budget),
                period: time::us_to_ticks(reservation.period),
            }),
            demand: Demand {
                memory: part(config.memory >> 20, memory >> 20),
                processors: part(u64::from(config.vcpus), percpu::count() as u64),
            },
        })
    }

    /// Figures of a vCPU, with its histogram or without.
    pub(super) fn vcpu(
        &self,
        slot: &Slot<B>,
        number: u16,
        id: EntityId,
        shows: Shows,
    ) -> VcpuStats {
        let now = time::now_tsc();
        let state = self.sched.state(id);
        let words = match state {
            _ if slot.life.state() == VmState::Paused => "paused",
            Some(State::Running { .. }) => "running",
            Some(State::Waiting | State::Throttled { .. }) => "waiting",
            Some(State::Held) => "paused",
            Some(State::Blocked { .. }) => "blocked",
            Some(State::Retired) | None => "off",
        };
        let metrics = self.sched.metrics(id, now).unwrap_or_default();
        let entity = self.entities.get(id);
        // One that runs has its lock taken; nobody waits for that here.
        let counters = entity.map(|entity| match entity.vcpu.try_lock() {
            Some(vcpu) => *vcpu.counters(),
            None => entity.exits.counters(),
        });
        let exits = Exit::NAMES.iter().zip(counters.unwrap_or([0; Exit::KINDS]));
        VcpuStats {
            vcpu: number,
            pcpu: self.sched.home_of(id).unwrap_or_default() as u32,
            state: String::from(words),
            migrations: metrics.migrations,
            exits: exits
                .filter(|(_, count)| *count > 0)
                .map(|(kind, count)| (String::from(*kind), count))
                .collect(),
            ..VcpuStats::from(figures(&metrics, shows))
        }
    }

    /// Figures of the host and of all that is not off; or of the VM of this name alone.
    ///
    /// # Errors
    /// There is no such VM.
    pub(super) fn stats(&self, only: Option<&str>) -> Result<HostStats, Failure> {
        let now = time::now_tsc();
        let at_ns = time::ns();
        let pcpu = |number: usize| {
            let metrics = self.sched.pcpu_metrics(number, now).unwrap_or_default();
            let busy_ns = time::ticks_to_ns(metrics.busy);
            PcpuStats {
                pcpu: number as u32,
                busy_ns,
                idle_ns: at_ns.saturating_sub(busy_ns),
                switches: metrics.switches,
                queued: metrics.waiting,
            }
        };
        let slots = self.slots.lock();
        let mut all = Metrics::default();
        let vms: Vec<VmStats> = slots
            .iter()
            .filter(|slot| match only {
                Some(name) => slot.plan.config.name == name,
                None => slot.life.state() != VmState::Off,
            })
            .map(|slot| {
                let entities = slot.live.iter().flat_map(|live| &live.entities);
                let mut sum = Metrics::default();
                for metrics in entities.filter_map(|&id| self.sched.metrics(id, now)) {
                    sum.add(&metrics);
                }
                all.add(&sum);
                let sched = slot.plan.sched.lock();
                let weight = match sched.reservation {
                    None => sched.weight,
                    Some(_) => 0,
                };
                drop(sched);
                VmStats {
                    summary: self.summary(slot),
                    weight,
                    total: figures(&sum, Shows::Histogram),
                    // So that the answer for many VMs stays short.
                    vcpu: self.vcpus(slot, Shows::Figures),
                }
            })
            .collect();
        let pcpus = match only {
            Some(name) if vms.is_empty() => return Err(super::verbs::no_such_vm(name)),
            Some(_) => Vec::new(),
            None => (0..percpu::count()).map(pcpu).collect(),
        };
        let mut parts: Vec<Part> = vms.iter().flat_map(VmStats::parts).collect();
        let fairness_permille = sched::fairness(&mut parts);
        Ok(HostStats {
            at_ns,
            pcpus,
            fairness_permille,
            total: figures(&all, Shows::Histogram),
            vms,
        })
    }

    /// The pools, and the parameters of all VMs.
    pub(super) fn sched_details(&self) -> SchedDetails {
        let permille = |parts: u64| parts.div_ceil(MILLION / 1000) as u32;
        let reserved = |pcpu: usize| permille(self.sched.reserved(pcpu));
        let pool = |(config, pool): (&manage::config::PoolConfig, Pool)| PoolDetails {
            name: config.name.clone(),
            policy: String::from(pool.policy.name()),
            pcpus: numbers(pool.cpus),
            slice_us: time::ticks_to_ns(pool.slice).div_ceil(1000),
            reserved_permille: pool.cpus.iter().map(reserved).collect(),
            reservable_permille: match pool.policy {
                PolicyKind::Reservation => permille(RESERVABLE),
                _ => 0,
            },
        };
        let slots = self.slots.lock();
        SchedDetails {
            pools: self
                .pools
                .iter()
                .zip(self.sched.pools())
                .map(pool)
                .collect(),
            vms: slots
                .iter()
                .map(|slot| {
                    let parameters = parameters(&slot.plan.sched.lock());
                    (slot.plan.config.name.clone(), parameters)
                })
                .collect(),
        }
    }

    /// Changes the parameters of a VM, for its vCPUs that are there and for those to come.
    ///
    /// # Errors
    /// A value is out of its range, or a vCPU cannot have it; nothing has changed then.
    pub(super) fn set_sched(&self, name: &str, change: &SchedChange) -> Result<Answer, Failure> {
        let bad = |message: String| Failure::new(FailureCode::BadRequest, message);
        let mut slots = self.slots.lock();
        let slot = slots
            .named(name)
            .ok_or_else(|| super::verbs::no_such_vm(name))?;
        let plan = slot.plan.clone();
        let mut sched = plan.sched.lock().clone();
        if let Some(weight) = change.weight {
            if !WEIGHTS.contains(&weight) {
                return Err(bad(out_of_range("weight", weight, WEIGHTS)));
            }
            sched.weight = weight;
        }
        if let Some(cap) = change.cap {
            let most = 100 * u32::from(plan.config.vcpus);
            if cap > most {
                return Err(bad(out_of_range("cap", cap, 0..=most)));
            }
            sched.cap = (cap > 0).then_some(cap);
        }
        if let Some(priority) = change.priority {
            if !PRIORITIES.contains(&priority) {
                return Err(bad(out_of_range("priority", priority, PRIORITIES)));
            }
            sched.priority = priority;
        }
        if let Some(pool) = &change.pool {
            self.pool(pool)?;
            sched.pool.clone_from(pool);
        }
        let (_, cpus) = self.pool(&sched.pool)?;
        if let Some(affinity) = &change.affinity {
            if let Some(absent) = affinity.iter().find(|cpu| !cpus.contains(**cpu as usize)) {
                return Err(bad(format!(
                    "affinity: processor {absent} is not in {name}'s pool \"{}\", which has: {cpus}",
                    sched.pool
                )));
            }
            sched.affinity = match affinity.is_empty() {
                true => CpuSet::ALL,
                false => affinity.iter().map(|&cpu| cpu as usize).collect(),
            };
        }
        if sched.affinity.and(cpus).is_empty() {
            return Err(bad(format!(
                "{name}: its affinity is {}, and the pool \"{}\" has: {cpus}: give --affinity, too",
                sched.affinity, sched.pool
            )));
        }
        if let Some((budget, period)) = change.reservation_us {
            if budget > 0 && !is_reservation(budget, period) {
                return Err(bad(format!(
                    "reservation: {} in each {} is out of range; allowed: at least {} in each {} to {}",
                    us(budget),
                    us(period),
                    us(MIN_BUDGET_US),
                    us(*PERIODS_US.start()),
                    us(*PERIODS_US.end())
                )));
            }
            sched.reservation = (budget > 0).then_some(Reservation { budget, period });
        }
        let params = self.params(&plan, &sched).map_err(bad)?;
        let live = slot.live.as_ref();
        let entities = live.map_or(&[][..], |live| &live.entities);
        let changed = self
            .sched
            .set_params(entities, params, time::now_tsc())
            .map_err(|why| self.refused(name, plan.config.vcpus, &sched, why))?;
        for pcpu in changed.iter() {
            self.kick(Some(pcpu));
        }
        let admitted_later = sched.reservation.is_some() && entities.is_empty();
        *plan.sched.lock() = sched;
        Ok(Answer::Done {
            text: match admitted_later {
                true => format!("{name}: set; its reservation is admitted when it starts"),
                false => format!("{name}: set"),
            },
        })
    }

    /// Number and processors of the pool of this name.
    fn pool(&self, name: &str) -> Result<(usize, CpuSet), Failure> {
        let index = self.pools.find(name);
        let pool = index.and_then(|index| Some((index, self.sched.pools().nth(index)?.cpus)));
        pool.ok_or_else(|| {
            let names: Vec<&str> = self.pools.iter().map(|pool| &*pool.name).collect();
            let names = names.join(", ");
            let message = format!("there is no CPU pool {name:?}; there are: {names}");
            Failure::new(FailureCode::NotFound, message)
        })
    }

    /// Why a VM cannot be scheduled like this, with the arithmetic.
    fn refused(&self, name: &str, vcpus: u16, sched: &VmSched, why: Refusal) -> Failure {
        let (Refusal::Overcommitted { wanted, left }, Some(reservation)) = (why, sched.reservation)
        else {
            let mut message = format!("{name}: {why}");
            if matches!(why, Refusal::NoReservations(_)) {
                let keeps = PolicyKind::Reservation;
                message += &format!(": pool set {} --policy {keeps}", sched.pool);
            }
            return Failure::new(FailureCode::BadRequest, message);
        };
        let message = format!(
            "{name}: {} in each {} is {} of a processor for each of {vcpus} vCPU(s); the processors of the pool \"{}\" keep up to \
             {} each, and the most that one has left for a vCPU is {}",
            us(reservation.budget),
            us(reservation.period),
            percent(wanted),
            sched.pool,
            percent(RESERVABLE),
            percent(left)
        );
        Failure::new(FailureCode::NoRoom, message)
    }

    /// Changes a pool.
    ///
    /// # Errors
    /// There is no such pool or policy, the slice is out of its range, or there are reservations that the policy would not keep.
    pub(super) fn set_pool(
        &self,
        name: &str,
        policy: Option<&str>,
        slice_us: Option<u64>,
    ) -> Result<Answer, Failure> {
        let bad = |message: String| Failure::new(FailureCode::BadRequest, message);
        let (index, _) = self.pool(name)?;
        let now = self.sched.pools().nth(index);
        let now = now.ok_or_else(|| bad(format!("there is no CPU pool {name:?}")))?;
        let kind = match policy {
            None => now.policy,
            Some(policy) => PolicyKind::from_name(policy).ok_or_else(|| {
                let names = PolicyKind::ALL.map(PolicyKind::name).join(", ");
                bad(format!("there is no policy {policy:?}; there are: {names}"))
            })?,
        };
        let slice = match slice_us {
            None => now.slice,
            Some(slice) if SLICES_US.contains(&slice) => time::us_to_ticks(slice),
            Some(slice) => {
                let (least, most) = (us(*SLICES_US.start()), us(*SLICES_US.end()));
                let slice = us(slice);
                return Err(bad(format!(
                    "slice: {slice} is out of range; allowed: {least} to {most}"
                )));
            }
        };
        let changed = self
            .sched
            .set_policy(PoolId(index as u8), kind, slice, time::now_tsc())
            .map_err(|why| Failure::new(FailureCode::WrongState, format!("{name}: {why}")))?;
        for pcpu in changed.iter() {
            self.kick(Some(pcpu));
        }
        Ok(Answer::Done {
            text: format!("{name}: set"),
        })
    }
}

fn out_of_range<T: core::fmt::Display>(
    what: &str,
    value: T,
    range: core::ops::RangeInclusive<T>,
) -> String {
    let (least, most) = (range.start(), range.end());
    format!("{what}: {value} is out of range; allowed: {least} to {most}")
}

/// What is shown of somebody's latencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shows {
    /// Averages and percentiles only.
    Figures,
    /// The histogram, too.
    Histogram,
}

/// Of one vCPU, or of several together.
fn figures(metrics: &Metrics, shows: Shows) -> Figures {
    Figures {
        run_ns: time::ticks_to_ns(metrics.run),
        wait_ns: time::ticks_to_ns(metrics.steal()),
        throttled_ns: time::ticks_to_ns(metrics.throttled),
        average_wait_ns: time::ticks_to_ns(metrics.average_wait()),
        wakeups: metrics.wakes,
        response_ns: time::ticks_to_ns(metrics.average_response()),
        response_p99_ns: time::ticks_to_ns(metrics.response_percentile(99)),
        bursts: metrics.bursts,
        switches: metrics.switches,
        io_bytes: metrics.io,
        // The classes of the histogram that have some, each by its longest time.
        latency_ns: (1..)
            .zip(metrics.latency)
            .filter(|(_, count)| shows == Shows::Histogram && *count > 0)
            .map(|(bits, count)| (time::ticks_to_ns(1 << bits).max(1), u64::from(count)))
            .collect(),
    }
}

fn numbers(cpus: CpuSet) -> Vec<u32> {
    cpus.iter().map(|cpu| cpu as u32).collect()
}

/// As the operator sees them.
pub(super) fn parameters(sched: &VmSched) -> SchedParameters {
    SchedParameters {
        pool: sched.pool.clone(),
        weight: sched.weight,
        cap: sched.cap.unwrap_or(0),
        priority: sched.priority,
        affinity: match sched.affinity {
            CpuSet::ALL => Vec::new(),
            some => numbers(some),
        },
        reservation_us: sched
            .reservation
            .map(|reservation| (reservation.budget, reservation.period)),
    }
}
