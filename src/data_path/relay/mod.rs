//! The loop of a session: it takes the client's messages, borrows a server, passes them on, and gives the
//! server back.
//!
//! `exchange/` decides what the bytes mean; the relay moves them. An idle session owns no buffer: each worker
//! has one, used within a single poll. One read is followed by one write. Bytes that the other side does not
//! take wait in `Unsent`, and until they are gone nothing more is read for that side.

pub mod acquire_server;
pub mod after_transaction;
pub mod buffers;
pub mod cancel;
pub mod change_tenant;
pub mod change_worker;
pub mod client_session;
pub mod end_of_input;
pub mod load_functions;
mod move_to_successor;
pub mod no_tenant;
pub mod notifications;
mod return_server;
mod send_again;
pub mod session_end;
pub mod signals;

use std::{
    cell::{Cell, RefCell},
    future::{Future as _, poll_fn},
    io,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use tokio::{
    sync::oneshot,
    task::{consume_budget, coop, yield_now},
    time::Instant,
};
use tracing::debug;

use self::{
    acquire_server::{ReplyWait, ServerLink, is_never_answered_here},
    cancel::WantedCancels,
    change_worker::Departure,
    client_session::ClientSession,
    end_of_input::is_end_of_input,
    notifications::Listening,
    session_end::{Loss, SessionEnd},
};
use crate::{
    data_path::{
        exchange::{Flow, ReadAhead, unread_request::is_only_shutdown},
        memory_limit::Charge,
        pool::{Pinned, Pool, PooledServer, placement::Seat},
        server::connection::Server,
        session_state::{
            parameters::{IDLE_SESSION_TIMEOUT, duration},
            pins::Pins,
            side_effects::BackendSignal,
        },
        tenant_switch::switcher::SwitchWait,
        worker::Worker,
    },
    error::ClientError,
    wire::outgoing::Outgoing,
};

/// Bytes per read. More than an ordinary reply, so that one read empties the socket. Small enough that a
/// large result is still in the core's own cache when it is written: 256 KiB takes a tenth more CPU.
const READ_BYTES: usize = 48 * 1024;

/// How often a session moves bytes before the others of its worker have their turn.
const MOVES_MAX: usize = 64;

thread_local! {
    /// Shared by all sessions of a worker. Empty between two polls.
    pub(super) static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers { read: vec![0; READ_BYTES], scratch: Vec::new() });
}

pub(super) struct Buffers {
    pub(super) read: Vec<u8>,
    pub(super) scratch: Vec<u8>,
}

/// A session at its tenant's pool.
#[derive(Debug)]
pub struct Relay {
    /// Everything that the session takes along when it changes its tenant.
    pub(super) session: ClientSession,
    pub(super) pool: Arc<Pool>,
    /// On which of the pool's workers it is.
    seat: Seat,
    pub(super) server: Option<Box<PooledServer>>,
    transaction_began: Option<Instant>,
    request_began: Option<Instant>,
    /// The end of a reply, held back until the checks after the transaction are done.
    held_reply: Vec<u8>,
    /// The memory of unsent bytes, the inbox and the held reply.
    buffers: Charge,
    /// Why the inbox waits for pending replies.
    reply_wait: ReplyWait,
    /// The channels that it listens to.
    listening: Option<Listening>,
    /// A cancel request under way: until the server has completed it, the server serves no other session.
    cancelling: Option<oneshot::Receiver<()>>,
    /// Cancel requests that are not sent yet.
    wanted_cancels: WantedCancels,
    /// Its entry in the pool's list of pinned sessions.
    pinned: Option<Pinned>,
    /// Its server loads the database's functions before it goes back to the pool.
    loads_functions: bool,
    /// The session has changed functions since they were last loaded: its texts wait for the load.
    changed_functions: bool,
    /// The last read of the client has found nothing: the reactor wakes the session when there is something.
    client_wakes: bool,
}

