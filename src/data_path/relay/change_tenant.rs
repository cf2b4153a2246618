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

use super::{BUFFERS, Relay, Step, no_tenant, session_end::End};
use crate::{
    data_path::{
        exchange::ClientSide,
        login::connection_limits::Visitor,
        proxy::Proxy,
        session_state::{Settings, pins::Pins},
        sessions::registry::Registered,
        tenant_switch::{
            Plan, Wish,
            local_answers::{Next, first_text},
            switcher::{Concierge, Room, Waits, room_name},
        },
        worker::Worker,
    },
    error::{ClientError, IdentityError, TenantSwitchError},
    wire::{message::Severity, stream::Stream, unsent::Unsent},
};

/// A session between two places: everything of it that is not the place's.
#[derive(Debug)]
pub struct Seat {
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
    pub concierge: Option<Box<Concierge>>,
    /// What all clients share.
    pub proxy: Arc<Proxy>,
}

/// A session that moves, and where to.
pub type Departure = Box<(Seat, Room)>;

impl Relay {
    /// Goes on with the pool that has taken the place of a retired one.
    pub(in crate::data_path) fn succeed(&mut self) -> Result<(), End> {
        self.pool = self.pool.current().ok_or_else(|| End::Refused(ClientError::AdminShutdown.into()))?;
        self.side.set_place(self.pool.place.clone());
        self.side.begun.pool_replaced();
        Ok(())
    }

    /// Whether what the client sends is for the desk, though a server is held.
    #[inline]
    pub(in crate::data_path) fn is_at_desk(&self) -> bool {
        self.concierge.as_ref().is_some_and(|concierge| {
            self.server.is_some() && (concierge.desk.is_in_batch() || self.side.is_refusing())
        })
    }

    /// Whether what the client has sent need not be shown to the desk before a server is borrowed for it.
    #[inline]
    pub(in crate::data_path) fn passes_desk(&self, sent: &[u8]) -> bool {
        let passes = |concierge: &Concierge| !concierge.is_new && concierge.desk.passes(sent, &self.side);
        self.concierge.as_ref().is_none_or(|concierge| passes(concierge))
    }

    /// Whether nothing more is read from the client for now.
    #[inline]
    pub(in crate::data_path) fn holds_back(&self) -> bool {
        self.concierge.as_ref().is_some_and(|concierge| concierge.waits != Waits::No)
    }

    /// Keeps what must wait until everything before it is answered.
    #[cold]
    pub(in crate::data_path) fn hold_back(&mut self, rest: Vec<u8>, waits: Waits) -> Result<(), Step> {
        self.inbox = rest;
        let (proxy, first) = (&self.proxy, Some(self.pool.tenant.id));
        let concierge =
            self.concierge.get_or_insert_with(|| Concierge::new(proxy.clone(), first, Arc::default()));
        concierge.waits = waits;
        Ok(())
    }

    /// An employee's session has changed its password, and needs nobody for that any more.
    fn dismiss(&mut self) {
        let chooses = self.side.rules().chooses;
        self.concierge.take_if(|concierge| !chooses && concierge.is_idle());
    }

    /// Whether there is something to decide about the session's tenant, which cannot be done within a poll.
    pub(in crate::data_path) fn is_called(&self) -> bool {
        let Some(concierge) = &self.concierge else { return false };
        if self.cancelling.is_some() {
            return false;
        }
        let lease = self.server.as_ref().map(|server| &server.side.lease);
        let over =
            lease.is_none_or(|lease| lease.is_over()) && !self.side.mid_message() && self.held.is_empty();
        let answered = lease.is_none_or(|lease| !lease.is_working() || lease.takes_copy_data());
        concierge.is_to_leave() && over || concierge.waits != Waits::No && answered
    }

