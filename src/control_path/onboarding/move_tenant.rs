//! `tenant move`: moves a tenant to another host. Its sessions stay; between two transactions they wait for
//! the copy.
//!
//! ```text
//! begun ─▶ roles ─▶ database ─▶ schema ─┬─▶ following ─▶ owned ─▶ published ─▶ subscribed ─▶ synced ─▶ fenced ─▶ quiet ─▶ caught up ─▶ copied ─┬─▶ verified ─▶ switched ─▶ moved
//!                                       └─▶ fenced ─▶ quiet ─▶ database ─▶ copied ─▶ owned ─────────────────────────────────────────┘
//! └─────────── dies here: undone by the next run, the old host serves ───────────────────────────────────────────────────────┘      └─ goes on ─┘
//! ```
//!
//! The definitions of the tenant are created on the new host by a session of the tenant's role, never by
//! the administrator, because creating them runs them. So it is known before clients wait whether the
//! tenant's role can create all of them.
//!
//! If both hosts allow it, replication copies the database while clients work (the upper line,
//! `replication.rs`). Otherwise, or if replication fails, a dump copies it while they wait (the lower
//! line).
//!
//! Every node follows the column `fenced` (`move_pause.rs`). The move knows that all nodes have paused the
//! tenant when the old host has no session of the tenant's roles left. No session can start then, because
//! the roles may not log in.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use super::{
    Work,
    carried_roles::{self, Carried},
    copy_database::Copy,
    enter_host,
    extensions::Extensions,
    names::ident,
    operation::{Operation, SealedPasswords, TenantLock},
    ownership,
    replication::{self, Stopped},
    replication_checks, role_attributes,
    roles::{self, OwnRole, Roles},
    source_host::Source,
    undo::{drop_database, undo},
};
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        fields::described,
        host_connection::HostAdmin,
        pg_dump::CopyPrograms,
    },
    secrets::seal::SecretLocation,
};

/// Interval of the checks whether sessions of the tenant are left on the old host.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The target and options of a move.
#[derive(Debug, Clone)]
pub struct MoveTenant {
    /// The host to move to.
    pub host: String,
    /// How long open transactions may take before the move is cancelled.
    pub patience: Duration,
    /// Keep the old database, closed.
    pub keep_source: bool,
}

impl MoveTenant {
    /// Default patience.
    pub const PATIENCE: &'static str = "30s";
}

described! {
    /// The answer of `tenant move`.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct Moved {
        /// The tenant's name.
        pub name: String,
        /// Old host.
        pub from: String,
        /// New host.
        pub host: String,
        /// Its database there.
        pub database: String,
        /// Whether the old database was dropped.
        pub source_dropped: bool,
        /// `replication` (clients waited for the last changes) or `dump` (clients waited for the whole
        /// copy).
        pub copied_by: String,
        /// Why a dump was used.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub dumped_because: Option<String>,
        /// How long clients were paused, in milliseconds.
        pub held_ms: u64,
    }
}

/// Moves a tenant, or leaves it where it is. Continues an interrupted move.
///
/// # Errors
/// [`AdminError`]; until the switch everything is undone, after it the same call goes on.
pub async fn move_tenant(actor: &Actor, name: &str, wanted: &MoveTenant) -> Result<Moved, AdminError> {
    let moved = try_to_move(actor, name, wanted).await;
    // The roles on the new host may log in until now, also those of a suspended tenant.
    role_attributes::follow_status(actor, name).await;
    moved
}

