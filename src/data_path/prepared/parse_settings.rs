//! Under which settings PostgreSQL has parsed a text. Pure.
//!
//! It reads literals and finds tables, operators and functions when it parses, so the same text is another statement under
//! another `TimeZone` or `search_path`. Two sessions share a statement on a server only while both have the settings under
//! which it was parsed: PostgreSQL parses anew when a table or `search_path` changes, and goes by the settings of that
//! moment. A statement that its session uses under other settings is the session's own from then on. Where a server has to
//! parse a statement for a session that has other settings by now, those of the first time are put in place for that
//! moment, and what was there before is put back, all in the same write (`ENTER`, `LEAVE`).

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    data_path::{
        exchange::pending_replies::{Asked, Lease, Pins, Whose},
        session_state::{Settings, UNASKABLE, Uncertain, array_literal},
    },
    wire::message::{append, append_cstr, bind_portal, close_statement, parse},
};

/// Parameters that what a text means never depends on; sorted. Any other may matter, an extension's too, and what its
/// output looks like: PostgreSQL works out what is constant when it plans.
const HARMLESS: [&str; 81] = [
    "application_name",
    "auto_explain.log_analyze",
    "auto_explain.log_min_duration",
    "backend_flush_after",
    "client_connection_check_interval",
    "client_min_messages",
    "commit_delay",
    "commit_siblings",
    "cpu_index_tuple_cost",
    "cpu_operator_cost",
    "cpu_tuple_cost",
    "cursor_tuple_fraction",
    "deadlock_timeout",
    "debug_pretty_print",
    "debug_print_parse",
    "debug_print_plan",
    "debug_print_rewritten",
    "default_statistics_target",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "effective_cache_size",
    "effective_io_concurrency",
    "enable_async_append",
    "enable_bitmapscan",
    "enable_gathermerge",
    "enable_hashagg",
    "enable_hashjoin",
    "enable_incremental_sort",
    "enable_indexonlyscan",
    "enable_indexscan",
    "enable_material",
    "enable_memoize",
    "enable_mergejoin",
    "enable_nestloop",
    "enable_parallel_append",
    "enable_parallel_hash",
    "enable_partition_pruning",
    "enable_partitionwise_aggregate",
    "enable_partitionwise_join",
    "enable_seqscan",
    "enable_sort",
    "enable_tidscan",
    "from_collapse_limit",
    "geqo",
    "geqo_effort",
    "geqo_threshold",
    "gin_fuzzy_search_limit",
    "hash_mem_multiplier",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "jit",
    "jit_above_cost",
    "jit_inline_above_cost",
    "jit_optimize_above_cost",
    "join_collapse_limit",
    "lock_timeout",
    "log_duration",
    "log_lock_waits",
    "log_min_duration_statement",
    "log_min_error_statement",
    "log_min_messages",
    "log_statement",
    "log_temp_files",
    "logical_decoding_work_mem",
    "maintenance_work_mem",
    "max_parallel_maintenance_workers",
    "max_parallel_workers",
    "max_parallel_workers_per_gather",
    "min_parallel_index_scan_size",
    "min_parallel_table_scan_size",
    "parallel_leader_participation",
    "parallel_setup_cost",
    "parallel_tuple_cost",
    "random_page_cost",
    "seq_page_cost",
    "statement_timeout",
    "synchronous_commit",
    "temp_buffers",
    "transaction_timeout",
    "work_mem",
];

/// Whether what a text means may depend on a parameter, by its name in lower case.
pub fn matters(name: &str) -> bool {
    let ends = UNASKABLE.contains(&name) && name != "session_authorization";
    HARMLESS.binary_search(&name).is_err() && !ends && !name.starts_with("pglobby.")
}

/// Settings under which a text was parsed.
#[derive(Debug, Default)]
pub struct ParseSettings {
    /// Unique over the process.
    pub id: u64,
    /// Those that matter; empty while nobody has said what they were.
    known: OnceLock<Settings>,
}

static LAST_ID: AtomicU64 = AtomicU64::new(0);

impl ParseSettings {
    fn new(known: OnceLock<Settings>) -> Arc<Self> {
        Arc::new(Self { id: LAST_ID.fetch_add(1, Ordering::Relaxed) + 1, known })
    }

    /// Those of a moment, which the server is yet to tell.
    pub fn unknown() -> Arc<Self> {
        Self::new(OnceLock::new())
    }

    /// They were these.
    pub fn are(&self, settings: &Settings) {
        let _ = self.known.set(settings.only(matters));
    }

    /// What they were, if that is known.
    pub fn known(&self) -> Option<&Settings> {
        self.known.get()
    }
}

/// Those that sessions have now, each once, so that comparing two costs no more than comparing where they are. Weak, and found
/// by a digest: what no session has any more takes no memory.
#[derive(Debug, Default)]
pub struct ParseSettingsTable(Mutex<HashMap<u64, Vec<Weak<ParseSettings>>>>, RandomState);

