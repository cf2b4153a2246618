//! Reads `pglobby.operations`, so that a caller can follow long work.

use serde::Serialize;
use time::OffsetDateTime;
use tokio_postgres::Row;

use super::{
    actor::{Actor, AdminError},
    fields::{described, from_row},
};

described! {
    /// One row of `pglobby.operations`.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct OperationSummary {
        /// `operations.id`.
        pub id: i64,
        /// `create`, `adopt`, `rotate`, `move`, `rename`, `drop`, `key_rotate`.
        pub kind: String,
        /// Name of the tenant.
        pub tenant: Option<String>,
        /// `running`, `done`, `failed` (run the command again) or `undone` (everything was removed).
        pub status: String,
        /// The last recorded step.
        pub step: String,
        /// Why it failed.
        pub error: Option<String>,
        /// The actor that began it.
        pub actor: String,
        /// When.
        #[serde(with = "time::serde::rfc3339")]
        pub started_at: OffsetDateTime,
        /// When its row last changed.
        #[serde(with = "time::serde::rfc3339")]
        pub updated_at: OffsetDateTime,
    }
}

impl OperationSummary {
    /// Whether it has ended, according to its row.
    pub fn is_over(&self) -> bool {
        self.status != "running"
    }
}

const SUMMARY: &str =
    "SELECT o.id, o.kind, coalesce(t.name, o.arguments ->> 'name') AS tenant, o.status, o.step,
    o.error, o.actor, o.started_at, o.updated_at
    FROM pglobby.operations o LEFT JOIN pglobby.tenants t ON t.id = o.tenant_id";

/// The newest `limit` operations with an id below `before`, of `tenant` or in `status` only if given.
pub async fn list(
    actor: &Actor,
    tenant: Option<&str>,
    status: Option<&str>,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<OperationSummary>, AdminError> {
    let client = actor.central.client().await?;
    let sql = format!(
        "{SUMMARY} WHERE ($1::text IS NULL OR coalesce(t.name, o.arguments ->> 'name') = $1)
           AND ($2::text IS NULL OR o.status = $2) AND ($3::bigint IS NULL OR o.id < $3)
         ORDER BY o.id DESC LIMIT $4"
    );
    Ok(client.query(&sql, &[&tenant, &status, &before, &limit]).await?.iter().map(summary).collect())
}

/// One of them.
pub async fn show(actor: &Actor, id: i64) -> Result<OperationSummary, AdminError> {
    let client = actor.central.client().await?;
    match client.query_opt(&format!("{SUMMARY} WHERE o.id = $1"), &[&id]).await? {
        Some(row) => Ok(summary(&row)),
        None => Err(AdminError::NotFound { what: "operation", name: id.to_string(), nearest: None }),
    }
}

/// Records an error in the row, unless there is one already.
pub async fn note_error(actor: &Actor, id: i64, error: &AdminError) -> Result<(), AdminError> {
    let client = actor.central.client().await?;
    let sql = "UPDATE pglobby.operations SET error = coalesce(error, $2), updated_at = now(),
                      status = CASE WHEN status = 'running' THEN 'failed' ELSE status END
               WHERE id = $1 AND status <> 'done'";
    client.execute(sql, &[&id, &error.to_string()]).await?;
    Ok(())
}

fn summary(row: &Row) -> OperationSummary {
    from_row!(row => OperationSummary {
        id, kind, tenant, status, step, error, actor, started_at, updated_at
    })
}
