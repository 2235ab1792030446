//! Which vCPU runs next on which pCPU.
//!
//! One run queue for all pCPUs, round robin by time slice. An entity (a vCPU) is blocked,
//! waiting in the queue, running on exactly one pCPU, or retired. The queue is a value without a
//! lock: the kernel keeps it behind one, taken only when a pCPU changes what it runs.
//!
//! Invariant: an entity stands in the queue at most once, and only while it waits.
//! A wake-up that arrives while an entity runs is not lost: it runs once more before it blocks.
//!
//! What it does not do: read clocks or send interrupts. Time comes in as host TSC ticks.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::{collections::VecDeque, vec::Vec};

/// Handle of a schedulable entity. Handles of removed entities are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntityId(pub u32);

/// What an entity is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting for an event, or until the host TSC reaches the deadline.
    Blocked {
        /// Host TSC ticks; `None`: no deadline.
        until: Option<u64>,
    },
    /// In the run queue.
    Waiting,
    /// On this pCPU.
    Running {
        /// pCPU number.
        pcpu: usize,
    },
    /// It has run for the last time and waits to be removed.
    Retired,
}

/// What to do about a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The entity entered the run queue: an idle pCPU should look.
    Queued,
    /// It runs on this pCPU, which should be interrupted so that it notices.
    Kick {
        /// pCPU number.
        pcpu: usize,
    },
    /// It is in the queue already, or will not run any more.
    Nothing,
}

#[derive(Debug)]
struct Entity {
    state: State,
    /// A wake-up came while it ran.
    woken: bool,
    /// pCPU it must run on, if any.
    pinned: Option<usize>,
}

/// The run queue of the host.
#[derive(Debug, Default)]
pub struct RunQueue {
    entities: Vec<Option<Entity>>,
    queue: VecDeque<EntityId>,
}

impl RunQueue {
    /// An empty queue.
    pub const fn new() -> Self {
        RunQueue {
            entities: Vec::new(),
            queue: VecDeque::new(),
        }
    }

