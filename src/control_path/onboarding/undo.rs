//! Undoes a create or adopt: removes all that it made, and nothing else.

use tokio_postgres::error::SqlState;

use super::{
    enter_host,
    names::{ident, shell_word},
    operation::{Operation, TenantLock},
    ownership, roles,
    subscriptions::end_subscription,
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
    host_locks::Prepared,
};

/// Undoes an interrupted run on the locked tenant. An interrupted drop is continued by the next drop
/// instead.
///
/// # Errors
/// The host or the central database; the next run tries again.
pub async fn undo_remains(actor: &Actor, lock: &mut TenantLock) -> Result<(), AdminError> {
    match Operation::left_running(lock).await? {
        Some(operation) if operation.kind == "drop" => Err(AdminError::Refused(format!(
            "tenant {name:?} is being dropped; finish that first with `pglobby tenant drop {word}`",
            name = lock.name,
            word = shell_word(&lock.name)
        ))),
        Some(operation) => {
            tracing::info!(
                tenant = lock.name,
                operation = operation.id,
                step = operation.step,
                "undoing an interrupted run"
            );
            undo(actor, lock, &operation).await
        }
        None => Ok(()),
    }
}

/// Undoes after `error`; reports both errors if undoing fails.
pub(super) async fn undo_after(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
    error: AdminError,
) -> AdminError {
    if matches!(error, AdminError::Busy { .. }) {
        return error; // no longer ours to undo
    }
    let Err(second) = undo(actor, lock, operation).await else { return error };
    if let Err(third) = operation.note_failure(lock, &error).await {
        tracing::warn!(cause = %third, "cannot record the failure of the operation");
    }
    AdminError::Refused(format!(
        "{error}. Undoing that failed as well ({second}); fix that and run the same command again, or `pglobby tenant \
         drop {}`",
        shell_word(&lock.name)
    ))
}

/// Removes everything with the operation's mark from its host, and closes the operation.
pub(super) async fn undo(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
) -> Result<(), AdminError> {
    let admin = HostAdmin::load(actor, &lock.client, operation.argument("host")).await?;
    let (session, _) = enter_host(&admin, operation.tenant_id).await?;
    let mark = operation.argument("mark");

    // An adopted database is never the operation's, whatever its owner is.
    if operation.kind == "adopt" {
        ownership::give_back(&admin, &session, operation).await?;
    } else {
        for database in roles::marked_databases(&session, mark).await? {
            drop_database(&admin, &session, &database).await?;
        }
    }
    for privilege in ["CONNECT", "TEMPORARY"] {
        if operation.arguments["taken_from_public"]
            .as_array()
            .is_some_and(|taken| taken.contains(&privilege.into()))
        {
            let database = ident(operation.argument("database"));
            let sql = format!("GRANT {privilege} ON DATABASE {database} TO PUBLIC");
            session.run("restoring PUBLIC's privileges", &sql).await?;
        }
    }
    for role in roles::marked(&session, mark).await? {
        roles::release(&admin, &session, &role).await?;
    }

    forget(actor, lock, operation).await
}

/// Closes an operation with nothing left on its host, and deletes the tenant's row.
pub(super) async fn forget(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
) -> Result<(), AdminError> {
    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    operation.close(&transaction, "undone", &name).await?;
    let sql = "DELETE FROM pglobby.tenants WHERE id = $1 AND status = 'provisioning'";
    transaction.execute(sql, &[&operation.tenant_id]).await?;
    let detail = serde_json::json!({ "operation": operation.id, "step": operation.step });
    actor.commit(transaction, &format!("tenant.{}.undone", operation.kind), Some(&name), &detail).await?;
    actor.report(&name, "undone").await;
    Ok(())
}

/// Drops an existing database with its sessions, prepared transactions and subscriptions.
///
/// # Errors
/// The host; or a session of a superuser that the administrator may not end, after 5 s.
pub(super) async fn drop_database(
    admin: &HostAdmin,
    session: &HostSession,
    database: &str,
) -> Result<(), AdminError> {
    let name = ident(database);
    let doing = format!("dropping database {database:?}");
    free_database(admin, session, database).await?;
    // A template cannot be dropped, and the owner may have set IS_TEMPLATE.
    session.run(&doing, &format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false IS_TEMPLATE false")).await?;
    match session.run(&doing, &format!("DROP DATABASE {name} WITH (FORCE)")).await {
        // The administrator may not end a superuser's session (such as autovacuum). DROP DATABASE without FORCE
        // waits for it.
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            session.run(&doing, &format!("DROP DATABASE {name}")).await
        }
        dropped => dropped,
    }
}

/// Ends what blocks dropping a database and can only be ended from inside.
async fn free_database(admin: &HostAdmin, session: &HostSession, database: &str) -> Result<(), AdminError> {
    let prepared = Prepared::of(session, "", database).await?;
    let subscribed = "SELECT s.oid FROM pg_catalog.pg_subscription s
                      JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE d.datname = $1";
    let rows = session.query("looking for subscriptions", subscribed, &[&database]).await?;
    if prepared.is_empty() && rows.is_empty() {
        return Ok(());
    }
    // An earlier attempt may have forbidden connections.
    let open = format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", ident(database));
    session.run("entering a database that is to be dropped", &open).await?;
    for transaction in prepared {
        transaction.roll_back(admin).await?;
    }
    for row in rows {
        end_subscription(admin, database, row.get(0)).await?;
    }
    Ok(())
}
