//! A tenant's two roles: create, find by mark, remove.
//!
//! Each role carries the mark of the operation that made it, as its comment, from the transaction that
//! creates it. A run that died is cleaned up by that mark, so an older role is never taken for one of
//! pglobby's.

use rand::Rng as _;
use tokio_postgres::error::SqlState;

use super::{
    names::{ROLE_CANDIDATES_MAX, ident, literal, role_names},
    operation::Passwords,
};
use crate::control_path::{
    admin::{
        actor::AdminError,
        host_connection::{AdminRights, HostAdmin, HostSession},
        host_locks::Prepared,
    },
    secrets::scram_verifier::scram_verifier,
};
use secrecy::ExposeSecret as _;

/// Prefix of the comment of every role that pglobby creates.
pub const MARK: &str = "pglobby: ";

/// The roles of a tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roles {
    /// Owns the database and its content; of an adopted tenant: may use all of it.
    pub read_write: String,
    /// Reads.
    pub read_only: String,
}

/// The tenant's own role, which owns its database or acts as the owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnRole<'a> {
    /// Is made, and named after the tenant.
    Derived,
    /// Exists.
    Existing(&'a str),
    /// Is made, with this name.
    Named(&'a str),
}

impl OwnRole<'_> {
    /// The name that was chosen for it.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Derived => None,
            Self::Existing(name) | Self::Named(name) => Some(name),
        }
    }
}

/// Whether the host has a role of this name.
pub async fn exists(session: &HostSession, role: &str) -> Result<bool, AdminError> {
    let sql = "SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = $1";
    Ok(!session.query("looking for a role", sql, &[&role]).await?.is_empty())
}

/// A unique mark.
pub fn new_mark(kind: &str, tenant: &str) -> String {
    let token: u128 = rand::rng().random();
    format!("{MARK}{kind} {tenant} {token:032x}")
}

/// Role names for `tenant` that are free on this host.
pub async fn choose(session: &HostSession, tenant: &str) -> Result<Roles, AdminError> {
    for attempt in 1..=ROLE_CANDIDATES_MAX {
        let (read_write, read_only) = role_names(tenant, attempt);
        let sql = "SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = ANY ($1)";
        let taken = session.query("looking for role names", sql, &[&vec![&read_write, &read_only]]).await?;
        if taken.is_empty() {
            return Ok(Roles { read_write, read_only });
        }
    }
    Err(AdminError::Refused(format!(
        "{ROLE_CANDIDATES_MAX} role names for tenant {tenant:?} are taken; drop what is not needed"
    )))
}

/// Creates both roles with their mark, in one transaction; only the read-only role if the other is `given`.
/// The server gets verifiers instead of passwords, because statements may be logged.
///
/// # Errors
/// The host; [`AdminError::Exists`] if the name was taken meanwhile.
pub async fn create(
    session: &HostSession,
    rights: &AdminRights,
    roles: &Roles,
    passwords: &Passwords,
    mark: &str,
    given: bool,
) -> Result<(), AdminError> {
    let mut sql = String::from("BEGIN;\n");
    let both = [(&roles.read_write, &passwords.read_write), (&roles.read_only, &passwords.read_only)];
    for (role, password) in both.into_iter().skip(usize::from(given)) {
        let verifier = scram_verifier(password);
        let (name, verifier, mark) = (ident(role), literal(verifier.expose_secret()), literal(mark));
        sql += &format!(
            "CREATE ROLE {name} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS \
             PASSWORD {verifier};\nCOMMENT ON ROLE {name} IS {mark};\n"
        );
        sql += &rights.join(&name);
    }
    // Does not prevent writing, because it may be SET off. But functions of the tenant that write with
    // their owner's rights fail by default, with a clear error.
    sql += &format!("ALTER ROLE {} SET default_transaction_read_only = on;\n", ident(&roles.read_only));
    sql += "COMMIT";
    let made = session.run("creating the tenant's roles", &sql).await;
    match &made {
        Err(error)
            if matches!(error.code(), Some(&SqlState::DUPLICATE_OBJECT | &SqlState::UNIQUE_VIOLATION)) =>
        {
            session.run("giving up on a role name", "ROLLBACK").await?;
            Err(AdminError::Exists(format!(
                "role {:?} or {:?} was created by another session just now",
                roles.read_write, roles.read_only
            )))
        }
        _ => made,
    }
}

/// The roles that carry `mark`.
pub async fn marked(session: &HostSession, mark: &str) -> Result<Vec<String>, AdminError> {
    let sql = "SELECT rolname::text FROM pg_catalog.pg_roles
               WHERE pg_catalog.shobj_description(oid, 'pg_authid') = $1";
    session.texts("looking for the roles of an operation", sql, &[&mark]).await
}

