//! Roles that a moving tenant's roles act as: the owners of an adopted database, or the role of
//! `ALTER ROLE … SET role`. They are made again on the new host, with the memberships, and own there what
//! they own on the old one.
//!
//! All objects are copied as the tenant's role's, because its session makes them. The owners get theirs
//! afterwards. A trial before clients wait, which is rolled back, shows whether that is possible.

use serde_json::Value;
use tokio_postgres::error::SqlState;

use super::{
    Work, grants,
    names::{ident, literal},
    operation::{Operation, TenantLock},
    ownership::may_grant,
    reown,
    roles::{self, MARK, Roles},
    source_host::Source,
};
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
};

/// Roles that `$1` or `$2`, the tenant's, are members of, directly or not: name; whether it, or one that it is a
/// member of, owns something here or is the role of their sessions; whether it may enter this database;
/// whether the read-only role `$2` is a member; and why it cannot be made elsewhere. `$3`: the mark of pglobby's
/// roles, `$4`: those of this tenant's operations.
const ACTS: &str = r"
WITH RECURSIVE own AS (SELECT oid FROM pg_roles WHERE rolname IN ($1, $2)),
acts AS (
    SELECT roleid AS oid FROM pg_auth_members WHERE member IN (SELECT oid FROM own)
    UNION SELECT m.roleid FROM acts JOIN pg_auth_members m ON m.member = acts.oid
), here AS (SELECT oid, datdba FROM pg_database WHERE datname = current_database()),
needed AS (
    SELECT datdba AS oid FROM here
    UNION SELECT s.refobjid FROM pg_shdepend s JOIN here ON s.dbid = here.oid
          WHERE s.refclassid = 'pg_authid'::regclass AND s.deptype = 'o' AND s.classid <> 'pg_default_acl'::regclass
    UNION SELECT g.oid FROM pg_db_role_setting c, unnest(c.setconfig) AS s (setting), pg_roles g
          WHERE c.setrole IN (SELECT oid FROM own) AND s.setting = 'role=' || g.rolname
)
SELECT r.rolname::text, EXISTS (SELECT FROM needed JOIN acts a USING (oid) WHERE pg_has_role(r.oid, a.oid, 'MEMBER')),
       r.rolcanlogin AND has_database_privilege(r.oid, here.oid, 'CONNECT'),
       EXISTS (SELECT FROM pg_roles o WHERE o.rolname = $2 AND pg_has_role(o.oid, r.oid, 'MEMBER')),
       CASE WHEN r.rolname LIKE 'pg\_%' THEN 'is PostgreSQL''s own'
            WHEN r.rolsuper OR r.rolcreatedb OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls
            THEN 'is a superuser or may make databases or roles, replicate, or bypass row security'
            WHEN r.rolname = current_user THEN 'is the host''s administrator'
            WHEN starts_with(shobj_description(r.oid, 'pg_authid'), $3)
                 AND shobj_description(r.oid, 'pg_authid') <> ALL ($4) THEN 'is a role of another tenant' END
FROM pg_roles r JOIN acts USING (oid), here WHERE r.oid NOT IN (SELECT oid FROM own) ORDER BY 1";

/// Memberships in the roles `$1` of the roles `$2`, and their options (PostgreSQL 16 and newer).
const MEMBERSHIPS: &str = r"
SELECT g.rolname::text, m.rolname::text,
       format(' WITH INHERIT %s, SET %s', bool_or((to_jsonb(a) ->> 'inherit_option')::bool),
              bool_or((to_jsonb(a) ->> 'set_option')::bool)),
       bool_or((to_jsonb(a) ->> 'set_option')::bool) IS NOT NULL
FROM pg_auth_members a JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE g.rolname = ANY ($1) AND m.rolname = ANY ($2) GROUP BY 1, 2 ORDER BY 1, 2";

/// The owners of the database and of schema public.
const OWNERS: &str = r"
SELECT pg_get_userbyid(d.datdba)::text, coalesce(pg_get_userbyid(n.nspowner)::text, '')
FROM pg_database d LEFT JOIN pg_namespace n ON n.nspname = 'public' WHERE d.datname = current_database()";

/// The attributes of a role that pglobby did not make, as the end of an ALTER ROLE.
const ATTRIBUTES: &str = r"
SELECT concat_ws(' ', CASE WHEN rolinherit THEN 'INHERIT' ELSE 'NOINHERIT' END,
                 format('CONNECTION LIMIT %s', rolconnlimit),
                 CASE WHEN rolvaliduntil IS NOT NULL THEN format('VALID UNTIL %L', rolvaliduntil) END)
FROM pg_roles WHERE rolname = $1";

/// What is carried to the new host beside the tenant's two roles.
pub(super) struct Carried {
    roles: Vec<Role>,
    memberships: Vec<Membership>,
    /// Roles that pglobby did not make and that may enter the database: the tenant's own, where the operator
    /// chose it, and owners that applications log in as. They are locked while the tenant is paused.
    lock: Vec<String>,
    /// Of a role that the operator chose.
    attributes: Option<String>,
}

