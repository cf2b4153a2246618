//! A session that is between two transactions moves to the process that takes over, with its connection, settings,
//! prepared statements and cancel key. What it keeps on a server cannot move; such a session ends.
//!
//! The state of TLS cannot move either: this process goes on to encrypt and decrypt, and passes the bytes on
//! (`takeover_tls_timeout`).

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional},
    sync::oneshot,
};
use tracing::{info, warn};

use super::{
    Relay,
    client_session::ClientSession,
    session_end::{SessionEnd, log_end},
};
use crate::{
    data_path::{
        lock::locked,
        packed_session::{
            MoveOutcome, MovingSession, PackedListening, PackedLogin, PackedSession, PackedTenant, SessionV1,
        },
        prepared::row_description::RowDescription,
        session_state::pins::Pins,
        sessions::registry::SessionHandle,
        tenant::{Access, TenantAccess, verifier_digest},
        worker::whole_ms,
    },
    error::ClientError,
    wire::stream::{Socket, Stream},
};

impl Relay {
    /// The process is being replaced. `true`: the connection is to be closed here without a word, because the
    /// other process has it.
    pub(super) async fn moves_to_successor(&mut self) -> bool {
        let is_between =
            self.held_reply.is_empty() && self.cancelling.is_none() && self.returns_server_to_move();
        if !is_between {
            return false;
        }
        let left = match &self.listening {
            Some(_) => match self.leave_listener().await {
                Some(left) => Some(left),
                None => return false,
            },
            None => None,
        };
        self.session.moves_to_successor(Some(&self.pool.tenant_access), left).await
    }

    /// Whether the session moves now, with messages that no server has got.
    pub(super) fn takes_inbox_along(&self, reason: &ClientError) -> bool {
        *reason == ClientError::Replaced && self.server.is_none() && self.session.may_pass_client_on()
    }

    /// A server that is kept only because it has advanced a sequence goes back. `false`: it is kept for
    /// something else.
    fn returns_server_to_move(&mut self) -> bool {
        let Some(server) = &self.server else { return true };
        let may_return = self.session.side.follows()
            && server.side.replies.is_over()
            && server.is_between_messages()
            && server.side.replies.pins() == Pins::SEQUENCE_WRITTEN;
        if may_return {
            self.set_pins(Pins::empty());
            self.give_back();
        }
        may_return
    }
}

impl ClientSession {
    /// Moves a session that holds no server. `left`: its channels, and when the listener has got the mark. `true`: it
    /// has moved, or may have.
    pub(super) async fn moves_to_successor(
        &mut self,
        tenant_access: Option<&TenantAccess>,
        left: Option<(PackedListening, oneshot::Receiver<()>)>,
    ) -> bool {
        let Some(successor) = locked(&self.proxy.successor).clone() else { return false };
        let Some(passed) = self.pass_client_on() else { return false };
        let (listening, mark_passed) = left.unzip();
        let Some(packed) = self.pack(tenant_access, listening, passed.until) else { return false };
        let (outcome, decided) = oneshot::channel();
        let (notified, notifications) = oneshot::channel();
        let notifications = mark_passed.is_some().then_some(notifications);
        let moving = MovingSession { packed, socket: passed.socket, outcome, notifications };
        if successor.send(moving).await.is_err() {
            return false;
        }
        let tenant = tenant_access.map(|tenant_access| &*tenant_access.tenant.name);
        let (login, connection) = (&self.handle.login.name, self.handle.process_id);
        match decided.await {
            Ok(MoveOutcome::Moved) => {
                // The other process has sent the mark. If this listener is lost, it is told so.
                if let Some(mark_passed) = mark_passed
                    && mark_passed.await.is_ok()
                {
                    let _ = notified.send(self.handle.take_notifications());
                }
                log_end(&self.proxy, tenant, &self.handle, &self.traffic, &SessionEnd::Moved);
                self.proxy.sessions.moved.fetch_add(1, Ordering::Relaxed);
                if let Some(near) = passed.near {
                    let client = std::mem::replace(&mut self.client, Stream::Plain(Socket::Gone));
                    let counted = self.proxy.sessions.forward();
                    tokio::spawn(async move {
                        forward(client, near).await;
                        drop(counted);
                    });
                }
                true
            }
            Ok(MoveOutcome::Refused(reason)) => {
                info!(tenant, login, connection, reason, "the process that takes over refused a session");
                false
            }
            // The other process is gone, and its descriptor with it; or it serves the session.
            Err(_) => {
                warn!(tenant, login, connection, "session lost on its way to the process that takes over");
                true
            }
        }
    }

