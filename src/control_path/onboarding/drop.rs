//! `tenant drop`: refuses clients, ends servers, drops the database, drops the roles. A tombstone stays, so
//! that a late client gets a clear error at once.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    carried_roles, enter_host, move_tenant,
    names::shell_word,
    operation::{Operation, TenantLock},
    ownership, roles, undo, undo_remains,
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    fields::described,
    host_connection::{HostAdmin, HostSession},
    pg_dump::{CopyPrograms, refuse_existing},
};

/// What to do with the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropDatabase {
    /// Dropped if pglobby created it; kept if it was adopted.
    IfOurs,
    /// It goes.
    Always,
    /// Kept, with the roles: the host will never be reached again.
    Left,
}

impl DropDatabase {
    /// From the two flags of the command line.
    pub fn of(leave_host: bool, with_database: bool) -> Self {
        match (leave_host, with_database) {
            (true, _) => Self::Left,
            (false, true) => Self::Always,
            (false, false) => Self::IfOurs,
        }
    }
}

described! {
    /// The answer of `tenant drop`.
    #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
    pub struct Dropped {
        /// The tenant's name.
        pub name: String,
        /// `dropped`.
        pub status: String,
        /// Its database.
        pub database: String,
        /// Whether the database was dropped.
        pub database_dropped: bool,
    }
}

/// Drops a tenant. Continues an interrupted drop; undoes an unfinished create. `final_dump` is a new file for a
/// last dump of the database (pg_dump's custom format), made when no client can change it any more.
///
/// # Errors
/// [`AdminError`]; a file that exists, or a copy that fails, comes before anything is dropped. Once begun the
/// tenant stays closed, and the same call goes on.
pub async fn drop_tenant(
    actor: &Actor,
    name: &str,
    database: DropDatabase,
    final_dump: Option<&Path>,
) -> Result<Dropped, AdminError> {
    let mut lock = TenantLock::take(actor, name).await?;
    match move_tenant::finish_or_undo(actor, &mut lock).await {
        // What that move left on the hosts stays too.
        Err(error) if database == DropDatabase::Left => {
            tracing::warn!(tenant = name, %error, "unfinished move abandoned");
        }
        settled => settled?,
    }
    let sql = "SELECT id, status, host, database, username, ro_username, adopted FROM pglobby.tenants
               WHERE name = $1 AND status <> 'dropped'";
    let row = lock.client.query_opt(sql, &[&name]).await?;
    let Some(row) = row else {
        let living = "SELECT name FROM pglobby.tenants WHERE status <> 'dropped'";
        return Err(actor.not_found(&lock.client, "tenant", name, living).await);
    };
    let mut dropped = Dropped {
        name: name.to_owned(),
        status: "dropped".to_owned(),
        database: row.get("database"),
        database_dropped: match database {
            DropDatabase::IfOurs => !row.get::<_, bool>("adopted"),
            DropDatabase::Always => true,
            DropDatabase::Left => false,
        },
    };
    if row.get::<_, String>("status") == "provisioning" {
        undo_remains(actor, &mut lock).await?;
        return Ok(dropped);
    }
    let roles = [Some(row.get::<_, String>("username")), row.get::<_, Option<String>>("ro_username")];
    let roles: Vec<String> = roles.into_iter().flatten().collect();

    let final_dump = final_dump.map(whole_path).transpose()?;
    if final_dump.is_some() && database != DropDatabase::Left {
        refuse_undumpable(actor, &lock, row.get("host")).await?;
    }
    let mut operation = fence(actor, &mut lock, row.get("id"), &dropped, final_dump).await?;
    if database == DropDatabase::Left {
        make_tombstone(actor, &mut lock, &operation, &dropped).await?;
        return Ok(dropped);
    }
    // As recorded by the first run.
    dropped.database_dropped =
        operation.arguments["drop_database"].as_bool().unwrap_or(dropped.database_dropped);
    match remove(actor, &lock, &mut operation, row.get("host"), &dropped, &roles).await {
        Ok(()) => {
            make_tombstone(actor, &mut lock, &operation, &dropped).await?;
            Ok(dropped)
        }
        Err(error) => {
            operation.note_failure(&lock, &error).await?;
            Err(AdminError::Refused(format!(
                "{error}. The tenant is closed; run `pglobby tenant drop {}` again to finish, with \
                 --leave-host where its host is gone for good",
                shell_word(name)
            )))
        }
    }
}

/// Checks that this machine has a pg_dump for the tenant's host before clients are refused. A host that
/// does not answer is an error later.
async fn refuse_undumpable(actor: &Actor, lock: &TenantLock, host: &str) -> Result<(), AdminError> {
    let admin = HostAdmin::load(actor, &lock.client, host).await?;
    match admin.connect().await {
        Ok(session) => CopyPrograms::for_server(&session).await.map(drop),
        Err(_) => Ok(()),
    }
}

/// A run that continues the drop may have another working directory.
fn whole_path(file: &Path) -> Result<String, AdminError> {
    let wrong = |why: String| AdminError::Invalid(format!("{}: {why}", file.display()));
    let whole = std::path::absolute(file).map_err(|error| wrong(error.to_string()))?;
    whole.into_os_string().into_string().map_err(|_| wrong("is not UTF-8".to_owned()))
}

