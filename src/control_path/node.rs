//! A node: all that `pglobby serve` and `pglobby dev` run, put together.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    pin::pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::{
    sync::{Notify, mpsc},
    task::{AbortHandle, JoinHandle},
};
use tracing::{info, warn};

use crate::{
    config::{Config, TlsMode},
    control_path::{
        admin::{actor::AdminContext, host_budget},
        beginning::{self, Beginning},
        central::{Central, CentralError, causes, change_barrier::ChangeBarrier, cluster_cancel},
        console::{self, ConsoleContext, Request, StatsWindow},
        directory::CentralDirectory,
        fleet::{Fleet, identity::Identity, membership, nodes, registration::Registration},
        follow_changes::{self, Follower},
        http,
        onboarding::{abandoned, adopt::complete_grants, repair::mending},
        rhythm,
        secrets::keyring_reload::ReloadableKeyring,
        takeover::Inherited,
    },
    data_path::{
        directory::Directory as _,
        inherited_sockets::duplicate,
        listener::{Accepting, Listeners},
        lock::locked,
        login::{failed_logins::FailedLogins, password_pace::PasswordPace},
        pool::{BeforeFirstPool, TenantLookup, TenantPools, host_lease::HostLease},
        proxy::Proxy,
        server::DialOptions,
        sessions::{registry::Sessions, timeouts},
        tenant::DirectoryChange,
        worker::Workers,
    },
    metrics::Metrics,
    shutdown::{Ending, end_sessions, forward_sessions},
    wire::tls::towards_clients::{CertificateFiles, ClientTlsAcceptor},
};

/// Queue of requests to the owner of the process. RELOAD and SHUTDOWN are rare.
const REQUESTS_MAX: usize = 8;

/// How long the end of the process waits for its servers to close, and how often it looks.
const SERVERS_CLOSED_WITHIN: Duration = Duration::from_secs(1);
const SERVERS_LOOK_EVERY: Duration = Duration::from_millis(5);

/// Interval of the maintenance of pools.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// A node that serves clients. Ends with [`Node::end`]; dropping it ends everything at once.
#[derive(Debug)]
pub struct Node {
    /// Shared by all clients.
    pub proxy: Arc<Proxy>,
    keyring: Arc<ReloadableKeyring>,
    dial: Arc<ArcSwap<DialOptions>>,
    central: Central,
    registration: Arc<Registration>,
    listeners: Listeners,
    http: Option<HttpServing>,
    requests: tokio::sync::Mutex<mpsc::Receiver<Request>>,
    accepting: Option<Accepting>,
    tasks: Vec<JoinHandle<()>>,
    /// Dropped last: every session ends with the workers.
    _workers: Workers,
}

/// HTTP, which is served until the end of the node. Another process may accept on its socket before.
#[derive(Debug)]
struct HttpServing {
    listener: TcpListener,
    accepting: AbortHandle,
}

/// Why a node does not start or reload: one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NodeError(String);

/// Any error, in one sentence.
pub(super) fn refused(error: impl std::error::Error + 'static) -> NodeError {
    NodeError(causes(&error))
}

