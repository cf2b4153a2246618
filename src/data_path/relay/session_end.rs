//! How a session ends, and what becomes of the server it held: nobody else may ever see the remains.

use std::{io, sync::atomic::Ordering, time::Duration};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::{debug, info, warn};

use super::{Relay, cancel};
use crate::{
    config::PoolMode,
    data_path::{
        exchange::{ClientSide, ExchangeError},
        pool::{Pool, PooledServer},
        server::connection::Server,
        session_state::pins::Pins,
        sessions::registry::SessionHandle,
    },
    error::ClientError,
    wire::{
        message::Severity, outgoing::Outgoing, server_error::ServerError, stream::Stream, unsent::Unsent,
    },
};

/// How long a client may take to read our last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a session ends.
#[derive(Debug)]
pub enum SessionEnd {
    /// The client said Terminate.
    Terminated,
    /// The client's connection ended or broke.
    ClientGone,
    /// The kernel gave the client's connection up: nothing came back for too long.
    ClientTimedOut,
    /// The server's connection ended or broke, without a word.
    ServerLost,
    /// The kernel gave the server's connection up.
    ServerTimedOut,
    /// The server's own FATAL has gone to the client.
    ServerSaidGoodbye,
    /// We end it. Boxed: the task of an idle client has room for an end.
    Refused(Box<ClientError>),
}

impl SessionEnd {
    /// A read or a write on the client's connection had this outcome, and no bytes.
    #[cold]
    pub(in crate::data_path) fn client_lost(outcome: io::Result<()>) -> Self {
        if is_timeout(&outcome) { Self::ClientTimedOut } else { Self::ClientGone }
    }

    /// The same of the server's.
    #[cold]
    pub(in crate::data_path) fn server_lost(outcome: io::Result<()>) -> Self {
        if is_timeout(&outcome) { Self::ServerTimedOut } else { Self::ServerLost }
    }

    /// What a write to the server has done; errors but this one are found when it is read from, and then with the server's words.
    pub(in crate::data_path) fn unless_timed_out(outcome: io::Result<bool>) -> Result<bool, Self> {
        match outcome {
            Err(error) if is_timeout(&Err(io::Error::from(error.kind()))) => Err(Self::ServerTimedOut),
            outcome => Ok(outcome.unwrap_or(false)),
        }
    }

    /// Logs a connection that the kernel gave up; from then on it is one that was lost.
    pub(in crate::data_path) fn reported(self, tenant: &str, session: &SessionHandle) -> Self {
        let (end, side) = match self {
            Self::ClientTimedOut => (Self::ClientGone, "client"),
            Self::ServerTimedOut => (Self::ServerLost, "server"),
            other => return other,
        };
        warn!(
            tenant, login = session.login.name, connection = session.process_id, peer = ?session.peer, side,
            "connection timed out: the other end did not answer TCP (tcp_user_timeout, keepalive)"
        );
        end
    }
}

/// Where routers said that the way is gone, the kernel says so instead, at the same time.
fn is_timeout(outcome: &io::Result<()>) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    let given_up =
        |error: &io::Error| matches!(error.kind(), TimedOut | HostUnreachable | NetworkUnreachable);
    outcome.as_ref().is_err_and(given_up)
}

impl Relay {
    /// Tells the client, closes its connection, and sees to the server.
    pub(in crate::data_path) async fn end(mut self, end: SessionEnd) {
        let end = end.reported(&self.pool.tenant.name, &self.handle);
        let last_words = match &end {
            SessionEnd::Refused(refusal) => Some(ClientError::clone(refusal)),
            SessionEnd::ServerLost if self.is_committing() => Some(ClientError::OutcomeUnknown),
            SessionEnd::ServerLost => Some(ClientError::ServerLost),
            _ => None,
        };
        info!(
            tenant = self.pool.tenant.name, login = self.handle.login.name, connection = self.handle.process_id,
            end = ?end, "session ended"
        );
        // Words put behind the beginning of a message would be read as its rest: as data, in a row.
        let in_step = self.server.as_ref().is_none_or(|server| !server.side.mid_message());
        if let Some(server) = self.server.take() {
            self.handle.server_process_id.store(0, Ordering::Relaxed);
            self.set_pins(Pins::empty());
            match end {
                SessionEnd::Terminated => {
                    let is_working = server.side.replies.is_working();
                    self.leave_behind(server, is_working, false);
                }
                SessionEnd::ClientGone | SessionEnd::Refused(_) => self.leave_behind(server, false, true),
                _ => drop(server),
            }
        }
        self.subscription = None;
        self.unsent.push(&std::mem::take(&mut self.held));
        let mut bytes = Vec::new();
        if let Some(refusal) = last_words.filter(|_| in_step) {
            refusal.write(Severity::Fatal, &mut bytes);
        }
        if !matches!(end, SessionEnd::ClientGone | SessionEnd::Terminated) {
            self.unsent.push(&bytes);
            // Nobody finds the session any more, though its client may take its time.
            let Self { client, unsent, handle, .. } = self;
            drop(handle);
            say_goodbye(client, unsent).await;
        }
    }