/// Work that cannot be done within a poll.
#[derive(Debug)]
pub(super) enum Step {
    /// The inbox holds a request, and no server is idle. What was read of it.
    AcquireServer(ReadAhead),
    /// The transaction is over and has left checks to be done.
    AfterTransaction,
    /// The client chooses a tenant, or the session must go back to one.
    SwitchTenant,
    /// The pool has other workers now.
    ChangeWorker,
    /// The server has said its last words, these, and may not have read the request.
    SendAgain(Box<[u8]>),
    End(SessionEnd),
}

impl<E: Into<SessionEnd>> From<E> for Step {
    fn from(end: E) -> Self {
        Self::End(end.into())
    }
}

impl Relay {
    /// A session at this pool; the client has been greeted.
    pub fn new(session: ClientSession, pool: Arc<Pool>, seat: Seat) -> Self {
        let relay = Self {
            session,
            pool,
            seat,
            server: None,
            transaction_began: None,
            request_began: None,
            held_reply: Vec::new(),
            buffers: Charge::default(),
            reply_wait: ReplyWait::Nothing,
            listening: None,
            cancelling: None,
            wanted_cancels: WantedCancels::default(),
            pinned: None,
            loads_functions: false,
            changed_functions: false,
            client_wakes: false,
        };
        relay.apply_idle_session_timeout();
        relay
    }

    /// Where it runs.
    pub fn worker(&self) -> Arc<Worker> {
        self.seat.worker.clone()
    }

    /// The session's settings are others: while it has no server, the proxy applies its `idle_session_timeout`.
    pub(super) fn apply_idle_session_timeout(&self) {
        let side = &self.session.side;
        let timeout = match side.wanted.get(IDLE_SESSION_TIMEOUT) {
            _ if !side.follows() => None,
            Some(value) => duration(value),
            None => {
                let start = side.start_settings.known().or(self.pool.start().map(|start| &**start));
                start.and_then(|start| start.idle_session_timeout)
            }
        };
        if timeout.is_some() {
            self.pool.note_idle_limit();
        }
        self.session.handle.set_idle_session_timeout(timeout);
    }

    /// Serves the client to its end, or until it goes to another tenant or worker.
    ///
    /// Boxed, because a future holds its arguments twice, and there is one for each idle client.
    pub async fn run(mut self: Box<Self>) -> Option<Departure> {
        let _here = self.seat.worker.enter();
        // The reactor, or the task, may be another one than before.
        self.client_wakes = false;
        poll_fn(|cx| {
            self.session.handle.wake_with(cx.waker());
            Poll::Ready(())
        })
        .await;
        let end = loop {
            match poll_fn(|cx| BUFFERS.with_borrow_mut(|buffers| self.poll(buffers, cx))).await {
                Step::AcquireServer(first) => {
                    if let Err(end) = Box::pin(self.acquire_server(first)).await {
                        break end;
                    }
                }
                Step::AfterTransaction => {
                    if let Err(end) = Box::pin(self.after_transaction()).await {
                        break end;
                    }
                    consume_budget().await;
                }
                Step::SwitchTenant => match Box::pin(self.switch_tenant()).await {
                    Ok(None) => consume_budget().await,
                    Ok(Some(target)) => return Some(Departure::Tenant(self.into_transfer(target))),
                    Err(end) => break end,
                },
                Step::SendAgain(last_words) => {
                    if let Err(end) = Box::pin(self.send_again(&last_words)).await {
                        break end;
                    }
                }
                Step::ChangeWorker => return Some(Departure::Worker(self)),
                Step::End(end) => break end,
            }
        };
        if !(end.is_for_successor() && Box::pin(self.moves_to_successor()).await) {
            Box::pin(self.end(end)).await;
        }
        None
    }

