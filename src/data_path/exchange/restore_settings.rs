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
    setters: [bool; 3],
    queries: [RepeatedQuery; 2],
}

/// A query that the proxy sends often. It is prepared when its text is sent twice in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeated {
    /// What a session has left behind a transaction.
    State,
    /// The settings of role and database, for a session that begins.
    Start,
}

impl Repeated {
    const ALL: [Self; 2] = [Self::State, Self::Start];

    /// Its name on servers.
    fn name(self) -> &'static [u8] {
        match self {
            Self::State => b"pglobby_ask",
            Self::Start => b"pglobby_start",
        }
    }
}

/// What a server has of a repeated query.
#[derive(Debug, Default)]
struct RepeatedQuery {
    /// The text that was sent last.
    text: Box<str>,
    state: QueryState,
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

/// Resets a parameter. A custom one is known then, without a value.
const RESET: Setter = (2, b"pglobby_reset", b"SELECT pg_catalog.set_config($1, nullif($2, ''), false)");

const SETTERS: [Setter; 3] = [PARAMETER, ROLE, RESET];

/// Whether the value names an object of the database or the host, which may be dropped.
pub fn is_of_object(name: &str) -> bool {
    const OBJECTS: [&str; 4] = [
        "default_table_access_method",
        "default_tablespace",
        "default_text_search_config",
        "temp_tablespaces",
    ];
    OBJECTS.contains(&name) || name.starts_with("lc_")
}

/// Appends the messages that change a server's settings from `applied` to `wanted`. Returns `true` if they
/// include a simple query, which removes the server's unnamed statement.
///
/// PostgreSQL keeps a setting whose object is dropped (`default_text_search_config`). No server takes it any
/// more: the session loses it, and goes on.
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
    let ordered =
        Place::ALL.into_iter().flat_map(|place| missing().filter(move |(name, _)| Place::of(name) == place));
    let mut is_open = false;
    for (name, value) in ordered {
        let place = Place::of(name);
        if place == Place::Alone && is_open {
            replies.end_own_batch(out);
        }
        let setter = if place == Place::Role { ROLE } else { PARAMETER };
        if is_of_object(name) && from.get(name).is_some() {
            // If this session's value is refused, the last session's must not stay.
            ours.set(RESET, Place::Alone, name, "", replies, out);
            replies.end_own_batch(out);
        }
        ours.set(setter, place, name, value, replies, out);
        is_open = place != Place::Alone;
        if !is_open {
            replies.end_own_batch(out);
        }
    }
    if is_open {
        replies.end_own_batch(out);
    }
    queried
}

/// Makes custom parameters known to a server: they read `''` there, as on the server where the session had
/// them, and no longer NULL.
#[cold]
pub fn make_known(
    names: &[Box<str>],
    ours: &mut ProxyStatements,
    replies: &mut ReplyTracker,
    out: &mut Vec<u8>,
) {
    for name in names {
        ours.set(RESET, Place::Alone, name, "", replies, out);
        replies.end_own_batch(out);
    }
}

/// When a parameter is set, and in which batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// First, because the other values are in this encoding.
    Encoding,
    /// In one batch: no server refuses a value that another one has accepted.
    Together,
    /// In a batch of its own, so that an error loses this setting alone: what it names may be gone.
    Alone,
    /// Last, because the role may have fewer rights than the login.
    Role,
}

impl Place {
    const ALL: [Self; 4] = [Self::Encoding, Self::Together, Self::Alone, Self::Role];

    fn of(name: &str) -> Self {
        match name {
            "client_encoding" => Self::Encoding,
            "role" => Self::Role,
            _ if NEVER_REFUSED.binary_search(&name).is_ok() => Self::Together,
            _ => Self::Alone,
        }
    }
}

/// Parameters whose values depend on nothing but the server's version; sorted. The usual ones: others are set
/// as safely, in one more batch each.
#[rustfmt::skip]
const NEVER_REFUSED: [&str; 36] = [
    "application_name", "array_nulls", "bytea_output", "check_function_bodies", "client_min_messages",
    "datestyle", "default_statistics_target", "default_transaction_deferrable",
    "default_transaction_isolation", "default_transaction_read_only", "enable_bitmapscan", "enable_hashjoin",
    "enable_indexscan", "enable_mergejoin", "enable_nestloop", "enable_seqscan", "extra_float_digits",
    "from_collapse_limit", "idle_in_transaction_session_timeout", "idle_session_timeout", "intervalstyle",
    "jit", "join_collapse_limit", "lock_timeout", "maintenance_work_mem", "plan_cache_mode",
    "quote_all_identifiers", "random_page_cost", "row_security", "search_path",
    "standard_conforming_strings", "statement_timeout", "synchronous_commit", "timezone", "work_mem",
    "xmloption",
];

