//! (tenant, access) → pool: made on first use by exactly one maker while others wait for it, replaced when the tenant's
//! row changes, dropped when nobody uses it.

use std::{
    collections::HashMap,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicU64},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::{
    Pool, PoolRules, connector::Connector, host_budget::Budget, host_connecting::HostConnects, pause::Halts,
    pinned_sessions::PinnedSessions, role_settings::RoleStart, shared_listener::EarPlace,
    startup_parameters::Greetings, stats::PoolStats, succession::Succession, wait_queue::WaitQueue,
};
use crate::{
    config::{Config, TlsMode},
    data_path::{
        functions::Catalogue,
        memory_limit::{Account, Accounts},
        prepared::shared_statements::StatementTable,
        server::{DialOptions, IdentityTrouble},
        sessions::registry::Place,
        tenant::{Access, Host, HostAddress, Tenant, TenantStatus},
        worker::{Worker, Workers},
    },
    error::{ClientError, Limit},
};

/// What the control path does before a tenant's first pool is made: access to an adopted database's tables. An error is
/// logged, and the pool is made all the same.
pub type PoolMaking =
    Arc<dyn Fn(Arc<Tenant>) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// How a tenant's row is looked up anew, after whoever is changing it now, for a pool whose credentials the host refuses.
pub type Looking =
    Arc<dyn Fn(i64) -> Pin<Box<dyn Future<Output = Option<Arc<Tenant>>> + Send>> + Send + Sync>;

/// What the control path does where a tenant's role or database is not as it was made: puts it right, if it is the tenant's doing
/// and its turn has come. Resolves when that is over, well or not; `false`: it was not its turn.
pub type Mending =
    Arc<dyn Fn(Arc<Tenant>, IdentityTrouble) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// Every pool of this process.
pub struct TenantPools {
    pools: moka::future::Cache<(i64, Access), Arc<Pool>>,
    budgets: Mutex<HashMap<String, Arc<Budget>>>,
    /// By name and how it is reached: one that is reached otherwise is another, of which nothing is known.
    connects: Mutex<HashMap<HostKey, Weak<HostConnects>>>,
    /// What is known of each tenant's functions, as long as it has a pool.
    catalogues: Mutex<HashMap<i64, Weak<Catalogue>>>,
    /// What is kept for whom.
    pub accounts: Accounts,
    workers: Vec<Arc<Worker>>,
    config: Arc<ArcSwap<Config>>,
    dial: Arc<ArcSwap<DialOptions>>,
    before_first: PoolMaking,
    look_again: Looking,
    mend: Mending,
    /// For the pools to know where they belong.
    me: Weak<Self>,
    /// What each has done since the process started, whether it has a pool now or not.
    done: Mutex<HashMap<(i64, Access), Done>>,
    /// Pools that were replaced or closed, as long as somebody still holds one of their servers.
    retired: Mutex<Vec<Weak<Pool>>>,
    /// What administrators have stopped.
    pub halts: Halts,
}

type HostKey = (String, HostAddress, TlsMode, Option<PathBuf>);

/// What the pools of one (tenant, access) have done since the process started.
#[derive(Debug, Clone)]
pub struct Done {
    /// Its id.
    pub tenant_id: i64,
    /// Its name when its last pool was made.
    pub tenant: String,
    /// With what rights.
    pub access: Access,
    /// The counters.
    pub stats: Arc<PoolStats>,
}

