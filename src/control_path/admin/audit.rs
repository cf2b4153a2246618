//! Reads `audit_log`, newest first. [`Actor::audit`] writes it, in the transaction that makes the change.

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

use super::{
    actor::{Actor, AdminError},
    fields::{described, from_row},
};

described! {
    /// One row of `pglobby.audit_log`.
    #[derive(Debug, Clone, PartialEq, Serialize)]
    pub struct AuditEntry {
        /// `audit_log.id`.
        pub id: i64,
        /// When.
        #[serde(with = "time::serde::rfc3339")]
        pub at: OffsetDateTime,
        /// The actor: `os:peter`, `login:admin`, `api:deploy`, `pglobby`.
        pub actor: String,
        /// The action: `tenant.create`, `login.set_password`, ….
        pub action: String,
        /// The tenant.
        pub tenant: Option<String>,
        /// Details, without secrets.
        pub detail: Value,
    }
}

/// The newest `limit` entries with an id below `before`, of `tenant` only if given.
pub async fn list(
    actor: &Actor,
    tenant: Option<&str>,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<AuditEntry>, AdminError> {
    let client = actor.central.client().await?;
    let sql = "SELECT id, at, actor, action, tenant, detail FROM pglobby.audit_log
               WHERE ($1::text IS NULL OR tenant = $1) AND ($2::bigint IS NULL OR id < $2)
               ORDER BY id DESC LIMIT $3";
    let rows = client.query(sql, &[&tenant, &before, &limit]).await?;
    let entry =
        |row: &tokio_postgres::Row| from_row!(row => AuditEntry { id, at, actor, action, tenant, detail });
    Ok(rows.iter().map(entry).collect())
}
