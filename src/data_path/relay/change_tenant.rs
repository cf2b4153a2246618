//! A service login's session on its way from tenant to tenant: when it may go, and how it gets there.
//!
//! It moves only while it holds no server. What it is in then is left behind whole: pool, worker, place among the tenant's
//! sessions. What it takes along is its connection, its settings and its prepared statements, as texts.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use tracing::warn;

use super::{BUFFERS, Relay, Step, no_tenant, session_end::SessionEnd, timing::Traffic};
use crate::{
    data_path::{
        exchange::ClientSide,
        login::connection_limits::ConnectionPermit,
        proxy::Proxy,
        session_state::{Settings, pins::Pins},
        sessions::registry::Registered,
        tenant_switch::{
            Plan, TenantRequest,
            local_answers::{LocalStep, first_text},
            switcher::{SwitchTarget, SwitchWait, TenantSwitcher, target_name},
        },
        worker::Worker,
    },
    error::{ClientError, IdentityError, TenantSwitchError},
    wire::{message::Severity, stream::Stream, unsent::Unsent},
};

/// A session between two places: everything of it that is not the place's.
#[derive(Debug)]
pub struct DetachedSession {
    /// The connection.
    pub client: Stream,
    /// What the client was slow to take.
    pub unsent: Unsent,
    /// The client's side of an exchange.
    pub side: ClientSide,
    /// What the client sent that no server has got.
    pub inbox: Vec<u8>,
    /// What others see of the session.
    pub handle: Registered,
    /// `query_wait_timeout`.
    pub query_wait: Duration,
    /// What the client is told when it is between two transactions next.
    pub leaving: Option<Box<ClientError>>,
    /// Of a service login's session: what it chooses by.
    pub switcher: Option<Box<TenantSwitcher>>,
    /// What it has done so far.
    pub traffic: Traffic,
    /// What all clients share.
    pub proxy: Arc<Proxy>,
}

/// A session that moves, and where to.
pub type SessionTransfer = Box<(DetachedSession, SwitchTarget)>;

impl Relay {
    /// Goes on with the pool that has taken the place of a retired one.
    pub(in crate::data_path) fn succeed(&mut self) -> Result<(), SessionEnd> {
        self.pool =
            self.pool.current().ok_or_else(|| SessionEnd::Refused(ClientError::AdminShutdown.into()))?;
        self.side.set_tenant_access(self.pool.place.clone());
        self.side.start_settings.pool_replaced();
        Ok(())
    }

    /// Whether what the client sends is for the desk, though a server is held.
    #[inline]
    pub(in crate::data_path) fn is_answered_locally(&self) -> bool {
        self.switcher.as_ref().is_some_and(|switcher| {
            self.server.is_some() && (switcher.responder.is_in_batch() || self.side.is_skipping_rejected())
        })
    }

    /// Whether what the client has sent need not be shown to the desk before a server is borrowed for it.
    #[inline]
    pub(in crate::data_path) fn needs_server(&self, sent: &[u8]) -> bool {
        let passes =
            |switcher: &TenantSwitcher| !switcher.is_new && switcher.responder.passes(sent, &self.side);
        self.switcher.as_ref().is_none_or(|switcher| passes(switcher))
    }

    /// Whether nothing more is read from the client for now.
    #[inline]
    pub(in crate::data_path) fn holds_back(&self) -> bool {
        self.switcher.as_ref().is_some_and(|switcher| switcher.wait != SwitchWait::No)
    }

    /// Keeps what must wait until everything before it is answered.
    #[cold]
    pub(in crate::data_path) fn hold_back(&mut self, rest: Vec<u8>, waits: SwitchWait) -> Result<(), Step> {
        self.inbox = rest;
        let (proxy, first) = (&self.proxy, Some(self.pool.tenant.id));
        let switcher =
            self.switcher.get_or_insert_with(|| TenantSwitcher::new(proxy.clone(), first, Arc::default()));
        switcher.wait = waits;
        Ok(())
    }

    /// An employee's session has changed its password, and needs nobody for that any more.
    fn dismiss(&mut self) {
        let chooses = self.side.rules().may_switch_tenant;
        self.switcher.take_if(|switcher| !chooses && switcher.is_idle());
    }

