//! Routes a login to its tenant. [`look_up`] and [`route`] ask the directory; the decisions between them wait
//! for nothing.
//!
//! The order of the hints is a contract: `options`, the database name, `user@tenant`, the TLS server name,
//! the login's only tenant. Hints that contradict each other are refused.

#[cfg(test)]
mod tests;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use futures_util::future::join_all;
use tracing::warn;

use super::{
    authentication::{AuthContext, Proof},
    startup::StartupPacket,
};
use crate::{
    data_path::{
        directory::{Directory, DirectoryError},
        tenant::{Access, Login, LoginKind, Tenant, TenantStatus, allowed_from},
    },
    error::ClientError,
};

/// The rows of the directory for the names that a client sends.
#[derive(Debug)]
pub struct LookedUp {
    pub hints: Hints,
    /// The login; `None`: not found, or not known.
    pub login: Option<Arc<Login>>,
    /// The central database did not say whether the login exists.
    login_unavailable: bool,
    /// The user name is `<login>@<tenant>`.
    split: bool,
    /// The tenants, by each of [`Hints::names`].
    tenants: Vec<(String, NameLookup)>,
    /// When the look-up began; the answer is timed from here.
    pub begun: Instant,
}

impl LookedUp {
    /// The name of the tenant that the client asks for, if there is such a tenant. For logs.
    pub fn tenant_name(&self) -> Option<&str> {
        let found = self.tenants.iter().find(|(_, found)| matches!(found, NameLookup::Tenant(_)));
        found.map(|(name, _)| &**name).or_else(|| match &self.login.as_ref()?.kind {
            LoginKind::Employee { tenant_name, .. } => Some(&**tenant_name),
            LoginKind::Service { .. } | LoginKind::Admin { .. } => None,
        })
    }
}

/// Looks up every name that may be a login's or a tenant's. The result for one name does not change which
/// others are looked up, so that a client cannot learn from the time which names exist.
pub async fn look_up(packet: &StartupPacket, context: &AuthContext<'_>) -> LookedUp {
    let (begun, directory) = (Instant::now(), context.directory);
    let hints = Hints::new(packet, context);
    let half_name = hints.split_user().map(|(name, _)| name);
    let logins = join_all(
        [Some(&*hints.user), half_name].into_iter().flatten().map(|name| look_up_login(name, directory)),
    );
    let tenants = join_all(hints.names().into_iter().map(|name| look_up_tenant(name, directory)));
    let (logins, tenants) = tokio::join!(logins, tenants);
    let is_missing =
        |found: &Result<_, DirectoryError>| matches!(found, Ok(None) | Err(DirectoryError::NotInSnapshot(_)));
    let login_unavailable = logins
        .iter()
        .any(|found| matches!(found, Err(DirectoryError::Unavailable(_) | DirectoryError::NotInSnapshot(_))));
    let mut logins = logins.into_iter();
    let whole = logins.next().unwrap_or(Ok(None));
    let half = logins.next().and_then(Result::ok).flatten().filter(|_| is_missing(&whole));
    let (login, split) = match whole {
        Ok(Some(login)) => (Some(login), false),
        _ => {
            let login = half.filter(|login| {
                hints.split_user().is_some_and(|(_, suffix)| is_tenant(&tenants, suffix, &login.kind))
            });
            let split = login.is_some();
            (login, split)
        }
    };
    LookedUp { hints, login, login_unavailable, split, tenants, begun }
}

async fn look_up_login(name: &str, directory: &dyn Directory) -> Result<Option<Arc<Login>>, DirectoryError> {
    let found = directory.login(name).await;
    found.inspect_err(|error| warn!(login = name, side = "central", %error, "cannot look up a login"))
}

async fn look_up_tenant(name: &str, directory: &dyn Directory) -> (String, NameLookup) {
    let found = match directory.tenant(name).await {
        Ok(Some(tenant)) => NameLookup::Tenant(tenant),
        Ok(None) | Err(DirectoryError::NotInSnapshot(_)) => NameLookup::NotFound,
        Err(error) => {
            warn!(tenant = name, side = "central", %error, "cannot look up a tenant");
            NameLookup::Unavailable
        }
    };
    (name.to_owned(), found)
}

