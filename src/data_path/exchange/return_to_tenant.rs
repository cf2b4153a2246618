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
    AtHome,
    /// It has chosen it: a reset leads elsewhere.
    Away,
    /// For one transaction.
    Visiting,
}

/// Whether a text leads a session that is away from its tenant back to where it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnPoint {
    /// It does not.
    GoesOn,
    /// It does when it is over.
    Ends,
    /// It does, and goes on with something that would still run here; or it begins the next transaction at once.
    TooLong,
}

impl ReturnPoint {
    /// Reads a text.
    pub fn read(sql: &[u8], lexing: Lexing, stance: CurrentTenant) -> Self {
        let visiting = stance == CurrentTenant::Visiting;
        let mut ended = false;
        for statement in sql::statements(sql, lexing) {
            let ends = match statement.kind {
                Kind::Commit { chain: true } | Kind::Rollback { chain: true } if visiting => {
                    return Self::TooLong;
                }
                Kind::Commit { .. } | Kind::Rollback { .. } | Kind::PrepareTransaction => visiting,
                Kind::ResetAll | Kind::Discard(Discard::All) => stance != CurrentTenant::AtHome,
                Kind::Discard(_) | Kind::Unlisten(None) | Kind::CloseCursor(None) => continue,
                _ if ended => return Self::TooLong,
                _ => continue,
            };
            ended |= ends;
        }
        if ended { Self::Ends } else { Self::GoesOn }
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
        let visiting = self.rules.stance == CurrentTenant::Visiting;
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let ended = self.bounds.ended;
        let stay = match tag {
            b'Q' => {
                let sql = if whole { cstr(&mut { body }).map_err(violation)? } else { b"" };
                let stay = if ended { ReturnPoint::TooLong } else { self.stay(sql) };
                *self.bounds = ReturnState { pauses: visiting || stay != ReturnPoint::GoesOn, ..ReturnState::default() };
                stay
            }
            b'B' => {
                let stay = if ended { ReturnPoint::TooLong } else { self.stay_of_bound(body)? };
                self.bounds.ended |= stay == ReturnPoint::Ends;
                stay
            }
            b'F' => {
                *self.bounds = ReturnState { pauses: visiting || ended, ..ReturnState::default() };
                if ended { ReturnPoint::TooLong } else { ReturnPoint::GoesOn }
            }
            b'S' => {
                *self.bounds = ReturnState { pauses: visiting || ended, ..ReturnState::default() };
                ReturnPoint::GoesOn
            }
            _ => ReturnPoint::GoesOn,
        };
        match stay {
            ReturnPoint::GoesOn | ReturnPoint::Ends => Ok(true),
            ReturnPoint::TooLong => {
                self.deny(tag, TenantSwitchError::Over);
                self.bounds.denied = !whole;
                Ok(false)
            }
        }
    }

    fn stay(&self, sql: &[u8]) -> ReturnPoint {
        ReturnPoint::read(sql, self.server.lexing(), self.rules.stance)
    }

    fn stay_of_bound(&self, mut body: &[u8]) -> Result<ReturnPoint, ClientError> {
        cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        let bound = match name {
            b"" => self.statements.unnamed_body(),
            _ => self.statements.get(name).map(|statement| statement.body()),
        };
        let sql = bound.and_then(|mut body| cstr(&mut body).ok());
        Ok(sql.map_or(ReturnPoint::GoesOn, |sql| self.stay(sql)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stay_ends_with_its_transaction_and_lets_nothing_run_behind_it() {
        let visiting = |sql: &str| ReturnPoint::read(sql.as_bytes(), Lexing::default(), CurrentTenant::Visiting);
        let away = |sql: &str| ReturnPoint::read(sql.as_bytes(), Lexing::default(), CurrentTenant::Away);
        for (sql, stay) in [
            ("SELECT 1", ReturnPoint::GoesOn),
            ("SAVEPOINT a; ROLLBACK TO a; RELEASE a", ReturnPoint::GoesOn),
            ("INSERT INTO t VALUES (1); COMMIT", ReturnPoint::Ends),
            ("ROLLBACK", ReturnPoint::Ends),
            ("PREPARE TRANSACTION 'x'", ReturnPoint::Ends),
            ("COMMIT; SELECT 1", ReturnPoint::TooLong),
            ("COMMIT AND CHAIN", ReturnPoint::TooLong),
            ("END; BEGIN", ReturnPoint::TooLong),
        ] {
            assert_eq!(visiting(sql), stay, "{sql}");
        }
        for (sql, stay) in [
            ("COMMIT; SELECT 1", ReturnPoint::GoesOn),
            ("DISCARD ALL", ReturnPoint::Ends),
            ("RESET ALL; UNLISTEN *; CLOSE ALL", ReturnPoint::Ends),
            ("RESET ALL; SELECT 1", ReturnPoint::TooLong),
        ] {
            assert_eq!(away(sql), stay, "{sql}");
        }
    }
}
