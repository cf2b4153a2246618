//! A text that chooses the tenant, or changes who the session is, on its way to a server: it waits, or is refused.

use std::ops::ControlFlow;

use super::{
    client_messages::{ClientMessages, GOES_ON},
    client_side::{SessionRules, violation},
    ensure_prepared::WaitReason,
    pending_replies::{Origin, Request},
};
use crate::{
    data_path::{
        session_state::{identity::IdentityDecision, side_effects::SideEffects},
        sql::{TenantMention, may_change_identity},
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
pub(super) fn is_read_along(bytes: &[u8], rules: &SessionRules) -> bool {
    let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
    if bytes.first() == Some(&b'P') {
        let _ = cstr(&mut body);
    }
    rules.may_switch_tenant || may_change_identity(cstr(&mut body).unwrap_or_default()) || names_choice(bytes)
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

impl ClientMessages<'_, '_> {
    /// A text that chooses the tenant. It waits where nothing else of its transaction has gone to the server; elsewhere the
    /// server is made to refuse it, so that what comes behind it fails with it as with any other error.
    #[cold]
    pub(super) fn choice(&mut self, tag: u8) -> ControlFlow<WaitReason> {
        let replies = &self.server.replies;
        if !self.rules.may_switch_tenant {
            self.deny(tag, TenantSwitchError::Employee);
        } else if replies.is_unsynced() || replies.takes_copy_data() {
            self.deny(tag, TenantSwitchError::TransactionBegun);
        } else {
            return ControlFlow::Break(WaitReason::Choice);
        }
        ControlFlow::Continue(())
    }

    /// A text that is guarded; `None`: it goes its way.
    #[cold]
    pub(super) fn guard(
        &mut self,
        tag: u8,
        side_effects: &SideEffects,
        sql: &[u8],
    ) -> Option<ControlFlow<WaitReason>> {
        match side_effects.tenant {
            TenantMention::Sets => Some(self.choice(tag)),
            _ => self.guard_identity(tag, sql),
        }
    }

    /// A text that would change who the session is on its servers: it is refused, or waits if it is a change of its login's
    /// password, which is made where no transaction is open.
    fn guard_identity(&mut self, tag: u8, sql: &[u8]) -> Option<ControlFlow<WaitReason>> {
        let replies = &self.server.replies;
        match self.rules.identity.decide(sql, self.server.lexing())? {
            IdentityDecision::Password(_) if replies.is_unsynced() || replies.takes_copy_data() => {
                self.deny(tag, IdentityError::PasswordInTransaction);
            }
            IdentityDecision::Password(_) => return Some(ControlFlow::Break(WaitReason::Choice)),
            IdentityDecision::Refused(reason) => self.deny(tag, reason),
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
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = match tag {
            b'B' => cstr(&mut body).and_then(|_| cstr(&mut body)).map_err(violation)?,
            _ => Some(kind_and_name(bytes)?).filter(|(kind, _)| *kind == b'S').unwrap_or_default().1,
        };
        let known = self.statements.get(name).filter(|_| !name.is_empty()).cloned();
        match (tag, known) {
            (b'C', Some(_)) => drop(self.statements.remove(name)),
            (_, Some(statement)) => {
                if let Some(flow) = self.guard_bound(&statement.side_effects, statement.body(), whole)? {
                    return Ok(flow);
                }
            }
            _ => {}
        }
        self.ask(match tag {
            b'B' => Request::Bind,
            b'D' => Request::Describe,
            _ => Request::Close(None),
        });
        self.out.pass(bytes);
        GOES_ON
    }

    /// A portal of a guarded text is bound; its text was judged when it was parsed.
    #[cold]
    pub(super) fn guard_bound(
        &mut self,
        side_effects: &SideEffects,
        body: &[u8],
        whole: bool,
    ) -> Result<Option<ControlFlow<WaitReason>>, ClientError> {
        let flow = self.guard(b'B', side_effects, cstr(&mut { body }).unwrap_or_default());
        match flow {
            // With the rest yet to come it is too long for what it says.
            Some(ControlFlow::Break(_)) if !whole => {
                self.deny(b'B', TenantSwitchError::NotAlone);
                self.return_state.denied = true;
                Ok(Some(ControlFlow::Continue(())))
            }
            flow => Ok(flow),
        }
    }

    /// In place of a message the server gets one that it cannot read, and its error goes to the client in words of ours.
    #[cold]
    pub(super) fn deny(&mut self, tag: u8, reason: impl Into<RequestError>) {
        let request_error = reason.into();
        if self.server.replies.takes_copy_data() {
            // Whatever it is: the COPY fails of it.
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else if matches!(tag, b'Q' | b'F') {
            self.end_unnamed();
            let _ = self.server.replies.track(Request::Query(None), Origin::Denied(request_error));
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else {
            self.server.statements.set_unnamed_unknown();
            let _ = self.server.replies.track(Request::Parse(None), Origin::Denied(request_error));
            parse(b"", UNREADABLE, self.out.build());
        }
    }

    /// A session that keeps its server: read along for one thing only, and of an employee's only where it is named.
    pub(super) fn in_session_mode(
        &mut self,
        tag: u8,
        bytes: &[u8],
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
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
        let talk = sql.map(|sql| match self.rules.may_switch_tenant || names_choice(sql) {
            true => SideEffects::read(sql, self.server.lexing()).tenant,
            false => TenantMention::None,
        });
        if matches!(talk, Ok(TenantMention::Resets)) {
            self.server.checks.note_reset();
        }
        match (tag, talk) {
            (b'Q', Ok(TenantMention::Sets)) => return Ok(self.choice(tag)),
            (_, Ok(TenantMention::Sets)) if !self.rules.may_switch_tenant => {
                self.deny(tag, TenantSwitchError::Employee)
            }
            (_, Ok(TenantMention::Sets)) => self.deny(tag, TenantSwitchError::SessionMode),
            (b'Q', _) => {
                self.end_unnamed();
                self.ask(Request::Query(None));
                self.out.pass(bytes);
            }
            _ => {
                self.ask(Request::Parse(None));
                self.out.pass(bytes);
            }
        }
        GOES_ON
    }
}
