//! What was measured: per entity, and by addition per VM and host.
//!
//! All times are in ticks of the scheduler's clock.

/// Classes of the latency histogram: class `n` counts latencies of 2^n up to 2^(n+1) ticks, class 0 also 0.
pub const LATENCY_CLASSES: usize = 40;

/// Counts and times since the entity was added, or of several entities together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Time on a pCPU.
    pub run: u64,
    /// Time in which it was ready and waited for a pCPU.
    pub wait: u64,
    /// Time in which it was ready and its budget was used up.
    pub throttled: u64,
    /// Time blocked.
    pub blocked: u64,
    /// Wake-ups that made it ready.
    pub wakes: u64,
    /// Sum of the times from a wake-up to the next run.
    pub response: u64,
    /// The longest of these.
    pub response_max: u64,
    /// How many took how long, by power of two.
    pub latency: [u32; LATENCY_CLASSES],
    /// Bursts that ended by blocking.
    pub bursts: u64,
    /// Times that it was put on a pCPU.
    pub dispatches: u64,
    /// Those of them that put it in another one's place: the pCPU had run another one before, or it had been moved
    /// away from there meanwhile.
    pub switches: u64,
    /// Times that it was taken from its pCPU while it could have gone on.
    pub preemptions: u64,
    /// Times that it gave its pCPU away of its own accord.
    pub yields: u64,
    /// Changes of its pCPU.
    pub migrations: u64,
    /// Bytes that it asked devices for ([`Turn::io`](crate::Turn::io)).
    pub io: u64,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            run: 0,
            wait: 0,
            throttled: 0,
            blocked: 0,
            wakes: 0,
            response: 0,
            response_max: 0,
            latency: [0; LATENCY_CLASSES],
            bursts: 0,
            dispatches: 0,
            switches: 0,
            preemptions: 0,
            yields: 0,
            migrations: 0,
            io: 0,
        }
    }
}

impl Metrics {
    /// Time in which it was ready and did not run: what a guest is told as stolen.
    pub fn steal(&self) -> u64 {
        self.wait + self.throttled
    }

    /// Average time that it waited before each dispatch; 0 without one.
    pub fn average_wait(&self) -> u64 {
        self.wait.checked_div(self.dispatches).unwrap_or(0)
    }

    /// Average time from a wake-up to the next run; 0 without one.
    pub fn average_response(&self) -> u64 {
        let answered: u64 = self.latency.iter().map(|&n| u64::from(n)).sum();
        self.response.checked_div(answered).unwrap_or(0)
    }

    /// A time that at least `percent` of the responses did not exceed, in whole powers of two; 0 without any.
    pub fn response_percentile(&self, percent: u64) -> u64 {
        let all: u64 = self.latency.iter().map(|&n| u64::from(n)).sum();
        let wanted = (all * percent).div_ceil(100);
        let mut seen = 0;
        for (class, &count) in self.latency.iter().enumerate() {
            seen += u64::from(count);
            if count > 0 && seen >= wanted {
                return (1 << (class + 1)).min(self.response_max);
            }
        }
        0
    }

    pub(crate) fn respond(&mut self, latency: u64) {
        self.response += latency;
        self.response_max = self.response_max.max(latency);
        let class = (latency.max(1).ilog2() as usize).min(LATENCY_CLASSES - 1);
        self.latency[class] = self.latency[class].saturating_add(1);
    }

    /// Adds another entity's, for a VM or the host.
    pub fn add(&mut self, other: &Metrics) {
        self.run += other.run;
        self.wait += other.wait;
        self.throttled += other.throttled;
        self.blocked += other.blocked;
        self.wakes += other.wakes;
        self.response += other.response;
        self.response_max = self.response_max.max(other.response_max);
        for (sum, count) in self.latency.iter_mut().zip(other.latency) {
            *sum = sum.saturating_add(count);
        }
        self.bursts += other.bursts;
        self.dispatches += other.dispatches;
        self.switches += other.switches;
        self.preemptions += other.preemptions;
        self.yields += other.yields;
        self.migrations += other.migrations;
        self.io = self.io.saturating_add(other.io);
    }
}

/// Counts and times of one pCPU since the scheduler was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PcpuMetrics {
    /// Time in which it ran entities.
    pub busy: u64,
    /// Dispatches that put one entity in another one's place: the sum of its entities' [`Metrics::switches`] on it.
    pub switches: u64,
    /// Entities that it took from another pCPU's queue.
    pub steals: u64,
    /// Entities that wait in its queue now.
    pub waiting: u32,
    /// Entities whose home it is now.
    pub entities: u32,
    /// Part of it that is reserved, in millionths.
    pub reserved: u64,
}

