//! `pglobby doctor`: checks that tenants are isolated from each other, and says how to fix what is wrong.
//!
//! The catalogs of each host are queried ([`catalogs`], [`templates`]). Logins are tried for each tenant
//! over real connections ([`tenant_access`]). The examination changes nothing. With `--fix` safe fixes
//! ([`Fix`]) are applied, and everything is examined again, so that the report shows the result.

mod catalogs;
mod fix;
mod templates;
mod tenant_access;

use std::{collections::BTreeMap, pin::pin};

use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use tokio_postgres::{Client, Row};

use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        fields::from_row,
        host_budget::{self, BudgetTrouble},
        host_connection::{HostAdmin, HostSession},
        tenants::missing,
    },
    fleet::nodes,
    init::open_to_public,
    onboarding::names::shell_word,
};

/// Tenants examined at a time; each uses one or two connections to its host.
const TENANTS_AT_ONCE: usize = 4;

/// How often `--fix` fixes and looks again: what is inside a database shows when its roles can enter it.
const ROUNDS: usize = 2;

/// A finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its kind, a fixed word for scripts: `database_open`, `role_power`, ….
    pub check: String,
    /// The tenant concerned; `None`: all tenants.
    pub tenant: Option<String>,
    /// Where.
    pub host: Option<String>,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub mend: String,
    /// Whether `--fix` fixes it.
    pub fixable: bool,
    #[serde(skip)]
    fix: Option<Fix>,
}

/// A fix that harms no legitimate use.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fix {
    /// A statement for the host's administrator; `database: None`: its own database.
    OnHost { host: String, database: Option<String>, sql: String },
    /// A statement for the central database.
    Central { sql: String },
    /// New passwords.
    Rotate { tenant: String },
}

/// The report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether no finding is left.
    pub ok: bool,
    /// Tenants looked at.
    pub tenants: usize,
    /// Hosts looked at.
    pub hosts: usize,
    /// What is wrong now.
    pub findings: Vec<Finding>,
    /// Findings that `--fix` has fixed.
    pub fixed: Vec<Finding>,
}

#[derive(Debug, Clone)]
struct CheckedTenant {
    id: i64,
    name: String,
    database: String,
    read_write: String,
    read_only: Option<String>,
    sealed: Option<Vec<u8>>,
    sealed_ro: Option<Vec<u8>>,
    suspended: bool,
    adopted: bool,
    grants_pending: bool,
    role_given: bool,
    /// The operator chose that its role does not act as the owners.
    rows_only: bool,
}

/// Examines `wanted` tenants (empty: all), hosts and the central database; applies safe fixes if `fix`.
///
/// # Errors
/// The central database, or a tenant that does not exist. A host that cannot be reached is a finding.
pub async fn examine(actor: &Actor, wanted: &[String], fix: bool) -> Result<Report, AdminError> {
    let mut report = look(actor, wanted).await?;
    let (mut tried, mut refused) = (Vec::new(), BTreeMap::new());
    let key = |finding: &Finding| (finding.check.clone(), finding.detail.clone());
    for _ in 0..if fix { ROUNDS } else { 0 } {
        let fixable = report.findings.iter().filter(|finding| finding.fix.is_some());
        let fixable: Vec<Finding> =
            fixable.filter(|finding| !refused.contains_key(&key(finding))).cloned().collect();
        if fixable.is_empty() {
            break;
        }
        for finding in &fixable {
            if let Err(error) = self::fix::apply(actor, finding).await {
                refused.insert(key(finding), error.to_string());
            }
        }
        tried.extend(fixable);
        report = look(actor, wanted).await?;
    }
    for finding in &mut report.findings {
        if let Some(why) = refused.get(&key(finding)) {
            finding.mend = format!("{} (--fix could not: {why})", finding.mend);
        }
    }
    let left: Vec<_> = report.findings.iter().map(key).collect();
    tried.retain(|finding| !left.contains(&key(finding)));
    report.fixed = tried;
    Ok(report)
}

