//! The SQLSTATE of each error (PostgreSQL documentation, appendix A). A busy pool gives 57014, a limit on
//! connections 53300, a limit of the configuration 53400.

use super::{ClientError, IdentityError, TenantSwitchError};

impl ClientError {
    /// The SQLSTATE.
    pub fn sqlstate(&self) -> &str {
        match self {
            Self::LoginFailed { .. } => "28P01",
            Self::NoUser | Self::EncryptionRequired | Self::ContradictingTenants { .. } => "28000",
            Self::NoDatabase { .. } | Self::Dropped { .. } => "3D000",
            Self::NoReadOnlyRole => "0LP01",
            Self::Suspended { .. }
            | Self::NotReady { .. }
            | Self::Moving { .. }
            | Self::DirectoryUnavailable
            | Self::PasswordNotStored => "57P03",
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
            Self::AsPostgres { sqlstate, .. } | Self::TimedOut { sqlstate, .. } => sqlstate,
            Self::ResultChanged | Self::NotSupported(_) => "0A000",
            Self::PoolBusy { .. } | Self::Cancelled | Self::LoginTimeout => "57014",
            Self::ServerUnreachable { sqlstate, .. } => {
                sqlstate.as_ref().and_then(|code| std::str::from_utf8(code).ok()).unwrap_or("08006")
            }
            Self::Server { sqlstate, .. } if sqlstate.len() == 5 => sqlstate,
            Self::Server { .. } | Self::Internal => "XX000",
            Self::ServerLost => "08006",
            Self::OutcomeUnknown => "08007",
            Self::ProtocolViolation(_) => "08P01",
            Self::AdminShutdown
            | Self::Replaced
            | Self::Ended(_)
            | Self::ListenerLost
            | Self::ListenerPaused => "57P01",
        }
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
}
