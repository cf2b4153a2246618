//! Reasons for which a lease outlasts its transaction, as a set.

/// Why a server stays with its client between transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pins(u16);

impl Pins {
    /// No reason.
    pub const NONE: Self = Self(0);
    /// `pool_mode = "session"`.
    pub const SESSION_MODE: Self = Self(1);
    /// Temporary tables and other temporary objects.
    pub const TEMPORARY: Self = Self(1 << 1);
    /// Session-level advisory locks.
    pub const ADVISORY_LOCK: Self = Self(1 << 2);
    /// Cursors WITH HOLD.
    pub const HOLD_CURSOR: Self = Self(1 << 3);
    /// LISTEN.
    pub const LISTEN: Self = Self(1 << 4);
    /// SQL-level PREPARE.
    pub const PREPARE: Self = Self(1 << 5);
    /// LOAD, and libraries that keep state of their own.
    pub const LOAD: Self = Self(1 << 6);
    /// currval, lastval.
    pub const SEQUENCE: Self = Self(1 << 7);
    /// A text too long to read, or a statement nobody understood.
    pub const UNREAD: Self = Self(1 << 8);
    /// Settings that cannot be asked for by name.
    pub const SETTINGS: Self = Self(1 << 9);
    /// A function keeps something in the session that only itself can undo (dblink, setseed).
    pub const FUNCTION_STATE: Self = Self(1 << 10);

    /// A sequence was advanced in the session's last transaction, and its tenant reads currval or lastval.
    pub const SEQUENCE_WRITTEN: Self = Self(1 << 11);

    const NAMES: [(Self, &'static str); 12] = [
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
        (Self::SETTINGS, "untracked_setting"),
        (Self::FUNCTION_STATE, "function_state"),
    ];

    /// No reason at all.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `other`'s reasons are all here.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Adds reasons.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// These reasons and `other`'s.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Takes reasons away.
    pub fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }

    /// These reasons but for `other`'s.
    pub fn without(mut self, other: Self) -> Self {
        self.remove(other);
        self
    }

    /// The reasons as bits, for an atomic that other threads read.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// From [`Self::bits`].
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Every reason there is, with its name.
    pub fn all() -> impl Iterator<Item = (Self, &'static str)> {
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
