//! Checks of a host's shared catalogs: one query for all its tenants' roles and databases.

use super::{CheckedTenant, Finding};
use crate::control_path::admin::{actor::AdminError, host_connection::HostSession};

/// A check: its name, the advice if no statement fixes it, and the query. Each row is a tenant, a finding,
/// and the statement that fixes it, if one is safe.
struct Question {
    check: &'static str,
    mend: &'static str,
    sql: &'static str,
}

/// Prefix of every query: `t`, the tenants of the host; `own`, their roles.
const TENANTS: &str = r"
WITH central AS (SELECT $5::text AS database), t AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $6::bool[], $7::bool[])
        AS t (tenant, database, rw, ro, suspended, given)
), own AS (
    SELECT tenant, database, rw AS role, false AS reader, suspended, given FROM t
    UNION ALL SELECT tenant, database, ro, true, suspended, false FROM t WHERE ro IS NOT NULL
)";

const QUESTIONS: [Question; 12] = [
    Question {
        check: "role_missing",
        mend: "restore the role from a backup, or drop the tenant",
        sql: r"SELECT o.tenant, format('role %I does not exist', o.role), NULL FROM own o
               WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = o.role)",
    },
    Question {
        check: "database_missing",
        mend: "restore the database from a backup, or drop the tenant",
        sql: r"SELECT t.tenant, format('database %I does not exist', t.database), NULL FROM t
               WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = t.database)",
    },
    Question {
        check: "role_power",
        mend: "",
        sql: r"SELECT o.tenant,
                   format('role %I has %s', o.role, concat_ws(', ', CASE WHEN rolsuper THEN 'SUPERUSER' END,
                       CASE WHEN rolcreatedb THEN 'CREATEDB' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
                       CASE WHEN rolreplication THEN 'REPLICATION' END, CASE WHEN rolbypassrls THEN 'BYPASSRLS' END)),
                   format('ALTER ROLE %I %s', o.role, concat_ws(' ', CASE WHEN rolsuper THEN 'NOSUPERUSER' END,
                       CASE WHEN rolcreatedb THEN 'NOCREATEDB' END, CASE WHEN rolcreaterole THEN 'NOCREATEROLE' END,
                       CASE WHEN rolreplication THEN 'NOREPLICATION' END, CASE WHEN rolbypassrls THEN 'NOBYPASSRLS' END))
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               WHERE rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls",
    },
    // Attributes that the tenant's own SQL can change, and that a suspension removes. Those of a role that
    // pglobby did not make, and its settings, are its owner's choice.
    Question {
        check: "role_changed",
        mend: "",
        sql: r"SELECT o.tenant,
                   format('role %I %s', o.role, concat_ws(', ',
                       CASE WHEN rolconnlimit >= 0 THEN format('may have no more than %s connections', rolconnlimit) END,
                       CASE WHEN rolvaliduntil < 'infinity' THEN 'has a password that ends' END,
                       CASE WHEN NOT rolcanlogin AND NOT o.suspended THEN 'may not log in' END,
                       CASE WHEN rolcanlogin AND o.suspended THEN 'may log in directly, though its tenant is suspended' END)),
                   format('ALTER ROLE %I %s CONNECTION LIMIT -1 VALID UNTIL %L', o.role,
                       CASE WHEN o.suspended THEN 'NOLOGIN' ELSE 'LOGIN' END, 'infinity')
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               WHERE NOT o.given AND (rolconnlimit >= 0 OR rolvaliduntil < 'infinity' OR rolcanlogin = o.suspended)",
    },
    Question {
        check: "role_settings",
        mend: "",
        sql: r"SELECT o.tenant,
                   format('role %I has settings of its own in %s: %s', o.role, coalesce(d.datname::text, 'all databases'),
                       string_agg(split_part(s.setting, '=', 1), ', ')),
                   CASE WHEN d.datname IS NOT NULL THEN format('ALTER ROLE %I IN DATABASE %I RESET ALL', o.role, d.datname)
                        WHEN o.reader THEN format(
                            'ALTER ROLE %1$I RESET ALL; ALTER ROLE %1$I SET default_transaction_read_only = on', o.role)
                        ELSE format('ALTER ROLE %I RESET ALL', o.role) END
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               JOIN pg_db_role_setting c ON c.setrole = r.oid LEFT JOIN pg_database d ON d.oid = c.setdatabase,
                    unnest(c.setconfig) AS s (setting)
               WHERE NOT o.given AND NOT (o.reader AND c.setdatabase = 0 AND s.setting = 'default_transaction_read_only=on')
               GROUP BY o.tenant, o.role, o.reader, d.datname
               UNION ALL
               SELECT o.tenant, format('sessions of read-only role %I are not read-only by default', o.role),
                   format('ALTER ROLE %I SET default_transaction_read_only = on', o.role)
               FROM own o JOIN pg_roles r ON r.rolname = o.role AND o.reader
               WHERE NOT EXISTS (SELECT FROM pg_db_role_setting c, unnest(c.setconfig) AS s (setting)
                   WHERE c.setrole = r.oid AND c.setdatabase = 0
                     AND split_part(s.setting, '=', 1) = 'default_transaction_read_only')",
    },
    Question {
        check: "database_changed",
        mend: "",
        sql: r"SELECT t.tenant, format('database %I takes no connections', d.datname),
                   format('ALTER DATABASE %I ALLOW_CONNECTIONS true CONNECTION LIMIT -1', d.datname)
               FROM t JOIN pg_database d ON d.datname = t.database WHERE d.datconnlimit = 0 OR NOT d.datallowconn
               UNION ALL
               SELECT o.tenant, format('role %I may not connect to its database %I', o.role, d.datname),
                   format('GRANT CONNECT%s ON DATABASE %I TO %I',
                          CASE WHEN o.reader THEN '' ELSE ', CREATE, TEMPORARY' END, d.datname, o.role)
               FROM own o JOIN pg_roles r ON r.rolname = o.role JOIN pg_database d ON d.datname = o.database
               WHERE NOT has_database_privilege(r.oid, d.oid, 'CONNECT')
               UNION ALL
               SELECT t.tenant, format('database %I takes no more than %s connections', d.datname, d.datconnlimit),
                   format('ALTER DATABASE %I CONNECTION LIMIT -1', d.datname)
               FROM t JOIN pg_database d ON d.datname = t.database AND pg_get_userbyid(d.datdba) = t.rw
               WHERE d.datconnlimit > 0
               UNION ALL
               SELECT t.tenant, format('database %I is a template, which cannot be dropped, and which others may copy', d.datname),
                   format('ALTER DATABASE %I IS_TEMPLATE false', d.datname)
               FROM t JOIN pg_database d ON d.datname = t.database AND pg_get_userbyid(d.datdba) = t.rw
               WHERE d.datistemplate
               UNION ALL
               SELECT t.tenant, format('database %I sets %s for every session', d.datname, split_part(s.setting, '=', 1)),
                   format('ALTER DATABASE %I RESET %I', d.datname, split_part(s.setting, '=', 1))
               FROM t JOIN pg_database d ON d.datname = t.database
               JOIN pg_db_role_setting c ON c.setdatabase = d.oid AND c.setrole = 0, unnest(c.setconfig) AS s (setting)
               WHERE split_part(s.setting, '=', 1)
                     IN ('local_preload_libraries', 'session_preload_libraries', 'role', 'session_authorization')",
    },
    // Dangerous memberships lead, directly or indirectly, to a role with powers, a predefined role, or the
    // role of another tenant (or, for a read-only role, of its own).
    Question {
        check: "role_membership",
        mend: "",
        sql: r"SELECT o.tenant, format('role %I is a member of %I', o.role, g.rolname),
                   format('REVOKE %I FROM %I', g.rolname, o.role)
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               JOIN pg_auth_members m ON m.member = r.oid JOIN pg_roles g ON g.oid = m.roleid
               WHERE EXISTS (
                   SELECT FROM pg_roles d WHERE pg_has_role(g.oid, d.oid, 'MEMBER') AND (
                       d.rolsuper OR d.rolcreatedb OR d.rolcreaterole OR d.rolreplication OR d.rolbypassrls
                       OR d.rolname LIKE 'pg\_%'
                       OR EXISTS (SELECT FROM own x WHERE x.role = d.rolname
                                  AND (x.tenant <> o.tenant OR (o.reader AND NOT x.reader)))))",
    },
    Question {
        check: "database_open",
        mend: "",
        sql: r"SELECT t.tenant, format('PUBLIC has %s on database %I', string_agg(a.privilege_type, ', '), d.datname),
                   format('REVOKE ALL ON DATABASE %I FROM PUBLIC', d.datname)
               FROM t JOIN pg_database d ON d.datname = t.database,
                    aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
               WHERE a.grantee = 0 GROUP BY t.tenant, d.datname",
    },
    // A database without a tenant may be the tenant's own database after a rename outside pglobby, so `--fix`
    // does not revoke access to it.
    Question {
        check: "foreign_grant",
        mend: "REVOKE it from the role; if the tenant's database was renamed, rename it back instead",
        sql: r"SELECT o.tenant,
                   format('role %I has %s on database %I', o.role, string_agg(a.privilege_type, ', '), d.datname),
                   CASE WHEN d.datname = (SELECT database FROM central) OR d.datname IN (SELECT database FROM t)
                        THEN format('REVOKE ALL ON DATABASE %I FROM %I', d.datname, o.role) END
               FROM pg_database d, aclexplode(d.datacl) a, pg_roles r, own o
               WHERE r.oid = a.grantee AND r.rolname = o.role AND d.datname <> o.database AND a.grantee <> d.datdba
               GROUP BY o.tenant, o.role, d.datname",
    },
    Question {
        check: "owns_elsewhere",
        mend: "as a superuser in that database: REASSIGN OWNED BY the role TO the intended owner",
        sql: r"SELECT o.tenant, format('role %I owns %s objects in database %I', o.role, count(*), d.datname), NULL
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               JOIN pg_shdepend s ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o'
               JOIN pg_database d ON d.oid = s.dbid AND d.datname <> o.database
               GROUP BY o.tenant, o.role, d.datname
               UNION ALL
               SELECT o.tenant,
                   format('role %I owns %s', o.role, pg_describe_object(s.classid, s.objid, s.objsubid)), NULL
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               JOIN pg_shdepend s ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o'
               WHERE s.dbid = 0 AND NOT (NOT o.reader AND s.classid = 'pg_database'::regclass AND EXISTS (
                   SELECT FROM pg_database d WHERE d.oid = s.objid AND d.datname = o.database))",
    },
    Question {
        check: "foreign_grant",
        mend: "in that database: DROP OWNED BY the role takes back all that it was granted there",
        sql: r"SELECT o.tenant,
                   format('role %I has privileges on %s objects in database %I', o.role, count(*), d.datname), NULL
               FROM own o JOIN pg_roles r ON r.rolname = o.role
               JOIN pg_shdepend s ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype <> 'o'
               JOIN pg_database d ON d.oid = s.dbid AND d.datname <> o.database
               GROUP BY o.tenant, o.role, d.datname",
    },
    Question {
        check: "reader_owns",
        mend: "in the tenant's database: REASSIGN OWNED BY the read-only role TO the other one",
        sql: r"SELECT o.tenant,
                   format('read-only role %I owns %s objects in its database, which it can write', o.role, count(*)), NULL
               FROM own o JOIN pg_roles r ON r.rolname = o.role AND o.reader
               JOIN pg_shdepend s ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid AND s.deptype = 'o'
               JOIN pg_database d ON d.oid = s.dbid AND d.datname = o.database
               GROUP BY o.tenant, o.role",
    },
];