impl ProxyStatements {
    /// The names of the statements that the server has.
    pub fn names(&self) -> impl Iterator<Item = &'static [u8]> {
        let setters = SETTERS.into_iter().zip(self.setters).filter(|(_, is_prepared)| *is_prepared);
        let queries = Repeated::ALL.into_iter().zip(&self.queries);
        let queries = queries.filter(|(_, query)| query.state == QueryState::Prepared);
        setters.map(|((_, name, _), _)| name).chain(queries.map(|(which, _)| which.name()))
    }

    /// The server no longer has the statements with these names.
    pub fn remove(&mut self, names: &[&[u8]]) {
        for ((_, name, _), is_prepared) in SETTERS.into_iter().zip(&mut self.setters) {
            *is_prepared &= !names.contains(&name);
        }
        for (which, query) in Repeated::ALL.into_iter().zip(&mut self.queries) {
            if names.contains(&which.name()) {
                query.state = QueryState::Absent;
            }
        }
    }

    /// Appends the Parse of a repeated query unless it is prepared. Returns the name to bind.
    pub fn parse_repeated(&mut self, which: Repeated, sql: &str, out: &mut Vec<u8>) -> &'static [u8] {
        let query = &mut self.queries[which as usize];
        let again = *query.text == *sql;
        if again && query.state == QueryState::Prepared {
            return which.name();
        }
        if query.state != QueryState::Absent {
            close_statement(which.name(), out);
        }
        let name = if again { which.name() } else { b"" };
        query.state = if again { QueryState::Prepared } else { QueryState::Absent };
        query.text = sql.into();
        parse(name, sql.as_bytes(), out);
        name
    }

    /// A repeated query failed, perhaps because code has deallocated it.
    pub fn repeated_failed(&mut self, which: Repeated) {
        let query = &mut self.queries[which as usize];
        if query.state == QueryState::Prepared {
            query.state = QueryState::Unknown;
        }
    }

    fn set(
        &mut self,
        (at, statement, text): Setter,
        place: Place,
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
        let (origin, request) = match place {
            Place::Alone => (Origin::Restore, Request::RestoreSetting(name.into())),
            _ => (Origin::Proxy, Request::Execute(None)),
        };
        bind(statement, &[name, value], out);
        let _ = replies.track(Request::Bind, origin);
        execute(out);
        let _ = replies.track(request, origin);
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
        for (which, query) in Repeated::ALL.into_iter().zip(&mut self.queries) {
            if query.state != QueryState::Absent && replies.track(Request::Close(None), Origin::Proxy) {
                query.state = QueryState::Absent;
                close_statement(which.name(), out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_prepared_when_it_is_sent_twice_in_a_row_whatever_is_sent_between() {
        let mut ours = ProxyStatements::default();
        let mut names = |which, sql| ours.parse_repeated(which, sql, &mut Vec::new());
        assert_eq!(names(Repeated::Start, "SELECT 1"), b"");
        assert_eq!(names(Repeated::State, "SELECT 2"), b"");
        assert_eq!(names(Repeated::Start, "SELECT 1"), b"pglobby_start");
        assert_eq!(names(Repeated::State, "SELECT 3"), b"");
        assert_eq!(names(Repeated::Start, "SELECT 1"), b"pglobby_start");
        assert_eq!(names(Repeated::State, "SELECT 3"), b"pglobby_ask");
        assert_eq!(ours.names().collect::<Vec<_>>(), [&b"pglobby_ask"[..], b"pglobby_start"]);
        ours.remove(&[b"pglobby_start"]);
        assert_eq!(ours.names().collect::<Vec<_>>(), [b"pglobby_ask"]);
        let mut out = Vec::new();
        assert_eq!(ours.parse_repeated(Repeated::Start, "SELECT 1", &mut out), b"pglobby_start");
        assert!(out.starts_with(b"P"), "it is prepared again");
    }

    #[test]
    fn the_role_comes_last_and_what_may_be_refused_alone() {
        assert!(NEVER_REFUSED.is_sorted());
        let names = ["role", "default_tablespace", "my.note", "search_path", "client_encoding", "timezone"];
        let wanted = Arc::new(Settings::new(names.map(|name| (name.to_owned(), "x".to_owned()))));
        let (mut ours, mut replies, mut out) =
            (ProxyStatements::default(), ReplyTracker::default(), Vec::new());
        assert!(!restore_settings(&Arc::default(), &wanted, &mut ours, &mut replies, &mut out));
        let mut order = String::new();
        for message in crate::data_path::session_state::channels::messages(&out) {
            let bound = message.split(|byte| *byte == 0);
            let name =
                names.into_iter().find(|name| bound.clone().any(|part| part.ends_with(name.as_bytes())));
            match message[0] {
                b'S' => order.push('|'),
                b'B' => order.extend([name.unwrap_or("?"), " "]),
                _ => {}
            }
        }
        let expected = "client_encoding search_path timezone |default_tablespace |my.note |role |";
        assert_eq!(order, expected);
    }
}
