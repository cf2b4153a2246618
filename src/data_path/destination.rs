//! Which tenant a session belongs to. Pure: hints and rows come in, a verdict goes out.
//!
//! The order is part of the contract: `options`, the database name, `user@tenant`, the TLS server name, the login's only
//! tenant. Hints that contradict each other are refused.

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use super::tenant::{Access, Login, LoginKind, Tenant, TenantStatus, allowed_from};
use crate::error::Refusal;

/// The databases that are the admin console; the second so that existing exporters work.
pub const CONSOLE_DATABASES: [&str; 2] = ["pglobby", "pgbouncer"];

/// Where a proven session goes.
#[derive(Debug, Clone)]
pub enum Destination {
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

    /// Whether the client wants the console.
    pub fn wants_console(&self) -> bool {
        self.database.as_deref().is_some_and(|name| CONSOLE_DATABASES.contains(&name))
    }

    /// The tenant that is named, by the first hint that speaks. `split`: the user name is a login and a tenant.
    /// `exists` tells whether a name is a tenant's.
    ///
    /// # Errors
    /// [`Refusal::ContradictingTenants`].
    pub fn tenant(&self, split: bool, exists: impl Fn(&str) -> bool) -> Result<Option<String>, Refusal> {
        let login =
            if split { self.split_user().map_or(&*self.user, |(login, _)| login) } else { &self.user };
        // Drivers send the user name where no database was given.
        let unsaid = |name: &str| (name == self.user || name == login) && !exists(name);
        let hints = [
            self.option.as_deref(),
            self.database.as_deref().filter(|name| !unsaid(name)),
            self.split_user().map(|(_, tenant)| tenant).filter(|_| split),
            self.server_name.as_deref(),
        ];
        let mut named: Option<&str> = None;
        for hint in hints.into_iter().flatten() {
            match named {
                Some(first) if first != hint => {
                    return Err(Refusal::ContradictingTenants { first: first.into(), second: hint.into() });
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
pub enum Denial {
    /// No such login.
    #[error("no such login")]
    UnknownLogin,
    /// The proof was wrong.
    #[error("wrong password")]
    WrongPassword,
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The client hears of a wrong password.
    Denied(Denial),
    /// A client whose proof is right hears this.
    Refused(Refusal),
}

/// Everything a login is judged by, looked up.
#[derive(Debug)]
pub struct Case<'a> {
    /// The login.
    pub login: &'a Login,
    /// The tenant's name, if one was named or is the login's only one; and its row, if there is one.
    pub tenant: Option<Option<Arc<Tenant>>>,
    /// The client wants the console.
    pub console: bool,
    /// Where the client is.
    pub peer: Option<IpAddr>,
    /// Now.
    pub now: SystemTime,
    /// Where administrators may come from.
    pub admin_allow_from: &'a [ipnet::IpNet],
}

impl Case<'_> {
    /// Where the session goes if the proof is right.
    ///
    /// # Errors
    /// [`Verdict`].
    pub fn judge(&self) -> Result<Destination, Verdict> {
        let login = self.login;
        let denied = |denial| Err(Verdict::Denied(denial));
        if login.disabled {
            return denied(Denial::Disabled);
        }
        if login.valid_until.is_some_and(|until| until <= self.now) {
            return denied(Denial::Expired);
        }
        if !allowed_from(&login.allow_from, self.peer) {
            return denied(Denial::Address);
        }
        match (&login.kind, self.console) {
            (LoginKind::Admin { read_only }, true) => {
                // A Unix socket is this machine.
                if self.peer.is_some() && !allowed_from(self.admin_allow_from, self.peer) {
                    return denied(Denial::Address);
                }
                return Ok(Destination::Console { read_only: *read_only });
            }
            (LoginKind::Admin { .. }, false) | (_, true) => return denied(Denial::Console),
            _ => {}
        }
        let tenant = match &self.tenant {
            None => return Err(Verdict::Refused(Refusal::NoTenant)),
            Some(None) => return denied(Denial::UnknownTenant),
            Some(Some(tenant)) => tenant,
        };
        let Some(access) = access_to(&login.kind, tenant.id) else {
            return denied(Denial::NotGranted);
        };
        if !allowed_from(&tenant.allow_from, self.peer) {
            return denied(Denial::Address);
        }
        admit(tenant).map_err(Verdict::Refused)?;
        Ok(Destination::Tenant { tenant: tenant.clone(), access })
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

/// The tenant that a login alone names.
pub fn only_tenant(kind: &LoginKind) -> Option<&str> {
    match kind {
        LoginKind::Employee { tenant_name, .. } => Some(tenant_name),
        LoginKind::Service { all_tenants: None, granted } => match &**granted {
            [only] => Some(&only.tenant_name),
            _ => None,
        },
        LoginKind::Service { .. } | LoginKind::Admin { .. } => None,
    }
}

/// Whether the tenant is open.
///
/// # Errors
/// Why it is not, in words for those who belong to it.
pub fn admit(tenant: &Tenant) -> Result<(), Refusal> {
    let name = tenant.name.clone();
    match tenant.status {
        TenantStatus::Active => Ok(()),
        TenantStatus::Provisioning => Err(Refusal::NotReady { tenant: name }),
        TenantStatus::Suspended => {
            Err(Refusal::Suspended { tenant: name, reason: tenant.status_reason.clone() })
        }
        TenantStatus::Dropping | TenantStatus::Dropped => Err(Refusal::Dropped { tenant: name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(option: &str, database: &str, user: &str, server_name: &str) -> Hints {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Hints {
            option: some(option),
            database: some(database),
            user: user.into(),
            server_name: some(server_name),
        }
    }

    fn tenant(hints: &Hints, split: bool) -> Result<Option<String>, Refusal> {
        hints.tenant(split, |name| name == "acme" || name == "globex")
    }

    #[test]
    fn the_first_hint_that_speaks_names_the_tenant() {
        let some = |name: &str| Ok(Some(name.to_owned()));
        assert_eq!(tenant(&hints("acme", "", "alice", ""), false), some("acme"));
        assert_eq!(tenant(&hints("", "acme", "alice", ""), false), some("acme"));
        assert_eq!(tenant(&hints("", "", "alice@acme", ""), true), some("acme"));
        assert_eq!(tenant(&hints("", "", "alice", "acme"), false), some("acme"));
        assert_eq!(tenant(&hints("", "", "alice", ""), false), Ok(None));
        assert_eq!(tenant(&hints("acme", "acme", "alice@acme", "acme"), true), some("acme"));
    }

    #[test]
    fn a_database_equal_to_the_user_name_says_nothing_unless_it_is_a_tenant() {
        assert_eq!(tenant(&hints("acme", "alice", "alice", ""), false), Ok(Some("acme".into())));
        assert_eq!(tenant(&hints("", "acme", "acme", ""), false), Ok(Some("acme".into())));
        assert_eq!(tenant(&hints("", "alice@acme", "alice@acme", ""), true), Ok(Some("acme".into())));
        assert_eq!(tenant(&hints("globex", "acme", "acme", ""), false).unwrap_err().sqlstate(), "28000");
    }

    #[test]
    fn an_email_address_is_a_login_and_no_hint() {
        assert_eq!(tenant(&hints("", "acme", "bob@globex", ""), false), Ok(Some("acme".into())));
        assert!(tenant(&hints("", "acme", "bob@globex", ""), true).is_err());
    }

    #[test]
    fn hints_that_contradict_each_other_are_refused() {
        for hints in [
            hints("acme", "globex", "alice", ""),
            hints("", "acme", "alice", "globex"),
            hints("", "nowhere", "alice", "acme"),
        ] {
            assert!(matches!(tenant(&hints, false), Err(Refusal::ContradictingTenants { .. })), "{hints:?}");
        }
    }

    #[test]
    fn a_server_name_counts_under_a_suffix_of_ours_only() {
        let suffixes = ["db.example.com".to_owned()];
        let of = |name: &str| Hints::tenant_of_server_name(name, &suffixes);
        assert_eq!(of("acme.db.example.com").as_deref(), Some("acme"));
        assert_eq!(of("acme.DB.example.com").as_deref(), Some("acme"));
        for name in ["db.example.com", "a.b.db.example.com", "acme.example.com", ".db.example.com", "acme"] {
            assert_eq!(of(name), None, "{name}");
        }
    }

    #[test]
    fn a_user_name_is_split_at_its_last_at() {
        assert_eq!(
            hints("", "", "bob@mail.example@acme", "").split_user(),
            Some(("bob@mail.example", "acme"))
        );
        assert_eq!(hints("", "", "@acme", "").split_user(), None);
        assert_eq!(hints("", "", "bob@", "").split_user(), None);
    }
}