    /// Whether there is something to decide about the session's tenant, which cannot be done within a poll.
    pub(in crate::data_path) fn is_called(&self) -> bool {
        let Some(switcher) = &self.switcher else { return false };
        if self.cancelling.is_some() {
            return false;
        }
        let replies = self.server.as_ref().map(|server| &server.side.replies);
        let over = replies.is_none_or(|replies| replies.is_over())
            && !self.side.mid_message()
            && self.held.is_empty();
        let answered = replies.is_none_or(|replies| !replies.is_working() || replies.takes_copy_data());
        switcher.is_to_leave() && over || switcher.wait != SwitchWait::No && answered
    }

    /// Lets the desk answer what it can, while no server is held. `None`: what is in `inbox` is for a server, and one may be
    /// borrowed for it.
    #[cold]
    pub(in crate::data_path) fn answer_locally(&mut self, inbox: &mut Vec<u8>) -> Option<Option<Step>> {
        if self.pool.is_retired()
            && let Err(end) = self.succeed()
        {
            return Some(Some(Step::End(end)));
        }
        let switcher = self.switcher.as_mut()?;
        let mut replies = Vec::new();
        let led = match switcher.responder.next(
            inbox,
            &mut self.side,
            Some(&self.pool.tenant.name),
            &mut replies,
        ) {
            Err(refusal) => return Some(Some(Step::End(SessionEnd::Refused(refusal.into())))),
            Ok((used, led)) => {
                inbox.drain(..used);
                led
            }
        };
        self.unsent.push(&replies);
        let led = match led {
            LocalStep::Server if switcher.is_new => Some(Some(Step::AcquireServer)),
            LocalStep::Server => None,
            LocalStep::Waits => Some(None),
            LocalStep::Terminated => Some(Some(Step::End(SessionEnd::Terminated))),
            LocalStep::Ended => Some(Some(Step::SwitchTenant)),
            LocalStep::Choose(request) => {
                switcher.request = Some(request);
                Some(Some(Step::SwitchTenant))
            }
            LocalStep::SetPassword(password) => {
                switcher.password = Some(password);
                Some(Some(Step::SwitchTenant))
            }
        };
        self.dismiss();
        led
    }

    /// Does what [`Self::is_called`] is about, and looks at what else the client has sent. Where it leads, if the session
    /// moves.
    pub(in crate::data_path) async fn switch_tenant(&mut self) -> Result<Option<SwitchTarget>, SessionEnd> {
        if self.pool.is_retired() && self.server.is_none() {
            self.succeed()?;
        }
        let Some(mut switcher) = self.switcher.take() else { return Ok(None) };
        let moved = self.with_switcher(&mut switcher).await;
        self.side.set_current_tenant(switcher.stance());
        self.switcher = Some(switcher);
        self.dismiss();
        match moved? {
            // Nobody would tell it what it goes on listening to.
            Some(_) if self.subscription.is_some() => {
                Err(SessionEnd::Refused(ClientError::ListenerPaused.into()))
            }
            Some(target) => Ok(Some(target)),
            None => self.pass_on().await.map(|()| None),
        }
    }

