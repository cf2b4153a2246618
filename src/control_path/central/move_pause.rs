//! Pauses the pools of tenants that move to another host. While a tenant's row says `fenced`, its pools on
//! this node lend no server and its sessions wait, so clients see latency and no error.

use std::{collections::HashSet, sync::Arc};

use tracing::{info, warn};

use super::Central;
use crate::data_path::proxy::Proxy;

/// The tenants that this node has paused because of `fenced`. An administrator's PAUSE is not in here.
pub struct MovePauses {
    central: Central,
    proxy: Arc<Proxy>,
    paused: HashSet<i64>,
    behind: bool,
}

impl MovePauses {
    /// Nothing is paused yet.
    pub fn new(central: Central, proxy: Arc<Proxy>) -> Self {
        Self { central, proxy, paused: HashSet::new(), behind: false }
    }

    /// Whether the rows could not be read the last time. A tenant may still be paused then, so `apply` must
    /// be retried.
    pub fn must_retry(&self) -> bool {
        self.behind
    }

    /// Pauses and resumes tenants as the rows say. To be called after pools were refreshed, so that a
    /// resumed tenant finds its new host.
    pub async fn apply(&mut self) {
        match self.fenced().await {
            Ok(fenced) => {
                self.behind = false;
                for tenant in fenced.difference(&self.paused) {
                    info!(tenant, "tenant paused for move");
                    self.proxy.pools.pause_for_move(*tenant);
                }
                for tenant in self.paused.difference(&fenced) {
                    info!(tenant, "tenant resumed after move");
                    self.proxy.pools.resume_after_move(*tenant);
                }
                self.paused = fenced;
            }
            Err(error) => {
                self.behind = true;
                warn!(side = "central", %error, "cannot read which tenants are paused for a move; retrying");
            }
        }
    }

    async fn fenced(&self) -> Result<HashSet<i64>, super::CentralError> {
        let client = self.central.client().await?;
        let rows = client.query("SELECT id FROM pglobby.tenants WHERE fenced", &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
