//! Errors that clients read: a SQLSTATE and a sentence that helps.
//!
//! The cause, the tenant and the side that failed are logged where the error happens, and never sent.

mod memory_limit;
mod sqlstate;

use std::time::Duration;

pub use self::memory_limit::Limit;

use crate::wire::{
    message::{Severity, error_response},
    server_error::{ErrorDetails, ServerError},
};

/// An ErrorResponse made by pglobby. `Display` is the message that the client reads. It contains no name
/// that the client did not send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum ClientError {
    /// The same for an unknown login and a wrong password, so that names cannot be probed.
    #[error("password authentication failed for user \"{user}\"")]
    LoginFailed { user: String },
    /// The same for a database that does not exist and one that is not the login's, which has proved its password.
    #[error("database \"{database}\" does not exist")]
    NoDatabase { database: String },
    /// A startup packet without a user.
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    /// `client_tls_sslmode = "require"`.
    #[error("this endpoint requires an encrypted connection (sslmode=require)")]
    EncryptionRequired,
    /// Hints that name different tenants.
    #[error("the connection names more than one tenant: {first} and {second}")]
    ContradictingTenants { first: String, second: String },
    /// `tenant suspend`.
    #[error("tenant \"{tenant}\" is suspended{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Suspended { tenant: String, reason: Option<String> },
    /// The tenant was dropped; its row is a tombstone.
    #[error("database \"{tenant}\" does not exist (it was dropped)")]
    Dropped { tenant: String },
    /// A read_only login of a tenant that has no read-only role.
    #[error("there is no read-only role for this database yet")]
    NoReadOnlyRole,
    /// The tenant is being created or dropped.
    #[error("tenant \"{tenant}\" is not ready yet; please try again")]
    NotReady { tenant: String },
    /// No server is lent while the tenant moves, and the wait was too long.
    #[error("tenant \"{tenant}\" is being moved to another host; please try again")]
    Moving { tenant: String },
    /// The central database did not answer, and the cache had no usable row.
    #[error("pglobby cannot look up logins at the moment; please try again")]
    DirectoryUnavailable,
    /// `max_client_conn`, or no file descriptors are left.
    #[error("sorry, too many clients already")]
    TooManyClients,
    /// Too many wrong passwords from the client's address. Does not say whether this one was right.
    #[error("too many failed logins from this address; please try again later")]
    TooManyFailedLogins,
    /// `max_clients` of the tenant.
    #[error("too many connections for database \"{tenant}\"")]
    TooManyClientsOfTenant { tenant: String },
    /// A limit on memory for the session, its tenant or the process is reached.
    #[error("{}", .limit.message(*.max))]
    MemoryLimit { limit: Limit, max: usize },
    /// The same for data that is not a request and cannot be refused alone.
    #[error("terminating connection because the client does not read: {}", .limit.message(*.max))]
    UnsentLimit { limit: Limit, max: usize },
    /// `max_queued_notifications`.
    #[error(
        "terminating connection because more than {limit} bytes of notifications are queued for it (max_queued_notifications)"
    )]
    TooManyNotifications { limit: usize },
    /// The shared server connection that listens for this client broke.
    #[error(
        "terminating connection because the server connection for its LISTEN was lost; connect and LISTEN again"
    )]
    ListenerLost,
    /// PAUSE or `tenant move`: no server connection listens meanwhile.
    #[error(
        "terminating connection because it could miss notifications while the database is paused; connect and LISTEN again"
    )]
    ListenerPaused,
    /// A session of a service login has not chosen a tenant yet.
    #[error(
        "no tenant is chosen; choose one by SET pglobby.tenant = 'NAME' (or in a transaction: SET LOCAL)"
    )]
    NoTenantChosen,
    /// The same for a tenant that does not exist and one that is not granted.
    #[error("permission denied for tenant \"{tenant}\"")]
    TenantDenied { tenant: String },
    /// The session is pinned: it would lose state in its present tenant's database.
    #[error(
        "cannot change the tenant while the session is pinned to its server ({reasons}); undo that first, or run DISCARD ALL"
    )]
    TenantPinned { reasons: String },
    /// `SET pglobby.tenant` that is refused.
    #[error(transparent)]
    TenantSwitch(#[from] TenantSwitchError),
    /// A change of a role, of the database or of a password that is refused.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The central database did not answer when a login's new password was stored.
    #[error(
        "pglobby could not confirm the new password: either the old or the new one is valid; please try again"
    )]
    PasswordNotStored,
    /// A login changed its own password too often.
    #[error(
        "the password of this login was changed too often; please try again in {} s",
        wait.as_millis().div_ceil(1000)
    )]
    PasswordTooOften { wait: Duration },
    /// The error that PostgreSQL would give; pglobby answers without a server.
    #[error("{message}")]
    AsPostgres { sqlstate: &'static str, message: String },
    /// A prepared statement whose result columns have changed.
    #[error("cached plan must not change result type")]
    ResultChanged,
    /// `max_pinned_servers`: the session would have to keep its server.
    #[error(
        "too many sessions of this database keep a server (max_pinned_servers = {limit}); this session would keep one \
         because of: {reasons}. Its last request was completed"
    )]
    TooManyPinned { limit: usize, reasons: String },
    /// No server of the pool became free within the wait (SQLSTATE 57014).
    #[error("no server connection became free within {waited:?} (query_wait_timeout); please try again")]
    PoolBusy { waited: Duration },
    /// No server connection could be opened. `reason` contains no host, role or password.
    #[error("could not connect to the tenant's database: {reason}")]
    ServerUnreachable { sqlstate: Option<[u8; 5]>, reason: String },
    /// An error of the server at login.
    #[error("{message}")]
    Server { sqlstate: String, message: String, details: Option<Box<ErrorDetails>> },
    /// The server connection broke during a request of this client.
    #[error("server closed the connection unexpectedly")]
    ServerLost,
    /// The server connection broke after COMMIT was sent and before it was answered.
    #[error(
        "the connection to the server was lost before it answered a COMMIT: whether the transaction was committed is not known"
    )]
    OutcomeUnknown,
    /// The client broke the protocol.
    #[error("{0}")]
    ProtocolViolation(String),
    /// A feature of PostgreSQL that pglobby does not support.
    #[error("{0}")]
    NotSupported(String),
    /// TERM, drain, restart.
    #[error("terminating connection due to administrator command")]
    AdminShutdown,
    /// Another process takes over. The session moves to it; the client reads this if it cannot.
    #[error("terminating connection due to administrator command")]
    Replaced,
    /// SUSPEND, DROP, KILL, revoked login.
    #[error("terminating connection due to administrator command: {0}")]
    Ended(String),
    /// The login took too long.
    #[error("canceling authentication due to timeout")]
    LoginTimeout,
    /// `client_idle_timeout`, `idle_transaction_timeout`, `query_timeout`, `transaction_timeout`.
    #[error("terminating connection due to {setting}")]
    TimedOut { setting: &'static str, sqlstate: &'static str },
    /// A cancel request arrived while the client waited for a server.
    #[error("canceling statement due to user request")]
    Cancelled,
    /// A defect in pglobby; the log has the details.
    #[error("internal error in pglobby")]
    Internal,
}

