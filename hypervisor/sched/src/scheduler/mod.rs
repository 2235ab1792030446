//! Several pCPUs: pools, wake-ups, idleness, stealing, balancing.
//!
//! Each pCPU has a queue behind a lock of its own. An entity lies in exactly one of them, its *home*; a table says
//! which. Who wants an entity looks its home up, takes that queue's lock, and looks again. An entity on its way from one queue
//! to another is in neither for a moment; who wants it then waits for that moment. No two queues' locks are held at once, so there is no
//! order among them. Under a queue's lock no other lock is taken and nothing is called that is not of this crate. The lock of the
//! admission control ([`admission`]) comes before them.
//!
//! *No work waits while a pCPU idles.* A pCPU that finds nothing sets its idle bit under its queue's lock, then looks at the
//! other queues of its pool, then may halt. Who makes an entity ready puts it into its home's queue first and then
//! looks at the idle bits. So one of the two sees the other, whichever comes first.

pub(crate) mod admission;
mod balance;

use alloc::{boxed::Box, vec::Vec};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use spin::{Mutex, MutexGuard};

use crate::{
    cpus::{CpuSet, MAX_PCPUS},
    entity::{CAPS, Entity, EntityId, PRIORITIES, Params, PoolId, Refusal, State, WEIGHTS},
    metrics::{Metrics, PcpuMetrics},
    policy::PolicyKind,
    queue::{Dispatch, Left, Neighbours, Queue, Stop, Turn, Woken},
};

pub use admission::RESERVABLE;
use admission::{Ledger, Seat};

/// No home: the entity does not exist.
const NOWHERE: u32 = u32::MAX;
/// On its way from one queue to another.
const MOVING: u32 = u32::MAX - 1;

/// A CPU pool: pCPUs that share a policy. A pCPU belongs to one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its pCPUs.
    pub cpus: CpuSet,
    /// Its policy.
    pub policy: PolicyKind,
    /// Length of its time slices, in ticks.
    pub slice: u64,
}

/// What happened on a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The entity waits for a pCPU now.
    Waiting,
    /// It runs on this pCPU, and will run once more before it blocks.
    Running {
        /// pCPU number.
        pcpu: usize,
    },
    /// It waited already, is held up, or will not run any more.
    Nothing,
}

/// What to do about a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake {
    /// What happened.
    pub outcome: Outcome,
    /// The pCPU to interrupt: it idles and has work now, or has to look at `run_until` or at the entity. May be the
    /// caller's own.
    pub kick: Option<usize>,
}

impl Wake {
    const NOTHING: Self = Wake {
        outcome: Outcome::Nothing,
        kick: None,
    };
}

/// What a pCPU runs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// The entity; `None`: nothing to do until an interrupt, or until `next_deadline`.
    pub run: Option<Dispatch>,
    /// Another pCPU to interrupt: it idles, and something waits here that it could run.
    pub kick: Option<usize>,
}

/// One pCPU. Each in a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Pcpu {
    queue: Mutex<Queue>,
    /// Its bit in sets of pCPUs.
    bit: u64,
    /// What follows are copies, for those who do not have the lock.
    run_until: AtomicU64,
    load: AtomicU64,
    movable: AtomicU32,
    /// The part that is kept for reservations, in millionths; changes under the lock `admission`.
    reserved: AtomicU64,
    pool: PoolId,
    /// Its pool has others.
    shared: bool,
    /// Tick from which on its load is compared again.
    balance_at: AtomicU64,
}

#[derive(Debug)]
struct PoolState {
    cpus: CpuSet,
    policy: Mutex<(PolicyKind, u64)>,
}

/// The scheduler of a host. All methods may be called from any pCPU at any time.
#[derive(Debug)]
pub struct Scheduler {
    pcpus: Box<[Pcpu]>,
    pools: Box<[PoolState]>,
    /// By entity: its pCPU.
    homes: Box<[AtomicU32]>,
    free: Mutex<Vec<u32>>,
    admission: Mutex<()>,
    /// A bit for each pCPU that found nothing to run.
    idle: AtomicU64,
    /// A bit for each pCPU that does something else for a while.
    away: AtomicU64,
    /// A bit for each pCPU that runs entities.
    online: AtomicU64,
}