impl Node {
    /// Checks the configuration, takes over or binds its sockets, and serves.
    ///
    /// # Errors
    /// Whatever is wrong with configuration, keys, the central database or the addresses; nothing is served
    /// then.
    pub async fn start(config: Config, inherited: &mut Inherited) -> Result<Self, NodeError> {
        let keyring = Arc::new(ReloadableKeyring::load(&config).map_err(refused)?);
        let central = Central::open(&config).map_err(refused)?;
        let directory = CentralDirectory::new(central.clone(), keyring.clone(), &config);
        let beginning = beginning::begin(&central, &directory, &config).await?;
        let tls = ArcSwapOption::from(client_tls(&config)?.map(Arc::new));
        let dial = Arc::new(ArcSwap::from_pointee(DialOptions::new(&config).map_err(refused)?));
        let sockets = &mut inherited.sockets;
        let http = config.http_listen.map(|address| http::bind(address, sockets));
        let http = http.transpose().map_err(NodeError)?;
        let listeners = Listeners::bind(&config, sockets).map_err(NodeError)?;
        let workers = Workers::start(config.worker_threads).map_err(refused)?;

        let identity = Identity::new(&config, &listeners.addresses());
        let registration = Arc::new(Registration::new(identity, keyring.clone()));
        let cancels_max = config.limits.cancels_max;
        let config = Arc::new(ArcSwap::from_pointee(config));
        let barrier = Arc::new(ChangeBarrier::default());
        let context = AdminContext { central: central.clone(), keyring: keyring.clone(), barrier };
        let before_first = grants(context.clone());
        let look_again = looking(central.clone(), directory.clone());
        let threads = workers.all().to_vec();
        let metrics = Arc::<Metrics>::default();
        let mend = mending(context.clone(), metrics.clone());
        let pools =
            TenantPools::new(threads.clone(), config.clone(), dial.clone(), before_first, look_again, mend);
        // Nothing is opened before the first look at the leases.
        pools.lease_requests.set_of_new_hosts(HostLease::NOTHING_YET);
        let (requests, received) = mpsc::channel(REQUESTS_MAX);
        let window = Arc::new(StatsWindow::default());
        let fleet = Arc::new(Fleet::new(central.clone(), registration.clone(), pools.clone()));
        let console_context =
            ConsoleContext { admin: context.clone(), window: window.clone(), requests, fleet: fleet.clone() };
        let proxy = Arc::new(Proxy {
            config,
            tls,
            directory: directory.clone(),
            pools,
            sessions: Arc::new(Sessions::after(&registration.identity.process, inherited.process_numbers)),
            successor: Mutex::default(),
            workers: threads.clone(),
            console: console::entry(console_context.clone()),
            foreign_cancel: cluster_cancel::messenger(
                central.clone(),
                fleet.peers.clone(),
                dial.clone(),
                cancels_max,
            ),
            connection_limits: Arc::default(),
            login_turns: Arc::default(),
            failed_logins: FailedLogins::default(),
            password_pace: PasswordPace::default(),
            metrics,
        });
        console::serve_other_nodes(proxy.clone(), console_context);
        match &beginning {
            Beginning::Central => fleet.join().await,
            Beginning::Snapshot(about) => fleet.begin_without_central(about),
        }
        let mut tasks = spawn_tasks(context.clone(), &proxy, directory.clone(), fleet, window);
        if let Beginning::Snapshot(_) = beginning {
            tasks.push(tokio::spawn(beginning::make_up(central.clone(), directory.clone())));
        }
        let http = http.map(|listener| serve_http(listener, &proxy, directory, context, &mut tasks));
        let http = http.transpose().map_err(refused)?;
        let accepting = listeners.serve(&proxy).map_err(refused)?;
        for address in listeners.addresses() {
            info!(%address, "accepting clients");
        }
        Ok(Self {
            proxy,
            keyring,
            dial,
            central,
            registration,
            listeners,
            http,
            requests: tokio::sync::Mutex::new(received),
            accepting: Some(accepting),
            tasks,
            _workers: workers,
        })
    }

