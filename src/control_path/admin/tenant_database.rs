//! How a host's administrator enters a tenant's database without running the tenant's code with the
//! administrator's rights.
//!
//! A tenant may SET things for its database that would become part of the administrator's session: a role,
//! a search path, a library to load, the function of an event trigger. So every such parameter is set at
//! the start of the session, which overrides what was SET for the database or the role. What cannot be set
//! this way is checked.

use super::{
    actor::AdminError,
    host_connection::{AdminRights, HostAdmin, HostSession, is_database_full},
};
use crate::control_path::onboarding::roles::MARK;

/// Options of every session of the administrator. Names resolve in `pg_catalog`, temporary objects last. No
/// wait for a lock is unlimited, since a tenant may hold it for as long as it likes.
const STEERED: &str = "-c search_path=pg_catalog,pg_temp -c role=none -c local_preload_libraries= \
     -c client_min_messages=warning -c statement_timeout=0 -c lock_timeout=60s -c idle_in_transaction_session_timeout=0 \
     -c default_transaction_read_only=off -c default_transaction_deferrable=off \
     -c default_transaction_isolation=read\\ committed -c standard_conforming_strings=on -c transform_null_equals=off \
     -c default_tablespace= -c default_table_access_method=heap -c row_security=on";

/// First version with `idle_session_timeout`.
const IDLE_TIMEOUT_SINCE: i32 = 140_000;
/// First version with `transaction_timeout`, `event_triggers` and login event triggers.
const LOGIN_TRIGGERS_SINCE: i32 = 170_000;

/// Returns the roles of the session. Where the server supports it, views and foreign tables are not read
/// from now on: one of them could replace a table between two statements.
const SETTLE: &str = "
SELECT SESSION_USER::pg_catalog.text, CURRENT_USER::pg_catalog.text,
       (SELECT pg_catalog.set_config(s.name, 'view,foreign-table', false) FROM pg_catalog.pg_settings s
        WHERE s.name = 'restrict_nonsystem_relation_kind')";

/// Only a superuser creates event triggers, but another role may be able to replace their functions.
const FOREIGN_EVENT_TRIGGERS: &str = "
SELECT pg_catalog.format('%I (function of %I)', e.evtname, r.rolname)
FROM pg_catalog.pg_event_trigger e JOIN pg_catalog.pg_proc p ON p.oid = e.evtfoid
JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
WHERE e.evtenabled <> 'D' AND NOT r.rolsuper AND r.rolname <> SESSION_USER ORDER BY 1 LIMIT 3";

/// `to_jsonb`, because older servers lack the column.
const LOGIN_TRIGGER: &str = "
SELECT 1 FROM pg_catalog.pg_database d
WHERE d.datname = $1 AND pg_catalog.to_jsonb(d) ->> 'dathasloginevt' = 'true'";

/// The statement that removes the CONNECTION LIMIT of database `$1`, if one of pglobby's roles owns it.
const TENANTS_LIMIT: &str = "
SELECT pg_catalog.format('ALTER DATABASE %I CONNECTION LIMIT -1', d.datname) FROM pg_catalog.pg_database d
WHERE d.datname = $1 AND d.datconnlimit >= 0
  AND pg_catalog.starts_with(pg_catalog.shobj_description(d.datdba, 'pg_authid'), $2)";

impl HostAdmin {
    /// A session of the administrator in its own database, for changes of roles and databases. Tenants'
    /// transactions in its way are ended.
    pub async fn connect(&self) -> Result<HostSession, AdminError> {
        let session = self.connect_as(&self.user, self.password.as_ref(), &self.database, STEERED).await?;
        session.before_tenants(self).await
    }

    /// A session of the administrator in `database` in which no code of another role runs.
    ///
    /// # Errors
    /// [`AdminError::Connect`]; or [`AdminError::Refused`] where something would run.
    pub async fn connect_to(&self, database: &str) -> Result<HostSession, AdminError> {
        if database == self.database {
            return self.connect().await;
        }
        let rights = self.known_rights(database).await?;
        let options = options(rights, &self.user);
        let enter = || self.connect_as(&self.user, self.password.as_ref(), database, &options);
        let inside = match enter().await {
            Err(error) if is_database_full(&error) && self.lift_limit(database).await? => enter().await?,
            entered => entered?,
        };
        let doing = "looking around before anything is done";
        let rows = inside.query(doing, SETTLE, &[]).await?;
        let roles = rows.first().map(|row| (row.get::<_, String>(0), row.get::<_, String>(1)));
        if roles.as_ref().is_none_or(|(session, current)| session != current || *session != self.user) {
            return Err(AdminError::Refused(format!(
                "host {:?} lets {:?} into database {database:?} as another role ({roles:?}); see ALTER DATABASE … SET and \
                 ALTER ROLE … SET there",
                self.name, self.user
            )));
        }
        if !event_triggers_are_off(rights) {
            self.refuse_event_triggers(&inside, database).await?;
        }
        Ok(inside)
    }

