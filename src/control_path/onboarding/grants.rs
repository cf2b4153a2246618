//! Privileges in a tenant's database.
//!
//! The read-only role may CONNECT, use every schema, and SELECT from every table and sequence, present and
//! future. It may create nothing, not even temporary tables or large objects, because those write to the
//! database.
//!
//! Later objects are granted by default privileges of the roles that the tenant acts as, never of the
//! administrator: pg_dump writes them into the tenant's own dump, and the tenant's role may not restore
//! those of another role. What the administrator creates in a tenant's database is given to the tenant by the
//! doctor.
//!
//! On tables that others own (in an adopted database) the tenant gets every privilege except TRIGGER: a
//! trigger's function would run as the role that writes to the table.

use super::{
    names::{ident, literal},
    roles::Roles,
};
use crate::control_path::admin::{actor::AdminError, host_connection::HostSession};

/// Statements that revoke access to the database from all roles except the tenant's. They run outside the
/// database.
pub fn close_database(database: &str, roles: &Roles) -> String {
    let (database, rw, ro) = (ident(database), ident(&roles.read_write), ident(&roles.read_only));
    format!(
        "REVOKE ALL ON DATABASE {database} FROM PUBLIC;\n\
         GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {database} TO {rw};\n\
         GRANT CONNECT ON DATABASE {database} TO {ro}"
    )
}

/// Relations of one kind in user schemas on which the administrator may grant; one line a schema.
const RELATIONS_BY_SCHEMA: &str = r"
SELECT pg_catalog.string_agg(pg_catalog.format('%I.%I', n.nspname, c.relname), ', ')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
  AND (c.relkind = 'S') = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  AND pg_catalog.pg_has_role(c.relowner, 'USAGE')
GROUP BY n.nspname";

/// A tenant's privileges on tables it does not own.
const ON_TABLES: &str = "SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES";

const SCHEMAS: &str = r"
SELECT pg_catalog.quote_ident(nspname) FROM pg_catalog.pg_namespace
WHERE nspname NOT LIKE 'pg\_%' AND nspname <> 'information_schema' AND pg_catalog.pg_has_role(nspowner, 'USAGE')";

/// Tables of owners of which the administrator is no member, without members of extensions.
const OUT_OF_REACH: &str = r"
SELECT pg_catalog.format('%I.%I of %I', n.nspname, c.relname, pg_catalog.pg_get_userbyid(c.relowner))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
  AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND NOT pg_catalog.pg_has_role(c.relowner, 'USAGE')
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                  WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
LIMIT 3";