async fn look(actor: &Actor, wanted: &[String]) -> Result<Report, AdminError> {
    let client = actor.central.client().await?;
    let mut report = Report { findings: central(actor, &client).await?, ..Report::default() };
    report.findings.extend(unfinished(&client).await?);
    report.findings.extend(nodes_differ(actor).await?);
    let by_host = checked_tenants(&client).await?;
    for name in wanted {
        if !by_host.values().flatten().any(|checked| checked.name == *name) {
            return Err(missing(actor, &**client, name).await);
        }
    }
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);

    let all = by_host.values().flatten().filter(|checked| is_wanted(&checked.name)).count();
    let mut looked_at = (0, all);
    actor.report_part("tenants", 0, all).await;
    for (host, checked_tenants) in &by_host {
        report.hosts += 1;
        report.tenants += checked_tenants.iter().filter(|checked| is_wanted(&checked.name)).count();
        match look_at_host(actor, &client, host, checked_tenants, &is_wanted, &mut looked_at).await {
            Ok(found) => report.findings.extend(found),
            Err(error) => report.findings.push(
                Finding::new(
                    "host_unreachable",
                    error.to_string(),
                    "fix it and run the doctor again; its tenants were not examined",
                )
                .on(host),
            ),
        }
    }
    report.findings.retain(|finding| finding.tenant.as_deref().is_none_or(is_wanted));
    report.ok = report.findings.is_empty();
    Ok(report)
}

/// An older schema has no list of nodes.
async fn nodes_differ(actor: &Actor) -> Result<Option<Finding>, AdminError> {
    let nodes = match nodes::list(&actor.central).await {
        Err(AdminError::Refused(_)) => return Ok(None),
        nodes => nodes?,
    };
    let finding = |differences: String| {
        let mend = match nodes::keys_differ(&nodes) {
            true => "give every node the same key ring and reload it; see `pglobby node list`",
            false => "finish the rollout, or go back; see `pglobby node list`",
        };
        Finding::new("nodes_differ", differences, mend)
    };
    Ok(nodes::differences(&nodes).map(finding))
}

/// A host without a budget is no finding: `check` and `serve` tell of it.
async fn budget(client: &Client, session: &HostSession, host: &str) -> Result<Option<Finding>, AdminError> {
    let sql = "SELECT max_connections FROM pglobby.hosts WHERE name = $1";
    let budget: Option<i32> = client.query_one(sql, &[&host]).await?.get(0);
    let limits = host_budget::look(client, session, host).await?;
    let Some(trouble @ BudgetTrouble::AboveServer { budget }) = limits.trouble(budget) else {
        return Ok(None);
    };
    let detail = format!("{}: {budget}, and the server has {}", trouble.event(), limits.in_words());
    Ok(Some(Finding::new("budget_too_high", detail, &limits.remedy(host)).on(host)))
}

async fn look_at_host(
    actor: &Actor,
    client: &Client,
    host: &str,
    checked_tenants: &[CheckedTenant],
    is_wanted: &impl Fn(&str) -> bool,
    looked_at: &mut (usize, usize),
) -> Result<Vec<Finding>, AdminError> {
    let admin = HostAdmin::load(actor, client, host).await?;
    let session = admin.connect().await?;
    let mut findings = catalogs::look(&session, host, actor.central.database(), checked_tenants).await?;
    findings.extend(templates::look(actor, client, &admin, &session).await?);
    findings.extend(budget(client, &session, host).await?);
    drop(session);

    let neighbours = checked_tenants.iter().cycle().skip(1);
    let wanted = checked_tenants.iter().zip(neighbours).filter(|(checked, _)| is_wanted(&checked.name));
    let tried = stream::iter(wanted)
        .map(|(checked, neighbour)| self::tenant_access::try_logins(actor, &admin, checked, neighbour))
        .buffered(TENANTS_AT_ONCE);
    let mut tried = pin!(tried);
    while let Some(found) = tried.next().await {
        findings.extend(found);
        looked_at.0 += 1;
        actor.report_part("tenants", looked_at.0, looked_at.1).await;
    }
    Ok(findings)
}

/// Tenants with roles and a database, by host. Hosts without tenants are included for their templates.
async fn checked_tenants(client: &Client) -> Result<BTreeMap<String, Vec<CheckedTenant>>, AdminError> {
    let sql = "SELECT h.name AS host, t.id, t.name, t.database, t.username AS read_write,
                      t.ro_username AS read_only, t.sealed_password AS sealed,
                      t.sealed_ro_password AS sealed_ro, t.status = 'suspended' AS suspended, t.adopted, t.grants_pending,
                      t.role_given, coalesce((SELECT o.arguments ->> 'ownership' = 'none' FROM pglobby.operations o
                          WHERE o.tenant_id = t.id AND o.kind = 'adopt' ORDER BY o.id DESC LIMIT 1), false) AS rows_only
               FROM pglobby.hosts h
               LEFT JOIN pglobby.tenants t ON t.host = h.name AND t.status IN ('active', 'suspended')
               ORDER BY h.name, t.name";
    let mut by_host: BTreeMap<String, Vec<CheckedTenant>> = BTreeMap::new();
    for row in client.query(sql, &[]).await? {
        let checked_tenants = by_host.entry(row.get("host")).or_default();
        if row.get::<_, Option<i64>>("id").is_some() {
            checked_tenants.push(checked(&row));
        }
    }
    Ok(by_host)
}

