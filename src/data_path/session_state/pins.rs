//! Reasons for which a lease outlasts its transaction, as a set.

bitflags::bitflags! {
    /// Why a server stays with its client between transactions.
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
        /// A prepared statement that was too long to be kept.
        const UNREAD = 1 << 8;
        /// Settings that cannot be asked for by name.
        const SETTINGS = 1 << 9;
        /// A function keeps something in the session that only itself can undo (setseed).
        const FUNCTION_STATE = 1 << 10;
        /// A sequence was advanced in the session's last transaction, and its tenant reads currval or lastval.
        const SEQUENCE_WRITTEN = 1 << 11;
        /// The unnamed statement was too long to be kept.
        const UNREAD_UNNAMED = 1 << 12;
        /// Connections of dblink.
        const DBLINK = 1 << 13;
    }
}

impl Pins {
    /// What `currval` and `lastval` remember.
    pub const SEQUENCES: Self = Self::SEQUENCE.union(Self::SEQUENCE_WRITTEN);

    /// What a session may be asked to do without.
    pub const YIELDING: Self = Self::SEQUENCES.union(Self::UNREAD_UNNAMED);

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
        (Self::UNREAD, "unread_statement"),
        (Self::UNREAD_UNNAMED, "unread_unnamed_statement"),
        (Self::SETTINGS, "untracked_setting"),
        (Self::FUNCTION_STATE, "function_state"),
        (Self::DBLINK, "dblink_connection"),
    ];

    /// Every reason there is, with its name.
    pub fn named() -> impl Iterator<Item = (Self, &'static str)> {
        Self::NAMES.into_iter()
    }

    /// The reasons' names, for operators.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(pin, _)| self.contains(*pin)).map(|(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_name_themselves() {
        let mut pins = Pins::TEMPORARY;
        pins.insert(Pins::LISTEN);
        assert_eq!(pins.names().collect::<Vec<_>>(), ["temporary_object", "listen"]);
        pins.remove(Pins::TEMPORARY);
        assert!(!pins.is_empty() && !pins.contains(Pins::TEMPORARY));
    }
}
