//! The directory: a cache of the logins and tenants of the central database.
//!
//! A session asks once, at login; no query waits here. Names come from clients that are not authenticated
//! yet. They are sent as bound parameters of prepared statements, and a name that is too long is not looked
//! up.
//!
//! While the central database does not answer, the cache and then the snapshot (`snapshot/`) are used.

mod cache;
pub(in crate::control_path) mod columns;
mod invalidation;
mod lookup_limit;
mod response_pace;
mod rows;
pub mod snapshot;

use std::{
    error::Error as _,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use deadpool_postgres::Object;
use futures_util::future::BoxFuture;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::Notify;
use tokio_postgres::{Row, error::SqlState, types::ToSql};

use self::{
    cache::{Answer, CacheLimits, CacheShared, Lookup, RowCache},
    invalidation::{ChangeCounts, DependsOn, Validity},
    lookup_limit::LookupLimit,
    response_pace::ResponsePace,
    snapshot::{About, Snapshot, SnapshotStore},
};
use crate::{
    config::Config,
    control_path::{
        admin::{actor::Actor, logins::change_own_verifier},
        central::{Central, CentralError},
        secrets::{keyring_reload::ReloadableKeyring, scram_verifier::scram_verifier},
    },
    data_path::{
        directory::{Directory, DirectoryError},
        tenant::{DirectoryChange, Login, Tenant, TenantStatus},
    },
};

/// Limits of the schema.
const LOGIN_NAME_BYTES_MAX: usize = 255;
const TENANT_NAME_BYTES_MAX: usize = 63;

/// The directory of a node, shared by all its threads.
pub struct CentralDirectory {
    source: RowSource,
    shared: CacheShared,
    /// Changes are received.
    listening: AtomicBool,
    mock_salt: OnceLock<Vec<u8>>,
    logins: RowCache<String, Login>,
    tenants_by_name: RowCache<String, Tenant>,
    tenants_by_id: RowCache<i64, Tenant>,
    answer_within: Duration,
    snapshot: Arc<SnapshotStore>,
}

impl CentralDirectory {
    /// An empty cache. Connects on first use.
    pub fn new(central: Central, keyring: Arc<ReloadableKeyring>, config: &Config) -> Arc<Self> {
        let limits = CacheLimits {
            entries: config.limits.directory_cache_max,
            fresh: config.timeouts.directory_fresh,
            stale: config.timeouts.directory_stale,
            answer: config.timeouts.central,
        };
        let shared = CacheShared {
            changes: Arc::new(ChangeCounts::new(config.limits.directory_cache_max)),
            lookups: Arc::new(LookupLimit::new(config.limits.directory_look_ups_max)),
            pace: Arc::new(ResponsePace::default()),
            unconfirmed: Arc::new(Notify::new()),
        };
        let snapshot =
            SnapshotStore::new(config, central.database(), keyring.clone(), shared.changes.clone());
        Arc::new(Self {
            snapshot: Arc::new(snapshot),
            logins: RowCache::new(limits, shared.clone(), |name: &String| {
                DirectoryChange::LoginName(name.clone())
            }),
            tenants_by_name: RowCache::new(limits, shared.clone(), |name: &String| {
                DirectoryChange::TenantName(name.clone())
            }),
            tenants_by_id: RowCache::new(limits, shared.clone(), |id| DirectoryChange::Tenant(*id)),
            source: RowSource { central, keyring },
            answer_within: config.timeouts.central,
            shared,
            listening: AtomicBool::new(true),
            mock_salt: OnceLock::new(),
        })
    }

    /// Reads the secret that salts for unknown logins are derived from, the same for all nodes. It is also the
    /// sign of this central database.
    pub async fn load_mock_salt(&self) -> Result<(), CentralError> {
        let client = self.source.central.client().await?;
        let row = client.query_opt("SELECT value FROM pglobby.secrets WHERE name = 'mock_salt'", &[]).await?;
        match row {
            Some(row) => {
                let salt: Vec<u8> = row.try_get(0)?;
                self.snapshot.set_central_salt(&salt);
                let _ = self.mock_salt.set(salt);
            }
            None => tracing::warn!(
                "pglobby.secrets lacks mock_salt; salts for unknown logins differ between nodes"
            ),
        }
        Ok(())
    }

    /// Begins without the central database, which failed with `cause`. `None`: there is no snapshot to begin with.
    pub async fn begin_with_snapshot(&self, cause: &dyn std::fmt::Display) -> Option<About> {
        let snapshot = self.snapshot.usable().await?;
        if let Some(salt) = snapshot.about.mock_salt() {
            let _ = self.mock_salt.set(salt);
        }
        self.set_listening(false);
        self.shared.lookups.failed(cause.to_string().into());
        Some(snapshot.about.clone())
    }

    /// The snapshot of this node.
    pub fn snapshot(&self) -> &Arc<SnapshotStore> {
        &self.snapshot
    }

    /// Writes snapshots for as long as the node runs; `node` is its name. Returns only if it is dropped.
    pub async fn keep_snapshot(&self, node: &str) {
        self.snapshot.clone().keep(self.source.central.clone(), node).await;
    }

    /// Waits until a row was used that the central database has not confirmed: sessions that were admitted by it must be
    /// checked when it answers again. Cancel-safe.
    pub async fn used_unconfirmed(&self) {
        self.shared.unconfirmed.notified().await;
    }

    /// Whether changes of the central database are received.
    pub fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Relaxed)
    }

    /// Sets whether changes of the central database are received.
    pub fn set_listening(&self, listening: bool) {
        self.listening.store(listening, Ordering::Relaxed);
        if listening {
            self.shared.lookups.succeeded();
        }
        self.snapshot.set_in_contact(listening);
    }

    /// The answer of the snapshot, where the central database has not answered for this `cause` and the cache has no
    /// usable row.
    async fn in_snapshot<V: DependsOn>(
        &self,
        cause: Arc<str>,
        appearance: DirectoryChange,
        find: impl FnOnce(&Snapshot) -> Lookup<V>,
    ) -> Result<Option<Arc<V>>, DirectoryError> {
        let Some(snapshot) = self.snapshot.usable().await else {
            return Err(DirectoryError::Unavailable(cause));
        };
        let found = find(&snapshot);
        let row = Answer { answer: &found, appearance };
        if self.shared.changes.validity(snapshot.since, &row) == Validity::Changed {
            return Err(DirectoryError::Unavailable(cause));
        }
        if matches!(found, Lookup::Absent) {
            return Err(DirectoryError::NotInSnapshot(cause));
        }
        self.shared.unconfirmed.notify_one();
        found.get()
    }

    fn look_up_login(&self, name: &str) -> impl Fn() -> LoginLookup + Send + use<> {
        let (source, name) = (self.source.clone(), name.to_owned());
        move || Box::pin(source.clone().login(name.clone()))
    }

    fn look_up_tenant_by_id(&self, id: i64) -> impl Fn() -> TenantRowLookup + Send + use<> {
        let source = self.source.clone();
        move || Box::pin(source.clone().tenant_by_id(id))
    }

    /// Whether a login could succeed from the cache alone.
    pub fn has_usable_entries(&self) -> bool {
        self.logins.has_usable() && (self.tenants_by_name.has_usable() || self.tenants_by_id.has_usable())
    }
}

