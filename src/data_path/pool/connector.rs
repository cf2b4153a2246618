//! Connects a pool to its servers: counts them, dials, remembers failures.
//!
//! When an attempt may begin is decided in `host_connecting.rs` for all pools of a host, and after failures
//! of the tenant's own (database dropped, role locked out, CONNECTION LIMIT) in `connect_backoff.rs`.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    Pool,
    connect_backoff::{Attempt, ConnectBackoff, FailedAttempt},
    host_budget::HostBudget,
    host_connecting::{HostConnecting, Turn},
    stats::PoolStats,
};
use crate::{
    data_path::{
        lock::locked,
        server::{self, DialError, DialOptions, DialTarget, NewConnection, OnAnswer},
        session_state::Settings,
        tenant::{Credential, Tenant},
    },
    error::ClientError,
};

/// Between attempts on a host that is full. PostgreSQL counts a connection until its process has ended.
const HOST_FULL_PAUSES: [Duration; 4] = [
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
];

/// The counts are sequentially consistent, as that of waiting sessions (`wait_queue.rs`).
#[derive(Debug)]
pub(super) struct Connector {
    pub tenant: Arc<Tenant>,
    pub credential: Credential,
    pub options: Arc<DialOptions>,
    pub budget: Arc<HostBudget>,
    pub host: Arc<HostConnecting>,
    pub stats: Arc<PoolStats>,
    /// Servers open or being opened: permits that count in the pool's size.
    pub live: AtomicUsize,
    pub opening: AtomicUsize,
    /// Failures of the tenant's own.
    pub backoff: Mutex<ConnectBackoff>,
    /// The pool waits for a turn on the host.
    pub awaits_turn: AtomicBool,
    /// `hold_during_outage`.
    pub holds: bool,
    /// The last server was lost while it was opened, behind the authentication.
    pub lost_at_start: AtomicBool,
}