impl Scheduler {
    /// A scheduler of pCPUs 0 to `pcpus` - 1 (at most [`MAX_PCPUS`]) in these pools, for up to `capacity` entities.
    /// pCPUs that are in no pool belong to the first, as all do without any; who is in several belongs to the first of them. A slice of 0 is one tick.
    pub fn new(pcpus: usize, capacity: usize, pools: &[Pool]) -> Self {
        let pcpus = pcpus.clamp(1, MAX_PCPUS);
        let mut rest = CpuSet::first(pcpus);
        let mut list: Vec<Pool> = Vec::new();
        for pool in pools {
            let cpus = pool.cpus.and(rest);
            rest = rest.without(cpus);
            list.push(Pool {
                cpus,
                slice: pool.slice.max(1),
                ..*pool
            });
        }
        if list.is_empty() {
            list.push(Pool {
                cpus: CpuSet::EMPTY,
                policy: PolicyKind::default(),
                slice: 1,
            });
        }
        list[0].cpus = list[0].cpus.or(rest);
        let pcpu = |number: usize| {
            let index = list.iter().position(|pool| pool.cpus.contains(number));
            let index = index.unwrap_or(0);
            let pool = list[index];
            Pcpu {
                queue: Mutex::new(Queue::new(
                    number,
                    pool.policy,
                    pool.slice,
                    capacity,
                    match pool.cpus.len() {
                        1 => Neighbours::None,
                        _ => Neighbours::Some,
                    },
                )),
                bit: CpuSet::of(number).bits(),
                run_until: AtomicU64::new(u64::MAX),
                load: AtomicU64::new(0),
                movable: AtomicU32::new(0),
                reserved: AtomicU64::new(0),
                pool: PoolId(index as u8),
                shared: pool.cpus.len() > 1,
                balance_at: AtomicU64::new(0),
            }
        };
        Scheduler {
            pcpus: (0..pcpus).map(pcpu).collect(),
            homes: (0..capacity).map(|_| AtomicU32::new(NOWHERE)).collect(),
            free: Mutex::new((0..capacity as u32).rev().collect()),
            admission: Mutex::new(()),
            idle: AtomicU64::new(0),
            away: AtomicU64::new(0),
            online: AtomicU64::new(CpuSet::first(pcpus).bits()),
            pools: list
                .into_iter()
                .map(|pool| PoolState {
                    cpus: pool.cpus,
                    policy: Mutex::new((pool.policy, pool.slice)),
                })
                .collect(),
        }
    }

    /// Number of pCPUs.
    pub fn pcpus(&self) -> usize {
        self.pcpus.len()
    }

    /// The pools, as they are now.
    pub fn pools(&self) -> impl Iterator<Item = Pool> {
        self.pools.iter().map(|pool| {
            let (policy, slice) = *pool.policy.lock();
            Pool {
                cpus: pool.cpus,
                policy,
                slice,
            }
        })
    }