    fn may_pass_client_on(&self) -> bool {
        !self.client.is_tls() || self.proxy.config.load().timeouts.takeover_tls.is_some()
    }

    /// The connection for the other process. `None`: there is none.
    fn pass_client_on(&self) -> Option<PassedClient> {
        if !self.client.is_tls() {
            let until = self.handle.forwarded_until;
            return Some(PassedClient { socket: self.client.duplicate()?, near: None, until });
        }
        let until = SystemTime::now() + self.proxy.config.load().timeouts.takeover_tls?;
        let (near, far) = UnixStream::pair().ok()?;
        near.set_nonblocking(true).and_then(|()| far.set_nonblocking(true)).ok()?;
        Some(PassedClient { socket: far.into(), near: Some(near), until: Some(until) })
    }

    /// `None`: the session cannot move now.
    fn pack(
        &mut self,
        tenant_access: Option<&TenantAccess>,
        listening: Option<PackedListening>,
        forwarded_until: Option<SystemTime>,
    ) -> Option<Vec<u8>> {
        if self.end_of_input.is_some() {
            return None;
        }
        self.side.take_held(&mut self.inbox);
        let switcher = match &self.switcher {
            Some(switcher) => Some(switcher.pack()?),
            None => None,
        };
        let since_1970 = |moment: SystemTime| whole_ms(moment.duration_since(UNIX_EPOCH).unwrap_or_default());
        let packed = PackedSession::V1(Box::new(SessionV1 {
            hash_sample: RowDescription::sample(),
            process_id: self.handle.process_id,
            secret: self.handle.secret().to_vec(),
            connected_at_ms: since_1970(self.handle.connected_at),
            peer: self.handle.peer,
            addresses: self.handle.addresses,
            tls: self.handle.tls,
            forwarded_until_ms: forwarded_until.map(since_1970),
            login: pack_login(&self.handle),
            tenant: tenant_access.map(|tenant_access| PackedTenant {
                id: tenant_access.tenant.id,
                read_only: tenant_access.access == Access::ReadOnly,
            }),
            application_name: self.handle.application_name().into(),
            inbox: self.inbox.clone(),
            unsent: self.unsent.rest().to_vec(),
            transactions: self.traffic.transactions,
            bytes_in: self.traffic.bytes_in,
            bytes_out: self.traffic.bytes_out,
            listening,
            switcher,
            side: self.side.pack()?,
        }));
        serde_json::to_vec(&packed).ok()
    }
}

/// A client's connection for another process.
struct PassedClient {
    socket: OwnedFd,
    /// With TLS: this end of it.
    near: Option<UnixStream>,
    /// With TLS: when this process stops passing bytes on.
    until: Option<SystemTime>,
}

/// Passes on what a client with TLS sends, and what it is sent, until one side closes the connection.
async fn forward(mut client: Stream, near: UnixStream) {
    let Ok(mut near) = tokio::net::UnixStream::from_std(near) else { return };
    // TLS may hold bytes that it has encrypted.
    if client.flush().await.is_ok() {
        let _ = copy_bidirectional(&mut client, &mut near).await;
    }
}

fn pack_login(handle: &SessionHandle) -> PackedLogin {
    PackedLogin {
        id: handle.login.id,
        name: handle.login.name.clone(),
        verifier_digests: handle.verifiers().iter().map(verifier_digest).collect(),
    }
}