    async fn with_switcher(
        &mut self,
        switcher: &mut TenantSwitcher,
    ) -> Result<Option<SwitchTarget>, SessionEnd> {
        let waits = std::mem::replace(&mut switcher.wait, SwitchWait::No);
        if self.server.as_ref().is_some_and(|server| !server.side.replies.is_over()) {
            if waits == SwitchWait::Choice {
                self.deny_first();
            }
            return Ok(None);
        }
        let here = (self.pool.tenant.id, self.pool.access);
        let mut first = waits == SwitchWait::Choice;
        loop {
            if switcher.is_to_leave()
                && let Some(target) = switcher.back(&self.handle, here).await
            {
                return Ok(Some(target));
            }
            let mut replies = Vec::new();
            let name = &self.pool.tenant.name;
            let asked = switcher.request.take().map(LocalStep::Choose);
            let (used, next) = match asked.or_else(|| switcher.password.take().map(LocalStep::SetPassword)) {
                Some(next) => (0, next),
                None => {
                    let next = switcher.responder.next(&self.inbox, &mut self.side, Some(name), &mut replies);
                    next.map_err(|refusal| SessionEnd::Refused(refusal.into()))?
                }
            };
            self.inbox.drain(..used);
            let first = std::mem::take(&mut first) && used == 0;
            match next {
                LocalStep::Choose(request) => {
                    let found = match self.is_free_to_go(switcher, &request) {
                        Ok(()) => switcher.follow(&request, &self.handle, Some(here)).await,
                        Err(refusal) => Err(refusal),
                    };
                    match &found {
                        Ok(target) => {
                            switcher.responder.chosen(target_name(target.as_ref(), Some(name)), &mut replies)
                        }
                        Err(refusal) => switcher.responder.refuse(refusal, &mut self.side, &mut replies),
                    }
                    if let Ok(Some(target)) = found {
                        self.unsent.push(&replies);
                        return Ok(Some(target));
                    }
                }
                LocalStep::SetPassword(password) => {
                    switcher.set_password(&self.handle, password, &mut self.side, &mut replies).await;
                }
                // What was held back for a choice is none to the desk: it must not come round again.
                LocalStep::Server if first => {
                    ClientError::from(TenantSwitchError::NotAlone).write(Severity::Error, &mut replies);
                    self.side.skip_request(switcher.responder.failed());
                }
                LocalStep::Ended => {}
                LocalStep::Waits | LocalStep::Server => {
                    if next == LocalStep::Server && self.server.is_some() {
                        switcher.responder.leave_batch();
                    }
                    self.unsent.push(&replies);
                    return Ok(None);
                }
                LocalStep::Terminated => return Err(SessionEnd::Terminated),
            }
            self.unsent.push(&replies);
        }
    }

    /// A session that keeps its server may name the tenant that it is in.
    fn is_free_to_go(&self, switcher: &TenantSwitcher, request: &TenantRequest) -> Result<(), ClientError> {
        let id = self.pool.tenant.id;
        let stays = match &request.tenant {
            Some(name) => **name == *self.pool.tenant.name,
            None => switcher.first == Some(id),
        };
        let pins = self.server.as_ref().map_or(Pins::empty(), |server| server.side.replies.pins());
        // What `currval` remembers is about this tenant's sequences: nobody misses it at another.
        let mut kept = pins.difference(Pins::SEQUENCES);
        if self.subscription.is_some() {
            kept.insert(Pins::LISTEN);
        }
        match () {
            () if stays => Ok(()),
            () if self.server.is_some() && !self.side.follows() => Err(TenantSwitchError::SessionMode.into()),
            () if kept.is_empty() => Ok(()),
            () => Err(ClientError::TenantPinned { reasons: kept.names().collect::<Vec<_>>().join(", ") }),
        }
    }

    /// The choice at the front of the inbox comes too late: the server is made to refuse it.
    fn deny_first(&mut self) {
        let Some(server) = self.server.as_mut() else { return };
        let mut out = Vec::new();
        let verdict = first_text(&self.inbox, &self.side).map(|sql| Plan::of(sql, &self.side));
        let reason = match verdict {
            Some(Plan::Password(_)) => IdentityError::PasswordInTransaction.into(),
            _ => TenantSwitchError::TransactionBegun.into(),
        };
        let used = self.side.reject(&self.inbox, reason, &mut server.side, &mut out);
        self.inbox.drain(..used);
        server.unsent.push(&out);
    }

    /// What is left in the inbox goes to the server that the session holds.
    async fn pass_on(&mut self) -> Result<(), SessionEnd> {
        if self.server.is_none() || self.inbox.is_empty() || self.is_answered_locally() {
            return Ok(());
        }
        let inbox = std::mem::take(&mut self.inbox);
        let step = poll_fn(|cx| {
            BUFFERS.with_borrow_mut(|buffers| Poll::Ready(self.forward(&inbox, &mut buffers.scratch, cx)))
        });
        match step.await {
            Err(Step::End(end)) => Err(end),
            _ => Ok(()),
        }
    }

