//! The attributes that a tenant's roles must have on their host: whether they may log in, and what a
//! tenant's SQL may have changed.
//!
//! All that a tenant's SQL can change about its own roles and its database is in shared catalogs. It is
//! checked and undone from the administrator's own database, without entering the tenant's.

use super::{
    names::ident,
    operation::{Operation, TenantLock},
    roles,
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
};

/// A tenant's roles and database, by name.
#[derive(Debug, Clone, Copy)]
pub struct Belongings<'a> {
    /// Its database.
    pub database: &'a str,
    /// The role that owns it.
    pub read_write: &'a str,
    /// The read-only role, if there is one.
    pub read_only: Option<&'a str>,
    /// pglobby did not make the role that owns it; its attributes are left alone.
    pub role_given: bool,
}

/// Statements that undo changes of the database: CONNECT, and settings that decide the role of a session or
/// whether it starts. If the tenant owns the database: every limit, timeouts below 0.1 s (which end new
/// sessions), and IS_TEMPLATE. $1 the database, $2 and $3 the roles.
const DATABASE_AS_MADE: &str = r"
SELECT format('ALTER DATABASE %I CONNECTION LIMIT -1', datname) FROM pg_database
WHERE datname = $1 AND (datconnlimit = 0 OR datconnlimit > 0 AND pg_get_userbyid(datdba) = $2)
UNION ALL
SELECT format('ALTER DATABASE %I IS_TEMPLATE false', datname) FROM pg_database
WHERE datname = $1 AND datistemplate AND pg_get_userbyid(datdba) = $2
UNION ALL
SELECT format('ALTER DATABASE %I ALLOW_CONNECTIONS true', datname) FROM pg_database
WHERE datname = $1 AND NOT datallowconn
UNION ALL
SELECT format('ALTER DATABASE %I RESET %I', d.datname, split_part(s.setting, '=', 1))
FROM pg_db_role_setting c JOIN pg_database d ON d.oid = c.setdatabase AND d.datname = $1,
     unnest(c.setconfig) AS s (setting)
WHERE c.setrole = 0 AND split_part(s.setting, '=', 1)
      IN ('local_preload_libraries', 'session_preload_libraries', 'role', 'session_authorization')
UNION ALL
SELECT format('ALTER DATABASE %I RESET %I', d.datname, split_part(s.setting, '=', 1))
FROM pg_db_role_setting c JOIN pg_database d ON d.oid = c.setdatabase AND d.datname = $1,
     unnest(c.setconfig) AS s (setting)
WHERE c.setrole = 0 AND pg_get_userbyid(d.datdba) = $2
  AND s.setting ~ '^(statement|transaction|idle_session|idle_in_transaction_session)_timeout='
  AND split_part(s.setting, '=', 2) ~ '^\s*(0*[1-9][0-9]?(\.[0-9]*)?\s*(ms)?|[0-9.]+\s*us|0*\.0[0-9]*\s*s)\s*$'
UNION ALL
SELECT format('GRANT CONNECT%s ON DATABASE %I TO %I', CASE WHEN r.rolname = $2 THEN ', CREATE, TEMPORARY' ELSE '' END,
              d.datname, r.rolname)
FROM pg_database d, pg_roles r
WHERE d.datname = $1 AND r.rolname IN ($2, $3) AND NOT has_database_privilege(r.oid, d.oid, 'CONNECT')";

/// Roles whose attributes were changed, passwords aside. $1 the database, $2 and $3 the roles.
const CHANGED_ROLES: &str = r"
SELECT r.rolname::text FROM pg_roles r
WHERE r.rolname IN ($2, $3) AND (
      NOT r.rolcanlogin OR r.rolconnlimit >= 0 OR r.rolvaliduntil < 'infinity'
   OR EXISTS (SELECT FROM pg_db_role_setting c, unnest(c.setconfig) AS s (setting)
              WHERE c.setrole = r.oid
                AND (c.setdatabase = 0 OR c.setdatabase IN (SELECT oid FROM pg_database WHERE datname = $1))
                AND NOT (r.rolname = $3 AND c.setdatabase = 0 AND s.setting = 'default_transaction_read_only=on'))
   OR (r.rolname = $3 AND NOT EXISTS (SELECT FROM pg_db_role_setting c WHERE c.setrole = r.oid AND c.setdatabase = 0
                AND 'default_transaction_read_only=on' = ANY (c.setconfig))))";

