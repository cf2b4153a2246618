//! A client that sends no more: the end of its input has been read. It may still read replies.
//!
//! PostgreSQL serves everything that it received whole before that end, and so does the session: it waits for
//! a server and for replies as before, and ends when everything is sent. What only the client could complete (a
//! message, the data of a COPY, a batch without Sync) is left to the server, which gets the end of input too.
//!
//! A client that is gone looks the same until something is written to it. So the client gets a
//! ParameterStatus with a value that it knows, now and then, while nothing else is sent; after the first one
//! that reaches no client, a write fails, and the session ends as with a client that is lost.

use std::{future::Future as _, io, pin::Pin, task::Context, time::Duration};

use tokio::{
    io::AsyncWrite as _,
    time::{Instant, Sleep},
};

use super::{
    Relay,
    acquire_server::ReplyWait,
    client_session::ClientSession,
    session_end::{Loss, SessionEnd},
};
use crate::wire::{frame::header, message::parameter_status};

/// The first pause between two writes that only find out whether the client is there; each one is twice as
/// long as the one before. Longer than most requests take.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The end of a client's input has been read.
#[derive(Debug)]
pub struct EndOfInput {
    next_write: Pin<Box<Sleep>>,
    pause: Duration,
    /// The server has got the end of input, too.
    pub(super) is_passed_on: bool,
}

/// Whether a read says that the client sends no more: without bytes, or in TLS without its closing message.
#[cold]
pub(super) fn is_end_of_input(read: &io::Result<usize>) -> bool {
    read.as_ref().map_or_else(|error| error.kind() == io::ErrorKind::UnexpectedEof, |read| *read == 0)
}

impl ClientSession {
    /// The end of the client's input has been read.
    #[cold]
    pub(super) fn input_ends(&mut self) {
        self.end_of_input.get_or_insert_with(|| {
            let next_write = Box::pin(tokio::time::sleep(FIRST_PAUSE));
            Box::new(EndOfInput { next_write, pause: FIRST_PAUSE, is_passed_on: false })
        });
    }

    /// Whether the first message of the inbox is not whole, and never will be.
    #[cold]
    pub(super) fn has_half_a_message(&self) -> bool {
        self.end_of_input.is_some()
            && !matches!(header(&self.inbox), Ok(Some((_, length))) if self.inbox.len() > length)
    }

    /// Writes to a client whose input has ended when it is time to. `may_write`: the client's last message is
    /// whole. An error: the client is gone.
    #[cold]
    pub(super) fn poll_is_there(&mut self, may_write: bool, cx: &mut Context<'_>) -> Result<(), SessionEnd> {
        let Some(end) = self.end_of_input.as_mut() else { return Ok(()) };
        while end.next_write.as_mut().poll(cx).is_ready() {
            end.pause = PAUSE_MAX.min(2 * end.pause);
            end.next_write.as_mut().reset(Instant::now() + end.pause);
            if may_write && self.unsent.is_empty() {
                let mut bytes = Vec::new();
                // Every server reports it, with this value.
                parameter_status(&mut bytes, b"integer_datetimes", b"on");
                let sent = self.unsent.send(&mut self.client, cx, &bytes);
                sent.map_err(|error| SessionEnd::client_lost(Err(error)))?;
            }
        }
        Ok(())
    }
}

impl Relay {
    /// Goes on with a client whose input has ended. Returns the end of the session when everything is served,
    /// or when the client is gone.
    #[cold]
    pub(super) fn poll_end_of_input(&mut self, cx: &mut Context<'_>) -> Option<SessionEnd> {
        let working = self.server.as_ref().is_some_and(|server| server.side.replies.is_working());
        let is_served = !working
            && self.session.unsent.is_empty()
            && self.held_reply.is_empty()
            && !self.has_waiting_messages();
        if is_served {
            return Some(SessionEnd::ClientLost(Loss::Closed));
        }
        if !self.has_waiting_messages() {
            self.pass_end_on(cx);
        }
        let may_write = self.held_reply.is_empty()
            && self.server.as_ref().is_none_or(|server| !server.side.mid_message());
        self.session.poll_is_there(may_write, cx).err()
    }

    /// Whether messages wait for replies before a server gets them.
    fn has_waiting_messages(&self) -> bool {
        self.reply_wait != ReplyWait::Nothing || self.holds_back()
    }

    /// Tells the server that no more comes if it waits for more.
    fn pass_end_on(&mut self, cx: &mut Context<'_>) {
        let (Some(server), Some(end)) = (self.server.as_mut(), self.session.end_of_input.as_mut()) else {
            return;
        };
        let replies = &server.side.replies;
        let lacks_more =
            !server.side.has_whole_messages() || replies.takes_copy_data() || replies.is_unsynced();
        if !lacks_more || end.is_passed_on || !server.unsent.is_empty() {
            return;
        }
        server.side.input_ended();
        end.is_passed_on = Pin::new(&mut server.stream).poll_shutdown(cx).is_ready();
    }

    /// Whether the server's end of the connection is its answer to the end of the client's input.
    #[cold]
    pub(super) fn is_end_passed_on(&self) -> bool {
        self.session.end_of_input.as_ref().is_some_and(|end| end.is_passed_on)
    }
}
