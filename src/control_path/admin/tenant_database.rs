//! How a host's administrator enters a database in which a tenant can define things: so that nothing of the tenant's
//! runs with the administrator's rights.
//!
//! What a tenant may SET for its database (a role, a search path, a library to load, an event trigger's function)
//! would otherwise be part of the administrator's session. Everything that steers a session is therefore given at its
//! start, where it counts more than what a database or a role was SET to, and what cannot be given is looked for.

use super::{
    actor::AdminError,
    host_connection::{AdminRights, HostAdmin, HostSession, is_database_full},
};
use crate::control_path::onboarding::roles::MARK;

/// For every session of the administrator. Names are found in `pg_catalog`, and what is temporary comes last. No wait for a
/// lock is without end: who holds it may be a tenant, which can do so for as long as it likes.
const STEERED: &str = "-c search_path=pg_catalog,pg_temp -c role=none -c local_preload_libraries= \
     -c client_min_messages=warning -c statement_timeout=0 -c lock_timeout=60s -c idle_in_transaction_session_timeout=0 \
     -c default_transaction_read_only=off -c default_transaction_deferrable=off \
     -c default_transaction_isolation=read\\ committed -c standard_conforming_strings=on -c transform_null_equals=off \
     -c default_tablespace= -c default_table_access_method=heap -c row_security=on";

/// `idle_session_timeout` came with it.
const IDLE_TIMEOUT_SINCE: i32 = 140_000;
/// `transaction_timeout`, `event_triggers`, and event triggers that fire at login.
const LOGIN_TRIGGERS_SINCE: i32 = 170_000;

/// Who the server says that we are; and, where it knows how, no view and no foreign table is read from now on: a table
/// may be replaced by one between two statements.
const SETTLE: &str = "
SELECT SESSION_USER::pg_catalog.text, CURRENT_USER::pg_catalog.text,
       (SELECT pg_catalog.set_config(s.name, 'view,foreign-table', false) FROM pg_catalog.pg_settings s
        WHERE s.name = 'restrict_nonsystem_relation_kind')";

/// Event triggers are a superuser's, but their functions may belong to somebody who can replace them.
const FOREIGN_EVENT_TRIGGERS: &str = "
SELECT pg_catalog.format('%I (function of %I)', e.evtname, r.rolname)
FROM pg_catalog.pg_event_trigger e JOIN pg_catalog.pg_proc p ON p.oid = e.evtfoid
JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
WHERE e.evtenabled <> 'D' AND NOT r.rolsuper AND r.rolname <> SESSION_USER ORDER BY 1 LIMIT 3";

/// `to_jsonb`, because older servers have no such column.
const LOGIN_TRIGGER: &str = "
SELECT 1 FROM pg_catalog.pg_database d
WHERE d.datname = $1 AND pg_catalog.to_jsonb(d) ->> 'dathasloginevt' = 'true'";

/// The statement that takes the limit from database `$1`, where that belongs to a role of ours.
const TENANTS_LIMIT: &str = "
SELECT pg_catalog.format('ALTER DATABASE %I CONNECTION LIMIT -1', d.datname) FROM pg_catalog.pg_database d
WHERE d.datname = $1 AND d.datconnlimit >= 0
  AND pg_catalog.starts_with(pg_catalog.shobj_description(d.datdba, 'pg_authid'), $2)";

impl HostAdmin {
    /// A session of the administrator in its own database, where no tenant may keep it waiting: what it changes there (roles,
    /// databases) is not a tenant's to change.
    ///
    /// # Errors
    /// [`AdminError::Connect`] or [`AdminError::Host`].
    pub async fn connect(&self) -> Result<HostSession, AdminError> {
        let session = self.connect_as(&self.user, self.password.as_ref(), &self.database, STEERED).await?;
        session.before_tenants(self).await
    }

    /// A session of the administrator in `database`, in which nothing runs that somebody else has defined there.
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
        let who = rows.first().map(|row| (row.get::<_, String>(0), row.get::<_, String>(1)));
        if who.as_ref().is_none_or(|(session, current)| session != current || *session != self.user) {
            return Err(AdminError::Refused(format!(
                "host {:?} lets {:?} into database {database:?} as somebody else ({who:?}); see ALTER DATABASE … SET and \
                 ALTER ROLE … SET there",
                self.name, self.user
            )));
        }
        if !event_triggers_are_off(rights) {
            self.refuse_event_triggers(&inside, database).await?;
        }
        Ok(inside)
    }

    /// A tenant may have limited its database's connections; that counts for every administrator but a superuser. Whether
    /// it was that.
    async fn lift_limit(&self, database: &str) -> Result<bool, AdminError> {
        let session = self.connect().await?;
        let limited =
            session.texts("looking at the database's limit", TENANTS_LIMIT, &[&database, &MARK]).await?;
        let Some(lift) = limited.first() else { return Ok(false) };
        session.run("lifting the limit of a tenant's database", lift).await?;
        Ok(true)
    }

    /// What pg_dump's session as the administrator starts with. It sets its own search path.
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
            "database {database:?} on host {:?} has event triggers whose functions others can replace, and which would run \
             with the rights of {:?}: {}; as a superuser there: ALTER EVENT TRIGGER … DISABLE, or give the function to \
             a superuser",
            self.name,
            self.user,
            found.join(", ")
        )))
    }

    /// What the administrator may do, asked once, from its own database. Refuses a database whose event trigger would fire
    /// at our login, where that cannot be kept from firing.
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
                "database {database:?} on host {:?} has an event trigger that fires at login, and {:?} is no superuser, \
                 whom it would spare; drop it there (DROP EVENT TRIGGER)",
                self.name, self.user
            )));
        }
        Ok(rights)
    }
}

/// From 17 on a superuser can leave all of them out.
fn event_triggers_are_off(rights: AdminRights) -> bool {
    rights.superuser && rights.server_version >= LOGIN_TRIGGERS_SINCE
}

/// What the administrator's session in another's database starts with.
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
        // Only a superuser can be made somebody else by ALTER DATABASE … SET SESSION AUTHORIZATION.
        options += &format!(" -c session_authorization={}", escaped(user));
    }
    options
}

/// As the server splits options: at white space, unless a backslash is in front of it.
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