impl TenantPools {
    /// No pools yet. The configuration and dial options are looked at anew for each pool.
    pub fn new(
        workers: Vec<Arc<Worker>>,
        config: Arc<ArcSwap<Config>>,
        dial: Arc<ArcSwap<DialOptions>>,
        before_first: PoolMaking,
        look_again: Looking,
        mend: Mending,
    ) -> Arc<Self> {
        let pools =
            moka::future::Cache::builder().max_capacity(config.load().limits.directory_cache_max).build();
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            pools,
            budgets: Mutex::default(),
            connects: Mutex::default(),
            catalogues: Mutex::default(),
            accounts: Accounts::new(&config.load().limits),
            workers,
            config,
            dial,
            before_first,
            look_again,
            mend,
            done: Mutex::default(),
            retired: Mutex::default(),
            halts: Halts::default(),
        })
    }

    /// The tenant's pool. Opens no server.
    ///
    /// # Errors
    /// [`ClientError::NoReadOnlyRole`] if the tenant has no role for that access, [`ClientError::Suspended`] if an administrator
    /// has disabled it on this node.
    pub async fn of(&self, tenant: &Arc<Tenant>, access: Access) -> Result<Arc<Pool>, ClientError> {
        if self.halts.is_disabled(tenant.id) {
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
                self.make(tenant.clone(), access, statements, Arc::default()).ok_or(ClientError::NoReadOnlyRole)
            })
            .await
            .map_err(|refusal| (*refusal).clone())?;
        // A row that changed while it was looked up.
        if pool.tenant.generation < tenant.generation {
            self.refresh(tenant).await;
        }
        pool.current().ok_or(ClientError::AdminShutdown)
    }

    /// A pool without servers; `None` if the tenant has no role for that access.
    fn make(
        &self,
        tenant: Arc<Tenant>,
        access: Access,
        statements: Arc<StatementTable>,
        listener: Arc<EarPlace>,
    ) -> Option<Arc<Pool>> {
        let credential = match access {
            Access::ReadWrite => tenant.read_write.clone(),
            Access::ReadOnly => tenant.read_only.clone()?,
        };
        let rules = PoolRules::of(&tenant, &self.config.load());
        let budget = self.budget_of(&tenant.host);
        let connects = self.connects_of(&tenant.host, &rules);
        let (catalogue, stats) = (self.catalogue_of(&tenant), self.stats_of(&tenant, access));
        let connector = Connector::new(
            tenant.clone(),
            credential,
            self.dial.load_full(),
            budget.clone(),
            connects.clone(),
            stats.clone(),
            &rules,
        );
        let pool = Arc::new(Pool {
            worker: Workers::of(&self.workers, tenant.id)?.clone(),
            statements,
            memory: self.memory_of(&tenant),
            server_list: Arc::default(),
            queue: WaitQueue::new(rules.size, self.halts.is_paused(tenant.id)),
            connector,
            role_start: RoleStart::default(),
            greetings: Greetings::default(),
            listener,
            pinned: PinnedSessions::new(rules.pinned_max, catalogue.clone()),
            cancels: Arc::new(Semaphore::new(rules.cancels_max.min(Semaphore::MAX_PERMITS))),
            last_used_ms: AtomicU64::new(0),
            functions_checked_ms: AtomicU64::new(0),
            succession: Succession::new(self.me.clone()),
            place: Arc::new(Place { tenant: tenant.clone(), access }),
            catalogue,
            stats,
            tenant,
            access,
            rules,
        });
        budget.register(&pool);
        connects.register(&pool);
        Some(pool)
    }

    /// What is known of the tenant's functions: the same for all of its pools.
    fn catalogue_of(&self, tenant: &Tenant) -> Arc<Catalogue> {
        let mut catalogues = locked(&self.catalogues);
        // The dead are swept when the map would have to grow.
        if catalogues.len() == catalogues.capacity() {
            catalogues.retain(|_, catalogue| catalogue.strong_count() > 0);
        }
        let catalogue = catalogues.get(&tenant.id).and_then(Weak::upgrade).unwrap_or_default();
        catalogues.insert(tenant.id, Arc::downgrade(&catalogue));
        catalogue.serves(tenant.generation, self.config.load().timeouts.functions_check_delay);
        catalogue
    }

    fn memory_of(&self, tenant: &Tenant) -> Arc<Account> {
        self.accounts.of_tenant(tenant.id, &self.config.load().limits)
    }

    /// None yet.
    fn statements_of(&self, tenant: &Tenant) -> Arc<StatementTable> {
        let parents = [&self.memory_of(tenant), &self.accounts.statements];
        Arc::new(StatementTable::new(Account::new(Limit::Tenant, usize::MAX, &parents)))
    }

    fn budget_of(&self, host: &Host) -> Arc<Budget> {
        let mut budgets = locked(&self.budgets);
        let budget = budgets.entry(host.name.clone()).or_insert_with(|| Budget::new(host.max_connections));
        budget.set_limit(host.max_connections);
        budget.clone()
    }

    fn connects_of(&self, host: &Host, rules: &PoolRules) -> Arc<HostConnects> {
        let key = (host.name.clone(), host.address.clone(), host.tls_mode, host.tls_root_ca.clone());
        let mut all = locked(&self.connects);
        if all.len() == all.capacity() {
            all.retain(|_, connects| connects.strong_count() > 0);
        }
        let (most, longest_pause) = (rules.connecting_max, rules.server_login_retry);
        let known = all.get(&key).and_then(Weak::upgrade);
        let connects = known.unwrap_or_else(|| Arc::new(HostConnects::new(&host.name, most, longest_pause)));
        connects.set_limits(most, longest_pause);
        all.insert(key, Arc::downgrade(&connects));
        connects
    }

    /// The tenant's row is like this now. Pools that were made with something else are replaced: idle servers are closed,
    /// lent ones when they come back; a tenant that is closed gets no new pool.
    pub async fn refresh(&self, tenant: &Arc<Tenant>) {
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let key = (tenant.id, access);
            let Some(old) = self.pools.get(&key).await else { continue };
            if tenant.status != TenantStatus::Active {
                self.pools.invalidate(&key).await;
                self.retire(&old, None);
                info!(tenant = tenant.name, "pool closed");
            } else if old.rules != PoolRules::of(tenant, &self.config.load()) || !is_same(&old.tenant, tenant)
            {
                self.replace(&old, tenant.clone()).await;
                info!(tenant = tenant.name, "pool replaced");
            }
        }
        self.budget_of(&tenant.host);
    }

    /// The counters of a (tenant, access), which outlive its pools.
    fn stats_of(&self, tenant: &Tenant, access: Access) -> Arc<PoolStats> {
        let mut all = locked(&self.done);
        let limit = usize::try_from(self.config.load().limits.directory_cache_max).unwrap_or(usize::MAX);
        if all.len() >= limit {
            all.retain(|_, done| Arc::strong_count(&done.stats) > 1);
        }
        let other = match access {
            Access::ReadWrite => Access::ReadOnly,
            Access::ReadOnly => Access::ReadWrite,
        };
        let of_tenant = all.get(&(tenant.id, other)).map(|done| done.stats.sessions_of_tenant.clone());
        let known = all.entry((tenant.id, access)).or_insert_with(|| Done {
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

    /// Puts a new pool, made for the tenant as it is now, in the place of `old`.
    pub(super) async fn replace(&self, old: &Arc<Pool>, tenant: Arc<Tenant>) {
        self.put_in_place(old, tenant, old.statements.clone()).await;
    }

    /// Puts a new pool in the place of one whose servers began with settings of role and database that have changed since. To new
    /// sessions the same text is another statement than to those that go on with the statements that they have.
    pub(super) async fn begin_anew(&self, old: &Arc<Pool>) {
        let _alone = old.role_start.replacing().await;
        if !old.is_retired() {
            self.put_in_place(old, old.tenant.clone(), Arc::default()).await;
        }
    }

    async fn put_in_place(&self, old: &Arc<Pool>, tenant: Arc<Tenant>, statements: Arc<StatementTable>) {
        let Some(new) = self.make(tenant, old.access, statements, old.listener.clone()) else { return };
        self.pools.insert((new.tenant.id, new.access), new.clone()).await;
        self.retire(old, Some(new));
    }

    /// What `pool` logs in with is not as it was made: replaces the pool, if its tenant has other credentials by now, or gets others.
    pub(super) async fn renew(&self, pool: &Arc<Pool>, trouble: IdentityTrouble) -> bool {
        // While the host lets the role in, no session waits for the central database without need.
        let is_silent = trouble.is_silent();
        if !is_silent {
            self.look_again_at(pool).await;
        }
        if !pool.is_retired() {
            let tried = (self.mend)(pool.tenant.clone(), trouble).await;
            if tried || !is_silent {
                self.look_again_at(pool).await;
            }
        }
        pool.is_retired()
    }

    async fn look_again_at(&self, pool: &Arc<Pool>) {
        if let Some(tenant) = (self.look_again)(pool.tenant.id).await
            && tenant.generation > pool.tenant.generation
        {
            self.refresh(&tenant).await;
        }
    }

    /// Somebody else needs a connection to a host that is full: closes idle servers there.
    pub fn make_room(&self, host: &str) {
        let budget = locked(&self.budgets).get(host).cloned();
        if let Some(budget) = budget {
            budget.make_room(None);
        }
    }

    /// Server connections to a host, over all tenants.
    pub fn live_on(&self, host: &str) -> usize {
        locked(&self.budgets).get(host).map_or(0, |budget| budget.live())
    }

    /// What everybody has done since the process started, those too that have no pool now.
    pub fn done(&self) -> Vec<Done> {
        locked(&self.done).values().cloned().collect()
    }

    /// Takes a pool out of use; `successor` serves its sessions from now on.
    fn retire(&self, pool: &Arc<Pool>, successor: Option<Arc<Pool>>) {
        pool.retire(successor);
        let mut retired = locked(&self.retired);
        retired.retain(|pool| pool.strong_count() > 0);
        retired.push(Arc::downgrade(pool));
    }

    /// Pools that serve nobody new and still have servers on loan.
    pub fn retired(&self) -> Vec<Arc<Pool>> {
        let retired = locked(&self.retired);
        retired.iter().filter_map(Weak::upgrade).filter(|pool| pool.live() > 0).collect()
    }

    /// The version that some server of ours has reported, if there was one.
    pub fn server_version(&self) -> Option<Box<str>> {
        self.pools.iter().find_map(|(_, pool)| pool.greetings.server_version())
    }

    /// Every pool there is now.
    pub fn all(&self) -> Vec<Arc<Pool>> {
        self.pools.iter().map(|(_, pool)| pool).collect()
    }

    /// Looks after every pool: on its own worker, now and then.
    pub async fn maintain(&self) {
        let idle = self.config.load().timeouts.pool_idle;
        for pool in self.all() {
            let unused = pool.worker.clock.now().saturating_sub(Duration::from_millis(pool.last_used()));
            if pool.sessions() == 0 && pool.waiting() == 0 && pool.rules.min_size == 0 && unused >= idle {
                self.pools.invalidate(&(pool.tenant.id, pool.access)).await;
                self.retire(&pool, None);
            } else {
                let worker = pool.worker.clone();
                worker.spawn(async move { pool.maintain() });
            }
        }
        self.pools.run_pending_tasks().await;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether server connections opened for one serve the other.
fn is_same(old: &Tenant, new: &Tenant) -> bool {
    old.generation == new.generation
        && old.name == new.name
        && old.host.address == new.host.address
        && old.host.tls_mode == new.host.tls_mode
        && old.host.tls_root_ca == new.host.tls_root_ca
        && old.statement_timeout == new.statement_timeout
}

impl std::fmt::Debug for TenantPools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TenantPools").field("pools", &self.pools.entry_count()).finish_non_exhaustive()
    }
}
