//! Ends what a statement of a host's administrator waits for.
//!
//! A tenant's transaction can lock rows that the administrator must change: the row of its own role, of its
//! database, or of an object on which another tenant has a privilege. It can stay open for as long as the
//! tenant likes, even without a session if it is prepared. Therefore a tenant's transaction is ended once
//! the administrator has waited for it. Transactions of other roles are not ended: the administrator's
//! statement then fails with `lock_timeout`.

use std::{
    pin::{Pin, pin},
    time::Duration,
};

use tokio_postgres::{error::SqlState, types::ToSql};

use super::{
    actor::AdminError,
    host_connection::{HostAdmin, HostSession},
};
use crate::control_path::onboarding::{
    names::{ident, literal},
    roles::MARK,
};

/// How long a tenant's transaction may keep the administrator waiting before it is ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// The administrator's session `$1` and all sessions it waits for, directly or indirectly; 0 is a prepared
/// transaction.
const IN_THE_WAY: &str = r"
WITH RECURSIVE waiting (pid) AS (
    SELECT $1::pg_catalog.int4
    UNION
    SELECT b.pid FROM waiting w, LATERAL unnest(pg_catalog.pg_blocking_pids(w.pid)) AS b (pid) WHERE w.pid <> 0
)
SELECT pg_catalog.array_agg(pid) FROM waiting";

/// Ends the sessions in `$1` with a role that pglobby created, including their parallel workers.
const END_SESSIONS: &str = r"
SELECT pg_catalog.format('%s in database %s', a.usename, a.datname), pg_catalog.pg_terminate_backend(a.pid)
FROM pg_catalog.pg_stat_activity a
WHERE a.pid = ANY ($1) AND pg_catalog.starts_with(pg_catalog.shobj_description(a.usesysid, 'pg_authid'), $2)";

/// Prepared transactions of such roles that hold a lock for which one of the sessions `$1` waits. pg_locks
/// does not name the prepared transaction; it is found by the transaction's lock on its own id.
const PREPARED: &str = r"
SELECT x.gid, x.owner::pg_catalog.text, x.database::pg_catalog.text FROM pg_catalog.pg_prepared_xacts x
JOIN pg_catalog.pg_roles r ON r.rolname = x.owner
WHERE pg_catalog.starts_with(pg_catalog.shobj_description(r.oid, 'pg_authid'), $2) AND EXISTS (
    SELECT FROM pg_catalog.pg_locks w JOIN pg_catalog.pg_locks h
        ON (w.locktype, w.database, w.relation, w.page, w.tuple, w.transactionid, w.classid, w.objid, w.objsubid)
            IS NOT DISTINCT FROM
           (h.locktype, h.database, h.relation, h.page, h.tuple, h.transactionid, h.classid, h.objid, h.objsubid)
    JOIN pg_catalog.pg_locks own ON own.virtualtransaction = h.virtualtransaction
    WHERE w.pid = ANY ($1) AND NOT w.granted AND h.granted AND h.pid IS NULL
      AND own.locktype = 'transactionid' AND own.pid IS NULL AND own.transactionid = x.transaction)";

/// A session of the administrator whose statements may wait for tenants.
#[derive(Debug, Clone)]
pub(in crate::control_path) struct Waiting {
    admin: HostAdmin,
    /// Process id at the host.
    pid: i32,
}

impl Waiting {
    pub async fn of(admin: &HostAdmin, session: &HostSession) -> Result<Self, AdminError> {
        let rows = session.query("asking for the process", "SELECT pg_catalog.pg_backend_pid()", &[]).await?;
        let pid = rows.first().map_or(0, |row| row.get(0));
        Ok(Self { admin: admin.clone(), pid })
    }

    /// Awaits `work`, a statement of that session. After the patience, transactions of tenants in its way
    /// are ended.
    pub async fn see_through<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            if let Ok(done) = tokio::time::timeout(PATIENCE, work.as_mut()).await {
                return done;
            }
            tokio::select! {
                biased;
                done = work.as_mut() => return done,
                ended = self.end_tenants() => if let Err(error) = ended {
                    let host = &self.admin.name;
                    tracing::warn!(host, side = "server", %error, "cannot end the transactions that an admin statement waits for");
                }
            }
        }
    }

    /// Boxed, because its own statements are watched in the same way.
    fn end_tenants(&self) -> Pin<Box<dyn Future<Output = Result<(), AdminError>> + Send + '_>> {
        Box::pin(async {
            let session = self.admin.connect().await?;
            let rows = session.query("asking what is in the way", IN_THE_WAY, &[&self.pid]).await?;
            let all: Vec<i32> = rows.first().map(|row| row.get(0)).unwrap_or_default();
            let ended = session.texts("ending what is in the way", END_SESSIONS, &[&all, &MARK]).await?;
            for which in ended {
                tracing::warn!(
                    host = self.admin.name,
                    side = "server",
                    session = which,
                    "ended a tenant's session that blocked an admin statement"
                );
            }
            if !all.contains(&0) {
                return Ok(());
            }
            let prepared = session.query("asking what is in the way", PREPARED, &[&all, &MARK]).await?;
            for row in prepared {
                let transaction = Prepared { gid: row.get(0), owner: row.get(1), database: row.get(2) };
                transaction.roll_back(&self.admin).await?;
            }
            Ok(())
        })
    }
}

