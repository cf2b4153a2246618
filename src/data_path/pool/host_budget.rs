//! The host's budget: how many server connections a host may have over all its tenants, and which pool gets
//! the next one.
//!
//! Each open server holds a [`Permit`]; dropping the server frees it. A pool that finds the budget spent
//! enters a queue, and opens a server when a permit is free. First an idle server of the least recently used
//! pool is closed for it. While the queue is not empty, a pool closes a server that comes back after [`HOLD`]
//! instead of keeping it.
//!
//! When a host refuses connections as full (others use it as well, or it has no budget), its budget is reduced
//! for [`FULL_FOR`] to slightly below the number open at that time. This leaves connections for other tenants
//! and for operators.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::Pool;
use crate::data_path::lock::locked;

/// How long a server stays in its pool although another pool needs its permit. Without it, pools open a
/// connection per query. Measured with 1 ms queries and 3 ms connects: 0 ms gives 1,016 queries a second, 20
/// ms 2,138, 100 ms 822 (longer waits).
pub const HOLD: Duration = Duration::from_millis(20);

/// How long a host counts as full after it has refused a connection.
const FULL_FOR: Duration = Duration::from_secs(10);
/// Connections of a full host that are left to others: one of `SPARE_OF`, at most `SPARE_MAX`.
const SPARE_OF: usize = 8;
const SPARE_MAX: usize = 3;

/// One host's budget.
#[derive(Debug, Default)]
pub struct HostBudget {
    /// `hosts.max_connections`; `usize::MAX` where there is no limit.
    limit: AtomicUsize,
    /// The limit of a host that was found full, and until when it holds.
    found: Mutex<Option<(usize, Instant)>>,
    live: AtomicUsize,
    /// Length of `queue`; read without the lock whenever a server is given back.
    queued: AtomicUsize,
    queue: Mutex<VecDeque<Weak<Pool>>>,
    pools: Mutex<Vec<Weak<Pool>>>,
}

/// One server's share of the host's budget and of its pool's size. Dropping it frees both: then its own pool,
/// if sessions wait there, and the first pool in the queue try to open a server.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<HostBudget>,
    pool: Weak<Pool>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.live.fetch_sub(1, Ordering::AcqRel);
        if let Some(pool) = self.pool.upgrade() {
            pool.connector.live.fetch_sub(1, Ordering::SeqCst);
            if pool.waiting() > 0 {
                pool.open_wanted_soon();
            }
        }
        self.budget.offer();
    }
}

impl HostBudget {
    /// A budget of `limit` server connections; `None`: no limit.
    pub fn new(limit: Option<u32>) -> Arc<Self> {
        let budget = Self::default();
        budget.set_limit(limit);
        Arc::new(budget)
    }

    /// The host's row has changed. A smaller limit takes effect as servers are closed.
    pub fn set_limit(&self, limit: Option<u32>) {
        self.limit.store(limit.map_or(usize::MAX, |limit| limit as usize), Ordering::Release);
    }

    /// Adds a pool of this host; its idle servers may be closed for other pools.
    pub fn register(&self, pool: &Arc<Pool>) {
        let mut pools = locked(&self.pools);
        pools.retain(|known| known.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }

    /// Whether a pool waits for a permit.
    #[inline]
    pub fn is_permit_wanted(&self) -> bool {
        self.queued.load(Ordering::Relaxed) > 0
    }

    /// Server connections, open or being opened.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// A permit for `pool`; an idle server of another pool is closed for it if need be. `None`: the pool is
    /// in the queue, and [`Pool::open_wanted_soon`] is called when a permit is free.
    pub fn acquire(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        if let Some(permit) = self.try_acquire(pool) {
            return Some(permit);
        }
        // In the queue first: a permit freed from here on finds the pool there.
        self.enqueue(pool);
        self.close_one_idle(Some(pool));
        let permit = self.try_acquire(pool)?;
        self.withdraw(pool);
        Some(permit)
    }

    /// A permit for a server beside `pool`, which does not count in its size; now or not at all.
    pub fn acquire_beside(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        let counted = self.try_count() || {
            self.close_one_idle(Some(pool));
            self.try_count()
        };
        counted.then(|| Permit { budget: self.clone(), pool: Weak::new() })
    }

    fn try_count(&self) -> bool {
        let limit = self.limit_now();
        let counted = self
            .live
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |live| (live < limit).then_some(live + 1));
        counted.is_ok()
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
        for _ in 0..(open + permits).saturating_sub(limit).max(1) {
            self.close_one_idle(requester);
        }
    }

    fn try_acquire(self: &Arc<Self>, pool: &Arc<Pool>) -> Option<Permit> {
        if !self.try_count() {
            return None;
        }
        pool.connector.live.fetch_add(1, Ordering::SeqCst);
        Some(Permit { budget: self.clone(), pool: Arc::downgrade(pool) })
    }

    fn enqueue(&self, pool: &Arc<Pool>) {
        let mut queue = locked(&self.queue);
        if !queue.iter().any(|queued| queued.as_ptr() == Arc::as_ptr(pool)) {
            queue.push_back(Arc::downgrade(pool));
        }
        self.queued.store(queue.len(), Ordering::Release);
    }

    fn withdraw(&self, pool: &Arc<Pool>) {
        let mut queue = locked(&self.queue);
        queue.retain(|queued| queued.as_ptr() != Arc::as_ptr(pool));
        self.queued.store(queue.len(), Ordering::Release);
    }

    /// Offers a free permit to the pools in the queue, one after another: the first may have no use for it any
    /// more.
    fn offer(self: &Arc<Self>) {
        if self.is_permit_wanted()
            && self.has_room()
            && let Some(pool) = self.next_in_queue()
        {
            let budget = self.clone();
            pool.worker.clone().spawn(async move {
                pool.open_wanted();
                budget.offer();
            });
        }
    }

    fn has_room(&self) -> bool {
        self.live() < self.limit_now()
    }

    fn limit_now(&self) -> usize {
        self.limit.load(Ordering::Acquire).min(self.found_limit())
    }

    fn next_in_queue(&self) -> Option<Arc<Pool>> {
        let mut queue = locked(&self.queue);
        let mut next = None;
        while next.is_none() {
            let Some(queued) = queue.pop_front() else { break };
            next = queued.upgrade();
        }
        self.queued.store(queue.len(), Ordering::Release);
        next
    }

    /// Closes an idle server of the least recently used pool, other than `requester`. The server is dropped
    /// without a lock: its permit's drop takes the locks.
    fn close_one_idle(&self, requester: Option<&Arc<Pool>>) {
        let mut others: Vec<Arc<Pool>> = {
            let pools = locked(&self.pools);
            pools
                .iter()
                .filter_map(Weak::upgrade)
                .filter(|pool| requester.is_none_or(|requester| !Arc::ptr_eq(pool, requester)))
                .collect()
        };
        others.sort_by_key(|pool| pool.last_used());
        let taken = others.iter().find_map(|pool| pool.queue.take_idle());
        drop(taken);
    }
}
