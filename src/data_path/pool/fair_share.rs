//! Which tenant of a host gets the next server connection, and which one gives up a server for it.
//!
//! The budget is shared by weighted max-min fairness. A tenant's *load* is the number of its servers divided
//! by its weight. A free place goes to the tenant with the lowest load; a tenant gives up the next server
//! that comes back, even if its own sessions wait, if the tenant that gets it then has a lower load than it
//! had itself. So the tenants that want more end with equal loads, and what one of them does not use is the
//! others'. While no tenant waits, none gives up anything.
//!
//! Two kinds of tenants come first: those without a server, in the order in which they came, and those below
//! their `min_pool_size`.
//!
//! Where a division leaves a remainder, or there are more tenants than places, the tenants take turns: one
//! keeps what it got for a slice of time, because each change of hands costs a connect.
//!
//! Pure: `W` waits for a place and is known by a number; the time is an argument.

use std::{cmp::Ordering, collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::data_path::tenant::Access;

/// How long a tenant keeps a new server although one with a lower load waits. Without it, pools open a
/// connection per query. Measured with 1 ms queries and 3 ms connects: 0 ms gives 1,016 queries a second, 20 ms
/// 2,138, 100 ms 822 (longer waits).
const HOLD: Duration = Duration::from_millis(20);

/// How long a tenant keeps a place that is no more its own than that of another one with servers.
const TURN: Duration = Duration::from_millis(500);

/// How long a tenant keeps an idle server although one with a higher load waits: so one that works little, but
/// steadily, does not wait for a connect each time. The coarse clock may show 100 ms too much.
const IDLE: Duration = Duration::from_millis(200);

/// Tenants without a server that are remembered beyond twice the number of servers.
const HOLDERS_SPARE: usize = 64;

/// One host's places, and the tenants that have them.
#[derive(Debug)]
pub struct FairShares<W> {
    limit: usize,
    live: usize,
    /// Servers among `live` that are being closed for others.
    closing: usize,
    holders: HashMap<i64, Holder>,
    /// Sorted by [`Rank`].
    wishes: Vec<Wish<W>>,
    next_order: u64,
}

/// Who asks for a place, or gives one up: one pool of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Unique among the pools of the host.
    pub pool: usize,
    pub tenant: i64,
    pub access: Access,
    /// The tenant's part of the budget, relative to other tenants. At least 1.
    pub weight: u32,
    /// `min_pool_size`: up to this number of servers the tenant comes first.
    pub floor: usize,
}

#[derive(Debug)]
struct Holder {
    /// Of each pool: read-write, read-only.
    of: [usize; 2],
    /// When it last got a place.
    gained: Instant,
    /// When it last left a place to another tenant.
    left: Option<Instant>,
}

#[derive(Debug)]
struct Wish<W> {
    claim: Claim,
    rank: Rank,
    waiter: W,
}

/// The lowest is served first: by the tenant's load with one more server, then by the servers of the pool, then
/// in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    load: Load,
    of_pool: usize,
    order: u64,
}

/// Servers divided by weight.
#[derive(Debug, Clone, Copy)]
struct Load {
    servers: u64,
    weight: u64,
}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> Ordering {
        self.servers.saturating_mul(other.weight).cmp(&other.servers.saturating_mul(self.weight))
    }
}

impl PartialOrd for Load {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Load {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Load {}

impl Holder {
    fn all(&self) -> usize {
        self.of.iter().sum()
    }
}

impl Claim {
    /// The index of its pool in [`Holder::of`].
    fn index(&self) -> usize {
        usize::from(self.access == Access::ReadOnly)
    }

    fn load(&self, servers: usize) -> Load {
        Load { servers: servers as u64, weight: u64::from(self.weight.max(1)) }
    }

    /// The load of a tenant that has this many servers, as a reason to give one up.
    fn load_now(&self, held: usize) -> Load {
        self.load(if held <= self.floor { 0 } else { held })
    }

    /// The load that a tenant with this many servers has with one more.
    fn load_then(&self, held: usize) -> Load {
        self.load(if held < self.floor { 0 } else { held + 1 })
    }
}

impl<W: Clone> FairShares<W> {
    /// Room for `limit` servers.
    pub fn new(limit: usize) -> Self {
        Self { limit, live: 0, closing: 0, holders: HashMap::new(), wishes: Vec::new(), next_order: 0 }
    }

    /// A smaller limit takes effect as servers are given back.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Servers, open or being opened.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Servers beyond the limit, without those that are being closed.
    pub fn surplus(&self) -> usize {
        (self.live - self.closing).saturating_sub(self.limit)
    }

