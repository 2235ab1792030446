//! Which vCPU runs next on which pCPU.
//!
//! *Entities* (vCPUs) are blocked, waiting in the queue of one pCPU, running on it, held up (throttled or paused), or retired. Each pCPU
//! has a queue (`queue`) in the order of a policy (`policy`); a [`Scheduler`] joins several to a host with CPU pools, and moves
//! entities between them. The kernel and the simulator of `cargo xtask sched-sim` drive the same code:
//!
//! ```
//! use sched::{Params, Pool, PolicyKind, CpuSet, Scheduler, Stop};
//! let pool = Pool { cpus: CpuSet::first(1), policy: PolicyKind::Fair, slice: 10_000 };
//! let s = Scheduler::new(1, 8, &[pool]);
//! let a = s.add(Params::default(), 0)?;
//! s.wake(a, 5);                                   // and interrupt the pCPU that it names
//! let run = s.pick(0, 5).run.unwrap();            // run `a` up to run.until, or an earlier s.run_until(0)
//! assert_eq!((run.id, run.until), (a, 10_005));
//! s.stop(0, Stop::Blocked { until: Some(500) }, 100);
//! assert!(s.pick(0, 100).run.is_none());          // idle until s.next_deadline(0)
//! assert_eq!(s.next_deadline(0), Some(500));
//! # Ok::<(), sched::Refusal>(())
//! ```
//!
//! Time comes in as ticks of one clock that all pCPUs share: host TSC ticks in the kernel, nanoseconds in the simulator. It
//! may stand still or seem to run back by a little between two pCPUs; then no time has passed.
//!
//! Invariants: an entity is in one queue, waits there at most once, and runs on one pCPU at most. A wake-up that comes while it
//! runs is not lost: it runs once more before it blocks. A pCPU does not idle while an entity waits that
//! it may run. Wake, pick, stop, expire and next_deadline cost at most the logarithm of the number of entities. Nothing is allocated by
//! them but by moves between pCPUs.
//!
//! What it does not do: read clocks, arm timers or send interrupts.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod cpus;
mod crowd;
mod entity;
mod heap;
mod metrics;
mod policy;
mod queue;
mod scheduler;

pub use cpus::{CpuSet, MAX_PCPUS};
pub use entity::{
    CAPS, Demand, EntityId, MILLION, PRIORITIES, Params, PoolId, Refusal, Reservation, State,
    WEIGHTS,
};
pub use metrics::{LATENCY_CLASSES, Metrics, Part, PcpuMetrics, fairness};
pub use policy::{PolicyKind, priority::SLICES_PER_LEVEL};
pub use queue::{Dispatch, Stop, Turn};
pub use scheduler::{Outcome, Pick, Pool, RESERVABLE, Scheduler, Wake};

#[cfg(test)]
mod tests;