/// Makes every node refuse clients, and records the plan.
async fn fence(
    actor: &Actor,
    lock: &mut TenantLock,
    tenant_id: i64,
    dropped: &Dropped,
    final_dump: Option<String>,
) -> Result<Operation, AdminError> {
    if let Some(mut operation) = Operation::left_running(lock).await? {
        // A file of that name may exist by now.
        if let Some(file) = final_dump {
            operation.arguments["final_dump"] = file.into();
        }
        actor.report_begun(operation.id).await;
        return Ok(operation);
    }
    if let Some(file) = &final_dump {
        refuse_existing(Path::new(file))?;
    }
    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    let sql = "UPDATE pglobby.tenants SET status = 'dropping' WHERE id = $1";
    transaction.execute(sql, &[&tenant_id]).await?;
    let arguments = json!({ "name": name, "database": dropped.database, "drop_database": dropped.database_dropped, "final_dump": final_dump });
    Operation::supersede(&transaction, tenant_id, &["rotate", "move"]).await?;
    let operation = Operation::begin(&transaction, actor, "drop", tenant_id, arguments).await?;
    let detail = json!({ "operation": operation.id, "with_database": dropped.database_dropped });
    actor.commit(transaction, "tenant.drop", Some(&name), &detail).await?;
    actor.report_begun(operation.id).await;
    actor.report(&name, "fenced").await;
    Ok(operation)
}

async fn remove(
    actor: &Actor,
    lock: &TenantLock,
    operation: &mut Operation,
    host: &str,
    dropped: &Dropped,
    roles: &[String],
) -> Result<(), AdminError> {
    let admin = HostAdmin::load(actor, &lock.client, host).await?;
    let (session, _) = enter_host(&admin, operation.tenant_id).await?;
    let mut roles = roles.to_vec();
    let carried = carried_roles::made_by_moves(lock, &session, operation.tenant_id).await?;
    roles.extend(carried.into_iter().filter(|role| !roles.contains(role)).collect::<Vec<_>>());
    for role in &roles {
        roles::shut_out(&admin, &session, role).await?;
    }
    ownership::leave_owners(lock, &session, operation.tenant_id).await?;
    operation.record(actor, lock, "ended").await?;
    keep_copy(actor, lock, operation, &admin, &session).await?;
    if dropped.database_dropped {
        drop_database(actor, lock, operation, &admin, &session).await?;
    }
    operation.record(actor, lock, "database").await?;
    for role in &roles {
        roles::release(&admin, &session, role).await?;
    }
    operation.record(actor, lock, "roles").await
}

/// Makes the last dump, if it was requested and is not made yet. The tenant's roles cannot log in
/// meanwhile.
async fn keep_copy(
    actor: &Actor,
    lock: &TenantLock,
    operation: &mut Operation,
    admin: &HostAdmin,
    session: &HostSession,
) -> Result<(), AdminError> {
    let file = operation.argument("final_dump").to_owned();
    if file.is_empty() || operation.arguments["dumped"] == Value::Bool(true) {
        return Ok(());
    }
    let programs = CopyPrograms::for_server(session).await?;
    programs.dump_to(admin, operation.argument("database"), Path::new(&file)).await?;
    operation.arguments["dumped"] = true.into();
    operation.record(actor, lock, "dumped").await
}

/// Drops the database by its oid, so that a newer one of the same name is left alone.
async fn drop_database(
    actor: &Actor,
    lock: &TenantLock,
    operation: &mut Operation,
    admin: &HostAdmin,
    session: &HostSession,
) -> Result<(), AdminError> {
    let sql = "SELECT oid FROM pg_catalog.pg_database WHERE datname = $1";
    let rows = session.query("looking for the database", sql, &[&operation.argument("database")]).await?;
    let found: Option<u32> = rows.first().map(|row| row.get(0));
    if operation.arguments.get("oid").is_none() {
        operation.arguments["oid"] = found.into();
        operation.record(actor, lock, "found").await?;
    }
    if found.is_none() || operation.arguments["oid"] != Value::from(found) {
        return Ok(());
    }
    undo::drop_database(admin, session, operation.argument("database")).await
}

/// Makes the row a tombstone without credentials and frees the name. Logins stay, unlisted: their clients
/// read that the tenant was dropped.
async fn make_tombstone(
    actor: &Actor,
    lock: &mut TenantLock,
    operation: &Operation,
    dropped: &Dropped,
) -> Result<(), AdminError> {
    let transaction = lock.client.transaction().await?;
    let sql =
        "UPDATE pglobby.tenants SET status = 'dropped', sealed_password = NULL, sealed_ro_password = NULL,
                   grants_pending = false WHERE id = $1";
    transaction.execute(sql, &[&operation.tenant_id]).await?;
    operation.close(&transaction, "done", &dropped.name).await?;
    let detail = json!({ "operation": operation.id });
    actor.commit(transaction, "tenant.dropped", Some(&dropped.name), &detail).await?;
    actor.report(&dropped.name, "dropped").await;
    Ok(())
}
