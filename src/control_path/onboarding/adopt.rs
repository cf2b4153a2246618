//! `tenant adopt`: an existing database becomes a tenant. It keeps its owner; the tenant gets roles of its own, and
//! access to its tables when its first pool is made.

use serde_json::json;

use super::{
    Made, NewRow, NewTenant, Work, begin_new, choose_host, enter_host, grants,
    names::{check_database_name, check_identifier, check_tenant_name, shell_word},
    new_passwords,
    operation::{Passwords, TenantLock},
    roles::Roles,
    undo::{forget, undo_after, undo_remains},
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::HostAdmin,
};

/// What to take in.
#[derive(Debug, Clone, Default)]
pub struct AdoptTenant {
    /// What clients will ask for.
    pub name: String,
    /// Where the database is; `None`: the only host, or the accepting one with the fewest tenants.
    pub host: Option<String>,
    /// `None`: as the tenant.
    pub database: Option<String>,
    /// One more role whose future tables the tenant may use, beside the owners of what is there now.
    pub owner: Option<String>,
}

/// Takes a database in, or changes nothing.
///
/// # Errors
/// [`AdminError`]; all that was made is undone again.
pub async fn adopt(actor: &Actor, wanted: &AdoptTenant) -> Result<NewTenant, AdminError> {
    let database = wanted.database.as_deref().unwrap_or(&wanted.name);
    check_tenant_name(&wanted.name, actor.central.database())?;
    check_database_name(database, actor.central.database())?;
    if let Some(owner) = &wanted.owner {
        check_identifier("role", owner)?;
    }

    let mut lock = TenantLock::take(actor, &wanted.name).await?;
    undo_remains(actor, &mut lock).await?;
    let admin = choose_host(actor, &lock.client, wanted.host.as_deref()).await?;
    let row = NewRow { host: &admin.name.clone(), database, adopted: true };
    let passwords = new_passwords();
    let arguments = json!({ "owner": wanted.owner });
    let operation = begin_new(actor, &mut lock, "adopt", &row, arguments).await?;

    let (session, rights) = match enter_host(&admin, operation.tenant_id).await {
        Ok(entered) => entered,
        Err(error) => {
            forget(actor, &mut lock, &operation).await?;
            return Err(error);
        }
    };
    let mut work = Work { actor, lock, operation, admin, session, rights };
    match take_in(&mut work, wanted, database, &passwords).await {
        Ok(made) => work.open_tenant(&made, &row).await,
        Err(error) => {
            let Work { mut lock, operation, session, .. } = work;
            drop(session); // and with it the lock on the host, which undoing takes
            Err(undo_after(actor, &mut lock, &operation, error).await)
        }
    }
}

async fn take_in(
    work: &mut Work<'_>,
    wanted: &AdoptTenant,
    database: &str,
    passwords: &Passwords,
) -> Result<Made, AdminError> {
    let taken = look_at(work, database).await?;
    grants::refuse_out_of_reach(&work.admin.connect_to(database).await?).await?;
    if let Some(owner) = &wanted.owner {
        refuse_foreign_owner(work, owner).await?;
    }
    let roles = work.make_roles(passwords).await?;
    // Before it is taken, so that undoing gives back neither more nor less.
    work.operation.arguments["taken_from_public"] = taken.into();
    work.record("roles").await?;

    for statement in grants::close_database(database, &roles).split(";\n") {
        work.session.run("closing the database to everybody else", statement).await?;
    }
    work.record("closed").await?;
    work.verify_logins(database, &roles, passwords).await?;
    work.record("verified").await?;
    let sealed = passwords.seal(work.actor, work.operation.tenant_id)?;
    Ok(Made { roles, sealed })
}

