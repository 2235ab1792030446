//! A pCPU's run queue: the entities whose home it is, and which of them runs.
//!
//! The queue is a plain value; [`Scheduler`](crate::Scheduler) keeps each behind a lock of its own. It has the entities
//! themselves, so that who has the lock has all about them.
//!
//! Invariants: an entity is attached to the policy exactly while it is `Waiting` or `Running`, has a timer only
//! while it is `Blocked` with a deadline or `Throttled`, and is in `movable` exactly while it is `Waiting` and
//! may run elsewhere. At most one entity is `Running`: `running`.

mod rest;

use alloc::{boxed::Box, vec::Vec};

use crate::{
    cpus::CpuSet,
    crowd::Crowd,
    entity::{Entity, EntityId, Params, Recent, State},
    metrics::{Metrics, PcpuMetrics},
    policy::{PolicyKind, Ready},
};

pub(crate) use rest::Neighbours;
use rest::Rest;

/// Which entity runs now, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// The entity.
    pub id: EntityId,
    /// Tick at which it has to be stopped at the latest: by `stop` with [`Stop::Interrupted`].
    pub until: u64,
    /// Time for which it was ready and did not run, since it was added, in ticks.
    pub stolen: u64,
    /// Its own deadline has readied it since it ran last, so many ticks ago; `None`: an event did, or it went on waiting.
    pub timer: Option<u64>,
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

/// How the turn of an entity on its pCPU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Why it leaves the pCPU.
    pub why: Stop,
    /// What it has asked devices for meanwhile, in bytes: where it waits next may depend on it.
    pub io: u64,
}

impl From<Stop> for Turn {
    /// A turn in which no device was asked for anything.
    fn from(why: Stop) -> Self {
        Turn { why, io: 0 }
    }
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
    /// It is ready, and its budget is used up: there is a timer that was not there. `run_until` may be earlier now.
    Throttled,
}

/// Where one belongs that has just stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Here.
    Stays,
    /// It was promised to this pCPU.
    GoesTo(usize, EntityId),
    /// It was given other places while it ran.
    HasToGo(EntityId),
}

/// How many of those that wait are compared when one is moved.
const COMPARED: usize = 16;

/// The part of a slice for which those may run out of their turn that others have yielded to: until the policy decides again, or two
/// that yield to each other would keep everybody else from running.
const LENT: u64 = 8;

#[derive(Debug)]
pub(crate) struct Queue {
    entities: Vec<Option<Box<Entity>>>,
    rest: Rest,
    capacity: usize,
}

/// An entity that is here.
fn find(entities: &mut [Option<Box<Entity>>], id: EntityId) -> Option<&mut Entity> {
    entities.get_mut(id.index())?.as_deref_mut()
}

impl Queue {
    pub(crate) fn new(
        pcpu: usize,
        kind: PolicyKind,
        slice: u64,
        capacity: usize,
        neighbours: Neighbours,
    ) -> Self {
        Queue {
            entities: (0..capacity).map(|_| None).collect(),
            rest: Rest::new(pcpu, kind, slice, capacity, neighbours),
            capacity,
        }
    }

    pub(crate) fn kind(&self) -> PolicyKind {
        self.rest.policy.kind()
    }

    pub(crate) fn slice(&self) -> u64 {
        self.rest.slice
    }

    /// Those who run or wait.
    pub(crate) fn crowd(&self) -> Crowd {
        self.rest.crowd()
    }

    /// How many wait that may run elsewhere.
    pub(crate) fn movable(&self) -> usize {
        self.rest.movable.len()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.rest.running.is_none()
    }

    /// How many entities have their home here.
    pub(crate) fn population(&self) -> u32 {
        self.rest.metrics.entities
    }

    /// Tick at which the running one has to stop; `u64::MAX` if none runs.
    pub(crate) fn run_until(&self) -> u64 {
        self.rest.run_until
    }

