//! Tenants that are held still, on this node: while a row of the central database says `fenced`, its pools lend no server
//! and its sessions wait. So a tenant moves from host to host and its clients see latency.
//!
//! A move ends an administrator's PAUSE of the same tenant on the node's console: both use one switch.

use std::{collections::HashSet, sync::Arc};

use tracing::{info, warn};

use super::Central;
use crate::data_path::proxy::Proxy;

/// What this node holds still because of rows, not of administrators.
pub struct MovePauses {
    central: Central,
    proxy: Arc<Proxy>,
    held: HashSet<i64>,
    behind: bool,
}

impl MovePauses {
    /// Holds nothing yet.
    pub fn new(central: Central, proxy: Arc<Proxy>) -> Self {
        Self { central, proxy, held: HashSet::new(), behind: false }
    }

    /// Whether the rows could not be read the last time, so that somebody may wait in vain.
    pub fn must_retry(&self) -> bool {
        self.behind
    }

    /// Does what the rows say now. To be called after pools were refreshed: who is let go must find the new host.
    pub async fn apply(&mut self) {
        match self.fenced().await {
            Ok(fenced) => {
                self.behind = false;
                for tenant in fenced.difference(&self.held) {
                    info!(tenant, "held still while it moves");
                    self.proxy.pools.pause(Some(*tenant));
                }
                for tenant in self.held.difference(&fenced) {
                    info!(tenant, "let go again");
                    self.proxy.pools.resume(Some(*tenant));
                }
                self.held = fenced;
            }
            Err(error) => {
                self.behind = true;
                warn!(side = "central", %error, "cannot see which tenants are to be held still; trying again");
            }
        }
    }

    async fn fenced(&self) -> Result<HashSet<i64>, super::CentralError> {
        let client = self.central.client().await?;
        let rows = client.query("SELECT id FROM pglobby.tenants WHERE fenced", &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