    /// Addresses for TCP clients.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.addresses()
    }

    /// Address of HTTP, if it is served.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|http| http.listener.local_addr().ok())
    }

    /// Second descriptors of all listening sockets, for a process that takes over.
    pub fn listening_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let mut sockets = self.listeners.duplicates()?;
        if let Some(http) = &self.http {
            sockets.push(duplicate(&http.listener)?);
        }
        Ok(sockets)
    }

    /// The process that the sockets were taken from has stopped accepting.
    pub fn own_socket_files(&mut self) {
        self.listeners.own_files();
    }

    /// The next request of an administrator to the owner of the process. Cancel-safe.
    pub async fn requested(&self) -> Request {
        match self.requests.lock().await.recv().await {
            Some(request) => request,
            // The console lives as long as the proxy does.
            None => std::future::pending().await,
        }
    }

    /// Applies a new configuration: limits, timeouts, TLS files, keys. After an error the old one stays in
    /// force. Addresses, workers and the central database do not change.
    pub async fn reload(&self, config: Config) -> Result<(), NodeError> {
        let keyring = ReloadableKeyring::load(&config).map_err(refused)?;
        let tls = client_tls(&config)?;
        let dial = DialOptions::new(&config).map_err(refused)?;
        self.proxy.tls.store(tls.map(Arc::new));
        self.keyring.replace(keyring);
        self.dial.store(Arc::new(dial));
        self.proxy.pools.accounts.limit(&config.limits);
        self.proxy.config.store(Arc::new(config));
        self.proxy.sessions.limits_changed.notify_one();
        self.proxy.pools.timeouts_changed();
        self.proxy.apply(DirectoryChange::Everything).await;
        info!("configuration reloaded");
        Ok(())
    }

    /// Other nodes may have this node's servers only when they have ended.
    async fn servers_closed(&self) {
        let begun = Instant::now();
        let has_servers = || self.proxy.pools.budgets().iter().any(|(_, budget)| budget.live() > 0);
        while has_servers() && begun.elapsed() < SERVERS_CLOSED_WITHIN {
            tokio::time::sleep(SERVERS_LOOK_EVERY).await;
        }
    }

    fn stop_tasks(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }

    /// Stops accepting clients and ends every session; at once when `impatience` resolves.
    pub async fn end(mut self, ending: Ending, impatience: impl Future<Output = ()>) {
        self.accepting = None;
        if let Ending::Replaced { .. } = ending {
            self.listeners.leave_to_successor();
            if let Some(http) = self.http.take() {
                http.accepting.abort();
            }
        } else {
            self.listeners.close();
        }
        let mut impatience = pin!(impatience);
        let has_time = end_sessions(&self.proxy, ending, &mut impatience).await;
        // The other process learns that no session follows.
        drop(locked(&self.proxy.successor).take());
        self.servers_closed().await;
        self.stop_tasks();
        self.registration.remove(&self.central).await;
        if has_time {
            tokio::select! {
                () = forward_sessions(&self.proxy) => {}
                () = impatience => {}
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop_tasks();
    }
}

fn serve_http(
    listener: TcpListener,
    proxy: &Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    context: AdminContext,
    tasks: &mut Vec<JoinHandle<()>>,
) -> io::Result<HttpServing> {
    let task = tokio::spawn(http::serve(listener.try_clone()?, proxy.clone(), directory, context));
    let accepting = task.abort_handle();
    tasks.push(task);
    Ok(HttpServing { listener, accepting })
}

/// What runs beside the sessions for as long as the node does.
fn spawn_tasks(
    context: AdminContext,
    proxy: &Arc<Proxy>,
    directory: Arc<CentralDirectory>,
    fleet: Arc<Fleet>,
    window: Arc<StatsWindow>,
) -> Vec<JoinHandle<()>> {
    let AdminContext { central, barrier, .. } = context.clone();
    let told = Arc::<Notify>::default();
    let follower = Follower::new(&central, proxy, &directory, barrier, &fleet, told.clone());
    vec![
        tokio::spawn(follow_changes::follow(central.clone(), follower)),
        tokio::spawn(nodes::warn_of_differences(central.clone(), fleet.clone())),
        tokio::spawn(membership::keep(central, fleet.clone(), proxy.pools.clone(), told)),
        tokio::spawn(maintain(proxy.clone(), window)),
        tokio::spawn(timeouts::watch(proxy.sessions.clone(), proxy.config.clone(), proxy.workers.clone())),
        tokio::spawn(abandoned::watch(context.clone(), proxy.metrics.clone())),
        tokio::spawn(host_budget::warn_at_start(context.actor("pglobby"))),
        tokio::spawn({
            let (directory, node) = (directory.clone(), fleet.name().to_owned());
            async move { directory.keep_snapshot(&node).await }
        }),
    ]
}

fn client_tls(config: &Config) -> Result<Option<ClientTlsAcceptor>, NodeError> {
    let tls = &config.client_tls;
    let files = tls.cert_file.as_ref().zip(tls.key_file.as_ref());
    let Some((certificate, key)) = files.filter(|_| tls.mode != TlsMode::Disable) else { return Ok(None) };
    let client_authorities = tls.ca_file.as_deref().filter(|_| tls.mode.verifies());
    ClientTlsAcceptor::load(CertificateFiles { certificate, key, client_authorities })
        .map(Some)
        .map_err(refused)
}

/// Grants access to an adopted tenant's tables before its first pool is made.
fn grants(context: AdminContext) -> BeforeFirstPool {
    Arc::new(move |tenant| {
        let actor = context.actor("pglobby");
        Box::pin(async move { complete_grants(&actor, tenant.id).await.map_err(|error| causes(&error)) })
    })
}

/// Reads a tenant's row again. `FOR SHARE` waits for a change of the row that is not yet committed.
fn looking(central: Central, directory: Arc<CentralDirectory>) -> TenantLookup {
    Arc::new(move |id| {
        let (central, directory) = (central.clone(), directory.clone());
        Box::pin(async move {
            let changed = async {
                let client = central.client().await?;
                let sql = "SELECT generation FROM pglobby.tenants WHERE id = $1 FOR SHARE";
                client.query_opt(sql, &[&id]).await.map_err(CentralError::from)
            };
            if let Err(error) = changed.await {
                warn!(tenant = id, side = "central", %error, "cannot look up a tenant whose credentials a host refused");
                return None;
            }
            directory.forget(&DirectoryChange::Tenant(id));
            directory.tenant_by_id(id).await.ok().flatten()
        })
    })
}

async fn maintain(proxy: Arc<Proxy>, window: Arc<StatsWindow>) {
    let mut interval = rhythm::every(HOUSEKEEPING);
    loop {
        interval.tick().await;
        if let Some(worker) = proxy.workers.first() {
            worker.clock.tick();
        }
        proxy.pools.maintain().await;
        proxy.pools.balance_workers();
        window.keep(&proxy.pools);
    }
}