/// Asks them all.
pub(super) async fn look(
    session: &HostSession,
    host: &str,
    central: &str,
    tenants: &[CheckedTenant],
) -> Result<Vec<Finding>, AdminError> {
    let column = |of: fn(&CheckedTenant) -> Option<&str>| tenants.iter().map(of).collect::<Vec<_>>();
    let names = column(|checked| Some(&checked.name));
    let databases = column(|checked| Some(&checked.database));
    let (writers, readers) =
        (column(|checked| Some(&checked.read_write)), column(|checked| checked.read_only.as_deref()));
    let suspended: Vec<bool> = tenants.iter().map(|checked| checked.suspended).collect();
    let given: Vec<bool> = tenants.iter().map(|checked| checked.role_given).collect();
    let mut findings = Vec::new();
    for question in &QUESTIONS {
        let sql = format!("{TENANTS} {} ORDER BY 1, 2", question.sql);
        let rows = session
            .query(
                format!("looking for {}", question.check),
                &sql,
                &[&names, &databases, &writers, &readers, &central, &suspended, &given],
            )
            .await?;
        for row in rows {
            let (tenant, detail, fix): (&str, &str, Option<String>) = (row.get(0), row.get(1), row.get(2));
            let finding = Finding::new(question.check, detail, fix.as_deref().unwrap_or(question.mend))
                .of(tenant)
                .on(host);
            findings.push(match fix {
                Some(sql) => finding.fixed_on_host(None, sql),
                None => finding,
            });
        }
    }
    Ok(findings)
}
