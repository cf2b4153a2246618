//! The server's side of an exchange: the state that belongs to a server, and what its messages mean for
//! client and lease.

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
            Settings,
            channels::NotificationFilter,
            custom_names::{CustomSet, ServerCustomSet},
            parameter_status::ReportedParameters,
            pins::Pins,
            server_role::ServerRole,
            state_query::StateChecks,
            temporary_use::TemporaryUse,
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

/// The longest ErrorResponse or ParameterStatus that is received whole. PostgreSQL's stay below 30 000 bytes.
const REPORT_BYTES_MAX: usize = 64 * 1024;

/// The longest description of a statement: 65 535 parameter types. 1 664 columns take less.
const DESCRIPTION_BYTES_MAX: usize = 256 * 1024 + 16;

/// Length of a DataRow with one column of one byte.
const ANSWER_BYTES: usize = 11;

/// The state that belongs to a server.
#[derive(Debug, Default)]
pub struct ServerSide {
    pub(super) framer: Framer,
    /// A message has gone to the server in part, and the rest is still to come; or the server takes no more bytes.
    pub(super) half_passed: bool,
    /// The rest of the message that is arriving is not passed to the client.
    drops_rest: bool,
    /// The replies that the server owes.
    pub replies: ReplyTracker,
    /// The statements that the server has prepared.
    pub statements: ServerStatements,
    /// The settings that the server has, as far as the proxy knows.
    pub applied: Arc<Settings>,
    /// The role that it runs as.
    pub role: ServerRole,
    /// The custom parameters that it has had.
    pub custom: ServerCustomSet,
    /// The temporary tables that it may have used.
    pub temporary_use: TemporaryUse,
    /// What the present transaction may have changed.
    pub checks: PendingChecks,
    /// The session has set parameters with unknown names, and has not reset all settings since.
    pub unknown_settings: bool,
    /// Selects the notifications that the client gets.
    pub notifications: NotificationFilter,
    /// The portal that was bound last, if its text has PREPARE or DEALLOCATE.
    pub bound_portal: Option<(Box<[u8]>, PrepareEffects)>,
    /// The error of a statement that could not be prepared here. The client gets it for "does not exist".
    prepare_error: Option<Vec<u8>>,
    /// Reads the row description that the server is sending.
    pub(super) description: DescriptionReader,
    /// The settings in the server's answer so far; `None`: they could not be read.
    pub(super) settings_answer: Option<Settings>,
    /// A statement prepared here whose description the client's next message awaits; `true`: it differs.
    pub awaited_description: Option<(Arc<Statement>, bool)>,
    /// `pg_terminate_backend` and `pg_cancel_backend` in the client's texts.
    pub signals: BackendSignals,
    /// The session whose sequence values the server remembers.
    pub sequences: ServerSequences,
    /// The proxy's own statements on this server.
    pub ours: ProxyStatements,
    /// Bytes of requests that are kept until their replies arrive.
    pub(super) unanswered_bytes: usize,
    /// All parameters that the server reports, with their latest values.
    pub reported: ReportedParameters,
    /// The reported parameters have not yet been compared with those that the pool knows.
    pub parameters_changed: bool,
    /// The server reports changed parameters only with its next reply, and must be asked for one.
    pub is_stale: bool,
    /// The reported parameters may differ from those that the client was sent.
    pub(super) parameters_differ: bool,
    pub(super) lexing: Lexing,
    /// To which RESET ALL returns.
    pub(super) lexing_at_start: Lexing,
    /// What the client has sent in this lease may change how the server reads string literals: [`ServerSide::lexing`] is
    /// right only when all replies are there.
    pub(super) lexing_changes: bool,
}

/// The events in bytes from the server.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEvents {
    /// ReadyForQuery messages that the client gets.
    pub ready: u32,
    /// The last of them ended a transaction.
    pub transaction_ended: bool,
    /// Bytes of the server's last message, a FATAL error, behind which it closes the connection; 0: there was none.
    pub fatal: usize,
    /// Errors that the client gets.
    pub errors: u32,
    /// Settings that the server refused, and that the session has lost.
    pub lost_settings: u32,
}

