//! Pools of server connections, one per (tenant, access): servers are lent to sessions, given back, kept
//! idle, closed.
//!
//! Idle servers and waiting sessions are one state: `wait_queue.rs`. `opening.rs` opens servers, within the host's
//! `host_budget.rs`. `placement.rs` says on which worker a pool's sessions are; a server belongs to the reactor
//! of the worker that it was last lent on.

mod balance;
mod connect_backoff;
mod connect_turns;
mod connector;
pub mod custom_parameters;
mod fair_share;
mod hidden_catalogs;
pub mod host_budget;
pub mod host_connecting;
pub mod host_lease;
mod idle_servers;
pub mod lease_requests;
mod listener_connection;
mod opening;
pub mod pause;
pub mod pinned_sessions;
pub mod placement;
mod pooled_server;
pub mod role_settings;
mod rounds;
pub mod server_list;
pub mod shared_listener;
pub mod startup_parameters;
mod startup_values;
pub mod stats;
mod succession;
mod temp_buffers;
mod tenant_pools;
mod wait_queue;
mod worker_loads;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

pub use self::pinned_sessions::Pinned;
pub use self::pooled_server::PooledServer;
pub use self::stats::SessionCount;
pub use self::tenant_pools::{BeforeFirstPool, RoleRepair, TenantLookup, TenantPools};
use self::{
    connector::Connector,
    custom_parameters::CustomParameters,
    fair_share::Claim,
    hidden_catalogs::KnownCatalogs,
    pinned_sessions::PinnedSessions,
    placement::Placement,
    role_settings::RoleStart,
    rounds::Place,
    server_list::ServerList,
    shared_listener::ListenerSlot,
    startup_parameters::StatusCache,
    stats::PoolStats,
    succession::Succession,
    wait_queue::{ServerWait, WaitQueue},
};
use crate::{
    config::{Config, PoolMode},
    data_path::{
        functions::FunctionEffects,
        memory_limit::Account,
        prepared::{PreparedLimits, shared_statements::SharedStatements},
        server::DialOptions,
        tenant::{Access, Tenant, TenantAccess},
        worker::{self, Clock, whole_ms},
    },
    error::{ClientError, Limit},
};

/// Settings of a pool, from the tenant's row and the configuration. A change makes a new pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRules {
    /// For a transaction or a session.
    pub mode: PoolMode,
    /// Most servers.
    pub size: usize,
    /// Servers that stay open when idle.
    pub min_size: usize,
    /// Most servers that sessions may keep between transactions while others wait.
    pub pinned_max: usize,
    /// Most prepared statements of a server.
    pub prepared_max: PreparedLimits,
    /// Most servers being opened at a time on its host.
    pub connecting_max: usize,
    /// The longest pause after a failed attempt to open a server.
    pub server_login_retry: Duration,
    /// Sessions between transactions wait while the host is away.
    pub hold_during_outage: bool,
    /// Most bytes of function text that are read.
    pub functions_bytes_max: usize,
    /// How often functions are checked for changes made by other connections.
    pub functions_check: Duration,
    /// Most cancel requests under way at a time.
    pub cancels_max: usize,
    /// Most channels to which a session may LISTEN and still share servers.
    pub channels_max: usize,
    /// Most bytes of notifications that may wait for one client.
    pub notifications_bytes_max: usize,
    /// An idle server is closed after this.
    pub server_idle: Duration,
    /// A server that is idle for this long is checked.
    pub server_check: Duration,
    /// A server of this age is closed when it is not lent.
    pub server_lifetime: Duration,
}

/// In a pool with fewer servers than this, all may be kept by sessions.
const SMALL_POOL: usize = 5;

impl PoolRules {
    /// The tenant's row overrides the configuration.
    pub fn of(tenant: &Tenant, config: &Config) -> Self {
        let size = tenant.pool_size.unwrap_or(config.pool.default_pool_size).max(1) as usize;
        Self {
            mode: tenant.pool_mode.unwrap_or(config.pool.pool_mode),
            size,
            min_size: (tenant.min_pool_size.unwrap_or(config.pool.min_pool_size) as usize).min(size),
            pinned_max: match config.pool.max_pinned_servers {
                // In a small pool, one server for other sessions would be too large a part of it.
                0 if size < SMALL_POOL => size,
                0 => size - 1,
                given => given,
            },
            prepared_max: PreparedLimits {
                statements: config.pool.max_prepared_statements,
                bytes: config.pool.max_prepared_bytes,
            },
            connecting_max: config.limits.connecting_servers_max.max(1),
            server_login_retry: config.timeouts.server_login_retry,
            hold_during_outage: config.pool.hold_during_outage,
            functions_bytes_max: config.limits.functions_inspect_bytes_max,
            functions_check: config.timeouts.functions_check_delay,
            cancels_max: config.limits.cancels_max,
            channels_max: config.limits.listening_channels_max,
            notifications_bytes_max: config.limits.queued_notifications_bytes_max,
            server_idle: config.timeouts.server_idle,
            server_check: config.timeouts.server_check_delay,
            server_lifetime: config.timeouts.server_lifetime,
        }
    }
}

