//! State checks: what may remain in a session after a transaction, and the queries that find out. Pure.

use super::{pins::Pins, server_role::HiddenCatalogs};

bitflags::bitflags! {
    /// State to check on the server after a transaction.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct StateChecks: u32 {
        /// Parameters with known names.
        const NAMED_SETTINGS = 1;
        /// Any parameter.
        const ANY_SETTING = 1 << 1;
        /// Temporary objects.
        const TEMPORARY = 1 << 2;
        /// Session-level advisory locks.
        const LOCKS = 1 << 3;
        /// Cursors WITH HOLD.
        const CURSORS = 1 << 4;
        /// LISTEN, UNLISTEN.
        const LISTEN = 1 << 5;
        /// SQL-level PREPARE, DEALLOCATE.
        const PREPARED = 1 << 6;
        /// Everything above.
        const EVERYTHING = 0x7f;
        /// Functions changed: load them again (see `functions/`).
        const FUNCTIONS = 1 << 7;
        /// Callers of functions (triggers, views) changed: load again if any function has side effects.
        const CALLERS = 1 << 10;
        /// Compare the functions with the loaded ones, without a known change.
        const COMPARE_FUNCTIONS = 1 << 8;
        /// Custom parameters with unknown names, which PostgreSQL does not list. All settings of the server
        /// are reset and set again before its next use.
        const UNNAMED = 1 << 9;
        /// Settings of a role or database, which apply at session start.
        const SESSION_START = 1 << 11;
        /// Parameters that affect parsing until the transaction ends. Needs no query.
        const LOCAL_SETTINGS = 1 << 12;
        /// Whether the unnamed statement is still one that was too long to be stored.
        const UNSTORED_UNNAMED = 1 << 13;
        /// Connections of dblink. A separate query, sent only where the extension is installed.
        const DBLINK = 1 << 14;
        /// Whether named parameters are set at all: one was reset, or a statement failed.
        const SETTING_SOURCES = 1 << 15;
        /// Custom parameters, perhaps until the transaction ends only, whose names are not known. Needs no
        /// query.
        const CUSTOM_PARAMETERS = 1 << 16;
    }
}

impl StateChecks {
    /// Pins that depend on the server's answer, and the catalog that it comes from: where that is hidden, the
    /// pin holds. `$2` is the list of prepared statements known to the proxy.
    pub const PINS: [(Self, Pins, HiddenCatalogs, &'static str); 5] = [
        (
            Self::TEMPORARY,
            Pins::TEMPORARY,
            HiddenCatalogs::DEPENDENCIES,
            // pg_depend has an index for this; pg_class would be scanned completely.
            "EXISTS (SELECT FROM pg_catalog.pg_depend WHERE refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass \
             AND refobjid = pg_catalog.pg_my_temp_schema())",
        ),
        (
            Self::LOCKS,
            Pins::ADVISORY_LOCK,
            HiddenCatalogs::LOCKS,
            "EXISTS (SELECT FROM pg_catalog.pg_lock_status() WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid())",
        ),
        (
            Self::CURSORS,
            Pins::HOLD_CURSOR,
            HiddenCatalogs::CURSORS,
            "EXISTS (SELECT FROM pg_catalog.pg_cursor() WHERE is_holdable)",
        ),
        (
            Self::PREPARED,
            Pins::PREPARE,
            HiddenCatalogs::PREPARED,
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statement() \
             WHERE from_sql AND pg_catalog.left(name, 8) <> 'pglobby_' AND name <> ALL ($2::text[]))",
        ),
        (
            Self::PREPARED,
            Pins::UNSTORED,
            HiddenCatalogs::PREPARED,
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statement() \
             WHERE NOT from_sql AND pg_catalog.left(name, 8) <> 'pglobby_')",
        ),
    ];
}
