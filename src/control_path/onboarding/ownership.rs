//! What an adopted tenant's role may do with what other roles own in its database.
//!
//! Migrations alter and drop tables, which only an owner may. So the tenant's role becomes a member of the
//! owners, or the owner itself. A membership gives all that the owner may do, in every database. So it is
//! granted only for roles without powers that have to do with this database alone.

use std::{collections::BTreeMap, str::FromStr};

use serde_json::Value;

use super::{
    Work, grants,
    names::{ident, shell_word},
    operation::{Operation, TenantLock},
    reown,
    roles::MARK,
};
use crate::control_path::admin::{
    actor::AdminError,
    host_connection::{HostAdmin, HostSession},
};

/// What the tenant's role becomes to what others own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// A member of the owners.
    Membership,
    /// The owner.
    Transfer,
    /// Nothing: it may read and write rows.
    None,
}

impl Ownership {
    fn word(self) -> &'static str {
        match self {
            Self::Membership => "membership",
            Self::Transfer => "transfer",
            Self::None => "none",
        }
    }
}

impl FromStr for Ownership {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        [Self::Membership, Self::Transfer, Self::None]
            .into_iter()
            .find(|ownership| ownership.word() == word)
            .ok_or_else(|| "ownership is membership, transfer or none".to_owned())
    }
}

/// The word for the record; null for the default.
pub fn recorded(ownership: Option<Ownership>) -> Value {
    ownership.map(Ownership::word).into()
}

/// What was done, for the answer.
#[derive(Debug, Clone, Default)]
pub struct Owned {
    /// Owners that the tenant's role is a member of.
    pub member_of: Vec<String>,
    /// How many objects were given to it.
    pub transferred: i64,
    /// Sentences about what it may not do.
    pub notes: Vec<String>,
}

/// Owners of anything in the database, and role `$1`. Objects of the bootstrap superuser and of extensions do
/// not count here.
const OWNERS: &str = r"
SELECT r.rolname::text FROM pg_catalog.pg_roles r
WHERE r.rolname NOT LIKE 'pg\_%' AND (r.rolname = $1::text
   OR r.oid IN (SELECT datdba FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
   OR r.oid IN (SELECT nspowner FROM pg_catalog.pg_namespace WHERE oid >= 16384 OR nspname = 'public')
   OR r.oid IN (SELECT s.refobjid FROM pg_catalog.pg_shdepend s
                JOIN pg_catalog.pg_database d ON d.oid = s.dbid AND d.datname = pg_catalog.current_database()
                WHERE s.refclassid = 'pg_authid'::regclass AND s.deptype = 'o' AND s.classid <> 'pg_default_acl'::regclass
                  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e
                                  WHERE e.classid = s.classid AND e.objid = s.objid AND e.deptype = 'e')))
ORDER BY 1";

