//! Passes a cancel request on to the server that the session holds at that moment, if any.
//!
//! On its way here the request's key finds the session (`sessions/registry.rs`), on this node or another one
//! (`control_path/central/cluster_cancel.rs`).
//!
//! Only the session's own task knows its server, so that task sends the request. Until the server is complete
//! it, the server serves no other session, and the client's cancel connection stays open, as PostgreSQL keeps
//! it.

use std::net::SocketAddr;

use tokio::sync::oneshot;
use tracing::debug;

use super::Relay;
use crate::data_path::{
    pool::Pool,
    server::{self, connection::Server},
};

impl Relay {
    /// Cancels the client's request that its server works on. Does nothing while no request runs, or while
    /// the server works on a request of the proxy, whose failure would end the session. Drops `waiting` when
    /// the cancel is complete.
    pub(super) fn cancel(&mut self, waiting: Vec<oneshot::Sender<()>>) {
        let Some(server) = self.server.as_ref() else { return };
        if server.side.replies.origin().is_none_or(|origin| !origin.is_for_client()) {
            return;
        }
        let Some(under_way) = self.pool.begin_cancel() else {
            return debug!(tenant = self.pool.tenant.name, "cancel dropped: cancels_max are under way");
        };
        let (done, cancelling) = oneshot::channel();
        let before = self.cancelling.replace(cancelling);
        let key = Key::of(server);
        let pool = self.pool.clone();
        tokio::spawn(async move {
            let _done = (done, waiting, under_way);
            if let Some(before) = before {
                let _ = before.await;
            }
            key.send(&pool).await;
        });
    }
}

/// Cancels the request that a server works on, and waits until the cancel is complete.
pub async fn send(pool: &Pool, server: &Server) {
    Key::of(server).send(pool).await;
}

/// The cancel key of a server's session.
struct Key {
    process_id: i32,
    secret: Box<[u8]>,
    /// The address that the server was reached at.
    at: Option<SocketAddr>,
}

impl Key {
    fn of(server: &Server) -> Self {
        let at = server.address;
        Self { process_id: server.process_id, secret: server.secret.clone(), at }
    }

    async fn send(self, pool: &Pool) {
        let Self { process_id, secret, at } = self;
        let sent = server::send_cancel(&pool.tenant.host, at, process_id, &secret, pool.dial_options()).await;
        if let Err(error) = sent {
            debug!(tenant = pool.tenant.name, side = "server", %error, "cancel request failed");
        }
    }
}
