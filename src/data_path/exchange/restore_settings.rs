//! Gives a server the settings of the session that uses it next, in the same write as the session's next
//! request. Pure.
//!
//! Values are sent as bound parameters only, never quoted into a text.

use std::sync::Arc;

use super::pending_replies::{Origin, ReplyTracker, Request};
use crate::{
    data_path::session_state::Settings,
    wire::message::{append, append_cstr, bind, close_statement, execute, parse},
};

/// The proxy's own statements that a server has prepared.
#[derive(Debug, Default)]
pub struct ProxyStatements {
    setters: [bool; 2],
    /// The text of the last state query.
    state_query: Box<str>,
    query_state: QueryState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum QueryState {
    #[default]
    Absent,
    Prepared,
    /// Unknown: the server may have it.
    Unknown,
}

/// A statement that sets a parameter: its index, its name on servers, and its text.
type Setter = (usize, &'static [u8], &'static [u8]);

/// Sets a parameter.
const PARAMETER: Setter = (0, b"pglobby_set", b"SELECT pg_catalog.set_config($1, $2, false)");

/// Sets the role. The client's request follows in the same write and must not run with the login's own
/// rights. So the server ends the session if it rejects the role: `exit_on_error` makes its error a FATAL one,
/// until the Sync. No catalog is asked, because a host may hide those that say who is a member of which role.
const ROLE: Setter = (
    1,
    b"pglobby_role",
    b"SELECT pg_catalog.set_config('exit_on_error', 'on', true), pg_catalog.set_config($1, $2, false)",
);

const SETTERS: [Setter; 2] = [PARAMETER, ROLE];

/// The name of the state query on servers. It is prepared when it is sent twice in a row.
const STATE_QUERY: &[u8] = b"pglobby_ask";

/// Appends the messages that change a server's settings from `applied` to `wanted`. Returns `true` if they
/// include a simple query, which removes the server's unnamed statement.
#[must_use = "the server's unnamed statement may be gone"]
pub fn restore_settings(
    applied: &Arc<Settings>,
    wanted: &Arc<Settings>,
    ours: &mut ProxyStatements,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) -> bool {
    if Arc::ptr_eq(applied, wanted) || applied == wanted {
        return false;
    }
    let mut queried = false;
    let none = Settings::default();
    let mut from: &Settings = applied;
    if applied.iter().any(|(name, _)| wanted.get(name).is_none()) {
        // RESET ALL resets neither the role nor the session authorization.
        append(out, b'Q', |out| append_cstr(out, b"RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL"));
        let _ = replies.track(Request::Query(None), Origin::Proxy);
        queried = true;
        from = &none;
    }
    let missing = || wanted.iter().filter(|(name, value)| from.get(name) != Some(value));
    // The encoding comes first, because the other values are in it. The role comes last, because it may have
    // fewer rights than the login.
    let place = |name: &str| match name {
        "client_encoding" => 0,
        "role" => 2,
        _ => 1,
    };
    let ordered = (0..3).flat_map(|at| missing().filter(move |(name, _)| place(name) == at));
    let mut any = false;
    for (name, value) in ordered {
        any = true;
        ours.set(if name == "role" { ROLE } else { PARAMETER }, name, value, replies, out);
    }
    if any {
        append(out, b'S', |_| {});
        let _ = replies.track(Request::Sync, Origin::Proxy);
    }
    queried
}

impl ProxyStatements {
    /// The names of the statements that the server has.
    pub fn names(&self) -> impl Iterator<Item = &'static [u8]> {
        let setters = SETTERS.into_iter().zip(self.setters).filter(|(_, is_prepared)| *is_prepared);
        let state_query = (self.query_state == QueryState::Prepared).then_some(STATE_QUERY);
        setters.map(|((_, name, _), _)| name).chain(state_query)
    }

    /// The server no longer has the statements with these names.
    pub fn remove(&mut self, names: &[&[u8]]) {
        for ((_, name, _), is_prepared) in SETTERS.into_iter().zip(&mut self.setters) {
            *is_prepared &= !names.contains(&name);
        }
        if names.contains(&STATE_QUERY) {
            self.query_state = QueryState::Absent;
        }
    }

    /// Appends the Parse of a state query unless it is prepared. Returns the name to bind.
    pub fn parse_state_query(&mut self, sql: &str, out: &mut Vec<u8>) -> &'static [u8] {
        let again = *self.state_query == *sql;
        if again && self.query_state == QueryState::Prepared {
            return STATE_QUERY;
        }
        if self.query_state != QueryState::Absent {
            close_statement(STATE_QUERY, out);
        }
        let name = if again { STATE_QUERY } else { b"" };
        self.query_state = if again { QueryState::Prepared } else { QueryState::Absent };
        self.state_query = sql.into();
        parse(name, sql.as_bytes(), out);
        name
    }

    /// The state query failed, perhaps because code has deallocated it.
    pub fn state_query_failed(&mut self) {
        if self.query_state == QueryState::Prepared {
            self.query_state = QueryState::Unknown;
        }
    }

    fn set(
        &mut self,
        (at, statement, text): Setter,
        name: &str,
        value: &str,
        replies: &mut ReplyTracker,
        out: &mut Vec<u8>,
    ) {
        if let Some(is_prepared) = self.setters.get_mut(at)
            && !std::mem::replace(is_prepared, true)
        {
            parse(statement, text, out);
            let _ = replies.track(Request::ParseAsIs, Origin::Proxy);
        }
        bind(statement, &[name, value], out);
        let _ = replies.track(Request::Bind, Origin::Proxy);
        execute(out);
        let _ = replies.track(Request::Execute(None), Origin::Proxy);
    }

    /// Closes the statements, before a session reads the list of prepared statements.
    pub fn hide(&mut self, replies: &mut ReplyTracker, out: &mut Vec<u8>) {
        for (at, statement, _) in SETTERS {
            if let Some(is_prepared) = self.setters.get_mut(at)
                && *is_prepared
                && replies.track(Request::Close(None), Origin::Proxy)
            {
                *is_prepared = false;
                close_statement(statement, out);
            }
        }
        if self.query_state != QueryState::Absent && replies.track(Request::Close(None), Origin::Proxy) {
            self.query_state = QueryState::Absent;
            close_statement(STATE_QUERY, out);
        }
    }
}
