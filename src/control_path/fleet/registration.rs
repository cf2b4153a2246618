//! This process's row in `pglobby.nodes`. It is there from the start of the process to its clean end, and its
//! `beat` counts up while the process runs. By the beat, other nodes know whether the process lives.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio_postgres::{
    GenericClient,
    error::SqlState,
    types::{ToSql, Type},
};
use tracing::{info, warn};

use super::identity::{Identity, has_ended};
use crate::control_path::{
    central::{Central, causes},
    migrations,
    secrets::keyring_reload::ReloadableKeyring,
};

const INSERT: &str = "INSERT INTO pglobby.nodes (name, address, process, version, schema_version, key_ids)
    VALUES ($1, $2, $3, $4, $5, $6) RETURNING id";
/// A lost row is found by the missing answer.
const BEAT: &str = "UPDATE pglobby.nodes SET beat = beat + 1, seen_at = now(), key_ids = $2 WHERE id = $1";
const REMOVE: &str = "DELETE FROM pglobby.nodes WHERE id = ANY ($1)";

/// At the end of a process, while the central database may be unreachable.
const REMOVE_WITHIN: Duration = Duration::from_secs(1);

/// Whether the row was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It was.
    Row,
    /// The central schema has no such table.
    OlderSchema,
}

/// The row of this process.
pub struct Registration {
    /// What the row says.
    pub identity: Identity,
    keyring: Arc<ReloadableKeyring>,
    /// 0: none.
    id: AtomicI64,
}

impl Registration {
    /// Not in the table yet.
    pub fn new(identity: Identity, keyring: Arc<ReloadableKeyring>) -> Self {
        Self { identity, keyring, id: AtomicI64::new(0) }
    }

    /// The row's number; `None`: this process has no row now.
    pub fn id(&self) -> Option<i64> {
        Some(self.id.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// Adds the row. Removes rows of processes of this machine that have ended, so that what they had is free at
    /// once.
    pub async fn insert(&self, client: &impl GenericClient) -> Result<Inserted, tokio_postgres::Error> {
        match self.remove_ended(client).await {
            Err(error) if is_older_schema(&error) => return Ok(Inserted::OlderSchema),
            removed => removed?,
        }
        let Identity { name, address, process } = &self.identity;
        let (version, key_ids) = (env!("CARGO_PKG_VERSION"), self.key_ids());
        let parameters: [(&(dyn ToSql + Sync), Type); 6] = [
            (name, Type::TEXT),
            (address, Type::TEXT),
            (process, Type::TEXT),
            (&version, Type::TEXT),
            (&migrations::latest(), Type::INT4),
            (&key_ids, Type::TEXT_ARRAY),
        ];
        let rows = client.query_typed(INSERT, &parameters).await?;
        let id: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0))?;
        self.id.store(id, Ordering::Release);
        info!(node = name, id, "node registered");
        Ok(Inserted::Row)
    }

    /// `false`: the row is gone.
    pub async fn beat(&self, client: &impl GenericClient) -> Result<bool, tokio_postgres::Error> {
        let id = self.id.load(Ordering::Acquire);
        let key_ids = self.key_ids();
        let parameters = [(&id as &(dyn ToSql + Sync), Type::INT8), (&key_ids, Type::TEXT_ARRAY)];
        let is_there = client.execute_typed(BEAT, &parameters).await? > 0;
        if !is_there {
            self.id.store(0, Ordering::Release);
        }
        Ok(is_there)
    }

    /// Removes the row at a clean end. Others may have what this node had.
    pub async fn remove(&self, central: &Central) {
        let id = self.id.swap(0, Ordering::AcqRel);
        if id == 0 {
            return;
        }
        let removed = async {
            let client = central.client().await.map_err(|error| error.to_string())?;
            client.execute(REMOVE, &[&vec![id]]).await.map_err(|error| causes(&error))
        };
        let removed = tokio::time::timeout(REMOVE_WITHIN, removed).await;
        let removed = removed.unwrap_or_else(|_| Err(format!("no answer within {REMOVE_WITHIN:?}")));
        if let Err(cause) = removed {
            warn!(side = "central", cause, "cannot remove the row of this node; others will find it gone");
        }
    }

    async fn remove_ended(&self, client: &impl GenericClient) -> Result<(), tokio_postgres::Error> {
        let rows = client.query_typed("SELECT id, process FROM pglobby.nodes", &[]).await?;
        let mut ended: Vec<i64> = Vec::new();
        for row in &rows {
            if has_ended(row.try_get(1)?) {
                ended.push(row.try_get(0)?);
            }
        }
        if !ended.is_empty() {
            client.execute_typed(REMOVE, &[(&ended, Type::INT8_ARRAY)]).await?;
            info!(nodes = ended.len(), "removed nodes of this machine whose process has ended");
        }
        Ok(())
    }

    /// Names of the keys, the one that seals first.
    fn key_ids(&self) -> Vec<String> {
        let ring = self.keyring.fresh();
        let sealing = ring.writing_key();
        let others = ring.key_ids().filter(|id| *id != sealing);
        std::iter::once(sealing).chain(others).map(str::to_owned).collect()
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { identity, id, .. } = self;
        f.debug_struct("Registration").field("identity", identity).field("id", id).finish_non_exhaustive()
    }
}

fn is_older_schema(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::UNDEFINED_TABLE)
}
