//! The end of a session: what is logged, what the client gets, and how its server is cleaned or closed, so
//! that no other session sees anything of this one.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    Relay, cancel,
    client_session::{ClientSession, Traffic},
};
use crate::{
    config::PoolMode,
    data_path::{
        exchange::{ClientSide, ExchangeError},
        login::connection_limits::ClientAddress,
        pool::{Pool, PooledServer, shared_listener::ListenerLost},
        proxy::Proxy,
        server::connection::{AskError, Server},
        session_state::pins::Pins,
        sessions::registry::SessionHandle,
    },
    error::ClientError,
    wire::{
        message::Severity, outgoing::Outgoing, server_error::ServerError, stream::Stream, unsent::Unsent,
    },
};

/// How long a client may take to read the last message.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a session ends. `Display` is for the log.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The client sent Terminate.
    #[error("client terminated")]
    Terminated,
    /// The client's connection was lost; [`Loss::Closed`]: it has closed it, or its direction of it, and
    /// everything that it had sent is served.
    #[error("client lost: {0}")]
    ClientLost(Loss),
    /// The server's connection was lost.
    #[error("server lost: {0}")]
    ServerLost(Loss),
    /// The server has closed the connection after a FATAL error, which the client got.
    #[error("server closed the connection")]
    ServerClosed,
    /// The process that takes over serves it.
    #[error("moved to the process that takes over")]
    Moved,
    /// The proxy ends it with this error. Boxed: the task of an idle client has room for an end.
    #[error("{0}")]
    Refused(Box<ClientError>),
}

/// How a connection was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The other end closed it.
    Closed,
    /// A read or a write failed.
    Failed(io::ErrorKind),
    /// The server did not answer a query of the proxy in time.
    Unanswered,
    /// The other end broke the protocol.
    Protocol,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed | Self::Failed(io::ErrorKind::UnexpectedEof) => f.write_str("connection closed"),
            Self::Failed(kind) if is_timeout(*kind) => {
                f.write_str("no answer to TCP (tcp_user_timeout, keepalive)")
            }
            Self::Failed(kind) => write!(f, "{kind}"),
            Self::Unanswered => f.write_str("no answer to a query of the proxy"),
            Self::Protocol => f.write_str("protocol error"),
        }
    }
}

impl Loss {
    /// Of a read or a write that moved no bytes.
    fn of(outcome: &io::Result<()>) -> Self {
        outcome.as_ref().err().map_or(Self::Closed, |error| Self::Failed(error.kind()))
    }
}

impl SessionEnd {
    /// Whether the session goes on at the process that takes over, if it can.
    pub(super) fn is_for_successor(&self) -> bool {
        matches!(self, Self::Refused(reason) if **reason == ClientError::Replaced)
    }

    /// A read or a write on the client's connection moved no bytes.
    #[cold]
    pub(super) fn client_lost(outcome: io::Result<()>) -> Self {
        Self::ClientLost(Loss::of(&outcome))
    }

    /// The same on the server's connection.
    #[cold]
    pub(super) fn server_lost(outcome: io::Result<()>) -> Self {
        Self::ServerLost(Loss::of(&outcome))
    }

    /// A write to the server has failed because nothing came back for too long. Other errors are found when
    /// the server is read from, together with its last words.
    pub(super) fn unless_timed_out(outcome: io::Result<bool>) -> Result<bool, Self> {
        match outcome {
            Err(error) if is_timeout(error.kind()) => Err(Self::ServerLost(Loss::Failed(error.kind()))),
            outcome => Ok(outcome.unwrap_or(false)),
        }
    }
}

impl From<ListenerLost> for SessionEnd {
    fn from(_: ListenerLost) -> Self {
        ClientError::ListenerLost.into()
    }
}

impl From<AskError> for SessionEnd {
    /// A question of the proxy got no answer that it can go on with.
    fn from(error: AskError) -> Self {
        Self::ServerLost(match error {
            AskError::Unanswered => Loss::Unanswered,
            AskError::Lost(error) => Loss::Failed(error.kind()),
            AskError::Refused(_) => Loss::Protocol,
        })
    }
}

impl From<ClientError> for SessionEnd {
    fn from(client_error: ClientError) -> Self {
        Self::Refused(client_error.into())
    }
}

/// Where a router reports the loss of the path, the kernel gives that error in place of a timeout.
fn is_timeout(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    matches!(kind, TimedOut | HostUnreachable | NetworkUnreachable)
}

/// The line that the end of a session leaves in the log; none where `[log] connections` is off.
pub(super) fn log_end(
    proxy: &Proxy,
    tenant: Option<&str>,
    session: &SessionHandle,
    traffic: &Traffic,
    end: &SessionEnd,
) {
    if !proxy.config.load().log.connections {
        return;
    }
    let duration = session.connected_at.elapsed().unwrap_or_default();
    info!(
        tenant,
        login = session.login.name,
        connection = session.process_id,
        address = %ClientAddress(session.peer),
        duration_ms = duration.as_millis() as u64,
        transactions = traffic.transactions,
        bytes_in = traffic.bytes_in,
        bytes_out = traffic.bytes_out,
        reason = %end,
        "session ended"
    );
}

