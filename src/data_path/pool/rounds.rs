//! Which pools the maintenance visits, so that thousands of pools that are not used cost next to nothing.
//!
//! ```text
//! visited once a second ──all servers idle, none waits──▶ resting until a server is due
//!        ▲                                                     │
//!        └───── it is due, or a server is wanted ──────────────┘
//! ```

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{Pool, TenantPools};
use crate::data_path::{lock::locked, worker::whole_ms};

/// Pools that a task visits before it lets others run.
const VISITS_AT_ONCE: usize = 32;

/// The longest rest while a pool has servers, which may end on their own, or only its sessions keep it.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// A pool that was used within this time does not rest.
const USED: Duration = Duration::from_secs(1);

/// A pool's place in the rounds.
#[derive(Debug)]
pub(super) struct Place {
    is_visited: AtomicBool,
    /// While it rests: until when, on the coarse clock in milliseconds.
    rests_until_ms: AtomicU64,
}

impl Default for Place {
    /// A new pool is visited.
    fn default() -> Self {
        Self { is_visited: AtomicBool::new(true), rests_until_ms: AtomicU64::default() }
    }
}

/// All pools, by when they are visited.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    lists: Mutex<Lists>,
    /// Pools were closed since the last round.
    are_pools_closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Lists {
    visited: Vec<Weak<Pool>>,
    /// By the end of the rest, and the pool's address.
    resting: BTreeMap<(u64, usize), Weak<Pool>>,
}

impl Rounds {
    /// A pool that was just made.
    pub fn add(&self, pool: &Arc<Pool>) {
        locked(&self.lists).visited.push(Arc::downgrade(pool));
    }

    /// A pool that rests is visited from now on.
    #[cold]
    fn wake(&self, pool: &Arc<Pool>) {
        let mut lists = locked(&self.lists);
        if !pool.place.is_visited.swap(true, Ordering::AcqRel) {
            lists.resting.remove(&key(pool));
            lists.visited.push(Arc::downgrade(pool));
        }
    }

    /// A pool rests, unless it was woken meanwhile.
    fn rest(&self, pool: &Arc<Pool>, until: Duration) {
        let mut lists = locked(&self.lists);
        pool.place.rests_until_ms.store(whole_ms(until), Ordering::Relaxed);
        lists.resting.insert(key(pool), Arc::downgrade(pool));
        pool.place.is_visited.store(false, Ordering::Release);
    }

    /// A pool is closed.
    pub fn remove(&self, pool: &Pool) {
        locked(&self.lists).resting.remove(&key(pool));
        self.are_pools_closed.store(true, Ordering::Release);
    }

    /// All pools are visited once, because other limits apply to them.
    pub fn wake_all(&self) {
        let mut lists = locked(&self.lists);
        let resting = std::mem::take(&mut lists.resting);
        lists.wake(resting.into_values());
    }

    /// Takes the pools to visit now.
    fn begin(&self, now: Duration) -> Vec<Arc<Pool>> {
        let mut lists = locked(&self.lists);
        let later = lists.resting.split_off(&(whole_ms(now).saturating_add(1), 0));
        let due = std::mem::replace(&mut lists.resting, later);
        lists.wake(due.into_values());
        let visited = std::mem::take(&mut lists.visited);
        visited.iter().filter_map(Weak::upgrade).filter(|pool| !pool.is_retired()).collect()
    }

    /// Pools that are visited in the next round.
    #[cfg(test)]
    pub fn visited(&self) -> usize {
        locked(&self.lists).visited.len()
    }

    /// Pools that are visited again in the next round.
    fn keep(&self, pools: Vec<Weak<Pool>>) {
        locked(&self.lists).visited.extend(pools);
    }
}

impl Lists {
    fn wake(&mut self, pools: impl Iterator<Item = Weak<Pool>>) {
        for pool in pools {
            if let Some(strong) = pool.upgrade() {
                strong.place.is_visited.store(true, Ordering::Release);
                self.visited.push(pool);
            }
        }
    }
}

