//! What PostgreSQL reads when a session begins, and never again for that session: settings of its role and its database
//! (`ALTER ROLE … SET`, `ALTER DATABASE … SET`).
//!
//! What is set for the role that all logins of a tenant share is pglobby's alone: nothing, or that a reader reads. Code of the
//! tenant's can set more, which a text does not show; it is found here and undone (`control_path/onboarding/repair.rs`).
//!
//! All servers of a pool began with the same: what each one finds written when it is opened is compared with what the first one
//! found, and where that differs the pool is replaced. A new session makes sure of it at its login (`startup_parameters.rs`) and gets servers
//! of the new pool. A session that is older sets, on servers of the new pool, what it began with.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
};

use tracing::info;

use super::Pool;
use crate::data_path::{
    server::{
        IdentityTrouble, TroubleKind,
        connection::{AskError, Row, Server},
    },
    session_state::Settings,
    tenant::Access,
};

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

    fn read(written: Option<Vec<u8>>, values: &[Row]) -> Self {
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

/// What the servers of one pool began with.
#[derive(Debug, Default)]
pub(super) struct RoleStart {
    /// Known once a server was opened.
    start: OnceLock<Arc<SessionStart>>,
    /// Held while the pool is replaced because that has changed.
    replacing: tokio::sync::Mutex<()>,
}

impl RoleStart {
    /// For the one task that replaces the pool.
    pub async fn replacing(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.replacing.lock().await
    }
}

impl Pool {
    /// What its servers began with, once one was opened.
    pub fn start(&self) -> Option<&Arc<SessionStart>> {
        self.role_start.start.get()
    }

    /// Whether a server that is opened now begins with what this one, and all others of the pool, began with. If not, the pool is
    /// replaced, and the server serves no session that does not have it already.
    ///
    /// # Errors
    /// [`AskError::Lost`]: the server must be closed.
    pub async fn is_as_begun(self: &Arc<Self>, server: &mut Server) -> Result<bool, AskError> {
        // Known before the server was opened and written still: so it began with that.
        let before = self.start();
        let written = match server.ask(&written(), &[self.as_made()]).await {
            Ok(mut rows) => {
                if let Some(trouble) = self.unlike_made(&mut rows)
                    && self.put_right(trouble).await
                {
                    return Ok(false);
                }
                let values = rows.concat().into_iter();
                Some(values.flat_map(|value| [value.unwrap_or_default(), vec![0]]).flatten().collect())
            }
            Err(error @ AskError::Refused(_)) => {
                if self.put_right_if_changed(&error).await {
                    return Ok(false);
                }
                None
            }
            Err(lost) => return Err(lost),
        };
        let start = match before {
            Some(start) => start,
            None => {
                let values = match server.ask(&values(), &[]).await {
                    Err(AskError::Refused(_)) => Vec::new(),
                    values => values?,
                };
                self.role_start.start.get_or_init(|| Arc::new(SessionStart::read(written.clone(), &values)))
            }
        };
        if start.written.is_none() || written.is_none() || start.written == written {
            return Ok(true);
        }
        if let Some(pools) = self.all_pools() {
            pools.begin_anew(self).await;
            info!(
                tenant = self.tenant.name,
                "settings of role or database have changed: new sessions get new servers"
            );
        }
        Ok(false)
    }
}

impl Pool {
    /// The one setting that its role was made with; empty: none.
    fn as_made(&self) -> &'static str {
        match self.access {
            Access::ReadWrite => "",
            Access::ReadOnly => READER_AS_MADE,
        }
    }

    /// Whether the role has other settings than it was made with. Takes from the rows what was asked for that alone.
    fn unlike_made(&self, rows: &mut [Row]) -> Option<IdentityTrouble> {
        let (mut others, mut is_made) = (Vec::new(), false);
        for row in rows {
            is_made |= row.pop().flatten().as_deref() == Some(b"t");
            others.extend(row.pop().flatten().map(|names| String::from_utf8_lossy(&names).into_owned()));
        }
        let role = self.connector.username();
        let said = match others.is_empty() {
            false => format!("role {role:?} has settings of its own: {}", others.join(", ")),
            true if is_made || self.as_made().is_empty() => return None,
            true => format!("role {role:?} is no longer set to read by default"),
        };
        Some(IdentityTrouble { kind: TroubleKind::Settings, said: said.into() })
    }

    /// Has the control path put right what is not as it was made. `true`: the pool was replaced by one that knows the role as it is
    /// now.
    pub(super) async fn put_right(self: &Arc<Self>, trouble: IdentityTrouble) -> bool {
        match self.all_pools() {
            Some(pools) => pools.renew(self, trouble).await,
            None => false,
        }
    }

    /// The same for a server that has broken, or has refused a question of ours, as its session began: settings of the role may
    /// be why.
    pub(super) async fn put_right_if_changed(self: &Arc<Self>, error: &AskError) -> bool {
        let said = format!("a session of role {:?} broke as it began: {error}", self.connector.username());
        self.put_right(IdentityTrouble { kind: TroubleKind::Suspected, said: said.into() }).await
    }
}

