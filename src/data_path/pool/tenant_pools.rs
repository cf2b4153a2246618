//! The pools of all tenants, one per (tenant, access). A pool is made on first use, replaced when the
//! tenant's row changes, and dropped when it has been unused for `pool_idle_timeout`.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize},
    },
};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::{
    Pool, PoolRules,
    connect_backoff::ConnectBackoff,
    connector::Connector,
    host_budget::HostBudget,
    host_connecting::HostConnecting,
    lease_requests::LeaseRequests,
    pause::Pauses,
    pinned_sessions::PinnedSessions,
    placement::Placement,
    role_settings::RoleStart,
    rounds::{Place, Rounds},
    startup_parameters::StatusCache,
    stats::PoolStats,
    succession::Succession,
    wait_queue::WaitQueue,
    worker_loads::WorkerLoads,
};
use crate::{
    config::{Config, TlsMode},
    data_path::{
        functions::FunctionEffects,
        host_address::HostAddress,
        lock::locked,
        memory_limit::{Account, Accounts},
        prepared::shared_statements::SharedStatements,
        server::{AddressRole, DialOptions, IdentityTrouble},
        tenant::{Access, Credential, Host, Tenant, TenantAccess, TenantStatus},
        worker::{Worker, whole_ms},
    },
    error::{ClientError, Limit},
};

/// Runs before a tenant's first pool is made: grants access to the tables of an adopted database. An error is
/// logged, and the pool is made all the same.
pub type BeforeFirstPool =
    Arc<dyn Fn(Arc<Tenant>) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// Reads a tenant's row again, after a change that is under way, for a pool whose host rejects it.
pub type TenantLookup =
    Arc<dyn Fn(i64) -> Pin<Box<dyn Future<Output = Option<Arc<Tenant>>> + Send>> + Send + Sync>;

/// Repairs a tenant's role or database that is not as it was made. Resolves when that has succeeded or
/// failed; `false`: no repair was due.
pub type RoleRepair =
    Arc<dyn Fn(Arc<Tenant>, IdentityTrouble) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// All pools of this process.
pub struct TenantPools {
    pub(super) pools: moka::future::Cache<(i64, Access), Arc<Pool>>,
    pub(super) rounds: Rounds,
    budgets: Mutex<HashMap<String, Arc<HostBudget>>>,
    /// What the budgets want of this node's leases.
    pub lease_requests: Arc<LeaseRequests>,
    /// A host whose address or TLS settings change is another host, without known failures.
    connecting: Mutex<HashMap<HostKey, Weak<HostConnecting>>>,
    /// Effects of each tenant's functions, as long as it has a pool.
    all_functions: Mutex<HashMap<i64, Weak<FunctionEffects>>>,
    /// Memory that is kept for tenants and sessions.
    pub accounts: Accounts,
    pub(super) workers: Vec<Arc<Worker>>,
    pub(super) loads: WorkerLoads,
    pub(super) config: Arc<ArcSwap<Config>>,
    dial: Arc<ArcSwap<DialOptions>>,
    before_first: BeforeFirstPool,
    lookup: TenantLookup,
    repair: RoleRepair,
    /// For the pools it makes.
    me: Weak<Self>,
    /// Counters since the process started. They outlive the pools.
    totals: Mutex<HashMap<(i64, Access), PoolTotals>>,
    /// Pools that were replaced or closed and still have servers on loan.
    retired: Mutex<Vec<Weak<Pool>>>,
    /// PAUSE and DISABLE.
    pub pauses: Pauses,
}

type HostKey = (String, Box<[HostAddress]>, TlsMode, Option<PathBuf>);

/// Counters of one (tenant, access) since the process started.
#[derive(Debug, Clone)]
pub struct PoolTotals {
    pub tenant_id: i64,
    /// The tenant's name when the last pool was made.
    pub tenant: String,
    /// Which of the tenant's roles.
    pub access: Access,
    /// Shared with the pool, if there is one.
    pub stats: Arc<PoolStats>,
}

