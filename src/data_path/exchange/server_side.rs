//! The server's side of an exchange: what lives with a server, and what its messages mean for client and lease.

use std::sync::Arc;

use super::{
    client_side::ClientSide,
    parameter_reports::lexing,
    pending_checks::PendingChecks,
    pending_replies::{Desync, Origin, ReplyTracker, Request},
    pg_terminate_backend::{BackendSignals, SignalSender},
    restore_settings::ProxyStatements,
    sequences::ServerSequences,
};
use crate::{
    data_path::{
        prepared::{
            PreparedLimits, ServerStatements, Statement,
            row_description::DescriptionReader,
            sql_prepare_effects::{PrepareEffects, with_client_names, without_position},
        },
        session_state::{
            Settings, channels::NotificationFilter, parameter_status::ReportedParameters, pins::Pins,
            state_query::StateChecks,
        },
        sql::Lexing,
    },
    wire::{
        frame::{FrameError, Framer, HEADER_BYTES, Need, Piece},
        message::Severity,
        outgoing::Outgoing,
        server_error::{ServerError, error_field, is_fatal},
    },
};

/// The longest ErrorResponse or ParameterStatus that is read whole; PostgreSQL itself stays below 30 000 bytes.
const REPORT_BYTES_MAX: usize = 64 * 1024;

/// The longest description of a statement: 65 535 types of parameters; and of as many columns as PostgreSQL allows, 1 664, with
/// names of 63 bytes it is shorter.
const SHAPE_BYTES_MAX: usize = 256 * 1024 + 16;

/// A DataRow of one column of one byte.
const ANSWER_BYTES: usize = 11;

/// What lives with a server: its side, and the lease of whoever holds it.
#[derive(Debug)]
pub struct ServerSide {
    pub(super) framer: Framer,
    /// A message has been passed to it in part, and the rest is still to come.
    pub(super) half_passed: bool,
    /// The rest of the message that is coming in is left out.
    hiding: bool,
    /// Who waits for what.
    pub replies: ReplyTracker,
    /// What it has prepared.
    pub statements: ServerStatements,
    /// What it has SET, as far as we know.
    pub applied: Arc<Settings>,
    /// What may have changed since.
    pub checks: PendingChecks,
    /// Its session has set parameters whose names nobody knows, and has not reset everything since.
    pub opaque_settings: bool,
    /// Its part in what the client hears of notifications.
    pub notifications: NotificationFilter,
    /// The portal that was bound last, if it is of a text that prepares or forgets statements.
    pub bound: Option<(Box<[u8]>, PrepareEffects)>,
    /// Why a statement could not be brought here: in its stead the client would be told that it does not exist.
    attempted: Option<Vec<u8>>,
    /// What is being read of a statement's shape.
    pub(super) description: DescriptionReader,
    /// What the server has said so far of its settings; `None`: too much of it.
    pub(super) told_settings: Option<Settings>,
    /// A statement that was brought here, whose shape its client waits for; and whether it has turned out to be another.
    pub sought: Option<(Arc<Statement>, bool)>,
    /// What its client's texts do to other sessions.
    pub signals: BackendSignals,
    /// Whose sequences it remembers.
    pub sequences: ServerSequences,
    /// Those of our own statements that are prepared.
    pub ours: ProxyStatements,
    /// Bytes of requests that may be kept until they are answered.
    pub(super) unanswered_bytes: usize,
    /// Every reported parameter, as last reported.
    pub reported: ReportedParameters,
    /// What it has reported is yet to be compared with what its pool knows.
    pub parameters_changed: bool,
    /// It may report something else than it has, and says so when it is spoken to.
    pub is_stale: bool,
    /// Its client is yet to be told of what differs from what it believes.
    pub(super) must_tell: bool,
    pub(super) lexing: Lexing,
}

/// What a chunk of the server's brought, beside bytes to pass on.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEvents {
    /// ReadyForQuery messages that the client gets.
    pub ready: u32,
    /// The last of them ended a transaction.
    pub transaction_ended: bool,
    /// The server says that it closes the connection.
    pub fatal: bool,
    /// Errors that the client gets.
    pub errors: u32,
}

/// Why a server cannot be used, nor its client be served, any longer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// Bytes that are not the protocol.
    #[error("the server broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// A reply to nothing.
    #[error(transparent)]
    Desync(#[from] Desync),
    /// What had to be put in did not work.
    #[error("the server refused our own bookkeeping: {0}")]
    Bookkeeping(ServerError),
}

