//! Settings of role and database (`ALTER ROLE … SET`, `ALTER DATABASE … SET`). PostgreSQL reads them when a session begins,
//! and never again for that session. Pure; a pool asks for them in `pool/role_settings.rs`.

use std::{collections::BTreeSet, sync::Arc};

use super::Settings;

/// Settings that the servers of a pool began with.
#[derive(Debug, Default)]
pub struct RoleSettings {
    /// The catalogue's rows for role and database; `None`: the server refused the query.
    written: Option<Vec<u8>>,
    /// The parameters in these rows that a session may set itself.
    named: BTreeSet<Box<str>>,
    /// Values at session start, of `named` and of parameters that differ from PostgreSQL's built-in value.
    values: Settings,
    /// PostgreSQL's built-in values of `named`.
    built_in: Settings,
}

impl RoleSettings {
    /// The parameters that a session which began with these settings must set on servers that began with
    /// `now`.
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

    /// Whether the catalogue's rows have changed. `false` where either are not known.
    pub fn is_written_otherwise(&self, now: Option<&[u8]>) -> bool {
        self.written.as_deref().zip(now).is_some_and(|(then, now)| then != now)
    }

    /// From the catalogue's rows, and the rows `(name, value, built-in value, whether the catalogue names it)`.
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

/// Whether a session began with the same settings as the servers of its pool.
#[derive(Debug, Default)]
pub enum StartSettings {
    /// Not known: the session logged in without a server. Its first server decides.
    #[default]
    Unseen,
    /// It did, or has set the parameters that differ.
    Alike(Arc<RoleSettings>),
    /// It began with these; its pool has been replaced since.
    Before(Arc<RoleSettings>),
}

impl StartSettings {
    /// Whether it can use servers of its pool as they are.
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

impl From<Option<Arc<RoleSettings>>> for StartSettings {
    fn from(start: Option<Arc<RoleSettings>>) -> Self {
        start.map_or(Self::Unseen, Self::Alike)
    }
}
