//! What a snapshot contains: all that a node needs to admit logins, as the central database had it at one moment.
//!
//! Rows are kept as they were read (`columns.rs`). Sealed passwords stay sealed until a tenant is looked up.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use tokio_postgres::IsolationLevel;
use zeroize::Zeroizing;

use super::super::{
    cache::Lookup,
    columns::{Columns as _, NoTable, StoredRow, Table},
    rows,
};
use crate::{
    control_path::{
        central::{Central, CentralError},
        secrets::keyring_reload::ReloadableKeyring,
    },
    data_path::tenant::{Login, Tenant},
};

/// A clock may be so much behind the one of the machine that has taken the snapshot.
const CLOCKS_DIFFER: Duration = Duration::from_secs(300);

/// The directory at one moment.
pub struct Snapshot {
    /// When, where and by what it was taken, and what is not a login or tenant.
    pub about: About,
    /// Rows that have changed since this count of changes are not used (`invalidation.rs`).
    pub since: u64,
    logins: Table,
    tenants: Table,
    login_by_name: HashMap<String, usize>,
    tenant_by_name: HashMap<String, usize>,
    tenant_by_id: HashMap<i64, usize>,
}

/// The head of a snapshot. No `Debug`: it has a secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct About {
    /// Random; each snapshot has another one.
    pub id: String,
    /// When its reading began, in milliseconds since 1970.
    pub taken_at_ms: u64,
    /// The node, or the user of the command, that has read it.
    pub taken_by: String,
    /// The URL of the central database, without a password.
    pub url: String,
    /// `pglobby.secrets`: what salts for unknown logins are derived from. It also names the central database.
    pub mock_salt: Option<String>,
    /// The nodes that served then.
    pub nodes: Vec<KnownNode>,
    /// What was paused or disabled on all nodes.
    #[serde(default)]
    pub pauses: Vec<KnownPause>,
}

/// A row of `pglobby.nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownNode {
    /// `nodes.name`.
    pub name: String,
    /// `nodes.address`.
    pub address: String,
    /// `nodes.process`.
    pub process: String,
}

/// A row of `pglobby.pauses`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownPause {
    /// `paused` or `disabled`.
    pub kind: String,
    /// `None`: all tenants.
    pub tenant: Option<i64>,
}

/// What was read, not in use yet.
pub struct Contents {
    /// Its head.
    pub about: About,
    logins: Table,
    tenants: Table,
}

const NODES: &str = "SELECT name, address, process FROM pglobby.nodes
    WHERE pg_catalog.clock_timestamp() - seen_at < interval '5 s' ORDER BY id";

impl Contents {
    /// Reads the directory in one transaction.
    pub async fn read(central: &Central, taken_by: &str) -> Result<Self, CentralError> {
        let taken_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut client = central.client().await?;
        let transaction = client
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await?;
        // A large directory may take longer than one answer.
        transaction.batch_execute("SET LOCAL statement_timeout = 0").await?;
        let salt = "SELECT value FROM pglobby.secrets WHERE name = 'mock_salt'";
        let salt = transaction.query_opt(salt, &[]).await?;
        let salt: Option<Vec<u8>> = salt.map(|row| row.try_get(0)).transpose()?;
        // The schema of the version before may lack them.
        let exist = "SELECT pg_catalog.to_regclass('pglobby.nodes') IS NOT NULL,
            pg_catalog.to_regclass('pglobby.pauses') IS NOT NULL";
        let exist = transaction.query_one(exist, &[]).await?;
        let mut nodes = Vec::new();
        if exist.try_get(0)? {
            for row in transaction.query(NODES, &[]).await? {
                nodes.push(KnownNode {
                    name: row.try_get(0)?,
                    address: row.try_get(1)?,
                    process: row.try_get(2)?,
                });
            }
        }
        let mut pauses = Vec::new();
        if exist.try_get(1)? {
            for row in transaction.query("SELECT kind, tenant_id FROM pglobby.pauses", &[]).await? {
                pauses.push(KnownPause { kind: row.try_get(0)?, tenant: row.try_get(1)? });
            }
        }
        let tenants = Table::of(&transaction.query(rows::ALL_TENANTS, &[]).await?);
        let logins = Table::of(&transaction.query(rows::ALL_LOGINS, &[]).await?);
        transaction.commit().await?;
        let about = About {
            id: format!("{:032x}", rand::random::<u128>()),
            taken_at_ms: u64::try_from(taken_at.as_millis()).unwrap_or(u64::MAX),
            taken_by: taken_by.to_owned(),
            url: central.url().to_owned(),
            mock_salt: salt.map(|salt| STANDARD.encode(salt)),
            nodes,
            pauses,
        };
        Ok(Self { about, logins, tenants })
    }