impl ServerSide {
    /// A server that has just been opened, with what it reported.
    pub fn new(reported: ReportedParameters, prepared_max: PreparedLimits) -> Self {
        Self {
            framer: Framer::default(),
            half_passed: false,
            hiding: false,
            replies: ReplyTracker::default(),
            statements: ServerStatements::new(prepared_max),
            applied: Arc::default(),
            checks: PendingChecks::default(),
            opaque_settings: false,
            notifications: NotificationFilter::default(),
            bound: None,
            attempted: None,
            description: DescriptionReader::default(),
            told_settings: Some(Settings::default()),
            sought: None,
            sequences: ServerSequences::default(),
            signals: BackendSignals::default(),
            ours: ProxyStatements::default(),
            unanswered_bytes: 0,
            lexing: lexing(&reported),
            reported,
            parameters_changed: true,
            is_stale: false,
            must_tell: false,
        }
    }

    /// A message has come in part: nothing of our own can be put behind it.
    pub fn mid_message(&self) -> bool {
        self.framer.mid_message()
    }

    /// How this server reads string literals now.
    #[inline]
    pub fn lexing(&self) -> Lexing {
        self.lexing
    }

    /// Everything prepared and set is gone: DISCARD ALL has succeeded.
    pub fn discarded(&mut self) {
        self.statements.forget_all();
        self.ours = ProxyStatements::default();
        self.sequences = ServerSequences::default();
        self.applied = Arc::default();
        self.notifications.channels = None;
        self.checks.clear();
        self.opaque_settings = false;
        self.replies.set_pins(Pins::default());
    }

    /// The names of what it has prepared, as a PostgreSQL array.
    pub fn known_names(&self) -> String {
        self.statements.names(self.ours.names())
    }

    /// The client's code has taken these away. It has none itself any more, if nothing is left.
    pub fn lost(&mut self, names: &[&[u8]], client: &mut ClientSide) {
        if !names.is_empty() {
            self.ours.lost(names);
            if self.statements.deallocated_by_code(names) {
                client.statements.forget_all();
            }
        }
    }

    /// Takes what the server sent; `out` gets what goes to the client, and `send` signals other sessions.
    ///
    /// # Errors
    /// [`Broken`]: the server and its client must both be closed.
    pub fn take(
        &mut self,
        mut chunk: &[u8],
        client: &mut ClientSide,
        out: &mut Outgoing<'_>,
        send: SignalSender<'_>,
    ) -> Result<ChunkEvents, ExchangeError> {
        let mut heard = ChunkEvents::default();
        // Taken out for the loop, so that a piece may borrow it while the rest of `self` is at work.
        let mut framer = std::mem::take(&mut self.framer);
        let result = loop {
            match framer.next(&mut chunk, |tag, length| self.need(tag, length)) {
                Ok(None) => break Ok(heard),
                Ok(Some(Piece::Rest { bytes, .. })) => {
                    if !self.hiding {
                        out.pass(bytes);
                    }
                }
                Ok(Some(Piece::Whole { tag: b'A', bytes })) => self.notification(bytes, client, out),
                Ok(Some(Piece::Whole { tag: b'N', bytes })) if self.signals.warned(bytes, send) => {}
                Ok(Some(Piece::Whole { tag, bytes } | Piece::First { tag, bytes })) => {
                    let taken = if tag == b'E' || tag == b'D' && self.signals.is_awaited() {
                        self.reworded_message(tag, bytes, client, &mut heard, out)
                    } else {
                        self.message(tag, bytes, client, &mut heard, out)
                            .map(|pass| self.let_pass(pass, bytes, client, out))
                    };
                    if let Err(broken) = taken {
                        break Err(broken);
                    }
                }
                Err(error) => break Err(error.into()),
            }
        };
        self.framer = framer;
        result
    }

    #[inline(always)]
    fn let_pass(&mut self, pass: bool, bytes: &[u8], client: &mut ClientSide, out: &mut Outgoing<'_>) {
        self.hiding = !pass;
        if pass {
            if self.must_tell {
                self.tell(client, out);
            }
            out.pass(bytes);
        }
    }

