//! The replies that a server still owes, and when the client no longer needs the server. Pure: reads tags,
//! touches no socket.
//!
//! Every request that goes to the server leaves a [`PendingReply`] here, in order, and every reply must match
//! the oldest one. A reply that does not is a [`Desync`]: both connections are closed, and no session sees
//! the rest. The tracker lives with the server, so that an idle client owns none. The server is free when no
//! reply is pending, the last ReadyForQuery said `I`, and the client has begun no batch.
//!
//! Source: PostgreSQL documentation, "Message Flow" (extended query, error recovery, COPY), "Pipelining".

mod request;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, sync::Arc};

pub use self::request::{Origin, PendingReply, Request};
use crate::{
    data_path::{
        prepared::{Statement, StatementName, sql_prepare_effects::PrepareEffects},
        session_state::pins::Pins,
    },
    wire::message::append,
};

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy)]
pub struct SkippedRequest {
    /// The request itself failed; otherwise one before it did.
    pub failed: bool,
    /// How many requests of later batches change the unnamed statement.
    pub unnamed_later: usize,
}

/// The server sent a message that answers no request. Both connections are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an unexpected {:?} message", *.0 as char)]
pub struct Desync(pub u8);

/// What a reply means.
#[derive(Debug)]
pub struct ReplyOutcome {
    /// Whether the client gets it.
    pub pass: bool,
    /// The request that it completes.
    pub done: Option<Request>,
}

/// Where the server is in the client's batch of extended-protocol messages.
///
/// ```text
///              Parse, Bind, …            ErrorResponse, no Sync sent
///   Synced ───────────────────▶ Open ──────────────────────────────▶ Skipping
///     ▲ ▲                       │  ▲ │                                  │
///     │ └──────Sync, Query──────┘  │ │ CopyInResponse                   │
///     │         CopyDone, CopyFail │ ▼                                  │
///     ├────(after a Query)────CopyIn { in_batch }                       │
///     └──────────────────────────────────────────Sync───────────────────┘
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Batch {
    /// The client has ended its last batch, or runs simple queries.
    #[default]
    Synced,
    /// The client has sent extended-protocol messages and no Sync yet. A simple query ends a batch as well,
    /// unless the server skips it.
    Open,
    /// After an error the server ignores everything up to a Sync that the client has yet to send.
    Skipping,
    /// COPY FROM STDIN: the server takes data, and ignores Sync and Flush until the client ends the data.
    /// `in_batch`: the batch still lacks its Sync.
    CopyIn { in_batch: bool },
}

impl Batch {
    /// Whether the client has yet to send a Sync.
    #[inline]
    fn lacks_sync(self) -> bool {
        !matches!(self, Self::Synced | Self::CopyIn { in_batch: false })
    }

    /// The client has begun, or ended, a batch.
    #[inline]
    fn set_in_batch(&mut self, in_batch: bool) {
        *self = match self {
            Self::CopyIn { .. } => Self::CopyIn { in_batch },
            _ if in_batch => Self::Open,
            _ => Self::Synced,
        };
    }

    /// The server takes no COPY data any more.
    #[inline]
    fn end_copy(&mut self) {
        if let Self::CopyIn { in_batch } = *self {
            *self = if in_batch { Self::Open } else { Self::Synced };
        }
    }
}

bitflags::bitflags! {
    /// What the pending replies may still change.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    struct Unanswered: u8 {
        /// The client's present batch parses or closes a named statement.
        const NAMED_IN_BATCH = 1;
        /// An earlier batch does, and may yet fail.
        const NAMED_EARLIER = 1 << 1;
        /// The client's present batch changes the unnamed statement.
        const UNNAMED_IN_BATCH = 1 << 2;
        /// An earlier batch does, and may yet fail.
        const UNNAMED_EARLIER = 1 << 3;
        /// A request may commit.
        const COMMIT = 1 << 4;
        /// The proxy has asked something within the client's batch.
        const PROXY_QUESTION = 1 << 5;
        /// A request deallocates statements of the client.
        const DEALLOCATION = 1 << 6;
        /// The client's last message waits until all before it is answered.
        const AWAIT_ALL = 1 << 7;
    }
}

