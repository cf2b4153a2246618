//! The actor behind an admin command, and the errors of admin commands.
//!
//! The command line, the console and the HTTP API act through an [`Actor`]. The work itself is in
//! `tenants.rs`, `logins.rs`, `hosts.rs` and `onboarding/`.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use tokio_postgres::{GenericClient, Transaction, error::SqlState};

use crate::control_path::{
    central::{self, Central, CentralError, causes, change_barrier::ChangeBarrier},
    onboarding::names::NameError,
    secrets::{keyring::KeyringError, keyring_reload::ReloadableKeyring, seal::SealError},
};

/// The actor of admin commands, with the central database and the key ring. Cheap to clone.
#[derive(Clone)]
pub struct Actor {
    /// The central database.
    pub central: Central,
    /// The key ring. It is reloaded when keys are rotated during long work.
    pub keyring: Arc<ReloadableKeyring>,
    /// The name in `audit_log` and `operations`: `os:peter`, `login:admin`, `api:deploy`.
    pub name: String,
    /// Receives the steps of long work.
    pub progress: Option<Arc<dyn Progress>>,
}

/// What the console and the HTTP API of a node need to run admin commands.
#[derive(Debug, Clone)]
pub struct AdminContext {
    /// The central database.
    pub central: Central,
    /// The key ring.
    pub keyring: Arc<ReloadableKeyring>,
    /// Waits until this node has applied a change.
    pub barrier: Arc<ChangeBarrier>,
}

impl AdminContext {
    /// Returns when this node has applied all changes committed so far.
    pub async fn until_applied(&self) {
        self.barrier.wait_until_applied(&self.central).await;
    }

    /// The actor called `name`.
    pub fn actor(&self, name: impl Into<String>) -> Actor {
        Actor::new(self.central.clone(), self.keyring.clone(), name)
    }
}

/// Receives the steps of long work, each after it was recorded. The work continues when the method returns.
#[async_trait]
pub trait Progress: Send + Sync {
    /// The work has begun; `operation` is its row in `pglobby.operations`.
    async fn begun(&self, _operation: i64) {}

    /// `step` of the work on `tenant` is done and recorded.
    async fn step(&self, tenant: &str, step: &str);

    /// `done` of `total` tables, credentials or tenants are finished.
    async fn part(&self, _what: &str, _done: u64, _total: u64) {}

    /// A remark about the work on `tenant`.
    async fn note(&self, _tenant: &str, _sentence: &str) {}
}

/// Why an admin command failed: one sentence that says what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum AdminError {
    /// The central database.
    #[error(transparent)]
    Central(#[from] CentralError),
    /// A credential could not be opened or sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The key ring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// An invalid name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An invalid value.
    #[error("{0}")]
    Invalid(String),
    /// No such thing.
    #[error("there is no {what} {name:?}{}", nearest.as_ref().map(|near| format!("; did you mean {near:?}?")).unwrap_or_default())]
    NotFound { what: &'static str, name: String, nearest: Option<String> },
    /// It is there already.
    #[error("{0}")]
    Exists(String),
    /// The present state does not allow the command.
    #[error("{0}")]
    Refused(String),
    /// Another command works on the same tenant.
    #[error("another command is running on tenant {tenant:?}; try again when it has finished")]
    Busy { tenant: String },
    /// A host could not be reached.
    #[error("cannot connect to host {host:?} ({place}): {}; see `pglobby host list`", causes(cause))]
    Connect { host: String, place: String, cause: tokio_postgres::Error },
    /// A host said no.
    #[error("host {host:?}, {doing}: {}", server_words(cause))]
    Host { host: String, doing: String, cause: tokio_postgres::Error },
}

impl From<tokio_postgres::Error> for AdminError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Central(CentralError::Query(error))
    }
}

impl AdminError {
    /// The SQLSTATE of the host or the central database, if there is one.
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Central(error) => error.code(),
            Self::Connect { cause, .. } | Self::Host { cause, .. } => cause.code(),
            _ => None,
        }
    }
}

/// A server's message on one line; see [`central::said`].
pub(crate) fn server_words(error: &tokio_postgres::Error) -> String {
    let Some(said) = error.as_db_error() else { return causes(error) };
    format!("{} (SQLSTATE {})", central::said(said).replace('\n', "; "), said.code().code())
}

impl Actor {
    /// The actor called `name`, without progress reports.
    pub fn new(central: Central, keyring: Arc<ReloadableKeyring>, name: impl Into<String>) -> Self {
        Self { central, keyring, name: name.into(), progress: None }
    }

    /// Writes the audit log in the transaction `client` that makes the change. `detail` contains no
    /// secrets.
    pub async fn audit(
        &self,
        client: &impl GenericClient,
        action: &str,
        tenant: Option<&str>,
        detail: &Value,
    ) -> Result<(), AdminError> {
        let sql = "INSERT INTO pglobby.audit_log (actor, action, tenant, detail) VALUES ($1, $2, $3, $4)";
        client.execute(sql, &[&self.name, &action, &tenant, detail]).await?;
        Ok(())
    }

    /// Writes the audit log and commits the change.
    pub(crate) async fn commit(
        &self,
        transaction: Transaction<'_>,
        action: &str,
        tenant: Option<&str>,
        detail: &Value,
    ) -> Result<(), AdminError> {
        self.audit(&transaction, action, tenant, detail).await?;
        Ok(transaction.commit().await?)
    }

    /// Reports the start of recorded work.
    pub(crate) async fn report_begun(&self, operation: i64) {
        if let Some(progress) = &self.progress {
            progress.begun(operation).await;
        }
    }

    /// Reports a finished step.
    pub(crate) async fn report(&self, tenant: &str, step: &str) {
        tracing::debug!(tenant, step, actor = self.name, "step done");
        if let Some(progress) = &self.progress {
            progress.step(tenant, step).await;
        }
    }

    /// Reports a part of long work.
    pub(crate) async fn report_part(&self, what: &str, done: impl TryInto<u64>, total: impl TryInto<u64>) {
        if let Some(progress) = &self.progress {
            let (done, total) = (done.try_into().unwrap_or_default(), total.try_into().unwrap_or_default());
            progress.part(what, done, total).await;
        }
    }

    /// Reports and logs a remark.
    pub(crate) async fn report_note(&self, tenant: &str, sentence: &str) {
        tracing::info!(tenant, actor = self.name, "{sentence}");
        if let Some(progress) = &self.progress {
            progress.note(tenant, sentence).await;
        }
    }

    /// [`AdminError::NotFound`] with the most similar of the names that `all_names` selects.
    pub(crate) async fn not_found(
        &self,
        client: &impl GenericClient,
        what: &'static str,
        name: &str,
        all_names: &str,
    ) -> AdminError {
        let names: Vec<String> = match client.query(all_names, &[]).await {
            Ok(rows) => rows.iter().map(|row| row.get(0)).collect(),
            Err(error) => return error.into(),
        };
        let nearest = nearest(name, names.iter().map(String::as_str)).map(str::to_owned);
        AdminError::NotFound { what, name: name.to_owned(), nearest }
    }
}

/// The candidate most similar to `word`, if one is similar enough to be what was meant.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance * 3 <= candidate.chars().count().max(3))
        .min()
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_one_that_could_have_been_meant() {
        let names = ["acme", "globex", "initech"];
        assert_eq!(nearest("acne", names.into_iter()), Some("acme"));
        assert_eq!(nearest("gloebx", names.into_iter()), Some("globex"));
        assert_eq!(nearest("umbrella", names.into_iter()), None);
    }
}