    fn lock(&self, pcpu: usize) -> Option<Locked<'_>> {
        let pcpu = self.pcpus.get(pcpu)?;
        Some(Locked {
            queue: pcpu.queue.lock(),
            pcpu,
        })
    }

    /// The queue that an entity lies in, locked, and its pCPU.
    fn home(&self, id: EntityId) -> Option<(usize, Locked<'_>)> {
        let home = self.homes.get(id.index())?;
        loop {
            match home.load(Ordering::Acquire) {
                NOWHERE => return None,
                MOVING => core::hint::spin_loop(),
                pcpu => {
                    let locked = self.lock(pcpu as usize)?;
                    if home.load(Ordering::Relaxed) == pcpu {
                        return Some((pcpu as usize, locked));
                    }
                }
            }
        }
    }

    /// Takes an entity out of its queue, which is locked. It has to be put into another.
    fn take_out(&self, locked: &mut Locked<'_>, id: EntityId, now: u64) -> Option<Box<Entity>> {
        let entity = locked.queue.extract(id, now)?;
        self.homes[id.index()].store(MOVING, Ordering::Relaxed);
        Some(entity)
    }

    fn put_in(&self, pcpu: usize, locked: &mut Locked<'_>, entity: Box<Entity>, now: u64) {
        let id = entity.id;
        locked.queue.insert(entity, now);
        self.homes[id.index()].store(pcpu as u32, Ordering::Release);
    }

    /// The pCPUs that an entity with these parameters may run on. Says nothing of what is reserved by others.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self, params: &Params) -> Result<CpuSet, Refusal> {
        let pool = self.pools.get(usize::from(params.pool.0));
        let pool = pool.ok_or(Refusal::NoSuchPool)?;
        if !WEIGHTS.contains(&params.weight)
            || !PRIORITIES.contains(&params.priority)
            || params.cap.is_some_and(|cap| !CAPS.contains(&cap))
        {
            return Err(Refusal::OutOfRange);
        }
        if let Some(reservation) = params.reservation {
            if reservation.budget == 0 || reservation.budget > reservation.period {
                return Err(Refusal::OutOfRange);
            }
            let policy = pool.policy.lock().0;
            if policy != PolicyKind::Reservation {
                return Err(Refusal::NoReservations(policy));
            }
        }
        let allowed = params.affinity.and(pool.cpus);
        if allowed.is_empty() {
            return Err(Refusal::NoPcpu { pool: pool.cpus });
        }
        Ok(allowed)
    }

    /// Puts an entity that lies in no queue where it may be, best where there is the most room. The pCPU to interrupt, if any.
    ///
    /// # Errors
    /// All those pCPUs are offline; the entity comes back.
    fn place(&self, entity: Box<Entity>, now: u64) -> Result<Option<usize>, Box<Entity>> {
        let crowd = |pcpu: &usize| {
            let queue = self.pcpus[*pcpu].queue.lock();
            (
                self.reserved(*pcpu),
                queue.crowd().share(),
                queue.population(),
                *pcpu,
            )
        };
        let best = self.online(entity.allowed).iter().min_by_key(crowd);
        let Some((pcpu, mut locked)) = best.and_then(|pcpu| Some((pcpu, self.lock(pcpu)?))) else {
            return Err(entity);
        };
        let id = entity.id;
        let before = locked.queue.run_until();
        self.put_in(pcpu, &mut locked, entity, now);
        let state = locked.queue.get(id).map_or(State::Retired, |e| e.state);
        Ok(match state {
            State::Waiting => self.look(pcpu, locked, id, before),
            // The pCPU may idle, and not know of it.
            State::Blocked { until: Some(_) } | State::Throttled { .. } => Some(pcpu),
            _ => None,
        })
    }

    /// None of the pCPUs that these parameters allow is online.
    fn no_pcpu(&self, params: &Params) -> Refusal {
        let pool = self.pools[usize::from(params.pool.0)].cpus;
        Refusal::NoPcpu {
            pool: self.online(pool),
        }
    }

    /// Adds an entity, blocked without a deadline.
    ///
    /// # Errors
    /// What is wrong with the parameters, or that there is no room.
    pub fn add(&self, params: Params, now: u64) -> Result<EntityId, Refusal> {
        let _admission = self.admission.lock();
        let allowed = self.check(&params)?;
        let mut ledger = Ledger::of(&self.pcpus);
        let allowed = self.seat(&mut ledger, &params, allowed, None)?;
        let slice = self.slice_of(&params);
        let number = self.free.lock().pop().ok_or(Refusal::Full)?;
        let id = EntityId(number);
        let entity = Box::new(Entity::new(id, params, allowed, slice, now));
        match self.place(entity, now) {
            Ok(_) => {
                ledger.commit(&self.pcpus);
                Ok(id)
            }
            Err(_) => {
                self.free.lock().push(number);
                Err(self.no_pcpu(&params))
            }
        }
    }

    /// Length of the slices in the pool that these parameters name, which there is.
    fn slice_of(&self, params: &Params) -> u64 {
        self.pools[usize::from(params.pool.0)].policy.lock().1
    }

    /// Removes an entity that does not run. `false`: it runs, or is not known.
    #[must_use]
    pub fn remove(&self, id: EntityId, now: u64) -> bool {
        let _admission = self.admission.lock();
        let Some((_, mut locked)) = self.home(id) else {
            return false;
        };
        let Some(entity) = self.take_out(&mut locked, id, now) else {
            return false;
        };
        let mut ledger = Ledger::of(&self.pcpus);
        ledger.release(Seat::of(&entity));
        ledger.commit(&self.pcpus);
        self.homes[id.index()].store(NOWHERE, Ordering::Release);
        drop(locked);
        self.free.lock().push(id.0);
        true
    }

    /// What the entity is doing; `None` when it is not known.
    pub fn state(&self, id: EntityId) -> Option<State> {
        let (_, locked) = self.home(id)?;
        Some(locked.queue.get(id)?.state)
    }

    /// The pCPU that it runs on, waits for, or ran on last.
    pub fn home_of(&self, id: EntityId) -> Option<usize> {
        Some(self.home(id)?.0)
    }

    /// Its parameters.
    pub fn params(&self, id: EntityId) -> Option<Params> {
        let (_, locked) = self.home(id)?;
        Some(locked.queue.get(id)?.params)
    }

    /// Gives an entity other parameters, which were checked, and these pCPUs, one of which is online. Whom to interrupt.
    fn change(&self, id: EntityId, params: Params, allowed: CpuSet, now: u64) -> CpuSet {
        let of = |pcpu: Option<usize>| pcpu.map_or(CpuSet::EMPTY, CpuSet::of);
        let Some((pcpu, mut locked)) = self.home(id) else {
            return CpuSet::EMPTY;
        };
        let state = locked.queue.get(id).map(|entity| entity.state);
        let runs = matches!(state, Some(State::Running { .. }));
        if runs || self.online(allowed).contains(pcpu) {
            // One that runs is stopped, and goes then if it has to.
            locked.queue.set_params(id, params, allowed, now);
            drop(locked);
            let idle = (!runs).then(|| self.idle_one(allowed)).flatten();
            return CpuSet::of(pcpu).or(of(idle));
        }
        let Some(mut entity) = self.take_out(&mut locked, id, now) else {
            return CpuSet::EMPTY;
        };
        drop(locked);
        entity.set_params(params, allowed, self.slice_of(&params), now);
        match self.place(entity, now) {
            Ok(kick) => of(kick),
            Err(entity) => {
                self.lay_aside(entity, now);
                CpuSet::EMPTY
            }
        }
    }

    /// Puts one whose pCPUs are all offline to one of them, where it never runs.
    fn lay_aside(&self, entity: Box<Entity>, now: u64) {
        let pcpu = entity.allowed.lowest();
        if let Some((pcpu, mut locked)) = pcpu.and_then(|pcpu| Some((pcpu, self.lock(pcpu)?))) {
            self.put_in(pcpu, &mut locked, entity, now);
        }
    }

    fn is_away(&self, pcpu: usize) -> bool {
        CpuSet::from_bits(self.away.load(Ordering::SeqCst)).contains(pcpu)
    }

    /// `pcpu`, which runs nothing now, does something else for a while, until it picks again: others take over what waits there, and
    /// what it was interrupted for. Whom to interrupt, if anyone.
    pub fn go_away(&self, pcpu: usize) -> Option<usize> {
        let this = self.pcpus.get(pcpu)?;
        self.away.fetch_or(this.bit, Ordering::SeqCst);
        self.idle.fetch_and(!this.bit, Ordering::SeqCst);
        self.idle_for_waiting(this.pool)
    }

    /// The pCPUs that found nothing to run.
    pub fn idle(&self) -> CpuSet {
        CpuSet::from_bits(self.idle.load(Ordering::SeqCst))
    }

    /// A pCPU out of these that idles.
    fn idle_one(&self, of: CpuSet) -> Option<usize> {
        self.idle().and(of).lowest()
    }

    /// An event for an entity: one that is blocked becomes ready.
    pub fn wake(&self, id: EntityId, now: u64) -> Wake {
        let Some((pcpu, mut locked)) = self.home(id) else {
            return Wake::NOTHING;
        };
        let before = locked.queue.run_until();
        match locked.queue.wake(id, now) {
            Woken::Nothing => Wake::NOTHING,
            Woken::Running => Wake {
                outcome: Outcome::Running { pcpu },
                kick: Some(pcpu),
            },
            Woken::Waiting => Wake {
                outcome: Outcome::Waiting,
                kick: self.look(pcpu, locked, id, before),
            },
            Woken::Throttled => Wake {
                outcome: Outcome::Nothing,
                kick: self.look_later(pcpu, locked, before),
            },
        }
    }

    /// There is a new timer in this queue, whose running one had to stop at `before`: whom to interrupt.
    fn look_later(&self, pcpu: usize, locked: Locked<'_>, before: u64) -> Option<usize> {
        let earlier = locked.queue.run_until() < before;
        drop(locked);
        (earlier || self.idle().contains(pcpu)).then_some(pcpu)
    }

    /// One waits now in this queue, whose running one had to stop at `before`: whom to interrupt.
    fn look(&self, pcpu: usize, locked: Locked<'_>, id: EntityId, before: u64) -> Option<usize> {
        let queue = &locked.queue;
        let stays = queue.is_idle();
        let earlier = queue.run_until() < before;
        if !locked.pcpu.shared {
            drop(locked);
            let kicked = match stays {
                // Else it is about to pick, or will when it comes back.
                true => self.idle().contains(pcpu),
                false => earlier,
            };
            return kicked.then_some(pcpu);
        }
        let movable = queue.get(id).map_or(CpuSet::EMPTY, |entity| entity.allowed);
        drop(locked);
        let idle = self.idle();
        if idle.contains(pcpu) {
            return Some(pcpu);
        }
        if stays && !self.is_away(pcpu) {
            // It is about to pick.
            return None;
        }
        idle.and(movable)
            .lowest()
            .or_else(|| earlier.then_some(pcpu))
    }

    /// Readies the entities of a pCPU whose deadline or budget has come; `pick` does it, too. Whom to interrupt, if anyone.
    pub fn expire(&self, pcpu: usize, now: u64) -> Option<usize> {
        let mut locked = self.lock(pcpu)?;
        let before = locked.queue.run_until();
        if !locked.queue.expire(now) {
            return None;
        }
        let earlier = locked.queue.run_until() < before;
        let idles = locked.queue.is_idle();
        drop(locked);
        if self.idle().contains(pcpu) {
            return Some(pcpu);
        }
        if idles && !self.is_away(pcpu) {
            return None;
        }
        self.idle_for_waiting(self.pcpus[pcpu].pool)
            .or_else(|| earlier.then_some(pcpu))
    }

    /// What `pcpu` runs next; it must not run anything now. Readies those whose deadline has come before.
    #[inline(always)]
    pub fn pick(&self, pcpu: usize, now: u64) -> Pick {
        let nothing = Pick {
            run: None,
            kick: None,
        };
        let Some(this) = self.pcpus.get(pcpu) else {
            return nothing;
        };
        if this.shared && now >= this.balance_at.load(Ordering::Relaxed) {
            self.balance(pcpu, now);
        }
        let bit = this.bit;
        if self.away.load(Ordering::Relaxed) & bit != 0 {
            self.away.fetch_and(!bit, Ordering::SeqCst);
        }
        let run = {
            let mut locked = Locked {
                queue: this.queue.lock(),
                pcpu: this,
            };
            locked.queue.expire(now);
            let run = locked.queue.pick(now);
            // Under the lock: see the module's text.
            let idle = self.idle.load(Ordering::Relaxed) & bit != 0;
            match run {
                Some(_) if idle => {
                    self.idle.fetch_and(!bit, Ordering::SeqCst);
                }
                None if !idle => {
                    self.idle.fetch_or(bit, Ordering::SeqCst);
                }
                _ => {}
            }
            run
        };
        if !this.shared {
            return Pick { run, kick: None };
        }
        let run = run.or_else(|| self.steal(pcpu, now));
        let kick = run.and_then(|_| self.idle_for_waiting(this.pool));
        Pick { run, kick }
    }

    /// The entity that runs on `pcpu` leaves it. Whom to interrupt, if anyone. Nothing happens if none runs.
    #[inline(always)]
    pub fn stop(&self, pcpu: usize, turn: impl Into<Turn>, now: u64) -> Option<usize> {
        let mut locked = self.lock(pcpu)?;
        let left = locked.queue.stop(turn.into(), now)?;
        self.move_if_due(locked, left, now)
    }

    /// As `stop` with [`Stop::Yielded`], after `io` bytes; and the first of these entities that waits on this pCPU runs next there:
    /// the yielding one waits for one of them, as for a spinlock's holder.
    pub fn yield_to(
        &self,
        pcpu: usize,
        io: u64,
        ids: impl Iterator<Item = EntityId>,
        now: u64,
    ) -> Option<usize> {
        let mut locked = self.lock(pcpu)?;
        locked.queue.favour(ids);
        let why = Stop::Yielded;
        let left = locked.queue.stop(Turn { why, io }, now)?;
        self.move_if_due(locked, left, now)
    }

    /// One has stopped, and may belong elsewhere. Whom to interrupt, if anyone.
    #[inline(always)]
    fn move_if_due(&self, locked: Locked<'_>, left: Left, now: u64) -> Option<usize> {
        match left {
            Left::Stays => None,
            Left::GoesTo(to, id) => self.hand_over(locked, to, id, now),
            Left::HasToGo(id) => self.send_away(locked, id, now),
        }
    }

    /// One that has just stopped was promised to another pCPU.
    #[inline(never)]
    fn hand_over(
        &self,
        mut locked: Locked<'_>,
        to: usize,
        id: EntityId,
        now: u64,
    ) -> Option<usize> {
        let entity = self.take_out(&mut locked, id, now)?;
        drop(locked);
        let mut locked = self.lock(to)?;
        let before = locked.queue.run_until();
        self.put_in(to, &mut locked, entity, now);
        self.look(to, locked, id, before)
    }

    /// One that has just stopped was given other places while it ran.
    #[inline(never)]
    fn send_away(&self, mut locked: Locked<'_>, id: EntityId, now: u64) -> Option<usize> {
        let entity = self.take_out(&mut locked, id, now)?;
        drop(locked);
        match self.place(entity, now) {
            Ok(kick) => kick,
            Err(entity) => {
                self.lay_aside(entity, now);
                None
            }
        }
    }

    /// Keeps an entity from running until it is resumed; wake-ups are remembered. Returns the pCPU that it runs on, to be
    /// interrupted; it is paused when it has left it.
    pub fn pause(&self, id: EntityId, now: u64) -> Option<usize> {
        let (pcpu, mut locked) = self.home(id)?;
        locked.queue.pause(id, now).then_some(pcpu)
    }

    /// Lets an entity run again.
    pub fn resume(&self, id: EntityId, now: u64) -> Wake {
        let Some((pcpu, mut locked)) = self.home(id) else {
            return Wake::NOTHING;
        };
        let before = locked.queue.run_until();
        match locked.queue.resume(id, now) {
            Woken::Waiting => Wake {
                outcome: Outcome::Waiting,
                kick: self.look(pcpu, locked, id, before),
            },
            Woken::Throttled => Wake {
                outcome: Outcome::Nothing,
                kick: self.look_later(pcpu, locked, before),
            },
            Woken::Nothing | Woken::Running => Wake::NOTHING,
        }
    }

    /// Tick at which `pcpu` has to look again at the latest, when it has nothing to run.
    pub fn next_deadline(&self, pcpu: usize) -> Option<u64> {
        self.lock(pcpu)?.queue.next_deadline()
    }

    /// Tick at which what runs on `pcpu` has to be stopped at the latest. It may be earlier than `pick` said: somebody more urgent has come.
    pub fn run_until(&self, pcpu: usize) -> u64 {
        self.pcpus
            .get(pcpu)
            .map_or(0, |pcpu| pcpu.run_until.load(Ordering::Acquire))
    }

    /// Gives a pool another policy and slice, in ticks. Returns the pCPUs to interrupt.
    ///
    /// # Errors
    /// There is no such pool, or it keeps time for reservations and would not any more.
    pub fn set_policy(
        &self,
        pool: PoolId,
        kind: PolicyKind,
        slice: u64,
        now: u64,
    ) -> Result<CpuSet, Refusal> {
        let _admission = self.admission.lock();
        let pool = self.pools.get(usize::from(pool.0));
        let pool = pool.ok_or(Refusal::NoSuchPool)?;
        let keeps = kind == PolicyKind::Reservation;
        if !keeps && pool.cpus.iter().any(|pcpu| self.reserved(pcpu) > 0) {
            return Err(Refusal::HasReservations);
        }
        let slice = slice.max(1);
        *pool.policy.lock() = (kind, slice);
        for pcpu in pool.cpus.iter() {
            if let Some(mut locked) = self.lock(pcpu) {
                locked.queue.set_policy(kind, slice, now);
            }
        }
        Ok(pool.cpus)
    }

    /// Those of these pCPUs that run entities.
    fn online(&self, of: CpuSet) -> CpuSet {
        CpuSet::from_bits(self.online.load(Ordering::Relaxed)).and(of)
    }

    /// A pCPU that will not run anything, from the beginning on: its entities go to others of their pools that they may run on.
    /// Those that may run nowhere else stay and never run. Returns the pCPUs to interrupt.
    pub fn take_offline(&self, pcpu: usize, now: u64) -> CpuSet {
        let _admission = self.admission.lock();
        let bit = CpuSet::of(pcpu).bits();
        self.online.fetch_and(!bit, Ordering::Relaxed);
        self.idle.fetch_and(!bit, Ordering::SeqCst);
        let mut kicks = CpuSet::EMPTY;
        for number in 0..self.homes.len() {
            if self.homes[number].load(Ordering::Acquire) as usize != pcpu {
                continue;
            }
            let id = EntityId(number as u32);
            let Some((_, locked)) = self.home(id) else {
                continue;
            };
            let Some((params, seat)) = locked.queue.get(id).map(|e| (e.params, Seat::of(e))) else {
                continue;
            };
            drop(locked);
            let mut ledger = Ledger::of(&self.pcpus);
            ledger.release(seat);
            let place = self
                .check(&params)
                .and_then(|allowed| self.seat(&mut ledger, &params, allowed, None));
            if let Ok(place) = place
                && !self.online(place).is_empty()
            {
                ledger.commit(&self.pcpus);
                kicks = kicks.or(self.change(id, params, place, now));
            }
        }
        kicks
    }

    /// What was measured of an entity, up to now.
    pub fn metrics(&self, id: EntityId, now: u64) -> Option<Metrics> {
        let (_, locked) = self.home(id)?;
        locked.queue.metrics_of(id, now)
    }

    /// What was measured of a pCPU, up to now.
    pub fn pcpu_metrics(&self, pcpu: usize, now: u64) -> Option<PcpuMetrics> {
        let metrics = self.lock(pcpu)?.queue.metrics(now);
        Some(PcpuMetrics {
            reserved: self.reserved(pcpu),
            ..metrics
        })
    }

    /// The policy that a pCPU's queue follows.
    pub fn policy(&self, pcpu: usize) -> Option<PolicyKind> {
        Some(self.lock(pcpu)?.queue.kind())
    }
}

/// A queue whose lock is held. What others see of it is brought up to date at the end.
struct Locked<'s> {
    queue: MutexGuard<'s, Queue>,
    pcpu: &'s Pcpu,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let (queue, pcpu) = (&self.queue, self.pcpu);
        pcpu.run_until.store(queue.run_until(), Ordering::Release);
        if pcpu.shared {
            pcpu.load.store(queue.crowd().share(), Ordering::Relaxed);
            let movable = queue.movable() as u32;
            // Before the idle bits are looked at.
            pcpu.movable.store(movable, Ordering::SeqCst);
        }
    }
}