struct Role {
    name: String,
    /// The read-only role acts as it, so that it gets no more than it owns.
    of_reader: bool,
}

struct Membership {
    role: String,
    member: String,
    options: Option<String>,
}

impl Carried {
    /// Finds the roles, and checks that the new host can have them.
    ///
    /// # Errors
    /// A host; or [`AdminError::Exists`] or [`AdminError::Refused`] for a role that the tenant cannot do without.
    pub async fn look(
        actor: &Actor,
        lock: &TenantLock,
        source: &Source,
        target: &HostSession,
        host: &str,
    ) -> Result<Self, AdminError> {
        let origin = source.admin.connect_to(&source.database).await?;
        let (read_write, read_only) = (&source.roles.read_write, &source.roles.read_only);
        let marks = marks(lock, source.tenant_id).await?;
        let found = origin
            .query("looking at the tenant's memberships", ACTS, &[read_write, read_only, &MARK, &marks])
            .await?;
        let names: Vec<String> = found.iter().map(|row| row.get(0)).collect();
        let asked: Vec<&str> = names.iter().chain([read_write]).map(String::as_str).collect();
        let sql = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolname = ANY ($1)";
        let taken = target.texts("looking for role names", sql, &[&asked]).await?;
        if source.role_given && taken.contains(read_write) {
            return Err(AdminError::Exists(format!(
                "there is a role {read_write:?} on host {host:?} already, and the tenant keeps the name of its role (tenant adopt \
                 --username); rename or drop that role first"
            )));
        }
        let (mut roles, mut locked) = (Vec::new(), Vec::new());
        for (row, name) in found.iter().zip(names) {
            let (needed, enters): (bool, bool) = (row.get(1), row.get(2));
            let why = match row.get::<_, Option<String>>(4) {
                Some(why) => Some(why),
                None => taken.contains(&name).then(|| format!("exists on host {host:?} already")),
            };
            match why {
                None => {
                    if enters {
                        locked.push(name.clone());
                    }
                    roles.push(Role { name, of_reader: row.get(3) });
                }
                Some(why) if needed => {
                    return Err(AdminError::Refused(format!(
                        "the tenant's role acts as role {name:?}, which owns objects in its database or is the role of its \
                         sessions, and which cannot be made on host {host:?}: it {why}. Rename or drop the role there, or let the \
                         tenant own its objects (pglobby tenant adopt --ownership transfer)"
                    )));
                }
                Some(why) => {
                    let sentence = format!("the membership in role {name:?} does not move: it {why}");
                    actor.report_note(&lock.name, &sentence).await;
                }
            }
        }
        let given_here = source.role_given && !roles::ours(&source.session, read_write).await?;
        if given_here {
            locked.push(read_write.clone());
        }
        for role in &locked {
            if !may_grant(&source.session, role).await? {
                return Err(AdminError::Refused(format!(
                    "role {role:?} must not change the database while it is copied, and the administrator of host {:?} may not \
                     lock it; GRANT it to the administrator WITH ADMIN OPTION, or register a superuser with `pglobby host set`",
                    source.admin.name
                )));
            }
        }
        let memberships = memberships(&origin, &roles, source).await?;
        let attributes = match source.role_given {
            true => origin.texts("looking at the tenant's role", ATTRIBUTES, &[read_write]).await?.pop(),
            false => None,
        };
        Ok(Self { roles, memberships, lock: locked, attributes })
    }

    /// The names of the carried roles.
    pub fn names(&self) -> Vec<&str> {
        self.roles.iter().map(|role| role.name.as_str()).collect()
    }

    /// Roles to lock on the old host; recorded as `locked`.
    pub fn locked(&self) -> &[String] {
        &self.lock
    }

    /// Makes the roles on the new host, with the operation's mark. They cannot log in.
    pub async fn make(&self, work: &Work<'_>, made: &Roles, source: &Source) -> Result<(), AdminError> {
        if self.roles.is_empty() {
            return Ok(());
        }
        let mark = literal(work.operation.argument("mark"));
        let mut sql = String::from("BEGIN;\n");
        for role in &self.roles {
            let name = ident(&role.name);
            sql += &format!(
                "CREATE ROLE {name} NOLOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;\n\
                 COMMENT ON ROLE {name} IS {mark};\n"
            );
            sql += &work.rights.join(&name);
        }
        for Membership { role, member, options } in &self.memberships {
            let member = source.on_new_host(member, made);
            let options = options.as_deref().unwrap_or(work.rights.membership_options());
            sql += &format!("GRANT {} TO {}{options};\n", ident(role), ident(member));
        }
        sql += "COMMIT";
        let done = work.session.run("making the roles that the tenant's role acts as", &sql).await;
        match done {
            Err(error) if error.code() == Some(&SqlState::DUPLICATE_OBJECT) => {
                Err(AdminError::Exists(format!("{error}; rename or drop that role first")))
            }
            done => done,
        }
    }

