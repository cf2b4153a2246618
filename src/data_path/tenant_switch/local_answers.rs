//! Where a service login's session is answered while it holds no server: about its tenant, and about a transaction that
//! no server has begun yet.
//!
//! ```text
//!            BEGIN            SET LOCAL pglobby.tenant       a statement
//! (nothing) ───────▶ begun ───────────────────────────▶ begun ───────────▶ the server's: BEGIN goes in front of it
//!     ▲                │ error
//!     │                ▼
//!     └──ROLLBACK── failed
//! ```
//!
//! BEGIN is answered here and kept, so that the transaction can still be given a tenant. It reaches a server in front of
//! the first statement that needs one.

use std::{collections::HashMap, sync::Arc};

use super::{
    Form, Plan, TenantRequest,
    messages::{self, ONE_ROW, Type},
};
use crate::{
    data_path::{
        exchange::{
            ClientSide, FIRST_MESSAGE_BYTES, need_of_client,
            pending_replies::{Origin, ReplyTracker, Request},
            violation,
        },
        session_state::{
            identity::NewPassword, parameter_status::ReportedParameters, side_effects::DriverReset,
        },
        sql::{PARAMETER, TransactionModes, is_plain_query},
    },
    error::{ClientError, IdentityError, Limit, TenantSwitchError},
    wire::{
        frame::{FrameError, HEADER_BYTES, cstr, header},
        message::{Severity, append, append_cstr, ready_for_query},
    },
};

/// What a session of a service login has said since it held a server last.
#[derive(Debug)]
pub struct LocalResponder {
    /// BEGIN has been answered, and no server knows of it.
    begun: Option<TransactionModes>,
    /// That transaction has failed: nothing but its end is heard.
    failed: bool,
    /// Messages of a batch have been answered here, and its Sync has not come yet.
    pub(super) in_batch: bool,
    pub(super) portals: HashMap<Box<[u8]>, Portal>,
    /// How the choice was asked for that is being decided on.
    choosing: Option<(Form, Protocol)>,
    /// What the client was told at login: what RESET leads to where there is no server.
    first: Arc<ReportedParameters>,
}

/// What Bind has made of a statement.
#[derive(Debug)]
pub(super) struct Portal {
    pub plan: Plan,
    pub request: Option<TenantRequest>,
    /// Format of the result.
    pub binary: bool,
}

/// How something was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    Simple,
    /// Execute; whether the result is to be binary.
    Extended(bool),
}

/// What comes after what has been answered.
#[derive(Debug, PartialEq, Eq)]
pub enum LocalStep {
    /// Nothing; the next message is not there yet.
    Waits,
    /// A server's business.
    Server,
    /// A choice. [`Desk::chosen`] or [`Desk::refuse`] answers it.
    Choose(TenantRequest),
    /// Another password for the login; answered likewise.
    SetPassword(NewPassword),
    /// The transaction that began here is over: the session may belong elsewhere now.
    Ended,
    /// The client says goodbye.
    Terminated,
}

/// Where a message leads: `None` where it has been answered.
pub(super) type BatchResult = Result<Option<LocalStep>, ClientError>;

impl LocalResponder {
    /// A session that has been told these parameters at login.
    pub fn new(first: Arc<ReportedParameters>) -> Self {
        let portals = HashMap::new();
        Self { begun: None, failed: false, in_batch: false, portals, choosing: None, first }
    }

    /// A transaction has begun here, and nowhere else.
    pub fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Nothing is under way here that a server does not know of.
    pub fn is_clear(&self) -> bool {
        self.begun.is_none()
            && !self.failed
            && !self.in_batch
            && self.choosing.is_none()
            && self.portals.is_empty()
    }

    /// The rest of the batch is a server's.
    pub fn leave_batch(&mut self) {
        self.in_batch = false;
    }

    /// Messages of a batch have been answered here, so that the rest belongs here.
    pub fn is_in_batch(&self) -> bool {
        self.in_batch
    }

    /// Whether what the client has sent is a server's from its first message on, as nearly all of it is: told by a glance at
    /// that, which takes no more than it costs to read it once.
    #[inline]
    pub fn passes(&self, sent: &[u8], side: &ClientSide) -> bool {
        self.is_clear() && first_text(sent, side).is_some_and(|sql| is_plain_query(sql, side.lexing()))
    }

