//! Server connections of one (tenant, access): lent to sessions, given back, kept, closed.
//!
//! A deadpool `unmanaged` pool holds the idle ones; who waits stands in `wait_queue.rs`. Filling it is the business of
//! `connector.rs`, within the host's `host_budget.rs`. A pool lives on its tenant's worker: every server in it is registered
//! with that worker's reactor.

mod connect_backoff;
mod connect_turns;
mod connector;
pub mod host_budget;
mod host_connecting;
mod listener_connection;
pub mod pause;
pub mod pinned_sessions;
pub mod role_settings;
pub mod server_list;
pub mod shared_listener;
pub mod startup_parameters;
mod startup_values;
pub mod stats;
mod tenant_pools;
mod wait_queue;

use std::{
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use deadpool::unmanaged::{self, Object};

pub use self::pinned_sessions::Pinned;
pub use self::tenant_pools::{Done, Looking, Mending, PoolMaking, TenantPools};
use self::{
    connect_backoff::ConnectBackoff,
    host_budget::Budget,
    host_connecting::HostConnects,
    role_settings::SessionStart,
    server_list::Roster,
    shared_listener::EarPlace,
    startup_parameters::Greetings,
    stats::PoolStats,
    wait_queue::{InLine, Line},
};
use crate::{
    config::Config,
    data_path::{
        functions::Catalogue,
        memory_limit::Account,
        prepared::{Capacity, shared_statements::StatementTable},
        server::{DialOptions, connection::Server},
        sessions::registry::Place,
        tenant::{Access, Credential, PoolMode, Tenant},
        worker::Worker,
    },
    error::{ClientError, Limit},
};

/// What a pool is made with; a change of these makes a new pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRules {
    /// How long a session keeps a server.
    pub mode: PoolMode,
    /// Servers at most.
    pub size: usize,
    /// Servers kept open.
    pub min_size: usize,
    /// Servers that sessions may keep between transactions while others wait.
    pub pinned_max: usize,
    /// Statements a server keeps prepared.
    pub prepared_max: Capacity,
    /// Servers being opened at a time on its host.
    pub connecting_max: usize,
    /// The longest pause between two attempts to open a server that fail.
    pub server_login_retry: Duration,
    /// Function text that is read at most.
    pub functions_bytes_max: usize,
    /// How long functions may be changed past us.
    pub functions_check: Duration,
    /// Cancel requests under way at a time.
    pub cancels_max: usize,
    /// Channels a session may LISTEN to and still share servers.
    pub channels_max: usize,
    /// Bytes of notifications that may wait for one client.
    pub notifications_bytes_max: usize,
    /// An idle server is closed after this.
    pub server_idle: Duration,
    /// A server idle for so long is asked whether it is still there.
    pub server_check: Duration,
    /// A server is closed when idle after this.
    pub server_lifetime: Duration,
}

/// In a pool of fewer servers than this every one may be kept by a session.
const SMALL_POOL: usize = 5;

