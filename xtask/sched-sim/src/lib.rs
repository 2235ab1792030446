//! Crate `sched` in a simulated host: what each policy makes of a workload.
//!
//! Purpose: to compare policies, and to test what they promise, without a machine. The scheduler is the one
//! that the kernel runs, called in the same order with the same arguments; time is a number that
//! this crate counts in nanoseconds, and guests are [programs](workload::Program) that want
//! processor time.
//!
//! Invariants: a simulation depends on its workload, configuration and seed only, on every machine. What it
//! does not do: guests' caches, memory and devices are not modelled, only times.
#![forbid(unsafe_code)]

pub mod engine;
pub mod rng;
pub mod stats;
pub mod synthetic;
pub mod trace;
pub mod workload;

/// Simulated time, in nanoseconds.
pub type Ns = u64;

/// A microsecond.
pub const US: Ns = 1_000;
/// A millisecond.
pub const MS: Ns = 1_000_000;
