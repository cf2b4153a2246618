//! Passes a cancel request on to the server that the session holds at that moment, if any.
//!
//! On its way here the request's key finds the session (`sessions/registry.rs`), on this node or another one
//! (`control_path/central/cluster_cancel.rs`).
//!
//! Only the session's own task knows its server, so that task sends the request. Until the server is complete
//! it, the server serves no other session, and the client's cancel connection stays open, as PostgreSQL keeps
//! it.

use std::{future::Future, net::SocketAddr, pin::Pin, task::Context};

use tokio::sync::oneshot;
use tracing::debug;

use super::Relay;
use crate::data_path::{
    host_address::HostAddress,
    pool::Pool,
    server::{self, connection::Server},
};

/// Cancel requests that a session has got and not sent yet.
#[derive(Debug, Default)]
pub(super) struct WantedCancels {
    /// Dropped when the cancel is complete.
    waiting: Vec<oneshot::Sender<()>>,
    /// What the client has sent before them is read.
    is_read_up: bool,
}

impl WantedCancels {
    pub(super) fn add(&mut self, waiting: Vec<oneshot::Sender<()>>) {
        if !waiting.is_empty() {
            self.waiting.extend(waiting);
            self.is_read_up = false;
        }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn take(&mut self) -> Vec<oneshot::Sender<()>> {
        std::mem::take(&mut self.waiting)
    }
}

impl Relay {
    /// Cancels the client's request once the server works on it: a request of the proxy may go before it, and
    /// its failure would end the session. Does nothing if the client has no request.
    #[cold]
    pub(super) fn send_wanted_cancels(&mut self, cx: &mut Context<'_>) {
        let replies = self.server.as_ref().map(|server| &server.side.replies);
        let has_request =
            replies.is_some_and(|replies| replies.has_client_request() || !self.session.inbox.is_empty());
        if !has_request {
            // It may be faster than the request that the client has sent before it.
            match std::mem::replace(&mut self.wanted_cancels.is_read_up, true) {
                false => wake_when_read_up(cx),
                true => drop(self.wanted_cancels.take()),
            }
            return;
        }
        let works_on_it = replies.is_some_and(|replies| replies.works_for_client());
        let Some(server) = self.server.as_ref().filter(|_| works_on_it) else { return };
        let waiting = self.wanted_cancels.take();
        let Some(under_way) = self.pool.begin_cancel() else {
            return debug!(tenant = self.pool.tenant.name, "cancel dropped: cancels_max are under way");
        };
        let (done, mut cancelling) = oneshot::channel();
        // To be woken when it is complete.
        let _ = Pin::new(&mut cancelling).poll(cx);
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

/// Wakes the task when the reactor knows all that has come by now.
fn wake_when_read_up(cx: &Context<'_>) {
    let waker = cx.waker().clone();
    tokio::spawn(async move {
        tokio::task::yield_now().await;
        waker.wake();
    });
}

/// Cancels the request that a server works on, and waits until the cancel is complete.
pub async fn send(pool: &Pool, server: &Server) {
    Key::of(server).send(pool).await;
}

/// The cancel key of a server's session.
struct Key {
    process_id: i32,
    secret: Box<[u8]>,
    /// The host's address that the server was opened at.
    at: HostAddress,
    /// The server's end of its connection.
    peer: Option<SocketAddr>,
}

impl Key {
    fn of(server: &Server) -> Self {
        let (at, peer) = (server.at.clone(), server.address);
        Self { process_id: server.process_id, secret: server.secret.clone(), at, peer }
    }

    async fn send(self, pool: &Pool) {
        let Self { process_id, secret, at, peer } = self;
        let (host, options) = (&pool.tenant.host, pool.dial_options());
        let sent = server::send_cancel(host, &at, peer, process_id, &secret, options).await;
        if let Err(error) = sent {
            debug!(tenant = pool.tenant.name, side = "server", %error, "cancel request failed");
        }
    }
}
