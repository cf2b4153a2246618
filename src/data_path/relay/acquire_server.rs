//! A session borrows a server, and waits in the pool's queue where none is idle: until it gets one, its
//! client leaves, or the session is cancelled or ended.

use std::{
    borrow::Cow,
    future::poll_fn,
    sync::atomic::Ordering,
    task::{Context, Poll},
};

use tokio::time::Instant;

use super::{BUFFERS, Buffers, Relay, Step, end_of_input::is_end_of_input, session_end::SessionEnd};
use crate::{
    data_path::{
        exchange::{FIRST_MESSAGE_BYTES, FirstMessage, ReadAhead},
        pool::{PooledServer, custom_parameters::FirstText},
        server::connection::{AskError, Server},
        session_state::{
            custom_names::CustomSet,
            pins::Pins,
            role_settings::StartSettings,
            temporary_use::{NewTempBuffers, TEMP_BUFFERS, sets_temp_buffers},
        },
        sessions::registry::Activity,
    },
    error::ClientError,
    wire::frame::{HEADER_BYTES, cstr},
};

/// How much of a text is looked at.
pub(super) const TEXT_BYTES_MAX: usize = 4096;

/// Why the client's next messages wait for pending replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyWait {
    /// They do not wait.
    Nothing,
    /// The replies decide what the messages mean.
    Meaning,
    /// Too many replies are pending: half of them must come first.
    Room,
}

/// Whether a session has a server for the client's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ServerLink {
    /// It has one.
    Linked,
    /// All are busy.
    NoneIdle,
    /// The messages so far need none.
    NoRequest,
}

/// Whether a Query or Parse shows SET at its begin. Not the text of a named statement: no driver prepares a SET, and
/// each Bind would look one up.
#[inline]
fn may_begin_with_set(request: &[u8]) -> bool {
    let ([b'Q', _, _, _, _, text @ ..] | [b'P', _, _, _, _, 0, text @ ..]) = request else { return false };
    matches!(text.trim_ascii_start(), [b's' | b'S', b'e' | b'E', b't' | b'T', ..])
}

/// Whether only a server answers the first of these messages, whatever follows it: a Query, a Bind, or a Parse of the
/// unnamed statement.
#[inline]
pub(super) fn is_never_answered_here(request: &[u8]) -> bool {
    matches!(request, [b'Q' | b'B', ..] | [b'P', _, _, _, _, 0, ..])
}

impl Relay {
    /// Borrows an idle server for the client's message, once enough of the message is here.
    #[inline]
    pub(super) fn link(&mut self, request: &[u8]) -> Result<ServerLink, Step> {
        if self.session.side.is_skipping_messages() {
            return Ok(ServerLink::NoRequest);
        }
        match self.session.side.first_message(request)? {
            FirstMessage::Request => {}
            FirstMessage::Nothing => return Ok(ServerLink::NoRequest),
            FirstMessage::Terminate => return Err(SessionEnd::Terminated.into()),
        }
        if self.pool.is_retired() {
            self.follow_successor()?;
        }
        let marks = self.pool.server_marks();
        let may_borrow = self.session.side.start_settings.is_same()
            && !(self.listening.is_some() && self.may_unlisten(request))
            && !(self.pool.has_used_temporary() && self.new_temp_buffers(request).is_some());
        let server = match self.pool.has_custom_parameters() {
            _ if !may_borrow => None,
            false => self.pool.try_borrow(),
            true => self.pool.try_borrow_for(self.session.side.custom, self.first_text(request)),
        };
        Ok(match server {
            // Another worker has returned the first server with such a mark since.
            Some(server) if self.pool.server_marks() != marks => {
                self.pool.put(server);
                ServerLink::NoneIdle
            }
            Some(server) => {
                self.hold_server(server);
                ServerLink::Linked
            }
            None => ServerLink::NoneIdle,
        })
    }

