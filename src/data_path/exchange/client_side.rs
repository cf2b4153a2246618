//! The client's side of an exchange: what outlives a lease.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_messages::ClientMessages,
    restore_settings::restore_settings,
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
            identity::Identity,
            parameter_status::ReportedParameters,
            role_settings::{RoleSettings, StartSettings},
        },
    },
    error::{ClientError, RequestError},
    wire::{
        frame::{FrameError, Framer, NAMES_BYTES_MAX, Need, Piece, header},
        outgoing::Outgoing,
    },
};

/// What outlives a lease: the client's side.
#[derive(Debug)]
pub struct ClientSide {
    pub(super) framer: Framer,
    /// What it has prepared.
    pub statements: ClientStatements,
    /// What it asked for at startup: where RESET leads to.
    pub startup: Arc<Settings>,
    /// What it has SET.
    pub wanted: Arc<Settings>,
    /// What it believes of its session: the ParameterStatus that it has been sent.
    pub told: Arc<ReportedParameters>,
    /// How it stands to what its pool's servers began with.
    pub start_settings: StartSettings,
    /// Under what its texts are parsed while nothing changes that; and of which of its settings that was found out.
    pub(super) parse_settings: (Arc<ParseSettings>, Arc<Settings>),
    pub(super) rules: SessionRules,
    /// Of the last unnamed statement; unique over the process.
    pub(super) unnamed_serial: u64,
    pub(super) sequence_use: SequenceUse,
    pub(super) skipped: SkippedMessage,
    return_state: ReturnState,
    /// What the beginning of a message takes that must be seen whole.
    pub(super) holding: Charge,
    /// What `wanted` takes, where it is another than `startup`.
    pub(super) kept: Charge,
    /// What `startup` takes, and what the client is told of it.
    pub began: Charge,
}

/// What holds for a session from its first to its last byte.
#[derive(Debug, Clone)]
pub struct SessionRules {
    /// Statements and settings follow the client from server to server: `pool_mode = "transaction"`.
    pub follow: bool,
    /// It may choose its tenant by `SET pglobby.tenant`: a service login's session.
    pub may_switch_tenant: bool,
    /// How it stands to the tenant it is in.
    pub current_tenant: CurrentTenant,
    /// Who it is on its servers.
    pub identity: Identity,
    /// A Bind may be one of a statement that no server is to have: it is seen whole where it can be.
    pub sees_binds: bool,
    /// The pool's statements.
    pub shared_statements: Arc<SharedStatements>,
    /// What the database's functions leave behind.
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
    /// What is kept for the session.
    pub memory: Arc<Account>,
}

impl SessionRules {
    /// For replies that nobody wants any more.
    pub fn nobody(table: &Arc<SharedStatements>) -> Self {
        Self {
            follow: false,
            may_switch_tenant: false,
            current_tenant: CurrentTenant::First,
            identity: Identity::default(),
            sees_binds: false,
            shared_statements: table.clone(),
            functions: Arc::default(),
            inspect_bytes_max: 0,
            statements_max: 0,
            statements_bytes_max: 0,
            unanswered_max: usize::MAX,
            settings_max: 0,
            settings_bytes_max: 0,
            memory: Arc::default(),
        }
    }
}

/// Whether the client goes on.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    Continues,
    /// It said Terminate.
    Terminated,
    /// It speaks of its tenant. That message and all behind it have not been passed on, and wait until everything before
    /// is answered.
    ChoosesTenant(Vec<u8>),
    /// What it said last may lead it to another tenant: all behind it waits for the answer.
    Pauses(Vec<u8>),
    /// What this message means, and whether it may be passed on, shows when the server has answered what it was sent before.
    AwaitsReplies(Vec<u8>),
    /// More is unanswered than may be: the rest waits until half of it is answered.
    Full(Vec<u8>),
}