    /// Lets the desk answer what it can, while no server is held. `None`: what is in `inbox` is for a server, and one may be
    /// borrowed for it.
    #[cold]
    pub(in crate::data_path) fn ask_desk(&mut self, inbox: &mut Vec<u8>) -> Option<Option<Step>> {
        if self.pool.is_retired()
            && let Err(end) = self.succeed()
        {
            return Some(Some(Step::End(end)));
        }
        let concierge = self.concierge.as_mut()?;
        let mut replies = Vec::new();
        let led = match concierge.desk.next(inbox, &mut self.side, Some(&self.pool.tenant.name), &mut replies)
        {
            Err(refusal) => return Some(Some(Step::End(End::Refused(refusal.into())))),
            Ok((used, led)) => {
                inbox.drain(..used);
                led
            }
        };
        self.unsent.push(&replies);
        let led = match led {
            Next::Server if concierge.is_new => Some(Some(Step::Borrow)),
            Next::Server => None,
            Next::Waits => Some(None),
            Next::Terminated => Some(Some(Step::End(End::Terminated))),
            Next::Ended => Some(Some(Step::Desk)),
            Next::Choose(wish) => {
                concierge.wish = Some(wish);
                Some(Some(Step::Desk))
            }
            Next::SetPassword(password) => {
                concierge.password = Some(password);
                Some(Some(Step::Desk))
            }
        };
        self.dismiss();
        led
    }

    /// Does what [`Self::is_called`] is about, and looks at what else the client has sent. Where it leads, if the session
    /// moves.
    pub(in crate::data_path) async fn at_desk(&mut self) -> Result<Option<Room>, End> {
        if self.pool.is_retired() && self.server.is_none() {
            self.succeed()?;
        }
        let Some(mut concierge) = self.concierge.take() else { return Ok(None) };
        let moved = self.with_concierge(&mut concierge).await;
        self.side.set_stance(concierge.stance());
        self.concierge = Some(concierge);
        self.dismiss();
        match moved? {
            // Nobody would tell it what it goes on listening to.
            Some(_) if self.heard.is_some() => Err(End::Refused(ClientError::ListenerPaused.into())),
            Some(room) => Ok(Some(room)),
            None => self.pass_on().await.map(|()| None),
        }
    }

    async fn with_concierge(&mut self, concierge: &mut Concierge) -> Result<Option<Room>, End> {
        let waits = std::mem::replace(&mut concierge.waits, Waits::No);
        if self.server.as_ref().is_some_and(|server| !server.side.lease.is_over()) {
            if waits == Waits::Choice {
                self.deny_first();
            }
            return Ok(None);
        }
        let here = (self.pool.tenant.id, self.pool.access);
        let mut first = waits == Waits::Choice;
        loop {
            if concierge.is_to_leave()
                && let Some(room) = concierge.back(&self.handle, here).await
            {
                return Ok(Some(room));
            }
            let mut replies = Vec::new();
            let name = &self.pool.tenant.name;
            let asked = concierge.wish.take().map(Next::Choose);
            let (used, next) = match asked.or_else(|| concierge.password.take().map(Next::SetPassword)) {
                Some(next) => (0, next),
                None => {
                    let next = concierge.desk.next(&self.inbox, &mut self.side, Some(name), &mut replies);
                    next.map_err(|refusal| End::Refused(refusal.into()))?
                }
            };
            self.inbox.drain(..used);
            let first = std::mem::take(&mut first) && used == 0;
            match next {
                Next::Choose(wish) => {
                    let found = match self.is_free_to_go(concierge, &wish) {
                        Ok(()) => concierge.follow(&wish, &self.handle, Some(here)).await,
                        Err(refusal) => Err(refusal),
                    };
                    match &found {
                        Ok(room) => concierge.desk.chosen(room_name(room.as_ref(), Some(name)), &mut replies),
                        Err(refusal) => concierge.desk.refuse(refusal, &mut self.side, &mut replies),
                    }
                    if let Ok(Some(room)) = found {
                        self.unsent.push(&replies);
                        return Ok(Some(room));
                    }
                }
                Next::SetPassword(password) => {
                    concierge.set_password(&self.handle, password, &mut self.side, &mut replies).await;
                }
                // What was held back for a choice is none to the desk: it must not come round again.
                Next::Server if first => {
                    ClientError::from(TenantSwitchError::NotAlone).write(Severity::Error, &mut replies);
                    self.side.begin_refusing(concierge.desk.failed());
                }
                Next::Ended => {}
                Next::Waits | Next::Server => {
                    if next == Next::Server && self.server.is_some() {
                        concierge.desk.leave_batch();
                    }
                    self.unsent.push(&replies);
                    return Ok(None);
                }
                Next::Terminated => return Err(End::Terminated),
            }
            self.unsent.push(&replies);
        }
    }

