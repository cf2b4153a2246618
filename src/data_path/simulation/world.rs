//! What the clients of one seed share: the proxy's parts, tenants, a host.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use arc_swap::ArcSwap;
use rand::{Rng as _, rngs::StdRng};
use tokio::time::{sleep, timeout};

use super::host::Host;
use crate::{
    config::{Config, PoolMode},
    data_path::{
        directory::{Directory, DirectoryError},
        host_address::HostAddress,
        lock::locked,
        login::{failed_logins::FailedLogins, password_pace::PasswordPace},
        pool::TenantPools,
        proxy::Proxy,
        server::{DialOptions, dial::SimulatedHost},
        sessions::registry::Sessions,
        tenant::{Access, DirectoryChange, Host as TenantHost, Login, LoginKind, Tenant, TenantStatus},
        worker::Worker,
    },
    metrics::Metrics,
};

/// A tenant of the simulation, apart from what a change of its row changes.
#[derive(Debug, Clone, Copy)]
struct Shape {
    id: i64,
    name: &'static str,
    pool_size: u32,
    mode: PoolMode,
    /// Servers of all tenants.
    budget: Option<u32>,
}

impl Shape {
    fn tenant(self, generation: i64, weight: u32) -> Arc<Tenant> {
        let mut tenant = Tenant::for_tests(self.id, self.name);
        tenant.pool_size = Some(self.pool_size);
        tenant.pool_mode = Some(self.mode);
        tenant.weight = weight;
        tenant.generation = generation;
        tenant.host = Arc::new(TenantHost {
            name: "default".to_owned(),
            addresses: Box::new([HostAddress::of("db", 5432)]),
            tls_mode: crate::config::TlsMode::Disable,
            tls_root_ca: None,
            max_connections: self.budget,
        });
        Arc::new(tenant)
    }
}

/// What the clients of one seed share.
pub struct World {
    pub proxy: Arc<Proxy>,
    pub login: Arc<Login>,
    pub host: Arc<Host>,
    /// The host takes so few servers that a shared listener may find no room.
    pub is_scarce: bool,
    tenants: Vec<(Shape, Mutex<Arc<Tenant>>)>,
}

/// How the host and the pools of a seed are.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `max_connecting_servers` and `max_prepared_statements`.
    pub connecting_max: usize,
    pub prepared_max: usize,
    /// One message in so many meets a fault; 0: none.
    pub one_fault_in: u32,
    /// Bytes that a connection to the host holds.
    pub pipe_bytes: usize,
    /// How long the host takes to answer a new connection.
    pub connect_time: Duration,
    /// Servers of all tenants.
    pub budget: Option<u32>,
    /// Pool size and mode of each tenant.
    pub pools: Vec<(u32, PoolMode)>,
}

impl Plan {
    /// As the seed has it.
    pub fn of(random: &mut StdRng) -> Self {
        let tenants = random.random_range(2..=3);
        let mut pool = || {
            let mode = if random.random_ratio(1, 5) { PoolMode::Session } else { PoolMode::Transaction };
            (random.random_range(1..4), mode)
        };
        let pools = (0..tenants).map(|_| pool()).collect();
        Self {
            connecting_max: [1, 4][random.random_range(0..2)],
            prepared_max: [2, 5, 200][random.random_range(0..3)],
            one_fault_in: if random.random() { 0 } else { 60 },
            pipe_bytes: random.random_range(16_384..65_536),
            connect_time: Duration::ZERO,
            budget: random.random_ratio(1, 2).then(|| random.random_range(1..5)),
            pools,
        }
    }
}

