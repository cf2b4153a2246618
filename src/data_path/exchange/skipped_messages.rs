//! Messages that no server receives: rejected requests, and messages without effect.
//!
//! PostgreSQL ignores COPY data and CopyDone or CopyFail while no COPY is open, and a Flush without a pending
//! reply. Drivers send them after a failed COPY. They are skipped as they arrive, and none of their bytes are
//! kept.

use std::ops::ControlFlow;

use super::{
    client_messages::{CONTINUE, ClientMessages, Handled},
    client_side::{ClientSide, SMALL_MESSAGE_MAX, need_of_client, violation},
    ensure_prepared::WaitReason,
};
use crate::{
    error::{ClientError, Limit},
    wire::{
        frame::{FrameError, HEADER_BYTES, Need, Piece, header},
        message::{Severity, ready_for_query},
    },
};

/// The session waits without a server for this many bytes of its first message; the rest of a longer one is
/// passed on as it arrives. So a slow client does not hold a server.
pub const FIRST_MESSAGE_BYTES: usize = 16 * 1024;

/// The first message of a client that holds no server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstMessage {
    /// None, or too little of it, or no server is needed for it.
    Nothing,
    /// A request.
    Request,
    /// Terminate.
    Terminate,
}

/// Whether such a message has no effect and no reply while no request is pending, no transaction is open and
/// no batch has begun. An error: PostgreSQL accepts no such message outside of a COPY.
#[inline]
pub(super) fn has_no_effect(tag: u8, length: usize) -> Result<bool, ClientError> {
    match tag {
        b'f' if length > SMALL_MESSAGE_MAX => Err(violation(FrameError::Length)),
        b'd' | b'c' | b'f' => Ok(true),
        _ => Ok(is_flush(tag, length)),
    }
}

/// Whether the message is a Flush. With a body it is an invalid message of a batch.
#[inline]
fn is_flush(tag: u8, length: usize) -> bool {
    tag == b'H' && length < HEADER_BYTES
}

/// Whether the message asks for nothing by itself.
#[inline]
pub(super) fn is_no_request(tag: u8, length: usize) -> bool {
    matches!(tag, b'd' | b'c' | b'f') || is_flush(tag, length)
}

/// The error that PostgreSQL sends for a Sync or Flush with a body.
pub fn invalid_format() -> ClientError {
    ClientError::ProtocolViolation("invalid message format".to_owned())
}

/// The client's messages that are skipped.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SkippedMessage {
    until: Until,
    /// The status in ReadyForQuery after a rejected request.
    status: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Until {
    #[default]
    Nothing,
    /// To the end of a message without effect.
    Ignored,
    /// To the end of a rejected request, whose first message is still to come.
    Request,
    /// To the end of this message, which ends a rejected request.
    LastMessage,
    /// To the Sync of a rejected batch.
    Sync,
}

impl SkippedMessage {
    /// Skips the rest of the message that is arriving.
    pub fn ignore(&mut self) {
        self.until = Until::Ignored;
    }

    /// Whether the rest of the message that is arriving is skipped.
    #[inline]
    pub fn is_ignored(self) -> bool {
        self.until == Until::Ignored
    }

    /// The skipped message has ended.
    pub fn end_ignored(&mut self) {
        self.until = Until::Nothing;
    }
}

impl ClientMessages<'_, '_> {
    /// Handles a whole message. Breaks at a message that must wait, without any effect.
    #[inline(always)]
    pub(super) fn take(&mut self, tag: u8, bytes: &[u8], may_fill: bool) -> Handled {
        let length = bytes.len() - 1;
        if self.server.replies.is_over() && has_no_effect(tag, length)? {
            return CONTINUE;
        }
        if (may_fill || self.is_much_built()) && self.is_full(tag, length) {
            return Ok(ControlFlow::Break(WaitReason::Room));
        }
        self.message(tag, bytes, true)
    }