    fn free(&self) -> usize {
        self.limit.saturating_sub(self.live)
    }

    /// Places that are free or will be when servers that are being closed have ended.
    fn coming(&self) -> usize {
        self.limit.saturating_sub(self.live - self.closing)
    }

    fn has_too_many(&self) -> bool {
        self.surplus() > 0
    }

    /// Whether a server that comes back may have to be given up: somebody waits, or there are too many.
    pub fn is_pressed(&self) -> bool {
        !self.wishes.is_empty() || self.has_too_many()
    }

    fn held(&self, claim: &Claim) -> usize {
        self.holders.get(&claim.tenant).map_or(0, Holder::all)
    }

    fn held_by_pool(&self, claim: &Claim) -> usize {
        self.holders.get(&claim.tenant).map_or(0, |holder| holder.of[claim.index()])
    }

    fn rank(&self, claim: &Claim, order: u64) -> Rank {
        let held = self.held(claim);
        let load = if held == 0 { claim.load(0) } else { claim.load_then(held) };
        Rank { load, of_pool: self.held_by_pool(claim), order }
    }

    /// The tenant's number of servers has changed, and with it the ranks of its wishes.
    fn rank_again(&mut self, tenant: i64) {
        let mut wishes = std::mem::take(&mut self.wishes);
        for wish in wishes.iter_mut().filter(|wish| wish.claim.tenant == tenant) {
            wish.rank = self.rank(&wish.claim, wish.rank.order);
        }
        wishes.sort_by_key(|wish| wish.rank);
        self.wishes = wishes;
    }

    /// The place in the order of those who still `want` one, up to `last`.
    fn nth(&mut self, last: usize, mut wants: impl FnMut(&W) -> bool) -> Option<&Wish<W>> {
        let mut at = 0;
        while let Some(wish) = self.wishes.get(at) {
            if !wants(&wish.waiter) {
                self.wishes.remove(at);
            } else if at == last {
                break;
            } else {
                at += 1;
            }
        }
        self.wishes.get(last)
    }

    /// Takes a free place, if no waiter that still `wants` it comes first. If not, the wish
    /// for one is kept until it is fulfilled or withdrawn, or no longer wanted.
    pub fn take(
        &mut self,
        claim: &Claim,
        waiter: W,
        now: Instant,
        mut wants: impl FnMut(&W) -> bool,
    ) -> bool {
        match self.wishes.iter_mut().find(|wish| wish.claim.pool == claim.pool) {
            Some(wish) if wish.claim == *claim => {}
            Some(wish) => {
                wish.claim = *claim;
                self.rank_again(claim.tenant);
            }
            None => {
                let rank = self.rank(claim, self.next_order);
                self.next_order += 1;
                let at = self.wishes.partition_point(|wish| wish.rank < rank);
                self.wishes.insert(at, Wish { claim: *claim, rank, waiter });
            }
        }
        let taken = self.is_within(self.free(), claim, &mut wants);
        if taken {
            self.withdraw(claim);
            self.gain(claim, now);
        }
        taken
    }

    /// Whether the wish of `claim` is one of the first `places`.
    fn is_within(&mut self, places: usize, claim: &Claim, mut wants: impl FnMut(&W) -> bool) -> bool {
        for place in 0..places {
            match self.nth(place, &mut wants) {
                Some(wish) if wish.claim.pool == claim.pool => return true,
                Some(_) => {}
                None => return false,
            }
        }
        false
    }

    /// Whether there is a place for the wish of `claim`, or will be when servers that are being closed have ended.
    pub fn is_served(&mut self, claim: &Claim, wants: impl FnMut(&W) -> bool) -> bool {
        self.is_within(self.coming(), claim, wants)
    }

    fn gain(&mut self, claim: &Claim, now: Instant) {
        self.live += 1;
        if self.holders.len() > 2 * self.live + HOLDERS_SPARE {
            self.holders.retain(|_, holder| holder.all() > 0);
        }
        let none = Holder { of: [0; 2], gained: now, left: None };
        let holder = self.holders.entry(claim.tenant).or_insert(none);
        holder.of[claim.index()] += 1;
        holder.gained = now;
        self.rank_again(claim.tenant);
    }

    /// Forgets a wish.
    pub fn withdraw(&mut self, claim: &Claim) {
        self.wishes.retain(|wish| wish.claim.pool != claim.pool);
    }

    /// A server is being closed for others; [`Self::give_up`] says when it has ended.
    pub fn begin_closing(&mut self) {
        self.closing += 1;
    }

