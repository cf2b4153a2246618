//! Ends the process without breaking running work.
//!
//! Signals as in PgBouncer since 1.23: HUP reloads, TERM drains (a second TERM ends at once), INT waits for
//! servers, QUIT ends at once.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tracing::info;

use crate::{data_path::proxy::Proxy, error::ClientError};

/// How sessions end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Idle sessions at once, others after their transaction, and all of them at the limit.
    Drain {
        /// `shutdown_timeout`; `None`: no limit.
        at_most: Option<Duration>,
    },
    /// Another process accepts clients. Sessions move to it when they are between two transactions; those that
    /// cannot move end as in a drain.
    Replaced {
        /// `shutdown_timeout`.
        at_most: Duration,
    },
    /// All sessions at once.
    Now,
}

/// Interval at which a drain checks whether all sessions have ended.
const CHECK_EVERY: Duration = Duration::from_millis(20);

/// How long sending the last error to clients may take.
const LAST_ERROR: Duration = Duration::from_millis(500);

/// Ends every session. The caller stops accepting clients before, and ends the workers after. When
/// `impatience` resolves, a drain ends the remaining sessions at once with the same error. Returns whether it has not
/// resolved.
pub async fn end_sessions(
    proxy: &Arc<Proxy>,
    ending: Ending,
    impatience: &mut (impl Future<Output = ()> + Unpin),
) -> bool {
    let began = Instant::now();
    let all_left = async {
        match ending {
            Ending::Drain { at_most } => drain(proxy, at_most).await,
            Ending::Replaced { at_most } => move_away(proxy, at_most).await,
            Ending::Now => {}
        }
    };
    let has_time = tokio::select! {
        () = all_left => true,
        () = impatience => {
            info!(sessions = proxy.sessions.len(), "stopping now");
            false
        }
    };
    proxy.connection_limits.close();
    let sessions_cut = proxy.sessions.end(&ClientError::AdminShutdown, |_| true);
    let ended = Instant::now();
    while !proxy.sessions.is_empty() && ended.elapsed() < LAST_ERROR {
        tokio::time::sleep(CHECK_EVERY).await;
    }
    info!(sessions_cut, duration_ms = began.elapsed().as_millis(), "sessions ended");
    for pool in proxy.pools.all() {
        pool.retire(None);
    }
    has_time
}

/// Passes on the bytes of sessions with TLS that have moved, until their clients leave, for `takeover_tls_timeout` and
/// what the other process then needs to end them.
pub async fn forward_sessions(proxy: &Proxy) {
    let forwarded = proxy.sessions.forwarded();
    if forwarded == 0 {
        return;
    }
    let timeouts = proxy.config.load().timeouts.clone();
    let at_most = timeouts.takeover_tls.unwrap_or_default() + timeouts.shutdown;
    info!(sessions = forwarded, at_most_s = at_most.as_secs(), "passing on the bytes of sessions with TLS");
    let began = Instant::now();
    while proxy.sessions.forwarded() > 0 && began.elapsed() < at_most {
        tokio::time::sleep(CHECK_EVERY).await;
    }
    info!(remaining = proxy.sessions.forwarded(), "sessions with TLS have left");
}

/// Refuses logins, and ends sessions when they are between two transactions.
async fn drain(proxy: &Proxy, at_most: Option<Duration>) {
    proxy.connection_limits.close();
    info!(sessions = proxy.sessions.len(), "draining");
    for session in proxy.sessions.all() {
        session.end_when_free(ClientError::AdminShutdown);
    }
    let began = Instant::now();
    while !proxy.sessions.is_empty() && at_most.is_none_or(|at_most| began.elapsed() < at_most) {
        tokio::time::sleep(CHECK_EVERY).await;
    }
}

/// Lets logins that are under way complete. Moves sessions to the process that takes over, or ends them.
async fn move_away(proxy: &Proxy, at_most: Duration) {
    let limits = &proxy.connection_limits;
    info!(sessions = proxy.sessions.len(), logins = limits.unauthenticated(), "moving sessions");
    let (began, mut told) = (Instant::now(), HashSet::new());
    while limits.count() > 0 && began.elapsed() < at_most {
        for session in proxy.sessions.all() {
            if told.insert(session.process_id) {
                session.end_when_free(ClientError::Replaced);
            }
        }
        tokio::time::sleep(CHECK_EVERY).await;
    }
    info!(
        moved = proxy.sessions.moved.load(Ordering::Relaxed),
        remaining = proxy.sessions.len(),
        "sessions moved"
    );
}
