//! What a client sends and no server gets: a request that was refused, to its last byte, and what asks for nothing.
//!
//! PostgreSQL ignores data and ends of a COPY that is not open, and a Flush behind which nothing waits; drivers send them
//! behind a COPY that failed. All of this is left out as it comes in: however long it is, nothing of it is kept.

use std::ops::ControlFlow;

use super::{
    client_messages::{ClientMessages, GOES_ON},
    client_side::{ClientSide, need_of_client, violation},
    ensure_prepared::WaitReason,
};
use crate::{
    error::{ClientError, Limit},
    wire::{
        frame::{Need, Piece, header},
        message::ready_for_query,
    },
};

/// A client's first message is waited for, without a server, up to this much; of a longer one the rest is passed on as it
/// comes. So a client that sends slowly holds no server.
pub const FIRST_MESSAGE_BYTES: usize = 16 * 1024;

/// What a client that holds no server has begun to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstMessage {
    /// Nothing that a server is needed for, or too little of it.
    Nothing,
    /// A request.
    Request,
    /// Terminate.
    Goodbye,
}

/// Whether a message has no effect and no answer where nothing is asked, no transaction is open and no batch has begun.
#[inline]
pub(super) fn asks_nothing(tag: u8) -> bool {
    matches!(tag, b'd' | b'c' | b'f' | b'H')
}

/// How far what is left out goes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SkippedMessage {
    until: Until,
    /// What ReadyForQuery says behind a request that was refused.
    status: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Until {
    #[default]
    Nothing,
    /// The end of a message that asks for nothing.
    Ignored,
    /// The end of a request that was refused: its first message is yet to be looked at.
    Request,
    /// The end of this message, which ends a request that was refused.
    LastMessage,
    /// The Sync of a batch that was refused.
    Sync,
}

impl SkippedMessage {
    /// The rest of the message that is coming in asks for nothing.
    pub fn ignore(&mut self) {
        self.until = Until::Ignored;
    }

    /// Whether the message that is coming in asks for nothing.
    #[inline]
    pub fn is_ignored(self) -> bool {
        self.until == Until::Ignored
    }

    /// And it has ended.
    pub fn end_ignored(&mut self) {
        self.until = Until::Nothing;
    }
}

impl ClientMessages<'_, '_> {
    /// Sees to a message that is there whole. It stops at one that must wait: nothing has been done about it then.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        tag: u8,
        bytes: &[u8],
        may_fill: bool,
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
        if asks_nothing(tag) && self.server.replies.is_over() {
            return GOES_ON;
        }
        if (may_fill || self.is_much_built()) && self.is_full(tag) {
            return Ok(ControlFlow::Break(WaitReason::Room));
        }
        self.message(tag, bytes, true)
    }

    /// The same of the beginning of a message. `full`: there was no memory to wait for all of it.
    #[cold]
    pub(super) fn take_part(
        &mut self,
        tag: u8,
        bytes: &[u8],
        may_fill: bool,
        full: Option<Limit>,
        left_out: &mut SkippedMessage,
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
        if asks_nothing(tag) && self.server.replies.is_over() {
            left_out.ignore();
            return GOES_ON;
        }
        if (may_fill || self.is_much_built()) && self.is_full(tag) {
            return Ok(ControlFlow::Break(WaitReason::Room));
        }
        if let Some(limit) = full.filter(|_| self.rules.follow) {
            self.deny(tag, limit);
            left_out.ignore();
            return GOES_ON;
        }
        let flow = self.message(tag, bytes, false)?;
        if std::mem::take(&mut self.return_state.denied) {
            left_out.ignore();
        }
        Ok(flow)
    }
}

impl ClientSide {
    /// Whether what the client has sent, while it holds no server, is a request that has come far enough for one.
    ///
    /// # Errors
    /// The client broke the protocol.
    #[inline]
    pub fn front(&self, sent: &[u8]) -> Result<FirstMessage, ClientError> {
        let Some((tag, length)) = header(sent).map_err(violation)? else { return Ok(FirstMessage::Nothing) };
        let _: Need = need_of_client(tag, length, &self.rules).map_err(violation)?;
        let is_enough = sent.len() > length || sent.len() >= FIRST_MESSAGE_BYTES;
        Ok(match tag {
            b'X' => FirstMessage::Goodbye,
            tag if is_enough && !asks_nothing(tag) => FirstMessage::Request,
            _ => FirstMessage::Nothing,
        })
    }

    /// Whether what the client sends next is left out.
    #[inline]
    pub fn is_leaving_out(&self) -> bool {
        self.skipped.until != Until::Nothing
    }

    /// Whether that is the rest of a request that was refused.
    #[inline]
    pub fn is_refusing(&self) -> bool {
        self.is_leaving_out() && !self.skipped.is_ignored()
    }

    /// The request that comes next was answered with an error of ours: it is left out. `status` is what ReadyForQuery says
    /// behind it.
    pub fn begin_refusing(&mut self, status: u8) {
        self.skipped = SkippedMessage { until: Until::Request, status };
    }

    /// The same, in the middle of a batch.
    pub fn refuse_to_sync(&mut self, status: u8) {
        self.skipped = SkippedMessage { until: Until::Sync, status };
    }

    /// Leaves out what is at the front of `chunk` and no server gets, and answers the end of a refused request, a simple query
    /// or a batch up to its Sync, with ReadyForQuery. What is behind it is handed back. Called only while the session holds
    /// no server, or has been refused what it asked.
    ///
    /// # Errors
    /// The client broke the protocol.
    pub fn leave_out<'c>(
        &mut self,
        mut chunk: &'c [u8],
        replies: &mut Vec<u8>,
    ) -> Result<&'c [u8], ClientError> {
        let Self { framer, rules, skipped: left_out, .. } = self;
        loop {
            if !framer.mid_message() {
                // Of a header that is not whole nothing is taken: it may be of something else.
                let Some((tag, _)) = header(chunk).map_err(violation)? else { return Ok(chunk) };
                let refused = !matches!(left_out.until, Until::Nothing | Until::Ignored);
                if tag == b'X' || !refused && !asks_nothing(tag) {
                    return Ok(chunk);
                }
            }
            let need = |tag, length| need_of_client(tag, length, rules).map(|_| Need::Header);
            let (tag, ended) = match framer.next(&mut chunk, need).map_err(violation)? {
                None => return Ok(chunk),
                Some(Piece::Whole { tag, .. }) => (Some(tag), true),
                Some(Piece::First { tag, .. }) => (Some(tag), false),
                Some(Piece::Rest { last, .. }) => (None, last),
            };
            left_out.until = match (left_out.until, tag) {
                (Until::Nothing | Until::Ignored, _) if ended => Until::Nothing,
                (Until::Nothing | Until::Ignored, _) => Until::Ignored,
                (Until::Request, Some(b'Q' | b'F')) | (_, Some(b'S')) => Until::LastMessage,
                (Until::Request, Some(b'P' | b'B' | b'D' | b'C' | b'E')) => Until::Sync,
                (going_on, _) => going_on,
            };
            if left_out.until == Until::LastMessage && ended {
                left_out.until = Until::Nothing;
                ready_for_query(replies, left_out.status);
            }
        }
    }
}