impl ParseSettingsTable {
    /// Those of a session with these settings.
    pub fn of(&self, settings: &Settings) -> Arc<ParseSettings> {
        let settings = settings.only(matters);
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() == table.capacity() {
            table.retain(|_, known| known.iter().any(|known| known.strong_count() > 0));
        }
        let same = table.entry(self.1.hash_one(&settings)).or_default();
        same.retain(|known| known.strong_count() > 0);
        let mut known = same.iter().filter_map(Weak::upgrade);
        if let Some(known) = known.find(|known| known.known() == Some(&settings)) {
            return known;
        }
        let new = ParseSettings::new(settings.into());
        same.push(Arc::downgrade(&new));
        new
    }
}

/// Where a text is to be parsed: a session's settings on its server at this moment.
#[derive(Debug, Clone, Copy)]
pub struct Here<'a> {
    /// `None`: something may have changed them that has not been asked about.
    pub under: Option<&'a Arc<ParseSettings>>,
    /// What the session began with, which its servers may no longer begin with: it holds for what was parsed before that, too.
    pub startup: &'a Settings,
    /// What the server had when the transaction began.
    pub applied: &'a Settings,
    /// What may have changed since.
    pub uncertain: &'a Uncertain,
}

impl<'a> Here<'a> {
    /// `under` are the session's as they were when the transaction began.
    #[inline]
    pub fn new(
        under: &'a Arc<ParseSettings>,
        startup: &'a Settings,
        applied: &'a Settings,
        uncertain: &'a Uncertain,
        lease: &Lease,
    ) -> Self {
        Self { under: Self::under(under, uncertain, lease), startup, applied, uncertain }
    }

    /// `under`, unless something may have changed that has not been asked about.
    #[inline]
    pub fn under<'s>(
        under: &'s Arc<ParseSettings>,
        uncertain: &Uncertain,
        lease: &Lease,
    ) -> Option<&'s Arc<ParseSettings>> {
        let known = !uncertain.changes_parsing() && !lease.pins.contains(Pins::SETTINGS);
        known.then_some(under)
    }

    /// Whether a text that was parsed under those is the same statement here.
    #[inline]
    pub fn is(&self, those: &Arc<ParseSettings>) -> bool {
        self.under.is_some_and(|under| Arc::ptr_eq(under, those))
    }

    /// What must be put in place to parse as under `those`; `None` where nothing need be, or can be, or nobody knows.
    fn differs(&self, those: &Arc<ParseSettings>, lease: &Lease) -> Option<Settings> {
        let can = lease.status() != b'E' && !lease.takes_copy_data() && !lease.is_skipping();
        if self.is(those) || !can {
            return None;
        }
        let mut settings = those.known()?.clone();
        for (name, value) in self.startup.iter().filter(|(name, _)| matters(name)) {
            if settings.get(name).is_none() {
                settings.set(name, Some(value));
            }
        }
        Some(settings)
    }

    /// Parameters that PostgreSQL does not list and that may be set.
    fn unlisted(&self) -> impl Iterator<Item = &str> {
        let applied = self.applied.iter().map(|(name, _)| name);
        ["role"].into_iter().chain(applied.chain(self.uncertain.named()).filter(|name| name.contains('.')))
    }

    /// Runs `parses`, which sends what is to be parsed, as under `those` settings if they `matter` to it; its own result.
    pub fn parse_under(
        &self,
        those: &Arc<ParseSettings>,
        matter: bool,
        whose: Whose,
        lease: &mut Lease,
        out: &mut Vec<u8>,
        parses: impl FnOnce(&mut Lease, &mut Vec<u8>) -> bool,
    ) -> bool {
        let Some(settings) = self.differs(those, lease).filter(|_| matter) else { return parses(lease, out) };
        let set = || settings.iter().filter(|(name, _)| *name != "session_authorization");
        let names = array_literal(set().map(|(name, _)| name));
        let values = array_literal(set().map(|(_, value)| value));
        let others = array_literal(self.unlisted().filter(|name| settings.get(name).is_none()));
        let listed = array_literal(HARMLESS.into_iter().chain(UNASKABLE));
        once(ENTER, &[&names, &values, &others, &listed], Asked::Execute(None), whose, lease, out);
        let goes = parses(lease, out);
        once(LEAVE, &[], Asked::Execute(None), whose, lease, out);
        goes
    }

    /// Those under which a text is parsed that goes to the server next, where that must be asked: in front of it.
    pub fn ask(&self, whose: Whose, lease: &mut Lease, out: &mut Vec<u8>) -> Arc<ParseSettings> {
        let those = ParseSettings::unknown();
        if lease.status() != b'E' {
            let unlisted = array_literal(self.unlisted());
            once(TELL, &[&unlisted], Asked::Settings(those.clone()), whose, lease, out);
        }
        those
    }
}

