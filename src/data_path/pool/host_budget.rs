//! The host's budget: how many server connections a host may have over all its tenants. `fair_share.rs`
//! decides who gets the next one.
//!
//! Each open server holds a [`Permit`]; dropping the server frees it. A pool that finds no place for a server
//! waits for a permit, and opens one when its turn comes. An idle server of the least recently used pool is
//! closed for it. While pools wait, a pool that has more than its share closes the server that comes back.
//!
//! When a host refuses connections as full (others use it as well, or it has no budget), its budget is reduced
//! for [`FULL_FOR`] to slightly below the number open at that time. This leaves connections for other tenants
//! and for operators.
//!
//! Where several nodes share the budget, each has a lease on a part of it (`host_lease.rs`), which the control path renews.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Pool, PooledServer,
    fair_share::{Claim, FairShares},
    host_lease::HostLease,
    lease_requests::LeaseRequests,
};
use crate::data_path::lock::locked;

/// How long a host counts as full after it has refused a connection.
const FULL_FOR: Duration = Duration::from_secs(10);
/// Connections of a full host that are left to others: one of `SPARE_OF`, at most `SPARE_MAX`.
const SPARE_OF: usize = 8;
const SPARE_MAX: usize = 3;

/// One host's budget.
#[derive(Debug)]
pub struct HostBudget {
    /// `hosts.max_connections`; `usize::MAX` where there is no limit.
    limit: AtomicUsize,
    /// The limit of a host that was found full, and until when it holds.
    found: Mutex<Option<(usize, Instant)>>,
    lease: Mutex<HostLease>,
    requests: Arc<LeaseRequests>,
    /// More is leased than this node may use: what ends is to be handed back.
    hands_back: AtomicBool,
    shares: Mutex<FairShares<Weak<Pool>>>,
    /// [`FairShares::is_pressed`]; read without the lock whenever a server is given back.
    is_pressed: AtomicBool,
    pools: Mutex<Vec<Weak<Pool>>>,
}

/// What this node uses of a host now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostUsage {
    /// Servers, open or being opened.
    pub open: usize,
    /// Servers that its sessions could use, as far as the sizes of the pools allow.
    pub wanted: usize,
    /// The sum of the weights of the tenants that have or want servers.
    pub weight: u64,
}

/// One server's share of the host's budget and of its pool's size. Dropping it frees both: then its own pool,
/// if sessions wait there, and those for whom there is a place now try to open a server.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<HostBudget>,
    claim: Claim,
    /// `None`: a server beside the pool.
    pool: Option<Weak<Pool>>,
    /// Its server is being closed for another pool.
    is_closing: bool,
}

