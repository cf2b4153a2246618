//! `tenant rename`: changes the name that clients ask for, and nothing else.
//!
//! Pools, logins and sessions refer to the tenant by id, so they stay. One row changes in one transaction.

use serde_json::json;
use tokio_postgres::error::SqlState;

use super::{
    names::{check_tenant_name, shell_word},
    operation::{Operation, TenantLock},
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    tenants::{self, TenantSummary, missing},
};

/// Renames a tenant. Its database and its roles keep their names.
///
/// # Errors
/// No such tenant, a name that cannot be or is taken, or work on the tenant that died and is to be finished
/// first.
pub async fn rename(actor: &Actor, name: &str, to: &str) -> Result<TenantSummary, AdminError> {
    check_tenant_name(to, actor.central.database())?;
    if name == to {
        return tenants::show(actor, name).await;
    }
    // Both names are locked in a fixed order, so that two opposite renames do not deadlock.
    let (first, second) = if name < to { (name, to) } else { (to, name) };
    let mut lock = TenantLock::take(actor, first).await?;
    let _other = TenantLock::take(actor, second).await?;
    name.clone_into(&mut lock.name);
    Operation::refuse_unfinished(&lock).await?;

    let transaction = lock.client.transaction().await?;
    let sql = "UPDATE pglobby.tenants SET name = $2 WHERE name = $1 AND status IN ('active', 'suspended') RETURNING id";
    let renamed = match transaction.query_opt(sql, &[&name, &to]).await {
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
            return Err(AdminError::Exists(format!(
                "there is a tenant {to:?} already; see `pglobby tenant show {}`",
                shell_word(to)
            )));
        }
        renamed => renamed?,
    };
    let Some(row) = renamed else {
        return Err(missing(actor, &transaction, name).await);
    };
    let arguments = json!({ "name": name, "to": to });
    let operation = Operation::begin(&transaction, actor, "rename", row.get(0), arguments).await?;
    operation.close(&transaction, "done", name).await?;
    let detail = json!({ "from": name, "operation": operation.id });
    actor.commit(transaction, "tenant.rename", Some(to), &detail).await?;
    actor.report(to, "renamed").await;
    tenants::show(actor, to).await
}