    /// A server has ended. `was_closing`: it was closed for others.
    pub fn give_up(&mut self, claim: &Claim, was_closing: bool) {
        self.live -= 1;
        self.closing -= usize::from(was_closing);
        if let Some(holder) = self.holders.get_mut(&claim.tenant) {
            let held = &mut holder.of[claim.index()];
            *held = held.saturating_sub(1);
        }
        self.rank_again(claim.tenant);
    }

    /// Those for whom there is a free place.
    pub fn may_take(&mut self, mut wants: impl FnMut(&W) -> bool) -> Vec<W> {
        let free = self.free();
        let served = (0..free)
            .map_while(|place| self.nth(place, |waiter| wants(waiter)).map(|wish| wish.waiter.clone()));
        served.collect()
    }

    /// Whether this pool is the first for whom there is no place, also when servers that are being closed have
    /// ended.
    pub fn is_next(&mut self, claim: &Claim, wants: impl FnMut(&W) -> bool) -> bool {
        let coming = self.coming();
        self.nth(coming, wants).is_some_and(|wish| wish.claim.pool == claim.pool)
    }

    /// Whether a pool must close the server that has come back, although its own sessions may wait for it. Then a
    /// wish of its own comes last among its like. `age`: since the server was opened.
    pub fn must_give_up(
        &mut self,
        claim: &Claim,
        age: Duration,
        now: Instant,
        wants: impl FnMut(&W) -> bool,
    ) -> bool {
        if self.has_too_many() {
            return true;
        }
        let coming = self.coming();
        let Some(next) = self.first_rested(coming, now, wants) else { return false };
        let must = match self.compare(&next, claim) {
            Ordering::Less => age >= HOLD,
            Ordering::Greater if self.held(&next) > 0 => false,
            _ => {
                let slice = if self.held(&next) == 0 { HOLD } else { TURN };
                let gained = self.holders.get(&claim.tenant).map_or(now, |holder| holder.gained);
                now.saturating_duration_since(gained) >= slice.mul_f64(self.slices(&next))
            }
        };
        if must {
            if let Some(holder) = self.holders.get_mut(&claim.tenant) {
                holder.left = Some(now);
            }
            if let Some(own) = self.wishes.iter_mut().find(|wish| wish.claim.pool == claim.pool) {
                own.rank.order = self.next_order;
                self.next_order += 1;
            }
        }
        must
    }

    /// The first in the order, from `place` on, whose tenant has not just left a place to another: else that tenant
    /// would take the place of a third one, and so on.
    fn first_rested(
        &mut self,
        mut place: usize,
        now: Instant,
        mut wants: impl FnMut(&W) -> bool,
    ) -> Option<Claim> {
        loop {
            let claim = self.nth(place, &mut wants)?.claim;
            let left = self.holders.get(&claim.tenant).and_then(|holder| holder.left);
            if left.is_none_or(|left| now.saturating_duration_since(left) >= HOLD) {
                return Some(claim);
            }
            place += 1;
        }
    }

    /// Where tenants take turns, each keeps its place for this number of slices: so in each slice as many places
    /// change hands as tenants like `next` wait.
    fn slices(&self, next: &Claim) -> f64 {
        let load = self.rank(next, 0).load;
        let like_next = self.wishes.partition_point(|wish| wish.rank.load <= load);
        let waiting = like_next.saturating_sub(self.coming()).max(1);
        let holding = self.holders.values().filter(|holder| holder.all() > 0).count();
        (holding as f64 / waiting as f64).max(1.0)
    }

    /// How long a server must have been idle before it may be closed for the pool of `claim`.
    pub fn idle_before_taken(&self, claim: &Claim, of: &Claim) -> Duration {
        if self.has_at_most(claim, of) { Duration::ZERO } else { IDLE }
    }

    /// Whether the pool of `claim`, with one server more, has no more than its part beside the other one.
    pub fn has_at_most(&self, claim: &Claim, of: &Claim) -> bool {
        self.compare(claim, of).is_le()
    }