/// Databases that a role with `mark` owns. The operation made them, because the role was unknown before.
pub async fn marked_databases(session: &HostSession, mark: &str) -> Result<Vec<String>, AdminError> {
    let sql =
        "SELECT d.datname::text FROM pg_catalog.pg_database d JOIN pg_catalog.pg_roles r ON r.oid = d.datdba
               WHERE pg_catalog.shobj_description(r.oid, 'pg_authid') = $1";
    session.texts("looking for the database of an operation", sql, &[&mark]).await
}

/// Forbids a role to log in, ends its sessions, and rolls back its prepared transactions.
pub async fn shut_out(admin: &HostAdmin, session: &HostSession, role: &str) -> Result<(), AdminError> {
    if !ours(session, role).await? {
        return Ok(());
    }
    session.run(format!("locking role {role:?}"), &format!("ALTER ROLE {} NOLOGIN", ident(role))).await?;
    let sql =
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE usename = $1";
    session.query(format!("ending sessions of role {role:?}"), sql, &[&role]).await?;
    for transaction in Prepared::of(session, role, "").await? {
        transaction.roll_back(admin).await?;
    }
    Ok(())
}

/// Drops a role that pglobby created, if it exists, and revokes its privileges. Its objects pass to the
/// owner of their database. If that owner has powers, they do not, because code in them (an index
/// expression, a view, a function) would run with those powers. Then the role stays as their owner and
/// cannot log in.
pub async fn release(admin: &HostAdmin, session: &HostSession, role: &str) -> Result<(), AdminError> {
    if !ours(session, role).await? {
        return Ok(());
    }
    let name = ident(role);
    let databases = session.query(format!("looking for what role {role:?} holds"), HELD, &[&role]).await?;
    let mut kept = Vec::new();
    for row in databases {
        let (database, owns, heir): (String, bool, Option<String>) = (row.get(0), row.get(1), row.get(2));
        let sql = match (owns, heir) {
            (false, _) => format!("DROP OWNED BY {name}"),
            (true, Some(heir)) => {
                let heir = ident(&heir);
                format!("BEGIN; REASSIGN OWNED BY {name} TO {heir}; DROP OWNED BY {name}; COMMIT")
            }
            (true, None) => {
                kept.push(database);
                continue;
            }
        };
        // It may be another tenant's database, which granted the role something.
        let there = admin.connect_to(&database).await?.before_tenants(admin).await?;
        there.run(format!("releasing what role {role:?} holds in database {database:?}"), &sql).await?;
    }
    if kept.is_empty() {
        // Privileges on databases themselves are dropped from any database.
        let sql = format!("BEGIN; DROP OWNED BY {name}; DROP ROLE {name}; COMMIT");
        return session.run(format!("dropping role {role:?}"), &sql).await;
    }
    tracing::warn!(
        role,
        host = admin.name,
        databases = kept.join(", "),
        "the role stays, locked: it owns objects in databases whose owner has powers that code of the tenant's must not \
         run with; look at them, and drop them (DROP OWNED BY) or give them away (REASSIGN OWNED BY)"
    );
    let sql = format!("ALTER ROLE {name} NOLOGIN PASSWORD NULL");
    session.run(format!("locking role {role:?}"), &sql).await
}

/// Databases in which role `$1` owns objects or has privileges; whether it owns objects other than its default
/// privileges, which no role inherits; and the new owner:
/// the database's owner, unless that is the role itself, is out of the administrator's reach, or has
/// powers, directly or by membership.
const HELD: &str = r"
SELECT d.datname::text,
       coalesce(bool_or(s.deptype = 'o' AND s.classid <> 'pg_catalog.pg_default_acl'::regclass), false),
       CASE WHEN d.datdba <> r.oid AND pg_catalog.pg_has_role(d.datdba, 'MEMBER') AND NOT EXISTS (
           SELECT FROM pg_catalog.pg_roles p WHERE pg_catalog.pg_has_role(d.datdba, p.oid, 'MEMBER')
             AND (p.rolsuper OR p.rolcreatedb OR p.rolcreaterole OR p.rolreplication OR p.rolbypassrls
                  OR (p.rolname LIKE 'pg\_%' AND p.rolname <> 'pg_database_owner')))
       THEN pg_catalog.pg_get_userbyid(d.datdba)::text END
FROM pg_catalog.pg_shdepend s JOIN pg_catalog.pg_database d ON d.oid = s.dbid
JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
WHERE s.refclassid = 'pg_catalog.pg_authid'::regclass AND r.rolname = $1 AND d.datallowconn
GROUP BY d.oid, d.datname, d.datdba, r.oid";

/// Whether the role exists and pglobby created it. A row that was edited by hand must not cause the loss of
/// another role.
pub async fn ours(session: &HostSession, role: &str) -> Result<bool, AdminError> {
    let sql =
        "SELECT pg_catalog.shobj_description(oid, 'pg_authid') FROM pg_catalog.pg_roles WHERE rolname = $1";
    let rows = session.query(format!("looking at role {role:?}"), sql, &[&role]).await?;
    let comment = rows.first().and_then(|row| row.get::<_, Option<String>>(0));
    Ok(comment.is_some_and(|comment| comment.starts_with(MARK)))
}