    pub(crate) fn get(&self, id: EntityId) -> Option<&Entity> {
        self.entities.get(id.index())?.as_deref()
    }

    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.rest.timers.peek().map(|(at, _)| at)
    }

    /// Puts an entity in, which is not attached, has no timer and is not running; one that is `Waiting` begins to
    /// wait here.
    pub(crate) fn insert(&mut self, mut entity: Box<Entity>, now: u64) {
        let Queue { entities, rest, .. } = self;
        let id = entity.id;
        rest.metrics.entities += 1;
        let before = entity.home.replace(rest.pcpu);
        let moved = before.is_some_and(|before| before != rest.pcpu);
        entity.metrics.migrations += u64::from(moved);
        match entity.state {
            State::Blocked { until: Some(at) } => rest.set_timer(entity.id, at),
            State::Throttled { .. } => {
                rest.make_ready(&mut entity, Ready::Arrived, now);
            }
            State::Waiting => {
                entity.settle(now);
                rest.enqueue(&mut entity, Ready::Arrived, now);
            }
            _ => {}
        }
        let waits = entity.state == State::Waiting;
        entities[id.index()] = Some(entity);
        if waits {
            self.consider(id, now);
        }
    }

    /// Takes an entity out that does not run. It keeps its state.
    pub(crate) fn extract(&mut self, id: EntityId, now: u64) -> Option<Box<Entity>> {
        let Queue { entities, rest, .. } = self;
        if rest.running == Some(id) {
            return None;
        }
        let mut entity = entities.get_mut(id.index())?.take()?;
        rest.unqueue(&mut entity, now);
        rest.timers.remove(id);
        rest.policy.forget(&mut entity);
        rest.metrics.entities -= 1;
        if rest.last == Some(id) {
            rest.last = None;
        }
        Some(entity)
    }

    /// One has begun to wait: perhaps the one that runs should give way.
    #[inline(always)]
    fn consider(&mut self, id: EntityId, now: u64) {
        let Queue { entities, rest, .. } = self;
        let Some(running) = rest.running else { return };
        if let Some(entity) = find(entities, running) {
            rest.charge(entity, now);
        }
        let get = |id: EntityId| entities.get(id.index())?.as_deref();
        if let (Some(running), Some(waiting)) = (get(running), get(id)) {
            rest.consider(running, waiting, now);
        }
    }

    /// An event for an entity: one that is blocked becomes ready.
    pub(crate) fn wake(&mut self, id: EntityId, now: u64) -> Woken {
        let Queue { entities, rest, .. } = self;
        let Some(entity) = find(entities, id) else {
            return Woken::Nothing;
        };
        match entity.state {
            State::Blocked { until } => {
                if until.is_some() {
                    rest.timers.remove(id);
                }
                let woken = rest.unblock(entity, now);
                if woken == Woken::Waiting {
                    self.consider(id, now);
                }
                woken
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
    #[inline(always)]
    pub(crate) fn expire(&mut self, now: u64) -> bool {
        let mut any = false;
        while let Some((at, id)) = self.rest.timers.peek()
            && at <= now
        {
            self.rest.timers.pop();
            let Queue { entities, rest, .. } = self;
            let Some(entity) = find(entities, id) else {
                continue;
            };
            let woken = match entity.state {
                State::Throttled { .. } => rest.make_ready(entity, Ready::Replenished, now),
                _ => {
                    entity.by_timer = true;
                    rest.unblock(entity, now)
                }
            };
            if woken == Woken::Waiting {
                any = true;
                self.consider(id, now);
            }
        }
        any
    }

    /// Takes the next one to run out of those that wait, and runs it.
    #[inline(always)]
    pub(crate) fn pick(&mut self, now: u64) -> Option<Dispatch> {
        let Queue { entities, rest, .. } = self;
        if rest.running.is_some() {
            return None;
        }
        if let Some(favoured) = rest.favoured.take() {
            return self.pick_favoured(favoured, now);
        }
        let id = rest.policy.take(now)?;
        rest.lent_until = u64::MAX;
        Some(rest.dispatch(find(entities, id)?, now))
    }

    /// As `pick`, but one runs out of its turn that another has yielded to: as long as such runs one after the other have not taken
    /// more than a part of a slice, and unless the one whose turn it is would interrupt it at once.
    #[inline(never)]
    fn pick_favoured(&mut self, favoured: EntityId, now: u64) -> Option<Dispatch> {
        let Queue { entities, rest, .. } = self;
        let next = rest.policy.take(now)?;
        let lent_until = match rest.lent_until {
            u64::MAX => now.saturating_add(rest.slice / LENT),
            since_before => since_before,
        };
        rest.lent_until = u64::MAX;
        let get = |id: EntityId| entities.get(id.index())?.as_deref();
        let lends = match (get(favoured), get(next)) {
            (Some(favoured), Some(other)) if favoured.id != other.id => {
                favoured.state == State::Waiting
                    && now < lent_until
                    && rest.policy.gives_way(favoured, other) != Some(0)
            }
            _ => false,
        };
        if !lends {
            return Some(rest.dispatch(find(entities, next)?, now));
        }
        rest.policy.put_back(find(entities, next)?);
        rest.policy.take_this(favoured);
        let mut run = rest.dispatch(find(entities, favoured)?, now);
        rest.lent_until = lent_until;
        run.until = run.until.min(lent_until);
        rest.run_until = run.until;
        Some(run)
    }

    /// The running entity leaves the pCPU.
    #[inline(always)]
    pub(crate) fn stop(&mut self, turn: Turn, now: u64) -> Option<Left> {
        let Queue { entities, rest, .. } = self;
        let id = rest.running?;
        let entity = find(entities, id)?;
        if turn.io > 0 {
            rest.note_io(entity, turn.io, now);
        }
        rest.stop(entity, turn.why, now);
        if let Some(to) = rest.promised_to.take() {
            // If it could go on, and others are here to run instead.
            let goes = entity.state == State::Waiting && entity.allowed.contains(to);
            if goes && rest.waiting > 1 {
                return Some(Left::GoesTo(to, id));
            }
        }
        Some(match entity.allowed.contains(rest.pcpu) {
            true => Left::Stays,
            false => Left::HasToGo(id),
        })
    }

    /// Of these, the first one that waits here is to run next, out of its turn if need be.
    pub(crate) fn favour(&mut self, mut ids: impl Iterator<Item = EntityId>) {
        let waits = |id: &EntityId| self.get(*id).is_some_and(|e| e.state == State::Waiting);
        self.rest.favoured = ids.find(waits);
    }

    /// Keeps an entity from running. Whether it runs here now; it stops being picked when it is stopped.
    pub(crate) fn pause(&mut self, id: EntityId, now: u64) -> bool {
        let Queue { entities, rest, .. } = self;
        let Some(entity) = find(entities, id) else {
            return false;
        };
        rest.unqueue(entity, now);
        entity.paused = true;
        match entity.state {
            State::Waiting => entity.state = State::Held,
            State::Throttled { .. } => {
                entity.settle(now);
                entity.state = State::Held;
                rest.timers.remove(id);
            }
            State::Running { .. } => {
                rest.run_until = 0;
                return true;
            }
            State::Blocked { .. } | State::Held | State::Retired => {}
        }
        false
    }

    /// One that is not attached comes to wait, or is hindered.
    fn ready(&mut self, id: EntityId, now: u64) -> Woken {
        let Queue { entities, rest, .. } = self;
        let Some(entity) = find(entities, id) else {
            return Woken::Nothing;
        };
        let woken = rest.make_ready(entity, Ready::Arrived, now);
        if woken == Woken::Waiting {
            self.consider(id, now);
        }
        woken
    }

    /// Lets an entity run again.
    pub(crate) fn resume(&mut self, id: EntityId, now: u64) -> Woken {
        let Some(entity) = find(&mut self.entities, id) else {
            return Woken::Nothing;
        };
        entity.paused = false;
        match entity.state {
            State::Held => {
                entity.waits_since = now;
                self.ready(id, now)
            }
            _ => Woken::Nothing,
        }
    }

    /// New parameters for an entity. Those of the one that runs hold from its next run on.
    pub(crate) fn set_params(&mut self, id: EntityId, params: Params, allowed: CpuSet, now: u64) {
        let Queue { entities, rest, .. } = self;
        let Some(entity) = find(entities, id) else {
            return;
        };
        let waited = rest.unqueue(entity, now);
        let throttled = matches!(entity.state, State::Throttled { .. });
        if throttled {
            rest.timers.remove(id);
        }
        let runs = rest.running == Some(id);
        if runs {
            rest.charge(entity, now);
            rest.leave_crowd(entity, now);
            rest.policy.leave(entity);
        }
        if entity.params.weight != params.weight {
            // What it owes or is owed is time, whatever its weight.
            rest.policy.forget(entity);
        }
        entity.set_params(params, allowed, rest.slice, now);
        if runs {
            rest.policy.join(entity);
            rest.join_crowd(entity, now);
            rest.run_until = rest.run_until.min(now);
        } else if waited || throttled {
            self.ready(id, now);
        }
    }

    /// Another policy, or another slice.
    pub(crate) fn set_policy(&mut self, kind: PolicyKind, slice: u64, now: u64) {
        let Queue {
            entities,
            rest,
            capacity,
        } = self;
        let running = rest.running;
        if let Some(entity) = running.and_then(|id| find(entities, id)) {
            rest.charge(entity, now);
        }
        let mut ready: Vec<EntityId> = Vec::new();
        for entity in entities.iter_mut().flatten() {
            let throttled = matches!(entity.state, State::Throttled { .. });
            if throttled {
                rest.timers.remove(entity.id);
            }
            if rest.unqueue(entity, now) || throttled {
                ready.push(entity.id);
            }
        }
        if let Some(entity) = running.and_then(|id| find(entities, id)) {
            rest.leave_crowd(entity, now);
            rest.policy.leave(entity);
        }
        for entity in entities.iter_mut().flatten() {
            rest.policy.forget(entity);
            // The budgets of caps are parts of a slice.
            entity.set_params(entity.params, entity.allowed, slice, now);
        }
        rest.policy = kind.make(slice, *capacity);
        rest.slice = slice;
        if let Some(entity) = running.and_then(|id| find(entities, id)) {
            rest.policy.join(entity);
            rest.join_crowd(entity, now);
            rest.run_until = rest.run_until.min(now);
        }
        for id in ready {
            self.ready(id, now);
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
        let mut next = self.rest.movable.first();
        core::iter::from_fn(move || {
            let &(places, rank, id) = next?;
            let beyond = (places, u64::MAX, EntityId(u32::MAX));
            next = self.rest.movable.range(beyond..).next();
            Some((places, rank, id))
        })
    }

    /// Promises the running one to another pCPU. `false`: it does not run here.
    pub(crate) fn promise(&mut self, id: EntityId, to: usize) -> bool {
        let runs = self.rest.running == Some(id);
        if runs {
            self.rest.promised_to = Some(to);
        }
        runs
    }

    /// Counts what the running one has run so far.
    pub(crate) fn settle_running(&mut self, now: u64) {
        let Queue { entities, rest, .. } = self;
        if let Some(entity) = rest.running.and_then(|id| find(entities, id)) {
            rest.charge(entity, now);
        }
    }

    /// The one that runs and some of those that wait, if they may run on `pcpu`: each with its share and what it has had.
    pub(crate) fn candidates(&self, pcpu: usize) -> impl Iterator<Item = (EntityId, u64, Recent)> {
        self.rest
            .movable
            .iter()
            .take(COMPARED)
            .map(|(_, _, id)| *id)
            .chain(self.rest.running)
            .filter_map(|id| self.get(id))
            .filter(move |entity| entity.allowed.contains(pcpu))
            .map(|entity| {
                (
                    entity.id,
                    self.rest.policy.share(entity),
                    rest::had(&*self.rest.policy, entity),
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
            .rest
            .running
            .and_then(|id| self.get(id))
            .map_or(0, |entity| now.saturating_sub(entity.since));
        PcpuMetrics {
            busy: self.rest.metrics.busy + unpaid,
            waiting: self.rest.waiting,
            ..self.rest.metrics
        }
    }

    /// One was taken over from another pCPU that had it waiting.
    pub(crate) fn note_steal(&mut self) {
        self.rest.metrics.steals += 1;
    }
}
