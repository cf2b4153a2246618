//! The client's side of an exchange: the state of a session that outlives its leases.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_messages::ClientMessages,
    parameter_reports::lexing_under,
    read_ahead::ReadAhead,
    restore_settings::{is_of_object, make_known, restore_settings},
    return_to_tenant::{CurrentTenant, ReturnState},
    sequences::SequenceUse,
    server_side::ServerSide,
    skipped_messages::SkippedMessage,
};
use crate::{
    data_path::{
        functions::FunctionEffects,
        memory_limit::{Account, Charge},
        prepared::{ClientStatements, parse_settings::ParseSettings, shared_statements::SharedStatements},
        session_state::{
            Settings,
            custom_names::CustomSet,
            identity::Identity,
            parameter_status::ReportedParameters,
            role_settings::{RoleSettings, StartSettings},
        },
    },
    error::{ClientError, RequestError},
    wire::{
        frame::{FrameError, Framer, Need, Piece, header},
        outgoing::Outgoing,
    },
};

/// The state of a session that outlives its leases.
#[derive(Debug)]
pub struct ClientSide {
    pub(super) framer: Framer,
    /// Its prepared statements.
    pub statements: ClientStatements,
    /// The settings of its startup packet: RESET returns to them.
    pub startup: Arc<Settings>,
    /// The settings that it has now.
    pub wanted: Arc<Settings>,
    /// The custom parameters that it has had.
    pub custom: CustomSet,
    /// Those in `wanted`.
    pub(super) wanted_custom: CustomSet,
    /// The parameter values that the client was last sent in ParameterStatus.
    pub sent_parameters: Arc<ReportedParameters>,
    /// How the session's start settings relate to those of its pool's servers.
    pub start_settings: StartSettings,
    /// The settings under which its texts are parsed while no transaction has changed them, and the `wanted`
    /// from which they were computed.
    pub(super) parse_settings: (Arc<ParseSettings>, Arc<Settings>),
    pub(super) rules: SessionRules,
    /// Number of the last unnamed statement; unique in the process.
    pub(super) unnamed_serial: u64,
    pub(super) sequence_use: SequenceUse,
    pub(super) skipped: SkippedMessage,
    return_state: ReturnState,
    /// Memory of the first part of a message that the proxy must receive whole.
    pub(super) message_memory: Charge,
    /// Memory of `wanted`, unless it is the same as `startup`.
    pub(super) settings_memory: Charge,
    /// Memory of `startup` and `sent_parameters`.
    pub startup_memory: Charge,
}

/// What does not change between a session's messages: its limits, its login and its pool's shared state.
#[derive(Debug, Clone, Default)]
pub struct SessionRules {
    /// Statements and settings move with the session from server to server: `pool_mode = "transaction"`.
    pub follow: bool,
    /// The session may choose its tenant by `SET pglobby.tenant`: it belongs to a service login.
    pub may_switch_tenant: bool,
    /// How the session came to its present tenant.
    pub current_tenant: CurrentTenant,
    /// The roles under which its servers run.
    pub identity: Identity,
    /// Some statements of the session must not reach a server: a Bind is received whole if it is short.
    pub sees_binds: bool,
    /// The pool's shared statements.
    pub shared_statements: Arc<SharedStatements>,
    /// The side effects of the database's functions.
    pub functions: Arc<FunctionEffects>,
    /// `statement_inspect_bytes_max`.
    pub inspect_bytes_max: usize,
    /// `client_prepared_statements_max`.
    pub statements_max: usize,
    /// `client_prepared_bytes_max`.
    pub statements_bytes_max: usize,
    /// `pipelined_requests_max`.
    pub unanswered_max: usize,
    /// `tracked_parameters_max`.
    pub settings_max: usize,
    /// `tracked_bytes_max`.
    pub settings_bytes_max: usize,
    /// The account that the session's memory is charged to.
    pub memory: Arc<Account>,
}

impl SessionRules {
    /// Rules for reading replies that no client receives.
    pub fn for_discarded_replies(table: &Arc<SharedStatements>) -> Self {
        Self { shared_statements: table.clone(), unanswered_max: usize::MAX, ..Self::default() }
    }
}

