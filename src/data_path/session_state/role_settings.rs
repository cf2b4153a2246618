//! What PostgreSQL reads when a session begins, and never again for that session: settings of its role and its database
//! (`ALTER ROLE … SET`, `ALTER DATABASE … SET`). Pure; a pool reads them in `pool/role_settings.rs`.

use std::{collections::BTreeSet, sync::Arc};

use super::Settings;

/// What the servers of a pool began with.
#[derive(Debug, Default)]
pub struct SessionStart {
    /// What the catalogue says is set for role and database; `None`: the server would not tell.
    written: Option<Vec<u8>>,
    /// The parameters among that which a session may set itself.
    named: BTreeSet<Box<str>>,
    /// Values that sessions begin with, of those that are named, and of those that PostgreSQL was not built with.
    values: Settings,
    /// Values that PostgreSQL was built with, of those that are named.
    built_in: Settings,
}

impl SessionStart {
    /// What a session that began with this must set on servers that began with `now`, to find what it has found so far.
    pub fn differing_from(&self, now: &Self) -> Vec<(Box<str>, Box<str>)> {
        let built_in = |name: &str| now.built_in.get(name).or_else(|| self.built_in.get(name));
        let value = |start: &'_ Self, name: &str| -> Option<Box<str>> {
            start.values.get(name).or_else(|| built_in(name)).map(Into::into)
        };
        let differs = |name: &str| {
            let (then, now) = (value(self, name)?, value(now, name)?);
            (then != now).then(|| (name.into(), then))
        };
        self.named.union(&now.named).filter_map(|name| differs(name)).collect()
    }

    /// Whether the catalogue says something else by now. Where it said nothing, or says nothing, that is not known.
    pub fn is_written_otherwise(&self, now: Option<&[u8]>) -> bool {
        self.written.as_deref().zip(now).is_some_and(|(then, now)| then != now)
    }

    /// From what the catalogue says, and the rows `(name, value, built-in value, whether it is named)`.
    pub fn read(written: Option<Vec<u8>>, values: &[Vec<Option<Vec<u8>>>]) -> Self {
        let mut start = Self { written, ..Self::default() };
        for row in values {
            let text = |at: usize| {
                row.get(at).and_then(Option::as_deref).and_then(|bytes| std::str::from_utf8(bytes).ok())
            };
            let (Some(name), Some(value)) = (text(0), text(1)) else { continue };
            start.values.set(name, Some(value));
            if text(3) == Some("t") {
                start.named.insert(name.into());
                start.built_in.set(name, Some(text(2).unwrap_or_default()));
            }
        }
        start
    }
}

/// Where a session stands to the servers of its pool.
#[derive(Debug, Default)]
pub enum Begun {
    /// It was told what was known, with no server at hand: its first one says what it begins with.
    #[default]
    Unseen,
    /// It began with what the pool's servers began with, or has set what differs.
    Alike(Arc<SessionStart>),
    /// It began with this, and its pool has been replaced since.
    Before(Arc<SessionStart>),
}

impl Begun {
    /// Whether servers of its pool are as it expects.
    #[inline]
    pub fn is_alike(&self) -> bool {
        matches!(self, Self::Alike(_))
    }

    /// Its pool has been replaced.
    pub fn pool_replaced(&mut self) {
        if let Self::Alike(start) = self {
            *self = Self::Before(start.clone());
        }
    }
}

impl From<Option<Arc<SessionStart>>> for Begun {
    fn from(start: Option<Arc<SessionStart>>) -> Self {
        start.map_or(Self::Unseen, Self::Alike)
    }
}
