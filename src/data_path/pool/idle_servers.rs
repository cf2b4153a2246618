//! Maintains a pool from time to time: closes servers that are idle too long or too old, checks those that
//! have not answered for long, opens servers up to `min_pool_size`.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tracing::warn;

use super::{Pool, PooledServer};

impl Pool {
    /// Runs on the pool's worker. Does not yield: a session of this worker never finds the pool empty
    /// meanwhile. A server that is being checked is missing until it answers.
    pub fn maintain(self: &Arc<Self>) {
        let now = self.worker.clock.now();
        self.check_functions(now);
        self.reclaim_unread();
        let mut idle: Vec<_> = std::iter::from_fn(|| self.queue.take_idle()).collect();
        let mut spare = self.live().saturating_sub(self.rules.min_size);
        // The newest is taken first and put back last, to be lent first.
        while let Some(mut server) = idle.pop() {
            let unused = now.saturating_sub(server.idle_since) >= self.rules.server_idle && spare > 0;
            let aged = now.saturating_sub(server.opened_at) >= self.rules.server_lifetime;
            if unused || aged || !server.is_quiet(&self.tenant.name) {
                spare = spare.saturating_sub(1);
                drop(server);
            } else if now.saturating_sub(server.answered_at) >= self.rules.server_check {
                let pool = self.clone();
                self.worker.spawn(async move { pool.check(server).await });
            } else {
                self.put(server);
            }
        }
        self.open_wanted();
        while self.live() < self.rules.min_size && self.open_one_more() {}
    }

    /// Puts an idle server back if it answers. So a connection that the network has dropped silently (after a
    /// failover, by a firewall) is found before a client gets it.
    async fn check(&self, mut server: Box<PooledServer>) {
        let answer = tokio::time::timeout(self.connector.options.connect_timeout, server.run("")).await;
        match answer.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into())) {
            Ok(_) => {
                server.answered_at = self.worker.clock.now();
                self.put(server);
            }
            Err(error) => {
                let (tenant, host, server_pid) =
                    (&self.tenant.name, &self.tenant.host.name, server.process_id);
                warn!(tenant, host, server_pid, side = "server", %error, "idle server lost");
            }
        }
    }

    /// Has the database's functions checked for changes, if the pool was used since the last check.
    fn check_functions(&self, now: Duration) {
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let checked_ms = self.functions_checked_ms.load(Ordering::Relaxed);
        let due = Duration::from_millis(now_ms.saturating_sub(checked_ms)) >= self.rules.functions_check;
        if due && self.last_used() >= checked_ms {
            self.functions_checked_ms.store(now_ms, Ordering::Relaxed);
            self.functions.request_check(self.rules.functions_check);
        }
    }
}
