//! One queue for all pCPUs: what the kernel uses until it takes [`Scheduler`](crate::Scheduler).
//!
//! One run queue for all pCPUs, round robin by time slice. An entity (a vCPU) is blocked,
//! waiting in the queue, running on exactly one pCPU, or retired. The queue is a value without a
//! lock: the kernel keeps it behind one, taken only when a pCPU changes what it runs.
//!
//! Invariant: an entity stands in the queue at most once, and only while it waits.
//! A wake-up that arrives while an entity runs is not lost: it runs once more before it blocks.
//!
//! What it does not do: read clocks or send interrupts. Time comes in as host TSC ticks.

use alloc::{collections::VecDeque, vec::Vec};

use crate::EntityId;

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
