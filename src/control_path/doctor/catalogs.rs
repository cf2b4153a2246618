//! What a host's shared catalogs say of its tenants' roles and databases: one question each for all of them.

use super::{Cure, Finding, Patient};
use crate::control_path::{host_session::HostSession, operator::OperatorError};

/// A question: which check, what to do where no statement mends it, and the query. Each row is a tenant, what was found,
/// and the statement that mends it, if there is one that is safe.
struct Question {
    check: &'static str,
    mend: &'static str,
    sql: &'static str,
}

/// Before every query: `t`, the tenants of the host; `own`, their roles.
const TENANTS: &str = r"
WITH central AS (SELECT $5::text AS database), t AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS t (tenant, database, rw, ro)
), own AS (
    SELECT tenant, database, rw AS role, false AS reader FROM t
    UNION ALL SELECT tenant, database, ro, true FROM t WHERE ro IS NOT NULL
)";

const QUESTIONS: [Question; 9] = [
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
    // Dangerous is what leads, by however many steps, to somebody with powers, to a predefined role, or to the role of
    // another tenant (or, for a reader, of its own).
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
    // A database that is nobody's may be the tenant's own under another name, so nothing is revoked there unasked.
    Question {
        check: "foreign_grant",
        mend: "REVOKE it from the role, unless somebody has renamed the tenant's database: then name it as it was",
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
        mend: "as a superuser in that database: REASSIGN OWNED BY the role TO whom it should belong",
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
    patients: &[Patient],
) -> Result<Vec<Finding>, OperatorError> {
    let column = |of: fn(&Patient) -> Option<&str>| patients.iter().map(of).collect::<Vec<_>>();
    let tenants = column(|patient| Some(&patient.name));
    let databases = column(|patient| Some(&patient.database));
    let (writers, readers) =
        (column(|patient| Some(&patient.read_write)), column(|patient| patient.read_only.as_deref()));
    let mut findings = Vec::new();
    for question in &QUESTIONS {
        let sql = format!("{TENANTS} {} ORDER BY 1, 2", question.sql);
        let rows = session
            .query(
                format!("looking for {}", question.check),
                &sql,
                &[&tenants, &databases, &writers, &readers, &central],
            )
            .await?;
        for row in rows {
            let (tenant, detail, cure): (&str, &str, Option<String>) = (row.get(0), row.get(1), row.get(2));
            let finding = Finding::new(question.check, detail, cure.as_deref().unwrap_or(question.mend))
                .of(tenant)
                .on(host);
            findings.push(match cure {
                Some(sql) => finding.cured_by(Cure::OnHost { host: host.to_owned(), database: None, sql }),
                None => finding,
            });
        }
    }
    Ok(findings)
}
