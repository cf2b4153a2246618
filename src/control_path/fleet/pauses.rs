//! PAUSE and DISABLE for all nodes: rows in the central database, which each node follows. They hold until RESUME
//! and ENABLE, also in nodes that start later.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Mutex;
use tracing::{info, warn};

use super::FleetError;
use crate::{
    control_path::{central::Central, directory::snapshot::KnownPause, migrations},
    data_path::pool::{
        TenantPools,
        pause::{PauseSet, TenantScope},
    },
};

/// The notification that the rows have changed.
pub const PAUSES: &str = "pauses";

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

    /// Pauses tenants as a snapshot says, until the rows can be read.
    pub fn begin_with(&self, pauses: &[KnownPause]) {
        self.pools.set_fleet_pauses(pause_set(pauses.iter().map(|pause| (&*pause.kind, pause.tenant))));
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
        Ok(pause_set(rows.iter().map(|row| (row.get(0), row.get(1)))))
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

/// Of rows of `pglobby.pauses`: kind and tenant.
fn pause_set<'a>(rows: impl Iterator<Item = (&'a str, TenantScope)>) -> PauseSet {
    let mut found = PauseSet::default();
    for row in rows {
        match row {
            ("paused", None) => found.all_paused = true,
            ("paused", Some(tenant)) => drop(found.paused.insert(tenant)),
            (_, Some(tenant)) => drop(found.disabled.insert(tenant)),
            (_, None) => {}
        }
    }
    found
}

impl From<tokio_postgres::Error> for FleetError {
    fn from(error: tokio_postgres::Error) -> Self {
        if migrations::is_older(&error) { Self::OlderSchema } else { Self::Central(error.into()) }
    }
}