/// Whether the relay may read more from the client.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// It may.
    Continues,
    /// The client sent Terminate.
    Terminated,
    /// The first message of these bytes chooses the tenant. They wait for all pending replies.
    ChoosesTenant(Vec<u8>),
    /// The last message may return the session to another tenant: these bytes wait for its reply.
    Pauses(Vec<u8>),
    /// The meaning of the first message of these bytes depends on replies that are pending.
    AwaitsReplies(Vec<u8>),
    /// Too many replies are pending: these bytes wait until half of them have arrived.
    Full(Vec<u8>),
}

impl ClientSide {
    /// A session that begins. `first_serial` is unique in the process, with 32 bits of room above it.
    pub fn new(rules: SessionRules, wanted: Arc<Settings>, first_serial: u64) -> Self {
        let custom = rules.shared_statements.custom_names.of(&wanted);
        Self {
            framer: Framer::default(),
            custom,
            wanted_custom: custom,
            statements: ClientStatements::new(rules.memory.clone()),
            startup: wanted.clone(),
            parse_settings: (rules.shared_statements.settings.of(&wanted), wanted.clone()),
            wanted,
            sent_parameters: Arc::default(),
            start_settings: StartSettings::default(),
            rules,
            unnamed_serial: first_serial,
            sequence_use: SequenceUse::default(),
            skipped: SkippedMessage::default(),
            return_state: ReturnState::default(),
            message_memory: Charge::default(),
            settings_memory: Charge::default(),
            startup_memory: Charge::default(),
        }
    }

    /// The session's rules.
    pub fn rules(&self) -> &SessionRules {
        &self.rules
    }

    /// Whether statements and settings move with the session from server to server.
    pub fn follows(&self) -> bool {
        self.rules.follow
    }

    /// Whether a message has gone to the server in part; the rest must reach the same server.
    #[inline]
    pub fn mid_message(&self) -> bool {
        self.framer.mid_message()
    }

    /// Bytes of a message that waits for more of itself, and are not charged yet.
    #[inline]
    pub fn uncounted_bytes(&self) -> usize {
        if self.message_memory.bytes() == 0 { self.framer.held_bytes() } else { 0 }
    }

    /// Moves the first part of a message that no server has received to the end of `inbox`.
    #[inline]
    pub fn take_held(&mut self, inbox: &mut Vec<u8>) {
        self.framer.take_held(inbox);
    }

    /// Called when a new pool replaces the session's, with servers that start with `now`. Start settings that
    /// differ become settings of the session, so that the client keeps the values it started with.
    #[cold]
    pub fn keep_start_settings(&mut self, now: &Arc<RoleSettings>) {
        if let StartSettings::Earlier(then) = &self.start_settings {
            for (name, value) in then.differing_from(now) {
                for settings in [&mut self.startup, &mut self.wanted] {
                    if settings.get(&name).is_none() {
                        Arc::make_mut(settings).set(&name, Some(&value));
                    }
                }
            }
            self.wanted_custom = self.rules.shared_statements.custom_names.of(&self.wanted);
        }
        self.start_settings = StartSettings::Same(now.clone());
    }

    /// A server with the settings `applied` does not take this one any more, because what it names is gone.
    #[cold]
    pub(super) fn lose_setting(&mut self, name: &str, applied: &mut Arc<Settings>) {
        for settings in [&mut self.startup, &mut self.wanted] {
            Arc::make_mut(settings).set(name, None);
        }
        // What the server has now is reset before its next use, if it was not before.
        Arc::make_mut(applied).set(name, (!is_of_object(name)).then_some(""));
        if **applied == *self.wanted {
            *applied = self.wanted.clone();
        }
    }