#[async_trait]
impl Directory for CentralDirectory {
    async fn login(&self, name: &str) -> Result<Option<Arc<Login>>, DirectoryError> {
        if !may_be_name(name, LOGIN_NAME_BYTES_MAX) {
            return Ok(None);
        }
        let answer = self.logins.get(name.to_owned(), self.look_up_login(name)).await;
        let Err(DirectoryError::Unavailable(cause)) = answer else { return answer };
        let appearance = DirectoryChange::LoginName(name.to_owned());
        Box::pin(self.in_snapshot(cause, appearance, |snapshot| snapshot.login(name))).await
    }

    async fn tenant(&self, name: &str) -> Result<Option<Arc<Tenant>>, DirectoryError> {
        if !may_be_name(name, TENANT_NAME_BYTES_MAX) {
            return Ok(None);
        }
        let (source, wanted) = (self.source.clone(), name.to_owned());
        let look_up = move || source.clone().tenant_by_name(wanted.clone());
        let answer = self.tenants_by_name.get(name.to_owned(), look_up).await;
        let Err(DirectoryError::Unavailable(cause)) = answer else { return answer };
        let appearance = DirectoryChange::TenantName(name.to_owned());
        let find = |snapshot: &Snapshot| snapshot.tenant(name, &self.source.keyring);
        Box::pin(self.in_snapshot(cause, appearance, find)).await
    }

    async fn tenant_by_id(&self, id: i64) -> Result<Option<Arc<Tenant>>, DirectoryError> {
        let answer = self.tenants_by_id.get(id, self.look_up_tenant_by_id(id)).await;
        let Err(DirectoryError::Unavailable(cause)) = answer else { return answer };
        let find = |snapshot: &Snapshot| snapshot.tenant_by_id(id, &self.source.keyring);
        Box::pin(self.in_snapshot(cause, DirectoryChange::Tenant(id), find)).await
    }

    async fn confirmed_login(&self, name: &str) -> Result<Option<Arc<Login>>, DirectoryError> {
        if !may_be_name(name, LOGIN_NAME_BYTES_MAX) {
            return Ok(None);
        }
        self.logins.confirmed(name.to_owned(), self.look_up_login(name)).await
    }

    async fn confirmed_tenant(&self, id: i64) -> Result<Option<Arc<Tenant>>, DirectoryError> {
        let tenant = self.tenants_by_id.confirmed(id, self.look_up_tenant_by_id(id)).await?;
        // So that the row is known by its name as well, should the central database be away at the next login. The name of
        // a dropped tenant may be another one's.
        if let Some(tenant) = tenant.as_ref().filter(|tenant| tenant.status != TenantStatus::Dropped) {
            self.tenants_by_name.adopt(tenant.name.clone(), &self.tenants_by_id, &id).await;
        }
        Ok(tenant)
    }

