//! Cancel requests: from a client's second connection to the server that its session holds at that moment, if any.
//!
//! Only the session's own task knows what it holds, so it is the one that sends the cancel on; while the cancel is under
//! way the server serves nobody else, and the client's cancel connection stays open, as PostgreSQL's own does.

use std::sync::Arc;

use tokio::sync::oneshot;
use tracing::debug;

use super::{
    pool::Pool,
    relay::Relay,
    server::{self, connection::Server},
    session::Sessions,
};

impl Relay {
    /// Cancels what the session's server runs for it. Where nothing runs, or what runs is our own bookkeeping, whose failure
    /// would end the session, nothing happens: as if the cancel had come before the query. `waiting` are dropped when it
    /// has settled.
    pub(super) fn cancel(&mut self, waiting: Vec<oneshot::Sender<()>>) {
        let Some(server) = self.server.as_ref() else { return };
        if server.side.lease.whose().is_none_or(|whose| !whose.is_for_client()) {
            return;
        }
        if self.pool.cancelling() >= self.pool.rules.cancels_max {
            return debug!(tenant = self.pool.tenant.name, "a cancel too many is dropped");
        }
        let (settled, cancelling) = oneshot::channel();
        let before = self.cancelling.replace(cancelling);
        let key = (server.process_id, server.secret.clone());
        let pool = self.pool.clone();
        tokio::spawn(async move {
            let _under_way = pool.cancel_under_way();
            let _settled = (settled, waiting);
            if let Some(before) = before {
                let _ = before.await;
            }
            send_key(&pool, key.0, &key.1).await;
        });
    }
}

/// Cancels what a server runs, and waits until it has settled.
pub async fn send(pool: &Pool, server: &Server) {
    send_key(pool, server.process_id, &server.secret).await;
}

async fn send_key(pool: &Pool, process_id: i32, secret: &[u8]) {
    if let Err(error) = server::send_cancel(&pool.tenant.host, process_id, secret, pool.dial_options()).await
    {
        debug!(tenant = pool.tenant.name, side = "server", %error, "a cancel did not settle");
    }
}

/// Serves a cancel request. Returns when it has settled, whoever asked; an unknown key is not told apart.
pub async fn serve(sessions: &Arc<Sessions>, process_id: i32, secret: &[u8]) {
    if let Some(handle) = sessions.find(process_id, secret) {
        let _ = handle.cancel().await;
    }
}