/// Of the present batch: it is not over when all that was sent before is answered.
const IN_BATCH: Unanswered = Unanswered::NAMED_IN_BATCH.union(Unanswered::UNNAMED_IN_BATCH);

/// One session's lease of one server: the pending replies, the transaction status, and the pins.
#[derive(Debug)]
pub struct ReplyTracker {
    pending: VecDeque<PendingReply>,
    /// From the last ReadyForQuery: `I`, `T` or `E`.
    status: u8,
    batch: Batch,
    unanswered: Unanswered,
    /// Counts the client's Syncs: what an earlier batch prepares is uncertain until its reply is in.
    batches: u32,
    /// Why the server stays with the session after the transaction.
    pins: Pins,
}

impl Default for ReplyTracker {
    fn default() -> Self {
        Self {
            pending: VecDeque::new(),
            status: b'I',
            batch: Batch::default(),
            unanswered: Unanswered::default(),
            batches: 0,
            pins: Pins::default(),
        }
    }
}

impl ReplyTracker {
    /// A request goes to the server. `false`: the server ignores it, because it skips to the next Sync.
    #[inline(always)]
    #[must_use = "a request that the server ignores has no effect"]
    pub fn track(&mut self, request: Request, origin: Origin) -> bool {
        match request {
            Request::Sync if self.takes_copy_data() && origin == Origin::Client => return true,
            // A Flush, which the server ignores like a Sync. What else is invalid fails the COPY.
            Request::Invalid if self.takes_copy_data() => return true,
            Request::Sync => {
                self.batches = self.batches.wrapping_add(1);
                if origin == Origin::Client {
                    self.batch.set_in_batch(false);
                } else if self.batch == Batch::Skipping {
                    self.batch = Batch::Open;
                }
                // Bits of this batch become those of an earlier one.
                let in_batch = self.unanswered.intersection(IN_BATCH);
                self.unanswered.remove(IN_BATCH);
                self.unanswered.insert(Unanswered::from_bits_truncate(in_batch.bits() << 1));
            }
            _ if self.batch == Batch::Skipping => return false,
            Request::Query(_) | Request::FunctionCall => {
                // In a batch it may be skipped, and then leaves the unnamed statement as it is.
                let may_be_skipped = self.batch.lacks_sync();
                self.unanswered.set(
                    Unanswered::UNNAMED_IN_BATCH,
                    may_be_skipped || self.unanswered.contains(Unanswered::UNNAMED_IN_BATCH),
                );
                self.batch.set_in_batch(false);
                // Any of its statements may fail, and the next request is not of its batch.
                if matches!(&request, Request::Query(Some(effects)) if !effects.effects.is_empty()) {
                    self.unanswered.insert(Unanswered::NAMED_EARLIER);
                }
            }
            _ => {
                if matches!(request, Request::Parse(Some(_)) | Request::Close(Some(_))) {
                    self.unanswered.insert(Unanswered::NAMED_IN_BATCH);
                }
                if origin.is_for_client() {
                    self.batch.set_in_batch(true);
                    if matches!(request, Request::Parse(None) | Request::CloseUnnamed) {
                        self.unanswered.insert(Unanswered::UNNAMED_IN_BATCH);
                    }
                }
            }
        }
        if matches!(request, Request::DescribeParsed(_) | Request::AskSettings(_)) {
            self.unanswered.insert(Unanswered::PROXY_QUESTION);
        }
        self.pending.push_back(PendingReply { request, origin });
        true
    }

    /// CopyDone or CopyFail goes to the server, possibly before the server has asked for data.
    pub fn copy_done(&mut self) {
        let marked =
            matches!(self.pending.back(), None | Some(PendingReply { request: Request::CopyEnd, .. }));
        if !self.takes_copy_data() && !marked {
            self.pending.push_back(PendingReply { request: Request::CopyEnd, origin: Origin::Client });
        }
        self.batch.end_copy();
    }

