//! How many server connections a host may hold over all its tenants, and who gets the next one.
//!
//! Every open server holds a [`Permit`]; dropping the server frees it. A pool that finds the budget spent leaves a wish,
//! once, and is asked again when a permit comes free. Before that an idle server of the pool that was used least
//! recently is closed for it, and while wishes stand, a pool that has held a server for [`HOLD`] gives it up instead of
//! keeping it: without that pause the pools would thrash (a connect for every query).
//!
//! A host that takes no more connections, because it has no budget or others use it as well, has for a while the budget of
//! what is open then, less a few for others: so tenants that idle lock out neither the next nor an operator.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::Pool;

/// How long a server serves its pool although another pool wishes for it. Measured with 1 ms queries and 3 ms connects:
/// 0 ms gives 1 016 queries a second, 20 ms 2 138, 100 ms 822 (with longer waits).
pub const HOLD: Duration = Duration::from_millis(20);

/// How long a host is taken to be full once it has said so.
const FULL_FOR: Duration = Duration::from_secs(10);
/// What a full host is left with for others: one of so many connections, and no more than so many.
const SPARE_OF: usize = 8;
const SPARE_MAX: usize = 3;

/// One host's budget.
#[derive(Debug)]
pub struct Budget {
    /// `hosts.max_connections`; `usize::MAX` where there is no limit.
    limit: AtomicUsize,
    /// What the host has been found to take, and until when that is believed.
    found: Mutex<Option<(usize, Instant)>>,
    live: AtomicUsize,
    /// How many wishes stand; read without the lock on every give-back.
    wishing: AtomicUsize,
    wishes: Mutex<VecDeque<Weak<Pool>>>,
    pools: Mutex<Vec<Weak<Pool>>>,
}

/// One server's share of the host's budget and of its pool. Dropping it frees both, and whoever wants a server is asked
/// again: its own pool if sessions wait there, and the oldest wish.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    pool: Weak<Pool>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.live.fetch_sub(1, Ordering::AcqRel);
        if let Some(pool) = self.pool.upgrade() {
            pool.connector.permit_dropped();
            if pool.waiting() > 0 {
                pool.open_wanted_soon();
            }
        }
        if let Some(pool) = self.budget.next_wish() {
            pool.open_wanted_soon();
        }
    }
}

impl Budget {
    /// A budget of `limit` server connections; `None`: no limit.
    pub fn new(limit: Option<u32>) -> Arc<Self> {
        let budget = Self {
            limit: AtomicUsize::new(usize::MAX),
            found: Mutex::default(),
            live: AtomicUsize::new(0),
            wishing: AtomicUsize::new(0),
            wishes: Mutex::default(),
            pools: Mutex::default(),
        };
        budget.set_limit(limit);
        Arc::new(budget)
    }

    /// The host's row has changed. A smaller limit takes effect as servers are closed.
    pub fn set_limit(&self, limit: Option<u32>) {
        self.limit.store(limit.map_or(usize::MAX, |limit| limit as usize), Ordering::Release);
    }

    /// A pool of this host, from which idle servers may be taken.
    pub fn register(&self, pool: &Arc<Pool>) {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|known| known.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Whether some pool waits for a permit.
    #[inline]
    pub fn has_wishes(&self) -> bool {
        self.wishing.load(Ordering::Relaxed) > 0
    }

    /// Live server connections.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// A permit for `pool`, taken from an idle server of another pool if need be. `None`: the wish is noted, and
    /// [`Pool::open_wanted_soon`] is called when a permit is free.
    pub fn acquire(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        if let Some(permit) = self.try_acquire(pool) {
            return Some(permit);
        }
        // The wish comes first: a permit freed from here on finds it.
        self.wish(pool);
        self.close_one_idle(Some(pool));
        let permit = self.try_acquire(pool)?;
        self.withdraw(pool);
        Some(permit)
    }

    /// A permit for a connection of `pool`'s that does not count in its size. Leaves no wish: it is wanted now or not at all.
    pub fn acquire_apart(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        let permit = self.try_count().then(|| Permit { budget: self.clone(), pool: Weak::new() });
        permit.or_else(|| {
            self.close_one_idle(Some(pool));
            self.try_count().then(|| Permit { budget: self.clone(), pool: Weak::new() })
        })
    }

    fn try_count(&self) -> bool {
        let limit = self.limit.load(Ordering::Acquire).min(self.found_limit());
        let counted = self
            .live
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |live| (live < limit).then_some(live + 1));
        counted.is_ok()
    }

    fn found_limit(&self) -> usize {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        *found = found.filter(|(_, until)| *until > Instant::now());
        found.map_or(usize::MAX, |(limit, _)| limit)
    }

    /// The host has refused a connection: of `wisher`, which holds a permit for it, or of somebody who is no pool. Closes idle
    /// servers of the pools used least recently, one for it and a few for others.
    pub fn make_room(&self, wisher: Option<&Arc<Pool>>) {
        let (permits, stranger) = (usize::from(wisher.is_some()), usize::from(wisher.is_none()));
        let open = self.live().saturating_sub(permits);
        let known = self.found_limit();
        // Once: who is refused again waits for a process of the server's that is just ending.
        let spare = if known == usize::MAX { (open / SPARE_OF).clamp(stranger, SPARE_MAX) } else { stranger };
        let limit = known.min(open.saturating_sub(spare)).max(1);
        let found = Some((limit, Instant::now() + FULL_FOR));
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = found;
        for _ in 0..(open + permits).saturating_sub(limit).max(1) {
            self.close_one_idle(wisher);
        }
    }

    fn try_acquire(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        if !self.try_count() {
            return None;
        }
        pool.connector.permit_issued();
        Some(Permit { budget: self.clone(), pool: Arc::downgrade(pool) })
    }

    fn wish(&self, pool: &Arc<Pool>) {
        let mut wishes = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        if !wishes.iter().any(|wish| wish.as_ptr() == Arc::as_ptr(pool)) {
            wishes.push_back(Arc::downgrade(pool));
        }
        self.wishing.store(wishes.len(), Ordering::Release);
    }

    fn withdraw(&self, pool: &Arc<Pool>) {
        let mut wishes = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        wishes.retain(|wish| wish.as_ptr() != Arc::as_ptr(pool));
        self.wishing.store(wishes.len(), Ordering::Release);
    }

    fn next_wish(&self) -> Option<Arc<Pool>> {
        if !self.has_wishes() {
            return None;
        }
        let mut wishes = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = None;
        while next.is_none() {
            let Some(wish) = wishes.pop_front() else { break };
            next = wish.upgrade();
        }
        self.wishing.store(wishes.len(), Ordering::Release);
        next
    }

    /// Closes an idle server of the pool used least recently, other than `wisher`. The server is dropped without a lock
    /// held: its permit's drop takes the locks again.
    fn close_one_idle(&self, wisher: Option<&Arc<Pool>>) {
        let mut others: Vec<Arc<Pool>> = {
            let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools
                .iter()
                .filter_map(Weak::upgrade)
                .filter(|pool| wisher.is_none_or(|wisher| !Arc::ptr_eq(pool, wisher)))
                .collect()
        };
        others.sort_by_key(|pool| pool.last_used());
        let taken = others.iter().find_map(|pool| pool.take_idle());
        drop(taken);
    }
}
