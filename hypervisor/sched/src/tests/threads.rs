//! Several pCPUs at once, as threads: what the order of calls on one thread cannot show.
//!
//! Threads play pCPUs: each runs what it picks, and sleeps when it has picked nothing until it is interrupted or its next
//! deadline comes. Others wake, pause, resume, move, change parameters and policies meanwhile. No entity
//! may be on two of them, and each wake-up must be followed by a run: who is not interrupted sleeps on, so that a
//! kick that is missing ends the test, late.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::{
    thread,
    time::{Duration, Instant},
};

use super::*;

const PCPUS: usize = 3;
const ENTITIES: usize = 12;
/// Wake-ups by each of those who wake.
const WAKES: u64 = 4_000;
/// The last wake-up was lost if nothing has come of it by then.
const PATIENCE: Duration = Duration::from_secs(120);

/// A small generator: any sequence will do.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

struct World {
    scheduler: Scheduler,
    ids: Vec<EntityId>,
    clock: AtomicU64,
    kicked: [AtomicBool; PCPUS],
    /// By entity: it runs.
    runs: [AtomicBool; ENTITIES],
    /// By entity: wake-ups.
    wanted: [AtomicU64; ENTITIES],
    /// By entity: wake-ups that came before it ran last.
    seen: [AtomicU64; ENTITIES],
    done: AtomicBool,
}

impl World {
    fn new(policy: PolicyKind) -> Self {
        let scheduler = scheduler(PCPUS, policy);
        let add = |_| scheduler.add(Params::default(), 0).unwrap();
        let ids = (0..ENTITIES).map(add).collect();
        World {
            scheduler,
            ids,
            clock: AtomicU64::new(0),
            kicked: Default::default(),
            runs: Default::default(),
            wanted: Default::default(),
            seen: Default::default(),
            done: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(MS / 100, SeqCst)
    }

    fn kick(&self, pcpus: impl IntoIterator<Item = usize>) {
        for pcpu in pcpus {
            self.kicked[pcpu].store(true, SeqCst);
        }
    }

    fn wake(&self, n: usize) {
        self.wanted[n].fetch_add(1, SeqCst);
        self.kick(self.scheduler.wake(self.ids[n], self.now()).kick);
    }

    fn all_seen(&self) -> bool {
        (0..ENTITIES).all(|n| self.seen[n].load(SeqCst) == self.wanted[n].load(SeqCst))
    }

    /// Plays a pCPU until all is done.
    fn pcpu(&self, pcpu: usize) {
        let s = &self.scheduler;
        let mut random = Random(0x9e37_79b9 + pcpu as u64);
        while !self.done.load(SeqCst) {
            if random.below(50) == 0 {
                self.kick(s.go_away(pcpu));
                thread::yield_now();
            }
            let pick = s.pick(pcpu, self.now());
            self.kick(pick.kick);
            match pick.run {
                Some(run) => self.run(pcpu, run.id, &mut random),
                None => self.sleep(pcpu),
            }
        }
    }

    fn run(&self, pcpu: usize, id: EntityId, random: &mut Random) {
        let n = self.ids.iter().position(|&other| other == id).unwrap();
        assert!(!self.runs[n].swap(true, SeqCst), "{id:?} runs twice");
        let wanted = self.wanted[n].load(SeqCst);
        self.seen[n].fetch_max(wanted, SeqCst);
        for _ in 0..random.below(4) {
            if self.now() >= self.scheduler.run_until(pcpu) {
                break;
            }
            thread::yield_now();
        }
        assert!(self.runs[n].swap(false, SeqCst));
        let now = self.now();
        let why = match random.below(8) {
            0 | 1 => Stop::Interrupted,
            2 | 3 => Stop::Blocked {
                until: Some(now + random.below(MS)),
            },
            4 => {
                let io = random.below(4096);
                self.kick(
                    self.scheduler
                        .yield_to(pcpu, io, self.ids.iter().copied(), now),
                );
                return;
            }
            _ => Stop::Blocked { until: None },
        };
        let io = random.below(2) * 512;
        self.kick(self.scheduler.stop(pcpu, Turn { why, io }, now));
    }

    /// Nobody looks after a pCPU that sleeps but who interrupts it.
    fn sleep(&self, pcpu: usize) {
        let until = self.scheduler.next_deadline(pcpu).unwrap_or(u64::MAX);
        while !self.kicked[pcpu].swap(false, SeqCst)
            && self.now() < until
            && !self.done.load(SeqCst)
        {
            thread::yield_now();
        }
    }

    /// Plays an operator who changes everything, and leaves all of it as it was.
    fn operator(&self) {
        let s = &self.scheduler;
        let mut random = Random(0x1234_5678);
        for _ in 0..WAKES {
            let n = random.below(ENTITIES as u64) as usize;
            let id = self.ids[n];
            match random.below(6) {
                0 | 1 => {
                    self.kick(s.pause(id, self.now()));
                    thread::yield_now();
                    self.kick(s.resume(id, self.now()).kick);
                }
                2 | 3 => {
                    let params = Params {
                        affinity: CpuSet::from_bits(1 + random.below(7)),
                        weight: 1 + random.below(1_000) as u32,
                        cap: (random.below(3) == 0).then_some(90),
                        ..Params::default()
                    };
                    let kicks = s.set_params(&[id], params, self.now());
                    self.kick(kicks.unwrap().iter());
                }
                4 => {
                    let kind = PolicyKind::ALL[random.below(PolicyKind::ALL.len() as u64) as usize];
                    let cpus = s.set_policy(PoolId(0), kind, SLICE, self.now()).unwrap();
                    self.kick(cpus.iter());
                }
                _ => {
                    let m = s.metrics(id, self.now()).unwrap();
                    assert!(m.switches <= m.dispatches);
                    let _ = (
                        s.state(id),
                        s.home_of(id),
                        s.pcpu_metrics(n % PCPUS, self.now()),
                    );
                }
            }
        }
        for &id in &self.ids {
            let kicks = s.set_params(&[id], Params::default(), self.now());
            self.kick(kicks.unwrap().iter());
        }
    }
}

#[test]
fn no_wake_up_is_lost_and_nobody_runs_twice() {
    for policy in [
        PolicyKind::Fair,
        PolicyKind::Priority,
        PolicyKind::Requirement,
    ] {
        let world = World::new(policy);
        thread::scope(|scope| {
            for pcpu in 0..PCPUS {
                let world = &world;
                scope.spawn(move || world.pcpu(pcpu));
            }
            let others = [
                scope.spawn(|| world.operator()),
                scope.spawn(|| {
                    let mut random = Random(77);
                    for _ in 0..WAKES {
                        world.wake(random.below(ENTITIES as u64) as usize);
                        thread::yield_now();
                    }
                }),
            ];
            for other in others {
                // What it has seen goes wrong ends the test, not before the others have ended.
                let result = other.join();
                if result.is_err() {
                    world.done.store(true, SeqCst);
                }
                result.unwrap();
            }
            let begin = Instant::now();
            while !world.all_seen() && begin.elapsed() < PATIENCE {
                thread::yield_now();
            }
            world.done.store(true, SeqCst);
        });
        assert!(world.all_seen(), "{policy}: a wake-up was lost");
    }
}