    /// The oldest reply is complete.
    #[inline]
    fn pop(&mut self) -> Option<PendingReply> {
        let answered = self.pending.pop_front();
        self.drop_copy_ends();
        answered
    }

    /// Drops the ends of COPY data that no COPY has asked for.
    #[inline]
    fn drop_copy_ends(&mut self) {
        while let Some(PendingReply { request: Request::CopyEnd, .. }) = self.pending.front() {
            self.pending.pop_front();
        }
    }

    /// The origin of the request that the next message answers; `None` when no reply is pending.
    #[inline]
    pub fn origin(&self) -> Option<Origin> {
        self.pending.front().map(|reply| reply.origin)
    }

    /// Whether a reply to the client is pending.
    pub fn has_client_request(&self) -> bool {
        self.pending.iter().any(|reply| reply.origin.is_for_client())
    }

    /// Whether an error of the request that is being answered is the client's: its batch is the client's, and
    /// not one of the proxy in front of it.
    pub fn works_for_client(&self) -> bool {
        let ends_batch = |reply: &&PendingReply| {
            matches!(reply.request, Request::Sync | Request::Query(_) | Request::FunctionCall)
        };
        let end = self.pending.iter().find(ends_batch);
        let is_client = |reply: &PendingReply| reply.origin.is_for_client();
        self.pending.front().is_some_and(is_client) && end.is_none_or(is_client)
    }

    /// What the simple query or Execute that is being answered does to prepared statements.
    pub fn prepare_effects(&mut self) -> Option<&mut Option<Box<PrepareEffects>>> {
        match &mut self.pending.front_mut()?.request {
            Request::Query(effects) | Request::Execute(effects) => Some(effects),
            _ => None,
        }
    }

    /// The client's name for the statement whose Parse is being answered.
    pub fn client_name(&self) -> Option<&StatementName> {
        match &self.pending.front()?.request {
            Request::Parse(Some(name)) | Request::ParseTaken(name) => Some(name),
            _ => None,
        }
    }

    /// Whether the next reply answers the Parse of the client's present unnamed statement.
    pub fn parses_last_unnamed(&self) -> bool {
        matches!(
            self.pending.front(),
            Some(PendingReply { request: Request::Parse(None), origin: Origin::Client })
        ) && self.pending.iter().filter(|reply| reply.changes_unnamed()).count() == 1
    }

    /// Whether a pending reply may answer a question of the proxy.
    #[inline]
    pub fn answers_proxy(&self) -> bool {
        self.unanswered.contains(Unanswered::PROXY_QUESTION)
    }

    /// Whether the next reply describes a statement to the proxy.
    pub fn is_description_pending(&self) -> bool {
        matches!(self.pending.front(), Some(PendingReply { request: Request::DescribeParsed(_), .. }))
    }

    /// Whether the next reply tells the proxy the server's settings.
    pub fn are_settings_pending(&self) -> bool {
        matches!(self.pending.front(), Some(PendingReply { request: Request::AskSettings(_), .. }))
    }

    /// Whether a batch before the client's present one may yet fail, and change what `name` means.
    #[inline]
    pub fn may_change(&self, name: &[u8]) -> bool {
        self.unanswered.contains(Unanswered::NAMED_EARLIER) && self.may_mean_another(name)
    }

    /// Whether an earlier batch may yet fail, and the server then lacks a named statement.
    #[inline]
    pub fn may_have_others(&self) -> bool {
        self.unanswered.contains(Unanswered::NAMED_EARLIER) && self.is_awaited()
    }

    /// As [`Self::may_change`], for the unnamed statement. If its Parse is skipped, later requests of the same
    /// batch are skipped too.
    #[inline]
    pub fn unnamed_may_change(&self) -> bool {
        let unnamed = Unanswered::UNNAMED_IN_BATCH | Unanswered::UNNAMED_EARLIER;
        self.unanswered.intersection(unnamed) == Unanswered::UNNAMED_EARLIER && self.is_awaited()
    }

