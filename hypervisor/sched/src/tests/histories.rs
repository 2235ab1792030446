//! Any order of calls, on several pools: what a scheduler may never do, looked for after each call.
//!
//! Five pCPUs in three pools, one of them alone in its. They pick, stop, yield, go away and come back, and may never come up; meanwhile
//! entities are woken, paused, replaced, moved within their pool and to others, given reservations and rid of them, and pools get
//! other policies and slices. Time passes as it likes, so that nobody is stopped in time.

use super::*;

const PCPUS: usize = 5;
const ENTITIES: usize = 6;

/// One call of a random history. Entities are by number; so are pools.
#[derive(Clone, Debug)]
enum Call {
    Wake(usize),
    Pick(usize),
    Stop(usize, Stop),
    Block {
        pcpu: usize,
        lasts: u64,
    },
    Yield(usize),
    Pause(usize),
    Resume(usize),
    Expire(usize),
    GoAway(usize),
    TakeOffline(usize),
    Replace(usize, Params),
    SetParams {
        first: usize,
        count: usize,
        params: Params,
    },
    SetPolicy {
        pool: usize,
        policy: PolicyKind,
        slice: u64,
    },
}

fn any_params() -> impl Strategy<Value = Params> {
    let weight = prop_oneof![Just(1), Just(100), Just(10_000), WEIGHTS];
    let reservation = prop::option::of((1u64..=100, 1u64..=100, 1..4 * SLICE));
    let cap = prop::option::weighted(0.3, CAPS);
    (
        weight,
        cap,
        PRIORITIES,
        1u64..1 << PCPUS,
        0u8..4,
        reservation,
    )
        .prop_map(|(weight, cap, priority, cpus, pool, reservation)| Params {
            weight,
            cap,
            priority,
            affinity: CpuSet::from_bits(cpus),
            pool: PoolId(pool),
            reservation: reservation.map(|(parts, whole, period)| Reservation {
                // Sometimes nothing, or more than there is.
                budget: period * parts / whole,
                period,
            }),
            demand: Demand {
                memory: weight * 100,
                processors: u32::from(priority) * 30_000,
            },
        })
}

fn any_call() -> impl Strategy<Value = Call> {
    let (entity, pcpu) = (0..ENTITIES, 0..PCPUS);
    let policy = (0..PolicyKind::ALL.len()).prop_map(|index| PolicyKind::ALL[index]);
    prop_oneof![
        4 => entity.clone().prop_map(Call::Wake),
        6 => pcpu.clone().prop_map(Call::Pick),
        3 => pcpu.clone().prop_map(|pcpu| Call::Stop(pcpu, Stop::Interrupted)),
        1 => pcpu.clone().prop_map(|pcpu| Call::Stop(pcpu, Stop::Blocked { until: None })),
        1 => (pcpu.clone(), 0..2 * SLICE).prop_map(|(pcpu, lasts)| Call::Block { pcpu, lasts }),
        1 => pcpu.clone().prop_map(Call::Yield),
        1 => entity.clone().prop_map(Call::Pause),
        2 => entity.clone().prop_map(Call::Resume),
        1 => pcpu.clone().prop_map(Call::Expire),
        1 => pcpu.clone().prop_map(Call::GoAway),
        1 => pcpu.prop_map(Call::TakeOffline),
        1 => (entity.clone(), any_params()).prop_map(|(entity, params)| Call::Replace(entity, params)),
        3 => (entity, 1usize..=3, any_params())
            .prop_map(|(first, count, params)| Call::SetParams { first, count, params }),
        2 => (0usize..4, policy, 0..2 * SLICE)
            .prop_map(|(pool, policy, slice)| Call::SetPolicy { pool, policy, slice }),
    ]
}

/// A scheduler, and what is known of it from outside.
struct World {
    s: Scheduler,
    now: u64,
    ids: Vec<EntityId>,
    /// By entity: what its parameters have to be, when it was added, and whether it is paused.
    params: Vec<Params>,
    added: Vec<u64>,
    paused: [bool; ENTITIES],
    pools: Vec<Pool>,
    on: [Option<EntityId>; PCPUS],
    /// pCPUs that have been interrupted and have not looked since.
    kicked: CpuSet,
    /// Those that do something else.
    away: CpuSet,
    /// Those that have ever picked.
    up: CpuSet,
    offline: CpuSet,
}