/// Ends sessions with application_name `$1` that have waited for a lock for `$2` milliseconds. Servers
/// before 14 have no column for that time, hence `to_jsonb`.
const END_IF_WAITING: &str = r"
SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a
JOIN pg_catalog.pg_locks l ON l.pid = a.pid AND NOT l.granted
WHERE a.application_name = $1 AND pg_catalog.clock_timestamp() - $2::pg_catalog.float8 * interval '1 millisecond'
    > coalesce((pg_catalog.to_jsonb(l) ->> 'waitstart')::pg_catalog.timestamptz, a.query_start)";

/// A pg_dump. Its own option limits waits for tables only, not for views or sequences that a tenant has
/// locked.
#[derive(Debug)]
pub(in crate::control_path) struct Dumping<'a> {
    admin: &'a HostAdmin,
    database: &'a str,
    /// Its application_name.
    pub name: String,
}

impl<'a> Dumping<'a> {
    /// Limit on its wait for a lock.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    pub fn of(admin: &'a HostAdmin, database: &'a str) -> Self {
        Self { admin, database, name: format!("pglobby pg_dump {:016x}", rand::random::<u64>()) }
    }

    /// Awaits `work`, which reads the program's output.
    ///
    /// # Errors
    /// Its own; or [`AdminError::Refused`] where the program waits too long.
    pub async fn see_through<T>(
        &self,
        work: impl Future<Output = Result<T, AdminError>>,
    ) -> Result<T, AdminError> {
        let mut work = pin!(work);
        let milliseconds = Self::PATIENCE.as_secs_f64() * 1000.0;
        loop {
            if let Ok(done) = tokio::time::timeout(PATIENCE, work.as_mut()).await {
                return done;
            }
            let session = self.admin.connect().await?;
            let parameters: [&(dyn ToSql + Sync); 2] = [&self.name, &milliseconds];
            if !session.query("looking at pg_dump", END_IF_WAITING, &parameters).await?.is_empty() {
                return Err(AdminError::Refused(format!(
                    "pg_dump has waited {:?} for a lock in database {:?} that another session holds; try again when that \
                     has ended its transaction",
                    Self::PATIENCE,
                    self.database
                )));
            }
        }
    }
}

/// A prepared transaction.
pub(in crate::control_path) struct Prepared {
    pub gid: String,
    pub owner: String,
    pub database: String,
}

impl Prepared {
    /// Prepared transactions of the host that belong to `role` or are in `database`.
    pub async fn of(session: &HostSession, role: &str, database: &str) -> Result<Vec<Self>, AdminError> {
        let sql =
            "SELECT gid, owner::pg_catalog.text, database::pg_catalog.text FROM pg_catalog.pg_prepared_xacts
                   WHERE owner = $1 OR database = $2";
        let rows = session.query("looking for prepared transactions", sql, &[&role, &database]).await?;
        let found = rows.iter().map(|row| Self { gid: row.get(0), owner: row.get(1), database: row.get(2) });
        Ok(found.collect())
    }

    /// An administrator that is no superuser does it as the role that prepared it, in the same database.
    ///
    /// # Errors
    /// The host; not that it has ended meanwhile.
    pub async fn roll_back(&self, admin: &HostAdmin) -> Result<(), AdminError> {
        let Self { gid, owner, database } = self;
        let inside = admin.connect_to(database).await?;
        let doing =
            format!("rolling back prepared transaction {gid:?} of role {owner:?} in database {database:?}");
        if !inside.rights().await?.superuser {
            inside.run(&doing, &format!("SET ROLE {}", ident(owner))).await?;
        }
        match inside.run(&doing, &format!("ROLLBACK PREPARED {}", literal(gid))).await {
            Err(error) if error.code() != Some(&SqlState::UNDEFINED_OBJECT) => Err(error),
            _ => {
                tracing::warn!(
                    host = admin.name,
                    side = "server",
                    owner,
                    database,
                    gid,
                    "rolled back a tenant's prepared transaction"
                );
                Ok(())
            }
        }
    }
}
