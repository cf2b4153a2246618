//! What we tell a client when we will not, or cannot, do what it asks: a SQLSTATE and a sentence that helps.
//!
//! The operator's half (the cause, the tenant, the side that failed) is logged where it happens and never sent.

mod limit;

use std::time::Duration;

pub use self::limit::Limit;

use crate::wire::message::{Severity, error_response};

/// An ErrorResponse of our own. `Display` is the message a client reads; it never carries a name that the client
/// did not itself send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Worded alike for an unknown login, an unknown tenant and a wrong password, so that names cannot be probed.
    #[error("password authentication failed for user \"{user}\"")]
    LoginFailed {
        /// As the client sent it.
        user: String,
    },
    /// A startup packet without a user.
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    /// `client_tls_sslmode = "require"`.
    #[error("this endpoint requires an encrypted connection (sslmode=require)")]
    EncryptionRequired,
    /// Hints that name different tenants.
    #[error("the connection names more than one tenant: {first} and {second}")]
    ContradictingTenants {
        /// The hint that speaks first.
        first: String,
        /// The one that disagrees.
        second: String,
    },
    /// An operator closed the tenant.
    #[error("tenant \"{tenant}\" is suspended{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Suspended {
        /// The tenant the proven login asked for.
        tenant: String,
        /// The operator's words.
        reason: Option<String>,
    },
    /// A tombstone.
    #[error("database \"{tenant}\" does not exist (it was dropped)")]
    Dropped {
        /// The tenant the proven login asked for.
        tenant: String,
    },
    /// A read_only login of a tenant that has no read-only role.
    #[error("there is no read-only role for this database yet")]
    NoReadOnlyRole,
    /// Being made or removed.
    #[error("tenant \"{tenant}\" is not ready yet; please try again")]
    NotReady {
        /// The tenant the proven login asked for.
        tenant: String,
    },
    /// The central database did not answer and nothing was cached.
    #[error("pglobby cannot look up logins at the moment; please try again")]
    DirectoryUnavailable,
    /// `max_client_conn`, or descriptors ran out.
    #[error("sorry, too many clients already")]
    TooManyClients,
    /// Guesses, from the client's address: what it said is not told to be right or wrong.
    #[error("too many failed logins from this address; please try again later")]
    TooManyFailedLogins,
    /// The tenant's own limit.
    #[error("too many connections for database \"{tenant}\"")]
    TooManyClientsOfTenant {
        /// The tenant the proven login asked for.
        tenant: String,
    },
    /// More would be kept for the session, its tenant or all than may be.
    #[error("{}", .limit.words(*.max))]
    MemoryLimit {
        /// The limit that would be exceeded.
        limit: Limit,
        /// What it is.
        max: usize,
    },
    /// The same, where it is no statement that can be refused.
    #[error("terminating connection because it does not take what it is sent: {}", .limit.words(*.max))]
    UnsentLimit {
        /// The limit that would be exceeded.
        limit: Limit,
        /// What it is.
        max: usize,
    },
    /// `max_queued_notifications`.
    #[error(
        "terminating connection because more than {limit} bytes of notifications wait for it (max_queued_notifications)"
    )]
    TooManyNotifications {
        /// The limit.
        limit: usize,
    },
    /// The connection that listened for this client broke.
    #[error("terminating connection because the connection that listened for it was lost; LISTEN again")]
    ListenerLost,
    /// PAUSE, `tenant move`: nobody listens meanwhile.
    #[error(
        "terminating connection because notifications could be missed while the database is held still; LISTEN again"
    )]
    ListenerPaused,
    /// A service login's session that has chosen no tenant yet.
    #[error(
        "no tenant is chosen; choose one with SET pglobby.tenant = 'NAME' (or in a transaction: SET LOCAL)"
    )]
    NoTenantChosen,
    /// Worded alike for a tenant that does not exist and one that is not granted.
    #[error("permission denied for tenant \"{tenant}\"")]
    TenantDenied {
        /// As the client spelled it.
        tenant: String,
    },
    /// The session has something in its tenant's database that it would lose.
    #[error(
        "the tenant cannot be changed while the session keeps its server ({reasons}): undo that first, or DISCARD ALL"
    )]
    TenantPinned {
        /// The pins, by name.
        reasons: String,
    },
    /// A choice of a tenant that cannot be made there, or so.
    #[error(transparent)]
    TenantSwitch(#[from] TenantSwitchError),
    /// A change of a role or a database that is the operator's, or a change of a password that cannot be made so.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The central database did not say whether it has taken a login's new password.
    #[error(
        "pglobby cannot change passwords at the moment, and the old or the new one may hold; please try again"
    )]
    PasswordNotStored,
    /// A login's own password was changed again and again.
    #[error(
        "the password of this login was changed too often; please try again in {} s",
        wait.as_millis().div_ceil(1000)
    )]
    PasswordTooOften {
        /// When it may be changed again.
        wait: Duration,
    },
    /// PostgreSQL's own answer, given where no server is asked.
    #[error("{message}")]
    AsPostgres {
        /// Its SQLSTATE.
        sqlstate: &'static str,
        /// Its words.
        message: String,
    },
    /// PostgreSQL's answer to a statement whose columns have changed.
    #[error("cached plan must not change result type")]
    ResultChanged,
    /// `max_pinned_servers`: the session would have had to keep its server.
    #[error(
        "too many sessions keep a server of this database for themselves: at most {limit} may (max_pinned_servers); \
         this one would because of: {reasons}. What it asked for last was done"
    )]
    TooManyPinned {
        /// The limit.
        limit: usize,
        /// Why it would have kept it.
        reasons: String,
    },
    /// Every server of this pool stayed busy for the whole wait.
    #[error("no server connection became free within {waited:?} (query_wait_timeout); please try again")]
    PoolBusy {
        /// `query_wait_timeout`.
        waited: Duration,
    },
    /// The server could not be reached or refused us; `reason` has no host, role or password in it.
    #[error("could not connect to the tenant's database: {reason}")]
    ServerUnreachable {
        /// The SQLSTATE the server gave, if it gave one.
        sqlstate: Option<[u8; 5]>,
        /// The real reason, fit for a client.
        reason: String,
    },
    /// The server's own error, at login.
    #[error("{message}")]
    Server {
        /// Its SQLSTATE.
        sqlstate: String,
        /// Its message.
        message: String,
    },
    /// The server's connection broke while it worked for this client.
    #[error("server closed the connection unexpectedly")]
    ServerLost,
    /// The same where a COMMIT was not answered.
    #[error(
        "the connection to the server was lost before it answered a COMMIT: whether the transaction was committed is not known"
    )]
    OutcomeUnknown,
    /// Bytes that are not PostgreSQL's protocol.
    #[error("{0}")]
    ProtocolViolation(String),
    /// Something PostgreSQL has and we do not.
    #[error("{0}")]
    NotSupported(String),
    /// TERM, drain, restart.
    #[error("terminating connection due to administrator command")]
    AdminShutdown,
    /// SUSPEND, DROP, KILL, revoked login.
    #[error("terminating connection due to administrator command: {0}")]
    Ended(String),
    /// The login took too long.
    #[error("canceling authentication due to timeout")]
    LoginTimeout,
    /// `client_idle_timeout`, `idle_transaction_timeout`, `query_timeout`, `transaction_timeout`.
    #[error("terminating connection due to {setting}")]
    TimedOut {
        /// The setting's name.
        setting: &'static str,
        /// Which SQLSTATE PostgreSQL gives for the like.
        sqlstate: &'static str,
    },
    /// A cancel request came while the client waited for a server.
    #[error("canceling statement due to user request")]
    Cancelled,
    /// A defect of ours; the operator's log has the story.
    #[error("internal error in pglobby")]
    Internal,
}