/// Why the connections of server and client must be closed.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// Bytes that are no message.
    #[error("the server broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// A reply without a request.
    #[error(transparent)]
    Desync(#[from] Desync),
    /// The server rejected a request of the proxy.
    #[error("the server rejected a request of the proxy: {0}")]
    RejectedRequest(ServerError),
}

impl ServerSide {
    /// A server that has just been opened, with the parameters that it reported.
    pub fn new(reported: ReportedParameters, prepared_max: PreparedLimits) -> Self {
        let lexing = lexing(&reported);
        Self {
            role: ServerRole::new(&reported),
            statements: ServerStatements::new(prepared_max),
            settings_answer: Some(Settings::default()),
            lexing,
            lexing_at_start: lexing,
            lexing_changes: false,
            reported,
            parameters_changed: true,
            ..Self::default()
        }
    }

    /// Notes that custom parameters with unknown names may have been set.
    #[inline]
    pub fn note_unnamed_custom(&mut self) {
        if self.checks.take_sets_custom() {
            self.custom.set(CustomSet::UNNAMED);
        }
    }

    /// Whether the session is another login than the server was opened with.
    pub fn has_other_login(&self) -> bool {
        self.role.has_other_login(&self.reported)
    }

    /// Whether a message has arrived in part. Nothing may be written to the client between its parts.
    pub fn mid_message(&self) -> bool {
        self.framer.mid_message()
    }

    /// How the server reads string literals now.
    #[inline]
    pub fn lexing(&self) -> Lexing {
        self.lexing
    }

    /// DISCARD ALL has succeeded: the server has no statements, settings or channels.
    pub fn discarded(&mut self) {
        self.statements.forget_all();
        self.ours = ProxyStatements::default();
        self.sequences = ServerSequences::default();
        self.applied = Arc::default();
        self.notifications.channels = None;
        self.checks.clear();
        self.unknown_settings = false;
        self.replies.set_pins(Pins::default());
    }

    /// The names of all statements on the server, as a PostgreSQL array.
    pub fn prepared_names(&self) -> String {
        self.statements.names(self.ours.names())
    }

    /// Code in the session has deallocated these names. If none is left on the server, the client's
    /// statements are removed as well: the code may have run DEALLOCATE ALL.
    pub fn deallocated_by_code(&mut self, names: &[&[u8]], client: &mut ClientSide) {
        if !names.is_empty() {
            self.ours.remove(names);
            if self.statements.deallocated_by_code(names) {
                client.statements.forget_all();
            }
        }
    }

