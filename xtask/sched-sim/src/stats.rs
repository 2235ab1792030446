//! What a simulation came to: per job, per vCPU, and in one line.
//!
//! Waiting time of a job: its response time less the processor time that got it on. So it has the time in
//! the run queue, switches, spinning for locks, and waiting behind an earlier job of the same vCPU.
//! Jobs that are not done when the simulation ends count with the time that they have taken so far:
//! else a policy that starves them would look good.

use sched::{Metrics, PolicyKind, PoolId, Refusal};
use serde::Serialize;

use crate::{Ns, workload::VcpuRef};

/// A job that was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobRecord {
    /// Whose.
    pub vcpu: VcpuRef,
    /// When it was released.
    pub release: Ns,
    /// When it first got on; `None`: never.
    pub start: Option<Ns>,
    /// When it was done, or when the simulation ended.
    pub end: Ns,
    /// Whether it was done.
    pub done: bool,
    /// Processor time that got it on, without spinning.
    pub work: Ns,
    /// When it should have been done.
    pub deadline: Option<Ns>,
}

impl JobRecord {
    /// From its release to its end.
    pub fn response(&self) -> Ns {
        self.end - self.release
    }

    /// The response time less the processor time that got it on.
    pub fn waiting(&self) -> Ns {
        self.response().saturating_sub(self.work)
    }

    /// Whether it came after its deadline, or was not done although that has passed.
    pub fn missed(&self) -> bool {
        self.deadline.is_some_and(|at| self.end > at)
    }
}

/// Times of one vCPU, in nanoseconds, and counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuTotals {
    /// On a processor, in the guest; spinning included.
    pub run: Ns,
    /// Of that, spinning for a lock.
    pub spun: Ns,
    /// Ready, and not on a processor.
    pub wait: Ns,
    /// The longest wait without a break.
    pub longest_wait: Ns,
    /// How often it was put on a processor.
    pub switches: u64,
    /// Of those, on another processor than before.
    pub migrations: u64,
}

/// A time in which a vCPU was on a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// Which processor.
    pub pcpu: usize,
    /// Who ran there.
    pub vcpu: VcpuRef,
    /// From here.
    pub from: Ns,
    /// To here.
    pub to: Ns,
}

/// What came of one vCPU.
#[derive(Clone, Copy, Debug)]
pub struct VcpuOutcome {
    /// Which one.
    pub vcpu: VcpuRef,
    /// Its CPU pool.
    pub pool: PoolId,
    /// Its weight.
    pub weight: u32,
    /// What it would have run on a processor for itself.
    pub demand: Ns,
    /// Times and counts, as the simulated host saw them.
    pub totals: VcpuTotals,
    /// The same as the scheduler counted it.
    pub metrics: Metrics,
}

/// What came of a workload under a policy.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The policy.
    pub policy: PolicyKind,
    /// How long it was simulated.
    pub duration: Ns,
    /// Physical processors.
    pub pcpus: usize,
    /// Names of the VMs.
    pub vms: Vec<String>,
    /// One for each vCPU that was admitted.
    pub vcpus: Vec<VcpuOutcome>,
    /// Jobs that count, in the order of their release for each vCPU.
    pub jobs: Vec<JobRecord>,
    /// Who ran where and when, in the order of the ends.
    pub timeline: Vec<Interval>,
    /// vCPUs that the scheduler refused, and why.
    pub refused: Vec<(VcpuRef, Refusal)>,
    /// Time in which a processor was idle while a vCPU waited that it may run, summed over processors.
    pub idle_while_waiting: Ns,
}

impl Outcome {
    /// Response times of the jobs, ascending.
    pub fn responses(&self) -> Vec<Ns> {
        let mut responses: Vec<_> = self.jobs.iter().map(JobRecord::response).collect();
        responses.sort_unstable();
        responses
    }

    /// Processor time of a VM.
    pub fn run_of(&self, vm: usize) -> Ns {
        let of_it = self.vcpus.iter().filter(|outcome| outcome.vcpu.vm == vm);
        of_it.map(|outcome| outcome.totals.run).sum()
    }

    /// How fair it was: Jain's index of what each vCPU got of what it was entitled to, which is what
    /// max-min fairness by weight and demand gives it of the time that all of its pool got together.
    pub fn jain(&self) -> f64 {
        let mut pools: Vec<PoolId> = self.vcpus.iter().map(|outcome| outcome.pool).collect();
        pools.sort_unstable();
        pools.dedup();
        let mut got = Vec::new();
        for pool in pools {
            let of_it = || self.vcpus.iter().filter(|outcome| outcome.pool == pool);
            let all: Ns = of_it().map(|outcome| outcome.totals.run).sum();
            let claims: Vec<_> = of_it()
                .map(|outcome| (outcome.demand as f64, f64::from(outcome.weight)))
                .collect();
            let parts = of_it()
                .zip(entitlements(all as f64, &claims))
                .filter(|(_, entitled)| *entitled > 0.0)
                .map(|(outcome, entitled)| outcome.totals.run as f64 / entitled);
            got.extend(parts);
        }
        jain(&got)
    }

    /// The figures of a table's row.
    pub fn summary(&self) -> Summary {
        let jobs = || self.jobs.iter();
        let seconds = self.duration as f64 / 1e9;
        let per_second = |count: u64| count as f64 / seconds;
        let totals = || self.vcpus.iter().map(|outcome| outcome.totals);
        let done = jobs().filter(|job| job.done).count();
        let run: Ns = totals().map(|t| t.run).sum();
        Summary {
            jobs: self.jobs.len(),
            done,
            awt: mean(jobs().map(JobRecord::waiting)),
            art: mean(jobs().map(JobRecord::response)),
            p99: percentile(&self.responses(), 0.99),
            latency: mean(jobs().map(|job| job.start.unwrap_or(job.end) - job.release)),
            throughput: per_second(done as u64),
            jain: self.jain(),
            switches: per_second(totals().map(|t| t.switches).sum()),
            migrations: per_second(totals().map(|t| t.migrations).sum()),
            deadlines: jobs().filter(|job| job.deadline.is_some()).count(),
            misses: jobs().filter(|job| job.missed()).count(),
            longest_wait: totals().map(|t| t.longest_wait).max().unwrap_or(0),
            used: run as f64 / (self.duration as f64 * self.pcpus as f64),
        }
    }
}

