//! Reasons to keep a server leased to a session after its transaction.

bitflags::bitflags! {
    /// The reasons why a session keeps its server between transactions.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Pins: u16 {
        /// `pool_mode = "session"`.
        const SESSION_MODE = 1;
        /// Temporary tables and other temporary objects.
        const TEMPORARY = 1 << 1;
        /// Session-level advisory locks.
        const ADVISORY_LOCK = 1 << 2;
        /// Cursors WITH HOLD.
        const HOLD_CURSOR = 1 << 3;
        /// LISTEN.
        const LISTEN = 1 << 4;
        /// SQL-level PREPARE.
        const PREPARE = 1 << 5;
        /// LOAD, and libraries that keep state of their own.
        const LOAD = 1 << 6;
        /// currval, lastval.
        const SEQUENCE = 1 << 7;
        /// A named prepared statement that was too long to be stored.
        const UNSTORED = 1 << 8;
        /// Settings that the state query cannot read by name.
        const SETTINGS = 1 << 9;
        /// State of a function that SQL cannot undo (`setseed`).
        const FUNCTION_STATE = 1 << 10;
        /// The last transaction advanced a sequence, and clients of the tenant read currval or lastval.
        const SEQUENCE_WRITTEN = 1 << 11;
        /// An unnamed statement that was too long to be stored.
        const UNSTORED_UNNAMED = 1 << 12;
        /// Connections opened by dblink.
        const DBLINK = 1 << 13;
    }
}

impl Pins {
    /// The values of `currval` and `lastval`.
    pub const SEQUENCES: Self = Self::SEQUENCE.union(Self::SEQUENCE_WRITTEN);

    /// Pins that the proxy may break when other sessions wait for a server.
    pub const RECLAIMABLE: Self = Self::SEQUENCES.union(Self::UNSTORED_UNNAMED);

    const NAMES: [(Self, &'static str); 14] = [
        (Self::SESSION_MODE, "session_mode"),
        (Self::TEMPORARY, "temporary_object"),
        (Self::ADVISORY_LOCK, "advisory_lock"),
        (Self::HOLD_CURSOR, "hold_cursor"),
        (Self::LISTEN, "listen"),
        (Self::PREPARE, "prepare"),
        (Self::LOAD, "load"),
        (Self::SEQUENCE, "sequence"),
        (Self::SEQUENCE_WRITTEN, "sequence_written"),
        (Self::UNSTORED, "unread_statement"),
        (Self::UNSTORED_UNNAMED, "unread_unnamed_statement"),
        (Self::SETTINGS, "untracked_setting"),
        (Self::FUNCTION_STATE, "function_state"),
        (Self::DBLINK, "dblink_connection"),
    ];

    /// Iterates over all pins with their names.
    pub fn named() -> impl Iterator<Item = (Self, &'static str)> {
        Self::NAMES.into_iter()
    }

    /// Iterates over the names shown to operators.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(pin, _)| self.contains(*pin)).map(|(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_have_names() {
        let mut pins = Pins::TEMPORARY;
        pins.insert(Pins::LISTEN);
        assert_eq!(pins.names().collect::<Vec<_>>(), ["temporary_object", "listen"]);
        pins.remove(Pins::TEMPORARY);
        assert!(!pins.is_empty() && !pins.contains(Pins::TEMPORARY));
    }
}
