//! The connection of a shared listener: its task reads it, and moves to another connection when the pool is
//! replaced.

use std::{future::poll_fn, io, pin::Pin, sync::Arc, task::Poll};

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tracing::{debug, info, warn};

use super::{
    Pool, PooledServer,
    shared_listener::{Instruction, SharedListener, around_mark, is_mark},
};
use crate::{
    data_path::{
        server::connection::{AskError, Server},
        session_state::channels::{MARKERS, messages, statements_for},
    },
    error::ClientError,
    wire::{frame::header, server_error::is_fatal},
};

/// The longest message of a server that only listens; a payload has 8 000 bytes at most.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// A listener connection may be idle for weeks. PostgreSQL 13 has no such limit, and refuses this.
const NEVER_TOO_IDLE: &str = "SET idle_session_timeout = 0";

/// A connection that listens. It counts in the host's budget, not in the pool's size.
pub(super) struct ListenerConnection {
    server: Box<PooledServer>,
    buffer: Vec<u8>,
}

/// Why the task ends.
enum Lost {
    Ordered(ClientError),
    /// The connection broke, or the server ended it.
    Broken(String),
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<AskError> for Lost {
    fn from(error: AskError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl ListenerConnection {
    /// Opens a connection that listens for markers only. Errors: as [`Pool::open_beside`].
    pub async fn open(pool: &Arc<Pool>) -> Result<Self, ClientError> {
        let mut server = pool.open_beside().await?;
        server.listed.listens();
        let lost = |error: AskError| {
            warn!(tenant = pool.tenant.name, side = "server", %error, "cannot open a listener connection");
            ClientError::ServerLost
        };
        if let Err(error @ (AskError::Lost(_) | AskError::Unanswered)) = server.run(NEVER_TOO_IDLE).await {
            return Err(lost(error));
        }
        let sql = format!("SET application_name = 'pglobby listener'; LISTEN {MARKERS}");
        server.run(&sql).await.map_err(lost)?;
        Ok(Self { server, buffer: Vec::new() })
    }

    /// `client_encoding`.
    pub fn encoding(&self) -> &str {
        self.server.side.reported_value("client_encoding").unwrap_or_default()
    }

    /// The task: listens until the last session has left, or the connection is lost.
    pub async fn listen(mut self, listener: Arc<SharedListener>, pool: Arc<Pool>) {
        info!(tenant = pool.tenant.name, server_pid = self.server.process_id, "listener connection opened");
        let lost = Box::pin(self.work(&listener, pool.clone())).await;
        let reason = match lost {
            Lost::Ordered(reason) => {
                info!(tenant = pool.tenant.name, "listener connection closed");
                reason
            }
            Lost::Broken(error) => {
                warn!(tenant = pool.tenant.name, side = "server", error, "listener connection lost");
                ClientError::ListenerLost
            }
        };
        listener.ended(&reason);
        let _ = self.server.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
    }

    async fn work(&mut self, listener: &Arc<SharedListener>, mut pool: Arc<Pool>) -> Lost {
        loop {
            if let Err(lost) = self.handle_messages(listener, &pool) {
                return lost;
            }
            match listener.instruction() {
                Instruction::Nothing => {}
                Instruction::End(reason) => return Lost::Ordered(reason),
                Instruction::Move(next) => match self.move_to(listener, &pool, &next).await {
                    Ok(()) => pool = next,
                    Err(lost) => return lost,
                },
            }
            self.server.unsent.push(&listener.take_outbox());
            let moved = tokio::select! {
                () = listener.changed() => Ok(()),
                moved = self.progress() => moved,
            };
            if let Err(error) = moved {
                return error.into();
            }
        }
    }

    /// Writes and reads; returns when bytes were moved in either direction.
    async fn progress(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            let Server { stream, unsent, .. } = &mut **self.server;
            if !unsent.is_empty() && unsent.drain(stream, cx)? {
                return Poll::Ready(Ok(()));
            }
            let mut bytes = [0; 4096];
            let mut read = ReadBuf::new(&mut bytes);
            match Pin::new(stream).poll_read(cx, &mut read)? {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) if read.filled().is_empty() => {
                    Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()))
                }
                Poll::Ready(()) => {
                    self.buffer.extend_from_slice(read.filled());
                    Poll::Ready(Ok(()))
                }
            }
        })
        .await
    }

    /// Handles all complete messages.
    fn handle_messages(&mut self, listener: &SharedListener, pool: &Pool) -> Result<(), Lost> {
        let mut taken = 0;
        for message in messages(&self.buffer) {
            taken += message.len();
            match message.first() {
                Some(b'A') => listener.deliver(message, pool.rules.notifications_bytes_max),
                Some(b'E') if is_fatal(message) => {
                    return Err(Lost::Broken("the server ended the session".to_owned()));
                }
                Some(b'E') => listener.refused(),
                Some(b'Z') if !listener.answered() => {
                    return Err(Lost::Broken("the server answered without a query".to_owned()));
                }
                _ => {}
            }
        }
        self.buffer.drain(..taken);
        match header(&self.buffer) {
            Ok(Some((_, length))) if length > MESSAGE_BYTES_MAX => {
                Err(Lost::Broken("a message is too long".to_owned()))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(Lost::Broken(error.to_string())),
        }
    }

    /// Goes on with a connection of the pool that replaced this one: notifications up to a mark are taken
    /// from the old one, from the mark on from the new one. Another database has other notifications: some
    /// would be missed, so the listener ends.
    async fn move_to(
        &mut self,
        listener: &Arc<SharedListener>,
        pool: &Arc<Pool>,
        next: &Arc<Pool>,
    ) -> Result<(), Lost> {
        let (old, new) = (&pool.tenant, &next.tenant);
        // A host that has got another address, for a standby, is the same one.
        let is_same_host = old.host.addresses.iter().any(|address| new.host.addresses.contains(address));
        if !is_same_host || old.database != new.database {
            return Err(Lost::Ordered(ClientError::ListenerPaused));
        }
        // The old connection has yet to answer these.
        while listener.has_unanswered() {
            self.server.unsent.push(&listener.take_outbox());
            self.progress().await?;
            self.handle_messages(listener, pool)?;
        }
        let mut fresh = match Self::open(next).await {
            Ok(fresh) => fresh,
            Err(client_error) => return Err(Lost::Broken(client_error.to_string())),
        };
        if fresh.encoding() != &*listener.encoding {
            return Err(Lost::Ordered(ClientError::ListenerPaused));
        }
        let mark = format!("{:032x}", rand::random::<u128>());
        let needed = listener.needed();
        fresh.server.run(&statements_for("LISTEN", needed.iter())).await?;
        fresh.server.run(&format!("NOTIFY {MARKERS}, '{mark}'")).await?;
        let received = std::mem::take(&mut fresh.server.notified);
        while !self.reached_mark(listener, pool, &mark)? {
            self.progress().await?;
        }
        fresh.buffer = around_mark(&received, &mark).1.to_vec();
        debug!(tenant = new.name, "listener moved to a new connection");
        let mut old = std::mem::replace(self, fresh);
        let _ = old.server.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
        Ok(())
    }

    /// Handles the messages before the mark; `true`: the mark has been received.
    fn reached_mark(&mut self, listener: &SharedListener, pool: &Pool, mark: &str) -> Result<bool, Lost> {
        let (before, _) = around_mark(&self.buffer, mark);
        let reached =
            before.len() < self.buffer.len() && messages(&self.buffer).any(|message| is_mark(message, mark));
        if reached {
            self.buffer.truncate(before.len());
        }
        self.handle_messages(listener, pool)?;
        Ok(reached)
    }
}
