//! Logs waits for a server that reached `query_wait_timeout`, once per tenant in [`EVERY`], with how many
//! there were.

use std::{
    collections::HashMap,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::data_path::{pool::TenantPools, tenant::Access};

/// A busy pool times out many waits a second; one line in this time tells as much.
const EVERY: Duration = Duration::from_secs(10);

/// What is logged already.
pub struct TimedOutWaits {
    looked_at: Instant,
    /// By tenant and access.
    logged: HashMap<(i64, bool), u64>,
}

impl TimedOutWaits {
    /// Nothing is logged yet.
    pub fn new() -> Self {
        Self { looked_at: Instant::now(), logged: HashMap::new() }
    }

    /// To be called at short intervals.
    pub fn log(&mut self, pools: &TenantPools) {
        if self.looked_at.elapsed() < EVERY {
            return;
        }
        self.looked_at = Instant::now();
        for done in pools.totals() {
            let total = done.stats.waits_timed_out.load(Relaxed);
            if total == 0 {
                continue;
            }
            let read_only = done.access == Access::ReadOnly;
            let logged = self.logged.entry((done.tenant_id, read_only)).or_default();
            let count = total - std::mem::replace(logged, total);
            if count > 0 {
                warn!(
                    tenant = done.tenant,
                    read_only, count, "waits for a server reached query_wait_timeout; the pool is too small"
                );
            }
        }
    }
}
