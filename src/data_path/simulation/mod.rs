//! A simulation of the session core: clients, pool, servers, waits, cancels, settings and prepared statements in
//! one process, with a virtual clock and random faults. Test only.
//!
//! Each client compares what it gets with a session of its own, the oracle: every reply reaches the client that
//! asked, once, in order; nothing of a session is seen by another; a cancel ends the query that it is meant for.
//! In the end no session is left, none waits, and each open server is idle and clean.
//!
//! A seed decides everything but the order of hash tables. `scripts/simulate` runs many seeds, and a violation
//! names its seed: `scripts/simulate 1 SEED` repeats it.

mod backend;
mod client;
mod expressions;
mod frames;
mod host;
mod proxy_queries;

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{sleep, timeout};

use self::{
    client::{Client, End},
    host::Host,
};
use crate::{
    config::Config,
    data_path::{
        directory::{Directory, DirectoryError},
        lock::locked,
        login::{failed_logins::FailedLogins, password_pace::PasswordPace},
        pool::TenantPools,
        proxy::Proxy,
        server::{DialOptions, dial::SimulatedHost},
        sessions::registry::Sessions,
        tenant::{Access, DirectoryChange, Login, LoginKind, Tenant},
        worker::Worker,
    },
    metrics::Metrics,
};

/// Seeds that the tests run.
const SEEDS: u64 = 1000;

/// What the clients of one seed share.
struct World {
    proxy: Arc<Proxy>,
    tenant: Arc<Tenant>,
    login: Arc<Login>,
    host: Arc<Host>,
}

#[test]
fn every_client_gets_what_a_server_of_its_own_would_send() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let count = number("PGLOBBY_SIMULATE_SEEDS").unwrap_or(SEEDS);
    let first = number("PGLOBBY_SIMULATE_FIRST").unwrap_or(1);
    if std::env::var_os("PGLOBBY_SIMULATE_TRACE").is_some() {
        let levels = tracing_subscriber::EnvFilter::new("pglobby=debug");
        tracing_subscriber::fmt().with_env_filter(levels).with_writer(std::io::stderr).init();
    }
    let mut violations = Vec::new();
    for seed in first..first + count {
        if let Err(violation) = run(seed) {
            violations.push(format!("seed {seed}: {violation}"));
        }
        if violations.len() == 5 {
            break;
        }
    }
    assert!(violations.is_empty(), "{}\nrepeat one with: scripts/simulate 1 SEED", violations.join("\n\n"));
}

fn run(seed: u64) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(simulate(seed))
}

async fn simulate(seed: u64) -> Result<(), String> {
    let mut random = StdRng::seed_from_u64(seed);
    let world = Arc::new(World::new(seed, &mut random)?);
    let maintained = world.proxy.clone();
    tokio::spawn(async move {
        loop {
            sleep(Duration::from_secs(5)).await;
            maintained.pools.maintain().await;
        }
    });
    let mut clients = Vec::new();
    for number in 0..random.random_range(2..8) {
        let (world, seed) = (world.clone(), random.random());
        let delay = Duration::from_millis(random.random_range(0..300));
        clients.push(tokio::spawn(async move {
            sleep(delay).await;
            Client::connect(world, number, seed).await?.work().await
        }));
    }
    for client in clients {
        match client.await {
            Ok(Ok(()) | Err(End::Fault)) => {}
            Ok(Err(End::Violation(what))) => return Err(what),
            Err(error) => return Err(format!("a client failed: {error}")),
        }
    }
    world.settle().await
}

impl World {
    fn new(seed: u64, random: &mut StdRng) -> Result<Self, String> {
        let text = format!(
            "max_prepared_statements = {}\nquery_wait_timeout = \"1h\"\n[central]\nurl = \"postgres://pglobby@127.0.0.1/pglobby\"\n",
            [2, 5, 200][random.random_range(0..3)],
        );
        let config = Config::read(&text, None, &|_| None).map_err(|error| error.to_string())?;
        let faults = if random.random() { 0 } else { 60 };
        let host = Host::new(seed, faults, random.random_range(16_384..65_536));
        let mut dial = DialOptions::for_tests(Duration::from_secs(15));
        let dialled = host.clone();
        dial.simulated = Some(SimulatedHost(Arc::new(move || dialled.connect())));
        let mut tenant = Tenant::for_tests(1, "acme");
        tenant.pool_size = Some(random.random_range(1..4));
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
        let workers = vec![Worker::here()];
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
            workers,
            console: Arc::new(|_| Box::pin(async {})),
            foreign_cancel: Arc::new(|_, _| {}),
            connection_limits: Arc::default(),
            login_turns: Arc::default(),
            failed_logins: FailedLogins::default(),
            password_pace: PasswordPace::default(),
            metrics: Arc::<Metrics>::default(),
        });
        Ok(Self { proxy, tenant: Arc::new(tenant), login: Arc::new(login), host })
    }

    /// Sessions and servers, for a violation.
    fn state(&self) -> String {
        let pools = self.proxy.pools.all();
        let counts = pools.iter().map(|pool| {
            let (live, opening, idle) = (pool.live(), pool.opening(), pool.idle());
            format!("{live} servers, {opening} opening, {idle} idle, {} waiting sessions", pool.waiting())
        });
        format!("{} sessions, {}", self.proxy.sessions.len(), counts.collect::<Vec<_>>().join("; "))
    }

    /// When all clients have left: no session is left or waits, and each server is idle and clean, or closed.
    async fn settle(&self) -> Result<(), String> {
        let quiet = async {
            loop {
                let pools = self.proxy.pools.all();
                let busy = pools.iter().any(|pool| pool.live() != pool.idle() || pool.waiting() > 0);
                if self.proxy.sessions.len() == 0 && !busy {
                    return;
                }
                sleep(Duration::from_millis(100)).await;
            }
        };
        if timeout(Duration::from_secs(600), quiet).await.is_err() {
            return Err(format!("ten minutes after the last client left: {}", self.state()));
        }
        // A server that was just closed ends a moment later.
        sleep(Duration::from_secs(60)).await;
        let live: usize = self.proxy.pools.all().iter().map(|pool| pool.live()).sum();
        let open = self.host.leftovers();
        if open.len() > live {
            return Err(format!("{} servers are open, {}", open.len(), self.state()));
        }
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