impl World {
    fn new(policies: &[PolicyKind]) -> Self {
        let cpus = [[0, 1], [2, 3], [4, 4]].map(|numbers| numbers.into_iter().collect());
        let pool = |(cpus, &policy)| Pool {
            cpus,
            policy,
            slice: SLICE,
        };
        let pools: Vec<Pool> = cpus.into_iter().zip(policies).map(pool).collect();
        let s = Scheduler::new(PCPUS, ENTITIES, &pools);
        let params: Vec<Params> = (0..ENTITIES as u8)
            .map(|n| Params {
                pool: PoolId(n % 3),
                ..Params::default()
            })
            .collect();
        World {
            ids: params
                .iter()
                .map(|&params| s.add(params, 0).unwrap())
                .collect(),
            s,
            now: 0,
            params,
            added: vec![0; ENTITIES],
            paused: [false; ENTITIES],
            pools,
            on: [None; PCPUS],
            kicked: CpuSet::EMPTY,
            away: CpuSet::EMPTY,
            up: CpuSet::EMPTY,
            offline: CpuSet::EMPTY,
        }
    }

    fn kick(&mut self, pcpus: impl IntoIterator<Item = usize>) {
        self.kicked = self.kicked.or(pcpus.into_iter().collect());
    }

    /// The pCPUs that may run an entity: of those that are up, and its home alone if it has reserved.
    fn places(&self, n: usize) -> CpuSet {
        let Params {
            affinity,
            pool,
            reservation,
            ..
        } = self.params[n];
        let allowed = affinity
            .and(self.pools[usize::from(pool.0)].cpus)
            .without(self.offline);
        match reservation {
            Some(_) => allowed.and(
                self.s
                    .home_of(self.ids[n])
                    .map_or(CpuSet::EMPTY, CpuSet::of),
            ),
            None => allowed,
        }
    }

    fn pick(&mut self, pcpu: usize) -> Result<(), TestCaseError> {
        let bit = CpuSet::of(pcpu);
        if self.on[pcpu].is_some() || self.offline.contains(pcpu) {
            return Ok(());
        }
        let pick = self.s.pick(pcpu, self.now);
        self.up = self.up.or(bit);
        self.away = self.away.without(bit);
        self.kicked = self.kicked.without(bit);
        self.kick(pick.kick);
        if let Some(run) = pick.run {
            prop_assert_eq!(run.until, self.s.run_until(pcpu));
            let n = self.ids.iter().position(|&id| id == run.id).unwrap();
            prop_assert!(
                self.places(n).contains(pcpu),
                "{:?} may not be on {}",
                self.params[n],
                pcpu
            );
        }
        self.on[pcpu] = pick.run.map(|run| run.id);
        Ok(())
    }

    fn stop(&mut self, pcpu: usize, why: Stop) {
        let kick = self.s.stop(pcpu, why, self.now);
        self.kick(kick);
        self.on[pcpu] = None;
    }

