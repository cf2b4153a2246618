//! Copies a moving tenant's database by PostgreSQL's logical replication: a subscription on the new host
//! fetches the rows and then the changes while the tenant works on the old host. Clients wait only for the
//! last changes.
//!
//! Replication carries rows of tables. Other things are checked beforehand
//! ([`obstacles`](super::replication_checks)), compared when the tenant is paused ([`Following::catch_up`]:
//! the schema), or copied then (sequences). If anything is in the way, a dump copies the database instead.
//!
//! Copied rows meet constraints, defaults, triggers and types of the tenant on the new host. So the
//! subscription belongs to the tenant's own role there, and its workers run as that role (PostgreSQL 16 and
//! newer).
//!
//! Publication, slot, subscription and the role of the subscription share one name, taken from the
//! operation's mark. [`sweep`] finds and removes them by it, whichever process died at which step.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::{
    Work,
    names::{ident, literal},
    operation::{Operation, TenantLock},
    replication_checks,
    roles::{self, Roles},
    source_host::Source,
    subscriptions::end_subscription,
};
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        host_connection::{HostAdmin, HostSession},
        pg_dump::{CopyPrograms, Definitions, Part},
    },
    secrets::scram_verifier::{generate_password, scram_verifier},
};

/// Interval of the checks of the new host's progress.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Replication counts as stalled if nothing arrives and no worker runs for this time.
const STALLED: Duration = Duration::from_secs(60);
/// Clients are paused once fewer bytes than this are missing.
const NEAR_BYTES: i64 = 1 << 20;
/// Limit on waiting for locks and for the snapshot at the start. A longer transaction makes the move fail
/// instead of waiting behind it.
const BEGIN_WAIT_MS: u32 = 30_000;
/// How long to wait for a slot to become inactive after its process has ended.
const SLOT_WAIT: Duration = Duration::from_secs(10);

/// Why replication stopped.
#[derive(Debug)]
pub(super) enum Stopped {
    /// Replication is not possible for this tenant; a dump may be.
    Unsuitable(String),
    /// Nothing will do.
    Failed(AdminError),
}

/// Errors of a host stop replication only; other errors stop the whole move.
impl From<AdminError> for Stopped {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Host { .. } | AdminError::Connect { .. } => Self::Unsuitable(error.to_string()),
            error => Self::Failed(error),
        }
    }
}

/// A copy under way.
pub(super) struct Following<'a> {
    source: &'a Source,
    programs: &'a CopyPrograms,
    name: String,
    /// The subscription's oid. The tenant owns it and may rename it.
    subscription: u32,
    /// Sessions of the administrator in the tenant's database on both hosts.
    origin: &'a HostSession,
    replica: HostSession,
    /// The tenant's role on the new host, and a session of it.
    owner: &'a str,
    tenant: &'a HostSession,
    /// Quoted tables on the new host whose policies also apply to their owner.
    forced: Vec<String>,
    /// The schema at the start.
    before: Schema,
}

/// The schema of a database at one time: as SQL, and by oids of the catalog.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Schema {
    sql: String,
    shape: String,
}

impl Schema {
    /// Reads the schema, and the archive that recreates it.
    pub async fn look(
        programs: &CopyPrograms,
        source: &Source,
        origin: &HostSession,
    ) -> Result<(Self, Definitions), AdminError> {
        // Oids first: a change in between is then noticed later.
        let shape = origin.texts("looking at the shape of tables", SHAPE, &[]).await?.concat();
        let definitions = programs.definitions(&source.admin, &source.database, Part::All).await?;
        Ok((Self { sql: programs.statements(&definitions).await?, shape }, definitions))
    }
}

/// The common name of all that belongs to the operation. Its mark ends in a unique number.
fn name_of(operation: &Operation) -> String {
    let token = operation.argument("mark").rsplit(' ').next().unwrap_or_default();
    format!("pglobby_{token}")
}

