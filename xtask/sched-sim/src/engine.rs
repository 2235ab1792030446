//! The simulated host: processors that do what the kernel's loop does, and vCPUs on them.
//!
//! Each processor takes what the scheduler gives it, runs it until it blocks, spins, has run for as long as it may, or is
//! interrupted, and asks again; without work it halts until its timer or an interrupt from another
//! processor. Events are handled in order of time, those of one time in the order in which they were made.
//!
//! Invariants: a vCPU runs on one processor at most; all jobs that were released are in the outcome. A processor's event is
//! valid only as long as its `turn` has not changed.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use sched::{
    CpuSet, Dispatch, EntityId, MAX_PCPUS, Params, PolicyKind, Pool, Refusal, Scheduler, State,
    Stop, Turn,
};

use crate::{
    Ns, US,
    rng::Rng,
    stats::{Interval, JobRecord, Outcome, VcpuOutcome, VcpuTotals},
    workload::{Job, Part, Source, VcpuRef, Waker, Workload},
};

/// What a simulation depends on beside its workload and policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Seed of the random parts.
    pub seed: u64,
    /// Length of a time slice.
    pub slice: Ns,
    /// From the end of a vCPU's run to the first instruction of the next one.
    pub switch_cost: Ns,
    /// From the sending of an interrupt to another processor to its answer there.
    pub wake_cost: Ns,
    /// For how long a vCPU spins for a lock before the host notices, and lets a sibling go first.
    pub spin_limit: Ns,
    /// Runs that begin before this time are kept for the Gantt chart.
    pub timeline: Ns,
}

impl Default for Config {
    /// Slices as in the kernel, and costs as `bench/results.md` has them for AMD-V (an instruction is counted as a
    /// nanosecond there): "from HLT to the other vCPU's handler", and what an "IPI to a halted vCPU's handler" takes
    /// beyond that. The processor's own limit for spinning is some 4,096 pauses.
    fn default() -> Self {
        Config {
            seed: 1,
            slice: 10_000 * US,
            switch_cost: 1_552,
            wake_cost: 759,
            spin_limit: 40 * US,
            timeline: 300_000 * US,
        }
    }
}

impl Config {
    /// A machine on which only the guests' own work takes time: for tests of exact promises.
    pub fn ideal() -> Self {
        Config {
            switch_cost: 0,
            wake_cost: 0,
            ..Config::default()
        }
    }
}

/// Something that happens at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The next job of a vCPU is released.
    Release { guest: usize },
    /// A processor has come to the end of what it planned.
    Turn { pcpu: usize, turn: u64 },
    /// An interrupt reaches a processor.
    Interrupt { pcpu: usize },
}

/// A job that is being served.
#[derive(Debug)]
struct Current {
    job: Job,
    start: Ns,
    work: Ns,
}

/// What a vCPU is doing, as its guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Blocked,
    Ready { since: Ns },
    Running,
}

/// A vCPU.
#[derive(Debug)]
struct Guest {
    who: VcpuRef,
    id: EntityId,
    params: Params,
    measured: bool,
    source: Source,
    /// Drawn, and not yet released.
    next: Option<Job>,
    /// Released, and not yet served.
    pending: VecDeque<Job>,
    current: Option<Current>,
    doing: Doing,
    last_pcpu: Option<usize>,
    /// Bytes that it has asked devices for, and the scheduler has not heard of yet.
    io: u64,
    totals: VcpuTotals,
}

/// What runs on a processor.
#[derive(Clone, Copy, Debug)]
struct Run {
    guest: usize,
    begun: Ns,
    /// Time has been counted up to here.
    counted: Ns,
    /// The guest gets on from here: before, the host is busy.
    from: Ns,
    /// The scheduler wants it back.
    until: Ns,
    /// Since when it has been spinning for a lock.
    spins_since: Option<Ns>,
}

#[derive(Debug, Default)]
struct Pcpu {
    turn: u64,
    /// `None`: it halts.
    run: Option<Run>,
    last: Option<usize>,
}

struct Engine<'a> {
    config: &'a Config,
    end: Ns,
    now: Ns,
    scheduler: Scheduler,
    guests: Vec<Guest>,
    by_id: HashMap<EntityId, usize>,
    by_vcpu: HashMap<VcpuRef, usize>,
    pcpus: Vec<Pcpu>,
    /// Holders of the spin locks, by VM and number.
    locks: HashMap<(usize, usize), usize>,
    events: BinaryHeap<Reverse<(Ns, u64, Event)>>,
    made: u64,
    jobs: Vec<JobRecord>,
    timeline: Vec<Interval>,
    idle_while_waiting: Ns,
}