    /// Writes what must reach the server before the client's message: restore settings, and Close of other
    /// sessions' statement names. `begins`: the lease has just begun.
    #[inline]
    pub fn prepare_server(&mut self, server: &mut ServerSide, begins: bool, out: &mut Outgoing<'_>) {
        if begins {
            self.update_parse_settings();
            server.checks.begin();
            server.lexing_changes = false;
            server.begin_lease(self, out);
            server.discard_sequences_at_lease_start(&self.sequence_use, &self.rules, out);
        }
        if begins && server.statements.has_client_names() {
            let mut preparer = server.preparer(&self.parse_settings.0, &self.startup);
            preparer.close_foreign_names(&self.statements, out.build());
        }
        let ServerSide { statements, replies, applied, ours, .. } = server;
        if !Arc::ptr_eq(applied, &self.wanted) {
            if restore_settings(applied, &self.wanted, ours, replies, out.build()) {
                statements.set_unnamed(0);
            }
            *applied = self.wanted.clone();
            server.lexing = lexing_under(&self.wanted, server.lexing_at_start);
            server.custom.ever.insert(self.wanted_custom);
        }
        if begins && !self.custom.is_within(server.custom.ever) {
            self.make_custom_known(server, out);
        }
    }

    /// Custom parameters that the session has had read `''` for it, also where the server has not had them.
    #[cold]
    fn make_custom_known(&self, server: &mut ServerSide, out: &mut Outgoing<'_>) {
        let ServerSide { replies, custom, ours, .. } = server;
        let names = self.rules.shared_statements.custom_names.names(self.custom, custom.ever);
        make_known(&names, ours, replies, out.build());
        custom.ever.insert(self.custom);
    }

    /// Recomputes the settings under which texts are parsed, if the session's settings have changed.
    #[inline]
    pub(super) fn update_parse_settings(&mut self) {
        if !Arc::ptr_eq(&self.parse_settings.1, &self.wanted) {
            self.parse_settings =
                (self.rules.shared_statements.settings.of(&self.wanted), self.wanted.clone());
        }
    }