impl<'a> Following<'a> {
    /// Checks that nothing is in the way, and publishes. The schema exists on the new host already.
    /// `before` is the source's schema; `origin` and `tenant` are sessions of the administrator there and
    /// of the tenant's new role.
    ///
    /// # Errors
    /// [`Stopped`]; what was made is for [`sweep`].
    pub async fn begin(
        work: &mut Work<'_>,
        source: &'a Source,
        programs: &'a CopyPrograms,
        (before, origin): (Schema, &'a HostSession),
        (made, tenant): (&'a Roles, &'a HostSession),
    ) -> Result<Following<'a>, Stopped> {
        let replica = work.admin.connect_to(&source.database).await?;
        replication_checks::look(source, origin, &work.admin, &work.session).await?;
        work.operation.arguments["follows"] = true.into();
        work.record("following").await?;
        let forced = tenant.texts("looking for forced policies", FORCED, &[]).await?;
        let name = name_of(&work.operation);
        let owner = made.read_write.as_str();
        let subscription = 0; // until there is one
        Ok(Self { source, programs, name, subscription, origin, replica, owner, tenant, forced, before })
    }

    /// Subscribes, and waits until all tables are copied and few changes are missing.
    pub async fn subscribe(&mut self, work: &mut Work<'_>) -> Result<(), Stopped> {
        let password = self.publish(work).await?;
        work.record("published").await?;
        let name = self.name.clone();
        self.force_policies(false).await?;
        // The statement contains the password of a role that ends with this move.
        let quiet = match work.rights.superuser {
            true => "SET log_statement = none; SET log_min_error_statement = panic",
            false => "",
        };
        self.replica.run("preparing to subscribe", quiet).await?;
        // Workers start only after the tenant owns the subscription.
        let sql = format!(
            "CREATE SUBSCRIPTION {name} CONNECTION {} PUBLICATION {name}
             WITH (slot_name = {name}, enabled = false, synchronous_commit = on, disable_on_error = true,
                   run_as_owner = false, password_required = true)",
            literal(&self.conninfo(&password))
        );
        self.replica.run("waiting no longer than that", &wait_at_most(BEGIN_WAIT_MS)).await?;
        self.replica.run("subscribing to the old host", &sql).await?;
        self.remember(work).await?;
        self.replica.run("waiting as usual", WAIT_AS_USUAL).await?;
        for step in [format!("OWNER TO {}", ident(self.owner)), "ENABLE".to_owned()] {
            let sql = format!("ALTER SUBSCRIPTION {name} {step}");
            self.replica.run("giving the subscription to the tenant", &sql).await?;
        }
        work.record("subscribed").await?;
        self.wait_until_near(work).await?;
        work.record("synced").await.map_err(Stopped::Failed)
    }

    /// Records the subscription's oid before the tenant owns it.
    async fn remember(&mut self, work: &mut Work<'_>) -> Result<(), Stopped> {
        let sql = "SELECT oid FROM pg_catalog.pg_subscription WHERE subname = $1";
        let rows = self.replica.query("looking at the subscription", sql, &[&self.name]).await;
        self.subscription = rows?.first().map_or(0, |row| row.get(0));
        work.operation.arguments["subscription"] = self.subscription.into();
        work.operation.remember(&work.lock).await.map_err(Stopped::Failed)
    }

    /// Creates the publication and its role, a member of the tenant's role, which may read the tenant's
    /// tables only. The password of the host's administrator is not used for replication.
    async fn publish(&self, work: &Work<'_>) -> Result<SecretString, AdminError> {
        let (name, tenant) = (ident(&self.name), ident(&self.source.roles.read_write));
        let tables =
            self.origin.texts("listing the tenant's tables", replication_checks::PUBLISHED, &[]).await?;
        let tables = tables.first().filter(|tables| !tables.is_empty());
        let tables = tables.map(|tables| format!(" FOR TABLE {tables}")).unwrap_or_default();
        // BYPASSRLS, to copy rows that a policy hides. If the administrator may not grant it, the policies
        // were refused earlier.
        let ours = self.source.session.rights().await?;
        let rights = if ours.superuser { "BYPASSRLS" } else { "" };
        let password = generate_password();
        let verifier = scram_verifier(&password);
        let role = format!(
            "BEGIN; CREATE ROLE {name} LOGIN INHERIT REPLICATION {rights} PASSWORD {};
             COMMENT ON ROLE {name} IS {}; GRANT {tenant} TO {name}; {} COMMIT",
            literal(verifier.expose_secret()),
            literal(work.operation.argument("mark")),
            ours.join(&name)
        );
        self.source.session.run("making the role that replicates", &role).await?;
        self.origin.run("waiting no longer than that", &wait_at_most(BEGIN_WAIT_MS)).await?;
        self.origin
            .run("publishing the tenant's tables", &format!("CREATE PUBLICATION {name}{tables}"))
            .await?;
        self.origin.run("waiting as usual", WAIT_AS_USUAL).await?;
        Ok(password)
    }