    /// Moves bytes as long as any can be moved.
    fn poll(&mut self, buffers: &mut Buffers, cx: &mut Context<'_>) -> Poll<Step> {
        if (self.session.handle.is_signalled() || self.cancelling.is_some())
            && let Some(step) = self.take_signals(cx)
        {
            return Poll::Ready(step);
        }
        if self.has_switch_work() {
            return Poll::Ready(Step::SwitchTenant);
        }
        if !self.session.inbox.is_empty()
            && self.server.is_none()
            && let Some(step) = self.serve_inbox(buffers, cx)
        {
            return Poll::Ready(step);
        }
        let mut moves = 0..MOVES_MAX;
        loop {
            if self.has_switch_work() {
                return Poll::Ready(Step::SwitchTenant);
            }
            let mut moved = false;
            if !self.session.unsent.is_empty() {
                match self.session.unsent.drain(&mut self.session.client, cx) {
                    Ok(emptied) => {
                        moved |= emptied;
                        if self.session.handle.is_notified() {
                            self.send_notifications();
                        }
                    }
                    Err(error) => return Poll::Ready(SessionEnd::client_lost(Err(error)).into()),
                }
            }
            match self.poll_server(buffers, cx) {
                Ok(polled) => moved |= polled.is_ready(),
                Err(step) => return Poll::Ready(step),
            }
            match self.poll_client(buffers, cx) {
                Ok(polled) => moved |= polled.is_ready(),
                Err(step) => return Poll::Ready(step),
            }
            if !self.wanted_cancels.is_empty() {
                self.send_wanted_cancels(cx);
            }
            if moved && moves.next().is_some() {
                continue;
            }
            if moved {
                let _ = pin!(yield_now()).poll(cx);
            } else if self.session.end_of_input.is_some()
                && let Some(end) = self.poll_end_of_input(cx)
            {
                return Poll::Ready(end.into());
            }
            return match self.is_buffering_too_much() {
                false => Poll::Pending,
                true => Poll::Ready(Step::End(self.unread_end())),
            };
        }
    }

    /// Server to client.
    #[inline]
    fn poll_server(&mut self, buffers: &mut Buffers, cx: &mut Context<'_>) -> Result<Poll<()>, Step> {
        let Some(server) = self.server.as_mut() else { return Ok(Poll::Pending) };
        let server: &mut Server = server;
        // A server that takes no more bytes says why when it is read from.
        let drained = !server.unsent.is_empty()
            && SessionEnd::unless_timed_out(server.unsent.drain(&mut server.stream, cx))?;
        if drained && server.side.replies.is_over() {
            // It was held for the rest of a message that needs no reply.
            return self.after_reply(Instant::now()).map_or(Ok(Poll::Ready(())), Err);
        }
        if !self.session.unsent.is_empty() {
            return Ok(if drained { Poll::Ready(()) } else { Poll::Pending });
        }
        let read = match server.stream.poll_chunk(cx, &mut buffers.read) {
            Poll::Pending => return Ok(if drained { Poll::Ready(()) } else { Poll::Pending }),
            Poll::Ready(Ok(read)) if read > 0 => read,
            Poll::Ready(_) if self.is_end_passed_on() => {
                return Err(SessionEnd::ClientLost(Loss::Closed).into());
            }
            Poll::Ready(_) if self.goes_on_without_server() => return Ok(Poll::Ready(())),
            Poll::Ready(lost) => return Err(SessionEnd::server_lost(lost.map(drop)).into()),
        };
        let chunk = buffers.read.get(..read).unwrap_or_default();
        let mut out = Outgoing::new(chunk, &mut buffers.scratch);
        let (handle, pool, itself) = (&self.session.handle, &self.pool, Cell::new(false));
        let send = |number, signal| {
            itself.set(itself.get() || (number, signal) == (handle.process_id, BackendSignal::Terminate));
            handle.send(signal, number, &pool.tenant_access)
        };
        let events = match server.side.take(chunk, &mut self.session.side, &mut out, &send) {
            Ok(events) => events,
            Err(broken) => return Err(self.broken(broken).into()),
        };
        if itself.get() {
            return Err(ClientError::AdminShutdown.into());
        }
        let (mut bytes, mut is_ending) = (out.finish(), events.fatal > 0);
        if is_ending && let Some(reply) = self.reply_before_shutdown(bytes, events.fatal) {
            if reply.is_empty() && self.goes_on_without_server() {
                return Ok(Poll::Ready(()));
            }
            (bytes, is_ending) = (reply, false);
        }
        let Some(server) = self.server.as_mut() else { return Ok(Poll::Pending) };
        if !is_ending {
            server.first_request.forget();
        } else if is_only_shutdown(chunk)
            && server.first_request.is_repeatable()
            && !server.side.replies.is_committing()
            && server.first_request.is_in_one_place(&self.session.inbox)
            && self.cancelling.is_none()
            && (self.session.switcher.is_none() && self.listening.is_none())
        {
            return Err(Step::SendAgain(bytes.into()));
        }
        let stats = &self.pool.stats;
        stats.bytes_sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.session.traffic.bytes_out += bytes.len() as u64;
        // While a message is under way to the server it cannot be asked: the reply does not wait for the
        // rest.
        let holds = (events.ready > 0 || !self.held_reply.is_empty())
            && server.side.has_pending_checks(self.session.side.follows())
            && server.side.replies.is_over()
            && server.side.has_whole_messages();
        if holds {
            self.held_reply.extend_from_slice(bytes);
        } else if !self.held_reply.is_empty() {
            self.session.unsent.push(&std::mem::take(&mut self.held_reply));
            self.session.unsent.push(bytes);
        } else if let Err(error) = self.session.unsent.send(&mut self.session.client, cx, bytes) {
            return Err(SessionEnd::client_lost(Err(error)).into());
        }
        if is_ending {
            return Err(SessionEnd::ServerClosed.into());
        }
        match self.count_events(events) {
            Some(step) => Err(step),
            None => Ok(Poll::Ready(())),
        }
    }

