//! What statements and functions do to a session, as a set, and which functions do what.

bitflags::bitflags! {
    /// What may be done to a session. Empty: nothing that outlives the statement or that its successor could miss
    /// on another server.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Effects: u32 {
        /// A transaction or savepoint begins or ends.
        const TRANSACTION = 1;
        /// Parameters, role or session authorisation are SET or RESET for longer than the transaction.
        const SETTING = 1 << 1;
        /// The same, or the transaction's modes, for this transaction only.
        const SETTING_LOCAL = 1 << 2;
        /// set_config is called, directly or by an UPDATE of pg_settings: see [`super::Statement::set_configs`].
        const SET_CONFIG = 1 << 3;
        /// A prepared statement is made, used or forgotten by SQL.
        const PREPARED = 1 << 4;
        /// LISTEN or UNLISTEN.
        const LISTEN = 1 << 5;
        /// NOTIFY or pg_notify; done at commit.
        const NOTIFY = 1 << 6;
        /// A cursor is declared, read or closed.
        const CURSOR = 1 << 7;
        /// A cursor is declared WITH HOLD.
        const CURSOR_HOLD = 1 << 8;
        /// Something temporary is made, or named by `pg_temp.`.
        const TEMPORARY = 1 << 9;
        /// Objects are dropped, temporary ones perhaps.
        const DROP = 1 << 10;
        /// A library is loaded.
        const LOAD = 1 << 11;
        /// DISCARD.
        const DISCARD = 1 << 12;
        /// COPY from or to the client.
        const COPY = 1 << 13;
        /// A session's advisory lock may be taken.
        const ADVISORY_LOCK = 1 << 14;
        /// A session's advisory lock may be let go.
        const ADVISORY_UNLOCK = 1 << 15;
        /// nextval or setval: what currval and lastval remember changes.
        const SEQUENCE_WRITE = 1 << 16;
        /// currval or lastval.
        const SEQUENCE_READ = 1 << 17;
        /// setseed, or SET seed: random() follows from it.
        const SEED = 1 << 18;
        /// A function keeps something in the session that only itself can undo: the connection of dblink that has no name,
        /// temporary replication slots, …
        const FUNCTION_STATE = 1 << 19;
        /// CREATE, ALTER, DROP, …: what is prepared may have to be planned anew.
        const DDL = 1 << 20;
        /// Refused inside a transaction block (some forms of it at least).
        const OUTSIDE_TRANSACTION = 1 << 21;
        /// DO or CALL: code runs that may itself commit. What a DO's text shows is in the other flags.
        const CODE = 1 << 22;
        /// Text is built and run by EXECUTE in a DO: anything may happen.
        const DYNAMIC = 1 << 23;
        /// Some of the above was found in a text within the text, where it cannot be followed exactly.
        const HIDDEN = 1 << 24;
        /// What the session keeps is looked at: pg_prepared_statements, pg_cursors, pg_listening_channels().
        const INSPECTION = 1 << 25;
        /// pg_cancel_backend.
        const CANCEL = 1 << 26;
        /// pg_terminate_backend.
        const TERMINATE = 1 << 27;
        /// A table or view is used whose name is put together.
        const ANY_RELATION = 1 << 28;
        /// Connections of dblink that have names are opened or closed.
        const DBLINK = 1 << 29;
        /// Not understood.
        const UNKNOWN = 1 << 31;
    }
}

/// PostgreSQL's own functions that leave something in the session that calls them.
pub const SESSION_FUNCTIONS: [&str; 17] = [
    "set_config",
    "currval",
    "lastval",
    "setseed",
    "pg_advisory_lock",
    "pg_advisory_lock_shared",
    "pg_try_advisory_lock",
    "pg_try_advisory_lock_shared",
    "pg_advisory_unlock",
    "pg_advisory_unlock_shared",
    "pg_advisory_unlock_all",
    "pg_create_logical_replication_slot",
    "pg_create_physical_replication_slot",
    "pg_copy_logical_replication_slot",
    "pg_copy_physical_replication_slot",
    "pg_replication_origin_session_setup",
    "pg_replication_origin_session_reset",
];

impl Effects {
    /// What a call of a function of this name may do, whatever schema it is in. Transaction-level advisory locks,
    /// exported snapshots and large object descriptors end with the transaction and are left out.
    #[inline]
    pub fn of_call(name: &[u8]) -> Self {
        // All of them are 7 bytes or longer but setval; most functions that are called are not.
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
            // set_limit is pg_trgm's older way to set a parameter.
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