    /// Takes bytes from the client; `out` gets the bytes for the server. After an error the session ends.
    #[inline]
    pub fn take(
        &mut self,
        chunk: &[u8],
        server: &mut ServerSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Flow, ClientError> {
        self.take_read(chunk, ReadAhead::default(), server, out)
    }

    /// The same. `first` was read of the message that begins with the chunk.
    #[inline]
    pub fn take_read(
        &mut self,
        chunk: &[u8],
        first: ReadAhead,
        server: &mut ServerSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Flow, ClientError> {
        let flow = self.pass_on(chunk, first, server, out);
        // A Terminate is not passed on, whether whole or not.
        server.half_passed =
            self.framer.mid_message() && !self.skipped.is_ignored() && !matches!(flow, Ok(Flow::Terminated));
        flow
    }

    /// Parts the client's side: what reads messages, and what handles them.
    #[inline]
    fn parts<'a, 'c>(
        &'a mut self,
        server: &'a mut ServerSide,
        out: &'a mut Outgoing<'c>,
    ) -> (MessageReader<'a>, ClientMessages<'a, 'c>) {
        let Self { framer, skipped, message_memory, .. } = self;
        let reader = MessageReader { framer, skipped, memory: message_memory };
        let Self { statements, rules, startup, unnamed_serial, sequence_use, return_state, .. } = self;
        let under = &self.parse_settings.0;
        let messages = ClientMessages {
            statements,
            rules,
            under,
            startup,
            unnamed_serial,
            sequence_use,
            return_state,
            server,
            out,
            first: ReadAhead::default(),
        };
        (reader, messages)
    }

    fn pass_on(
        &mut self,
        mut chunk: &[u8],
        first: ReadAhead,
        server: &mut ServerSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Flow, ClientError> {
        if !server.replies.is_working() {
            server.unanswered_bytes = 0;
        }
        let may_fill = server.may_fill(self.rules.unanswered_max, chunk.len());
        let (MessageReader { framer, skipped, memory }, mut messages) = self.parts(server, out);
        let mut full = None;
        // Held bytes come first: then it is not known which message was read.
        messages.first = if framer.at_boundary() { first } else { ReadAhead::default() };
        loop {
            let piece = framer.next_within(
                &mut chunk,
                |tag, length| need_of_client(tag, length, messages.rules),
                |bytes| {
                    full = memory.try_set(&messages.rules.memory, bytes).err();
                    full.is_none()
                },
            );
            let (bytes, flow, whole) = match piece.map_err(violation)? {
                None => {
                    if memory.bytes() > 0 && framer.held_bytes() == 0 {
                        memory.clear();
                    }
                    return Ok(Flow::Continues);
                }
                Some(Piece::Rest { bytes, last }) => {
                    if !skipped.is_ignored() {
                        messages.out.pass(bytes);
                    } else if last {
                        skipped.end_ignored();
                    }
                    if last && std::mem::take(&mut messages.return_state.pauses) {
                        return Ok(Flow::Pauses(chunk.to_vec()));
                    }
                    continue;
                }
                Some(Piece::Whole { tag: b'X', .. } | Piece::First { tag: b'X', .. }) => {
                    return Ok(Flow::Terminated);
                }
                Some(Piece::Whole { tag, bytes }) => (bytes, messages.take(tag, bytes, may_fill)?, true),
                Some(Piece::First { tag, bytes }) => {
                    let flow = messages.take_first_part(tag, bytes, may_fill, full.take(), skipped)?;
                    (bytes, flow, false)
                }
            };
            messages.first = ReadAhead::default();
            if let ControlFlow::Break(reason) = flow {
                let waits = [bytes, chunk].concat();
                framer.put_back();
                return Ok(messages.hold(reason, waits));
            }
            if whole && std::mem::take(&mut messages.return_state.pauses) {
                framer.take_held(&mut Vec::new());
                return Ok(Flow::Pauses(chunk.to_vec()));
            }
        }
    }
}

/// The greatest length of a message, as PostgreSQL's `PQ_SMALL_MESSAGE_LIMIT`: of those without text or data.
pub(super) const SMALL_MESSAGE_MAX: usize = 10_000;

/// `PQ_LARGE_MESSAGE_LIMIT`: of the others.
const LARGE_MESSAGE_MAX: usize = 0x3fff_ffff;

struct MessageReader<'a> {
    framer: &'a mut Framer,
    skipped: &'a mut SkippedMessage,
    /// The memory of a message that is received whole.
    memory: &'a mut Charge,
}

/// A shorter Bind is received whole where its statement may choose the tenant. A name has at most 63 bytes.
const CHOICE_BYTES_MAX: usize = 1024;

impl ClientSide {
    /// Makes the server reject the first, whole message of `inbox`. Returns the message's length in bytes.
    pub fn reject(
        &mut self,
        inbox: &[u8],
        reason: RequestError,
        server: &mut ServerSide,
        out: &mut Vec<u8>,
    ) -> usize {
        let Ok(Some((tag, length))) = header(inbox) else { return 0 };
        let mut out = Outgoing::new(&[], out);
        let (_, mut messages) = self.parts(server, &mut out);
        messages.reject(tag, reason);
        length + 1
    }
}

/// The client's error for a protocol violation.
pub fn violation(error: FrameError) -> ClientError {
    ClientError::ProtocolViolation(match error {
        FrameError::Type(tag) => format!("invalid frontend message type {tag}"),
        other => other.to_string(),
    })
}

/// How much of a client's message must be received before it is handled.
#[inline]
pub fn need_of_client(tag: u8, length: usize, rules: &SessionRules) -> Result<Need, FrameError> {
    let (length_max, need) = match tag {
        b'Q' | b'P' if length <= rules.inspect_bytes_max => (LARGE_MESSAGE_MAX, Need::Whole),
        b'P' => (LARGE_MESSAGE_MAX, Need::Strings(1)),
        b'B' if rules.sees_binds && length <= CHOICE_BYTES_MAX => (LARGE_MESSAGE_MAX, Need::Whole),
        b'B' => (LARGE_MESSAGE_MAX, Need::Strings(2)),
        b'D' | b'C' | b'E' => (SMALL_MESSAGE_MAX, Need::Whole),
        b'S' | b'H' | b'c' | b'X' => (SMALL_MESSAGE_MAX, Need::Header),
        // In a COPY the server answers a CopyFail that is too long; elsewhere `has_no_effect` is asked first.
        b'Q' | b'F' | b'd' | b'f' => (LARGE_MESSAGE_MAX, Need::Header),
        other => return Err(FrameError::Type(other)),
    };
    if length > length_max { Err(FrameError::Length) } else { Ok(need) }
}