    /// Statements that let the roles into the new database.
    pub fn admit(&self, database: &str) -> Vec<String> {
        let owners = self.roles.iter().filter(|role| !role.of_reader);
        let grant = |role: &Role| {
            let (database, role) = (ident(database), ident(&role.name));
            format!("GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {database} TO {role}")
        };
        owners.map(grant).collect()
    }

    /// Gives the objects in the new database to the roles that own them in the old one, and settings to the
    /// tenant's roles; `trial`: rolls it back.
    pub async fn give(
        &self,
        work: &Work<'_>,
        source: &Source,
        origin: &HostSession,
        made: &Roles,
        trial: bool,
    ) -> Result<(), AdminError> {
        let inside = work.admin.connect_to(&source.database).await?;
        let mut sql = String::from("BEGIN;\n");
        if !self.roles.is_empty() {
            sql += &self.ownership(source, origin, &inside, made).await?;
        }
        for statement in source.settings(made, &self.names()).await? {
            sql += &format!("{statement};\n");
        }
        if let Some(attributes) = &self.attributes {
            sql += &format!("ALTER ROLE {} {attributes};\n", ident(&made.read_write));
        }
        sql += if trial { "ROLLBACK" } else { "COMMIT" };
        inside.run("taking owners and settings along", &sql).await
    }

    async fn ownership(
        &self,
        source: &Source,
        origin: &HostSession,
        inside: &HostSession,
        made: &Roles,
    ) -> Result<String, AdminError> {
        let mut sql = String::new();
        for role in self.roles.iter().filter(|role| !role.of_reader) {
            sql += &grants::use_everything(inside, &role.name, made).await?;
        }
        let names = self.names();
        let carried = |owner: &str| names.contains(&owner);
        for object in reown::foreign(origin, &source.roles.read_write).await? {
            if carried(&object.owner) {
                sql += &format!("{};\n", object.given_to(&object.owner));
            }
        }
        let owners = origin.query("looking at owners", OWNERS, &[]).await?;
        let Some(row) = owners.first() else { return Ok(sql) };
        let (database, public): (String, String) = (row.get(0), row.get(1));
        if carried(&public) {
            sql += &format!("ALTER SCHEMA public OWNER TO {};\n", ident(&public));
        }
        if carried(&database) {
            sql += &format!("ALTER DATABASE {} OWNER TO {};\n", ident(&source.database), ident(&database));
        }
        Ok(sql)
    }
}

async fn memberships(
    origin: &HostSession,
    roles: &[Role],
    source: &Source,
) -> Result<Vec<Membership>, AdminError> {
    let names: Vec<&str> = roles.iter().map(|role| role.name.as_str()).collect();
    let own = [source.roles.read_write.as_str(), source.roles.read_only.as_str()];
    let members: Vec<&str> = names.iter().copied().chain(own).collect();
    let rows = origin.query("looking at the tenant's memberships", MEMBERSHIPS, &[&names, &members]).await?;
    let membership = |row: &tokio_postgres::Row| Membership {
        role: row.get(0),
        member: row.get(1),
        options: row.get::<_, bool>(3).then(|| row.get(2)),
    };
    Ok(rows.iter().map(membership).collect())
}

/// The marks of all operations on the tenant.
async fn marks(lock: &TenantLock, tenant_id: i64) -> Result<Vec<String>, AdminError> {
    let sql =
        "SELECT arguments ->> 'mark' FROM pglobby.operations WHERE tenant_id = $1 AND arguments ? 'mark'";
    Ok(lock.client.query(sql, &[&tenant_id]).await?.iter().map(|row| row.get(0)).collect())
}

/// Roles that a move of the tenant made on the host of `session`: those that its roles act as, and its own.
pub(super) async fn made_by_moves(
    lock: &TenantLock,
    session: &HostSession,
    tenant_id: i64,
) -> Result<Vec<String>, AdminError> {
    let marks = marks(lock, tenant_id).await?;
    let sql = "SELECT rolname::text FROM pg_catalog.pg_roles
               WHERE pg_catalog.shobj_description(oid, 'pg_authid') = ANY ($1) ORDER BY rolname";
    session.texts("looking for roles that a move made", sql, &[&marks]).await
}

/// The roles recorded as locked on the old host.
pub(super) fn recorded_locks(operation: &Operation) -> Vec<&str> {
    operation.arguments["locked"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Lets the recorded roles log in again on the old host, after the tenant has left it.
pub(super) async fn unlock(
    admin: &HostAdmin,
    session: &HostSession,
    operation: &Operation,
) -> Result<(), AdminError> {
    let locked = recorded_locks(operation);
    let sql = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolname = ANY ($1) AND NOT rolcanlogin";
    for role in session.texts("looking for locked roles", sql, &[&locked]).await? {
        let doing = format!("letting role {role:?} log in again on host {:?}", admin.name);
        session.run(doing, &format!("ALTER ROLE {} LOGIN", ident(&role))).await?;
    }
    Ok(())
}
