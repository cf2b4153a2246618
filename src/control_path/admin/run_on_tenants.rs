//! `pglobby run`: one SQL text for many tenants, each with its own role; for example a schema migration.
//!
//! Connects to the hosts directly, without the pools. A tenant that fails does not stop the others. For
//! each tenant the text is one transaction, unless the text itself says otherwise.

use std::{pin::pin, time::Instant};

use futures_util::{StreamExt as _, stream};
use secrecy::SecretString;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio_postgres::{Client, Row};

use super::{
    actor::{Actor, AdminError},
    fields::from_row,
    host_connection::{HostAdmin, StatementResult},
    tenants::missing,
};
use crate::control_path::{
    onboarding::{adopt::complete_grants, role_attributes::allow},
    secrets::seal::SecretLocation,
};

/// Maximum of rows kept of each tenant: all answers are in memory at the end.
pub const ROWS_MAX: usize = 1_000;

/// The tenants to run it on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TenantSelection {
    /// Every tenant that is active or suspended.
    All,
    /// These.
    Named(Vec<String>),
}

/// The outcome for one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TenantOutcome {
    /// Its name.
    pub tenant: String,
    /// Whether every statement succeeded.
    pub ok: bool,
    /// One for each statement; after an error, those before it, which were rolled back.
    pub results: Vec<StatementResult>,
    /// The error.
    pub error: Option<String>,
    /// Its SQLSTATE, if a server sent one.
    pub sqlstate: Option<String>,
    /// Time from connecting to the last answer.
    pub elapsed_ms: u64,
}

struct RunTarget {
    id: i64,
    name: String,
    host: String,
    database: String,
    role: String,
    sealed: Vec<u8>,
    grants_pending: bool,
    suspended: bool,
    role_given: bool,
}

/// Runs `sql` on the selected tenants, `concurrency` at a time. Calls `on_begin` with their number and
/// `on_done` with each outcome. Returns the outcomes by name.
///
/// # Errors
/// The central database, or a tenant that is not there or not open: then nothing was run. What goes wrong for
/// a tenant is in its outcome.
pub async fn run_on_tenants(
    actor: &Actor,
    sql: &str,
    selection: &TenantSelection,
    concurrency: usize,
    on_begin: impl FnOnce(usize),
    mut on_done: impl FnMut(&TenantOutcome),
) -> Result<Vec<TenantOutcome>, AdminError> {
    let client = actor.central.client().await?;
    let targets = targets(actor, &client, selection).await?;
    let count = targets.len();
    on_begin(count);
    let running = stream::iter(targets).map(|target| run_one(actor, target, sql));
    let mut running = pin!(running.buffer_unordered(concurrency.max(1)));
    let mut outcomes = Vec::with_capacity(count);
    while let Some(outcome) = running.next().await {
        on_done(&outcome);
        outcomes.push(outcome);
    }
    outcomes.sort_by(|one, other| one.tenant.cmp(&other.tenant));
    let failed: Vec<&str> =
        outcomes.iter().filter(|outcome| !outcome.ok).map(|outcome| outcome.tenant.as_str()).collect();
    // The SQL may contain secrets. Its hash identifies it.
    let hash: String = Sha256::digest(sql.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let detail = json!({ "sql_sha256": hash, "tenants": count, "failed": failed });
    actor.audit(&**client, "run", None, &detail).await?;
    Ok(outcomes)
}

async fn targets(
    actor: &Actor,
    client: &Client,
    selection: &TenantSelection,
) -> Result<Vec<RunTarget>, AdminError> {
    let open = "SELECT id, name, host, database, username AS role, sealed_password AS sealed, grants_pending,
                       status = 'suspended' AS suspended, role_given FROM pglobby.tenants
                WHERE status IN ('active', 'suspended') AND sealed_password IS NOT NULL
                  AND ($1::text[] IS NULL OR name = ANY ($1)) ORDER BY name";
    let names = match selection {
        TenantSelection::All => None,
        TenantSelection::Named(names) => Some(names),
    };
    let targets: Vec<RunTarget> = client.query(open, &[&names]).await?.iter().map(target).collect();
    for name in names.into_iter().flatten() {
        if targets.iter().any(|target| target.name == *name) {
            continue;
        }
        let sql = "SELECT status FROM pglobby.tenants WHERE name = $1 AND status <> 'dropped'";
        return Err(match client.query_opt(sql, &[name]).await? {
            Some(row) => AdminError::Refused(format!(
                "tenant {name:?} is {}; nothing was run",
                row.get::<_, String>(0)
            )),
            None => missing(actor, client, name).await,
        });
    }
    Ok(targets)
}

fn target(row: &Row) -> RunTarget {
    from_row!(row => RunTarget { id, name, host, database, role, sealed, grants_pending, suspended, role_given })
}

async fn run_one(actor: &Actor, target: RunTarget, sql: &str) -> TenantOutcome {
    let begun = Instant::now();
    let mut results = Vec::new();
    let error = ask(actor, &target, sql, &mut results).await.err();
    TenantOutcome {
        tenant: target.name,
        ok: error.is_none(),
        results,
        sqlstate: error.as_ref().and_then(|error| error.code()).map(|code| code.code().to_owned()),
        error: error.map(|error| error.to_string().replace('\n', " ")),
        elapsed_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

async fn ask(
    actor: &Actor,
    target: &RunTarget,
    sql: &str,
    results: &mut Vec<StatementResult>,
) -> Result<(), AdminError> {
    if target.grants_pending {
        complete_grants(actor, target.id).await?;
    }
    let client = actor.central.client().await?;
    let admin = HostAdmin::load(actor, &**client, &target.host).await?;
    drop(client);
    let row = target.id.to_string();
    let place = SecretLocation { table: "tenants", row: &row, column: "sealed_password" };
    let password: SecretString = actor.keyring.open(&place, &target.sealed)?;
    // A suspended tenant's role may not log in; this session allows it for the duration of the login. A
    // given role keeps its attributes.
    let login_switch =
        if target.suspended && !target.role_given { Some(admin.connect().await?) } else { None };
    if let Some(login_switch) = &login_switch {
        allow(login_switch, &target.role, true).await?;
    }
    let entered = admin.prove_login(&target.role, &password, &target.database).await;
    if let Some(login_switch) = &login_switch {
        allow(login_switch, &target.role, false).await?;
    }
    let session = entered?;
    session.answers(format!("for tenant {:?}", target.name), sql, ROWS_MAX, results).await
}