    /// A session that keeps its server may name the tenant that it is in.
    fn is_free_to_go(&self, concierge: &Concierge, wish: &Wish) -> Result<(), ClientError> {
        let id = self.pool.tenant.id;
        let stays = match &wish.tenant {
            Some(name) => **name == *self.pool.tenant.name,
            None => concierge.first == Some(id),
        };
        let pins = self.server.as_ref().map_or(Pins::empty(), |server| server.side.lease.pins);
        // What `currval` remembers is about this tenant's sequences: nobody misses it at another.
        let mut kept = pins.difference(Pins::SEQUENCES);
        if self.heard.is_some() {
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
        let used = self.side.deny(&self.inbox, reason, &mut server.side, &mut out);
        self.inbox.drain(..used);
        server.unsent.push(&out);
    }

    /// What is left in the inbox goes to the server that the session holds.
    async fn pass_on(&mut self) -> Result<(), End> {
        if self.server.is_none() || self.inbox.is_empty() || self.is_at_desk() {
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
    pub(in crate::data_path) async fn settle_in(&mut self) -> Result<bool, End> {
        if let Some(pool) = self.pool.current().filter(|_| self.pool.is_retired()) {
            self.side.set_place(pool.place.clone());
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
                let Some(concierge) = self.concierge.as_mut() else { return Ok(true) };
                concierge.is_new = false;
                if let Err(limit) = self.side.keep(status.settings) {
                    return Err(End::Refused(self.side.rules().too_much(limit).into()));
                }
                self.side.begun = status.start.into();
                Ok(true)
            }
            // Something the session has set does not exist there, a role perhaps.
            Err(refusal @ ClientError::Server { .. }) => Err(End::Refused(refusal.into())),
            Err(refusal) => {
                self.refuse_request(&refusal);
                Ok(false)
            }
        }
    }

    /// The request at the front of the inbox is answered with an error, and left out.
    pub(in crate::data_path) fn refuse_request(&mut self, refusal: &ClientError) {
        let status = self.concierge.as_mut().map_or(b'I', |concierge| concierge.desk.failed());
        self.side.begin_refusing(status);
        let mut replies = Vec::new();
        refusal.write(Severity::Error, &mut replies);
        self.unsent.push(&replies);
    }

    /// Leaves the tenant for another room. The server it holds is cleaned, or closed, without it.
    pub(in crate::data_path) fn depart(mut self: Box<Self>, room: Room) -> Departure {
        self.side.take_held(&mut self.inbox);
        // What it has not heard yet of channels there is nothing to it any more.
        drop(self.handle.take_notifications());
        room.receive(&mut self.side);
        if let Some(concierge) = self.concierge.as_mut() {
            concierge.arrive();
        }
        if let Some(server) = self.server.take() {
            self.handle.server_process_id.store(0, Ordering::Relaxed);
            self.handle.set_pins(Pins::empty());
            self.leave_behind(server, false, false);
        }
        let Self { client, unsent, side, inbox, handle, query_wait, leaving, concierge, proxy, .. } = *self;
        Box::new((Seat { client, unsent, side, inbox, handle, query_wait, leaving, concierge, proxy }, room))
    }
}

/// Serves a session that moves from room to room, to its end. Runs on the worker of the room it is in; `at` is that
/// worker's number, `None` where any will do.
pub(in crate::data_path) async fn travel(mut next: Departure, visitor: Visitor, at: Option<usize>) {
    loop {
        let (mut seat, room) = *next;
        let worker = match &room {
            Room::Tenant(pool, _) if at != Some(pool.worker.index) => Some(pool.worker.clone()),
            _ => None,
        };
        if let Some(worker) = worker {
            let tenant = room_name(Some(&room), None).unwrap_or_default();
            if let Err(error) = seat.client.detach() {
                return warn!(tenant, side = "client", %error, "cannot move a session to its worker");
            }
            return move_to(&worker, Box::new((seat, room)), visitor);
        }
        let gone = match room {
            Room::Tenant(pool, present) => {
                let gone = Box::new(Relay::new(seat, pool)).run().await;
                drop(present);
                gone
            }
            Room::Lobby => {
                seat.handle.enter(None);
                no_tenant::run(seat).await
            }
        };
        match gone {
            Some(departure) => next = departure,
            None => return,
        }
    }
}

/// Goes on with [`travel`] on another worker.
fn move_to(worker: &Arc<Worker>, mut next: Departure, visitor: Visitor) {
    let index = worker.index;
    worker.spawn(async move {
        if let Err(error) = next.0.client.attach() {
            return warn!(side = "client", %error, "cannot move a session to its worker");
        }
        travel(next, visitor, Some(index)).await;
    });
}
