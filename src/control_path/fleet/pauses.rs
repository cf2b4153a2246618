//! PAUSE and DISABLE for all nodes: rows in the central database, which each node follows. They hold until RESUME
//! and ENABLE, also in nodes that start later.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::Mutex;
use tracing::{info, warn};

use super::FleetError;
use crate::{
    control_path::{central::Central, migrations},
    data_path::pool::{
        TenantPools,
        pause::{PauseSet, TenantScope},
    },
};

/// What a row does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseKind {
    /// No server is lent.
    Paused,
    /// No new session is accepted.
    Disabled,
}

impl PauseKind {
    fn word(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Disabled => "disabled",
        }
    }
}

/// The rows, and the pools of this node that follow them.
pub struct FleetPauses {
    central: Central,
    pools: Arc<TenantPools>,
    /// What was applied last. Held while the rows are read, so that an older answer does not replace a newer one.
    applied: Mutex<PauseSet>,
    behind: AtomicBool,
}

impl FleetPauses {
    /// Nothing is read yet.
    pub fn new(central: Central, pools: Arc<TenantPools>) -> Self {
        Self { central, pools, applied: Mutex::default(), behind: AtomicBool::new(false) }
    }

    /// Whether the rows could not be read the last time, so that [`Self::follow`] must be repeated.
    pub fn must_retry(&self) -> bool {
        self.behind.load(Ordering::Relaxed)
    }

    /// [`Self::apply`]; an error is logged.
    pub async fn follow(&self) {
        let applied = self.apply().await;
        self.behind.store(applied.is_err(), Ordering::Relaxed);
        if let Err(error) = applied {
            warn!(side = "central", %error, "cannot read which tenants are paused on all nodes; retrying");
        }
    }

    /// Pauses and resumes tenants of this node as the rows say. An older schema has no rows.
    pub async fn apply(&self) -> Result<(), FleetError> {
        let mut applied = self.applied.lock().await;
        let read = match self.read().await {
            Err(FleetError::OlderSchema) => PauseSet::default(),
            read => read?,
        };
        if read != *applied {
            let (paused, disabled) = (read.paused.len(), read.disabled.len());
            info!(all = read.all_paused, paused, disabled, "tenants paused or disabled on all nodes");
        }
        // Also if nothing has changed: RESUME may have ended a pause here while the rows could not be read.
        self.pools.set_fleet_pauses(read.clone());
        *applied = read;
        Ok(())
    }

    async fn read(&self) -> Result<PauseSet, FleetError> {
        let client = self.central.client().await?;
        let rows = client.query("SELECT kind, tenant_id FROM pglobby.pauses", &[]).await?;
        let mut found = PauseSet { all_paused: false, paused: HashSet::new(), disabled: HashSet::new() };
        for row in &rows {
            match (row.get::<_, &str>(0), row.get::<_, Option<i64>>(1)) {
                ("paused", None) => found.all_paused = true,
                ("paused", Some(tenant)) => drop(found.paused.insert(tenant)),
                (_, Some(tenant)) => drop(found.disabled.insert(tenant)),
                (_, None) => {}
            }
        }
        Ok(found)
    }

    /// Adds a row for all nodes.
    pub async fn add(&self, kind: PauseKind, scope: TenantScope, actor: &str) -> Result<(), FleetError> {
        let sql = "INSERT INTO pglobby.pauses (kind, tenant_id, made_by) VALUES ($1, $2, $3)
                   ON CONFLICT DO NOTHING";
        let client = self.central.client().await?;
        client.execute(sql, &[&kind.word(), &scope, &actor]).await?;
        Ok(())
    }

    /// Removes the row; with `None`, those of all tenants.
    pub async fn remove(&self, kind: PauseKind, scope: TenantScope) -> Result<(), FleetError> {
        let sql = "DELETE FROM pglobby.pauses WHERE kind = $1 AND ($2::bigint IS NULL OR tenant_id = $2)";
        let client = self.central.client().await?;
        client.execute(sql, &[&kind.word(), &scope]).await?;
        Ok(())
    }
}

impl From<tokio_postgres::Error> for FleetError {
    fn from(error: tokio_postgres::Error) -> Self {
        if migrations::is_older(&error) { Self::OlderSchema } else { Self::Central(error.into()) }
    }
}
