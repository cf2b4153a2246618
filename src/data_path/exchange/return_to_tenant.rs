//! A session that is not at the tenant it began with must stop in time: what comes behind the end of a transaction that
//! had a tenant of its own, or behind a pool's reset, is meant for another tenant, though it may be in the same write, in
//! the same batch, or in the same text.

use super::{client_messages::Requests, client_side::violation};
use crate::{
    data_path::sql::{self, Discard, Kind, Lexing},
    error::{ClientError, TenantSwitchError},
    wire::frame::{HEADER_BYTES, cstr},
};

/// How a session stands to the tenant that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stance {
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
pub enum Stay {
    /// It does not.
    GoesOn,
    /// It does when it is over.
    Ends,
    /// It does, and goes on with something that would still run here; or it begins the next transaction at once.
    TooLong,
}

impl Stay {
    /// Reads a text.
    pub fn read(sql: &[u8], lexing: Lexing, stance: Stance) -> Self {
        let visiting = stance == Stance::Visiting;
        let mut ended = false;
        for statement in sql::statements(sql, lexing) {
            let ends = match statement.kind {
                Kind::Commit { chain: true } | Kind::Rollback { chain: true } if visiting => {
                    return Self::TooLong;
                }
                Kind::Commit { .. } | Kind::Rollback { .. } | Kind::PrepareTransaction => visiting,
                Kind::ResetAll | Kind::Discard(Discard::All) => stance != Stance::AtHome,
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
pub(super) struct Bounds {
    /// In this batch its stay ends: nothing else may run behind that. Where a query or a call is put in, it ends the batch.
    ended: bool,
    /// Nothing more is passed on behind the end of this message, until it is answered.
    pub pauses: bool,
    /// Something else has gone to the server in place of a message of which more is to come.
    pub denied: bool,
}

impl Requests<'_, '_> {
    /// Looks at a message of a session that is away; `false` if it must not be passed on and has been seen to.
    #[cold]
    pub(super) fn is_within_bounds(
        &mut self,
        tag: u8,
        bytes: &[u8],
        whole: bool,
    ) -> Result<bool, ClientError> {
        let visiting = self.rules.stance == Stance::Visiting;
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let ended = self.bounds.ended;
        let stay = match tag {
            b'Q' => {
                let sql = if whole { cstr(&mut { body }).map_err(violation)? } else { b"" };
                let stay = if ended { Stay::TooLong } else { self.stay(sql) };
                *self.bounds = Bounds { pauses: visiting || stay != Stay::GoesOn, ..Bounds::default() };
                stay
            }
            b'B' => {
                let stay = if ended { Stay::TooLong } else { self.stay_of_bound(body)? };
                self.bounds.ended |= stay == Stay::Ends;
                stay
            }
            b'F' => {
                *self.bounds = Bounds { pauses: visiting || ended, ..Bounds::default() };
                if ended { Stay::TooLong } else { Stay::GoesOn }
            }
            b'S' => {
                *self.bounds = Bounds { pauses: visiting || ended, ..Bounds::default() };
                Stay::GoesOn
            }
            _ => Stay::GoesOn,
        };
        match stay {
            Stay::GoesOn | Stay::Ends => Ok(true),
            Stay::TooLong => {
                self.deny(tag, TenantSwitchError::Over);
                self.bounds.denied = !whole;
                Ok(false)
            }
        }
    }

    fn stay(&self, sql: &[u8]) -> Stay {
        Stay::read(sql, self.server.lexing(), self.rules.stance)
    }

    fn stay_of_bound(&self, mut body: &[u8]) -> Result<Stay, ClientError> {
        cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        let bound = match name {
            b"" => self.statements.unnamed_body(),
            _ => self.statements.get(name).map(|statement| statement.body()),
        };
        let sql = bound.and_then(|mut body| cstr(&mut body).ok());
        Ok(sql.map_or(Stay::GoesOn, |sql| self.stay(sql)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stay_ends_with_its_transaction_and_lets_nothing_run_behind_it() {
        let visiting = |sql: &str| Stay::read(sql.as_bytes(), Lexing::default(), Stance::Visiting);
        let away = |sql: &str| Stay::read(sql.as_bytes(), Lexing::default(), Stance::Away);
        for (sql, stay) in [
            ("SELECT 1", Stay::GoesOn),
            ("SAVEPOINT a; ROLLBACK TO a; RELEASE a", Stay::GoesOn),
            ("INSERT INTO t VALUES (1); COMMIT", Stay::Ends),
            ("ROLLBACK", Stay::Ends),
            ("PREPARE TRANSACTION 'x'", Stay::Ends),
            ("COMMIT; SELECT 1", Stay::TooLong),
            ("COMMIT AND CHAIN", Stay::TooLong),
            ("END; BEGIN", Stay::TooLong),
        ] {
            assert_eq!(visiting(sql), stay, "{sql}");
        }
        for (sql, stay) in [
            ("COMMIT; SELECT 1", Stay::GoesOn),
            ("DISCARD ALL", Stay::Ends),
            ("RESET ALL; UNLISTEN *; CLOSE ALL", Stay::Ends),
            ("RESET ALL; SELECT 1", Stay::TooLong),
        ] {
            assert_eq!(away(sql), stay, "{sql}");
        }
    }
}
