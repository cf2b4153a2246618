//! Ending the process without breaking what runs.
//!
//! Signals as PgBouncer has them since 1.23: HUP reloads, TERM drains (a second TERM ends at once), INT waits for servers,
//! QUIT ends at once.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::info;

use crate::{data_path::proxy::Proxy, error::ClientError};

/// How to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Idle sessions at once, others when their transaction is over or the time is up.
    Drain {
        /// `shutdown_timeout`; `None`: as long as it takes.
        at_most: Option<Duration>,
    },
    /// Everything at once.
    Now,
}

/// How often a drain looks whether it is done.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long the last words to clients may take.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Ends every session. The caller has stopped accepting before, and ends the workers after. A drain waits no longer once
/// `impatience` resolves: what is left is ended with the same words.
pub async fn end_sessions(proxy: &Arc<Proxy>, ending: Ending, impatience: impl Future<Output = ()>) {
    proxy.door.close();
    let began = Instant::now();
    if let Ending::Drain { at_most } = ending {
        info!(sessions = proxy.sessions.len(), "draining");
        for session in proxy.sessions.all() {
            session.end_when_free(ClientError::AdminShutdown);
        }
        let drained = async {
            while !proxy.sessions.is_empty() && at_most.is_none_or(|at_most| began.elapsed() < at_most) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            () = drained => {}
            () = impatience => info!(sessions = proxy.sessions.len(), "stopping now"),
        }
    }
    let cut = proxy.sessions.end(&ClientError::AdminShutdown, |_| true);
    let ended = Instant::now();
    while !proxy.sessions.is_empty() && ended.elapsed() < LAST_WORDS {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    info!(cut, took = ?began.elapsed(), "sessions ended");
    for pool in proxy.pools.all() {
        pool.retire(None);
    }
}