/// The settings now, and the value of each.
const TELL: &[u8] =
    b"SELECT pg_catalog.lower(name), pg_catalog.current_setting(name) FROM pg_catalog.pg_settings \
      WHERE source = 'session' \
      UNION ALL SELECT n, pg_catalog.current_setting(n, true) FROM pg_catalog.unnest($1::text[]) AS n \
      WHERE pg_catalog.current_setting(n, true) <> ''";

/// Sets $1 to $2 and all else that is set, $3 of it unlisted and but for $4, to what it is in a new session; until LEAVE, or the
/// end of the transaction. What there was before is kept in a parameter. A role may set less than the login: it comes last.
const ENTER: &[u8] = b"WITH target (name, value) AS MATERIALIZED ( \
        SELECT n, v FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS given (n, v) \
        UNION ALL SELECT pg_catalog.lower(name), reset_val FROM pg_catalog.pg_settings \
          WHERE source = 'session' AND pg_catalog.lower(name) <> ALL ($1::text[] || $4::text[]) \
        UNION ALL SELECT n, CASE n WHEN 'role' THEN 'none' ELSE '' END FROM pg_catalog.unnest($3::text[]) AS n \
          WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) = n) \
      ), changed AS MATERIALIZED ( \
        SELECT name, value, coalesce(pg_catalog.current_setting(name, true), '') AS before FROM target \
          WHERE coalesce(pg_catalog.current_setting(name, true), '') IS DISTINCT FROM value \
          AND (name <> 'role' OR value = 'none' OR EXISTS (SELECT FROM pg_catalog.pg_roles \
            WHERE rolname = value AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER'))) \
      ), kept AS MATERIALIZED ( \
        SELECT pg_catalog.set_config('pglobby.kept', \
          coalesce(pg_catalog.json_object_agg(name, before)::text, '{}'), true) FROM changed \
      ) SELECT CASE WHEN name IS NOT NULL THEN pg_catalog.set_config(name, value, true) END \
        FROM (SELECT name, value FROM kept LEFT JOIN changed ON true ORDER BY name = 'role') AS ordered";

/// Puts back what ENTER has kept.
const LEAVE: &[u8] = b"SELECT pg_catalog.set_config(key, value, true) FROM ( \
        SELECT key, value FROM pg_catalog.json_each_text(pg_catalog.current_setting('pglobby.kept')::json) \
        ORDER BY key = 'role') AS ordered";

/// What servers call the statement and the portal of such a text. It is not kept: what is in front of it may fail, and nobody
/// knows then whether it is there.
const ONCE: &[u8] = b"pglobby_once";

/// Runs a text of ours once, in the middle of whatever the client has begun: its own unnamed statement and portal stay.
pub fn once(
    sql: &[u8],
    parameters: &[&str],
    asked: Asked,
    whose: Whose,
    lease: &mut Lease,
    out: &mut Vec<u8>,
) {
    if !lease.ask(Asked::Close(None), whose) {
        return;
    }
    for asked in [Asked::ParseAsIs, Asked::Bind, asked, Asked::Close(None), Asked::Close(None)] {
        let _ = lease.ask(asked, whose);
    }
    close_statement(ONCE, out);
    parse(ONCE, sql, out);
    bind_portal(ONCE, ONCE, parameters, out);
    append(out, b'E', |out| {
        append_cstr(out, ONCE);
        out.extend_from_slice(&[0; 4]);
    });
    append(out, b'C', |out| {
        out.push(b'P');
        append_cstr(out, ONCE);
    });
    close_statement(ONCE, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(values: &[(&str, &str)]) -> Settings {
        Settings::new(values.iter().map(|(name, value)| (name.to_string(), value.to_string())))
    }

    #[test]
    fn what_is_not_known_to_be_harmless_matters() {
        assert!(HARMLESS.is_sorted());
        for name in ["timezone", "search_path", "role", "my.note", "bytea_output", "session_authorization"] {
            assert!(matters(name), "{name}");
        }
        for name in ["application_name", "work_mem", "transaction_deferrable", "pglobby.tenant"] {
            assert!(!matters(name), "{name}");
        }
    }

    #[test]
    fn sessions_that_agree_on_what_matters_have_the_same() {
        let table = ParseSettingsTable::default();
        let one = table.of(&settings(&[("application_name", "one"), ("TimeZone", "UTC")]));
        let other = table.of(&settings(&[("application_name", "other"), ("TimeZone", "UTC")]));
        assert!(Arc::ptr_eq(&one, &other));
        assert!(!Arc::ptr_eq(&one, &table.of(&settings(&[("TimeZone", "Asia/Tokyo")]))));
        assert!(!Arc::ptr_eq(&one, &table.of(&Settings::default())));
    }

    #[test]
    fn settings_that_no_session_has_are_forgotten() {
        let table = ParseSettingsTable::default();
        for number in 0..1000 {
            table.of(&settings(&[("my.note", &number.to_string())]));
        }
        assert!(table.0.lock().unwrap().len() < 20);
    }
}