/// Why a text that speaks of `pglobby.tenant` is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TenantSwitchError {
    /// An employee's session belongs to one tenant.
    #[error("permission denied to set parameter \"pglobby.tenant\": the login belongs to one tenant")]
    Employee,
    /// A server has begun the transaction.
    #[error(
        "the tenant cannot be chosen in a transaction that has begun: choose it before, or first thing in it by SET LOCAL"
    )]
    TransactionBegun,
    /// SET without LOCAL behind BEGIN.
    #[error(
        "SET pglobby.tenant does not go into a transaction: SET LOCAL pglobby.tenant does, or SET before BEGIN"
    )]
    NotLocal,
    /// SET LOCAL without BEGIN.
    #[error("SET LOCAL pglobby.tenant chooses the tenant of one transaction: BEGIN first")]
    NoTransaction,
    /// Other statements in the same text, or a spelling that is not supported.
    #[error(
        "the tenant is chosen by a statement of its own: SET pglobby.tenant = 'NAME', and nothing else in its text"
    )]
    NotAlone,
    /// The transaction that had a tenant of its own is over, or a reset has been run.
    #[error(
        "nothing can run behind the end of a transaction with a tenant of its own, or behind a reset, in the same text or batch"
    )]
    Over,
    /// `pool_mode = "session"`.
    #[error("the tenant cannot be changed by a session that keeps its server (pool_mode = session)")]
    SessionMode,
}

/// Why a text about roles or about the database itself is refused. The roles on the server are shared by all logins of a
/// tenant, so what would change them belongs to the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// ALTER ROLE, DROP ROLE and their like of a tenant's role.
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
    /// ALTER DATABASE … SET of a parameter that decides who a session is, or whether it starts.
    #[error("permission denied to set this parameter for the database")]
    DatabaseSetting,
    /// GRANT or REVOKE ON DATABASE.
    #[error("permission denied to change who may use the database")]
    DatabaseAccess,
    /// The password of one's own login, inside a transaction.
    #[error("a password cannot be changed inside a transaction block")]
    PasswordInTransaction,
    /// The same, with something else in its text.
    #[error("a password is changed by a statement of its own")]
    PasswordNotAlone,
    /// PASSWORD NULL, PASSWORD ''.
    #[error("a login needs a password")]
    PasswordMissing,
    /// `md5…`.
    #[error("md5 passwords are not supported")]
    PasswordMd5,
    /// U&'…', or bytes that are no UTF-8.
    #[error("the password is written in a way that is not supported")]
    PasswordUnclear,
    /// Longer than PostgreSQL takes one from a client.
    #[error("the password is too long")]
    PasswordTooLong,
    /// The login is not what it was when this session began.
    #[error("the login was changed meanwhile; log in again to change its password")]
    LoginChanged,
}