/// Whether the database can be a tenant's; answers what PUBLIC may do with it now.
async fn look_at(work: &Work<'_>, database: &str) -> Result<Vec<String>, AdminError> {
    let rows = work
        .session
        .query(
            "looking at the database",
            "SELECT datistemplate, datallowconn, pg_catalog.pg_has_role(datdba, 'USAGE'),
                    pg_catalog.pg_get_userbyid(datdba)::text,
                    ARRAY(SELECT DISTINCT a.privilege_type FROM pg_catalog.aclexplode(
                              coalesce(datacl, pg_catalog.acldefault('d', datdba))) a
                          WHERE a.grantee = 0 ORDER BY 1)
             FROM pg_catalog.pg_database WHERE datname = $1",
            &[&database],
        )
        .await?;
    let (name, host) = (&work.lock.name, &work.admin.name);
    let Some(row) = rows.first() else {
        return Err(AdminError::Refused(format!(
            "there is no database {database:?} on host {host:?}; make a new one with `pglobby tenant create {}`, or \
             name an existing one with --database",
            shell_word(name)
        )));
    };
    let (template, connections, reachable, owner): (bool, bool, bool, String) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    if template || !connections {
        return Err(AdminError::Refused(format!(
            "database {database:?} is a template or takes no connections; a tenant needs an ordinary database"
        )));
    }
    if !reachable {
        return Err(AdminError::Refused(format!(
            "database {database:?} belongs to {owner:?}, whom the host's administrator {:?} cannot act for; GRANT the one \
             to the other, or register a superuser with `pglobby host set {}`",
            work.admin.user,
            shell_word(host)
        )));
    }
    Ok(row.get(4))
}

async fn refuse_foreign_owner(work: &Work<'_>, owner: &str) -> Result<(), AdminError> {
    let sql = "SELECT pg_catalog.pg_has_role(oid, 'USAGE') FROM pg_catalog.pg_roles WHERE rolname = $1";
    let rows = work.session.query("looking at the owner", sql, &[&owner]).await?;
    match rows.first().map(|row| row.get::<_, bool>(0)) {
        Some(true) => Ok(()),
        Some(false) => Err(AdminError::Refused(format!(
            "the host's administrator {:?} cannot act for {owner:?}; GRANT the one to the other first",
            work.admin.user
        ))),
        None => Err(AdminError::Refused(format!("there is no role {owner:?} on host {:?}", work.admin.name))),
    }
}

/// Gives an adopted tenant's roles access to its tables. Whoever makes its first pool calls this once, before the
/// pool; idempotent, and a second caller waits for the first. Does nothing unless `grants_pending`.
///
/// # Errors
/// The host or the central database; then the grants stay pending.
pub async fn complete_grants(actor: &Actor, tenant_id: i64) -> Result<(), AdminError> {
    let pending = "SELECT name, host, database, username, ro_username FROM pglobby.tenants
                   WHERE id = $1 AND grants_pending AND status IN ('active', 'suspended')";
    let client = actor.central.client().await?;
    let Some(row) = client.query_opt(pending, &[&tenant_id]).await? else { return Ok(()) };
    drop(client);

    let mut lock = TenantLock::take(actor, row.get("name")).await?;
    let Some(row) = lock.client.query_opt(pending, &[&tenant_id]).await? else { return Ok(()) };
    let admin = HostAdmin::load(actor, &lock.client, row.get("host")).await?;
    let read_only: Option<String> = row.get("ro_username");
    let roles = Roles { read_write: row.get("username"), read_only: read_only.unwrap_or_default() };
    let asked = "SELECT arguments ->> 'owner' FROM pglobby.operations
                 WHERE tenant_id = $1 AND kind = 'adopt' ORDER BY id DESC LIMIT 1";
    let owner: Option<String> = lock.client.query_opt(asked, &[&tenant_id]).await?.and_then(|row| row.get(0));

    let inside = admin.connect_to(row.get("database")).await?;
    grants::grant_adopted(&inside, &roles, owner.as_deref()).await?;

    let name = lock.name.clone();
    let transaction = lock.client.transaction().await?;
    let sql = "UPDATE pglobby.tenants SET grants_pending = false WHERE id = $1";
    transaction.execute(sql, &[&tenant_id]).await?;
    actor.audit(&transaction, "tenant.grants", Some(&name), &json!({})).await?;
    transaction.commit().await?;
    Ok(())
}