impl Connector {
    /// Servers open or being opened.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    /// Counts one more server, if fewer than `size` are open or being opened.
    pub fn take_place(&self, size: usize) -> bool {
        let more = |live| (live < size).then_some(live + 1);
        self.live.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    pub fn opening(&self) -> usize {
        self.opening.load(Ordering::SeqCst)
    }

    /// Notes whether the pool waits for a turn on the host; returns what was noted before.
    pub fn set_awaits_turn(&self, awaits: bool) -> bool {
        self.awaits_turn.swap(awaits, Ordering::AcqRel)
    }

    /// Whether another server may be opened now as far as the tenant's own failures say.
    pub fn may_open(&self) -> bool {
        self.opening() < locked(&self.backoff).at_a_time(Instant::now())
    }

    /// Whether the host is full (`error`) of servers of the proxy, of which one may come free.
    pub fn is_full_of_ours(&self, error: &DialError) -> bool {
        error.is_host_full() && self.budget.live() > 1
    }

    /// Waits until the pause after a failure of the tenant's own is over.
    pub async fn pause(&self) {
        let pause = locked(&self.backoff).pause(Instant::now());
        tokio::time::sleep(pause).await;
    }

    /// Whether the last attempt of the tenant's, or of its host's, failed.
    pub fn is_failing(&self) -> bool {
        // One lock after the other: `host_connecting.rs` holds the host's while it takes this one.
        let own = locked(&self.backoff).is_failing();
        own || self.host.backoff(ConnectBackoff::is_failing)
    }

    /// Why the last attempt after `since` failed, if none has succeeded after it.
    pub fn reason_since(&self, since: Instant) -> Option<ClientError> {
        let own = locked(&self.backoff).reason_since(since);
        own.or_else(|| self.host.backoff(|host| host.reason_since(since)))
    }

    /// The error for all waiting sessions where the next attempt is too far away to wait for it.
    pub fn error_at_once(&self, now: Instant) -> Option<ClientError> {
        let own = locked(&self.backoff).error_at_once(now);
        own.or_else(|| self.host.backoff(|host| host.error_at_once(now)))
    }

    /// The error for sessions that have waited for [`ERROR_WITHIN`](super::connect_backoff::ERROR_WITHIN) on
    /// a host that fails and has not answered since, while no server is open.
    pub fn silent(&self, now: Instant) -> Option<ClientError> {
        if self.live() <= self.opening() { self.host.silent(now) } else { None }
    }

    /// Whether sessions wait for a host that is away.
    pub fn is_holding(&self) -> bool {
        let own = locked(&self.backoff).holds();
        own || self.host.is_holding()
    }

    pub fn begin(&self) -> Attempt {
        locked(&self.backoff).begin()
    }

    /// An attempt led to a server.
    pub fn succeeded(&self, turn: Turn) {
        turn.succeeded();
        self.stats.servers_opened.fetch_add(1, Ordering::Relaxed);
        let mut backoff = locked(&self.backoff);
        if backoff.is_failing() {
            info!(tenant = self.tenant.name, host = self.tenant.host.name, "servers can be opened again");
        }
        backoff.succeeded();
    }

    /// An attempt failed: logs and counts it, and begins a pause, for the host where the host failed, else
    /// for this tenant. Returns what sessions that wait are told.
    pub fn failed(&self, turn: Turn, attempt: Attempt, error: &DialError) -> FailedAttempt {
        let of_host = error.is_of_host(turn.is_answered()) && !self.is_full_of_ours(error);
        let holds = match error.is_outage() {
            true if of_host => self.holds,
            true => self.holds_after_loss(),
            false => false,
        };
        let failed = FailedAttempt { reason: error.client_error(), holds };
        let is_news = if of_host {
            turn.failed(&failed)
        } else {
            turn.succeeded();
            self.failed_for_tenant(attempt, &failed)
        };
        self.count_failure(error, is_news);
        failed
    }

    /// A server was lost behind its authentication: the host goes down, or something of the tenant's makes its
    /// sessions end. Returns whether sessions go on waiting: the next attempt tells which of the two it is.
    pub fn holds_after_loss(&self) -> bool {
        !self.lost_at_start.swap(true, Ordering::Relaxed) && self.holds
    }

    /// An attempt failed for a reason that concerns no other tenant. Returns whether to log a warning.
    pub fn failed_for_tenant(&self, attempt: Attempt, failed: &FailedAttempt) -> bool {
        locked(&self.backoff).failed(attempt, failed, Instant::now(), rand::random())
    }

    /// Counts a failed attempt, and logs it: as a warning if it `is_news`.
    pub fn count_failure(&self, error: &DialError, is_news: bool) {
        self.stats.connect_failures.fetch_add(1, Ordering::Relaxed);
        let (tenant, host) = (&self.tenant.name, &self.tenant.host.name);
        if is_news {
            warn!(tenant, host, side = "server", %error, "cannot open a server");
        } else {
            debug!(tenant, host, side = "server", %error, "cannot open a server");
        }
    }

    /// As [`Self::connect`]. Where the host is full, closes idle servers of other pools, and tries again.
    pub async fn connect_making_room(
        &self,
        pool: &Arc<Pool>,
        turn: &Turn,
        startup: &Settings,
    ) -> Result<NewConnection, DialError> {
        // Without other servers of the proxy there, closing makes no room: after a failure one attempt is
        // enough.
        let alone = self.host.backoff(ConnectBackoff::is_failing) && self.budget.live() <= 1;
        let mut opened = self.connect(turn, startup).await;
        let pauses = if alone { &[] } else { &HOST_FULL_PAUSES[..] };
        for (at, &pause) in pauses.iter().enumerate() {
            let Some(error) = opened.as_ref().err().filter(|error| error.is_host_full()) else { break };
            if at == 0 {
                let (tenant, host) = (&self.tenant.name, &self.tenant.host.name);
                warn!(tenant, host, side = "server", %error, "host is full");
            }
            self.budget.make_room(Some(pool));
            tokio::time::sleep(pause).await;
            opened = self.connect(turn, startup).await;
        }
        opened
    }

    /// Opens a connection that is logged in and verified to be the tenant's.
    pub async fn connect(&self, turn: &Turn, startup: &Settings) -> Result<NewConnection, DialError> {
        let answered = || turn.answered();
        let target = DialTarget {
            host: &self.tenant.host,
            tenant: &self.tenant.name,
            database: &self.tenant.database,
            credential: &self.credential,
            statement_timeout: self.tenant.statement_timeout,
            startup,
            roles: &self.host.roles,
            on_answer: OnAnswer(&answered),
        };
        server::open(&target, &self.options).await
    }
}

/// Counts a server that is being opened. When it is dropped the pool looks whether it wants another one: a
/// session that began to wait meanwhile has counted on this one.
pub(super) struct Opening(Arc<Pool>);

impl Opening {
    pub fn of(pool: &Arc<Pool>) -> Self {
        pool.connector.opening.fetch_add(1, Ordering::SeqCst);
        pool.must_be_visited();
        Self(pool.clone())
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.connector.opening.fetch_sub(1, Ordering::SeqCst);
        if self.0.waiting() > 0 {
            self.0.open_wanted_soon();
        }
    }
}
