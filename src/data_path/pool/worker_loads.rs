//! How busy the workers are, and with which pools. From time to time `balance.rs` decides from that, and a pool
//! changes its workers.
//!
//! A worker knows for how long it was busy. The part of a pool in that is estimated from what it passed on,
//! because a clock read for each event would cost more than the estimate is wrong.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tracing::info;

use super::{
    Pool, TenantPools,
    balance::{FITS, PoolLoad, least_loaded, next_change},
};
use crate::data_path::{lock::locked, tenant::Access, worker::Worker};

/// A shorter time than this says little about how busy a worker is.
const SHORTEST: Duration = Duration::from_millis(100);
/// How long a pool stays before it is moved again: as long as it takes to see what a change has done.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// How long a pool keeps several workers of which it needs one.
const CALM_AFTER: Duration = Duration::from_secs(5);
/// Below this no pool is looked at.
const QUIET: f64 = 0.2;
/// Bytes whose passing on takes as long as a short query.
const BYTES_PER_QUERY: u64 = 40_000;

/// What was measured last.
#[derive(Debug, Default)]
pub(super) struct WorkerLoads {
    /// When that was, and how long each worker had been busy until then.
    last: Mutex<Option<(Instant, Vec<Duration>)>>,
    /// The part of the time that each worker was busy, in thousandths.
    busy: Vec<AtomicU64>,
    /// Pools that were moved to another worker, or got or lost one, since the process started.
    moves: AtomicU64,
    /// Pools by (tenant, access).
    pools: Mutex<HashMap<(i64, Access), Seen>>,
    /// A pool has several workers.
    is_spread: AtomicBool,
}

/// What was seen of a pool.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Its work since the process started, in short queries.
    work: u64,
    /// When its workers were last changed, if they were.
    changed: Option<Instant>,
    /// Since when one worker is enough for it.
    calm_since: Instant,
}

impl WorkerLoads {
    pub fn new(workers: usize) -> Self {
        Self { busy: std::iter::repeat_with(AtomicU64::default).take(workers).collect(), ..Self::default() }
    }

    /// The part of the time that this worker was busy when that was last measured: 0 to 1.
    fn busy(&self, worker: usize) -> f64 {
        self.busy.get(worker).map_or(0.0, |busy| busy.load(Ordering::Relaxed) as f64 / 1000.0)
    }
}

fn work_of(pool: &Pool) -> u64 {
    let stats = &pool.stats;
    let bytes = stats.bytes_sent.load(Ordering::Relaxed) + stats.bytes_received.load(Ordering::Relaxed);
    stats.queries.load(Ordering::Relaxed) + bytes / BYTES_PER_QUERY
}

impl TenantPools {
    /// The worker for a new pool.
    pub(super) fn worker_for_new_pool(&self) -> Option<Arc<Worker>> {
        let loads = self.workers.iter().map(|worker| (self.loads.busy(worker.index), worker.pools()));
        self.workers.get(least_loaded(loads)?).cloned()
    }

    /// The part of the time that this worker is busy: 0 to 1.
    pub fn busy(&self, worker: usize) -> f64 {
        self.loads.busy(worker)
    }

    /// How often a pool has changed its workers since the process started.
    pub fn moves(&self) -> u64 {
        self.loads.moves.load(Ordering::Relaxed)
    }

    /// Keeps the workers equally busy, as far as pools can be moved. Called once a second.
    pub fn balance_workers(&self) {
        let now = (Instant::now(), self.busy_times());
        let Some(last) = locked(&self.loads.last).replace(now.clone()) else { return };
        let passed = now.0.saturating_duration_since(last.0).as_secs_f64();
        if passed < SHORTEST.as_secs_f64() {
            return;
        }
        let part = |(now, last): (&Duration, &Duration)| now.saturating_sub(*last).as_secs_f64() / passed;
        let busy: Vec<f64> = now.1.iter().zip(&last.1).map(part).map(|busy| busy.min(1.0)).collect();
        for (known, busy) in self.loads.busy.iter().zip(&busy) {
            known.store((busy * 1000.0) as u64, Ordering::Relaxed);
        }
        if self.workers.len() > 1 {
            self.balance(&busy, now.0);
        }
    }

    fn busy_times(&self) -> Vec<Duration> {
        self.workers.iter().map(|worker| worker.busy()).collect()
    }

    /// Changes the workers of one pool, if that helps.
    fn balance(&self, busy: &[f64], now: Instant) {
        if busy.iter().all(|busy| *busy < QUIET) && !self.loads.is_spread.load(Ordering::Relaxed) {
            return locked(&self.loads.pools).clear();
        }
        let pools = self.all();
        let mut loads = self.measure(&pools, busy, now);
        let change = next_change(busy, &loads);
        let is_spread = |(at, pool): (usize, &PoolLoad)| match &change {
            Some(change) if change.pool == at => change.workers.len() > 1,
            _ => pool.workers.len() > 1,
        };
        self.loads.is_spread.store(loads.iter().enumerate().any(is_spread), Ordering::Relaxed);
        let Some(change) = change else { return };
        let pool = &pools[change.pool];
        if let Some(seen) = locked(&self.loads.pools).get_mut(&(pool.tenant.id, pool.access)) {
            seen.changed = Some(now);
        }
        let workers = change.workers.iter().filter_map(|at| self.workers.get(*at).cloned());
        let before = std::mem::take(&mut loads[change.pool].workers);
        pool.placement.place(workers.collect());
        self.loads.moves.fetch_add(1, Ordering::Relaxed);
        info!(
            tenant = pool.tenant.name,
            read_only = pool.access == Access::ReadOnly,
            ?before,
            now = ?change.workers,
            "pool changes its worker threads"
        );
    }

    /// The load of each pool since the last call: of what its workers did, its part of the time that they were busy.
    fn measure(&self, pools: &[Arc<Pool>], busy: &[f64], now: Instant) -> Vec<PoolLoad> {
        let mut known = locked(&self.loads.pools);
        let before = std::mem::take(&mut *known);
        let mut done = vec![0.0; busy.len()];
        let mut parts = Vec::new();
        for pool in pools {
            let (key, total, workers) =
                ((pool.tenant.id, pool.access), work_of(pool), pool.placement.workers());
            let seen = before.get(&key).copied().unwrap_or_else(|| Seen::first(total, now));
            known.insert(key, Seen { work: total, ..seen });
            let part = total.saturating_sub(seen.work) as f64 / workers.len() as f64;
            workers.iter().for_each(|worker| done[*worker] += part);
            parts.push((key, part, workers));
        }
        let loads = parts.into_iter().map(|(key, part, workers)| {
            let of_worker = |at: &usize| if done[*at] > 0.0 { busy[*at] * part / done[*at] } else { 0.0 };
            let load = workers.iter().map(of_worker).sum();
            let seen = known.entry(key).or_insert_with(|| Seen::first(0, now));
            if load >= FITS {
                seen.calm_since = now;
            }
            PoolLoad { load, is_settled: seen.is_settled(now), is_calm: seen.is_calm(now), workers }
        });
        loads.collect()
    }
}

impl Seen {
    fn first(work: u64, now: Instant) -> Self {
        Self { work, changed: None, calm_since: now }
    }

    fn is_settled(&self, now: Instant) -> bool {
        self.changed.is_none_or(|changed| now.saturating_duration_since(changed) >= SETTLED_AFTER)
    }

    fn is_calm(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.calm_since) >= CALM_AFTER
    }
}