impl World {
    pub fn new(seed: u64, plan: Plan) -> Result<Self, String> {
        let text = format!(
            "max_connecting_servers = {}\nmax_prepared_statements = {}\nquery_wait_timeout = \"30min\"\n[central]\nurl = \"postgres://pglobby@127.0.0.1/pglobby\"\n",
            plan.connecting_max, plan.prepared_max,
        );
        let config = Config::read(&text, None, &|_| None).map_err(|error| error.to_string())?;
        let host = Host::new(seed, plan.one_fault_in, plan.pipe_bytes, plan.connect_time);
        let mut dial = DialOptions::for_tests(Duration::from_secs(15));
        let dialled = host.clone();
        dial.simulated = Some(SimulatedHost(Arc::new(move || dialled.connect())));
        let names = [(1, "acme"), (2, "blue"), (3, "coral")];
        let tenants = names.into_iter().zip(plan.pools).map(|((id, name), (pool_size, mode))| {
            let shape = Shape { id, name, pool_size, mode, budget: plan.budget };
            (shape, Mutex::new(shape.tenant(1, 1)))
        });
        let kind =
            LoginKind::Employee { tenant_id: 1, tenant_name: "acme".to_owned(), access: Access::ReadWrite };
        let login = Login {
            id: 1,
            name: "alice".to_owned(),
            kind,
            verifier: String::new().into(),
            valid_until: None,
            disabled: false,
            allow_from: Vec::new(),
        };
        let config = Arc::new(ArcSwap::from_pointee(config));
        let first = Worker::here();
        let workers = vec![first.clone(), first.beside(1), first.beside(2)];
        let pools = TenantPools::new(
            workers.clone(),
            config.clone(),
            Arc::new(ArcSwap::from_pointee(dial)),
            Arc::new(|_| Box::pin(async { Ok(()) })),
            Arc::new(|_| Box::pin(async { None })),
            Arc::new(|_, _| Box::pin(async { false })),
        );
        let proxy = Arc::new(Proxy {
            config,
            tls: None.into(),
            directory: Arc::new(NoDirectory),
            pools,
            sessions: Arc::new(Sessions::default()),
            successor: std::sync::Mutex::default(),
            workers,
            console: Arc::new(|_| Box::pin(async {})),
            foreign_cancel: Arc::new(|_| tokio::sync::oneshot::channel().1),
            connection_limits: Arc::default(),
            login_turns: Arc::default(),
            failed_logins: FailedLogins::default(),
            password_pace: PasswordPace::default(),
            metrics: Arc::<Metrics>::default(),
        });
        Ok(Self {
            proxy,
            login: Arc::new(login),
            host,
            is_scarce: plan.budget.is_some(),
            tenants: tenants.collect(),
        })
    }

    /// The tenant with this index, as its row is now.
    pub fn tenant(&self, index: usize) -> Arc<Tenant> {
        locked(&self.tenants[index % self.tenants.len()].1).clone()
    }

    /// A tenant's row changes: its pool is replaced, and its sessions go on with the new one. Each third time only its
    /// weight changes, and the pool stays.
    pub async fn change_tenant(&self, index: usize) {
        let (shape, tenant) = &self.tenants[index % self.tenants.len()];
        let changed = {
            let mut tenant = locked(tenant);
            let weight = tenant.weight % 3 + 1;
            *tenant = shape.tenant(tenant.generation + i64::from(weight != 2), weight);
            tenant.clone()
        };
        self.proxy.pools.refresh(&changed).await;
    }

    /// A tenant's pools go to other workers, and get several every other time.
    pub fn place_tenant(&self, index: usize) {
        let (id, workers) = (self.tenant(index).id, &self.proxy.workers);
        for pool in self.proxy.pools.all().into_iter().filter(|pool| pool.tenant.id == id) {
            let at = pool.placement.workers().iter().sum::<usize>() + 1;
            let count = at % 2 + 1;
            let placed = workers.iter().cycle().skip(at % workers.len()).take(count).cloned();
            pool.placement.place(placed.collect());
        }
    }

    /// A tenant is suspended: its pool is closed. Its sessions are not ended.
    pub async fn suspend_tenant(&self, index: usize) {
        let (before, (shape, _)) = (self.tenant(index), &self.tenants[index % self.tenants.len()]);
        let mut tenant = shape.tenant(before.generation + 1, before.weight);
        if let Some(tenant) = Arc::get_mut(&mut tenant) {
            tenant.status = TenantStatus::Suspended;
        }
        self.proxy.pools.refresh(&tenant).await;
    }