    #[cold]
    fn may_mean_another(&self, name: &[u8]) -> bool {
        if self.takes_copy_data() {
            return false;
        }
        let ends_batch = |reply: &PendingReply| matches!(reply.request, Request::Sync | Request::Query(_));
        let ended = self.pending.iter().rposition(ends_batch).map_or(0, |last| last + 1);
        self.pending.iter().take(ended).any(|reply| match &reply.request {
            Request::Parse(Some(changed)) | Request::Close(Some(changed)) => changed.is_called(name),
            Request::Query(Some(effects)) => effects.concerns(name),
            _ => false,
        })
    }

    /// A pending Close of `name` closes `new` in place of `old`: `new` is restored if the Close is skipped.
    #[cold]
    pub fn closes_instead(&mut self, name: &[u8], old: &Statement, new: &Arc<Statement>) {
        for reply in &mut self.pending {
            if let Request::Close(Some(closed)) = &mut reply.request
                && closed.is_called(name)
                && closed.statement.is(old)
            {
                closed.statement = new.clone();
            }
        }
    }

    /// Whether a pending reply describes the statement, prepared by another name than this.
    #[cold]
    pub fn describes(&self, statement: &Statement, name: &[u8]) -> bool {
        self.pending.iter().any(|reply| match &reply.request {
            Request::DescribeParsed(described) => {
                described.statement.is(statement) && !described.is_called(name)
            }
            _ => false,
        })
    }

    /// Whether a pending reply decides what a name means or how a statement is described, and comes without a
    /// further message of the client.
    pub fn is_awaited(&self) -> bool {
        let all = self.unanswered.contains(Unanswered::AWAIT_ALL);
        let decides = |request: &Request| match request {
            Request::Parse(_)
            | Request::Close(Some(_))
            | Request::CloseUnnamed
            | Request::DescribeParsed(_) => true,
            Request::Query(Some(effects)) if !effects.effects.is_empty() => true,
            Request::Query(_) => self.unanswered.contains(Unanswered::UNNAMED_EARLIER),
            _ => false,
        };
        !self.takes_copy_data() && self.pending.iter().any(|reply| all || decides(&reply.request))
    }

    /// Whether a pending request may yet fail that the client has sent without a Sync. The server then skips all
    /// that follows, simple queries too, up to a Sync; one of the proxy's would end that.
    pub fn may_yet_skip(&self) -> bool {
        let mut unended =
            self.pending.iter().rev().take_while(|reply| !matches!(reply.request, Request::Sync));
        // A Close does not fail.
        unended.any(|reply| {
            !matches!(
                reply.request,
                Request::Query(_)
                    | Request::FunctionCall
                    | Request::CopyEnd
                    | Request::Close(_)
                    | Request::CloseUnnamed
            )
        })
    }

    /// Whether a pending request may deallocate statements. The client's message then waits for all replies.
    #[inline]
    pub fn is_deallocating(&mut self) -> bool {
        if !self.unanswered.contains(Unanswered::DEALLOCATION) {
            return false;
        }
        let may_come = self.is_working() && !self.takes_copy_data();
        self.unanswered.set(Unanswered::DEALLOCATION, may_come);
        if may_come {
            self.wait_for_all();
        }
        may_come
    }

    /// The client's present message waits until all before it is answered.
    pub fn wait_for_all(&mut self) {
        self.unanswered.insert(Unanswered::AWAIT_ALL);
    }

    /// A request is about to be sent that may commit, or may deallocate statements of the client.
    #[inline]
    pub fn note(&mut self, commits: bool, deallocates: bool) {
        let mut noted = Unanswered::empty();
        noted.set(Unanswered::COMMIT, commits);
        noted.set(Unanswered::DEALLOCATION, deallocates);
        self.unanswered.insert(noted);
    }

