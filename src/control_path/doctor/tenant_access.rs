//! Checks with a tenant's own credentials: its database can be entered, other databases cannot, and the
//! read-only role cannot write.

use secrecy::SecretString;

use super::{CheckedTenant, Finding, Fix};
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        host_connection::{HostAdmin, HostSession},
    },
    onboarding::{
        grants::{self, Missing},
        names::{ident, shell_word},
    },
    secrets::seal::{SealError, SecretLocation},
};

/// Privileges that a read-only role should not have. Queried in its own session, so that PUBLIC's
/// privileges count too.
const READER_MAY: &str = r"
SELECT format('may create in schema %I', nspname)
FROM pg_namespace WHERE nspname NOT LIKE 'pg\_%' AND has_schema_privilege(oid, 'CREATE')
UNION ALL
SELECT format('may write to %I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  -- CASE, because only it keeps a sequence's question from a table.
  AND CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, 'USAGE, UPDATE')
           ELSE has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
                OR has_any_column_privilege(c.oid, 'INSERT, UPDATE') END
UNION ALL
SELECT format('may write to large object %s', m.oid)
FROM pg_largeobject_metadata m, aclexplode(m.lomacl) a
WHERE a.privilege_type = 'UPDATE' AND a.grantee IN (0, (SELECT oid FROM pg_roles WHERE rolname = CURRENT_USER))
UNION ALL
SELECT 'may make temporary tables' WHERE has_database_privilege(current_database(), 'TEMPORARY')
UNION ALL
SELECT 'may make schemas' WHERE has_database_privilege(current_database(), 'CREATE')
LIMIT 5";

/// Functions by which it can create large objects, which it could then write; only if the administrator,
/// $1, can revoke them.
const READER_MAKES_LARGE_OBJECTS: &str = r"
SELECT oid::regprocedure::text FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace AND proname IN ('lo_creat', 'lo_create', 'lo_from_bytea')
  AND has_function_privilege(oid, 'EXECUTE')
  AND EXISTS (SELECT FROM pg_roles WHERE rolname = $1 AND rolsuper)";

/// Tries logins of one tenant; `neighbour` is another tenant on the same host (or the same, if it is the
/// only one).
pub(super) async fn try_logins(
    actor: &Actor,
    admin: &HostAdmin,
    checked: &CheckedTenant,
    neighbour: &CheckedTenant,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let roles = [
        (Some(&checked.read_write), &checked.sealed, "sealed_password"),
        (checked.read_only.as_ref(), &checked.sealed_ro, "sealed_ro_password"),
    ];
    for (role, sealed, column) in roles {
        let (Some(role), Some(sealed)) = (role, sealed) else { continue };
        let row = checked.id.to_string();
        match actor.keyring.open(&SecretLocation { table: "tenants", row: &row, column }, sealed) {
            Err(error) => findings.push(does_not_open(checked, &error).on(&admin.name)),
            Ok(password) => {
                findings.extend(own_database(admin, checked, role, &password).await);
                findings.extend(other_databases(actor, admin, checked, neighbour, role, &password).await);
            }
        }
    }
    actor.report(&checked.name, "examined").await;
    findings
}

fn does_not_open(checked: &CheckedTenant, error: &SealError) -> Finding {
    // Not fixed automatically: a doctor with the wrong key ring would break every node that has the right
    // one.
    let mend = format!(
        "if this is the key ring that your nodes use: pglobby tenant rotate {}; otherwise run the doctor with the key ring of your nodes",
        shell_word(&checked.name)
    );
    Finding::new("credential_sealed", error.to_string(), &mend).of(&checked.name)
}

async fn own_database(
    admin: &HostAdmin,
    checked: &CheckedTenant,
    role: &str,
    password: &SecretString,
) -> Vec<Finding> {
    let session = match admin.prove_login(role, password, &checked.database).await {
        Ok(session) => session,
        // Correct: a suspended tenant's role may not log in at the host.
        Err(error) if checked.suspended && error.code().is_some_and(|code| code.code() == "28000") => {
            return Vec::new();
        }
        Err(error) => {
            let mend = format!("pglobby tenant rotate {}", shell_word(&checked.name));
            let wrong_password = error.code().is_some_and(|code| code.code() == "28P01");
            let finding =
                Finding::new("login_fails", error.to_string(), &mend).of(&checked.name).on(&admin.name);
            return vec![match wrong_password {
                true => finding.fixed_by(Fix::Rotate { tenant: checked.name.clone() }),
                false => finding,
            }];
        }
    };
    if checked.read_only.as_deref() != Some(role) {
        return Vec::new();
    }
    let may = reader_privileges(&session).await;
    let mut findings: Vec<_> = large_objects(admin, checked, role, &session).await.into_iter().collect();
    match grants_inside(admin, checked, role, &session).await {
        Ok(found) => findings.extend(found),
        Err(error) => {
            let mend = "fix that and run the doctor again";
            findings
                .push(Finding::new("login_fails", error.to_string(), mend).of(&checked.name).on(&admin.name));
        }
    }
    findings.extend(match may {
        Ok(may) if may.is_empty() => None,
        Ok(may) => {
            let detail = format!("read-only role {role:?} {}", may.join(", "));
            let mend = "revoke that from the role, or from PUBLIC, in the tenant's database";
            Some(Finding::new("reader_writes", detail, mend).of(&checked.name).on(&admin.name))
        }
        Err(error) => {
            let mend = "fix that and run the doctor again";
            Some(Finding::new("login_fails", error.to_string(), mend).of(&checked.name).on(&admin.name))
        }
    });
    findings
}