    /// The server's bytes are on their way: counts them, and gives it back at a transaction's end.
    #[inline]
    fn count_events(&mut self, events: crate::data_path::exchange::ChunkEvents) -> Option<Step> {
        let (server, stats) = (self.server.as_mut()?, &self.pool.stats);
        if events.errors > 0 {
            server.failed = true;
            stats.errors.fetch_add(events.errors.into(), Ordering::Relaxed);
        }
        if events.lost_settings > 0 {
            debug!(
                tenant = self.pool.tenant.name,
                login = self.session.handle.login.name,
                connection = self.session.handle.process_id,
                settings = events.lost_settings,
                "settings lost: the server refuses them, though another one took them"
            );
        }
        if events.ready > 0 {
            stats.queries.fetch_add(events.ready.into(), Ordering::Relaxed);
            let working = server.side.replies.is_working();
            let now = Instant::now();
            // While it works, it goes on with another request.
            if let Some(began) = std::mem::replace(&mut self.request_began, working.then_some(now)) {
                stats.query_time.record(now - began);
            }
            return self.after_reply(now);
        }
        // Only a request of the proxy was answered.
        if server.side.replies.is_over() { self.after_reply(Instant::now()) } else { None }
    }

    /// Client to server.
    #[inline]
    fn poll_client(&mut self, buffers: &mut Buffers, cx: &mut Context<'_>) -> Result<Poll<()>, Step> {
        // A client that does not read gets no further answers of the proxy's own, which no server would slow
        // down.
        let stays = match self.server.as_ref() {
            Some(server) => !server.unsent.is_empty(),
            None => !self.session.unsent.is_empty(),
        };
        if stays || self.holds_back() {
            return Ok(Poll::Pending);
        }
        if self.reply_wait != ReplyWait::Nothing {
            return self.go_on(buffers, cx);
        }
        if self.session.end_of_input.is_some() {
            return Ok(Poll::Pending);
        }
        let read = match self.read_client(&mut buffers.read, cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Ok(read)) if read > 0 => read,
            Poll::Ready(read) if is_end_of_input(&read) => {
                self.session.input_ends();
                return Ok(Poll::Ready(()));
            }
            Poll::Ready(lost) => return Err(SessionEnd::client_lost(lost.map(drop)).into()),
        };
        let chunk = buffers.read.get(..read).unwrap_or_default();
        self.pool.stats.bytes_received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        self.session.traffic.bytes_in += chunk.len() as u64;
        if self.pool.placement.has_changed_since(&self.seat) && self.leaves_worker(chunk) {
            return Err(Step::ChangeWorker);
        }
        if self.is_answered_locally() {
            self.session.inbox.extend_from_slice(chunk);
            return Err(Step::SwitchTenant);
        }
        if self.server.is_some() {
            self.forward(chunk, ReadAhead::default(), &mut buffers.scratch, cx)?;
            return Ok(Poll::Ready(()));
        }
        let first = if self.session.inbox.is_empty() { self.needs_server(chunk) } else { None };
        if let Some(first) = first {
            match self.link(chunk)? {
                ServerLink::Linked => {
                    self.forward(chunk, first, &mut buffers.scratch, cx)?;
                    return Ok(Poll::Ready(()));
                }
                ServerLink::NoneIdle if is_never_answered_here(chunk) => {
                    self.session.inbox = chunk.to_vec();
                    return Err(Step::AcquireServer(first));
                }
                ServerLink::NoneIdle | ServerLink::NoRequest => {}
            }
        }
        self.session.inbox.extend_from_slice(chunk);
        match self.serve_inbox(buffers, cx) {
            Some(step) => Err(step),
            None => Ok(Poll::Ready(())),
        }
    }

    /// Reads from the client, unless the reactor is going to wake the session for it.
    #[inline]
    pub(super) fn read_client(&mut self, bytes: &mut [u8], cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.client_wakes && !self.session.client.may_be_readable() {
            return Poll::Pending;
        }
        let read = self.session.client.poll_chunk(cx, bytes);
        // A task that has used up its budget is woken without the reactor.
        self.client_wakes = read.is_pending() && coop::has_budget_remaining();
        read
    }

    /// Passes the client's bytes on to the server that the session holds. `first` was read of their first message.
    #[inline]
    pub(super) fn forward(
        &mut self,
        chunk: &[u8],
        first: ReadAhead,
        scratch: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Result<(), Step> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        let server: &mut Server = server;
        let mut begins = false;
        // While a request runs, the clock need not be read for what is pipelined behind it.
        if self.request_began.is_none() {
            let now_ms = self.pool.clock.now_ms();
            let now = Instant::now();
            self.request_began = Some(now);
            begins = self.transaction_began.is_none();
            if begins {
                // What a pinned server knows of the session, no other one does; sequences may be forgotten.
                if Pins::SEQUENCES.contains(server.side.replies.pins()) {
                    server.first_request.keep(chunk);
                }
                self.transaction_began = Some(now);
                self.session.handle.set_began(now_ms);
            }
            self.session.handle.set_asked(now_ms);
        }
        if !begins {
            server.first_request.forget();
        }
        let mut out = Outgoing::new(chunk, scratch);
        self.session.side.prepare_server(&mut server.side, begins, &mut out);
        if let (Some(listening), None) = (&self.listening, &server.side.notifications.channels) {
            Self::listen_along(listening, server, out.build());
        }
        if let Some(switcher) = self.session.switcher.as_mut() {
            switcher.responder.hand_over(&mut server.side.replies, out.build());
        }
        let flow = self.session.side.take_read(chunk, first, &mut server.side, &mut out);
        // A failed write shows when the server is read from, together with its last words.
        let _ = server.unsent.send(&mut server.stream, cx, out.finish());
        match flow {
            // No reply is pending: the bytes were the rest of a message, or need no reply.
            Ok(Flow::Continues) if server.side.replies.is_over() => {
                self.after_reply(Instant::now()).map_or(Ok(()), Err)
            }
            Ok(Flow::Continues) => Ok(()),
            Ok(Flow::Terminated) => Err(SessionEnd::Terminated.into()),
            Ok(Flow::ChoosesTenant(rest)) => self.hold_back(rest, SwitchWait::Choice),
            Ok(Flow::Pauses(rest)) => self.hold_back(rest, SwitchWait::Pause),
            Ok(Flow::AwaitsReplies(rest)) => {
                (self.session.inbox, self.reply_wait) = (rest, ReplyWait::Meaning);
                Ok(())
            }
            Ok(Flow::Full(rest)) => {
                (self.session.inbox, self.reply_wait) = (rest, ReplyWait::Room);
                Ok(())
            }
            Err(client_error) => Err(client_error.into()),
        }
    }
}
