//! Checks of template databases. A fault in a template is copied into every new tenant.

use tokio_postgres::Client;

use super::Finding;
use crate::control_path::admin::{
    actor::{Actor, AdminError},
    host_connection::{HostAdmin, HostSession},
};

/// Templates, and databases that tenants were created from.
const TEMPLATES: &str = r"
SELECT datname::text FROM pg_database
WHERE datallowconn AND (datistemplate OR datname = 'template1' OR datname = ANY ($1)) ORDER BY 1";

const OPEN_SCHEMAS: &str = r"
SELECT quote_ident(nspname) FROM pg_namespace
WHERE nspname NOT LIKE 'pg\_%' AND has_schema_privilege('public', oid, 'CREATE') ORDER BY 1";

/// Objects in template1, which are there by mistake as a rule. Extensions are intended.
const OBJECTS: &str = r"
SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid >= 16384 AND n.nspname NOT LIKE 'pg\_%' AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  AND NOT EXISTS (SELECT FROM pg_depend d
                  WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1 LIMIT 3";

pub(super) async fn look(
    actor: &Actor,
    client: &Client,
    admin: &HostAdmin,
    session: &HostSession,
) -> Result<Vec<Finding>, AdminError> {
    let used = "SELECT DISTINCT arguments ->> 'template' FROM pglobby.operations
                WHERE kind = 'create' AND arguments ->> 'host' = $1 AND arguments ->> 'template' IS NOT NULL";
    let used: Vec<String> = client.query(used, &[&admin.name]).await?.iter().map(|row| row.get(0)).collect();
    let mut findings = Vec::new();
    for template in session.texts("looking for templates", TEMPLATES, &[&used]).await? {
        if template == actor.central.database() {
            let detail = "the central database is marked as a template: every role with CREATEDB may copy it";
            let database = crate::control_path::onboarding::names::ident(&template);
            let sql = format!("ALTER DATABASE {database} IS_TEMPLATE false");
            let finding = Finding::new("template_unclean", detail, &sql).on(&admin.name);
            findings.push(finding.fixed_on_host(None, sql));
            continue;
        }
        match admin.connect_to(&template).await {
            Ok(inside) => findings.extend(look_inside(&inside, admin, &template).await?),
            Err(error) => {
                let mend = "let the host's administrator connect to it";
                findings.push(Finding::new("template_unclean", error.to_string(), mend).on(&admin.name));
            }
        }
    }
    Ok(findings)
}

async fn look_inside(
    inside: &HostSession,
    admin: &HostAdmin,
    template: &str,
) -> Result<Vec<Finding>, AdminError> {
    let mut findings = Vec::new();
    for schema in inside.texts("looking for open schemas", OPEN_SCHEMAS, &[]).await? {
        let sql = format!("REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC");
        let detail = format!("every role may create tables in schema {schema} of template {template:?}");
        let mend = format!("in database {template:?}: {sql}");
        let finding = Finding::new("template_unclean", detail, &mend).on(&admin.name);
        findings.push(finding.fixed_on_host(Some(template), sql));
    }
    if template == "template1" {
        let objects = inside.texts("looking for tables", OBJECTS, &[]).await?;
        if !objects.is_empty() {
            let detail = format!("every new database gets what is in template1: {}, …", objects.join(", "));
            let mend =
                "drop it there, or move it to a template database of its own (tenant create --template)";
            findings.push(Finding::new("template_unclean", detail, mend).on(&admin.name));
        }
    }
    Ok(findings)
}