    /// The bytes that are sealed.
    pub fn to_bytes(&self) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
        let head = Zeroizing::new(serde_json::to_vec(&self.about)?);
        let mut bytes = Zeroizing::new(Vec::new());
        bytes.extend_from_slice(&(head.len() as u64).to_be_bytes());
        bytes.extend_from_slice(&head);
        self.tenants.write(&mut bytes);
        self.logins.write(&mut bytes);
        Ok(bytes)
    }

    /// What [`Self::to_bytes`] has made.
    pub fn from_bytes(mut bytes: &[u8]) -> Result<Self, NoTable> {
        let (length, rest) = bytes.split_first_chunk().ok_or(NoTable)?;
        let length = usize::try_from(u64::from_be_bytes(*length)).map_err(|_| NoTable)?;
        let (head, rest) = rest.split_at_checked(length).ok_or(NoTable)?;
        bytes = rest;
        let about = serde_json::from_slice(head).map_err(|_| NoTable)?;
        let (tenants, logins) = (Table::read(&mut bytes)?, Table::read(&mut bytes)?);
        if bytes.is_empty() { Ok(Self { about, logins, tenants }) } else { Err(NoTable) }
    }

    /// The number of logins and of tenants, tombstones included.
    pub fn counts(&self) -> (usize, usize) {
        (self.logins.len(), self.tenants.len())
    }

    /// To be looked up in.
    pub fn index(self, since: u64) -> Result<Snapshot, String> {
        let Self { about, logins, tenants } = self;
        let name = |row: StoredRow<'_>| row.column::<String>("name");
        let (mut login_by_name, mut tenant_by_name, mut tenant_by_id) =
            (HashMap::new(), HashMap::new(), HashMap::new());
        for (at, row) in logins.rows().enumerate() {
            login_by_name.insert(name(row)?, at);
        }
        // Of one name, the last one counts.
        for (at, row) in tenants.rows().enumerate() {
            tenant_by_name.insert(name(row)?, at);
            tenant_by_id.insert(row.column("id")?, at);
        }
        Ok(Snapshot { about, since, logins, tenants, login_by_name, tenant_by_name, tenant_by_id })
    }
}

impl Snapshot {
    /// The login of that name.
    pub fn login(&self, name: &str) -> Lookup<Login> {
        let row = self.login_by_name.get(name).and_then(|at| self.logins.row(*at));
        found(row, |row| rows::login(row))
    }

    /// The tenant of that name; if it was dropped, its newest tombstone.
    pub fn tenant(&self, name: &str, keyring: &ReloadableKeyring) -> Lookup<Tenant> {
        let row = self.tenant_by_name.get(name).and_then(|at| self.tenants.row(*at));
        found(row, |row| rows::tenant(row, keyring))
    }

    /// The tenant with that id.
    pub fn tenant_by_id(&self, id: i64, keyring: &ReloadableKeyring) -> Lookup<Tenant> {
        let row = self.tenant_by_id.get(&id).and_then(|at| self.tenants.row(*at));
        found(row, |row| rows::tenant(row, keyring))
    }

    /// The number of logins and of tenants, tombstones included.
    pub fn counts(&self) -> (usize, usize) {
        (self.logins.len(), self.tenants.len())
    }
}

impl About {
    /// The time since it was taken; `None`: it was taken in the future, by this machine's clock.
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        let taken_at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(self.taken_at_ms))?;
        match now.duration_since(taken_at) {
            Ok(age) => Some(age),
            Err(error) => (error.duration() <= CLOCKS_DIFFER).then_some(Duration::ZERO),
        }
    }

    /// `pglobby.secrets`.
    pub fn mock_salt(&self) -> Option<Vec<u8>> {
        STANDARD.decode(self.mock_salt.as_ref()?).ok()
    }
}

fn found<V>(row: Option<StoredRow<'_>>, read: impl FnOnce(&StoredRow<'_>) -> Result<V, String>) -> Lookup<V> {
    match row.as_ref().map(read) {
        None => Lookup::Absent,
        Some(Ok(value)) => Lookup::Found(Arc::new(value)),
        Some(Err(cause)) => Lookup::Broken(format!("in the directory's snapshot: {cause}").into()),
    }
}

#[cfg(test)]
impl Contents {
    /// Of an empty directory.
    pub fn empty(id: &str) -> Self {
        let about = About {
            id: id.to_owned(),
            taken_at_ms: 1_000_000_000,
            taken_by: String::new(),
            url: String::new(),
            mock_salt: None,
            nodes: Vec::new(),
            pauses: Vec::new(),
        };
        Self { about, logins: Table::of(&[]), tenants: Table::of(&[]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_needs_a_clock_that_goes_on() {
        let about = Contents::empty("").about;
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(about.age(at(1_000_060)), Some(Duration::from_secs(60)));
        assert_eq!(about.age(at(999_990)), Some(Duration::ZERO), "clocks differ a little");
        assert_eq!(about.age(at(0)), None, "a machine whose clock was reset");
    }
}
