//! Maintains a pool from time to time: closes servers that are idle too long, too old or of an earlier primary,
//! checks those that have not answered for long, opens servers up to `min_pool_size`.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tracing::{debug, warn};

use super::{Pool, PooledServer};
use crate::data_path::{
    server::connection::Server,
    session_state::parameters::{IDLE_SESSION_TIMEOUT, duration},
    worker::whole_ms,
};

/// Idle servers are looked at once a second, or later where much is to be done. An `idle_session_timeout`
/// that is longer than this is switched off by then, so a server that is soon lent again keeps it.
const IDLE_LIMIT_MIN: Duration = Duration::from_secs(10);

/// Whether an idle server's `idle_session_timeout` must be switched off now.
fn is_due(limit: Duration, now: Duration, answered_at: Duration) -> bool {
    limit < IDLE_LIMIT_MIN || now.saturating_sub(answered_at) >= limit / 2
}

#[cold]
fn own_idle_limit(server: &Server, of_start: Option<Duration>) -> Option<Duration> {
    let own = server.side.applied.get(IDLE_SESSION_TIMEOUT);
    own.or_else(|| server.startup.get(IDLE_SESSION_TIMEOUT)).map_or(of_start, duration)
}

impl Pool {
    /// Runs on the pool's worker. Does not yield: a session of this worker never finds the pool empty
    /// meanwhile. A server that is being checked is missing until it answers. Returns when one of the idle
    /// servers is due, if none is lent until then.
    pub(super) fn maintain(self: &Arc<Self>) -> Duration {
        let now = self.clock.now();
        self.check_functions(now);
        self.reclaim_unread();
        let mut spare = self.live().saturating_sub(self.rules.min_size);
        let mut next = Duration::MAX;
        // The one that was used last is put back last, to be lent first.
        for mut server in self.queue.take_all_idle() {
            let unused = now.saturating_sub(server.idle_since) >= self.rules.server_idle && spare > 0;
            let aged = now.saturating_sub(server.opened_at) >= self.rules.server_lifetime;
            let is_old = aged || !self.is_at_primary(&server);
            if unused || is_old || !server.is_quiet(&self.tenant.name) {
                spare = spare.saturating_sub(1);
                drop(server);
            } else if self.idle_limit(&server).is_some_and(|limit| is_due(limit, now, server.answered_at)) {
                self.put_without_idle_limit(server);
            } else if now.saturating_sub(server.answered_at) >= self.rules.server_check {
                let pool = self.clone();
                self.spawn(async move { pool.check(server).await });
            } else {
                next = next.min(self.due_at(&server));
                self.put(server);
            }
        }
        self.open_wanted();
        while self.live() < self.rules.min_size && self.open_one_more() {}
        next
    }

    /// When an idle server is closed or checked.
    fn due_at(&self, server: &PooledServer) -> Duration {
        let unused = server.idle_since.saturating_add(self.rules.server_idle);
        let aged = server.opened_at.saturating_add(self.rules.server_lifetime);
        unused.min(aged).min(server.answered_at.saturating_add(self.rules.server_check))
    }

    /// Whether its idle servers may end by their own `idle_session_timeout`.
    pub(super) fn may_have_idle_limits(&self) -> bool {
        let of_start = self.start().and_then(|start| start.idle_session_timeout);
        of_start.is_some() || self.has_idle_limits.load(Ordering::Relaxed)
    }

    /// Puts an idle server back if it answers. So a connection that the network has dropped silently (after a
    /// failover, by a firewall) is found before a client gets it.
    async fn check(&self, mut server: Box<PooledServer>) {
        let answer = tokio::time::timeout(self.connector.options.connect_timeout, server.run("")).await;
        match answer.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into())) {
            Ok(_) => {
                server.answered_at = self.clock.now();
                self.put(server);
            }
            Err(error) => {
                let (tenant, host, server_pid) =
                    (&self.tenant.name, &self.tenant.host.name, server.process_id);
                warn!(tenant, host, server_pid, side = "server", %error, "idle server lost");
            }
        }
    }

    /// Makes a server idle, or hands it to a waiter. `idle_session_timeout` is for sessions: it must not end a
    /// server that no session has.
    #[inline]
    pub(super) fn put_to_rest(self: &Arc<Self>, server: Box<PooledServer>) {
        match self.idle_limit(&server) {
            Some(limit) if is_due(limit, Duration::ZERO, Duration::ZERO) => {
                self.put_without_idle_limit(server);
            }
            _ => self.put(server),
        }
    }

    /// A session has an `idle_session_timeout`: from now on, the servers that come back are asked for theirs.
    pub fn note_idle_limit(&self) {
        self.has_idle_limits.store(true, Ordering::Relaxed);
    }

    /// The server's `idle_session_timeout`.
    #[inline]
    fn idle_limit(&self, server: &Server) -> Option<Duration> {
        let of_start = self.start().and_then(|start| start.idle_session_timeout);
        if self.may_have_idle_limits() { own_idle_limit(server, of_start) } else { None }
    }

    /// Switches it off, in a task of its own. Its next session sets its own value, as any other setting.
    #[cold]
    fn put_without_idle_limit(self: &Arc<Self>, mut server: Box<PooledServer>) {
        let pool = self.clone();
        self.spawn(async move {
            match server.run("SET idle_session_timeout = 0").await {
                Ok(_) => {
                    let applied = Arc::make_mut(&mut server.side.applied);
                    applied.set(IDLE_SESSION_TIMEOUT, Some("0"));
                    server.answered_at = pool.clock.now();
                    pool.put(server);
                }
                Err(error) => {
                    let (tenant, server_pid) = (&pool.tenant.name, server.process_id);
                    debug!(tenant, server_pid, %error, "server lost while its idle_session_timeout is set");
                }
            }
        });
    }

    /// Has the database's functions checked for changes, if the pool was used since the last check.
    fn check_functions(&self, now: Duration) {
        let now_ms = whole_ms(now);
        let checked_ms = self.functions_checked_ms.load(Ordering::Relaxed);
        let due = Duration::from_millis(now_ms.saturating_sub(checked_ms)) >= self.rules.functions_check;
        if due && self.last_used() >= checked_ms {
            self.functions_checked_ms.store(now_ms, Ordering::Relaxed);
            self.functions.request_check(self.rules.functions_check);
        }
    }
}
