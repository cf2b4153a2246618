//! SQL that changes the roles or the database of the session's tenant. Pure.
//!
//! All logins of a tenant share two roles on the server (read-write and read-only), so a change of such a
//! role would affect all of them. A client's change of its own password applies to its login: the proxy
//! stores a new verifier in the central database. All other changes of the tenant's roles and database are
//! rejected with a hint.

#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use secrecy::SecretString;

use crate::{
    data_path::{
        sql::{GivenPassword, IdentityChange, Lexing, Named, identity_changes, may_change_identity},
        tenant::{Access, Login, Tenant, TenantAccess},
    },
    error::IdentityError,
};

/// The login of a session, and the tenant whose roles and database its servers use.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// `None` in tests and for replies that the proxy discards.
    pub login: Option<Arc<Login>>,
    /// `None` while no tenant is selected.
    pub tenant_access: Option<Arc<TenantAccess>>,
}

/// What the proxy does with a text that changes the tenant's roles or database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityDecision {
    /// Changes the login's password.
    Password(NewPassword),
    /// Rejects the text.
    Refused(IdentityError),
}

/// A password or verifier sent by a client. Debug output hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct NewPassword(zeroize::Zeroizing<Box<str>>);

impl NewPassword {
    /// Returns the password in plain text.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns a copy in a type that zeroises its memory.
    pub fn to_secret(&self) -> SecretString {
        SecretString::from(&**self.0)
    }
}

impl fmt::Debug for NewPassword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NewPassword")
    }
}

/// PostgreSQL's limit for a password message.
const PASSWORD_BYTES_MAX: usize = 1024;
/// NAMEDATALEN - 1: PostgreSQL truncates longer names.
const NAME_BYTES_MAX: usize = 63;
/// Parameters that change a session's role or can prevent a server from starting.
const FORBIDDEN_FOR_DATABASE: [&[u8]; 4] =
    [b"local_preload_libraries", b"session_preload_libraries", b"role", b"session_authorization"];

impl Identity {
    /// Returns the decision for a text; `None` sends the text to the server.
    pub fn decide(&self, sql: &[u8], lexing: Lexing) -> Option<IdentityDecision> {
        self.login.as_ref().filter(|_| may_change_identity(sql))?;
        let (changes, statements) = identity_changes(sql, lexing);
        let decisions: Vec<_> = changes.iter().filter_map(|change| self.decide_change(change)).collect();
        let refused = decisions.iter().find(|decision| matches!(decision, IdentityDecision::Refused(_)));
        match refused.or(decisions.first())? {
            IdentityDecision::Password(_) if statements > 1 => {
                Some(IdentityDecision::Refused(IdentityError::PasswordNotAlone))
            }
            decision => Some(decision.clone()),
        }
    }

    fn decide_change(&self, change: &IdentityChange<'_>) -> Option<IdentityDecision> {
        let refused = |is_rejected: bool, why| is_rejected.then_some(IdentityDecision::Refused(why));
        let any_tenant_role = |roles: &[Named<'_>]| roles.iter().any(|role| self.is_tenant_role(role));
        match change {
            IdentityChange::Password { role, password } if self.is_self(role) => Some(new_password(password)),
            IdentityChange::Password { role, .. } => refused(self.is_tenant_role(role), IdentityError::Role),
            IdentityChange::Roles(roles) => refused(any_tenant_role(roles), IdentityError::Role),
            IdentityChange::Membership(roles) => refused(any_tenant_role(roles), IdentityError::Membership),
            IdentityChange::Owned(roles) => refused(any_tenant_role(roles), IdentityError::Owned),
            IdentityChange::Database(name) => refused(self.is_tenant_database(name), IdentityError::Database),
            IdentityChange::DatabaseSetting(name, parameter) => {
                let forbidden =
                    parameter.as_ref().is_some_and(|name| FORBIDDEN_FOR_DATABASE.contains(&&**name));
                refused(forbidden && self.is_tenant_database(name), IdentityError::DatabaseSetting)
            }
            IdentityChange::DatabaseAccess { databases, roles, revoke } => {
                let ours = databases.iter().any(|name| self.is_tenant_database(name));
                let concerns = roles.iter().any(|role| match revoke {
                    true => self.is_tenant_role(role),
                    // The owner has all privileges on its database already.
                    false => is_public(role) || self.is_tenant_role(role) && !self.is_owner(role),
                });
                refused(ours && concerns, IdentityError::DatabaseAccess)
            }
        }
    }

    fn tenant(&self) -> Option<&Tenant> {
        self.tenant_access.as_deref().map(|tenant_access| &*tenant_access.tenant)
    }

    /// Returns whether `role` is the session's own role or is named like its login.
    fn is_self(&self, role: &Named<'_>) -> bool {
        let Named::Name(name) = role else { return *role == Named::Current };
        let own = self.tenant_access.as_deref().and_then(|tenant_access| match tenant_access.access {
            Access::ReadWrite => Some(&tenant_access.tenant.read_write),
            Access::ReadOnly => tenant_access.tenant.read_only.as_ref(),
        });
        is_named(name, own.map(|role| &*role.username))
            || is_named(name, self.login.as_ref().map(|login| &*login.name))
    }

    fn is_tenant_role(&self, role: &Named<'_>) -> bool {
        let Named::Name(name) = role else { return true };
        let read_only = self.tenant().and_then(|tenant| tenant.read_only.as_ref());
        self.is_owner(role) || is_named(name, read_only.map(|role| &*role.username))
    }

    fn is_owner(&self, role: &Named<'_>) -> bool {
        let Named::Name(name) = role else {
            return self.tenant_access.as_ref().is_some_and(|place| place.access == Access::ReadWrite);
        };
        is_named(name, self.tenant().map(|tenant| &*tenant.read_write.username))
    }

    fn is_tenant_database(&self, database: &Named<'_>) -> bool {
        let Named::Name(name) = database else { return true };
        is_named(name, self.tenant().map(|tenant| &*tenant.database))
    }
}

fn is_public(role: &Named<'_>) -> bool {
    matches!(role, Named::Name(name) if **name == *b"public")
}

/// Compares a name after PostgreSQL's truncation. A UTF-8 boundary costs up to three more bytes.
fn is_named(name: &[u8], expected: Option<&str>) -> bool {
    expected.is_some_and(|expected| {
        name == expected.as_bytes()
            || expected.len() > NAME_BYTES_MAX
                && name == expected.as_bytes().get(..name.len()).unwrap_or_default()
                && name.len() > NAME_BYTES_MAX - 4
    })
}

fn new_password(given: &GivenPassword<'_>) -> IdentityDecision {
    let text = match given {
        GivenPassword::Null => return IdentityDecision::Refused(IdentityError::PasswordMissing),
        GivenPassword::Unclear => return IdentityDecision::Refused(IdentityError::PasswordUnclear),
        GivenPassword::Text(text) => std::str::from_utf8(text),
    };
    let client_error = match text {
        Err(_) => IdentityError::PasswordUnclear,
        Ok("") => IdentityError::PasswordMissing,
        Ok(text) if text.len() > PASSWORD_BYTES_MAX => IdentityError::PasswordTooLong,
        Ok(text) if is_md5(text) => IdentityError::PasswordMd5,
        Ok(text) => return IdentityDecision::Password(NewPassword(Box::<str>::from(text).into())),
    };
    IdentityDecision::Refused(client_error)
}

/// Uses PostgreSQL's rule to distinguish an MD5 hash from a password.
fn is_md5(text: &str) -> bool {
    let digits = text.strip_prefix("md5").unwrap_or_default();
    digits.len() == 32 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}
