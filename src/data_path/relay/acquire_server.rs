//! A session gets a server, and may wait in line for it: until it gets one, its client leaves, or somebody ends or cancels it.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::Instant,
};

use tokio::io::{AsyncRead, ReadBuf};

use super::{BUFFERS, Buffers, Relay, Step, session_end::End};
use crate::{
    data_path::{
        exchange::{FIRST_MESSAGE_BYTES, Front},
        pool::{
            PooledServer,
            pinned_sessions::{Reclaim, can_return},
        },
        server::connection::Server,
        session_state::{pins::Pins, role_settings::Begun},
        sessions::registry::Doing,
    },
    error::ClientError,
};

/// What the rest of a client's requests waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data_path) enum Awaits {
    /// Nothing, or there is no rest.
    Nothing,
    /// The answers that decide on what it means.
    Meaning,
    /// That half of what is unanswered is answered.
    Room,
}

/// What came of looking for a server for what a client has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data_path) enum Link {
    /// It has one.
    Linked,
    /// All are busy.
    NoneIdle,
    /// Too little has come to need one.
    NoRequest,
}

impl Relay {
    /// Borrows an idle server for what the client has begun to send, if that is enough of a message and one is idle.
    #[inline]
    pub(in crate::data_path) fn link(&mut self, request: &[u8]) -> Result<Link, Step> {
        if self.side.is_leaving_out() {
            return Ok(Link::NoRequest);
        }
        match self.side.front(request) {
            Ok(Front::Request) => {}
            Ok(Front::Nothing) => return Ok(Link::NoRequest),
            Ok(Front::Goodbye) => return Err(Step::End(End::Terminated)),
            Err(refusal) => return Err(Step::End(End::Refused(refusal.into()))),
        }
        if self.pool.is_retired() {
            self.succeed().map_err(Step::End)?;
        }
        Ok(match self.side.begun.is_alike().then(|| self.pool.try_borrow()).flatten() {
            Some(server) => {
                self.take_on(server);
                Link::Linked
            }
            None => Link::NoneIdle,
        })
    }

    /// The session has a server from its login on.
    pub(in crate::data_path) fn engage(&mut self, mut server: Box<PooledServer>) {
        server.side.lease.pins = Pins::SESSION_MODE;
        self.handle.set_pins(Pins::SESSION_MODE);
        self.take_on(server);
        // What came together with the end of the login goes first.
        if !self.inbox.is_empty() {
            self.awaits = Awaits::Meaning;
        }
        self.handle.set_doing(Doing::Pinned, self.pool.worker.clock.now_ms());
    }

    pub(in crate::data_path) fn take_on(&mut self, server: Box<PooledServer>) {
        self.handle.server_process_id.store(server.process_id.unsigned_abs(), Ordering::Relaxed);
        let mut server = server;
        server.side.hearing.told_as =
            if self.side.follows() { self.handle.process_id } else { server.process_id };
        server.lent_to(self.handle.process_id, self.pool.worker.clock.now_ms());
        server.side.sequences.lent_to(self.handle.process_id);
        self.pool.stats.assignments.fetch_add(1, Ordering::Relaxed);
        self.server = Some(server);
    }

    /// Goes on with what waits for a server: serves it if one is idle, and answers what needs none.
    #[cold]
    pub(in crate::data_path) fn serve_inbox(
        &mut self,
        buffers: &mut Buffers,
        cx: &mut Context<'_>,
    ) -> Option<Step> {
        let mut inbox = std::mem::take(&mut self.inbox);
        loop {
            let mut replies = Vec::new();
            match self.side.leave_out(&inbox, &mut replies) {
                Ok(rest) => drop(inbox.drain(..inbox.len() - rest.len())),
                Err(refusal) => return Some(Step::End(End::Refused(refusal.into()))),
            }
            if !replies.is_empty() {
                self.unsent.push(&replies);
                replies.clear();
            }
            if self.concierge.is_some()
                && let Some(led) = self.ask_desk(&mut inbox)
            {
                self.inbox = inbox;
                return led;
            }
            let linked = match self.link(&inbox) {
                Err(step) => return Some(step),
                Ok(Link::Linked) => return self.forward(&inbox, &mut buffers.scratch, cx).err(),
                Ok(linked) => linked,
            };
            let answered = self.side.answer_unserved(&inbox, &mut replies);
            if answered == 0 {
                self.inbox = inbox;
                return (linked == Link::NoneIdle).then_some(Step::Borrow);
            }
            inbox.drain(..answered);
            // At once: what is behind it may wait in line for long.
            if let Err(error) = self.unsent.send(&mut self.client, cx, &replies) {
                return Some(Step::End(End::client_lost(Err(error))));
            }
        }
    }

    /// Waits in line for a server; the inbox is served by the next poll. A wait that is in vain is the request's error,
    /// not the session's end.
    pub(in crate::data_path) async fn borrow(&mut self) -> Result<(), End> {
        // What is rare is boxed: this future is moved for each wait.
        if self.concierge.as_ref().is_some_and(|concierge| concierge.is_new())
            && !Box::pin(self.settle_in()).await?
        {
            return Ok(());
        }
        if let Some(refusal) = self.no_room_to_wait() {
            self.refuse_request(&refusal);
            return Ok(());
        }
        let began = Instant::now();
        self.handle.set_doing(Doing::Waiting, self.pool.worker.clock.now_ms());
        let pool = self.pool.clone();
        let borrowed = tokio::select! {
            biased;
            borrowed = pool.borrow(began, self.query_wait) => borrowed,
            interrupted = self.interrupted() => Err(interrupted?),
        };
        self.pool.stats.wait_time.record(began.elapsed());
        match borrowed {
            Ok(mut server) => {
                if !self.side.begun.is_alike() && !Box::pin(self.begin_at(&mut server)).await? {
                    return Ok(());
                }
                self.take_on(server);
                let inbox = std::mem::take(&mut self.inbox);
                let step = poll_fn(|cx| {
                    BUFFERS.with_borrow_mut(|buffers| {
                        Poll::Ready(self.forward(&inbox, &mut buffers.scratch, cx))
                    })
                });
                match step.await {
                    Err(Step::End(end)) => Err(end),
                    _ => Ok(()),
                }
            }
            Err(refusal) if self.pool.is_retired() && self.pool.current().is_none() => {
                Err(End::Refused(refusal.into()))
            }
            Err(_) if self.pool.is_retired() => Ok(()),
            Err(refusal) => {
                self.handle.set_doing(Doing::Idle, self.pool.worker.clock.now_ms());
                self.refuse_request(&refusal);
                Ok(())
            }
        }
    }