/// Roles whose future tables the tenant may use: owners of tables, schemas or the database.
const OWNERS: &str = r"
SELECT DISTINCT r.rolname::text FROM pg_catalog.pg_roles r
WHERE pg_catalog.pg_has_role(r.oid, 'USAGE') AND r.rolname NOT LIKE 'pg\_%' AND (
      r.oid IN (SELECT datdba FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
   OR r.oid IN (SELECT nspowner FROM pg_catalog.pg_namespace WHERE oid >= 16384)
   OR r.oid IN (SELECT relowner FROM pg_catalog.pg_class WHERE oid >= 16384 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')))";

/// Grants the roles of a tenant that owns its database what they need inside it, now and in future.
///
/// # Errors
/// The host; or the read-only role could write after all.
pub async fn grant_inside(session: &HostSession, roles: &Roles) -> Result<(), AdminError> {
    let mut sql = String::from("BEGIN;\n");
    sql += &own_public_schema(session, roles).await?;
    sql += &read_everything(session, &roles.read_only).await?;
    sql += &large_objects_of(session, &roles.read_write).await?;
    sql += &future_of(&ident(&roles.read_write), None, &ident(&roles.read_only));
    sql += "COMMIT";
    session.run("granting the tenant's roles access to what is in its database", &sql).await?;
    refuse_writable_schemas(session, &roles.read_only).await
}

/// Grants an adopted tenant's roles access to everything in its database, now and in future. Owners do not
/// change. `owner`: another role whose future tables count. `transferred`: everything is the tenant's, so
/// that no other role's default privileges are needed.
///
/// # Errors
/// The host; or tables that the administrator has no right to grant.
pub async fn grant_adopted(
    session: &HostSession,
    roles: &Roles,
    owner: Option<&str>,
    transferred: bool,
) -> Result<(), AdminError> {
    refuse_out_of_reach(session).await?;
    let (rw, ro) = (ident(&roles.read_write), ident(&roles.read_only));
    let mut owners = match transferred {
        true => Vec::new(),
        false => session.texts("listing owners of tables", OWNERS, &[]).await?,
    };
    owners.extend(owner.map(str::to_owned));
    owners.sort();
    owners.dedup();
    owners.retain(|owner| *owner != roles.read_write);

    let mut sql = String::from("BEGIN;\n");
    sql += &create_everywhere(session, &roles.read_write).await?;
    for (sequences, kind) in [(false, "TABLE"), (true, "SEQUENCE")] {
        for relations in session.texts("listing tables", RELATIONS_BY_SCHEMA, &[&sequences]).await? {
            let rights = if sequences { "ALL" } else { ON_TABLES };
            sql += &format!("GRANT {rights} ON {kind} {relations} TO {rw};\n");
        }
    }
    sql += &read_everything(session, &roles.read_only).await?;
    for owner in owners {
        sql += &future_of(&ident(&owner), Some(&rw), &ro);
    }
    sql += &future_of(&rw, None, &ro);
    sql += "COMMIT";
    session.run("granting the tenant's roles access to its tables", &sql).await
}

/// Statements that let `role` create in every schema on which the administrator may grant.
pub(super) async fn create_everywhere(session: &HostSession, role: &str) -> Result<String, AdminError> {
    let role = ident(role);
    let schemas = session.texts("listing schemas", SCHEMAS, &[]).await?;
    let grant = |schema: &String| format!("GRANT USAGE, CREATE ON SCHEMA {schema} TO {role};\n");
    Ok(schemas.iter().map(grant).collect())
}

/// What the tenant's role `$1` can read and the read-only role `$2` cannot, with the statement that grants it;
/// and default privileges that are missing. Reads `pg_catalog` only. A table of which the read-only role may
/// read some columns was limited to them on purpose.
const READER_MISSES: &str = r"
WITH makers AS (
    SELECT r.oid, r.rolname FROM pg_catalog.pg_roles r
    WHERE r.rolname = $1::text OR (pg_catalog.pg_has_role($1::text, r.oid, 'MEMBER') AND NOT r.rolsuper AND r.oid IN (
        SELECT relowner FROM pg_catalog.pg_class WHERE oid >= 16384 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')))
)
SELECT pg_catalog.format('schema %I', nspname), pg_catalog.format('GRANT USAGE ON SCHEMA %I TO %I', nspname, $2::text)
FROM pg_catalog.pg_namespace
WHERE nspname NOT LIKE 'pg\_%' AND nspname <> 'information_schema'
  AND pg_catalog.has_schema_privilege($1::text, oid, 'USAGE') AND NOT pg_catalog.has_schema_privilege($2::text, oid, 'USAGE')
UNION ALL
SELECT pg_catalog.format('%s %I.%I', k.kind, n.nspname, c.relname),
       pg_catalog.format('GRANT SELECT ON %s %I.%I TO %I', k.kind, n.nspname, c.relname, $2::text)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace,
     LATERAL (SELECT CASE c.relkind WHEN 'S' THEN 'sequence' ELSE 'table' END) AS k (kind)
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  -- CASE, because only it keeps a sequence's question from a table.
  AND CASE WHEN c.relkind = 'S'
           THEN pg_catalog.has_sequence_privilege($1::text, c.oid, 'SELECT')
                AND NOT pg_catalog.has_sequence_privilege($2::text, c.oid, 'SELECT')
           ELSE pg_catalog.has_table_privilege($1::text, c.oid, 'SELECT')
                AND NOT pg_catalog.has_any_column_privilege($2::text, c.oid, 'SELECT') END
UNION ALL
SELECT pg_catalog.format('later %s of role %I', pg_catalog.lower(k.kind), m.rolname),
       pg_catalog.format('ALTER DEFAULT PRIVILEGES FOR ROLE %I GRANT %s ON %s TO %I', m.rolname, k.privilege, k.kind, $2::text)
FROM makers m, (VALUES ('n', 'USAGE', 'SCHEMAS'), ('r', 'SELECT', 'TABLES'), ('S', 'SELECT', 'SEQUENCES'))
    AS k (letter, privilege, kind)
WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_default_acl d, pg_catalog.aclexplode(d.defaclacl) a
    WHERE d.defaclrole = m.oid AND d.defaclnamespace = 0 AND d.defaclobjtype::text = k.letter
      AND pg_catalog.pg_get_userbyid(a.grantee) = $2::text AND a.privilege_type = k.privilege)";

/// Something that the read-only role may not use, in words, and the statement that grants it.
pub struct Missing {
    /// `table public.t`, `later tables of role acme_rw`.
    pub what: String,
    /// For the administrator, in the tenant's database.
    pub statement: String,
}

/// What the tenant's role can read and the read-only role cannot, now or later. Any role may ask; the
/// session's search path is `pg_catalog`.
pub async fn reader_misses(
    session: &HostSession,
    read_write: &str,
    read_only: &str,
) -> Result<Vec<Missing>, AdminError> {
    let doing = "looking for what the read-only role misses";
    let rows = session.query(doing, READER_MISSES, &[&read_write, &read_only]).await?;
    Ok(rows.iter().map(|row| Missing { what: row.get(0), statement: row.get(1) }).collect())
}

/// Default privileges for the tenant's roles `$1` that an earlier pglobby made for the administrator `$2`, as
/// statements that revoke them.
const OF_THE_ADMINISTRATOR: &str = r"
SELECT pg_catalog.format('ALTER DEFAULT PRIVILEGES FOR ROLE %I REVOKE ALL ON %s FROM %s', o.rolname,
           CASE d.defaclobjtype WHEN 'n' THEN 'SCHEMAS' WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' END,
           pg_catalog.string_agg(DISTINCT pg_catalog.quote_ident(g.rolname), ', '))
FROM pg_catalog.pg_default_acl d, pg_catalog.aclexplode(d.defaclacl) a, pg_catalog.pg_roles o, pg_catalog.pg_roles g
WHERE o.oid = d.defaclrole AND g.oid = a.grantee AND o.rolname = $2::text AND g.rolname = ANY ($1::text[])
  AND d.defaclnamespace = 0 AND d.defaclobjtype IN ('n', 'r', 'S')
GROUP BY o.rolname, d.defaclobjtype ORDER BY 1";

/// Statements that revoke default privileges which make the tenant's own dump impossible to restore for it.
pub async fn defaults_of_administrator(
    session: &HostSession,
    roles: &[&str],
    administrator: &str,
) -> Result<Vec<String>, AdminError> {
    let doing = "looking for default privileges of the administrator";
    session.texts(doing, OF_THE_ADMINISTRATOR, &[&roles, &administrator]).await
}

/// Tables that the tenant's role `$1` may not even read, without any grant, in schemas that it
/// owns; and the statements that give each to the tenant, and let the read-only role `$2` read it.
const NOT_GIVEN: &str = r"
SELECT pg_catalog.format('%I.%I of role %I', n.nspname, c.relname, pg_catalog.pg_get_userbyid(c.relowner)),
       pg_catalog.format(E'ALTER TABLE %1$I.%2$I OWNER TO %3$I;\nGRANT SELECT ON %1$I.%2$I TO %4$I',
                         n.nspname, c.relname, $1::text, $2::text)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  AND c.relacl IS NULL AND pg_catalog.pg_has_role($1::text, n.nspowner, 'USAGE')
  AND NOT pg_catalog.pg_has_role($1::text, c.relowner, 'USAGE')
  -- An extension's; a column's sequence, which follows its table.
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                  WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.objsubid = 0
                    AND (d.deptype = 'e' OR (d.deptype IN ('a', 'i') AND d.refobjsubid > 0)))
ORDER BY 1";

/// Tables that the administrator or another role created in a tenant's database without a grant.
pub async fn not_given(
    session: &HostSession,
    read_write: &str,
    read_only: &str,
) -> Result<Vec<Missing>, AdminError> {
    let rows = session.query("looking for tables of others", NOT_GIVEN, &[&read_write, &read_only]).await?;
    Ok(rows.iter().map(|row| Missing { what: row.get(0), statement: row.get(1) }).collect())
}

/// Owners of tables in an adopted database as whom the tenant's role `$1` does not act, with the number of
/// their tables.
const NOT_OWNED: &str = r"
SELECT pg_catalog.format('%s tables of role %I', count(*), pg_catalog.pg_get_userbyid(c.relowner))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND NOT pg_catalog.pg_has_role($1::text, c.relowner, 'USAGE')
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                  WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.deptype = 'e')
GROUP BY c.relowner ORDER BY 1";

/// Tables that the tenant's role may not alter.
pub async fn not_owned(session: &HostSession, read_write: &str) -> Result<Vec<String>, AdminError> {
    session.texts("looking for tables of others", NOT_OWNED, &[&read_write]).await
}

/// Refuses an adoption if its grants would fail later.
pub async fn refuse_out_of_reach(session: &HostSession) -> Result<(), AdminError> {
    let examples = session.texts("looking for tables of others", OUT_OF_REACH, &[]).await?;
    if examples.is_empty() {
        return Ok(());
    }
    Err(AdminError::Refused(format!(
        "the host's administrator may not grant access to {}, …; make it a member of their owners (GRANT owner TO \
         administrator) or register a superuser with `pglobby host set`",
        examples.join(", ")
    )))
}

/// Before PostgreSQL 15 every role may create in schema `public`.
async fn own_public_schema(session: &HostSession, roles: &Roles) -> Result<String, AdminError> {
    let sql =
        // Also of an owner that the tenant's role acts as.
        "SELECT pg_catalog.pg_get_userbyid(nspowner)::text = 'pg_database_owner'
                      OR pg_catalog.pg_has_role($1::text, nspowner, 'MEMBER'),
                      pg_catalog.pg_has_role(nspowner, 'USAGE')
               FROM pg_catalog.pg_namespace WHERE nspname = 'public'";
    let rows = session.query("looking at schema public", sql, &[&roles.read_write]).await?;
    let Some(row) = rows.first() else { return Ok(String::new()) };
    let (owned, reachable): (bool, bool) = (row.get(0), row.get(1));
    let mut sql = String::new();
    if owned || reachable {
        if !owned {
            sql += &format!("ALTER SCHEMA public OWNER TO {};\n", ident(&roles.read_write));
        }
        sql += "REVOKE CREATE ON SCHEMA public FROM PUBLIC;\n";
    }
    Ok(sql)
}

/// Functions that create large objects, which their creator may write. Every role may call them by default.
const LARGE_OBJECT_MAKERS: &str =
    "pg_catalog.lo_creat(integer), pg_catalog.lo_create(oid), pg_catalog.lo_from_bytea(oid, bytea)";

/// Statements that allow one role only to create large objects. The functions belong to the server, so only
/// a superuser may run them.
pub fn keep_large_objects_for(role: &str) -> String {
    format!(
        "REVOKE EXECUTE ON FUNCTION {LARGE_OBJECT_MAKERS} FROM PUBLIC;\n\
         GRANT EXECUTE ON FUNCTION {LARGE_OBJECT_MAKERS} TO {};\n",
        ident(role)
    )
}

async fn large_objects_of(session: &HostSession, role: &str) -> Result<String, AdminError> {
    let superuser = session.rights().await?.superuser;
    Ok(if superuser { keep_large_objects_for(role) } else { String::new() })
}

async fn read_everything(session: &HostSession, role: &str) -> Result<String, AdminError> {
    let role = ident(role);
    let mut sql = String::new();
    for schema in session.texts("listing schemas", SCHEMAS, &[]).await? {
        sql += &format!("GRANT USAGE ON SCHEMA {schema} TO {role};\n");
    }
    for (sequences, kind) in [(false, "TABLE"), (true, "SEQUENCE")] {
        for relations in session.texts("listing tables", RELATIONS_BY_SCHEMA, &[&sequences]).await? {
            sql += &format!("GRANT SELECT ON {kind} {relations} TO {role};\n");
        }
    }
    Ok(sql)
}

/// Statements that let `owner`, a role that the tenant's role acts as, use everything in the database, and the
/// tenant's roles use what it will create.
pub(super) async fn use_everything(
    session: &HostSession,
    owner: &str,
    roles: &Roles,
) -> Result<String, AdminError> {
    let mut sql = create_everywhere(session, owner).await?;
    let owner = ident(owner);
    for (sequences, kind) in [(false, "TABLE"), (true, "SEQUENCE")] {
        for relations in session.texts("listing tables", RELATIONS_BY_SCHEMA, &[&sequences]).await? {
            let rights = if sequences { "ALL" } else { ON_TABLES };
            sql += &format!("GRANT {rights} ON {kind} {relations} TO {owner};\n");
        }
    }
    Ok(sql + &future_of(&owner, Some(&ident(&roles.read_write)), &ident(&roles.read_only)))
}

/// Default privileges on objects that `owner` will create in this database. All names quoted.
fn future_of(owner: &str, user: Option<&str>, reader: &str) -> String {
    let default = format!("ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT");
    let mut sql = format!(
        "{default} USAGE ON SCHEMAS TO {reader};\n\
         {default} SELECT ON TABLES TO {reader};\n\
         {default} SELECT ON SEQUENCES TO {reader};\n"
    );
    if let Some(user) = user {
        sql += &format!(
            "{default} USAGE, CREATE ON SCHEMAS TO {user};\n\
             {default} {ON_TABLES} ON TABLES TO {user};\n\
             {default} ALL ON SEQUENCES TO {user};\n"
        );
    }
    sql
}

/// Checks that no schema lets every role create, since the read-only role may not write.
async fn refuse_writable_schemas(session: &HostSession, role: &str) -> Result<(), AdminError> {
    let sql = format!(
        r"SELECT nspname::text FROM pg_catalog.pg_namespace WHERE nspname NOT LIKE 'pg\_%'
          AND pg_catalog.has_schema_privilege({}, oid, 'CREATE')",
        literal(role)
    );
    match session.texts("checking the read-only role", &sql, &[]).await?.first() {
        None => Ok(()),
        Some(schema) => Err(AdminError::Refused(format!(
            "every role may create tables in schema {schema:?} of the template, read-only roles included; as a superuser, \
             in the template database: REVOKE CREATE ON SCHEMA {0} FROM PUBLIC; ALTER SCHEMA {0} OWNER TO the host's \
             administrator",
            ident(schema)
        ))),
    }
}