fn key(pool: &Pool) -> (u64, usize) {
    (pool.place.rests_until_ms.load(Ordering::Relaxed), std::ptr::from_ref(pool).addr())
}

impl Pool {
    /// A server is wanted: from now on the pool is visited.
    #[inline]
    pub(super) fn must_be_visited(self: &Arc<Self>) {
        if !self.place.is_visited.load(Ordering::Acquire)
            && let Some(pools) = self.all_pools()
        {
            pools.rounds.wake(self);
        }
    }

    /// Whether nothing but time makes something due.
    fn may_rest(&self) -> bool {
        let is_idle = self.live() == self.idle() && self.waiting() == 0 && self.rules.min_size == 0;
        is_idle && (self.live() == 0 || !self.may_have_idle_limits())
    }
}

impl TenantPools {
    /// Maintains the pools in which something may be due, on their workers, and drops those that have not been
    /// used for `pool_idle_timeout`. Called from time to time.
    pub async fn maintain(self: &Arc<Self>) {
        let Some(now) = self.workers.first().map(|worker| worker.clock.now()) else { return };
        // The cache frees what was removed when it works the next time.
        if self.rounds.are_pools_closed.swap(false, Ordering::AcqRel) {
            self.pools.run_pending_tasks().await;
        }
        let mut by_worker: Vec<(usize, Vec<Arc<Pool>>)> = Vec::new();
        for pool in self.rounds.begin(now) {
            let index = pool.placement.home().index;
            match by_worker.iter_mut().find(|(worker, _)| *worker == index) {
                Some((_, pools)) => pools.push(pool),
                None => by_worker.push((index, vec![pool])),
            }
        }
        for (_, pools) in by_worker {
            let Some(worker) = pools.first().map(|pool| pool.placement.home()) else { continue };
            let all = self.clone();
            worker.spawn(async move { all.visit(pools).await });
        }
    }

    /// Runs on the worker of these pools.
    async fn visit(&self, pools: Vec<Arc<Pool>>) {
        let mut again = Vec::with_capacity(pools.len());
        for (count, pool) in pools.into_iter().enumerate() {
            if count % VISITS_AT_ONCE == VISITS_AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
            if pool.is_retired() || self.drop_if_unused(&pool).await {
                continue;
            }
            let next = pool.maintain();
            match self.rest_of(&pool, next) {
                Some(until) => {
                    self.rounds.rest(&pool, until);
                    // What came between the look and the note.
                    if !pool.may_rest() {
                        pool.must_be_visited();
                    }
                    if pool.is_retired() {
                        self.rounds.remove(&pool);
                    }
                }
                None => again.push(Arc::downgrade(&pool)),
            }
        }
        self.rounds.keep(again);
    }

    /// Until when a pool need not be visited if one of its idle servers is due at `next`; `None`: it must be in
    /// the next round.
    fn rest_of(&self, pool: &Pool, next: Duration) -> Option<Duration> {
        let (now, used) = (pool.clock.now(), Duration::from_millis(pool.last_used()));
        let unused = used + self.config.load().timeouts.pool_idle;
        let look = next.min(now + LOOK_EVERY).max(now + USED);
        let until = match unused > now {
            true if pool.live() == 0 => unused,
            true => look.min(unused),
            false => look,
        };
        (pool.may_rest() && now >= used + USED).then_some(until)
    }

    async fn drop_if_unused(&self, pool: &Arc<Pool>) -> bool {
        let idle = self.config.load().timeouts.pool_idle;
        let unused = pool.clock.now().saturating_sub(Duration::from_millis(pool.last_used()));
        let is_kept = pool.sessions() > 0 || pool.waiting() > 0 || pool.rules.min_size > 0;
        if is_kept || unused < idle {
            return false;
        }
        let key = (pool.tenant.id, pool.access);
        // Another one may be in its place.
        if self.pools.get(&key).await.is_some_and(|present| Arc::ptr_eq(&present, pool)) {
            self.pools.invalidate(&key).await;
        }
        self.retire(pool, None);
        true
    }
}