/// What an entity got of a span of time, and what it would have liked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its weight.
    pub weight: u32,
    /// Time on a pCPU.
    pub run: u64,
    /// Time in which it could have run and another one did.
    pub wait: u64,
}

/// How evenly entities got what they were entitled to, in thousandths: 1000 if all did.
///
/// Entitled is each to its part by weight of the time that all had together, but to no more than it would have taken; what is left of that is
/// for the others (max-min fairness). The index is Jain's of what each got by what it was entitled to, where each counts as much as it was entitled to:
/// so those that want little neither spoil nor save it.
pub fn fairness(parts: &mut [Part]) -> u32 {
    let wanted = |part: &Part| u128::from(part.run) + u128::from(part.wait);
    // Who wants least for its weight has all that it wants.
    parts.sort_unstable_by(|a, b| {
        let (a_wants, b_wants) = (wanted(a), wanted(b));
        let by = |wants: u128, weight: u32| wants.saturating_mul(u128::from(weight.max(1)));
        by(a_wants, b.weight).cmp(&by(b_wants, a.weight))
    });
    let all: u128 = parts.iter().map(|part| u128::from(part.run)).sum();
    let mut time = all;
    let mut weight: u128 = parts
        .iter()
        .map(|part| u128::from(part.weight.max(1)))
        .sum();
    // Of (time got)^2 by time entitled to, over all; in ticks.
    let mut squares: u128 = 0;
    for part in parts {
        let own = u128::from(part.weight.max(1));
        let entitled = wanted(part).min(time * own / weight.max(1));
        time -= entitled;
        weight -= own;
        let run = u128::from(part.run);
        squares = squares.saturating_add((run * run).checked_div(entitled).unwrap_or(run));
    }
    match (all * 1000).checked_div(squares) {
        Some(index) => index.min(1000) as u32,
        None => 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_times_have_an_index(
            parts in proptest::collection::vec((any::<u32>(), 0..u64::MAX / 2, 0..u64::MAX / 2), 0..9),
        ) {
            let part = |(weight, run, wait)| Part { weight, run, wait };
            let mut parts: std::vec::Vec<Part> = parts.into_iter().map(part).collect();
            prop_assert!(fairness(&mut parts) <= 1000);
        }
    }

    /// Weight, time on a pCPU, time waiting.
    fn index<const N: usize>(parts: [(u32, u64, u64); N]) -> u32 {
        fairness(&mut parts.map(|(weight, run, wait)| Part { weight, run, wait }))
    }

    #[test]
    fn fairness_is_by_weight_and_by_what_is_wanted() {
        assert_eq!(index([]), 1000);
        assert_eq!(index([(100, 0, 0)]), 1000);
        // Those that spin, by their weights, or all alike.
        assert_eq!(
            index([(100, 100, 600), (200, 200, 500), (400, 400, 300)]),
            1000
        );
        assert_eq!(
            index([(100, 300, 600), (200, 300, 600), (400, 300, 600)]),
            736
        );
        assert_eq!(index([(1, 1 << 50, 0), (1, 0, 1 << 50)]), 500);
        // One that wants little has it; the others share the rest.
        assert_eq!(
            index([(100, 10, 0), (100, 495, 505), (100, 495, 505)]),
            1000
        );
        assert_eq!(index([(100, 0, 0), (100, 1000, 0)]), 1000);
        // That it waited for its little is a little unfair, whatever there is of others.
        assert!(index([(100, 1, 20), (100, 1000, 0), (100, 0, 0)]) > 970);
        // Nobody wants what a capped one leaves.
        assert_eq!(index([(100, 200, 0), (100, 800, 0)]), 1000);
    }

    #[test]
    fn latencies_are_counted_by_powers_of_two() {
        let mut m = Metrics::default();
        for latency in [0, 1, 3, 1000, 1 << 60] {
            m.respond(latency);
        }
        assert_eq!(m.latency[0], 2);
        assert_eq!(m.latency[1], 1);
        assert_eq!(m.latency[9], 1);
        assert_eq!(m.latency[LATENCY_CLASSES - 1], 1);
        assert_eq!(m.response_percentile(50), 4);
        assert_eq!(m.response_percentile(80), 1024);
        assert_eq!(m.average_response(), ((1 << 60) + 1004) / 5);
        let mut sum = Metrics::default();
        sum.add(&m);
        sum.add(&m);
        assert_eq!(sum.latency[0], 4);
        assert_eq!(sum.response_max, 1 << 60);
    }
}