    fn is_current(&self) -> bool {
        self.listening.load(Ordering::Relaxed) && self.shared.lookups.is_open()
    }

    fn mock_salt(&self) -> &[u8] {
        self.mock_salt.get_or_init(|| rand::random::<[u8; 32]>().to_vec())
    }

    fn answer_at(&self, begun: Instant) -> Instant {
        self.shared.pace.answer_at(begun)
    }

    fn forget(&self, change: &DirectoryChange) {
        self.shared.changes.note(change);
        self.snapshot.note(change);
    }

    async fn verifier_of(&self, password: SecretString) -> SecretString {
        let made = tokio::task::spawn_blocking(move || scram_verifier(&password));
        // If the task is gone, an empty verifier, which `set_verifier` refuses.
        made.await.unwrap_or_default()
    }

    async fn set_verifier(
        &self,
        login: &Login,
        before: &[SecretString],
        verifier: &SecretString,
    ) -> Result<bool, DirectoryError> {
        let unavailable =
            |error: &dyn std::fmt::Display| DirectoryError::Unavailable(error.to_string().into());
        if verifier.expose_secret().is_empty() {
            return Err(unavailable(&"the new verifier could not be made"));
        }
        let (central, keyring) = (self.source.central.clone(), self.source.keyring.clone());
        let actor = Actor::new(central, keyring, format!("login:{}", login.name));
        let stored = change_own_verifier(&actor, login, before, verifier);
        let stored = tokio::time::timeout(self.answer_within, stored).await;
        let changed = match stored {
            Ok(stored) => stored.map_err(|error| unavailable(&error))?,
            Err(_) => return Err(unavailable(&"no answer within central_timeout")),
        };
        self.forget(&DirectoryChange::Login(login.id));
        Ok(changed)
    }
}

impl std::fmt::Debug for CentralDirectory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CentralDirectory").field("central", &self.source.central).finish_non_exhaustive()
    }
}

/// PostgreSQL's text contains no NUL, so no row has such a name.
fn may_be_name(name: &str, bytes_max: usize) -> bool {
    !name.is_empty() && name.len() <= bytes_max && !name.contains('\0')
}

/// A look-up that has not begun.
type LoginLookup = BoxFuture<'static, Result<Lookup<Login>, CentralError>>;
type TenantRowLookup = BoxFuture<'static, Result<Lookup<Tenant>, CentralError>>;

#[derive(Debug, Clone)]
struct RowSource {
    central: Central,
    keyring: Arc<ReloadableKeyring>,
}

impl RowSource {
    async fn login(self, name: String) -> Result<Lookup<Login>, CentralError> {
        let row = self.row(rows::LOGIN_BY_NAME, &[&name]).await?;
        Ok(answer(row, rows::login, || format!("login {name:?}")))
    }

    async fn tenant_by_name(self, name: String) -> Result<Lookup<Tenant>, CentralError> {
        let row = self.row(rows::TENANT_BY_NAME, &[&name]).await?;
        Ok(answer(row, |row| rows::tenant(row, &self.keyring), || format!("tenant {name:?}")))
    }

    async fn tenant_by_id(self, id: i64) -> Result<Lookup<Tenant>, CentralError> {
        let row = self.row(rows::TENANT_BY_ID, &[&id]).await?;
        Ok(answer(row, |row| rows::tenant(row, &self.keyring), || format!("tenant {id}")))
    }

    /// Retries once on another connection if a pooled one is broken. Reading twice does no harm.
    async fn row(&self, sql: &str, key: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, CentralError> {
        let mut tried = false;
        loop {
            let client = self.central.client().await?;
            let asked = async { client.query_opt(&client.prepare_cached(sql).await?, key).await };
            match asked.await {
                Ok(row) => return Ok(row),
                Err(error) if is_lost(&error) && !tried => {
                    // Removes the connection from the pool, which may not have noticed.
                    drop(Object::take(client));
                    tried = true;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether the connection is broken, or its server is shutting down.
fn is_lost(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(code) => [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN].contains(code),
        None => error.is_closed() || error.source().is_some_and(|cause| cause.is::<std::io::Error>()),
    }
}

/// Logs an invalid row. Other rows are not affected.
fn answer<V>(
    row: Option<Row>,
    read: impl FnOnce(&Row) -> Result<V, String>,
    name: impl FnOnce() -> String,
) -> Lookup<V> {
    match row.as_ref().map(read) {
        None => Lookup::Absent,
        Some(Ok(value)) => Lookup::Found(Arc::new(value)),
        Some(Err(cause)) => {
            let name = name();
            tracing::error!(side = "central", row = name, cause, "invalid row in the central database");
            Lookup::Broken(format!("{name}: {cause}").into())
        }
    }
}