    /// Whether a request is pending that may commit.
    pub fn is_committing(&self) -> bool {
        self.unanswered.contains(Unanswered::COMMIT)
    }

    /// Whether rows that arrive now are the client's, and change nothing here. `Some(true)`: they may come with their
    /// description and CommandComplete, as of a simple query.
    #[inline]
    pub fn passes_rows(&self) -> Option<bool> {
        match self.pending.front() {
            Some(PendingReply { request: Request::Query(_), origin: Origin::Client }) => Some(true),
            Some(PendingReply { request: Request::Execute(_), origin: Origin::Client }) => Some(false),
            _ => None,
        }
    }

    /// A message other than ErrorResponse and ReadyForQuery has arrived. [`Desync`]: it answers no request.
    #[inline(always)]
    pub fn reply(&mut self, tag: u8) -> Result<ReplyOutcome, Desync> {
        let Some(front) = self.pending.front() else {
            return Err(Desync(tag));
        };
        let completes = match (tag, &front.request) {
            (b'1', Request::Parse(_) | Request::ParseAsIs | Request::ParseTaken(_))
            | (b'2', Request::Bind)
            | (b'3', Request::Close(_) | Request::CloseUnnamed) => true,
            (b'T' | b'n', Request::Describe | Request::DescribeParsed(_)) => true,
            (b'C' | b'I' | b's', Request::Execute(_))
            | (b'C', Request::AskSettings(_) | Request::RestoreSetting(_)) => true,
            (b't', Request::Describe | Request::DescribeParsed(_)) => false,
            (b'T' | b'C' | b'I', Request::Query(_)) | (b'V', Request::FunctionCall) => false,
            (b'D' | b'H' | b'd' | b'c', Request::Execute(_) | Request::Query(_))
            | (b'D', Request::AskSettings(_) | Request::RestoreSetting(_)) => false,
            (b'G', Request::Execute(_) | Request::Query(_)) => {
                self.start_copy_in();
                false
            }
            _ => return Err(Desync(tag)),
        };
        let pass = self.origin() == Some(Origin::Client);
        let done = if completes { self.pop().map(|reply| reply.request) } else { None };
        Ok(ReplyOutcome { pass, done })
    }

    /// The server asks for COPY data: it ignores every Sync up to the end of the data. If a batch asked for the
    /// COPY, it then lacks its Sync; a simple query's COPY is in no batch.
    fn start_copy_in(&mut self) {
        let of_batch =
            matches!(self.pending.front(), Some(PendingReply { request: Request::Execute(_), .. }));
        let end = self.pending.iter().position(|reply| matches!(reply.request, Request::CopyEnd));
        let behind = end.map(|end| self.pending.split_off(end + 1));
        let before = self.pending.len();
        self.pending.retain(|reply| !matches!(reply.request, Request::Invalid));
        if self.pending.len() < before && !of_batch {
            self.batch.set_in_batch(false);
        }
        let before = self.pending.len();
        self.pending.retain(|reply| !matches!(reply.request, Request::Sync | Request::CopyEnd));
        let ignored_syncs = before - self.pending.len() > usize::from(end.is_some());
        match behind {
            Some(mut behind) => self.pending.append(&mut behind),
            None => self.batch = Batch::CopyIn { in_batch: self.batch.lacks_sync() },
        }
        if of_batch
            && ignored_syncs
            && !self.pending.iter().any(|reply| matches!(reply.request, Request::Sync))
        {
            self.batch.set_in_batch(true);
        }
    }

