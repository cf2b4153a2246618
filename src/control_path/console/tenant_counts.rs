//! The counters of SHOW STATS by tenant. Both accesses of a tenant count as one database.

use std::{collections::BTreeMap, sync::atomic::Ordering::Relaxed, time::Duration};

use crate::data_path::pool::{TenantPools, stats::PoolStats};

/// The number of counters that PgBouncer has too. They come first, in its order, and have averages.
pub const SHARED: usize = 12;

/// The number of counters.
pub const ALL: usize = 17;

/// PgBouncer's: server assignments, transactions, queries, bytes received and sent, time in transactions,
/// queries and waits (microseconds), statements parsed by clients and on servers, binds, logins. Then
/// errors, servers opened, servers that could not be opened, pinned leases, desyncs.
pub type Counts = [u64; ALL];

const ASSIGNMENTS: usize = 0;
const TRANSACTIONS: usize = 1;
const QUERIES: usize = 2;
const TRANSACTION_TIME: usize = 5;
const QUERY_TIME: usize = 6;
const WAIT_TIME: usize = 7;

/// The counters of one pool.
pub fn of(stats: &PoolStats) -> Counts {
    let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    [
        stats.assignments.load(Relaxed),
        stats.transactions.load(Relaxed),
        stats.queries.load(Relaxed),
        stats.bytes_received.load(Relaxed),
        stats.bytes_sent.load(Relaxed),
        us(stats.transaction_time.sum()),
        us(stats.query_time.sum()),
        us(stats.wait_time.sum()),
        stats.client_parses.load(Relaxed),
        stats.server_parses.load(Relaxed),
        stats.binds.load(Relaxed),
        stats.logins.load(Relaxed),
        stats.errors.load(Relaxed),
        stats.servers_opened.load(Relaxed),
        stats.connect_failures.load(Relaxed),
        stats.pinned.load(Relaxed),
        stats.desyncs.load(Relaxed),
    ]
}

/// Adds `more` to `sum`.
pub fn add(sum: &mut Counts, more: &Counts) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum = sum.wrapping_add(*more);
    }
}

/// Counters of all tenants since the process started.
pub fn by_tenant(pools: &TenantPools) -> BTreeMap<i64, (String, Counts)> {
    let mut tenants = BTreeMap::new();
    for done in pools.totals() {
        let (_, sum) = tenants.entry(done.tenant_id).or_insert_with(|| (done.tenant.clone(), [0; ALL]));
        add(sum, &of(&done.stats));
    }
    tenants
}

/// Averages over `elapsed`: times per transaction, query or assignment, other counters per second.
pub fn averages(before: &Counts, after: &Counts, elapsed: Duration) -> Counts {
    let brought = |at: usize| {
        let of = |counts: &Counts| counts.get(at).copied().unwrap_or_default();
        of(after).saturating_sub(of(before))
    };
    let seconds = elapsed.as_secs_f64();
    std::array::from_fn(|at| match at {
        TRANSACTION_TIME => brought(at).checked_div(brought(TRANSACTIONS)).unwrap_or(0),
        QUERY_TIME => brought(at).checked_div(brought(QUERIES)).unwrap_or(0),
        WAIT_TIME => brought(at).checked_div(brought(ASSIGNMENTS)).unwrap_or(0),
        _ if seconds > 0.0 => (brought(at) as f64 / seconds) as u64,
        _ => 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_averaged_over_what_took_them_and_the_rest_over_seconds() {
        let mut after = [0; ALL];
        after[TRANSACTIONS] = 50;
        after[QUERIES] = 100;
        after[TRANSACTION_TIME] = 5_000;
        after[QUERY_TIME] = 2_000;
        let averages = averages(&[0; ALL], &after, Duration::from_secs(10));
        assert_eq!(averages[TRANSACTIONS], 5);
        assert_eq!(averages[QUERIES], 10);
        assert_eq!(averages[TRANSACTION_TIME], 100);
        assert_eq!(averages[QUERY_TIME], 20);
        assert_eq!(averages[WAIT_TIME], 0, "no server was lent");
    }
}
