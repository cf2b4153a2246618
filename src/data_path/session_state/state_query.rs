//! What may have been left in a session, and how its server is asked whether it has. Pure.

use super::pins::Pins;

bitflags::bitflags! {
    /// What a transaction leaves uncertain until the server is asked.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct StateChecks: u16 {
        /// Parameters whose names are known.
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
        /// Functions: they are read again (see `catalogue/`).
        const FUNCTIONS = 1 << 7;
        /// What calls functions: if some leave anything behind, it is read again as well.
        const CALLERS = 1 << 10;
        /// Whether functions are still as they were read.
        const LEARN = 1 << 8;
        /// Parameters of a kind that PostgreSQL does not list, under names that nobody knows: the server's are all set anew
        /// before its next use.
        const UNNAMED = 1 << 9;
        /// What a session begins with: settings of its role or its database.
        const SESSION_START = 1 << 11;
        /// Parameters that matter when a text is parsed, until the transaction ends. Nobody need be asked about them.
        const LOCAL_SETTINGS = 1 << 12;
        /// Whether the unnamed statement is still one that was too long to be kept.
        const UNREAD = 1 << 13;
        /// Connections of dblink. Asked apart, where the extension is.
        const DBLINK = 1 << 14;
        /// Whether the parameters that are named are set at all: one of them was reset, or something failed.
        const SOURCES = 1 << 15;
    }
}

impl StateChecks {
    /// The pins that the server's answer decides on. `$2` are the names of statements that we know of.
    pub const PINS: [(Self, Pins, &'static str); 5] = [
        (
            Self::TEMPORARY,
            Pins::TEMPORARY,
            // Whatever is in a schema depends on it: by index, where pg_class and its like would be read whole.
            "EXISTS (SELECT FROM pg_catalog.pg_depend WHERE refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass \
             AND refobjid = pg_catalog.pg_my_temp_schema())",
        ),
        (
            Self::LOCKS,
            Pins::ADVISORY_LOCK,
            "EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid())",
        ),
        (Self::CURSORS, Pins::HOLD_CURSOR, "EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable)"),
        (
            Self::PREPARED,
            Pins::PREPARE,
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements \
             WHERE from_sql AND pg_catalog.left(name, 8) <> 'pglobby_' AND name <> ALL ($2::text[]))",
        ),
        (
            Self::PREPARED,
            Pins::UNREAD,
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements \
             WHERE NOT from_sql AND pg_catalog.left(name, 8) <> 'pglobby_')",
        ),
    ];
}