/// Decides whether the client is authenticated and where its session goes.
pub async fn route(
    packet: &StartupPacket,
    names: &LookedUp,
    proof: &Proof,
    context: &AuthContext<'_>,
) -> Result<(Arc<Login>, Route), LoginError> {
    let login = match (&names.login, proof) {
        (Some(login), Proof::Right { .. }) => login,
        // The password or the name may have been set at the central database meanwhile.
        _ if names.login_unavailable || !context.directory.is_current() => {
            return Err(LoginError::Shown(ClientError::DirectoryUnavailable));
        }
        (None, _) => return Err(LoginError::Hidden(LoginRefusal::UnknownLogin)),
        (Some(_), Proof::NoVerifier) => return Err(LoginError::Hidden(LoginRefusal::BrokenVerifier)),
        (Some(_), Proof::Wrong) => return Err(LoginError::Hidden(LoginRefusal::WrongPassword)),
    };
    let request = RouteRequest {
        login,
        hints: &names.hints,
        split: names.split,
        tenants: &names.tenants,
        peer: packet.peer,
        now: SystemTime::now(),
        admin_allow_from: context.admin_allow_from,
    };
    // What is not known may be there, or granted, by now.
    let sure =
        |error| match error {
            LoginError::NoDatabase {
                reason: LoginRefusal::UnknownTenant | LoginRefusal::NotGranted, ..
            } if !context.directory.is_current() => LoginError::Shown(ClientError::DirectoryUnavailable),
            error => error,
        };
    let tenant = match request.target().map_err(sure)? {
        Target::Console { read_only } => return Ok((login.clone(), Route::Console { read_only })),
        Target::NoTenant => return Ok((login.clone(), Route::NoTenant)),
        Target::Tenant(tenant) => Some(tenant),
        Target::OnlyTenant(id) => context.directory.tenant_by_id(id).await.map_err(|error| {
            warn!(login = login.name, tenant_id = id, side = "central", %error, "cannot look up a tenant");
            LoginError::Shown(ClientError::DirectoryUnavailable)
        })?,
    };
    Ok((login.clone(), request.enter(tenant).map_err(sure)?))
}

/// The databases of the admin console; the second one is for exporters made for PgBouncer.
pub const CONSOLE_DATABASES: [&str; 2] = ["pglobby", "pgbouncer"];

/// A service login that names this database begins its session without a tenant.
pub const NO_TENANT_DATABASE: &str = CONSOLE_DATABASES[0];

/// Where an authenticated session goes.
#[derive(Debug, Clone)]
pub enum Route {
    /// To a tenant's database.
    Tenant {
        tenant: Arc<Tenant>,
        /// Its rights there.
        access: Access,
    },
    Console {
        /// May only SHOW.
        read_only: bool,
    },
    /// To no tenant yet; the session chooses one with `SET pglobby.tenant`.
    NoTenant,
}

/// The names in a startup packet that may select the tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// `options=-c pglobby.tenant=…`.
    pub option: Option<String>,
    pub database: Option<String>,
    pub user: String,
    /// The first label of the TLS server name, under one of `tenant_host_suffixes`.
    pub server_name: Option<String>,
    /// The database is one of `maintenance_databases`.
    pub is_maintenance: bool,
}

impl Hints {
    fn new(packet: &StartupPacket, context: &AuthContext<'_>) -> Self {
        let server_name = packet.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
        let suffixes = context.tenant_host_suffixes;
        Self {
            is_maintenance: packet
                .database
                .as_ref()
                .is_some_and(|database| context.maintenance_databases.contains(database)),
            option: packet.tenant_hint.clone(),
            database: packet.database.clone(),
            user: packet.user.clone(),
            server_name: server_name.and_then(|name| Self::tenant_of_server_name(name, suffixes)),
        }
    }

    /// Returns the first label of a server name if the rest is one of `suffixes`.
    pub fn tenant_of_server_name(name: &str, suffixes: &[String]) -> Option<String> {
        let (label, rest) = name.split_once('.')?;
        let known = suffixes.iter().any(|suffix| suffix.trim_start_matches('.').eq_ignore_ascii_case(rest));
        (known && !label.is_empty()).then(|| label.to_owned())
    }

    /// Splits the user name at its last `@` into login and tenant; `None` if one of them would be empty.
    pub fn split_user(&self) -> Option<(&str, &str)> {
        self.user.rsplit_once('@').filter(|(login, tenant)| !login.is_empty() && !tenant.is_empty())
    }

    /// Every name that may be a tenant's, each once.
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

    /// Whether the database name is the console's.
    pub fn wants_console(&self) -> bool {
        self.database.as_deref().is_some_and(|name| CONSOLE_DATABASES.contains(&name))
    }

    /// The database that the client asks for, in the words of PostgreSQL.
    fn database(&self) -> &str {
        let named = [&self.option, &self.database, &self.server_name].into_iter().flatten().next();
        named.unwrap_or(&self.user)
    }

