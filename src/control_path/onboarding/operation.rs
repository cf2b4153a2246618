//! Recorded operations: long work on one tenant, by one actor at a time. The recorded steps outlive the
//! process.
//!
//! ```text
//! running ──every step recorded──▶ done
//!    ├── a step failed, what was made is undone ──▶ undone (or failed, where even that failed)
//!    └── the process died: the lock is free, the row still says running;
//!        the next lock on the tenant undoes it (create, adopt) or continues it (drop); if no command takes
//!        it, a node does (`abandoned.rs`)
//! ```
//!
//! Lock and record share one connection. If it breaks, recording the next step fails, so no work goes on
//! without the lock.

use secrecy::SecretString;
use serde_json::Value;
use tokio_postgres::{Client, GenericClient, Transaction, error::SqlState};

use super::names::shell_word;
use crate::control_path::{
    admin::{
        actor::{Actor, AdminError},
        fields::from_row,
    },
    secrets::{scram_verifier::generate_password, seal::SecretLocation},
};

/// How long a second command on a tenant waits for the first.
const LOCK_WAIT_MS: u32 = 60_000;
/// The same for work that may be skipped if another command is running.
const AT_ONCE_MS: u32 = 500;

/// The lock on the tenant called `name`, held in the central database. It ends with this value, or with the
/// process.
pub struct TenantLock {
    /// The tenant's name.
    pub name: String,
    /// The connection that holds the lock. All records use it. Dropping it releases the lock.
    pub client: Client,
}

impl TenantLock {
    /// Waits up to a minute for the lock.
    pub async fn take(actor: &Actor, name: &str) -> Result<Self, AdminError> {
        Self::take_within(actor, name, LOCK_WAIT_MS).await
    }

    /// The same with a short wait.
    pub async fn take_at_once(actor: &Actor, name: &str) -> Result<Self, AdminError> {
        Self::take_within(actor, name, AT_ONCE_MS).await
    }

    /// The lock if it is free; does not wait.
    pub async fn take_if_free(actor: &Actor, name: &str) -> Result<Option<Self>, AdminError> {
        let client = actor.central.connect_to(actor.central.database()).await?;
        let lock =
            "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('pglobby tenant ' || $1, 0))";
        let taken: bool = client.query_one(lock, &[&name]).await?.get(0);
        Ok(taken.then(|| Self { name: name.to_owned(), client }))
    }

    async fn take_within(actor: &Actor, name: &str, wait_ms: u32) -> Result<Self, AdminError> {
        let client = actor.central.connect_to(actor.central.database()).await?;
        client.batch_execute(&format!("SET lock_timeout = {wait_ms}")).await?;
        let lock =
            "SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended('pglobby tenant ' || $1, 0))";
        match client.execute(lock, &[&name]).await {
            Ok(_) => {}
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                return Err(AdminError::Busy { tenant: name.to_owned() });
            }
            Err(error) => return Err(error.into()),
        }
        client.batch_execute("SET lock_timeout = 0").await?;
        Ok(Self { name: name.to_owned(), client })
    }
}

/// A running operation, one row of `pglobby.operations`.
#[derive(Debug, Clone)]
pub struct Operation {
    /// `operations.id`.
    pub id: i64,
    /// `create`, `adopt`, `drop`, `rotate`, ….
    pub kind: String,
    /// The tenant's row.
    pub tenant_id: i64,
    /// What is needed to continue or undo it.
    pub arguments: Value,
    /// The last recorded step.
    pub step: String,
}

impl Operation {
    /// Inserts an operation in the transaction that creates or changes the tenant's row.
    pub async fn begin(
        transaction: &Transaction<'_>,
        actor: &Actor,
        kind: &str,
        tenant_id: i64,
        arguments: Value,
    ) -> Result<Self, AdminError> {
        let sql = "INSERT INTO pglobby.operations (kind, tenant_id, arguments, actor)
                   VALUES ($1, $2, $3, $4) RETURNING id, step";
        let row = transaction.query_one(sql, &[&kind, &tenant_id, &arguments, &actor.name]).await?;
        Ok(Self { id: row.get(0), kind: kind.to_owned(), tenant_id, arguments, step: row.get(1) })
    }

    /// An interrupted operation on the locked tenant, if there is one.
    pub async fn left_running(lock: &TenantLock) -> Result<Option<Self>, AdminError> {
        let sql = "SELECT o.id, o.kind, o.tenant_id, o.arguments, o.step
                   FROM pglobby.operations o JOIN pglobby.tenants t ON t.id = o.tenant_id
                   WHERE t.name = $1 AND t.status <> 'dropped' AND o.status IN ('running', 'failed')
                     AND t.status IN ('provisioning', 'dropping')
                   ORDER BY o.id DESC LIMIT 1";
        let row = lock.client.query_opt(sql, &[&lock.name]).await?;
        Ok(row.as_ref().map(Self::of_row))
    }

    /// An interrupted operation of `kind` on the locked tenant, in any state of the tenant.
    pub async fn left(lock: &TenantLock, kind: &str) -> Result<Option<Self>, AdminError> {
        let sql = "SELECT o.id, o.kind, o.tenant_id, o.arguments, o.step
                   FROM pglobby.operations o JOIN pglobby.tenants t ON t.id = o.tenant_id
                   WHERE t.name = $1 AND t.status <> 'dropped' AND o.kind = $2 AND o.status IN ('running', 'failed')
                   ORDER BY o.id DESC LIMIT 1";
        let row = lock.client.query_opt(sql, &[&lock.name, &kind]).await?;
        Ok(row.as_ref().map(Self::of_row))
    }