impl IdentityError {
    fn sqlstate(self) -> &'static str {
        match self {
            Self::Role
            | Self::Membership
            | Self::Owned
            | Self::Database
            | Self::DatabaseSetting
            | Self::DatabaseAccess
            | Self::LoginChanged => "42501",
            Self::PasswordInTransaction | Self::PasswordNotAlone => "25001",
            Self::PasswordMissing | Self::PasswordTooLong => "22023",
            Self::PasswordMd5 | Self::PasswordUnclear => "0A000",
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Self::Role => {
                "All logins of this database share its roles. A login's own password is changed by ALTER ROLE CURRENT_USER \
                 PASSWORD; an operator changes logins by `pglobby login set` and limits by `pglobby tenant set`; settings for \
                 everybody are made by ALTER DATABASE ... SET."
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
            Self::DatabaseSetting => "Sessions set it for themselves where they need it.",
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
            Self::PasswordTooLong => "At most 1024 bytes are taken.",
            Self::LoginChanged => "An operator sets a new password by `pglobby login set-password`.",
        }
    }
}

/// Why a server is made to refuse what its client has asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestError {
    /// It speaks of the session's tenant.
    TenantSwitch(TenantSwitchError),
    /// It would change a role, the database or a password.
    Identity(IdentityError),
    /// The statement would give other columns than the client knows of.
    ResultChanged,
    /// More would be kept than may be.
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

impl TenantSwitchError {
    fn sqlstate(self) -> &'static str {
        match self {
            Self::Employee => "42501",
            Self::TransactionBegun | Self::NotLocal => "25001",
            Self::NoTransaction => "25P01",
            Self::NotAlone | Self::Over => "0A000",
            Self::SessionMode => "55006",
        }
    }
}

impl ClientError {
    /// The SQLSTATE (PostgreSQL documentation, appendix A).
    pub fn sqlstate(&self) -> &str {
        match self {
            Self::LoginFailed { .. } => "28P01",
            Self::NoUser | Self::EncryptionRequired => "28000",
            Self::ContradictingTenants { .. } => "28000",
            Self::Suspended { .. } => "57P03",
            Self::Dropped { .. } => "3D000",
            Self::NoReadOnlyRole => "0LP01",
            Self::NotReady { .. } | Self::DirectoryUnavailable | Self::PasswordNotStored => "57P03",
            Self::TooManyClients
            | Self::TooManyFailedLogins
            | Self::TooManyClientsOfTenant { .. }
            | Self::TooManyPinned { .. } => "53300",
            Self::TooManyNotifications { .. } | Self::PasswordTooOften { .. } => "53400",
            Self::MemoryLimit { limit, .. } | Self::UnsentLimit { limit, .. } => limit.sqlstate(),
            Self::NoTenantChosen => "55000",
            Self::TenantDenied { .. } => "42501",
            Self::TenantPinned { .. } => "55006",
            Self::TenantSwitch(reason) => reason.sqlstate(),
            Self::Identity(reason) => reason.sqlstate(),
            Self::AsPostgres { sqlstate, .. } => sqlstate,
            Self::ResultChanged => "0A000",
            Self::PoolBusy { .. } | Self::Cancelled => "57014",
            Self::ServerUnreachable { sqlstate, .. } => {
                sqlstate.as_ref().and_then(|code| std::str::from_utf8(code).ok()).unwrap_or("08006")
            }
            Self::Server { sqlstate, .. } if sqlstate.len() == 5 => sqlstate,
            Self::Server { .. } => "XX000",
            Self::ServerLost => "08006",
            Self::OutcomeUnknown => "08007",
            Self::ProtocolViolation(_) => "08P01",
            Self::NotSupported(_) => "0A000",
            Self::AdminShutdown | Self::Ended(_) | Self::ListenerLost | Self::ListenerPaused => "57P01",
            Self::LoginTimeout => "57014",
            Self::TimedOut { sqlstate, .. } => sqlstate,
            Self::Internal => "XX000",
        }
    }

    /// Appends the ErrorResponse that a client gets.
    pub fn write(&self, severity: Severity, out: &mut Vec<u8>) {
        // Drivers (postgres.js, pgjdbc) prepare anew and try again only where this routine has spoken.
        let more = match self {
            Self::ResultChanged => Some((b'R', "RevalidateCachedQuery")),
            Self::Identity(reason) => Some((b'H', reason.hint())),
            _ => None,
        };
        error_response(out, severity, self.sqlstate(), &self.to_string(), more);
    }
}