    /// Whether the client asks for a session without a tenant. Only a service login may.
    pub fn wants_no_tenant(&self) -> bool {
        self.database.as_deref() == Some(NO_TENANT_DATABASE)
    }

    /// Returns the name of the tenant in the hints; `None` if they name none. `split`: the user name is
    /// `<login>@<tenant>`. `exists`: a tenant has that name. Errors: [`ClientError::ContradictingTenants`].
    pub fn tenant(&self, split: bool, exists: impl Fn(&str) -> bool) -> Result<Option<String>, ClientError> {
        let login =
            if split { self.split_user().map_or(&*self.user, |(login, _)| login) } else { &self.user };
        // Drivers send the user name if no database was given.
        let is_default =
            |name: &str| (name == self.user || name == login || self.is_maintenance) && !exists(name);
        let hints = [
            self.option.as_deref(),
            self.database.as_deref().filter(|name| !is_default(name) && !self.wants_console()),
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

/// The reason of a failed login. It is only logged: the client receives one error for all reasons that must look
/// alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LoginRefusal {
    #[error("no such login")]
    UnknownLogin,
    #[error("wrong password")]
    WrongPassword,
    /// The stored verifier cannot be parsed.
    #[error("the login's verifier cannot be read; set a new password")]
    BrokenVerifier,
    #[error("the login is disabled")]
    Disabled,
    #[error("the login has expired")]
    Expired,
    /// `allow_from` of the login, the tenant or the console.
    #[error("the client's address is not allowed")]
    Address,
    #[error("no such tenant")]
    UnknownTenant,
    /// The login has no access to the tenant.
    #[error("the tenant is not granted to the login")]
    NotGranted,
    /// A tenant's login asks for the console, or an administrator for a tenant.
    #[error("only administrators may use the console, and nothing else")]
    Console,
}

/// Why a login ends without a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// The client receives the error of a wrong password.
    #[error("{0}")]
    Hidden(LoginRefusal),
    /// The client has proved its password and asks for a database that it may not enter. It receives one error for
    /// a database that does not exist and one that is not its own.
    #[error("{reason}")]
    NoDatabase {
        /// For the log.
        reason: LoginRefusal,
        /// The database that the client asks for.
        database: String,
    },
    /// The client receives this error.
    #[error("{0}")]
    Shown(ClientError),
}

impl LoginError {
    /// The error that the client receives.
    pub fn into_client_error(self, user: &str) -> ClientError {
        match self {
            Self::Hidden(_) => ClientError::LoginFailed { user: user.to_owned() },
            Self::NoDatabase { database, .. } => ClientError::NoDatabase { database },
            Self::Shown(error) => error,
        }
    }
}

/// The result of looking up a tenant's name.
#[derive(Debug, Clone)]
pub enum NameLookup {
    /// The tenant; it may have been dropped.
    Tenant(Arc<Tenant>),
    /// No tenant has or had that name.
    NotFound,
    /// The central database did not answer.
    Unavailable,
}

/// Where a login asks to go.
#[derive(Debug)]
pub enum Target {
    /// To the console; it has access.
    Console {
        /// May only SHOW.
        read_only: bool,
    },
    /// To the tenant that a hint names.
    Tenant(Arc<Tenant>),
    /// To its only tenant, by id.
    OnlyTenant(i64),
    /// To no tenant yet.
    NoTenant,
}

/// An authenticated login and everything that decides where it may go.
#[derive(Debug)]
pub struct RouteRequest<'a> {
    pub login: &'a Login,
    pub hints: &'a Hints,
    /// The user name is `<login>@<tenant>`.
    pub split: bool,
    /// The look-ups of [`Hints::names`].
    pub tenants: &'a [(String, NameLookup)],
    /// The client's address; `None`: a Unix socket.
    pub peer: Option<IpAddr>,
    /// The present time, for `valid_until`.
    pub now: SystemTime,
    /// Networks that administrators may log in from; empty: all.
    pub admin_allow_from: &'a [ipnet::IpNet],
}