impl Belongings<'_> {
    /// Those that pglobby made.
    fn roles(&self) -> impl Iterator<Item = &str> {
        let read_write = Some(self.read_write).filter(|_| !self.role_given);
        [read_write, self.read_only].into_iter().flatten()
    }

    /// Statements that restore the roles that pglobby made, passwords aside. They may log in.
    pub fn roles_as_made(&self) -> String {
        let database = ident(self.database);
        let as_made = |role: &str| {
            let name = ident(role);
            let reads = match Some(role) == self.read_only {
                true => format!("ALTER ROLE {name} SET default_transaction_read_only = on;\n"),
                false => String::new(),
            };
            format!(
                "ALTER ROLE {name} RESET ALL;\nALTER ROLE {name} IN DATABASE {database} RESET ALL;\n{reads}\
                 ALTER ROLE {name} LOGIN CONNECTION LIMIT -1 VALID UNTIL 'infinity';\n"
            )
        };
        self.roles().map(as_made).collect()
    }

    /// Statements that undo changes of the database; none if it is unchanged.
    pub async fn database_as_made(&self, session: &HostSession) -> Result<Vec<String>, AdminError> {
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&self.database, &self.read_write, &self.read_only];
        session.texts("looking at the tenant's database", DATABASE_AS_MADE, &parameters).await
    }

    /// Whether the roles or the database were changed.
    pub async fn are_changed(&self, session: &HostSession) -> Result<bool, AdminError> {
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&self.database, &self.read_write, &self.read_only];
        let changed = session.texts("looking at the tenant's roles", CHANGED_ROLES, &parameters).await?;
        Ok(!changed.is_empty() || !self.database_as_made(session).await?.is_empty())
    }

    /// Whether the read-only role has lost its privileges inside the database, as by DROP OWNED of either
    /// role: the default privileges on schemas, tables and sequences go with it.
    pub async fn reader_has_lost(&self, session: &HostSession) -> Result<bool, AdminError> {
        let sql = "SELECT count(DISTINCT o.objid) < 3 FROM pg_catalog.pg_shdepend o
                   JOIN pg_catalog.pg_shdepend a USING (dbid, classid, objid, refclassid)
                   JOIN pg_catalog.pg_database d ON d.oid = dbid AND d.datname = $1
                   JOIN pg_catalog.pg_roles w ON w.oid = o.refobjid AND w.rolname = $2
                   JOIN pg_catalog.pg_roles r ON r.oid = a.refobjid AND r.rolname = $3
                   WHERE refclassid = 'pg_catalog.pg_authid'::regclass AND o.deptype = 'o' AND a.deptype = 'a'
                     AND classid = 'pg_catalog.pg_default_acl'::regclass";
        let Some(reader) = self.read_only else { return Ok(false) };
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&self.database, &self.read_write, &reader];
        let lost = session.query("looking for the reader's rights", sql, &parameters).await?;
        Ok(lost.first().is_some_and(|row| row.get(0)))
    }
}

/// Allows or forbids a tenant's roles to log in on their host, according to its status. A failure is only
/// logged: suspending a tenant must not fail because its host is down.
pub async fn follow_status(actor: &Actor, name: &str) {
    if let Err(error) = try_to_follow(actor, name, None).await {
        let sentence = format!(
            "the right of the tenant's roles to log in directly on their host could not be changed ({error}); `pglobby doctor \
             --fix` does it once that is mended"
        );
        actor.report_note(name, &sentence).await;
    }
}

/// Allows a tenant's roles to log in before it is resumed. If that fails, the repair after the first
/// refused connection does it.
pub async fn let_in(actor: &Actor, name: &str) {
    if let Err(error) = try_to_follow(actor, name, Some(true)).await {
        let sentence = format!("the tenant's roles could not be let in on their host yet ({error})");
        actor.report_note(name, &sentence).await;
    }
}

async fn try_to_follow(actor: &Actor, name: &str, enter: Option<bool>) -> Result<(), AdminError> {
    let lock = TenantLock::take_at_once(actor, name).await?;
    if Operation::left(&lock, "move").await?.is_some() {
        return Err(AdminError::Refused("its move is not finished".to_owned()));
    }
    let sql = "SELECT host, status, username, ro_username FROM pglobby.tenants
               WHERE name = $1 AND status IN ('active', 'suspended')";
    let Some(row) = lock.client.query_opt(sql, &[&name]).await? else { return Ok(()) };
    let enter = enter.unwrap_or_else(|| row.get::<_, String>("status") == "active");
    let admin = HostAdmin::load(actor, &lock.client, row.get("host")).await?;
    let session = admin.connect().await?;
    let names: [Option<String>; 2] = [row.get("username"), row.get("ro_username")];
    for role in names.into_iter().flatten() {
        if roles::ours(&session, &role).await? {
            allow(&session, &role, enter).await?;
        }
    }
    Ok(())
}

/// Allows or forbids a role to log in. Present sessions stay.
pub async fn allow(session: &HostSession, role: &str, enter: bool) -> Result<(), AdminError> {
    let login = if enter { "LOGIN" } else { "NOLOGIN" };
    session
        .run(format!("setting {login} for role {role:?}"), &format!("ALTER ROLE {} {login}", ident(role)))
        .await
}
