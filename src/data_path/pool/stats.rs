//! Counters of pools, for SHOW STATS and `/metrics`. Written by one worker, read by any thread.

use std::{
    sync::Arc,
    sync::atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
    time::Duration,
};

use crate::data_path::{log_limit::LogLimit, prepared::StatementCounts};

/// Counters of one (tenant, access). They outlive its pools.
#[derive(Debug, Default)]
pub struct PoolStats {
    pub sessions: AtomicUsize,
    /// Sessions of the tenant now, of either access.
    pub sessions_of_tenant: Arc<AtomicUsize>,
    /// Logins that led to a session.
    pub logins: AtomicU64,
    /// Times a server was lent to a session.
    pub assignments: AtomicU64,
    /// Named statements that clients prepared.
    pub client_parses: AtomicU64,
    /// Named statements that were prepared on servers.
    pub server_parses: AtomicU64,
    /// Named statements that clients bound.
    pub binds: AtomicU64,
    pub transactions: AtomicU64,
    /// Queries (simple, or batches up to Sync) finished.
    pub queries: AtomicU64,
    /// Bytes from clients.
    pub bytes_received: AtomicU64,
    /// Bytes to clients.
    pub bytes_sent: AtomicU64,
    /// ErrorResponses of servers that clients got.
    pub errors: AtomicU64,
    pub servers_opened: AtomicU64,
    /// Servers that could not be opened.
    pub connect_failures: AtomicU64,
    /// Servers closed because their replies did not match the requests: a defect.
    pub desyncs: AtomicU64,
    /// Leases that outlasted their transaction.
    pub pinned: AtomicU64,
    /// Time transactions held a server.
    pub transaction_time: Histogram,
    /// Time from a request to its ReadyForQuery; requests sent in one go count as one.
    pub query_time: Histogram,
    /// Time that sessions waited for a server. A session that found one idle is not counted.
    pub wait_time: Histogram,
    /// Waits that ended without a server, at `query_wait_timeout`.
    pub waits_timed_out: AtomicU64,
    /// Limits the lines about these.
    pub timed_out_waits_log: LogLimit,
    /// Limits the lines about servers that sessions lost.
    pub lost_servers_log: LogLimit,
}

/// A session of a pool, counted as long as this lives.
#[derive(Debug)]
pub struct SessionCount(Arc<PoolStats>);

impl Drop for SessionCount {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, AcqRel);
        self.0.sessions_of_tenant.fetch_sub(1, AcqRel);
    }
}

impl PoolStats {
    /// Counts a session as long as the result lives, also when its pool is replaced meanwhile; `None`: the
    /// tenant has `limit` sessions (0: no limit).
    pub fn enter(self: &Arc<Self>, limit: usize) -> Option<SessionCount> {
        let of_tenant = &self.sessions_of_tenant;
        let counted = of_tenant.fetch_update(AcqRel, Acquire, |sessions| {
            (limit == 0 || sessions < limit).then_some(sessions + 1)
        });
        counted.ok()?;
        self.sessions.fetch_add(1, AcqRel);
        Some(SessionCount(self.clone()))
    }

    /// Adds the named statements of a transaction; most have none.
    #[inline]
    pub fn count_statements(&self, tally: StatementCounts) {
        if tally != StatementCounts::default() {
            self.client_parses.fetch_add(tally.client_parses.into(), Relaxed);
            self.server_parses.fetch_add(tally.server_parses.into(), Relaxed);
            self.binds.fetch_add(tally.binds.into(), Relaxed);
        }
    }
}

/// Upper bounds in microseconds, each about three times the one before.
#[rustfmt::skip]
pub const BUCKET_BOUNDS_US: [u64; 14] = [
    100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000,
    30_000_000, 100_000_000, u64::MAX,
];

/// A histogram with fixed buckets: two relaxed additions to count, no lock.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKET_BOUNDS_US.len()],
    sum_us: AtomicU64,
}

impl Histogram {
    #[inline]
    pub fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKET_BOUNDS_US.partition_point(|bound| *bound < us);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Relaxed);
        }
        self.sum_us.fetch_add(us, Relaxed);
    }

    pub fn counts(&self) -> [u64; BUCKET_BOUNDS_US.len()] {
        std::array::from_fn(|at| self.buckets.get(at).map_or(0, |bucket| bucket.load(Relaxed)))
    }

    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us.load(Relaxed))
    }
}