impl ClientSide {
    /// A session that has just logged in. `first_serial` is unique over the process, with 32 bits of room above it.
    pub fn new(rules: SessionRules, wanted: Arc<Settings>, first_serial: u64) -> Self {
        Self {
            framer: Framer::default(),
            statements: ClientStatements::new(rules.memory.clone()),
            startup: wanted.clone(),
            parse_settings: (rules.shared_statements.settings.of(&wanted), wanted.clone()),
            wanted,
            told: Arc::default(),
            start_settings: StartSettings::default(),
            rules,
            unnamed_serial: first_serial,
            sequence_use: SequenceUse::default(),
            skipped: SkippedMessage::default(),
            return_state: ReturnState::default(),
            holding: Charge::default(),
            kept: Charge::default(),
            began: Charge::default(),
        }
    }

    /// What holds for the session.
    pub fn rules(&self) -> &SessionRules {
        &self.rules
    }

    /// Statements and settings follow the client from server to server.
    pub fn follows(&self) -> bool {
        self.rules.follow
    }

    /// A message has gone to the server in part; the rest must reach the same server.
    #[inline]
    pub fn mid_message(&self) -> bool {
        self.framer.mid_message()
    }

    /// Moves the beginning of a message that no server has got to the end of `inbox`.
    #[inline]
    pub fn take_held(&mut self, inbox: &mut Vec<u8>) {
        self.framer.take_held(inbox);
    }

    /// Its pool has been replaced by one whose servers began with `now`: what differs from what the session began with is from now on
    /// as if it had been set then.
    #[cold]
    pub fn keep_start(&mut self, now: &Arc<RoleSettings>) {
        if let StartSettings::Earlier(then) = &self.start_settings {
            for (name, value) in then.differing_from(now) {
                for settings in [&mut self.startup, &mut self.wanted] {
                    if settings.get(&name).is_none() {
                        Arc::make_mut(settings).set(&name, Some(&value));
                    }
                }
            }
        }
        self.start_settings = StartSettings::Same(now.clone());
    }

    /// Puts in front of what the client sends what makes the server the client's. `begins`: it has just been lent.
    #[inline]
    pub fn turn(&mut self, server: &mut ServerSide, begins: bool, out: &mut Outgoing<'_>) {
        if begins {
            self.look_at_settings();
            server.checks.begin();
            server.begins_with(self, out);
            server.part_sequences_first(&self.sequence_use, &self.rules, out);
        }
        if begins && server.statements.has_client_names() {
            let mut preparer = server.preparer(&self.parse_settings.0, &self.startup);
            preparer.put_own_names_away(&self.statements, out.build());
        }
        let ServerSide { statements, replies, applied, ours, .. } = server;
        if !Arc::ptr_eq(applied, &self.wanted) {
            if restore_settings(applied, &self.wanted, ours, replies, out.build()) {
                statements.set_unnamed(0);
            }
            *applied = self.wanted.clone();
        }
    }

    /// Under what its texts are parsed follows from what it has set.
    #[inline]
    pub(super) fn look_at_settings(&mut self) {
        if !Arc::ptr_eq(&self.parse_settings.1, &self.wanted) {
            self.parse_settings =
                (self.rules.shared_statements.settings.of(&self.wanted), self.wanted.clone());
        }
    }