    /// Policies that apply to the owner would keep rows out, so they are forced again after the copy.
    async fn force_policies(&self, forced: bool) -> Result<(), Stopped> {
        let force = if forced { "FORCE" } else { "NO FORCE" };
        let alter = |table: &String| format!("ALTER TABLE {table} {force} ROW LEVEL SECURITY");
        let sql = self.forced.iter().map(alter).collect::<Vec<_>>().join(";\n");
        self.tenant.run("filling tables with forced policies", &sql).await.map_err(Stopped::from)
    }

    fn conninfo(&self, password: &SecretString) -> String {
        let quote = |text: &str| format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"));
        let admin = &self.source.admin;
        let (names, ports, finds_primary) = admin.for_libpq();
        let attributes = if finds_primary { " target_session_attrs=read-write" } else { "" };
        format!(
            "host={} port={} dbname={} user={} password={} sslmode={} connect_timeout=10 application_name={}{attributes}",
            quote(&names),
            quote(&ports),
            quote(&self.source.database),
            quote(&self.name),
            quote(password.expose_secret()),
            admin.tls_mode.word(),
            quote(&self.name),
        )
    }

    async fn wait_until_near(&self, work: &Work<'_>) -> Result<(), Stopped> {
        let mut moved = (Instant::now(), (0, i64::MAX));
        loop {
            let Progress { enabled, at_work, copied, tables } = self.standing().await?;
            if !enabled {
                return Err(Stopped::Unsuitable(format!(
                    "the new host could not apply what it was sent; its log says why ({copied} of {tables} tables were copied)"
                )));
            }
            let missing = self.missing_bytes().await?;
            if copied == tables && missing <= NEAR_BYTES {
                return Ok(());
            }
            work.actor.report_part("tables", copied, tables).await;
            if at_work && (copied, missing) != moved.1 {
                moved = (Instant::now(), (copied, missing));
            }
            if moved.0.elapsed() > STALLED {
                return Err(Stopped::Unsuitable(format!(
                    "nothing arrived on the new host for {STALLED:?} ({copied} of {tables} tables are there); its log \
                     may say why"
                )));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn standing(&self) -> Result<Progress, AdminError> {
        let sql = "SELECT s.subenabled,
                EXISTS (SELECT FROM pg_catalog.pg_stat_subscription a WHERE a.subid = s.oid AND a.pid IS NOT NULL),
                count(r) FILTER (WHERE r.srsubstate = 'r'), count(r)
            FROM pg_catalog.pg_subscription s LEFT JOIN pg_catalog.pg_subscription_rel r ON r.srsubid = s.oid
            WHERE s.oid = $1 GROUP BY s.oid, s.subenabled";
        let rows = self.replica.query("asking how far the copy is", sql, &[&self.subscription]).await?;
        let Some(row) = rows.first() else {
            return Err(AdminError::Refused("the subscription was dropped".to_owned()));
        };
        Ok(Progress { enabled: row.get(0), at_work: row.get(1), copied: row.get(2), tables: row.get(3) })
    }

    /// Bytes of WAL that the new host has not confirmed.
    async fn missing_bytes(&self) -> Result<i64, AdminError> {
        let sql = "SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), confirmed_flush_lsn)::int8
                   FROM pg_catalog.pg_replication_slots WHERE slot_name = $1 AND confirmed_flush_lsn IS NOT NULL";
        let rows = self.origin.query("asking how far the copy is", sql, &[&self.name]).await?;
        Ok(rows.first().map_or(i64::MAX, |row| row.get(0)))
    }

    /// Called while clients are paused. Waits for the last changes, compares the schema, and copies
    /// sequences.
    ///
    /// # Errors
    /// [`Stopped::Unsuitable`] where the schema has changed meanwhile, or the last changes do not arrive within
    /// `patience`.
    pub async fn catch_up(&self, patience: Duration) -> Result<(), Stopped> {
        let now = async { self.last_bytes(patience).await };
        let schema = async {
            Schema::look(self.programs, self.source, self.origin).await.map_err(|error| unsuitable(&error))
        };
        let ((), (schema, _)) = tokio::try_join!(now, schema)?;
        if schema != self.before {
            return Err(Stopped::Unsuitable("its schema was changed while it was copied".to_owned()));
        }
        self.force_policies(true).await?;
        let values = self.origin.texts("reading sequences", SEQUENCES, &[]).await?;
        let Some(values) = values.first().filter(|sql| !sql.is_empty()) else { return Ok(()) };
        let values = self.origin.texts("reading sequences", values, &[]).await?;
        self.tenant.run("setting sequences", &values.join(";\n")).await.map_err(Stopped::from)
    }

    async fn last_bytes(&self, patience: Duration) -> Result<(), Stopped> {
        // The message after it makes the server flush and send everything before it.
        let mark = "SELECT pg_catalog.pg_current_wal_insert_lsn()::text";
        let end = self.origin.texts("looking where the old host is", mark, &[]).await?;
        let end = end.first().cloned().unwrap_or_default();
        let flush = "SELECT pg_catalog.pg_logical_emit_message(true, 'pglobby', 'fenced')";
        self.origin.run("marking the end", flush).await?;
        let sql = "SELECT 1 FROM pg_catalog.pg_replication_slots
                   WHERE slot_name = $1 AND confirmed_flush_lsn >= $2::text::pg_lsn";
        let give_up = Instant::now() + patience;
        loop {
            let there = self.origin.query("waiting for the new host", sql, &[&self.name, &end]).await;
            if !there?.is_empty() && self.standing().await?.is_whole() {
                return Ok(());
            }
            if Instant::now() >= give_up {
                return Err(Stopped::Unsuitable(format!(
                    "the last changes did not arrive within {patience:?}"
                )));
            }
            tokio::time::sleep(LOOK_AGAIN / 10).await;
        }
    }
}

struct Progress {
    enabled: bool,
    at_work: bool,
    copied: i64,
    tables: i64,
}

impl Progress {
    fn is_whole(&self) -> bool {
        self.enabled && self.copied == self.tables
    }
}

/// A query that makes the statements to set all sequences.
const SEQUENCES: &str = r"
SELECT coalesce(pg_catalog.string_agg(pg_catalog.format(
    'SELECT pg_catalog.format(%L, last_value, is_called) FROM %I.%I',
    pg_catalog.format('SELECT pg_catalog.setval(%L, %%s, %%L)', pg_catalog.format('%I.%I', n.nspname, c.relname)),
    n.nspname, c.relname), ' UNION ALL '), '')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                  WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')";

/// On the new host, as the tenant's role: tables whose policies also apply to their owner.
const FORCED: &str = r"
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relrowsecurity AND c.relforcerowsecurity AND c.relkind IN ('r', 'p')";

/// Changes that a dump of the schema does not show: a table that was recreated, a column rewritten by
/// ALTER.
const SHAPE: &str = r"
SELECT coalesce(pg_catalog.md5(pg_catalog.string_agg(
    pg_catalog.concat_ws(' ', a.attrelid, a.attnum, a.xmin, a.attisdropped), ',' ORDER BY a.attrelid, a.attnum)), '')
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND c.relpersistence <> 't'
  AND n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'";

fn unsuitable(error: &AdminError) -> Stopped {
    Stopped::Unsuitable(error.to_string())
}

fn wait_at_most(milliseconds: u32) -> String {
    format!("SET statement_timeout = {milliseconds}; SET lock_timeout = {milliseconds}")
}

const WAIT_AS_USUAL: &str = "RESET statement_timeout; RESET lock_timeout";

/// Removes subscription, slots, publication and role, using the record of the operation. The old host is
/// cleaned even if the new one does not answer, because an unused slot fills its disk.
///
/// # Errors
/// A host, or the central database; then the next run goes on.
pub(super) async fn sweep(
    actor: &Actor,
    lock: &TenantLock,
    operation: &mut Operation,
) -> Result<(), AdminError> {
    if operation.arguments["follows"] != true {
        return Ok(());
    }
    let unsubscribed = match HostAdmin::load(actor, &lock.client, operation.argument("host")).await {
        Ok(admin) => unsubscribe(lock, operation, &admin).await,
        Err(error) => Err(error),
    };
    let admin = HostAdmin::load(actor, &lock.client, operation.argument("from")).await?;
    unpublish(operation, &admin).await?;
    unsubscribed?;
    operation.arguments["follows"] = false.into();
    operation.remember(lock).await
}

async fn unsubscribe(
    lock: &TenantLock,
    operation: &mut Operation,
    admin: &HostAdmin,
) -> Result<(), AdminError> {
    let session = admin.connect().await?;
    // By oid, because the tenant may have renamed it.
    let known = operation.arguments["subscription"].as_u64().and_then(|oid| u32::try_from(oid).ok());
    let sql = "SELECT s.oid, d.datname::text FROM pg_catalog.pg_subscription s
               JOIN pg_catalog.pg_database d ON d.oid = s.subdbid WHERE s.subname = $1 OR s.oid = $2";
    let found = session.query("looking for the subscription", sql, &[&name_of(operation), &known]).await?;
    let Some(found) = found.first() else { return Ok(()) };
    // Names of slots of tables that are being copied contain this oid. It is lost with the subscription.
    operation.arguments["subscription"] = found.get::<_, u32>(0).into();
    operation.remember(lock).await?;
    end_subscription(admin, found.get(1), found.get(0)).await
}

async fn unpublish(operation: &Operation, admin: &HostAdmin) -> Result<(), AdminError> {
    let (name, database) = (name_of(operation), operation.argument("database"));
    let session = admin.connect().await?;
    let ours = r"SELECT slot_name::text FROM pg_catalog.pg_replication_slots
                 WHERE database = $1 AND (slot_name = $2 OR slot_name LIKE 'pg\_' || $3 || '\_sync\_%')";
    let subscription = operation.arguments["subscription"].as_u64().map(|oid| oid.to_string());
    for slot in session.texts("looking for slots", ours, &[&database, &name, &subscription]).await? {
        drop_slot(&session, &slot).await?;
    }
    let sql = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = $1";
    if !session.query("looking for the database", sql, &[&database]).await?.is_empty() {
        let inside = admin.connect_to(database).await?;
        let end = format!("DROP PUBLICATION IF EXISTS {}", ident(&name));
        inside.run("ending the publication", &end).await?;
    }
    for role in roles::marked(&session, operation.argument("mark")).await? {
        roles::release(admin, &session, &role).await?;
    }
    Ok(())
}

async fn drop_slot(session: &HostSession, slot: &str) -> Result<(), AdminError> {
    let end = "SELECT pg_catalog.pg_terminate_backend(active_pid) FROM pg_catalog.pg_replication_slots
               WHERE slot_name = $1 AND active_pid IS NOT NULL";
    let drop = "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots
                WHERE slot_name = $1";
    let give_up = Instant::now() + SLOT_WAIT;
    loop {
        session.query("ending a slot's reader", end, &[&slot]).await?;
        match session.query("dropping a slot", drop, &[&slot]).await {
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) && Instant::now() < give_up => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT) => return Ok(()),
            dropped => return dropped.map(|_| ()),
        }
    }
}
