//! A pCPU's run queue: the entities whose home it is, and which of them runs.
//!
//! The queue is a plain value; [`Scheduler`](crate::Scheduler) keeps each behind a lock of its own. It has the entities
//! themselves, so that who has the lock has all about them.
//!
//! Invariants: an entity is attached to the policy exactly while it is `Waiting` or `Running`, has a timer only
//! while it is `Blocked` with a deadline or `Throttled`, and is in `movable` exactly while it is `Waiting` and
//! may run elsewhere. At most one entity is `Running`: `running`.

use alloc::{boxed::Box, collections::BTreeSet, vec::Vec};

use crate::{
    cpus::CpuSet,
    crowd::Crowd,
    entity::{Entity, EntityId, Params, Recent, State},
    heap::KeyedHeap,
    metrics::{Metrics, PcpuMetrics},
    policy::{Policy, PolicyKind, Ready},
};

/// Which entity runs now, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// The entity.
    pub id: EntityId,
    /// Tick at which it has to be stopped at the latest: by `stop` with [`Stop::Interrupted`].
    pub until: u64,
    /// Time for which it was ready and did not run, since it was added, in ticks.
    pub stolen: u64,
}

/// Why a running entity leaves its pCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It could go on: its time is over, or something else wants the pCPU.
    Interrupted,
    /// It lets others go first.
    Yielded,
    /// It has nothing to do until a wake-up, or until this tick. A wake-up that came while it ran counts: it runs
    /// once more.
    Blocked {
        /// `None`: no deadline.
        until: Option<u64>,
    },
    /// It has run for the last time: no wake-up, past or to come, readies it again.
    Retired,
}

/// What a queue did about a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// Nothing changes: it waits already, or will not run.
    Nothing,
    /// It runs here, and will run once more.
    Running,
    /// It waits now. The one that runs here, if any, has to be stopped at `run_until`, which may be earlier now.
    Waiting,
}

/// How many of those that wait are compared when one is moved.
const COMPARED: usize = 16;

#[derive(Debug)]
pub(crate) struct Queue {
    pcpu: usize,
    policy: Box<dyn Policy>,
    entities: Vec<Option<Box<Entity>>>,
    /// Of those blocked and throttled, by tick.
    timers: KeyedHeap<u64>,
    /// Those that wait and may run elsewhere: where, how urgent, which.
    movable: BTreeSet<(CpuSet, u64, EntityId)>,
    running: Option<EntityId>,
    picked_at: u64,
    /// Tick at which the running one has to stop.
    run_until: u64,
    last: Option<EntityId>,
    /// The next one to run, taken out of those that wait.
    favoured: Option<EntityId>,
    /// The pCPU that the running one is to go to when it stops here and could go on.
    promised_to: Option<usize>,
    waiting: u32,
    /// Those attached.
    crowd: Crowd,
    slice: u64,
    capacity: usize,
    metrics: PcpuMetrics,
}

impl Queue {
    pub(crate) fn new(pcpu: usize, kind: PolicyKind, slice: u64, capacity: usize) -> Self {
        Queue {
            pcpu,
            policy: kind.make(slice, capacity),
            entities: (0..capacity).map(|_| None).collect(),
            timers: KeyedHeap::new(capacity),
            movable: BTreeSet::new(),
            running: None,
            picked_at: 0,
            run_until: u64::MAX,
            last: None,
            favoured: None,
            promised_to: None,
            waiting: 0,
            crowd: Crowd::default(),
            slice,
            capacity,
            metrics: PcpuMetrics::default(),
        }
    }

    pub(crate) fn kind(&self) -> PolicyKind {
        self.policy.kind()
    }

    pub(crate) fn slice(&self) -> u64 {
        self.slice
    }

    /// Those who run or wait.
    pub(crate) fn crowd(&self) -> Crowd {
        self.crowd
    }

    /// How many wait that may run elsewhere.
    pub(crate) fn movable(&self) -> usize {
        self.movable.len()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_none()
    }

    /// The part of the pCPU that is kept for its entities, in millionths.
    pub(crate) fn reserved(&self) -> u64 {
        self.metrics.reserved
    }

    /// How many entities have their home here.
    pub(crate) fn population(&self) -> u32 {
        self.metrics.entities
    }

    /// Tick at which the running one has to stop; `u64::MAX` if none runs.
    pub(crate) fn run_until(&self) -> u64 {
        self.run_until
    }