/// Why `SET pglobby.tenant` is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TenantSwitchError {
    /// The login is an employee's, which has one tenant only.
    #[error("permission denied to set parameter \"pglobby.tenant\": the login belongs to one tenant")]
    Employee,
    /// The transaction has begun on a server.
    #[error(
        "the tenant cannot be changed in a transaction: SET it before BEGIN, or use SET LOCAL as the first statement after BEGIN"
    )]
    TransactionBegun,
    /// SET without LOCAL after BEGIN.
    #[error(
        "SET pglobby.tenant is not allowed in a transaction: use SET LOCAL pglobby.tenant, or SET before BEGIN"
    )]
    NotLocal,
    /// SET LOCAL without BEGIN.
    #[error("SET LOCAL pglobby.tenant needs a transaction: send BEGIN first")]
    NoTransaction,
    /// Other statements in the same query, or a form of SET that is not supported.
    #[error("send SET pglobby.tenant = 'NAME' in a query of its own, without other statements")]
    NotAlone,
    /// Statements follow the end of a transaction with SET LOCAL, or a reset, in the same query or batch.
    #[error(
        "send the statements after COMMIT, ROLLBACK or RESET in a query of their own: the transaction used SET LOCAL pglobby.tenant"
    )]
    Over,
    /// `pool_mode = "session"`.
    #[error("the tenant cannot be changed by a session that keeps its server (pool_mode = session)")]
    SessionMode,
}