async fn try_to_move(actor: &Actor, name: &str, wanted: &MoveTenant) -> Result<Moved, AdminError> {
    let mut lock = TenantLock::take(actor, name).await?;
    match Operation::left(&lock, "move").await? {
        Some(operation) if operation.arguments["switched"] == true => {
            actor.report_begun(operation.id).await;
            return finish(actor, &mut lock, operation).await;
        }
        Some(mut operation) => put_back(actor, &mut lock, &mut operation).await?,
        None => {}
    }
    Operation::refuse_unfinished(&lock).await?;
    let source = Source::load(actor, &lock).await?;
    if source.admin.name == wanted.host {
        return Err(AdminError::Refused(format!("tenant {name:?} is on host {:?} already", wanted.host)));
    }
    let admin = HostAdmin::load(actor, &lock.client, &wanted.host).await?;
    let (_source_lock, _) = enter_host(&source.admin, source.tenant_id).await?;
    let (session, rights) = enter_host(&admin, source.tenant_id).await?;
    let carried = Carried::look(actor, &lock, &source, &session, &wanted.host).await?;
    source.refuse_unmovable(&lock, &session, &wanted.host, &carried.names()).await?;
    let programs = CopyPrograms::for_server(&source.session).await?;

    let operation = begin(actor, &mut lock, &source, &carried, wanted).await?;
    let mut work = Work { actor, lock, operation, admin, session, rights };
    let carried = carry(&mut work, &source, &carried, &programs, wanted.patience).await;
    let Work { mut lock, mut operation, session, .. } = work;
    drop((session, _source_lock)); // and with them the locks on the hosts, which undoing takes
    let error = match carried {
        Ok(()) => return finish(actor, &mut lock, operation).await,
        Err(error) => error,
    };
    match put_back(actor, &mut lock, &mut operation).await {
        Ok(()) => Err(AdminError::Refused(format!("{error}. Tenant {name:?} stays where it is"))),
        Err(second) => Err(AdminError::Refused(format!(
            "{error}. Undoing that failed as well ({second}); fix it and run the same command again"
        ))),
    }
}

async fn begin(
    actor: &Actor,
    lock: &mut TenantLock,
    source: &Source,
    carried: &Carried,
    wanted: &MoveTenant,
) -> Result<Operation, AdminError> {
    let name = lock.name.clone();
    // Of the carried roles, those that an earlier move made here will be dropped.
    let own = [source.roles.read_write.as_str(), source.roles.read_only.as_str()];
    let old_roles: Vec<&str> = own.into_iter().chain(carried.names()).collect();
    let arguments = json!({
        "name": name, "host": wanted.host, "from": source.admin.name, "database": source.database,
        "oid": source.oid, "old_roles": old_roles, "locked": carried.locked(),
        "mark": roles::new_mark("move", &name), "keep_source": wanted.keep_source,
    });
    let transaction = lock.client.transaction().await?;
    let operation = Operation::begin(&transaction, actor, "move", source.tenant_id, arguments).await?;
    transaction.commit().await?;
    actor.report_begun(operation.id).await;
    actor.report(&name, "begun").await;
    Ok(operation)
}

async fn carry(
    work: &mut Work<'_>,
    source: &Source,
    carried: &Carried,
    programs: &CopyPrograms,
    patience: Duration,
) -> Result<(), AdminError> {
    let origin = source.admin.connect_to(&source.database).await?;
    replication_checks::refuse_hidden(source, &origin).await?;
    let host = work.admin.name.clone();
    let extensions = Extensions::look(source, &origin, &work.session, work.rights, &host).await?;
    let passwords = source.passwords(work.actor)?;
    let own = match source.role_given {
        true => OwnRole::Named(&source.roles.read_write),
        false => OwnRole::Derived,
    };
    let made = work.make_roles(&passwords, own).await?;
    carried.make(work, &made, source).await?;
    work.record("roles").await?;
    let copy = Copy { source, origin, programs, extensions, carried, made, passwords };
    copy.make_database(work).await?;
    work.record("database").await?;
    let schema = copy.make_schema(work).await?;
    work.record("schema").await?;

    let held = match copy.follow(work, schema, patience).await {
        Ok(held) => held,
        Err(Stopped::Failed(error)) => return Err(error),
        Err(Stopped::Unsuitable(why)) => {
            let sentence = format!("copied by a dump, for which clients wait, because {why}");
            work.actor.report_note(&work.lock.name, &sentence).await;
            work.operation.arguments["dumped_because"] = why.into();
            copy.dump(work, patience).await?
        }
    };
    copy.give_owners(work).await?;
    work.verify_logins(&source.database, &copy.made, &copy.passwords).await?;
    work.record("verified").await?;
    let sealed = copy.passwords.seal(work.actor, source.tenant_id)?;
    switch(work, &copy.made, &sealed, held).await
}

