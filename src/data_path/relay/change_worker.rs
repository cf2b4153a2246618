//! A session changes its worker: because it goes to another tenant, or because its pool has other workers now
//! (`pool/placement.rs`). Its sockets leave the reactor of one and enter that of the other.

use std::io;

use tracing::warn;

use super::{
    Relay, acquire_server::ReplyWait, change_tenant::SessionTransfer, client_session::ClientSession,
    no_tenant,
};
use crate::data_path::{
    login::connection_limits::ConnectionPermit, pool::SessionCount, tenant_switch::switcher::SwitchTarget,
};

/// Where a session goes when its relay ends before its client leaves.
#[derive(Debug)]
pub enum Departure {
    /// To another tenant, or to none.
    Tenant(SessionTransfer),
    /// To the worker of its seat.
    Worker(Box<Relay>),
}

/// What a session does next.
#[derive(Debug)]
pub enum Arrival {
    /// It is served at a pool, where it is counted.
    Pool(Box<Relay>, SessionCount),
    NoTenant(Box<ClientSession>),
}

impl From<SessionTransfer> for Arrival {
    fn from(transfer: SessionTransfer) -> Self {
        let (session, target) = *transfer;
        match target {
            SwitchTarget::Tenant(pool, present) => {
                let seat = pool.placement.seat();
                Self::Pool(Box::new(Relay::new(session, pool, seat)), present)
            }
            SwitchTarget::NoTenant => Self::NoTenant(Box::new(session)),
        }
    }
}

impl Relay {
    /// The client has sent the begin of a request, and the pool has other workers: whether the session goes to
    /// another one now, with these bytes. It stays as long as anything is under way.
    #[cold]
    pub(super) fn leaves_worker(&mut self, chunk: &[u8]) -> bool {
        let is_between = self.request_began.is_none()
            && self.session.unsent.is_empty()
            && self.held_reply.is_empty()
            && self.cancelling.is_none()
            && self.wanted_cancels.is_empty();
        let may_leave = match &self.server {
            None => true,
            Some(server) => {
                self.session.switcher.is_none()
                    && server.unsent.is_empty()
                    && server.side.replies.is_over()
                    && server.side.has_whole_messages()
            }
        };
        if !is_between || !may_leave || !self.pool.placement.update(&mut self.seat) {
            return false;
        }
        self.session.inbox.extend_from_slice(chunk);
        if self.server.is_some() {
            self.reply_wait = ReplyWait::Meaning;
        }
        true
    }

    /// Takes its sockets out of this worker's reactor.
    fn leave_reactor(&mut self) -> io::Result<()> {
        self.session.client.detach()?;
        self.server.as_mut().map_or(Ok(()), |server| server.stream.detach())
    }

    /// Registers its sockets with the reactor of its new worker.
    fn enter_reactor(&mut self) -> io::Result<()> {
        self.session.client.attach()?;
        let worker = self.seat.worker.index;
        self.server.as_mut().map_or(Ok(()), |server| server.attach_at(worker))
    }

    fn log_move_failed(&self, error: &io::Error) {
        warn!(
            tenant = self.pool.tenant.name,
            login = self.session.handle.login.name,
            connection = self.session.handle.process_id,
            %error,
            "cannot move a session to its worker; session lost"
        );
    }
}

/// Serves a session to its end, at one tenant and worker after the other.
pub async fn serve(mut next: Arrival, permit: ConnectionPermit) {
    loop {
        let departure = match next {
            Arrival::Pool(mut relay, present) => {
                if !relay.seat.worker.is_here() {
                    return match relay.leave_reactor() {
                        Ok(()) => serve_elsewhere(relay, present, permit),
                        Err(error) => relay.log_move_failed(&error),
                    };
                }
                match relay.run().await {
                    Some(Departure::Worker(relay)) => {
                        next = Arrival::Pool(relay, present);
                        continue;
                    }
                    departure => departure,
                }
            }
            Arrival::NoTenant(session) => {
                session.handle.enter(None);
                // Boxed: each idle client has the memory of this future.
                Box::pin(no_tenant::run(*session)).await.map(Departure::Tenant)
            }
        };
        match departure {
            Some(Departure::Tenant(transfer)) => next = transfer.into(),
            _ => return,
        }
    }
}

/// Goes on with [`serve`] on the worker of the session's seat.
fn serve_elsewhere(mut relay: Box<Relay>, present: SessionCount, permit: ConnectionPermit) {
    let worker = relay.seat.worker.clone();
    worker.spawn(async move {
        match relay.enter_reactor() {
            Ok(()) => serve(Arrival::Pool(relay, present), permit).await,
            Err(error) => relay.log_move_failed(&error),
        }
    });
}
