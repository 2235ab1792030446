//! What runs in a simulation: VMs, their terms, and what each of their vCPUs does.
//!
//! A vCPU serves *jobs*. A job is released at some time, wants processor time, and is done; between jobs the vCPU
//! is blocked, as a guest is in HLT. A [`Program`] says when jobs are released and what they are made
//! of; a [`Source`] draws them one after another, the same for the same seed.

use std::collections::VecDeque;

use sched::{CpuSet, Params};

use crate::{
    Ns,
    rng::{Rng, Span},
};

/// A set of VMs on a machine, for a time.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Short, for command lines and file names.
    pub name: String,
    /// What it is and what to look for, in a sentence or two.
    pub about: String,
    /// Physical processors.
    pub pcpus: usize,
    /// How they are divided into CPU pools, to which the VMs' terms refer; without any, all are one pool.
    pub pools: Vec<CpuSet>,
    /// How long it is simulated.
    pub duration: Ns,
    /// The VMs.
    pub vms: Vec<Vm>,
}

impl Workload {
    /// Number of vCPUs of all VMs.
    pub fn vcpus(&self) -> usize {
        self.vms.iter().map(|vm| vm.vcpus.len()).sum()
    }
}

/// A VM.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name in tables and plots.
    pub name: String,
    /// How each of its vCPUs is to be scheduled.
    pub params: Params,
    /// Whether its jobs count in the means: not those of a VM that only disturbs others.
    pub measured: bool,
    /// Its vCPUs.
    pub vcpus: Vec<Program>,
}

/// One vCPU of a workload: number of the VM, and of the vCPU in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VcpuRef {
    /// Index into [`Workload::vms`].
    pub vm: usize,
    /// Index into [`Vm::vcpus`].
    pub vcpu: usize,
}

/// A part of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Processor time.
    Compute(Span),
    /// Takes a spin lock of the VM, by number: while another vCPU holds it, this one spins, which takes
    /// processor time and gets nothing done.
    Lock(usize),
    /// Gives the lock back.
    Unlock(usize),
    /// Releases a job of a [`Program::Served`] vCPU, as an interrupt between processors does.
    Wake(VcpuRef),
    /// Asks devices for so many bytes; that takes no processor time, and is not waited for.
    Io(u64),
}

/// What ends the wait for the next job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waker {
    /// The vCPU's own timer: the scheduler knows beforehand when it is due.
    Timer,
    /// A device or the network: nobody knows beforehand.
    Device,
}

/// What a vCPU does.
#[derive(Clone, Debug)]
pub enum Program {
    /// Computes for ever.
    Spin,
    /// One job after another, and a pause after each.
    Loop {
        /// Release of the first job.
        first: Ns,
        /// The pause, from the end of a job to the release of the next.
        pause: Span,
        /// What ends the pause.
        by: Waker,
        /// Each job.
        steps: Vec<Step>,
    },
    /// A job in each period, to be done by the end of it.
    Periodic {
        /// Release of the first job.
        first: Ns,
        /// From a release to the next, whether the job before is done or not; and to the deadline.
        period: Ns,
        /// Processor time of each job.
        work: Span,
    },
    /// Requests that come in bursts, whether those before are done or not.
    Bursts {
        /// Length of a burst.
        on: Span,
        /// Time without requests after it.
        off: Span,
        /// Between requests in a burst.
        gap: Span,
        /// What each is made of.
        steps: Vec<Step>,
    },
    /// Jobs at given times, of given lengths.
    Jobs(VecDeque<Arrival>),
    /// Recorded: so much processor time, then so long a wait, from the first release on.
    Replay {
        /// Release of the first.
        first: Ns,
        /// In their order.
        bursts: VecDeque<Burst>,
    },
    /// A job for each [`Step::Wake`] of another vCPU.
    Served(Vec<Step>),
}

/// A job that comes at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When it is released.
    pub at: Ns,
    /// Processor time that it wants.
    pub work: Ns,
}

/// A job as it was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst {
    /// Processor time, from its release to its end.
    pub work: Ns,
    /// How long the vCPU was blocked after it.
    pub pause: Ns,
}

/// A part of a job, drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Processor time.
    Compute(Ns),
    /// See [`Step::Lock`].
    Lock(usize),
    /// See [`Step::Unlock`].
    Unlock(usize),
    /// See [`Step::Wake`].
    Wake(VcpuRef),
    /// See [`Step::Io`].
    Io(u64),
}

