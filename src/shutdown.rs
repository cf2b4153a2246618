//! Ends the process without breaking running work.
//!
//! Signals as in PgBouncer since 1.23: HUP reloads, TERM drains (a second TERM ends at once), INT waits for
//! servers, QUIT ends at once.

use std::{
    sync::Arc,
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
    /// All sessions at once.
    Now,
}

/// Interval at which a drain checks whether all sessions have ended.
const CHECK_EVERY: Duration = Duration::from_millis(20);

/// How long sending the last error to clients may take.
const LAST_ERROR: Duration = Duration::from_millis(500);

/// Ends every session. The caller stops accepting clients before, and ends the workers after. When
/// `impatience` resolves, a drain ends the remaining sessions at once with the same error.
pub async fn end_sessions(proxy: &Arc<Proxy>, ending: Ending, impatience: impl Future<Output = ()>) {
    proxy.connection_limits.close();
    let began = Instant::now();
    if let Ending::Drain { at_most } = ending {
        info!(sessions = proxy.sessions.len(), "draining");
        for session in proxy.sessions.all() {
            session.end_when_free(ClientError::AdminShutdown);
        }
        let drained = async {
            while !proxy.sessions.is_empty() && at_most.is_none_or(|at_most| began.elapsed() < at_most) {
                tokio::time::sleep(CHECK_EVERY).await;
            }
        };
        tokio::select! {
            () = drained => {}
            () = impatience => info!(sessions = proxy.sessions.len(), "stopping now"),
        }
    }
    let sessions_cut = proxy.sessions.end(&ClientError::AdminShutdown, |_| true);
    let ended = Instant::now();
    while !proxy.sessions.is_empty() && ended.elapsed() < LAST_ERROR {
        tokio::time::sleep(CHECK_EVERY).await;
    }
    info!(sessions_cut, duration_ms = began.elapsed().as_millis(), "sessions ended");
    for pool in proxy.pools.all() {
        pool.retire(None);
    }
}