    /// Takes bytes from the server; `out` gets the bytes for the client. `send` signals other sessions.
    /// After an error both connections must be closed.
    pub fn take(
        &mut self,
        mut chunk: &[u8],
        client: &mut ClientSide,
        out: &mut Outgoing<'_>,
        send: SignalSender<'_>,
    ) -> Result<ChunkEvents, ExchangeError> {
        let mut events = ChunkEvents::default();
        // Taken out for the loop, so that a piece can borrow it while `self` is changed.
        let mut framer = std::mem::take(&mut self.framer);
        let result = loop {
            if framer.is_clear() && !chunk.is_empty() {
                self.pass_rows(&mut chunk, client, out);
            }
            match framer.next(&mut chunk, |tag, length| self.need(tag, length)) {
                Ok(None) => break Ok(events),
                Ok(Some(Piece::Rest { bytes, .. })) => {
                    if !self.drops_rest {
                        out.pass(bytes);
                    }
                }
                Ok(Some(Piece::Whole { tag: b'A', bytes })) => self.notification(bytes, client, out),
                Ok(Some(Piece::Whole { tag: b'N', bytes })) if self.signals.on_notice(bytes, send) => {}
                Ok(Some(Piece::Whole { tag, bytes } | Piece::First { tag, bytes })) => {
                    let taken = if tag == b'E' || tag == b'D' && self.signals.is_awaited() {
                        self.rewritten_message(tag, bytes, client, &mut events, out)
                    } else {
                        self.message(tag, bytes, client, &mut events, out)
                            .map(|pass| self.pass_or_drop(pass, bytes, client, out))
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

    /// Passes whole rows of a result on, all at once, and of a simple query what comes with them. Most messages of
    /// servers are these. None of them changes anything here: [`ReplyTracker::reply`].
    #[inline]
    fn pass_rows(&mut self, chunk: &mut &[u8], client: &mut ClientSide, out: &mut Outgoing<'_>) {
        let Some(of_query) = self.replies.passes_rows().filter(|_| !self.signals.is_awaited()) else {
            return;
        };
        let mut end = 0;
        while let Some(&[tag, a, b, c, d, first, ..]) = chunk.get(end..) {
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            let is_row = match tag {
                b'D' | b'd' => true,
                b'T' => of_query,
                // Neither PREPARE nor a command that removes statements.
                b'C' => of_query && !matches!(first, b'D' | b'P') && length <= REPORT_BYTES_MAX,
                _ => false,
            };
            let message_end = end.saturating_add(1).saturating_add(length);
            if !is_row || length < 4 || message_end > chunk.len() {
                break;
            }
            end = message_end;
        }
        if let Some((rows, rest)) = chunk.split_at_checked(end).filter(|_| end > 0) {
            self.pass_or_drop(true, rows, client, out);
            *chunk = rest;
        }
    }

    #[inline(always)]
    fn pass_or_drop(&mut self, pass: bool, bytes: &[u8], client: &mut ClientSide, out: &mut Outgoing<'_>) {
        self.drops_rest = !pass;
        if pass {
            if self.parameters_differ {
                self.send_parameters(client, out);
            }
            out.pass(bytes);
        }
    }

    /// A message whose text may be changed for the client. The new text depends on the pending reply, so it
    /// is made before the reply is removed.
    #[cold]
    fn rewritten_message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        client: &mut ClientSide,
        events: &mut ChunkEvents,
        out: &mut Outgoing<'_>,
    ) -> Result<(), ExchangeError> {
        let (reworded, pass) = if tag == b'E' {
            (self.reworded_error(bytes, client), self.error(bytes, client, events, out)?)
        } else {
            (self.signals.corrected_row(bytes), self.reply(tag, bytes, client)?)
        };
        self.pass_or_drop(pass, reworded.as_deref().unwrap_or(bytes), client, out);
        Ok(())
    }

    #[inline(always)]
    fn message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        client: &mut ClientSide,
        events: &mut ChunkEvents,
        out: &mut Outgoing<'_>,
    ) -> Result<bool, ExchangeError> {
        match tag {
            b'Z' => {
                if let Some(undone) = self.replies.prepare_effects().and_then(Option::take) {
                    undone.revert(&mut client.statements, &mut self.statements);
                }
                let status = bytes.get(HEADER_BYTES).copied().unwrap_or(0);
                let pass = self.replies.ready(status)?;
                events.ready += u32::from(pass);
                if pass {
                    self.prepare_error = None;
                }
                events.transaction_ended = status == b'I';
                if !self.replies.is_working() {
                    self.signals.finish();
                }
                Ok(pass)
            }
            b'S' => {
                self.parameter_status(bytes, client, out);
                Ok(false)
            }
            b'N' => Ok(!matches!(self.replies.origin(), Some(Origin::Proxy | Origin::Restore))),
            _ => self.reply(tag, bytes, client),
        }
    }

    /// A reply other than ErrorResponse and ReadyForQuery. Returns whether the client gets it.
    #[inline(always)]
    fn reply(&mut self, tag: u8, bytes: &[u8], client: &mut ClientSide) -> Result<bool, ExchangeError> {
        if tag == b'C' && self.replies.prepare_effects().is_some() {
            self.command_complete(bytes, client);
        }
        if self.replies.answers_proxy() {
            self.read_answer(tag, bytes);
        }
        let outcome = self.replies.reply(tag)?;
        match outcome.done {
            Some(Request::Parse(Some(statement_name)))
                if !statement_name.statement.is_description_checked =>
            {
                self.statements.confirmed(&statement_name.statement);
            }
            Some(Request::DescribeParsed(statement_name)) => self.described(*statement_name, client),
            Some(Request::AskSettings(settings)) => self.complete_settings(&settings),
            _ => {}
        }
        Ok(outcome.pass)
    }

    /// How much of a server's message must be received before it is handled.
    #[inline]
    fn need(&self, tag: u8, length: usize) -> Result<Need, FrameError> {
        Ok(match tag {
            b'T' | b't' | b'D' if self.replies.answers_proxy() && self.is_answer_to_proxy(tag, length) => {
                Need::Whole
            }
            b'D' if length <= ANSWER_BYTES && self.signals.is_awaited() => Need::Whole,
            b'N' if length <= REPORT_BYTES_MAX && self.signals.expects_notice() => Need::Whole,
            b'D' | b'd' | b'T' | b't' | b'V' | b'N' => Need::Header,
            b'Z' if length == 5 => Need::Whole,
            b'Z' => return Err(FrameError::Length),
            b'E' | b'S' | b'C' | b'A' if length <= REPORT_BYTES_MAX => Need::Whole,
            b'E' => Need::Header,
            // Same limit as libpq: a longer message means that the connection is out of step.
            _ if length > REPORT_BYTES_MAX => return Err(FrameError::Length),
            _ => Need::Header,
        })
    }

    /// Whether a message answers the proxy and is short enough to be received whole.
    #[cold]
    fn is_answer_to_proxy(&self, tag: u8, length: usize) -> bool {
        match tag {
            b'D' => length <= REPORT_BYTES_MAX && self.replies.are_settings_pending(),
            _ => length <= DESCRIPTION_BYTES_MAX && self.replies.is_description_pending(),
        }
    }

    /// Reads the answer to the proxy's own request.
    #[cold]
    fn read_answer(&mut self, tag: u8, bytes: &[u8]) {
        if matches!(tag, b'T' | b't' | b'n') && self.replies.is_description_pending() {
            self.description.add(bytes);
        } else if tag == b'D' && self.replies.are_settings_pending() {
            self.add_setting(bytes);
        }
    }

    /// NotificationResponse. A channel that the proxy does not know was subscribed to by a text or function
    /// that it could not read.
    fn notification(&mut self, bytes: &[u8], client: &ClientSide, out: &mut Outgoing<'_>) {
        let unknown = self.notifications.filter(bytes, out.build());
        if unknown && client.follows() && !self.replies.pins().contains(Pins::LISTEN) {
            self.checks.add(StateChecks::LISTEN);
        }
    }

    /// Whether the server stays with its session between transactions. `follows`: the session's state moves
    /// from server to server.
    #[inline]
    pub fn is_pinned(&self, follows: bool) -> bool {
        !self.replies.pins().is_empty() || !follows
    }

    /// Whether the relay must act after the transaction, before the client gets ReadyForQuery and the server
    /// returns to the pool.
    #[inline]
    pub fn has_pending_checks(&self, follows: bool) -> bool {
        let NotificationFilter { channels, dropped, .. } = &self.notifications;
        let channels_unsettled = channels.is_some() && (*dropped > 0 || !self.is_pinned(follows));
        // Another transaction has run since the server was pinned for `currval`.
        let pin_due = self.sequences.has_sent_text && self.replies.pins().contains(Pins::SEQUENCE_WRITTEN);
        !self.checks.is_empty() || pin_due || channels_unsettled
    }

    fn error(
        &mut self,
        bytes: &[u8],
        client: &mut ClientSide,
        events: &mut ChunkEvents,
        out: &mut Outgoing<'_>,
    ) -> Result<bool, ExchangeError> {
        if is_fatal(bytes) {
            events.fatal = bytes.len();
            return Ok(true);
        }
        let Self { replies, statements, settings_answer, applied, .. } = self;
        let origin = replies.error(|pending, skipped| {
            if pending.changes_unnamed() {
                client.statements.unnamed_skipped(skipped.failed, skipped.unnamed_later);
            }
            match pending.request {
                Request::Parse(Some(statement_name)) => {
                    statements.failed(&statement_name.statement);
                    if let Some(name) = &statement_name.client_name {
                        client.statements.remove(name);
                    }
                }
                Request::Parse(None) => {
                    // A failed Parse has removed the previous unnamed statement; a skipped one has not.
                    statements.set_unnamed_unknown();
                }
                Request::DescribeParsed(statement_name) => statements.failed(&statement_name.statement),
                Request::AskSettings(_) => *settings_answer = Some(Settings::default()),
                Request::RestoreSetting(name) => {
                    client.lose_setting(&name, applied);
                    events.lost_settings += 1;
                }
                // The skipped Close leaves the unnamed statement there, which may be another client's.
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
                Request::Close(Some(statement_name)) => match &statement_name.client_name {
                    Some(name) => client.statements.insert(name, statement_name.statement.clone()),
                    None => statements.not_closed(&statement_name.statement),
                },
                _ => {}
            }
        })?;
        match origin {
            Origin::Proxy => return Err(ExchangeError::RejectedRequest(ServerError::read(bytes))),
            Origin::Restore | Origin::TryPrepare => return Ok(false),
            Origin::Denied(reason) => {
                events.errors += 1;
                client.rules().client_error(reason).write(Severity::Error, out.build());
                return Ok(false);
            }
            Origin::Client | Origin::Prepare => {}
        }
        events.errors += 1;
        Ok(true)
    }

    /// The error with the client's own statement names, or `None` if it needs no change.
    #[cold]
    fn reworded_error(&mut self, bytes: &[u8], client: &ClientSide) -> Option<Vec<u8>> {
        if self.replies.origin() == Some(Origin::TryPrepare) {
            self.prepare_error = Some(without_position(bytes));
            return None;
        }
        let is_missing = error_field(bytes, b'C') == Some(b"26000");
        if let Some(prepare_error) = self.prepare_error.take().filter(|_| is_missing) {
            return Some(prepare_error);
        }
        let shifts = match self.replies.prepare_effects() {
            Some(Some(prepare_effects)) => std::mem::take(&mut prepare_effects.shifts),
            _ => {
                let named = self.replies.client_name().map(|name| name.statement.sql_names.as_ref());
                let unnamed =
                    || client.statements.unnamed_sql_names().filter(|_| self.replies.parses_last_unnamed());
                let parsed = named.unwrap_or_else(unnamed);
                parsed.map(|names| names.prepare_effects.shifts.clone()).unwrap_or_default()
            }
        };
        let parsed = self.replies.client_name();
        with_client_names(bytes, &shifts, |ours| {
            let parsed = parsed.filter(|statement_name| statement_name.statement.server_name() == ours);
            let name = parsed.and_then(|statement_name| statement_name.client_name.as_deref());
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
        // PostgreSQL has reset this itself; the after-transaction check finds the rest.
        let reset_pins = match tag {
            b"DISCARD ALL\0" => {
                self.unknown_settings = false;
                Pins::SEQUENCES.union(Pins::UNSTORED).union(Pins::SETTINGS)
            }
            b"DISCARD SEQUENCES\0" => Pins::SEQUENCES,
            _ => return,
        };
        self.replies.set_pins(self.replies.pins().difference(reset_pins));
        client.sequence_use.reads = false;
    }
}