/// The pool of one (tenant, access).
#[derive(Debug)]
pub struct Pool {
    /// The tenant as its row was when the pool was made.
    pub tenant: Arc<Tenant>,
    /// Which of the tenant's roles its servers are logged in as.
    pub access: Access,
    /// Shared by its sessions in the registry.
    pub tenant_access: Arc<TenantAccess>,
    /// A change of these makes a new pool.
    pub rules: PoolRules,
    /// The tenant's part of the host's budget. It changes without another pool: a new one would close idle servers
    /// while the budget is scarce.
    weight: AtomicU32,
    /// The workers of its sessions. Shared with the pools that replace this one.
    pub placement: Arc<Placement>,
    /// The coarse clock of all workers.
    pub clock: Arc<Clock>,
    /// What functions of the tenant's database do to a session. Shared by the tenant's pools.
    pub functions: Arc<FunctionEffects>,
    /// Memory that is kept for the tenant.
    pub memory: Arc<Account>,
    /// Statements that its clients have prepared.
    pub statements: Arc<SharedStatements>,
    /// Counters; they outlive the pool.
    pub stats: Arc<PoolStats>,
    /// Its servers, for operators.
    pub server_list: Arc<ServerList>,
    /// Idle servers, and the sessions that wait for one.
    queue: WaitQueue<Box<PooledServer>>,
    connector: Connector,
    /// Settings of role and database that its servers began with.
    role_start: RoleStart,
    catalogs: KnownCatalogs,
    custom: CustomParameters,
    /// A server may have used temporary tables.
    used_temporary: AtomicBool,
    /// A session has had an `idle_session_timeout`, and its server may still have it.
    has_idle_limits: AtomicBool,
    status_cache: StatusCache,
    /// Listens for sessions that LISTEN. Shared with the pools that replace this one.
    listener: Arc<ListenerSlot>,
    pinned: Arc<PinnedSessions>,
    /// A permit for each cancel request under way.
    cancels: Arc<Semaphore>,
    /// When a server was last given back, on the worker's coarse clock.
    last_used_ms: AtomicU64,
    /// When the functions were last checked for changes, on the same clock.
    functions_checked_ms: AtomicU64,
    place: Place,
    succession: Succession,
}

impl Pool {
    /// An idle server, if there is one. Dropping it closes it; only [`Pool::give_back`] returns it.
    #[inline]
    pub fn try_borrow(&self) -> Option<Box<PooledServer>> {
        while let Some(server) = self.queue.take_idle(worker::here().unwrap_or_default()) {
            if let Some(server) = self.inspect(server) {
                return Some(server);
            }
        }
        None
    }

    /// The server that is idle for longest, if it is so for `needed`; [`Pool::try_borrow`] lends the one that was
    /// given back last.
    pub(super) fn take_longest_idle(&self, needed: Duration) -> Option<Box<PooledServer>> {
        let now = self.clock.now();
        let mut idle = self.queue.take_all_idle().into_iter().peekable();
        let is_due = |server: &PooledServer| now.saturating_sub(server.idle_since) >= needed;
        let due = std::iter::from_fn(|| idle.next_if(|server| is_due(server)));
        let longest = due.filter_map(|server| self.inspect(server)).next();
        idle.for_each(|server| self.put(server));
        longest
    }

    /// A server, opened if need be; waits for at most `wait` from `since` on. Errors:
    /// [`ClientError::PoolBusy`] after that time, [`ClientError::Moving`] if the tenant moves then, [`ClientError::ServerUnreachable`] when none could be
    /// opened, [`ClientError::AdminShutdown`] when the pool was retired meanwhile.
    pub async fn borrow(
        self: &Arc<Self>,
        since: Instant,
        wait: Duration,
    ) -> Result<Box<PooledServer>, ClientError> {
        let borrowed = ServerWait::new(self, worker::here().unwrap_or_default(), since, wait).await;
        if matches!(borrowed, Err(ClientError::PoolBusy { .. })) {
            let pools = self.all_pools();
            if pools.is_some_and(|pools| pools.pauses.is_moving(self.tenant.id)) {
                return Err(ClientError::Moving { tenant: self.tenant.name.to_string() });
            }
            self.stats.waits_timed_out.fetch_add(1, Ordering::Relaxed);
            if let Some(suppressed) = self.stats.timed_out_waits_log.admit(Instant::now()) {
                tracing::warn!(
                    tenant = self.tenant.name,
                    read_only = self.access == Access::ReadOnly,
                    suppressed,
                    "wait for a server reached query_wait_timeout; the pool is too small"
                );
            }
        }
        borrowed
    }

    /// Returns a server. It is closed if it is not reusable, too old, or if another pool needs its permit.
    #[inline]
    pub fn give_back(self: &Arc<Self>, mut server: Box<PooledServer>) {
        server.listed.returned(server.side.statements.len());
        if server.side.parameters_changed {
            self.note_reported(&mut server);
        }
        let now = self.clock.at_transaction_end();
        if !server.side.custom.ever.is_empty() {
            self.note_custom_parameters(&mut server, now);
        }
        let age = now.saturating_sub(server.opened_at);
        let budget = &self.connector.budget;
        if age >= self.rules.server_lifetime || !server.is_reusable() || !self.is_at_primary(&server) {
            return;
        }
        if budget.is_pressed() && budget.must_give_up(self, age) {
            return self.close(server);
        }
        server.idle_since = now;
        server.answered_at = now;
        self.last_used_ms.store(whole_ms(now), Ordering::Relaxed);
        self.put_to_rest(server);
    }