/// Pauses the tenant and waits until no session is left on the old host, where its roles may not log in any
/// more.
pub(super) async fn hold(
    work: &mut Work<'_>,
    source: &Source,
    patience: Duration,
) -> Result<Instant, AdminError> {
    let held = Instant::now();
    set_fenced(work.actor, &work.lock, source.tenant_id, true).await?;
    work.record("fenced").await?;
    wait_until_quiet(source, &work.operation, patience).await?;
    source.session.run("keeping the tenant's roles out", &source.keep_out(&work.operation)).await?;
    wait_until_quiet(source, &work.operation, patience).await?;
    work.record("quiet").await?;
    Ok(held)
}

async fn wait_until_quiet(
    source: &Source,
    operation: &Operation,
    patience: Duration,
) -> Result<(), AdminError> {
    let give_up = Instant::now() + patience;
    loop {
        let left = source.sessions(operation).await?;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() >= give_up {
            return Err(AdminError::Refused(format!(
                "{left} sessions of the tenant did not come to the end of their transaction, are pinned to their \
                 server, or have left a prepared transaction, after {patience:?}; try again with a longer --patience, or end them first"
            )));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn set_fenced(actor: &Actor, lock: &TenantLock, id: i64, fenced: bool) -> Result<(), AdminError> {
    let sql = "UPDATE pglobby.tenants SET fenced = $2 WHERE id = $1 AND fenced <> $2";
    lock.client.execute(sql, &[&id, &fenced]).await?;
    tracing::debug!(tenant = lock.name, fenced, actor = actor.name, "paused for move");
    Ok(())
}

/// Switches to the new host: row, `fenced` and record change in one transaction.
async fn switch(
    work: &mut Work<'_>,
    made: &Roles,
    sealed: &SealedPasswords,
    held: Instant,
) -> Result<(), AdminError> {
    work.operation.arguments["switched"] = true.into();
    work.operation.arguments["held_ms"] =
        u64::try_from(held.elapsed().as_millis()).unwrap_or(u64::MAX).into();
    let transaction = work.lock.client.transaction().await?;
    transaction
        .execute(
            "UPDATE pglobby.tenants SET host = $2, username = $3, ro_username = $4, sealed_password = $5,
                    sealed_ro_password = $6, fenced = false,
                    -- pglobby made the database there, and granted what there is to grant.
                    adopted = false, grants_pending = false
             WHERE id = $1",
            &[
                &work.operation.tenant_id,
                &work.operation.argument("host"),
                &made.read_write,
                &made.read_only,
                &sealed.read_write,
                &sealed.read_only,
            ],
        )
        .await?;
    let step = "UPDATE pglobby.operations SET step = 'switched', arguments = $2, updated_at = now()
                WHERE id = $1 AND status IN ('running', 'failed')";
    transaction.execute(step, &[&work.operation.id, &work.operation.arguments]).await?;
    let detail = json!({
        "operation": work.operation.id, "from": work.operation.argument("from"), "to": work.operation.argument("host"),
    });
    work.actor.commit(transaction, "tenant.move", Some(&work.lock.name), &detail).await?;
    work.actor.report(&work.lock.name, "switched").await;
    Ok(())
}

/// Completes or undoes an interrupted move before another command on the tenant.
pub(super) async fn finish_or_undo(actor: &Actor, lock: &mut TenantLock) -> Result<(), AdminError> {
    match Operation::left(lock, "move").await? {
        None => Ok(()),
        Some(operation) if operation.arguments["switched"] == true => {
            finish(actor, lock, operation).await.map(drop)
        }
        Some(mut operation) => put_back(actor, lock, &mut operation).await,
    }
}

/// Resumes the tenant on the old host, then removes what was made on the new one.
///
/// # Errors
/// [`AdminError`]: the tenant has switched already (the next run continues), or a host does not answer.
async fn put_back(actor: &Actor, lock: &mut TenantLock, operation: &mut Operation) -> Result<(), AdminError> {
    // Reads the record, because a commit may have succeeded without its answer.
    if Operation::left(lock, "move").await?.is_some_and(|left| left.arguments["switched"] == true) {
        return Err(AdminError::Refused("it has moved already".to_owned()));
    }
    let source = Source::load(actor, lock).await?;
    source.session.run("letting the tenant's roles in again", &source.let_in(operation)).await?;
    set_fenced(actor, lock, operation.tenant_id, false).await?;
    replication::sweep(actor, lock, operation).await?;
    undo(actor, lock, operation).await
}

/// Drops the old database and its roles, unless they are to be kept.
async fn finish(actor: &Actor, lock: &mut TenantLock, operation: Operation) -> Result<Moved, AdminError> {
    let name = lock.name.clone();
    let keep = operation.arguments["keep_source"] == true;
    let cleaned = match keep {
        true => Ok(()),
        false => clean_up(actor, lock, &operation).await,
    };
    if let Err(error) = cleaned {
        operation.note_failure(lock, &error).await?;
        return Err(AdminError::Refused(format!(
            "tenant {name:?} has moved, but what is left on host {:?} could not be removed ({error}); run the same command \
             again",
            operation.argument("from")
        )));
    }
    let transaction = lock.client.transaction().await?;
    operation.close(&transaction, "done", &name).await?;
    transaction.commit().await?;
    actor.report(&name, "moved").await;
    let why = operation.arguments["dumped_because"].as_str().map(str::to_owned);
    Ok(Moved {
        name,
        from: operation.argument("from").to_owned(),
        host: operation.argument("host").to_owned(),
        database: operation.argument("database").to_owned(),
        source_dropped: !keep,
        copied_by: if why.is_some() { "dump" } else { "replication" }.to_owned(),
        dumped_because: why,
        held_ms: operation.arguments["held_ms"].as_u64().unwrap_or_default(),
    })
}

async fn clean_up(actor: &Actor, lock: &TenantLock, operation: &Operation) -> Result<(), AdminError> {
    let database = operation.argument("database");
    let admin = HostAdmin::load(actor, &lock.client, operation.argument("from")).await?;
    let (session, _) = enter_host(&admin, operation.tenant_id).await?;
    // By oid, so that a newer database of the same name is left alone.
    let sql = "SELECT oid FROM pg_catalog.pg_database WHERE datname = $1";
    let found = session.query("looking for the old database", sql, &[&database]).await?;
    if found.first().is_some_and(|row| operation.arguments["oid"] == row.get::<_, u32>(0)) {
        drop_database(&admin, &session, database).await?;
    }
    for role in operation.arguments["old_roles"].as_array().into_iter().flatten() {
        roles::release(&admin, &session, role.as_str().unwrap_or_default()).await?;
    }
    ownership::leave_owners(lock, &session, operation.tenant_id).await?;
    carried_roles::unlock(&admin, &session, operation).await?;
    // A dump contains no statistics, and without them the first queries are planned badly. ANALYZE
    // evaluates expressions of the tenant, so the tenant's role runs it.
    if let Err(error) = analyse(actor, lock, operation).await {
        tracing::warn!(%error, "cannot ANALYZE the moved database; autovacuum will");
    }
    Ok(())
}

async fn analyse(actor: &Actor, lock: &TenantLock, operation: &Operation) -> Result<(), AdminError> {
    let sql = "SELECT username, sealed_password FROM pglobby.tenants WHERE id = $1";
    let row = lock.client.query_one(sql, &[&operation.tenant_id]).await?;
    let id = operation.tenant_id.to_string();
    let place = SecretLocation { table: "tenants", row: &id, column: "sealed_password" };
    let password = actor.keyring.open(&place, row.get("sealed_password"))?;
    let host = HostAdmin::load(actor, &lock.client, operation.argument("host")).await?;
    let database = operation.argument("database");
    let tenant = host.prove_login(row.get("username"), &password, database).await?;
    tenant.run(format!("analysing {}", ident(database)), "ANALYZE").await
}