    fn of_row(row: &tokio_postgres::Row) -> Self {
        from_row!(row => Self { id, kind, tenant_id, arguments, step })
    }

    /// Refuses work on a tenant with an interrupted operation.
    pub async fn refuse_unfinished(lock: &TenantLock) -> Result<(), AdminError> {
        let sql = "SELECT o.kind FROM pglobby.operations o JOIN pglobby.tenants t ON t.id = o.tenant_id
                   WHERE t.name = $1 AND t.status <> 'dropped' AND o.status IN ('running', 'failed') LIMIT 1";
        match lock.client.query_opt(sql, &[&lock.name]).await?.map(|row| row.get::<_, String>(0)) {
            None => Ok(()),
            Some(kind) => Err(AdminError::Refused(format!(
                "tenant {name:?}: an earlier `pglobby tenant {kind} {word}` has not finished; run that again first",
                name = lock.name,
                word = shell_word(&lock.name)
            ))),
        }
    }

    /// Closes interrupted operations of these kinds, because the new one repeats their work or makes it
    /// unnecessary.
    pub async fn supersede(
        transaction: &Transaction<'_>,
        tenant_id: i64,
        kinds: &[&str],
    ) -> Result<(), AdminError> {
        let sql = "UPDATE pglobby.operations SET status = 'undone', error = 'superseded by what came after it', updated_at = now()
                   WHERE tenant_id = $1 AND kind = ANY ($2) AND status IN ('running', 'failed')";
        transaction.execute(sql, &[&tenant_id, &kinds]).await?;
        Ok(())
    }

    /// A text argument; empty if there is none.
    pub fn argument(&self, key: &str) -> &str {
        self.arguments.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// Stores the present step and arguments.
    ///
    /// # Errors
    /// [`AdminError::Busy`] if another run has taken over.
    pub async fn remember(&self, lock: &TenantLock) -> Result<(), AdminError> {
        self.remember_in(&lock.client, &lock.name).await
    }

    /// The same in a transaction.
    ///
    /// # Errors
    /// [`AdminError::Busy`] if another run has taken over.
    pub async fn remember_in(&self, client: &impl GenericClient, tenant: &str) -> Result<(), AdminError> {
        let sql = "UPDATE pglobby.operations SET step = $2, arguments = $3, updated_at = now()
                   WHERE id = $1 AND status IN ('running', 'failed')";
        match client.execute(sql, &[&self.id, &self.step, &self.arguments]).await? {
            0 => Err(AdminError::Busy { tenant: tenant.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Records and reports that `step` is done.
    ///
    /// # Errors
    /// [`AdminError::Busy`] if another run has taken over.
    pub async fn record(&mut self, actor: &Actor, lock: &TenantLock, step: &str) -> Result<(), AdminError> {
        step.clone_into(&mut self.step);
        self.remember(lock).await?;
        actor.report(&lock.name, step).await;
        Ok(())
    }

    /// Closes the row as `done` or `undone`, in the transaction that makes it true.
    ///
    /// # Errors
    /// [`AdminError::Busy`] if another run has closed it.
    pub async fn close(
        &self,
        transaction: &Transaction<'_>,
        status: &str,
        tenant: &str,
    ) -> Result<(), AdminError> {
        let sql = "UPDATE pglobby.operations SET status = $2, updated_at = now()
                   WHERE id = $1 AND status IN ('running', 'failed')";
        let closed = transaction.execute(sql, &[&self.id, &status]).await?;
        if closed == 0 {
            return Err(AdminError::Busy { tenant: tenant.to_owned() });
        }
        Ok(())
    }

    /// Records the error; the next run continues from here.
    pub async fn note_failure(&self, lock: &TenantLock, error: &AdminError) -> Result<(), AdminError> {
        let sql = "UPDATE pglobby.operations SET status = 'failed', error = $2, updated_at = now()
                   WHERE id = $1 AND status = 'running'";
        lock.client.execute(sql, &[&self.id, &error.to_string()]).await?;
        Ok(())
    }
}

/// Passwords of a tenant's two roles.
#[derive(Debug)]
pub struct Passwords {
    /// Of the owner role.
    pub read_write: SecretString,
    /// Of the read-only role.
    pub read_only: SecretString,
}

/// The same, sealed for the tenant's row.
#[derive(Debug)]
pub struct SealedPasswords {
    /// `sealed_password`.
    pub read_write: Vec<u8>,
    /// `sealed_ro_password`.
    pub read_only: Vec<u8>,
}

impl Passwords {
    /// Two new random passwords.
    pub fn generate() -> Self {
        Self { read_write: generate_password(), read_only: generate_password() }
    }

    /// Seals both for the row `tenant_id`.
    pub fn seal(&self, actor: &Actor, tenant_id: i64) -> Result<SealedPasswords, AdminError> {
        let row = tenant_id.to_string();
        let place = |column| SecretLocation { table: "tenants", row: &row, column };
        Ok(SealedPasswords {
            read_write: actor.keyring.seal(&place("sealed_password"), &self.read_write)?,
            read_only: actor.keyring.seal(&place("sealed_ro_password"), &self.read_only)?,
        })
    }
}