/// Why a tenant must not act as role `$1`; no row if it may. `$2`: the mark of pglobby's roles. What the role
/// is a member of counts as its own.
const OBSTACLES: &str = r"
WITH acts AS (
    SELECT p.* FROM pg_catalog.pg_roles r JOIN pg_catalog.pg_roles p ON pg_catalog.pg_has_role(r.oid, p.oid, 'MEMBER')
    WHERE r.rolname = $1::text
), here AS (SELECT oid, datname FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
SELECT why FROM (
    SELECT 1, 'it is the host''s administrator' WHERE $1::text = current_user
    UNION ALL (SELECT 2, pg_catalog.format('it is or acts as %I, which is a superuser or may make databases or roles, '
                          'replicate, or bypass row security', rolname) FROM acts
    WHERE rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls ORDER BY rolname <> $1::text LIMIT 1)
    UNION ALL (SELECT 3, pg_catalog.format('it acts as %I', rolname) FROM acts
    WHERE rolname LIKE 'pg\_%' AND rolname <> 'pg_database_owner' LIMIT 1)
    UNION ALL (SELECT 4, pg_catalog.format('%I is a role of another tenant', rolname) FROM acts
    WHERE pg_catalog.starts_with(pg_catalog.shobj_description(oid, 'pg_authid'), $2::text) LIMIT 1)
    UNION ALL (SELECT 5, pg_catalog.format('%I owns database %I as well', acts.rolname, d.datname)
    FROM acts JOIN pg_catalog.pg_database d ON d.datdba = acts.oid WHERE d.oid NOT IN (SELECT oid FROM here) LIMIT 1)
    UNION ALL (SELECT 6, pg_catalog.format('%I owns objects or has privileges in database %I as well', acts.rolname, d.datname)
    FROM acts JOIN pg_catalog.pg_shdepend s ON s.refobjid = acts.oid AND s.refclassid = 'pg_authid'::regclass
    JOIN pg_catalog.pg_database d ON d.oid = CASE WHEN s.classid = 'pg_database'::regclass THEN s.objid ELSE s.dbid END
    WHERE d.oid NOT IN (SELECT oid FROM here) LIMIT 1)
) AS obstacles (place, why) ORDER BY place LIMIT 1";

/// Roles of other tenants that act as role `$1`, or as the owner of the database. `$2`: the mark.
const SHARED: &str = r"
SELECT pg_catalog.format('%I acts as %I', t.rolname, o.rolname) FROM pg_catalog.pg_roles t, pg_catalog.pg_roles o
WHERE pg_catalog.starts_with(pg_catalog.shobj_description(t.oid, 'pg_authid'), $2::text) AND NOT t.rolsuper AND t.oid <> o.oid
  AND (o.rolname = $1::text
       OR o.oid IN (SELECT datdba FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
  AND pg_catalog.pg_has_role(t.oid, o.oid, 'MEMBER') LIMIT 1";

/// Whether the administrator may grant membership in role `$1`. Until 15 CREATEROLE was enough.
const MAY_GRANT: &str = r"
SELECT a.rolsuper OR pg_catalog.current_setting('server_version_num')::int < 160000
       OR pg_catalog.pg_has_role($1::text, 'MEMBER WITH ADMIN OPTION')
FROM pg_catalog.pg_roles a WHERE a.rolname = current_user";

/// Settings that decide the role of a session, of role `$1` if it is given, else of the database `$2`; and the
/// statement that makes each again.
const IDENTITY_SETTINGS: &str = r"
SELECT k.key, pg_catalog.format('ALTER DATABASE %I SET %I TO %L', coalesce(d.datname, ''), k.key,
                                pg_catalog.substr(s.setting, pg_catalog.strpos(s.setting, '=') + 1))
FROM pg_catalog.pg_db_role_setting c LEFT JOIN pg_catalog.pg_roles r ON r.oid = c.setrole
LEFT JOIN pg_catalog.pg_database d ON d.oid = c.setdatabase,
     unnest(c.setconfig) AS s (setting), LATERAL (SELECT pg_catalog.split_part(s.setting, '=', 1)) AS k (key)
WHERE k.key IN ('role', 'session_authorization') AND (d.datname IS NULL OR d.datname = $2::text)
  AND CASE WHEN $1::text IS NULL THEN c.setrole = 0 ELSE r.rolname = $1::text END";

/// Resets what the database sets about the role of a session: a member of the owners would become another
/// role at login. Returns what to tell.
pub(super) async fn reset_identity(work: &mut Work<'_>, database: &str) -> Result<Vec<String>, AdminError> {
    let doing = "looking at the database's settings";
    let rows = work.session.query(doing, IDENTITY_SETTINGS, &[&None::<&str>, &database]).await?;
    let set: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    if set.is_empty() {
        return Ok(Vec::new());
    }
    let again: Vec<&str> = set.iter().map(|(_, statement)| statement.as_str()).collect();
    work.operation.arguments["settings"] = again.into();
    work.operation.remember(&work.lock).await?;
    for (key, _) in &set {
        let sql = format!("ALTER DATABASE {} RESET {}", ident(database), ident(key));
        work.session.run("resetting what decides the role of a session", &sql).await?;
    }
    let note = |(key, statement): (String, String)| {
        format!(
            "the database's setting {key} is reset, because it decides the role of a session; it was: {statement}"
        )
    };
    Ok(set.into_iter().map(note).collect())
}

async fn first(
    session: &HostSession,
    doing: &str,
    sql: &str,
    role: &str,
) -> Result<Option<String>, AdminError> {
    Ok(session.texts(doing, sql, &[&role, &MARK]).await?.into_iter().next())
}

/// Whether the administrator may lock the role, change its password, or make others its members.
pub(super) async fn may_grant(session: &HostSession, role: &str) -> Result<bool, AdminError> {
    let rows = session.query("looking at the administrator's rights", MAY_GRANT, &[&role]).await?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

/// Refuses a database that another tenant's role could enter as its owner.
pub(super) async fn refuse_shared(inside: &HostSession, given: Option<&str>) -> Result<(), AdminError> {
    let role = given.unwrap_or_default();
    match first(inside, "looking for other tenants' roles", SHARED, role).await? {
        None => Ok(()),
        Some(who) => Err(AdminError::Refused(format!(
            "role {who}, so that another tenant could enter this database; REVOKE that membership first"
        ))),
    }
}

/// Checks that an existing role can be the tenant's. `keeps_password`: its password is known.
pub(super) async fn check_given(
    work: &Work<'_>,
    inside: &HostSession,
    role: &str,
    keeps_password: bool,
) -> Result<(), AdminError> {
    let host = &work.admin.name;
    let sql = "SELECT rolcanlogin FROM pg_catalog.pg_roles WHERE rolname = $1";
    let rows = inside.query("looking at the role", sql, &[&role]).await?;
    let refuse = |why: &str| {
        Err(AdminError::Refused(format!(
            "role {role:?} on host {host:?} cannot be the tenant's: {why}; leave --username out, and a role is made"
        )))
    };
    match rows.first().map(|row| row.get::<_, bool>(0)) {
        None => return refuse("there is no such role"),
        Some(false) => return refuse("it may not log in (ALTER ROLE … LOGIN)"),
        Some(true) => {}
    }
    let sql = "SELECT name FROM pglobby.tenants
               WHERE host = $1 AND $2 IN (username, ro_username) AND status <> 'dropped' AND id <> $3";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
        [host, &role, &work.operation.tenant_id];
    if let Some(row) = work.lock.client.query_opt(sql, &parameters).await? {
        return refuse(&format!("it is the role of tenant {:?}", row.get::<_, String>(0)));
    }
    if let Some(why) = first(inside, "looking at the role", OBSTACLES, role).await? {
        return refuse(&why);
    }
    let database = work.operation.argument("database");
    let settings = inside.query("looking at the role", IDENTITY_SETTINGS, &[&Some(role), &database]).await?;
    if let Some(row) = settings.first() {
        let key: String = row.get(0);
        return refuse(&format!(
            "its sessions become another role (ALTER ROLE … SET {key}); RESET that, and the role becomes a member of the owners"
        ));
    }
    if !keeps_password && !may_grant(inside, role).await? {
        return refuse("the host's administrator may not change its password; give its password");
    }
    Ok(())
}

/// Lets `role` act as the owners, as `wanted` says. What undoing needs is recorded before it is done.
///
/// # Errors
/// The host; or a membership or transfer that was asked for and is not possible.
pub(super) async fn take(
    work: &mut Work<'_>,
    inside: &HostSession,
    role: &str,
    owner: Option<&str>,
    wanted: Option<Ownership>,
) -> Result<Owned, AdminError> {
    let mut owned = Owned::default();
    match wanted {
        Some(Ownership::None) => {}
        Some(Ownership::Transfer) => owned.transferred = transfer(work, inside, role).await?,
        None | Some(Ownership::Membership) => {
            let owners = inside.texts("listing owners", OWNERS, &[&owner]).await?;
            let mut refused = BTreeMap::new();
            for owner in owners.into_iter().filter(|owner| owner != role) {
                match obstacle(inside, &owner).await? {
                    None => owned.member_of.push(owner),
                    Some(why) => {
                        refused.insert(owner, why);
                    }
                }
            }
            join(work, role, &owned.member_of).await?;
            if let (Some(_), Some((owner, why))) = (wanted, refused.iter().next()) {
                return Err(AdminError::Refused(format!(
                    "the tenant's role cannot be a member of {owner:?}: {why}; use --ownership transfer, or leave the option \
                     out to be a member of the others only"
                )));
            }
        }
    }
    let name = shell_word(&work.lock.name).into_owned();
    for (owner, count) in left(inside, role, &owned.member_of).await? {
        let why = match obstacle(inside, &owner).await? {
            Some(why) if wanted != Some(Ownership::None) => format!(" ({why})"),
            _ => String::new(),
        };
        owned.notes.push(format!(
            "{count} objects belong to role {owner:?}, of which the tenant's role is no member{why}: it may read and write rows of \
             these tables, and migrations of them fail (must be owner). To make the tenant's role their owner: pglobby tenant \
             drop {name} (the database stays), and adopt again with --ownership transfer"
        ));
    }
    Ok(owned)
}

async fn obstacle(inside: &HostSession, owner: &str) -> Result<Option<String>, AdminError> {
    if let Some(why) = first(inside, "looking at an owner", OBSTACLES, owner).await? {
        return Ok(Some(why));
    }
    let why = "the host's administrator has no ADMIN OPTION on it";
    Ok((!may_grant(inside, owner).await?).then(|| why.to_owned()))
}

/// Owners that `role` does not act as, and how much each owns.
async fn left(
    inside: &HostSession,
    role: &str,
    member_of: &[String],
) -> Result<BTreeMap<String, usize>, AdminError> {
    let mut left = BTreeMap::new();
    for object in reown::foreign(inside, role).await? {
        if !member_of.contains(&object.owner) {
            *left.entry(object.owner).or_default() += 1;
        }
    }
    Ok(left)
}

async fn join(work: &mut Work<'_>, role: &str, owners: &[String]) -> Result<(), AdminError> {
    if owners.is_empty() {
        return Ok(());
    }
    work.operation.arguments["joined"] = owners.into();
    work.operation.arguments["role"] = role.into();
    work.operation.remember(&work.lock).await?;
    let names: Vec<String> = owners.iter().map(|owner| ident(owner)).collect();
    let options = work.rights.membership_options();
    let sql = format!("GRANT {} TO {}{options}", names.join(", "), ident(role));
    work.session.run("making the tenant's role a member of the owners", &sql).await
}

async fn transfer(work: &mut Work<'_>, inside: &HostSession, role: &str) -> Result<i64, AdminError> {
    let public = "SELECT pg_catalog.pg_get_userbyid(nspowner)::text FROM pg_catalog.pg_namespace WHERE nspname = 'public'";
    let public = inside.texts("looking at schema public", public, &[]).await?;
    let public = public.into_iter().find(|owner| owner != role);
    let mut back: Vec<String> =
        public.iter().map(|owner| format!("ALTER SCHEMA public OWNER TO {}", ident(owner))).collect();
    back.extend(reown::foreign(inside, role).await?.iter().map(|object| object.given_to(&object.owner)));
    work.operation.arguments["give_back"] = back.into();
    work.operation.remember(&work.lock).await?;
    // An administrator that is no superuser gives only what the new owner could make itself.
    let mut sql = grants::create_everywhere(inside, role).await?;
    if public.is_some() {
        sql += &format!("ALTER SCHEMA public OWNER TO {};\n", ident(role));
    }
    inside.run("making the tenant's role the owner of schema public", &sql).await?;
    let count = reown::reown(inside, role).await? + usize::from(public.is_some());
    Ok(i64::try_from(count).unwrap_or(i64::MAX))
}

/// Undoes [`take`] after an adoption that failed.
pub(super) async fn give_back(
    admin: &HostAdmin,
    session: &HostSession,
    operation: &Operation,
) -> Result<(), AdminError> {
    let back: Vec<&str> =
        operation.arguments["give_back"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !back.is_empty() {
        let inside = admin.connect_to(operation.argument("database")).await?;
        let sql = format!("BEGIN;\n{};\nCOMMIT", back.join(";\n"));
        inside.run("giving objects back to their owners", &sql).await?;
    }
    for sql in operation.arguments["settings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        session.run("restoring the database's settings", sql).await?;
    }
    leave(session, &operation.arguments).await
}

/// Revokes memberships that pglobby granted to a role that stays.
async fn leave(session: &HostSession, arguments: &Value) -> Result<(), AdminError> {
    let Some(role) = arguments["role"].as_str() else { return Ok(()) };
    let joined = arguments["joined"].as_array().into_iter().flatten().filter_map(Value::as_str);
    // A role that is gone has no members.
    let sql = "SELECT g.rolname::text FROM pg_catalog.pg_auth_members m
               JOIN pg_catalog.pg_roles g ON g.oid = m.roleid JOIN pg_catalog.pg_roles r ON r.oid = m.member
               WHERE r.rolname = $1 AND g.rolname = ANY ($2)";
    let joined: Vec<&str> = joined.collect();
    let owners = session.query("looking at memberships", sql, &[&role, &joined]).await?;
    for owner in owners {
        let sql = format!("REVOKE {} FROM {}", ident(owner.get(0)), ident(role));
        session.run("ending a membership in an owner", &sql).await?;
    }
    Ok(())
}

/// The same when the tenant is dropped.
pub(super) async fn leave_owners(
    lock: &TenantLock,
    session: &HostSession,
    tenant_id: i64,
) -> Result<(), AdminError> {
    let sql = "SELECT arguments FROM pglobby.operations WHERE tenant_id = $1 AND kind = 'adopt' ORDER BY id DESC LIMIT 1";
    match lock.client.query_opt(sql, &[&tenant_id]).await? {
        Some(row) => leave(session, &row.get(0)).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ownership_is_one_of_three_words() {
        for ownership in [Ownership::Membership, Ownership::Transfer, Ownership::None] {
            assert_eq!(ownership.word().parse(), Ok(ownership));
        }
        assert!("app".parse::<Ownership>().is_err());
        assert_eq!(recorded(None), Value::Null);
    }
}