fn checked(row: &Row) -> CheckedTenant {
    from_row!(row => CheckedTenant {
        id, name, database, read_write, read_only, sealed, sealed_ro, suspended, adopted, grants_pending,
        role_given, rows_only
    })
}

async fn central(actor: &Actor, client: &Client) -> Result<Vec<Finding>, AdminError> {
    let mut findings = Vec::new();
    if open_to_public(client).await? {
        let database = crate::control_path::onboarding::names::ident(actor.central.database());
        let sql = format!("REVOKE CONNECT, TEMPORARY ON DATABASE {database} FROM PUBLIC");
        let detail = format!("every role may connect to the central database {database}");
        findings.push(Finding::new("central_open", detail, &sql).fixed_by(Fix::Central { sql: sql.clone() }));
    }
    let open = "SELECT pg_catalog.has_schema_privilege('public', 'pglobby', 'USAGE')";
    if client.query_one(open, &[]).await?.get(0) {
        let sql = "REVOKE ALL ON SCHEMA pglobby FROM PUBLIC".to_owned();
        let detail = "every role that is in the central database may use its schema pglobby";
        findings.push(Finding::new("central_open", detail, &sql).fixed_by(Fix::Central { sql: sql.clone() }));
    }
    Ok(findings)
}

/// Interrupted operations. Running ones hold a lock and are left out.
async fn unfinished(client: &Client) -> Result<Vec<Finding>, AdminError> {
    let sql = "SELECT t.name, o.kind, o.step, o.error FROM pglobby.operations o
               JOIN pglobby.tenants t ON t.id = o.tenant_id
               WHERE o.status IN ('running', 'failed')
                 AND pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended('pglobby tenant ' || t.name, 0))
               ORDER BY t.name";
    let finding = |row: &Row| {
        let (name, kind, step): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let why = row.get::<_, Option<String>>(3).map(|error| format!(": {error}")).unwrap_or_default();
        let word = shell_word(&name);
        let mend = match kind.as_str() {
            "create" | "adopt" => {
                format!("pglobby tenant {kind} {word} again, or pglobby tenant drop {word}")
            }
            _ => format!("pglobby tenant {kind} {word} again"),
        };
        let detail = format!("operation {kind} of tenant {name} stopped after step {step:?}{why}");
        Finding::new("unfinished_operation", detail, &mend).of(&name)
    };
    let mut findings: Vec<Finding> = client.query(sql, &[]).await?.iter().map(finding).collect();
    findings.extend(unfinished_rotation(client).await?);
    Ok(findings)
}

/// An interrupted rotation of sealing keys. A running one holds the lock on the ring.
async fn unfinished_rotation(client: &Client) -> Result<Option<Finding>, AdminError> {
    let sql = "SELECT step, error FROM pglobby.operations
               WHERE kind = 'key_rotate' AND status IN ('running', 'failed')
                 AND pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended('pglobby key ring', 0))
               ORDER BY id DESC LIMIT 1";
    let finding = |row: Row| {
        let (step, error): (String, Option<String>) = (row.get(0), row.get(1));
        let why = error.map(|error| format!(": {error}")).unwrap_or_default();
        let detail = format!("the rotation of sealing keys stopped after step {step:?}{why}");
        let mend = "pglobby key rotate again (with --retire, if old keys were to leave the ring); until then keep all keys";
        Finding::new("unfinished_operation", detail, mend)
    };
    Ok(client.query_opt(sql, &[]).await?.map(finding))
}

impl Finding {
    fn new(check: &str, detail: impl Into<String>, mend: &str) -> Self {
        Self {
            check: check.to_owned(),
            tenant: None,
            host: None,
            detail: detail.into(),
            mend: mend.to_owned(),
            fixable: false,
            fix: None,
        }
    }

    fn of(mut self, tenant: &str) -> Self {
        self.tenant = Some(tenant.to_owned());
        self
    }

    fn on(mut self, host: &str) -> Self {
        self.host = Some(host.to_owned());
        self
    }

    /// `sql` on its host; `database: None`: in the administrator's own.
    fn fixed_on_host(self, database: Option<&str>, sql: impl Into<String>) -> Self {
        let host = self.host.clone().unwrap_or_default();
        self.fixed_by(Fix::OnHost { host, database: database.map(str::to_owned), sql: sql.into() })
    }

    fn fixed_by(mut self, fix: Fix) -> Self {
        self.fixable = true;
        self.fix = Some(fix);
        self
    }
}