    fn call(&mut self, call: &Call) -> Result<(), TestCaseError> {
        let now = self.now;
        match *call {
            Call::Wake(n) => {
                let wake = self.s.wake(self.ids[n], now);
                self.kick(wake.kick);
            }
            Call::Pick(pcpu) => self.pick(pcpu)?,
            Call::Stop(pcpu, why) => self.stop(pcpu, why),
            Call::Block { pcpu, lasts } => self.stop(
                pcpu,
                Stop::Blocked {
                    until: Some(now + lasts),
                },
            ),
            Call::Yield(pcpu) => {
                let kick = self
                    .s
                    .yield_to(pcpu, now % 4096, self.ids.iter().copied(), now);
                self.kick(kick);
                self.on[pcpu] = None;
            }
            Call::Pause(n) => {
                let kick = self.s.pause(self.ids[n], now);
                self.kick(kick);
                self.paused[n] = true;
            }
            Call::Resume(n) => {
                let wake = self.s.resume(self.ids[n], now);
                self.kick(wake.kick);
                self.paused[n] = false;
            }
            Call::Expire(pcpu) => {
                let kick = self.s.expire(pcpu, now);
                self.kick(kick);
            }
            Call::GoAway(pcpu) if self.on[pcpu].is_none() && !self.offline.contains(pcpu) => {
                let kick = self.s.go_away(pcpu);
                self.kick(kick);
                self.away = self.away.or(CpuSet::of(pcpu));
            }
            Call::TakeOffline(pcpu) if !self.up.contains(pcpu) => {
                let kicks = self.s.take_offline(pcpu, now);
                self.kick(kicks.iter());
                self.offline = self.offline.or(CpuSet::of(pcpu));
            }
            Call::GoAway(_) | Call::TakeOffline(_) => {}
            Call::Replace(n, params) => self.replace(n, params)?,
            Call::SetParams {
                first,
                count,
                params,
            } => {
                let group = first..ENTITIES.min(first + count);
                let outcome = self.s.set_params(&self.ids[group.clone()], params, now);
                if let Ok(kicks) = outcome {
                    self.kick(kicks.iter());
                    self.params[group].fill(params);
                }
            }
            Call::SetPolicy {
                pool,
                policy,
                slice,
            } => {
                let outcome = self.s.set_policy(PoolId(pool as u8), policy, slice, now);
                let Some(known) = self.pools.get(pool).copied() else {
                    prop_assert_eq!(outcome, Err(Refusal::NoSuchPool));
                    return Ok(());
                };
                let keeps = known.cpus.iter().any(|pcpu| self.s.reserved(pcpu) > 0);
                if keeps && policy != PolicyKind::Reservation {
                    prop_assert_eq!(outcome, Err(Refusal::HasReservations));
                    return Ok(());
                }
                prop_assert_eq!(outcome, Ok(known.cpus));
                self.kick(known.cpus.iter());
                self.pools[pool] = Pool {
                    policy,
                    slice: slice.max(1),
                    ..known
                };
            }
        }
        Ok(())
    }

    /// Another entity in place of one, unless that runs: with these parameters, or the usual ones if they are refused.
    fn replace(&mut self, n: usize, params: Params) -> Result<(), TestCaseError> {
        let runs = self.on.contains(&Some(self.ids[n]));
        prop_assert_eq!(self.s.remove(self.ids[n], self.now), !runs);
        if runs {
            return Ok(());
        }
        let anywhere = |pool: u8| Params {
            pool: PoolId(pool),
            ..Params::default()
        };
        let mut any = [params, anywhere(0), anywhere(1), anywhere(2)].into_iter();
        let added = any.find_map(|params| Some((params, self.s.add(params, self.now).ok()?)));
        // Only if nothing is up.
        let Some((params, id)) = added else {
            return Err(TestCaseError::reject("no pCPU"));
        };
        (self.params[n], self.ids[n]) = (params, id);
        (self.added[n], self.paused[n]) = (self.now, false);
        Ok(())
    }

