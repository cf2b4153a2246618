//! The road back: everything a create or adopt has made, and nothing else, is removed.

use tokio_postgres::error::SqlState;

use super::{
    enter_host,
    names::{ident, shell_word},
    operation::{Operation, TenantLock},
    roles,
    subscriptions::end_subscription,
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
    host_locks::Prepared,
};

/// Undoes what a dead run left of the locked tenant. A drop that died is the next drop's business.
///
/// # Errors
/// The host or the central database; then it is still there for the next try.
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
                "undoing what a dead run left"
            );
            undo(actor, lock, &operation).await
        }
        None => Ok(()),
    }
}

/// After `error`: undoes, and tells of both if that fails too.
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
        tracing::warn!(cause = %third, "the failure could not be recorded");
    }
    AdminError::Refused(format!(
        "{error}. Undoing that failed as well ({second}); mend it and run the same command again, or `pglobby tenant \
         drop {}`",
        shell_word(&lock.name)
    ))
}

/// Removes what carries the operation's mark on its host, and closes it.
///
/// # Errors
/// The host or the central database.
pub(super) async fn undo(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
) -> Result<(), AdminError> {
    let admin = HostAdmin::load(actor, &lock.client, operation.argument("host")).await?;
    let (session, _) = enter_host(&admin, operation.tenant_id).await?;
    let mark = operation.argument("mark");

    for database in roles::marked_databases(&session, mark).await? {
        drop_database(&admin, &session, &database).await?;
    }
    for privilege in ["CONNECT", "TEMPORARY"] {
        if operation.arguments["taken_from_public"]
            .as_array()
            .is_some_and(|taken| taken.contains(&privilege.into()))
        {
            let database = ident(operation.argument("database"));
            let sql = format!("GRANT {privilege} ON DATABASE {database} TO PUBLIC");
            session.run("giving PUBLIC back what was taken", &sql).await?;
        }
    }
    for role in roles::marked(&session, mark).await? {
        roles::release(&admin, &session, &role).await?;
    }

    forget(actor, lock, operation).await
}

/// Closes an operation that has left nothing (any more) on its host, and takes the tenant's row away.
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
    actor.audit(&transaction, &format!("tenant.{}.undone", operation.kind), Some(&name), &detail).await?;
    transaction.commit().await?;
    actor.report(&name, "undone").await;
    Ok(())
}

/// Drops a database that is there, with whoever is in it, transactions that were prepared in it, and subscriptions of it.
///
/// # Errors
/// The host; or a superuser's session that a lesser administrator cannot end, after 5 s of waiting for it to leave.
pub(super) async fn drop_database(
    admin: &HostAdmin,
    session: &HostSession,
    database: &str,
) -> Result<(), AdminError> {
    let name = ident(database);
    let doing = format!("dropping database {database:?}");
    free_database(admin, session, database).await?;
    // A template cannot be dropped, and its owner may call it one.
    session.run(&doing, &format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false IS_TEMPLATE false")).await?;
    match session.run(&doing, &format!("DROP DATABASE {name} WITH (FORCE)")).await {
        // Who cannot end a superuser's session (autovacuum's is one) can still wait for it; the server does.
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            session.run(&doing, &format!("DROP DATABASE {name}")).await
        }
        dropped => dropped,
    }
}

/// Ends what would keep a database from being dropped, and can be ended from inside only.
async fn free_database(admin: &HostAdmin, session: &HostSession, database: &str) -> Result<(), AdminError> {
    let prepared = Prepared::of(session, "", database).await?;
    let subscribed = "SELECT s.oid FROM pg_catalog.pg_subscription s
                      JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE d.datname = $1";
    let rows = session.query("looking for subscriptions", subscribed, &[&database]).await?;
    if prepared.is_empty() && rows.is_empty() {
        return Ok(());
    }
    // An earlier try may have closed it.
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
