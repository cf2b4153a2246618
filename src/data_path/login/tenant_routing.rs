//! Which tenant a session belongs to. Pure: hints and rows come in, a verdict goes out.
//!
//! The order is part of the contract: `options`, the database name, `user@tenant`, the TLS server name, the login's only
//! tenant. Hints that contradict each other are refused.

#[cfg(test)]
mod tests;

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use crate::{
    data_path::tenant::{Access, Login, LoginKind, Tenant, TenantStatus, allowed_from},
    error::ClientError,
};

/// The databases that are the admin console; the second so that existing exporters work.
pub const CONSOLE_DATABASES: [&str; 2] = ["pglobby", "pgbouncer"];

/// The first of them is, for a service login, the place where no tenant is chosen yet.
pub const LOBBY_DATABASE: &str = CONSOLE_DATABASES[0];

/// Where a proven session goes.
#[derive(Debug, Clone)]
pub enum Route {
    /// To a tenant's database.
    Tenant {
        /// Which.
        tenant: Arc<Tenant>,
        /// With what rights.
        access: Access,
    },
    /// To the admin console.
    Console {
        /// May only SHOW.
        read_only: bool,
    },
    /// To no tenant yet: the session chooses one by `SET pglobby.tenant`.
    NoTenant,
}

/// What a client says about where it wants to go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// `options=-c pglobby.tenant=…`.
    pub option: Option<String>,
    /// The database name.
    pub database: Option<String>,
    /// The user name.
    pub user: String,
    /// The TLS server name's first label, under a suffix of ours.
    pub server_name: Option<String>,
}

impl Hints {
    /// The server name's first label, if the rest is one of `suffixes`.
    pub fn tenant_of_server_name(name: &str, suffixes: &[String]) -> Option<String> {
        let (label, rest) = name.split_once('.')?;
        let known = suffixes.iter().any(|suffix| suffix.trim_start_matches('.').eq_ignore_ascii_case(rest));
        (known && !label.is_empty()).then(|| label.to_owned())
    }

    /// The user name split at its last `@`, where it may name login and tenant.
    pub fn split_user(&self) -> Option<(&str, &str)> {
        self.user.rsplit_once('@').filter(|(login, tenant)| !login.is_empty() && !tenant.is_empty())
    }

    /// Every name in it that may be a tenant's, each once.
    pub fn names(&self) -> Vec<&str> {
        let database = self.database.as_deref().filter(|_| !self.wants_console());
        let suffix = self.split_user().map(|(_, tenant)| tenant);
        let mut names: Vec<&str> = Vec::new();
        for name in
            [self.option.as_deref(), database, suffix, self.server_name.as_deref()].into_iter().flatten()
        {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Whether the client wants the console.
    pub fn wants_console(&self) -> bool {
        self.database.as_deref().is_some_and(|name| CONSOLE_DATABASES.contains(&name))
    }

    /// Whether the client wants no tenant yet, in so many words. Only a service login may.
    pub fn wants_lobby(&self) -> bool {
        self.database.as_deref() == Some(LOBBY_DATABASE)
    }

    /// The tenant that is named, by the first hint that speaks. `split`: the user name is a login and a tenant.
    /// `exists` tells whether a name is a tenant's.
    ///
    /// # Errors
    /// [`ClientError::ContradictingTenants`].
    pub fn tenant(&self, split: bool, exists: impl Fn(&str) -> bool) -> Result<Option<String>, ClientError> {
        let login =
            if split { self.split_user().map_or(&*self.user, |(login, _)| login) } else { &self.user };
        // Drivers send the user name where no database was given.
        let unsaid = |name: &str| (name == self.user || name == login) && !exists(name);
        let hints = [
            self.option.as_deref(),
            self.database.as_deref().filter(|name| !unsaid(name) && !self.wants_console()),
            self.split_user().map(|(_, tenant)| tenant).filter(|_| split),
            self.server_name.as_deref(),
        ];
        let mut named: Option<&str> = None;
        for hint in hints.into_iter().flatten() {
            match named {
                Some(first) if first != hint => {
                    return Err(ClientError::ContradictingTenants {
                        first: first.into(),
                        second: hint.into(),
                    });
                }
                _ => named = Some(hint),
            }
        }
        Ok(named.map(str::to_owned))
    }
}

/// Why a login fails although its password may be right. Told to the operator only: the client hears the same words as for
/// a wrong password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LoginRefusal {
    /// No such login.
    #[error("no such login")]
    UnknownLogin,
    /// The proof was wrong.
    #[error("wrong password")]
    WrongPassword,
    /// The stored verifier is none; nobody can log in.
    #[error("the login's verifier cannot be read; set a new password")]
    BrokenVerifier,
    /// `disabled_at`.
    #[error("the login is disabled")]
    Disabled,
    /// `valid_until`.
    #[error("the login has expired")]
    Expired,
    /// `allow_from` of the login, the tenant or the console.
    #[error("the client's address is not allowed")]
    Address,
    /// No such tenant.
    #[error("no such tenant")]
    UnknownTenant,
    /// The login may not go there.
    #[error("the tenant is not granted to the login")]
    NotGranted,
    /// A tenant's login at the console, or an administrator's anywhere else.
    #[error("the login is not one for the console, or is for it only")]
    Console,
}

/// A verdict that is not good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Verdict {
    /// The client hears of a wrong password.
    #[error("{0}")]
    Denied(LoginRefusal),
    /// A client whose proof is right hears this.
    #[error("{0}")]
    Refused(ClientError),
}

