//! A text that chooses the tenant, or changes who the session is, on its way to a server: it waits, or is refused.

use std::ops::ControlFlow;

use super::{
    client_messages::{GOES_ON, Requests},
    client_side::{Rules, violation},
    ensure_prepared::Hold,
    pending_replies::{Asked, Whose},
};
use crate::{
    data_path::{
        session_state::{identity::Verdict, side_effects::Aftermath},
        sql::{Talk, may_change_identity},
    },
    error::{ClientError, IdentityError, RequestError, TenantSwitchError},
    wire::{
        frame::{FrameError, HEADER_BYTES, cstr},
        message::{append, append_cstr, parse},
    },
};

/// What no server takes for a statement.
const UNREADABLE: &[u8] = b"pglobby.tenant";

/// Whether a text in session mode is read: it may be about the tenant, or about roles or a database. A session pays this much
/// for each.
#[inline]
pub(super) fn is_read_along(bytes: &[u8], rules: &Rules) -> bool {
    let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
    if bytes.first() == Some(&b'P') {
        let _ = cstr(&mut body);
    }
    rules.chooses || may_change_identity(cstr(&mut body).unwrap_or_default()) || names_choice(bytes)
}

fn names_choice(bytes: &[u8]) -> bool {
    const NAME: &[u8] = b"pglobby";
    bytes.windows(NAME.len()).any(|window| window.eq_ignore_ascii_case(NAME))
}

/// What Describe or Close is about: `S` or `P`, and its name.
#[inline(always)]
pub(super) fn kind_and_name(bytes: &[u8]) -> Result<(u8, &[u8]), ClientError> {
    let Some((kind, mut rest)) = bytes.get(HEADER_BYTES..).and_then(<[u8]>::split_first) else {
        return Err(violation(FrameError::Strings));
    };
    Ok((*kind, cstr(&mut rest).map_err(violation)?))
}

impl Requests<'_, '_> {
    /// A text that chooses the tenant. It waits where nothing else of its transaction has gone to the server; elsewhere the
    /// server is made to refuse it, so that what comes behind it fails with it as with any other error.
    #[cold]
    pub(super) fn choice(&mut self, tag: u8) -> ControlFlow<Hold> {
        let lease = &self.server.lease;
        if !self.rules.chooses {
            self.deny(tag, TenantSwitchError::Employee);
        } else if lease.is_unsynced() || lease.takes_copy_data() {
            self.deny(tag, TenantSwitchError::TransactionBegun);
        } else {
            return ControlFlow::Break(Hold::Choice);
        }
        ControlFlow::Continue(())
    }

    /// A text that is guarded; `None`: it goes its way.
    #[cold]
    pub(super) fn guard(&mut self, tag: u8, aftermath: &Aftermath, sql: &[u8]) -> Option<ControlFlow<Hold>> {
        match aftermath.talk {
            Talk::Chooses => Some(self.choice(tag)),
            _ => self.guard_identity(tag, sql),
        }
    }

    /// A text that would change who the session is on its servers: it is refused, or waits if it is a change of its login's
    /// password, which is made where no transaction is open.
    fn guard_identity(&mut self, tag: u8, sql: &[u8]) -> Option<ControlFlow<Hold>> {
        let lease = &self.server.lease;
        match self.rules.identity.judge(sql, self.server.lexing())? {
            Verdict::Password(_) if lease.is_unsynced() || lease.takes_copy_data() => {
                self.deny(tag, IdentityError::PasswordInTransaction);
            }
            Verdict::Password(_) => return Some(ControlFlow::Break(Hold::Choice)),
            Verdict::Refused(reason) => self.deny(tag, reason),
        }
        Some(ControlFlow::Continue(()))
    }