    /// Handles the first part of a message. `full`: there was no memory for the whole message.
    #[cold]
    pub(super) fn take_first_part(
        &mut self,
        tag: u8,
        bytes: &[u8],
        may_fill: bool,
        full: Option<Limit>,
        skipped: &mut SkippedMessage,
    ) -> Handled {
        let length = header(bytes).map_err(violation)?.map_or(0, |(_, length)| length);
        if self.server.replies.is_over() && has_no_effect(tag, length)? {
            skipped.ignore();
            return CONTINUE;
        }
        if (may_fill || self.is_much_built()) && self.is_full(tag, length) {
            return Ok(ControlFlow::Break(WaitReason::Room));
        }
        if let Some(limit) = full.filter(|_| self.rules.follow) {
            self.reject(tag, limit);
            skipped.ignore();
            return CONTINUE;
        }
        let flow = self.message(tag, bytes, false)?;
        if std::mem::take(&mut self.return_state.rejected) {
            skipped.ignore();
        }
        Ok(flow)
    }
}

impl ClientSide {
    /// Whether the client, which holds no server, has sent enough of a request to need one. An error: the
    /// client broke the protocol.
    #[inline]
    pub fn first_message(&self, sent: &[u8]) -> Result<FirstMessage, ClientError> {
        let Some((tag, length)) = header(sent).map_err(violation)? else { return Ok(FirstMessage::Nothing) };
        let _: Need = need_of_client(tag, length, &self.rules).map_err(violation)?;
        let is_enough = sent.len() > length || sent.len() >= FIRST_MESSAGE_BYTES;
        Ok(match tag {
            b'X' => FirstMessage::Terminate,
            tag if !has_no_effect(tag, length)? && is_enough => FirstMessage::Request,
            _ => FirstMessage::Nothing,
        })
    }

    /// Whether the client's next bytes are skipped.
    #[inline]
    pub fn is_skipping_messages(&self) -> bool {
        self.skipped.until != Until::Nothing
    }

    /// Whether they belong to a rejected request.
    #[inline]
    pub fn is_skipping_rejected(&self) -> bool {
        self.is_skipping_messages() && !self.skipped.is_ignored()
    }

    /// Skips the next request, which the proxy has answered with an error. `status` is for its ReadyForQuery.
    pub fn skip_request(&mut self, status: u8) {
        self.skipped = SkippedMessage { until: Until::Request, status };
    }

    /// Skips to the Sync of the open batch.
    pub fn skip_to_sync(&mut self, status: u8) {
        self.skipped = SkippedMessage { until: Until::Sync, status };
    }

    /// Skips messages at the front of `chunk`, and answers the end of a rejected request (a simple query, or
    /// a batch up to its Sync) with ReadyForQuery. Returns the other bytes. Called only while the session
    /// holds no server, or after its request was rejected. An error: the client broke the protocol.
    pub fn skip_messages<'c>(
        &mut self,
        mut chunk: &'c [u8],
        replies: &mut Vec<u8>,
    ) -> Result<&'c [u8], ClientError> {
        let Self { framer, rules, skipped, .. } = self;
        loop {
            if !framer.mid_message() {
                // A partial header is left there: its message may be one that must not be skipped.
                let Some((tag, length)) = header(chunk).map_err(violation)? else { return Ok(chunk) };
                let is_rejected = !matches!(skipped.until, Until::Nothing | Until::Ignored);
                if tag == b'X' || !has_no_effect(tag, length)? && !is_rejected {
                    return Ok(chunk);
                }
                if (tag, skipped.until) == (b'S', Until::Sync) && length >= HEADER_BYTES {
                    invalid_format().write(Severity::Error, replies);
                }
            }
            let need = |tag, length| need_of_client(tag, length, rules).map(|_| Need::Header);
            let (tag, ended) = match framer.next(&mut chunk, need).map_err(violation)? {
                None => return Ok(chunk),
                Some(Piece::Whole { tag, .. }) => (Some(tag), true),
                Some(Piece::First { tag, .. }) => (Some(tag), false),
                Some(Piece::Rest { last, .. }) => (None, last),
            };
            skipped.until = match (skipped.until, tag) {
                (Until::Nothing | Until::Ignored, _) if ended => Until::Nothing,
                (Until::Nothing | Until::Ignored, _) => Until::Ignored,
                (Until::Request, Some(b'Q' | b'F')) | (_, Some(b'S')) => Until::LastMessage,
                (Until::Request, Some(b'P' | b'B' | b'D' | b'C' | b'E')) => Until::Sync,
                (going_on, _) => going_on,
            };
            if skipped.until == Until::LastMessage && ended {
                skipped.until = Until::Nothing;
                ready_for_query(replies, skipped.status);
            }
        }
    }
}
