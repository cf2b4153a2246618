//! The connection of a pool's ear: what is read from it, and how it is exchanged for one of another pool.

use std::{future::poll_fn, io, pin::Pin, sync::Arc, task::Poll};

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tracing::{debug, info, warn};

use super::{
    Pool, PooledServer,
    shared_listener::{Ear, Wish, around_mark, is_mark},
};
use crate::{
    data_path::{
        exchange::channels::{MARKS, each, messages},
        server::connection::{AskError, Server},
    },
    error::ClientError,
    wire::frame::header,
};

/// The longest message of a server that only listens; a payload has 8 000 bytes at most.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// One that lives for weeks says nothing for weeks.
const NEVER_TOO_IDLE: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings \
     WHERE name = 'idle_session_timeout'";

/// A connection that listens. It counts in the host's budget, and not in the pool's size.
pub(super) struct Line {
    server: Box<PooledServer>,
    buffer: Vec<u8>,
}

/// Why a connection listens no more.
enum Lost {
    /// Somebody wished it.
    Wished(ClientError),
    /// It broke, or its server ended it.
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

impl Line {
    /// Opens one, which hears marks so far.
    ///
    /// # Errors
    /// The budget is spent, or the server cannot be reached.
    pub async fn open(pool: &Arc<Pool>) -> Result<Self, ClientError> {
        let mut server = pool.open_beside().await?;
        server.listens();
        let lost = |error: AskError| {
            warn!(tenant = pool.tenant.name, side = "server", %error, "cannot listen");
            ClientError::ServerLost
        };
        server.run(NEVER_TOO_IDLE).await.map_err(lost)?;
        let sql = format!("SET application_name = 'pglobby ear'; LISTEN {MARKS}");
        server.run(&sql).await.map_err(lost)?;
        Ok(Self { server, buffer: Vec::new() })
    }

    /// `client_encoding`.
    pub fn encoding(&self) -> &str {
        self.server.side.reported_value("client_encoding").unwrap_or_default()
    }

    /// The ear's task: listens until nobody hears by it, or the connection is lost.
    pub async fn listen(mut self, ear: Arc<Ear>, pool: Arc<Pool>) {
        info!(tenant = pool.tenant.name, server = self.server.process_id, "listening");
        let lost = Box::pin(self.work(&ear, pool.clone())).await;
        let reason = match lost {
            Lost::Wished(reason) => {
                info!(tenant = pool.tenant.name, "listening no more");
                reason
            }
            Lost::Broken(error) => {
                warn!(tenant = pool.tenant.name, side = "server", error, "the listening connection is lost");
                ClientError::ListenerLost
            }
        };
        ear.over(&reason);
        let _ = self.server.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
    }

    async fn work(&mut self, ear: &Arc<Ear>, mut pool: Arc<Pool>) -> Lost {
        loop {
            if let Err(lost) = self.take_in(ear, &pool) {
                return lost;
            }
            match ear.wish() {
                Wish::Nothing => {}
                Wish::End(reason) => return Lost::Wished(reason),
                Wish::Move(next) => match self.move_to(ear, &pool, &next).await {
                    Ok(()) => pool = next,
                    Err(lost) => return lost,
                },
            }
            self.server.unsent.push(&ear.take_outbox());
            let moved = tokio::select! {
                () = ear.changed() => Ok(()),
                moved = self.stir() => moved,
            };
            if let Err(error) = moved {
                return error.into();
            }
        }
    }

    /// Writes what waits, and reads what has come; returns when one of them got on.
    async fn stir(&mut self) -> io::Result<()> {
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

    /// Takes every message that is whole.
    fn take_in(&mut self, ear: &Ear, pool: &Pool) -> Result<(), Lost> {
        let mut taken = 0;
        for message in messages(&self.buffer) {
            taken += message.len();
            match message.first() {
                Some(b'A') => ear.hear(message, pool.rules.notifications_bytes_max),
                Some(b'E') if self.server.side.is_farewell(message) => {
                    return Err(Lost::Broken("the server said goodbye".to_owned()));
                }
                Some(b'E') => ear.refused(),
                Some(b'Z') if !ear.answered() => {
                    return Err(Lost::Broken("the server answered what nobody asked".to_owned()));
                }
                _ => {}
            }
        }
        self.buffer.drain(..taken);
        match header(&self.buffer) {
            Ok(Some((_, length))) if length > MESSAGE_BYTES_MAX => {
                Err(Lost::Broken("a message too long".to_owned()))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(Lost::Broken(error.to_string())),
        }
    }

    /// Goes on with a connection of the pool that replaced ours: up to a mark we hear by the old one, from it on by the new
    /// one. Another database tells other things: then nobody can say what is missed in between, and the ear ends.
    async fn move_to(&mut self, ear: &Arc<Ear>, pool: &Arc<Pool>, next: &Arc<Pool>) -> Result<(), Lost> {
        let (old, new) = (&pool.tenant, &next.tenant);
        if (&old.host.address, &old.database) != (&new.host.address, &new.database) {
            return Err(Lost::Wished(ClientError::ListenerPaused));
        }
        // Answers still owed are the old connection's.
        while ear.is_owed() {
            self.server.unsent.push(&ear.take_outbox());
            self.stir().await?;
            self.take_in(ear, pool)?;
        }
        let mut fresh = match Self::open(next).await {
            Ok(fresh) => fresh,
            Err(refusal) => return Err(Lost::Broken(refusal.to_string())),
        };
        if fresh.encoding() != &*ear.encoding {
            return Err(Lost::Wished(ClientError::ListenerPaused));
        }
        let mark = format!("{:032x}", rand::random::<u128>());
        let wanted = ear.wanted();
        fresh.server.run(&each("LISTEN", wanted.iter())).await?;
        fresh.server.run(&format!("NOTIFY {MARKS}, '{mark}'")).await?;
        let heard = std::mem::take(&mut fresh.server.notified);
        while !self.has_heard(ear, pool, &mark)? {
            self.stir().await?;
        }
        fresh.buffer = around_mark(&heard, &mark).1.to_vec();
        debug!(tenant = new.name, "listening on a new connection");
        let mut old = std::mem::replace(self, fresh);
        let _ = old.server.stream.write_all(&[b'X', 0, 0, 0, 4]).await;
        Ok(())
    }

    /// Takes what has come up to the mark; `true` if it is there.
    fn has_heard(&mut self, ear: &Ear, pool: &Pool, mark: &str) -> Result<bool, Lost> {
        let (before, _) = around_mark(&self.buffer, mark);
        let heard =
            before.len() < self.buffer.len() && messages(&self.buffer).any(|message| is_mark(message, mark));
        if heard {
            self.buffer.truncate(before.len());
        }
        self.take_in(ear, pool)?;
        Ok(heard)
    }
}