/// A job, drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// When it is released.
    pub release: Ns,
    /// When it should be done.
    pub deadline: Option<Ns>,
    /// Whether it never ends: it counts in no mean.
    pub endless: bool,
    /// What is left to do.
    pub parts: VecDeque<Part>,
}

/// Draws the jobs of one vCPU.
#[derive(Clone, Debug)]
pub struct Source {
    program: Program,
    rng: Rng,
    /// Jobs drawn so far.
    drawn: u64,
    /// End of the burst of requests that goes on.
    burst_end: Ns,
    /// Release of the last job that came by time.
    last: Ns,
}

impl Source {
    /// The jobs of a program.
    pub fn new(program: &Program, rng: Rng) -> Self {
        Source {
            program: program.clone(),
            rng,
            drawn: 0,
            burst_end: 0,
            last: 0,
        }
    }

    /// Whether jobs are released whether those before are done or not.
    pub fn is_open(&self) -> bool {
        matches!(
            self.program,
            Program::Periodic { .. } | Program::Bursts { .. } | Program::Jobs(_)
        )
    }

    /// What ends a wait of this vCPU.
    pub fn waker(&self) -> Waker {
        match self.program {
            Program::Periodic { .. } => Waker::Timer,
            Program::Loop { by, .. } => by,
            _ => Waker::Device,
        }
    }

    /// The next job. `now`: the time at which the one before was done, which only programs look
    /// at that are not [open](Self::is_open). `None`: there is no more, or they come by wake-ups only.
    pub fn next(&mut self, now: Ns) -> Option<Job> {
        let number = self.drawn;
        self.drawn += 1;
        let rng = &mut self.rng;
        let (release, deadline, endless, parts) = match &mut self.program {
            Program::Spin => {
                if number > 0 {
                    return None;
                }
                (0, None, true, VecDeque::from([Part::Compute(Ns::MAX)]))
            }
            Program::Loop {
                first,
                pause,
                steps,
                ..
            } => {
                let release = match number {
                    0 => *first,
                    _ => now + pause.draw(rng),
                };
                (release, None, false, draw(steps, rng))
            }
            Program::Periodic {
                first,
                period,
                work,
            } => {
                let release = *first + number * *period;
                let parts = VecDeque::from([Part::Compute(work.draw(rng))]);
                (release, Some(release + *period), false, parts)
            }
            Program::Bursts {
                on,
                off,
                gap,
                steps,
            } => {
                let mut release = self.last + gap.draw(rng);
                if release > self.burst_end {
                    release = self.burst_end + off.draw(rng);
                    self.burst_end = release + on.draw(rng);
                }
                (release, None, false, draw(steps, rng))
            }
            Program::Jobs(arrivals) => {
                let arrival = arrivals.pop_front()?;
                let parts = VecDeque::from([Part::Compute(arrival.work)]);
                (arrival.at, None, false, parts)
            }
            Program::Replay { first, bursts } => {
                let burst = bursts.pop_front()?;
                let release = match number {
                    0 => *first,
                    _ => now + self.last,
                };
                self.last = burst.pause;
                let parts = VecDeque::from([Part::Compute(burst.work.max(1))]);
                return Some(Job {
                    release,
                    deadline: None,
                    endless: false,
                    parts,
                });
            }
            Program::Served(_) => return None,
        };
        self.last = release;
        Some(Job {
            release,
            deadline,
            endless,
            parts,
        })
    }

    /// The job that a wake-up by another vCPU releases; `None` if this vCPU serves no such.
    pub fn served(&mut self, now: Ns) -> Option<Job> {
        let Program::Served(steps) = &self.program else {
            return None;
        };
        Some(Job {
            release: now,
            deadline: None,
            endless: false,
            parts: draw(steps, &mut self.rng),
        })
    }
}

fn draw(steps: &[Step], rng: &mut Rng) -> VecDeque<Part> {
    steps
        .iter()
        .map(|&step| match step {
            Step::Compute(span) => Part::Compute(span.draw(rng)),
            Step::Lock(lock) => Part::Lock(lock),
            Step::Unlock(lock) => Part::Unlock(lock),
            Step::Wake(whom) => Part::Wake(whom),
            Step::Io(bytes) => Part::Io(bytes),
        })
        .collect()
}