    /// Sessions and servers, for a violation.
    pub fn state(&self) -> String {
        let pools = self.proxy.pools.all();
        let counts = pools.iter().map(|pool| {
            let (live, opening, idle) = (pool.live(), pool.opening(), pool.idle());
            format!("{live} servers, {opening} opening, {idle} idle, {} waiting sessions", pool.waiting())
        });
        let retired = self.proxy.pools.retired().len();
        format!(
            "{} sessions, {retired} retired pools, {}",
            self.proxy.sessions.len(),
            counts.collect::<Vec<_>>().join("; ")
        )
    }

    /// When all clients have left: no session is left or waits, and each server is idle and clean, or closed.
    pub async fn settle(&self) -> Result<(), String> {
        let quiet = async {
            loop {
                let pools = self.proxy.pools.all();
                let busy = pools.iter().any(|pool| pool.live() != pool.idle() || pool.waiting() > 0)
                    || !self.proxy.pools.retired().is_empty();
                if self.proxy.sessions.is_empty() && !busy {
                    return;
                }
                sleep(Duration::from_millis(100)).await;
            }
        };
        if timeout(Duration::from_secs(600), quiet).await.is_err() {
            return Err(format!("ten minutes after the last client left: {}", self.state()));
        }
        // A server that the proxy has closed, or given up, ends a moment later, when it has done its work. The pools
        // go on checking idle ones, and close some.
        let given_up = || {
            let pools = self.proxy.pools.all();
            let listed = pools.iter().flat_map(|pool| pool.server_list.all());
            let listed: HashSet<_> = listed.map(|server| server.process_id).collect();
            let mut open: Vec<_> = self.host.leftovers().into_iter().map(|(pid, _)| pid).collect();
            open.retain(|pid| !listed.contains(pid));
            open
        };
        let ended = async {
            while !given_up().is_empty() {
                sleep(Duration::from_millis(70)).await;
            }
        };
        if timeout(Duration::from_secs(60), ended).await.is_err() {
            return Err(format!("servers {:?} are open, {}", given_up(), self.state()));
        }
        let open = self.host.leftovers();
        if let Some((pid, left)) = open.iter().find(|(_, left)| !left.is_empty()) {
            return Err(format!("idle server {pid} has {}", left.join(", ")));
        }
        let unknown = std::mem::take(&mut *locked(&self.host.unknown));
        match unknown.first() {
            Some(sql) => Err(format!("the model does not know {sql}")),
            None => Ok(()),
        }
    }
}

/// No session of the simulation asks the central database.
#[derive(Debug)]
struct NoDirectory;

#[async_trait::async_trait]
impl Directory for NoDirectory {
    async fn login(&self, _: &str) -> Result<Option<Arc<Login>>, DirectoryError> {
        Ok(None)
    }

    async fn tenant(&self, _: &str) -> Result<Option<Arc<Tenant>>, DirectoryError> {
        Ok(None)
    }

    async fn tenant_by_id(&self, _: i64) -> Result<Option<Arc<Tenant>>, DirectoryError> {
        Ok(None)
    }

    fn is_current(&self) -> bool {
        true
    }

    fn mock_salt(&self) -> &[u8] {
        b""
    }

    fn answer_at(&self, begun: std::time::Instant) -> std::time::Instant {
        begun
    }

    fn forget(&self, _: &DirectoryChange) {}

    async fn verifier_of(&self, password: secrecy::SecretString) -> secrecy::SecretString {
        password
    }

    async fn set_verifier(
        &self,
        _: &Login,
        _: &[secrecy::SecretString],
        _: &secrecy::SecretString,
    ) -> Result<bool, DirectoryError> {
        Ok(false)
    }
}