    /// Takes what the client sent; `out` gets what goes to the server.
    ///
    /// # Errors
    /// The client broke the protocol or a limit; the session ends.
    #[inline]
    pub fn take(
        &mut self,
        chunk: &[u8],
        server: &mut ServerSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Flow, ClientError> {
        let flow = self.pass_on(chunk, server, out);
        // A Terminate is not passed on, whole or not.
        server.half_passed =
            self.framer.mid_message() && !self.skipped.is_ignored() && !matches!(flow, Ok(Flow::Terminated));
        flow
    }

    fn pass_on(
        &mut self,
        mut chunk: &[u8],
        server: &mut ServerSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Flow, ClientError> {
        let Self {
            framer,
            statements,
            rules,
            parse_settings,
            startup,
            unnamed_serial,
            sequence_use: advances,
            skipped: left_out,
            return_state: bounds,
            holding,
            ..
        } = self;
        if !server.replies.is_working() {
            server.unanswered_bytes = 0;
        }
        let may_fill = server.may_fill(rules.unanswered_max, chunk.len());
        let under = &parse_settings.0;
        let mut requests = ClientMessages {
            statements,
            rules,
            under,
            startup,
            unnamed_serial,
            sequence_use: advances,
            return_state: bounds,
            server,
            out,
        };
        let mut full = None;
        loop {
            let piece = framer.next_within(
                &mut chunk,
                |tag, length| need_of_client(tag, length, requests.rules),
                |bytes| {
                    full = holding.try_set(&requests.rules.memory, bytes).err();
                    full.is_none()
                },
            );
            match piece.map_err(violation)? {
                None => {
                    if holding.bytes() > 0 && framer.held_bytes() == 0 {
                        holding.clear();
                    }
                    return Ok(Flow::Continues);
                }
                Some(Piece::Rest { bytes, last }) => {
                    if !left_out.is_ignored() {
                        requests.out.pass(bytes);
                    } else if last {
                        left_out.end_ignored();
                    }
                    if last && std::mem::take(&mut requests.return_state.pauses) {
                        return Ok(Flow::Pauses(chunk.to_vec()));
                    }
                }
                Some(Piece::Whole { tag: b'X', .. } | Piece::First { tag: b'X', .. }) => {
                    return Ok(Flow::Terminated);
                }
                Some(Piece::Whole { tag, bytes }) => {
                    let flow = requests.take(tag, bytes, may_fill)?;
                    if let ControlFlow::Break(hold) = flow {
                        let waits = [bytes, chunk].concat();
                        framer.put_back();
                        return Ok(requests.hold(hold, waits));
                    }
                    if std::mem::take(&mut requests.return_state.pauses) {
                        framer.take_held(&mut Vec::new());
                        return Ok(Flow::Pauses(chunk.to_vec()));
                    }
                }
                Some(Piece::First { tag, bytes }) => {
                    let flow = requests.take_part(tag, bytes, may_fill, full.take(), left_out)?;
                    if let ControlFlow::Break(hold) = flow {
                        let waits = [bytes, chunk].concat();
                        framer.put_back();
                        return Ok(requests.hold(hold, waits));
                    }
                }
            }
        }
    }
}

/// A Bind of a statement that chooses the tenant is seen whole up to this; a name has 63 bytes.
const CHOICE_BYTES_MAX: usize = 1024;

impl ClientSide {
    /// Makes the server refuse the message at the front of `inbox`, which is there whole; how many bytes that was.
    pub fn deny(
        &mut self,
        inbox: &[u8],
        reason: RequestError,
        server: &mut ServerSide,
        out: &mut Vec<u8>,
    ) -> usize {
        let Ok(Some((tag, length))) = header(inbox) else { return 0 };
        let Self {
            statements,
            rules,
            parse_settings,
            startup,
            unnamed_serial,
            sequence_use: advances,
            return_state: bounds,
            ..
        } = self;
        let (under, mut out) = (&parse_settings.0, Outgoing::new(&[], out));
        let mut requests = ClientMessages {
            statements,
            rules,
            under,
            startup,
            unnamed_serial,
            sequence_use: advances,
            return_state: bounds,
            server,
            out: &mut out,
        };
        requests.deny(tag, reason);
        length + 1
    }
}

/// What a client that broke the protocol is told.
pub fn violation(error: FrameError) -> ClientError {
    ClientError::ProtocolViolation(match error {
        FrameError::Type(tag) => format!("invalid frontend message type {tag}"),
        other => other.to_string(),
    })
}

/// How much of a client's message must be seen; also where a first header is judged before a server is borrowed.
#[inline]
pub fn need_of_client(tag: u8, length: usize, rules: &SessionRules) -> Result<Need, FrameError> {
    Ok(match tag {
        b'Q' | b'P' if length <= rules.inspect_bytes_max => Need::Whole,
        b'P' => Need::Strings(1),
        b'B' if rules.sees_binds && length <= CHOICE_BYTES_MAX => Need::Whole,
        b'B' => Need::Strings(2),
        b'D' | b'C' if length <= NAMES_BYTES_MAX => Need::Whole,
        b'D' | b'C' => return Err(FrameError::Strings),
        b'S' | b'H' | b'c' | b'X' if length > 10_000 => return Err(FrameError::Length),
        b'Q' | b'E' | b'S' | b'H' | b'F' | b'd' | b'c' | b'f' | b'X' => Need::Header,
        other => return Err(FrameError::Type(other)),
    })
}