/// Runs a workload under each of some policies.
pub fn simulate_all(workload: &Workload, policies: &[PolicyKind], config: &Config) -> Vec<Outcome> {
    let demands = demands(workload, config);
    policies
        .iter()
        .map(|&policy| {
            let mut outcome = simulate(workload, policy, config);
            for vcpu in &mut outcome.vcpus {
                vcpu.demand = demands.get(&vcpu.vcpu).copied().unwrap_or(0);
            }
            outcome
        })
        .collect()
}

/// What each vCPU would run if it had a processor for itself: the workload on as many processors as vCPUs.
fn demands(workload: &Workload, config: &Config) -> HashMap<VcpuRef, Ns> {
    let mut alone = workload.clone();
    alone.pcpus = workload.vcpus().clamp(1, MAX_PCPUS);
    alone.pools.clear();
    for vm in &mut alone.vms {
        vm.params = Params::default();
    }
    let ideal = Config {
        timeline: 0,
        switch_cost: 0,
        wake_cost: 0,
        ..*config
    };
    let outcome = simulate(&alone, PolicyKind::RoundRobin, &ideal);
    let vcpus = outcome.vcpus.into_iter();
    vcpus.map(|vcpu| (vcpu.vcpu, vcpu.totals.run)).collect()
}

/// Runs a workload under a policy. Demands are not found out: all are taken to want all of a processor.
pub fn simulate(workload: &Workload, policy: PolicyKind, config: &Config) -> Outcome {
    let all = [CpuSet::first(workload.pcpus)];
    let cpus = match &workload.pools[..] {
        [] => &all[..],
        pools => pools,
    };
    let pool = |&cpus| Pool {
        cpus,
        policy,
        slice: config.slice,
    };
    let pools: Vec<Pool> = cpus.iter().map(pool).collect();
    let scheduler = Scheduler::new(workload.pcpus, workload.vcpus(), &pools);
    let mut engine = Engine {
        config,
        end: workload.duration,
        now: 0,
        scheduler,
        guests: Vec::new(),
        by_id: HashMap::new(),
        by_vcpu: HashMap::new(),
        pcpus: (0..workload.pcpus).map(|_| Pcpu::default()).collect(),
        locks: HashMap::new(),
        events: BinaryHeap::new(),
        made: 0,
        jobs: Vec::new(),
        timeline: Vec::new(),
        idle_while_waiting: 0,
    };
    let refused = engine.admit(workload, policy);
    engine.run();
    engine.finish();
    let vcpus = engine.guests.iter().map(|guest| VcpuOutcome {
        vcpu: guest.who,
        pool: guest.params.pool,
        weight: guest.params.weight,
        demand: workload.duration,
        totals: guest.totals,
        metrics: engine
            .scheduler
            .metrics(guest.id, engine.end)
            .unwrap_or_default(),
    });
    Outcome {
        policy,
        duration: workload.duration,
        pcpus: workload.pcpus,
        vms: workload.vms.iter().map(|vm| vm.name.clone()).collect(),
        vcpus: vcpus.collect(),
        jobs: engine.jobs,
        timeline: engine.timeline,
        refused,
        idle_while_waiting: engine.idle_while_waiting,
    }
}