    /// The server cannot be used any longer: how the session ends.
    pub(in crate::data_path) fn broken(&self, broken: ExchangeError) -> SessionEnd {
        warn!(tenant = self.pool.tenant.name, login = self.handle.login.name, side = "server", %broken, "closing both connections");
        match broken {
            ExchangeError::Bookkeeping(ServerError { sqlstate, mut message }) => {
                if !sqlstate.starts_with("57P") {
                    message.insert_str(0, "what the session has set cannot be set on another server: ");
                }
                SessionEnd::Refused(ClientError::Server { sqlstate, message }.into())
            }
            ExchangeError::Frame(_) | ExchangeError::Desync(_) => {
                self.pool.stats.desyncs.fetch_add(1, Ordering::Relaxed);
                SessionEnd::ServerLost
            }
        }
    }

    fn is_committing(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.side.replies.is_committing())
    }

    /// Lets go of a server in a task of its own: what PostgreSQL would still run for a client that said Terminate is run
    /// to its end; what runs for one that is gone is cancelled.
    pub(in crate::data_path) fn leave_behind(
        &mut self,
        server: Box<PooledServer>,
        finish: bool,
        cancel: bool,
    ) {
        let pool = self.pool.clone();
        let cancelling = self.cancelling.take();
        tokio::spawn(async move {
            if let Some(cancelling) = cancelling {
                let _ = cancelling.await;
            }
            let mut server = server;
            if finish && !run_to_end(&mut server, &pool).await {
                return;
            }
            if cancel && server.side.replies.is_working() {
                cancel::send(&pool, &server).await;
                terminate(&mut server).await;
                return;
            }
            make_reusable(server, &pool).await;
        });
    }
}

/// Gives the server back, clean; or closes it.
async fn make_reusable(mut server: Box<PooledServer>, pool: &Pool) {
    let clean = server.is_reusable() && pool.rules.mode == PoolMode::Transaction;
    match if clean { Ok(()) } else { server.clean().await } {
        Ok(()) => return pool.give_back(server),
        Err(error) => debug!(tenant = pool.tenant.name, %error, "a server could not be cleaned"),
    }
    terminate(&mut server).await;
}

/// Ends a server's session as PostgreSQL likes it: with Terminate. Behind a part of a message it would be taken for the rest, and
/// that message be carried out.
async fn terminate(server: &mut Server) {
    if !server.takes_message() {
        return;
    }
    let _ = tokio::time::timeout(LAST_WORDS, server.stream.write_all(&[b'X', 0, 0, 0, 4])).await;
}

/// Reads the replies that a client no longer wants; `false` if the server is not to be used any more. One that waits for what
/// the client will never send, the rest of a COPY or the Sync of a batch, gets the client's Terminate and ends.
async fn run_to_end(server: &mut Server, pool: &Pool) -> bool {
    let mut nobody = ClientSide::new(
        crate::data_path::exchange::SessionRules::nobody(&pool.statements),
        server.side.applied.clone(),
        0,
    );
    let (mut chunk, mut scratch, mut is_ending) = (vec![0; 16 * 1024], Vec::new(), false);
    loop {
        let drained = std::future::poll_fn(|cx| match server.unsent.drain(&mut server.stream, cx) {
            Ok(true) => std::task::Poll::Ready(true),
            Ok(false) => std::task::Poll::Pending,
            Err(_) => std::task::Poll::Ready(false),
        });
        if !drained.await {
            return false;
        }
        let replies = &server.side.replies;
        if !replies.is_working() {
            return true;
        }
        if !is_ending && (replies.takes_copy_data() || replies.is_unsynced()) {
            if !server.takes_message() {
                return false;
            }
            is_ending = true;
            terminate(server).await;
        }
        let Ok(read @ 1..) = server.stream.read(&mut chunk).await else { return false };
        let said = chunk.get(..read).unwrap_or_default();
        let mut out = Outgoing::new(said, &mut scratch);
        if server.side.take(said, &mut nobody, &mut out, &|_, _| false).is_err() {
            return false;
        }
    }
}

/// Writes what is left and closes, so that the client reads it all: a socket closed with unread input would reset the
/// connection and might take our last words with it.
pub async fn say_goodbye(mut client: Stream, mut unsent: Unsent) {
    let goodbye = async {
        std::future::poll_fn(|cx| match unsent.drain(&mut client, cx) {
            Ok(false) => std::task::Poll::Pending,
            Ok(true) | Err(_) => std::task::Poll::Ready(()),
        })
        .await;
        client.shutdown().await?;
        let mut ignored = [0; 1024];
        while client.read(&mut ignored).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    let _ = tokio::time::timeout(LAST_WORDS, goodbye).await;
}
