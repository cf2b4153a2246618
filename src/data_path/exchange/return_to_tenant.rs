//! A session that is not at the tenant it began with must stop in time: what comes behind the end of a transaction that
//! had a tenant of its own, or behind a pool's reset, is meant for another tenant, though it may be in the same write, in
//! the same batch, or in the same text.

use super::{client_messages::ClientMessages, client_side::violation};
use crate::{
    data_path::sql::{self, Discard, Kind, Lexing},
    error::{ClientError, TenantSwitchError},
    wire::frame::{HEADER_BYTES, cstr},
};

/// How a session stands to the tenant that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CurrentTenant {
    /// It began there, and returns there.
    #[default]
    First,
    /// It has chosen it: a reset leads elsewhere.
    Chosen,
    /// For one transaction.
    ForTransaction,
}

/// Whether a text leads a session that is away from its tenant back to where it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnPoint {
    /// It does not.
    None,
    /// It does when it is over.
    AtEnd,
    /// It does, and goes on with something that would still run here; or it begins the next transaction at once.
    Within,
}

impl ReturnPoint {
    /// Reads a text.
    pub fn read(sql: &[u8], lexing: Lexing, stance: CurrentTenant) -> Self {
        let visiting = stance == CurrentTenant::ForTransaction;
        let mut ended = false;
        for statement in sql::statements(sql, lexing) {
            let ends = match statement.kind {
                Kind::Commit { chain: true } | Kind::Rollback { chain: true } if visiting => {
                    return Self::Within;
                }
                Kind::Commit { .. } | Kind::Rollback { .. } | Kind::PrepareTransaction => visiting,
                Kind::ResetAll | Kind::Discard(Discard::All) => stance != CurrentTenant::First,
                Kind::Discard(_) | Kind::Unlisten(None) | Kind::CloseCursor(None) => continue,
                _ if ended => return Self::Within,
                _ => continue,
            };
            ended |= ends;
        }
        if ended { Self::AtEnd } else { Self::None }
    }
}

/// What the session has sent that the rest must wait for.
#[derive(Debug, Default)]
pub(super) struct ReturnState {
    /// In this batch its stay ends: nothing else may run behind that. Where a query or a call is put in, it ends the batch.
    ended: bool,
    /// Nothing more is passed on behind the end of this message, until it is answered.
    pub pauses: bool,
    /// Something else has gone to the server in place of a message of which more is to come.
    pub denied: bool,
}

impl ClientMessages<'_, '_> {
    /// Looks at a message of a session that is away; `false` if it must not be passed on and has been seen to.
    #[cold]
    pub(super) fn is_within_bounds(
        &mut self,
        tag: u8,
        bytes: &[u8],
        whole: bool,
    ) -> Result<bool, ClientError> {
        let visiting = self.rules.current_tenant == CurrentTenant::ForTransaction;
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let ended = self.return_state.ended;
        let stay = match tag {
            b'Q' => {
                let sql = if whole { cstr(&mut { body }).map_err(violation)? } else { b"" };
                let stay = if ended { ReturnPoint::Within } else { self.stay(sql) };
                *self.return_state =
                    ReturnState { pauses: visiting || stay != ReturnPoint::None, ..ReturnState::default() };
                stay
            }
            b'B' => {
                let stay = if ended { ReturnPoint::Within } else { self.stay_of_bound(body)? };
                self.return_state.ended |= stay == ReturnPoint::AtEnd;
                stay
            }
            b'F' => {
                *self.return_state = ReturnState { pauses: visiting || ended, ..ReturnState::default() };
                if ended { ReturnPoint::Within } else { ReturnPoint::None }
            }
            b'S' => {
                *self.return_state = ReturnState { pauses: visiting || ended, ..ReturnState::default() };
                ReturnPoint::None
            }
            _ => ReturnPoint::None,
        };
        match stay {
            ReturnPoint::None | ReturnPoint::AtEnd => Ok(true),
            ReturnPoint::Within => {
                self.deny(tag, TenantSwitchError::Over);
                self.return_state.denied = !whole;
                Ok(false)
            }
        }
    }

    fn stay(&self, sql: &[u8]) -> ReturnPoint {
        ReturnPoint::read(sql, self.server.lexing(), self.rules.current_tenant)
    }

    fn stay_of_bound(&self, mut body: &[u8]) -> Result<ReturnPoint, ClientError> {
        cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        let bound = match name {
            b"" => self.statements.unnamed_body(),
            _ => self.statements.get(name).map(|statement| statement.body()),
        };
        let sql = bound.and_then(|mut body| cstr(&mut body).ok());
        Ok(sql.map_or(ReturnPoint::None, |sql| self.stay(sql)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stay_ends_with_its_transaction_and_lets_nothing_run_behind_it() {
        let visiting =
            |sql: &str| ReturnPoint::read(sql.as_bytes(), Lexing::default(), CurrentTenant::ForTransaction);
        let away = |sql: &str| ReturnPoint::read(sql.as_bytes(), Lexing::default(), CurrentTenant::Chosen);
        for (sql, stay) in [
            ("SELECT 1", ReturnPoint::None),
            ("SAVEPOINT a; ROLLBACK TO a; RELEASE a", ReturnPoint::None),
            ("INSERT INTO t VALUES (1); COMMIT", ReturnPoint::AtEnd),
            ("ROLLBACK", ReturnPoint::AtEnd),
            ("PREPARE TRANSACTION 'x'", ReturnPoint::AtEnd),
            ("COMMIT; SELECT 1", ReturnPoint::Within),
            ("COMMIT AND CHAIN", ReturnPoint::Within),
            ("END; BEGIN", ReturnPoint::Within),
        ] {
            assert_eq!(visiting(sql), stay, "{sql}");
        }
        for (sql, stay) in [
            ("COMMIT; SELECT 1", ReturnPoint::None),
            ("DISCARD ALL", ReturnPoint::AtEnd),
            ("RESET ALL; UNLISTEN *; CLOSE ALL", ReturnPoint::AtEnd),
            ("RESET ALL; SELECT 1", ReturnPoint::Within),
        ] {
            assert_eq!(away(sql), stay, "{sql}");
        }
    }
}