    /// Compares what a pool would have with one server more with what another one has.
    fn compare(&self, next: &Claim, claim: &Claim) -> Ordering {
        if next.tenant == claim.tenant {
            return (self.held_by_pool(next) + 1).cmp(&self.held_by_pool(claim));
        }
        next.load_then(self.held(next)).cmp(&claim.load_now(self.held(claim)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(tenant: i64, weight: u32, floor: usize) -> Claim {
        Claim { pool: tenant as usize, tenant, access: Access::ReadWrite, weight, floor }
    }

    fn read_only(claim: Claim) -> Claim {
        Claim { pool: claim.pool + 1000, access: Access::ReadOnly, ..claim }
    }

    /// Tenants that each want up to `wanted` servers; each of their servers comes back once in a `STEP`.
    struct Host {
        shares: FairShares<usize>,
        tenants: Vec<(Claim, usize)>,
        /// When each server of each tenant was opened.
        servers: Vec<Vec<Instant>>,
        now: Instant,
        connects: usize,
    }

    const STEP: Duration = Duration::from_millis(10);

    impl Host {
        fn new(limit: usize, tenants: Vec<(Claim, usize)>) -> Self {
            let servers = vec![Vec::new(); tenants.len()];
            Self { shares: FairShares::new(limit), tenants, servers, now: Instant::now(), connects: 0 }
        }

        fn wants(&self) -> Vec<bool> {
            self.tenants.iter().zip(&self.servers).map(|((_, wanted), held)| held.len() < *wanted).collect()
        }

        /// All who want a server ask for one, as often as they get one.
        fn ask(&mut self) {
            for at in 0..self.tenants.len() {
                loop {
                    let wants = self.wants();
                    let (claim, _) = self.tenants[at];
                    if !wants[at] || !self.shares.take(&claim, at, self.now, |at| wants[*at]) {
                        break;
                    }
                    self.servers[at].push(self.now);
                    self.connects += 1;
                }
            }
            assert!(self.shares.live() == self.held().iter().sum::<usize>());
        }

        /// Each server comes back once.
        fn step(&mut self) {
            self.now += STEP;
            for at in 0..self.tenants.len() {
                for server in 0..self.servers[at].len() {
                    let wants = self.wants();
                    let (claim, wanted) = self.tenants[at];
                    let age = self.now - self.servers[at][server];
                    let must = self.shares.must_give_up(&claim, age, self.now, |at| wants[*at]);
                    if must || self.servers[at].len() > wanted {
                        self.servers[at].remove(server);
                        self.shares.give_up(&claim, false);
                        self.ask();
                        break;
                    }
                }
            }
            self.ask();
        }

        fn held(&self) -> Vec<usize> {
            self.servers.iter().map(Vec::len).collect()
        }

        /// The mean number of servers of each tenant in that many steps.
        fn mean(&mut self, steps: usize) -> Vec<f64> {
            let mut sums = vec![0; self.tenants.len()];
            for _ in 0..steps {
                self.step();
                sums.iter_mut().zip(self.held()).for_each(|(sum, held)| *sum += held);
            }
            sums.into_iter().map(|sum| sum as f64 / steps as f64).collect()
        }
    }

    #[test]
    fn a_newcomer_gets_the_next_server_and_its_share_of_a_spent_budget() {
        let mut host = Host::new(20, vec![(claim(1, 1, 0), 40)]);
        host.ask();
        assert_eq!(host.held(), [20]);
        host.tenants.push((claim(2, 1, 0), 1));
        host.servers.push(Vec::new());
        host.step();
        host.step();
        host.step();
        assert_eq!(host.held(), [19, 1]);
        host.tenants[1].1 = 15;
        (0..30).for_each(|_| host.step());
        assert_eq!(host.held(), [10, 10]);
        let connects = host.connects;
        (0..30).for_each(|_| host.step());
        assert_eq!((host.held(), host.connects), (vec![10, 10], connects), "nothing changes hands any more");
    }

    #[test]
    fn what_a_tenant_does_not_use_is_the_others() {
        let of = |wanted: [usize; 3]| {
            let tenants = [1, 2, 3].map(|tenant| claim(tenant, 1, 0)).into_iter().zip(wanted).collect();
            let mut host = Host::new(12, tenants);
            (0..50).for_each(|_| host.step());
            host.held()
        };
        assert_eq!(of([30, 30, 30]), [4, 4, 4]);
        assert_eq!(of([2, 30, 30]), [2, 5, 5]);
        assert_eq!(of([30, 0, 1]), [11, 0, 1]);
        assert_eq!(of([3, 3, 3]), [3, 3, 3]);
    }

    #[test]
    fn weight_and_floor_count() {
        let mut host = Host::new(12, vec![(claim(1, 3, 0), 30), (claim(2, 1, 0), 30)]);
        (0..50).for_each(|_| host.step());
        assert_eq!(host.held(), [9, 3]);
        let mut host = Host::new(12, vec![(claim(1, 1, 8), 30), (claim(2, 1, 0), 30), (claim(3, 1, 0), 30)]);
        (0..50).for_each(|_| host.step());
        assert_eq!(host.held(), [8, 2, 2]);
        // Floors that leave nothing do not shut anybody out.
        let mut host = Host::new(4, vec![(claim(1, 1, 4), 30), (claim(2, 1, 0), 30)]);
        let mean = host.mean(200);
        assert!(mean[1] > 0.4, "{mean:?}");
    }

    #[test]
    fn more_tenants_than_places_take_turns() {
        for (limit, tenants) in [(1, 2), (4, 30), (3, 2), (5, 3), (5, 6)] {
            let mut host = Host::new(limit, (0..tenants).map(|tenant| (claim(tenant, 1, 0), 30)).collect());
            let steps = 3000;
            let fair = limit as f64 / tenants as f64;
            for mean in host.mean(steps) {
                assert!((mean - fair).abs() < fair * 0.1, "{limit} for {tenants}: {mean}");
            }
            // No more changes than one of each place in a slice.
            assert!(host.connects <= limit * steps / 2, "{limit} for {tenants}: {}", host.connects);
        }
    }

    #[test]
    fn both_pools_of_a_tenant_share_its_part() {
        let one = claim(1, 1, 0);
        let mut host = Host::new(8, vec![(one, 30), (read_only(one), 30), (claim(2, 1, 0), 30)]);
        (0..200).for_each(|_| host.step());
        assert_eq!(host.held(), [2, 2, 4]);
    }

    #[test]
    fn a_smaller_limit_takes_effect_as_servers_come_back() {
        let mut host = Host::new(12, vec![(claim(1, 1, 0), 30), (claim(2, 1, 0), 2)]);
        (0..50).for_each(|_| host.step());
        host.shares.set_limit(5);
        assert!(host.shares.is_pressed());
        (0..50).for_each(|_| host.step());
        assert_eq!(host.held(), [3, 2]);
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Want { tenant: usize, servers: usize },
        Ask,
        ComeBack(usize),
        Limit(usize),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..6usize, 0..8usize).prop_map(|(tenant, servers)| Step::Want { tenant, servers }),
            3 => Just(Step::Ask),
            4 => any::<usize>().prop_map(Step::ComeBack),
            1 => (1..8usize).prop_map(Step::Limit),
            2 => (0..600u64).prop_map(Step::Pass),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// In any sequence of events: never more servers than the limit allows; no place is free while somebody
        /// wants one; where all ask for long enough, each gets its part.
        #[test]
        fn the_budget_is_kept_used_and_shared(steps in steps(), weights in proptest::collection::vec(1..4u32, 6)) {
            let tenants = weights.iter().enumerate().map(|(at, weight)| (claim(at as i64, *weight, at / 2), 0));
            let mut host = Host::new(4, tenants.collect());
            let mut limit = 4;
            for step in steps {
                match step {
                    Step::Want { tenant, servers } => host.tenants[tenant].1 = servers,
                    Step::Ask => {
                        let before = host.held().iter().sum::<usize>();
                        host.ask();
                        let live = host.shares.live();
                        prop_assert!(live <= limit.max(before));
                        prop_assert!(live >= limit || !host.wants().contains(&true));
                    }
                    Step::ComeBack(which) => {
                        let at = which % 6;
                        let wants = host.wants();
                        let (claim, wanted) = host.tenants[at];
                        if let Some(opened) = host.servers[at].first().copied() {
                            let age = host.now - opened;
                            let must = host.shares.must_give_up(&claim, age, host.now, |at| wants[*at]);
                            let others = wants.iter().enumerate().any(|(other, wants)| other != at && *wants);
                            prop_assert!(!must || others || host.shares.live() > limit, "given up, and no other tenant waits");
                            if must || host.servers[at].len() > wanted {
                                host.servers[at].remove(0);
                                host.shares.give_up(&claim, false);
                            }
                        }
                    }
                    Step::Limit(to) => {
                        limit = to;
                        host.shares.set_limit(to);
                    }
                    Step::Pass(ms) => host.now += Duration::from_millis(ms),
                }
            }
            host.tenants.iter_mut().for_each(|(claim, wanted)| {
                claim.floor = 0;
                claim.weight = 1;
                *wanted = 20;
            });
            let mean = host.mean(2000);
            let fair = limit as f64 / 6.0;
            prop_assert!(mean.iter().all(|mean| (mean - fair).abs() < fair * 0.2), "{mean:?} of {limit}");
        }
    }
}