    /// An ErrorResponse has arrived. Calls `skipped` for every request of the batch that the server now
    /// skips, latest first, and last for the one that failed. Returns on whose behalf that one was.
    /// [`Desync`]: it answers no request.
    pub fn error(&mut self, mut skipped: impl FnMut(PendingReply, SkippedRequest)) -> Result<Origin, Desync> {
        self.batch.end_copy();
        let Some(front) = self.pending.front() else {
            return Err(Desync(b'E'));
        };
        let origin = front.origin;
        if matches!(front.request, Request::Sync | Request::Query(_) | Request::FunctionCall) {
            return Ok(origin);
        }
        let sync = self.pending.iter().position(|reply| matches!(reply.request, Request::Sync));
        if sync.is_none() {
            // Also where a simple query in the batch would have ended it: the server skips that, too.
            self.batch = Batch::Skipping;
        }
        let end = sync.unwrap_or(self.pending.len());
        let unnamed_later = self.pending.iter().skip(end).filter(|reply| reply.changes_unnamed()).count();
        for (place, reply) in self.pending.drain(..end).enumerate().rev() {
            skipped(reply, SkippedRequest { failed: place == 0, unnamed_later });
        }
        self.drop_copy_ends();
        Ok(origin)
    }

    /// ReadyForQuery has arrived. `true`: the client gets it. [`Desync`]: another reply is pending first.
    #[inline]
    pub fn ready(&mut self, status: u8) -> Result<bool, Desync> {
        if !matches!(status, b'I' | b'T' | b'E') {
            return Err(Desync(b'Z'));
        }
        match self.pop() {
            Some(PendingReply {
                request: Request::Sync | Request::Query(_) | Request::FunctionCall,
                origin,
            }) => {
                self.status = status;
                self.batch.end_copy();
                if self.pending.is_empty() {
                    self.unanswered = self.unanswered.intersection(IN_BATCH);
                }
                Ok(matches!(origin, Origin::Client | Origin::Denied(_)))
            }
            _ => Err(Desync(b'Z')),
        }
    }

    /// The transaction has ended, no reply is pending and no batch is open. Pins do not count here.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.pending.is_empty() && self.status == b'I' && !self.batch.lacks_sync()
    }

    /// How many replies are pending.
    #[inline]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether the server works on a request, in contrast to a transaction that idles.
    pub fn is_working(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether the client's next query finds the present transaction status: all that is pending belongs to
    /// the proxy, in batches of its own.
    pub fn is_status_known(&self) -> bool {
        let own = |reply: &PendingReply| {
            matches!(reply.origin, Origin::Proxy | Origin::Restore | Origin::TryPrepare)
        };
        !self.batch.lacks_sync() && self.pending.iter().all(own)
    }

    /// The proxy sends a BEGIN: the next request runs within a transaction.
    pub fn begin(&mut self) {
        let _ = self.track(Request::Query(None), Origin::Proxy);
        self.status = b'T';
    }

    /// Whether the server takes COPY data, and would take any other message for an error in it.
    pub fn takes_copy_data(&self) -> bool {
        matches!(self.batch, Batch::CopyIn { .. })
    }

    /// The transaction status of the last ReadyForQuery: `I`, `T` or `E`.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the client has begun a batch and sent no Sync yet.
    pub fn is_unsynced(&self) -> bool {
        self.batch.lacks_sync()
    }

    /// Whether the proxy may send a batch of its own now: its Sync would end no batch of the client's, and none
    /// that is pending may fail and have the server skip it.
    pub fn admits_own_batch(&self) -> bool {
        !self.is_unsynced() && !self.may_yet_skip()
    }

    /// Ends a batch of the proxy's own: appends its Sync.
    pub fn end_own_batch(&mut self, out: &mut Vec<u8>) {
        append(out, b'S', |_| {});
        let _ = self.track(Request::Sync, Origin::Proxy);
    }

    /// Whether the server ignores everything up to a Sync that the client has yet to send.
    pub fn is_skipping(&self) -> bool {
        self.batch == Batch::Skipping
    }

    /// The number of the batch that the client is sending.
    pub fn batch(&self) -> u32 {
        self.batches
    }

    /// Why the server stays with the session between transactions.
    #[inline]
    pub fn pins(&self) -> Pins {
        self.pins
    }

    /// The one place where pins change.
    #[inline]
    pub fn set_pins(&mut self, pins: Pins) {
        self.pins = pins;
    }
}