    /// Before the first statement that a tenant's servers get from a session that has come from elsewhere: its settings are
    /// tried, unless they are known to be good. `false`: the statement has been refused.
    pub(in crate::data_path) async fn settle_in(&mut self) -> Result<bool, SessionEnd> {
        if let Some(pool) = self.pool.current().filter(|_| self.pool.is_retired()) {
            self.side.set_tenant_access(pool.place.clone());
            self.pool = pool;
        }
        let pool = self.pool.clone();
        let wanted = Settings::clone(&self.side.wanted);
        let greeted = tokio::select! {
            greeted = pool.startup_status(wanted, self.query_wait) => greeted,
            interrupted = self.interrupted() => Err(interrupted?),
        };
        match greeted {
            Ok(status) => {
                let Some(switcher) = self.switcher.as_mut() else { return Ok(true) };
                switcher.is_new = false;
                if let Err(limit) = self.side.keep(status.settings) {
                    return Err(SessionEnd::Refused(self.side.rules().too_much(limit).into()));
                }
                self.side.start_settings = status.start.into();
                Ok(true)
            }
            // Something the session has set does not exist there, a role perhaps.
            Err(refusal @ ClientError::Server { .. }) => Err(SessionEnd::Refused(refusal.into())),
            Err(refusal) => {
                self.refuse_request(&refusal);
                Ok(false)
            }
        }
    }

    /// The request at the front of the inbox is answered with an error, and left out.
    pub(in crate::data_path) fn refuse_request(&mut self, refusal: &ClientError) {
        let status = self.switcher.as_mut().map_or(b'I', |switcher| switcher.responder.failed());
        self.side.skip_request(status);
        let mut replies = Vec::new();
        refusal.write(Severity::Error, &mut replies);
        self.unsent.push(&replies);
    }

    /// Leaves the tenant for another room. The server it holds is cleaned, or closed, without it.
    pub(in crate::data_path) fn into_transfer(mut self: Box<Self>, target: SwitchTarget) -> SessionTransfer {
        self.side.take_held(&mut self.inbox);
        // What it has not heard yet of channels there is nothing to it any more.
        drop(self.handle.take_notifications());
        target.receive(&mut self.side);
        if let Some(switcher) = self.switcher.as_mut() {
            switcher.arrive();
        }
        if let Some(server) = self.server.take() {
            self.handle.server_process_id.store(0, Ordering::Relaxed);
            self.set_pins(Pins::empty());
            self.leave_behind(server, false, false);
        }
        let Self {
            client, unsent, side, inbox, handle, query_wait, leaving, switcher, timing, proxy, ..
        } = *self;
        let traffic = timing.traffic;
        Box::new((
            DetachedSession {
                client,
                unsent,
                side,
                inbox,
                handle,
                query_wait,
                leaving,
                switcher,
                traffic,
                proxy,
            },
            target,
        ))
    }
}

/// Serves a session that moves from room to room, to its end. Runs on the worker of the room it is in; `at` is that
/// worker's number, `None` where any will do.
pub(in crate::data_path) async fn run_session(
    mut next: SessionTransfer,
    permit: ConnectionPermit,
    at: Option<usize>,
) {
    loop {
        let (mut session, target) = *next;
        let worker = match &target {
            SwitchTarget::Tenant(pool, _) if at != Some(pool.worker.index) => Some(pool.worker.clone()),
            _ => None,
        };
        if let Some(worker) = worker {
            let tenant = target_name(Some(&target), None).unwrap_or_default();
            if let Err(error) = session.client.detach() {
                return warn!(tenant, side = "client", %error, "cannot move a session to its worker");
            }
            return move_to(&worker, Box::new((session, target)), permit);
        }
        let gone = match target {
            SwitchTarget::Tenant(pool, present) => {
                let gone = Box::new(Relay::new(session, pool)).run().await;
                drop(present);
                gone
            }
            SwitchTarget::NoTenant => {
                session.handle.enter(None);
                no_tenant::run(session).await
            }
        };
        match gone {
            Some(transfer) => next = transfer,
            None => return,
        }
    }
}

/// Goes on with [`travel`] on another worker.
fn move_to(worker: &Arc<Worker>, mut next: SessionTransfer, permit: ConnectionPermit) {
    let index = worker.index;
    worker.spawn(async move {
        if let Err(error) = next.0.client.attach() {
            return warn!(side = "client", %error, "cannot move a session to its worker");
        }
        run_session(next, permit, Some(index)).await;
    });
}
