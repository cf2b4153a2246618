//! A service login's session changes its tenant: when it may, and how it is transferred.
//!
//! It moves only while it holds no server. It leaves its pool, its worker and its entry among the tenant's
//! sessions, and takes along its connection, its settings and the texts of its prepared statements.

use std::sync::{Arc, atomic::Ordering};

use super::{Relay, Step, client_session::ClientSession, session_end::SessionEnd};
use crate::{
    data_path::{
        exchange::ReadAhead,
        session_state::{Settings, pins::Pins},
        tenant_switch::{
            Plan, TenantRequest,
            local_answers::{LocalStep, first_text},
            switcher::{SwitchTarget, SwitchWait, TenantSwitcher},
        },
    },
    error::{ClientError, IdentityError, TenantSwitchError},
    wire::message::Severity,
};

/// A session that changes its tenant, and where it goes.
pub type SessionTransfer = Box<(ClientSession, SwitchTarget)>;

impl Relay {
    /// Goes on with the pool that has replaced a retired one.
    pub(super) fn follow_successor(&mut self) -> Result<(), SessionEnd> {
        self.pool = self.pool.current().ok_or(ClientError::AdminShutdown)?;
        self.session.side.set_tenant_access(self.pool.tenant_access.clone());
        self.session.side.start_settings.pool_replaced();
        Ok(())
    }

    /// Whether the proxy answers the client's next message, although the session holds a server.
    #[inline]
    pub(super) fn is_answered_locally(&self) -> bool {
        self.session.switcher.as_ref().is_some_and(|switcher| {
            self.server.is_some() && (switcher.responder.in_batch || self.session.side.is_skipping_rejected())
        })
    }

    /// What was read of the first message, if only a server can answer it. Conservative: may return `None` for such a
    /// one.
    #[inline]
    pub(super) fn needs_server(&self, sent: &[u8]) -> Option<ReadAhead> {
        match &self.session.switcher {
            None => Some(ReadAhead::default()),
            Some(switcher) if switcher.is_new => None,
            Some(switcher) => switcher.responder.passes(sent, &self.session.side),
        }
    }

    /// Whether nothing more is read from the client for now.
    #[inline]
    pub(super) fn holds_back(&self) -> bool {
        self.session.switcher.as_ref().is_some_and(|switcher| switcher.wait != SwitchWait::No)
    }

    /// Keeps messages that must wait until everything before them is answered.
    #[cold]
    pub(super) fn hold_back(&mut self, rest: Vec<u8>, waits: SwitchWait) -> Result<(), Step> {
        self.session.inbox = rest;
        let (proxy, first) = (&self.session.proxy, Some(self.pool.tenant.id));
        let new = || TenantSwitcher::new(proxy.clone(), first, Arc::default());
        self.session.switcher.get_or_insert_with(new).wait = waits;
        Ok(())
    }

    /// Drops the switcher of an employee's session, which has it only while it changes its password.
    fn drop_idle_switcher(&mut self) {
        let chooses = self.session.side.rules().may_switch_tenant;
        self.session.switcher.take_if(|switcher| !chooses && switcher.is_idle());
    }

    /// Whether the switcher has work that cannot be done within a poll.
    #[inline]
    pub(super) fn has_switch_work(&self) -> bool {
        match &self.session.switcher {
            Some(switcher) => {
                (switcher.is_to_leave() || switcher.wait != SwitchWait::No)
                    && self.may_do_switch_work(switcher)
            }
            None => false,
        }
    }

    #[cold]
    fn may_do_switch_work(&self, switcher: &TenantSwitcher) -> bool {
        if self.cancelling.is_some() {
            return false;
        }
        let replies = self.server.as_ref().map(|server| &server.side.replies);
        let over = replies.is_none_or(|replies| replies.is_over())
            && !self.session.side.mid_message()
            && self.held_reply.is_empty();
        let answered = replies.is_none_or(|replies| !replies.is_working() || replies.takes_copy_data());
        switcher.is_to_leave() && over || switcher.wait != SwitchWait::No && answered
    }

