//! The open servers of a pool, for SHOW SERVERS. No decision depends on it.
//!
//! The list is locked when a server is opened or closed. Each lease costs a few relaxed stores.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use crate::{data_path::lock::locked, wire::stream::Stream};

/// What operators see of a server.
#[derive(Debug)]
pub struct ServerEntry {
    /// Unique in this process.
    pub id: u64,
    pub process_id: i32,
    /// Wall clock.
    pub opened_at: SystemTime,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// The proxy's end and the server's end; `None`: a Unix socket.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    borrower: AtomicI32,
    listening: AtomicBool,
    /// On the worker's coarse clock.
    lent_ms: AtomicU32,
    prepared: AtomicU32,
}

impl ServerEntry {
    /// The session with this process number has it.
    #[inline]
    pub fn lent_to(&self, session: i32, now_ms: u32) {
        self.borrower.store(session, Relaxed);
        self.lent_ms.store(now_ms, Relaxed);
    }

    /// No session has it; it has `prepared` statements.
    #[inline]
    pub fn returned(&self, prepared: usize) {
        self.borrower.store(0, Relaxed);
        self.prepared.store(u32::try_from(prepared).unwrap_or(u32::MAX), Relaxed);
    }

    /// It is the pool's listener connection, and is never lent.
    pub fn listens(&self) {
        self.listening.store(true, Relaxed);
    }

    /// Whether it is the pool's listener connection.
    pub fn is_listening(&self) -> bool {
        self.listening.load(Relaxed)
    }

    /// The process number of the session that has it, or has ended and left it to be reset.
    pub fn borrower(&self) -> Option<i32> {
        Some(self.borrower.load(Relaxed)).filter(|session| *session != 0)
    }

    /// When it was last lent, on the worker's coarse clock (milliseconds).
    pub fn lent_ms(&self) -> u32 {
        self.lent_ms.load(Relaxed)
    }

    /// Prepared statements that it had when it was last given back.
    pub fn prepared(&self) -> u32 {
        self.prepared.load(Relaxed)
    }
}

/// One pool's servers.
#[derive(Debug, Default)]
pub struct ServerList(Mutex<Vec<Arc<ServerEntry>>>);

/// A server's entry in the list, removed by drop.
#[derive(Debug)]
pub struct ListedServer {
    list: Arc<ServerList>,
    entry: Arc<ServerEntry>,
}

impl ServerList {
    /// Adds a server that has just been opened.
    pub fn add(self: &Arc<Self>, stream: &Stream, process_id: i32, now_ms: u32) -> ListedServer {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let entry = Arc::new(ServerEntry {
            id: NEXT_ID.fetch_add(1, Relaxed),
            process_id,
            opened_at: SystemTime::now(),
            tls: stream.is_tls(),
            addresses: stream.addresses(),
            borrower: AtomicI32::new(0),
            listening: AtomicBool::new(false),
            lent_ms: AtomicU32::new(now_ms),
            prepared: AtomicU32::new(0),
        });
        locked(&self.0).push(entry.clone());
        ListedServer { list: self.clone(), entry }
    }

    pub fn all(&self) -> Vec<Arc<ServerEntry>> {
        locked(&self.0).clone()
    }
}

impl std::ops::Deref for ListedServer {
    type Target = ServerEntry;

    fn deref(&self) -> &ServerEntry {
        &self.entry
    }
}

impl Drop for ListedServer {
    fn drop(&mut self) {
        locked(&self.list.0).retain(|entry| !Arc::ptr_eq(entry, &self.entry));
    }
}