impl Permit {
    /// Its server is being closed for another pool, which opens one when this permit is dropped.
    pub fn begin_closing(&mut self) {
        if !std::mem::replace(&mut self.is_closing, true) {
            self.budget.with_shares(|shares, _| shares.begin_closing());
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.with_shares(|shares, _| shares.give_up(&self.claim, self.is_closing));
        if let Some(pool) = self.pool.as_ref().and_then(Weak::upgrade) {
            pool.connector.live.fetch_sub(1, Ordering::SeqCst);
            if pool.waiting() > 0 {
                pool.open_wanted_soon();
            }
        }
        self.budget.offer();
        if self.budget.hands_back.load(Ordering::Relaxed) {
            self.budget.requests.returned();
        }
    }
}

/// Whether the pools that wait for a permit want one still. They live as long as this: the last reference to a
/// pool, with idle servers and their permits, must not be dropped under the lock.
#[derive(Default)]
struct Seen(Vec<Arc<Pool>>);

impl Seen {
    fn wants(&mut self, pool: &Weak<Pool>) -> bool {
        let Some(pool) = pool.upgrade() else { return false };
        let wants = pool.wants_more();
        self.0.push(pool);
        wants
    }
}

impl HostBudget {
    /// A budget without a limit, on a host that is used for the first time.
    pub fn new(requests: &Arc<LeaseRequests>) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(usize::MAX),
            found: Mutex::default(),
            lease: Mutex::new(requests.of_new_host()),
            requests: requests.clone(),
            hands_back: AtomicBool::default(),
            shares: Mutex::new(FairShares::new(usize::MAX)),
            is_pressed: AtomicBool::new(false),
            pools: Mutex::default(),
        })
    }

    /// The host's row is read: `limit` server connections; `None`: no limit. A smaller limit takes effect as servers are
    /// given back.
    pub fn set_limit(&self, limit: Option<u32>) {
        let limit = limit.map_or(usize::MAX, |limit| limit as usize);
        let before = self.limit.swap(limit, Ordering::AcqRel);
        if before == usize::MAX
            && limit != before
            && matches!(self.requests.of_new_host(), HostLease::Part { .. })
        {
            // Other nodes share the limit.
            self.run_out_lease();
            self.requests.short();
        }
        self.with_shares(|_, _| ());
    }

    /// `hosts.max_connections`, if there is a limit.
    pub fn limit(&self) -> Option<usize> {
        Some(self.limit.load(Ordering::Acquire)).filter(|limit| *limit != usize::MAX)
    }

    /// The control path has renewed the lease. Idle servers beyond it are closed at once, others when they are given back.
    /// `hands_back`: more than this is leased, until servers have ended.
    pub fn set_lease(&self, lease: HostLease, hands_back: bool) {
        *locked(&self.lease) = lease;
        self.hands_back.store(hands_back, Ordering::Relaxed);
        for _ in 0..self.with_shares(|shares, _| shares.surplus()) {
            let Some((pool, server)) = self.take_idle(None, |_| Duration::ZERO) else { break };
            pool.close(server);
        }
        self.offer();
    }

    /// The same for a host on which this node has had no lease yet.
    pub fn set_lease_if_none(&self, lease: HostLease) {
        let has_none = *locked(&self.lease) == HostLease::NOTHING_YET;
        if has_none {
            self.set_lease(lease, false);
        }
    }

    /// The lease counts no longer: what is open stays, and no more is opened.
    pub fn run_out_lease(&self) {
        let open = self.live();
        locked(&self.lease).run_out(open);
        self.with_shares(|_, _| ());
    }

    /// The lease has run out, and there is no contact to the other nodes ([`HostLease::lose_contact`]).
    pub fn lose_contact(&self) {
        let open = self.live();
        locked(&self.lease).lose_contact(open);
        self.with_shares(|_, _| ());
        self.offer();
    }

    /// Servers that this node may have now; `None`: there is no limit.
    pub fn leased(&self) -> Option<usize> {
        let limit = self.limit()?;
        Some(limit.min(self.lease_now(self.live())))
    }

    fn lease_now(&self, open: usize) -> usize {
        locked(&self.lease).servers(self.limit.load(Ordering::Acquire), open, Instant::now())
    }

    /// What this node uses of the host.
    pub fn usage(&self) -> HostUsage {
        let pools = self.others(None);
        let open = self.live();
        let idle: usize = pools.iter().map(|pool| pool.idle()).sum();
        let more = pools.iter().map(|pool| pool.wanted_beyond_live()).sum::<usize>();
        let uses = |pool: &&Arc<Pool>| pool.live() > 0 || pool.waiting() > 0;
        let weights: HashMap<i64, u32> =
            pools.iter().filter(uses).map(|pool| (pool.tenant.id, pool.claim().weight)).collect();
        let weight = weights.into_values().map(u64::from).sum();
        HostUsage { open, wanted: open.saturating_sub(idle) + more, weight }
    }

    /// Adds a pool of this host; its idle servers may be closed for other pools.
    pub fn register(&self, pool: &Arc<Pool>) {
        let mut pools = locked(&self.pools);
        pools.retain(|known| known.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Whether a server that is given back may have to be closed.
    #[inline]
    pub fn is_pressed(&self) -> bool {
        self.is_pressed.load(Ordering::Relaxed)
    }

    /// Server connections, open or being opened.
    pub fn live(&self) -> usize {
        locked(&self.shares).live()
    }

    fn with_shares<T>(&self, work: impl FnOnce(&mut FairShares<Weak<Pool>>, &mut Seen) -> T) -> T {
        let mut seen = Seen::default();
        let mut shares: MutexGuard<'_, _> = locked(&self.shares);
        let limit = self.limit_now(shares.live());
        shares.set_limit(limit);
        let result = work(&mut shares, &mut seen);
        self.is_pressed.store(shares.is_pressed(), Ordering::Relaxed);
        drop(shares);
        drop(seen);
        result
    }

    /// A permit for `pool`. `None`: the pool is full, or it waits for one, and [`Pool::open_wanted_soon`] is called when there is
    /// a place for it; an idle server of another pool is closed for it if need be.
    pub fn acquire(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        let claim = pool.claim();
        if !self.take(pool, &claim) {
            if !self.with_shares(|shares, seen| shares.is_served(&claim, |other| seen.wants(other))) {
                self.close_one_idle(pool);
            }
            self.request_if_short();
            return None;
        }
        // Another worker may have taken the pool's last place since its room was looked at.
        let counts = pool.connector.take_place(pool.rules.size);
        let permit = self.permit(claim, counts.then(|| Arc::downgrade(pool)));
        counts.then_some(permit)
    }

    /// A permit for a server beside `pool`, which does not count in its size; now or not at all.
    pub fn acquire_beside(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        let claim = pool.claim();
        let taken = self.take(pool, &claim) || {
            drop(self.take_idle_for(pool));
            self.take(pool, &claim)
        };
        if !taken && !pool.wants_more() {
            self.with_shares(|shares, _| shares.withdraw(&claim));
        }
        if !taken {
            self.request_if_short();
        }
        taken.then(|| self.permit(claim, None))
    }

    /// A pool has found no permit. If the lease is less than the budget, the other nodes may hand something back.
    fn request_if_short(&self) {
        if self.lease_now(self.live()) < self.limit.load(Ordering::Acquire) {
            self.requests.short();
        }
    }

    fn permit(self: &Arc<Self>, claim: Claim, pool: Option<Weak<Pool>>) -> Permit {
        Permit { budget: self.clone(), claim, pool, is_closing: false }
    }

    fn take(&self, pool: &Arc<Pool>, claim: &Claim) -> bool {
        let waiter = Arc::downgrade(pool);
        self.with_shares(|shares, seen| {
            let own = waiter.clone();
            shares.take(claim, waiter, Instant::now(), |other| Weak::ptr_eq(other, &own) || seen.wants(other))
        })
    }

    /// Whether `pool` must close a server that has come back, of this age, for another pool.
    #[cold]
    pub fn must_give_up(&self, pool: &Pool, age: Duration) -> bool {
        let claim = pool.claim();
        self.with_shares(|shares, seen| {
            shares.must_give_up(&claim, age, Instant::now(), |other| seen.wants(other))
        })
    }

    /// Called from time to time while sessions of `pool` wait. If it is the next one to get a permit: servers of
    /// others may be idle for long enough now, and sessions of tenants with a higher load may keep servers that
    /// they can return.
    pub fn look_again(&self, pool: &Arc<Pool>) {
        if !self.is_next(pool) {
            return;
        }
        pool.open_wanted();
        if self.is_next(pool) {
            let claim = pool.claim();
            let has_more =
                |other: &Pool| self.with_shares(|shares, _| shares.has_at_most(&claim, &other.claim()));
            self.others(Some(pool)).iter().any(|other| has_more(other) && other.call_back_pinned());
        }
    }

    fn is_next(&self, pool: &Pool) -> bool {
        let claim = pool.claim();
        self.is_pressed()
            && self.with_shares(|shares, seen| shares.is_next(&claim, |other| seen.wants(other)))
    }

    fn found_limit(&self) -> usize {
        let mut found = locked(&self.found);
        *found = found.filter(|(_, until)| *until > Instant::now());
        found.map_or(usize::MAX, |(limit, _)| limit)
    }

    /// The host has refused a connection as full: one of `requester`, which holds a permit for it, or one of
    /// no pool. Closes idle servers of the least recently used pools, one for it and a few for others.
    pub fn make_room(&self, requester: Option<&Arc<Pool>>) {
        let (permits, other) = (usize::from(requester.is_some()), usize::from(requester.is_none()));
        let open = self.live().saturating_sub(permits);
        let known = self.found_limit();
        // Spared once only: a further refusal means that a server process has not ended yet.
        let spare = if known == usize::MAX { (open / SPARE_OF).clamp(other, SPARE_MAX) } else { other };
        let limit = known.min(open.saturating_sub(spare)).max(1);
        let found = Some((limit, Instant::now() + FULL_FOR));
        *locked(&self.found) = found;
        self.with_shares(|_, _| ());
        for _ in 0..(open + permits).saturating_sub(limit).max(1) {
            if let Some((pool, server)) = self.take_idle(requester, |_| Duration::ZERO) {
                pool.close(server);
            }
        }
    }

    /// Tells the pools for whom there is a place now.
    fn offer(&self) {
        if !self.is_pressed() {
            return;
        }
        let served = self.with_shares(|shares, seen| shares.may_take(|other| seen.wants(other)));
        for pool in served.iter().filter_map(Weak::upgrade) {
            pool.open_wanted_soon();
        }
    }

    fn limit_now(&self, open: usize) -> usize {
        self.limit.load(Ordering::Acquire).min(self.found_limit()).min(self.lease_now(open))
    }

    /// Closes an idle server of another pool for `requester`.
    fn close_one_idle(&self, requester: &Arc<Pool>) {
        if let Some((pool, server)) = self.take_idle_for(requester) {
            pool.close(server);
        }
    }

    fn take_idle_for(&self, requester: &Arc<Pool>) -> Option<(Arc<Pool>, Box<PooledServer>)> {
        let claim = requester.claim();
        self.take_idle(Some(requester), |pool| {
            self.with_shares(|shares, _| shares.idle_before_taken(&claim, &pool.claim()))
        })
    }

    /// The server that is idle for longest, of the least recently used pool other than `requester` where one is
    /// idle for as long as `needed`. It must not be dropped under a lock: its permit's drop takes the locks.
    fn take_idle(
        &self,
        requester: Option<&Arc<Pool>>,
        needed: impl Fn(&Pool) -> Duration,
    ) -> Option<(Arc<Pool>, Box<PooledServer>)> {
        let mut others = self.others(requester);
        others.retain(|pool| pool.idle() > 0);
        others.sort_by_key(|pool| pool.last_used());
        others.into_iter().find_map(|pool| {
            let server = pool.take_longest_idle(needed(&pool))?;
            Some((pool, server))
        })
    }

    fn others(&self, pool: Option<&Arc<Pool>>) -> Vec<Arc<Pool>> {
        let pools = locked(&self.pools);
        let others = pools.iter().filter_map(Weak::upgrade);
        others.filter(|other| pool.is_none_or(|pool| !Arc::ptr_eq(other, pool))).collect()
    }
}