    /// A message that its client may get in other words: they are found before it is taken off what is owed.
    #[cold]
    fn reworded_message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        client: &mut ClientSide,
        heard: &mut ChunkEvents,
        out: &mut Outgoing<'_>,
    ) -> Result<(), ExchangeError> {
        let (reworded, pass) = if tag == b'E' {
            (self.reworded(bytes, client), self.error(bytes, client, heard, out)?)
        } else {
            (self.signals.answered(bytes), self.reply(tag, bytes, client)?)
        };
        self.let_pass(pass, reworded.as_deref().unwrap_or(bytes), client, out);
        Ok(())
    }

    #[inline(always)]
    fn message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        client: &mut ClientSide,
        heard: &mut ChunkEvents,
        out: &mut Outgoing<'_>,
    ) -> Result<bool, ExchangeError> {
        match tag {
            b'Z' => {
                if let Some(undone) = self.replies.prepare_effects().and_then(Option::take) {
                    undone.revert(&mut client.statements, &mut self.statements);
                }
                let status = bytes.get(HEADER_BYTES).copied().unwrap_or(0);
                let pass = self.replies.ready(status)?;
                heard.ready += u32::from(pass);
                if pass {
                    self.attempted = None;
                }
                heard.transaction_ended = status == b'I';
                if !self.replies.is_working() {
                    self.signals.over();
                }
                Ok(pass)
            }
            b'S' => {
                self.parameter_status(bytes, client, out);
                Ok(false)
            }
            b'N' => Ok(self.replies.origin() != Some(Origin::Proxy)),
            _ => self.reply(tag, bytes, client),
        }
    }

    /// A message that answers something, other than ErrorResponse and ReadyForQuery; `true` if the client gets it.
    #[inline(always)]
    fn reply(&mut self, tag: u8, bytes: &[u8], client: &mut ClientSide) -> Result<bool, ExchangeError> {
        if tag == b'C' && self.replies.prepare_effects().is_some() {
            self.command_complete(bytes, client);
        }
        if self.replies.answers_proxy() {
            self.take_answer(tag, bytes);
        }
        let settled = self.replies.reply(tag)?;
        match settled.done {
            Some(Request::Parse(Some(naming))) if !naming.statement.is_description_checked => {
                self.statements.confirmed(&naming.statement);
            }
            Some(Request::DescribeParsed(naming)) => self.described(*naming, client),
            Some(Request::AskSettings(settings)) => self.told_all(&settings),
            _ => {}
        }
        Ok(settled.pass)
    }

    /// How much of a message must be seen.
    #[inline]
    fn need(&self, tag: u8, length: usize) -> Result<Need, FrameError> {
        Ok(match tag {
            b'T' | b't' | b'D' if self.replies.answers_proxy() && self.is_told_by(tag, length) => Need::Whole,
            b'D' if length <= ANSWER_BYTES && self.signals.is_awaited() => Need::Whole,
            b'N' if length <= REPORT_BYTES_MAX && self.signals.listens() => Need::Whole,
            b'D' | b'd' | b'T' | b't' | b'V' | b'N' => Need::Header,
            b'Z' if length == 5 => Need::Whole,
            b'Z' => return Err(FrameError::Length),
            b'E' | b'S' | b'C' | b'A' if length <= REPORT_BYTES_MAX => Need::Whole,
            b'E' => Need::Header,
            // As libpq has it: a longer one is no message, but a connection that is out of step.
            _ if length > REPORT_BYTES_MAX => return Err(FrameError::Length),
            _ => Need::Header,
        })
    }

    /// Whether a message is for us, and short enough to be seen whole.
    #[cold]
    fn is_told_by(&self, tag: u8, length: usize) -> bool {
        match tag {
            b'D' => length <= REPORT_BYTES_MAX && self.replies.are_settings_pending(),
            _ => length <= SHAPE_BYTES_MAX && self.replies.is_description_pending(),
        }
    }

    /// Takes down what we have asked for.
    #[cold]
    fn take_answer(&mut self, tag: u8, bytes: &[u8]) {
        if matches!(tag, b'T' | b't' | b'n') && self.replies.is_description_pending() {
            self.description.add(bytes);
        } else if tag == b'D' && self.replies.are_settings_pending() {
            self.told_setting(bytes);
        }
    }

    /// NotificationResponse. One of a channel that we do not know of was asked for by something that nobody read.
    fn notification(&mut self, bytes: &[u8], client: &ClientSide, out: &mut Outgoing<'_>) {
        let unknown = self.notifications.filter(bytes, out.build());
        if unknown && client.follows() && !self.replies.pins().contains(Pins::LISTEN) {
            self.checks.add(StateChecks::LISTEN);
        }
    }

    /// It stays with its client between transactions. `follows`: the client's session follows it to others.
    #[inline]
    pub fn is_pinned(&self, follows: bool) -> bool {
        !self.replies.pins().is_empty() || !follows
    }

    /// Something is left to do when the transaction is over, before its client is told so and the server may go back.
    #[inline]
    pub fn has_pending_checks(&self, follows: bool) -> bool {
        !self.checks.is_empty() || self.has_read_on() || self.is_hearing_unsettled(follows)
    }

    /// It was kept for a `currval` behind what its client wrote, and the next transaction has come.
    #[inline]
    fn has_read_on(&self) -> bool {
        self.sequences.stirred && self.replies.pins().contains(Pins::SEQUENCE_WRITTEN)
    }

    #[inline]
    fn is_hearing_unsettled(&self, follows: bool) -> bool {
        let NotificationFilter { channels, dropped, .. } = &self.notifications;
        channels.is_some() && (*dropped > 0 || !self.is_pinned(follows))
    }

    /// Whether the server closes the connection behind this ErrorResponse.
    pub fn closes_connection(&self, bytes: &[u8]) -> bool {
        is_fatal(bytes)
    }

    fn error(
        &mut self,
        bytes: &[u8],
        client: &mut ClientSide,
        heard: &mut ChunkEvents,
        out: &mut Outgoing<'_>,
    ) -> Result<bool, ExchangeError> {
        if is_fatal(bytes) {
            heard.fatal = true;
            return Ok(true);
        }
        let Self { replies, statements, told_settings: told, .. } = self;
        let origin = replies.error(|owed, skipped| {
            if owed.changes_unnamed() {
                client.statements.unnamed_skipped(skipped.failed, skipped.unnamed_later);
            }
            match owed.request {
                Request::Parse(Some(naming)) => {
                    statements.failed(&naming.statement);
                    if let Some(name) = &naming.client_name {
                        client.statements.remove(name);
                    }
                }
                Request::Parse(None) => {
                    // It failed, and the one before is gone as well; or it was skipped, and the one before is still there.
                    statements.set_unnamed_unknown();
                }
                Request::DescribeParsed(naming) => statements.failed(&naming.statement),
                Request::AskSettings(_) => *told = Some(Settings::default()),
                // It was to take an unnamed statement away, another client's perhaps, which is still there.
                Request::CloseUnnamed => statements.set_unnamed_unknown(),
                Request::Query(prepare_effects) => {
                    statements.set_unnamed_unknown();
                    prepare_effects.into_iter().for_each(|prepare_effects| {
                        prepare_effects.revert(&mut client.statements, statements)
                    });
                }
                Request::Execute(Some(prepare_effects)) => {
                    prepare_effects.revert(&mut client.statements, statements)
                }
                Request::Close(Some(naming)) => match &naming.client_name {
                    Some(name) => client.statements.insert(name, naming.statement.clone()),
                    None => statements.not_closed(&naming.statement),
                },
                _ => {}
            }
        })?;
        match origin {
            Origin::Proxy => return Err(ExchangeError::Bookkeeping(ServerError::read(bytes))),
            Origin::TryPrepare => return Ok(false),
            Origin::Denied(reason) => {
                heard.errors += 1;
                client.rules().client_error(reason).write(Severity::Error, out.build());
                return Ok(false);
            }
            Origin::Client | Origin::Prepare => {}
        }
        heard.errors += 1;
        Ok(true)
    }

    /// An error in which the client finds its own names, where that differs.
    #[cold]
    fn reworded(&mut self, bytes: &[u8], client: &ClientSide) -> Option<Vec<u8>> {
        if self.replies.origin() == Some(Origin::TryPrepare) {
            self.attempted = Some(without_position(bytes));
            return None;
        }
        let is_missing = error_field(bytes, b'C') == Some(b"26000");
        if let Some(attempted) = self.attempted.take().filter(|_| is_missing) {
            return Some(attempted);
        }
        let shifts = match self.replies.prepare_effects() {
            Some(Some(prepare_effects)) => std::mem::take(&mut prepare_effects.shifts),
            _ => Vec::new(),
        };
        let parsed = self.replies.client_name();
        with_client_names(bytes, &shifts, |ours| {
            let parsed = parsed.filter(|naming| naming.statement.server_name() == ours);
            let name = parsed.and_then(|naming| naming.client_name.as_deref());
            name.or_else(|| client.statements.name_of(ours)).map(<[u8]>::to_vec)
        })
    }

    #[inline]
    fn command_complete(&mut self, bytes: &[u8], client: &mut ClientSide) {
        let tag = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if matches!(tag, b"DEALLOCATE\0" | b"PREPARE\0")
            && let Some(Some(prepare_effects)) = self.replies.prepare_effects()
        {
            prepare_effects.done(&mut client.statements, &mut self.statements);
        }
        if self.replies.origin() != Some(Origin::Client) {
            return;
        }
        if tag.starts_with(b"D") && (tag.starts_with(b"DISCARD ALL") || tag.starts_with(b"DEALLOCATE ALL")) {
            self.statements.forget_all();
            client.statements.forget_all();
            self.ours = ProxyStatements::default();
        }
        // What PostgreSQL itself undoes need not be remembered; what it does not is asked for.
        let gone = match tag {
            b"DISCARD ALL\0" => {
                self.opaque_settings = false;
                Pins::SEQUENCES.union(Pins::UNSTORED).union(Pins::SETTINGS)
            }
            b"DISCARD SEQUENCES\0" => Pins::SEQUENCES,
            _ => return,
        };
        self.replies.set_pins(self.replies.pins().difference(gone));
        client.sequence_use.reads = false;
    }
}