    /// What has to hold at any time.
    fn check(&self) -> Result<(), TestCaseError> {
        let s = &self.s;
        let mut homes = [(0, 0); PCPUS];
        for (n, &id) in self.ids.iter().enumerate() {
            prop_assert_eq!(s.params(id), Some(self.params[n]));
            let state = s.state(id).unwrap();
            let runs = self.on.iter().position(|&other| other == Some(id));
            let running = match state {
                State::Running { pcpu } => Some(pcpu),
                _ => None,
            };
            prop_assert_eq!(runs, running);
            if self.paused[n] {
                let held_up = !matches!(state, State::Waiting | State::Throttled { .. });
                prop_assert!(held_up);
            }
            let home = s.home_of(id).unwrap();
            homes[home].0 += 1;
            homes[home].1 += u32::from(state == State::Waiting);
            let places = self.places(n);
            if running.is_none() && !(places.is_empty() && self.params[n].reservation.is_none()) {
                prop_assert!(
                    places.contains(home) || self.offline.contains(home),
                    "{} not in {}",
                    home,
                    places
                );
            }
            let m = s.metrics(id, self.now).unwrap();
            prop_assert!(m.run + m.wait + m.throttled + m.blocked <= self.now - self.added[n]);
        }
        prop_assert!(s.pools().eq(self.pools.iter().copied()));
        for (number, pool) in self.pools.iter().enumerate() {
            let kept: Vec<u64> = pool.cpus.iter().map(|pcpu| s.reserved(pcpu)).collect();
            prop_assert!(kept.iter().all(|&parts| parts <= RESERVABLE));
            let of_it = self
                .params
                .iter()
                .filter(|params| usize::from(params.pool.0) == number);
            let taken = of_it
                .filter_map(|params| params.reservation)
                .map(Reservation::utilization);
            prop_assert_eq!(kept.iter().sum::<u64>(), taken.sum::<u64>());
            for pcpu in pool.cpus.iter() {
                prop_assert_eq!(s.policy(pcpu), Some(pool.policy));
                let m = s.pcpu_metrics(pcpu, self.now).unwrap();
                prop_assert_eq!((m.entities, m.waiting), homes[pcpu]);
            }
            // Who idles while somebody waits that it may run, will be told: at the latest by one that looks next.
            let halts = s.idle().and(pool.cpus).without(self.kicked);
            let looks = |pcpu: usize| self.on[pcpu].is_none() && !halts.contains(pcpu);
            let somebody_looks = pool
                .cpus
                .without(self.away)
                .without(self.offline)
                .iter()
                .any(looks);
            prop_assert!(somebody_looks || !self.somebody_waits_for(halts));
        }
        Ok(())
    }

    fn somebody_waits_for(&self, pcpus: CpuSet) -> bool {
        (0..ENTITIES).any(|n| {
            let waits = self.s.state(self.ids[n]) == Some(State::Waiting);
            waits && !self.places(n).and(pcpus).is_empty()
        })
    }

    /// All that look do so, until each runs something, halts, or is away: then nobody waits for one that halts.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        loop {
            let halt = self.s.idle().without(self.kicked);
            let rest = CpuSet::first(PCPUS)
                .without(halt)
                .without(self.away)
                .without(self.offline);
            let Some(pcpu) = rest.iter().find(|&pcpu| self.on[pcpu].is_none()) else {
                break;
            };
            self.pick(pcpu)?;
        }
        let halt = self.s.idle();
        prop_assert!(!self.somebody_waits_for(halt), "{} halt", halt);
        self.check()
    }

    /// Whoever runs ends, until nobody is left who waits and may run: each runs once, and leaves nothing.
    fn end(&mut self) -> Result<(), TestCaseError> {
        for pcpu in (0..PCPUS).cycle().take(PCPUS * (ENTITIES + 1)) {
            if self.on[pcpu].is_some() {
                self.stop(pcpu, Stop::Retired);
            }
            self.pick(pcpu)?;
        }
        prop_assert_eq!(self.on, [None; PCPUS]);
        prop_assert!(!self.somebody_waits_for(CpuSet::ALL));
        for &id in &self.ids {
            prop_assert!(self.s.remove(id, self.now));
        }
        for pcpu in 0..PCPUS {
            let m = self.s.pcpu_metrics(pcpu, self.now).unwrap();
            prop_assert_eq!((m.entities, m.waiting, m.reserved), (0, 0, 0));
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(draw(300))]

    /// Whatever the order of calls: an entity runs on one pCPU at most, where it may; a pCPU runs one at most; no pCPU idles without being
    /// told while somebody waits that it may run; who is ready is picked in the end; all time is accounted for; what is reserved
    /// is what was admitted, and never exceeds what can be; what is refused changes nothing.
    #[test]
    fn invariants_hold(
        policies in prop::collection::vec(0..PolicyKind::ALL.len(), 3),
        calls in prop::collection::vec((any_call(), 0..3 * SLICE), 1..200),
    ) {
        let policies: Vec<_> = policies.into_iter().map(|index| PolicyKind::ALL[index]).collect();
        let mut world = World::new(&policies);
        world.check()?;
        for (call, passes) in &calls {
            world.now += passes;
            world.call(call)?;
            world.check()?;
        }
        world.settle()?;
        world.end()?;
    }
}
