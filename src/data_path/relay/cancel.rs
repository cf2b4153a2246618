//! Cancel requests: from a client's second connection to the server that its session holds at that moment, if any.
//!
//! Only the session's own task knows what it holds, so it is the one that sends the cancel on; while the cancel is under
//! way the server serves nobody else, and the client's cancel connection stays open, as PostgreSQL's own does.

use std::net::SocketAddr;

use tokio::sync::oneshot;
use tracing::debug;

use super::Relay;
use crate::data_path::{
    pool::Pool,
    server::{self, connection::Server},
};

impl Relay {
    /// Cancels what the session's server runs for it. Where nothing runs, or what runs is our own bookkeeping, whose failure
    /// would end the session, nothing happens: as if the cancel had come before the query. `waiting` are dropped when it
    /// has settled.
    pub(in crate::data_path) fn cancel(&mut self, waiting: Vec<oneshot::Sender<()>>) {
        let Some(server) = self.server.as_ref() else { return };
        if server.side.replies.origin().is_none_or(|origin| !origin.is_for_client()) {
            return;
        }
        let Some(under_way) = self.pool.begin_cancel() else {
            return debug!(tenant = self.pool.tenant.name, "cancel dropped: cancels_max are under way");
        };
        let (settled, cancelling) = oneshot::channel();
        let before = self.cancelling.replace(cancelling);
        let key = Key::of(server);
        let pool = self.pool.clone();
        tokio::spawn(async move {
            let _settled = (settled, waiting, under_way);
            if let Some(before) = before {
                let _ = before.await;
            }
            key.send(&pool).await;
        });
    }
}

/// Cancels what a server runs, and waits until it has settled.
pub async fn send(pool: &Pool, server: &Server) {
    Key::of(server).send(pool).await;
}

/// What a server is asked to cancel by.
struct Key {
    process_id: i32,
    secret: Box<[u8]>,
    /// The server's own end of the connection.
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
            debug!(tenant = pool.tenant.name, side = "server", %error, "a cancel did not settle");
        }
    }
}
