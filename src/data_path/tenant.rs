//! The records of tenants, hosts and logins.
//!
//! The records here are what a [directory](crate::data_path::directory) reads from the central database, with
//! the sealed passwords already opened. Sessions hold them by `Arc` and never ask again (invariant 1).

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ipnet::IpNet;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

use super::host_address::HostAddress;
use crate::config::{PoolMode, TlsMode};

/// A customer with a database of its own: a row of `pglobby.tenants` with opened credentials.
#[derive(Debug)]
pub struct Tenant {
    /// `tenants.id`; never reused, so it names pools and metrics across renames.
    pub id: i64,
    /// `tenants.name`, the name that clients use.
    pub name: String,
    /// The host of its database.
    pub host: Arc<Host>,
    /// The database on that host.
    pub database: String,
    /// The server credential of sessions with read_write access.
    pub read_write: Credential,
    /// What sessions with read_only access log in as; a role that cannot write. `None`: no such role was
    /// made, and read_only sessions are refused.
    pub read_only: Option<Credential>,
    /// Whether sessions may enter.
    pub status: TenantStatus,
    /// The operator's reason for a suspension; clients receive it.
    pub status_reason: Option<String>,
    /// Closed, but sessions may finish the transaction they are in.
    pub drain: bool,
    /// `None`: `pool_mode` of the configuration.
    pub pool_mode: Option<PoolMode>,
    /// Server connections per (tenant, access) at most. `None`: `default_pool_size`.
    pub pool_size: Option<u32>,
    /// Server connections kept open. `None`: `min_pool_size`.
    pub min_pool_size: Option<u32>,
    /// Its part of its host's budget, relative to the other tenants there. At least 1.
    pub weight: u32,
    /// Sessions at most. `None`: `max_db_client_connections`.
    pub max_clients: Option<u32>,
    /// Set on every server connection of this tenant, if any.
    pub statement_timeout: Option<std::time::Duration>,
    /// Client addresses that may enter; empty: all.
    pub allow_from: Vec<IpNet>,
    /// Adopted from an existing database: access to its tables is granted when its first pool is made.
    pub grants_pending: bool,
    /// Counts changes of what server connections depend on (host, database, credentials). Pools are keyed by
    /// it: a changed generation drains the old pool.
    pub generation: i64,
}

/// `tenants.status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TenantStatus {
    /// Being created; not open yet.
    Provisioning,
    /// Open.
    Active,
    /// Closed by an operator, for now.
    Suspended,
    /// Being removed.
    Dropping,
    /// Dropped; the row stays as a tombstone.
    Dropped,
}

/// What a session may do in its tenant's database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// The tenant's own role.
    ReadWrite,
    /// A role that cannot write.
    ReadOnly,
}

/// A tenant and the rights in it.
#[derive(Debug, Clone)]
pub struct TenantAccess {
    /// The tenant.
    pub tenant: Arc<Tenant>,
    /// The rights.
    pub access: Access,
}

/// The credential for a server. `Debug` redacts the password; drop zeroises it.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Role name on the server.
    pub username: String,
    /// Its password, opened from `sealed_password`.
    pub password: SecretString,
}

/// A PostgreSQL cluster with tenant databases: a row of `pglobby.hosts`.
#[derive(Debug)]
pub struct Host {
    /// `hosts.name`.
    pub name: String,
    /// The addresses it listens on: of its primary and its standbys. At least one.
    pub addresses: Box<[HostAddress]>,
    /// Encryption, with libpq's meaning.
    pub tls_mode: TlsMode,
    /// PEM file of certificate authorities; `None`: the system's.
    pub tls_root_ca: Option<PathBuf>,
    /// Server connections over all tenants at most (the budget); `None`: no limit of ours.
    pub max_connections: Option<u32>,
}

/// A login: a row of `pglobby.logins` with its grants.
#[derive(Debug)]
pub struct Login {
    /// `logins.id`.
    pub id: i64,
    /// `logins.name`, unique over employees of all tenants, service logins and administrators.
    pub name: String,
    /// Its kind, which decides where it has access.
    pub kind: LoginKind,
    /// The SCRAM-SHA-256 verifier as PostgreSQL spells it, `SCRAM-SHA-256$<it>:<salt>$<stored>:<server>`.
    pub verifier: SecretString,
    /// The login is refused from then on.
    pub valid_until: Option<SystemTime>,
    /// The login is refused.
    pub disabled: bool,
    /// Client addresses that may use it; empty: all.
    pub allow_from: Vec<IpNet>,
}