    /// Adds an entity, blocked without a deadline. `pinned`: the only pCPU it may run on.
    pub fn add(&mut self, pinned: Option<usize>) -> EntityId {
        let entity = Entity {
            state: State::Blocked { until: None },
            woken: false,
            pinned,
        };
        let free = self.entities.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.entities.push(None);
            self.entities.len() - 1
        });
        self.entities[index] = Some(entity);
        EntityId(index as u32)
    }

    /// Removes an entity that is not running. `false`: it runs, or is not known.
    #[must_use]
    pub fn remove(&mut self, id: EntityId) -> bool {
        match self.entities.get(id.0 as usize) {
            Some(Some(entity)) if !matches!(entity.state, State::Running { .. }) => {
                self.entities[id.0 as usize] = None;
                self.queue.retain(|&queued| queued != id);
                true
            }
            _ => false,
        }
    }

    fn get_mut(&mut self, id: EntityId) -> Option<&mut Entity> {
        self.entities.get_mut(id.0 as usize)?.as_mut()
    }

    /// What the entity is doing; `None` when it is not known.
    pub fn state(&self, id: EntityId) -> Option<State> {
        Some(self.entities.get(id.0 as usize)?.as_ref()?.state)
    }

    /// Makes a blocked entity ready.
    pub fn wake(&mut self, id: EntityId) -> Wake {
        let Some(entity) = self.get_mut(id) else {
            return Wake::Nothing;
        };
        match entity.state {
            State::Blocked { .. } => {
                entity.state = State::Waiting;
                self.queue.push_back(id);
                Wake::Queued
            }
            State::Waiting | State::Retired => Wake::Nothing,
            State::Running { pcpu } => {
                entity.woken = true;
                Wake::Kick { pcpu }
            }
        }
    }

    /// Readies every entity whose deadline has come.
    pub fn expire(&mut self, now: u64) {
        for index in 0..self.entities.len() {
            if let Some(Entity {
                state: State::Blocked { until: Some(at) },
                ..
            }) = self.entities[index]
                && at <= now
            {
                self.wake(EntityId(index as u32));
            }
        }
    }

    /// The earliest deadline of a blocked entity that may run on `pcpu`, in host TSC ticks.
    pub fn next_deadline(&self, pcpu: usize) -> Option<u64> {
        self.entities
            .iter()
            .flatten()
            .filter(|entity| entity.pinned.is_none_or(|p| p == pcpu))
            .filter_map(|entity| match entity.state {
                State::Blocked { until } => until,
                _ => None,
            })
            .min()
    }

    /// Takes the next entity to run on `pcpu` out of the queue.
    pub fn pick(&mut self, pcpu: usize) -> Option<EntityId> {
        let position = self.queue.iter().position(|&id| {
            self.entities[id.0 as usize]
                .as_ref()
                .is_some_and(|entity| entity.pinned.is_none_or(|p| p == pcpu))
        })?;
        let id = self.queue.remove(position)?;
        let entity = self.get_mut(id)?;
        entity.state = State::Running { pcpu };
        entity.woken = false;
        Some(id)
    }

    /// Whether anything waits that `pcpu` could run.
    pub fn has_work(&self, pcpu: usize) -> bool {
        self.queue.iter().any(|id| {
            self.entities[id.0 as usize]
                .as_ref()
                .is_some_and(|entity| entity.pinned.is_none_or(|p| p == pcpu))
        })
    }

    /// A running entity goes to the end of the queue: its slice is over.
    pub fn yield_now(&mut self, id: EntityId) {
        if let Some(entity) = self.get_mut(id)
            && matches!(entity.state, State::Running { .. })
        {
            entity.state = State::Waiting;
            self.queue.push_back(id);
        }
    }

    /// A running entity blocks until a wake-up or `until` (host TSC ticks). If a wake-up
    /// came while it ran, it waits in the queue instead.
    pub fn block(&mut self, id: EntityId, until: Option<u64>) {
        let Some(entity) = self.get_mut(id) else {
            return;
        };
        if !matches!(entity.state, State::Running { .. }) {
            return;
        }
        if entity.woken {
            self.yield_now(id);
        } else {
            entity.state = State::Blocked { until };
        }
    }

    /// A running entity has run for the last time: no wake-up, past or to come, readies it again.
    pub fn retire(&mut self, id: EntityId) {
        if let Some(entity) = self.get_mut(id)
            && matches!(entity.state, State::Running { .. })
        {
            entity.state = State::Retired;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn round_robin_gives_everyone_a_turn() {
        let mut q = RunQueue::new();
        let ids: [EntityId; 3] = core::array::from_fn(|_| q.add(None));
        for id in ids {
            assert_eq!(q.wake(id), Wake::Queued);
        }
        for turn in 0..9 {
            let id = q.pick(0).unwrap();
            assert_eq!(id, ids[turn % 3]);
            q.yield_now(id);
        }
    }

    #[test]
    fn a_wake_up_while_running_is_not_lost() {
        let mut q = RunQueue::new();
        let id = q.add(None);
        q.wake(id);
        assert_eq!(q.pick(1), Some(id));
        assert_eq!(q.wake(id), Wake::Kick { pcpu: 1 });
        q.block(id, None);
        assert_eq!(q.state(id), Some(State::Waiting));
        assert_eq!(q.pick(0), Some(id));
        q.block(id, Some(10));
        assert_eq!(q.next_deadline(0), Some(10));
        q.expire(9);
        assert!(!q.has_work(0));
        q.expire(10);
        assert!(q.has_work(0));
    }

    #[test]
    fn a_retired_entity_never_runs_again() {
        let mut q = RunQueue::new();
        let id = q.add(None);
        q.wake(id);
        assert_eq!(q.pick(0), Some(id));
        q.wake(id);
        q.retire(id);
        assert_eq!(q.state(id), Some(State::Retired));
        assert_eq!(q.wake(id), Wake::Nothing);
        assert!(!q.has_work(0));
        assert!(q.remove(id));
    }

    #[test]
    fn pinned_entities_stay_on_their_pcpu() {
        let mut q = RunQueue::new();
        let id = q.add(Some(1));
        q.wake(id);
        assert!(!q.has_work(0));
        assert_eq!(q.pick(0), None);
        assert_eq!(q.pick(1), Some(id));
    }

    #[test]
    fn a_running_entity_cannot_be_removed() {
        let mut q = RunQueue::new();
        let id = q.add(None);
        q.wake(id);
        q.pick(0);
        assert!(!q.remove(id));
        q.block(id, None);
        assert!(q.remove(id));
        assert_eq!(q.wake(id), Wake::Nothing);
        assert_eq!(q.add(None), id);
    }

    proptest! {
        /// Whatever the order of calls: queued exactly when waiting, one pCPU at most per entity,
        /// and a pCPU never holds two.
        #[test]
        fn invariants_hold(ops in proptest::collection::vec((0u8..5, 0u32..6, 0usize..3), 1..200)) {
            let mut q = RunQueue::new();
            for _ in 0..6 { q.add(None); }
            let mut on: [Option<EntityId>; 3] = [None; 3];
            for (op, entity, pcpu) in ops {
                match op {
                    0 => { q.wake(EntityId(entity)); }
                    1 if on[pcpu].is_none() => on[pcpu] = q.pick(pcpu),
                    2 => if let Some(id) = on[pcpu].take() { q.yield_now(id) },
                    3 => if let Some(id) = on[pcpu].take() { q.block(id, Some(u64::from(entity))) },
                    4 => q.expire(u64::from(entity)),
                    _ => {}
                }
                for n in 0..6 {
                    let id = EntityId(n);
                    let queued = q.queue.iter().filter(|&&x| x == id).count();
                    let state = q.state(id).unwrap();
                    prop_assert_eq!(queued, usize::from(state == State::Waiting));
                    let running = on.iter().position(|&x| x == Some(id));
                    prop_assert_eq!(
                        state == running.map_or(state, |pcpu| State::Running { pcpu }), true);
                    prop_assert_eq!(running.is_some(), matches!(state, State::Running { .. }));
                }
            }
        }
    }
}