    /// Bind, Describe or Close in session mode, while the session has statements that no server has: those that change its
    /// login's password.
    #[cold]
    pub(super) fn unserved_in_session_mode(
        &mut self,
        tag: u8,
        bytes: &[u8],
        whole: bool,
    ) -> Result<ControlFlow<Hold>, ClientError> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = match tag {
            b'B' => cstr(&mut body).and_then(|_| cstr(&mut body)).map_err(violation)?,
            _ => Some(kind_and_name(bytes)?).filter(|(kind, _)| *kind == b'S').unwrap_or_default().1,
        };
        let known = self.statements.get(name).filter(|_| !name.is_empty()).cloned();
        match (tag, known) {
            (b'C', Some(_)) => drop(self.statements.remove(name)),
            (_, Some(statement)) => {
                if let Some(flow) = self.guard_bound(&statement.aftermath, statement.body(), whole)? {
                    return Ok(flow);
                }
            }
            _ => {}
        }
        self.ask(match tag {
            b'B' => Asked::Bind,
            b'D' => Asked::Describe,
            _ => Asked::Close(None),
        });
        self.out.pass(bytes);
        GOES_ON
    }

    /// A portal of a guarded text is bound; its text was judged when it was parsed.
    #[cold]
    pub(super) fn guard_bound(
        &mut self,
        aftermath: &Aftermath,
        body: &[u8],
        whole: bool,
    ) -> Result<Option<ControlFlow<Hold>>, ClientError> {
        let flow = self.guard(b'B', aftermath, cstr(&mut { body }).unwrap_or_default());
        match flow {
            // With the rest yet to come it is too long for what it says.
            Some(ControlFlow::Break(_)) if !whole => {
                self.deny(b'B', TenantSwitchError::NotAlone);
                self.bounds.denied = true;
                Ok(Some(ControlFlow::Continue(())))
            }
            flow => Ok(flow),
        }
    }

    /// In place of a message the server gets one that it cannot read, and its error goes to the client in words of ours.
    #[cold]
    pub(super) fn deny(&mut self, tag: u8, reason: impl Into<RequestError>) {
        let request_error = reason.into();
        if self.server.lease.takes_copy_data() {
            // Whatever it is: the COPY fails of it.
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else if matches!(tag, b'Q' | b'F') {
            self.end_unnamed();
            let _ = self.server.lease.ask(Asked::Query(None), Whose::Denied(request_error));
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else {
            self.server.statements.doubt_unnamed();
            let _ = self.server.lease.ask(Asked::Parse(None), Whose::Denied(request_error));
            parse(b"", UNREADABLE, self.out.build());
        }
    }

    /// A session that keeps its server: read along for one thing only, and of an employee's only where it is named.
    pub(super) fn in_session_mode(
        &mut self,
        tag: u8,
        bytes: &[u8],
    ) -> Result<ControlFlow<Hold>, ClientError> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if tag == b'P' {
            cstr(&mut body).map_err(violation)?;
        }
        let sql = cstr(&mut body);
        if let Ok(sql) = sql
            && let Some(flow) = self.guard_identity(tag, sql)
        {
            return Ok(flow);
        }
        let talk = sql.map(|sql| match self.rules.chooses || names_choice(sql) {
            true => Aftermath::read(sql, self.server.lexing()).talk,
            false => Talk::Silent,
        });
        if matches!(talk, Ok(Talk::Resets)) {
            self.server.uncertain.note_reset();
        }
        match (tag, talk) {
            (b'Q', Ok(Talk::Chooses)) => return Ok(self.choice(tag)),
            (_, Ok(Talk::Chooses)) if !self.rules.chooses => self.deny(tag, TenantSwitchError::Employee),
            (_, Ok(Talk::Chooses)) => self.deny(tag, TenantSwitchError::SessionMode),
            (b'Q', _) => {
                self.end_unnamed();
                self.ask(Asked::Query(None));
                self.out.pass(bytes);
            }
            _ => {
                self.ask(Asked::Parse(None));
                self.out.pass(bytes);
            }
        }
        GOES_ON
    }
}
