//! Who does something to tenants, logins and hosts, and how it is told when it went wrong.
//!
//! The command line, the console and the HTTP API all act through an [`Actor`]; what it does is in `tenants.rs`,
//! `logins.rs`, `hosts.rs` and `onboarding/`.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use tokio_postgres::{GenericClient, error::SqlState};

use crate::control_path::{
    central::{self, Central, CentralError, causes, change_barrier::ChangeBarrier},
    onboarding::names::NameError,
    secrets::{keyring::KeyringError, keyring_reload::ReloadableKeyring, seal::SealError},
};

/// One operator at work. Cheap to clone.
#[derive(Clone)]
pub struct Actor {
    /// Where everything is recorded.
    pub central: Central,
    /// What credentials are sealed with, as it is now: keys may be rotated while long work goes on.
    pub keyring: Arc<ReloadableKeyring>,
    /// For `audit_log` and `operations`: `os:peter`, `login:admin`, `api:deploy`.
    pub name: String,
    /// Told of each step of long work, if anybody wants to know.
    pub progress: Option<Arc<dyn Progress>>,
}

/// Where the operators of a running node come from: those of the console and of the API.
#[derive(Debug, Clone)]
pub struct AdminContext {
    /// Where everything is recorded.
    pub central: Central,
    /// What credentials are sealed with.
    pub keyring: Arc<ReloadableKeyring>,
    /// How to know that this node has heard of an order.
    pub barrier: Arc<ChangeBarrier>,
}

impl AdminContext {
    /// Returns when this node has done what was ordered (and committed) before.
    pub async fn until_applied(&self) {
        self.barrier.wait_until_applied(&self.central).await;
    }

    /// The actor called `name`.
    pub fn actor(&self, name: impl Into<String>) -> Actor {
        Actor::new(self.central.clone(), self.keyring.clone(), name)
    }
}

/// Hears of the steps of long work, after each is recorded. The work goes on when `step` returns.
#[async_trait]
pub trait Progress: Send + Sync {
    /// The work has begun: it is this row of `pglobby.operations`, to be followed there.
    async fn begun(&self, _operation: i64) {}

    /// `step` of the work on `tenant` is done and recorded.
    async fn step(&self, tenant: &str, step: &str);

    /// Of `what` (tables, credentials, tenants), so many are done.
    async fn part(&self, _what: &str, _done: u64, _total: u64) {}

    /// Something about the work on `tenant` that is worth a sentence.
    async fn note(&self, _tenant: &str, _sentence: &str) {}
}

/// Why an operator's wish was not fulfilled. One sentence each that says what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The central database.
    #[error(transparent)]
    Central(#[from] CentralError),
    /// A credential does not open, or was not sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The key ring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// A name that cannot be used.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A value that cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// No such thing.
    #[error("there is no {what} {name:?}{}", nearest.as_ref().map(|near| format!("; did you mean {near:?}?")).unwrap_or_default())]
    NotFound {
        /// tenant, login, host.
        what: &'static str,
        /// As asked for.
        name: String,
        /// The nearest name there is.
        nearest: Option<String>,
    },
    /// It is there already.
    #[error("{0}")]
    Exists(String),
    /// Its state does not allow it.
    #[error("{0}")]
    Refused(String),
    /// Somebody else is at it.
    #[error("another operator is working on tenant {tenant:?}; try again when that is done")]
    Busy {
        /// Its name.
        tenant: String,
    },
    /// A host could not be reached.
    #[error("cannot connect to host {host:?} ({place}): {}; see `pglobby host list`", causes(cause))]
    Connect {
        /// `hosts.name`.
        host: String,
        /// Address, database and role.
        place: String,
        /// Why.
        cause: tokio_postgres::Error,
    },
    /// A host said no.
    #[error("host {host:?}, {doing}: {}", server_words(cause))]
    Host {
        /// `hosts.name`.
        host: String,
        /// What we were about.
        doing: String,
        /// What it said.
        cause: tokio_postgres::Error,
    },
}

impl From<tokio_postgres::Error> for AdminError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Central(CentralError::Query(error))
    }
}

impl AdminError {
    /// The SQLSTATE that a host or the central database gave, if one did.
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
    /// The actor called `name`, who wants no progress.
    pub fn new(central: Central, keyring: Arc<ReloadableKeyring>, name: impl Into<String>) -> Self {
        Self { central, keyring, name: name.into(), progress: None }
    }

    /// Records what was done, on the connection (or in the transaction) that did it. `detail` holds no secrets.
    ///
    /// # Errors
    /// [`AdminError::Central`].
    pub async fn audit(
        &self,
        client: &impl GenericClient,
        action: &str,
        tenant: Option<&str>,
        detail: &Value,
    ) -> Result<(), AdminError> {
        client
            .execute(
                "INSERT INTO pglobby.audit_log (actor, action, tenant, detail) VALUES ($1, $2, $3, $4)",
                &[&self.name, &action, &tenant, detail],
            )
            .await?;
        Ok(())
    }

    /// Tells whoever wants to know that the work is recorded from now on.
    pub(crate) async fn report_begun(&self, operation: i64) {
        if let Some(progress) = &self.progress {
            progress.begun(operation).await;
        }
    }

    /// Tells whoever wants to know.
    pub(crate) async fn report(&self, tenant: &str, step: &str) {
        tracing::debug!(tenant, step, actor = self.name, "step done");
        if let Some(progress) = &self.progress {
            progress.step(tenant, step).await;
        }
    }

    /// Tells whoever wants to know.
    pub(crate) async fn report_part(&self, what: &str, done: impl TryInto<u64>, total: impl TryInto<u64>) {
        if let Some(progress) = &self.progress {
            let (done, total) = (done.try_into().unwrap_or_default(), total.try_into().unwrap_or_default());
            progress.part(what, done, total).await;
        }
    }

    /// Tells whoever wants to know, and the log.
    pub(crate) async fn report_note(&self, tenant: &str, sentence: &str) {
        tracing::info!(tenant, actor = self.name, "{sentence}");
        if let Some(progress) = &self.progress {
            progress.note(tenant, sentence).await;
        }
    }

    /// [`AdminError::NotFound`] with the nearest of the names that `all_names` selects.
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

/// The candidate that `word` was probably meant to be, if one is near enough.
pub(crate) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance * 3 <= candidate.chars().count().max(3))
        .min()
        .map(|(_, candidate)| candidate)
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Actor").field("name", &self.name).finish_non_exhaustive()
    }
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
