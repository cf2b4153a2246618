//! What may have been left in a session, and how its server is asked whether it has. Pure.

use super::pins::Pins;

/// What a transaction leaves uncertain until the server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Doubts(u16);

impl Doubts {
    /// Parameters whose names are known.
    pub const NAMED_SETTINGS: Self = Self(1);
    /// Any parameter.
    pub const ANY_SETTING: Self = Self(1 << 1);
    /// Temporary objects.
    pub const TEMPORARY: Self = Self(1 << 2);
    /// Session-level advisory locks.
    pub const LOCKS: Self = Self(1 << 3);
    /// Cursors WITH HOLD.
    pub const CURSORS: Self = Self(1 << 4);
    /// LISTEN, UNLISTEN.
    pub const LISTEN: Self = Self(1 << 5);
    /// SQL-level PREPARE, DEALLOCATE.
    pub const PREPARED: Self = Self(1 << 6);
    /// Everything above.
    pub const EVERYTHING: Self = Self(0x7f);
    /// Functions, or what calls them: they are read again (see `catalogue/`).
    pub const FUNCTIONS: Self = Self(1 << 7);
    /// Whether functions are still as they were read.
    pub const LEARN: Self = Self(1 << 8);
    /// Parameters of a kind that PostgreSQL does not list, under names that nobody knows: the server's are all set anew
    /// before its next use.
    pub const UNNAMED: Self = Self(1 << 9);
    /// Whether the parameters that are named are set at all: one of them was reset, or something failed.
    pub const SOURCES: Self = Self(1 << 15);

    /// No doubt.
    pub const NONE: Self = Self(0);

    /// Nothing to ask.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `other` is all in it.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Adds doubts.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// These doubts and `other`'s.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These doubts but for `other`'s.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The pins that the server's answer decides on.
    pub const PINS: [(Self, Pins, &'static str); 4] = [
        (
            Self::TEMPORARY,
            Pins::TEMPORARY,
            "EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema()) \
             OR EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace = pg_catalog.pg_my_temp_schema()) \
             OR EXISTS (SELECT FROM pg_catalog.pg_type WHERE typnamespace = pg_catalog.pg_my_temp_schema())",
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
             WHERE from_sql AND pg_catalog.left(name, 8) <> 'pglobby_')",
        ),
    ];
}