    /// Answers what can be answered without a server, from the front of `inbox`; tells how many bytes that is, and what
    /// comes behind. `here` is the tenant's name; `None`: none is chosen.
    ///
    /// # Errors
    /// The client broke the protocol or a limit; the session ends.
    pub fn next(
        &mut self,
        inbox: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> Result<(usize, LocalStep), ClientError> {
        let mut rest = inbox;
        let next = loop {
            rest = side.skip_messages(rest, replies)?;
            let Some((tag, length)) = header(rest).map_err(violation)? else { break LocalStep::Waits };
            need_of_client(tag, length, side.rules()).map_err(violation)?;
            if tag == b'X' {
                break LocalStep::Terminated;
            }
            let Some((message, behind)) = rest.split_at_checked(length + 1) else {
                if rest.len() < FIRST_MESSAGE_BYTES {
                    break LocalStep::Waits;
                }
                // Too long to be waited for whole: nothing that is answered here is.
                let Some(refusal) = self.unserved(here) else { break LocalStep::Server };
                refusal.write(Severity::Error, replies);
                side.skip_request(self.failed());
                continue;
            };
            match self.message(tag, message, side, here, replies)? {
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

    fn message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        match tag {
            b'Q' => self.query(body, side, here, replies),
            b'P' => self.parse(body, side, here, replies),
            b'B' => self.bind(body, side, here, replies),
            b'D' => self.describe(body, side, here, replies),
            b'E' => self.execute(body, side, here, replies),
            b'C' => self.close(body, side, replies),
            b'S' => {
                self.in_batch = false;
                if self.begun.is_none() {
                    self.portals.clear();
                }
                forget_unnamed_in_session_mode(side);
                ready_for_query(replies, self.status());
                Ok(None)
            }
            b'F' => self.elsewhere(Protocol::Simple, side, here, replies),
            // Data of a COPY that failed is left out, as PostgreSQL does.
            b'H' | b'd' | b'c' | b'f' => Ok(None),
            other => Err(violation(FrameError::Type(other))),
        }
    }

    fn query(
        &mut self,
        mut body: &[u8],
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let plan = Plan::of(cstr(&mut body).map_err(violation)?, side);
        if !self.is_ours(&plan, here, side) {
            return self.elsewhere(Protocol::Simple, side, here, replies);
        }
        side.statements.forget_unnamed();
        let request = if let Plan::Choose(choice) = &plan { choice.request(&[]) } else { None };
        self.run(&plan, request.as_ref(), Protocol::Simple, side, here, replies)
    }

    /// Whether it is answered here.
    pub(super) fn is_ours(&self, plan: &Plan, here: Option<&str>, side: &ClientSide) -> bool {
        match plan {
            Plan::Server => false,
            Plan::Password(_) | Plan::Refused(_) => true,
            // An employee's session is here to change its password, and for nothing else.
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

    /// The transaction has failed, and this does not end it.
    pub(super) fn is_deaf(&self, plan: &Plan) -> bool {
        self.failed && !matches!(plan, Plan::Finish { .. })
    }

    /// It is a server's business, if there is a tenant to ask the server of.
    pub(super) fn elsewhere(
        &mut self,
        protocol: Protocol,
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        forget_unnamed_in_session_mode(side);
        match self.unserved(here) {
            Some(refusal) => self.fail(&refusal, protocol, side, replies),
            None => Ok(Some(LocalStep::Server)),
        }
    }

    /// Why no server gets what the client asks.
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
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        let refusal = match (plan, request) {
            _ if self.is_deaf(plan) => aborted(),
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
                if side.wanted.get(name).is_none() && side.wanted.len() >= side.rules().settings_max =>
            {
                let message = "too many parameters set (max_tracked_parameters)".into();
                ClientError::AsPostgres { sqlstate: "53400", message }
            }
            _ => match self.perform(plan, protocol, side, here, replies) {
                Ok(()) => {
                    if protocol == Protocol::Simple {
                        ready_for_query(replies, self.status());
                    }
                    return Ok(matches!(plan, Plan::Finish { .. }).then_some(LocalStep::Ended));
                }
                Err(limit) => side.rules().too_much(limit),
            },
        };
        self.fail(&refusal, protocol, side, replies)
    }

    fn perform(
        &mut self,
        plan: &Plan,
        protocol: Protocol,
        side: &mut ClientSide,
        here: Option<&str>,
        replies: &mut Vec<u8>,
    ) -> Result<(), Limit> {
        let tag = match plan {
            Plan::Empty => {
                append(replies, b'I', |_| {});
                return Ok(());
            }
            Plan::Show(name) => {
                let value = match **name == *PARAMETER {
                    true => here.unwrap_or_default().as_bytes(),
                    false => side.sent_parameters.find(name).map_or(&b""[..], |(_, value)| value),
                };
                row(name, Type::Text, value, protocol, replies);
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
                row("?column?", Type::Int4, value, protocol, replies);
                ONE_ROW
            }
            Plan::Set(name, value) => {
                side.keep(Arc::new(side.wanted.with(name, Some(value))))?;
                tell(side, name, value.as_bytes(), replies);
                "SET"
            }
            Plan::Unset(name) => {
                side.keep(Arc::new(side.wanted.with(name, side.startup.get(name))))?;
                if let Some((_, value)) = self.first.find(name) {
                    tell(side, name, value, replies);
                }
                "RESET"
            }
            Plan::DriverReset { tidying, tags } => {
                if *tidying != DriverReset::KeepsSettings {
                    side.keep(side.startup.clone())?;
                    self.first.write_changes(&mut side.sent_parameters, replies);
                }
                if *tidying == DriverReset::DiscardsAll {
                    side.statements.forget_all();
                }
                for tag in tags {
                    if *tag == ONE_ROW {
                        row("pg_advisory_unlock_all", Type::Void, b"", protocol, replies);
                    }
                    messages::command_complete(replies, tag);
                }
                return Ok(());
            }
            Plan::Server | Plan::Choose(_) | Plan::Mixed | Plan::Password(_) | Plan::Refused(_) => {
                return Ok(());
            }
        };
        messages::command_complete(replies, tag);
        Ok(())
    }

    /// The choice has been made: the session is at `here` now; or the password has been changed.
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

    /// The choice, or the change of the password, was refused.
    pub fn refuse(&mut self, refusal: &ClientError, side: &mut ClientSide, replies: &mut Vec<u8>) {
        if let Some((_, protocol)) = self.choosing.take() {
            let _ = self.fail(refusal, protocol, side, replies);
        }
    }

    pub(super) fn fail(
        &mut self,
        refusal: &ClientError,
        protocol: Protocol,
        side: &mut ClientSide,
        replies: &mut Vec<u8>,
    ) -> BatchResult {
        refusal.write(Severity::Error, replies);
        let status = self.failed();
        match protocol {
            Protocol::Simple => ready_for_query(replies, status),
            Protocol::Extended(_) => side.skip_to_sync(status),
        }
        Ok(None)
    }

    /// A statement has failed that no server has got: the transaction that has begun here fails with it. What
    /// ReadyForQuery says then.
    pub fn failed(&mut self) -> u8 {
        self.failed = self.begun.is_some();
        self.in_batch = false;
        self.portals.clear();
        self.status()
    }

    fn status(&self) -> u8 {
        match (self.begun, self.failed) {
            (None, _) => b'I',
            (Some(_), false) => b'T',
            (Some(_), true) => b'E',
        }
    }

    /// A server takes over: it is told of the transaction that has begun here. A BEGIN that failed for its modes would
    /// leave no transaction, and what comes behind it would run all the same; so they are set behind it.
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

/// In session mode nobody follows what becomes of the unnamed statement: ours is for this batch.
fn forget_unnamed_in_session_mode(side: &mut ClientSide) {
    if !side.follows() {
        side.statements.forget_unnamed();
    }
}

/// The text that the first of some messages runs, if it is there whole.
pub fn first_text<'a>(sent: &'a [u8], side: &'a ClientSide) -> Option<&'a [u8]> {
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
    cstr(&mut body).ok()
}

pub(super) fn aborted() -> ClientError {
    let message = "current transaction is aborted, commands ignored until end of transaction block".into();
    ClientError::AsPostgres { sqlstate: "25P02", message }
}

/// A parameter has this value now: the client is told, if servers report it.
fn tell(side: &mut ClientSide, name: &str, value: &[u8], replies: &mut Vec<u8>) {
    if let Some((spelled, _)) = side.sent_parameters.find(name) {
        ReportedParameters::new([(spelled, value)]).write_changes(&mut side.sent_parameters, replies);
    }
}

/// The one row of an answer; a simple query has it described first.
fn row(column: &str, known: Type, value: &[u8], protocol: Protocol, replies: &mut Vec<u8>) {
    if protocol == Protocol::Simple {
        messages::row_description(replies, column, known, false);
    }
    messages::data_row(replies, value);
}
