//! Settings of role and database (`ALTER ROLE … SET`, `ALTER DATABASE … SET`). PostgreSQL reads them when a
//! session begins, and never again for that session.
//!
//! All servers of a pool began with the same settings. Those in the catalog are compared whenever a server
//! is opened; where they differ, the pool is replaced. A new session checks them at its login
//! (`startup_parameters.rs`) and gets servers of the new pool. An older session sets, on servers of the new
//! pool, the values that it began with.
//!
//! Only pglobby sets parameters for the role that all logins of a tenant share: none, or
//! `default_transaction_read_only`. The tenant's own code can set others; they are found here and undone
//! (`control_path/onboarding/repair.rs`). An exception is `role`: an operator may let the role act as another
//! one that it is a member of, and to anyone else the setting gives no more than SET ROLE would.

use std::{
    borrow::Cow,
    sync::{Arc, LazyLock, OnceLock},
};

use tracing::info;

use super::Pool;
use crate::data_path::{
    exchange::Repeated,
    server::{
        IdentityTrouble, TroubleKind,
        connection::{AskError, Row, Server},
    },
    session_state::{role_settings::RoleSettings, server_role::HiddenCatalogs},
    tenant::Access,
};

/// The settings that the servers of one pool began with.
#[derive(Debug)]
pub(super) struct RoleStart {
    role: Box<str>,
    access: Access,
    /// Known once a server was open.
    start: OnceLock<Arc<RoleSettings>>,
    /// Held while the pool is replaced because they have changed.
    pub replacing: tokio::sync::Mutex<()>,
}

impl RoleStart {
    pub fn new(role: &str, access: Access) -> Self {
        Self { role: role.into(), access, start: OnceLock::new(), replacing: tokio::sync::Mutex::default() }
    }

    /// The one setting that the role was created with; empty: none.
    fn as_made(&self) -> &'static str {
        match self.access {
            Access::ReadWrite => "",
            Access::ReadOnly => READER_AS_MADE,
        }
    }

    /// Whether the role has other settings than it was created with. Removes the columns about that.
    fn unlike_made(&self, rows: &mut [Row]) -> Option<IdentityTrouble> {
        let (mut others, mut is_made) = (Vec::new(), false);
        for row in rows {
            is_made |= row.pop().flatten().as_deref() == Some(b"t");
            others.extend(row.pop().flatten().map(|names| String::from_utf8_lossy(&names).into_owned()));
        }
        let role = &self.role;
        let said = match others.is_empty() {
            false => format!("role {role:?} has settings of its own: {}", others.join(", ")),
            true if is_made || self.as_made().is_empty() => return None,
            true => format!("role {role:?} is no longer read-only by default"),
        };
        Some(IdentityTrouble { kind: TroubleKind::Settings, said: said.into() })
    }
}

impl Pool {
    /// The settings that its servers began with, once one was open.
    pub fn start(&self) -> Option<&Arc<RoleSettings>> {
        self.role_start.start.get()
    }

    /// Asks a server whether a session that begins now gets the settings with which this pool's servers
    /// began. If not, replaces the pool; then only the session that already holds this server may use it. After
    /// any error but [`AskError::Refused`] the server must be closed.
    pub async fn has_same_start(self: &Arc<Self>, server: &mut Server) -> Result<bool, AskError> {
        // Known before the server was opened, and still in the catalog: so it began with them.
        let before = self.start();
        let written = match self.ask_written(server).await {
            Ok(None) => None,
            Ok(Some(mut rows)) => {
                if let Some(trouble) = self.role_start.unlike_made(&mut rows)
                    && self.repair_role(trouble).await
                {
                    return Ok(false);
                }
                let values = rows.concat().into_iter();
                Some(values.flat_map(|value| [value.unwrap_or_default(), vec![0]]).flatten().collect())
            }
            Err(AskError::Refused(error)) if error.is_denied() => {
                self.look_for_hidden_catalogs(server).await?;
                None
            }
            Err(error @ AskError::Refused(_)) => {
                if self.repair_role_after(&error).await {
                    return Ok(false);
                }
                None
            }
            Err(lost) => return Err(lost),
        };
        let start = match before {
            Some(start) => start,
            None => {
                let hidden = server.side.role.hidden;
                let values = match hidden.intersects(NEEDED) {
                    true => Vec::new(),
                    false => match server.ask(&values(hidden), &[]).await {
                        Err(AskError::Refused(_)) => Vec::new(),
                        values => values?,
                    },
                };
                self.role_start.start.get_or_init(|| Arc::new(RoleSettings::read(written.clone(), &values)))
            }
        };
        if !start.has_changed(written.as_deref()) {
            return Ok(true);
        }
        if let Some(pools) = self.all_pools() {
            pools.replace_for_new_sessions(self).await;
            info!(tenant = self.tenant.name, "pool replaced: settings of role or database changed");
        }
        Ok(false)
    }

    /// The catalog's rows about this role and database; `None` if they are hidden.
    async fn ask_written(&self, server: &mut Server) -> Result<Option<Vec<Row>>, AskError> {
        self.note_hidden_catalogs(server).await?;
        let hidden = server.side.role.hidden;
        if hidden.contains(HiddenCatalogs::ROLE_SETTINGS) {
            return Ok(None);
        }
        let sql = match hidden.is_empty() {
            true => Cow::Borrowed(USUAL.as_str()),
            false => Cow::Owned(written(hidden)),
        };
        server.ask_again(Repeated::Start, &sql, &[self.role_start.as_made()]).await.map(Some)
    }