    /// Closes a server for another pool of the host.
    #[cold]
    fn close(&self, mut server: Box<PooledServer>) {
        server.permit.begin_closing();
        self.spawn(server.close());
    }

    /// Runs a task on the worker that opens its servers.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.placement.home().spawn(task);
    }

    /// Whether a server has had a custom parameter, and whether one has used temporary tables. A server that is
    /// lent after that was read may be the first one.
    #[inline]
    pub fn server_marks(&self) -> (bool, bool) {
        (self.has_custom_parameters(), self.has_used_temporary())
    }

    /// Hands a server to a session that waits, or makes it idle; closes it if the pool is paused or retired.
    #[inline]
    pub(in crate::data_path) fn put(&self, server: Box<PooledServer>) {
        drop(self.queue.put(server.home, server));
    }

    /// The last check before a server is lent. Closes it if it is another pool's, not reusable, or ended; moves
    /// it to the reactor of this worker.
    #[inline]
    pub(super) fn inspect(&self, mut server: Box<PooledServer>) -> Option<Box<PooledServer>> {
        let ours = server.owner == (self.tenant.id, self.access);
        let changes = self.status_cache.changes();
        if server.changes_seen != changes {
            (server.changes_seen, server.side.is_stale) = (changes, true);
        }
        let is_good = ours && server.is_reusable() && self.is_at_primary(&server);
        if !is_good || !server.is_quiet(&self.tenant.name) {
            return None;
        }
        if let Some(here) = worker::here().filter(|here| *here != server.home) {
            self.move_to_worker(&mut server, here)?;
        }
        if server.side.parameters_changed {
            self.note_reported(&mut server);
        }
        Some(server)
    }

    /// Whether no other address of the host has become its primary since this server was opened.
    #[inline]
    pub(super) fn is_at_primary(&self, server: &PooledServer) -> bool {
        server.primary_changes == self.connector.host.roles.changes()
    }

    /// Takes a server from another worker's reactor to this one's, `here`. `None`: it is lost.
    #[cold]
    fn move_to_worker(&self, server: &mut PooledServer, here: usize) -> Option<()> {
        match server.stream.detach().and_then(|()| server.attach_at(here)) {
            Ok(()) => Some(()),
            Err(error) => {
                let (tenant, server_pid) = (&self.tenant.name, server.process_id);
                tracing::warn!(tenant, server_pid, side = "server", %error, "cannot move a server to another worker");
                None
            }
        }
    }

    /// How it asks for its part of the host's budget.
    fn claim(&self) -> Claim {
        Claim {
            pool: std::ptr::from_ref(self).addr(),
            tenant: self.tenant.id,
            access: self.access,
            weight: self.weight.load(Ordering::Relaxed),
            floor: self.rules.min_size,
        }
    }

    /// The tenant's part of the host's budget has changed.
    pub(super) fn set_weight(self: &Arc<Self>, weight: u32) {
        // A pool that waits for a permit asks again, with its new weight.
        if self.weight.swap(weight, Ordering::Relaxed) != weight && self.waiting() > 0 {
            self.open_wanted_soon();
        }
    }

    /// How its servers are reached.
    pub fn dial_options(&self) -> &DialOptions {
        &self.connector.options
    }

    /// Servers open or being opened.
    pub fn live(&self) -> usize {
        self.connector.live()
    }

    pub fn idle(&self) -> usize {
        self.queue.idle()
    }

    pub fn opening(&self) -> usize {
        self.connector.opening()
    }

    /// Sessions that wait for a server.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// Whether it lends no server for now; see `pause.rs`.
    #[inline]
    pub fn is_paused(&self) -> bool {
        self.queue.is_paused()
    }

    /// Cancel requests under way to its servers.
    pub fn cancelling(&self) -> usize {
        self.rules.cancels_max.saturating_sub(self.cancels.available_permits())
    }

    /// Counts a cancel request as long as the result lives; `None`: there are too many.
    pub fn begin_cancel(&self) -> Option<OwnedSemaphorePermit> {
        self.cancels.clone().try_acquire_owned().ok()
    }

    /// Sessions of this pool, and of those it replaced.
    pub fn sessions(&self) -> usize {
        self.stats.sessions.load(Ordering::Acquire)
    }

    /// A memory account for a session, of at most `bytes_max`.
    pub fn account(&self, bytes_max: usize) -> Arc<Account> {
        Account::new(Limit::Client, bytes_max, &[&self.memory])
    }

    /// When a server was last given back, on the worker's coarse clock (milliseconds).
    pub fn last_used(&self) -> u64 {
        self.last_used_ms.load(Ordering::Relaxed)
    }
}
