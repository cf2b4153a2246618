//! A server connection as a pool holds and lends it. The connection itself is in `server/`, which knows no
//! pool.

use std::{
    io,
    ops::{Deref, DerefMut},
    time::Duration,
};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{custom_parameters::FirstText, host_budget::Permit, server_list::ListedServer};
use crate::data_path::{server::connection::Server, tenant::Access};

/// A server and the pool's records of it. Dropping it closes the connection, then frees its permit.
///
/// All times are on the worker's coarse clock.
#[derive(Debug)]
pub struct PooledServer {
    pub(super) server: Server,
    /// Tenant id and access of the pool that opened it; compared whenever it is lent (invariant 2).
    pub(super) owner: (i64, Access),
    /// The count of parameter changes in the pool when this server last reported its own.
    pub(super) changes_seen: u64,
    /// The worker whose reactor has its connection.
    pub(super) home: usize,
    pub(super) opened_at: Duration,
    /// When it was last given back.
    pub(super) idle_since: Duration,
    /// When it last answered.
    pub(super) answered_at: Duration,
    pub(super) permit: Permit,
    /// It was opened for a session without custom parameters, then, and has had none since.
    pub(super) renewed: Option<(FirstText, Duration)>,
    /// What operators see of it.
    pub listed: ListedServer,
}

impl PooledServer {
    /// The connection and its permit, for a server that replaces it; takes it off the server list.
    pub(super) fn into_parts(self) -> (Server, Permit) {
        (self.server, self.permit)
    }
}

impl PooledServer {
    /// Registers its connection, which is in no reactor, with that of this worker, which the caller runs on.
    pub fn attach_at(&mut self, worker: usize) -> io::Result<()> {
        self.home = worker;
        self.server.stream.attach()
    }
}

/// How long [`PooledServer::close`] waits for the server's end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl PooledServer {
    /// Closes it, and frees its permit when the server has ended: PostgreSQL counts a connection until then.
    pub(super) async fn close(mut self: Box<Self>) {
        let closed = async {
            let _ = self.server.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
            while self.server.stream.read(&mut [0; 64]).await.is_ok_and(|bytes| bytes > 0) {}
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, closed).await;
    }
}

impl Deref for PooledServer {
    type Target = Server;

    #[inline]
    fn deref(&self) -> &Server {
        &self.server
    }
}

impl DerefMut for PooledServer {
    #[inline]
    fn deref_mut(&mut self) -> &mut Server {
        &mut self.server
    }
}