    /// Before a session's first request to the servers of its pool: it learns what they began with, or sets what it began with itself.
    /// `false`: this server is not for it, and it asks for another one.
    async fn begin_at(&mut self, server: &mut Server) -> Result<bool, End> {
        if matches!(self.side.begun, Begun::Unseen)
            && !self.pool.has_same_start(server).await.map_err(|_| End::ServerLost)?
        {
            return Ok(false);
        }
        if let Some(start) = self.pool.start() {
            self.side.keep_start(start);
        }
        Ok(true)
    }

    /// Somebody waits for a server, and the session keeps one: it gives it back if it is between two transactions and keeps it
    /// for the values of sequences only. It has none any more then, and nobody else gets them (`exchange/sequences.rs`).
    #[cold]
    pub(in crate::data_path) fn yield_server(&mut self) -> Option<Step> {
        let server = self.server.as_mut()?;
        let free = server.side.lease.is_over() && self.held.is_empty();
        if !free || !self.side.follows() || !can_return(server.side.lease.pins) {
            return None;
        }
        if server.side.lease.pins.contains(Pins::UNREAD_UNNAMED) {
            self.side.statements.forget_unnamed();
        }
        server.side.lease.pins = Pins::empty();
        self.handle.set_pins(Pins::empty());
        self.pinned = None;
        self.after_reply(Instant::now())
    }

    /// The session is between two transactions and keeps its server, unless somebody waits who needs it more.
    pub(in crate::data_path) fn idle_with_server(&mut self, follows: bool) -> Option<Step> {
        self.handle.set_doing(Doing::Pinned, self.pool.worker.clock.now_ms());
        if self.handle.is_notified() {
            self.tell_heard();
        }
        if follows && self.pool.waiting() > 0 { self.make_way() } else { None }
    }

    #[cold]
    fn make_way(&mut self) -> Option<Step> {
        let pins = self.server.as_ref()?.side.lease.pins;
        match self.pool.reclaims(&self.handle, pins) {
            Reclaim::Nothing => None,
            Reclaim::Server => self.yield_server(),
            Reclaim::Session(reason) => Some(Step::End(End::Refused(reason.into()))),
        }
    }

    /// Keeps what must wait until what the server has got is answered.
    #[cold]
    pub(in crate::data_path) fn await_answers(&mut self, rest: Vec<u8>, awaits: Awaits) -> Result<(), Step> {
        (self.inbox, self.awaits) = (rest, awaits);
        Ok(())
    }

    /// Goes on with what waits for the server's answers, once they are in.
    #[cold]
    pub(in crate::data_path) fn go_on(
        &mut self,
        buffers: &mut Buffers,
        cx: &mut Context<'_>,
    ) -> Result<Poll<()>, Step> {
        let answered = self.server.as_mut().is_none_or(|server| match self.awaits {
            Awaits::Nothing => true,
            Awaits::Meaning => !server.side.lease.is_awaited(),
            Awaits::Room => server.side.has_room(self.side.rules().unanswered_max),
        });
        if !answered {
            return Ok(Poll::Pending);
        }
        self.awaits = Awaits::Nothing;
        if self.server.is_none() {
            return self.serve_inbox(buffers, cx).map_or(Ok(Poll::Ready(())), Err);
        }
        let inbox = std::mem::take(&mut self.inbox);
        self.forward(&inbox, &mut buffers.scratch, cx).map(Poll::Ready)
    }

    /// Resolves when the client leaves, or a signal comes, while it waits for a server. What is to be sent to the client is
    /// sent meanwhile, and what it sends is taken in as long as the inbox is small.
    pub(in crate::data_path) async fn interrupted(&mut self) -> Result<ClientError, End> {
        poll_fn(|cx| {
            if self.handle.is_signalled() {
                let signals = self.handle.take_signals();
                self.leaving = self.leaving.take().or(signals.end_when_free.map(Box::new));
                match signals.end {
                    Some(reason) => return Poll::Ready(Err(End::Refused(reason.into()))),
                    None if !signals.cancels.is_empty() => return Poll::Ready(Ok(ClientError::Cancelled)),
                    None => {}
                }
            }
            if !self.unsent.is_empty()
                && let Err(error) = self.unsent.drain(&mut self.client, cx)
            {
                return Poll::Ready(Err(End::client_lost(Err(error))));
            }
            BUFFERS.with_borrow_mut(|buffers| {
                while self.inbox.len() < 4 * FIRST_MESSAGE_BYTES {
                    let mut read = ReadBuf::new(&mut buffers.read);
                    match Pin::new(&mut self.client).poll_read(cx, &mut read) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Ok(())) if !read.filled().is_empty() => {
                            self.inbox.extend_from_slice(read.filled())
                        }
                        Poll::Ready(lost) => return Poll::Ready(Err(End::client_lost(lost))),
                    }
                }
                Poll::Pending
            })
        })
        .await
    }
}