    /// Answers what the proxy can answer, while the session holds no server. `None`: it is for a server.
    #[cold]
    pub(super) fn answer_locally(&mut self, inbox: &mut Vec<u8>) -> Option<Option<Step>> {
        if self.pool.is_retired()
            && let Err(end) = self.follow_successor()
        {
            return Some(Some(Step::End(end)));
        }
        let switcher = self.session.switcher.as_mut()?;
        let mut replies = Vec::new();
        let here = Some(&*self.pool.tenant.name);
        let (used, next) = match switcher.responder.next(inbox, &mut self.session.side, here, &mut replies) {
            Ok(next) => next,
            Err(client_error) => return Some(Some(client_error.into())),
        };
        inbox.drain(..used);
        self.session.unsent.push(&replies);
        let step = match next {
            LocalStep::Server if switcher.is_new => Some(Some(Step::AcquireServer(ReadAhead::default()))),
            LocalStep::Server => None,
            LocalStep::Waits => Some(None),
            LocalStep::Terminated => Some(Some(SessionEnd::Terminated.into())),
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
        self.drop_idle_switcher();
        step
    }

    /// Does the switcher's work, and goes on with the inbox. Returns the target of a change.
    pub(super) async fn switch_tenant(&mut self) -> Result<Option<SwitchTarget>, SessionEnd> {
        if self.pool.is_retired() && self.server.is_none() {
            self.follow_successor()?;
        }
        let Some(mut switcher) = self.session.switcher.take() else { return Ok(None) };
        let moved = self.with_switcher(&mut switcher).await;
        self.session.side.set_current_tenant(switcher.current_tenant());
        self.session.switcher = Some(switcher);
        self.drop_idle_switcher();
        match moved? {
            // The other tenant's shared listener does not have the session's channels.
            Some(_) if self.listening.is_some() => Err(ClientError::ListenerPaused.into()),
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
                && let Some(target) = switcher.back(&self.session.handle, here).await
            {
                return Ok(Some(target));
            }
            let mut replies = Vec::new();
            let name = &self.pool.tenant.name;
            let asked = switcher.request.take().map(LocalStep::Choose);
            let (used, next) = match asked.or_else(|| switcher.password.take().map(LocalStep::SetPassword)) {
                Some(next) => (0, next),
                None => {
                    let ClientSession { inbox, side, .. } = &mut self.session;
                    switcher.responder.next(inbox, side, Some(name), &mut replies)?
                }
            };
            self.session.inbox.drain(..used);
            let first = std::mem::take(&mut first) && used == 0;
            match next {
                LocalStep::Choose(request) => {
                    let found = match self.is_free_to_go(switcher, &request) {
                        Ok(()) => switcher.follow(&request, &self.session.handle, Some(here)).await,
                        Err(client_error) => Err(client_error),
                    };
                    let target = switcher.answer(found, Some(name), &mut self.session.side, &mut replies);
                    if target.is_some() {
                        self.session.unsent.push(&replies);
                        return Ok(target);
                    }
                }
                LocalStep::SetPassword(password) => {
                    switcher
                        .set_password(&self.session.handle, password, &mut self.session.side, &mut replies)
                        .await;
                }
                // It was held back for a choice, and is none: it must not be held back again.
                LocalStep::Server if first => {
                    ClientError::from(TenantSwitchError::NotAlone).write(Severity::Error, &mut replies);
                    self.session.side.skip_request(switcher.responder.failed());
                }
                LocalStep::Ended => {}
                LocalStep::Waits | LocalStep::Server => {
                    if next == LocalStep::Server && self.server.is_some() {
                        switcher.responder.in_batch = false;
                    }
                    self.session.unsent.push(&replies);
                    return Ok(None);
                }
                LocalStep::Terminated => return Err(SessionEnd::Terminated),
            }
            self.session.unsent.push(&replies);
        }
    }

    /// Whether the session may go where the request leads. A pinned session may only name its present tenant.
    fn is_free_to_go(&self, switcher: &TenantSwitcher, request: &TenantRequest) -> Result<(), ClientError> {
        let id = self.pool.tenant.id;
        let stays = match &request.tenant {
            Some(name) => **name == *self.pool.tenant.name,
            None => switcher.first == Some(id),
        };
        let pins = self.server.as_ref().map_or(Pins::empty(), |server| server.side.replies.pins());
        // The values of `currval` belong to this tenant's sequences: they mean nothing at another.
        let mut kept = pins.difference(Pins::SEQUENCES);
        if self.listening.is_some() {
            kept.insert(Pins::LISTEN);
        }
        match () {
            () if stays => Ok(()),
            () if self.server.is_some() && !self.session.side.follows() => {
                Err(TenantSwitchError::SessionMode.into())
            }
            () if kept.is_empty() => Ok(()),
            () => Err(ClientError::TenantPinned { reasons: kept.names().collect::<Vec<_>>().join(", ") }),
        }
    }

    /// The choice at the front of the inbox comes too late: sends the server a request that it refuses.
    fn deny_first(&mut self) {
        let Some(server) = self.server.as_mut() else { return };
        let mut out = Vec::new();
        let plan =
            first_text(&self.session.inbox, &self.session.side).map(|sql| Plan::of(&sql, &self.session.side));
        let reason = match plan {
            Some(Plan::Password(_)) => IdentityError::PasswordInTransaction.into(),
            _ => TenantSwitchError::TransactionBegun.into(),
        };
        let used = self.session.side.reject(&self.session.inbox, reason, &mut server.side, &mut out);
        self.session.inbox.drain(..used);
        server.unsent.push(&out);
    }

    /// Sends the rest of the inbox to the server that the session holds.
    async fn pass_on(&mut self) -> Result<(), SessionEnd> {
        if self.server.is_none() || self.session.inbox.is_empty() || self.is_answered_locally() {
            return Ok(());
        }
        self.send_inbox(ReadAhead::default()).await
    }

    /// Before the first statement at a new tenant: tries the session's settings on a server of that tenant,
    /// unless they are known to work. `false`: the statement has been refused.
    pub(super) async fn try_settings(&mut self) -> Result<bool, SessionEnd> {
        if let Some(pool) = self.pool.current().filter(|_| self.pool.is_retired()) {
            self.session.side.set_tenant_access(pool.tenant_access.clone());
            self.pool = pool;
        }
        let pool = self.pool.clone();
        let wanted = Settings::clone(&self.session.side.wanted);
        let status = tokio::select! {
            status = pool.startup_status(wanted, self.session.query_wait()) => status,
            interrupted = self.interrupted() => Err(interrupted?),
        };
        match status {
            Ok(status) => {
                let Some(switcher) = self.session.switcher.as_mut() else { return Ok(true) };
                switcher.is_new = false;
                if let Err(limit) = self.session.side.keep(status.settings) {
                    return Err(SessionEnd::Refused(self.session.side.rules().too_much(limit).into()));
                }
                self.session.side.start_settings = status.start.into();
                self.apply_idle_session_timeout();
                Ok(true)
            }
            // A setting does not exist there, for example a role.
            Err(client_error @ ClientError::Server { .. }) => Err(client_error.into()),
            Err(client_error) => {
                self.refuse_request(&client_error);
                Ok(false)
            }
        }
    }

    /// Answers the request at the front of the inbox with an error, and skips it.
    pub(super) fn refuse_request(&mut self, client_error: &ClientError) {
        let status = self.session.switcher.as_mut().map_or(b'I', |switcher| switcher.responder.failed());
        self.session.side.skip_request(status);
        let mut replies = Vec::new();
        client_error.write(Severity::Error, &mut replies);
        self.session.unsent.push(&replies);
    }

    /// Takes the session from its pool. Its server is cleaned or closed in a task of its own.
    pub(super) fn into_transfer(mut self: Box<Self>, target: SwitchTarget) -> SessionTransfer {
        self.session.side.take_held(&mut self.session.inbox);
        // Its timer belongs to this worker. The next read finds the end again.
        self.session.end_of_input = None;
        // Notifications of the old tenant's channels are not for the new one.
        drop(self.session.handle.take_notifications());
        target.receive(&mut self.session.side);
        if let Some(switcher) = self.session.switcher.as_mut() {
            switcher.tenant_entered();
        }
        if let Some(server) = self.server.take() {
            self.session.handle.server_process_id.store(0, Ordering::Relaxed);
            self.set_pins(Pins::empty());
            self.clean_in_background(server, false, false);
        }
        Box::new((self.session, target))
    }
}