impl Verdict {
    /// What a client that proved to be `user`, or failed to, is told.
    pub fn into_refusal(self, user: &str) -> ClientError {
        match self {
            Self::Denied(_) => ClientError::LoginFailed { user: user.to_owned() },
            Self::Refused(refusal) => refusal,
        }
    }
}

/// What the directory knows of a name.
#[derive(Debug, Clone)]
pub enum Known {
    /// A tenant's, or a tombstone's.
    Tenant(Arc<Tenant>),
    /// Nobody's.
    Nobody,
    /// The central database does not say.
    Unavailable,
}

/// Where a login wants to go.
#[derive(Debug)]
pub enum Goal {
    /// To the console, where it may go.
    Console {
        /// May only SHOW.
        read_only: bool,
    },
    /// To the tenant that a hint names.
    Named(Arc<Tenant>),
    /// To its only tenant, by id.
    Only(i64),
    /// To no tenant yet.
    Lobby,
}

/// A login that has proved itself, and everything it is judged by.
#[derive(Debug)]
pub struct RouteRequest<'a> {
    /// The login.
    pub login: &'a Login,
    /// What the client says.
    pub hints: &'a Hints,
    /// The user name is this login's, `@`, and a tenant's.
    pub split: bool,
    /// What is known of [`Hints::names`].
    pub tenants: &'a [(String, Known)],
    /// Where the client is.
    pub peer: Option<IpAddr>,
    /// Now.
    pub now: SystemTime,
    /// Where administrators may come from.
    pub admin_allow_from: &'a [ipnet::IpNet],
}

