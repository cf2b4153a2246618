//! Settings of a role or a database (`ALTER ROLE … SET`, `ALTER DATABASE … SET`). PostgreSQL applies them
//! only at session start.
//! Pure; `pool/role_settings.rs` queries them.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{
    Settings,
    parameters::{IDLE_SESSION_TIMEOUT, duration},
};
use crate::data_path::packed_session::PackedStart;

/// The role and database settings that were in effect when a pool's servers started.
#[derive(Debug, Default)]
pub struct RoleSettings {
    /// The `pg_db_role_setting` rows; `None` if the server rejected the query.
    stored_rows: Option<Vec<u8>>,
    /// Parameters in these rows that a session may set.
    named: BTreeSet<Box<str>>,
    /// Start values of the parameters in `named`, and of all that differ from PostgreSQL's built-in value.
    values: Settings,
    /// Built-in values of the parameters in `named`.
    built_in: Settings,
    /// `idle_session_timeout` at the start; `None`: off.
    pub idle_session_timeout: Option<Duration>,
}

impl RoleSettings {
    /// Returns name and value of the parameters that a session which started with `self` must set on servers
    /// that started with `now`.
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

    /// Returns whether the stored rows differ from `now`; `false` if either is unknown.
    pub fn has_changed(&self, now: Option<&[u8]>) -> bool {
        self.stored_rows.as_deref().zip(now).is_some_and(|(then, now)| then != now)
    }

    /// Parses the stored rows and the rows `(name, value, built-in value, a stored row has the name)`.
    pub fn read(stored_rows: Option<Vec<u8>>, values: &[Vec<Option<Vec<u8>>>]) -> Self {
        let mut start = Self { stored_rows, ..Self::default() };
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
        start.idle_session_timeout = start.values.get(IDLE_SESSION_TIMEOUT).and_then(duration);
        start
    }
}

impl RoleSettings {
    /// For another process, whose servers start with settings that it asks for itself.
    pub fn pack(&self) -> PackedStart {
        let timeout = self.idle_session_timeout.map(|timeout| timeout.as_millis());
        PackedStart {
            named: self.named.iter().map(ToString::to_string).collect(),
            values: self.values.pack(),
            built_in: self.built_in.pack(),
            idle_session_timeout_ms: timeout.and_then(|ms| ms.try_into().ok()),
        }
    }

    /// The settings that a session of another process started with.
    pub fn unpack(packed: PackedStart) -> Self {
        Self {
            stored_rows: None,
            named: packed.named.into_iter().map(Into::into).collect(),
            values: Settings::new(packed.values),
            built_in: Settings::new(packed.built_in),
            idle_session_timeout: packed.idle_session_timeout_ms.map(Duration::from_millis),
        }
    }
}

/// How the settings at a session's start relate to those of its pool's servers.
#[derive(Debug, Default)]
pub enum StartSettings {
    /// Unknown, because the session logged in without a server. Its first server decides.
    #[default]
    Unknown,
    /// The same, or the session has set the parameters that differ.
    Same(Arc<RoleSettings>),
    /// The session started with these settings; its pool has been replaced since.
    Earlier(Arc<RoleSettings>),
}

impl StartSettings {
    /// Returns whether the session can use its pool's servers unchanged.
    #[inline]
    pub fn is_same(&self) -> bool {
        matches!(self, Self::Same(_))
    }

    /// The settings at the session's start, if they are known.
    pub fn known(&self) -> Option<&RoleSettings> {
        match self {
            Self::Unknown => None,
            Self::Same(start) | Self::Earlier(start) => Some(start),
        }
    }

    /// Must be called when the session's pool is replaced.
    pub fn pool_replaced(&mut self) {
        if let Self::Same(start) = self {
            *self = Self::Earlier(start.clone());
        }
    }
}

impl From<Option<Arc<RoleSettings>>> for StartSettings {
    fn from(start: Option<Arc<RoleSettings>>) -> Self {
        start.map_or(Self::Unknown, Self::Same)
    }
}