/// Why a statement about roles or the database is refused. All logins of a tenant share its roles on the
/// server, so only the operator may change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// ALTER ROLE, DROP ROLE and similar, of a tenant's role.
    #[error("permission denied to change the database's own roles")]
    Role,
    /// GRANT or REVOKE of a tenant's role.
    #[error("permission denied to change memberships of the database's own roles")]
    Membership,
    /// REASSIGN OWNED, DROP OWNED.
    #[error("permission denied to drop or give away what the database's own roles own")]
    Owned,
    /// ALTER DATABASE, DROP DATABASE.
    #[error("permission denied to change the database itself")]
    Database,
    /// ALTER DATABASE … SET of a parameter that decides the session's role or whether a session can start.
    #[error("permission denied to set this parameter for the database")]
    DatabaseSetting,
    /// GRANT or REVOKE ON DATABASE.
    #[error("permission denied to change privileges on the database")]
    DatabaseAccess,
    /// A change of the login's own password inside a transaction.
    #[error("a password cannot be changed inside a transaction block")]
    PasswordInTransaction,
    /// A change of the own password with other statements in the query.
    #[error("ALTER ROLE ... PASSWORD must be the only statement in its query")]
    PasswordNotAlone,
    /// PASSWORD NULL, PASSWORD ''.
    #[error("a login needs a password")]
    PasswordMissing,
    /// `md5…`.
    #[error("md5 passwords are not supported")]
    PasswordMd5,
    /// `U&'…'`, or not UTF-8.
    #[error("unsupported form of password literal")]
    PasswordUnclear,
    /// Longer than PostgreSQL accepts from a client.
    #[error("the password is too long")]
    PasswordTooLong,
    /// The login was changed since this session began.
    #[error("the login was changed meanwhile; log in again to change its password")]
    LoginChanged,
}

impl IdentityError {
    fn hint(self) -> &'static str {
        match self {
            Self::Role => {
                "All logins of this database share its roles. A login's own password is changed by ALTER ROLE CURRENT_USER \
                 PASSWORD; an operator changes logins by `pglobby login set` and limits by `pglobby tenant set`; ALTER DATABASE \
                 ... SET makes settings for all sessions."
            }
            Self::Membership => {
                "An operator decides what a login may do: `pglobby login create`, `pglobby login set`."
            }
            Self::Owned => {
                "An operator removes a tenant by `pglobby tenant drop`; single objects are dropped by name."
            }
            Self::Database => {
                "An operator does this: `pglobby tenant set`, `pglobby tenant rename`, `pglobby tenant suspend`, `pglobby \
                 tenant drop`."
            }
            Self::DatabaseSetting => "Set it in each session instead.",
            Self::DatabaseAccess => {
                "An operator gives access by `pglobby login create` and takes it by `pglobby login drop`."
            }
            Self::PasswordInTransaction => {
                "Send it outside a transaction: it takes effect at once and cannot be rolled back."
            }
            Self::PasswordNotAlone => "Send ALTER ROLE CURRENT_USER PASSWORD '...' alone.",
            Self::PasswordMissing => "An operator disables a login by `pglobby login disable`.",
            Self::PasswordMd5 => {
                "Send the password itself or a SCRAM-SHA-256 verifier (SET password_encryption = 'scram-sha-256')."
            }
            Self::PasswordUnclear => "Write it as an ordinary string literal, in UTF-8.",
            Self::PasswordTooLong => "The limit is 1024 bytes.",
            Self::LoginChanged => "An operator sets a new password by `pglobby login set-password`.",
        }
    }
}

/// An error that replaces the reply to one request and keeps its position among the pending replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestError {
    /// It is about the session's tenant.
    TenantSwitch(TenantSwitchError),
    /// It would change a role, the database or a password.
    Identity(IdentityError),
    /// The statement would return other columns than the client expects.
    ResultChanged,
    /// A memory limit is reached.
    MemoryLimit(Limit),
}

impl From<TenantSwitchError> for RequestError {
    fn from(reason: TenantSwitchError) -> Self {
        Self::TenantSwitch(reason)
    }
}

impl From<IdentityError> for RequestError {
    fn from(reason: IdentityError) -> Self {
        Self::Identity(reason)
    }
}

impl From<Limit> for RequestError {
    fn from(limit: Limit) -> Self {
        Self::MemoryLimit(limit)
    }
}

impl From<ServerError> for ClientError {
    fn from(error: ServerError) -> Self {
        Self::Server { sqlstate: error.sqlstate, message: error.message, details: error.details }
    }
}

impl ClientError {
    /// Appends the ErrorResponse.
    pub fn write(&self, severity: Severity, out: &mut Vec<u8>) {
        // Drivers (postgres.js, pgjdbc) prepare the statement again only if the error names this routine.
        let mut more = Vec::new();
        match self {
            Self::ResultChanged => more.push((b'R', "RevalidateCachedQuery")),
            Self::Identity(reason) => more.push((b'H', reason.hint())),
            Self::Server { details: Some(details), .. } => {
                more.extend(details.detail.as_deref().map(|detail| (b'D', detail)));
                more.extend(details.hint.as_deref().map(|hint| (b'H', hint)));
            }
            _ => {}
        }
        error_response(out, severity, self.sqlstate(), &self.to_string(), &more);
    }
}
