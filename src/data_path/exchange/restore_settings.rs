//! What makes a server look as its next client has left the last one: its settings, in front of its next request and in the same
//! write. Pure.
//!
//! Values reach a server only as bound parameters, never by quoting.

use std::sync::Arc;

use super::pending_replies::{Asked, Lease, Whose};
use crate::{
    data_path::session_state::Settings,
    wire::message::{append, append_cstr, bind, close_statement, execute, parse},
};

/// Our own statements that a server has prepared.
#[derive(Debug, Default)]
pub struct OurStatements {
    setters: [bool; 2],
    /// What it was asked last, and whether it keeps that prepared.
    question: Box<str>,
    kept: Kept,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Kept {
    #[default]
    Not,
    Prepared,
    /// It may be there or not.
    Doubtful,
}

/// A statement that sets something: its place among ours, its name on servers, and its text.
type Setter = (usize, &'static [u8], &'static [u8]);

/// Sets a parameter.
const PARAMETER: Setter = (0, b"pglobby_set", b"SELECT pg_catalog.set_config($1, $2, false)");

/// Sets the role. What comes behind it runs with the login's own rights if that fails, and is on its way: so a server that would
/// refuse it ends before it reads on.
const ROLE: Setter = (
    1,
    b"pglobby_role",
    b"SELECT CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = $2::text \
      AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER')) THEN pg_catalog.set_config($1, $2, false) \
      ELSE pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())::text END",
);

const SETTERS: [Setter; 2] = [PARAMETER, ROLE];

/// What a server calls the question that it is asked again and again.
const QUESTION: &[u8] = b"pglobby_ask";

/// Appends what turns a server with `applied` into one with `wanted`; in the same write as the client's next request.
/// `true` if a simple query is among it, which ends the server's unnamed statement.
#[must_use = "the server's unnamed statement may be gone"]
pub fn prelude(
    applied: &Arc<Settings>,
    wanted: &Arc<Settings>,
    ours: &mut OurStatements,
    lease: &mut Lease,
    out: &mut Vec<u8>,
) -> bool {
    if Arc::ptr_eq(applied, wanted) || applied == wanted {
        return false;
    }
    let mut queried = false;
    let none = Settings::default();
    let mut from: &Settings = applied;
    if applied.iter().any(|(name, _)| wanted.get(name).is_none()) {
        // Neither role nor session authorisation is touched by RESET ALL.
        append(out, b'Q', |out| append_cstr(out, b"RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL"));
        let _ = lease.ask(Asked::Query(None), Whose::Ours);
        queried = true;
        from = &none;
    }
    let missing = || wanted.iter().filter(|(name, value)| from.get(name) != Some(value));
    // The encoding is that of the other values: it comes first. A role may set less than the login: it comes last.
    let place = |name: &str| match name {
        "client_encoding" => 0,
        "role" => 2,
        _ => 1,
    };
    let ordered = (0..3).flat_map(|at| missing().filter(move |(name, _)| place(name) == at));
    let mut any = false;
    for (name, value) in ordered {
        any = true;
        ours.set(if name == "role" { ROLE } else { PARAMETER }, name, value, lease, out);
    }
    if any {
        append(out, b'S', |_| {});
        let _ = lease.ask(Asked::Sync, Whose::Ours);
    }
    queried
}

impl OurStatements {
    /// The names of those that the server has.
    pub fn names(&self) -> impl Iterator<Item = &'static [u8]> {
        let setters = SETTERS.into_iter().zip(self.setters).filter(|(_, known)| *known);
        let question = (self.kept == Kept::Prepared).then_some(QUESTION);
        setters.map(|((_, name, _), _)| name).chain(question)
    }

    /// The server has those with these names no longer.
    pub fn lost(&mut self, names: &[&[u8]]) {
        for ((_, name, _), known) in SETTERS.into_iter().zip(&mut self.setters) {
            *known &= !names.contains(&name);
        }
        if names.contains(&QUESTION) {
            self.kept = Kept::Not;
        }
    }

    /// Appends the Parse of a question, if it must be parsed; by which name it is bound. One that is asked twice in a row is
    /// kept.
    pub fn parse_question(&mut self, sql: &str, out: &mut Vec<u8>) -> &'static [u8] {
        let again = *self.question == *sql;
        if again && self.kept == Kept::Prepared {
            return QUESTION;
        }
        if self.kept != Kept::Not {
            close_statement(QUESTION, out);
        }
        let name = if again { QUESTION } else { b"" };
        self.kept = if again { Kept::Prepared } else { Kept::Not };
        self.question = sql.into();
        parse(name, sql.as_bytes(), out);
        name
    }

    /// The question was refused; perhaps because code has taken it away.
    pub fn question_refused(&mut self) {
        if self.kept == Kept::Prepared {
            self.kept = Kept::Doubtful;
        }
    }

    fn set(
        &mut self,
        (at, statement, text): Setter,
        name: &str,
        value: &str,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) {
        if let Some(known) = self.setters.get_mut(at)
            && !std::mem::replace(known, true)
        {
            parse(statement, text, out);
            let _ = lease.ask(Asked::ParseAsIs, Whose::Ours);
        }
        bind(statement, &[name, value], out);
        let _ = lease.ask(Asked::Bind, Whose::Ours);
        execute(out);
        let _ = lease.ask(Asked::Execute(None), Whose::Ours);
    }

    /// Takes them from a server on which a session is about to look at what is prepared.
    pub fn hide(&mut self, lease: &mut Lease, out: &mut Vec<u8>) {
        for (at, statement, _) in SETTERS {
            if let Some(known) = self.setters.get_mut(at)
                && *known
                && lease.ask(Asked::Close(None), Whose::Ours)
            {
                *known = false;
                close_statement(statement, out);
            }
        }
        if self.kept != Kept::Not && lease.ask(Asked::Close(None), Whose::Ours) {
            self.kept = Kept::Not;
            close_statement(QUESTION, out);
        }
    }
}
