//! By requirement: CPU, memory and I/O demand in one dominant-share order.
//!
//! A vCPU's dominant share is the greatest of: its part of recent CPU time, its VM's part of the host's memory, and its part of
//! the bytes that the vCPUs of this pCPU have asked devices for of late. A pCPU counts as having room for some
//! I/O at least, so that asking for little is little, though nobody else asks for any (after "dominant resource fairness", Ghodsi et al. 2011). The entity with the lowest one is next, so that
//! who holds or takes much of anything comes after who needs little of everything. The weight divides the
//! share. So that nobody starves, a share counts as a delay: all of the host is worth [`SLICES`] slices of waiting.

use super::{Ordered, Policy, PolicyKind, Ready};
use crate::entity::{Entity, MILLION, Recent};

/// Slices that the largest dominant share waits behind one that asks for nothing.
pub const SLICES: u64 = 32;

/// Ticks in which a pCPU has room for a byte of I/O at least, as a power of two: at 3 GHz 190 MB a second.
const TICKS_PER_BYTE_BITS: u32 = 4;

/// The queue of one pCPU.
#[derive(Debug)]
pub(crate) struct ByRequirement {
    waiting: Ordered,
    slice: u64,
    /// What all its vCPUs asked devices for, in bytes.
    io: Recent,
}

impl ByRequirement {
    pub(crate) fn new(slice: u64, capacity: usize) -> Self {
        ByRequirement {
            waiting: Ordered::new(capacity),
            slice,
            io: Recent::default(),
        }
    }

    /// The greatest part of anything that it has, by its weight, in millionths.
    fn dominant_share(&self, entity: &Entity, now: u64) -> u64 {
        let room = self
            .io
            .at(now)
            .max(Recent::of_every_tick(now) >> TICKS_PER_BYTE_BITS);
        let io = entity.io.at(now).saturating_mul(MILLION) / room;
        let held = u64::from(entity.params.demand.memory);
        let share = held.max(io).max(entity.recent.share(now)).min(MILLION);
        (share * 100 / u64::from(entity.params.weight)).min(MILLION)
    }

    /// Its place: when it began to wait, later by its dominant share.
    fn rank(&self, entity: &Entity, now: u64) -> u64 {
        let delay = self.dominant_share(entity, now) * SLICES * self.slice / MILLION;
        entity.waits_since.saturating_add(delay)
    }
}

impl Policy for ByRequirement {
    fn kind(&self) -> PolicyKind {
        PolicyKind::Requirement
    }

    fn ordered(&mut self) -> &mut Ordered {
        &mut self.waiting
    }

    fn enqueue(&mut self, entity: &mut Entity, why: Ready, now: u64) {
        if why != Ready::Preempted {
            entity.rank = self.rank(entity, now);
        }
        self.waiting.push(entity.id, entity.rank);
    }

    fn join(&mut self, entity: &mut Entity) {
        // Its place was another policy's, or by other demands. It has been charged up to now.
        entity.rank = self.rank(entity, entity.since);
    }

    fn note_io(&mut self, bytes: u64, now: u64) {
        self.io.add(bytes, now);
    }

    fn share(&self, entity: &Entity) -> u64 {
        u64::from(entity.params.weight)
    }

    fn gives_way(&self, running: &Entity, waiting: &Entity) -> Option<u64> {
        (waiting.rank < running.rank).then_some(self.slice / 8)
    }
}