/// What a role that reads is made with (`control_path/onboarding/roles.rs`).
const READER_AS_MADE: &str = "default_transaction_read_only=on";

/// Rows about the database and the role of the session.
const ABOUT_US: &str = "pg_catalog.pg_db_role_setting AS s WHERE \
    s.setdatabase IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())) \
    AND s.setrole IN (0, (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = session_user))";

/// What is written in the catalogue; a row that was written again is another. Behind that the names of what the role was not made
/// with, $1 being the one thing that it may have been made with, and whether it has that.
fn written() -> String {
    format!(
        "SELECT s.setdatabase, s.setrole, s.xmin, s.setconfig, \
            CASE WHEN s.setrole <> 0 THEN (SELECT pg_catalog.string_agg(pg_catalog.split_part(entry, '=', 1), ', ') \
                FROM pg_catalog.unnest(s.setconfig) AS entry WHERE s.setdatabase <> 0 OR entry <> $1) END, \
            s.setrole <> 0 AND s.setdatabase = 0 AND $1 = ANY (s.setconfig) \
        FROM {ABOUT_US} ORDER BY 1, 2"
    )
}

/// `(name, value, the value PostgreSQL was built with, whether it is written)`. What only a superuser may set is left out: no
/// session could.
fn values() -> String {
    format!(
        "WITH named AS (SELECT DISTINCT pg_catalog.lower(pg_catalog.split_part(entry, '=', 1)) AS name \
            FROM (SELECT pg_catalog.unnest(s.setconfig) AS entry FROM {ABOUT_US}) AS entries) \
        SELECT pg_catalog.lower(p.name), pg_catalog.current_setting(p.name), p.boot_val, n.name IS NOT NULL \
            FROM pg_catalog.pg_settings AS p LEFT JOIN named AS n ON n.name = pg_catalog.lower(p.name) \
            WHERE p.context = 'user' AND (n.name IS NOT NULL OR p.setting IS DISTINCT FROM p.boot_val) \
        UNION ALL SELECT n.name, coalesce(pg_catalog.current_setting(n.name, true), ''), '', true FROM named AS n \
            WHERE pg_catalog.strpos(n.name, '.') > 0 \
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_settings AS p WHERE pg_catalog.lower(p.name) = n.name)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(rows: &[(&str, &str, Option<&str>)]) -> SessionStart {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        let row = |(name, value, built_in): &(&str, &str, Option<&str>)| -> Row {
            vec![
                text(name),
                text(value),
                text(built_in.unwrap_or_default()),
                text(if built_in.is_some() { "t" } else { "f" }),
            ]
        };
        SessionStart::read(Some(Vec::new()), &rows.iter().map(row).collect::<Vec<_>>())
    }

    fn differing(then: &SessionStart, now: &SessionStart) -> Vec<(String, String)> {
        let differing = then.differing_from(now).into_iter();
        differing.map(|(name, value)| (name.into(), value.into())).collect()
    }

    #[test]
    fn a_session_sets_what_it_began_with_and_nothing_else() {
        let then = start(&[("work_mem", "8MB", Some("4096")), ("timezone", "UTC", None)]);
        let now = start(&[
            ("timezone", "Asia/Tokyo", Some("GMT")),
            ("statement_timeout", "5s", Some("0")),
            ("my.note", "new", Some("")),
            ("lc_time", "C", None),
        ]);
        let expected =
            [("my.note", ""), ("statement_timeout", "0"), ("timezone", "UTC"), ("work_mem", "8MB")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(differing(&then, &now), expected);
        let same = start(&[("work_mem", "8MB", Some("4096"))]);
        assert_eq!(differing(&then, &same), []);
    }
}