impl RouteRequest<'_> {
    /// Returns where the login asks to go, if it may be used from this address at this time.
    pub fn target(&self) -> Result<Target, LoginError> {
        let refused = |reason| Err(LoginError::Hidden(reason));
        if self.login.disabled {
            return refused(LoginRefusal::Disabled);
        }
        if self.login.valid_until.is_some_and(|until| until <= self.now) {
            return refused(LoginRefusal::Expired);
        }
        if !allowed_from(&self.login.allow_from, self.peer) {
            return refused(LoginRefusal::Address);
        }
        match (&self.login.kind, self.hints.wants_console()) {
            // Clients of the Unix socket are on this machine.
            (LoginKind::Admin { .. }, true)
                if self.peer.is_some() && !allowed_from(self.admin_allow_from, self.peer) =>
            {
                refused(LoginRefusal::Address)
            }
            (LoginKind::Admin { read_only }, true) => Ok(Target::Console { read_only: *read_only }),
            (LoginKind::Service { .. }, true) if self.hints.wants_no_tenant() => {
                self.tenant_of(&self.login.kind)
            }
            (LoginKind::Admin { .. }, false) | (_, true) => Err(self.no_database(LoginRefusal::Console)),
            (kind, false) => self.tenant_of(kind),
        }
    }

    /// The error for a database that the login may not enter. `alice@acme` is a login's name if there is no tenant
    /// acme, so it gets the error of an unknown login: otherwise it would tell which tenants exist.
    fn no_database(&self, reason: LoginRefusal) -> LoginError {
        match self.split {
            true => LoginError::Hidden(reason),
            false => LoginError::NoDatabase { reason, database: self.hints.database().to_owned() },
        }
    }

    fn tenant_of(&self, kind: &LoginKind) -> Result<Target, LoginError> {
        let exists = |name: &str| is_tenant(self.tenants, name, kind);
        match self.hints.tenant(self.split, exists).map_err(LoginError::Shown)? {
            Some(name) => match look_up_of(self.tenants, &name) {
                NameLookup::Tenant(tenant) => Ok(Target::Tenant(tenant.clone())),
                NameLookup::NotFound => Err(self.no_database(LoginRefusal::UnknownTenant)),
                NameLookup::Unavailable => Err(LoginError::Shown(ClientError::DirectoryUnavailable)),
            },
            None => {
                // A database equal to the user name may be a tenant. An employee has one tenant in any case.
                let database = self.hints.database.as_deref().map(|name| look_up_of(self.tenants, name));
                if matches!((database, kind), (Some(NameLookup::Unavailable), LoginKind::Service { .. })) {
                    return Err(LoginError::Shown(ClientError::DirectoryUnavailable));
                }
                // A service login may choose its tenant later.
                let only = only_tenant(kind).filter(|_| !self.hints.wants_no_tenant());
                Ok(only.map_or(Target::NoTenant, Target::OnlyTenant))
            }
        }
    }

    /// Returns the route to a tenant if the login has access to it. `None`: no such tenant.
    pub fn enter(&self, tenant: Option<Arc<Tenant>>) -> Result<Route, LoginError> {
        let tenant = tenant.ok_or_else(|| self.no_database(LoginRefusal::UnknownTenant))?;
        let access = access_to(&self.login.kind, tenant.id)
            .ok_or_else(|| self.no_database(LoginRefusal::NotGranted))?;
        if !allowed_from(&tenant.allow_from, self.peer) {
            return Err(LoginError::Hidden(LoginRefusal::Address));
        }
        admit(&tenant).map_err(LoginError::Shown)?;
        Ok(Route::Tenant { tenant, access })
    }
}

fn look_up_of<'a>(tenants: &'a [(String, NameLookup)], name: &str) -> &'a NameLookup {
    tenants.iter().find(|(other, _)| other == name).map_or(&NameLookup::NotFound, |(_, found)| found)
}

/// Whether a tenant has that name. If the directory did not answer, an employee's own tenant still counts.
fn is_tenant(tenants: &[(String, NameLookup)], name: &str, kind: &LoginKind) -> bool {
    match look_up_of(tenants, name) {
        NameLookup::Tenant(_) => true,
        NameLookup::NotFound => false,
        NameLookup::Unavailable => {
            matches!(kind, LoginKind::Employee { tenant_name, .. } if tenant_name == name)
        }
    }
}

/// A login's access to a tenant; `None`: it has none.
pub fn access_to(kind: &LoginKind, tenant: i64) -> Option<Access> {
    match kind {
        LoginKind::Employee { tenant_id, access, .. } => (*tenant_id == tenant).then_some(*access),
        LoginKind::Service { all_tenants, granted } => {
            granted.iter().find(|grant| grant.tenant_id == tenant).map(|grant| grant.access).or(*all_tenants)
        }
        LoginKind::Admin { .. } => None,
    }
}

/// The id of the only tenant of a login. Not the name: another tenant may have got it since.
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

/// Returns whether sessions may enter the tenant. The error is for the client.
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