/// The means and sums that tables show. Times are nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Jobs released, endless ones not counted.
    pub jobs: usize,
    /// Jobs done.
    pub done: usize,
    /// Average waiting time, in nanoseconds; `None` if there are no jobs. So the others.
    pub awt: Option<f64>,
    /// Average response time.
    pub art: Option<f64>,
    /// The response time that 99 of 100 jobs keep.
    pub p99: Option<Ns>,
    /// Average time from release to first progress.
    pub latency: Option<f64>,
    /// Jobs done in a second.
    pub throughput: f64,
    /// Jain's index of what the VMs got of what they were entitled to: 1 is perfectly fair.
    pub jain: f64,
    /// vCPUs put on a processor, in a second.
    pub switches: f64,
    /// Of those, put on another than before.
    pub migrations: f64,
    /// Jobs with a deadline.
    pub deadlines: usize,
    /// Of those, missed.
    pub misses: usize,
    /// The longest that a ready vCPU waited without a break.
    pub longest_wait: Ns,
    /// Share of the processors' time that guests ran.
    pub used: f64,
}

/// The value that a share `quantile` of the values is not above; `None` of no values. Nearest rank.
pub fn percentile(sorted: &[Ns], quantile: f64) -> Option<Ns> {
    let rank = (sorted.len() as f64 * quantile).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

/// Jain's fairness index: 1 if all are equal, 1/n if one has all. 1 of nothing.
pub fn jain(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    let squares: f64 = values.iter().map(|x| x * x).sum();
    if squares == 0.0 {
        return 1.0;
    }
    sum * sum / (values.len() as f64 * squares)
}

/// Divides a capacity among claims by weight, as far as each claim goes: max-min fair.
///
/// `claims`: demand and weight of each. What those with little demand leave is divided again.
pub fn entitlements(capacity: f64, claims: &[(f64, f64)]) -> Vec<f64> {
    let mut given = vec![None; claims.len()];
    let mut left = capacity;
    loop {
        let open = || (0..claims.len()).filter(|&i| claims[i].1 > 0.0);
        let weight: f64 = open()
            .filter(|&i| given[i].is_none())
            .map(|i| claims[i].1)
            .sum();
        if weight == 0.0 {
            break;
        }
        let share = left.max(0.0) / weight;
        let content: Vec<_> = open()
            .filter(|&i| given[i].is_none() && claims[i].0 <= share * claims[i].1)
            .collect();
        if content.is_empty() {
            for i in open().filter(|&i| given[i].is_none()).collect::<Vec<_>>() {
                given[i] = Some(share * claims[i].1);
            }
            break;
        }
        for i in content {
            given[i] = Some(claims[i].0);
            left -= claims[i].0;
        }
    }
    given.into_iter().map(Option::unwrap_or_default).collect()
}

/// Mean of some times; `None` of none.
pub fn mean(values: impl Iterator<Item = Ns>) -> Option<f64> {
    let (mut sum, mut count) = (0_u128, 0_u64);
    for value in values {
        sum += u128::from(value);
        count += 1;
    }
    (count > 0).then(|| sum as f64 / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<Ns> = (1..=100).collect();
        assert_eq!(percentile(&values, 0.99), Some(99));
        assert_eq!(percentile(&values, 0.5), Some(50));
        assert_eq!(percentile(&values, 1.0), Some(100));
        assert_eq!(percentile(&values, 0.0), Some(1));
        assert_eq!(percentile(&[7], 0.99), Some(7));
        assert_eq!(percentile(&[], 0.99), None);
    }

    #[test]
    fn jains_index() {
        assert!((jain(&[2.0, 2.0, 2.0]) - 1.0).abs() < 1e-12);
        assert!((jain(&[1.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-12);
        assert!((jain(&[]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn entitlements_follow_weights_and_demands() {
        let close = |found: Vec<f64>, expected: &[f64]| {
            assert_eq!(found.len(), expected.len());
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() < 1e-9, "{found:?}");
            }
        };
        // Everyone wants all: by weight.
        let all = f64::INFINITY;
        close(
            entitlements(70.0, &[(all, 1.0), (all, 2.0), (all, 4.0)]),
            &[10.0, 20.0, 40.0],
        );
        // One wants little: the others share what it leaves.
        close(
            entitlements(90.0, &[(10.0, 1.0), (all, 1.0), (all, 1.0)]),
            &[10.0, 40.0, 40.0],
        );
        // There is enough.
        close(
            entitlements(90.0, &[(10.0, 1.0), (20.0, 5.0)]),
            &[10.0, 20.0],
        );
        close(entitlements(90.0, &[]), &[]);
    }

    #[test]
    fn a_job_that_is_not_done_counts_so_far() {
        let job = JobRecord {
            vcpu: VcpuRef { vm: 0, vcpu: 0 },
            release: 100,
            start: None,
            end: 1_100,
            done: false,
            work: 300,
            deadline: Some(1_000),
        };
        assert_eq!(
            (job.response(), job.waiting(), job.missed()),
            (1_000, 700, true)
        );
        assert!(
            !JobRecord {
                deadline: Some(1_100),
                ..job
            }
            .missed()
        );
    }
}