impl TenantPools {
    /// No pools yet. Each pool is made with the configuration and dial options of that moment.
    pub fn new(
        workers: Vec<Arc<Worker>>,
        config: Arc<ArcSwap<Config>>,
        dial: Arc<ArcSwap<DialOptions>>,
        before_first: BeforeFirstPool,
        lookup: TenantLookup,
        repair: RoleRepair,
    ) -> Arc<Self> {
        let pools =
            moka::future::Cache::builder().max_capacity(config.load().limits.directory_cache_max).build();
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            pools,
            rounds: Rounds::default(),
            budgets: Mutex::default(),
            lease_requests: Arc::default(),
            connecting: Mutex::default(),
            all_functions: Mutex::default(),
            accounts: Accounts::new(&config.load().limits),
            loads: WorkerLoads::new(workers.len()),
            workers,
            config,
            dial,
            before_first,
            lookup,
            repair,
            totals: Mutex::default(),
            retired: Mutex::default(),
            pauses: Pauses::default(),
        })
    }

    /// The tenant's pool. Opens no server. Errors: [`ClientError::NoReadOnlyRole`] if the tenant has no role
    /// for that access, [`ClientError::Suspended`] if an administrator has disabled it on this node.
    pub async fn of(&self, tenant: &Arc<Tenant>, access: Access) -> Result<Arc<Pool>, ClientError> {
        if self.pauses.is_disabled(tenant.id) {
            let reason = Some("disabled by an administrator".to_owned());
            return Err(ClientError::Suspended { tenant: tenant.name.clone(), reason });
        }
        let pool = self
            .pools
            .try_get_with((tenant.id, access), async {
                if tenant.grants_pending && let Err(error) = (self.before_first)(tenant.clone()).await {
                    warn!(tenant = tenant.name, %error, "cannot grant access to an adopted database's tables");
                }
                let statements = self.statements_of(tenant);
                self.make(tenant.clone(), access, statements, None).ok_or(ClientError::NoReadOnlyRole)
            })
            .await
            .map_err(|client_error| (*client_error).clone())?;
        // The row has changed since the pool was made.
        if pool.tenant.generation < tenant.generation {
            self.refresh(tenant).await;
        }
        pool.current().ok_or(ClientError::AdminShutdown)
    }

    /// A pool without servers, in place of `before`; `None` if the tenant has no role for that access.
    fn make(
        &self,
        tenant: Arc<Tenant>,
        access: Access,
        statements: Arc<SharedStatements>,
        before: Option<&Arc<Pool>>,
    ) -> Option<Arc<Pool>> {
        let credential = match access {
            Access::ReadWrite => tenant.read_write.clone(),
            Access::ReadOnly => tenant.read_only.clone()?,
        };
        let rules = PoolRules::of(&tenant, &self.config.load());
        let (functions, stats) = (self.functions_of(&tenant), self.stats_of(&tenant, access));
        let role_start = RoleStart::new(&credential.username, access);
        let connector = self.connector_of(&tenant, credential, &rules, stats.clone());
        let pinned = PinnedSessions {
            sessions: Mutex::default(),
            limit: rules.pinned_max,
            functions: functions.clone(),
        };
        let placement = match before {
            Some(before) => before.placement.clone(),
            None => Arc::new(Placement::new(self.worker_for_new_pool()?)),
        };
        let clock = placement.home().clock.clone();
        let pool = Arc::new(Pool {
            placement,
            weight: AtomicU32::new(tenant.weight),
            statements,
            memory: self.memory_of(&tenant),
            server_list: Arc::default(),
            queue: WaitQueue::new(self.pauses.is_paused(tenant.id)),
            connector,
            role_start,
            catalogs: Default::default(),
            custom: Default::default(),
            used_temporary: Default::default(),
            has_idle_limits: Default::default(),
            status_cache: StatusCache::default(),
            listener: before.map(|pool| pool.listener.clone()).unwrap_or_default(),
            pinned: Arc::new(pinned),
            cancels: Arc::new(Semaphore::new(rules.cancels_max.min(Semaphore::MAX_PERMITS))),
            last_used_ms: AtomicU64::new(whole_ms(clock.now())),
            functions_checked_ms: AtomicU64::new(0),
            place: Place::default(),
            clock,
            succession: Succession {
                pools: self.me.clone(),
                retired: AtomicBool::default(),
                last: before.map(|pool| pool.succession.last.clone()).unwrap_or_default(),
            },
            tenant_access: Arc::new(TenantAccess { tenant: tenant.clone(), access }),
            functions,
            stats,
            tenant,
            access,
            rules,
        });
        self.rounds.add(&pool);
        pool.connector.budget.register(&pool);
        pool.connector.host.register(&pool);
        Some(pool)
    }

    fn connector_of(
        &self,
        tenant: &Arc<Tenant>,
        credential: Credential,
        rules: &PoolRules,
        stats: Arc<PoolStats>,
    ) -> Connector {
        let backoff = ConnectBackoff::new(rules.connecting_max, rules.server_login_retry);
        Connector {
            tenant: tenant.clone(),
            credential,
            options: self.dial.load_full(),
            budget: self.budget_of(&tenant.host),
            host: self.connects_of(&tenant.host, rules),
            stats,
            live: AtomicUsize::default(),
            opening: AtomicUsize::default(),
            backoff: Mutex::new(backoff),
            awaits_turn: AtomicBool::default(),
            holds: rules.hold_during_outage,
            lost_at_start: AtomicBool::default(),
        }
    }

    /// Shared by all pools of the tenant.
    fn functions_of(&self, tenant: &Tenant) -> Arc<FunctionEffects> {
        let mut all_functions = locked(&self.all_functions);
        // Unused entries are removed when the map would have to grow.
        if all_functions.len() == all_functions.capacity() {
            all_functions.retain(|_, functions| functions.strong_count() > 0);
        }
        let functions = all_functions.get(&tenant.id).and_then(Weak::upgrade).unwrap_or_default();
        all_functions.insert(tenant.id, Arc::downgrade(&functions));
        functions.pool_created(tenant.generation, self.config.load().timeouts.functions_check_delay);
        functions
    }

    fn memory_of(&self, tenant: &Tenant) -> Arc<Account> {
        self.accounts.of_tenant(tenant.id, &self.config.load().limits)
    }

    /// An empty table.
    fn statements_of(&self, tenant: &Tenant) -> Arc<SharedStatements> {
        let parents = [&self.memory_of(tenant), &self.accounts.statements];
        Arc::new(SharedStatements::new(Account::new(Limit::Tenant, usize::MAX, &parents)))
    }

    fn budget_of(&self, host: &Host) -> Arc<HostBudget> {
        let mut budgets = locked(&self.budgets);
        let budget =
            budgets.entry(host.name.clone()).or_insert_with(|| HostBudget::new(&self.lease_requests));
        budget.set_limit(host.max_connections);
        budget.clone()
    }

    fn connects_of(&self, host: &Host, rules: &PoolRules) -> Arc<HostConnecting> {
        let key = (host.name.clone(), host.addresses.clone(), host.tls_mode, host.tls_root_ca.clone());
        let mut all = locked(&self.connecting);
        if all.len() == all.capacity() {
            all.retain(|_, host| host.strong_count() > 0);
        }
        let (attempts_max, pause_max) = (rules.connecting_max, rules.server_login_retry);
        let known = all.get(&key).and_then(Weak::upgrade);
        let connects = known.unwrap_or_else(|| Arc::new(HostConnecting::new(host, attempts_max, pause_max)));
        connects.set_limits(attempts_max, pause_max);
        all.insert(key, Arc::downgrade(&connects));
        connects
    }

    /// The tenant's row is now as given. Replaces pools that differ: idle servers are closed at once, lent
    /// ones when they come back. A tenant that is not active gets no new pool.
    pub async fn refresh(&self, tenant: &Arc<Tenant>) {
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let key = (tenant.id, access);
            let Some(old) = self.pools.get(&key).await else { continue };
            if tenant.status != TenantStatus::Active {
                self.pools.invalidate(&key).await;
                self.retire(&old, None);
                info!(tenant = tenant.name, "pool closed: tenant is not active");
            } else if old.rules != PoolRules::of(tenant, &self.config.load()) || !is_same(&old.tenant, tenant)
            {
                self.replace(&old, tenant.clone()).await;
                info!(tenant = tenant.name, "pool replaced: tenant or configuration changed");
            } else {
                old.set_weight(tenant.weight);
            }
        }
        self.budget_of(&tenant.host);
    }

    fn stats_of(&self, tenant: &Tenant, access: Access) -> Arc<PoolStats> {
        let mut all = locked(&self.totals);
        let limit = usize::try_from(self.config.load().limits.directory_cache_max).unwrap_or(usize::MAX);
        if all.len() >= limit {
            all.retain(|_, totals| Arc::strong_count(&totals.stats) > 1);
        }
        let other = match access {
            Access::ReadWrite => Access::ReadOnly,
            Access::ReadOnly => Access::ReadWrite,
        };
        let of_tenant = all.get(&(tenant.id, other)).map(|totals| totals.stats.sessions_of_tenant.clone());
        let known = all.entry((tenant.id, access)).or_insert_with(|| PoolTotals {
            tenant_id: tenant.id,
            tenant: String::new(),
            access,
            stats: Arc::new(PoolStats {
                sessions_of_tenant: of_tenant.unwrap_or_default(),
                ..PoolStats::default()
            }),
        });
        known.tenant.clone_from(&tenant.name);
        known.stats.clone()
    }

    /// Replaces `old` by a pool for the tenant as it is now.
    pub(super) async fn replace(&self, old: &Arc<Pool>, tenant: Arc<Tenant>) {
        self.put_in_place(old, tenant, old.statements.clone()).await;
    }

    /// Replaces a pool because the settings of its role or database have changed. The new pool shares no
    /// statements: the same text may mean something else under other settings.
    pub(super) async fn replace_for_new_sessions(&self, old: &Arc<Pool>) {
        let _alone = old.role_start.replacing.lock().await;
        if !old.is_retired() {
            self.put_in_place(old, old.tenant.clone(), Arc::default()).await;
        }
    }

    async fn put_in_place(&self, old: &Arc<Pool>, tenant: Arc<Tenant>, statements: Arc<SharedStatements>) {
        let Some(new) = self.make(tenant, old.access, statements, Some(old)) else { return };
        self.pools.insert((new.tenant.id, new.access), new.clone()).await;
        self.retire(old, Some(new));
    }

    /// The role or database of `pool` is not as it was made: replaces the pool if the tenant's row has, or
    /// gets, new credentials. Returns whether it was replaced.
    pub(super) async fn repair_role(&self, pool: &Arc<Pool>, trouble: IdentityTrouble) -> bool {
        // While the host accepts the role, no session waits for the central database.
        let is_silent = trouble.is_silent();
        if !is_silent {
            self.read_row_again(pool).await;
        }
        if !pool.is_retired() {
            let tried = (self.repair)(pool.tenant.clone(), trouble).await;
            if tried || !is_silent {
                self.read_row_again(pool).await;
            }
        }
        pool.is_retired()
    }

    async fn read_row_again(&self, pool: &Arc<Pool>) {
        if let Some(tenant) = (self.lookup)(pool.tenant.id).await
            && tenant.generation > pool.tenant.generation
        {
            self.refresh(&tenant).await;
        }
    }

    /// The configuration has changed: unused pools may be dropped at another time.
    pub fn timeouts_changed(&self) {
        self.rounds.wake_all();
    }

    /// Another part of the process was refused a connection to a full host: closes idle servers there.
    pub fn make_room(&self, host: &str) {
        let budget = locked(&self.budgets).get(host).cloned();
        if let Some(budget) = budget {
            budget.make_room(None);
        }
    }

    /// The budget of each host that was used since the process started.
    pub fn budgets(&self) -> Vec<(String, Arc<HostBudget>)> {
        locked(&self.budgets).iter().map(|(host, budget)| (host.clone(), budget.clone())).collect()
    }

    /// Server connections to a host, of all tenants.
    pub fn live_on(&self, host: &str) -> usize {
        locked(&self.budgets).get(host).map_or(0, |budget| budget.live())
    }

    /// Each host that has a pool. One whose addresses have just been changed may still have pools with the old ones:
    /// then it is there once, with those that more of them use.
    pub fn hosts(&self) -> BTreeMap<String, Arc<HostConnecting>> {
        let all = locked(&self.connecting);
        let mut hosts = BTreeMap::new();
        for ((name, ..), host) in all.iter().filter_map(|(key, host)| Some((key, host.upgrade()?))) {
            let known = hosts.entry(name.clone()).or_insert_with(|| host.clone());
            if Arc::strong_count(&host) > Arc::strong_count(known) {
                *known = host;
            }
        }
        hosts
    }

    /// The address of a host's primary, where the host has several and the primary is known.
    pub fn primary_of(&self, host: &str) -> Option<HostAddress> {
        let addresses = self.hosts().get(host)?.roles.all();
        addresses.into_iter().find_map(|(address, role)| (role == AddressRole::Primary).then_some(address))
    }

    /// Counters of all (tenant, access) since the process started, also without a pool now.
    pub fn totals(&self) -> Vec<PoolTotals> {
        locked(&self.totals).values().cloned().collect()
    }

    /// Takes a pool out of use; its sessions go on with `successor`.
    pub(super) fn retire(&self, pool: &Arc<Pool>, successor: Option<Arc<Pool>>) {
        pool.retire(successor);
        self.rounds.remove(pool);
        let mut retired = locked(&self.retired);
        retired.retain(|pool| pool.strong_count() > 0);
        retired.push(Arc::downgrade(pool));
    }

    /// Retired pools that still have servers on loan.
    pub fn retired(&self) -> Vec<Arc<Pool>> {
        let retired = locked(&self.retired);
        retired.iter().filter_map(Weak::upgrade).filter(|pool| pool.live() > 0).collect()
    }

    /// Retired pools that something holds still.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        locked(&self.retired).iter().filter(|pool| pool.strong_count() > 0).count()
    }

    /// Pools that the next maintenance visits.
    #[cfg(test)]
    pub fn visited(&self) -> usize {
        self.rounds.visited()
    }

    /// `server_version` of any server, once one was open.
    pub fn server_version(&self) -> Option<Box<str>> {
        self.pools.iter().find_map(|(_, pool)| pool.status_cache.server_version())
    }

    pub fn all(&self) -> Vec<Arc<Pool>> {
        self.pools.iter().map(|(_, pool)| pool).collect()
    }
}

/// Whether servers opened for one row serve the other.
fn is_same(old: &Tenant, new: &Tenant) -> bool {
    old.generation == new.generation
        && old.name == new.name
        && old.host.addresses == new.host.addresses
        && old.host.tls_mode == new.host.tls_mode
        && old.host.tls_root_ca == new.host.tls_root_ca
        && old.statement_timeout == new.statement_timeout
}

impl std::fmt::Debug for TenantPools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TenantPools").field("pools", &self.pools.entry_count()).finish_non_exhaustive()
    }
}
