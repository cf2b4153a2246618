//! A session without TLS that is between two transactions moves to the process that takes over, with its connection,
//! settings, prepared statements and cancel key. What it keeps on a server cannot move; such a session ends.

use std::{os::fd::OwnedFd, sync::atomic::Ordering, time::UNIX_EPOCH};

use tokio::sync::oneshot;
use tracing::{info, warn};

use super::{
    Relay,
    client_session::ClientSession,
    session_end::{SessionEnd, log_end},
};
use crate::{
    data_path::{
        packed_session::{MoveOutcome, MovingSession, PackedLogin, PackedSession, PackedTenant, SessionV1},
        prepared::row_description::RowDescription,
        session_state::pins::Pins,
        sessions::registry::SessionHandle,
        tenant::{Access, TenantAccess, verifier_digest},
        worker::whole_ms,
    },
    error::ClientError,
};

impl Relay {
    /// The process is being replaced. `true`: the connection is to be closed here without a word, because the
    /// other process has it.
    pub(super) async fn moves_to_successor(&mut self) -> bool {
        let is_between = self.held_reply.is_empty()
            && self.cancelling.is_none()
            && self.listening.is_none()
            && self.returns_server_to_move();
        is_between && self.session.moves_to_successor(Some(&self.pool.tenant_access)).await
    }

    /// Whether the session moves now, with messages that no server has got.
    pub(super) fn takes_inbox_along(&self, reason: &ClientError) -> bool {
        *reason == ClientError::Replaced
            && self.server.is_none()
            && self.listening.is_none()
            && !self.session.client.is_tls()
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
    /// Moves a session that holds no server. `true`: it has moved, or may have.
    pub(super) async fn moves_to_successor(&mut self, tenant_access: Option<&TenantAccess>) -> bool {
        let Some(successor) = self.proxy.successor.get().cloned() else { return false };
        let Some((packed, socket)) = self.pack(tenant_access) else { return false };
        let (outcome, decided) = oneshot::channel();
        if successor.send(MovingSession { packed, socket, outcome }).await.is_err() {
            return false;
        }
        let tenant = tenant_access.map(|tenant_access| &*tenant_access.tenant.name);
        let (login, connection) = (&self.handle.login.name, self.handle.process_id);
        match decided.await {
            Ok(MoveOutcome::Moved) => {
                log_end(&self.proxy, tenant, &self.handle, &self.traffic, &SessionEnd::Moved);
                self.proxy.sessions.moved.fetch_add(1, Ordering::Relaxed);
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

    /// `None`: the session cannot move now.
    fn pack(&mut self, tenant_access: Option<&TenantAccess>) -> Option<(Vec<u8>, OwnedFd)> {
        if self.end_of_input.is_some() {
            return None;
        }
        self.side.take_held(&mut self.inbox);
        let switcher = match &self.switcher {
            Some(switcher) => Some(switcher.pack()?),
            None => None,
        };
        let connected_at = self.handle.connected_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let packed = PackedSession::V1(Box::new(SessionV1 {
            hash_sample: RowDescription::sample(),
            process_id: self.handle.process_id,
            secret: self.handle.secret().to_vec(),
            connected_at_ms: whole_ms(connected_at),
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
            switcher,
            side: self.side.pack()?,
        }));
        Some((serde_json::to_vec(&packed).ok()?, self.client.duplicate()?))
    }
}

fn pack_login(handle: &SessionHandle) -> PackedLogin {
    PackedLogin {
        id: handle.login.id,
        name: handle.login.name.clone(),
        verifier_digests: handle.verifiers().iter().map(verifier_digest).collect(),
    }
}