impl Login {
    /// Whether a session that logged in from `peer` when the login was like `before` may stay: it is the same
    /// login with the same password, and is not disabled, has not expired, and allows this address.
    pub fn still_admits(&self, before: &Self, peer: Option<IpAddr>) -> bool {
        self.still_admits_by(before, &before.verifier, peer)
    }

    /// The same for a session that has set this verifier since.
    pub fn still_admits_by(&self, before: &Self, verifier: &SecretString, peer: Option<IpAddr>) -> bool {
        self.id == before.id
            && self.verifier.expose_secret() == verifier.expose_secret()
            && !self.disabled
            && self.valid_until.is_none_or(|until| until > SystemTime::now())
            && allowed_from(&self.allow_from, peer)
    }
}

/// Tells a verifier from others without showing it.
pub fn verifier_digest(verifier: &SecretString) -> String {
    STANDARD_NO_PAD.encode(Sha256::digest(verifier.expose_secret()))
}

/// The kind of a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoginKind {
    /// A person or program of one tenant.
    Employee {
        /// The tenant's id.
        tenant_id: i64,
        /// The tenant's name, for a client that names no tenant.
        tenant_name: String,
        /// What it may do there.
        access: Access,
    },
    /// May enter several tenants.
    Service {
        /// Access to every tenant there is, if given.
        all_tenants: Option<Access>,
        /// The tenants granted one by one.
        granted: Vec<Grant>,
    },
    /// For the admin console only; enters no tenant.
    Admin {
        /// May only SHOW.
        read_only: bool,
    },
}

/// One row of `pglobby.login_tenants`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The tenant's id.
    pub tenant_id: i64,
    /// What the login may do there.
    pub access: Access,
    /// The tenant has not been dropped.
    pub living: bool,
}

/// A change in the central database, from `NOTIFY pglobby_changed`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum DirectoryChange {
    /// A tenant's row, by id.
    Tenant(i64),
    /// A login's row or its grants, by id.
    Login(i64),
    /// A tenant with this name was created or renamed.
    TenantName(String),
    /// A login with this name was created or renamed.
    LoginName(String),
    /// A host's row, by name.
    Host(String),
    /// Notifications may have been lost: everything may have changed.
    Everything,
}

/// Whether the list allows `address`; an empty list allows all. Unix-socket clients have no address
/// and are allowed only where the list is empty.
pub fn allowed_from(list: &[IpNet], address: Option<IpAddr>) -> bool {
    list.is_empty() || address.is_some_and(|address| list.iter().any(|net| net.contains(&address)))
}

#[cfg(test)]
impl Tenant {
    /// A tenant whose roles are named `<name>_rw` and `<name>_ro`.
    pub fn for_tests(id: i64, name: &str) -> Self {
        let credential = |access: &str| Credential {
            username: format!("{name}_{access}"),
            password: "secret".to_owned().into(),
        };
        Self {
            id,
            name: name.to_owned(),
            host: Arc::new(Host {
                name: "default".to_owned(),
                addresses: Box::new([HostAddress::of("db", 5432)]),
                tls_mode: TlsMode::Prefer,
                tls_root_ca: None,
                max_connections: None,
            }),
            database: name.to_owned(),
            read_write: credential("rw"),
            read_only: Some(credential("ro")),
            status: TenantStatus::Active,
            status_reason: None,
            pool_mode: None,
            pool_size: None,
            min_pool_size: None,
            weight: 1,
            max_clients: None,
            statement_timeout: None,
            allow_from: Vec::new(),
            grants_pending: false,
            drain: false,
            generation: 1,
        }
    }
}

#[cfg(test)]
impl Login {
    /// The login `name`, with an empty verifier.
    pub fn for_tests(name: &str, kind: LoginKind) -> Self {
        let (id, name, verifier) = (1, name.to_owned(), String::new().into());
        Self { id, name, kind, verifier, valid_until: None, disabled: false, allow_from: Vec::new() }
    }
}