    pub(crate) fn get(&self, id: EntityId) -> Option<&Entity> {
        self.entities.get(id.index())?.as_deref()
    }

    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.timers.peek().map(|(at, _)| at)
    }

    /// Puts an entity in, which is not attached, has no timer and is not running; one that is `Waiting` begins to
    /// wait here.
    pub(crate) fn insert(&mut self, mut entity: Box<Entity>, now: u64) {
        let id = entity.id;
        let state = entity.state;
        match state {
            State::Blocked { until: Some(at) } | State::Throttled { until: at } => {
                self.timers.push(id, at);
                if self.running.is_some() {
                    self.run_until = self.run_until.min(at);
                }
            }
            State::Waiting => settle(&mut entity, now),
            _ => {}
        }
        self.metrics.entities += 1;
        self.metrics.reserved += utilization(&entity.params);
        self.entities[id.index()] = Some(entity);
        if state == State::Waiting {
            self.enqueue(id, Ready::Arrived, now);
        }
    }

    /// Takes an entity out that does not run. It keeps its state.
    pub(crate) fn extract(&mut self, id: EntityId, now: u64) -> Option<Box<Entity>> {
        if self.running == Some(id) {
            return None;
        }
        self.unqueue(id, now);
        let mut entity = self.entities.get_mut(id.index())?.take()?;
        self.timers.remove(id);
        self.policy.forget(&mut entity);
        self.metrics.entities -= 1;
        self.metrics.reserved -= utilization(&entity.params);
        if self.last == Some(id) {
            self.last = None;
        }
        Some(entity)
    }

    /// Takes one that waits out of those that wait; it keeps its state. `false`: it does not wait.
    fn unqueue(&mut self, id: EntityId, now: u64) -> bool {
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return false;
        };
        if entity.state != State::Waiting {
            return false;
        }
        settle(entity, now);
        self.movable.remove(&(entity.allowed, entity.rank, id));
        if self.favoured == Some(id) {
            // The policy has taken it out already, as if to run it.
            self.favoured = None;
            self.policy.leave(entity);
        } else {
            self.policy.remove(entity);
        }
        self.waiting -= 1;
        let share = self.policy.share(entity);
        let had = had(&*self.policy, entity);
        self.crowd.leave(share, had, now);
        true
    }

    /// One begins to wait: attaches it, unless it was.
    fn enqueue(&mut self, id: EntityId, why: Ready, now: u64) {
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return;
        };
        entity.state = State::Waiting;
        if !matches!(why, Ready::Preempted | Ready::Arrived) {
            entity.waits_since = now;
        }
        self.policy.enqueue(entity, why, now);
        if entity.allowed.len() > 1 && !self.stays(id) {
            let entity = self.entities[id.index()].as_ref();
            if let Some(entity) = entity {
                self.movable.insert((entity.allowed, entity.rank, id));
            }
        }
        self.waiting += 1;
        let attached = matches!(why, Ready::SliceOver | Ready::Preempted | Ready::Yielded);
        if !attached && let Some(entity) = self.entities[id.index()].as_ref() {
            let share = self.policy.share(entity);
            let had = had(&*self.policy, entity);
            self.crowd.join(share, had, now);
        }
    }

    /// Whether an entity must not be moved: this pCPU has admitted its reservation.
    fn stays(&self, id: EntityId) -> bool {
        self.get(id)
            .is_some_and(|entity| entity.params.reservation.is_some())
    }

    /// One that is not attached may run: it waits, for the pCPU or for what hinders it.
    fn make_ready(&mut self, id: EntityId, why: Ready, now: u64) -> Woken {
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return Woken::Nothing;
        };
        settle(entity, now);
        if entity.paused {
            entity.state = State::Held;
            return Woken::Nothing;
        }
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.refill(now, why == Ready::Woken);
        }
        if let Some(at) = entity.throttled_until() {
            entity.state = State::Throttled { until: at };
            self.timers.push(id, at);
            return Woken::Nothing;
        }
        self.enqueue(id, why, now);
        self.consider(id, now);
        Woken::Waiting
    }

    /// One has begun to wait: perhaps the one that runs should give way.
    fn consider(&mut self, id: EntityId, now: u64) {
        let Some(running) = self.running else { return };
        self.charge(running, now);
        let (Some(running), Some(waiting)) = (self.get(running), self.get(id)) else {
            return;
        };
        if let Some(least) = self.policy.gives_way(running, waiting) {
            let at = now.max(self.picked_at.saturating_add(least));
            self.run_until = self.run_until.min(at);
        }
    }

    /// Has the running one pay for what it ran.
    fn charge(&mut self, id: EntityId, now: u64) {
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return;
        };
        let ran = now.saturating_sub(entity.since);
        entity.since = entity.since.max(now);
        entity.metrics.run += ran;
        entity.burst += ran;
        entity.slice_left = entity.slice_left.saturating_sub(ran);
        entity.recent.add(ran, now);
        if self.policy.divides_time() {
            self.crowd.charge(self.policy.share(entity), ran, now);
        }
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.charge(ran);
        }
        self.metrics.busy += ran;
        self.policy.charge(entity, ran);
    }

    /// An event for an entity: one that is blocked becomes ready.
    pub(crate) fn wake(&mut self, id: EntityId, now: u64) -> Woken {
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return Woken::Nothing;
        };
        match entity.state {
            State::Blocked { until } => {
                entity.metrics.wakes += 1;
                entity.woken_at = Some(now);
                entity.ready_at = now;
                entity.burst = 0;
                if until.is_some() {
                    self.timers.remove(id);
                }
                self.make_ready(id, Ready::Woken, now)
            }
            State::Running { .. } => {
                entity.woken = true;
                Woken::Running
            }
            State::Waiting | State::Throttled { .. } | State::Held | State::Retired => {
                Woken::Nothing
            }
        }
    }

    /// Readies those whose deadline or budget has come. Whether any waits now that did not.
    pub(crate) fn expire(&mut self, now: u64) -> bool {
        let mut any = false;
        while let Some((at, id)) = self.timers.peek()
            && at <= now
        {
            self.timers.pop();
            let state = self.get(id).map(|entity| entity.state);
            let woken = match state {
                Some(State::Throttled { .. }) => self.make_ready(id, Ready::Replenished, now),
                _ => self.wake(id, now),
            };
            any |= woken == Woken::Waiting;
        }
        any
    }

    /// Takes the next one to run out of those that wait, and runs it.
    pub(crate) fn pick(&mut self, now: u64) -> Option<Dispatch> {
        if self.running.is_some() {
            return None;
        }
        let id = match self.favoured.take() {
            Some(id) => id,
            None => self.policy.take(now)?,
        };
        let entity = self.entities.get_mut(id.index())?.as_mut()?;
        settle(entity, now);
        if !self.movable.is_empty() {
            self.movable.remove(&(entity.allowed, entity.rank, id));
        }
        self.waiting -= 1;
        entity.state = State::Running { pcpu: self.pcpu };
        entity.woken = false;
        entity.metrics.dispatches += 1;
        if let Some(at) = entity.woken_at.take() {
            entity.metrics.respond(now.saturating_sub(at));
        }
        if entity.slice_left == 0 {
            entity.slice_left = self.policy.slice(entity);
        }
        let mut ticks = entity.slice_left;
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.refill(now, false);
            ticks = ticks.min(bandwidth.left().max(1));
        }
        let slice_end = now.saturating_add(ticks);
        let until = self
            .timers
            .peek()
            .map_or(slice_end, |(at, _)| at.min(slice_end));
        if self.last != Some(id) {
            self.last = Some(id);
            self.metrics.switches += 1;
        }
        self.running = Some(id);
        self.picked_at = now;
        self.run_until = until;
        let stolen = entity.metrics.steal();
        Some(Dispatch { id, until, stolen })
    }

    /// The running entity leaves the pCPU. Returns which one it was.
    pub(crate) fn stop(&mut self, why: Stop, now: u64) -> Option<EntityId> {
        let id = self.running?;
        self.charge(id, now);
        self.running = None;
        self.run_until = u64::MAX;
        let entity = self.entities.get_mut(id.index())?.as_mut()?;
        let (share, had) = (self.policy.share(entity), had(&*self.policy, entity));
        let ready = match why {
            Stop::Interrupted if entity.slice_left > 0 => Ready::Preempted,
            Stop::Interrupted => Ready::SliceOver,
            Stop::Yielded => Ready::Yielded,
            Stop::Blocked { until } => {
                if !entity.woken {
                    entity.metrics.bursts += 1;
                    entity.expected_burst = entity.expected_burst.midpoint(entity.burst);
                    entity.slice_left = 0;
                    entity.state = State::Blocked { until };
                    self.policy.leave(entity);
                    self.crowd.leave(share, had, now);
                    if let Some(at) = until {
                        self.timers.push(id, at);
                    }
                    return Some(id);
                }
                Ready::Preempted
            }
            Stop::Retired => {
                entity.state = State::Retired;
                self.policy.leave(entity);
                self.crowd.leave(share, had, now);
                return Some(id);
            }
        };
        match ready {
            Ready::Yielded => {
                entity.metrics.yields += 1;
                entity.slice_left = 0;
            }
            _ => entity.metrics.preemptions += 1,
        }
        if let Some(bandwidth) = &mut entity.bandwidth {
            bandwidth.refill(now, false);
        }
        if entity.paused {
            entity.state = State::Held;
            self.policy.leave(entity);
            self.crowd.leave(share, had, now);
        } else if let Some(at) = entity.throttled_until() {
            entity.state = State::Throttled { until: at };
            self.policy.leave(entity);
            self.crowd.leave(share, had, now);
            self.timers.push(id, at);
        } else {
            self.enqueue(id, ready, now);
        }
        Some(id)
    }

    /// Of these, the first one that waits here runs next, whatever the policy says.
    pub(crate) fn favour(&mut self, ids: impl Iterator<Item = EntityId>) {
        if self.favoured.is_some() {
            return;
        }
        for id in ids {
            let waits = self.get(id).is_some_and(|e| e.state == State::Waiting);
            if waits && self.policy.take_this(id) {
                self.favoured = Some(id);
                return;
            }
        }
    }

    /// Keeps an entity from running. Whether it runs here now; it stops being picked when it is stopped.
    pub(crate) fn pause(&mut self, id: EntityId, now: u64) -> bool {
        self.unqueue(id, now);
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return false;
        };
        entity.paused = true;
        match entity.state {
            State::Waiting => entity.state = State::Held,
            State::Throttled { .. } => {
                settle(entity, now);
                entity.state = State::Held;
                self.timers.remove(id);
            }
            State::Running { .. } => {
                self.run_until = 0;
                return true;
            }
            State::Blocked { .. } | State::Held | State::Retired => {}
        }
        false
    }

    /// Lets an entity run again.
    pub(crate) fn resume(&mut self, id: EntityId, now: u64) -> Woken {
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return Woken::Nothing;
        };
        entity.paused = false;
        match entity.state {
            State::Held => {
                entity.waits_since = now;
                self.make_ready(id, Ready::Arrived, now)
            }
            _ => Woken::Nothing,
        }
    }

    /// New parameters for an entity. Those of the one that runs hold from its next run on.
    pub(crate) fn set_params(&mut self, id: EntityId, params: Params, allowed: CpuSet, now: u64) {
        let waited = self.unqueue(id, now);
        let slice = self.slice;
        let runs = self.running == Some(id);
        if runs {
            self.charge(id, now);
        }
        let Some(entity) = self.entities.get_mut(id.index()).and_then(Option::as_mut) else {
            return;
        };
        self.metrics.reserved += utilization(&params);
        self.metrics.reserved -= utilization(&entity.params);
        if runs {
            self.crowd
                .leave(self.policy.share(entity), had(&*self.policy, entity), now);
            self.policy.leave(entity);
            entity.set_params(params, allowed, slice, now);
            self.policy.join(entity);
            self.crowd
                .join(self.policy.share(entity), had(&*self.policy, entity), now);
            self.run_until = self.run_until.min(now);
            return;
        }
        entity.set_params(params, allowed, slice, now);
        if waited {
            self.make_ready(id, Ready::Arrived, now);
        }
    }

    /// Another policy, or another slice.
    pub(crate) fn set_policy(&mut self, kind: PolicyKind, slice: u64, now: u64) {
        if let Some(running) = self.running {
            self.charge(running, now);
        }
        let waited: Vec<EntityId> = self
            .entities
            .iter()
            .flatten()
            .filter(|entity| entity.state == State::Waiting)
            .map(|entity| entity.id)
            .collect();
        for &id in &waited {
            self.unqueue(id, now);
        }
        if let Some(id) = self.running
            && let Some(entity) = self.entities[id.index()].as_mut()
        {
            self.crowd
                .leave(self.policy.share(entity), had(&*self.policy, entity), now);
            self.policy.leave(entity);
        }
        for entity in self.entities.iter_mut().flatten() {
            self.policy.forget(entity);
        }
        self.policy = kind.make(slice, self.capacity);
        self.slice = slice;
        if let Some(id) = self.running
            && let Some(entity) = self.entities[id.index()].as_mut()
        {
            self.policy.join(entity);
            self.crowd
                .join(self.policy.share(entity), had(&*self.policy, entity), now);
            self.run_until = self.run_until.min(now);
        }
        for id in waited {
            self.enqueue(id, Ready::Arrived, now);
        }
    }

    /// The most urgent that waits and may run on `pcpu`.
    pub(crate) fn stealable(&self, pcpu: usize) -> Option<EntityId> {
        self.first_of_each_place()
            .filter(|(places, _, _)| places.contains(pcpu))
            .map(|(_, rank, id)| (rank, id))
            .min()
            .map(|(_, id)| id)
    }

    /// Where those that wait may run: one of these pCPUs, if any.
    pub(crate) fn place_among(&self, cpus: CpuSet) -> Option<usize> {
        self.first_of_each_place()
            .find_map(|(places, _, _)| places.and(cpus).lowest())
    }

    /// The most urgent ones for each set of pCPUs.
    fn first_of_each_place(&self) -> impl Iterator<Item = (CpuSet, u64, EntityId)> {
        let mut next = self.movable.first();
        core::iter::from_fn(move || {
            let &(places, rank, id) = next?;
            let beyond = (places, u64::MAX, EntityId(u32::MAX));
            next = self.movable.range(beyond..).next();
            Some((places, rank, id))
        })
    }

    /// Promises the running one to another pCPU. `false`: it does not run here.
    pub(crate) fn promise(&mut self, id: EntityId, to: usize) -> bool {
        let runs = self.running == Some(id);
        if runs {
            self.promised_to = Some(to);
        }
        runs
    }

    /// The pCPU that was promised the one that has just stopped, if it could go on and others are here to run instead.
    pub(crate) fn keep_promise(&mut self, id: EntityId) -> Option<usize> {
        let to = self.promised_to.take()?;
        let entity = self.get(id)?;
        let goes = entity.state == State::Waiting && entity.allowed.contains(to);
        (goes && self.waiting > 1).then_some(to)
    }

    /// Counts what the running one has run so far.
    pub(crate) fn settle_running(&mut self, now: u64) {
        if let Some(id) = self.running {
            self.charge(id, now);
        }
    }

    /// The one that runs and some of those that wait, if they may run on `pcpu`: each with its share and what it has had.
    pub(crate) fn candidates(&self, pcpu: usize) -> impl Iterator<Item = (EntityId, u64, Recent)> {
        self.movable
            .iter()
            .take(COMPARED)
            .map(|(_, _, id)| *id)
            .chain(self.running)
            .filter_map(|id| self.get(id))
            .filter(move |entity| entity.allowed.contains(pcpu))
            .map(|entity| {
                (
                    entity.id,
                    self.policy.share(entity),
                    had(&*self.policy, entity),
                )
            })
            .filter(|&(_, share, _)| share > 0)
    }

    pub(crate) fn metrics_of(&self, id: EntityId, now: u64) -> Option<Metrics> {
        let entity = self.get(id)?;
        let mut metrics = entity.metrics;
        let passed = now.saturating_sub(entity.since);
        match entity.state {
            State::Running { .. } => metrics.run += passed,
            State::Waiting => metrics.wait += passed,
            State::Throttled { .. } => metrics.throttled += passed,
            State::Blocked { .. } => metrics.blocked += passed,
            State::Held | State::Retired => {}
        }
        Some(metrics)
    }

    pub(crate) fn metrics(&self, now: u64) -> PcpuMetrics {
        let unpaid = self
            .running
            .and_then(|id| self.get(id))
            .map_or(0, |entity| now.saturating_sub(entity.since));
        PcpuMetrics {
            busy: self.metrics.busy + unpaid,
            waiting: self.waiting,
            ..self.metrics
        }
    }

    /// One came from another pCPU.
    pub(crate) fn note_migration(&mut self, id: EntityId, stolen: bool) {
        if let Some(entity) = self.entities[id.index()].as_mut() {
            entity.metrics.migrations += 1;
        }
        self.metrics.steals += u64::from(stolen);
    }
}

/// The part of a pCPU that is kept for such an entity, in millionths.
pub(crate) fn utilization(params: &Params) -> u64 {
    params
        .reservation
        .map_or(0, |reservation| reservation.utilization())
}

/// What an entity has had of late, as far as that matters to the policy.
fn had(policy: &dyn Policy, entity: &Entity) -> Recent {
    if policy.divides_time() {
        entity.recent
    } else {
        Recent::default()
    }
}

/// Counts the time since the last change of state of one that does not run.
fn settle(entity: &mut Entity, now: u64) {
    let passed = now.saturating_sub(entity.since);
    entity.since = entity.since.max(now);
    match entity.state {
        State::Waiting => entity.metrics.wait += passed,
        State::Throttled { .. } => entity.metrics.throttled += passed,
        State::Blocked { .. } => entity.metrics.blocked += passed,
        State::Running { .. } | State::Held | State::Retired => {}
    }
}
