//! Answers a service login's session while it holds no server: about its tenant, and about a transaction that
//! has not begun on a server yet.
//!
//! ```text
//!            BEGIN            SET LOCAL pglobby.tenant       a statement
//! (nothing) ───────▶ begun ───────────────────────────▶ begun ───────────▶ on a server, which gets BEGIN first
//!     ▲                │ error
//!     │                ▼
//!     └──ROLLBACK── failed
//! ```
//!
//! BEGIN is answered here and kept, so that the transaction can still choose a tenant. A server gets it
//! before the first statement that needs a server.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use super::{
    Form, Plan, TenantRequest,
    messages::{self, ONE_ROW, Type},
};
use crate::{
    data_path::{
        exchange::{
            ClientSide, FIRST_MESSAGE_BYTES, ReadAhead, invalid_format, is_cut_short, need_of_client,
            pending_replies::{Origin, ReplyTracker, Request},
            violation,
        },
        session_state::{
            identity::NewPassword, parameter_status::ReportedParameters, side_effects::DriverReset,
        },
        sql::{PARAMETER, TransactionModes, bare_query, is_plain_query},
    },
    error::{ClientError, IdentityError, Limit, TenantSwitchError},
    wire::{
        frame::{FrameError, HEADER_BYTES, cstr, header},
        message::{Severity, append, append_cstr, ready_for_query},
    },
};

/// Answers a session's messages while it holds no server.
#[derive(Debug)]
pub struct LocalResponder {
    /// BEGIN was answered here and not sent to a server yet.
    begun: Option<TransactionModes>,
    /// That transaction has failed; only its end is accepted.
    failed: bool,
    /// Messages of a batch were answered here, and its Sync has not arrived yet.
    pub in_batch: bool,
    pub(super) portals: HashMap<Box<[u8]>, Portal>,
    /// The form of the choice that waits for its decision.
    choosing: Option<(Form, Protocol)>,
    /// The parameters reported at login; RESET restores them while there is no server.
    first: Arc<ReportedParameters>,
}

/// The session that is answered, the name of its tenant (`None`: none is chosen), and the replies.
pub(super) struct Answering<'a> {
    pub side: &'a mut ClientSide,
    pub here: Option<&'a str>,
    pub replies: &'a mut Vec<u8>,
}

/// A portal made by Bind.
#[derive(Debug)]
pub(super) struct Portal {
    pub plan: Plan,
    pub request: Option<TenantRequest>,
    /// Format of the result.
    pub binary: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Simple,
    /// Execute; `true`: with a binary result.
    Extended(bool),
}

/// The next step after the messages answered here.
#[derive(Debug, PartialEq, Eq)]
pub enum LocalStep {
    /// Wait for the next message.
    Waits,
    /// A server has to answer the next message.
    Server,
    /// Change the tenant; [`LocalResponder::chosen`] or [`LocalResponder::refuse`] answers.
    Choose(TenantRequest),
    /// Set the login's password; answered in the same way.
    SetPassword(NewPassword),
    /// The transaction that began here is over; the session may have to return to its tenant.
    Ended,
    /// The client sent Terminate.
    Terminated,
}

/// The next step after a message; `None`: the message was answered.
pub(super) type BatchResult = Result<Option<LocalStep>, ClientError>;

impl LocalResponder {
    /// For a session that was sent these parameters at login.
    pub fn new(first: Arc<ReportedParameters>) -> Self {
        let portals = HashMap::new();
        Self { begun: None, failed: false, in_batch: false, portals, choosing: None, first }
    }

    /// The parameters reported at login.
    pub fn first_reported(&self) -> &ReportedParameters {
        &self.first
    }

    /// Whether a transaction has begun here and not on a server.
    pub fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Whether nothing has begun here that a server does not know.
    pub fn is_clear(&self) -> bool {
        self.begun.is_none()
            && !self.failed
            && !self.in_batch
            && self.choosing.is_none()
            && self.portals.is_empty()
    }

    /// What was read of the first message, if a server has to answer it. Conservative: may return `None` for such a one.
    #[inline]
    pub fn passes(&self, sent: &[u8], side: &ClientSide) -> Option<ReadAhead> {
        if !self.is_clear() {
            return None;
        }
        if sent.first() == Some(&b'B') && binds_bare_query(sent, side) {
            return Some(ReadAhead::default());
        }
        let (sql, lexing) = (first_text(sent, side)?, side.lexing());
        match bare_query(&sql, lexing) {
            Some(_) if sent.first() == Some(&b'B') => Some(ReadAhead::default()),
            Some(query) => Some(ReadAhead::bare(query, lexing)),
            None => is_plain_query(&sql, lexing).then(ReadAhead::default),
        }
    }

