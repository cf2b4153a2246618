//! Who a tenant is, who may log in, and which tenant a session belongs to.
//!
//! The records here are what a [directory](crate::data_path::directory) reads from the central database, with
//! the sealed passwords already opened. Sessions hold them by `Arc` and never ask again (invariant 1).

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::SystemTime};

use ipnet::IpNet;
use secrecy::{ExposeSecret as _, SecretString};

use crate::config::{PoolMode, TlsMode};

/// A customer with a database of its own: one row of `pglobby.tenants`, credentials opened.
#[derive(Debug)]
pub struct Tenant {
    /// `tenants.id`; never reused, so it names pools and metrics across renames.
    pub id: i64,
    /// `tenants.name`, what clients ask for.
    pub name: String,
    /// Where its database lives.
    pub host: Arc<Host>,
    /// The database on that host.
    pub database: String,
    /// What sessions with read_write access log in to the server as.
    pub read_write: Credential,
    /// What sessions with read_only access log in as; a role that cannot write. `None`: no such role was
    /// made, and read_only sessions are refused.
    pub read_only: Option<Credential>,
    /// Whether sessions may enter.
    pub status: TenantStatus,
    /// The operator's words for a suspension; clients read them.
    pub status_reason: Option<String>,
    /// Closed, but sessions may finish the transaction they are in.
    pub drain: bool,
    /// `None`: `pool_mode` of the configuration.
    pub pool_mode: Option<PoolMode>,
    /// Server connections per (tenant, access) at most. `None`: `default_pool_size`.
    pub pool_size: Option<u32>,
    /// Server connections kept open. `None`: `min_pool_size`.
    pub min_pool_size: Option<u32>,
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
    /// Being made; not yet open.
    Provisioning,
    /// Open.
    Active,
    /// Closed by an operator, for now.
    Suspended,
    /// Being removed.
    Dropping,
    /// Gone; the row stays as a tombstone.
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

/// Where a session is.
#[derive(Debug, Clone)]
pub struct TenantAccess {
    /// The tenant.
    pub tenant: Arc<Tenant>,
    /// With what rights.
    pub access: Access,
}

/// What we present to a server. The password is never printed: `Debug` redacts it, drop zeroises it.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Role name on the server.
    pub username: String,
    /// Its password, opened from `sealed_password`.
    pub password: SecretString,
}

/// A PostgreSQL cluster that tenant databases live on: one row of `pglobby.hosts`.
#[derive(Debug)]
pub struct Host {
    /// `hosts.name`.
    pub name: String,
    /// Where it listens.
    pub address: HostAddress,
    /// How to encrypt, with libpq's meaning.
    pub tls_mode: TlsMode,
    /// PEM file of certificate authorities; `None`: the system's.
    pub tls_root_ca: Option<PathBuf>,
    /// Server connections over all tenants at most (the budget); `None`: no limit of ours.
    pub max_connections: Option<u32>,
}

/// Where a host listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostAddress {
    /// TCP; `name` is a DNS name or an address literal.
    Tcp {
        /// DNS name or address literal.
        name: String,
        /// TCP port.
        port: u16,
    },
    /// Unix socket: the directory, as libpq has it; the file is `.s.PGSQL.<port>` in it.
    Unix {
        /// The folder of the socket.
        directory: PathBuf,
        /// Part of the socket's file name.
        port: u16,
    },
}

/// Who may log in: one row of `pglobby.logins` with its grants.
#[derive(Debug)]
pub struct Login {
    /// `logins.id`.
    pub id: i64,
    /// `logins.name`, unique over employees of all tenants, service logins and administrators.
    pub name: String,
    /// Where it may go.
    pub kind: LoginKind,
    /// The SCRAM-SHA-256 verifier as PostgreSQL spells it, `SCRAM-SHA-256$<it>:<salt>$<stored>:<server>`.
    pub verifier: SecretString,
    /// Refused from then on.
    pub valid_until: Option<SystemTime>,
    /// Refused.
    pub disabled: bool,
    /// Client addresses that may use it; empty: all.
    pub allow_from: Vec<IpNet>,
}

impl Login {
    /// Whether somebody who logged in from `peer` when the login was like `before` may stay: it is the same
    /// login with the same password, and is refused neither at all, nor by now, nor from there.
    pub fn still_admits(&self, before: &Self, peer: Option<IpAddr>) -> bool {
        self.still_admits_by(before, &before.verifier, peer)
    }

    /// The same of somebody who has given the login this verifier since.
    pub fn still_admits_by(&self, before: &Self, verifier: &SecretString, peer: Option<IpAddr>) -> bool {
        self.id == before.id
            && self.verifier.expose_secret() == verifier.expose_secret()
            && !self.disabled
            && self.valid_until.is_none_or(|until| until > SystemTime::now())
            && allowed_from(&self.allow_from, peer)
    }
}

/// Where a login may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoginKind {
    /// A person or program of one tenant.
    Employee {
        /// The tenant's id.
        tenant_id: i64,
        /// The tenant's name, so that a login alone says where to go.
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
    /// Where to.
    pub tenant_id: i64,
    /// What the login may do there.
    pub access: Access,
    /// It has not been dropped.
    pub living: bool,
}

/// What changed in the central database, as told by `NOTIFY pglobby_changed`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DirectoryChange {
    /// A tenant's row, by id.
    Tenant(i64),
    /// A login's row or its grants, by id.
    Login(i64),
    /// A tenant of this name has come into being.
    TenantName(String),
    /// A login of this name has.
    LoginName(String),
    /// A host's row, by name.
    Host(String),
    /// The notifying connection was lost for a while: everything may have changed.
    Everything,
}

/// Whether `address` is allowed by a list in which empty means everybody. Unix-socket clients have no address
/// and are allowed only where the list is empty.
pub fn allowed_from(list: &[IpNet], address: Option<IpAddr>) -> bool {
    list.is_empty() || address.is_some_and(|address| list.iter().any(|net| net.contains(&address)))
}