    /// Removes a CONNECTION LIMIT that the tenant set for its database, which counts for every
    /// administrator that is no superuser. Returns whether there was one.
    async fn lift_limit(&self, database: &str) -> Result<bool, AdminError> {
        let session = self.connect().await?;
        let limited =
            session.texts("looking at the database's limit", TENANTS_LIMIT, &[&database, &MARK]).await?;
        let Some(lift) = limited.first() else { return Ok(false) };
        session.run("lifting the limit of a tenant's database", lift).await?;
        Ok(true)
    }

    /// Options of pg_dump's session as the administrator. pg_dump sets its own search path.
    ///
    /// # Errors
    /// As [`HostAdmin::connect_to`], which is tried first: pg_dump enters where we may.
    pub(in crate::control_path) async fn dump_options(&self, database: &str) -> Result<String, AdminError> {
        let inside = self.connect_to(database).await?;
        let known = "SELECT 1 FROM pg_catalog.pg_settings WHERE name = 'restrict_nonsystem_relation_kind'";
        let known = inside.query("looking at what the server knows", known, &[]).await?;
        let mut options = options(self.known_rights(database).await?, &self.user);
        if !known.is_empty() {
            options += " -c restrict_nonsystem_relation_kind=view,foreign-table";
        }
        Ok(options)
    }

    async fn refuse_event_triggers(&self, inside: &HostSession, database: &str) -> Result<(), AdminError> {
        let found = inside.texts("looking for event triggers", FOREIGN_EVENT_TRIGGERS, &[]).await?;
        if found.is_empty() {
            return Ok(());
        }
        Err(AdminError::Refused(format!(
            "database {database:?} on host {:?} has event triggers with functions that other roles can replace; they would \
             run with the rights of {:?}: {}; as a superuser there: ALTER EVENT TRIGGER … DISABLE, or give the function to \
             a superuser",
            self.name,
            self.user,
            found.join(", ")
        )))
    }

    /// The administrator's privileges, queried once from its own database. Refuses a database whose login
    /// event trigger cannot be switched off.
    async fn known_rights(&self, database: &str) -> Result<AdminRights, AdminError> {
        if let Some(rights) = self.rights.get()
            && (rights.superuser || rights.server_version < LOGIN_TRIGGERS_SINCE)
        {
            return Ok(*rights);
        }
        let session = self.connect().await?;
        let rights = session.rights().await?;
        let _ = self.rights.set(rights);
        if !rights.superuser
            && !session.query("looking for a login trigger", LOGIN_TRIGGER, &[&database]).await?.is_empty()
        {
            return Err(AdminError::Refused(format!(
                "database {database:?} on host {:?} has an event trigger that fires at login, and {:?} is not a \
                 superuser, so the trigger would run for it; drop it there (DROP EVENT TRIGGER)",
                self.name, self.user
            )));
        }
        Ok(rights)
    }
}

/// Since 17 a superuser can switch event triggers off.
fn event_triggers_are_off(rights: AdminRights) -> bool {
    rights.superuser && rights.server_version >= LOGIN_TRIGGERS_SINCE
}

fn options(rights: AdminRights, user: &str) -> String {
    let mut options = STEERED.to_owned();
    if rights.server_version >= IDLE_TIMEOUT_SINCE {
        options += " -c idle_session_timeout=0";
    }
    if rights.server_version >= LOGIN_TRIGGERS_SINCE {
        options += " -c transaction_timeout=0";
    }
    if event_triggers_are_off(rights) {
        options += " -c event_triggers=off";
    }
    if rights.superuser {
        // Only a superuser's session can get another role by ALTER DATABASE … SET SESSION AUTHORIZATION.
        options += &format!(" -c session_authorization={}", escaped(user));
    }
    options
}

/// Escapes white space, at which the server splits options.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_whitespace() || letter == '\\' {
            escaped.push('\\');
        }
        escaped.push(letter);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_word_of_the_options() {
        assert_eq!(escaped(r"the master\ 1"), r"the\ master\\\ 1");
    }

    #[test]
    fn only_what_the_server_knows_is_asked_of_it() {
        let rights = |server_version, superuser| AdminRights {
            server_version,
            superuser,
            create_databases: true,
            create_roles: true,
        };
        let old = options(rights(130_000, true), "m");
        assert!(!old.contains("idle_session") && !old.contains("event_triggers"), "{old}");
        let modest = options(rights(180_000, false), "m");
        assert!(!modest.contains("event_triggers") && !modest.contains("session_authorization"), "{modest}");
        assert!(options(rights(180_000, true), "m").contains("event_triggers=off"));
    }
}
