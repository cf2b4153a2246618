//! What sessions ask of the central database's logins and tenants. The control path implements it
//! (`control_path/directory`), with a cache in front; the data path asks at login, when a service login
//! changes its tenant, when a login changes its own password, and after a change. No query asks.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use secrecy::SecretString;

use crate::data_path::tenant::{DirectoryChange, Login, Tenant};

/// A look-up failed. `Display` is for the operator; a client gets `ClientError::DirectoryUnavailable`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// The central database did not answer, and the cache has no usable row.
    #[error("{0}")]
    Unavailable(Arc<str>),
    /// The central database did not answer, and the snapshot of it has no such row: it may have been made since.
    #[error("{0}; the snapshot has no such row")]
    NotInSnapshot(Arc<str>),
    /// The row exists and is invalid(its sealed password does not open, …). Other rows are not affected.
    #[error("{0}")]
    Broken(Arc<str>),
}

/// Looks up logins and tenants by the names that clients send. Every look-up ends within `central_timeout`.
#[async_trait]
pub trait Directory: Send + Sync + std::fmt::Debug {
    /// The login of that name, of any kind. Disabled and expired logins are returned too: the caller judges.
    async fn login(&self, name: &str) -> Result<Option<Arc<Login>>, DirectoryError>;

    /// The tenant of that name; if it was dropped, its newest tombstone.
    async fn tenant(&self, name: &str) -> Result<Option<Arc<Tenant>>, DirectoryError>;

    /// The tenant with that id, tombstones included.
    async fn tenant_by_id(&self, id: i64) -> Result<Option<Arc<Tenant>>, DirectoryError>;

    /// The same as the central database has it now, for sessions that are open: nothing that is only remembered counts.
    async fn confirmed_login(&self, name: &str) -> Result<Option<Arc<Login>>, DirectoryError> {
        self.login(name).await
    }

    /// The same of a tenant, by its id.
    async fn confirmed_tenant(&self, id: i64) -> Result<Option<Arc<Tenant>>, DirectoryError> {
        self.tenant_by_id(id).await
    }

    /// Whether the central database answers and reports changes, so that a cached row is known to be current.
    fn is_current(&self) -> bool;

    /// What salts for unknown logins are derived from; the same on every node.
    fn mock_salt(&self) -> &[u8];

    /// The time at which the client gets its answer; `begun` is the start of the look-up. A cached name is
    /// answered as late as an uncached one, so that response times do not reveal which names exist.
    fn answer_at(&self, begun: Instant) -> Instant;

    /// Marks cached rows that `change` concerns, so that the next look-up reads them again.
    fn forget(&self, change: &DirectoryChange);

    /// The SCRAM verifier of a new password. Takes a few milliseconds of CPU on another thread.
    async fn verifier_of(&self, password: SecretString) -> SecretString;

    /// Stores a login's new verifier if its present one is among `before`. `false`: the login has another
    /// verifier by now, or is refused. After an error it is not known whether the verifier was stored.
    async fn set_verifier(
        &self,
        login: &Login,
        before: &[SecretString],
        verifier: &SecretString,
    ) -> Result<bool, DirectoryError>;
}