impl Relay {
    /// Tells the client why, closes its connection, and cleans or closes the server.
    pub(super) async fn end(mut self, end: SessionEnd) {
        let final_error = match &end {
            SessionEnd::Refused(client_error) => Some(ClientError::clone(client_error)),
            SessionEnd::ServerLost(_) if self.is_committing() => Some(ClientError::OutcomeUnknown),
            SessionEnd::ServerLost(_) => Some(ClientError::ServerLost),
            _ => None,
        };
        if let SessionEnd::ServerLost(cause) = &end {
            self.log_lost_server(*cause);
        }
        log_end(
            &self.session.proxy,
            Some(&self.pool.tenant.name),
            &self.session.handle,
            &self.session.traffic,
            &end,
        );
        // Behind part of a message, an error would be read as the rest of it: as data in a row.
        let in_step = self.server.as_ref().is_none_or(|server| !server.side.mid_message());
        let is_end_passed_on = self.is_end_passed_on();
        if let Some(server) = self.server.take() {
            self.session.handle.server_process_id.store(0, Ordering::Relaxed);
            self.set_pins(Pins::empty());
            match end {
                SessionEnd::Terminated => {
                    let is_working = server.side.replies.is_working();
                    self.clean_in_background(server, is_working, false);
                }
                // It has rolled back and closed the connection, or does so.
                SessionEnd::ClientLost(Loss::Closed) if is_end_passed_on => drop(server),
                SessionEnd::ClientLost(_) | SessionEnd::Refused(_) => {
                    self.clean_in_background(server, false, true)
                }
                _ => drop(server),
            }
        }
        self.listening = None;
        self.session.unsent.push(&std::mem::take(&mut self.held_reply));
        let mut bytes = Vec::new();
        if let Some(client_error) = final_error.filter(|_| in_step) {
            client_error.write(Severity::Fatal, &mut bytes);
        }
        let may_read = match end {
            // One that was still there a moment ago.
            SessionEnd::ClientLost(Loss::Closed) => self.session.end_of_input.is_some(),
            SessionEnd::ClientLost(_) | SessionEnd::Terminated => false,
            _ => true,
        };
        if may_read {
            self.session.unsent.push(&bytes);
            // The session is not listed any more, though its client may take its time to read.
            let ClientSession { client, unsent, handle, .. } = self.session;
            drop(handle);
            flush_and_close(client, unsent).await;
        }
    }

    fn log_lost_server(&self, cause: Loss) {
        let (Some(server), Some(suppressed)) =
            (self.server.as_ref(), self.pool.stats.lost_servers_log.admit(Instant::now()))
        else {
            return;
        };
        warn!(
            tenant = self.pool.tenant.name,
            login = self.session.handle.login.name,
            connection = self.session.handle.process_id,
            side = "server",
            host = self.pool.tenant.host.name,
            server_pid = server.process_id,
            %cause,
            in_transaction = !server.side.replies.is_over(),
            suppressed,
            "server connection lost"
        );
    }

    /// The exchange with the server has failed. Returns the end of the session.
    pub(super) fn broken(&self, broken: ExchangeError) -> SessionEnd {
        warn!(
            tenant = self.pool.tenant.name,
            login = self.session.handle.login.name,
            connection = self.session.handle.process_id,
            side = "server",
            cause = %broken,
            "protocol error; both connections closed"
        );
        match broken {
            ExchangeError::RejectedRequest(ServerError { sqlstate, mut message, details }) => {
                if !sqlstate.starts_with("57P") {
                    message.insert_str(0, "cannot restore the session's settings on another server: ");
                }
                SessionEnd::Refused(ClientError::Server { sqlstate, message, details }.into())
            }
            ExchangeError::Frame(_) | ExchangeError::Desync(_) => {
                self.pool.stats.desyncs.fetch_add(1, Ordering::Relaxed);
                SessionEnd::ServerLost(Loss::Protocol)
            }
        }
    }

    fn is_committing(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.side.replies.is_committing())
    }

    /// Cleans the server in a task of its own. `finish`: runs the client's requests to their end first, as
    /// PostgreSQL does behind Terminate. `cancel`: cancels what the server works on.
    pub(super) fn clean_in_background(&mut self, server: Box<PooledServer>, finish: bool, cancel: bool) {
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

/// Cleans the server and gives it back, or closes it.
async fn make_reusable(mut server: Box<PooledServer>, pool: &Arc<Pool>) {
    let clean = server.is_reusable() && pool.rules.mode == PoolMode::Transaction;
    match if clean { Ok(()) } else { server.clean().await } {
        Ok(()) => return pool.give_back(server),
        Err(error) => debug!(tenant = pool.tenant.name, %error, "server closed: cleaning it failed"),
    }
    terminate(&mut server).await;
}

/// Sends the server a Terminate, unless it has part of a message: it would take the Terminate for the rest,
/// and carry that message out.
async fn terminate(server: &mut Server) {
    if !server.takes_message() {
        return;
    }
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, server.stream.write_all(&[b'X', 0, 0, 0, 4])).await;
}

/// Reads the replies that a client no longer wants. `false`: the server must be closed. A server that waits
/// for the rest of a COPY or the Sync of a batch gets the client's Terminate, and ends.
async fn run_to_end(server: &mut Server, pool: &Pool) -> bool {
    let mut discarded = ClientSide::new(
        crate::data_path::exchange::SessionRules::for_discarded_replies(&pool.statements),
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
        if server.side.take(said, &mut discarded, &mut out, &|_, _| false).is_err() {
            return false;
        }
    }
}

/// Writes the unsent bytes and closes, so that the client reads all of them: closing a socket with unread
/// input would reset the connection.
pub async fn flush_and_close(mut client: Stream, mut unsent: Unsent) {
    let close = async {
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
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, close).await;
}