    /// What the first message of these bytes is, as far as it may see a custom parameter.
    #[cold]
    fn first_text(&self, request: &[u8]) -> FirstText {
        let text = self.first_message_text(request);
        FirstText::of(text.get(..TEXT_BYTES_MAX).unwrap_or(&text))
    }

    /// The text in the first message of these bytes, as far as it is here.
    #[cold]
    fn first_message_text<'r>(&'r self, request: &'r [u8]) -> Cow<'r, [u8]> {
        let mut body = request.get(HEADER_BYTES..).unwrap_or_default();
        match request.first() {
            Some(b'Q') => Cow::Borrowed(body),
            Some(b'P') => {
                let _name = cstr(&mut body);
                Cow::Borrowed(body)
            }
            Some(b'B') => self.bound_text(request).unwrap_or_default(),
            _ => Cow::Borrowed(&b""[..]),
        }
    }

    /// The `temp_buffers` that the session's next server must take.
    #[cold]
    fn new_temp_buffers(&self, request: &[u8]) -> Option<NewTempBuffers<'_>> {
        if may_begin_with_set(request) && sets_temp_buffers(&self.first_message_text(request)) {
            return Some(NewTempBuffers::ByText);
        }
        self.session.side.wanted.get(TEMP_BUFFERS).map(NewTempBuffers::Value)
    }

    /// The text of the statement that the first message of these bytes binds, if it is a Bind.
    #[cold]
    pub(super) fn bound_text(&self, request: &[u8]) -> Option<Cow<'_, [u8]>> {
        let mut body = request.get(HEADER_BYTES..).filter(|_| request.first() == Some(&b'B'))?;
        let _portal = cstr(&mut body).ok()?;
        self.session.side.prepared_text(cstr(&mut body).ok()?)
    }

    /// Session mode: the session has this server from its login to its end.
    pub fn engage(&mut self, server: Box<PooledServer>) {
        self.hold_server(server);
        self.set_pins(Pins::SESSION_MODE);
        // Messages that came with the end of the login go first.
        if !self.session.inbox.is_empty() {
            self.reply_wait = ReplyWait::Meaning;
        }
        self.session.handle.set_doing(Activity::Pinned, self.pool.clock.now_ms());
    }

    pub(super) fn hold_server(&mut self, server: Box<PooledServer>) {
        self.session.handle.server_process_id.store(server.process_id.unsigned_abs(), Ordering::Relaxed);
        let mut server = server;
        server.side.notifications.client_process_id =
            if self.session.side.follows() { self.session.handle.process_id } else { server.process_id };
        server.listed.lent_to(self.session.handle.process_id, self.pool.clock.now_ms());
        server.side.sequences.lent_to(self.session.handle.process_id);
        server.side.custom.by_session = CustomSet::default();
        self.pool.stats.assignments.fetch_add(1, Ordering::Relaxed);
        self.server = Some(server);
    }

    /// Goes on with the inbox: sends it to a server if one is idle, and answers messages that need none.
    #[cold]
    pub(super) fn serve_inbox(&mut self, buffers: &mut Buffers, cx: &mut Context<'_>) -> Option<Step> {
        let mut inbox = std::mem::take(&mut self.session.inbox);
        loop {
            let mut replies = Vec::new();
            match self.session.side.skip_messages(&inbox, &mut replies) {
                Ok(rest) => drop(inbox.drain(..inbox.len() - rest.len())),
                Err(client_error) => return Some(client_error.into()),
            }
            if !replies.is_empty() {
                self.session.unsent.push(&replies);
                replies.clear();
            }
            if self.session.switcher.is_some()
                && let Some(step) = self.answer_locally(&mut inbox)
            {
                self.session.inbox = inbox;
                return step;
            }
            let linked = match self.link(&inbox) {
                Err(step) => return Some(step),
                Ok(ServerLink::Linked) => {
                    return self.forward(&inbox, ReadAhead::default(), &mut buffers.scratch, cx).err();
                }
                Ok(linked) => linked,
            };
            let status = self.session.switcher.as_ref().map_or(b'I', |switcher| switcher.responder.status());
            let answered = self.session.side.answer_without_server(&inbox, status, &mut replies);
            if answered == 0 {
                self.session.inbox = inbox;
                return (linked == ServerLink::NoneIdle).then_some(Step::AcquireServer(ReadAhead::default()));
            }
            inbox.drain(..answered);
            // At once: the messages behind it may wait long for a server.
            if let Err(error) = self.session.unsent.send(&mut self.session.client, cx, &replies) {
                return Some(SessionEnd::client_lost(Err(error)).into());
            }
        }
    }

    /// Waits for a server and sends it the inbox. After a timeout the request gets an error. `first` was read of its
    /// first message.
    pub(super) async fn acquire_server(&mut self, first: ReadAhead) -> Result<(), SessionEnd> {
        // Rare calls are boxed: this future is moved for each wait.
        if self.session.switcher.as_ref().is_some_and(|switcher| switcher.is_new)
            && !Box::pin(self.try_settings()).await?
        {
            return Ok(());
        }
        if let Some(client_error) = self.no_room_to_wait() {
            self.refuse_request(&client_error);
            return Ok(());
        }
        let began = Instant::now();
        self.session.handle.set_doing(Activity::Waiting, self.pool.clock.now_ms());
        let pool = self.pool.clone();
        let borrowed = loop {
            let mut borrowed = tokio::select! {
                biased;
                borrowed = pool.borrow(began, self.session.query_wait()) => borrowed,
                interrupted = self.interrupted() => Err(interrupted?),
            };
            let Ok(server) = &mut borrowed else { break borrowed };
            if self.session.side.start_settings.is_same() {
                break borrowed;
            }
            match Box::pin(self.compare_start(server)).await {
                Ok(true) => break borrowed,
                Ok(false) => return Ok(()),
                // Nothing of the client's was sent: it waits for another one.
                Err(AskError::Lost(_)) => drop(borrowed),
                Err(error) => return Err(error.into()),
            }
        };
        self.pool.stats.wait_time.record(began.elapsed());
        match borrowed {
            Ok(mut server) => {
                if self.pool.has_custom_parameters() && self.session.side.follows() {
                    let (own, text) = (self.session.side.custom, self.first_text(&self.session.inbox));
                    match Box::pin(pool.renew(server, own, text, self.session.query_wait())).await {
                        Ok(renewed) => server = renewed,
                        Err(client_error) => return self.not_borrowed(client_error),
                    }
                }
                if self.pool.has_used_temporary()
                    && let Some(new) = self.new_temp_buffers(&self.session.inbox)
                {
                    match Box::pin(pool.taking_temp_buffers(server, new)).await {
                        Ok(taking) => server = taking,
                        Err(client_error) => return self.not_borrowed(client_error),
                    }
                }
                if self.listening.is_some() {
                    Box::pin(self.catch_up()).await;
                }
                self.hold_server(server);
                self.send_inbox(first).await
            }
            Err(client_error) => self.not_borrowed(client_error),
        }
    }

    /// The session goes on with the pool's successor, or its request gets this error.
    fn not_borrowed(&mut self, client_error: ClientError) -> Result<(), SessionEnd> {
        match self.pool.is_retired() {
            true if self.pool.current().is_none() => Err(client_error.into()),
            true => Ok(()),
            false => {
                self.session.handle.set_doing(Activity::Idle, self.pool.clock.now_ms());
                self.refuse_request(&client_error);
                Ok(())
            }
        }
    }

    /// Before a session's first request at its pool: compares the role's settings with those that the session
    /// began with. `false`: the pool was replaced, and the session needs a server of the new one.
    async fn compare_start(&mut self, server: &mut Server) -> Result<bool, AskError> {
        if matches!(self.session.side.start_settings, StartSettings::Unknown)
            && !self.pool.has_same_start(server).await?
        {
            return Ok(false);
        }
        if let Some(start) = self.pool.start() {
            self.session.side.keep_start_settings(start);
            self.apply_idle_session_timeout();
        }
        Ok(true)
    }

    /// Sends the inbox to the server that the session holds. `first` was read of its first message.
    pub(super) async fn send_inbox(&mut self, first: ReadAhead) -> Result<(), SessionEnd> {
        let inbox = std::mem::take(&mut self.session.inbox);
        let step = poll_fn(|cx| {
            BUFFERS
                .with_borrow_mut(|buffers| Poll::Ready(self.forward(&inbox, first, &mut buffers.scratch, cx)))
        });
        match step.await {
            Err(Step::End(end)) => Err(end),
            _ => Ok(()),
        }
    }

    /// Goes on with the messages that wait for replies, once these are here.
    #[cold]
    pub(super) fn go_on(&mut self, buffers: &mut Buffers, cx: &mut Context<'_>) -> Result<Poll<()>, Step> {
        let answered = self.server.as_mut().is_none_or(|server| match self.reply_wait {
            ReplyWait::Nothing => true,
            ReplyWait::Meaning => !server.side.replies.is_awaited(),
            ReplyWait::Room => server.side.has_room(self.session.side.rules().unanswered_max),
        });
        if !answered {
            return Ok(Poll::Pending);
        }
        self.reply_wait = ReplyWait::Nothing;
        if self.server.is_none() {
            return self.serve_inbox(buffers, cx).map_or(Ok(Poll::Ready(())), Err);
        }
        let inbox = std::mem::take(&mut self.session.inbox);
        self.forward(&inbox, ReadAhead::default(), &mut buffers.scratch, cx).map(Poll::Ready)
    }

    /// Resolves when the client leaves or a signal comes, while the session waits for a server. Meanwhile it
    /// sends unsent bytes to the client, and reads from it as long as the inbox is small. A client that sends
    /// no more has not left, if its request is whole.
    pub(super) async fn interrupted(&mut self) -> Result<ClientError, SessionEnd> {
        poll_fn(|cx| {
            if self.session.handle.is_signalled() {
                let signals = self.session.handle.take_signals();
                self.wanted_cancels.add(signals.cancels);
                self.session.leaving = self.session.leaving.take().or(signals.end_when_free.map(Box::new));
                if let Some(reason) = signals.end {
                    return Poll::Ready(Err(reason.into()));
                }
            }
            if !self.wanted_cancels.is_empty() {
                drop(self.wanted_cancels.take());
                return Poll::Ready(Ok(ClientError::Cancelled));
            }
            if !self.session.unsent.is_empty()
                && let Err(error) = self.session.unsent.drain(&mut self.session.client, cx)
            {
                return Poll::Ready(Err(SessionEnd::client_lost(Err(error))));
            }
            let read = BUFFERS.with_borrow_mut(|buffers| {
                while self.session.end_of_input.is_none()
                    && self.session.inbox.len() < 4 * FIRST_MESSAGE_BYTES
                {
                    match self.read_client(&mut buffers.read, cx) {
                        Poll::Pending => return Ok(()),
                        Poll::Ready(Ok(read)) if read > 0 => {
                            let chunk = buffers.read.get(..read).unwrap_or_default();
                            self.session.inbox.extend_from_slice(chunk);
                        }
                        Poll::Ready(read) if is_end_of_input(&read) => self.session.input_ends(),
                        Poll::Ready(lost) => return Err(SessionEnd::client_lost(lost.map(drop))),
                    }
                }
                Ok(())
            });
            let is_there = || {
                read?;
                if self.session.has_half_a_message() {
                    return Err(SessionEnd::client_lost(Ok(())));
                }
                self.session.poll_is_there(true, cx)
            };
            is_there().map_or_else(|lost| Poll::Ready(Err(lost)), |()| Poll::Pending)
        })
        .await
    }
}