/// Names of a list for a finding.
const EXAMPLES: usize = 3;

fn examples(all: &[Missing]) -> String {
    let first: Vec<&str> = all.iter().take(EXAMPLES).map(|missing| missing.what.as_str()).collect();
    match all.len() {
        count if count > EXAMPLES => format!("{}, … ({count} in all)", first.join(", ")),
        _ => first.join(", "),
    }
}

/// Checks what the tenant's roles may use in its database, now and later, and what of it would make the
/// tenant's own dump fail. Called after [`reader_privileges`], which sets the search path.
async fn grants_inside(
    admin: &HostAdmin,
    checked: &CheckedTenant,
    reader: &str,
    session: &HostSession,
) -> Result<Vec<Finding>, AdminError> {
    let mut findings = Vec::new();
    if checked.adopted && !checked.rows_only {
        findings.extend(not_owned(admin, checked, session).await?);
    }
    if checked.grants_pending {
        return Ok(findings);
    }
    let finding = |check: &str, detail: String, statements: Vec<String>| {
        let mend = format!("in the tenant's database: {}", statements.first().cloned().unwrap_or_default());
        let mend = if statements.len() > 1 { mend + "; …" } else { mend };
        let finding = Finding::new(check, detail, &mend).of(&checked.name).on(&admin.name);
        finding.fixed_on_host(Some(&checked.database), statements.join(";\n"))
    };
    let statements = |all: Vec<Missing>| all.into_iter().map(|missing| missing.statement).collect();
    let writer = &checked.read_write;
    // In an adopted database others' tables are the rule.
    if !checked.adopted {
        let roles = [writer.as_str(), reader];
        let revoked = grants::defaults_of_administrator(session, &roles, &admin.user).await?;
        if !revoked.is_empty() {
            let detail = format!(
                "default privileges of the host's administrator {:?} for the tenant's roles are in database {:?}: they are in \
                 the tenant's own dump, and its role may not restore them",
                admin.user, checked.database
            );
            findings.push(finding("default_privileges", detail, revoked));
        }
        let given = grants::not_given(session, writer, reader).await?;
        if !given.is_empty() {
            let detail = format!("role {writer:?} may not use {}", examples(&given));
            findings.push(finding("not_given", detail, statements(given)));
        }
    }
    let misses = grants::reader_misses(session, writer, reader).await?;
    if !misses.is_empty() {
        let detail = format!("read-only role {reader:?} may not use {}", examples(&misses));
        findings.push(finding("reader_misses", detail, statements(misses)));
    }
    Ok(findings)
}

async fn not_owned(
    admin: &HostAdmin,
    checked: &CheckedTenant,
    session: &HostSession,
) -> Result<Option<Finding>, AdminError> {
    let tables = grants::not_owned(session, &checked.read_write).await?;
    if tables.is_empty() {
        return Ok(None);
    }
    let (role, name) = (&checked.read_write, shell_word(&checked.name));
    let detail = format!(
        "role {role:?} may not alter {} in database {:?}: migrations of them fail (must be owner)",
        tables.join(", "),
        checked.database
    );
    let mend = format!(
        "pglobby tenant drop {name} (the database stays) and adopt it again with --ownership transfer, or with --ownership none to \
         leave it so; or, if the owner is an ordinary role of this database alone: GRANT it to {}",
        ident(role)
    );
    Ok(Some(Finding::new("not_owned", detail, &mend).of(&checked.name).on(&admin.name)))
}

/// Called after [`reader_privileges`], which sets the search path.
async fn large_objects(
    admin: &HostAdmin,
    checked: &CheckedTenant,
    role: &str,
    session: &HostSession,
) -> Option<Finding> {
    let doing = "asking whether the read-only role may make large objects";
    let makers = session.texts(doing, READER_MAKES_LARGE_OBJECTS, &[&admin.user]).await.ok()?;
    if makers.is_empty() {
        return None;
    }
    let detail =
        format!("read-only role {role:?} may make large objects and write them ({})", makers.join(", "));
    let sql = grants::keep_large_objects_for(&checked.read_write);
    let mend = format!("as a superuser, in the tenant's database: {}", sql.replace('\n', " ").trim());
    let finding = Finding::new("reader_makes_large_objects", detail, &mend).of(&checked.name).on(&admin.name);
    // In an adopted database other roles may need it.
    Some(match checked.adopted {
        true => finding,
        false => finding.fixed_on_host(Some(&checked.database), sql),
    })
}

async fn reader_privileges(session: &HostSession) -> Result<Vec<String>, AdminError> {
    // The tenant may have set a search path for its database, with its own function has_table_privilege in
    // it.
    session.run("asking what the read-only role may do", "SET search_path = pg_catalog").await?;
    session.texts("asking what the read-only role may do", READER_MAY, &[]).await
}

async fn other_databases(
    actor: &Actor,
    admin: &HostAdmin,
    checked: &CheckedTenant,
    neighbour: &CheckedTenant,
    role: &str,
    password: &SecretString,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let central = (actor.central.database(), "enters_central", "the central database");
    let other = (neighbour.database.as_str(), "enters_neighbour", "another tenant's database");
    for (database, check, what) in [central, other] {
        if database != checked.database
            && let Ok(_entered) = admin.connect_as(role, Some(password), database, "").await
        {
            let detail = format!("role {role:?} can connect to {what}, {database:?}");
            let mend = "take CONNECT on it from PUBLIC and from the role; see the other findings";
            findings.push(Finding::new(check, detail, mend).of(&checked.name).on(&admin.name));
        }
    }
    findings
}
