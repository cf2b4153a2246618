//! Effects of statements and built-in functions on a session, as a set.

bitflags::bitflags! {
    /// Possible effects on a session. Empty: nothing outlives the statement or is missing elsewhere.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Effects: u32 {
        /// Starts or ends a transaction or savepoint.
        const TRANSACTION = 1;
        /// SET or RESET of parameters, role or session authorization beyond the transaction.
        const SETTING = 1 << 1;
        /// The same for this transaction only, or its modes.
        const SETTING_LOCAL = 1 << 2;
        /// Calls set_config, directly or by an UPDATE of pg_settings: see [`super::Statement::set_configs`].
        const SET_CONFIG = 1 << 3;
        /// SQL PREPARE, EXECUTE or DEALLOCATE.
        const PREPARED = 1 << 4;
        /// LISTEN or UNLISTEN.
        const LISTEN = 1 << 5;
        /// NOTIFY or pg_notify, delivered at commit.
        const NOTIFY = 1 << 6;
        /// Declares, reads or closes a cursor.
        const CURSOR = 1 << 7;
        /// Declares a cursor WITH HOLD.
        const CURSOR_HOLD = 1 << 8;
        /// Creates a temporary object or names one by `pg_temp.`.
        const TEMPORARY = 1 << 9;
        /// Drops objects, which may be temporary.
        const DROP = 1 << 10;
        /// Loads a library.
        const LOAD = 1 << 11;
        /// DISCARD.
        const DISCARD = 1 << 12;
        /// COPY from or to the client.
        const COPY = 1 << 13;
        /// May take a session-level advisory lock.
        const ADVISORY_LOCK = 1 << 14;
        /// May release a session-level advisory lock.
        const ADVISORY_UNLOCK = 1 << 15;
        /// nextval or setval: changes currval and lastval.
        const SEQUENCE_WRITE = 1 << 16;
        /// currval or lastval.
        const SEQUENCE_READ = 1 << 17;
        /// setseed or SET seed: changes random().
        const SEED = 1 << 18;
        /// A function keeps state in the session that only the function itself can undo: the unnamed dblink
        /// connection, temporary replication slots and others.
        const FUNCTION_STATE = 1 << 19;
        /// CREATE, ALTER, DROP and other DDL: prepared statements may need a new plan.
        const DDL = 1 << 20;
        /// At least some forms cannot run in a transaction block.
        const OUTSIDE_TRANSACTION = 1 << 21;
        /// DO or CALL: the code may commit. Effects visible in a DO block's text have their own flags.
        const CODE = 1 << 22;
        /// EXECUTE in a DO block runs a computed text: it may do anything.
        const DYNAMIC = 1 << 23;
        /// An effect comes from a nested text (a string or a code block), where it cannot be tracked exactly.
        const HIDDEN = 1 << 24;
        /// Reads session state: pg_prepared_statements, pg_cursors, pg_listening_channels().
        const INSPECTION = 1 << 25;
        /// pg_cancel_backend.
        const CANCEL = 1 << 26;
        /// pg_terminate_backend.
        const TERMINATE = 1 << 27;
        /// Uses a table or view with a computed name.
        const ANY_RELATION = 1 << 28;
        /// Opens or closes named dblink connections.
        const DBLINK = 1 << 29;
        /// Not understood.
        const UNKNOWN = 1 << 31;
    }
}

/// Built-in functions that change the state of the calling session.
#[rustfmt::skip]
pub const SESSION_FUNCTIONS: [&str; 17] = [
    "set_config", "currval", "lastval", "setseed", "pg_advisory_lock", "pg_advisory_lock_shared",
    "pg_try_advisory_lock", "pg_try_advisory_lock_shared", "pg_advisory_unlock",
    "pg_advisory_unlock_shared", "pg_advisory_unlock_all", "pg_create_logical_replication_slot",
    "pg_create_physical_replication_slot", "pg_copy_logical_replication_slot",
    "pg_copy_physical_replication_slot", "pg_replication_origin_session_setup",
    "pg_replication_origin_session_reset",
];

impl Effects {
    /// Returns the effects of calling a function of this name in any schema. State that ends with the
    /// transaction does not count: transaction-level locks, exported snapshots, large object descriptors.
    #[inline]
    pub fn of_call(name: &[u8]) -> Self {
        // A cheap filter: all of these names have 6 to 40 bytes and start with one of a few letters.
        if name.len() < 6
            || name.len() > 40
            || !matches!(name[0] | 0x20, b's' | b'n' | b'c' | b'l' | b'p' | b'd')
        {
            return Self::empty();
        }
        let mut lower = [0; 40];
        let Some(lower) = lower.get_mut(..name.len()) else { return Self::empty() };
        lower.copy_from_slice(name);
        lower.make_ascii_lowercase();
        match &*lower {
            // set_limit is an old function of pg_trgm that sets a parameter.
            b"set_config" | b"set_limit" => Self::SET_CONFIG,
            b"nextval" | b"setval" => Self::SEQUENCE_WRITE,
            b"currval" | b"lastval" => Self::SEQUENCE_READ,
            b"setseed" => Self::SEED,
            b"pg_listening_channels" | b"pg_prepared_statement" | b"pg_cursor" => Self::INSPECTION,
            b"pg_notify" => Self::NOTIFY,
            b"pg_cancel_backend" => Self::CANCEL,
            b"pg_terminate_backend" => Self::TERMINATE,
            b"pg_advisory_lock"
            | b"pg_advisory_lock_shared"
            | b"pg_try_advisory_lock"
            | b"pg_try_advisory_lock_shared" => Self::ADVISORY_LOCK,
            b"pg_advisory_unlock" | b"pg_advisory_unlock_shared" | b"pg_advisory_unlock_all" => {
                Self::ADVISORY_UNLOCK
            }
            b"dblink_disconnect" => Self::DBLINK,
            b"dblink_connect"
            | b"dblink_connect_u"
            | b"pg_create_logical_replication_slot"
            | b"pg_create_physical_replication_slot"
            | b"pg_copy_logical_replication_slot"
            | b"pg_copy_physical_replication_slot"
            | b"pg_replication_origin_session_setup"
            | b"pg_replication_origin_session_reset" => Self::FUNCTION_STATE,
            _ => Self::empty(),
        }
    }
}