    /// Answers the messages at the front of `inbox` that need no server. Returns their length in bytes and
    /// the next step. `here` is the tenant's name; `None`: no tenant is chosen. An error ends the session.
    pub fn next(
        &mut self,
        inbox: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> Result<(usize, LocalStep), ClientError> {
        let to = &mut Answering { side, here, replies };
        let mut rest = inbox;
        let next = loop {
            rest = to.side.skip_messages(rest, to.replies)?;
            let Some((tag, length)) = header(rest).map_err(violation)? else { break LocalStep::Waits };
            need_of_client(tag, length, to.side.rules()).map_err(violation)?;
            if tag == b'X' {
                break LocalStep::Terminated;
            }
            let Some((message, behind)) = rest.split_at_checked(length + 1) else {
                if rest.len() < FIRST_MESSAGE_BYTES {
                    break LocalStep::Waits;
                }
                // Too long to be read whole. No message that is answered here is so long.
                let Some(client_error) = self.unserved(here) else { break LocalStep::Server };
                client_error.write(Severity::Error, to.replies);
                to.side.skip_request(self.failed());
                continue;
            };
            match self.message(tag, message, to)? {
                None => rest = behind,
                Some(LocalStep::Server) => break LocalStep::Server,
                Some(next) => {
                    rest = behind;
                    break next;
                }
            }
        };
        Ok((inbox.len() - rest.len(), next))
    }

    fn message(&mut self, tag: u8, bytes: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if is_cut_short(tag, bytes) {
            return self.elsewhere(Protocol::Extended(false), to);
        }
        match tag {
            b'Q' if cstr(&mut { body }).is_err() => self.elsewhere(Protocol::Simple, to),
            b'H' if !body.is_empty() => self.fail(&invalid_format(), Protocol::Extended(false), to),
            b'S' if !body.is_empty() => self.fail(&invalid_format(), Protocol::Simple, to),
            b'Q' => self.query(body, to),
            b'P' => self.parse(body, to),
            b'B' => self.bind(body, to),
            b'D' => self.describe(body, to),
            b'E' => self.execute(body, to),
            b'C' => self.close(body, to),
            b'S' => {
                self.in_batch = false;
                if self.begun.is_none() {
                    self.portals.clear();
                }
                forget_unnamed_in_session_mode(to.side);
                ready_for_query(to.replies, self.status());
                Ok(None)
            }
            b'F' => self.elsewhere(Protocol::Simple, to),
            // Data of a COPY that failed is left out, as PostgreSQL does.
            b'H' | b'd' | b'c' | b'f' => Ok(None),
            other => Err(violation(FrameError::Type(other))),
        }
    }

    fn query(&mut self, mut body: &[u8], to: &mut Answering<'_>) -> BatchResult {
        let plan = Plan::of(cstr(&mut body).map_err(violation)?, to.side);
        if !self.is_ours(&plan, to) {
            return self.elsewhere(Protocol::Simple, to);
        }
        to.side.statements.forget_unnamed();
        let request = if let Plan::Choose(choice) = &plan { choice.request(&[]) } else { None };
        self.run(&plan, request.as_ref(), Protocol::Simple, to)
    }

    /// Whether a text with this plan is answered here.
    pub(super) fn is_ours(&self, plan: &Plan, to: &Answering<'_>) -> bool {
        let Answering { side, here, .. } = to;
        match plan {
            Plan::Server => false,
            Plan::Password(_) | Plan::Refused(_) => true,
            // An employee's session is answered here for a change of password only.
            _ if !side.rules().may_switch_tenant => false,
            Plan::Choose(_) | Plan::Mixed => true,
            Plan::Show(name) if **name == *PARAMETER => true,
            Plan::Show(name) => here.is_none() && side.sent_parameters.find(name).is_some(),
            Plan::Begin { .. } => here.is_none() || self.begun.is_none(),
            Plan::Finish { .. } => here.is_none() || self.begun.is_some(),
            Plan::Empty | Plan::Ping | Plan::Set(..) | Plan::Unset(_) | Plan::DriverReset { .. } => {
                here.is_none()
            }
        }
    }

    /// Whether the text is refused because the transaction has failed and the text does not end it.
    pub(super) fn is_refused_as_failed(&self, plan: &Plan) -> bool {
        self.failed && !matches!(plan, Plan::Finish { .. })
    }

    /// Leaves the message to a server, or refuses it if no tenant is chosen.
    pub(super) fn elsewhere(&mut self, protocol: Protocol, to: &mut Answering<'_>) -> BatchResult {
        forget_unnamed_in_session_mode(to.side);
        match self.unserved(to.here) {
            Some(client_error) => self.fail(&client_error, protocol, to),
            None => Ok(Some(LocalStep::Server)),
        }
    }

    /// The error for a message that cannot go to a server.
    fn unserved(&self, here: Option<&str>) -> Option<ClientError> {
        match here {
            _ if self.failed => Some(aborted()),
            Some(_) => None,
            None => Some(ClientError::NoTenantChosen),
        }
    }

    pub(super) fn run(
        &mut self,
        plan: &Plan,
        request: Option<&TenantRequest>,
        protocol: Protocol,
        to: &mut Answering<'_>,
    ) -> BatchResult {
        let client_error = match (plan, request) {
            _ if self.is_refused_as_failed(plan) => aborted(),
            (Plan::Choose(choice), Some(request)) => match (request.local, self.begun) {
                (true, None) => TenantSwitchError::NoTransaction.into(),
                (false, Some(_)) => TenantSwitchError::NotLocal.into(),
                _ => {
                    self.choosing = Some((choice.form, protocol));
                    return Ok(Some(LocalStep::Choose(request.clone())));
                }
            },
            (Plan::Choose(_), None) | (Plan::Mixed, _) => TenantSwitchError::NotAlone.into(),
            (Plan::Refused(reason), _) => (*reason).into(),
            (Plan::Password(_), _) if self.begun.is_some() => IdentityError::PasswordInTransaction.into(),
            (Plan::Password(password), _) => {
                self.choosing = Some((Form::AlterRole, protocol));
                return Ok(Some(LocalStep::SetPassword(password.clone())));
            }
            (Plan::Set(name, _), _)
                if to.side.wanted.get(name).is_none()
                    && to.side.wanted.len() >= to.side.rules().settings_max =>
            {
                let message = "too many parameters set (max_tracked_parameters)".into();
                ClientError::AsPostgres { sqlstate: "53400", message }
            }
            _ => match self.perform(plan, protocol, to) {
                Ok(()) => {
                    if protocol == Protocol::Simple {
                        ready_for_query(to.replies, self.status());
                    }
                    return Ok(matches!(plan, Plan::Finish { .. }).then_some(LocalStep::Ended));
                }
                Err(limit) => to.side.rules().too_much(limit),
            },
        };
        self.fail(&client_error, protocol, to)
    }

    fn perform(&mut self, plan: &Plan, protocol: Protocol, to: &mut Answering<'_>) -> Result<(), Limit> {
        let tag = match plan {
            Plan::Empty => {
                append(to.replies, b'I', |_| {});
                return Ok(());
            }
            Plan::Show(name) => {
                let value = match **name == *PARAMETER {
                    true => to.here.unwrap_or_default().as_bytes(),
                    false => to.side.sent_parameters.find(name).map_or(&b""[..], |(_, value)| value),
                };
                row(name, Type::Text, value, protocol, to.replies);
                "SHOW"
            }
            Plan::Begin { modes, start } => {
                self.begun = Some(self.begun.unwrap_or(*modes));
                if *start { "START TRANSACTION" } else { "BEGIN" }
            }
            Plan::Finish { commit } => {
                self.begun = None;
                let commit = *commit && !std::mem::take(&mut self.failed);
                self.failed = false;
                if commit { "COMMIT" } else { "ROLLBACK" }
            }
            Plan::Ping => {
                let binary = protocol == Protocol::Extended(true);
                let value: &[u8] = if binary { &[0, 0, 0, 1] } else { b"1" };
                row("?column?", Type::Int4, value, protocol, to.replies);
                ONE_ROW
            }
            Plan::Set(name, value) => {
                to.side.keep(Arc::new(to.side.wanted.with(name, Some(value))))?;
                report(to.side, name, value.as_bytes(), to.replies);
                "SET"
            }
            Plan::Unset(name) => {
                to.side.keep(Arc::new(to.side.wanted.with(name, to.side.startup.get(name))))?;
                if let Some((_, value)) = self.first.find(name) {
                    report(to.side, name, value, to.replies);
                }
                "RESET"
            }
            Plan::DriverReset { reset, tags } => {
                if *reset != DriverReset::KeepsSettings {
                    to.side.keep(to.side.startup.clone())?;
                    self.first.write_changes(&mut to.side.sent_parameters, to.replies);
                }
                if *reset == DriverReset::DiscardsAll {
                    to.side.statements.forget_all();
                }
                for tag in tags {
                    if *tag == ONE_ROW {
                        row("pg_advisory_unlock_all", Type::Void, b"", protocol, to.replies);
                    }
                    messages::command_complete(to.replies, tag);
                }
                return Ok(());
            }
            Plan::Server | Plan::Choose(_) | Plan::Mixed | Plan::Password(_) | Plan::Refused(_) => {
                return Ok(());
            }
        };
        messages::command_complete(to.replies, tag);
        Ok(())
    }

    /// Answers a request that succeeded: the session is at the tenant `here`, or the password was changed.
    pub fn chosen(&mut self, here: Option<&str>, replies: &mut Vec<u8>) {
        let Some((form, protocol)) = self.choosing.take() else { return };
        let tag = match form {
            Form::Set => "SET",
            Form::Reset => "RESET",
            Form::AlterRole => "ALTER ROLE",
            Form::SetConfig => {
                row("set_config", Type::Text, here.unwrap_or_default().as_bytes(), protocol, replies);
                ONE_ROW
            }
        };
        messages::command_complete(replies, tag);
        if protocol == Protocol::Simple {
            ready_for_query(replies, self.status());
        }
    }

    /// Answers a request that was refused.
    pub fn refuse(&mut self, client_error: &ClientError, side: &mut ClientSide, replies: &mut Vec<u8>) {
        if let Some((_, protocol)) = self.choosing.take() {
            let _ = self.fail(client_error, protocol, &mut Answering { side, here: None, replies });
        }
    }

    pub(super) fn fail(
        &mut self,
        client_error: &ClientError,
        protocol: Protocol,
        to: &mut Answering<'_>,
    ) -> BatchResult {
        client_error.write(Severity::Error, to.replies);
        let status = self.failed();
        match protocol {
            Protocol::Simple => ready_for_query(to.replies, status),
            Protocol::Extended(_) => to.side.skip_to_sync(status),
        }
        Ok(None)
    }

    /// Notes that a statement failed here, and its transaction. Returns the status for ReadyForQuery.
    pub fn failed(&mut self) -> u8 {
        self.failed = self.begun.is_some();
        self.in_batch = false;
        self.portals.clear();
        self.status()
    }

    /// The transaction status that the client knows.
    pub fn status(&self) -> u8 {
        match (self.begun, self.failed) {
            (None, _) => b'I',
            (Some(_), false) => b'T',
            (Some(_), true) => b'E',
        }
    }

    /// Sends the server the BEGIN of the transaction that began here. The modes follow in a statement of
    /// their own: if BEGIN failed because of them, the next statements would run outside of a transaction.
    pub fn hand_over(&mut self, replies: &mut ReplyTracker, out: &mut Vec<u8>) {
        self.in_batch = false;
        self.portals.clear();
        let Some(modes) = self.begun.take() else { return };
        append(out, b'Q', |out| append_cstr(out, b"BEGIN"));
        replies.begin();
        if modes != TransactionModes::default() {
            append(out, b'Q', |out| append_cstr(out, messages::set_transaction(modes).as_bytes()));
            let _ = replies.track(Request::Query(None), Origin::TryPrepare);
        }
    }
}

/// In session mode the unnamed statement is not tracked, so that the one made here is for this batch only.
fn forget_unnamed_in_session_mode(side: &mut ClientSide) {
    if !side.follows() {
        side.statements.forget_unnamed();
    }
}

/// The SQL text of the first message; `None` if the message is incomplete or has none.
pub fn first_text<'a>(sent: &'a [u8], side: &'a ClientSide) -> Option<Cow<'a, [u8]>> {
    let (tag, length) = header(sent).ok()??;
    let mut body = sent.get(HEADER_BYTES..=length)?;
    match tag {
        b'Q' => {}
        b'P' => drop(cstr(&mut body).ok()?),
        b'B' => {
            cstr(&mut body).ok()?;
            return side.prepared_text(cstr(&mut body).ok()?);
        }
        _ => return None,
    }
    cstr(&mut body).ok().map(Cow::Borrowed)
}

/// Whether the first message is a Bind, and was known to run a bare query when its statement was prepared.
fn binds_bare_query(sent: &[u8], side: &ClientSide) -> bool {
    let body = header(sent).ok().flatten().and_then(|(_, length)| sent.get(HEADER_BYTES..=length));
    let Some(mut body) = body else { return false };
    let (Ok(_), Ok(name)) = (cstr(&mut body), cstr(&mut body)) else { return false };
    match side.statements.get(name) {
        Some(statement) => statement.side_effects.is_bare,
        None => name.is_empty() && side.statements.unnamed_side_effects().is_bare,
    }
}

pub(super) fn aborted() -> ClientError {
    let message = "current transaction is aborted, commands ignored until end of transaction block".into();
    ClientError::AsPostgres { sqlstate: "25P02", message }
}

/// Appends ParameterStatus for a parameter's new value, if servers report the parameter.
fn report(side: &mut ClientSide, name: &str, value: &[u8], replies: &mut Vec<u8>) {
    if let Some((spelled, _)) = side.sent_parameters.find(name) {
        ReportedParameters::new([(spelled, value)]).write_changes(&mut side.sent_parameters, replies);
    }
}

/// Appends the one row of a reply, after its description for a simple query.
fn row(column: &str, column_type: Type, value: &[u8], protocol: Protocol, replies: &mut Vec<u8>) {
    if protocol == Protocol::Simple {
        messages::row_description(replies, column, column_type, false);
    }
    messages::data_row(replies, value);
}
