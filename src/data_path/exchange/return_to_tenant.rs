//! Finds where a session returns to the tenant that it began with.
//!
//! A transaction with a tenant of its own returns at its end, and a reset of the pool's session returns from
//! a chosen tenant. Statements after that point are meant for the other tenant, even in the same write, batch
//! or text. The proxy must not run them here.

use super::{client_messages::ClientMessages, client_side::violation};
use crate::{
    data_path::sql::{self, Discard, Kind, Lexing},
    error::{ClientError, TenantSwitchError},
    wire::frame::{HEADER_BYTES, cstr},
};

/// How a session came to its present tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CurrentTenant {
    /// It began there.
    #[default]
    First,
    /// It chose it; a reset returns to the first one.
    Chosen,
    /// It chose it for one transaction.
    ForTransaction,
}

/// Whether a text returns the session to its first tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnPoint {
    /// It does not.
    None,
    /// At its end.
    AtEnd,
    /// Before its end: its last statements would still run here. Or it is AND CHAIN.
    Within,
}

impl ReturnPoint {
    /// Reads a text.
    pub fn read(sql: &[u8], lexing: Lexing, current_tenant: CurrentTenant) -> Self {
        let for_transaction = current_tenant == CurrentTenant::ForTransaction;
        let mut ended = false;
        for statement in sql::statements(sql, lexing) {
            let ends = match statement.kind {
                Kind::Commit { chain: true } | Kind::Rollback { chain: true } if for_transaction => {
                    return Self::Within;
                }
                Kind::Commit { .. } | Kind::Rollback { .. } | Kind::PrepareTransaction => for_transaction,
                Kind::ResetAll | Kind::Discard(Discard::All) => current_tenant != CurrentTenant::First,
                Kind::Discard(_) | Kind::Unlisten(None) | Kind::CloseCursor(None) => continue,
                _ if ended => return Self::Within,
                _ => continue,
            };
            ended |= ends;
        }
        if ended { Self::AtEnd } else { Self::None }
    }
}

/// What the messages so far mean for the next ones.
#[derive(Debug, Default)]
pub(super) struct ReturnState {
    /// This batch returns the session: the rest of it must not run. A query or function call ends the batch.
    ended: bool,
    /// Bytes after this message wait for its reply.
    pub pauses: bool,
    /// A message that was not whole has been rejected: the rest of it is skipped.
    pub rejected: bool,
}

impl ClientMessages<'_, '_> {
    /// Checks a message of a session that is not with its first tenant. `false`: it has been rejected.
    #[cold]
    pub(super) fn may_run(&mut self, tag: u8, bytes: &[u8], whole: bool) -> Result<bool, ClientError> {
        let for_transaction = self.rules.current_tenant == CurrentTenant::ForTransaction;
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let ended = self.return_state.ended;
        let return_point = match tag {
            b'Q' => {
                let sql = if whole { cstr(&mut { body }).unwrap_or_default() } else { b"" };
                let return_point = if ended { ReturnPoint::Within } else { self.return_point_of(sql) };
                *self.return_state = ReturnState {
                    pauses: for_transaction || return_point != ReturnPoint::None,
                    ..ReturnState::default()
                };
                return_point
            }
            b'B' => {
                let return_point =
                    if ended { ReturnPoint::Within } else { self.return_point_of_bound(body)? };
                self.return_state.ended |= return_point == ReturnPoint::AtEnd;
                return_point
            }
            b'F' | b'S' => {
                let pauses = for_transaction || ended;
                *self.return_state = ReturnState { pauses, ..ReturnState::default() };
                if ended && tag == b'F' { ReturnPoint::Within } else { ReturnPoint::None }
            }
            _ => ReturnPoint::None,
        };
        match return_point {
            ReturnPoint::None | ReturnPoint::AtEnd => Ok(true),
            ReturnPoint::Within => {
                self.reject(tag, TenantSwitchError::Over);
                self.return_state.rejected = !whole;
                Ok(false)
            }
        }
    }

    fn return_point_of(&self, sql: &[u8]) -> ReturnPoint {
        ReturnPoint::read(sql, self.server.lexing(), self.rules.current_tenant)
    }

    fn return_point_of_bound(&self, mut body: &[u8]) -> Result<ReturnPoint, ClientError> {
        cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        Ok(self.statements.text(name).map_or(ReturnPoint::None, |sql| self.return_point_of(&sql)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transactions_tenant_ends_with_it_and_nothing_runs_after() {
        let for_transaction =
            |sql: &str| ReturnPoint::read(sql.as_bytes(), Lexing::default(), CurrentTenant::ForTransaction);
        let chosen = |sql: &str| ReturnPoint::read(sql.as_bytes(), Lexing::default(), CurrentTenant::Chosen);
        for (sql, return_point) in [
            ("SELECT 1", ReturnPoint::None),
            ("SAVEPOINT a; ROLLBACK TO a; RELEASE a", ReturnPoint::None),
            ("INSERT INTO t VALUES (1); COMMIT", ReturnPoint::AtEnd),
            ("ROLLBACK", ReturnPoint::AtEnd),
            ("PREPARE TRANSACTION 'x'", ReturnPoint::AtEnd),
            ("COMMIT; SELECT 1", ReturnPoint::Within),
            ("COMMIT AND CHAIN", ReturnPoint::Within),
            ("END; BEGIN", ReturnPoint::Within),
        ] {
            assert_eq!(for_transaction(sql), return_point, "{sql}");
        }
        for (sql, return_point) in [
            ("COMMIT; SELECT 1", ReturnPoint::None),
            ("DISCARD ALL", ReturnPoint::AtEnd),
            ("RESET ALL; UNLISTEN *; CLOSE ALL", ReturnPoint::AtEnd),
            ("RESET ALL; SELECT 1", ReturnPoint::Within),
        ] {
            assert_eq!(chosen(sql), return_point, "{sql}");
        }
    }
}