impl PoolRules {
    /// What the tenant's row says, else the configuration.
    pub fn of(tenant: &Tenant, config: &Config) -> Self {
        let size = tenant.pool_size.unwrap_or(config.pool.default_pool_size).max(1) as usize;
        Self {
            mode: tenant.pool_mode.unwrap_or(config.pool.pool_mode),
            size,
            min_size: (tenant.min_pool_size.unwrap_or(config.pool.min_pool_size) as usize).min(size),
            pinned_max: match config.pool.max_pinned_servers {
                // A small pool's users wait for each other as they always did.
                0 if size < SMALL_POOL => size,
                0 => size - 1,
                given => given,
            },
            prepared_max: Capacity {
                statements: config.pool.max_prepared_statements,
                bytes: config.pool.max_prepared_bytes,
            },
            connecting_max: config.limits.connecting_servers_max.max(1),
            server_login_retry: config.timeouts.server_login_retry,
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

/// One pool.
#[derive(Debug)]
pub struct Pool {
    /// Whose.
    pub tenant: Arc<Tenant>,
    /// With what rights its servers were opened.
    pub access: Access,
    /// Where its sessions are.
    pub place: Arc<Place>,
    /// What it was made with.
    pub rules: PoolRules,
    /// Where it lives.
    pub worker: Arc<Worker>,
    /// What its database's functions leave behind.
    pub catalogue: Arc<Catalogue>,
    /// What is kept for its tenant.
    pub memory: Arc<Account>,
    /// Statements its clients have prepared.
    pub statements: Arc<StatementTable>,
    /// What it has done.
    pub stats: Arc<PoolStats>,
    /// Its servers, for operators.
    pub roster: Arc<Roster>,
    /// What its servers were logged in with.
    credential: Credential,
    greetings: Greetings,
    /// What its servers began with, once one was opened.
    start: OnceLock<Arc<SessionStart>>,
    /// Held by whoever replaces it because that has changed.
    beginning_anew: tokio::sync::Mutex<()>,
    /// Listens for clients that LISTEN.
    ear: Arc<EarPlace>,
    servers: unmanaged::Pool<Box<Server>>,
    budget: Arc<Budget>,
    dial: Arc<DialOptions>,
    /// Servers open or being opened. Counted up where a permit is got, down by the permit's drop.
    live: AtomicUsize,
    opening: AtomicUsize,
    /// What failures of its tenant's own have led to.
    backoff: Mutex<ConnectBackoff>,
    /// Servers being opened on its host, by all of the host's pools.
    connects: Arc<HostConnects>,
    /// It waits for its turn there.
    awaits_turn: AtomicBool,
    line: Line<Box<Server>>,
    cancelling: AtomicUsize,
    kept: self::pinned_sessions::Kept,
    last_used_ms: AtomicU64,
    /// When it was last to be looked whether functions were changed past us, on the same clock.
    functions_checked_ms: AtomicU64,
    /// Lends nothing for now; see `pause.rs`.
    paused: AtomicBool,
    retired: AtomicBool,
    /// All pools, this one among them.
    keeper: Weak<TenantPools>,
    /// Who serves this tenant instead, once retired.
    successor: OnceLock<Arc<Pool>>,
}

/// A session of a pool, counted as long as this lives.
#[derive(Debug)]
pub struct Present(Arc<PoolStats>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::AcqRel);
        self.0.sessions_of_tenant.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts something for as long as it lives.
#[derive(Debug)]
pub struct Counted<F: Fn(&Pool) -> &AtomicUsize>(Arc<Pool>, F);

impl<F: Fn(&Pool) -> &AtomicUsize> Counted<F> {
    fn new(pool: &Arc<Pool>, counter: F) -> Self {
        counter(pool).fetch_add(1, Ordering::AcqRel);
        Self(pool.clone(), counter)
    }
}

impl<F: Fn(&Pool) -> &AtomicUsize> Drop for Counted<F> {
    fn drop(&mut self) {
        self.1(&self.0).fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    /// A server that is idle now, if there is one and nobody waits for it. It is out of the pool then: dropping it closes
    /// it, and only [`Pool::give_back`] returns it.
    #[inline]
    pub fn try_borrow(&self) -> Option<Box<Server>> {
        while !self.is_paused()
            && let Ok(object) = self.servers.try_get()
        {
            if let Some(server) = self.vet(Object::take(object)) {
                return Some(server);
            }
        }
        None
    }

    /// The server that has been idle for longest, as [`Pool::try_borrow`] lends the one that was last given back.
    pub(super) fn take_longest_idle(&self) -> Option<Box<Server>> {
        let mut idle: Vec<Box<Server>> = std::iter::from_fn(|| self.try_borrow()).collect();
        let longest = idle.pop();
        for server in idle.into_iter().rev() {
            self.offer(server);
        }
        longest
    }

    /// Returns a clean server. One that is not reusable, has lived its time or is wished for by another pool is closed.
    #[inline]
    pub fn give_back(&self, mut server: Box<Server>) {
        server.entry.came_back(server.side.statements.len());
        if server.side.news {
            self.hear(&mut server);
        }
        let now = self.worker.clock.now();
        let age = now.saturating_sub(server.opened_at);
        let wished = self.budget.has_wishes() && self.waiting() == 0 && age >= self::host_budget::HOLD;
        if wished || self.is_paused() || age >= self.rules.server_lifetime || !server.is_reusable() {
            return;
        }
        server.idle_since = now;
        server.heard_at = now;
        self.last_used_ms.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.offer(server);
    }

    /// A server, opened if need be; waits in line for at most `wait` from `since` on.
    ///
    /// # Errors
    /// [`ClientError::PoolBusy`] when the wait was in vain, [`ClientError::ServerUnreachable`] when none could be opened,
    /// [`ClientError::AdminShutdown`] when the pool was retired meanwhile.
    pub async fn borrow(
        self: &Arc<Self>,
        since: Instant,
        wait: Duration,
    ) -> Result<Box<Server>, ClientError> {
        InLine::new(self, since, wait).await
    }

    /// Lets an idle server pass that is this pool's own and has nothing to say; any other is closed.
    #[inline]
    fn vet(&self, mut server: Box<Server>) -> Option<Box<Server>> {
        let ours = server.owner == (self.tenant.id, self.access);
        let changes = self.greetings.changes();
        if server.changes_seen != changes {
            (server.changes_seen, server.side.is_stale) = (changes, true);
        }
        if !ours || !server.is_reusable() || !server.is_quiet(&self.tenant.name) {
            return None;
        }
        if server.side.news {
            self.hear(&mut server);
        }
        Some(server)
    }

    /// Takes an idle server out for good, for the budget of another pool.
    pub fn take_idle(&self) -> Option<Box<Server>> {
        self.servers.try_remove().ok()
    }

    /// How its servers are reached.
    pub fn dial_options(&self) -> &DialOptions {
        &self.dial
    }

    /// Servers open or being opened.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Acquire)
    }

    /// Servers idle now.
    pub fn idle(&self) -> usize {
        self.servers.status().available
    }

    /// Servers being opened.
    pub fn opening(&self) -> usize {
        self.opening.load(Ordering::Acquire)
    }

    /// Sessions that wait for a server.
    pub fn waiting(&self) -> usize {
        self.line.waiting()
    }

    /// Cancel requests on their way to its servers.
    pub fn cancelling(&self) -> usize {
        self.cancelling.load(Ordering::Acquire)
    }

    /// Counts a cancel request for as long as the result lives.
    pub fn cancel_under_way(self: &Arc<Self>) -> Counted<impl Fn(&Pool) -> &AtomicUsize + use<>> {
        Counted::new(self, |pool: &Pool| &pool.cancelling)
    }

    /// Sessions of this pool, and of those it replaced.
    pub fn sessions(&self) -> usize {
        self.stats.sessions.load(Ordering::Acquire)
    }

    /// Counts a session for as long as the result lives, also when this pool is replaced meanwhile; `None` if the tenant
    /// has `limit` already (0: no limit).
    pub fn enter(&self, limit: usize) -> Option<Present> {
        let of_tenant = &self.stats.sessions_of_tenant;
        let counted = of_tenant.fetch_update(Ordering::AcqRel, Ordering::Acquire, |sessions| {
            (limit == 0 || sessions < limit).then_some(sessions + 1)
        });
        counted.ok()?;
        self.stats.sessions.fetch_add(1, Ordering::AcqRel);
        Some(Present(self.stats.clone()))
    }

    /// The account of a session, for which so much may be kept.
    pub fn account(&self, bytes_max: usize) -> Arc<Account> {
        Account::new(Limit::Client, bytes_max, &[&self.memory])
    }

    /// When a server was last given back, on the worker's coarse clock (milliseconds).
    pub fn last_used(&self) -> u64 {
        self.last_used_ms.load(Ordering::Relaxed)
    }

    /// The pool to use from now on: this one, or what replaced it; `None` if the tenant is closed.
    pub fn current(self: &Arc<Self>) -> Option<Arc<Self>> {
        let mut pool = self;
        while pool.retired.load(Ordering::Acquire) {
            pool = pool.successor.get()?;
        }
        Some(pool.clone())
    }

    /// Whether it lends nothing for now.
    #[inline]
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Whether it lends nothing any more.
    #[inline]
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Lends nothing any more: idle servers are closed now, lent ones when they come back.
    pub fn retire(&self, successor: Option<Arc<Self>>) {
        // Without one, whoever listens is ended with a reason by whoever closes the tenant; the ear ends with them.
        if let Some(successor) = successor {
            self.ear.replaced_by(&successor);
            let _ = self.successor.set(successor);
        }
        self.retired.store(true, Ordering::Release);
        self.servers.close();
        self.line.close();
    }
}
