//! Texts that choose the tenant or change the session's user: they wait or are rejected.

use std::ops::ControlFlow;

use super::{
    client_messages::{CONTINUE, ClientMessages, Handled},
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

/// A text that every server rejects.
const INVALID_TEXT: &[u8] = b"pglobby.tenant";

/// Whether a text in session mode must be read: it may choose the tenant, or name a role or a database. This
/// cost is paid for each text.
#[inline]
pub(super) fn must_be_read(bytes: &[u8], rules: &SessionRules) -> bool {
    let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
    if bytes.first() == Some(&b'P') {
        let _ = cstr(&mut body);
    }
    rules.may_switch_tenant
        || may_change_identity(cstr(&mut body).unwrap_or_default())
        || names_pglobby(bytes)
}

fn names_pglobby(bytes: &[u8]) -> bool {
    const NAME: &[u8] = b"pglobby";
    bytes.windows(NAME.len()).any(|window| window.eq_ignore_ascii_case(NAME))
}

/// The kind (`S` or `P`) and name in the body of a Describe or Close.
#[inline(always)]
pub fn kind_and_name(body: &[u8]) -> Result<(u8, &[u8]), FrameError> {
    let (kind, mut rest) = body.split_first().ok_or(FrameError::Strings)?;
    Ok((*kind, cstr(&mut rest)?))
}

impl ClientMessages<'_, '_> {
    /// A text that chooses the tenant. It waits if it is the first of its transaction. Otherwise the server
    /// is made to reject it, so that the rest of the batch or transaction fails as after any error.
    #[cold]
    pub(super) fn choose_tenant(&mut self, tag: u8) -> ControlFlow<WaitReason> {
        let replies = &self.server.replies;
        if !self.rules.may_switch_tenant {
            self.reject(tag, TenantSwitchError::Employee);
        } else if replies.is_unsynced() || replies.takes_copy_data() {
            self.reject(tag, TenantSwitchError::TransactionBegun);
        } else {
            return ControlFlow::Break(WaitReason::Choice);
        }
        ControlFlow::Continue(())
    }

    /// Handles a text that needs a decision; `None`: it may be sent.
    #[cold]
    pub(super) fn guard(
        &mut self,
        tag: u8,
        side_effects: &SideEffects,
        sql: &[u8],
    ) -> Option<ControlFlow<WaitReason>> {
        match side_effects.tenant {
            TenantMention::Sets => Some(self.choose_tenant(tag)),
            _ => self.guard_identity(tag, sql),
        }
    }

    /// Handles a text that would change the session's user on its servers. It is rejected, except for a
    /// change of the login's own password, which waits and is made outside a transaction.
    fn guard_identity(&mut self, tag: u8, sql: &[u8]) -> Option<ControlFlow<WaitReason>> {
        let replies = &self.server.replies;
        match self.rules.identity.decide(sql, self.server.lexing())? {
            IdentityDecision::Password(_) if replies.is_unsynced() || replies.takes_copy_data() => {
                self.reject(tag, IdentityError::PasswordInTransaction);
            }
            IdentityDecision::Password(_) => return Some(ControlFlow::Break(WaitReason::Choice)),
            IdentityDecision::Refused(reason) => self.reject(tag, reason),
        }
        Some(ControlFlow::Continue(()))
    }

    /// Bind, Describe or Close in session mode, while the session has statements that must not reach a
    /// server: changes of its login's password.
    #[cold]
    pub(super) fn statement_in_session_mode(&mut self, tag: u8, bytes: &[u8], whole: bool) -> Handled {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = match tag {
            b'B' => cstr(&mut body).and_then(|_| cstr(&mut body)).map_err(violation)?,
            _ => match kind_and_name(body).map_err(violation)? {
                (b'S', name) => name,
                _ => b"",
            },
        };
        let statement = self.statements.get(name).filter(|_| !name.is_empty()).cloned();
        match (tag, statement) {
            (b'C', Some(_)) => drop(self.statements.remove(name)),
            (_, Some(statement)) => {
                if let Some(flow) = self.guard_bound(&statement.side_effects, &statement.body(), whole)? {
                    return Ok(flow);
                }
            }
            _ => {}
        }
        self.track(match tag {
            b'B' => Request::Bind,
            b'D' => Request::Describe,
            _ => Request::Close(None),
        });
        self.out.pass(bytes);
        CONTINUE
    }

    /// Bind of a statement that needs a decision.
    #[cold]
    pub(super) fn guard_bound(
        &mut self,
        side_effects: &SideEffects,
        body: &[u8],
        whole: bool,
    ) -> Result<Option<ControlFlow<WaitReason>>, ClientError> {
        let flow = self.guard(b'B', side_effects, cstr(&mut { body }).unwrap_or_default());
        match flow {
            // The part that is still missing makes it too long for a statement that chooses the tenant.
            Some(ControlFlow::Break(_)) if !whole => {
                self.reject(b'B', TenantSwitchError::NotAlone);
                self.return_state.rejected = true;
                Ok(Some(ControlFlow::Continue(())))
            }
            flow => Ok(flow),
        }
    }

    /// Rejects a message: the server gets an invalid one, and the client gets the proxy's error for it.
    #[cold]
    pub(super) fn reject(&mut self, tag: u8, reason: impl Into<RequestError>) {
        let request_error = reason.into();
        if self.server.replies.takes_copy_data() {
            // Any message but data makes the COPY fail.
            append(self.out.build(), b'Q', |out| append_cstr(out, INVALID_TEXT));
        } else if matches!(tag, b'Q' | b'F') {
            self.end_unnamed();
            let _ = self.server.replies.track(Request::Query(None), Origin::Denied(request_error));
            append(self.out.build(), b'Q', |out| append_cstr(out, INVALID_TEXT));
        } else {
            self.server.statements.set_unnamed_unknown();
            let _ = self.server.replies.track(Request::Parse(None), Origin::Denied(request_error));
            parse(b"", INVALID_TEXT, self.out.build());
        }
    }

    /// A text in session mode: read only for the user and the tenant. The tenant is looked for if the session
    /// may choose it, or the text has its name.
    pub(super) fn text_in_session_mode(&mut self, tag: u8, bytes: &[u8]) -> Handled {
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
        let mention = sql.map(|sql| match self.rules.may_switch_tenant || names_pglobby(sql) {
            true => SideEffects::read(sql, self.server.lexing()).tenant,
            false => TenantMention::None,
        });
        if matches!(mention, Ok(TenantMention::Resets)) {
            self.server.checks.resets = true;
        }
        match (tag, mention) {
            (b'Q', Ok(TenantMention::Sets)) => return Ok(self.choose_tenant(tag)),
            (_, Ok(TenantMention::Sets)) if !self.rules.may_switch_tenant => {
                self.reject(tag, TenantSwitchError::Employee)
            }
            (_, Ok(TenantMention::Sets)) => self.reject(tag, TenantSwitchError::SessionMode),
            (b'Q', _) => {
                self.end_unnamed();
                self.track(Request::Query(None));
                self.out.pass(bytes);
            }
            _ => {
                self.track(Request::Parse(None));
                self.out.pass(bytes);
            }
        }
        CONTINUE
    }
}