impl Engine<'_> {
    /// Makes the vCPUs known to the scheduler; those that it refuses don't take part.
    fn admit(&mut self, workload: &Workload, policy: PolicyKind) -> Vec<(VcpuRef, Refusal)> {
        let mut refused = Vec::new();
        let mut number = 0;
        for (vm, spec) in workload.vms.iter().enumerate() {
            for (vcpu, program) in spec.vcpus.iter().enumerate() {
                let who = VcpuRef { vm, vcpu };
                let rng = Rng::part(self.config.seed, number);
                number += 1;
                let mut params = spec.params;
                if policy != PolicyKind::Reservation {
                    // Other policies refuse what they cannot keep.
                    params.reservation = None;
                }
                let id = match self.scheduler.add(params, 0) {
                    Ok(id) => id,
                    Err(why) => {
                        refused.push((who, why));
                        continue;
                    }
                };
                let guest = self.guests.len();
                let mut source = Source::new(program, rng);
                let next = source.next(0);
                self.by_id.insert(id, guest);
                self.by_vcpu.insert(who, guest);
                self.guests.push(Guest {
                    who,
                    id,
                    params,
                    measured: spec.measured,
                    source,
                    next,
                    pending: VecDeque::new(),
                    current: None,
                    doing: Doing::Blocked,
                    last_pcpu: None,
                    io: 0,
                    totals: VcpuTotals::default(),
                });
                self.expect_release(guest);
            }
        }
        refused
    }

    fn at(&mut self, time: Ns, event: Event) {
        self.made += 1;
        self.events.push(Reverse((time, self.made, event)));
    }

    fn run(&mut self) {
        for pcpu in 0..self.pcpus.len() {
            self.at(0, Event::Turn { pcpu, turn: 0 });
        }
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at >= self.end {
                break;
            }
            self.note_idleness(at);
            self.now = at;
            match event {
                Event::Release { guest } => self.release(guest),
                Event::Interrupt { pcpu } => self.interrupt(pcpu),
                Event::Turn { pcpu, turn } if turn == self.pcpus[pcpu].turn => {
                    if self.pcpus[pcpu].run.is_some() {
                        self.go_on(pcpu);
                    } else {
                        self.look(pcpu);
                    }
                }
                Event::Turn { .. } => {}
            }
        }
        self.note_idleness(self.end);
        self.now = self.end;
    }

    /// Counts the time up to `at` for processors that halt while they could run somebody.
    fn note_idleness(&mut self, at: Ns) {
        let passed = at - self.now;
        if passed == 0 {
            return;
        }
        for number in 0..self.pcpus.len() {
            if self.pcpus[number].run.is_some() {
                continue;
            }
            let could_run = |guest: &Guest| {
                self.scheduler.check(&guest.params).is_ok_and(|places| places.contains(number))
                    // Who has reserved stays where it was admitted.
                    && guest.params.reservation.is_none()
                    && self.scheduler.state(guest.id) == Some(State::Waiting)
            };
            if self.guests.iter().any(could_run) {
                self.idle_while_waiting += passed;
            }
        }
    }

    /// Has the next job of a vCPU come when it is due.
    fn expect_release(&mut self, guest: usize) {
        if let Some(job) = &self.guests[guest].next {
            let at = job.release;
            self.at(at, Event::Release { guest });
        }
    }

    fn release(&mut self, number: usize) {
        let guest = &mut self.guests[number];
        let Some(job) = guest.next.take() else { return };
        guest.pending.push_back(job);
        let timer_was_set = guest.source.waker() == Waker::Timer && guest.last_pcpu.is_some();
        if guest.source.is_open() {
            guest.next = guest.source.next(self.now);
            self.expect_release(number);
        }
        self.ready(number);
        if !timer_was_set {
            self.wake(number);
        }
    }

    /// The guest of a vCPU has something to do from now on.
    fn ready(&mut self, number: usize) {
        let guest = &mut self.guests[number];
        if guest.doing == Doing::Blocked {
            guest.doing = Doing::Ready { since: self.now };
        }
    }

    /// Tells the scheduler of an event for a vCPU, and a processor if the scheduler says so.
    fn wake(&mut self, number: usize) {
        let id = self.guests[number].id;
        let wake = self.scheduler.wake(id, self.now);
        self.kick(wake.kick);
    }

    /// Sends an interrupt to a processor, if there is one to send.
    fn kick(&mut self, pcpu: Option<usize>) {
        if let Some(pcpu) = pcpu {
            let at = self.now + self.config.wake_cost;
            self.at(at, Event::Interrupt { pcpu });
        }
    }

    fn interrupt(&mut self, pcpu: usize) {
        self.pcpus[pcpu].turn += 1;
        let cost = self.config.wake_cost;
        let (now, until) = (self.now, self.scheduler.run_until(pcpu));
        self.count(pcpu);
        match &mut self.pcpus[pcpu].run {
            Some(run) => {
                run.from = run.from.max(now) + cost;
                run.until = until;
                self.go_on(pcpu);
            }
            None => self.look(pcpu),
        }
    }

    /// A processor that runs nothing asks for a vCPU, or halts.
    fn look(&mut self, pcpu: usize) {
        let now = self.now;
        self.pcpus[pcpu].turn += 1;
        let turn = self.pcpus[pcpu].turn;
        let pick = self.scheduler.pick(pcpu, now);
        self.kick(pick.kick);
        let Some(Dispatch { id, until, .. }) = pick.run else {
            if let Some(deadline) = self.scheduler.next_deadline(pcpu) {
                self.at(deadline.max(now), Event::Turn { pcpu, turn });
            }
            return;
        };
        let number = self.by_id[&id];
        let guest = &mut self.guests[number];
        if let Doing::Ready { since } = guest.doing {
            let waited = now - since;
            guest.totals.wait += waited;
            guest.totals.longest_wait = guest.totals.longest_wait.max(waited);
        }
        guest.doing = Doing::Running;
        let other = self.pcpus[pcpu].last.replace(number) != Some(number);
        guest.totals.switches += u64::from(other);
        let before = guest.last_pcpu.replace(pcpu);
        guest.totals.migrations += u64::from(before.is_some_and(|before| before != pcpu));
        let cost = if other { self.config.switch_cost } else { 0 };
        self.pcpus[pcpu].run = Some(Run {
            guest: number,
            begun: now,
            counted: now,
            from: now + cost,
            until,
            spins_since: None,
        });
        self.go_on(pcpu);
    }

    /// Counts what the vCPU on a processor has got done up to now.
    fn count(&mut self, pcpu: usize) {
        let now = self.now;
        let Some(run) = &mut self.pcpus[pcpu].run else {
            return;
        };
        let guest = &mut self.guests[run.guest];
        guest.totals.run += now - run.counted;
        let got_on = now.saturating_sub(run.counted.max(run.from));
        run.counted = now;
        if run.spins_since.is_some() {
            guest.totals.spun += got_on;
        } else if let Some(current) = &mut guest.current
            && let Some(Part::Compute(left)) = current.job.parts.front_mut()
        {
            current.work += got_on;
            *left -= got_on;
        }
    }

    /// Lets the vCPU on a processor do what takes no time, and plans what comes next.
    fn go_on(&mut self, pcpu: usize) {
        self.count(pcpu);
        let now = self.now;
        let Some(run) = self.pcpus[pcpu].run else {
            return;
        };
        let next = if now < run.from {
            run.from
        } else {
            match self.serve(pcpu, run.guest) {
                Served::Until(at) => at,
                Served::Idle => {
                    let guest = &self.guests[run.guest];
                    let timer = guest.next.as_ref().map(|job| job.release);
                    let until = timer.filter(|_| guest.source.waker() == Waker::Timer);
                    return self.leave(pcpu, Stop::Blocked { until });
                }
                Served::SpunEnough => return self.leave(pcpu, Stop::Yielded),
            }
        };
        if now >= run.until {
            return self.leave(pcpu, Stop::Interrupted);
        }
        self.pcpus[pcpu].turn += 1;
        let turn = self.pcpus[pcpu].turn;
        self.at(next.min(run.until), Event::Turn { pcpu, turn });
    }

    /// The vCPU leaves the processor, which looks for another.
    fn leave(&mut self, pcpu: usize, why: Stop) {
        let Some(run) = self.pcpus[pcpu].run.take() else {
            return;
        };
        let guest = &mut self.guests[run.guest];
        let (who, id) = (guest.who, guest.id);
        let blocks = matches!(why, Stop::Blocked { .. });
        guest.doing = if blocks {
            Doing::Blocked
        } else {
            Doing::Ready { since: self.now }
        };
        let io = std::mem::take(&mut guest.io);
        self.note_run(pcpu, &run);
        let kick = if why == Stop::Yielded {
            let siblings = self.siblings(who);
            let siblings = siblings.into_iter();
            self.scheduler.yield_to(pcpu, io, siblings, self.now)
        } else {
            self.scheduler.stop(pcpu, Turn { why, io }, self.now)
        };
        self.kick(kick);
        // A wake-up that came while it ran has it run once more, although there may be nothing to do.
        if blocks && self.scheduler.state(id) == Some(State::Waiting) {
            self.guests[run.guest].doing = Doing::Ready { since: self.now };
        }
        self.look(pcpu);
    }

    /// The other vCPUs of the same VM.
    fn siblings(&self, who: VcpuRef) -> Vec<EntityId> {
        let others = self.guests.iter();
        others
            .filter(|guest| guest.who.vm == who.vm && guest.who != who)
            .map(|guest| guest.id)
            .collect()
    }

    /// Serves jobs as far as that takes no time.
    fn serve(&mut self, pcpu: usize, number: usize) -> Served {
        let now = self.now;
        loop {
            let guest = &mut self.guests[number];
            let Some(current) = &mut guest.current else {
                let Some(job) = guest.pending.pop_front() else {
                    return Served::Idle;
                };
                guest.current = Some(Current {
                    job,
                    start: now,
                    work: 0,
                });
                continue;
            };
            let Some(&part) = current.job.parts.front() else {
                self.end_job(number);
                continue;
            };
            let who = guest.who;
            match part {
                Part::Compute(left) if left > 0 => return Served::Until(now.saturating_add(left)),
                Part::Compute(_) => {}
                Part::Lock(lock) => {
                    let holder = *self.locks.entry((who.vm, lock)).or_insert(number);
                    let Some(run) = &mut self.pcpus[pcpu].run else {
                        return Served::Idle;
                    };
                    if holder != number {
                        let since = *run.spins_since.get_or_insert(now);
                        let limit = since + self.config.spin_limit.max(1);
                        return if now < limit {
                            Served::Until(limit)
                        } else {
                            Served::SpunEnough
                        };
                    }
                    run.spins_since = None;
                }
                Part::Unlock(lock) => self.unlock(who.vm, lock),
                Part::Wake(target) => self.signal(target),
                Part::Io(bytes) => guest.io += bytes,
            }
            if let Some(current) = &mut self.guests[number].current {
                current.job.parts.pop_front();
            }
        }
    }

    /// Nobody holds this lock of a VM any more: those that spin for it look again.
    fn unlock(&mut self, vm: usize, lock: usize) {
        self.locks.remove(&(vm, lock));
        for pcpu in 0..self.pcpus.len() {
            let Some(run) = self.pcpus[pcpu].run else {
                continue;
            };
            if run.spins_since.is_some() && self.guests[run.guest].who.vm == vm {
                self.pcpus[pcpu].turn += 1;
                let turn = self.pcpus[pcpu].turn;
                self.at(self.now, Event::Turn { pcpu, turn });
            }
        }
    }

    /// An interrupt from one vCPU to another. Those that come before it is served are one.
    fn signal(&mut self, target: VcpuRef) {
        let Some(&number) = self.by_vcpu.get(&target) else {
            return;
        };
        let guest = &mut self.guests[number];
        if guest.pending.is_empty()
            && let Some(job) = guest.source.served(self.now)
        {
            guest.pending.push_back(job);
        }
        self.ready(number);
        self.wake(number);
    }

    /// The job that a vCPU serves is done.
    fn end_job(&mut self, number: usize) {
        let guest = &mut self.guests[number];
        let Some(current) = guest.current.take() else {
            return;
        };
        if guest.next.is_none() && !guest.source.is_open() {
            guest.next = guest.source.next(self.now);
            self.expect_release(number);
        }
        self.record(
            number,
            &current.job,
            Some((current.start, current.work)),
            true,
        );
    }

    /// Notes what came of a job up to now. `served`: when it was begun, and the work done.
    fn record(&mut self, number: usize, job: &Job, served: Option<(Ns, Ns)>, done: bool) {
        let guest = &self.guests[number];
        if guest.measured && !job.endless {
            self.jobs.push(JobRecord {
                vcpu: guest.who,
                release: job.release,
                start: served.map(|(start, _)| start),
                end: self.now,
                done,
                work: served.map_or(0, |(_, work)| work),
                deadline: job.deadline,
            });
        }
    }

    /// The simulation is over: what goes on, counts up to now.
    fn finish(&mut self) {
        for pcpu in 0..self.pcpus.len() {
            self.count(pcpu);
            if let Some(run) = self.pcpus[pcpu].run.take() {
                self.note_run(pcpu, &run);
            }
        }
        for number in 0..self.guests.len() {
            let guest = &mut self.guests[number];
            if let Doing::Ready { since } = guest.doing {
                let waited = self.now - since;
                guest.totals.wait += waited;
                guest.totals.longest_wait = guest.totals.longest_wait.max(waited);
            }
            let pending = std::mem::take(&mut guest.pending);
            if let Some(current) = guest.current.take() {
                self.record(
                    number,
                    &current.job,
                    Some((current.start, current.work)),
                    false,
                );
            }
            for job in pending {
                self.record(number, &job, None, false);
            }
        }
    }

    fn note_run(&mut self, pcpu: usize, run: &Run) {
        if self.now > run.begun && run.begun < self.config.timeline {
            self.timeline.push(Interval {
                pcpu,
                vcpu: self.guests[run.guest].who,
                from: run.begun,
                to: self.now,
            });
        }
    }
}

/// How far a vCPU could be served without time passing.
enum Served {
    /// It needs its processor until then, or until an event.
    Until(Ns),
    /// It has nothing to do.
    Idle,
    /// It spins for a lock, and has done so for long.
    SpunEnough,
}