impl RouteRequest<'_> {
    /// Where the login wants to go, if it may be used at all.
    ///
    /// # Errors
    /// [`Verdict`].
    pub fn goal(&self) -> Result<Goal, Verdict> {
        let denied = |denial| Err(Verdict::Denied(denial));
        if self.login.disabled {
            return denied(LoginRefusal::Disabled);
        }
        if self.login.valid_until.is_some_and(|until| until <= self.now) {
            return denied(LoginRefusal::Expired);
        }
        if !allowed_from(&self.login.allow_from, self.peer) {
            return denied(LoginRefusal::Address);
        }
        match (&self.login.kind, self.hints.wants_console()) {
            // A Unix socket is this machine.
            (LoginKind::Admin { .. }, true)
                if self.peer.is_some() && !allowed_from(self.admin_allow_from, self.peer) =>
            {
                denied(LoginRefusal::Address)
            }
            (LoginKind::Admin { read_only }, true) => Ok(Goal::Console { read_only: *read_only }),
            (LoginKind::Service { .. }, true) if self.hints.wants_lobby() => self.tenant_of(&self.login.kind),
            (LoginKind::Admin { .. }, false) | (_, true) => denied(LoginRefusal::Console),
            (kind, false) => self.tenant_of(kind),
        }
    }

    fn tenant_of(&self, kind: &LoginKind) -> Result<Goal, Verdict> {
        let exists = |name: &str| is_tenant(self.tenants, name, kind);
        match self.hints.tenant(self.split, exists).map_err(Verdict::Refused)? {
            Some(name) => match known(self.tenants, &name) {
                Known::Tenant(tenant) => Ok(Goal::Named(tenant.clone())),
                Known::Nobody => Err(Verdict::Denied(LoginRefusal::UnknownTenant)),
                Known::Unavailable => Err(Verdict::Refused(ClientError::DirectoryUnavailable)),
            },
            None => {
                // A database equal to the user name may be a tenant all the same. An employee has one tenant in any case.
                let unsure = self.hints.database.as_deref().map(|name| known(self.tenants, name));
                if matches!((unsure, kind), (Some(Known::Unavailable), LoginKind::Service { .. })) {
                    return Err(Verdict::Refused(ClientError::DirectoryUnavailable));
                }
                // A service login may choose later.
                let only = only_tenant(kind).filter(|_| !self.hints.wants_lobby());
                Ok(only.map_or(Goal::Lobby, Goal::Only))
            }
        }
    }

    /// Whether the login may enter a tenant. `None`: there is no row of it.
    ///
    /// # Errors
    /// [`Verdict`].
    pub fn enter(&self, tenant: Option<Arc<Tenant>>) -> Result<Route, Verdict> {
        let tenant = tenant.ok_or(Verdict::Denied(LoginRefusal::UnknownTenant))?;
        let access =
            access_to(&self.login.kind, tenant.id).ok_or(Verdict::Denied(LoginRefusal::NotGranted))?;
        if !allowed_from(&tenant.allow_from, self.peer) {
            return Err(Verdict::Denied(LoginRefusal::Address));
        }
        admit(&tenant).map_err(Verdict::Refused)?;
        Ok(Route::Tenant { tenant, access })
    }
}

fn known<'a>(tenants: &'a [(String, Known)], name: &str) -> &'a Known {
    tenants.iter().find(|(asked, _)| asked == name).map_or(&Known::Nobody, |(_, known)| known)
}

/// Whether a name is a tenant's, as far as can be said: where the directory is silent, a login knows its own.
pub fn is_tenant(tenants: &[(String, Known)], name: &str, kind: &LoginKind) -> bool {
    match known(tenants, name) {
        Known::Tenant(_) => true,
        Known::Nobody => false,
        Known::Unavailable => {
            matches!(kind, LoginKind::Employee { tenant_name, .. } if tenant_name == name)
        }
    }
}

/// What a login may do at a tenant; `None`: nothing.
pub fn access_to(kind: &LoginKind, tenant: i64) -> Option<Access> {
    match kind {
        LoginKind::Employee { tenant_id, access, .. } => (*tenant_id == tenant).then_some(*access),
        LoginKind::Service { all_tenants, granted } => {
            granted.iter().find(|grant| grant.tenant_id == tenant).map(|grant| grant.access).or(*all_tenants)
        }
        LoginKind::Admin { .. } => None,
    }
}

/// The tenant that a login alone names, by id: its name may have been taken again since.
fn only_tenant(kind: &LoginKind) -> Option<i64> {
    match kind {
        LoginKind::Employee { tenant_id, .. } => Some(*tenant_id),
        LoginKind::Service { all_tenants: None, granted } => {
            let mut living = granted.iter().filter(|grant| grant.living);
            living.next().filter(|_| living.next().is_none()).map(|only| only.tenant_id)
        }
        LoginKind::Service { .. } | LoginKind::Admin { .. } => None,
    }
}

/// Whether the tenant is open.
///
/// # Errors
/// Why it is not, in words for those who belong to it.
pub fn admit(tenant: &Tenant) -> Result<(), ClientError> {
    let name = tenant.name.clone();
    match tenant.status {
        TenantStatus::Active => Ok(()),
        TenantStatus::Provisioning => Err(ClientError::NotReady { tenant: name }),
        TenantStatus::Suspended => {
            Err(ClientError::Suspended { tenant: name, reason: tenant.status_reason.clone() })
        }
        TenantStatus::Dropping | TenantStatus::Dropped => Err(ClientError::Dropped { tenant: name }),
    }
}