    /// Has the control path repair a role or database that has changed. `true`: the pool was replaced.
    pub(super) async fn repair_role(self: &Arc<Self>, trouble: IdentityTrouble) -> bool {
        match self.all_pools() {
            Some(pools) => pools.repair_role(self, trouble).await,
            None => false,
        }
    }

    /// The same for a server that was lost, or refused a query, at its start: the role's settings may be why.
    pub(super) async fn repair_role_after(self: &Arc<Self>, error: &AskError) -> bool {
        let said = format!("a session of role {:?} was lost at its start: {error}", self.role_start.role);
        self.repair_role(IdentityTrouble { kind: TroubleKind::Suspected, said: said.into() }).await
    }
}

/// [`written`] where no catalog is hidden: asked at each login.
static USUAL: LazyLock<String> = LazyLock::new(|| written(HiddenCatalogs::empty()));

/// The setting of a read-only role (`control_path/onboarding/roles.rs`).
const READER_AS_MADE: &str = "default_transaction_read_only=on";

/// The catalogs without which the values at a session's start cannot be read.
const NEEDED: HiddenCatalogs = HiddenCatalogs::SETTINGS.union(HiddenCatalogs::ROLE_SETTINGS);

/// Catalog rows for the session's database and role.
fn about_us(hidden: HiddenCatalogs) -> String {
    // Without pg_database, the path of a file in the database has its OID.
    let database = match hidden.contains(HiddenCatalogs::DATABASES) {
        false => "SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()",
        true => {
            "SELECT (pg_catalog.regexp_match(pg_catalog.pg_relation_filepath('pg_catalog.pg_class'::pg_catalog.regclass), \
               '([0-9]+)/[^/]+$'))[1]::pg_catalog.oid"
        }
    };
    format!(
        "pg_catalog.pg_db_role_setting AS s WHERE s.setdatabase IN (0, ({database})) \
         AND s.setrole IN (0, pg_catalog.to_regrole(pg_catalog.quote_ident(session_user))::pg_catalog.oid)"
    )
}

/// The catalog's rows, with `xmin`: an updated row differs. Two more columns: the names of settings that role
/// or database were not created with, and whether the role has the one in $1, which it may have been created
/// with. A database sets no role.
fn written(hidden: HiddenCatalogs) -> String {
    let about_us = about_us(hidden);
    format!(
        "SELECT s.setdatabase, s.setrole, s.xmin, s.setconfig, \
            (SELECT pg_catalog.string_agg(pg_catalog.split_part(entry, '=', 1), ', ') \
                FROM pg_catalog.unnest(s.setconfig) AS entry WHERE CASE WHEN s.setrole <> 0 \
                  THEN (s.setdatabase <> 0 OR entry <> $1) AND pg_catalog.left(entry, 5) <> 'role=' \
                  ELSE s.setdatabase <> 0 AND pg_catalog.left(entry, 5) = 'role=' END), \
            s.setrole <> 0 AND s.setdatabase = 0 AND $1 = ANY (s.setconfig) \
        FROM {about_us} ORDER BY 1, 2"
    )
}

/// `(name, value, built-in value, is in the catalog)`, without parameters that only a superuser may set.
fn values(hidden: HiddenCatalogs) -> String {
    let about_us = about_us(hidden);
    format!(
        "WITH named AS (SELECT DISTINCT pg_catalog.lower(pg_catalog.split_part(entry, '=', 1)) AS name \
            FROM (SELECT pg_catalog.unnest(s.setconfig) AS entry FROM {about_us}) AS entries) \
        SELECT pg_catalog.lower(p.name), pg_catalog.current_setting(p.name), p.boot_val, n.name IS NOT NULL \
            FROM pg_catalog.pg_show_all_settings() AS p LEFT JOIN named AS n ON n.name = pg_catalog.lower(p.name) \
            WHERE p.context = 'user' AND (n.name IS NOT NULL OR p.setting IS DISTINCT FROM p.boot_val) \
        UNION ALL SELECT n.name, coalesce(pg_catalog.current_setting(n.name, true), ''), '', true FROM named AS n \
            WHERE pg_catalog.strpos(n.name, '.') > 0 \
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_show_all_settings() AS p WHERE pg_catalog.lower(p.name) = n.name)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(rows: &[(&str, &str, Option<&str>)]) -> RoleSettings {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        let row = |(name, value, built_in): &(&str, &str, Option<&str>)| -> Row {
            vec![
                text(name),
                text(value),
                text(built_in.unwrap_or_default()),
                text(if built_in.is_some() { "t" } else { "f" }),
            ]
        };
        RoleSettings::read(Some(Vec::new()), &rows.iter().map(row).collect::<Vec<_>>())
    }

    fn differing(then: &RoleSettings, now: &RoleSettings) -> Vec<(String, String)> {
        let differing = then.differing_from(now).into_iter();
        differing.map(|(name, value)| (name.into(), value.into())).collect()
    }

    #[test]
    fn a_session_sets_only_parameters_that_differ_from_its_start() {
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
