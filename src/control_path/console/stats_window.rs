//! Averages over the last minute, for SHOW STATS.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::tenant_counts::{self, ALL, Counts};
use crate::data_path::pool::TenantPools;

/// PgBouncer's `stats_period`.
const LENGTH: Duration = Duration::from_secs(60);

/// The last and the present window. Has an entry for each tenant that was ever served, like the counters.
#[derive(Debug)]
pub struct StatsWindow(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    began: Instant,
    /// At the start of the present window.
    counts: BTreeMap<i64, (String, Counts)>,
    /// Of the last window.
    averages: HashMap<i64, Counts>,
    average_of_all: Counts,
}

impl Default for StatsWindow {
    fn default() -> Self {
        Self(Mutex::new(Inner {
            began: Instant::now(),
            counts: BTreeMap::new(),
            averages: HashMap::new(),
            average_of_all: [0; ALL],
        }))
    }
}

impl StatsWindow {
    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called at short intervals. Computes the averages at the end of a window.
    pub fn keep(&self, pools: &TenantPools) {
        if self.locked().began.elapsed() >= LENGTH {
            self.turn(tenant_counts::by_tenant(pools), Instant::now());
        }
    }

    fn turn(&self, counts: BTreeMap<i64, (String, Counts)>, now: Instant) {
        let mut inner = self.locked();
        let elapsed = now.duration_since(inner.began);
        let nothing = (String::new(), [0; ALL]);
        let averages = counts.iter().map(|(tenant, (_, after))| {
            let (_, before) = inner.counts.get(tenant).unwrap_or(&nothing);
            (*tenant, tenant_counts::averages(before, after, elapsed))
        });
        let averages = averages.collect();
        let average_of_all = tenant_counts::averages(&sum(&inner.counts), &sum(&counts), elapsed);
        *inner = Inner { began: now, counts, averages, average_of_all };
    }

    /// A tenant's averages over the last window; zero before the first ends.
    pub fn averages_of(&self, tenant: i64) -> Counts {
        self.locked().averages.get(&tenant).copied().unwrap_or([0; ALL])
    }

    /// Averages over all tenants.
    pub fn average_of_all(&self) -> Counts {
        self.locked().average_of_all
    }
}

fn sum(counts: &BTreeMap<i64, (String, Counts)>) -> Counts {
    let mut sum = [0; ALL];
    for (_, counts) in counts.values() {
        tenant_counts::add(&mut sum, counts);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_averaged_when_the_next_begins() {
        let window = StatsWindow::default();
        let began = window.locked().began;
        let counts = |queries| {
            let mut counts = [0; ALL];
            counts[2] = queries;
            BTreeMap::from([(7, ("acme".to_owned(), counts))])
        };
        assert_eq!(window.averages_of(7), [0; ALL]);
        window.turn(counts(600), began + LENGTH);
        assert_eq!(window.averages_of(7)[2], 10);
        window.turn(counts(720), began + 2 * LENGTH);
        assert_eq!(window.averages_of(7)[2], 2);
        assert_eq!(window.averages_of(8), [0; ALL]);
        assert_eq!(window.average_of_all()[2], 2);
    }
}
